"""Sparse checkpoints: save, inspect and convert. Knows files and folders, but no tensor format."""

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from optimum_cap.checkpoint.folders import atomic_folder
from optimum_cap.checkpoint.hub import upload
from optimum_cap.checkpoint.model_card import model_card
from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.checkpoint.transcoding import transcode_folder
from optimum_cap.models import Matrix, has_adapters, is_offloaded, stored_parameter

_MAX_SHARD_SIZE = "5GB"  # one file is held in memory while it is packed
_OFFLOADED_SHARD_SIZE = "300MB"  # where memory is what there is little of


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
        with atomic_folder(Path(save_directory)) as folder:
            with _fetching_offloaded_weights(model):
                if state_dict is None and is_offloaded(model):
                    # In the order of a model in memory, so that the files are the same.
                    weights = sorted(model.state_dict().items(), key=_natural_order)
                    options["state_dict"] = dict(weights)
                stock(model, folder, **options)
            transcode_folder(folder, record, record.config["checkpoint_format"])
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


def _is_for_transformers(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether the files to save are none of a float model, so that nothing is to be packed."""
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


_HUB_ARGUMENTS = {
    "private",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
}
