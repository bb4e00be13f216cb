"""The trainer end to end, on a model of a few thousand weights."""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data import load_tokenizer
from data.errors import UserError
from pretraining import checkpoint
from pretraining.config import compose, validate
from pretraining.evaluation import evaluate, galore_perplexity, row_losses, target_count
from pretraining.record import write_report
from pretraining.restore import evaluate_saved, open_saved
from pretraining.schedule import rate_factor, set_rates
from pretraining.trainer import NonFiniteLoss, Trainer, make_plan, train, write_text

ROOT = Path(__file__).parents[2]
TINY = [
    "experiment=quickstart",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "trainer.steps=8",
    "trainer.batch_size=6",
    "trainer.precision=fp32",
    "trainer.eval_every=4",
    "trainer.save_every=4",
    "trainer.sample_tokens=4",
    "data.length=32",
    "data.validation_max_tokens=2000",
    "eval.ngrams=false",
    "optimizer.lr=0.02",
]
ALICE = ["optimizer=alice", "optimizer.rank=8", "optimizer.leading=3", "optimizer.update_interval=3"]


def config(run_dir, *more):
    cfg = compose([*TINY, *(ALICE if not any("optimizer=" in m for m in more) else []), f"run_dir={run_dir}", *more])
    validate(cfg)
    return cfg


ALONE = ["trainer.save_every=0", "trainer.save_model=false", "trainer.sample_tokens=0"]  # metrics and nothing else


def lines(run_dir, kind=None):
    every = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if kind in (None, line["kind"])]


def losses(run_dir):
    return [(line["kind"], line["step"], line["loss"]) for line in lines(run_dir)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(folder))
    return folder


def test_the_record_holds_what_the_contract_says(run):
    assert {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "samples.txt", "model"} <= set(
        os.listdir(run)
    )
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 9))
    assert set(lines(run, "train")[0]) >= {
        "loss", "lr", "adam_lr", "tokens", "tokens_per_second", "optimizer_ms", "grad_norm"
    }  # fmt: skip
    assert [line["step"] for line in lines(run, "eval")] == [4, 8]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == 8 * 6 * 32
    assert summary["perplexity"] == pytest.approx(math.exp(lines(run, "eval")[-1]["loss"]))
    if not torch.cuda.is_available():
        assert summary["mfu"] is None
    assert summary["optimizer_state_bytes"] > 0
    environment = json.loads((run / "environment.json").read_text())
    assert str(ROOT) not in json.dumps(environment)


def test_rates_follow_warmup_and_cosine(run):
    rates = [line["lr"] for line in lines(run, "train")]
    assert rates == pytest.approx([0.02 * rate_factor(k, 8) for k in range(8)])
    assert rate_factor(0, 100) == 0
    assert rate_factor(5, 100) == pytest.approx(0.5)
    assert rate_factor(10, 100) == 1
    assert rate_factor(55, 100) == pytest.approx(0.55)
    assert rate_factor(100, 100) == pytest.approx(0.1)


def test_the_schedule_is_the_runs_own(tmp_path):
    train(config(tmp_path, *ALONE, "trainer.warmup_fraction=0.5", "trainer.min_lr_ratio=0.4"))
    cosine = [0.4 + 0.3 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [line["lr"] / 0.02 for line in lines(tmp_path, "train")] == pytest.approx([0, 0.25, 0.5, 0.75, *cosine])


def test_a_limit_above_every_norm_changes_nothing(tmp_path):
    for name, limit in (("without", "null"), ("with", "1000")):
        train(config(tmp_path / name, *ALONE, "trainer.steps=4", f"trainer.grad_clip={limit}"))
    assert losses(tmp_path / "without") == losses(tmp_path / "with")


def test_mixed_precision_computes_in_bfloat16_and_so_does_its_evaluation(tmp_path):
    cfg = config(tmp_path, "trainer.steps=2", "trainer.precision=bf16_mixed")
    trainer, seen = Trainer(cfg, make_plan(cfg)), []
    layer = trainer.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, _, out: seen.append((module.training, out.dtype)))
    trainer.run()
    assert set(seen) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    again = evaluate_saved(compose([f"checkpoint={tmp_path}"], root="eval"))
    assert again.perplexity == json.loads((tmp_path / "summary.json").read_text())["perplexity"]


def test_the_seed_reaches_weights_rows_and_draws(tmp_path):
    """data.seed is the rows' own."""
    found = []
    for i, seeds in enumerate((["seed=1"], ["seed=2"], ["seed=2", "data.seed=1"])):
        cfg = config(tmp_path / str(i), *seeds)
        trainer = Trainer(cfg, make_plan(cfg))
        weight = trainer.model.lm_head.weight.detach().clone()
        found.append((weight, next(trainer.batches)["input_ids"], trainer.optimizer.param_groups[0]["seed"]))
        trainer.batches.close()
    (weight_1, rows_1, draws_1), (weight_2, rows_2, draws_2), (weight_3, rows_3, draws_3) = found
    assert not torch.equal(weight_1, weight_2) and torch.equal(weight_2, weight_3)
    assert not torch.equal(rows_1, rows_2) and torch.equal(rows_1, rows_3)
    assert (draws_1, draws_2, draws_3) == (1, 2, 2)


def test_attention_within_documents_reaches_training_and_validation(tmp_path):
    cfg = config(tmp_path, "data.attention=document")
    trainer = Trainer(cfg, make_plan(cfg))
    assert "position_ids" in next(trainer.batches)
    assert len(trainer.validation) == 3, "inputs, labels, positions"
    trainer.batches.close()


def test_estimates_of_curvature_are_drawn_anew_at_every_step(tmp_path):
    cfg = config(tmp_path, "optimizer=sophia_h", "optimizer.update_interval=1")
    trainer, given = Trainer(cfg, make_plan(cfg)), []
    rows = next(trainer.batches)
    trainer.optimizer.update_estimate = lambda estimates: given.append(next(iter(estimates.values())))
    for trainer.done in (0, 1, 1):
        trainer._estimate_curvature(rows, torch.tensor(100))
    trainer.batches.close()
    assert not torch.equal(given[0], given[1]) and torch.equal(given[1], given[2])


def test_both_rates_are_scheduled():
    p, q = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.4}, {"params": [q], "lr": 0.1}])
    for factor in (0.5, 0.25):
        set_rates(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.4 * factor, 0.1 * factor]


@pytest.mark.parametrize("optimizer", ["alice", "racs", "muon", "adam", "sophia_g", "sophia_h"])
def test_resuming_gives_the_same_losses_bit_for_bit(tmp_path, optimizer):
    """Stopped after 3 and after 6 of 8 steps, with random switching between."""
    more = ["trainer.save_every=3", f"optimizer={optimizer}"]
    more += ALICE[1:] if optimizer == "alice" else []
    more += ["optimizer.update_interval=2"] if "sophia" in optimizer else []  # estimates before and after each stop
    train(config(tmp_path / "whole", *more))
    stopped = tmp_path / "stopped"

    class Stop(Exception):
        pass

    def train_until(step):
        trainer = Trainer(cfg := config(stopped, *more), make_plan(cfg))
        original = trainer._step

        def step_or_stop():
            if trainer.done == step:
                raise Stop
            original()

        trainer._step = step_or_stop
        with pytest.raises(Stop):
            trainer.run()

    train_until(5)  # its last two steps are lost, and done again
    train_until(7)
    train(config(stopped, *more))
    assert losses(stopped) == losses(tmp_path / "whole")
    ours, theirs = (
        torch.load(f, weights_only=True) if f.suffix == ".bin" else _safetensors(f)
        for f in (tmp_path / "whole/model/model.safetensors", stopped / "model/model.safetensors")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _safetensors(file):
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("rows", ["pack", "truncate"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, rows):
    """Micro-batches of unequal numbers of real tokens; a mean of means would be wrong by far more."""
    gradients = []
    for size in (6, 4, 1):
        cfg = config(tmp_path / str(size), f"data.rows={rows}", f"trainer.micro_batch_size={size}", "data.length=200")
        trainer = Trainer(cfg, make_plan(cfg))
        batch = next(trainer.batches)
        targets = target_count(batch["labels"]).sum()
        loss = trainer._backward(batch, targets)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()] + [loss])
        trainer.batches.close()
    if rows == "truncate":
        assert len(set(target_count(batch["labels"]).tolist())) > 1
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_row_losses_are_the_models_own():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    labels[1, 3:] = -100
    expected = [
        -sum(
            torch.log_softmax(logits[b, t].double(), 0)[labels[b, t + 1]].item()
            for t in range(4)
            if labels[b, t + 1] >= 0
        )
        for b in range(3)
    ]
    assert row_losses(logits, labels).tolist() == pytest.approx(expected, rel=1e-6)
    assert target_count(labels).tolist() == [4, 2, 4]


def test_perplexity_does_not_depend_on_the_batch_size(run):
    saved = open_saved(compose([f"checkpoint={run}", "device=cpu"], root="eval"))
    torch.manual_seed(0)
    ids = torch.randint(0, 1024, (11, 32))
    labels = ids.clone()
    labels[::3, 20:] = -100
    results = [evaluate(saved.model, (ids, labels), batch_size=b).loss for b in (1, 4, 11)]
    assert results[1:] == pytest.approx([results[0]] * 2, rel=1e-6)


def test_the_published_convention_divides_by_one_batch_too_many():
    losses_, counts = torch.tensor([30.0, 10.0, 8.0, 20.0, 5.0]), torch.tensor([10, 10, 4, 10, 5])
    means = [40 / 20, 28 / 14, 5 / 5]
    assert galore_perplexity(losses_, counts, rows=2) == pytest.approx(math.exp(sum(means) / 4))


def test_eval_reproduces_the_last_perplexity(run):
    expected = json.loads((run / "summary.json").read_text())
    for path in (run, run / "model", sorted((run / "checkpoints").iterdir())[-1]):
        result = evaluate_saved(compose([f"checkpoint={path}"], root="eval"))
        assert result.perplexity == expected["perplexity"]
        assert result.perplexity_galore == expected["perplexity_galore"]


def test_eval_says_where_other_data_have_rows_of_another_length(run, capsys):
    other = [f"checkpoint={run}", "data=sample", "data.validation_max_tokens=2000"]
    same = evaluate_saved(compose([*other, "data.length=32"], root="eval"))
    assert same.perplexity == json.loads((run / "summary.json").read_text())["perplexity"]
    assert "rows of" not in capsys.readouterr().out
    evaluate_saved(compose(other, root="eval"))
    assert "rows of 256 tokens, where the run had 32: data.length=32 evaluates at" in capsys.readouterr().out


def test_a_report_makes_its_folder_or_says_that_it_cannot(tmp_path):
    write_report(tmp_path / "a/b/report.json", {"loss": 1.5})
    assert json.loads((tmp_path / "a/b/report.json").read_text()) == {"loss": 1.5}
    with pytest.raises(UserError, match=r"report.json/new.json cannot be written .*: choose another file"):
        write_report(tmp_path / "a/b/report.json/new.json", {})


def test_generation_and_transformers_open_the_model(run):
    saved = open_saved(compose([f"checkpoint={run}", "device=cpu"], root="generate"))
    before = torch.get_rng_state()
    text = write_text(saved.model, saved.tokenizer, "The", 8, seed=1)
    assert text.startswith("The") and len(text) > 3
    assert torch.equal(before, torch.get_rng_state())
    assert write_text(saved.model, saved.tokenizer, "The", 8, seed=1) == text
    assert isinstance(write_text(saved.model, saved.tokenizer, "", 4), str)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("The house", return_tensors="pt").input_ids
    assert ids[0].tolist()[: len(saved.tokenizer.encode(["The house"])[0])] == saved.tokenizer.encode(["The house"])[0]
    torch.testing.assert_close(model(ids).logits, saved.model(ids).logits)


def test_pure_bf16_keeps_everything_in_bf16(tmp_path):
    cfg = config(tmp_path / "run", "trainer.precision=bf16", "trainer.steps=2", "trainer.eval_every=2")
    trainer = Trainer(cfg, make_plan(cfg))
    trainer.run()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    state = trainer.optimizer.state[trainer.model.model.layers[0].mlp.up_proj.weight]
    assert state["m"].dtype == torch.bfloat16 and state["Q"].dtype == torch.float32
    result = evaluate_saved(compose([f"checkpoint={tmp_path / 'run'}"], root="eval"))
    assert result.perplexity == json.loads((tmp_path / "run/summary.json").read_text())["perplexity"]


def test_a_finished_run_is_not_trained_again_and_never_keeps_the_old_one(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    train(config(run))
    assert "finished" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_starting_over_keeps_the_old_folder(tmp_path):
    short = ["trainer.steps=1", "trainer.eval_every=1", "trainer.save_every=0"]
    train(config(tmp_path / "run", *short))
    old = (tmp_path / "run/metrics.jsonl").read_text()
    train(config(tmp_path / "run", *short, "trainer.resume=never"))
    assert (tmp_path / "run~1/metrics.jsonl").read_text() == old
    assert len(lines(tmp_path / "run", "train")) == 1


def test_a_folder_of_another_configuration_is_refused_and_left_alone(run):
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"another configuration \(optimizer.lr: 0.02 there, 0.03 here\)"):
        train(config(run, "optimizer.lr=0.03"))
    with pytest.raises(UserError, match=r"another configuration \(optimizer.products: float32 there, bfloat16 here\)"):
        train(config(run, "optimizer.products=bfloat16"))
    assert (run / "config.yaml").read_bytes() == before


def test_divergence_stops_the_run_and_keeps_the_record(tmp_path):
    with pytest.raises(
        NonFiniteLoss, match=r"at step \d+ \(rate .*\); the last good record is step \d+, loss"
    ) as caught:
        train(
            config(
                tmp_path / "run", "optimizer=adam", "optimizer.lr=1e30", "optimizer.adam_lr=1e30", "trainer.steps=50",
                "trainer.eval_every=100", "trainer.save_every=0",
            )
        )  # fmt: skip
    assert caught.value.exit_code == 3
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run", "train"))
    written = json.loads((tmp_path / "run/diverged.json").read_text())
    assert written == {"step": caught.value.step, "message": str(caught.value)}
    assert f"at step {caught.value.step} " in str(caught.value)


@pytest.mark.parametrize("step", [2, 3])
def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path, monkeypatch, step):
    """The loss may still be finite; step 3 is a refresh, whose eigenvectors would not exist either.

    On the CPU, where a step is known before its update; a GPU's figures are read one step later.
    """
    more = ["trainer.save_every=1", "trainer.device=cpu"]
    cfg = config(tmp_path / "run", *more)
    trainer = Trainer(cfg, make_plan(cfg))
    backward = trainer._backward

    def poisoned(rows, targets):
        loss = backward(rows, targets)
        if trainer.done + 1 == step:
            trainer.model.lm_head.weight.grad[0, 0] = math.nan
            trainer.model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(trainer, "_backward", poisoned)
    with pytest.raises(
        NonFiniteLoss, match=f"the gradient norm is not finite at step {step} .* record is step {step - 1}"
    ):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    train(config(tmp_path / "run", *more))  # the last checkpoint is good
    assert lines(tmp_path / "run", "train")[-1]["step"] == 8


def test_going_back_forgets_what_came_after(tmp_path):
    """Resumed from an earlier checkpoint and stopped: the record tells of nothing that was not done again."""
    folder = tmp_path / "run"
    train(config(folder, "trainer.save_every=2", "trainer.keep_last=9"))
    before = losses(folder)
    back = f"trainer.resume={folder}/checkpoints/step-0000002"
    trainer = Trainer(cfg := config(folder, "trainer.save_every=2", "trainer.keep_last=9", back), make_plan(cfg))
    assert not (folder / "summary.json").exists()
    assert [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")] == ["step-0000002"]
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert (folder / "samples.txt").read_text() == ""
    trainer.run()
    assert losses(folder) == before
    assert json.loads((folder / "environment.json").read_text())["resumed"][0]["step"] == 2


def test_a_run_stopped_after_its_last_step_only_ends(tmp_path):
    train(config(tmp_path / "run"))
    record, summary = losses(tmp_path / "run"), (tmp_path / "run/summary.json").read_text()
    (tmp_path / "run/summary.json").unlink()
    train(config(tmp_path / "run"))
    assert losses(tmp_path / "run") == record
    assert json.loads((tmp_path / "run/summary.json").read_text())["perplexity"] == json.loads(summary)["perplexity"]


def test_memory_settings_may_change_in_the_middle(tmp_path):
    short = ["trainer.steps=2", "trainer.eval_every=2", "trainer.save_every=1"]
    train(config(tmp_path / "run", *short))
    (tmp_path / "run/summary.json").unlink()
    train(config(tmp_path / "run", *short, "trainer.micro_batch_size=1", "eval.batch_size=2", "trainer.log_every=2"))
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optimizer=racs"], "was made with optimizer"),
        ([*ALICE, "optimizer.rank=4"], "was made with optimizer.rank=8, not 4"),
        ([*ALICE, "optimizer.products=bfloat16"], "was made with optimizer.products=float32, not bfloat16"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, run, more, message):
    path = sorted((run / "checkpoints").iterdir())[0]
    with pytest.raises(UserError, match=message):
        train(config(tmp_path / "run", *more, f"trainer.resume={path}"))


@pytest.mark.parametrize("setting", ["model.num_attention_heads=4", "model.rope_theta=50", "model.rms_norm_eps=0.1"])
def test_weights_of_another_function_are_refused_though_their_shapes_agree(tmp_path, run, setting):
    path = sorted((run / "checkpoints").iterdir())[0]
    key, _, value = setting.partition("=")
    with pytest.raises(UserError, match=f"was made with {key}=.*, not {value}"):
        train(config(tmp_path / "run", setting, f"trainer.resume={path}"))


def test_a_run_does_not_go_on_with_other_validation_text(tmp_path):
    """Its training text, which the loader compares, is the same; the folder of both may move."""
    sample = ROOT / "data/sample"
    for name in ("a", "moved", "other"):
        shutil.copytree(sample / "en", tmp_path / name / "en")
    [file] = (tmp_path / "other/en").glob("c4-validation.*")
    with gzip.open(file, "rt") as opened:
        documents = opened.read().splitlines(keepends=True)
    with gzip.open(file, "wt") as opened:
        opened.writelines(documents[1:])
    short = ["data=c4_local", "data.rows=pack", "data.length=32", "data.validation_max_tokens=2000", "trainer.steps=2",
             "trainer.eval_every=2", "trainer.save_every=1"]  # fmt: skip
    train(config(tmp_path / "run", *short, f"data.path={tmp_path / 'a'}"))
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(UserError, match=r"the validation text is not the one that .*run began with"):
        train(config(tmp_path / "run", *short, f"data.path={tmp_path / 'other'}"))
    train(config(tmp_path / "run", *short, f"data.path={tmp_path / 'moved'}"))
    assert (tmp_path / "run/summary.json").exists()


def test_the_tokenizers_file_may_move(tmp_path):
    short = ["trainer.steps=2", "trainer.eval_every=2", "trainer.save_every=1"]
    for name in ("a.model", "b.model"):
        shutil.copy(ROOT / "data/sample/sample_1k.model", tmp_path / name)
    train(config(tmp_path / "run", *short, f"tokenizer={tmp_path / 'a.model'}"))
    (tmp_path / "run/summary.json").unlink()
    train(config(tmp_path / "run", *short, f"tokenizer={tmp_path / 'b.model'}"))
    summary = tmp_path / "run/summary.json"
    assert summary.exists()

    train(config(tmp_path / "run", *short, f"tokenizer={tmp_path / 'a.model'}"))
    with pytest.raises(
        UserError, match="run holds a run with another tokenizer than sample_4k: choose another run_dir"
    ):
        train(config(tmp_path / "run", *short, "tokenizer=sample_4k"))
    summary.unlink()
    file = tmp_path / "run/environment.json"
    file.write_text(file.read_text().replace(load_tokenizer("sample_1k").fingerprint, "another"))
    with pytest.raises(UserError, match=r"another tokenizer than .*a.model"):
        train(config(tmp_path / "run", *short, f"tokenizer={tmp_path / 'a.model'}"))


def test_accelerates_own_precision_does_not_reach_the_run(tmp_path, run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(config(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(run)


def test_a_vocabulary_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match="sample_4k has 4,096 pieces, but llama_tiny has 1,024"):
        train(config(tmp_path / "run", "tokenizer=sample_4k"))
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_pruned_and_those_of_other_models_refused(tmp_path, run):
    cfg = config(tmp_path / "run", "trainer.save_every=2", "trainer.keep_last=2", "trainer.save_model=false")
    train(cfg)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run/checkpoints")] == [
        "step-0000006",
        "step-0000008",
    ]
    other = config(
        tmp_path / "other", "model.num_hidden_layers=1", f"trainer.resume={tmp_path}/run/checkpoints/step-0000006"
    )
    with pytest.raises(UserError, match=r"was made with model.num_hidden_layers=2, not 1"):
        train(other)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        train(config(tmp_path / "third", f"trainer.resume={tmp_path}/nowhere"))


def door(*words, check=True, **environment):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_dry_run_of_the_papers_largest_run_needs_no_network():
    words = "train.py optimizer=alice model=llama_1b trainer.dry_run=true"
    launched = door("-m", "accelerate.commands.launch", "--cpu", *words.split(), HF_HUB_OFFLINE="1").stdout
    for expected in (
        "1,339,082,752 parameters",
        "rank 512, leading 160, update_interval 200, compensation_scale 0.2",
        "rate 0.02 x scale 0.25 = 0.005",
        "168 matrices",
        "100,000 steps of 512 rows x 256 tokens = 13.1B tokens",
        "warm-up 10,000 steps from 0, cosine to 0.1 of the rate",
        "allenai/c4",
        "tokenizer t5-base",
    ):
        assert expected in launched


def test_mistakes_end_in_a_sentence_and_an_exit_code():
    for words, expected in (
        (["optimizer=alicia"], "There is no optimizer=alicia. Did you mean alice?"),
        (["model=llama_60m", "optimizer.rank=600"], "optimizer.rank (600) is larger than the smaller side"),
    ):
        done = door("train.py", *words, check=False)
        assert done.returncode == 2
        assert expected in done.stderr and "Traceback" not in done.stderr


SOPHIA = ["optimizer=sophia_h", "optimizer.lr=0.001", "optimizer.update_interval=2", "optimizer.gamma=1"]


@pytest.mark.parametrize(("n", "method"), [(2, SOPHIA), (4, ALICE)], ids=["2-sophia", "4-alice"])
def test_processes_compute_the_losses_and_gradients_of_one(tmp_path, n, method):
    """Uneven shares of rows (6 over 4) and of real tokens; Alice itself would not notice a wrong scale of gradients."""
    more = [*method, "data.rows=truncate", "data.length=200", "trainer.save_every=100", "trainer.save_model=false"]
    more += ["trainer.device=cpu"]  # there may be fewer GPUs than processes
    train(config(tmp_path / "one", *more))
    words = [*TINY, *more, f"run_dir={tmp_path / 'many'}"]
    door("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py", *words)
    for ours, theirs in zip(lines(tmp_path / "many"), lines(tmp_path / "one"), strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-3)


def test_processes_that_do_not_work_together_are_noticed():
    done = door(
        "-c",
        "import os, torch; os.environ['WORLD_SIZE'] = '2'\n"
        "from pretraining.trainer import make_accelerator\n"
        "from accelerate.state import PartialState\n"
        "import unittest.mock as mock\n"
        "with mock.patch('accelerate.Accelerator') as a:\n"
        "    a.return_value.num_processes, a.return_value.distributed_type = 1, 'NO'\n"
        "    make_accelerator(torch.device('cpu'))",
        check=False,
    )
    assert "2 processes were launched, but they do not work together" in done.stderr


def test_tensorboard_mirrors_the_record(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path / "run", "tracker.name=tensorboard", "trainer.steps=2", "trainer.eval_every=2"))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([line["loss"] for line in lines(tmp_path / "run", "train")], rel=1e-6)


def test_tensorboard_shows_a_step_that_was_done_again_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pretraining.trackers import make_tracker

    for done, values in ((0, [9.0, 8.0, 8.0, 8.0]), (0, [3.0, 2.0, 1.0]), (1, [7.0, 6.0])):
        tracker = make_tracker(OmegaConf.create({"name": "tensorboard"}), tmp_path, {}, done, write=True)
        for step, value in enumerate(values, done + 1):
            tracker.log("train", step, {"loss": value})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 7.0), (3, 6.0)]


def test_what_accelerate_config_says_of_compilation_is_not_used():
    code = (
        "import torch; from pretraining.trainer import make_accelerator; "
        "print(make_accelerator(torch.device('cpu')).state.dynamo_plugin.backend.value)"
    )
    said = {**os.environ, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=said, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["NO"]


def test_wandb_offline_mirrors_the_record(tmp_path, monkeypatch):
    """Without an account or a network; the identity belongs to the folder, so that a resumed run is the same one."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config(tmp_path / "run", "tracker.name=wandb", "trainer.steps=2", "trainer.eval_every=2"))
    kept = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(kept) == 1
    assert kept[0].name.endswith((tmp_path / "run/wandb-id").read_text().strip())


def test_nothing_optional_is_imported_by_training():
    code = (
        "import sys, pretraining.trainer, data, optimizers; print([m for m in ('wandb', 'tensorboard', 'matplotlib') "
        "if m in sys.modules])"
    )
    assert door("-c", code).stdout.strip() == "[]"
