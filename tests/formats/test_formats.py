"""Packing is lossless for any tensor, small, and refuses damaged parts."""

import numpy as np
import pytest
import torch
from helpers.tensors import same_bits, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_cap.formats import check_parts, encode_packed, pack, unpack

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 13), min_size=1, max_size=3),
    sparsity=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_round_trip(shape: list[int], sparsity: float, dtype: torch.dtype, seed: int) -> None:
    weight = sparse(tuple(shape), sparsity, seed).to(dtype)
    before = weight.clone()
    parts = pack(weight)
    assert same_bits(unpack(parts["weight"], parts["weight_mask"], parts["weight_shape"]), weight)
    assert same_bits(weight, before)
    assert parts["weight"].ndim == 1
    assert len(parts["weight_mask"]) == -(-weight.numel() // 8)


def test_negative_zero_nan_and_infinity_survive() -> None:
    weight = torch.tensor([[-0.0, 0.0, float("nan"), float("inf"), 1e-45]])
    parts = pack(weight)
    assert len(parts["weight"]) == 4
    assert same_bits(unpack(*parts.values()), weight)


# Of many chunks, with and without a rest; of a single one; of none.
SHAPES = [(2003, 1999), (32, 1 << 17), (5, 7), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_do_not_matter(shape: tuple[int, int]) -> None:
    weight = sparse(shape, 0.4)
    parts = pack(weight)
    assert same_bits(parts["weight"], weight[weight != 0])
    bits = np.unpackbits(parts["weight_mask"].numpy(), bitorder="little", count=weight.numel())
    assert np.array_equal(bits, (weight != 0).flatten().numpy())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_do_not_matter(threads: int, shape: tuple[int, int]) -> None:
    torch.set_num_threads(threads)
    weight = sparse(shape, 0.4)
    assert same_bits(unpack(*pack(weight).values()), weight)


def test_bit_order_is_as_documented() -> None:
    parts = pack(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]]))
    assert parts["weight_mask"].tolist() == [0b00001001, 0b00000001]
    assert parts["weight"].tolist() == [1, 2, 3]
    assert parts["weight_shape"].tolist() == [3, 4]


def test_views_are_packed_as_they_look() -> None:
    weight = sparse((6, 10), 0.5).t()
    assert same_bits(unpack(*pack(weight).values()), weight.contiguous())


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_one_bit_per_weight_over_the_kept_values(
    sparsity: float, dtype: torch.dtype
) -> None:
    weight = sparse((512, 1000), sparsity).to(dtype)
    size = sum(part.nbytes for part in encode_packed("x.weight", weight).values())
    zeros = float((weight == 0).float().mean())
    assert size <= 1.01 * (weight.nbytes * (1 - zeros) + weight.numel() / 8)


def test_only_matrices_that_shrink_are_packed() -> None:
    dense, norm, bias = torch.ones(8, 8), torch.zeros(64), torch.zeros(8, 8)
    assert list(encode_packed("x.weight", dense)) == ["x.weight"]
    assert list(encode_packed("norm.weight", norm)) == ["norm.weight"]
    assert list(encode_packed("x.bias", bias)) == ["x.bias"]
    packed = encode_packed("x.weight", torch.zeros(8, 8))
    assert list(packed) == ["x.weight", "x.weight_mask", "x.weight_shape"]
    assert packed["x.weight"].shape == (0,)


def test_damaged_parts_are_refused() -> None:
    values, mask, shape = pack(sparse((5, 5), 0.5)).values()
    with pytest.raises(ValueError, match=r"layer\.weight is damaged: its mask keeps \d+ weights"):
        unpack(values[:-1], mask, shape, "layer.weight")
    with pytest.raises(ValueError, match="needs a mask of 4 bytes, found"):
        unpack(values, mask[:-1], shape)
    with pytest.raises(ValueError, match="needs a mask of 5 bytes"):
        unpack(values, mask, torch.tensor([5, 7]))
    stray = mask.clone()
    stray[-1] |= 0x80
    with pytest.raises(ValueError, match="keeps weights beyond shape"):
        unpack(torch.cat([values, values[:1]]), stray, shape)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        (torch.tensor([-5, -5]), r"found \[-5, -5\] of torch.int64"),
        (torch.tensor([5.0, 5.0]), r"found \[5.0, 5.0\] of torch.float32"),
        (torch.tensor(25), "found 25 of torch.int64"),
    ],
)
def test_what_is_no_shape_is_refused(shape: torch.Tensor, found: str) -> None:
    values, mask, _ = pack(sparse((5, 5), 0.5)).values()
    with pytest.raises(ValueError, match=f"must be a list of sizes in int64, {found}"):
        unpack(values, mask, shape)


@pytest.mark.parametrize("lost", ["x.weight", "x.weight_mask", "x.weight_shape"])
def test_a_packed_weight_has_all_three_parts(lost: str) -> None:
    tensors = encode_packed("x.weight", sparse((8, 8), 0.5)) | {"y.weight": torch.ones(3, 3)}
    check_parts(tensors, tensors.__getitem__)
    del tensors[lost]
    with pytest.raises(ValueError, match=rf"x\.weight is damaged: {lost} is missing"):
        check_parts(tensors, tensors.__getitem__)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_on_a_gpu_unpack_to_it() -> None:
    weight = sparse((33, 65), 0.5).cuda()
    parts = pack(weight)
    unpacked = unpack(parts["weight"].cuda(), parts["weight_mask"].cuda(), parts["weight_shape"])
    assert unpacked.is_cuda
    assert same_bits(unpacked.cpu(), weight.cpu())
