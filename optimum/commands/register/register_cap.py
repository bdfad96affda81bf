"""Imported by `optimum-cli` at every start, so it must not import torch or transformers."""

from optimum_cap.commands.cap import CAPCommand

REGISTER_COMMANDS = [CAPCommand]
