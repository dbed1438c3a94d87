"""Samplers: from the degraded image (or noise) to x0, over all timesteps, skipping most of them, or along a path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.path import (
    SIMULTANEOUS,
    TWO_PASS,
    PathChoice,
    follow_path,
    follow_two_pass,
    make_path,
)
from rddm_dist.diffusion.prediction import Estimator, Net, OnStep, Prediction, used_objective
from rddm_dist.diffusion.process import (
    check_process,
    ddpm_alpha_bar,
    levels_at,
    network_times,
    posterior,
)
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.diffusion.selection import SELECTABLE, check_selection
from rddm_dist.diffusion.start import sampling_timesteps, start_state
from rddm_dist.diffusion.update import (
    Jump,
    check_update,
    constrained_variance,
    ddim_step,
    ddim_variance,
    fixed_eta,
    residual_step,
)


def check_sampling(
    schedule: Schedule,
    *,
    objective: str,
    steps: int,
    eta: float = 0.0,
    update: str = "pred_noise",
    process: str = "rddm",
    use: str = "all",
    path: PathChoice = SIMULTANEOUS,
) -> None:
    """Raise ConfigError for settings that cannot be sampled, before any network runs.

    objective=auto must be samplable, and its search possible, whatever its outcome.
    """
    if objective == "auto":
        if use != "all":
            raise ConfigError(
                f"sample.use={use} does not fit diffusion.objective=auto, whose network has one output; set "
                "sample.use=all"
            )
        check_selection(schedule)
        for outcome in SELECTABLE:
            check_sampling(
                schedule,
                objective=outcome,
                steps=steps,
                eta=eta,
                update=update,
                process=process,
                use=use,
                path=path,
            )
        return
    used = used_objective(objective, use)
    check_process(schedule, process)
    if used == "pred_v" and process != "ddpm":
        raise ConfigError(f"diffusion.objective=pred_v does not fit diffusion.process={process}; set it to ddpm")
    timesteps = sampling_timesteps(schedule.num_timesteps, steps, schedule.parity)
    check_update(update, eta)
    if path in (SIMULTANEOUS, TWO_PASS):
        rests = schedule.one_minus_alpha_cumsum.tolist()
        places = [(f"timestep {t}", rests[t]) for t in timesteps]
    else:
        places = [(f"alpha_cumsum {alpha:g}", 1 - alpha) for alpha, _ in make_path(schedule, path, steps=steps)]
    if path != SIMULTANEOUS:
        _check_path_settings(path, used=used, eta=eta, update=update)
    keeps_estimate = not torch.equal(schedule.alpha_cumsum, schedule.estimate_alpha_cumsum)
    if used == "pred_noise" and keeps_estimate and path not in (SIMULTANEOUS, TWO_PASS):
        raise ConfigError(
            f"sample.schedule.keeps_estimate=true does not fit sample.path={path}, whose places are not those of "
            f"training; set it to false, or sample.path={SIMULTANEOUS}"
        )
    blind = [place for place, rest in places if rest <= 0]
    if used == "pred_noise" and blind:
        what = f"diffusion.objective={objective}" if use == "all" else f"sample.use={use}"
        official = " or diffusion.parity=official" if schedule.parity == "clean" else ""
        raise ConfigError(
            f"{what} cannot recover the image from noise alone at {blind[0]}, where 1 - alpha_cumsum is 0; take "
            f"another objective or diffusion.schedule.kind=ddim{official}; where sample.schedule replaces alpha, also "
            "sample.schedule.alpha_kind=same or ddim"
        )


@torch.no_grad()
def sample(
    net: Net,
    schedule: Schedule,
    *,
    objective: str,
    x_in: Tensor,
    steps: int,
    draws: Draws,
    eta: float = 0.0,
    mask: Tensor | None = None,
    update: str = "pred_noise",
    clip_residual: tuple[float, float] | None = (-2.0, 2.0),
    time_input: str = "index",
    generate: bool = False,
    process: str = "rddm",
    self_condition: bool = False,
    use: str = "all",
    path: PathChoice = SIMULTANEOUS,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample x0 given x_in.

    x_in: (B, C, H, W) float32 in [-1, 1]; with generate=True only its shape, type and device count, the degraded image
    being 0; mask: (B, 1 or C, H, W) float32 in [0, 1] or None; draws: the noise of these B samples, step 0 for the
    start, step k for the k-th stochastic step  ->  (B, C, H, W) float32, x0 clamped to [-1, 1].
    steps = T runs the ancestral sampler, which is stochastic and takes neither eta nor update; fewer steps skip.
    process=ddpm samples the baseline: DDPM with steps = T, else DDIM, both with DDIM's eta (sigma proportional to eta)
    and the process, not the network, blind to x_in. A self-conditioned network sees the x0 of the step before, `use`
    names the one output of two that is used alone (see `prediction.USES`). `path`: see `path.make_path`; all but
    simultaneous are deterministic; the network runs `steps` times, 2 * steps for the named other paths, and once for
    each given vertex but the last. `schedule` may differ from the one of training (see `schedule.readjust`).
    """
    check_sampling(
        schedule, objective=objective, steps=steps, eta=eta, update=update, process=process, use=use, path=path
    )
    if generate:
        x_in = torch.zeros_like(x_in)
    estimate = Estimator(
        net,
        objective,
        x_in,
        mask=mask,
        process=process,
        use=use,
        self_condition=self_condition,
        clip_residual=clip_residual,
    )
    start = start_state(schedule, x_in=x_in, noise=draws.noise(x_in.shape), generate=generate, process=process)
    if path == TWO_PASS:
        return follow_two_pass(
            estimate, schedule, start=start, steps=steps, update=update, time_input=time_input, on_step=on_step
        )
    if path != SIMULTANEOUS:
        vertices = make_path(schedule, path, steps=steps)
        return follow_path(estimate, schedule, vertices, start=start, time_input=time_input, on_step=on_step)
    rule = _Rule(is_ancestral=steps == schedule.num_timesteps, eta=eta, update=update)
    return _follow_timesteps(
        estimate, schedule, rule, start=start, steps=steps, draws=draws, time_input=time_input, on_step=on_step
    )


@dataclass(frozen=True)
class _Rule:
    """How a step leads to the next visited timestep."""

    is_ancestral: bool
    eta: float
    update: str


def _follow_timesteps(
    estimate: Estimator,
    schedule: Schedule,
    rule: _Rule,
    *,
    start: Tensor,
    steps: int,
    draws: Draws,
    time_input: str,
    on_step: OnStep | None,
) -> Tensor:
    """Visit `steps` timesteps; the last step takes the estimated x0."""
    alphas, beta2s = schedule.alpha_cumsum.tolist(), schedule.beta2_cumsum.tolist()
    kept = ddpm_alpha_bar(schedule).tolist() if estimate.process == "ddpm" else None
    visited = [*sampling_timesteps(schedule.num_timesteps, steps, schedule.parity), 0]
    x, previous = start, None
    if on_step is not None:
        on_step(0, x, None)
    for k, (t, u) in enumerate(zip(visited, visited[1:], strict=False), start=1):
        t_rows = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        times = network_times(schedule, t_rows, time_input)
        previous = estimate(x, times=times, levels=levels_at(schedule, t_rows), previous=previous)
        jump = Jump((alphas[t], alphas[u]), (beta2s[t], beta2s[u]))
        if u == 0:
            x = previous.x0
        elif kept is not None:
            x = _ddpm_step(x, previous, jump, rule, alpha_bars=(kept[t], kept[u]), draws=draws, step=k)
        elif rule.is_ancestral:
            mean, _, log_variance = posterior(schedule, x_t=x, residual=previous.residual, x0=previous.x0, t=t_rows)
            x = mean + (0.5 * log_variance).exp() * draws.noise(x.shape, step=k)
        else:
            eta = fixed_eta(rule.update, rule.eta)
            noise = draws.noise(x.shape, step=k) if eta > 0 else None
            variance = constrained_variance(jump, eta)
            x = residual_step(x, previous, jump, update=rule.update, variance=variance, noise=noise)
        if on_step is not None:
            on_step(k, x, previous)
    return x


def _ddpm_step(
    x: Tensor,
    prediction: Prediction,
    jump: Jump,
    rule: _Rule,
    *,
    alpha_bars: tuple[float, float],
    draws: Draws,
    step: int,
) -> Tensor:
    """DDIM's step; over all timesteps it is DDPM's, which is DDIM at eta 1 with the noise that fits the clamped x0."""
    eta = 1.0 if rule.is_ancestral else fixed_eta(rule.update, rule.eta)
    return ddim_step(
        x,
        prediction,
        jump,
        rederives_noise=rule.is_ancestral or rule.update == "x0",
        variance=ddim_variance(jump, eta, alpha_bars),
        noise=draws.noise(x.shape, step=step) if eta > 0 else None,
    )


def _check_path_settings(path: PathChoice, *, used: str, eta: float, update: str) -> None:
    """Paths are followed without new noise and know one rule, the authors' two passes know two."""
    if used == "pred_v":
        raise ConfigError(f"diffusion.objective=pred_v does not fit sample.path={path}; set it to {SIMULTANEOUS}")
    if eta != 0:
        raise ConfigError(f"sample.eta={eta} does not fit sample.path={path}; set sample.eta=0")
    allowed = ("pred_noise", "x0") if path == TWO_PASS else ("pred_noise", "eta0")
    if update not in allowed:
        raise ConfigError(f"sample.update={update} does not fit sample.path={path}; choose one of {', '.join(allowed)}")
