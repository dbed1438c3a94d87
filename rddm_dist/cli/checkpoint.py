"""`rddm checkpoint`: models from the authors' trainer files and for others; what runs have saved."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from rddm_dist.cli import checkpoint_state
from rddm_dist.cli.evaluate import MODEL_HELP
from rddm_dist.cli.progress import say

IMPORT_EXAMPLE = (
    "Example: rddm checkpoint import model-100.pt --out models/raindrop --config configs/train/raindrop.yaml"
)
EXPORT_EXAMPLE = "Example: rddm checkpoint export runs/demo --out demo.safetensors; or --out model-1.pt for the authors"


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="What runs have saved; models from the authors' code and for others.", no_args_is_help=True
    )
    group.command("import", epilog=IMPORT_EXAMPLE)(import_command)
    group.command("export", epilog=EXPORT_EXAMPLE)(export_command)
    checkpoint_state.register(group)
    app.add_typer(group, name="checkpoint")


def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Trainer file of the authors, such as model-100.pt")],
    out: Annotated[Path, typer.Option(help="Model folder to write")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="What the file leaves open")
    ] = None,
    config: Annotated[str, typer.Option(help="YAML file of its training; checked against the file")] = "",
    weights: Annotated[str, typer.Option(help="ema: averaged; model: of the last step")] = "ema",
    self_condition: Annotated[
        bool | None, typer.Option(help="Whether one of the network's images is its own estimate; default: no")
    ] = None,
) -> int:
    """Make a model of a trainer file, for evaluate, restore, sample and train.init_from."""
    from rddm_dist.exporting import USED, check_target, write_model_folder
    from rddm_dist.importing import flat, import_published, plain

    given = _given(config, overrides or [])
    check_target(out, layout="folder")
    imported = import_published(file, given=given, self_condition=self_condition, weights=weights)
    result = write_model_folder(out, imported.state, config=imported.config, extra=imported.extra)
    extra = imported.extra
    say(
        f"{'reused' if result.is_reused else 'imported'} {file} into {out}: step {extra['step']}, "
        f"{'averaged weights' if extra['weights'] == 'ema' else 'weights of the last step'}, {extra['lineage']}"
    )
    known = {key: value for key, value in flat(given).items() if key.startswith(USED)}
    found = {key: value for key, value in imported.found.items() if key not in known}
    for source, keys in (("from the file", found), ("as given", known)):
        if keys:
            say(f"{source}: {' '.join(f'{key}={plain(value)}' for key, value in keys.items())}")
    for line in imported.assumed:
        say(f"assumed: {line}")
    return 0


def export_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="FILE.safetensors, a model folder, or FILE.pt in the authors' layout")],
    layout: Annotated[str, typer.Option(help="auto (by the name), folder, safetensors or published")] = "auto",
    lineage: Annotated[str, typer.Option(help="Of FILE.pt: one_optimizer or optimizer_per_net")] = "",
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of models:/ names")] = "",
) -> int:
    """Write a model for others: safetensors with its configuration, or a trainer file of the authors."""
    from rddm_dist.exporting import check_target, choose_layout, export_model
    from rddm_dist.loading import load_model

    check_target(out, layout=choose_layout(out, layout))
    loaded = load_model(model, tracking_uri=tracking_uri)
    result = export_model(loaded, out, layout=layout, lineage=lineage)
    say(f"{'reused' if result.is_reused else 'exported'} {out}: sha256 of the weights {loaded.digest[:12]}")
    if result.lost:
        say(f"not in this layout, give it to rddm checkpoint import: {shlex.join(result.lost)}")
    return 0


def _given(preset: str, overrides: list[str]) -> dict[str, Any]:
    """The keys of a YAML file and of overrides, and no others."""
    from rddm_dist.config import apply_override, load_config

    if preset:
        return load_config(preset, overrides).model_dump(mode="json", exclude_unset=True)
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    return values
