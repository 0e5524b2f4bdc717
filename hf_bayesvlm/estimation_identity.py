"""What tells one estimation from another: digests of models and processors."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .modeling_bayesvlm import BayesVLMForZeroShot


def digest_model(model: BayesVLMForZeroShot) -> str:
    """SHA-256 of all weights of the base, towers and projections.

    Args:
        model: The model; its posterior does not matter.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vlm.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            # Offloaded weights are known by their names and shapes alone.
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_processor(processor: Any, tokenizer_settings: dict[str, Any]) -> str:
    """SHA-256 of what a processor does to images and texts.

    Args:
        processor: With `tokenizer` and `image_processor`.
        tokenizer_settings: Arguments the tokenizer is called with.

    Returns:
        Hexadecimal digits.
    """
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        tokenizer_settings,
        type(image_processor).__name__,
        image_processor.to_dict(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
