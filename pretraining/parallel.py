"""Several processes: where weights, gradients and optimizer states lie, and what of it a training step has to know.

ddp: weights on every rank; gradients are summed over all; each matrix is updated by the rank that owns it, which then
sends the new weights to the others (optimizers.sharding), while the next rows are waited for.

fsdp2: ``fully_shard`` divides weights, gradients and element-wise states; matrices are updated whole by their owners.

Both leave every number as one process has it, but for the order of sums.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn

from data.errors import UserError
from optimizers.memory import measured_state_bytes
from optimizers.sharding import Owners, is_sharded, local, shard

if TYPE_CHECKING:
    from accelerate import Accelerator

# Others wait while the first rank checks and hashes a checkpoint: 80 GB at 150 MB/s take NCCL's usual ten minutes. For every
# group: one that is queued behind a waiting one would end the run by its own limit.
PATIENCE = timedelta(minutes=30)
# Libraries' methods that work on the shards of a matrix as they do on all of it.
ELEMENTWISE = {"adam", "adamw", "lion", "sgd", "signum"}


def check_parallel(cfg: DictConfig, world: int) -> None:
    """Refuse what several processes cannot do in this way.

    Raises:
        UserError: the first setting that does not go with it.
    """
    t, method = cfg.trainer, cfg.optimizer.name
    if world == 1:
        return
    if t.parallel == "fsdp2" and "estimator" in cfg.optimizer:
        raise UserError(
            f"optimizer={method} needs estimates of curvature, for which every rank needs all weights: use "
            "trainer.parallel=ddp"
        )
    if t.parallel == "fsdp2" and method == "adam_mini":
        raise UserError("optimizer=adam_mini needs embedding and norms whole: use trainer.parallel=ddp")
    if t.shard_group == "node":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if world % ranks:
            raise UserError(
                f"trainer.shard_group=node needs equally many processes on every node, and {world} are no multiple of "
                f"{ranks}: launch as many on each, or set trainer.shard_group=all"
            )


def layout(cfg: DictConfig, world: int) -> str:
    """For people: what lies where on ``world`` processes."""
    t, nodes = cfg.trainer, cfg.trainer.shard_group == "node"
    if t.parallel == "fsdp2":
        whole = "" if cfg.optimizer.name in ELEMENTWISE else ", each matrix is updated whole by one of those"
        return f"{world}, fsdp2: weights and states are divided among {'those of a node' if nodes else 'all'}{whole}"
    owner = f"each matrix is updated, and its state kept, by one{' of each node' if nodes else ''}"
    return f"{world}, ddp: weights on each, {owner if t.shard_optimizer else 'all states on each'}"


class Parallel:
    """The layout of one run.

    Args:
        cfg: the run's configuration.
        accelerator: its processes.
        device: this rank's.

    Attributes:
        sharded: whether weights are (fsdp2, with more than one process).
        owners: of matrices, after ``divide``; None where nothing is divided.
    """

    def __init__(self, cfg: DictConfig, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        self.ranks, self.rank = accelerator.num_processes, accelerator.process_index
        self.sharded = cfg.trainer.parallel == "fsdp2" and self.ranks > 1
        self.divides = cfg.trainer.shard_optimizer and self.ranks > 1
        self.whole = self.sharded and cfg.optimizer.name not in ELEMENTWISE
        self.team = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if cfg.trainer.shard_group == "node" else self.ranks
        self.owners: Owners | None = None
        self.copies: dist.ProcessGroup | None = None  # the ranks that have copies of the same weights; None: all
        if self.sum(torch.tensor(self.team, device=device)) != self.team * self.ranks:
            raise UserError(
                "the nodes have unequal numbers of processes: launch as many on each, or set trainer.shard_group=all"
            )

    def shard_weights(self, loss: nn.Module) -> None:
        """For fsdp2: give each rank its part of the weights, decoder layer by layer. Before the optimizer is made."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.distributed_c10d import _set_pg_timeout
        from torch.distributed.fsdp import fully_shard

        kind = self.device.type
        if self.team == self.ranks:
            mesh = init_device_mesh(kind, (self.ranks,))
        else:
            mesh = init_device_mesh(kind, (self.ranks // self.team, self.team), mesh_dim_names=("nodes", "ranks"))
            for group in mesh.get_all_groups():
                _set_pg_timeout(PATIENCE, group)
            self.copies = mesh.get_group("nodes")
        for layer in loss.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        # The loss is the root: it reads the last layer's weight outside the model's own forward pass.
        fully_shard(loss, mesh=mesh)

    def divide(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every matrix an owner.

        Raises:
            UserError: of a class that cannot have whole matrices in place of shards.
        """
        if self.sharded:
            try:
                self.owners = shard(optimizer) if self.whole else None
            except ValueError as error:
                raise UserError(f"trainer.parallel=fsdp2: {error}; set trainer.parallel=ddp") from error
        elif self.divides:
            group = None
            if self.team < self.ranks:
                group, _ = dist.new_subgroups(self.team, timeout=PATIENCE)
            self.owners = shard(optimizer, group, overlap=True)

    def wrap(self, loss: nn.Module) -> nn.Module:
        """What training calls: ``loss``, and the sum of gradients over ranks after it."""
        if self.sharded:
            return loss
        with warnings.catch_warnings():  # of broadcast_buffers, whose new name Accelerate does not have
            warnings.filterwarnings("ignore", "`?broadcast_buffers", FutureWarning)
            return self.accelerator.prepare_model(loss)

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients are set to zero between steps and not dropped.

        DDP keeps its buckets in any case, and gradients that were dropped would lie beside them until the last micro-batch.
        """
        return self.ranks > 1 and not self.sharded

    def replicas_agree(self, model: nn.Module) -> bool:
        """Whether copies of a weight are the same on all ranks, by a digest of their bits; all call it together.

        Nothing brings together again what ranks have computed by themselves: the Adam group, and all matrices with
        shard_group=node or shard_optimizer=false. Solvers are the same to the bit only on equal cards with equal libraries.
        """
        if self.ranks == 1 or (self.sharded and self.copies is None):
            return True
        digest = torch.zeros((), dtype=torch.int64, device=self.device)
        for p in map(local, model.parameters()):
            bits = p.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])
            digest = digest * 31 + bits.sum(dtype=torch.int64)
        lowest, highest = digest.clone(), digest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.copies)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.copies)
        return not self.any(lowest != highest)

    def wait(self) -> None:
        """Before weights are read: until those of the last step have arrived."""
        if self.owners:
            self.owners.wait()

    def check_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """After the steps of a class that nobody here knows: refuse one that computes numbers from all matrices together.

        Raises:
            UserError: on all ranks alike.
        """
        if not self.owners:
            return
        numbers = [
            {
                key: float(x)
                for key, x in group.items()
                if isinstance(x, (int, float)) or (torch.is_tensor(x) and x.numel() == 1)
            }
            for group in optimizer.param_groups
        ]
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, numbers)
        different = [
            key for ranks in zip(*every, strict=True) for key in ranks[0] if len({str(r.get(key)) for r in ranks}) > 1
        ]
        if different:
            raise UserError(
                f"the optimizer computes {different[0]} from all matrices together, and each rank has only its own: set "
                "trainer.parallel=ddp trainer.shard_optimizer=false"
            )

    def accumulate(self, wrapped: Any, last: bool) -> AbstractContextManager:
        """Around a micro-batch: gradients are summed over ranks after the ``last`` one only."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(wrapped)

    def sum(self, x: Tensor) -> Tensor:
        """Over all ranks."""
        return self.accelerator.reduce(x, reduction="sum") if self.ranks > 1 else x

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Of the whole gradient, in float32."""
        norms = torch._foreach_norm([local(G) for G in gradients], 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.sharded:
            norm = (self.sum(norm.square()) * (self.team / self.ranks)).sqrt()  # each part lies on ranks / team of them
        return norm

    def gather(self, found: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
        """What owners have found out about their matrices, by name; once, where nodes do the same work."""
        parts: list[Any] = [found]
        if self.owners is not None:
            parts = [None] * self.ranks
            dist.all_gather_object(parts, [(names, value.cpu()) for names, value in found])
        return list({names: value for part in parts for names, value in part}.items())

    def any(self, flag: Tensor) -> Tensor:
        """Whether ``flag`` is set on any rank."""
        return self.sum(flag.long()) > 0

    @contextmanager
    def gathered(self, wrapped: Any) -> Iterator[None]:
        """For fsdp2: embeddings, last norm and last layer whole for the model's own forward pass, and nothing after it.

        Evaluation leaves them whole as well, and a stale copy would be trained on.
        """
        if self.sharded:
            wrapped.unshard()
        yield
        if self.sharded:
            wrapped.reshard()

    def whole_weights(self, model: nn.Module) -> dict[str, Any] | None:
        """For fsdp2: all weights, on the host of the first rank (empty on others); None where the model has them.

        All ranks call it together.
        """
        if not self.sharded:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def state_bytes(self, optimizer: torch.optim.Optimizer) -> tuple[int, list[int]]:
        """Of the optimizer's states: once each, and as they lie on every rank. All ranks call it together."""
        here = measured_state_bytes(optimizer)
        if self.ranks == 1:
            return here, [here]
        divided = measured_state_bytes(optimizer, self._is_divided)
        counts = torch.zeros(self.ranks, 2, dtype=torch.int64, device=self.device)
        counts[self.rank] = torch.tensor([here, divided])
        on_rank, parts = self.sum(counts).T.tolist()
        copies = self.ranks // self.team  # of each part
        return here - divided + sum(parts) // copies, on_rank

    def most(self, x: int) -> int:
        """The largest ``x`` of all ranks, which call it together."""
        if self.ranks == 1:
            return x
        counts = torch.zeros(self.ranks, dtype=torch.int64, device=self.device)
        counts[self.rank] = x
        return int(self.sum(counts).max())

    def _is_divided(self, p: Tensor, x: Tensor) -> bool:
        """Whether ``x``, a state of ``p``, lies here only, or in part; Adam counts its steps on every rank."""
        return is_sharded(x) or (self.owners is not None and any(p in team.owner for team in self.owners.teams))
