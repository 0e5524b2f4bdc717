"""Tiny random vision-language models with real processors, made on the spot."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior, ModalityPosterior

FAMILIES = (
    "clip",
    "siglip",
    "siglip2",
    "metaclip_2",
    "chinese_clip",
    "altclip",
    "vision-text-dual-encoder",
)
WORDS = ["this", "is", "a", "photo", "of", "an", "cat", "dog", "car", "pizza", "the", "drawing"]
_SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
VOCABULARY = list(
    dict.fromkeys([*_SPECIAL, *WORDS, *string.ascii_lowercase, *string.digits, *string.punctuation])
)
IMAGE_SIZE = 32
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = {**_TOWER, "image_size": IMAGE_SIZE, "patch_size": 8}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def tiny_vlm(family: str = "clip", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of a family, in evaluation mode; the global random state is left as it was."""
    builders = {
        "clip": _clip,
        "siglip": _siglip,
        "siglip2": _siglip2,
        "metaclip_2": _metaclip2,
        "chinese_clip": _chinese_clip,
        "altclip": _altclip,
        "vision-text-dual-encoder": _dual_encoder,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = builders[family](**config).eval()
        with torch.no_grad():
            # Random towers barely tell inputs apart; a spread of embeddings makes tests see something.
            for name, parameter in model.named_parameters():
                if "projection" in name or "head" in name:
                    parameter.normal_(0.0, 0.3)
            model.logit_scale.fill_(2.3)
            if hasattr(model, "logit_bias"):
                model.logit_bias.fill_(-1.5)
    return model


def tiny_inputs(family: str, *, images: int = 3, texts: int = 4, seed: int = 0) -> dict[str, Any]:
    """Random inputs of the right form for a family."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, len(VOCABULARY), (texts, 9), generator=generator)
    ids[:, -1] = _IDS["eos_token_id"]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    }
    if family == "siglip2":
        inputs["pixel_values"] = torch.randn(images, 16, 8 * 8 * 3, generator=generator)
        inputs["pixel_attention_mask"] = torch.ones(images, 16, dtype=torch.int32)
        inputs["spatial_shapes"] = torch.tensor([[4, 4]] * images)
    return inputs


def random_posterior(model: BayesVLMForZeroShot, seed: int = 0, **values: Any) -> BayesVLMPosterior:
    """A posterior with random positive semi-definite factors that fits a model."""
    generator = torch.Generator().manual_seed(seed)

    def factor(size: int) -> torch.Tensor:
        root = torch.randn(size, 2 * size, generator=generator)
        return root @ root.T / size

    parts = {
        name: ModalityPosterior(
            A=factor(weight.shape[1]),
            B=factor(weight.shape[0]),
            pseudo_data_count=2.0,
            prior_precision=30.0,
        )
        for name, weight in model.projection_weights().items()
    }
    return BayesVLMPosterior(**parts, likelihood=model.likelihood, **values)


def fitted(family: str = "clip", seed: int = 0, **values: Any) -> BayesVLMForZeroShot:
    """A tiny model with a random posterior."""
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm(family, seed))
    model.set_posterior(random_posterior(model, seed, **values))
    return model


def tiny_tokenizer(max_length: int = 24) -> PreTrainedTokenizerFast:
    """A word and character tokenizer over `VOCABULARY`."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_image_processor(family: str = "clip") -> Any:
    """An image processor for the tiny images."""
    if family == "siglip":
        return SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def save_bundle(model: PreTrainedModel, folder: Path, family: str = "clip") -> Path:
    """Save a model with tokenizer and image processor, as a user would."""
    model.save_pretrained(folder)
    tiny_tokenizer(64).save_pretrained(folder)
    tiny_image_processor(family).save_pretrained(folder)
    return folder


def _text(**extra: Any) -> dict[str, Any]:
    return {**_TOWER, "vocab_size": len(VOCABULARY), "max_position_embeddings": 64, **_IDS, **extra}


def _clip(**config: Any) -> PreTrainedModel:
    return CLIPModel(
        CLIPConfig(
            text_config=_text(projection_dim=24),
            vision_config={**_VISION, "projection_dim": 24},
            projection_dim=24,
            **config,
        )
    )


def _metaclip2(**config: Any) -> PreTrainedModel:
    return MetaClip2Model(
        MetaClip2Config(
            text_config=_text(projection_dim=24),
            vision_config={**_VISION, "projection_dim": 24},
            projection_dim=24,
            **config,
        )
    )


def _siglip(**config: Any) -> PreTrainedModel:
    return SiglipModel(
        SiglipConfig(text_config=_text(projection_size=32), vision_config=_VISION, **config)
    )


def _siglip2(**config: Any) -> PreTrainedModel:
    vision = {**_TOWER, "patch_size": 8, "num_patches": 16}
    return Siglip2Model(
        Siglip2Config(text_config=_text(projection_size=32), vision_config=vision, **config)
    )


def _chinese_clip(**config: Any) -> PreTrainedModel:
    return ChineseCLIPModel(
        ChineseCLIPConfig(
            text_config=_text(),
            vision_config={**_VISION, "projection_dim": 24},
            projection_dim=24,
            **config,
        )
    )


def _altclip(**config: Any) -> PreTrainedModel:
    text = _text(project_dim=28, type_vocab_size=1, pooler_fn="cls")
    return AltCLIPModel(
        AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24, **config)
    )


def _dual_encoder(**config: Any) -> PreTrainedModel:
    text = BertConfig(
        **{key: value for key, value in _text().items() if "bos" not in key and "eos" not in key}
    )
    vision = ViTConfig(**_VISION)
    joint = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=24, **config
    )
    return VisionTextDualEncoderModel(config=joint)
