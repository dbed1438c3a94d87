"""A Ray cluster of several nodes on this machine: each has an address, disk, shared memory and processes of its own.

A node is a set of Linux namespaces. Nodes reach each other over a bridge, and have one folder in common, as a cluster
has its shared storage. Whatever a node is made of goes away with its first process, and that one with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.processes import ROOT, Finished, environment, finish, kill_group, start

GCS_PORT = 6379
DASHBOARD_PORT = 8265
# With this in `env`, a lost node is noticed after 4 s instead of Ray's 30 s.
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
OBJECT_STORE_BYTES = 100 * 2**20
SHARED_MEMORY_BYTES = 1024 * 2**20
START_LIMIT_S = 120.0
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")

# In the new namespaces, as their process 1: $1 is the folder that becomes /tmp, $2 the node's name, $3 the names of all
# nodes, then the paths of the machine's /tmp that stay visible. It ends when the pipe from the tests' process closes.
_INIT = """
set -e
folder=$1 name=$2 hosts=$3 shared_memory=$4
shift 4
for path in "$@"; do
    mkdir -p "$folder/${path#/tmp/}"
    mount --rbind "$path" "$folder/${path#/tmp/}"
done
mount --bind "$hosts" /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi
mount --rbind "$folder" /tmp
mount -t tmpfs -o "size=$shared_memory,mode=1777" tmpfs /dev/shm
echo "$name" > /proc/sys/kernel/hostname
ip link set lo up
trap '' CHLD  # kept by cat: the kernel buries what was orphaned
echo ready
exec cat > /dev/null
"""


def why_not() -> str:
    """Why there can be no such cluster here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "nodes of their own need root on Linux"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"nodes of their own need {' and '.join(missing)} (Debian: iproute2, util-linux, mount)"
    probe = (
        "ip link add name probe type bridge && ip link add near type veth peer name far && mount -t tmpfs tmpfs /tmp"
    )
    result = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", probe], capture_output=True, text=True
    )
    return "" if result.returncode == 0 else f"no namespaces here: {' '.join(result.stderr.split())}"


class RayNodes:
    """A cluster whose node 0 is the head.   with RayNodes(folder, nodes=2) as cluster: cluster.run_on(1, [...])

    shared: the folder that all nodes see, under the path it has here; of the rest of /tmp they see the checkout and the
    Python environment alone. cpus: per node, as Ray counts. token: requests need a token (it is in `env`). env: for
    Ray's own processes, hence for what they start, and for every command.
    """

    def __init__(
        self, shared: Path, nodes: int = 2, cpus: int = 1, *, token: bool = True, env: Mapping[str, str] | None = None
    ) -> None:
        self.shared = shared.resolve()
        self._count, self._cpus = nodes, cpus
        self._token = secrets.token_hex(16) if token else ""
        self._more = dict(env or {})
        self._undo = contextlib.ExitStack()
        self._folder = Path()
        self._subnet = ""
        self._nodes: list[_Node] = []

    def __enter__(self) -> RayNodes:
        with self._undo as undo:
            self._folder = Path(tempfile.mkdtemp(prefix="rddm-nodes-")).resolve()
            undo.callback(shutil.rmtree, self._folder)
            (self._folder / "hosts").write_text("127.0.0.1 localhost\n")
            self._bridge = self._space("bridge")
            self._subnet, link = _attach(self._bridge.init)
            undo.callback(_checked, "ip", "link", "delete", link)
            self._start()
            self._wait(lambda: _listens(self.ip(0), GCS_PORT), started=1)
            for _ in range(1, self._count):
                self._start()
            self._wait(lambda: len(self.alive()) == self._count, started=self._count)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is inside the cluster."""
        return f"{self.ip(0)}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        """The URL that jobs are sent to, from inside and from this machine."""
        return f"http://{self.ip(0)}:{DASHBOARD_PORT}"

    @property
    def env(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment, wherever it runs."""
        if not self._token:
            return {"RAY_AUTH_MODE": "disabled"}
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def ip(self, index: int) -> str:
        return f"{self._subnet}.{10 + index}"

    def disk(self, index: int) -> Path:
        """The folder that is /tmp on this node, as seen from here."""
        return self._folder / f"node{index}" / "tmp"

    def logs(self, index: int) -> Path:
        """Ray's own logs of this node, as seen from here; they outlive the node."""
        return max((self.disk(index) / "ray").glob("session_2*")) / "logs"

    def start_on(
        self, index: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a node, in the shared folder unless told otherwise, and in a session of its own.

        The process is the one that entered the node: signals go to its group, with os.killpg.
        """
        enter = self._nodes[index].space.enter(cwd or self.shared)
        return start([*enter, *command], cwd=Path("/"), env=self._environment(env))

    def run_on(
        self,
        index: int,
        command: Sequence[str],
        *,
        timeout_s: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Finished:
        return finish(self.start_on(index, command, env=env, cwd=cwd), timeout_s=timeout_s)

    def add_node(self) -> int:
        """Start one more node and wait until the cluster has it.   -> its index"""
        self._start()
        self._wait(lambda: self.ip(len(self._nodes) - 1) in self.alive(), started=1)
        return len(self._nodes) - 1

    def kill_node(self, index: int, *, silently: bool = False) -> None:
        """Everything of the node dies at once, its network included. silently: the cable first, so nobody hears it."""
        if silently:
            _in_network(self._bridge.init, "ip", "link", "set", f"node{index}", "down")
        self._nodes[index].space.kill()
        self._nodes[index].ray.wait(timeout=10)

    def terminate_node(self, index: int) -> None:
        """SIGTERM to the node's `ray start`, as Kubernetes does: it says that it drains, and ends later."""
        ray_start = psutil.Process(self._nodes[index].ray.pid).children()[0]
        ray_start.send_signal(signal.SIGTERM)

    def wait_ended(self, index: int, *, timeout_s: float) -> int:
        """Wait for the node's `ray start` to end.   -> its exit code"""
        return self._nodes[index].ray.wait(timeout=timeout_s)

    def node_id(self, index: int) -> str:
        """What Ray calls a node."""
        return next(node["node_id"] for node in self._ask() if node["node_ip"] == self.ip(index))

    def alive(self) -> set[str]:
        """The addresses of the nodes that the cluster holds to be alive."""
        return {node["node_ip"] for node in self._ask() if node["state"] == "ALIVE"}

    def wait_alive(self, addresses: set[str], *, timeout_s: float) -> None:
        """Wait until these are the nodes that the cluster holds to be alive."""
        deadline = time.monotonic() + timeout_s
        while (alive := self.alive()) != addresses:
            if time.monotonic() > deadline:
                raise TimeoutError(f"alive after {timeout_s:.0f} s: {sorted(alive)}, awaited: {sorted(addresses)}")
            time.sleep(0.2)

    def _environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        # Nothing of the machine's own home is on a node.
        return {**self.env, "HOME": "/tmp", "TMPDIR": "/tmp", **self._more, **(more or {})}

    def _space(self, name: str) -> _Space:
        folder = self._folder / name / "tmp"
        folder.mkdir(parents=True)
        folder.chmod(0o1777)
        space = _Space.open(folder, name=name, hosts=self._folder / "hosts", keep=_under_tmp(self.shared))
        self._undo.callback(space.kill)
        return space

    def _start(self) -> None:
        index = len(self._nodes)
        with (self._folder / "hosts").open("a") as hosts:
            hosts.write(f"{self.ip(index)} node{index}\n")
        space = self._space(f"node{index}")
        _connect(space.init, self._bridge.init, name=f"node{index}", subnet=self._subnet, address=self.ip(index))
        ray_start = _ray_start(self.ip(index), head=None if index == 0 else self.address, cpus=self._cpus)
        log = self._folder / f"node{index}" / "ray_start.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*space.enter(Path("/tmp")), *ray_start],
                env=environment(self._environment()),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._undo.callback(kill_group, process)
        self._nodes.append(_Node(space, process, log))

    def _wait(self, is_so: Callable[[], bool], *, started: int) -> None:
        """Wait for something to be so, unless one of the nodes that were started last gives up before."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError):  # refused, reset, not yet answering
                if is_so():
                    return
            told = "\n".join(node.log.read_text() for node in self._nodes[-started:])
            for node in self._nodes[-started:]:
                if node.ray.poll() is not None:
                    raise RuntimeError(f"`ray start` ended with {node.ray.returncode}:\n{told}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster is not up after {START_LIMIT_S:.0f} s:\n{told}")
            time.sleep(0.2)

    def _ask(self) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes")
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            rows: list[dict[str, Any]] = json.load(response)["data"]["result"]["result"]
        return rows


@dataclass(frozen=True)
class _Space:
    """Namespaces with one process that holds them: when it dies, the kernel kills the others in them."""

    holder: subprocess.Popen[str]
    init: int  # process 1 of the namespaces, as numbered here

    @staticmethod
    def open(folder: Path, *, name: str, hosts: Path, keep: Sequence[Path]) -> _Space:
        arguments = [str(folder), name, str(hosts), str(SHARED_MEMORY_BYTES), *map(str, keep)]
        holder = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _INIT, "init", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            kill_group(holder)
            raise RuntimeError(f"cannot set up {name}: {holder.stderr.read()}")
        return _Space(holder, psutil.Process(holder.pid).children()[0].pid)

    def enter(self, cwd: Path) -> list[str]:
        """The command, without its end: what to run in here."""
        # The folder is entered from within: from outside, the path may be another place.
        within = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]
        return ["nsenter", "--target", str(self.init), *NAMESPACES, *within]

    def is_up(self) -> bool:
        return self.holder.poll() is None

    def kill(self) -> None:
        """Kill all processes in here, and wait until they are gone; again is no fault."""
        if self.is_up():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
        self.holder.communicate(timeout=10)


@dataclass(frozen=True)
class _Node:
    space: _Space
    ray: subprocess.Popen[str]  # the process whose only child is `ray start`
    log: Path


def _ray_start(address: str, *, head: str | None, cpus: int) -> list[str]:
    """The command that starts Ray on a node; it joins `head`, or is one."""
    role = [f"--address={head}"]
    if head is None:
        role = ["--head", f"--port={GCS_PORT}", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}"]
    size = [f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    ray = Path(sys.executable).with_name("ray")
    return [str(ray), "start", "--block", f"--node-ip-address={address}", "--disable-usage-stats", *role, *size]


def _listens(address: str, port: int) -> bool:
    with socket.create_connection((address, port), timeout=1.0):
        return True


def _under_tmp(shared: Path) -> list[Path]:
    """The paths of /tmp that a node sees: what all share, the checkout and the Python that runs it."""
    wanted = {path.resolve() for path in (shared, ROOT, Path(sys.prefix), Path(sys.base_prefix))}
    inside = sorted(path for path in wanted if path.is_relative_to("/tmp"))
    if Path("/tmp") in inside:
        raise ValueError("the nodes cannot share all of /tmp; give a folder in it")
    return [path for path in inside if not any(other in path.parents for other in inside)]


def _attach(bridge: int) -> tuple[str, str]:
    """Make a bridge in the namespaces of a process and join this machine to it, as its address 1.

    -> the first three numbers of the network's addresses, and the name of this machine's end
    """
    _in_network(bridge, "ip", "link", "add", "name", "bridge", "type", "bridge")
    _in_network(bridge, "ip", "link", "set", "bridge", "up")
    for number in range(1, 255):
        subnet, link = f"10.77.{number}", f"rddm{number}"
        if _is_used(subnet):
            continue
        # A name is taken once: whoever comes at the same time gets the next.
        added = subprocess.run(
            ["ip", "link", "add", "name", link, "type", "veth", "peer", "name", "machine", "netns", str(bridge)],
            capture_output=True,
            text=True,
        )
        if added.returncode == 0:
            break
        if "File exists" not in added.stderr:
            raise RuntimeError(f"cannot add a network link: {added.stderr}")
    else:
        raise RuntimeError("every network 10.77.x.0/24 is in use")
    _in_network(bridge, "ip", "link", "set", "machine", "master", "bridge", "up")
    _checked("ip", "address", "add", f"{subnet}.1/24", "dev", link)
    _checked("ip", "link", "set", link, "up")
    return subnet, link


def _is_used(subnet: str) -> bool:
    addresses = [address for link in psutil.net_if_addrs().values() for address in link]
    return any(one.family == socket.AF_INET and one.address.startswith(f"{subnet}.") for one in addresses)


def _connect(node: int, bridge: int, *, name: str, subnet: str, address: str) -> None:
    """Give the namespaces of one process an address on the bridge that is in those of another."""
    peer = ["peer", "name", "eth0", "netns", str(node)]
    _in_network(bridge, "ip", "link", "add", "name", name, "type", "veth", *peer)
    _in_network(bridge, "ip", "link", "set", name, "master", "bridge", "up")
    _in_network(node, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    _in_network(node, "ip", "link", "set", "eth0", "up")
    _in_network(node, "ip", "route", "add", "default", "via", f"{subnet}.1")


def _in_network(process: int, *command: str) -> None:
    # Of the network alone: the numbers of processes stay those of this machine.
    _checked("nsenter", "--target", str(process), "--net", *command)


def _checked(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {' '.join(result.stderr.split())}")
