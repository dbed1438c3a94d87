"""Where an evaluation reads its images: a packed dataset, or files; outputs of another method may lie beside either."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline import storage
from data_pipeline.decode import decode_image
from data_pipeline.errors import BadSample, ConfigError, DataError, EnvironmentFault
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Dataset, EvalEntry, Place
from data_pipeline.records import make_key
from data_pipeline.sources import Pair, first_names, read_header, scan_images
from rddm_dist.evaluation.protocol import Protocol, check_sizes

READERS = 8  # threads that read headers and hash files

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One image of an evaluation.

    width, height: of its target in pixels (of its input, where sizes may differ); places: of its sample, or of its
    tiles, in a packed dataset; files: field (input, target, mask, restored) -> path; digests: field -> sha256 of the
    file.
    """

    key: str
    width: int
    height: int
    name: str = ""
    places: tuple[Place, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> list[Any]:
        return [self.key, self.width, self.height, self.name, self.places, dict(self.files), dict(self.digests)]

    @staticmethod
    def from_json(values: Sequence[Any]) -> Entry:
        key, width, height, name, places, files, digests = values
        return Entry(key, width, height, name, tuple(Place(*place) for place in places), files, digests)


@dataclass(frozen=True)
class Images:
    """What was read of an entry.   input, target, restored: (H, W, 3) uint8; mask: (H, W, 1) uint8; None: absent"""

    key: str
    name: str
    target: np.ndarray
    input: np.ndarray | None = None
    mask: np.ndarray | None = None
    restored: np.ndarray | None = None


class PackedSource:
    """A packed dataset. Raises DataError where there is none at `uri`."""

    def __init__(self, uri: str) -> None:
        if not storage.exists(storage.join(uri, "manifest.json")) and storage.is_local(uri):
            folder = storage.local_path(uri)
            if folder.is_dir() and any(folder.iterdir()):
                raise DataError(
                    f"--data {uri} holds no manifest.json, so it is no packed dataset; pack it with rddm pack, or give "
                    "folders of images with --input and --target"
                )
        self.uri, self.manifest = uri, Manifest.load(uri)
        self.fingerprint, self.num_samples = self.manifest.fingerprint, self.manifest.num_samples
        self.has_input, self.has_mask = self.manifest.has_input, self.manifest.has_mask
        self._dataset = Dataset(uri, self.manifest)

    def spec(self) -> dict[str, Any]:
        """What another process makes this source from."""
        return {"kind": "packed", "uri": storage_path(self.uri), "fingerprint": self.fingerprint}

    def entries(self) -> list[Entry]:
        """Every whole image, sorted by key. Reads all indexes, no image."""
        return [Entry(key, width, height, "", places) for key, width, height, places in self._dataset.images()]

    def read(self, entry: Entry) -> Images:
        """Decode an entry. Raises BadSample for what cannot be read."""
        sample = self._dataset.whole(EvalEntry(entry.key, entry.width, entry.height, entry.places))
        restored = read_entry_file(entry, "restored") if "restored" in entry.files else None
        return Images(entry.key, sample.name, sample.target, sample.input, sample.mask, restored)


class FileSource:
    """Image files. `pairs`: what is read, none in a process that is handed its entries; uri: how it is called."""

    def __init__(self, pairs: Sequence[Pair] = (), *, uri: str = "") -> None:
        self.uri, self._pairs = uri, sorted(pairs, key=lambda pair: pair.key)
        self.num_samples = len(pairs)
        self.has_input = all(pair.input is not None for pair in pairs)
        self.has_mask = all(pair.mask is not None for pair in pairs)
        self._digests = _hash_files([path for pair in self._pairs for path in pair.files.values()])
        listed = [[pair.key, name, self._digests[path]] for pair in self._pairs for name, path in pair.files.items()]
        self.fingerprint = hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def spec(self) -> dict[str, Any]:
        return {"kind": "files"}

    def entries(self) -> list[Entry]:
        """Every image, sorted by key, with the size of its input (of its target without one). Reads headers alone."""
        sizes = _in_threads(lambda pair: _header(pair.first), self._pairs)
        return [
            Entry(
                pair.key,
                *size,
                pair.name,
                files={name: str(path.resolve()) for name, path in pair.files.items()},
                digests={name: self._digests[path] for name, path in pair.files.items()},
            )
            for pair, size in zip(self._pairs, sizes, strict=True)
        ]

    def read(self, entry: Entry) -> Images:
        """Decode an entry. Raises BadSample for what cannot be read."""
        images = {name: read_entry_file(entry, name) for name in entry.files}
        return Images(entry.key, entry.name, **images)


Source = PackedSource | FileSource


def open_source(spec: Mapping[str, Any]) -> Source:
    """The source of `Source.spec()`, in another process. Raises DataError where another dataset lies there now."""
    if spec["kind"] != "packed":
        return FileSource()
    source = PackedSource(spec["uri"])
    if source.fingerprint != spec["fingerprint"]:
        raise DataError(
            f"{spec['uri']} is another dataset here than where the evaluation began (fingerprint "
            f"{source.fingerprint[:12]}, not {spec['fingerprint'][:12]}); give every machine the same one"
        )
    return source


def storage_path(uri: str) -> str:
    """A local path made absolute, as processes elsewhere have another current folder; URLs as they are."""
    return str(storage.local_path(uri).resolve()) if storage.is_local(uri) else uri


def attach_outputs(entries: Sequence[Entry], folder: Path) -> list[Entry]:
    """The entries with the images of a folder as what was restored.

    An image belongs to the entry that is called like its relative path without extension, or has that as its key.
    Raises DataError where an image is missing on one side.
    """
    outputs = scan_images(folder, flag="outputs")
    keys = {entry.key for entry in entries}
    found = {name if name in keys else make_key(name): path for name, path in outputs.items()}
    missing = [entry.name or entry.key for entry in entries if entry.key not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(entries)} targets have no image of the same name in {folder}: "
            f"{first_names(missing)}; add the images or leave out the targets"
        )
    surplus = sorted(path.name for key, path in found.items() if key not in keys)
    if surplus:
        raise DataError(
            f"{len(surplus)} of {len(found)} images in {folder} have no target of the same name: "
            f"{first_names(surplus)}; remove them or add the targets"
        )
    digests = _hash_files(list(found.values()))
    return [
        replace(
            entry,
            files={**entry.files, "restored": str(found[entry.key].resolve())},
            digests={**entry.digests, "restored": digests[found[entry.key]]},
        )
        for entry in entries
    ]


def check_entry_sizes(
    protocol: Protocol,
    entries: Sequence[Entry],
    *,
    metrics: Sequence[str],
    side: int = 0,
    needs_mask: bool = False,
    lpips_side: int = 1,
) -> None:
    """Raise DataError for the first image whose sizes the protocol, a metric or the model does not take.

    side: of the square that the model itself makes of every image, 0: none; needs_mask: it sees a mask, of the input's
    size; lpips_side: the least that an LPIPS network takes. What lies in a packed dataset has one size. Reads headers
    of files alone.
    """

    def check(entry: Entry) -> None:
        sizes = {name: _header(Path(path)) for name, path in entry.files.items()}
        mask = sizes.pop("mask", None)
        if needs_mask and mask is not None and mask != sizes["input"]:
            raise DataError(
                f"{entry.name} (mask): the model needs a mask of the input's size, got {mask[0]}x{mask[1]} for "
                f"{sizes['input'][0]}x{sizes['input'][1]}; resize the mask"
            )
        target = sizes.pop("target", (entry.width, entry.height))
        for name, size in (sizes or {"input": target}).items():
            if side and not protocol.side and not protocol.only_side:
                size = target = (side, side)
            what = f"{entry.name or entry.key} ({name})"
            check_sizes(protocol, restored=size[::-1], target=target[::-1], what=what, metrics=metrics)
            least = (protocol.side or min(target)) - 2 * protocol.border
            if least < lpips_side:
                raise DataError(
                    f"{what}: LPIPS of this network needs images of at least {lpips_side}x{lpips_side} pixels, got "
                    f"{target[0]}x{target[1]}; leave --lpips out"
                )

    _in_threads(check, entries)


def read_entry_file(entry: Entry, name: str) -> np.ndarray:
    """An image file of an entry.   -> (H, W, 3) uint8, masks (H, W, 1)

    Raises BadSample for what cannot be decoded, or has pixels of another size than its header says; DataError for
    another file than when the evaluation began, EnvironmentFault for one that this machine does not see.
    """
    path = Path(entry.files[name])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be read on {socket.gethostname()} ({error.strerror}); put the files where every machine "
            "of the evaluation sees them"
        ) from error
    if hashlib.sha256(data).hexdigest() != entry.digests[name]:
        raise DataError(f"{path} is another file than when the evaluation began; run the command again")
    try:
        image = decode_image(data, path.suffix[1:].lower(), channels=1 if name == "mask" else 3)
    except BadSample as error:
        raise BadSample(f"{path}: {error}") from error
    width, height = read_header(path)
    if image.shape[:2] != (height, width):
        raise BadSample(
            f"{path}: its header says {width}x{height}, its pixels are {image.shape[1]}x{image.shape[0]} (turned by an "
            "orientation behind them); save it upright"
        )
    return image


def pixel_digest(image: np.ndarray) -> str:
    """sha256 of the size and the pixels of an image.   (H, W, C) uint8"""
    return hashlib.sha256(json.dumps(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _header(path: Path) -> tuple[int, int]:
    """(width, height); DataError for what is no image."""
    try:
        return read_header(path)
    except (BadSample, OSError) as error:
        raise DataError(f"{path}: {error}; replace or remove it") from error


def _hash_files(paths: Sequence[Path]) -> dict[Path, str]:
    """sha256 of each file's bytes."""

    def digest(path: Path) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error

    return dict(zip(paths, _in_threads(digest, paths), strict=True))


def _in_threads(work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(work, items))


def require(source: Source, *, mask_for: str = "", input_for: str = "") -> None:
    """Raise ConfigError or DataError where the source lacks masks or inputs that something needs."""
    if input_for and not source.has_input:
        raise DataError(
            f"{source.uri} holds clean images only and {input_for} needs degraded ones; pack it with --degrade"
        )
    if mask_for and not source.has_mask:
        raise ConfigError(f"{mask_for} needs masks and {source.uri} has none; give or pack it with --mask")
