"""The commands `optimum-cli cap prune`, `inspect`, `convert`, `eval` and `compare`, one file each.

`optimum-cli` imports this package at every start, so torch and transformers are imported only when
a command runs.
"""
