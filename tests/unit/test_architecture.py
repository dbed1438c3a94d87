"""The shape of the house: who may import whom, and one door for each heavy framework."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "rddm_dist", "cluster")
DOORS = {
    "webdataset": ("data_pipeline/shards.py",),
    "fsspec": ("data_pipeline/storage.py",),
    "torch.distributed": ("rddm_dist/comm.py", "rddm_dist/torchrun.py"),
    "deepspeed": ("rddm_dist/training/engine.py",),
    "mlflow": ("rddm_dist/tracking/", "rddm_dist/cli/"),
    "ray": ("cluster/ray_",),
    "pyarrow": ("rddm_dist/evaluation/results.py",),
}
FORBIDDEN = {
    "data_pipeline/": ("rddm_dist", "cluster", "ray", "deepspeed", "mlflow", "torch.distributed"),
    "rddm_dist/diffusion/": ("rddm_dist.config", "rddm_dist.model", "rddm_dist.training", "rddm_dist.evaluation"),
}
SOURCES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_follow_the_arrows_and_doors(path: Path) -> None:
    names = set(imports(path))
    here = path.as_posix()
    for framework, doors in DOORS.items():
        if any(is_inside(name, framework) for name in names):
            assert here.startswith(doors), f"{framework} is imported outside {doors}"
    for folder, banned in FORBIDDEN.items():
        if here.startswith(folder):
            assert not [name for name in names for package in banned if is_inside(name, package)]
    if here.startswith("rddm_dist/") and not here.startswith("rddm_dist/cli/"):
        assert not [name for name in names if is_inside(name, "cluster")]


def test_no_module_is_a_drawer() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "misc")]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text())), path


def test_modules_of_the_evaluation_import_those_of_their_line_and_above() -> None:
    """The lines are those of the package's own description."""
    folder = ROOT / "rddm_dist" / "evaluation"
    described = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    table = re.sub(r"\([^)]*\)", "", described.split("\n\n")[1])
    lines = re.split(r"\n {4}(?=\S)", "\n" + table)[1:]
    places = {word: place for place, line in enumerate(lines) for word in re.findall(r"\w+", line[20:])}
    names = {path.stem for path in folder.iterdir() if not path.name.startswith("__")}
    assert names <= set(places)
    for path in folder.glob("[!_]*.py"):
        for name in imports(path.relative_to(ROOT)):
            module = name.removeprefix("rddm_dist.evaluation.").partition(".")[0]
            if name.startswith("rddm_dist.evaluation.") and module in names:
                assert places[module] <= places[path.stem], f"{path.stem} imports {module}, which stands below it"
