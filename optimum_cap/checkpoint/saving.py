"""Saving of pruned models: `save_pretrained` and `push_to_hub` that write sparse checkpoints."""

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

from optimum_cap.checkpoint.digests import RECORD_NAME
from optimum_cap.checkpoint.folders import atomic_folder
from optimum_cap.checkpoint.hub import upload
from optimum_cap.checkpoint.model_card import model_card
from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.checkpoint.transcoding import transcode_folder
from optimum_cap.models import Matrix, has_adapters, is_offloaded, stored_parameter

_MAX_SHARD_SIZE = "5GB"  # a file is held in memory while it is packed
_OFFLOADED_SHARD_SIZE = "300MB"  # an offloaded model suggests that memory is scarce


def attach(
    model: PreTrainedModel, record: PruningRecord, when_saved: Callable[[], None] | None = None
) -> None:
    """Attach a pruning record to `model`, and make it save itself as a sparse checkpoint.

    `save_pretrained` and `push_to_hub` are replaced on the instance only; the class is not changed.

    Args:
        model: The model.
        record: Its pruning record.
        when_saved: Called once, after the model has been saved or uploaded for the first time.
    """
    model.pruning_record = record
    model.config.pruning_config = record.config
    model.save_pretrained = SavePruned(model, when_saved)
    model.push_to_hub = PushPruned(model, when_saved)


class _Saving:
    """A method of a pruned model that can be copied and pickled along with the model."""

    def __init__(
        self, model: PreTrainedModel, when_saved: Callable[[], None] | None = None
    ) -> None:
        self.model = model
        self.when_saved = when_saved

    def saved(self) -> None:
        """Call `when_saved`, the first time only."""
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
        """Write the checkpoint, its metadata and its model card, atomically.

        A model that has PEFT adapters, or was quantized after pruning, is saved by transformers'
        own `save_pretrained`.

        Args:
            save_directory: Folder to write. Files in it that do not belong to a checkpoint, such as
                a tokenizer, are kept.
            is_main_process: Whether this is the main process, the only one that writes.
            state_dict: Weights to save instead of the model's.
            push_to_hub: Upload the folder afterwards, to `repo_id` or the name of the folder.
            max_shard_size: Maximum size of a weight file before it is packed. One file at a time is
                held in memory. `None` is 5GB, or 300MB if the model is offloaded.
            variant: Save the weights as `model.<variant>.safetensors`.
            token: Token for the Hub.
            **kwargs: As for transformers' `save_pretrained`; with `push_to_hub` also as for
                `push_to_hub`.

        Raises:
            FileExistsError: The folder has the weights of another model.
            OSError: The folder cannot be written; its content is unchanged.
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
                if not has_adapters(model):
                    # It describes other weights, which these have replaced.
                    (Path(save_directory) / RECORD_NAME).unlink(missing_ok=True)
                self.saved()
            return
        hub = {key: options.pop(key) for key in list(options) if key in _HUB_ARGUMENTS}
        repo_id = options.pop("repo_id", Path(save_directory).name)
        # Packed files hold one matrix per expert, whatever the caller passed.
        options["save_original_format"] = True
        record = _as_it_is_now(model, state_dict)
        with atomic_folder(Path(save_directory)) as folder:
            with _fetching_offloaded_weights(model):
                if state_dict is None and is_offloaded(model):
                    # In the order of a model in memory, so that the files are identical.
                    weights = sorted(model.state_dict().items(), key=_natural_order)
                    options["state_dict"] = dict(weights)
                stock(model, folder, **options)
            transcode_folder(folder, record, record.config["checkpoint_format"])
            card = model_card(record, type(model).__name__, token, folder=model.name_or_path)
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
        """Save to a temporary folder and upload it, including the model card.

        Args:
            repo_id: Repository, created if it does not exist.
            token: Token for the Hub.
            max_shard_size: As for `save_pretrained`.
            tags: Additional tags of the model card.
            **kwargs: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`.

        Returns:
            The commit's information, as transformers' `push_to_hub`.

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
            SavePruned(self.model)(folder, max_shard_size=max_shard_size, token=token)
            if tags:
                record, class_name = self.model.pruning_record, type(self.model).__name__
                card = model_card(record, class_name, token, tags, self.model.name_or_path)
                (folder / "README.md").write_text(card, encoding="utf-8")
            commit = upload(folder, repo_id, token=token, **kwargs)
        self.saved()
        return commit


def _is_for_transformers(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether transformers' own `save_pretrained` must save, as the files are not float weights."""
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
    """Make transformers fetch offloaded weights while it saves.

    It checks `hf_device_map`, which accelerate's `disk_offload` and `cpu_offload` do not set. Its
    warning about files of 50 GB is silenced, because the files written here are smaller.
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
    """Return the record with zeros counted again, because weights may have changed since pruning.

    Matrices that the model no longer has are left out, for example after its head was replaced.
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


def _find_weight(
    model: PreTrainedModel, name: str, state_dict: dict[str, torch.Tensor] | None
) -> torch.Tensor | None:
    """Return the weight that was called `name` when the model was pruned; `None` if it has none.

    The names of a backbone lack the prefix of the whole model.
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
