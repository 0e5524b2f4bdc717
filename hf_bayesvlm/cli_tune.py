"""`bayesvlm tune`: choose a posterior's hyperparameters on a validation set."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli_common import check_device, check_out, check_plot, fail, load_model, load_processor

if TYPE_CHECKING:
    from .tuning_result import TuningResult

_ROWS = 10
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_PIPE_WIDTH = 120


def tune(
    model: Annotated[
        str, typer.Argument(help="Hub id or folder of the model.", show_default=False)
    ],
    dataset: Annotated[
        str,
        typer.Argument(
            help="Validation set: Hub id, folder of images, parquet file, or a saved data set.",
            show_default=False,
        ),
    ],
    posterior: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the posterior. \\[default: the model's own]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the chosen posterior to.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a posterior in --out.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of NLPD and ECE against the count.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split. \\[default: validation, or the only one]")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    labels: Annotated[
        str | None,
        typer.Option(
            help="Class names with commas between them, in the order of the label indices. "
            "\\[default: as the data set declares]"
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt with {} for the label; give several to fuse them."),
    ] = None,
    counts: Annotated[
        str | None,
        typer.Option(
            help="Pseudo-data counts to try, with commas. \\[default: 0.1 to 1000 in steps 1-2-5]"
        ),
    ] = None,
    criterion: Annotated[str, typer.Option(help="What to minimise: nlpd, ece or brier.")] = "nlpd",
    max_accuracy_loss: Annotated[
        float,
        typer.Option(min=0.0, help="Accuracy that the choice may lose against the plain model."),
    ] = 0.005,
    max_images: Annotated[int | None, typer.Option(min=1, help="Stop after this many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda or cuda:1. \\[default: cpu]")
    ] = None,
    allow_test_split: Annotated[
        bool, typer.Option("--allow-test-split", help="Tune on data that are called a test set.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, everything else on stderr.")
    ] = False,
) -> None:
    """Choose a posterior's hyperparameters on labelled validation images.

    The towers run once over the images; then every pseudo-data count is tried with both objectives, both
    covariances and both ways of damping.  The choice has the lowest criterion among the candidates that keep
    the plain model's accuracy.

    Tuning never looks at test data: a split or file that is called test is refused.
    """
    from .sources import open_dataset
    from .tuning import tune_posterior

    stderr = Console(stderr=True)
    try:
        if split is None:
            split = _validation_split(dataset)
        if not allow_test_split:
            refuse_test_data(dataset, split)
        options = _checked_options(labels, template, counts, criterion)
        check_plot(plot)
        check_out(out, overwrite)
        check_device(device)
        opened = open_dataset(dataset, split=split)
        loaded = load_model(model, posterior)
        if device is not None:
            loaded = loaded.to(device)  # type: ignore[arg-type]  # transformers wraps `to`
        result = tune_posterior(
            loaded,
            opened.dataset,
            processor=load_processor(model),
            image_column=image_column,
            label_column=label_column,
            max_accuracy_loss=max_accuracy_loss,
            batch_size=batch_size,
            max_images=max_images,
            dataset_name=opened.name,
            dataset_revision=opened.revision,
            dataset_split=split,
            progress=stderr.is_terminal,
            **options,
        )
        _report(result, as_json, stderr)
        if out is not None:
            result.posterior.save_pretrained(out)
            stderr.print(f"wrote {escape(str(out))}", highlight=False)
        if plot is not None:
            from .plotting_tuning import plot_tuning

            plot_tuning(result, plot)
            stderr.print(f"wrote {escape(str(plot))}", highlight=False)
    except (ValueError, OSError, ImportError) as error:
        fail(stderr, error)


def refuse_test_data(dataset: str, split: str | None) -> None:
    """Refuse a split, file or folder that is called a test set.

    Args:
        dataset: What names the data set.
        split: Its split, in the notation of `datasets`, if it has splits.

    Raises:
        ValueError: If a part of the split is called test or is all there is, or the file or folder is.
    """
    advice = (
        "tuning on test data makes every later result on them too good. Name a validation split, or pass "
        "--allow-test-split"
    )
    parts = {part.partition("[")[0].strip().lower() for part in (split or "").split("+")}
    if any(part == "all" or "test" in re.split(r"[^a-z]+", part) for part in parts):
        raise ValueError(f"the split {split!r} holds test data: {advice}")
    path = Path(dataset.partition("?")[0])
    # A file is called by its name or its folder's; a Hub id such as user/test-of-time is no file.
    called = [path.stem] if path.suffix or "*" in path.name else []
    if called and path.parent.name.lower() == "test":
        called = ["test"]
    if path.is_dir():
        called = [path.name]
    if any("test" in re.split(r"[^a-z]+", name.lower()) for name in called):
        raise ValueError(f"{dataset} is called a test set: {advice}")


def _validation_split(source: str) -> str | None:
    """The split to tune on where none is named: the validation split, or the only one."""
    from .sources import split_names

    names = split_names(source)
    found = next((name for name in _VALIDATION_NAMES if name in names), None)
    if found is None and len(names) > 1:
        raise ValueError(
            f"which split is for validation? The data set has {', '.join(names)}: name it with --split"
        )
    return found or (names[0] if names else None)


def _checked_options(
    labels: str | None, template: list[str] | None, counts: str | None, criterion: str
) -> dict[str, Any]:
    """Options that can be checked before anything is loaded."""
    from .label_cache import check_labels, check_templates

    if criterion not in ("nlpd", "ece", "brier"):
        raise ValueError(f"--criterion must be nlpd, ece or brier, not {criterion!r}")
    options: dict[str, Any] = {"criterion": criterion}
    if labels is not None:
        options["class_names"] = check_labels(labels)
    if template:
        options["hypothesis_template"] = check_templates(template)
    if counts is not None:
        try:
            options["pseudo_data_counts"] = [float(count) for count in counts.split(",")]
        except ValueError as error:
            raise ValueError(f"--counts takes numbers with commas between them: {error}") from error
        if not all(0.0 < count < float("inf") for count in options["pseudo_data_counts"]):
            raise ValueError(f"--counts must be positive, not {counts}")
    return options


def _report(result: TuningResult, as_json: bool, stderr: Console) -> None:
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        _print_table(result)
    for reason in result.left_out:
        stderr.print(f"left out: {escape(reason)}", highlight=False, soft_wrap=True)
    if result.at_grid_edge is not None:
        stderr.print(
            f"note: the chosen count {result.best.pseudo_data_count:g} is the {result.at_grid_edge} tried; "
            "a wider grid (--counts) may do better",
            highlight=False,
            soft_wrap=True,
        )


def _print_table(result: TuningResult) -> None:
    stdout = Console()
    if not stdout.is_terminal:
        # A file or pipe has no width of its own to squeeze the columns into.
        stdout = Console(width=_PIPE_WIDTH)
    stdout.print(
        f"{len(result.trials)} candidates on {result.num_images} images of {result.num_classes} classes in "
        f"{result.seconds:.1f} s; the best {min(_ROWS, len(result.trials))} by {result.criterion}:",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name in ("count", "objective", "damping", "covariance", "counts for"):
        table.add_column(name, justify="right" if name == "count" else "left")
    for name in ("λ image", "λ text", "NLPD", "ECE", "accuracy", "Brier"):
        table.add_column(name, justify="right")
    plain = result.plain
    metrics = [f"{v:.4f}" for v in (plain.nlpd, plain.ece, plain.accuracy, plain.brier)]
    table.add_row("", "plain model", "", "", "", "", "", *metrics, style="dim")
    for trial in result.ranked()[:_ROWS]:
        table.add_row(
            f"{trial.pseudo_data_count:g}",
            trial.objective,
            trial.damping,
            trial.covariance,
            trial.modalities,
            f"{trial.image_prior_precision:.4g}",
            f"{trial.text_prior_precision:.4g}",
            *(f"{v:.4f}" for v in (trial.nlpd, trial.ece, trial.accuracy, trial.brier)),
            style="bold green" if trial == result.best else None,
        )
    stdout.print(table)
