"""A real Slurm on this host: its own munged, slurmctld and one slurmd per node, with nothing of the machine changed.

Each slurmd runs in mount, host name and process namespaces of its own, with an /etc/hosts that knows every node: as on
a real cluster, `hostname` says the node's name, the names that `scontrol show hostnames` prints resolve (to 127.0.0.2,
.3, ...), and jobs see the processes and Ray files (/tmp/ray) of their node alone. Disk and ports are the host's own:
programs that tell nodes apart by their interfaces see one machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from tests.support.processes import Finished, environment, free_port, run

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare")
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
START_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.2
REQUEUE_DELAY_S = 5  # Slurm's own default is 120
KILL_WAIT_S = 30  # Slurm's own default: from SIGTERM at the time limit to SIGKILL

NODE_STATES = ("sinfo", "--noheader", "--Node", "--format=%N %T")
UNSHARE = ("unshare", "--propagation", "private", "--mount")

NODE = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")

# Run in the namespaces of a node: take its name, see its /etc/hosts and its own /tmp/ray, start slurmd and be the
# node's first process, which takes in orphans. The other arguments are folders that the node finds empty.
ENTER_NODE = """
name=$1 folder=$2; shift 2
echo "$name" > /proc/sys/kernel/hostname && mount --bind "$folder/hosts" /etc/hosts || exit 1
mkdir -p /tmp/ray && mount -t tmpfs -o mode=1777 ray /tmp/ray || exit 1
for hidden; do mount -t tmpfs hidden "$hidden" || exit 1; done
slurmd -D -N "$name" & wait $!
"""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={run}/munge.socket,cred_expire={requeue_delay}
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/%n.pid
SlurmctldLogFile={logs}/slurmctld.log
SlurmdLogFile={logs}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=60
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=60 DefaultTime=10 State=UP
PartitionName=cpu-only Nodes={names} MaxTime=30 MaxNodes=1 State=UP
"""

# For `settings`: a partition whose nodes are known but never up, to check requests for GPUs against.
GPU_PARTITION = """\
GresTypes=gpu
NodeName=g[1-4] NodeAddr=127.0.1.[1-4] CPUs=64 RealMemory=500000 Gres=gpu:h100:8 State=DOWN
PartitionName=gpu Nodes=g[1-4] MaxTime=2-00:00:00 MaxNodes=3 State=UP
"""


def why_not() -> str:
    """Why a real Slurm cannot run here: "" where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found; run: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start a Slurm of several nodes on one host"
    probe = subprocess.run([*UNSHARE, *NODE, "true"], capture_output=True, text=True, timeout=10)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


class SlurmCluster:
    """Nodes n1, n2, ... of `cpus` CPUs each, in the partitions `main` (60 minutes at most) and `cpu-only` (1 node, 30).

    `env` leads Slurm's commands to it. The folder `logs` keeps slurm.conf and the daemons' logs. `settings` are lines
    for the end of slurm.conf, where the last value of a key counts. `hidden`: folder by node that the node finds empty,
    as if it had not been mounted there.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        cpus: int = 2,
        settings: str = "",
        hidden: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.logs = folder / "slurm"
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.settings = settings
        self.hidden = hidden or {}
        self.env = {"SLURM_CONF": str(self.logs / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        # The mount namespaces of the daemons: a process keeps its own, so they tell what is the cluster's, however
        # it was started. Held open, because Linux gives the number of one that is gone to the next.
        self._namespaces: dict[str, int] = {}
        self._run = Path()  # sockets, whose paths may have 108 characters at most, and Slurm's state

    def __enter__(self) -> SlurmCluster:
        self.logs.mkdir(parents=True)
        self._run = Path(tempfile.mkdtemp(prefix="slurm-"))
        try:
            self._run.chmod(0o711)  # munge wants its socket within everyone's reach
            self._write_files()
            self._start_munged()
            self._start_slurm()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def command(self, *command: str, cwd: Path | None = None) -> Finished:
        """Run a command of Slurm, whatever its exit code."""
        return run(command, cwd=cwd or self.folder, timeout_s=COMMAND_TIMEOUT_S, env=self.env)

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints; AssertionError when it fails."""
        finished = self.command(*command)
        assert finished.code == 0, f"{' '.join(command)}: {finished.text}"
        return finished.stdout

    def sbatch(self, script: Path, *options: str) -> str:
        """Submit a script.   -> its job id"""
        return self.ask("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, Restarts, ExitCode, NodeList, StdOut, ..."""
        return fields(self.ask("scontrol", "--oneliner", "show", "job", job_id))

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def output(self, job_id: str) -> str:
        """What the job's batch script has printed so far."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text() if path.is_file() else ""

    def wait(self, job_id: str, states: Collection[str] = FINISHED, timeout_s: float = 60.0) -> dict[str, str]:
        """Wait until a job is in one of these states.   -> its fields; TimeoutError tells where it is instead"""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline:
                printed = self.output(job_id)[-2000:]
                where = f"{job['JobState']} (reason {job['Reason']}, restarts {job['Restarts']})"
                raise TimeoutError(f"job {job_id} is {where} after {timeout_s:.0f} s, not {states}\n{printed}")
            time.sleep(POLL_S)
        return job

    def processes(self) -> list[psutil.Process]:
        """Every living process of the cluster, those of its jobs too; the names are in `.info["name"]`."""
        self._note_namespaces()
        daemons = {daemon.pid for daemon in self._daemons if daemon.poll() is None}
        found = []
        for process in psutil.process_iter(["pid", "status", "name"]):
            belongs = process.pid in daemons or _mounts(process.pid) in self._namespaces
            if belongs and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def _note_namespaces(self) -> None:
        here = _mounts(os.getpid())
        for daemon in self._daemons:
            if daemon.poll() is None and (mounts := _mounts(daemon.pid)) not in ("", here, *self._namespaces):
                self._namespaces[mounts] = os.open(f"/proc/{daemon.pid}/ns/mnt", os.O_RDONLY)

    def _write_files(self) -> None:
        key = self._run / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        addresses = {name: f"127.0.0.{number}" for number, name in enumerate(self.names, start=2)}
        known = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self._run / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        (self.logs / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller=socket.gethostname().partition(".")[0],
                controller_port=free_port(),
                run=self._run,
                logs=self.logs,
                requeue_delay=REQUEUE_DELAY_S,
                kill_wait=KILL_WAIT_S,
                names=",".join(self.names),
                nodes="\n".join(
                    f"NodeName={name} NodeAddr={address} Port={free_port()} CPUs={self.cpus} RealMemory=8000"
                    for name, address in addresses.items()
                ),
            )
            + self.settings
        )
        for folder in ("state", *self.names):
            (self._run / folder).mkdir()

    def _start_munged(self) -> None:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "seed"}
        paths = [f"--{option}={self._run / name}" for option, name in files.items()]
        # --force: the folders above the log need not be as closed as munge wants them.
        options = ["--foreground", "--force", f"--log-file={self.logs}/munged.log"]
        munged = self._start("munged", ["munged", *options, *paths])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (self._run / "munge.socket").exists():
            self._check_start([munged], deadline)

    def _start_slurm(self) -> None:
        daemons = [self._start("slurmctld", ["slurmctld", "-D"])]
        for name in self.names:
            hidden = [str(self.hidden[name])] if name in self.hidden else []
            daemons.append(self._start(name, [*NODE, "sh", "-c", ENTER_NODE, "sh", name, str(self._run), *hidden]))
        deadline = time.monotonic() + START_TIMEOUT_S
        wanted = {f"{name} idle" for name in self.names}
        while not wanted <= {line.strip() for line in self.command(*NODE_STATES).stdout.splitlines()}:
            self._check_start(daemons, deadline)
        self._note_namespaces()

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._printed(name).open("wb") as printed:
            daemon = subprocess.Popen(
                [*UNSHARE, *command],
                cwd=self.folder,
                env=environment(self.env),
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def _printed(self, name: str) -> Path:
        return self.logs / f"{name}.printed"

    def _check_start(self, daemons: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.logs.glob("*.printed")))
            raise RuntimeError(f"Slurm did not start ({f'ended: {ended}' if ended else 'too slow'})\n{logs}")
        time.sleep(POLL_S / 4)

    def _stop(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while remaining := self.processes():
            assert time.monotonic() < deadline, f"Slurm's processes do not end: {remaining}"
            for process in remaining:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(POLL_S / 4)
        for daemon in self._daemons:
            daemon.wait(timeout=STOP_TIMEOUT_S)
        for held in self._namespaces.values():
            os.close(held)
        self._namespaces.clear()
        shutil.rmtree(self._run)


def fields(line: str) -> dict[str, str]:
    """The Key=Value pairs of one line of `scontrol --oneliner`; values may hold spaces and equal signs."""
    parts = re.split(r"(?:^|\s)([A-Z][A-Za-z_:/]*)=", line.strip())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _mounts(pid: int) -> str:
    """The mount namespace of a process: "" for one that has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""
