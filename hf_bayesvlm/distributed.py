"""Processes that estimate one posterior together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process failed; its own message is part of this one."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        device: Where this process communicates; None for a single one.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None

    @classmethod
    def of(cls, accelerator: Any | None, device: torch.device) -> Ranks:
        """The processes of an `accelerate.Accelerator`, or of `torch.distributed`, or this one alone.

        Args:
            accelerator: From the caller, if there is one.
            device: Where the model computes.

        Returns:
            The processes.

        Raises:
            ValueError: If several processes were launched that `torch.distributed` does not connect.
        """
        connected = dist.is_available() and dist.is_initialized()
        if accelerator is not None and accelerator.num_processes > 1 and not connected:
            raise ValueError(
                f"{accelerator.num_processes} processes that torch.distributed does not connect "
                f"({accelerator.distributed_type}) cannot estimate together: use gloo or nccl"
            )
        if not connected or dist.get_world_size() == 1:
            return cls()
        if dist.get_backend() == "nccl" and device.type != "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """This process's part of `count` consecutive things: first, and the one after the last."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def agree(self, work: Callable[[], T]) -> list[T]:
        """Do something in every process and tell the others the outcome; no one goes on alone.

        Args:
            work: Something that may fail and has no communication in it.

        Returns:
            Every process's result, in order.

        Raises:
            PeerError: If it failed elsewhere.  Where it failed, its own error is raised.
        """
        return self._run(work, lambda result: result)[1]

    def together(self, work: Callable[[], T]) -> T:
        """As `agree`, for results that are not sent around.

        Args:
            work: Something that may fail and has no communication in it.

        Returns:
            This process's result.

        Raises:
            PeerError: If it failed elsewhere.
        """
        return self._run(work, lambda result: None)[0]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all processes, in the order of the processes.

        Args:
            rows: This process's rows, `[counts[rank], features]`.
            counts: Number of rows of every process.

        Returns:
            `[sum(counts), features]`.
        """
        if self.world_size == 1:
            return rows
        device = self.device or rows.device
        padded = rows.new_zeros((max(counts), rows.shape[1]), device=device)
        padded[: rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        return torch.cat(parts).to(rows.device)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device or tensor.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def _run(self, work: Callable[[], T], told: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Own result, and what every process tells of its own."""
        if self.world_size == 1:
            result = work()
            return result, [told(result)]
        try:
            result = work()
        except Exception as error:
            self._exchange((f"{type(error).__name__}: {error}", None))
            raise
        outcomes = self._exchange((None, told(result)))
        for rank, (error_text, _) in enumerate(outcomes):
            if error_text is not None:
                raise PeerError(f"process {rank} of {self.world_size} failed: {error_text}")
        return result, [outcome for _, outcome in outcomes]

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        on_cuda = self.device is not None and self.device.type == "cuda"
        # NCCL sends from the current device, which need not be the one that the model was put on.
        with torch.cuda.device(self.device) if on_cuda else nullcontext():
            dist.all_gather_object(values, value)
        return values
