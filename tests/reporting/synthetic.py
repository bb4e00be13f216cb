"""Run records as the trainer writes them, without a trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

TOKENS_PER_STEP = 4096


def write_run(
    folder: Path,
    optimizer: str = "alice",
    lr: float = 0.02,
    adam_lr: float | None = 0.005,
    seed: int = 42,
    perplexity: float = 57.25,
    steps: int = 300,
    finished: bool = True,
    log_every: int = 1,
    eval_every: int = 50,
    diverged: int | None = None,
    summary: dict[str, Any] | None = None,
    data: str = "sample",
    kind: str = "sample",
    wobble: float = 0.05,
    tokenizer: str = "sample_1k",
) -> Path:
    """A record whose loss falls from ln(1024) to ln(perplexity); `diverged` is the step of a non-finite loss."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "experiment_name": "quickstart",
        "recipe": f"{optimizer}-llama_tiny",
        "seed": seed,
        "tokenizer": tokenizer,
        "model": {"name": "llama_tiny", "hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 1024},
        "optimizer": {"name": optimizer, "lr": lr, "adam_lr": adam_lr, "betas": [0.9, 0.9, 0.999], "rank": 64},
        "data": {"kind": kind, "name": data, "rows": "truncate"},
        "trainer": {"steps": steps, "batch_size": 16, "precision": "fp32", "warmup_fraction": 0.1, "grad_clip": None},
    }
    environment = {
        "commit": "4f81fa7c0ffee",
        "uncommitted_changes": False,
        "python": "3.11.7",
        "parameters": 3_745_024,
        "command": "train.py experiment=quickstart optimizer=alice",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"device": "cpu", "cpu": "An Example CPU | 2 GHz", "cores": 2, "threads": 2},
        "data": {
            split: {"name": data, "files": 4, "path": "/home/somebody/texts"} for split in ("train", "validation")
        },
        "tokenizer": {"name": tokenizer, "fingerprint": "f1f2f3"},
    }
    first, last = math.log(1024), math.log(perplexity)

    def loss(step: int) -> float:
        return last + (first - last) * math.exp(-6 * step / steps) - (first - last) * math.exp(-6) * step / steps

    lines: list[dict[str, Any]] = []
    for step in range(1, (diverged or steps) + 1):
        warm = min(1.0, (step - 1) / (0.1 * steps))
        factor = warm if warm < 1 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step / steps - 0.1) / 0.9))
        if step % log_every == 0 or step in (1, steps):
            lines.append(
                {
                    "kind": "train",
                    "step": step,
                    "loss": loss(step) + wobble * math.sin(37.0 * step),
                    "lr": lr * factor,
                    "adam_lr": (adam_lr or lr) * factor,
                    "tokens": TOKENS_PER_STEP * step,
                    "tokens_per_second": 15000.0,
                    "optimizer_ms": 21.5,
                    "grad_norm": 1.5 / (1 + step / 40) + 0.05 * math.cos(11.0 * step) ** 2,
                }
            )
        if step % eval_every == 0 or step == steps:
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "loss": loss(step),
                    "perplexity": math.exp(loss(step)),
                    "tokens": 123_456,
                }
            )  # of the validation set
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if diverged is not None:
        (folder / "diverged.json").write_text(json.dumps({"step": diverged, "message": "the loss is not finite"}))
    elif finished:
        values = {
            "perplexity": perplexity,
            "perplexity_galore": perplexity * 0.97,
            "steps": steps,
            "tokens": TOKENS_PER_STEP * steps,
            "parameters": 3_745_024,
            "optimizer_state_bytes": 24_117_248,
            "peak_memory_bytes": 1_288_490_189,
            "peak_memory_kind": "process resident set",
            "mfu": None,
            "tokens_per_second": 14_876.4,
            "optimizer_ms": 21.5,
            "wall_seconds": 93.4,
            "unigram_perplexity": 412.5,
            "bigram_perplexity": 103.75,
            "validation_tokens": 123_456,
        }
        (folder / "summary.json").write_text(json.dumps(values | (summary or {})))
    return folder
