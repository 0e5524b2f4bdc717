"""Metrics against torchmetrics and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from hf_bayesvlm.metrics import RunningScores, accuracy, brier, ece, nlpd


def _case(seed: int, rows: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return logits.softmax(dim=1), labels


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 9))
def test_accuracy_and_nlpd_agree_with_scikit_learn(seed: int, rows: int, classes: int) -> None:
    probs, labels = _case(seed, rows, classes)
    assert accuracy(probs, labels) == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    expected = log_loss(labels.numpy(), probs.numpy(), labels=list(range(classes)))
    assert nlpd(probs, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_bins", [1, 5, 15, 20])
@pytest.mark.parametrize("seed", range(5))
def test_ece_agrees_with_torchmetrics(seed: int, num_bins: int) -> None:
    probs, labels = _case(seed)
    expected = multiclass_calibration_error(
        probs, labels, num_classes=7, n_bins=num_bins, norm="l1"
    ).item()
    assert ece(probs, labels, num_bins=num_bins) == pytest.approx(expected, abs=1e-6)


def test_brier_is_the_squared_distance_to_the_one_hot_label() -> None:
    probs, labels = _case(1)
    one_hot = torch.nn.functional.one_hot(labels, 7)
    assert brier(probs, labels) == pytest.approx(((probs - one_hot) ** 2).sum(1).mean().item())


def test_perfect_and_impossible_predictions() -> None:
    labels = torch.tensor([0, 1, 2])
    perfect = torch.eye(3)
    assert (accuracy(perfect, labels), nlpd(perfect, labels)) == (1.0, 0.0)
    assert (ece(perfect, labels), brier(perfect, labels)) == (0.0, 0.0)
    assert nlpd(perfect, labels.roll(1)) == math.inf
    assert ece(perfect, labels.roll(1)) == pytest.approx(1.0)


def test_a_calibrated_model_has_a_small_ece() -> None:
    probs, _ = _case(2, rows=50_000)
    labels = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    assert ece(probs, labels) < 0.01


@pytest.mark.parametrize("metric", [accuracy, nlpd, ece, brier])
def test_bad_input_is_refused(metric) -> None:  # type: ignore[no-untyped-def]
    probs, labels = _case(0)
    with pytest.raises(ValueError, match="batch"):
        metric(probs, labels[:-1])
    with pytest.raises(ValueError, match="no rows"):
        metric(probs[:0], labels[:0])
    with pytest.raises(ValueError, match="class indices"):
        metric(probs, labels + 1)


def test_ece_needs_a_bin() -> None:
    with pytest.raises(ValueError, match="num_bins"):
        ece(*_case(0), num_bins=0)


def test_running_scores_are_the_metrics_of_all_batches() -> None:
    probs, labels = _case(3)
    scores = RunningScores("softmax")
    for rows in torch.arange(len(labels)).split(33):
        scores.update(probs[rows].log(), labels[rows])
    result = scores.result()
    for metric in (nlpd, ece, accuracy, brier):
        assert getattr(result, metric.__name__) == pytest.approx(metric(probs, labels), rel=1e-9)


def test_running_scores_of_a_sigmoid_score_every_answer() -> None:
    logits = torch.tensor([[2.0, -1.0], [-300.0, 5.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    scores = RunningScores("sigmoid")
    scores.update(logits, labels)
    truth = torch.nn.functional.one_hot(labels, 2).double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    assert scores.result().nlpd == pytest.approx(expected.sum(1).mean().item())
    assert scores.result().accuracy == 0.5


def test_running_scores_refuse_nothing_and_nonsense() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RunningScores("softmax").result()
    with pytest.raises(ValueError, match="likelihood"):
        RunningScores("probit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_bins"):
        RunningScores("softmax", num_bins=0)
