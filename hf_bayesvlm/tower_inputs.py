"""Which argument of a forward pass belongs to which tower, and whether its values can be used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Arguments of the stock forward passes that belong to one tower; any other goes to both.
_IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "interpolate_pos_encoding",
)
_TEXT_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def split_inputs(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the image tower and of the text tower.

    Args:
        inputs: Arguments of a forward pass of the whole model.

    Returns:
        Those of the image tower, those of the text tower.
    """
    image = {name: value for name, value in inputs.items() if name not in _TEXT_ARGUMENTS}
    text = {name: value for name, value in inputs.items() if name not in _IMAGE_ARGUMENTS}
    return image, text


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        name: How to call the tensor in the error.
        tensor: The values.  They are not read inside of a compiled graph, which cannot branch on them.

    Raises:
        ValueError: If a value is not finite.
    """
    if torch.compiler.is_compiling() or tensor.is_meta:
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name} contain NaN or infinity: check the images and their preprocessing"
        )
