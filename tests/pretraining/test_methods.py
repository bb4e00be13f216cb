"""Every method through the trainer with its own recipe: it learns, and says nothing that a user should not see."""

import json
import warnings

import pytest

from optimizers import METHODS
from pretraining.config import CONFIGS, compose, validate
from pretraining.trainer import train

SMALL = [
    "experiment=quickstart",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "trainer.steps=30",
    "trainer.batch_size=4",
    "trainer.precision=fp32",
    "trainer.eval_every=10",
    "trainer.save_every=0",
    "trainer.save_model=false",
    "trainer.sample_tokens=0",
    "data.length=32",
    "data.validation_max_tokens=1000",
    "eval.ngrams=false",
    "optimizer.adam_lr=1e-12",  # so that what is learned, the matrices have learned
]


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_quietly(name, library, tmp_path, capfd):
    library(name)
    more = ["optimizer.target=torch.optim.RMSprop", "optimizer.lr=0.001"] if name == "any" else []
    file = (CONFIGS / "optimizer" / f"{name}.yaml").read_text()
    for key, value in (("rank", 8), ("leading", 4), ("update_interval", 7)):
        if f"\n{key}:" in file and name != "apollo_mini":
            more.append(f"optimizer.{key}={value}")
    cfg = compose([*SMALL, f"optimizer={name}", f"run_dir={tmp_path}/run", *more])
    validate(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the libraries, hidden from users by Python
        train(cfg)
    shown = "".join(capfd.readouterr()).lower()
    assert not any(word in shown for word in ("warning", "failed", "deprecat", "traceback"))
    losses = [
        line["loss"]
        for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        if line["kind"] == "eval"
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] - losses[2] > 3e-4  # a rate of 1e-12 gives less than 1e-6
