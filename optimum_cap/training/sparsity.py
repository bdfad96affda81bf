"""Masks that keep the zeros of a pruned model during training."""

import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.hooks import RemovableHandle

from optimum_cap.checkpoint import names_now
from optimum_cap.models import has_peft_layers

if torch.distributed.is_available():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

_LEAST_ZEROS = 0.01  # fraction from which a weight counts as pruned, if there is no record

# Numbers of weights processed at a time, multiples of 8.
_CHUNK = 1 << 20  # on CPUs, so that the mask fits into the cache
_LARGE_CHUNK = 1 << 26  # elsewhere, so that a mask takes 64 MB at most
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size

# What FSDP, torch.compile and PEFT insert into parameter names.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|base_layer|original_module)\."
)


def keep_sparsity(model: nn.Module, optimizer: Any) -> "SparsityKeeper":
    """Keep the zeros of a pruned model from now on, through every optimizer step.

    Weights that are zero now stay zero: their gradients are masked during the backward pass, and
    the weights after each step. This works with any optimizer, weight decay, existing momentum, and
    gradient accumulation.

    Args:
        model: A pruned model, which may be wrapped by DDP, FSDP or `torch.compile`. With FSDP, call
            this after wrapping the model.
        optimizer: Its optimizer, which may be prepared by `accelerate`.

    Returns:
        The masks. `remove()` stops masking; a `with` statement calls it at the end.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: The model has no zeros, has lost zeros since it was pruned, is offloaded, or has
            PEFT adapters.

    Example:
        with keep_sparsity(model, optimizer):
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    """
    stepping = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps another
    if not isinstance(stepping, torch.optim.Optimizer):
        raise TypeError(
            f"keep_sparsity needs a torch.optim.Optimizer, got a {type(optimizer).__name__}: call "
            "mask_gradients() and mask_weights() of a SparsityKeeper around its steps instead"
        )
    keeper = SparsityKeeper(model)
    keeper.follow(stepping)
    return keeper


class SparsityKeeper:
    """The positions of the zeros of a pruned model, one bit per weight.

    `keep_sparsity` and the callback `KeepSparsity` call its methods at the right moments.

    Attributes:
        zeros: Number of weights kept at zero in this process.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the zeros of the pruned weights that will be trained.

        From now on, gradients are masked as soon as they are accumulated, so that clipping sees
        only the gradients of trained weights. If parameters are sharded (FSDP), call
        `mask_gradients` before each step.

        Args:
            model: As for `keep_sparsity`.

        Raises:
            ValueError: As for `keep_sparsity`.
        """
        model = extract_model_from_parallel(model)
        check_trainable(model)
        self._masks = [_Mask(parameter) for parameter in trained_parameters(model)]
        self.zeros = sum(mask.zeros for mask in self._masks)
        self._sharded = _is_sharded(model)
        self._handles: list[RemovableHandle] = []
        if not self._sharded:
            self._handles += [mask.mask_gradients_of_backward() for mask in self._masks]
        # An interrupted training run leaves no hooks behind: gradient hooks do not keep this object
        # alive, only optimizer hooks do.
        weakref.finalize(self, _remove_all, self._handles)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the weights after each step of an optimizer, until `remove`."""
        if self._sharded:
            handle = optimizer.register_step_pre_hook(lambda *_: self.mask_gradients())
            self._handles.append(handle)
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.mask_weights()))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the accumulated gradients of the pruned weights to zero.

        Needed before each step only if parameters are sharded, because the hooks that mask
        gradients during the backward pass are not called then. Otherwise it does nothing.
        """
        if self._sharded:
            for mask in self._masks:
                if mask.parameter.grad is not None:
                    mask.apply_(mask.parameter.grad)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set the pruned weights to zero again."""
        for mask in self._masks:
            mask.apply_(mask.parameter)

    def remove(self) -> None:
        """Stop masking. The weights do not change."""
        _remove_all(self._handles)

    def __enter__(self) -> "SparsityKeeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Mask:
    """The zeros of a parameter, or of this process's shard of it, as bits."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        keep = _local(parameter.detach()) != 0
        self.zeros = int((~keep).sum())
        self._bits = pack_bits(keep)

    def mask_gradients_of_backward(self) -> RemovableHandle:
        reference = weakref.ref(self)

        def mask_gradient(parameter: torch.Tensor) -> None:
            mask = reference()
            if mask is not None and parameter.grad is not None:
                mask.apply_(parameter.grad)

        return self.parameter.register_post_accumulate_grad_hook(mask_gradient)

    def apply_(self, tensor: torch.Tensor) -> None:
        """Zero a tensor of the parameter's size where the parameter was pruned."""
        tensor = _local(tensor.detach())
        if self._bits.device != tensor.device:  # the model has been moved
            self._bits = self._bits.to(tensor.device)
        # Multiply the bits of a float by 0 or 1: exact for infinities (float16 gradients), and
        # faster on CPUs than `masked_fill_`, whose branches depend on the mask.
        values = tensor.view(_INTEGERS[tensor.element_size()])
        if not values.is_contiguous():
            values.mul_(unpack_bits(self._bits, values.numel()).view(values.shape))
            return
        values = values.view(-1)
        step = _CHUNK if tensor.is_cpu else _LARGE_CHUNK
        for start in range(0, len(values), step):
            chunk = values[start : start + step]
            chunk.mul_(unpack_bits(self._bits[start // 8 : (start + step) // 8], len(chunk)))


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return a boolean mask as uint8 `[ceil(n / 8)]` on the same device, 8 values per byte."""
    flat = mask.flatten().to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=mask.device)
    for place in range(8):
        packed |= padded[:, place] << place
    return packed


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first `count` values of a mask packed by `pack_bits`."""
    # A table of the 8 values of each byte: one lookup for 8 weights.
    return _table(packed.device)[packed.int()].view(torch.bool)[:count]


_tables: dict[torch.device, torch.Tensor] = {}


def _table(device: torch.device) -> torch.Tensor:
    """Return the bits of each byte as int64 `[256]`, each made of 8 bytes that are 0 or 1."""
    if device not in _tables:
        places = torch.arange(8, dtype=torch.uint8)
        bits = torch.arange(256, dtype=torch.uint8)[:, None] >> places & 1
        _tables[device] = bits.contiguous().view(torch.int64).flatten().to(device)
    return _tables[device]


def pruned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the pruned parameters of a model, by their names at the time of pruning.

    Without a record (the model was pruned by another tool), these are the parameters with at least
    two dimensions of which at least 1 % is zero, except embeddings and all-zero parameters.

    Args:
        model: A model without a wrapper around it; modules inside may be wrapped by FSDP or PEFT.
    """
    record = getattr(model, "pruning_record", None)
    parameters = dict(_clean_names(model))
    if record is None:
        others = {id(parameter) for parameter in _never_pruned(model)}
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.ndim > 1
            and id(parameter) not in others
            and _LEAST_ZEROS <= (_local(parameter) == 0).float().mean() < 1
        }
    pruned: dict[int, tuple[str, nn.Parameter]] = {}  # by `id`, as layers may share one
    for matrix in record.matrices:
        name = matrix.name.partition("[")[0]  # experts in one parameter have an index
        for candidate in names_now(model, name):
            if candidate in parameters:
                pruned.setdefault(id(parameters[candidate]), (name, parameters[candidate]))
    return dict(pruned.values())


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the pruned parameters of a model that are trained.

    Raises:
        ValueError: There are none.
    """
    kind = type(model).__name__
    pruned = [each for each in pruned_parameters(model).values() if (_local(each) == 0).any()]
    trained = [each for each in pruned if each.requires_grad]
    if trained or (_is_sharded(model) and pruned_parameters(model)):
        return trained  # this process may have no zeros of its own
    if pruned:
        raise ValueError(
            f"all pruned weights of this {kind} are frozen (requires_grad is False), so their "
            "zeros stay without KeepSparsity: leave it out"
        )
    if _is_sharded(model):
        raise ValueError(
            f"FSDP has flattened the parameters of this {kind}, so the pruned ones cannot be told "
            "apart: set use_orig_params=True (fsdp_use_orig_params), or use FSDP 2"
        )
    raise ValueError(
        f"this {kind} has no zeros to keep: prune it before you train it, or train it without "
        "keeping zeros"
    )


def is_plain(weight: torch.Tensor) -> bool:
    """Return whether a weight is an ordinary float tensor, neither quantized nor a subclass."""
    return weight.is_floating_point() and type(weight) in (torch.Tensor, nn.Parameter)


def _never_pruned(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters whose zeros do not come from pruning: padding tokens and new adapters."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
        elif hasattr(module, "adapter_layer_names"):  # a layer of PEFT
            for name, parameter in module.named_parameters():
                if not name.startswith(("base_layer.", "original_module.")):
                    yield parameter


def check_trainable(model: nn.Module) -> None:
    """Check that no zeros of a model were lost since pruning, and that they can be kept.

    Raises:
        ValueError: The weights are offloaded or have adapters, or zeros have been filled.
    """
    kind = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"weights of this {kind} are offloaded, and such weights cannot be trained: load the "
            "model without device_map"
        )
    if has_peft_layers(model):
        raise ValueError(
            f"this {kind} has PEFT adapters, which are trained while the pruned weights stay as "
            "they are: train without KeepSparsity, with a SparseLoraConfig, or merge the adapter "
            "with merge_and_keep_sparsity afterwards"
        )
    if not _is_sharded(model):
        check_zeros_are_left(model)


def check_zeros_are_left(model: nn.Module) -> None:
    """Check that no zeros of a model with a record have been filled since it was pruned.

    Raises:
        ValueError: Some have.
    """
    record = getattr(model, "pruning_record", None)
    if record is None or record.zeros_after is None:
        return
    filled = record.zeros_after - _zeros_of(model)
    if filled > 0:
        raise ValueError(
            f"{filled:,} of the {record.zeros_after:,} zeros of this {type(model).__name__} have "
            "been filled since it was pruned, for example by training: load the pruned checkpoint "
            "again, and keep its zeros from the first step on"
        )


def _zeros_of(model: nn.Module) -> int:
    return sum(int((each == 0).sum()) for each in pruned_parameters(model).values())


def _clean_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield _WRAPPERS.sub("", name), parameter


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor, sharing its memory."""
    if torch.distributed.is_available() and isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def _is_sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    return any(isinstance(each, DTensor) for each in model.parameters()) or any(
        isinstance(each, FullyShardedDataParallel) for each in model.modules()
    )
