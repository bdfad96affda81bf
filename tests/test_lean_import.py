"""`import optimum_cap` and `optimum-cli --help` stay light, and the registration still happens."""

import os
import subprocess
import sys

import pytest


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter where warnings are errors; return what it printed.

    torch does not load the installed plugin there by itself.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_transformers() -> None:
    run_python(
        "import sys, optimum_cap\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_help_loads_neither_torch_nor_transformers() -> None:
    commands = [
        "prune",
        "generate",
        "score",
        "inspect",
        "convert",
        "compact",
        "recover",
        "eval",
        "compare",
        "estimate",
        "study",
    ]
    calls = ["--help", "cap --help", *(f"cap {command} -h" for command in commands)]
    out = run_python(
        "import sys\n"
        "from optimum.commands.optimum_cli import main\n"
        f"for call in {calls!r}:\n"
        "    sys.argv = ['optimum-cli', *call.split()]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as done:\n"
        "        assert done.code == 0\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, (call, heavy)"
    )
    assert out.count("usage: optimum-cli") == len(calls)
    assert all(f"usage: optimum-cli cap {command} " in out for command in commands)


CHECK_REGISTRATION = """
import importlib.machinery
import inspect
import transformers.modeling_utils as module
import peft
import transformers.pipelines as pipelines
import transformers.quantizers.auto as auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

assert AUTO_QUANTIZATION_CONFIG_MAPPING["cap"].__module__ == "optimum_cap.config"
assert AUTO_QUANTIZER_MAPPING["cap"].__module__ == "optimum_cap.plugin.quantizer"
assert not [finder for finder in sys.meta_path if "optimum_cap" in type(finder).__module__]
assert all(finder in sys.meta_path for finder in finders_before)

# The modules of transformers look as if nobody had watched their import.
for watched in (module, auto, pipelines, peft):
    assert type(watched) is type(sys)
    assert type(watched.__spec__.loader) is importlib.machinery.SourceFileLoader, watched.__spec__
    assert type(watched.__loader__) is importlib.machinery.SourceFileLoader, watched.__loader__
    assert watched.__spec__.origin == watched.__file__
assert "class PreTrainedModel" in inspect.getsource(module)

# Once is enough.
loader = module.PreTrainedModel.from_pretrained.__func__
optimum_cap.plugin.registration.register_with_transformers()
assert module.PreTrainedModel.from_pretrained.__func__ is loader
assert pipelines.pipeline.__wrapped__.__module__ == "transformers.pipelines"
assert peft.PeftModel.save_pretrained.__wrapped__
"""


@pytest.mark.slow
def test_registers_when_transformers_is_imported_later() -> None:
    run_python(
        "import sys\n"
        "finders_before = list(sys.meta_path)\n"
        "import optimum_cap\n"
        "assert len(sys.meta_path) == len(finders_before) + 1\n"
        "optimum_cap.plugin.registration.register_with_transformers()\n"
        "assert len(sys.meta_path) == len(finders_before) + 1\n" + CHECK_REGISTRATION
    )


def test_registers_at_once_when_transformers_is_there() -> None:
    run_python(
        "import sys, transformers.modeling_utils\n"
        "finders_before = list(sys.meta_path)\n"
        "import optimum_cap\n" + CHECK_REGISTRATION
    )
