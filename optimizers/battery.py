"""One battery of behavioural checks for optimizers of weight matrices: ours and anybody's.

    from racs_alice import battery

    for verdict in battery.run(lambda params: MyOptimizer(params, lr=0.01)):
        print(verdict)
    print(battery.measure(lambda params: MyOptimizer(params, lr=0.01)))

``make`` is called with a list of 2-D parameters, or with a list of parameter groups of them. :data:`CHECKS` are what
every optimizer should do. :func:`measure` reports what methods are free to choose, such as how the update scales with
the gradient. Matrices have 6 to 12 rows and columns (16 to 40 in the transformer), so that all of it takes a second:
give a low-rank method a rank of at most 6.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Make = Callable[[list[Any]], torch.optim.Optimizer]
Gradients = list[Tensor | None]

SHAPES = ((6, 12), (12, 6), (8, 8))
DTYPES = (torch.float32, torch.bfloat16)
SOLVERS = ("eigh", "svd", "eig", "eigvalsh", "svdvals")  # that iterate, and may not converge


class CheckFailed(AssertionError):
    """The optimizer does not do what the check asks; the message says what, and what to change."""


class NotApplicable(Exception):
    """The check asks about something that the optimizer does not have."""


def require(fine: Any, sentence: str) -> None:
    if not fine:
        raise CheckFailed(sentence)


# The problems -----------------------------------------------------------------------------------------------------


def gradient(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like a network's: rows and columns of different sizes and a few strong directions, entries near 1.

    Every entry is a bfloat16 number, so that all dtypes see the same gradient.
    """
    m, n = shape
    draw = torch.Generator().manual_seed(seed)
    G = torch.randn(m, 2, generator=draw) @ torch.randn(2, n, generator=draw) + torch.randn(m, n, generator=draw)
    G = G * (torch.linspace(0.5, 2.0, m)[:, None] * torch.linspace(2.0, 0.5, n)[None, :])
    return G.bfloat16().to(dtype)


def gradients(steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Gradients]:
    """[steps][matrix], for matrices of :data:`SHAPES`."""
    return [[gradient(shape, 100 * seed + 10 * t + i, dtype) for i, shape in enumerate(SHAPES)] for t in range(steps)]


def parameters(
    dtype: torch.dtype = torch.float32, size: float = 0.1, shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[nn.Parameter]:
    """Small random matrices; the same ones at every call."""
    draw = torch.Generator().manual_seed(7)
    return [nn.Parameter((size * torch.randn(shape, generator=draw)).to(dtype)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """One update with given gradients."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.dtype, copy=True)
    optimizer.step()


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)


def displacement(make: Make, steps: Sequence[Gradients], params: list[nn.Parameter]) -> list[Tensor]:
    """How far the gradients ``steps`` take ``params``."""
    before = copies(params)
    optimizer = make(params)
    for grads in steps:
        step(optimizer, params, grads)
    return [(p.detach() - w).double() for p, w in zip(params, before, strict=True)]


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    x, y = (torch.cat([d.double().flatten() for d in each]) for each in (a, b))
    return float(x @ y / (x.norm() * y.norm()).clamp_min(1e-300))


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """||a - b|| / ||b||."""
    x, y = (torch.cat([d.double().flatten() for d in each]) for each in (a, b))
    return float((x - y).norm() / y.norm().clamp_min(1e-300))


def decay(optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """0, 1, ..., while every rate falls linearly to 0, so that large rates end as well as small ones."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    for k in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate * (1 - k / steps)
        yield k


class TinyTransformer(nn.Module):
    """The matrices of one LLaMA block between an embedding and an output layer.

    Args:
        vocabulary: number of tokens.
        hidden, heads, intermediate: widths, as in LLaMA.

    ``forward``: tokens [batch, length] -> logits [batch, length, vocabulary].
    """

    def __init__(self, vocabulary: int = 12, hidden: int = 16, heads: int = 2, intermediate: int = 40) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(intermediate, hidden, bias=False)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(hidden, eps=1e-6) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.lm_head(self.norm3(x))


def tokens(vocabulary: int, batch: int = 8, length: int = 12) -> Tensor:
    """[batch, length] sequences in which every token determines the next one: a loss near 0 can be learnt."""
    draw = torch.Generator().manual_seed(3)
    follower = torch.randperm(vocabulary, generator=draw)
    columns = [torch.randint(vocabulary, (batch,), generator=draw)]
    for _ in range(length - 1):
        columns.append(follower[columns[-1]])
    return torch.stack(columns, 1)


# The checks -------------------------------------------------------------------------------------------------------


def check_quadratic(make: Make, steps: int = 60) -> None:
    """The first update goes downhill, and the loss of a quadratic falls."""
    targets = parameters()
    params = [nn.Parameter(w.detach() + 0.1 * gradient(shape, 5)) for w, shape in zip(targets, SHAPES, strict=True)]
    optimizer = make(params)

    def losses() -> list[Tensor]:
        return [(p - t).square().sum() / 2 for p, t in zip(params, targets, strict=True)]

    before, waiting = [float(x.detach()) for x in losses()], list(params)
    for _ in decay(optimizer, steps):
        optimizer.zero_grad()
        sum(losses(), torch.zeros(())).backward()
        earlier = [(p, p.detach().clone(), p.grad.clone()) for p in waiting if p.grad is not None]
        optimizer.step()
        for p, w, G in earlier:
            if not torch.equal(p, w):  # a method may spend its first gradient on its states
                waiting = [other for other in waiting if other is not p]
                require(
                    ((p.detach() - w) * G).sum() < 0,
                    f"the first update of a {_size(p)} matrix does not point against its gradient; "
                    "check the sign, and the transposition of matrices taller than wide",
                )
    for p, was, loss in zip(params, before, losses(), strict=True):
        now = float(loss.detach())
        require(
            now < 0.99 * was,
            f"the loss of a {_size(p)} quadratic went from {was:.3g} to {now:.3g} in {steps} steps; "
            "it has to fall: try another learning rate, then look for an error in the update",
        )


def check_transformer(make: Make, build: Callable[[], nn.Module] = TinyTransformer, steps: int = 30) -> None:
    """The loss of a small transformer falls, although nothing but its attention and MLP matrices moves.

    Args:
        make: the optimizer.
        build: a model whose call with tokens [batch, length] gives logits, or an object with ``logits``.
        steps: updates, with rates that fall linearly to 0.
    """
    from .partition import partition

    torch.manual_seed(0)
    model = build()
    matrices = [p for _, p in partition(model, verbose=False)[0]["params"]]
    for p in model.parameters():
        p.requires_grad_(any(p is matrix for matrix in matrices))
    optimizer = make(matrices)
    vocabulary = next(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    text = tokens(min(vocabulary, 12))
    losses = []
    for _ in decay(optimizer, steps):
        logits = model(text)
        logits = getattr(logits, "logits", logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(
        losses[-1] < losses[0] - 0.003,
        f"the loss of a transformer went from {losses[0]:.4f} to {losses[-1]:.4f} in {steps} steps, although each of "
        "its tokens determines the next; try another learning rate, then look for an error in the update",
    )


def check_dtypes(make: Make) -> None:
    """bfloat16 parameters stay bfloat16, and their updates point where those of float32 ones do.

    The first update does not count: in the eigenbases of a single gradient, that gradient is diagonal, and a method that
    divides its entries by their sizes (SOAP) makes unit entries of what rounding left beside the diagonal.
    """
    moved: dict[torch.dtype, list[Tensor]] = {}
    for dtype in DTYPES:
        params = parameters(dtype, size=0.0)
        optimizer = make(params)
        moved[dtype] = [torch.zeros(shape) for shape in SHAPES]
        for t, grads in enumerate(gradients(5, dtype=dtype)):
            step(optimizer, params, grads)
            require(
                all(p.dtype == dtype for p in params),
                f"{_name(dtype)} parameters changed their dtype; write updates in place",
            )
            require(finite(params), f"{_name(dtype)} parameters are not finite after ordinary gradients")
            for p, sum_of_updates in zip(params, moved[dtype], strict=True):
                if t > 0:
                    sum_of_updates += p.detach().float()
                p.detach().zero_()  # so that it is the update that is compared, not the rounding of the weights
    for shape, a, b in zip(SHAPES, moved[torch.bfloat16], moved[torch.float32], strict=True):
        similarity = cosine([a], [b])
        require(
            similarity > 0.9,
            f"the updates of a bfloat16 {shape[0]} x {shape[1]} matrix point elsewhere than those of a float32 one "
            f"(cosine {similarity:.2f}); compute the update in float32 and keep sensitive states (averages with a decay "
            "near 1, bases) in float32",
        )


def check_none_gradients(make: Make) -> None:
    """Parameters without a gradient stay as they are; they may appear, disappear and come back."""
    params, start = parameters(), copies(parameters())
    optimizer = make(params)
    for p in params:
        p.grad = None
    optimizer.step()
    require(same(params, start), "a step without any gradient changed parameters; skip those whose grad is None")
    seen = [0, 0, 0]
    for t, present in enumerate(((0, 2), (0, 1), (1, 2), (0, 1, 2), (1,))):
        before = copies(params)
        step(optimizer, params, [g if i in present else None for i, g in enumerate(gradients(5)[t])])
        for i, (p, w) in enumerate(zip(params, before, strict=True)):
            moved = not torch.equal(p, w)
            require(i in present or not moved, "a parameter whose grad is None was changed; skip it")
            require(
                i not in present or moved or not seen[i],  # the first gradient may go into states alone
                "a parameter with a gradient did not move in a step in which another one had none",
            )
        seen = [count + (i in present) for i, count in enumerate(seen)]
    require(finite(params), "parameters that skip steps end up not finite; keep a step counter for each of them")


def check_state_dict(make: Make) -> None:
    """A run resumed from the state dict, saved to bytes, continues bit for bit, in float32 and bfloat16."""
    for dtype in DTYPES:
        params = parameters(dtype)
        optimizer = make(params)
        history = gradients(10, dtype=dtype)
        torch.manual_seed(1)

        def advance(
            params: list[nn.Parameter], optimizer: torch.optim.Optimizer, t: int, history: Any = history
        ) -> None:
            # the weights take part, so that a difference is not forgotten
            grads = [g + p.detach() for g, p in zip(history[t], params, strict=True)]
            step(optimizer, params, grads)

        for t in range(4):
            advance(params, optimizer, t)
        for group in optimizer.param_groups:
            if group.get("lr") is not None:
                group["lr"] = group["lr"] / 2  # as a schedule would; it has to come back from the state dict
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        try:
            loaded = torch.load(buffer, weights_only=True)
        except Exception as error:
            raise CheckFailed(
                "torch.load(..., weights_only=True) refuses the state dict; keep only tensors, numbers, text, lists "
                f"and dictionaries in it ({str(error).splitlines()[0]})"
            ) from error
        resumed_params = [nn.Parameter(p.detach().clone()) for p in params]
        torch.manual_seed(2)
        resumed = make(resumed_params)
        resumed.load_state_dict(loaded)
        for t in range(4, 10):
            advance(params, optimizer, t)
            advance(resumed_params, resumed, t)
            require(
                same(params, resumed_params),
                f"a resumed {_name(dtype)} run differs from the uninterrupted one after {t - 3} steps; keep everything that "
                "the next update needs in state or param_groups, and note that torch's load_state_dict casts states "
                "to the dtype of their parameter",
            )


def check_groups(make: Make) -> None:
    """Two groups with different learning rates and weight decays are each updated with their own."""

    def moved(steps: int, **second: float) -> tuple[Tensor, Tensor]:
        a, b = parameters()[:2]
        start = copies([a, b])
        optimizer = make([{"params": [a]}, {"params": [b]}])
        require(
            len(optimizer.param_groups) == 2, "two parameter groups were given, and the optimizer keeps another number"
        )
        for key, value in second.items():
            optimizer.param_groups[1][key] = optimizer.param_groups[1][key] * value if key == "lr" else value
        for t in range(steps):
            step(optimizer, [a, b], gradients(steps)[t][:2])
        return a.detach() - start[0], b.detach() - start[1]

    probe = make([{"params": [parameters()[0]]}]).param_groups[0]
    if probe.get("lr") is None:
        raise NotApplicable("its groups have no lr")
    (a, b), (a3, b3) = moved(1), moved(1, lr=3.0)
    if not b.any():  # the first gradient may go into states alone
        (a, b), (a3, b3) = moved(2), moved(2, lr=3.0)
    require(torch.equal(a, a3), "the learning rate of the second group changes the update of the first")
    require(
        distance([b3], [3 * b]) < 1e-2,
        "a parameter group with three times the learning rate does not move three times as far; "
        'read group["lr"] at every step, which learning-rate schedules need as well',
    )
    if "weight_decay" in probe:
        (a, b), (aw, bw) = moved(3, weight_decay=0.0), moved(3, weight_decay=0.5)
        require(torch.equal(a, aw), "the weight decay of the second group changes the update of the first")
        require(
            not torch.equal(b, bw),
            'the weight decay of a group has no effect; read group["weight_decay"] at every step',
        )


def check_determinism(make: Make) -> None:
    """The same gradients give the same weights bit for bit, whatever the global random state."""
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(displacement(make, gradients(7), parameters()))
    require(
        same(*results),
        "updates depend on torch's global random state, so that ranks diverge and a resumed run differs; draw from a "
        "generator seeded by a seed, the parameter's name and the step",
    )


def check_closure(make: Make) -> None:
    """``step(closure)`` evaluates the closure with gradients on and returns its loss."""
    params = parameters()
    optimizer = make(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    start = copies(params)
    expected = sum(float(p.square().sum()) for p in start)
    returned = optimizer.step(closure)  # type: ignore[arg-type]  # torch annotates floats, and takes losses
    require(
        returned is not None and math.isclose(float(torch.as_tensor(returned).detach()), expected, rel_tol=1e-5),
        "step(closure) does not return the loss of the closure; evaluate it under torch.enable_grad() and return it",
    )
    optimizer.step(closure)  # type: ignore[arg-type]
    require(not same(params, start), "step(closure) does not move the parameters")


def _stays_finite(make: Make, kind: str, extreme: Callable[[Tensor], Tensor]) -> None:
    """Ordinary gradients and extreme ones take turns, from either of them on, in float32 and bfloat16."""
    for dtype in DTYPES:
        for first in (0, 1):
            params = parameters(dtype)
            optimizer = make(params)
            for t, grads in enumerate(gradients(5, dtype=dtype)):
                step(optimizer, params, grads if t % 2 == first else [extreme(g) for g in grads if g is not None])
                require(
                    finite(params),
                    f"{_name(dtype)} parameters are not finite after {kind}; divide the "
                    "gradient by its largest entry before squares or products of it are formed, and bound every "
                    "denominator from below",
                )


def check_zero(make: Make) -> None:
    """Gradients that are all zero keep the weights finite, and do not stop the matrix for ever."""
    _stays_finite(make, "a zero gradient", torch.zeros_like)
    params = parameters()
    optimizer = make(params)
    for grads in gradients(4):
        step(optimizer, params, [torch.zeros_like(p) for p in params])
        before = copies(params)
        step(optimizer, params, grads)
    require(
        all(not torch.equal(p, w) for p, w in zip(params, before, strict=True)),
        "after zero gradients, ordinary ones no longer move the parameters",
    )


def check_tiny(make: Make) -> None:
    """Gradients of 1e-30, whose squares are 0 in float32, keep the weights finite."""
    _stays_finite(make, "a gradient of 1e-30", lambda g: 1e-30 * g)


def check_huge(make: Make) -> None:
    """Gradients of 1e30, whose squares are infinite in float32, keep the weights finite."""
    _stays_finite(make, "a gradient of 1e30", lambda g: 1e30 * g)


def check_rank_deficient(make: Make) -> None:
    """Gradients of rank one keep the weights finite."""
    _stays_finite(make, "a gradient of rank 1", lambda g: (g[:, :1].float() @ g[:1].float()).to(g.dtype))


def check_single_row(make: Make) -> None:
    """Gradients with one row, or one column, that is not zero keep the weights finite."""

    def row(g: Tensor) -> Tensor:
        return torch.zeros_like(g).index_copy_(0, torch.tensor([2]), g[2:3])

    _stays_finite(make, "a gradient with a single row", row)
    _stays_finite(make, "a gradient with a single column", lambda g: row(g.mT).mT)


def check_eigen_solver(make: Make, always: bool = False) -> None:
    """A solver of torch.linalg that fails at every other call does not end the run.

    So a retry (in float64, on the CPU, with a ridge), another solver or the last basis all count as a way out.

    Args:
        make: the optimizer.
        always: every call of an iterative solver fails, which only the last basis or another solver outlives.
    """
    used = solvers(make)
    if not used:
        raise NotApplicable("it calls no solver of torch.linalg")
    for name in used:
        params = parameters()
        with _patched(name, lambda call: always or call % 2 == 1):
            try:
                moved = displacement(make, gradients(7), params)
            except torch.linalg.LinAlgError as error:
                raise CheckFailed(
                    f"a torch.linalg.{name} that does not converge ends the run; catch torch.linalg.LinAlgError and "
                    "try again in float64, or keep the last basis"
                ) from error
        require(finite(moved), f"after a torch.linalg.{name} that does not converge, the weights are not finite")


@contextmanager
def _patched(name: str, fails: Callable[[int], bool]) -> Iterator[list[str]]:
    """Record the calls of ``torch.linalg.<name>``; the k-th of them raises if ``fails(k)``."""
    original = getattr(torch.linalg, name)
    calls: list[str] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if fails(len(calls)):
            raise torch.linalg.LinAlgError(f"{name}: did not converge (this failure is a check)")
        return original(*args, **kwargs)

    setattr(torch.linalg, name, stand_in)
    try:
        yield calls
    finally:
        setattr(torch.linalg, name, original)


def solvers(make: Make) -> tuple[str, ...]:
    """Which of :data:`SOLVERS` the optimizer calls, through ``torch.linalg.<name>``, within 7 steps."""
    called = []
    for name in SOLVERS:
        with _patched(name, lambda call: False) as calls:
            displacement(make, gradients(7), parameters())
        called += calls[:1]
    return tuple(called)


@dataclass(frozen=True)
class Check:
    """One check: raises :class:`CheckFailed` or :class:`NotApplicable`, or returns."""

    name: str
    meaning: str
    function: Callable[[Make], None]


CHECKS = tuple(
    Check(function.__name__.removeprefix("check_"), (function.__doc__ or "").strip().splitlines()[0], function)
    for function in (
        check_quadratic,
        check_transformer,
        check_dtypes,
        check_none_gradients,
        check_state_dict,
        check_groups,
        check_determinism,
        check_closure,
        check_zero,
        check_tiny,
        check_huge,
        check_rank_deficient,
        check_single_row,
        check_eigen_solver,
    )
)


@dataclass(frozen=True)
class Verdict:
    """What one check found. ``outcome``: "pass", "fail" or "not applicable"; ``text``: why, or ""."""

    check: Check
    outcome: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.check.name}: {self.outcome}" + (f" ({self.text})" if self.text else "")


def verdict(check: Check, make: Make) -> Verdict:
    """Run one check; torch's global random state is left as it was. Whatever an optimizer raises is a failure."""
    with torch.random.fork_rng(devices=[]):
        try:
            check.function(make)
        except NotApplicable as reason:
            return Verdict(check, "not applicable", str(reason))
        except CheckFailed as failure:
            return Verdict(check, "fail", str(failure))
        except Exception as error:
            return Verdict(check, "fail", f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}")
    return Verdict(check, "pass")


def run(make: Make) -> list[Verdict]:
    """All checks, in the order of :data:`CHECKS`.

    Args:
        make: builds a fresh optimizer over a list of 2-D parameters, or over a list of groups of them.
    """
    return [verdict(check, make) for check in CHECKS]


# What methods are free to choose ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Properties:
    """What :func:`measure` finds; nothing here is right or wrong by itself.

    Attributes:
        scale_degree: k of update(c G) = c^k update(G), with c common to all gradients of a run: 0 for updates that do
            not depend on the scale of the gradient, 1 for gradient descent; None if there is no such k.
        transposition: a transposed gradient of a matrix that is not square gives the transposed update.
        elementwise: an entry's update depends on the gradients of that entry alone.
        stateless: an update depends on its own gradient only.
        cosine_to_adam: between the last updates of the optimizer and of torch's Adam with its default betas, of two
            matrices together, one of them with weights five times as large.
        solvers: names in torch.linalg that it calls.
        state_per_weight: numbers in tensors of the state, without 0-d ones, for each weight of a 6 x 12 matrix.
    """

    scale_degree: float | None
    transposition: bool
    elementwise: bool
    stateless: bool
    cosine_to_adam: float
    solvers: tuple[str, ...]
    state_per_weight: float

    @property
    def differs_from_adam(self) -> bool:
        return self.cosine_to_adam < 0.99


def measure(make: Make, steps: int = 6, tolerance: float = 1e-2) -> Properties:
    """Measure on one 6 x 12 matrix, in float64 where the optimizer takes it.

    Args:
        make: as for :func:`run`.
        steps: gradients per trajectory.
        tolerance: relative difference up to which two updates count as equal.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dtype = _widest(make)
        history = [gradient(SHAPES[0], t, dtype) for t in range(steps)]
        start = parameters(dtype)[0].detach()

        def last(history: list[Tensor], start: Tensor = start) -> Tensor:
            return _last_update(make, history, start)[0]

        update = last(history)
        one = torch.ones_like(update)
        one[2, 3] = -30.0  # changes the gradients of a single entry

        def equal(a: Tensor, b: Tensor) -> bool:
            return distance([a], [b]) < tolerance

        other = [gradient(SHAPES[0], 50 + t, dtype) for t in range(steps - 1)]
        return Properties(
            scale_degree=_degree(update, last([64.0 * G for G in history]), 64.0, tolerance),
            transposition=equal(last([G.mT.contiguous() for G in history], start.mT.contiguous()).mT, update),
            elementwise=distance([last([G * one for G in history])[one > 0]], [update[one > 0]]) < 1e-6,
            stateless=equal(last([*other, history[-1]]), update),
            cosine_to_adam=cosine(_two_updates(make, dtype, steps), _two_updates(torch.optim.Adam, dtype, steps)),
            solvers=solvers(make),
            state_per_weight=_last_update(make, history, start)[1] / update.numel(),
        )


def _widest(make: Make) -> torch.dtype:
    try:
        displacement(make, gradients(2, dtype=torch.float64), parameters(torch.float64))
    except Exception:
        return torch.float32
    return torch.float64


def _last_update(make: Make, history: list[Tensor], start: Tensor) -> tuple[Tensor, int]:
    p = nn.Parameter(start.clone())
    optimizer = make([p])
    for G in history:
        before = p.detach().clone()
        step(optimizer, [p], [G])
    values = [v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.ndim]
    return p.detach() - before, sum(v.numel() for v in values)


def _two_updates(make: Make, dtype: torch.dtype, steps: int) -> list[Tensor]:
    params = parameters(dtype, shapes=SHAPES[:1]) + parameters(dtype, size=0.5, shapes=SHAPES[:1])
    optimizer = make(params)
    for t in range(steps):
        before = copies(params)
        step(optimizer, params, [gradient(SHAPES[0], 10 * t + i, dtype) for i in range(2)])
    return [p.detach() - w for p, w in zip(params, before, strict=True)]


def _degree(update: Tensor, scaled: Tensor, c: float, tolerance: float) -> float | None:
    """k with scaled = c^k update, to the nearest quarter."""
    sizes = float(update.norm()), float(scaled.norm())
    if min(sizes) == 0 or not math.isfinite(sum(sizes)):
        return None
    k = round(4 * math.log(sizes[1] / sizes[0]) / math.log(c)) / 4
    return k + 0.0 if distance([scaled], [c**k * update]) < tolerance else None  # + 0.0: no negative zero


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(p: Tensor) -> str:
    return f"{p.shape[0]} x {p.shape[1]}"
