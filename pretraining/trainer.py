"""The training loop."""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
import zlib
from collections import deque
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data import (
    IGNORE,
    TrainingBatches,
    load_tokenizer,
    ngram_perplexities,
    open_source,
    training_sequences,
    validation_rows,
)
from data.errors import UserError
from optimizers import MatrixOptimizer
from optimizers.base import is_update_time
from optimizers.sharding import local

from . import checkpoint
from .arithmetic import autocast, products
from .curvature import hutchinson, label_gradient
from .evaluation import Evaluation, evaluate
from .launch import LostContact, check_launch, check_same_configuration, check_same_data, lost_contact
from .layerwise import LayerWise, UpdateTimes
from .lock import RunLock
from .loss import PretrainingLoss, real_targets, target_count
from .model import build_model, choose_attention, compile_layers, weight_dtype
from .parallel import PATIENCE, Parallel
from .plan import Plan, data_workers, make_optimizer, make_plan, micro_batch_rows
from .record import RunRecord, at_commit, at_its_commit, environment, read_config, read_json, read_lines, set_aside
from .schedule import rate_factor, set_rates
from .signals import Stopped, StopSignals
from .storage import check_folder
from .throughput import (
    Meters,
    StepTimer,
    flops_per_token,
    frozen_garbage,
    keep_freed_memory,
    peak_flops,
    peak_memory,
)
from .trackers import make_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from data.published import PublishedBatches


LOWER = "lower optimizer.lr or optimizer.adam_lr, lengthen trainer.warmup_fraction, or set trainer.grad_clip"


class NonFiniteLoss(UserError):
    """Training has diverged, at ``step``."""

    exit_code = 3

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def train(cfg: DictConfig) -> Path | None:
    """Do the run that ``cfg`` describes, from its last checkpoint if it has one.

    Returns:
        The run folder; None after a dry run.

    Raises:
        UserError: whatever the user can put right; NonFiniteLoss with exit code 3; LostContact, 74, where other ranks have
            ended.
        Stopped: a signal has ended it, with exit code 75.
    """
    main = os.environ.get("RANK", "0") == "0"
    plan = make_plan(cfg)
    if main:
        print(plan.text, flush=True)
    if cfg.trainer.dry_run:
        return None
    run_dir = Path(cfg.run_dir)
    finished = run_dir / "summary.json"
    if cfg.trainer.resume == "auto" and finished.exists():
        cfg.trainer.precision = plan.precision
        record = RunRecord(run_dir, cfg, write=False)  # another configuration is refused first
        if cfg.tokenizer != read_config(run_dir / "config.yaml").get("tokenizer"):
            record.refuse_another_tokenizer(cfg.tokenizer, load_tokenizer(cfg.tokenizer).fingerprint)
        read_json(finished)  # and a damaged file
        if main:
            RunLock(run_dir).remove_if_stale()  # of a process that was killed at its very end
            print(f"this run is finished, see {finished}; trainer.resume=never trains it anew")
        return run_dir
    check_launch(os.environ, plan.device)
    if plan.device.type == "cpu":
        keep_freed_memory()
    with StopSignals() as signals, RunLock(run_dir) if main else nullcontext() as lock:
        if cfg.trainer.resume == "never" and main:
            kept = set_aside(run_dir)
            if kept:
                print(f"the run that was there is now {kept}")
        try:
            Trainer(cfg, plan, signals, lock).run()
        except (RuntimeError, UserError) as error:  # a UserError may be what another error was made into
            if message := lost_contact(error):
                raise LostContact(message) from error
            raise
    return run_dir


@dataclass
class StepFigures:
    """What a step has computed, on its way to the host.

    Attributes:
        step: its number, from 1.
        values: loss, norm of the gradient, how many ranks were asked to stop: float64, [3].
        rates: of the parameter groups.
        data_seconds: spent waiting for its rows.
        timer: of the optimizer, or of its updates one by one; None for a step without an update.
        arrived: when ``values`` is on the host; None: it is.
        bases: names of matrices, and the cosines between their old and new bases (optimizer.log_basis).
    """

    step: int
    values: Tensor
    rates: list[float]
    data_seconds: float
    timer: StepTimer | UpdateTimes | None = None
    arrived: torch.cuda.Event | None = None
    bases: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)

    def read(self) -> tuple[float, float, bool]:
        """Loss, gradient norm, whether to stop; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, stopping = self.values.tolist()
        return loss, norm, stopping > 0


class Trainer:
    """One run: the parts are made in the constructor, ``run`` trains to the end.

    The order of rows is a function of source, seed and protocol; a step's gradient is the mean over all its target
    tokens, whatever the number of processes or micro-batches.
    """

    def __init__(
        self, cfg: DictConfig, plan: Plan, signals: StopSignals | None = None, lock: RunLock | None = None
    ) -> None:
        cfg = cfg.copy()
        cfg.trainer.precision = plan.precision  # what "auto" meant here is part of the record
        cfg.model.attn_implementation = choose_attention(cfg.model.attn_implementation, plan.device, cfg.data.length)
        self.cfg, self.plan, self.device = cfg, plan, plan.device
        self.signals, self.lock = signals or StopSignals(), lock
        self.began = time.perf_counter()
        self.accelerator = make_accelerator(self.device)
        check_same_configuration(cfg, self.accelerator.num_processes)
        self.main = self.accelerator.is_main_process
        self.steps, self.length = cfg.trainer.steps, cfg.data.length
        run_dir = Path(cfg.run_dir)
        self.checkpoints = run_dir / "checkpoints"
        self.record = RunRecord(run_dir, cfg, write=self.main)
        self.tokenizer = load_tokenizer(cfg.tokenizer)
        if self.tokenizer.vocab_size != cfg.model.vocab_size:
            raise UserError(
                f"the tokenizer {cfg.tokenizer} has {self.tokenizer.vocab_size:,} pieces, but {cfg.model.name} has "
                f"{cfg.model.vocab_size:,}: set tokenizer, or model.vocab_size={self.tokenizer.vocab_size}"
            )
        self.record.refuse_another_tokenizer(cfg.tokenizer, self.tokenizer.fingerprint)
        if self.main:
            self._check_room()
        resume = Path(cfg.trainer.resume)
        began = run_dir if cfg.trainer.resume in ("auto", "never") else resume.parent.parent
        self.data = at_its_commit(cfg.data, began)
        self.source = open_source(self.data, split="train")
        if self.data.kind == "hub":  # looked up once
            self.data = at_commit(self.data, self.source.description["revision"])
        self.validation_source = open_source(self.data, split="validation")
        self.validation = validation_rows(
            self.validation_source,
            self.tokenizer,
            self.length,
            cfg.data.rows,
            cfg.data.validation_max_tokens,
            cfg.data.attention,
        )
        digest = hashlib.sha256()
        for tensor in self.validation:
            digest.update(tensor.contiguous().numpy().data)
        self.validation_rows = digest.hexdigest()
        facts = {
            "training text": self.source.identity,
            "validation rows": self.validation_rows,
            "tokenizer": self.tokenizer.fingerprint,
        }
        check_same_data(facts, self.accelerator.num_processes)
        self.ngrams: dict[str, Any] = {}
        if cfg.eval.ngrams and self.main:
            training = training_sequences(self.source, self.tokenizer, self.length, cfg.data.rows)
            ids, labels = self.validation[:2]
            self.ngrams = ngram_perplexities(training, ids, labels, vocab_size=cfg.model.vocab_size)

        torch.manual_seed(cfg.seed)
        random.seed(cfg.seed)  # these two for libraries' optimizers; nothing of ours draws from them
        np.random.seed(cfg.seed % 2**32)
        self.model = build_model(
            cfg.model,
            device=self.device,
            dtype=weight_dtype(plan.precision),
            pad_token_id=self.tokenizer.pad_id,
            eos_token_id=self.tokenizer.eos_id,
        )
        if cfg.trainer.compile:
            compile_layers(self.model)
        loss = PretrainingLoss(self.model, cfg.trainer.loss)
        self.parallel = Parallel(cfg, self.accelerator, self.device)
        self.parallel.shard_weights(loss)
        self.optimizer = make_optimizer(cfg, self.model)
        self.parallel.divide(self.optimizer)
        self.wrapped = self.parallel.wrap(loss)
        self.micro_batch = micro_batch_rows(cfg, cfg.trainer.batch_size, self.device)  # rows
        if self.parallel.sharded:  # all take part in every pass, and cards may be unequal
            self.micro_batch = -self.parallel.most(-self.micro_batch)
        if self.parallel.gradients_stay:
            self._settle_gradients()
        self.layerwise = LayerWise(self.model, self.optimizer, self.device) if cfg.trainer.layerwise else None
        # Accelerate's wrapper adds nothing to an optimizer without a gradient scaler, and its scheduler would step
        # once for every rank.

        self.batches = self._make_batches()
        self.looked = 0  # steps of a class that is not ours after which its groups were looked at
        self.done = self.skipped = 0
        self.saved = 0  # the step of the newest checkpoint
        self.evaluated = 0  # the step after which the validation loss was last computed
        self.meters = Meters()
        self._resume()
        self.record.start(self._environment(), self.done, self.evaluated == self.done)
        self.tracker = make_tracker(cfg.tracker, run_dir, self.record.config, self.done, write=self.main)
        # On a GPU the host must not wait for every step: figures are read one step later. A skipped step has to be known
        # before its update, so on_nonfinite=skip waits.
        self.lag = 1 if self.device.type == "cuda" and cfg.trainer.on_nonfinite == "stop" else 0
        self.pending: deque[StepFigures] = deque()
        self.stopping = False
        self.clock = 0.0  # when the last step's figures were complete
        self.bar: Any = None

    # Parts ----------------------------------------------------------------------------------------------------------

    def _check_room(self) -> None:
        """Refuse a folder that cannot take the run, while nothing has been computed yet."""
        t, one = self.cfg.trainer, self.plan.checkpoint_bytes
        # One more than stays: the new one is written before the oldest goes.
        count = 0 if not t.save_every else t.keep_last + 1 + (self.steps // t.keep_every if t.keep_every else 0)
        check_folder(
            self.record.path,
            count * one + (one if t.save_model else 0) + 2**20,
            f"{count} checkpoints of {one / 2**30:.2f} GiB" + (" and the final model" if t.save_model else ""),
        )

    def _make_batches(self) -> TrainingBatches | PublishedBatches:
        data, ranks = self.data, self.accelerator
        where = {"rank": ranks.process_index, "world_size": ranks.num_processes}
        if data.protocol == "published":
            from data.published import PublishedBatches

            return PublishedBatches(data, self.tokenizer, batch_size=self.cfg.trainer.batch_size, **where)
        return TrainingBatches(
            self.source,
            self.tokenizer,
            length=self.length,
            rows=data.rows,
            attention=data.attention,
            batch_size=self.cfg.trainer.batch_size,
            seed=data.seed,
            shuffle_buffer=data.shuffle_buffer,
            workers=data_workers(self.cfg, self.device),
            pin_memory=self.device.type == "cuda",
            **where,
        )

    def _resume(self) -> None:
        """Go to the checkpoint that ``trainer.resume`` means, if there is one."""
        wanted = self.cfg.trainer.resume
        if wanted == "never":
            return
        saved = checkpoint.list_checkpoints(self.checkpoints)
        path = Path(wanted) if wanted != "auto" else (saved[-1] if saved else None)
        step = checkpoint.step_of(path) if path else 0
        if self._sum(torch.tensor(step, device=self.device)).item() != step * self.accelerator.num_processes:
            raise UserError("the processes see different checkpoints: put run_dir on a filesystem that all nodes share")
        if path is None:
            return
        meta = checkpoint.load(path, self.model, self.optimizer, self.record.config)
        if path.parent == self.checkpoints and meta.get("validation", self.validation_rows) != self.validation_rows:
            raise UserError(
                f"the validation text is not the one that {self.record.path} began with: go on with that, or start anew with "
                f"trainer.resume={path} in another run_dir"
            )
        try:
            self.batches.load_state_dict(meta["data"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self.done, self.skipped, self.evaluated = step, meta["skipped"], meta["evaluated"]
        self.saved = step if path.parent == self.checkpoints else 0
        self.meters = Meters.restore(meta["meters"])
        if self.main:
            print(f"resumed from {path}, after step {step}")
            checkpoint.set_aside_later(self.checkpoints, step)
            checkpoint.tidy(self.checkpoints, self.cfg.trainer.keep_last, self.cfg.trainer.keep_every)

    def _environment(self) -> dict[str, Any]:
        return environment(
            self.device,
            self.accelerator.num_processes,
            parameters=self.plan.parameters,
            data={"train": self.source.description, "validation": self.validation_source.description},
            tokenizer={"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint},
        )

    def eager(self) -> AbstractContextManager:
        """For what is not training: other shapes and modes, or second derivatives, which compiled layers do not have."""
        return torch.compiler.set_stance("force_eager") if self.cfg.trainer.compile else nullcontext()

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.plan.precision)

    def products(self) -> AbstractContextManager:
        t = self.cfg.trainer  # compiled code does not let itself be watched
        return nullcontext() if t.compile or t.compile_optimizer else products(self.device, self.plan.precision)

    # The loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train, evaluate, save; every figure goes to the record.

        Raises:
            Stopped: a signal came; the state is saved.
            UserError: out of memory.
            NonFiniteLoss: training has diverged; diverged.json says so, unless another rank than the first has failed alone.
                The last checkpoint is from before.
        """
        self.bar = tqdm(
            total=self.steps, initial=self.done, unit="step", dynamic_ncols=True, disable=None if self.main else True
        )
        try:
            with frozen_garbage(), self.batches, closing(self.tracker), self.bar:
                self._loop()
        except Stopped:  # by all ranks together; any other error may be of one alone, and the launcher ends the rest
            self.accelerator.end_training()
            raise
        except NonFiniteLoss as error:
            self.record.diverge(error.step, str(error))
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {self.device} does not suffice for step {self.done + 1} with {self.micro_batch} rows at a time "
                f"({str(error).partition('. GPU')[0]}): lower trainer.micro_batch_size, which changes results by "
                "rounding only, or see python scripts/memory.py --gpu 40GB for what fits"
            ) from error
        self.accelerator.end_training()

    def _loop(self) -> None:
        result: Evaluation | None = None
        if self.done and self._evaluation_due() and self.evaluated != self.done:
            result = self._evaluate()  # the process before was stopped just before it
        self.clock = time.perf_counter()
        while self.done < self.steps:
            self._stop_if_asked()
            self._step()
            if self._evaluation_due() or self._save_due():
                self._settle(0)
                self._stop_if_asked()
                if self._evaluation_due():
                    result = self._evaluate()
                    self._stop_if_asked()
                if self._save_due():
                    self._save()
                self.clock = time.perf_counter()
        if result is None:  # resumed from the last step's checkpoint: its evaluation is in the record
            result = self._evaluate(again=True)
        self._stop_if_asked()
        assert result is not None
        self.bar.close()  # before other lines are printed
        self._finish(result)

    def _evaluation_due(self) -> bool:
        return self.done == self.steps or self.done % self.cfg.trainer.eval_every == 0

    def _save_due(self) -> bool:
        every = self.cfg.trainer.save_every
        return bool(every) and (self.done == self.steps or self.done % every == 0)

    def _step(self) -> None:
        """One optimizer step: this rank's rows, gradient, update."""
        began = time.perf_counter()
        rows = next(self.batches)
        self.pending.append(self.train_on(rows, time.perf_counter() - began))
        self._settle(self.lag)

    def train_on(self, rows: dict[str, Tensor], waited: float = 0.0) -> StepFigures:
        """Gradient and update from ``rows``, for which this rank has ``waited`` so many seconds."""
        self.parallel.wait()
        self.optimizer.zero_grad(set_to_none=not self.parallel.gradients_stay)
        targets = self._sum(self._on_device(target_count(rows["labels"]).sum()))
        set_rates(
            self.optimizer,
            rate_factor(self.done, self.steps, self.cfg.trainer.warmup_fraction, self.cfg.trainer.min_lr_ratio),
        )
        if self.layerwise:
            self.layerwise.begin()
        try:
            loss = self._backward(rows, targets)
        except torch.linalg.LinAlgError as error:  # of a layer-wise update
            raise self._lost(self._figures(torch.zeros((), device=self.device), targets, waited), error) from error
        figures = self._figures(loss, targets, waited)
        if self.lag or self._is_finite(figures):  # without lag, known before anything can reach the weights
            figures.timer = self.layerwise.times if self.layerwise else self._update(rows, targets, figures)
            o = self.cfg.optimizer
            if o.get("log_basis") and is_update_time(self.done + 1 - self.skipped, o.update_interval, o.update_times):
                figures.bases = self.parallel.gather(self.optimizer.basis_log)  # type: ignore[attr-defined]
                self.optimizer.basis_log.clear()  # type: ignore[attr-defined]
        self.done += 1
        return figures

    def _figures(self, loss: Tensor, targets: Tensor, waited: float) -> StepFigures:
        """Of the step that is being done, from this rank's summed loss and the gradients that there are."""
        asked = torch.full((), float(self.signals.received is not None), dtype=torch.float64, device=self.device)
        loss, asked = self._sum(torch.stack([loss.double(), asked])).unbind()
        values = torch.stack([loss / targets.clamp_min(1), self._clip().double(), asked])
        figures = StepFigures(self.done + 1, values, [group["lr"] for group in self.optimizer.param_groups], waited)
        if self.lag and values.is_cuda:
            figures.values, figures.arrived = _to_host(values)
        return figures

    def _update(self, rows: dict[str, Tensor], targets: Tensor, figures: StepFigures) -> StepTimer:
        timer = StepTimer(self.device)
        timer.start()
        try:
            self._estimate_curvature(rows, targets)
            self.optimizer.step()
        except torch.linalg.LinAlgError as error:
            raise self._lost(figures, error) from error
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            if self.cfg.optimizer.name != "any" or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"{self.cfg.optimizer.target} cannot take step {self.done + 1} ({type(error).__name__}: {error}); it has to "
                "work with a plain step() on dense gradients"
            ) from error
        timer.stop()
        if self.cfg.optimizer.name == "any" and self.looked < 10:  # numbers may begin to differ when rates leave 0
            self.parallel.check_groups(self.optimizer)
            self.looked += 1
        return timer

    def _lost(self, figures: StepFigures, error: Exception) -> NonFiniteLoss:
        """What to say of a decomposition that failed: numbers that are not finite are the likelier reason."""
        self._settle(0)
        self._is_finite(figures)
        return NonFiniteLoss(f"no eigenvectors at step {figures.step}: {error}", figures.step)

    def _settle(self, left: int) -> None:
        """Read and report the figures of pending steps, until ``left`` are pending."""
        while len(self.pending) > left:
            figures = self.pending.popleft()
            loss, grad_norm, stopping = figures.read()
            self.stopping |= stopping
            # Read late, on a GPU, the update has been made: the weights are lost, but no checkpoint has them.
            finite = self._is_finite(figures)
            now = time.perf_counter()
            elapsed, self.clock = now - self.clock, now
            self._report(figures, loss, grad_norm, elapsed, finite)

    def _is_finite(self, figures: StepFigures) -> bool:
        """Whether the step may update the weights. All ranks see the same sums, and decide alike.

        Raises:
            NonFiniteLoss: it may not, and trainer.on_nonfinite and trainer.max_skipped do not let it be skipped.
        """
        loss, grad_norm, _ = figures.read()
        if math.isfinite(loss + grad_norm):
            return True
        t = self.cfg.trainer
        if t.on_nonfinite == "skip" and self.skipped < t.max_skipped:
            return False
        what = "gradient norm" if math.isfinite(loss) else "loss"
        raise NonFiniteLoss(
            f"the {what} is not finite at step {figures.step} (rate {figures.rates[0]:.3g}, Adam group "
            f"{figures.rates[-1]:.3g})"
            + (f", and {self.skipped} steps were skipped before" if self.skipped else "")
            + f"; {self._last_good()}; {LOWER}",
            figures.step,
        )

    def _stop_if_asked(self) -> None:
        """Save and leave, if a signal has asked for it; on all ranks at the same step.

        Raises:
            Stopped: it has.
        """
        if not (self._asked_here() if self.accelerator.num_processes == 1 else self.stopping):
            return
        self._settle(0)
        name = self.signals.received or "a signal to another rank"
        if not self.done:
            raise Stopped(f"stopped by {name} before the first step: the same command starts it")
        if self.cfg.trainer.save_every:
            if self.saved != self.done:
                self._save()
            how = "" if self.cfg.trainer.resume == "auto" else " with trainer.resume=auto"
            raise Stopped(f"stopped by {name} after step {self.done}, which is saved: the same command{how} continues")
        raise Stopped(f"stopped by {name} after step {self.done}; trainer.save_every=0: nothing is saved")

    def _asked_here(self) -> bool:
        return self.signals.received is not None

    def _asked_anywhere(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it together."""
        if self.accelerator.num_processes == 1:
            return self._asked_here()
        self.stopping |= self._sum(torch.tensor(int(self._asked_here()), device=self.device)).item() > 0
        return self.stopping

    def _backward(self, rows: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss over all ``targets``; returns this rank's summed loss."""
        pieces = self._pieces(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        # DDP divides by the number of ranks what has to be divided by the number of all target tokens.
        weight = self.accelerator.num_processes / targets.clamp_min(1)
        for i, (inputs, labels) in enumerate(pieces):
            last = i == len(pieces) - 1
            with self.parallel.accumulate(self.wrapped, last), self.products():
                with self.autocast():
                    loss = self.wrapped(*self._on_device((inputs, *real_targets(labels))))
                if self.layerwise and not self.lag:  # it is the only micro-batch, and now the weights change
                    self._is_finite(self._figures(loss.detach(), targets, 0.0))
                (loss * weight).backward()
            total += loss.detach()
        return total

    def _settle_gradients(self) -> None:
        """Two passes over two tokens: DDP allots its buckets, orders them anew and leaves the gradients, zero, in them.

        That takes twice their memory for a moment: here before there are states or activations, in the first two steps on top
        of those.
        """
        ids = torch.zeros(1, 2, dtype=torch.int64)
        try:
            for _ in range(2):
                with self.eager(), self.autocast():
                    loss = self.wrapped(*self._on_device(({"input_ids": ids}, *real_targets(ids))))
                loss.backward()
                self.optimizer.zero_grad(set_to_none=False)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {self.device} does not suffice for weights and gradients: set trainer.parallel=fsdp2, which "
                "divides them, or see python scripts/memory.py --gpu 40GB for what fits"
            ) from error

    def _pieces(self, rows: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """This rank's rows in micro-batches of the model's inputs and labels, still on the host."""
        size = min(self.micro_batch, len(rows["input_ids"])) or 1
        split = {name: x.split(size) for name, x in rows.items()}
        labels = split.pop("labels")
        pieces = [({name: x[i] for name, x in split.items()}, labels[i]) for i in range(len(labels))]
        if (
            self.parallel.sharded
        ):  # all ranks take part in every pass: one that has fewer rows repeats some, without targets
            most = math.ceil(self.cfg.trainer.batch_size / self.accelerator.num_processes)
            missing = math.ceil(most / min(self.micro_batch, most)) - len(pieces)
            inputs, targets = pieces[0]
            pieces += [(inputs, torch.full_like(targets, IGNORE))] * missing
        return pieces

    def _on_device(self, x: Any) -> Any:
        """Tensors from the host, in tuples or by name; a GPU gets them while the host goes on."""
        if isinstance(x, dict):
            return {name: self._on_device(part) for name, part in x.items()}
        if isinstance(x, tuple):
            return tuple(self._on_device(part) for part in x)
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def _estimate_curvature(self, rows: dict[str, Tensor], targets: Tensor) -> None:
        """Give an optimizer that wants it (Sophia) an estimate of the Hessian's diagonal, over all rows of the step."""
        if not isinstance(self.optimizer, MatrixOptimizer):
            return
        groups = [group for group in self.optimizer.param_groups if "estimator" in group]
        wanted = bool(groups) and self.optimizer.wanted_estimate() is not None
        if groups and self.accelerator.num_processes > 1:  # each rank knows the update times of its own matrices
            wanted = bool(self.parallel.any(torch.tensor(wanted, device=self.device)))
        if not wanted:
            return
        kind = groups[0]["estimator"]
        params = [p for group in groups for p in group["params"]]
        common = kind == "hutchinson"  # one u on all ranks, but labels drawn by each for its own rows
        seed = f"{self.cfg.seed}/{self.done}/{0 if common else self.accelerator.process_index}"
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(seed.encode()))

        def logits(inputs: dict[str, Tensor]) -> Tensor:
            with self.autocast():
                return self.model(**inputs).logits

        pieces = self._on_device(tuple(self._pieces(rows)))
        with self.eager(), self.products():
            found = (hutchinson if common else label_gradient)(logits, pieces, params, generator)
        B = targets.clamp_min(1)
        means = [self._sum(total) / B for total in found]
        self.optimizer.update_estimate(
            {p: mean if common else B * mean.square() for p, mean in zip(params, means, strict=True)}
        )

    def _sum(self, x: Tensor) -> Tensor:
        return self.parallel.sum(x)

    def _clip(self) -> Tensor:
        """Norm of the whole gradient, before clipping if any is asked for."""
        if self.layerwise:
            return self.layerwise.norm()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = self.parallel.norm(gradients)
        limit = self.cfg.trainer.grad_clip
        if limit is not None:
            torch._foreach_mul_([local(G) for G in gradients], (limit / (norm + 1e-6)).clamp_max(1.0))
        return norm

    # Figures --------------------------------------------------------------------------------------------------------

    def _report(self, figures: StepFigures, loss: float, grad_norm: float, seconds: float, finite: bool) -> None:
        step, tokens = figures.step, figures.step * self.plan.tokens_per_step
        if not finite:
            self.skipped += 1
            self.record.log("skipped", step, {"loss": _number(loss), "grad_norm": _number(grad_norm), "tokens": tokens})
            if self.main:
                tqdm.write(
                    f"step {step:6,}  loss {loss:g}, gradient norm {grad_norm:g}: skipped ({self.skipped} so far)"
                )
            self.bar.update()
            return
        for names, cosines in figures.bases:
            for name, row in zip(names, cosines.tolist(), strict=True):
                self.record.log("basis", step, {"name": name, "cosine": [round(x, 4) for x in row]})
        optimizer_ms = figures.timer.milliseconds() if figures.timer else 0.0
        self.meters.add(seconds, optimizer_ms, figures.data_seconds)
        speed = self.plan.tokens_per_step / seconds
        if step % self.cfg.trainer.log_every == 0 or step in (1, self.steps):
            line = {
                "loss": loss,
                "lr": figures.rates[0],
                "adam_lr": figures.rates[-1] if len(figures.rates) > 1 else None,
                "grad_norm": grad_norm,
                "optimizer_ms": optimizer_ms,
                "data_ms": 1000 * figures.data_seconds,
                "tokens": tokens,
                "tokens_per_second": round(speed, 1),
            }
            self.record.log("train", step, line)
            self.tracker.log("train", step, line)
        waiting = figures.data_seconds / seconds
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, ppl {math.exp(min(loss, 99)):.1f}, {speed:,.0f} tok/s, "
            f"optimizer {optimizer_ms / (1000 * seconds):.0%}"
            + (f", waiting for data {waiting:.0%}" if waiting > 0.05 else ""),
            refresh=False,
        )
        self.bar.update()

    def _evaluate(self, again: bool = False) -> Evaluation | None:
        """The validation loss; None if a signal came meanwhile."""
        self.parallel.wait()
        # Not by the DDP wrapper: its forward passes are counted, and ranks may have unequal numbers.
        with self.eager(), self.products(), self.parallel.gathered(self.wrapped):
            result = evaluate(
                self.model,
                self.validation,
                self.cfg.eval.batch_size,
                self.cfg.eval.galore_rows,
                self.accelerator,
                self.autocast(),
                self._asked_anywhere,
                self.wrapped if self.parallel.sharded else None,
            )
        if result is not None and not math.isfinite(result.loss):  # of weights that the last update has lost
            raise NonFiniteLoss(
                f"the validation loss is not finite after step {self.done}; {self._last_good()}; {LOWER}", self.done
            )
        if again or result is None:
            return result
        self.evaluated = self.done
        line = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
        self.record.log("eval", self.done, line)
        self.tracker.log("eval", self.done, line)
        if self.main:
            tqdm.write(f"step {self.done:6,}  validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}")
        if self.cfg.trainer.sample_tokens and (self.main or self.parallel.sharded):
            with self.eager(), self.products(), self.parallel.gathered(self.wrapped):
                text = write_text(
                    self.model,
                    self.tokenizer,
                    self.cfg.trainer.sample_prompt,
                    self.cfg.trainer.sample_tokens,
                    seed=self.cfg.seed,
                    autocast=self.autocast(),
                    together=self.parallel.sharded,
                )
            self.record.sample(self.done, text)
            if self.main:
                tqdm.write("    " + text.replace("\n", "\n    "))
        return result

    def _save(self) -> None:
        if self.lock:
            self.lock.check()
        self.parallel.wait()
        finite = torch.stack([local(p).isfinite().all() for p in self.model.parameters()]).all()
        if self.parallel.any(~finite):
            raise NonFiniteLoss(
                f"the weights are not finite after step {self.done}, which is not saved; {self._last_good()}; {LOWER}",
                self.done,
            )
        if not self.parallel.replicas_agree(self.model):
            t = self.cfg.trainer
            once = "set trainer.shard_optimizer=true trainer.shard_group=all, and each matrix is computed once; or "
            repeated = t.shard_group == "node" or not (t.shard_optimizer or self.parallel.sharded)
            raise UserError(
                f"after step {self.done}, which is not saved, the processes have different weights: their cards or libraries "
                f"round differently, or one is faulty; {once if repeated else ''}use equal ones, and the same command goes on "
                "from the last checkpoint"
            )
        self.record.flush()
        meta = {
            "evaluated": self.done if not self._evaluation_due() else self.evaluated,
            "skipped": self.skipped,
            "meters": self.meters.state(time.perf_counter() - self.began, peak_memory(self.device)[0]),
            "optimizer": self.record.config["optimizer"],
            "model": self.record.config["model"],
            "validation": self.validation_rows,
            "data": self.batches.state_dict(),
        }
        t = self.cfg.trainer
        checkpoint.save(self.checkpoints, self.done, self.model, self.optimizer, meta, t.keep_last, t.keep_every)
        self.saved = self.done

    def _finish(self, result: Evaluation) -> None:
        """summary.json, the final model, and a few lines for the user."""
        sums = self.meters.best
        speed = sums.steps * self.plan.tokens_per_step / sums.seconds if sums.steps else None
        peak = peak_flops(self.device)
        flops = flops_per_token(self.cfg.model, self.plan.parameters, self.length)
        memory, kind = peak_memory(self.device)
        memory = self.parallel.most(max(memory, self.meters.peak_memory_bytes))
        states, states_by_rank = self.parallel.state_bytes(self.optimizer)
        whole = self.parallel.whole_weights(self.model) if self.cfg.trainer.save_model else None
        if self.main and self.cfg.trainer.save_model:
            try:
                save_model(self.model, self.tokenizer, self.record.path / "model", whole)
                checkpoint.write_sums(self.record.path / "model")
            except OSError as error:
                raise UserError(
                    f"the final model cannot be written to {self.record.path} ({error.strerror or error}): free some space "
                    "and run the same command again, or set trainer.save_model=false"
                ) from error
        self.record.summary(
            {
                "perplexity": result.perplexity,
                "perplexity_galore": result.perplexity_galore,
                "loss": result.loss,
                "validation_tokens": result.tokens,
                **{f"{name}_perplexity": self.ngrams[name] for name in ("unigram", "bigram") if self.ngrams},
                "steps": self.done,
                "skipped_steps": self.skipped,
                "damaged_documents": sum(self.source.damaged.values()),
                "tokens": self.done * self.plan.tokens_per_step,
                "parameters": self.plan.parameters,
                "optimizer_state_bytes": states,
                **({"optimizer_state_bytes_by_rank": states_by_rank} if len(states_by_rank) > 1 else {}),
                "peak_memory_bytes": memory,
                "peak_memory_kind": kind,
                "tokens_per_second": speed,
                "optimizer_ms": sums.optimizer_ms / sums.steps if sums.steps else None,
                "data_share": sums.data_seconds / sums.seconds if sums.steps else None,
                "mfu": speed * flops / (peak * self.accelerator.num_processes) if peak and speed else None,
                "training_seconds": self.meters.every.seconds,
                "wall_seconds": self.meters.wall_seconds + time.perf_counter() - self.began,
            }
        )
        self.tracker.log("final", self.done, {"perplexity": result.perplexity})
        if self.main:
            baselines = "".join(
                f"; {name} {self.ngrams[name]:.2f}" for name in ("bigram", "unigram") if name in self.ngrams
            )
            print(f"final validation perplexity {result.perplexity:.4f} on {result.tokens:,} tokens{baselines}")
            print(f"record in {self.record.path}")

    def _last_good(self) -> str:
        lines = [line for line in read_lines(self.record.metrics_file) if line["kind"] == "train"]
        return (
            f"the last good record is step {lines[-1]['step']}, loss {lines[-1]['loss']:.4f}"
            if lines
            else "there is no good step before it"
        )


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy on its way to pinned memory, and the event of its arrival."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None


def make_accelerator(device: torch.device) -> Accelerator:
    """Accelerate's processes, checked: on a CPU it makes independent jobs unless told that it is one."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    # Buffers are constants (rotary frequencies), and gradients need not lie in memory twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    # Precision and compilation are ours to choose: what `accelerate config` left must not change a run unnoticed.
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no", kwargs_handlers=[ddp, patient]
    )
    if accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        raise UserError(
            f"this machine's accelerate configuration asks for {accelerator.distributed_type}, which the optimizers cannot "
            "use: launch with --multi_gpu, or run accelerate config again without it"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but they do not work together ({accelerator.num_processes} in the "
            "group): on a CPU start them with torchrun, on GPUs with accelerate launch"
        )
    return accelerator


@torch.no_grad()
def write_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = 50,
    autocast: AbstractContextManager | None = None,
    together: bool = False,
) -> str:
    """``prompt`` and up to ``tokens`` tokens that the model writes on, by sampling (temperature 0: greedily).

    The global random state is left as it was, so that a sample does not change the run.

    Args:
        together: all ranks write the same, since each holds a part of the weights only.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode([prompt])[0] or [tokenizer.eos_id]], device=device)
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0} if temperature else {"do_sample": False}
    training = model.training
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast or nullcontext():
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            use_cache=True,
            synced_gpus=together,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=tokenizer.eos_id,
            **how,
        )
    model.train(training)
    return tokenizer.decode(out[0].tolist())


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The model and its tokenizer in Hugging Face's format; ``weights``, where the model holds a part of them only."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one of its own for each file, in the middle of ours
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
