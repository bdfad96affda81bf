"""Rates of a device: from data sheets, or measured on this machine in a few seconds."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

# Achieved fractions of the data sheet peaks. Assumed, not measured: 60 % in matrix products of
# models with billions of parameters, half of that in fused attention over short sequences, 80 % of
# the bandwidth in element-wise kernels, 20 % of float32 in factorizations.
MATMUL_UTILISATION = 0.6
ATTENTION_UTILISATION = 0.3
BANDWIDTH_UTILISATION = 0.8
FACTOR_UTILISATION = 0.2
LAUNCH = 1e-5  # seconds between two kernel launches from Python; assumed
BYTES_PER_SORTED = 160  # an argsort takes about 10 passes over keys and indices; assumed
LOADING = 2e9  # bytes per second from a local solid-state disk; assumed

MEASURED = "measured"
_LARGEST = 4096  # channels; larger matrices take longer to measure at the same rates
_LEAST_SECONDS = 0.15  # per measurement
ROWS = {"cpu": 2048, "cuda": 65536}
"""Tokens per batch of scoring, by type of device (`optimum_cap/scoring/batch_sizes.py`)."""
LAYERWISE_ROWS = {"cpu": 2048, "cuda": 16384}
"""Tokens per batch of layer-by-layer passes (`optimum_cap/pruning/activations.py`)."""


@dataclass(frozen=True)
class Hardware:
    """Sustained rates of one device, and the number of devices.

    Attributes:
        name: Name as passed by the user.
        count: Number of devices.
        memory: Bytes per device.
        matmul: Operations per second in matrix products with weights.
        attention: Operations per second in attention.
        float32: Operations per second in float32 matrix products.
        factor: Operations per second in inverse Cholesky factorizations in float32.
        bandwidth: Bytes per second read from or written to memory.
        ranked: Weights sorted per second.
        launch: Seconds per small operation.
        kind: Type of the torch device.
        bytes_per_value: Bytes per weight and activation; `None` uses the model's dtype.
        loading: Bytes per second read from disk.
        source: Source of the numbers.
    """

    name: str
    count: int
    memory: float
    matmul: float
    attention: float
    float32: float
    factor: float
    bandwidth: float
    ranked: float
    launch: float
    kind: str
    bytes_per_value: int | None
    loading: float
    source: str


@dataclass(frozen=True)
class DataSheet:
    """Peak rates of a device.

    Attributes:
        half: Dense bfloat16 or float16 operations per second, accumulated in float32.
        float32: Operations per second in float32, without tensor cores.
        memory: Memory in bytes.
        bandwidth: Memory bandwidth in bytes per second.
        source: URL of the data sheet.
    """

    half: float
    float32: float
    memory: float
    bandwidth: float
    source: str


def find_hardware(name: str, size: "Size") -> Hardware:
    """Return the rates of a device by its name.

    Args:
        name: A device of `DATA_SHEETS`, with a count if there are several, as in `"h100x8"`; or
            `"measured"` for this machine.
        size: Sizes to measure with.

    Raises:
        ValueError: The name is unknown.
    """
    if name == MEASURED:
        return measure(size)
    match = re.fullmatch(r"(.+)x([1-9]\d*)", name.lower())
    single = name.lower() in DATA_SHEETS  # the digits of rtx4090 are not a count
    device, count = (name.lower(), 1) if single or not match else (match[1], int(match[2]))
    sheet = DATA_SHEETS.get(device)
    if sheet is None:
        raise ValueError(
            f"unknown hardware {name!r}: choose from {MEASURED}, {', '.join(DATA_SHEETS)}, with a "
            "count if there are several, as in h100x8"
        )
    bandwidth = sheet.bandwidth * BANDWIDTH_UTILISATION
    return Hardware(
        name=name,
        count=count,
        memory=sheet.memory,
        matmul=sheet.half * MATMUL_UTILISATION,
        attention=sheet.half * ATTENTION_UTILISATION,
        float32=sheet.float32 * MATMUL_UTILISATION,
        factor=sheet.float32 * FACTOR_UTILISATION,
        bandwidth=bandwidth,
        ranked=bandwidth / BYTES_PER_SORTED,
        launch=LAUNCH,
        kind="cuda",
        bytes_per_value=None,
        loading=LOADING,
        source=(
            f"{sheet.source}; assumed to reach {MATMUL_UTILISATION:.0%} of the peak in products, "
            f"{ATTENTION_UTILISATION:.0%} in attention, {BANDWIDTH_UTILISATION:.0%} of the "
            "bandwidth"
        ),
    )


@dataclass(frozen=True)
class Size:
    """Model sizes to measure the hardware with, because rates depend on them.

    Attributes:
        hidden: Channels of the hidden state.
        wide: Channels of the MLP.
        heads: Number of attention heads.
        tokens: Tokens per example.
    """

    hidden: int
    wide: int
    heads: int
    tokens: int


def measure(size: Size, clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Measure the rates of this machine: its first CUDA device, else the CPU.

    They are measured in the dtype that models run in: bfloat16 on a GPU, and float32 on the CPU,
    where half-precision weights are converted (`float32_on_cpu`, `optimum_cap/models/modes.py`).

    Args:
        size: Sizes to measure with.
        clock: Returns the time in seconds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, wide = min(size.hidden, _LARGEST), min(size.wide, _LARGEST)
    rows = max(1, ROWS[device.type] // size.tokens) * size.tokens
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    inputs, square, up = random(rows, hidden), random(hidden, hidden), random(wide, hidden)
    down, wide_inputs = random(hidden, wide), random(rows, wide)
    dims = (rows // size.tokens, size.heads, size.tokens, max(1, hidden // size.heads))
    query, key, value = random(*dims), random(*dims), random(*dims)
    float32_inputs = inputs.float()
    gram = float32_inputs.T @ float32_inputs + rows * torch.eye(hidden, device=device)
    importance = random(max(1, rows // 8), hidden, dtype=torch.float32)
    small = random(8)

    def seconds(work: Callable[[], object]) -> float:
        return _seconds(work, device, clock)

    def products() -> None:
        nn.functional.linear(inputs, square)
        nn.functional.linear(inputs, up)
        nn.functional.linear(wide_inputs, down)

    def factor() -> None:
        lower = torch.linalg.cholesky(gram)
        torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

    def between_products() -> None:
        """Run the element-wise operations between the matrix products of a Llama layer once."""
        scale = inputs.float().square().mean(dim=-1, keepdim=True).rsqrt().to(dtype)
        torch.add(inputs, inputs * scale * inputs[0])
        torch.mul(nn.functional.silu(wide_inputs), wide_inputs)

    moved = 10 * inputs.numel() + 5 * wide_inputs.numel()
    with torch.no_grad():
        products_time = seconds(products)
        attention_time = seconds(
            lambda: nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        )
        gram_time = seconds(lambda: float32_inputs.T @ float32_inputs)
        factor_time = seconds(factor)
        moved_time = seconds(between_products)
        ranked_time = seconds(lambda: importance.argsort(dim=1, stable=True))
        launch_time = seconds(lambda: small + small)
    matmul = 2 * rows * (hidden**2 + 2 * hidden * wide) / products_time
    return Hardware(
        name=MEASURED,
        count=torch.cuda.device_count() if device.type == "cuda" else 1,
        memory=_memory(device),
        matmul=matmul,
        attention=4 * rows * size.tokens * hidden / attention_time,
        float32=2 * rows * hidden**2 / gram_time,
        factor=4 / 3 * hidden**3 / factor_time,
        bandwidth=moved * inputs.element_size() / moved_time,
        ranked=importance.numel() / ranked_time,
        launch=launch_time,
        kind=device.type,
        bytes_per_value=inputs.element_size(),
        loading=LOADING,
        source=(
            f"this machine, {device_name(device)}: {matmul / 1e9:,.0f} GFLOP/s in "
            f"{str(dtype).removeprefix('torch.')} products"
        ),
    )


def _seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Return the median time of one call, after a warm-up call."""

    def run() -> float:
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    run()
    times = [run()]
    while sum(times) < _LEAST_SECONDS or len(times) < 3:
        times.append(run())
    return statistics.median(times)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


DATA_SHEETS: dict[str, DataSheet] = {
    "h100": DataSheet(
        989e12, 67e12, 80e9, 3.35e12, "https://www.nvidia.com/en-us/data-center/h100/ (SXM)"
    ),
    "h200": DataSheet(
        989e12, 67e12, 141e9, 4.8e12, "https://www.nvidia.com/en-us/data-center/h200/ (SXM)"
    ),
    "a100-80gb": DataSheet(
        312e12, 19.5e12, 80e9, 2.039e12, "https://www.nvidia.com/en-us/data-center/a100/ (SXM)"
    ),
    "a100-40gb": DataSheet(
        312e12, 19.5e12, 40e9, 1.555e12, "https://www.nvidia.com/en-us/data-center/a100/ (PCIe)"
    ),
    "l40s": DataSheet(
        362e12, 91.6e12, 48e9, 0.864e12, "https://www.nvidia.com/en-us/data-center/l40s/"
    ),
    "rtx4090": DataSheet(
        165.2e12,
        82.6e12,
        24e9,
        1.008e12,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
}
