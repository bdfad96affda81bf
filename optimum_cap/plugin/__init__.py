"""Integration with transformers: the quantization method `"cap"` and `pruning_config`."""
