"""Pipeline for zero-shot image classification with uncertainties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.utils import logging

from .acquisition import entropy_decomposition
from .base_access import evaluation_mode
from .cosine import GaussianEmbedding
from .curvature import Likelihood
from .images import load_rgb_image
from .label_cache import LabelCache, LabelSet, check_labels, check_templates
from .modeling_bayesvlm import BayesVLMForZeroShot
from .predictive import predictive_probs, probit_logits, sample_logits

logger = logging.get_logger(__name__)

TASK = "bayesvlm-zero-shot-image-classification"
# Elements of one [images, samples, labels] block.
_SAMPLE_ELEMENTS = 2**24
_IMAGE_SEED = 1


class BayesVLMZeroShotImageClassificationPipeline(Pipeline):
    """Zero-shot image classification that says how sure it is.

    Labels are encoded once and kept, so that many images cost one image tower each.

    Args:
        model: A `BayesVLMForZeroShot`; a plain CLIP/SigLIP model is wrapped (without a posterior).
        label_cache_size: Label sets that are kept.
        **kwargs: As `transformers.Pipeline`; the arguments of `__call__` may be given here as defaults.

    Example:
        >>> from transformers import pipeline
        >>> import hf_bayesvlm
        >>> pipe = pipeline("bayesvlm-zero-shot-image-classification", model=hf_bayesvlm.EMBEDDED_MODEL)
        >>> result = pipe(hf_bayesvlm.sample_images()[0].path, candidate_labels=["animal", "food"])
        >>> sorted(result[0])
        ['label', 'logit_mean', 'logit_std', 'score']
    """

    # transformers declares them as None and sets booleans.
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = True  # type: ignore[assignment]

    def __init__(self, *args: Any, label_cache_size: int = 16, **kwargs: Any) -> None:
        model: Any = kwargs.get("model", args[0] if args else None)
        # By what it can do, not by its class: a bundle loaded as remote code has classes of its own.
        if not hasattr(model, "encode_image"):
            wrapped = BayesVLMForZeroShot.from_vlm(model)
            if "model" in kwargs:
                kwargs["model"] = wrapped
            else:
                args = (wrapped, *args[1:])
        self.label_cache = LabelCache(label_cache_size)
        super().__init__(*args, **kwargs)

    def __call__(  # type: ignore[override]
        self, image: Any = None, candidate_labels: Any = None, **kwargs: Any
    ) -> Any:
        """Classify images.

        Args:
            image: An image (path, URL, base64, bytes, uint8 array or PIL), a list of images, a data set, a
                generator, or rows with an `"image"`.
            candidate_labels: Strings, or one string with commas between the labels.
            **kwargs: Any of
                `hypothesis_template` (str or list of str): prompt, or prompts to be fused; by default the
                model's own, or "This is a photo of {}.";
                `top_k` (int): how many labels to return, all by default;
                `return_uncertainty` (bool): return a dictionary with the image's entropies;
                `num_samples` (int): weight samples for the entropies;
                `tokenizer_kwargs` (dict); `batch_size` (int); `num_workers` (int);
                `timeout` (float): seconds to wait for a URL.

        Returns:
            For each image a list of `{"label", "score", "logit_mean", "logit_std"}`, best first.  With
            `return_uncertainty=True`, `{"predictions": [...], "entropy", "expected_entropy",
            "mutual_information"}` in nats; entropy is the sum of the other two.  It is that of the
            joint Monte Carlo prediction, to which the scores are the probit approximation.

        Raises:
            ValueError: For bad labels, templates or options, or NaN in the model.
            ImageInputError: For an image that cannot be used.
        """
        if "images" in kwargs:
            image = kwargs.pop("images")
        if image is None:
            raise ValueError("no images: pass one, a list, a data set or a generator")
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        elif "candidate_labels" not in self._forward_params:
            check_labels(None)
        if isinstance(image, (list, tuple)) and not image:
            # The base class looks at the first; the options are checked all the same.
            self._sanitize_parameters(**_without_loader_options(kwargs))
            return []
        return super().__call__(_as_pipeline_input(image), **kwargs)

    @property
    def bayes_model(self) -> BayesVLMForZeroShot:
        """The pipeline's model."""
        return cast(BayesVLMForZeroShot, self.model)

    def _sanitize_parameters(
        self,
        candidate_labels: str | Iterable[str] | None = None,
        hypothesis_template: str | Iterable[str] | None = None,
        top_k: int | None = None,
        return_uncertainty: bool | None = None,
        num_samples: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
        _check_count("top_k", top_k)
        _check_count("num_samples", num_samples)
        forward: dict[str, Any] = {}
        postprocess: dict[str, Any] = {}
        if candidate_labels is not None:
            forward["candidate_labels"] = check_labels(candidate_labels)
            postprocess["candidate_labels"] = forward["candidate_labels"]
        if hypothesis_template is not None:
            forward["templates"] = check_templates(hypothesis_template)
        if return_uncertainty is not None:
            forward["return_uncertainty"] = bool(return_uncertainty)
        if num_samples is not None:
            forward["num_samples"] = num_samples
        if tokenizer_kwargs is not None:
            forward["tokenizer_kwargs"] = tokenizer_kwargs
        if top_k is not None:
            postprocess["top_k"] = top_k
        return {} if timeout is None else {"timeout": timeout}, forward, postprocess

    def preprocess(  # type: ignore[override]
        self, image: Any, timeout: float | None = None
    ) -> Any:
        """Load and preprocess one image."""
        rgb = load_rgb_image(image, timeout=timeout)
        processor: Any = self.image_processor
        return processor(images=[rgb], return_tensors="pt").to(self.bayes_model.dtype)

    def _forward(  # type: ignore[override]
        self,
        model_inputs: dict[str, Any],
        candidate_labels: tuple[str, ...] = (),
        templates: tuple[str, ...] | None = None,
        return_uncertainty: bool = False,
        num_samples: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        model = self.bayes_model
        if not model.is_fitted:
            model.warn_unfitted()
        if templates is None:
            templates = check_templates(model.config.hypothesis_template)
        with evaluation_mode(model):
            labels = self.label_cache.get(
                model, self.tokenizer, candidate_labels, templates, tokenizer_kwargs
            )
            image = model.encode_image(**model_inputs)
        mean, var = model.similarity(image, labels.embedding)
        probs = predictive_probs(probit_logits(mean, var), model.likelihood)
        outputs = {"score": probs, "logit_mean": mean, "logit_std": var.sqrt()}
        if return_uncertainty:
            samples = num_samples or model.config.num_samples
            outputs |= image_uncertainty(model, image, labels, samples)
        return outputs

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: dict[str, Any],
        candidate_labels: tuple[str, ...] = (),
        top_k: int | None = None,
    ) -> Any:
        """Turn the tensors of one image into a result."""
        values = {name: tensor[0].float().cpu() for name, tensor in model_outputs.items()}
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):
            raise ValueError(
                "the model gave NaN or infinite logits: its weights are damaged, or their precision "
                f"({self.model.dtype}) is too low for them"
            )
        order = values["score"].argsort(descending=True, stable=True).tolist()[:top_k]
        columns = {name: values[name].tolist() for name in ("score", "logit_mean", "logit_std")}
        predictions = [
            {"label": candidate_labels[i], **{name: column[i] for name, column in columns.items()}}
            for i in order
        ]
        if "entropy" not in values:
            return predictions
        names = ("entropy", "expected_entropy", "mutual_information")
        return {"predictions": predictions, **{name: values[name].item() for name in names}}


def image_uncertainty(
    model: BayesVLMForZeroShot, image: GaussianEmbedding, labels: LabelSet, num_samples: int
) -> dict[str, Tensor]:
    """Entropies of each image's predictive distribution by joint Monte Carlo over the weights.

    The draws are fixed: the same image and labels give the same numbers in any batch.

    Args:
        model: Gives the posterior.
        image: `N` Gaussian image embeddings.
        labels: `C` labels.
        num_samples: Weight samples, `S`.

    Returns:
        `entropy`, `expected_entropy` and `mutual_information`, `[N]` each, in nats.
    """
    likelihood: Likelihood = model.likelihood
    directions = labels.sampled_directions(model, num_samples).to(image.mean)
    rows = max(1, _SAMPLE_ELEMENTS // (num_samples * len(labels.labels)))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(image), rows):
        logits = sample_logits(
            image[start : start + rows],
            model.covariance("image", image.mean.dtype),
            directions,
            model.logit_scale.to(directions),
            model.logit_bias.to(directions),
            generator=torch.Generator().manual_seed(_IMAGE_SEED),
        )
        probs = predictive_probs(logits, likelihood)
        parts.append(entropy_decomposition(probs, likelihood=likelihood))
    names = ("entropy", "expected_entropy", "mutual_information")
    columns = zip(*parts, strict=True)
    return {name: torch.cat(column) for name, column in zip(names, columns, strict=True)}


class _Rows(Dataset[Any]):
    """Anything with a length and items as the torch data set that the base class streams from."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def _as_pipeline_input(images: Any) -> Any:
    """One image stays as it is; many become what the base class knows: a list, a data set, a generator."""
    one = (str, bytes, bytearray, dict, np.ndarray, Tensor)
    if isinstance(images, (*one, list, Dataset)):
        return images
    if isinstance(images, tuple):
        return list(images)
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return _Rows(images)
    if hasattr(images, "__iter__"):
        return (image for image in images)
    return images


def _without_loader_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in options.items() if name not in ("batch_size", "num_workers")
    }


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
