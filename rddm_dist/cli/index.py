"""`rddm index`: tars of pairs that others wrote become a dataset without being rewritten."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from rddm_dist.cli.progress import ProgressBar, say

STOPPED = 75
MEGABYTE = 10**6
EXAMPLE = "Example: rddm index s3://photos/train --input-suffix lq.png --target-suffix gt.png,gt.jpg"


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(index)


def index(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Folder or URL that holds the tars")],
    target_suffix: Annotated[str, typer.Option(help="What follows the name and a dot of clean images; commas: or")],
    input_suffix: Annotated[str, typer.Option(help="The same of degraded images; none: clean images alone")] = "",
    mask_suffix: Annotated[str, typer.Option(help="The same of masks")] = "",
    pattern: Annotated[str, typer.Option(help="Which tars")] = "*.tar",
    skip_incomplete: Annotated[bool, typer.Option("--skip-incomplete", help="Leave out samples not whole")] = False,
    jobs: Annotated[int, typer.Option(help="Threads; 0: one per core", min=0)] = 0,
) -> int:
    """Index an existing webdataset in place: SHARD.idx and manifest.json beside its tars."""
    from data_pipeline.foreign import index_tars

    given = {"input": input_suffix, "target": target_suffix, "mask": mask_suffix}
    suffixes = {field: tuple(text.split(",")) for field, text in given.items() if text or field == "target"}
    with ExitStack() as stack:
        bars: list[ProgressBar] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(ProgressBar("index", -(-total // MEGABYTE))))
            bars[0].update(-(-done // MEGABYTE), "MB")

        try:
            result = index_tars(
                uri, suffixes=suffixes, pattern=pattern, skip_incomplete=skip_incomplete, jobs=jobs, progress=advance
            )
        except KeyboardInterrupt as error:
            stack.close()  # the bar's last words come first
            say("stopped: what is known of the tars read is kept, the same command goes on")
            raise typer.Exit(STOPPED) from error
    manifest = result.manifest
    resumed = f", {result.resumed} shard(s) known from an interrupted run" if result.resumed else ""
    left_out = f", {result.left_out} sample(s) left out" if result.left_out else ""
    say(
        f"{'reused' if result.reused else 'indexed'} {uri}: {manifest.num_samples} samples in {len(manifest.shards)} "
        f"shard(s), fingerprint {manifest.fingerprint[:12]}{left_out}{resumed}"
    )
    return 0
