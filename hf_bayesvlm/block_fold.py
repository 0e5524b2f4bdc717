"""Blocks of embedded pairs into the Kronecker factors of both projections, in one process or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .backbones import at_least_float32
from .curvature import CurvatureAccumulator, KroneckerFactors
from .distributed import Ranks
from .modeling_bayesvlm import BayesVLMForZeroShot

_OTHER = {"image": "text", "text": "image"}


class BlockFolder:
    """Collects the pairs of a block, contrasts them with each other and keeps the sums only.

    The collecting tensors are allocated once, so that memory does not grow with the number of pairs.

    Args:
        model: The model.
        capacity: Most pairs of a block that this process reads.
        ranks: The processes that share each block.
    """

    def __init__(self, model: BayesVLMForZeroShot, capacity: int, ranks: Ranks) -> None:
        self._shapes = {name: tuple(w.shape) for name, w in model.projection_weights().items()}
        # Of the embeddings; a process without pairs must not send another one.
        self._dtype = at_least_float32(model.image_projection.weight.new_zeros(())).dtype
        self._likelihood = model.likelihood
        self._scale = model.logit_scale.item()
        self._bias = model.logit_bias.item() if model.likelihood == "sigmoid" else 0.0
        self._capacity = capacity
        self._ranks = ranks
        self._buffers: dict[str, Tensor] = {}
        self._count = 0
        self._totals = {name: self._accumulator() for name in self._shapes}

    def __len__(self) -> int:
        return self._count

    @property
    def num_pairs(self) -> int:
        """Pairs in the sums."""
        return self._totals["image"].num_pairs

    def append(
        self, image_mean: Tensor, image_features: Tensor, text_mean: Tensor, text_features: Tensor
    ) -> None:
        """Add pairs to the block.

        Args:
            image_mean: Unnormalised image embeddings, `[pairs, features]`.
            image_features: Inputs of the image projection, `[pairs, in_features (+1)]`.
            text_mean: Unnormalised text embeddings, `[pairs, features]`.
            text_features: Inputs of the text projection, `[pairs, in_features (+1)]`.

        Raises:
            ValueError: If an embedding contains NaN or infinity, or is zero.
        """
        parts = {
            "image.mean": image_mean,
            "image.features": image_features,
            "text.mean": text_mean,
            "text.features": text_features,
        }
        stop = self._count + image_mean.shape[0]
        for name, rows in parts.items():
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"the towers gave NaN or infinity ({name}): load the model in float32 or bfloat16, or "
                    "check its weights"
                )
            if name not in self._buffers:
                # float64 does not exist on MPS.
                device = torch.device("cpu") if rows.device.type == "mps" else rows.device
                shape = (self._capacity, rows.shape[1])
                self._buffers[name] = torch.empty(shape, dtype=rows.dtype, device=device)
            self._buffers[name][self._count : stop] = rows
        self._count = stop

    def discard(self) -> None:
        """Forget the pairs of the block."""
        self._count = 0

    @torch.no_grad()
    def fold(self, counts: Sequence[int]) -> None:
        """Contrast the pairs of all processes' blocks with each other, add to the sums, and forget them.

        Args:
            counts: How many pairs each process has collected.

        Raises:
            ValueError: If an embedding cannot be used.
            PeerError: If that is so in another process.
        """
        own = {name: self._rows(name, "mean") for name in self._shapes}
        everyone = {name: self._ranks.gather_rows(rows, counts) for name, rows in own.items()}
        with full_float32():
            sums = self._ranks.together(lambda: self._block_sums(own, everyone))
        for name, (sum_A, sum_B) in sums.items():
            self._totals[name].add_sums(
                self._ranks.add_up(sum_A), self._ranks.add_up(sum_B), sum(counts)
            )
        self._count = 0

    def sums(self) -> dict[str, Tensor]:
        """The sums so far, as `image.A`, `image.B`, `text.A` and `text.B`, float64; empty before the first."""
        result: dict[str, Tensor] = {}
        for name, total in self._totals.items():
            for letter, value in zip("AB", total.sums() or (), strict=False):
                result[f"{name}.{letter}"] = value
        return result

    def restore(self, sums: dict[str, Tensor], num_pairs: int) -> None:
        """Start from sums that were saved.

        Args:
            sums: As from `sums`.
            num_pairs: Pairs in them.
        """
        for name, total in self._totals.items():
            if f"{name}.A" in sums:
                total.add_sums(sums[f"{name}.A"], sums[f"{name}.B"], num_pairs)

    def factors(self) -> dict[str, KroneckerFactors]:
        """The factors of both projections."""
        return {name: total.factors() for name, total in self._totals.items()}

    def _block_sums(
        self, own: dict[str, Tensor], everyone: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """This process's part of the block's sums."""
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (features, in_features) in self._shapes.items():
            part = self._accumulator()
            if self._count:
                part.update(self._rows(name, "features"), own[name], everyone[_OTHER[name]])
            result[name] = part.sums() or (
                own[name].new_zeros((in_features, in_features), dtype=torch.float64),
                own[name].new_zeros((features, features), dtype=torch.float64),
            )
        return result

    def _rows(self, name: str, kind: str) -> Tensor:
        buffer = self._buffers.get(f"{name}.{kind}")
        if buffer is None:
            features, in_features = self._shapes[name]
            width = features if kind == "mean" else in_features
            return torch.zeros((0, width), dtype=self._dtype, device=self._ranks.device)
        return buffer[: self._count]

    def _accumulator(self) -> CurvatureAccumulator:
        return CurvatureAccumulator(self._likelihood, self._scale, self._bias)


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 in float32: TF32 would cost the curvature its digits."""
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    before = getattr(settings, name)
    setattr(settings, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(settings, name, before)
