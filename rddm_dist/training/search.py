"""The search for the objective as a phase of a run: the network and a weight trained together until the weight leans.

Spec of RDDM, section 4 (AOSA). What the search has trained is thrown away; only its outcome is used.
"""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.errors import TrainingFault
from data_pipeline.rng import Draws
from rddm_dist import comm
from rddm_dist.comm import Topology
from rddm_dist.config import Config
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.diffusion.selection import (
    INITIAL_WEIGHT,
    THRESHOLD,
    leading_objective,
    selected_objective,
    selection_loss,
)
from rddm_dist.factory import make_schedule
from rddm_dist.model.net import Network
from rddm_dist.training.data import open_loader
from rddm_dist.training.ema import Ema
from rddm_dist.training.engine import DTYPES, Engine, call_in
from rddm_dist.training.keeper import Keeper
from rddm_dist.training.loop import Actions, Names, run_loop
from rddm_dist.training.ownership import Ownership
from rddm_dist.training.prepare import Prepared
from rddm_dist.training.quarantine import Quarantine
from rddm_dist.training.reporting import Reporting
from rddm_dist.training.selection import SEARCH_DIR, Selection
from rddm_dist.training.state import Start, check_room, draw_net, load_state
from rddm_dist.training.step import MicroBatch, StepResult, Word, agree, measures, run_micro_batches
from rddm_dist.training.stopping import StopFlag

WEIGHT = "alpha_res"
NAMES = Names(step="search", speed="search", data="search")
NO_EMA = Ema((), (), ())


class SearchNet(nn.Module):
    """A network and the weight between the two readings of its output; a call gives the losses of the search.

    They are computed in here, so that ZeRO stage 3, which gathers the parameters of a module for its forward, gathers
    the weight as well.
    """

    def __init__(self, net: Network, config: Config, schedule: Schedule) -> None:
        super().__init__()
        self.net = net
        self.alpha_res = nn.Parameter(torch.full((1,), INITIAL_WEIGHT))
        self._config, self._schedule = config, schedule
        self._dtype = DTYPES[config.engine.precision]

    def forward(
        self, x0: Tensor, x_in: Tensor, mask: Tensor | None, sample_weight: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Total, residual and noise loss of each sample, each (B,) float32; arguments as in `MicroBatch`."""
        diffusion = self._config.diffusion

        def net(
            x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None, x_self: Tensor | None
        ) -> tuple[Tensor, ...]:
            return call_in(self._dtype, self.net, x_t, times, x_in, mask, x_self)

        losses = selection_loss(
            net,
            self._schedule,
            weight=self.alpha_res.float(),
            x0=x0,
            x_in=x_in,
            draws=Draws(seed=self._config.train.seed, ids=positions, device=str(x0.device)),
            sample_weight=sample_weight,
            mask=mask,
            loss=diffusion.loss,
            time_input=diffusion.time_input,
            process=diffusion.process,
            self_condition=self._config.model.self_condition,
            clip_residual=diffusion.residual_clip,
        )
        return losses.total, losses.residual, losses.noise


class Search:
    """The search phase of a run under DeepSpeed, at the beginning or where its newest checkpoint left it."""

    def __init__(self, prepared: Prepared, topology: Topology, start: Start) -> None:
        config = prepared.config
        with comm.together():
            if comm.rank() == 0:
                check_room(prepared, draw_net(config))
        net = SearchNet(draw_net(config), config, make_schedule(config.diffusion).to(topology.device))
        # Compiling would take in the drawing of noise as well, and a search is short.
        settings = config.engine.model_copy(update={"compile": False})
        self._engine = Engine(net, engine=settings, optim=config.optim, plan=prepared.plan, topology=topology)
        self.prepared, self._first_step = prepared, start.step
        self._weight = INITIAL_WEIGHT
        self._curve: tuple[tuple[int, float], ...] = ()
        if start.checkpoint is not None:
            load_state(start.checkpoint, self._engine, NO_EMA)
            assert start.checkpoint.progress.selection is not None
            self._curve = start.checkpoint.progress.selection.curve

    def run(self, stop: StopFlag, reporting: Reporting, owner: Ownership | None) -> Selection:
        """Search until the outcome is known; after a stop request the selection names none.

        Raises TrainingFault, after saving, where train.steps steps do not decide.
        """
        config, step = self.prepared.config, self._first_step
        is_complete = step >= config.train.steps
        if not is_complete:
            step, is_complete = self._loop(stop, reporting, owner)
        if not is_complete:
            return self._state("", step)
        objective = selected_objective(self._weight)
        if objective is None:
            # The last update may have been the one; the next step would see it.
            [total, owners] = comm.sum_floats(self._own_weight())
            step, self._weight = step + 1, total / owners
            objective = selected_objective(self._weight)
            self._curve = (*self._curve, (step, self._weight))
        if not math.isfinite(self._weight):
            error = TrainingFault(f"the weight of the search is not finite after step {step}; lower optim.lr")
            error.is_shared = True
            raise error
        if objective is None:
            raise _undecided(config.train.steps, self._weight)
        return self._state(objective, step)

    def close(self) -> None:
        """Give back the memory of network and optimizer, which the training takes anew."""
        self._engine.close()
        del self._engine
        gc.collect()  # DeepSpeed's objects refer to each other in circles

    def _loop(self, stop: StopFlag, reporting: Reporting, owner: Ownership | None) -> tuple[int, bool]:
        prepared, engine = self.prepared, self._engine

        def write(step: int, metrics: dict[str, Any]) -> None:
            self._curve = (*self._curve, (step, self._weight))
            reporting.metrics(step, {**metrics, f"{NAMES.step}/weight": self._weight})

        keeper = Keeper(
            prepared,
            engine,
            NO_EMA,
            folder=SEARCH_DIR,
            selection=lambda step: self._state("", step),
            owner=owner,
            reporting=reporting,
        )
        quarantine = Quarantine(prepared)
        with comm.together():
            loader = open_loader(
                prepared.config, prepared.data, prepared.plan, rank=comm.rank(), start_step=self._first_step
            )
        try:
            return run_loop(
                prepared.config,
                batches=loader,
                stop=stop,
                quarantine=quarantine,
                actions=Actions(
                    take_step=self._take_step, measures=partial(measures, engine), log=write, keeper=keeper
                ),
                names=NAMES,
            )
        finally:
            keeper.close()
            loader.close()

    def _take_step(self, batch: Batch, lr: float, word: Word) -> StepResult:
        """Like `train_step`, without the update where the weight has left its band.

        The fp32 weight counts, not the copy that a forward in bf16 sees; whoever holds it tells the others in the one
        collective.
        """
        engine = self._engine
        sums = run_micro_batches(engine, batch, self._losses_of)
        result, (total, owners) = agree(engine.plan, batch, sums, word=word, further=self._own_weight())
        self._weight = total / owners
        if result.is_finite and selected_objective(self._weight) is not None:
            return replace(result, is_decided=True)
        if result.is_finite:
            engine.step(lr=lr)
        return result

    def _losses_of(self, rows: MicroBatch) -> dict[str, Tensor]:
        total, residual, noise = self._engine.net(rows.x0, rows.x_in, rows.mask, rows.weight, rows.positions)
        return {"loss": total, "loss_residual": residual, "loss_noise": noise}

    def _own_weight(self) -> tuple[float, float]:
        """The sum of the weights that this rank holds, one or none, and how many."""
        held = [piece.weight for piece in self._engine.pieces if piece.name == WEIGHT]
        return sum(float(weight) for weight in held), float(len(held))

    def _state(self, objective: str, step: int) -> Selection:
        return Selection(objective, step, self._weight, self._curve)


def _undecided(steps: int, weight: float) -> TrainingFault:
    """The end of a search that took all its steps, which every worker comes to at this point."""
    leaning = leading_objective(weight)
    error = TrainingFault(
        f"the search for the objective has not ended after train.steps={steps}: its weight is {weight:.4f}, leans to "
        f"{leaning}, and decides at a distance of {THRESHOLD} from {INITIAL_WEIGHT}; raise train.steps, or set "
        f"diffusion.objective={leaning} in a run of another name"
    )
    error.is_shared = True
    return error
