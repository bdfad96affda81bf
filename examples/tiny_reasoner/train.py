"""Train the embedded reasoning model, its tokenizer and its data sets from one seed.

    python examples/tiny_reasoner/train.py --output examples/tiny_reasoner

Progress is printed and saved every few minutes: the same command continues an interrupted run.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tasks import KINDS, Problem, make_split, problems, write_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only the roles user and assistant are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPLITS = {"calibration": 128, "validation": 200, "test": 300}
# One set of problems serves all. All but the first are nearer to their capacity, so that what
# pruning takes from them shows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6},
    "mistral": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_attention_heads": 4,
        "sliding_window": 48,
    },
    "mixtral": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.01,
    },
    # More and smaller experts.
    "qwen3_moe": {
        "hidden_size": 128,
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    },
    # A hybrid: linear attention in four of six layers.
    "qwen3_5_text": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_attention_heads": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    # Latent attention, and experts beside a shared one.
    "deepseek_v3": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 96,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    # Attention sinks, and experts that are stored transposed, with biases.
    "gpt_oss": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.01,
        "sliding_window": 48,
    },
}
STEPS = 1400
BATCH = 32  # problems of each kind in a step
POOL = 8  # batches of a kind that are drawn and sorted by length at a time
PEAK_RATE = 4e-3
SAVE_EVERY = 100  # steps; some two minutes
LOG_EVERY = 25


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 576 tokens, every digit a token; any text can be tokenised."""
    texts = [
        f"{problem.question}\n{problem.answer}"
        for kind in KINDS
        for problem in itertools.islice(problems("train", kind, seed), 4000)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=576,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=256,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, seed: int, architecture: str = "llama"
) -> PreTrainedModel:
    """A decoder of 6 layers and one to three million parameters, with 2 key/value heads."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        **{"num_key_value_heads": 2, "head_dim": 32, **ARCHITECTURES[architecture]},
        vocab_size=len(tokenizer),
        num_hidden_layers=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[Problem]) -> list[tuple[list[int], int]]:
    """Return `(tokens, length of the prompt)` of each problem, in the chat template."""
    users = [[{"role": "user", "content": row.question}] for row in rows]
    prompts = [
        tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
        for user in users
    ]
    full = [p + row.answer + tokenizer.eos_token for p, row in zip(prompts, rows, strict=True)]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    tokens = tokenizer(full, add_special_tokens=False)["input_ids"]
    return list(zip(tokens, lengths, strict=True))


def padded(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(input_ids, labels)`, padded on the right; only answers have labels."""
    input_ids = torch.full((len(rows), max(len(tokens) for tokens, _ in rows)), pad)
    labels = torch.full_like(input_ids, -100)
    for row, (tokens, prompt) in enumerate(rows):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return input_ids, labels


def batches(
    tokenizer: PreTrainedTokenizerBase, kind: str, seed: int, first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(input_ids, labels)` of one kind without end, from batch number `first` on.

    Problems are drawn a pool at a time, from a seed of its own each, so that a resumed run goes on
    where it was without drawing everything again. Batches hold problems of similar length.
    """
    for number in itertools.count(first // POOL):
        pool = itertools.islice(problems("train", kind, f"{seed} {number}"), BATCH * POOL)
        encoded = sorted(encode(tokenizer, list(pool)), key=lambda row: len(row[0]))
        groups = [encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH)]
        random.Random(f"{seed} {number}").shuffle(groups)
        for group in groups[first % POOL if number == first // POOL else 0 :]:
            yield padded(group, tokenizer.pad_token_id)


def learning_rate(step: int, steps: int, peak: float = PEAK_RATE, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: https://kellerjordan.github.io/posts/muon/.

    Learns this task in far fewer steps than AdamW. `torch.optim.Muon` computes in bfloat16, which
    few CPUs do at speed; this one stays in float32. Updates have the size of AdamW's
    (https://arxiv.org/abs/2502.16982), so that both take the same learning rate.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            rate, beta = group["lr"], group["momentum"]
            for matrix in group["params"]:
                state = self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - beta)
                update = orthogonalise(matrix.grad.lerp(average, beta))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * rate * max(matrix.shape[-2:]) ** 0.5)


def orthogonalise(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring all singular values of the last two dimensions close to one, by Newton-Schulz."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


def make_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers and of experts, AdamW for the embedding and the norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2 or p is embedding]
    return [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    checkpoint: Path,
) -> list[dict[str, Any]]:
    """Train in place and return the log; resumes from `checkpoint` where there is one."""
    optimizers = make_optimizers(model)
    log: list[dict[str, Any]] = []
    first, running, seconds = 0, dict.fromkeys(KINDS, math.nan), 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, running, seconds, log = (saved[k] for k in ("step", "running", "seconds", "log"))
        print(f"continuing at step {first}", flush=True)
    # The loss of a mixture of experts asks for balance too.
    balance = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}
    data = {kind: batches(tokenizer, kind, seed, first) for kind in KINDS}
    start = time.perf_counter()
    model.train()
    for step in range(first, steps):
        rate = learning_rate(step, steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        for kind in KINDS:
            input_ids, labels = next(data[kind])
            loss = model(input_ids=input_ids, labels=labels, use_cache=False, **balance).loss
            (loss / len(KINDS)).backward()
            value = loss.item()
            running[kind] = value if step == 0 else 0.95 * running[kind] + 0.05 * value
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        done, elapsed = step + 1, time.perf_counter() - start
        if done % LOG_EVERY == 0:
            left = elapsed / (done - first) * (steps - done)
            losses = ", ".join(f"{kind} {value:.4f}" for kind, value in running.items())
            print(f"step {done}/{steps} loss: {losses}; {left / 60:.1f} min left", flush=True)
            entry = {"step": done, "loss": {kind: round(v, 5) for kind, v in running.items()}}
            log.append(entry | {"learning_rate": rate, "seconds": round(seconds + elapsed, 1)})
        if done % SAVE_EVERY == 0 and done < steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "running": running,
                "seconds": seconds + elapsed,
                "log": log,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for model/ and data/")
    parser.add_argument("--architecture", default="llama", choices=ARCHITECTURES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer(arguments.seed)
    model = build_model(tokenizer, arguments.seed, arguments.architecture)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    checkpoint = arguments.output / "training_state.pt"
    log = train(model, tokenizer, arguments.steps, arguments.seed, checkpoint)

    model.eval().save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    (arguments.output / "data").mkdir(exist_ok=True)
    for split, per_kind in SPLITS.items():
        rows = make_split(split, per_kind, arguments.seed)
        write_jsonl(arguments.output / "data" / f"{split}.jsonl", rows)
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (arguments.output / "training_log.jsonl").write_text(lines, encoding="utf-8")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
