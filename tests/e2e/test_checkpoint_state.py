"""`rddm checkpoint ls`, `verify`, `diff`, `prune` and `ema` on one small run, sound and damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch

from data_pipeline import storage
from rddm_dist.loading import load_model
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.inspection import scan
from rddm_dist.training.ownership import take
from rddm_dist.training.streaming import averages_of, rebuild
from tests.e2e.conftest import Here
from tests.support.datasets import make_dataset
from tests.support.processes import run_workers
from tests.support.runs import TRAIN, write_config
from tests.support.saved import flip_a_bit, leave_unfinished, make_newer
from tests.support.servers import make_bucket, s3_server

STEPS = 60
OVERRIDES = (
    f"train.steps={STEPS}", "train.global_batch=1", "data.crop=8", "model.dim_mults=[1]", "train.log_every=5",
    "train.checkpoint_every=5", "train.keep_last=3", "train.keep_every=20", "train.keep_best=1",
    "train.best_metric=train/loss", "ema.lengths=[0.05,0.1,0.08]", "ema.snapshot_every=5",
)  # fmt: skip

Call = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp("state")
    config = write_config(folder, make_dataset(folder, count=4, size=(16, 24)))
    [result] = run_workers([*TRAIN, str(config), *OVERRIDES], 1, cwd=folder, timeout_s=240)
    assert result.code == 0, result.text
    return folder / "runs" / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny"))


@pytest.fixture
def call(here: Here) -> Call:
    """`rddm checkpoint` in this process; it must end with this exit code.   -> what it said, of code 2 the one line"""

    def run(*arguments: object, code: int = 0) -> str:
        result = here("checkpoint", *arguments)
        assert result.code == code, result.text
        if code == 2:
            [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            return line
        return result.stdout

    return run


def steps(run: Path, row: str = "checkpoints") -> list[int]:
    return [entry.step for entry in scan(str(run), row)]


def at(run: Path, step: int, row: str = "checkpoints") -> ckpt.Checkpoint:
    return ckpt.read_commit(ckpt.step_folder(str(run / row), step))


def best_step(run: Path) -> int:
    """The checkpoint with the lowest loss, as the journal says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {
        each["step"]: each["metrics"]["train/loss"] for each in records if "train/loss" in each.get("metrics", {})
    }
    return min(losses, key=lambda step: (losses[step], step))


# -- ls ----------------------------------------------------------------------------------------------------------------


def test_a_list_says_what_is_there_and_why(run: Path, call: Call) -> None:
    leave_unfinished(run / "checkpoints", 65)
    flip = run / "checkpoints" / "step-00000055" / ckpt.COMMIT
    flip.write_text(flip.read_text().replace('"step": 55', '"step": 54'))
    make_newer(at(run, 40))
    said = json.loads(call("ls", run, "--json"))
    lines = {line["step"]: line for line in said["checkpoints"]}
    assert list(lines) == sorted({20, 40, 50, 55, 60, 65, best_step(run)}, reverse=True)
    newest = lines[60]
    assert (newest["samples"], newest["world_size"], newest["state"]) == (60, 1, "committed")
    assert newest["bytes"] == at(run, 60).num_bytes and abs(newest["score"]) < 1.0
    assert datetime.fromisoformat(newest["time"]).timestamp() == pytest.approx(at(run, 60).time, abs=1.0)
    assert {"last", "every"} <= set(newest["kept"].split()) and "every" in lines[20]["kept"].split()
    states = {step: lines[step]["state"] for step in (65, 55, 40)}
    assert states == {65: "unfinished", 55: "damaged", 40: "newer format"}
    assert not any(lines[step]["kept"] for step in states)
    assert len(said["averages"]) == STEPS // 5 and said["lengths"] == [0.05, 0.1, 0.08] and said["search"] == []

    table = call("ls", run).splitlines()
    assert table[0].split()[:6] == ["step", "samples", "size", "workers", "stage", "train/loss"]
    assert [int(row.split()[0]) for row in table[1 : len(lines) + 1]] == list(lines)
    assert table[2].endswith(newest["kept"]) and newest["time"] in table[2] and " committed " in table[2]
    assert table[1].split()[-2:] == ["unfinished", "-"]
    assert any(row.startswith("step 40: ") and "upgrade it" in row for row in table)
    assert table[-1].startswith("12 snapshot(s) from step 5 to 60, ") and "lengths 0.05, 0.1, 0.08" in table[-1]


def test_a_run_that_has_saved_nothing_says_so(run: Path, call: Call) -> None:
    for row in ("checkpoints", "averages"):
        shutil.rmtree(run / row)
    assert call("ls", run) == f"run {run} has no checkpoint yet\n"
    assert "0 of 0 committed" in call("verify", run) and "0 of 0" in call("verify", run, "--newest")
    assert "deleted 0 checkpoint(s), 0 bytes" in call("prune", run, "--keep-best", 0)
    assert "has no checkpoint yet" in call("diff", run, run, code=2)


# -- verify ------------------------------------------------------------------------------------------------------------


def test_a_sound_run_verifies(trained: Path, call: Call) -> None:
    count = len(steps(trained)) + STEPS // 5
    said = call("verify", trained)
    assert said.count(": ok") == count and f"{count} of {count} committed checkpoint(s)" in said
    assert "averages/step-00000005: ok" in said and "checkpoints/step-00000060: ok" in said
    assert call("verify", trained, "--newest").count(": ok") == 1
    assert "checkpoints/step-00000060: ok" in call("verify", trained / "checkpoints" / "step-00000060")


def test_damage_is_named_and_has_an_exit_code(run: Path, call: Call) -> None:
    count = len(steps(run)) + STEPS // 5
    leave_unfinished(run / "checkpoints", 65)
    flip_a_bit(at(run, 55))
    flip_a_bit(at(run, 10, "averages"))
    said = call("verify", run, code=3)
    assert "step-00000055 is damaged: the sha256 of rank-00000.safetensors does not match" in said
    assert "averages/step-00000010 is damaged" in said and said.count(": ok") == count - 2
    assert "checkpoints/step-00000065: unfinished" in said and f"{count - 2} of {count} committed" in said
    assert "step-00000055 is damaged" in call("verify", run / "checkpoints" / "step-00000055", code=2)
    assert "never finished" in call("verify", run / "checkpoints" / "step-00000065", code=2)
    call("verify", run, "--newest")
    (run / "checkpoints" / "step-00000060" / "rank-00000.json").unlink()
    assert "rank-00000.json is missing" in call("verify", run, "--newest", code=3)


# -- diff --------------------------------------------------------------------------------------------------------------


def test_a_difference_is_told_and_has_an_exit_code(run: Path, call: Call) -> None:
    newest = run / "checkpoints" / "step-00000060"
    same = call("diff", run, newest)
    assert same.count("bit-equal") == 7 and "elements differ" not in same and "optimizer_step" not in same
    said = call("diff", newest, run / "checkpoints" / "step-00000055", code=3)
    assert "step               60 | 55" in said and "position           60 | 55" in said
    weight = next(line for line in said.splitlines() if line.startswith("weight "))
    a, b = (
        torch.cat([value.reshape(-1).double() for value in at(run, step).read_full("weight").values()])
        for step in (60, 55)
    )
    assert f"{int((a != b).sum()):,} of {a.numel():,} elements differ" in weight
    assert f"up to {float((a - b).abs().max()):.3g} " in weight
    assert f"distance {float((a - b).norm() / a.norm()):.3g}" in weight
    alone = call("diff", newest, run / "averages" / "step-00000060", code=3)
    assert "kind weight only in A" in alone and "ema-0.05           bit-equal" in alone
    flip_a_bit(at(run, 60))
    assert "is damaged" in call("diff", newest, run, code=2)
    assert "step               55 | 60" not in call("diff", run, run), "a run stands for its newest sound one"


# -- prune -------------------------------------------------------------------------------------------------------------


def test_a_prune_follows_the_config_and_what_is_given(run: Path, call: Call) -> None:
    before = steps(run)
    leave_unfinished(run / "checkpoints", 65, num_bytes=1000)
    said = call("prune", run, "--dry-run")
    assert "would delete checkpoints/step-00000065 (unfinished)" in said and "1 checkpoint(s), 1,000 bytes" in said
    assert steps(run) == [65, *before]
    assert "deleted 1 checkpoint(s), 1,000 bytes" in call("prune", run)
    assert steps(run) == before, "training keeps by the same rules"
    gone = sorted({*before} - {60, 50, 40, 20})
    num_bytes = sum(at(run, step).num_bytes for step in {*before} - {60, 50})
    said = call("prune", run, "--keep-last", 1, "--keep-every", 25, "--keep-best", 0)
    assert steps(run) == [60, 50] and steps(run, "averages") == list(range(60, 0, -5))
    assert f"{num_bytes:,} bytes" in said and "kept step 50 (every)" in said
    assert all(f"deleted checkpoints/step-{step:08d}" in said for step in gone)
    call("verify", run)


def test_a_prune_never_deletes_the_newest_sound_state(run: Path, call: Call) -> None:
    flip_a_bit(at(run, 60))
    said = call("prune", run, "--keep-last", 1, "--keep-every", 0, "--keep-best", 0)
    assert "is damaged" in said and "step-00000055, which stays" in said and steps(run) == [60, 55]
    flip_a_bit(at(run, 55))
    assert "no sound checkpoint in" in call("prune", run, code=2) and steps(run) == [60, 55]


def test_a_run_in_use_is_not_pruned(run: Path, call: Call) -> None:
    before = steps(run)
    with take(str(run)):
        line = call("prune", run, "--keep-last", 1, code=2)
    assert f"run folder {run} is in use by pid {os.getpid()} on " in line and steps(run) == before


# -- ema ---------------------------------------------------------------------------------------------------------------


def test_an_average_that_was_tracked_is_rebuilt_from_others(trained: Path) -> None:
    kinds = {kind: at(trained, STEPS).read_full(kind) for kind in ("ema-0.08", "weight")}
    wanted, last = (torch.cat([value.reshape(-1).double() for value in each.values()]) for each in kinds.values())
    made = rebuild(averages_of(str(trained)), step=STEPS, length=0.08, lengths=(0.05, 0.1))
    found = torch.cat([value.reshape(-1).double() for value in made.state.values()])
    assert made.error < 0.01 and float((found - wanted).norm()) < 0.01 * float((wanted - last).norm())


def test_a_kept_length_is_written_as_it_was_stored_and_is_a_model(trained: Path, call: Call, tmp_path: Path) -> None:
    for out, step in ((tmp_path / "a.safetensors", STEPS), (tmp_path / "folder", 30)):
        said = call("ema", trained, "--length", 0.1, "--out", out, *(["--step", step] if step != STEPS else []))
        assert f"wrote {out}: average of length 0.1 at step {step}" in said and "that is much" not in said
        model = load_model(str(out))
        stored = at(trained, step, "averages").read_full("ema-0.1")
        for name, value in model.net.state_dict().items():
            torch.testing.assert_close(value, stored[name], rtol=1e-6, atol=1e-7)
        assert model.extra["step"] == str(step) and model.extra["ema_length"] == "0.1"
        assert model.extra["run"] == "tiny" and model.extra["data_fingerprint"]
        assert model.config == load_model(str(trained)).config
    assert "reused" in call("ema", trained, "--length", 0.1, "--out", tmp_path / "a.safetensors")


def test_a_length_far_from_those_kept_is_told(trained: Path, call: Call, tmp_path: Path) -> None:
    said = call("ema", trained, "--length", 0.01, "--out", tmp_path / "a.safetensors")
    assert "that is much: the snapshots are too few, or the length is too far from those that were kept" in said


def test_what_cannot_be_rebuilt_is_refused(run: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    for arguments, told in (
        (("--length", 0.5), "the relative length 0.5 of an average must be above 0 and below 0.2887"),
        (("--length", 0.1, "--step", 61), "of step 61 from, the newest is of step 60"),
        (("--length", 0.1, "--step", 4), "of step 4 from, the newest is of step 60"),
        (("--length", 0.1, "--out", tmp_path / "taken"), "holds thesis.tex and is no model folder"),
    ):
        assert told in call("ema", run, "--out", out, *arguments, code=2)
    config = run / "config.yaml"
    lines = config.read_text().splitlines()
    start = lines.index("  lengths:")
    lines[start : start + 4] = ["  lengths: []"]
    config.write_text("\n".join(lines).replace("snapshot_every: 5", "snapshot_every: 0"))
    line = call("ema", run, "--length", 0.1, "--out", out, code=2)
    assert "set ema.lengths and ema.snapshot_every before training" in line
    assert not out.exists()


# -- everywhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "verify", "diff", "prune", "ema"])
def test_what_is_no_run_is_refused_in_one_line(trained: Path, call: Call, tmp_path: Path, command: str) -> None:
    more: list[object] = [trained] if command == "diff" else []
    if command == "ema":
        more = ["--length", 0.1, "--out", tmp_path / "x.safetensors"]
    for given in (tmp_path, tmp_path / "absent", trained / "checkpoints", trained / "model.safetensors"):
        line = call(command, given, *more, code=2)
        assert f"{given} is neither a run folder (one with config.yaml) nor a checkpoint inside one" in line
    if command in ("ls", "prune", "ema"):
        line = call(command, trained / "checkpoints" / "step-00000060", *more, code=2)
        assert f"is one checkpoint; give its run folder {trained}" in line


def test_options_that_do_not_fit_are_refused_with_what_would(trained: Path, call: Call) -> None:
    checkpoint = trained / "checkpoints" / "step-00000060"
    assert "--newest goes with a run folder" in call("verify", checkpoint, "--newest", code=2)
    for arguments, told in (
        (("--keep-last", 0), "--keep-last 0 would leave nothing to go on from; give 1 or more"),
        (("--metric", "ssim"), "--metric ssim is not known; choose one of preview/psnr, train/loss"),
        (("--metric", "preview/psnr"), "keep_best=1 goes by preview/psnr, of which the journal"),
    ):
        assert told in call("prune", trained, *arguments, code=2)
    assert sorted(path.name for path in trained.glob("owner*")) == []


def test_a_run_at_a_url_is_looked_after_in_the_same_way(
    trained: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as (endpoint, settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        home = f"{make_bucket(endpoint, 'runs')}/tiny"
        for path in trained.rglob("*"):
            if path.is_file() and path.name != "metrics.jsonl":
                storage.upload(path, f"{home}/{path.relative_to(trained)}")
        storage.upload(trained / "metrics.jsonl", f"{home}/journal/{0:012d}.jsonl")
        there, here = (json.loads(call("ls", place, "--json")) for place in (home, trained))
        assert [{**line, "uri": ""} for line in there["checkpoints"]] == [
            {**line, "uri": ""} for line in here["checkpoints"]
        ]
        assert there["checkpoints"][0]["uri"] == f"{home}/checkpoints/step-00000060"
        call("diff", home, trained)
        storage.remove(f"{home}/checkpoints/step-00000055/rank-00000.json")
        assert "rank-00000.json is missing" in call("verify", home, code=3)
        call("prune", home, "--keep-last", 1, "--keep-every", 0, "--keep-best", 0)
        assert call("verify", home).count("checkpoints/step") == 1
        assert not [name for name in storage.list_names(home) if name.startswith("owner")]
        call("ema", home, "--length", 0.1, "--out", tmp_path / "a.safetensors")
        call("ema", trained, "--length", 0.1, "--out", tmp_path / "b.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        assert "neither a run folder" in call("ls", f"{home}/checkpoints", code=2)
