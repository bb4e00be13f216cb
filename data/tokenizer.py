"""Tokenizers behind one small interface: the embedded ones, a SentencePiece file, a folder, or a name on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

SAMPLE = Path(__file__).resolve().parent / "sample"
EMBEDDED = {"sample_1k": SAMPLE / "sample_1k.model", "sample_4k": SAMPLE / "sample_4k.model"}
MODEL_FILE = "spiece.model"
THREADS = 4  # of a batch's tokenisation, where nothing else is said
WORD_BOUNDARY = re.compile(r"[A-Za-z0-9.,;:!?](?= [A-Za-z0-9])")


class SentencePieceTokenizer:
    """A SentencePiece model with pad and eos pieces, without sentinels.

    Attributes: `name`; `vocab_size` (pieces of the model: 32,000 for T5's); `pad_id`; `eos_id`; `fingerprint`
    (SHA-256 of the model file); `threads` that `encode` uses (a `HubTokenizer` goes by RAYON_NUM_THREADS).
    """

    def __init__(self, path: Path, name: str) -> None:
        import sentencepiece

        self._model = path.read_bytes()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            pieces = [self._pieces.id_to_piece(i) for i in range(self._pieces.get_piece_size())]
        except (RuntimeError, UnicodeDecodeError) as error:  # the second: damaged inside a piece
            raise UserError(f"{path} is not a SentencePiece model: give the tokenizer's .model file.") from error
        self.name = name
        self.threads = THREADS
        self.vocab_size = len(pieces)
        self.pad_id: int = self._pieces.pad_id()
        self.eos_id: int = self._pieces.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path} has no end-of-text piece: use a tokenizer that has one, such as T5's.")
        if self.pad_id < 0:  # padding is told apart by its labels, never by its id
            self.pad_id = self.eos_id
        self.fingerprint = hashlib.sha256(self._model).hexdigest()
        # Where no piece reaches over a space, the tokens of a beginning are the beginning of the tokens.
        self._separable = not any("▁" in piece[1:] for piece in pieces)

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of each text, without special tokens; with `limit`, the first `limit` of them.

        Text that spells a special token stays text.
        """
        if not texts:
            return []
        if limit is None or not self._separable:
            return [ids[:limit] for ids in self._pieces.encode(list(texts), out_type=int, num_threads=self.threads)]
        heads = [_head(text, 6 * limit) for text in texts]  # English has 2.4 to 4.5 characters a token here
        result = self._pieces.encode(heads, out_type=int, num_threads=self.threads)
        for i, text in enumerate(texts):
            if len(result[i]) < limit and len(heads[i]) < len(text):
                result[i] = self._pieces.encode(text)
        return [ids[:limit] for ids in result]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens and ids outside the vocabulary are left out."""
        return self._pieces.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads, encoding as `encode` does.

        Exactly so for the embedded tokenizers. For a unigram model such as T5's, long documents may differ in a
        rare tie between two segmentations (SentencePiece adds scores in float32), and so may text with loose
        accents or text that spells a special token.
        """
        from transformers import PreTrainedTokenizerFast

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        names = [self._pieces.id_to_piece(i) for i in (self.pad_id, self.eos_id, self._pieces.unk_id())]
        PreTrainedTokenizerFast(
            tokenizer_object=_fast_tokenizer(self._model),
            pad_token=names[0],
            eos_token=names[1],
            unk_token=names[2],
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,  # a document that contains "</s>" must not end there
        ).save_pretrained(path)
        (path / MODEL_FILE).write_bytes(self._model)
        settings = path / "tokenizer_config.json"
        content = json.loads(settings.read_text())
        content["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 does not know version 5's new name
        settings.write_text(json.dumps(content, indent=2) + "\n")


class HubTokenizer:
    """A fast tokenizer of `transformers`, with the same attributes as `SentencePieceTokenizer`.

    T5's sentinels `<extra_id_N>` do not count: they never occur in text, and the paper's models have 32,000
    rows.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"The tokenizer {name} has no fast version: give one that has a tokenizer.json.")
        if tokenizer.eos_token_id is None:
            raise UserError(f"The tokenizer {name} has no end-of-text token: use one that has, such as t5-base.")
        tokenizer.model_max_length = int(1e30)  # rows are cut here; its warning about long texts would mislead
        # A copy of our own: every call of a transformers tokenizer leaves its padding and truncation in the backend.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        self._tokenizer = tokenizer
        self.name = name
        vocabulary = tokenizer.get_vocab()
        sentinels = {i for token, i in vocabulary.items() if token.startswith("<extra_id_")}
        self.vocab_size: int = max(i for i in vocabulary.values() if i not in sentinels) + 1
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._not_text = sentinels | {self.eos_id, self.pad_id}

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of each text, without special tokens; with `limit`, the first `limit` of them.

        Text that spells a special token stays text, or, where the tokenizer has no other tokens for it, is left out.
        """
        result = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        for i, ids in enumerate(result):
            if not self._not_text.isdisjoint(ids):
                result[i] = [token for token in ids if token not in self._not_text]
        return [ids[:limit] for ids in result]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads."""
        self._tokenizer.save_pretrained(folder)


Tokenizer = SentencePieceTokenizer | HubTokenizer


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.

    `name` is `sample_1k` or `sample_4k` (embedded), the path of a SentencePiece `.model` file, the path of a
    folder written by `save_pretrained`, or a name on the Hub such as `t5-base`. Raises `UserError`.
    """
    name = os.fspath(name)
    path = EMBEDDED.get(name, Path(name).expanduser())
    if path.is_dir() and (path / MODEL_FILE).is_file():
        return SentencePieceTokenizer(path / MODEL_FILE, name)
    if path.is_file():
        return SentencePieceTokenizer(path, name)
    if not path.is_dir() and (name.endswith(".model") or name.startswith((".", "/", "~")) or name.count("/") > 1):
        known = ", ".join(EMBEDDED)
        raise UserError(f"There is no tokenizer at {name}: give an existing path, a Hub name, or one of {known}.")
    from transformers import AutoTokenizer

    try:  # a folder, or a copy in the local cache: neither asks the network
        return HubTokenizer(AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False), name)
    except UserError:
        raise
    except Exception as error:  # transformers lets many kinds through: OSError, ValueError, those of its HTTP client
        if path.is_dir():
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"The folder {name} holds no tokenizer that transformers can load ({type(error).__name__}: {reason}): give "
                "one that save_pretrained wrote, or a .model file."
            ) from error
    try:
        import huggingface_hub

        huggingface_hub.HfApi().model_info(name, timeout=10.0)  # transformers would retry for a minute
        return HubTokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The tokenizer {name} could not be fetched from the Hub ({type(error).__name__}): check the name and the "
            f"connection, or offline give the path of its .model file or one of {', '.join(EMBEDDED)}."
        ) from error


def _head(text: str, characters: int) -> str:
    """The text up to the first plain word boundary after so many characters."""
    boundary = WORD_BOUNDARY.search(text, characters) if len(text) > characters else None
    return text[: boundary.end()] if boundary else text


def _fast_tokenizer(model: bytes) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of the SentencePiece `model`, without added special
    tokens.

    Built from the model's own fields, because the converters of `transformers` go by the architecture and
    lose byte fallback and untouched whitespace.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec: Any = sentencepiece_model_pb2  # its classes are made at import: type checkers do not see them
    proto = spec.ModelProto.FromString(model)
    trainer, rule = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = trainer.unk_id
    if trainer.model_type == trainer.BPE:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
        merges = [
            (ids[piece], (piece[:cut], piece[cut:]))
            for piece in normal
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        core: Any = models.BPE(
            ids, [pair for _, pair in sorted(merges)], unk_token=pieces[unknown][0],
            fuse_unk=True, byte_fallback=trainer.byte_fallback,
        )  # fmt: skip
    else:
        core = models.Unigram(pieces, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    tokenizer = Tokenizer(core)

    steps: list[Any] = []
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rule.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if trainer.split_by_whitespace:  # no piece crosses a space: splitting there changes nothing and is faster
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if rule.add_dummy_prefix else [])
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer.encode_special_tokens = True
    return tokenizer
