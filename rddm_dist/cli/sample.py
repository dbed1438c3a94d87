"""`rddm sample`: generate images with a model that makes them from noise alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from rddm_dist.cli.arguments import single_count, single_steps
from rddm_dist.cli.evaluate import MODEL_HELP, SET_HELP, SET_METAVAR, sampler_overrides
from rddm_dist.cli.progress import ProgressBar, say

STOPPED = 75


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm sample runs/celeba64 --num 64 --out samples --grid")(sample)


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    num: Annotated[int, typer.Option(help="Number of images", min=1)],
    out: Annotated[Path, typer.Option(help="Folder for NNNNNNNN.png and samples.json")],
    first: Annotated[int, typer.Option(help="Number of the first image, which decides its noise", min=0)] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="Write grid.png with the images side by side")] = False,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH, or one side; default: that of training")] = "",
    steps: Annotated[str, typer.Option(help="Sampling steps; default: the model's")] = "",
    eta: Annotated[float, typer.Option(help="Stochasticity; below 0: the model's", max=1)] = -1.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward", min=1)] = 16,
    actors: Annotated[str, typer.Option(help="Ray actors; 0: in this process, without Ray")] = "0",
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs of each actor", min=0)] = 0.0,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar=SET_METAVAR, help=SET_HELP)] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of models:/ names")] = "",
) -> int:
    """Generate images from noise; the same command goes on where it stopped."""
    import torch

    from data_pipeline.errors import ConfigError
    from rddm_dist.evaluation import generate
    from rddm_dist.loading import load_model

    count = 0 if actors == "0" else single_count(actors, flag="--actors")
    last = first + num - 1
    if last > generate.MAX_NUMBER:
        raise ConfigError(
            f"image {last} of --first {first} --num {num} passes {generate.MAX_NUMBER}; lower one of them"
        )
    overrides = sampler_overrides(settings, steps=steps, eta=eta)
    loaded = load_model(model, tracking_uri=tracking_uri, overrides=overrides)
    device = "cuda" if gpus_per_actor or (not count and torch.cuda.is_available()) else "cpu"
    generator = generate.make_generator(
        loaded,
        size=parse_size(size) if size else None,
        steps=single_steps(steps) if steps else None,
        eta=eta if eta >= 0 else None,
        seed=seed,
        device="cpu" if count else device,
    )
    wanted = generate.GenerateSettings(
        size=generator.size,
        steps=generator.settings.steps,
        eta=generator.settings.eta,
        seed=seed,
        overrides=overrides,
        device=device,
    )
    generate.prepare_folder(out, generate.describe(loaded, wanted))
    numbers = range(first, first + num)
    kept = generate.find_written(out, numbers)
    batches = generate.plan_batches(numbers, batch_size=batch_size, written=kept)
    if count and batches:
        from cluster.ray_sample import run_on_ray

        say(f"starting Ray and {count} actor(s)")
        results = run_on_ray(loaded.path, batches, wanted, out=out, actors=count, gpus_per_actor=gpus_per_actor)
    else:
        results = generate.run_here(generator, batches, out=out)
    try:
        _follow(results, total=num, done=len(kept))
    except KeyboardInterrupt as error:
        say(f"stopped; the same command goes on in {out}")
        raise typer.Exit(STOPPED) from error
    were_there = f", {len(kept)} were there" if kept else ""
    say(f"{num} image(s) of {wanted.size[0]}x{wanted.size[1]} in {out}{were_there}")
    if grid:
        say(f"grid: {generate.write_grid(out, numbers, size=wanted.size)}")
    return 0


def _follow(results: Iterable[list[int]], *, total: int, done: int) -> None:
    """Wait for all results, with a progress bar."""
    with ProgressBar("sample", total) as bar:
        bar.update(done)
        for made in results:
            done += len(made)
            bar.update(done)


def parse_size(text: str) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH, or the side of a square.   -> (height, width)"""
    from data_pipeline.errors import ConfigError

    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
    if match is None:
        raise ConfigError(f"--size={text} must be HEIGHTxWIDTH or one side in pixels, for example --size 64x96")
    return int(match[1]), int(match[2] or match[1])
