"""Linear layers computed by `sparse_kernel.cpp`, which g++ compiles.

Their weights are dense, or stored as kept values and one bit per weight.
It is an experiment, not part of the library: one vector at a time, x86 processors with AVX2 only.
"""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import nn

SOURCE = Path(__file__).with_name("sparse_kernel.cpp")
FLAGS = ("-O3", "-mavx2", "-mfma", "-mpopcnt", "-fopenmp", "-shared", "-fPIC")
PADDING = 32  # values behind the last one that the kernel may read
MULTIPLE = 64  # of the number of inputs

KINDS = ("dense_float32", "sparse_float32", "dense_bfloat16", "sparse_bfloat16")
"""The products: the layout of the weights, and their dtype."""


def kernel(folder: Path) -> ctypes.CDLL:
    """Compile the kernel into a folder.

    Raises:
        SystemExit: g++ is missing, or cannot compile it.
    """
    library = folder / "sparse_kernel.so"
    try:
        subprocess.run(["g++", *FLAGS, SOURCE, "-o", library], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"the kernel needs g++ and a processor with AVX2: {error}") from error
    return ctypes.CDLL(str(library))


def stored(matrix: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """Return the tensors in which a matrix `[out, in]` is stored."""
    layout, _, dtype = kind.partition("_")
    values = matrix.to(getattr(torch, dtype))
    if layout == "dense":
        return (values.contiguous(),)
    keep = matrix != 0
    masks = np.packbits(keep.numpy(), axis=1, bitorder="little").view(np.int64)
    starts = torch.zeros(len(matrix), dtype=torch.int64)
    starts[1:] = keep.sum(1).cumsum(0)[:-1]
    kept = torch.cat([values[keep], values.new_zeros(PADDING)])
    return kept, torch.from_numpy(masks.copy()), starts


def bytes_per_weight(kind: str, density: float) -> float:
    """Return how many bytes a product reads for each weight, zeros included."""
    size = 4 if kind.endswith("float32") else 2
    return size if kind.startswith("dense") else size * density + 1 / 8


class KernelLinear(nn.Module):
    """A linear layer without bias whose products the kernel computes.

    Args:
        weight: `[out, in]`, in float32.
        kind: One of `KINDS`.
        library: The compiled kernel.
    """

    def __init__(self, weight: torch.Tensor, kind: str, library: ctypes.CDLL) -> None:
        super().__init__()
        self.rows, self.columns = weight.shape
        if self.columns % MULTIPLE:
            raise ValueError(
                f"the kernel needs a multiple of {MULTIPLE} inputs, not {self.columns}"
            )
        self.tensors = stored(weight.detach(), kind)
        self.function = getattr(library, kind)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the products `[..., out]` of inputs `[..., in]`, one vector after the other."""
        vectors = inputs.reshape(-1, self.columns).contiguous()
        outputs = torch.empty(len(vectors), self.rows)
        weights = [ctypes.c_void_p(tensor.data_ptr()) for tensor in self.tensors]
        sizes = [ctypes.c_int64(self.rows), ctypes.c_int64(self.columns)]
        for vector, output in zip(vectors, outputs, strict=True):
            places = [ctypes.c_void_p(each.data_ptr()) for each in (vector, output)]
            self.function(*weights, *places, *sizes, torch.get_num_threads())
        return outputs.view(*inputs.shape[:-1], self.rows)


def use_kernel_(model: nn.Module, kind: str, library: ctypes.CDLL) -> None:
    """Replace the linear layers of a language model; the LM head stays dense, in the same dtype."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            is_head = module is model.get_output_embeddings()
            chosen = kind.replace("sparse", "dense") if is_head else kind
            setattr(model.get_submodule(parent), leaf, KernelLinear(module.weight, chosen, library))
