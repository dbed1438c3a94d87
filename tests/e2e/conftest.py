"""What the end-to-end tests share: one tiny trained run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.datasets import make_dataset
from tests.support.processes import run_workers
from tests.support.runs import TRAIN, write_config


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
