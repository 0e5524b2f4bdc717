"""The picture of a tuning."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from test_tuning import labelled
from tiny import fitted

from hf_bayesvlm.plotting_tuning import plot_tuning
from hf_bayesvlm.tuning import tune_posterior

CHOSEN, REFERENCE = (179, 18, 59), (42, 111, 151)


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(2**24)}


def test_lines_and_the_chosen_point_are_drawn(tmp_path):
    model = fitted()
    result = tune_posterior(model, labelled(model), max_accuracy_loss=None, progress=False)
    plot_tuning(result, tmp_path / "out.png")
    assert {CHOSEN, REFERENCE} <= colours(tmp_path / "out.png")


def test_one_candidate_is_a_picture_too(tmp_path):
    model = fitted()
    result = tune_posterior(
        model,
        labelled(model),
        pseudo_data_counts=[1.0],
        objectives=["evidence"],
        dampings=["exact"],
        max_accuracy_loss=None,
        progress=False,
    )
    plot_tuning(result, tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()
    plot_tuning(result, tmp_path / "out.png")
    assert CHOSEN in colours(tmp_path / "out.png")
    assert REFERENCE not in colours(tmp_path / "out.png")
