"""Time of a training step of a pruned model, with and without what keeps its zeros.

Steps with and without masks take turns in one process: forward, backward, clipping and AdamW. The
model is a random Llama whose layers have the size of those of SmolLM2-135M, half of its weights
zero. A step of more tokens takes longer, the masks take the same.

    python benchmarks/training.py
    python benchmarks/training.py --tokens 4096 --layers 12 --threads 2
    python benchmarks/training.py --clock cpu --threads 1   # on a busy machine
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_cap.training import keep_sparsity

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def random_model(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def prune(model: LlamaForCausalLM) -> None:
    """Set half of the weights to zero, whatever they were trained to be."""
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data.masked_fill_(torch.rand(weight.shape) < 0.5, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step, 256 a row")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = CLOCKS[arguments.clock]
    model = random_model(arguments.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(8192, (max(arguments.tokens // 256, 1), 256))

    def step() -> float:
        start = clock()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return clock() - start

    prune(model)
    with keep_sparsity(model, optimizer) as keeper:  # also makes the state of the optimizer
        step()
        masked = keeper.zeros
    ratios = []
    for _ in range(arguments.runs):
        prune(model)
        with keep_sparsity(model, optimizer):
            step()
            kept = step()
        ratios.append(kept / step())
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{weights / 1e6:.1f} million parameters, {masked / 1e6:.1f} million zeros, "
        f"{tokens.numel()} tokens a step, {arguments.threads} threads"
    )
    print(
        f"a step that keeps zeros takes {statistics.median(ratios):.3f} of one that does not "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
