"""What a run is going to do, from its configuration alone: shown before it starts, and all of a dry run."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError
from optimizers import MatrixOptimizer, create, describe
from optimizers.bfloat16 import has_kernels
from optimizers.memory import state_bytes

from .layerwise import check_layerwise
from .loss import check_loss
from .memory import activation_bytes
from .model import build_model, parameter_count, weight_dtype
from .parallel import check_parallel, layout

# Tokens of one forward pass when trainer.micro_batch_size is auto. With trainer.loss=full the logits of 2^14 tokens with
# 32,000 pieces take 2 GB in float32; on the CPU, more than the caches hold is slower, not faster.
AUTO_TOKENS = {"cuda": 2**14, "cpu": 2**12}
ACTIVATIONS = 0.5  # of a GPU's memory, for auto: the rest is for weights, gradients, states and the loss
FEWEST_REFRESHES = 25  # with fewer, a run is told of its interval
LARGE = 2e7  # parameters that nobody means to train on a CPU


@dataclass(frozen=True)
class Plan:
    """A run's numbers, all known before anything is allocated.

    Attributes:
        text: what is shown to people.
        parameters: of the model.
        precision: bf16, bf16_mixed or fp32 ("auto" resolved).
        device: where it runs.
        tokens_per_step: positions of an optimizer step, padding included, as the paper counts.
        warnings: sentences that a user should see.
        checkpoint_bytes: of one checkpoint, without the states where their size is unknown before the first step.
    """

    text: str
    parameters: int
    precision: str
    device: torch.device
    tokens_per_step: int
    warnings: tuple[str, ...]
    checkpoint_bytes: int


def make_plan(cfg: DictConfig) -> Plan:
    """Build the run on the meta device and describe it. Needs neither network nor data nor memory."""
    device = choose_device(cfg.trainer.device)
    check_loss(cfg.trainer.loss, device)
    if cfg.trainer.layerwise:
        check_layerwise(cfg, micro_batch_rows(cfg, cfg.trainer.batch_size, device))
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_parallel(cfg, world)
    precision = choose_precision(cfg.trainer.precision, device)
    dtype = weight_dtype(precision)
    model = build_model(cfg.model, device="meta", dtype=dtype)
    optimizer = make_optimizer(cfg, model)

    parameters = parameter_count(model)
    weights = parameters * dtype.itemsize
    gradients = max(p.nbytes for p in model.parameters()) if cfg.trainer.layerwise else weights
    sizes = _state_sizes(optimizer)
    warnings = tuple(_warnings(cfg, precision, optimizer, device, parameters))
    t, rows, length = cfg.trainer, cfg.trainer.batch_size, cfg.data.length
    tokens = rows * length
    split = describe(optimizer.param_groups).splitlines()
    warmup = round(t.steps * t.warmup_fraction)
    lines = {
        "model": f"{cfg.model.name}, {parameters:,} parameters",
        "optimizer": f"{cfg.optimizer.name} ({_options(cfg)})",
        "": f"{split[0]}, rate {_matrix_rate(cfg)}",
        **({" ": f"{split[1]}, rate {_number(optimizer.param_groups[-1]['lr'])}"} if split[1:] else {}),
        "recipe": f"{cfg.recipe}: {t.steps:,} steps of {rows} rows x {length} tokens = {_count(t.steps * tokens)} tokens",
        "schedule": f"warm-up {warmup:,} steps from 0, cosine to {t.min_lr_ratio:g} of the rate",
        "data": f"{_data(cfg)}, tokenizer {cfg.tokenizer}, seed {cfg.seed}",
        "precision": f"{precision} on {device.type}" + (" (chosen by auto)" if t.precision == "auto" else ""),
        "memory": f"weights {_bytes(weights)}, gradients {_bytes(gradients)}, optimizer states {_states(optimizer, sizes)}, "
        "without activations",
        **({"processes": layout(cfg, world)} if world > 1 else {}),
        "run_dir": str(cfg.run_dir),
    }
    text = "\n".join(f"{name.strip():10s} {line}" for name, line in lines.items())
    text += "".join(f"\nnote       {warning}" for warning in warnings)
    return Plan(text, parameters, precision, device, tokens, warnings, weights + sum(sizes or ()))


def make_optimizer(cfg: DictConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer on the model's parameters.

    Raises:
        UserError: what the optimizer says against its options; a method that cannot be compiled, if it is to be.
    """
    options: dict[str, Any] = OmegaConf.to_container(cfg.optimizer, resolve=True)  # type: ignore[assignment]
    try:
        optimizer = create(options.pop("name"), model, verbose=False, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer={cfg.optimizer.name}: {error}") from error
    if cfg.trainer.compile_optimizer:
        if not isinstance(optimizer, MatrixOptimizer) or not optimizer.compilable:
            raise UserError(f"optimizer={cfg.optimizer.name} cannot be compiled: set trainer.compile_optimizer=false")
        optimizer.compile()
    return optimizer


def choose_device(name: str) -> torch.device:
    """auto | cpu | cuda; under a launcher, this rank's own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch sees no GPU: use trainer.device=auto, or install a CUDA build")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def choose_precision(name: str, device: torch.device) -> str:
    """``auto``: bf16_mixed where the device has bfloat16 arithmetic of its own, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16_mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Emulated, bfloat16 is slower than float32. The checks are private but have no public form.
    native = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return "bf16_mixed" if any(check is not None and check() for check in native) else "fp32"


def micro_batch_rows(cfg: DictConfig, rows: int, device: torch.device) -> int:
    """Rows of one forward pass on this rank, which has ``rows`` rows of a step."""
    size = cfg.trainer.micro_batch_size
    if size == "auto":
        size = max(1, AUTO_TOKENS[device.type] // cfg.data.length)
        if device.type == "cuda":
            room = ACTIVATIONS * torch.cuda.get_device_properties(device).total_memory
            precision = choose_precision(cfg.trainer.precision, device)
            while size > 1 and activation_bytes(cfg.model, size, cfg.data.length, precision) > room:
                size = (size + 1) // 2
    return min(size, rows) or 1


def data_workers(cfg: DictConfig, device: torch.device) -> int:
    """Tokenising threads of each rank's own data process; 0: a thread of the training process.

    auto: on a CPU the training takes all cores anyway; beside a GPU, a process of its own keeps the interpreter free for
    launching kernels. Prepared rows are only copied.
    """
    workers = cfg.data.get("workers", 0)
    if workers != "auto":
        return workers
    if cfg.data.kind == "prepared":
        return 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if device.type == "cpu" else max(1, min(4, _cores() // ranks - 1))


def _cores() -> int:
    """That this process may use: under SLURM, those of its job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warnings(cfg: DictConfig, precision: str, optimizer: torch.optim.Optimizer, device: torch.device, parameters: int):
    if cfg.trainer.device == "auto" and device.type == "cpu" and parameters > LARGE:
        yield (
            f"torch sees no GPU, so {_count(parameters)} parameters are trained on the CPU: trainer.device=cuda refuses that, "
            "trainer.device=cpu says that it is meant"
        )
    if device.type == "cpu" and precision.startswith("bf16") and not has_kernels():
        compiled = cfg.trainer.compile or cfg.trainer.compile_optimizer
        yield "torch has no kernels for bfloat16 products on this CPU " + (
            "and computes them in a plain loop, 20 times slower or worse: set trainer.precision=fp32, or compile nothing"
            if compiled
            else "(no AVX-512): float32 ones compute them, and trainer.precision=fp32 is faster"
        )
    if precision == "bf16":
        worst = max(
            (
                group["betas"][1]
                for group in optimizer.param_groups
                if "betas" in group and not group.get("state_dtype")
            ),
            default=0.0,
        )
        # 1 - beta2 below half a unit in the last place: v (1 - (1 - beta2)) rounds back to v
        if 1 - worst < 2**-9:
            yield (
                f"bf16 second moments with beta2 = {worst:g} never shrink (0.1 % is under bfloat16's resolution); this "
                "is the published recipe; trainer.precision=bf16_mixed avoids it"
            )
    interval, steps = cfg.optimizer.get("update_interval") or 1, cfg.trainer.steps
    if cfg.optimizer.get("rank") and steps < FEWEST_REFRESHES * interval:
        yield (
            f"a basis is made anew every {interval} steps, {1 + steps // interval} times in {steps:,} steps, but at least 50 "
            f"times in the paper's runs: optimizer.update_interval={max(1, steps // 50)} would do so here"
        )
    if cfg.trainer.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        yield "the batch does not divide evenly among the processes; some will do a row more than others"


def _state_sizes(optimizer: torch.optim.Optimizer) -> list[int] | None:
    """Bytes of optimizer states, by group; None where they are unknown before the first step."""
    try:
        return state_bytes(optimizer)
    except ValueError:
        return None


def _states(optimizer: torch.optim.Optimizer, sizes: list[int] | None) -> str:
    """Bytes of optimizer states, matrices + others."""
    if sizes is None:
        return "unknown before the first step"
    others = sum(size for size, group in zip(sizes, optimizer.param_groups, strict=True) if group.get("adam"))
    return f"{_bytes(sum(sizes))} ({_bytes(sum(sizes) - others)} + {_bytes(others)})"


def _options(cfg: DictConfig) -> str:
    shown = ("rank", "leading", "update_interval", "compensation_scale", "beta", "betas", "momentum", "last_layer")
    return ", ".join(f"{key} {_number(cfg.optimizer[key])}" for key in shown if key in cfg.optimizer)


def _matrix_rate(cfg: DictConfig) -> str:
    scale = cfg.optimizer.get("scale")
    lr = _number(cfg.optimizer.lr)
    return lr if scale is None else f"{lr} x scale {scale:g} = {cfg.optimizer.lr * scale:g}"


def _data(cfg: DictConfig) -> str:
    where = f" {cfg.data.path}" if cfg.data.get("path") else ""
    return f"{cfg.data.name}{where}, {'packed rows' if cfg.data.rows == 'pack' else 'one document per row'}"


def _number(value: Any) -> str:
    if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
        return "(" + ", ".join(_number(v) for v in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(n: int) -> str:
    return next((f"{n / size:.3g}{unit}" for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if n >= size), str(n))


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"
