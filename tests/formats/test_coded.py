"""The coded form is lossless for any float tensor, small, repeatable, and finds damage."""

import random

import pytest
import torch
import xxhash
from helpers.tensors import same_bits, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_cap.formats import check_parts, coded, decode, encode_coded

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 13), min_size=0, max_size=4),
    sparsity=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_round_trip(shape: list[int], sparsity: float, dtype: torch.dtype, seed: int) -> None:
    weight = sparse(tuple(shape), sparsity, seed).to(dtype)
    before = weight.clone()
    assert same_bits(coded.decode(coded.encode(weight)), weight)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bit_patterns_survive(dtype: torch.dtype) -> None:
    """Among them NaNs with payloads, infinities, both zeros and denormal values."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    highest = patterns.view(-1, 2).repeat_interleave(max(1, dtype.itemsize // 2), dim=1)
    weight = highest.contiguous().view(dtype)
    assert same_bits(coded.decode(coded.encode(weight)), weight)


# Of many chunks, with and without a rest; of a single one; of one weight; of none.
@pytest.mark.parametrize("shape", [(1003, 1999), (8, 1 << 17), (5, 7), (1, 1), (0, 4)])
def test_threads_do_not_matter(shape: tuple[int, int]) -> None:
    weight = sparse(shape, 0.4).to(torch.bfloat16)
    streams = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        streams.append(coded.encode(weight))
        assert same_bits(coded.decode(streams[-1]), weight)
    assert same_bits(streams[0], streams[1])
    assert same_bits(streams[0], streams[2])


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.5])
def test_equal_weights_take_almost_nothing(fill: float) -> None:
    weight = torch.full((512, 512), fill, dtype=torch.bfloat16)
    stream = coded.encode(weight)
    assert same_bits(coded.decode(stream), weight)
    assert len(stream) < 300


def test_views_are_coded_as_they_look() -> None:
    weight = sparse((6, 10), 0.5).t()
    assert same_bits(coded.decode(coded.encode(weight)), weight.contiguous())


def entropy(counts: torch.Tensor) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.7])
def test_size_is_close_to_the_entropy(sparsity: float) -> None:
    weight = sparse((512, 1024), sparsity).to(torch.bfloat16)
    kept = weight[weight != 0]
    exponents = entropy(((kept.view(torch.int16) >> 7) & 255).int().bincount().double())
    mask = entropy(torch.tensor([kept.numel(), weight.numel() - kept.numel()]).double())
    bound = (kept.numel() * (8 + exponents) + weight.numel() * mask) / 8
    assert len(coded.encode(weight)) < 1.02 * bound


@pytest.mark.parametrize(("n", "m", "bits"), [(2, 4, 0.647), (4, 8, 0.767), (1, 4, 0.5)])
def test_the_mask_of_a_pattern_costs_its_entropy(n: int, m: int, bits: float) -> None:
    """`bits` per weight: the logarithm of the number of masks of a group, and of bytes of those."""
    weight = torch.rand(4096, m, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    weight.scatter_(1, weight.float().argsort(1)[:, : m - n], 0)
    kept = coded.encode(weight[weight != 0])
    assert len(coded.encode(weight)) - len(kept) < weight.numel() / 8 * bits * 1.02 + 150


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_mask_if_most_weights_are_kept(dtype: torch.dtype) -> None:
    weight = torch.rand((300, 400), generator=torch.Generator().manual_seed(0)) + 1
    weight[sparse((300, 400), 0.2) == 0] = 0
    weight = weight.to(dtype)
    assert coded.read_head(stream := coded.encode(weight)).table["mask"] == 0
    assert same_bits(coded.decode(stream), weight)
    # The last byte of a denormal value may be that of a zero.
    tiny = weight.view(torch.uint8)
    tiny[0, : dtype.itemsize] = 0
    tiny[0, 0] = 1
    stream = coded.encode(weight)
    assert (coded.read_head(stream).table["mask"] > 0) == (dtype.itemsize > 1)
    assert same_bits(coded.decode(stream), weight)


def test_only_matrices_that_shrink_are_coded() -> None:
    noise = torch.randint(1, 1 << 15, (8, 8), dtype=torch.int16).view(torch.float16)
    norm, bias = torch.zeros(64), torch.zeros(8, 8)
    for name, tensor in (("x.weight", noise), ("norm.weight", norm), ("x.bias", bias)):
        assert encode_coded(name, tensor)[name] is tensor
    embeddings = sparse((64, 64), 0).bfloat16()
    [(name, stream)] = encode_coded("x.weight", embeddings).items()
    assert stream.nbytes < 0.85 * embeddings.nbytes
    [(_, weight)] = decode([name], {name: stream}.__getitem__)
    assert same_bits(weight, embeddings)


def test_every_flipped_bit_is_found() -> None:
    stream = coded.encode(sparse((9, 11), 0.5).bfloat16())
    for position in range(8 * len(stream)):
        damaged = stream.clone()
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"^layer\.weight is damaged: "):
            coded.decode(damaged, "layer.weight")


def test_flipped_bits_of_many_chunks_are_found() -> None:
    stream = coded.encode(sparse((4, 1 << 17), 0.5).bfloat16())
    rng = random.Random(0)
    for position in rng.sample(range(8 * len(stream)), 100):
        damaged = stream.clone()
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"its chunk [0-7] differs|its head|it is not"):
            coded.decode(damaged)


def test_damaged_heads_are_refused() -> None:
    stream = coded.encode(sparse((5, 5), 0.5))
    tensors = {"x.weight": stream}
    check_parts(tensors, tensors.__getitem__)
    for damaged, message in (
        (stream[:0], "it is not a coded weight, found b''"),
        (stream.roll(1), "it is not a coded weight"),
        (stream[:40], "it ends after 40 bytes, in its shape"),
        (stream[:60], r"it ends after 60 bytes, but shape \(5, 5\) needs 1 chunks"),
        (stream[:-1], r"its head describes \d+ bytes, found \d+"),
        (torch.cat([stream, stream[:1]]), r"its head describes \d+ bytes, found \d+"),
    ):
        tensors["x.weight"] = damaged
        with pytest.raises(ValueError, match=rf"x\.weight is damaged: {message}"):
            check_parts(tensors, tensors.__getitem__)
    for position, value in ((4, 65), (8, 90), (24, 1)):  # dimensions, dtype, chunk
        damaged = stream.clone()
        damaged[position] = value
        with pytest.raises(ValueError, match=r"it has .* dimensions of b'.*' in chunks of"):
            coded.read_head(damaged)


def signed(stream: torch.Tensor, head: coded.Head) -> torch.Tensor:
    """Return a stream of one chunk with checksums that fit it, as another writer would."""
    stream = stream.clone()
    end = head.start - 8
    places = ((end - head.table.itemsize, head.start, len(stream)), (end, 0, end))
    for target, first, last in places:
        digest = xxhash.xxh3_64_intdigest(stream[first:last].numpy())
        value = digest.to_bytes(8, "little")
        stream[target : target + 8] = torch.tensor(list(value), dtype=torch.uint8)
    return stream


def test_chunks_that_were_written_wrongly_are_refused() -> None:
    stream = coded.encode(sparse((5, 5), 0.5).bfloat16())
    start = coded.read_head(stream).start  # of the mask, which is stored as it is
    for position, bit, message in (
        (start, 1, r"keeps \d+ of 25"),
        (start + 3, 128, "keeps weights beyond its end"),
    ):
        damaged = stream.clone()
        damaged[position] ^= bit
        head = coded.read_head(stream)
        assert head.table["mask"] == 4
        with pytest.raises(ValueError, match=rf"its chunk 0 has a mask that {message}"):
            coded.decode(signed(damaged, head))
    head = coded.read_head(stream := coded.encode(sparse((5, 5), 0.2).bfloat16()))
    assert head.table["mask"] == 0  # zeros are in the last plane, which is stored as it is
    damaged = stream.clone()
    zero = (damaged[-25:] == 0).nonzero()[0] - 25
    damaged[zero] = 1
    with pytest.raises(ValueError, match=r"its chunk 0 has a last plane with \d+ of 25 weights"):
        coded.decode(signed(damaged, head))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_on_a_gpu_is_decoded_to_it() -> None:
    weight = sparse((33, 65), 0.5).cuda()
    decoded = coded.decode(coded.encode(weight).cuda())
    assert decoded.is_cuda
    assert same_bits(decoded.cpu(), weight.cpu())
