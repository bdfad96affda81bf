"""The masked streams of a batch, which start where they differ from the intact one.

Masking a unit of layer l changes nothing before its site. So a stream starts from the recorded
intact input of layer l, and the streams of many units travel through the later layers as rows of
one batch. Where the block of the masked unit would run, and those before and beside it, a starting
stream gets the result instead. Logits are computed at scored positions only.

Tokens that all examples begin with are computed once per stream: they run as one row, whose keys
and values the rows of the examples then read.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from itertools import chain, groupby
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import Batch, CalibrationExample, batches, shared_prefix
from optimum_cap.models import (
    LayerCall,
    ModelView,
    Site,
    SiteUnit,
    Targets,
    Unit,
    activation_bytes_per_token,
    call_compiled,
    call_layer,
    device_of,
    experts_of,
    gated,
    hidden_states_of,
    logits_of,
    onloaded,
    positions_per_chunk,
    recorded_calls,
    repack_output,
    replaced_forward,
    routed,
    routing,
    split_hidden,
    token_losses,
)
from optimum_cap.scoring.last_attention import LastAttention
from optimum_cap.scoring.prefix import WORTHWHILE_SHARE, PrefixCache, Segment, record, tolerance

logger = logging.get_logger(__name__)


class Wavefront:
    """The masked streams of one batch, started from the recorded intact stream.

    Args:
        view: The model, in evaluation mode.
        batch: The examples; their shared prefix, if they have one, is computed once per stream.
        torch_compile: Compile the layers that streams pass through whole.

    Raises:
        ValueError: Experts are among the sites that compute in a way that is not known.
    """

    def __init__(
        self,
        view: ModelView,
        batch: Batch,
        torch_compile: bool = False,
    ) -> None:
        self.model = view.model
        self.layers = view.layers
        self._call: LayerCall = call_compiled if torch_compile else call_layer
        self.attention = {site.layer: site for site in view.sites if site.kind == "attention"}
        self.outlets: dict[int, list[str]] = {}
        for site in _other_blocks(view.sites):
            if site.expert is not None:
                experts_of(view.model, site)
            self.outlets.setdefault(site.layer, []).append(site.output_module)
        self._prefix = batch.prefix
        if batch.prefix:
            prefix, suffix = batch.split
            # The last token predicts nothing.
            inputs = [prefix.input_ids, suffix.input_ids[:, :-1]]
        else:
            suffix, inputs = batch, [batch.input_ids]
        self.targets = Targets.of(suffix)
        self._suffix_ids = inputs[-1]
        cache, modules = self._cache(), self._modules()
        self.segments = [record(view.model, modules, input_ids, cache) for input_ids in inputs]
        self.suffix = self.segments[-1]

    def _modules(self) -> dict[str, nn.Module]:
        """The modules whose calls are recorded: layers, attentions and sites, other blocks."""
        modules = {f"layer {index}": layer for index, layer in enumerate(self.layers)}
        for layer, site in self.attention.items():
            modules[f"attention {layer}"] = self.model.get_submodule(site.block)
            modules[f"site {layer}"] = self.model.get_submodule(site.projection)
        for path in chain.from_iterable(self.outlets.values()):
            modules[path] = self.model.get_submodule(path)
        return modules

    def _cache(self, layer: int | None = None) -> PrefixCache | None:
        return PrefixCache(self.model.config, layer) if self._prefix else None

    def intact_losses(self) -> torch.Tensor:
        """Losses of the intact model, float64 `[examples]`."""
        output = hidden_states_of(self.suffix.calls[f"layer {len(self.layers) - 1}"].output)
        return self._losses(self._at_scored(output))[0]

    def masked_losses(self, units: list[SiteUnit]) -> torch.Tensor:
        """Losses with each unit masked, float64 `[units, examples]`.

        Args:
            units: The units by rising layer, in each layer those of the attention first.
        """
        first, last = units[0][0].layer, len(self.layers) - 1
        streams = [segment.calls[f"layer {first}"].hidden[:0] for segment in self.segments]
        for index in range(first, last):
            starting = [job for job in units if job[0].layer == index]
            cache = self._cache(index)
            with onloaded(self.layers[index]):
                streams = [
                    self._through_layer(segment, index, carried, starting, cache)
                    for segment, carried in zip(self.segments, streams, strict=True)
                ]
        starting = [job for job in units if job[0].layer == last]
        with onloaded(self.layers[last]):
            rows = self._through_last_layer(streams, starting)
        return self._losses(rows)

    def _through_layer(
        self,
        segment: Segment,
        index: int,
        carried: torch.Tensor,
        starting: list[SiteUnit],
        cache: Cache | None,
    ) -> torch.Tensor:
        """Push carried streams and those that start in this layer through it.

        Streams are rows `[streams * rows of the segment, tokens, hidden]`. A starting stream enters
        with the intact input of the layer (for the residual connection), and gets the results of
        the blocks up to the one that is masked.
        """
        call = segment.calls[f"layer {index}"]
        rows = torch.cat([carried.to(call.hidden.device), call.hidden.repeat(len(starting), 1, 1)])
        args, kwargs = segment.arguments(f"layer {index}", len(carried), cache)
        if not starting:
            return hidden_states_of(self._call(self.layers[index], rows, args, kwargs))
        with ExitStack() as stack:
            attention = self._attention_results(segment, index, starting, _every_position)
            output_template = segment.calls[f"attention {index}"].output
            block = self.model.get_submodule(self.attention[index].block)
            stack.enter_context(_given_last_rows(block, output_template, attention))
            self._give_other_branches(stack, segment, index, starting, _every_position)
            return hidden_states_of(self.layers[index](rows, *args, **kwargs))

    def _through_last_layer(
        self, streams: list[torch.Tensor], starting: list[SiteUnit]
    ) -> torch.Tensor:
        """Do the same in the last layer, whose output matters at scored positions only.

        What follows the attention is position-wise. So only the attention sees sequences; the rest
        of the layer runs on scored positions, each as a sequence of one token.

        Returns:
            Output of the layer, `[streams * scored, 1, hidden]`.
        """
        index = len(self.layers) - 1
        recorded = self.suffix.calls[f"attention {index}"].output
        block = self.model.get_submodule(self.attention[index].block)
        intact = self.suffix.calls[f"layer {index}"].hidden
        rows, attended = [], []
        if len(streams[-1]):
            streams = [carried.to(intact.device) for carried in streams]
            last = self._last_attention
            rows.append(self._at_scored(streams[-1]))
            attended.append(self._at_scored(last.outputs(streams), last.start))
        if starting:
            rows.append(self._at_scored(intact).repeat(len(starting), 1, 1))
            attended.append(self._attention_results(self.suffix, index, starting, self._at_scored))
        args, kwargs = self.suffix.arguments(f"layer {index}", self.suffix.rows, None)
        with ExitStack() as stack:
            stack.enter_context(_given_last_rows(block, recorded, torch.cat(attended)))
            self._give_other_branches(stack, self.suffix, index, starting, self._at_scored)
            return hidden_states_of(self.layers[index](torch.cat(rows), *args, **kwargs))

    def _attention_results(
        self,
        segment: Segment,
        index: int,
        starting: list[SiteUnit],
        select: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Output of the attention for starting streams, at the positions that `select` keeps."""
        heads = [unit for site, unit in starting if site.kind == "attention"]
        results = []
        if heads:
            site_input = select(segment.calls[f"site {index}"].hidden)
            results.append(self._masked_products(self.attention[index], site_input, heads))
        if intact_streams := len(starting) - len(heads):
            intact = select(hidden_states_of(segment.calls[f"attention {index}"].output))
            results.append(intact.repeat(intact_streams, 1, 1))
        return torch.cat(results)

    def _give_other_branches(
        self,
        stack: ExitStack,
        segment: Segment,
        index: int,
        starting: list[SiteUnit],
        select: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Let MLP and experts return, for streams that start there, what they do when masked."""
        others = [job for job in starting if job[0].kind != "attention"]
        if not others:
            return
        for path in self.outlets[index]:
            given = self._branch_results(segment, path, others, select)
            output_template = segment.calls[path].output
            stack.enter_context(
                _given_last_rows(self.model.get_submodule(path), output_template, given)
            )

    def _branch_results(
        self,
        segment: Segment,
        path: str,
        starting: list[SiteUnit],
        select: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Output of an MLP or of experts for streams that start in this or another such block."""
        call = segment.calls[path]

        def at_selected(tensor: torch.Tensor) -> torch.Tensor:
            # Experts and some MLPs see all tokens as one list.
            return select(tensor.reshape(segment.rows, -1, tensor.shape[-1]))

        hidden, intact = at_selected(call.hidden), at_selected(hidden_states_of(call.output))
        results = []
        for site, group in groupby(starting, key=lambda started: started[0]):
            units = [unit for _, unit in group]
            if site.output_module != path:
                results.append(intact.repeat(len(units), 1, 1))
            elif site.expert is None:
                site_input = self._site_input(site, hidden)
                results.append(self._masked_products(site, site_input, units))
            else:
                chosen, weights = map(at_selected, routing(site.block, call.args))
                results.append(self._masked_experts(site, units, hidden, chosen, weights, intact))
        return torch.cat(results)

    def _site_input(self, site: Site, hidden: torch.Tensor) -> torch.Tensor:
        """Input of the output projection of an MLP, from that of the MLP.

        Raises:
            ValueError: What the projection returns is not what the MLP returns.
        """
        modules = {
            name: self.model.get_submodule(name) for name in (site.output_module, site.projection)
        }
        with recorded_calls(modules) as calls:
            output = hidden_states_of(modules[site.output_module](hidden))
        projected = calls[site.projection].output
        if output.shape != projected.shape or not output.allclose(projected, equal_nan=True):
            raise ValueError(
                f"{type(self.model).__name__} changes what {site.projection} returns before it "
                "joins the residual stream, so its units cannot be masked that way: use estimator "
                "'plain'"
            )
        return calls[site.projection].hidden

    def _masked_products(
        self, site: Site, site_input: torch.Tensor, units: list[Unit]
    ) -> torch.Tensor:
        """Output of a output projection with each unit masked: `[units * rows, tokens, hidden]`."""
        masked = site_input.repeat(len(units), 1, 1).view(len(units), *site_input.shape)
        for stream, unit in zip(masked, units, strict=True):
            stream[..., slice(*unit.channels)] = 0
        projected: torch.Tensor = self.model.get_submodule(site.projection)(masked.flatten(0, 1))
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
        """Output of the experts with each unit of one masked: `[units * rows, tokens, hidden]`.

        Only tokens that reach the expert change. They are computed anew: without the expert, and
        what is left of it added. What it adds is not taken from the intact output, because the
        difference of two large numbers is no exact small one.

        Args:
            site: The site of the expert.
            units: Its units.
            hidden: Input of the experts, `[rows, tokens, hidden]`.
            chosen: Experts that each token reaches, `[rows, tokens, k]`.
            weights: Their weights.
            intact: Intact output, `[rows, tokens, hidden]`.
        """
        assert site.expert is not None
        experts = experts_of(self.model, site)
        results = intact.repeat(len(units), 1, 1)
        tokens, slots = routed(chosen.flatten(0, 1), site.expert)
        if len(tokens) == 0:
            return results
        inputs = hidden.flatten(0, 1)[tokens]
        own_weights = weights.flatten(0, 1)[tokens]
        others_weights = own_weights.scatter(1, slots[:, None], 0)
        others = experts(inputs, chosen.flatten(0, 1)[tokens], others_weights)
        own_weight = own_weights.gather(1, slots[:, None])
        activated = gated(experts, site.expert, inputs)
        down = self.model.get_parameter(site.projection)[site.expert]
        for stream, unit in zip(results.view(len(units), -1, intact.shape[-1]), units, strict=True):
            masked = activated.clone()
            masked[:, slice(*unit.channels)] = 0
            own = nn.functional.linear(masked, down) * own_weight
            stream[tokens] = others + own.to(others.dtype)
        return results

    @cached_property
    def _last_attention(self) -> LastAttention:
        return LastAttention.of(
            self.model,
            self.layers,
            self.attention[len(self.layers) - 1],
            self.segments,
            self._suffix_ids,
            first=int(self.targets.columns.min()),
        )

    def _at_scored(self, hidden: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The positions whose logits are scored, of all from `start` on.

        Returns:
            `[streams * scored, 1, hidden]`.
        """
        streams = hidden.view(-1, self.suffix.rows, *hidden.shape[1:])
        rows = self.targets.rows.to(hidden.device)
        columns = self.targets.columns.to(hidden.device) - start
        return streams[:, rows, columns].view(-1, 1, hidden.shape[-1])

    def _losses(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mean loss per stream and example, from `[streams * scored, 1, hidden]`: float64.

        The rest of the model (final norm, head, soft-capping) is position-wise.
        """
        scored = len(self.targets.ids)
        targets = self.targets.ids.repeat(len(hidden) // scored).to(device_of(self.model))
        step = positions_per_chunk(self.model, hidden.device)
        output_template = self.suffix.calls[f"layer {len(self.layers) - 1}"].output
        with onloaded(self.model, besides=[*self.layers, self.model.get_input_embeddings()]):
            losses = [
                token_losses(
                    logits_of(
                        self.model, self.layers, output_template, hidden[start : start + step]
                    ),
                    targets[start : start + step],
                )
                for start in range(0, len(hidden), step)
            ]
        return self.targets.example_means(torch.cat(losses).view(-1, scored))


def _given_last_rows(
    module: nn.Module, output_template: Any, given: torch.Tensor
) -> AbstractContextManager[None]:
    """Let `module` return `given` for its last rows, and compute the others only.

    Args:
        module: An attention, an MLP, its projection, or experts.
        output_template: What it returned once, which says how it returns its output.
        given: Its output for the last rows, `[rows, tokens, hidden]`.
    """
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        # Experts and some MLPs see all tokens as one list.
        last = given.flatten(0, given.ndim - hidden.ndim)
        computed = len(hidden) - len(last)
        if computed == 0:
            return repack_output(output_template, last)
        # Experts get the routing of every row; what attention gets is of the computed rows already.
        others = [arg[:computed] if len(arg) == len(hidden) else arg for arg in args]
        output = own(hidden[:computed], *others, **kwargs)
        return repack_output(output, torch.cat([hidden_states_of(output), last]))

    return replaced_forward(module, forward)


def _other_blocks(sites: Iterable[Site]) -> list[Site]:
    """One site of each MLP and of each module of experts."""
    return list({site.output_module: site for site in sites if site.kind != "attention"}.values())


def _every_position(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def prefix_to_share(
    view: ModelView,
    examples: list[CalibrationExample],
) -> int:
    """Tokens to compute once for all examples: their shared prefix where it pays, otherwise 0.

    A prefix is computed apart only by a model that gives the same losses that way, which is tried
    on the longest examples. A model need not: some change their position encoding when a sequence
    gets long, others make no use of the keys and values that they are given.
    """
    prefix = shared_prefix(examples)
    longest = max(len(example.input_ids) for example in examples)
    if len(examples) == 1 or prefix < WORTHWHILE_SHARE * longest:
        return 0
    unit = next(SiteUnit(site, site.units[0]) for site in view.sites if site.kind == "attention")
    apart, whole = (
        _intact_and_masked(Wavefront(view, batches(examples, 2, length)[0]), unit)
        for length in (prefix, 0)
    )
    # Where the model is sure of an answer: the last bits of its logits, in float32.
    quantum = 16 * torch.finfo(torch.float32).eps
    if torch.allclose(apart, whole, rtol=tolerance(view.model.dtype), atol=quantum, equal_nan=True):
        return prefix
    logger.warning_once(
        f"{type(view.model).__name__} gives other losses when the {prefix} tokens that all "
        "examples begin with are computed apart: they are computed again for each example."
    )
    return 0


def _intact_and_masked(wavefront: Wavefront, unit: SiteUnit) -> torch.Tensor:
    return torch.stack([wavefront.intact_losses(), wavefront.masked_losses([unit])[0]])


def tokens_per_chunk(model: PreTrainedModel) -> int:
    """Tokens that travel together; more bring no more speed, only memory.

    On the CPU larger tensors even cost: the allocator returns those above 32 MB to the system each
    time, and the next one is paged in anew.
    """
    if device_of(model).type == "cuda":
        return 65536
    return 2048


def tokens_per_batch(
    model: PreTrainedModel, budget: int, prefix: int = 0, sites: Iterable[Site] = ()
) -> int:
    """Tokens per batch, so that what is recorded of the intact pass takes half of the budget.

    Args:
        model: The model.
        budget: Bytes.
        prefix: Tokens that are computed once for all examples, and do not count.
        sites: Those whose blocks are recorded beside attention.
    """
    config = model.config.get_text_config(decoder=True)
    # Input of the layer, input and output of the attention, and input of its projection.
    per_token = config.num_hidden_layers * 4 * config.hidden_size * 4
    for site in _other_blocks(sites):
        input_width = site.width if site.output_module == site.projection else config.hidden_size
        per_token += (input_width + config.hidden_size) * 4
    # Each batch computes the prefix anew, so few large ones are better.
    wanted = tokens_per_chunk(model) // (1 if prefix else 4)
    return max(1, min(wanted, budget // 2 // per_token - prefix))


def streams_per_chunk(model: PreTrainedModel, batch: Batch, budget: int) -> int:
    """Streams that travel together, so that their activations take half of the budget."""
    config = model.config.get_text_config(decoder=True)
    count, longest = batch.input_ids.shape
    tokens = batch.prefix + count * (longest - batch.prefix)
    per_token = activation_bytes_per_token(model, longest)
    # Each example reads the keys and values of the prefix, once more for grouped-query attention.
    read = count * batch.prefix * 4 * 4 * config.hidden_size
    wanted = tokens_per_chunk(model) // tokens
    return max(1, min(wanted, budget // 2 // (tokens * per_token + read)))
