r"""Predictive probabilities: the probit approximation and joint Monte Carlo.

The probit approximation scales a Gaussian logit, $z = m / \sqrt{1 + \frac{\pi}{8} v}$, so that the softmax
or sigmoid of $z$ approximates the expected probability (MacKay 1992; arXiv:2412.06014, section 5).

Monte Carlo samples *weights*, not logits: one draw of both projections scores every label, so that labels
keep the correlations that the shared image and the shared projections give them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cosine import GaussianEmbedding, Modalities
from .curvature import Likelihood
from .kronecker import KroneckerGaussian


def probit_logits(logits_mean: Tensor, logits_var: Tensor) -> Tensor:
    r"""Scale logits so that their softmax or sigmoid is the predictive probability.

    Args:
        logits_mean: Means, any shape.
        logits_var: Variances, the same shape.

    Returns:
        $m / \sqrt{1 + \pi v / 8}$, the same shape.
    """
    return logits_mean / torch.sqrt(1.0 + (math.pi / 8.0) * logits_var)


def predictive_probs(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """Probabilities over the last dimension.

    Args:
        logits: `[..., labels]`.
        likelihood: `"softmax"` (labels compete) or `"sigmoid"` (each label on its own).

    Returns:
        `[..., labels]`.

    Raises:
        ValueError: For an unknown likelihood.
    """
    if likelihood == "softmax":
        return logits.softmax(dim=-1)
    if likelihood == "sigmoid":
        return logits.sigmoid()
    raise ValueError(f"likelihood must be 'softmax' or 'sigmoid', not {likelihood!r}")


def sample_embeddings(
    embedding: GaussianEmbedding,
    covariance: KroneckerGaussian | None,
    num_samples: int,
    *,
    generator: torch.Generator,
) -> Tensor:
    r"""Sample embeddings jointly, as if by sampled weights, without building the weights.

    The rows share each draw of $W$ and are correlated as $\phi_i^\top \tilde A^{-1} \phi_j$.  Only
    `min(batch, in_features)` random numbers a feature are drawn: the rest of $W$ is not seen by the rows.

    Args:
        embedding: `N` Gaussian embeddings.
        covariance: Posterior of their projection, or None for no uncertainty.
        num_samples: Number of weight samples, `S`.
        generator: Source of randomness, on the CPU: the draws do not depend on the device.

    Returns:
        `[S, N, features]`.
    """
    mean = embedding.mean
    if covariance is None:
        return mean.expand(num_samples, *mean.shape)
    coordinates = embedding.features @ covariance.in_basis
    if covariance.joint_variance is not None:
        deviation = covariance.joint_variance.sqrt()
        noise = _noise((num_samples, *deviation.shape), mean, generator)
        out_coordinates = (noise * deviation) @ coordinates.T
    else:
        assert covariance.in_variance is not None and covariance.out_variance is not None
        # R' R is the Gram matrix of the rows in the metric of the posterior.  QR is stable where
        # rows repeat, and needs no jitter.
        _, root = torch.linalg.qr((coordinates * covariance.in_variance.sqrt()).T, mode="r")
        noise = _noise((num_samples, mean.shape[1], root.shape[0]), mean, generator)
        out_coordinates = covariance.out_variance.sqrt()[:, None] * (noise @ root)
    return mean + (covariance.out_basis @ out_coordinates).mT


def sample_text_directions(
    text: GaussianEmbedding,
    text_covariance: KroneckerGaussian | None,
    image_covariance: KroneckerGaussian | None,
    num_samples: int,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Joint samples of the labels' directions, ready to score many batches of images.

    Args:
        text: `C` Gaussian label embeddings.
        text_covariance: Posterior of the text projection, or None for no uncertainty.
        image_covariance: Posterior of the image projection, in whose eigenbasis the result is given.
        num_samples: `S`.
        generator: Source of randomness, on the CPU.

    Returns:
        Unit vectors in the image posterior's eigenbasis, `[S, C, features]`.
    """
    # Certain labels are the same in every sample: one copy serves all.
    draws = num_samples if text_covariance is not None else 1
    samples = sample_embeddings(text, text_covariance, draws, generator=generator)
    directions = torch.nn.functional.normalize(samples, dim=-1)
    if image_covariance is not None:
        directions = directions @ image_covariance.out_basis
    return directions.expand(num_samples, -1, -1)


def sample_logits(
    image: GaussianEmbedding,
    image_covariance: KroneckerGaussian | None,
    text_directions: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Joint Monte Carlo logits of each image against sampled labels.

    All images share the draws: each image's samples have its exact distribution and do not depend on
    what else is in the batch.  Samples of *different* images must not be paired; sample those with
    `sample_embeddings`.

    Args:
        image: `N` Gaussian embeddings.
        image_covariance: Posterior of the image projection, or None for no uncertainty.
        text_directions: From `sample_text_directions`, `[S, C, features]`.
        logit_scale: Multiplicative scale.
        logit_bias: Additive bias.
        generator: Source of randomness, on the CPU.

    Returns:
        `[N, S, C]`.
    """
    mean, num_samples = image.mean, text_directions.shape[0]
    if image_covariance is None:
        cosines = torch.nn.functional.normalize(mean, dim=1) @ text_directions.mT
    else:
        noise = _noise((num_samples, 1, mean.shape[1]), mean, generator)
        samples = mean @ image_covariance.out_basis + noise * _deviation(image, image_covariance)
        norms = torch.linalg.vector_norm(samples, dim=-1, keepdim=True)
        shared = text_directions.stride(0) == 0
        cosines = samples @ (text_directions[0].T if shared else text_directions.mT) / norms
    return (logit_scale * cosines + logit_bias).transpose(0, 1)


def monte_carlo_probs(
    image: GaussianEmbedding,
    text: GaussianEmbedding,
    image_covariance: KroneckerGaussian | None,
    text_covariance: KroneckerGaussian | None,
    *,
    likelihood: Likelihood,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    num_samples: int = 100,
    generator: torch.Generator,
    modalities: Modalities = "both",
) -> Tensor:
    """Predictive probabilities of each image for each sample of the weights.

    Args:
        image: `N` Gaussian embeddings.
        text: `C` Gaussian embeddings.
        image_covariance: Posterior of the image projection, or None.
        text_covariance: Posterior of the text projection, or None.
        likelihood: `"softmax"` or `"sigmoid"`.
        logit_scale: Multiplicative scale.
        logit_bias: Additive bias.
        num_samples: `S`.
        generator: Source of randomness, on the CPU.
        modalities: Whose uncertainty counts.

    Returns:
        `[N, S, C]`.

    Raises:
        ValueError: For an unknown likelihood or `modalities`.
    """
    if modalities not in ("both", "image", "text"):
        raise ValueError(f"modalities must be 'both', 'image' or 'text', not {modalities!r}")
    image_covariance = None if modalities == "text" else image_covariance
    text_covariance = None if modalities == "image" else text_covariance
    directions = sample_text_directions(
        text, text_covariance, image_covariance, num_samples, generator=generator
    )
    logits = sample_logits(
        image, image_covariance, directions, logit_scale, logit_bias, generator=generator
    )
    return predictive_probs(logits, likelihood)


def _deviation(embedding: GaussianEmbedding, covariance: KroneckerGaussian) -> Tensor:
    """Standard deviations along the eigenvectors, `[batch, features]`."""
    if embedding.spectrum is not None:
        return embedding.spectrum.sqrt()
    assert covariance.out_variance is not None
    return torch.outer(embedding.scale, covariance.out_variance).sqrt()


def _noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
