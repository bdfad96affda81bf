"""LoRA adapters that merge into exactly as sparse a model as the base model."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant

from optimum_cap.training.sparsity import is_plain

MARK = "keep_sparsity"
"""The entry of `adapter_config.json` that identifies a sparse adapter when it is loaded."""


# Initialisations of A and B that do not change the weight of the base layer.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass
class SparseLoraConfig(LoraConfig):
    """A LoRA adapter that keeps the zeros of a pruned model: (W + mask * scaling * BA) x.

    The update is masked in every forward pass, so the merged model is exactly the trained one:
    `merge_and_unload()` gives a model that is as sparse as its base and computes the same outputs.
    A pass takes about as many operations as without LoRA, but gradients and optimizer take no more
    memory than with LoRA. Layers without zeros get an ordinary LoRA adapter. Modules in
    `modules_to_save` are not masked; `merge_and_keep_sparsity` masks them when it merges.

    The adapter is saved as an ordinary LoRA adapter with an entry `keep_sparsity` in its config.
    Without `optimum-cap`, PEFT ignores this entry with a warning, and the update is not masked.

    Args:
        keep_sparsity: Always `True`; it marks the adapter in `adapter_config.json`.

    Raises:
        ValueError: `keep_sparsity` is false, or `init_lora_weights` changes the weights of the base
            model. When the adapter is added to a model: a weight with zeros is quantized, offloaded
            or not in a linear layer, or a variant such as DoRA is requested, whose update has
            another form.

    Example:
        config = SparseLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(pruned_model, config)
    """

    keep_sparsity: bool = field(default=True)

    def __post_init__(self) -> None:
        if self.init_lora_weights not in _INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes the weights of the base "
                "model, which fills its zeros: choose one of "
                f"{', '.join(map(repr, _INITIALISATIONS))}"
            )
        super().__post_init__()
        if self.keep_sparsity is not True:
            raise ValueError(
                f"keep_sparsity of a SparseLoraConfig must be True, got {self.keep_sparsity!r}: "
                "use LoraConfig for an adapter that fills zeros when it is merged"
            )
        if self.target_parameters:
            raise ValueError(
                f"a SparseLoraConfig cannot adapt parameters of experts, got {MARK}=True with "
                f"target_parameters={self.target_parameters}: name linear layers with "
                "target_modules, or use LoraConfig and merge_and_keep_sparsity"
            )


def masked_variant(layer: LoraLayer, variant: LoraVariant | None) -> LoraVariant | None:
    """Return the variant that masks the update of a new adapter with a `SparseLoraConfig`.

    Args:
        layer: The layer that gets the adapter.
        variant: The variant of LoRA that PEFT has chosen, if any.

    Returns:
        The variant; `None` if the weight has no zeros to keep.

    Raises:
        ValueError: The zeros of the layer cannot be kept.
    """
    base: Any = layer.get_base_layer()
    kind, weight = type(base).__name__, getattr(base, "weight", None)
    if variant is not None:
        raise ValueError(
            f"a SparseLoraConfig cannot be combined with {type(variant).__name__}, whose update is "
            "not a product of two matrices: leave that option out"
        )
    if weight is None:
        raise ValueError(f"a SparseLoraConfig cannot adapt a {kind}: leave it out of the targets")
    if weight.is_meta:
        raise ValueError(
            f"weights of a {kind} are offloaded, so their zeros cannot be seen: load the model "
            "without device_map"
        )
    if not is_plain(weight):
        raise ValueError(
            f"the weights of a {kind} are quantized ({type(weight).__name__}, {weight.dtype}), so "
            "their zeros cannot be kept: load the model without quantization, or use LoraConfig"
        )
    if not (weight == 0).any():
        return None
    if not isinstance(layer, Linear):
        raise ValueError(
            f"a {kind} with zeros cannot have a sparse adapter, only linear layers can: leave it "
            "out of the targets, or use LoraConfig and merge_and_keep_sparsity"
        )
    return MaskedUpdate()


class MaskedUpdate(LoraVariant):
    """LoRA variant whose update is BA where the base weight is nonzero, and zero elsewhere."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing: the mask is read from the frozen weight."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Add the product of masked update and input to the output of the base layer."""
        weight = module.get_base_layer().weight
        if module.fan_in_fan_out:
            weight = weight.T
        lora_b = module.lora_B[active_adapter]
        device = x.device.type
        # Autocast does not apply to the backward pass of a custom function.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        update: torch.Tensor = MaskedProduct.apply(
            module.lora_dropout[active_adapter](x).to(dtype),
            module.lora_A[active_adapter].weight.to(dtype),
            lora_b.weight.to(dtype),
            weight,
            module.scaling[active_adapter],
        )
        if lora_b.bias is not None:
            update = update + lora_b.bias * module.scaling[active_adapter]
        return result + update

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the masked update."""
        return orig_weight + _masked_update(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the masked update to the weight in place."""
        orig_weight.data += _masked_update(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight without the update."""
        return orig_weight.data - _masked_update(module, active_adapter, orig_weight)


def _masked_update(module: Linear, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    update = module.get_delta_weight(adapter).to(weight.dtype)
    return update.masked_fill(weight == 0, 0)


class MaskedProduct(torch.autograd.Function):
    """x @ (mask * scaling * B @ A).T, which saves the factors instead of their product.

    Autograd would save the masked product of every layer until the backward pass, which takes as
    much memory as a second model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        weight: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Multiply.

        Args:
            ctx: Autograd context.
            x: `[..., in]`.
            lora_a: `[r, in]`.
            lora_b: `[out, r]`.
            weight: `[out, in]`; its zeros mask the update.
            scaling: LoRA scaling.

        Returns:
            `[..., out]`.
        """
        ctx.save_for_backward(x, lora_a, lora_b, weight)
        ctx.scaling = scaling
        return F.linear(x, _masked_product(lora_a, lora_b, weight, scaling))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of `x`, `lora_a` and `lora_b`."""
        x, lora_a, lora_b, weight = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ _masked_product(lora_a, lora_b, weight, ctx.scaling)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_product = grad_output.flatten(0, -2).T @ x.flatten(0, -2)
            grad_product.masked_fill_(weight == 0, 0).mul_(ctx.scaling)
            grad_a = lora_b.T @ grad_product
            grad_b = grad_product @ lora_a.T
        return grad_x, grad_a, grad_b, None, None


def _masked_product(
    lora_a: torch.Tensor, lora_b: torch.Tensor, weight: torch.Tensor, scaling: float
) -> torch.Tensor:
    return (lora_b @ lora_a).mul_(scaling).masked_fill_(weight == 0, 0)
