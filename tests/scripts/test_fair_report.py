"""The command that writes the fair comparison's report, and checks it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from scripts import fair_report as command
from sweeps import Sweep, load_plan
from tests.reporting.fair_plans import perplexity, write_plans
from tests.reporting.fair_records import write_fair


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("fair")
    # Only stage 1 and the repetitions: fewer records and pictures to make.
    only = ("fair_rates", "fair_repeat")
    write_fair(
        root / "runs",
        write_plans(root / "plans"),
        lambda sweep, job, name: perplexity(sweep, job, name) if sweep in only else None,
    )
    (root / "deviations.md").write_text("| Warm-up | `no_warmup` |\n")
    (root / "runs/fair_rates/sweep.yaml").write_text(
        yaml.safe_dump({"command": "python scripts/sweep.py fair_rates --jobs 2 data.path=/home/me/text", "jobs": 2})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "PLANS", root / "plans")
        assert command.main(arguments(root)) == 0
    return root


@pytest.fixture
def root(written, tmp_path, monkeypatch):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(command, "PLANS", tmp_path / "plans")
    return tmp_path


def arguments(root, *more):
    places = {"records": "runs", "out": "fair", "figures": "figures", "deviations": "deviations.md"}
    return [*(word for key, name in places.items() for word in (f"--{key}", str(root / name))), *more]


def test_the_page_and_its_pictures_are_written(written):
    text = (written / "fair/README.md").read_text()
    assert text.startswith("# The fair comparison")
    assert "`python scripts/sweep.py fair_rates --jobs 2 data.path=DIR`" in text
    assert "/home/me" not in text
    names = {path.name for path in (written / "figures").iterdir()}
    assert names == {f"{name}.{end}" for name in ("group_rate", "sensitivity") for end in ("png", "svg")}
    assert text.count("](../figures/") == 2


def test_the_check_passes_writes_nothing_and_fails_naming_what_disagrees(root, capsys):
    page = root / "fair/README.md"
    before = page.read_bytes()
    assert command.main(arguments(root, "--check")) == 0
    said = capsys.readouterr()
    assert "runs.md and 4 pictures: the pages agree with the records." in said.out and not said.err
    file = root / "runs/fair_repeat/llama_tiny/alice-s42/summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"perplexity": 51.0}))
    assert command.main(arguments(root, "--check")) == 1
    assert page.read_bytes() == before
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2  # the table of repetitions, and that of all runs
    assert '"The same run twice": disagrees with the records' in errors[0] and "every run" in errors[1]
    (root / "figures/sensitivity.svg").unlink()
    shutil.copy(root / "figures/group_rate.png", root / "figures/sensitivity.png")
    page.unlink()
    assert command.main(arguments(root, "--check")) == 1
    said = capsys.readouterr().err
    assert "README.md is missing" in said and "sensitivity.svg is missing" in said
    assert "sensitivity.png shows something else than the records" in said
    assert "group_rate.png" not in said


def test_an_effect_that_disagrees_with_the_records_fails_the_check(root, capsys):
    page = root / "deviations.md"
    assert page.read_text() == "| Warm-up | `no_warmup`: not run |\n"
    page.write_text("| Warm-up | `no_warmup`: -0.100 / -0.100 |\n")
    assert command.main(arguments(root, "--check")) == 1
    assert "deviations.md: a number disagrees with the records" in capsys.readouterr().err
    assert command.main(arguments(root)) == 0
    assert page.read_text() == "| Warm-up | `no_warmup`: not run |\n"


def test_records_of_others_leave_the_committed_page_of_choices_alone(root):
    page = Path(command.__file__).resolve().parents[1] / "docs/deviations.md"
    before = page.read_bytes()
    assert command.main(arguments(root)[:-2]) == 0
    assert page.read_bytes() == before


def test_the_report_on_records_of_others_lies_beside_them(root, monkeypatch):
    monkeypatch.setattr(command, "ROOT", root / "project")  # where it would lie otherwise
    assert command.main(["--records", str(root / "runs")]) == 0
    assert {path.name for path in (root / "runs/report").iterdir()} >= {"README.md", "runs.md", "sensitivity.png"}
    assert command.main(["--records", str(root / "runs"), "--out", str(root / "elsewhere")]) == 0
    assert (root / "elsewhere/README.md").is_file() and (root / "elsewhere/sensitivity.png").is_file()
    assert not (root / "project").exists()


def test_a_picture_that_is_missing_fails_the_check(root, capsys):
    (root / "figures/sensitivity.svg").unlink()
    assert command.main(arguments(root, "--check")) == 1
    assert "sensitivity.svg is missing" in capsys.readouterr().err


def test_a_folder_of_records_that_is_not_there_is_refused(root, capsys):
    (root / "runs").rename(root / "elsewhere")
    assert command.main(arguments(root, "--check")) == 2
    error = capsys.readouterr().err
    assert "runs is not a folder" in error and error.count("\n") == 1


def test_records_of_other_settings_are_an_error(root, capsys):
    file = root / "runs/fair_repeat/llama_tiny/alice-s42/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["optimizer"]["lr"] = 0.5
    file.write_text(yaml.safe_dump(config))
    assert command.main(arguments(root)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "optimizer.lr=0.5" in error


def test_the_projects_plans_are_understood(tmp_path):
    """Whatever the plans ask for, the report has a place for it."""
    from reporting.fair.axes import LOOKS
    from reporting.fair.gains import CONTROLLED
    from reporting.fair.page import NEAR
    from reporting.fair.records import PLAIN, STEPS
    from reporting.fair.tables import BATCHES, CHOICES, PARTS

    found = command.plans(tmp_path, command.PLANS)
    names = {sweep: {asked.name for asked in found.asked if asked.sweep == sweep} for sweep in command.SWEEPS}
    assert names["fair_rates"] == names["fair_best"] == set(found.published) <= set(LOOKS)
    assert sum(asked.sweep == "fair_rates" for asked in found.asked) == 9 * 2 * len(found.published)
    assert names["fair_control"] == set(CONTROLLED)
    alices = {a.name for a in found.asked if a.sweep == "fair_ablations" and a.optimizer == PLAIN}
    assert alices == {*PARTS, *CHOICES}
    assert {name for step in STEPS for name in (step.before, step.after)} <= names["fair_ablations"]
    batches = {f"{method}_{size}" for method in CONTROLLED for size in BATCHES}
    assert {name.removesuffix("_lr3") for name in names["fair_batch"]} == batches
    assert found.published["adam"] == 0.001 and found.published["alice"] == 0.02
    assert not found.finished
    assert all(load_plan(command.PLANS / f"{name}.yaml").near == NEAR for name in ("fair_rates", "fair_control"))


def test_the_rates_to_begin_with_are_the_best_of_stage_1():
    root = Path(command.__file__).resolve().parents[1]
    plan = load_plan(root / "configs/sweep/fair_rates.yaml")
    sweep = Sweep(plan, root / "results/runs/fair_rates")
    sweep.read()
    text = (
        (root / "docs/optimizers.md")
        .read_text(encoding="utf-8")
        .partition("## Where to begin")[2]
        .partition("\n## ")[0]
    )
    number = r"([\d.]+), ([\d.]+)"
    rows = re.findall(rf"((?:`\w+`(?:, )?)+) \| {number} \| {number} \|", text)
    said = {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(said) == set(plan.optimizers)
    for name, numbers in said.items():
        best = [plan.best(model, name, sweep.results) for model in ("llama_tiny", "llama_tiny_4k")]
        assert [f"{rate:g}" for pair in zip(*best, strict=True) for rate in pair] == list(numbers), name


def test_the_committed_pages_agree_with_the_records(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr().err
