"""An evaluation to measure with: a model, images of mixed sizes, and four ways to score what it makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import EnvironmentFault
from data_pipeline.rng import Draws, stable_id
from data_pipeline.sources import Pair, find_pairs
from rddm_dist.config import Config
from rddm_dist.diffusion.sampler import sample
from rddm_dist.evaluation.evaluate import Execute, Plan, plan_restoration, run_plan
from rddm_dist.evaluation.job import EvalSettings
from rddm_dist.evaluation.protocol import score
from rddm_dist.evaluation.restore import make_restorer, pad_to_multiple, restore_settings, round_levels
from rddm_dist.evaluation.sources import FileSource
from rddm_dist.factory import make_net
from rddm_dist.loading import Model, load_model
from rddm_dist.model.weights import save_safetensors
from support.images import Photos, repeat_pairs, write_pairs

SEED = 0
DIM_MULTS = (1, 2, 4)
MODEL, IMAGES = "model.safetensors", "images"
TOLERANCE_DB = 1e-3  # between ways that do not compute the same batches


@dataclass(frozen=True)
class Work:
    """What is evaluated.   scratch: folder for results, which are removed"""

    model: Model
    plan: Plan
    source: FileSource
    scratch: Path


@dataclass(frozen=True)
class Run:
    """One evaluation.   per_s: images a second, as its clock counts them; psnr: of every key"""

    per_s: float
    psnr: Mapping[str, float]


class Clock:
    """The time of every result, each with the images that are done then.

    skip: results before the clock starts, one for each process that works, as all of them start and warm up.
    """

    def __init__(self, skip: int = 1) -> None:
        self._skip = skip
        self._stamps: list[tuple[float, int]] = []

    def __call__(self, done: int, _: int = 0) -> None:
        if done:
            self._stamps.append((perf_counter(), done))

    @property
    def per_s(self) -> float:
        """Images a second between the last result that is skipped and the last of all."""
        (begun, before), (ended, after) = self._stamps[self._skip - 1], self._stamps[-1]
        return (after - before) / (ended - begun)

    @property
    def first(self) -> float:
        """When the first result was there, as of perf_counter."""
        return self._stamps[0][0]


def write_model(folder: Path, *, dim: int) -> None:
    """A network of one U-Net with random weights, as folder/model.safetensors."""
    config = Config.model_validate(
        {
            "model": {"dim": dim, "dim_mults": list(DIM_MULTS), "num_nets": 1},
            "diffusion": {"objective": "pred_res", "num_timesteps": 1000, "sum_scale": 0.01},
        }
    )
    torch.manual_seed(SEED)
    save_safetensors(folder / MODEL, make_net(config).state_dict(), config=config.model_dump(mode="json"))


def write_images(folder: Path, photos: Photos, *, sizes: Sequence[tuple[int, int]], per_size: int) -> None:
    """PNG pairs below folder/images, `per_size` of each (H, W)."""
    for height, width in sizes:
        own = folder / IMAGES / f"{height}x{width}"
        write_pairs(own, photos, extension="png", size=(height, width), count=per_size)


def find_images(folder: Path, *, count: int = 0) -> list[Pair]:
    """The pairs below folder/images under keys of their own; repeated under further ones until there are `count`."""
    groups = sorted((folder / IMAGES).iterdir())
    pairs = [pair for group in groups for pair in find_pairs(group / "input", group / "target")]
    return repeat_pairs(pairs, count or len(pairs))


def plan_work(folder: Path, pairs: Sequence[Pair], *, batch_size: int, steps: int, scratch: Path) -> Work:
    """What `rddm evaluate` does before anything is computed: load the model, plan the units. One thread each."""
    model = load_model(str(folder / MODEL))
    source = FileSource(pairs, uri="benchmark")
    settings = EvalSettings(batch_size=batch_size, steps=steps, threads=1, seed=SEED)
    return Work(model, plan_restoration(model, source, settings), source, scratch)


def evaluate(work: Work, execute: Execute, *, processes: int = 1) -> Run:
    """The whole evaluation but the report: units read, restored, scored, stored and collected."""
    clock = Clock(processes)
    with tempfile.TemporaryDirectory(dir=work.scratch) as out:
        outcome = run_plan(work.plan, out=out, execute=execute, progress=clock)
    return Run(clock.per_s, {row["key"]: row["psnr"] for row in outcome.rows})


def loop_batches(work: Work) -> Run:
    """The same batches through the same folded network and the same scores in a plain loop; nothing is stored."""
    settings, protocol = work.plan.job.settings, work.plan.job.protocol
    restorer = make_restorer(work.model, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    psnr: dict[str, float] = {}
    clock = Clock()
    for unit in reversed(work.plan.units):  # the largest first, as an evaluation goes
        images = [work.source.read(entry) for entry in unit.entries]
        inputs = [image.input for image in images if image.input is not None]
        levels = restorer.restore_levels(np.stack(inputs), [stable_id(image.key) for image in images])
        for image, degraded, restored in zip(images, inputs, levels, strict=True):
            score(protocol, degraded, image.target)
            psnr[image.key] = score(protocol, round_levels(restored), image.target)["psnr"]
        clock(len(psnr))
    return Run(clock.per_s, psnr)


def loop_images(work: Work) -> Run:
    """What one writes first: image by image, read, padded, sampled with the network as trained, the same scores."""
    settings, protocol, model = work.plan.job.settings, work.plan.job.protocol, work.model
    options = restore_settings(model.config, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    psnr: dict[str, float] = {}
    clock = Clock()
    for unit in reversed(work.plan.units):  # the largest first, as an evaluation goes
        for entry in unit.entries:
            degraded, target = (
                np.asarray(Image.open(entry.files[side]).convert("RGB")) for side in ("input", "target")
            )
            x_in = torch.tensor(degraded).permute(2, 0, 1)[None].float() / 127.5 - 1.0
            x0 = sample(
                model.net,
                model.schedule,
                objective=options.objective,
                x_in=pad_to_multiple(x_in, model.net.multiple_of),
                steps=options.steps,
                draws=Draws(options.seed, torch.tensor([stable_id(entry.key)])),
                eta=options.eta,
                update=options.update,
                clip_residual=options.clip_residual,
                time_input=options.time_input,
            )
            restored = (x0[0, :, : target.shape[0], : target.shape[1]] + 1.0) * 127.5
            pixels = restored.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            score(protocol, degraded, target)
            psnr[entry.key] = score(protocol, pixels, target)["psnr"]
        clock(len(psnr))
    return Run(clock.per_s, psnr)


def loop_images_apart(folder: Path, *, batch_size: int, steps: int) -> Run:
    """`loop_images` in a process of its own, whose memory and threads nothing else has set up."""
    torch.set_num_threads(1)
    return loop_images(plan_work(folder, find_images(folder), batch_size=batch_size, steps=steps, scratch=folder))


def check_agreement(name: str, run: Run, reference: Run) -> None:
    """Raise EnvironmentFault where two ways do not come to the same scores."""
    if run.psnr.keys() != reference.psnr.keys():
        raise EnvironmentFault(f"{name} scored other images than the plain loop; there is nothing to compare")
    worst = max(abs(value - reference.psnr[key]) for key, value in run.psnr.items())
    if not worst <= TOLERANCE_DB:
        raise EnvironmentFault(f"the PSNR of {name} is up to {worst:.4f} dB from the plain loop's; it must agree")


Arm = Callable[[], Run]


def measure_rounds(arms: Mapping[str, Arm], *, rounds: int, tell: Callable[[int], None]) -> dict[str, list[float]]:
    """Images a second of every arm in each round, in an order that turns; round 0 warms up and is left out.

    In every round all arms must come to the scores of the first one. tell: takes the rounds done.
    """
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds + 1):
        turn = number % len(names)
        runs = {name: arms[name]() for name in names[turn:] + names[:turn]}
        for name, run in runs.items():
            check_agreement(name, run, runs[names[0]])
            if number:
                speeds[name].append(run.per_s)
        tell(number + 1)
    return speeds
