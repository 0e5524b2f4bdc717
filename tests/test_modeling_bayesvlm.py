"""The model on tiny random bases of every family, with real files and real processors."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlignConfig,
    AlignModel,
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPProcessor,
)

from hf_bayesvlm import (
    BayesVLMConfig,
    BayesVLMForZeroShot,
    BayesVLMOutput,
    GaussianEmbedding,
    PosteriorError,
    UnsupportedBackboneError,
)

families = pytest.mark.parametrize("family", tiny.FAMILIES)
two_heads = pytest.mark.parametrize("family", ["clip", "siglip"])
FACTORS = ("image_A", "image_B", "text_A", "text_B")


def same_outputs(first: BayesVLMOutput, second: BayesVLMOutput, **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance or {"rtol": 0, "atol": 0})


def paired(family: str, pairs: int = 3) -> dict:
    return tiny.tiny_inputs(family, images=pairs, texts=pairs)


# ---------------------------------------------------------------------------- unfitted


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unfitted_logits_equal_the_stock_models_to_the_last_bit(family, dtype):
    stock = tiny.tiny_vlm(family).to(dtype)
    inputs = tiny.tiny_inputs(family)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model = BayesVLMForZeroShot.from_vlm(copy.deepcopy(stock))
    with torch.no_grad():
        expected, output = stock(**inputs), model(**inputs)
    assert not model.is_fitted
    assert model.posterior is None
    assert output.logits_per_image.dtype == dtype
    assert torch.equal(output.logits_per_image, expected.logits_per_image)
    assert torch.equal(output.logits_per_text, expected.logits_per_text)
    assert torch.equal(output.logits_mean, expected.logits_per_image)
    assert torch.equal(output.logits_var, torch.zeros_like(expected.logits_per_image))
    assert torch.equal(output.image_embeds, expected.image_embeds)


@families
@pytest.mark.parametrize("with_posterior", [False, True])
def test_return_loss_is_the_stock_loss(family, with_posterior):
    stock = tiny.tiny_vlm(family)
    inputs = paired(family)
    model = BayesVLMForZeroShot.from_vlm(copy.deepcopy(stock))
    if with_posterior:
        model.set_posterior(tiny.random_posterior(model))
    expected = stock(**inputs, return_loss=True).loss
    torch.testing.assert_close(model(**inputs, return_loss=True).loss, expected)
    assert model(**inputs).loss is None


@families
def test_loss_reaches_both_projections_and_the_logit_scale(family):
    model = tiny.fitted(family)
    model(**paired(family), return_loss=True).loss.backward()
    for weight in (
        model.image_projection.weight,
        model.text_projection.weight,
        model.vlm.logit_scale,
    ):
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0


def test_predictive_logits_are_differentiable():
    model = tiny.fitted("clip")
    output = model(**tiny.tiny_inputs("clip"))
    (output.logits_per_image.square().sum() + output.logits_var.sum()).backward()
    assert model.image_projection.weight.grad.abs().max() > 0


def test_loss_of_unequal_numbers_is_refused():
    with pytest.raises(ValueError, match="needs pairs, got 3 images and 4 texts"):
        tiny.fitted("clip")(**tiny.tiny_inputs("clip"), return_loss=True)


def test_unfitted_forward_warns_once(caplog):
    model = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip"))
    for _ in range(3):
        model(**tiny.tiny_inputs("clip"))
    assert sum("no posterior" in record.getMessage() for record in caplog.records) == 1


# ---------------------------------------------------------------------------- fitted


@families
def test_fitted_bundle_round_trip(family, tmp_path):
    model = tiny.fitted(family)
    inputs = tiny.tiny_inputs(family)
    with torch.no_grad():
        expected = model(**inputs)
    assert (expected.logits_var > 0).all()
    model.save_pretrained(tmp_path)
    for cls in (BayesVLMForZeroShot, AutoModel, AutoModelForZeroShotImageClassification):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is BayesVLMForZeroShot
        assert loaded.is_fitted
        assert not loaded.training
        with torch.no_grad():
            same_outputs(loaded(**inputs), expected)
    for name, value in model.posterior.factors().items():
        assert torch.equal(loaded.posterior.factors()[name], value)
    assert loaded.posterior.to_config() == model.posterior.to_config()


@families
def test_plain_checkpoint_loads_unfitted(family, tmp_path):
    stock = tiny.tiny_vlm(family)
    stock.save_pretrained(tmp_path)
    model, info = BayesVLMForZeroShot.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.is_fitted
    inputs = tiny.tiny_inputs(family)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits_per_image, stock(**inputs).logits_per_image)


@families
def test_encoding_and_similarity_are_the_forward_pass(family):
    model = tiny.fitted(family)
    inputs = tiny.tiny_inputs(family)
    text_inputs = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        image, text = model.encode_image(**inputs), model.encode_text(**text_inputs)
        mean, var = model.similarity(image, text)
        output = model(**inputs, **text_inputs)
    assert isinstance(image, GaussianEmbedding)
    torch.testing.assert_close(mean, output.logits_mean)
    torch.testing.assert_close(var, output.logits_var)
    probit = mean / (1 + torch.pi / 8 * var).sqrt()
    torch.testing.assert_close(output.logits_per_image, probit)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)


@families
def test_mean_is_the_projection_of_the_features(family):
    """W phi = g for both towers; SigLIP's image head adds a residual, which is the head's attention."""
    model = tiny.fitted(family)
    inputs = tiny.tiny_inputs(family)
    text_inputs = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    weights = model.projection_weights()
    with torch.no_grad():
        image, text = model.encode_image(**inputs), model.encode_text(**text_inputs)
        stock = model.vlm.get_image_features(**inputs).pooler_output
        residual = image.mean - image.features @ weights["image"].T
    assert torch.equal(image.mean, stock)
    torch.testing.assert_close(text.mean, text.features @ weights["text"].T)
    assert image.features.shape[1] == weights["image"].shape[1]
    if "siglip" not in family:
        torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-5, rtol=0)
        return
    # The residual does not depend on the last linear map.
    with torch.no_grad():
        model.image_projection.weight.mul_(2.0)
        again = model.encode_image(**inputs)
        moved = again.mean - again.features @ model.projection_weights()["image"].T
    assert residual.abs().max() > 0.01
    torch.testing.assert_close(moved, residual, atol=1e-5, rtol=1e-5)
    assert torch.equal(image.features[:, -1], torch.ones(len(image)))


@families
def test_options_of_the_posterior_reach_the_logits(family):
    inputs = tiny.tiny_inputs(family)
    base = tiny.fitted(family)
    posterior = base.posterior
    seen = []
    for options in (
        {},
        {"covariance": "full"},
        {"damping": "exact"},
        {"covariance": "full", "damping": "exact"},
        {"modalities": "image"},
        {"modalities": "text"},
        {"pseudo_data_count": 20.0},
        {"prior_precision": 100.0},
    ):
        base.set_posterior(posterior.with_hyperparameters(**options))
        with torch.no_grad():
            seen.append(base(**inputs).logits_var)
    for i, first in enumerate(seen):
        assert torch.isfinite(first).all()
        for second in seen[:i]:
            assert not torch.allclose(first, second, rtol=1e-3)


def test_set_posterior_none_takes_it_off():
    model = tiny.fitted("clip")
    inputs = tiny.tiny_inputs("clip")
    with torch.no_grad():
        expected = model.vlm(**inputs).logits_per_image
        model.set_posterior(None)
        assert torch.equal(model(**inputs).logits_per_image, expected)
    assert not model.is_fitted
    assert model.config.posterior is None


def test_posterior_property_is_a_copy():
    model = tiny.fitted("clip")
    model.posterior.image.A.zero_()
    assert model.factors.image_A.abs().max() > 0


@pytest.mark.parametrize("with_posterior", [False, True])
def test_return_dict_false_is_a_tuple(with_posterior):
    model = tiny.fitted("clip")
    if not with_posterior:
        model.set_posterior(None)
    inputs = tiny.tiny_inputs("clip")
    output = model(**inputs)
    values = model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.logits_per_image)
    assert torch.equal(values[3], output.logits_var)


# ---------------------------------------------------------------------------- unsupported


def tiny_align() -> AlignModel:
    text = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    vision = {
        "image_size": 32,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "kernel_sizes": [3],
        "in_channels": [8],
        "out_channels": [8],
        "depthwise_padding": [],
        "strides": [1],
        "num_block_repeats": [1],
        "expand_ratios": [1],
        "hidden_dim": 16,
    }
    return AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=16))


def test_align_is_refused_by_what_it_lacks(tmp_path):
    model = tiny_align()
    expected = "AlignModel is not supported: it lacks a final linear map of the image tower"
    with pytest.raises(UnsupportedBackboneError, match=expected):
        BayesVLMForZeroShot.from_vlm(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match="logit_scale"):
        BayesVLMForZeroShot.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [None, 3, torch.nn.Linear(2, 2)])
def test_from_vlm_of_something_else(value):
    with pytest.raises(TypeError, match="must be a transformers model, a folder or a Hub id"):
        BayesVLMForZeroShot.from_vlm(value)


def test_from_vlm_of_itself():
    with pytest.raises(TypeError, match="set_posterior"):
        BayesVLMForZeroShot.from_vlm(tiny.fitted("clip"))


def test_replaced_projection_is_explained():
    model = tiny.fitted("clip")
    model.vlm.visual_projection = torch.nn.Linear(32, 24, bias=False)
    with pytest.raises(UnsupportedBackboneError, match="was replaced"):
        model.encode_image(pixel_values=tiny.tiny_inputs("clip")["pixel_values"])


# ---------------------------------------------------------------------------- from_vlm


def test_from_vlm_shares_weights_and_leaves_the_callers_model_as_it_is(tmp_path):
    stock = tiny.tiny_vlm("clip").train()
    inputs = tiny.tiny_inputs("clip")
    before = stock.config.to_dict()
    model = BayesVLMForZeroShot.from_vlm(stock)
    model.set_posterior(tiny.random_posterior(model))
    assert model.vlm is stock
    assert stock.training
    assert model.training
    assert stock.config.to_dict() == before
    assert type(stock.config).__name__ == "CLIPConfig"
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock.parameters())
    # Its own forward pass keeps no activations alive.
    attributes = set(vars(stock.visual_projection))
    stock(**inputs)
    assert set(vars(stock.visual_projection)) == attributes
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    assert "posterior" not in json.loads((tmp_path / "config.json").read_text())


def test_activations_are_not_kept_after_a_pass():
    import gc
    import weakref

    model = tiny.fitted("clip")
    seen = []
    model.vlm.visual_projection.register_forward_pre_hook(
        lambda _, args: seen.append(weakref.ref(args[0]))
    )
    model.vlm(**tiny.tiny_inputs("clip"))
    model(**tiny.tiny_inputs("clip"))
    gc.collect()
    assert len(seen) == 2
    assert all(ref() is None for ref in seen)


@families
def test_from_vlm_saves_like_any_model(family, tmp_path):
    model = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm(family))
    model.set_posterior(tiny.random_posterior(model))
    model.save_pretrained(tmp_path)
    loaded, info = BayesVLMForZeroShot.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_hub_id_is_noted_as_the_base_and_a_folder_is_not(tmp_path):
    tiny.tiny_vlm("clip").save_pretrained(tmp_path / "base")
    model = BayesVLMForZeroShot.from_vlm(tmp_path / "base")
    around = BayesVLMForZeroShot.from_vlm(AutoModel.from_pretrained(tmp_path / "base"))
    for each in (model, around):
        each.set_posterior(tiny.random_posterior(each))
        assert each.posterior.base_model is None
        each.save_pretrained(tmp_path / "bundle")
        assert str(tmp_path) not in (tmp_path / "bundle" / "config.json").read_text()
    assert around.name_or_path == str(tmp_path / "base")
    assert around.posterior.fingerprint == model.posterior.fingerprint
    around.config.vlm_config.name_or_path = "user/base"
    around.set_posterior(tiny.random_posterior(around))
    assert around.posterior.base_model == "user/base"


@pytest.mark.parametrize("source", ["./missing", "/missing/folder", "~/missing", "a/b/c"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(FileNotFoundError, match="no folder"):
        BayesVLMForZeroShot.from_pretrained(source)


def test_from_vlm_with_a_posterior_folder(tmp_path):
    stock = tiny.tiny_vlm("clip")
    posterior = tiny.fitted("clip").posterior
    posterior.save_pretrained(tmp_path / "posterior")
    stock.save_pretrained(tmp_path / "base")
    for vlm in (stock, tmp_path / "base", str(tmp_path / "base")):
        model = BayesVLMForZeroShot.from_vlm(vlm, tmp_path / "posterior")
        assert torch.equal(model.factors.image_A, posterior.image.A)


def test_from_vlm_under_another_default_device_and_dtype():
    stock, posterior = tiny.tiny_vlm("clip"), tiny.fitted("clip").posterior
    inputs = tiny.tiny_inputs("clip")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = BayesVLMForZeroShot.from_vlm(stock, posterior)
    finally:
        torch.set_default_dtype(torch.float32)
    assert float32_factors(model)
    with torch.no_grad():
        same_outputs(model(**inputs), tiny.fitted("clip")(**inputs))


# ---------------------------------------------------------------------------- refusals


def test_wrong_shape_is_refused_and_the_model_is_unchanged():
    model = tiny.fitted("clip")
    before, config = model.factors, model.config.to_dict()
    other = tiny.fitted("altclip").posterior
    with pytest.raises(PosteriorError, match="text posterior is for a projection of shape"):
        model.set_posterior(other)
    assert model.factors is before
    assert model.config.to_dict() == config


def test_wrong_likelihood_is_refused():
    with pytest.raises(PosteriorError, match="softmax likelihood, SiglipModel has a sigmoid"):
        tiny.fitted("siglip").set_posterior(tiny.fitted("clip").posterior)


def test_other_base_is_refused_unless_asked_for():
    posterior = tiny.fitted("clip", seed=0).posterior
    other = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip", seed=1))
    with pytest.raises(PosteriorError, match="strict_base=False"):
        other.set_posterior(posterior)
    assert not other.is_fitted
    assert other.config.posterior is None
    other.set_posterior(posterior, strict_base=False)
    assert other.is_fitted
    # From here on it is this base's posterior, and says where it comes from.
    assert other.posterior.fingerprint == other.base_fingerprint()
    assert other.posterior.provenance["estimated_for"]["fingerprint"] == posterior.fingerprint
    with pytest.raises(PosteriorError, match="strict_base=False"):
        BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip", seed=2), other.posterior)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_base_in_another_precision_is_the_same_base(dtype):
    posterior = tiny.fitted("clip").posterior
    BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip").to(dtype), posterior)
    # And the other way round: estimated in low precision, used on the full weights cast to it.
    low = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip").to(dtype))
    low.set_posterior(tiny.random_posterior(low))
    BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip"), low.posterior)
    with pytest.raises(PosteriorError, match="other weights"):
        BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip", seed=3).to(dtype), posterior)


def test_nan_in_the_base_is_refused():
    model = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm("clip"))
    posterior = tiny.random_posterior(model)
    with torch.no_grad():
        model.text_projection.weight[0, 0] = torch.nan
    with pytest.raises(PosteriorError, match="NaN or infinity: the checkpoint is damaged"):
        model.set_posterior(posterior)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("with_posterior", [False, True])
def test_nan_pixels_are_refused(value, with_posterior):
    model = tiny.fitted("clip")
    if not with_posterior:
        model.set_posterior(None)
    inputs = tiny.tiny_inputs("clip")
    inputs["pixel_values"][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="pixel_values contain NaN"):
        model(**inputs)


@pytest.mark.parametrize("missing", ["input_ids", "pixel_values"])
@pytest.mark.parametrize("with_posterior", [False, True])
def test_missing_inputs_are_named(missing, with_posterior):
    model = tiny.fitted("clip")
    if not with_posterior:
        model.set_posterior(None)
    inputs = tiny.tiny_inputs("clip")
    del inputs[missing]
    with pytest.raises(ValueError, match=missing):
        model(**inputs)


# ---------------------------------------------------------------------------- damaged bundles


def bundle_weights(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("damage", ["missing", "nan", "asymmetric", "negative"])
def test_damaged_factors_in_a_bundle_are_refused(name, damage, tmp_path):
    tiny.fitted("clip").save_pretrained(tmp_path)
    tensors = load_file(bundle_weights(tmp_path))
    key = f"factors.{name}"
    if damage == "missing":
        del tensors[key]
    elif damage == "nan":
        tensors[key][1, 1] = torch.nan
    elif damage == "negative":
        tensors[key] = -tensors[key]
    else:
        tensors[key][0, 1] += 10.0
    save_file(tensors, bundle_weights(tmp_path), metadata={"format": "pt"})
    with pytest.raises(PosteriorError, match="damaged"):
        BayesVLMForZeroShot.from_pretrained(tmp_path)


def test_truncated_bundle_is_an_error(tmp_path):
    tiny.fitted("clip").save_pretrained(tmp_path)
    data = bundle_weights(tmp_path).read_bytes()
    bundle_weights(tmp_path).write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|truncated|safetensor"):
        BayesVLMForZeroShot.from_pretrained(tmp_path)


def test_missing_folder_is_an_error():
    with pytest.raises(OSError, match="nowhere"):
        BayesVLMForZeroShot.from_pretrained("/nowhere/at/all")


def test_missing_hub_id_offline_is_an_error():
    with pytest.raises(OSError, match="find them in the cached files"):
        BayesVLMForZeroShot.from_pretrained("no-such-user/no-such-model", local_files_only=True)


# ---------------------------------------------------------------------------- dtypes, copies


def float32_factors(model: BayesVLMForZeroShot) -> bool:
    return all(buffer.dtype == torch.float32 for buffer in model.factors.buffers())


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_in_another_dtype_keeps_the_factors(family, dtype, tmp_path):
    model = tiny.fitted(family)
    model.save_pretrained(tmp_path)
    loaded = BayesVLMForZeroShot.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert float32_factors(loaded)
    assert torch.equal(loaded.factors.image_A, model.factors.image_A)
    assert torch.equal(loaded.factors.text_in_basis, model.factors.text_in_basis)
    inputs = tiny.tiny_inputs(family)
    with torch.no_grad():
        expected = model(**inputs)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        output = loaded(**inputs)
    assert output.logits_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mean = output.logits_mean.float()
    torch.testing.assert_close(mean, expected.logits_mean, rtol=0.1, atol=0.3)


@two_heads
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_casting_keeps_the_factors(family, cast, tmp_path):
    model = tiny.fitted(family)
    before = {name: buffer.clone() for name, buffer in model.factors.named_buffers()}
    model = getattr(model, cast)()
    assert float32_factors(model)
    for name, buffer in model.factors.named_buffers():
        assert torch.equal(buffer, before[name])
    inputs = tiny.tiny_inputs(family)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        output = model(**inputs)
    assert torch.isfinite(output.logits_per_image).all()
    assert (output.logits_var > 0).all()
    # Saved in that precision, the factors are still the same.
    model.save_pretrained(tmp_path)
    loaded = BayesVLMForZeroShot.from_pretrained(tmp_path)
    assert loaded.dtype == model.dtype
    assert torch.equal(loaded.factors.image_A, before["image_A"])


def test_double_precision_is_double_throughout():
    model = tiny.fitted("clip")
    single = tiny.tiny_inputs("clip")
    with torch.no_grad():
        expected = model(**single)
        model.double()
        output = model(**single | {"pixel_values": single["pixel_values"].double()})
    assert output.logits_mean.dtype == output.logits_var.dtype == torch.float64
    torch.testing.assert_close(output.logits_var.float(), expected.logits_var, rtol=1e-4, atol=0)


def test_autocast_leaves_the_posterior_in_float32():
    model = tiny.fitted("clip")
    inputs = tiny.tiny_inputs("clip")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    assert output.logits_mean.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(
            output.logits_mean, model(**inputs).logits_mean, rtol=0.1, atol=0.3
        )


@two_heads
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("with_posterior", [False, True])
def test_copies_are_independent_and_equal(family, how, with_posterior):
    model = tiny.fitted(family)
    if not with_posterior:
        model.set_posterior(None)
    inputs = tiny.tiny_inputs(family)
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        clone = torch.load(stream, weights_only=False)
    with torch.no_grad():
        expected = model(**inputs)
        same_outputs(clone(**inputs), expected)
        clone.image_projection.weight.zero_()
        same_outputs(model(**inputs), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_goes_from_one_fitted_model_to_another(assign, tmp_path):
    first = tiny.fitted("clip", seed=0)
    tiny.fitted("clip", seed=1).save_pretrained(tmp_path)
    inputs = tiny.tiny_inputs("clip")
    for second in (tiny.fitted("clip", seed=1), BayesVLMForZeroShot.from_pretrained(tmp_path)):
        second.load_state_dict(first.state_dict(), assign=assign)
        with torch.no_grad():
            same_outputs(second(**inputs), first(**inputs))


# ---------------------------------------------------------------------------- loading options


@pytest.mark.parametrize(
    "device_map", ["auto", "cpu", {"": "cpu"}, {"vlm": "cpu", "factors": "cpu"}]
)
@two_heads
def test_device_map(device_map, family, tmp_path):
    model = tiny.fitted(family)
    model.save_pretrained(tmp_path)
    loaded = BayesVLMForZeroShot.from_pretrained(tmp_path, device_map=device_map)
    inputs = tiny.tiny_inputs(family)
    with torch.no_grad():
        same_outputs(loaded(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)


def test_disk_offload(tmp_path):
    model = tiny.fitted("clip")
    model.save_pretrained(tmp_path / "bundle")
    loaded = BayesVLMForZeroShot.from_pretrained(
        tmp_path / "bundle",
        device_map={"vlm": "disk", "factors": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    assert loaded.image_projection.weight.is_meta
    inputs = tiny.tiny_inputs("clip")
    with torch.no_grad():
        same_outputs(loaded(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    # The posterior can be replaced without the weights in memory.
    loaded.set_posterior(None)
    loaded.set_posterior(model.posterior)
    assert loaded.factors.device.type == "cpu"
    with torch.no_grad():
        same_outputs(loaded(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    other = tiny.fitted("clip", seed=1).posterior
    with pytest.raises(PosteriorError, match="other weights"):
        loaded.set_posterior(other)


def test_model_without_memory_is_told_apart():
    with torch.device("meta"):
        model = BayesVLMForZeroShot(BayesVLMConfig(vlm_config=tiny.tiny_vlm("clip").config))
    with pytest.raises(PosteriorError, match="not in memory"):
        model.set_posterior(tiny.fitted("clip").posterior)


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementation_reaches_the_towers(family, attention, tmp_path):
    model = tiny.fitted(family)
    model.save_pretrained(tmp_path)
    loaded = BayesVLMForZeroShot.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.config._attn_implementation == attention
    for tower in (loaded.vlm.vision_model, loaded.vlm.text_model):
        assert tower.config._attn_implementation == attention
    inputs = tiny.tiny_inputs(family)
    with torch.no_grad():
        same_outputs(loaded(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)


def test_attention_implementation_can_be_changed_later():
    model = tiny.fitted("clip")
    model.set_attn_implementation("eager")
    assert model.vlm.text_model.config._attn_implementation == "eager"
    assert model.vlm.vision_model.config._attn_implementation == "eager"


def test_from_vlm_keeps_the_attention_implementation():
    stock = tiny.tiny_vlm("clip")
    stock.set_attn_implementation("eager")
    model = BayesVLMForZeroShot.from_vlm(stock)
    assert model.config.vlm_config._attn_implementation == "eager"
    assert stock.text_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("size", ["10KB", "50KB"])
def test_sharded_bundle(size, tmp_path):
    model = tiny.fitted("siglip")
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = BayesVLMForZeroShot.from_pretrained(tmp_path)
    inputs = tiny.tiny_inputs("siglip")
    with torch.no_grad():
        same_outputs(loaded(**inputs), model(**inputs))


def test_options_and_config_at_loading(tmp_path):
    model = tiny.fitted("clip")
    model.save_pretrained(tmp_path)
    inputs = tiny.tiny_inputs("clip")
    loaded = BayesVLMForZeroShot.from_pretrained(tmp_path, modalities="image", num_samples=7)
    assert loaded.modalities == loaded.config.modalities == "image"
    assert loaded.config.num_samples == 7
    config = BayesVLMConfig.from_pretrained(tmp_path, modalities="image")
    by_config = BayesVLMForZeroShot.from_pretrained(tmp_path, config=config)
    model.set_posterior(model.posterior.with_hyperparameters(modalities="image"))
    with torch.no_grad():
        expected = model(**inputs)
        same_outputs(loaded(**inputs), expected)
        same_outputs(by_config(**inputs), expected)
    auto = AutoModel.from_pretrained(
        tmp_path, modalities="text", revision="main", token=None, trust_remote_code=False
    )
    assert auto.modalities == "text"
    with pytest.raises(ValueError, match="modalities must be"):
        BayesVLMForZeroShot.from_pretrained(tmp_path, modalities="sound")


def test_plain_config_of_a_base_can_be_passed(tmp_path):
    stock = tiny.tiny_vlm("clip")
    stock.save_pretrained(tmp_path)
    config = BayesVLMConfig(vlm_config=stock.config, modalities="image")
    model = BayesVLMForZeroShot.from_pretrained(tmp_path, config=config)
    assert torch.equal(model.vlm.text_projection.weight, stock.text_projection.weight)
    # That of the base itself is wrapped.
    model = BayesVLMForZeroShot.from_pretrained(tmp_path, config=stock.config)
    assert torch.equal(model.vlm.text_projection.weight, stock.text_projection.weight)


def test_processor_is_found_by_auto_processor(tmp_path):
    tiny.fitted("clip").save_pretrained(tmp_path)
    processor = CLIPProcessor(tiny.tiny_image_processor(), tiny.tiny_tokenizer())
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "CLIPProcessor"
    assert AutoTokenizer.from_pretrained(tmp_path)("a cat").input_ids == [2, 6, 10, 3]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BayesVLMConfig)


def test_training_mode_and_gradient_checkpointing():
    model = tiny.fitted("clip").train()
    assert model.vlm.training
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model(**paired("clip"), return_loss=True).loss.backward()
    assert model.image_projection.weight.grad is not None
    assert not model.eval().vlm.training


# ---------------------------------------------------------------------------- compilers, threads


@two_heads
@pytest.mark.parametrize("with_posterior", [False, True])
def test_torch_compile_without_graph_breaks(family, with_posterior):
    model = tiny.fitted(family)
    if not with_posterior:
        model.set_posterior(None)
    inputs = tiny.tiny_inputs(family)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same_outputs(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
        other = tiny.tiny_inputs(family, seed=1)
        same_outputs(compiled(**other), model(**other), rtol=1e-5, atol=1e-5)
    assert "_bayesvlm_input" not in vars(model.image_projection)


def test_torch_compile_of_one_tower_of_any_size():
    model = tiny.fitted("clip")
    torch._dynamo.reset()
    compiled = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for texts in (2, 3, 5):
            inputs = tiny.tiny_inputs("clip", texts=texts)
            del inputs["pixel_values"]
            torch.testing.assert_close(
                compiled(**inputs).scale, model.encode_text(**inputs).scale, rtol=1e-4, atol=1e-6
            )


def test_a_graph_break_inside_of_a_tower():
    model = tiny.fitted("clip")
    inputs = tiny.tiny_inputs("clip")
    with torch.no_grad():
        expected = model(**inputs)

    def graph_break(*_):
        torch._dynamo.graph_break()

    model.vlm.vision_model.register_forward_hook(graph_break)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        same_outputs(compiled(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_compiling_the_callers_model_leaves_nothing_on_it():
    stock = tiny.tiny_vlm("clip")
    BayesVLMForZeroShot.from_vlm(stock)
    torch._dynamo.reset()
    compiled = torch.compile(stock, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(**tiny.tiny_inputs("clip"))
    assert not any("bayesvlm" in name for name in vars(stock.visual_projection))


@two_heads
@pytest.mark.parametrize("with_posterior", [False, True])
def test_torch_export(family, with_posterior):
    model = tiny.fitted(family)
    if not with_posterior:
        model.set_posterior(None)
    inputs = tiny.tiny_inputs(family)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        output = program.module()(**inputs)
        expected = model(**inputs)
    for name in expected:
        torch.testing.assert_close(output[name], expected[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        same_outputs(model(**inputs), expected)


def test_threads_that_share_a_model_do_not_mix():
    model = tiny.fitted("clip")
    inputs = [tiny.tiny_inputs("clip", seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**each) for each in inputs]
    wrong = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                output = model(**inputs[index])
                if not torch.equal(output.logits_var, expected[index].logits_var):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_warnings_from_python(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny.fitted("clip")
        model.save_pretrained(tmp_path)
        BayesVLMForZeroShot.from_pretrained(tmp_path)(**tiny.tiny_inputs("clip"))
