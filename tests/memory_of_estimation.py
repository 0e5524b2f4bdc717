"""Run by a test: peak memory of estimations of different length, in MB, as JSON.

Each is measured in a child of its own, forked from a process that has imported everything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from estimation_worker import Processor
from tiny import tiny_vlm

from hf_bayesvlm import estimate_posterior

CONTRAST_SIZE = 512


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Noise with a number."""
    rng = np.random.default_rng(0)
    for i in range(count):
        yield {"image": rng.integers(0, 256, (34, 34, 3), dtype=np.uint8), "text": f"noise {i}"}


def measure(count: int) -> float:
    """Peak memory in MB of an estimation from `count` pairs; of the model alone for none."""
    torch.set_num_threads(1)
    model, processor = tiny_vlm(), Processor()
    if count:
        estimate_posterior(
            model, processor, rows(count), contrast_size=CONTRAST_SIZE, progress=False
        )
    return _peak()


def _peak() -> float:
    # The resource usage of a child starts at the mark of its parent on Linux; this is its own.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    """Measure the sizes that are given."""
    peaks = {}
    for count in map(int, sys.argv[1:]):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, str(measure(count)).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        peaks[count] = float(os.read(reading, 64))
    sys.stdout.write(json.dumps(peaks))


if __name__ == "__main__":
    main()
