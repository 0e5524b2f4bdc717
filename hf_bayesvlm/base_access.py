"""Access to what the posterior is about: the projections and the logit parameters of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .backbones import BackboneSpec, at_least_float32, projection_weight
from .base_check import base_fingerprint
from .curvature import Likelihood
from .fingerprint import Fingerprint


class BaseAccess:
    """Mix-in of `BayesVLMForZeroShot`: reads the base model through its adapter."""

    vlm: PreTrainedModel
    _spec: BackboneSpec

    def base_fingerprint(self) -> Fingerprint:
        """Fingerprint of the two projections (`fingerprint_projections`).

        Raises:
            PosteriorError: If they are not in memory, or contain NaN or infinity.
        """
        modules = (self.image_projection, self.text_projection)
        return base_fingerprint(
            *(in_memory(module, name) for module in modules for name in ("weight", "bias"))
        )

    @property
    def likelihood(self) -> Likelihood:
        """`"softmax"` for CLIP-like models, `"sigmoid"` for SigLIP-like ones."""
        return self._spec.likelihood

    @property
    def backbone(self) -> BackboneSpec:
        """Where the base keeps its projections."""
        return self._spec

    @property
    def image_projection(self) -> nn.Linear:
        """The linear map that ends the image tower."""
        return cast(nn.Linear, self.vlm.get_submodule(self._spec.image_projection))

    @property
    def text_projection(self) -> nn.Linear:
        """The linear map that ends the text tower."""
        return cast(nn.Linear, self.vlm.get_submodule(self._spec.text_projection))

    def projection_weights(self) -> dict[str, Tensor]:
        """MAP weights of the projections, biases as last column, `[features, in_features (+1)]`."""
        return {
            name: projection_weight(
                cast(Tensor, in_memory(module, "weight")), in_memory(module, "bias")
            )
            for name, module in (("image", self.image_projection), ("text", self.text_projection))
        }

    @property
    def logit_scale(self) -> Tensor:
        """Multiplicative logit scale `s`, a scalar of at least float32."""
        return at_least_float32(cast(Tensor, in_memory(self.vlm, "logit_scale"))).exp().reshape(())

    @property
    def logit_bias(self) -> Tensor:
        """Additive logit bias `b`, a scalar of at least float32; 0 for CLIP."""
        bias = in_memory(self.vlm, "logit_bias")
        return (
            self.logit_scale.new_zeros(()) if bias is None else at_least_float32(bias).reshape(())
        )

    @property
    def image_tower(self) -> Callable[..., Any]:
        """The base's `get_image_features`."""
        return cast(Callable[..., Any], self.vlm.get_image_features)

    @property
    def text_tower(self) -> Callable[..., Any]:
        """The base's `get_text_features`."""
        return cast(Callable[..., Any], self.vlm.get_text_features)

    @torch.no_grad()
    def text_weights_stamp(self) -> tuple[Any, ...]:
        """Changes whenever a weight of the text tower is changed or replaced.

        Edits through `.data`, which PyTorch does not count, are seen by one value of every matrix.
        """
        weights = [
            weight
            for name, child in self.vlm.named_children()
            if "vision" not in name and "visual" not in name
            for module in child.modules()
            for weight in module._parameters.values()
            if weight is not None
        ]
        weights += [weight for weight in self.vlm._parameters.values() if weight is not None]
        counts = tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in weights
        )
        seen = [
            weight.detach().reshape(-1)[weight.numel() // 2]
            for weight in weights
            if weight.ndim != 1 and weight.numel() and not weight.is_meta
        ]
        if len({(value.dtype, value.device) for value in seen}) > 1:
            seen = [value.double().to(seen[0].device) for value in seen]
        values = torch.stack(seen).tolist() if seen else []
        # As text, so that NaN equals itself.
        return hash(counts), tuple(map(str, values))


def in_memory(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module by name, fetched where accelerate has put it elsewhere; None without it."""
    tensor: Tensor | None = getattr(module, name, None)
    if tensor is None or not tensor.is_meta:
        return tensor
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return cast(Tensor, getattr(module, name)).detach().clone()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off for a while, and every module back to the mode it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, be its weights there or offloaded."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        return torch.device(hook.execution_device)
    return device
