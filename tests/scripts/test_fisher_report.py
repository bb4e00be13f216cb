"""The Fisher report: a measurement of a tiny model, and tables and figure from records that are made up."""

import json

import pytest
import torch

import fisher
from benchmarking import record as records
from benchmarking import structures as measuring
from pretraining.config import compose
from reporting import structures
from scripts import fisher_report as script

TINY = [
    "optimizer=adam",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "data.length=16",
    "trainer.batch_size=2",
]


def synthetic_record():
    """Two cases of every structure: Eigen-Adam is worse than Adam in one; everything captures less held out."""
    errors = [
        {"step": 4, "kind": kind, "block": 0, "layer": layer, "shape": [8, 16], "structure": r.name}
        | {"captured": round(0.5 - 0.01 * i, 2), "rescaled": 0.6, "held_out": 0.1, "elements": 7}
        for kind in structures.KINDS
        for layer in ("q", "up")
        for i, r in enumerate(measuring.ROWS)
    ]
    for line in errors:
        if line["structure"] == "Diagonal":
            line["captured"] = 0.3 if line["layer"] == "q" else 0.49
    timings = [
        {"layer": layer, "optimizer": name, "state": 256 * scale, "interval": interval}
        | {"step_ms": 1.0, "refresh_ms": refresh, "ms": 1.0 + scale}
        for layer in ("q", "up")
        for name, scale, interval, refresh in (("adam", 1, 1, None), ("eigen_adam", 2, 200, 30.0))
    ]
    settings = {"steps": 4, "moments": [4], "samples": 2, "blocks": [0], "seed": 42, "model": "llama_tiny"}
    settings |= {
        "data": {"name": "sample", "split": "train"},
        "optimizer": "adam",
        "batch_size": 2,
        "length": 16,
        "rank": 8,
    }
    settings |= {"leading": 2, "overrides": [], "seconds": 1}
    env = {"hardware": {"cpu": "made up"}, "command": "fisher_report.py --steps 4", "versions": {"torch": "0"}}
    return {
        "format": structures.RECORD_FORMAT,
        "settings": settings,
        "environment": env | {"commit": "abc"},
        "errors": errors,
        "timings": timings,
    }


@pytest.fixture
def folder(tmp_path):
    records.write(synthetic_record(), tmp_path / "records.json", ("errors", "timings"))
    return tmp_path


def cells(text, first):
    """The cells of the table row that starts with ``first``."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_record_survives_writing(folder):
    assert structures.read_record(folder / "records.json") == synthetic_record()


def test_tables_and_figure_come_from_the_record_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr(script, "measure", lambda *asked: pytest.fail("measured"))
    assert script.main(["--from-records", "--out", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    adam = cells(text, "Diag(v)")
    assert adam[1:4] == ["Adam", *["0.6050 (0.5100 to 0.7000)"] * 2]
    assert adam[-3:] == ["512", "2.000", "4.00"]  # two matrices of 128 weights
    shares = [f"{(0.3 + 0.49) / 2 / 0.37:.3f}"] * 2  # of what general blocks, the last row, capture
    assert cells(text, "Diagonal")[1:] == ["0.4000", "0.9000"] * 2 + shares
    assert cells(text, "c I")[1] == "SGD"
    assert cells(text, "c I")[-3:] == ["-", "-", "-"]  # not timed
    assert cells(text, "Diagonal | EigenAdam")[2:] == ["1 of 2", "0 of 2", "1 of 2", "0 of 2"]
    assert "worse than Adam's diagonal in 1 of 2 cases (50%) with sequences" in capsys.readouterr().out
    for fact in ("N = 2 gradients", "Seed: 42", "python scripts/fisher_report.py --steps 4", "Commit: abc"):
        assert fact in text
    assert (folder / "fisher.png").read_bytes().startswith(b"\x89PNG")


def test_the_headline_where_eigen_adam_is_never_worse():
    record = synthetic_record()
    record["errors"] = [line | {"captured": 0.5} for line in record["errors"]]
    assert "in 2 cases with sequences and 2 cases with batches was never worse" in structures.headline(record)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from-records"], "measure first"),
        (["--steps", "3", "--samples", "2", *TINY], "--steps 4"),
        (["--blocks", "3", "--steps", "4", "--samples", "2", *TINY], "0 to 2"),
    ],
)
def test_mistakes_end_in_one_sentence(words, message, tmp_path, capsys):
    assert script.main([*words, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_records_of_another_version_are_refused(folder, capsys):
    record = synthetic_record() | {"format": 0}
    (folder / "records.json").write_text(json.dumps(record))
    assert script.main(["--from-records", "--out", str(folder)]) == 2
    assert "measure again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_records_are_refused(text, folder, capsys):
    (folder / "records.json").write_text(text)
    assert script.main(["--from-records", "--out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "records.json" in said and said.endswith("measure again.\n")


def test_a_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SECONDS_PER_TIMING", 0.0)
    words = ["--steps", "6", "--samples", "2", "--moments", "2", "--out", str(tmp_path), *TINY]
    assert script.main(words) == 0
    record = structures.read_record(tmp_path / "records.json")
    assert record["settings"]["moments"] == [4, 6]
    assert record["settings"]["blocks"] == [0, 2]
    cases = len(structures.TYPES) * 2 * 2 * len(structures.KINDS)
    assert len(record["errors"]) == cases * len(measuring.ROWS)
    assert {tuple(line["shape"]) for line in record["errors"]} == {(32, 32), (32, 48)}  # tall matrices are turned
    states = {(line["optimizer"], line["layer"]): line["state"] for line in record["timings"]}
    assert set(states) == {(r.optimizer, layer) for r in measuring.ROWS if r.optimizer for layer in structures.TYPES}
    assert states["adam", "gate"] == 2 * 32 * 48
    assert states["racs", "gate"] == 32 + 48 + 1
    assert states["soap", "q"] == 2 * 32 * 32 + 4 * 32 * 32
    assert (states["sgd", "q"], states["whitening", "q"]) == (32 * 32, 0)  # SGD with its momentum
    # Exact minimisers keep the order of generality, also on real gradients; so does SOAP in Shampoo's basis.
    for kind in structures.KINDS:
        for pair in (("TwoSidedScaling", "Diagonal"), ("Whitening", "EigenAdam"), ("Shampoo", "SOAP")):
            assert structures.worse(record, *pair, kind, "captured") == (0, cases // 2)
        errors = [x for values in structures.errors(record, "rescaled", kind=kind).values() for x in values]
        assert 0 < min(errors) < max(errors) < 1
    text = (tmp_path / "README.md").read_text()
    assert "nan" not in text
    assert cells(text, "S ⊗ Q")[1] == "RACS"


def test_gradients_of_sequences_average_to_the_batch_gradient():
    cfg = compose(["experiment=quickstart", "trainer.precision=fp32", *TINY, "trainer.batch_size=4"])
    training = measuring.Training(cfg, [0], window=1)
    G = training.sequence_gradients(4)
    with training.rows(cfg.data.seed + 1) as batches:  # packed rows: all have the same number of targets
        batch = next(batches)
    training.backward(batch["input_ids"], batch["labels"])
    for key, p in training.matrices.items():
        torch.testing.assert_close(G[key].mean(0), measuring.oriented(p.grad), rtol=1e-4, atol=1e-6)


def test_the_switched_basis_has_alices_leading_part():
    G = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0))
    structure = measuring.switched(G, 4, 2)
    leading = fisher.GaLore.fit(G, 4)
    U = structure.low_rank.U_L
    torch.testing.assert_close(U[:, :2], leading.U_L[:, :2])
    torch.testing.assert_close(leading.U_L.mT @ U[:, 2:], torch.zeros(4, 2), atol=1e-5, rtol=0)
