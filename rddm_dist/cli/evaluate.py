"""`rddm evaluate`: score a model on a dataset, on images in folders, or on what it generates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.arguments import count_range, name_list, steps_list
from rddm_dist.cli.evaluation import (
    Evaluation,
    choose_device,
    file_path,
    find_clean_source,
    find_source,
    finish,
    stopping_at,
)

if TYPE_CHECKING:
    from rddm_dist.loading import Model

SET_HELP = "Another sampler setting, such as sample.path=residual_first; repeatable"
SET_METAVAR = "sample.KEY=VALUE"
MODEL_HELP = "Run, model or checkpoint folder, .safetensors file, or models:/name@alias"
PROTOCOL_HELP = "rgb, y, rddm-256, istd, sidd, lol, lol-gtmean or generation, with +borderN and +float"
METRICS_HELP = "More of psnr, ssim, ms_ssim, mae, lab_mae, lpips, fid, kid, is; commas between"
EPILOG = (
    "Example: rddm evaluate runs/demo --data data/eval --actors 1:8 --steps 1,2,5 --samples 4; rddm evaluate "
    "runs/celeba64 --num 50000 --data data/celeba/test --protocol generation --features inception.safetensors"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help="Packed dataset (what rddm pack wrote)")] = "",
    input: Annotated[Path | None, typer.Option(help="In place of it: folder of degraded images")] = None,
    target: Annotated[Path | None, typer.Option(help="Folder of clean images of the same names")] = None,
    mask: Annotated[Path | None, typer.Option(help="Folder of masks of the same names")] = None,
    list: Annotated[Path | None, typer.Option("--list", help="Tab-separated pairs; paths relative to it")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of a public dataset, as it was downloaded")] = None,
    layout: Annotated[str, typer.Option(help="Which dataset --root is; detected if left out")] = "",
    split: Annotated[str, typer.Option(help="Part of --root, or rows of --list of that split")] = "",
    num: Annotated[int, typer.Option(help="Generate so many images and compare them with the data", min=0)] = 0,
    actors: Annotated[str, typer.Option(help="Ray actors: N, or MIN:MAX; 0: in this process, without Ray")] = "1",
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs of each actor; 0.25: four share one", min=0)] = 0.0,
    threads: Annotated[int, typer.Option(help="CPU threads of each actor", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="Of the network: fp32, bf16 or fp16")] = "fp32",
    steps: Annotated[str, typer.Option(help="Sampling steps, or several: 1,2,5,10; default: the model's")] = "",
    samples: Annotated[int, typer.Option(help="Samples of each image; their mean and spread are scored too")] = 1,
    eta: Annotated[float, typer.Option(help="Stochasticity; below 0: the model's", max=1)] = -1.0,
    protocol: Annotated[str, typer.Option(help=PROTOCOL_HELP)] = "rgb",
    metrics: Annotated[str, typer.Option(help=METRICS_HELP)] = "",
    lpips: Annotated[str, typer.Option(help="File of an LPIPS network (rddm features)")] = "",
    features: Annotated[str, typer.Option(help="File of a feature network for fid, kid, is")] = "",
    out: Annotated[str, typer.Option(help="Folder or URL for results and report; default: beside the model")] = "",
    name: Annotated[str, typer.Option(help="What tables call this model; default: its run")] = "",
    limit: Annotated[int, typer.Option(help="Only the first N keys; 0: all", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images of one size per forward", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the sampler's noise", min=0)] = 0,
    save_images: Annotated[bool, typer.Option("--save-images", help="Keep all restored images")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar=SET_METAVAR, help=SET_HELP)] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of models:/ names")] = "",
) -> int:
    """Score a model: report.json, index.html and a table. The same command continues where it was interrupted."""
    from data_pipeline.errors import ConfigError
    from rddm_dist.evaluation.job import EvalSettings
    from rddm_dist.loading import load_model

    pool = count_range(actors, flag="--actors")
    overrides = sampler_overrides(settings, steps=steps, eta=eta)
    loaded = load_model(model, tracking_uri=tracking_uri, overrides=overrides)
    own = loaded.config.sample
    evaluation = EvalSettings(
        protocol=protocol,
        metrics=name_list(metrics),
        steps=own.steps,
        eta=eta if eta >= 0 else own.eta,
        seed=seed,
        samples=samples,
        batch_size=batch_size,
        precision=check_precision(precision),
        threads=threads,
        device=choose_device(pool, gpus_per_actor),
        overrides=overrides,
        lpips=file_path(lpips),
        features=file_path(features),
    )
    if num and samples > 1:
        raise ConfigError(f"--samples={samples} is about images that are restored; with --num raise that")
    if num and target is not None and input is None:
        source = find_clean_source(target)
    else:
        source = find_source(
            data, input=input, target=target, mask=mask, list=list, root=root, layout=layout, split=split
        )
    folder = out or str(default_report_dir(loaded, protocol))
    work = Evaluation(
        loaded, source, evaluation, name=name or model_name(loaded), out=folder, limit=limit, num=num,
        keep_images=save_images, pool=pool, gpus_per_actor=gpus_per_actor,
    )  # fmt: skip
    wanted = steps_list(steps) if steps else [own.steps]
    with stopping_at(folder), work.session():
        report = work.run(wanted[0])[0] if len(wanted) == 1 else work.run_curve(wanted)
    return finish(report, folder)


def check_precision(text: str) -> Any:
    from data_pipeline.errors import ConfigError

    if text not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision={text} is not known; choose fp32, bf16 or fp16")
    return text


def sampler_overrides(given: list[str] | None, *, steps: str, eta: float) -> tuple[str, ...]:
    """The --set options; ConfigError where one sets what --steps or --eta set."""
    from data_pipeline.errors import ConfigError

    keys = {override.partition("=")[0].strip() for override in given or ()}
    for short, is_given in (("steps", bool(steps)), ("eta", eta >= 0)):
        if is_given and f"sample.{short}" in keys:
            raise ConfigError(f"--{short} and --set sample.{short} say the same; give one of them")
    return tuple(given or ())


def default_report_dir(model: Model, protocol: str) -> Path:
    """`<run>/report` for a run, a checkpoint or an export in a local run folder, else `report` here.

    Protocols other than rgb have their name in it, as in `report-y`.
    """
    from data_pipeline import storage
    from rddm_dist.evaluation.protocol import get_protocol

    protocol = get_protocol(protocol).name
    name = "report" if protocol == "rgb" else f"report-{protocol}"
    if not storage.is_local(model.path):
        return Path(name)
    path = Path(model.path)
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, folder.parent.parent):
        if (candidate / "config.yaml").is_file():
            return candidate / name
    return Path(name)


def model_name(model: Model) -> str:
    """What tables call a model: its run, else its file."""
    return model.extra.get("run") or Path(model.path).stem
