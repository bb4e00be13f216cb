"""The model card of a trained model, from its run record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from . import units
from .records import C4, Run, dataset_of, load_run, lookup

_PAPER = "https://arxiv.org/abs/2502.07752"


def write_model_card(run_dir: str | Path) -> Path:
    """Write `model/README.md` in a run folder, with the front matter that the Hugging Face Hub reads.

    Raises:
        FileNotFoundError: the run has saved no model.
        ValueError: the run has not ended, so there is no result to state.
    """
    run = load_run(run_dir)
    folder = run.path / "model"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{run.path} holds no model/, so there is nothing to write a card for: "
            "let the run end with trainer.save_model=true."
        )
    if run.summary is None:
        raise ValueError(f"{run.path} holds no summary.json yet: let the run end before its model gets a card.")
    path = folder / "README.md"
    front = yaml.safe_dump(_front_matter(run), sort_keys=False, allow_unicode=True)
    path.write_text(f"---\n{front}---\n\n{_body(run, run.summary)}", encoding="utf-8")
    return path


def _front_matter(run: Run) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "pretraining", "optimizer", run.optimizer.replace("_", "-"), "arxiv:2502.07752"],
    }
    if dataset := dataset_of(run):
        front["datasets"] = [dataset]
    if dataset == C4 or run.setting("data.kind") == "sample":  # of other text the record does not tell the language
        front["language"] = ["en"]
    # No licence key: the terms of the weights follow from the data, which this record does not decide.
    return front


def _body(run: Run, summary: dict[str, Any]) -> str:
    method = units.optimizer_name(run.optimizer)
    tokens = f"{summary['tokens']:,}" if summary.get("tokens") is not None else "an unknown number of"
    steps = summary.get("steps", run.setting("trainer.steps", "unknown"))
    sections = [
        f"# {run.model}, pretrained with {method}",
        f"A research artefact: a LLaMA trained from random weights for {tokens} tokens ({steps} optimizer steps) to "
        f"study the optimizer {method}. It comes from an independent reference implementation of "
        f"[arXiv 2502.07752]({_PAPER}). Do not use the model for anything else: its output is neither "
        "true nor filtered, and nobody has examined it for any purpose but comparing optimizers.",
        "## Results\n\n" + _results(summary),
        "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n```',
        "## Architecture\n\n"
        + _table(_without(run.setting("model", {}), "name", "tokenizer"), ("Parameters", _parameters(run, summary))),
        f"## Optimizer: {method}\n\n" + _table(_without(run.setting("optimizer", {}), "name")),
        "## Training\n\n" + _table(_chosen(run)),
        "## Data\n\n"
        + _table(_data(run), ("Tokenizer", _tokenizer(run)))
        + "\n\nThe weights carry no licence of their own: the terms of the data above apply.",
        "## Where it was made\n\n" + _table(_provenance(run, summary)),
    ]
    return "\n\n".join(sections) + "\n"


def _results(summary: dict[str, Any]) -> str:
    validation = summary.get("validation_tokens")
    note = f"{validation:,} validation tokens" if validation is not None else "the validation set"
    rows = [("This model", summary.get("perplexity"))]
    rows += [
        (f"{name} model counted on the training split", summary.get(f"{name.lower()}_perplexity"))
        for name in ("Bigram", "Unigram")
    ]
    lines = [f"| | Perplexity on {note} |", "|:--|--:|"]
    lines += [f"| {name} | {units.perplexity(float(value))} |" for name, value in rows if value is not None]
    text = "\n".join(lines)
    if summary.get("ngram_documents") is not None:
        text += f"\n\nThe n-gram models were counted on {summary['ngram_documents']:,} training documents."
    return text


def _parameters(run: Run, summary: dict[str, Any]) -> Any:
    value = summary.get("parameters", run.environment.get("parameters"))
    return f"{value:,}" if isinstance(value, int) else value


def _chosen(run: Run) -> dict[str, Any]:
    trainer = run.setting("trainer", {})
    names = ("steps", "batch_size", "precision", "warmup_fraction", "min_lr_ratio", "grad_clip")
    return {
        **{name: trainer[name] for name in names if name in trainer},
        "seed": run.seed,
        "recipe": run.setting("recipe"),
    }


def _data(run: Run) -> dict[str, Any]:
    """Settings and identity of the data, without paths: the folders of one machine mean nothing on another."""
    described = {**run.setting("data", {}), **lookup(run.environment, "data", {})}
    return {
        name: _without(value, "path") if isinstance(value, dict) else value
        for name, value in described.items()
        if name not in ("path", "validation_path")
    }


def _tokenizer(run: Run) -> str | None:
    name = lookup(run.environment, "tokenizer.name", run.setting("tokenizer"))
    fingerprint = lookup(run.environment, "tokenizer.fingerprint")
    return f"{name} (fingerprint {fingerprint})" if name and fingerprint else name


def _provenance(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    environment = run.environment
    commit = environment.get("commit")
    if commit and (environment.get("dirty") or environment.get("uncommitted_changes")):
        commit += " with uncommitted changes"
    rows: dict[str, Any] = {"Commit": commit, "Command": environment.get("command")}
    rows |= {f"Hardware: {name}": value for name, value in lookup(environment, "hardware", {}).items()}
    if summary.get("wall_seconds") is not None:
        rows["Time"] = units.duration(summary["wall_seconds"])
    if summary.get("tokens_per_second") is not None:
        rows["Speed"] = f"{summary['tokens_per_second']:,.0f} tokens/s"
    if summary.get("optimizer_state_bytes") is not None:
        rows["Optimizer state"] = units.size(summary["optimizer_state_bytes"])
    if summary.get("peak_memory_bytes") is not None:
        kind = summary.get("peak_memory_kind", "device")
        rows["Peak memory"] = f"{units.size(summary['peak_memory_bytes'])} ({kind})"
    python = environment.get("python")
    versions = {**({"python": python} if python else {}), **lookup(environment, "versions", {})}
    rows["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return rows


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _table(values: dict[str, Any], *more: tuple[str, Any]) -> str:
    """Markdown table of names and values; null values are left out."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in [*values.items(), *more] if value not in (None, "")]
    return "\n".join(["| | |", "|:--|:--|", *rows])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    text = f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
