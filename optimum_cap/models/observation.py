"""Observes which projections of a decoder layer feed which, and which rows reach which head.

A model runs once on a short batch without any matrix products: every projection returns random
values instead. One layer of each kind then runs again, with these values as the leaves of a graph.
Where a gradient is exactly zero, no data flows. The layout of a layer is thus derived from what its
code does, regardless of module names. Weights are never read, so they may be on disk or on the meta
device.
"""

import functools
import inspect
import itertools
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_cap.models.experts import ExpertsLayout, experts_layout, gate
from optimum_cap.models.hooks import (
    RecordedCall,
    StopForwardError,
    call_model,
    first_argument,
    hidden_states_of,
    replaced_forward,
    split_hidden,
)
from optimum_cap.models.internals import offloading_hook, own_tensors
from optimum_cap.models.layouts import registered_linear
from optimum_cap.models.sites import Range

_BATCH, _TOKENS = 3, 11  # unlikely as numbers of heads
_DRAWS = 3  # random inputs to observe rows with, because a ReLU blocks half of the values
_FEW_VALUES = 1 << 16
_UNITS = 64  # units of experts observed at a time
_LINEAR = (nn.Linear, Conv1D)


class LayoutError(ValueError):
    """A user's settings do not fit the layers of the model; the message says what to do."""


@dataclass(frozen=True)
class Projection:
    """A module of a decoder layer that multiplies its input by a matrix, or by experts' matrices.

    Attributes:
        name: Path in the layer.
        rows: Number of its outputs.
        columns: Number of its inputs.
        experts: How it stores its experts, if it is an experts module.
    """

    name: str
    rows: int
    columns: int
    experts: ExpertsLayout | None = None


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a projection that reach the same units of a site.

    Attributes:
        start: First row.
        stop: One past the last row.
        units: The units, in order.
        separable: Whether the rows reach one unit and nothing else, neither through the statistics
            of a norm nor in later layers.
    """

    start: int
    stop: int
    units: tuple[int, ...]
    separable: bool


@dataclass
class ObservedLayer:
    """The observations in a decoder layer.

    Attributes:
        projections: The called projections by name, in the order of their first calls.
        uncalled: Projections that were not called, but are in a list with one that was.
        feeders: For each projection, those whose outputs reach its input without passing through
            another projection.
        writers: Projections whose outputs reach the output of the layer in this way.
        routing: Projections whose outputs reach the choice of experts in this way.
        mixing: Projections whose input at a token depends on projections of other tokens.
        looking_ahead: Projections whose input at a token depends on projections of later tokens.
        kept: Projections whose outputs the layer passes to later layers (shared keys and values).
        output_modules: For each projection, the path of the module around it that returns its
            output unchanged; its own path if there is none.
    """

    projections: dict[str, Projection] = field(default_factory=dict)
    uncalled: set[str] = field(default_factory=set)
    feeders: dict[str, set[str]] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    routing: set[str] = field(default_factory=set)
    mixing: set[str] = field(default_factory=set)
    looking_ahead: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    output_modules: dict[str, str] = field(default_factory=dict)


def is_projection(module: nn.Module) -> bool:
    """Return whether a module computes exactly the product with its weight, plus a bias.

    A subclass of `nn.Linear` with its own forward is tested on a small weight: Falcon's passes,
    BitNet's quantizes its weight first.
    """
    kind: Any = type(module)
    if not isinstance(module, (*_LINEAR, *registered_linear())):
        return False
    if kind.forward in [linear.forward for linear in _LINEAR] or _computes_a_product(kind):
        return True
    if isinstance(module, registered_linear()):
        raise LayoutError(
            f"{kind.__name__} was given to register_layout, but does not compute x @ weight.T plus "
            "its bias on a small weight: leave it out, or let it be built from in_features and "
            "out_features"
        )
    return False


@functools.cache
def _computes_a_product(kind: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(rows, 3, generator=generator) for rows in (4, 6))
    bias = torch.randn(4, generator=generator)
    try:
        stand_in = kind.__new__(kind) if issubclass(kind, nn.Linear) else kind(3, 4)
        if issubclass(kind, nn.Linear):
            nn.Linear.__init__(stand_in, 3, 4)
        stand_in.weight.data = weight
        if getattr(stand_in, "bias", None) is not None:
            stand_in.bias.data = bias
        with torch.no_grad():
            found = stand_in(hidden)
            expected = nn.functional.linear(
                hidden, stand_in.weight, getattr(stand_in, "bias", None)
            )
    except Exception:  # it needs more than a weight and a bias, so it is not a mere product
        return False
    return isinstance(found, torch.Tensor) and bool(
        found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    )


def projections_in(layer: nn.Module) -> dict[str, Projection]:
    """Return all projections of a layer by name, called or not."""
    found = {}
    for name, module in layer.named_modules():
        if is_projection(module):
            rows, columns = module.weight.shape
            if isinstance(module, Conv1D):
                rows, columns = columns, rows
            found[name] = Projection(name, rows, columns)
        elif (layout := experts_layout(module)) is not None:
            found[name] = Projection(name, layout.hidden, layout.hidden, layout)
    return found


class LayerObserver:
    """Runs one decoder layer without matrix products, and observes the data flow.

    Args:
        layer: The layer.
        call: A call of it.
        head_counts: Candidates for the number of heads or of channels per head.

    Attributes:
        width: Width of the hidden states.
        observed: The observations.

    Raises:
        RuntimeError: The layer cannot run in this way, or returns values that are not finite.
    """

    def __init__(
        self,
        layer: nn.Module,
        call: RecordedCall,
        head_counts: Iterable[int] = (),
    ) -> None:
        self.width = call.hidden.shape[-1]
        self._layer = layer
        self._call = call
        self._projections = projections_in(layer)
        self._counts = sorted(set(head_counts), reverse=True)
        self._runs: dict[int, _Run] = {}
        self._reached_before: dict[Any, dict[str, torch.Tensor]] = {}
        self.observed = ObservedLayer()
        self._run = self._forward(seed=0)
        self._observe()

    def _forward(self, seed: int, statistics: bool = True) -> "_Run":
        with nullcontext() if statistics else _ConstantStatistics():
            return _Run(self._layer, self._projections, self._call, seed)

    def _without_statistics(self, seed: int) -> "_Run":
        if seed not in self._runs:
            self._runs[seed] = self._forward(seed, statistics=False)
        return self._runs[seed]

    def _observe(self) -> None:
        run, seen = self._run, self.observed
        seen.projections = {name: self._projections[name] for name in run.inputs}
        for name, inputs in run.inputs.items():
            seen.feeders[name] = run.sources(inputs)
        seen.writers = run.sources([run.output])
        seen.routing = run.sources(run.routing)
        seen.kept = run.sources(run.left_for_later)
        for name in seen.projections:
            if self._mixes(name):
                seen.mixing.add(name)
            seen.output_modules[name] = run.output_module(name)
        self._add_siblings()

    def _add_siblings(self) -> None:
        """Treat modules of a list like one that was called, for experts that no token reached."""
        seen = self.observed
        for name, projection in self._projections.items():
            if name in seen.projections:
                continue
            for called in list(seen.projections):
                prefixes = _differing_index(called, name)
                like = self._projections[called]
                if prefixes and (like.rows, like.columns) == (projection.rows, projection.columns):
                    self._copy_observations(called, name, *prefixes)
                    break

    def _copy_observations(self, called: str, name: str, old: str, new: str) -> None:
        def renamed(each: str) -> str:
            return f"{new}{each.removeprefix(old)}" if f"{each}.".startswith(f"{old}.") else each

        seen = self.observed
        seen.projections[name] = self._projections[name]
        seen.uncalled.add(name)
        seen.feeders[name] = {renamed(each) for each in seen.feeders[called]}
        seen.output_modules[name] = renamed(seen.output_modules[called])
        for names in (seen.writers, seen.routing, seen.mixing, seen.kept):
            if called in names:
                names.add(name)
        for other, feeders in seen.feeders.items():
            if called in feeders and not other.startswith(f"{old}."):
                feeders.add(name)

    def _mixes(self, name: str) -> bool:
        """Return whether the input of a projection at the last token depends on earlier tokens."""
        inputs = self._run.by_batch(name)
        if inputs is None:
            return False
        if self._reach(slice(1, None), inputs[:, 0]):
            self.observed.looking_ahead.add(name)
        earlier = slice(None, -1)
        return self._reach(earlier, inputs[:, -1]) or self._run.depends_on_shared(inputs)

    def _reach(self, tokens: slice, outputs: torch.Tensor) -> bool:
        """Return whether the outputs of projections at some tokens reach the given outputs."""
        gradients = itertools.chain.from_iterable(self._run.gradients(outputs).values())
        by_token = (self._run.split_tokens(gradient) for gradient in gradients)
        return any(each is not None and bool((each[:, tokens] != 0).any()) for each in by_token)

    def sees_all_tokens(self, name: str) -> bool:
        """Return whether a projection runs once on all tokens, so that its rows can be observed."""
        return self._run.by_batch(name) is not None

    def find_heads(self, site: str, known: int | None = None) -> int | None:
        """Return the number of channels per head of the input of a mixing projection.

        A number of heads is accepted if every head has rows of feeders that reach its first and
        last channel and no other head: queries, or the time steps of a state space.

        Args:
            site: Name of the projection.
            known: The number of heads registered by the user.

        Returns:
            The number; `None` if there are no heads or none were found.

        Raises:
            ValueError: The number of heads is not `known`.
        """
        width = self._projections[site].columns
        if known is not None:
            if width % known or not self._are_heads(site, known):
                raise LayoutError(
                    f"{known} heads are registered for {site!r}, which has {width} channels, but "
                    "they are not what its channels depend on: no rows of its input projections "
                    "reach all channels of one such head and no other. Correct the number given to "
                    "register_layout, or leave it out"
                )
            return width // known
        counts = {count for count in self._counts if 1 < count < width and width % count == 0}
        counts |= {width // size for size in self._counts if size > 1 and width % size == 0}
        for count in sorted(counts - {1}, reverse=True):
            if self._are_heads(site, count):
                return width // count
        return None

    def _are_heads(self, site: str, count: int) -> bool:
        size = self._projections[site].columns // count
        if size == 1:
            return False
        # The first two heads show whether this is the head size. Most candidates fail here.
        probes = [0, size, size - 1, 2 * size - 1, 1]
        channels = [(probe, probe + 1) for probe in probes]
        reached = self._reached(site, channels, statistics=False, draws=1)
        if not any(
            bool(((of[:2] & of[2:4]) & (of[:4].sum(dim=0) == 2)).any(dim=1).all())
            for of in reached.values()
        ):
            return False
        # If rows reach some but not all channels of a head, it is really several heads; keys shared
        # by a group of heads reach the whole group.
        if size > 2 and any(bool((of[0] & of[4] & ~of[2]).any()) for of in reached.values()):
            return False
        bounds = [(head * size, (head + 1) * size) for head in range(count)]
        return any(
            bool((of & (of.sum(dim=0) == 1)).any(dim=1).all())
            for of in self._reached(site, bounds, statistics=False).values()
        )

    def rows(self, site: str, bounds: Sequence[Range]) -> dict[str, list[Rows]]:
        """Return which rows of a projection's feeders reach which units.

        Args:
            site: Name of the projection.
            bounds: The channels of each unit.
        """
        direct = self._reached(site, bounds, statistics=False)
        with_statistics = self._reached(site, bounds, statistics=True)
        found = {}
        for name in self.observed.feeders[site]:
            if self._projections[name].experts is not None:
                continue
            of_rows = direct[name].clone()
            nowhere = ~of_rows.any(dim=0)
            of_rows[:, nowhere] = True  # rows that reach no unit here belong to all
            others = (of_rows | with_statistics[name]).sum(dim=0) > 1
            # Other projections spread their input, such as the projection of B and C in a state
            # space.
            fed = [other for other, of in self.observed.feeders.items() if name in of]
            alone = name not in self.observed.kept and fed == [site]
            separable = ~others & ~nowhere & torch.tensor(alone)
            found[name] = _runs(of_rows, separable)
        return found

    def _reached(
        self, site: str, bounds: Sequence[Range], statistics: bool, draws: int = _DRAWS
    ) -> dict[str, torch.Tensor]:
        """Return which rows of each feeder reach which channels, bool `[ranges, rows]`.

        Args:
            site: Name of the projection that receives the channels.
            bounds: Ranges of channels.
            statistics: Whether to follow the flow through the statistics of norms.
            draws: Maximum number of random inputs to try until every row reaches something.
        """
        key = site, tuple(bounds), statistics
        if key in self._reached_before:
            return self._reached_before[key]
        feeders = [n for n in self.observed.feeders[site] if self._projections[n].experts is None]
        found = self._reached_before[key] = {
            name: torch.zeros(len(bounds), self._projections[name].rows, dtype=torch.bool)
            for name in feeders
        }
        for draw in range(1 if statistics else draws):
            run = self._run if statistics else self._without_statistics(draw)
            inputs = run.by_batch(site)
            if inputs is None:
                raise RuntimeError(f"{site} runs on some of the tokens only")
            for first in range(0, len(bounds), len(inputs)):
                some = bounds[first : first + len(inputs)]
                picked = torch.stack(
                    [
                        # With random signs and sizes, so that nothing cancels.
                        (
                            inputs[i, ..., slice(*each)] * run.noise(inputs[i, ..., slice(*each)])
                        ).sum()
                        for i, each in enumerate(some)
                    ]
                )
                for name, gradients in run.gradients(picked, feeders).items():
                    for gradient in map(run.split_tokens, gradients):
                        if gradient is None:
                            raise RuntimeError(f"{name} runs on some of the tokens only")
                        hit = (gradient[: len(some)] != 0).flatten(1, 2).any(dim=1).cpu()
                        found[name][first : first + len(some)] |= hit
            if all(bool(of.any(dim=0).all()) for of in found.values()):
                break  # every row reaches something
        return found


def rows_of_experts(module: nn.Module, bounds: Sequence[Range]) -> list[Rows]:
    """Return which rows of an expert's input projection reach which units of its output.

    Args:
        module: The experts module.
        bounds: The channels of each unit.
    """
    layout = experts_layout(module)
    assert layout is not None
    found = torch.zeros(len(bounds), layout.rows, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(bounds), _UNITS):
        some = bounds[first : first + _UNITS]
        for _ in range(_DRAWS):
            projected = torch.randn(len(some), _TOKENS, layout.rows, generator=generator)
            projected.requires_grad_()
            gated = gate(module, projected)
            parts = [gated[unit, :, slice(*each)].sum() for unit, each in enumerate(some)]
            [gradient] = torch.autograd.grad(torch.stack(parts).sum(), projected)
            found[first : first + _UNITS] |= (gradient != 0).any(dim=1)
    nowhere = ~found.any(dim=0)
    found[:, nowhere] = True
    return _runs(found, (found.sum(dim=0) == 1) & ~nowhere)


def _runs(reached: torch.Tensor, separable: torch.Tensor) -> list[Rows]:
    """Return runs of rows that reach the same units, given bool `[units, rows]` and `[rows]`."""
    codes = torch.cat([reached.T, separable.unsqueeze(1)], dim=1)
    changes = (codes[1:] != codes[:-1]).any(dim=1).nonzero().flatten() + 1
    starts = [0, *changes.tolist(), len(codes)]
    return [
        Rows(
            start,
            stop,
            tuple(reached[:, start].nonzero().flatten().tolist()),
            bool(separable[start]),
        )
        for start, stop in itertools.pairwise(starts)
    ]


class _Run:
    """One run of a layer in which projections return random graph leaves.

    Attributes:
        inputs: The inputs of each projection, call by call.
        leaves: The returned leaves of each projection.
        routing: Routing weights of experts.
        left_for_later: The values that the layer passed to later ones.
        output: Hidden states that the layer returned.
    """

    def __init__(
        self,
        layer: nn.Module,
        projections: Mapping[str, Projection],
        call: RecordedCall,
        seed: int,
    ) -> None:
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.leaves: dict[str, list[torch.Tensor]] = {}
        self.routing: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._returned: dict[str, list[torch.Tensor]] = {}
        args, kwargs = _copied(call.args), _copied(call.kwargs)
        given = list(_tensors([each for each in (*args, *kwargs.values()) if _is_state(each)]))
        self.shared = [each for each in given if each.is_floating_point()]
        with ExitStack() as stack:
            for name, projection in projections.items():
                module = layer.get_submodule(name)
                stack.enter_context(replaced_forward(module, self._leaf(projection)))
            around = {_parent(name) for name in projections} - {""} - set(projections)
            for name in around:
                handle = layer.get_submodule(name).register_forward_hook(self._record(name))
                stack.callback(handle.remove)
            self.output = hidden_states_of(layer(call.hidden.clone(), *args, **kwargs))
        if not self.output.isfinite().all():
            raise RuntimeError("it returned values that are not finite")
        given_ids = set(map(id, given))
        self.left_for_later = [
            tensor
            for tensor in _tensors((args, kwargs))
            if tensor.requires_grad and id(tensor) not in given_ids
        ]

    def _leaf(self, projection: Projection) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden, *others = (*args, *kwargs.values())
            self.inputs.setdefault(projection.name, []).append(hidden)
            if projection.experts is not None:
                self.routing += [each for each in others if each.is_floating_point()]
            values = torch.randn(*hidden.shape[:-1], projection.rows, generator=self._generator)
            leaf = values.to(hidden).requires_grad_()
            self.leaves.setdefault(projection.name, []).append(leaf)
            return leaf.clone()  # models may change outputs of projections in place

        return forward

    def _record(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = hidden_states_of(output)
            if isinstance(hidden, torch.Tensor):
                self._returned.setdefault(name, []).append(hidden)

        return hook

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """Return random values of the same shape."""
        return torch.randn(like.shape, generator=self._generator).to(like)

    def gradients(
        self, outputs: torch.Tensor, names: Iterable[str] | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Return the gradients of a random combination of outputs with respect to the leaves."""
        names = list(self.leaves if names is None else names)
        leaves = [leaf for name in names for leaf in self.leaves[name]]
        found: dict[str, list[torch.Tensor]] = {}
        gradients = iter(self._gradients_at(leaves, outputs))
        for name in names:
            for _ in self.leaves[name]:
                if (gradient := next(gradients, None)) is not None:
                    if not gradient.isfinite().all():
                        raise RuntimeError(f"the gradient at {name} is not finite")
                    found.setdefault(name, []).append(gradient)
        return found

    def _gradients_at(
        self, leaves: list[torch.Tensor], outputs: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        if not outputs.requires_grad or not leaves:
            return []
        total = (outputs.float() * self.noise(outputs).float()).sum()
        return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)

    def sources(self, outputs: Iterable[torch.Tensor]) -> set[str]:
        """Return the projections that outputs depend on."""
        return {
            name
            for each in outputs
            for name, gradients in self.gradients(each).items()
            if any(bool((gradient != 0).any()) for gradient in gradients)
        }

    def split_tokens(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return hidden states as `[batch, tokens, streams, width]`; `None` for other tensors.

        Some modules see all tokens of a batch as one list. Some models have several hidden states
        per token, in a dimension before (Gemma 3n) or after (DeepSeek V4) batch and tokens.
        """
        batch, tokens = _BATCH, _TOKENS
        if hidden.ndim == 2 and len(hidden) == batch * tokens:
            return hidden.view(batch, tokens, 1, -1)
        if hidden.ndim == 3 and hidden.shape[:2] == (tokens, batch):  # XLNet
            return hidden.transpose(0, 1).unsqueeze(2)
        if hidden.ndim >= 3 and hidden.shape[:2] == (batch, tokens):
            return hidden.reshape(batch, tokens, -1, hidden.shape[-1])
        if hidden.ndim == 4 and hidden.shape[1:3] == (batch, tokens):
            return hidden.permute(1, 2, 0, 3)
        if hidden.ndim >= 3 and len(hidden) == batch:  # with more tokens (CPM-Ant)
            return hidden.reshape(batch, -1, 1, hidden.shape[-1])
        return None

    def by_batch(self, name: str) -> torch.Tensor | None:
        """Return the input of a projection, `[batch, tokens, streams, width]`.

        `None` if it was called several times, or only for some tokens.
        """
        called = [self.split_tokens(hidden) for hidden in self.inputs.get(name, [])]
        return called[0] if len(called) == 1 else None

    def depends_on_shared(self, outputs: torch.Tensor) -> bool:
        """Return whether outputs depend on values passed on by earlier layers."""
        gradients = self._gradients_at(self.shared, outputs)
        return any(each is not None and bool((each != 0).any()) for each in gradients)

    def output_module(self, name: str) -> str:
        """Return the module around a projection that returns its output, or the projection."""
        parent = _parent(name)
        returned = self._returned.get(parent, [])
        leaves = self.leaves.get(name, [])
        if not (len(returned) == len(leaves) == 1):
            return name
        flat = returned[0].reshape(-1), leaves[0].reshape(-1)
        return parent if flat[0].shape == flat[1].shape and torch.equal(*flat) else name


def _differing_index(first: str, second: str) -> tuple[str, str] | None:
    """Return the prefixes of two names up to their only differing index, if there is one."""
    parts, others = first.split("."), second.split(".")
    differing = [i for i, pair in enumerate(zip(parts, others, strict=False)) if len(set(pair)) > 1]
    if len(parts) != len(others) or len(differing) != 1:
        return None
    [place] = differing
    if not (parts[place].isdigit() and others[place].isdigit()):
        return None
    return ".".join(parts[: place + 1]), ".".join(others[: place + 1])


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_state(value: Any) -> bool:
    """Return whether a layer argument holds values that layers pass to each other."""
    return isinstance(value, UserDict)


def _copied(value: Any) -> Any:
    """Copy containers, so that a layer can change them without side effects.

    Values from earlier layers become leaves of the graph.
    """
    if isinstance(value, tuple | list):
        return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value
    if _is_state(value):
        return type(value)({key: _as_leaves(each) for key, each in value.items()})
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value


def _as_leaves(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_leaves, value))
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


_STATISTICS = (
    *("mean", "var", "std", "var_mean", "norm", "vector_norm"),
    *("rsqrt", "sqrt"),  # of sums of squares
)


class _ConstantStatistics(TorchFunctionMode):
    """Treats norm statistics as constants, so that norms pass on each channel independently."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _STATISTICS:
            with torch.no_grad():
                return func(*args, **kwargs)
        if name in ("layer_norm", "rms_norm", "group_norm", "normalize"):
            return _with_constant_statistics(func, args, kwargs)
        return func(*args, **kwargs)


def _with_constant_statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the output of a norm whose gradient passes on each channel independently."""
    hidden, *rest = args if args else (kwargs.pop("input"),)
    with torch.no_grad():
        output = func(hidden, *rest, **kwargs)
    if not isinstance(hidden, torch.Tensor) or not hidden.requires_grad:
        return output
    return output + (hidden - hidden.detach())


def recorded_layer_calls(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], device: torch.device
) -> dict[str, RecordedCall]:
    """Run a model without matrix products, and return the calls of some of its layers.

    Args:
        model: A causal language model.
        layers: The layers, by name.
        device: The device of its inputs.

    Raises:
        ValueError: The model, or one of the layers, does not run on text alone.
    """
    if needed := _needed_besides_tokens(model):
        raise LayoutError(
            f"{type(model).__name__} cannot be pruned: it does not run without "
            f"{', '.join(needed)}, and calibration examples are text: choose a model that also "
            "takes text alone"
        )
    calls: dict[str, RecordedCall] = {}
    generator = torch.Generator().manual_seed(0)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32

    def product(rows: int) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden = first_argument(args, kwargs)
            return torch.randn(*hidden.shape[:-1], rows, generator=generator).to(hidden)

        return forward

    def embedded(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shape = *input_ids.shape, embeddings.weight.shape[-1]
        return torch.randn(shape, generator=generator).to(input_ids.device, dtype)

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, args, kwargs = split_hidden(args, kwargs)
            calls.setdefault(name, RecordedCall(hidden, _copied(args), _copied(kwargs)))
            if len(calls) == len(layers):
                raise StopForwardError  # later layers show nothing new

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, projection in projections_in(model).items():
            module = model.get_submodule(name)
            rows = 1 if module is head else projection.rows  # the logits are not used
            stack.enter_context(replaced_forward(module, product(rows)))
        stack.enter_context(replaced_forward(embeddings, embedded))
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(record(name), with_kwargs=True)
            stack.callback(handle.remove)
        ids = torch.randint(
            embeddings.weight.shape[0], (_BATCH, _TOKENS), generator=generator, device="cpu"
        )
        stack.enter_context(suppress(StopForwardError))
        call_model(model, ids.to(device))
    if missing := [name for name in layers if name not in calls]:
        raise LayoutError(
            f"{type(model).__name__} cannot be pruned: on text alone, it does not run "
            f"{', '.join(missing)} (attention to images, for example), and calibration examples "
            "are text: choose a model that runs all its layers on text"
        )
    return calls


def _needed_besides_tokens(model: PreTrainedModel) -> list[str]:
    """Return the arguments other than token ids that a model needs to run."""
    return [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name != "input_ids"
    ]


@contextmanager
def with_values(model: nn.Module) -> Iterator[None]:
    """Give parameters and buffers on the meta device values that take hardly any memory.

    Modules with offloaded weights are unaffected, because accelerate loads their weights.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if offloading_hook(module) is not None:
                continue
            for store in own_tensors(module):
                for name, value in store.items():
                    if value is not None and value.device.type == "meta":
                        stack.callback(store.__setitem__, name, value)
                        store[name] = _constant(value)
        yield


def _constant(value: torch.Tensor) -> torch.Tensor:
    one = 0.5 if value.is_floating_point() else value.dtype == torch.bool
    constant = torch.tensor(one, dtype=value.dtype).expand(value.shape)
    if value.numel() <= _FEW_VALUES:  # Gemma 3n clamps some of its weights in place
        constant = constant.clone()
    return nn.Parameter(constant, False) if isinstance(value, nn.Parameter) else constant


def head_counts(*sources: Any) -> set[int]:
    """Return numbers in configs and modules that may be head counts or head sizes."""
    found: set[int] = set()
    for source in sources:
        values = source.to_dict() if hasattr(source, "to_dict") else vars(source)
        for name, value in values.items():
            if "head" in name and isinstance(value, int) and not isinstance(value, bool):
                found.add(value)
    return found
