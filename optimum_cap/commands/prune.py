"""`optimum-cli cap prune`: prune a model and save it with its tokenizer."""

import gc
import json
import os
import shutil
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_common_flags,
    add_loading_flags,
    auto_class_name,
    check_hub_access,
    check_loading_flags,
    check_model,
    check_output_folder,
    check_prunable,
    check_resume_folder,
    loading_options,
)
from optimum_cap.commands.summary import print_summary
from optimum_cap.text import enumeration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from optimum_cap.config import CAPConfig
    from optimum_cap.data import CalibrationExample
    from optimum_cap.runtime import ProcessGroup


def _or_text(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a conversion that leaves what it cannot convert to the checks of `CAPConfig`."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return convert


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# Flag, field of CAPConfig, type (None for a switch), help. Only flags that were set are passed on,
# so CAPConfig alone defines the defaults; a test compares those in the help texts with it.
_CONFIG_FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    (
        "--sparsity",
        "sparsity",
        float,
        "fraction of the prunable weights to zero, or of the parts to remove, between 0 and 1; "
        "pattern N:M implies it",
    ),
    (
        "--recipe",
        "recipe",
        str,
        "causal, causal_fast, paper, magnitude, magnitude_global, random, wanda, sparsegpt, "
        "owl_wanda, owl_sparsegpt (default: causal)",
    ),
    (
        "--criterion",
        "criterion",
        str,
        "causal_score, magnitude, random, wanda, sparsegpt or alps; for parts, see "
        "docs/smaller_models.md (default: the recipe's)",
    ),
    (
        "--allocation",
        "allocation",
        str,
        "zeros per matrix: global, uniform, owl, interventional or fisher (default: the recipe's)",
    ),
    (
        "--allocation-bound",
        "allocation_bound",
        float,
        "most by which interventional and fisher move the sparsity of a site (default: 0.1)",
    ),
    (
        "--allocation-examples",
        "allocation_examples",
        int,
        "examples to measure sensitivities on (default: as many as cost one pass over the "
        "calibration set, at least 16)",
    ),
    (
        "--target",
        "target",
        str,
        "what kept weights are fitted to: outputs of the matrix itself (local) or of the dense "
        "model (dense) (default: the recipe's)",
    ),
    (
        "--order",
        "order",
        str,
        "when inputs are measured again: after each layer, or before each projection "
        "(default: the recipe's)",
    ),
    (
        "--answer-weight",
        "answer_weight",
        float,
        "extra weight of scored tokens and of the tokens that predict them (default: the recipe's)",
    ),
    (
        "--refine",
        "refine",
        int,
        "passes that fit the kept weights of a layer to the hidden states of the "
        "dense model; 0 for none (default: the recipe's)",
    ),
    (
        "--refine-learning-rate",
        "refine_learning_rate",
        float,
        "learning rate of --refine, relative to the size of the weights (default: 0.006)",
    ),
    (
        "--pattern",
        "pattern",
        str,
        "unstructured; N:M, such as 2:4; experts, heads, channels, layers or structured remove "
        "parts (default: unstructured)",
    ),
    (
        "--answers",
        "answers",
        str,
        "whose answers are used: those of the dataset, or the dense model's own (default: dataset)",
    ),
    (
        "--temperature",
        "temperature",
        float,
        "temperature at which the model samples its answers (default: 0.6)",
    ),
    (
        "--top-p",
        "top_p",
        float,
        "tokens are drawn from the fewest that together have this probability (default: 0.95)",
    ),
    (
        "--max-new-tokens",
        "max_new_tokens",
        int,
        "longest answer of the model, in tokens; longer ones are cut off (default: 512)",
    ),
    (
        "--answer-attempts",
        "answer_attempts",
        int,
        "answers of the model to a prompt, at most, until one is right (default: 2)",
    ),
    (
        "--answer-selection",
        "answer_selection",
        str,
        "answers used if there are more than needed: right, or hard of middling length "
        "(default: right)",
    ),
    (
        "--answer-candidates",
        "answer_candidates",
        int,
        "prompts that the model answers (default: num_samples, twice as many if hard)",
    ),
    ("--num-samples", "num_samples", int, "number of calibration examples (default: 128)"),
    ("--subsets", "subsets", int, "number of disjoint calibration subsets (default: 3)"),
    (
        "--aggregation",
        "aggregation",
        str,
        "how the losses of the subsets are combined: median or mean (default: median)",
    ),
    (
        "--kv-combination",
        "kv_combination",
        str,
        "how a key/value head combines the importances of its query heads: mean or max "
        "(default: mean)",
    ),
    (
        "--scored-tokens",
        "scored_tokens",
        str,
        "tokens that count in the loss: answer or all (default: answer)",
    ),
    (
        "--units",
        "scored_units",
        str,
        "units to score: heads, or all (heads, MLPs and experts) (default: heads)",
    ),
    (
        "--mlp-unit-size",
        "mlp_unit_size",
        int,
        "channels per MLP or expert unit, with --units all (default: all channels)",
    ),
    (
        "--estimator",
        "estimator",
        str,
        "how causal scores are obtained: exact, plain, first_order, control_variate or adaptive "
        "(default: exact)",
    ),
    (
        "--exact-examples",
        "exact_examples",
        int,
        "examples measured exactly by control_variate, or per round of adaptive (default: 16)",
    ),
    (
        "--precision",
        "precision",
        float,
        "adaptive stops once 1.96 standard errors are at most this fraction of the range of the "
        "scores (default: 0.1)",
    ),
    (
        "--max-length",
        "max_length",
        int,
        "longest example, in tokens; longer ones are skipped (default: 2048 or the model's limit)",
    ),
    (
        "--memory-budget",
        "memory_budget",
        _size,
        "memory for activations, e.g. 4GB; auto: half of free memory, or a fixed batch size for "
        "layer-by-layer passes (default: auto)",
    ),
    (
        "--torch-compile",
        "torch_compile",
        None,
        "compile the decoder layers to measure causal scores; pays off in long GPU runs "
        "(default: False)",
    ),
    (
        "--resume-dir",
        "resume_dir",
        str,
        "folder for intermediate results, so that an interrupted run resumes "
        "(default: optimum_cap/resume in HF_HOME)",
    ),
    (
        "--seed",
        "seed",
        int,
        "seed for the selection of examples and the answers of the model (default: 0)",
    ),
    (
        "--format",
        "checkpoint_format",
        str,
        "packed (bit mask and values), coded (the same, compressed) or dense, which loads without "
        "this plugin (default: packed)",
    ),
    (
        "--strict",
        "strict",
        None,
        "refuse a model if some linear weights of its decoder would stay dense (default: False)",
    ),
)


# Column of the data set -> what is in it.
_COLUMN_FLAGS = {
    "prompt": "the prompts",
    "answer": "the answers",
    "text": "plain texts",
    "messages": "chats",
}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` of `cap prune` and `cap score` hands to `execute`.

    Attributes:
        config: The config.
        tokenizer: The tokenizer.
        process_group: The processes launched together.
        processor_files: Files of the model's image, audio or video processor, to copy.
        shown: An example to print instead of pruning.
        auto_class: The class of transformers that loads the model.
        quantized: Folder for the quantized model, if there is to be one.
    """

    config: "CAPConfig"
    tokenizer: "PreTrainedTokenizerBase"
    process_group: "ProcessGroup"
    processor_files: tuple[Path, ...] = ()
    shown: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    quantized: Path | None = None


class PruneCommand(CAPSubcommand):
    """Checks all it can before it loads the model, so that a long job does not fail at its end."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Prune a causal language model, or a classifier made of one, and save it."
        )
        add = parser.add_argument
        add("-m", "--model", required=True, help="Hub id or folder of the model to prune")
        add("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
        add_config_flags(parser, [field for _, field, _, _ in _CONFIG_FLAGS])
        add(
            "--scores",
            type=Path,
            metavar="FILE",
            help="scores file from `cap score` to use instead of measuring; its data and seed "
            "apply; recipe paper unless you name another",
        )
        add(
            "--leave-dense",
            dest="modules_to_leave_dense",
            nargs="+",
            default=SUPPRESS,
            metavar="NAME",
            help="modules to leave dense: parts of names, e.g. layers.0 o_proj, or patterns, e.g. "
            "re:.*down_proj (default: none)",
        )
        add(
            "--max-shard-size",
            metavar="SIZE",
            help="largest weight file before packing, e.g. 500MB (default: 5GB)",
        )
        add(
            "--overwrite",
            action="store_true",
            help="replace the checkpoint in an output folder that is not empty; other files stay",
        )
        add(
            "--then-quantize",
            metavar="SCHEME",
            help="also save the pruned model quantized, in the folder DIR-SCHEME: int4, int8, nf4 "
            "or fp4 (default: none)",
        )
        add(
            "--show-example",
            action="store_true",
            help="print a calibration example with its scored part marked, and prune nothing "
            "(default: False)",
        )
        add_loading_flags(parser)
        add(
            "--base-model",
            metavar="ID",
            help="Hub id of a model in a local folder, for the record and the model card "
            "(default: the name of the folder)",
        )
        add("--push-to-hub", metavar="REPO", help="Hub id to upload the checkpoint to")
        add("--private", action="store_true", help="make the Hub repository private if it is new")
        add_common_flags(parser)

    def prepare(self) -> Prepared:
        """Check output, configuration, Hub access, tokenizer and data."""
        args = self.args
        if not args.show_example:  # which writes nothing
            check_output_folder(args.output, args.model, args.overwrite)
        if args.private and not args.push_to_hub:
            raise ValueError("--private needs --push-to-hub: add it, or leave --private out")

        from optimum_cap.checkpoint import check_target
        from optimum_cap.config import parse_size
        from optimum_cap.runtime import ProcessGroup

        process_group = ProcessGroup.current()
        process_group.silence_other_ranks()
        check_loading_flags(args, process_group.size)
        config = _config(args)
        if args.max_shard_size:
            parse_size(args.max_shard_size, "--max-shard-size")
        if args.show_example:
            return _prepared_example(config, args, process_group)
        # Also checked when saving: the weights of another model are never replaced.
        check_target(args.output.absolute())
        if args.base_model:
            _check_base_model(args)
        if args.push_to_hub:
            check_hub_access(args.push_to_hub, args.token)
        model_config = check_prunable(args.model, args)
        auto_class = _auto_class(config, model_config, args)
        quantized = _quantized_folder(config, model_config, auto_class, args)
        tokenizer = load_tokenizer(args)
        if config.method.needs_data:
            config.tokenizer = tokenizer
            calibration_examples(config, tokenizer, args)
        process_group.all_gather(None)  # no process may save before all have checked the output
        files = _processor_files(args)
        return Prepared(
            config, tokenizer, process_group, files, auto_class=auto_class, quantized=quantized
        )

    def execute(self, prepared: Prepared) -> None:
        """Prune, save, print a summary and upload; or print an example."""
        if prepared.shown is not None:
            if not prepared.process_group.rank:
                print(prepared.shown)
            return
        import transformers

        from optimum_cap.checkpoint import inspect_checkpoint, set_base_model
        from optimum_cap.config import parse_size

        args = self.args
        start = time.monotonic()
        model = getattr(transformers, prepared.auto_class).from_pretrained(
            args.model,
            **loading_options(args, prepared.process_group),
            pruning_config=prepared.config,
        )
        prepared.process_group.shutdown()
        if prepared.process_group.rank:
            return  # the model is the same in every process, and rank 0 saves it
        before = _file_stamps(args.output)
        limit = {"max_shard_size": parse_size(args.max_shard_size)} if args.max_shard_size else {}
        model.save_pretrained(args.output, **limit)
        _save_companions(args.output, prepared)
        if args.base_model:
            set_base_model(args.output, args.base_model)

        print_summary(inspect_checkpoint(str(args.output)))
        print(f"time          {time.monotonic() - start:.1f} s")
        print(f"saved         {args.output}")
        if args.push_to_hub:
            # Files that were in the folder before are not published.
            written = [
                name
                for name, stamp in _file_stamps(args.output).items()
                if before.get(name) != stamp
            ]
            url = _upload(args.output, written, args.push_to_hub, args.private, args.token)
            print(f"uploaded      {url}")
        if prepared.quantized is not None:
            del model
            gc.collect()  # its save_pretrained refers to it
            _quantize(args, prepared, prepared.quantized)
        name = args.push_to_hub or str(args.output)
        _print_how_to_load(name, prepared.config.checkpoint_format, prepared.auto_class)


def _config(args: Namespace) -> "CAPConfig":
    """Return the config that the flags describe, with the settings of `--scores`, if it is set.

    Raises:
        ValueError: The settings are not valid, or the scores were measured on data in memory.
        OSError: The scores cannot be read, or the resume folder cannot be written.
    """
    from optimum_cap.config import CAPConfig, effective
    from optimum_cap.runtime import default_folder

    flags = config_values(vars(args))
    defaults = {"resume_dir": default_folder()}
    if args.scores:
        from optimum_cap.data import find_data_files
        from optimum_cap.scoring import read_scores

        # Flags that are not set take their values from the file; the others must match it.
        measured = dict(read_scores(args.scores).settings)
        if "dataset" not in flags:
            measured["dataset"] = find_data_files(measured["dataset"], args.scores)
        defaults |= measured
        flags["scores"] = args.scores
        if flags.keys().isdisjoint({"recipe", "criterion"}):
            flags["recipe"] = "paper"
    values = effective(defaults, flags)
    if args.scores and str(values.get("dataset")).startswith("in-memory"):
        raise ValueError(
            f"the scores in {args.scores} were measured on in-memory data ({values['dataset']}), "
            "which no flag can name: prune in Python, with CAPConfig(scores=..., dataset=...)"
        )
    config = CAPConfig(**values)
    check_resume_folder(flags.get("resume_dir"))
    return config


def _auto_class(config: "CAPConfig", model_config: Any, args: Namespace) -> str:
    """Return the class of transformers that loads the model with the head that it was saved with.

    Raises:
        ValueError: It is a classifier, and the config measures predictions of tokens.
    """
    from optimum_cap.models import classifier_class

    class_name = classifier_class(model_config)
    if class_name is not None:
        config.check_without_lm_head(class_name)
    return auto_class_name(model_config, args.model, args.trust_remote_code)


def _quantized_folder(
    config: "CAPConfig", model_config: Any, auto_class: str, args: Namespace
) -> Path | None:
    """Return the folder of `--then-quantize`, next to the output; `None` without this flag.

    Raises:
        ValueError: There is no such scheme, it leaves most weights of the model as they are, or it
            cannot be calibrated.
        ImportError: The package of the scheme is not installed.
        OSError: The folder has files already, or cannot be written.
    """
    if args.then_quantize is None:
        return None

    from optimum_cap.quantization import check_calibration, check_new, check_reaches, get_scheme

    scheme = get_scheme(args.then_quantize)
    check_calibration(args.then_quantize, config)
    folder = Path(f"{os.path.normpath(args.output)}-{args.then_quantize}")
    check_new(folder)
    check_output_folder(folder, args.model)
    trust = {"trust_remote_code": args.trust_remote_code}
    check_reaches(scheme, args.then_quantize, model_config, auto_class, **trust)
    return folder


def _quantize(args: Namespace, prepared: Prepared, folder: Path) -> None:
    """Quantize the sparse checkpoint, and say where the result is."""
    from optimum_cap.quantization import quantize_checkpoint

    try:
        quantize_checkpoint(
            args.output,
            folder,
            args.then_quantize,
            prepared.auto_class,
            prepared.config,
            prepared.tokenizer,
            args.max_shard_size or "5GB",
            device_map=args.device_map,
            trust_remote_code=args.trust_remote_code,
        )
    except BaseException as error:
        state = (
            f"the pruned model is saved in {args.output}, but not quantized to "
            f"{args.then_quantize}: optimum_cap.quantization.quantize_checkpoint does that alone"
        )
        if not isinstance(error, Exception):  # an interrupt
            print(f"\n{state}", file=sys.stderr)
            raise
        raise OSError(f"{state} ({error})") from error
    print(f"quantized     {folder}")


def _prepared_example(
    config: "CAPConfig", args: Namespace, process_group: "ProcessGroup"
) -> Prepared:
    """Return what `--show-example` prints: the first calibration example.

    Raises:
        ValueError: The config needs no data, or the data or the tokenizer cannot be used.
    """
    from optimum_cap.data import describe_example

    if not config.method.needs_data:
        raise ValueError(
            f"--show-example needs calibration data, but criterion {config.method.criterion!r} "
            f"with allocation {config.method.allocation!r} takes none: leave it out"
        )
    if config.answers == "model":
        raise ValueError(
            "--show-example loads no model, so it cannot show an answer of the model: leave out "
            "--answers, or write answers to a file with `cap generate`"
        )
    check_model(args.model, args)
    tokenizer = load_tokenizer(args)
    example = calibration_examples(config, tokenizer, args)[0]
    shown = describe_example(example, tokenizer)
    return Prepared(config, tokenizer, process_group, shown=shown)


def add_config_flags(parser: ArgumentParser, fields: Collection[str]) -> None:
    """Add the flags for `fields` of `CAPConfig`, for its data set and for the tokenizer."""
    for flag, field, kind, text in _CONFIG_FLAGS:
        if field in fields:
            options: dict[str, Any] = {"action": "store_true"}
            if kind is not None:
                options = {
                    "type": _or_text(kind),
                    "metavar": flag.split("-")[-1].upper(),
                }
            parser.add_argument(flag, dest=field, default=SUPPRESS, help=text, **options)
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=SUPPRESS,
        help="preset, preset=path, Hub id, file or JSON specification; several are mixed evenly "
        "(default: gsm8k)",
    )
    for column, of in _COLUMN_FLAGS.items():
        parser.add_argument(
            f"--{column}-column",
            default=SUPPRESS,
            metavar="NAME",
            help=f"column of the data set with {of} (default: found by its name)",
        )
    parser.add_argument(
        "--tokenizer", help="Hub id or folder of the tokenizer (default: the model's)"
    )


def load_tokenizer(args: Namespace) -> Any:
    """Load the tokenizer named by `--tokenizer`, or the model's, as `load_tokenizer_of` does.

    Raises:
        ValueError: There is none, or it has no vocabulary.
    """
    from optimum_cap.data import load_tokenizer_of
    from optimum_cap.models import sees_images

    [class_name, *_] = check_model(args.model, args).architectures or [""]
    return load_tokenizer_of(
        args.tokenizer or args.model,
        sees_images(class_name),
        # --revision refers to the model's repository, not to that of another tokenizer.
        revision=(None if args.tokenizer else args.revision) or "main",
        trust_remote_code=args.trust_remote_code,
        token=args.token,
    )


def calibration_examples(
    config: "CAPConfig", tokenizer: Any, args: Namespace
) -> "list[CalibrationExample]":
    """Build the calibration set before the model is loaded, to report what cannot be used.

    Pruning builds it again.

    Returns:
        The examples; none if the model has to answer their prompts.

    Raises:
        ValueError: The data cannot be used, or the tokenizer is not that of the model.
    """
    from optimum_cap.data import build_calibration_set, check_token_ids, usable_tokenizer
    from optimum_cap.models import classifier_class

    model_config = check_model(args.model, args)
    text_config = model_config.get_text_config(decoder=True)
    embeddings = getattr(text_config, "vocab_size", None)
    if config.answers == "model":
        from optimum_cap.generation import first_prompts

        longest = getattr(text_config, "max_position_embeddings", None)
        first_prompts(config, usable_tokenizer(tokenizer), embeddings, longest)
        return []
    is_classifier = classifier_class(model_config) is not None
    examples = build_calibration_set(config, tokenizer, unscored=is_classifier).examples
    if embeddings is not None:
        ids = [example.input_ids for example in examples]
        check_token_ids(usable_tokenizer(tokenizer), ids, embeddings)
    return examples


def config_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `CAPConfig` that were set on the command line."""
    fields = [field for _, field, _, _ in _CONFIG_FLAGS] + ["modules_to_leave_dense"]
    values = {field: flags[field] for field in fields if field in flags}
    if "dataset" in flags:
        names = [dataset_value(name) for name in flags["dataset"]]
        values["dataset"] = names[0] if len(names) == 1 else names
    columns = {
        f"{column}_column": flags[f"{column}_column"]
        for column in _COLUMN_FLAGS
        if f"{column}_column" in flags
    }
    if columns:
        values["dataset"] = _with_columns(values.get("dataset"), columns)
    return values


def _processor_files(args: Namespace) -> tuple[Path, ...]:
    """Return the files of the model's image, audio or video processor, downloaded if need be."""
    from transformers.utils import (
        AUDIO_TOKENIZER_NAME,
        IMAGE_PROCESSOR_NAME,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        PROCESSOR_NAME,
        VIDEO_PROCESSOR_NAME,
        cached_file,
    )

    names = (
        PROCESSOR_NAME,
        IMAGE_PROCESSOR_NAME,
        VIDEO_PROCESSOR_NAME,
        AUDIO_TOKENIZER_NAME,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    )
    files = (
        cached_file(
            args.model,
            name,
            revision=args.revision,
            token=args.token,
            _raise_exceptions_for_missing_entries=False,
        )
        for name in names
    )
    return tuple(Path(file) for file in files if file)


def _save_companions(folder: Path, prepared: Prepared) -> None:
    """Save the tokenizer and the files of the processor next to the weights."""
    from optimum_cap.data import usable_tokenizer

    try:
        usable_tokenizer(prepared.tokenizer).save_pretrained(folder)
        for file in prepared.processor_files:
            shutil.copyfile(file, folder / file.name)
    except Exception as error:
        raise OSError(
            f"the model is saved in {folder}, but its tokenizer or processor is not ({error}): "
            "copy their files from the dense model"
        ) from error


def dataset_value(text: str) -> str | dict[str, Any]:
    """Return a data set as given on the command line: a name, or a specification in JSON.

    Raises:
        ValueError: The specification is not a JSON object.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--dataset {text} is not valid JSON ({error}): write it in single quotes, as in "
            """'{"path": "rows.jsonl", "text_column": "story"}'"""
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"--dataset {text} is a JSON list: write its entries after --dataset, separated by "
            "spaces"
        )
    return value


def _with_columns(dataset: Any, columns: dict[str, str]) -> dict[str, Any]:
    """Return the specification of a data set with the columns that flags name."""
    flags = enumeration([f"--{name.replace('_', '-')}" for name in columns])
    need = "needs" if len(columns) == 1 else "need"
    if dataset is None:
        raise ValueError(f"{flags} {need} a file or a Hub id: add --dataset")
    if isinstance(dataset, list):
        raise ValueError(
            f"{flags} {need} a single data set, got {len(dataset)}: name the columns of each in a "
            """specification, as in --dataset '{"path": "rows.jsonl", "text_column": "story"}'"""
        )
    specification = dict(dataset) if isinstance(dataset, dict) else {"path": dataset}
    if twice := [
        name for name in columns if specification.get(name, columns[name]) != columns[name]
    ]:
        raise ValueError(
            f"--dataset and {flags} name other columns for {', '.join(twice)}: leave one of them "
            "out"
        )
    return {**specification, **columns}


def _file_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size in bytes and modification time in ns per file, by its path inside `folder`."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _check_base_model(args: Namespace) -> None:
    """Check that `--base-model` is the name of a repository and adds to what is known.

    Raises:
        ValueError: It is no such name, or the model comes from the Hub itself.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not Path(args.model).is_dir():
        raise ValueError(
            f"--base-model {args.base_model} names the model in a local folder, but {args.model} "
            "comes from the Hub, so its name is known: leave it out"
        )
    try:
        validate_repo_id(args.base_model)
    except HFValidationError as error:
        raise ValueError(
            f"--base-model {args.base_model} is no Hub id: write it as owner/name"
        ) from error


def _upload(folder: Path, names: list[str], repo: str, private: bool, token: str | None) -> str:
    from optimum_cap.checkpoint import upload

    try:
        return upload(folder, repo, names, private=private or None, token=token).repo_url
    except Exception as error:
        raise OSError(f"the model is saved in {folder}, but the upload failed: {error}") from error


def _print_how_to_load(name: str, checkpoint_format: str, auto_class: str) -> None:
    from optimum_cap.formats import FORMATS

    reader, variable = "AutoTokenizer", "tokenizer"
    if auto_class == "AutoModelForImageTextToText":
        reader, variable = "AutoProcessor", "processor"
    plugin = ""
    if FORMATS[checkpoint_format].needs_plugin:
        plugin = f"import optimum_cap  # reads the {checkpoint_format} format\n"
    print(
        f"\nLoad it with\n\n{plugin}"
        f"from transformers import {auto_class}, {reader}\n\n"
        f"model = {auto_class}.from_pretrained({name!r})\n"
        f"{variable} = {reader}.from_pretrained({name!r})"
    )
