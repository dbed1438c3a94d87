"""`rddm demo`: the whole job in one command on real photographs: pack, train, evaluate, register, restore, report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.progress import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from rddm_dist.evaluation.baseline import Baseline
    from rddm_dist.evaluation.cases import Case
    from rddm_dist.loading import Model

CONFIG = "configs/train/demo.yaml"
MODEL_NAME = "rddm-demo"
SHARD_MB = 0.5


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm demo")(demo)


def demo(
    storage: Annotated[str, typer.Option(help="Folder for data, run and registry")] = "runs",
    workers: Annotated[int, typer.Option(help="Training workers", min=1)] = 2,
    actors: Annotated[int, typer.Option(help="Evaluation actors", min=1)] = 2,
    config: Annotated[str, typer.Option(help="Training preset")] = CONFIG,
) -> int:
    """Pack real photographs, train, evaluate, register and report; about five minutes on two cores."""
    started = time.monotonic()
    from cluster.ray_session import ray_session
    from rddm_dist.cli.evaluation import Evaluation
    from rddm_dist.cli.registry import register_model
    from rddm_dist.cli.train import run_overrides, train_here
    from rddm_dist.config import load_config
    from rddm_dist.evaluation.job import EvalSettings
    from rddm_dist.evaluation.sources import PackedSource
    from rddm_dist.loading import load_model
    from rddm_dist.tracking.mlflow_tracker import default_uri

    folder = Path(storage) / "data" / "demo"
    uris = {split: str(folder / split) for split in ("train", "eval")}
    paths = {"data.uri": uris["train"], "data.eval_uri": uris["eval"]}
    overrides = [*run_overrides(storage, "demo"), *(f"{key}={json.dumps(path)}" for key, path in paths.items())]
    resolved = load_config(config, overrides)
    run_dir = Path(resolved.run.storage) / "demo"
    say("1/5 data: photographs from scikit-image, rained on")
    _pack_data(folder / "photos", uris)

    with ray_session(cpus=max(workers, actors)):
        say(f"2/5 training with {workers} workers: the same as rddm train {config} --workers {workers}")
        result = train_here(resolved, workers=workers, gpus_per_worker=0)
        if result.status != "done":
            say("the demo goes on where it stopped: rddm demo")
            return result.exit_code
        say(f"3/5 evaluation on held-out photographs with {actors} actors: rddm evaluate {run_dir}")
        model = load_model(str(run_dir))
        settings = EvalSettings(steps=resolved.sample.steps, eta=resolved.sample.eta, batch_size=1)
        evaluation = Evaluation(
            model, PackedSource(uris["eval"]), settings, name="demo", out=str(run_dir / "report"), keep_images=True,
            pool=(actors, actors),
        )  # fmt: skip
        report, outcome = evaluation.run(resolved.sample.steps)
    say(f"4/5 registry: {MODEL_NAME}")
    registered = register_model(model, name=MODEL_NAME, uri=default_uri(storage), report=report)
    say(f"  {registered.model_uri}: {registered.reason}")
    restored = _restore_through_registry(f"models:/{MODEL_NAME}@champion", default_uri(storage), uris["eval"], run_dir)
    say(f"  loaded back through mlflow.pyfunc; restored {restored}")
    say("5/5 report")
    summary = _write_summary(
        run_dir, model, report, outcome.cases, uris, registered.model_uri, time.monotonic() - started
    )
    say(f"open {summary['report']}")
    print(json.dumps(summary))
    return 0


def _pack_data(photos: Path, uris: dict[str, str]) -> None:
    from data_pipeline.sources import find_pairs
    from rddm_dist.cli.data import pack_pairs
    from rddm_dist.cli.demo_photos import write_demo_pairs

    for split, images in write_demo_pairs(photos).items():
        pairs = find_pairs(images / "input", images / "target")
        pack_pairs(pairs, uris[split], shard_mb=SHARD_MB, codec="keep", seed=0, jobs=0)


def _restore_through_registry(model_uri: str, tracking_uri: str, data: str, run_dir: Path) -> Path:
    """Load the champion as any MLflow user would and restore one held-out image with it."""
    import mlflow
    import numpy as np
    from PIL import Image

    from data_pipeline.reader import Dataset

    mlflow.set_tracking_uri(tracking_uri)
    dataset = Dataset(data)
    sample = dataset.whole(dataset.images()[0])
    assert sample.input is not None, "the demo packs pairs"
    images = mlflow.pyfunc.load_model(model_uri).predict(sample.input[None])
    path = run_dir / "samples" / f"registry-{sample.key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(images[0], dtype=np.uint8)).save(path)
    return path


def _write_summary(
    run_dir: Path,
    model: Model,
    report: dict[str, Any],
    cases: Sequence[Case],
    uris: dict[str, str],
    model_uri: str,
    wall_seconds: float,
) -> dict[str, Any]:
    """The baseline, the HTML report and summary.json."""
    from rddm_dist.evaluation.baseline import choose_baseline
    from rddm_dist.evaluation.demo_report import write_demo_report
    from rddm_dist.tracking.journal import read_journal

    baseline = choose_baseline(_read_pairs(uris["train"]))
    baseline_psnr = _baseline_psnr(baseline, uris["eval"])
    journal = read_journal(run_dir / "metrics.jsonl")
    finished = [record for record in journal if record["event"] == "finished"]
    means = {name: values["mean"] for name, values in report["scores"].items()}
    summary = {
        "input_psnr": means["input_psnr"],
        "baseline_psnr": baseline_psnr,
        "restored_psnr": means["psnr"],
        "gain_db": means["gain_db"],
        "input_ssim": means["input_ssim"],
        "restored_ssim": means["ssim"],
        "images": len(report["images"]),
        "train_steps": model.config.train.steps,
        "train_seconds": sum(record["seconds"] for record in finished),
        "wall_seconds": round(wall_seconds, 1),
        "mlflow_run_id": json.loads((run_dir / "mlflow.json").read_text())["run_id"],
        "model_uri": model_uri,
        "eval_data": uris["eval"],
        "report": str(run_dir / "report" / "index.html"),
    }
    write_demo_report(
        run_dir, summary=summary, report=report, baseline=baseline, journal=journal, model=model, cases=cases
    )
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _read_pairs(uri: str) -> list[tuple[np.ndarray, np.ndarray]]:
    from data_pipeline.reader import Dataset

    dataset = Dataset(uri)
    samples = [dataset.whole(entry) for entry in dataset.images()]
    return [(sample.input, sample.target) for sample in samples if sample.input is not None]


def _baseline_psnr(baseline: Baseline, uri: str) -> float:
    from rddm_dist.evaluation.protocol import PROTOCOLS, score

    values = [score(PROTOCOLS["rgb"], baseline.apply(x), y, metrics=("psnr",))["psnr"] for x, y in _read_pairs(uri)]
    return sum(values) / len(values)
