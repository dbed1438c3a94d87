"""The tensors of checkpoints, streamed in bounded memory: compared with each other, summed into other averages."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.factory import make_net, make_sampling_schedule
from rddm_dist.loading import Model, run_config
from rddm_dist.model.weights import weights_digest
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training import posthoc
from rddm_dist.training.ema import kind_of
from rddm_dist.training.fragments import Fragments, Request
from rddm_dist.training.inspection import Entry, config_of, find_damage, scan

log = logging.getLogger(__name__)

WINDOW_ELEMENTS = 1 << 23  # of parameters held at once


class _Window(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter."""

    parameter: str
    start: int
    numel: int


def _windows(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[_Window]]:
    """Every element once, in groups of up to WINDOW_ELEMENTS; a large parameter comes in several."""
    group: list[_Window] = []
    room = WINDOW_ELEMENTS
    for name, shape in shapes.items():
        start, total = 0, math.prod(shape)
        while start < total:
            numel = min(room, total - start)
            group.append(_Window(name, start, numel))
            start, room = start + numel, room - numel
            if not room:
                yield group
                group, room = [], WINDOW_ELEMENTS
    if group:
        yield group


def _read(fragments: Fragments, kind: str, windows: Sequence[_Window]) -> Tensor:
    """(sum of numel,) float32: the windows of one kind, one after the other."""
    flat = torch.empty(sum(window.numel for window in windows))
    parts = flat.split([window.numel for window in windows])
    fragments.fill(Request(part, kind, w.parameter, w.start) for part, w in zip(parts, windows, strict=True))
    return flat


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KindDifference:
    """How far the tensors of one kind are apart.

    elements: compared ones; differing: those with other bits; largest: absolute difference, nan where one of them is,
    and `parameter` has it; relative: L2 distance over the L2 norm of the first.
    """

    kind: str
    elements: int
    differing: int
    largest: float
    parameter: str
    relative: float


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints.

    scalars: name -> both values, where they differ; kinds: those that both hold; alone: kinds and parameters that only
    one holds, and parameters of two shapes, in words.
    """

    scalars: Mapping[str, tuple[Any, Any]]
    kinds: tuple[KindDifference, ...]
    alone: tuple[str, ...]

    @property
    def is_bit_equal(self) -> bool:
        """Whether all tensors are; the scalars do not count."""
        return not self.alone and not any(kind.differing for kind in self.kinds)


def compare(one: ckpt.Checkpoint, other: ckpt.Checkpoint) -> Difference:
    """Compare two verified checkpoints of any world sizes and stages, in bounded memory."""
    fragments = one.open(), other.open()
    common = {name: shape for name, shape in one.shapes.items() if other.shapes.get(name) == shape}
    kinds = [kind for kind in fragments[0].kinds if kind in fragments[1].kinds]
    return Difference(
        _differing_scalars(one.progress, other.progress),
        tuple(_compare_kind(kind, fragments, common) for kind in kinds) if common else (),
        (
            *_alone("kind", fragments[0].kinds, fragments[1].kinds),
            *_alone("parameter", one.shapes, other.shapes),
            *(
                f"parameter {name} is {list(shape)} in A and {list(other.shapes[name])} in B"
                for name, shape in one.shapes.items()
                if name in other.shapes and name not in common
            ),
        ),
    )


def _differing_scalars(one: ckpt.Progress, other: ckpt.Progress) -> dict[str, tuple[Any, Any]]:
    names = [field.name for field in dataclasses.fields(ckpt.Progress)]
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _alone(what: str, one: Sequence[str] | Mapping[str, Any], other: Sequence[str] | Mapping[str, Any]) -> list[str]:
    names = [f"{what} {name} only in A" for name in one if name not in other]
    return names + [f"{what} {name} only in B" for name in other if name not in one]


def _compare_kind(
    kind: str, fragments: tuple[Fragments, Fragments], shapes: Mapping[str, tuple[int, ...]]
) -> KindDifference:
    elements = differing = 0
    largest, parameter, distance, norm = 0.0, "", 0.0, 0.0
    for windows in _windows(shapes):
        a, b = (_read(each, kind, windows) for each in fragments)
        is_other = a.view(torch.int32) != b.view(torch.int32)
        elements += a.numel()
        differing += int(is_other.sum())
        # Equal infinities are no distance apart.
        apart = torch.where(is_other, (a.double() - b.double()).abs(), 0.0)
        distance += float(apart.square().sum())
        norm += float(a.double().square().sum())
        for window, part in zip(windows, apart.split([window.numel for window in windows]), strict=True):
            value = float(part.max())
            if value > largest or (math.isnan(value) and not math.isnan(largest)):
                largest, parameter = value, window.parameter
    relative = 0.0
    if distance:
        relative = math.sqrt(distance) / math.sqrt(norm) if norm else math.inf
    return KindDifference(kind, elements, differing, largest, parameter, relative)


# -- averages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rebuilt:
    """An average made from stored ones.

    state: whole parameters, float32; error: how far its profile is from the wanted one, see `posthoc.reconstruction`;
    snapshots: how many were used.
    """

    state: dict[str, Tensor]
    error: float
    snapshots: int


class _Stored(NamedTuple):
    """A stored average: where, and of what length."""

    checkpoint: ckpt.Checkpoint
    length: float


def average_model(
    home: str, *, length: float, step: int = 0, on_verified: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Model, Rebuilt]:
    """A run's power-function average of relative length `length` at a step, as a model that can be exported.

    step: 0 stands for the newest stored one; on_verified: see `averages_of`. Raises ConfigError where there is nothing
    to make it from.
    """
    posthoc.gamma_of(length)  # refuses what cannot be, before anything is read
    lengths = config_of(home).ema.lengths
    if not lengths:
        raise ConfigError(
            f"run {home} has kept no averages to make others from; set ema.lengths and ema.snapshot_every before "
            "training"
        )
    sources = averages_of(home, up_to=step or math.inf, on_verified=on_verified)
    rows = (ckpt.AVERAGES, ckpt.CHECKPOINTS)
    newest = max((entry.step for row in rows for entry in scan(home, row) if entry.checkpoint), default=0)
    if not sources or step > newest:
        raise ConfigError(
            f"run {home} has no stored averages to make that of step {step or newest} from, the newest is of step "
            f"{newest}; give another --step, ema.snapshot_every says how often they are stored"
        )
    step = step or sources[0].progress.step
    rebuilt = rebuild(sources, step=step, length=length, lengths=lengths)
    config = run_config(home, sources[0])
    net = make_net(config)
    net.load_state_dict(rebuilt.state)
    net.eval().requires_grad_(False)
    fingerprint = sources[0].progress.data_fingerprint
    extra = {"step": f"{step}", "data_fingerprint": fingerprint, "run": config.run.name, "ema_length": f"{length:g}"}
    return Model(net, make_sampling_schedule(config), config, weights_digest(rebuilt.state), home, extra), rebuilt


def averages_of(
    home: str, *, up_to: float = math.inf, on_verified: Callable[[int, int], None] = lambda done, total: None
) -> list[ckpt.Checkpoint]:
    """Sound checkpoints with power-function averages, newest first: all snapshots, and the newest of the training.

    up_to: the last step; on_verified(done, total): called after each snapshot. Damaged ones are left out, loudly.
    """
    snapshots = [entry for entry in scan(home, ckpt.AVERAGES) if entry.step <= up_to]
    found: dict[int, ckpt.Checkpoint] = {}
    for done, entry in enumerate(snapshots, 1):
        if checkpoint := _usable(entry):
            found[entry.step] = checkpoint
        on_verified(done, len(snapshots))
    for entry in scan(home, ckpt.CHECKPOINTS):
        if entry.step in found:
            break
        checkpoint = _usable(entry) if entry.step <= up_to else None
        if checkpoint:
            found[entry.step] = checkpoint
            break
    return [found[step] for step in sorted(found, reverse=True)]


def rebuild(sources: Sequence[ckpt.Checkpoint], *, step: int, length: float, lengths: Sequence[float]) -> Rebuilt:
    """The average of relative length `length` at `step`, from those of `lengths` in verified checkpoints of one run."""
    stored = [_Stored(source, each) for source in sources for each in lengths]
    made = posthoc.reconstruction(
        [(posthoc.updated_at(each.checkpoint.progress.step), each.length) for each in stored],
        step=posthoc.updated_at(step),
        length=length,
    )
    used = [(each, weight) for each, weight in zip(stored, made.weights, strict=True) if weight]
    return Rebuilt(_weighted_sum(used), made.error, len({each.checkpoint.uri for each, _ in used}))


def _usable(entry: Entry) -> ckpt.Checkpoint | None:
    """The checkpoint if it is sound."""
    if entry.state == "unfinished":
        return None
    if problem := find_damage(entry):
        log.warning("LEAVING OUT a stored average: %s", problem)
        return None
    return entry.checkpoint


def _weighted_sum(used: Sequence[tuple[_Stored, float]]) -> dict[str, Tensor]:
    """sum of weight * average over the stored ones, in float64.   -> whole parameters, float32"""
    shapes = used[0][0].checkpoint.shapes
    opened: dict[str, Fragments] = {}
    for each, _ in used:
        opened.setdefault(each.checkpoint.uri, each.checkpoint.open())
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    for windows in _windows(shapes):
        total = torch.zeros(sum(window.numel for window in windows), dtype=torch.float64)
        for each, weight in used:
            total += weight * _read(opened[each.checkpoint.uri], kind_of(each.length), windows).double()
        for window, part in zip(windows, total.split([window.numel for window in windows]), strict=True):
            state[window.parameter].view(-1)[window.start : window.start + window.numel].copy_(part)
    return state
