"""Draws the picture of README's front page: the first row of images in the demo's report, in headless Chromium.

rddm demo && python docs/draw_report.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

REPORT = Path("runs/demo/report/index.html")
PICTURE = Path(__file__).parent / "images" / "demo.jpg"
SELECTOR = "#cases .card"
MARGIN = 6  # pixels around the cards

if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.5)
        page.goto(REPORT.absolute().as_uri())
        first, second = (each.bounding_box() for each in page.query_selector_all(SELECTOR)[:2])
        page.screenshot(
            path=PICTURE,
            type="jpeg",
            quality=85,
            full_page=True,
            clip={
                "x": first["x"] - MARGIN,
                "y": first["y"] - MARGIN,
                "width": second["x"] + second["width"] - first["x"] + 2 * MARGIN,
                "height": first["height"] + 2 * MARGIN,
            },
        )
        browser.close()
    print(PICTURE)
