"""What travels in a step of divided matrices, by shapes and as counted; the prediction; the page. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarking import prediction, traffic
from optimizers.sharding import Team
from reporting import scaling as reporting
from scripts import scaling as script

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = [(6, 5), (5, 6), (4, 4), (7, 3), (3, 9)]
A100 = prediction.MACHINES[0]


def measure(processes, out, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    measured = [
        "scripts/scaling.py",
        "measure",
        "--model",
        "llama_tiny_4k",
        "--repeats",
        "1",
        "--out",
        str(out),
        *words,
    ]
    return subprocess.run([*command, *measured], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of 3 processes, which divide no side of these matrices evenly. Counted messages that shapes do not say end it."""
    out = tmp_path_factory.mktemp("scaling") / "record.json"
    done = measure(3, out, "--only", "adam,racs,adam_group")
    assert done.returncode == 0, done.stderr
    return out


def test_a_record_holds_messages_states_and_times_of_every_layout(record):
    lines = reporting.load(record.parent)
    racs, adam = (lines["llama_tiny_4k", 3, name] for name in ("racs", "adam"))
    assert all(len(racs[layout]["step_ms"]) == 1 for layout in ("replicated", "ddp", "fsdp2"))
    assert adam["fsdp2"]["calls"] == adam["replicated"]["calls"] == 0
    whole = 4 * racs["settings"]["parameters"]
    assert sum(racs["ddp"]["sent_bytes"]) == whole and sum(racs["ddp"]["received_bytes"]) == 2 * whole
    assert sum(racs["fsdp2"]["sent_bytes"]) == sum(racs["fsdp2"]["received_bytes"])
    assert sum(racs["ddp"]["state_bytes"]) == racs["replicated"]["state_bytes"][0]


def test_the_adam_group_divides_its_states(record):
    group = reporting.load(record.parent)["llama_tiny_4k", 3, "adam_group"]
    whole = group["replicated"]["state_bytes"][0]
    assert group["replicated"]["calls"] == 0
    for layout in ("zero", "owners"):
        assert sum(group[layout]["state_bytes"]) == whole
        assert sum(group[layout]["sent_bytes"]) == 4 * group["parameters"]


def test_tables_say_what_was_not_run(record):
    tables = reporting.tables(reporting.load(record.parent), prediction.everything())
    assert tables["steps"].count("not run") == 7 * 12 and tables["adam_group"].count("not run") == 4 * 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "sgd"], "is not measured"),
        (["--model", "none"], "no model"),
        ([], "torchrun"),
        (["--repeats", "0"], "1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, said, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert script.main(["measure", *words]) == 2
    assert said in capsys.readouterr().err


# Shapes ---------------------------------------------------------------------------------------------------------------


def team(shapes, ranks):
    """As optimizers/sharding.py plans it, without processes."""
    made = object.__new__(Team)
    made.params, made.size = [torch.empty(shape, device="meta") for shape in shapes], ranks
    made.owners = traffic.owners_of(shapes, ranks)
    turns = [made.owners[:i].count(owner) for i, owner in enumerate(made.owners)]
    made.order = sorted(range(len(shapes)), key=lambda i: (turns[i], made.owners[i]))
    return made


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_rounds_are_those_of_the_optimizers(ranks, monkeypatch):
    for module in ("optimizers.sharding", "benchmarking.traffic"):
        monkeypatch.setattr(f"{module}.ROUND_ENTRIES", 40 // ranks)
    made = team(SHAPES, ranks)
    planned = list(made._rounds({p: p for p in made.params}))
    assert len(planned) > 1 and traffic.rounds(SHAPES, made.owners, ranks) == planned


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_of_a_matrix_are_those_of_chunk(ranks):
    for rows in range(1, 12):
        parts = [len(part) for part in torch.empty(rows).chunk(ranks)]
        assert [traffic.rows_of(rows, rank, ranks) for rank in range(ranks)] == parts + [0] * (ranks - len(parts))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_what_is_sent_is_received(ranks):
    whole = 4 * sum(m * n for m, n in SHAPES)
    ddp, fsdp2 = (f(SHAPES, ranks, 4) for f in (traffic.ddp_traffic, traffic.fsdp2_traffic))
    assert sum(x.sent for x in ddp) * (ranks - 1) == sum(x.received for x in ddp) == whole * (ranks - 1)
    assert sum(x.sent for x in fsdp2) == sum(x.received for x in fsdp2)


# Prediction -----------------------------------------------------------------------------------------------------------


def test_large_models_have_the_known_matrices():
    assert [len(prediction.model(name).shapes) for name in prediction.SIZES] == [24 * 7, 32 * 7]
    assert prediction.model("llama_1b").parameters == 1_339_082_752


def test_more_ranks_than_matrices_are_idle():
    m = prediction.model("llama_1b")
    assert prediction.balance(m, 8)["idle"] == 0 and prediction.balance(m, 512)["idle"] == 512 - 168
    assert prediction.balance(m, 512)["speedup"] == prediction.balance(m, 168)["speedup"] < 168


@pytest.mark.parametrize("method", prediction.METHODS)
def test_owners_in_one_node_are_owners_among_all_of_it(method):
    m = prediction.model("llama_1b")
    found = {layout: prediction.optimizer(method, m, layout, 8, A100) for layout in prediction.LAYOUTS}
    assert found["all"] == found["node"] and found["fsdp2"] == found["hsdp"]
    larger = {layout: prediction.optimizer(method, m, layout, 64, A100) for layout in prediction.LAYOUTS}
    assert all(larger[layout] == found[layout] for layout in ("replicated", "node", "hsdp"))


@pytest.mark.parametrize("method", prediction.METHODS)
def test_states_are_divided_but_for_the_adam_group(method):
    m = prediction.model("llama_1b")
    sizes = [prediction.rank_state_bytes(method, m, layout, 64) for layout in ("replicated", "node", "all", "fsdp2")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] > 4 * m.adam > sizes[3]


# The page -------------------------------------------------------------------------------------------------------------


def test_the_committed_page_agrees_with_its_records():
    assert script.main(["report", "--check"]) == 0


def test_a_changed_page_is_found_and_repaired(tmp_path, capsys):
    page = tmp_path / "scaling.md"
    text = script.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("broadcasts |", "messages |"), encoding="utf-8")
    assert script.main(["report", "--check", "--page", str(page)]) == 1
    assert "disagrees" in capsys.readouterr().err
    assert script.main(["report", "--page", str(page), "--figures", str(tmp_path)]) == 0
    assert page.read_text(encoding="utf-8") == text and (tmp_path / "scaling.svg").is_file()


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="steps"):
        reporting.fill("no marks", {"steps": "table"})


def test_other_files_and_second_records_are_refused(record, tmp_path):
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(record.read_text())
    with pytest.raises(ValueError, match=r"two\.json has"):
        reporting.load(tmp_path)
    (tmp_path / "one.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match=r"one\.json is not"):
        reporting.load(tmp_path)
