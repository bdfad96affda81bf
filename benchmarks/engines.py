"""Speed of pruned models in several engines, beside the dense one.

All models run in turn in one engine: a prompt (prefill), then one token after the other (decode).
Each line gives tokens a second, and the ratio to the dense model in the same turn. Before they are
timed, the log-probabilities of each model are compared with those of transformers.

The folder WORK keeps the exports for ONNX Runtime and OpenVINO, made by `transformers.exporters`,
and GGUF files, made by the script that `--gguf-script` names (convert_hf_to_gguf.py of llama.cpp).
Delete an export when its model changes.

    python benchmarks/engines.py DENSE PRUNED [PRUNED ...]
    python benchmarks/engines.py DENSE PRUNED --engines torch,openvino --threads 2 --runs 9
    python benchmarks/engines.py DENSE PRUNED --gguf-script llama.cpp/convert_hf_to_gguf.py
    python benchmarks/engines.py DENSE PRUNED --clock cpu --threads 1   # on a busy machine

Packages: onnx, onnxscript and onnxruntime; openvino; xllamacpp, and gguf and sentencepiece for the
script.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel


class Engine(ABC):
    """A model in an engine."""

    @abstractmethod
    def log_probabilities(self, prompt: list[int]) -> np.ndarray:
        """Return those of the token that follows the prompt."""

    @abstractmethod
    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds that the prompt takes."""

    @abstractmethod
    def decode(self, prompt: list[int], new: int) -> float:
        """Return the seconds that the tokens after the first new one take, which are `new`."""


class SteppedEngine(Engine):
    """An engine that is called for each token, by a loop of this script."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock

    @abstractmethod
    def reset(self) -> None: ...

    @abstractmethod
    def step(self, tokens: list[int]) -> np.ndarray:
        """Return the logits behind the last of these tokens, which follow those of other calls."""

    def log_probabilities(self, prompt: list[int]) -> np.ndarray:
        # In two parts, so that the cache is used.
        self.reset()
        self.step(prompt[: len(prompt) // 2])
        logits = self.step(prompt[len(prompt) // 2 :])
        return torch.from_numpy(logits).log_softmax(0).numpy()

    def prefill(self, prompt: list[int]) -> float:
        self.reset()
        start = self.clock()
        self.step(prompt)
        return self.clock() - start

    def decode(self, prompt: list[int], new: int) -> float:
        self.reset()
        token = int(self.step(prompt).argmax())
        start = self.clock()
        for _ in range(new):
            token = int(self.step([token]).argmax())
        return self.clock() - start


def dense_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Torch(SteppedEngine):
    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        super().__init__(CLOCKS[arguments.clock])
        torch.set_num_threads(arguments.threads)
        self.model = dense_model(folder)
        self.reset()

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def step(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor([tokens]), past_key_values=self.cache, logits_to_keep=1
            )
        return output.logits[0, -1].numpy()


def exported(folder: Path, arguments: argparse.Namespace, kind: str) -> Path:
    """Export a model for ONNX Runtime or OpenVINO, unless that has been done; return the folder."""
    output = arguments.work / f"{folder.name}-{kind}"
    if (output / "export.json").exists():
        return output
    from transformers import exporters
    from transformers.exporters.utils import decompose_for_generation

    if kind == "onnx":
        exporter = exporters.OnnxExporter()
        config = exporters.OnnxConfig(dynamic=True)
    else:
        exporter, config = exporters.OpenVINOExporter(), exporters.OpenVINOConfig(dynamic=True)
    tokens = torch.arange(3, 11).view(1, 8)
    # One graph with a cache of any length takes prompts and single tokens.
    graph, inputs = decompose_for_generation(
        dense_model(folder),
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        multi_token_decode=True,
    )["decode"]
    exporter.export(graph, inputs, config).save_pretrained(output)
    return output


class OnnxRuntime(SteppedEngine):
    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        super().__init__(CLOCKS[arguments.clock])
        import onnxruntime
        from transformers.exporters import ExportedModel

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        self.model = ExportedModel.from_pretrained(
            exported(folder, arguments, "onnx"), device="cpu", session_options=options
        )
        self.reset()

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        sizes = self.model.config
        empty = torch.zeros(1, sizes.num_key_value_heads, 0, sizes.head_dim)
        for layer in range(sizes.num_hidden_layers):
            self.cache.update(empty, empty, layer)
        self.length = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        end = self.length + len(tokens)
        output = self.model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.arange(self.length, end).unsqueeze(0),
            attention_mask=torch.ones(1, end, dtype=torch.long),
            past_key_values=self.cache,
        )
        self.cache, self.length = output.past_key_values, end
        return output.logits[0, -1].numpy()


class OpenVino(SteppedEngine):
    properties: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        super().__init__(CLOCKS[arguments.clock])
        import openvino

        model = openvino.Core().compile_model(
            exported(folder, arguments, "openvino") / "openvino_model.xml",
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": arguments.threads,
                "INFERENCE_PRECISION_HINT": "f32",
                **self.properties,
            },
        )
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.request = model.create_infer_request()
        self.logits = next(port for port in model.outputs if "logits" in port.get_names())
        self.reset()

    def reset(self) -> None:
        self.request.reset_state()
        self.length = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        end = self.length + len(tokens)
        inputs = {
            "input_ids": np.array([tokens]),
            "position_ids": np.arange(self.length, end)[None],
            "attention_mask": np.ones((1, end), np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: inputs[name] for name in self.names})
        self.length = end
        return self.request.get_tensor(self.logits).data[0, -1].copy()


class OpenVinoSparse(OpenVino):
    properties: ClassVar[dict[str, Any]] = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.4}


class LlamaCpp(Engine):
    """The server of llama.cpp, in this process."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        import xllamacpp

        file = arguments.work / f"{folder.name}.gguf"
        if not file.exists():
            if arguments.gguf_script is None:
                raise SystemExit(f"{file} does not exist: pass --gguf-script convert_hf_to_gguf.py")
            script = [sys.executable, str(arguments.gguf_script), str(folder), "--outtype", "f32"]
            subprocess.run([*script, "--outfile", str(file)], check=True)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 1024, 1, 0
        for threads in (parameters.cpuparams, parameters.cpuparams_batch):
            threads.n_threads = arguments.threads
        for cache in ("cache_type_k", "cache_type_v"):
            setattr(parameters, cache, xllamacpp.ggml_type.GGML_TYPE_F32)
        self.server = xllamacpp.Server(parameters)
        self.clock = CLOCKS[arguments.clock]

    def complete(self, prompt: list[int], new: int, **fields: Any) -> tuple[dict[str, Any], float]:
        start = self.clock()
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": new,
                "temperature": 0,
                "cache_prompt": False,
                "ignore_eos": True,
                **fields,
            }
        )
        return answer, self.clock() - start

    def log_probabilities(self, prompt: list[int]) -> np.ndarray:
        answer, _ = self.complete(prompt, 1, logprobs=10**6)
        (first,) = answer["choices"][0]["logprobs"]["content"]
        values = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
        return np.array([values[token] for token in range(len(values))])

    def prefill(self, prompt: list[int]) -> float:
        return self.complete(prompt, 1)[1]

    def decode(self, prompt: list[int], new: int) -> float:
        return self.complete(prompt, new + 1)[1] - self.complete(prompt, 1)[1]


def difference(folder: Path, model: Engine, prompt: list[int]) -> float:
    """Return the largest difference of a log-probability from that of transformers."""
    with torch.no_grad():
        logits = dense_model(folder)(input_ids=torch.tensor([prompt]), logits_to_keep=1).logits
    expected = logits[0, -1].log_softmax(0).numpy()
    return float(np.abs(model.log_probabilities(prompt) - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path, help="folder of the dense model")
    parser.add_argument("pruned", type=Path, nargs="+", help="folders of pruned models, not packed")
    parser.add_argument("--engines", help=f"among {', '.join(ENGINES)} (default: all installed)")
    parser.add_argument("--work", type=Path, default=Path("runs/engines"), help="for the exports")
    parser.add_argument("--gguf-script", type=Path, help="convert_hf_to_gguf.py of llama.cpp")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu needs --threads 1")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    engines = arguments.engines.split(",") if arguments.engines else list(ENGINES)
    for name in engines:
        if name not in ENGINES:
            parser.error(f"unknown engine {name}: expected {', '.join(ENGINES)}")
    folders = [arguments.dense, *arguments.pruned]
    vocabulary = dense_model(arguments.dense).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocabulary, (arguments.prompt,), generator=generator).tolist()
    for name in engines:
        engine, package = ENGINES[name]
        if importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed")
            continue
        models = {folder.name: engine(folder, arguments) for folder in folders}
        for folder in folders:
            error = difference(folder, models[folder.name], prompt[:32])
            print(f"{name:15} {folder.name:12} log-probabilities differ by at most {error:.1e}")
        phases: dict[str, tuple[int, Callable[[Engine], float]]] = {
            "prefill": (arguments.prompt, lambda model: model.prefill(prompt)),
            "decode": (arguments.new, lambda model: model.decode(prompt[:8], arguments.new)),
        }
        for phase, (tokens, run) in phases.items():
            rates: dict[str, list[float]] = {folder.name: [] for folder in folders}
            for model in models.values():
                run(model)
            for _ in range(arguments.runs):
                for folder, model in models.items():
                    rates[folder].append(tokens / run(model))
            for folder, of_model in rates.items():
                ratios = [a / b for a, b in zip(of_model, rates[arguments.dense.name], strict=True)]
                print(
                    f"{name:15} {folder:12} {phase:8} {statistics.median(of_model):8.1f} tokens/s, "
                    f"{statistics.median(ratios):.3f} of dense "
                    f"({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

# The class of an engine, and the package that it needs.
ENGINES: dict[str, tuple[Callable[[Path, argparse.Namespace], Engine], str]] = {
    "torch": (Torch, "torch"),
    "onnxruntime": (OnnxRuntime, "onnxruntime"),
    "openvino": (OpenVino, "openvino"),
    "openvino_sparse": (OpenVinoSparse, "openvino"),
    "llama_cpp": (LlamaCpp, "xllamacpp"),
}


if __name__ == "__main__":
    main()
