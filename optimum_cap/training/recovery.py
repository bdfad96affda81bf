"""Recovery of a pruned model: a short distillation from the dense model that keeps the zeros."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import extract_model_from_parallel
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed
from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.data import (
    Batch,
    CalibrationExample,
    batches,
    build_calibration_set,
    check_token_ids,
    usable_tokenizer,
)
from optimum_cap.models import (
    ModelView,
    evaluation_mode,
    float32_on_cpu,
    hidden_states_of,
    longest_sequence,
    number_of_embeddings,
    plain_model,
    scored_logits,
)
from optimum_cap.progress import progress_bar
from optimum_cap.runtime import digest_of, examples_digest, machine, model_digest
from optimum_cap.text import public_name
from optimum_cap.training.callback import KeepSparsity
from optimum_cap.training.sparsity import (
    check_trainable,
    pruned_parameters,
    trained_parameters,
)

logger = logging.get_logger(__name__)

_EVALUATIONS = 5  # during a recovery
_PATIENCE = 2  # evaluations without an improvement
_HELD_OUT = 0.1  # of the examples
_MOST_HELD_OUT = 32  # examples, since evaluating them takes time from training
_FEWEST = 16  # examples
_LORA_RATE, _FULL_RATE = 1e-3, 1e-4
_OLDEST_ACCELERATE = "1.3"
_WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Recovery:
    """The result of a recovery.

    Attributes:
        model: The model.
        steps: Number of training steps.
        best_step: The step with the lowest divergence, whose weights were used.
        divergence_before, divergence_after: Kullback-Leibler divergence of the predictions from
            those of the dense model on held-out examples, in nats per scored token; the second with
            the weights cast back to their dtype.
    """

    model: PreTrainedModel
    steps: int
    best_step: int
    divergence_before: float
    divergence_after: float


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: Any,
    *,
    dataset: Any = "gsm8k",
    steps: int = 200,
    batch_size: int = 4,
    num_samples: int = 512,
    learning_rate: float | None = None,
    lora_rank: int | None = None,
    hidden_states: float = 0.0,
    scored_tokens: str = "answer",
    max_length: int | None = None,
    seed: int = 0,
    resume_dir: str | Path | None = None,
) -> Recovery:
    """Train a pruned model for a few steps to reproduce the dense model's predictions.

    The loss is the Kullback-Leibler divergence of its predictions from those of the dense model
    (knowledge distillation, arXiv 1503.02531) at scored tokens. Pruned weights stay zero; a model
    that has lost parts, such as layers, keeps its smaller shape. A tenth of the examples, at most
    32, is held out; the divergence on them is measured about five times. Training stops early if it
    no longer falls, and the weights with the lowest divergence are used. The optimizer is AdamW
    with a cosine schedule down to 0, in float32 (with bfloat16 autocast on GPUs that support it);
    the weights are cast back to their dtype at the end.

    Args:
        model: A pruned model, changed in place.
        dense: The model before pruning; it is not changed.
        tokenizer: Its tokenizer.
        dataset: Data as for `CAPConfig`, for example answers written by `cap generate`.
        steps: Number of steps.
        batch_size: Examples per step.
        num_samples: Total number of examples, including the held-out ones.
        learning_rate: Peak learning rate; `None` is 1e-4, or 1e-3 with LoRA.
        lora_rank: Instead of all weights, train and merge adapters of this rank that keep zeros
            (`SparseLoraConfig`). Takes less memory; needs `peft`.
        hidden_states: Weight of an additional loss term: the relative squared error of the hidden
            states after each layer to those of the dense model, averaged over the layers.
        scored_tokens: `"answer"` or `"all"`.
        max_length: Longest example, in tokens; longer ones are skipped.
        seed: Seed for the choice and the order of examples.
        resume_dir: Folder for intermediate states, from which an interrupted recovery resumes when
            called again with the same arguments.

    Raises:
        ValueError: The model has no zeros or has lost some, the models do not match, an argument is
            out of range, or training did not help. The model is then unchanged.
        ImportError: `peft`, which `lora_rank` needs, or accelerate 1.3, which transformers' Trainer
            needs, is not installed.

    Example:
        recovery = recover(pruned, dense, tokenizer, dataset="gsm8k", steps=200)
        recovery.model.save_pretrained("recovered")
    """
    check_recovery_settings(steps, batch_size, num_samples, learning_rate, lora_rank, hidden_states)
    if Version(accelerate.__version__) < Version(_OLDEST_ACCELERATE):
        raise ImportError(
            f"recover uses the Trainer of transformers, which needs accelerate {_OLDEST_ACCELERATE}"
            f", but {accelerate.__version__} is installed: pip install -U accelerate"
        )
    student, dense = plain_model(model), plain_model(dense)
    check_trainable(student)
    if not _has_lost_parts(student):
        if lora_rank is None:
            trained_parameters(student)
        elif not _adaptable(student):
            raise ValueError(
                f"this {type(student).__name__} has no linear layers with zeros to adapt: leave "
                "lora_rank out if it has pruned experts, else there is nothing to recover"
            )
    _check_belong_together(student, dense, hidden_states > 0)
    config = CAPConfig(
        sparsity=0.5,  # required, but not used
        dataset=dataset,
        num_samples=num_samples,
        scored_tokens=scored_tokens,
        max_length=max_length,
        seed=seed,
    )
    calibration = build_calibration_set(config, tokenizer, max_length=longest_sequence(student))
    examples = calibration.examples
    ids = [example.input_ids for example in examples]
    check_token_ids(usable_tokenizer(tokenizer), ids, number_of_embeddings(student))
    rate = learning_rate or (_LORA_RATE if lora_rank else _FULL_RATE)
    settings = (steps, batch_size, rate, lora_rank, hidden_states, seed)
    with _output_folder(student, dense, examples, settings, resume_dir) as folder:
        start = folder / "start.safetensors"
        if not start.exists():
            _write_weights(start, dict(student.named_parameters()))
        try:
            with _in_float32(student) as dtypes, float32_on_cpu(dense):
                recovery = _distil(student, dense, examples, folder, settings, dtypes)
        except BaseException as error:
            _read_weights(start, dict(student.named_parameters()))
            if isinstance(error, _NoGainError):  # repeating it would not help either
                shutil.rmtree(folder, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                hint = "no resume_dir was set, so it must start over"
                if resume_dir is not None:
                    hint = f"its states are stored in {folder}; repeat it to resume"
                logger.warning(f"recovery stopped: the model is as before; {hint}")
            raise
    if resume_dir is not None:
        _clear_when_saved(student, folder)
    record = getattr(student, "pruning_record", None)
    if record is not None:
        details = {
            "dense": public_name(dense.name_or_path),
            "steps": recovery.best_step,
            "batch_size": batch_size,
            "learning_rate": rate,
            "lora_rank": lora_rank,
            "hidden_states": hidden_states,
            "divergence_before": recovery.divergence_before,
            "divergence_after": recovery.divergence_after,
            "calibration": calibration.record,
        }
        student.pruning_record = dataclasses.replace(record, recovery=[*record.recovery, details])
    return recovery


class _NoGainError(ValueError):
    """Training did not bring the model closer to the dense one."""


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[dict[int, torch.dtype]]:
    """Keep weights in float32 during training, and restore what `Trainer` changes in a model.

    Buffers keep their dtype, because `from_pretrained` leaves some in float32 in any model.

    Yields:
        The original dtypes of the weights, by `id`, to which they return afterwards.
    """
    training, cache = model.training, getattr(model.config, "use_cache", None)
    dtypes = {id(weight): weight.dtype for weight in model.parameters()}
    requires_grad = {id(weight): weight.requires_grad for weight in model.parameters()}
    for weight in model.parameters():
        weight.data = weight.data.float()
    try:
        yield dtypes
    finally:
        for weight in model.parameters():
            weight.data = weight.data.to(dtypes[id(weight)])
            weight.requires_grad = requires_grad[id(weight)]
            weight.grad = None
        model.train(training)
        if cache is not None:
            model.config.use_cache = cache


def _clear_when_saved(model: PreTrainedModel, folder: Path) -> None:
    """Delete the states of a recovery once its result has been saved."""
    saving = model.__dict__.get("save_pretrained")
    if saving is None:
        return
    before = saving.state.when_saved

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if before is not None:
            before()

    saving.state.when_saved = clear


def check_recovery_settings(
    steps: int,
    batch_size: int,
    num_samples: int,
    learning_rate: float | None,
    lora_rank: int | None,
    hidden_states: float,
) -> None:
    """Check the numeric arguments of `recover`.

    Raises:
        ValueError: One of them is out of range.
    """
    least = {
        "steps": (steps, 1),
        "batch_size": (batch_size, 1),
        "num_samples": (num_samples, _FEWEST),
        "lora_rank": (1 if lora_rank is None else lora_rank, 1),
    }
    for name, (value, smallest) in least.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate must be between 0 and 1, got {learning_rate!r}")
    if not 0 <= hidden_states < float("inf"):
        raise ValueError(f"hidden_states must be a weight of at least 0, got {hidden_states!r}")


def _has_lost_parts(model: PreTrainedModel) -> bool:
    """Return whether a pruned model is smaller than the dense one, according to its record."""
    record = getattr(model, "pruning_record", None)
    return record is not None and bool(record.removed or record.compacted)


def _check_belong_together(
    student: PreTrainedModel, dense: PreTrainedModel, by_hidden_states: bool
) -> None:
    if student is dense:
        raise ValueError("the pruned and the dense model are the same object: load the dense one")
    if _has_lost_parts(student):
        _check_same_outputs(student, dense, by_hidden_states)
        return
    ours, theirs = (
        {name: tuple(weight.shape) for name, weight in each.named_parameters()}
        for each in (student, dense)
    )
    if ours != theirs:
        name = sorted(dict(ours.items() ^ theirs.items()))[0]
        raise ValueError(
            f"the dense {type(dense).__name__} is not the model that was pruned: {name} is "
            f"{theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} in the pruned "
            f"{type(student).__name__}: name the model that it was made of"
        )


def _check_same_outputs(
    student: PreTrainedModel, dense: PreTrainedModel, by_hidden_states: bool
) -> None:
    """Check that a model that has lost parts matches the dense one where it must."""
    if type(student) is not type(dense):
        raise ValueError(
            f"the dense model is a {type(dense).__name__}, but the pruned one a "
            f"{type(student).__name__}: name the model that it was made of"
        )
    sizes = [number_of_embeddings(each) for each in (student, dense)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the dense model has {sizes[1]} embeddings, but the pruned one {sizes[0]}: name the "
            "model that it was made of"
        )
    layers = [len(ModelView.of(each).layers) for each in (student, dense)]
    if by_hidden_states and layers[0] != layers[1]:
        raise ValueError(
            f"hidden_states compares the models layer by layer, but {layers[1] - layers[0]} of "
            f"{layers[1]} layers were removed: leave it out"
        )


@contextmanager
def _output_folder(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    examples: list[CalibrationExample],
    settings: tuple[Any, ...],
    resume_dir: str | Path | None,
) -> Iterator[Path]:
    """Yield a folder for training states: one of the run's own, or a temporary one."""
    if resume_dir is None:
        with tempfile.TemporaryDirectory(prefix="optimum-cap-recovery-") as temporary:
            yield Path(temporary)
        return
    subject = digest_of(
        machine(student), model_digest(student), model_digest(dense), examples_digest(examples)
    )
    folder = Path(resume_dir) / "recovery" / digest_of(subject, *settings)[:24]
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _write_weights(file: Path, weights: dict[str, Any]) -> None:
    """Write weights by name, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    save_file({name: each.detach().contiguous() for name, each in weights.items()}, unfinished)
    unfinished.replace(file)


@torch.no_grad()
def _read_weights(file: Path, weights: dict[str, Any]) -> None:
    """Read weights by name into tensors, in place."""
    saved = load_file(file)
    for name, weight in weights.items():
        weight.copy_(saved[name])


def _adaptable(student: PreTrainedModel) -> list[str]:
    """Return the names of the pruned linear layers."""
    return [
        name.removesuffix(".weight")
        for name, weight in pruned_parameters(student).items()
        if weight.ndim == 2 and name.endswith(".weight") and (weight == 0).any()
    ]


def _with_adapters(student: PreTrainedModel, rank: int) -> Any:
    """Return the student with sparse adapters in all pruned layers.

    A model that has lost parts gets them in all linear layers.
    """
    from peft import get_peft_model

    from optimum_cap.training.sparse_lora import SparseLoraConfig

    targets = "all-linear" if _has_lost_parts(student) else _adaptable(student)
    config = SparseLoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return get_peft_model(student, config)


def _trainer(
    trained: Any,
    student: PreTrainedModel,
    dense: PreTrainedModel,
    examples: list[CalibrationExample],
    folder: Path,
    settings: tuple[Any, ...],
) -> "DistillationTrainer":
    steps, batch_size, rate, lora_rank, hidden_states, seed = settings
    held_out = min(max(4, round(_HELD_OUT * len(examples))), _MOST_HELD_OUT)
    every = max(1, steps // _EVALUATIONS)
    on_gpu = student.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item is a batch
        per_device_eval_batch_size=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 10),
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        seed=seed,
        dataloader_pin_memory=False,
    )
    # Private attribute: with several GPUs, Trainer would split the batches over them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    set_seed(seed)
    progress, keep_sparsity = _Progress(), KeepSparsity()
    callbacks: list[Any] = [EarlyStoppingCallback(_PATIENCE), progress]
    if lora_rank is None and any(
        (weight == 0).any() for weight in pruned_parameters(student).values()
    ):
        callbacks.append(keep_sparsity)
    trainer = DistillationTrainer(
        model=trained,
        args=arguments,
        train_dataset=batches(examples[held_out:], batch_size),
        eval_dataset=batches(examples[:held_out], batch_size),
        data_collator=_only_item,
        callbacks=callbacks,
        student=student,
        dense=dense,
        hidden_states=hidden_states,
        when_ended=[progress.close, keep_sparsity.remove],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):
    """Progress bars for training, with the divergence on held-out examples, and for measuring it.

    They replace those of `Trainer`, which print its log to stdout, reserved for results.
    """

    def __init__(self) -> None:
        self._steps: Any = None
        self._measuring: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = progress_bar(
            total=state.max_steps, initial=state.global_step, desc="Recovering", unit="step"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.update()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._measuring is None:
            self._measuring = progress_bar(
                total=len(kwargs["eval_dataloader"]), desc="Measuring", unit="batch", leave=False
            )
        self._measuring.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measuring.close()
        self._measuring = None
        if self._steps is not None:
            self._steps.set_postfix(divergence=f"{kwargs['metrics']['eval_loss']:.4f}")

    def close(self) -> None:
        """Close open bars, also after a training run that did not finish."""
        for bar in (self._measuring, self._steps):
            if bar is not None:
                bar.close()
        self._measuring = self._steps = None


def _only_item(items: list[Batch]) -> dict[str, Batch]:
    [batch] = items
    return {"batch": batch}


def _distil(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    examples: list[CalibrationExample],
    folder: Path,
    settings: tuple[Any, ...],
    dtypes: dict[int, torch.dtype],
) -> Recovery:
    """Train the student in float32, select the best weights, and round them to their dtypes."""
    lora_rank = settings[3]
    trained = _with_adapters(student, lora_rank) if lora_rank else student
    try:
        trainer = _trainer(trained, student, dense, examples, folder, settings)
        try:
            before, steps, best = _best_weights(trainer, folder)
        finally:
            trainer.end()
        if lora_rank:
            trained.merge_and_unload()  # the adapters are sparse where the weights are
    except BaseException:
        if lora_rank:
            trained.unload()
        raise
    for weight in student.parameters():
        weight.data = weight.data.to(dtypes[id(weight)]).float()
    after = trainer.evaluate()["eval_loss"]
    trainer.end()
    if not after < before:
        raise _NoGainError(
            f"{steps} steps did not bring the model closer to the dense one (divergence "
            f"{before:.4f} before, {after:.4f} at best), so it is unchanged: change the learning "
            "rate, train longer, or, if the weights have 16 bits, load the model in float32"
        )
    return Recovery(student, steps, best, before, after)


def _best_weights(trainer: "DistillationTrainer", folder: Path) -> tuple[float, int, int]:
    """Train or resume; return the divergence before, the number of steps, and the best step."""
    before_file, end_file = folder / "before.json", folder / "end.json"
    best_file = folder / "best.safetensors"
    if end_file.exists():  # training had finished, but the result was not saved
        _read_weights(best_file, trainer.trained_weights())
        steps, best = json.loads(end_file.read_text())
        return json.loads(before_file.read_text()), steps, best
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint is None:
        before: float = trainer.evaluate()["eval_loss"]
        before_file.write_text(json.dumps(before))
    else:
        logger.warning(f"resuming the recovery from {checkpoint}")
        before = json.loads(before_file.read_text())
    trainer.train(resume_from_checkpoint=checkpoint)
    steps = trainer.state.global_step
    best = int(Path(trainer.state.best_model_checkpoint or "-0").name.rpartition("-")[2])
    _write_weights(best_file, trainer.trained_weights())
    end_file.write_text(json.dumps([steps, best]))
    return before, steps, best


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is the divergence from the predictions of a dense model.

    Its checkpoints store the trained weights under the model's own names, because `Trainer` would
    read them from files written by `save_pretrained`, where fused experts have other names.
    """

    def __init__(
        self,
        *args: Any,
        student: PreTrainedModel,
        dense: PreTrainedModel,
        hidden_states: float,
        when_ended: list[Callable[[], None]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.when_ended = when_ended
        self.student = student
        self.dense = dense
        self.hidden_states = hidden_states
        held_out: Any = self.eval_dataset
        self.mean_tokens = sum(int(batch.scored.sum()) for batch in held_out) / len(held_out)
        self.views = (ModelView.of(student), ModelView.of(dense)) if hidden_states else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch: the divergence, plus the hidden-state error if requested."""
        divergence, error = self._divergence(inputs["batch"])
        loss = divergence + self.hidden_states * error
        return (loss, {}) if return_outputs else loss

    def _divergence(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the divergence in nats per scored token, and the error of hidden states."""
        with evaluation_mode(self.dense), self._autocast(), self._captured(1) as dense_states:
            expected = scored_logits(self.dense, batch)
        with self._autocast(), self._captured(0) as states:
            logits = scored_logits(self.student, batch)
        log_probabilities = logits.float().log_softmax(-1)
        divergence = nn.functional.kl_div(
            log_probabilities,
            expected.to(logits.device).float().log_softmax(-1),
            reduction="sum",
            log_target=True,
        ) / len(logits)
        error = _relative_error(states, dense_states, batch) if self.views is not None else 0.0
        return divergence, error

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, None, None]:
        """Return the divergence of a held-out batch.

        It is weighted so that `Trainer`'s mean over batches is a mean over their scored tokens.
        """
        batch: Batch = inputs["batch"]
        with torch.no_grad():
            divergence, _ = self._divergence(batch)
        return divergence * (int(batch.scored.sum()) / self.mean_tokens), None, None

    def _autocast(self) -> torch.autocast:
        """Compute in bfloat16 on GPUs that support it; `Trainer` would do so for one model only."""
        device = self.student.device.type
        enabled = device == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    @contextmanager
    def _captured(self, which: int) -> Iterator[list[torch.Tensor]]:
        """Collect the hidden states after each layer of a model."""
        states: list[torch.Tensor] = []
        handles = []
        if self.views is not None:
            handles = [
                layer.register_forward_hook(
                    lambda module, args, output: states.append(hidden_states_of(output))
                )
                for layer in self.views[which].layers
            ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights, by name."""
        return {
            name: weight.detach()
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    def end(self) -> None:
        """Remove the hooks and accelerate's wrappers from the model."""
        for callback in self.when_ended:
            callback()
        extract_model_from_parallel(self.model, keep_fp32_wrapper=False)
        for model in (self.model, self.student):
            model.__dict__.pop("_is_accelerate_prepared", None)

    # Private methods, because Trainer has no public way to choose what its checkpoints contain.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        file = Path(output_dir or self.args.output_dir) / _WEIGHTS
        _write_weights(file, self.trained_weights())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _read_weights(Path(resume_from_checkpoint) / _WEIGHTS, self.trained_weights())

    def _load_best_model(self) -> None:
        file = Path(self.state.best_model_checkpoint or "") / _WEIGHTS
        _read_weights(file, self.trained_weights())


def _relative_error(
    states: list[torch.Tensor], expected: list[torch.Tensor], batch: Batch
) -> torch.Tensor:
    """Return the relative squared error of hidden states, averaged over the layers."""
    errors = []
    for state, target in zip(states, expected, strict=True):
        real = batch.real.to(state.device)
        ours, theirs = state[real].float(), target.to(state.device)[real].float()
        errors.append((ours - theirs).square().sum() / theirs.square().sum())
    return torch.stack(errors).mean()
