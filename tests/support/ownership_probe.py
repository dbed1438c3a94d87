"""A process that takes a run folder and obeys; `Child` starts and asks one.

`python -m tests.support.ownership_probe HOME BOOT BEAT_S` says "ready" and answers each line of its input (take, look,
release) by one line. BOOT: where it says it runs, instead of its own boot and process-id namespace, unless it is
empty; BEAT_S: seconds between its signs of life.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_pipeline.errors import EnvironmentFault
from rddm_dist.training import ownership
from tests.support.processes import environment, kill_group

STALE_S = 0.5


class Child:
    """Such a process, ready; leaving the block kills it."""

    def __init__(self, home: Path, *, boot: str = "", beat_s: float = 10.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ownership_probe", str(home), boot, str(beat_s)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def __enter__(self) -> Child:
        assert self.answer() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        kill_group(self.process)
        self.process.communicate()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()


def main(home: str, boot: str, beat_s: str) -> None:
    ownership.BEAT_S = float(beat_s)
    if boot:
        ownership._boot = lambda: boot
    print("ready", flush=True)
    owned: ownership.Ownership | None = None
    for line in sys.stdin:
        try:
            if line == "take\n":
                owned = ownership.take(home, stale_s=STALE_S)
                print("taken", flush=True)
            elif owned is not None and line == "look\n":
                owned.check()
                print("ours", flush=True)
            elif owned is not None and line == "release\n":
                owned.release()
                print("released", flush=True)
            else:
                print(f"cannot do {line}", flush=True)
        except EnvironmentFault as error:
            print(f"exit {error.exit_code}: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
