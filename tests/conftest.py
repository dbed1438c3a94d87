"""Markers by folder, and a machine that behaves the same for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rddm_dist.log import quiet_frameworks

# One thread per process: the tests start several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
quiet_frameworks()

ROOT = Path(__file__).resolve().parents[1]
FOLDER_MARKERS = {"distributed": ("distributed",), "e2e": ("e2e",)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(item.path).relative_to(ROOT / "tests").parts[0]
        for marker in FOLDER_MARKERS.get(folder, ()):
            item.add_marker(marker)


@pytest.fixture
def shared_data() -> Path:
    """Real images beside the checkout; tests that need them are skipped where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real images are not there: {folder.relative_to(ROOT.parent)} beside the checkout")
    return folder
