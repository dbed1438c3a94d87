"""Generating images from noise alone: image i follows from i, the seed and the sampler, whoever makes it and when."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.decode import decode_image
from data_pipeline.errors import BadSample, ConfigError, DataError, EnvironmentFault
from data_pipeline.rng import MAX_SIDE
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.evaluation.restore import NetSampler, RestoreSettings, restore_settings, to_images, to_levels, write_png
from rddm_dist.evaluation.writing import write_json
from rddm_dist.model.net import Network

if TYPE_CHECKING:
    from rddm_dist.config import Config
    from rddm_dist.loading import Model

FORMAT_VERSION = 1
SETTINGS_FILE, GRID_FILE = "samples.json", "grid.png"
MAX_NUMBER = 10**8 - 1  # file names have eight digits
MAX_GRID_IMAGES = 400

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class GenerateSettings:
    """What an image follows from besides weights and number, and where it is computed.

    overrides: `sample.KEY=VALUE`, changes of the model's own sampler settings (see `loading.override_sampler`);
    threads: of this process, 0 leaves them as they are.
    """

    size: Size
    steps: int
    eta: float
    seed: int = 0
    overrides: tuple[str, ...] = ()
    threads: int = 0
    device: str = "cpu"


class Generator:
    """A network with its schedule and sampler settings, from numbers to 8-bit images of one size."""

    def __init__(
        self,
        net: Network,
        schedule: Schedule,
        settings: RestoreSettings,
        *,
        size: Size,
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        settings.check_generating()
        check_size(size, net.multiple_of)
        self._sampler = NetSampler(net, schedule, settings, device=device, precision=precision)
        self.settings, self.size = settings, size

    def generate(self, numbers: Sequence[int]) -> np.ndarray:
        """Images by number; the number is the id that decides an image's noise.   -> (B, H, W, 3) uint8"""
        return to_images(self._generate(numbers))

    def generate_levels(self, numbers: Sequence[int]) -> np.ndarray:
        """The same, neither rounded nor checked.   -> (B, H, W, 3) float32 in [0, 255]"""
        return to_levels(self._generate(numbers))

    def _generate(self, numbers: Sequence[int]) -> Tensor:
        shape = torch.zeros((len(numbers), 3, *self.size), device=self._sampler.device)
        return self._sampler(shape, numbers)


def check_size(size: Size, multiple: int) -> None:
    """Raise ConfigError for a size in pixels that no image can have, or that the network cannot halve often enough."""
    wrong = [side for side in size if side < 1 or side > MAX_SIDE or side % multiple]
    if wrong:
        near = max(multiple, round(wrong[0] / multiple) * multiple)
        raise ConfigError(
            f"images of {size[0]}x{size[1]} cannot be generated: this network needs sides that are multiples of "
            f"{multiple}, up to {MAX_SIDE}; give --size, for example {min(near, MAX_SIDE)} in place of {wrong[0]}"
        )


def training_size(config: Config) -> Size:
    """Height and width of the images a model was trained on: of the last crop, else of what they were resized to.

    Raises ConfigError where its configuration does not tell.
    """
    crops = config.data.crop_schedule
    side = crops[max(crops)] or config.data.preprocess.resize
    if not side:
        raise ConfigError(
            "this model was trained on whole images, whose size its configuration does not tell; give --size HEIGHTx"
            "WIDTH"
        )
    return side, side


def make_generator(
    model: Model,
    *,
    size: Size | None = None,
    steps: int | None = None,
    eta: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
) -> Generator:
    """A generator for a loaded model; None takes the size of training and the model's own sample.steps and eta."""
    settings = restore_settings(model.config, steps=steps, eta=eta, seed=seed)
    settings.check_generating()
    size = size or training_size(model.config)
    return Generator(model.net, model.schedule, settings, size=size, device=device, precision=precision)


def load_generator(model: str, settings: GenerateSettings) -> Generator:
    """The generator of these settings; `model`: see `rddm_dist.loading.load_model`."""
    from rddm_dist.loading import load_model

    if settings.threads:
        torch.set_num_threads(settings.threads)
    return make_generator(
        load_model(model, overrides=settings.overrides),
        size=settings.size,
        steps=settings.steps,
        eta=settings.eta,
        seed=settings.seed,
        device=settings.device,
    )


def image_path(out: Path, number: int) -> Path:
    return out / f"{number:08d}.png"


def find_written(out: Path, numbers: Iterable[int]) -> set[int]:
    """Those of the numbers whose images are there."""
    return {number for number in numbers if image_path(out, number).is_file()}


def plan_batches(numbers: range, *, batch_size: int, written: set[int]) -> list[range]:
    """Cut the numbers into forward batches and leave out those that are written.

    The cuts are at multiples of batch_size, and a batch with a gap is made again as a whole: what an interrupted
    command writes when it is continued has the bytes it would have had.
    """
    batches = []
    start = numbers.start
    while start < numbers.stop:
        stop = min(numbers.stop, (start // batch_size + 1) * batch_size)
        if not written.issuperset(range(start, stop)):
            batches.append(range(start, stop))
        start = stop
    return batches


def write_batch(generator: Generator, numbers: Sequence[int], *, out: Path) -> list[int]:
    """Generate the images of a batch and write those that are missing.   -> their numbers"""
    missing = set(numbers) - find_written(out, numbers)
    for number, image in zip(numbers, generator.generate(numbers), strict=True):
        if number in missing:
            write_png(image_path(out, number), image)
    return sorted(missing)


def run_here(generator: Generator, batches: Iterable[Sequence[int]], *, out: Path) -> Iterator[list[int]]:
    """Generate batches in this process, one after the other, yielding the numbers that are written."""
    for numbers in batches:
        yield write_batch(generator, numbers, out=out)


def describe(model: Model, settings: GenerateSettings) -> dict[str, Any]:
    """The object of samples.json: everything that the pixels of an image follow from, besides its number."""
    sampler = restore_settings(model.config, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    return {
        "format_version": FORMAT_VERSION,
        "weights_digest": model.digest,
        "size": list(settings.size),
        "sampler": sampler.describe(),
    }


def prepare_folder(out: Path, description: Mapping[str, Any]) -> None:
    """Make the folder and its samples.json, or find that the images in it are of the same settings.

    Raises DataError where they are not, EnvironmentFault for a folder that cannot be written.
    """
    path = out / SETTINGS_FILE
    if path.is_file():
        different = _differences(_read_json(path), json.loads(json.dumps(description)))
        if different:
            raise DataError(
                f"{out} holds images of other settings ({'; '.join(different)}); give those back or choose another "
                "--out"
            )
        return
    if out.is_dir() and any(out.glob(8 * "[0-9]" + ".png")):
        raise DataError(
            f"{out} holds numbered images and no {SETTINGS_FILE} that tells their settings; choose another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, description)
    except OSError as error:
        raise EnvironmentFault(f"--out {out} cannot be written ({error.strerror}); choose another folder") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); choose another --out") from error


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, as `name: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [difference for part in parts for difference in part]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def make_grid(images: np.ndarray) -> Image.Image:
    """Images side by side in rows, as near to a square as they go.   images: (B, H, W, 3) uint8"""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = images
    # (rows * columns, H, W, 3) -> (rows, H, columns, W, 3)
    cells = cells.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(np.ascontiguousarray(cells).reshape(rows * height, columns * width, 3))


def write_grid(out: Path, numbers: range, *, size: Size) -> Path:
    """Put the written images of these numbers, the first MAX_GRID_IMAGES of them, into one picture.   -> its path"""
    images = []
    for number in numbers[:MAX_GRID_IMAGES]:
        path = image_path(out, number)
        try:
            images.append(decode_image(path.read_bytes(), "png", channels=3, shape=size))
        except (BadSample, OSError) as error:
            raise DataError(f"{path}: {error}; delete it and run the same command again") from error
    write_png(out / GRID_FILE, np.asarray(make_grid(np.stack(images))))
    return out / GRID_FILE
