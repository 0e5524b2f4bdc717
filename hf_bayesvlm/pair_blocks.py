"""The run over a data set: blocks of pairs read, embedded, folded and saved, in one process or many."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from datasets import IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .block_fold import BlockFolder
from .checkpoint import Checkpoint, Progress
from .distributed import Ranks
from .pair_embedding import PairEmbedder, PreparedPairs, ahead
from .pairs import Slot
from .slots import SlotReader

logger = logging.get_logger(__name__)

Sharding = Literal["rows", "files", "given"]
# Sentences about skipped rows that are kept.
MAX_EXAMPLES = 50
# Slots after which the share of skipped rows means something.
_ENOUGH_SLOTS = 1000


class TooManyBadRowsError(ValueError):
    """More rows of the data set are unusable than the caller allows."""


@dataclass(frozen=True)
class BlockPlan:
    """Which slots this process reads for each block.

    With `"rows"` a block is a run of `contrast_size` slots of the data set, whatever the number of processes.
    With `"files"` and `"given"` every process has data of its own and brings its part of each block.

    Attributes:
        contrast_size: Slots of a block.
        batch_size: Slots that go through the towers at once.
        limit: Slots that are read in all, or None for no limit.
        sharding: How the data are shared.
        ranks: The processes.

    Raises:
        ValueError: If a process has data of its own and no part of a block.
    """

    contrast_size: int
    batch_size: int
    limit: int | None
    sharding: Sharding
    ranks: Ranks

    def __post_init__(self) -> None:
        if self.sharding != "rows" and self.contrast_size < self.ranks.world_size:
            raise ValueError(
                f"contrast_size={self.contrast_size} leaves some of {self.ranks.world_size} processes without a "
                "pair in any block: their data would never be read"
            )

    def window(self, block: int) -> tuple[int, int]:
        """First slot of this process in a block, and the one after its last; equal beyond the limit."""
        if self.sharding == "rows":
            start = block * self.contrast_size
            size = self.contrast_size
            if self.limit is not None:
                size = max(0, min(size, self.limit - start))
            low, high = self.ranks.share(size)
            return start + low, start + high
        quota = _size(self.ranks.share(self.contrast_size))
        stop = (block + 1) * quota
        if self.limit is not None:
            stop = min(stop, _size(self.ranks.share(self.limit)))
        return min(block * quota, stop), stop

    def is_past_end(self, block: int) -> bool:
        """Whether the limit ends before a block."""
        if self.limit is None:
            return False
        if self.sharding == "rows":
            return block * self.contrast_size >= self.limit
        start, stop = self.window(block)
        return start == stop

    @property
    def capacity(self) -> int:
        """Most slots of a block that this process reads."""
        if self.sharding == "rows" and self.limit is not None:
            return max(1, -(-min(self.contrast_size, self.limit) // self.ranks.world_size))
        return max(1, -(-self.contrast_size // self.ranks.world_size))


def share_data(
    dataset: Iterable[Any], sharding: Sharding | None, ranks: Ranks
) -> tuple[Iterable[Any], Sharding]:
    """What this process reads, and how the data are shared.

    Args:
        dataset: What the caller passed.
        sharding: What the caller asked for; None to choose.
        ranks: The processes.

    Returns:
        The data set, or this process's files of it, and the way of sharing.

    Raises:
        ValueError: For an unknown way, or files that are fewer than the processes.
    """
    if sharding not in (None, "rows", "files", "given"):
        raise ValueError(f"sharding must be 'rows', 'files' or 'given', not {sharding!r}")
    if ranks.world_size == 1:
        return dataset, "rows"
    files = dataset.num_shards if isinstance(dataset, IterableDataset) else 0
    if sharding is None:
        split_by_node = getattr(dataset, "_distributed", None) is not None
        sharding = "given" if split_by_node else "files" if files >= ranks.world_size else "rows"
    if sharding != "files":
        return dataset, sharding
    if not isinstance(dataset, IterableDataset) or files < ranks.world_size:
        raise ValueError(
            f"sharding='files' needs a stream of at least {ranks.world_size} files, one a process; this data "
            f"set has {files or 'none'}: use sharding='rows'"
        )
    return dataset.shard(ranks.world_size, ranks.rank), sharding


@dataclass(frozen=True)
class _EndOfBlock:
    """Follows the batches of a block.

    Attributes:
        position: Where the reader stands.
        finished: Whether this process has nothing more to read.
    """

    position: dict[str, Any]
    finished: bool


@dataclass(frozen=True)
class _OwnBlock:
    """What a process tells the others of its part of a block."""

    num_slots: int
    num_pairs: int
    num_skipped: int
    bad_rows: list[str]
    position: dict[str, Any]
    finished: bool


class BlockRun:
    """Reads, embeds and folds all blocks.

    Args:
        reader: The data.
        embedder: The towers.
        folder: The sums.
        plan: Who reads what.
        num_workers: Threads that decode ahead of the towers.
        checkpoint: Where to save after every block, if anywhere.
        max_skipped_share: Share of unusable rows above which the run stops.
        show_progress: Show a progress bar, in the first process.
    """

    def __init__(
        self,
        reader: SlotReader,
        embedder: PairEmbedder,
        folder: BlockFolder,
        plan: BlockPlan,
        *,
        num_workers: int,
        checkpoint: Checkpoint | None,
        max_skipped_share: float,
        show_progress: bool,
    ) -> None:
        self.reader = reader
        self.embedder = embedder
        self.folder = folder
        self.plan = plan
        self.ranks = plan.ranks
        self.num_workers = num_workers
        self.checkpoint = checkpoint
        self.max_skipped_share = max_skipped_share
        self.show_progress = show_progress and self.ranks.is_main
        self.progress = Progress()

    def run(self) -> Progress:
        """Do all the work that no earlier run has done.

        Returns:
            What was done, over all runs; the sums are in the folder.

        Raises:
            PairError: At an unusable row, unless they are skipped.
            TooManyBadRowsError: If too many are skipped.
            CheckpointError: If the checkpoint belongs to another run.
            PeerError: If another process failed.
        """
        # One process reads and tells the others: their disks may not have the file.
        found = self.ranks.agree(self._found)[0]
        self.ranks.together(lambda: self._resume(found))
        if self.progress.complete:
            self._check_skipped()
            return self.progress
        began, before = time.monotonic(), self.progress.seconds
        items = ahead(self._prepare, self._raw_items(self.progress.next_block), self.num_workers)
        total = self.plan.limit if self.reader.num_slots is None else self.reader.num_slots
        if total is not None and self.plan.limit is not None:
            total = min(total, self.plan.limit)
        with (
            closing(items),  # type: ignore[type-var]
            tqdm(
                total=total,
                initial=self.progress.num_slots,
                unit="pair",
                disable=not self.show_progress,
            ) as bar,
        ):
            finished = False
            while not self.progress.complete:
                blocks = self.ranks.agree(lambda: self._read_block(items, bar, finished))  # noqa: B023
                finished = finished or blocks[self.ranks.rank].finished
                self._fold(blocks)
                self.progress.seconds = before + time.monotonic() - began
                bar.n = self.progress.num_slots
                bar.refresh()
                self.ranks.together(self._save)
                self._check_skipped()
        return self.progress

    def _found(self) -> tuple[Progress, dict[str, Tensor]] | None:
        if self.checkpoint is None or not self.ranks.is_main:
            return None
        return self.checkpoint.load()

    def _resume(self, found: tuple[Progress, dict[str, Tensor]] | None) -> None:
        if found is None:
            return
        self.progress, sums = found
        self.folder.restore(sums, self.progress.num_pairs)
        if self.ranks.is_main:
            state = "complete" if self.progress.complete else "resumed"
            logger.warning(
                f"The estimation in {self.checkpoint.folder} is {state}: "  # type: ignore[union-attr]
                f"{self.progress.num_pairs} pairs of {self.progress.num_blocks} blocks are done."
            )
        positions = self.progress.positions
        # With another number of processes the first read goes through the rows that were used.
        if len(positions) == self.ranks.world_size and not self.progress.complete:
            self.reader.seek(positions[self.ranks.rank])

    def _raw_items(self, first_block: int) -> Iterator[list[Slot] | _EndOfBlock]:
        """Batches of slots, block after block, each block closed by where the reader stands then."""
        for block in itertools.count(first_block):
            start, stop = self.plan.window(block)
            slots = self.reader.read(start, stop)
            taken = 0
            while batch := list(itertools.islice(slots, self.plan.batch_size)):
                taken += len(batch)
                yield batch
            finished = taken < stop - start or self.plan.is_past_end(block + 1)
            yield _EndOfBlock(self.reader.position(), finished)
            if finished:
                return

    def _prepare(self, item: list[Slot] | _EndOfBlock) -> PreparedPairs | _EndOfBlock:
        return item if isinstance(item, _EndOfBlock) else self.embedder.prepare(item)

    def _read_block(
        self, items: Iterator[PreparedPairs | _EndOfBlock], bar: Any, finished: bool
    ) -> _OwnBlock:
        """This process's part of the next block, collected in the folder."""
        num_slots, bad_rows = 0, []
        end = _EndOfBlock({}, finished=True)
        for item in () if finished else items:
            if isinstance(item, _EndOfBlock):
                end = item
                break
            if item.texts:
                self.folder.append(*self.embedder.embed(item))
            bad_rows += item.bad_rows
            num_slots += len(item.texts) + len(item.bad_rows)
            bar.update((len(item.texts) + len(item.bad_rows)) * self.ranks.world_size)
        return _OwnBlock(
            num_slots=num_slots,
            num_pairs=len(self.folder),
            num_skipped=len(bad_rows),
            bad_rows=bad_rows[:MAX_EXAMPLES],
            position=end.position,
            finished=end.finished,
        )

    def _fold(self, blocks: list[_OwnBlock]) -> None:
        progress = self.progress
        counts = [block.num_pairs for block in blocks]
        if sum(counts) >= 2:
            self.folder.fold(counts)
            progress.num_blocks += 1
        else:
            self.folder.discard()
            progress.dropped_pairs += sum(counts)
            if sum(counts) and self.ranks.is_main:
                logger.warning(
                    "A pair is dropped: it is alone in its block, with nothing to contrast it with."
                )
        progress.num_pairs = self.folder.num_pairs
        progress.num_slots += sum(block.num_slots for block in blocks)
        progress.skipped_rows += sum(block.num_skipped for block in blocks)
        for rank, block in enumerate(blocks):
            which = f"process {rank}, " if self.plan.sharding != "rows" else ""
            progress.skipped_examples += [which + reason for reason in block.bad_rows]
        del progress.skipped_examples[MAX_EXAMPLES:]
        before = (
            progress.positions if len(progress.positions) == len(blocks) else [{}] * len(blocks)
        )
        progress.positions = [
            block.position or old for block, old in zip(blocks, before, strict=True)
        ]
        progress.next_block += 1
        # Of rows that all processes see, the end is one for all: who has no part of a block does not see it.
        ended = any if self.plan.sharding == "rows" else all
        progress.complete = ended(block.finished for block in blocks)

    def _save(self) -> None:
        if self.checkpoint is not None and self.ranks.is_main:
            self.checkpoint.save(self.progress, self.folder.sums())

    def _check_skipped(self) -> None:
        progress = self.progress
        if not progress.skipped_rows or (
            progress.num_slots < _ENOUGH_SLOTS and not progress.complete
        ):
            return
        if progress.skipped_rows > self.max_skipped_share * progress.num_slots:
            examples = "; ".join(progress.skipped_examples[:3])
            raise TooManyBadRowsError(
                f"{progress.skipped_rows} of {progress.num_slots} rows cannot be used, more than the share of "
                f"{self.max_skipped_share:g} that is allowed (max_skipped_share). The first: {examples}"
            )


def _size(window: tuple[int, int]) -> int:
    return window[1] - window[0]
