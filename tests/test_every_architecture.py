"""Decoder-only classes of the installed transformers, on small models, each in a process.

All families and every sixth of the other classes; `python -m helpers.architecture_table` in the
folder `tests` tries all of them.
"""

import pytest
from helpers.architecture_checks import support_in_process
from helpers.every_architecture import all_kinds

# One of each family, by its model type; all that CAP does must work for them. Of Zamba, the block
# that several layers share stays dense.
FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "stablelm", "nemotron", "cohere2"),
    *("falcon", "bloom", "mpt", "gptj", "gpt_bigcode", "gpt_neo", "gpt2", "gpt_neox", "opt"),
    *("mixtral", "qwen3_moe", "phimoe", "granitemoe", "glm4_moe", "gpt_oss", "llama4_text"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid", "nemotron_h"),
    *("lfm2", "falcon_h1", "jamba", "bamba", "zamba2", "kimi_linear"),
    *("mamba", "mamba2", "rwkv", "recurrent_gemma", "hunyuan_v1_dense", "hunyuan_v1_moe"),
)
IN_DEFAULT_RUN = ("gpt_oss", "nemotron_h")


def cases() -> list[object]:
    others = [kind for kind in all_kinds() if kind not in FAMILIES]
    return [
        kind if kind in IN_DEFAULT_RUN else pytest.param(kind, marks=pytest.mark.slow)
        for kind in all_kinds()
        if kind in FAMILIES or kind in others[::6]
    ]


@pytest.mark.parametrize("kind", cases())
def test_a_class_is_supported_or_refused_in_a_sentence(kind: str) -> None:
    found = support_in_process(kind)
    assert not found.problem, found.problem
    if kind in FAMILIES:
        assert (found.refused, found.part, found.not_built) == ("", "", "")
        assert found.dense[0] < 0.05, found.dense
