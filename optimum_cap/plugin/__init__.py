"""The plugin for transformers: the quantization method and the keyword `pruning_config`."""
