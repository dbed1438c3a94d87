"""Presets: each names its source, can be planned before its data is there, and holds what was published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.cli.main import app
from rddm_dist.config import Config, iter_keys, load_config

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
# What the published code does, by preset; the words after "Verified" in each file.
OLD = {"diffusion.schedule.kind": "linear", "diffusion.loss": "l1", "optim.lr": 8e-5, "train.global_batch": 2}
NEW = {
    "diffusion.loss": "l2", "optim.name": "radam", "optim.lr": 2e-4, "optim.betas": (0.9, 0.999), "sample.steps": 10,
    "train.steps": 100_000, "model.num_nets": 2, "diffusion.objective": "pred_res_noise", "model.condition": "none",
    "data.preprocess.resize": 64, "diffusion.sum_scale": 1.0, "model.dim": 64,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "raindrop": {
        **OLD, "diffusion.objective": "pred_res_noise", "diffusion.sum_scale": 1.0, "train.steps": 120_000,
        "sample.steps": 5, "data.preprocess.resize": 256, "model.num_nets": 2, "optim.betas": (0.9, 0.99),
    },
    "gopro": {"data.preprocess.resize": 256, "diffusion.schedule.kind": "linear", "sample.steps": 2},
    "istd": {"model.condition": "input_mask", "diffusion.sum_scale": 0.01, "sample.steps": 5},
    "lol": {
        **OLD, "diffusion.objective": "pred_res", "model.num_nets": 1, "data.preprocess.equalize": True,
        "train.steps": 80_000, "sample.steps": 2, "data.preprocess.resize": 256,
    },
    "lol_auto": {"diffusion.objective": "auto", "diffusion.schedule.kind": "ddim", "data.preprocess.equalize": True},
    "sid": {"diffusion.objective": "pred_res", "diffusion.sum_scale": 1.0, "sample.steps": 2},
    "inpaint": {**NEW, "diffusion.schedule.kind": "power", "diffusion.time_input": "clocks", "train.global_batch": 128},
    "translate": {
        **NEW, "diffusion.schedule.kind": "ddim", "diffusion.time_input": "clocks", "train.global_batch": 128,
    },
    "celeba64": {
        **NEW, "diffusion.schedule.kind": "power", "diffusion.schedule.alpha": "decreased", "train.global_batch": 256,
        "diffusion.schedule.beta2": "increased", "diffusion.time_input": "index", "diffusion.generate": True,
    },
    "path_independent": {
        **NEW, "diffusion.schedule.kind": "ddim", "diffusion.time_input": "clocks", "diffusion.generate": True,
    },
    "celeba64_ddpm": {"diffusion.process": "ddpm", "diffusion.schedule.betas": "squaredcos", "sample.steps": 250},
}  # fmt: skip


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_planned_without_its_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    shown = result.output + capsys.readouterr().out
    assert "NOT THERE YET" in shown and f"name: {path.stem}" in shown
    assert not list(tmp_path.iterdir())


def test_only_a_plan_does_without_data_and_only_where_its_folder_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", str(ROOT / "configs" / "train" / "raindrop.yaml")]
    with pytest.raises(DataError, match="data/raindrop/train"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    # Settings are checked all the same.
    with pytest.raises(ConfigError, match="sample.steps=1001"):
        CliRunner().invoke(app, [*command, "--dry-run", "sample.steps=1001"], catch_exceptions=False)
    for name in ("train", "test_a"):
        (tmp_path / "data" / "raindrop" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="data/raindrop/train"):
        CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_where_it_comes_from_and_how_its_data_is_packed(path: Path) -> None:
    comment = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    assert "rddm pack" in comment or "rddm demo" in comment
    if path.stem in PUBLISHED:
        assert re.search(r"Verified|From folder names", comment)
    table = (ROOT / "docs" / "presets.md").read_text()
    assert f"| `{path.stem}` |" in table


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_holds_what_was_published(preset: str) -> None:
    config = load_config(ROOT / "configs" / "train" / f"{preset}.yaml")
    values = {name: value for name, _, value in iter_keys(config)}
    wanted = PUBLISHED[preset]
    assert {name: values[name] for name in wanted} == wanted
    assert config.diffusion.num_timesteps == 1000 and config.ema == Config().ema
