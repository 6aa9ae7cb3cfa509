"""Takes the picture of `docs/browse.md`: a run in the browser, as `discl browse` shows it.

    discl browse runs/fashion-lt --no-open
    python tools/make_browse_picture.py 'http://127.0.0.1:8421/?key=KEY' docs/browse.webp

It needs Chromium. The address is the one that the first command prints.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT, QUALITY = 1360, 860, 82


def take(address: str, out: Path) -> Path:
    """Writes the picture of the first view."""
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.wait_for_selector("body.loaded")
        page.wait_for_function(
            "[...document.querySelectorAll('#grid img, #nearest-above img')]"
            ".every((each) => each.complete && each.naturalWidth)",
            timeout=120_000,
        )
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    picture.convert("RGB").save(out, quality=QUALITY, method=6)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    print(take(chosen.address, chosen.out))


if __name__ == "__main__":
    main()
