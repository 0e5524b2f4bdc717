"""Where transformers starts to read the code that a bundle carries.

All classes come through this one module, so that whichever is asked for first brings the files of all, and
none is executed twice.
"""

from .configuration_bayesvlm import BayesVLMConfig
from .modeling_bayesvlm import BayesVLMForZeroShot
from .pipeline import BayesVLMZeroShotImageClassificationPipeline

__all__ = [
    "BayesVLMConfig",
    "BayesVLMForZeroShot",
    "BayesVLMZeroShotImageClassificationPipeline",
]
