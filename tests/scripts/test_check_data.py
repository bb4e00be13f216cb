"""The check of the order of rows: passes on the embedded text, and sees a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import check_data

SMALL = [
    "data=sample",
    "tokenizer=sample_1k",
    "data.length=32",
    "data.shuffle_buffer=20",
    "--steps",
    "8",
    "--batch-size",
    "5",
]


def test_the_embedded_text_passes(tmp_path: Path) -> None:
    out = tmp_path / "order.json"
    assert check_data.main([*SMALL, "--processes", "2", "--workers", "1", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["identical"] and len(record["cases"]) == 4
    assert str(tmp_path) not in out.read_text()


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = check_data.next_step
    calls: list[int] = []

    def next_step(batches: object) -> check_data.Step:
        calls.append(1)
        step = original(batches)  # type: ignore[arg-type]
        return step[::-1] if len(calls) == 8 + 3 else step

    monkeypatch.setattr(check_data, "next_step", next_step)
    monkeypatch.setattr(check_data, "ROWS", ("pack",))
    monkeypatch.setattr(
        check_data, "uninterrupted", lambda data, batch, steps, n, w: check_data.resumed(data, batch, steps, w)
    )
    assert check_data.main([*SMALL, "--processes", "1", "--workers", "0"]) == 1
    assert "1 processes, 0 workers: DIFFERENT, first at step 2" in capsys.readouterr().out


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data.main(["data=c4_local", "data.path=/nowhere", "tokenizer=sample_1k"]) == 2
    assert "/nowhere does not exist" in capsys.readouterr().err
