"""Numbers and names as people read them."""

from __future__ import annotations

import math

_NAMES = {
    "adafactor": "Adafactor",
    "adam": "Adam",
    "adam_8bit": "8-bit Adam",
    "adam_mini": "Adam-mini",
    "adamw": "AdamW",
    "alice": "Alice",
    "alice_0": "Alice-0",
    "apollo": "Apollo",
    "apollo_mini": "Apollo-mini",
    "apollo_svd": "Apollo-svd",
    "eigen_adam": "Eigen-Adam",
    "fira": "Fira",
    "fira_plus": "Fira+",
    "galore": "GaLore",
    "galore_8bit": "8-bit GaLore",
    "lamb": "LAMB",
    "lars": "LARS",
    "lion": "Lion",
    "low_rank_soap": "Low-rank SOAP",
    "muon": "Muon",
    "muon_paper": "Muon (App. B.9)",
    "normalization": "Normalization",
    "racs": "RACS",
    "racs_no_ema": "RACS without EMA",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "signum": "Signum",
    "soap": "SOAP",
    "soap_factored": "Factored SOAP",
    "sophia_g": "Sophia-G",
    "sophia_h": "Sophia-H",
    "swan": "SWAN",
    "whitening": "Whitening",
}


def optimizer_name(name: str) -> str:
    """The name in the literature of an optimizer's config name."""
    return _NAMES.get(name, name)


def count(number: float) -> str:
    """3744000 -> '3.7M'."""
    if not math.isfinite(number):
        return "?"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}" if abs(number) >= 10 * size else f"{number / size:.1f}{letter}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes, in binary units: 24117248 -> '23.0 MiB'."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """93 -> '1 min 33 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def perplexity(number: float) -> str:
    """Four significant digits, all digits before the point: 57.123 -> '57.12', 1024.5 -> '1024'."""
    if math.isnan(number):
        return "unknown"
    if math.isinf(number):
        return "diverged"
    return f"{number:.{max(0, 3 - math.floor(math.log10(max(number, 1.0))))}f}"
