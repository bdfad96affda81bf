"""`optimum-cli cap compact`: remove what an earlier run has zeroed."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_general_flags,
    add_hub_flags,
    add_trust_remote_code,
    auto_class_name,
    check_output_folder,
    check_prunable,
)
from optimum_cap.commands.parser import REQUIRED, CommandParser
from optimum_cap.text import aligned

if TYPE_CHECKING:
    from optimum_cap.pruning import CompactedParts, Compaction


class CompactCommand(CAPSubcommand):
    """Writes a smaller model that computes the same, without the parts that are all zeros."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL -o DIR",
            "Remove channels of MLPs, key/value heads and layers that are all zeros. The result is "
            "an ordinary smaller model that computes the same.",
            "pruned -o smaller",
            page="smaller_models",
        )
        parser.add_model("folder or Hub id of a model, pruned by any tool")
        parser.group(REQUIRED)(
            "-o", "--output", required=True, type=Path, metavar="DIR", help="new folder to write"
        )
        add_trust_remote_code(parser)
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> str:
        """Check the output folder and the configuration; return the Auto class of the model."""
        args = self.args
        check_output_folder(args.output, args.model)
        config = check_prunable(args.model, args, may_be_pruned=True)
        return auto_class_name(config, args.model, args.trust_remote_code)

    def execute(self, prepared: str) -> dict[str, Any]:
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
        self.say(_summary(compaction))
        self.say(f"saved         {args.output}")
        return {
            "saved": str(args.output),
            "parts": [dataclasses.asdict(each) for each in compaction.parts],
            "silent_experts": compaction.silent_experts,
            "difference": compaction.difference,
        }


def _summary(compaction: "Compaction") -> str:
    """Return a table of the parts, why others stay, and the numbers of parameters."""
    rows = [["parts", "before", "all zeros", "removed"]]
    rows += [
        [_name(each), f"{each.before:,}" if each.before else "-", _zeros(each), f"{each.removed:,}"]
        for each in compaction.parts
    ]
    lines = [aligned(rows), ""]
    for each in compaction.parts:
        if each.reason:
            which = "stay" if not each.removed else "that are left"
            lines.append(f"{_name(each)} {which}: {each.reason}")
    if compaction.silent_experts:
        lines.append(
            f"experts stay: {compaction.silent_experts:,} of them return zeros, but tokens are "
            "routed to them, which without them would go to others"
        )
    before, after = (
        compaction.parts[0].parameters_before,
        compaction.parts[-1].parameters_after,
    )
    lines += [
        f"parameters    {before:,} -> {after:,} ({after / before:.1%})",
        f"logits        differ by {compaction.difference:.1g} of their size at most",
    ]
    return "\n".join(lines)


def _name(parts: "CompactedParts") -> str:
    return {"channels": f"channels of {parts.of}", "heads": "key/value heads"}.get(
        parts.part, parts.part
    )


def _zeros(parts: "CompactedParts") -> str:
    least, most = parts.dead
    if not parts.before:  # there was no search for them
        return "-"
    if parts.part == "layers":
        return f"{most:,}"
    return (f"{least:,}" if least == most else f"{least:,} to {most:,}") + " in each layer"
