"""What `rddm evaluate`, `score` and `demo` share: where units run, progress, and what is printed at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rddm_dist.cli.progress import ProgressBar, console, say

if TYPE_CHECKING:
    from rddm_dist.evaluation.evaluate import Execute, Outcome, Plan
    from rddm_dist.evaluation.job import EvalSettings
    from rddm_dist.evaluation.sources import Source
    from rddm_dist.loading import Model

STOPPED = 75


class Evaluation:
    """A model, what it is evaluated on, and where that is computed."""

    def __init__(
        self,
        model: Model,
        source: Source,
        settings: EvalSettings,
        *,
        name: str,
        out: str,
        limit: int = 0,
        num: int = 0,
        keep_images: bool = False,
        pool: tuple[int, int] = (0, 0),
        gpus_per_actor: float = 0.0,
    ) -> None:
        self._model, self._source, self._settings = model, source, settings
        self._name, self._out, self._limit, self._num = name, out, limit, num
        self._keep_images, self._pool, self._gpus_per_actor = keep_images, pool, gpus_per_actor

    def session(self) -> AbstractContextManager[None]:
        """One Ray session for everything that follows."""
        return session_of(self._pool, self._settings.threads)

    def run(self, steps: int) -> tuple[dict[str, Any], Outcome]:
        """Evaluate with so many steps and write the report.   -> the report and what it was made from"""
        report, outcome, _ = self._evaluate(steps, self._out)
        return report, outcome

    def run_curve(self, wanted: list[int]) -> dict[str, Any]:
        """Evaluate with several numbers of steps.

        -> the report that stands for the model, with what failed at any number of steps
        """
        from data_pipeline import storage
        from rddm_dist.evaluation.curve import CURVE_JSON, Point, build_curve, folder_of, main_point
        from rddm_dist.evaluation.report import write_report_files
        from rddm_dist.evaluation.restore import restore_settings
        from rddm_dist.evaluation.writing import write_json

        for steps in wanted:
            restore_settings(self._model.config, steps=steps, eta=self._settings.eta).check(self._model.schedule)
        points, cases = [], {}
        for steps in wanted:
            report, outcome, seconds = self._evaluate(steps, storage.join(self._out, folder_of(steps)))
            points.append(Point(steps, folder_of(steps), report, seconds))
            cases[steps] = outcome.cases
        curve = build_curve(points)
        main = main_point(points, own_steps=self._model.config.sample.steps)
        write_json(storage.join(self._out, CURVE_JSON), curve)
        write_report_files(
            self._out, main.report, command=self.command(",".join(map(str, wanted))), cases=cases[main.steps],
            seconds=main.seconds_per_image, curve=curve,
        )  # fmt: skip
        print_curve(curve)
        failed = [row for point in points for row in point.report["failed"]]
        return {**main.report, "failed": failed}

    def _evaluate(self, steps: int, folder: str) -> tuple[dict[str, Any], Outcome, float | None]:
        from rddm_dist.evaluation.evaluate import plan_features, plan_generation, plan_restoration, seconds_per_image
        from rddm_dist.evaluation.report import write_report_files
        from rddm_dist.evaluation.summary import build_report

        settings = replace(self._settings, steps=steps)
        reference: tuple[Plan, Outcome] | None = None
        if self._num:
            plan = plan_generation(
                self._model, range(self._num), settings, size=self._size(), keep_images=self._keep_images
            )
            reference_plan = plan_features(self._source, settings, limit=self._limit)
            # In the folder of the whole: one reference serves every number of steps.
            reference = (reference_plan, self._work(reference_plan, self._out, "reference"))
        else:
            plan = plan_restoration(
                self._model, self._source, settings, limit=self._limit, keep_images=self._keep_images
            )
        outcome = self._work(plan, folder, f"evaluate, {steps} step(s)")
        report = build_report(plan, outcome, name=self._name, model=self._model, reference=reference)
        prepare_report(folder, report)
        seconds = seconds_per_image(outcome)
        write_report_files(folder, report, command=self.command(str(steps)), cases=outcome.cases, seconds=seconds)
        return report, outcome, seconds

    def _work(self, plan: Plan, folder: str, title: str) -> Outcome:
        return run_with_bar(plan, folder, executor(self._pool, self._gpus_per_actor), title=title)

    def _size(self) -> tuple[int, int]:
        from rddm_dist.evaluation.generate import training_size
        from rddm_dist.evaluation.restore import restore_settings

        restore_settings(self._model.config).check_generating()
        return training_size(self._model.config)

    def command(self, steps: str) -> str:
        """The command that makes these scores again; what --set gave takes the place of --steps and --eta."""
        settings = self._settings
        words = ["rddm", "evaluate", self._model.path, *self._source_words(), "--protocol", settings.protocol]
        keys = {override.partition("=")[0].strip() for override in settings.overrides}
        if "sample.steps" not in keys:
            words += ["--steps", steps]
        if "sample.eta" not in keys:
            words += ["--eta", f"{settings.eta:g}"]
        words += ["--seed", str(settings.seed), "--batch-size", str(settings.batch_size)]
        for flag, value, plain in (
            ("--name", self._name, ""),
            ("--actors", _pool_words(self._pool), "1"),
            ("--gpus-per-actor", f"{self._gpus_per_actor:g}", "0"),
            ("--num", self._num, 0),
            ("--limit", self._limit, 0),
            ("--samples", settings.samples, 1),
            ("--threads", settings.threads, 1),
            ("--precision", settings.precision, "fp32"),
            ("--metrics", ",".join(settings.metrics), ""),
            ("--lpips", settings.lpips, ""),
            ("--features", settings.features, ""),
        ):
            if value != plain:
                words += [flag, str(value)]
        for override in settings.overrides:
            words += ["--set", override]
        return shlex.join(words)

    def _source_words(self) -> list[str]:
        from rddm_dist.evaluation.sources import PackedSource

        return ["--data", self._source.uri] if isinstance(self._source, PackedSource) else shlex.split(self._source.uri)


def _pool_words(pool: tuple[int, int]) -> str:
    least, most = pool
    return str(least) if least == most else f"{least}:{most}"


def choose_device(pool: tuple[int, int], gpus_per_actor: float) -> str:
    """cuda for actors with GPUs, and in this process where there is one."""
    import torch

    from data_pipeline.errors import ConfigError

    if gpus_per_actor and pool == (0, 0):
        raise ConfigError(f"--gpus-per-actor={gpus_per_actor:g} is about actors and --actors=0 has none; leave it out")
    if gpus_per_actor > 1 and gpus_per_actor % 1:
        raise ConfigError(
            f"--gpus-per-actor={gpus_per_actor:g} is not possible; give a whole number, or a fraction below 1"
        )
    return "cuda" if gpus_per_actor or (pool == (0, 0) and torch.cuda.is_available()) else "cpu"


def file_path(path: str) -> str:
    """A local path made absolute, as actors have another current folder."""
    return str(Path(path).resolve()) if path else ""


def find_source(data: str, **given: Any) -> Source:
    """A packed dataset, or the image files that options as those of `rddm pack` name; ConfigError for none or both."""
    from data_pipeline.errors import ConfigError
    from rddm_dist.cli.data import find_samples
    from rddm_dist.evaluation.sources import FileSource, PackedSource

    flags = [flag for flag in ("input", "target", "mask", "list", "root", "clean") if given.get(flag) is not None]
    if data and flags:
        raise ConfigError(f"--data and --{flags[0]} name two sources; give one of them")
    for flag in ("layout", "split"):
        if data and given.get(flag):
            raise ConfigError(f"--{flag}={given[flag]} does not go with --data, which is taken whole")
    if data:
        return PackedSource(data)
    if not flags:
        raise ConfigError("give --data URI, or --input and --target folders, --list FILE or --root FOLDER")
    if "input" in flags and not {"target", "list"} & set(flags):
        raise ConfigError(f"--input={given['input']} needs the clean images of the same names; give --target DIR")
    pairs = find_samples(**{"pair_by": "name", "clean": None, **given})
    words = [word for flag, value in given.items() if value for word in (f"--{flag}", str(value))]
    return FileSource(pairs, uri=shlex.join(words))


def find_clean_source(folder: Path) -> Source:
    """Clean images that generated ones are compared with as a set."""
    from data_pipeline.sources import find_clean
    from rddm_dist.evaluation.sources import FileSource

    return FileSource(find_clean(folder, flag="--target"), uri=shlex.join(["--target", str(folder)]))


def executor(pool: tuple[int, int], gpus_per_actor: float) -> Execute:
    """Where units run: in this process, or on a pool of actors."""
    from rddm_dist.evaluation.runner import run_here

    if pool == (0, 0):
        return run_here
    from cluster.ray_evaluate import run_on_ray

    return partial(run_on_ray, actors=pool, gpus_per_actor=gpus_per_actor)


def session_of(pool: tuple[int, int], threads: int) -> AbstractContextManager[None]:
    if pool == (0, 0):
        return nullcontext()
    from cluster.ray_session import ray_session

    least, most = pool
    say(f"starting Ray and {least if least == most else f'{least} to {most}'} actor(s)")
    return ray_session(cpus=least * threads)


def run_with_bar(plan: Plan, folder: str, execute: Execute, *, title: str) -> Outcome:
    """Run a plan with a progress bar that tells what was there already."""
    from rddm_dist.evaluation.evaluate import run_plan

    with ProgressBar(title, plan.num_images) as bar:
        outcome = run_plan(plan, out=folder, execute=execute, progress=lambda done, _: bar.update(done))
    if outcome.reused:
        say(f"  {outcome.reused} of {plan.num_images} image(s) were evaluated before")
    return outcome


@contextmanager
def stopping_at(folder: str) -> Iterator[None]:
    """Ctrl-C: what is done stays in the folder, and the command ends with exit code 75."""
    try:
        yield
    except KeyboardInterrupt as error:
        say(f"stopped; the same command goes on in {folder}")
        raise typer.Exit(STOPPED) from error


def prepare_report(folder: str, report: Mapping[str, Any]) -> None:
    """Make room for a report: say which one of another kind it takes the place of, and remove the curve of that."""
    import json

    from data_pipeline import storage
    from rddm_dist.evaluation.curve import CURVE_JSON
    from rddm_dist.evaluation.summary import REPORT_JSON

    path = storage.join(folder, REPORT_JSON)
    if not storage.exists(path):
        return
    storage.remove(storage.join(folder, CURVE_JSON))
    try:
        old = json.loads(storage.read_bytes(path))
        was, now = (
            f"{each['name']}, protocol {each['protocol']['name']}, on {each['data']['uri']}" for each in (old, report)
        )
    except (KeyError, TypeError, ValueError):
        was, now = "one of an older format", ""
    if was != now:
        say(f"{path} was another report ({was}) and is replaced; --out takes them apart")


def finish(report: dict[str, Any], folder: str) -> int:
    """Print the scores and what failed.   -> the exit code"""
    from data_pipeline import storage

    print_scores(report)
    for row in report["failed"]:
        print(f"failed: {row['error']}", file=sys.stderr)
    if report["failed"]:
        say(f"{len(report['failed'])} image(s) failed; they are in no score")
    say(f"report: {storage.join(folder, 'index.html')}")
    return 3 if report["failed"] else 0


def print_scores(report: dict[str, Any]) -> None:
    """The mean scores with their intervals as a table."""
    from rich.table import Table
    from rich.text import Text

    from rddm_dist.evaluation.metrics import metric_info

    scores, protocol = report["scores"], report["protocol"]
    table = Table(title=Text(f"{report['name']}: {len(report['images'])} images, protocol {protocol['name']}"))
    has_input = any(name.startswith("input_") for name in scores)
    for column in ("", *(["input"] if has_input else []), "restored", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, value in scores.items():
        if name.startswith("input_"):
            continue
        info = metric_info(name)
        before = scores.get(f"input_{name}", {"mean": None})
        mean, low, high, untouched = (
            "-" if number is None else f"{number:.{info.digits}f}"
            for number in (value["mean"], value["low"], value["high"], before["mean"])
        )
        interval = "" if value["low"] is None else f"{low} to {high}"
        table.add_row(info.label, *([untouched] if has_input else []), f"{mean} {info.unit}".strip(), interval)
    for name, values in report["distribution"].items():
        info = metric_info(name)
        spread = f"+- {values['std']:.{info.digits}f}" if "std" in values else ""
        table.add_row(info.label, *([""] if has_input else []), f"{values['value']:.{info.digits}f}", spread)
    console.print(table)


def print_curve(curve: dict[str, Any]) -> None:
    """Quality against steps and time as a table."""
    from rich.table import Table

    from rddm_dist.evaluation.metrics import metric_info

    points = curve["points"]
    combined = f"mean{curve['samples']}_"
    shown = ("psnr", "ssim", "lpips", f"{combined}psnr", f"{combined}ssim", f"{combined}lpips", "spread")
    names = [name for name in shown if any(name in point["scores"] for point in points)]
    sets = [name for name in ("fid", "kid", "is") if any(name in point["distribution"] for point in points)]
    has_failed = any(point["failed"] for point in points)
    table = Table(title=f"quality against cost, protocol {curve['protocol']['name']}; seconds of one sample")
    labels = [metric_info(name).label for name in [*names, *sets]]
    for column in ("steps", *labels, *(["failed"] if has_failed else []), "s/image"):
        table.add_column(column, justify="right")
    for point in points:
        values = [(name, point["scores"].get(name, {}).get("mean")) for name in names]
        values += [(name, point["distribution"].get(name, {}).get("value")) for name in sets]
        cells = ["-" if value is None else f"{value:.{metric_info(name).digits}f}" for name, value in values]
        seconds = point["seconds_per_image"]
        cells += [str(point["failed"])] if has_failed else []
        table.add_row(str(point["steps"]), *cells, "-" if seconds is None else f"{seconds:.3f}")
    console.print(table)
