"""Outputs of attention, MLPs and experts with one of their units masked.

The inputs are those recorded in the intact pass, so that a masked stream does not recompute the
blocks before its unit's block.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, groupby
from typing import Any

import torch
from torch import nn

from optimum_cap.models import (
    ModelView,
    Site,
    SiteUnit,
    Unit,
    expert_output,
    experts_call,
    gated,
    hidden_states_of,
    recorded_calls,
    repack_output,
    replaced_forward,
    routed,
    split_hidden,
)
from optimum_cap.scoring.batch_sizes import one_site_per_block
from optimum_cap.scoring.prefix import Segment

Select = Callable[[torch.Tensor], torch.Tensor]
"""Selects positions of hidden states `[rows, tokens, hidden]`."""


class MaskedBlocks:
    """The blocks of a model, each of which can return its output with a unit masked.

    Args:
        view: The model, in evaluation mode.

    Attributes:
        attention: The site of each layer that mixes tokens, which is attention in most models.
    """

    def __init__(self, view: ModelView) -> None:
        self.attention = {site.layer: site for site in view.sites if site.mixes_tokens}
        self._model = view.model
        self._others: dict[int, list[str]] = {}
        for site in one_site_per_block(view.sites):
            self._others.setdefault(site.layer, []).append(site.output_module)

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules whose calls the intact pass records, by call name."""
        modules = {}
        for layer, site in self.attention.items():
            modules[f"attention {layer}"] = self._model.get_submodule(site.output_module)
            modules[f"output projection {layer}"] = self._model.get_submodule(site.projection)
        for path in chain.from_iterable(self._others.values()):
            modules[path] = self._model.get_submodule(path)
        return modules

    def attention_outputs(
        self, segment: Segment, layer: int, units: list[SiteUnit], select: Select
    ) -> torch.Tensor:
        """Return the output of the attention with each unit masked.

        Args:
            segment: The intact pass.
            layer: The layer.
            units: Units of this layer, attention units first.
            select: Selects the positions to return.

        Returns:
            `[units * rows, tokens, hidden]`; intact for units of other blocks.
        """
        heads = [unit for site, unit in units if site.mixes_tokens]
        outputs = []
        if heads:
            projection_input = select(segment.calls[f"output projection {layer}"].hidden)
            outputs.append(self._masked_products(self.attention[layer], projection_input, heads))
        if intact_streams := len(units) - len(heads):
            intact = select(hidden_states_of(segment.calls[f"attention {layer}"].output))
            outputs.append(intact.repeat(intact_streams, 1, 1))
        return torch.cat(outputs)

    @contextmanager
    def returning(
        self,
        segment: Segment,
        layer: int,
        attention: torch.Tensor,
        units: list[SiteUnit],
        select: Select,
    ) -> Iterator[None]:
        """Make the blocks of a layer return, for their last rows, the output with a unit masked.

        Args:
            segment: The intact pass.
            layer: The layer.
            attention: Outputs of the attention, as from `attention_outputs`.
            units: As for `attention_outputs`.
            select: As for `attention_outputs`.
        """
        others = [unit for unit in units if not unit.site.mixes_tokens]
        block = self._model.get_submodule(self.attention[layer].output_module)
        with ExitStack() as stack:
            template = segment.calls[f"attention {layer}"].output
            stack.enter_context(_returning_last_rows(block, template, attention))
            for path in self._others[layer] if others else []:
                module, template = self._model.get_submodule(path), segment.calls[path].output
                outputs = self._outputs(segment, path, others, select)
                stack.enter_context(_returning_last_rows(module, template, outputs))
            yield

    def _outputs(
        self, segment: Segment, path: str, units: list[SiteUnit], select: Select
    ) -> torch.Tensor:
        """Return the output of an MLP or of experts with each unit of the block masked."""
        call = segment.calls[path]

        def at_selected(tensor: torch.Tensor) -> torch.Tensor:
            # Experts and some MLPs see all tokens as one list.
            return select(tensor.reshape(segment.rows, -1, tensor.shape[-1]))

        hidden, intact = at_selected(call.hidden), at_selected(hidden_states_of(call.output))
        outputs = []
        for site, group in groupby(units, key=lambda unit: unit.site):
            of_site = [unit for _, unit in group]
            if site.output_module != path:
                outputs.append(intact.repeat(len(of_site), 1, 1))
            elif site.expert is None:
                projection_input = self._projection_input(site, hidden)
                outputs.append(self._masked_products(site, projection_input, of_site))
            else:
                experts = self._model.get_submodule(path)
                routes = experts_call(experts, path, (call.hidden, *call.args), call.kwargs)
                chosen, weights = map(at_selected, (routes.chosen, routes.weights))
                outputs.append(self._masked_experts(site, of_site, hidden, chosen, weights, intact))
        return torch.cat(outputs)

    def _projection_input(self, site: Site, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of an MLP's output projection, given the input of the MLP.

        Raises:
            ValueError: The MLP changes the output of the projection.
        """
        modules = {
            name: self._model.get_submodule(name) for name in (site.output_module, site.projection)
        }
        with recorded_calls(modules) as calls:
            output = hidden_states_of(modules[site.output_module](hidden))
        projected = calls[site.projection].output
        if output.shape != projected.shape or not output.allclose(projected, equal_nan=True):
            raise ValueError(
                f"{type(self._model).__name__} changes what {site.projection} returns before it "
                "joins the residual stream, so its units cannot be masked that way: use estimator "
                "'plain'"
            )
        return calls[site.projection].hidden

    def _masked_products(
        self, site: Site, projection_input: torch.Tensor, units: list[Unit]
    ) -> torch.Tensor:
        """Return the output projection's output with each unit masked: `[units * rows, ...]`."""
        masked = projection_input.repeat(len(units), 1, 1).view(len(units), *projection_input.shape)
        for stream, unit in zip(masked, units, strict=True):
            stream[..., slice(*unit.channels)] = 0
        projected: torch.Tensor = self._model.get_submodule(site.projection)(masked.flatten(0, 1))
        return projected

    def _masked_experts(
        self,
        site: Site,
        units: list[Unit],
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        intact: torch.Tensor,
    ) -> torch.Tensor:
        """Return the output of the experts with each unit of one expert masked.

        Only the tokens that reach the expert change. For these, the other experts run again and the
        masked output of this expert is added. Subtracting from the intact output would be cheaper,
        but the difference of two large numbers loses precision.

        Args:
            site: The site of the expert.
            units: Its units.
            hidden: Input of the experts, `[rows, tokens, hidden]`.
            chosen: Experts that each token is routed to, `[rows, tokens, k]`.
            weights: Their routing weights, `[rows, tokens, k]`.
            intact: Intact output, `[rows, tokens, hidden]`.

        Returns:
            `[units * rows, tokens, hidden]`.
        """
        assert site.expert is not None
        experts = self._model.get_submodule(site.block)
        outputs = intact.repeat(len(units), 1, 1)
        tokens, slots = routed(chosen.flatten(0, 1), site.expert)
        if len(tokens) == 0:
            return outputs
        inputs = hidden.flatten(0, 1)[tokens]
        weights = weights.flatten(0, 1)[tokens]
        weights_without = weights.scatter(1, slots[:, None], 0)
        others = experts(inputs, chosen.flatten(0, 1)[tokens], weights_without)
        weight = weights.gather(1, slots[:, None])
        activated = gated(experts, site.expert, inputs)
        streams = outputs.view(len(units), -1, intact.shape[-1])
        for stream, unit in zip(streams, units, strict=True):
            masked = activated.clone()
            masked[:, slice(*unit.channels)] = 0
            contribution = expert_output(experts, site.expert, masked) * weight
            stream[tokens] = others + contribution.to(others.dtype)
        return outputs


def _returning_last_rows(
    module: nn.Module, output_template: Any, outputs: torch.Tensor
) -> AbstractContextManager[None]:
    """Make a module return given outputs for its last rows, and compute only the others.

    Args:
        module: An attention, an MLP, its projection, or experts.
        output_template: An output of it, which shows how hidden states are returned.
        outputs: Its outputs for the last rows, `[rows, tokens, hidden]`.
    """
    original_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        # Experts and some MLPs see all tokens as one list.
        last = outputs.flatten(0, outputs.ndim - hidden.ndim)
        computed = len(hidden) - len(last)
        if computed == 0:
            return repack_output(output_template, last)

        def of_computed(value: Any) -> Any:
            """Cut the routing of experts and the attention arguments that differ between rows."""
            if isinstance(value, tuple):
                return tuple(map(of_computed, value))
            if isinstance(value, torch.Tensor) and value.ndim >= 2 and len(value) == len(hidden):
                return value[:computed]
            return value

        output = original_forward(
            hidden[:computed],
            *map(of_computed, args),
            **{name: of_computed(value) for name, value in kwargs.items()},
        )
        return repack_output(output, torch.cat([hidden_states_of(output), last]))

    return replaced_forward(module, forward)
