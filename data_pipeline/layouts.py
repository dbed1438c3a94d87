"""Known public datasets, recognised from how their folders lie: where a split's inputs, targets and masks are.

Checked against real files: polyu (the form with pairs.tsv) and bsds (the form train/). The other trees are written
down from the public descriptions of the downloads.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.records import make_key
from data_pipeline.sources import Pair, check_unique, first_names, is_image, list_splits, read_pair_list

log = logging.getLogger(__name__)

EVERYTHING = "all"  # the split of a dataset that has none


@dataclass(frozen=True)
class Rule:
    """Where the images of a split lie: patterns below the root, without extensions, upper and lower case alike.

    What the stars stand for names the sample and must agree between the patterns. without_input: targets without input
    are left out, because the public download has such.
    """

    target: str
    input: str = ""
    mask: str = ""
    without_input: bool = False

    @property
    def patterns(self) -> dict[str, str]:
        """Field -> pattern."""
        patterns = {"input": self.input, "target": self.target, "mask": self.mask}
        return {field: pattern for field, pattern in patterns.items() if pattern}


Rules = tuple[Rule, ...]  # forms of one download; the first that fits counts


@dataclass(frozen=True)
class Layout:
    """How a dataset lies below its root.

    tree: for people, in one line; splits: name -> its forms; listing: a file of pairs with a column split, and the
    folders that lie beside it.
    """

    name: str
    tree: str
    splits: Mapping[str, Rules]
    listing: tuple[str, ...] = ()

    @property
    def has_inputs(self) -> bool:
        """Whether it pairs images; the others are clean images alone."""
        return bool(self.listing) or any(rule.input for rules in self.splits.values() for rule in rules)

    def known_splits(self, root: Path) -> list[str]:
        """The splits that are there. Raises DataError for a damaged listing."""
        if self._has_listing(root):
            return list_splits(root / self.listing[0])
        return [split for split, rules in self.splits.items() if any(_fits(root, rule) for rule in rules)]

    def pairs(self, root: Path, split: str = "") -> list[Pair]:
        """The samples of a split, sorted by name.   split: may be left out where there is only one

        Raises DataError for a root that is not laid out so, an unknown split and an image without partner.
        """
        root = Path(root)
        known = self.known_splits(root)
        if not known:
            raise DataError(f"--root {root} is not laid out as --layout {self.name}: it should hold {self.tree}")
        if not split and len(known) > 1:
            raise DataError(f"--root {root} ({self.name}) has several splits; choose with --split {'|'.join(known)}")
        if split and split not in known:
            raise DataError(f"--split {split}: --root {root} ({self.name}) holds {', '.join(known)}")
        split = split or known[0]
        if self._has_listing(root):
            return sorted(read_pair_list(root / self.listing[0], split=split), key=lambda pair: pair.name)
        return _read(root, next(rule for rule in self.splits[split] if _fits(root, rule)))

    def _has_listing(self, root: Path) -> bool:
        return bool(self.listing) and all((root / name).exists() for name in self.listing)


def _pairs_in(folder: str, *forms: tuple[str, str]) -> Rules:
    """Forms as (input, target) patterns inside a folder."""
    prefix = f"{folder}/" if folder else ""
    return tuple(Rule(target=prefix + target, input=prefix + input) for input, target in forms)


def _rain100(folder: str) -> Rules:
    """The forms in which Rain100H and Rain100L go round, some with rainy images fewer than clean ones."""
    forms = (
        ("rain/*", "norain/*"),
        ("rain/*x2", "norain/*"),
        ("rain/X2/*x2", "norain/*"),
        ("rain/rain-*", "norain/norain-*"),
        ("rainy/rain-*", "norain-*"),
        ("rain-*", "norain-*"),
    )
    return tuple(Rule(rule.target, rule.input, without_input=True) for rule in _pairs_in(folder, *forms))


_GOPRO = (("*/blur/*", "*/sharp/*"), ("input/*", "target/*"))
_RAINDROP = ("data/*_rain", "gt/*_clean")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "raindrop",
            "train|test_a|test_b/{data/N_rain.png, gt/N_clean.png}",
            {split: _pairs_in(split, _RAINDROP) for split in ("train", "test_a", "test_b")},
        ),
        Layout(
            "gopro",
            "train|test/SEQUENCE/{blur,sharp}/N.png or train|test/{input,target}/N.png",
            {split: _pairs_in(split, *_GOPRO) for split in ("train", "test")},
        ),
        Layout(
            "lol",
            "our485|eval15/{low,high}/N.png",
            {split: _pairs_in(split, ("low/*", "high/*")) for split in ("our485", "eval15")},
        ),
        Layout(
            "istd",
            "train/train_A|train_B|train_C and test/test_A|test_B|test_C (shadow, mask, clean)",
            {
                split: (Rule(f"{split}/{split}_C/*", f"{split}/{split}_A/*", f"{split}/{split}_B/*"),)
                for split in ("train", "test")
            },
        ),
        Layout(
            "sidd",
            "Data/SCENE/{N_NOISY_SRGB_M.PNG, N_GT_SRGB_M.PNG}",
            {EVERYTHING: _pairs_in("Data/*", ("*NOISY*", "*GT*"))},
        ),
        Layout(
            "rain100",
            "[train|test/]{rain,norain}/N.png, [train|test/]{rainy/rain-N.png, norain-N.png} or both in one folder",
            {"train": _rain100("train"), "test": _rain100("test"), EVERYTHING: _rain100("")},
        ),
        Layout(
            "polyu",
            "CroppedImages/{NAME_real.JPG, NAME_mean.JPG} or pairs.tsv (with a column split), noisy/, clean/",
            {EVERYTHING: _pairs_in("CroppedImages", ("*_real", "*_mean"))},
            listing=("pairs.tsv", "noisy", "clean"),
        ),
        Layout(
            "bsds",
            "images/train|val|test/N.jpg or train|val|test/N.jpg (clean images alone)",
            {split: (Rule(f"images/{split}/*"), Rule(f"{split}/*")) for split in ("train", "val", "test")},
        ),
        Layout("celeba", "img_align_celeba/N.jpg (clean images alone)", {EVERYTHING: (Rule("img_align_celeba/*"),)}),
    )
}


def find_layout(root: Path, name: str = "") -> Layout:
    """The layout of that name, else the one that fits what lies below `root`.

    Layouts of clean images alone take nearly any folder of images: they count where no layout with inputs fits.
    Raises ConfigError for an unknown name, DataError where the named one does not fit, and none or several do.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"--root {root} is no folder; give the folder of the dataset")
    if name:
        if name not in LAYOUTS:
            raise ConfigError(f"--layout {name} is not known; choose one of {', '.join(LAYOUTS)}")
        if not LAYOUTS[name].known_splits(root):
            raise DataError(f"--root {root} is not laid out as --layout {name}: it should hold {LAYOUTS[name].tree}")
        return LAYOUTS[name]
    fitting = [layout for layout in LAYOUTS.values() if layout.known_splits(root)]
    fitting = [layout for layout in fitting if layout.has_inputs] or fitting
    if len(fitting) > 1:
        raise DataError(f"--root {root} could be {' or '.join(x.name for x in fitting)}; choose with --layout")
    if not fitting:
        raise DataError(
            f"--root {root} is laid out as none of {', '.join(LAYOUTS)}; name one with --layout to see what it should "
            "hold, or use --input and --target"
        )
    return fitting[0]


def _fits(root: Path, rule: Rule) -> bool:
    """Whether at least one sample is complete."""
    names: set[tuple[str, ...]] | None = None
    for pattern in rule.patterns.values():
        found = set(_find(root, pattern))
        names = found if names is None else names & found
        if not names:
            return False
    return True


def _read(root: Path, rule: Rule) -> list[Pair]:
    found = {field: _find(root, pattern) for field, pattern in rule.patterns.items()}
    for images in found.values():
        for other in found:
            orphans = [path.relative_to(root).as_posix() for names, path in images.items() if names not in found[other]]
            if orphans and other == "input" and rule.without_input:
                log.warning("%d target(s) without input left out: %s", len(orphans), first_names(orphans))
            elif orphans:
                raise DataError(
                    f"{len(orphans)} image(s) in {root} have no {other} ({rule.patterns[other]}): "
                    f"{first_names(orphans)}; add or remove them"
                )
    pairs = []
    for names in found.get("input", found["target"]):
        name = "/".join(names)
        files = {field: images[names] for field, images in found.items()}
        pairs.append(Pair(make_key(name), name, files.get("input"), files["target"], files.get("mask")))
    check_unique(pairs)
    return sorted(pairs, key=lambda pair: pair.name)


def _find(root: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """What the stars stand for, one text for each part of the path that has some -> image."""
    found: dict[tuple[str, ...], Path] = {}
    for names, path in _walk(root, pattern.split("/")):
        if names in found:
            raise DataError(f"{found[names]} and {path} have one name, {'/'.join(names)}; rename or remove one")
        found[names] = path
    return found


def _spellings(folder: Path, name: str) -> list[str]:
    """`name` where the folder holds it, else what it holds under that name in other cases, sorted."""
    if (folder / name).exists():
        return [name]
    if not folder.is_dir():
        return []
    return sorted(other for other in os.listdir(folder) if other.lower() == name.lower())


def _walk(folder: Path, parts: list[str]) -> Iterator[tuple[tuple[str, ...], Path]]:
    first, rest = parts[0], parts[1:]
    if rest and "*" not in first:
        for name in _spellings(folder, first):
            yield from _walk(folder / name, rest)
        return
    if not folder.is_dir():
        return
    expression = re.compile("(.*)".join(map(re.escape, first.split("*"))), re.IGNORECASE)
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        match = expression.fullmatch(entry.name if rest else os.path.splitext(entry.name)[0])
        if match is None or entry.name.startswith("."):
            continue
        name = "_".join(text.strip("_") for text in match.groups() if text.strip("_")) or match.group()
        if rest and entry.is_dir():
            yield from (((name, *names), path) for names, path in _walk(folder / entry.name, rest))
        elif not rest and is_image(entry.name):
            yield (name,), folder / entry.name
