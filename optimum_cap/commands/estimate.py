"""`optimum-cli cap estimate`: the cost of a model or a study, before anything runs."""

from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import CAPSubcommand, add_general_flags, add_hub_flags
from optimum_cap.commands.config_flags import dataset_value
from optimum_cap.commands.parser import DATA, CommandParser
from optimum_cap.commands.study import labelled_models

if TYPE_CHECKING:
    from optimum_cap.estimation import Estimate, StudyHours

_STUDY = (".yaml", ".yml")
# Flags that apply to a model, not to a study, and their defaults.
_MODEL_FLAGS: dict[str, Any] = {
    "num_samples": 128,
    "scored": None,
    "prefix": None,
    "dataset": None,
    "tokenizer": None,
    "sparsity": 0.5,
    "pattern": "unstructured",
    "units": "heads",
    "mlp_unit_size": None,
    "limit": None,
    "batch_size": 32,
    "num_fewshot": 0,
    "max_new_tokens": 512,
}
# Flags that also apply where parts are removed.
_PART_FLAGS = ("num_samples", "scored", "dataset", "tokenizer", "sparsity", "pattern")


class EstimateCommand(CAPSubcommand):
    """Builds the model on the meta device, which takes about a second for any size."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL",
            "Estimate the operations, time, memory and disk space that scoring, pruning and "
            "evaluating a model take, from its configuration alone; or the device hours of a "
            "study.",
            "org/model --hardware h100",
            "config.json --pattern channels --sparsity 0.2",
            "study.yaml",
            page="estimate",
        )
        parser.add_model("folder, Hub id or configuration file of a model, or a STUDY.yaml")
        add = parser.group("hardware")
        add(
            "--hardware",
            default="measured",
            metavar="NAME",
            help="h100, h200, a100-80gb, a100-40gb, l40s or rtx4090, also h100x8; or measured: "
            "this machine (default: measured)",
        )
        add = parser.group(DATA)
        add("--num-samples", type=int, metavar="N", help="calibration examples (default: 128)")
        add(
            "--tokens", type=int, default=256, metavar="N", help="tokens per example (default: 256)"
        )
        add(
            "--scored",
            type=int,
            metavar="N",
            help="scored tokens per example (default: half of the tokens after the prefix)",
        )
        add(
            "--prefix",
            type=int,
            metavar="N",
            help="tokens at the start that all examples share (default: 0, or that of --dataset)",
        )
        add(
            "--dataset",
            nargs="+",
            help="calibration data as for prune; sets --tokens, --scored and the default of "
            "--prefix from its lengths (default: none)",
        )
        add("--tokenizer", help="Hub id or folder of the tokenizer (default: the model's)")
        add = parser.group("pruning")
        add(
            "--sparsity",
            type=float,
            help="sparsity of the checkpoint, or the fraction of the parts that --pattern removes "
            "(default: 0.5)",
        )
        add(
            "--pattern",
            help="experts, heads, channels, layers or structured: parts to remove; or unstructured "
            "(default: unstructured)",
        )
        add(
            "--units",
            help="units to score: heads, or all (heads, MLPs and experts) (default: heads)",
        )
        add(
            "--mlp-unit-size",
            type=int,
            metavar="N",
            help="channels per MLP or expert unit (default: all channels)",
        )
        add = parser.group("evaluation")
        add("--limit", type=int, metavar="N", help="questions per task (default: all)")
        add("--batch-size", type=int, metavar="N", help="questions per batch (default: 32)")
        add(
            "--num-fewshot",
            type=int,
            metavar="N",
            help="worked examples in the prompts of the evaluation (default: 0)",
        )
        add(
            "--max-new-tokens",
            type=int,
            metavar="N",
            help="longest of the model's own answers for calibration (default: 512)",
        )
        parser.group("study")(
            "--models",
            nargs="+",
            metavar="LABEL=NAME",
            help="models of a study, instead of those in its file (default: those in the file)",
        )
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> "Estimate | StudyHours":
        """Check the flags and compute the estimate, which needs no model weights."""
        args = self.args
        from optimum_cap.estimation import estimate, study_hours
        from optimum_cap.study import Study

        options = {"revision": args.revision or "main", "token": args.token}
        if args.model.endswith(_STUDY):
            for name in _MODEL_FLAGS:
                if getattr(args, name) is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(
                        f"{flag} applies to a model, but {args.model} is a study: leave it out"
                    )
            models = labelled_models(args.models or [])
            study = Study.load(args.model, **({"models": models} if models else {}))
            return study_hours(study, args.hardware, tokens=args.tokens, **options)
        if args.models:
            raise ValueError(
                f"--models applies to a study, but {args.model} is not a STUDY.yaml: leave it out"
            )
        if args.pattern not in (None, "unstructured"):
            for name in _MODEL_FLAGS:
                if name not in _PART_FLAGS and getattr(args, name) is not None:
                    raise ValueError(
                        f"--{name.replace('_', '-')} has no effect with --pattern "
                        f"{args.pattern}: leave it out"
                    )
        for name, default in _MODEL_FLAGS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        return estimate(
            args.model,
            args.hardware,
            examples=args.num_samples,
            sparsity=args.sparsity,
            limit=args.limit,
            batch_size=args.batch_size,
            scored_units=args.units,
            mlp_unit_size=args.mlp_unit_size,
            num_fewshot=args.num_fewshot,
            max_new_tokens=args.max_new_tokens,
            pattern=args.pattern,
            **self._lengths(),
            **options,
        )

    def execute(self, prepared: "Estimate | StudyHours") -> dict[str, Any]:
        """Show the estimate."""
        self.answer(prepared.table())
        return prepared.to_dict()

    def _lengths(self) -> dict[str, Any]:
        """Return tokens, scored tokens and shared prefix, from the flags or from the data."""
        args = self.args
        prefix = {} if args.prefix is None else {"prefix": args.prefix}
        if not args.dataset:
            return {"tokens": args.tokens, "scored": args.scored, **prefix}
        from optimum_cap.config import CAPConfig
        from optimum_cap.data import load_tokenizer
        from optimum_cap.estimation import lengths_of

        tokenizer = load_tokenizer(
            args.tokenizer or args.model,
            revision=(None if args.tokenizer else args.revision) or "main",
            token=args.token,
        )
        config = CAPConfig(
            sparsity=args.sparsity,
            dataset=[dataset_value(name) for name in args.dataset],
            num_samples=args.num_samples,
        )
        return {**lengths_of(config, tokenizer), **prefix}
