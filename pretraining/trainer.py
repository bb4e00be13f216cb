"""The training loop."""

from __future__ import annotations

import math
import os
import time
import zlib
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data import TrainingBatches, load_tokenizer, ngram_perplexities, open_source, training_sequences, validation_rows
from data.errors import UserError
from optimizers import MatrixOptimizer
from optimizers.memory import measured_state_bytes

from . import checkpoint
from .curvature import hutchinson, label_gradient
from .evaluation import Evaluation, evaluate, row_losses, target_count
from .model import build_model
from .plan import Plan, make_optimizer, make_plan, micro_batch_rows, weight_dtype
from .record import RunRecord, environment, read_lines, set_aside
from .schedule import rate_factor, set_rates
from .throughput import StepTimer, flops_per_token, peak_flops, peak_memory
from .trackers import make_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

# Steps that throughput does not count: compilation, caches and the first basis of every matrix fall in them.
WARMUP_STEPS = 10


class NonFiniteLoss(UserError):
    """Training has diverged."""

    exit_code = 3


def train(cfg: DictConfig) -> Path | None:
    """Do the run that ``cfg`` describes, from its last checkpoint if it has one.

    Returns:
        The run folder; None after a dry run.

    Raises:
        UserError: whatever the user can put right; NonFiniteLoss with exit code 3.
    """
    main = os.environ.get("RANK", "0") == "0"
    plan = make_plan(cfg)
    if main:
        print(plan.text, flush=True)
    if cfg.trainer.dry_run:
        return None
    run_dir = Path(cfg.run_dir)
    if cfg.trainer.resume == "never" and main:
        kept = set_aside(run_dir)
        if kept:
            print(f"the run that was there is now {kept}")
    finished = run_dir / "summary.json"
    if cfg.trainer.resume == "auto" and finished.exists():
        cfg.trainer.precision = plan.precision
        RunRecord(run_dir, cfg, write=False)  # another configuration is refused first
        print(f"this run is finished, see {finished}; trainer.resume=never trains it anew")
        return run_dir
    Trainer(cfg, plan).run()
    return run_dir


class Trainer:
    """One run: the parts are made in the constructor, ``run`` trains to the end.

    The order of rows is a function of source, seed and protocol; a step's gradient is the mean over all its target
    tokens, whatever the number of processes or micro-batches.
    """

    def __init__(self, cfg: DictConfig, plan: Plan) -> None:
        cfg = cfg.copy()
        cfg.trainer.precision = plan.precision  # what "auto" meant here is part of the record
        self.cfg, self.plan, self.device = cfg, plan, plan.device
        self.began = time.perf_counter()
        self.accelerator = make_accelerator(self.device)
        self.main = self.accelerator.is_main_process
        self.steps, self.length = cfg.trainer.steps, cfg.data.length

        self.tokenizer = load_tokenizer(cfg.tokenizer)
        if self.tokenizer.vocab_size != cfg.model.vocab_size:
            raise UserError(
                f"the tokenizer {cfg.tokenizer} has {self.tokenizer.vocab_size:,} pieces, but {cfg.model.name} has "
                f"{cfg.model.vocab_size:,}: set tokenizer, or model.vocab_size={self.tokenizer.vocab_size}"
            )
        self.source = open_source(cfg.data, split="train")
        self.validation_source = open_source(cfg.data, split="validation")
        self.validation = validation_rows(
            self.validation_source, self.tokenizer, self.length, cfg.data.rows, cfg.data.validation_max_tokens
        )
        self.ngrams: dict[str, Any] = {}
        if cfg.eval.ngrams and self.main:
            training = training_sequences(self.source, self.tokenizer, self.length, cfg.data.rows)
            self.ngrams = ngram_perplexities(training, *self.validation, vocab_size=cfg.model.vocab_size)

        torch.manual_seed(cfg.seed)
        self.model = build_model(
            cfg.model,
            device=self.device,
            dtype=weight_dtype(plan.precision),
            pad_token_id=self.tokenizer.pad_id,
            eos_token_id=self.tokenizer.eos_id,
        )
        self.optimizer = make_optimizer(cfg, self.model)
        self.wrapped = self.accelerator.prepare_model(self.model)
        # Accelerate's wrapper adds nothing to an optimizer without a gradient scaler, and its scheduler would step
        # once for every rank.

        run_dir = Path(cfg.run_dir)
        self.checkpoints = run_dir / "checkpoints"
        self.record = RunRecord(run_dir, cfg, write=self.main)
        self.batches = TrainingBatches(
            self.source,
            self.tokenizer,
            length=self.length,
            rows=cfg.data.rows,
            batch_size=cfg.trainer.batch_size,
            seed=cfg.data.seed,
            shuffle_buffer=cfg.data.shuffle_buffer,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.done, self.seconds, self.wall_seconds = self._resume()
        self.record.start(self._environment(), self.done)
        self.tracker = make_tracker(cfg.tracker, run_dir, self.record.config, write=self.main)
        self.timer = StepTimer(self.device)
        self.step_seconds: list[float] = []
        self.optimizer_ms: list[float] = []

    # Parts ----------------------------------------------------------------------------------------------------------

    def _resume(self) -> tuple[int, float, float]:
        """Finished steps, seconds of training and in all, from the checkpoint that ``trainer.resume`` means."""
        wanted = self.cfg.trainer.resume
        if wanted == "never":
            return 0, 0.0, 0.0
        saved = checkpoint.list_checkpoints(self.checkpoints)
        path = Path(wanted) if wanted != "auto" else (saved[-1] if saved else None)
        step = checkpoint.step_of(path) if path else 0
        if self._sum(torch.tensor(step, device=self.device)).item() != step * self.accelerator.num_processes:
            raise UserError("the processes see different checkpoints: put run_dir on a filesystem that all nodes share")
        if path is None:
            return 0, 0.0, 0.0
        meta = checkpoint.load(path, self.model, self.optimizer, self.record.config["optimizer"])
        self.batches.load_state_dict(meta["data"])
        if self.main:
            print(f"resumed from {path}, after step {step}")
            checkpoint.set_aside_later(self.checkpoints, step)
        return step, meta["training_seconds"], meta["wall_seconds"]

    def _environment(self) -> dict[str, Any]:
        return environment(
            self.device,
            self.accelerator.num_processes,
            parameters=self.plan.parameters,
            data={"train": self.source.description, "validation": self.validation_source.description},
            tokenizer={"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint},
        )

    def autocast(self) -> AbstractContextManager:
        if self.plan.precision == "bf16_mixed":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    # The loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train, evaluate, save; every figure goes to the record."""
        t = self.cfg.trainer
        bar = tqdm(
            total=self.steps, initial=self.done, unit="step", dynamic_ncols=True, disable=None if self.main else True
        )
        result: Evaluation | None = None
        with self.batches, closing(self.tracker), bar:
            while self.done < self.steps:
                began = time.perf_counter()
                figures = self._step(next(self.batches))
                elapsed = time.perf_counter() - began
                self.seconds += elapsed
                self.step_seconds.append(elapsed)
                self._report(bar, figures, elapsed)
                last = self.done == self.steps
                if last or self.done % t.eval_every == 0:
                    result = self._evaluate()
                if last or (t.save_every and self.done % t.save_every == 0):
                    self._save()
            if result is None:  # resumed from the last step's checkpoint: its evaluation is in the record
                result = self._evaluate(again=True)
            bar.close()  # before other lines are printed
            self._finish(result)

    def _step(self, rows: dict[str, Tensor]) -> dict[str, Any]:
        """One optimizer step on this rank's ``rows``; returns the step's figures."""
        self.optimizer.zero_grad(set_to_none=True)
        targets = self._sum(target_count(rows["labels"]).sum().to(self.device))
        loss = self._sum(self._backward(rows, targets)).item() / max(1, targets.item())
        set_rates(
            self.optimizer,
            rate_factor(self.done, self.steps, self.cfg.trainer.warmup_fraction, self.cfg.trainer.min_lr_ratio),
        )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        grad_norm = self._clip()
        if not math.isfinite(loss + grad_norm):  # before it can reach the weights, and so a checkpoint
            what = "gradient norm" if math.isfinite(loss) else "loss"
            raise NonFiniteLoss(
                f"the {what} is not finite at step {self.done + 1} (rate {rates[0]:.3g}, Adam group {rates[-1]:.3g}); "
                f"{self._last_good()}; lower optimizer.lr or optimizer.adam_lr, lengthen trainer.warmup_fraction, or "
                "set trainer.grad_clip"
            )
        self.timer.start()
        try:
            self._estimate_curvature(rows, targets)
            self.optimizer.step()
        except torch.linalg.LinAlgError as error:
            raise NonFiniteLoss(f"no eigenvectors at step {self.done + 1}: {error}") from error
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            if self.cfg.optimizer.name != "any" or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"{self.cfg.optimizer.target} cannot take step {self.done + 1} ({type(error).__name__}: {error}); it has to "
                "work with a plain step() on dense gradients"
            ) from error
        self.timer.stop()
        self.done += 1
        return {
            "loss": loss,
            "lr": rates[0],
            "adam_lr": rates[-1] if len(rates) > 1 else None,
            "grad_norm": grad_norm,
            "optimizer_ms": self.timer.milliseconds(),  # waits for the device: the step's time includes the update
        }

    def _backward(self, rows: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss over all ``targets``; returns this rank's summed loss."""
        pieces = self._pieces(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        # DDP divides by the number of ranks what has to be divided by the number of all target tokens.
        weight = self.accelerator.num_processes / targets.clamp_min(1)
        for i, (ids, labels) in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.autocast():
                    logits = self.wrapped(input_ids=ids.to(self.device)).logits
                    loss = row_losses(logits, labels.to(self.device)).sum()
                (loss * weight).backward()
            total += loss.detach()
        return total

    def _pieces(self, rows: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows in micro-batches of input ids and labels, still on the host."""
        size = micro_batch_rows(self.cfg, len(rows["input_ids"]), self.device)
        return list(zip(rows["input_ids"].split(size), rows["labels"].split(size), strict=True))

    def _estimate_curvature(self, rows: dict[str, Tensor], targets: Tensor) -> None:
        """Give an optimizer that wants it (Sophia) an estimate of the Hessian's diagonal, over all rows of the step."""
        if not isinstance(self.optimizer, MatrixOptimizer):
            return
        kind = self.optimizer.wanted_estimate()
        if kind is None:
            return
        params = [p for group in self.optimizer.param_groups if "estimator" in group for p in group["params"]]
        common = kind == "hutchinson"  # one u on all ranks, but labels drawn by each for its own rows
        seed = f"{self.cfg.seed}/{self.done}/{0 if common else self.accelerator.process_index}"
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(seed.encode()))

        def logits(ids: Tensor) -> Tensor:
            with self.autocast():
                return self.model(input_ids=ids).logits

        pieces = [(ids.to(self.device), labels.to(self.device)) for ids, labels in self._pieces(rows)]
        found = (hutchinson if common else label_gradient)(logits, pieces, params, generator)
        B = targets.clamp_min(1)
        means = [self._sum(total) / B for total in found]
        self.optimizer.update_estimate(
            {p: mean if common else B * mean.square() for p, mean in zip(params, means, strict=True)}
        )

    def _sum(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum") if self.accelerator.num_processes > 1 else x

    def _clip(self) -> float:
        """Norm of the whole gradient, before clipping if any is asked for."""
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self.model.parameters() if p.grad is not None
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        limit = self.cfg.trainer.grad_clip
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return norm.item()

    # Figures --------------------------------------------------------------------------------------------------------

    def _report(self, bar: tqdm, figures: dict[str, Any], seconds: float) -> None:
        optimizer_ms = figures["optimizer_ms"]
        self.optimizer_ms.append(optimizer_ms)
        speed = self.plan.tokens_per_step / seconds
        if self.done % self.cfg.trainer.log_every == 0 or self.done in (1, self.steps):
            line = {
                **figures,
                "tokens": self.done * self.plan.tokens_per_step,
                "tokens_per_second": round(speed, 1),
            }
            self.record.log("train", self.done, line)
            self.tracker.log("train", self.done, line)
        share = optimizer_ms / (1000 * seconds)
        bar.set_postfix_str(
            f"loss {figures['loss']:.3f}, ppl {math.exp(min(figures['loss'], 99)):.1f}, {speed:,.0f} tok/s, "
            f"optimizer {share:.0%}",
            refresh=False,
        )
        bar.update()

    def _evaluate(self, again: bool = False) -> Evaluation:
        # Not the DDP wrapper: it synchronises buffers in every forward pass, and ranks may have unequal numbers of them.
        result = evaluate(
            self.model,
            self.validation,
            self.cfg.eval.batch_size,
            self.cfg.eval.galore_rows,
            self.accelerator,
            self.autocast(),
        )
        if again:
            return result
        line = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
        self.record.log("eval", self.done, line)
        self.tracker.log("eval", self.done, line)
        if self.main:
            tqdm.write(f"step {self.done:6,}  validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}")
            if self.cfg.trainer.sample_tokens:
                text = write_text(
                    self.model,
                    self.tokenizer,
                    self.cfg.trainer.sample_prompt,
                    self.cfg.trainer.sample_tokens,
                    seed=self.cfg.seed,
                    autocast=self.autocast(),
                )
                self.record.sample(self.done, text)
                tqdm.write("    " + text.replace("\n", "\n    "))
        return result

    def _save(self) -> None:
        if self.cfg.trainer.save_every:
            meta = {
                "training_seconds": self.seconds,
                "wall_seconds": self.wall_seconds + time.perf_counter() - self.began,
                "optimizer": self.record.config["optimizer"],
                "data": self.batches.state_dict(),
            }
            checkpoint.save(self.checkpoints, self.done, self.model, self.optimizer, meta, self.cfg.trainer.keep_last)

    def _finish(self, result: Evaluation) -> None:
        """summary.json, the final model, and a few lines for the user."""
        steady = self.step_seconds[WARMUP_STEPS:] or self.step_seconds
        milliseconds = self.optimizer_ms[WARMUP_STEPS:] or self.optimizer_ms
        speed = len(steady) * self.plan.tokens_per_step / sum(steady) if steady else None
        peak = peak_flops(self.device)
        flops = flops_per_token(self.cfg.model, self.plan.parameters, self.length)
        memory, kind = peak_memory(self.device)
        self.record.summary(
            {
                "perplexity": result.perplexity,
                "perplexity_galore": result.perplexity_galore,
                "loss": result.loss,
                "validation_tokens": result.tokens,
                **{f"{name}_perplexity": self.ngrams[name] for name in ("unigram", "bigram") if self.ngrams},
                "steps": self.done,
                "tokens": self.done * self.plan.tokens_per_step,
                "parameters": self.plan.parameters,
                "optimizer_state_bytes": measured_state_bytes(self.optimizer),
                "peak_memory_bytes": memory,
                "peak_memory_kind": kind,
                "tokens_per_second": speed,
                "optimizer_ms": sum(milliseconds) / len(milliseconds) if milliseconds else None,
                "mfu": speed * flops / (peak * self.accelerator.num_processes) if peak and speed else None,
                "training_seconds": self.seconds,
                "wall_seconds": self.wall_seconds + time.perf_counter() - self.began,
            }
        )
        self.tracker.log("final", self.done, {"perplexity": result.perplexity})
        if self.main:
            if self.cfg.trainer.save_model:
                save_model(self.model, self.tokenizer, self.record.path / "model")
            baselines = "".join(
                f"; {name} {self.ngrams[name]:.2f}" for name in ("bigram", "unigram") if name in self.ngrams
            )
            print(f"final validation perplexity {result.perplexity:.4f} on {result.tokens:,} tokens{baselines}")
            print(f"record in {self.record.path}")
        self.accelerator.end_training()

    def _last_good(self) -> str:
        lines = [line for line in read_lines(self.record.metrics_file) if line["kind"] == "train"]
        return (
            f"the last good record is step {lines[-1]['step']}, loss {lines[-1]['loss']:.4f}"
            if lines
            else "there is no good step before it"
        )


def make_accelerator(device: torch.device) -> Accelerator:
    """Accelerate's processes, checked: on a CPU it makes independent jobs unless told that it is one."""
    from accelerate import Accelerator

    # Precision is ours to choose: what `accelerate config` left on the machine must not change a run unnoticed.
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
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
) -> str:
    """``prompt`` and up to ``tokens`` tokens that the model writes on, by sampling (temperature 0: greedily).

    The global random state is left as it was, so that a sample does not change the run.
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
            pad_token_id=tokenizer.pad_id,
            eos_token_id=tokenizer.eos_id,
            **how,
        )
    model.train(training)
    return tokenizer.decode(out[0].tolist())


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """The model and its tokenizer in Hugging Face's format."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one of its own for each file, in the middle of ours
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
