"""Validation perplexity of a run: python eval.py checkpoint=runs/quickstart/llama_tiny-alice-s42"""

from omegaconf import DictConfig

from pretraining.config import run_door


def main(cfg: DictConfig) -> None:
    """Print the validation perplexity of a saved run or model."""
    from pretraining.restore import evaluate_saved

    result = evaluate_saved(cfg)
    print(
        f"validation perplexity {result.perplexity:.4f} (loss {result.loss:.6f}) on {result.tokens:,} tokens; "
        f"by the convention of the published numbers {result.perplexity_galore:.4f}"
    )


if __name__ == "__main__":
    run_door(main, root="eval")
