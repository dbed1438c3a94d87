"""Packing from the command line and on Ray: the same bytes as in this process, one line for each end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from data_pipeline.errors import DataError, EnvironmentFault
from data_pipeline.pack import pack
from data_pipeline.pack_jobs import CheckJob, check_chunk
from data_pipeline.pack_output import STAGING
from data_pipeline.sources import find_pairs
from tests.support.datasets import make_folders
from tests.support.processes import RDDM, finish, kill_group, rddm, start
from tests.support.servers import wait_until

pytestmark = [pytest.mark.timeout(180)]


def _content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.mark.ray
def test_ray_packs_the_same_bytes_and_tells_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One local Ray for all; the sources are given by relative paths, the workers stand elsewhere."""
    from cluster import ray_pack
    from cluster.ray_session import ray_session
    from rddm_dist.cli.data import pack_pairs

    monkeypatch.chdir(tmp_path)
    input_dir, target_dir = make_folders(Path("source"), count=12)
    pairs = find_pairs(input_dir, target_dir)
    pack(pairs, "here", shard_mb=0.02, codec="png", tile=32, overlap=4, jobs=1)
    with ray_session(cpus=2):
        result = pack_pairs(pairs, "on-ray", shard_mb=0.02, codec="png", seed=0, jobs=2, ray=True, tile=32, overlap=4)
        assert not result.reused and len(result.manifest.shards) > 2
        pairs[3].target.write_bytes(b"no image")
        with pytest.raises(DataError, match=r"target/photo_003\.png cannot be used"):
            pack_pairs(pairs, "bad", shard_mb=0.02, codec="png", seed=0, jobs=2, ray=True)
        job = CheckJob(tuple(pairs[:1]), str(pairs[0].target.absolute() / "check.json"), "full")
        monkeypatch.setattr(ray_pack, "MAX_RETRIES", 1)
        with ray_pack.ray_tasks(2) as work:
            with pytest.raises(EnvironmentFault, match="^--out full cannot be written: Not a directory$"):
                list(work.map(check_chunk, [job]))
            with pytest.raises(
                EnvironmentFault, match=r"packing on Ray failed \(WorkerCrashedError\), after 1 retries"
            ):
                list(work.map(os._exit, [3]))
    assert _content(Path("on-ray")) == _content(Path("here"))
    assert not Path("bad").exists()
    output = capfd.readouterr()
    assert "pack 12/12" in output.out and "packed on-ray: 48 tiles" in output.out
    assert "Traceback" not in output.out + output.err


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path: Path) -> None:
    # Much work for one job: it must not be over before the signal comes, however busy the machine.
    make_folders(tmp_path / "source", count=160, size=(240, 240))
    command = (
        "pack", "--input", "source/input", "--target", "source/target", "--codec", "webp", "--shard-mb", "0.001",
    )  # fmt: skip
    process = start([*RDDM, *command, "--jobs", "1", "--out", "data"], cwd=tmp_path)
    try:
        wait_until(lambda: len(list((tmp_path / "data" / STAGING).glob("shard-*.json"))) >= 2, timeout_s=60)
        process.send_signal(signal.SIGINT)
        stopped = finish(process, timeout_s=30)
    finally:
        kill_group(process)
    assert stopped.code == 75, stopped.text
    assert stopped.stderr == "warning: what is finished of data is kept; the same command goes on from there\n"
    kept = {path.stem for path in (tmp_path / "data" / STAGING).glob("shard-*.json")}
    times = {name: (tmp_path / "data" / STAGING / f"{name}.tar").stat().st_mtime_ns for name in kept}
    again = rddm(*command, "--out", "data", cwd=tmp_path)
    assert again.code == 0 and "packed data: 160 pairs in 160 shard(s)" in again.stdout, again.text
    assert {name for name in kept if (tmp_path / "data" / f"{name}.tar").stat().st_mtime_ns == times[name]} == kept
    reused = rddm(*command, "--out", "data", cwd=tmp_path)
    assert reused.code == 0 and "reused data: 160 pairs" in reused.stdout, reused.text


def test_mistakes_in_sources_and_output_are_told_in_one_line(tmp_path: Path) -> None:
    """A file name that is not UTF-8, a name too long for a disk, and no output."""
    _, target_dir = make_folders(tmp_path / "source", count=2)
    empty = rddm("pack", "--clean", str(target_dir), "--out", "", "--dry-run", cwd=tmp_path)
    (tmp_path / "pairs.tsv").write_text(f"{'x' * 5000}.png\tsource/target/photo_000.png\n")
    long = rddm("pack", "--list", "pairs.tsv", "--out", "data", cwd=tmp_path)
    (target_dir / "photo_000.png").rename(target_dir / os.fsdecode(b"caf\xe9.png"))
    odd = rddm("pack", "--clean", str(target_dir), "--out", "data", cwd=tmp_path)
    for result, message in ((empty, "--out is empty"), (long, "File name too long"), (odd, "is not UTF-8; rename it")):
        assert result.code == 2 and result.stderr.count("\n") == 1, result.text
        assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_dry_run_says_what_would_be_packed_and_writes_nothing(tmp_path: Path) -> None:
    _, target_dir = make_folders(tmp_path / "source", count=5)
    result = rddm(
        "pack", "--clean", str(target_dir), "--degrade", "noise(sigma=25)", "--tile", "32", "--out", "data",
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 0 and not (tmp_path / "data").exists(), result.text
    assert "would pack 5 pairs in 20 tiles into data; nothing was written" in result.stdout
    assert "fields input, target; codec png" in result.stdout
    assert "48x40 to 48x40 pixels; first names: photo_000, photo_001, photo_002" in result.stdout
