"""What the benchmarks share: timing in turn, the machine's description, tables, the textbook formula."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


def interleaved(
    first: Callable[[], Any], second: Callable[[], Any], runs: int
) -> tuple[float, float]:
    """Median seconds of two functions that are timed in turn, after one run of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for function, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if run:
                record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def textbook_ggn(source: Tensor, target: Tensor, scale: float, chunk: int = 4) -> Tensor:
    """The batched formula as written: one [features, features] matrix a row."""
    target = torch.nn.functional.normalize(target, dim=1)
    eye = torch.eye(source.shape[1], dtype=source.dtype)
    total = torch.zeros_like(eye)
    for rows in source.split(chunk):
        norms = rows.norm(dim=1)[:, None]
        unit = rows / norms
        jacobian = (eye - unit[:, :, None] * unit[:, None, :]) / norms[:, :, None]
        probs = (scale * unit @ target.T).softmax(dim=1)
        mean = probs @ target
        inner = (probs[:, :, None] * target).mT @ target - mean[:, :, None] * mean[:, None, :]
        total += (scale**2 * jacobian @ inner @ jacobian).sum(dim=0)
    return total


def processor_name() -> str:
    """Name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": processor_name(),
    }


def print_rows(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 0
) -> None:
    """Print a table; the first `texts` columns are text, the others are numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < texts else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report, together with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(machine() | report, indent=2) + "\n", encoding="utf-8")
