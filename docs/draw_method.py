"""Draws the pictures of docs/method.md from the photographs and the model of `rddm demo`.

    rddm demo && python docs/draw_method.py

Photographs come with scikit-image; the model is runs/demo, scored on 256-pixel crops of the held-out photographs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.reader import Dataset
from data_pipeline.rng import Draws, stable_id
from rddm_dist.diffusion.path import make_path
from rddm_dist.diffusion.process import q_sample
from rddm_dist.diffusion.sampler import sample
from rddm_dist.diffusion.schedule import Schedule, make_schedule
from rddm_dist.evaluation.protocol import PROTOCOLS, score
from rddm_dist.evaluation.restore import load_restorer
from rddm_dist.loading import load_model

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CROP = 256
PICTURE = 1  # of the held-out photographs, which one is shown
PICTURES = ("forward.jpg", "schedules.png", "sampling.jpg", "paths.jpg", "steps.png")
STEPS = (1, 2, 3, 5, 10, 20, 50)
DPI = 110


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = read_crops(options.data)
    key, degraded, target = pairs[PICTURE]
    x_in, x0 = to_tensor(degraded), to_tensor(target)
    draws = Draws(0, torch.tensor([stable_id(key)]), "cpu")
    jobs: dict[str, Callable[[], None]] = {
        "forward.jpg": lambda: draw_forward(x_in, x0, draws),
        "schedules.png": draw_schedules,
        "sampling.jpg": lambda: draw_sampling(options.model, x_in, draws),
        "paths.jpg": lambda: draw_paths(x_in, x0, draws),
        "steps.png": lambda: draw_steps(options.model, pairs),
    }
    for name in options.only or PICTURES:
        jobs[name]()
        path = options.out / name
        plt.savefig(path, dpi=DPI, bbox_inches="tight")
        plt.close("all")
        print(path, flush=True)


def draw_forward(x_in: Tensor, x0: Tensor, draws: Draws) -> None:
    """x_t over time: with the residual alone, with the noise alone, with both."""
    schedule, noise = make_schedule(), draws.noise(x0.shape)
    moments = (0, 200, 400, 600, 800, 1000)
    rows = {
        "residual only": (x_in - x0, torch.zeros_like(noise)),
        "noise only": (torch.zeros_like(x0), noise),
        "both: RDDM": (x_in - x0, noise),
    }
    _, axes = plt.subplots(len(rows), len(moments), figsize=(11, 5.8))
    for line, (name, (residual, part)) in zip(axes, rows.items(), strict=True):
        for axis, t in zip(line, moments, strict=True):
            state = q_sample(schedule, x0=x0, residual=residual, noise=part, t=torch.tensor([t]))
            show(axis, state, f"t = {t}")
        line[0].set_ylabel(name)
    plt.tight_layout()


def draw_schedules() -> None:
    """alpha_cumsum and beta_cumsum^2 over t."""
    kinds = {
        "linear (restoration)": {},
        "power, P(1-x, 0.3) and P(x, 3)": {"kind": "power", "alpha_power": 0.3, "beta2_power": 3.0},
        "average": {"alpha": "average", "beta2": "average"},
        "converted from DDPM": {"kind": "ddim"},
    }
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    for name, settings in kinds.items():
        schedule = make_schedule(**settings)  # type: ignore[arg-type]
        left.plot(schedule.alpha_cumsum, label=name)
        right.plot(schedule.beta2_cumsum)
    left.set(title="alpha_cumsum: how much residual", xlabel="t")
    right.set(title="beta_cumsum^2: how much noise, sum_scale = 1", xlabel="t")
    left.legend()


def draw_sampling(model: str, x_in: Tensor, draws: Draws) -> None:
    """The states of a sampler of five steps, and what the network takes for x0 at each."""
    loaded = load_model(model)
    diffusion = loaded.config.diffusion
    states: list[Tensor] = []
    estimates: list[Tensor] = []

    def keep(k: int, state: Tensor, prediction: object) -> None:
        states.append(state)
        if prediction is not None:
            estimates.append(prediction.x0)  # type: ignore[attr-defined]

    sample(
        loaded.net, loaded.schedule, objective=diffusion.objective, x_in=x_in, steps=5, draws=draws, on_step=keep,
        clip_residual=diffusion.residual_clip,
    )  # fmt: skip
    _, axes = plt.subplots(2, len(states), figsize=(11, 4))
    axes[1][0].axis("off")
    for k, state in enumerate(states):
        show(axes[0][k], state, "start" if k == 0 else f"after step {k}")
    for k, estimate in enumerate(estimates, start=1):
        show(axes[1][k], estimate, f"x0 as seen at step {k}")
    plt.tight_layout()


def draw_paths(x_in: Tensor, x0: Tensor, draws: Draws) -> None:
    """Three ways from the start to x0: in the plane of the two clocks, and as states, with a network that knows x0."""
    schedule = make_schedule(sum_scale=0.25)
    names = ("simultaneous", "residual_first", "noise_first")
    figure = plt.figure(figsize=(11, 5.6))
    grid = figure.add_gridspec(len(names), 7)
    plane = figure.add_subplot(grid[:, :3])
    for row, name in enumerate(names):
        vertices = make_path(schedule, name, steps=4)
        plane.plot(*zip(*vertices, strict=True), marker="o", label=name)
        states = follow(schedule, name, x_in=x_in, x0=x0, draws=draws)
        picked = [states[round(part * (len(states) - 1))] for part in (0, 1 / 3, 2 / 3, 1)]
        for column, state in enumerate(picked):
            axis = figure.add_subplot(grid[row, 3 + column])
            show(axis, state, "")
            if column == 0:
                axis.set_ylabel(name)
    plane.set(xlabel="alpha_cumsum: residual left", ylabel="beta_cumsum: noise left")
    plane.legend()
    plt.tight_layout()


def follow(schedule: Schedule, path: str, *, x_in: Tensor, x0: Tensor, draws: Draws) -> list[Tensor]:
    """The states along a path with a network that knows residual and noise."""
    noise = draws.noise(x0.shape)

    def oracle(*_: object) -> Sequence[Tensor]:
        return x_in - x0, noise

    states: list[Tensor] = []
    sample(
        oracle, schedule, objective="pred_res_noise", x_in=x_in, steps=4, draws=draws, path=path,
        time_input="clocks", on_step=lambda k, state, prediction: states.append(state),
    )  # fmt: skip
    return states


def draw_steps(model: str, pairs: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Mean PSNR over the number of sampling steps."""
    means = []
    for steps in STEPS:
        restorer = load_restorer(model, steps=steps)
        values = []
        for key, degraded, target in pairs:
            restored = restorer.restore(degraded[None], [stable_id(key)])[0]
            values.append(score(PROTOCOLS["rgb"], restored, target, metrics=("psnr",))["psnr"])
        means.append(float(np.mean(values)))
        print(f"{steps:3d} steps: {means[-1]:.2f} dB", flush=True)
    _, axis = plt.subplots(figsize=(6.5, 3.2))
    axis.semilogx(STEPS, means, marker="o")
    axis.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axis.minorticks_off()
    axis.set(xlabel="sampling steps (network evaluations)", ylabel="PSNR, dB")


def show(axis: plt.Axes, state: Tensor, title: str) -> None:
    """A state as a picture; values outside [-1, 1] are cut off.   state: (1, 3, H, W)"""
    axis.imshow(((state[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_crops(uri: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The centres of a dataset's images: (key, input, target), (CROP, CROP, 3) uint8 each."""
    dataset = Dataset(uri)
    crops = []
    for entry in dataset.images():
        found = dataset.whole(entry)
        assert found.input is not None, "the demo packs pairs"
        top, left = ((side - CROP) // 2 for side in found.target.shape[:2])
        window = (slice(top, top + CROP), slice(left, left + CROP))
        crops.append((found.key, found.input[window], found.target[window]))
    return crops


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", help="trained model (runs/demo)")
    parser.add_argument("--data", default="runs/data/demo/eval", help="packed pairs (runs/data/demo/eval)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", help="folder of the pictures")
    parser.add_argument("--only", nargs="+", choices=PICTURES, help="only these pictures")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
