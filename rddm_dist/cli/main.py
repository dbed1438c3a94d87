"""Entry point of `rddm`: the command group, and how errors become one line and an exit code."""

from __future__ import annotations

import sys

import typer

from data_pipeline.errors import RddmError
from rddm_dist.cli import (
    checkpoint,
    compare,
    data,
    dataset,
    demo,
    doctor,
    evaluate,
    features,
    index,
    launch,
    registry,
    restore,
    runs,
    sample,
    score,
    train,
)
from rddm_dist.log import configure_console, quiet_frameworks

INTERRUPTED = 130  # what shells make of SIGINT


def _exit_with(code: int | None) -> None:
    """What a command returns is the exit code."""
    raise typer.Exit(code or 0)


app = typer.Typer(
    name="rddm",
    help="Train, evaluate and serve Residual Denoising Diffusion Models (RDDM).",
    epilog="Start with: rddm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    result_callback=_exit_with,
)
COMMANDS = (
    data, index, dataset, train, launch, runs, evaluate, score, compare, features, restore, sample, checkpoint,
    registry, doctor, demo,
)  # fmt: skip
for module in COMMANDS:
    module.register(app)


def main() -> None:
    """Run a command.

    Exit codes: 0 done, 1 fault, 2 bad input, 3 done but some inputs failed, 75 stopped, resumable, 130 interrupted
    (Ctrl-C) with nothing to resume.
    """
    quiet_frameworks()
    configure_console()
    try:
        app()
    except RddmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        # typer ends a command with this code on Ctrl-C, and says nothing.
        if ended.code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
