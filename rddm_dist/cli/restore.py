"""`rddm restore`: run a model over images of any size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rddm_dist.cli.arguments import single_steps
from rddm_dist.cli.evaluate import MODEL_HELP, SET_HELP, SET_METAVAR, sampler_overrides
from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    import numpy as np

    from rddm_dist.evaluation.restore import Restorer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm restore models:/rddm-demo@champion photos/ --out restored/")(restore)


def restore(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, or folders of images")],
    out: Annotated[Path, typer.Option(help="Folder for the restored PNGs")],
    steps: Annotated[str, typer.Option(help="Sampling steps; default: the model's")] = "",
    eta: Annotated[float, typer.Option(help="Stochasticity; below 0: the model's", max=1)] = -1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampler's noise", min=0)] = 0,
    mask: Annotated[Path | None, typer.Option(help="Mask of the image, or folder of masks named alike")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar=SET_METAVAR, help=SET_HELP)] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of models:/ names")] = "",
) -> int:
    """Restore images; exit code 3 when some could not be read."""
    import torch

    from data_pipeline.errors import DataError
    from rddm_dist.evaluation.restore import make_restorer
    from rddm_dist.loading import load_model
    from rddm_dist.model.inputs import check_mask

    jobs = list_images(inputs, out)
    masks = find_masks(jobs, mask, out=out) if mask is not None else {}
    overrides = sampler_overrides(settings, steps=steps, eta=eta)
    loaded = load_model(model, tracking_uri=tracking_uri, overrides=overrides)
    check_mask(loaded.config.model.condition, given=mask is not None)
    restorer = make_restorer(
        loaded,
        steps=single_steps(steps) if steps else None,
        eta=eta if eta >= 0 else None,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    failed: list[str] = []
    with ProgressBar("restore", len(jobs)) as bar:
        for done, (source, target) in enumerate(jobs, start=1):
            try:
                _restore_file(restorer, source, target, masks.get(source))
            except DataError as error:
                failed.append(str(error))
            bar.update(done, source.name)
    say(f"restored {len(jobs) - len(failed)} of {len(jobs)} image(s) into {out}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 3 if failed else 0


def list_images(inputs: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """(source, target) for every image; folders keep their inner structure. DataError when there is nothing to do."""
    from data_pipeline.errors import DataError

    jobs: list[tuple[Path, Path]] = []
    for given in inputs:
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"folder {given} holds no images ({', '.join(SUFFIXES)})")
            jobs += [(path, (out / path.relative_to(given)).with_suffix(".png")) for path in found]
        elif given.is_file():
            jobs.append((given, out / f"{given.stem}.png"))
        else:
            raise DataError(f"input {given} does not exist; give images or folders")
    sources: dict[Path, Path] = {}
    for source, target in jobs:
        if target in sources:
            raise DataError(f"{sources[target]} and {source} would both become {target}; restore them into two folders")
        sources[target] = source
    return jobs


def find_masks(jobs: list[tuple[Path, Path]], mask: Path, *, out: Path) -> dict[Path, Path]:
    """The mask of every image: `mask` itself, or the image in it of the same name, whatever its type.   -> by source

    jobs: (source, target inside `out`). Raises DataError where an image has none, or has several.
    """
    from data_pipeline.errors import DataError

    if mask.is_file():
        if len(jobs) > 1:
            raise DataError(f"--mask {mask} is one image for {len(jobs)}; give a folder of masks named like the images")
        return {jobs[0][0]: mask}
    if not mask.is_dir():
        raise DataError(f"--mask {mask} does not exist; give an image, or a folder of images")
    found: dict[Path, list[Path]] = {}
    for path in sorted(path for path in mask.rglob("*") if path.suffix.lower() in SUFFIXES):
        found.setdefault(path.relative_to(mask).with_suffix(""), []).append(path)
    chosen: dict[Path, Path] = {}
    for source, target in jobs:
        name = target.relative_to(out).with_suffix("")
        masks = found.get(name, [])
        if not masks:
            raise DataError(f"{source} has no mask in {mask}; give it one named {name}.png, as every image needs")
        if len(masks) > 1:
            raise DataError(f"{source} has {len(masks)} masks, {masks[0]} and {masks[1]}; leave one")
        chosen[source] = masks[0]
    return chosen


def _restore_file(restorer: Restorer, source: Path, target: Path, mask: Path | None) -> None:
    """Restore one image; the result is written whole or not at all."""
    from data_pipeline.errors import DataError
    from data_pipeline.rng import stable_id
    from rddm_dist.evaluation.restore import write_png

    image = _read_image(source, channels=3)
    masks = None
    if mask is not None:
        masks = _read_image(mask, channels=1)[None]
        if masks.shape[1:3] != image.shape[:2]:
            sizes = [f"{width}x{height}" for height, width in (masks.shape[1:3], image.shape[:2])]
            raise DataError(f"{source}: its mask {mask} is {sizes[0]}, the image {sizes[1]}; give one of the same size")
    write_png(target, restorer.restore(image[None], [stable_id(source.stem)], masks)[0])


def _read_image(path: Path, *, channels: int) -> np.ndarray:
    """(H, W, channels) uint8; DataError for what cannot be read."""
    from data_pipeline.decode import decode_image
    from data_pipeline.errors import BadSample, DataError

    try:
        return decode_image(path.read_bytes(), path.suffix[1:].lower(), channels=channels)
    except (BadSample, OSError) as error:
        raise DataError(f"{path}: {error}") from error
