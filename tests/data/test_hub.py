"""Reading from the Hub, against a stand-in on this machine: few requests, faults that pass, and faults that do not."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import data.hub
from data import Source, Tokenizer, TrainingBatches, UserError, open_source

from .standin import COMMIT, NAME, Fault, Hub

ROOT = Path(__file__).resolve().parents[2]
C4 = {
    "kind": "hub",
    "name": NAME,
    "revision": COMMIT,
    "train_files": "en/c4-train.*.json.gz",
    "validation_files": "en/c4-validation.*.json.gz",
    "retries": 3,
    "timeout": 30,
}
FILE = "en/c4-train.00000-of-00003.json.gz"


def shard(name: str, count: int) -> bytes:
    """Documents that gzip cannot make much smaller than 50 bytes each."""
    rng = random.Random(name)
    texts = [f"{name} document {i} " + rng.randbytes(40).hex() for i in range(count)]
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0)


def documents(*files: bytes) -> list[str]:
    return [json.loads(line)["text"] for file in files for line in gzip.decompress(file).splitlines()]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between retries, which are not made."""
    seconds: list[float] = []
    monkeypatch.setattr(data.hub, "pause", seconds.append)
    return seconds


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pauses: list[float]) -> Iterator[Hub]:
    """Three training files and one for validation, read in requests of 1,000 bytes; an empty cache."""
    from huggingface_hub import constants

    server = Hub(page=3)
    for i in range(3):
        server.files[f"en/c4-train.{i:05d}-of-00003.json.gz"] = shard(f"train {i}", 60)
    server.files["en/c4-validation.00000-of-00001.json.gz"] = shard("validation", 5)
    server.files["en/deeper/c4-train.00000-of-00001.json.gz"] = shard("deeper", 5)
    server.files["README.md"] = b"a data set"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data.hub, "BLOCK", 1000)
    yield server
    server.close()


def train(**changes: Any) -> Source:
    return open_source({**C4, **changes}, "train")


def train_files(hub: Hub) -> list[bytes]:
    return [content for name, content in hub.files.items() if name.startswith("en/c4-train")]


def test_files_are_shards_and_requests_are_few(hub: Hub) -> None:
    source, validation = train(), open_source(C4, "validation")
    assert hub.requests == [("tree", "0", None, "Bearer hf_secret"), ("tree", "3", None, "Bearer hf_secret")]
    assert source.shards == 3 and source.description["revision"] == COMMIT
    assert list(source.documents()) == documents(*train_files(hub))
    assert list(validation.documents()) == documents(hub.files["en/c4-validation.00000-of-00001.json.gz"])
    assert hub.count("tree") == 2 and hub.count("revision") == 0
    assert hub.count("bytes") == 4  # once a file; the rest goes to the address that the Hub sends us on to
    whole = len(hub.files[FILE])
    assert [s for k, p, s, _ in hub.requests if k == "cdn" and p == FILE] == list(range(0, whole, 1000))


def test_a_source_can_be_sent_to_another_process_and_asks_nothing_again(hub: Hub) -> None:
    copy = pickle.loads(pickle.dumps(train()))
    assert list(copy.documents(start=100)) == documents(*train_files(hub))[100:]
    assert hub.count("tree") == 2


def test_names_and_sizes_are_the_identity(hub: Hub) -> None:
    first = train()
    assert first.identity == train().identity == train(retries=1, timeout=3).identity
    assert first.identity != train(on_error="skip").identity
    assert first.identity != train(train_files="en/c4-train.0000[01]*").identity
    hub.files[FILE] += b"\0"
    data.hub._listing.cache_clear()
    assert first.identity != train().identity


def test_a_branch_is_looked_up_once(hub: Hub) -> None:
    for revision in (None, "main"):
        hub.requests.clear()
        assert train(revision=revision).description["revision"] == COMMIT
        assert hub.count("revision") == 1


def test_only_the_hub_itself_gets_the_token(hub: Hub) -> None:
    list(train().documents())
    tokens = {kind: {token for k, _, _, token in hub.requests if k == kind} for kind in ("tree", "bytes", "cdn")}
    assert tokens == {"tree": {"Bearer hf_secret"}, "bytes": {"Bearer hf_secret"}, "cdn": {None}}


PASSING = {
    "refused": ("bytes", [Fault("status", 503)]),
    "server error": ("cdn", [Fault("status", 500), Fault("status", 502), Fault("status", 504)]),
    "too many": ("cdn", [Fault("status", 429)]),
    "cut": ("cdn", [Fault("cut", after=700), Fault("cut", after=0), Fault("cut", after=1)]),
    "cut at the Hub itself": ("bytes", [Fault("cut", after=700)]),
    "stalled": ("cdn", [Fault("stall", after=300)]),
    "address expired": ("cdn", [Fault(""), Fault("status", 403)]),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_tried_again(
    hub: Hub, pauses: list[float], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, faults = PASSING[case]
    hub.fail(kind, *faults)
    source = train(timeout=0.5)
    assert list(source.documents()) == documents(*train_files(hub))
    failures = sum(fault.kind != "" for fault in faults)
    notes = capsys.readouterr().err.splitlines()
    if case == "address expired":
        assert not notes and not pauses  # asking the Hub for a new one is no failure
        return
    assert len(notes) == len(pauses) == failures
    for number, note in enumerate(notes, 1):
        assert re.fullmatch(rf"data: reading {NAME}/{FILE} failed \(.*\); retry {number} of 3 in \d+ s", note)
    assert all(0.75 * 2**i <= seconds <= 1.25 * 2**i for i, seconds in enumerate(pauses))


def test_a_cut_file_goes_on_at_the_same_byte(hub: Hub) -> None:
    hub.fail("cdn", Fault(""), Fault("cut", after=700), Fault("cut", after=50))
    list(train().documents())
    assert hub.starts("cdn")[:5] == [0, 1000, 1700, 1750, 2000]


def test_the_count_starts_again_when_reading_goes_on(hub: Hub, pauses: list[float]) -> None:
    hub.fail("cdn", *[Fault("cut", after=100), Fault("")] * 3)
    assert list(train(retries=1).documents()) == documents(*train_files(hub))
    assert len(pauses) == 3


@pytest.mark.parametrize("fault", [Fault("status", 500), Fault("cut", after=5), Fault("stall", after=5)])
def test_what_does_not_pass_ends_in_a_sentence(hub: Hub, pauses: list[float], fault: Fault) -> None:
    hub.fail("bytes", *[fault] * 3)
    with pytest.raises(UserError, match=rf"reading {NAME}/{FILE} failed 3 times in a row") as error:
        list(train(retries=2, timeout=0.3).documents())
    assert len(pauses) == 2 and hub.count("bytes") == 3
    for advice in ("data.retries", "data.timeout", "resume", "scripts/fetch_c4.py"):
        assert advice in str(error.value)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "30"}, 30),
        ({"RateLimit": '"api";r=0;t=40'}, 40),
        ({"Retry-After": "100000"}, 900),
        ({"Retry-After": "in 5 minutes"}, 300),
        ({"Retry-After": "soon"}, 1),
    ],
)
def test_the_hub_may_ask_for_a_pause(hub: Hub, pauses: list[float], headers: dict[str, str], seconds: float) -> None:
    if headers.get("Retry-After") == "in 5 minutes":
        headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)}
    hub.fail("tree", Fault("status", 429, headers))
    assert train().shards == 3
    assert len(pauses) == 1 and 0.7 * seconds <= pauses[0] <= 1.25 * seconds


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    for _ in range(2):
        retries = data.hub.Retries("it", 100)
        for _ in range(10):
            retries.failed(ConnectionError("reset"))
    first, second = pauses[:10], pauses[10:]
    assert all(0.75 * min(60, 2**i) <= seconds <= 1.25 * min(60, 2**i) for i, seconds in enumerate(first))
    assert first != second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "no/such"}, "listing no/such/en failed: .*404"),
        ({"revision": "f" * 40}, f"listing {NAME}/en failed: .*404"),
        ({"revision": "f" * 40, "name": "x"}, "listing x/en failed: .*404"),
        ({"name": "no/such", "revision": "main"}, "looking up no/such failed: RepositoryNotFoundError"),
        ({"train_files": "en/c5-train.*"}, f"{NAME} has no file en/c5-train"),
        ({"train_files": "*/c4-train.*"}, r"may have \* only after the last slash"),
        ({"train_files": "*.md"}, f"{NAME}/README.md: this kind of file is not read"),
    ],
)
def test_what_cannot_work_is_not_tried_again(
    hub: Hub, pauses: list[float], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(**changes)
    assert not pauses


def test_a_file_without_access_is_not_tried_again(hub: Hub, pauses: list[float]) -> None:
    hub.fail("bytes", Fault("status", 403, {"X-Error-Code": "GatedRepo"}))
    with pytest.raises(UserError, match=r"failed: GatedRepoError.*check data\.name, data\.revision and the access"):
        list(train().documents())
    assert not pauses


def test_without_a_connection_the_first_request_fails_soon(
    hub: Hub, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"listing some/set/en failed 3 times in a row.*data=c4_local data\.path=DIR"):
        train(retries=50)
    assert len(pauses) == 2


def test_an_answer_that_is_not_the_hubs(hub: Hub) -> None:
    hub.fail("tree", Fault("flip"))
    with pytest.raises(UserError, match=f"listing {NAME}/en failed: "):
        train()


def test_a_server_without_ranges(hub: Hub) -> None:
    hub.fail("cdn", Fault("whole"), Fault("whole"))
    with pytest.raises(UserError, match=r"answers with bytes 0-/\d+ where bytes 1000 to 1999 of \d+ .* were asked for"):
        list(train().documents())


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_wrong_bytes_are_never_left_out_as_damage(hub: Hub, on_error: str) -> None:
    """They would be other documents at the next reading, so that numbers would change."""
    source = train(on_error=on_error)
    content = hub.files[FILE]
    other = bytearray(content)
    other[-100] ^= 1
    hub.files[FILE] = bytes(other)
    with pytest.raises(UserError, match="damaged on its way here"):
        list(source.documents())
    assert 0 not in source.lengths


def test_other_documents_of_the_same_size_are_noticed(hub: Hub) -> None:
    hub.sums[FILE] = "0" * 64
    with pytest.raises(UserError, match=rf"{FILE} was damaged on its way here \(its SHA-256"):
        list(train().documents())


def test_a_file_that_is_damaged_on_the_hub_is_damage(hub: Hub) -> None:
    good = documents(hub.files[FILE])
    hub.files[FILE] = hub.files[FILE][:-100]
    with pytest.raises(UserError, match=rf"{NAME}/{FILE}, after line \d+: damaged or cut"):
        list(train().documents())
    source = train(on_error="skip")
    rest = documents(*train_files(hub)[1:])
    got = list(source.documents())
    assert got[-len(rest) :] == rest and got[: -len(rest)] == good[: len(got) - len(rest)]
    assert source.damaged == {0: 1} and 30 < source.lengths[0] < 60


def test_documents_are_held_out_where_there_are_no_validation_files(hub: Hub) -> None:
    both = [
        list(open_source({**C4, "validation_files": None, "holdout": 5}, s).documents())
        for s in ("train", "validation")
    ]
    assert sorted(both[0] + both[1]) == sorted(documents(*train_files(hub))) and all(both)


def test_files_in_the_cache_are_read_there(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "cache" / f"datasets--{NAME.replace('/', '--')}" / "snapshots" / COMMIT / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(hub.files[FILE])
    assert list(train().documents()) == documents(*train_files(hub))
    assert {p for k, p, _, _ in hub.requests if k == "bytes"} == {
        n for n in hub.files if "c4-train" in n and "deeper" not in n
    } - {FILE}
    path.write_bytes(hub.files[FILE][:-10])
    with pytest.raises(UserError, match=re.escape(str(path)) + " has changed"):
        list(train().documents())


READ_OFFLINE = """
import json, os, sys
from data import UserError, open_source
import huggingface_hub
cfg = json.loads(sys.argv[1])
if sys.argv[2] == "fill":
    patterns = ["en/c4-train.0000[01]*"]
    huggingface_hub.snapshot_download(
        cfg["name"], repo_type="dataset", revision=cfg["revision"], allow_patterns=patterns
    )
else:
    try:
        for text in open_source(cfg, "train").documents():
            print(text)
    except UserError as error:
        print("error:", error)
"""


def test_offline_the_cache_is_enough(hub: Hub, tmp_path: Path) -> None:
    def run(what: str, **environment: str) -> list[str]:
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", READ_OFFLINE, json.dumps(C4), what],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (error,) = run("read", HF_HUB_OFFLINE="1")
    assert "list of files" in error and f"hf download --repo-type dataset {NAME} --revision {COMMIT}" in error
    run("fill")
    before = len(hub.requests)
    *got, error = run("read", HF_HUB_OFFLINE="1")
    assert got == documents(*train_files(hub)[:2])
    assert "c4-train.00002-of-00003.json.gz is not in the cache" in error
    assert len(hub.requests) == before


def test_offline_a_branch_is_not_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, and data.revision=main .* 40 digits"):
        train(revision="main")


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_those_of_local_files_whatever_happens(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    """Also where a process of its own reads, to which the source is sent."""
    for name, content in hub.files.items():
        if name.startswith("en/c4"):
            (tmp_path / "en").mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    options: dict[str, Any] = {"length": 16, "batch_size": 7, "shuffle_buffer": 20}
    local = open_source({"kind": "c4_local", "path": str(tmp_path)}, "train")
    hub.fail("cdn", Fault("status", 403), Fault(""), Fault("status", 403))
    with (
        TrainingBatches(local, tokenizer, **options) as ours,
        TrainingBatches(train(), tokenizer, workers=workers, **options) as theirs,
    ):
        for a, b in itertools.islice(zip(ours, theirs, strict=True), 60):  # more than two epochs
            assert torch.equal(a["input_ids"], b["input_ids"])


@pytest.mark.parametrize("name", ["c4", "hub"])
def test_configs_open_their_source(hub: Hub, name: str) -> None:
    """As Hydra hands them over: every key that the code reads is spelled as in the files."""
    file = OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml")
    given = {"train_files": "en/c4-train.*"} if name == "hub" else {}
    config = OmegaConf.merge(file, {"name": NAME, "revision": COMMIT, **given})
    OmegaConf.set_struct(config, True)
    assert open_source(config, "train").shards == 3  # type: ignore[arg-type]
    assert open_source(config, "validation").shards == (1 if name == "c4" else 3)  # type: ignore[arg-type]
    if name == "hub":
        with pytest.raises(UserError, match=r"data\.name is missing"):
            open_source(file, "train")  # type: ignore[arg-type]


# Data sets that `datasets` streams


SET = {"kind": "hub", "name": "some/set", "config": "en", "validation_split": "validation", "retries": 3}


class Stream:
    """A data set of three shards of 40 records; `errors` are raised in turn, each after as many records as it says."""

    def __init__(self, column: str = "text", errors: tuple[tuple[int, Exception], ...] = ()) -> None:
        self.column = column
        self.errors = list(errors)
        self.opened: list[dict[str, Any]] = []
        self.failures: list[Exception] = []  # of opening
        self.lookups = 0

    def records(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        after, error = self.errors.pop(0) if self.errors else (10**9, None)
        for number, (number_of_shard, i) in enumerate(itertools.product(shards, range(40))):
            if number == after and error is not None:
                raise error
            yield {self.column: f"shard {number_of_shard} document {i}"}

    def load_dataset(self, name: str, config: str | None, **options: Any) -> Any:
        import datasets

        self.opened.append({"name": name, "config": config, **options})
        if self.failures:
            raise self.failures.pop(0)
        return datasets.IterableDataset.from_generator(self.records, gen_kwargs={"shards": [0, 1, 2]})


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Callable[..., Stream]:
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    def make(**options: Any) -> Stream:
        made = Stream(**options)

        class Info:
            sha = "c0ffee"

        def dataset_info(*_: Any, **__: Any) -> Info:
            made.lookups += 1
            return Info()

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
        return made

    return make


def texts(config: dict[str, Any], split: str = "train") -> list[str]:
    return list(open_source(config, split).documents())


def test_a_data_set_is_read_shard_by_shard_at_one_commit(stream: Any) -> None:
    made = stream()
    source = open_source(SET, "train")
    assert source.shards == 3 and source.description["revision"] == "c0ffee"
    assert [text.split()[1] for text in source.documents(order=[2, 0, 1])] == ["2"] * 40 + ["0"] * 40 + ["1"] * 40
    assert list(source.documents(79))[:2] == ["shard 1 document 39", "shard 2 document 0"]
    open_source(SET, "validation")
    assert [(call["split"], call["revision"], call["streaming"]) for call in made.opened] == [
        ("train", "c0ffee", True),
        ("validation", "c0ffee", True),
    ]
    assert made.lookups == 2
    assert open_source({**SET, "revision": COMMIT}, "train").description["revision"] == COMMIT and made.lookups == 2


def test_a_data_set_without_validation_is_divided(stream: Any) -> None:
    made = stream()
    config = {"kind": "hub", "name": "some/set", "holdout": 10}
    train, validation = texts(config), texts(config, "validation")
    assert len(train) + len(validation) == 120 and not set(train) & set(validation) and validation
    assert {call["split"] for call in made.opened} == {"train"}


def test_a_shard_is_opened_again_and_goes_on_where_it_was(
    stream: Any, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (stream(), texts(SET))[1]
    stream(errors=((7, ConnectionError("reset by peer")), (3, TimeoutError("stalled")), (10**9, ConnectionError())))
    assert texts(SET) == whole
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition("; ")[0] for note in notes] == [
        "data: reading some/set, shard 0 failed (ConnectionError: reset by peer)",
        "data: reading some/set, shard 0 failed (TimeoutError: stalled)",
    ]
    assert len(pauses) == 2


def test_a_data_set_that_stays_away(stream: Any) -> None:
    stream(errors=((7, ConnectionError("reset by peer")),) * 4)
    with pytest.raises(
        UserError, match="shard 0 failed 4 times in a row, the last time with ConnectionError: reset by"
    ):
        texts(SET)


def test_damage_in_a_data_set(stream: Any, pauses: list[float]) -> None:
    damage = ((7, ValueError("JSON parse error")),)
    stream(errors=damage)
    with pytest.raises(
        UserError, match=r"some/set, shard 0, after document 7: cannot be read \(ValueError: JSON parse"
    ):
        texts(SET)
    stream(errors=damage)
    source = open_source({**SET, "on_error": "skip"}, "train")
    assert len(list(source.documents())) == 87 and source.damaged == {0: 1}
    assert not pauses


def test_errors_of_opening_say_what_to_do(stream: Any, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    stream(column="content")
    with pytest.raises(UserError, match=r'no text in the column "text"; it has content: set data\.text_column'):
        texts(SET)
    stream().failures = [ConnectionError("no route to host")]
    assert len(texts(SET)) == 120 and len(pauses) == 1
    stream().failures = [FileNotFoundError("no such split")]
    with pytest.raises(UserError, match=r"opening some/set \(config en, split train\) failed: FileNotFoundError"):
        texts(SET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*data=sample"):
        texts(SET)


def test_time_stands_still() -> None:
    assert data.hub.pause is time.sleep
