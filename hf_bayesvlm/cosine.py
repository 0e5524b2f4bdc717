r"""ProbCosine: mean and variance of the cosine similarity of two Gaussian embeddings.

An embedding $g = W\phi$ with $W$ from a `KroneckerGaussian` is Gaussian with covariance
$S = U_B\,\mathrm{diag}(v)\,U_B^\top$; under factored damping $v = a f$ with one scalar $a$ a row and one shared $f$.
For an image $(\mu, S)$ and a text $(\nu, T)$ (arXiv:2412.06014, section 5)

$$ E[\cos] \approx \frac{\mu^\top\nu}{\sqrt{(|\mu|^2 + \mathrm{tr} S)(|\nu|^2 + \mathrm{tr} T)}}, \qquad
   \mathrm{Var}[\cos] \approx
   \frac{\mathrm{tr}(S T) + \mu^\top T \mu + \nu^\top S \nu}{(|\mu|^2 + \mathrm{tr} S)(|\nu|^2 + \mathrm{tr} T)} . $$

The paper keeps only the diagonals of $S$ and $T$ (`covariance="diagonal"`); `"full"` keeps everything.
Both are a GEMM for the mean and a GEMM for the variance, whose inner dimension is 2 under factored
damping and twice the number of features under exact damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .kronecker import KroneckerGaussian

CovarianceForm = Literal["diagonal", "full"]
Modalities = Literal["both", "image", "text"]


@dataclass(frozen=True)
class GaussianEmbedding:
    """A batch of Gaussian embeddings.

    The covariance of row `i` is `scale[i] * Btil^-1` under factored damping, and
    `out_basis @ diag(spectrum[i]) @ out_basis.T` under exact damping.

    Attributes:
        mean: Unnormalised MAP embeddings, `[batch, features]`.
        features: Inputs of the final projection, with a 1 appended where it has a bias,
            `[batch, in_features (+1)]`.
        scale: Factored damping: the scalar `a = phi^T Atil^-1 phi`; exact damping: the mean variance
            over directions; 0 without a posterior. `[batch]`.
        spectrum: Exact damping: variances along the columns of `out_basis`, `[batch, features]`.
    """

    mean: Tensor
    features: Tensor
    scale: Tensor
    spectrum: Tensor | None = None

    def __len__(self) -> int:
        return self.mean.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> GaussianEmbedding:
        """The rows picked by a slice, an index tensor or a mask."""
        return GaussianEmbedding(
            *(None if value is None else value[rows] for value in self._tensors())  # type: ignore[arg-type]
        )

    def to(self, *args: object, **kwargs: object) -> GaussianEmbedding:
        """Move or cast every tensor, as `torch.Tensor.to`."""
        return GaussianEmbedding(
            *(None if value is None else value.to(*args, **kwargs) for value in self._tensors())  # type: ignore[call-overload, arg-type]
        )

    @staticmethod
    def cat(parts: Sequence[GaussianEmbedding]) -> GaussianEmbedding:
        """The rows of several batches in one."""
        if len(parts) == 1:
            return parts[0]
        spectra = [part.spectrum for part in parts if part.spectrum is not None]
        return GaussianEmbedding(
            mean=torch.cat([part.mean for part in parts]),
            features=torch.cat([part.features for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            spectrum=torch.cat(spectra) if spectra else None,
        )

    def without_variance(self) -> GaussianEmbedding:
        """The same means with zero covariance."""
        spectrum = None if self.spectrum is None else torch.zeros_like(self.spectrum)
        return replace(self, scale=torch.zeros_like(self.scale), spectrum=spectrum)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (self.mean, self.features, self.scale, self.spectrum)


@dataclass(frozen=True)
class CosineGeometry:
    """What ProbCosine needs of the two posteriors, computed once (`cosine_geometry`).

    Axes are the directions along which the covariances are taken to be independent: the eigenvectors
    for the full form, the coordinate axes (`None`) for the diagonal form.

    Attributes:
        image_axes: Axes of the image covariance in columns, `[features, features]`, or None.
        text_axes: Axes of the text covariance in columns, `[features, features]`, or None.
        overlap: Squared inner products of image and text axes, `[features, features]`, or None for the
            identity.
        image_variance: Factored damping: variance along each image axis at scale 1, `[features]`.
        text_variance: Factored damping: variance along each text axis at scale 1, `[features]`.
        image_spread: Exact damping, diagonal form: maps a spectrum to coordinate variances,
            `[features, features]`.
        text_spread: As `image_spread`, for the text.
    """

    image_axes: Tensor | None = None
    text_axes: Tensor | None = None
    overlap: Tensor | None = None
    image_variance: Tensor | None = None
    text_variance: Tensor | None = None
    image_spread: Tensor | None = None
    text_spread: Tensor | None = None


@dataclass(frozen=True)
class CosineFrame:
    """What ProbCosine needs of two posteriors' eigenbases alone (`cosine_frame`).

    It is the same for every pseudo-data count, prior precision and damping.

    Attributes:
        image_axes: As in `CosineGeometry`.
        text_axes: As in `CosineGeometry`.
        overlap: As in `CosineGeometry`.
        image_spread: Diagonal form: maps variances along the image eigenvectors to coordinate variances,
            `[features, features]`.
        text_spread: As `image_spread`, for the text.
    """

    image_axes: Tensor | None = None
    text_axes: Tensor | None = None
    overlap: Tensor | None = None
    image_spread: Tensor | None = None
    text_spread: Tensor | None = None


@dataclass(frozen=True)
class PairProducts:
    """What ProbCosine needs of the means of `N` images and `C` texts (`pair_products`).

    Attributes:
        inner: Inner products of the means, `[N, C]`.
        image_norm: Squared lengths of the image means, `[N]`.
        text_norm: Squared lengths of the text means, `[C]`.
        image_along: Squared components of the image means along the text's axes, `[N, features]`.
        text_along: Squared components of the text means along the image's axes, `[C, features]`.
    """

    inner: Tensor
    image_norm: Tensor
    text_norm: Tensor
    image_along: Tensor
    text_along: Tensor


def gaussian_embedding(
    mean: Tensor,
    features: Tensor,
    covariance: KroneckerGaussian | None,
    *,
    squared_coordinates: Tensor | None = None,
) -> GaussianEmbedding:
    """Attach the posterior's covariance to MAP embeddings.

    Args:
        mean: Unnormalised embeddings, `[batch, features]`.
        features: Inputs of the projection (1 appended for a bias), `[batch, in_features (+1)]`.
        covariance: Posterior of the projection, or None for no uncertainty.
        squared_coordinates: `(features @ covariance.in_basis) ** 2` where it is known already, because
            another posterior with the same basis needed it, `[batch, in_features (+1)]`.

    Returns:
        The Gaussian embeddings.
    """
    if covariance is None:
        return GaussianEmbedding(mean, features, mean.new_zeros(mean.shape[0]))
    squared = squared_coordinates
    if squared is None:
        squared = (features @ covariance.in_basis).square()
    if covariance.joint_variance is not None:
        spectrum = squared @ covariance.joint_variance.T
        return GaussianEmbedding(mean, features, spectrum.mean(dim=1), spectrum)
    assert covariance.in_variance is not None
    return GaussianEmbedding(mean, features, squared @ covariance.in_variance)


def fuse_templates(
    embedding: GaussianEmbedding, num_templates: int, covariance: KroneckerGaussian | None
) -> GaussianEmbedding:
    r"""Average the directions of several prompts of each label into one Gaussian embedding.

    The average $\frac1M \sum_m g_m / |g_m|$ of the MAP-normalised prompts is linear in $W$, so that fusing the
    features in the same way gives its exact covariance, correlations between prompts included.

    Args:
        embedding: `num_labels * num_templates` rows, the prompts of one label next to each other.
        num_templates: Prompts of each label, `M`.
        covariance: Posterior of the text projection, or None for no uncertainty.

    Returns:
        `num_labels` rows.

    Raises:
        ValueError: If the rows do not divide into labels.
    """
    if num_templates < 1 or len(embedding) % num_templates:
        raise ValueError(f"{len(embedding)} prompts are not {num_templates} for each label")
    if num_templates == 1:
        return embedding
    norms = torch.linalg.vector_norm(embedding.mean, dim=1, keepdim=True)

    def fused(rows: Tensor) -> Tensor:
        return (rows / norms).unflatten(0, (-1, num_templates)).mean(dim=1)

    return gaussian_embedding(fused(embedding.mean), fused(embedding.features), covariance)


def cosine_geometry(
    image: KroneckerGaussian, text: KroneckerGaussian, covariance: CovarianceForm = "diagonal"
) -> CosineGeometry:
    """Precompute ProbCosine's constants for a pair of posteriors of the same damping.

    Args:
        image: Posterior of the image projection.
        text: Posterior of the text projection.
        covariance: `"diagonal"` (the paper's) or `"full"`.

    Returns:
        The constants.

    Raises:
        ValueError: For an unknown form, two dampings, or projections into spaces of different size.
    """
    return framed_geometry(cosine_frame(image.out_basis, text.out_basis, covariance), image, text)


def cosine_frame(
    image_basis: Tensor, text_basis: Tensor, covariance: CovarianceForm = "diagonal"
) -> CosineFrame:
    """The part of ProbCosine's constants that depends on the eigenbases only.

    Args:
        image_basis: `out_basis` of the image posterior, `[features, features]`.
        text_basis: `out_basis` of the text posterior, `[features, features]`.
        covariance: `"diagonal"` or `"full"`.

    Returns:
        The frame.

    Raises:
        ValueError: For an unknown form, or projections into spaces of different size.
    """
    if covariance not in ("diagonal", "full"):
        raise ValueError(f"covariance must be 'diagonal' or 'full', not {covariance!r}")
    if image_basis.shape != text_basis.shape:
        raise ValueError("image and text posteriors are for embeddings of different sizes")
    if covariance == "full":
        overlap = (image_basis.T @ text_basis).square()
        return CosineFrame(image_axes=image_basis, text_axes=text_basis, overlap=overlap)
    return CosineFrame(image_spread=image_basis.square(), text_spread=text_basis.square())


def framed_geometry(
    frame: CosineFrame, image: KroneckerGaussian, text: KroneckerGaussian
) -> CosineGeometry:
    """Fill a frame with the variances of two posteriors in its eigenbases.

    Args:
        frame: From `cosine_frame`.
        image: Posterior of the image projection.
        text: Posterior of the text projection.

    Returns:
        ProbCosine's constants.

    Raises:
        ValueError: For two dampings.
    """
    if image.damping != text.damping:
        raise ValueError(
            f"image has {image.damping} damping, text {text.damping}: use one for both"
        )
    axes = {
        "image_axes": frame.image_axes,
        "text_axes": frame.text_axes,
        "overlap": frame.overlap,
    }
    f_image, f_text = image.out_variance, text.out_variance
    if f_image is None or f_text is None:
        return CosineGeometry(
            **axes, image_spread=frame.image_spread, text_spread=frame.text_spread
        )
    if frame.image_spread is not None and frame.text_spread is not None:
        f_image, f_text = frame.image_spread @ f_image, frame.text_spread @ f_text
    return CosineGeometry(**axes, image_variance=f_image, text_variance=f_text)


def pair_products(
    image: GaussianEmbedding, text: GaussianEmbedding, frame: CosineFrame | CosineGeometry
) -> PairProducts:
    """The part of ProbCosine that depends on the means and the axes only.

    Args:
        image: `N` embeddings.
        text: `C` embeddings.
        frame: The axes.

    Returns:
        The products.
    """
    return PairProducts(
        inner=image.mean @ text.mean.T,
        image_norm=image.mean.square().sum(dim=1),
        text_norm=text.mean.square().sum(dim=1),
        image_along=_along(image.mean, frame.text_axes),
        text_along=_along(text.mean, frame.image_axes),
    )


def prob_cosine(
    image: GaussianEmbedding,
    text: GaussianEmbedding,
    geometry: CosineGeometry | None,
    *,
    modalities: Modalities = "both",
    products: PairProducts | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of all pairs' cosine similarities.

    Args:
        image: `N` Gaussian embeddings.
        text: `C` Gaussian embeddings.
        geometry: Constants of the posterior, or None for no uncertainty.
        modalities: Whose uncertainty counts; the other's is taken as zero.
        products: `pair_products` of these embeddings along these axes, where they are known already.

    Returns:
        Means `[N, C]` and variances `[N, C]`; variances are never negative.

    Raises:
        ValueError: For an unknown `modalities`, or an embedding of another damping than the geometry.
    """
    if modalities not in ("both", "image", "text"):
        raise ValueError(f"modalities must be 'both', 'image' or 'text', not {modalities!r}")
    if modalities == "image":
        text = text.without_variance()
    elif modalities == "text":
        image = image.without_variance()
    if geometry is None:
        unit_image = torch.nn.functional.normalize(image.mean, dim=1)
        cosine = unit_image @ torch.nn.functional.normalize(text.mean, dim=1).T
        return cosine, torch.zeros_like(cosine)
    factored = geometry.image_variance is not None
    for name, embedding in (("image", image), ("text", text)):
        if (embedding.spectrum is None) != factored:
            raise ValueError(
                f"the {name} embedding and the geometry are of different dampings: encode it again "
                "with the posterior that the geometry is of"
            )
    products = products or pair_products(image, text, geometry)
    moments = _factored_moments if factored else _exact_moments
    return moments(image, text, geometry, products)


def _factored_moments(
    image: GaussianEmbedding,
    text: GaussianEmbedding,
    geometry: CosineGeometry,
    products: PairProducts,
) -> tuple[Tensor, Tensor]:
    f_image, f_text = geometry.image_variance, geometry.text_variance
    assert f_image is not None and f_text is not None
    inverse_image = 1.0 / (products.image_norm + image.scale * f_image.sum())
    inverse_text = 1.0 / (products.text_norm + text.scale * f_text.sum())
    cross_trace = f_image @ (f_text if geometry.overlap is None else geometry.overlap @ f_text)
    spread_image = products.image_along @ f_text
    spread_text = products.text_along @ f_image
    left = torch.stack([image.scale, spread_image], dim=1) * inverse_image[:, None]
    right = torch.stack([text.scale * cross_trace + spread_text, text.scale])
    mean = _scaled(products.inner, inverse_image, inverse_text)
    return mean, left @ (right * inverse_text)


def _exact_moments(
    image: GaussianEmbedding,
    text: GaussianEmbedding,
    geometry: CosineGeometry,
    products: PairProducts,
) -> tuple[Tensor, Tensor]:
    assert image.spectrum is not None and text.spectrum is not None
    v_image, v_text = image.spectrum, text.spectrum
    inverse_image = 1.0 / (products.image_norm + v_image.sum(dim=1))
    inverse_text = 1.0 / (products.text_norm + v_text.sum(dim=1))
    if geometry.image_spread is not None and geometry.text_spread is not None:
        v_image, v_text = v_image @ geometry.image_spread.T, v_text @ geometry.text_spread.T
    seen_by_text = v_image if geometry.overlap is None else v_image @ geometry.overlap
    left = torch.cat([seen_by_text + products.image_along, v_image], dim=1)
    right = torch.cat([v_text, products.text_along], dim=1)
    mean = _scaled(products.inner, inverse_image, inverse_text)
    return mean, (left * inverse_image[:, None]) @ (right * inverse_text[:, None]).T


def _along(mean: Tensor, axes: Tensor | None) -> Tensor:
    """Squared components of each row along the axes, `[batch, features]`."""
    return (mean if axes is None else mean @ axes).square()


def _scaled(inner: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    return inner * left_scale.sqrt()[:, None] * right_scale.sqrt()
