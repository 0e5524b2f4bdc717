"""`bayesvlm classify`: zero-shot classification with the uncertainty of every score."""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .cli_common import check_device, check_plot, fail, load_model, print_error
from .plotting import MAX_ROWS, plot_predictions

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_THRESHOLD = 0.5
_GLOB_CHARACTERS = "*?["
_THUMBNAIL = (512, 512)
_BAR_WIDTH = 24
# Formats that Pillow knows but cannot draw by itself.
_NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


@dataclass
class Classified:
    """One image on its way through the command.

    Attributes:
        name: As the user gave it.
        image: A small copy for the plot, where one is asked for.
        result: From the pipeline, with `return_uncertainty=True`.
        error: Why it could not be used.
    """

    name: str
    image: Image.Image | None = None
    result: dict[str, Any] | None = None
    error: str | None = None

    def unsure(self, threshold: float) -> bool:
        """Whether the best label's probability is below the threshold."""
        return self.result is not None and self.result["predictions"][0]["score"] < threshold


def classify(
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, globs or URLs.", show_default=False)
    ],
    labels: Annotated[
        str, typer.Option(help="Candidate labels with commas between them.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder. \\[default: the embedded model]")
    ] = None,
    posterior: Annotated[
        str | None, typer.Option(help="Hub id or folder of a posterior to put on the model.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt with {} for the label; give several to fuse them."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Labels to show an image.")] = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="An image is flagged as unsure when its best label is less probable than this.",
        ),
    ] = DEFAULT_THRESHOLD,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of the predictions with error bars.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, everything else on stderr.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda or cuda:1. \\[default: the best there is]")
    ] = None,
) -> None:
    """Classify images zero-shot, with the uncertainty of every score.

    For every label the predictive probability, and its logit with one standard deviation.  For every image
    the entropy of the prediction and the mutual information, the part of it that is the model's own
    ignorance.  An image is flagged as unsure when its best label is less probable than the threshold.

    Exit code 2 if an input cannot be used; the other images are classified all the same.
    """
    stderr = Console(stderr=True)
    try:
        items = _find(images)
        # Bad labels and templates are refused before a model is loaded.
        options = _checked_options(labels, template, top_k)
        check_plot(plot)
        if any(item.error is None for item in items):
            pipe = _load_pipeline(model, posterior, device)
            _classify_all(
                pipe, items, options, batch_size, stderr, keep=0 if plot is None else MAX_ROWS
            )
        for item in items:
            if item.error is not None:
                print_error(stderr, item.error)
        if as_json:
            sys.stdout.write(
                json.dumps([_as_row(item, threshold) for item in items], indent=2) + "\n"
            )
        elif any(item.result is not None for item in items):
            _print_tables(items, threshold)
        if plot is not None and any(item.result is not None for item in items):
            _write_plot(items, plot, threshold)
            stderr.print(f"wrote {escape(str(plot))}", highlight=False)
    except (ValueError, OSError, ImportError) as error:
        fail(stderr, error)
    if any(item.error is not None for item in items):
        raise typer.Exit(2)


def _find(sources: Sequence[str]) -> list[Classified]:
    """All images that the arguments name; what names none is kept with its error."""
    items: dict[str, Classified] = {}
    for source in sources:
        try:
            for name in expand_images([source]):
                items.setdefault(name, Classified(name))
        except FileNotFoundError as error:
            items.setdefault(source, Classified(source, error=str(error)))
    return list(items.values())


def expand_images(sources: Sequence[str]) -> list[str]:
    """Turn files, folders and globs into a list of images.

    Args:
        sources: Paths, folders (searched with their sub-folders), glob patterns or URLs.

    Returns:
        Paths and URLs in order, without repeats; folders and globs sorted.

    Raises:
        FileNotFoundError: If a folder holds no images, or a pattern or path matches nothing.
    """
    found: list[str] = []
    for source in sources:
        if source.startswith(("http://", "https://", "data:")):
            found.append(source)
        elif Path(source).is_dir():
            files = sorted(_images_below(Path(source)))
            if not files:
                raise FileNotFoundError(f"no images in the folder {source}")
            found += files
        elif Path(source).exists():
            found.append(source)
        elif any(character in source for character in _GLOB_CHARACTERS):
            matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  absolute patterns
            if not matches:
                raise FileNotFoundError(f"nothing matches {source}")
            found += expand_images(matches)
        else:
            raise FileNotFoundError(f"no file or folder {source}")
    return list(dict.fromkeys(found))


def _images_below(folder: Path) -> Iterator[str]:
    from PIL import Image

    endings = {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_PICTURES
    }
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix.lower() in endings:
            yield str(path)


def _checked_options(labels: str, template: list[str] | None, top_k: int | None) -> dict[str, Any]:
    from .label_cache import check_labels, check_templates

    options: dict[str, Any] = {"candidate_labels": check_labels(labels), "return_uncertainty": True}
    if template:
        options["hypothesis_template"] = check_templates(template)
    if top_k is not None:
        options["top_k"] = top_k
    return options


def _load_pipeline(model: str | None, posterior: str | None, device: str | None) -> Any:
    from transformers import pipeline

    from .embedded import EMBEDDED_MODEL
    from .pipeline import TASK

    check_device(device)
    name = EMBEDDED_MODEL if model is None else model
    loaded = load_model(name, posterior)
    return pipeline(  # type: ignore[call-overload]  # our task is not in its list
        TASK, model=loaded, tokenizer=name, image_processor=name, device=device
    )


def _classify_all(
    pipe: Any,
    items: list[Classified],
    options: dict[str, Any],
    batch_size: int,
    stderr: Console,
    keep: int,
) -> None:
    """Fill in the results, holding one batch of images at a time and small copies of the first `keep`."""
    from .images import ImageInputError, load_rgb_image

    with Progress(console=stderr, transient=True, disable=len(items) <= batch_size) as progress:
        items = [item for item in items if item.error is None]
        task = progress.add_task("classifying", total=len(items))
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            good: list[tuple[Classified, Image.Image]] = []
            for item in batch:
                try:
                    good.append((item, load_rgb_image(item.name)))
                except (ImageInputError, OSError) as error:
                    # The others are still classified; the exit code tells.
                    item.error = str(error)
            results = pipe([image for _, image in good], batch_size=batch_size, **options)
            for (item, image), result in zip(good, results, strict=True):
                item.result = result
                if keep > 0:
                    keep -= 1
                    item.image = image.copy()
                    item.image.thumbnail(_THUMBNAIL)
            progress.advance(task, len(batch))


def _as_row(item: Classified, threshold: float) -> dict[str, Any]:
    if item.result is None:
        return {"image": item.name, "error": item.error}
    return {"image": item.name, **item.result, "unsure": item.unsure(threshold)}


def _print_tables(items: list[Classified], threshold: float) -> None:
    stdout = Console()
    for item in items:
        if item.result is None:
            continue
        stdout.print(_headline(item, threshold), highlight=False, soft_wrap=True)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(min_width=16, overflow="fold")
        table.add_column(justify="right")
        table.add_column(justify="right")
        table.add_column(min_width=_BAR_WIDTH)
        for prediction in item.result["predictions"]:
            table.add_row(
                escape(prediction["label"]),
                f"{prediction['score']:.3f}",
                f"[dim]logit {prediction['logit_mean']:.2f} ± {prediction['logit_std']:.2f}[/]",
                "█" * round(_BAR_WIDTH * prediction["score"]),
            )
        stdout.print(table)
    flagged = sum(item.unsure(threshold) for item in items)
    classified = sum(item.result is not None for item in items)
    stdout.print(
        f"{flagged} of {classified} unsure: the best label is less probable than {threshold:g}.",
        highlight=False,
    )


def _headline(item: Classified, threshold: float) -> str:
    assert item.result is not None
    verdict = "  [bold yellow]unsure[/]" if item.unsure(threshold) else ""
    entropy, information = item.result["entropy"], item.result["mutual_information"]
    numbers = f"entropy {entropy:.2f}, mutual information {information:.3f} nats"
    return f"[bold]{escape(item.name)}[/]  [dim]{numbers}[/]{verdict}"


def _write_plot(items: list[Classified], plot: Path, threshold: float) -> None:
    shown = [item for item in items if item.result is not None]
    drawn = [item for item in shown if item.image is not None]
    plot_predictions(
        [item.image for item in drawn if item.image is not None],
        [item.result for item in drawn if item.result is not None],
        [Path(item.name).stem for item in drawn],
        plot,
        unsure=[item.unsure(threshold) for item in drawn],
        total=len(shown),
    )
