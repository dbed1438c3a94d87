"""train.init_from: a new run starts from the averaged weights of a model, and later starts do not read it again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rddm_dist.loading import load_model
from rddm_dist.training import checkpoint as ckpt
from tests.support.datasets import make_dataset
from tests.support.processes import ROOT, run_workers
from tests.support.runs import write_config

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "train_probe.py"))
# A rate so small that a step rounds away: what is saved after it is what the run began with.
STILL = ("optim.lr=1e-30", "train.steps=1", "train.checkpoint_every=1", "train.global_batch=2", "engine.threads=1")


@dataclass(frozen=True)
class Story:
    """What became of the runs: by run, the exit code and the error of each of its starts; stdout of the probe."""

    folder: Path
    said: dict[str, list[tuple[int, str]]]
    stdout: str

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


def plan(folder: Path) -> list[dict[str, Any]]:
    runs = folder / "runs"
    model, export, other = runs / "model", runs / "model" / "model.safetensors", runs / "drawn"

    def start(name: str, init_from: object, *overrides: str, forget: tuple[str, ...] = ()) -> dict[str, Any]:
        return {
            "name": name, "overrides": [*STILL, f"train.init_from={init_from}", *overrides], "forget": list(forget)
        }  # fmt: skip

    begun = ("checkpoints", "model.safetensors")
    return [
        {"name": "model", "overrides": [*STILL, "optim.lr=1e-3", "train.steps=3", "ema.start_step=0"]},
        {"name": "drawn", "overrides": [*STILL]},
        *(start(f"stage-{stage}", model, f"engine.zero_stage={stage}") for stage in (0, 1, 2, 3)),
        start("export", export),
        start("noise", model, "diffusion.objective=pred_noise", "diffusion.schedule.kind=ddim"),
        # Continued: without the model at its place, and in ways that are refused.
        start("stage-2", folder / "gone", "train.steps=2"),
        {"name": "stage-1", "overrides": [*STILL, "train.steps=2"]},
        start("drawn", model, "train.steps=2"),
        # Begun again, as nothing had been saved: from the same weights at another place, and from others.
        start("again", model),
        start("again", export, forget=begun),
        start("again", other, forget=begun),
        # Models that are not there, or do not fit.
        start("absent", folder / "nothing"),
        start("damaged", folder / "cut.safetensors"),
        start("unregistered", "models:/nobody@champion"),
        start("wide", model, "model.dim=16", "model.dim_mults=[1, 2, 2]"),
        start("double", model, "model.num_nets=2", "diffusion.objective=pred_res_noise"),
        # As many channels, read in another way.
        start("otherwise", model, "model.condition=none", "model.self_condition=true"),
    ]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two workers go through all of it in one launch."""
    folder = tmp_path_factory.mktemp("init")
    (folder / "cut.safetensors").write_bytes(b"not much")
    config = write_config(folder, make_dataset(folder, count=20))
    (folder / "runs.json").write_text(json.dumps(plan(folder)))
    results = run_workers([*PROBE, str(config), str(folder / "runs.json")], 2, cwd=folder, timeout_s=300)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    said: dict[str, list[tuple[int, str]]] = {}
    for line in results[0].stdout.splitlines():
        if line.startswith("RUN "):
            _, name, code, text = line.split(" ", 3)
            said.setdefault(name, []).append((int(code), text))
    return Story(folder, said, results[0].stdout)


def begun_with(run_dir: Path, kind: str) -> dict[str, torch.Tensor]:
    """The weights or averages that a run without a step worth the name was saved with."""
    newest = ckpt.find_newest(str(run_dir / "checkpoints"))
    assert newest is not None
    return newest.read_full(kind)


def identity(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "identity.json").read_text())


@pytest.mark.parametrize("name", ["stage-0", "stage-1", "stage-2", "stage-3", "export", "noise"])
def test_weights_and_averages_start_as_the_averages_of_the_model(story: Story, name: str) -> None:
    model = load_model(str(story.run("model")))
    trained = begun_with(story.run("model"), ckpt.WEIGHT)
    expected = model.net.state_dict()
    assert any(not torch.equal(expected[key], trained[key]) for key in expected), "the averages should be told apart"
    for kind in (ckpt.WEIGHT, ckpt.EMA):
        found = begun_with(story.run(name), kind)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert identity(story.run(name))["init_weights"] == model.digest


def test_a_run_from_drawn_weights_is_what_it_was(story: Story) -> None:
    assert identity(story.run("drawn")).keys() == {"data_fingerprint", "lanes"}
    model, drawn = load_model(str(story.run("model"))), begun_with(story.run("drawn"), ckpt.WEIGHT)
    assert any(not torch.equal(drawn[key], value) for key, value in model.net.state_dict().items())


def test_another_objective_is_told_and_allowed(story: Story) -> None:
    said = (story.run("noise") / "logs" / "rank-00000.log").read_text()
    assert "was trained with diffusion.objective=pred_res, not pred_noise" in said


def test_a_continued_run_does_not_read_the_model(story: Story) -> None:
    assert story.said["stage-2"] == [(0, ""), (0, "")]
    path = story.run("model")
    assert f"changed: train.init_from: {path} -> {story.folder / 'gone'}" in story.stdout
    assert identity(story.run("stage-2"))["init_weights"] == identity(story.run("stage-3"))["init_weights"]


def test_a_run_that_saved_nothing_begins_again_from_the_same_weights_only(story: Story) -> None:
    first, same, other = story.said["again"]
    assert first == same == (0, "")
    assert other[0] == 2 and f"train.init_from={story.run('drawn')} has other weights (" in other[1]
    assert "there is no checkpoint yet; give those back or choose another run.name" in other[1]


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("stage-1", 1, "was started from a model; give back train.init_from="),
        ("drawn", 1, "was started from drawn weights, not from train.init_from="),
        ("absent", 0, "train.init_from: model "),
        ("damaged", 0, "cut.safetensors cannot be read"),
        ("unregistered", 0, "train.init_from: models:/nobody@champion does not exist: there is no registry at"),
        ("wide", 0, "model.dim is 16 here and 8 there; model.dim_mults is [1, 2, 2] here and [1, 2] there"),
        ("double", 0, "model.num_nets is 2 here and 1 there; change the model section"),
        ("otherwise", 0, "model.condition is none here and input there; model.self_condition is True here and False"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(story: Story, name: str, start: int, said: str) -> None:
    code, text = story.said[name][start]
    assert code == 2 and said in text and "train.init_from" in text
    # Nothing is left that would have to be cleared away before the next try.
    assert start or not (story.run(name) / "config.yaml").exists()
