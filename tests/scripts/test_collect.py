"""Tables and plot of a sweep, from synthetic records of grids, variants and searches."""

import csv
import json
import math

import pytest
import yaml

from scripts import collect as command
from tests.reporting.synthetic import write_run


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Write a plan, and run the command on a folder of the same name."""
    monkeypatch.setattr(command, "PLANS", tmp_path / "plans")
    (tmp_path / "plans").mkdir()
    out = tmp_path / "rates"
    out.mkdir()

    def run(plan=None, *words):
        if plan is not None:
            (tmp_path / "plans" / "rates.yaml").write_text(yaml.safe_dump({"experiment": "quickstart", **plan}))
        code = command.main([str(out), *words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    run.out = out
    return run


GRID = {"adam_lr": [0.005], "lr": {"alice": [0.01, 0.02, 0.03], "racs": [0.02, 0.5]}}


def grid(out):
    for lr, perplexity in ((0.01, 60.0), (0.02, 50.0)):
        write_run(out / f"alice-lr{lr}-adam0.005-s42", lr=lr, perplexity=perplexity)
    write_run(out / "racs-lr0.02-adam0.005-s42", optimizer="racs", finished=False)
    write_run(out / "racs-lr0.5-adam0.005-s42", optimizer="racs", lr=0.5, diverged=7)
    (out / "sweep.yaml").write_text("command: python scripts/sweep.py rates --jobs 2\njobs: 2\n")


def rows(sweep):
    return {row["name"]: row for row in json.loads((sweep.out / "table.json").read_text())["runs"]}


def test_the_best_has_no_diverged_seed_and_is_one_setting(sweep):
    for lr, seed, how in ((0.02, 42, {"perplexity": 40.0}), (0.02, 43, {"diverged": 7}), (0.01, 42, {"perplexity": 50.0}),
                          (0.01, 43, {"perplexity": 51.0})):  # fmt: skip
        write_run(sweep.out / f"alice-lr{lr}-adam0.005-s{seed}", lr=lr, seed=seed, **how)
    _, printed = sweep(GRID | {"seeds": [42, 43]})
    assert "| llama_tiny | Alice | 0.01 | 0.005 |" in printed


def test_every_run_of_a_grid_is_listed_with_what_became_of_it(sweep):
    grid(sweep.out)
    code, printed = sweep(GRID)
    assert code == 0 and "| llama_tiny | Alice | 0.02 | 0.005 | 3.9120 | 50.00 | 2/3 |" in printed
    text = (sweep.out / "table.md").read_text()
    assert "- 5 runs: 2 ended, 1 diverged, 1 not ended, 1 missing." in text
    assert "| `alice-lr0.02-adam0.005-s42` | Alice | 0.02 | 0.005 | 42 | 3.9120 | 50.00 |" in text
    assert "| `alice-lr0.03-adam0.005-s42` | Alice | 0.03 | 0.005 | 42 | not run |  |" in text
    assert "| `racs-lr0.5-adam0.005-s42` | RACS | 0.5 | 0.005 | 42 | diverged at step 7 |  |" in text
    assert "not ended yet, step 300" in text and "| llama_tiny | RACS | - | - | none ended |  | 0/2 |" in text
    assert "- Command: `python scripts/sweep.py rates --jobs 2`" in text and "Runs at once: 2" in text
    assert (sweep.out / "rates.png").stat().st_size > 5000 and b"</svg>" in (sweep.out / "rates.svg").read_bytes()


def test_json_and_csv_hold_the_same_and_nothing_where_there_is_nothing(sweep):
    grid(sweep.out)
    sweep(GRID)
    found = rows(sweep)
    assert found["alice-lr0.01-adam0.005-s42"]["loss"] == pytest.approx(math.log(60))
    assert found["alice-lr0.03-adam0.005-s42"] | {"lr": 0, "adam_lr": 0} == {
        "name": "alice-lr0.03-adam0.005-s42", "model": "llama_tiny", "method": "alice", "optimizer": "alice", "lr": 0,
        "adam_lr": 0, "other": "", "seed": 42, "state": "missing", "step": None, "loss": None, "perplexity": None,
        "wall_seconds": None,
    }  # fmt: skip
    with (sweep.out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == list(found)
    for row in table:
        wanted = found[row["name"]]
        assert row == {key: "" if value is None else str(value) for key, value in wanted.items()}


def test_the_same_records_give_the_same_files(sweep):
    grid(sweep.out)
    sweep(GRID)
    names = ("table.md", "table.csv", "table.json", "rates.png", "rates.svg")
    before = [(sweep.out / name).read_bytes() for name in names]
    sweep(GRID)
    assert [(sweep.out / name).read_bytes() for name in names] == before


def test_runs_of_a_search_differ_in_more_than_rates_and_may_be_pruned(sweep):
    for number, lr, scale, perplexity in ((0, 0.02, 0.3, 55.0), (1, 0.05, 0.1, 52.0), (2, 0.004, 2.0, 90.0)):
        folder = write_run(sweep.out / f"alice-t00{number}", lr=lr, perplexity=perplexity, finished=number != 2)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["optimizer"]["scale"] = scale
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (sweep.out / "alice-t002" / "pruned.json").write_text(json.dumps({"step": 100, "loss": 5.0, "by": "median"}))
    code, printed = sweep({"search": {"trials": 4, "span": 10, "ranges": {"alice": {"lr": 0.02, "scale": 0.3}}}})
    assert code == 0 and "| llama_tiny | Alice | 0.05 | 0.005 | scale 0.1 | 3.9512 | 52.00 | 2/4 |" in printed
    text = (sweep.out / "table.md").read_text()
    assert "4 runs: 2 ended, 1 pruned, 1 missing." in text and "| pruned at step 100 |" in text
    assert "| `alice-t003` | Alice |  |  |  |  | not run |  |" in text


def test_variants_are_methods_of_their_own_with_the_mean_of_their_seeds(sweep):
    for name, seed, perplexity in (("alice", 1, 50.0), ("alice", 2, 52.0), ("no_tracking", 1, 60.0)):
        write_run(sweep.out / f"{name}-s{seed}", seed=seed, perplexity=perplexity)
    code, printed = sweep()
    assert code == 0 and "No plan is known, so runs that never began are not listed." in printed
    mean = (math.log(50) + math.log(52)) / 2
    assert f"| llama_tiny | Alice | 0.02 | 0.005 | {mean:.4f} | 50.99 | 2/2 |" in printed
    assert "| llama_tiny | no_tracking | 0.02 | 0.005 | 4.0943 | 60.00 | 1/1 |" in printed


def test_variants_that_never_ran_are_missing(sweep, tmp_path, monkeypatch):
    from scripts import sweep as runner

    monkeypatch.setattr(runner, "PLANS", tmp_path / "plans")
    (tmp_path / "plans" / "grid.yaml").write_text(
        yaml.safe_dump({"experiment": "quickstart", "adam_lr": [0.005], "lr": {"alice": [0.02]}})
    )
    write_run(tmp_path / "grid" / "alice-lr0.02-adam0.005-s42")
    write_run(sweep.out / "alice-s1", seed=1)
    sweep({"rates_from": "grid", "seeds": [1], "variants": {"alice": {}, "cold": {"optimizer": "alice"}}})
    assert {name: row["state"] for name, row in rows(sweep).items()} == {"alice-s1": "ended", "cold-s1": "missing"}


def test_a_plan_in_a_file_is_found_by_the_sweeps_note(sweep, tmp_path):
    grid(sweep.out)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"experiment": "quickstart", **GRID}))
    (sweep.out / "sweep.yaml").write_text(f"command: python scripts/sweep.py {file} --jobs 2\n")
    sweep()
    assert sum(row["state"] == "missing" for row in rows(sweep).values()) == 1


def test_many_methods_have_a_panel_each(sweep):
    for i in range(10):
        write_run(sweep.out / f"m{i}-lr0.02-adam0.005-s42", optimizer=f"m{i}", perplexity=50.0 + i)
    assert sweep()[0] == 0
    assert (sweep.out / "rates.svg").read_text().count('id="axes_') == 10


def test_before_any_run_has_ended_there_is_a_table_and_no_picture(sweep):
    code, printed = sweep(GRID)
    assert code == 0 and "0/3" in printed and not (sweep.out / "rates.png").exists()
    assert "![" not in (sweep.out / "table.md").read_text()


def test_several_sweeps_at_once_into_another_folder(sweep, tmp_path):
    grid(sweep.out)
    (tmp_path / "other").mkdir()
    grid(tmp_path / "other")
    code, _ = sweep(GRID, str(tmp_path / "other"), "--out", str(tmp_path / "tables"))
    assert code == 0 and {path.name for path in (tmp_path / "tables").iterdir()} == {"rates", "other"}
    assert not (sweep.out / "table.md").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert command.main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: There is no folder")


def test_a_folder_without_records_or_plan_is_an_error(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 1
    assert "has no records and no plan: give the folder of a sweep" in capsys.readouterr().err
