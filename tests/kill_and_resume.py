"""Run by a test: an estimation that is killed again and again, and one that is not.

The children are forked from a process that has imported everything and computed nothing, so that a kill hits
the estimation and not the imports.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from estimation_worker import OPTIONS, Processor, pairs
from tiny import tiny_vlm

from hf_bayesvlm import estimate_posterior
from hf_bayesvlm.checkpoint import CHECKPOINT_NAME

NUM_PAIRS = 240
CONTRAST_SIZE = 8


def estimate(out: Path, checkpoint_dir: Path | None, pause: float) -> None:
    """The estimation; slow enough to be killed in the middle."""

    def rows() -> Iterator[dict[str, Any]]:
        for row in pairs(NUM_PAIRS):
            time.sleep(pause)
            yield row

    posterior = estimate_posterior(
        tiny_vlm(),
        Processor(),
        rows(),
        contrast_size=CONTRAST_SIZE,
        checkpoint_dir=checkpoint_dir,
        **OPTIONS,
    )
    posterior.save_pretrained(out)


def forked(out: Path, checkpoint_dir: Path | None, pause: float) -> int:
    """The estimation in a child; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            estimate(out, checkpoint_dir, pause)
            code = 0
        finally:
            os._exit(code)
    return child


def _stamp(checkpoint_dir: Path) -> int | None:
    file = checkpoint_dir / CHECKPOINT_NAME
    return file.stat().st_mtime_ns if file.exists() else None


def main() -> None:
    """Print how often the estimation was killed."""
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    moments = random.Random(seed)
    checkpoint_dir, kills = root / "checkpoint", 0
    while kills < 6:
        before = _stamp(checkpoint_dir)
        child = forked(root / "resumed", checkpoint_dir, 0.01)
        # At a random moment after it has got on, however slow the machine is.
        while _stamp(checkpoint_dir) == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.3))
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            break
        if not os.WIFSIGNALED(status):
            break
        kills += 1
    assert (checkpoint_dir / CHECKPOINT_NAME).exists(), "no block was finished before the kills"
    for name, folder in (("resumed", checkpoint_dir), ("uninterrupted", None)):
        _, status = os.waitpid(forked(root / name, folder, 0.0), 0)
        assert status == 0, name
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    main()
