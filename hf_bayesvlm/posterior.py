"""A Laplace posterior that can be saved, shared and put on any copy of its base model.

Two files: `posterior.safetensors` with the Kronecker factors (`image.A`, `image.B`, `text.A`, `text.B`,
float32) and `posterior_config.json` with hyperparameters, the fingerprint of the base's projections and
where the factors come from.  A posterior of a ViT-B/32 takes 5 MB.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .cosine import CovarianceForm, Modalities
from .curvature import Likelihood
from .fingerprint import Fingerprint, tensor_digest
from .kronecker import Damping
from .laplace import Objective
from .posterior_files import (
    CHOICES,
    FORMAT_VERSION,
    POSTERIOR_CONFIG_NAME,
    POSTERIOR_WEIGHTS_NAME,
    PosteriorError,
    check_config,
    library_versions,
    read_posterior_files,
    read_reference_files,
)
from .posterior_hub import PosteriorHub
from .posterior_modality import ModalityPosterior


@dataclass(frozen=True, eq=False)
class BayesVLMPosterior(PosteriorHub):
    """Laplace posterior over the two final projections of a vision-language model.

    Immutable: `with_hyperparameters` returns a new object.

    Attributes:
        image: Posterior of the image projection.
        text: Posterior of the text projection.
        likelihood: `"softmax"` (CLIP's InfoNCE) or `"sigmoid"` (SigLIP).
        covariance: `"diagonal"` or `"full"` covariances in ProbCosine.
        damping: `"factored"` or `"exact"` addition of the prior.
        modalities: Whose uncertainty counts: `"both"`, `"image"` or `"text"`.
        objective: How the prior precisions were chosen: `"reference"`, `"evidence"` or `"manual"`.
        base_model: Hub id or path of the model it was estimated for.
        revision: Revision of that model.
        fingerprint: Of that model's projections (`fingerprint_projections`).
        num_pairs: Image-text pairs the factors were estimated from.
        contrast_size: Pairs that are contrasted with each other (one block).
        dataset: Data set of these pairs.
        dataset_revision: Its revision.
        provenance: Anything else about the estimation.
        extra: Keys of a config file that this version does not know; kept when saving.

    Raises:
        PosteriorError: If factors or values cannot be those of a posterior.
    """

    image: ModalityPosterior
    text: ModalityPosterior
    likelihood: Likelihood
    covariance: CovarianceForm = "diagonal"
    damping: Damping = "factored"
    modalities: Modalities = "both"
    objective: str = "reference"
    base_model: str | None = None
    revision: str | None = None
    fingerprint: Fingerprint | None = None
    num_pairs: int | None = None
    contrast_size: int | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PosteriorError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("image", "text"):
            getattr(self, name).check(name)
        if self.image.B.shape != self.text.B.shape:
            raise PosteriorError(
                f"image.B is {tuple(self.image.B.shape)} but text.B {tuple(self.text.B.shape)}: both "
                "modalities embed into one space"
            )

    def with_hyperparameters(
        self,
        *,
        pseudo_data_count: float | None = None,
        prior_precision: float | None = None,
        image_pseudo_data_count: float | None = None,
        image_prior_precision: float | None = None,
        text_pseudo_data_count: float | None = None,
        text_prior_precision: float | None = None,
        covariance: CovarianceForm | None = None,
        damping: Damping | None = None,
        modalities: Modalities | None = None,
        objective: Objective | None = None,
    ) -> BayesVLMPosterior:
        """The same factors under other hyperparameters.

        Args:
            pseudo_data_count: For both modalities.
            prior_precision: For both modalities.
            image_pseudo_data_count: For the image projection; wins over `pseudo_data_count`.
            image_prior_precision: For the image projection; wins over `prior_precision`.
            text_pseudo_data_count: For the text projection.
            text_prior_precision: For the text projection.
            covariance: `"diagonal"` or `"full"`.
            damping: `"factored"` or `"exact"`.
            modalities: `"both"`, `"image"` or `"text"`.
            objective: Choose every prior precision that is not given here by this objective, for the new
                pseudo-data count and damping.  Without it, prior precisions are kept as they are.

        Returns:
            A new posterior.

        Raises:
            PosteriorError: For an impossible value, or when an objective is asked for and the norm of the
                base's projection is not known.
        """
        changes: dict[str, Any] = {
            name: value
            for name, value in (
                ("covariance", covariance),
                ("damping", damping),
                ("modalities", modalities),
                ("objective", objective),
            )
            if value is not None
        }
        given = {
            "image": (
                _first(image_pseudo_data_count, pseudo_data_count),
                _first(image_prior_precision, prior_precision),
            ),
            "text": (
                _first(text_pseudo_data_count, pseudo_data_count),
                _first(text_prior_precision, prior_precision),
            ),
        }
        # An impossible choice is refused here, before it reaches the objective.
        chosen = replace(self, **changes)
        for name, (count, precision) in given.items():
            part: ModalityPosterior = getattr(self, name)
            if count is not None:
                part = replace(part, pseudo_data_count=count)
            if precision is not None:
                part = replace(part, prior_precision=precision)
            elif objective is not None:
                part = part.with_best_precision(name, objective, chosen.damping)
            changes[name] = part
        if objective is None and any(precision is not None for _, precision in given.values()):
            changes["objective"] = "manual"
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> BayesVLMPosterior:
        """The same posterior with its factors on a device."""
        image, text = (
            replace(part, A=part.A.to(device), B=part.B.to(device))
            for part in (self.image, self.text)
        )
        return replace(self, image=image, text=text)

    def to_config(self) -> dict[str, Any]:
        """Everything but the factors, as it is written to `posterior_config.json`."""
        config: dict[str, Any] = dict(self.extra)
        config["format_version"] = FORMAT_VERSION
        for spec in fields(self):
            if spec.name not in ("image", "text", "extra"):
                config[spec.name] = getattr(self, spec.name)
        for name in ("image", "text"):
            part: ModalityPosterior = getattr(self, name)
            config[name] = {
                "features": part.shape[0],
                "in_features": part.shape[1],
                "pseudo_data_count": part.pseudo_data_count,
                "prior_precision": part.prior_precision,
                "weight_norm_squared": part.weight_norm_squared,
            }
        config.setdefault("library_versions", library_versions())
        return json.loads(json.dumps(config))

    @classmethod
    def from_config(cls, config: dict[str, Any], factors: dict[str, Tensor]) -> BayesVLMPosterior:
        """Put a config and its factors together.

        Args:
            config: As from `to_config`.
            factors: `image.A`, `image.B`, `text.A`, `text.B`.

        Returns:
            The posterior.

        Raises:
            PosteriorError: If anything is missing, damaged, or written by a newer version.
        """
        check_config(config)
        missing = {"image.A", "image.B", "text.A", "text.B"} - factors.keys()
        if missing:
            raise PosteriorError(f"the factors {', '.join(sorted(missing))} are missing")
        values: dict[str, Any] = {}
        for name in ("image", "text"):
            part = config[name]
            for letter in ("A", "B"):
                if factors[f"{name}.{letter}"].ndim != 2:
                    raise PosteriorError(
                        f"{name}.{letter} is not a matrix: the factors are damaged"
                    )
            values[name] = ModalityPosterior(
                A=factors[f"{name}.A"],
                B=factors[f"{name}.B"],
                pseudo_data_count=part["pseudo_data_count"],
                prior_precision=part["prior_precision"],
                weight_norm_squared=part.get("weight_norm_squared"),
            )
            if not all(factors[f"{name}.{letter}"].is_floating_point() for letter in "AB"):
                raise PosteriorError(f"the {name} factors are not floating-point numbers")
            stated = (part["features"], part["in_features"])
            if stated != values[name].shape:
                raise PosteriorError(
                    f"{name}: the config states a projection of {stated}, the factors are for "
                    f"{values[name].shape}"
                )
        known = {spec.name for spec in fields(cls)} - {"image", "text", "extra"}
        values |= {key: value for key, value in config.items() if key in known}
        values["extra"] = {
            key: value
            for key, value in config.items()
            if key not in known | {"image", "text", "format_version", "factors_sha256"}
        }
        return cls(**values)

    def factors(self) -> dict[str, Tensor]:
        """The four factors under the names of the file, contiguous float32 on the CPU."""
        return {
            f"{name}.{letter}": getattr(part, letter).detach().to("cpu", torch.float32).contiguous()
            for name, part in (("image", self.image), ("text", self.text))
            for letter in ("A", "B")
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `posterior.safetensors` and `posterior_config.json`.

        Args:
            save_directory: Folder, made if needed.

        Raises:
            PosteriorError: If the path is a file.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise PosteriorError(f"{folder} is a file; give a folder to save a posterior to")
        folder.mkdir(parents=True, exist_ok=True)
        factors = self.factors()
        config = self.to_config() | {"factors_sha256": tensor_digest(factors)}
        save_file(factors, str(folder / POSTERIOR_WEIGHTS_NAME), metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / POSTERIOR_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
    ) -> BayesVLMPosterior:
        """Load a posterior from a folder or from the Hub.

        Args:
            pretrained_name_or_path: Folder with the two files, or a Hub id.
            revision: Branch, tag or commit on the Hub.
            token: Hub token.
            cache_dir: Where downloads are kept.
            local_files_only: Do not ask the Hub.
            force_download: Download again.
            subfolder: Folder inside of the folder or repository.

        Returns:
            The posterior, on the CPU.

        Raises:
            FileNotFoundError: If there is no such folder or no posterior in it.
            PosteriorError: If the files are truncated, changed or of a newer format.
        """
        download = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
            "subfolder": subfolder,
        }
        config, factors = read_posterior_files(pretrained_name_or_path, download)
        return cls.from_config(config, factors)

    @classmethod
    def from_reference(
        cls,
        directory: str | os.PathLike[str],
        base_model: str | None = None,
        *,
        likelihood: Likelihood | None = None,
        revision: str | None = None,
        **hyperparameters: Any,
    ) -> BayesVLMPosterior:
        """Import the factors published with arXiv:2412.06014.

        Args:
            directory: Folder with `A_img_analytic.pt`, `B_img_analytic.pt`, `A_txt_analytic.pt`,
                `B_txt_analytic.pt` and `prior_precision_analytic.json`.
            base_model: Hub id of the model they were estimated for.
            likelihood: `"softmax"` or `"sigmoid"`; by default sigmoid if the base is called SigLIP.
            revision: Revision of that model.
            **hyperparameters: Passed to `with_hyperparameters`; prior precisions and pseudo-data counts
                are the published ones otherwise.

        Returns:
            The posterior.  It has no fingerprint: only its shapes are checked when it is set on a model.

        Raises:
            FileNotFoundError: If a file is missing.
            PosteriorError: If a file is damaged.
        """
        scalars, factors = read_reference_files(directory)
        image, text = (
            ModalityPosterior(
                A=factors[f"{name}.A"],
                B=factors[f"{name}.B"],
                pseudo_data_count=scalars[f"n_{short}"],
                prior_precision=scalars[f"lambda_{short}"],
            )
            for name, short in (("image", "img"), ("text", "txt"))
        )
        if likelihood is None:
            likelihood = "sigmoid" if "siglip" in (base_model or "").lower() else "softmax"
        posterior = cls(
            image=image,
            text=text,
            likelihood=likelihood,
            base_model=base_model,
            revision=revision,
            provenance={"source": "arXiv:2412.06014, published factors"},
        )
        return posterior.with_hyperparameters(**hyperparameters) if hyperparameters else posterior


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
