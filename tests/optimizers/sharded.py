"""What each of four ranks of test_sharding.py does: python -m tests.optimizers.sharded FOLDER

One interpreter imports everything and forks the ranks, by the engine of torchrun: imports are most of what ranks cost. Ranks
record facts, in FOLDER/found-RANK.pt; the tests judge them.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from optimizers import METHODS, Alice, MatrixOptimizer, create, sharding
from optimizers.memory import llama, measured_state_bytes
from optimizers.sharding import Team, is_sharded, shard

RANKS = 4
STEPS = 8
ROWS = 96
# Libraries' methods that work on shards as they are; none of them needs shard().
ELEMENTWISE = ("adam", "adamw", "lion", "sgd", "signum")
# Methods that fully_shard cannot serve, and why
NOT_SHARDED = {"adam_mini": "its blocks are cut from embedding and norms too, which have to be whole"}
LLAMA = {"hidden_size": 32, "intermediate_size": 86, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
HYBRID = ("alice", "racs", "adam", "sgd")
# Methods whose library has no float64
SINGLE = ("adam_8bit",)

Data = tuple[Tensor, Tensor, Tensor, list[Tensor]]
Sizes = tuple[tuple[int, int], ...]
Facts = dict[Any, Any]


class Layer(nn.Linear):
    """tanh(W x), and <W, R> for a random R: part of the loss, so that the gradient's singular values are separate."""

    def forward(self, x: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x).tanh(), (self.weight * R).sum()


# (inputs, outputs) of the layers. Wide, tall and square; the last leaves nothing to the fourth rank; 64 x 72 is enough for
# 8-bit codes.
SIZES = ((10, 72), (72, 64), (64, 9), (9, 9), (9, 3))
# For methods that take all eigenvectors of G G^T and of G^T G: one of them has a kernel unless G is square, and rounding
# chooses the basis of a kernel.
SQUARE = ((10, 10),) * 5
BOTH_SIDES = ("soap", "soap_factored")


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, sizes: Sizes = SIZES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sizes = sizes
        self.embedding = nn.Embedding(13, sizes[0][0])
        self.mlp = nn.ModuleList([Layer(a, b, bias=False) for a, b in sizes])
        self.norm = nn.LayerNorm(sizes[3][0])
        # for Adam-mini
        self.config = SimpleNamespace(num_attention_heads=2, hidden_size=64, head_dim=4)
        self.to(dtype)

    def forward(self, ids: Tensor, x: Tensor, y: Tensor, Rs: list[Tensor]) -> Tensor:
        x, pulls = self.embedding(ids) + x, []
        for i, (layer, R) in enumerate(zip(self.mlp, Rs, strict=True)):
            x, pull = layer(self.norm(x) if i == 3 else x, R)
            pulls.append(pull)
        return (x - y).square().mean() + torch.stack(pulls).sum()


def batch(t: int, model: nn.Module) -> Data:
    """Tokens, inputs, targets, and an R for each layer: those of step ``t``."""
    dtype = next(model.parameters()).dtype
    sizes: Any = model.sizes
    g = torch.Generator().manual_seed(t)
    shapes = [(ROWS, sizes[0][0]), (ROWS, sizes[-1][1]), *((b, a) for a, b in sizes)]
    x, y, *Rs = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return torch.randint(0, 13, (ROWS,), generator=g), x, y, [0.02 * R for R in Rs]


def share(data: Data, ranks: int, rank: int) -> Data:
    """This rank's rows."""
    ids, x, y, Rs = data
    return ids.chunk(ranks)[rank], x.chunk(ranks)[rank], y.chunk(ranks)[rank], Rs


def make(name: str, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    """A method with refreshes and switching at several of the ``STEPS``."""
    build, preset = METHODS[name]
    small = {"rank": 3, "leading": 1, "update_interval": 3}
    options = {key: x for key, x in small.items() if key in inspect.signature(build).parameters and key not in preset}
    if name == "any":
        options = {"target": "torch.optim.Muon", "lr": 0.02}
    return create(name, model, verbose=False, **{**options, **more})


def weights(model: nn.Module) -> list[Tensor]:
    """Copies, whole."""
    return [p.full_tensor() if is_sharded(p) else p.detach().clone() for p in model.parameters()]  # type: ignore[attr-defined]


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """As torchtitan does, a part and then the rest, where two ranks share weights; more collectives would only cost time."""
    if mesh.size(-1) == 2:
        fully_shard(model.mlp[1], mesh=mesh)  # type: ignore[index]
    return fully_shard(model, mesh=mesh)


def advance(
    model: nn.Module, optimizer: torch.optim.Optimizer, part: Callable[[Data], Data] = lambda data: data,
    first: int = 0, steps: int = STEPS,
) -> list[float]:  # fmt: skip
    """A training loop that knows nothing of shards; returns this rank's losses."""
    losses = []
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(*part(batch(t, model)))
        loss.backward()
        losses.append(loss.item())
        if t % 3 == 0 and any("estimator" in group for group in optimizer.param_groups):
            matrices = [p for group in optimizer.param_groups if "estimator" in group for p in group["params"]]
            optimizer.update_estimate({p: p.grad.square() for p in matrices})  # type: ignore[attr-defined]
        optimizer.step()
    return losses


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Every method -------------------------------------------------------------------------------------------------------


def found(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> Facts:
    return {"losses": losses, "weights": weights(model), "bytes": matrix_bytes(optimizer)}


def matrix_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the states of matrices on this rank."""
    matrices = {id(p) for group in optimizer.param_groups if not group.get("adam") for p in group["params"]}
    return measured_state_bytes(optimizer, lambda p, *_: id(p) in matrices)


def alone(name: str, exact: bool, **options: Any) -> Facts:
    """One process with the whole batch; ``exact``: in float64."""
    model = network(name, exact)
    optimizer = make(name, model, **options)
    return found(model, optimizer, advance(model, optimizer))


def network(name: str, exact: bool) -> Network:
    if not exact:
        return Network()
    return Network(torch.float32 if name in SINGLE else torch.float64, SQUARE if name in BOTH_SIDES else SIZES)


def replicated(name: str, group: dist.ProcessGroup | None = None) -> Facts:
    """The same gradients on all ranks, matrices divided."""
    model = Network()
    optimizer = make(name, model)
    shard(optimizer, group)
    return found(model, optimizer, advance(model, optimizer))


def fully_sharded(name: str, mesh: DeviceMesh, exact: bool, **options: Any) -> Facts:
    """Weights divided among the ranks; rows as well if ``exact``, else the same on all."""
    model = sharded(network(name, exact), mesh)
    optimizer = make(name, model, **options)
    if not isinstance(optimizer, MatrixOptimizer) and name not in ELEMENTWISE:
        shard(optimizer)
    if not exact:
        return found(model, optimizer, advance(model, optimizer))
    ranks, rank = mesh.size(), mesh.get_local_rank() if mesh.ndim == 1 else dist.get_rank()
    losses = torch.tensor(advance(model, optimizer, partial(share, ranks=ranks, rank=rank)), dtype=torch.float64)
    for dim in range(mesh.ndim):
        dist.all_reduce(losses, group=mesh.get_group(dim))
    return found(model, optimizer, (losses / ranks).tolist())


def every_method(rank: int) -> Facts:
    facts: Facts = {}
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "within"))
    all_ranks = init_device_mesh("cpu", (RANKS,))
    for name in list(METHODS)[rank::RANKS]:
        facts["alone", name] = alone(name, exact=False)
        facts["alone exact", name] = alone(name, exact=True)
        facts["alone, Adam at rest", name] = alone(name, exact=False, adam_lr=0.0)
    for name in METHODS:
        facts["replicated 4", name] = replicated(name)
    for name in METHODS:
        if name not in NOT_SHARDED:
            facts["sharded 4", name] = fully_sharded(name, all_ranks, exact=True)
    pair = pairs["within"]
    for name in list(METHODS)[rank // 2 :: 2]:
        facts["replicated 2", name] = replicated(name, pair.get_group())
        if name not in NOT_SHARDED:
            facts["sharded 2", name] = fully_sharded(name, pair, exact=True)
    for name in list(METHODS)[rank // 2 :: 2]:
        if name not in (*NOT_SHARDED, *ELEMENTWISE):
            facts["sharded 2, Adam at rest", name] = fully_sharded(name, pair, exact=False, adam_lr=0.0)
    for name in HYBRID:
        facts["hybrid", name] = fully_sharded(name, pairs, exact=True)
    return facts


# Parts ----------------------------------------------------------------------------------------------------------------


def teams(rank: int) -> Facts:
    """What collect and deliver do with layouts of all kinds, in one round and in many."""
    mesh = init_device_mesh("cpu", (RANKS,))
    g = torch.Generator().manual_seed(0)
    layouts = [((8, 6), 0), ((7, 5), 0), ((2, 9), 0), ((1, 1), 0), ((6, 8), 1), ((6, 7), 1), ((11, 3), 1), ((5, 4), 0)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64] * 2
    wholes = [torch.randn(shape, generator=g).to(dtype) for (shape, _), dtype in zip(layouts, dtypes, strict=True)]
    params = [
        distribute_tensor(W, mesh, [Shard(dim)], src_data_rank=None)
        for W, (_, dim) in zip(wholes, layouts, strict=True)
    ]
    team = Team(params, mesh.get_group())
    facts: Facts = {"owners": team.owners, "empty": sum(p.to_local().numel() == 0 for p in params)}
    original = sharding.ROUND_ENTRIES
    for entries in (original, 40, 1):
        sharding.ROUND_ENTRIES = entries
        for left_out in ([], [params[0], params[5]]):
            there = [p for p in params if not any(p is x for x in left_out)]
            whole = team.collect({p: p for p in there})
            right = {p: W for p, W in zip(params, wholes, strict=True) if p in set(there) & set(team.mine())}
            facts["collected", entries, len(there)] = whole.keys() == right.keys() and all(
                torch.equal(whole[p], W) for p, W in right.items()
            )
            back = {p: torch.full_like(p, 7.0) for p in there}
            team.deliver({p: -2 * W for p, W in right.items()}, back)
            facts["delivered", entries, len(there)] = all(
                x.dtype == p.dtype and torch.equal(x.to_local(), -2 * p.to_local()) for p, x in back.items()
            )
    sharding.ROUND_ENTRIES = original
    return facts


LAYOUTS = ("alone", "replicated", "sharded")


def laid_out(
    layout: str, make_optimizer: Callable[[Network], torch.optim.Optimizer], unused: bool = False
) -> tuple[Any, Any]:
    """A network in float64 and its optimizer, for gradients that are the same on all ranks."""
    model: Any = Network(torch.float64)
    if unused:
        model.unused = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))
    if layout == "sharded":
        model = sharded(model, init_device_mesh("cpu", (RANKS,)))
    optimizer = make_optimizer(model)
    if layout != "alone" and not isinstance(optimizer, torch.optim.AdamW):
        shard(optimizer)
    return model, optimizer


def small(name: str, **more: Any) -> Callable[[Network], torch.optim.Optimizer]:
    return lambda model: make(name, model, **more)


def without_names(model: Network) -> Alice:
    """Several groups, rates as tensors, one parameter without a gradient, and one left for later."""
    W = [layer.weight for layer in model.mlp]
    named = {id(p) for p in W}
    others = [p for p in model.parameters() if id(p) not in named and p is not model.unused]  # type: ignore[comparison-overlap]
    groups = [
        {"params": W[:2], "lr": torch.tensor(0.02)},
        {"params": [model.unused, *W[2:4]], "rank": 2, "leading": 1},
        {"params": others, "adam": True, "lr": torch.tensor(1e-3)},
    ]
    return Alice(groups, lr=0.01, rank=3, leading=1, update_interval=3)


def many_groups(layout: str) -> Facts:
    model, optimizer = laid_out(layout, without_names, unused=True)
    facts: Facts = {"same owners": shard(optimizer) is shard(optimizer)} if layout != "alone" else {}
    advance(model, optimizer, steps=3)
    gradients = {p: p.grad for p in model.parameters()}
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.step()
    facts["gradients are there"] = all(p.grad is G for p, G in gradients.items())
    facts["groups are the same"] = all(
        a.keys() == b.keys() and all(x is y for x, y in zip(a["params"], b["params"], strict=True))
        for a, b in zip(groups, optimizer.param_groups, strict=True)
    )
    optimizer.add_param_group({"params": [model.mlp[4].weight], "lr": 0.03})
    advance(model, optimizer, first=3)
    facts["weights"] = weights(model)
    try:
        optimizer.step(lambda: 0.0)
    except ValueError as error:
        facts["closure"] = str(error)
    return facts


def rests_first(layout: str, adam: bool, gradient: str) -> Facts:
    """Two matrices, so that two ranks own none; the first step has a rate of 0.

    ``gradient``: "zero", as DCP makes states; "one": of a single matrix; "all".
    """

    def two(model: Network) -> torch.optim.Optimizer:
        if adam:
            return make("alice", model, matrices=[r"mlp\.[02]"])
        named = [(f"mlp.{i}", model.mlp[i].weight) for i in (0, 2)]
        return Alice(named, rank=3, leading=1, update_interval=3)

    model, optimizer = laid_out(layout, two)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(*batch(99, model)).backward()
    for p in model.parameters():
        if p.grad is not None and (gradient == "zero" or (gradient == "one" and p is not model.mlp[2].weight)):
            p.grad.zero_()
    optimizer.step()
    counted = {float(state["step"]) for state in optimizer.state.values()}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    advance(model, optimizer, steps=5)
    return {"weights": weights(model), "counted": counted}


def reload(layout: str, name: str) -> bool:
    """Whether four steps, and four more by new objects with the same states, are the eight of one."""
    model, optimizer = laid_out(layout, small(name))
    advance(model, optimizer, steps=4)
    new, other = laid_out(layout, small(name))
    new.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(model, optimizer, first=4, steps=4)
    advance(new, other, first=4, steps=4)
    return same(weights(model), weights(new))


def by_torch_save(folder: Path) -> Facts:
    """Four steps with matrices divided, saved by one rank, and four more: on all ranks, by one, and on one process."""
    facts: Facts = {}
    for name in ("alice", "galore_8bit", "any"):
        model, optimizer = laid_out("replicated", small(name))
        advance(model, optimizer, steps=4)
        whole, share_of_first = shard(optimizer).gather(), [optimizer.state_dict()]
        dist.broadcast_object_list(share_of_first, src=0)
        path = folder / f"gathered-{name}.pt"
        if whole is not None:
            torch.save(whole, path)
        dist.barrier()
        weights_then = copy.deepcopy(model.state_dict())
        advance(model, optimizer, first=4, steps=4)
        facts[name, "ranks with a state dict"] = whole is not None
        for layout in ("replicated", "alone"):
            new, other = laid_out(layout, small(name))
            new.load_state_dict(weights_then)
            other.load_state_dict(torch.load(path, weights_only=True))
            facts[name, layout, "states"] = len(other.state)
            advance(new, other, first=4, steps=4)
            facts[name, layout] = same(weights(model), weights(new))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                facts[name, layout, "share"] = refusal(lambda: other.load_state_dict(share_of_first[0]))  # noqa: B023
                unsigned = {key: x for key, x in share_of_first[0].items() if key != "share"}
                if layout == "replicated":
                    other.load_state_dict(unsigned)
                    facts[name, layout, "warning"] = " ".join(str(warning.message) for warning in caught)
    return facts


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def divided_afterwards() -> list[Tensor]:
    """Weights of a model that was sharded after its optimizer was made, which was then given the shards, as by Accelerate."""
    model: Any = Network(torch.float64)
    optimizer = make("alice", model)
    names = {id(p): name for name, p in model.named_parameters()}
    model = sharded(model, init_device_mesh("cpu", (RANKS,)))
    parts = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parts[names[id(p)]] for p in group["params"]]
    advance(model, optimizer)
    return weights(model)


def by_dcp(layout: str, flat: bool, folder: Path) -> bool:
    """The same through a checkpoint, as torchtitan saves (``flat``): with state dicts of torch.distributed.checkpoint."""
    # Strict, the other kind would want states of others' matrices, too.
    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=flat)
    path = folder / f"{layout}-{flat}"
    model, optimizer = laid_out(layout, small("alice"))
    advance(model, optimizer, steps=4)
    dcp.save(states(model, optimizer, options), checkpoint_id=path)
    advance(model, optimizer, first=4, steps=4)
    return same(weights(model), go_on(path, options, *laid_out(layout, small("alice"))))


def on_two(folder: Path, group: dist.ProcessGroup, mesh: DeviceMesh) -> list[Tensor]:
    """The weights after a run of four ranks has gone on with two."""
    model = sharded(Network(torch.float64), mesh)
    return go_on(folder / "sharded-True", StateDictOptions(flatten_optimizer_state_dict=True), model,
                 make("alice", model), group)  # fmt: skip


def states(model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions) -> dict[str, Any]:
    found = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": get_model_state_dict(model), "optimizer": found}


def go_on(
    path: Path, options: StateDictOptions, model: nn.Module, optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:  # fmt: skip
    loaded = states(model, optimizer, options)
    dcp.load(loaded, checkpoint_id=path, process_group=group)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options)
    advance(model, optimizer, first=4, steps=4)
    return weights(model)


def fails() -> Facts:
    """A step that raises on ranks that own something: Sophia without its estimate."""
    facts: Facts = {}
    for layout in LAYOUTS[1:]:
        model, optimizer = laid_out(layout, small("sophia_h"))
        model(*batch(0, model)).backward()
        gradients = {p: p.grad for p in model.parameters()}
        before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        try:
            optimizer.step()
        except ValueError as error:
            facts[layout, "error"] = str(error)
        facts[layout, "gradients"] = all(p.grad is G for p, G in gradients.items())
        after = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        facts[layout, "groups"] = before == after
        advance(model, optimizer, steps=1)  # the steps of matrices that had been reached are counted
        facts[layout, "weights"] = weights(model)
    return facts


class Moody(torch.optim.SGD):
    """Calls its parent's step, which torch has given hooks of its own; fails when told to."""

    moods: tuple[str, ...] = ()

    def step(self, closure: Any = None) -> Any:
        mood, *rest = self.moods or ("calm",)
        self.moods = tuple(rest)
        if mood == "cross":
            raise RuntimeError("not today")
        return super().step(closure)


def of_a_class(cls: type[torch.optim.Optimizer], **options: Any) -> Callable[[Network], torch.optim.Optimizer]:
    def made(model: Network) -> torch.optim.Optimizer:
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # its step has hooks from now on
        return cls([layer.weight for layer in model.mlp], lr=0.1, **options)

    return made


def strangers(layout: str) -> Facts:
    """Classes of others: a step that calls another step, one that fails, states made before the first step."""
    facts: Facts = {}
    model, optimizer = laid_out(layout, of_a_class(Moody, momentum=0.9))
    advance(model, optimizer, steps=2)
    model(*batch(9, model)).backward()
    optimizer.moods = ("cross",)
    try:
        optimizer.step()
    except RuntimeError as error:
        facts["error"] = str(error)
    advance(model, optimizer, first=2, steps=2)
    facts["moody"] = weights(model)
    try:
        model, optimizer = laid_out(layout, of_a_class(torch.optim.Adagrad))
        facts["states"] = len(optimizer.state)
        advance(model, optimizer, steps=3)
        facts["adagrad"] = weights(model)
    except ValueError as error:
        facts["refusal"] = str(error)
    model, optimizer = laid_out(layout, small("alice"))
    try:
        copy.deepcopy(optimizer)
    except (TypeError, RuntimeError) as error:
        facts["copy"] = str(error)
    return facts


def refused() -> Facts:
    """Layouts that cut a matrix otherwise."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    facts: Facts = {}
    for placements in ([Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Replicate()]):
        p = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, placements, src_data_rank=None))
        try:
            Alice([p], rank=2, leading=1)
        except ValueError as error:
            facts[str(placements)] = str(error)
    return facts


def measured(group: dist.ProcessGroup | None) -> int:
    """Bytes of the states of a LLaMA's matrices on this rank after a step."""
    model = llama(LLAMA, torch.float32, "cpu")
    optimizer = create("alice", model, rank=8, leading=4, verbose=False)
    shard(optimizer, group)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    return matrix_bytes(optimizer)


def parts(rank: int, folder: Path) -> Facts:
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "within"))
    pair = pairs["within"].get_group()
    facts: Facts = {"teams": teams(rank), "refused": refused(), "bytes": (measured(None), measured(pair))}
    facts["fails"] = fails()
    for layout in LAYOUTS:
        facts["strangers", layout] = strangers(layout)
        facts["groups", layout] = many_groups(layout)
        for adam, gradient in ((True, "zero"), (False, "zero"), (False, "one"), (True, "all")):
            facts["rest", layout, adam, gradient] = rests_first(layout, adam, gradient)
        if layout != "alone":
            for name in ("alice", "galore_8bit", "any"):
                facts["reload", layout, name] = reload(layout, name)
            for flat in (True, False):
                facts["dcp", layout, flat] = by_dcp(layout, flat, folder)
    facts["saved by one"] = by_torch_save(folder)
    model, optimizer = laid_out("sharded", small("alice"))
    advance(model, optimizer)
    facts["divided afterwards"] = same(divided_afterwards(), weights(model))
    facts["on two"] = on_two(folder, pair, pairs["within"])
    model, optimizer = laid_out("alone", small("alice"))
    advance(model, optimizer)
    facts["on one"] = weights(model)
    return facts


def work(folder: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))  # else a rank that fails is waited for
    facts = every_method(rank)
    facts |= parts(rank, Path(folder))
    torch.save(facts, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    import adam_mini  # noqa: F401
    import bitsandbytes  # noqa: F401
    import pytorch_optimizer  # noqa: F401
    import transformers.optimization  # noqa: F401
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    how = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id="sharded", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0,
    )  # fmt: skip
    elastic_launch(how, work)(sys.argv[1])


if __name__ == "__main__":
    main()
