"""`optimum-cli cap compact`: remove what an earlier run has zeroed."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_common_flags,
    add_trust_remote_code,
    auto_class_name,
    check_output_folder,
    check_prunable,
)
from optimum_cap.text import aligned

if TYPE_CHECKING:
    from optimum_cap.pruning import CompactedParts, Compaction


class CompactCommand(CAPSubcommand):
    """Writes a smaller model that computes the same, without the parts that are all zeros."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Remove channels of MLPs, key/value heads and layers that are all zeros. The result is "
            "an ordinary smaller model that computes the same."
        )
        parser.add_argument("model", help="folder or Hub id of a model, pruned by any tool")
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="DIR", help="new folder to write"
        )
        add_trust_remote_code(parser)
        add_common_flags(parser)

    def prepare(self) -> str:
        """Check the output folder and the configuration; return the Auto class of the model."""
        args = self.args
        check_output_folder(args.output, args.model)
        config = check_prunable(args.model, args, may_be_pruned=True)
        return auto_class_name(config, args.model, args.trust_remote_code)

    def execute(self, prepared: str) -> None:
        """Compact, save, and print what was found and removed."""
        import transformers

        from optimum_cap.checkpoint import folder_of_model, save_smaller
        from optimum_cap.pruning import compact

        args = self.args
        folder = folder_of_model(args.model, revision=args.revision, token=args.token)
        model = getattr(transformers, prepared).from_pretrained(
            folder, dtype="auto", trust_remote_code=args.trust_remote_code
        )
        compaction = compact(model)
        save_smaller(compaction.model, args.output, folder)
        _print_summary(compaction)
        print(f"saved         {args.output}")


def _print_summary(compaction: "Compaction") -> None:
    """Print a table of the parts, why others stay, and the numbers of parameters."""
    rows = [["parts", "before", "all zeros", "removed"]]
    rows += [
        [_name(each), f"{each.before:,}" if each.before else "-", _zeros(each), f"{each.removed:,}"]
        for each in compaction.parts
    ]
    print(aligned(rows))
    print()
    for each in compaction.parts:
        if each.reason:
            print(f"{_name(each)} {'stay' if not each.removed else 'that are left'}: {each.reason}")
    if compaction.silent_experts:
        print(
            f"experts stay: {compaction.silent_experts:,} of them return zeros, but tokens are "
            "routed to them, which without them would go to others"
        )
    before, after = (
        compaction.parts[0].parameters_before,
        compaction.parts[-1].parameters_after,
    )
    print(f"parameters    {before:,} -> {after:,} ({after / before:.1%})")
    print(f"logits        differ by {compaction.difference:.1g} of their size at most")


def _name(parts: "CompactedParts") -> str:
    return {"channels": f"channels of {parts.of}", "heads": "key/value heads"}.get(
        parts.part, parts.part
    )


def _zeros(parts: "CompactedParts") -> str:
    least, most = parts.dead
    if not parts.before:  # it was not looked for them
        return "-"
    if parts.part == "layers":
        return f"{most:,}"
    return (f"{least:,}" if least == most else f"{least:,} to {most:,}") + " in each layer"
