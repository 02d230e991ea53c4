"""Take the README's picture of a merge report: `python -m benchmarks.picture REPORT.html OUT.png`.

Needs playwright, Pillow and Chromium; docs/report.png shows the RESM merge of `resm demo`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def take(report: Path, picture: Path) -> None:
    """The heat maps, with the weight chosen where experts interfere most."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.locator("td.on").first.click()
        page.evaluate(
            "scrollTo(0, document.querySelector('.metric').getBoundingClientRect().top"
            " + scrollY - 64)"
        )
        page.mouse.move(0, 0)
        page.screenshot(path=picture)
        browser.close()
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
