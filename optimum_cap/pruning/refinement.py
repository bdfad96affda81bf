"""Refinement: fits the kept weights of a whole pruned layer to the dense model's hidden states.

Solvers such as ALPS fit one matrix at a time to the outputs of that matrix. What matters is the
output of the layer, which depends on all its matrices and on the nonlinearities between them. After
a layer is pruned, `LayerRefiner` fits all its kept weights jointly, with a few passes of Adam over
the calibration set and fixed masks. No labels are used, and only one layer has gradients and
optimizer states at a time.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from optimum_cap.models import Matrix, ModelView, onloaded, without_parameter_grads
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.runtime import ALONE, LANES, ProcessGroup, lane_of

EXAMPLES_PER_STEP = 1
LEFT_OUT = 8  # one in this many pairs of examples is held out to decide when to stop
_BETAS, _EPSILON = (0.9, 0.95), 1e-12  # for Adam; gradients of relative errors are small
_WARM_UP = 0.1  # fraction of the steps


@dataclass(frozen=True)
class Refinement:
    """The result of refining a layer.

    Attributes:
        error_before: Error of the hidden states after the layer relative to those of the dense
            model, on the held-out batches, before the first step.
        error_after: The same with the refined weights.
        passes: Number of passes after which the used weights were taken; 0 if none improved.
    """

    error_before: float
    error_after: float
    passes: int


class LayerRefiner:
    """Fits the kept weights of each layer to the hidden states of the dense model.

    The loss is the squared error of the hidden states after the layer relative to the squares of
    the dense model's, averaged over the tokens. The layer receives the hidden states of the pruned
    model, so it also compensates for errors of the layers before it.

    Every pass starts from the same weights in each lane of the calibration set (`LANES`). Each lane
    takes its own steps with its own optimizer, one example at a time; then their weights are
    averaged. This lets several processes share the work and exchange weights once per pass. It is
    local SGD (Stich 2019, ICLR, arXiv 1805.09767); the average has less noise than the lanes.

    Call `begin` while a layer is dense, and `refine_` after pruning it, before the pass over the
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
        process_group: The processes that share the lanes.
    """

    def __init__(
        self,
        view: ModelView,
        layerwise: LayerwisePass,
        passes: int,
        learning_rate: float,
        seed: int,
        process_group: ProcessGroup = ALONE,
    ) -> None:
        self._view = view
        self._layerwise = layerwise
        self._passes = passes
        self._learning_rate = learning_rate
        self._seed = seed
        self._process_group = process_group
        # By batch number; batches of other processes' lanes are missing.
        self._batches = {
            batch.number: batch
            for batch in layerwise.batches
            if process_group.owns_lane(batch.lane)
        }
        self._dense_hidden = {number: batch.hidden for number, batch in self._batches.items()}
        self._dense_shared = {
            number: copy.copy(batch.shared) for number, batch in self._batches.items()
        }
        # Batches are sorted by length, so evenly spaced pairs cover all lengths and lanes.
        count = len(layerwise.planned)
        middle = min(LEFT_OUT, -(-count // LANES)) // 2
        self._left_out = [n for n in range(count) if n // LANES % LEFT_OUT == middle]
        fitted = [n for n in range(count) if n not in self._left_out]
        fitted = fitted or self._left_out  # if there are only one or two batches
        lanes = [[n for n in fitted if lane_of(n) == lane] for lane in range(LANES)]
        self._lanes = [lane for lane in lanes if lane]

    def begin(self, index: int) -> None:
        """Compute the target: the outputs of layer `index` in the dense model."""
        with onloaded(self._view.layers[index]):
            self._dense_hidden = {
                number: self._layerwise.run(
                    index, batch, self._dense_hidden[number], self._dense_shared[number]
                )
                for number, batch in self._batches.items()
            }

    def take_target(self, hidden: Mapping[int, torch.Tensor]) -> None:
        """Set the hidden states to which the next layer is fitted.

        Replaces `begin` if the dense model is a separate model.

        Args:
            hidden: `[..., examples, tokens, hidden]`, by batch number.
        """
        self._dense_hidden = {number: hidden[number] for number in self._batches}

    def refine_(self, index: int, matrices: Iterable[Matrix]) -> Refinement:
        """Refine the nonzero weights of layer `index` in place.

        Args:
            index: The layer, with its pruned weights.
            matrices: Its pruned matrices. Other parameters do not change.

        Returns:
            The errors before and after.
        """
        matrices = list(matrices)
        layer = self._view.layers[index]
        with onloaded(layer), without_parameter_grads(layer):
            weights = _TrainableWeights(self._view, matrices, self._learning_rate)
            refinement, values = self._best(index, weights)
        # Only now, because offloaded weights are stored elsewhere.
        for matrix in matrices:
            refined = self._view.in_orientation(matrix, matrix.of(values[matrix.parameter]))
            self._view.writable_weights(matrix).copy_(refined)
        return refinement

    def _best(
        self, index: int, weights: "_TrainableWeights"
    ) -> tuple[Refinement, dict[str, torch.Tensor]]:
        """Make all passes; return the best result and its parameters by name."""
        error_before = best = self._error(index)
        values, best_pass = weights.copy(), 0
        order = np.random.default_rng([self._seed, index])
        for number in range(self._passes):
            self._pass_(index, weights, number, order)
            error = self._error(index)
            if not math.isfinite(error):
                break
            if error < best:
                best, values, best_pass = error, weights.copy(), number + 1
        weights.disable_gradients()
        return Refinement(error_before, best, best_pass), values

    def _pass_(
        self, index: int, weights: "_TrainableWeights", number: int, order: np.random.Generator
    ) -> None:
        """Run the steps of pass `number` in every lane, and average the weights."""
        start, total = weights.copy(), weights.zeros()
        for lane, fitted in enumerate(self._lanes):
            permutation = order.permutation(fitted).tolist()
            if fitted[0] not in self._batches:  # another process's lane
                continue
            weights.load_(start)
            done, steps = number * len(fitted), self._passes * len(fitted)
            for step, batch in enumerate(permutation, start=done):
                with torch.enable_grad():
                    loss = self._errors(index, batch).mean()
                weights.step_(loss, _rate(step, steps), lane)
            weights.add_to_(total)
        for of_parameter in total.values():
            self._process_group.sum_(of_parameter)
            of_parameter /= len(self._lanes)
        weights.load_(total)

    def _error(self, index: int) -> float:
        """Return the error on the held-out batches."""
        own = {n: self._errors(index, n).cpu() for n in self._left_out if n in self._batches}
        all_errors: dict[int, torch.Tensor] = {}
        for errors in self._process_group.all_gather(own):
            all_errors |= errors
        return float(torch.cat([all_errors[n] for n in self._left_out]).double().mean())

    def _errors(self, index: int, number: int) -> torch.Tensor:
        """Return the relative error of each real token of a batch, float32 `[positions]`."""
        batch = self._batches[number]
        # The layer may add keys and values for later layers, which must not persist.
        output = self._layerwise.run(index, batch, batch.hidden, copy.copy(batch.shared))
        target = self._dense_hidden[number]
        real = batch.batch.real.to(output.device)
        return relative_errors(output[..., real, :], target[..., real, :])


def relative_errors(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each token relative to the square of its target.

    Args:
        hidden: Hidden states, `[..., tokens, hidden]`.
        target: Hidden states of the dense model.

    Returns:
        float32 `[tokens]`.
    """
    of_tokens = tuple(dim for dim in range(hidden.ndim) if dim != hidden.ndim - 2)
    target = target.float()
    squares = target.square().sum(dim=of_tokens)
    errors = (hidden.float() - target).square().sum(dim=of_tokens)
    return errors / squares.clamp(min=torch.finfo(torch.float32).tiny)


class _TrainableWeights:
    """The nonzero weights of matrices, with gradients and optimizer states.

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
        # float32 even if the layer computes in half precision; otherwise shared with the parameter.
        self._masters = {
            name: parameter.data.float() for name, parameter in self._parameters.items()
        }
        self._rates = [
            learning_rate * _root_mean_square(master, self._masks[name])
            for name, master in self._masters.items()
        ]
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def step_(self, loss: torch.Tensor, rate: float, lane: int) -> None:
        """Take a step down the gradient of a loss.

        Args:
            loss: The loss.
            rate: Fraction of the learning rate.
            lane: The lane, which has its own optimizer.
        """
        optimizer = self._optimizer(lane)
        parameters = list(self._parameters.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for (name, master), gradient in zip(self._masters.items(), gradients, strict=True):
            # Weights whose gradients are always 0 do not change, so zeros stay zero.
            master.grad = None if gradient is None else gradient.float().mul_(self._masks[name])
        for group, of_group in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * of_group
        optimizer.step()
        self._update_parameters()

    def _optimizer(self, lane: int) -> torch.optim.Optimizer:
        if lane not in self._optimizers:
            groups = [{"params": [master], "lr": 0.0} for master in self._masters.values()]
            self._optimizers[lane] = torch.optim.Adam(
                groups, betas=_BETAS, eps=_EPSILON, fused=True
            )
        return self._optimizers[lane]

    def _update_parameters(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._masters[name])

    def load_(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load values of the parameters, float32."""
        for name, master in self._masters.items():
            master.copy_(values[name])
        self._update_parameters()

    def copy(self) -> dict[str, torch.Tensor]:
        """Return a copy of the parameters, float32."""
        return {name: master.clone() for name, master in self._masters.items()}

    def zeros(self) -> dict[str, torch.Tensor]:
        """Return zeros in the shapes of the parameters, float32."""
        return {name: torch.zeros_like(master) for name, master in self._masters.items()}

    def add_to_(self, total: Mapping[str, torch.Tensor]) -> None:
        """Add the parameters to `total`, in place."""
        for name, master in self._masters.items():
            total[name] += master

    def disable_gradients(self) -> None:
        """Make the parameters ordinary ones again."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)


def _root_mean_square(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the root mean square of the values where `mask` is True."""
    return math.sqrt(float((values * mask).square().sum()) / max(1, int(mask.sum())))


def _rate(step: int, steps: int) -> float:
    """Return the fraction of the learning rate at a step: a quick rise, then a decay to 0."""
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * (1 - step / steps)
