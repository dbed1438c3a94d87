"""What README and docs name is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(
    r"(?<![\w/.-])((?:configs|tests|benchmarks|docs|cluster|rddm_dist|data_pipeline)/[\w./-]+\.(?:py|yaml|md))"
)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_and_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in LINK.findall(text)]
    files = [ROOT / name for name in FILE.findall(text)]
    assert [path for path in links + files if not path.exists()] == []


def test_the_page_of_cluster_keys_is_up_to_date() -> None:
    """Write it anew: python docs/cluster_keys.py"""
    script = runpy.run_path(str(ROOT / "docs" / "cluster_keys.py"))
    assert (ROOT / "docs" / "cluster-keys.md").read_text() == script["page"]()
