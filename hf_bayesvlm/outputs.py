"""What the model returns, and the loss its base was trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .curvature import Likelihood


@dataclass
class BayesVLMOutput(ModelOutput):
    """Output of `BayesVLMForZeroShot`.

    Attributes:
        loss: Contrastive loss of the base model on its plain (MAP) logits, with `return_loss=True`.
        logits_per_image: Probit-scaled logits, `[images, texts]`: their softmax (CLIP) or sigmoid
            (SigLIP) is the predictive probability.
        logits_per_text: The transpose, `[texts, images]`.
        logits_mean: Expected logits, `[images, texts]`.
        logits_var: Variances of the logits, `[images, texts]`; 0 without a posterior.
        image_embeds: Normalised MAP embeddings, `[images, features]`.
        text_embeds: Normalised MAP embeddings, `[texts, features]`.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    logits_mean: Tensor | None = None
    logits_var: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


def contrastive_loss(logits_per_image: Tensor, likelihood: Likelihood) -> Tensor:
    """Loss the base models are trained with, on pairs along the diagonal.

    Args:
        logits_per_image: `[pairs, pairs]`.
        likelihood: `"softmax"`: symmetric InfoNCE; `"sigmoid"`: SigLIP's pairwise loss.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are not as many images as texts.
    """
    if logits_per_image.shape[0] != logits_per_image.shape[1]:
        raise ValueError(
            f"the contrastive loss needs pairs, got {logits_per_image.shape[0]} images and "
            f"{logits_per_image.shape[1]} texts"
        )
    if likelihood == "sigmoid":
        signs = 2.0 * torch.eye(logits_per_image.shape[0], device=logits_per_image.device) - 1.0
        return -nn.functional.logsigmoid(signs * logits_per_image).sum(dim=-1).mean()
    target = torch.arange(logits_per_image.shape[0], device=logits_per_image.device)
    image_loss = nn.functional.cross_entropy(logits_per_image, target)
    return 0.5 * (image_loss + nn.functional.cross_entropy(logits_per_image.T, target))
