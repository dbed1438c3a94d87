"""`rddm pack`: pairs of images into sharded webdataset tars with a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    from data_pipeline.pack import PackResult
    from data_pipeline.sources import Pair


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm pack --input rainy/ --target clean/ --out data/train")(pack)


def pack(
    out: Annotated[str, typer.Option(help="Folder or URL of the new dataset")],
    input: Annotated[Path | None, typer.Option(help="Folder of degraded images")] = None,
    target: Annotated[Path | None, typer.Option(help="Folder of clean images of the same names")] = None,
    mask: Annotated[Path | None, typer.Option(help="Folder of masks of the same names")] = None,
    list: Annotated[Path | None, typer.Option("--list", help="Tab-separated pairs; paths relative to it")] = None,
    split: Annotated[str, typer.Option(help="Rows of the list whose column split has this value")] = "",
    shard_mb: Annotated[float, typer.Option(help="Size of a shard in megabytes", min=0.001)] = 64.0,
    codec: Annotated[str, typer.Option(help="keep (source bytes), png, webp, jpeg, raw")] = "keep",
    seed: Annotated[int, typer.Option(help="Seed of the shuffle")] = 0,
    jobs: Annotated[int, typer.Option(help="Threads; 0: one per core", min=0)] = 0,
) -> int:
    """Pack degraded/clean pairs into shards."""
    from data_pipeline.errors import ConfigError
    from data_pipeline.sources import find_pairs, read_pair_list

    if list is not None:
        pairs = read_pair_list(list, input_root=input, target_root=target, mask_root=mask, split=split or None)
    elif input is not None and target is not None:
        if split:
            raise ConfigError("--split goes with --list")
        pairs = find_pairs(input, target, mask)
    else:
        raise ConfigError("give --input and --target folders, or --list FILE")
    pack_pairs(pairs, out, shard_mb=shard_mb, codec=codec, seed=seed, jobs=jobs)
    return 0


def pack_pairs(pairs: Sequence[Pair], out: str, *, shard_mb: float, codec: str, seed: int, jobs: int) -> PackResult:
    """Pack with a progress bar and say what came of it."""
    from data_pipeline.pack import pack as write_shards

    with ProgressBar("pack", len(pairs)) as bar:
        result = write_shards(
            pairs,
            out,
            shard_mb=shard_mb,
            codec=codec,
            seed=seed,
            jobs=jobs,
            progress=lambda done, total: bar.update(done),
        )
    manifest = result.manifest
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    say(
        f"{'reused' if result.reused else 'packed'} {out}: {manifest.num_samples} pairs in {len(manifest.shards)} "
        f"shard(s), {megabytes:.1f} MB, fingerprint {manifest.fingerprint[:12]}"
    )
    return result
