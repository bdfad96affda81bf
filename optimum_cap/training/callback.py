"""A callback for transformers' `Trainer` that keeps the zeros of a pruned model."""

from typing import Any

from transformers import TrainerCallback

from optimum_cap.training.sparsity import SparsityKeeper


class KeepSparsity(TrainerCallback):
    """Keep the zeros of a pruned model during training.

    Works with `Trainer` and trainers built on it (TRL's `SFTTrainer`, `DPOTrainer`), with any
    optimizer, gradient accumulation, mixed precision, DDP and FSDP. The masks take one bit per
    weight. See `keep_sparsity` for your own training loop.

    Raises:
        ValueError: When training begins, if the model has no zeros, has lost zeros since it was
            pruned, is offloaded, or has PEFT adapters.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[KeepSparsity()])
        trainer.train()
        trainer.save_model("tuned")  # a sparse checkpoint
    """

    def __init__(self) -> None:
        self._keeper: SparsityKeeper | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()  # left from an interrupted training run
        self._keeper = SparsityKeeper(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._keeper is not None:
            self._keeper.mask_gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._keeper is not None:
            self._keeper.mask_weights()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop keeping zeros, after a training run that did not finish."""
        if self._keeper is not None:
            self._keeper.remove()
        self._keeper = None
