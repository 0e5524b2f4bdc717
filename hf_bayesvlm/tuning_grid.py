"""Many posteriors of the same factors on the same features, with nothing computed twice.

A pseudo-data count, prior precision and damping change the variances along the eigenvectors of the factors,
never the eigenvectors.  What depends on eigenvectors and features alone (the decompositions, the coordinates of
the features, the inner products of the means) is therefore computed once, and a candidate with factored
damping costs `O(images * (in_features + features + classes))`.  Exact damping has a spectrum for every image:
`O(images * features * (in_features + features + classes))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .cosine import (
    CosineFrame,
    CosineGeometry,
    CovarianceForm,
    GaussianEmbedding,
    Modalities,
    cosine_frame,
    framed_geometry,
    gaussian_embedding,
    pair_products,
    prob_cosine,
)
from .curvature import Likelihood
from .features import LabelledFeatures
from .kronecker import Damping, FactorSpectra, KroneckerGaussian, damped_covariance
from .laplace import Objective
from .metrics import RunningScores, Scores
from .predictive import probit_logits

# Elements of one block of images; keeps the working memory at some hundred megabytes.
_BLOCK_ELEMENTS = 2**23

Modality = Literal["image", "text"]


@dataclass(frozen=True)
class Variances:
    """Hyperparameters that set the variances along the eigenvectors.

    Attributes:
        pseudo_data_count: Of both projections.
        objective: How the prior precisions were chosen.
        damping: `"factored"` or `"exact"`.
        image_prior_precision: Of the image projection.
        text_prior_precision: Of the text projection.
    """

    pseudo_data_count: float
    objective: Objective
    damping: Damping
    image_prior_precision: float
    text_prior_precision: float

    def covariance(self, spectra: FactorSpectra, modality: Modality) -> KroneckerGaussian:
        """Posterior covariance of the `"image"` or `"text"` projection."""
        return damped_covariance(
            spectra,
            pseudo_data_count=self.pseudo_data_count,
            prior_precision=(
                self.image_prior_precision if modality == "image" else self.text_prior_precision
            ),
            damping=self.damping,
        )


Candidate = tuple[Variances, CovarianceForm, Modalities]


@dataclass(frozen=True)
class _Prepared:
    """All that one set of variances gives before any image is seen, in the features' dtype."""

    image: KroneckerGaussian
    text: GaussianEmbedding
    geometries: dict[CovarianceForm, CosineGeometry]


def score_plain(
    features: LabelledFeatures, *, likelihood: Likelihood, logit_scale: Tensor, logit_bias: Tensor
) -> Scores:
    """Metrics of the plain model.

    Args:
        features: The labelled features.
        likelihood: `"softmax"` or `"sigmoid"`.
        logit_scale: Multiplicative scale.
        logit_bias: Additive bias.

    Returns:
        The metrics.
    """
    scores = RunningScores(likelihood)
    for rows in _blocks(features):
        mean, _ = prob_cosine(features.images[rows], features.texts, None)
        scores.update(logit_scale * mean + logit_bias, features.targets[rows])
    return scores.result()


def score_grid(
    features: LabelledFeatures,
    spectra: dict[Modality, FactorSpectra],
    variances: Sequence[Variances],
    forms: Sequence[CovarianceForm],
    modalities: Sequence[Modalities],
    *,
    likelihood: Likelihood,
    logit_scale: Tensor,
    logit_bias: Tensor,
    progress: bool = False,
) -> dict[Candidate, Scores]:
    """Metrics of every combination of variances, covariance form and modalities.

    Args:
        features: The labelled features.
        spectra: Decomposed factors of the `"image"` and `"text"` projection.
        variances: Hyperparameters to try.
        forms: Covariance forms to try.
        modalities: Whose uncertainty counts, to try.
        likelihood: `"softmax"` or `"sigmoid"`.
        logit_scale: Multiplicative scale.
        logit_bias: Additive bias.
        progress: Show a progress bar.

    Returns:
        The metrics of every candidate, in the order of the arguments.
    """
    dtype, device = features.images.mean.dtype, features.images.mean.device
    in_basis = {name: s.in_basis.to(device, dtype) for name, s in spectra.items()}
    precise = {
        form: cosine_frame(spectra["image"].out_basis, spectra["text"].out_basis, form)
        for form in forms
    }
    frames = {form: _frame_to(frame, device, dtype) for form, frame in precise.items()}
    squared_text = (features.texts.features @ in_basis["text"]).square()
    prepared = [
        _prepare(chosen, features, spectra, squared_text, precise, frames) for chosen in variances
    ]
    scores: dict[Candidate, RunningScores] = {
        candidate: RunningScores(likelihood) for candidate in product(variances, forms, modalities)
    }
    blocks = _blocks(features)
    with tqdm(
        total=len(blocks) * len(scores), unit="candidate", leave=False, disable=not progress
    ) as bar:
        for rows in blocks:
            images, targets = features.images[rows], features.targets[rows]
            squared = (images.features @ in_basis["image"]).square()
            products = {f: pair_products(images, features.texts, frames[f]) for f in forms}
            for chosen, ready in zip(variances, prepared, strict=True):
                gaussian = gaussian_embedding(
                    images.mean, images.features, ready.image, squared_coordinates=squared
                )
                for form, whose in product(forms, modalities):
                    mean, var = prob_cosine(
                        gaussian,
                        ready.text,
                        ready.geometries[form],
                        modalities=whose,
                        products=products[form],
                    )
                    logits = probit_logits(
                        logit_scale * mean + logit_bias, logit_scale.square() * var
                    )
                    scores[chosen, form, whose].update(logits, targets)
                    bar.update()
    return {candidate: running.result() for candidate, running in scores.items()}


def _prepare(
    chosen: Variances,
    features: LabelledFeatures,
    spectra: dict[Modality, FactorSpectra],
    squared_text: Tensor,
    precise: dict[CovarianceForm, CosineFrame],
    frames: dict[CovarianceForm, CosineFrame],
) -> _Prepared:
    texts = features.texts
    dtype, device = texts.mean.dtype, texts.mean.device
    image, text = (chosen.covariance(spectra[name], name) for name in ("image", "text"))
    geometries: dict[CovarianceForm, CosineGeometry] = {}
    for form, frame in frames.items():
        # The constants are summed in float64, as in a model that holds this posterior.
        constants = framed_geometry(precise[form], image, text)
        geometries[form] = replace(
            constants,
            image_variance=_to(constants.image_variance, device, dtype),
            text_variance=_to(constants.text_variance, device, dtype),
            image_axes=frame.image_axes,
            text_axes=frame.text_axes,
            overlap=frame.overlap,
            image_spread=frame.image_spread if chosen.damping == "exact" else None,
            text_spread=frame.text_spread if chosen.damping == "exact" else None,
        )
    embedded = gaussian_embedding(
        texts.mean,
        texts.features,
        _without_bases(text, device, dtype),
        squared_coordinates=squared_text,
    )
    return _Prepared(_without_bases(image, device, dtype), embedded, geometries)


def _without_bases(
    covariance: KroneckerGaussian, device: torch.device, dtype: torch.dtype
) -> KroneckerGaussian:
    """Variances only: the bases have done their part, and a copy for each candidate would be large."""
    empty = torch.empty(0, 0)
    return replace(covariance, in_basis=empty, out_basis=empty).to(device, dtype)


def _frame_to(frame: CosineFrame, device: torch.device, dtype: torch.dtype) -> CosineFrame:
    return CosineFrame(**{name: _to(value, device, dtype) for name, value in vars(frame).items()})


def _to(value: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(device, dtype)


def _blocks(features: LabelledFeatures) -> list[slice]:
    """Slices of images, few enough at once for the working memory."""
    width = features.images.features.shape[1] + features.images.mean.shape[1]
    size = max(1, _BLOCK_ELEMENTS // (width + len(features.class_names)))
    return [slice(start, start + size) for start in range(0, len(features), size)]
