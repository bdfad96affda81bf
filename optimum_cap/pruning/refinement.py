"""Refinement: fits the kept weights of a whole pruned layer to the dense model's hidden states.

Solvers such as ALPS fit one matrix at a time to the outputs of that matrix. What matters is the
output of the layer, which depends on all its matrices together, and on nonlinearities between them.
After a layer is pruned, `LayerRefiner` fits all its kept weights at once: by a few passes of Adam
over the calibration set, with the masks fixed. No labels are used, and only one layer has gradients
and optimizer states at a time.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from optimum_cap.models import Matrix, ModelView, onloaded, without_parameter_grads
from optimum_cap.pruning.activations import LayerwisePass

EXAMPLES_PER_STEP = 2
LEFT_OUT = 8  # one batch of so many is left out, and decides when to stop
_BETAS, _EPSILON = (0.9, 0.95), 1e-12  # of Adam; gradients of relative errors are small
_WARM_UP = 0.1  # fraction of the steps


@dataclass(frozen=True)
class Refinement:
    """What the refinement of a layer has done.

    Attributes:
        error_before: Error of the hidden states after the layer relative to those of the dense
            model, on the batches that are left out, before the first step.
        error_after: The same with the refined weights.
        passes: Number of passes whose weights are used; 0 if none was better than the start.
    """

    error_before: float
    error_after: float
    passes: int


class LayerRefiner:
    """Fits the kept weights of each layer to the hidden states of the dense model.

    The loss is the squared error of the hidden states after the layer relative to the squares of
    the dense model's, averaged over the tokens. The layer receives the hidden states of the pruned
    model, so it also compensates for errors of the layers before it.

    Call `begin` while a layer is dense, and `refine_` once it is pruned, before the pass over the
    pruned model advances.

    Sources: layer-wise reconstruction with a fixed mask as in BRECQ (Li et al. 2021, arXiv
    2102.05426) and SAFE (Lee et al. 2025, ICML); a region with a nonlinearity instead of single
    matrices as in arXiv 2510.14444.

    Args:
        view: The model.
        layerwise: The pass over the pruned model, whose batches are the steps.
        passes: Number of passes over the calibration set, at least 1.
        learning_rate: Rate of the first step after the warm-up, relative to the root mean square of
            the kept weights of a parameter. It falls linearly to 0.
        seed: Seed of the order of the batches.
    """

    def __init__(
        self,
        view: ModelView,
        layerwise: LayerwisePass,
        passes: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self._view = view
        self._layerwise = layerwise
        self._passes = passes
        self._learning_rate = learning_rate
        self._seed = seed
        batches = layerwise.batches
        self._dense_hidden = [batch.hidden for batch in batches]
        self._dense_shared = [copy.copy(batch.shared) for batch in batches]
        # Batches are sorted by length: every eighth one, so that all lengths are left out.
        positions = range(len(batches))
        self._left_out = list(positions[min(LEFT_OUT, len(batches)) // 2 :: LEFT_OUT])
        self._fitted = [position for position in positions if position not in self._left_out]
        self._fitted = self._fitted or self._left_out  # a single batch

    def begin(self, index: int) -> None:
        """Compute the outputs of layer `index` in the dense model, which are the target."""
        with onloaded(self._view.layers[index]):
            self._dense_hidden = [
                self._layerwise.run(index, *dense)
                for dense in zip(
                    self._layerwise.batches, self._dense_hidden, self._dense_shared, strict=True
                )
            ]

    def refine_(self, index: int, matrices: Iterable[Matrix]) -> Refinement:
        """Refine the weights of layer `index` that are not zero, in place.

        Args:
            index: The layer, with its pruned weights.
            matrices: Its pruned matrices. All other parameters stay as they are.

        Returns:
            The errors before and after.
        """
        matrices = list(matrices)
        layer = self._view.layers[index]
        with onloaded(layer), without_parameter_grads(layer):
            weights = _TrainableWeights(self._view, matrices, self._learning_rate)
            refinement, values = self._best(index, weights)
        # Only now, because weights that are offloaded are stored elsewhere.
        for matrix in matrices:
            refined = self._view.in_orientation(matrix, matrix.of(values[matrix.parameter]))
            self._view.writable_weights(matrix).copy_(refined)
        return refinement

    def _best(
        self, index: int, weights: "_TrainableWeights"
    ) -> tuple[Refinement, dict[str, torch.Tensor]]:
        """Take all steps; return the best result and its parameters by name."""
        error_before = best = self._error(index)
        values, best_pass = weights.copy(), 0
        order = np.random.default_rng([self._seed, index])
        steps = self._passes * len(self._fitted)
        step = 0
        for number in range(1, self._passes + 1):
            for position in order.permutation(len(self._fitted)).tolist():
                with torch.enable_grad():
                    loss = self._errors(index, self._fitted[position]).mean()
                weights.step_(loss, _rate(step, steps))
                step += 1
            error = self._error(index)
            if not math.isfinite(error):
                break
            if error < best:
                best, values, best_pass = error, weights.copy(), number
        weights.disable_gradients()
        return Refinement(error_before, best, best_pass), values

    def _error(self, index: int) -> float:
        """Return the error on the batches that are left out."""
        errors = [self._errors(index, position) for position in self._left_out]
        return float(torch.cat(errors).double().mean())

    def _errors(self, index: int, position: int) -> torch.Tensor:
        """Return the relative error of each real token of a batch, float32 `[positions]`."""
        batch = self._layerwise.batches[position]
        # The layer may add keys and values for later layers, which must not stay.
        output = self._layerwise.run(index, batch, batch.hidden, copy.copy(batch.shared))
        target = self._dense_hidden[position]
        real = batch.batch.real.to(output.device)
        return relative_errors(output[..., real, :], target[..., real, :])


def relative_errors(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each token relative to the square of its target.

    Args:
        hidden: Hidden states, `[..., tokens, hidden]`.
        target: Those of the dense model.

    Returns:
        float32 `[tokens]`.
    """
    of_tokens = tuple(dim for dim in range(hidden.ndim) if dim != hidden.ndim - 2)
    target = target.float()
    squares = target.square().sum(dim=of_tokens)
    errors = (hidden.float() - target).square().sum(dim=of_tokens)
    return errors / squares.clamp(min=torch.finfo(torch.float32).tiny)


class _TrainableWeights:
    """The weights of matrices that are not zero, with gradients and optimizer states.

    Args:
        view: The model, with the layer of the matrices in memory.
        matrices: The matrices.
        learning_rate: Learning rate relative to the root mean square of the weights of a parameter.
    """

    def __init__(self, view: ModelView, matrices: list[Matrix], learning_rate: float) -> None:
        names = dict.fromkeys(matrix.parameter for matrix in matrices)
        self._parameters = {name: view.model.get_parameter(name) for name in names}
        self._masks = {
            name: torch.zeros_like(parameter, dtype=torch.bool)
            for name, parameter in self._parameters.items()
        }
        for matrix in matrices:
            mask, parameter = self._masks[matrix.parameter], self._parameters[matrix.parameter]
            matrix.of(mask).copy_(matrix.of(parameter.data) != 0)
        # float32, even if the layer computes in half precision; shared with the parameter if not.
        self._masters = {
            name: parameter.data.float() for name, parameter in self._parameters.items()
        }
        self._rates = [
            learning_rate * _root_mean_square(master, self._masks[name])
            for name, master in self._masters.items()
        ]
        groups = [{"params": [master], "lr": 0.0} for master in self._masters.values()]
        self._optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON, fused=True)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def step_(self, loss: torch.Tensor, rate: float) -> None:
        """Take a step down the gradient of `loss`, with a fraction `rate` of the learning rate."""
        parameters = list(self._parameters.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for (name, master), gradient in zip(self._masters.items(), gradients, strict=True):
            # Weights whose gradients are always 0 do not move, so zeros stay zeros.
            master.grad = None if gradient is None else gradient.float().mul_(self._masks[name])
        for group, of_group in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * of_group
        self._optimizer.step()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._masters[name])

    def copy(self) -> dict[str, torch.Tensor]:
        """Return a copy of the parameters, float32."""
        return {name: master.clone() for name, master in self._masters.items()}

    def disable_gradients(self) -> None:
        """Treat the parameters like all others again."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)


def _root_mean_square(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the root mean square of the values where `mask` is True."""
    return math.sqrt(float((values * mask).square().sum()) / max(1, int(mask.sum())))


def _rate(step: int, steps: int) -> float:
    """Return the fraction of the learning rate of a step: it rises quickly and falls to 0."""
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * (1 - step / steps)
