"""Comparisons: what may stand in one table, what the table says, and that names of others stay text in every format."""

from __future__ import annotations

import csv
import hashlib
import html.parser
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.cli import compare as command
from rddm_dist.evaluation.compare import Comparison, compare, pair_images
from rddm_dist.evaluation.compare_formats import RENDERERS, caption, difference_grid, output_format, render, score_grid
from rddm_dist.evaluation.compare_reports import ScoredReport, load_report
from rddm_dist.evaluation.statistics import bootstrap_mean, paired_difference
from rddm_dist.tracking.journal import json_safe

EVIL = '<script>alert("x")</script> | a&b_c%d$e#f~g^h{i}j\\k `l` *m* [n](o), p\nq'
INPUTS = [20.0, 22.0, 25.0, 21.0]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def summary(values: Sequence[float]) -> dict[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = bootstrap_mean(finite) or (None, None)
    infinite, nan = sum(map(math.isinf, values)), sum(map(math.isnan, values))
    mean = math.fsum(finite) / len(finite) if finite else None
    return {"mean": mean, "low": low, "high": high, "count": len(finite), "infinite": infinite, "nan": nan}


def report(
    psnr: Sequence[float] = (30.0, 31.0, 33.0, 28.0), name: str = "ours", *, keys: str = "abcd", **parts: Any
) -> dict[str, Any]:
    """The object of report.json; image i has the target named by character i of "ABCD", whatever its key."""
    columns = {"psnr": list(psnr), "mae": [60 - value for value in psnr], "input_psnr": INPUTS[: len(psnr)]}
    columns |= parts.pop("columns", {})
    images = [
        {"key": key, "name": f"{key}.png", "width": 24, "height": 16, "target_sha256": sha("ABCD"[place])}
        | {metric: values[place] for metric, values in columns.items()}
        for place, key in enumerate(keys[: len(psnr)])
    ]
    return {
        "format_version": 2,
        "kind": "restoration",
        "name": name,
        "protocol": {"name": "rgb", "color": "rgb", "summary": "8-bit RGB at native size", "metrics": ["psnr", "mae"]},
        "scores": {metric: summary(values) for metric, values in columns.items()},
        "distribution": {},
        "networks": {},
        "model": {"path": "somewhere"},
        "data": {"uri": "data/eval", "targets_digest": "ab" * 32},
        "sampler": {"steps": 5},
        "eval": {},
        "images": images,
        "failed": [],
    } | parts


def without_input(value: dict[str, Any]) -> dict[str, Any]:
    """As of files scored without --input."""
    images = [{key: item for key, item in row.items() if key != "input_psnr"} for row in value["images"]]
    scores = {key: item for key, item in value["scores"].items() if key != "input_psnr"}
    return value | {"kind": "files", "sampler": {}, "scores": scores, "images": images}


def generation(name: str, fid: float, *, count: int = 4, digest: str = "net") -> dict[str, Any]:
    return report(name=name) | {
        "kind": "generation",
        "protocol": {"name": "generation", "summary": "no pairs", "metrics": ["fid", "kid"]},
        "scores": {},
        "distribution": {"fid": {"value": fid}, "kid": {"value": 0.1, "std": 0.01}},
        "networks": {"features": {"name": "inception", "sha256": digest}},
        "images": [{"key": f"{i}", "name": f"{i}.png", "width": 8, "height": 8} for i in range(count)],
    }


def save(path: Path, value: Mapping[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json_safe(value)))
    return str(path)


def load(folder: Path, *values: Mapping[str, Any]) -> list[ScoredReport]:
    return [load_report(save(folder / str(place) / "report.json", value)) for place, value in enumerate(values)]


def compared(folder: Path, *values: Mapping[str, Any], **options: Any) -> Comparison:
    return compare(load(folder, *values), **options)


BETTER, WORSE = (31.0, 31.5, 33.0, 29.0), (29.0, 30.0, 33.0, 27.5)


def test_a_folder_and_its_file_are_the_same_report(tmp_path: Path) -> None:
    uri = save(tmp_path / "report.json", report())
    a, b = load_report(uri), load_report(str(tmp_path))
    assert (a.uri, a.name, a.names, a.steps) == (b.uri, b.name, b.names, b.steps)
    assert a.columns["psnr"].tolist() == b.columns["psnr"].tolist() == [30.0, 31.0, 33.0, 28.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not a report: it is no JSON"),
        (b"{", "not a report: it is no JSON"),
        (b"[" * 100_000, "not a report: it is no JSON"),
        (b"[]", "no format_version"),
        (b'{"a": 1}', "no format_version"),
        (b'{"format_version": 1, "images": []}', "of format 1.*evaluate again"),
        (b'{"format_version": 3}', "of format 3.*update rddm"),
        (b'{"format_version": 2}', "not a whole report: kind: Field required"),
        (json.dumps(report(kind="input")).encode(), "not a whole report: kind"),
        (json.dumps(report(scores={"psnr": {"mean": "x"}})).encode(), r"not a whole report: scores\.psnr\.mean"),
        (json.dumps(report(images=[{"psnr": [1]}])).encode(), "psnr of image 0 is no number"),
        (json.dumps(report(images=[{"psnr": 10**400}])).encode(), "psnr of image 0 is no number"),
        (json.dumps(report(images=[{"psnr": -1e308}])).encode(), "psnr of image 0 is no number"),
        (json.dumps(report(scores={"psnr": {"mean": 10**400}})).encode(), r"not a whole report: scores\.psnr\.mean"),
    ],
)
def test_what_is_no_report_of_this_format_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_report(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path / "report.json") in str(caught.value)


def test_a_report_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no report .*nowhere.*report\.json"):
        load_report(str(tmp_path / "nowhere"))


def test_scores_of_different_protocols_are_refused_naming_both(tmp_path: Path) -> None:
    other = report() | {"protocol": {"name": "y", "color": "y", "metrics": []}}
    with pytest.raises(ConfigError, match=r"0/report\.json is scored by protocol rgb and .*1/report\.json by y: "):
        compared(tmp_path, report(), other)


def test_a_protocol_that_differs_in_a_part_is_refused_naming_the_part(tmp_path: Path) -> None:
    other = report()
    other["protocol"] = {**other["protocol"], "color": "linear rgb"}
    with pytest.raises(
        ConfigError, match=r"0/report\.json and .*1/report\.json name protocol rgb .*color is rgb and linear"
    ):
        compared(tmp_path, report(), other)


def test_reports_may_differ_in_what_was_computed(tmp_path: Path) -> None:
    other = report(BETTER, "other", columns={"ssim": [0.9] * 4})
    other["protocol"] = {**other["protocol"], "metrics": ["psnr", "ssim"]}
    found = compared(tmp_path, report(), other)
    assert found.metrics == ("psnr", "mae", "ssim")
    ours, theirs = found.rows[1:]
    assert ours.cells[2].value is None and theirs.cells[2].value == pytest.approx(0.9)
    assert theirs.differences[2] is None and theirs.differences[0] is not None


def test_reports_of_different_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"different data \(targets abababababab and cdcdcdcdcdcd\)"):
        compared(tmp_path, report(), report(data={"targets_digest": "cd" * 32}))


def test_reports_of_different_inputs_are_refused_naming_both(tmp_path: Path) -> None:
    data = report()["data"]
    noisy, noisier = (report(data=data | {"inputs_digest": digit * 64}) for digit in "56")
    with pytest.raises(
        ConfigError,
        match=r"0/report\.json and .*1/report\.json are of different data \(inputs 555555555555 and 666666666",
    ):
        compared(tmp_path, noisy, noisier)
    without = without_input(report(BETTER, "files", data=data | {"inputs_digest": ""}))
    with pytest.raises(ConfigError, match=r"1/report\.json and .*3/report\.json are of different data \(inputs 5"):
        compared(tmp_path, without, noisy, noisy, noisier)
    assert [row.name for row in compared(tmp_path, without, noisy).rows] == ["input", "files", "ours"]


def test_metrics_of_different_networks_are_refused_where_they_are_shown(tmp_path: Path) -> None:
    values = [
        report(name=name, columns={"lpips": [0.1] * 4}, networks={"lpips": {"sha256": name}}) for name in ("one", "two")
    ]
    with pytest.raises(ConfigError, match=r"have lpips of different networks \(one and two\)"):
        compared(tmp_path, *values)
    assert compared(tmp_path, *values, metrics=["psnr"]).metrics == ("psnr",)
    with pytest.raises(ConfigError, match="have fid of different networks"):
        compared(tmp_path, generation("a", 3.0), generation("b", 4.0, digest="another"))
    without = report(name="three")  # no LPIPS at all: nothing that could differ
    assert compared(tmp_path, values[0], without).metrics == ("psnr", "mae", "lpips")


def test_a_report_given_twice_is_refused_and_one_name_twice_gets_its_path(tmp_path: Path) -> None:
    first, second = load(tmp_path, report(), report(BETTER))
    with pytest.raises(ConfigError, match="is given twice"):
        compare([first, first])
    names = [row.name for row in compare([first, second]).rows]
    assert names == ["input", f"ours ({first.uri})", f"ours ({second.uri})"]


def test_a_report_given_in_two_spellings_is_given_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "sc" / "NIMA" / "report.json", report())
    (tmp_path / "link").symlink_to(tmp_path / "sc")
    monkeypatch.chdir(tmp_path)
    spellings = ("./sc/NIMA", "sc/../sc/NIMA/report.json", str(tmp_path / "sc/NIMA"), "link/NIMA/")
    for spelling in (*spellings, f"file://{tmp_path}/sc/NIMA"):
        with pytest.raises(ConfigError, match=r"report\.json is given twice"):
            compare([load_report("sc/NIMA"), load_report(spelling)])


def test_a_method_called_input_is_told_apart_from_the_input(tmp_path: Path) -> None:
    names = [row.name for row in compared(tmp_path, report(name="input")).rows]
    assert names[0] == "input" and names[1].startswith("input (")


def test_the_best_value_of_a_metric_is_marked_by_its_direction(tmp_path: Path) -> None:
    found = compared(tmp_path, report(WORSE, "worse"), report(BETTER, "better"), report(BETTER, "equal"))
    assert found.metrics == ("psnr", "mae")
    marks = {row.name: [cell.is_best for cell in row.cells] for row in found.rows}
    assert marks == {"input": [False] * 2, "worse": [False] * 2, "better": [True] * 2, "equal": [True] * 2}


def test_a_method_that_failed_on_images_is_not_marked_best_for_being_spared_them(tmp_path: Path) -> None:
    spared = report((40.0, 41.0, 42.0), "spared")  # on the image that is hard for everybody
    spared["failed"] = [{"key": "d", "name": "d.png", "kind": "not finite", "error": "..."}]
    found = compared(tmp_path, report(WORSE, "worse"), spared, report(BETTER, "better"))
    marks = {row.name: [cell.is_best for cell in row.cells] for row in found.rows}
    assert marks == {"worse": [False] * 2, "spared": [False] * 2, "better": [True] * 2}
    assert "Not marked as best where others have scores of more images: spared." in found.notes
    alone = compared(tmp_path, report(WORSE, "worse"), spared)
    assert not any(cell.is_best for row in alone.rows for cell in row.cells)


def test_the_most_images_of_a_column_are_those_of_rows_that_have_it(tmp_path: Path) -> None:
    fewer = [report(psnr[:3], name, columns={"ssim": ssim}) for psnr, name, ssim in (
        (WORSE, "worse", [0.8] * 3), (BETTER, "better", [0.9] * 3))]  # fmt: skip
    found = compared(tmp_path, report(WORSE, "whole"), *fewer, metrics=["psnr", "ssim"])
    assert [[cell.is_best for cell in row.cells] for row in found.rows if row.kind != "input"] == [
        [False, False],
        [False, False],
        [False, True],
    ]


def test_the_input_is_never_the_best(tmp_path: Path) -> None:
    found = compared(tmp_path, report((5.0, 6.0, 7.0, 8.0), "bad"), report((4.0, 5.0, 6.0, 7.0), "worse"))
    assert [row.cells[0].is_best for row in found.rows] == [False, True, False]


def test_differences_are_those_of_the_paired_images(tmp_path: Path) -> None:
    found = compared(tmp_path, report(WORSE, "base"), report(BETTER, "other"))
    row = found.rows[2]
    assert (row.pairing, found.baseline) == ("name", "base")
    assert row.differences == (
        paired_difference(BETTER, WORSE),
        paired_difference([60 - x for x in BETTER], [60 - x for x in WORSE], better="lower"),
    )
    assert row.differences[0] is not None and row.differences[1] is not None
    assert (row.differences[0].better, row.differences[0].equal) == (row.differences[1].better, 1) == (3, 1)
    assert found.rows[1].differences == (None, None) and found.rows[1].is_baseline


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_images_are_paired_whatever_their_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    other = report(BETTER, "other")
    other["images"] = [other["images"][place] for place in order]
    found = compared(tmp_path, report(WORSE, "base"), other)
    assert found.rows[2].differences[0] == paired_difference(BETTER, WORSE)


def test_other_names_are_paired_by_target(tmp_path: Path) -> None:
    found = compared(tmp_path, report(WORSE, "base"), report(BETTER, "other", keys="wxyz"))
    assert found.rows[2].pairing == "target"
    assert found.rows[2].differences[0] == paired_difference(BETTER, WORSE)
    assert "Paired by target, as names of images differ: other." in found.notes


def test_equal_names_of_other_images_do_not_pair_them(tmp_path: Path) -> None:
    shuffled = report(BETTER, "other", keys="badc")  # "b.png" is here what "a.png" is there
    a, b = load(tmp_path, report(WORSE, "base"), shuffled)
    how, mine, theirs = pair_images(a, b)
    assert how == "target"
    assert [a.targets[i] for i in mine] == [b.targets[j] for j in theirs]
    assert len(mine) == 4


def test_other_names_with_a_target_that_comes_twice_are_not_paired(tmp_path: Path) -> None:
    values = [report(WORSE, "base"), report(BETTER, "other", keys="wxyz")]
    for value in values:
        value["images"][1]["target_sha256"] = value["images"][0]["target_sha256"]
    found = compared(tmp_path, *map(without_input, values))
    assert found.rows[1].differences == (None, None)
    assert any(note.startswith("No difference to base") and note.endswith(": other.") for note in found.notes)
    assert difference_grid(found) is None


def test_an_image_that_failed_on_one_side_is_left_out_of_the_pairs_and_told(tmp_path: Path) -> None:
    failing = report(BETTER[:3], "failing")
    failing["failed"] = [{"key": "d", "name": "d.png", "kind": "not finite", "error": "..."}]
    found = compared(tmp_path, report(WORSE, "base"), failing, metrics=["psnr"])
    row = found.rows[-1]
    assert (row.failed, row.images, row.pairing) == (1, 3, "name")
    assert row.differences[0] == paired_difference(BETTER[:3], WORSE[:3])
    assert "failing has no scores for 1 image that failed." in found.notes


def test_images_restored_exactly_are_told_and_left_out(tmp_path: Path) -> None:
    exact = report((math.inf, *BETTER[1:]), "exact", columns={"mae": [0.0] * 4})
    found = compared(tmp_path, report(WORSE, "base"), exact)
    difference = found.rows[2].differences[0]
    assert difference is not None and (difference.count, difference.left_out) == (3, 1)
    assert "exact: values left out of the mean PSNR: 1 infinite." in found.notes


def test_the_input_stands_in_a_row_of_its_own(tmp_path: Path) -> None:
    row = compared(tmp_path, without_input(report(BETTER, "files")), report(WORSE, "ours")).rows[0]
    assert (row.name, row.steps, row.images) == ("input", None, 4)
    assert row.cells[0].value == pytest.approx(22.0) and row.cells[1].value is None
    assert row.differences[0] == paired_difference(INPUTS, BETTER)


def test_inputs_that_differ_have_no_row(tmp_path: Path) -> None:
    other = report(BETTER, "other", columns={"input_psnr": [1.0] * 4})
    found = compared(tmp_path, report(), other)
    assert [row.name for row in found.rows] == ["ours", "other"]
    assert "No row of the input: ours and other differ in its PSNR." in found.notes


def test_an_input_scored_without_the_images_that_failed_has_no_row_and_the_reason_is_told(tmp_path: Path) -> None:
    failing = report(BETTER[:3], "failing")
    failing["failed"] = [{"key": "d", "name": "d.png", "kind": "not finite", "error": "..."}]
    found = compared(tmp_path, report(WORSE, "base"), failing)
    assert [row.name for row in found.rows] == ["base", "failing"]
    assert "No row of the input: base and failing differ in its PSNR, as other images failed." in found.notes


def test_reports_without_inputs_have_no_row_of_them(tmp_path: Path) -> None:
    found = compared(tmp_path, without_input(report()), without_input(report(BETTER, "other")))
    assert [(row.name, row.steps) for row in found.rows] == [("ours", None), ("other", None)]
    assert found.notes == ()


def test_the_baseline_may_be_any_row(tmp_path: Path) -> None:
    values = [report(WORSE, "base"), report(BETTER, "other")]
    turned = compared(tmp_path, *values, baseline="other").rows[1].differences[0]
    assert turned == paired_difference(WORSE, BETTER)
    gains = compared(tmp_path, *values, baseline="input").rows[2].differences[0]
    assert gains == paired_difference(BETTER, INPUTS)
    with pytest.raises(ConfigError, match="--baseline nobody names 0 of the reports; choose one of base, other, input"):
        compared(tmp_path, *values, baseline="nobody")
    with pytest.raises(ConfigError, match="--baseline ours names 2 of the reports"):
        compared(tmp_path, report(), report(BETTER), baseline="ours")


def test_metrics_are_chosen_by_name(tmp_path: Path) -> None:
    values = [report(name=name) for name in ("ours", "other")]
    for value in values:
        value["scores"]["gain_db"] = summary([a - b for a, b in zip((30.0, 31.0, 33.0, 28.0), INPUTS, strict=True)])
    assert compared(tmp_path, *values).metrics == ("psnr", "mae")
    assert compared(tmp_path, *values, metrics=["gain_db", "psnr"]).metrics == ("gain_db", "psnr")
    with pytest.raises(ConfigError, match="--metrics niqe is in none of the reports; choose from psnr, mae, gain_db"):
        compared(tmp_path, *values, metrics=["niqe"])


def test_the_difference_of_the_gains_is_that_of_the_scores(tmp_path: Path) -> None:
    values = [report(WORSE, "base"), report(BETTER, "other")]
    for value, psnr in zip(values, (WORSE, BETTER), strict=True):  # rows hold psnr and input_psnr alone
        value["scores"]["gain_db"] = summary([a - b for a, b in zip(psnr, INPUTS, strict=True)])
    row = compared(tmp_path, *values, metrics=["gain_db", "psnr"]).rows[2]
    assert row.differences[0] == row.differences[1] == paired_difference(BETTER, WORSE)


def test_a_pooled_value_stands_beside_the_mean(tmp_path: Path) -> None:
    value = report()
    value["scores"]["mae"]["pooled"] = 29.125
    found = compared(tmp_path, value, metrics=["mae"])
    assert "pooled 29.125" in render(found, ".md") and "29.125" in render(found, ".csv")


def test_generations_are_compared_by_their_sets_without_pairs(tmp_path: Path) -> None:
    found = compared(tmp_path, generation("a", 3.0), generation("b", 4.0))
    assert found.metrics == ("fid", "kid") and found.notes == ()
    assert [(row.name, row.cells[0].value, row.cells[0].is_best) for row in found.rows] == [
        ("a", 3.0, True),
        ("b", 4.0, False),
    ]
    assert score_grid(found).rows[0][5].notes == ("std 0.01000",)
    assert difference_grid(found) is None
    assert not any("In brackets" in sentence for sentence in caption(found, "bold"))
    other_count = compared(tmp_path, generation("a", 3.0), generation("b", 4.0, count=9))
    assert other_count.notes == (
        "Not marked as best where others have scores of more images: a.",
        "FID and IS depend on the number of images, which differs here.",
    )


def test_one_report_is_a_table_without_a_best(tmp_path: Path) -> None:
    found = compared(tmp_path, report())
    assert [row.name for row in found.rows] == ["input", "ours"]
    assert not any(cell.is_best for row in found.rows for cell in row.cells)


def test_no_reports_are_refused() -> None:
    with pytest.raises(ConfigError, match="no reports"):
        compare([])


# Formats -------------------------------------------------------------------------------------------------------------


def test_every_format_states_protocol_data_images_and_confidence(tmp_path: Path) -> None:
    found = compared(tmp_path, report(), report(BETTER, "other"))
    for suffix in RENDERERS:
        text = render(found, suffix).replace("\\", "")
        for part in ("rotocol rgb", "8-bit RGB at native size", "4 images", "ab" * 6, "95 %", "2000 resamples"):
            assert part in text, (suffix, part)


def test_another_ending_is_refused_before_any_work() -> None:
    assert output_format("s3://bucket/table.MD") == ".md"
    with pytest.raises(ConfigError, match=r"--out table\.docx: .*\.md, \.tex, \.csv, \.html"):
        output_format("table.docx")


def test_a_csv_holds_every_digit_of_every_row(tmp_path: Path) -> None:
    found = compared(tmp_path, report(np.sqrt(WORSE).tolist(), "base"), report(np.sqrt(BETTER).tolist(), EVIL))
    records = list(csv.DictReader(io.StringIO(render(found, ".csv"))))
    assert [record["name"] for record in records] == [row.name for row in found.rows]
    for record, row in zip(records, found.rows, strict=True):
        assert all(value is not None and None not in record for value in record.values())
        for name, cell, difference in zip(found.metrics, row.cells, row.differences, strict=True):
            assert record[name] == ("" if cell.value is None else repr(cell.value))
            assert record[f"{name}_low"] == ("" if cell.low is None else repr(cell.low))
            assert record[f"{name}_diff"] == ("" if difference is None else repr(difference.mean))
    assert [record["baseline"] for record in records] == ["0", "1", "0"]
    assert [record["psnr_best"] for record in records] == ["0", "0", "1"]


@pytest.mark.parametrize("name", ["=1+2", "+1", "-1", "@x"])
def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path: Path, name: str) -> None:
    records = list(csv.DictReader(io.StringIO(render(compared(tmp_path, report(name=name)), ".csv"))))
    assert records[1]["name"] == f"'{name}"


def test_names_lose_line_ends_terminal_codes_and_direction_marks(tmp_path: Path) -> None:
    found = compared(tmp_path, report(name="a\r\nb\x1b[31mc\u202ed\x00e"))
    assert found.rows[1].name == "a b [31mc d e"


def test_a_markdown_table_keeps_its_shape_whatever_the_names(tmp_path: Path) -> None:
    text = render(compared(tmp_path, report(WORSE, "base"), report(BETTER, EVIL)), ".md")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert bars == [7] * 5 + [4] * 4  # method, steps, images, failed, 2 metrics; then the differences
    evil = next(row for row in rows if "alert" in row)
    for char in "<>":
        assert char not in evil
    for char in "`*_[]#$~":
        assert not re.search(rf"(?<!\\)\{char}", evil.split(" | 5 |")[0]), char
    low, high = bootstrap_mean(BETTER) or (0.0, 0.0)
    assert f"**31.125** [{low:.3f}, {high:.3f}]" in evil


def test_a_latex_table_keeps_its_shape_whatever_the_names(tmp_path: Path) -> None:
    text = render(compared(tmp_path, report(WORSE, "[4pt]"), report(BETTER, EVIL)), ".tex")
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [5] * 4 + [2] * 3
    assert all(line.startswith(("{", "method")) for line in body)  # a name [4pt] is no option of the line end before
    evil = next(line for line in body if "alert" in line)
    name = evil.split(" & 5 & ")[0]
    assert "a\\&b\\_c\\%d\\$e\\#f\\textasciitilde{}g\\textasciicircum{}h\\{i\\}j\\textbackslash{}k" in name
    for char in '<>|"':
        assert char not in name
    low, high = bootstrap_mean(BETTER) or (0.0, 0.0)
    assert f"\\textbf{{31.125}} {{\\scriptsize [{low:.3f}, {high:.3f}]}}" in evil
    depth = 0
    for token in re.findall(r"\\[\\{}&%$#_]|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == 0
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2
    assert "95 \\% bootstrap" in text and "$-$" in text


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_are_text_on_the_page_and_nothing_is_loaded(tmp_path: Path) -> None:
    plain = Page(render(compared(tmp_path, report(WORSE, "base"), report(BETTER, "other")), ".html"))
    evil = Page(render(compared(tmp_path, report(WORSE, "base"), report(BETTER, EVIL)), ".html"))
    assert evil.tags == plain.tags
    name = " ".join(EVIL.split())
    assert evil.texts.count(name) == 2  # in the scores and in the differences
    assert not [value for _, value in evil.attributes if value and re.match(r"(?:https?:)?//", value)]
    assert evil.tags.count("table") == 2


def test_columns_of_the_page_sort_by_their_numbers(tmp_path: Path) -> None:
    page = Page(render(compared(tmp_path, report(WORSE, "base"), report(BETTER, "other")), ".html"))
    values = [value for key, value in page.attributes if key == "data-value"]
    assert values[:6] == ["input", "NaN", "4", "0", "22.000", "NaN"]
    assert values[12:18] == ["other", "5", "4", "0", "31.125", "28.875"]


# The command ---------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output, result.exception


def test_the_command_prints_the_table_and_writes_the_file(tmp_path: Path) -> None:
    uris = [save(tmp_path / name / "report.json", report(psnr, name)) for name, psnr in (("a", WORSE), ("b", BETTER))]
    for suffix in RENDERERS:
        out = tmp_path / f"table{suffix}"
        code, printed, error = run(*uris, "--out", str(out), "--metrics", "psnr, mae", "--baseline", "b")
        assert (code, error) == (0, None)
        assert out.read_text(encoding="utf-8") == render(
            compare([load_report(uri) for uri in uris], metrics=["psnr", "mae"], baseline="b"), suffix
        )
        for part in (
            "31.125*",
            "29.875",
            "Differences to b on the same images",
            "-1.250",
            "protocol rgb",
            "2000 resamples",
        ):
            assert part.lower() in printed.lower()


def test_names_are_no_markup_on_the_console(tmp_path: Path) -> None:
    uri = save(tmp_path / "report.json", report(name="[bold]x[/bold] [/red]"))
    code, printed, error = run(uri)
    assert (code, error) == (0, None)
    assert "[bold]x[/bold]" in printed and "[/red]" in printed  # maybe on two lines


def test_the_command_refuses_an_ending_before_it_reads_reports(tmp_path: Path) -> None:
    _, printed, error = run(str(tmp_path / "nowhere"), "--out", str(tmp_path / "table.docx"))
    assert isinstance(error, ConfigError) and "the ending says the format" in str(error)
    assert not printed
