"""The container of a pod as a process: what its manifest says, as process 1 of Linux namespaces of its own.

A pod has its own name, processes, /dev/shm and /etc with the files of its ConfigMap; pods of one `Pods` share a network
that is apart from the machine's. A volume is the folder of that path here, and the image is the Python of the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.processes import Finished, finish, kill_group

MOUNT = "/etc/rddm"
NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")

OVERLAY_ETC = """set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc
"""

# As process 1: $1 is a folder with the files of the ConfigMap, $2 the pod's name, $3 all that is known as hosts, $4 the
# size of /dev/shm; then the command, whose environment is exactly the variables that come before it.
_INIT = f"""
{OVERLAY_ETC}
files=$1 name=$2 hosts=$3 shared_memory=$4
shift 4
mkdir {MOUNT}
mount --bind "$files" {MOUNT}
mount -o remount,bind,ro {MOUNT}
echo "$hosts" > /etc/hosts
mount -t tmpfs -o "size=$shared_memory,mode=1777" tmpfs /dev/shm
echo "$name" > /proc/sys/kernel/hostname
exec env -i "$@"
"""


def why_not() -> str:
    """Why there can be no pods here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "pods need root on Linux"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"pods need {' and '.join(missing)} (Debian: iproute2, util-linux, mount)"
    result = subprocess.run(
        ["unshare", "--net", *NAMESPACES, "sh", "-c", OVERLAY_ETC], capture_output=True, text=True, timeout=30
    )
    return "" if result.returncode == 0 else f"no namespaces here: {' '.join(result.stderr.split())}"


class Pods:
    """The pods of an indexed Job.   with Pods(manifests, folder) as pods: pod = pods.start(0)

    manifests: ConfigMap and Job, as they are applied together; folder: for what the pods are made of.
    """

    def __init__(self, manifests: Sequence[dict[str, Any]], folder: Path) -> None:
        by_kind = {manifest["kind"]: manifest for manifest in manifests}
        self.job = by_kind["Job"]
        self._template = self.job["spec"]["template"]["spec"]
        self.grace_s = int(self._template["terminationGracePeriodSeconds"])
        self._config, self._folder = by_kind["ConfigMap"]["data"], folder
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Pods:
        (self._folder / "launch").mkdir(exist_ok=True)
        for name, text in self._config.items():
            (self._folder / "launch" / name).write_text(text)
        network = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._undo.callback(kill_group, network)
        assert network.stdout is not None and network.stdout.readline() == "ready\n"
        self._network = network.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def start(self, index: int) -> Pod:
        """Start the pod of this index, in the environment that Kubernetes and the image add to the manifest's."""
        [container] = self._template["containers"]
        name = f"{self.job['metadata']['name']}-{index}"
        # Addresses as the headless service gives them out; a pod is known to itself by its name alone.
        domain = f"{self._template.get('subdomain', '')}.{self.job['metadata']['namespace']}"
        others = " ".join(
            f"{self.job['metadata']['name']}-{i}.{domain}" for i in range(self.job["spec"]["completions"])
        )
        image = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(Path.home())}
        given = {"HOSTNAME": name, "JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        env = {**image, **given, **{entry["name"]: entry["value"] for entry in container["env"]}}
        size = next(v["emptyDir"]["sizeLimit"] for v in self._template["volumes"] if v["name"] == "shared-memory")
        arguments = [str(self._folder / "launch"), name, f"127.0.0.1 localhost {name} {others}", size.rstrip("i")]
        command = [*container["command"], *container.get("args", [])]
        process = subprocess.Popen(
            [
                "nsenter", "--target", str(self._network), "--net", "unshare", *NAMESPACES, "sh", "-c", _INIT, "init",
                *arguments, *(f"{key}={value}" for key, value in env.items()), *command,
            ],
            cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._undo.callback(kill_group, process)
        return Pod(process, self.grace_s)

    def verdict(self, code: int, *, is_disrupted: bool = False) -> str:
        """What the Job does about a pod that failed so: FailJob, Ignore, or Count (towards backoffLimit)."""
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            on_code = rule.get("onExitCodes", {})
            is_met = code in on_code.get("values", []) if on_code else is_disrupted
            if is_met:
                return str(rule["action"])
        return "Count"


@dataclass(frozen=True)
class Pod:
    process: subprocess.Popen[str]
    grace_s: int

    def terminate(self) -> None:
        """SIGTERM to process 1, as at an eviction."""
        [first] = psutil.Process(self.process.pid).children()
        first.send_signal(signal.SIGTERM)

    def listens(self, port: int) -> bool:
        """Whether a process of the pod waits for connections there."""
        [first] = psutil.Process(self.process.pid).children() or [None]
        if first is None:
            return False
        table = Path(f"/proc/{first.pid}/net/tcp").read_text() + Path(f"/proc/{first.pid}/net/tcp6").read_text()
        return any(f":{port:04X} " in line and " 0A " in line for line in table.splitlines())

    def finish(self, *, timeout_s: float) -> Finished:
        """Wait for its end; TimeoutExpired kills it first."""
        return finish(self.process, timeout_s=timeout_s)
