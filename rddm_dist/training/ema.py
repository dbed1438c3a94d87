"""Exponential moving average of the weights, in fp32 on the pieces a rank holds: no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rddm_dist.config import EmaSection
from rddm_dist.training.engine import Piece


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
class Ema:
    """Averages of a rank's pieces, tensor by tensor.   averages[i]: (numel,) fp32, beside pieces[i].weight"""

    pieces: tuple[Piece, ...]
    averages: tuple[torch.Tensor, ...]

    @torch.no_grad()
    def update(self, step: int, settings: EmaSection) -> None:
        """ema <- ema + (1 - decay) (weight - ema) where `step` is due."""
        decay = ema_decay(step, settings)
        if decay is None:
            return
        weights = [piece.weight for piece in self.pieces]
        if decay == 0.0:
            torch._foreach_copy_(list(self.averages), weights)
        else:
            torch._foreach_lerp_(list(self.averages), weights, 1.0 - decay)

    def as_pieces(self) -> list[Piece]:
        """The averages in the form of pieces without moments."""
        return [
            replace(piece, weight=average, moments={})
            for piece, average in zip(self.pieces, self.averages, strict=True)
        ]


def make_ema(pieces: Sequence[Piece]) -> Ema:
    """Start from the weights as they are."""
    return Ema(tuple(pieces), tuple(piece.weight.clone() for piece in pieces))
