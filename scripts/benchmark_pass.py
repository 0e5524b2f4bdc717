"""One pass over random pairs, in a process of its own: its seconds and its peak memory.

    python scripts/benchmark_pass.py ours --pairs 32768 --contrast 8192 --features 512 --in-features 768

prints one line of JSON.  A high-water mark of memory only ever rises, so each pass needs a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_common import textbook_ggn

from hf_bayesvlm.curvature import CurvatureAccumulator

LOGIT_SCALE = 100.0
# Puts the cosine of a matching pair near 0.3, as in CLIP, and that of others near 0.
_PULL = 0.3
# Enough to start the threads and the libraries' own buffers, which are no part of a pass.
_FIRST_ROWS = 64


@dataclass(frozen=True)
class PassResult:
    """What one pass took.

    Attributes:
        pairs: Pairs (for the textbook formula: rows of one modality).
        block_seconds: Seconds of each block; making up the random pairs is not counted.
        peak_mib: Peak of the resident memory over what was there before the pass, which held the inputs
            of one block, in MiB.
    """

    pairs: int
    block_seconds: tuple[float, ...]
    peak_mib: float

    @property
    def seconds(self) -> float:
        """Seconds of all blocks."""
        return sum(self.block_seconds)


class RandomPairs:
    """Random embeddings of one block of pairs, refilled in place.

    Args:
        pairs: Pairs in the block.
        features: Size of the embeddings, `D`.
        in_features: Size of the projections' inputs, `K`.
        seed: Of the generator.
    """

    def __init__(self, pairs: int, features: int, in_features: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.inputs = {name: torch.empty(pairs, in_features) for name in ("image", "text")}
        self.means = {name: torch.empty(pairs, features) for name in ("image", "text")}
        self.refill()

    def refill(self) -> None:
        """Replace the block by the next one."""
        for tensor in (*self.inputs.values(), *self.means.values()):
            tensor.normal_(generator=self._generator)
        self.means["text"].add_(self.means["image"], alpha=_PULL)


def accumulators() -> dict[str, CurvatureAccumulator]:
    """One accumulator a modality."""
    return {name: CurvatureAccumulator("softmax", LOGIT_SCALE) for name in ("image", "text")}


def fold(
    sums: dict[str, CurvatureAccumulator], block: RandomPairs, rows: int | None = None
) -> None:
    """Fold the first rows of a block, contrasted with the whole block, into the accumulators."""
    for name, other in (("image", "text"), ("text", "image")):
        if name in sums:
            sums[name].update(
                block.inputs[name][:rows], block.means[name][:rows], block.means[other]
            )


def resident_bytes() -> int:
    """Resident memory now; where the system does not tell, its high-water mark."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_bytes()
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """High-water mark of the resident memory of this process."""
    # Not `ru_maxrss` where it can be helped: on Linux it starts at the mark of the parent process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def pass_of_ours(
    pairs: int, contrast: int, features: int, in_features: int, *, both: bool = True
) -> PassResult:
    """Fold pairs, block by block, into the factors of both modalities (or of the image's alone)."""
    block = RandomPairs(min(contrast, pairs), features, in_features)
    sums = accumulators()
    if not both:
        del sums["text"]
    fold(accumulators(), block, _FIRST_ROWS)
    before = resident_bytes()
    if both:
        # The first block is slow, which would weigh more on few blocks than on many.
        fold(accumulators(), block)
    seconds: list[float] = []
    for start in range(0, pairs, contrast):
        if start:
            block.refill()
        # The last block may be short, as in estimation.
        step = min(contrast, pairs - start)
        if step < len(block.means["image"]):
            block = RandomPairs(step, features, in_features, seed=1)
        seconds.append(_seconds(lambda block=block: fold(sums, block)))  # type: ignore[misc]
    counted = {accumulator.num_pairs for accumulator in sums.values()}
    if counted != {pairs}:
        raise RuntimeError(f"{counted} pairs were counted instead of {pairs}")
    return PassResult(pairs, tuple(seconds), (peak_bytes() - before) / 2**20)


def pass_of_textbook(rows: int, contrast: int, features: int, in_features: int) -> PassResult:
    """The textbook formula on one batch of rows of one modality."""
    block = RandomPairs(contrast, features, in_features)
    textbook_ggn(block.means["image"][:1, :8], block.means["text"][:, :8], LOGIT_SCALE)
    before = resident_bytes()
    seconds = _seconds(
        lambda: textbook_ggn(block.means["image"][:rows], block.means["text"], LOGIT_SCALE, rows)
    )
    return PassResult(rows, (seconds,), (peak_bytes() - before) / 2**20)


def run_pass(
    kind: str, pairs: int, contrast: int, features: int, in_features: int, *, both: bool = True
) -> PassResult:
    """Run one pass in a fresh process.

    Args:
        kind: `"ours"` or `"textbook"`.
        pairs: Pairs, or rows of the textbook formula.
        contrast: Contrast size.
        features: Embedding size.
        in_features: Inputs of the projections.
        both: Both modalities or the image's alone.

    Returns:
        What it took.

    Raises:
        RuntimeError: If the process fails.
    """
    command = [sys.executable, str(Path(__file__).resolve()), kind, "--pairs", str(pairs)]
    command += ["--contrast", str(contrast), "--features", str(features)]
    command += ["--in-features", str(in_features)]
    if not both:
        command.append("--image-only")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    values: dict[str, Any] = json.loads(done.stdout)
    return PassResult(values["pairs"], tuple(values["block_seconds"]), values["peak_mib"])


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("ours", "textbook"))
    for name in ("pairs", "contrast", "features", "in-features"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--image-only", action="store_true", help="one modality")
    options = parser.parse_args(arguments)
    sizes = (options.pairs, options.contrast, options.features, options.in_features)
    if options.kind == "textbook":
        result = pass_of_textbook(*sizes)
    else:
        result = pass_of_ours(*sizes, both=not options.image_only)
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
