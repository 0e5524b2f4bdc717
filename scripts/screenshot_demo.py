"""Take pictures of the demo page from the running app.

    python scripts/screenshot_demo.py model_cards

Writes `space.png` (desktop), `space-dark.png` and `space-phone.png`.  Needs `hf_bayesvlm[dev]` and a Chromium: the
distribution's, or the one that BAYESVLM_CHROMIUM names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_MS = 60_000
MAX_BYTES = 200_000


def find_chromium() -> str | None:
    """Path of a Chromium: that of BAYESVLM_CHROMIUM, or the first that is installed; None without one."""
    override = os.environ.get("BAYESVLM_CHROMIUM")
    if override is not None:
        return override if Path(override).is_file() else None
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


@contextmanager
def running_app(**options: Any) -> Iterator[str]:
    """Serve the demo on a free port of this machine.

    Args:
        **options: As for `build_app`.

    Yields:
        Its URL.
    """
    from hf_bayesvlm.demo import build_app

    app = build_app(**options)
    _, url, _ = app.launch(
        prevent_thread_lock=True, quiet=True, inbrowser=False, server_name="127.0.0.1"
    )
    try:
        yield url
    finally:
        app.close()


@contextmanager
def running_browser(path: str) -> Iterator[Browser]:
    """A headless Chromium.

    Args:
        path: From `find_chromium`.

    Yields:
        The browser.
    """
    from playwright.sync_api import sync_playwright

    # A container's user is root and its /dev/shm small.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, url: str, *, width: int, height: int, dark: bool = False) -> Page:
    """Open the demo and wait until it shows a result.

    Args:
        browser: From `running_browser`.
        url: From `running_app`.
        width: Of the window, CSS pixels.
        height: Of the window, CSS pixels.
        dark: Ask for the dark mode.

    Returns:
        The page.
    """
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    page.wait_for_selector("#bv-results .bv-panel")
    page.wait_for_selector("#bv-image img")
    page.wait_for_function("document.fonts.ready.then(() => true)")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page


def set_slider(page: Page, element: str, value: float) -> None:
    """Type a value into the number box of a slider.

    Args:
        page: The page.
        element: The slider's id.
        value: What to type.
    """
    box = page.locator(f"#{element} input[type=number]")
    box.fill(f"{value:g}")
    box.press("Tab")


def main() -> int:
    """Take the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    folder = parser.parse_args().outdir
    chromium = find_chromium()
    if chromium is None:
        print("no Chromium: install one, or set BAYESVLM_CHROMIUM to its path", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    shots: dict[str, dict[str, Any]] = {
        "space": {"width": 1280, "height": 1090},
        "space-dark": {"width": 1280, "height": 1090, "dark": True},
        "space-phone": {"width": 390, "height": 844},
    }
    with running_app() as url, running_browser(chromium) as browser:
        for name, options in shots.items():
            page = open_page(browser, url, **options)
            set_slider(page, "bv-blur", 5)
            page.wait_for_selector("text=with blur 5 %")
            page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
            path = folder / f"{name}.png"
            page.screenshot(path=path, full_page=name == "space-phone", animations="disabled")
            page.close()
            compress(path)
            print(f"{path} {path.stat().st_size / 1024:.0f} kB")
    return 0


def compress(path: Path) -> None:
    """Rewrite a picture as small as it can be, with a palette only if it is too large otherwise.

    Args:
        path: A PNG file.
    """
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rgb.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        rgb.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
