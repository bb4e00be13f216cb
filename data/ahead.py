"""An iterator run by a background thread, some items ahead of its reader."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The items of `items`, made by a background thread that keeps up to `size` of them ready.

    What the thread raises is raised in the item's place. While an item is waited for, `tell` is called every
    `patience` seconds with the seconds so far.
    """

    def __init__(
        self,
        items: Iterator[T],
        size: int,
        name: str,
        patience: float = math.inf,
        tell: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._ready: queue.Queue[T | BaseException] = queue.Queue(size)
        self._stop = threading.Event()
        self._patience, self._tell = patience, tell
        # The thread does not refer to this object, so that its owner can be collected and stop it.
        self._thread = threading.Thread(target=_produce, args=(items, self._ready, self._stop), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.monotonic()
        told = 0
        while True:
            try:
                item = self._ready.get(timeout=min(1.0, self._patience))
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the data thread ended without a word") from None
                waited = time.monotonic() - began
                if waited >= (told + 1) * self._patience:
                    told = int(waited / self._patience)
                    self._tell(waited)
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def stop(self) -> None:
        """End the thread after the item that it is making; wait for that, but not long."""
        self._stop.set()
        if self._thread is not threading.current_thread():  # a garbage collection can run in any thread
            self._thread.join(timeout=10.0)


def _produce(items: Iterator[T], ready: queue.Queue[T | BaseException], stop: threading.Event) -> None:
    """Body of the thread: hand over items, or the error that ended them, until told to stop."""
    while not stop.is_set():
        item: T | BaseException
        try:
            item = next(items)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
