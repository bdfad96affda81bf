"""Context managers that record or mask parts of a forward pass, and restore all that they touch."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from optimum_cap.models.architectures import Site, Unit


@contextmanager
def masked_unit(model: PreTrainedModel, site: Site, unit: Unit) -> Iterator[None]:
    """Mask one unit: its slice of the output projection's input is exactly zero (paper, step 2).

    A projection that is a module gets a forward pre-hook. An expert of a 3-D parameter has no
    module to hook, so the columns that would multiply the slice are zeroed instead, which is the
    same product, and restored bit for bit.

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


@dataclass
class RecordedCall:
    """One call of a module during a forward pass.

    Attributes:
        hidden: The first tensor argument.
        args: The other positional arguments.
        kwargs: The keyword arguments, without `hidden_states`.
        output: What the module returned: hidden states, and `None` for all else (the weights of
            attention would take more memory than all other tensors together).
    """

    hidden: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


@contextmanager
def recorded_calls(modules: dict[str, nn.Module]) -> Iterator[dict[str, RecordedCall]]:
    """Record the calls of `modules`, by the same names, into the dictionary that is yielded."""
    calls: dict[str, RecordedCall] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = split_hidden(args, kwargs)
            calls[name] = RecordedCall(hidden, rest, named)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[name].output = repack_output(output, hidden_states_of(output))

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
    """The hidden states in what a layer or block returned."""
    return output[0] if isinstance(output, tuple) else output


def repack_output(output: Any, hidden: torch.Tensor) -> Any:
    """`hidden` in the form of `output`: alone, or first in a tuple of as many entries."""
    return (hidden, *[None] * (len(output) - 1)) if isinstance(output, tuple) else hidden


def only_last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The argument that spares logits nobody reads, where the model has it."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """`cache` under the name that `model` has for it: transformers 5.24 renamed it."""
    known = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if known else "past_key_values": cache}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` run `forward` instead of its own, which may itself sit on the instance."""
    had_own = "forward" in module.__dict__
    own = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = own
        else:
            del module.forward


@contextmanager
def zero_embeddings(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Let the model look up zeros instead of embeddings, without reading their weights."""
    embeddings = model.get_input_embeddings()

    def zeros(input_ids: torch.Tensor) -> torch.Tensor:
        shape = *input_ids.shape, embeddings.embedding_dim
        return torch.zeros(shape, dtype=dtype, device=input_ids.device)

    with replaced_forward(embeddings, zeros):
        yield


@contextmanager
def bypass_layers(layers: Iterable[nn.Module], output_template: Any) -> Iterator[None]:
    """Let layers return the hidden states that they get.

    Args:
        layers: Decoder layers.
        output_template: What one of them returned once, which says how they return hidden states.
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
        output: The output that was wanted, if any.
    """

    def __init__(self, output: Any = None) -> None:
        self.output = output


def run_until(block: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `block` returns while `layer` runs on these arguments; the rest is not computed."""
    own = block.forward

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise StopForwardError(own(*args, **kwargs))

    with replaced_forward(block, stop):
        try:
            layer(*args, **kwargs)
        except StopForwardError as reached:
            return reached.output
    raise RuntimeError(f"{type(layer).__name__} did not run its {type(block).__name__}")
