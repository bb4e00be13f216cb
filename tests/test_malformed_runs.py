"""Malformed run folders: checkpoints, records and exported models, damaged or edited so that every checksum holds.

A run that is refused leaves its folder as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretraining import checkpoint
from pretraining.config import compose
from pretraining.plan import Plan
from pretraining.restore import evaluate_saved
from pretraining.trainer import Trainer, make_plan, train

from .pretraining.test_trainer import config
from .test_malformed import open_cases, refused
from .test_malformed_data import NESTED

Edit = Callable[[Path], object]
TENSORS = "shard-00001-model-00001-of-00001.safetensors"
STEP = "checkpoints/step-0000008"
SETTINGS = ("trainer.save_every=4", "trainer.sample_tokens=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, checkpoints after 4 and 8; it looks as if it had been killed just before its end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(folder, *SETTINGS))
    (folder / "summary.json").unlink()
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Last checkpoints of runs with another optimizer, model and seed."""
    folder = tmp_path_factory.mktemp("others")
    found = {}
    for name, more in {
        "optimizer": ["optimizer=racs"],
        "rank": ["optimizer=alice", "optimizer.rank=4", "optimizer.leading=3", "optimizer.update_interval=3"],
        "width": ["model.intermediate_size=40"],
        "depth": ["model.num_hidden_layers=1"],
        "seed": ["seed=7"],
        "rows": ["data.length=16"],
    }.items():
        train(config(folder / name, *more, "trainer.steps=4", "trainer.sample_tokens=0", "trainer.save_model=false"))
        found[name] = folder / name / "checkpoints/step-0000004"
    return found


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run", symlinks=True))


@cache
def composed() -> DictConfig:
    return config("unused", *SETTINGS)


@cache
def plan() -> Plan:
    return make_plan(composed())


def resume(folder: Path, path: Path | None = None) -> Trainer:
    cfg = composed().copy()
    cfg.run_dir = str(folder)
    if path is not None:
        cfg.trainer.resume = str(path)
    trainer = Trainer(cfg, plan())
    trainer.batches.close()
    return trainer


@pytest.fixture(scope="module")
def trainer(run: Path) -> Trainer:
    return resume(run, run / STEP)


def resume_in(trainer: Trainer, path: Path) -> None:
    """As `resume`, in a trainer that is there: making one takes most of the time."""
    trainer.cfg.trainer.resume = str(path)
    trainer.checkpoints = path.parent
    trainer.source.lengths.clear()
    trainer._resume()


def evaluate(path: Path) -> float:
    cfg = composed_eval().copy()
    cfg.checkpoint = str(path)
    return evaluate_saved(cfg).loss


@cache
def composed_eval() -> DictConfig:
    return compose(["checkpoint=x"], root="eval")


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder: the digest of each file, the kind of everything else."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"
        for path in folder.rglob("*")
    }


# Bytes ----------------------------------------------------------------------------------------------------------------


def replaced(make: Callable[[bytes], bytes]) -> Edit:
    return lambda file: file.write_bytes(make(file.read_bytes()))


def instead(make: Callable[[Path], object]) -> Edit:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def flipped(part: float) -> Edit:
    def make(content: bytes) -> bytes:
        place = int(part * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :]

    return replaced(make)


DAMAGE: dict[str, Edit] = {
    "missing": Path.unlink,
    "empty": replaced(lambda content: b""),
    "without its last byte": replaced(lambda content: content[:-1]),
    "half": replaced(lambda content: content[: len(content) // 2]),
    "one byte longer": replaced(lambda content: content + b" "),
    "zeros": replaced(lambda content: bytes(len(content))),
    "flipped at 0%": flipped(0),
    "flipped at 30%": flipped(0.3),
    "flipped at 60%": flipped(0.6),
    "flipped at 100%": flipped(1),
    "of the checkpoint before": lambda file: shutil.copy(file.parent.with_name("step-0000004") / file.name, file),
    "a folder": instead(Path.mkdir),
    "a link to nowhere": instead(lambda file: file.symlink_to("nowhere")),
    "a link to itself": instead(lambda file: file.symlink_to(file)),
    "a pipe": instead(os.mkfifo),
}
FILES = (TENSORS, checkpoint.STATE, checkpoint.SUMS)
BYTES = {f"{name} {damage}": (name, damage) for name in FILES for damage in DAMAGE}


@pytest.mark.parametrize("name", open_cases("checkpoint", BYTES))
def test_a_damaged_file_of_a_checkpoint(copy: Path, name: str) -> None:
    file, damage = BYTES[name]
    DAMAGE[damage](copy / STEP / file)
    before = contents(copy)
    for use in (lambda: resume(copy, copy / STEP), lambda: evaluate(copy / STEP)):
        message = refused(use, str(copy / STEP))
        # A damaged list of checksums may put the blame on a file that it lists.
        assert file in message or file == checkpoint.SUMS
        assert "trainer.resume=" in message and "step-0000004" in message
    assert contents(copy) == before


# Checkpoints that were edited -----------------------------------------------------------------------------------------


def with_sums(edit: Edit) -> Edit:
    """An edit of a checkpoint after which its checksums are made anew."""

    def change(path: Path) -> None:
        edit(path)
        make_sums(path)

    return change


def make_sums(path: Path) -> None:
    (path / checkpoint.SUMS).unlink()
    checkpoint.write_sums(path)


def state(edit: Callable[[dict[str, Any]], object]) -> Edit:
    def change(path: Path) -> None:
        values = json.loads((path / checkpoint.STATE).read_text())
        edit(values)
        (path / checkpoint.STATE).write_text(json.dumps(values))

    return with_sums(change)


def place(**values: Any) -> Edit:
    return state(lambda s: s["data"].update(values))


def raw_state(content: bytes) -> Edit:
    return with_sums(lambda path: (path / checkpoint.STATE).write_bytes(content))


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Of the tensors, with what torch keeps beside them."""

    def change(path: Path) -> None:
        with safe_open(path / TENSORS, "pt") as file:
            about = file.metadata()
        values = load_file(path / TENSORS)
        edit(values)
        known = json.loads(about["DCP_SHARDING_INFO"])
        about["DCP_SHARDING_INFO"] = json.dumps(
            {name: known.get(name, {"saved_offsets": [0] * x.dim()}) for name, x in values.items()}
        )
        save_file({name: x.contiguous() for name, x in values.items()}, path / TENSORS, about)

    return with_sums(change)


def header(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Of the table of tensors at the beginning of the file, which then does not fit what follows."""

    def change(path: Path) -> None:
        content = (path / TENSORS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + size])
        edit(table)
        text = json.dumps(table).encode()
        (path / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return with_sums(change)


def raw_header(make: Callable[[int, bytes], bytes]) -> Edit:
    def change(path: Path) -> None:
        content = (path / TENSORS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        (path / TENSORS).write_bytes(make(size, content[8:]))

    return with_sums(change)


WEIGHT = "model/model.layers.0.mlp.up_proj.weight"
MOMENT = "optimizer/model.layers.0.mlp.up_proj.weight/m"
NORM = "optimizer/model.norm.weight/exp_avg"


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return tensors(lambda t: t.update({name: make(t[name])}))


EDITED: dict[str, tuple[Edit, str]] = {
    # state.json
    **{
        f"step is {value!r}": (state(lambda s, value=value: s.update(step=value)), checkpoint.STATE)
        for value in ("8", 8.0, None, True, -8, 10**30, 4, 99, [8])
    },
    "no step": (state(lambda s: s.pop("step")), checkpoint.STATE),
    **{
        f"{key} is missing": (state(lambda s, key=key: s.pop(key)), STEP)
        for key in ("data", "optimizer", "numbers", "meters", "skipped", "evaluated")
    },
    **{
        f"{key} is {value!r}": (state(lambda s, key=key, value=value: s.update({key: value})), STEP)
        for key, values in {
            "data": (None, [], "x", {}),
            "optimizer": (None, [], "alice", {}),
            "numbers": (None, [], "x"),  # believed otherwise, where the checksums are made anew
            "meters": (None, [], {}, {"every": 1}),
            "skipped": (None, "0", [], -1, 0.5),
            "evaluated": ("8", [], {}),
        }.items()
        for value in values
    },
    "counters in a list": (state(lambda s: s["numbers"].update({"model.layers.0.mlp.up_proj.weight": [8]})), STEP),
    "time in words": (state(lambda s: s["meters"]["every"].update(seconds="long")), STEP),
    "time of another kind": (state(lambda s: s["meters"]["every"].update(hours=1)), STEP),
    "memory in words": (state(lambda s: s["meters"].update(peak_memory_bytes="much")), STEP),
    "no contract": (state(lambda s: s["data"].pop("contract")), STEP),
    "contract in words": (place(contract="x"), STEP),
    "contract of another source": (state(lambda s: s["data"]["contract"].update(source="x")), "source was 'x'"),
    "contract of another batch": (state(lambda s: s["data"]["contract"].update(batch_size=7)), "batch_size was 7"),
    **{
        f"position {value!r}": (place(position=value), STEP)
        for value in ([0], [0, 0, 0, 0], ["a", 0, 0], "012", 5, [-1, 0, 0], [0, -5, 0], [0, 0, -5], [0, 10**30, 0])
    },
    "step of the data in words": (place(step="x"), STEP),
    "another step of the data": (place(step=5), STEP),
    "epoch in words": (place(epoch="x"), STEP),
    **{
        f"lengths {value!r}": (place(shard_lengths=value), STEP)
        for value in ([], 5, {"a": 1}, {"0": "x"}, {"0": -1}, {"70": 3}, {"0": 10**30})
    },
    "list as state": (raw_state(b"[]"), checkpoint.STATE),
    "number as state": (raw_state(b"8"), checkpoint.STATE),
    "state not UTF-8": (raw_state(b'{"step": 8, "x": "\xff"}'), checkpoint.STATE),
    "deep state": (raw_state(b'{"step": 8, "x": ' + NESTED), checkpoint.STATE),
    "state with a number of 5,000 digits": (raw_state(b'{"step": ' + b"9" * 5000 + b"}"), checkpoint.STATE),
    "state with a byte order mark": (raw_state(b'\xef\xbb\xbf{"step": 8}'), checkpoint.STATE),
    # the tensors
    "no tensors": (with_sums(lambda p: (p / TENSORS).unlink()), STEP),
    "empty tensors": (with_sums(lambda p: (p / TENSORS).write_bytes(b"")), STEP),
    "tensors of 7 bytes": (with_sums(lambda p: (p / TENSORS).write_bytes(b"\1" + bytes(6))), STEP),
    "large file pointer": (with_sums(lambda p: (p / TENSORS).write_bytes(b"version https://git-lfs")), STEP),
    "a pickle": (with_sums(lambda p: torch.save({"a": 1}, p / TENSORS)), STEP),
    "header of 0 bytes": (raw_header(lambda size, rest: struct.pack("<Q", 0) + rest), STEP),
    "header of 2^63 bytes": (raw_header(lambda size, rest: struct.pack("<Q", 2**63) + rest), STEP),
    "header of 2^40 bytes": (raw_header(lambda size, rest: struct.pack("<Q", 2**40) + rest), STEP),
    "header one byte short": (raw_header(lambda size, rest: struct.pack("<Q", size - 1) + rest), STEP),
    "header that is no JSON": (
        raw_header(lambda size, rest: struct.pack("<Q", size) + b"x" * size + rest[size:]),
        STEP,
    ),
    "list as header": (raw_header(lambda size, rest: struct.pack("<Q", 2) + b"[]" + rest[size:]), STEP),
    "deep header": (raw_header(lambda size, rest: struct.pack("<Q", len(NESTED)) + NESTED + rest), STEP),
    "empty header": (raw_header(lambda size, rest: struct.pack("<Q", 2) + b"{}" + rest[size:]), STEP),
    "data cut by 4 bytes": (
        with_sums(lambda p: os.truncate(p / TENSORS, (p / TENSORS).stat().st_size - 4)),
        STEP,
    ),
    "shape too large": (header(lambda t: t[WEIGHT].update(shape=[10**6, 10**6])), STEP),
    "shape beyond memory": (header(lambda t: t[WEIGHT].update(shape=[2**62, 2**62])), STEP),
    "shape below zero": (header(lambda t: t[WEIGHT].update(shape=[-48, 32])), STEP),
    "shape in words": (header(lambda t: t[WEIGHT].update(shape="large")), STEP),
    "unknown dtype": (header(lambda t: t[WEIGHT].update(dtype="F7")), STEP),
    "another dtype": (header(lambda t: t[WEIGHT].update(dtype="I32")), STEP),
    "wider dtype": (header(lambda t: t[WEIGHT].update(dtype="F64")), STEP),
    "offsets beyond the end": (header(lambda t: t[WEIGHT].update(data_offsets=[10**9, 10**9 + 6144])), STEP),
    "offsets in reverse": (header(lambda t: t[WEIGHT].update(data_offsets=t[WEIGHT]["data_offsets"][::-1])), STEP),
    "no offsets": (header(lambda t: t[WEIGHT].pop("data_offsets")), STEP),
    "no weight": (tensors(lambda t: t.pop(WEIGHT)), STEP),
    "no state of a weight": (tensors(lambda t: t.pop(MOMENT)), STEP),
    "no state at all": (
        tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("optimizer/")]),
        STEP,
    ),
    "one weight more": (tensors(lambda t: t.update({"model/more": torch.zeros(2)})), STEP),
    "state of another name": (tensors(lambda t: t.update({MOMENT[:-1] + "z": t.pop(MOMENT)})), STEP),
    "weight of another shape": (put(WEIGHT, lambda x: x[:-1]), STEP),
    "weight turned": (put(WEIGHT, lambda x: x.T), STEP),
    "state of another shape": (put(MOMENT, lambda x: x[:-1]), STEP),
    "state that broadcasts": (put(MOMENT, lambda x: x[:1]), STEP),
    "state of whole numbers": (put(MOMENT, lambda x: x.int()), STEP),
    "state of Adam of another shape": (put(NORM, lambda x: x[:-1]), STEP),
    "no random state": (tensors(lambda t: t.pop("random/cpu")), STEP),
    "random state cut": (put("random/cpu", lambda x: x[:-1]), STEP),
    "random state of floats": (put("random/cpu", lambda x: x.float()), STEP),
    "random state of Python cut": (put("random/python", lambda x: x[:-1]), STEP),
    "random state of Python below zero": (put("random/python", lambda x: -x - 1), STEP),
    "random state of numpy cut": (put("random/numpy", lambda x: x[:3]), STEP),
    "random state of numpy beyond 32 bits": (put("random/numpy", lambda x: x + 2**40), STEP),
    "no second random number": (put("random/gauss", lambda x: x[:0]), STEP),
    "another file": (lambda p: (p / "more.safetensors").write_bytes(b"x"), "more.safetensors does not belong"),
    "another file in a folder": (
        lambda p: ((p / "a").mkdir(), (p / "a/b").write_bytes(b"")),
        "a/b does not belong to this checkpoint",
    ),
    "a file of something else": (with_sums(lambda p: (p / "more.safetensors").write_bytes(b"x" * 99)), STEP),
    # SHA256SUMS
    "a file outside in the sums": (
        lambda p: (p / checkpoint.SUMS).open("a").write("0" * 64 + "  ../../config.yaml\n"),
        "config.yaml is missing",
    ),
    "sums in capitals": (lambda p: replaced(bytes.upper)(p / checkpoint.SUMS), STEP),
    "sums not UTF-8": (lambda p: (p / checkpoint.SUMS).write_bytes(b"\xff\n"), checkpoint.SUMS),
    "sums of another length": (lambda p: (p / checkpoint.SUMS).write_text("0" * 32 + "  x\n"), checkpoint.SUMS),
    "sums of nothing": (lambda p: (p / checkpoint.SUMS).write_text("\n"), checkpoint.SUMS),
}


@pytest.mark.parametrize("name", open_cases("edited", EDITED))
def test_a_checkpoint_that_was_edited(copy: Path, trainer: Trainer, name: str) -> None:
    edit, words = EDITED[name]
    edit(copy / STEP)
    before = contents(copy)
    refused(lambda: resume_in(trainer, copy / STEP), words)
    assert contents(copy) == before


def test_the_run_itself_resumes(copy: Path, trainer: Trainer) -> None:
    """What the cases above begin from; edits that change nothing are none."""
    resume_in(trainer, copy / STEP)
    state(lambda s: None)(copy / STEP)
    tensors(lambda t: None)(copy / STEP)
    header(lambda t: None)(copy / STEP)
    assert resume(copy, copy / STEP).done == 8
    assert evaluate(copy / STEP) == evaluate(copy / "model")


OF_ANOTHER = {
    "optimizer": "was made with optimizer",
    "rank": "was made with optimizer.rank=4, not 8",
    "width": "was made with model.intermediate_size=40, not 48",
    "depth": "was made with model.num_hidden_layers=1, not 2",
    "seed": "was made with optimizer.seed=7, not 42",
    "rows": "length was 16 and is 32",
}


@pytest.mark.parametrize("name", OF_ANOTHER)
def test_a_checkpoint_of_another_run(copy: Path, others: dict[str, Path], name: str) -> None:
    """Also with the tensors or the state of this run put into it."""
    refused(lambda: resume(copy, others[name]), OF_ANOTHER[name])
    if name in (
        "seed",
        "rows",
    ):  # the same shapes: only the checksums tell, and where they are made anew, the saved place
        shutil.copy(others[name] / checkpoint.STATE, copy / STEP / checkpoint.STATE)
        refused(lambda: resume(copy, copy / STEP), checkpoint.STATE)
        make_sums(copy / STEP)
        refused(lambda: resume(copy, copy / STEP), checkpoint.STATE)


# The record -----------------------------------------------------------------------------------------------------------


def write(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def append(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + content)


def become(name: str, make: Callable[[Path], object]) -> Edit:
    return lambda folder: instead(make)(folder / name)


LINE = b'{"kind": "train", "step": 1}\n'
YAML_BOMB = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{c}: &{c} [{','.join([f'*{b}'] * 10)}]\n".encode() for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)

RECORD: dict[str, tuple[Edit, str]] = {
    **{
        f"metrics: {what}": (write("metrics.jsonl", content), "metrics.jsonl, line 1: not a line of a run record")
        for what, content in {
            "not JSON": b"words\n",
            "not UTF-8": b"\xff\xfe\n",
            "zeros": bytes(4096) + b"\n",
            "list": b"[]\n",
            "number": b"5\n",
            "text": b'"train"\n',
            "null": b"null\n",
            "no step": b'{"kind": "train"}\n',
            "no kind": b'{"step": 1}\n',
            "step in words": b'{"kind": "train", "step": "1"}\n',
            "step as fraction": b'{"kind": "train", "step": 1.0}\n',
            "kind is a number": b'{"kind": 5, "step": 1}\n',
            "blank line": b"\n",
            "deep": NESTED + b"\n",
            "number of 5,000 digits": b'{"kind": "train", "step": ' + b"9" * 5000 + b"}\n",
        }.items()
    },
    "metrics: damage in the middle": (
        lambda f: replaced(lambda content: content.replace(b'"step": 3', b'"step": x', 1))(f / "metrics.jsonl"),
        "metrics.jsonl, line 3: not a line of a run record",
    ),
    "metrics: a folder": (become("metrics.jsonl", Path.mkdir), "metrics.jsonl cannot be read"),
    "metrics: a pipe": (become("metrics.jsonl", os.mkfifo), "metrics.jsonl"),
    **{
        f"config: {what}": (write("config.yaml", content), "config.yaml is not the configuration of a run")
        for what, content in {
            "cut in a list": b"a: [1, 2",
            "zeros": bytes(100),
            "list": b"- 1\n",
            "not UTF-8": b"a: \xff\n",
            "tabs": b"\ta: 1\n",
            "code": b"!!python/object/apply:os.getcwd []\n",
            "two documents": b"a: 1\n---\nb: 2\n",
            "deep": b"[" * 2000,  # PyYAML is slow
            "unknown alias": b"a: *b\n",
            "a key that is a list": b"? [a, b]\n: 1\n",
            "interpolation": b"a: ${\n",
        }.items()
    },
    "config: empty": (write("config.yaml", b""), "config.yaml is not the configuration of a run"),
    "config: words": (write("config.yaml", b"words\n"), "holds a run of another configuration"),
    "config: a bomb": (write("config.yaml", YAML_BOMB), "config.yaml"),
    "config: a folder": (become("config.yaml", Path.mkdir), "config.yaml cannot be read"),
    "config: a pipe": (become("config.yaml", os.mkfifo), "config.yaml"),
    "config: another value": (
        lambda f: replaced(lambda content: content.replace(b"lr: 0.02", b"lr: 0.03"))(f / "config.yaml"),
        "optimizer.lr: 0.03 there, 0.02 here",
    ),
    "config: without a section": (
        lambda f: (
            cfg := OmegaConf.load(f / "config.yaml"),
            cfg.pop("optimizer"),
            OmegaConf.save(cfg, f / "config.yaml"),
        ),
        "holds a run of another configuration",
    ),
    **{
        f"environment: {what}": (write("environment.json", content), "environment.json")
        for what, content in {
            "empty": b"",
            "cut": b'{"commit": "c0',
            "not UTF-8": b'{"commit": "\xff"}',
            "list": b"[]",
            "null": b"null",
            "deep": NESTED,
            "resumed is a number": b'{"resumed": 5}',
            "resumed is a list of numbers": b'{"resumed": [5]}',
            "resumed without steps": b'{"resumed": [{}]}',
            "resumed at a step in words": b'{"resumed": [{"step": "4"}]}',
        }.items()
    },
    "environment: a folder": (become("environment.json", Path.mkdir), "environment.json"),
}


@pytest.mark.parametrize("name", open_cases("record", RECORD))
def test_a_record_that_is_malformed(copy: Path, name: str) -> None:
    edit, words = RECORD[name]
    edit(copy)
    refused(lambda: resume(copy), str(copy), words)


SUMMARY: dict[str, Edit] = {
    "empty": write("summary.json", b""),
    "cut": write("summary.json", b'{"perplexity": 12'),
    "not UTF-8": write("summary.json", b'{"a": "\xff"}'),
    "a list": write("summary.json", b"[]"),
    "null": write("summary.json", b"null"),
    "deep": write("summary.json", NESTED),
    "a folder": lambda folder: (folder / "summary.json").mkdir(),
    "a pipe": lambda folder: os.mkfifo(folder / "summary.json"),
}


@pytest.mark.parametrize("name", open_cases("summary", SUMMARY))
def test_a_summary_that_is_malformed_does_not_say_that_the_run_is_finished(copy: Path, name: str) -> None:
    SUMMARY[name](copy)
    cfg = composed().copy()
    cfg.run_dir = str(copy)
    refused(lambda: train(cfg), str(copy / "summary.json"))


ODD_RECORDS: dict[str, Edit] = {
    "last line of the metrics cut": append("metrics.jsonl", b'{"kind": "tra'),
    "last line of the metrics not UTF-8": append("metrics.jsonl", b"\xff"),
    "metrics of an unknown kind": append("metrics.jsonl", b'{"kind": "other", "step": 8}\n'),
    "no metrics": lambda folder: (folder / "metrics.jsonl").unlink(),
    "no samples": lambda folder: (folder / "samples.txt").unlink(),
    "empty samples": write("samples.txt", b""),
    "samples that are not UTF-8": write("samples.txt", b"--- step 4\n\xff\n"),
    "words before the samples": write("samples.txt", b"words\n--- step 4\ntext\n"),
    "a sample of a step of 5,000 digits": write("samples.txt", b"--- step " + b"9" * 5000 + b"\ntext\n"),
    "no environment": lambda folder: (folder / "environment.json").unlink(),
    "no model": lambda folder: shutil.rmtree(folder / "model"),
    "an unfinished checkpoint": lambda folder: (folder / "checkpoints/.step-0000012.partial").mkdir(),
    "an empty checkpoint": lambda folder: (folder / "checkpoints/step-0000012").mkdir(),
    "a file called as a checkpoint": lambda folder: (folder / "checkpoints/step-0000012").write_text(""),
    "an unreadable lock": lambda folder: (folder.parent / f".{folder.name}.lock").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("name", ODD_RECORDS)
def test_a_record_that_is_odd_but_whole(copy: Path, name: str) -> None:
    """What a crash or a user may leave without harm: the run goes on from its last checkpoint."""
    ODD_RECORDS[name](copy)
    assert resume(copy).done == 8


# Evaluation of what a run has left ------------------------------------------------------------------------------------


def model_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def change(folder: Path) -> None:
        values = load_file(folder / "model/model.safetensors")
        edit(values)
        save_file(
            {name: x.contiguous() for name, x in values.items()}, folder / "model/model.safetensors", {"format": "pt"}
        )

    return change


def model_config(**values: Any) -> Edit:
    def change(folder: Path) -> None:
        content = json.loads((folder / "model/config.json").read_text())
        (folder / "model/config.json").write_text(json.dumps(content | values))

    return change


def run_config(edit: Callable[[Any], object]) -> Edit:
    def change(folder: Path) -> None:
        cfg = OmegaConf.load(folder / "config.yaml")
        edit(cfg)
        OmegaConf.save(cfg, folder / "config.yaml")

    return change


FILE, CONFIG = "model/model.safetensors", "model/config.json"
MODEL: dict[str, tuple[Edit, str]] = {
    "no folder": (lambda f: shutil.rmtree(f / "model"), "has no final model"),
    "a file as folder": (lambda f: (shutil.rmtree(f / "model"), (f / "model").write_text("")), "has no final model"),
    "empty folder": (lambda f: (shutil.rmtree(f / "model"), (f / "model").mkdir()), "model"),
    "no weights": (lambda f: (f / FILE).unlink(), "model"),
    "empty weights": (write(FILE, b""), "model"),
    "weights cut by a byte": (lambda f: replaced(lambda content: content[:-1])(f / FILE), "model"),
    "half the weights": (lambda f: replaced(lambda content: content[: len(content) // 2])(f / FILE), "model"),
    "header of 2^63 bytes": (lambda f: replaced(lambda content: b"\xff" * 8 + content[8:])(f / FILE), "model"),
    "header flipped": (lambda f: replaced(lambda content: content[:40] + b"\xff" + content[41:])(f / FILE), "model"),
    "large file pointer": (write(FILE, b"version https://git-lfs.github.com/spec/v1\n"), "model"),
    "a pickle": (lambda f: torch.save({"a": 1}, f / FILE), "model"),
    "a pickle beside no weights": (
        lambda f: (torch.save(load_file(f / FILE), f / "model/pytorch_model.bin"), (f / FILE).unlink()),
        "model",
    ),
    "weights are a folder": (become(FILE, Path.mkdir), "model"),
    "weights link to nowhere": (become(FILE, lambda p: p.symlink_to("nowhere")), "model"),
    "a flipped byte of a weight": (lambda f: flipped(0.7)(f / FILE), "model"),
    "the last byte flipped": (lambda f: flipped(1)(f / FILE), "model"),
    "one weight missing": (model_tensors(lambda t: t.pop("lm_head.weight")), "model.safetensors"),
    "one weight of another shape": (
        model_tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "model.safetensors",
    ),
    "one weight more": (model_tensors(lambda t: t.update(more=torch.ones(2))), "model.safetensors"),
    "weights that are not numbers": (
        model_tensors(lambda t: t.update({"model.norm.weight": torch.full((32,), float("nan"))})),
        "model",
    ),
    "no config.json": (lambda f: (f / CONFIG).unlink(), "model"),
    "empty config.json": (write(CONFIG, b""), "model"),
    "cut config.json": (lambda f: os.truncate(f / CONFIG, 30), "model"),
    "config.json not UTF-8": (write(CONFIG, b'{"a": "\xff"}'), "model"),
    "deep config.json": (write(CONFIG, NESTED), "model"),
    "list as config.json": (write(CONFIG, b"[]"), "model"),
    "unknown architecture": (model_config(model_type="no_such_model", architectures=["NoSuchModel"]), "model"),
    "code of its own": (
        model_config(model_type="no_such_model", auto_map={"AutoModelForCausalLM": "code.Model"}),
        "model",
    ),
    "another architecture": (model_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "model"),
    "another width": (model_config(hidden_size=64), "model"),
    "another depth": (model_config(num_hidden_layers=3), "model"),
    "width in words": (model_config(hidden_size="wide"), "model"),
    "heads of a third": (model_config(num_attention_heads=3), "model"),
    "another vocabulary": (model_config(vocab_size=1000), "model"),
    # config.yaml of the run
    "no config.yaml": (lambda f: (f / "config.yaml").unlink(), "is not a run folder"),
    **{
        f"config.yaml {what}": (write("config.yaml", content), "config.yaml")
        for what, content in {
            "empty": b"",
            "cut": b"a: [1, 2",
            "of zeros": bytes(99),
            "not UTF-8": b"a: \xff\n",
            "with a list": b"- 1\n",
            "with words": b"words\n",
            "with code": b"!!python/object/apply:os.getcwd []\n",
            "with other things": b"a: 1\n",
        }.items()
    },
    **{
        f"config.yaml without {key}": (
            run_config(lambda c, key=key: OmegaConf.update(c, key.rpartition(".")[0], without(c, key), merge=False)),
            "config.yaml",
        )
        for key in ("trainer.precision", "data.length", "data.rows", "eval.batch_size")
    },
    "config.yaml without a kind of data": (run_config(lambda c: c.data.pop("kind")), "data.kind is None"),
    "config.yaml with another tokenizer": (
        run_config(lambda c: c.update(tokenizer="sample_4k")),
        "sample_4k has 4,096 pieces, but the model 1,024",
    ),
    "config.yaml with a length in words": (run_config(lambda c: c.data.update(length="long")), "length"),
    "config.yaml with unknown rows": (run_config(lambda c: c.data.update(rows="cut")), "data.rows must be"),
    "config.yaml with data elsewhere": (
        run_config(lambda c: c.data.update(kind="text", path="nowhere")),
        "nowhere does not exist",
    ),
    "config.yaml with an unknown precision": (run_config(lambda c: c.trainer.update(precision="fp8")), "precision"),
}


def without(cfg: Any, key: str) -> dict[str, Any]:
    section, _, last = key.rpartition(".")
    return {k: v for k, v in OmegaConf.to_container(cfg[section]).items() if k != last}


@pytest.mark.parametrize("name", open_cases("model", MODEL))
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_evaluated(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, words = MODEL[name]
    edit(copy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(lambda: evaluate(copy), words)


def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(tmp_path: Path, copy: Path) -> None:
    """A step whose own loss is finite can lose them."""
    more = ["optimizer.lr=1e20", "optimizer.scale=1e30", "trainer.warmup_fraction=0", "trainer.save_every=1"]
    refused(lambda: train(config(tmp_path / "lost", *more)), "the weights are not finite after step 1")
    assert checkpoint.list_checkpoints(tmp_path / "lost/checkpoints") == []
    put(WEIGHT, lambda x: x * float("nan"))(copy / STEP)
    refused(lambda: evaluate(copy / STEP), str(copy / STEP), "is not a number")


CASES = [
    *(f"checkpoint, {name}" for name in BYTES),
    *(f"edited, {name}" for name in EDITED),
    *(f"record, {name}" for name in RECORD),
    *(f"summary, {name}" for name in SUMMARY),
    *(f"model, {name}" for name in MODEL),
]
