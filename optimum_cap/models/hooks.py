"""Context managers that record, mask or replace parts of a forward pass, undone on exit."""

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from optimum_cap.models.sites import Site, Unit


@contextmanager
def masked_unit(model: PreTrainedModel, site: Site, unit: Unit) -> Iterator[None]:
    """Mask one unit: set its slice of the output projection's input to zero (paper, step 2).

    If the projection is a module, it gets a forward pre-hook. An expert in a 3-D parameter has no
    module to hook, so the columns that multiply the slice are zeroed instead, which gives the same
    product. They are restored exactly.

    Raises:
        ValueError: The expert's weights are offloaded.
    """
    if site.expert is None:
        start, stop = unit.channels

        def mask(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            masked = args[0].clone()
            masked[..., start:stop] = 0
            return (masked, *args[1:])

        handle = model.get_submodule(site.projection).register_forward_pre_hook(mask)
        try:
            yield
        finally:
            handle.remove()
        return

    parameter = model.get_parameter(unit.region[0].parameter)
    if parameter.device.type == "meta":
        raise ValueError(
            f"cannot mask {site.name}: its weights are offloaded; load the model with a device_map "
            "that keeps this layer in memory"
        )
    columns = unit.region[0].of(parameter.data)
    saved = columns.clone()
    columns.zero_()
    try:
        yield
    finally:
        columns.copy_(saved)


SharedStates = UserDict[Any, tuple[torch.Tensor, ...]]
"""Keys and values that layers leave for later ones (Gemma 3n, Gemma 4), each `[rows, heads, tokens,
channels]`. transformers passes them to the layers in a `UserDict`, and nothing else."""


def shared_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SharedStates | None:
    """Return the shared keys and values among a layer's arguments; `None` if there are none."""
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, UserDict)), None)


def with_shared_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], shared: SharedStates | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer with its shared keys and values replaced."""

    def replaced(value: Any) -> Any:
        return shared if isinstance(value, UserDict) else value

    return tuple(map(replaced, args)), {name: replaced(value) for name, value in kwargs.items()}


@dataclass
class RecordedCall:
    """One call of a module during a forward pass.

    Attributes:
        hidden: The first tensor argument.
        args: The other positional arguments.
        kwargs: The keyword arguments, without `hidden_states`.
        output: The output of the module, with `None` for everything except the hidden states
            (attention weights would take more memory than all other tensors together).
        shared: The `shared_states` of the arguments after the call.
    """

    hidden: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    shared: SharedStates | None = None


@contextmanager
def recorded_calls(modules: dict[str, nn.Module]) -> Iterator[dict[str, RecordedCall]]:
    """Record the calls of `modules`; yield a dictionary of the calls by module name."""
    calls: dict[str, RecordedCall] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = split_hidden(args, kwargs)
            calls[name] = RecordedCall(hidden, rest, named)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = calls[name]
            call.output = repack_output(output, hidden_states_of(output))
            call.shared = copy.copy(shared_states(call.args, call.kwargs))

        return hook

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the first argument of a call, whatever its name; for projections, the input."""
    return args[0] if args else next(iter(kwargs.values()))


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the hidden states from the other arguments of a layer or block."""
    if args:
        return args[0], args[1:], kwargs
    return (
        kwargs["hidden_states"],
        (),
        {key: value for key, value in kwargs.items() if key != "hidden_states"},
    )


def hidden_states_of(output: Any) -> torch.Tensor:
    """Return the hidden states of the output of a layer or block."""
    return output[0] if isinstance(output, tuple | list) else output


def repack_output(output: Any, hidden: torch.Tensor) -> Any:
    """Return `hidden` in the form of `output`: alone, or first in a tuple or list of its length."""
    if not isinstance(output, tuple | list):
        return hidden
    return type(output)([hidden, *[None] * (len(output) - 1)])


def streams_first(hidden: torch.Tensor, template: Any) -> torch.Tensor:
    """Return hidden states with the dimension of streams, if any, in front.

    Args:
        hidden: Hidden states in the layout of the model's layers: `[rows, tokens, hidden]`,
            `[streams, rows, tokens, hidden]` (Gemma 3n) or `[rows, tokens, streams, hidden]`
            (DeepSeek V4).
        template: A layer output for a single token, which shows the layout.

    Returns:
        `[..., rows, tokens, hidden]`.
    """
    return hidden.movedim(-2, 0) if _has_streams_last(template) else hidden


def as_layers_take(hidden: torch.Tensor, template: Any) -> torch.Tensor:
    """Undo `streams_first`."""
    return hidden.movedim(0, -2) if _has_streams_last(template) else hidden


def _has_streams_last(template: Any) -> bool:
    shape = hidden_states_of(template).shape  # for one row of one token
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] > 1


def has_lm_head(model: PreTrainedModel) -> bool:
    """Return whether `model` predicts tokens, unlike classifiers and reward models."""
    return bool(model.can_generate())


def call_model(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Run `model` on tokens, without a cache.

    For a model without an LM head, only the base model runs: classifiers refuse batches if they
    have no padding token, and return no values per token.

    Args:
        model: The model.
        input_ids: int64 `[rows, tokens]`.
        inputs: Its other inputs, such as `pixel_values`.

    Returns:
        The output of the model, or of its base model.
    """
    module = model if has_lm_head(model) else model.base_model
    others = {
        name: value.to(input_ids.device, model.dtype if value.is_floating_point() else None)
        for name, value in (inputs or {}).items()
    }
    return module(input_ids=input_ids, use_cache=False, **others)


@contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
    """Make the LM head return its input, so that no logits are computed.

    Unlike the argument `logits_to_keep`, this does not affect the arguments of the layers: Gemma 4
    runs layers without their own keys and values only on the kept positions.
    """
    if not has_lm_head(model):
        yield  # `call_model` does not run its head
        return
    with replaced_forward(model.get_output_embeddings(), lambda hidden: hidden):
        yield


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Return `cache` under the argument name of `model`, which transformers 5.24 renamed."""
    renamed = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make `module` run `forward` within this context.

    If the forward had already been replaced on the instance, as accelerate does, that one is
    restored.
    """
    was_replaced = "forward" in module.__dict__
    original_forward = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if was_replaced:
            module.forward = original_forward
        else:
            del module.forward


@contextmanager
def zero_embeddings(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Make the model use zeros instead of embeddings, without reading the embedding weights."""
    embeddings = model.get_input_embeddings()

    def zeros(input_ids: torch.Tensor) -> torch.Tensor:
        shape = *input_ids.shape, embeddings.embedding_dim
        return torch.zeros(shape, dtype=dtype, device=input_ids.device)

    with replaced_forward(embeddings, zeros):
        yield


@contextmanager
def bypass_layers(layers: Iterable[nn.Module], output_template: Any) -> Iterator[None]:
    """Make layers return their input hidden states.

    Args:
        layers: Decoder layers.
        output_template: An output of one of them, which shows how hidden states are returned.
    """

    def skip(*args: Any, **kwargs: Any) -> Any:
        return repack_output(output_template, split_hidden(args, kwargs)[0])

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, skip))
        yield


class StopForwardError(Exception):
    """Ends a forward pass whose remainder is not needed.

    Attributes:
        output: The requested output, if any.
    """

    def __init__(self, output: Any = None) -> None:
        self.output = output


def run_until(block: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the output of `block` when `layer` runs on these arguments, and stop there.

    Raises:
        RuntimeError: The layer does not run the block.
    """
    original_forward = block.forward

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise StopForwardError(original_forward(*args, **kwargs))

    with replaced_forward(block, stop):
        try:
            layer(*args, **kwargs)
        except StopForwardError as reached:
            return reached.output
    raise RuntimeError(f"{type(layer).__name__} did not run its {type(block).__name__}")
