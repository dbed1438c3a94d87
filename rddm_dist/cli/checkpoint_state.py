"""`rddm checkpoint ls`, `verify`, `diff`, `prune` and `ema`: what a run has saved, for those who look after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    from rddm_dist.training.checkpoint import Checkpoint
    from rddm_dist.training.inspection import Entry
    from rddm_dist.training.streaming import Difference

RUN_HELP = "Run folder or its URL"
EITHER_HELP = "Run folder (its newest sound checkpoint) or a checkpoint folder in one; paths or URLs"
SOME_FAILED = 3
DIFFERENT = 3
LARGE_ERROR = 0.01  # of the profile of a rebuilt average


def register(group: typer.Typer) -> None:
    group.command("ls", epilog="Example: rddm checkpoint ls runs/demo")(list_command)
    group.command("verify", epilog="Example: rddm checkpoint verify s3://bucket/runs/demo --newest")(verify_command)
    group.command("diff", epilog="Example: rddm checkpoint diff runs/one runs/two/checkpoints/step-00001000")(
        diff_command
    )
    group.command("prune", epilog="Example: rddm checkpoint prune runs/demo --keep-last 1 --dry-run")(prune_command)
    group.command("ema", epilog="Example: rddm checkpoint ema runs/demo --length 0.08 --out demo-0.08.safetensors")(
        ema_command
    )


# -- ls ----------------------------------------------------------------------------------------------------------------


def list_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table")] = False,
) -> int:
    """List the checkpoints of a run, newest first, and why each is kept."""
    from rddm_dist.training.checkpoint import AVERAGES, CHECKPOINTS
    from rddm_dist.training.inspection import config_of, read_scores_of, run_of, scan
    from rddm_dist.training.retention import retention_of
    from rddm_dist.training.selection import SEARCH_DIR

    home = run_of(run)
    config = config_of(home)
    retention = retention_of(config.train)
    scores = read_scores_of(home, retention.metric)
    checkpoints, search, averages = (scan(home, row) for row in (CHECKPOINTS, SEARCH_DIR, AVERAGES))
    kept = retention.kept([entry.step for entry in checkpoints if entry.checkpoint], scores)
    lines = [_line(entry, kept=kept, scores=scores) for entry in checkpoints]
    if as_json:
        values = {"run": home, "metric": retention.metric, "checkpoints": lines}
        values |= {"averages": [_line(entry) for entry in averages], "search": [_line(entry) for entry in search]}
        print(json.dumps({**values, "lengths": list(config.ema.lengths)}))
        return 0
    if lines:
        _print_table(lines, metric=retention.metric)
    else:
        say(f"run {home} has no checkpoint yet")
    if averages:
        say(f"{_summary(averages)} with averages of lengths {', '.join(f'{each:g}' for each in config.ema.lengths)}")
    if search:
        say(f"{_summary(search)} of the search for the objective")
    return 0


def _line(entry: Entry, *, kept: Mapping[int, str] | None = None, scores: Mapping[int, float] | None = None) -> Any:
    """An entry in plain values."""
    from rddm_dist.tracking.journal import json_safe

    progress = entry.checkpoint.progress if entry.checkpoint else None
    return json_safe(
        {
            "step": entry.step,
            "samples": progress.position if progress else None,
            "time": _when(entry.checkpoint.time) if entry.checkpoint else None,
            "bytes": entry.num_bytes,
            "world_size": progress.world_size if progress else None,
            "zero_stage": progress.zero_stage if progress else None,
            "state": entry.state,
            "problem": entry.problem,
            "kept": (kept or {}).get(entry.step, "") if entry.checkpoint else "",
            "score": (scores or {}).get(entry.step),
            "uri": entry.uri,
        }
    )


def _print_table(lines: list[Any], *, metric: str) -> None:
    """Aligned text, which a narrow or absent terminal does not shorten."""
    rows = [("step", "samples", "size", "workers", "stage", metric, "when", "state", "kept as")]
    for line in lines:
        counts = ["-" if line[key] is None else str(line[key]) for key in ("samples", "world_size", "zero_stage")]
        score = "-" if line["score"] is None else f"{float(line['score']):.6g}"
        rows.append(
            (str(line["step"]), counts[0], _size(line["bytes"]), *counts[1:], score)
            + (line["time"] or "-", line["state"], line["kept"] or "-")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        numbers = [text.rjust(width) for text, width in zip(row[:6], widths, strict=False)]
        words = [text.ljust(width) for text, width in zip(row[6:], widths[6:], strict=True)]
        say("  ".join([*numbers, *words]).rstrip())
    for line in lines:
        if line["state"] in ("damaged", "newer format"):
            say(f"step {line['step']}: {line['problem']}")


def _summary(entries: list[Entry]) -> str:
    steps = [entry.step for entry in entries if entry.checkpoint]
    text = f"{len(steps)} snapshot(s)"
    if steps:
        text += f" from step {steps[-1]} to {steps[0]}, {_size(sum(entry.num_bytes for entry in entries))},"
    others = len(entries) - len(steps)
    return f"{text} and {others} unfinished or damaged," if others else text


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"


# -- verify ------------------------------------------------------------------------------------------------------------


def verify_command(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder or a checkpoint folder in one")],
    newest: Annotated[bool, typer.Option("--newest", help="Of a run, only the newest committed checkpoint")] = False,
) -> int:
    """Read every byte of the committed checkpoints and compare it with what was written.

    Exit codes: 0 all are sound, 3 some of a run are not, 2 the one CHECKPOINT is not.
    """
    from data_pipeline.errors import ConfigError, ModelError
    from rddm_dist.training.checkpoint import CHECKPOINTS
    from rddm_dist.training.inspection import ROWS, look, place_of, scan

    place = place_of(target)
    if newest and place.checkpoint:
        raise ConfigError(f"--newest goes with a run folder, {target} is one checkpoint; leave it out")
    if place.checkpoint:
        [problem] = _verify_all([look(place.checkpoint.rsplit("/", 2)[-2], place.checkpoint)])
        if problem:
            raise ModelError(problem)
        return 0
    found = [entry for row in ([CHECKPOINTS] if newest else ROWS) for entry in scan(place.home, row)]
    entries = [entry for entry in found if entry.state != "unfinished"]
    problems = _verify_all(entries[:1] if newest else entries)
    for entry in found:
        if entry.state == "unfinished" and not newest:
            say(f"{_name(entry)}: unfinished, as if it did not exist")
    num_damaged = sum(map(bool, problems))
    say(f"{len(problems) - num_damaged} of {len(problems)} committed checkpoint(s) of {place.home} are sound")
    return SOME_FAILED if num_damaged else 0


def _verify_all(entries: list[Entry]) -> list[str]:
    """Verify and tell each.   -> "" or the problem of each"""
    from rddm_dist.training.inspection import find_damage

    problems: list[str] = []
    total = sum(len(entry.checkpoint.files) for entry in entries if entry.checkpoint)
    with ProgressBar("files", total) as bar:
        done = 0
        for entry in entries:

            def step() -> None:
                nonlocal done
                done += 1
                bar.update(done)

            problems.append(find_damage(entry, on_file=step))
            say(f"{_name(entry)}: {problems[-1] or 'ok'}")
    return problems


def _name(entry: Entry) -> str:
    return "/".join(entry.uri.rsplit("/", 2)[-2:])


# -- diff --------------------------------------------------------------------------------------------------------------


def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help=EITHER_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, to compare with")],
) -> int:
    """Compare two checkpoints: the scalars that differ, and how far weights, moments and averages are apart.

    Exit codes: 0 all tensors are bit-equal, 3 they differ. Other numbers of workers and stages are no difference.
    """
    from rddm_dist.training.streaming import compare

    one, other = _sound(a), _sound(b)
    say(f"A {one.uri}\nB {other.uri}")
    difference = compare(one, other)
    _print_difference(difference)
    return 0 if difference.is_bit_equal else DIFFERENT


def _sound(given: str) -> Checkpoint:
    """The verified checkpoint that an argument stands for. Raises ModelError where it is damaged or absent."""
    from rddm_dist.training.checkpoint import read_commit, verify
    from rddm_dist.training.inspection import newest_sound, place_of

    place = place_of(given)
    if not place.checkpoint:
        return newest_sound(place.home)
    checkpoint = read_commit(place.checkpoint)
    verify(checkpoint)
    return checkpoint


def _print_difference(difference: Difference) -> None:
    for name, (one, other) in difference.scalars.items():
        say(f"{name:<18} {_plain(one)} | {_plain(other)}")
    for text in difference.alone:
        say(text)
    for kind in difference.kinds:
        if not kind.differing:
            say(f"{kind.kind:<18} bit-equal ({kind.elements:,} elements)")
            continue
        say(
            f"{kind.kind:<18} {kind.differing:,} of {kind.elements:,} elements differ, by up to {kind.largest:.3g} "
            f"({kind.parameter}); relative L2 distance {kind.relative:.3g}"
        )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value[:12]  # of a digest
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item:g}" for key, item in value.items()) or "none"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value.objective or 'undecided'} at weight {value.weight:g} in step {value.step}"  # of the search


# -- prune -------------------------------------------------------------------------------------------------------------


def prune_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    keep_last: Annotated[int | None, typer.Option(help="Newest to keep, 1 or more; default: train.keep_last")] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Keep those of every so many steps; default: train.keep_every", min=0)
    ] = None,
    keep_best: Annotated[int | None, typer.Option(help="Best ones to keep; default: train.keep_best", min=0)] = None,
    metric: Annotated[str, typer.Option(help="What best means; default: train.best_metric")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted and delete nothing")] = False,
) -> int:
    """Delete the checkpoints of a finished or stopped run that need not be kept, and unfinished leftovers.

    The newest sound one is verified first and always stays.
    """
    from rddm_dist.training.inspection import config_of, prune, run_of
    from rddm_dist.training.retention import Retention, retention_of

    home = run_of(run)
    default = retention_of(config_of(home).train)
    retention = Retention(
        default.keep_last if keep_last is None else keep_last,
        default.keep_every if keep_every is None else keep_every,
        default.keep_best if keep_best is None else keep_best,
        _known_metric(metric) or default.metric,
    )
    pruning = prune(home, retention, dry_run=dry_run)
    verb = "would delete" if dry_run else "deleted"
    for note in pruning.notes:
        say(note)
    for entry in pruning.removed:
        said = "" if entry.state == "committed" else f" ({entry.state})"
        say(f"{verb} {_name(entry)}{said}, {_size(entry.num_bytes)}")
    for step, reason in sorted(pruning.kept.items(), reverse=True):
        say(f"kept step {step} ({reason})")
    say(f"{verb} {len(pruning.removed)} checkpoint(s), {pruning.num_bytes:,} bytes")
    return 0


def _known_metric(name: str) -> str:
    from typing import get_args

    from data_pipeline.errors import ConfigError
    from rddm_dist.config import TrainSection

    known = get_args(TrainSection.model_fields["best_metric"].annotation)
    if name and name not in known:
        raise ConfigError(f"--metric {name} is not known; choose one of {', '.join(known)}")
    return name


# -- ema ---------------------------------------------------------------------------------------------------------------


def ema_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    length: Annotated[float, typer.Option(help="Relative length of the average, above 0 and below 0.2887")],
    out: Annotated[Path, typer.Option(help="FILE.safetensors or a model folder")],
    step: Annotated[int, typer.Option(help="Of which step; 0: the newest that is stored", min=0)] = 0,
) -> int:
    """Make a model of the weights averaged over another length, from the averages a run has stored."""
    from rddm_dist.exporting import check_target, choose_layout, export_model
    from rddm_dist.training.inspection import run_of
    from rddm_dist.training.streaming import average_model

    home = run_of(run)
    check_target(out, layout=choose_layout(out))
    with ExitStack() as stack:
        bars: list[ProgressBar] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(ProgressBar("snapshots", total)))
            bars[0].update(done)

        model, rebuilt = average_model(home, length=length, step=step, on_verified=advance)
    result = export_model(model, out)
    say(
        f"{'reused' if result.is_reused else 'wrote'} {out}: average of length {length:g} at step "
        f"{model.extra['step']} from {rebuilt.snapshots} snapshot(s); its profile is off by {100 * rebuilt.error:.2g} %"
    )
    if rebuilt.error > LARGE_ERROR:
        say(
            "that is much: the snapshots are too few, or the length is too far from those that were kept (ema.lengths, "
            "ema.snapshot_every)"
        )
    return 0
