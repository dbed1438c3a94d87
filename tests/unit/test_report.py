"""Reports: the numbers in report.json, and pages that hold everything and ask the network for nothing."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from rddm_dist.config import Config
from rddm_dist.evaluation.baseline import Baseline
from rddm_dist.evaluation.charts import Series, line_chart, nice_ticks
from rddm_dist.evaluation.evaluate import EvalSettings, plan_units, run_here
from rddm_dist.evaluation.gallery import MAX_SIDE, ReportImage, data_uri
from rddm_dist.evaluation.page import render_page
from rddm_dist.evaluation.report import write_demo_report, write_report
from rddm_dist.evaluation.summary import build_report, sort_rows, summarize, summarize_rows, write_report_files
from rddm_dist.factory import make_net
from rddm_dist.loading import Model, load_model
from rddm_dist.model.weights import save_safetensors
from tests.support.datasets import make_dataset, random_image

EVIL = '<script>alert("x")</script>&\'"'


def row(key: str, psnr: float = 30.0, **values: Any) -> dict[str, Any]:
    scores = {"psnr": psnr, "ssim": 0.9, "input_psnr": 20.0, "input_ssim": 0.5}
    return {"key": key, "name": f"{key}.png", "width": 24, "height": 16, **scores, **values}


def fake_report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "protocol": {"name": "rgb", "color": "rgb", "rounding": "uint8", "size": "native"},
        "scores": summarize_rows(rows),
        "model": {"path": "model.safetensors"},
        "data": {"uri": "data/eval"},
        "sampler": {"steps": 5, "eta": 0.0},
        "images": sort_rows(rows),
    }


def report_image(key: str) -> ReportImage:
    pictures = [random_image(seed, (16, 24)) for seed in range(3)]
    return ReportImage(key, *pictures)


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that every tag is closed in turn."""

    VOID = ("meta", "img", "input", "line", "polyline", "circle", "i")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
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

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


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


def test_rows_are_sorted_and_come_once() -> None:
    assert [item["key"] for item in sort_rows([row("b"), row("a"), row("c")])] == ["a", "b", "c"]
    with pytest.raises(DataError, match="key a was scored twice"):
        sort_rows([row("a"), row("b"), row("a")])
    with pytest.raises(DataError, match="no images"):
        sort_rows([])


def test_an_evaluation_gives_the_same_report_in_any_order_and_pages_with_its_images(
    tmp_path: Path, model: Model
) -> None:
    uri = make_dataset(tmp_path, count=5, size=(20, 26))
    manifest = Manifest.load(uri)
    settings = EvalSettings(steps=2, batch_size=2)
    units = plan_units(uri, manifest, batch_size=2)
    results = [
        rows
        for unit in reversed(units)
        for rows in run_here(str(model.path), uri, [unit], settings, images_dir=str(tmp_path / "out" / "images"))
    ]
    flat = [item for rows in results for item in rows]
    report = build_report(flat, model=model, data=uri, manifest=manifest, settings=settings)
    again = build_report(flat[::-1], model=model, data=uri, manifest=manifest, settings=settings)
    assert json.dumps(report) == json.dumps(again)
    assert report["scores"]["psnr"]["mean"] == pytest.approx(float(np.mean([item["psnr"] for item in flat])))
    assert (report["sampler"]["steps"], report["data"]["fingerprint"]) == (2, manifest.fingerprint)

    write_report_files(tmp_path / "out", report, command="rddm evaluate")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == report["images"]
    assert Page((tmp_path / "out" / "report.html").read_text()).count("article") == 5

    # An image that is not of this evaluation is not shown.
    other = tmp_path / "out" / "images" / f"{report['images'][0]['key']}.png"
    other.write_bytes((tmp_path / "out" / "images" / f"{report['images'][1]['key']}.png").read_bytes())
    write_report_files(tmp_path / "out", report, command="rddm evaluate")
    assert Page((tmp_path / "out" / "report.html").read_text()).count("article") == 4


def test_exact_restorations_are_valid_json_and_named_on_the_page(tmp_path: Path) -> None:
    write_report_files(tmp_path, fake_report([row("a"), row("b", math.inf)]), command="x", images=[])
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["images"][1]["psnr"] == "inf"
    assert (report["scores"]["psnr"]["mean"], report["scores"]["psnr"]["infinite"]) == (30.0, 1)
    assert "1 restored exactly (PSNR inf)" in (tmp_path / "report.html").read_text()


def test_a_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", fake_report([row("a")]), images=[report_image("a")], command="rddm evaluate")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert len(addresses) == 3
    assert all(value is not None and value.startswith("data:image/") for value in addresses)
    assert not re.search(r"https?:|@import|url\(", text)
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.tags if tag == "meta")
    assert "prefers-color-scheme:dark" in text


def test_everything_a_user_named_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    image = report_image("a")
    write_report(
        path, fake_report([row("a", name=EVIL)]), images=[image], command=EVIL, config=EVIL, mlflow={EVIL: EVIL}
    )
    page, plain = Page(path.read_text()), Page(render_page("t", "l", ""))
    assert page.count("script") == plain.count("script")
    assert EVIL in [attrs.get("data-name") for tag, attrs in page.tags if tag == "article"]
    assert page.words.count(EVIL) == 6  # card, table, command, config, and both sides of the MLflow entry
    write_report(path, fake_report([row("a")]), command="x", title=EVIL)
    assert Page(path.read_text()).words.count(EVIL) == 2


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
        images=[report_image("a"), report_image("b")],
    )
    assert path == tmp_path / "report" / "index.html"
    page = Page(path.read_text())
    words = " ".join(page.words)
    for expected in ("+5.50", "median 5x5: 24.50 dB", "9.0 images/s", "f00d", "models:/rddm-demo/1", "dim_mults"):
        assert expected in words
    assert (page.count("article"), page.count("svg"), page.count("details")) == (2, 3, 1)


def test_a_chart_draws_what_can_be_drawn_and_says_when_nothing_can() -> None:
    broken = [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf), (3.0, 4.0)]
    chart = line_chart([Series("loss & co", broken)], title="t", x_label="step", y_label="dB")
    assert chart.count("<circle") == 2 and "loss &amp; co" in chart and "nan" not in chart and "inf" not in chart
    assert "No points" in line_chart([Series("a", [])], title="t", x_label="x", y_label="y")
    assert "No points" in line_chart([Series("a", [(1.0, -1.0)])], title="t", x_label="x", y_label="y", log_y=True)
    assert "polyline" in line_chart([Series("flat", [(1.0, 5.0), (2.0, 5.0)])], title="t", x_label="x", y_label="y")


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
