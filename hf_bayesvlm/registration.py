"""Make transformers know the package's classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_bayesvlm import MODEL_TYPE, BayesVLMConfig
from .modeling_bayesvlm import BayesVLMForZeroShot
from .pipeline import TASK, BayesVLMZeroShotImageClassificationPipeline


def register() -> None:
    """Register configuration, model and pipeline; importing the package does it, again is harmless."""
    AutoConfig.register(MODEL_TYPE, BayesVLMConfig, exist_ok=True)
    AutoModel.register(BayesVLMConfig, BayesVLMForZeroShot, exist_ok=True)
    # This mapping also tells the stock pipeline that the model is one of its own.
    AutoModelForZeroShotImageClassification.register(
        BayesVLMConfig, BayesVLMForZeroShot, exist_ok=True
    )
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=BayesVLMZeroShotImageClassificationPipeline,
            pt_model=AutoModelForZeroShotImageClassification,
            type="multimodal",
        )
        # With it, saving a pipeline would copy the package's source next to the weights and demand
        # `trust_remote_code` at loading.
        delattr(BayesVLMZeroShotImageClassificationPipeline, "_registered_impl")
