"""What a process takes: its memory, its processor time, and a process of its own for what must start afresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def memory_mb(name: str) -> float:
    """10^6 bytes of VmRSS (resident now) or VmHWM (at most so far) of this process. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {name}")


def tree_memory_mb(word: str) -> float:
    """10^6 bytes resident now (VmRSS) of the processes below this one whose command line holds `word`. Linux only.

    0 where there is none; pages that two of them share count twice.
    """
    total = 0.0
    for pid in _descendants():
        try:
            process = Path("/proc", pid)
            if word in (process / "cmdline").read_bytes().decode(errors="replace"):
                pages = int((process / "statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return total


def cpu_s() -> float:
    """Seconds of processor time of this process (all its threads) and of its children that still run. Linux only.

    Children are counted in ticks of 10 ms.
    """
    tasks = Path("/proc/self/task").iterdir()
    children = {child for task in tasks for child in (task / "children").read_text().split()}
    return time.process_time() + sum(map(_child_cpu_s, children))


def _descendants() -> set[str]:
    """Ids of all processes below this one."""
    children: dict[str, list[str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        children.setdefault(parent, []).append(stat.parent.name)
    found: set[str] = set()
    waiting = [str(os.getpid())]
    while waiting:
        own = children.get(waiting.pop(), [])
        found.update(own)
        waiting.extend(own)
    return found


def _child_cpu_s(pid: str) -> float:
    # Fields 14 and 15 of stat; the second, the name, may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_apart(script: str, *arguments: str, limit_s: float) -> Any:
    """Run a script in a new process and give the JSON value it prints. It is killed after limit_s seconds."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=limit_s)
    return json.loads(done.stdout)
