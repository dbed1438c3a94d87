"""The page of an evaluation in a real browser: it sorts, filters, compares and copies, and asks the network for
nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rddm_dist.evaluation.cases import SIDES
from rddm_dist.evaluation.report import write_report
from tests.support.reports import fake_case, fake_curve, fake_report, row

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the Python package playwright")
TIMEOUT_MS = 10_000
COMMAND = "rddm evaluate runs/tiny --data data/eval\nrddm score out"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(names)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """A page whose every complaint and every request but for itself and its data fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: _note_request(request.url, complaints))
    yield page
    context.close()
    assert complaints == []


def _note_request(url: str, complaints: list[str]) -> None:
    if not url.startswith(("data:", "file:")):
        complaints.append(f"asked for {url}")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with cases of three sides and one with five."""
    rows = [row("a", 31.0), row("b", float("inf")), row("c", 4.0), row("d", float("nan")), row("e", 28.0)]
    rows[0]["name"] = '<b id="evil">image 10</b>'
    rows[1]["name"] = "image 9"
    cases = [fake_case(key, SIDES if key == "c" else SIDES[:3], size=(64, 96)) for key in "abce"]
    failed = [{"key": "f", "name": "f.png", "kind": "not finite", "error": "output holds nan"}]
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_report(path, fake_report(rows, failed=failed), cases=cases, command=COMMAND, curve=fake_curve())
    return path


def names(page: sync_api.Page) -> list[str]:
    return [cell.inner_text() for cell in page.query_selector_all("#image-table tbody td:first-child")]


def sides_shown(page: sync_api.Page) -> list[str | None]:
    return [image.get_attribute("alt") for image in page.query_selector_all("dialog .stage img")]


def border(page: sync_api.Page) -> float:
    return float(page.eval_on_selector("dialog .stage", "stage => parseFloat(stage.style.getPropertyValue('--at'))"))


def test_the_table_sorts_by_number_and_by_name_and_filters(page: sync_api.Page, small: Path) -> None:
    page.goto(small.as_uri())
    evil = '<b id="evil">image 10</b>'
    assert names(page) == [evil, "image 9", "c.png", "d.png", "e.png"]
    assert page.query_selector("#evil") is None
    head = page.locator("#image-table").get_by_role("columnheader", name="PSNR, dB", exact=True)
    head.get_by_role("button").click()
    assert names(page) == ["c.png", "e.png", evil, "image 9", "d.png"]  # 4 < 28 < 31 < inf; nan has no place
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert names(page) == ["image 9", evil, "e.png", "c.png", "d.png"]
    assert head.get_attribute("aria-sort") == "descending"
    page.get_by_role("searchbox").fill("IMAGE")
    assert names(page) == ["image 9", evil]
    page.get_by_role("button", name="image", exact=True).click()
    page.get_by_role("searchbox").fill("")
    assert names(page).index("c.png") < names(page).index("d.png") < names(page).index("image 9")
    page.get_by_role("searchbox").fill("nothing")
    assert names(page) == [] and page.get_by_text("no image has such a name").is_visible()


def test_a_click_opens_the_slider_and_dragging_moves_its_border(page: sync_api.Page, small: Path) -> None:
    page.goto(small.as_uri())
    page.get_by_role("button", name="open restored of c.png").click()
    dialog = page.get_by_role("dialog")
    assert sides_shown(page) == ["input", "restored"] and border(page) == 50
    box = page.locator("dialog .stage").bounding_box()
    assert box is not None and box["width"] > 300 and box["y"] + box["height"] < 900
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 30)
    page.mouse.up()
    assert border(page) == pytest.approx(25, abs=1)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    assert border(page) == pytest.approx(25, abs=1)  # without a button nothing moves
    # Any two sides; choosing the one on the other half lets them change places.
    right, left = dialog.get_by_role("group", name="right image"), dialog.get_by_role("group", name="left image")
    right.get_by_role("button", name="spread").click()
    left.get_by_role("button", name="target").click()
    assert sides_shown(page) == ["target", "spread"]
    left.get_by_role("button", name="spread").click()
    assert sides_shown(page) == ["spread", "target"]
    shown = page.eval_on_selector_all("dialog .stage img", "images => images.map(image => image.src)")
    wanted = [
        page.locator(f'[data-case="c"] img[data-side="{side}"]').get_attribute("src") for side in ("spread", "target")
    ]
    assert shown == wanted
    # Another case lacks the spread: another side stands in for it.
    dialog.get_by_role("button", name="next").click()
    assert set(sides_shown(page)) < {"input", "restored", "target"} and len(set(sides_shown(page))) == 2
    dialog.get_by_role("button", name="close").click()
    assert not dialog.is_visible()


def test_the_keyboard_alone_opens_moves_switches_turns_and_closes(page: sync_api.Page, small: Path) -> None:
    page.goto(small.as_uri())
    page.get_by_role("button", name="open input of c.png").focus()
    page.keyboard.press("Enter")
    title = page.locator("dialog .bar b")
    assert title.inner_text() == "c.png" and border(page) == 50
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert border(page) == 53
    page.keyboard.press("3")
    assert sides_shown(page) == ["input", "target"]
    page.keyboard.press("Shift+Digit4")
    assert sides_shown(page) == ["mean", "target"]
    page.keyboard.press("n")
    assert title.inner_text() == "e.png"
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert title.inner_text() == '<b id="evil">image 10</b>'  # before the worst comes the last of the best
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    # A name in the table opens its case as well.
    page.locator("#image-table").get_by_role("button", name="e.png").press("Enter")
    assert title.inner_text() == "e.png"


def test_the_command_is_copied_as_it_stands(page: sync_api.Page, small: Path) -> None:
    page.goto(small.as_uri())
    page.get_by_role("button", name="copy").click()
    page.get_by_role("button", name="copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == COMMAND


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(page: sync_api.Page, small: Path, scheme: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.goto(small.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.get_by_role("button", name="open restored of c.png").click()
    box = page.get_by_role("dialog").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in background[4:-1].split(","))
    assert lightness < 150 if scheme == "dark" else lightness > 600


def test_print_leaves_out_what_only_a_screen_can_do(page: sync_api.Page, small: Path) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(small.as_uri())
    for selector in ("nav", ".command button", ".table-bar"):
        assert not page.locator(selector).first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.tile')).backgroundColor") == "rgb(255, 255, 255)"


def test_generated_images_open_large_one_at_a_time(page: sync_api.Page, tmp_path: Path) -> None:
    images = [{"key": key, "name": f"{key}.png", "width": 24, "height": 16} for key in "ab"]
    report = fake_report(images, kind="generation", distribution={"fid": {"value": 9.5}})
    write_report(tmp_path / "x.html", report, cases=[fake_case(key, ["restored"]) for key in "ab"], command="x")
    page.goto((tmp_path / "x.html").as_uri())
    page.get_by_role("button", name="open restored of a.png").click()
    assert page.locator("dialog .stage img").first.is_visible()
    assert not page.locator("dialog input").is_visible() and not page.locator("dialog .choose").is_visible()
    page.keyboard.press("n")
    assert page.locator("dialog .bar b").inner_text() == "b.png"


def test_twenty_thousand_images_open_in_seconds_and_stay_some_megabytes(page: sync_api.Page, tmp_path: Path) -> None:
    report = fake_report([row("a", 10.0), row("b", 40.0)])
    report["images"] = [
        row(f"{i:06d}", 10 + 30 * ((i * 7919) % 20_000) / 20_000, name=f"val/{i:06d}.png") for i in range(20_000)
    ]
    path = tmp_path / "x.html"
    write_report(path, report, command="x")
    assert path.stat().st_size < 3_000_000
    started = time.monotonic()
    page.goto(path.as_uri())
    assert page.get_by_text("1 to 50 of 20,000").is_visible()
    assert time.monotonic() - started < 5
    started = time.monotonic()
    page.get_by_role("columnheader", name="PSNR, dB", exact=True).get_by_role("button").click()
    assert names(page)[0] == "val/000000.png" and len(names(page)) == 50
    page.get_by_role("button", name="next").first.click()
    assert page.get_by_text("51 to 100 of 20,000").is_visible()
    cells = page.query_selector_all("#image-table tbody td:nth-child(3)")
    assert [cell.inner_text() for cell in cells] == [f"{10 + 30 * i / 20_000:.3f}" for i in range(50, 100)]
    assert time.monotonic() - started < 5
