"""Fetching part of C4 from a stand-in for the Hub: which files, how much, and what happens to a fetch that is stopped."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import data.hub
from data import Tokenizer, TrainingBatches, UserError, open_source
from data.mirror import read_manifest
from data.sources import shard_order
from pretraining.lock import RunLock

from .standin import COMMIT, NAME, Fault, Hub

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import fetch_c4  # noqa: E402

FILES = 6
DOCUMENTS = 30


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Six training files of 30 documents and two for validation, as the script's data set."""
    from huggingface_hub import constants

    server = Hub()
    rng = random.Random(0)
    for split, count in (("train", FILES), ("validation", 2)):
        for i in range(count):
            lines = (
                json.dumps({"text": f"{split} {i} {j} {rng.randbytes(40).hex()}"}) + "\n" for j in range(DOCUMENTS)
            )
            name = f"en/c4-{split}.{i:05d}-of-{count:05d}.json.gz"
            server.files[name] = gzip.compress("".join(lines).encode(), mtime=0)
    cfg = {**yaml.safe_load(fetch_c4.CONFIG.read_text()), "name": NAME, "revision": COMMIT, "retries": 2}
    (tmp_path / "c4.yaml").write_text(yaml.safe_dump(cfg))
    monkeypatch.setattr(fetch_c4, "CONFIG", tmp_path / "c4.yaml")
    monkeypatch.setattr(fetch_c4, "DOCUMENTS", DOCUMENTS)
    monkeypatch.setattr(fetch_c4, "AHEAD", 1)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data.hub, "BLOCK", 500)
    monkeypatch.setattr(data.hub, "pause", lambda seconds: None)
    yield server
    server.close()


def fetch(folder: Path, *words: str, steps: int = 4) -> int:
    """4 steps of 8 sequences and one ahead, with a buffer of 5: 45 documents, two of the files of 30."""
    return fetch_c4.main(
        ["--to", str(folder), "--steps", str(steps), "--batch-size", "8", "--shuffle-buffer", "5", *words]
    )


def there(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.json.gz")}


def wanted(count: int, seed: int = 42) -> set[str]:
    train = {f"en/c4-train.{i:05d}-of-{FILES:05d}.json.gz" for i in shard_order(FILES, seed, 0)[:count]}
    return train | {f"en/c4-validation.{i:05d}-of-00002.json.gz" for i in range(2)}


def test_the_files_of_a_run_and_no_others(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mirror"
    assert fetch(folder) == 0
    assert there(folder) == wanted(2)
    assert all((folder / name).read_bytes() == hub.files[name] for name in wanted(2))
    out = capsys.readouterr().out
    size = sum(len(hub.files[name]) for name in wanted(2))
    assert f"need 4 files, {size / 1e6:.1f} MB; 0 are there" in out and "free: " in out
    assert f"python train.py data=c4_local data.path={folder} trainer.steps=4 trainer.batch_size=8 seed=42" in out
    assert fetch(tmp_path / "other", "--seed", "7") == 0
    assert there(tmp_path / "other") == wanted(2, seed=7) != wanted(2)


def test_the_run_reads_what_was_fetched_and_the_rows_of_all_of_c4(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "mirror"
    fetch(folder)
    part = open_source({"kind": "c4_local", "path": str(folder)}, "train")
    c4 = {"train_files": "en/c4-train.*", "validation_files": "en/c4-validation.*"}
    whole = open_source({"kind": "hub", "name": NAME, "revision": COMMIT, **c4}, "train")
    options: dict[str, Any] = {"length": 16, "batch_size": 8, "shuffle_buffer": 5}
    with TrainingBatches(part, tokenizer, **options) as ours:
        with TrainingBatches(whole, tokenizer, **options) as theirs:
            for a, b in itertools.islice(zip(ours, theirs, strict=True), 5):
                assert torch.equal(a["input_ids"], b["input_ids"])
        with pytest.raises(
            UserError, match=r"fetch what a run of N steps reads, with its seed, by `python scripts/fetch_c4\.py --to"
        ):
            for _ in range(5):
                next(ours)
    identity = part.identity
    assert fetch(folder, steps=40) == 0 and there(folder) == wanted(FILES)
    assert open_source({"kind": "c4_local", "path": str(folder)}, "train").identity == identity
    validation = open_source({"kind": "c4_local", "path": str(folder)}, "validation")
    assert len(list(validation.documents())) == 2 * DOCUMENTS


@pytest.mark.parametrize(
    ("steps", "options", "count"),
    [
        (10_000, {}, 15),  # 5.15M of the 5.25M documents that 15 files have at least
        (100_000, {}, 147),
        (1, {"shuffle_buffer": 400_000}, 2),
        (10_000, {"rows": "pack"}, 10),
        (10_000, {"rows": "pack", "length": 1024}, 38),
    ],
)
def test_how_many_files(steps: int, options: dict[str, Any], count: int) -> None:
    assert fetch_c4.files_needed(steps, 512, **options) == count


def test_file_order_without_a_buffer(hub: Hub, tmp_path: Path) -> None:
    assert fetch_c4.main(["--to", str(tmp_path), "--steps", "4", "--batch-size", "8", "--shuffle-buffer", "0"]) == 0
    assert {name for name in there(tmp_path) if "train" in name} == {
        f"en/c4-train.{i:05d}-of-{FILES:05d}.json.gz" for i in range(2)
    }


def test_nothing_is_fetched_or_read_twice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(tmp_path)
    before = hub.count("bytes")
    hashed: list[Path] = []
    digest = fetch_c4._digest
    monkeypatch.setattr(fetch_c4, "_digest", lambda path: hashed.append(path) or digest(path))
    capsys.readouterr()
    assert fetch(tmp_path) == 0
    assert hub.count("bytes") == before and not hashed
    assert "4 are there.\nTo fetch: 0.0 MB" in capsys.readouterr().out
    assert fetch(tmp_path, steps=8) == 0
    assert hub.count("bytes") == before + len(wanted(3) - wanted(2)) == before + 1


def test_a_fetch_that_is_stopped_goes_on_at_its_byte(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("cdn", *[Fault("")] * 3, *[Fault("status", 500)] * 3)
    assert fetch(tmp_path) == UserError.exit_code
    assert "failed 3 times in a row" in capsys.readouterr().err
    (part,) = tmp_path.rglob("*.part")
    assert part.stat().st_size == 1500 and not there(tmp_path)
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert hub.starts("bytes")[0] == 1500
    assert there(tmp_path) == wanted(2) and not list(tmp_path.rglob("*.part"))


def test_a_fetch_that_is_interrupted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data.hub, "pause", interrupt)
    hub.fail("cdn", *[Fault("")] * 9, Fault("status", 500))
    assert fetch(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    manifest = read_manifest(tmp_path)
    assert manifest is not None and set(manifest["files"]) == there(tmp_path) and 0 < len(there(tmp_path)) < 4
    assert fetch(tmp_path) == 0 and there(tmp_path) == wanted(2)


def test_wrong_bytes_are_not_kept(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fail("cdn", Fault(""), Fault("flip"))
    assert fetch(tmp_path) == UserError.exit_code
    assert re.search(r"c4-validation\.00000.* was damaged on its way here and was removed", capsys.readouterr().err)
    assert not there(tmp_path) and not list(tmp_path.rglob("*.part"))
    assert fetch(tmp_path) == 0


def test_files_that_came_in_another_way_are_checked(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(wanted(2))[:2]
    (tmp_path / "en").mkdir()
    (tmp_path / first).write_bytes(hub.files[first])
    (tmp_path / second).write_bytes(hub.files[second][:-1] + b"?")
    assert fetch(tmp_path) == UserError.exit_code
    assert f"{second} does not have the Hub's SHA-256: remove it" in capsys.readouterr().err
    (tmp_path / second).unlink()
    assert fetch(tmp_path) == 0
    assert hub.count("bytes") == 3 and there(tmp_path) == wanted(2)


def test_a_dry_run_writes_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(tmp_path / "deep" / "mirror", "--dry-run") == 0
    assert "need 4 files" in capsys.readouterr().out
    assert not (tmp_path / "deep").exists() and hub.count("bytes") == 0


def test_two_calls_do_not_fill_one_folder(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mirror"
    with RunLock(folder / "fetch"):
        assert fetch(folder) == UserError.exit_code
        assert f"Another call is fetching into {folder}: let it end" in capsys.readouterr().err
        assert fetch(folder, "--dry-run") == 0
    assert fetch(folder) == 0 and there(folder) == wanted(2)
    with RunLock(folder / "fetch"):  # nothing is missing, nothing is written: the folder may be read-only
        assert fetch(folder) == 0


def test_what_another_call_has_fetched_meanwhile_stays_verified(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fetch_c4._alone_in

    def late(folder: Path) -> Any:
        monkeypatch.setattr(fetch_c4, "_alone_in", original)
        assert fetch(folder, steps=8) == 0
        return original(folder)

    monkeypatch.setattr(fetch_c4, "_alone_in", late)
    assert fetch(tmp_path) == 0
    manifest = read_manifest(tmp_path)
    assert manifest is not None and set(manifest["files"]) == there(tmp_path) > wanted(2)


def test_a_disk_that_is_too_small(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))  # type: ignore[attr-defined]
    assert fetch(tmp_path) == UserError.exit_code
    assert "too little space: make room for" in capsys.readouterr().err and hub.count("bytes") == 0


def test_another_revision_needs_another_folder(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(tmp_path)
    assert fetch(tmp_path, "--revision", "f" * 40) == UserError.exit_code
    assert f"is of {NAME} at {COMMIT}, not {NAME} at {'f' * 40}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "en").write_text("a file in the way")
    assert fetch(tmp_path) == UserError.exit_code
    assert "cannot be written" in capsys.readouterr().err


def test_without_a_connection(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(tmp_path) == UserError.exit_code
    assert "error: listing" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--steps", "0"], ["--batch-size", "x"], ["--rows", "both"]])
def test_arguments_that_cannot_work(words: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        fetch_c4.main(["--to", "x", "--steps", "1", *words])
    assert error.value.code == 2
