"""`CAPPruner`: the steps of a pruning run, from checks to the record. Start reading here."""

import dataclasses
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.checkpoint import PruningRecord, attach, names_loaded_from
from optimum_cap.config import CAPConfig
from optimum_cap.data import (
    CalibrationExample,
    CalibrationSet,
    build_calibration_set,
    check_token_ids,
    describe_example,
    load_tokenizer_of,
    usable_tokenizer,
)
from optimum_cap.generation import answered_calibration_set
from optimum_cap.methods import CRITERIA, SMALLER_PATTERNS, parse_pattern
from optimum_cap.models import (
    Matrix,
    ModelView,
    check_configs_can_be_saved,
    check_experts,
    decoder_layer_names,
    has_lm_head,
    is_offloaded,
    longest_sequence,
    number_of_embeddings,
    plain_model,
    replace_by_smaller,
    sees_images,
    stored_parameter,
)
from optimum_cap.progress import numbered_steps
from optimum_cap.pruning import (
    LayerStore,
    PartRemoval,
    PruningRun,
    StructuredRemoval,
    check_first_batch,
    matrices_to_prune,
    removal_record,
    report_unsupported,
)
from optimum_cap.runtime import ProcessGroup
from optimum_cap.scoring import ESTIMATORS, UnitLosses, save_scores

logger = logging.get_logger(__name__)


class CAPPruner:
    """Prunes a causal language model, or a classifier made of one, in memory.

    Args:
        config: What to prune and how.

    Example:
        ```python
        pruner = CAPPruner(CAPConfig(sparsity=0.2, dataset="gsm8k"))
        model = pruner.prune(model, tokenizer)
        model.save_pretrained("pruned")  # a sparse checkpoint
        ```
    """

    def __init__(self, config: CAPConfig) -> None:
        if not isinstance(config, CAPConfig):
            raise TypeError(
                f"CAPPruner takes a CAPConfig, got {type(config).__name__}: write "
                "CAPPruner(CAPConfig(sparsity=0.2)), or CAPConfig.from_dict for a dictionary"
            )
        self.config = config

    def prune(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        dataset: Any = None,
        losses: UnitLosses | None = None,
        base_revision: str | None = None,
    ) -> PreTrainedModel:
        """Score and rank the weights of `model`, and set the lowest-ranked to zero in place.

        Weights change only in the last step: an error or an interrupt before it leaves the model
        unchanged. Criteria that prune layer by layer (ALPS, Wanda, SparseGPT) are an exception: if
        interrupted while pruning, they leave the first layers pruned and log a warning.

        With a `resume_dir`, an interrupted run resumes when the dense model is pruned again with
        the same config. All processes that were launched together (`torchrun`) must call this
        method; they share the measurements. If weights are offloaded to disk, pruned weights are
        written to copies in the offload folder, never to the files the model was loaded from.

        Args:
            model: A decoder-only causal language model in any float dtype, or a classifier or
                reward model made of one. The latter have no LM head, so criteria and allocations
                that measure predictions of tokens cannot prune them (`docs/models.md`).
            tokenizer: Its tokenizer or processor, or the name of a tokenizer; `None` uses the
                config's, or else the one saved with the model.
            dataset: Calibration data that replaces the config's.
            losses: Losses that `measure` returned for this model, data and seed. They can be reused
                for any sparsity, subsets and aggregation with the criterion `causal_score`.
            base_revision: Commit of the dense model on the Hub, for the record.

        Returns:
            The same model, still an ordinary float model. It has a `pruning_record`, and its
            `save_pretrained` and `push_to_hub` write a sparse checkpoint.

        Raises:
            ValueError: The model, the data or the tokenizer cannot be used; the message says why.
            TypeError: `model` is a name, or not a transformers model (for example a `PeftModel`).
            OSError: There is not enough disk space for pruned copies of offloaded weights.
            ConnectionError: Another process of the launch has stopped.
        """
        config = self.config
        if dataset is not None:
            config = dataclasses.replace(config, dataset=dataset)
        with numbered_steps(_steps(config, losses)):
            return _prune_(model, tokenizer, config, losses, base_revision)

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        save_to: str | os.PathLike[str] | None = None,
    ) -> UnitLosses:
        """Measure the losses with each unit masked, from which causal scores are computed.

        Args:
            model: A decoder-only causal language model; it is not changed.
            tokenizer: As for `prune`.
            save_to: Scores file to write, for `CAPConfig(scores=...)`.

        Raises:
            ValueError: As for `prune`.
            TypeError: As for `prune`.
            OSError: The file cannot be written.
        """
        plain = plain_model(model)
        view = ModelView.of(plain, self.config.mlp_unit_size)
        if not view.has_lm_head:
            raise ValueError(
                f"{type(plain).__name__} has no LM head, so its units have no losses on tokens to "
                "measure: load a causal language model with AutoModelForCausalLM"
            )
        _check_scorable(view, self.config)
        _check_weights(view, view.matrices)
        if self.config.scored_units == "all":
            check_experts(view, view.matrices)
        process_group = ProcessGroup.current()
        check_prompts = functools.partial(check_first_batch, view, layer_by_layer=False)
        calibration = _calibration(plain, self.config, tokenizer, process_group, check_prompts)
        examples = calibration.examples
        check_first_batch(view, examples, layer_by_layer=False)
        estimator = ESTIMATORS[self.config.estimator]
        losses = estimator.losses(view, examples, self.config, process_group)
        if save_to is not None:
            save_scores(save_to, losses, plain, examples, self.config)
        return losses


def _prune_(
    model: PreTrainedModel,
    tokenizer: Any,
    config: CAPConfig,
    losses: UnitLosses | None,
    base_revision: str | None,
) -> PreTrainedModel:
    """Prune a model in place, as described in `CAPPruner.prune`."""
    plain = plain_model(model)
    check_configs_can_be_saved(plain)
    needs_scores = CRITERIA[config.method.criterion].needs_scores
    if losses is not None and not needs_scores:
        raise ValueError(
            "losses are for criterion 'causal_score', which computes its scores from them, got "
            f"criterion {config.method.criterion!r}: choose recipe 'paper', or leave losses out"
        )
    if config.pattern in SMALLER_PATTERNS:
        record, layer_store = _remove_parts_(plain, config, tokenizer, losses)
        record = dataclasses.replace(record, base_revision=base_revision)
        attach(plain, record, layer_store.clear if layer_store else None)
        return model
    view = ModelView.of(plain, config.mlp_unit_size)
    if not view.has_lm_head:
        config.check_without_lm_head(type(plain).__name__)
    matrices = matrices_to_prune(view, config)
    report_unsupported(view, matrices, config.strict)
    if needs_scores and losses is None:
        _check_scorable(view, config)
    _check_not_shared(view, matrices)
    zeros_before = _check_weights(view, matrices)
    if config.method.needs_data:
        check_experts(view, matrices)
    zeros = _number_of_zeros(view, matrices, config.sparsity)
    _check_pattern(view, matrices, config.pattern)
    before = getattr(plain, "pruning_record", None)
    _check_zeros(zeros_before, zeros, config, before)
    process_group = ProcessGroup.current()

    def check_prompts(prompts: list[CalibrationExample]) -> None:
        PruningRun(view, config, matrices, prompts, process_group).check_model(losses)

    calibration = (
        _calibration(plain, config, tokenizer, process_group, check_prompts)
        if config.method.needs_data
        else None
    )
    examples = calibration.examples if calibration else []
    run = PruningRun(view, config, matrices, examples, process_group)
    run.check_model(losses)

    if needs_scores:
        run.score_units(losses)
    if config.method.allocation == "global":
        run.prune_below_global_threshold_(zeros)
    else:
        zeros_per_matrix = run.allocate(zeros)
        if config.method.layer_by_layer:
            run.prune_layer_by_layer_(zeros_per_matrix)
        else:
            run.prune_each_matrix_(zeros_per_matrix)

    record = run.record(calibration)
    record = dataclasses.replace(
        record,
        base_revision=base_revision,
        zeros_before=zeros_before,
        zeros_after=record.zeros,
        recovery=before.recovery if before is not None else [],
    )
    _report_other_zeros(record, zeros, config)
    attach(plain, record, run.layer_store.clear if run.layer_store else None)
    return model


def _steps(config: CAPConfig, losses: UnitLosses | None) -> list[str]:
    """Return the long steps of a run, as the names of their progress bars."""
    method = config.method
    if config.pattern in SMALLER_PATTERNS:
        return []  # the number of rounds depends on the model
    steps = ["Answering"] if config.answers == "model" else []
    if CRITERIA[method.criterion].needs_scores and losses is None:
        first_order = ["Scoring to first order"]
        steps += {
            "first_order": first_order,
            "control_variate": [*first_order, "Scoring"],
        }.get(config.estimator, ["Scoring"])
    if method.allocation in _STEP_OF_ALLOCATION:
        steps.append(_STEP_OF_ALLOCATION[method.allocation])
    return [*steps, "Pruning"] if method.layer_by_layer else steps


_STEP_OF_ALLOCATION = {
    "interventional": "Measuring sites",
    "fisher": "Estimating sensitivities",
}


def _remove_parts_(
    model: PreTrainedModel, config: CAPConfig, tokenizer: Any, losses: UnitLosses | None
) -> tuple[PruningRecord, LayerStore | None]:
    """Remove parts of a model in place; return the record and the store of finished layers."""
    if is_offloaded(model):
        raise ValueError(
            f"pattern {config.pattern!r} builds a smaller model in memory, but weights of this one "
            "are offloaded: load it without offloading"
        )
    if not has_lm_head(model):
        config.check_without_lm_head(type(model).__name__)
    process_group = ProcessGroup.current()
    removal: PartRemoval | StructuredRemoval
    if config.pattern == "structured":
        removal = StructuredRemoval(model, config, process_group)
    else:
        removal = PartRemoval(model, config, process_group)
    view = removal.view
    if CRITERIA[config.method.criterion].needs_scores and losses is None:
        _check_scorable(view, config)
    zeros_before = _check_weights(view, view.matrices)
    if config.method.needs_data and any(site.expert is not None for site in view.sites):
        check_experts(view, view.matrices)

    def check(examples: list[CalibrationExample]) -> None:
        if config.method.needs_data:
            refines = config.method.refine > 0
            check_first_batch(view, examples, True, config.memory_budget, refines)
        removal.check(examples)

    calibration = (
        _calibration(model, config, tokenizer, process_group, check)
        if config.method.needs_data
        else None
    )
    examples = calibration.examples if calibration else []
    check(examples)
    if isinstance(removal, StructuredRemoval):
        removed = removal.run(examples)
    else:
        removed = removal.run(examples, losses)
    record = removal_record(model, removed, config, calibration, zeros_before)
    replace_by_smaller(model, removed.model)
    return record, removed.layer_store


def _calibration(
    model: PreTrainedModel,
    config: CAPConfig,
    tokenizer: Any,
    process_group: ProcessGroup,
    check_prompts: Callable[[list[CalibrationExample]], None],
) -> CalibrationSet:
    """Return the calibration set; the prompts are checked before the model answers them."""
    processor = _processor(model, config.tokenizer if tokenizer is None else tokenizer)
    tokenizer = usable_tokenizer(processor)
    if config.answers == "model":
        calibration = answered_calibration_set(
            model, tokenizer, config, process_group, check_prompts
        )
    else:
        calibration = build_calibration_set(
            config,
            processor,
            max_length=longest_sequence(model),
            unscored=not has_lm_head(model),
        )
    examples = calibration.examples
    is_known = type(model).__module__.startswith("transformers.")  # not a model's own code
    may_see = not is_known or sees_images(type(model).__name__)
    if any(example.inputs for example in examples) and not may_see:
        raise ValueError(
            f"the calibration examples have images, which {type(model).__name__} does not see: "
            "load the model with AutoModelForImageTextToText, or choose data without images"
        )
    ids = [example.input_ids for example in examples]
    check_token_ids(tokenizer, ids, number_of_embeddings(model))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(describe_example(examples[0], tokenizer))
    return calibration


def _check_scorable(view: ModelView, config: CAPConfig) -> None:
    """Check that the model has units of the kind to score."""
    if not view.units(config.scored_units):
        raise ValueError(
            f"{type(view.model).__name__} has no attention or other mixer of tokens that CAP "
            "knows, so there are no heads to score: score all units (scored_units='all'), or "
            "choose a recipe without causal scores, such as 'causal'"
        )


def _number_of_zeros(view: ModelView, matrices: list[Matrix], sparsity: float) -> int:
    total = sum(view.oriented(matrix).numel() for matrix in matrices)
    zeros = round(sparsity * total)
    if not 0 < zeros < total:
        raise ValueError(
            f"sparsity {sparsity} of {total} prunable weights is {zeros} zeros: choose a sparsity "
            "that prunes some weights and keeps some"
        )
    return zeros


def _check_pattern(view: ModelView, matrices: list[Matrix], pattern: str) -> None:
    if (parsed := parse_pattern(pattern)) is None:
        return
    for matrix in matrices:
        if (inputs := view.oriented(matrix).shape[1]) % parsed[1]:
            raise ValueError(
                f"pattern {pattern!r} does not fit {matrix.name}, which has {inputs} inputs, not a "
                f"multiple of {parsed[1]}: leave it dense (modules_to_leave_dense), or choose "
                "another pattern"
            )


def _check_zeros(
    zeros_before: int, zeros: int, config: CAPConfig, record: PruningRecord | None
) -> None:
    """Check that the model is not too sparse already; explain sparsity if it was pruned before."""
    if config.pattern == "unstructured" and zeros_before > zeros:
        raise ValueError(
            f"{zeros_before:,} of the weights to prune are zero already, but sparsity "
            f"{config.sparsity} is {zeros:,} zeros: choose a higher sparsity, or prune the dense "
            "model"
        )
    if record is not None and zeros_before:
        logger.warning(
            f"the model was pruned before, and {zeros_before:,} of the weights to prune are zero: "
            f"sparsity {config.sparsity} is a fraction of all of them, not of those that are left"
        )


def _report_other_zeros(record: PruningRecord, zeros: int, config: CAPConfig) -> None:
    """Report by how much the number of zeros differs from the requested number."""
    if record.zeros == zeros:
        return
    difference = record.zeros - zeros
    reason = (
        f"the model had {record.zeros_before:,} zeros before, in some rows or matrices more than "
        "their share"
        if record.zeros_before
        else "values that were kept are too small for the dtype of the weights"
    )
    logger.warning(
        f"{record.zeros:,} of {record.total:,} prunable weights are zero ({record.sparsity:.2%}), "
        f"{abs(difference):,} {'more' if difference > 0 else 'fewer'} than sparsity "
        f"{config.sparsity} asks for: {reason}"
    )


def _check_not_shared(view: ModelView, matrices: list[Matrix]) -> None:
    """Check that no matrix shares memory with another parameter, which would be pruned with it.

    Decoder layers may share parameters, as in Zamba: sites know all layers that use them.
    """
    if (shared := [m for m in matrices if m in view.layers_of_shared]) and is_offloaded(view.model):
        raise ValueError(
            f"{shared[0].name} runs in several layers of {type(view.model).__name__}, and such "
            "weights cannot be pruned while weights are offloaded: load the model into memory, or "
            "leave them dense (modules_to_leave_dense)"
        )
    parameters = dict(view.model.named_parameters(remove_duplicate=False))
    layers = decoder_layer_names(view.model)
    ranges = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, name)
        for name, parameter in parameters.items()
        if parameter.data_ptr() and parameter.is_contiguous()
    )
    to_prune = {matrix.parameter for matrix in matrices}
    overlapping: list[str] = []  # names of the tensors that overlap the previous one
    last_end = 0
    for start, end, name in ranges:
        if start >= last_end:
            overlapping = []
        last_end = max(last_end, end)
        overlapping.append(name)
        for other in overlapping[:-1]:
            if parameters[name] is parameters[other]:
                of_layers = [_layer_of(each, layers) for each in (name, other)]
                if None not in of_layers and of_layers[0] != of_layers[1]:
                    continue
            if not to_prune.isdisjoint(overlapping):
                raise ValueError(
                    f"{other} and {name} share one tensor, which cannot be pruned for both: give "
                    "each a copy, or leave them dense (modules_to_leave_dense)"
                )


def _layer_of(parameter: str, layers: list[str]) -> str | None:
    """Return the decoder layer that a parameter is in, if any."""
    return next((layer for layer in layers if parameter.startswith(f"{layer}.")), None)


def _check_weights(view: ModelView, matrices: list[Matrix]) -> int:
    """Check that all weights are finite floats in memory, and return how many are zero."""
    zeros = 0
    for matrix in matrices:
        weight = view.weights(matrix)
        if weight.device.type == "meta":
            raise ValueError(
                f"{matrix.name} is on the meta device without offloaded values: load the model "
                "with from_pretrained; device_map='auto' offloads what does not fit into memory"
            )
        # 8-bit weights are quantized, float8 included.
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise ValueError(
                f"{matrix.name} has dtype {weight.dtype}, but CAP prunes floats of 16 bits or "
                "more: prune the model before you quantize it"
            )
        if not weight.isfinite().all():
            raise ValueError(
                f"{matrix.name} holds NaN or infinite weights, so the model cannot be pruned: "
                "check the checkpoint that it was loaded from"
            )
        zeros += weight.numel() - int(weight.count_nonzero())
    _check_other_parameters(view, matrices)
    return zeros


def _check_other_parameters(view: ModelView, matrices: list[Matrix]) -> None:
    """Check that biases, norms and embeddings are finite; attention can hide a non-finite bias."""
    checked = {matrix.parameter for matrix in matrices}
    for name, parameter in view.model.named_parameters():
        if name in checked or not parameter.is_floating_point():
            continue
        values = stored_parameter(view.model, name)
        is_checkable = values.element_size() > 1 and values.device.type != "meta"
        if is_checkable and not values.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values, so the model cannot be pruned: check the "
                "checkpoint that it was loaded from"
            )


def _processor(model: PreTrainedModel, tokenizer: Any) -> Any:
    """Return a tokenizer or processor: as given, by name, or the one saved with the model.

    A pruned and saved model has the name of its checkpoint, which may contain no tokenizer.
    """
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    names = [tokenizer] if tokenizer else names_loaded_from(model)
    if not names:
        raise ValueError(
            "no tokenizer: the model has no name or path to load one from; pass "
            "prune(model, tokenizer) or CAPConfig(tokenizer=...)"
        )
    for name in names[:-1]:
        with suppress(ValueError):
            return load_tokenizer_of(name, sees_images(type(model).__name__))
    return load_tokenizer_of(names[-1], sees_images(type(model).__name__))
