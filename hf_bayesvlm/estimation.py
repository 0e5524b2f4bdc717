r"""Estimate a posterior from image-text pairs, of any number and in any number of processes.

Pairs are taken in blocks of `contrast_size`.  Within a block every image is contrasted with every text;
the block's inputs and curvature are folded into the Kronecker factors and dropped, so that memory does
not grow with the number of pairs.  Blocks are defined by row numbers alone: neither the number of processes
nor an interruption changes them.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbones import is_watched, unwatch_projections
from .base_access import execution_device
from .block_fold import BlockFolder
from .checkpoint import Checkpoint, Progress
from .cosine import CovarianceForm, Modalities
from .curvature import KroneckerFactors
from .distributed import Ranks
from .estimation_identity import digest_model, digest_processor
from .kronecker import Damping, check_positive
from .laplace import NoMaximumError, Objective, optimize_prior_precision, squared_norm
from .modeling_bayesvlm import BayesVLMForZeroShot
from .pair_blocks import BlockPlan, BlockRun, Sharding, share_data
from .pair_embedding import OnError, PairEmbedder, on_device
from .pairs import Captions, PairColumns
from .posterior import BayesVLMPosterior, ModalityPosterior
from .posterior_files import CHOICES, hub_id
from .slots import SlotReader

logger = logging.get_logger(__name__)

_MIN_PAIRS = 2


def estimate_posterior(
    model: BayesVLMForZeroShot | PreTrainedModel,
    processor: Any,
    dataset: Iterable[Any],
    *,
    image_column: str = "image",
    text_column: str = "text",
    captions: Captions = "sample",
    image_root: str | os.PathLike[str] | None = None,
    contrast_size: int = 32768,
    batch_size: int = 64,
    num_workers: int = 2,
    max_pairs: int | None = None,
    accelerator: Any | None = None,
    sharding: Sharding | None = None,
    dtype: torch.dtype | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    on_error: OnError = "raise",
    max_skipped_share: float = 0.05,
    seed: int = 0,
    pseudo_data_count: float = 1.0,
    objective: Objective | None = None,
    covariance: CovarianceForm = "diagonal",
    damping: Damping = "factored",
    modalities: Modalities = "both",
    base_model: str | None = None,
    revision: str | None = None,
    dataset_name: str | None = None,
    dataset_revision: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> BayesVLMPosterior:
    r"""Estimate the Laplace posterior of a vision-language model from image-text pairs.

    Nothing is trained: one forward pass of both towers over the pairs, and the Gauss-Newton curvature of the
    model's own contrastive loss with respect to its embeddings (arXiv:2412.06014).  The model is not changed.

    In several processes (`accelerate launch`, `torchrun`) each reads its part of every block, the block's
    embeddings are gathered once and every process contrasts its own rows with all of them.

    Args:
        model: A CLIP/SigLIP-like model, or a `BayesVLMForZeroShot` (its posterior is ignored).
        processor: Its processor, with `tokenizer` and `image_processor`.
        dataset: Rows with an image and a text: a `datasets.Dataset`, an `IterableDataset`, or any sequence or
            iterable of mappings.  `open_dataset` opens files and Hub ids.
        image_column: Column of the images (anything `load_rgb_image` takes).
        text_column: Column of the captions, strings or lists of strings.
        captions: `"sample"` takes one of several captions by `seed` and row number, `"expand"` makes a pair of
            each.
        image_root: Folder that relative paths of images start from.
        contrast_size: Pairs that are contrasted with each other; the paper takes 32,768.
        batch_size: Pairs that go through the towers at once.
        num_workers: Threads that read and decode images while the towers run; 0 for none.
        max_pairs: Read this many pairs only.
        accelerator: An `accelerate.Accelerator`; without it, the processes of `torch.distributed` if it is
            initialised.
        sharding: How processes share the data.  `"rows"`: every process sees all rows and takes its part of
            each block, so that the blocks are those of a single process.  `"files"`: each process reads its
            own files of an `IterableDataset`.  `"given"`: each process was passed its own data.  By default
            `"given"` for a data set that was split by node, `"files"` for a stream with at least one file
            a process, else `"rows"`.
        dtype: Precision of the towers, `"bfloat16"` or `"float16"` by autocast; by default that of the model.
            The curvature is computed in float32 and summed in float64 in any case.
        checkpoint_dir: Save the sums here after every block and go on from them when called again.
        on_error: `"raise"` at the first row that is no usable pair, or `"skip"` such rows: they are counted
            and listed in the provenance.
        max_skipped_share: Stop when more than this share of the rows was skipped.
        seed: For the choice among several captions.
        pseudo_data_count: How often the pairs are counted (tau).
        objective: How the prior precisions are chosen, `"reference"` or `"evidence"`.  By default the
            reference, and the evidence (with a warning) where the reference has no maximum, which happens
            for fewer pairs than features; always the evidence for exact damping.
        covariance: `"diagonal"` or `"full"`.
        damping: `"factored"` or `"exact"`.
        modalities: Whose uncertainty counts.
        base_model: Hub id to note as the base; by default the one the model was loaded from.
        revision: Revision of the base to note; by default the commit it was loaded from.
        dataset_name: Name or Hub id of the pairs to note; by default what the data set says of itself.
        dataset_revision: Revision of the pairs to note.
        provenance: Anything else to note about the data.
        progress: Show a progress bar (in the first process).

    Returns:
        The posterior, with the fingerprint of the model's projections; the same in every process.

    Raises:
        ValueError: For fewer than two pairs, a missing column, or impossible settings.
        PairError: For a row that is no usable pair, with its number, unless such rows are skipped.
        TooManyBadRowsError: If more rows were skipped than allowed.
        CheckpointError: If the checkpoint is of another model, data set or setting; it names the difference.
        PeerError: In every process but the one that failed.
    """
    _check_sizes(contrast_size, batch_size, num_workers, max_pairs, max_skipped_share)
    _check_hyperparameters(pseudo_data_count, covariance, damping, modalities, objective)
    columns = PairColumns(
        image_column,
        text_column,
        captions,
        seed,
        None if image_root is None else os.fspath(image_root),
    )
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
    device = None if accelerator is None else torch.device(accelerator.device)
    with _as_bayesian(model) as vlm, on_device(vlm, device):
        ranks = Ranks.of(accelerator, execution_device(vlm.image_projection))

        def prepare() -> tuple[PairEmbedder, Sharding, SlotReader, BlockPlan, BlockFolder]:
            embedder = PairEmbedder(vlm, processor, columns, on_error=on_error, dtype=dtype)
            own_data, how = share_data(dataset, sharding, ranks)
            reader = SlotReader(own_data, columns)
            limit = _limit(max_pairs, reader, how)
            plan = BlockPlan(contrast_size, batch_size, limit, how, ranks)
            return embedder, how, reader, plan, BlockFolder(vlm, plan.capacity, ranks)

        embedder, how, reader, plan, folder = ranks.together(prepare)
        settings = {
            "image_column": image_column,
            "text_column": text_column,
            "captions": captions,
            "seed": seed,
            "contrast_size": contrast_size,
            "batch_size": batch_size,
            "max_pairs": max_pairs,
            "on_error": on_error,
            "tower_dtype": str(embedder.dtype).removeprefix("torch."),
            "sharding": how,
        }
        checkpoint = _checkpoint(checkpoint_dir, vlm, processor, embedder, reader, settings, ranks)
        done = BlockRun(
            reader,
            embedder,
            folder,
            plan,
            num_workers=num_workers,
            checkpoint=checkpoint,
            max_skipped_share=max_skipped_share,
            show_progress=progress,
        ).run()
        if done.num_pairs < _MIN_PAIRS:
            raise ValueError(
                f"the data set gave {done.num_pairs} usable pairs: at least 2 are needed"
            )
        parts, chosen = _modalities(
            vlm, folder.factors(), pseudo_data_count, objective, damping, ranks.is_main
        )
        return BayesVLMPosterior(
            image=parts["image"],
            text=parts["text"],
            likelihood=vlm.likelihood,
            covariance=covariance,
            damping=damping,
            modalities=modalities,
            objective=chosen,
            base_model=base_model or hub_id(vlm.config.vlm_config.name_or_path or vlm.name_or_path),
            revision=revision or _commit(vlm),
            fingerprint=vlm.base_fingerprint(),
            num_pairs=done.num_pairs,
            contrast_size=min(contrast_size, done.num_pairs),
            dataset=dataset_name or _dataset_name(dataset),
            dataset_revision=dataset_revision,
            provenance=_provenance(dataset, settings, done, ranks, reader) | dict(provenance or {}),
        )


def _limit(max_pairs: int | None, reader: SlotReader, sharding: Sharding) -> int | None:
    """Slots that are read in all, where the data have an end that all processes know."""
    if sharding != "rows" or reader.num_slots is None:
        return max_pairs
    return reader.num_slots if max_pairs is None else min(max_pairs, reader.num_slots)


def _checkpoint(
    directory: str | os.PathLike[str] | None,
    model: BayesVLMForZeroShot,
    processor: Any,
    embedder: PairEmbedder,
    reader: SlotReader,
    settings: dict[str, Any],
    ranks: Ranks,
) -> Checkpoint | None:
    """The checkpoint, after all processes have found that they do the same."""
    if directory is None and ranks.world_size == 1:
        return None

    shares_data = settings["sharding"] == "rows"

    def identify() -> dict[str, Any]:
        data = {"rows": reader.num_rows, "fingerprint": reader.fingerprint}
        if directory is not None or shares_data:
            data["sample"] = reader.sample_digest()
        if directory is None:
            return {"model": model.base_fingerprint(), "dataset": data, "settings": settings}
        return {
            "model": {"class": type(model.vlm).__name__, "weights": digest_model(model)},
            "processor": digest_processor(processor, embedder.settings),
            "dataset": data,
            "settings": settings,
        }

    identities = ranks.agree(identify)
    for rank, identity in enumerate(identities):
        compared = identity.keys() if shares_data else identity.keys() - {"dataset"}
        different = [name for name in compared if identity[name] != identities[0][name]]
        if different:
            hint = (
                "; pass sharding='given' if every process got data of its own"
                if different == ["dataset"]
                else ""
            )
            raise ValueError(
                f"process {rank} was started with another {' and '.join(sorted(different))} than process 0{hint}"
            )
    if directory is None:
        return None
    identity = identities[0]
    if not shares_data:
        identity = identity | {"dataset": {str(r): i["dataset"] for r, i in enumerate(identities)}}
    return Checkpoint(directory, identity)


def _check_sizes(
    contrast_size: int,
    batch_size: int,
    num_workers: int,
    max_pairs: int | None,
    max_skipped_share: float,
) -> None:
    if contrast_size < 2:
        raise ValueError(
            f"contrast_size must be at least 2, not {contrast_size}: a pair needs others"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, not {num_workers}")
    if max_pairs is not None and max_pairs < _MIN_PAIRS:
        raise ValueError(f"max_pairs must be at least 2, not {max_pairs}")
    if not 0.0 <= max_skipped_share <= 1.0:
        raise ValueError(f"max_skipped_share must be between 0 and 1, not {max_skipped_share}")


def _check_hyperparameters(
    pseudo_data_count: float,
    covariance: str,
    damping: str,
    modalities: str,
    objective: str | None,
) -> None:
    check_positive("pseudo_data_count", pseudo_data_count)
    for name, value in (
        ("covariance", covariance),
        ("damping", damping),
        ("modalities", modalities),
    ):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    if objective not in (None, "reference", "evidence"):
        raise ValueError(f"objective must be 'reference' or 'evidence', not {objective!r}")
    if objective == "reference" and damping == "exact":
        raise ValueError(
            "the reference objective is defined for factored damping only: "
            "use objective='evidence' with damping='exact'"
        )


@contextmanager
def _as_bayesian(model: BayesVLMForZeroShot | PreTrainedModel) -> Iterator[BayesVLMForZeroShot]:
    """The model itself, or a plain one wrapped for a while and left without a trace."""
    # By what it can do, not by its class: a bundle loaded as remote code has classes of its own.
    if hasattr(model, "encode_image"):
        yield cast(BayesVLMForZeroShot, model)
        return
    was_watched = is_watched(model)
    wrapped = BayesVLMForZeroShot.from_vlm(model)
    try:
        yield wrapped
    finally:
        if not was_watched:
            unwatch_projections(model, wrapped.backbone)


def _modalities(
    model: BayesVLMForZeroShot,
    factors: dict[str, KroneckerFactors],
    pseudo_data_count: float,
    objective: Objective | None,
    damping: Damping,
    may_warn: bool,
) -> tuple[dict[str, ModalityPosterior], Objective]:
    """The parts of the posterior, and the objective their prior precisions were chosen by."""
    weights = model.projection_weights()
    chosen: Objective = objective or ("evidence" if damping == "exact" else "reference")
    try:
        parts = {
            name: _modality(part, weights[name], pseudo_data_count, chosen, damping)
            for name, part in factors.items()
        }
    except NoMaximumError as error:
        if objective is not None or chosen == "evidence":
            raise
        if may_warn:
            logger.warning(
                f"{error}. The prior precisions of this posterior are chosen by objective='evidence'."
            )
        return _modalities(model, factors, pseudo_data_count, "evidence", damping, may_warn)
    return parts, chosen


def _modality(
    factors: KroneckerFactors,
    weight: Tensor,
    pseudo_data_count: float,
    objective: Objective,
    damping: Damping,
) -> ModalityPosterior:
    norm = squared_norm(weight)
    precision = optimize_prior_precision(
        factors.A, factors.B, norm, pseudo_data_count, objective, damping=damping
    )
    return ModalityPosterior(
        A=factors.A.float().cpu(),
        B=factors.B.float().cpu(),
        pseudo_data_count=pseudo_data_count,
        prior_precision=precision,
        weight_norm_squared=norm,
    )


def _commit(model: BayesVLMForZeroShot) -> str | None:
    """The commit of the Hub that a model was loaded from."""
    configs = (model.config.vlm_config, model.config)
    return next((c._commit_hash for c in configs if getattr(c, "_commit_hash", None)), None)


def _dataset_name(dataset: Any) -> str | None:
    return getattr(getattr(dataset, "info", None), "dataset_name", None)


def _provenance(
    dataset: Any, settings: dict[str, Any], done: Progress, ranks: Ranks, reader: SlotReader
) -> dict[str, Any]:
    """How the factors came about, for `posterior_config.json`."""
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    names = ("image_column", "text_column", "captions", "seed", "batch_size", "on_error")
    return {
        **{name: settings[name] for name in (*names, "tower_dtype", "sharding")},
        "dataset_config": getattr(info, "config_name", None),
        "dataset_split": None if split is None else str(split),
        "dataset_fingerprint": reader.fingerprint if isinstance(dataset, Dataset) else None,
        "num_blocks": done.num_blocks,
        "num_read": done.num_slots,
        "num_dropped": done.dropped_pairs,
        "num_skipped": done.skipped_rows,
        "skipped": done.skipped_examples,
        "num_processes": ranks.world_size,
        "seconds": round(done.seconds, 3),
        "finished_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
