"""Scores, verdicts and JSON of the demo, against the pipeline and against textbook formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import fitted, tiny_image_processor, tiny_tokenizer

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMZeroShotImageClassificationPipeline
from hf_bayesvlm.demo_images import Degradation
from hf_bayesvlm.demo_scoring import (
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    NULL_LABELS,
    Assessment,
    Thresholds,
    Variant,
    as_json,
    assess,
    max_entropy,
    none_probability,
    parse_labels,
    parse_templates,
    verdict,
)

LABELS = ("cat", "dog", "car", "pizza")


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_pipe(
    model: BayesVLMForZeroShot, family: str = "clip"
) -> BayesVLMZeroShotImageClassificationPipeline:
    return BayesVLMZeroShotImageClassificationPipeline(
        model=model, tokenizer=tiny_tokenizer(), image_processor=tiny_image_processor(family)
    )


def check_like_pipeline(assessment: Assessment, result: dict) -> None:
    for ours, theirs in zip(assessment.predictions, result["predictions"], strict=True):
        assert ours.label == theirs["label"]
        for name in ("score", "logit_mean", "logit_std"):
            assert getattr(ours, name) == pytest.approx(theirs[name], abs=1e-6)
        assert ours.low <= ours.score <= ours.high
    assert assessment.entropy == pytest.approx(result["entropy"], abs=1e-6)
    assert assessment.aleatoric == pytest.approx(result["expected_entropy"], abs=1e-6)
    assert assessment.epistemic == pytest.approx(result["mutual_information"], abs=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("modalities", ["both", "image", "text"])
def test_every_variant_scores_as_its_pipeline(family: str, modalities: str) -> None:
    model = fitted(family, modalities=modalities)
    assert model.posterior is not None
    plain = BayesVLMForZeroShot.from_vlm(model.vlm)
    other = BayesVLMForZeroShot.from_vlm(model.vlm)
    other.set_posterior(model.posterior.with_hyperparameters(pseudo_data_count=0.1))
    variants = [Variant(name, "", m) for name, m in (("p", plain), ("b", model), ("o", other))]
    templates = ("a photo of {}", "the {}")
    assessments = assess(make_pipe(model, family), variants, picture(), LABELS, templates)
    for variant, assessment in zip(variants, assessments, strict=True):
        result = make_pipe(variant.model, family)(
            picture(),
            candidate_labels=list(LABELS),
            hypothesis_template=list(templates),
            return_uncertainty=True,
        )
        check_like_pipeline(assessment, result)
    assert assessments[0].epistemic == pytest.approx(0.0, abs=1e-6)
    assert assessments[1].epistemic > 0.0
    assert assessments[1].predictions != assessments[2].predictions


def test_none_is_the_share_of_one_more_class() -> None:
    model = fitted()
    [assessment] = assess(make_pipe(model), [Variant("b", "", model)], picture(), LABELS)
    both = make_pipe(model)(picture(), candidate_labels=[*LABELS, *NULL_LABELS])
    scores = {row["label"]: row["score"] for row in both}
    null = np.mean([scores[label] for label in NULL_LABELS])
    expected = null / (null + sum(scores[label] for label in LABELS))
    assert assessment.none_probability == pytest.approx(expected, rel=1e-4)


def test_none_of_a_sigmoid_is_what_the_best_label_leaves() -> None:
    model = fitted("siglip")
    [assessment] = assess(make_pipe(model, "siglip"), [Variant("b", "", model)], picture(), LABELS)
    assert assessment.none_probability == pytest.approx(1 - assessment.predictions[0].score)


def test_null_prompts_that_are_labels_compete_as_labels() -> None:
    model = fitted()
    labels = (*NULL_LABELS[:-1], "A Picture")
    [assessment] = assess(make_pipe(model), [Variant("b", "", model)], picture(), labels)
    assert assessment.none_probability is None
    assert assessment.verdict in ("sure", "unsure")


@given(st.lists(st.floats(-80, 80), min_size=1, max_size=9), st.floats(-50, 50))
def test_none_does_not_depend_on_a_common_shift(logits: list[float], shift: float) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    null = torch.tensor([0.0, 1.0], dtype=torch.float64)
    first = none_probability(values, null, "softmax")
    second = none_probability(values + shift, null + shift, "softmax")
    assert first is not None
    assert 0.0 <= first <= 1.0
    assert first == pytest.approx(second, abs=1e-9)


@pytest.mark.parametrize(
    ("score", "none", "expected"),
    [(0.9, 0.5, "none"), (0.9, 0.49, "sure"), (0.5, 0.0, "sure"), (0.49, 0.1, "unsure"),
     (0.2, None, "unsure"), (1.0, None, "sure")],
)  # fmt: skip
def test_verdicts(score: float, none: float | None, expected: str) -> None:
    assert verdict(score, none, Thresholds(sure=0.5, none=0.5)) == expected


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_impossible_thresholds_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Thresholds(sure=value)  # type: ignore[arg-type]


def test_largest_entropy() -> None:
    assert max_entropy(8, "softmax") == pytest.approx(math.log(8))
    assert max_entropy(3, "sigmoid") == pytest.approx(3 * math.log(2))
    assert max_entropy(1, "softmax") == 0.0


def test_labels_come_with_commas_or_line_ends() -> None:
    assert parse_labels(" cat, dog\n\nred car ,,cat\n") == ("cat", "dog", "red car")
    assert parse_labels(["a", " b "]) == ("a", "b")


@pytest.mark.parametrize(
    ("text", "words"),
    [(" ,\n ,", "no labels"), (",".join(map(str, range(MAX_LABELS + 1))), "at most 200"),
     ("x" * (MAX_LABEL_LENGTH + 1), "at most 100"), ({"path": "/etc/passwd"}, "text"), ([1], "text"),
     (None, "text")],
)  # fmt: skip
def test_labels_under_limits(text: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_labels(text)  # type: ignore[arg-type]


def test_templates_come_one_a_line() -> None:
    assert parse_templates("a photo of {}, sharp\n\nthe {}") == ("a photo of {}, sharp", "the {}")
    assert parse_templates(" \n") is None
    for text in (
        "no place",
        "{0.__class__}",
        "{}" + "x" * 300,
        "\n".join(f"{i} {{}}" for i in range(9)),
    ):
        with pytest.raises(ValueError, match="template"):
            parse_templates(text)


def test_json_is_plain_and_complete() -> None:
    model = fitted()
    plain = BayesVLMForZeroShot.from_vlm(model.vlm)
    variants = [Variant("Plain", "", plain), Variant("Bayesian", "", model)]
    result = as_json(
        assess(make_pipe(model), variants, picture(), LABELS),
        model="tiny",
        labels=LABELS,
        templates=("a {}",),
        degradation=Degradation(blur=1),
        thresholds=Thresholds(),
        likelihood="softmax",
    )
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again["degradation"] == {"blur": 1, "noise": 0.0, "rotation": 0.0}
    assert sorted(row["label"] for row in again["bayesian"]["predictions"]) == sorted(LABELS)
    assert "second" not in again


def test_variants_must_share_the_base() -> None:
    model, stranger = fitted(), fitted(seed=1)
    with pytest.raises(ValueError, match="share"):
        assess(make_pipe(model), [Variant("x", "", stranger)], picture(), LABELS)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_threads_do_not_see_each_other(family: str) -> None:
    """The projections' inputs are recorded by hooks of a base that all threads share."""
    model = fitted(family)
    plain = BayesVLMForZeroShot.from_vlm(model.vlm)
    pipe = make_pipe(model, family)
    variants = [Variant("p", "", plain), Variant("b", "", model)]
    jobs: list[Callable[[], list[Assessment]]] = [
        lambda seed=seed, labels=labels: assess(pipe, variants, picture(seed), labels)
        for seed in range(12)
        for labels in (LABELS[:2], LABELS[1:], LABELS)
    ]
    serial = [job() for job in jobs]
    pipe.label_cache.clear()
    with ThreadPoolExecutor(12) as pool:
        parallel = list(pool.map(lambda job: job(), jobs * 2))
    for got, expected in zip(parallel, serial * 2, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert [p.label for p in a.predictions] == [p.label for p in b.predictions]
            assert [p.score for p in a.predictions] == pytest.approx(
                [p.score for p in b.predictions], abs=1e-6
            )
            assert a.epistemic == pytest.approx(b.epistemic, abs=1e-5)
