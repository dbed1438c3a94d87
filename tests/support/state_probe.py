"""Run by the workers of a test: one link of a chain of world sizes, for several rows of settings.

state_probe.py FOLDER LINK

FOLDER/chain.json: {"links": [[world size, steps, further steps], ...],
                    "rows": {name: {"precision": ..., "stages": [one a link]}}}
A row loads what the link before has saved, trains its steps, saves, goes on undisturbed for the further steps, and does
those once more from what it has saved. What was seen goes to FOLDER/link-LINK.json:
  compared, differing   tensors put together after the load, and the names of those that are not what was saved
  optimizer_step        after the load
  losses                of the link's steps
  ema_errors            kind -> largest distance from the float64 reference, relative to the weights of the parameter
  undisturbed, again    losses of the steps after the save, and once more after a load of it
  again_compared, again_differing   tensors at the end of those, and the names of those that differ
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.retry import RetryPolicy
from data_pipeline.rng import Draws, normal_image
from rddm_dist import comm
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import Config, DiffusionSection, EmaSection, EngineSection, ModelSection, OptimSection
from rddm_dist.diffusion.objective import training_loss
from rddm_dist.factory import make_net, make_schedule
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema, make_ema, profiles
from rddm_dist.training.engine import MOMENTS, Engine
from rddm_dist.training.fragments import Snapshot
from rddm_dist.training.plan import make_plan
from rddm_dist.training.saving import Saver, Series

BATCH, LR = 4, 1e-4
EMA = EmaSection(update_every=1, start_step=0, decay=0.9, lengths=(0.05, 0.2))  # blends from step 3 on
CONFIG = Config(
    model=ModelSection(dim=8, dim_mults=(1, 2), num_nets=1), diffusion=DiffusionSection(objective="pred_res")
)
SCHEDULE = make_schedule(DiffusionSection(num_timesteps=10))
State = dict[str, Tensor]


@dataclass
class Reference:
    """The averages as one process in float64 would have them.   averages: "<kind>/<parameter>" -> float64 of its shape

    Only rank 0 holds something.
    """

    averages: State = field(default_factory=dict)

    def update(self, ema: Ema, weights: State, step: int) -> None:
        for profile in ema.profiles:
            decay = profile.decay(step)
            for name, weight in weights.items():
                key = f"{profile.kind}/{name}"
                average = self.averages.get(key, weight.double())
                if decay is not None:
                    self.averages[key] = decay * average + (1.0 - decay) * weight.double()

    def errors(self, state: State) -> dict[str, float]:
        """kind -> largest distance of its averages in `state`, relative to the largest weight of the parameter."""
        worst: dict[str, float] = {}
        for key, expected in self.averages.items():
            kind, _, name = key.partition("/")
            distance = (state[key].double() - expected).abs().max()
            scale = state[f"{ckpt.WEIGHT}/{name}"].double().abs().max()
            worst[kind] = max(worst.get(kind, 0.0), float(distance / scale) if distance else 0.0)
        return worst


@dataclass(frozen=True)
class Trainee:
    """A network under one ZeRO stage, with its averages."""

    engine: Engine
    ema: Ema
    topology: Topology

    def train(self, first: int, count: int) -> list[float]:
        """->  the losses of the steps from `first` on"""
        losses = []
        for step in range(first, first + count):
            losses.append(step_once(self.engine, self.topology, step, lr=LR))
            self.ema.update(step + 1)
        return losses

    def state(self) -> State:
        """All there is to save, put together without the checkpoint's code; the pieces must cover every parameter.

        ->  "<kind>/<parameter>" -> fp32 of its shape; {} but on rank 0
        """
        found = [(ckpt.WEIGHT, piece.name, piece.start, piece.weight) for piece in self.engine.pieces]
        for kind in MOMENTS:
            found += [(kind, piece.name, piece.start, piece.moments[kind]) for piece in self.engine.pieces]
        for profile in self.ema.profiles:
            pieces = self.ema.as_pieces(profile.kind)
            found += [(profile.kind, piece.name, piece.start, piece.weight) for piece in pieces]
        index = [(f"{kind}/{name}", start, values.numel()) for kind, name, start, values in found]
        parts = comm.gather_object((index, torch.cat([values for *_, values in found])))
        if parts is None:
            return {}
        kinds = (ckpt.WEIGHT, *MOMENTS, *(profile.kind for profile in self.ema.profiles))
        shapes = self.engine.shapes
        state = {f"{kind}/{name}": torch.full(shapes[name], torch.nan) for kind in kinds for name in shapes}
        for entries, flat in parts:
            for (key, start, numel), values in zip(entries, flat.split([n for *_, n in entries]), strict=True):
                state[key].view(-1)[start : start + numel] = values
        assert not any(value.isnan().any() for value in state.values())
        return state

    def load(self, folder: Path) -> None:
        found, _ = ckpt.find_newest_together(str(folder))
        assert found is not None
        ckpt.load_checkpoint(found, self.engine, self.ema)


def build(stage: int, precision: Any, topology: Topology) -> Trainee:
    torch.manual_seed(0)
    engine = Engine(
        make_net(CONFIG),
        engine=EngineSection(zero_stage=stage, precision=precision),
        optim=OptimSection(lr=LR),
        plan=make_plan(global_batch=BATCH, world_size=topology.world_size, micro_batch=2),
        topology=topology,
    )
    return Trainee(engine, make_ema(engine.pieces, profiles(EMA)), topology)


def step_once(engine: Engine, topology: Topology, step: int, *, lr: float = 1e-3) -> float:
    """One optimizer step on counted random images.   -> the global mean loss"""
    plan, positions = engine.plan, torch.arange(BATCH) + BATCH * step
    mine = positions[topology.rank :: topology.world_size]
    fillers = mine[:1].expand(plan.rows_per_rank - len(mine))
    weights = torch.cat([torch.ones(len(mine)), torch.zeros(len(fillers))])
    total = 0.0
    parts = (torch.cat([mine, fillers]).split(plan.micro_batch), weights.split(plan.micro_batch))
    for rows, weight in zip(*parts, strict=True):
        images = [normal_image(1, name, rows, channels=3, height=16, width=16).clamp(-1, 1) for name in ("a", "b")]
        losses = training_loss(
            engine,
            SCHEDULE,
            objective="pred_res",
            x0=images[0],
            x_in=images[1],
            draws=Draws(0, rows),
            weight=weight,
            loss="l2",
        )
        engine.backward(losses.sum() * plan.loss_scale)
        total += float(losses.detach().sum())
        engine.step(lr=lr)
    return comm.sum_floats([total])[0] / BATCH


def save(folder: Path, trainee: Trainee, step: int) -> None:
    """Save as a run does, and wait for it."""
    engine = trainee.engine
    is_writer = comm.rank() == 0 or not engine.is_replicated
    progress = ckpt.Progress(
        step, step * BATCH, engine.optimizer_step, "c", "d", trainee.topology.world_size, engine.stage
    )

    def fail(step: int, reason: str, failures: int) -> None:
        raise AssertionError(reason)

    saver = Saver(
        shapes=engine.shapes,
        session="probe",
        writers=1 if engine.is_replicated else comm.world_size(),
        max_failures=1,
        retry=RetryPolicy(),
        guard=lambda: None,
        before_commit=lambda: None,
        on_saved=lambda saved: None,
        on_failed=fail,
    )
    snapshot = Snapshot(ckpt.sources(engine.pieces, trainee.ema)) if is_writer else None
    saver.start(progress, [Series(str(folder), snapshot)])
    assert saver.finish()


def differing(state: State, other: State) -> list[str]:
    """Names of what has not the same bits."""
    assert state.keys() == other.keys()
    return [name for name in state if not torch.equal(state[name].view(torch.int32), other[name].view(torch.int32))]


def run_row(folder: Path, links: Sequence[Sequence[int]], row: Mapping[str, Any], index: int, here: Topology) -> Any:
    """->  what was seen, on rank 0 whole"""
    _, count, further = links[index]
    first = sum(steps for _, steps, _ in links[:index])
    stage, precision = row["stages"][index], row["precision"]
    seen: dict[str, Any] = {"compared": 0, "differing": []}
    reference = Reference()
    trainee = build(stage, precision, here)
    if index:
        trainee.load(folder / f"link-{index - 1}")
        loaded = trainee.state()
        if here.rank == 0:
            seen["differing"] = differing(loaded, load_file(folder / f"state-{index - 1}.safetensors"))
            reference = Reference(load_file(folder / f"reference-{index - 1}.safetensors"))
        seen["compared"] = len(loaded)
    seen["optimizer_step"] = trainee.engine.optimizer_step
    losses, errors = [], []
    for step in range(first, first + count):
        losses += trainee.train(step, 1)
        state = trainee.state()
        reference.update(trainee.ema, weights_of(state), step + 1)
        errors.append(reference.errors(state))
    save(folder / f"link-{index}", trainee, first + count)
    if here.rank == 0:
        save_file(state, folder / f"state-{index}.safetensors")
        save_file(reference.averages, folder / f"reference-{index}.safetensors")
    worst = {kind: max(error[kind] for error in errors) for kind in errors[0]}
    seen |= {"losses": losses, "ema_errors": worst, "undisturbed": trainee.train(first + count, further)}
    ending = trainee.state()
    trainee.engine.close()
    return {**seen, **go_on_again(folder / f"link-{index}", ending, stage, precision, here, first + count, further)}


def go_on_again(
    saved: Path, ending: State, stage: int, precision: str, here: Topology, first: int, count: int
) -> dict[str, Any]:
    """Do further steps from a checkpoint in a new engine, and compare with the state they have ended in."""
    if not count:
        return {}
    trainee = build(stage, precision, here)
    trainee.load(saved)
    losses, state = trainee.train(first, count), trainee.state()
    trainee.engine.close()
    return {"again": losses, "again_compared": len(state), "again_differing": differing(ending, state)}


def weights_of(state: State) -> State:
    """parameter -> its weights"""
    prefix = f"{ckpt.WEIGHT}/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def run_link(folder: Path, index: int, here: Topology) -> None:
    chain = json.loads((folder / "chain.json").read_text())
    seen = {}
    for name, row in chain["rows"].items():
        own = folder / name
        own.mkdir(exist_ok=True)
        seen[name] = run_row(own, chain["links"], row, index, here)
    if here.rank == 0:
        (folder / f"link-{index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    this = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(this)
    run_link(Path(sys.argv[1]), int(sys.argv[2]), this)
    comm.leave(0)
