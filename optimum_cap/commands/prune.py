"""`optimum-cli cap prune`: prune a model and save it with its tokenizer."""

import dataclasses
import gc
import os
import shlex
import shutil
import sys
from argparse import SUPPRESS, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_general_flags,
    add_hub_flags,
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
from optimum_cap.commands.config_flags import RECIPE, SCORES, add_config_flags, config_values
from optimum_cap.commands.opening import opening_lines
from optimum_cap.commands.parser import HUB, OUTPUT, REQUIRED, RUN, CommandParser
from optimum_cap.commands.summary import summary_rows, usage_rows
from optimum_cap.text import enumeration, labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from optimum_cap.config import CAPConfig
    from optimum_cap.data import CalibrationExample
    from optimum_cap.runtime import ProcessGroup


@dataclass(frozen=True)
class Prepared:
    """The values that `prepare` of `cap prune` and `cap score` passes to `execute`.

    Attributes:
        config: The config.
        tokenizer: The tokenizer.
        process_group: The processes launched together.
        processor_files: Files of the model's image, audio or video processor, to copy.
        shown: An example to print instead of pruning.
        examples: Number of calibration examples; 0 if the model has yet to answer.
        tokens: Total number of their tokens.
        auto_class: The Auto class of transformers that loads the model.
        quantized: Folder for the quantized model, if requested.
    """

    config: "CAPConfig"
    tokenizer: "PreTrainedTokenizerBase"
    process_group: "ProcessGroup"
    processor_files: tuple[Path, ...] = ()
    shown: str | None = None
    examples: int = 0
    tokens: int = 0
    auto_class: str = "AutoModelForCausalLM"
    quantized: Path | None = None


class PruneCommand(CAPSubcommand):
    """Checks as much as possible before loading the model, so that long jobs do not fail late."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL -o DIR",
            "Prune a causal language model, or a classifier made of one, and save it.",
            "org/model -o pruned --sparsity 0.5 --dataset gsm8k",
            "./my-model -o pruned --sparsity 0.5 --dataset rows.jsonl",
            "org/model -o pruned --pattern 2:4 --recipe causal_fast",
            "org/model -o pruned --config settings.yaml --dry-run",
            page="recipe",
        )
        parser.add_model("Hub id or folder of the model to prune")
        parser.group(REQUIRED)(
            "-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write"
        )
        add_config_flags(parser)
        add = parser.group(RECIPE)
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
            "--config",
            type=Path,
            metavar="FILE.yaml",
            help="settings by the names of CAPConfig; flags take precedence (default: none)",
        )
        parser.group(SCORES)(
            "--scores",
            type=Path,
            metavar="FILE",
            help="scores file from `cap score` to use instead of measuring; its data and seed "
            "apply; recipe paper unless you name another",
        )
        add = parser.group(OUTPUT)
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
        add = parser.group(RUN)
        add(
            "--dry-run",
            action="store_true",
            help="check everything, print what would be done, and prune nothing (default: False)",
        )
        add(
            "--show-example",
            action="store_true",
            help="print a calibration example with its scored part marked, and prune nothing "
            "(default: False)",
        )
        add_loading_flags(parser)
        add = parser.group(HUB)
        add(
            "--base-model",
            metavar="ID",
            help="Hub id of a model in a local folder, for the record and the model card "
            "(default: the name of the folder)",
        )
        add("--push-to-hub", metavar="REPO", help="Hub id to upload the checkpoint to")
        add("--private", action="store_true", help="make the Hub repository private if it is new")
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> Prepared:
        """Check output, configuration, Hub access, tokenizer and data."""
        args = self.args
        if args.dry_run and args.show_example:
            raise ValueError(
                "--dry-run and --show-example both prune nothing: leave one of them out"
            )
        if not args.show_example:  # this writes nothing
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
            if args.then_quantize:
                check_hub_access(_quantized_repo(args), args.token)
        model_config = check_prunable(args.model, args)
        auto_class = _auto_class(config, model_config, args)
        quantized = _quantized_folder(config, model_config, auto_class, args)
        tokenizer = load_tokenizer(args)
        examples: list[CalibrationExample] = []
        if config.method.needs_data:
            config.tokenizer = tokenizer
            examples = calibration_examples(config, tokenizer, args)
        process_group.all_gather(None)  # no process may save before all have checked the output
        return Prepared(
            config,
            tokenizer,
            process_group,
            _processor_files(args),
            examples=len(examples),
            tokens=sum(len(example.input_ids) for example in examples),
            auto_class=auto_class,
            quantized=quantized,
        )

    def opening(self) -> list[str]:
        """Return model and size, recipe and sparsity, data, device and resume folder."""
        return opening_lines(self.args, "pruning")

    def execute(self, prepared: Prepared) -> dict[str, Any] | None:
        """Prune, save, show a summary and upload; or show an example or the plan."""
        if prepared.shown is not None:
            return self._show(prepared, {"example": prepared.shown}, prepared.shown)
        if self.args.dry_run:
            plan = _plan(self.args, prepared)
            return self._show(prepared, plan, _plan_text(plan))
        import transformers

        from optimum_cap.checkpoint import inspect_checkpoint, set_base_model
        from optimum_cap.config import parse_size
        from optimum_cap.runtime import usage_of_block

        args = self.args
        with usage_of_block() as usage:
            model = getattr(transformers, prepared.auto_class).from_pretrained(
                args.model,
                **loading_options(args, prepared.process_group),
                pruning_config=prepared.config,
            )
            prepared.process_group.shutdown()
            if prepared.process_group.rank:
                return None  # the model is the same on every process, and rank 0 saves it
            before = _file_stamps(args.output)
            size = args.max_shard_size
            limit = {"max_shard_size": parse_size(size)} if size else {}
            model.save_pretrained(args.output, **limit)
            _save_companions(args.output, prepared)
            if args.base_model:
                set_base_model(args.output, args.base_model)

        summary = inspect_checkpoint(str(args.output))
        rows = [*summary_rows(summary), *usage_rows(usage), ("saved", str(args.output))]
        self.say(labelled(rows))
        values = {"saved": str(args.output), **dataclasses.asdict(usage), **summary.to_dict()}
        if args.push_to_hub:
            # Files that were already in the folder are not published.
            written = [
                name
                for name, stamp in _file_stamps(args.output).items()
                if before.get(name) != stamp
            ]
            url = _upload(args.output, written, args.push_to_hub, args.private, args.token)
            values["uploaded"] = url
            self.say(f"uploaded      {url}")
        if prepared.quantized is not None:
            del model
            gc.collect()  # its save_pretrained refers to it
            _quantize(args, prepared, prepared.quantized)
            values["quantized"] = str(prepared.quantized)
            self.say(f"quantized     {prepared.quantized}")
            if args.push_to_hub:
                repo = _quantized_repo(args)
                url = _upload(prepared.quantized, None, repo, args.private, args.token)
                values["uploaded_quantized"] = url
                self.say(f"uploaded      {url}")
        name = args.push_to_hub or str(args.output)
        self.say(_how_to_load(name, prepared.config.checkpoint_format, prepared.auto_class))
        self.say(_what_next(args, prepared.auto_class))
        return values

    def _show(self, prepared: Prepared, values: dict[str, Any], text: str) -> dict[str, Any] | None:
        if prepared.process_group.rank:
            return None
        self.answer(text)
        return values


def _config(args: Namespace) -> "CAPConfig":
    """Return the config described by the flags, with the settings of `--scores` if it is set.

    Raises:
        ValueError: The settings are not valid, or the scores were measured on data in memory.
        OSError: The scores cannot be read, or the resume folder cannot be written.
    """
    from optimum_cap.config import CAPConfig, effective
    from optimum_cap.runtime import default_folder

    flags = config_values(vars(args))
    if args.config is not None:
        flags = _settings_of(args.config) | flags
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
    config: CAPConfig = CAPConfig.from_dict(values)
    check_resume_folder(flags.get("resume_dir"))
    return config


def _settings_of(file: Path) -> dict[str, Any]:
    """Return the settings in the file of `--config`.

    Raises:
        ValueError: It is not valid YAML, or a setting is unknown or cannot be used.
        FileNotFoundError: It does not exist.
    """
    from optimum_cap.config import check_field_names
    from optimum_cap.yaml_files import read_yaml

    values = read_yaml(file, "settings file")
    try:
        check_field_names(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return values


def _plan(args: Namespace, prepared: Prepared) -> dict[str, Any]:
    """Return what a run would do."""
    config = prepared.config
    plan: dict[str, Any] = {
        "model": args.model,
        "class": prepared.auto_class,
        "settings": config.to_dict(),
        "effective": dataclasses.asdict(config.method),
        "calibration_examples": prepared.examples,
        "calibration_tokens": prepared.tokens,
        "output": str(args.output),
    }
    if args.push_to_hub:
        plan["push_to_hub"] = args.push_to_hub
    if prepared.quantized is not None:
        plan["quantized"] = str(prepared.quantized)
        if args.push_to_hub:
            plan["push_quantized_to_hub"] = _quantized_repo(args)
    return plan


def _plan_text(plan: dict[str, Any]) -> str:
    """Return a plan as text of at most 80 columns."""
    effective = ", ".join(f"{name} {value}" for name, value in plan["effective"].items())
    data = "none, the recipe needs no data"
    if plan["calibration_examples"]:
        data = f"{plan['calibration_examples']} examples, {plan['calibration_tokens']:,} tokens"
    elif plan["settings"]["answers"] == "model":
        data = "prompts that the model answers first"
    rows = [
        ("would prune", f"{plan['model']}, loaded as {plan['class']}"),
        ("sparsity", f"{plan['settings']['sparsity']}, pattern {plan['settings']['pattern']}"),
        ("recipe", f"{plan['settings']['recipe']}: {effective}"),
        ("calibration", data),
        ("would save", f"{plan['output']}, format {plan['settings']['checkpoint_format']}"),
        *((name, plan[key]) for name, key in _PLANNED if key in plan),
    ]
    advice = "All checks passed, and nothing was pruned. Predict time and memory with"
    return f"{labelled(rows)}\n\n{advice}\n\noptimum-cli cap estimate {shlex.quote(plan['model'])}"


_PLANNED = (
    ("would push", "push_to_hub"),
    ("quantized", "quantized"),
    ("would push", "push_quantized_to_hub"),
)


def _auto_class(config: "CAPConfig", model_config: Any, args: Namespace) -> str:
    """Return the Auto class that loads the model with the head it was saved with.

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
        ValueError: The scheme is unknown, leaves most weights of the model unquantized, or cannot
            be calibrated.
        ImportError: The package of the scheme is not installed.
        OSError: The folder already contains files, or cannot be written.
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
    """Quantize the sparse checkpoint, and report where the result is."""
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
        if not isinstance(error, Exception):  # an interruption
            print(f"\n{state}", file=sys.stderr)
            raise
        raise OSError(f"{state} ({error})") from error


def _prepared_example(
    config: "CAPConfig", args: Namespace, process_group: "ProcessGroup"
) -> Prepared:
    """Return the first calibration example, for `--show-example`.

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


def load_tokenizer(args: Namespace) -> Any:
    """Load the tokenizer named by `--tokenizer`, or the model's, like `load_tokenizer_of`.

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
    """Build the calibration set before loading the model, to report unusable data early.

    Pruning builds it again.

    Returns:
        The examples; empty if the model has to answer their prompts.

    Raises:
        ValueError: The data cannot be used, or the tokenizer is not the model's.
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


def _processor_files(args: Namespace) -> tuple[Path, ...]:
    """Return the files of the model's image, audio or video processor, downloaded if needed."""
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


def _file_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size in bytes and modification time in ns per file, by its path inside `folder`."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _check_base_model(args: Namespace) -> None:
    """Check that `--base-model` is a valid repository name and not redundant.

    Raises:
        ValueError: The name is invalid, or the model itself comes from the Hub.
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


def _quantized_repo(args: Namespace) -> str:
    """Return the repository of the quantized checkpoint, named like its folder."""
    return f"{args.push_to_hub}-{args.then_quantize}"


def _upload(
    folder: Path, names: list[str] | None, repo: str, private: bool, token: str | None
) -> str:
    from optimum_cap.checkpoint import upload

    try:
        return upload(folder, repo, names, private=private or None, token=token).repo_url
    except Exception as error:
        raise OSError(f"the model is saved in {folder}, but the upload failed: {error}") from error


def _how_to_load(name: str, checkpoint_format: str, auto_class: str) -> str:
    from optimum_cap.formats import FORMATS

    reader, variable = "AutoTokenizer", "tokenizer"
    if auto_class == "AutoModelForImageTextToText":
        reader, variable = "AutoProcessor", "processor"
    plugin = ""
    if FORMATS[checkpoint_format].needs_plugin:
        plugin = f"import optimum_cap  # reads the {checkpoint_format} format\n"
    return (
        f"\nLoad it with\n\n{plugin}"
        f"from transformers import {auto_class}, {reader}\n\n"
        f"model = {auto_class}.from_pretrained({name!r})\n"
        f"{variable} = {reader}.from_pretrained({name!r})"
    )


def _what_next(args: Namespace, auto_class: str) -> str:
    """Return suggested next commands; those that compare answers need an LM head."""
    dense, pruned = shlex.quote(args.model), shlex.quote(str(args.output))
    steps = {
        "see what it has lost": f"compare {dense} {pruned} --tasks gsm8k_loss --limit 64",
        "talk to both": f"chat {dense} {pruned}",
        "share it": f"push {pruned} you/name",
    }
    if auto_class not in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        steps = {"share it": steps["share it"]}
    if args.push_to_hub:
        steps.pop("share it")
    if not steps:
        return ""
    aims = enumeration(list(steps))
    commands = "\n".join(f"optimum-cli cap {command}" for command in steps.values())
    return f"\n{aims[0].upper()}{aims[1:]}:\n\n{commands}"
