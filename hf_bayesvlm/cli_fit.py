"""`bayesvlm fit`: a posterior from image-text pairs, in one process or many."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from tarfile import TarError
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli_common import check_device, check_out, fail, load_model, load_processor
from .posterior_files import hub_id

if TYPE_CHECKING:
    from .posterior import BayesVLMPosterior

_MAX_DEFAULT_WORKERS = 8
_PATIENCE = datetime.timedelta(hours=12)


def fit(
    model: Annotated[
        str,
        typer.Argument(help="Hub id or folder of a CLIP, SigLIP or bundle.", show_default=False),
    ],
    dataset: Annotated[
        str,
        typer.Argument(
            help="Hub id, folder, or files (.parquet, .arrow, .tar, .csv, .json; {000..127} and * work).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the posterior to.", show_default=False)
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Hub id to publish the posterior as.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option(help="Publish it as a private repository.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a posterior in --out.")] = False,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split. \\[default: train, or the only one]")
    ] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Revision of the data set.")] = None,
    model_revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    streaming: Annotated[
        bool, typer.Option(help="Read the data from front to back without downloading it first.")
    ] = False,
    image_column: Annotated[
        str | None, typer.Option(help="Column of the images. \\[default: found by type]")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the captions. \\[default: found by name]")
    ] = None,
    captions: Annotated[
        Literal["sample", "expand"],
        typer.Option(help="Of several captions: one by seed, or a pair of each."),
    ] = "sample",
    image_root: Annotated[
        str | None,
        typer.Option(help="Where relative paths start. \\[default: the table's folder]"),
    ] = None,
    contrast_size: Annotated[
        int, typer.Option(min=2, help="Pairs that are contrasted with each other.")
    ] = 32768,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in the towers at once.")] = 64,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode images. \\[default: by cores]")
    ] = None,
    max_pairs: Annotated[int | None, typer.Option(min=2, help="Read this many pairs only.")] = None,
    sharding: Annotated[
        Literal["rows", "files"] | None,
        typer.Option(
            help="How processes share the data. \\[default: files of a stream, else rows]"
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision of the towers. \\[default: that of the model]"),
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Save after every block; go on from there when run again.")
    ] = None,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="What to do at a row that is no pair.")
    ] = "raise",
    max_skipped_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Stop when more than this was skipped.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="For the choice among captions.")] = 0,
    pseudo_data_count: Annotated[
        float, typer.Option(help="How often the pairs are counted (tau).")
    ] = 1.0,
    objective: Annotated[
        Literal["reference", "evidence"] | None,
        typer.Option(
            help="How prior precisions are chosen. \\[default: reference where it can be]"
        ),
    ] = None,
    covariance: Annotated[
        Literal["diagonal", "full"], typer.Option(help="Covariances in ProbCosine.")
    ] = "diagonal",
    damping: Annotated[
        Literal["factored", "exact"], typer.Option(help="How the prior is added.")
    ] = "factored",
    modalities: Annotated[
        Literal["both", "image", "text"], typer.Option(help="Whose uncertainty counts.")
    ] = "both",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda or cuda:1. \\[default: the best there is]")
    ] = None,
) -> None:
    """Estimate a posterior from image-text pairs; nothing is trained.

    Run it under `accelerate launch` or `torchrun` to share the work among processes and machines.
    """
    stderr = Console(stderr=True)
    try:
        _check_target(out, push, overwrite)
        accelerator = _accelerator(device)
        try:
            if push is not None and accelerator.is_main_process:
                _check_login(push)
            posterior = _estimate(
                model,
                dataset,
                accelerator,
                open_options={
                    "config": config,
                    "split": split,
                    "revision": dataset_revision,
                    "streaming": streaming,
                },
                model_revision=model_revision,
                columns=(image_column, text_column),
                image_root=image_root,
                options={
                    "captions": captions,
                    "contrast_size": contrast_size,
                    "batch_size": batch_size,
                    "num_workers": _default_workers() if num_workers is None else num_workers,
                    "max_pairs": max_pairs,
                    "sharding": sharding,
                    "dtype": dtype,
                    "checkpoint_dir": checkpoint_dir,
                    "on_error": on_error,
                    "max_skipped_share": max_skipped_share,
                    "seed": seed,
                    "pseudo_data_count": pseudo_data_count,
                    "objective": objective,
                    "covariance": covariance,
                    "damping": damping,
                    "modalities": modalities,
                },
            )
            if accelerator.is_main_process:
                _print_summary(posterior)
                _write(posterior, out, push, private, stderr)
        finally:
            accelerator.end_training()
            _leave_group()
    except KeyboardInterrupt:
        hint = "" if checkpoint_dir is None else ": the same command goes on from the last block"
        stderr.print(f"interrupted{hint}", highlight=False)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError, EOFError, TarError) as error:
        fail(stderr, error)


def _check_target(out: Path | None, push: str | None, overwrite: bool) -> None:
    """Refuse what would lose hours of work at its end, before it begins."""
    if out is None and push is None:
        raise ValueError("give --out FOLDER, --push USER/NAME, or both")
    if push is not None and (hub_id(push) is None or "/" not in push):
        raise ValueError(f"--push {push!r} is not a Hub id of the form user/name")
    check_out(out, overwrite)


def _check_login(push: str) -> None:
    """Refuse to publish without an account now, and not after the work."""
    from huggingface_hub import whoami

    from .hub_errors import explained

    with explained(push):
        whoami()


def _accelerator(device: str | None) -> Any:
    from accelerate import Accelerator, InitProcessGroupKwargs

    check_device(device)
    # One process may download or convert for hours while the others wait.
    handlers = [InitProcessGroupKwargs(timeout=_PATIENCE)]
    import torch

    if device is None:
        # Without this, processes that torchrun starts on a machine without a GPU are all the first one.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        on_cpu = several and not torch.accelerator.is_available()
        return Accelerator(cpu=on_cpu, kwargs_handlers=handlers)

    wanted = torch.device(device)
    if wanted.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--device {device}: the launcher gives each process a device of its own; leave out the number"
        )
    if wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    accelerator = Accelerator(cpu=wanted.type == "cpu", kwargs_handlers=handlers)
    if accelerator.device.type != wanted.type:
        raise ValueError(f"--device {device} cannot be used: accelerate takes {accelerator.device}")
    return accelerator


def _estimate(
    model: str,
    dataset: str,
    accelerator: Any,
    *,
    open_options: dict[str, Any],
    model_revision: str | None,
    columns: tuple[str | None, str | None],
    image_root: str | None,
    options: dict[str, Any],
) -> BayesVLMPosterior:
    from .estimation import estimate_posterior
    from .sources import find_columns, open_dataset

    # One process fills the caches of downloads and conversions, the others find them full.
    with accelerator.main_process_first():
        opened = open_dataset(dataset, **open_options)
        image_column, text_column = find_columns(opened.dataset, *columns)
        loaded = load_model(model, revision=model_revision)
        processor = load_processor(model, revision=model_revision)
    return estimate_posterior(
        loaded,
        processor,
        opened.dataset,
        accelerator=accelerator,
        image_column=image_column,
        text_column=text_column,
        image_root=image_root if image_root is not None else opened.image_root,
        dataset_name=opened.name,
        dataset_revision=opened.revision,
        revision=model_revision,
        **options,
    )


def _write(
    posterior: BayesVLMPosterior,
    out: Path | None,
    push: str | None,
    private: bool,
    stderr: Console,
) -> None:
    if out is not None:
        posterior.save_pretrained(out)
        size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
        stderr.print(f"wrote {escape(str(out))} ({size / 1e6:.1f} MB)", highlight=False)
    if push is not None:
        try:
            url = posterior.push_to_hub(push, private=private or None)
        except (OSError, ValueError) as error:
            if out is not None:
                raise
            # The work of hours is not to be lost with the connection.
            kept = Path(f"unpublished-{push.replace('/', '--')}")
            posterior.save_pretrained(kept)
            raise OSError(
                f"{error}. The posterior is kept in {kept}: publish it with `bayesvlm push {kept} {push}`"
            ) from error
        stderr.print(f"published {escape(str(url))}", highlight=False)


def _print_summary(posterior: BayesVLMPosterior) -> None:
    notes = posterior.provenance
    table = Table(title="posterior", box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "pairs": f"{posterior.num_pairs:,} in {notes['num_blocks']:,} blocks of {posterior.contrast_size:,}",
        "skipped": f"{notes['num_skipped']:,} of {notes['num_read']:,} rows",
        "image projection": _modality_line(posterior, "image"),
        "text projection": _modality_line(posterior, "text"),
        "objective": f"{posterior.objective}, {posterior.damping} damping",
        "time": f"{notes['seconds']:.1f} s, {posterior.num_pairs / max(notes['seconds'], 1e-9):.0f} pairs/s",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console().print(table)


def _modality_line(posterior: BayesVLMPosterior, name: str) -> str:
    part = getattr(posterior, name)
    features, in_features = part.shape
    return (
        f"{features} x {in_features}, prior precision {part.prior_precision:.6g}, "
        f"pseudo-data count {part.pseudo_data_count:g}"
    )


def _default_workers() -> int:
    return min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
