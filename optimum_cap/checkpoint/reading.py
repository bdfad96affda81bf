"""Reads JSON and safetensors files that may be damaged; every error names the file."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from optimum_cap.formats import check_parts, coded, is_coded_weight
from optimum_cap.text import printable

_AGAIN = "download or copy it again"
_MAX_HEADER = 100_000_000  # bytes, as in safetensors
# Bits per element and torch dtype; only whole bytes can be packed.
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: The file is not UTF-8, not JSON or not an object; the message names it.
        OSError: The file cannot be read.
    """
    return _parse(path.read_bytes(), path)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is damaged (its JSON is nested too deeply): {_AGAIN}") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer with thousands of digits
        reason = printable(str(error))
        raise ValueError(f"{path} is damaged (it is not valid JSON: {reason}): {_AGAIN}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} is damaged (it holds a {type(values).__name__}, not a JSON object): {_AGAIN}"
        )
    return values


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as described in the header of a safetensors file.

    Attributes:
        dtype: Its dtype; `None` if torch has none.
        shape: Its shape.
        start: Position of its first byte in the file.
        stop: Position after its last byte.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a safetensors file by name, without reading them.

    Raises:
        ValueError: The file is truncated, damaged or not a safetensors file; the message names it.
        OSError: The file cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        header_size = int.from_bytes(first, "little")
        if len(first) < 8 or header_size > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{file} is damaged ({size} bytes, with an incomplete header): {_AGAIN}"
            )
        header = _parse(stream.read(header_size), file)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if (tensor := _stored_tensor(entry, 8 + header_size)) is None:
            raise ValueError(
                f"{file} is damaged (its header has a wrong entry for {printable(name)}): {_AGAIN}"
            )
        tensors[name] = tensor
    expected = max((tensor.stop for tensor in tensors.values()), default=8 + header_size)
    if size != expected:
        raise ValueError(
            f"{file} is damaged (its header describes {expected} bytes, but it has {size}): "
            f"{_AGAIN}"
        )
    return tensors


def _stored_tensor(entry: Any, offset: int) -> StoredTensor | None:
    """Return an entry of a header, with positions relative to `offset`; `None` if invalid."""
    if not isinstance(entry, dict):
        return None
    name, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(name, str) or name not in _DTYPES:
        return None
    if not is_shape(shape) or not is_shape(ends) or len(ends) != 2:
        return None
    bits, dtype = _DTYPES[name]
    if math.prod(shape) * bits != 8 * (ends[1] - ends[0]):
        return None
    return StoredTensor(dtype, tuple(shape), offset + ends[0], offset + ends[1])


def is_shape(values: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of sizes."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
        for value in values
    )


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file, as `safe_open` does.

    Raises:
        ValueError: The file is damaged, or a weight in it is; the message names the file.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        reason = printable(str(error))
        raise ValueError(f"{file} is damaged ({reason}): {_AGAIN}") from error


def validate_shards(files: list[Path]) -> None:
    """Check that every file matches its header, and that coded weights match their checksums.

    Raises:
        ValueError: A file is truncated, damaged or not a safetensors file; the message names it.
    """
    for file in files:
        validate_tensors(file, read_header(file))
        if damaged := damaged_tensors(file, {}):
            raise ValueError(
                f"{file}: {printable(', '.join(damaged))} is damaged (its checksums differ); "
                f"{_AGAIN}"
            )


def validate_tensors(file: Path, header: Mapping[str, StoredTensor]) -> None:
    """Check the packed and coded weights of a file, without reading their values.

    Raises:
        ValueError: The file or a weight is damaged; the message names the file.
    """
    with open_tensors(file) as tensors:
        try:
            check_parts(header, tensors.get_tensor)
        except ValueError as error:
            reason = printable(str(error))
            raise ValueError(f"{file}: {reason}; {_AGAIN}") from None


def tensor_checksums(file: Path) -> dict[str, str]:
    """Return the XXH3-64 of each tensor in a file by name, except for coded weights.

    Coded weights contain their own checksums, which `damaged_tensors` also verifies.
    """
    with open_tensors(file) as tensors:
        stored = {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}
        return {
            name: _checksum(tensor)
            for name, tensor in stored.items()
            if not is_coded_weight(name, tensor)
        }


def damaged_tensors(file: Path, checksums: Mapping[str, str]) -> list[str]:
    """Return the names of the tensors in a file that have changed since it was saved.

    Args:
        file: The file.
        checksums: Return value of `tensor_checksums` when the file was saved; other tensors are
            checked only if they are coded.

    Raises:
        ValueError: The header is damaged; the message names the file.
    """
    damaged = []
    with open_tensors(file) as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            if is_coded_weight(name, tensor):
                intact = coded.is_intact(tensor)
            else:
                intact = name not in checksums or checksums[name] == _checksum(tensor)
            damaged += [] if intact else [name]
    return damaged


def _checksum(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return xxhash.xxh3_64_hexdigest(data.data)
