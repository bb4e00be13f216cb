"""Pretrain a LLaMA: accelerate launch train.py optimizer=alice model=llama_1b"""

import os
from pathlib import Path

from omegaconf import DictConfig

from pretraining.config import run_door


def main(cfg: DictConfig) -> None:
    """Pretrain a LLaMA with the chosen optimizer, and draw its picture."""
    from pretraining.trainer import train

    run_dir = train(cfg)
    if run_dir is not None and os.environ.get("RANK", "0") == "0":
        from reporting import finish

        for line in finish(run_dir):
            print(f"wrote {line}" if isinstance(line, Path) else line)


if __name__ == "__main__":
    run_door(main, root="train")
