"""A compiled network trains like the one it was compiled from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.datasets import make_dataset
from tests.support.processes import run
from tests.support.runs import TRAIN, write_config


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_dataset(tmp_path / "data", count=20, size=(40, 48)))
    common = ("engine.zero_stage=1", "train.steps=4", "train.checkpoint_every=4")
    losses = {}
    for compile in ("false", "true"):
        name = f"compile-{compile}"
        overrides = (*common, f"engine.compile={compile}", f"run.name={name}")
        done = run([*TRAIN, str(config), *overrides], cwd=tmp_path, timeout_s=300)
        assert done.code == 0, done.text
        records = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        metrics = [record["metrics"] for record in records if "metrics" in record]
        losses[compile] = [entry["train/loss"] for entry in metrics if "train/loss" in entry]
    assert len(losses["false"]) == 4
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
