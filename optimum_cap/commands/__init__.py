"""The commands `optimum-cli cap prune`, `inspect`, `convert`, `eval`, `compare`, `estimate` and
`study`.

`optimum-cli` imports this package at every start, so torch and transformers are imported only when
a command runs.
"""
