"""torchrun, with the exit codes and signals for launchers: `python -m rddm_dist.torchrun [OPTIONS] -m MODULE ...`.

torchrun itself ends with 1 whatever its workers said, and dies of a signal after giving them half a minute. Here the
first worker's own exit code (75 stopped, 2 bad input) becomes that of the node, and SIGTERM and SIGUSR1 are passed on
to the workers, which save and end in their own time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
HANDLED_BY_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


def main() -> None:
    """Start the workers of this node as torchrun does, with all its options."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for number in FORWARDED:
        signal.signal(number, _forward)
    try:
        run(parse_args([f"--signals-to-handle={HANDLED_BY_TORCHRUN}", *sys.argv[1:]]))
    except ChildFailedError as error:
        sys.exit(_code_of(error))


def _code_of(error: ChildFailedError) -> int:
    """The code of the worker that ended first of its own will; those that torchrun then ended died of a signal."""
    failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
    codes = [failure.exitcode for failure in failures]
    return next((code for code in codes if code > 0), 1)


def _forward(number: int, frame: FrameType | None) -> None:
    for child in _children():
        try:
            os.kill(child, number)
        except ProcessLookupError:  # it has just ended
            continue


def _children() -> list[int]:
    """Process ids of the processes that this one has started."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for path in lists for pid in path.read_text().split()]


if __name__ == "__main__":
    main()
