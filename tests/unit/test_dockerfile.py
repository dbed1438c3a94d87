"""The Dockerfile by its text: what it copies is there, nothing floats, the user is not root."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
IGNORED = (ROOT / ".dockerignore").read_text().split()


def arguments(instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{instruction} ")]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [source for copied in arguments("COPY") for source in copied.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert not set(sources) & set(IGNORED)
    assert {"data_pipeline", "rddm_dist", "cluster", "constraints.txt", "pyproject.toml"} <= set(sources)


def test_nothing_floats() -> None:
    assert all("=" in argument for argument in arguments("ARG"))  # each has a default
    [base] = [argument.partition("=")[2] for argument in arguments("ARG") if argument.startswith("BASE=")]
    assert re.search(r":[\w.-]+$", base) and not base.endswith(":latest")
    assert not arguments("ADD")
    assert any("pip install" in run and "-c constraints.txt" in run for run in arguments("RUN"))


def test_packages_leave_no_lists_and_the_user_is_not_root() -> None:
    for run in arguments("RUN"):
        if "apt-get install" in run:
            assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run
    assert arguments("USER")[-1] not in ("root", "0")


def test_kuberay_finds_what_it_probes_pods_with() -> None:
    assert any("apt-get install" in run and "wget" in run.split() for run in arguments("RUN"))
    assert "-slim-" in arguments("ARG")[0]  # of Debian: with bash, which starts Ray in its pods
