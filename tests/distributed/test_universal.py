"""The engine against DeepSpeed: its universal checkpoint, what its settings may not change, the memory it keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rddm_dist.training.engine_keys import CLOSED_KEYS, CLOSED_ZERO_KEYS, COUNTS, DERIVED_KEYS, SWITCHES, ZERO
from tests.support.processes import ROOT, Finished, run, run_workers

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "universal_probe.py"))
CONVERT = (sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")
ONE_WORKER = ("--num_extract_workers", "1", "--num_merge_workers", "1")


def probe(part: str, world_size: int, folder: Path) -> list[Finished]:
    # torch warns at every collective, which would fill the pipe of the worker that is not being read.
    quiet = {"PYTHONWARNINGS": "ignore"}
    results = run_workers([*PROBE, part, str(folder)], world_size, cwd=folder, timeout_s=200, env=quiet)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    return results


def losses(result: Finished) -> dict[tuple[str, str], list[float]]:
    """(name, stage) -> losses, from lines of the probe."""
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("losses ")]
    return {(name, stage): [float(value) for value in values] for name, stage, *values in lines}


def test_pieces_are_what_deepspeeds_universal_checkpoint_says(tmp_path: Path) -> None:
    probe("save", 2, tmp_path)
    for stage in "123":
        own = tmp_path / f"stage-{stage}"
        folders = ("--input_folder", str(own / "final"), "--output_folder", str(own / "universal"))
        done = run([*CONVERT, *folders, *ONE_WORKER], cwd=tmp_path)
        assert done.code == 0, done.text
        pieces = torch.load(own / "pieces.pt", weights_only=True)
        assert sorted(pieces) == ["exp_avg", "exp_avg_sq", "fp32"]
        zero = own / "universal" / "zero"
        assert {folder.name for folder in zero.iterdir() if folder.is_dir()} == set(pieces["fp32"])
        for kind, values in pieces.items():
            assert any(value.any() for value in values.values())
            for name, value in values.items():
                theirs = torch.load(zero / name / f"{kind}.pt", weights_only=True)
                theirs = theirs["param"] if isinstance(theirs, dict) else theirs
                assert torch.equal(theirs.view_as(value), value), f"{kind} of {name} at stage {stage}"


@pytest.mark.slow
def test_moving_the_optimizer_to_host_memory_changes_no_loss(tmp_path: Path) -> None:
    """Stage 3 sums the squares of the gradients in another order there: with clipping the last bit may differ."""
    found = losses(probe("offload", 2, tmp_path)[0])
    assert len(found) == 8
    assert found["host", "1"] == found["device", "1"]
    assert found["host", "2"] == found["device", "2"]
    assert found["host", "3"] == pytest.approx(found["device", "3"], rel=1e-6)
    assert found["free-host", "3"] == found["free-device", "3"] != found["device", "3"]


@pytest.mark.slow
def test_further_keys_change_no_loss(tmp_path: Path) -> None:
    found = losses(probe("further", 2, tmp_path)[0])
    assert len(found) == 6
    for stage in "123":
        assert found["unusual", stage] == found["plain", stage]


def test_a_loss_scale_goes_on_from_its_state(tmp_path: Path) -> None:
    [result] = probe("scaler", 1, tmp_path)
    assert [line for line in result.stdout.splitlines() if line.startswith("scaler")] == [
        "scaler 1",
        "scaler 2",
        "scaler 3",
    ]


def test_every_zero_key_of_deepspeed_is_allowed_derived_or_refused() -> None:
    """No new version of DeepSpeed brings a key unnoticed."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    derived = [key.removeprefix(f"{ZERO}.") for key in DERIVED_KEYS if key.startswith(ZERO)]
    ours = [*SWITCHES, *COUNTS, *derived, *CLOSED_ZERO_KEYS]
    assert len(ours) == len(set(ours))
    assert set(ours) == fields | set(_REMOVED_ZERO_CONFIG_KEYS)
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= {*CLOSED_KEYS, *DERIVED_KEYS}


@pytest.mark.slow
def test_a_rank_keeps_the_memory_that_the_formula_says(tmp_path: Path) -> None:
    rows = tmp_path / "memory.json"
    benchmark = (sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--dims", "8", "--worlds", "2")
    done = run([*benchmark, "--json", str(rows)], cwd=tmp_path, timeout_s=200)
    assert done.code == 0, done.text
    results = json.loads(rows.read_text())["results"]
    assert [row["stage"] for row in results] == [0, 1, 1, 2, 2, 3, 3]
    for row in results:
        assert row["kept"] == pytest.approx(row["formula_kept"], rel=0.05), row
        assert row["at_step"] == pytest.approx(row["formula_at_step"], rel=0.15), row
