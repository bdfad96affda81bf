"""Tiny random models of every supported architecture, and a tokenizer to go with them."""

from collections.abc import Callable

import pytest
import torch
import transformers
from accelerate import dispatch_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 64

# Small, but with the features that break careless code: grouped-query attention, a head size that
# is not hidden_size / heads, sliding windows shorter than the tests' sequences, an intermediate
# size that is no multiple of 8.
_GQA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Larger than the usual 0.02, so that masking a head moves the loss by more than rounding does.
    "initializer_range": 0.2,
}
_GEMMA = {
    **_GQA,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Inputs of their own for each layer; the last two layers read keys and values of the first two.
_PER_LAYER = {
    **_GQA,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
}
MOE = {**_GQA, "num_experts_per_tok": 2, "output_router_logits": False}

CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {**_GQA, "head_dim": 8}),
    "mistral": ("Mistral", {**_GQA, "sliding_window": 8}),
    "qwen2": ("Qwen2", _GQA),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 8}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA),
    "gemma3n": (
        "Gemma3n",
        {
            **_PER_LAYER,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        },
    ),
    "gemma4": ("Gemma4", {**_PER_LAYER, "global_head_dim": 12}),
    "phi3": ("Phi3", {**_GQA, "tie_word_embeddings": False}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 24,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 20,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.2,
        },
    ),
    "gpt_neox": ("GPTNeoX", {**_GQA, "num_key_value_heads": None}),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "ffn_dim": 20,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "init_std": 0.2,
        },
    ),
    "mixtral": ("Mixtral", {**MOE, "num_local_experts": 4, "sliding_window": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **MOE,
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("Olmoe", {**MOE, "num_experts": 4}),
}
ARCHITECTURES = sorted(CONFIGS)

# What the default run takes of them: one for each property that code most often has to treat in its
# own way. The others run with `-m slow` and `-m exhaustive`: gpt_neox (attention and MLP side by
# side), mixtral (experts in every layer), opt (an MLP that is no module), gemma3n (several hidden
# states per token), phi3 (fused projections), and those that repeat a property: gemma2, gemma3 and
# mistral (norms and windows of gemma4), qwen2 (biases of gpt2), qwen3 and olmoe (norms of
# qwen3_moe).
SAMPLE = (
    "llama",  # queries in groups, a head size of its own, a gated MLP
    "gemma4",  # inputs per layer, keys and values shared by layers, head sizes by layer, windows
    "gpt2",  # transposed weights (Conv1D), queries, keys and values fused, biases, no gate
    "qwen3_moe",  # experts in some layers, an MLP in others, norms of queries and keys
)
SAMPLED = [
    name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES
]

# Experts beside an MLP that every token passes: a site of its own, or one that nothing prunes.
SHARED_EXPERTS: dict[str, tuple[str, dict]] = {
    "glm4_moe": (
        "Glm4Moe",
        {
            **MOE,
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **MOE,
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
}


def tiny_model(
    architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """Build a random causal language model of `architecture`; `changes` override its config."""
    head = "LMHeadModel" if architecture == "gpt2" else "ForCausalLM"
    return _tiny(architecture, head, seed, **changes).to(dtype).eval()


def tiny_classifier(
    architecture: str, head: str = "ForSequenceClassification", **changes: object
) -> PreTrainedModel:
    """Build a random classifier whose decoder is that of `tiny_model`."""
    model = _tiny(architecture, head, num_labels=3, **changes).eval()
    language_model = tiny_model(architecture, **changes)
    model.base_model.load_state_dict(language_model.base_model.state_dict())
    return model


def _tiny(architecture: str, head: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    name, settings = {**CONFIGS, **SHARED_EXPERTS}[architecture]
    # Gemma models that also see images have a config for the text alone.
    of_text = f"{name}TextConfig"
    config_class = getattr(transformers, of_text, None) or getattr(transformers, f"{name}Config")
    settings = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    classes = (getattr(transformers, f"{name}{text}{head}", None) for text in ("", "Text"))
    torch.manual_seed(seed)
    model: PreTrainedModel = next(
        each for each in classes if each is not None and issubclass(config_class, each.config_class)
    )(config_class(**settings))
    # Biases start at zero, norms at one: random ones let no code get away with ignoring them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def spread_out(model: PreTrainedModel) -> PreTrainedModel:
    """Let the modules of a model move their inputs, as on several devices."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    children = [f"{prefix}.{name}" for name, _ in decoder.named_children()]
    others = [name for name, _ in model.named_children() if name != prefix]
    return dispatch_model(model, dict.fromkeys([*children, *others], "cpu"), force_hooks=True)


def tiny_tokenizer(
    chat_template: str | None = None, edit: Callable[[dict], None] | None = None
) -> PreTrainedTokenizerFast:
    """A character-level tokenizer of `VOCABULARY` tokens; `edit` may change its special tokens."""
    characters = "\n !\"#$%&'()*+,-./0123456789:;<=>?abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for character in characters:
        vocabulary.setdefault(character, len(vocabulary))
    vocabulary = {token: index for token, index in vocabulary.items() if index < VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if edit is not None:
        edit(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
    fast.chat_template = chat_template
    return fast
