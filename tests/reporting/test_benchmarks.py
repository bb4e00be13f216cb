"""The page of the benchmarks: every record as a table, and what has none as "not run"."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from reporting import benchmarks
from reporting.benchmarks import PLACES, aligned, load, optimizer_table, page
from scripts import benchmark

ENVIRONMENT = {
    "command": "python scripts/benchmark.py optimizers --dtype bf16",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "numpy": "2.4.0", "galore-torch": "1.0", "heavyball": None},
    "hardware": {"device": "cpu", "cpu": "Some CPU", "threads": 2, "cores": 4},
}
LINE = {
    "group": "low rank", "name": "galore", "config": "galore", "package": "racs-alice", "rivals": ["galore-torch"],
    "differs": "", "interval": 200, "step_ms": 80.04, "quartiles_ms": [79.6, 81.2], "refresh_ms": 1234.5,
    "refresh_quartiles_ms": [1230.0, 1240.0], "amortised_ms": 85.8, "to_adamw": 6.67, "to_rivals": {"galore-torch": 0.888},
    "refresh_to_rivals": {"galore-torch": 0.42}, "bound_ms": 66.9, "fraction": 0.836, "step_peak_bytes": 9_900_000,
    "refresh_peak_bytes": 70_100_000, "refresh_samples_ms": [1230.0, 1234.5, 1240.0],
}  # fmt: skip
ADAMW = {
    **LINE, "name": "torch AdamW (fused)", "config": None, "interval": None, "step_ms": 12.0, "quartiles_ms": [11.9, 12.1],
    "refresh_ms": None, "amortised_ms": 12.0, "to_adamw": 1.0, "to_rivals": {}, "refresh_to_rivals": {}, "bound_ms": 9.0,
    "fraction": 0.75, "step_peak_bytes": 10**9, "refresh_peak_bytes": None, "refresh_samples_ms": [],
}  # fmt: skip
OTHER = {"group": "low rank", "name": "odd GaLore", "config": None, "differs": "has no basis", "error": "not installed"}
STEPS: dict[str, Any] = {
    "format": 1,
    "kind": "optimizers",
    "settings": {
        "model": "llama_60m", "device": "cpu", "dtype": "bf16", "matrices": {"512x512": 32}, "parameters": 8_388_608,
        "rank": 128, "repeats": 30, "copy_bytes_per_second": 3.6e10, "bytes_per_second": 6e10,
        "memory_limit_bytes": 64_000_000,
    },
    "environment": ENVIRONMENT,
    "contestants": [ADAMW, LINE, OTHER],
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "format": 1,
    "settings": {
        "model": "llama_tiny", "device": "cpu", "precision": "bf16_mixed", "tokens_per_step": 4096, "rounds": 4, "steps": 8,
    },
    "environment": {**ENVIRONMENT, "command": "python scripts/benchmark.py training --model llama_tiny"},
    "unfair": [],
    "contestants": [
        {
            "name": "ours", "tokens_per_second": 11000.0, "least": 10900.0, "most": 11100.0,
            "ratio_to_transformers": 1.21, "ratios": [1.2, 1.21, 1.22], "mfu": 0.41, "peak_memory_bytes": 2**30,
        },
        {
            "name": "transformers", "tokens_per_second": 9090.0, "least": 9000.0, "most": 9100.0,
            "ratio_to_transformers": 1.0, "ratios": [1.0, 1.0, 1.0], "mfu": None,
        },
        {"name": "galore_style", "tokens_per_second": None, "error": "it ended with exit code 1"},
    ],
}  # fmt: skip


def put(folder: Path, name: str, record: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def rows(text: str, start: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(start)
    ]


def test_what_has_no_record_says_not_run(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.count("| not run |") == len(PLACES) and "## Optimizer steps" not in text
    assert {place.device for place in PLACES} == {"cpu", "cuda"}
    for place in PLACES:
        assert f"`{place.command}`" in text


def test_commands_of_the_page_are_those_of_make_bench() -> None:
    ran = {
        f"python scripts/benchmark.py {words.split()[0]} {' '.join(words.split()[1:3])} --device {device} "
        f"{' '.join(words.split()[3:])}".strip()
        for device, everything in benchmark.SETS.items()
        for words in everything
    }
    assert ran == {place.command for place in PLACES}


def test_a_record_fills_its_place(tmp_path: Path) -> None:
    put(tmp_path, "optimizers_llama_60m_cpu_bf16.json", STEPS)
    put(tmp_path, "training_llama_tiny_cpu_bf16_mixed.json", TRAINING)
    text = page(tmp_path)
    assert text.count("| not run |") == len(PLACES) - 2
    assert "[optimizers_llama_60m_cpu_bf16.json](optimizers_llama_60m_cpu_bf16.json)" in text
    assert f"`{ENVIRONMENT['command']}`" in text
    assert "Some CPU, 2 of 4 threads; Python 3.11.7, torch 2.13.0, galore-torch 1.0." in text
    assert "8.4M weights in 32 matrices (32 of 512x512), rank 128, 30 rounds" in text
    assert "36.0 GB/s, a scaling in place 60.0" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_record_of_a_place_that_nobody_asked_for_is_shown_too(tmp_path: Path) -> None:
    other = copy.deepcopy(STEPS)
    other["settings"] |= {"model": "llama_130m", "device": "cuda", "dtype": "fp32"}
    other["environment"]["hardware"] = {**ENVIRONMENT["hardware"], "device": "Some GPU"}  # type: ignore[dict-item]
    put(tmp_path, "optimizers_llama_130m_cuda_fp32.json", other)
    text = page(tmp_path)
    assert text.count("| not run |") == len(PLACES)
    assert "### llama_130m, CUDA, fp32" in text and "Some GPU; Some CPU, 2 of 4 threads" in text


def test_the_table_of_steps() -> None:
    table = optimizer_table(STEPS)
    [ours] = rows(table, "| **galore**")
    assert ours[1:] == [
        "80.0", "79.6 to 81.2", "6.67", "0.89 galore-torch", "1,234 (3)", "0.42 galore-torch", "200", "85.8", "66.9", "84 %",
        "9.9 / **70.1**",
    ]  # fmt: skip
    [adamw] = rows(table, "| torch AdamW (fused)")
    assert adamw[5:8] == ["–", "–", "–"] and adamw[-1] == "1000.0"  # the limit is for ours
    assert rows(table, "| odd GaLore")[0][1] == "not installed"


def test_remarks_name_the_limit_and_other_algorithms(tmp_path: Path) -> None:
    put(tmp_path, "optimizers_llama_60m_cpu_bf16.json", STEPS)
    assert "Limit of extra memory: 64.0 MB. Not the same algorithm: odd GaLore has no basis." in page(tmp_path)


def test_the_table_of_training_and_what_was_not_fair(tmp_path: Path) -> None:
    put(tmp_path, "training_llama_tiny_cpu_bf16_mixed.json", {**TRAINING, "unfair": ["dtype is fp32 for one"]})
    text = page(tmp_path)
    assert rows(text, "| ours")[0] == [
        "ours", "11,000 (10,900 to 11,100)", "1.210 (1.200 to 1.220)", "41.0 %", "1.0 GiB",
    ]  # fmt: skip
    assert rows(text, "| transformers.Trainer")[0][3:] == ["–", "–"]
    assert rows(text, "| GaLore-style loop")[0][1] == "it ended with exit code 1"
    assert "**Not a fair comparison:** dtype is fp32 for one." in text


@pytest.mark.parametrize("text", ["[", "[]", '{"format": 0, "contestants": []}', '{"format": 1}'])
def test_another_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "optimizers_x_cpu_fp32.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"optimizers_x_cpu_fp32\.json is not a benchmark record of this version"):
        page(tmp_path)
    with pytest.raises(ValueError, match="measure again"):
        load(path)


def test_a_terminal_gets_columns_of_one_width() -> None:
    lines = aligned(optimizer_table(STEPS)).splitlines()
    assert len({len(line) for line in lines}) == 1 and "*" not in "".join(lines)
    assert lines[3].startswith("galore ") and lines[1].replace(" ", "").strip("-") == ""


def test_the_committed_records_can_be_read() -> None:
    folder = Path(benchmarks.__file__).parent.parent / "results"
    assert (folder / benchmarks.PAGE).read_text(encoding="utf-8") == page(folder / "benchmarks")
