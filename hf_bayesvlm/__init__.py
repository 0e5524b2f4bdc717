"""Uncertainty for CLIP and SigLIP: a Laplace posterior after the fact (arXiv:2412.06014)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .backbones import UnsupportedBackboneError
from .configuration_bayesvlm import BayesVLMConfig
from .cosine import GaussianEmbedding
from .embedded import EMBEDDED_MODEL, SampleImage, sample_images
from .hub_errors import HubError
from .images import ImageInputError
from .modeling_bayesvlm import BayesVLMForZeroShot, BayesVLMOutput
from .pipeline import BayesVLMZeroShotImageClassificationPipeline
from .posterior import BayesVLMPosterior, ModalityPosterior
from .posterior_files import PosteriorError
from .registration import register

if TYPE_CHECKING:
    from .estimation import estimate_posterior
    from .features import LabelledFeatures, embed_labelled
    from .sources import open_dataset
    from .tuning import tune_posterior
    from .tuning_result import TuningResult

register()

# Who classifies does not need them, nor `datasets`, which takes half a second to import.
_LAZY = {
    "LabelledFeatures": "features",
    "TuningResult": "tuning_result",
    "embed_labelled": "features",
    "estimate_posterior": "estimation",
    "open_dataset": "sources",
    "tune_posterior": "tuning",
}

__all__ = [
    "EMBEDDED_MODEL",
    "BayesVLMConfig",
    "BayesVLMForZeroShot",
    "BayesVLMOutput",
    "BayesVLMPosterior",
    "BayesVLMZeroShotImageClassificationPipeline",
    "GaussianEmbedding",
    "HubError",
    "ImageInputError",
    "LabelledFeatures",
    "ModalityPosterior",
    "PosteriorError",
    "SampleImage",
    "TuningResult",
    "UnsupportedBackboneError",
    "__version__",
    "embed_labelled",
    "estimate_posterior",
    "open_dataset",
    "register",
    "sample_images",
    "tune_posterior",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
