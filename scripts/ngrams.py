"""What unigram and bigram models reach on a task: what its runs have to beat.

    python scripts/ngrams.py experiment=fair data.path=DIR --tokens 1228800 --json FILE

Counted on the first N tokens of the training text (--tokens, several are allowed) and on all of it; evaluated on the
validation rows of the runs. Arguments of the form key=value are those of train.py. Seconds to minutes, nothing is trained.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import (  # noqa: E402
    UserError,
    load_tokenizer,
    ngram_perplexities,
    open_source,
    training_sequences,
    validation_rows,
)


def first(sequences: Iterable[Any], tokens: int | None) -> Iterator[Any]:
    """The first sequences with together at least so many tokens; all of them for None."""
    seen = 0
    for sequence in sequences:
        yield sequence
        seen += len(sequence)
        if tokens is not None and seen >= tokens:
            return


def measure(settings: Sequence[str], tokens: Sequence[int]) -> dict[str, Any]:
    """The record: a case for each number of tokens, and one for all text (`tokens` is null there).

    Raises:
        UserError: settings that train.py refuses, text that is not there.
    """
    from omegaconf import OmegaConf

    from pretraining.config import compose, quoted, validate

    cfg = compose([quoted(setting) for setting in settings])
    validate(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    length, rows = cfg.data.length, cfg.data.rows
    source, held_out = (open_source(cfg.data, split=split) for split in ("train", "validation"))
    ids, labels = validation_rows(
        held_out, tokenizer, length, rows, cfg.data.validation_max_tokens, cfg.data.attention
    )[:2]
    cases = []
    for limit in [*tokens, None]:
        sequences = first(training_sequences(source, tokenizer, length, rows), limit)
        found = ngram_perplexities(sequences, ids, labels, vocab_size=cfg.model.vocab_size)
        counted = found["train_targets"] + found["train_sequences"]
        if limit is not None and counted < limit:
            raise UserError(f"The training text has {counted:,} tokens, not {limit:,}: give --tokens at most that.")
        cases.append(
            {
                "tokens": limit,
                "unigram": found["unigram"],
                "bigram": found["bigram"],
                "documents": found["train_sequences"],
                "train_pairs": found["train_targets"],
            }
        )
    return {
        "model": OmegaConf.select(cfg, "model.name"),
        "tokenizer": Path(str(cfg.tokenizer)).name,  # without folders of this machine
        "validation_tokens": found["targets"],
        "text": {
            "train": {key: value for key, value in source.description.items() if key != "path"},
            "validation": {key: value for key, value in held_out.description.items() if key != "path"},
        },
        "cases": cases,
    }


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for train.py: experiment, data, model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[], metavar="N", help="of the training text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the record")
    asked = parser.parse_intermixed_args(words)
    if any(tokens < 1 for tokens in asked.tokens):
        print("error: --tokens has to be positive: give the number of tokens to count.", file=sys.stderr)
        return 2
    if asked.json and asked.json.is_dir():
        print(f"error: --json {asked.json} is a folder: name a file.", file=sys.stderr)
        return 2
    try:
        record = measure(asked.settings, asked.tokens)
    except ValueError as error:  # tokens that the vocabulary lacks, no text
        print(f"error: {error}: choose a tokenizer and a model that fit the text.", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for case in record["cases"]:
        text = f"the first {case['tokens']:,} tokens" if case["tokens"] else "all training text"
        print(f"{text} ({case['documents']:,} documents): unigram {case['unigram']:.2f}, bigram {case['bigram']:.2f}")
    if asked.json:
        from pretraining.record import write_json

        shown = [f"{word.partition('=')[0]}=DIR" if "/" in word else word for word in asked.settings]
        limits = ["--tokens", *map(str, asked.tokens)] if asked.tokens else []
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(asked.json, record | {"command": shlex.join(["python", "scripts/ngrams.py", *shown, *limits])})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
