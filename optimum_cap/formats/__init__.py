"""Formats of weights on disk, as pure functions from tensors to tensors.

Packed and coded weights store a one-dimensional tensor under the name `x.weight` on purpose:
without this plugin, transformers then raises an error about its size, instead of finding no
`x.weight` and initialising it at random.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optimum_cap.formats import coded
from optimum_cap.formats.bits import Stored
from optimum_cap.formats.coded import is_coded
from optimum_cap.formats.packed import COMPANIONS, check_layout, pack, unpack

__all__ = [
    "FORMATS",
    "FORMAT_VERSION",
    "Format",
    "check_format_version",
    "check_parts",
    "coded",
    "decode",
    "decode_state_dict",
    "encode_coded",
    "encode_dense",
    "encode_packed",
    "is_coded",
    "is_coded_weight",
    "is_packable",
    "pack",
    "unpack",
]

FORMAT_VERSION = 2
"""Newest version of the file format that can be read. Newer files raise an error."""


def is_packable(name: str, weight: torch.Tensor) -> bool:
    """Whether a tensor is a weight matrix that may be stored packed or coded."""
    return name.endswith(".weight") and weight.ndim >= 2 and weight.is_floating_point()


def is_coded_weight(name: str, stored: Stored) -> bool:
    """Whether the tensor stored under a name is a coded weight."""
    return name.endswith(".weight") and is_coded(stored)


def encode_packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors to store for `name`, packed if that is smaller, else unchanged."""
    if is_packable(name, weight):
        parts = pack(weight)
        if sum(part.nbytes for part in parts.values()) < weight.nbytes:
            base = name.removesuffix("weight")
            return {base + part: tensor for part, tensor in parts.items()}
    return {name: weight}


def encode_coded(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensor to store for `name`, coded if that is smaller, else unchanged."""
    if is_packable(name, weight) and coded.can_be_coded(weight.dtype):
        stream = coded.encode(weight)
        if stream.nbytes < weight.nbytes:
            return {name: stream}
    return {name: weight}


def encode_dense(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensor unchanged, zeros included."""
    return {name: weight}


def decode(
    names: Iterable[str], read: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(name, weight)` for every weight of a file, decoded, sorted by name.

    Args:
        names: Names of all tensors in the file.
        read: Reads a tensor by name.

    Raises:
        ValueError: A packed or coded weight is damaged.
    """
    names = sorted(names)
    known = set(names)
    for name in names:
        if name.endswith(COMPANIONS):
            continue
        weight = read(name)
        if f"{name}_mask" in known:
            weight = unpack(weight, read(f"{name}_mask"), read(f"{name}_shape"), name)
        elif is_coded_weight(name, weight):
            weight = coded.decode(weight, name)
        yield name, weight


def decode_state_dict(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with its packed and coded weights decoded, and the rest unchanged.

    Args:
        tensors: Values by name. A weight is packed if its mask and its shape are present too.

    Raises:
        ValueError: A packed or coded weight is damaged.
    """
    stored = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    parts = {name: (name, f"{name}_mask", f"{name}_shape") for name in stored}
    packed = {name for name in stored if all(part in stored for part in parts[name])}
    encoded = packed | {name for name, value in stored.items() if is_coded_weight(name, value)}
    names = {part for name in encoded for part in parts[name] if part in stored}
    decoded = dict(decode(names, stored.__getitem__))
    return {
        name: decoded.get(name, value)
        for name, value in tensors.items()
        if name not in names or name in decoded
    }


def check_parts(stored: Mapping[str, Stored], read: Callable[[str], torch.Tensor]) -> None:
    """Check the packed and coded weights of a file, without reading their values.

    Args:
        stored: Dtype and shape of each tensor in the file by name.
        read: Reads a tensor by name.

    Raises:
        ValueError: A part is missing (transformers would initialise the weight at random), a weight
            with a mask is not a one-dimensional float tensor, mask and shape are inconsistent, or
            the head of a coded weight is damaged.
    """
    for name in sorted({name.rpartition("_")[0] for name in stored if name.endswith(COMPANIONS)}):
        parts = (name, f"{name}_mask", f"{name}_shape")
        if missing := [part for part in parts if part not in stored]:
            raise ValueError(f"{name} is damaged: {', '.join(missing)} is missing")
        dtype, dimensions = stored[name].dtype, len(stored[name].shape)
        if dimensions != 1 or dtype is None or not dtype.is_floating_point:
            raise ValueError(
                f"{name} is damaged: it has a mask, so its values must be floats in one "
                f"dimension, found {dimensions} dimensions of {dtype}"
            )
        check_layout(read(f"{name}_mask"), read(f"{name}_shape"), name)
    for name in sorted(stored):
        if is_coded_weight(name, stored[name]):
            coded.read_head(read(name), name)


def check_format_version(version: Any, name: str) -> None:
    """Raise a `ValueError` if this package cannot read the version of checkpoint `name`."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{name} has checkpoint format version {version!r}, but this optimum-cap "
            f"reads up to {FORMAT_VERSION}: upgrade optimum-cap"
        )


@dataclass(frozen=True)
class Format:
    """A format of weights on disk.

    Attributes:
        encode: Takes the name and the value of a tensor; returns the tensors to store, by name.
        needs_plugin: Whether transformers needs this plugin to load it.
        version: Version of its files.
        checks_tensors: Whether errors name the damaged tensor.
    """

    encode: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
    needs_plugin: bool
    version: int = 1
    checks_tensors: bool = False


FORMATS: dict[str, Format] = {
    "packed": Format(encode_packed, needs_plugin=True),
    "coded": Format(encode_coded, needs_plugin=True, version=2, checks_tensors=True),
    "dense": Format(encode_dense, needs_plugin=False),
}
