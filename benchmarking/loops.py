"""Three training loops of one job, each in a process of its own: our trainer, `transformers.Trainer`, a GaLore-style loop.

    python -m benchmarking.loops        a child of benchmarking.training; talks JSON lines over its standard streams

They take turns. A loop trains on until its turn is over, then waits with all that it holds, as if the next step were slow
to begin; so each goes on with its own model, and none is told that it is being timed but by a call at the start of a
step. Rows, first weights, schedule and precision are the same: those of one configuration of train.py.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import TrainingBatches, UserError, load_tokenizer, open_source
from pretraining.config import compose, validate
from pretraining.model import build_model, choose_attention, weight_dtype
from pretraining.plan import Plan, make_plan, micro_batch_rows
from pretraining.record import read_lines
from pretraining.schedule import rate_factor
from pretraining.throughput import keep_freed_memory, peak_memory

FIRST = 10  # steps whose losses are kept for comparison

Rows = dict[str, Tensor]


class Ended(Exception):
    """The last turn is over: the loop is left in the middle."""


@dataclass
class Turns:
    """When a loop may go on, and how long its steps took.

    ``begin`` is called at the start of every step. Where no steps are left it answers for the turn that is over and waits
    for the next; a turn has ``settle`` steps that do not count (caches that others have emptied), then ``steps`` that do.

    Attributes:
        receive: the next turn, {"settle": ., "steps": .}; None: there is none.
        answer: takes {"seconds": ., "steps": .} of a turn.
        share: other processes use this device: give back what is cached at the end of a turn.
    """

    device: torch.device
    receive: Callable[[], dict[str, int] | None]
    answer: Callable[[dict[str, Any]], None]
    share: bool = False
    _left: int = 0
    _timed: int = 0
    _began: float = 0.0

    def begin(self) -> None:
        """Raises Ended where there is no further turn."""
        if self._left == 0:
            self._change()
        if self._left == self._timed:
            self._began = self._now()
        self._left -= 1

    def _change(self) -> None:
        if self._timed:
            self.answer({"seconds": self._now() - self._began, "steps": self._timed})
            if self.share and self.device.type == "cuda":
                torch.cuda.empty_cache()
        turn = self.receive()
        if turn is None:
            raise Ended
        self._timed = turn["steps"]
        self._left = turn["settle"] + turn["steps"]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Job:
    """What all loops train: a configuration of train.py, and where it runs.

    Attributes:
        rows: of a forward pass.
        losses: of the first steps.
        tokens: of a step, as the loop has seen them.
        optimizer_ms: of an ordinary update, where the loop knows it: the median, without the first step's.
    """

    cfg: DictConfig
    plan: Plan
    turns: Turns
    rows: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    optimizer_ms: float | None = None


def facts(job: Job, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What has to be equal for a comparison to be fair, read from the objects and not from the settings."""
    updated = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    return {
        "parameters_updated": sum(p.numel() for p in updated),
        "dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in updated})),
        "autocast": "bfloat16" if job.plan.precision == "bf16_mixed" else None,
        "attention": model.config._attn_implementation,
        "rows_per_pass": job.rows,
    }


# Ours ---------------------------------------------------------------------------------------------------------------


class Paced:
    """The trainer's batches, whose every step begins in its turn."""

    def __init__(self, batches: Any, job: Job) -> None:
        self._batches, self._job = batches, job

    def __next__(self) -> Rows:
        self._job.turns.begin()
        rows = next(self._batches)
        self._job.tokens = rows["input_ids"].numel()
        return rows

    def __enter__(self) -> Paced:
        self._batches.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._batches.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def ours(job: Job, ready: Callable[[dict[str, Any]], None]) -> None:
    """`Trainer.run` as train.py calls it, with its loader, record and checks."""
    from pretraining.trainer import Trainer

    trainer = Trainer(job.cfg, job.plan)
    trainer.batches = Paced(trainer.batches, job)  # type: ignore[assignment]
    ready(facts(job, trainer.model, trainer.optimizer))
    try:
        trainer.run()
    finally:
        lines = [line for line in read_lines(Path(job.cfg.run_dir) / "metrics.jsonl") if line["kind"] == "train"]
        if lines:
            job.losses = [line["loss"] for line in lines[:FIRST]]
            job.optimizer_ms = statistics.median(line["optimizer_ms"] for line in lines[1:] or lines)


# The others ---------------------------------------------------------------------------------------------------------


class TokenRows(Dataset[Rows]):
    """Rows that were tokenised before anything is timed, in the order of our loader."""

    def __init__(self, cfg: DictConfig, steps: int) -> None:
        tokenizer = load_tokenizer(cfg.tokenizer)
        loader = TrainingBatches(
            open_source(cfg.data, split="train"),
            tokenizer,
            length=cfg.data.length,
            rows=cfg.data.rows,
            attention=cfg.data.attention,
            batch_size=cfg.trainer.batch_size,
            seed=cfg.data.seed,
            shuffle_buffer=cfg.data.shuffle_buffer,
        )
        with loader:
            made = [next(loader) for _ in range(steps)]
        self.ids, self.labels = (torch.cat([rows[key] for rows in made]) for key in ("input_ids", "labels"))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Rows:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def new_model(job: Job) -> Any:
    """The model that our trainer starts with."""
    torch.manual_seed(job.cfg.seed)
    cfg, device = job.cfg, job.plan.device
    attention = choose_attention(cfg.model.attn_implementation, device, cfg.data.length)  # as our trainer does
    model = {**cfg.model, "attn_implementation": attention}
    return build_model(model, device=device, dtype=weight_dtype(job.plan.precision))


def passes(job: Job) -> int:
    """Forward passes of a step.

    Raises:
        UserError: they would not be equally large, and the loops of others take the mean of their means.
    """
    count, rest = divmod(job.cfg.trainer.batch_size, job.rows)
    if rest:
        raise UserError(
            f"{job.cfg.trainer.batch_size} rows do not divide into passes of {job.rows}: choose other --rows or --micro."
        )
    return count


def plain_transformers(job: Job, ready: Callable[[dict[str, Any]], None]) -> None:
    """`transformers.Trainer` with what it takes to do the same: fused AdamW, the same rates, no clipping, nothing saved.

    Logging, evaluation, progress bar and reports are off; the rest is as it comes.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    cfg, turns, count = job.cfg, job.turns, passes(job)
    t, o = cfg.trainer, cfg.optimizer
    losses: list[Tensor] = []

    class Pace(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 0:
                ready(facts(job, more["model"], more["optimizer"]))
            turns.begin()

    class Plain(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Tensor:
            if not losses:
                job.tokens = inputs["input_ids"].numel() * count
            loss = super().training_step(model, inputs, *args, **more)
            if len(losses) < FIRST * count:
                losses.append(loss)  # stays on the device
            return loss

    args = TrainingArguments(
        output_dir=str(cfg.run_dir),
        max_steps=t.steps,
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=count,
        optim="adamw_torch_fused",
        learning_rate=o.lr,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_epsilon=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=t.grad_clip or 0.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": t.min_lr_ratio},
        warmup_steps=round(t.steps * t.warmup_fraction),
        bf16=job.plan.precision == "bf16_mixed",
        use_cpu=job.plan.device.type == "cpu",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cfg.seed,
    )
    trainer = Plain(model=new_model(job), args=args, train_dataset=TokenRows(cfg, t.steps), callbacks=[Pace()])
    try:
        trainer.train()
    finally:
        job.losses = [sum(x.item() for x in losses[i : i + count]) for i in range(0, len(losses), count)]


def galore_style(job: Job, ready: Callable[[dict[str, Any]], None]) -> None:
    """What the GaLore code base's loop does in a step, with torch's fused AdamW.

    A data loader, the model's own loss of each pass divided by their number, backward, optimizer, scheduler, and the loss
    read on the host.
    """
    cfg, count = job.cfg, passes(job)
    device, precision, o = job.plan.device, job.plan.precision, cfg.optimizer
    model = new_model(job)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    t = cfg.trainer
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: rate_factor(k, t.steps, t.warmup_fraction, t.min_lr_ratio)
    )
    loader: Iterator[Rows] = iter(DataLoader(TokenRows(cfg, t.steps), batch_size=job.rows))
    ready(facts(job, model, optimizer))
    model.train()
    while True:
        job.turns.begin()
        loss = 0.0
        job.tokens = 0
        for _ in range(count):
            batch = {name: x.to(device) for name, x in next(loader).items()}
            job.tokens += batch["input_ids"].numel()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16_mixed"):
                part = model(**batch).loss / count
            part.backward()
            loss += part.item()
        if t.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if len(job.losses) < FIRST:
            job.losses.append(loss)


LOOPS = {"ours": ours, "transformers": plain_transformers, "galore_style": galore_style}


# The process --------------------------------------------------------------------------------------------------------


def serve(spec: dict[str, Any], receive: Callable[[], Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Train what ``spec`` says, in the turns that ``receive`` gives; everything else is sent.

    Sends {"ready": facts}, an answer for each turn, {"end": losses, tokens, peak memory}; or {"error": sentence}.
    """
    try:
        cfg = compose(spec["overrides"])
        validate(cfg)
        plan = make_plan(cfg)
        turns = Turns(plan.device, receive, send, share=spec["share"])
        job = Job(cfg, plan, turns, micro_batch_rows(cfg, cfg.trainer.batch_size, plan.device))
        # As train.py does, and for every loop: it is worth a sixth of a small model's step
        shared = {
            "threads": torch.get_num_threads(),
            "keeps_freed_memory": plan.device.type == "cpu" and keep_freed_memory(),
        }
        with suppress(Ended):
            LOOPS[spec["loop"]](job, lambda found: send({"ready": {**found, **shared}}))
        memory, kind = peak_memory(plan.device)
        end = {"losses": job.losses, "tokens_per_step": job.tokens, "optimizer_ms": job.optimizer_ms}
        send({"end": {**end, "peak_memory_bytes": memory, "peak_memory_kind": kind}})
    except torch.OutOfMemoryError:
        send({"error": "out of memory on the device"})
    except Exception as error:
        if not isinstance(error, UserError):
            import traceback

            traceback.print_exc()
        send({"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})


def main() -> int:
    # What libraries print goes where errors go: the standard output is ours.
    answers: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    def receive() -> Any:
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else None  # the end of the stream: nobody asks any more

    serve(receive(), receive, send)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
