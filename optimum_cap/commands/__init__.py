"""The subcommands of `optimum-cli cap`, one file each.

`optimum-cli` imports this package at every start, so torch and transformers are imported only when
a command runs.
"""
