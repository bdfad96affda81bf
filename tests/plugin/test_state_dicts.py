"""accelerate loads packed and coded files into an empty model."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from helpers.checkpoints import pruned
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.mark.parametrize("checkpoint_format", ["packed", "coded", "dense"])
@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"model": "cpu", "lm_head": "disk"}])
@pytest.mark.parametrize("shards", ["5GB", pytest.param("20KB", marks=pytest.mark.slow)])
def test_load_checkpoint_and_dispatch(
    checkpoint_format: str, device_map: dict[str, str], shards: str, tmp_path: Path
) -> None:
    model = pruned(checkpoint_format=checkpoint_format)
    model.save_pretrained(tmp_path / "pruned", max_shard_size=shards)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "pruned"))
    loaded = load_checkpoint_and_dispatch(
        empty, tmp_path / "pruned", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
