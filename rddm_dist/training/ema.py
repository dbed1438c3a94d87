"""Moving averages of the weights, in fp32 on the pieces a rank holds: no communication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rddm_dist.config import EmaSection
from rddm_dist.training.engine import Piece
from rddm_dist.training.posthoc import power_decay

PUBLISHED = "ema"


def ema_decay(step: int, settings: EmaSection) -> float | None:
    """Decay of the update after optimizer step `step` (1, 2, ...); 0 copies the weights, None: no update here.

    The rule of the published training, as a function of the step alone. With n = step - 1 updates happen where
    n mod update_every = 0; they copy up to the first n > start_step, then use min(decay, 1 - (1 + e)^-power) with
    e = step - start_step - 1.
    """
    n = step - 1
    if n % settings.update_every:
        return None
    first_blend = (settings.start_step // settings.update_every + 1) * settings.update_every
    if n <= first_blend:
        return 0.0
    elapsed = step - settings.start_step - 1
    return min(settings.decay, 1.0 - (1.0 + elapsed) ** -settings.power)


@dataclass(frozen=True)
class Profile:
    """What an average gives to which steps.

    kind: the name of its tensors in checkpoints, `ema` for the published rule, `ema-0.05` for a relative length
    decay: of the update after optimizer step 1, 2, ...; 0 copies the weights, None: no update at this step
    """

    kind: str
    decay: Callable[[int], float | None]


def kind_of(length: float) -> str:
    """The kind of the power-function average of relative length `length`."""
    return f"{PUBLISHED}-{length:g}"


def profiles(settings: EmaSection) -> tuple[Profile, ...]:
    """The published rule, then a power-function profile for each of `settings.lengths`."""
    published = Profile(PUBLISHED, partial(ema_decay, settings=settings))
    return (published, *(Profile(kind_of(length), partial(power_decay, length=length)) for length in settings.lengths))


@dataclass(frozen=True)
class Ema:
    """Averages of a rank's pieces, profile by profile.   averages[k][i]: (numel,) fp32, beside pieces[i].weight"""

    pieces: tuple[Piece, ...]
    profiles: tuple[Profile, ...]
    averages: tuple[tuple[Tensor, ...], ...]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """ema <- ema + (1 - decay) (weight - ema) in each profile that is due after optimizer step `step`."""
        weights = [piece.weight for piece in self.pieces]
        for profile, averages in zip(self.profiles, self.averages, strict=True):
            decay = profile.decay(step)
            if decay is None:
                continue
            if decay == 0.0:
                torch._foreach_copy_(list(averages), weights)
            else:
                torch._foreach_lerp_(list(averages), weights, 1.0 - decay)

    def as_pieces(self, kind: str = PUBLISHED) -> list[Piece]:
        """The averages of one profile in the form of pieces without moments; ValueError for a kind that is not kept."""
        index = [profile.kind for profile in self.profiles].index(kind)
        return [
            replace(piece, weight=average, moments={})
            for piece, average in zip(self.pieces, self.averages[index], strict=True)
        ]


def make_ema(pieces: Sequence[Piece], profiles: Sequence[Profile]) -> Ema:
    """Start every profile from the weights as they are."""
    averages = tuple(tuple(piece.weight.clone() for piece in pieces) for _ in profiles)
    return Ema(tuple(pieces), tuple(profiles), averages)
