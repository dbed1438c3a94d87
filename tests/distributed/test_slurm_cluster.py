"""The Slurm that other tests submit to: two nodes, requeue, signals, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.servers import wait_until
from tests.support.slurm_cluster import GPU_PARTITION, SlurmCluster, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(120)]


def batch(folder: Path, body: str, **options: str) -> Path:
    """A batch script in `folder` with these #SBATCH options."""
    script = folder / "job.sh"
    lines = [f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in options.items()]
    script.write_text("\n".join(["#!/bin/bash", *lines, body]))
    return script


def names(processes: list[psutil.Process]) -> list[str]:
    return [process.info["name"] for process in processes]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def was_led_to(cluster: SlurmCluster, process: psutil.Process) -> bool:
    try:
        return process.environ().get("SLURM_CONF") == cluster.env["SLURM_CONF"]
    except psutil.Error:  # it has ended, or not even root may read it
        return False


def test_two_nodes_with_names_that_resolve(tmp_path: Path) -> None:
    body = """
        scontrol show hostnames "$SLURM_JOB_NODELIST"
        srun --ntasks-per-node=1 bash -c 'echo task $SLURM_PROCID $SLURMD_NODENAME $(hostname) $(getent hosts n2)'
    """
    with SlurmCluster(tmp_path, nodes=2) as cluster:
        job_id = cluster.sbatch(batch(tmp_path, body, nodes="2", ntasks_per_node="1"))
        assert cluster.wait(job_id)["ExitCode"] == "0:0", cluster.output(job_id)
        printed = cluster.output(job_id).splitlines()
    assert printed[:2] == ["n1", "n2"]
    assert sorted(" ".join(line.split()) for line in printed[2:]) == [
        "task 0 n1 n1 127.0.0.3 n2",
        "task 1 n2 n2 127.0.0.3 n2",
    ]


def test_a_job_that_asks_for_it_starts_again(tmp_path: Path) -> None:
    body = """
        echo "start ${SLURM_RESTART_COUNT-first}"
        [ -n "$SLURM_RESTART_COUNT" ] && exit 3
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60
    """
    with SlurmCluster(tmp_path, nodes=1) as cluster:
        job_id = cluster.sbatch(batch(tmp_path, body, open_mode="append"), "--requeue")
        job = cluster.wait(job_id, timeout_s=40)
        printed = cluster.output(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "1")
    assert [line for line in printed.splitlines() if line.startswith("start")] == ["start first", "start 1"]


@pytest.mark.parametrize(("options", "who"), [(("--batch",), "batch"), ((), "step")])
def test_a_signal_reaches_the_batch_shell_or_the_steps(tmp_path: Path, options: tuple[str, ...], who: str) -> None:
    body = """
        trap 'echo batch got it; exit 0' USR1
        srun bash -c 'trap "echo step got it; exit 0" USR1; echo listening; while :; do sleep 0.1; done' &
        wait
    """
    with SlurmCluster(tmp_path, nodes=1) as cluster:
        job_id = cluster.sbatch(batch(tmp_path, body))
        cluster.wait(job_id, ("RUNNING",))
        wait_until(lambda: "listening" in cluster.output(job_id), timeout_s=20)
        cluster.ask("scancel", *options, "--signal=USR1", job_id)
        wait_until(lambda: "got it" in cluster.output(job_id), timeout_s=20)
        assert f"{who} got it" in cluster.output(job_id)


def test_limits_can_be_asked_for_before_anything_is_submitted(tmp_path: Path) -> None:
    with SlurmCluster(tmp_path, nodes=2, cpus=3, settings=GPU_PARTITION) as cluster:
        limits = cluster.ask("sinfo", "--noheader", "--format=%R|%l|%s|%D|%c|%G").splitlines()
    assert limits == [
        "main|1:00:00|1-infinite|2|3|(null)",
        "cpu-only|30:00|1|2|3|(null)",
        "gpu|2-00:00:00|1-3|4|64|gpu:h100:8",
    ]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    # One process that hides from its job: a session of its own, an empty environment, a parent that has ended.
    body = """
        (env -i setsid bash -c 'exec sleep 301' &)
        srun sleep 300
    """
    with SlurmCluster(tmp_path, nodes=1) as cluster:
        cluster.sbatch(batch(tmp_path, body))
        wait_until(lambda: names(cluster.processes()).count("sleep") == 2, timeout_s=20)
        started = cluster.processes()
        assert ["sleep", "301"] in [process.cmdline() for process in started]
    assert {"munged", "slurmctld", "slurmd", "srun"} <= set(names(started))
    assert [process for process in started if is_alive(process)] == []


def test_a_failed_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    cluster = SlurmCluster(tmp_path, settings="NoSuchKey=1\n")
    with pytest.raises(RuntimeError, match="unrecognized key: NoSuchKey"):
        cluster.__enter__()
    assert [process for process in psutil.process_iter() if is_alive(process) and was_led_to(cluster, process)] == []
