"""Text from a run: python generate.py checkpoint=runs/quickstart/llama_tiny-alice-s42 prompt="The" """

from omegaconf import DictConfig

from pretraining.config import run_door


def main(cfg: DictConfig) -> None:
    """Write on from a prompt with a saved run or model."""
    from pretraining.restore import open_saved
    from pretraining.trainer import write_text

    saved = open_saved(cfg)
    print(
        write_text(
            saved.model,
            saved.tokenizer,
            str(cfg.prompt),
            cfg.tokens,
            seed=cfg.seed,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            autocast=saved.computing(),
        )
    )


if __name__ == "__main__":
    run_door(main, root="generate")
