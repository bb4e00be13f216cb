"""MatrixOptimizer: everything around the mathematics of an optimizer for weight matrices.

An algorithm is three small functions on a batch of same-shape gradients: ``init_state``, ``refresh`` and
``direction``. Grouping, orientation, precision, Adam for the other parameters, weight decay, state dicts and
random numbers live here, once.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam as functional_adam

from .factored import Factored
from .linalg import MODERATE, bounded, column_energy, largest_entry, looks_are_free, matmul_rounding
from .quantization import dequantize, new_codes, quantize
from .sharding import Owners, check_share, is_sharded, local, parameter_names, shard, sharded_dim

# What a group with adam=True holds. Nothing of the matrix method's defaults leaks into it.
ADAM_GROUP: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "state_dtype": None}

PRODUCTS = ("float32", "bfloat16")  # what matrix products are computed from, where it is an option
STATE_DTYPES = (None, "bfloat16", "float32", "float64")  # no float16: squares of gradients leave its range

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with fused Adam
# Where matrices of one shape are stacked and updated together. On the CPU one at a time is fastest: its products
# are large enough by themselves, and stacking costs copies.
BATCHED_DEVICES = {"cuda", "xpu"}
# Stacks have at most so many entries (256 MiB in float32), which bounds the extra memory of a step.
CHUNK_ENTRIES = 2**26


@dataclass
class Context:
    """What few methods need beside the gradient.

    Attributes:
        step: t, counted from 1, for each parameter by itself.
        names: of the parameters in the batch (their positions, where they were given without names).
        transposed: the batch is turned, m <= n; the stored tensors are taller than wide.
        W: [B, m, n], the weights, for classes with ``uses_weights``.
        estimate: [B, m, n], what ``update_estimate`` was given for these matrices, if anything (Sophia).
        seed: the group's.
        largest: [B, 1, 1], the largest absolute entry of each matrix of the gradient, where it was needed already.
        energy: [B, n], the squared norms of the gradient's columns, where they were needed already.
        squares: [B, m, n], the squares of the gradient's entries, where ``energy`` was computed from them.
        rounding: of the factors of float32 products, see ``linalg.matmul_rounding``.
        stored: dtype that the states of the matrix are kept in; None for the one they are computed in.
    """

    step: int
    names: tuple[str, ...]
    transposed: bool
    seed: int = 0
    W: Tensor | None = None
    estimate: Tensor | None = None
    largest: Tensor | None = None
    energy: Tensor | None = None
    squares: Tensor | None = None
    rounding: float = 2.0**-23
    stored: torch.dtype | None = None

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One CPU generator for each matrix, seeded by (seed, name, step); draws within a step follow each other.

        So draws are the same on every rank and device, whatever the batching, and after a resume.
        """
        return self.generators_of(self.step)

    def generators_of(self, step: int) -> list[torch.Generator]:
        """New generators, as they were at the start of ``step``."""
        return [self._generator(name, step) for name in self.names]

    def scale_of(self, G: Tensor) -> Tensor:
        """The largest absolute entry of each matrix of the gradient, at least the smallest normal number: [B, 1, 1]."""
        largest = largest_entry(G) if self.largest is None else self.largest
        return largest.clamp_min(torch.finfo(G.dtype).tiny)

    def moderate(self, G: Tensor, *linear: Tensor) -> tuple[Tensor, ...]:
        """c [B, 1, 1], and ``G`` and what is ``linear`` in it divided by c, so that float32 can hold their squares.

        c is the largest entry of each matrix, or 1, without a pass over G, where it is known that squares are harmless.
        """
        known = self.energy is not None
        if not known and self.largest is not None and looks_are_free(G):
            known = all(MODERATE[0] <= c <= MODERATE[1] for c in self.largest.flatten().tolist())
        if known:
            return G.new_ones(len(G), 1, 1), G, *linear
        c = self.scale_of(G)
        return c, G * (1 / c), *(x * (1 / c) for x in linear)

    def energy_of(self, G: Tensor) -> Tensor:
        """Squared norms of the columns of the gradient as ``direction`` or :meth:`moderate` gave it: [B, n]."""
        return column_energy(G) if self.energy is None else self.energy

    def squares_of(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Squares of the entries of the gradient as :meth:`moderate` gave it, [B, m, n], and their columns' sums, [B, n]."""
        P = G.square() if self.squares is None else self.squares
        return P, P.sum(-2) if self.energy is None else self.energy

    def _generator(self, name: str, step: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}/{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check(group: dict[str, Any], key: str, valid: Callable[[Any], bool] | tuple[str, ...], what: str = "") -> None:
    """Raise a ValueError that says what to do, unless ``group[key]`` is valid (or one of the choices)."""
    value = group[key]
    if isinstance(valid, tuple):
        fine, what = value in valid, "one of " + ", ".join(valid)
    else:
        fine = valid(value)
    if not fine:
        raise ValueError(f"{key} = {value!r} is out of range; set it to {what}")


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of all optimizers of this package.

    A parameter group with ``adam=True`` is updated by torch's functional Adam, with the group's own ``lr``,
    ``betas``, ``eps``; every other group holds matrices for the method. One object, one scheduler and one state
    dict so serve the whole model.

    Subclasses say:
        orient: False if the method treats rows and columns of a tall matrix as they are stored.
        bounds: False if ``direction`` gets the gradient as it is, however large; see ``linalg.bounded``.
        compilable: False if ``direction`` depends on the number of the step, or draws.
        uses_weights: True if ``ctx.W`` is wanted.
        uses_squares: True if ``direction`` asks for ``ctx.squares_of`` (in the gradient's dtype: not beside ``products``).
        applies_scale: True if ``direction`` returns what is already multiplied by ``group["scale"]`` where it should be.
        moments: name -> signed, of the states that ``state_dtype="8bit"`` keeps as block-wise 8-bit codes.
        as_stored: names of states that ``direction`` gets in bfloat16 where they are kept and products are computed in it:
            it multiplies with them, or changes them by operations that compute in float32 and round once.
        full_precision: names of states that are always float32 (float64 for float64 parameters); the others have
            ``group["state_dtype"]``, None meaning the parameter's (float32 for float16).
    """

    orient = True
    bounds = True
    compilable = True
    uses_weights = False
    uses_squares = False
    applies_scale = False
    moments: ClassVar[dict[str, bool]] = {}
    as_stored: frozenset[str] = frozenset()
    full_precision: frozenset[str] = frozenset()
    # of the class, as torch's optimizers copy and pickle nothing but groups and states
    _estimates: Mapping[Tensor, Tensor] = MappingProxyType({})
    _compiled: Callable[..., None] | None = None
    owners: Owners | None = None  # of matrices that ranks have divided among themselves, see sharding.py

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    # What an algorithm provides -----------------------------------------------------------------------------------

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        """The named state tensors of one oriented matrix [m, n], at their initial values."""
        raise NotImplementedError

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        """What happens at update times only, before ``direction``. Changes ``state``."""

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor | Factored:
        """The update direction [B, m, n], before learning rate, scale and weight decay. Changes ``state``.

        It may be returned in factors (``Factored``). A tensor must not be ``ctx.W``, which the step changes.

        Args:
            G: [B, m, n], m <= n if ``orient``, in float32 (float64 for float64 parameters), its entries bounded.
                Not to be changed.
            state: name -> [B, ...] in the same dtype; entries may be changed in place or replaced.
            group: the parameter group.
            ctx: see :class:`Context`.
        """
        raise NotImplementedError

    def factor(self, shape: torch.Size, group: dict[str, Any], ctx: Context) -> float | Tensor:
        """What the direction is multiplied by: the rate, the scale if ``direction`` does not know it, and the like.

        Args:
            shape: of the matrix as it is stored.
        """
        return group["lr"] * (1.0 if self.applies_scale else group.get("scale", 1.0))

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyper-parameter that is out of range."""
        check(group, "lr", lambda x: x >= 0, "a number that is not negative")
        check(group, "weight_decay", lambda x: x >= 0, "a number that is not negative")
        if "scale" in group:
            check(group, "scale", lambda x: x >= 0, "a number that is not negative")
        if group.get("limiter") is not None:
            check(group, "limiter", lambda x: x >= 1, "at least 1, or None")
        if "eps" in group:
            check(group, "eps", lambda x: x >= 0, "a number that is not negative")
        if "update_interval" in group:
            check(group, "update_interval", lambda k: k >= 1, "at least 1 step")
            check(group, "update_times", ("printed", "zero_based"))
        if "square" in group:
            check(group, "square", ("rows", "columns"))

    def check_matrix(self, name: str, shape: tuple[int, int], group: dict[str, Any]) -> None:
        """Raise ValueError for a matrix that the method cannot serve."""

    def needs_energy(self, group: dict[str, Any]) -> bool:
        """Does ``direction`` ask for ``ctx.energy_of(G)``? Then that says, too, that no entry of G is too large."""
        return self.uses_squares

    def compile(self, **options: Any) -> None:
        """Let torch.compile fuse direction and update of the weights, for every shape apart; refreshes stay as they are.

        ``torch.compile(optimizer.step)`` changes nothing: it runs the plain step.

        Measure before using it: on two CPU cores it paid for RACS, and for Alice with products=bfloat16
        (docs/performance.md). Rates enter as tensors, so schedules do not compile again; other hyper-parameters are constants
        of the compiled code. The first gradient that has to be scaled (zero, below 1e-5, above 1e5) compiles once more.

        Args:
            options: of torch.compile.

        Raises:
            ValueError: the method cannot be compiled.
        """
        if not self.compilable:
            raise ValueError(f"{type(self).__name__} does something else at each step; leave its compilation out")
        # one for each shape of matrix and each way to store it: more than torch's limit of 8
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._compiled = torch.compile(self._direct_and_subtract, **{"dynamic": False, "fullgraph": True, **options})

    # Groups ---------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        count = len(self.param_groups)
        try:
            self._add_param_group(dict(param_group))  # torch writes defaults into it; two optimizers may share groups
        except Exception:
            del self.param_groups[count:]  # refused: as if it had never been given
            raise

    def _add_param_group(self, group: dict[str, Any]) -> None:
        if group.get("adam"):
            if group.get("lr") is None:
                group["lr"] = self.defaults["lr"]
            super().add_param_group({**ADAM_GROUP, **group})
            added = self.param_groups[-1]
            for key in self.defaults.keys() - group.keys() - ADAM_GROUP.keys():
                del added[key]
            for key in ("lr", "eps", "weight_decay"):
                check(added, key, lambda x: x >= 0, "a number that is not negative")
            check(added, "betas", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers in [0, 1)")
            self._check_real(added)
        else:
            super().add_param_group({"adam": False, **group})
            added = self.param_groups[-1]
            self._check_matrices(added)
        if isinstance(added.get("state_dtype"), torch.dtype):  # as text, it can be saved anywhere
            added["state_dtype"] = str(added["state_dtype"]).removeprefix("torch.")
        eight_bit = not added["adam"] and self.moments
        if added.get("state_dtype") not in (*STATE_DTYPES, *(["8bit"] if eight_bit else [])):
            raise ValueError(
                f"state_dtype = {added['state_dtype']!r} is not possible here; set it to None (the parameter's), "
                f"{', '.join(STATE_DTYPES[1:])}{' or 8bit' if eight_bit else ''}"
            )

    def _check_matrices(self, group: dict[str, Any]) -> None:
        self.check_group(group)
        self._check_real(group)
        if any(map(is_sharded, group["params"])):
            shard(self)
        for name, p in zip(self._names(group), group["params"], strict=True):
            if p.ndim != 2:
                raise ValueError(
                    f"{name} has shape {list(p.shape)}, and {type(self).__name__} updates matrices only; "
                    "put it in a group with adam=True, as optimizers.partition does"
                )
            if not p.numel():
                raise ValueError(f"{name} {list(p.shape)} has no entries; leave it out")
            if is_sharded(p):
                sharded_dim(p)
            self.check_matrix(name, self._oriented(p, group), group)

    def _check_real(self, group: dict[str, Any]) -> None:
        for name, p in zip(self._names(group), group["params"], strict=True):
            if not p.is_floating_point() and (p.requires_grad or not group["adam"]):
                raise ValueError(f"{name} has dtype {p.dtype}; freeze it or convert it to a floating-point dtype")

    def _names(self, group: dict[str, Any]) -> list[str]:
        return parameter_names(self.param_groups, group)

    def _matrix_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not group["adam"]]

    def _is_turned(self, p: Tensor, group: dict[str, Any]) -> bool:
        rows, columns = p.shape
        return self.orient and (rows > columns or (rows == columns and group.get("square") == "columns"))

    def _oriented(self, p: Tensor, group: dict[str, Any]) -> tuple[int, int]:
        rows, columns = p.shape
        return (columns, rows) if self._is_turned(p, group) else (rows, columns)

    # The step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        # torch.compile(optimizer.step) would take one matrix's state for another's of its shape, without a word: the code
        # that looks a state up is compiled for one parameter, and its guards do not ask which. `compile` is ours.
        return torch.compiler.disable(self._step)(closure) if torch.compiler.is_compiling() else self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self.owners is None and any(is_sharded(p) for group in self._matrix_groups() for p in group["params"]):
            shard(self)  # weights were divided, and the optimizer given the parts, after it was made (Accelerate)
            return self.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        if self._is_rehearsal():
            return loss
        if (
            not self.state
            and self.owners is None
            and all(p.grad is None for g in self.param_groups for p in g["params"])
        ):
            warnings.warn(
                "no parameter has a gradient, so nothing was updated: call backward() before step(), and make the optimizer "
                "after the model was sharded or moved",
                stacklevel=3,
            )
        for group in self.param_groups:
            if group["adam"]:
                self._adam_step(group)
            else:
                for params, ctx in self._batches(group):
                    self._matrix_step(params, group, ctx)
                    for p in params:  # not before: a refresh that fails would otherwise be left out, not made again
                        self.state[p]["step"] = ctx.step
        self._estimates = {}
        return loss

    def wanted_estimate(self) -> str | None:
        """The estimate of curvature that the next ``step`` needs: the group's ``estimator`` at its update times."""
        for group in self.param_groups:
            if "estimator" in group:
                kept = [p for p in group["params"] if self.owners is None or self.owners.keeps(p)]
                steps = {1 + self.state[p]["step"] if self.state.get(p) else 1 for p in kept}
                if any(is_update_time(t, group["update_interval"], group["update_times"]) for t in steps):
                    return group["estimator"]
        return None

    def update_estimate(self, estimates: Mapping[Tensor, Tensor]) -> None:
        """Give the next ``step`` an estimate of the Hessian's diagonal: parameter -> tensor of its shape."""
        missing = [
            name
            for group in self.param_groups
            if "estimator" in group
            for name, p in zip(self._names(group), group["params"], strict=True)
            if p not in estimates
        ]
        if missing:
            raise ValueError(f"the estimate of {missing[0]} is missing; give one for every matrix")
        self._estimates = estimates

    def _refuse_sparse(self) -> None:
        """Before any state of this rank changes: a step that ended half-way would have updated some matrices only."""
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise ValueError(
                        f"the gradient of {self._names(group)[i]} is sparse; make it dense (an embedding without sparse=True)"
                    )

    def _is_rehearsal(self) -> bool:
        """torch.distributed.checkpoint makes states by a step with rate 0 and zero gradients: it must count for none.

        Otherwise it would be step 1, whose gradient decides the first basis. The host looks at the gradients
        only while there is no state and every rate is 0.
        """
        if (self.state and not self.owners) or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        params = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        begun = bool(self.state) or any(local(p.grad).any() for p, _ in params)
        if self.owners:  # a rank may own nothing, or have zeros only
            begun = self.owners.anywhere(begun)
        if begun:
            return False
        for p, group in params:
            self._init(p, group)
        return True

    def _batches(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], Context]]:
        """Parameters that can be updated by the same tensor operations, and the step that they are at."""
        batches: dict[Any, tuple[list[Tensor], list[str]]] = {}
        for name, p in zip(self._names(group), group["params"], strict=True):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                self._init(p, group)
            alone = p.device.type not in BATCHED_DEVICES
            key = len(batches) if alone else (p.shape, p.dtype, p.device, state["step"])
            params, names = batches.setdefault(key, ([], []))
            params.append(p)
            names.append(name)
        rounding = matmul_rounding()
        for params, names in batches.values():
            per_chunk = max(1, CHUNK_ENTRIES // params[0].numel())
            step = self.state[params[0]]["step"] + 1
            transposed = self._is_turned(params[0], group)
            for i in range(0, len(params), per_chunk):
                chunk = slice(i, i + per_chunk)
                seed, stored = group.get("seed", 0), self._stored_dtype(params[0], group)
                yield (
                    params[chunk],
                    Context(step, tuple(names[chunk]), transposed, seed, stored=stored, rounding=rounding),
                )

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any], ctx: Context) -> None:
        compute = compute_dtype(params[0])
        turn = (lambda X: X.mT) if ctx.transposed else (lambda X: X)

        low = group.get("products") == "bfloat16" and params[0].dtype == torch.bfloat16  # then G is not widened
        G = stack([turn(p.grad) for p in params], torch.bfloat16 if low else compute)
        if self.bounds:
            # compiled code fuses energies with what else reads G, but makes no squares that several passes share
            if looks_are_free(G) and (self.uses_squares or (self.needs_energy(group) and not self._compiled)):
                ctx.squares = G.square() if self.uses_squares else None
                ctx.energy = column_energy(G) if ctx.squares is None else ctx.squares.sum(-2)
            G, ctx.largest = bounded(G, ctx.energy)
            if ctx.largest is not None:  # the gradient has been scaled, or will be
                ctx.energy = ctx.squares = None
        if self.uses_weights:
            ctx.W = stack([turn(p) for p in params], compute)
        if self._estimates:
            ctx.estimate = stack([turn(self._estimates[p]) for p in params], compute)

        if "update_interval" in group and is_update_time(ctx.step, group["update_interval"], group["update_times"]):
            state = self._gather(params, compute)
            self.refresh(G.to(compute), state, group, ctx)
            self._scatter(params, state)  # a basis kept in bfloat16 is rounded before its first use, as after a resume

        kept = self.as_stored if low and ctx.stored == torch.bfloat16 else frozenset()
        state = self._gather(params, compute, kept)
        factor = self.factor(params[0].shape, group, ctx)
        decay = group["lr"] * group["weight_decay"] if group["weight_decay"] else None
        if self._compiled:
            factor = as_scalar(factor, compute, G.device)
            decay = None if decay is None else as_scalar(decay, compute, G.device)
            group = {name: value for name, value in group.items() if name not in ("params", "param_names", "lr")}
        advance = self._compiled or self._direct_and_subtract
        advance([turn(p.detach()) for p in params], G, state, group, ctx, factor, decay)
        self._scatter(params, state)

    def _direct_and_subtract(
        self,
        params: list[Tensor],
        G: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        ctx: Context,
        factor: float | Tensor,
        decay: float | Tensor | None,
    ) -> None:
        subtract(params, self.direction(G, state, group, ctx), factor, decay)

    def _init(self, p: Tensor, group: dict[str, Any]) -> None:
        self.state[p].update(self.new_state(p, group))

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of one parameter at step 0, on its device. On the meta device: shapes and dtypes, no memory."""
        low = stored_dtype(p, group)
        if group["adam"]:
            state: dict[str, Any] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, dtype=low, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, dtype=low, memory_format=torch.preserve_format),
            }
            return state
        with torch.device(p.device):
            state = {
                name: value.to(compute_dtype(p) if name in self.full_precision else low)
                for name, value in self.init_state(self._oriented(p, group), group).items()
            }
            if self._is_turned(p, group):
                state = {name: laid_like(value, p.mT) for name, value in state.items()}
            if group.get("state_dtype") == "8bit":
                for name in self.moments.keys() & state.keys():
                    state[name], state[f"{name}_absmax"] = new_codes(state[name].shape, self.moments[name])
        return {"step": 0, **state}

    def _stored_dtype(self, p: Tensor, group: dict[str, Any]) -> torch.dtype:
        """Of the states of ``p`` as they are: those of a loaded state dict stay in the dtype that they were saved in."""
        rest = self.full_precision | {f"{name}_absmax" for name in self.moments}
        states = (x for name, x in self.state[p].items() if isinstance(x, Tensor) and name not in rest)
        return next((x.dtype for x in states if x.is_floating_point()), stored_dtype(p, group))

    def _gather(
        self, params: list[Tensor], dtype: torch.dtype, kept: frozenset[str] = frozenset()
    ) -> dict[str, Tensor]:
        """The states in ``dtype``, but for those that are ``kept`` as they are."""
        names = [name for name in self.state[params[0]] if name != "step" and not name.endswith("_absmax")]
        return {name: stack([self._load(p, name) for p in params], None if name in kept else dtype) for name in names}

    def _load(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name in self.moments and f"{name}_absmax" in state:
            return dequantize(state[name], state[f"{name}_absmax"], self.moments[name])
        return state[name]

    def _scatter(self, params: list[Tensor], state: dict[str, Tensor]) -> None:
        for name, batch in state.items():
            if len(params) == 1 and batch.data_ptr() == self.state[params[0]][name].data_ptr():
                continue  # a lone matrix is gathered as a view
            for p, value in zip(params, batch.unbind(0), strict=True):
                states = self.state[p]
                if name in self.moments and f"{name}_absmax" in states:
                    codes, absmax = quantize(value, self.moments[name])
                    states[name].copy_(codes)
                    states[f"{name}_absmax"].copy_(absmax)
                else:
                    states[name].copy_(value)

    def _adam_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self._init(p, group)
        beta1, beta2 = group["betas"]
        # One call for each kind of parameter: the kernels want lists of one dtype, the fused ones memory without gaps.
        kinds: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
        for p in params:
            kinds.setdefault((p.dtype, p.device.type in FUSED and laid_alike(local(p))), []).append(p)
        for (dtype, fused), some in kinds.items():
            states = [self.state[p] for p in some]
            # torch's kernels want one dtype; where moments are kept in another, wide copies are updated.
            wide = torch.promote_types(dtype, states[0]["exp_avg"].dtype)
            stored = [local(x) for x in (*some, *(s["exp_avg"] for s in states), *(s["exp_avg_sq"] for s in states))]
            working = [x.to(wide) for x in stored]
            n = len(some)
            functional_adam(
                working[:n],
                [
                    (laid_as(local(p), local(G)) if fused else local(G)).to(wide)
                    for p in some
                    if (G := p.grad) is not None
                ],
                working[n : 2 * n],
                working[2 * n :],
                [],
                [s["step"] for s in states],
                fused=fused,
                decoupled_weight_decay=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for x, y in zip(stored, working, strict=True):
                if x is not y:
                    x.copy_(y)

    # State dicts ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self.owners and any(team.size > 1 for team in self.owners.teams):
            raise TypeError(
                "matrices of this optimizer are divided among ranks, and a copy would have a part; copy state_dict()"
            )
        return super().__getstate__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_share(self, state_dict)
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)
        for group in self.param_groups:
            if group.get("state_dtype") == "float16":  # of an older version; see STATE_DTYPES
                group["state_dtype"] = "float32"
            for states in (self.state[p] for p in group["params"] if p in self.state):
                half = {name: x for name, x in states.items() if isinstance(x, Tensor) and x.dtype == torch.float16}
                states.update({name: x.float() for name, x in half.items()})
            if group["adam"]:
                for p in group["params"]:
                    states = self.state[p]
                    if "step" in states:  # the fused kernels want it beside the parameter, and moments laid as it is
                        states["step"] = states["step"].to(p.device)
                        if not is_sharded(p):
                            states.update({name: laid_as(p, states[name]) for name in ("exp_avg", "exp_avg_sq")})
                continue
            for name, value in self.defaults.items():
                if name != "differentiable":  # which torch adds to the defaults when it loads, and to no group
                    group.setdefault(name, value)  # an option that is younger than what was saved
            for p in group["params"]:
                if p in self.state and self._is_turned(p, group):
                    states = self.state[p]
                    states.update({name: laid_like(x, p.mT) for name, x in states.items() if isinstance(x, Tensor)})


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Undo what ``load_state_dict`` of torch does to states: it casts each to its parameter's dtype.

    In bfloat16 a float32 average loses 16 bits, an index its meaning and a counter 1001 becomes 1000, so that a
    resumed run differs from one that went on. The cast hook cannot be overridden with effect; this copies again.
    """
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items() if p in optimizer.state else ():
            if isinstance(value, Tensor):
                device = p.device if optimizer.state[p][name].device == p.device else value.device
                optimizer.state[p][name] = value.detach().to(device, copy=True)


def subtract(params: list[Tensor], D: Tensor | Factored, factor: float | Tensor, decay: float | Tensor | None) -> None:
    """p <- (1 - decay) p - factor D for each of the ``params`` [m, n], in place.

    Computed in float32 and rounded once, at the end, also for bfloat16 parameters: two roundings would lose more of a
    small update than a second pass costs.
    """
    first, compute = params[0], compute_dtype(params[0])
    if isinstance(factor, float) and factor > torch.finfo(compute).max:
        factor = math.inf  # as it is for a tensor; torch would raise
    if isinstance(D, Factored):
        if len(params) == 1 and first.dtype == compute and D.dtypes == {compute} and not torch.compiler.is_compiling():
            if decay is not None:
                first.sub_(first * decay)  # not by 1 - decay, which is rounded
            D.subtract_from(first.unsqueeze(0), factor)
            return
        if isinstance(factor, Tensor):
            D, factor = D.times(factor), 1.0
        D = D.expression(compute) if torch.compiler.is_compiling() else D.dense(turned=first.stride(-2) == 1)
    if isinstance(factor, Tensor):
        D, factor = D.to(compute) * factor, 1.0
    for p, d in zip(params, D.unbind(0), strict=True):
        # not p.sub_ with a float32 d: in place, mixed dtypes take ten times as long where p is turned
        wide = p if p.dtype in (compute, d.dtype) else p.to(compute)
        if decay is not None:
            wide = p.to(compute)
            wide.sub_(wide * decay)
        wide.sub_(d, alpha=factor)
        if wide is not p:
            p.copy_(wide)


def laid_alike(p: Tensor, *others: Tensor) -> bool:
    """Do all fill memory without gaps, in the same order? torch's fused kernels take that for granted."""
    if not p.numel():
        return True
    wide = [i for i, size in enumerate(p.shape) if size > 1]  # the stride of a side of 1 means nothing
    dense = 1 + sum((p.shape[i] - 1) * p.stride(i) for i in wide) == p.numel()
    return dense and all(x.stride(i) == p.stride(i) for x in others for i in wide)


def laid_as(p: Tensor, x: Tensor) -> Tensor:
    """``x``, of the shape of ``p``, in its memory layout; itself where it is."""
    return x if laid_alike(p, x) else torch.empty_like(p, dtype=x.dtype).copy_(x)


def laid_like(x: Tensor, turned: Tensor) -> Tensor:
    """``x`` in the memory layout of ``turned``, a transposed view, if their shapes agree.

    A pass over two matrices takes ten times as long if one is stored by rows and the other by columns.
    """
    return x.mT.contiguous().mT if x.shape == turned.shape else x


def bias_correction(t: int, beta1: float, beta2: float) -> float:
    """c_t = sqrt(1 - beta_2^t) / (1 - beta_1^t), for a ratio of averages that started at 0."""
    return math.sqrt(1 - beta2**t) / (1 - beta1**t)


def is_update_time(t: int, interval: int, rule: str) -> bool:
    """Is step ``t`` (from 1) one of 1, K, 2K, ... ("printed") or of 1, K + 1, 2K + 1, ... ("zero_based")?"""
    return t == 1 or t % interval == 0 if rule == "printed" else (t - 1) % interval == 0


def last_update_time(t: int, interval: int, rule: str) -> int:
    """The latest update time up to ``t``."""
    return max(1, t // interval * interval) if rule == "printed" else (t - 1) // interval * interval + 1


def compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def stored_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """Of the states of ``p`` that are not of full precision; with 8-bit codes, of those that are not coded."""
    named = group.get("state_dtype")
    own = torch.float32 if p.dtype == torch.float16 else p.dtype  # squares of gradients leave the range of float16
    return getattr(torch, named) if named and named != "8bit" else own


def as_scalar(x: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``x`` as a tensor; a number is written on the device, since a copy from the host would wait for it."""
    return x.to(device, dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def stack(tensors: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    """[B, ...] in ``dtype`` (None: theirs); a view of the tensor itself where there is one and its dtype is right."""
    batch = torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    return batch if dtype is None else batch.to(dtype)
