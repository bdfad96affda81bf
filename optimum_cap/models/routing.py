"""Routers: which experts tokens are routed to after some experts are removed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from optimum_cap.models.experts import ExpertsCall, experts_call, experts_layout
from optimum_cap.models.hooks import RecordedCall, StopForwardError, replaced_forward
from optimum_cap.models.internals import own_tensors

_ROUTER_NAMES = ("router", "gate")


class Router:
    """The router of one experts module.

    Args:
        model: The model.
        block: Path of the experts module.

    Attributes:
        parent: Path of the module that contains the experts and the router.
        experts: The experts module.

    Raises:
        ValueError: No matrix next to the experts has a row for each of them.
    """

    def __init__(self, model: nn.Module, block: str) -> None:
        self.block = block
        self.parent = block.rpartition(".")[0]
        self.experts = model.get_submodule(block)
        layout = experts_layout(self.experts)
        assert layout is not None
        self.count = layout.count
        self._module = model.get_submodule(self.parent)
        inner = block.rpartition(".")[2]
        found = [
            (path, name, parameter)
            for path, module in self._module.named_modules()
            if path.partition(".")[0] != inner
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 2 and parameter.shape[0] == self.count
        ]
        if len(found) > 1:
            found = [each for each in found if each[0].rpartition(".")[2] in _ROUTER_NAMES]
        if len(found) != 1:
            raise ValueError(
                f"{self.parent} has {len(found)} matrices with a row for each of its {self.count} "
                "experts, so its router is unknown and no expert can be removed: choose another "
                "pattern"
            )
        [(path, _, weight)] = found
        self._shape = weight.shape
        self._router = self._module.get_submodule(path)

    @contextmanager
    def without(self, removed: torch.Tensor) -> Iterator[None]:
        """Route no token to the removed experts within this context.

        Args:
            removed: The removed experts, int64.
        """
        original_forward = self._router.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _WithoutLogits(self._shape, removed):
                return original_forward(*args, **kwargs)

        buffers = own_tensors(self._router)[1]
        biases = {
            name: bias
            for name, bias in buffers.items()
            if bias is not None and bias.shape == (self.count,)
        }
        try:
            for name, bias in biases.items():  # added to the scores that select experts
                buffers[name] = bias.index_fill(0, removed.to(bias.device), -torch.inf)
            with replaced_forward(self._router, forward):
                yield
        finally:
            buffers.update(biases)

    def route(self, call: RecordedCall, removed: torch.Tensor) -> ExpertsCall:
        """Return the arguments of the experts module after some experts are removed.

        Args:
            call: The call of the module at `parent` in the intact model.
            removed: The removed experts, int64; their indices no longer occur.
        """

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise StopForwardError(experts_call(self.experts, self.block, args, kwargs))

        with replaced_forward(self.experts, stop), self.without(removed):
            try:
                self._module(call.hidden, *call.args, **call.kwargs)
            except StopForwardError as reached:
                routed: ExpertsCall = reached.output
                return routed
        raise RuntimeError(f"{self.parent} did not run its experts")


class _WithoutLogits(TorchFunctionMode):
    """Sets the logits of removed experts to minus infinity."""

    def __init__(self, shape: torch.Size, removed: torch.Tensor) -> None:
        super().__init__()
        self._shape = shape
        self._removed = removed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].shape == self._shape:
            return result.index_fill(-1, self._removed.to(result.device), -torch.inf)
        return result
