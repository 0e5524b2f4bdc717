"""Tuning against the slow way: every posterior put on the model, and its predictions measured."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tiny import fitted, random_posterior, tiny_image_processor, tiny_tokenizer, tiny_vlm

from hf_bayesvlm import BayesVLMForZeroShot, ImageInputError, PosteriorError
from hf_bayesvlm.features import LabelledFeatures, embed_labelled
from hf_bayesvlm.metrics import Scores, accuracy, brier, ece, nlpd
from hf_bayesvlm.predictive import probit_logits
from hf_bayesvlm.tuning import tune_posterior
from hf_bayesvlm.tuning_grid import _blocks
from hf_bayesvlm.tuning_result import choose_trial

NAMES = ("cat", "dog", "car", "pizza")
TEMPLATES = ("a photo of a {}", "a drawing of the {}")


class Processor:
    """Tokenizer and image processor, as AutoProcessor gives them."""

    def __init__(self, family: str = "clip") -> None:
        self.tokenizer = tiny_tokenizer()
        self.image_processor = tiny_image_processor(family)


def rows(count: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [
        {
            "image": PILImage.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)),
            "label": NAMES[i % len(NAMES)],
        }
        for i in range(count)
    ]


def labelled(model: BayesVLMForZeroShot, count: int = 60, seed: int = 0) -> LabelledFeatures:
    """Features of random images whose labels are mostly what the model says."""
    features = embed_labelled(
        model,
        Processor(),
        rows(4),
        class_names=NAMES,
        hypothesis_template=TEMPLATES,
        progress=False,
    )
    generator = torch.Generator().manual_seed(seed)
    weight = model.projection_weights()["image"]
    phi = torch.randn(count, weight.shape[1], generator=generator)
    if model.image_projection.bias is not None:
        phi[:, -1] = 1.0
    images = dataclasses.replace(
        features.images, mean=phi @ weight.T, features=phi, scale=torch.zeros(count)
    )
    mean, _ = model.similarity(
        model._gaussian(images.mean, phi, "image"), features_text(model, features)
    )
    targets = mean.argmax(dim=1)
    flipped = torch.rand(count, generator=generator) < 0.4
    targets[flipped] = torch.randint(0, len(NAMES), (int(flipped.sum()),), generator=generator)
    return dataclasses.replace(features, images=images, targets=targets)


def features_text(model: BayesVLMForZeroShot, features: LabelledFeatures) -> Any:
    return model._gaussian(features.texts.mean, features.texts.features, "text")


def slow_metrics(
    model: BayesVLMForZeroShot, features: LabelledFeatures, trial: Any
) -> dict[str, float]:
    """The candidate on a model of its own, through the model's own similarity."""
    other = BayesVLMForZeroShot.from_vlm(model.vlm, model.posterior)
    other.set_posterior(
        other.posterior.with_hyperparameters(
            pseudo_data_count=trial.pseudo_data_count,
            objective=trial.objective,
            covariance=trial.covariance,
            damping=trial.damping,
            modalities=trial.modalities,
        )
    )
    image = other._gaussian(features.images.mean, features.images.features, "image")
    mean, var = other.similarity(image, features_text(other, features))
    z = probit_logits(mean, var).double()
    y = features.targets
    if model.likelihood == "softmax":
        probs = z.softmax(dim=1)
        density = nlpd(probs, y)
    else:
        probs = z.sigmoid()
        truth = torch.nn.functional.one_hot(y, z.shape[1]).double()
        answers = torch.nn.functional.binary_cross_entropy(probs, truth, reduction="none")
        density = answers.sum(dim=1).mean().item()
    return {
        "nlpd": density,
        "ece": ece(probs, y),
        "accuracy": accuracy(probs, y),
        "brier": brier(probs, y),
        "image_prior_precision": other.posterior.image.prior_precision,
        "text_prior_precision": other.posterior.text.prior_precision,
    }


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_every_candidate_is_as_if_put_on_the_model(family):
    model = fitted(family)
    features = labelled(model)
    result = tune_posterior(
        model,
        features,
        pseudo_data_counts=(0.5, 20.0),
        modalities=("both", "image", "text"),
        max_accuracy_loss=None,
        progress=False,
    )
    # (reference + evidence factored, evidence exact) x counts x forms x modalities
    assert len(result.trials) == 3 * 2 * 2 * 3
    assert result.left_out == (
        "reference objective, exact damping: defined for factored damping only",
    )
    for trial in result.trials:
        for name, value in slow_metrics(model, features, trial).items():
            assert getattr(trial, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert len({round(trial.nlpd, 9) for trial in result.trials}) > 20
    assert result.best.nlpd == min(trial.nlpd for trial in result.trials)


@pytest.mark.parametrize("criterion", ["nlpd", "ece", "brier"])
def test_the_choice_is_the_best_that_keeps_accuracy(criterion):
    model = fitted()
    features = labelled(model)
    result = tune_posterior(
        model, features, criterion=criterion, max_accuracy_loss=0.01, progress=False
    )
    keeping = [t for t in result.trials if t.accuracy >= result.plain.accuracy - 0.01 - 1e-9]
    assert result.best in keeping
    assert getattr(result.best, criterion) == min(getattr(t, criterion) for t in keeping)
    assert result.ranked()[0] == result.best
    model.set_posterior(result.posterior)
    chosen = slow_metrics(model, features, result.best)
    assert chosen[criterion] == pytest.approx(getattr(result.best, criterion), abs=1e-6)


def test_the_chosen_posterior_says_how_it_was_chosen(tmp_path):
    model = fitted()
    features = labelled(model)
    result = tune_posterior(
        model,
        features,
        pseudo_data_counts=(10.0, 1.0),
        max_accuracy_loss=None,
        dataset_name="pictures",
        dataset_split="validation",
        progress=False,
    )
    chosen, best = result.posterior, result.best
    for name in ("covariance", "damping", "modalities", "objective"):
        assert getattr(chosen, name) == getattr(best, name)
    for name in ("image", "text"):
        part = getattr(chosen, name)
        assert part.pseudo_data_count == best.pseudo_data_count
        assert part.prior_precision == getattr(best, f"{name}_prior_precision")
    chosen.save_pretrained(tmp_path)
    record = type(chosen).from_pretrained(tmp_path).provenance["tuning"]
    assert (record["dataset"], record["split"]) == ("pictures", "validation")
    assert record["grid"]["pseudo_data_counts"] == [1.0, 10.0]
    assert record["num_images"] == 60
    assert record["chosen"]["nlpd"] == best.nlpd
    assert record["plain"]["accuracy"] == result.plain.accuracy
    table = json.loads(result.to_json())
    assert table["best"] == table["trials"][0]
    assert result.at_grid_edge == ("smallest" if best.pseudo_data_count == 1.0 else "largest")


def test_plain_metrics_are_those_of_the_base():
    model = fitted()
    features = labelled(model)
    result = tune_posterior(
        model, features, pseudo_data_counts=[1.0], max_accuracy_loss=None, progress=False
    )
    unfitted = BayesVLMForZeroShot.from_vlm(model.vlm)
    mean, _ = unfitted.similarity(features.images, features.texts)
    probs = mean.softmax(dim=1)
    assert result.plain.nlpd == pytest.approx(nlpd(probs, features.targets), rel=1e-5)
    assert result.plain.accuracy == accuracy(probs, features.targets)


def test_a_data_set_gives_what_its_features_give():
    model = fitted()
    data = rows()
    options = {"max_accuracy_loss": None, "progress": False}
    embedding = {"class_names": NAMES, "hypothesis_template": TEMPLATES}
    direct = tune_posterior(
        model, data, processor=Processor(), batch_size=7, **embedding, **options
    )
    features = embed_labelled(model, Processor(), data, progress=False, **embedding)
    again = tune_posterior(model, features, **options)
    assert direct.best.pseudo_data_count == again.best.pseudo_data_count
    for one, other in zip(direct.trials, again.trials, strict=True):
        assert one.nlpd == pytest.approx(other.nlpd, rel=1e-5)
    assert direct.posterior.provenance["tuning"]["hypothesis_template"] == list(TEMPLATES)


def test_blocks_of_images_add_up(monkeypatch):
    model = fitted()
    features = labelled(model)
    options = {"pseudo_data_counts": [3.0], "max_accuracy_loss": None, "progress": False}
    whole = tune_posterior(model, features, **options)
    monkeypatch.setattr("hf_bayesvlm.tuning_grid._BLOCK_ELEMENTS", 1000)
    assert len(_blocks(features)) > 3
    for one, other in zip(
        whole.trials, tune_posterior(model, features, **options).trials, strict=True
    ):
        assert one.nlpd == pytest.approx(other.nlpd, rel=1e-6)
        assert one.ece == pytest.approx(other.ece, abs=1e-6)


def test_the_model_is_left_as_it_was():
    model = fitted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, version = model.config.to_dict(), model.state_version()
    tune_posterior(model, rows(), processor=Processor(), max_accuracy_loss=None, progress=False)
    assert model.training
    assert model.config.to_dict() == config
    assert model.state_version() == version
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_fixed_modalities_are_respected():
    model = fitted()
    model.config.modalities = "text"
    features = labelled(model)
    options = {"max_accuracy_loss": None, "progress": False}
    result = tune_posterior(model, features, **options)
    assert {trial.modalities for trial in result.trials} == {"text"}
    with pytest.raises(ValueError, match="wins over any posterior's"):
        tune_posterior(model, features, modalities=["both"], **options)


def test_candidates_without_a_maximum_are_left_out():
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    posterior = random_posterior(model)
    part = posterior.image
    low = torch.zeros_like(part.A)
    low[0, 0] = 1.0
    model.set_posterior(
        dataclasses.replace(posterior, image=dataclasses.replace(part, A=low, B=low[:24, :24]))
    )
    features = labelled(model)
    options = {"max_accuracy_loss": None, "progress": False}
    result = tune_posterior(model, features, **options)
    assert any("no maximum for the image factors" in reason for reason in result.left_out)
    assert {trial.objective for trial in result.trials} == {"evidence"}
    with pytest.raises(ValueError, match="nothing to try"):
        tune_posterior(model, features, objectives=["reference"], **options)


# ---------------------------------------------------------------------------- features


def test_labels_by_index_name_and_declaration():
    model, processor = fitted(), Processor()
    by_name = embed_labelled(model, processor, rows(8), progress=False)
    assert by_name.class_names == tuple(sorted(NAMES))
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    declared = Dataset.from_list(rows(8), features=features)
    assert embed_labelled(model, processor, declared, progress=False).class_names == NAMES
    streamed = embed_labelled(
        model, processor, declared.to_iterable_dataset(), max_images=5, progress=False
    )
    assert streamed.targets.tolist() == [0, 1, 2, 3, 0]
    indexed = [row | {"label": i % 4} for i, row in enumerate(rows(8))]
    given = embed_labelled(model, processor, indexed, class_names=NAMES, progress=False)
    assert given.targets.tolist() == [0, 1, 2, 3] * 2
    assert given.images.scale.count_nonzero() == 0
    names = [NAMES[i] for i in given.targets]
    assert names == [by_name.class_names[i] for i in by_name.targets]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"label": "zebra"}, {"class_names": NAMES}, r"row 2: the label 'zebra' is not among"),
        ({"label": 4}, {"class_names": NAMES}, "row 2: the label 4 is not an index of the 4"),
        ({"label": -1}, {"class_names": NAMES}, "row 2: the label -1 is not an index"),
        ({"label": 1}, {}, "pass class_names"),
        ({"label": 1}, {"class_names": NAMES}, "indices in some rows, names in others"),
        ({"label": True}, {"class_names": NAMES}, "must be a class index or a class name"),
        ({"label": None}, {"class_names": NAMES}, "must be a class index or a class name"),
        ({"label": " "}, {}, "row 2: the label is empty"),
        ({}, {"label_column": "class"}, "row 0 has no column 'class'; it has image, label"),
        ({}, {"image_column": "img"}, "row 0 has no column 'img'"),
        ({}, {"class_names": ["cat"]}, "at least two classes"),
        ({}, {"class_names": ["cat", "cat"]}, "more than once"),
        ({}, {"batch_size": 0}, "batch_size"),
        ({}, {"hypothesis_template": "a photo"}, "has no {}"),
    ],
)
def test_bad_rows_and_options(change, options, message):
    data = rows(5)
    data[2] |= change
    with pytest.raises(ValueError, match=message):
        embed_labelled(fitted(), Processor(), data, progress=False, **options)


def test_bad_images_and_empty_data():
    model, processor = fitted(), Processor()
    data = rows(5)
    data[3]["image"] = b"not an image"
    with pytest.raises(ImageInputError, match="row 3"):
        embed_labelled(model, processor, data, progress=False)
    with pytest.raises(ValueError, match="data set is empty"):
        embed_labelled(model, processor, [], progress=False)
    with pytest.raises(ValueError, match="is str, not a mapping"):
        embed_labelled(model, processor, ["x"], progress=False)
    one = [row | {"label": "cat"} for row in rows(3)]
    with pytest.raises(ValueError, match="at least two classes"):
        embed_labelled(model, processor, one, progress=False)


def test_other_names_for_declared_classes_must_be_as_many():
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    data = Dataset.from_list(rows(8), features=features)
    model, processor = fitted(), Processor()
    renamed = embed_labelled(
        model, processor, data, class_names=["a", "b", "c", "d"], progress=False
    )
    assert renamed.class_names == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match="2 class names were given, the data set has 4"):
        embed_labelled(model, processor, data, class_names=["a", "b"], progress=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: {"images": f.images[:0], "targets": f.targets[:0]}, "no images"),
        (lambda f: {"targets": f.targets + 1}, "is not an index of the 4 classes"),
        (lambda f: {"targets": f.targets[:-1]}, "targets must be int64"),
        (lambda f: {"targets": f.targets.float()}, "targets must be int64"),
        (lambda f: {"class_names": NAMES[:3]}, "4 class embeddings for 3"),
        (lambda f: {"texts": f.texts[:1], "class_names": NAMES[:1]}, "at least two classes"),
        (
            lambda f: {
                "images": dataclasses.replace(
                    f.images,
                    features=f.images.features.clone().index_fill_(0, torch.tensor(7), torch.nan),
                )
            },
            "embedding of image 7 contains NaN",
        ),
        (
            lambda f: {"images": dataclasses.replace(f.images, features=f.images.features[:, 1:])},
            "the image features are for a projection of shape",
        ),
        (
            lambda f: {"fingerprint": f.fingerprint | {f.fingerprint["precision"]: "0"}},
            "other projections",
        ),
    ],
)
def test_bad_features(damage, message):
    model = fitted()
    features = labelled(model)
    with pytest.raises(ValueError, match=message):
        tune_posterior(model, dataclasses.replace(features, **damage(features)), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pseudo_data_counts": []}, "pseudo_data_counts are empty"),
        ({"pseudo_data_counts": [1.0, -2.0]}, "pseudo_data_counts must be positive"),
        ({"pseudo_data_counts": [float("nan")]}, "pseudo_data_counts must be positive"),
        ({"objectives": ["best"]}, "objectives must be a list"),
        ({"covariances": "full"}, "covariances must be a list"),
        ({"dampings": []}, "dampings must be a list"),
        ({"dampings": ["exact", "exact"]}, "twice"),
        ({"modalities": ["sound"]}, "modalities must be a list"),
        ({"criterion": "loss"}, "criterion must be one of nlpd, ece, brier"),
        ({"max_accuracy_loss": -0.1}, "max_accuracy_loss must be"),
        ({"objectives": ["reference"], "dampings": ["exact"]}, "nothing to try"),
    ],
)
def test_bad_settings(options, message):
    model = fitted()
    with pytest.raises(ValueError, match=message):
        tune_posterior(model, labelled(model), progress=False, **options)


def test_a_model_without_posterior_and_rows_without_processor():
    with pytest.raises(PosteriorError, match="no posterior to tune"):
        tune_posterior(BayesVLMForZeroShot.from_vlm(tiny_vlm()), rows(), processor=Processor())
    with pytest.raises(ValueError, match="pass processor"):
        tune_posterior(fitted(), rows())


def test_a_choice_that_costs_accuracy_is_refused():
    model = fitted()
    plain = Scores(nlpd=1.0, ece=0.1, accuracy=0.8, brier=0.5)
    result = tune_posterior(model, labelled(model), max_accuracy_loss=None, progress=False)
    trials = [
        dataclasses.replace(result.trials[0], accuracy=accuracy, nlpd=nlpd)
        for accuracy, nlpd in ((0.70, 0.1), (0.78, 0.2), (0.81, 0.3))
    ]
    assert choose_trial(trials, plain, "nlpd", None) is trials[0]
    assert choose_trial(trials, plain, "nlpd", 0.02) is trials[1]
    assert choose_trial(trials, plain, "nlpd", 0.0) is trials[2]
    with pytest.raises(ValueError, match=r"every candidate loses more .* the closest has 0\.7800"):
        choose_trial(trials[:2], plain, "nlpd", 0.01)
