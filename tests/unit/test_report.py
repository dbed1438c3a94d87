"""Reports: the numbers in report.json, and pages that hold everything and ask the network for nothing."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rddm_dist.config import Config
from rddm_dist.evaluation.baseline import Baseline
from rddm_dist.evaluation.cases import MAX_SIDE, Case, data_uri
from rddm_dist.evaluation.charts import Sample, Series, histogram, line_chart, nice_ticks
from rddm_dist.evaluation.demo_report import write_demo_report
from rddm_dist.evaluation.figures import steps_curve
from rddm_dist.evaluation.gallery import split_cases
from rddm_dist.evaluation.report import write_report, write_report_files
from rddm_dist.evaluation.summary import summarize
from rddm_dist.factory import make_net
from rddm_dist.loading import Model, load_model
from rddm_dist.model.weights import save_safetensors
from tests.support.datasets import random_image
from tests.support.reports import fake_case, fake_curve, fake_report, row

EVIL = '<script>alert("x")</script>&\'"'


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that every tag is closed in turn."""

    VOID = ("meta", "img", "input", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.head_buttons: list[str] = []  # they sort the table of images
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open[-2:] == ["th", "button"]:
            self.head_buttons.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def image_rows(page: Page) -> list[list[Any]]:
    """The rows that are embedded for the table of images."""
    [text] = [word for word in page.words if word.startswith('{"digits":')]
    rows: list[list[Any]] = json.loads(text)["rows"]
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small network with weights from nowhere, exported and loaded."""
    values = {
        "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1},
        "diffusion": {"objective": "pred_res", "num_timesteps": 20},
        "sample": {"steps": 2},
    }
    config = Config.model_validate(values)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_safetensors(path, make_net(config).state_dict(), config=config.model_dump(mode="json"))
    return load_model(str(path))


def test_a_summary_is_the_mean_of_finite_values_and_counts_the_others() -> None:
    found = summarize([30.0, math.inf, 32.0, math.nan, math.inf])
    assert (found["mean"], found["count"], found["infinite"], found["nan"]) == (31.0, 2, 2, 1)
    assert (found["min"], found["max"], found["std"]) == (30.0, 32.0, pytest.approx(math.sqrt(2)))
    assert summarize([math.inf])["mean"] is None
    assert summarize([3.0])["std"] is None


def test_a_mean_does_not_depend_on_the_order_of_the_values() -> None:
    values = (10.0 ** np.random.default_rng(0).uniform(-8, 8, 1000)).tolist()
    assert summarize(values) == summarize(values[::-1]) == summarize(sorted(values))


def test_exact_restorations_are_valid_json_and_named_on_the_page(tmp_path: Path) -> None:
    write_report_files(tmp_path, fake_report([row("a"), row("b", math.inf)]), command="x")
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["images"][1]["psnr"] == "inf"
    assert (report["scores"]["psnr"]["mean"], report["scores"]["psnr"]["infinite"]) == (30.0, 1)
    assert "1 restored exactly (PSNR inf)" in (tmp_path / "index.html").read_text()


def test_a_page_from_the_file_is_the_page_from_the_object(tmp_path: Path) -> None:
    report = fake_report([row("a"), row("b", math.inf, ssim=math.nan), row("c", -math.inf)])
    write_report_files(tmp_path, report, command="x", cases=[fake_case("b")], curve=fake_curve())
    read = json.loads((tmp_path / "report.json").read_text())
    write_report(tmp_path / "again.html", read, command="x", cases=[fake_case("b")], curve=fake_curve())
    assert (tmp_path / "again.html").read_text() == (tmp_path / "index.html").read_text()


def test_a_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    write_report(path, fake_report([row("a")]), cases=[fake_case("a")], command="x", curve=fake_curve())
    text = path.read_text()
    page = Page(text)
    sources = [attrs["src"] or "" for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 3
    assert all(source.startswith("data:image/") for source in sources)
    links = [attrs["href"] or "" for _, attrs in page.tags if "href" in attrs]
    assert [link for link in links if not link.startswith("#")] == [f"./steps-{n}/index.html" for n in (1, 2, 5, 10)]
    anchors = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert {link[1:] for link in links if link.startswith("#")} == anchors
    assert not re.search(r"https?:|@import|url\(", text)
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.tags if tag == "meta")


def test_everything_a_user_named_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    curve = fake_curve()
    curve["points"][0]["folder"] = EVIL
    report = fake_report(
        [row("a", name=EVIL)],
        failed=[{"key": "b", "name": EVIL, "kind": EVIL, "error": EVIL}],
        model={EVIL: EVIL},
        networks={EVIL: {"digest": EVIL}},
    )
    case = fake_case("a")
    case = Case("a", {**case.sides, EVIL: case.sides["target"]})
    write_report(path, report, cases=[case], command=EVIL, config=EVIL, mlflow={EVIL: EVIL}, curve=curve, title=EVIL)
    page = Page(path.read_text())
    write_report(path, fake_report([row("a")]), command="x")
    plain = Page(path.read_text())
    assert page.count("script") == plain.count("script") == 2
    assert EVIL in [attrs.get("data-name") for tag, attrs in page.tags if tag == "article"]
    # title, heading, card, side, curve folder, 3 of the failure, command, config; 2 of model and MLflow each, 1 digest
    assert page.words.count(EVIL) == 15
    assert image_rows(page)[0][1] == EVIL


def test_cases_stand_from_the_worst_down_and_from_the_best_up() -> None:
    psnr = {"a": 31.0, "b": math.inf, "c": 29.0, "d": 33.0, "e": math.nan}
    report = fake_report([row(key, value) for key, value in psnr.items()])
    worst, best = split_cases(report, [fake_case(key) for key in psnr])
    assert [case.key for case in worst] == ["e", "c", "a"]
    assert [case.key for case in best] == ["b", "d"]
    few, none = split_cases(report, [fake_case(key) for key in "dba"])
    assert ([case.key for case in few], none) == (["a", "d", "b"], [])


def test_every_score_of_the_report_is_a_column_and_the_input_stands_beside_the_result(tmp_path: Path) -> None:
    regions = {"psnr_shadow": 25.5, "input_psnr_shadow": 15.0, "lpips": 0.25, "mean4_psnr": 31.5, "spread": 2.0}
    write_report(tmp_path / "x.html", fake_report([row("a", **regions), row("b", **regions)]), command="x")
    page = Page((tmp_path / "x.html").read_text())
    assert page.head_buttons == [
        "image", "width \u00d7 height", "PSNR, dB", "PSNR of the input, dB", "PSNR gain, dB", "SSIM",
        "SSIM of the input", "PSNR (shadow), dB", "PSNR (shadow) of the input, dB", "LPIPS",
        "PSNR of the mean of 4, dB", "Spread of samples, levels",
    ]  # fmt: skip
    expected = [30.0, 20.0, 10.0, 0.9, 0.5, 25.5, 15.0, 0.25, 31.5, 2.0]
    assert image_rows(page) == [[key, f"{key}.png", 24, 16, *expected] for key in "ab"]


def test_intervals_pooled_values_and_whole_set_scores_are_shown(tmp_path: Path) -> None:
    report = fake_report([row("a", 30.0), row("b", 34.0)])
    report["scores"]["psnr"] |= {"low": 30.5, "high": 33.5}
    report["scores"]["ssim"] |= {"pooled": 0.8765}
    report["distribution"] = {"fid": {"value": 12.3456}, "kid": {"value": 0.01, "std": 0.002}}
    write_report(tmp_path / "x.html", report, command="x")
    words = " ".join(Page((tmp_path / "x.html").read_text()).words)
    for expected in ("\u00b11.500 dB", "30.500 to 33.500", "0.8765", "pooled", "12.346", "\u00b10.00200 (std)"):
        assert expected in words


def test_failed_images_are_counted_at_the_top_and_listed_below(tmp_path: Path) -> None:
    failed = [{"key": "c", "name": "c.png", "kind": "not finite", "error": "output holds nan"}]
    failed += [{"key": f"d{i}", "name": f"d{i}.png", "kind": "unreadable", "error": "cut off"} for i in range(250)]
    write_report(tmp_path / "x.html", fake_report([row("a")], failed=failed), command="x")
    words = Page((tmp_path / "x.html").read_text()).words
    assert "251 of 252" in words and "1 not finite, 250 unreadable" in words
    assert words.count("cut off") == 199 and "51 more are in report.json." in words


@pytest.mark.parametrize("psnr", [math.inf, math.nan])
def test_a_page_without_one_finite_value_or_with_one_image_alone_is_whole(tmp_path: Path, psnr: float) -> None:
    for rows in ([row("a", psnr, input_psnr=psnr, ssim=psnr, input_ssim=psnr)], [row("a")]):
        write_report(tmp_path / "x.html", fake_report(rows), cases=[fake_case("a")], command="x")
        page = Page((tmp_path / "x.html").read_text())
        assert (page.count("article"), page.count("svg")) == (1, 0)
        assert len(image_rows(page)) == 1


def test_where_every_image_failed_the_page_says_so(tmp_path: Path) -> None:
    failed = [{"key": "a", "name": "a.png", "kind": "not finite", "error": "output holds nan"}]
    write_report(tmp_path / "x.html", fake_report([], failed=failed), command="x")
    assert "1 of 1" in Page((tmp_path / "x.html").read_text()).words


def test_scored_files_have_no_input_columns_and_generations_no_pair_tables(tmp_path: Path) -> None:
    files = [{name: value for name, value in row(key).items() if not name.startswith("input_")} for key in "ab"]
    write_report(tmp_path / "x.html", fake_report(files, kind="files", sampler={}), command="x")
    page = Page((tmp_path / "x.html").read_text())
    assert page.head_buttons[2:] == ["PSNR, dB", "SSIM"]
    assert not any("input" in word and "filter" not in word for word in page.words if len(word) < 200)

    images = [{"key": key, "name": f"{key}.png", "width": 24, "height": 16} for key in "abc"]
    report = fake_report(images, kind="generation", distribution={"fid": {"value": 9.5}})
    assert report["scores"] == {}
    write_report(tmp_path / "x.html", report, cases=[fake_case(key, ["restored"]) for key in "ab"], command="x")
    page = Page((tmp_path / "x.html").read_text())
    assert (page.count("article"), page.count("table")) == (2, 0)
    assert "9.500" in page.words


def test_the_curve_is_drawn_against_steps_and_time_and_links_to_each_report() -> None:
    drawn = steps_curve(fake_curve())
    page = Page(drawn)
    assert page.count("svg") == 4  # PSNR and FID, each against steps and against seconds
    classes = [attrs["class"] for tag, attrs in page.tags if tag == "circle"]
    assert (classes.count("main"), classes.count("second")) == (4 + 3 + 4 + 3, 4 + 3)  # one point has no time
    assert sum(tag == "line" and "interval" in (attrs["class"] or "") for tag, attrs in page.tags) == 2 * (4 + 3)
    assert "s per image (one sample)" in page.words
    assert "32.000" in " ".join(page.words) and "\u00b10.250" in page.words
    # On a logarithmic axis 1, 10 and 100 stand at equal distances.
    series = Series("a", [(1.0, 0.0), (10.0, 1.0), (100.0, 0.0)])
    chart = Page(line_chart([series], title="t", x_label="x", y_label="y", log_x=True))
    first, second, third = (float(attrs["cx"] or 0) for tag, attrs in chart.tags if tag == "circle")
    assert second - first == pytest.approx(third - second, abs=0.11)


def test_the_mean_of_k_samples_costs_k_times_the_seconds_of_one() -> None:
    drawn = steps_curve(fake_curve((1, 2, 4)))  # 0.125 and 0.25 seconds a sample; the last has no time
    chart = next(part for part in drawn.split("<figure") if "PSNR against seconds per image" in part)
    drawn_at = re.findall(r'<circle class="(\w+)".*?<title>[^<]*at ([\d.]+)</title>', chart)
    assert drawn_at == [("main", "0.125"), ("main", "0.25"), ("second", "0.5"), ("second", "1")]
    bars = re.findall(r'<line class="interval (\w+)" x1="([\d.]+)"', chart)
    assert bars == re.findall(r'<circle class="(\w+)" cx="([\d.]+)"', chart) and len(bars) == 4
    steps = next(part for part in drawn.split("<figure") if "PSNR against sampling steps" in part)
    drawn_at = re.findall(r'<circle class="(\w+)".*?<title>[^<]*at ([\d.]+)</title>', steps)
    assert drawn_at == [(role, steps) for role in ("main", "second") for steps in ("1", "2", "4")]


def test_the_demo_page_tells_the_whole_story(tmp_path: Path, model: Model) -> None:
    journal: list[dict[str, Any]] = [{"event": "started", "step": 0}]
    for step in range(10, 60, 10):
        journal.append(
            {"event": "metrics", "step": step, "metrics": {"train/loss": 1 / step, "perf/images_per_s": 9.0}}
        )
    journal.append({"event": "metrics", "step": 50, "metrics": {"preview/psnr": 25.5}})
    summary = {
        "input_psnr": 20.0, "baseline_psnr": 24.5, "restored_psnr": 30.0, "gain_db": 10.0, "input_ssim": 0.5,
        "restored_ssim": 0.9, "images": 2, "train_steps": 50, "train_seconds": 12.3, "wall_seconds": 45.6,
        "mlflow_run_id": "f00d", "model_uri": "models:/rddm-demo/1", "eval_data": "data/eval", "report": "",
    }  # fmt: skip
    path = write_demo_report(
        tmp_path,
        summary=summary,
        report=fake_report([row("a"), row("b")]),
        baseline=Baseline("median", 5),
        journal=journal,
        model=model,
        cases=[fake_case("a"), fake_case("b")],
    )
    assert path == tmp_path / "report" / "index.html"
    page = Page(path.read_text())
    words = " ".join(page.words)
    for expected in ("+5.50", "median 5x5: 24.50 dB", "9.0 images/s", "f00d", "models:/rddm-demo/1", "dim_mults"):
        assert expected in words
    assert (page.count("article"), page.count("details")) == (2, 1)
    assert page.count("svg") == 3 + 3  # of the training; PSNR, gain and SSIM of two images


def test_a_chart_draws_what_can_be_drawn_and_says_when_nothing_can() -> None:
    broken = [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf), (3.0, 4.0)]
    chart = line_chart([Series("loss & co", broken)], title="t", x_label="step", y_label="dB")
    assert chart.count("<circle") == 2 and "loss &amp; co" in chart and "nan" not in chart and "inf" not in chart
    assert "No points" in line_chart([Series("a", [])], title="t", x_label="x", y_label="y")
    assert "No points" in line_chart([Series("a", [(1.0, -1.0)])], title="t", x_label="x", y_label="y", log_y=True)
    assert "polyline" in line_chart([Series("flat", [(1.0, 5.0), (2.0, 5.0)])], title="t", x_label="x", y_label="y")
    assert "polyline" in line_chart([Series("dot", [(3.0, 5.0)])], title="t", x_label="x", y_label="y", log_x=True)
    assert "No finite values" in histogram([Sample("a", [math.inf])], title="t", x_label="x")


@pytest.mark.parametrize(
    "values",
    [
        [3.0] * 7,
        [0.0, 0.0],
        [-1e-9, 1e-9],
        [0.0, 5e-324],
        [30.0, math.nextafter(30.0, 31.0)],
        [-1e-7, math.nextafter(-1e-7, 0.0)],
        list(range(-50, 950)),
        [0.1 * i for i in range(99)],
    ],
)
def test_a_histogram_counts_every_finite_value_once(values: list[float]) -> None:
    drawn = histogram([Sample("a", [*values, math.nan, math.inf])], title="t", x_label="x")
    counts = [int(count) for count in re.findall(r"<title>a: (\d+) from", drawn)]
    assert sum(counts) == len(values)
    assert len(counts) <= 50


@pytest.mark.parametrize(
    ("value", "log"), [*itertools.product((30.0, 1.0, 1e-9, 12345.678), (False, True)), (1e-315, False)]
)
def test_values_one_rounding_error_apart_are_drawn_as_equal_ones(value: float, log: bool) -> None:
    points = [(value, value), (math.nextafter(value, math.inf), math.nextafter(value, math.inf))]
    drawn, flat = (
        line_chart([Series("a", shown)], title="t", x_label="x", y_label="y", log_x=log, log_y=log)
        for shown in (points, [points[0]] * 2)
    )
    assert drawn == flat and drawn.count("<circle") == 2


@pytest.mark.parametrize(("low", "high"), [(0.0, 400.0), (14.03, 15.01), (-0.7, 0.0003), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert all(low - 1e-9 * (high - low) <= tick <= high + 1e-9 * (high - low) for tick in ticks)


def test_large_images_are_shown_reduced_and_noisy_ones_as_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (MAX_SIDE, 2 * MAX_SIDE, 3), dtype=np.uint8)
    assert data_uri(noise).startswith("data:image/jpeg;base64,")
    assert data_uri(random_image(0, (64, 64))).startswith("data:image/png;base64,")
    assert len(data_uri(noise)) < 1_200_000
