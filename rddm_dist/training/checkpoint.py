"""Checkpoints: fragments without pickle, committed as a transaction, readable at any world size and ZeRO stage.

`<run>/checkpoints/step-NNNNNNNN/` (`<run>/search/...` while the objective is searched), in a folder or at a URL:
  rank-NNNNN.safetensors   the pieces one rank holds: tensors "<kind>/<parameter>@<start>", kind weight, ema, exp_avg...
  rank-NNNNN.json          that the rank has written it: whose attempt it was, bytes and sha256
  COMMIT.json              written last, by rank 0: size and sha256 of every file, and the scalars of the run
A folder without a valid COMMIT.json does not exist as far as the run is concerned. `<run>/averages/step-NNNNNNNN/` has
the same form and holds power-function averages alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault, ModelError, UserError
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy, one_line
from rddm_dist import comm
from rddm_dist.training.ema import Ema
from rddm_dist.training.engine import Engine, Piece
from rddm_dist.training.fragments import Fragments, Index, Key, Request, read_index
from rddm_dist.training.selection import Selection, parse_selection

log = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1, of which some runs are left, listed the pieces in rank-NNNNN.json and knew fewer scalars
COMMIT = "COMMIT.json"
CHECKPOINTS, AVERAGES = "checkpoints", "averages"
WEIGHT, EMA = "weight", "ema"
DAMAGE = (errno.EIO, errno.EISDIR, errno.ENOTDIR)  # errors of reading that do not pass
STEP_NAME = re.compile(r"step-(\d{8,})")
FileTable = Mapping[str, tuple[int, str]]  # name -> (bytes, sha256)


class NewerFormat(ModelError):
    """A checkpoint of a later version of this package: neither sound nor damaged."""


@dataclass(frozen=True)
class Progress:
    """Everything a run carries besides tensors. `position` counts samples since the run began.

    loss_scaler: the state of fp16's dynamic loss scale, {} without it; `selection`: with diffusion.objective=auto how
    far the search has come, or its outcome; else None.
    """

    step: int
    position: int
    optimizer_step: int
    config_digest: str
    data_fingerprint: str
    world_size: int
    zero_stage: int
    loss_scaler: Mapping[str, float] = field(default_factory=dict)
    selection: Selection | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    uri: its folder; time: of its COMMIT, in seconds since the epoch; shapes: of the parameters; files: name -> (size,
    sha256).
    """

    uri: str
    time: float
    progress: Progress
    shapes: Mapping[str, tuple[int, ...]]
    files: FileTable

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def open(self, *, retry: RetryPolicy = DEFAULT_RETRY) -> Fragments:
        """The tensors, by ranges."""
        return Fragments(self.read_index(retry=retry), retry=retry)

    def read_index(self, *, share: tuple[int, int] = (0, 1), retry: RetryPolicy = DEFAULT_RETRY) -> Index:
        """What stands where in the files.   share: (i, n) looks at the i-th of n parts of them"""
        names = [name for name in self.files if name.endswith(".safetensors")]
        with _naming(self.uri):
            return read_index([storage.join(self.uri, name) for name in names[share[0] :: share[1]]], retry=retry)

    def read_full(self, kind: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> dict[str, Tensor]:
        """Whole tensors of one kind by name, float32. Raises ModelError where some are missing."""
        full = {name: torch.empty(shape, dtype=torch.float32) for name, shape in self.shapes.items()}
        fragments = self.open(retry=retry)
        with _naming(self.uri):
            fragments.fill(Request(value.view(-1), kind, name, 0) for name, value in full.items())
        return full


def step_folder(folder: str, step: int) -> str:
    return storage.join(folder, f"step-{step:08d}")


# -- writing -----------------------------------------------------------------------------------------------------------


def sources(pieces: Iterable[Piece], ema: Ema) -> list[tuple[Key, Tensor]]:
    """What a checkpoint holds of this rank: weights, moments and averages."""
    found = []
    for piece in pieces:
        found.append((Key(WEIGHT, piece.name, piece.start), piece.weight))
        found += [(Key(kind, piece.name, piece.start), moment) for kind, moment in piece.moments.items()]
    return found + averages(ema, [profile.kind for profile in ema.profiles])


def averages(ema: Ema, kinds: Iterable[str]) -> list[tuple[Key, Tensor]]:
    """This rank's averages of some profiles."""
    return [(Key(kind, piece.name, piece.start), piece.weight) for kind in kinds for piece in ema.as_pieces(kind)]


def write_commit(
    uri: str,
    progress: Progress,
    shapes: Mapping[str, tuple[int, ...]],
    files: FileTable,
    *,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Checkpoint:
    """Make a checkpoint of the files in a folder: COMMIT.json is there whole, or not at all."""
    checkpoint = Checkpoint(uri, time.time(), progress, shapes, dict(sorted(files.items())))
    body = {
        "format_version": FORMAT_VERSION,
        "time": checkpoint.time,
        "progress": asdict(progress),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in checkpoint.files.items()},
    }
    body["sha256"] = _body_digest(body)
    storage.write_bytes_atomic(storage.join(uri, COMMIT), json.dumps(body, indent=1).encode(), retry=retry)
    return checkpoint


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def remove(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Delete a checkpoint, COMMIT.json first, so that a half-deleted one is not taken for one."""
    storage.remove(storage.join(uri, COMMIT), retry=retry)
    for name in storage.list_names(uri, retry=retry):
        storage.remove(storage.join(uri, name), retry=retry)
    if storage.is_local(uri) and storage.exists(uri):
        storage.local_path(uri).rmdir()


def _body_digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in body.items() if key != "sha256"}, sort_keys=True)
    return sha256_of(text.encode())


# -- finding -----------------------------------------------------------------------------------------------------------


def read_commit(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> Checkpoint:
    """Read COMMIT.json without touching the data files.

    Raises ModelError when it is absent or damaged, NewerFormat when this version cannot know what it says.
    """
    place = storage.join(uri, COMMIT)
    try:
        body = json.loads(storage.read_bytes(place, retry=retry))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"{uri} has no {COMMIT}: the checkpoint was never finished") from error
    except OSError as error:
        raise _unreadable(error, place, told=f"{place} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{place} cannot be read: {error}") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormat(
            f"{uri} has checkpoint format {version}, this version of rddm-dist reads up to {FORMAT_VERSION}; upgrade it"
        )
    if not isinstance(body, dict) or body.get("sha256") != _body_digest(body):
        raise ModelError(f"{place} is damaged: its own sha256 does not match")
    try:
        return Checkpoint(
            uri=uri,
            time=float(body.get("time", 0.0)),
            progress=_parse_progress(body["progress"]),
            shapes={name: tuple(shape) for name, shape in body["shapes"].items()},
            files={name: (entry["bytes"], entry["sha256"]) for name, entry in body["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # written so: its sha256 is right
        raise ModelError(f"{place} says what no version of rddm-dist writes: {one_line(error)}") from error


def _parse_progress(values: Mapping[str, Any]) -> Progress:
    # Checkpoints of earlier versions say nothing of a selection.
    selection = values.get("selection")
    return Progress(**{**values, "selection": None if selection is None else parse_selection(selection)})


def verify(checkpoint: Checkpoint, *, share: tuple[int, int] = (0, 1), retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Compare files with their committed size and sha256. Raises ModelError naming the first that differs.

    share: (i, n) looks at the i-th of n parts of the files.
    """
    largest_first = sorted(checkpoint.files.items(), key=lambda item: -item[1][0])  # so that shares are of equal size
    for name, (size, digest) in largest_first[share[0] :: share[1]]:
        uri = storage.join(checkpoint.uri, name)
        told = f"checkpoint {checkpoint.uri} is damaged: "
        try:
            found = storage.size(uri, retry=retry)
            if found != size:
                raise ModelError(f"{told}{name} has {found} bytes instead of {size}")
            sha256 = hashlib.sha256()
            for chunk in storage.read_chunks(uri, retry=retry):
                sha256.update(chunk)
        except FileNotFoundError as error:
            raise ModelError(f"{told}{name} is missing") from error
        except OSError as error:
            raise _unreadable(error, uri, told=f"{told}{name} cannot be read ({error.strerror or error})") from error
        if sha256.hexdigest() != digest:
            raise ModelError(f"{told}the sha256 of {name} does not match")


def _unreadable(error: OSError, uri: str, *, told: str) -> UserError:
    """What it means that a file cannot be read: damage, or something that passes, for which nothing is given up."""
    if error.errno in DAMAGE:
        return ModelError(told)
    return EnvironmentFault(f"{uri} cannot be read ({error.strerror or error}); mend that, then run it again")


def list_steps(folder: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> list[int]:
    """Steps with a folder, committed or not, newest first."""
    found = (STEP_NAME.fullmatch(name) for name in storage.list_names(folder, retry=retry))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def is_committed(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> bool:
    """Whether there is a COMMIT.json, valid or not."""
    return storage.exists(storage.join(uri, COMMIT), retry=retry)


def iter_committed(
    folder: str, on_damaged: Callable[[str], None], *, retry: RetryPolicy = DEFAULT_RETRY
) -> Iterator[Checkpoint]:
    """Committed checkpoints, newest first, their files not yet looked at; what is wrong with a COMMIT.json is told."""
    for step in list_steps(folder, retry=retry):
        uri = step_folder(folder, step)
        if not is_committed(uri, retry=retry):
            continue
        try:
            checkpoint = read_commit(uri, retry=retry)
        except NewerFormat:
            raise
        except ModelError as error:
            on_damaged(str(error))
            continue
        if checkpoint.progress.step != step:
            on_damaged(f"{uri} holds the checkpoint of step {checkpoint.progress.step}")
            continue
        yield checkpoint


def find_newest(
    folder: str, *, skipped: list[str] | None = None, retry: RetryPolicy = DEFAULT_RETRY
) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are skipped loudly, and told in `skipped`. None: there is none.

    Raises ModelError when committed checkpoints exist but none is sound: starting over in silence is not an option.
    NewerFormat where one is of a later version.
    """
    damaged: list[str] = []
    on_damaged = skipping(damaged)
    for checkpoint in iter_committed(folder, on_damaged, retry=retry):
        try:
            verify(checkpoint, retry=retry)
        except ModelError as error:
            on_damaged(str(error))
            continue
        if skipped is not None:
            skipped.extend(damaged)
        return checkpoint
    if damaged:
        raise none_sound(folder, damaged)
    return None


def find_newest_together(folder: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> tuple[Checkpoint | None, list[str]]:
    """`find_newest` by all workers, who share the reading; with what was skipped. All ranks call it."""
    damaged: list[str] = []
    on_damaged = skipping(damaged)
    with comm.together():
        candidates = iter_committed(folder, on_damaged, retry=retry) if comm.rank() == 0 else iter(())
    while True:
        checkpoint = None
        with comm.together():
            checkpoint = next(candidates, None)
        checkpoint = comm.broadcast_object(checkpoint)
        if checkpoint is None:
            break
        problem = ""
        with comm.together():
            try:
                verify(checkpoint, share=(comm.rank(), comm.world_size()), retry=retry)
            except ModelError as error:
                problem = str(error)
        problems = comm.gather_object(problem)
        problem = comm.broadcast_object(next(filter(None, problems or []), ""))
        if not problem:
            return checkpoint, comm.broadcast_object(damaged)
        on_damaged(problem)
    damaged = comm.broadcast_object(damaged)
    if damaged:
        error = none_sound(folder, damaged)
        error.is_shared = True
        raise error
    return None, []


def skipping(damaged: list[str]) -> Callable[[str], None]:
    """Tell the log, and collect in `damaged`, what is passed over."""

    def skip(problem: str) -> None:
        log.warning("SKIPPING a damaged checkpoint: %s", problem)
        damaged.append(problem)

    return skip


def none_sound(folder: str, damaged: list[str]) -> ModelError:
    return ModelError(f"no sound checkpoint in {folder}; newest: {damaged[0]}; move the run folder away to start over")


# -- reading -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Name the checkpoint in what is said about its tensors."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"checkpoint {uri}: {error}") from error


def load_checkpoint(checkpoint: Checkpoint, engine: Engine, ema: Ema, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Fill the engine's pieces and the averages from a verified checkpoint of any world size and stage.

    All ranks call it, and fail together. Each reads a share of the index for all: were it every rank that of every
    rank's file, requests would grow with the square of the ranks.
    """
    with comm.together():
        if checkpoint.shapes != engine.shapes:
            raise ModelError(f"checkpoint {checkpoint.uri} belongs to a network with other parameters")
        share = checkpoint.read_index(share=(comm.rank(), comm.world_size()), retry=retry)
    index = {uri: entries for each in comm.exchange_object(share) for uri, entries in each.items()}
    with comm.together(), _naming(checkpoint.uri), torch.no_grad():
        Fragments(index, retry=retry).fill(
            Request(tensor, key.kind, key.parameter, key.start) for key, tensor in sources(engine.pieces, ema)
        )
        engine.optimizer_step = checkpoint.progress.optimizer_step
        engine.loss_scaler = dict(checkpoint.progress.loss_scaler)
    engine.publish_weights()


def gather_full(pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Assemble whole fp32 tensors on rank 0 from every rank's pieces; None elsewhere. All ranks call it."""
    # Copies, because a view would be sent with all of the storage that it looks into.
    mine = [(piece.name, piece.start, piece.weight.detach().cpu().clone()) for piece in pieces]
    num_elements = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    # At ZeRO stage 0 every rank holds everything.
    is_whole = comm.broadcast_object(sum(values.numel() for _, _, values in mine) == num_elements)
    parts = ([mine] if comm.rank() == 0 else None) if is_whole else comm.gather_object(mine)
    if parts is None:
        return None
    full = {name: torch.empty(int(torch.Size(shape).numel())) for name, shape in shapes.items()}
    for part in parts:
        for name, start, values in part:
            full[name][start : start + values.numel()].copy_(values)
    return {name: values.view(shapes[name]) for name, values in full.items()}
