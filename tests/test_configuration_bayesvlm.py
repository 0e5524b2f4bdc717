"""The configuration: model types, wrapping of plain configurations, round trips, refusals."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import tiny
from transformers import AutoConfig, CLIPConfig, SiglipConfig

from hf_bayesvlm import BayesVLMConfig, PosteriorError
from hf_bayesvlm.configuration_bayesvlm import wrap_config_dict

families = pytest.mark.parametrize("family", tiny.FAMILIES)


@families
def test_file_says_bayesvlm_and_an_instance_names_its_base(family, tmp_path):
    config = BayesVLMConfig(vlm_config=tiny.tiny_vlm(family).config)
    assert config.model_type == f"bayesvlm_{family}"
    assert ("siglip" in config.model_type) == ("siglip" in family)
    assert BayesVLMConfig.model_type == "bayesvlm"
    assert config.to_dict()["model_type"] == "bayesvlm"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bayesvlm"
    for cls in (BayesVLMConfig, AutoConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is BayesVLMConfig
        assert loaded.model_type == f"bayesvlm_{family}"
        assert type(loaded.vlm_config) is type(config.vlm_config)


@families
def test_round_trips(family, tmp_path):
    model = tiny.fitted(family)
    config = model.config
    config.hypothesis_template = ["a {}", "the {}"]
    config.num_samples = 5
    config.modalities = "image"
    config.save_pretrained(tmp_path)
    copies = [
        BayesVLMConfig.from_pretrained(tmp_path),
        BayesVLMConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ]
    for other in copies:
        assert other.model_type == config.model_type
        assert other.posterior == config.posterior
        assert other.hypothesis_template == ["a {}", "the {}"]
        assert (other.num_samples, other.modalities) == (5, "image")
        sub = other.vlm_config.to_dict()
        assert sub["text_config"] == config.vlm_config.to_dict()["text_config"]


@pytest.mark.parametrize("plain", [CLIPConfig, SiglipConfig])
def test_plain_configuration_is_wrapped(plain, tmp_path):
    plain().save_pretrained(tmp_path)
    config, unused = BayesVLMConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, modalities="text", something=1
    )
    assert type(config.vlm_config) is plain
    assert config.modalities == "text"
    assert unused == {"something": 1}
    assert (
        config.vlm_config.name_or_path == ""
    )  # a folder of this machine is nobody else's business


def test_wrapping_twice_is_wrapping_once():
    wrapped = wrap_config_dict(CLIPConfig().to_dict())
    assert wrap_config_dict(BayesVLMConfig(**wrapped).to_dict())["vlm_config"].keys() == (
        BayesVLMConfig(**wrapped).to_dict()["vlm_config"].keys()
    )
    assert BayesVLMConfig(**wrapped).to_dict()["model_type"] == "bayesvlm"


def test_dtype_of_a_plain_configuration_is_kept(tmp_path):
    CLIPConfig(dtype="float16").save_pretrained(tmp_path)
    assert str(BayesVLMConfig.from_pretrained(tmp_path).dtype) == "torch.float16"


def test_default_is_a_clip():
    assert BayesVLMConfig().model_type == "bayesvlm_clip"
    assert BayesVLMConfig().posterior is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": "audio"}, "modalities must be None or one of both, image, text"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"vlm_config": {}}, "names no model_type"),
        ({"vlm_config": {"model_type": "clap2000"}}, "does not know the model type 'clap2000'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        BayesVLMConfig(**options)


def test_posterior_of_a_newer_version(tmp_path):
    config = tiny.fitted("clip").config
    config.posterior["format_version"] = 99
    config.save_pretrained(tmp_path)
    with pytest.raises(PosteriorError, match="format version 99"):
        BayesVLMConfig.from_pretrained(tmp_path)


def test_unknown_base_in_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clap2000"}))
    with pytest.raises(ValueError, match="does not know the model type 'clap2000'"):
        BayesVLMConfig.from_pretrained(tmp_path)


def test_file_without_a_model_type(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no model_type"):
        BayesVLMConfig.from_pretrained(tmp_path)


def test_text_config_is_found():
    config = BayesVLMConfig(vlm_config=tiny.tiny_vlm("clip").config)
    assert config.get_text_config().vocab_size == len(tiny.VOCABULARY)
