"""The batch script of a job on Slurm: plain bash around `torchrun` or `ray symmetric-run`, readable and repeatable.

What the script takes care of: Slurm's signal before the time limit (and of preemption) becomes the run's own stop
request; exit code 75 puts the same job back into the queue; a start of Ray that failed is not taken for success
(`ray symmetric-run` ends with 0 then); Ray processes left by others of the user are found before, since its end stops
them all.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from cluster.settings import Container, SlurmCluster
from cluster.submission import Job, Record
from data_pipeline import storage
from data_pipeline.errors import ConfigError
from rddm_dist.training.stopping import KEEP_ENV

SCRIPT_FILE = "job.sbatch"
PLAIN_PATH = re.compile(r"[-\w./@:+=,~]+")
CONFIG, CACHE = "$config", "data.cache_dir=$scratch/cache"  # words of commands that the shell is to fill in
PORTS = 1000  # ports above the first among which a job's own is chosen, so that jobs of one node do not collide


def nodes_of(cluster: SlurmCluster, job: Job) -> int:
    """Nodes that hold the job's workers."""
    return -(-job.workers // cluster.workers_per_node)


def render(cluster: SlurmCluster, job: Job, record: Record) -> str:
    """The whole script."""
    folder = _folder(job, record)
    parts = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(cluster, job, folder)),
        "# shellcheck disable=SC2016,SC2054,SC2329  # for variables of bash -c, commas in options, traps",
        "",
        *cluster.setup,
        "set -u -o pipefail",  # after lines of others, which may not bear it
        "",
        *_settings(cluster, job, record, folder),
        "",
        *_signals(cluster, job),
        "",
        *(_ray(cluster, job) if cluster.form == "ray" else _torchrun(cluster, job)),
        "",
        *(_requeue(cluster, job) if cluster.requeue else END),
    ]
    return "\n".join(parts) + "\n"


def check_path(job: Job, record: Record) -> None:
    """Refuse what a batch script's own options cannot name as the place of its output."""
    folder = _folder(job, record)
    if not PLAIN_PATH.fullmatch(folder):
        raise ConfigError(
            f"{folder} holds a space, % or another character that sbatch does not take in the path of a job's output; "
            "choose another storage, or run.name"
        )


def _folder(job: Job, record: Record) -> str:
    """The record as nodes see it; of runs at a URL the local copy, on a file system that nodes share."""
    return record.home if storage.is_local(job.home) else str(record.local)


def _options(cluster: SlurmCluster, job: Job, folder: str) -> Iterator[str]:
    of_node = min(job.workers, cluster.workers_per_node)
    yield f"--job-name={job.name}"
    yield f"--partition={cluster.partition}"
    for name in ("account", "qos", "constraint"):
        if getattr(cluster, name):
            yield f"--{name}={getattr(cluster, name)}"
    yield f"--nodes={nodes_of(cluster, job)}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={of_node * cluster.cpus_per_worker}"
    if job.gpus_per_worker:
        yield f"--gpus-per-node={of_node * job.gpus_per_worker}"
    if cluster.memory:
        yield f"--mem={cluster.memory}"
    if cluster.exclusive:
        yield "--exclusive"
    yield f"--time={cluster.time}"
    yield f"--signal=B:USR1@{cluster.signal_s}"
    yield "--requeue" if cluster.requeue else "--no-requeue"
    yield "--open-mode=append"
    if job.trials:
        limit = f"%{cluster.array_parallel}" if cluster.array_parallel else ""
        yield f"--array=0-{len(job.trials) - 1}{limit}"
    yield f"--output={folder}/slurm-{'%A_%a' if job.trials else '%j'}.log"
    yield from cluster.sbatch


def _settings(cluster: SlurmCluster, job: Job, record: Record, folder: str) -> Iterator[str]:
    """Where everything is, and the environment."""
    yield f"export RDDM_LAUNCH={record.number}"
    if not storage.is_local(job.home):
        # The script cannot see there whether somebody stopped the run, so the run's own exit code has to tell.
        yield "export RDDM_STOPPED_CODE=0"
    for name, value in cluster.env.items():
        yield f"export {name}={shlex.quote(value)}"
    if cluster.network:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            yield f"export {name}={shlex.quote(cluster.network)}"
    yield f"record={shlex.quote(folder)}"
    if job.trials:
        parent = job.home.rpartition("/")[0]
        yield f"trials=({' '.join(trial.name for trial in job.trials)})"
        yield "trial=${trials[$SLURM_ARRAY_TASK_ID]}"
        yield f'run={shlex.quote(parent)}/$trial config="$record/$trial.yaml"'
    else:
        yield f"run={shlex.quote(job.home)}"
    if job.kind == "train" and not job.trials:
        yield 'config="$record/config.yaml"'
    if job.kind == "train" or cluster.form == "ray":
        yield from _meeting(cluster)
    yield f"python=({shlex.join(_python(cluster, job, folder))})"
    if cluster.form == "ray" and cluster.container is None and "/" in cluster.python:
        yield "# ray symmetric-run looks for ray there."
        yield f"export PATH={shlex.quote(cluster.python.rpartition('/')[0])}:$PATH"
    yield f"srun_options=(--nodes={nodes_of(cluster, job)} --ntasks-per-node=1{_pyxis(cluster, job, folder)})"
    if job.kind == "train" and storage.is_local(job.home):
        yield 'rm -f "$run/stop-request"  # of an earlier start; what lies there from now on counts'
        yield f"export {KEEP_ENV}=1"
        if cluster.requeue:
            yield from _newest(job)
    if job.trials or (job.kind == "train" and not storage.is_local(job.home)):
        step = 'srun --overlap "${srun_options[@]}" --nodes=1 ' if _pyxis(cluster, job, folder) else ""
        yield f'here=({step}"${{python[@]}}")  # Python for the script itself'
    if cluster.scratch:
        yield f'export scratch="{cluster.scratch}"'


def _meeting(cluster: SlurmCluster) -> Iterator[str]:
    """Where the processes of the job meet: an address of the first node, on which the script runs."""
    if cluster.network:
        yield f"address=$(ip -4 -o addr show dev {shlex.quote(cluster.network)} | awk '{{print $4; exit}}')"
        yield "address=${address%/*}"
    else:
        yield "address=$(hostname -I | awk '{print $1}')"
    yield "address=${address:-127.0.0.1}  # of this node, the first of the job"
    yield f"port=$(({cluster.port} + SLURM_JOB_ID % {PORTS}))"
    yield 'while (: < "/dev/tcp/$address/$port") 2> /dev/null; do port=$((port + 1)); done  # somebody listens there'


def _python(cluster: SlurmCluster, job: Job, folder: str) -> list[str]:
    """Python with rddm-dist, inside apptainer's container where there is one."""
    container = cluster.container
    if container is None or container.engine != "apptainer":
        return [cluster.python]
    mounts = [part for mount in _mounts(container, job, folder) for part in ("--bind", mount)]
    gpus = ["--nv"] if job.gpus_per_worker else []
    return ["apptainer", "exec", *gpus, *mounts, *container.options, container.image, cluster.python]


def _mounts(container: Container, job: Job, folder: str) -> list[str]:
    """The run folders come by themselves; of runs at a URL the record of the launch."""
    own = job.home.rpartition("/")[0] if storage.is_local(job.home) else folder
    return [own, *container.mounts]


def _pyxis(cluster: SlurmCluster, job: Job, folder: str) -> str:
    """Options of srun that start what it starts inside pyxis' container."""
    container = cluster.container
    if container is None or container.engine != "pyxis":
        return ""
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(container, job, folder)]
    options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
    return " " + shlex.join([*options, *container.options])


def _signals(cluster: SlurmCluster, job: Job) -> Iterator[str]:
    """What Slurm's signals do, waiting for a step through them, and the end."""
    yield "# Slurm's signal, or its SIGTERM at preemption: the work saves what it has and ends with 75."
    yield "ask_to_stop() {"
    yield "  signalled=1 asked=${asked:-$1}"
    yield '  echo "$(date +%T) $1: asking the run to save and stop"'
    if job.kind == "train" and storage.is_local(job.home):
        yield '  [ -e "$run/stop-request" ] || printf "preempted: %s" "$1" > "$run/stop-request"'
    elif job.kind == "train":
        yield '  "${here[@]}" -m rddm_dist.cli.main stop "$run" --preempted "$1"'
    elif cluster.form == "ray":
        yield '  kill -INT "$(cat "$said.pid")"  # not Ray, which would go first'
    else:
        yield '  scancel --signal=INT "$SLURM_JOB_ID"'
    yield from SIGNALS
    yield f'ended="$record/ended-{"$trial" if job.trials else "$SLURM_JOB_ID"}"'
    yield 'rm -f "$ended"'
    yield "ended() {"
    yield '  echo "$1" > "$ended"'
    if job.trials:
        yield '  local all=("$record"/ended-*)  # the last one prints the table of the sweep and ends its MLflow run'
        yield f'  [ "${{#all[@]}}" -lt {len(job.trials)} ] || "${{here[@]}}" -m cluster.sweep_end "$record/sweep.json"'
    yield '  exit "$1"'
    yield "}"


# Bash runs a trap as soon as `wait` returns; a second `wait` then waits on, or says again how the step ended.
SIGNALS = (
    "}",
    "trap 'ask_to_stop \"the signal before the time limit (SIGUSR1)\"' USR1",
    "trap 'ask_to_stop \"SIGTERM from Slurm\"' TERM",
    "asked=",
    "run_step() {  # wait for a command, through signals; its exit code is in $code",
    "  signalled=",
    '  "$@" &',
    "  wait $!",
    "  code=$?",
    '  while [ -n "$signalled" ]; do',
    "    signalled=",
    "    wait $!",
    "    code=$?",
    "  done",
    "}",
)

END = ('ended "$code"',)


def _requeue(cluster: SlurmCluster, job: Job) -> Iterator[str]:
    yield "# Stopped and resumable: back into the queue, under the same job id. Not where a person stopped it: by rddm"
    yield "# stop, or by scancel, after which Slurm calls the job COMPLETING before this script has ended."
    yield "is_cancelled() {"
    yield '  [ "${asked%% *}" = SIGTERM ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=COMPLETING'
    yield "}"
    yield 'if [ "$code" -eq 75 ] && [ ! -e "$record/stopped" ] && [ ! -e "$run/launch/$RDDM_LAUNCH/stopped" ] &&'
    yield "  ! is_cancelled; then"
    if _counts_idle(job):
        yield '  idle=$(cat "$idle_file" 2> /dev/null || echo 0)'
        yield '  if [ "$(newest)" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi'
        yield '  echo "$idle" > "$idle_file"'
        yield f'  if [ "$idle" -gt {cluster.retries} ]; then'
        yield '    echo "error: stopped $idle times in a row without a new checkpoint, so not queued again;" \\'
        yield '      "raise time, or lower signal_s, of the cluster file" >&2'
        yield '    ended "$code"'
        yield "  fi"
    yield '  echo "$(date +%T) stopped and resumable: queued again"'
    yield '  scontrol requeue "$SLURM_JOB_ID" && exit 75'
    yield "fi"
    yield 'ended "$code"'


def _counts_idle(job: Job) -> bool:
    """Whether the script can see if a start brought a checkpoint."""
    return job.kind == "train" and storage.is_local(job.home)


def _newest(job: Job) -> Iterator[str]:
    """What is asked before and after a start."""
    yield "newest() {  # checkpoint of the run, of the search for its objective at first"
    yield '  find "$run/checkpoints" "$run/search" -name COMMIT.json 2> /dev/null | sort | tail -n 1'
    yield "}"
    yield "before=$(newest)"
    yield f'idle_file="$record/idle-{"$trial" if job.trials else "$SLURM_JOB_ID"}"'


def _torchrun(cluster: SlurmCluster, job: Job) -> Iterator[str]:
    if job.kind != "train":
        work = _tail(job.command("", config="", with_ray=False))
        yield f'run_step srun "${{srun_options[@]}}" "${{python[@]}}" {work}'
        return
    of_node = min(job.workers, cluster.workers_per_node)
    yield "# A torchrun on each node. Who saves leaves together with all others; --wait is for what then still writes."
    yield "on_every_node() {"
    yield '  run_step srun --kill-on-bad-exit=0 --wait=300 "${srun_options[@]}" \\'
    yield '    bash -c \'PET_NODE_RANK=$SLURM_NODEID exec "$@"\' bash "${python[@]}" -m rddm_dist.torchrun \\'
    yield (
        f'    --nnodes={nodes_of(cluster, job)} --nproc-per-node={of_node} --master-addr="$address" '
        '--master-port="$port" "$@"'
    )
    yield "}"
    cache = f' "{CACHE}"' if cluster.scratch else ""
    train = f'on_every_node -m rddm_dist.training "$config"{cache}'
    if cluster.preflight:
        yield 'on_every_node -m cluster.preflight "$config"'
        yield '[ "$code" -eq 0 ] || ended "$code"'
        yield "code=75  # where the signal has come already"
        yield f'[ -n "$asked" ] || {train}'
    else:
        yield train


def _ray(cluster: SlurmCluster, job: Job) -> Iterator[str]:
    of_node = min(job.workers, cluster.workers_per_node)
    yield "# Ray processes of this user would be taken for ours, and be stopped at the end."
    yield 'stray=$(srun "${srun_options[@]}" bash -c \'pgrep -u "$(id -u)" -x raylet > /dev/null && hostname; true\')'
    yield 'if [ -n "$stray" ]; then'
    yield "  stray=${stray//$'\\n'/ }"
    yield '  echo "error: Ray runs already on $stray (of $(id -un)); run ray stop there, or exclude it" >&2'
    yield "  ended 2"
    yield "fi"
    yield f"export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={cluster.wait_s}"
    yield "export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token"
    yield "RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
    yield f"export RAY_AUTH_TOKEN{' config' if job.kind == 'train' else ''}"
    yield "# What the command on the first node ended with: ray symmetric-run itself ends with 0 where Ray fails."
    yield 'export said="$record/exit-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'
    yield f"on_first_node={shlex.quote(_first_node(cluster, job))}"
    yield "with_ray() {  # without the long lines that ray stop has for each process"
    yield '  srun --kill-on-bad-exit=0 --wait=60 "${srun_options[@]}" \\'
    yield '    "${python[@]}" -m ray.scripts.scripts symmetric-run --address "$address:$port" \\'
    yield f"    --min-nodes {nodes_of(cluster, job)} --include-dashboard=false \\"
    yield f"    --num-cpus {of_node * cluster.cpus_per_worker} --num-gpus {of_node * job.gpus_per_worker} \\"
    yield '    -- "$@" 2>&1 | { grep --line-buffered -v "VINFO scripts.py" || true; }'
    yield "}"
    yield 'run_step with_ray bash -c "$on_first_node" bash "$address:$port" "${python[@]}"'
    yield 'if [ -e "$said" ]; then'
    yield '  code=$(cat "$said")'
    yield 'elif [ "$code" -eq 0 ]; then'
    yield f'  echo "error: Ray did not come up on all nodes (they have wait_s={cluster.wait_s} s); see above" >&2'
    yield "  code=1"
    yield "fi"


def _first_node(cluster: SlurmCluster, job: Job) -> str:
    """The program that ray symmetric-run starts on the first node: the look at all nodes, then the job."""
    lines = ["", '  export RAY_ADDRESS="$1"; shift']
    if cluster.preflight:
        lines.append(f'  "$@" -m rddm_dist.cli.main doctor cluster {_preflight_arguments(cluster, job)} &&')
    lines.append(f'  (echo "$BASHPID" > "$said.pid"; exec "$@" {_tail(_ray_command(cluster, job))})')
    lines.append('  code=$?; echo "$code" > "$said"; exit "$code"')
    return "\n".join(lines)


def _ray_command(cluster: SlurmCluster, job: Job) -> list[str]:
    command = job.command("", config=CONFIG, retries=cluster.retries)
    if job.kind == "train":
        command += ["--cpus-per-worker", str(cluster.cpus_per_worker)]
        command += [CACHE] if cluster.scratch else []
    return command


def _preflight_arguments(cluster: SlurmCluster, job: Job) -> str:
    storage_of = shlex.quote(job.home.rpartition("/")[0])
    place = '"$config"' if job.kind == "train" else f"--storage {storage_of}"
    return (
        f"{place} --workers {job.workers} --gpus-per-worker {job.gpus_per_worker} "
        f"--cpus-per-worker {cluster.cpus_per_worker}"
    )


def _tail(command: list[str]) -> str:
    """A command without its python, quoted; the script's own variables stay ones."""
    return " ".join(f'"{part}"' if part in (CONFIG, CACHE) else shlex.quote(part) for part in command[1:])
