"""Fingerprints: which weights a posterior was estimated for, and whether its factors were changed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Fingerprint = dict[str, str]

_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def fingerprint_projections(*weights: Tensor | None) -> Fingerprint:
    """Fingerprint of projection weights that survives loading them in a lower precision.

    Args:
        *weights: Weight and bias tensors in a fixed order; None (no bias) is skipped.

    Returns:
        The coarsest `precision` that holds the values exactly, and a SHA-256 for it and each coarser one.

    Raises:
        ValueError: If a weight is not finite.
    """
    tensors = [weight.detach().to("cpu") for weight in weights if weight is not None]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(
            "the model's projections contain NaN or infinity: the checkpoint is damaged"
        )
    exact = [
        dtype
        for dtype in _PRECISIONS
        if all(bool((tensor.to(dtype).to(tensor.dtype) == tensor).all()) for tensor in tensors)
    ]
    precision = exact[-1] if exact else torch.float32
    result = {"precision": _name(precision)}
    for dtype in _PRECISIONS[_PRECISIONS.index(precision) :]:
        result[_name(dtype)] = tensor_digest({str(i): t.to(dtype) for i, t in enumerate(tensors)})
    return result


def fingerprints_match(first: Fingerprint, second: Fingerprint) -> bool:
    """Whether two fingerprints are of the same weights, at the coarser of their precisions."""
    order = [_name(dtype) for dtype in _PRECISIONS]
    try:
        coarser = max(first["precision"], second["precision"], key=order.index)
    except (KeyError, ValueError):
        return False
    return first.get(coarser) is not None and first.get(coarser) == second.get(coarser)


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
