"""Layouts of models that users register because they cannot be observed (`register_layout`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Layout:
    """A registered description of the decoder layers of one model type.

    Attributes:
        layers: Path of the list of decoder layers in the model.
        heads: Number of heads by the path of an output projection in its layer.
        linear: Classes of modules that compute `x @ weight.T`, plus a `bias` if they have one.
    """

    layers: str | None = None
    heads: Mapping[str, int] = field(default_factory=dict)
    linear: tuple[type[nn.Module], ...] = ()


_LAYOUTS: dict[str, Layout] = {}


def register_layout(
    model_type: str,
    *,
    layers: str | None = None,
    heads: Mapping[str, int] | None = None,
    linear: tuple[type[nn.Module], ...] = (),
) -> None:
    """Describe the decoder layers of a model type where CAP cannot detect something itself.

    The description is verified: when a model of this type is pruned, each class of `linear` must
    compute a product on a small weight, and each number of heads must match what is observed.

    Args:
        model_type: The `model_type` of the (text) config. A second call replaces the first.
        layers: Path of the list of decoder layers in the model, such as `"transformer.blocks"`.
        heads: Number of heads by path of an output projection in its layer, such as `{"mixer.out":
            16}`.
        linear: Classes of modules that are not subclasses of `nn.Linear`, but have a `weight`
            `[out, in]` and compute `x @ weight.T`, plus a `bias` `[out]` if they have one. They are
            constructed like `nn.Linear`, from `in_features` and `out_features`, and apply to all
            models.

    Raises:
        ValueError: An argument is invalid.

    Example:
        ```python
        optimum_cap.register_layout("my_model", heads={"mixer.out": 16})
        ```
    """
    heads = dict(heads or {})
    for name, count in heads.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise ValueError(
                f"heads[{name!r}] must be a number of heads from 2, got {count!r}: leave it out if "
                "the projection has no heads"
            )
    for kind in linear:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"linear must hold classes of torch modules, got {kind!r}")
    _LAYOUTS[model_type] = Layout(layers, heads, tuple(linear))


def layout_of(model_type: str) -> Layout:
    """Return the layout registered for a `model_type`, or an empty one."""
    return _LAYOUTS.get(model_type, Layout())


def registered_linear() -> tuple[type[nn.Module], ...]:
    """Return all classes registered as linear."""
    return tuple(kind for layout in _LAYOUTS.values() for kind in layout.linear)
