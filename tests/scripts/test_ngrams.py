"""The command that measures n-gram models on a task."""

import json

from scripts import ngrams

TASK = ["data=sample", "tokenizer=sample_1k", "model=llama_tiny", "data.rows=pack", "data.length=64"]


def test_more_text_makes_a_better_bigram_and_the_record_says_what_was_counted(tmp_path, capsys):
    out = tmp_path / "new" / "ngrams.json"
    assert ngrams.main([*TASK, "--tokens", "5000", "20000", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    few, more, whole = record["cases"]
    assert [case["tokens"] for case in (few, more, whole)] == [5000, 20000, None]
    assert 5000 <= few["train_pairs"] < 20000 <= more["train_pairs"] < whole["train_pairs"]
    assert few["bigram"] > more["bigram"] > whole["bigram"] > 1
    assert whole["unigram"] > whole["bigram"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert record["command"].endswith("--tokens 5000 20000") and str(tmp_path) not in out.read_text()


def test_sequences_end_with_the_one_that_reaches_the_limit():
    rows = [[1, 2], [3, 4], [5, 6]]
    assert list(ngrams.first(rows, 3)) == rows[:2]
    assert list(ngrams.first(rows, None)) == rows


def test_mistakes_are_one_sentence(capsys, tmp_path):
    assert ngrams.main([*TASK, "--tokens", "0"]) == 2
    assert capsys.readouterr().err == "error: --tokens has to be positive: give the number of tokens to count.\n"
    assert ngrams.main(["experiment=fair", "data.path=/nowhere"]) == 2
    assert "/nowhere does not exist" in capsys.readouterr().err
    assert ngrams.main([*TASK, "--tokens", "99999999"]) == 2
    assert "tokens, not 99,999,999: give --tokens at most that." in capsys.readouterr().err
    assert ngrams.main([*TASK, "model.vocab_size=10"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert ngrams.main([*TASK, "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --json {tmp_path} is a folder: name a file.\n"
