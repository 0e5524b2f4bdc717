"""Pictures of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_bayesvlm.plotting import plot_predictions, score_interval

_BLUE, _ORANGE = (42, 111, 151), (200, 121, 27)


def _result(scores: list[float]) -> dict[str, Any]:
    predictions = [
        {"label": f"label {i}", "score": score, "logit_mean": 1.0, "logit_std": 0.5}
        for i, score in enumerate(scores)
    ]
    return {"predictions": predictions, "entropy": 1.0, "mutual_information": 0.1}


@given(st.floats(0.0, 1.0), st.floats(0.0, 20.0))
def test_the_interval_holds_the_score(score: float, logit_std: float) -> None:
    low, high = score_interval(score, logit_std)
    assert 0.0 <= low <= score + 1e-12
    assert score - 1e-12 <= high <= 1.0


def test_the_interval_moves_the_logit_by_one_deviation() -> None:
    assert score_interval(0.5, 1.0) == pytest.approx((0.26894142, 0.73105858))


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_a_picture_is_written(tmp_path: Path, count: int) -> None:
    path = tmp_path / "out.png"
    images = [Image.new("RGB", (20, 30), (255, 0, 0))] * count
    unsure = [i % 2 == 1 for i in range(count)]
    plot_predictions(
        images, [_result([0.7, 0.3])] * count, ["title $x_[b]"] * count, path, unsure=unsure
    )
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert (255, 0, 0) in colours
    assert _BLUE in colours
    assert (_ORANGE in colours) == any(unsure)


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        plot_predictions([], [], [], tmp_path / "out.png")
    with pytest.raises(ValueError, match="as many"):
        plot_predictions(
            [Image.new("RGB", (2, 2))], [_result([1.0])], ["a", "b"], tmp_path / "out.png"
        )
