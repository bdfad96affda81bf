"""Common code of the commands: one-line errors, output, common flags, and path checks."""

import json
import math
import os
import signal
import sys
import tempfile
import threading
from abc import abstractmethod
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from optimum_cap.commands.parser import GENERAL, HUB, LOADING, CommandParser
from optimum_cap.progress import PROGRESS, progress_mode
from optimum_cap.text import printable

if TYPE_CHECKING:
    from optimum_cap.runtime import ProcessGroup

EXIT_FAILURE = 1
EXIT_BAD_ARGUMENTS = 2  # what argparse uses
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_TERMINATED = 143  # 128 + SIGTERM

# This package and its dependencies raise these deliberately, with a message for the user. All other
# exceptions are reported as bugs.
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError, MemoryError)

# Read on import by huggingface_hub (and through it by transformers) and by datasets.
_OTHER_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


class Terminated(KeyboardInterrupt):
    """SIGTERM, sent by a job scheduler, or by torchrun after another process died.

    A subclass of `KeyboardInterrupt`, so that code that handles Ctrl-C (cleanup, the hint on how to
    resume) also handles SIGTERM.
    """


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `Terminated` on the first SIGTERM; a second one ends the process immediately."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # the calling program handles SIGTERM itself
        return

    def terminate(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class IncompleteError(RuntimeError):
    """A part of the work failed after other parts gave results.

    Attributes:
        values: The results, which `--json` still prints.
    """

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


class CAPSubcommand(BaseOptimumCLICommand):
    """Base class of the subcommands: checks the arguments, then does the work.

    Subclasses implement `prepare` and `execute`. Errors are reported in one line, without a
    traceback: a bad value or missing file found by `prepare` exits with status 2, other errors with
    1, Ctrl-C with 130, SIGTERM with 143. `--debug` or `OPTIMUM_CAP_DEBUG=1` shows the traceback
    instead.

    Results go to stdout. Everything else goes to stderr: what the command is about to do, progress,
    warnings and errors.

    Attributes:
        KEEPS_RESULTS: Whether an interrupted command resumes when run again.
    """

    KEEPS_RESULTS: ClassVar[bool] = False

    def opening(self) -> list[str]:
        """Return lines that announce what the command will do, based only on its arguments.

        They are shown before the slow imports.
        """
        return []

    def announce(self) -> None:
        """Show the opening lines, only in the first process, unless `--quiet` is set."""
        if not self._is_set("quiet") and os.environ.get("RANK", "0") == "0":
            for line in self.opening():
                print(printable(line), file=sys.stderr, flush=True)

    @abstractmethod
    def prepare(self) -> Any:
        """Check everything that can be checked in advance; return the input of `execute`."""

    @abstractmethod
    def execute(self, prepared: Any) -> dict[str, Any] | None:
        """Do the work, and show the result with `say` and `answer`.

        Returns:
            The values that `--json` prints. `"saved"` is the path that was written, which `--quiet`
            prints.

        Raises:
            IncompleteError: A part of the work failed.
        """

    def say(self, text: str = "") -> None:
        """Print text, unless `--quiet` or `--json` is set."""
        if not (self._is_set("quiet") or self._is_set("json")):
            print(text)

    def answer(self, text: str) -> None:
        """Print a result, unless `--json` is set, which prints results in its own form."""
        if not self._is_set("json"):
            print(text)

    def run(self) -> None:
        """Run `prepare`, then `execute`. Called by `optimum-cli`."""
        preparing = True
        try:
            with _sigterm_as_exception(), _progress_as_set(self._is_set("quiet")):
                self.announce()
                # With --json, output of other packages must not mix with the values.
                with redirect_stdout(sys.stderr) if self._is_set("json") else nullcontext():
                    prepared = self.prepare()
                    preparing = False
                    values = self.execute(prepared)
                if values is not None:
                    self._print_values(values)
                sys.stdout.flush()
        except KeyboardInterrupt as error:
            print(file=sys.stderr)  # ends the line of a progress bar or of the terminal's ^C
            aim = "continue" if self.KEEPS_RESULTS else "start over"
            advice = f"run the same command again to {aim}"
            if isinstance(error, Terminated):
                self._exit(f"terminated: {advice}", EXIT_TERMINATED)
            self._exit(f"interrupted: {advice}", EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader (`| head`) has closed the pipe. Without this, Python would report the error
            # again when flushing stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FAILURE)
        except Exception as error:
            if isinstance(error, IncompleteError):
                self._print_values(error.values)
            if self._is_set("debug") or os.environ.get("OPTIMUM_CAP_DEBUG", "0") not in ("", "0"):
                raise
            bad_arguments = preparing and isinstance(error, ValueError | FileNotFoundError)
            status = EXIT_BAD_ARGUMENTS if bad_arguments else EXIT_FAILURE
            self._exit(f"error: {_one_line(error)}", status)

    def _is_set(self, flag: str) -> bool:
        return bool(getattr(self.args, flag, False))

    def _print_values(self, values: dict[str, Any]) -> None:
        if self._is_set("json"):
            print(json.dumps(_without_nan(values), indent=2, default=str, allow_nan=False))
        elif self._is_set("quiet") and "saved" in values:
            print(values["saved"])

    def _exit(self, message: str, status: int) -> NoReturn:
        sys.stdout.flush()
        print(f"{self.parser.prog}: {message}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def _progress_as_set(quiet: bool) -> Iterator[None]:
    """Show bars in a terminal, lines in a log, and nothing if `quiet`.

    The loading and download bars of other packages are shown only in a terminal, because in a log
    each update would be a line.
    """
    chosen = progress_mode()
    if (sys.stderr.isatty() or chosen == "bars") and not quiet:
        yield
        return
    shown = "none" if quiet else "lines" if chosen == "auto" else chosen
    changed = dict.fromkeys(_OTHER_BARS, "1") | {PROGRESS: shown}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    # Already imported if the command runs inside another program.
    logging = sys.modules.get("transformers.utils.logging")
    had_bars = logging is not None and logging.is_progress_bar_enabled()
    if logging is not None and had_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if logging is not None and had_bars:
            logging.enable_progress_bar()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def add_hub_flags(parser: CommandParser) -> None:
    """Add the flags for reading from the Hub."""
    add = parser.group(HUB)
    add("--revision", help="branch, tag or commit on the Hub (default: main)")
    add("--token", help="Hub access token (default: that of `hf auth login`)")


def add_general_flags(parser: CommandParser) -> None:
    """Add the flags of all commands."""
    add = parser.group(GENERAL)
    add("-h", "--help", action="help", help="show this help, and exit")
    add("--json", action="store_true", help="print the result as JSON (default: as text)")
    add(
        "--quiet",
        action="store_true",
        help="show no progress, and print only the result, such as the folder that was written "
        "(default: False)",
    )
    add("--debug", action="store_true", help="show the traceback of an error (default: one line)")


def add_loading_flags(parser: CommandParser) -> None:
    """Add the flags that control how a model is loaded."""
    add = parser.group(LOADING)
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights; auto is the dtype of the checkpoint (default: auto)",
    )
    add(
        "--device-map",
        default="auto",
        metavar="DEVICE",
        help="device or placement, e.g. auto, cpu or cuda:0 (default: auto)",
    )
    add(
        "--max-memory",
        nargs="+",
        type=_device_and_size,
        metavar="DEVICE=SIZE",
        help="weights per device, e.g. 0=20GB cpu=30GB; the rest is on disk (default: free memory)",
    )
    add(
        "--offload-folder",
        type=Path,
        metavar="DIR",
        help="folder for weights offloaded to disk (default: the system's temporary folder)",
    )
    add_trust_remote_code(parser)


def add_trust_remote_code(parser: CommandParser) -> None:
    """Add the flag that allows code from the model's repository."""
    parser.group(LOADING)(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the model's repository (default: False)",
    )


def _device_and_size(text: str) -> tuple[int | str, int]:
    from optimum_cap.config import parse_size

    device, _, size = text.partition("=")
    try:
        return int(device) if device.isdigit() else device, parse_size(size)
    except ValueError as error:
        raise ArgumentTypeError(
            f"{text!r} is not of the form DEVICE=SIZE: write 0=20GB for the first GPU, or cpu=30GB"
        ) from error


def check_loading_flags(args: Namespace, processes: int = 1) -> None:
    """Check that the loading flags are consistent.

    Args:
        args: The flags.
        processes: Number of processes launched together, each with a whole copy of the model.

    Raises:
        ValueError: `--max-memory` or `--offload-folder` with several processes, `--max-memory` with
            a single device, or a device that this machine does not have.
    """
    if processes > 1 and (args.max_memory or args.offload_folder):
        raise ValueError(
            f"--max-memory and --offload-folder spread one model over several devices, but "
            f"{processes} processes were launched, each with a whole model on its own device: "
            "launch one process"
        )
    if args.max_memory and args.device_map not in _PLACEMENTS:
        raise ValueError(
            f"--max-memory needs --device-map {', '.join(_PLACEMENTS)}, got --device-map "
            f"{args.device_map}: change one of the two"
        )
    if args.device_map not in _PLACEMENTS:
        _check_device(args.device_map)


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device-map {name} is neither a placement ({', '.join(_PLACEMENTS)}) nor a device "
            "such as cpu or cuda:0: choose one of them"
        ) from error
    if device.type == "meta":
        raise ValueError("--device-map meta loads no weights: choose auto, cpu or cuda:0")
    # Each kind of device has its own module in torch, such as torch.cuda.
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "device_count"):
        return
    count = backend.device_count() if backend.is_available() else 0
    if (device.index or 0) >= count:
        kind = device.type.upper()
        raise ValueError(
            f"--device-map {name} needs a {kind} device, but torch finds {count or 'none'}: choose "
            "another device, auto or cpu"
        )


def check_model(name: str, args: Namespace) -> Any:
    """Read the configuration of a model, so that a wrong name is reported before hours of work.

    Args:
        name: Hub id or folder of the model.
        args: The flags for the Hub.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The name is that of a file, or of a folder without a model.
        OSError: The configuration cannot be read from the Hub.
    """
    _check_local_model(name)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            name,
            revision=args.revision or "main",
            trust_remote_code=args.trust_remote_code,
            token=args.token,
        )
    except OSError as error:
        raise _hub_error(name, args.revision, error) from error


def check_prunable(name: str, args: Namespace, may_be_pruned: bool = False) -> Any:
    """Check by its configuration that a model can be pruned.

    Args:
        name: Hub id or folder.
        args: The arguments of the command.
        may_be_pruned: Whether the model may already be pruned.

    Returns:
        The configuration.

    Raises:
        ValueError: As for `check_model`; or the model is quantized, already pruned, or not a
            decoder-only language model.
        OSError: As `check_model`.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    from optimum_cap.models import is_language_model

    config = check_model(name, args)
    is_pruned = getattr(config, "pruning_config", None) is not None
    if is_pruned and not may_be_pruned:
        raise ValueError(
            f"the model {name} is already pruned: prune its dense base model, or load it and prune "
            "it further in Python, with CAPPruner"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not is_pruned:
        values = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ValueError(
            f"the model {name} is quantized ({values.get('quant_method', 'unknown method')}), but "
            "only float weights can be pruned: prune the model that it was made from"
        )
    auto_map = getattr(config, "auto_map", None) or {}
    custom = not auto_map.keys().isdisjoint(("AutoModelForCausalLM", "AutoModelForImageTextToText"))
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    supported = is_language_model(config) and not is_encoder
    if getattr(config, "is_encoder_decoder", False) or not (supported or custom):
        raise ValueError(
            f"the model {name} is of type {config.model_type!r}, which is no decoder-only language "
            "model: choose a causal language model, such as Llama or Mistral"
        )
    return config


def auto_class_name(config: Any, name: str, trust_remote_code: bool) -> str:
    """Return the Auto class that loads a model with the head it was saved with.

    Args:
        config: The configuration of the model.
        name: Hub id or folder, for the error message.
        trust_remote_code: Whether classes of the repository take precedence.

    Raises:
        ValueError: The model was saved without a head.
    """
    from optimum_cap.models import auto_class, check_saved_with_head, classifier_class, model_task

    check_saved_with_head(config, name)
    class_name = classifier_class(config)
    task = model_task(class_name) if class_name else None
    return task.auto_class if task else str(auto_class(config, trust_remote_code).__name__)


def check_has_lm_head(name: str, args: Namespace) -> None:
    """Check by its configuration that a model predicts tokens, unlike classifiers.

    Args:
        name: Hub id or folder.
        args: The arguments of the command.

    Raises:
        ValueError: As for `check_model`; or the model is a classifier.
        OSError: As `check_model`.
    """
    from optimum_cap.models import check_saved_with_lm_head

    check_saved_with_lm_head(check_model(name, args), name)


def _check_local_model(name: str) -> None:
    path = Path(name)
    if path.is_file():
        advice = (
            "prune the float model that it was made from"
            if path.suffix == ".gguf"
            else "name its folder"
        )
        raise ValueError(f"the model {name} is a file, not a folder or a Hub id: {advice}")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            raise FileNotFoundError(f"the model folder {name} does not exist: check the path")
        return
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"the folder {name} holds a PEFT adapter, not a model: merge it into its base model "
            "(merge_and_unload), and save that"
        )
    raise ValueError(f"the folder {name} holds no model, as it has no config.json: check the path")


def _hub_error(name: str, revision: str | None, error: OSError) -> OSError:
    """Return a one-sentence error for an error of transformers while reading from the Hub."""
    from huggingface_hub import errors

    cause = error.__cause__ or error.__context__
    if isinstance(cause, errors.GatedRepoError):
        problem = f"the model {name} is gated: request access on its page on the Hub, and pass "
        return OSError(f"{problem}--token or log in with `hf auth login`")
    if isinstance(cause, errors.RevisionNotFoundError):
        return OSError(f"the model {name} has no revision {revision!r} on the Hub: check its name")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return OSError(
            f"there is neither a folder nor a model {name} on the Hub that you may read: check the "
            "name, or log in with `hf auth login`"
        )
    if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return OSError(
            f"there is no folder {name}, the model is not in the cache, and the Hub cannot be "
            "reached: check the name and the connection"
        )
    return error


def loading_options(args: Namespace, process_group: "ProcessGroup | None" = None) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that correspond to the loading flags.

    Args:
        args: The flags.
        process_group: The processes launched together; `None` if the command does not share its
            work among processes.
    """
    return {
        "dtype": args.dtype,
        "device_map": process_group.placement(args.device_map)
        if process_group
        else args.device_map,
        "max_memory": dict(args.max_memory) if args.max_memory else None,
        "offload_folder": args.offload_folder,
        "revision": args.revision or "main",
        "trust_remote_code": args.trust_remote_code,
        "token": args.token,
    }


def check_output_folder(output: Path, source: str, overwrite: bool | None = None) -> None:
    """Check that a checkpoint can be written to `output`, without leaving files behind.

    Args:
        output: The folder.
        source: Name of the source model.
        overwrite: Whether `output` may contain files; `None` if the command has no `--overwrite`.

    Raises:
        ValueError: `output` is a file, a mount point or the folder of the source model, or it
            contains files and `overwrite` is not true.
        OSError: The folder is not writable.
    """
    _check_length(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file: name a folder")
    if file := next((path for path in output.absolute().parents if path.is_file()), None):
        raise ValueError(f"the output {output} is inside the file {file}: name another folder")
    if os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(output):
        raise ValueError(
            f"the output {output} is the folder of the model itself: name another folder"
        )
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if names and not overwrite:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"the output folder {output} is not empty (it holds {shown}): name another folder"
            + (
                ", or pass --overwrite to replace the checkpoint in it"
                if overwrite is False
                else ""
            )
        )
    if output.resolve().is_mount():
        # A checkpoint is written next to the output folder and then renamed to it.
        raise ValueError(f"the output {output} is a mount point: name a folder in it")
    # Creating a folder is the only reliable test: permission bits do not apply to root and do not
    # reveal a full disk.
    parent = next(path for path in output.absolute().parents if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise OSError(f"cannot write to the output folder {output}: {error.strerror}") from error


def _check_length(output: Path) -> None:
    """Check that the file system allows the length of every part of a path."""
    parent = output.absolute().parent
    while not _exists(parent):
        parent = parent.parent
    limit = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for part in output.parts:
        if (size := len(os.fsencode(part))) > limit:
            raise ValueError(
                f"the output name {part[:20]}... has {size} bytes, but the file system allows "
                f"{limit}: choose a shorter name"
            )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a part of the path is too long
        return False


def check_resume_folder(folder: str | None) -> None:
    """Check that a resume folder can be written to, without leaving files behind.

    Args:
        folder: The folder; `None` if not given.

    Raises:
        OSError: It cannot be written to.
    """
    if folder is None:
        return
    path = Path(folder).absolute()
    existing = next(each for each in (path, *path.parents) if _exists(each))
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise OSError(
            f"the resume folder {folder} cannot be written ({error.strerror}): choose another one"
        ) from error


def check_hub_access(repo: str, token: str | None) -> None:
    """Check that the token and the name of a repository to write to are valid.

    Raises:
        OSError: The token is not valid, or the Hub cannot be reached.
        ValueError: The name is not a valid repository name.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.whoami()
    api.repo_exists(repo)


def check_output_file(path: Path) -> None:
    """Check that a file can be written to `path`.

    Raises:
        ValueError: `path` is a folder.
        FileNotFoundError: The parent folder does not exist.
    """
    _check_length(path)
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder {path.absolute().parent} of the output does not exist: create it first"
        )
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise ValueError(
            f"the folder {path.absolute().parent} of the output cannot be written "
            f"({error.strerror}): choose another one"
        ) from error


def _without_nan(values: Any) -> Any:
    """Return values with `None` in place of numbers that JSON does not support."""
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _one_line(error: BaseException) -> str:
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, _EXPECTED):
        return text
    return f"unexpected {type(error).__name__}: {text} (run again with --debug for the traceback)"
