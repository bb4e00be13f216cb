"""A process that makes the steps of one rank, beside the training process: reading, shuffling, tokenising.

It is a new interpreter, not a fork, and imports nothing but this room. The training process sends it one order and
then reads steps from a pipe. The process ends when the training process closes it, or itself when that is gone,
however it ended.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from .ahead import Ahead
from .errors import UserError
from .rows import CHUNK
from .steps import Plan, Position, Step, steps
from .tokenizer import SentencePieceTokenizer

# A launcher or a terminal sends these to every process; what to do then is the trainer's decision alone.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# The pipe is moved away from standard output, so that what a library prints does not end up among the steps.
START = f"""\
import os, pickle, sys
pipe = os.dup(1)
os.dup2(2, 1)
sys.path[:] = pickle.load(sys.stdin.buffer)
from {__name__} import main
main(pipe)
"""


@dataclass(frozen=True)
class Order:
    """What the process is to make, with how many tokenising threads, for which training process."""

    plan: Plan
    place: Position | None
    step: int
    threads: int
    parent: int


@dataclass(frozen=True)
class Failure:
    """The error that ended the process: its message, or its traceback unless the user can put it right."""

    text: str
    for_user: bool


class Producer:
    """The process, from the training process's side. Raises `UserError` where the plan cannot be sent."""

    def __init__(self, plan: Plan, place: Position | None, step: int, threads: int) -> None:
        try:
            self._order = pickle.dumps(sys.path) + pickle.dumps(Order(plan, place, step, threads, os.getpid()))
        except Exception as error:  # pickle lets the errors of every class through
            raise UserError(
                f"{plan.source.label} cannot be read by a process of its own ({type(error).__name__}: {error}): set "
                "data.workers=0."
            ) from error
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        # Blocked signals stay blocked in a new process: there is no moment at which it could be stopped by one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin and self._process.stdout
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def steps(self) -> Iterator[Step]:
        """The process's steps, and then its error. The iterator blocks until a step is there."""
        try:
            self._orders.write(self._order)  # left open: its end tells the process that nobody is there any more
            self._orders.flush()
            while True:
                answer = pickle.load(self._answers)
                if isinstance(answer, Failure):
                    break
                yield answer
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise self._death() from None
        if answer.for_user:
            raise UserError(answer.text)
        raise RuntimeError(f"the data process failed (data.workers=0 does without it):\n{answer.text}")

    def _death(self) -> Exception:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)
        self.kill()
        code = self._process.returncode or 0
        if code < 0:
            return UserError(
                f"The data process was ended from outside ({signal.strsignal(-code)}), most likely because memory ran "
                "out: give the job more memory, or lower data.shuffle_buffer or data.workers, and start again to resume."
            )
        return RuntimeError(f"the data process ended with exit code {code}; what it printed last says why")

    def kill(self) -> None:
        """End the process at once; `steps` then ends too."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a disk that does not answer can hold it
            self._process.wait(10.0)

    def close(self) -> None:
        """End the process and close the pipes, which nobody may be using."""
        self.kill()
        if self._process.returncode is None:  # a thread may still wait at the pipe, and closing it would wait for that
            return
        for pipe in (self._orders, self._answers):
            with suppress(OSError):  # an order that was never read
                pipe.close()


def main(pipe: int) -> None:
    """Body of the process: answer the order on standard input through the file descriptor `pipe`, and exit."""
    try:
        with open(pipe, "wb") as answers:
            try:
                order = pickle.load(sys.stdin.buffer)
                threading.Thread(target=_watch, args=(order.parent,), daemon=True).start()
                for step in _made(order):
                    pickle.dump(step, answers)
                    answers.flush()
            except BrokenPipeError:
                raise
            except UserError as error:
                pickle.dump(Failure(str(error), for_user=True), answers)
            except BaseException:
                pickle.dump(Failure(traceback.format_exc(), for_user=False), answers)
    except BrokenPipeError:
        pass  # nobody waits for an answer
    os._exit(0)  # past threads and generators that are in the middle of something


def _made(order: Order) -> Iterator[Step]:
    plan = order.plan
    if isinstance(plan.tokenizer, SentencePieceTokenizer):  # others go by the environment
        plan.tokenizer.threads = order.threads
    chunk = max(CHUNK, 16 * order.threads)
    # Reading and tokenising take about the same time, and the tokenizer's threads run without Python's lock.
    for step in steps(plan, order.place, order.step, chunk, lambda readings: Ahead(readings, 1, "data-reading")):
        narrow = step.ids.astype(np.uint16) if step.ids.max() < 1 << 16 else step.ids
        yield dataclasses.replace(step, ids=narrow)


def _watch(parent: int) -> None:
    """End this process as soon as the training process is gone: nothing else is ever sent on standard input.

    Its copy of the pipe may live on in a process that it forked; then the parent's number tells.
    """
    while not select.select([sys.stdin], [], [], 1.0)[0] and os.getppid() == parent:
        pass
    os._exit(1)
