"""From configuration to objects: the network and the schedule that a config describes."""

from __future__ import annotations

from rddm_dist.config import DiffusionSection, ModelSection
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.diffusion.schedule import make_schedule as build_schedule
from rddm_dist.model.net import Network, build_net


def make_net(model: ModelSection, *, activation_checkpointing: bool = False) -> Network:
    """The network with freshly drawn weights (from torch's current generator)."""
    return build_net(
        kind=model.kind,
        dim=model.dim,
        dim_mults=model.dim_mults,
        num_nets=model.num_nets,
        condition=model.condition,
        self_condition=model.self_condition,
        activation_checkpointing=activation_checkpointing,
    )


def make_schedule(diffusion: DiffusionSection) -> Schedule:
    """The coefficient tables, on the CPU."""
    return build_schedule(
        **diffusion.schedule.model_dump(),
        num_timesteps=diffusion.num_timesteps,
        sum_scale=diffusion.sum_scale,
        parity=diffusion.parity,
    )
