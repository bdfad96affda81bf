"""Prune, save, load, convert and inspect a tiny model with the optimum-cap that is installed.

Usage: python .ci/wheel_smoke.py. Needs the dependencies of the package and nothing else: no test
runner, no network, no tokenizer. `release.yml` and `ci.yml` run it on the oldest and the newest
Python, `tests/test_packaging.py` on the one of the tests.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import optimum_cap
from optimum_cap import CAPConfig

# No import of optimum_cap here: whoever loads a checkpoint need not know what wrote it.
LOAD = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(sum(int((weight == 0).sum()) for weight in model.parameters()))
"""


def python(*arguments: str | Path) -> str:
    """Run a new process of this Python, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{arguments} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def cap(*arguments: str | Path) -> str:
    return python("-m", "optimum.commands.optimum_cli", "cap", *arguments)


def main() -> None:
    package = Path(optimum_cap.__file__).parent
    if package.parent == Path(__file__).resolve().parents[1]:
        raise SystemExit(f"this is to test an installed wheel, but {package} is the source folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder / "dense")

        model = AutoModelForCausalLM.from_pretrained(
            folder / "dense", pruning_config=CAPConfig(sparsity=0.5, recipe="magnitude")
        )
        zeros = sum(int((weight == 0).sum()) for weight in model.parameters())
        assert zeros == model.pruning_record.zeros > 0, zeros
        model.save_pretrained(folder / "packed")
        # "coded" needs zstd, which is another package before Python 3.14.
        cap("convert", folder / "packed", "--format", "coded", "-o", folder / "coded")
        loaded = python("-c", LOAD, folder / "packed", folder / "coded")
        assert loaded.split() == [str(zeros)] * 2, loaded
        facts = cap("inspect", folder / "coded", "--verify")
        assert "0.500000 (0.5 requested)" in facts, facts
    version = sys.version.split()[0]
    print(f"optimum-cap {optimum_cap.__version__} of {package} works with Python {version}")


if __name__ == "__main__":
    main()
