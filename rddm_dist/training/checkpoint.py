"""Checkpoints: fragments without pickle, committed as a transaction, readable at any world size and ZeRO stage.

Folder `<run>/checkpoints/step-NNNNNNNN/` (`<run>/search/...` while the objective is searched):
  rank-NNNNN.safetensors   the pieces one rank holds: tensors "<kind>/<parameter>@<start>", kind weight, ema, exp_avg...
  rank-NNNNN.json          the list of those pieces: kind, parameter, first element, count
  COMMIT.json              written last, by rank 0: size and sha256 of every file, and the scalars of the run
A folder without a valid COMMIT.json does not exist as far as the run is concerned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.errors import ModelError
from rddm_dist import comm
from rddm_dist.training.ema import Ema
from rddm_dist.training.engine import Engine, Piece
from rddm_dist.training.selection import Selection, parse_selection

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
COMMIT = "COMMIT.json"
WEIGHT, EMA = "weight", "ema"
FileTable = dict[str, tuple[int, str]]  # name -> (bytes, sha256)


@dataclass(frozen=True)
class Progress:
    """Everything a run carries besides tensors. `position` counts samples since the run began.

    `selection`: with diffusion.objective=auto how far the search has come, or its outcome; else None.
    """

    step: int
    position: int
    optimizer_step: int
    config_digest: str
    data_fingerprint: str
    world_size: int
    zero_stage: int
    selection: Selection | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, its scalars, parameter shapes, and name -> (size, sha256) of its files."""

    path: Path
    progress: Progress
    shapes: dict[str, tuple[int, ...]]
    files: FileTable


def step_dir(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


# -- writing -----------------------------------------------------------------------------------------------------------


def save_checkpoint(checkpoints: Path, engine: Engine, ema: Ema, progress: Progress) -> Path:
    """Write one checkpoint; all ranks call it. Raises EnvironmentFault on every rank when one cannot write."""
    path = step_dir(checkpoints, progress.step)
    written: FileTable = {}
    with comm.together():
        path.mkdir(parents=True, exist_ok=True)
        if not engine.is_replicated or comm.rank() == 0:
            written = _write_rank(path, engine.pieces, ema)
    tables = comm.gather_object(written)
    with comm.together():
        if tables is not None:
            files = {name: entry for table in tables for name, entry in table.items()}
            _write_commit(path, progress, engine.shapes, files)
    return path


def _write_rank(path: Path, pieces: Iterable[Piece], ema: Ema) -> FileTable:
    """Write this rank's pieces and their index.   -> the two files' sizes and digests"""
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        tensors[f"{WEIGHT}/{piece.name}@{piece.start}"] = piece.weight
        for key, moment in piece.moments.items():
            tensors[f"{key}/{piece.name}@{piece.start}"] = moment
    for piece in ema.as_pieces():
        tensors[f"{EMA}/{piece.name}@{piece.start}"] = piece.weight
    index = [[*_parse_key(key), value.numel()] for key, value in tensors.items()]
    name = f"rank-{comm.rank():05d}"
    payload = save({key: value.contiguous().cpu() for key, value in tensors.items()})
    return dict(
        [
            _write(path / f"{name}.safetensors", payload),
            _write(path / f"{name}.json", json.dumps({"pieces": index}).encode()),
        ]
    )


def _write_commit(path: Path, progress: Progress, shapes: dict[str, tuple[int, ...]], files: FileTable) -> None:
    body = {
        "format_version": FORMAT_VERSION,
        "progress": asdict(progress),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
    }
    body["sha256"] = _body_digest(body)
    _write(path / COMMIT, json.dumps(body, indent=1).encode())


def _write(path: Path, payload: bytes) -> tuple[str, tuple[int, str]]:
    """Write and flush to disk.   -> (file name, (bytes, sha256 of what was meant to be written))"""
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    return path.name, (len(payload), hashlib.sha256(payload).hexdigest())


def _body_digest(body: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in body.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse_key(key: str) -> tuple[str, str, int]:
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    return kind, name, int(start)


# -- finding -----------------------------------------------------------------------------------------------------------


def read_commit(path: Path) -> Checkpoint:
    """Read COMMIT.json without touching the data files. Raises ModelError when it is absent, damaged or newer."""
    try:
        body = json.loads((path / COMMIT).read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path} has no {COMMIT}: the checkpoint was never finished") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / COMMIT} cannot be read: {error}") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ModelError(f"{path} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}; upgrade")
    if not isinstance(body, dict) or body.get("sha256") != _body_digest(body):
        raise ModelError(f"{path / COMMIT} is damaged: its own sha256 does not match")
    return Checkpoint(
        path=path,
        progress=_parse_progress(body["progress"]),
        shapes={name: tuple(shape) for name, shape in body["shapes"].items()},
        files={name: (entry["bytes"], entry["sha256"]) for name, entry in body["files"].items()},
    )


def _parse_progress(values: dict[str, Any]) -> Progress:
    # Checkpoints of earlier versions say nothing of a selection.
    selection = values.get("selection")
    return Progress(**{**values, "selection": None if selection is None else parse_selection(selection)})


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with its committed size and sha256. Raises ModelError naming the first that differs."""
    for name, (size, digest) in checkpoint.files.items():
        path = checkpoint.path / name
        if not path.is_file():
            raise ModelError(f"checkpoint {checkpoint.path} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise ModelError(
                f"checkpoint {checkpoint.path} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ModelError(f"checkpoint {checkpoint.path} is damaged: the sha256 of {name} does not match")


def list_steps(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, committed or not, newest step first."""
    return sorted((p for p in checkpoints.glob("step-*") if p.is_dir()), reverse=True)


def find_newest(checkpoints: Path, *, skipped: list[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are skipped loudly, and told in `skipped`. None: there is none.

    Raises ModelError when committed checkpoints exist but none is sound: starting over in silence is not an option.
    """
    damaged = []
    for path in list_steps(checkpoints):
        if not (path / COMMIT).exists():
            continue
        try:
            checkpoint = read_commit(path)
            verify(checkpoint)
        except ModelError as error:
            log.warning("SKIPPING a damaged checkpoint: %s", error)
            damaged.append(str(error))
            continue
        if skipped is not None:
            skipped.extend(damaged)
        return checkpoint
    if damaged:
        raise ModelError(
            f"no sound checkpoint in {checkpoints}; newest: {damaged[0]}; move the run folder away to start over"
        )
    return None


def sweep(checkpoints: Path, *, newest: int, keep_last: int) -> None:
    """Delete unfinished folders, those newer than step `newest` (the last one known to be sound) and all but the
    `keep_last` before it. Rank 0 only; what cannot be deleted stays, with a warning."""
    kept = 0
    for path in list_steps(checkpoints):
        is_committed = (path / COMMIT).exists()
        if is_committed and path.name <= step_dir(checkpoints, newest).name and kept < keep_last:
            kept += 1
            continue
        try:
            # COMMIT first, so that a half-deleted folder is not taken for a checkpoint.
            (path / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            log.warning("cannot delete %s: %s", path, error)


# -- reading -----------------------------------------------------------------------------------------------------------


class Reader:
    """Reads ranges of parameters from the rank files of a verified checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._where: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        names = [name for name in checkpoint.files if name.endswith(".safetensors")]
        for name in names:
            index = json.loads((checkpoint.path / name).with_suffix(".json").read_text())
            for kind, parameter, start, numel in index["pieces"]:
                self._where.setdefault((kind, parameter), []).append((start, numel, name))
        self._handles = {name: safe_open(checkpoint.path / name, framework="pt", device="cpu") for name in names}

    def read_into(self, target: Tensor, kind: str, parameter: str, start: int) -> None:
        """Fill `target` (numel,) with elements [start, start + numel) of a flattened parameter's `kind`."""
        end = start + target.numel()
        filled = 0
        for piece_start, numel, name in self._where.get((kind, parameter), ()):
            low, high = max(start, piece_start), min(end, piece_start + numel)
            if low >= high:
                continue
            stored = self._handles[name].get_slice(f"{kind}/{parameter}@{piece_start}")
            target[low - start : high - start].copy_(stored[low - piece_start : high - piece_start])
            filled += high - low
        if filled != target.numel():
            raise ModelError(
                f"checkpoint {self.checkpoint.path} holds {filled} of {target.numel()} elements of {kind} {parameter}"
            )

    def read_full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter."""
        for name, shape in self.checkpoint.shapes.items():
            flat = torch.empty(int(torch.Size(shape).numel()), dtype=torch.float32)
            self.read_into(flat, kind, name, 0)
            yield name, flat.view(shape)


def load_checkpoint(checkpoint: Checkpoint, engine: Engine, ema: Ema) -> None:
    """Fill the engine's pieces and the averages from a verified checkpoint of any world size and stage.

    All ranks call it, and fail together.
    """
    with comm.together():
        _read_state(checkpoint, engine, ema)
    engine.publish_weights()


def _read_state(checkpoint: Checkpoint, engine: Engine, ema: Ema) -> None:
    if checkpoint.shapes != engine.shapes:
        raise ModelError(f"checkpoint {checkpoint.path} belongs to a network with other parameters")
    reader = Reader(checkpoint)
    with torch.no_grad():
        for piece in engine.pieces:
            reader.read_into(piece.weight, WEIGHT, piece.name, piece.start)
            for key, moment in piece.moments.items():
                reader.read_into(moment, key, piece.name, piece.start)
        for average in ema.as_pieces():
            reader.read_into(average.weight, EMA, average.name, average.start)
    engine.optimizer_step = checkpoint.progress.optimizer_step


def gather_full(pieces: Iterable[Piece], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Assemble whole fp32 tensors on rank 0 from every rank's pieces; None elsewhere. All ranks call it."""
    mine = [(piece.name, piece.start, piece.weight.cpu()) for piece in pieces]
    parts = comm.gather_object(mine)
    if parts is None:
        return None
    full = {name: torch.empty(int(torch.Size(shape).numel())) for name, shape in shapes.items()}
    for part in parts:
        for name, start, values in part:
            full[name][start : start + values.numel()].copy_(values)
    return {name: values.view(shapes[name]) for name, values in full.items()}
