"""What must hold of a class for CAP to support it, tried on a small random model of it."""

import copy
import multiprocessing
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helpers.every_architecture import small_model
from helpers.pruning_runs import pruned
from helpers.score_runs import examples
from optimum_cap.models import projections_left_dense
from optimum_cap.models.architectures import decoder_of
from optimum_cap.models.hooks import (
    hidden_states_of,
    masked_unit,
    recorded_calls,
    streams_first,
)
from optimum_cap.models.left_dense import DenseProjection
from optimum_cap.models.modes import evaluation_mode
from optimum_cap.models.sites import Site, WeightSlice
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.first_batch import check_first_batch
from optimum_cap.scoring.exact import exact_losses, why_not_by_layers
from optimum_cap.scoring.plain import plain_losses

RECIPES = ("wanda", "sparsegpt", "causal")
SECONDS = 300  # that the checks of a class may take


@dataclass
class Support:
    """What was found of one class.

    Attributes:
        kind: Its `model_type`.
        name: Name of the class.
        sites: Number of sites by kind, of which the heads are `heads`.
        heads: Number of heads.
        dense: The share of the linear weights of the decoder that stays dense, and their names.
        scoring: `"layers"` if masked streams start in the middle of the model, else `"passes"`.
        part: Why only recipes work that do not go layer by layer; empty if all do.
        problem: The first check that failed; empty if none did.
        refused: Why nothing can be pruned; empty if something can.
        not_built: Why there is no small model of it.
    """

    kind: str
    name: str = ""
    sites: dict[str, int] = field(default_factory=dict)
    heads: int = 0
    dense: tuple[float, list[str]] = (0.0, [])
    scoring: str = ""
    part: str = ""
    problem: str = ""
    refused: str = ""
    not_built: str = ""


def support_of(kind: str) -> Support:
    """Try everything on a small model of a class."""
    found = Support(kind)
    try:
        model = small_model(kind)
    except Exception as error:
        found.not_built = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return found
    found.name = type(model).__name__
    try:
        view = ModelView.of(model, mlp_unit_size=8)
    except ValueError as error:
        found.refused = str(error)
        return found
    if not view.sites:
        found.refused = "it has no sites"
        return found
    for site in view.sites:
        found.sites[site.kind] = found.sites.get(site.kind, 0) + 1
    found.heads = len(view.heads)
    left = projections_left_dense(view, view.matrices)
    total = sum(view.oriented(matrix).numel() for matrix in view.matrices)
    weights = sum(each.weights for each in left)
    found.dense = weights / (total + weights), [each.name for each in left]
    heads_only = view.with_sites(set())
    found.scoring = "passes" if why_not_by_layers(heads_only) else "layers"
    try:
        check_first_batch(view, examples(), layer_by_layer=True)
    except ValueError as error:
        found.part = str(error)
    checks: list[Callable[[], None]] = [
        lambda: _everything_is_named(view, left),
        lambda: _masks_equal_zeroed_columns(view),
        lambda: _regions_move_their_units(view),
        lambda: _prunes(model, recipe="magnitude"),
    ]
    if not any(site.looks_ahead for site in view.sites):
        checks += [lambda: _exact_is_plain(view), lambda: _prunes_by_scores(view)]
    if not found.part:
        checks.append(lambda: _a_walk_is_the_model(view))
        checks += [lambda recipe=recipe: _prunes(model, recipe=recipe) for recipe in RECIPES]
    for check in checks:
        try:
            check()
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            where = [line.strip() for line in lines if line.strip().startswith("File")][-2:]
            text = " ".join(str(error).split())
            found.problem = f"{type(error).__name__}: {text[:300]} {where}"
            break
    return found


def _everything_is_named(view: ModelView, left: list[DenseProjection]) -> None:
    """Every linear weight of the decoder is prunable, named as dense, or a router."""
    _, decoder = decoder_of(view.model)
    # By identity: layers may share parameters.
    prunable = {id(view.model.get_parameter(matrix.parameter)) for matrix in view.matrices}
    known = [re.sub(r"\.weight$", "", each.name) for each in left]
    for path, module in decoder.named_modules():
        if module is view.model.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in prunable:
            plain = re.sub(r"\.\d+(?=\.|$)", "", path)
            is_router = re.search(r"(^|\.)(\w*gate|\w*router)(\.|$)", path)
            assert is_router or any(plain.endswith(each) for each in known), f"{path} is not named"


IDS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def _one_of_each(view: ModelView) -> Iterator[Site]:
    seen = set()
    for site in view.sites:
        if (key := (re.sub(r"\d+", "", site.name), site.width, len(site.units))) not in seen:
            seen.add(key)
            yield site


@contextmanager
def _changed(
    model: PreTrainedModel, pieces: tuple[WeightSlice, ...], factor: float
) -> Iterator[None]:
    """Multiply slices of weights in this context."""
    names = {piece.parameter for piece in pieces}
    saved = {name: model.get_parameter(name).detach().clone() for name in names}
    with torch.no_grad():
        for piece in pieces:
            piece.of(model.get_parameter(piece.parameter)).mul_(factor)
        yield
        for name, value in saved.items():
            model.get_parameter(name).copy_(value)


def _masks_equal_zeroed_columns(view: ModelView) -> None:
    intact = _logits(view.model)
    for site in _one_of_each(view):
        for unit in (site.units[0], site.units[-1]):
            with masked_unit(view.model, site, unit):
                masked = _logits(view.model)
            with _changed(view.model, unit.region[:1], 0):
                expected = _logits(view.model)
            torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)
            is_reached = site.expert is None
            assert not is_reached or not torch.equal(masked, intact), f"{site.name} has no effect"


def _regions_move_their_units(view: ModelView) -> None:
    """Rows that belong to one unit move its channels and no other ones."""
    for site in _one_of_each(view):
        if site.expert is not None or len(site.units) == 1:
            continue
        intact = _inputs(view, site)
        for unit in (site.units[0], site.units[len(site.units) // 2], site.units[-1]):
            rows = unit.separable[1:]
            if not rows:
                continue
            with _changed(view.model, rows, 1.5):
                moved = (_inputs(view, site) - intact).abs().flatten(0, -2).amax(dim=0)
            scale = float(intact.abs().max())
            inside = torch.zeros_like(moved, dtype=torch.bool)
            inside[slice(*unit.channels)] = True
            assert float(moved[~inside].max()) <= 1e-5 * scale, f"{site.name} unit {unit.index}"
            assert float(moved[inside].max()) > 0, f"{site.name} unit {unit.index} did not move"


def _inputs(view: ModelView, site: Site) -> torch.Tensor:
    """Return what the output projection receives when it runs first: some models loop."""
    received: list[torch.Tensor] = []
    projection = view.model.get_submodule(site.projection)
    handle = projection.register_forward_pre_hook(lambda _, args: received.append(args[0].clone()))
    _logits(view.model)
    handle.remove()
    return received[0]


def _a_walk_is_the_model(view: ModelView) -> None:
    """Layers that run one at a time, on a padded batch, give the hidden states of the model."""
    rows = examples(3)
    with evaluation_mode(view.model), torch.no_grad():
        layerwise = LayerwisePass(view, rows)
        for index in range(len(view.layers)):
            layerwise.advance(index)
        last = {"": view.layers[-1]}
        for batch in layerwise.batches:
            for row, position in enumerate(batch.batch.positions):
                ids = rows[position].input_ids[None]
                with recorded_calls(last) as calls:
                    view.model(input_ids=ids, use_cache=False)
                output = hidden_states_of(calls[""].output)
                expected = streams_first(output, view.output_templates[-1])[..., 0, :, :]
                found = batch.hidden[..., row, : ids.shape[1], :]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _exact_is_plain(view: ModelView) -> None:
    rows, units = examples(3), view.units("heads")
    if units:
        found, expected = (method(view, rows, units) for method in (exact_losses, plain_losses))
        torch.testing.assert_close(found.masked, expected.masked, rtol=1e-3, atol=1e-4)
    whole = ModelView.of(view.model)
    found, expected = (method(whole, rows) for method in (exact_losses, plain_losses))
    torch.testing.assert_close(found.masked, expected.masked, rtol=1e-3, atol=1e-4)


def _prunes_by_scores(view: ModelView) -> None:
    """The paper's recipe prunes, or says that nothing can be scored."""
    refusal = ""
    try:
        _prunes(view.model, recipe="paper")
    except ValueError as error:
        if view.units("heads"):
            raise
        refusal = str(error)
    assert view.units("heads") or "no heads to score" in refusal, refusal


def _prunes(model: PreTrainedModel, **settings: Any) -> None:
    """Prune a copy to the sparsity that was asked for, save it, and load it again."""
    copied = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        before = {name: value.clone() for name, value in copied.state_dict().items()}
        pruned(copied, None, **{"sparsity": 0.5, **settings})
        record = copied.pruning_record
        assert record is not None
        if settings.get("pattern") is None:
            assert abs(record.sparsity - 0.5) < 0.01, f"{settings}: sparsity {record.sparsity}"
        assert _logits(copied).isfinite().all(), f"{settings}: logits are not finite"
        first = {id(each): name for name, each in copied.named_parameters()}
        changed = {
            first.get(id(value), name)
            for name, value in copied.state_dict(keep_vars=True).items()
            if not value.detach().equal(before[name])
        }
        names = {matrix.parameter for matrix in ModelView.of(copied).matrices}
        assert changed <= names, f"{settings} changed {sorted(changed - names)}"
        copied.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, value in copied.state_dict().items():
            assert again.state_dict()[name].equal(value), f"{settings}: {name} was not reloaded"


def support_in_process(kind: str) -> Support:
    """Return what `support_of` finds, in a process of its own with a time limit."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        os.environ["TQDM_DISABLE"] = "1"
        sender.send(asdict(support_of(kind)))

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return Support(**receiver.recv())
        return Support(kind, problem=f"not finished after {SECONDS} s")
    except EOFError:
        return Support(kind, problem=f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
