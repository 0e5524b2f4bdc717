"""Does a posterior belong to a model?"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .curvature import Likelihood
from .fingerprint import Fingerprint, fingerprint_projections, fingerprints_match
from .laplace import squared_norm
from .posterior import BayesVLMPosterior
from .posterior_files import PosteriorError


def fit_to_base(
    posterior: BayesVLMPosterior,
    *,
    likelihood: Likelihood,
    weights: dict[str, Tensor],
    fingerprint: Fingerprint,
    base_name: str,
    base_model: str | None,
    strict: bool,
) -> BayesVLMPosterior:
    """Check a posterior against its base and note what it did not know about it.

    Args:
        posterior: The posterior.
        likelihood: Of the base.
        weights: MAP weights of the `"image"` and `"text"` projection, biases as last column.
        fingerprint: Of the base's projections.
        base_name: What to call the base in errors.
        base_model: Hub id of the base, if known.
        strict: Refuse a posterior that was estimated for other weights of the same shapes.

    Returns:
        The posterior with the norms of the weights, and with the base's fingerprint and id where it
        had none.

    Raises:
        PosteriorError: If likelihood, shapes or fingerprint do not fit.
    """
    if posterior.likelihood != likelihood:
        raise PosteriorError(
            f"the posterior is for a {posterior.likelihood} likelihood, {base_name} has a {likelihood} "
            "likelihood"
        )
    for name, weight in weights.items():
        expected = getattr(posterior, name).shape
        if tuple(weight.shape) != expected:
            raise PosteriorError(
                f"the {name} posterior is for a projection of shape {expected}, {base_name} has "
                f"{tuple(weight.shape)}. "
                f"The posterior was estimated for {posterior.base_model or 'another model'}"
            )
    known = posterior.fingerprint
    belongs = _belongs(posterior, fingerprint, base_model)
    if strict and belongs is False:
        raise PosteriorError(
            f"the posterior was estimated for other weights ({posterior.base_model or 'an unnamed model'}, "
            f"revision {posterior.revision or 'unknown'}). Load that base, estimate a posterior for this "
            "one, or pass strict_base=False to use it all the same"
        )
    image, text = (
        replace(
            getattr(posterior, name),
            weight_norm_squared=squared_norm(weights[name]),
        )
        for name in ("image", "text")
    )
    if belongs is False:
        # From here on it is this base's; where it comes from is not forgotten.
        origin = {"base_model": posterior.base_model, "fingerprint": known}
        provenance = posterior.provenance | {"estimated_for": origin}
        posterior = replace(
            posterior, provenance=provenance, base_model=base_model, revision=None, fingerprint=None
        )
    return replace(
        posterior,
        image=image,
        text=text,
        # Not certified where neither a fingerprint nor an id says that it belongs here.
        fingerprint=None if belongs is None else posterior.fingerprint or fingerprint,
        base_model=posterior.base_model or base_model,
    )


def _belongs(
    posterior: BayesVLMPosterior, fingerprint: Fingerprint, base_model: str | None
) -> bool | None:
    """Whether a posterior was estimated for these weights; None where nothing can tell."""
    if posterior.fingerprint is not None:
        return fingerprints_match(posterior.fingerprint, fingerprint)
    if posterior.base_model is None:
        return True
    return None if base_model is None else posterior.base_model == base_model


def base_fingerprint(*projection_tensors: Tensor | None) -> Fingerprint:
    """Fingerprint of the weights and biases of both projections, image first.

    Args:
        *projection_tensors: Weight and bias (or None) of the image, then of the text projection.

    Returns:
        The fingerprint.

    Raises:
        PosteriorError: If they are not in memory, or contain NaN or infinity.
    """
    if any(tensor is not None and tensor.is_meta for tensor in projection_tensors):
        raise PosteriorError(
            "the model's projections are not in memory (offloaded or on the meta device): load the model "
            "without offloading to put a posterior on it"
        )
    try:
        return fingerprint_projections(*projection_tensors)
    except ValueError as error:
        raise PosteriorError(str(error)) from error
