"""Merging of PEFT adapters into a pruned model without filling its zeros."""

import warnings
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.training.sparsity import pruned_parameters

logger = logging.get_logger(__name__)


class MergedModel(NamedTuple):
    """A pruned model with an adapter merged into it.

    Attributes:
        model: The model, as sparse as before.
        lost: Fraction of the update that fell on zeros and was dropped: of the squared Frobenius
            norm of the updates of all pruned weights, 0 to 1.
    """

    model: PreTrainedModel
    lost: float


def merge_and_keep_sparsity(
    peft_model: PeftModel, adapter_names: list[str] | None = None
) -> MergedModel:
    """Merge adapters into their pruned base model, and drop what would fill its zeros.

    One weight at a time is copied. An adapter trained with a `SparseLoraConfig` loses nothing.

    Args:
        peft_model: A pruned model with adapters of any method that can be merged. It cannot be used
            afterwards, as after PEFT's `merge_and_unload`.
        adapter_names: The adapters to merge; `None` is the active ones.

    Returns:
        The merged model, and what was lost of the update.

    Raises:
        TypeError: `peft_model` is no `PeftModel`.
        ValueError: The base model has no zeros, its weights are quantized, or the adapter cannot
            be merged (prompt learning).
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
    pruned = pruned_parameters(base)
    if not any(bool((parameter == 0).any()) for parameter in pruned.values()):
        raise ValueError(
            f"this {type(base).__name__} has no zeros to keep: use merge_and_unload of PEFT"
        )
    own = {id(parameter) for parameter in pruned.values()}
    lost = total = 0.0
    with warnings.catch_warnings():
        # PEFT says so for what is merged here, one layer after the other, before the rest.
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        warnings.filterwarnings("ignore", "All adapters are already merged")
        for layer in reversed(list(base.modules())):  # nested layers from the inner one outwards
            if isinstance(layer, BaseTunerLayer):
                weights = [each for each in layer.parameters() if id(each) in own]
                for dropped, update in _merge_masked(layer, weights, adapter_names):
                    lost, total = lost + dropped, total + update
        model = peft_model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    share = lost / total if total else 0.0
    logger.info(f"{share:.1%} of the update of the adapter fell on zeros and was dropped")
    return MergedModel(model, share)


@torch.no_grad()
def _merge_masked(
    layer: BaseTunerLayer, weights: list[nn.Parameter], adapter_names: list[str] | None
) -> list[tuple[float, float]]:
    """Merge the adapters of a layer, and set the zeros of its weights to zero again.

    Returns:
        For each weight, the squared norm of what was dropped of the update, and of all of it.
    """
    before = [weight.clone() for weight in weights]
    if weights:
        layer.merge(safe_merge=True, adapter_names=adapter_names)
    norms = []
    for weight, old in zip(weights, before, strict=True):
        update = weight.float() - old.float()
        dropped = update[old == 0]
        norms.append((float(dropped.square().sum()), float(update.square().sum())))
        weight.masked_fill_(old == 0, 0)
    return norms
