"""Uncertainty for CLIP and SigLIP: a Laplace posterior after the fact (arXiv:2412.06014)."""

from ._version import __version__
from .backbones import UnsupportedBackboneError
from .configuration_bayesvlm import BayesVLMConfig
from .cosine import GaussianEmbedding
from .embedded import EMBEDDED_MODEL, SampleImage, sample_images
from .estimation import estimate_posterior
from .features import LabelledFeatures, embed_labelled
from .images import ImageInputError
from .modeling_bayesvlm import BayesVLMForZeroShot, BayesVLMOutput
from .pipeline import BayesVLMZeroShotImageClassificationPipeline
from .posterior import BayesVLMPosterior, ModalityPosterior
from .posterior_files import PosteriorError
from .registration import register
from .tuning import tune_posterior
from .tuning_result import TuningResult

register()

__all__ = [
    "EMBEDDED_MODEL",
    "BayesVLMConfig",
    "BayesVLMForZeroShot",
    "BayesVLMOutput",
    "BayesVLMPosterior",
    "BayesVLMZeroShotImageClassificationPipeline",
    "GaussianEmbedding",
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
    "register",
    "sample_images",
    "tune_posterior",
]
