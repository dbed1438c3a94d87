"""Run commands and groups of workers with a hard time limit; whatever they started is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RDDM = (sys.executable, "-m", "rddm_dist.cli.main")


@dataclass(frozen=True)
class Finished:
    """A command that ended by itself."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return f"exit code {self.code}\n{self.stdout}\n{self.stderr}"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with the checkout importable, one thread, and nothing of a launcher in it."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env["OMP_NUM_THREADS"] = "1"
    env["COLUMNS"] = "200"
    return {**env, **(extra or {})}


def start(command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a session of its own."""
    return subprocess.Popen(
        list(command),
        cwd=cwd,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a started command with its session and with what it started in other sessions (torchrun's workers)."""
    try:
        others = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        others = []
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        for other in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
        process.wait(timeout=10)


def finish(process: subprocess.Popen[str], *, timeout_s: float) -> Finished:
    """Wait for a started command; TimeoutExpired kills its session first."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException:
        kill_group(process)
        raise
    return Finished(process.returncode, stdout, stderr)


def run(
    command: Sequence[str], *, cwd: Path, timeout_s: float = 120.0, env: Mapping[str, str] | None = None
) -> Finished:
    return finish(start(command, cwd=cwd, env=env), timeout_s=timeout_s)


def rddm(*arguments: str, cwd: Path, timeout_s: float = 120.0, env: Mapping[str, str] | None = None) -> Finished:
    """Run the command line as a user does."""
    return run([*RDDM, *arguments], cwd=cwd, timeout_s=timeout_s, env=env)


def run_workers(
    command: Sequence[str],
    world_size: int,
    *,
    cwd: Path,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Finished]:
    """Run one command as `world_size` workers of a group, the way torchrun sets them up.   -> by rank"""
    processes = start_workers(command, world_size, cwd=cwd, env=env)
    try:
        # All at once: one that fills its pipe while another is read would hold up the group.
        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(partial(finish, timeout_s=timeout_s), processes))
    finally:
        for process in processes:
            kill_group(process)


def start_workers(
    command: Sequence[str], world_size: int, *, cwd: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **(env or {}),
    }
    return [
        start(command, cwd=cwd, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
