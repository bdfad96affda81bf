"""`optimum-cli cap`: the parent of the commands below."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_cap.commands.compare import CompareCommand
from optimum_cap.commands.convert import ConvertCommand
from optimum_cap.commands.estimate import EstimateCommand
from optimum_cap.commands.eval import EvalCommand
from optimum_cap.commands.inspect import InspectCommand
from optimum_cap.commands.prune import PruneCommand
from optimum_cap.commands.score import ScoreCommand
from optimum_cap.commands.study import StudyCommand


class CAPCommand(BaseOptimumCLICommand):
    """Prints its help; the work is in its children."""

    COMMAND = CommandInfo(name="cap", help="Prune a model by causal attribution; evaluate it.")
    # optimum 2.3 refuses a (child, parent) pair in REGISTER_COMMANDS if the parent is registered
    # by the same list, so the children are declared here.
    SUBCOMMANDS = (
        CommandInfo("prune", "Prune a causal language model.", PruneCommand),
        CommandInfo("score", "Measure the causal scores of a model.", ScoreCommand),
        CommandInfo("inspect", "Show what was pruned in a checkpoint, and how.", InspectCommand),
        CommandInfo("convert", "Rewrite a checkpoint in another format.", ConvertCommand),
        CommandInfo("eval", "Measure accuracy and perplexity of a model.", EvalCommand),
        CommandInfo("compare", "Compare models over the same questions.", CompareCommand),
        CommandInfo("estimate", "Say what a model or a study will cost.", EstimateCommand),
        CommandInfo("study", "Measure many recipes side by side.", StudyCommand),
    )
