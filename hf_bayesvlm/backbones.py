"""One adapter for every dual encoder whose towers end in a linear map each.

The adapter finds the two projections of a transformers model, runs one tower at a time and returns the
unnormalised embedding together with the projection's input, which a forward pre-hook records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import Likelihood

# In order of preference; the first that is an nn.Linear is the projection.
_IMAGE_PROJECTIONS = ("visual_projection", "vision_model.head.mlp.fc2")
_TEXT_PROJECTIONS = ("text_projection", "text_model.head")

_recorder = threading.local()


class UnsupportedBackboneError(ValueError):
    """The model is not a dual encoder that ends in two linear maps."""


@dataclass(frozen=True)
class BackboneSpec:
    """Where a vision-language model keeps what the posterior is about.

    Attributes:
        image_projection: Name of the module that ends the image tower.
        text_projection: Name of the module that ends the text tower.
        likelihood: `"softmax"` or `"sigmoid"`, the loss the model was trained with.
    """

    image_projection: str
    text_projection: str
    likelihood: Likelihood


def inspect_backbone(vlm: nn.Module) -> BackboneSpec:
    """Find the two projections of a vision-language model.

    Args:
        vlm: A transformers model such as `CLIPModel` or `SiglipModel`.

    Returns:
        Where they are, and the likelihood.

    Raises:
        UnsupportedBackboneError: Naming what the model lacks.
    """
    missing: list[str] = []
    image = _first_linear(vlm, _IMAGE_PROJECTIONS)
    text = _first_linear(vlm, _TEXT_PROJECTIONS)
    if image is None:
        missing.append(f"a final linear map of the image tower ({' or '.join(_IMAGE_PROJECTIONS)})")
    if text is None:
        missing.append(f"a final linear map of the text tower ({' or '.join(_TEXT_PROJECTIONS)})")
    if not isinstance(getattr(vlm, "logit_scale", None), Tensor):
        missing.append("a logit_scale")
    missing += [
        f"{name}()"
        for name in ("get_image_features", "get_text_features")
        if not callable(getattr(vlm, name, None))
    ]
    if image is None or text is None or missing:
        raise UnsupportedBackboneError(
            f"{type(vlm).__name__} is not supported: it lacks {', '.join(missing)}. A posterior needs a "
            "dual encoder that ends in two linear maps, as CLIP, SigLIP, SigLIP 2, MetaCLIP 2, "
            "Chinese-CLIP, AltCLIP and VisionTextDualEncoder do"
        )
    has_bias = isinstance(getattr(vlm, "logit_bias", None), Tensor)
    return BackboneSpec(image, text, "sigmoid" if has_bias else "softmax")


def watch_projections(vlm: nn.Module, spec: BackboneSpec) -> None:
    """Let `run_tower` see the input of both projections.

    The hook is a module-level function, which survives deepcopy, pickle, `torch.compile`, `torch.export`
    and accelerate's own hooks.  It keeps nothing outside of `run_tower`, so that the model can be used on
    its own as before.  Watching twice is the same as once.

    Args:
        vlm: The vision-language model.
        spec: From `inspect_backbone`.
    """
    for name in (spec.image_projection, spec.text_projection):
        module = vlm.get_submodule(name)
        if _record_input not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_record_input)


def is_watched(vlm: nn.Module) -> bool:
    """Whether `watch_projections` has been called for a model, or for one that shares its modules."""
    return any(_record_input in module._forward_pre_hooks.values() for module in vlm.modules())


def unwatch_projections(vlm: nn.Module, spec: BackboneSpec) -> None:
    """Take the hooks of `watch_projections` off again.

    Args:
        vlm: The vision-language model.
        spec: From `inspect_backbone`.
    """
    for name in (spec.image_projection, spec.text_projection):
        hooks = vlm.get_submodule(name)._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _record_input]:
            del hooks[key]


def run_tower(
    projection: nn.Linear, tower: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Run one tower and return its embedding with the input of its projection.

    Args:
        projection: The watched projection of that tower.
        tower: `get_image_features` or `get_text_features` of the model.
        inputs: Its arguments.

    Returns:
        The unnormalised embedding `[batch, features]` and the projection's input
        `[batch, in_features (+1)]` with a 1 appended where the projection has a bias, both float32
        (float64 stays).

    Raises:
        UnsupportedBackboneError: If the projection was replaced after the model was made.
    """
    output, features = _run_recording(projection, tower, inputs)
    embedding = output if isinstance(output, Tensor) else output.pooler_output
    if features.ndim == 3:
        # SigLIP's pooling head has one probe token.
        features = features[:, 0]
    features, embedding = at_least_float32(features), at_least_float32(embedding)
    if projection.bias is not None:
        features = torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)
    return embedding, features


def projection_weight(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weights of a projection with its bias as last column, `[features, in_features (+1)]`."""
    weight = weight.detach()
    if bias is not None:
        weight = torch.cat([weight, bias.detach()[:, None]], dim=1)
    return at_least_float32(weight)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is cast up; float32 and float64 stay as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _first_linear(vlm: nn.Module, names: tuple[str, ...]) -> str | None:
    modules = dict(vlm.named_modules())
    return next((name for name in names if isinstance(modules.get(name), nn.Linear)), None)


def _run_recording(
    projection: nn.Linear, tower: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[Any, Tensor]:
    # Threads that share a model must not see each other's activations.  A compiler traces one thread and
    # cannot see thread-local storage: it gets an attribute, which is gone at the end of the graph.
    if torch.compiler.is_compiling():
        marked: Any = projection
        marked._bayesvlm_recording = True
        output = tower(**inputs)
        features = marked._bayesvlm_input
        del marked._bayesvlm_input, marked._bayesvlm_recording
        return output, features
    outer = getattr(_recorder, "inputs", None)
    _recorder.inputs = {}
    try:
        output = tower(**inputs)
        features = _recorder.inputs.get(id(projection))
    finally:
        _recorder.inputs = outer
    if features is None:
        raise UnsupportedBackboneError(
            f"the final projection ({type(projection).__name__}) was replaced after the posterior's model "
            "was made, by an adapter for example: merge the adapter, or leave the final projections out of it"
        )
    return output, features


def _record_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        if getattr(module, "_bayesvlm_recording", False):
            module._bayesvlm_input = args[0]
        return
    inputs = getattr(_recorder, "inputs", None)
    if inputs is not None:
        inputs[id(module)] = args[0]
