"""`optimum-cli cap push`: upload a saved checkpoint."""

import shlex
import sys
from pathlib import Path
from typing import Any

from optimum_cap.commands.base import CAPSubcommand, add_general_flags, check_hub_access
from optimum_cap.commands.parser import HUB, REQUIRED, CommandParser

_NOT_ON_THE_HUB = "none"


class PushCommand(CAPSubcommand):
    """Checks the folder, the base model and Hub access before uploading anything."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL REPO",
            "Upload a pruned checkpoint with its record, model card, results and tokenizer.",
            "pruned you/model-cap --base-model org/model",
            page="sharing",
        )
        parser.add_model("folder of a pruned checkpoint", "checkpoint")
        parser.group(REQUIRED)(
            "repo",
            metavar="REPO",
            help="repository on the Hub, which is created if it does not exist",
        )
        add = parser.group(HUB)
        add(
            "--base-model",
            metavar="ID",
            help="Hub id of the dense model, or none (default: that of the record, else asked for)",
        )
        add("--private", action="store_true", help="make a new repository private (default: False)")
        add("--revision", help="branch to upload to, created if it does not exist (default: main)")
        add("--create-pr", action="store_true", help="open a pull request (default: False)")
        add(
            "--commit-message",
            metavar="TEXT",
            help="message of the commit (default: Upload the pruned model (optimum-cap))",
        )
        add("--token", help="Hub access token (default: that of `hf auth login`)")
        add_general_flags(parser)

    def prepare(self) -> str | None:
        """Check folder and access, and determine the base model; return it if it is new."""
        from optimum_cap.checkpoint import inspect_checkpoint
        from optimum_cap.publishing import check_base_model

        args = self.args
        if not Path(args.checkpoint).is_dir():
            raise ValueError(f"{args.checkpoint} is no folder: name that of a pruned checkpoint")
        record = inspect_checkpoint(args.checkpoint).record
        base_model = args.base_model
        known = record.base_model is not None and not record.base_model.startswith(".")
        if base_model is None and not known:
            base_model = _ask(args.checkpoint, record.base_model)
        check_hub_access(args.repo, args.token)
        if base_model in (None, _NOT_ON_THE_HUB):
            return None
        check_base_model(base_model, args.token)
        return str(base_model)

    def execute(self, prepared: str | None) -> dict[str, Any]:
        """Upload."""
        from optimum_cap.publishing import load_results, push_checkpoint

        args = self.args
        commit = push_checkpoint(
            args.checkpoint,
            args.repo,
            base_model=prepared,
            token=args.token,
            private=args.private or None,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
        )
        url = str(commit.pr_url if args.create_pr else commit.repo_url)
        self.say(f"uploaded      {url}")
        if not load_results(args.checkpoint):
            self.say(
                "The model card has no results. To add some, run\n"
                f"  optimum-cli cap compare DENSE {shlex.quote(args.checkpoint)} --add-to-card\n"
                "and push again."
            )
        return {"saved": url, "commit": commit.oid}


def _ask(checkpoint: str, local_name: str | None) -> str:
    """Ask for the base model in a terminal.

    Raises:
        ValueError: There is no terminal to ask in.
    """
    what = f"the record of {checkpoint} does not say which model on the Hub was pruned"
    if local_name:
        what += f" (only that its folder was {local_name})"
    if not sys.stdin.isatty():
        raise ValueError(
            f"{what}: pass --base-model ID, or --base-model {_NOT_ON_THE_HUB} if it is not on the "
            "Hub"
        )
    # Not on stdout, which is reserved for the result.
    print(f"{what[0].upper()}{what[1:]}.", file=sys.stderr)
    question = "Hub id of the base model (empty if it is not on the Hub): "
    print(question, end="", file=sys.stderr, flush=True)
    answer = input().strip()
    return answer or _NOT_ON_THE_HUB
