"""Removes parts of a model: experts, heads, channels or decoder layers.

The parts to remove are chosen with the dense model, a smaller model takes over the kept parts, and
its layers are fitted to the hidden states of the dense one. The given model changes only in the
last step.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.checkpoint import MatrixSparsity, PruningRecord, UnitScore
from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample, CalibrationSet
from optimum_cap.methods import (
    CRITERIA,
    Criterion,
    CriterionInputs,
    InputStatistics,
    remove_columns,
)
from optimum_cap.models import (
    CannotRemoveError,
    KeptParts,
    Matrix,
    ModelView,
    Router,
    Site,
    empty_model,
    evaluation_mode,
    float32_on_cpu,
    kinds_of_layers,
    smaller_config,
    smaller_model,
)
from optimum_cap.progress import progress_bar
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import LayerStore, PruningCache
from optimum_cap.pruning.first_batch import MOST_TOKENS_ROUTED_OTHERWISE
from optimum_cap.pruning.part_ranking import (
    experts_to_remove,
    first_experts,
    first_layers,
    layers_to_remove,
)
from optimum_cap.pruning.parts import (
    check_agrees,
    check_layers_have_no_number,
    check_not_shared,
    groups_of_heads,
    kept_indices,
    made_up_example,
    mask_of_columns,
    mlps_by_width,
    step_of_channels,
    with_divided_mlps,
)
from optimum_cap.pruning.regions import UnitKey
from optimum_cap.pruning.run import PruningRun
from optimum_cap.pruning.sensitivity import temporary_weights
from optimum_cap.pruning.smaller_refinement import SmallerModelRefinement
from optimum_cap.pruning.versions import versions
from optimum_cap.runtime import ProcessGroup
from optimum_cap.scoring import UnitLosses
from optimum_cap.text import public_name

_LEAST_OF_GROUP = 2  # experts by which routers with groups (DeepSeek V3) compare groups


@dataclass(frozen=True)
class Removal:
    """The result of removing parts of a model.

    Attributes:
        model: The smaller model.
        parts: Number of parts of each layer, or of the model, `before` and `after`, by kind of
            `part`.
        kept: Indices of the kept parts, by name of their module.
        layer_store: Stores refined layers, if there is a resume folder.
        scores: Causal scores, if the criterion needs them, for the record.
        intact_loss: Loss of the dense model, if the criterion needs causal scores.
        measured: The divergences that determined how much of each kind was removed.
    """

    model: PreTrainedModel
    parts: list[dict[str, Any]]
    kept: dict[str, list[int]]
    layer_store: LayerStore | None
    scores: list[UnitScore] = field(default_factory=list)
    intact_loss: float | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)


class PartRemoval:
    """Removes experts, heads, channels or layers, the same number from every layer.

    Args:
        model: The dense model; it is left unchanged.
        config: What to remove and how.
        process_group: The processes that share the refinement.
        fewest: Remove the smallest possible number of parts, instead of the config's sparsity.
        view: The result of `with_divided_mlps`, if already computed.

    Attributes:
        view: The model, with at least two units in every MLP and expert.
        before: Number of parts of each layer, or of layers.
        step: The number of removed parts is a multiple of this.
        count: How many of them are removed.

    Raises:
        CannotRemoveError: The model has no such parts, or a different number in some layers; or the
            sparsity rounds to none or all of them, or leaves fewer experts than the router selects.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CAPConfig,
        process_group: ProcessGroup,
        *,
        fewest: bool = False,
        view: ModelView | None = None,
    ) -> None:
        self.view = view or with_divided_mlps(model)
        self._config = config
        self._process_group = process_group
        self._kind = type(model).__name__
        self._routers: dict[int, Router] = {}
        self._columns: dict[Site, torch.Tensor] = {}  # columns of each part, `[parts, columns]`
        self.before = self._parts()
        self.step = 1
        if config.pattern == "channels":
            self.step = step_of_channels(self.before)
        elif fewest and config.pattern == "experts":
            self.step = self._number_of_groups
        left = self.step * round((1 - config.sparsity) * self.before / self.step)
        self.count = self.step if fewest else self.before - left
        if not 0 < self.count < self.before:
            raise CannotRemoveError(
                f"sparsity {config.sparsity} of {self.before} {config.pattern} is {self.count} "
                f"{config.pattern}: choose a sparsity that removes some and keeps some"
            )
        if config.pattern == "experts":
            self._check_groups()
        if config.pattern == "layers" and self.count > self.most:
            would = f"sparsity {config.sparsity} would remove {self.count} of {self.before} layers"
            if fewest:
                would = f"one of {self.before} layers would go"
            raise CannotRemoveError(
                f"{would}, but {self._kind} has {self.before - self.most} kinds of layers, and one "
                "of each is kept: choose " + ("another pattern" if fewest else "a lower sparsity")
            )

    def with_count(self, count: int) -> "PartRemoval":
        """Return a removal of another number of parts."""
        other = copy.copy(self)
        other.count = count
        return other

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the choice of parts depends on, other than model and data."""
        return {
            "pattern": self._config.pattern,
            "criterion": self._config.method.criterion,
            "answer_weight": self._config.method.answer_weight,
            "count": self.count,
            "seed": self._config.seed,
        }

    @property
    def most(self) -> int:
        """The maximum number of parts that can be removed."""
        fewest_left = self._fewest_experts if self._config.pattern == "experts" else 1
        if self._config.pattern == "layers":
            fewest_left = len(set(self._kinds_of_layers))
        return (self.before - fewest_left) // self.step * self.step

    @property
    def _kinds_of_layers(self) -> list[tuple[str, ...]]:
        return kinds_of_layers(self.view.model)

    @property
    def removes_from_experts(self) -> bool:
        """Whether experts, or their channels, are removed."""
        return bool(self._routers) or any(site.expert is not None for site in self._columns)

    def parameters(self) -> int:
        """Return the number of parameters of the model without the parts."""
        model, kept = self.view.model, self._kept(self._first_parts())
        config = smaller_config(model, self.view.sites, kept)
        return int(empty_model(model, config).num_parameters())

    def _parts(self) -> int:
        """Find the parts, and return their number per layer, or the number of layers."""
        pattern, sites = self._config.pattern, self.view.sites
        if pattern == "layers":
            return len(self.view.layers)
        if pattern == "experts":
            blocks = {site.block: site.layer for site in sites if site.expert is not None}
            self._routers = {
                layer: Router(self.view.model, block) for block, layer in blocks.items()
            }
            counts = {router.count for router in self._routers.values()}
            if not counts:
                raise CannotRemoveError(
                    f"{self._kind} has no experts that CAP knows, so none can be removed: choose "
                    "pattern 'channels' or 'layers'"
                )
            if len(counts) > 1 or len(self._routers) < len(blocks):
                raise CannotRemoveError(
                    f"the layers of {self._kind} have different numbers of experts "
                    f"({', '.join(map(str, sorted(counts)))}), but its config has one number: "
                    "choose another pattern"
                )
            return counts.pop()
        if pattern == "heads":
            self._columns = groups_of_heads(self.view)
            check_not_shared(self.view, self._columns)
            return len(next(iter(self._columns.values())))
        groups = mlps_by_width(sites)
        if not groups:
            raise CannotRemoveError(
                f"{self._kind} has no MLP that CAP knows, so no channel can be removed: choose "
                "pattern 'layers'"
            )
        # The config has one number, which is that of the widest part of the model.
        (_, width), sites = max(groups.items(), key=lambda item: item[0][1] * len(item[1]))
        self._columns = {site: torch.arange(width).unsqueeze(1) for site in sites}
        check_not_shared(self.view, sites)
        return width

    def check(self, examples: list[CalibrationExample]) -> None:
        """Check on one example that a smaller model computes what the model does without parts.

        The parts removed here are arbitrary.

        Args:
            examples: The calibration examples; without any, some tokens are made up.

        Raises:
            CannotRemoveError: It does not, or this architecture has no smaller model.
        """
        with evaluation_mode(self.view.model), float32_on_cpu(self.view.model):
            self.check_agrees(self._first_parts(), self.sample(), examples)

    def sample(self) -> PreTrainedModel:
        """Return a model without some arbitrary parts, on the meta device if the dense one is.

        Raises:
            CannotRemoveError: There is no smaller model of this architecture.
        """
        if self._config.pattern == "layers":
            check_layers_have_no_number(self.view.model)
        return self.without(self._first_parts(), {})

    def check_agrees(
        self, removed: Any, smaller: PreTrainedModel, examples: list[CalibrationExample]
    ) -> None:
        """Check on one example that a smaller model computes what the model does without parts.

        Args:
            removed: What is removed, as `choose` returns it.
            smaller: The smaller model, with no weights fitted.
            examples: The calibration examples; without any, some tokens are made up.

        Raises:
            CannotRemoveError: It does not.
        """
        kept = self._kept(removed)
        first = min(
            examples or [made_up_example(self.view.model)], key=lambda each: len(each.input_ids)
        )
        check_agrees(
            self.view,
            smaller,
            kept,
            first,
            self._config.pattern,
            lambda layer: self._without_parts(layer, kept),
            MOST_TOKENS_ROUTED_OTHERWISE * bool(self._routers),
        )

    def _first_parts(self) -> Any:
        if self._config.pattern == "layers":
            order = [*range(1, self.before), 0]
            return first_layers(order, self._kinds_of_layers, self.count)
        if self._config.pattern == "experts":
            groups = self._number_of_groups
            size = self.before // groups
            of_groups = range(self.count // groups)
            gone = [group * size + index for group in range(groups) for index in of_groups]
            return dict.fromkeys(self._routers, gone)
        kept = torch.arange(self.before) >= self.count
        return {site: mask_of_columns(columns, kept) for site, columns in self._columns.items()}

    @property
    def _number_of_groups(self) -> int:
        """The router's number of groups of experts, all of the same size."""
        return self._router_field("n_group")

    @property
    def _per_token(self) -> int:
        """Number of experts that each token is routed to."""
        return self._router_field("num_experts_per_tok")

    @property
    def _chosen_groups(self) -> int:
        """Number of groups of experts that each token is routed to."""
        groups = self._number_of_groups
        return min(self._router_field("topk_group", groups), groups)

    def _router_field(self, name: str, default: int = 1) -> int:
        text = self.view.model.config.get_text_config(decoder=True)
        return getattr(text, name, None) or default

    @property
    def _fewest_experts(self) -> int:
        """The minimum number of experts per layer that the router can choose from."""
        text = self.view.model.config.get_text_config(decoder=True)
        least = _LEAST_OF_GROUP if getattr(text, "n_group", None) else 1
        least = max(least, -(-self._per_token // self._chosen_groups))
        return max(self._per_token, self._number_of_groups * least)

    def _check_groups(self) -> None:
        """Check that the router has enough experts to choose from, in each of its groups.

        Raises:
            CannotRemoveError: There are too few.
        """
        groups, per_token = self._number_of_groups, self._per_token
        sparsity, after = self._config.sparsity, self.before - self.count
        if self.count % groups:
            raise CannotRemoveError(
                f"the router of {self._kind} has {groups} groups of experts of one size, but "
                f"sparsity {sparsity} removes {self.count} of {self.before} experts: choose a "
                f"sparsity that removes a multiple of {groups}"
            )
        if after < per_token:
            raise CannotRemoveError(
                f"sparsity {sparsity} leaves {after} of {self.before} experts, fewer than the "
                f"{per_token} that each token is routed to: choose a lower sparsity"
            )
        if after >= self._fewest_experts:
            return
        of_group, chosen = after // groups, self._chosen_groups
        left = (
            f"sparsity {sparsity} leaves {of_group} of {self.before // groups} experts in each "
            f"group (n_group {groups}) of the router of {self._kind}"
        )
        if of_group < _LEAST_OF_GROUP:
            raise CannotRemoveError(
                f"{left}, which compares groups by their best {_LEAST_OF_GROUP} experts: choose a "
                "lower sparsity"
            )
        raise CannotRemoveError(
            f"{left}, and those that it chooses for a token (topk_group {chosen}) have "
            f"{chosen * of_group} together, fewer than the {per_token} experts that each token is "
            "routed to: choose a lower sparsity"
        )

    def _kept(self, removed: Any) -> KeptParts:
        """Return the kept parts.

        Args:
            removed: The removed layers; the removed experts by layer; or the kept channels by site.
        """
        if self._config.pattern == "layers":
            layers = range(len(self.view.layers))
            return KeptParts(layers=[layer for layer in layers if layer not in removed])
        if self._config.pattern == "experts":
            return KeptParts(
                experts={
                    router.block: [e for e in range(router.count) if e not in removed[layer]]
                    for layer, router in self._routers.items()
                }
            )
        return KeptParts(channels=removed)

    def without(self, removed: Any, fitted: Mapping[Matrix, torch.Tensor]) -> PreTrainedModel:
        """Return a model without these parts.

        Args:
            removed: What is removed, as `choose` returns it.
            fitted: New weights of matrices of the dense model, `[out, in]`.

        Raises:
            CannotRemoveError: There is no such model.
        """
        model, sites, kept = self.view.model, self.view.sites, self._kept(removed)
        config = smaller_config(model, sites, kept)
        with temporary_weights(model, fitted):
            return smaller_model(model, sites, kept, config)

    def layers_after(self, removed: Any) -> list[int]:
        """Return the indices of the layers that are kept."""
        layers = self._kept(removed).layers
        return list(range(len(self.view.layers)) if layers is None else layers)

    def _without_parts(self, layer: int, kept: KeptParts) -> AbstractContextManager[Any]:
        """Make a layer of the dense model compute with only the kept parts."""
        if self._config.pattern == "experts" and layer in self._routers:
            router = self._routers[layer]
            experts = set(range(router.count)) - set(kept.experts[router.block])
            return router.without(torch.tensor(sorted(experts)))
        zeroed = {
            site.output_proj: self.view.weights(site.output_proj) * mask
            for site, mask in kept.channels.items()
            if site.layer == layer
        }
        return temporary_weights(self.view.model, zeroed) if zeroed else nullcontext()

    def run(self, examples: list[CalibrationExample], losses: UnitLosses | None = None) -> Removal:
        """Remove the parts.

        Args:
            examples: The calibration examples; none if the config needs no data.
            losses: Losses of the units, if the criterion needs causal scores and they are already
                measured.
        """
        model, config = self.view.model, self._config
        cache = None
        if config.resume_dir is not None and examples:
            cache = PruningCache(config.resume_dir, model, examples, self._process_group)
        scoring = PruningRun(self.view, config, self.view.matrices, examples, self._process_group)
        if self._criterion.needs_scores:
            scoring.score_units(losses)
        with evaluation_mode(model), float32_on_cpu(model) as stored_dtypes:
            removed, fitted = self.choose(examples, scoring.importances, cache)
            smaller = self.without(removed, fitted)
            if not self._columns:  # otherwise the weights of columns were fitted
                self.check_agrees(removed, smaller, examples)
            description = self.description(removed)
            refinement = SmallerModelRefinement(
                self.view, smaller, self.layers_after(removed), config, self._process_group
            )
            store = refinement.run_(examples, description, stored_dtypes, cache)
        return Removal(
            smaller,
            [self.summary()],
            description,
            store,
            scoring.unit_scores,
            scoring.intact_loss,
        )

    def summary(self) -> dict[str, Any]:
        """Return the number of parts before and after, for the record."""
        return {
            "part": self._config.pattern,
            "before": self.before,
            "after": self.before - self.count,
        }

    def choose(
        self,
        examples: list[CalibrationExample],
        importances: Mapping[UnitKey, float],
        cache: PruningCache | None,
    ) -> tuple[Any, dict[Matrix, torch.Tensor]]:
        """Choose the parts to remove.

        Args:
            examples: The calibration examples.
            importances: Importances of units, if the criterion needs causal scores.
            cache: Stores chosen experts and layers.

        Returns:
            The removed layers, or the removed experts of each layer, least important first; or the
            mask of kept channels of each site, bool `[width]`. And new weights of matrices of the
            dense model, `[out, in]`.
        """
        config = self._config
        if self._columns:
            return self._choose_columns(examples, importances)
        settings = self.settings
        layers = list(self._routers)
        shape = (len(layers), self.count) if layers else (self.count,)
        stored = cache.choice(settings, shape, self.before) if cache else None
        if stored is None:
            if layers:
                by_layer = experts_to_remove(
                    self.view, self._routers, examples, self.count, self._number_of_groups, config
                )
                stored = torch.tensor([by_layer[layer] for layer in layers])
            else:
                stored = torch.tensor(layers_to_remove(self.view, examples, self.count, config))
            if cache:
                cache.put_choice(settings, stored)
        if not layers:
            return stored.tolist(), {}
        return dict(zip(layers, stored.tolist(), strict=True)), {}

    def first(self, removed: Any) -> Any:
        """Return this removal's number of experts or layers from those chosen for a larger removal.

        Args:
            removed: The result of `choose` for the larger removal.
        """
        if self._config.pattern == "layers":
            return removed[: self.count]
        return {
            layer: first_experts(experts, self.before, self.count, self._number_of_groups)
            for layer, experts in removed.items()
        }

    def _choose_columns(
        self, examples: list[CalibrationExample], importances: Mapping[UnitKey, float]
    ) -> tuple[dict[Site, torch.Tensor], dict[Matrix, torch.Tensor]]:
        """Choose heads or channels; each layer receives the outputs of the thinned ones before."""
        model, config, criterion = self.view.model, self._config, self._criterion
        kept: dict[Site, torch.Tensor] = {}
        fitted: dict[Matrix, torch.Tensor] = {}
        layerwise = None
        if criterion.needs_inputs:
            weight, budget = config.method.answer_weight, config.memory_budget
            layerwise = LayerwisePass(self.view, examples, weight, budget)
        for layer in progress_bar(range(len(self.view.layers)), desc="Choosing", unit="layer"):
            sites = [site for site in self._columns if site.layer == layer]
            statistics: Mapping[Matrix, InputStatistics] = {}
            if layerwise and sites:
                matrices = [site.output_proj for site in sites]
                statistics = layerwise.statistics(layer, matrices, criterion.updates_weights)
            of_layer = {}
            for site in sites:
                of_site = statistics.get(site.output_proj)
                kept[site], of_layer[site.output_proj] = self._thinned(site, of_site, importances)
            if layerwise:
                with temporary_weights(model, of_layer):
                    layerwise.advance(layer)
            fitted |= of_layer
        return kept, fitted

    def _thinned(
        self,
        site: Site,
        statistics: InputStatistics | None,
        importances: Mapping[UnitKey, float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept inputs of an output projection, and its new weights.

        Args:
            site: The site.
            statistics: Statistics of these inputs, if the criterion needs them.
            importances: Importances of units, if the criterion needs causal scores.

        Returns:
            bool `[in]` and `[out, in]`.
        """
        matrix, columns, criterion = site.output_proj, self._columns[site], self._criterion
        weight = self.view.weights(matrix)
        if criterion.removes_columns:
            assert statistics is not None
            kept, new = remove_columns(weight, statistics, columns, self.count, matrix.name)
            return kept.cpu(), new
        if criterion.needs_scores:
            of_channels = torch.zeros(site.width, dtype=torch.float64)
            for unit in site.units:
                of_channels[slice(*unit.channels)] = importances[site.name, unit.index]
        else:
            assert criterion.importance is not None
            inputs = CriterionInputs(matrix.name, self._config.seed, None, statistics)
            of_channels = criterion.importance(weight, inputs).double().sum(dim=0).cpu()
        order = of_channels[columns].mean(dim=1).argsort(stable=True)
        parts = torch.ones(len(columns), dtype=torch.bool)
        parts[order[: self.count]] = False
        kept = mask_of_columns(columns, parts)
        return kept, weight * kept.to(weight.device)

    @property
    def _criterion(self) -> Criterion:
        return CRITERIA[self._config.method.criterion]

    def description(self, removed: Any) -> dict[str, list[int]]:
        """Return the indices of the kept parts, for the record.

        Args:
            removed: What is removed, as `choose` returns it.
        """
        return kept_indices(self._kept(removed))


def removal_record(
    model: PreTrainedModel,
    removal: Removal,
    config: CAPConfig,
    calibration: CalibrationSet | None,
    zeros_before: int,
) -> PruningRecord:
    """Return the record of a run that removed parts.

    Args:
        model: The dense model.
        removal: The result of the removal.
        config: The config of the run.
        calibration: The calibration set, if the config needs data.
        zeros_before: Number of weights of the dense model that were zero.
    """
    view = ModelView.of(removal.model)
    matrices = [
        MatrixSparsity(
            matrix.name, int((view.weights(matrix) == 0).sum()), view.oriented(matrix).numel()
        )
        for matrix in view.matrices
    ]
    return PruningRecord(
        config=config.to_dict(),
        base_model=public_name(model.name_or_path),
        base_revision=None,
        matrices=matrices,
        scores=removal.scores,
        intact_loss=removal.intact_loss,
        calibration=calibration.record if calibration else {},
        versions=versions(),
        zeros_before=zeros_before,
        zeros_after=sum(matrix.zeros for matrix in matrices),
        removed={
            "parts": removal.parts,
            "kept": removal.kept,
            "parameters_before": model.num_parameters(),
            "parameters_after": removal.model.num_parameters(),
            **({"measured": removal.measured} if removal.measured else {}),
        },
    )
