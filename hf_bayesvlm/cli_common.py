"""What the subcommands of `bayesvlm` share: errors without tracebacks, early checks of options."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .posterior_files import POSTERIOR_CONFIG_NAME

if TYPE_CHECKING:
    from .modeling_bayesvlm import BayesVLMForZeroShot


def check_plot(plot: Path | None) -> None:
    """Refuse a `--plot` that could not be written at the end of the work.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the ending is not a picture format.
        FileNotFoundError: If its folder does not exist.
    """
    if plot is None:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'hf_bayesvlm[plot]'") from error
    endings = FigureCanvasAgg.get_supported_filetypes()
    if plot.suffix.lstrip(".").lower() not in endings:
        raise ValueError(f"--plot {plot}: the name must end in one of {', '.join(sorted(endings))}")
    if not plot.absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot {plot}: there is no folder {plot.absolute().parent}")


def check_out(out: Path | None, overwrite: bool) -> None:
    """Refuse an `--out` that could not be written, or that holds a posterior which nobody said to replace.

    Raises:
        FileExistsError: If it is a file, or holds a posterior.
        PermissionError: If it cannot be written to.
    """
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; give a folder")
    if (out / POSTERIOR_CONFIG_NAME).exists() and not overwrite:
        raise FileExistsError(f"--out {out} holds a posterior: give --overwrite to replace it")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise FileExistsError(f"--out {out}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--out {out} cannot be written to")


def check_model_source(name: str) -> None:
    """Refuse an empty `--model`, or one that is a posterior."""
    if not name:
        raise ValueError("--model is empty: give a Hub id or a folder")
    folder = Path(name)
    if (folder / "posterior_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{name} is a posterior, not a model: use --posterior {name}")


def check_device(device: str | None) -> None:
    """Refuse a `--device` that this machine or this build of PyTorch does not have."""
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # The first line says it; the rest is about PyTorch's build.
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from error


def load_model(
    name: str, posterior: str | None = None, *, revision: str | None = None
) -> BayesVLMForZeroShot:
    """Load a bundle or a plain model without transformers' own loading reports.

    Args:
        name: Hub id or folder.
        posterior: Hub id or folder of a posterior to put on it.
        revision: Revision of the model on the Hub.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If it is no model, or cannot be loaded.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from .modeling_bayesvlm import BayesVLMForZeroShot

    disable_progress_bar()
    # Loading reports are for library users; our own warnings are not among them.
    set_verbosity_error()
    check_model_source(name)
    try:
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        return BayesVLMForZeroShot.from_vlm(name, posterior, **options)
    except RuntimeError as error:
        raise ValueError(
            f"{name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def load_processor(name: str, *, revision: str | None = None) -> Any:
    """Tokenizer and image processor of a model, whether or not it was saved with a processor of its own.

    Args:
        name: Hub id or folder.
        revision: Revision on the Hub.

    Returns:
        An object with `tokenizer` and `image_processor`.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    return SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(name, revision=revision),
        image_processor=AutoImageProcessor.from_pretrained(name, revision=revision),
    )


def fail(stderr: Console, error: Exception) -> NoReturn:
    """Print an error without a traceback and exit with code 2."""
    if os.environ.get("BAYESVLM_DEBUG"):
        raise error
    print_error(stderr, str(error))
    raise typer.Exit(2)


def print_error(stderr: Console, text: str) -> None:
    """Print one error on standard error."""
    stderr.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
