"""Run by the workers of a test: train a few steps at every ZeRO stage and save, or load at every stage and compare.

state_probe.py save FOLDER        FOLDER/stage-S/ gets a checkpoint of each stage S
state_probe.py load FOLDER        loads each of them at another stage and compares weights, moments and EMA
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.rng import Draws, normal_image
from rddm_dist import comm
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import Config, DiffusionSection, EmaSection, EngineSection, ModelSection, OptimSection
from rddm_dist.diffusion.objective import training_loss
from rddm_dist.factory import make_net, make_schedule
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema, ema_decay, make_ema
from rddm_dist.training.engine import MOMENTS, Engine
from rddm_dist.training.plan import make_plan

STAGES = (0, 1, 2, 3)
STEPS, BATCH = 4, 4
EMA = EmaSection(update_every=1, start_step=1, decay=0.9)
CONFIG = Config(
    model=ModelSection(dim=8, dim_mults=(1, 2), num_nets=1), diffusion=DiffusionSection(objective="pred_res")
)
SCHEDULE = make_schedule(DiffusionSection(num_timesteps=10))


def build(stage: int, topology: Topology) -> Engine:
    torch.manual_seed(0)
    return Engine(
        make_net(CONFIG),
        engine=EngineSection(zero_stage=stage),
        optim=OptimSection(lr=1e-3),
        plan=make_plan(global_batch=BATCH, world_size=topology.world_size, micro_batch=1),
        topology=topology,
    )


def step_once(engine: Engine, topology: Topology, step: int) -> float:
    """One optimizer step on counted random images.   -> the global mean loss"""
    plan, positions = engine.plan, torch.arange(BATCH) + BATCH * step
    mine = positions[topology.rank :: topology.world_size]
    total = 0.0
    for micro in range(plan.accumulation):
        rows = mine[micro : micro + 1] if micro < len(mine) else mine[:1]
        weight = torch.tensor([1.0 if micro < len(mine) else 0.0])
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
        engine.step(lr=1e-3)
    return comm.sum_floats([total])[0] / BATCH


def gather(engine: Engine, ema: Ema, kind: str) -> dict[str, Tensor] | None:
    """Whole tensors of one kind on rank 0."""
    from dataclasses import replace

    if kind == ckpt.EMA:
        return ckpt.gather_full(ema.as_pieces(), engine.shapes)
    pieces = [piece if kind == ckpt.WEIGHT else replace(piece, weight=piece.moments[kind]) for piece in engine.pieces]
    return ckpt.gather_full(pieces, engine.shapes)


def save(folder: Path, topology: Topology) -> None:
    for stage in STAGES:
        engine = build(stage, topology)
        ema = make_ema(engine.pieces)
        reference: dict[str, Tensor] = {}
        losses = []
        for step in range(STEPS):
            losses.append(step_once(engine, topology, step))
            ema.update(step + 1, EMA)
            weights = gather(engine, ema, ckpt.WEIGHT) or {}
            decay = ema_decay(step + 1, EMA)
            assert decay is not None
            for name, value in weights.items():
                average = reference.get(name, value.double())
                reference[name] = average + (1 - decay) * (value.double() - average) if decay else value.double()
        averages = gather(engine, ema, ckpt.EMA) or {}
        for name, value in averages.items():
            assert torch.allclose(value.double(), reference[name], rtol=1e-6, atol=1e-7), f"EMA of {name}"
        progress = ckpt.Progress(STEPS, STEPS * BATCH, engine.optimizer_step, "c", "d", topology.world_size, stage)
        ckpt.save_checkpoint(folder / f"stage-{stage}", engine, ema, progress)
        if topology.rank == 0:
            print(f"losses {stage} {' '.join(f'{loss:.9g}' for loss in losses)}", flush=True)
        engine.close()


def load(folder: Path, topology: Topology) -> None:
    for source in STAGES:
        target = STAGES[(source + 1 + topology.world_size) % len(STAGES)]
        engine = build(target, topology)
        ema = make_ema(engine.pieces)
        found = ckpt.find_newest(folder / f"stage-{source}")
        assert found is not None
        ckpt.load_checkpoint(found, engine, ema)
        assert engine.optimizer_step == STEPS
        reader = ckpt.Reader(found)
        for kind in (ckpt.WEIGHT, ckpt.EMA, *MOMENTS):
            loaded = gather(engine, ema, kind)
            if loaded is None:
                continue
            for name, value in reader.read_full(kind):
                assert torch.equal(loaded[name], value), f"{kind} of {name} from stage {source} at stage {target}"
        loss = step_once(engine, topology, STEPS)
        if topology.rank == 0:
            print(f"next {source} {target} {loss:.9g}", flush=True)
        engine.close()


if __name__ == "__main__":
    here = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(here)
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]), here)
    comm.leave(0)
