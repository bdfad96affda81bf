"""Found by `optimum-cli` at every start: nothing imported here may import torch or transformers."""

from optimum_cap.commands.cap import CAPCommand

REGISTER_COMMANDS = [CAPCommand]
