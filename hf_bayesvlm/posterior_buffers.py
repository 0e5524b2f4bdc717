"""The posterior inside of a model: factors in the checkpoint, what is derived from them beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .cosine import CosineGeometry, cosine_geometry
from .kronecker import KroneckerGaussian, posterior_covariance
from .posterior import BayesVLMPosterior
from .posterior_files import PosteriorError

_MODALITIES = ("image", "text")


class PosteriorBuffers(nn.Module):
    """Buffers of both projections' posteriors, float32 whatever the model is cast to.

    The factors (`image_A`, `image_B`, `text_A`, `text_B`) are persistent and NaN until they are loaded.
    The eigenbases, variances and ProbCosine's constants are derived by `refresh`.

    Args:
        config: Content of `posterior_config.json`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._hyperparameters = {
            name: {
                "pseudo_data_count": float(config[name]["pseudo_data_count"]),
                "prior_precision": float(config[name]["prior_precision"]),
                "damping": config.get("damping", "factored"),
            }
            for name in _MODALITIES
        }
        self._form = config.get("covariance", "diagonal")
        for name in _MODALITIES:
            size = {"A": int(config[name]["in_features"]), "B": int(config[name]["features"])}
            for letter, n in size.items():
                factor = torch.full((n, n), torch.nan, dtype=torch.float32)
                self.register_buffer(f"{name}_{letter}", factor)
        self._derived: dict[str, tuple[str, ...]] = {}
        self.is_derived = False
        shapes = _derived_shapes(config, self._form)
        for group, tensors in shapes.items():
            for field, shape in tensors.items():
                value = torch.full(shape, torch.nan, dtype=torch.float32)
                self.register_buffer(f"{group}_{field}", value, persistent=False)
            self._derived[group] = tuple(tensors)

    def load(self, posterior: BayesVLMPosterior) -> None:
        """Copy the factors of a posterior and derive the rest."""
        for name, factor in posterior.factors().items():
            getattr(self, name.replace(".", "_")).copy_(factor)
        self.refresh()

    @torch.no_grad()
    def after_loading(self) -> None:
        """Derive the rest from factors that were loaded; those that were not become NaN."""
        for factor in self.factors().values():
            # Leaves a loaded tensor alone; one that the checkpoint lacks is uninitialised memory.
            init.constant_(factor, torch.nan)
        self.refresh()

    def factors(self) -> dict[str, Tensor]:
        """The factors under the names of a posterior's file."""
        return {
            f"{name}.{letter}": getattr(self, f"{name}_{letter}")
            for name in _MODALITIES
            for letter in ("A", "B")
        }

    def is_complete(self) -> bool:
        """Whether factors and all that is derived from them are there and finite."""
        return all(bool(torch.isfinite(buffer).all()) for buffer in self.buffers())

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive eigenbases, variances and constants from the factors, in float64 on the CPU.

        Raises:
            PosteriorError: If the factors are damaged.
        """
        factors = self.factors()
        if any(factor.is_meta for factor in factors.values()):
            return
        if all(bool(torch.isfinite(factor).all()) for factor in factors.values()):
            values = self._derive({name: factor.cpu() for name, factor in factors.items()})
        else:
            values = {}
        self.is_derived = bool(values)
        for group, tensors in self._derived.items():
            for field in tensors:
                name = f"{group}_{field}"
                buffer = getattr(self, name)
                buffer.copy_(values.get(name, torch.full_like(buffer, torch.nan)))

    def _derive(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            covariances = {
                name: posterior_covariance(
                    factors[f"{name}.A"], factors[f"{name}.B"], **self._hyperparameters[name]
                )
                for name in _MODALITIES
            }
            geometry = cosine_geometry(covariances["image"], covariances["text"], self._form)
        except ValueError as error:
            raise PosteriorError(f"the model's posterior is damaged: {error}") from error
        groups = {**covariances, "geometry": geometry}
        return {
            f"{group}_{field}": getattr(groups[group], field)
            for group, tensors in self._derived.items()
            for field in tensors
        }

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.get_buffer("image_A").device

    def covariance(self, modality: str, dtype: torch.dtype = torch.float32) -> KroneckerGaussian:
        """Posterior covariance of the `"image"` or `"text"` projection, to compute with in a dtype."""
        return KroneckerGaussian(
            **{
                field: self.get_buffer(f"{modality}_{field}").to(dtype)
                for field in self._derived[modality]
            }
        )

    def geometry(self, dtype: torch.dtype = torch.float32) -> CosineGeometry:
        """ProbCosine's constants, to compute with in a dtype."""
        names = {field: f"geometry_{field}" for field in self._derived["geometry"]}
        if self._form == "full":
            # The axes are the eigenbases themselves, held once.
            names |= {f"{name}_axes": f"{name}_out_basis" for name in _MODALITIES}
        return CosineGeometry(
            **{field: self.get_buffer(name).to(dtype) for field, name in names.items()}
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PosteriorBuffers:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)


def _derived_shapes(config: dict[str, Any], form: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the derived tensors that this damping and covariance need, by group and field."""
    exact = config.get("damping", "factored") == "exact"
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    features = int(config["image"]["features"])
    for name in _MODALITIES:
        in_features = int(config[name]["in_features"])
        shapes[name] = {"in_basis": (in_features, in_features), "out_basis": (features, features)}
        if exact:
            shapes[name]["joint_variance"] = (features, in_features)
        else:
            shapes[name] |= {"in_variance": (in_features,), "out_variance": (features,)}
    geometry: dict[str, tuple[int, ...]] = {}
    for name in _MODALITIES:
        if not exact:
            geometry[f"{name}_variance"] = (features,)
        elif form == "diagonal":
            geometry[f"{name}_spread"] = (features, features)
    if form == "full":
        geometry["overlap"] = (features, features)
    assert geometry.keys() <= {spec.name for spec in fields(CosineGeometry)}
    shapes["geometry"] = geometry
    return shapes
