"""The demo page in a real browser.

Needs playwright and a Chromium: the distribution's package, or the one that BAYESVLM_CHROMIUM names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_bayesvlm import sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from screenshot_demo import (
    TIMEOUT_MS,
    find_chromium,
    open_page,
    running_app,
    running_browser,
    set_slider,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: apt-get install chromium, or set BAYESVLM_CHROMIUM to a browser's path",
)
expect = playwright.expect
expect.set_options(timeout=TIMEOUT_MS)

BAYES = "#bv-results .bv-bayes"
EVIL = """<img src=x onerror="document.title='pwned'"> ${1+1} {{7*7}}"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_app() as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with running_browser(CHROMIUM) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    page = open_page(browser, url, width=1280, height=900)
    yield page
    page.close()


def caption(page: Page, words: str) -> None:
    """Wait until the result is that of these sliders."""
    expect(page.locator("#bv-results .bv-caption")).to_have_text(
        f"The model sees: the image {words}."
    )


def unfold(page: Page, title: str) -> None:
    """Open a part of the page; its button has an arrow after the title."""
    page.get_by_role("button", name=re.compile(rf"^{title}\s*\S?$")).click()


def best(page: Page, panel: str = BAYES) -> tuple[str, float]:
    row = page.locator(f"{panel} .bv-best")
    score = row.locator(".bv-score").inner_text()
    return row.locator(".bv-label").inner_text(), float(score.strip("<> %"))


def upload(page: Page, path: str | Path) -> None:
    page.get_by_label("Remove Image").click()
    expect(page.locator("#bv-results [role=alert]")).to_contain_text("There is no image")
    page.locator("#bv-image input[type=file]").first.set_input_files(str(path))


def sample(label: str) -> str:
    return next(image.path for image in sample_images() if image.label == label)


def test_the_first_screen_shows_a_result(page: Page) -> None:
    caption(page, "as it is")
    assert best(page)[0] == "airplane"
    assert best(page, "#bv-results .bv-plain")[1] > best(page)[1]
    expect(page.locator("#bv-results")).to_be_in_viewport(ratio=0.5)
    expect(page).to_have_title("How sure is CLIP?")


def test_an_uploaded_image_is_classified(page: Page) -> None:
    upload(page, sample("automobile"))
    expect(page.locator(f"{BAYES} .bv-best .bv-label")).to_have_text("automobile")
    expect(page.locator(BAYES)).to_have_attribute("data-verdict", "sure")


def test_an_example_is_classified(page: Page) -> None:
    page.get_by_role("button", name="Example: rocket").click()
    expect(page.locator(f"{BAYES} .bv-best .bv-label")).to_have_text("rocket")


def test_sliders_change_the_confidence_and_can_be_undone(page: Page) -> None:
    before = best(page)
    preview = page.locator(".bv-preview").get_attribute("src")
    set_slider(page, "bv-blur", 5)
    caption(page, "with blur 5 %")
    assert best(page)[1] < before[1] - 20
    expect(page.locator(BAYES)).to_have_attribute("data-verdict", "unsure")
    assert page.locator(".bv-preview").get_attribute("src") != preview
    set_slider(page, "bv-noise", 20)
    caption(page, "with blur 5 %, with noise 20 %")
    set_slider(page, "bv-rotation", -30)
    caption(page, "rotated by -30°, with blur 5 %, with noise 20 %")
    page.get_by_role("button", name="Undo all").click()
    caption(page, "as it is")
    assert best(page) == before


def test_a_slider_is_live_under_the_arrow_keys(page: Page) -> None:
    page.locator("#bv-blur input[type=range]").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    caption(page, "with blur 0.3 %")


def test_thresholds_move_the_verdict(page: Page) -> None:
    unfold(page, "Verdicts and prompts")
    set_slider(page, "bv-sure", 0.99)
    expect(page.locator(BAYES)).to_have_attribute("data-verdict", "unsure")
    set_slider(page, "bv-none", 0)
    expect(page.locator(BAYES)).to_have_attribute("data-verdict", "none")
    expect(page.locator(f"{BAYES} .bv-verdict")).to_contain_text("Probably none of these")


def test_a_file_that_is_no_image_gets_a_sentence(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    upload(page, bad)
    alert = page.locator("#bv-results [role=alert]")
    expect(alert).to_contain_text(re.compile("image", re.IGNORECASE))
    expect(alert).not_to_contain_text("There is no image")
    assert "Traceback" not in page.inner_text("body")


def test_labels_that_cannot_be_used_get_a_sentence(page: Page) -> None:
    page.get_by_label("Labels").fill(" , ")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#bv-results [role=alert]")).to_contain_text("no labels")
    page.get_by_label("Labels").fill("cat face, dog face")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(f"{BAYES} .bv-row")).to_have_count(2)


def test_labels_are_text_wherever_they_are_shown(page: Page) -> None:
    page.get_by_label("Labels").fill(f"{EVIL}, dog face")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(f"{BAYES} .bv-row")).to_have_count(2)
    expect(page.locator(BAYES)).to_contain_text(EVIL)
    expect(page.locator("#bv-results img")).to_have_count(1)
    unfold(page, "Result as JSON")
    expect(page.locator("#bv-json")).to_contain_text("${1+1} {{7*7}}")
    expect(page).to_have_title("How sure is CLIP?")


def test_a_second_posterior_stands_beside(page: Page) -> None:
    unfold(page, "Compare with a second posterior")
    page.get_by_label("Show a second posterior").check()
    second = page.locator("#bv-results .bv-second")
    expect(second).to_contain_text("pseudo-data × 1")
    assert best(page, "#bv-results .bv-second")[1] < best(page)[1]
    page.get_by_label("Covariance").click()
    page.get_by_role("option", name="full").click()
    expect(second).to_contain_text("full")
    page.get_by_label("Show a second posterior").uncheck()
    expect(second).to_have_count(0)


def test_a_model_that_cannot_be_had_gets_a_sentence(page: Page) -> None:
    unfold(page, "Model")
    box = page.get_by_role("combobox", name="Model")
    box.fill("../../etc/passwd")
    box.press("Enter")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#bv-results [role=alert]")).to_contain_text("not a Hub id")
    box.fill("embedded emoji model")
    box.press("Enter")
    page.get_by_role("button", name="Load", exact=True).click()
    caption(page, "as it is")


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.closest('[id^=bv-]')?.id ?? ''"))


def tab_to(page: Page, element: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page) == element:
            return
    raise AssertionError(f"Tab does not reach {element}")


def test_everything_can_be_reached_with_the_keyboard(page: Page) -> None:
    images = page.locator("#bv-examples img")
    expect(images).to_have_count(10)
    sizes = [images.nth(i).bounding_box() for i in range(10)]
    assert all(size is not None and size["width"] > 50 and size["height"] > 50 for size in sizes)
    tab_to(page, "bv-labels")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("rocket, airplane, bicycle")
    tab_to(page, "bv-classify")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus must be seen"
    page.keyboard.press("Enter")
    expect(page.locator(f"{BAYES} .bv-row")).to_have_count(3)
    for element in ("bv-blur", "bv-noise", "bv-rotation", "bv-reset"):
        tab_to(page, element)


def test_shift_enter_in_the_labels_classifies(page: Page) -> None:
    page.get_by_label("Labels").fill("rocket\nairplane")
    page.get_by_label("Labels").press("Shift+Enter")
    expect(page.locator(f"{BAYES} .bv-row")).to_have_count(2)


@pytest.mark.parametrize("width", [320, 375, 768])
def test_a_narrow_screen_does_not_scroll_sideways(browser: Browser, url: str, width: int) -> None:
    page = open_page(browser, url, width=width, height=812)
    for title in ("Verdicts and prompts", "Compare with a second posterior", "Model", "Result as JSON",
                  "How this is computed", "Use it from Python"):  # fmt: skip
        unfold(page, title)
    page.get_by_label("Labels").fill("x" * 90 + ", " + "y " * 40)
    page.get_by_label("Show a second posterior").check()
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator("#bv-results .bv-second .bv-row")).to_have_count(2)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, [
        page.evaluate(
            """width => [...document.querySelectorAll('body *')].filter(
                 element => element.getBoundingClientRect().right > width + 1
               ).slice(-5).map(element => element.outerHTML.slice(0, 120))""",
            width,
        )
    ]
    page.close()


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of WCAG 2."""
    parts = [value / 255 for value in colour[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def numbers(colour: str) -> tuple[float, ...]:
    return tuple(map(float, re.findall(r"[\d.]+", colour)))


TEXTS = """() => [...document.querySelectorAll('main *')].filter(element => {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const box = element.getBoundingClientRect();
  return own && box.width > 1 && box.height > 1 && getComputedStyle(element).visibility === 'visible';
}).map(element => {
  let behind = element, fill = 'rgba(0, 0, 0, 0)';
  while (behind && /(, 0\\)|transparent)$/.test(fill)) {
    fill = getComputedStyle(behind).backgroundColor;
    behind = behind.parentElement;
  }
  return [element.textContent.trim().slice(0, 40), getComputedStyle(element).color, fill];
})"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_their_background(browser: Browser, url: str, dark: bool) -> None:
    page = open_page(browser, url, width=1280, height=900, dark=dark)
    background = numbers(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (luminance(background) < 0.1) is dark
    texts: list[list[str]] = page.evaluate(TEXTS)
    assert len(texts) > 40
    weak = [
        (text, colour, fill, round(contrast(numbers(colour), numbers(fill)), 2))
        for text, colour, fill in texts
        if contrast(numbers(colour), numbers(fill)) < 4.5
    ]
    assert weak == []
    page.close()


def test_the_page_needs_no_other_server(browser: Browser, url: str) -> None:
    context = browser.new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    failures: list[Any] = []
    page = context.new_page()
    page.on("pageerror", lambda error: failures.append(error))
    page.goto(url)
    expect(page.locator(BAYES)).to_be_visible()
    set_slider(page, "bv-blur", 1)
    caption(page, "with blur 1 %")
    local = (url, "data:", "blob:")
    assert [address for address in asked if not address.startswith(local)] == []
    assert failures == []
    context.close()
