"""`rddm data`: look at a packed dataset, as pictures or as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from data_pipeline.statistics import SampleFacts

URI_HELP = "Folder or URL of a packed dataset"
STATS_SAMPLES = 200
SIZES_SHOWN = 3


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        help="Look at a dataset: a contact sheet, statistics.",
        epilog="Example: rddm data show data/train",
    )
    group.command(epilog="Example: rddm data show data/train --num 8 --out sheet.png")(show)
    group.command(epilog="Example: rddm data stats s3://bucket/train --full")(stats)
    app.add_typer(group, name="data")


def show(
    uri: Annotated[str, typer.Argument(metavar="URI", help=URI_HELP)],
    num: Annotated[int, typer.Option(help="Samples to show", min=1, max=100)] = 8,
    out: Annotated[str, typer.Option(help="PNG to write")] = "sheet.png",
    seed: Annotated[int, typer.Option(help="Which samples")] = 0,
) -> int:
    """Write a contact sheet: input, target, their difference and mask of a few samples."""
    from data_pipeline.contact import contact_sheet, encode_sheet
    from data_pipeline.reader import Dataset
    from data_pipeline.statistics import draw_places, read_sample

    check_output(out)
    dataset = Dataset(uri)
    samples = [read_sample(dataset, place) for place in draw_places(dataset, num, seed=seed)]
    title = f"{len(samples)} of {dataset.manifest.num_samples} samples of {uri}, seed {seed}"
    write_output(out, encode_sheet(contact_sheet(samples, title=title)))
    say(f"{len(samples)} sample(s): {out}")
    return 0


def stats(
    uri: Annotated[str, typer.Argument(metavar="URI", help=URI_HELP)],
    full: Annotated[bool, typer.Option("--full", help=f"All samples, not {STATS_SAMPLES} of them")] = False,
    seed: Annotated[int, typer.Option(help="Which samples, without --full")] = 0,
    jobs: Annotated[int, typer.Option(help="Threads; 0: one per core", min=0)] = 0,
) -> int:
    """Say what a dataset holds: counts, sizes, brightness, residual, PSNR of the inputs."""
    from data_pipeline.reader import Dataset
    from data_pipeline.statistics import collect_facts

    dataset = Dataset(uri)
    num = dataset.manifest.num_samples if full else min(STATS_SAMPLES, dataset.manifest.num_samples)
    facts = []
    with ProgressBar("read", num) as bar:
        for fact in collect_facts(dataset, num, seed=seed, jobs=jobs):
            facts.append(fact)
            bar.update(len(facts))
    _print_manifest(dataset.manifest)
    _print_facts(facts, num_samples=dataset.manifest.num_samples)
    return 0


def check_output(out: str) -> None:
    """Find out, before any work, whether --out can be written; nothing stays behind.

    Raises ConfigError for what names no file of a folder there is or lies on a server that takes none,
    EnvironmentFault where a file beside it cannot be written.
    """
    from data_pipeline.errors import ConfigError
    from data_pipeline.storage import READ_ONLY, is_local, local_path, remove

    if is_local(out):
        path = local_path(out)
        if path.is_dir():
            raise ConfigError(f"--out {out} is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise ConfigError(f"--out {out}: there is no folder {path.parent}; make it or give another file")
    elif out.partition("://")[0] in READ_ONLY:
        raise ConfigError(f"--out {out} cannot be written, servers of http take no files; give a file or an s3:// URL")
    probe = f"{out}.probe"
    _write(out, probe, b"")
    remove(probe)


def write_output(out: str, content: bytes) -> None:
    """Write a file, whole or not at all. Raises EnvironmentFault where that does not go."""
    _write(out, out, content)


def _write(out: str, place: str, content: bytes) -> None:
    from data_pipeline.errors import EnvironmentFault
    from data_pipeline.storage import write_bytes_atomic

    try:
        write_bytes_atomic(place, content)
    except OSError as error:
        raise EnvironmentFault(
            f"--out {out} cannot be written: {error.strerror or error}; give a file in a folder of your own"
        ) from error


def _print_manifest(manifest: Manifest) -> None:
    tiling = manifest.tiling
    megabytes = sum(manifest.shards.column("bytes")) / 1e6
    lines = {
        "pairs" if manifest.has_input else "images": f"{manifest.num_samples:,}",
        "shards": f"{len(manifest.shards):,}, {megabytes:,.1f} MB, codec {manifest.codec}",
        "fields": ", ".join(manifest.fields),
        "sizes": manifest.describe_sizes(),
        "tiling": "none" if tiling is None else f"{tiling.size} px with {tiling.overlap} px overlap",
        "fingerprint": manifest.fingerprint[:12],
    }
    for name, value in lines.items():
        say(f"{name:<22} {value}")


def _print_facts(facts: list[SampleFacts], *, num_samples: int) -> None:
    from data_pipeline.statistics import Spread, columns, common_sizes

    sizes = common_sizes(facts)
    named = ", ".join(f"{size} ({count})" for size, count in sizes[:SIZES_SHOWN])
    more = f" and {len(sizes) - SIZES_SHOWN} more" if len(sizes) > SIZES_SHOWN else ""
    say(f"\nof {len(facts):,} of {num_samples:,} samples: {named}{more}")
    say(f"{'':<22} {'mean':>10} {'lowest':>10} {'highest':>10}")
    for column in columns(facts):
        spread = Spread.of(column.values)
        if spread is not None:
            left_out = len(column.values) - spread.count
            unit = f" {column.unit}" if column.unit else ""
            note = f"  ({left_out} identical pair(s) left out)" if left_out else ""
            numbers = f"{spread.mean:>10,.2f} {spread.low:>10,.2f} {spread.high:>10,.2f}"
            say(f"{column.name:<22} {numbers}{unit}{note}")
        else:
            say(f"{column.name:<22} every input equals its target")
