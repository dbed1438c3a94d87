"""Tables of a page: all scores with their intervals, the scores of each image, and the images that failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rddm_dist.evaluation.metrics import MetricInfo, metric_info
from rddm_dist.evaluation.wording import TIMES, decimals, in_order, interval, row_score
from rddm_dist.tracking.journal import json_safe

MAX_FAILED = 200  # more are in report.json
EXTRA_DIGITS = 3  # rows are embedded with that many decimals more than are shown, so that sorting stays true


def heading(info: MetricInfo) -> str:
    """Label and unit of a score."""
    return f"{info.label}, {info.unit}" if info.unit else info.label


def all_scores(report: Mapping[str, Any]) -> str:
    """A row for each score: mean, its interval, what the input had, spread, extremes, and the pooled value."""
    scores = report["scores"]
    if not scores:
        return ""
    names = [name for name in in_order(scores) if not (name.startswith("input_") and name[len("input_") :] in scores)]
    with_input = len(names) < len(scores)
    with_pooled = any(scores[name].get("pooled") is not None for name in names)
    heads = ["mean", "95 % interval", *(["input"] if with_input else []), "std", "lowest", "highest"]
    heads += ["pooled"] if with_pooled else []
    head = '<th class="text">score</th>' + "".join(f"<th>{name}</th>" for name in [*heads, "images"])
    body = ""
    for name in names:
        score, info = scores[name], metric_info(name)
        before = scores.get(f"input_{name}", {})
        cells = [decimals(score["mean"], info.digits), interval(score, info.digits) or "-"]
        cells += [decimals(before.get("mean"), info.digits)] if with_input else []
        cells += [decimals(score[part], info.digits) for part in ("std", "min", "max")]
        cells += [decimals(score.get("pooled"), info.digits)] if with_pooled else []
        cells.append(str(score["count"]))
        arrow = "higher is better" if info.better == "higher" else "lower is better"
        body += f'<tr><td class="text" title="{arrow}">{escape(heading(info))}</td>'
        body += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    pooled = " Pooled: over all pixels of all images at once." if with_pooled else ""
    note = (
        '<p class="note">Mean, interval and extremes are over the images whose value is finite; the interval is a '
        f"bootstrap over images.{pooled}</p>"
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def image_table(report: Mapping[str, Any]) -> str:
    """The scores of each image; rows are embedded as JSON and drawn a page at a time by the page's script.

    A row is [key, name or 0 where it is the key, width, height, score, ...]; null is a score that the image lacks.
    """
    images, scores = report["images"], report["scores"]
    names = [name for name in in_order(scores) if any(row_score(row, name) is not None for row in images)]
    if not names:
        return ""
    infos = [metric_info(name) for name in names]
    rows = [_embedded(row, names, infos) for row in images]
    data = json.dumps(json_safe({"digits": [info.digits for info in infos], "rows": rows}), separators=(",", ":"))
    heads = ["image", f"width {TIMES} height", *(heading(info) for info in infos)]
    head = "".join(
        f'<th scope="col"{" class=text" if index == 0 else ""}><button>{escape(text)}</button></th>'
        for index, text in enumerate(heads)
    )
    means = "".join(
        f"<td>{decimals(scores[name]['mean'], info.digits)}</td>" for name, info in zip(names, infos, strict=True)
    )
    return (
        '<div class="table-bar"><input type="search" placeholder="filter by name" aria-label="filter by name">'
        '<span class="count" role="status"></span>'
        '<button class="plain" data-page="-1">previous</button><button class="plain" data-page="1">next</button></div>'
        f'<div class="scroll"><table id="image-table" class="dense"><thead><tr>{head}</tr></thead><tbody></tbody>'
        f'<tfoot><tr><td class="text">mean</td><td></td>{means}</tr></tfoot></table></div>'
        "<noscript><p class=note>The table needs the script of this page; report.json holds the same.</p></noscript>"
        f'<script type="application/json" id="image-rows">{_inside_script(data)}</script>'
    )


def failed_table(failed: Sequence[Mapping[str, Any]]) -> str:
    """The images that have no scores, and why; "" for none."""
    if not failed:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(str(item.get("name") or item["key"]))}</td>'
        f'<td class="text">{escape(str(item.get("kind", "")))}</td>'
        f'<td class="text wide">{escape(str(item["error"]))}</td></tr>'
        for item in failed[:MAX_FAILED]
    )
    more = len(failed) - MAX_FAILED
    note = f'<p class="note">{more} more are in report.json.</p>' if more > 0 else ""
    head = "".join(f'<th class="text">{name}</th>' for name in ("image", "what", "error"))
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
        '<p class="note">These images are in no score above.</p>'
    )


def _embedded(row: Mapping[str, Any], names: Sequence[str], infos: Sequence[MetricInfo]) -> list[Any]:
    key, name = str(row["key"]), str(row.get("name") or row["key"])
    values = [row_score(row, name) for name in names]
    rounded = [
        None if value is None else round(value, info.digits + EXTRA_DIGITS)
        for value, info in zip(values, infos, strict=True)
    ]
    return [key, 0 if name == key else name, row["width"], row["height"], *rounded]


def _inside_script(text: str) -> str:
    """JSON that cannot end the <script> it stands in: every < as its escape."""
    return text.replace("<", "\\u003c")
