"""How well does each optimizer's structure approximate the Fisher matrix of a real model, and at what price?

The measuring of scripts/fisher_report.py; reporting/structures.py shows what comes out.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisher
from data import TrainingBatches, load_tokenizer, open_source
from data.errors import UserError
from optimizers import create
from optimizers.low_rank import switch
from pretraining.config import compose, validate
from pretraining.evaluation import row_losses, target_count
from pretraining.model import build_model
from pretraining.plan import choose_device, make_optimizer
from pretraining.record import environment
from pretraining.schedule import rate_factor, set_rates
from pretraining.throughput import StepTimer
from reporting.structures import KINDS, RECORD_FORMAT, TYPES, Row

TOLERANCE = 1e-4  # of fixed points; the error is stationary there, so it is right to about the square
SECONDS_PER_TIMING = 0.4


@dataclass(frozen=True)
class Candidate(Row):
    """A row of the report with what fills it: ``fit`` takes samples [N, m, n], rank r and leading l.

    ``options`` are those of "rank" and "leading" that the optimizer takes.
    """

    fit: Callable[[Tensor, int, int], fisher.Structure]
    options: tuple[str, ...] = ()


def whole(structure: type[fisher.Structure], optimizer: str | None = None, **how: Any) -> Candidate:
    """A structure of full rank."""
    return Candidate(structure.__name__, structure.formula, optimizer, lambda G, r, l: structure.fit(G, **how))


def switched(G: Tensor, r: int, l: int) -> fisher.Structure:
    """Alice's structure for the basis of Algorithm 2: l leading eigenvectors, r - l of the complement."""
    basis = fisher.GaLore.fit(G, r).U_L
    assert basis is not None
    U = switch(basis[None], l, "complement", [torch.Generator().manual_seed(0)])[0]
    return fisher.Alice.fit(G, r, U)


# From special to general, as Appendix E.1 has it.
ROWS = (
    whole(fisher.Scalar, "sgd"),
    whole(fisher.Normalization, "normalization"),
    whole(fisher.TwoSidedScaling, "racs"),
    whole(fisher.Whitening, "whitening"),
    whole(fisher.ScaledWhitening, tolerance=TOLERANCE),
    whole(fisher.Shampoo, "shampoo"),
    whole(fisher.NearestKronecker, tolerance=TOLERANCE),
    whole(fisher.Diagonal, "adam"),
    Candidate("GaLore", fisher.GaLore.formula, "galore", lambda G, r, l: fisher.GaLore.fit(G, r), ("rank",)),
    Candidate("Alice, switched", fisher.Alice.formula, "alice", switched, ("rank", "leading")),
    Candidate("Alice, leading", fisher.Alice.formula, None, lambda G, r, l: fisher.Alice.fit(G, r)),
    whole(fisher.EigenAdam, "eigen_adam"),
    whole(fisher.SOAP, "soap"),
    whole(fisher.BlockDiagonal),
)


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
                    assert p.grad is not None
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
                        assert p.grad is not None
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


def measure(
    overrides: Sequence[str], steps: int, moments: int, samples: int, blocks: Sequence[int] | None = None
) -> dict[str, Any]:
    """Train and measure; returns the record.

    Args:
        overrides: of train.py's configuration.
        steps: of training.
        moments: at how many of them gradients are looked at.
        samples: N, gradients that a structure is fitted to.
        blocks: whose matrices are looked at; None: the first and the last.

    Raises:
        UserError: settings that cannot work.
    """
    cfg = compose(["experiment=quickstart", "trainer.precision=fp32", *overrides])
    cfg.trainer.steps = steps
    validate(cfg)
    window, rank = 2 * samples, cfg.model.hidden_size // 4
    leading = rank * 5 // 16  # 20 of 64, as in the quickstart's recipe
    if steps < window:
        raise UserError(
            f"{steps} steps have no {window} batch gradients: give at least --steps {window}, or fewer --samples."
        )
    depth = cfg.model.num_hidden_layers
    blocks = sorted(set(blocks or (0, depth - 1)))
    if not set(blocks) <= set(range(depth)):
        raise UserError(f"--blocks must be numbers from 0 to {depth - 1}, the blocks of {cfg.model.name}.")
    looks = sorted({round(x) for x in torch.linspace(window, steps, moments).tolist()})

    training = Training(cfg, blocks, window)
    began, errors = time.monotonic(), []
    for step in training.run(looks):
        say(began, f"step {step}, loss {training.loss:.3f}")
        batches = training.batch_gradients()
        for kind, gradients in zip(KINDS, (training.sequence_gradients(window), batches), strict=True):
            for (block, layer), G in gradients.items():
                where = {"step": step, "kind": kind, "block": block, "layer": layer, "shape": list(G.shape[1:])}
                errors += [{**where, **line} for line in measure_errors(G, rank, leading)]
            say(began, f"step {step}, {len(gradients)} matrices fitted to {samples} {kind}")
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
        "steps": steps,
        "moments": looks,
        "samples": samples,
        "blocks": blocks,
        "seed": cfg.seed,
        "model": cfg.model.name,
        "data": training.source.description,
        "optimizer": cfg.optimizer.name,
        "batch_size": cfg.trainer.batch_size,
        "length": cfg.data.length,
        "rank": rank,
        "leading": leading,
        "overrides": list(overrides),
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
