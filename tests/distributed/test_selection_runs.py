"""diffusion.objective=auto as a run: a search, its outcome, and then the very training of that objective."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ModelError
from rddm_dist.loading import load_model
from rddm_dist.model.weights import load_safetensors
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.folder import RunFolder
from rddm_dist.training.selection import Selection, read_selection, write_selection
from tests.support.datasets import make_dataset
from tests.support.processes import ROOT, run_workers
from tests.support.runs import write_config

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "train_probe.py"))
STAGES = (0, 1, 2, 3)
STEPS = 6
COMMON = (f"train.steps={STEPS}", "train.checkpoint_every=3", "engine.threads=1")
# The first search comes to noise, just with its last step; the second, another schedule with larger steps, to the
# residual, within its steps.
NOISE = (*COMMON, "diffusion.schedule.kind=ddim", "optim.lr=3e-3")
RESIDUAL = (*COMMON, "train.steps=8", "diffusion.parity=official", "optim.lr=5e-3", "sample.every=4")
AUTO = "diffusion.objective=auto"


@dataclass(frozen=True)
class Story:
    """What became of the runs. said: exit code and error by run and number of workers; stdout: of the probes."""

    folder: Path
    said: dict[tuple[str, int], tuple[int, str]]
    stdout: dict[int, str]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


def folder_of(run_dir: Path) -> RunFolder:
    return RunFolder(str(run_dir), run_dir)


def newest_folder(checkpoints: Path) -> Path:
    return Path(ckpt.step_folder(str(checkpoints), ckpt.list_steps(str(checkpoints))[0]))


def stage(number: int) -> str:
    return f"engine.zero_stage={number}"


def of_two_workers() -> list[dict[str, Any]]:
    return [
        *({"name": f"noise-2-{s}", "overrides": [AUTO, *NOISE, stage(s)]} for s in STAGES),
        {"name": "fresh-noise", "overrides": ["diffusion.objective=pred_noise", *NOISE, stage(3)]},
        {"name": "bf16", "overrides": [AUTO, *NOISE, stage(1), "engine.precision=bf16"]},
        {"name": "moved", "overrides": [AUTO, *NOISE, stage(3)], "signal_at": 2},
        {"name": "undecided", "overrides": [AUTO, *NOISE, stage(1), "train.steps=2"]},
        {"name": "self", "overrides": [AUTO, *NOISE, stage(3), "train.steps=2", "model.self_condition=true"]},
    ]


def of_one_worker() -> list[dict[str, Any]]:
    """The second launch, which goes on with some runs of the first."""
    return [
        *({"name": f"noise-1-{s}", "overrides": [AUTO, *NOISE, stage(s), "train.micro_batch=3"]} for s in STAGES),
        {"name": "residual", "overrides": [AUTO, *RESIDUAL]},
        {"name": "fresh-residual", "overrides": ["diffusion.objective=pred_res", *RESIDUAL]},
        {"name": "moved", "overrides": [AUTO, *NOISE, stage(1)]},
        {"name": "undecided", "overrides": [AUTO, *NOISE, stage(0)]},
        {"name": "killed", "overrides": [AUTO, *NOISE, stage(3)]},
        {"name": "forgotten", "overrides": [AUTO, *NOISE, stage(2), f"train.steps={STEPS + 1}"]},
        {"name": "fresh-longer", "overrides": ["diffusion.objective=pred_noise", *NOISE, f"train.steps={STEPS + 1}"]},
        {"name": "other-choice", "overrides": [AUTO, *NOISE]},
        {
            "name": "generating",
            "overrides": [AUTO, *NOISE, "diffusion.generate=true", "model.condition=none", "train.steps=1"],
        },
    ]


def prepare_copies(story: Path) -> None:
    """Runs of two workers as they would be had someone intervened."""
    for name in ("killed", "forgotten", "other-choice"):
        shutil.copytree(story / "noise-2-3", story / name)
        (story / name / "model.safetensors").unlink()
    shutil.copytree(story / "fresh-noise", story / "fresh-longer")
    # Killed after the decision, before the first checkpoint of the training; an old one of the search is still there.
    shutil.copytree(story / "killed" / "checkpoints", story / "killed" / "search", dirs_exist_ok=True)
    shutil.rmtree(story / "killed" / "checkpoints")
    (story / "forgotten" / "selection.json").unlink()
    write_selection(folder_of(story / "other-choice"), Selection("pred_res", 3, 0.52))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two launches, of two workers and of one, with all the runs that are looked at below."""
    folder = tmp_path_factory.mktemp("selection")
    config = write_config(folder, make_dataset(folder, count=20))
    said: dict[tuple[str, int], tuple[int, str]] = {}
    stdout = {}
    for world_size, runs in ((2, of_two_workers()), (1, of_one_worker())):
        (folder / "runs.json").write_text(json.dumps(runs))
        results = run_workers([*PROBE, str(config), str(folder / "runs.json")], world_size, cwd=folder, timeout_s=300)
        assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
        stdout[world_size] = results[0].stdout
        for line in results[0].stdout.splitlines():
            if line.startswith("RUN "):
                _, name, code, text = line.split(" ", 3)
                said[name, world_size] = (int(code), text)
        if world_size == 2:
            shutil.copytree(folder / "runs" / "moved", folder / "searching")
            prepare_copies(folder / "runs")
    return Story(folder, said, stdout)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == name]


def metrics(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(event["step"], event["metrics"][name]) for event in events(run_dir, "metrics") if name in event["metrics"]]


def outcome(run_dir: Path) -> Selection:
    selection = read_selection(folder_of(run_dir))
    assert selection is not None
    assert [step for step, _ in selection.curve] == list(range(1, selection.step + 1))
    assert selection.curve[-1] == (selection.step, selection.weight)
    return selection


def training_state(run_dir: Path) -> dict[str, torch.Tensor]:
    found = ckpt.find_newest(str(run_dir / "checkpoints"))
    assert found is not None
    kinds = (ckpt.WEIGHT, ckpt.EMA, "exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": value for kind in kinds for name, value in found.read_full(kind).items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in {**one, **other} if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("searched", "fresh", "objective"),
    [("residual", "fresh-residual", "pred_res"), ("noise-2-3", "fresh-noise", "pred_noise")],
)
def test_after_either_outcome_the_training_is_a_fresh_run_of_it_bit_for_bit(
    story: Story, searched: str, fresh: str, objective: str
) -> None:
    found, expected = story.run(searched), story.run(fresh)
    assert outcome(found).objective == objective
    assert differing(training_state(found), training_state(expected)) == []
    assert metrics(found, "train/loss") == metrics(expected, "train/loss")
    (state, config, _), (other, wanted, _) = (load_safetensors(run / "model.safetensors") for run in (found, expected))
    assert differing(state, other) == []
    names = config.pop("run"), wanted.pop("run")
    assert names[0] != names[1] and config == wanted


def test_previews_and_models_of_a_searched_run_know_the_objective(story: Story) -> None:
    for name in ("preview/psnr", "preview/input_psnr"):
        found = metrics(story.run("residual"), name)
        assert len(found) == 2 and found == metrics(story.run("fresh-residual"), name)
    newest = newest_folder(story.run("residual") / "checkpoints")
    for model in (story.run("residual"), newest, story.run("residual") / "model.safetensors"):
        assert load_model(str(model)).config.diffusion.objective == "pred_res"
    assert "objective: auto" in (story.run("residual") / "config.yaml").read_text()


def test_the_weight_takes_the_same_way_at_every_stage_and_number_of_workers(story: Story) -> None:
    expected = outcome(story.run("noise-1-0"))
    assert (expected.objective, expected.step) == ("pred_noise", STEPS + 1)
    for name in [f"noise-{workers}-{number}" for workers in (1, 2) for number in STAGES]:
        found = outcome(story.run(name))
        assert (found.objective, found.step) == (expected.objective, expected.step), name
        assert [w for _, w in found.curve] == pytest.approx([w for _, w in expected.curve], rel=1e-5), name
        assert metrics(story.run(name), "search/weight") == list(found.curve)[:STEPS], name


def test_the_decision_is_taken_on_the_weight_in_fp32(story: Story) -> None:
    """Adam's first step is the learning rate; bf16 has nothing between 0.4961 and 0.4980."""
    found = outcome(story.run("bf16"))
    assert found.objective == "pred_noise" and found.curve[1][1] == pytest.approx(0.497, abs=1e-6)
    exact = [w for _, w in outcome(story.run("noise-2-1")).curve]
    assert [w for _, w in found.curve] == pytest.approx(exact, rel=1e-3)


def test_a_search_ends_before_the_update_of_the_step_that_finds_the_weight_outside(story: Story) -> None:
    run_dir, found = story.run("residual"), outcome(story.run("residual"))
    assert found.weight >= 0.51 and all(abs(weight - 0.5) < 0.01 for _, weight in found.curve[:-1])
    *updated, last = [event["metrics"] for event in events(run_dir, "metrics") if "search/loss" in event["metrics"]]
    assert "search/grad_norm" not in last and all("search/grad_norm" in each for each in updated)
    assert last["search/loss"] == pytest.approx(
        found.weight * last["search/loss_residual"] + (1 - found.weight) * last["search/loss_noise"], rel=1e-5
    )


def test_search_and_training_share_no_metric_and_the_outcome_is_told_once(story: Story) -> None:
    for name in ("residual", "noise-2-2", "moved", "killed"):
        run_dir = story.run(name)
        searched, trained = set[str](), set[str]()
        for event in events(run_dir, "metrics"):
            kind = searched if "search/loss" in event["metrics"] else trained
            kind.update(event["metrics"])
        assert {key.partition("/")[0] for key in searched} == {"search"}
        assert {key.partition("/")[0] for key in trained} <= {"train", "perf", "data", "preview"}
        [selected] = events(run_dir, "selected")
        found = outcome(run_dir)
        assert (selected["step"], selected["objective"], selected["weight"]) == (
            found.step, found.objective, found.weight,
        )  # fmt: skip
    assert "objective selected at step 7 of the search: pred_res (weight 0.51" in story.stdout[1]


def test_the_outcome_is_in_every_checkpoint_and_the_search_leaves_none(story: Story) -> None:
    for name in ("residual", "noise-2-3", "killed", "forgotten"):
        checkpoints = str(story.run(name) / "checkpoints")
        steps = ckpt.list_steps(checkpoints)
        assert len(steps) == 2
        for step in steps:
            assert ckpt.read_commit(ckpt.step_folder(checkpoints, step)).progress.selection == read_selection(
                folder_of(story.run(name))
            )
        assert ckpt.list_steps(str(story.run(name) / "search")) == []


def test_sigterm_in_the_search_saves_and_another_topology_goes_on_with_it(story: Story) -> None:
    """Stage 3 on two workers, then stage 1 on one."""
    assert story.said["moved", 2] == (75, "") and "(SIGTERM); the same command continues" in story.stdout[2]
    found = ckpt.find_newest(str(story.folder / "searching" / "search"))
    assert found is not None and found.progress.selection is not None
    stopped = found.progress.step
    assert stopped in (2, 3) and (found.progress.world_size, found.progress.zero_stage) == (2, 3)
    assert found.progress.selection.objective == "" and len(found.progress.selection.curve) == stopped
    assert story.said["moved", 1] == (0, "")
    assert f"resumed at step {stopped} of the search for the objective" in story.stdout[1]
    moved, whole = outcome(story.run("moved")), outcome(story.run("noise-2-0"))
    assert [w for _, w in moved.curve] == pytest.approx([w for _, w in whole.curve], rel=1e-5)
    assert [step for step, _ in metrics(story.run("moved"), "search/loss")] == list(range(1, STEPS + 1))


def test_a_search_without_an_outcome_says_where_it_stands_and_goes_on_with_more_steps(story: Story) -> None:
    code, text = story.said["undecided", 2]
    assert code == 1 and "has not ended after train.steps=2: its weight is 0.4940, leans to pred_noise" in text
    assert "raise train.steps, or set diffusion.objective=pred_noise in a run of another name" in text
    assert story.said["undecided", 1] == (0, "")
    assert "resumed at step 2 of the search for the objective" in story.stdout[1]
    found, whole = outcome(story.run("undecided")), outcome(story.run("noise-2-0"))
    assert [w for _, w in found.curve] == pytest.approx([w for _, w in whole.curve], rel=1e-5)


def test_a_run_killed_after_the_decision_trains_anew_and_does_not_search_again(story: Story) -> None:
    run_dir, expected = story.run("killed"), metrics(story.run("noise-2-3"), "train/loss")
    assert story.said["killed", 1] == (0, "")
    assert metrics(run_dir, "search/loss") == metrics(story.run("noise-2-3"), "search/loss")
    losses = metrics(run_dir, "train/loss")
    assert losses[:STEPS] == expected and [step for step, _ in losses[STEPS:]] == list(range(1, STEPS + 1))
    assert [loss for _, loss in losses[STEPS:]] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def test_a_lost_outcome_is_restored_from_a_checkpoint_of_the_training(story: Story) -> None:
    assert story.said["forgotten", 1] == (0, "")
    assert outcome(story.run("forgotten")) == outcome(story.run("noise-2-3"))
    [(step, loss)] = metrics(story.run("forgotten"), "train/loss")[STEPS:]
    assert step == STEPS + 1 and loss == pytest.approx(metrics(story.run("fresh-longer"), "train/loss")[STEPS][1])


def test_an_outcome_that_contradicts_the_training_is_refused(story: Story) -> None:
    code, text = story.said["other-choice", 1]
    assert code == 2 and "holds a selection of pred_res and a checkpoint trained with pred_noise" in text


def test_self_conditioned_and_generating_networks_are_searched_too(story: Story) -> None:
    for name, workers in (("self", 2), ("generating", 1)):
        assert story.said[name, workers][0] == 1 and "leans to" in story.said[name, workers][1]
        [*losses] = [loss for _, loss in metrics(story.run(name), "search/loss")]
        assert len(losses) == (2 if name == "self" else 1)


def test_a_run_that_still_searches_has_no_model(story: Story) -> None:
    run_dir = story.folder / "searching"
    for model in (run_dir, newest_folder(run_dir / "search")):
        with pytest.raises(ModelError, match="belongs to a search for the objective .* there is no model yet"):
            load_model(str(model))


@pytest.mark.parametrize(
    "text", ["", "{", '{"objective": "pred_x0", "step": 1, "weight": 0.4, "curve": []}', "[]",
             '{"objective": "", "step": 1, "weight": 0.5, "curve": []}']
)  # fmt: skip
def test_a_damaged_outcome_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(ModelError, match=r"selection.json is damaged \(.*\); remove it") as refusal:
        read_selection(folder_of(tmp_path))
    assert "\n" not in str(refusal.value)


def test_an_outcome_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_selection(folder_of(tmp_path)) is None
    selection = Selection("pred_noise", 12, 0.4899, ((10, 0.492), (12, 0.4899)))
    write_selection(folder_of(tmp_path), selection)
    assert read_selection(folder_of(tmp_path)) == selection


def test_checkpoints_written_before_there_was_a_selection_can_be_read(story: Story, tmp_path: Path) -> None:
    path = tmp_path / "step-00000006"
    shutil.copytree(newest_folder(story.run("fresh-noise") / "checkpoints"), path)
    body = json.loads((path / ckpt.COMMIT).read_text())
    assert body["progress"].pop("selection") is None
    body["sha256"] = ckpt._body_digest(body)
    (path / ckpt.COMMIT).write_text(json.dumps(body))
    assert ckpt.read_commit(str(path)).progress.selection is None
