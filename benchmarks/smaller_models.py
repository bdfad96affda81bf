"""Speed of a model that has lost parts, beside the dense one.

Both models run in turn in one process: a prompt (prefill), then one token after the other (decode).
The last line compares the ratio of tokens a second with the ratio of parameters.

    python benchmarks/smaller_models.py DENSE SMALLER
    python benchmarks/smaller_models.py DENSE SMALLER --prompt 512 --new 64 --runs 9 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def seconds(run: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> float:
    start = time.perf_counter()
    run(model)
    return time.perf_counter() - start


def multiplied(model: PreTrainedModel) -> int:
    """Return how many weights multiply each token: embeddings do only as the output matrix."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return model.num_parameters() - (embeddings.numel() if head is not embeddings else 0)


def prefill(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    model(input_ids=prompt, logits_to_keep=1)


def decode(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> None:
    model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", help="folder or Hub id of the dense model")
    parser.add_argument("smaller", help="folder or Hub id of the model that has lost parts")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in (("dense", arguments.dense), ("smaller", arguments.smaller))
    }
    vocabulary = models["dense"].config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(3, vocabulary, (1, arguments.prompt), generator=generator)
    phases: dict[str, tuple[int, Callable[[PreTrainedModel], object]]] = {
        "prefill": (arguments.prompt, lambda model: prefill(model, long)),
        "decode": (arguments.new, lambda model: decode(model, long[:, :8], arguments.new)),
    }
    promised = multiplied(models["dense"]) / multiplied(models["smaller"])
    with torch.no_grad():
        for phase, (tokens, run) in phases.items():
            rates: dict[str, list[float]] = {name: [] for name in models}
            for model in models.values():
                run(model)
            for _ in range(arguments.runs):
                for name, model in models.items():
                    rates[name].append(tokens / seconds(run, model))
            ratios = [
                smaller / dense
                for dense, smaller in zip(rates["dense"], rates["smaller"], strict=True)
            ]
            for name, of_model in rates.items():
                low, middle, high = min(of_model), statistics.median(of_model), max(of_model)
                print(f"{phase:8} {name:8} {middle:8.1f} tokens/s ({low:.1f} to {high:.1f})")
            ratio = statistics.median(ratios)
            print(
                f"{phase:8} ratio    {ratio:8.3f} ({min(ratios):.3f} to {max(ratios):.3f}); the "
                f"parameters promise {promised:.3f}: {ratio / promised:.2f} of it"
            )


if __name__ == "__main__":
    main()
