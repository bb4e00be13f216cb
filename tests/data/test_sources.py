"""Reading local files and the Hub: order, what is held out, and messages that name the file and the line."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data import UserError, open_source

from .conftest import Corpus, write_shard

ROOT = Path(__file__).resolve().parents[2]


def texts(config: dict[str, Any], split: str = "train") -> list[str]:
    return list(open_source(config, split).documents())


def test_documents_come_in_file_order_from_any_place(corpus: Corpus) -> None:
    source = open_source(corpus(3, 2, 4), "train")
    assert source.shards == 3 and source.total is None
    everything = list(source.documents())
    assert [int(text.split()[1]) for text in everything] == list(range(9))
    assert source.total == 9
    for start in range(10):
        assert list(source.documents(start)) == everything[start:]
    assert [int(text.split()[1]) for text in source.documents(1, order=[2, 0, 1])] == [6, 7, 8, 0, 1, 2, 3, 4]


def test_known_shards_are_not_read_again(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(corpus(3, 2, 4), "train")
    list(source.documents())
    opened: list[int] = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda shard: opened.append(shard) or read(shard))
    assert len(list(source.documents(6))) == 3
    assert opened == [2]


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "c4-train.00000-of-00001.json.gz", ["one", "", " \n\t", "two"])
    source = open_source({"kind": "c4_local", "path": str(tmp_path)}, "train")
    for _ in range(2):
        assert list(source.documents()) == ["one", "two"]
    assert source.skipped == 2


def test_both_layouts_and_other_prefixes(tmp_path: Path) -> None:
    write_shard(tmp_path / "en" / "wiki-train.00000-of-00001.json.gz", ["inside en"])
    write_shard(tmp_path / "wiki-train.00000-of-00001.json.gz", ["beside en"])
    assert texts({"kind": "c4_local", "path": str(tmp_path)}) == ["inside en"]
    assert texts({"kind": "c4_local", "path": str(tmp_path / "en")}) == ["inside en"]
    write_shard(tmp_path / "en" / "c4-train.00000-of-00001.json.gz", ["another set"])
    with pytest.raises(UserError, match="mixes several data sets"):
        texts({"kind": "c4_local", "path": str(tmp_path)})


def test_a_copy_elsewhere_is_the_same_source_and_another_file_is_not(tmp_path: Path) -> None:
    def identity(folder: str, text: str) -> str:
        write_shard(tmp_path / folder / "c4-train.00000-of-00001.json.gz", [text])
        return open_source({"kind": "c4_local", "path": str(tmp_path / folder)}, "train").identity

    assert identity("a", "some text") == identity("b", "some text") != identity("c", "a much longer other text")


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gz(b""), "is empty"),
        (b"not gzip at all", "after line 0: damaged or cut"),
        (gz(GOOD * 3000)[:-30], "damaged or cut"),
        (gz(GOOD)[:-8] + b"\0" * 8, "after line 1: damaged or cut"),
        (gz(GOOD + b'{"text": "cut'), "line 2: not a JSON object"),
        (gz(GOOD + GOOD + b"[1]\n"), 'line 3: no text under the key "text"'),
        (gz(GOOD + b'{"content": "x"}\n'), 'line 2: no text under the key "text"'),
        (gz(b'{"text": 5}\n'), "line 1: no text"),
        (gz(GOOD + b'{"text": "caf\xe9"}\n'), "line 2: not UTF-8"),
    ],
)
def test_damaged_shards(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c4-train.00000-of-00001.json.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts({"kind": "c4_local", "path": str(tmp_path)})
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "data.kind"),
        ({"kind": "c4_local"}, "data.path is missing"),
        ({"kind": "c4_local", "path": "???"}, "data.path is missing"),
        ({"kind": "c4_local", "path": "/no/such/folder"}, "does not exist"),
        ({"kind": "c4_local", "path": str(ROOT / "configs")}, r"No file named c4-train\.\*\.json\.gz"),
        ({"kind": "text", "path": str(ROOT / "data" / "sample" / "sample_1k.model")}, "this kind of file"),
        ({"kind": "text", "path": str(ROOT / "configs")}, "holds no file ending in"),
        ({"kind": "hub"}, "data.name is missing"),
        ({"kind": "text", "path": str(ROOT), "holdout": 1}, "at least 2"),
    ],
)
def test_configs_that_cannot_work(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(config, "train")


def test_an_unknown_split() -> None:
    with pytest.raises(UserError, match="train, validation"):
        open_source({"kind": "sample"}, "test")


# Text files


def words(text: str) -> list[str]:
    return text.split()


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(f"paragraph {i}\nwith two lines" for i in range(100)) + "\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("small\n\nfile")
    (tmp_path / "ignored.pdf").write_bytes(b"%PDF")
    config = {"kind": "text", "path": str(tmp_path), "document_characters": 200, "holdout": 10**9}
    documents = texts(config)
    assert documents[-1] == "small\n\nfile"
    large = documents[:-1]
    assert words(" ".join(large)) == words((tmp_path / "b.txt").read_text())
    assert all(200 < len(text) < 240 and text.startswith("paragraph") for text in large[:-1])


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json.gz"])
def test_held_out_documents_are_never_training(tmp_path: Path, ending: str) -> None:
    if ending == ".txt":
        (tmp_path / "x.txt").write_text("\n\n".join(f"paragraph number {i}" for i in range(2000)))
    else:
        lines = "".join(json.dumps({"text": f"document {i % 500}"}) + "\n" for i in range(2000))  # with repetitions
        data = lines.encode()
        (tmp_path / f"x{ending}").write_bytes(gz(data) if ending.endswith(".gz") else data)
    config = {"kind": "text", "path": str(tmp_path), "document_characters": 10, "holdout": 20}
    train, validation = texts(config), texts(config, "validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 2000
    assert 0.02 < len(validation) / 2000 < 0.09


def test_a_validation_path_takes_nothing_from_training_but_its_own_files(tmp_path: Path) -> None:
    for name in ("a", "b", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    config = {"kind": "text", "path": str(tmp_path), "validation_path": str(tmp_path / "valid.txt"), "holdout": 2}
    assert texts(config) == ["text of a", "text of b"]
    assert texts(config, "validation") == ["text of valid"]
    with pytest.raises(UserError, match="nothing is left to train on"):
        texts(config | {"validation_path": str(tmp_path)})


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\nna\xefve\n".encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(str(path)) + ", line 2: not UTF-8"):
        texts({"kind": "text", "path": str(path)})


def test_json_with_another_column(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "words"}\n')
    config = {"kind": "text", "path": str(tmp_path), "text_column": "content", "holdout": 10**9}
    assert texts(config) == ["words"]


# The Hub, without a network


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A Hub whose data sets have three shards of `count` records; the calls of load_dataset are recorded."""
    import datasets
    import huggingface_hub

    def make(count: int = 40, column: str = "text", error: Exception | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def records(shards: list[int]) -> Iterator[dict[str, str]]:
            for shard in shards:
                for i in range(count):
                    yield {column: f"shard {shard} document {i}"}
                if error is not None:
                    raise error

        def load_dataset(name: str, config: str | None, **options: Any) -> Any:
            calls.append({"name": name, "config": config, **options})
            return datasets.IterableDataset.from_generator(records, gen_kwargs={"shards": [0, 1, 2]})

        class Info:
            sha = "c0ffee"

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: Info())
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return make


C4 = {"kind": "hub", "name": "allenai/c4", "config": "en", "validation_split": "validation"}


def test_the_hub_is_read_shard_by_shard_at_one_commit(hub: Any) -> None:
    calls = hub()
    source = open_source(C4, "train")
    assert source.shards == 3 and source.description["revision"] == "c0ffee"
    assert [text.split()[1] for text in source.documents(order=[2, 0, 1])] == ["2"] * 40 + ["0"] * 40 + ["1"] * 40
    assert list(source.documents(79))[:2] == ["shard 1 document 39", "shard 2 document 0"]
    open_source(C4, "validation")
    assert [(call["split"], call["revision"], call["streaming"]) for call in calls] == [
        ("train", "c0ffee", True),
        ("validation", "c0ffee", True),
    ]


def test_a_hub_data_set_without_validation_is_divided(hub: Any) -> None:
    calls = hub()
    config = {"kind": "hub", "name": "some/set", "holdout": 10}
    train, validation = texts(config), texts(config, "validation")
    assert len(train) + len(validation) == 120 and not set(train) & set(validation) and validation
    assert {call["split"] for call in calls} == {"train"}


def test_hub_errors_say_what_to_do(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(column="content")
    with pytest.raises(UserError, match=r'no text in the column "text"; it has content: set data\.text_column'):
        texts(C4)
    hub(error=ConnectionError("reset by peer"))
    with pytest.raises(UserError, match=r"shard 0: reading failed after 40 documents: ConnectionError: reset by peer"):
        texts(C4)

    import datasets
    import huggingface_hub

    def failing(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(UserError, match="could not be opened: ConnectionError"):
        texts(C4)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", failing)
    with pytest.raises(
        UserError, match=r"could not be reached on the Hub \(ConnectionError.*data=c4_local data\.path=DIR"
    ):
        texts(C4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*data=sample"):
        texts(C4)


# The configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_share_their_fields(path: Path) -> None:
    config = OmegaConf.create({"seed": 42, "data": OmegaConf.load(path)}).data  # in the place that Hydra gives it
    common = {"kind", "name", "path", "rows", "length", "seed", "shuffle_buffer", "validation_max_tokens"}
    assert common <= set(config)
    assert config.rows == ("truncate" if path.stem.startswith("c4") else "pack")
    assert config.validation_max_tokens == (10_000_000 if path.stem.startswith("c4") else None)
    assert (config.length, config.seed, config.shuffle_buffer) == (256, 42, 1000)
    assert "tokenizer" not in config


def test_configs_open_their_source(hub: Any, corpus: Corpus, tmp_path: Path) -> None:
    """As Hydra hands them over: every key that the code reads is spelled as in the files."""
    calls = hub()
    folder = ROOT / "configs" / "data"
    path = corpus(2)["path"]
    (tmp_path / "x.txt").write_text("some text")
    for name, given in (
        ("sample", {}),
        ("c4_local", {"path": path}),
        ("text", {"path": str(tmp_path / "x.txt")}),
        ("c4", {}),
        ("hub", {"name": "some/set"}),
    ):
        config = OmegaConf.merge(OmegaConf.load(folder / f"{name}.yaml"), given)
        OmegaConf.set_struct(config, True)
        assert open_source(config, "train").description["split"] == "train"  # type: ignore[arg-type]
    assert [(call["name"], call["config"], call["split"]) for call in calls] == [
        ("allenai/c4", "en", "train"),
        ("some/set", None, "train"),
    ]
    for name, key in (("c4_local", "path"), ("text", "path"), ("hub", "name")):
        with pytest.raises(UserError, match=rf"data\.{key} is missing"):
            open_source(OmegaConf.load(folder / f"{name}.yaml"), "train")  # type: ignore[arg-type]
