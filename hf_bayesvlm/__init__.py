"""Uncertainty for CLIP and SigLIP: a Laplace posterior after the fact (arXiv:2412.06014)."""

from ._version import __version__
from .backbones import UnsupportedBackboneError
from .configuration_bayesvlm import BayesVLMConfig
from .cosine import GaussianEmbedding
from .modeling_bayesvlm import BayesVLMForZeroShot, BayesVLMOutput
from .posterior import BayesVLMPosterior
from .posterior_files import PosteriorError
from .posterior_modality import ModalityPosterior

__all__ = [
    "BayesVLMConfig",
    "BayesVLMForZeroShot",
    "BayesVLMOutput",
    "BayesVLMPosterior",
    "GaussianEmbedding",
    "ModalityPosterior",
    "PosteriorError",
    "UnsupportedBackboneError",
    "__version__",
]
