import json
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from reporting import finish, write_model_card
from tests.reporting.synthetic import write_run


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", steps=60)
    (folder / "model").mkdir()
    return folder


def test_the_card_states_the_numbers_of_the_record(run):
    path = write_model_card(run)
    assert path == run / "model" / "README.md"
    text = path.read_text()
    for said in (
        "245,760 tokens",
        "60 optimizer steps",
        "| Perplexity on 123,456 validation tokens |",
        "| This model | 57.25 |",
        "| Bigram model counted on the training split | 103.8 |",
        "| Unigram model counted on the training split | 412.5 |",
        "| Parameters | 3,745,024 |",
        "| lr | 0.02 |",
        "| adam_lr | 0.005 |",
        "| betas | 0.9, 0.9, 0.999 |",
        "| hidden_size | 256 |",
        "sample_1k (fingerprint f1f2f3)",
        "4f81fa7c0ffee",
        "train.py experiment=quickstart optimizer=alice",
        "An Example CPU \\| 2 GHz",
        "torch 2.13.0",
        "1 min 33 s",
        "Do not use the model for anything else",
    ):
        assert said in text, said
    assert "uncommitted" not in text
    assert "None" not in text and "null" not in text
    assert "/home/somebody" not in text  # folders of the machine
    assert "55.5" not in text  # perplexity_galore belongs beside published numbers only


def test_the_front_matter_is_what_the_hub_reads(run):
    card = ModelCard(write_model_card(run).read_text())
    assert card.data.to_dict()["library_name"] == "transformers"
    assert {"llama", "alice"} <= set(card.data.tags)
    assert card.data.datasets is None and card.data.license is None
    front = yaml.safe_load((run / "model" / "README.md").read_text().split("---\n")[1])
    assert front["pipeline_tag"] == "text-generation"
    assert front["language"] == ["en"]  # the embedded text


@pytest.mark.parametrize(
    ("kind", "name", "dataset"),
    [
        ("c4_local", "c4_local", None),  # a layout, which any text can have
        ("hub", "allenai/c4", ["allenai/c4"]),
        ("hub", "roneneldan/TinyStories", ["roneneldan/TinyStories"]),
        ("text", "text", None),
    ],
)
def test_data_of_the_hub_is_linked(tmp_path, kind, name, dataset):
    folder = write_run(tmp_path / "run", steps=2, kind=kind, data=name)
    (folder / "model").mkdir()
    data = ModelCard(write_model_card(folder).read_text()).data
    assert data.datasets == dataset
    assert data.language == (["en"] if name == "allenai/c4" else None)


@pytest.mark.parametrize(
    ("source", "dataset"),
    [
        ({"repository": "allenai/c4", "revision": "1588ec4"}, ["allenai/c4"]),  # by the manifest of scripts/fetch_c4.py
        ({"repository": "somebody/texts"}, ["somebody/texts"]),
        ({"first_file": "c4-train.00017-of-01024.json.gz"}, ["allenai/c4"]),
        ({"first_file": "c4-train.00000-of-00002.json.gz"}, None),
        ({"first_file": "wiki-train.00000-of-01024.json.gz"}, None),
    ],
)
def test_local_text_is_c4_where_its_record_tells(tmp_path, source, dataset):
    folder = write_run(tmp_path / "run", steps=2, kind="c4_local", data="c4_local")
    (folder / "model").mkdir()
    environment = json.loads((folder / "environment.json").read_text())
    environment["data"]["train"] |= source
    (folder / "environment.json").write_text(json.dumps(environment))
    assert ModelCard(write_model_card(folder).read_text()).data.datasets == dataset


def test_uncommitted_changes_are_admitted(run):
    file = run / "environment.json"
    file.write_text(file.read_text().replace('"uncommitted_changes": false', '"uncommitted_changes": true'))
    assert "4f81fa7c0ffee with uncommitted changes" in write_model_card(run).read_text()


def test_a_sparse_record_gives_a_sparse_card(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("model: {name: llama_tiny}\noptimizer: {name: racs}\n")
    (tmp_path / "summary.json").write_text('{"perplexity": 80.5}')
    assert "| This model | 80.50 |" in write_model_card(tmp_path).read_text()


def test_no_model_and_no_result_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model/"):
        write_model_card(write_run(tmp_path / "a", steps=2))
    folder = write_run(tmp_path / "b", steps=2, finished=False)
    (folder / "model").mkdir()
    with pytest.raises(ValueError, match=r"no summary\.json yet"):
        write_model_card(folder)


def test_finish_makes_both(run):
    assert finish(run) == [run / "training.png", run / "model" / "README.md"]


def test_finish_survives_a_missing_model_and_a_missing_matplotlib(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=3)
    picture, note = finish(folder)
    assert picture == folder / "training.png" and "no model/" in note
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in finish(folder)[0]
