"""Memory that runs out while units are scored."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.data.batches import Batch
from optimum_cap.models.sites import SiteUnit
from optimum_cap.models.view import ModelView
from optimum_cap.scoring.wavefront import Wavefront

OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    "python": MemoryError(),
}


def limit_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Let the masked streams of so many tokens raise `error`; return the list of what was tried."""
    tried = []

    class Limited(Wavefront):
        def __init__(
            self,
            view: ModelView,
            batch: Batch,
            torch_compile: bool,
        ) -> None:
            super().__init__(view, batch, torch_compile)
            self.tokens_of_a_stream = batch.input_ids.numel()

        def masked_losses(self, units: list[SiteUnit]) -> torch.Tensor:
            tried.append(len(units) * self.tokens_of_a_stream)
            if tried[-1] > tokens:
                raise error
            return super().masked_losses(units)

    monkeypatch.setattr("optimum_cap.scoring.chunks.Wavefront", Limited)
    return tried


def limit_gradients(model: PreTrainedModel, most: int) -> list[int]:
    """Let backward passes of more examples run out of memory; return the list of what was tried."""
    tried = []

    def limited(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            tried.append(len(args[0]))
            if len(args[0]) > most:
                raise OUT_OF_MEMORY["cuda"]

    model.model.layers[0].register_forward_pre_hook(limited)
    return tried
