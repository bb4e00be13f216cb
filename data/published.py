"""The training loader of the published code (GaLore's, which Fira and APOLLO share), with what it loses.

The stream of `datasets` is shuffled (the shards, then a buffer), divided over the ranks, and read by the worker
processes of a torch DataLoader, `published_workers` a rank. `datasets` gives every worker shards of its own; then
each takes documents number w, w + W, w + 2W, ... of its own stream, as if all of them saw one stream. So:

- W - 1 of W documents are read and never trained on: 7 of 8 with the published 8 workers;
- which rows a step has depends on the numbers of ranks and workers, and on `published_batch`;
- with fewer files than workers, the other workers have nothing to read;
- the data is passed over once, and it ends where the first pass does;
- on the Hub, the library's own requests and retries are made, many more than `HubFileSource` makes.

The order is that of the installed version of `datasets`: what the published class gives with it, row for row. The
library's shuffle was another one when the published runs were made.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .errors import UserError
from .lines import misfit
from .rows import truncated
from .sources import FileSource, Source, open_source
from .tokenizer import Tokenizer

Rows = tuple[torch.Tensor, torch.Tensor]  # input ids and labels
Item = Rows | str  # of a worker: a batch, empty where nobody will look at it; or the message of an error
# A launcher or a terminal sends these to every process.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NOTHING = (torch.empty(0), torch.empty(0))


class PublishedBatches:
    """Iterator over optimizer steps in the published order, with the interface of `TrainingBatches`.

    `batch_size` are the sequences of a step of all ranks together. A rank's step is its next batches of
    `cfg.published_batch` sequences (null: one batch, the rank's whole share); each comes from the next worker
    in turn. The last batch of a worker may be smaller, and so the step.

    A loaded state goes on exactly where it was taken, by reading again everything before it, without
    tokenising: minutes for thousands of steps. Use it as a context manager or call `close()`. Raises
    `UserError`, also where the data ends.
    """

    def __init__(
        self, cfg: Mapping[str, Any], tokenizer: Tokenizer, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if cfg["rows"] != "truncate" or (cfg.get("attention") or "row") != "row":
            raise UserError("data.protocol=published trains on one document a row: set data.rows=truncate.")
        if (cfg.get("on_error") or "stop") != "stop":
            raise UserError("data.protocol=published cannot leave out damaged documents: set data.on_error=stop.")
        if batch_size % world_size:
            raise UserError(
                f"data.protocol=published gives every rank the same number of sequences, and {batch_size} cannot be "
                f"divided by {world_size} ranks: change trainer.batch_size or the number of ranks."
            )
        share = batch_size // world_size
        size = int(cfg.get("published_batch") or share)
        if share % size:
            raise UserError(
                f"data.published_batch={size} does not divide the {share} sequences that a rank has in a step: correct it."
            )
        self._workers = int(cfg.get("published_workers") or 8)
        self._batches_a_step = share // size
        source = open_source(cfg, "train")
        self._rows = _Rows(
            _stream(source, cfg, rank, world_size),
            tokenizer,
            cfg.get("text_column") or "text",
            int(cfg["length"]),
            size,
        )
        import datasets

        self._contract = {
            "protocol": "published",
            "source": source.identity,
            "tokenizer": tokenizer.fingerprint,
            "length": int(cfg["length"]),
            "batch_size": batch_size,
            "published_batch": size,
            "published_workers": self._workers,
            "ranks": world_size,
            "seed": int(cfg["seed"]),
            "shuffle_buffer": int(cfg["shuffle_buffer"]),
            "datasets": datasets.__version__,
        }
        self.step = 0
        self.epoch = 0
        self.waited = 0.0
        self._items: Iterator[Item] | None = None
        self._closed = False

    def __iter__(self) -> PublishedBatches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._closed:
            raise RuntimeError("these PublishedBatches are closed")
        began = time.perf_counter()
        try:
            if self._items is None:
                self._items = self._start()
            rows = [self._next(self._items) for _ in range(self._batches_a_step)]
        except BaseException:  # after Ctrl-C, the next call starts again at the same place
            self._halt()
            raise
        finally:
            self.waited += time.perf_counter() - began
        self.step += 1
        input_ids, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {"input_ids": input_ids, "labels": labels}

    def _start(self) -> Iterator[Item]:
        self._rows.skipped = self.step * self._batches_a_step
        if self._rows.skipped:
            print(f"data: reading again what {self.step} steps read before (data.protocol=published)", file=sys.stderr)
        # Workers are forked from a process that has imported everything, and has neither threads nor an accelerator.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "datasets"])
        loader = DataLoader(
            self._rows,
            batch_size=None,
            num_workers=self._workers,
            worker_init_fn=_begin,
            multiprocessing_context=context,
            generator=torch.Generator(),  # the workers' seed, which nothing uses, is not drawn from the model's numbers
        )
        resource_tracker.ensure_running()  # now, because it unblocks signals when it starts
        # Blocked signals stay blocked in new processes: what to do about them is the trainer's decision alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            items: Iterator[Item] = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for _ in range(self._rows.skipped):
            self._next(items)
        return items

    def _next(self, items: Iterator[Item]) -> Rows:
        try:
            item = next(items)
        except StopIteration:
            raise UserError(
                f"The data ends before step {self.step + 1}: data.protocol=published passes over it once and trains on "
                f"one document in {self._workers}; use data.protocol=exact, more files, or fewer trainer.steps."
            ) from None
        if isinstance(item, str):
            raise UserError(item)
        return item

    def _halt(self) -> None:
        self._items = None  # which ends the workers

    def close(self) -> None:
        """End the worker processes. Safe to call twice."""
        self._closed = True
        self._halt()

    def __enter__(self) -> PublishedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts; the same on every rank."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "position": None,
            "shard_lengths": {},
            "contract": dict(self._contract),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the same numbers of ranks and workers."""
        if (part := misfit(state, {"step": int, "contract": dict})) is not None:
            raise UserError(
                f"The saved place in the data is damaged ({part or 'it'} is missing or of another kind): resume from an "
                "earlier checkpoint or start a new run."
            )
        theirs, ours = state["contract"], self._contract
        different = sorted(key for key in ours if theirs.get(key) != ours[key])
        if different:
            changes = ", ".join(f"{key} was {theirs.get(key)!r} and is {ours[key]!r}" for key in different)
            raise UserError(
                f"The saved place in the data does not fit this run: {changes}; restore the old settings or start a new "
                "run."
            )
        self._halt()
        self.step = int(state["step"])


def _stream(source: Source, cfg: Mapping[str, Any], rank: int, world_size: int) -> Any:
    """The shuffled share of one rank, as a streaming data set of `datasets`."""
    import datasets
    import datasets.distributed

    kind = cfg.get("kind")
    if source.description.get("holdout") or kind not in ("sample", "c4_local", "hub"):
        raise UserError(
            "data.protocol=published needs a data set with validation files of its own in C4's layout or on the Hub: use "
            "data=c4, data=c4_local or data.protocol=exact."
        )
    try:
        if isinstance(source, FileSource):
            files = [str(file) for file in source.files]
            data = datasets.load_dataset("json", data_files={"train": files}, split="train", streaming=True)
        else:
            data = datasets.load_dataset(
                cfg["name"], cfg.get("config"), split=cfg.get("train_split") or "train", streaming=True,
                revision=source.description["revision"],
            )  # fmt: skip
        data = data.select_columns([cfg.get("text_column") or "text"])
    except UserError:
        raise
    except Exception as error:  # the library lets many kinds through
        raise UserError(
            f"{source.label} could not be opened with the datasets library ({type(error).__name__}: {error}): check the "
            "files and data.text_column, or use data.protocol=exact."
        ) from error
    if cfg["shuffle_buffer"]:
        data = data.shuffle(seed=int(cfg["seed"]), buffer_size=int(cfg["shuffle_buffer"]))
    if world_size > 1:
        data = datasets.distributed.split_dataset_by_node(data, rank=rank, world_size=world_size)
    return data


class _Rows(IterableDataset):
    """What a worker does: takes its part of the stream, and makes batches of `size` rows."""

    def __init__(self, stream: Any, tokenizer: Tokenizer, text_column: str, length: int, size: int) -> None:
        super().__init__()
        self.stream = stream
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.length = length
        self.size = size
        self.skipped = 0  # batches of all workers that nobody will look at

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        assert worker is not None
        records = itertools.islice(self.stream, worker.id, None, worker.num_workers)
        try:
            for number in itertools.count():
                texts = [record[self.text_column] for record in itertools.islice(records, self.size)]
                if not texts:
                    return
                # Workers take turns, so that of the first n batches each has made n / W at least.
                if number < self.skipped // worker.num_workers:
                    yield NOTHING
                else:
                    ids = self.tokenizer.encode(texts, self.length - 1)
                    yield truncated(ids, self.length, self.tokenizer)
        except (
            Exception
        ) as error:  # the library lets many kinds through; a worker's own traceback would hide the message
            yield f"Worker {worker.id} of data.protocol=published failed to read: {type(error).__name__}: {error}"


def _begin(_: int) -> None:
    """Let the second SIGTERM end a worker, and the end of the training process, however it ended.

    The first SIGTERM may be the launcher's, to all processes; torch sends one to a worker that hangs.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
