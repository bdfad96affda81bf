"""Products of a pruned matrix and one vector, as decoding at batch size 1 has them.

Several copies of each matrix take turns, so that none is in a cache, and all methods take turns.
The ratio says how much faster than the dense product a method is; *bound* is the ratio of the bytes
that each has to read, the most that can be gained where memory limits both.

With `--kernel`, the methods of `sparse_kernel.cpp` take part, which g++ compiles; with `--model`,
tokens per second of a whole model are measured instead, by torch and by each of these methods.

    python benchmarks/sparse_products.py
    python benchmarks/sparse_products.py --sparsity 0.7 --threads 2 --runs 15
    python benchmarks/sparse_products.py --clock cpu --threads 1   # on a busy machine
    python benchmarks/sparse_products.py --kernel --threads 2
    python benchmarks/sparse_products.py --model DIR --threads 2   # a pruned model, saved as dense
"""

import argparse
import ctypes
import importlib.util
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sparse_kernel import KINDS, KernelLinear, bytes_per_weight, kernel, use_kernel_
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

# Of SmolLM2-135M (key and value, query and output, gate and up, down) and of larger models.
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (4096, 4096), (14336, 4096))
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SLICE = 0.03  # seconds that one measurement repeats a product for
NEW_TOKENS = 16


def random_matrix(rows: int, columns: int, sparsity: float) -> torch.Tensor:
    matrix = torch.randn(rows, columns)
    return matrix.masked_fill_(torch.rand(rows, columns) < sparsity, 0)


def csr(matrix: torch.Tensor) -> torch.Tensor:
    sparse = matrix.to_sparse_csr()
    rows, columns = sparse.crow_indices().int(), sparse.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, sparse.values(), sparse.shape)


def methods(
    matrices: list[torch.Tensor], vector: torch.Tensor, library: ctypes.CDLL | None
) -> dict[str, tuple[Callable[[], object], float]]:
    """Return for each method a product with the next of the matrices, and its bytes per weight."""
    kept = sum(int(matrix.count_nonzero()) for matrix in matrices)
    density = kept / sum(matrix.numel() for matrix in matrices)
    dense, sparse = itertools.cycle(matrices), itertools.cycle([csr(m) for m in matrices])
    found: dict[str, tuple[Callable[[], object], float]] = {
        "dense": (lambda: next(dense) @ vector, 4),
        "torch CSR": (lambda: next(sparse) @ vector, 8 * density),
    }
    if importlib.util.find_spec("scipy") is not None:
        from scipy.sparse import csr_array

        numbers = vector.numpy()
        arrays = itertools.cycle([csr_array(matrix.numpy()) for matrix in matrices])
        found["scipy CSR"] = (lambda: next(arrays) @ numbers, 8 * density)
    if library is not None:
        for kind in KINDS:
            layers = [KernelLinear(matrix, kind, library) for matrix in matrices]
            _check(layers[0], matrices[0], vector, kind)
            turns = itertools.cycle(layers)
            found[kind] = (partial(_next_product, turns, vector), bytes_per_weight(kind, density))
    return found


def _next_product(layers: "itertools.cycle[KernelLinear]", vector: torch.Tensor) -> torch.Tensor:
    return next(layers)(vector)


def _check(layer: KernelLinear, matrix: torch.Tensor, vector: torch.Tensor, kind: str) -> None:
    """Check the first product of the kernel."""
    dtype = getattr(torch, kind.partition("_")[2])
    torch.testing.assert_close(layer(vector), matrix.to(dtype).float() @ vector, atol=1e-3, rtol=0)


def decode(model: PreTrainedModel, clock: Callable[[], float]) -> float:
    """Return the tokens per second of decoding after a prompt of 8 tokens."""
    prompt = torch.arange(3, 11)[None]
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    start = clock()
    for _ in range(NEW_TOKENS):
        model(input_ids=prompt[:, :1], past_key_values=cache)
    return NEW_TOKENS / (clock() - start)


@torch.no_grad()
def measure_model(
    folder: Path, runs: int, clock: Callable[[], float], library: ctypes.CDLL
) -> None:
    """Print the tokens per second of a pruned model with each kind of products."""
    models = {}
    for kind in ("torch", *KINDS):
        models[kind] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if kind != "torch":
            use_kernel_(models[kind], kind, library)
    tokens = torch.arange(3, 11)[None]
    logits = {kind: model(input_ids=tokens).logits[0, -1] for kind, model in models.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in models}
    for run in range(runs + 1):
        for kind, model in models.items():
            rate = decode(model, clock)
            if run:
                rates[kind].append(rate)
    for kind, of_kind in rates.items():
        dense = "torch" if kind == "torch" else kind.replace("sparse", "dense")
        columns = []
        for base in dict.fromkeys(("torch", dense)):
            ratios = [a / b for a, b in zip(of_kind, rates[base], strict=True)]
            columns.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"times {base}"
            )
        difference = (logits[kind] - logits["torch"]).abs().max()
        print(
            f"{kind:16} {statistics.median(of_kind):6.1f} tokens per second, {', '.join(columns)}; "
            f"logits differ by {difference:.0e}",
            flush=True,
        )


def seconds(run: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        run()
    return (clock() - start) / times


def copying_rate(runs: int, clock: Callable[[], float]) -> float:
    """Return how many bytes a second are read and written."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    taken = [seconds(lambda: target.copy_(source), 1, clock) for _ in range(runs)]
    return 2 * source.nbytes / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu needs --threads 1")
    parser.add_argument("--kernel", action="store_true", help="also measure sparse_kernel.cpp")
    parser.add_argument("--model", type=Path, help="measure this pruned model instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    # Sparse tensors of torch announce that they are experimental.
    warnings.filterwarnings("ignore", category=UserWarning)
    clock = CLOCKS[arguments.clock]
    library = None
    if arguments.kernel or arguments.model is not None:
        with tempfile.TemporaryDirectory() as folder:
            library = kernel(Path(folder))
        if arguments.model is not None:
            measure_model(arguments.model, arguments.runs, clock, library)
            return

    print(f"copying: {copying_rate(arguments.runs, clock) / 1e9:.1f} GB/s, read and written")
    for rows, columns in SHAPES:
        number = max(2, min(64, 2**26 // (rows * columns)))
        matrices = [random_matrix(rows, columns, arguments.sparsity) for _ in range(number)]
        products = methods(matrices, torch.randn(columns), library)
        times = {
            name: max(1, int(SLICE / max(seconds(run, number, clock), 1e-7)))
            for name, (run, _) in products.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(arguments.runs):
            for name, (run, _) in products.items():
                taken[name].append(seconds(run, times[name], clock))
        for name, of_method in taken.items():
            ratios = [a / b for a, b in zip(taken["dense"], of_method, strict=True)]
            print(
                f"{rows} x {columns:5} {name:15} {1e6 * statistics.median(of_method):9.1f} us, "
                f"{statistics.median(ratios):.2f} times as fast as dense "
                f"({min(ratios):.2f} to {max(ratios):.2f}), bound {4 / products[name][1]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
