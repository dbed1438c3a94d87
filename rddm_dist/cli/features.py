"""`rddm features`: published weights of feature networks become files that evaluations take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rddm_dist.cli.progress import say

CONVERT_EXAMPLE = (
    "Example: rddm features convert --architecture inception-v3-fid --weights pt_inception-2015-12-05-6726825d.pth "
    "--out inception.safetensors"
)


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Feature networks of FID, KID, IS and LPIPS.", no_args_is_help=True)
    group.callback()(_group)
    group.command("convert", epilog=CONVERT_EXAMPLE)(convert_command)
    app.add_typer(group, name="features")


def convert_command(
    architecture: Annotated[str, typer.Option(help="inception-v3-fid, lpips-alex or lpips-vgg")],
    weights: Annotated[Path, typer.Option(metavar="FILE", help="Published weights, as PyTorch saves them")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="FILE.safetensors to write")],
    heads: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Heads of LPIPS; default: those that torchmetrics carries")
    ] = None,
) -> int:
    """Make a feature network, for rddm evaluate --features or --lpips, of published weights."""
    from rddm_dist.evaluation.features import load_features, load_lpips
    from rddm_dist.evaluation.networks.architectures import ARCHITECTURES, convert

    convert(architecture, weights=weights, out=out, heads=heads or "")
    is_lpips = ARCHITECTURES[architecture].kind == "lpips"
    network = load_lpips(out) if is_lpips else load_features(out)
    flag = "--lpips" if is_lpips else "--features"
    say(f"converted {weights} into {out}: {network.name}, sha256 {network.digest[:12]}; for {flag} {out}")
    return 0


def _group() -> None:
    """A group of one command keeps its name."""
