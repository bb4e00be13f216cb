"""Small plans of the fair comparison and a world in which every run has a known perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from sweeps import Job

METHODS = {"adam": [0.0003, 0.001, 0.003], "alice": [0.006, 0.02, 0.06], "racs": [0.006, 0.02, 0.06]}
MODELS = ["llama_tiny", "llama_tiny_4k"]
STEPS = 24

PLANS = {
    "fair_rates": {
        "seeds": [42],
        "extend": 3,
        "adam_lr": {"default": [0.006, 0.02, 0.06]},
        "lr": METHODS,
        "settings_of": {"alice": ["optimizer.update_interval=12"]},
    },
    "fair_control": {"seeds": [42], "adam_lr": [0.001], "lr": METHODS},
    "fair_best": {
        "rates_from": "fair_rates",
        "seeds": [43, 44, 45],
        "settings": [f"trainer.steps={STEPS}"],
        "evaluate": {"c4": ["data=c4_local"]},
        "variants": {"adam": None, "alice": None, "racs": None},
    },
    "fair_ablations": {
        "rates_from": "fair_rates",
        "seeds": [43, 44, 45],
        "variants": {
            "alice": None,
            "nothing": {"optimizer": "alice", "settings": ["optimizer.tracking=false"]},
            "tracking_switch": {"optimizer": "alice", "settings": ["optimizer.compensation=none"]},
            "no_warmup": {"optimizer": "alice", "settings": ["trainer.warmup_fraction=0"]},
            "racs": None,
            "racs_no_ema": {"optimizer": "racs_no_ema", "rates": "racs"},
        },
    },
    "fair_batch": {
        "rates_from": "fair_rates",
        "seeds": [43],
        "variants": {
            f"{method}_{size}{'' if factor == 1 else '_lr3'}": {"optimizer": method, "lr_factor": factor}
            for method in ("adam", "alice")
            for size, factor in (("2k", 1), ("64k", 1), ("64k", 3))
        },
    },
    "fair_repeat": {"rates_from": "fair_rates", "seeds": [42], "variants": {"adam": None, "alice": None}},
    "fair_again": {
        "models": ["llama_tiny"],
        "rates_from": "fair_rates",
        "seeds": [42],
        "variants": {"adam": None},
    },
    "fair_adam": {
        "rates_from": "fair_rates",
        "seeds": [42],
        "variants": {"adam_b95": {"optimizer": "adam", "settings": ["optimizer.betas=[0.9,0.95]"]}},
    },
    "fair_constants": {
        "rates_from": "fair_rates",
        "seeds": [42],
        "variants": {
            "alice_k50": {"optimizer": "alice", "settings": ["optimizer.update_interval=50"]},
            "alice_k200": {"optimizer": "alice", "settings": ["optimizer.update_interval=200"]},
            **{
                f"{name}_k{steps}": {
                    "optimizer": "alice",
                    "settings": [*settings, f"optimizer.update_interval={steps}"],
                }
                for name, settings in {
                    "tracking_switch": ["optimizer.compensation=none"],
                    "nothing": ["optimizer.compensation=none", "optimizer.tracking=false"],
                }.items()
                for steps in (12, 200)
            },
            "alice_b3_98": {"optimizer": "alice", "settings": ["optimizer.betas=[0.9,0.9,0.98]"]},
        },
    },
    "fair_rates_b95": {
        "seeds": [42],
        "extend": 3,
        "adam_lr": {"default": [0.006, 0.02, 0.06]},
        "lr": METHODS,
        "settings": ["optimizer.adam_betas=[0.9,0.95]"],
    },
    "fair_best_b95": {
        "rates_from": "fair_rates_b95",
        "seeds": [43, 44, 45],
        "settings": [f"trainer.steps={STEPS}", "optimizer.adam_betas=[0.9,0.95]"],
        "variants": {"adam": None, "alice": None, "racs": None},
    },
    "fair_long": {
        "rates_from": "fair_rates",
        "seeds": [43],
        "settings": [f"trainer.steps={2 * STEPS}"],
        "variants": {"adam": None, "alice_lr03": {"optimizer": "alice", "lr_factor": 0.3}},
    },
}

# Best pair and perplexity there. RACS's best matrix rate lies outside the grid that its plan begins with.
BEST = {"adam": (0.001, 0.02, 60.0), "alice": (0.02, 0.006, 50.0), "racs": (0.2, 0.02, 61.0)}
VARIANTS = {"nothing": 1.2, "tracking_switch": 1.1, "no_warmup": 0.99, "racs_no_ema": 0.9}  # times the perplexity
BATCH = {"adam_64k": 0.5, "adam_64k_lr3": 0.6, "alice_64k": 0.55, "alice_64k_lr3": 0.4}


def write_plans(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, plan in PLANS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"experiment": "fair", "models": MODELS, **plan}))
    return folder


def perplexity(sweep: str, job: Job, name: str) -> float | None:
    """Worse by 10 % for each factor of e in the matrix rate from the best, and by 5 % in the Adam group's."""
    optimizer = job.optimizer.removesuffix("_no_ema")
    lr, adam_lr, lowest = BEST[optimizer]
    far = 0.1 * abs(math.log(job.lr / lr)) + 0.05 * abs(math.log(job.adam_lr / adam_lr))
    if sweep == "fair_batch":
        return lowest * BATCH.get(name, 1.0)
    # Alice gains on the first model only; seeds differ by half a per cent.
    model = 3.0 if job.model == "llama_tiny_4k" and optimizer == "alice" else 1.0
    seed = 0.005 * (job.seed - 44) if job.seed > 42 else 0.0
    return model * VARIANTS.get(name.partition("_k")[0], 1.0) * lowest * math.exp(far + seed)
