"""Classifiers and reward models: decoders of causal language models with another head."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers.tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint import inspect_checkpoint
from optimum_cap.data.calibration import build_calibration_set
from optimum_cap.evaluation import evaluate
from optimum_cap.models.architectures import find_sites
from optimum_cap.pruning import run as pruning_run

pytestmark = pytest.mark.slow  # whole prunings of many architectures

TEXTS = [f"{a}+{b} is {a + b}" for a in range(9) for b in range(9)]
TOKENS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(1))
SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
MOST = ("llama", "gemma2", "gemma3", "gpt2", "gpt_neox", "mixtral", "opt", "phi3", "qwen3_moe")

NO_DATA = ({"recipe": "magnitude_global"}, {"recipe": "magnitude", "pattern": "heads"})
ON_DATA = (
    {"recipe": "wanda"},
    {"recipe": "wanda", "pattern": "2:4"},
    {"recipe": "owl_sparsegpt"},
    {"criterion": "alps", "refine": 1},
    {"criterion": "alps", "target": "dense", "order": "projection"},
    {"recipe": "causal", "pattern": "2:4", "refine": 1},  # the pattern leaves no sensitivities
)
EVERY = [*NO_DATA, *ON_DATA]


def settings(**fields: Any) -> CAPConfig:
    on_data = fields.get("recipe") not in ("magnitude", "magnitude_global")
    data = {"dataset": TEXTS, "num_samples": 10} if on_data else {}
    return CAPConfig(**{"sparsity": 0.5, **data, **fields})


def pruned(model: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    return CAPPruner(settings(**fields)).prune(model, tiny_tokenizer())


def same_tensors(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    tensors, others = model.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_a_classifier_gets_the_weights_of_the_language_model(fields: dict[str, Any]) -> None:
    """The language model is calibrated on the same texts, all of whose tokens are scored."""
    expected = pruned(tiny_model("llama"), **fields)
    dense = tiny_classifier("llama")
    model = pruned(copy.deepcopy(dense), **fields)
    assert same_tensors(model.base_model, expected.base_model)
    assert torch.equal(model.score.weight, dense.score.weight)
    assert model.pruning_record.matrices == expected.pruning_record.matrices
    assert model.pruning_record.dense == expected.pruning_record.dense


@pytest.mark.parametrize("architecture", MOST)
@pytest.mark.parametrize("fields", [ON_DATA[0], ON_DATA[3]], ids=str)
def test_each_architecture(architecture: str, fields: dict[str, Any]) -> None:
    expected = pruned(tiny_model(architecture), **fields)
    model = pruned(tiny_classifier(architecture), **fields)
    assert same_tensors(model.base_model, expected.base_model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_a_model_needs_no_padding_token(architecture: str, head: str) -> None:
    """Without one, transformers' classifiers refuse batches of several texts."""
    expected = pruned(tiny_model(architecture), recipe="sparsegpt")
    dense = tiny_classifier(architecture, head)
    dense.config.pad_token_id = None
    if head == SEQUENCE:
        with pytest.raises(ValueError, match="batch sizes > 1"):
            dense(TOKENS)
    model = pruned(dense, recipe="sparsegpt")
    assert same_tensors(model.base_model, expected.base_model)


def test_offloaded_weights() -> None:
    expected = pruned(tiny_classifier("llama"), recipe="wanda")
    model = pruned(cpu_offload(tiny_classifier("llama")), recipe="wanda")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert model.pruning_record.matrices == expected.pruning_record.matrices


OF_THE_DEFAULT = (
    "LlamaForSequenceClassification has no LM head, so it predicts no tokens, but recipe 'causal' "
    "with allocation 'fisher' measures predictions of tokens: choose criterion 'alps' with refine "
    "3, the nearest to recipe 'causal', or recipe 'magnitude', 'magnitude_global', 'random', "
    "'wanda', 'sparsegpt', 'owl_wanda' or 'owl_sparsegpt'"
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, f"^{re.escape(OF_THE_DEFAULT)}$"),
        ({"recipe": "paper"}, r"but recipe 'paper' with criterion 'causal_score' measures pred"),
        ({"criterion": "causal_score"}, "but criterion 'causal_score' measures predictions"),
        ({"recipe": "wanda", "allocation": "interventional"}, "but allocation 'interventional' m"),
        (
            {"recipe": "paper", "pattern": "heads"},
            "choose criterion 'magnitude', 'random', 'wanda' or 'least_squares'$",
        ),
        ({"pattern": "layers"}, "choose criterion 'random' or 'block_influence'$"),
        ({"recipe": "wanda", "answers": "model"}, "cannot answer prompts: use answers 'dataset'"),
    ],
    ids=str,
)
def test_what_measures_predictions_is_refused_before_work_begins(
    fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_run, "check_first_batch", lambda *a: pytest.fail("ran the model"))
    model = tiny_classifier("llama")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        pruned(model, **fields)
    assert same_tensors(model, before)
    assert not hasattr(model, "pruning_record")


ADVISED = {
    "unstructured": "magnitude magnitude_global random wanda sparsegpt owl_wanda owl_sparsegpt",
    "2:4": "causal causal_fast magnitude magnitude_global random wanda sparsegpt",
}
# Where parts are removed, criteria are advised.
ADVISED_CRITERIA = {
    "heads": ("paper", "magnitude random wanda least_squares"),
    "layers": ("causal", "random block_influence"),
}


@pytest.mark.parametrize("pattern", ADVISED)
def test_what_the_refusal_advises_works(pattern: str) -> None:
    with pytest.raises(ValueError, match="has no LM head") as refused:
        pruned(tiny_classifier("llama"), recipe="paper", pattern=pattern)
    advice = str(refused.value).rpartition("recipe ")[2]
    recipes = re.findall("'([^']+)'", advice)
    assert recipes == ADVISED[pattern].split()
    for recipe in recipes:
        data = {} if recipe in ("magnitude", "magnitude_global", "random") else {"dataset": TEXTS}
        data |= {"num_samples": 4} if data else {}
        config = CAPConfig(0.5, pattern=pattern, recipe=recipe, **data)
        model = CAPPruner(config).prune(tiny_classifier("llama"), tiny_tokenizer())
        assert model.pruning_record.zeros > 0


@pytest.mark.parametrize("pattern", ADVISED_CRITERIA)
def test_criteria_that_the_refusal_advises_work(pattern: str) -> None:
    recipe, expected = ADVISED_CRITERIA[pattern]
    with pytest.raises(ValueError, match="has no LM head") as refused:
        pruned(tiny_classifier("llama"), recipe=recipe, pattern=pattern)
    criteria = re.findall("'([^']+)'", str(refused.value).rpartition("choose criterion ")[2])
    assert criteria == expected.split()
    for criterion in criteria:
        data = {} if criterion in ("magnitude", "random") else {"dataset": TEXTS, "num_samples": 4}
        config = CAPConfig(0.5, pattern=pattern, criterion=criterion, **data)
        model = tiny_classifier("llama")
        before = model.num_parameters()
        CAPPruner(config).prune(model, tiny_tokenizer())
        assert model.num_parameters() < before


def test_no_losses_and_no_accuracy() -> None:
    model = tiny_classifier("llama")
    with pytest.raises(ValueError, match="has no LM head, so its units have no losses"):
        CAPPruner(settings(recipe="paper")).measure(model, tiny_tokenizer())
    with pytest.raises(ValueError, match="has no LM head, so it predicts no tokens to evaluate"):
        evaluate(model, data={}, tokenizer=tiny_tokenizer())


def test_rows_need_no_token_to_score() -> None:
    """Every token counts in the inputs of a matrix, so a prompt without an answer is enough."""
    prompts = [[{"role": "user", "content": text}] for text in TEXTS]
    fields = {"recipe": "wanda", "dataset": prompts}
    model = pruned(tiny_classifier("llama"), **fields)
    record = model.pruning_record
    examples = build_calibration_set(settings(**fields), tiny_tokenizer(), unscored=True).examples
    assert not any(example.scored.any() for example in examples)
    tokens = sum(len(example.input_ids) for example in examples)
    assert {matrix.tokens for matrix in record.matrices} == {tokens}
    with pytest.raises(ValueError, match="0 usable rows of 81 \\(81 have no token to score\\)"):
        pruned(tiny_model("llama"), **fields)
    with pytest.raises(ValueError, match="0 usable rows of 9 \\(9 are empty\\)"):
        pruned(tiny_classifier("llama"), recipe="wanda", dataset=[" "] * 9, num_samples=9)


def test_a_classifier_that_looks_ahead_is_refused() -> None:
    """A batch has padding on the right, which only causal attention leaves out."""
    model = tiny_classifier("gemma3", use_bidirectional_attention=True)
    before = copy.deepcopy(model)
    message = "the tokens of Gemma3TextForSequenceClassification depend on later ones, but CAP"
    with pytest.raises(ValueError, match=message):
        pruned(model, recipe="wanda")
    assert same_tensors(model, before)
    assert pruned(model, recipe="magnitude").pruning_record.zeros > 0


def test_xlnet_looks_ahead() -> None:
    """Its layers take tokens before rows, and its config says -1 where there is no limit."""
    config = XLNetConfig(vocab_size=64, d_model=24, n_layer=2, n_head=4, d_inner=20, num_labels=3)
    model = XLNetForSequenceClassification(config)
    with pytest.raises(ValueError, match="the tokens of XLNetForSequenceClassification depend on"):
        pruned(model, recipe="wanda")
    assert pruned(model, recipe="magnitude").pruning_record.zeros > 0


def test_values_that_are_not_finite_are_found() -> None:
    model = tiny_classifier("llama")
    model.base_model.norm.weight.data.fill_(1e38)
    model.base_model.norm.weight.data[:2] = 3e38
    with pytest.raises(ValueError, match="the last norm returns NaN or infinite values on row"):
        pruned(model, recipe="wanda")


def test_a_classifier_of_an_encoder_is_refused() -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    message = "BertForSequenceClassification is not a decoder-only .*, nor a classifier made of one"
    with pytest.raises(ValueError, match=message):
        find_sites(BertForSequenceClassification(config))


@pytest.mark.parametrize(
    ("head", "auto_class", "task"),
    [
        (SEQUENCE, AutoModelForSequenceClassification, "text-classification"),
        (TOKEN, AutoModelForTokenClassification, "token-classification"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_from_pretrained_saves_and_loads(
    architecture: str, head: str, auto_class: Any, task: str, tmp_path: Path
) -> None:
    dense = tiny_classifier(architecture, head)
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    expected = pruned(dense, recipe="sparsegpt", pattern="2:4", dataset=TEXTS, num_samples=10)
    config = settings(recipe="sparsegpt", pattern="2:4")
    model = auto_class.from_pretrained(tmp_path / "dense", pruning_config=config).eval()
    assert same_tensors(model, expected)
    model.save_pretrained(tmp_path / "pruned")

    loaded = auto_class.from_pretrained(tmp_path / "pruned").eval()
    assert type(loaded) is type(dense)
    assert same_tensors(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.pruning_record == model.pruning_record
    summary = inspect_checkpoint(str(tmp_path / "pruned"), verify=True)
    assert summary.record.sparsity == pytest.approx(0.5)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    assert f"model = {auto_class.__name__}.from_pretrained" in card
    assert "AutoModelForCausalLM" not in card
    assert "routers, classification head |" in card


def test_from_pretrained_refuses_before_weights_are_loaded(tmp_path: Path) -> None:
    tiny_classifier("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    for fields in ({}, {"recipe": "paper"}, {"recipe": "wanda", "answers": "model"}):
        config = settings(**fields)
        with pytest.raises(ValueError, match=r"^LlamaForSequenceClassification has no LM head, so"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, pruning_config=config)
        message = (
            "is a LlamaForSequenceClassification, so LlamaForCausalLM has an LM head of random "
            "weights, .*: load it with AutoModelForSequenceClassification$"
        )
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, pruning_config=config)


def test_a_decoder_may_get_another_head(tmp_path: Path) -> None:
    """What needs no predictions prunes the decoder, whatever head it is loaded with."""
    tiny_classifier("llama").save_pretrained(tmp_path / "classifier")
    tiny_model("llama").save_pretrained(tmp_path / "language_model")
    pairs = [
        (AutoModelForCausalLM, "classifier"),
        (AutoModelForSequenceClassification, "language_model"),
    ]
    expected = pruned(tiny_model("llama"), recipe="magnitude_global")
    for auto_class, name in pairs:
        config = settings(recipe="magnitude_global")
        model = auto_class.from_pretrained(tmp_path / name, pruning_config=config)
        assert same_tensors(model.base_model, expected.base_model)
