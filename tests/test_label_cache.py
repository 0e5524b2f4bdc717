"""Labels are checked, tokenised as in training, encoded once and encoded again when they must be."""

from __future__ import annotations

import logging
import pickle
import threading

import pytest
import tiny
import torch

from hf_bayesvlm import BayesVLMForZeroShot
from hf_bayesvlm.label_cache import (
    DEFAULT_TEMPLATE,
    LabelCache,
    check_labels,
    check_templates,
    encode_labels,
    tokenizer_settings,
)

LABELS = ("cat", "dog", "a pizza of cat")
TEMPLATES = ("a photo of {}", "the drawing of a {} .", "{}")


class Counter:
    """Counts the runs of a model's text tower."""

    def __init__(self, model: BayesVLMForZeroShot) -> None:
        self.runs = 0
        self.shapes: list[tuple[int, ...]] = []
        model.vlm.text_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs) -> None:
        self.runs += 1
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.fixture
def model() -> BayesVLMForZeroShot:
    return tiny.fitted("clip").requires_grad_(False)


@pytest.fixture
def tokenizer():
    return tiny.tiny_tokenizer(64)


# ---------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "labels", ["cat, dog", "cat,dog", ["cat", "dog"], (" cat", "dog "), iter(["cat", "dog"])]
)
def test_labels(labels):
    assert check_labels(labels) == ("cat", "dog")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "candidate_labels are missing"),
        ([], "are empty: pass at least one"),
        ("", "are empty: pass at least one"),
        ([""], "are empty"),
        (["cat", " "], "label number 2 is empty"),
        ("cat,,dog", "label number 2 is empty"),
        (["cat", "dog", "cat "], "'cat' more than once"),
        (["cat", 3], r"must be strings, not int \(3\)"),
        ([None], "must be strings, not NoneType"),
        ([["cat"]], "must be strings, not list"),
        (b"cat", "must be strings, not int"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels)


def test_templates():
    assert check_templates(None) == (DEFAULT_TEMPLATE,)
    assert check_templates("a {}") == ("a {}",)
    assert check_templates(["a {}", "b {}"]) == ("a {}", "b {}")
    assert check_templates("{0} {{x}}") == ("{0} {{x}}",)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "empty list"),
        ("a photo", r"has no \{\}"),
        ("", r"has no \{\}"),
        (["a {}", "b"], r"'b' has no \{\}"),
        ("a {} of {}", "cannot be filled in"),
        ("a {label}", "cannot be filled in"),
        ("a {", "cannot be filled in"),
        ("a }", "cannot be filled in"),
        ("a {} {", "cannot be filled in"),
        ("a {{}}", r"has no \{\}"),
        ([3], "must be strings"),
        ("{:.1}", "bare"),
        ("{[0]}", "bare"),
        ("{0} {}", "bare"),
        ("{:d}", "cannot be filled in"),
    ],
)
def test_bad_templates(templates, message):
    with pytest.raises(ValueError, match=message):
        check_templates(templates)


# ---------------------------------------------------------------------------- tokenising


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_settings_of_a_family(family):
    model = tiny.fitted(family)
    settings = tokenizer_settings(model, tiny.tiny_tokenizer(24))
    if "siglip" in family:
        assert settings == {"padding": "max_length", "max_length": 64, "truncation": True}
    else:
        assert settings == {"padding": True, "max_length": 24, "truncation": True}


def test_no_limit_is_known():
    model, tokenizer = tiny.fitted("clip"), tiny.tiny_tokenizer(10**30)
    assert tokenizer_settings(model, tokenizer)["max_length"] == 64
    vars(model.config.vlm_config.text_config)["max_position_embeddings"] = None
    assert tokenizer_settings(model, tokenizer) == {"padding": True, "truncation": False}


def test_prompts_are_encoded_as_by_hand(model, tokenizer):
    prompts = [template.format(label) for label in LABELS for template in TEMPLATES]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    raw = model.encode_text(**tokens)
    settings = tokenizer_settings(model, tokenizer)
    single = encode_labels(model, tokenizer, prompts, ["{}"], settings)
    torch.testing.assert_close(single.mean, raw.mean)
    fused = encode_labels(model, tokenizer, LABELS, TEMPLATES, settings)
    unit = torch.nn.functional.normalize(raw.mean, dim=1).unflatten(0, (3, 3)).mean(dim=1)
    torch.testing.assert_close(fused.mean, unit)
    features = (raw.features / raw.mean.norm(dim=1, keepdim=True)).unflatten(0, (3, 3)).mean(dim=1)
    scale = (features @ model.factors.text_in_basis).square() @ model.factors.text_in_variance
    torch.testing.assert_close(fused.scale, scale)


def test_order_of_the_templates_does_not_matter(model, tokenizer):
    settings = tokenizer_settings(model, tokenizer)
    first = encode_labels(model, tokenizer, LABELS, TEMPLATES, settings)
    second = encode_labels(model, tokenizer, LABELS, TEMPLATES[::-1], settings)
    torch.testing.assert_close(first.mean, second.mean)
    torch.testing.assert_close(first.scale, second.scale)


def test_many_prompts_are_chunked(model, tokenizer):
    counter = Counter(model)
    labels = [f"cat {i}" for i in range(300)]
    settings = tokenizer_settings(model, tokenizer)
    embedding = encode_labels(model, tokenizer, labels, ["{}"], settings)
    assert [shape[0] for shape in counter.shapes] == [256, 44]
    last = encode_labels(model, tokenizer, labels[-1:], ["{}"], settings)
    torch.testing.assert_close(embedding.mean[-1:], last.mean, rtol=1e-4, atol=1e-5)


def test_tokenizer_without_a_padding_token(model, tokenizer):
    settings = tokenizer_settings(model, tokenizer)
    expected = encode_labels(model, tokenizer, LABELS, TEMPLATES, settings)
    bare = tiny.tiny_tokenizer(64)
    bare.pad_token = None
    assert bare.pad_token is None
    found = encode_labels(model, bare, LABELS, TEMPLATES, settings)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-4, atol=1e-6)


def test_long_labels_are_cut_with_one_warning(model, tokenizer, caplog):
    logger = logging.getLogger("hf_bayesvlm.label_cache")
    logger.addHandler(caplog.handler)
    try:
        cache = LabelCache()
        for _ in range(3):
            cache.get(model, tokenizer, ["cat " * 100, "dog"], ["{}"])
    finally:
        logger.removeHandler(caplog.handler)
    texts = {r.getMessage() for r in caplog.records}
    assert len(texts) == 1
    assert "1 of 2 prompts are longer than the 64 tokens" in texts.pop()


# ---------------------------------------------------------------------------- the cache


def test_hit_does_not_run_the_text_tower(model, tokenizer):
    counter, cache = Counter(model), LabelCache()
    first = cache.get(model, tokenizer, LABELS, TEMPLATES)
    assert counter.runs == 1
    assert cache.get(model, tokenizer, list(LABELS), list(TEMPLATES), {}) is first
    assert counter.runs == 1
    assert len(cache) == 1


@pytest.mark.parametrize(
    "change",
    [
        "labels",
        "label order",
        "templates",
        "tokenizer_kwargs",
        "posterior",
        "no posterior",
        "modalities",
        "copy_",
        "optimizer",
        ".data edit",
        ".data replaced",
        "parameter replaced",
        "load_state_dict",
        "dtype",
        "clear",
    ],
)
def test_a_change_is_noticed(change, model, tokenizer):
    counter, cache = Counter(model), LabelCache()
    labels, templates, options = LABELS, TEMPLATES, {}
    before = cache.get(model, tokenizer, labels, templates)
    weight = model.vlm.text_model.encoder.layers[0].mlp.fc1.weight
    if change == "labels":
        labels = (*LABELS, "car")
    elif change == "label order":
        labels = LABELS[::-1]
    elif change == "templates":
        templates = TEMPLATES[::-1]
    elif change == "tokenizer_kwargs":
        options = {"max_length": 5}
    elif change == "posterior":
        model.set_posterior(model.posterior.with_hyperparameters(pseudo_data_count=9))
    elif change == "no posterior":
        model.set_posterior(None)
    elif change == "modalities":
        model.config.modalities = "image"
    elif change == "copy_":
        with torch.no_grad():
            weight[0, 0].add_(1.0)
    elif change == "optimizer":
        weight.requires_grad_(True).grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    elif change == ".data edit":
        weight.data.mul_(2.0)
    elif change == ".data replaced":
        weight.data = weight.data * 2.0
    elif change == "parameter replaced":
        model.vlm.text_projection.weight = torch.nn.Parameter(2 * model.vlm.text_projection.weight)
    elif change == "load_state_dict":
        model.load_state_dict(tiny.fitted("clip", seed=5).state_dict())
    elif change == "dtype":
        model.double()
    else:
        cache.clear()
    after = cache.get(model, tokenizer, labels, templates, options)
    assert after is not before
    assert counter.runs == 2
    assert cache.get(model, tokenizer, labels, templates, options) is after
    assert counter.runs == 2


def test_an_edit_of_the_image_tower_is_none_of_the_labels_business(model, tokenizer):
    cache = LabelCache()
    before = cache.get(model, tokenizer, LABELS, TEMPLATES)
    with torch.no_grad():
        model.vlm.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(2.0)
    assert cache.get(model, tokenizer, LABELS, TEMPLATES) is before


def test_least_recently_used_goes_first(model, tokenizer):
    counter, cache = Counter(model), LabelCache(max_entries=2)
    for label in ("cat", "dog", "cat", "car", "cat", "dog"):
        cache.get(model, tokenizer, [label], ["{}"])
    # cat, dog, (cat), car drops dog, (cat), dog drops car
    assert counter.runs == 4
    assert len(cache) == 2


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="max_entries"):
        LabelCache(0)


def test_pickles_without_its_entries(model, tokenizer):
    cache = LabelCache(3)
    cache.get(model, tokenizer, LABELS, TEMPLATES)
    copied = pickle.loads(pickle.dumps(cache))
    assert len(copied) == 0
    assert copied.max_entries == 3


def test_sampled_directions_are_the_same_at_every_call(model, tokenizer):
    labels = LabelCache().get(model, tokenizer, LABELS, TEMPLATES)
    first = labels.sampled_directions(model, 5)
    assert first.shape == (5, 3, 24)
    assert labels.sampled_directions(model, 5) is first
    labels.sampled_directions(model, 7)
    assert torch.equal(labels.sampled_directions(model, 5), first)


def test_threads_encode_once(model, tokenizer):
    counter, cache = Counter(model), LabelCache()
    found, barrier = [], threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        for i in range(20):
            found.append(cache.get(model, tokenizer, [f"cat {i}"], TEMPLATES))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120
    assert counter.runs <= 20 + 6 * 4  # 16 entries are kept


def test_labels_that_read_the_same_are_pointed_out(caplog):
    model = tiny.fitted("clip")
    cache = LabelCache()
    cache.get(model, tiny.tiny_tokenizer(), ("cat", "dog"), ("{}",))
    assert "cannot tell" not in caplog.text
    cache.get(model, tiny.tiny_tokenizer(), ("Cat", "cat"), ("{}",))
    assert "cannot tell 'Cat' from 'cat'" in caplog.text
