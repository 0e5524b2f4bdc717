"""The adapter finds and watches the two projections."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
from torch import nn

from hf_bayesvlm import UnsupportedBackboneError
from hf_bayesvlm.backbones import (
    at_least_float32,
    inspect_backbone,
    projection_weight,
    run_tower,
    watch_projections,
)

families = pytest.mark.parametrize("family", tiny.FAMILIES)


@families
def test_projections_are_the_last_linear_maps(family):
    vlm = tiny.tiny_vlm(family)
    spec = inspect_backbone(vlm)
    assert spec.likelihood == ("sigmoid" if "siglip" in family else "softmax")
    for name in (spec.image_projection, spec.text_projection):
        assert isinstance(vlm.get_submodule(name), nn.Linear)
    # Without them the embeddings are constant (SigLIP's image head has a residual).
    inputs = tiny.tiny_inputs(family)
    ids = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        vlm.get_submodule(spec.text_projection).weight.zero_()
        text = vlm.get_text_features(**ids).pooler_output
    assert torch.equal(text[0], text[1])


@families
@pytest.mark.parametrize("side", ["image", "text"])
def test_embedding_and_features(family, side):
    vlm = tiny.tiny_vlm(family)
    spec = inspect_backbone(vlm)
    watch_projections(vlm, spec)
    inputs = tiny.tiny_inputs(family)
    ids = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    tower = vlm.get_image_features if side == "image" else vlm.get_text_features
    inputs = inputs if side == "image" else ids
    projection = vlm.get_submodule(getattr(spec, f"{side}_projection"))
    with torch.no_grad():
        embedding, features = run_tower(projection, tower, inputs)
        assert torch.equal(embedding, tower(**inputs).pooler_output)
    weight = projection_weight(projection.weight, projection.bias)
    assert features.shape == (len(embedding), weight.shape[1])
    assert embedding.shape[1] == weight.shape[0]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("visual_projection", "a final linear map of the image tower"),
        ("text_projection", "a final linear map of the text tower"),
        ("logit_scale", "a logit_scale"),
    ],
)
def test_what_is_missing_is_named(attribute, message):
    vlm = tiny.tiny_vlm("clip")
    setattr(vlm, attribute, None)
    with pytest.raises(UnsupportedBackboneError, match=message):
        inspect_backbone(vlm)


def test_everything_missing_is_named_at_once():
    with pytest.raises(
        UnsupportedBackboneError,
        match=r"Linear is not supported: .*image.*text.*get_text_features\(\)",
    ):
        inspect_backbone(nn.Linear(2, 2))


def test_watching_twice_is_watching_once():
    vlm = tiny.tiny_vlm("clip")
    spec = inspect_backbone(vlm)
    for _ in range(3):
        watch_projections(vlm, spec)
    copied = copy.deepcopy(vlm)
    watch_projections(copied, spec)
    for model in (vlm, copied):
        assert len(model.visual_projection._forward_pre_hooks) == 1


def test_a_failing_tower_leaves_nothing_behind():
    vlm = tiny.tiny_vlm("clip")
    watch_projections(vlm, inspect_backbone(vlm))
    good = {"pixel_values": tiny.tiny_inputs("clip")["pixel_values"]}
    with pytest.raises(ValueError, match="doesn't match model"):
        run_tower(
            vlm.visual_projection, vlm.get_image_features, {"pixel_values": torch.zeros(1, 3, 5, 5)}
        )
    embedding, _ = run_tower(vlm.visual_projection, vlm.get_image_features, good)
    assert len(embedding) == 3


def test_nested_towers():
    """A tower that runs another model on the way keeps its own features."""
    first, second = tiny.tiny_vlm("clip"), tiny.tiny_vlm("clip", seed=1)
    for vlm in (first, second):
        watch_projections(vlm, inspect_backbone(vlm))
    inputs = {"pixel_values": tiny.tiny_inputs("clip")["pixel_values"]}
    _, expected = run_tower(first.visual_projection, first.get_image_features, inputs)

    def tower(**kwargs):
        run_tower(second.visual_projection, second.get_image_features, kwargs)
        return first.get_image_features(**kwargs)

    _, features = run_tower(first.visual_projection, tower, inputs)
    assert torch.equal(features, expected)


def test_threads_record_their_own():
    vlm = tiny.tiny_vlm("clip")
    watch_projections(vlm, inspect_backbone(vlm))
    batches = [{"pixel_values": tiny.tiny_inputs("clip", seed=i)["pixel_values"]} for i in range(3)]
    with torch.no_grad():
        expected = [run_tower(vlm.visual_projection, vlm.get_image_features, b)[1] for b in batches]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(60):
                _, features = run_tower(
                    vlm.visual_projection, vlm.get_image_features, batches[index]
                )
                if not torch.equal(features, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weight_with_bias():
    linear = nn.Linear(3, 2)
    weight = projection_weight(linear.weight, linear.bias)
    assert torch.equal(weight[:, :3], linear.weight)
    assert torch.equal(weight[:, 3], linear.bias)
    assert not weight.requires_grad
    assert projection_weight(linear.weight.half(), None).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == expected
