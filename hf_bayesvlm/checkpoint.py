"""Progress of an estimation on disk: one file, replaced as a whole after every block."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

CHECKPOINT_NAME = "progress.safetensors"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used for this run."""


@dataclass
class Progress:
    """What has been folded in so far.

    Attributes:
        next_block: Number of the block that comes next.
        num_pairs: Pairs in the sums.
        num_blocks: Blocks in the sums.
        num_slots: (row, caption) pairs that were read, usable or not.
        dropped_pairs: Usable pairs that were alone in their block.
        skipped_rows: Rows that could not be used.
        skipped_examples: Why, for the first of them.
        positions: Where each process had read its stream to.
        seconds: Time spent, over all runs.
        complete: Whether the data have come to their end.
    """

    next_block: int = 0
    num_pairs: int = 0
    num_blocks: int = 0
    num_slots: int = 0
    dropped_pairs: int = 0
    skipped_rows: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    positions: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False


class Checkpoint:
    """Saves and restores the sums and the progress of one estimation.

    Args:
        folder: Where to keep the file; made if needed.
        identity: Everything that the result depends on, as JSON values.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; give a folder for checkpoints")
        self.file = self.folder / CHECKPOINT_NAME
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """What an earlier run has saved.

        Returns:
            Its progress and sums, or None if there is none.

        Raises:
            CheckpointError: If the file is damaged, or of a run with another model, data set or setting.
        """
        if not self.file.is_file():
            return None
        try:
            with safe_open(str(self.file), framework="pt") as stored:
                metadata = stored.metadata() or {}
                sums = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            identity = json.loads(metadata["identity"])
            written_by, digest = int(metadata["format"]), metadata["digest"]
            values = json.loads(metadata["progress"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.file} is not a checkpoint of an estimation ({error}): delete it to start again"
            ) from error
        if written_by != _FORMAT:
            raise CheckpointError(
                f"{self.file} was written by another version of hf_bayesvlm: delete it to start again"
            )
        if digest != _digest(metadata["identity"], metadata["progress"], sums):
            raise CheckpointError(f"{self.file} is damaged: delete it to start again")
        self._check_identity(identity)
        return Progress(**values), sums

    def save(self, progress: Progress, sums: dict[str, Tensor]) -> None:
        """Replace the file, so that a reader finds the old or the new one and nothing between.

        Args:
            progress: The progress.
            sums: The sums it is about.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in sums.items()}
        identity, values = json.dumps(self.identity), json.dumps(asdict(progress))
        metadata = {
            "format": str(_FORMAT),
            "identity": identity,
            "progress": values,
            "digest": _digest(identity, values, tensors),
        }
        temporary = self.file.with_suffix(".tmp")
        try:
            with temporary.open("wb") as stream:
                stream.write(save(tensors, metadata=metadata))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.file)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.folder)

    def _check_identity(self, found: dict[str, Any]) -> None:
        wanted = _flat(self.identity)
        stored = _flat(found)
        different = [
            f"{name} was {stored.get(name)!r} and is {wanted.get(name)!r}"
            for name in sorted(wanted.keys() | stored.keys())
            if wanted.get(name) != stored.get(name)
        ]
        if different:
            raise CheckpointError(
                f"{self.file} belongs to another estimation: {'; '.join(different)}. Resume with what it was "
                "started with, or give another checkpoint folder"
            )


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _digest(identity: str, progress: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{identity}\n{progress}".encode())
    for name in sorted(tensors):
        digest.update(f"\n{name}:{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where folders can be synchronised."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
