"""Zero-shot classification with the uncertainty of a Laplace posterior (arXiv:2412.06014)."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .backbones import (
    inspect_backbone,
    run_tower,
    watch_projections,
)
from .base_access import BaseAccess, execution_device
from .base_check import fit_to_base
from .bundle_hub import BundleHub
from .configuration_bayesvlm import BayesVLMConfig
from .cosine import (
    GaussianEmbedding,
    Modalities,
    fuse_templates,
    gaussian_embedding,
    prob_cosine,
)
from .fingerprint import fingerprints_match
from .kronecker import KroneckerGaussian
from .model_loading import ModelLoading
from .outputs import BayesVLMOutput, contrastive_loss
from .posterior import BayesVLMPosterior
from .posterior_buffers import PosteriorBuffers
from .posterior_files import PosteriorError, hub_id
from .predictive import probit_logits
from .tower_inputs import check_finite, split_inputs

logger = logging.get_logger(__name__)

_versions = itertools.count(1)


class BayesVLMForZeroShot(BaseAccess, BundleHub, ModelLoading, PreTrainedModel):  # type: ignore[misc]
    """A CLIP- or SigLIP-like model with a Laplace posterior over its two final projections.

    Without a posterior (`is_fitted` is False) it computes exactly what the plain model computes, with a
    variance of 0.

    Args:
        config: Configuration; with `config.posterior` the factors are expected in the checkpoint.

    Raises:
        UnsupportedBackboneError: If the base does not end in two linear maps.
    """

    config_class = BayesVLMConfig
    base_model_prefix = "vlm"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012  as transformers declares it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["PosteriorBuffers"]  # noqa: RUF012  transformers expects a list

    def __init__(self, config: BayesVLMConfig) -> None:
        config.check_options()
        super().__init__(config)
        self.vlm = AutoModel.from_config(config.vlm_config)
        self._spec = inspect_backbone(self.vlm)
        watch_projections(self.vlm, self._spec)
        self.factors: PosteriorBuffers | None = None
        if config.posterior is not None:
            self.factors = PosteriorBuffers(config.posterior)
        self._posterior_version = next(_versions)
        self._warned_unfitted = False
        self.post_init()

    # ------------------------------------------------------------------ making one

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a bundle, a plain CLIP/SigLIP checkpoint (then without a posterior), or a posterior.

        A posterior brings the base model that it names, at the revision that it names; `revision` and
        `subfolder` are then the posterior's, all other options hold for both.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *args: As `PreTrainedModel.from_pretrained`.
            **kwargs: As `PreTrainedModel.from_pretrained`, and the options of `BayesVLMConfig`.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: If it is written like a path and there is no such folder.
            PosteriorError: If the configuration announces a posterior that the weights lack, or a posterior
                does not belong to the base model that it names.
            OSError: If there is no such repository, it holds no model, or only pickled weights.
        """
        source = pretrained_model_name_or_path
        if source is not None and hub_id(source) is None and not Path(source).exists():
            raise FileNotFoundError(f"no folder {str(source)!r}, and it is not a Hub id")
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and not hasattr(config, "vlm_config"):
            kwargs["config"] = BayesVLMConfig(vlm_config=copy.deepcopy(config), dtype=config.dtype)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} cannot be read ({error}): they are "
                "truncated or damaged; download or save them again"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.factors is not None and not model.factors.is_complete():
            raise PosteriorError(
                f"{pretrained_model_name_or_path}: config.json announces a posterior, but its factors "
                "are not among the weights or are damaged. Save the bundle again with "
                "model.save_pretrained(), or load the base model and set the posterior on it"
            )
        model.warn_other_base()
        return loaded

    # ------------------------------------------------------------------ the posterior

    @property
    def is_fitted(self) -> bool:
        """Whether the model has a posterior."""
        return self.factors is not None

    @property
    def posterior(self) -> BayesVLMPosterior | None:
        """The posterior as a shareable object, or None."""
        if self.factors is None:
            return None
        factors = {
            name: factor.to("cpu", copy=True) for name, factor in self.factors.factors().items()
        }
        return BayesVLMPosterior.from_config(self.config.posterior, factors)

    def set_posterior(
        self, posterior: BayesVLMPosterior | None, *, strict_base: bool = True
    ) -> None:
        """Put a posterior on the model, or take it off with None.

        Args:
            posterior: The posterior.
            strict_base: Refuse a posterior that was estimated for other weights of the same shapes.

        Raises:
            PosteriorError: If shapes, likelihood or fingerprint do not fit; the model is then unchanged.
        """
        if posterior is None:
            self.factors, self.config.posterior = None, None
        elif not hasattr(posterior, "with_hyperparameters"):
            raise TypeError(
                f"posterior must be a BayesVLMPosterior, not {type(posterior).__name__}: load it with "
                "BayesVLMPosterior.from_pretrained()"
            )
        else:
            posterior = fit_to_base(
                posterior,
                likelihood=self.likelihood,
                fingerprint=self.base_fingerprint(),
                weights=self.projection_weights(),
                base_name=type(self.vlm).__name__,
                base_model=hub_id(self.config.vlm_config.name_or_path),
                strict=strict_base,
            )
            config = posterior.to_config()
            with torch.device("cpu"):
                buffers = PosteriorBuffers(config)
            buffers.load(posterior)
            self.factors = buffers.to(execution_device(self.image_projection))
            self.config.posterior = config
        self._posterior_version = next(_versions)

    @property
    def modalities(self) -> Modalities:
        """Whose uncertainty counts: the configuration's choice, or else the posterior's."""
        chosen = self.config.modalities
        if chosen is None and self.config.posterior is not None:
            chosen = self.config.posterior.get("modalities")
        return cast(Modalities, chosen or "both")

    def state_version(self) -> tuple[Any, ...]:
        """Changes with the posterior, with options, and whenever a weight of the text tower is changed."""
        return (self._posterior_version, self.modalities, self.text_weights_stamp())

    def covariance(
        self, modality: str, dtype: torch.dtype = torch.float32
    ) -> KroneckerGaussian | None:
        """Posterior covariance of the `"image"` or `"text"` projection; None where it does not count."""
        if self.factors is None or self.modalities not in ("both", modality):
            return None
        return self.factors.covariance(modality, dtype)

    # ------------------------------------------------------------------ computing

    def encode_image(self, pixel_values: Tensor | None = None, **kwargs: Any) -> GaussianEmbedding:
        """Gaussian embeddings of images.

        Args:
            pixel_values: Preprocessed images, `[images, channels, height, width]`.
            **kwargs: Further arguments of the base's `get_image_features`.

        Returns:
            `images` Gaussian embeddings.

        Raises:
            ValueError: If there are no pixels, or they contain NaN or infinity.
        """
        if pixel_values is None:
            raise ValueError(
                "pixel_values are missing: preprocess images with the model's processor"
            )
        check_finite("pixel_values", pixel_values)
        inputs = {"pixel_values": pixel_values, **kwargs}
        mean, features = run_tower(self.image_projection, self.image_tower, inputs)
        return self._gaussian(mean, features, "image")

    def encode_text(self, input_ids: Tensor | None = None, **kwargs: Any) -> GaussianEmbedding:
        """Gaussian embeddings of texts.

        Args:
            input_ids: Token ids, `[texts, tokens]`.
            **kwargs: Further arguments of the base's `get_text_features`, such as `attention_mask`.

        Returns:
            `texts` Gaussian embeddings.

        Raises:
            ValueError: If there are no tokens.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing: tokenize texts with the model's processor")
        inputs = {"input_ids": input_ids, **kwargs}
        mean, features = run_tower(self.text_projection, self.text_tower, inputs)
        return self._gaussian(mean, features, "text")

    def fuse_templates(self, text: GaussianEmbedding, num_templates: int) -> GaussianEmbedding:
        """Fuse the prompts of each label, `num_templates` neighbouring rows, into one embedding."""
        covariance = None
        if self.factors is not None:
            covariance = self.factors.covariance("text", text.mean.dtype)
        return fuse_templates(text, num_templates, covariance)

    def similarity(
        self,
        image: GaussianEmbedding,
        text: GaussianEmbedding,
        *,
        modalities: Modalities | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the logits of every image with every text.

        Args:
            image: From `encode_image`.
            text: From `encode_text`.
            modalities: Whose uncertainty counts, if not as the model is set.

        Returns:
            Means and variances, `[images, texts]` each, in the embeddings' dtype.

        Raises:
            ValueError: For an unknown `modalities`.
        """
        dtype, device = image.mean.dtype, image.mean.device
        geometry = None
        if self.factors is not None:
            device = self.factors.device
            geometry = self.factors.geometry(dtype)
        image, text = image.to(device), text.to(device, dtype)
        scale, bias = self.logit_scale.to(device), self.logit_bias.to(device)
        with torch.autocast(device.type, enabled=False):
            mean, var = prob_cosine(image, text, geometry, modalities=modalities or self.modalities)
            return scale * mean + bias, scale.square() * var

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BayesVLMOutput | tuple[Any, ...]:
        """Score every image against every text.

        Args:
            input_ids: Token ids, `[texts, tokens]`.
            pixel_values: Preprocessed images, `[images, channels, height, width]`.
            attention_mask: `[texts, tokens]`.
            position_ids: `[texts, tokens]`.
            return_loss: Add the contrastive loss of the base (as many images as texts, in pairs).
            return_dict: False for a tuple.
            **kwargs: Further arguments of the base model's towers.

        Returns:
            The output.

        Raises:
            ValueError: If an input is missing or the pixels are not finite.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self.factors is None:
            return self._plain_forward(inputs, pixel_values, return_loss, return_dict)
        image_inputs, text_inputs = split_inputs(inputs)
        image = self.encode_image(pixel_values, **image_inputs)
        text = self.encode_text(**text_inputs)
        return self._as_asked(self._score(image, text, bool(return_loss)), return_dict)

    def _plain_forward(
        self,
        inputs: dict[str, Any],
        pixel_values: Tensor | None,
        return_loss: bool | None,
        return_dict: bool | None,
    ) -> BayesVLMOutput | tuple[Any, ...]:
        """The base's own forward pass, so that its logits come out to the last bit."""
        if pixel_values is None or "input_ids" not in inputs:
            raise ValueError(
                "both pixel_values and input_ids are needed: use the model's processor"
            )
        check_finite("pixel_values", pixel_values)
        if not (self.training or return_loss or torch.compiler.is_compiling()):
            self.warn_unfitted()
        plain = self.vlm(pixel_values=pixel_values, return_loss=return_loss, **inputs)
        output = BayesVLMOutput(
            loss=plain.loss,
            logits_per_image=plain.logits_per_image,
            logits_per_text=plain.logits_per_text,
            logits_mean=plain.logits_per_image,
            logits_var=torch.zeros_like(plain.logits_per_image),
            image_embeds=plain.image_embeds,
            text_embeds=plain.text_embeds,
        )
        return self._as_asked(output, return_dict)

    def _as_asked(
        self, output: BayesVLMOutput, return_dict: bool | None
    ) -> BayesVLMOutput | tuple[Any, ...]:
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def warn_other_base(self) -> None:
        """Say that the projections are no longer those that the posterior was estimated for."""
        stated = (self.config.posterior or {}).get("fingerprint")
        if stated is None or self.image_projection.weight.is_meta:
            return
        if not fingerprints_match(stated, self.base_fingerprint()):
            logger.warning(
                "The final projections have changed since the posterior was estimated: its variances "
                "belong to other weights. Estimate a posterior for these."
            )

    def warn_unfitted(self) -> None:
        """Say once that the model has no posterior."""
        if not self._warned_unfitted:
            self._warned_unfitted = True
            logger.warning(
                "This model has no posterior: its scores are those of the plain model, with no "
                "uncertainty. Put one on it with model.set_posterior(), or load a bundle that has one."
            )

    def _score(
        self, image: GaussianEmbedding, text: GaussianEmbedding, return_loss: bool
    ) -> BayesVLMOutput:
        mean, var = self.similarity(image, text)
        logits = probit_logits(mean, var)
        image_embeds = nn.functional.normalize(image.mean, dim=-1)
        text_embeds = nn.functional.normalize(text.mean, dim=-1).to(image_embeds.device)
        loss = None
        if return_loss:
            plain = image_embeds @ text_embeds.T * self.logit_scale.to(mean) + self.logit_bias.to(
                mean
            )
            loss = contrastive_loss(plain, self.likelihood)
        return BayesVLMOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            logits_mean=mean,
            logits_var=var,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def _gaussian(self, mean: Tensor, features: Tensor, modality: str) -> GaussianEmbedding:
        if self.factors is None:
            return gaussian_embedding(mean, features, None)
        if not self.factors.is_derived:
            raise PosteriorError(
                "the configuration announces a posterior, but no factors were loaded: load the bundle "
                "with from_pretrained(), or call set_posterior()"
            )
        covariance, device = self.factors.covariance(modality, mean.dtype), self.factors.device
        with torch.autocast(device.type, enabled=False):
            return gaussian_embedding(mean.to(device), features.to(device), covariance)

    def _init_weights(self, module: nn.Module) -> None:
        # Runs after loading, when buffers that are not in the checkpoint hold arbitrary memory.
        if isinstance(module, PosteriorBuffers):
            module.after_loading()
