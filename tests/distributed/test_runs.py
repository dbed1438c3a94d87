"""A run is a function of config, data and seed: worker counts, stops and restarts do not show."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.loader import Pace, Share, build_train_loader
from data_pipeline.order import choose_lanes
from data_pipeline.reader import Dataset
from data_pipeline.rng import Draws
from data_pipeline.rows import RowSettings
from rddm_dist.model.weights import load_safetensors
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.plan import make_plan
from tests.support.datasets import make_dataset
from tests.support.processes import ROOT, finish, free_port, kill_group, run, run_workers, start_workers
from tests.support.runs import TRAIN, write_config

BATCH = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), count=20, size=(40, 48))


def global_batch_digests(data: str, world_size: int, *, threads: int, first: int = 0, count: int = 8) -> list[str]:
    """sha256 per step over inputs, targets, timesteps and noise of the global batch, put together from all ranks."""
    dataset = Dataset(data)
    plan = make_plan(global_batch=BATCH, world_size=world_size, micro_batch=0)
    loaders = [
        build_train_loader(
            [dataset],
            RowSettings(crop={0: 16}),
            seed=3,
            global_batch=BATCH,
            lanes=[choose_lanes(len(dataset.manifest.shards), BATCH)],
            share=Share(rank, world_size, plan.rows_per_rank),
            start_step=first,
            pace=Pace(threads),
        )
        for rank in range(world_size)
    ]
    digests = []
    for step in range(first, first + count):
        rows: dict[int, bytes] = {}
        for loader in loaders:
            batch = next(loader)
            assert batch.step == step
            draws = Draws(3, batch.positions)
            t, noise = draws.timesteps(1000), draws.noise(batch.input.shape)
            for row in range(len(batch.keys)):
                if batch.weight[row] == 0:
                    continue
                parts = (batch.input[row], batch.target[row], t[row], noise[row])
                rows[int(batch.positions[row])] = b"".join(part.numpy().tobytes() for part in parts)
        assert sorted(rows) == list(range(step * BATCH, (step + 1) * BATCH))
        digests.append(hashlib.sha256(b"".join(rows[position] for position in sorted(rows))).hexdigest())
    for loader in loaders:
        loader.close()
    return digests


@pytest.mark.parametrize(("world_size", "threads"), [(1, 4), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_batches_timesteps_and_noise_are_the_same_bits_for_every_topology(
    data: str, world_size: int, threads: int
) -> None:
    assert global_batch_digests(data, world_size, threads=threads) == global_batch_digests(data, 1, threads=1)


def test_a_start_in_the_middle_equals_having_run_from_the_beginning(data: str) -> None:
    assert global_batch_digests(data, 2, threads=2, first=5, count=3) == global_batch_digests(data, 1, threads=1)[5:8]


def train(folder: Path, data: str, world_size: int, *overrides: str, timeout_s: float = 120) -> Path:
    """Run the tiny config to its end.   -> the run folder"""
    folder.mkdir(exist_ok=True)
    command = [*TRAIN, str(write_config(folder, data)), *overrides]
    results = run_workers(command, world_size, cwd=folder, timeout_s=timeout_s)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    return folder / "runs" / "tiny"


def journal_losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["metrics"]["train/loss"] for record in records if record["event"] == "metrics"]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    found = ckpt.find_newest(str(run_dir / "checkpoints"))
    assert found is not None
    kinds = (ckpt.WEIGHT, ckpt.EMA, "exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": value for kind in kinds for name, value in found.read_full(kind).items()}


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on two workers."""
    return train(tmp_path_factory.mktemp("undisturbed"), data, 2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_losses_do_not_depend_on_the_number_of_workers(
    data: str, undisturbed: Path, tmp_path: Path, world_size: int
) -> None:
    losses = journal_losses(train(tmp_path, data, world_size))
    assert len(losses) == 10
    assert losses == pytest.approx(journal_losses(undisturbed), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("engine.precision=bf16", "engine.zero_stage=1"), 2e-2),
        pytest.param(("engine.precision=bf16", "engine.zero_stage=3"), 2e-2, marks=pytest.mark.slow),
        (("engine.offload_optimizer=true", "engine.activation_checkpointing=true", "train.micro_batch=1"), 1e-5),
    ],
)
def test_how_the_hardware_does_it_may_change_in_the_middle_of_a_run(
    data: str, undisturbed: Path, tmp_path: Path, overrides: tuple[str, ...], tolerance: float
) -> None:
    train(tmp_path, data, 2, "train.steps=5", *overrides)
    losses = journal_losses(train(tmp_path, data, 2))
    assert losses == pytest.approx(journal_losses(undisturbed), rel=tolerance)


def test_a_run_stopped_halfway_ends_with_the_same_bits(data: str, undisturbed: Path, tmp_path: Path) -> None:
    train(tmp_path, data, 2, "train.steps=5")
    resumed = train(tmp_path, data, 2)
    assert "resumed from" in (resumed / "logs" / "rank-00000.log").read_text()
    expected, state = final_state(undisturbed), final_state(resumed)
    assert expected.keys() == state.keys()
    assert [name for name in expected if not torch.equal(expected[name], state[name])] == []
    assert journal_losses(resumed) == journal_losses(undisturbed)


def test_sigterm_saves_at_a_step_exits_75_and_the_same_command_goes_on(data: str, tmp_path: Path) -> None:
    command = [*TRAIN, str(write_config(tmp_path, data)), "train.steps=400"]
    processes = start_workers(command, 2, cwd=tmp_path)
    run_dir = tmp_path / "runs" / "tiny"
    try:
        wait_for_steps(run_dir, 8)
        processes[1].send_signal(signal.SIGTERM)  # one worker is told, all of them stop at one step
        results = [finish(process, timeout_s=60) for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert [result.code for result in results] == [75, 75], results[0].text + results[1].text
    assert "(SIGTERM); the same command continues" in results[0].stdout
    stopped = ckpt.find_newest(str(run_dir / "checkpoints"))
    assert stopped is not None and 8 <= stopped.progress.step < 400
    steps = stopped.progress.step + 3
    train(tmp_path, data, 2, f"train.steps={steps}")
    assert len(journal_losses(run_dir)) == steps


def wait_for_steps(run_dir: Path, count: int, *, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    journal = run_dir / "metrics.jsonl"
    while not journal.exists() or journal.read_text().count('"event":"metrics"') < count:
        assert time.monotonic() < deadline, f"{journal} did not reach {count} steps in time"
        time.sleep(0.1)


def test_a_damaged_checkpoint_is_skipped_loudly_and_the_one_before_continues(
    data: str, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = train(tmp_path, data, 2)
    (run_dir / "model.safetensors").unlink()
    newest = Path(ckpt.step_folder(str(run_dir / "checkpoints"), 10)) / "rank-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train(tmp_path, data, 2)
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert "SKIPPING a damaged checkpoint" in log and "at step 5" in log
    expected, state = final_state(undisturbed), final_state(run_dir)
    assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.slow
def test_fewer_checkpoints_are_kept_only_of_the_sound_ones(data: str, tmp_path: Path) -> None:
    run_dir = train(tmp_path, data, 1, "train.checkpoint_every=2", "train.keep_last=5")
    for step in (8, 10):
        damaged = Path(ckpt.step_folder(str(run_dir / "checkpoints"), step)) / "rank-00000.safetensors"
        damaged.write_bytes(b"")
    (run_dir / "model.safetensors").unlink()
    command = [*TRAIN, str(tmp_path / "tiny.yaml"), "train.checkpoint_every=2"]
    [result] = run_workers(command, 1, cwd=tmp_path)
    assert result.code == 0, result.text
    assert "resumed at step 6" in result.stdout and result.stdout.count("SKIPPED") == 2
    assert "changed: train.keep_last: 5 -> 2" in result.stdout
    assert ckpt.list_steps(str(run_dir / "checkpoints")) == [10, 8]


@pytest.mark.slow
def test_the_export_of_a_shorter_run_is_not_taken_for_that_of_a_longer_one(data: str, tmp_path: Path) -> None:
    """The run is extended and dies after its last save, before it writes its export."""
    run_dir = train(tmp_path, data, 1)
    export = run_dir / "model.safetensors"
    old = export.read_bytes()
    train(tmp_path, data, 1, "train.steps=12")
    export.unlink()
    train(tmp_path, data, 1, "train.steps=12")
    assert export.read_bytes() != old
    assert load_safetensors(export)[2]["step"] == "12"


def test_a_worker_that_fails_while_loading_does_not_leave_the_others_waiting(data: str, tmp_path: Path) -> None:
    """Rank 1 sees a rank file vanish after rank 0 verified it; both end with the same error."""
    run_dir = train(tmp_path, data, 2, "train.steps=5")
    script = (
        "import sys\n"
        "from rddm_dist.training import checkpoint\n"
        "from rddm_dist import comm\n"
        "from rddm_dist.cli.torchrun import main\n"
        "read = checkpoint.read_index\n"
        "def failing(*args, **options):\n"
        "    if comm.rank() == 1:\n"
        "        raise FileNotFoundError(2, 'No such file', 'rank-00001.safetensors')\n"
        "    return read(*args, **options)\n"
        "checkpoint.read_index = failing\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "tiny.yaml")]
    results = run_workers(command, 2, cwd=tmp_path, timeout_s=60)
    assert [result.code for result in results] == [2, 2]
    assert "rank-00001.safetensors" in results[0].stderr
    assert run_dir.exists()


@pytest.mark.slow
def test_losses_of_the_demo_preset_agree_to_one_percent(data: str, tmp_path: Path) -> None:
    losses = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        command = [
            *TRAIN, str(ROOT / "configs" / "train" / "demo.yaml"), f"data.uri={data}", "data.eval_uri=", "data.crop=32",
            "train.steps=10", "train.log_every=1", "sample.every=0", "optim.warmup_steps=5", "tracking.backend=none",
            f"run.storage={folder}", "run.name=demo",
        ]  # fmt: skip
        results = run_workers(command, world_size, cwd=folder, timeout_s=120)
        assert {result.code for result in results} == {0}, results[0].text
        losses[world_size] = journal_losses(folder / "demo")
    assert len(losses[1]) == 10
    assert losses[2] == pytest.approx(losses[1], rel=1e-2)


def test_torchrun_itself_trains(data: str, tmp_path: Path) -> None:
    torchrun = [str(Path(TRAIN[0]).with_name("torchrun")), "--nproc-per-node", "2", "--master-port", str(free_port())]
    result = run(
        [*torchrun, "-m", "rddm_dist.training", str(write_config(tmp_path, data))], cwd=tmp_path, timeout_s=120
    )
    assert result.code == 0, result.text
    assert "trained to step 10" in result.stdout
