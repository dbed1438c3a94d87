"""What a network's outputs mean: for every objective, from outputs to a complete estimate of residual, noise and x0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.process import Levels, process_input

# A network as the loss and the samplers see it: net(x_t, times, x_in, mask, x_self) -> one tensor per output.
Net = Callable[[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None, Tensor | None], Sequence[Tensor]]

# What each output of the network is. velocity = (1 - alpha_cumsum) noise - beta_cumsum x0, for process=ddpm.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "pred_res_noise": ("residual", "noise"),
    "pred_res_add_noise": ("residual", "residual + noise"),
    "pred_x0_noise": ("x0", "noise"),
    "pred_x0_add_noise": ("x0", "x0 + noise"),
    "pred_noise": ("noise",),
    "pred_res": ("residual",),
    "pred_x0": ("x0",),
    "pred_v": ("velocity",),
}
OBJECTIVES: dict[str, int] = {objective: len(parts) for objective, parts in OUTPUTS.items()}
# The objective under which one output of a network with two is used alone; "all" uses both.
USES: dict[str, str] = {"all": "", "residual": "pred_res", "noise": "pred_noise", "x0": "pred_x0"}


@dataclass(frozen=True)
class Prediction:
    """A complete estimate, each (B, C, H, W) float32."""

    residual: Tensor
    noise: Tensor
    x0: Tensor


# on_step(k, state, prediction): k = 0 is the start (no prediction yet), k = 1, 2, ... the state after the k-th step.
OnStep = Callable[[int, Tensor, Prediction | None], None]


@dataclass(frozen=True)
class Estimator:
    """A network with all that stays the same from state to state; calling it gives a complete estimate.

    x_in: (B, C, H, W) float32 in [-1, 1], what the network sees; the process runs with `process_input` of it;
    mask: (B, 1 or C, H, W) float32 in [0, 1] or None; `use`: the outputs that are used, see USES.
    """

    net: Net
    objective: str
    x_in: Tensor
    mask: Tensor | None = None
    process: str = "rddm"
    use: str = "all"
    self_condition: bool = False
    clip_residual: tuple[float, float] | None = (-2.0, 2.0)

    def __call__(
        self, x_t: Tensor, *, times: tuple[Tensor, Tensor], levels: Levels, previous: Prediction | None
    ) -> Prediction:
        """Estimate from x_t: (B, C, H, W) float32.   times: 2 x (B,) float32; `previous`: the estimate before this
        one, whose x0 a self-conditioned network sees, None where there is none."""
        x_self = previous.x0 if self.self_condition and previous is not None else None
        outputs = self.net(x_t, times, self.x_in, self.mask, x_self)
        return complete_prediction(
            pick_outputs(outputs, objective=self.objective, use=self.use),
            objective=used_objective(self.objective, self.use),
            levels=levels,
            x_t=x_t,
            x_in=process_input(self.process, self.x_in),
            clip_residual=self.clip_residual,
            clip_x0=True,
        )


def complete_prediction(
    outputs: Sequence[Tensor],
    *,
    objective: str,
    levels: Levels,
    x_t: Tensor,
    x_in: Tensor,
    clip_residual: tuple[float, float] | None,
    clip_x0: bool,
) -> Prediction:
    """Residual, noise and x0 from the outputs of a network; the one place that knows what outputs mean.

    outputs: one or two (B, C, H, W) of any float type; x_t, x_in: (B, C, H, W) float32, x_in that of the process.
    `clip_residual` is the range residuals are clamped to (true ones span [-2, 2], the authors clamp to [-1, 1]), None
    for no clamp; `clip_x0` clamps x0 to [-1, 1].
    Noise alone cannot tell x0 where 1 - alpha_cumsum = 0; it is then x_in, and samplers refuse to go there.
    """
    parts = name_outputs(outputs, objective)
    alpha_cumsum, beta_cumsum = levels.alpha_cumsum, levels.beta_cumsum

    def clip(residual: Tensor) -> Tensor:
        return residual if clip_residual is None else residual.clamp(*clip_residual)

    def clip_image(x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if clip_x0 else x0

    if objective == "pred_noise":
        noise = parts["noise"]
        rest = levels.one_minus_alpha_cumsum
        x0 = (x_t - levels.estimate_alpha_cumsum * x_in - beta_cumsum * noise) / torch.where(rest > 0, rest, 1.0)
        x0 = clip_image(torch.where(rest > 0, x0, x_in))
        return Prediction(clip(x_in - x0), noise, x0)
    if objective == "pred_v":
        # A rotation of (x0, noise): x_t = kept x0 + beta_cumsum noise and kept^2 + beta_cumsum^2 = 1.
        kept, velocity = 1 - alpha_cumsum, parts["velocity"]
        x0 = clip_image(kept * x_t - beta_cumsum * velocity)
        return Prediction(clip(x_in - x0), kept * velocity + beta_cumsum * x_t, x0)
    residual = clip(parts["residual"] if "residual" in parts else x_in - parts["x0"])
    if OBJECTIVES[objective] == 1:
        # x_t = x_in + (alpha_cumsum - 1) * residual + beta_cumsum * noise, solved for the noise. A state without noise
        # (beta_cumsum = 0) says nothing about it, and nothing is ever multiplied with it: 0.
        scaled_noise = x_t - x_in - (alpha_cumsum - 1) * residual
        noise = torch.where(beta_cumsum > 0, scaled_noise / beta_cumsum.clamp(min=1e-12), 0.0)
        return Prediction(residual, noise, clip_image(x_in - residual))
    if "noise" in parts:
        noise = parts["noise"]
    elif "residual + noise" in parts:
        noise = parts["residual + noise"] - parts["residual"]
    else:
        noise = parts["x0 + noise"] - parts["x0"]
    x0 = parts["x0"] if "x0" in parts else x_t - alpha_cumsum * residual - beta_cumsum * noise
    return Prediction(residual, noise, clip_image(x0))


def check_objective(objective: str) -> None:
    """Raise ConfigError for an unknown objective, and for auto, which is none before its outcome is known."""
    if objective == "auto":
        raise ConfigError(
            "diffusion.objective=auto has no outcome yet; train until it is selected, or name an objective"
        )
    if objective not in OBJECTIVES:
        raise ConfigError(f"diffusion.objective={objective} is not known; choose one of {', '.join(OBJECTIVES)}")


def used_objective(objective: str, use: str = "all") -> str:
    """The objective by which outputs are read when only `use` of them is: pred_res for the residual of pred_res_noise.

    ConfigError where the network has no such output.
    """
    check_objective(objective)
    if use not in USES:
        raise ConfigError(f"sample.use={use} is not known; choose one of {', '.join(USES)}")
    if use == "all":
        return objective
    if use not in OUTPUTS[objective]:
        allowed = ["all", *(name for name in OUTPUTS[objective] if name in USES)]
        raise ConfigError(
            f"sample.use={use} does not fit diffusion.objective={objective}; choose one of {', '.join(allowed)}"
        )
    return USES[use]


def pick_outputs(outputs: Sequence[Tensor], *, objective: str, use: str = "all") -> Sequence[Tensor]:
    """Of the outputs under `objective` those that `used_objective` reads."""
    return outputs if use == "all" else [name_outputs(outputs, objective)[use]]


def name_outputs(outputs: Sequence[Tensor], objective: str) -> dict[str, Tensor]:
    """The outputs as float32 under the names of OUTPUTS; ConfigError where their number does not fit."""
    check_objective(objective)
    names = OUTPUTS[objective]
    if len(outputs) != len(names):
        raise ConfigError(
            f"diffusion.objective={objective} needs {len(names)} network outputs but the network has {len(outputs)}; "
            f"set model.num_nets={len(names)}"
        )
    return {name: output.float() for name, output in zip(names, outputs, strict=True)}
