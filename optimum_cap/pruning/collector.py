"""Collects the inputs of the prunable matrices of a layer while it runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.data import Batch
from optimum_cap.methods import CRITERIA
from optimum_cap.models import (
    OUTPUT,
    Matrix,
    SharedStates,
    StopForwardError,
    experts_call,
    first_argument,
    gated,
    routed,
)
from optimum_cap.runtime import lane_of

_INPUT_CRITERIA = ", ".join(name for name, entry in CRITERIA.items() if entry.needs_inputs)


@dataclass
class LayerBatch:
    """A calibration batch between two decoder layers.

    Attributes:
        number: Number of the batch among all batches of the calibration set.
        batch: The examples.
        weights: Weight of each real position, float32 `[positions]`; `None` if all are 1.
        hidden: Hidden states, `[..., examples, tokens, hidden]`; some models have several per token
            (Gemma 3n).
        arguments: The other arguments of every layer.
        shared: Keys and values that earlier layers share with later ones; `None` if layers share
            none.
        added: Values that the model adds to the hidden states before a layer, by layer index (image
            features in Qwen3-VL).
    """

    number: int
    batch: Batch
    weights: torch.Tensor | None
    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    shared: SharedStates | None = None
    added: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def lane(self) -> int:
        """The lane of the batch."""
        return lane_of(self.number)

    def real_rows(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """Return the rows of `[examples, tokens, width]` that are not padding.

        Args:
            hidden: Input or output of a module.
            name: Name of the module or matrix, for the error message.

        Returns:
            The rows, `[positions, width]`.

        Raises:
            ValueError: `hidden` has a different number of tokens than the batch.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        real = self.batch.real.flatten().to(hidden.device)
        if len(rows) != len(real):
            raise ValueError(
                f"{name} received {len(rows)} tokens of {len(real)}: cannot tell which tokens are "
                f"padding, so {_INPUT_CRITERIA} cannot prune it; leave it dense "
                "(modules_to_leave_dense) or choose criterion 'magnitude'"
            )
        return rows[real]

    def weights_on(self, device: torch.device) -> torch.Tensor | None:
        """Return `weights` on a device."""
        return None if self.weights is None else self.weights.to(device)


@dataclass(frozen=True)
class Route:
    """The real tokens of a batch that reach a matrix.

    Attributes:
        tokens: Their positions among the real tokens, int64 `[tokens]`; `None` for all of them.
        token_weights: Weight of each of these tokens, float32 `[tokens]`; `None` if all are 1.
        routing_weights: The router's weight for the expert at each token, float32 `[tokens]`;
            `None` outside experts.
        routing_total: Sum of the routing weights of all experts at each token, float32 `[tokens]`;
            `None` outside experts.
    """

    tokens: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    routing_weights: torch.Tensor | None = None
    routing_total: torch.Tensor | None = None

    @property
    def error_weights(self) -> torch.Tensor | None:
        """Weight of a squared error at each token, float32 `[tokens]`; `None` if all are 1.

        Errors of an expert are scaled by its routing weight in the sum over experts.
        """
        if self.routing_weights is None:
            return self.token_weights
        squares = self.routing_weights.square()
        return squares if self.token_weights is None else squares * self.token_weights

    def share_of(self, error: torch.Tensor) -> torch.Tensor:
        """Return the part of an error in the residual stream that the matrix should compensate.

        Args:
            error: The error at every real token, `[real tokens, hidden]`.

        Returns:
            The part at the tokens of the route, float32 `[tokens, hidden]`. Experts divide an error
            by the sum of their routing weights, so that their weighted outputs add up to it.
        """
        if self.tokens is None or self.routing_total is None:
            return error.float()
        at_tokens = error.to(self.tokens.device)[self.tokens].float()
        # Experts whose weights are all zero cannot compensate anything.
        total = self.routing_total.unsqueeze(1)
        return (at_tokens / total).where(total > 0, 0)


Receive = Callable[[Matrix, torch.Tensor, Route], None]
"""Takes the inputs of a matrix, `[tokens, in]`, and their tokens."""


class InputCollector:
    """Passes on the inputs of a layer's matrices while the layer runs.

    Args:
        model: The model.
        matrices: Prunable matrices of one decoder layer.
        names: Names in this layer of parameters that it shares with an earlier layer.

    Attributes:
        leaders: For each matrix that has run, the first matrix with the same input.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matrices: Iterable[Matrix],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.leaders: dict[Matrix, Matrix] = {}
        self._model = model
        self._by_module: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            here = replace(matrix, parameter=(names or {}).get(matrix.parameter, matrix.parameter))
            self._by_module.setdefault(here.module, []).append(matrix)

    @contextmanager
    def collecting(
        self,
        batch: LayerBatch,
        receive: Receive,
        routes: Mapping[Matrix, Route] | None = None,
        stop_early: bool = False,
    ) -> Iterator[None]:
        """Pass on the matrices' inputs for a batch within this context.

        Args:
            batch: The batch that the layer runs on.
            receive: Called for the first of the matrices that share an input, as given by
                `leaders`.
            routes: Routes to use for experts instead of this run's.
            stop_early: Whether to end the forward pass, with `StopForwardError`, once every matrix
                has received its input.
        """
        shared: list[tuple[torch.Tensor, Matrix]] = []
        missing = set(self._by_module)

        def receive_projection(matrices: list[Matrix], hidden: torch.Tensor) -> None:
            for matrix in matrices:
                leader = next((first for tensor, first in shared if tensor is hidden), None)
                self.leaders[matrix] = leader or matrix
                if leader is None:
                    shared.append((hidden, matrix))
                    rows = batch.real_rows(hidden, matrix.name)
                    receive(matrix, rows, Route(token_weights=batch.weights_on(rows.device)))

        def receive_experts(
            matrices: list[Matrix],
            module: nn.Module,
            path: str,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
        ) -> None:
            call = experts_call(module, path, args, kwargs)
            chosen, weights = (batch.real_rows(x, path) for x in (call.chosen, call.weights))
            weights, token_weights = weights.float(), batch.weights_on(chosen.device)
            real = batch.batch.real.flatten().nonzero()[:, 0].to(chosen.device)
            by_expert: dict[int, Route] = {}
            for matrix in matrices:
                assert matrix.expert is not None
                if routes is not None:
                    route = routes[matrix]
                elif matrix.expert in by_expert:
                    route = by_expert[matrix.expert]
                else:
                    route = _route(matrix.expert, chosen, weights, token_weights)
                    by_expert[matrix.expert] = route
                self.leaders[matrix] = matrix
                assert route.tokens is not None
                rows = call.inputs(matrix.expert, real[route.tokens])
                if matrix.parameter.endswith(f".{OUTPUT}"):
                    rows = gated(module, matrix.expert, rows)
                receive(matrix, rows, route)

        def hook_of(path: str) -> Callable[..., None]:
            matrices = self._by_module[path]
            is_expert = matrices[0].expert is not None

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if is_expert:
                    receive_experts(matrices, module, path, args, kwargs)
                else:
                    receive_projection(matrices, first_argument(args, kwargs))
                missing.discard(path)
                if stop_early and not missing:
                    raise StopForwardError

            return hook

        with ExitStack() as stack:
            for path in self._by_module:
                module = self._model.get_submodule(path)
                handle = module.register_forward_pre_hook(hook_of(path), with_kwargs=True)
                stack.callback(handle.remove)
            yield
        if missing:
            raise ValueError(
                f"{type(self._model).__name__} did not run {', '.join(sorted(missing))}, so their "
                "inputs are unknown: leave them dense (modules_to_leave_dense), or choose "
                "criterion 'magnitude'"
            )


def _route(
    expert: int,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    token_weights: torch.Tensor | None,
) -> Route:
    """Return the route to an expert.

    Args:
        expert: The expert.
        chosen: Experts that the router chose for each real token, int64 `[tokens, k]`.
        weights: Their routing weights, float32 `[tokens, k]`.
        token_weights: Weight of each real token, float32 `[tokens]`; `None` if all are 1.
    """
    tokens, slots = routed(chosen, expert)
    return Route(
        tokens,
        None if token_weights is None else token_weights[tokens],
        weights[tokens, slots],
        weights[tokens].sum(dim=1),
    )
