"""Entry point of `rddm`: the command group, and how errors become one line and an exit code."""

from __future__ import annotations

import sys

import click
import typer

from data_pipeline.errors import RddmError
from rddm_dist.log import quiet_frameworks

app = typer.Typer(
    name="rddm",
    help="Train, evaluate and serve Residual Denoising Diffusion Models (RDDM).",
    epilog="Start with: rddm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _register() -> None:
    from rddm_dist.cli import data, demo, doctor, evaluate, registry, restore, train

    for module in (data, train, evaluate, restore, registry, doctor, demo):
        module.register(app)


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 fault, 2 bad input, 3 done but some inputs failed, 75 stopped, resumable."""
    quiet_frameworks()
    _register()
    try:
        code = app(standalone_mode=False)
    except RddmError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
