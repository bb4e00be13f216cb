"""`make tables`: what is committed agrees with the records, and a table that does not is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.reporting.paper_records import write_cell

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables_script", ROOT / "scripts" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_tables_agree_with_the_records(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def test_a_record_changes_the_tables_and_check_notices(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "computed_memory", lambda paper, convention: {})
    monkeypatch.setattr(script, "draw_all", lambda out, runs, memory: pretend(out))
    old = []
    monkeypatch.setattr(script, "stale", lambda out, runs, memory: old)
    (tmp_path / "runs").mkdir()
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    assert script.main(where) == 0
    first = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.*")}
    assert script.main(where) == 0 and first == {path: path.read_bytes() for path in first}  # idempotent
    assert script.main([*where, "--check"]) == 0 and "14 files agree" in capsys.readouterr().out

    write_cell(tmp_path / "runs", "table5/none", perplexity=26.5)
    assert script.main([*where, "--check"]) == 1
    said = capsys.readouterr().err
    assert "error: results/README.md disagrees with the records in: " in said and "Table 5: the parts of Alice" in said
    assert "results/tables/table5.md" in said and "table4.md" not in said
    assert script.main([*where, "--no-figures"]) == 0 and script.main([*where, "--check"]) == 0
    assert "26.50" in (tmp_path / "results" / "tables" / "table5.md").read_text()
    old.append(tmp_path / "results/figures/paper/figure5.svg")
    assert script.main([*where, "--check"]) == 1 and script.main([*where, "--check", "--no-figures"]) == 0
    assert "error: results/figures/paper/figure5.svg shows something else than the records." in capsys.readouterr().err


def test_a_picture_of_other_records_is_stale(tmp_path: Path) -> None:
    from reporting.paper.figures import draw, stale

    drawn = draw("speedups", tmp_path, tmp_path / "none")
    assert stale(tmp_path, tmp_path / "none") == []
    drawn[0].write_bytes(b"another picture")
    assert stale(tmp_path, tmp_path / "none") == drawn[:1]


def pretend(out: Path) -> list[Path]:
    from reporting.paper.figures import FIGURES

    paths = [out / f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_a_malformed_record_is_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "computed_memory", lambda paper, convention: {})
    folder = write_cell(tmp_path, "table2/racs_60m", diverged=2)
    (folder / "config.yaml").write_text("a: [")
    assert script.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "config.yaml is not valid YAML" in said and said.count("\n") == 1


def test_a_folder_of_records_that_is_not_there_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--check", "--runs", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "nowhere is not a folder" in said.err and said.err.count("\n") == 1
