"""Degradations by name: the text a user writes, checked, and the chain of links it stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline import degrade
from data_pipeline.errors import ConfigError
from data_pipeline.masks import MASK_KINDS, make_masks
from data_pipeline.rng import mix_seed, uniform

KEY = "--degrade / data.degrade"
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
LINK = re.compile(r"\s*(?P<kind>\w+)\s*(\((?P<options>[^()]*)\))?\s*")


@dataclass(frozen=True)
class Span:
    """A number, or a range that every sample draws its own from, uniformly.   low <= high"""

    low: float
    high: float

    def __str__(self) -> str:
        return _text(self.low) if self.low == self.high else f"{_text(self.low)}..{_text(self.high)}"


@dataclass(frozen=True)
class Number:
    """A parameter that is a number or a range.   default; lowest, highest: what is allowed; is_whole: no fractions"""

    default: Span
    lowest: float
    highest: float
    is_whole: bool = False

    def parse(self, text: str) -> Span:
        """Read "a" or "a..b"; raises ValueError that says what is allowed."""
        low, dots, high = text.partition("..")
        ends = [low.strip(), high.strip() if dots else low.strip()]
        if all(NUMBER.fullmatch(end) for end in ends):
            span = Span(float(ends[0]), float(ends[1]))
            is_fit = all(not self.is_whole or end.is_integer() for end in (span.low, span.high))
            if is_fit and self.lowest <= span.low <= span.high <= self.highest:
                return span
        kind = "a whole number" if self.is_whole else "a number"
        raise ValueError(f"{kind} or a range low..high within {_text(self.lowest)}..{_text(self.highest)}")

    def draw(self, span: Span, numbers: Tensor) -> Tensor:
        """Values of the span.   numbers: (B,) float64 in [0, 1)  ->  (B,) float64"""
        if self.is_whole:
            return span.low + (numbers * (span.high - span.low + 1.0)).floor()
        return (span.low + numbers * (span.high - span.low)).clamp(max=span.high)


@dataclass(frozen=True)
class Choice:
    """A parameter that is one of a few words."""

    default: str
    names: tuple[str, ...]

    def parse(self, text: str) -> str:
        """Read a word; raises ValueError that says what is allowed."""
        if text in self.names:
            return text
        raise ValueError(f"one of {', '.join(self.names)}{_hint(text, self.names)}")


@dataclass(frozen=True)
class Kind:
    """What a name stands for.   reach: pixels of context for given upper ends of its parameters"""

    function: Callable[..., Tensor]
    parameters: Mapping[str, Number | Choice]
    is_random: bool = False
    reach: Callable[[Mapping[str, float]], int] = lambda _: 0


def _number(
    default: float, lowest: float, highest: float, *, to: float | None = None, is_whole: bool = False
) -> Number:
    return Number(Span(default, default if to is None else to), lowest, highest, is_whole)


KINDS: Mapping[str, Kind] = {
    "noise": Kind(degrade.gaussian_noise, {"sigma": _number(25, 0, 255)}, is_random=True),
    "poisson": Kind(degrade.poisson_noise, {"peak": _number(60, 1, 1e6)}, is_random=True),
    "rain": Kind(
        degrade.rain,
        {
            "density": _number(0.01, 0, 0.5),
            "length": _number(21, 1, 255, is_whole=True),
            "strength": _number(0.8, 0, 2),
            "max_angle": _number(25, 0, 60),
        },
        is_random=True,
    ),
    "blur": Kind(
        degrade.gaussian_blur, {"sigma": _number(2, 0, 50)}, reach=lambda most: degrade.blur_reach(most["sigma"])
    ),
    "motion": Kind(
        degrade.motion_blur,
        {"length": _number(15, 1, 255), "angle": _number(0, -180, 180, to=180)},
        reach=lambda most: degrade.motion_reach(most["length"]),
    ),
    "lowlight": Kind(
        degrade.lowlight,
        {"gamma": _number(2, 1, 10, to=3), "scale": _number(0.5, 0, 1, to=0.9), "sigma": _number(5, 0, 255)},
        is_random=True,
    ),
    "jpeg": Kind(degrade.jpeg, {"quality": _number(50, 1, 100, is_whole=True)}),
    "inpaint": Kind(degrade.fill_holes, {"mask": Choice("center", MASK_KINDS), "fill": _number(0.5, 0, 1)}),
}


@dataclass(frozen=True)
class Link:
    """One degradation of a chain.   values: in the order of its kind's parameters"""

    kind: str
    values: tuple[Span | str, ...]

    @property
    def spec(self) -> str:
        """Its text, with every parameter."""
        options = ", ".join(
            f"{name}={value}" for name, value in zip(KINDS[self.kind].parameters, self.values, strict=True)
        )
        return f"{self.kind}({options})"

    @property
    def reach(self) -> int:
        """Pixels of context that a window needs on each side."""
        names = KINDS[self.kind].parameters
        most = {name: value.high for name, value in zip(names, self.values, strict=True) if isinstance(value, Span)}
        return KINDS[self.kind].reach(most)

    def apply(self, images: Tensor, *, seed: int, ids: Tensor, margin: int) -> tuple[Tensor, Tensor | None]:
        """Degrade.   images: (B, H, W, 3) float32; ids: (B,) int64  ->  the same, and (B, H, W) uint8 masks if any

        margin: pixels of context on each side, which get no holes.
        """
        kind = KINDS[self.kind]
        values = self._draw(seed, ids)
        if "mask" in values:
            height, width = images.shape[1] - 2 * margin, images.shape[2] - 2 * margin
            holes = make_masks(values.pop("mask"), seed=seed, ids=ids, height=height, width=width)
            holes = torch.nn.functional.pad(holes, (margin,) * 4)
            return kind.function(images, holes, **values), holes
        counters = {"seed": seed, "ids": ids} if kind.is_random else {}
        return kind.function(images, **values, **counters), None

    def _draw(self, seed: int, ids: Tensor) -> dict[str, Any]:
        """The parameters of this batch: a word, a number, or (B,) float64 numbers where there is a range."""
        parameters = KINDS[self.kind].parameters
        is_fixed = all(isinstance(value, str) or value.low == value.high for value in self.values)
        numbers = None if is_fixed else uniform(seed, f"{self.kind}_parameters", ids, count=len(parameters))
        drawn: dict[str, Any] = {}
        for index, ((name, parameter), value) in enumerate(zip(parameters.items(), self.values, strict=True)):
            if numbers is not None and isinstance(parameter, Number) and isinstance(value, Span):
                drawn[name] = parameter.draw(value, numbers[:, index])
            else:
                drawn[name] = value.low if isinstance(value, Span) else value
        return drawn


@dataclass(frozen=True)
class Degradation:
    """A chain of degradations, applied from left to right."""

    links: tuple[Link, ...]

    @property
    def spec(self) -> str:
        """The canonical text: every parameter spelled out; parse_degradation gives the same chain back."""
        return "+".join(link.spec for link in self.links)

    @property
    def has_mask(self) -> bool:
        """Whether the chain makes holes, and so masks."""
        return any(link.kind == "inpaint" for link in self.links)

    @property
    def reach(self) -> int:
        """Pixels of context that a window needs on each side, to look like a window of the degraded whole."""
        return sum(link.reach for link in self.links)

    def apply(
        self, images: np.ndarray, *, seed: int, ids: np.ndarray | Tensor, margin: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Degrade a batch.   images: (B, H, W, 3) uint8; ids: (B,) int64, what a row's random numbers belong to
        ->  inputs (B, H, W, 3) uint8, and masks (B, H, W, 1) uint8, 255 in the holes of any link, None without

        margin: pixels on each side that are only context, `reach` or more of them for windows; results come without.
        A row depends on (seed, its id, its pixels) alone. Values are clipped and rounded once, after the last link.
        Raises DataError where the images are too small for a mask.
        """
        ids = ids if isinstance(ids, Tensor) else torch.from_numpy(np.array(ids, np.int64))
        pixels, masks = degrade.to_images(images), None
        for index, link in enumerate(self.links):
            # Context goes as soon as no later link looks at it: random numbers are drawn for windows, not for margins.
            needed = min(sum(later.reach for later in self.links[index:]), margin)
            pixels, masks = _trim(pixels, margin - needed), None if masks is None else _trim(masks, margin - needed)
            margin = needed
            # A kind's first link draws as if it were alone; a second one has counters of its own.
            is_first = all(link.kind != earlier.kind for earlier in self.links[:index])
            link_seed = seed if is_first else mix_seed(seed, "degradation", index)
            pixels, holes = link.apply(pixels, seed=link_seed, ids=ids, margin=margin)
            if holes is not None:
                masks = holes if masks is None else torch.maximum(masks, holes)
        inputs = degrade.to_pixels(_trim(pixels, margin)).numpy()
        return inputs, None if masks is None else _trim(masks, margin)[..., None].numpy()


def _trim(images: Tensor, margin: int) -> Tensor:
    """(B, H, W, ...) without `margin` pixels on each side"""
    return images[:, margin : images.shape[1] - margin, margin : images.shape[2] - margin] if margin else images


def parse_degradation(text: str) -> Degradation:
    """Read a chain such as "blur(sigma=1..3)+noise(sigma=2..10)+jpeg(quality=60..95)".

    A link is the name of a kind (see KINDS) with parameters in brackets; what is not given has its default; a range
    low..high is drawn from for each sample. Raises ConfigError for anything else.
    """
    links, position = [], 0
    if not text.strip():
        raise _fault(text, f"nothing given; write for example noise(sigma=25)+jpeg; kinds: {', '.join(KINDS)}")
    while True:
        match = LINK.match(text, position)
        if match is None:
            raise _fault(text, f"a kind is missing at character {position + 1}; kinds: {', '.join(KINDS)}")
        links.append(_parse_link(text, match["kind"], match["options"] or ""))
        position = match.end()
        if position == len(text):
            return Degradation(tuple(links))
        if text[position] != "+":
            raise _fault(text, f"cannot read {text[position:]!r}; write kind(name=value, ...), joined by +")
        position += 1


def _parse_link(text: str, name: str, options: str) -> Link:
    if name not in KINDS:
        raise _fault(text, f"{name} is not known{_hint(name, KINDS)}; kinds: {', '.join(KINDS)}")
    parameters = KINDS[name].parameters
    given: dict[str, Span | str] = {}
    for option in options.split(",") if options.strip() else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        allowed = f"{name} takes {', '.join(parameters)}"
        if not equals:
            raise _fault(text, f"{option.strip()!r} is not name=value; {allowed}")
        if key not in parameters:
            raise _fault(text, f"{name} has no parameter {key!r}{_hint(key, parameters)}; {allowed}")
        if key in given:
            raise _fault(text, f"{key} is given twice to {name}; keep one")
        try:
            given[key] = parameters[key].parse(value)
        except ValueError as error:
            raise _fault(text, f"{key}={value!r} does not fit {name}; give {error}") from None
    return Link(name, tuple(given.get(key, parameter.default) for key, parameter in parameters.items()))


def _fault(text: str, problem: str) -> ConfigError:
    return ConfigError(f"{KEY}={text!r}: {problem}")


def _hint(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _text(value: float) -> str:
    """The shortest text that reads back as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
