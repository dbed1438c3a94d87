"""Two networks, each with a learning rate of its own, and a loss of its own in the journal: at every ZeRO stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rddm_dist.config import load_config
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.state import draw_net
from tests.support.datasets import make_dataset
from tests.support.processes import ROOT, run_workers
from tests.support.runs import write_config

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "train_probe.py"))
STAGES = (0, 1, 2, 3)
STEPS = 3
LR, NOISE_LR = 1e-4, 4e-4
COMMON = (
    "model.num_nets=2", "diffusion.objective=pred_res_add_noise", f"optim.lr={LR}", "optim.clip_norm=0.1",
    "optim.warmup_steps=2", f"train.steps={STEPS}", "train.checkpoint_every=1", "train.keep_last=3",
    "train.global_batch=2", "engine.threads=1",
)  # fmt: skip
TWO = (*COMMON, f"optim.noise_lr={NOISE_LR}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers train everything that is compared below.   -> the folder of their run folders"""
    folder = tmp_path_factory.mktemp("rates")
    config = write_config(folder, make_dataset(folder, count=20))
    plan: list[dict[str, Any]] = [
        *({"name": f"two-{s}", "overrides": [*TWO, f"engine.zero_stage={s}"]} for s in STAGES),
        {"name": "moved", "overrides": [*TWO, "engine.zero_stage=3", "train.steps=2"]},
        {"name": "moved", "overrides": [*TWO, "engine.zero_stage=1"]},
        {"name": "stopped", "overrides": [*TWO, "train.steps=2"]},
        {"name": "stopped", "overrides": [*TWO]},
        {"name": "plain", "overrides": [*COMMON]},
        {"name": "equal", "overrides": [*COMMON, f"optim.noise_lr={LR}"]},
    ]
    (folder / "runs.json").write_text(json.dumps(plan))
    results = run_workers([*PROBE, str(config), str(folder / "runs.json")], 2, cwd=folder, timeout_s=300)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    assert results[0].stdout.count("RUN ") == results[0].stdout.count(" 0 \n") == len(plan), results[0].text
    return folder / "runs"


def metrics(run_dir: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["metrics"][name] for record in records if name in record.get("metrics", {})]


def state(run_dir: Path, *, step: int = STEPS, kinds: tuple[str, ...] = (ckpt.WEIGHT,)) -> dict[str, torch.Tensor]:
    found = ckpt.read_commit(ckpt.step_folder(str(run_dir / "checkpoints"), step))
    return {f"{kind}/{name}": value for kind in kinds for name, value in found.read_full(kind).items()}


def test_every_stage_computes_the_same_and_not_what_one_rate_computes(runs: Path) -> None:
    losses = {stage: metrics(runs / f"two-{stage}", "train/loss") for stage in STAGES}
    for stage in STAGES:
        assert len(losses[stage]) == STEPS and losses[stage] == pytest.approx(losses[0], rel=1e-5)
    assert metrics(runs / "plain", "train/loss")[1:] != pytest.approx(losses[2][1:], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_adams_first_step_is_the_rate_of_the_network(runs: Path, stage: int) -> None:
    """Up to the few elements whose gradient is next to nothing, the largest move of each network is its rate."""
    first = draw_net(load_config(runs / f"two-{stage}" / "config.yaml")).state_dict()
    moves = {name.removeprefix("weight/"): value for name, value in state(runs / f"two-{stage}", step=1).items()}
    for network, rate in (("unet0.", LR), ("unet1.", NOISE_LR)):
        largest = max(float((moves[name] - first[name]).abs().max()) for name in first if name.startswith(network))
        assert largest == pytest.approx(rate / 2, rel=1e-3), "the first of two steps of the warm-up"


def test_a_second_rate_like_the_first_gives_the_run_without_it(runs: Path) -> None:
    assert metrics(runs / "equal", "train/loss") == pytest.approx(metrics(runs / "plain", "train/loss"), rel=1e-6)
    equal = state(runs / "equal")
    assert all(torch.allclose(value, equal[name], atol=1e-6) for name, value in state(runs / "plain").items())


def test_a_run_of_two_groups_goes_on_bit_for_bit_and_at_another_stage(runs: Path) -> None:
    kinds = (ckpt.WEIGHT, ckpt.EMA, "exp_avg", "exp_avg_sq")
    whole, stopped = state(runs / "two-2", kinds=kinds), state(runs / "stopped", kinds=kinds)
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []
    assert metrics(runs / "moved", "train/loss") == pytest.approx(metrics(runs / "two-1", "train/loss"), rel=1e-5)


def test_both_rates_warm_up_together(runs: Path) -> None:
    assert metrics(runs / "two-0", "train/lr") == pytest.approx([LR / 2, LR, LR])
    assert metrics(runs / "two-0", "train/noise_lr") == pytest.approx([NOISE_LR / 2, NOISE_LR, NOISE_LR])
    assert metrics(runs / "plain", "train/noise_lr") == []


def test_the_losses_of_the_outputs_are_logged_and_add_up(runs: Path) -> None:
    parts = [metrics(runs / "two-3", f"train/loss_{name}") for name in ("residual", "residual_plus_noise")]
    assert [sum(pair) for pair in zip(*parts, strict=True)] == pytest.approx(metrics(runs / "two-3", "train/loss"))
