"""The published two-network model in training on counted noise, saved as a run saves it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data_pipeline.batch import Batch
from data_pipeline.retry import DEFAULT_RETRY
from data_pipeline.rng import normal_image
from rddm_dist.comm import Topology
from rddm_dist.config import DiffusionSection, EmaSection, EngineSection, ModelSection, OptimSection
from rddm_dist.factory import make_schedule
from rddm_dist.model.net import build_net
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema, make_ema, profiles
from rddm_dist.training.engine import Engine
from rddm_dist.training.fragments import Snapshot
from rddm_dist.training.plan import make_plan
from rddm_dist.training.retention import Retention, sweep
from rddm_dist.training.saving import Saved, Saver
from rddm_dist.training.step import Word, train_step

STAGE, BATCH, LR = 2, 2, 1e-4
EMA = EmaSection(update_every=1, start_step=1)  # so that averages are no copies of the weights after a few steps
DIFFUSION = DiffusionSection()
SCHEDULE = make_schedule(DIFFUSION)


@dataclass
class Trainee:
    """A network with optimizer and averages, and the folder it saves to.   saved: what rank 0 has committed"""

    engine: Engine
    ema: Ema
    topology: Topology
    folder: Path
    batch: Batch
    step: int = 0
    saved: list[Saved] = field(default_factory=list)

    def train_step(self, word: Word) -> bool:
        """One optimizer step as a run takes it.   -> whether the save in flight is committed"""
        first = self.step * BATCH + self.topology.rank
        rows = torch.arange(first, first + BATCH, self.topology.world_size)
        result = train_step(
            self.engine,
            SCHEDULE,
            replace(self.batch, positions=rows, step=self.step),
            diffusion=DIFFUSION,
            self_condition=False,
            seed=0,
            lr=LR,
            word=word,
        )
        self.step += 1
        self.ema.update(self.step)
        return result.has_committed

    def progress(self, step: int) -> ckpt.Progress:
        engine = self.engine
        return ckpt.Progress(step, step * BATCH, engine.optimizer_step, "", "", self.topology.world_size, engine.stage)

    def snapshot(self) -> Snapshot:
        return Snapshot(ckpt.sources(self.engine.pieces, self.ema))

    def make_saver(self) -> Saver:
        return Saver(
            shapes=self.engine.shapes,
            session="benchmark",
            writers=self.topology.world_size,
            max_failures=1,
            retry=DEFAULT_RETRY,
            guard=lambda: None,
            before_commit=lambda: None,
            on_saved=self.saved.append,
            on_failed=lambda step, reason, failures: None,
        )

    @property
    def checkpoints(self) -> str:
        """The folder of checkpoints."""
        return str(self.folder / ckpt.CHECKPOINTS)

    def prune(self, step: int) -> None:
        """Keep the last two checkpoints, as a run does after each save. Rank 0."""
        sweep(self.checkpoints, Retention(2), newest=step)


def build(topology: Topology, *, dim: int, size: int, folder: Path) -> Trainee:
    """The network with fresh weights.   dim: its width; size: pixels of the images trained on"""
    model = ModelSection(dim=dim)
    torch.manual_seed(0)
    engine = Engine(
        build_net(dim=model.dim, dim_mults=model.dim_mults, num_nets=model.num_nets),
        engine=EngineSection(zero_stage=STAGE),
        optim=OptimSection(lr=LR),
        plan=make_plan(global_batch=BATCH, world_size=topology.world_size, micro_batch=1),
        topology=topology,
    )
    rows = torch.arange(topology.rank, BATCH, topology.world_size)
    noise = [normal_image(0, name, rows, channels=3, height=size, width=size) for name in ("x", "y")]
    degraded, clean = ((40.0 * each + 128.0).clamp(0, 255).to(torch.uint8) for each in noise)
    batch = Batch(degraded, clean, None, tuple(map(str, rows.tolist())), rows, torch.ones(len(rows)), 0)
    return Trainee(engine, make_ema(engine.pieces, profiles(EMA)), topology, folder, batch)
