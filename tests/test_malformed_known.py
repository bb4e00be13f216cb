"""The cases that are not refused, by what happens instead; the tables leave them out."""

KNOWN: dict[str, list[str]] = {
    "64 documents are tokenised in one call, whatever their size": [
        "size, documents of 10 MB alone, packed",
    ],
    "a default normaliser is used: another tokenizer, whose SHA-256 the record has": [
        "tokenizer, without the normaliser",
    ],
}
