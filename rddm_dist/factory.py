"""From configuration to objects: the network and the schedule that a config describes."""

from __future__ import annotations

from data_pipeline.errors import ConfigError
from rddm_dist.config import Config, DiffusionSection, SampleScheduleSection
from rddm_dist.diffusion.schedule import Schedule, readjust
from rddm_dist.diffusion.schedule import make_schedule as build_schedule
from rddm_dist.model.net import Network, build_net


def make_net(config: Config, *, activation_checkpointing: bool = False) -> Network:
    """The network with freshly drawn weights (from torch's current generator)."""
    model = config.model
    return build_net(
        kind=model.kind,
        dim=model.dim,
        dim_mults=model.dim_mults,
        num_nets=model.num_nets,
        condition=model.condition,
        self_condition=model.self_condition,
        # Of the two clocks, a network that tells the noise alone needs the one of the noise.
        time_of_single="noise" if config.diffusion.objective == "pred_noise" else "residual",
        activation_checkpointing=activation_checkpointing,
    )


def make_schedule(diffusion: DiffusionSection) -> Schedule:
    """The coefficient tables of training, on the CPU."""
    return build_schedule(
        **diffusion.schedule.model_dump(),
        num_timesteps=diffusion.num_timesteps,
        sum_scale=diffusion.sum_scale,
        parity=diffusion.parity,
    )


def make_sampling_schedule(config: Config) -> Schedule:
    """The coefficient tables of sampling: those of training, readjusted as sample.schedule says."""
    schedule, wanted = make_schedule(config.diffusion), config.sample.schedule
    if wanted == SampleScheduleSection():
        return schedule
    values = wanted.model_dump(exclude={"keeps_estimate"})

    def of(kind: str) -> Schedule | None:
        """The schedule that gives one part; the other part of it is not used."""
        if kind == "same":
            return None
        try:
            return build_schedule(
                **{**values, "kind": kind},
                num_timesteps=config.diffusion.num_timesteps,
                sum_scale=config.diffusion.sum_scale,
                parity=config.diffusion.parity,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("diffusion.schedule.", "sample.schedule.")) from error

    return readjust(
        schedule, alpha=of(wanted.alpha_kind), beta2=of(wanted.beta2_kind), keeps_estimate=wanted.keeps_estimate
    )
