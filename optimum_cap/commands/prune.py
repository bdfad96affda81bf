"""`optimum-cli cap prune`: prune a model and save it with its tokenizer."""

import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_common_flags,
    add_loading_flags,
    check_loading_flags,
    check_output_folder,
    loading_options,
)
from optimum_cap.commands.summary import print_summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from optimum_cap.config import CAPConfig
    from optimum_cap.runtime import ProcessGroup


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# Flag, field of CAPConfig, type (none for a switch), help. A flag that is not given is not passed
# on, so the defaults live in CAPConfig alone; a test compares the words here with them.
_CONFIG_FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("--sparsity", "sparsity", float, "fraction of the weights to zero, between 0 and 1"),
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
        "causal_score, magnitude, random, wanda, sparsegpt or alps (default: the recipe's)",
    ),
    (
        "--allocation",
        "allocation",
        str,
        "zeros per matrix: global, uniform, owl, interventional, fisher (default: the recipe's)",
    ),
    (
        "--allocation-bound",
        "allocation_bound",
        float,
        "the most that interventional moves the sparsity of a site (default: 0.1)",
    ),
    (
        "--allocation-examples",
        "allocation_examples",
        int,
        "examples that interventional measures on (default: what costs a pass, at least 16)",
    ),
    (
        "--target",
        "target",
        str,
        "what kept weights fit: local outputs or those of the dense model (default: the recipe's)",
    ),
    (
        "--order",
        "order",
        str,
        "what is pruned before inputs are seen again: layer or projection (default: the recipe's)",
    ),
    (
        "--answer-weight",
        "answer_weight",
        float,
        "added to the weight 1 of tokens that are or predict answers (default: the recipe's)",
    ),
    (
        "--pattern",
        "pattern",
        str,
        "unstructured; N:M, N weights kept of every M, as 2:4; or heads, whole ones (default: "
        "unstructured)",
    ),
    ("--num-samples", "num_samples", int, "number of calibration examples (default: 128)"),
    ("--subsets", "subsets", int, "number of disjoint calibration subsets (default: 3)"),
    (
        "--aggregation",
        "aggregation",
        str,
        "how the losses of the subsets combine: median or mean (default: median)",
    ),
    (
        "--kv-combination",
        "kv_combination",
        str,
        "importance of a key/value head from its query heads: mean or max (default: mean)",
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
        "what is scored: heads, or all, with MLPs and experts (default: heads)",
    ),
    (
        "--mlp-unit-size",
        "mlp_unit_size",
        int,
        "channels per unit of an MLP or expert, with --units all (default: all channels)",
    ),
    (
        "--estimator",
        "estimator",
        str,
        "causal scores: exact, plain, first_order, control_variate or adaptive (default: exact)",
    ),
    (
        "--exact-examples",
        "exact_examples",
        int,
        "examples that control_variate, or a round of adaptive, measures exactly (default: 16)",
    ),
    (
        "--precision",
        "precision",
        float,
        "where adaptive stops: 1.96 errors of a score over the range of all (default: 0.1)",
    ),
    (
        "--max-length",
        "max_length",
        int,
        "longest example used, in tokens (default: 2048 or the limit of the model)",
    ),
    (
        "--memory-budget",
        "memory_budget",
        _size,
        "memory for activations, in bytes or as 4GB; auto is half of what is free (default: auto)",
    ),
    (
        "--torch-compile",
        "torch_compile",
        None,
        "compile layers to measure causal scores: faster in long runs on a GPU (default: False)",
    ),
    (
        "--resume-dir",
        "resume_dir",
        str,
        "finished parts of a run are kept here (default: optimum_cap/scores in HF_HOME)",
    ),
    ("--seed", "seed", int, "seed of the selection of examples (default: 0)"),
    (
        "--format",
        "checkpoint_format",
        str,
        "packed, or dense, which loads without this plugin (default: packed)",
    ),
)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has checked: `cap prune` and `cap score` need the same."""

    config: "CAPConfig"
    tokenizer: "PreTrainedTokenizerBase"
    process_group: "ProcessGroup"


class PruneCommand(CAPSubcommand):
    """Checks all it can before it loads the model: a long job must not fail at its end."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = "Prune a causal language model and save it."
        add = parser.add_argument
        add("-m", "--model", required=True, help="Hub id or folder of the model to prune")
        add("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
        add_config_flags(parser, [field for _, field, _, _ in _CONFIG_FLAGS])
        add(
            "--scores",
            type=Path,
            metavar="FILE",
            help="scores file of `cap score`, with its data and seed, instead of measuring; "
            "implies recipe paper",
        )
        add(
            "--leave-dense",
            dest="modules_to_leave_dense",
            nargs="+",
            default=SUPPRESS,
            metavar="NAME",
            help="modules not to prune, by part of their name, as layers.0 o_proj (default: none)",
        )
        add(
            "--max-shard-size",
            metavar="SIZE",
            help="largest weight file before packing, as 500MB (default: 5GB)",
        )
        add(
            "--overwrite",
            action="store_true",
            help="replace the checkpoint in a folder that is not empty; other files stay",
        )
        add_loading_flags(parser)
        add("--push-to-hub", metavar="REPO", help="Hub id to upload the result to")
        add("--private", action="store_true", help="make that repository private if it is new")
        add_common_flags(parser)

    def prepare(self) -> Prepared:
        """Check output, configuration, Hub access, tokenizer and data."""
        args = self.args
        check_output_folder(args.output, args.model, args.overwrite)
        if args.private and not args.push_to_hub:
            raise ValueError("--private is about the uploaded repository: it needs --push-to-hub")

        from optimum_cap.checkpoint import check_target
        from optimum_cap.config import CAPConfig, parse_size
        from optimum_cap.data import build_calibration_set
        from optimum_cap.runtime import ProcessGroup, default_folder

        process_group = ProcessGroup.current()
        process_group.silence_other_ranks()
        check_loading_flags(args, process_group.size)
        given = config_values(vars(args))
        values = {"resume_dir": default_folder(), **given}
        if args.scores:
            from optimum_cap.scoring import read_scores

            # What is not given is as in the file; what is given has to be.
            values = {**read_scores(args.scores).settings, **values, "scores": args.scores}
            if given.keys().isdisjoint({"recipe", "criterion"}):
                values["recipe"] = "paper"
            if str(values["dataset"]).startswith("in-memory"):
                raise ValueError(
                    f"the scores in {args.scores} are of data from a program "
                    f"({values['dataset']}): prune there, with CAPConfig(scores=...) and that data"
                )
        config = CAPConfig(**values)
        if args.max_shard_size:
            parse_size(args.max_shard_size, "--max-shard-size")
        # Saving checks this again: weights of another model in the folder are never replaced.
        check_target(args.output.absolute())
        if args.push_to_hub:
            _check_hub_access(args.push_to_hub, args.token)
        config.tokenizer = tokenizer = load_tokenizer(args)
        if config.method.needs_data:
            # Made again when the model prunes; here it shows what is wrong with the data in a
            # second.
            build_calibration_set(config, tokenizer)
        process_group.all_gather(None)  # none may save before all have looked at the output folder
        return Prepared(config, tokenizer, process_group)

    def execute(self, prepared: Prepared) -> None:
        """Prune, save, print what was done, upload."""
        from transformers import AutoModelForCausalLM

        from optimum_cap.checkpoint import inspect_checkpoint
        from optimum_cap.config import parse_size

        args = self.args
        start = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(
            args.model,
            **loading_options(args, prepared.process_group),
            pruning_config=prepared.config,
        )
        prepared.process_group.shutdown()
        if prepared.process_group.rank:
            return  # the model is the same in every process; the first one saves it
        before = _file_stamps(args.output)
        limit = {"max_shard_size": parse_size(args.max_shard_size)} if args.max_shard_size else {}
        model.save_pretrained(args.output, **limit)
        prepared.tokenizer.save_pretrained(args.output)

        print_summary(inspect_checkpoint(str(args.output)))
        print(f"time          {time.monotonic() - start:.1f} s")
        print(f"saved         {args.output}")
        if args.push_to_hub:
            # What was in the folder before is not ours to publish.
            ours = [
                name
                for name, stamp in _file_stamps(args.output).items()
                if before.get(name) != stamp
            ]
            url = _upload(args.output, ours, args.push_to_hub, args.private, args.token)
            print(f"uploaded      {url}")
        _print_how_to_load(args.push_to_hub or str(args.output), prepared.config.checkpoint_format)


def add_config_flags(parser: ArgumentParser, fields: Collection[str]) -> None:
    """Add the flags of some fields of `CAPConfig`, of its data set, and of the tokenizer."""
    for flag, field, kind, text in _CONFIG_FLAGS:
        if field in fields:
            options: dict[str, Any] = {"action": "store_true"}
            if kind is not None:
                options = {
                    "type": kind,
                    "required": field == "sparsity",
                    "metavar": flag.split("-")[-1].upper(),
                }
            parser.add_argument(flag, dest=field, default=SUPPRESS, help=text, **options)
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=SUPPRESS,
        help="data: preset, preset=path, Hub id or file; several mix evenly (default: gsm8k)",
    )
    parser.add_argument(
        "--tokenizer", help="Hub id or folder of the tokenizer (default: that of the model)"
    )


def load_tokenizer(args: Namespace) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that was named, or the model's."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        args.tokenizer or args.model,
        # A revision is one of the model's repository.
        revision=(None if args.tokenizer else args.revision) or "main",
        trust_remote_code=args.trust_remote_code,
        token=args.token,
    )
    return tokenizer


def config_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `CAPConfig` that were given on the command line."""
    fields = [field for _, field, _, _ in _CONFIG_FLAGS] + ["modules_to_leave_dense"]
    values = {field: given[field] for field in fields if field in given}
    if "dataset" in given:
        names = given["dataset"]
        values["dataset"] = names[0] if len(names) == 1 else names
    return values


def _file_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change per file, by its path inside `folder`."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _check_hub_access(repo: str, token: str | None) -> None:
    """Check that there is a valid token and that `repo` is a possible name."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.whoami()
    api.repo_exists(repo)


def _upload(folder: Path, names: list[str], repo: str, private: bool, token: str | None) -> str:
    from optimum_cap.checkpoint import upload

    try:
        return upload(folder, repo, names, private=private or None, token=token).repo_url
    except Exception as error:
        raise OSError(f"the model is saved in {folder}, but not uploaded: {error}") from error


def _print_how_to_load(name: str, checkpoint_format: str) -> None:
    plugin = (
        "import optimum_cap  # reads the packed format\n" if checkpoint_format == "packed" else ""
    )
    print(
        f"\nLoad it with\n\n{plugin}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})"
    )
