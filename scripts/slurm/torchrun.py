"""torchrun for job scripts: the same arguments, but an exit code that tells how the run has ended.

torchrun itself ends with 1, whatever its ranks say. This ends with

    75        a signal has stopped the run, or the launcher: the same command goes on from the last checkpoint
    74        another node is gone
    others    of the rank that failed: 2 and 3 of train.py, 1 for an exception, 128 + N for a rank killed by signal N
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

INTERRUPTED, LOST_CONTACT = 75, 74  # pretraining/signals.py


def code_of(exits: Iterable[int]) -> int:
    """Of several ranks that have not ended well (negative: killed by that signal), the one that is the reason.

    A rank that lost the others, or that the launcher has put an end to (SIGTERM), is a consequence.
    """
    every = list(exits)
    reasons = [code for code in every if code not in (LOST_CONTACT, -signal.SIGTERM)] or every
    code = next((code for code in reasons if code != INTERRUPTED), INTERRUPTED)
    return code if code >= 0 else 128 - code


def main() -> int:
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return code_of(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        print(f"torchrun: {signal.Signals(error.sigval).name} received", file=sys.stderr, flush=True)
        return INTERRUPTED
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        print(
            f"torchrun: another node is gone or was never reached ({error}); submit the same command again if the job ends",
            file=sys.stderr,
            flush=True,
        )
        return LOST_CONTACT
    return 0


if __name__ == "__main__":
    sys.exit(main())
