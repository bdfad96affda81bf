"""The coded format: exponents, masks and mantissas, each compressed where that saves space.

After pruning, sign and mantissa of the kept values are noise, but their exponents are not: few of
them are frequent. The bits of each kept value are therefore rotated left by one, which moves the
sign to the end, and split into bytes. The bytes of one significance are a stream, and so is the
mask. Each stream is one Zstandard frame (RFC 8878, https://www.rfc-editor.org/rfc/rfc8878), or
stored as it is if that is not larger. ZipNN (arXiv 2411.05239) separates exponents in the same way.

If most weights are kept, there is no mask: the exponents of all weights are a stream, in which
those that pruning set to zero have the byte 0.

All streams of a weight are one ordinary tensor of bytes, in chunks that can be decoded on their
own. `docs/checkpoint_format.md` specifies it. Decoding restores any tensor bit for bit.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash

from optimum_cap.formats.bits import Stored, as_bits, kept_positions, pool

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

T = TypeVar("T")

_MAGIC = b"CAP2"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_START = np.dtype([("magic", "S4"), ("dimensions", "<u4"), ("dtype", "S16"), ("chunk", "<u8")])
_SIZE = np.dtype("<u8")
_CHECKSUM = np.dtype("<u8")
_MAX_DIMENSIONS = 64
_CHUNK = 1 << 17  # weights, so that a chunk fits in the CPU cache; a multiple of 8
_SAMPLE = 4096  # bytes
# If more of the weights are kept, zeros among the exponents take less space than a mask; measured.
_MOSTLY_KEPT = 0.55

# ZSTD_c_literalCompressionMode, for which the module has no name, set to ZSTD_ps_enable
# (https://github.com/facebook/zstd/blob/v1.5.7/lib/zstd.h). With a step as long as a block, the
# encoder does not search for repetitions (the streams have none) and only codes single bytes by
# frequency (Huffman coding). The result is smaller and ten times as fast as any compression level.
_LITERAL_COMPRESSION_MODE = 1002
_HUFFMAN_ONLY = {
    zstd.CompressionParameter.strategy: zstd.Strategy.fast,
    zstd.CompressionParameter.target_length: 1 << 17,
    zstd.CompressionParameter.window_log: 17,
    zstd.CompressionParameter.hash_log: 6,
    _LITERAL_COMPRESSION_MODE: 1,
}


def encode(weight: torch.Tensor) -> torch.Tensor:
    """Code a weight.

    The bytes do not depend on the number of threads, but may depend on the version of libzstd.

    Args:
        weight: Floating-point tensor of any shape.

    Returns:
        uint8 `[bytes]`, on the CPU.
    """
    bits = as_bits(weight)
    bits = bits.view(f"<u{bits.itemsize}")
    chunks = _map(_encode_chunk, [bits[i : i + _CHUNK] for i in range(0, len(bits), _CHUNK)])
    table = np.zeros(len(chunks), _table_dtype(bits.itemsize))
    for row, (kept, streams) in zip(table, chunks, strict=True):
        row["checksum"] = xxhash.xxh3_64_intdigest(b"".join(streams))
        row["kept"] = kept
        row["mask"], *row["planes"] = map(len, streams)
    start = np.array((_MAGIC, weight.ndim, _NAMES[weight.dtype].encode(), _CHUNK), _START)
    head = start.tobytes() + np.array(weight.shape, _SIZE).tobytes() + table.tobytes()
    parts = [head, _checksum(head)]
    parts += [stream for _, streams in chunks for stream in streams]
    return torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)


def decode(stream: torch.Tensor, name: str = "weight") -> torch.Tensor:
    """Restore a coded weight.

    Args:
        stream: Return value of `encode`.
        name: Name of the weight, for the error message.

    Returns:
        The weight, in its own dtype and on the device of `stream`.

    Raises:
        ValueError: The stream is damaged.
    """
    head = read_head(stream, name)
    weight = np.zeros(prod(head.shape), dtype=f"<u{head.dtype.itemsize}")

    def fill(chunk: _Chunk) -> None:
        if not chunk.is_intact():
            raise ValueError(f"{name} is damaged: the checksum of its chunk {chunk.number} differs")
        start = chunk.number * head.chunk
        try:
            _decode_chunk(chunk, weight[start : start + head.chunk])
        except (ValueError, zstd.ZstdError) as error:
            raise ValueError(f"{name} is damaged: its chunk {chunk.number} has {error}") from None

    _map(fill, head.split(stream))
    bits = torch.from_numpy(weight.view(f"u{weight.itemsize}"))
    return bits.view(head.dtype).view(head.shape).to(stream.device)


class _Chunk(NamedTuple):
    """A chunk of a coded weight, with its entry in the table.

    Attributes:
        number: Its position in the weight, from 0.
        data: Its bytes.
        checksum: XXH3-64 of its bytes.
        kept: Number of kept weights.
        sizes: Bytes of its mask and of each plane.
    """

    number: int
    data: np.ndarray
    checksum: int
    kept: int
    sizes: list[int]

    def is_intact(self) -> bool:
        """Whether the bytes match the checksum."""
        return bool(xxhash.xxh3_64_intdigest(self.data.data) == self.checksum)


@dataclass(frozen=True)
class Head:
    """The head of a coded weight.

    Attributes:
        dtype: Dtype of the weight.
        shape: Shape of the weight.
        chunk: Number of weights in each chunk except the last.
        table: For each chunk, its `checksum`, the number of weights `kept`, and the bytes of its
            `mask` and `planes`.
        start: Position of the first chunk.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunk: int
    table: np.ndarray
    start: int

    def split(self, stream: torch.Tensor) -> list[_Chunk]:
        """Return the chunks of a coded weight with this head."""
        data, start = stream.cpu().numpy(), self.start
        chunks = []
        for number, (checksum, kept, mask, planes) in enumerate(self.table.tolist()):
            sizes = [mask, *planes]
            stop = start + sum(sizes)
            chunks.append(_Chunk(number, data[start:stop], checksum, kept, sizes))
            start = stop
        return chunks


def read_head(stream: torch.Tensor, name: str = "weight") -> Head:
    """Read and check the head of a coded weight.

    Args:
        stream: uint8 `[bytes]`; only the head is read.
        name: Name of the weight, for the error message.

    Raises:
        ValueError: It is damaged or not a coded weight.
    """
    data = stream.cpu().numpy()
    start = data[: _START.itemsize].tobytes()
    if len(start) < _START.itemsize or not start.startswith(_MAGIC):
        raise ValueError(f"{name} is damaged: it is not a coded weight, found {start[:4]!r}")
    [first] = np.frombuffer(start, _START)
    dtype = _DTYPES.get(first["dtype"].decode("latin1"))
    dimensions, chunk = int(first["dimensions"]), int(first["chunk"])
    if dtype is None or dimensions > _MAX_DIMENSIONS or not chunk or chunk % 8:
        raise ValueError(
            f"{name} is damaged: it has {dimensions} dimensions of {bytes(first['dtype'])!r} in "
            f"chunks of {chunk} weights"
        )
    middle = len(start) + dimensions * _SIZE.itemsize
    if middle > len(data):
        raise ValueError(f"{name} is damaged: it ends after {len(data)} bytes, in its shape")
    shape = tuple(data[len(start) : middle].view(_SIZE).tolist())
    columns = _table_dtype(dtype.itemsize)
    chunks = -(-prod(shape) // chunk)
    stop = middle + chunks * columns.itemsize
    if stop + _CHECKSUM.itemsize > len(data):
        raise ValueError(
            f"{name} is damaged: it ends after {len(data)} bytes, but shape {shape} needs {chunks} "
            "chunks"
        )
    if _checksum(data[:stop].data) != data[stop : stop + _CHECKSUM.itemsize].tobytes():
        raise ValueError(f"{name} is damaged: the checksum of its head differs")
    table = data[middle:stop].view(columns)
    head = Head(dtype, shape, chunk, table, stop + _CHECKSUM.itemsize)
    if (size := head.start + int(_chunk_bytes(table).sum())) != len(data):
        raise ValueError(f"{name} is damaged: its head describes {size} bytes, found {len(data)}")
    return head


def is_intact(stream: torch.Tensor) -> bool:
    """Whether a coded weight matches its checksums; faster than decoding it."""
    try:
        head = read_head(stream)
    except ValueError:
        return False
    return all(chunk.is_intact() for chunk in head.split(stream))


def is_coded(stored: Stored) -> bool:
    """Whether a tensor stored under the name of a weight is coded."""
    return stored.dtype == torch.uint8 and len(stored.shape) == 1


def can_be_coded(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype can be coded."""
    return dtype in _NAMES


def _table_dtype(planes: int) -> np.dtype:
    """Return the dtype of a chunk's table row, for weights of `planes` bytes."""
    sizes = [("kept", "<u4"), ("mask", "<u4"), ("planes", "<u4", (planes,))]
    return np.dtype([("checksum", "<u8"), *sizes])


def _chunk_bytes(table: np.ndarray) -> np.ndarray:
    """Return the bytes of each chunk of a table, or of one row of it."""
    return table["mask"] + table["planes"].sum(axis=-1, dtype=np.int64)


def _encode_chunk(bits: np.ndarray) -> tuple[int, list[bytes]]:
    """Return the number of kept weights and the streams of a chunk: mask, then planes."""
    keep = bits != 0
    positions = np.flatnonzero(keep)
    values = bits if len(positions) == len(bits) else bits.take(positions)  # faster than an index
    lowest = (values << 1) | (values >> (8 * bits.itemsize - 1))
    others = (values >> (8 * plane - 1) for plane in range(1, bits.itemsize))
    planes = [plane.astype(np.uint8) for plane in (lowest, *others)]
    mask = b""
    if len(values) < len(bits):
        if len(values) > _MOSTLY_KEPT * len(bits) and planes[-1].all():
            of_all = np.zeros(len(bits), np.uint8)
            of_all[positions] = planes[-1]
            planes[-1] = of_all
        else:
            mask = _compress(np.packbits(keep, bitorder="little"))
    return len(values), [mask, *map(_compress, planes)]


def _decode_chunk(chunk: _Chunk, weights: np.ndarray) -> None:
    """Write the weights of a chunk to `weights`, which must be zero before."""
    kept, start = chunk.kept, 0
    streams = []
    for size in chunk.sizes:
        streams.append(chunk.data[start : start + size])
        start += size
    coded_mask, *lower, last = streams
    places: np.ndarray | slice = slice(None)
    if kept == len(weights):
        highest = _decompress(last, kept)
    elif len(coded_mask):
        mask = _decompress(coded_mask, -(-len(weights) // 8))
        if len(weights) % 8 and mask[-1] >> (len(weights) % 8):
            raise ValueError("a mask that keeps weights beyond its end")
        places = kept_positions(mask, len(weights))
        highest = _decompress(last, kept)
    else:
        of_all = _decompress(last, len(weights))
        places = np.flatnonzero(of_all != 0)  # much faster than of the bytes
        highest = of_all.take(places)
    if isinstance(places, np.ndarray) and len(places) != kept:
        which = "a mask that keeps" if len(coded_mask) else "a last plane with"
        raise ValueError(f"{which} {len(places)} of {len(weights)} weights, not {kept}")
    # Operations on arrays of one dtype are much faster than those that cast on the way.
    planes = [*(_decompress(plane, kept) for plane in lower), highest]
    lowest, *others = (plane.astype(weights.dtype) for plane in planes)
    values = (lowest >> 1) | (lowest << (8 * weights.itemsize - 1))
    for place, plane in enumerate(others, start=1):
        plane <<= 8 * place - 1
        values |= plane
    weights[places] = values


def _compress(values: np.ndarray) -> bytes:
    """Return a stream of bytes as a Zstandard frame, or unchanged if that is not larger.

    A long stream is first tried on its start, because most mantissa streams are noise.
    """
    for part in (values[:_SAMPLE], values) if len(values) > 4 * _SAMPLE else (values,):
        compressor = zstd.ZstdCompressor(options=_HUFFMAN_ONLY)
        frame = compressor.compress(part.data, zstd.ZstdCompressor.FLUSH_FRAME)
        if len(frame) >= len(part):
            return values.tobytes()
    return frame


def _decompress(stream: np.ndarray, size: int) -> np.ndarray:
    """Return the original stream of `size` bytes passed to `_compress`."""
    if len(stream) == size:
        return stream
    decompressor = zstd.ZstdDecompressor()
    data = decompressor.decompress(stream.data, max_length=size + 1)
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"a stream of {len(data)} bytes, not {size}")
    return np.frombuffer(data, np.uint8)


def _checksum(data: bytes | memoryview) -> bytes:
    return np.array(xxhash.xxh3_64_intdigest(data), _CHECKSUM).tobytes()


def _map(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Apply a function to the chunks of a weight; numpy and Zstandard release the GIL."""
    threads = min(torch.get_num_threads(), len(items) // 4)
    if threads < 2:
        return [function(item) for item in items]
    return list(pool(threads).map(function, items))
