"""An oracle: what every prunable matrix is multiplied with in an ordinary forward pass."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import Matrix, prunable_matrices


class _Products(TorchFunctionMode):
    """Sees every product of some inputs with a matrix, by where the matrix lies in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.matrices = {
            matrix.of(model.get_parameter(matrix.parameter)).data_ptr(): matrix
            for matrix in prunable_matrices(find_sites(model))
        }
        self.inputs: dict[Matrix, list[torch.Tensor]] = {m: [] for m in self.matrices.values()}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        operands = {nn.functional.linear: (0, 1), torch.addmm: (1, 2)}.get(function)
        if operands:
            inputs, weight = (args[position] for position in operands)
            if weight.data_ptr() in self.matrices:
                rows = inputs.detach().reshape(-1, inputs.shape[-1]).double()
                self.inputs[self.matrices[weight.data_ptr()]].append(rows)
        return function(*args, **(kwargs or {}))


def observed_inputs(
    model: PreTrainedModel, examples: list[CalibrationExample]
) -> dict[Matrix, torch.Tensor]:
    """Run one example after the other, without padding: matrix -> its inputs, `[tokens, in]`."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # one expert after the other
    products = _Products(model)
    with torch.no_grad(), products:
        for example in examples:
            model(example.input_ids[None], use_cache=False, **example.inputs)
    widths = {matrix: model.get_parameter(matrix.parameter).shape[-1] for matrix in products.inputs}
    return {
        matrix: torch.cat(rows) if rows else torch.zeros(0, widths[matrix]).double()
        for matrix, rows in products.inputs.items()
    }
