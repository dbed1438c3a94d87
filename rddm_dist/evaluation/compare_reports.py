"""Report files on their way into a comparison: read, checked field by field, and refused where they do not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ValidationError

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage import is_local, join, local_path, read_bytes, shown
from rddm_dist.evaluation.summary import FORMAT_VERSION, REPORT_JSON
from rddm_dist.evaluation.wording import flat, row_score

INPUT = "input"  # the row of doing nothing, and the prefix of its scores
LARGEST = 1e100  # no score is larger, and sums of larger ones overflow
EXPECTED = "give what rddm evaluate or rddm score wrote"
NETWORK_OF = {"fid": "features", "kid": "features", "is": "features"}  # set metrics; LPIPS may have a prefix or suffix


def plain(text: str) -> str:
    """Text of others on one line: what cannot be printed (line ends, terminal codes, direction marks) is a space."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


PlainText = Annotated[str, AfterValidator(plain)]


class Score(BaseModel):
    """A score over all images, as in report.json; low and high: its 95 % interval; std: of KID and IS."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    infinite: int = 0
    nan: int = 0
    pooled: float | None = None


class SetScore(BaseModel):
    """A score of the whole set of images; std: over its subsets or splits."""

    value: float | None
    std: float | None = None


class _Protocol(BaseModel, extra="allow"):
    name: PlainText


class _Data(BaseModel):
    targets_digest: PlainText = ""
    inputs_digest: PlainText = ""


class _Sampler(BaseModel):
    steps: int | None = None


class _Network(BaseModel):
    sha256: PlainText = ""


class _File(BaseModel):
    """The parts of report.json that a comparison reads."""

    kind: Literal["restoration", "files", "generation"]
    name: PlainText
    protocol: _Protocol
    scores: dict[PlainText, Score]
    distribution: dict[PlainText, SetScore] = {}
    networks: dict[str, _Network] = {}
    data: _Data
    sampler: _Sampler = _Sampler()
    images: list[dict[str, Any]]
    failed: list[dict[str, Any]] = []


@dataclass(frozen=True)
class ScoredReport:
    """A report as a comparison needs it.

    uri: where it was read; protocol: its description without what was computed; targets_digest, inputs_digest: name
    the sets of images by their pixels ("" where there are none); networks: sha256 by role;
    names, targets: of each image, its name and the sha256 of its target ("" where there is none); failed: names of
    the images without scores; columns: scores per image, (N,) float64 in the order of names, nan where one has none.
    """

    uri: str
    name: str
    kind: str
    protocol: Mapping[str, Any]
    targets_digest: str
    inputs_digest: str
    steps: int | None
    networks: Mapping[str, str]
    scores: Mapping[str, Score]
    distribution: Mapping[str, SetScore]
    names: tuple[str, ...]
    targets: tuple[str, ...]
    failed: tuple[str, ...]
    columns: Mapping[str, np.ndarray]


def load_report(uri: str) -> ScoredReport:
    """Read report.json, or the one in a folder.   uri: a file or folder, local or remote

    DataError in one line for what is no report, or one of another format.
    """
    is_file = local_path(uri).is_file() if is_local(uri) else uri.endswith(".json")
    place = uri if is_file else join(uri, REPORT_JSON)
    try:
        content = json.loads(read_bytes(place))
    except FileNotFoundError as error:
        raise DataError(f"there is no report {shown(place)}; give a report.json or the folder that holds it") from error
    except OSError as error:
        raise DataError(f"{shown(place)} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(place)} is not a report: it is no JSON; {EXPECTED}") from error
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise DataError(f"{shown(place)} is not a report: it has no format_version; {EXPECTED}")
    version = content["format_version"]
    if version < FORMAT_VERSION:
        raise DataError(
            f"{shown(place)} is of format {version} and lacks what a comparison needs; evaluate again to get format "
            f"{FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise DataError(f"{shown(place)} is of format {version} and this version reads {FORMAT_VERSION}; update rddm")
    try:
        return _scored(_File.model_validate(content), shown(place))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{shown(place)} is not a whole report: {plain(where)}: {first['msg']}; evaluate again"
        ) from error


def _scored(file: _File, uri: str) -> ScoredReport:
    protocol = {key: value for key, value in file.protocol.model_dump().items() if key != "metrics"}
    return ScoredReport(
        uri=uri,
        name=file.name or uri,
        kind=file.kind,
        protocol=protocol,
        targets_digest=file.data.targets_digest,
        inputs_digest=file.data.inputs_digest,
        steps=file.sampler.steps,
        networks={role: network.sha256 for role, network in file.networks.items()},
        scores=file.scores,
        distribution=file.distribution,
        names=tuple(_image_name(row) for row in file.images),
        targets=tuple(str(row.get("target_sha256") or "") for row in file.images),
        failed=tuple(_image_name(row) for row in file.failed),
        columns={name: _column(file.images, name, uri) for name in file.scores},
    )


def _image_name(row: Mapping[str, Any]) -> str:
    return str(row.get("name") or row.get("key") or "")


def _column(rows: Sequence[Mapping[str, Any]], name: str, uri: str) -> np.ndarray:
    values = np.full(len(rows), np.nan)
    for place, row in enumerate(rows):
        try:
            value = row_score(row, name)
            if value is not None and LARGEST < abs(value) < math.inf:
                raise OverflowError(f"{value} is larger than any score")
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{uri} is not a whole report: {plain(name)} of image {place} is no number; evaluate again"
            ) from error
        if value is not None:
            values[place] = value
    return values


def distinct_names(reports: Sequence[ScoredReport]) -> list[ScoredReport]:
    """The reports with a name of its own each: a name that comes twice, or "input", is followed by the path."""
    seen: dict[str, str] = {}
    for report in reports:
        place = str(local_path(report.uri).resolve()) if is_local(report.uri) else report.uri
        if place in seen:
            other = f", also as {seen[place]}" if seen[place] != report.uri else ""
            raise ConfigError(f"{report.uri} is given twice{other}; give each report once")
        seen[place] = report.uri
    taken = [INPUT, *(report.name for report in reports)]
    return [
        replace(report, name=f"{report.name} ({plain(report.uri)})") if taken.count(report.name) > 1 else report
        for report in reports
    ]


def check_comparable(reports: Sequence[ScoredReport]) -> None:
    """Raise ConfigError unless all reports are of one protocol, in every part of it, and of the same images.

    That is of the same targets and, where both have inputs (files may be scored without), of the same inputs.
    """
    first = reports[0]
    for other in reports[1:]:
        names = [report.protocol["name"] for report in (first, other)]
        if names[0] != names[1]:
            raise ConfigError(
                f"{first.uri} is scored by protocol {names[0]} and {other.uri} by {names[1]}: scores of different "
                "protocols are not compared; score both by one (--protocol)"
            )
        if first.protocol != other.protocol:
            raise ConfigError(
                f"{first.uri} and {other.uri} name protocol {names[0]} and mean different things by it: "
                f"{_first_part_that_differs(first.protocol, other.protocol)}; evaluate both with one version of rddm"
            )
        if first.targets_digest != other.targets_digest:
            raise ConfigError(
                f"{first.uri} and {other.uri} are of different data (targets {_short(first.targets_digest)} and "
                f"{_short(other.targets_digest)}); compare scores of the same images only"
            )
    having = [report for report in reports if report.inputs_digest]
    for other in having[1:]:
        if other.inputs_digest != having[0].inputs_digest:
            raise ConfigError(
                f"{having[0].uri} and {other.uri} are of different data (inputs {_short(having[0].inputs_digest)} and "
                f"{_short(other.inputs_digest)}); compare restorations of the same inputs only"
            )


def check_networks(reports: Sequence[ScoredReport], metrics: Sequence[str]) -> None:
    """Raise ConfigError where a metric is shown that different feature networks computed."""
    for metric in metrics:
        role = network_role(metric)
        found = [(report, report.networks.get(role, "")) for report in reports if has_metric(report, metric)]
        for report, digest in found[1:] if role else ():
            if digest != found[0][1]:
                raise ConfigError(
                    f"{found[0][0].uri} and {report.uri} have {metric} of different networks "
                    f"({_short(found[0][1])} and {_short(digest)}); evaluate both with "
                    "one file, or leave it out with --metrics"
                )


def network_role(metric: str) -> str:
    """Which network of a report the metric depends on: "lpips", "features", or "" for none."""
    return "lpips" if "lpips" in metric else NETWORK_OF.get(metric, "")


def has_metric(report: ScoredReport, metric: str) -> bool:
    """Whether the report has the metric, of pairs or of the whole set."""
    return metric in report.scores or metric in report.distribution


def _first_part_that_differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    parts, others = dict(flat(a)), dict(flat(b))
    for key in sorted({*parts, *others}):
        if parts.get(key) != others.get(key):
            texts = (shorten(plain(text), 80) for text in (parts.get(key, "nothing"), others.get(key, "nothing")))
            return f"{plain(key)} is {' and '.join(texts)}"
    return "they are written in different ways"


def _short(digest: str) -> str:
    return digest[:12] or "unknown"
