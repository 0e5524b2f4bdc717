"""Run by tests under a launcher: estimates posteriors in several processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from PIL import Image
from tiny import tiny_image_processor, tiny_tokenizer, tiny_vlm

from hf_bayesvlm import BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.distributed import PeerError
from hf_bayesvlm.pairs import PairError

OPTIONS: dict[str, Any] = {"batch_size": 4, "progress": False, "objective": "evidence"}
UNEVEN_FILES = (9, 2, 6)


class Processor:
    """Tokenizer and image processor, as a processor has them."""

    def __init__(self, family: str = "clip") -> None:
        self.tokenizer = tiny_tokenizer()
        self.image_processor = tiny_image_processor(family)


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of noise and numbers."""
    rng = np.random.default_rng(0)
    return [
        {
            "image": Image.fromarray(rng.integers(0, 256, (34, 34, 3), dtype=np.uint8)),
            "text": f"a photo of a cat {i}",
        }
        for i in range(count)
    ]


def _files(sizes: tuple[int, ...]) -> IterableDataset:
    """A stream of several files."""
    rows = pairs(sum(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def generate(files: list[int]) -> Iterator[dict[str, Any]]:
        for i in files:
            yield from rows[starts[i] : starts[i + 1]]

    return IterableDataset.from_generator(generate, gen_kwargs={"files": list(range(len(sizes)))})


def healthy(out: Path, accelerator: Accelerator) -> None:
    """What is compared with a single process."""
    rank = accelerator.process_index
    rows = pairs(45)
    skipped = [dict(row) for row in rows]
    skipped[3]["text"], skipped[44]["image"] = "", b"broken"
    cases: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "clip": ("clip", Dataset.from_list(rows), {"contrast_size": 16}),
        "siglip": ("siglip", rows, {"contrast_size": 45}),
        "stream": ("clip", iter(rows), {"contrast_size": 16, "sharding": "rows"}),
        "skipped": ("clip", skipped, {"contrast_size": 16, "on_error": "skip"}),
        "checkpoint": ("clip", rows, {"contrast_size": 16, "checkpoint_dir": out / "checkpoint"}),
        "files": ("clip", _files(UNEVEN_FILES), {"contrast_size": 8}),
        "double": ("clip", pairs(8) if rank == 0 else [], {"sharding": "given"}),
        "given": ("clip", pairs(11) if rank == 0 else [], {"sharding": "given"}),
    }
    for name, (family, data, options) in cases.items():
        posterior = estimate_posterior(
            tiny_vlm(family).double() if name == "double" else tiny_vlm(family),
            Processor(family),
            data,
            accelerator=accelerator,
            **OPTIONS | {"contrast_size": 4} | options,
        )
        assert posterior.provenance["num_processes"] == accelerator.num_processes
        # Every process has the whole result.
        posterior.save_pretrained(out / f"{name}-{rank}")


def failing(accelerator: Accelerator) -> None:
    """One process meets a bad row; no other may wait for it."""
    rows = pairs(40)
    rows[38]["text"] = ""
    estimate_posterior(
        tiny_vlm(), Processor(), rows, accelerator=accelerator, contrast_size=20, **OPTIONS
    )


def different(accelerator: Accelerator) -> None:
    """The processes were given different data by mistake."""
    rows = pairs(20)
    rows[7]["text"] += " again" * accelerator.process_index
    estimate_posterior(
        tiny_vlm(), Processor(), rows, accelerator=accelerator, contrast_size=20, **OPTIONS
    )


class Interrupted(list[dict[str, Any]]):
    """Rows of which one cannot be read this time; it is none of those that tell data sets apart."""

    ROW = 40

    def __getitem__(self, index: Any) -> Any:
        if index == self.ROW:
            raise OSError("the disk is gone")
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def resumable(out: Path, accelerator: Accelerator | None, rows: Any) -> dict[str, Any]:
    """Estimations over rows by number and as a stream, with checkpoints."""
    results: dict[str, Any] = {}
    for name, data in (("numbered", rows), ("streamed", (row for row in rows))):
        try:
            results[name] = estimate_posterior(
                tiny_vlm(),
                Processor(),
                data,
                accelerator=accelerator,
                sharding="rows",
                contrast_size=9,
                checkpoint_dir=out / name,
                **OPTIONS,
            )
        except (PairError, PeerError, OSError) as error:
            results[name] = error
    return results


def interrupted(out: Path, accelerator: Accelerator) -> None:
    """Two blocks of each are missing when this ends."""
    for error in resumable(out, accelerator, Interrupted(pairs(45))).values():
        assert isinstance(error, Exception), "it was to be interrupted"


def resumed(out: Path, accelerator: Accelerator) -> None:
    """The rest of them, by any number of processes."""
    for name, posterior in resumable(out, accelerator, pairs(45)).items():
        posterior.save_pretrained(out / f"{name}-{accelerator.process_index}")


def killed(accelerator: Accelerator) -> None:
    """One process dies without a word."""

    def rows() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(pairs(64)):
            if accelerator.process_index == 1 and i == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    estimate_posterior(
        tiny_vlm(),
        Processor(),
        rows(),
        accelerator=accelerator,
        contrast_size=8,
        sharding="rows",
        num_workers=0,
        **OPTIONS,
    )


def main() -> None:
    """Run one of the above."""
    accelerator = Accelerator()
    what, out = sys.argv[1], Path(sys.argv[2])
    try:
        if what in ("healthy", "interrupted", "resumed"):
            {"healthy": healthy, "interrupted": interrupted, "resumed": resumed}[what](
                out, accelerator
            )
        else:
            {"failing": failing, "different": different, "killed": killed}[what](accelerator)
    finally:
        accelerator.end_training()


def load(out: Path, name: str, rank: int = 0) -> BayesVLMPosterior:
    """What a process has saved."""
    return BayesVLMPosterior.from_pretrained(out / f"{name}-{rank}")


if __name__ == "__main__":
    main()
