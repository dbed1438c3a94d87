"""`rddm pack`: images into sharded webdataset tars with a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    from data_pipeline.pack import PackResult
    from data_pipeline.sources import Pair

EPILOG = (
    "Example: rddm pack --input rainy/ --target clean/ --out data/train; rddm pack --root GoPro/ --split train --tile "
    "512 --overlap 32 --out data/gopro; rddm pack --clean photos/ --degrade 'noise(sigma=25)' --out s3://bucket/noisy"
)
STOPPED = 75
SHOWN = 3


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(pack)


def pack(
    out: Annotated[str, typer.Option(help="Folder or URL of the new dataset")],
    input: Annotated[Path | None, typer.Option(help="Folder of degraded images")] = None,
    target: Annotated[Path | None, typer.Option(help="Folder of clean images of the same names")] = None,
    mask: Annotated[Path | None, typer.Option(help="Folder of masks of the same names")] = None,
    pair_by: Annotated[str, typer.Option(help="name; or index: unpaired images, the n-th with the n-th")] = "name",
    list: Annotated[Path | None, typer.Option("--list", help="Tab-separated pairs; paths relative to it")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of a public dataset, as it was downloaded")] = None,
    layout: Annotated[
        str, typer.Option(help="Which dataset --root is (raindrop, gopro, ...); detected if left out")
    ] = "",
    split: Annotated[
        str, typer.Option(help="Part of --root, or rows of --list whose column split has this value")
    ] = "",
    clean: Annotated[Path | None, typer.Option(help="Folder of clean images without degraded ones")] = None,
    degrade: Annotated[str, typer.Option(help='Make the degraded images: "noise(sigma=25)+jpeg(quality=60)"')] = "",
    tile: Annotated[int, typer.Option(help="Cut images into tiles of this many pixels a side; 0: whole", min=0)] = 0,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share at least", min=0)] = 0,
    codec: Annotated[str, typer.Option(help="auto, keep (source bytes), png, webp, jpeg, raw")] = "auto",
    quality: Annotated[int, typer.Option(help="Quality of --codec jpeg, 1 to 100")] = 95,
    shard_mb: Annotated[float, typer.Option(help="Size of a shard in megabytes", min=0.001)] = 64.0,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle and of --degrade")] = 0,
    jobs: Annotated[int, typer.Option(help="Threads, processes or Ray tasks at once; 0: one per core", min=0)] = 0,
    ray: Annotated[
        bool, typer.Option("--ray", help="Work on the Ray cluster of RAY_ADDRESS, else a local one")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be packed and write nothing")] = False,
) -> int:
    """Pack images into shards. The same command continues where it was interrupted."""
    pairs = find_samples(
        input=input,
        target=target,
        mask=mask,
        pair_by=pair_by,
        list=list,
        root=root,
        layout=layout,
        split=split,
        clean=clean,
    )
    options: dict[str, Any] = {
        "codec": codec,
        "quality": quality,
        "degrade": degrade,
        "tile": tile,
        "overlap": overlap,
        "jobs": jobs,
    }
    if dry_run:
        _describe(pairs, out, shard_mb=shard_mb, seed=seed, **options)
        return 0
    pack_pairs(pairs, out, shard_mb=shard_mb, seed=seed, ray=ray, **options)
    return 0


def find_samples(
    *,
    input: Path | None,
    target: Path | None,
    mask: Path | None,
    pair_by: str,
    list: Path | None,
    root: Path | None,
    layout: str,
    split: str,
    clean: Path | None,
) -> Sequence[Pair]:
    """The samples of the one source that the options name. Raises ConfigError for none or several, DataError."""
    from data_pipeline.errors import ConfigError
    from data_pipeline.layouts import find_layout
    from data_pipeline.sources import find_clean, find_pairs, pair_by_index, read_pair_list

    given = [flag for flag, value in (("--list", list), ("--root", root), ("--clean", clean)) if value is not None]
    folders = [
        flag for flag, value in (("--input", input), ("--target", target), ("--mask", mask)) if value is not None
    ]
    if len(given) > 1 or (folders and given and given != ["--list"]):
        raise ConfigError(f"{' and '.join(given + folders)} are different sources; give one of them")
    if split and given not in (["--list"], ["--root"]):
        raise ConfigError(f"--split={split} goes with --list or --root")
    if layout and root is None:
        raise ConfigError(f"--layout={layout} goes with --root")
    if pair_by not in ("name", "index"):
        raise ConfigError(f"--pair-by={pair_by} is not known; choose name or index")
    if pair_by == "index" and folders != ["--input", "--target"]:
        raise ConfigError("--pair-by=index goes with --input and --target folders alone")
    if list is not None:
        return read_pair_list(list, input_root=input, target_root=target, mask_root=mask, split=split or None)
    if root is not None:
        found = find_layout(root, layout)
        say(f"{root}: {found.name}")
        return found.pairs(root, split)
    if clean is not None:
        return find_clean(clean)
    if pair_by == "index" and input is not None and target is not None:
        return pair_by_index(input, target)
    if input is not None and target is not None:
        return find_pairs(input, target, mask)
    raise ConfigError("give --input and --target folders, --list FILE, --root FOLDER or --clean FOLDER")


def pack_pairs(
    pairs: Sequence[Pair],
    out: str,
    *,
    shard_mb: float,
    codec: str,
    seed: int,
    jobs: int,
    ray: bool = False,
    **options: Any,
) -> PackResult:
    """Pack with a progress bar and say what came of it.   options: more of data_pipeline.pack.pack

    Ctrl-C ends the command with exit code 75: what is finished is kept for the same command.
    """
    from data_pipeline.pack import pack as write_shards

    if ray:
        from cluster.ray_pack import ray_tasks

        options["executor"] = ray_tasks(jobs)
        pairs = [_absolute(pair) for pair in pairs]
    try:
        with ProgressBar("pack", len(pairs)) as bar:
            result = write_shards(
                pairs,
                out,
                shard_mb=shard_mb,
                codec=codec,
                seed=seed,
                jobs=jobs,
                progress=lambda done, total: bar.update(done),
                **options,
            )
    except KeyboardInterrupt as error:
        raise typer.Exit(STOPPED) from error
    manifest = result.manifest
    count = f"{manifest.num_samples} {_noun(manifest.fields, manifest.tiling)} in {len(manifest.shards)} shard(s)"
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    say(
        f"{'reused' if result.reused else 'packed'} {out}: {count}, {megabytes:.1f} MB, "
        f"fingerprint {manifest.fingerprint[:12]}"
    )
    return result


def _noun(fields: Sequence[str], tiling: object) -> str:
    """What the samples of a dataset are called."""
    return ("tiles" if tiling else "pairs") if "input" in fields else ("clean tiles" if tiling else "clean images")


def _absolute(pair: Pair) -> Pair:
    """The same files, findable from any folder."""
    files: dict[str, Any] = {field: path.absolute() for field, path in pair.files.items()}
    return replace(pair, **files)


def _describe(pairs: Sequence[Pair], out: str, **options: Any) -> None:
    """Say what a pack would do."""
    from data_pipeline.pack import foresee

    outlook = foresee(pairs, out, **options)
    tiles = f" in {outlook.num_samples} tiles" if options["tile"] else ""
    names = ", ".join(pair.name for pair in pairs[:SHOWN])
    (low_width, high_width), (low_height, high_height) = outlook.widths, outlook.heights
    count = f"{outlook.num_images} {_noun(outlook.fields, None)}{tiles}"
    if outlook.course == "reused":
        say(f"would reuse {out}, which holds these {count}; nothing was written")
    elif outlook.course == "continued":
        say(f"would go on with the interrupted pack of {count} into {out}; nothing was written")
    else:
        say(f"would pack {count} into {out}; nothing was written")
    say(
        f"  fields {', '.join(outlook.fields)}; codec {outlook.codec}; source files {outlook.source_bytes / 1e6:.1f} MB"
    )
    say(f"  {low_width}x{low_height} to {high_width}x{high_height} pixels; first names: {names}")
