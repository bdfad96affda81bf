"""Sparse checkpoints: save, inspect and convert. Knows files and folders, but no tensor format."""

import dataclasses
import errno
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from optimum_cap.architectures import Matrix
from optimum_cap.formats import FORMAT_VERSION, FORMATS, check_format_version, check_parts, decode
from optimum_cap.model_card import model_card
from optimum_cap.offload import is_offloaded, stored_parameter
from optimum_cap.record import PruningRecord

RECORD_NAME = "pruning_record.json"
CONFIG_NAME = "config.json"
_MAX_SHARD_SIZE = "5GB"  # one file is held in memory while it is packed
_OFFLOADED_SHARD_SIZE = "300MB"  # where memory is what there is little of
_INDEX_PATTERN = "*.safetensors.index*.json"  # with or without a variant


def attach(
    model: PreTrainedModel, record: PruningRecord, when_saved: Callable[[], None] | None = None
) -> None:
    """Make `model` a pruned model: it knows its record, and saves itself as a sparse checkpoint.

    The class and transformers stay untouched: `save_pretrained` and `push_to_hub` are replaced on
    the instance alone.

    Args:
        model: The model.
        record: What was done to it.
        when_saved: Called once it has been saved, or uploaded.
    """
    model.pruning_record = record
    model.config.pruning_config = record.config
    model.save_pretrained = SavePruned(model, when_saved)
    model.push_to_hub = PushPruned(model, when_saved)


class _Saving:
    """A method of a pruned model; copies and pickles along with the model."""

    def __init__(
        self, model: PreTrainedModel, when_saved: Callable[[], None] | None = None
    ) -> None:
        self.model = model
        self.when_saved = when_saved

    def saved(self) -> None:
        """Tell whoever wanted to know, once."""
        if self.when_saved is not None:
            self.when_saved()
        self.when_saved = None


class SavePruned(_Saving):
    """`save_pretrained` of a pruned model."""

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the checkpoint, its metadata and its model card, all or nothing.

        A model that holds PEFT adapters, or that was quantized after it was pruned, is saved by
        transformers alone.

        Args:
            save_directory: Folder. Files in it that are no part of a checkpoint (a tokenizer, say)
                are kept.
            is_main_process: Only the main process writes.
            state_dict: Weights to save instead of the model's.
            push_to_hub: Push the folder afterwards, to `repo_id` or the name of the folder.
            max_shard_size: Largest size of a file of weights, before it is packed. One file at a
                time is held in memory. `None` is 5GB, or 300MB if the model is offloaded.
            variant: Weights are saved as `model.<variant>.safetensors`.
            token: Token for the Hub.
            **kwargs: As for transformers' `save_pretrained`; with `push_to_hub` also as for
                `push_to_hub`.

        Raises:
            FileExistsError: The folder holds the weights of another model.
            OSError: The folder cannot be written; it is as it was before.
        """
        model = self.model
        stock = type(model).save_pretrained
        options = {
            "state_dict": state_dict,
            "max_shard_size": _shard_size(model) if max_shard_size is None else max_shard_size,
            "variant": variant,
            **kwargs,
        }
        if not is_main_process or _is_for_transformers(model, kwargs):
            options |= {"push_to_hub": push_to_hub, "token": token}
            stock(model, save_directory, is_main_process=is_main_process, **options)
            if is_main_process:
                self.saved()
            return
        hub = {key: options.pop(key) for key in list(options) if key in _HUB_ARGUMENTS}
        repo_id = options.pop("repo_id", Path(save_directory).name)
        # Packed files hold one matrix per expert, whatever the caller prefers.
        options["save_original_format"] = True
        record = _as_it_is_now(model, state_dict)
        with _replaced_folder(Path(save_directory)) as folder:
            with _fetching_offloaded_weights(model):
                if state_dict is None and is_offloaded(model):
                    # In the order of a model in memory, so that the files are the same.
                    weights = sorted(model.state_dict().items(), key=_natural_order)
                    options["state_dict"] = dict(weights)
                stock(model, folder, **options)
            _transcode(folder, record, record.config["checkpoint_format"])
            card = model_card(record, type(model).__name__, token)
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.pruning_record = record
        self.saved()
        if push_to_hub:
            upload(Path(save_directory), repo_id, token=token, **hub)


class PushPruned(_Saving):
    """`push_to_hub` of a pruned model."""

    def __call__(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save to a temporary folder and upload it, model card included.

        Args:
            repo_id: Repository, made if it does not exist.
            token: Token for the Hub.
            max_shard_size: As for `save_pretrained`.
            tags: Further tags of the model card.
            **kwargs: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`.

        Returns:
            The commit's information, as transformers' `push_to_hub`.
        """
        if unknown := sorted(set(kwargs) - _HUB_ARGUMENTS):
            raise TypeError(f"push_to_hub got unexpected argument(s): {', '.join(unknown)}")
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            SavePruned(self.model)(folder, max_shard_size=max_shard_size, token=token)
            if tags:
                card = model_card(self.model.pruning_record, type(self.model).__name__, token, tags)
                (folder / "README.md").write_text(card, encoding="utf-8")
            commit = upload(folder, repo_id, token=token, **kwargs)
        self.saved()
        return commit


@dataclass(frozen=True)
class CheckpointSummary:
    """What is known of a checkpoint without loading its weights.

    Attributes:
        record: What was pruned, how, from which model.
        checkpoint_format: `"packed"` or `"dense"`.
        format_version: Version of the files.
        weight_bytes: Size of all weight files.
        dense_bytes: Size that the tensors have when stored dense.
    """

    record: PruningRecord
    checkpoint_format: str
    format_version: int
    weight_bytes: int
    dense_bytes: int


def inspect_checkpoint(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> CheckpointSummary:
    """Read the record and the sizes of a checkpoint; no weights are read or downloaded.

    Args:
        path_or_repo: Folder, or repository on the Hub.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.
        cache_dir: Cache for downloads.

    Raises:
        ValueError: It is no CAP checkpoint, or one of a newer version.
    """
    name = os.fspath(path_or_repo)
    if Path(name).is_dir():
        record_file = Path(name) / RECORD_NAME
        sizes = [path.stat().st_size for path in _weight_files(Path(name))]
    elif Path(name).exists():
        raise ValueError(f"{name} is a file: name the folder of a checkpoint")
    else:
        _check_repo_id(name)
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
        files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        sizes = [size for file, size in files.items() if file.endswith(".safetensors")]
        record_file = Path(name) / RECORD_NAME
        if RECORD_NAME in files:
            record_file = Path(
                hf_hub_download(
                    name, RECORD_NAME, revision=info.sha, token=token, cache_dir=cache_dir
                )
            )
    record, files_info = read_record(record_file, name)
    return CheckpointSummary(
        record,
        files_info["checkpoint_format"],
        files_info["format_version"],
        sum(sizes),
        files_info["dense_bytes"],
    )


def read_record(path: Path, name: str) -> tuple[PruningRecord, dict[str, Any]]:
    """Read a record file: the record, and what it says of the files beside it.

    Args:
        path: The record file.
        name: Name of the checkpoint, for the error message.

    Raises:
        ValueError: There is no such file, it is damaged, or of a newer version.
    """
    if not path.is_file():
        raise ValueError(
            f"{name} is not a CAP checkpoint: it has no {RECORD_NAME}, which save_pretrained of a "
            "pruned model writes"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        files = values.pop("files")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; save or download it again") from error
    check_format_version(files.get("format_version"), name)
    return PruningRecord.from_dict(values), files


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    checkpoint_format: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write a checkpoint in another format, file by file, with the same weights bit for bit.

    Args:
        source: Folder, or repository on the Hub.
        target: New folder.
        checkpoint_format: `"packed"` or `"dense"`.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.

    Returns:
        The new folder.

    Raises:
        ValueError: `source` is no CAP checkpoint, or the format is unknown.
        FileExistsError: `target` exists and is not empty.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(
            f"unknown checkpoint format {checkpoint_format!r}: choose one of {', '.join(FORMATS)}"
        )
    folder, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: choose a new folder")
    if folder.is_dir() and target.resolve().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{target} is in the checkpoint itself: choose a folder elsewhere")
    if not folder.is_dir():
        _check_repo_id(os.fspath(source))
        folder = Path(snapshot_download(os.fspath(source), revision=revision, token=token))
    record, _ = read_record(folder / RECORD_NAME, os.fspath(source))
    validate_shards(_weight_files(folder))
    config = {**record.config, "checkpoint_format": checkpoint_format}
    record = dataclasses.replace(record, config=config)
    with _replaced_folder(target) as made:
        shutil.copytree(folder, made, dirs_exist_ok=True)
        _transcode(made, record, checkpoint_format)
        class_name = _read_json(made / CONFIG_NAME).get("architectures", [""])[0]
        (made / "README.md").write_text(model_card(record, class_name, token), encoding="utf-8")
    return target


def _check_repo_id(name: str) -> None:
    """Tell a folder that is not there from a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor the name of a repository on the Hub"
        ) from error


def validate_shards(files: list[Path]) -> None:
    """Check that every file is as long as its header says, and its packed weights are complete.

    Raises:
        ValueError: A file is truncated or no safetensors file; the message names it.
    """
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            try:
                if header_size > size:
                    raise ValueError
                header = json.loads(stream.read(header_size))
                ends = [
                    entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"
                ]
                expected = 8 + header_size + max(ends, default=0)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{file} is damaged ({size} bytes, without a whole header): download or copy "
                    "it again"
                ) from None
        if size != expected:
            raise ValueError(
                f"{file} is damaged: its header describes {expected} bytes, it has {size}: "
                "download or copy it again"
            )
        with safe_open(file, framework="pt") as tensors:
            try:
                check_parts(tensors.keys(), tensors.get_tensor)
            except ValueError as error:
                raise ValueError(f"{file}: {error}; download or copy it again") from None


def _is_for_transformers(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether the files to save are none of a float model, so that nothing is to be packed."""
    return bool(
        getattr(model, "_hf_peft_config_loaded", False)  # adapters are saved as adapters
        or getattr(model, "hf_quantizer", None) is not None
        or options.get("distributed_checkpoint")
    )


def _natural_order(item: tuple[str, torch.Tensor]) -> Any:
    return dot_natural_key(item[0])


def _shard_size(model: PreTrainedModel) -> str:
    return _OFFLOADED_SHARD_SIZE if is_offloaded(model) else _MAX_SHARD_SIZE


@contextmanager
def _fetching_offloaded_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers fetch what is offloaded while it saves.

    It goes by `hf_device_map`, which accelerate's `disk_offload` and `cpu_offload` do not set, and
    warns of files of 50 GB, which ours are not.
    """
    own = model.__dict__.get("hf_device_map")
    if is_offloaded(model):
        model.hf_device_map = {"": "disk"}
        model.tie_weights()  # accelerate makes a new tensor each time that it offloads one
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            yield
    finally:
        model.hf_device_map = own
        if own is None:
            del model.hf_device_map


def _as_it_is_now(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None
) -> PruningRecord:
    """Return the record with zeros counted anew: weights may have changed since pruning.

    Only matrices that are there are listed: a model with another head, or none, has fewer.
    """
    record: PruningRecord = model.pruning_record
    matrices = []
    for known in record.matrices:
        name, _, expert = known.name.partition("[")
        matrix = Matrix(name, int(expert[:-1]) if expert else None)
        parameter = _find_weight(model, name, state_dict)
        if parameter is not None:
            weight = matrix.of(parameter.detach())
            zeros = int((weight == 0).sum())
            matrices.append(dataclasses.replace(known, zeros=zeros, total=weight.numel()))
    config = getattr(model.config, "pruning_config", None) or record.config
    return dataclasses.replace(record, matrices=matrices, config=config)


def _find_weight(
    model: PreTrainedModel, name: str, state_dict: dict[str, torch.Tensor] | None
) -> torch.Tensor | None:
    """Return the weight called `name` when the model was pruned, or `None` if it has none.

    The backbone alone lacks the prefix that the whole model has.
    """
    for candidate in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        if state_dict is not None and candidate in state_dict:
            return state_dict[candidate]
        owner, _, attribute = candidate.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if getattr(module, attribute, None) is not None:
            return stored_parameter(model, candidate)
    return None


def _transcode(folder: Path, record: PruningRecord, checkpoint_format: str) -> None:
    """Bring all weights in `folder` into one format, and write config and record to match."""
    encode = FORMATS[checkpoint_format]
    weight_map: dict[str, str] = {}
    dense_bytes = stored_bytes = 0
    for file in _weight_files(folder):
        encoded: dict[str, torch.Tensor] = {}
        with safe_open(file, framework="pt") as tensors:
            for name, weight in decode(tensors.keys(), tensors.get_tensor):
                dense_bytes += weight.nbytes
                encoded.update(encode(name, weight))
        stored_bytes += sum(tensor.nbytes for tensor in encoded.values())
        weight_map.update(dict.fromkeys(encoded, file.name))
        replacement = file.with_suffix(".new")
        save_file(encoded, replacement, metadata={"format": "pt"})
        replacement.replace(file)
    for index in folder.glob(_INDEX_PATTERN):
        values = _read_json(index)
        values["metadata"]["total_size"] = stored_bytes
        _write_json(index, {**values, "weight_map": weight_map})
    files = {
        "checkpoint_format": checkpoint_format,
        "format_version": FORMAT_VERSION,
        "dense_bytes": dense_bytes,
    }
    _write_json(folder / RECORD_NAME, {**record.to_dict(), "files": files})
    config = _read_json(folder / CONFIG_NAME)
    config["pruning_config"] = record.config
    config.pop("quantization_config", None)
    if checkpoint_format != "dense":
        # What makes transformers hand the loading to the plugin, or warn where it is missing.
        config["quantization_config"] = {**record.config, "format_version": FORMAT_VERSION}
    _write_json(folder / CONFIG_NAME, config)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Folders, all or nothing


@contextmanager
def _replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` if all goes well.

    Files of `target` that are no part of a checkpoint come along. On any error `target` is left as
    it was, and nothing else is left behind.
    """
    # Of a link, the folder that it stands for is replaced: it may be on another disk on purpose.
    target = target.resolve()
    old = target.with_name(f".{target.name}.replaced")
    if not target.exists() and old.is_dir():
        old.rename(target)  # a save was killed between its two renames
    check_target(target)
    # A mount point cannot be renamed, nor can a folder in one that is read-only.
    renamable = not target.exists() or (
        not os.path.ismount(target) and os.access(target.parent, os.W_OK)
    )
    home = target.parent if renamable else target
    prefix = f".{target.name}.saving-{platform.node()}-"
    new = None
    try:
        home.mkdir(parents=True, exist_ok=True)
        _clear_up(home, prefix)
        # One of its own for every save: processes that save to one place do not mix their files.
        new = home / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
        new.mkdir()
        yield new
        _flush(new)
        if renamable:
            _swap_folders(new, target, old)
        else:
            _swap_files(new, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not save to {target} ({error}); it is as it was before: make room, or choose a "
            "folder that can be written",
        ) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _swap_folders(new: Path, target: Path, old: Path) -> None:
    """Put folder `new` in the place of `target`, which is `old` in between."""
    if not target.exists():
        new.rename(target)
        return
    for entry in target.iterdir():
        if not (new / entry.name).exists() and not _is_weight_file(entry.name):
            _link(entry, new / entry.name)
    shutil.copymode(target, new)
    shutil.rmtree(old, ignore_errors=True)
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap_files(new: Path, target: Path) -> None:
    """Put the files of `new`, a folder in `target`, in the place of those in `target`.

    The config goes first and comes last: if the process is killed in between, the folder does not
    load, rather than load old and new files together.
    """

    def config_last(name: str) -> bool:
        return name == CONFIG_NAME

    come = sorted((entry.name for entry in new.iterdir()), key=config_last)
    stale = {entry.name for entry in target.iterdir() if _is_weight_file(entry.name)}
    stale |= {name for name in come if (target / name).exists()}
    replaced = new / "replaced"
    replaced.mkdir()
    moves = [(target / name, replaced / name) for name in sorted(stale, key=config_last)[::-1]]
    moves += [(new / name, target / name) for name in come]
    done = []
    try:
        for source, place in moves:
            done.append((source, place))
            source.rename(place)
    except BaseException:
        for source, place in reversed(done):
            if not source.exists():
                place.rename(source)
        raise


def _clear_up(home: Path, prefix: str) -> None:
    """Remove what saves that were killed left: the process in the name is no more."""
    for folder in home.iterdir():
        if folder.name.startswith(prefix):
            # Of a host whose name only starts like this one's, another part stands here.
            process = re.fullmatch(r"(\d+)-[0-9a-f]{8}", folder.name.removeprefix(prefix))
            if process and not psutil.pid_exists(int(process[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have the files written to the disk: a folder must not take its place before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())


def check_target(target: Path) -> None:
    """Check that a checkpoint may be saved to `target`, an absolute path.

    Raises:
        FileExistsError: It is a file, holds the current folder, or the weights of another model.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose a folder to save to")
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(f"{target} is or holds the current folder: choose a folder in it")
    weights = [entry.name for entry in target.iterdir() if _is_weight_file(entry.name)]
    if weights and not (target / RECORD_NAME).exists():
        raise FileExistsError(
            f"{target} holds the weights of another model ({weights[0]}), which is no CAP "
            "checkpoint: choose another folder, so that they are not lost"
        )


def _is_weight_file(name: str) -> bool:
    """Whether a file is one that loading a model could pick up as its weights."""
    return name.startswith(("model", "pytorch_model")) and (
        name.endswith((".safetensors", ".bin")) or (".index." in name and name.endswith(".json"))
    )


def _link(source: Path, target: Path) -> None:
    """Give a file or folder a second name; copy it where the file system cannot."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, copy_function=link, symlinks=True)
    else:
        link(os.fspath(source), os.fspath(target))


def upload(
    folder: Path,
    repo_id: str,
    names: list[str] | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload a checkpoint in one commit, which also removes weights of an older one.

    Args:
        folder: Folder of the checkpoint.
        repo_id: Repository, made if it does not exist.
        names: Paths of the files in `folder`; `None` uploads all of them.
        token: Token for the Hub.
        private: Whether a new repository is private.
        revision: Branch, made if it does not exist.
        commit_message: Message of the commit.
        **kwargs: As for `HfApi.create_commit`.

    Returns:
        The commit's information.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if names is None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
    # An older model.safetensors would win over new shards when the repository is loaded.
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in present if _is_weight_file(name) and name not in names]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(folder / name)) for name in names),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=commit_message or "Upload the pruned model (optimum-cap)",
        revision=revision,
        **kwargs,
    )


_HUB_ARGUMENTS = {
    "private",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
}
