"""Is this optimizer sound, and how well does it train? For any class of any package, or of a file beside you.

    python scripts/check_optimizer.py torch.optim.RMSprop --lr 0.001 alpha=0.95
    python scripts/check_optimizer.py my_file.MyOptimizer --lr 0.01 --no-train
    python scripts/check_optimizer.py optimizers.Alice rank=64 leading=20 --small rank=4 --small leading=2

The battery of optimizers/battery.py first (seconds), then the embedded quickstart with the class on the matrices and
Adam on the rest (minutes), its perplexity beside those of the committed comparison.

key=value is an option of the class; with a dot in its key, or called seed, run_dir, model, data or tokenizer, it goes to
train.py (trainer.steps=50). The battery's matrices have 6 to 12 rows: --small gives an option another value there.
Exit code 0: all checks passed; 1: a check or the training failed; 2: nothing could be checked.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.errors import UserError  # noqa: E402
from optimizers import battery, libraries  # noqa: E402
from reporting import find_runs, load_run, units  # noqa: E402
from reporting.summary import mean_perplexity, ranking  # noqa: E402

TRAINER = (sys.executable, str(ROOT / "train.py"))
COMPARISON = ROOT / "results" / "runs" / "compare"
MARKS = {"pass": "pass", "fail": "FAIL", "not applicable": "n/a"}


def load_class(target: str) -> type[torch.optim.Optimizer]:
    """The optimizer class called ``target``, package.Class.

    Raises:
        UserError: there is no such module or class, or it is no optimizer.
    """
    try:
        return libraries.load_class(target)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def value_of(text: str) -> Any:
    """A number, list or text, as Python or as YAML writes them: 1e-3, [0.9, 0.99], true, null, cosine."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def maker(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> battery.Make:
    """What the battery calls.

    Raises:
        UserError: the class cannot be made with these options.
    """

    def make(params: list[Any]) -> torch.optim.Optimizer:
        return optimizer_class(params, **options)

    try:
        make(battery.parameters())
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(
            f"{optimizer_class.__name__}(params{', ' * bool(given)}{given}) failed with {_sentence(error)}: give --lr and "
            "options as key=value, and with --small those that have to suit matrices of 6 to 12 rows."
        ) from error
    return make


def print_battery(make: battery.Make) -> bool:
    """The table of verdicts and properties; True if nothing failed."""
    fine = True
    for check in battery.CHECKS:
        found = battery.verdict(check, make)
        fine &= found.outcome != "fail"
        print(f"  {check.name:15} {MARKS[found.outcome]:5} {found.text or check.meaning.replace('``', '')}", flush=True)
    try:
        measured = battery.measure(make)
    except Exception as error:
        print(f"\nNo property could be measured: {_sentence(error)}.")
        return False
    print("\nMeasured, neither right nor wrong")
    for name, value in properties(measured).items():
        print(f"  {name:15} {value}")
    return fine


def properties(measured: battery.Properties) -> dict[str, str]:
    degree = measured.scale_degree
    scale = {None: "no power of the gradient's scale", 0.0: "the update does not depend on the gradient's scale"}
    return {
        "scale": scale.get(degree, f"c times the gradient gives c^{degree:g} times the update" if degree else ""),
        "transposition": "equivariant"
        if measured.transposition
        else "not equivariant: a tall matrix is treated differently from a wide one",
        "structure": "element by element: uses no matrix structure" if measured.elementwise else "matrix-wise",
        "memory": "none: an update depends on its own gradient only" if measured.stateless else "depends on the past",
        "against Adam": f"cosine {measured.cosine_to_adam:.2f} between updates"
        + ("" if measured.differs_from_adam else ": practically Adam's"),
        "torch.linalg": ", ".join(measured.solvers) or "calls no solver",
        "state": f"{measured.state_per_weight:.3g} numbers for each weight of a 6 x 12 matrix (Adam: 2)",
    }


def training_command(
    target: str, lr: float, adam_lr: float, options: dict[str, Any], overrides: Sequence[str], trainer: Sequence[str]
) -> tuple[list[str], Path]:
    """The command line of the quickstart run, and its folder."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("run_dir=")]
    short = "-".join([target.replace(".", "_"), *(f"{key}{value}" for key, value in options.items())])
    folder = ROOT / "runs" / "check" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', short)}-lr{lr:g}-adam{adam_lr:g}"
    settings = [
        "experiment=quickstart",
        "optimizer=any",
        f"optimizer.target={target}",
        f"optimizer.lr={lr:g}",
        f"optimizer.adam_lr={adam_lr:g}",
        *(f"++optimizer.options.{key}={_hydra(value)}" for key, value in options.items()),
        "recipe=none",
        "trainer.steps=300",
        "trainer.batch_size=16",
        "trainer.resume=never",  # a class that was changed since is another method
        "trainer.save_every=0",
        "trainer.save_model=false",
        "trainer.sample_tokens=0",
    ]
    keys = {word.partition("=")[0] for word in overrides}
    settings = [word for word in settings if word.partition("=")[0] not in keys]
    return [*trainer, *settings, *([] if given else [f"run_dir={folder}"]), *overrides], Path(
        given[-1]
    ) if given else folder


def train(command: Sequence[str], folder: Path) -> bool:
    """Run the quickstart and print its perplexity among those of the committed comparison; True if it ended well."""
    print(f"\nQuickstart\n  {shlex.join(command)}", flush=True)
    paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode
    if code != 0 or not (ROOT / folder / "summary.json").is_file():
        print(
            f"error: the training ended with exit code {code} and without a summary: mend what it says above, or try a "
            "smaller --lr.",
            file=sys.stderr,
        )
        return False
    run = load_run(ROOT / folder)
    steps = run.setting("trainer.steps")
    print("\nFinal perplexity of the quickstart")
    rows = [(run.perplexity, "this one", f"lr {run.lr:g}, adam_lr {run.adam_lr:g}, {steps} steps, one seed")]
    for name, cell in ranking(find_runs(COMPARISON)).items() if COMPARISON.is_dir() else ():
        rates = f"lr {cell[0].lr:g}, adam_lr {cell[0].adam_lr:g}, {cell[0].setting('trainer.steps')} steps"
        rows.append(
            (mean_perplexity(cell), units.optimizer_name(name), f"{rates}, {len(cell)} seeds, best of its grid")
        )
    for value, name, what in sorted(rows, key=lambda row: row[0]):
        print(f"  {units.perplexity(value):>8}  {name:12} {what}")
    print("  One rate against tuned ones: try others before you conclude anything.")
    return True


def main(argv: Sequence[str] | None = None, trainer: Sequence[str] = TRAINER) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="package.Class")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the class; a.b=value: of train.py")
    parser.add_argument("--lr", type=float, default=None, help="learning rate; default: the class's own")
    parser.add_argument("--adam-lr", type=float, default=0.02, help="of what is not a matrix; the comparison's best")
    parser.add_argument(
        "--small", action="append", default=[], metavar="key=value", help="an option for the battery only"
    )
    parser.add_argument("--no-train", action="store_true", help="the battery only")
    asked = parser.parse_intermixed_args(list(sys.argv[1:] if argv is None else argv))
    try:
        words = [word for word in asked.options + asked.small if not re.match(r"\+*[A-Za-z_][\w.]*=", word)]
        if words:
            raise UserError(f"{words[0]!r} is not of the form key=value: write for example momentum=0.9.")
        pairs = [word.partition("=") for word in asked.options]
        options = {key: value_of(value) for key, _, value in pairs if not _is_override(key)}
        overrides = ["".join(pair) for pair in pairs if _is_override(pair[0])]
        small = {key: value_of(value) for key, _, value in (word.partition("=") for word in asked.small)}
        rate = {} if asked.lr is None else {"lr": asked.lr}

        sys.path.insert(0, os.getcwd())
        optimizer_class = load_class(asked.target)
        make = maker(optimizer_class, {**rate, **options, **small})
        lr = asked.lr if asked.lr is not None else make(battery.parameters()).param_groups[0].get("lr")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{asked.target}, {len(battery.CHECKS)} checks on small matrices")
    fine = print_battery(make)
    if asked.no_train:
        return 0 if fine else 1
    if lr is None:
        print(f"error: {asked.target} has no learning rate to train with: give --lr, or --no-train.", file=sys.stderr)
        return 2
    options.pop("lr", None)
    command, folder = training_command(asked.target, float(lr), asked.adam_lr, options, overrides, trainer)
    trained = train(command, folder)
    return 0 if fine and trained else 1


def _is_override(key: str) -> bool:
    return "." in key or key.startswith("+") or key in ("seed", "run_dir", "model", "data", "tokenizer")


def _hydra(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_hydra, value))}]"
    return str(value) if isinstance(value, (int, float)) else "'" + str(value).replace("'", "\\'") + "'"


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[0].rstrip('.')}"


if __name__ == "__main__":
    raise SystemExit(main())
