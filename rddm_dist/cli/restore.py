"""`rddm restore`: run a model over images of any size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rddm_dist.cli.arguments import single_steps
from rddm_dist.cli.evaluate import MODEL_HELP
from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
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
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of models:/ names")] = "",
) -> int:
    """Restore images; exit code 3 when some could not be read."""
    import torch

    from data_pipeline.errors import DataError
    from rddm_dist.evaluation.restore import make_restorer
    from rddm_dist.loading import load_model

    jobs = list_images(inputs, out)
    restorer = make_restorer(
        load_model(model, tracking_uri=tracking_uri),
        steps=single_steps(steps) if steps else None,
        eta=eta if eta >= 0 else None,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    failed: list[str] = []
    with ProgressBar("restore", len(jobs)) as bar:
        for done, (source, target) in enumerate(jobs, start=1):
            try:
                _restore_file(restorer, source, target)
            except DataError as error:
                failed.append(str(error))
            bar.update(done, source.name)
    say(f"restored {len(jobs) - len(failed)} of {len(jobs)} image(s) into {out}")
    for line in failed:
        say(f"failed: {line}")
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


def _restore_file(restorer: Restorer, source: Path, target: Path) -> None:
    """Restore one image; the result is written whole or not at all."""
    from PIL import Image

    from data_pipeline.errors import BadSample, DataError
    from data_pipeline.records import decode_image
    from data_pipeline.rng import stable_id

    try:
        image = decode_image(source.read_bytes(), source.suffix[1:].lower(), channels=3)
    except (BadSample, OSError) as error:
        raise DataError(f"{source}: {error}") from error
    restored = restorer.restore(image[None], [stable_id(source.stem)])[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    try:
        Image.fromarray(restored).save(temporary, format="PNG")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
