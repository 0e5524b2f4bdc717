"""The curvature against autograd: J' (d2 loss / dz2) J of the losses as they are written in a paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bayesvlm.curvature import CurvatureAccumulator, info_nce_ggn, sigmoid_ggn

BIAS = -10.0


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ggn(kind: str, source: Tensor, target: Tensor, scale: float, **options: object) -> Tensor:
    if kind == "softmax":
        return info_nce_ggn(source, target, scale, **options)
    return sigmoid_ggn(source, target, scale, BIAS, **options)


def textbook_oracle(kind: str, source: Tensor, target: Tensor, scale: float) -> Tensor:
    """Autograd through the losses of torch.nn.functional, in float64."""
    candidates = F.normalize(target.double(), dim=1)
    bias = BIAS if kind == "sigmoid" else 0.0

    def logits(x: Tensor) -> Tensor:
        return scale * candidates @ (x / x.norm()) + bias

    def loss(z: Tensor, row: int) -> Tensor:
        if kind == "softmax":
            return F.cross_entropy(z, torch.tensor(row % len(z)))
        labels = F.one_hot(torch.tensor(row % len(z)), len(z)).to(z)
        return F.binary_cross_entropy_with_logits(z, labels, reduction="sum")

    total = torch.zeros(source.shape[1], source.shape[1], dtype=torch.float64)
    for row, x in enumerate(source.double()):
        jacobian = torch.func.jacrev(logits)(x)
        hessian = torch.func.hessian(loss)(logits(x), row)
        total += jacobian.T @ hessian @ jacobian
    return total


def careful_oracle(kind: str, source: Tensor, target: Tensor, scale: float) -> Tensor:
    """As `textbook_oracle`, in coordinates in which a saturated loss keeps its digits.

    The textbook Hessian holds p_t - p_t^2, which has lost everything once p_t rounds to 1.  The
    cross-entropy is a function of the differences d_j = z_j - z_t to the largest logit alone, and
    log1p(sum_j exp(d_j)) has a Hessian whose entries are all of the order of the other candidates'
    probabilities.  The sigmoid loss is log1p(exp(-|z|)) plus a part that is linear in z.
    """
    candidates = F.normalize(target.double(), dim=1)
    total = torch.zeros(source.shape[1], source.shape[1], dtype=torch.float64)
    for x in source.double():
        top = int((candidates @ x).argmax())
        others = torch.arange(len(candidates)) != top

        def coordinates(x: Tensor, top: int = top, others: Tensor = others) -> Tensor:
            direction = x / x.norm()
            if kind == "sigmoid":
                return scale * candidates @ direction + BIAS
            return scale * (candidates[others] - candidates[top]) @ direction

        def loss(z: Tensor) -> Tensor:
            if kind == "sigmoid":
                return torch.log1p(torch.exp(-z.abs())).sum()
            return torch.log1p(torch.exp(z).sum())

        jacobian = torch.func.jacrev(coordinates)(x)
        total += jacobian.T @ torch.func.hessian(loss)(coordinates(x)) @ jacobian
    return total


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def spectral_floor(matrix: Tensor) -> float:
    """Smallest eigenvalue relative to the largest entry's size."""
    return (torch.linalg.eigvalsh(matrix.double())[0] / matrix.double().abs().max()).item()


def embeddings(case: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    wide = case == "more features than candidates"
    rows, candidates, features = (6, 5, 9) if wide else (9, 12, 5)
    source, target = normal(generator, rows, features), normal(generator, candidates, features)
    if case == "repeated sources":
        source = source[[0, 1, 0, 2, 0, 3]]
    elif case == "repeated targets":
        target = target[[0, 1, 1, 2, 3, 3, 3, 4]]
    elif case == "aligned pairs":
        source = 3.0 * target[:rows] + 1e-3 * source
    elif case == "exactly aligned pairs":
        source = 3.0 * target[:rows]
    elif case == "opposite pairs":
        source = -0.5 * target[:rows]
    elif case == "tiny norms":
        source, target = 1e-9 * source, 1e-9 * target
    elif case == "mixed norms":
        source = source * torch.logspace(-3, 3, rows, dtype=torch.float64)[:, None]
    return source, target


CASES = [
    "plain",
    "more features than candidates",
    "repeated sources",
    "repeated targets",
    "aligned pairs",
    "exactly aligned pairs",
    "opposite pairs",
    "tiny norms",
    "mixed norms",
]
both_losses = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


@both_losses
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_agrees_with_autograd_of_the_loss(case, scale, kind, generator):
    source, target = embeddings(case, generator)
    expected = textbook_oracle(kind, source, target, scale)
    assert relative_error(ggn(kind, source, target, scale), expected) < 1e-10


@both_losses
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [4.0, 20.0, 100.0])
def test_agrees_with_autograd_where_the_loss_is_saturated(case, scale, kind, generator):
    source, target = embeddings(case, generator)
    expected = careful_oracle(kind, source, target, scale)
    assert relative_error(ggn(kind, source, target, scale), expected) < 1e-10


@both_losses
@pytest.mark.parametrize("case", CASES)
def test_the_two_oracles_agree_where_both_have_digits(case, kind, generator):
    source, target = embeddings(case, generator)
    careful = careful_oracle(kind, source, target, 2.0)
    assert relative_error(careful, textbook_oracle(kind, source, target, 2.0)) < 1e-12


def test_a_confident_softmax_keeps_all_its_digits():
    # p_t = 1 - 7e-22 rounds to 1: a textbook diag(p) - pp' is exactly zero or pure rounding here.
    source = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    scale = 48.6
    # By hand: J(y_2 - y_1) = (0, 1/2, 0), and p(1-p) = exp(-s) / (1 + exp(-s))^2.
    expected = scale**2 * 0.25 * math.exp(-scale) / (1.0 + math.exp(-scale)) ** 2
    result = info_nce_ggn(source, target, scale)
    assert result[1, 1].item() == pytest.approx(expected, rel=1e-13)
    result[1, 1] = 0.0
    assert result.abs().max().item() <= 1e-15 * expected


def test_repeated_and_saturated_candidates_leave_only_rounding(generator):
    # Two equal best candidates share the probability and differ by nothing; the rest of the curvature
    # is e^-100.  What is left is the rounding of a unit matrix times (s / |x|)^2, and not more.
    target = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2, 3]]
    rotation = torch.linalg.qr(normal(generator, 4, 4)).Q
    result = info_nce_ggn(3.0 * target @ rotation, target @ rotation, 100.0)
    assert result.abs().max().item() < 5 * 16 * 2.3e-16 * (100.0 / 3.0) ** 2


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_one_candidate_has_no_softmax_curvature(scale, generator):
    result = info_nce_ggn(normal(generator, 7, 5), normal(generator, 1, 5), scale)
    assert torch.equal(result, torch.zeros(5, 5, dtype=torch.float64))


def test_one_candidate_has_sigmoid_curvature(generator):
    source, target = normal(generator, 7, 5), normal(generator, 1, 5)
    expected = textbook_oracle("sigmoid", source, target, 5.0)
    assert expected.norm() > 1e-5
    assert relative_error(sigmoid_ggn(source, target, 5.0, BIAS), expected) < 1e-10


def test_sigmoid_does_not_depend_on_labels(generator):
    source, target = normal(generator, 5, 4), normal(generator, 6, 4)
    flipped = torch.zeros(4, 4, dtype=torch.float64)
    candidates = F.normalize(target, dim=1)
    for x in source:

        def logits(x: Tensor) -> Tensor:
            return 3.0 * candidates @ (x / x.norm()) + 0.7

        def loss(z: Tensor) -> Tensor:
            labels = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
            return F.binary_cross_entropy_with_logits(z, labels, reduction="sum")

        jacobian = torch.func.jacrev(logits)(x)
        flipped += jacobian.T @ torch.func.hessian(loss)(logits(x)) @ jacobian
    assert relative_error(sigmoid_ggn(source, target, 3.0, 0.7), flipped) < 1e-10


def test_sigmoid_is_even_in_the_logit(generator):
    source, target = normal(generator, 5, 4), normal(generator, 6, 4)
    one = sigmoid_ggn(source, target, 3.0, 0.7)
    other = sigmoid_ggn(source, -target, 3.0, -0.7)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_sigmoid_bias_counts(generator):
    source, target = normal(generator, 5, 4), normal(generator, 6, 4)
    assert sigmoid_ggn(source, target, 3.0, -12.0).trace() < (
        1e-3 * sigmoid_ggn(source, target, 3.0, 0.0).trace()
    )


@both_losses
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 20, 1000])
def test_chunks_do_not_change_the_sum(chunk_size, scale, kind, generator):
    source, target = normal(generator, 20, 6), normal(generator, 15, 6)
    whole = careful_oracle(kind, source, target, scale)
    assert relative_error(ggn(kind, source, target, scale, chunk_size=chunk_size), whole) < 1e-12


@both_losses
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_float32_agrees_with_float64(scale, kind, generator):
    source, target = normal(generator, 64, 16).float(), normal(generator, 48, 16).float()
    single = ggn(kind, source, target, scale)
    assert single.dtype == torch.float32
    assert relative_error(single, ggn(kind, source.double(), target.double(), scale)) < 1e-5


@both_losses
def test_float32_takes_norms_of_1e_9(kind, generator):
    source, target = normal(generator, 8, 4).float(), normal(generator, 6, 4).float()
    tiny = ggn(kind, 1e-9 * source, 1e-9 * target, 10.0)
    assert relative_error(tiny * 1e-18, ggn(kind, source, target, 10.0).double()) < 1e-5


@both_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype, kind, generator):
    source, target = normal(generator, 10, 6).to(dtype), normal(generator, 8, 6).to(dtype)
    result = ggn(kind, source, target, 20.0)
    assert result.dtype == torch.float32
    assert torch.equal(result, ggn(kind, source.float(), target.float(), 20.0))


def test_half_precision_norms_do_not_overflow(generator):
    # One squared coordinate is already beyond float16's largest number, 65504.
    source = torch.full((2, 4), 300.0, dtype=torch.float16)
    source[0, 0] = -300.0
    target = normal(generator, 3, 4).to(torch.float16)
    expected = textbook_oracle("softmax", source, target, 2.0)
    assert relative_error(info_nce_ggn(source, target, 2.0), expected) < 1e-5


def test_the_target_takes_the_dtype_of_the_source(generator):
    source, target = normal(generator, 5, 4), normal(generator, 6, 4)
    assert info_nce_ggn(source.float(), target, 3.0).dtype == torch.float32
    assert info_nce_ggn(source, target.float(), 3.0).dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 7),
    candidates=st.integers(1, 7),
    features=st.integers(1, 6),
    scale=st.floats(0.01, 100.0),
    kind=st.sampled_from(["softmax", "sigmoid"]),
)
def test_invariances(seed, rows, candidates, features, scale, kind):
    generator = torch.Generator().manual_seed(seed)
    source, target = normal(generator, rows, features), normal(generator, candidates, features)
    result = ggn(kind, source, target, scale)
    # Rounding is relative to the uncancelled terms, (s / |x|)^2 summed over rows.
    size = ((scale / source.norm(dim=1)) ** 2).sum().item()
    tolerance = {"rtol": 1e-9, "atol": 1e-13 * size}
    assert torch.equal(result, result.T)
    assert torch.linalg.eigvalsh(result)[0].item() >= -1e-13 * size
    rows_order = torch.randperm(rows, generator=generator)
    candidates_order = torch.randperm(candidates, generator=generator)
    permuted = ggn(kind, source[rows_order], target[candidates_order], scale)
    torch.testing.assert_close(permuted, result, **tolerance)
    # Lengths of the candidates are normalised away; a source twice as long has a quarter.
    lengths = torch.rand(candidates, 1, generator=generator, dtype=torch.float64) + 0.1
    torch.testing.assert_close(ggn(kind, source, target * lengths, scale), result, **tolerance)
    torch.testing.assert_close(4.0 * ggn(kind, 2.0 * source, target, scale), result, **tolerance)
    # Rotating both towers rotates the matrix.
    rotation = torch.linalg.qr(normal(generator, features, features)).Q
    rotated = ggn(kind, source @ rotation, target @ rotation, scale)
    torch.testing.assert_close(rotation @ rotated @ rotation.T, result, **tolerance)


@both_losses
def test_a_single_row_has_no_curvature_along_itself(kind, generator):
    source, target = normal(generator, 1, 6), normal(generator, 9, 6)
    result = ggn(kind, source, target, 20.0)
    assert (result @ source[0]).norm() < 1e-13 * result.norm()
    assert spectral_floor(result) > -1e-14


def test_scale_and_bias_may_be_tensors(generator):
    source, target = normal(generator, 5, 4), normal(generator, 6, 4)
    scale = torch.nn.Parameter(torch.tensor(7.5))
    bias = torch.nn.Parameter(torch.tensor([-3.25]))
    assert torch.equal(info_nce_ggn(source, target, scale), info_nce_ggn(source, target, 7.5))
    assert torch.equal(
        sigmoid_ggn(source, target, scale, bias), sigmoid_ggn(source, target, 7.5, -3.25)
    )


@both_losses
def test_inputs_are_not_changed_and_keep_no_graph(kind, generator):
    source = normal(generator, 5, 4).requires_grad_()
    target = normal(generator, 6, 4).requires_grad_()
    before = source.detach().clone(), target.detach().clone()
    result = ggn(kind, source, target, 9.0)
    assert not result.requires_grad
    assert torch.equal(source, before[0])
    assert torch.equal(target, before[1])


class LargestOutput(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation made, views of inputs aside."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self._inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and (
                value.untyped_storage().data_ptr() not in self._inputs
            ):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@both_losses
def test_memory_is_one_chunk_of_logits_and_one_matrix(kind, generator):
    rows, candidates, features, chunk = 96, 80, 24, 8
    source, target = normal(generator, rows, features), normal(generator, candidates, features)
    with LargestOutput(source, target) as seen:
        ggn(kind, source, target, 10.0, chunk_size=chunk)
    largest = 8 * max(chunk * candidates, candidates * features, features * features)
    assert 0 < seen.bytes <= largest
    # The tensor that must never exist ([chunk, features, features]), and the one that chunking avoids.
    assert largest < 8 * chunk * features * features
    assert largest < 8 * rows * candidates


def test_the_probe_sees_a_batched_formula(generator):
    jacobian = normal(generator, 8, 24, 24)
    with LargestOutput(jacobian) as seen:
        (jacobian @ jacobian).sum(dim=0)
    assert seen.bytes == 8 * jacobian.numel()


def test_default_chunks_bound_the_logits_of_large_blocks(generator):
    source, target = normal(generator, 600, 2).float(), normal(generator, 32768, 2).float()
    with LargestOutput(source, target) as seen:
        info_nce_ggn(source, target, 10.0)
    assert seen.bytes <= 4 * 2**23


GOOD = torch.eye(3, dtype=torch.float64) + 0.1


def spoiled(value: float) -> Tensor:
    damaged = GOOD.clone()
    damaged[1, 2] = value
    return damaged


def with_zero_row() -> Tensor:
    damaged = GOOD.clone()
    damaged[1] = 0.0
    return damaged


@both_losses
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (GOOD[:, :2], GOOD, "source and target must be"),
        (GOOD[0], GOOD, "source and target must be"),
        (GOOD, GOOD[0], "source and target must be"),
        (GOOD[None], GOOD[None], "source and target must be"),
        (GOOD[:0], GOOD, "at least one row"),
        (GOOD, GOOD[:0], "at least one row"),
        (GOOD[:, :0], GOOD[:, :0], "zero or non-finite"),
        (spoiled(math.nan), GOOD, "source has a zero or non-finite"),
        (GOOD, spoiled(math.nan), "target has a zero or non-finite"),
        (spoiled(math.inf), GOOD, "source has a zero or non-finite"),
        (with_zero_row(), GOOD, "source has a zero or non-finite"),
        (GOOD, with_zero_row(), "target has a zero or non-finite"),
    ],
)
def test_bad_embeddings_are_refused(source, target, message, kind):
    with pytest.raises(ValueError, match=message):
        ggn(kind, source, target, 2.0)


@both_losses
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_bad_scales_are_refused(scale, kind):
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        ggn(kind, GOOD, GOOD, scale)
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        CurvatureAccumulator(kind, scale)


def test_bad_bias_and_chunk_are_refused():
    with pytest.raises(ValueError, match="logit_bias must be finite"):
        sigmoid_ggn(GOOD, GOOD, 2.0, math.nan)
    with pytest.raises(ValueError, match="logit_bias must be finite"):
        CurvatureAccumulator("sigmoid", 2.0, math.inf)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        info_nce_ggn(GOOD, GOOD, 2.0, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        CurvatureAccumulator("softmax", 2.0, chunk_size=0)


@both_losses
def test_overflow_is_an_error_and_not_nan(kind):
    with pytest.raises(ValueError, match=r"overflows torch\.float32"):
        ggn(kind, 1e-20 * GOOD.float(), GOOD.roll(1, 0).float(), 100.0)


def blocks(generator: torch.Generator, *sizes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tuple(normal(generator, size, d) for d in (7, 4, 4)) for size in sizes]


@both_losses
def test_accumulator_adds_blocks_with_their_own_candidates(kind, generator):
    bias = BIAS if kind == "sigmoid" else 0.0
    accumulator = CurvatureAccumulator(kind, 10.0, bias)
    parts = blocks(generator, 6, 9, 3)
    for part in parts:
        accumulator.update(*part)
    factors = accumulator.factors()
    assert factors.num_pairs == accumulator.num_pairs == 18
    expected_A = sum(features.T @ features for features, _, _ in parts) / math.sqrt(18)
    expected_B = sum(careful_oracle(kind, x, y, 10.0) for _, x, y in parts) / math.sqrt(18)
    assert relative_error(factors.A, expected_A) < 1e-14
    assert relative_error(factors.B, expected_B) < 1e-12
    # The candidates of a block are the block's: all pairs at once give another matrix.
    source, target = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    at_once = careful_oracle(kind, source, target, 10.0) / math.sqrt(18)
    assert relative_error(factors.B, at_once) > 0.05


@both_losses
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [3, 1, 8], [12]])
def test_streaming_rows_against_the_same_candidates_does_not_depend_on_the_split(
    sizes, kind, generator
):
    features, source, target = (normal(generator, 12, d) for d in (7, 4, 4))
    bias = BIAS if kind == "sigmoid" else 0.0
    accumulator = CurvatureAccumulator(kind, 10.0, bias, chunk_size=2)
    for f, x in zip(features.split(sizes), source.split(sizes), strict=True):
        accumulator.update(f, x, target)
    factors = accumulator.factors()
    assert factors.num_pairs == 12
    assert relative_error(factors.A, features.T @ features / math.sqrt(12)) < 1e-14
    expected = careful_oracle(kind, source, target, 10.0) / math.sqrt(12)
    assert relative_error(factors.B, expected) < 1e-12


def test_accumulator_sums_in_float64_what_float32_would_lose():
    # 1 + 2^-12 squared has bits beyond float32; A must hold them exactly.
    features = torch.full((3, 1), 1.0 + 2.0**-12, dtype=torch.float32)
    accumulator = CurvatureAccumulator("softmax", 10.0)
    for _ in range(3):
        accumulator.update(features, torch.ones(3, 2), torch.eye(2))
    factors = accumulator.factors()
    assert factors.A.dtype == factors.B.dtype == torch.float64
    assert factors.A.item() == 9 * (1.0 + 2.0**-12) ** 2 / 3.0


def test_factors_are_a_snapshot(generator):
    first, second = blocks(generator, 4, 5)
    accumulator = CurvatureAccumulator("softmax", 10.0)
    accumulator.update(*first)
    snapshot = accumulator.factors()
    kept = snapshot.A.clone(), snapshot.B.clone()
    accumulator.update(*second)
    assert torch.equal(snapshot.A, kept[0])
    assert torch.equal(snapshot.B, kept[1])
    assert snapshot.num_pairs == 4
    snapshot.A.zero_()
    assert accumulator.factors().A.norm() > 0
    assert not torch.equal(accumulator.factors().B, kept[1])


def test_features_are_not_aliased(generator):
    (features, source, target), second = blocks(generator, 4, 5)
    accumulator = CurvatureAccumulator("softmax", 10.0)
    accumulator.update(features, source, target)
    before = accumulator.factors().A
    for tensor in (features, source, target):
        tensor.zero_()
    assert torch.equal(accumulator.factors().A, before)
    accumulator.update(*second)
    assert accumulator.num_pairs == 9


def test_accumulator_keeps_no_graph(generator):
    features, source, target = (tensor.requires_grad_() for tensor in blocks(generator, 4)[0])
    accumulator = CurvatureAccumulator("softmax", torch.nn.Parameter(torch.tensor(10.0)))
    accumulator.update(features, source, target)
    factors = accumulator.factors()
    assert not factors.A.requires_grad
    assert not factors.B.requires_grad


@pytest.mark.parametrize(
    ("index", "spoil", "message"),
    [
        (0, lambda t: t[:3], "one row for each pair"),
        (0, lambda t: t[0], "one row for each pair"),
        (1, lambda t: t[0], "one row for each pair"),
        (0, lambda t: t * math.nan, "features contain NaN"),
        (0, lambda t: t[:, :5], "earlier blocks"),
        (1, lambda t: t * 0.0, "source has a zero"),
        (2, lambda t: t * math.inf, "target has a zero or non-finite"),
        (2, lambda t: t[:0], "at least one row"),
        (2, lambda t: t[:, :3], "source and target must be"),
    ],
)
def test_a_refused_block_leaves_the_sums_unchanged(index, spoil, message, generator):
    first, block = blocks(generator, 6, 4)
    accumulator = CurvatureAccumulator("softmax", 10.0)
    accumulator.update(*first)
    before = accumulator.factors()
    damaged = list(block)
    damaged[index] = spoil(damaged[index])
    with pytest.raises(ValueError, match=message):
        accumulator.update(*damaged)
    after = accumulator.factors()
    assert after.num_pairs == 6
    assert torch.equal(after.A, before.A)
    assert torch.equal(after.B, before.B)


def test_blocks_of_another_embedding_size_are_refused(generator):
    accumulator = CurvatureAccumulator("softmax", 10.0)
    accumulator.update(*blocks(generator, 6)[0])
    before = accumulator.factors()
    with pytest.raises(ValueError, match="earlier blocks"):
        accumulator.update(*(normal(generator, 4, d) for d in (7, 5, 5)))
    assert torch.equal(accumulator.factors().B, before.B)


def test_a_refused_first_block_leaves_the_accumulator_empty(generator):
    features, source, target = blocks(generator, 6)[0]
    accumulator = CurvatureAccumulator("softmax", 10.0)
    with pytest.raises(ValueError, match="zero or non-finite"):
        accumulator.update(features, source, 0.0 * target)
    with pytest.raises(ValueError, match="no pairs yet"):
        accumulator.factors()
    accumulator.update(normal(generator, 3, 2), source[:3], target)
    assert accumulator.factors().A.shape == (2, 2)


def test_accumulator_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="likelihood must be"):
        CurvatureAccumulator("hinge", 10.0)
    with pytest.raises(ValueError, match="blind to a logit bias"):
        CurvatureAccumulator("softmax", 10.0, -10.0)
    with pytest.raises(ValueError, match="no pairs yet"):
        CurvatureAccumulator("softmax", 10.0).factors()
    assert CurvatureAccumulator("softmax", 10.0, torch.tensor(0.0)).num_pairs == 0


def test_candidates_in_a_narrow_cone_keep_their_digits(generator: torch.Generator) -> None:
    # The texts of a real CLIP have a large common part, which must not eat the digits of float32.
    common = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    target = common + 1e-3 * torch.randn(40, 16, generator=generator, dtype=torch.float64)
    source = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    exact = info_nce_ggn(source, target, 10.0)
    single = info_nce_ggn(source.float(), target.float(), 10.0).double()
    assert (single - exact).norm() < 1e-3 * exact.norm()
    assert torch.linalg.eigvalsh(single)[0] > -1e-5 * torch.linalg.eigvalsh(exact)[-1]


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_sums_do_not_depend_on_how_rows_are_split(
    likelihood: Any, generator: torch.Generator
) -> None:
    # A narrow cone, as CLIP's texts: here the terms are largest against their sum.
    centre = torch.randn(1, 64, generator=generator)
    source = centre + 0.3 * torch.randn(192, 64, generator=generator)
    target = -centre + 0.3 * torch.randn(192, 64, generator=generator)
    sums = []
    for parts in (1, 2, 3):
        accumulator = CurvatureAccumulator(likelihood, 33.0)
        for rows in source.chunk(parts):
            accumulator.update(rows, rows, target)
        sums.append(accumulator.sums())
    for found in sums[1:]:
        assert found is not None
        assert sums[0] is not None
        assert (found[1] - sums[0][1]).norm() < 5e-7 * sums[0][1].norm()


def test_sums_of_others_are_added(generator: torch.Generator) -> None:
    rows = [torch.randn(6, d, generator=generator) for d in (5, 3, 3)]
    whole, first, second = (CurvatureAccumulator("softmax", 10.0) for _ in range(3))
    assert first.sums() is None
    whole.update(*rows)
    first.update(rows[0][:2], rows[1][:2], rows[2])
    second.update(rows[0][2:], rows[1][2:], rows[2])
    first.add_sums(*second.sums(), second.num_pairs)
    torch.testing.assert_close(first.factors().B, whole.factors().B, rtol=1e-5, atol=1e-6)
    assert first.num_pairs == 6
    with pytest.raises(ValueError, match="float64"):
        first.add_sums(torch.eye(5), torch.eye(3), 1)
    with pytest.raises(ValueError, match="earlier blocks"):
        first.add_sums(torch.eye(4).double(), torch.eye(3).double(), 1)
    assert first.num_pairs == 6


def test_sums_of_others_are_left_as_they_are(generator: torch.Generator) -> None:
    rows = [torch.randn(6, d, generator=generator) for d in (5, 3, 3)]
    first, second = (CurvatureAccumulator("softmax", 10.0) for _ in range(2))
    second.update(*rows)
    sums = second.sums()
    assert sums is not None
    before = [value.clone() for value in sums]
    first.add_sums(*sums, 6)
    first.update(*rows)
    assert all(torch.equal(value, old) for value, old in zip(sums, before, strict=True))


def test_an_autocast_around_it_does_not_count(generator: torch.Generator) -> None:
    source, target = (torch.randn(12, 8, generator=generator) for _ in range(2))
    expected = info_nce_ggn(source, target, 30.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce_ggn(source, target, 30.0), expected)
