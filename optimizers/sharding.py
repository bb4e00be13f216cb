"""Which rank computes which matrix: every update once, and its state once, however the weights are laid out.

Most methods need a matrix whole, and a decomposition cannot be shared among ranks. So each matrix has an owner: it alone
refreshes and updates that matrix and keeps its state (ZeRO-1, by matrices), and the others receive the new weights.

    owners = shard(optimizer)      weights replicated (DDP): for any torch optimizer, right after it is made
    Alice(partition(model))        weights sharded by fully_shard (DTensor): no call is needed

Numbers do not depend on the layout: owners see the same gradient that a single process would, and random draws are keyed
by parameter names. Element-wise updates (groups with ``adam=True``) stay where the weights are: on every rank for replicated
weights, on the shards of DTensors.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from types import MappingProxyType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Matrices travel in rounds, in which a rank sends at most about so many entries (256 MiB in float32): the extra memory of a
# step, beside its own matrices.
ROUND_ENTRIES = 2**26
SHARE = "share"  # entry of a state dict that has the states of one rank's matrices only


def shard(
    optimizer: torch.optim.Optimizer, process_group: "dist.ProcessGroup | None" = None, overlap: bool = False
) -> "Owners":
    """Divide the matrices of ``optimizer``, and their states, among ranks; from now on ``step`` is a collective.

    Replicated weights must have the same gradients on all ranks, as after DDP's backward pass.

    Args:
        optimizer: its groups without ``adam=True`` are divided. Anything that follows ``step`` of torch's optimizers and
            leaves parameters without a gradient alone, and computes nothing from all of them together.
        process_group: of replicated weights; None: all ranks. A node's ranks, so that weights travel within nodes only
            and each node computes everything. DTensors have a mesh of their own.
        overlap: ``step`` returns while weights still travel; call ``Owners.wait`` before they are read.

    Returns:
        The optimizer's owners; the same at a second call.

    Raises:
        ValueError: a layout of DTensors that cannot be served, or states of DTensors that the class has made already.
    """
    owners: Owners | None = getattr(optimizer, "owners", None)
    if owners is None:
        owners = Owners(optimizer, process_group)
        optimizer.owners = owners  # type: ignore[attr-defined]
    owners.overlap = overlap
    return owners


def is_sharded(x: Tensor) -> bool:
    # Whoever has a DTensor has imported its module, which takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank, sharing its memory; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharded_dim(p: Tensor) -> tuple[int, int]:
    """The dimension of the mesh that shards a DTensor, and the dimension of the tensor that it divides.

    Raises:
        ValueError: a layout other than that of ``fully_shard`` on a mesh of one dimension, or of two (HSDP).
    """
    from torch.distributed.tensor import Replicate, Shard

    placements = p.placements  # type: ignore[attr-defined]
    found = [(i, x.dim) for i, x in enumerate(placements) if type(x) is Shard]
    if len(found) != 1 or not all(type(x) in (Shard, Replicate) for x in placements):
        raise ValueError(
            f"a matrix is laid out as {placements}, but its update needs it whole: use fully_shard alone, on a mesh of one "
            "dimension or of two (HSDP), without tensor parallelism"
        )
    return found[0]


def parameter_names(groups: Sequence[dict[str, Any]], group: dict[str, Any]) -> list[str]:
    """Names of the parameters of one of the ``groups``, or positions in the whole optimizer where there are none."""
    if "param_names" in group:
        return group["param_names"]
    first = 0
    for other in groups:
        if other is group:
            break
        first += len(other["params"])
    return [f"parameter {first + i}" for i in range(len(group["params"]))]


def cost(p: Tensor) -> int:
    """What a step costs for ``p``, up to a factor: products of an m x n matrix with one of m x r, r in proportion to m."""
    return p.numel() * (min(p.shape) if p.ndim == 2 else 1)


def assign(costs: Sequence[float], ranks: int, kept: Mapping[int, int] = MappingProxyType({})) -> list[int]:
    """The owner of each: the most expensive first, each to the rank that has least (Graham 1969: at most 4/3 of the best).

    A function of the arguments alone, so that all ranks find the same.

    Args:
        kept: owners that some have already, by index.
    """
    loads = [0.0] * ranks
    owners = [kept.get(i, -1) for i in range(len(costs))]
    for i, owner in kept.items():
        loads[owner] += costs[i]
    for i in sorted(set(range(len(costs))) - kept.keys(), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners


def check_share(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """That a state dict has the matrices that this process keeps, if it is the share of one rank.

    Otherwise their states would silently begin anew, at full rate and without warm-up.

    Raises:
        ValueError: the share of another rank, or of a run with another number of ranks.
    """
    share = state_dict.get(SHARE)
    if share is None:
        return
    owners: Owners | None = getattr(optimizer, "owners", None)
    kept = {i for i, p in _by_index(optimizer, state_dict).items() if owners is None or owners.keeps(p)}
    lacking = kept & set(share["absent"])
    if lacking:
        raise ValueError(
            f"these are the states of rank {share['rank']} of {share['ranks']}, and {len(lacking)} matrices that are needed "
            "here are not among them: save shard(optimizer).gather() instead, which all ranks call and which has all of them, "
            "or give each rank what it has saved"
        )


class Team:
    """The ranks of one process group and the matrices that they share.

    Attributes:
        params: the matrices, in the optimizer's order.
        owners: the rank within the group of each.
        rank, size: of this process in the group, and of the group.
    """

    def __init__(
        self, params: list[Tensor], group: "dist.ProcessGroup", before: Mapping[Tensor, int] = MappingProxyType({})
    ) -> None:
        self.params, self.group = params, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        kept = {i: before[p] for i, p in enumerate(params) if p in before}  # their states are there
        self.owners = assign([cost(p) for p in params], self.size, kept)
        self.owner = dict(zip(params, self.owners, strict=True))
        # Owners by turns, so that at any time all of them have something to send.
        turns = [self.owners[:i].count(owner) for i, owner in enumerate(self.owners)]
        self.order = sorted(range(len(params)), key=lambda i: (turns[i], self.owners[i]))

    def mine(self) -> list[Tensor]:
        return [p for p, owner in self.owner.items() if owner == self.rank]

    # Replicated weights ------------------------------------------------------------------------------------------------

    def states(self, state: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """All matrices' states, from their owners: those of others on the CPU, and on the first rank only."""
        mine = {
            i: {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in state[p].items()}
            for i, p in enumerate(self.params)
            if self.owners[i] == self.rank and p in state
        }
        kinds: list[Any] = [None] * self.size
        dist.all_gather_object(kinds, mine, group=self.group)
        found: dict[Tensor, dict[str, Any]] = {}
        for i, kind in sorted(item for of_rank in kinds for item in of_rank.items()):
            p, owner = self.params[i], self.owners[i]
            found[p] = dict(kind)
            for key, what in kind.items():
                if isinstance(what, Tensor):
                    x = state[p][key] if owner == self.rank else torch.empty(what.shape, dtype=what.dtype)
                    sent = x.to(p.device).contiguous()
                    # as bytes: not every backend has every dtype
                    dist.broadcast(sent.view(-1).view(torch.uint8), group_src=owner, group=self.group)
                    found[p][key] = x if owner == self.rank else sent.cpu()
            if self.rank != 0:
                del found[p]
        return found

    def broadcast(self, params: set[Tensor]) -> "list[dist.Work]":
        """Begin to send the weights that have changed from their owners to all."""
        works = []
        for i in self.order:
            if self.params[i] in params:
                p = self.params[i].detach()
                p = p if p.is_contiguous() else p.mT  # stored by columns
                works.append(dist.broadcast(p, group_src=self.owners[i], group=self.group, async_op=True))
        return works

    # Sharded weights ---------------------------------------------------------------------------------------------------

    def collect(self, tensors: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """By parameter: this rank's part of each ``tensor`` -> those of its own matrices, whole."""
        whole = {p: local(tensors[p]).new_empty(p.shape) for p in self.mine() if p in tensors}
        for some in self._rounds(tensors):
            sent = [local(tensors[self.params[i]]) for rank in range(self.size) for i in self._of(rank, some)]
            parts = [
                self._part(whole[self.params[i]], i, s) for s in range(self.size) for i in self._of(self.rank, some)
            ]
            self._exchange(sent, self._sizes(some), parts, self._sizes(some, mine=True))
        return whole

    def deliver(self, whole: Mapping[Tensor, Tensor], tensors: Mapping[Tensor, Tensor]) -> None:
        """The inverse: fill this rank's part of each of the ``tensors`` from the ``whole`` ones of their owners."""
        for some in self._rounds(tensors):
            sent = [
                self._part(whole[self.params[i]], i, s) for s in range(self.size) for i in self._of(self.rank, some)
            ]
            parts = [local(tensors[self.params[i]]) for rank in range(self.size) for i in self._of(rank, some)]
            self._exchange(sent, self._sizes(some, mine=True), parts, self._sizes(some))

    def _rounds(self, tensors: Mapping[Tensor, Tensor]) -> Iterator[list[int]]:
        """Matrices of one dtype that travel together, by their indices."""
        there = [i for i in self.order if self.params[i] in tensors]
        for dtype in dict.fromkeys(tensors[self.params[i]].dtype for i in there):
            some, entries = [], 0
            for i in there:
                if tensors[self.params[i]].dtype == dtype:
                    some.append(i)
                    entries += self.params[i].numel()
                    if entries >= ROUND_ENTRIES * self.size:
                        yield some
                        some, entries = [], 0
            if some:
                yield some

    def _of(self, rank: int, some: list[int]) -> list[int]:
        return [i for i in some if self.owners[i] == rank]

    def _range(self, i: int, rank: int) -> tuple[int, int, int]:
        """What lies on ``rank`` of matrix i: dimension, start, length; torch.chunk's part of it, which may be empty."""
        p = self.params[i]
        dim = sharded_dim(p)[1]
        length = -(-p.shape[dim] // self.size)
        start = min(rank * length, p.shape[dim])
        return dim, start, min(length, p.shape[dim] - start)

    def _part(self, whole: Tensor, i: int, rank: int) -> Tensor:
        return whole.narrow(*self._range(i, rank))

    def _entries(self, i: int, rank: int) -> int:
        dim, _, length = self._range(i, rank)
        return self.params[i].numel() // self.params[i].shape[dim] * length

    def _sizes(self, some: list[int], mine: bool = False) -> list[int]:
        """Entries that this rank sends to each other, of their matrices; ``mine``: that it gets from each, of its own."""
        if mine:
            return [sum(self._entries(i, rank) for i in self._of(self.rank, some)) for rank in range(self.size)]
        return [sum(self._entries(i, self.rank) for i in self._of(rank, some)) for rank in range(self.size)]

    def _exchange(self, sent: list[Tensor], sends: list[int], parts: list[Tensor], receives: list[int]) -> None:
        """One all-to-all: the ``sent`` tensors, one after the other, into the ``parts``, in the same way."""
        some = (sent or parts)[0]
        out = torch.cat([some.new_empty(0), *(x.reshape(-1) for x in sent)])
        got = out.new_empty(sum(receives))
        size = out.element_size()  # as bytes: not every backend has every dtype
        dist.all_to_all_single(
            got.view(torch.uint8), out.view(torch.uint8), [n * size for n in receives], [n * size for n in sends], self.group
        )  # fmt: skip
        for part, x in zip(parts, got.split([part.numel() for part in parts]), strict=True):
            part.copy_(x.view(part.shape))


class Owners:
    """What :func:`shard` attaches to an optimizer: its ``step``, between a division of the work and an exchange of weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, process_group: "dist.ProcessGroup | None" = None) -> None:
        self.optimizer, self.process_group = optimizer, process_group
        self.overlap = False
        self._teams: tuple[list[Tensor], list[Team]] = ([], [])
        self._hidden: dict[Tensor, Tensor] = {}  # gradients of others' matrices
        self._whole: dict[Tensor, Tensor] = {}  # by DTensor: what is updated in its place
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._changing: set[Tensor] = set()
        self._works: list[dist.Work] = []
        # On the object: hooks are not told of a failure, and run twice where a step calls its parent class's.
        optimizer.step = MethodType(_divided(optimizer.step), optimizer)  # type: ignore[method-assign]
        optimizer.register_state_dict_post_hook(self._sign)
        optimizer.register_load_state_dict_pre_hook(self._sort)
        for team in self.teams if optimizer.state else ():  # some classes make states before their first step
            if any(is_sharded(p) and p in optimizer.state for p in team.params):
                raise ValueError(
                    "the optimizer has made states for the shards of matrices before its first step, which it cannot use for "
                    "whole ones: give it weights that are on every rank (DDP)"
                )
            for p in team.owner.keys() - set(team.mine()):
                optimizer.state.pop(p, None)

    @property
    def teams(self) -> list[Team]:
        """One for each process group; planned anew when parameters were added."""
        groups = [group for group in self.optimizer.param_groups if not group.get("adam")]
        params = [p for group in groups for p in group["params"]]
        if not self._groups and [id(p) for p in params] != [id(p) for p in self._teams[0]]:
            by_group: dict[dist.ProcessGroup, list[Tensor]] = {}
            for p in params:
                by_group.setdefault(self._process_group(p), []).append(p)
            before = {p: owner for team in self._teams[1] for p, owner in team.owner.items()}
            self._teams = params, [Team(some, group, before) for group, some in by_group.items()]
        return self._teams[1]

    def _process_group(self, p: Tensor) -> "dist.ProcessGroup":
        if is_sharded(p):
            return p.device_mesh.get_group(sharded_dim(p)[0])  # type: ignore[attr-defined]
        if not dist.is_initialized():
            raise RuntimeError("there is no process group: start the program with torchrun, or leave shard() out")
        return self.process_group or dist.distributed_c10d._get_default_group()

    def keeps(self, p: Tensor) -> bool:
        """Whether this rank keeps a state of ``p``: its own matrices, and all that is updated element by element."""
        return all(team.owner.get(p, team.rank) == team.rank for team in self.teams)

    def anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank; a collective."""
        for team in self.teams:
            x = torch.tensor(int(flag), device=local(team.params[0]).device)
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=team.group)
            flag = bool(x.item())
        return flag

    # State dicts -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather(self) -> dict[str, Any] | None:
        """The state dict with all matrices' states, as one process would have it; all ranks call this together.

        For ``torch.save`` by one rank. Any number of ranks can load it, each all of it.

        Returns:
            On the first rank of the process group, with others' states on the CPU; None on the other ranks.

        Raises:
            ValueError: weights are sharded (DTensors).
        """
        self.wait()
        if any(is_sharded(p) for team in self.teams for p in team.params):
            raise ValueError(
                "weights are sharded: save with torch.distributed.checkpoint, its StateDictOptions with "
                "flatten_optimizer_state_dict=True"
            )
        found = self.optimizer.state_dict()
        found.pop(SHARE, None)
        index = {p: i for i, p in _by_index(self.optimizer, found).items()}
        for team in self.teams:
            found["state"].update({index[p]: x for p, x in team.states(self.optimizer.state).items()})
        return found if all(team.rank == 0 for team in self.teams) else None

    def _sign(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Say in a state dict which matrices it lacks because other ranks keep them."""
        absent = [i for i, p in _by_index(optimizer, state_dict).items() if not self.keeps(p)]
        if absent:
            state_dict[SHARE] = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "absent": absent}

    def _sort(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Leave out the states of matrices that other ranks keep; see that this rank's own are there."""
        check_share(optimizer, state_dict)
        params, states = _by_index(optimizer, state_dict), state_dict["state"]
        others = {i for i, p in params.items() if not self.keeps(p)}
        lacking = len([i for i, p in params.items() if p.requires_grad and i not in others | states.keys()])
        if lacking and others & states.keys():
            warnings.warn(
                f"{lacking} matrices of this rank have no states in what is loaded, which has some of other ranks; they begin "
                "anew: see that it was saved by shard(optimizer).gather(), or flattened by torch.distributed.checkpoint",
                stacklevel=2,
            )
        return {**state_dict, "state": {i: x for i, x in states.items() if i not in others}}

    def wait(self) -> None:
        """Until all weights have arrived."""
        for work in self._works:
            work.wait()
        self._works = []

    # Around a step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self) -> None:
        """Before the optimizer's own step: leave it gradients, and whole matrices, of this rank's alone."""
        self.wait()
        optimizer = self.optimizer
        for team in self.teams:
            gradients = {p: p.grad for p in team.params if p.grad is not None}
            self._changing |= {p for p in gradients if not is_sharded(p)}
            self._hidden |= {p: gradients[p] for p in self._changing & gradients.keys() if team.owner[p] != team.rank}
            shards = {p: G for p, G in gradients.items() if is_sharded(p)}
            weights = team.collect({p: p.detach() for p in shards})
            for p, G in team.collect(shards).items():
                weights[p].grad = G
            self._whole |= weights
            if estimates := getattr(optimizer, "_estimates", None):
                own = team.collect({p: estimates[p] for p in shards})
                optimizer._estimates = {**estimates, **{weights[p]: x for p, x in own.items()}}  # type: ignore[attr-defined]
        for p in self._hidden:
            p.grad = None
        self._take_whole()

    def _take_whole(self) -> None:
        """Put the whole matrices of this rank where the optimizer finds parameters and states of its DTensors."""
        groups = self.optimizer.param_groups
        names = [parameter_names(groups, group) for group in groups]
        for group, own in zip(groups, names, strict=True):
            if group.get("adam") or not any(map(is_sharded, group["params"])):
                continue
            self._groups.append((group, {key: group[key] for key in ("params", "param_names") if key in group}))
            kept = [
                (self._whole.get(p, p), name)
                for p, name in zip(group["params"], own, strict=True)
                if p in self._whole or not is_sharded(p)
            ]
            group["params"], group["param_names"] = [p for p, _ in kept], [name for _, name in kept]
        _rename(self.optimizer.state, self._whole)

    def _put_back(self) -> None:
        for group, before in self._groups:
            del group["params"], group["param_names"]
            group.update(before)
        _rename(self.optimizer.state, {whole: p for p, whole in self._whole.items()})
        for p, G in self._hidden.items():
            p.grad = G
        self._groups, self._hidden = [], {}

    def undo(self) -> None:
        """After a step that has failed: groups, gradients and the places of states as before it.

        Matrices that it had updated keep their new states and clocks, though their new weights may reach nobody.
        """
        self._put_back()
        self._whole, self._changing = {}, set()

    @torch.no_grad()
    def end(self) -> None:
        """After it: groups, states and gradients as they were; the new weights to where they belong."""
        self._put_back()
        for team in self.teams:
            changed = {p: p.detach() for p in team.params if is_sharded(p) and p.grad is not None}
            team.deliver(self._whole, changed)
            self._works += team.broadcast(self._changing)
        self._whole, self._changing = {}, set()
        if not self.overlap:
            self.wait()


def _divided(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def divided(optimizer: Any, closure: None = None) -> Any:
        if closure is not None:
            raise ValueError(
                "step(closure) would compute gradients after they were divided among ranks; call the closure before"
            )
        optimizer.owners.begin()
        try:
            result = step()
        except BaseException:
            optimizer.owners.undo()
            raise
        optimizer.owners.end()
        return result

    return divided


def _by_index(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[int, Tensor]:
    """The optimizer's parameters by their numbers in a state dict of it; what is too many, torch reports."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    return dict(zip(saved, (p for group in optimizer.param_groups for p in group["params"])))  # noqa: B905


def _rename(state: dict[Tensor, Any], names: Mapping[Tensor, Tensor]) -> None:
    for old, new in names.items():
        if old in state:
            state[new] = state.pop(old)
