"""Where samples come from: folders of equal names, a list, or one folder of clean images."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data_pipeline.decode import DECODE_ERRORS, EXIF_ORIENTATION, FORMATS, PILLOW_FORMATS, check_size
from data_pipeline.errors import BadSample, DataError
from data_pipeline.records import FIELDS, make_key

log = logging.getLogger(__name__)

SHOWN = 3  # names listed in a message
MAX_SHOWN = 60  # characters of each end of a long name in a message
LIST_COLUMNS = (*FIELDS, "split")


@dataclass(frozen=True)
class Pair:
    """The files of one sample; without input it is a clean image alone.

    key: its name in the dataset, made of [A-Za-z0-9_-] alone and unique; name: what the user calls it, the relative
    path without its extension.
    """

    key: str
    name: str
    input: Path | None
    target: Path
    mask: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Field -> file, in the order of FIELDS."""
        files = {"input": self.input, "target": self.target, "mask": self.mask}
        return {field: path for field, path in files.items() if path is not None}

    @property
    def first(self) -> Path:
        """The file that stands for the sample in messages: its input, or the clean image."""
        return self.input or self.target


def find_pairs(input: Path | None, target: Path, mask: Path | None = None) -> list[Pair]:
    """Pair images of the same relative name, extension apart, in two folders (three with masks), sorted by name.

    Without an input folder the samples are clean images, with masks where there are any. Hidden files are left out,
    files that are no images too (logged). Raises DataError for a missing or empty folder, an image without partner, two
    images of one name.
    """
    given = {"input": input, "target": target, "mask": mask}
    folders = {field: Path(folder) for field, folder in given.items() if folder is not None}
    first = next(iter(folders))
    found = {field: scan_images(folder, flag=f"--{field}") for field, folder in folders.items()}
    for partner in [field for field in folders if field != first]:
        for field, other in ((first, partner), (partner, first)):
            orphans = [path.name for name, path in found[field].items() if name not in found[other]]
            if orphans:
                raise DataError(
                    f"{len(orphans)} image(s) in --{field} {folders[field]} have no image of the same name in "
                    f"--{other} {folders[other]}: {first_names(orphans)}; add or remove them"
                )
    pairs = [
        Pair(
            make_key(name),
            name,
            found["input"][name] if input is not None else None,
            path,
            found["mask"][name] if mask is not None else None,
        )
        for name, path in sorted(found["target"].items())
    ]
    check_unique(pairs)
    return pairs


def pair_by_index(input: Path, target: Path) -> list[Pair]:
    """Pair two folders of images that do not belong together, each sorted by name: the n-th with the n-th.

    The longer folder's last images are left out (logged). A sample is called after its input. Raises DataError for a
    missing or empty folder and for two images of one name.
    """
    inputs, targets = (
        sorted(scan_images(folder, flag=flag).items())
        for folder, flag in (
            (Path(input), "--input"),
            (Path(target), "--target"),
        )
    )
    if len(inputs) != len(targets):
        shown = f"--input {input} has {len(inputs)} images, --target {target} {len(targets)}"
        log.warning("%s: the last %d are left out", shown, abs(len(inputs) - len(targets)))
    pairs = [Pair(make_key(name), name, path, other) for (name, path), (_, other) in zip(inputs, targets, strict=False)]
    check_unique(pairs)
    return pairs


def find_clean(folder: Path, *, flag: str = "--clean") -> list[Pair]:
    """The images of a folder and the folders in it as targets without inputs, sorted by name.

    flag: the option that named the folder. Raises DataError for a missing or empty folder and for two images of one
    name.
    """
    pairs = [Pair(make_key(name), name, None, path) for name, path in sorted(scan_images(folder, flag=flag).items())]
    check_unique(pairs)
    return pairs


def read_pair_list(
    path: Path,
    *,
    input_root: Path | None = None,
    target_root: Path | None = None,
    mask_root: Path | None = None,
    split: str | None = None,
) -> list[Pair]:
    """Pairs of a tab-separated file, in its order.

    A first row that names columns may hold input, target, mask, split and others, which are ignored; without one, two
    or three columns are input, target and mask. Paths are relative to the roots, by default to the list's own folder.
    split: take the rows of that value in column split. Raises DataError naming file and line.
    """
    path = Path(path)
    columns, rows = _read_table(path)
    if split is not None:
        rows = _take_split(path, columns, rows, split)
    roots = {"input": input_root, "target": target_root, "mask": mask_root}
    has_mask = "mask" in columns
    files: list[dict[str, Path]] = []
    for line, row in rows:
        found = {}
        for field in FIELDS if has_mask else FIELDS[:2]:
            text = row[columns.index(field)].strip()
            file = (roots[field] or path.parent) / text
            try:
                is_there = bool(text) and file.is_file()
            except OSError as error:
                raise DataError(f"{path} line {line}: {field} image {_short(text)}: {error.strerror}") from error
            if not is_there:
                raise DataError(f"{path} line {line}: {field} image {text!r} does not exist ({file})")
            found[field] = file
        files.append(found)
    inputs = [found["input"].absolute() for found in files]  # a list may hold relative and absolute paths
    parent = Path(os.path.commonpath([str(file.parent) for file in inputs]))
    names = [file.relative_to(parent).with_suffix("").as_posix() for file in inputs]
    pairs = [
        Pair(make_key(name), name, found["input"], found["target"], found.get("mask"))
        for name, found in zip(names, files, strict=True)
    ]
    check_unique(pairs)
    return pairs


def list_splits(path: Path) -> list[str]:
    """The values of a list's column split, sorted; [] where it has no such column. Raises DataError as above."""
    columns, rows = _read_table(path)
    return sorted({row[columns.index("split")].strip() for _, row in rows}) if "split" in columns else []


def check_unique(pairs: Sequence[Pair]) -> None:
    """Raise DataError when two pairs share a key."""
    seen: dict[str, Pair] = {}
    for pair in pairs:
        if pair.key in seen:
            raise DataError(f"{seen[pair.key].first} and {pair.first} have one name, {pair.name}; rename or drop one")
        seen[pair.key] = pair


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and Path(name).suffix.lower().removeprefix(".") in FORMATS


def read_header(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, as its header says: the file is not read as a whole.

    An orientation that a PNG tells behind its pixels is not seen. Raises BadSample for what is no image of FORMATS,
    OSError where the file cannot be opened.
    """
    kind = path.suffix.lower().removeprefix(".")
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=PILLOW_FORMATS) as image:
                check_size(*image.size)
                # For the whole truth about a PNG Pillow would unpack its pixels; what it says before them is known.
                exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
                is_turned = exif.get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if is_turned else (image.width, image.height)
        except UnidentifiedImageError as error:
            raise BadSample(f"not a readable {kind} image: its content is of no known format") from error
        except DECODE_ERRORS as error:
            raise BadSample(f"not a readable {kind} image: {' '.join(str(error).split())}") from error


def scan_images(folder: Path, *, flag: str) -> dict[str, Path]:
    """Relative name without extension -> image, of a folder and the folders in it.

    Links to folders are followed. Hidden files are left out, files that are no images too (logged). flag: the option
    that named the folder. Raises DataError for a missing or empty folder, one that cannot be listed, two images of one
    name and a name that is not UTF-8.
    """
    folder = Path(folder)
    try:
        if not folder.exists():
            raise DataError(f"{flag} {folder} does not exist; give a folder of images")
        if not folder.is_dir():
            raise DataError(f"{flag} {folder} is not a folder; give a folder of images")
        paths = sorted(_walk(folder))
    except OSError as error:
        raise DataError(
            f"{flag} {_short(str(folder))} cannot be listed: {error.strerror} (at {_short(str(error.filename))})"
        ) from error
    images: dict[str, Path] = {}
    others = []
    for path in paths:
        relative = path.relative_to(folder)
        if not is_image(path.name):
            others.append(relative.as_posix())
            continue
        name = relative.with_suffix("").as_posix()
        if not _is_text(name):
            raise DataError(f"the name of {ascii(str(path))} is not UTF-8; rename it")
        if name in images:
            raise DataError(f"{images[name]} and {path} have one name, {name}; rename or remove one")
        images[name] = path
    if not images:
        raise DataError(f"{flag} {folder} holds no images ({', '.join(sorted(FORMATS))})")
    if others:
        log.warning("%d file(s) in %s are no images and left out: %s", len(others), folder, first_names(others))
    return images


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and the folders in it, links followed, hidden ones left out. Raises OSError.

    A link back to a folder that it lies in would never end: it is left out and logged.
    """

    def refuse(error: OSError) -> None:
        raise error

    above = {str(folder): frozenset([_identity(str(folder))])}  # folder -> itself and those above it
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        chain = above.pop(parent)
        kept = []
        for name in folders:
            path = os.path.join(parent, name)
            if name.startswith("."):
                continue
            identity = _identity(path)
            if identity in chain:
                log.warning("%s leads back to a folder that it lies in and is left out", path)
                continue
            above[path] = chain | {identity}
            kept.append(name)
        folders[:] = kept
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _is_text(name: str) -> bool:
    """Whether a file name has no bytes that Python could not read as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(text: str) -> str:
    """The name for a message, its middle left out where it is very long."""
    return repr(text if len(text) <= 2 * MAX_SHOWN else f"{text[:MAX_SHOWN]}...{text[-MAX_SHOWN:]}")


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names and (line number, cells) of every row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [
                (line, row)
                for line, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1)
                if any(cell.strip() for cell in row)
            ]
    except FileNotFoundError as error:
        raise DataError(f"--list {path} does not exist; give a tab-separated file of pairs") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--list {path} cannot be read as tab-separated text: {error}") from error
    if not rows:
        raise DataError(f"--list {path} is empty")
    header = [cell.strip().lower() for cell in rows[0][1]]
    if {"input", "target"} <= set(header):
        columns, rows = header, rows[1:]
    elif len(header) in (2, 3):
        columns = list(FIELDS[: len(header)])
    else:
        raise DataError(
            f"--list {path} line 1 has {len(header)} column(s); give two or three (input, target, mask), or a first "
            f"row that names them ({', '.join(LIST_COLUMNS)})"
        )
    for line, row in rows:
        if len(row) != len(columns):
            raise DataError(f"{path} line {line} has {len(row)} column(s), not {len(columns)}; columns are tabs apart")
    if not rows:
        raise DataError(f"--list {path} holds no pairs")
    return columns, rows


def _take_split(
    path: Path, columns: list[str], rows: list[tuple[int, list[str]]], split: str
) -> list[tuple[int, list[str]]]:
    if "split" not in columns:
        raise DataError(f"--split {split}: {path} has no column split; its columns are {', '.join(columns)}")
    column = columns.index("split")
    taken = [(line, row) for line, row in rows if row[column].strip() == split]
    if not taken:
        raise DataError(f"--split {split}: {path} has no such rows; its splits are {', '.join(list_splits(path))}")
    return taken


def first_names(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = list(names)
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
