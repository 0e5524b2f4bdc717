"""Image-text pairs through the two towers, with decoding in threads ahead of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .base_access import evaluation_mode, execution_device
from .label_cache import tokenizer_settings
from .modeling_bayesvlm import BayesVLMForZeroShot
from .pairs import PairColumns, PairError, Slot

OnError = Literal["raise", "skip"]
TowerDtype = Literal["float32", "float16", "bfloat16"]
S = TypeVar("S")
T = TypeVar("T")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PreparedPairs:
    """A batch of pairs, decoded and preprocessed.

    Attributes:
        texts: Captions of the usable pairs.
        pixels: Arguments of the image tower for them, on the CPU; None if there are none.
        bad_rows: Why the other slots cannot be used, one sentence each, by row.
    """

    texts: list[str]
    pixels: Any | None
    bad_rows: list[str]


class PairEmbedder:
    """Turns slots into embeddings and projection inputs, without uncertainty.

    Args:
        model: The model.
        processor: Its processor, with `tokenizer` and `image_processor`.
        columns: Where rows keep their pairs.
        on_error: `"raise"` at the first slot that is no pair, or `"skip"` it.
        dtype: Precision of the towers by autocast; None for the precision the model is loaded in.

    Raises:
        ValueError: If the processor lacks a part, or the precision is not possible for the model.
    """

    def __init__(
        self,
        model: BayesVLMForZeroShot,
        processor: Any,
        columns: PairColumns,
        *,
        on_error: OnError = "raise",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        lacking = [
            n for n in ("tokenizer", "image_processor") if getattr(processor, n, None) is None
        ]
        if lacking:
            raise ValueError(
                f"the processor ({type(processor).__name__}) has no {' and no '.join(lacking)}: load it with "
                "AutoProcessor.from_pretrained()"
            )
        self.model = model
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.columns = columns
        self.on_error = on_error
        self.dtype = tower_dtype(dtype, model)
        self.settings = tokenizer_settings(model, self.tokenizer)
        self.device = execution_device(model.image_projection)

    def prepare(self, slots: Sequence[Slot]) -> PreparedPairs:
        """Decode and preprocess; safe to call from several threads.

        Args:
            slots: The slots.

        Returns:
            The usable pairs, and what is wrong with the others.

        Raises:
            PairError: At a bad slot, for `on_error="raise"`.
        """
        pairs, bad_rows = [], []
        for slot in slots:
            try:
                pairs.append(self.columns.pair(slot))
            except PairError as error:
                if self.on_error == "raise":
                    raise
                bad_rows.append(str(error))
        pixels = None
        if pairs:
            images = [pair.image for pair in pairs]
            pixels = self.image_processor(images=images, return_tensors="pt")
        return PreparedPairs([pair.text for pair in pairs], pixels, bad_rows)

    @torch.no_grad()
    def embed(self, prepared: PreparedPairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run both towers.

        Args:
            prepared: From `prepare`, with at least one pair.

        Returns:
            Image embeddings `[pairs, features]`, inputs of the image projection `[pairs, in_features (+1)]`,
            and the same of the texts; at least float32.
        """
        assert prepared.pixels is not None
        tokens = self.tokenizer(prepared.texts, return_tensors="pt", **self.settings)
        model = self.model
        with evaluation_mode(model), self._autocast():
            image = model.encode_image(**prepared.pixels.to(self.device, model.dtype))
            text = model.encode_text(**tokens.to(self.device))
        return image.mean, image.features, text.mean, text.features

    def _autocast(self) -> torch.autocast:
        lower = self.dtype != self.model.dtype
        return torch.autocast(self.device.type, dtype=self.dtype if lower else None, enabled=lower)


def tower_dtype(dtype: torch.dtype | str | None, model: nn.Module) -> torch.dtype:
    """The precision in which the towers run.

    Args:
        dtype: What the user asks for; None for that of the model.
        model: The model.

    Returns:
        The precision.

    Raises:
        ValueError: For another type, or one that is not that of a model in half precision.
    """
    own: torch.dtype = model.dtype  # type: ignore[assignment]
    if dtype is None:
        return own
    chosen = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if chosen not in _DTYPES.values() and chosen != own:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    assert chosen is not None
    if chosen != own and (own != torch.float32 or chosen == torch.float64):
        raise ValueError(
            f"the model is loaded in {own}, so its towers cannot run in {chosen}: load it in float32"
        )
    return chosen


def ahead(work: Callable[[S], T], items: Iterable[S], num_workers: int) -> Iterator[T]:
    """Apply `work` to items in threads that run ahead; results come in the order of the items.

    Args:
        work: What to do with an item.
        items: The items; drawn in this thread, few at a time.
        num_workers: Number of threads; 0 to work in this one.

    Yields:
        Results.
    """
    if num_workers == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="bayesvlm-decode")
    pending: deque[Future[T]] = deque()
    try:
        drawn = iter(items)
        while True:
            try:
                item = next(drawn)
            except StopIteration:
                break
            except Exception:
                # As without threads: first what was before the item that cannot be drawn.
                while pending:
                    yield pending.popleft().result()
                raise
            pending.append(pool.submit(work, item))
            if len(pending) > num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def on_device(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Put a model on a device for a while; one that accelerate has spread over devices stays as it is."""
    first = next(model.parameters()).device
    if device is None or first == device or getattr(model, "hf_device_map", None) is not None:
        yield
        return
    if first.type == device.type == "cpu":
        yield
        return
    try:
        model.to(device)
        yield
    finally:
        model.to(first)
