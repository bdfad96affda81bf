"""Saving of pruned models: `save_pretrained` and `push_to_hub` write sparse checkpoints."""

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key
from transformers.utils import logging

from optimum_cap.checkpoint.digests import RECORD_NAME
from optimum_cap.checkpoint.folders import atomic_folder, copy_other_files
from optimum_cap.checkpoint.hub import upload
from optimum_cap.checkpoint.model_card import write_model_card
from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.checkpoint.transcoding import transcode_folder
from optimum_cap.formats import decode_state_dict
from optimum_cap.models import (
    Matrix,
    has_adapters,
    has_peft_layers,
    is_offloaded,
    stored_parameter,
)

logger = logging.get_logger(__name__)

_MAX_SHARD_SIZE = "5GB"  # a file is held in memory while it is packed
_OFFLOADED_SHARD_SIZE = "300MB"  # an offloaded model suggests that memory is scarce


def attach(
    model: PreTrainedModel,
    record: PruningRecord,
    when_saved: Callable[[], None] | None = None,
    checkpoint: str | None = None,
) -> None:
    """Attach a pruning record to `model`, and make it save sparse checkpoints.

    `save_pretrained` and `push_to_hub` are replaced on the instance only; the class is not changed.
    From then on, `load_state_dict` also reads packed and coded weights.

    Args:
        model: The model.
        record: Its pruning record.
        when_saved: Called once, after the model is first saved or uploaded.
        checkpoint: Folder or repository the pruned model was loaded from; `None` if it has not been
            saved.
    """
    if not isinstance(model.__dict__.get("save_pretrained"), SavePruned):
        model.register_load_state_dict_pre_hook(_decode_state_dict)
    loaded_from = names_loaded_from(model)
    model.pruning_record = record
    model.config.pruning_config = record.config
    state = _SavedState(model.name_or_path, checkpoint, when_saved, loaded_from)
    model.save_pretrained = SavePruned(model, state)
    model.push_to_hub = PushPruned(model, state)


def set_checkpoint(model: PreTrainedModel, name: str) -> None:
    """Set the checkpoint a model was loaded from, if it was loaded from a copy of its files.

    Args:
        model: A pruned model, or one whose record is missing.
        name: Folder or repository of the checkpoint.
    """
    model.name_or_path = model.config.name_or_path = name
    saving = model.__dict__.get("save_pretrained")
    if isinstance(saving, SavePruned):
        saving.state.dense_name = saving.state.checkpoint = name
        saving.state.loaded_from = [name]


def _decode_state_dict(
    model: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """Decode packed and coded weights before `load_state_dict` processes them.

    `Trainer` reads the files of its checkpoints this way when it resumes, and for
    `load_best_model_at_end`.

    Raises:
        ValueError: A weight is damaged, or has another name in the file than in the model.
    """
    stored = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    decoded = decode_state_dict(stored)
    changed = {name for name, value in decoded.items() if value is not stored[name]}
    known = {name for name, _ in model.named_parameters(prefix.rstrip("."), remove_duplicate=False)}
    if unknown := sorted(changed - known):
        raise ValueError(
            f"{unknown[0]} and {len(unknown) - 1} other packed or coded weights have other names "
            f"in {type(model).__name__}, which load_state_dict does not translate: load the "
            "checkpoint with from_pretrained, and start the training from there"
        )
    for name in stored:
        del state_dict[name]
    state_dict.update(decoded)


def names_loaded_from(model: PreTrainedModel) -> list[str]:
    """Return the name of a model, then its names before it was pruned and saved."""
    saving = model.__dict__.get("save_pretrained")
    before = saving.state.loaded_from if isinstance(saving, SavePruned) else []
    return [name for name in dict.fromkeys([model.name_or_path, *before]) if name]


def name_base_of_adapters(
    model: PreTrainedModel, adapters: Iterable[Any], folder: str | os.PathLike[str]
) -> None:
    """Record the pruned checkpoint as the base model of adapters, or warn if there is none.

    PEFT records the name the model was loaded under. For a model pruned in memory, this is the
    dense model, to which PEFT would then add the adapter.

    Args:
        model: The pruned model that the adapters belong to.
        adapters: Their `PeftConfig`s.
        folder: Where the adapters are saved.
    """
    state = model.save_pretrained.state
    if state.checkpoint is None:
        logger.warning(
            f"the adapter in {os.fspath(folder)} records {state.dense_name or 'no model'!r} as its "
            "base model, which is dense, because the pruned model was not saved: save the pruned "
            "model with save_pretrained before you add an adapter"
        )
        return
    for adapter in adapters:
        name = adapter.base_model_name_or_path
        if name in (None, state.dense_name) and name != state.checkpoint:
            adapter.base_model_name_or_path = state.checkpoint
            adapter.revision = None  # it was the dense model's


def save_smaller(
    model: PreTrainedModel, target: str | os.PathLike[str], source: str | os.PathLike[str]
) -> None:
    """Save a model made from a checkpoint, with the other files of the checkpoint.

    These are the tokenizer, the chat template, the processor and any other files except weights.
    The card of a model without a record is copied too.

    Args:
        model: The model, with or without a record.
        target: New folder.
        source: Folder of the checkpoint.

    Raises:
        OSError: The folder cannot be written.
    """
    target = Path(target)
    if getattr(model, "pruning_record", None) is not None:
        model.save_pretrained(target)
    else:
        with atomic_folder(target) as folder:
            model.save_pretrained(folder, max_shard_size=_MAX_SHARD_SIZE)
    copy_other_files(Path(source), target)


@dataclasses.dataclass
class _SavedState:
    """Where a pruned model is saved, shared by `save_pretrained` and `push_to_hub`.

    Attributes:
        dense_name: Name or path of the model when it was pruned.
        checkpoint: Folder or repository that holds the pruned model, if it was saved or loaded.
        when_saved: Called once, after the model is first saved.
        loaded_from: Names of the model before it was pruned, latest first.
    """

    dense_name: str
    checkpoint: str | None
    when_saved: Callable[[], None] | None
    loaded_from: list[str]


class _Saving:
    """A method of a pruned model that can be copied and pickled along with the model."""

    def __init__(self, model: PreTrainedModel, state: _SavedState) -> None:
        self.model = model
        self.state = state

    def saved(self, checkpoint: str) -> None:
        """Remember where the model is saved; PEFT records this name for adapters."""
        self.state.checkpoint = checkpoint
        self.model.name_or_path = checkpoint
        self.model.config.name_or_path = checkpoint
        if self.state.when_saved is not None:
            self.state.when_saved()
        self.state.when_saved = None


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
        """Write the checkpoint, its metadata and its model card, atomically.

        A model that has PEFT adapters or was quantized after pruning is saved with transformers'
        own `save_pretrained`.

        Args:
            save_directory: Folder to write to. Files in it that do not belong to a checkpoint, such
                as a tokenizer, are kept.
            is_main_process: Whether this is the main process; only the main process writes.
            state_dict: Weights to save instead of the model's.
            push_to_hub: Whether to upload the folder afterwards, to `repo_id` or the name of the
                folder.
            max_shard_size: Maximum size of a weight file before it is encoded. One file at a time
                is held in memory. `None` is 5GB, or 300MB if the model is offloaded.
            variant: Save the weights as `model.<variant>.safetensors`.
            token: Token for the Hub.
            **kwargs: As for transformers' `save_pretrained`; with `push_to_hub` also as for
                `push_to_hub`.

        Raises:
            FileExistsError: The folder contains the weights of another model.
            OSError: The folder cannot be written; its content is unchanged.
            ValueError: PEFT has added adapters to the model.
        """
        model = self.model
        options = {
            "state_dict": state_dict,
            "max_shard_size": _shard_size(model) if max_shard_size is None else max_shard_size,
            "variant": variant,
            **kwargs,
        }
        if not is_main_process or _is_for_transformers(model, kwargs):
            if has_adapters(model):
                name_base_of_adapters(model, model.peft_config.values(), save_directory)
            options |= {"push_to_hub": push_to_hub, "token": token}
            stock = type(model).save_pretrained
            stock(model, save_directory, is_main_process=is_main_process, **options)
            if is_main_process and not has_adapters(model):
                # It describes the weights that these replaced.
                (Path(save_directory) / RECORD_NAME).unlink(missing_ok=True)
            return
        if has_peft_layers(model):
            raise ValueError(
                "this model has the layers of a PeftModel: save the adapter with save_pretrained "
                "of the PeftModel, and the pruned model before you add the adapter, or after "
                "unload() or merge_and_unload() of the PeftModel"
            )
        hub = {key: options.pop(key) for key in list(options) if key in _HUB_ARGUMENTS}
        repo_id = options.pop("repo_id", Path(save_directory).name)
        _write_checkpoint(model, Path(save_directory), options, token)
        self.saved(os.fspath(save_directory))
        if push_to_hub:
            upload(Path(save_directory), repo_id, token=token, **hub)


def _write_checkpoint(
    model: PreTrainedModel, target: Path, options: dict[str, Any], token: str | bool | None
) -> None:
    """Write checkpoint, record and model card to `target`, atomically.

    Args:
        model: A pruned model.
        target: The folder.
        options: Arguments for transformers' `save_pretrained`.
        token: Token for the Hub, to read the card of the base model.
    """
    options = {**options, "save_original_format": True}  # packed files store experts separately
    state_dict = options.get("state_dict")
    record = _as_it_is_now(model, state_dict)
    if record.lost_zeros:
        logger.warning(
            f"{record.sparsity:.2%} of the prunable weights are zero, but right after pruning it "
            f"was {(record.zeros_after or 0) / record.total:.2%}: the weights were changed since, "
            "for example by training or by merging an adapter, which fills zeros; prune again to "
            "restore the sparsity"
        )
    with atomic_folder(target) as folder:
        with _fetching_offloaded_weights(model):
            if state_dict is None and is_offloaded(model):
                # In the same order as for a model in memory, so that the files are identical.
                weights = sorted(model.state_dict().items(), key=_natural_order)
                options["state_dict"] = dict(weights)
            type(model).save_pretrained(model, folder, **options)
        transcode_folder(folder, record, record.config["checkpoint_format"])
        class_name = type(model).__name__
        write_model_card(folder, record, class_name, token, base_folder=model.name_or_path)
    model.pruning_record = record


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
        """Save to a temporary folder and upload it, including the model card.

        Args:
            repo_id: Repository, created if it does not exist.
            token: Token for the Hub.
            max_shard_size: As for `save_pretrained`.
            tags: Additional tags of the model card.
            **kwargs: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`.

        Returns:
            Information about the commit, as for transformers' `push_to_hub`.

        Raises:
            TypeError: An argument is not supported.
        """
        if unknown := sorted(set(kwargs) - _HUB_ARGUMENTS):
            raise TypeError(
                f"push_to_hub got unexpected argument(s) {', '.join(unknown)}: it takes "
                f"{', '.join(sorted(_HUB_ARGUMENTS))}"
            )
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            size = _shard_size(self.model) if max_shard_size is None else max_shard_size
            _write_checkpoint(self.model, folder, {"max_shard_size": size}, token)
            if tags:
                record, class_name = self.model.pruning_record, type(self.model).__name__
                write_model_card(folder, record, class_name, token, tags, self.model.name_or_path)
            commit = upload(folder, repo_id, token=token, **kwargs)
        self.saved(commit.repo_url.repo_id)
        return commit


def _is_for_transformers(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether transformers' own `save_pretrained` must save, as these are not float weights."""
    return bool(
        has_adapters(model)  # adapters are saved as adapters
        or getattr(model, "hf_quantizer", None) is not None
        or options.get("distributed_checkpoint")
    )


def _natural_order(item: tuple[str, torch.Tensor]) -> Any:
    return dot_natural_key(item[0])


def _shard_size(model: PreTrainedModel) -> str:
    return _OFFLOADED_SHARD_SIZE if is_offloaded(model) else _MAX_SHARD_SIZE


@contextmanager
def _fetching_offloaded_weights(model: PreTrainedModel) -> Iterator[None]:
    """Make transformers fetch offloaded weights while saving.

    transformers checks `hf_device_map`, which accelerate's `disk_offload` and `cpu_offload` do not
    set. Its warning about 50 GB files is silenced, because the files written here are smaller.
    """
    device_map = model.__dict__.get("hf_device_map")
    if is_offloaded(model):
        model.hf_device_map = {"": "disk"}
        model.tie_weights()  # accelerate creates a new tensor each time it offloads one
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            yield
    finally:
        model.hf_device_map = device_map
        if device_map is None:
            del model.hf_device_map


def _as_it_is_now(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None
) -> PruningRecord:
    """Return the record with recounted zeros, because weights may have changed since pruning.

    Matrices that the model no longer has, for example after replacing its head, are left out.
    """
    record: PruningRecord = model.pruning_record
    matrices = []
    for entry in record.matrices:
        name, _, expert = entry.name.partition("[")
        matrix = Matrix(name, int(expert[:-1]) if expert else None)
        parameter = _find_weight(model, name, state_dict)
        if parameter is not None:
            weight = matrix.of(parameter.detach())
            zeros = int((weight == 0).sum())
            matrices.append(dataclasses.replace(entry, zeros=zeros, total=weight.numel()))
    config = getattr(model.config, "pruning_config", None) or record.config
    return dataclasses.replace(record, matrices=matrices, config=config)


def names_now(model: torch.nn.Module, name: str) -> tuple[str, str]:
    """Return the names that a weight called `name` at pruning may have now.

    The names of a backbone lack the prefix of the whole model.
    """
    return name, name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _find_weight(
    model: PreTrainedModel, name: str, state_dict: dict[str, torch.Tensor] | None
) -> torch.Tensor | None:
    """Return the weight that was called `name` at pruning; `None` if the model has none."""
    for candidate in names_now(model, name):
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


_HUB_ARGUMENTS = {
    "private",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
}
