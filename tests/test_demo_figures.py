"""The demo's HTML: escaped, well formed, in step with the numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from hf_bayesvlm.demo_figures import (
    MAX_BARS,
    percent,
    render_message,
    render_results,
    shown_labels,
)
from hf_bayesvlm.demo_scoring import Assessment, Prediction, Thresholds

EVIL = """<img src=x onerror=alert(1)>"'&${7*7}{{7*7}}"""


def assessment(scores: dict[str, float], name: str = "Plain", **values: object) -> Assessment:
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    rows = tuple(
        Prediction(label, score, max(0.0, score - 0.05), min(1.0, score + 0.05), 1.0, 0.3)
        for label, score in ranked
    )
    fields: dict = {
        "entropy": 1.0,
        "aleatoric": 0.7,
        "epistemic": 0.3,
        "max_entropy": 2.0,
        "none_probability": 0.2,
        "verdict": "sure",
    }
    return Assessment(name=name, detail=EVIL, predictions=rows, **(fields | values))


class Outline(HTMLParser):
    """Checks that tags close in order and keeps what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.styles += [value or "" for name, value in attrs if name == "style"]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def render(*assessments: Assessment, likelihood: str = "softmax") -> str:
    return render_results(
        assessments,
        preview="data:image/webp;base64,AA",
        caption="the image as it is",
        thresholds=Thresholds(),
        likelihood=likelihood,  # type: ignore[arg-type]
    )


def test_what_visitors_type_is_text() -> None:
    parsed = outline(render(assessment({EVIL: 0.9, "b": 0.1}), assessment({EVIL: 0.4, "b": 0.6})))
    assert parsed.tags.count("img") == 1
    assert EVIL in parsed.words
    message = outline(render_message(EVIL))
    assert "img" not in message.tags
    assert EVIL in message.words


def test_bars_and_whiskers_are_the_numbers() -> None:
    html = render(assessment({"a": 0.6, "b": 0.4}), assessment({"a": 0.5, "b": 0.5}))
    styles = outline(html).styles
    assert styles[:2] == ["width:60.00%", "left:55.00%;width:10.00%"]
    assert "width:35.00%" in styles  # 0.7 of 2 nats
    assert "width:15.00%" in styles
    assert all(0 <= float(width) <= 100 for width in re.findall(r"width:([\d.]+)%", html))


def test_one_label_has_no_entropy_to_divide_by() -> None:
    alone = assessment({"a": 1.0}, entropy=0.0, aleatoric=0.0, epistemic=0.0, max_entropy=0.0)
    outline(render(alone))
    outline(render(alone, likelihood="sigmoid"))


def test_all_panels_show_the_same_labels_with_the_best_of_each() -> None:
    many = {f"label {i}": 1.0 / (i + 2) for i in range(20)}
    other = dict(many) | {"label 19": 0.9, "label 17": 0.8}
    shown, left_out = shown_labels([assessment(other), assessment(many), assessment(other)])
    assert len(shown) == MAX_BARS
    assert left_out == 20 - MAX_BARS
    assert shown[0] == "label 0"
    assert "label 19" in shown
    assert "label 17" not in shown
    html = render(assessment(other), assessment(many))
    panels = html.split("<section")[1:]
    rows = [re.findall(r'class="bv-label">([^<]*)<', panel) for panel in panels]
    assert rows == [shown, shown]


def test_verdicts_are_words_not_only_colours() -> None:
    html = render(
        assessment({"a": 1.0}, verdict="sure"),
        assessment({"a": 1.0}, verdict="unsure"),
        assessment({"a": 1.0}, verdict="none", none_probability=None),
    )
    words = " ".join(outline(html).words)
    for verdict in ("Sure", "Unsure", "Probably none of these", "not known"):
        assert verdict in words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0 %"), (1.0, "100.0 %"), (0.9996, ">99.9 %"), (0.0004, "<0.1 %"), (0.12345, "12.3 %"),
     (0.9994, ">99.9 %"), (0.999, "99.9 %"), (0.001, "0.1 %")],
)  # fmt: skip
def test_percent_never_claims_certainty(value: float, text: str) -> None:
    assert percent(value) == text.replace(" ", "\u00a0")
