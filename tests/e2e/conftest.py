"""What the end-to-end tests share: the command line in this process, and one tiny trained run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rddm_dist.cli import main as entry
from tests.support.datasets import make_dataset
from tests.support.processes import Finished, run_workers
from tests.support.runs import TRAIN, write_config

Here = Callable[..., Finished]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    """Run the command line in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["rddm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        code = ended.value.code
        assert isinstance(code, int), "a command ends with a number"
        return Finished(code, *capfd.readouterr())

    return call


@dataclass(frozen=True)
class TinyRun:
    """A finished run of ten steps in `folder`: its config, data and run folder."""

    folder: Path
    config: Path
    data: str
    run_dir: Path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    data = make_dataset(folder, count=8, size=(40, 48))
    config = write_config(folder, data)
    [result] = run_workers([*TRAIN, str(config)], 1, cwd=folder)
    assert result.code == 0, result.text
    return TinyRun(folder, config, data, folder / "runs" / "tiny")
