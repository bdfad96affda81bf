"""Merging of PEFT adapters into a pruned model without filling its zeros."""

import warnings
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.training.sparsity import check_zeros_are_left, is_plain, pruned_parameters

logger = logging.get_logger(__name__)


class MergedModel(NamedTuple):
    """A pruned model with an adapter merged into it.

    Attributes:
        model: The model, as sparse as before.
        lost: Fraction of the update that fell on zeros and was dropped, from 0 to 1, in terms of
            the squared Frobenius norm of the updates of all pruned weights.
    """

    model: PreTrainedModel
    lost: float


def merge_and_keep_sparsity(
    peft_model: PeftModel, adapter_names: list[str] | None = None
) -> MergedModel:
    """Merge adapters into their pruned base model, and drop updates that would fill its zeros.

    Only one weight is copied at a time. An adapter trained with a `SparseLoraConfig` loses nothing.

    Args:
        peft_model: A pruned model with mergeable adapters of any method. As after PEFT's
            `merge_and_unload`, it cannot be used afterwards.
        adapter_names: The adapters to merge; `None` merges the active ones.

    Returns:
        The merged model, and the fraction of the update that was lost.

    Raises:
        TypeError: `peft_model` is not a `PeftModel`.
        ValueError: The base model has no zeros or has lost some, its weights are quantized or
            offloaded, or the adapter cannot be merged (as in prompt learning).
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            "merge_and_keep_sparsity needs a PeftModel, as get_peft_model or "
            f"PeftModel.from_pretrained returns, got a {type(peft_model).__name__}"
        )
    method = peft_model.peft_config[peft_model.active_adapter].peft_type
    if not isinstance(peft_model.base_model, BaseTuner):
        raise ValueError(
            f"adapters of the method {method} are not part of the weights and cannot be merged"
        )
    base = peft_model.get_base_model()
    if any(isinstance(each, BaseTunerLayer) and each.merged for each in base.modules()):
        peft_model.unmerge_adapter()
    pruned = pruned_parameters(base)
    for name, parameter in pruned.items():
        if parameter.is_meta or not is_plain(parameter):
            problem = "offloaded" if parameter.is_meta else f"quantized ({parameter.dtype})"
            raise ValueError(
                f"{name} is {problem}, so its zeros cannot be kept: load the base model again "
                "without quantization or device_map, and the adapter onto it"
            )
    if not any(bool((parameter == 0).any()) for parameter in pruned.values()):
        raise ValueError(
            f"this {type(base).__name__} has no zeros to keep: use merge_and_unload of PEFT"
        )
    check_zeros_are_left(base)
    own = {id(parameter) for parameter in pruned.values()}
    lost = total = 0.0
    with warnings.catch_warnings():
        # PEFT would warn about the layers merged here, one after the other, before the rest.
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        warnings.filterwarnings("ignore", "All adapters are already merged")
        for layer in reversed(list(base.modules())):  # inner layers before those around them
            norms = []
            if isinstance(layer, ModulesToSaveWrapper):
                norms = _mask_copies(layer, own)
            elif isinstance(layer, BaseTunerLayer):
                weights = [each for each in layer.parameters() if id(each) in own]
                norms = _merge_masked(layer, weights, adapter_names)
            lost += sum(dropped for dropped, _ in norms)
            total += sum(update for _, update in norms)
        model = peft_model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    share = lost / total if total else 0.0
    logger.info(f"{share:.1%} of the update of the adapter fell on zeros and was dropped")
    return MergedModel(model, share)


@torch.no_grad()
def _mask_copies(wrapper: ModulesToSaveWrapper, own: set[int]) -> list[tuple[float, float]]:
    """Apply the zeros of a module to its trained copies, one of which will replace it.

    Returns:
        As for `_merge_masked`.
    """
    norms = []
    for name, old in wrapper.original_module.named_parameters():
        if id(old) in own:
            for copy in wrapper.modules_to_save.values():
                norms.append(_mask(copy.get_parameter(name), old))
    return norms


@torch.no_grad()
def _merge_masked(
    layer: BaseTunerLayer, weights: list[nn.Parameter], adapter_names: list[str] | None
) -> list[tuple[float, float]]:
    """Merge the adapters of a layer, and set the zeros of its weights to zero again.

    Returns:
        For each weight, the squared norms of the dropped part of the update and of the whole
        update.
    """
    before = [weight.clone() for weight in weights]
    if weights:
        layer.merge(safe_merge=True, adapter_names=adapter_names)
    return [_mask(weight, old) for weight, old in zip(weights, before, strict=True)]


def _mask(weight: torch.Tensor, old: torch.Tensor) -> tuple[float, float]:
    """Restore the zeros of a weight; return the squared norms of the dropped and whole update."""
    update = weight.float() - old.float()
    dropped = update[old == 0]
    weight.masked_fill_(old == 0, 0)
    return float(dropped.square().sum()), float(update.square().sum())
