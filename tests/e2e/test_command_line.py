"""The command line as such: quick to answer, an example on every page, an honest doctor."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rddm_dist.cli.main import app
from tests.support.processes import rddm, run

COMMANDS = [
    "pack",
    "index",
    "data show",
    "data stats",
    "train",
    "evaluate",
    "score",
    "compare",
    "features convert",
    "restore",
    "sample",
    "checkpoint import",
    "checkpoint export",
    "checkpoint ls",
    "checkpoint verify",
    "checkpoint diff",
    "checkpoint prune",
    "checkpoint ema",
    "register",
    "doctor data",
    "doctor cluster",
    "launch",
    "status",
    "logs",
    "stop",
    "demo",
]


def test_these_are_all_the_commands() -> None:
    found = []
    for prefix, group in (("", app), *((f"{info.name} ", info.typer_instance) for info in app.registered_groups)):
        assert group is not None
        found += [prefix + (info.name or info.callback.__name__) for info in group.registered_commands if info.callback]
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(command: str, tmp_path: Path) -> None:
    result = rddm(*command.split(), "--help", cwd=tmp_path)
    assert result.code == 0
    assert f"Example: rddm {command}" in re.sub(r"\s+", " ", result.stdout)
    assert len(result.stdout.splitlines()) <= 50


def test_help_waits_for_no_heavy_import(tmp_path: Path) -> None:
    script = (
        "import sys, rddm_dist.cli.main\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)))"
    )
    result = run([sys.executable, "-c", script], cwd=tmp_path)
    assert result.stdout.strip() == "[]", result.text


def test_the_doctor_finds_this_machine_fit_and_a_missing_compiler(tmp_path: Path) -> None:
    fit = rddm("doctor", cwd=tmp_path)
    assert fit.code == 0 and "ready to train" in fit.stdout, fit.text
    for name in ("torch", "deepspeed", "ray", "C++ compiler", "/dev/shm"):
        assert name in fit.stdout
    unfit = rddm("doctor", cwd=tmp_path, env={"CXX": "no-such-compiler"})
    assert unfit.code == 2 and "1 thing(s) to fix" in unfit.stdout and "apt-get install g++" in unfit.stdout
