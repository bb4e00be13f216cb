"""Validation perplexity of a run: python eval.py checkpoint=runs/quickstart/llama_tiny-alice-s42"""

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from pretraining.config import run_door


def main(cfg: DictConfig) -> None:
    """Print the validation perplexity of a saved run or model."""
    from pretraining.record import write_report
    from pretraining.restore import evaluate_saved

    result = evaluate_saved(cfg)
    if cfg.json is not None:
        write_report(Path(cfg.json), asdict(result) | {"perplexity": result.perplexity})
    print(
        f"validation perplexity {result.perplexity:.4f} (loss {result.loss:.6f}) on {result.tokens:,} tokens; "
        f"by the convention of the published numbers {result.perplexity_galore:.4f}"
    )


if __name__ == "__main__":
    run_door(main, root="eval")
