"""`CAPConfig`: what to prune and how. Validated, versioned, and serialised as JSON."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_cap.formats import FORMATS, check_format_version
from optimum_cap.methods import (
    ALLOCATIONS,
    CRITERIA,
    SMALLER_PATTERNS,
    Criterion,
    parse_pattern,
)
from optimum_cap.text import did_you_mean, enumeration

CONFIG_VERSION = 1
"""Version of the fields of `CAPConfig`. A config of a newer version raises an error."""

PATTERN_PREFIX = "re:"
"""Prefix of the entries of `modules_to_leave_dense` that are regular expressions."""

TARGETS = ("local", "dense")
ORDERS = ("layer", "projection")


@dataclass(frozen=True)
class Method:
    """A pruning method: the `CAPConfig` fields of the same names, with every choice resolved."""

    criterion: str
    allocation: str
    target: str = "local"
    order: str = "layer"
    answer_weight: float = 0.0
    refine: int = 0

    @property
    def layer_by_layer(self) -> bool:
        """Whether each layer is pruned before the inputs of the next one are measured."""
        return CRITERIA[self.criterion].needs_inputs

    @property
    def needs_data(self) -> bool:
        """Whether the method measures anything on calibration data."""
        criterion = CRITERIA[self.criterion]
        by_criterion = criterion.needs_scores or criterion.needs_inputs or criterion.needs_examples
        by_data = ALLOCATIONS[self.allocation].needs_data
        return by_criterion or by_data or self.refine > 0

    @property
    def by_sensitivity(self) -> bool:
        """Whether the sensitivities of the sites determine the number of zeros of each matrix."""
        return ALLOCATIONS[self.allocation].by_sensitivity

    @property
    def needs_lm_head(self) -> bool:
        """Whether the method measures losses or predictions of tokens."""
        criterion = CRITERIA[self.criterion]
        return criterion.needs_scores or criterion.needs_predictions or self.by_sensitivity


RECIPES = {
    "causal": Method("alps", "fisher", answer_weight=3.0, refine=3),
    "causal_fast": Method("alps", "fisher", answer_weight=3.0),
    "paper": Method("causal_score", "global"),
    "magnitude": Method("magnitude", "uniform"),
    "magnitude_global": Method("magnitude", "global"),
    "random": Method("random", "uniform"),
    "wanda": Method("wanda", "uniform"),
    "sparsegpt": Method("sparsegpt", "uniform"),
    "owl_wanda": Method("wanda", "owl"),
    "owl_sparsegpt": Method("sparsegpt", "owl"),
}
PART_CRITERIA = {
    "experts": {"causal": "divergence", "causal_fast": "routed_error"},
    "heads": {"causal": "least_squares", "causal_fast": "least_squares"},
    "channels": {"causal": "least_squares", "causal_fast": "least_squares"},
    "layers": {"causal": "divergence", "causal_fast": "divergence"},
    "structured": {"causal": "divergence", "causal_fast": "divergence"},
}
"""Criteria of recipes for patterns that remove parts; other recipes keep their criterion."""
_BY_ALLOCATION = ("magnitude_global", "owl_wanda", "owl_sparsegpt")
AGGREGATIONS = ("median", "mean")
KV_COMBINATIONS = ("mean", "max")
SCORED_TOKENS = ("answer", "all")
SCORED_UNITS = ("heads", "all")
ANSWERS = ("dataset", "model")
ANSWER_SELECTIONS = ("right", "hard")
ANSWER_FIELDS = (
    "temperature",
    "top_p",
    "max_new_tokens",
    "answer_attempts",
    "answer_selection",
    "answer_candidates",
)
"""The fields of `CAPConfig` that control how the model answers the prompts of a data set."""
ESTIMATOR_FIELDS: dict[str, tuple[str, ...]] = {
    "exact": ("resume_dir", "torch_compile"),
    "plain": (),
    "first_order": ("resume_dir",),
    "control_variate": ("exact_examples", "resume_dir", "torch_compile"),
    "adaptive": ("exact_examples", "precision", "resume_dir", "torch_compile"),
}
"""The estimators of causal scores, each with the `CAPConfig` fields that only some of them use."""
ESTIMATOR_NAMES = tuple(ESTIMATOR_FIELDS)
_CHOICES = {
    "criterion": tuple(CRITERIA),
    "allocation": tuple(ALLOCATIONS),
    "target": TARGETS,
    "order": ORDERS,
}
_OVERRIDES = ("allocation", "target", "order", "answer_weight", "refine")
COMPILING = tuple(name for name, used in ESTIMATOR_FIELDS.items() if "torch_compile" in used)
"""The estimators that support `torch_compile`."""

# Fields of `CAPConfig` that every criterion or allocation with this property uses.
_DATA_FIELDS = (
    "dataset",
    "answers",
    "num_samples",
    "max_length",
    "scored_tokens",
    "seed",
    "tokenizer",
)
_SCORE_FIELDS = ("subsets", "aggregation", "scored_units", "estimator", "scores")
_INPUT_FIELDS = ("order", "answer_weight", "refine")
_REFINEMENT_FIELDS = ("refine_learning_rate",)
_UPDATE_FIELDS = ("target",)
_PART_FIELDS = ("memory_budget", "resume_dir")
_NOT_FOR_PARTS = ("allocation", "modules_to_leave_dense", "strict")  # parts go from every layer
_RUNTIME_FIELDS = ("memory_budget", "torch_compile", "resume_dir")  # how, not what, is measured
# Fields that determine whether others have an effect, with their choices, in the order in which
# errors suggest them.
_DECIDING: dict[str, tuple[Any, ...]] = {
    "criterion": tuple(CRITERIA),
    "recipe": tuple(RECIPES),
    "refine": (RECIPES["causal"].refine,),
    "estimator": ESTIMATOR_NAMES,
    "scored_units": SCORED_UNITS,
    "answers": ANSWERS,
}
_SUGGESTED = 4  # most choices that an error suggests

_DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet|txt)$")
_PRESET = re.compile(r"\w+=")  # the beginning of `preset=FILE`; folders may have a "=" too
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)
_SIZE_UNITS = {
    unit + suffix: factor**power
    for suffix, factor in (("b", 1000), ("ib", 1024))
    for power, unit in enumerate(("", "k", "m", "g", "t"))
}


_UNSET: Any = None
"""The default of `sparsity`, which must be set unless the pattern implies it."""


def _suggests_fields(cls: Any) -> Any:
    """Make the constructor of a dataclass suggest the closest field name for an unknown one."""
    init = cls.__init__
    names = [each.name for each in dataclasses.fields(cls)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in names]:
            raise TypeError(f"{cls.__name__} has no {_unknown_fields(unknown, names)}")
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


def check_field_names(names: Iterable[str]) -> None:
    """Check that all names are fields of `CAPConfig`.

    Raises:
        ValueError: A name is not a field; the message suggests the closest one.
    """
    known = [each.name for each in dataclasses.fields(CAPConfig)]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"CAPConfig has no {_unknown_fields(unknown, known)}")


def _unknown_fields(unknown: Iterable[str], names: Iterable[str]) -> str:
    suggestions = [f"{name!r}{did_you_mean(name, names)}" for name in unknown]
    if any("did you mean" in text for text in suggestions):
        return f"field {', '.join(suggestions)}"
    return f"field {', '.join(suggestions)}; its fields are {', '.join(sorted(names))}"


@_suggests_fields
@dataclass
class CAPConfig(QuantizationConfigMixin):
    """Configuration of Causal Attribution Pruning.

    A field that has no effect in combination with the others must keep its default value.

    Args:
        sparsity: Fraction of the prunable weights to set to zero, strictly between 0 and 1. With a
            pattern `"N:M"`, it may be omitted.
        recipe: A preset of criterion, allocation, target, order, answer_weight and refine.
            `"causal"`, the default, preserves the most (`docs/quality.md`). `"causal_fast"` is its
            quick variant, without the refinement.
            `"paper"` ranks a weight by its magnitude times the importance of its head, under one
            global threshold (arXiv 2606.19350, Eq. 1-4). Baselines: `"magnitude"`,
            `"magnitude_global"`, `"random"`, `"wanda"`, `"sparsegpt"`, `"owl_wanda"`,
            `"owl_sparsegpt"` (`docs/baselines.md`).
        criterion: How weights are ranked, instead of the recipe's choice: `"causal_score"`,
            `"magnitude"`, `"random"` or `"wanda"`; `"sparsegpt"` and `"alps"` also update the
            weights they keep. Where parts are removed: `"divergence"`, `"routed_error"`, `"reap"`,
            `"frequency"` or `"routing_weight"` for experts, `"divergence"` or `"block_influence"`
            for layers, `"least_squares"`, `"wanda"` or `"magnitude"` for heads and channels,
            `"causal_score"` for heads, and `"random"`. Setting `criterion` resets the recipe's
            other fields unless you set them.
        allocation: How many zeros each matrix gets, instead of the recipe's choice: `"global"`
            (one threshold over all weights), `"uniform"` (the same sparsity everywhere), `"owl"`
            (less in layers with more outliers), `"interventional"` (less in sites whose pruning
            changes the predictions more, measured by pruning each site alone) or `"fisher"` (the
            same, estimated with one backward pass).
        allocation_bound: Largest change that `"interventional"` and `"fisher"` make to the sparsity
            of a site.
        allocation_examples: Number of calibration examples that sensitivities are measured on.
            `None` chooses the number whose cost equals one pass over the calibration set, but at
            least 16, which costs more for a model with many sites (`optimum-cli cap estimate` says
            how much).
        target: What criteria that update the kept weights fit them to: `"local"`, the outputs of
            the dense matrix for the inputs it receives; or `"dense"`, the outputs of the dense
            model in the same place, which also compensates the error of the residual stream so far.
        order: What is pruned before the inputs are measured again: a whole `"layer"`, or one
            `"projection"`.
        answer_weight: Weight that calibration tokens get in the input statistics, in addition to 1,
            if they are scored or predict a scored token.
        refine: Number of passes over the calibration set in which the kept weights of each pruned
            layer are fitted to the hidden states of the dense model; 0 for none. Needs a criterion
            that prunes layer by layer. See `docs/recipe.md`.
        refine_learning_rate: Learning rate of `refine`, relative to the root mean square of the
            kept weights of a parameter.
        pattern: `"unstructured"`; `"N:M"`, which keeps N weights of every M consecutive inputs (as
            in `"2:4"`; the sparsity is then 1 - N/M). `"experts"`, `"heads"` (key/value heads with
            their query heads), `"channels"` (of MLPs, or of experts where there are any) and
            `"layers"` remove parts, so that the model becomes smaller; the sparsity is then the
            fraction of these parts, the same in every layer. `"structured"` removes parts of all
            of these kinds; the sparsity is then the fraction of all parameters of the model, and
            measured divergences decide how many of each kind go (`docs/smaller_models.md`).
        owl_outlier_ratio: An outlier of OWL is this many times the mean importance of its layer.
        owl_bound: OWL lets the sparsities of two layers differ by at most twice this.
        dataset: Calibration data: a preset (`gsm8k`, `strategyqa`, `arc_challenge`, `wikitext2`), a
            Hub id, a local json, jsonl, csv, parquet or txt file, a `datasets.Dataset`, a list of
            texts, of prompt/completion pairs or of chat messages; or a list of names and files,
            which are mixed evenly. See `docs/calibration.md`.
        answers: Which answers to the prompts of the data set are used: the published ones
            (`"dataset"`), or ones that the dense `"model"` itself samples before it is pruned. See
            `docs/calibration.md`.
        temperature: Temperature at which the model samples its answers.
        top_p: Each token of an answer is drawn from the smallest set of tokens that together have
            this probability.
        max_new_tokens: Longest answer of the model, in tokens; a longer one is cut off.
        answer_attempts: Maximum number of times that the model answers a prompt until its answer is
            right. Answers are checked for `gsm8k`, `strategyqa`, `arc_challenge` and data with
            published answers that have a line `#### RESULT`; others are sampled once, unless they
            are empty.
        answer_selection: Which answers are used if there are more than `num_samples`: `"right"`
            ones first; or `"hard"` ones of middling length: right ones first, then those that took
            more attempts, then those whose length is closest to the median.
        answer_candidates: Number of prompts that the model answers, of which `num_samples` are
            used; `None` is `num_samples`, or twice as many with `answer_selection="hard"`.
        num_samples: Number of calibration examples.
        subsets: Number K of disjoint subsets of the calibration set (Eq. 2).
        aggregation: How the masked losses of the subsets are combined: `"median"` or `"mean"`.
        seed: Seed for selecting examples, splitting them into subsets and sampling answers.
        kv_combination: How a key/value row combines the importances of the query heads that share
            it under grouped-query attention: `"mean"` or `"max"`.
        scored_tokens: Tokens that count in the loss: `"answer"` (never the prompt) or `"all"`.
        scored_units: Units that get their own causal score: `"heads"`, as in the paper, where MLPs
            and experts take the mean importance of the heads in their layer; or `"all"`: heads,
            MLPs and experts. See `docs/scoring.md`.
        mlp_unit_size: Number of MLP or expert channels per unit under `scored_units="all"`; `None`
            makes each MLP and each expert one unit.
        estimator: How the causal scores are obtained: measured by `"exact"` (or by `"plain"`, its
            slower reference implementation), or estimated by `"first_order"`, `"control_variate"`
            or `"adaptive"`. See `docs/estimators.md`.
        exact_examples: Number of examples that `"control_variate"` measures exactly, and
            `"adaptive"` in each of its rounds; at least 2.
        precision: `"adaptive"` stops once 1.96 standard errors of every mean score, due to
            sampling, are at most this fraction of the range of all units' scores.
        scores: A scores file (`optimum-cli cap score`) of the same model, data and seed, to use
            instead of measuring. Not saved.
        max_length: Longest example in tokens; longer ones are skipped. `None` is 2048, or the
            model's limit if that is lower.
        memory_budget: Memory for activations while the model runs on calibration data, in bytes or
            as text such as `"4GB"`. `"auto"` is half of the free memory where causal scores are
            measured and in backward passes; layer-by-layer passes then take 2048 tokens per batch
            on CPU and 16384 on CUDA, which a number of bytes can only lower. The hidden states of
            the calibration set between two layers need additional memory.
        torch_compile: Compile the decoder layers while causal scores are measured, which pays off
            in long runs on a GPU (`docs/performance.md`).
        resume_dir: Folder for finished measurements and, until the model is saved, pruned layers,
            so that an interrupted run resumes (`docs/scoring.md`); `None` stores nothing. The
            model's own answers are stored there too. Not saved.
        modules_to_leave_dense: Modules to leave dense, in addition to embeddings, norms, routers
            and the LM head, which are never pruned: names or consecutive parts of them (such as
            `"layers.0"` or `"o_proj"`), or `"re:"` and a regular expression that matches the
            beginning of a module's name (such as `"re:.*down_proj"`).
        strict: Refuse a model if CAP cannot prune some linear weights of its decoder. By default
            they stay dense, as reported in the log, the record and `cap inspect`.
        checkpoint_format: What `save_pretrained` writes: `"packed"` (bit mask and kept values),
            `"coded"` (the same, compressed; smaller, but slower to decode) or `"dense"` (zeros
            stored; loads without this plugin). Models that have lost parts are always `"dense"`.
        tokenizer: A tokenizer, a processor that has one, or the name of a tokenizer; `None` loads
            the model's tokenizer, or its processor if the calibration data has images. Not saved.
        config_version: Version of these fields.

    Raises:
        ValueError: A value is outside the range described above or has no effect; the message names
            the field.
        TypeError: A field is unknown.
    """

    quant_method: str = field(default="cap", kw_only=True)
    sparsity: float = _UNSET
    recipe: str = "causal"
    criterion: str | None = None
    allocation: str | None = None
    allocation_bound: float = 0.1
    allocation_examples: int | None = None
    target: str | None = None
    order: str | None = None
    answer_weight: float | None = None
    refine: int | None = None
    refine_learning_rate: float = 6e-3
    pattern: str = "unstructured"
    owl_outlier_ratio: float = 5.0
    owl_bound: float = 0.08
    dataset: Any = "gsm8k"
    answers: str = "dataset"
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 512
    answer_attempts: int = 2
    answer_selection: str = "right"
    answer_candidates: int | None = None
    num_samples: int = 128
    subsets: int = 3
    aggregation: str = "median"
    seed: int = 0
    kv_combination: str = "mean"
    scored_tokens: str = "answer"
    scored_units: str = "heads"
    mlp_unit_size: int | None = None
    estimator: str = "exact"
    exact_examples: int = 16
    precision: float = 0.1
    scores: str | os.PathLike[str] | None = None
    max_length: int | None = None
    memory_budget: int | str = "auto"
    torch_compile: bool = False
    resume_dir: str | os.PathLike[str] | None = None
    modules_to_leave_dense: list[str] = field(default_factory=list)
    strict: bool = False
    checkpoint_format: str = "packed"
    tokenizer: Any = None
    config_version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.config_version, int) and self.config_version > CONFIG_VERSION:
            raise ValueError(
                f"the pruning config has config_version {self.config_version}, but this "
                f"optimum-cap reads up to {CONFIG_VERSION}: upgrade optimum-cap"
            )
        if self.quant_method != "cap":
            raise ValueError(f"quant_method must be 'cap', got {self.quant_method!r}")
        parse_pattern(self.pattern)
        self._check_sparsity()
        _check_choice("recipe", self.recipe, tuple(RECIPES))
        self._check_method()
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        _check_choice("kv_combination", self.kv_combination, KV_COMBINATIONS)
        _check_choice("scored_tokens", self.scored_tokens, SCORED_TOKENS)
        self._check_units()
        _check_choice("checkpoint_format", self.checkpoint_format, tuple(FORMATS))
        _check_integer("num_samples", self.num_samples, at_least=1)
        _check_integer("subsets", self.subsets, at_least=1)
        _check_integer("seed", self.seed, at_least=0)
        if self.pattern in SMALLER_PATTERNS:
            if self.checkpoint_format not in ("dense", CAPConfig.checkpoint_format):
                raise ValueError(
                    f"checkpoint_format {self.checkpoint_format!r} leaves out zeros, but pattern "
                    f"{self.pattern!r} leaves none: leave checkpoint_format out"
                )
            self.checkpoint_format = "dense"
        self._check_estimator()
        if self.max_length is not None:
            _check_integer("max_length", self.max_length, at_least=2)
        self._check_answers()
        self.dataset = _with_plain_paths(self.dataset)
        if self.dataset is None or (isinstance(self.dataset, str) and not self.dataset.strip()):
            raise ValueError(
                "dataset is empty: name a preset, a Hub id or a file, or pass examples"
            )
        if self.memory_budget != "auto":
            parse_size(self.memory_budget, "memory_budget")
        _check_module_names(self.modules_to_leave_dense)
        self.modules_to_leave_dense = list(self.modules_to_leave_dense)
        self._check_effects()

    def _check_sparsity(self) -> None:
        pattern = parse_pattern(self.pattern)
        if self.sparsity is None and pattern is not None:
            kept, of = pattern
            self.sparsity = 1 - kept / of
        valid = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not valid or not math.isfinite(self.sparsity) or not 0 < self.sparsity < 1:
            got = "nothing" if self.sparsity is None else repr(self.sparsity)
            raise ValueError(
                "sparsity must be a number strictly between 0 and 1 (0.2 prunes 20 % of the "
                f"weights), got {got}{_as_fraction(self.sparsity)}"
            )
        self.sparsity = float(self.sparsity)

    def _check_answers(self) -> None:
        _check_choice("answers", self.answers, ANSWERS)
        _check_positive("temperature", self.temperature)
        _check_positive("top_p", self.top_p)
        if self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {self.top_p!r}")
        _check_integer("max_new_tokens", self.max_new_tokens, at_least=1)
        _check_integer("answer_attempts", self.answer_attempts, at_least=1)
        _check_choice("answer_selection", self.answer_selection, ANSWER_SELECTIONS)
        if self.answer_candidates is not None:
            _check_integer("answer_candidates", self.answer_candidates, at_least=1)

    def _check_effects(self) -> None:
        """Check that every changed field has an effect and is compatible with the fields it needs.

        A field with its default value is never refused, so a saved config can always be loaded.
        """
        used = self.fields_used
        if unused := [name for name in self._changed_fields if name not in used]:
            raise ValueError(self._has_no_effect(unused))
        if "subsets" in used and self.subsets > self.num_samples:
            raise ValueError(
                f"subsets is {self.subsets}, but num_samples is only {self.num_samples}: "
                "every subset needs at least one example"
            )
        if "exact_examples" in used and self.exact_examples > self.num_samples:
            raise ValueError(
                f"estimator {self.estimator!r} measures exact_examples ({self.exact_examples}) of "
                f"num_samples ({self.num_samples}) examples exactly: lower the first or raise the "
                "second"
            )
        if self.answers == "model":
            self._check_answers_fit()

    def _check_answers_fit(self) -> None:
        """Check that the settings of the model's own answers fit together and fit `num_samples`."""
        if self.max_length is not None and self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, but an example has at most max_length "
                f"({self.max_length}) tokens, its prompt included: lower the first or raise the "
                "second"
            )
        if self.answer_candidates is not None and self.answer_candidates < self.num_samples:
            raise ValueError(
                f"answer_candidates is {self.answer_candidates}, but num_samples "
                f"({self.num_samples}) of them are used: raise the first or lower the second"
            )
        if self.answer_selection == "hard" and self.answer_candidates == self.num_samples:
            raise ValueError(
                "answer_selection 'hard' has no effect with as many answer_candidates as "
                f"num_samples ({self.num_samples}): raise the first, or leave one of the two out"
            )
        if self.answer_selection == "hard" and self.answer_attempts == 1:
            raise ValueError(
                "answer_selection 'hard' tells hard prompts by their wrong answers before a right "
                "one, got answer_attempts 1: set it to at least 2"
            )

    def _has_no_effect(self, unused: list[str]) -> str:
        """Return the error message for fields that have no effect."""
        needs_scores = CRITERIA[self.method.criterion].needs_scores
        ranking = "recipe" if self.criterion is None else "criterion"
        chosen = {ranking: getattr(self, ranking)}
        chosen |= {"allocation": self.allocation} if self.allocation else {}
        chosen |= {"pattern": self.pattern} if self.pattern != "unstructured" else {}
        if needs_scores and not {"estimator", "scores"}.intersection(unused):
            chosen |= {"scores": os.fspath(self.scores)} if self.scores is not None else {}
            by_estimator = {name for names in ESTIMATOR_FIELDS.values() for name in names}
            if by_estimator.intersection(unused):
                chosen["estimator"] = self.estimator
        if needs_scores and "mlp_unit_size" in unused:
            chosen["scored_units"] = self.scored_units
        if self.method.layer_by_layer and set(_REFINEMENT_FIELDS).intersection(unused):
            chosen["refine"] = self.method.refine
        if self.method.needs_data and set(ANSWER_FIELDS).intersection(unused):
            chosen["answers"] = self.answers
        settings = enumeration([f"{name} {value!r}" for name, value in chosen.items()])
        fields = enumeration([f"{name} {_shown(getattr(self, name))}" for name in unused])
        verb, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        return (
            f"{fields} {verb} no effect with {settings}: leave {them} out"
            f"{self._alternatives(unused, them)}"
        )

    def _alternatives(self, unused: list[str], them: str) -> str:
        """Return which other choices of one field would give the unused fields an effect."""
        not_used = "criterion" if self.criterion is None else "recipe"
        for name, choices in _DECIDING.items():
            if name in unused or name == not_used:
                continue
            if name == "answers" and not set(unused).issubset(ANSWER_FIELDS):
                continue  # it gives others an effect too, but users choose it for the answers
            fitting = [repr(choice) for choice in choices if self._is_valid_with({name: choice})]
            if len(fitting) > _SUGGESTED:
                return f", or choose another {name} to use {them}, such as {fitting[0]}"
            if fitting:
                return f", or choose {name} {enumeration(fitting, 'or')} to use {them}"
        return ""

    @property
    def _changed_fields(self) -> list[str]:
        """The names of the fields that differ from their default."""
        fields = dataclasses.fields(self)
        return [each.name for each in fields if not _is_default(each, getattr(self, each.name))]

    def _is_valid_with(self, changes: dict[str, Any]) -> bool:
        """Return whether a config with these changes is valid and uses all fields that are set."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values |= changes
        if not fields_used(values).issuperset(self._changed_fields):
            return False
        try:
            CAPConfig(**values)
        except ValueError:
            return False
        return True

    def _check_units(self) -> None:
        _check_choice("scored_units", self.scored_units, SCORED_UNITS)
        if self.mlp_unit_size is not None:
            _check_integer("mlp_unit_size", self.mlp_unit_size, at_least=1)

    def _check_estimator(self) -> None:
        _check_choice("estimator", self.estimator, ESTIMATOR_NAMES)
        _check_integer("exact_examples", self.exact_examples, at_least=2)
        _check_positive("precision", self.precision)
        if not isinstance(self.torch_compile, bool):
            raise ValueError(f"torch_compile must be True or False, got {self.torch_compile!r}")

    def _check_criterion_fits(self, method: Method) -> None:
        """Check that the criterion can choose what the pattern removes."""
        criterion = CRITERIA[method.criterion]
        removes_parts = self.pattern in SMALLER_PATTERNS
        if removes_parts and self.criterion is None and self.recipe in _BY_ALLOCATION:
            raise ValueError(
                f"recipe {self.recipe!r} gives matrices different sparsities, but pattern "
                f"{self.pattern!r} removes as much from every layer: choose recipe 'causal' or "
                "'causal_fast', or set criterion"
            )
        if criterion.ranks_weights if not removes_parts else self.pattern in criterion.parts:
            return
        fitting = [
            repr(name)
            for name, other in CRITERIA.items()
            if (self.pattern in other.parts if removes_parts else other.ranks_weights)
        ]
        set_by = "" if self.criterion is not None else f" (of recipe {self.recipe!r})"
        raise ValueError(
            f"pattern {self.pattern!r} does not take criterion {method.criterion!r}{set_by}: "
            f"choose criterion {enumeration(fitting, 'or')}"
            + ("" if self.criterion is not None else ", or recipe 'causal' or 'causal_fast'")
        )

    def _check_method(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) is not None:
                _check_choice(name, value, choices)
        _check_positive("owl_outlier_ratio", self.owl_outlier_ratio)
        _check_positive("owl_bound", self.owl_bound)
        _check_positive("allocation_bound", self.allocation_bound)
        if self.allocation_examples is not None:
            _check_integer("allocation_examples", self.allocation_examples, at_least=1)
        if self.answer_weight not in (None, 0):
            _check_positive("answer_weight other than 0", self.answer_weight)
        if self.refine is not None:
            _check_integer("refine", self.refine, at_least=0)
        _check_positive("refine_learning_rate", self.refine_learning_rate)
        method, pattern = self.method, parse_pattern(self.pattern)
        self._check_criterion_fits(method)
        if self.pattern in SMALLER_PATTERNS:
            return
        if method.layer_by_layer and not ALLOCATIONS[method.allocation].per_matrix:
            supported = [name for name, allocation in ALLOCATIONS.items() if allocation.per_matrix]
            raise ValueError(
                f"criterion {method.criterion!r} prunes layer by layer, so allocation "
                f"{method.allocation!r} is not supported: choose allocation {', '.join(supported)}"
            )
        if pattern is None:
            return
        kept, of = pattern
        if method.allocation != "uniform":
            raise ValueError(
                f"pattern {self.pattern!r} gives every matrix the same sparsity, got allocation "
                f"{method.allocation!r}: choose allocation 'uniform'"
            )
        if not math.isclose(self.sparsity, 1 - kept / of, abs_tol=1e-9):
            raise ValueError(
                f"pattern {self.pattern!r} keeps {kept} of every {of} weights, which is sparsity "
                f"{1 - kept / of:g}, got sparsity {self.sparsity}: set it to "
                f"{1 - kept / of:g}"
            )

    @property
    def method(self) -> Method:
        """The pruning method: fields that are set override the recipe's.

        Setting `criterion` without `allocation` implies `"uniform"`, and so does a pattern N:M with
        a recipe that uses sensitivities or a global threshold.
        Patterns that remove parts have criteria of their own.
        """
        recipe = RECIPES[self.recipe]
        if self.pattern in SMALLER_PATTERNS:
            return self._method_for_parts(recipe)
        if self.criterion is not None:
            recipe = Method(self.criterion, "uniform")
        if self.pattern != "unstructured" and (
            recipe.by_sensitivity or recipe.allocation == "global"
        ):
            recipe = dataclasses.replace(recipe, allocation="uniform")
        overrides = {name: getattr(self, name) for name in _OVERRIDES}
        return dataclasses.replace(
            recipe, **{name: value for name, value in overrides.items() if value is not None}
        )

    def _method_for_parts(self, recipe: Method) -> Method:
        """Return the method for a pattern that removes parts."""
        if self.criterion is not None:
            method = Method(self.criterion, "uniform")
        else:
            criterion = PART_CRITERIA[self.pattern].get(self.recipe, recipe.criterion)
            fits = CRITERIA[criterion].needs_inputs or self.pattern == "structured"
            weight = recipe.answer_weight if fits else 0.0
            method = Method(criterion, "uniform", answer_weight=weight, refine=recipe.refine)
        overrides = {name: getattr(self, name) for name in ("answer_weight", "refine")}
        return dataclasses.replace(
            method, **{name: value for name, value in overrides.items() if value is not None}
        )

    def check_without_lm_head(self, class_name: str) -> None:
        """Check that a model that predicts no tokens, such as a classifier, can be pruned.

        Args:
            class_name: Class of the model, for the error message.

        Raises:
            ValueError: The method measures predictions of tokens, or the model would have to answer
                prompts.
        """
        if self.answers == "model":
            raise ValueError(
                f"{class_name} has no LM head, so it cannot answer prompts: use answers 'dataset'"
            )
        method = self.method
        if not method.needs_lm_head:
            return
        criterion = CRITERIA[method.criterion]
        by_criterion = criterion.needs_scores or criterion.needs_predictions
        part = "criterion" if by_criterion else "allocation"
        chosen = {part: getattr(method, part)}
        if getattr(self, part) is None:  # the recipe implies it
            chosen = {"recipe": self.recipe, **chosen}
        settings = " with ".join(f"{name} {value!r}" for name, value in chosen.items())
        raise ValueError(
            f"{class_name} has no LM head, so it predicts no tokens, but {settings} measures "
            f"predictions of tokens: choose {self._choices_without_lm_head()}"
        )

    def _choices_without_lm_head(self) -> str:
        """Return the recipes or criteria that measure no predictions, for an error message."""
        if self.pattern in SMALLER_PATTERNS:
            names = [
                repr(name)
                for name, criterion in CRITERIA.items()
                if self.pattern in criterion.parts
                and not (criterion.needs_scores or criterion.needs_predictions)
            ]
            return f"criterion {enumeration(names, 'or')}"
        recipes = []
        for name in RECIPES:
            with contextlib.suppress(ValueError):  # the pattern does not fit the recipe
                config = CAPConfig(self.sparsity, recipe=name, pattern=self.pattern)
                if not config.method.needs_lm_head:
                    recipes.append(repr(name))
        default, choices = RECIPES["causal"], f"recipe {enumeration(recipes, 'or')}"
        if "'causal'" in recipes:
            return choices
        return (
            f"criterion {default.criterion!r} with refine {default.refine}, the nearest to recipe "
            f"'causal', or {choices}"
        )

    @property
    def fields_used(self) -> frozenset[str]:
        """The fields that affect the result, or how it is measured."""
        return fields_used(vars(self))

    @property
    def dequantize(self) -> bool:
        """Always True: transformers detaches its quantizer after loading a float model."""
        return True

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build a config from a dictionary as returned by `to_dict`.

        Args:
            config_dict: The dictionary, with or without `quant_method`.
            return_unused_kwargs: Return `(config, unused)`, as transformers' configs do.
            **kwargs: Fields that replace those of the dictionary.

        Raises:
            ValueError: A field is unknown (perhaps from a newer version) or has a bad value.
        """
        values = dict(config_dict)
        if "format_version" in values:  # in the config.json of a packed or coded checkpoint
            check_format_version(values.pop("format_version"), "the checkpoint")
        known = {f.name for f in dataclasses.fields(cls)}
        values.update({key: kwargs.pop(key) for key in list(kwargs) if key in known})
        unknown = sorted(set(values) - known)
        if kwargs and not return_unused_kwargs:
            unknown += sorted(kwargs)
        version = values.get("config_version", CONFIG_VERSION)
        if unknown and not (isinstance(version, int) and version > CONFIG_VERSION):
            raise ValueError(
                f"CAPConfig of config_version {CONFIG_VERSION} has no "
                f"{_unknown_fields(unknown, known)}"
            )
        try:
            config = cls(**{key: value for key, value in values.items() if key in known})
        # Errors that comparisons and arithmetic raise for values of other types.
        except (TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"the pruning config has a value of the wrong type ({error}): correct it"
            ) from error
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values without local paths.

        Data files are reduced to their names, and in-memory data to a summary (`in-memory, 128
        rows, sha256 ...`). The tokenizer, the scores file and the resume folder are omitted.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["tokenizer"], values["scores"], values["resume_dir"]
        values["dataset"] = describe_dataset(self.dataset)
        return copy.deepcopy(values)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def fields_used(values: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields of `CAPConfig` that have an effect with the given values.

    Args:
        values: Fields of `CAPConfig`; missing ones have their default.

    Returns:
        The names of the fields; all of them if a value is not a valid choice, which `CAPConfig`
        reports.
    """
    fields = {each.name: each for each in dataclasses.fields(CAPConfig)}
    config = object.__new__(CAPConfig)  # unchecked
    config.__dict__.update({name: _default(each) for name, each in fields.items()} | dict(values))
    try:
        criterion = CRITERIA[config.method.criterion]
        allocation = ALLOCATIONS[config.method.allocation]
        ESTIMATOR_FIELDS[config.estimator]  # raises like the lookups above
    except (KeyError, TypeError):
        return frozenset(fields)
    used = {*criterion.fields, *allocation.fields}
    if config.pattern in SMALLER_PATTERNS:
        always = set(fields).difference(_CONDITIONAL_FIELDS, _NOT_FOR_PARTS)
        return frozenset(_fields_used_for_parts(config, criterion) | always)
    if config.method.needs_data:
        used.update(_DATA_FIELDS)
        if config.answers == "model":
            used.update((*ANSWER_FIELDS, "memory_budget", "resume_dir"))
    if criterion.needs_inputs:
        used.update(_INPUT_FIELDS)
    if criterion.updates_weights:
        used.update(_UPDATE_FIELDS)
    if criterion.needs_inputs and config.method.refine:
        used.update(_REFINEMENT_FIELDS)
    if criterion.needs_inputs or allocation.needs_data:
        used.add("memory_budget")
    if criterion.needs_inputs or allocation.by_sensitivity:
        used.add("resume_dir")
    if config.criterion is None:
        used.add("recipe")
    if criterion.needs_scores:
        used.update(_fields_used_for_scores(config))
        used.add("kv_combination")
    return frozenset(used | set(fields).difference(_CONDITIONAL_FIELDS))


def _fields_used_for_parts(config: "CAPConfig", criterion: Criterion) -> set[str]:
    """Return the conditional fields that have an effect where parts are removed."""
    used = {*criterion.fields, "refine"}
    if config.criterion is None:
        used.add("recipe")
    if config.method.needs_data:
        used.update((*_DATA_FIELDS, *_PART_FIELDS))
        if config.answers == "model":
            used.update(ANSWER_FIELDS)
    if criterion.needs_inputs or config.pattern == "structured":
        used.add("answer_weight")
    if config.method.refine:
        used.update(_REFINEMENT_FIELDS)
    if criterion.needs_scores:
        used.update(_fields_used_for_scores(config))
    return used


def _fields_used_for_scores(config: "CAPConfig") -> set[str]:
    """Return the fields that have an effect on causal scores."""
    by_estimator = ESTIMATOR_FIELDS[config.estimator]
    used = {*_SCORE_FIELDS, *(name for name in by_estimator if name not in _RUNTIME_FIELDS)}
    if config.scores is None:  # otherwise nothing is measured
        used.update(("memory_budget", *by_estimator))
    if config.scored_units == "all":
        used.add("mlp_unit_size")
    return used


def effective(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields for `CAPConfig`: `own`, and those of `shared` that have an effect with it.

    Args:
        shared: Fields that are set for several configs, or that replace defaults.
        own: Fields of this config, which override the shared ones.
    """
    known = {each.name for each in dataclasses.fields(CAPConfig)}
    used = fields_used({**shared, **own})
    shared = {name: value for name, value in shared.items() if name in used or name not in known}
    return {**shared, **own}


# All fields that have an effect only with certain values of other fields.
_CONDITIONAL_FIELDS = frozenset(
    {
        "recipe",
        "kv_combination",
        "mlp_unit_size",
        *_DATA_FIELDS,
        *ANSWER_FIELDS,
        *_SCORE_FIELDS,
        *_INPUT_FIELDS,
        *_UPDATE_FIELDS,
        *_REFINEMENT_FIELDS,
        *_RUNTIME_FIELDS,
        *(name for criterion in CRITERIA.values() for name in criterion.fields),
        *(name for allocation in ALLOCATIONS.values() for name in allocation.fields),
        *(name for names in ESTIMATOR_FIELDS.values() for name in names),
    }
)


def _default(each: "dataclasses.Field[Any]") -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def _is_default(each: "dataclasses.Field[Any]", value: Any) -> bool:
    default = _default(each)
    # Data in memory may compare elementwise.
    return value is default or (isinstance(value, _PLAIN) and bool(value == default))


_PLAIN = (str, int, float, bool, list)


def _shown(value: Any) -> str:
    """Return a value for an error message; for data in memory, its type."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    plain = isinstance(value, str | int | float) or is_dataset_name(value)
    return repr(value) if plain else type(value).__name__


def _with_plain_paths(dataset: Any) -> Any:
    """Convert paths to strings, and a tuple of names to a list, as in JSON."""
    if isinstance(dataset, os.PathLike):
        return os.fspath(dataset)
    if isinstance(dataset, dict) and "path" in dataset:
        return {**dataset, "path": _with_plain_paths(dataset["path"])}
    if isinstance(dataset, list | tuple):
        plain = [_with_plain_paths(entry) for entry in dataset]
        return plain if all(map(is_dataset_name, plain)) else dataset
    return dataset


def describe_dataset(dataset: Any) -> Any:
    """Return a name, a specification or a list of them, without local folders; or a summary."""
    if isinstance(dataset, str):
        return _without_folder(dataset)
    if isinstance(dataset, dict):
        return {
            key: _without_folder(str(value)) if key == "path" else value
            for key, value in dataset.items()
        }
    if isinstance(dataset, list) and all(is_dataset_name(entry) for entry in dataset):
        return [describe_dataset(entry) for entry in dataset]
    rows = list(dataset)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return f"in-memory, {len(rows)} rows, sha256 {digest[:16]}"


def _without_folder(name: str) -> str:
    """Return the name of a data set; for a file, as in `preset=FILE`, only its last part."""
    preset = _PRESET.match(name)
    start = preset[0] if preset else ""
    path = name.removeprefix(start)
    is_file = bool(_DATA_FILE.search(path)) or os.path.isabs(path) or os.path.isfile(path)
    return f"{start}{os.path.basename(path)}" if is_file else name


def is_dataset_name(entry: Any) -> bool:
    """Whether `entry` names a data set (preset, Hub id, file, specification), as opposed to a text.

    A name has no white space and is a word such as `gsm8k`, `owner/name`, or a file with a known
    extension; a dictionary is a specification if it has the key `path`.
    """
    if isinstance(entry, dict):
        return "path" in entry
    return isinstance(entry, str) and bool(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry) or _DATA_FILE.search(entry)
    )


def parse_size(size: Any, name: str = "size") -> int:
    """Return the bytes given by an integer or by text such as `"512MB"` or `"1.5GiB"`.

    Raises:
        ValueError: `size` is neither, or is not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match and (value := int(float(match[1]) * _SIZE_UNITS[match[2].lower()])) > 0:
        return value
    raise ValueError(f'{name} must be a number of bytes or text such as "4GB", got {size!r}')


def _as_fraction(sparsity: Any) -> str:
    """Return advice for a sparsity in percent."""
    text = str(sparsity).strip()
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        return ""
    is_percent = text.endswith("%") or percent > 1
    return f": write {percent / 100:g} for {percent:g} %" if is_percent and percent < 100 else ""


def _check_module_names(names: Any) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules_to_leave_dense must be a list of module names, got {names!r}")
    for name in names:
        if not name.strip("."):
            raise ValueError(
                f"modules_to_leave_dense has the name {name!r}, which names nothing: leave it out"
            )
        if name.startswith(PATTERN_PREFIX):
            try:
                re.compile(name.removeprefix(PATTERN_PREFIX))
            except re.error as error:
                raise ValueError(
                    f"modules_to_leave_dense has the pattern {name!r}, which is not a regular "
                    f"expression ({error}): correct it"
                ) from error


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}"
            f"{did_you_mean(value, choices)}"
        )


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_integer(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
