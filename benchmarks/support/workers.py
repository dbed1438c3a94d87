"""Run a script as a group of workers with a hard time limit; what is left of it is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline.errors import EnvironmentFault

TAIL = 2000  # characters shown of what a failed worker said


def run_group(script: str, arguments: list[str], *, world_size: int, limit_s: float) -> None:
    """Run `script` as `world_size` workers of one thread each, set up as torchrun does.

    Raises EnvironmentFault with the last words of the first worker that fails, or where they take longer than limit_s.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deadline = time.monotonic() + limit_s
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(scratch) / f"{rank}.log" for rank in range(world_size)]
        try:
            for rank, log in enumerate(logs):
                own = {**common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
                environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
                with log.open("wb") as output:
                    command = [sys.executable, script, *arguments]
                    processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            _await(processes, logs, deadline)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _await(processes: list[subprocess.Popen[bytes]], logs: list[Path], deadline: float) -> None:
    """Wait until all have ended well."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                said = logs[rank].read_text(errors="replace")[-TAIL:]
                raise EnvironmentFault(f"worker {rank} ended with {code}; it said: {said}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            said = logs[0].read_text(errors="replace")[-TAIL:]
            raise EnvironmentFault(f"the workers took too long; worker 0 said: {said}")
        time.sleep(0.1)
