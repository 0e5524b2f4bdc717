"""Uncertainty for CLIP and SigLIP: a Laplace posterior after the fact (arXiv:2412.06014)."""

from ._version import __version__
from .backbones import UnsupportedBackboneError
from .configuration_bayesvlm import BayesVLMConfig
from .cosine import GaussianEmbedding
from .embedded import EMBEDDED_MODEL, SampleImage, sample_images
from .estimation import estimate_posterior
from .hub_errors import HubError
from .images import ImageInputError
from .modeling_bayesvlm import BayesVLMForZeroShot, BayesVLMOutput
from .pipeline import BayesVLMZeroShotImageClassificationPipeline
from .posterior import BayesVLMPosterior, ModalityPosterior
from .posterior_files import PosteriorError
from .registration import register
from .sources import open_dataset

register()

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
    "ModalityPosterior",
    "PosteriorError",
    "SampleImage",
    "UnsupportedBackboneError",
    "__version__",
    "estimate_posterior",
    "open_dataset",
    "register",
    "sample_images",
]
