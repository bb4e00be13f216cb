"""How well does each optimizer's structure approximate the Fisher matrix of a real model, and at what price?

    python scripts/fisher_report.py                      train, measure, write results/fisher
    python scripts/fisher_report.py --steps 100 --samples 16
    python scripts/fisher_report.py --from-records       only draw the tables and the figure again

The quickstart job (llama_tiny on the embedded text) is trained; at some moments the gradients of attention and MLP
matrices are kept, the structures of `fisher` are fitted to them, and every optimizer is timed on such a layer. Arguments
of the form key=value go to the configuration of train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fisher  # noqa: E402
from data import TrainingBatches, load_tokenizer, open_source  # noqa: E402
from data.errors import UserError  # noqa: E402
from optimizers import create  # noqa: E402
from optimizers.low_rank import switch  # noqa: E402
from pretraining.config import compose, validate  # noqa: E402
from pretraining.evaluation import row_losses, target_count  # noqa: E402
from pretraining.model import build_model  # noqa: E402
from pretraining.plan import choose_device, make_optimizer  # noqa: E402
from pretraining.record import environment  # noqa: E402
from pretraining.schedule import rate_factor, set_rates  # noqa: E402
from pretraining.throughput import StepTimer  # noqa: E402
from reporting.units import optimizer_name  # noqa: E402

OUT = ROOT / "results" / "fisher"
TYPES = ("q", "k", "v", "o", "gate", "up", "down")
KINDS = ("sequences", "batches")
TOLERANCE = 1e-4  # of fixed points; the error is stationary there, so it is right to about the square
SECONDS_PER_TIMING = 0.4
RECORD_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """A row of the report: a structure, how it is fitted to samples [N, m, n], and who uses it."""

    name: str
    formula: str
    fit: Callable[[Tensor, int, int], fisher.Structure]  # samples, rank r, leading l
    optimizer: str | None = None
    options: tuple[str, ...] = ()  # of `rank`, `leading`


def row(structure: type[fisher.Structure], optimizer: str | None = None, **how: Any) -> Row:
    return Row(structure.__name__, structure.formula, lambda G, r, l: structure.fit(G, **how), optimizer)


def switched(G: Tensor, r: int, l: int) -> fisher.Structure:
    """Alice's structure for the basis of Algorithm 2: l leading eigenvectors, r - l of the complement."""
    basis = fisher.GaLore.fit(G, r).U_L
    assert basis is not None
    U = switch(basis[None], l, "complement", [torch.Generator().manual_seed(0)])[0]
    return fisher.Alice.fit(G, r, U)


# From special to general, as Appendix E.1 has it.
ROWS = (
    row(fisher.Scalar, "sgd"),
    row(fisher.Normalization, "normalization"),
    row(fisher.TwoSidedScaling, "racs"),
    row(fisher.Whitening, "whitening"),
    row(fisher.ScaledWhitening, tolerance=TOLERANCE),
    row(fisher.Shampoo, "shampoo"),
    row(fisher.NearestKronecker, tolerance=TOLERANCE),
    row(fisher.Diagonal, "adam"),
    Row("GaLore", fisher.GaLore.formula, lambda G, r, l: fisher.GaLore.fit(G, r), "galore", ("rank",)),
    Row("Alice, switched", fisher.Alice.formula, switched, "alice", ("rank", "leading")),
    Row("Alice, leading", fisher.Alice.formula, lambda G, r, l: fisher.Alice.fit(G, r), None, ("rank",)),
    row(fisher.EigenAdam, "eigen_adam"),
    row(fisher.SOAP, "soap"),
    row(fisher.BlockDiagonal),
)
# (special, general) by Appendix E.1: how often does the general closed form come out worse?
ORDER = (
    ("Scalar", "Normalization"),
    ("Scalar", "Whitening"),
    ("Normalization", "TwoSidedScaling"),
    ("TwoSidedScaling", "Diagonal"),
    ("TwoSidedScaling", "ScaledWhitening"),
    ("Whitening", "ScaledWhitening"),
    ("Whitening", "EigenAdam"),
    ("ScaledWhitening", "EigenAdam"),
    ("Diagonal", "EigenAdam"),
    ("EigenAdam", "BlockDiagonal"),
    ("EigenAdam", "SOAP"),
    ("Diagonal", "SOAP"),
    ("Shampoo", "SOAP"),
    ("NearestKronecker", "SOAP"),
    ("Shampoo", "NearestKronecker"),
)
TIE = 1e-4  # relative differences of what is captured below this are ties: float32, and fixed points stopped early
MEASURES = (
    "captured",
    "rescaled",
    "held_out",
)  # one minus the error: of F~, of its best multiple, that for other samples


# Gradients ------------------------------------------------------------------------------------------------------------


def oriented(G: Tensor) -> Tensor:
    """[..., m, n] with m <= n, as the optimizers see it."""
    return G if G.shape[-2] <= G.shape[-1] else G.mT


class Training:
    """The quickstart job, with the gradients of some matrices kept.

    Args:
        cfg: a configuration of train.py.
        blocks: numbers of the transformer blocks whose matrices are looked at.
        window: how many steps are remembered.
    """

    def __init__(self, cfg: Any, blocks: Sequence[int], window: int) -> None:
        self.cfg, self.device = cfg, choose_device(cfg.trainer.device)
        self.steps = cfg.trainer.steps
        self.tokenizer, self.source = load_tokenizer(cfg.tokenizer), open_source(cfg.data, split="train")
        torch.manual_seed(cfg.seed)
        self.model = build_model(cfg.model, device=self.device, pad_token_id=self.tokenizer.pad_id)
        self.optimizer = make_optimizer(cfg, self.model)
        found = {
            match.groups(): p
            for name, p in self.model.named_parameters()
            if (match := re.search(r"layers\.(\d+)\..*\b(\w+)_proj\.weight$", name)) and int(match[1]) in blocks
        }
        self.matrices: dict[tuple[int, str], Tensor] = {(int(block), kind): p for (block, kind), p in found.items()}
        self.past: dict[tuple[int, str], deque[Tensor]] = {key: deque(maxlen=window) for key in self.matrices}
        self.done, self.loss = 0, float("nan")

    def rows(self, seed: int) -> TrainingBatches:
        c = self.cfg
        return TrainingBatches(
            self.source,
            self.tokenizer,
            length=c.data.length,
            rows=c.data.rows,
            batch_size=c.trainer.batch_size,
            seed=seed,
            shuffle_buffer=c.data.shuffle_buffer,
        )

    def backward(self, ids: Tensor, labels: Tensor) -> None:
        """The gradient of the mean loss over the targets of some rows."""
        self.optimizer.zero_grad(set_to_none=True)
        ids, labels = ids.to(self.device), labels.to(self.device)
        loss = row_losses(self.model(input_ids=ids).logits, labels).sum() / target_count(labels).sum().clamp_min(1)
        loss.backward()
        self.loss = loss.item()

    def run(self, moments: Sequence[int]) -> Iterable[int]:
        """Train; yield after each of the ``moments``, in steps."""
        t = self.cfg.trainer
        with self.rows(self.cfg.data.seed) as batches:
            while self.done < self.steps:
                batch = next(batches)
                self.backward(batch["input_ids"], batch["labels"])
                for key, p in self.matrices.items():
                    self.past[key].append(p.grad.clone())
                set_rates(self.optimizer, rate_factor(self.done, self.steps, t.warmup_fraction, t.min_lr_ratio))
                self.optimizer.step()
                self.done += 1
                if self.done in moments:
                    yield self.done

    def batch_gradients(self) -> dict[tuple[int, str], Tensor]:
        """[window, m, n] of each matrix: the gradients of the last steps, oldest first."""
        return {key: oriented(torch.stack(list(past))) for key, past in self.past.items()}

    def sequence_gradients(self, count: int) -> dict[tuple[int, str], Tensor]:
        """[count, m, n] of each matrix: gradients of single rows at the present weights.

        Rows are of the training text, in an order of their own for each moment.
        """
        kept: dict[tuple[int, str], list[Tensor]] = {key: [] for key in self.matrices}
        with self.rows(self.cfg.data.seed + 1 + self.done) as batches:
            while len(next(iter(kept.values()))) < count:
                batch = next(batches)
                for ids, labels in zip(batch["input_ids"].split(1), batch["labels"].split(1), strict=True):
                    self.backward(ids, labels)
                    for key, p in self.matrices.items():
                        kept[key].append(p.grad.clone())
        return {key: oriented(torch.stack(grads[:count])) for key, grads in kept.items()}


def measure_errors(G: Tensor, rank: int, leading: int) -> list[dict[str, Any]]:
    """Fit every structure to the first half of ``G`` [2N, m, n]; what it captures of that half's F and the other's."""
    fitted, held_out = G.chunk(2)
    lines = []
    for r in ROWS:
        structure = r.fit(fitted, rank, leading)
        lines.append(
            {
                "structure": r.name,
                "captured": structure.captured(fitted),
                "rescaled": structure.captured(fitted, rescaled=True),
                "held_out": structure.captured(held_out, rescaled=True),
                "elements": structure.elements(),
            }
        )
    return lines


# Time and memory ------------------------------------------------------------------------------------------------------


def time_optimizer(name: str, shape: Sequence[int], grads: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """State and milliseconds of ``name`` on one matrix [rows, columns] as it is stored, with real gradients.

    Steps that refresh bases are timed by themselves, and count with the share that they have of all steps.
    """
    layer = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], bias=False)}).to(grads[0].device)
    W = next(layer.parameters())
    optimizer = create(name, layer, lr=1e-6, verbose=False, **options)
    timer = StepTimer(W.device)

    def one(t: int) -> float:
        W.grad = grads[t % len(grads)]
        timer.start()
        optimizer.step()
        timer.stop()
        return timer.milliseconds()

    def several(first: int) -> float:
        began, times = time.monotonic(), [one(first)]
        while time.monotonic() - began < SECONDS_PER_TIMING and len(times) < 50:
            times.append(one(first + len(times)))
        return statistics.median(times)

    interval = optimizer.param_groups[0].get("update_interval", 1)
    for t in range(3):  # caches, thread pools, lazily made states
        one(t)
    if interval == 1:
        step = refresh = several(3)
    else:  # every step is a refresh if the interval is 1
        optimizer.param_groups[0]["update_interval"] = 1
        refresh = several(3)
        optimizer.param_groups[0]["update_interval"] = 10**9
        step = several(3)
    elements = sum(
        x.numel() for key, x in optimizer.state[W].items() if isinstance(x, Tensor) and key != "step"
    )  # fmt: skip
    return {
        "optimizer": name,
        "state": elements,
        "step_ms": step,
        "refresh_ms": refresh if interval > 1 else None,
        "interval": interval,
        "ms": step + (refresh - step) / interval,
    }


# The whole measurement ------------------------------------------------------------------------------------------------


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Train and measure; returns the record.

    Raises:
        UserError: settings that cannot work.
    """
    cfg = compose(["experiment=quickstart", "trainer.precision=fp32", *asked.overrides])
    cfg.trainer.steps = asked.steps
    validate(cfg)
    window, rank = 2 * asked.samples, cfg.model.hidden_size // 4
    leading = rank * 5 // 16  # 20 of 64, as in the quickstart's recipe
    if asked.steps < window:
        raise UserError(
            f"{asked.steps} steps have no {window} batch gradients: give at least --steps {window}, or fewer --samples."
        )
    depth = cfg.model.num_hidden_layers
    blocks = sorted(set(asked.blocks or (0, depth - 1)))
    if not set(blocks) <= set(range(depth)):
        raise UserError(f"--blocks must be numbers from 0 to {depth - 1}, the blocks of {cfg.model.name}.")
    moments = sorted({round(x) for x in torch.linspace(window, asked.steps, asked.moments).tolist()})

    training = Training(cfg, blocks, window)
    began, errors = time.monotonic(), []
    for step in training.run(moments):
        say(began, f"step {step}, loss {training.loss:.3f}")
        batches = training.batch_gradients()
        for kind, gradients in (("sequences", training.sequence_gradients(window)), ("batches", batches)):
            for (block, layer), G in gradients.items():
                where = {"step": step, "kind": kind, "block": block, "layer": layer, "shape": list(G.shape[1:])}
                errors += [{**where, **line} for line in measure_errors(G, rank, leading)]
            say(began, f"step {step}, {len(gradients)} matrices fitted to {asked.samples} {kind}")
    timings = []
    for layer in TYPES:
        key = (blocks[-1], layer)
        grads = list(training.past[key])
        for r in ROWS:
            if r.optimizer:
                options = {name: {"rank": rank, "leading": leading}[name] for name in r.options}
                shape = training.matrices[key].shape
                timings.append({"layer": layer, **time_optimizer(r.optimizer, shape, grads, options)})
        say(began, f"optimizers timed on {layer}")
    settings = {
        "steps": asked.steps,
        "moments": moments,
        "samples": asked.samples,
        "blocks": blocks,
        "seed": cfg.seed,
        "model": cfg.model.name,
        "data": training.source.description,
        "optimizer": cfg.optimizer.name,
        "batch_size": cfg.trainer.batch_size,
        "length": cfg.data.length,
        "rank": rank,
        "leading": leading,
        "overrides": list(asked.overrides),
        "seconds": round(time.monotonic() - began),
    }
    return {
        "format": RECORD_FORMAT,
        "settings": settings,
        "environment": environment(training.device, 1),
        "errors": errors,
        "timings": timings,
    }


def say(began: float, what: str) -> None:
    print(f"[{time.monotonic() - began:5.0f} s] {what}", flush=True)


# Records --------------------------------------------------------------------------------------------------------------


def write_record(record: dict[str, Any], path: Path) -> None:
    """One line for each measurement, so that differences can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in record.items():
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(rounded(line)) for line in value)
            parts.append(f"{json.dumps(key)}: [\n  {lines}\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


def rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{x:.7g}") if isinstance(x, float) else x for key, x in line.items()}


def read_record(path: Path) -> dict[str, Any]:
    """The record of an earlier measurement.

    Raises:
        UserError: there is none, or of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: measure first, without --from-records.") from None
    if record.get("format") != RECORD_FORMAT:
        raise UserError(f"{path} was written by another version of this script: measure again.")
    return record


# The report -----------------------------------------------------------------------------------------------------------


def digits(x: float) -> str:
    """Errors near to 1 differ in the fourth digit, far ones in the first."""
    return f"{x:.4f}" if x < 10 else f"{x:.0f}"


def spread(errors: Sequence[float]) -> str:
    """Median and range, '0.9123 (0.8500 to 0.9900)'; '-' without values."""
    if not errors:
        return "-"
    return f"{middle(errors)} ({digits(min(errors))} to {digits(max(errors))})"


def middle(errors: Sequence[float]) -> str:
    return digits(statistics.median(errors)) if errors else "-"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def captured(record: dict[str, Any], measure: str = "captured", **where: Any) -> dict[str, list[float]]:
    """A measure by structure, of the lines that agree with ``where``; cases come in the same order for all."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in record["errors"]:
        if all(line[key] == value for key, value in where.items()):
            found[line["structure"]].append(line[measure])
    return found


def errors(record: dict[str, Any], measure: str = "captured", **where: Any) -> dict[str, list[float]]:
    """One minus :func:`captured`."""
    return {name: [1 - x for x in values] for name, values in captured(record, measure, **where).items()}


def prices(record: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """For each optimizer, over the seven matrices of one block: state elements, their ratio to mn, ms of a step."""
    sizes = {line["layer"]: line["shape"][0] * line["shape"][1] for line in record["errors"]}
    found: dict[str, tuple[float, float, float]] = {}
    for name in {line["optimizer"] for line in record["timings"]}:
        lines = [line for line in record["timings"] if line["optimizer"] == name]
        state = sum(line["state"] for line in lines)
        found[name] = state, state / sum(sizes[line["layer"]] for line in lines), sum(line["ms"] for line in lines)
    return found


def label(r: Row) -> str:
    return r.formula + (f" ({r.name.partition(', ')[2]} basis)" if ", " in r.name else "")


def main_table(record: dict[str, Any]) -> str:
    """Structure, optimizer, error on the samples of both kinds, state and time."""
    cost = prices(record)
    columns = [errors(record, kind=kind) for kind in KINDS]
    lines = []
    for r in ROWS:
        state, ratio, ms = cost.get(r.optimizer or "", (None, None, None))
        lines.append(
            [
                label(r),
                optimizer_name(r.optimizer) if r.optimizer else "-",
                *(spread(column.get(r.name, [])) for column in columns),
                "-" if state is None else f"{state:,.0f}",
                "-" if ratio is None else f"{ratio:.3f}",
                "-" if ms is None else f"{ms:.2f}",
            ]
        )
    head = ["structure", "optimizer", *(f"error, {kind}" for kind in KINDS)]
    return table([*head, "state elements", "state / mn", "ms per step"], lines)


def scale_table(record: dict[str, Any]) -> str:
    """Errors of the best multiple of F~, and what is captured relative to general blocks (medians)."""
    columns = [errors(record, measure, kind=kind) for kind in KINDS for measure in ("rescaled", "held_out")]
    lines = []
    for r in ROWS:
        ratios = []
        for kind in KINDS:
            values = captured(record, kind=kind)
            pairs = zip(values.get(r.name, []), values.get("BlockDiagonal", []), strict=True)
            shares = [x / blocks for x, blocks in pairs if blocks > 0]
            ratios.append(f"{statistics.median(shares):.3f}" if shares else "-")
        lines.append([r.name, *(middle(column.get(r.name, [])) for column in columns), *ratios])
    head = [f"{kind}, {which}" for kind in KINDS for which in ("same samples", "held out")]
    return table(["structure", *head, *(f"captured / blocks, {kind}" for kind in KINDS)], lines)


def layer_table(record: dict[str, Any], kind: str) -> str:
    columns = [errors(record, kind=kind, layer=layer) for layer in TYPES]
    return table(["structure", *TYPES], ([r.name, *(middle(c.get(r.name, [])) for c in columns)] for r in ROWS))


def time_table(record: dict[str, Any]) -> str:
    cells = {(line["optimizer"], line["layer"]): line for line in record["timings"]}
    lines = []
    for r in ROWS:
        some = [cells.get((r.optimizer, layer)) for layer in TYPES]
        if any(some):
            interval = next(line["interval"] for line in some if line)
            lines.append(
                [
                    optimizer_name(r.optimizer or ""),
                    *(f"{line['ms']:.2f}" if line else "-" for line in some),
                    f"{sum(line['refresh_ms'] for line in some if line):.1f}" if interval > 1 else "-",
                    str(interval) if interval > 1 else "-",
                ]
            )
    return table(["optimizer", *TYPES, "refresh, all seven", "refreshed every"], lines)


def worse(record: dict[str, Any], special: str, general: str, kind: str, measure: str) -> tuple[int, int]:
    """In how many cases, of how many, the general structure's fit captures less than the special one's."""
    values = captured(record, measure, kind=kind)
    pairs = list(zip(values[special], values[general], strict=True))
    return sum(b < a - TIE * abs(a) for a, b in pairs), len(pairs)


def order_table(record: dict[str, Any]) -> str:
    columns = [(kind, measure) for kind in KINDS for measure in ("captured", "held_out")]
    lines = []
    for special, general in ORDER:
        cells = [worse(record, special, general, *column) for column in columns]
        if all(total for _, total in cells):
            lines.append([special, general, *(f"{count} of {total}" for count, total in cells)])
    head = [kind + (", held out" if measure == "held_out" else "") for kind, measure in columns]
    return table(["special", "general", *head], lines)


def headline(record: dict[str, Any]) -> str:
    parts = []
    for kind in KINDS:
        count, total = worse(record, "Diagonal", "EigenAdam", kind, "captured")
        parts.append(f"{count} of {total} cases ({count / max(total, 1):.0%}) with {kind}")
    return (
        "Eigen-Adam's structure contains Adam's, but its one refinement (Theorem 3.2) does not find the best member: it "
        f"approximates worse than Adam's diagonal in {' and in '.join(parts)}."
    )


def report(record: dict[str, Any]) -> str:
    """README.md, of the record alone."""
    s = record["settings"]
    n = s["samples"]
    return "\n\n".join(
        [
            "# Structured approximations of the Fisher matrix, measured",
            "Table 1 of arXiv 2502.07752 with measured columns. Error: |F - F~|² / |F|² in the Frobenius norm, 0 is exact; "
            "median, and smallest to largest, over matrices and moments. State and time: of the optimizer, summed over the "
            "seven matrices of one block; mn is their number of weights.",
            main_table(record),
            headline(record),
            "![Error, state and time of each structure](fisher.png)",
            "## What was measured",
            f"F is the empirical Fisher matrix E[vec(G) vec(G)ᵀ] of one weight matrix over N = {n} gradients, so its rank is "
            f"at most {n}. *sequences*: gradients of single sequences of {s['length']} tokens at fixed weights. *batches*: "
            f"gradients of {n} successive training steps of {s['batch_size']} sequences, while the weights move.",
            f"GaLore and Alice have rank {s['rank']}, in the rows of square matrices. The switched basis has "
            f"{s['leading']} leading eigenvectors and the rest from the complement (Algorithm 2), the leading basis "
            "eigenvectors only. The nearest R ⊗ L is no optimizer: it shows what Shampoo's structure could reach. I ⊗ M is "
            "also the structure of Muon and SWAN.",
            "## Up to scale, and on other gradients",
            "A learning rate makes up for the size of F~. Here the error is that of the best multiple of F~ (one minus the "
            f"squared cosine of F and F~), medians. *held out*: F~ is fitted to the same {n} gradients, and F is that of "
            f"{n} others (*batches*: of the steps that follow), as an optimizer uses it. *captured / blocks*: one minus the "
            "error of the main table, relative to that of the best block-diagonal F~, which is all that structures without "
            "correlations between columns can capture.",
            scale_table(record),
            "## Does a more general structure approximate better?",
            "In how many cases the fit of the general structure is worse than that of the special one which it contains "
            "(Appendix E.1), held out: up to scale. For exact minimisers it never is; those of EigenAdam, SOAP and Shampoo "
            "are not exact, and held out even exact ones need not keep the order.",
            order_table(record),
            *(part for kind in KINDS for part in (f"## Error by layer, {kind} (medians)", layer_table(record, kind))),
            "## Milliseconds of an optimizer step",
            "One matrix, float32, median of several steps; refreshes of bases are included with their share. Each optimizer "
            "refreshes as often as its defaults say.",
            time_table(record),
            "## How it was made",
            "\n".join(f"- {key}: {value}" for key, value in circumstances(record).items()),
        ]
    )


def circumstances(record: dict[str, Any]) -> dict[str, Any]:
    s, env = record["settings"], record["environment"]
    return {
        "Command": f"`python scripts/{env['command']}`",
        "Model": f"{s['model']}, trained by {optimizer_name(s['optimizer'])} for {s['steps']} steps, float32",
        "Data": f"{s['data']['name']}, {s['data']['split']}",
        "Moments": ", ".join(map(str, s["moments"])) + " (steps)",
        "Matrices": f"{', '.join(TYPES)} of blocks {', '.join(map(str, s['blocks']))}",
        "Seed": s["seed"],
        "Hardware": ", ".join(f"{key} {value}" for key, value in env["hardware"].items()),
        "torch": env["versions"]["torch"],
        "Commit": env["commit"],
        "Duration": f"{s['seconds']} s",
    }


def short(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Three panels that share the structures: errors, state and time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[2.4, 1, 1])
    places = {r.name: len(ROWS) - i for i, r in enumerate(ROWS)}
    looks = {"sequences": ("#0072B2", 0.17), "batches": ("#D55E00", -0.17)}
    floor = 1e-6  # of the logarithmic axis; what captures nothing is drawn there
    for kind, (colour, aside) in looks.items():
        for name, values in captured(record, kind=kind).items():
            ends = [max(floor, x) for x in (min(values), max(values))]
            axes[0].plot(ends, [places[name] + aside] * 2, color=colour, alpha=0.35, linewidth=3)
        for measure, face in (("captured", colour), ("held_out", "white")):
            medians = {name: statistics.median(x) for name, x in captured(record, measure, kind=kind).items()}
            axes[0].plot(
                [max(floor, x) for x in medians.values()],
                [places[name] + aside for name in medians],
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=5,
                label=kind if measure == "captured" else f"{kind}, held out, best scale",
            )
    axes[0].set_xscale("log")
    axes[0].set_xlim(right=1.3)
    axes[0].set_title("captured part of |F|²: 1 - error (line: range)", fontsize=9, loc="left")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, fontsize=7.5, frameon=False)
    axes[0].set_yticks(list(places.values()), list(places), fontsize=8)
    cost = prices(record)
    for r in ROWS:
        if r.optimizer in cost:
            _, ratio, ms = cost[r.optimizer]
            for panel, value in ((axes[1], ratio), (axes[2], ms)):
                panel.barh(places[r.name], value, height=0.55, color="#56B4E9")
                panel.annotate(
                    f" {short(value)} {optimizer_name(r.optimizer)}", (value, places[r.name]), va="center", fontsize=7
                )
    axes[1].set_title("state / mn", fontsize=9, loc="left")
    axes[2].set_title("ms per step, one block", fontsize=9, loc="left")
    axes[1].set_xlim(0, 1.9 * max((ratio for _, ratio, _ in cost.values()), default=1.0) + 0.01)
    axes[2].set_xscale("log")
    if cost:
        times = [ms for *_, ms in cost.values()]
        axes[2].set_xlim(min(times) / 2, max(times) * 30)
    for panel in axes:
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", color="#E6E6E6", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200, metadata={"Software": None})


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of record, table and figure")
    parser.add_argument("--from-records", action="store_true", help="draw again from records.json, measure nothing")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--moments", type=int, default=3, help="at how many of them gradients are looked at")
    parser.add_argument("--samples", type=int, default=32, help="N, gradients that a structure is fitted to")
    parser.add_argument("--blocks", type=numbers, help="of transformer blocks, as in 0,3; default first and last")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the configuration of train.py")
    asked = parser.parse_intermixed_args(argv)
    if min(asked.steps, asked.moments, asked.samples) < 1:
        parser.error("--steps, --moments and --samples must be at least 1.")
    try:
        if not asked.from_records:
            write_record(measure(asked), asked.out / "records.json")
        record = read_record(asked.out / "records.json")
        (asked.out / "README.md").write_text(report(record) + "\n", encoding="utf-8")
        draw(record, asked.out / "fisher.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{headline(record)}\nwrote {asked.out / 'README.md'} and {asked.out / 'fisher.png'}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
