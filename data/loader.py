"""The training loader: which rows an optimizer step sees, and how a run goes on where it stopped.

Step k sees rows [kB, (k+1)B) of one endless sequence of rows, which depends on the source, the seed and the
protocol alone. Ranks divide a step's rows into contiguous shares; their number changes nothing about the
rows. Every rank reads all text, but with rows="truncate" it tokenises its own rows only.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from .ahead import Ahead
from .errors import UserError
from .lines import misfit
from .producer import Producer
from .rows import check_rows
from .sources import Source
from .steps import Batch, Plan, Position, Step, batch, steps
from .tokenizer import Tokenizer

STATE = {"step": int, "epoch": int, "position": (None, [int]), "shard_lengths": dict, "damaged": dict, "contract": dict}
PATIENCE = 60.0  # seconds without a step after which, and every so often, a line says so


class TrainingBatches:
    """Endless iterator over optimizer steps; each yields this rank's rows.

    A step is `{"input_ids", "labels"}`, int64 [b, length], where b is the rank's share of `batch_size` (the
    sequences of a step of all ranks together); labels equal input_ids except IGNORE at padding. With
    attention="document" (rows="pack" only) it has "position_ids" too, which start again at every document, and
    labels are IGNORE at a document's first token inside a row. `epoch` is the epoch of the last row yielded, `step`
    the number of the next step, `waited` the seconds that steps were waited for in all. A step may straddle two
    epochs; no row is dropped.

    Two ways to go on at step k, both bit-identical to a run that was never interrupted: `start_step=k`, which
    finds the place by reading (with rows="pack": tokenising) what lies before; and `load_state_dict`, which
    goes straight there.

    `prefetch` steps are kept ready by a background thread (0: none, unless there are workers). With `workers` >= 1
    they are made by a process of its own with that many tokenising threads. Neither changes a row. With `pin_memory`
    they lie in page-locked memory, from which a GPU can fetch them while the host goes on (needs CUDA). Errors of the
    thread or the process are raised by the next step. Use it as a context manager or call `close()`. Raises
    `UserError`.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        length: int = 256,
        rows: str = "truncate",
        batch_size: int = 512,
        seed: int = 42,
        shuffle_buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
        workers: int = 0,
        attention: str = "row",
        pin_memory: bool = False,
    ) -> None:
        check_rows(rows, length, attention)
        if not 0 <= rank < world_size:
            raise UserError(
                f"Rank {rank} of {world_size} ranks does not exist: check the launcher's RANK and WORLD_SIZE."
            )
        if batch_size < world_size:
            raise UserError(
                f"A batch of {batch_size} sequences cannot be divided over {world_size} ranks: raise "
                "trainer.batch_size or use fewer ranks."
            )
        if min(shuffle_buffer, start_step, prefetch, workers) < 0:
            raise UserError("data.shuffle_buffer, data.workers, the first step and the prefetch must not be negative.")
        share = (batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
        self.plan = Plan(source, tokenizer, length, rows, attention, batch_size, seed, shuffle_buffer, share)
        self.prefetch = prefetch
        self.workers = workers
        self.pin_memory = pin_memory
        self.step = start_step
        self.epoch = 0
        self.waited = 0.0
        self._label = source.label + (f" (rank {rank})" if world_size > 1 else "")
        self._position: Position | None = None if start_step else Position(0, 0)
        self._lengths: dict[int, int] = {}
        self._damaged: dict[int, int] = {}
        self._steps: Iterator[tuple[Step, Batch]] | None = None
        self._stop: weakref.finalize | None = None
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("these TrainingBatches are closed")
        if self._error is not None:
            raise self._error
        began = time.perf_counter()
        try:
            if self._steps is None:
                self._steps = self._start()
            step, tensors = next(self._steps)
        except Exception as error:
            self._error = error
            raise
        except BaseException:  # Ctrl-C while waiting: the next call starts again at the same place
            self._halt()
            raise
        finally:
            self.waited += time.perf_counter() - began
        self.step += 1
        self.epoch = step.epoch
        self._position = step.following
        self._lengths, self._damaged = step.counts.lengths, step.counts.damaged
        if self.workers:
            step.counts.add_to(self.plan.source)
        return tensors

    def _start(self) -> Iterator[tuple[Step, Batch]]:
        plan, device = self.plan, None
        if self.pin_memory:
            import torch

            device = torch.cuda.current_device()
        if not self.workers and not self.prefetch:
            made = _with_batches(plan, steps(plan, self._position, self.step), device)
            self._stop = weakref.finalize(self, made.close)
            return made
        producer = Producer(plan, self._position, self.step, self.workers) if self.workers else None
        items = producer.steps() if producer else steps(plan, self._position, self.step)
        ahead = Ahead(
            _with_batches(plan, items, device),
            max(1, self.prefetch),
            "data-prefetch",
            PATIENCE,
            partial(_tell, self._label),
        )
        # Neither the thread nor the generators refer to this object, so a forgotten loader is collected and
        # stops them; at interpreter exit they are stopped before Python's machinery is taken down under them.
        self._stop = weakref.finalize(self, _stop, ahead, producer)
        return ahead

    def close(self) -> None:
        """Stop the background thread and the process. Safe to call twice."""
        self._closed = True
        self._halt()

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()
        self._stop = self._steps = None

    def __enter__(self) -> TrainingBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts, in plain numbers and strings; the same on every rank.

        Steps that were prefetched but not yielded are not counted.
        """
        position = self._position
        return {
            "step": self.step,
            "epoch": self.epoch,
            "position": None if position is None else [position.epoch, position.document, position.offset],
            "shard_lengths": {str(shard): count for shard, count in sorted(self._lengths.items())},
            "damaged": {str(shard): count for shard, count in sorted(self._damaged.items())},
            "contract": self._contract(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. The number of ranks may differ; anything that orders rows may not.

        Raises `UserError`; nothing has been changed then.
        """
        if isinstance(state, dict):
            state = {"damaged": {}, **state}  # older states do not have it
        if (part := misfit(state, STATE)) is not None:
            raise _damaged_state(f"{part or 'the whole of it'} is missing or of another kind")
        theirs, ours = {"attention": "row", **state["contract"]}, self._contract()  # older states know no other
        if theirs.get("source") == self.plan.source.former_identity:
            theirs["source"] = ours["source"]
        different = sorted(key for key in ours if theirs.get(key) != ours[key])
        if different:
            changes = ", ".join(f"{key} was {theirs.get(key)!r} and is {ours[key]!r}" for key in different)
            raise UserError(
                f"The saved place in the data does not fit this run: {changes}; restore the old settings or start a new "
                "run."
            )
        source = self.plan.source
        lengths, damaged = (_by_shard(state, key, source.shards) for key in ("shard_lengths", "damaged"))
        position = self._checked_position(state, {**source.lengths, **lengths})
        self._halt()
        self._error = None
        self.step, self.epoch, self._position = state["step"], state["epoch"], position
        self._lengths, self._damaged = lengths, damaged
        source.lengths.update(lengths)
        for shard, count in damaged.items():
            source.damaged[shard] = max(count, source.damaged.get(shard, 0))

    def _checked_position(self, state: dict[str, Any], lengths: dict[int, int]) -> Position | None:
        """The position of a state, with the lengths of shards after it. Raises `UserError` where it cannot be.

        With rows="truncate" a step takes its number of documents, with rows="pack" its number of tokens, of which every
        document has at least one.
        """
        source, plan = self.plan.source, self.plan
        if any(lengths[shard] != count for shard, count in source.lengths.items()):
            raise _damaged_state("shard_lengths are not those of the source")
        if state["position"] is None:
            return None
        if len(state["position"]) != 3:
            raise _damaged_state("position must be three numbers")
        position = Position(*state["position"])
        total = sum(lengths.values()) if len(lengths) == source.shards else None
        passed = position.epoch * (total or 0) + position.document
        if plan.rows == "truncate":
            possible = passed == state["step"] * plan.batch_size and not position.offset
        else:
            possible = passed + position.offset <= state["step"] * plan.batch_size * plan.length
        if total is None:
            possible = possible and position.epoch == 0
        elif position.document > total:
            possible = False
        if not possible or position.epoch - state["epoch"] not in (0, 1):
            raise _damaged_state(f"step {state['step']} cannot begin at position {state['position']}")
        return position

    def _contract(self) -> dict[str, Any]:
        """Everything that orders rows."""
        plan = self.plan
        return {
            "source": plan.source.identity,
            "tokenizer": plan.tokenizer.fingerprint,
            "length": plan.length,
            "rows": plan.rows,
            "attention": plan.attention,
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "shuffle_buffer": plan.shuffle_buffer,
        }


def _by_shard(state: dict[str, Any], key: str, shards: int) -> dict[int, int]:
    """The counts that a state has under `key`. Raises `UserError`."""
    numbers = {str(shard): shard for shard in range(shards)}
    counts: dict[str, Any] = state[key]
    if not counts.keys() <= numbers.keys() or misfit(list(counts.values()), [int]) is not None:
        raise _damaged_state(f"{key} must be numbers of 0 or more for some of {shards} shards")
    return {numbers[shard]: count for shard, count in counts.items()}


def _damaged_state(what: str) -> UserError:
    return UserError(
        f"The saved place in the data is damaged ({what}): resume from an earlier checkpoint or start a new run."
    )


def _with_batches(plan: Plan, made: Iterator[Step], device: int | None) -> Generator[tuple[Step, Batch], None, None]:
    """Tensors in memory that is pinned for a CUDA device, unless it is None."""
    if device is not None:
        import torch

        torch.cuda.set_device(device)  # of this thread: all ranks of a node would take up room on the first GPU
    for step in made:
        tensors = batch(plan, step)
        yield step, tensors if device is None else {name: x.pin_memory() for name, x in tensors.items()}


def _tell(label: str, seconds: float) -> None:
    print(
        f"data: training has waited {seconds:.0f} s for its next step; being read: {label}", file=sys.stderr, flush=True
    )


def _stop(ahead: Ahead[tuple[Step, Batch]], producer: Producer | None) -> None:
    if producer is not None:
        producer.kill()  # first: the thread may be waiting for it
    ahead.stop()
    if producer is not None:
        producer.close()
