"""Checks on one batch, before any weight changes, that the model can be calibrated.

Statistics and sensitivities are measured by running decoder layers one by one on recorded arguments
(`LayerwisePass`). This equals running the model only if layers depend on nothing else. Instead of
listing the architectures for which that holds, every run compares the two.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.models import (
    ModelView,
    Targets,
    call_model,
    evaluation_mode,
    float32_on_cpu,
    hidden_states_of,
    number_of_embeddings,
    onloaded,
    positions_per_chunk,
    replaced_forward,
    share_that_differs,
    streams_first,
)
from optimum_cap.pruning.activations import LayerwisePass, check_finite, examples_per_batch
from optimum_cap.runtime import is_out_of_memory

# On a GPU, the outputs of experts may be added in a different order in each run. Rounding can then
# route tokens that are close between two experts to the other one.
MOST_TOKENS_ROUTED_OTHERWISE = 0.01
_FEW_TOKENS = 8  # tokens to differentiate layers on


def check_first_batch(
    view: ModelView,
    examples: list[CalibrationExample],
    layer_by_layer: bool,
    memory_budget: int | str = "auto",
    differentiate: bool = False,
) -> None:
    """Check that the dense model computes finite values, and the same values layer by layer.

    This costs a forward pass of one batch, plus a second one layer by layer. Each layer runs in
    both while its weights are in memory, so that offloaded weights are loaded once.

    Args:
        view: The dense model; it is not changed.
        examples: The calibration examples.
        layer_by_layer: Whether the run uses `LayerwisePass`. Otherwise, only one example runs.
        memory_budget: As for `LayerwisePass`.
        differentiate: Whether the run needs gradients of the layers.

    Raises:
        ValueError: Hidden states or logits are not finite, or they differ; a layer cannot be
            differentiated; or a model without an LM head looks ahead.
    """
    if any(site.looks_ahead for site in view.sites):
        raise _looks_ahead(view)
    size = examples_per_batch(view.model, examples, memory_budget) if layer_by_layer else 1
    planned = batches(examples, size)
    # With images, the model computes something different, so check the first batch with and
    # without.
    for first in {bool(batch.inputs): batch for batch in reversed(planned)}.values():
        chosen = [examples[position] for position in first.positions]
        with evaluation_mode(view.model), float32_on_cpu(view.model):
            if not view.has_lm_head and not first.inputs:
                _check_does_not_look_ahead(view, chosen[0])
            layerwise = short = None
            with _explaining_layers(view):
                if layer_by_layer:
                    layerwise = LayerwisePass(view, chosen, memory_budget=memory_budget)
                if differentiate:
                    short = LayerwisePass(view, [_beginning(chosen[0])])
            [batch] = batches(chosen, size)
            shares = _run_beside(view, batch, chosen, layerwise, short)
        _check_shares(view, shares)


def _check_shares(view: ModelView, shares: list[float]) -> None:
    """Check that the hidden states of only few tokens differ, given the shares of each layer.

    Raises:
        ValueError: Too many differ.
    """
    routes = any(parameter.ndim == 3 for layer in view.layers for parameter in layer.parameters())
    allowed = MOST_TOKENS_ROUTED_OTHERWISE if routes else 0.0
    if shares and shares[-1] > allowed:
        first = next(index for index, share in enumerate(shares) if share > allowed)
        raise _not_layer_by_layer(
            view,
            "computes something else when its decoder layers run one at a time (the hidden states "
            f"of {shares[-1]:.2%} of the tokens differ, from layer {first} on)",
        )


@contextmanager
def _explaining_layers(view: ModelView) -> Iterator[None]:
    """Explain the alternatives if a layer does not run by itself."""
    try:
        yield
    except OSError:  # from offloaded weights
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise _not_layer_by_layer(
            view, f"has decoder layers that do not run one at a time ({reason})"
        ) from error


def _not_layer_by_layer(view: ModelView, reason: str) -> ValueError:
    return ValueError(
        f"{type(view.model).__name__} {reason}, so it cannot be calibrated layer by layer: use "
        + ("recipe 'paper' with estimator 'plain', or " if view.has_lm_head else "")
        + "criterion 'magnitude'"
    )


def _run_beside(
    view: ModelView,
    batch: Batch,
    examples: list[CalibrationExample],
    layerwise: LayerwisePass | None,
    short: LayerwisePass | None = None,
) -> list[float]:
    """Run the model on a batch, and run each layer a second time as `LayerwisePass` does.

    Args:
        view: The model.
        batch: The batch.
        examples: Its examples.
        layerwise: A pass with only this batch; `None` runs only the model.
        short: A pass in which every layer is differentiated, if given.

    Returns:
        The share of tokens whose hidden states differ, after each layer; empty without a pass.

    Raises:
        ValueError: Hidden states or logits are not finite, or a layer cannot be differentiated.
    """
    shares: list[float] = []
    calls = [0] * len(view.layers)
    templates = view.output_templates  # runs the model, so must precede replacing layers

    def beside(index: int, layer: nn.Module) -> Callable[..., Any]:
        original_forward, is_second = layer.forward, False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_second
            if is_second:
                return original_forward(*args, **kwargs)
            calls[index] += 1
            with onloaded(layer):
                output = original_forward(*args, **kwargs)
                expected = streams_first(hidden_states_of(output), templates[index])
                if layerwise is not None and expected.shape[-3:-1] != batch.input_ids.shape:
                    raise _not_layer_by_layer(
                        view, f"gives hidden states of shape {list(expected.shape)}"
                    )
                check_finite(expected, batch, examples, f"layer {index}")
                if layerwise is not None:
                    [of_pass] = layerwise.batches
                    is_second = True
                    try:
                        with _explaining_layers(view):
                            of_pass.hidden = layerwise.run(index, of_pass, of_pass.hidden)
                    finally:
                        is_second = False
                    real = batch.real.to(expected.device)
                    shares.append(
                        share_that_differs(of_pass.hidden[..., real, :], expected[..., real, :])
                    )
                if short is not None:
                    is_second = True
                    try:
                        _differentiate(view, index, short)
                    finally:
                        is_second = False
            return output

        return forward

    targets = Targets.of(batch)

    def select(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        check_finite(args[0], batch, examples, "the last norm")
        selected = targets.select(args[0])[: positions_per_chunk(view.model, args[0].device)]
        return (selected[None],)

    with ExitStack() as stack:
        for index, layer in enumerate(view.layers):
            stack.enter_context(replaced_forward(layer, beside(index, layer)))
        if view.has_lm_head:
            head = view.model.get_output_embeddings()
            stack.callback(head.register_forward_pre_hook(select).remove)
        output = call_model(view.model, batch.input_ids.to(view.device), batch.inputs)
    if layerwise is not None and calls != [1] * len(calls):
        index = next(index for index, count in enumerate(calls) if count != 1)
        raise _not_layer_by_layer(view, f"runs layer {index} {calls[index]} times")
    if not view.has_lm_head:
        check_finite(output.last_hidden_state, batch, examples, "the last norm")
    elif not output.logits.isfinite().all():
        raise ValueError(
            f"the LM head of {type(view.model).__name__} gives logits that are NaN or infinite: "
            "check its weights and the dtype of the model"
        )
    return shares


def _check_does_not_look_ahead(view: ModelView, example: CalibrationExample) -> None:
    """Check that the hidden states of tokens do not change with a later token.

    Classifiers may be based on encoders, or on decoders with bidirectional attention.

    Raises:
        ValueError: They change, and therefore also depend on the padding of a batch.
    """
    ids = _beginning(example).input_ids
    if len(ids) < 2:
        return  # it is the longest example of its batch and has no padding
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % number_of_embeddings(view.model)
    output = call_model(view.model, torch.stack([ids, changed]).to(view.device))
    hidden, other = output.last_hidden_state[:, :-1]
    # Non-finite values are reported elsewhere, with the layer they come from.
    if hidden.isfinite().all() and share_that_differs(other, hidden):
        raise _looks_ahead(view)


def _looks_ahead(view: ModelView) -> ValueError:
    return ValueError(
        f"the tokens of {type(view.model).__name__} depend on later ones, but CAP measures the "
        "inputs of matrices under causal attention: use recipe 'magnitude', which needs no data"
    )


def _beginning(example: CalibrationExample) -> CalibrationExample:
    """Return the first tokens of an example, or all if it has images."""
    if example.inputs:
        return example
    return replace(
        example, input_ids=example.input_ids[:_FEW_TOKENS], scored=example.scored[:_FEW_TOKENS]
    )


def _differentiate(view: ModelView, index: int, short: LayerwisePass) -> None:
    """Run layer `index` forward and backward, and advance past it.

    Raises:
        ValueError: The layer cannot be differentiated.
    """
    [batch] = short.batches
    hidden = batch.hidden.detach().requires_grad_()
    try:
        with torch.enable_grad():
            output = short.run(index, batch, hidden.clone(), copy.copy(batch.shared))
            torch.autograd.grad(output.float().sum(), hidden)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"layer {index} of {type(view.model).__name__} cannot be differentiated ({reason}), as "
            "allocation 'fisher' and refinement need: choose a recipe without them, such as "
            "'sparsegpt', or refine 0"
            + (" and allocation 'interventional'" if view.has_lm_head else "")
        ) from error
    batch.hidden = short.run(index, batch, batch.hidden)
