r"""Choose the hyperparameters of a posterior on a validation set.

The pseudo-data count $\tau$ says how much the curvature of the proxy data counts against the prior; no objective
on the proxy data fixes it, because it stands for the data that the model was trained on.  It is chosen by how
well the predictions fit labelled validation images, together with the form of the posterior.  The prior
precision $\lambda$ belongs to each count in closed form (`laplace`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any, get_args

import torch
from transformers.utils import logging

from .cosine import CovarianceForm, Modalities
from .features import LabelledFeatures, embed_labelled
from .fingerprint import fingerprints_match
from .kronecker import Damping, FactorSpectra, check_positive, factor_spectra
from .laplace import NoMaximumError, Objective, best_prior_precision, squared_norm
from .metrics import Scores
from .modeling_bayesvlm import BayesVLMForZeroShot
from .posterior import BayesVLMPosterior
from .posterior_files import CHOICES, PosteriorError
from .tuning_grid import Candidate, Modality, Variances, score_grid, score_plain
from .tuning_result import Criterion, Trial, TuningResult, choose_trial

logger = logging.get_logger(__name__)

PSEUDO_DATA_COUNTS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Pseudo-data counts that are tried by default."""


def tune_posterior(
    model: BayesVLMForZeroShot,
    dataset_or_features: Iterable[Mapping[str, Any]] | LabelledFeatures,
    *,
    processor: Any = None,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
    hypothesis_template: str | Sequence[str] | None = None,
    pseudo_data_counts: Sequence[float] = PSEUDO_DATA_COUNTS,
    objectives: Sequence[Objective] = ("reference", "evidence"),
    covariances: Sequence[CovarianceForm] = ("diagonal", "full"),
    dampings: Sequence[Damping] = ("factored", "exact"),
    modalities: Sequence[Modalities] | None = None,
    criterion: Criterion = "nlpd",
    max_accuracy_loss: float | None = 0.005,
    batch_size: int = 64,
    max_images: int | None = None,
    dataset_name: str | None = None,
    dataset_revision: str | None = None,
    dataset_split: str | None = None,
    progress: bool = True,
) -> TuningResult:
    r"""Choose pseudo-data count, objective, covariance, damping and modalities on labelled validation images.

    Give it validation images, never the test set: what is measured on the images that chose the posterior is too
    good.  The towers run once; the grid then takes seconds.  The model is not changed:
    `model.set_posterior(result.posterior)` puts the choice on it.

    Predictions are the pipeline's, probit-scaled logits through a softmax or, for SigLIP, a sigmoid.  With a
    sigmoid the NLPD is that of all classes' yes-no answers (`metrics.RunningScores`).

    Args:
        model: A model with a posterior, whose factors are tuned.
        dataset_or_features: Labelled rows, as for `embed_labelled`, or features from it.
        processor: The model's processor; needed for rows.
        image_column: Key of the images.
        label_column: Key of the labels.
        class_names: The candidate classes; by default those that the data set declares.
        hypothesis_template: Prompt, or prompts to fuse; by default the model's own.
        pseudo_data_counts: Values of $\tau$ to try, the same for both projections.
        objectives: How the prior precision of each count is chosen.  The reference objective is defined for
            factored damping only; a combination without a maximum is left out and named in the result.
        covariances: Forms of ProbCosine's covariance to try.
        dampings: Ways of adding the prior to try.
        modalities: Whose uncertainty counts, to try; `("both", "image")` by default, or what the model's
            configuration fixes.
        criterion: Metric that is minimised: `"nlpd"`, `"ece"` or `"brier"`.
        max_accuracy_loss: Candidates that lose more accuracy than this against the plain model are not
            chosen; None to allow any.
        batch_size: Images that go through the tower at once.
        max_images: Stop after this many images.
        dataset_name: Name of the validation set to note; by default what the data set says of itself.
        dataset_revision: Its revision to note.
        dataset_split: Its split to note; by default what the data set says of itself.
        progress: Show progress bars.

    Returns:
        The chosen posterior and all that was tried.

    Raises:
        PosteriorError: If the model has no posterior, or the features are of another base.
        ValueError: For an impossible setting, unusable rows or features, or when no candidate is left.
        ImageInputError: For an image that cannot be used.
    """
    posterior = model.posterior
    if posterior is None:
        raise PosteriorError(
            "the model has no posterior to tune: estimate one, or put one on it with model.set_posterior()"
        )
    posterior = _with_norms(posterior, model)
    whose = _checked_modalities(model, modalities)
    counts = _checked_grid(pseudo_data_counts, objectives, covariances, dampings)
    _check_selection(criterion, max_accuracy_loss)
    source: Any = dataset_or_features
    if isinstance(source, LabelledFeatures):
        features = source
    elif processor is None:
        raise ValueError("rows of images need the model's processor: pass processor=...")
    else:
        features = embed_labelled(
            model,
            processor,
            source,
            image_column=image_column,
            label_column=label_column,
            class_names=class_names,
            hypothesis_template=hypothesis_template,
            batch_size=batch_size,
            max_images=max_images,
            progress=progress,
        )
    _check_features(features, posterior, model)
    start = time.perf_counter()
    trials, plain, left_out = _try_all(
        model, posterior, features, counts, objectives, covariances, dampings, whose, progress
    )
    best = choose_trial(trials, plain, criterion, max_accuracy_loss)
    seconds = time.perf_counter() - start
    split = dataset_split or getattr(source, "split", None)
    record = {
        "dataset": dataset_name or getattr(getattr(source, "info", None), "dataset_name", None),
        "dataset_revision": dataset_revision,
        "split": None if split is None else str(split),
        "num_images": len(features),
        "num_classes": len(features.class_names),
        "hypothesis_template": list(features.templates),
        "criterion": criterion,
        "max_accuracy_loss": max_accuracy_loss,
        "grid": {
            "pseudo_data_counts": list(counts),
            "objectives": list(objectives),
            "covariances": list(covariances),
            "dampings": list(dampings),
            "modalities": list(whose),
        },
        "num_candidates": len(trials),
        "chosen": {name: getattr(best, name) for name in ("nlpd", "ece", "accuracy", "brier")},
        "plain": asdict(plain),
    }
    return TuningResult(
        posterior=_with_choice(posterior, best, record),
        best=best,
        trials=trials,
        plain=plain,
        criterion=criterion,
        max_accuracy_loss=max_accuracy_loss,
        num_images=len(features),
        num_classes=len(features.class_names),
        left_out=left_out,
        seconds=seconds,
    )


@torch.no_grad()
def _try_all(
    model: BayesVLMForZeroShot,
    posterior: BayesVLMPosterior,
    features: LabelledFeatures,
    counts: Sequence[float],
    objectives: Sequence[Objective],
    covariances: Sequence[CovarianceForm],
    dampings: Sequence[Damping],
    modalities: Sequence[Modalities],
    progress: bool,
) -> tuple[tuple[Trial, ...], Scores, tuple[str, ...]]:
    """Metrics of every candidate and of the plain model, and what was left out."""
    if features.images.mean.device.type == "mps":
        # Metrics are summed in float64, which that device lacks.
        features = features.to("cpu")
    device = features.images.mean.device
    spectra: dict[Modality, FactorSpectra] = {
        "image": factor_spectra(posterior.image.A, posterior.image.B),
        "text": factor_spectra(posterior.text.A, posterior.text.B),
    }
    variances, left_out = _all_variances(posterior, spectra, counts, objectives, dampings)
    if not variances:
        raise ValueError("there is nothing to try: " + "; ".join(left_out))
    with torch.autocast(device.type, enabled=False):
        readout: dict[str, Any] = {
            "likelihood": model.likelihood,
            "logit_scale": model.logit_scale.to(device),
            "logit_bias": model.logit_bias.to(device),
        }
        plain = score_plain(features, **readout)
        scores = score_grid(
            features, spectra, variances, covariances, modalities, **readout, progress=progress
        )
    return tuple(_trial(*item) for item in scores.items()), plain, left_out


def _all_variances(
    posterior: BayesVLMPosterior,
    spectra: dict[Modality, FactorSpectra],
    counts: Sequence[float],
    objectives: Sequence[Objective],
    dampings: Sequence[Damping],
) -> tuple[list[Variances], tuple[str, ...]]:
    found: list[Variances] = []
    left_out: dict[str, None] = {}
    for damping, objective, count in product(dampings, objectives, counts):
        if objective == "reference" and damping == "exact":
            left_out["reference objective, exact damping: defined for factored damping only"] = None
            continue
        precision: dict[str, float] = {}
        for name, spectrum in spectra.items():
            norm = getattr(posterior, name).weight_norm_squared
            try:
                precision[name] = best_prior_precision(
                    spectrum.in_values,
                    spectrum.out_values,
                    norm,
                    count,
                    objective,
                    damping=damping,
                )
            except NoMaximumError:
                left_out[
                    f"{objective} objective, {damping} damping: it has no maximum for the {name} factors, "
                    "too many of whose eigenvalues are zero"
                ] = None
        if len(precision) == len(spectra):
            found.append(
                Variances(count, objective, damping, precision["image"], precision["text"])
            )
    return found, tuple(left_out)


def _trial(candidate: Candidate, scores: Scores) -> Trial:
    variances, covariance, modalities = candidate
    return Trial(
        pseudo_data_count=variances.pseudo_data_count,
        objective=variances.objective,
        covariance=covariance,
        damping=variances.damping,
        modalities=modalities,
        image_prior_precision=variances.image_prior_precision,
        text_prior_precision=variances.text_prior_precision,
        **asdict(scores),
    )


def _with_norms(posterior: BayesVLMPosterior, model: BayesVLMForZeroShot) -> BayesVLMPosterior:
    """Fill in the norms of the projections where the posterior does not know them."""
    parts = {
        name: replace(part, weight_norm_squared=squared_norm(weight))
        for name, weight in model.projection_weights().items()
        if (part := getattr(posterior, name)).weight_norm_squared is None
    }
    return replace(posterior, **parts)


def _with_choice(
    posterior: BayesVLMPosterior, best: Trial, record: dict[str, Any]
) -> BayesVLMPosterior:
    chosen = posterior.with_hyperparameters(
        pseudo_data_count=best.pseudo_data_count,
        image_prior_precision=best.image_prior_precision,
        text_prior_precision=best.text_prior_precision,
        covariance=best.covariance,
        damping=best.damping,
        modalities=best.modalities,
        objective=best.objective,
    )
    return replace(chosen, provenance=chosen.provenance | {"tuning": record})


def _checked_modalities(
    model: BayesVLMForZeroShot, modalities: Sequence[Modalities] | None
) -> tuple[Modalities, ...]:
    fixed = model.config.modalities
    if modalities is None:
        return ("both", "image") if fixed is None else (fixed,)
    _check_choices("modalities", modalities)
    if fixed is not None and tuple(modalities) != (fixed,):
        raise ValueError(
            f"the model's configuration sets modalities to {fixed!r}, which wins over any posterior's: tune "
            "these only, or set model.config.modalities to None"
        )
    return tuple(modalities)


def _checked_grid(
    counts: Sequence[float],
    objectives: Sequence[Objective],
    covariances: Sequence[CovarianceForm],
    dampings: Sequence[Damping],
) -> tuple[float, ...]:
    if not counts:
        raise ValueError("pseudo_data_counts are empty: give at least one")
    for count in counts:
        check_positive("pseudo_data_counts", float(count))
    for name, values in (("covariances", covariances), ("dampings", dampings)):
        _check_choices(name, values)
    _check_choices("objectives", objectives, get_args(Objective))
    return tuple(sorted({float(count) for count in counts}))


def _check_choices(name: str, values: Sequence[str], known: Sequence[str] | None = None) -> None:
    if known is None:
        known = CHOICES[name if name in CHOICES else name.removesuffix("s")]
    # A string would be taken letter by letter.
    if isinstance(values, str) or not values or not set(values) <= set(known):
        raise ValueError(f"{name} must be a list with some of {', '.join(known)}, not {values!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} name one value twice: {values!r}")


def _check_selection(criterion: str, max_accuracy_loss: float | None) -> None:
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"criterion must be one of {', '.join(get_args(Criterion))}, not {criterion!r}"
        )
    if max_accuracy_loss is not None and not max_accuracy_loss >= 0:
        raise ValueError(f"max_accuracy_loss must be 0 or more, or None, not {max_accuracy_loss}")


def _check_features(
    features: LabelledFeatures, posterior: BayesVLMPosterior, model: BayesVLMForZeroShot
) -> None:
    features.check()
    for name, embedding in (("image", features.images), ("text", features.texts)):
        found = (embedding.mean.shape[1], embedding.features.shape[1])
        expected = getattr(posterior, name).shape
        if found != expected:
            raise PosteriorError(
                f"the {name} features are for a projection of shape {found}, the model's is {expected}: embed "
                "the data with this model"
            )
    if features.fingerprint is not None and not fingerprints_match(
        features.fingerprint, model.base_fingerprint()
    ):
        raise PosteriorError(
            "the features were embedded by a model with other projections: embed the data with this model"
        )
