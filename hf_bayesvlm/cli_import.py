"""`bayesvlm import-reference`: the factors published with arXiv:2412.06014 as a posterior of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli_common import check_out, fail, load_model

if TYPE_CHECKING:
    from .posterior import BayesVLMPosterior

_PIPE_WIDTH = 120
# Published prior precisions were found by gradient steps; the norm they imply is a little off.
_NORM_TOLERANCE = 0.01


@dataclass(frozen=True)
class Norms:
    """Squared norms of the two projections, biases included.

    Attributes:
        image: Of the image projection.
        text: Of the text projection.
        source: Where they are from, for people.
    """

    image: float
    text: float
    source: str


def import_reference(
    directory: Annotated[
        str,
        typer.Argument(
            help="Folder with A_img_analytic.pt and the other published files.", show_default=False
        ),
    ],
    base_model: Annotated[
        str,
        typer.Option(help="Hub id or folder of the model they are for.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write the posterior to.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a posterior in --out.")] = False,
    push: Annotated[str | None, typer.Option(help="Hub id to push the posterior to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Push to a private repository.")] = (
        False
    ),
    revision: Annotated[str | None, typer.Option(help="Revision of the base model.")] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(help="softmax (CLIP) or sigmoid (SigLIP). \\[default: from the base]"),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Choose the prior precisions again: reference or evidence. \\[default: as published]"
        ),
    ] = None,
    pseudo_data_count: Annotated[
        float | None, typer.Option(help="Pseudo-data count. \\[default: as published]")
    ] = None,
    check_base: Annotated[
        bool,
        typer.Option(
            "--check-base/--no-check-base",
            help="Load the base, check that the factors fit it, and note its fingerprint.",
        ),
    ] = True,
    image_weight_norm: Annotated[
        float | None, typer.Option(help="Squared norm of the image projection, with its bias.")
    ] = None,
    text_weight_norm: Annotated[
        float | None, typer.Option(help="Squared norm of the text projection, with its bias.")
    ] = None,
) -> None:
    """Import the factors that the authors of arXiv:2412.06014 published.

    The files are read as plain tensors (nothing in them is run) and checked.  Prior precisions stay as
    published unless --objective chooses them again, for which the norms of the base's projections are needed:
    they are taken from the options, else from the base, else (--no-check-base) from the published prior
    precisions, which determine them.
    """
    stderr = Console(stderr=True)
    try:
        check_out(out, overwrite)
        _check_options(out, push, likelihood, objective, image_weight_norm, text_weight_norm)
        published = read_published(directory, base_model, likelihood, revision)
        implied, reason = implied_norms(published)
        posterior = published
        norms = implied
        if check_base:
            posterior = _checked_against_base(published, base_model, revision, likelihood)
            norms = _norms_of(posterior)
            _compare(norms, implied, stderr)
        if image_weight_norm is not None and text_weight_norm is not None:
            norms = Norms(image_weight_norm, text_weight_norm, "given")
        posterior = _rescaled(posterior, norms, reason, objective, pseudo_data_count)
        _print_table(published, posterior, norms)
        if objective is None and pseudo_data_count is not None:
            stderr.print(
                "note: the prior precisions are those published for another pseudo-data count; "
                "--objective chooses them for this one",
                highlight=False,
                soft_wrap=True,
            )
        if out is not None:
            posterior.save_pretrained(out)
            stderr.print(f"wrote {escape(str(out))}", highlight=False)
        if push is not None:
            commit = posterior.push_to_hub(push, private=private or None)
            stderr.print(f"published {escape(str(commit))}", highlight=False)
    except (ValueError, OSError, ImportError) as error:
        fail(stderr, error)


def read_published(
    directory: str, base_model: str, likelihood: str | None = None, revision: str | None = None
) -> BayesVLMPosterior:
    """Read and check published factors.

    Args:
        directory: Folder of the published files.
        base_model: Hub id or folder of the base; a folder is not noted.
        likelihood: `"softmax"` or `"sigmoid"`; by default sigmoid if the base is called SigLIP.
        revision: Revision of the base to note.

    Returns:
        The posterior with the published prior precisions.

    Raises:
        FileNotFoundError: If a file is missing.
        PosteriorError: If a file is damaged, or holds anything but a factor.
    """
    from .posterior import BayesVLMPosterior
    from .posterior_files import hub_id

    likelihood = likelihood or ("sigmoid" if "siglip" in base_model.lower() else "softmax")
    return BayesVLMPosterior.from_reference(
        directory,
        hub_id(base_model),
        likelihood=likelihood,  # type: ignore[arg-type]  # checked by the posterior
        revision=revision,
    )


def implied_norms(published: BayesVLMPosterior) -> tuple[Norms | None, str]:
    """Norms of the projections that the published prior precisions imply.

    Args:
        published: From `read_published`.

    Returns:
        The norms, or None and why there are none.
    """
    from .laplace import implied_weight_norm_squared

    values: dict[str, float] = {}
    for name, part in (("image", published.image), ("text", published.text)):
        try:
            values[name] = implied_weight_norm_squared(
                part.A, part.B, part.prior_precision, part.pseudo_data_count
            )
        except ValueError as error:
            return None, f"{name}: {error}"
    return Norms(values["image"], values["text"], "implied by the published precisions"), ""


def _checked_against_base(
    published: BayesVLMPosterior, base_model: str, revision: str | None, likelihood: str | None
) -> BayesVLMPosterior:
    """The posterior as the base certifies it: shapes, likelihood, fingerprint, norms."""
    try:
        model = load_model(base_model, revision=revision)
    except OSError as error:
        raise OSError(
            f"the base model {base_model} cannot be loaded, to check that the factors fit it: {error}. "
            "Pass --no-check-base to import them all the same"
        ) from error
    if likelihood is None:
        published = replace(published, likelihood=model.likelihood)
    model.set_posterior(published)
    certified = model.posterior
    assert certified is not None
    return certified


def _norms_of(posterior: BayesVLMPosterior) -> Norms | None:
    image, text = posterior.image.weight_norm_squared, posterior.text.weight_norm_squared
    return None if image is None or text is None else Norms(image, text, "of the base model")


def _compare(norms: Norms | None, implied: Norms | None, stderr: Console) -> None:
    """Say so where the published precisions were chosen for projections of another norm."""
    if norms is None or implied is None:
        return
    for name in ("image", "text"):
        found, expected = getattr(norms, name), getattr(implied, name)
        if abs(found / expected - 1.0) > _NORM_TOLERANCE:
            stderr.print(
                f"[yellow]warning:[/] the base's {name} projection has a squared norm of {found:.4g}, the "
                f"published prior precision was chosen for one of {expected:.4g}: these may be the factors of "
                "another model",
                highlight=False,
                soft_wrap=True,
            )


def _rescaled(
    posterior: BayesVLMPosterior,
    norms: Norms | None,
    reason: str,
    objective: str | None,
    pseudo_data_count: float | None,
) -> BayesVLMPosterior:
    """The posterior under the hyperparameters asked for."""
    if norms is not None:
        image, text = (
            replace(getattr(posterior, name), weight_norm_squared=getattr(norms, name))
            for name in ("image", "text")
        )
        provenance = posterior.provenance | {"weight_norms": norms.source}
        posterior = replace(posterior, image=image, text=text, provenance=provenance)
    elif objective is not None:
        raise ValueError(
            f"choosing the prior precisions again needs the norms of the projections ({reason}): pass "
            "--check-base, or --image-weight-norm and --text-weight-norm"
        )
    return posterior.with_hyperparameters(
        pseudo_data_count=pseudo_data_count,
        objective=objective,  # type: ignore[arg-type]  # checked by the posterior
    )


def _check_options(
    out: Path | None,
    push: str | None,
    likelihood: str | None,
    objective: str | None,
    image_weight_norm: float | None,
    text_weight_norm: float | None,
) -> None:
    if out is None and push is None:
        raise ValueError("say where the posterior goes: --out FOLDER, or --push USER/NAME")
    if likelihood not in (None, "softmax", "sigmoid"):
        raise ValueError(f"--likelihood must be softmax or sigmoid, not {likelihood!r}")
    if objective not in (None, "reference", "evidence"):
        raise ValueError(f"--objective must be reference or evidence, not {objective!r}")
    if (image_weight_norm is None) != (text_weight_norm is None):
        raise ValueError("give both --image-weight-norm and --text-weight-norm")
    for name, norm in (("image", image_weight_norm), ("text", text_weight_norm)):
        if norm is not None and not 0.0 < norm < float("inf"):
            raise ValueError(f"--{name}-weight-norm must be positive, not {norm}")


def _print_table(
    published: BayesVLMPosterior, posterior: BayesVLMPosterior, norms: Norms | None
) -> None:
    import torch

    stdout = Console()
    if not stdout.is_terminal:
        # A file or pipe has no width of its own to squeeze the columns into.
        stdout = Console(width=_PIPE_WIDTH)
    factors = Table(box=None, padding=(0, 1), header_style="bold")
    factors.add_column("factor")
    for name in ("shape", "trace", "smallest eigenvalue", "largest eigenvalue"):
        factors.add_column(name, justify="right")
    for name, factor in published.factors().items():
        # As they are: published output factors have slightly negative eigenvalues, taken as 0 later.
        values = torch.linalg.eigvalsh(0.5 * (factor + factor.T).double())
        factors.add_row(
            name,
            " x ".join(map(str, factor.shape)),
            f"{values.sum().item():.6g}",
            f"{values[0].item():.4g}",
            f"{values[-1].item():.6g}",
        )
    stdout.print(factors)
    precisions = Table(box=None, padding=(0, 1), header_style="bold")
    precisions.add_column("projection")
    for name in ("|W|²", "published count", "published λ", "count", "λ"):
        precisions.add_column(name, justify="right")
    for name in ("image", "text"):
        before, after = getattr(published, name), getattr(posterior, name)
        precisions.add_row(
            name,
            "unknown" if norms is None else f"{getattr(norms, name):.6g}",
            f"{before.pseudo_data_count:g}",
            f"{before.prior_precision:.7g}",
            f"{after.pseudo_data_count:g}",
            f"{after.prior_precision:.7g}",
        )
    stdout.print(precisions)
    source = "" if norms is None else f"; norms {norms.source}"
    stdout.print(
        f"{posterior.likelihood} likelihood, {posterior.objective} objective{source}",
        highlight=False,
        soft_wrap=True,
    )
