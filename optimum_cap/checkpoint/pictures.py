"""Pictures of a pruning record as SVG, which browsers and the Hub show without a library."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

from optimum_cap.checkpoint.record import MatrixSparsity, count_zeros, short_names
from optimum_cap.text import printable

_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colors of the scale from low to high (viridis, bids.github.io/colormap)."""
_WIDTH = 720  # of a row with many cells, in pixels
_WIDEST, _NARROWEST, _HEIGHT = 24, 5, 20  # of a cell, in pixels
_CHARACTER = 7.2  # width of a character of the labels, in pixels
_TICKS = 12  # most columns with a number


def sparsity_picture(matrices: Sequence[MatrixSparsity], inline: bool = False) -> str:
    """Return a heat map of the sparsity by layer (columns) and projection (rows).

    Args:
        matrices: The pruned matrices, at least one.
        inline: Whether the picture becomes part of a page and its text takes the page's color;
            otherwise its text is black on white.
    """
    counts = count_zeros(matrices)
    projections = list(dict.fromkeys(projection for _, projection in counts))
    layers = sorted({layer for layer, _ in counts})
    cells = {
        (projections.index(projection), layers.index(layer)): zeros / total
        for (layer, projection), (zeros, total) in counts.items()
    }
    return heat_map(
        cells,
        rows=short_names(projections),
        columns=[str(layer) for layer in layers],
        title="Sparsity by layer and projection",
        form="{:.1%}",
        column_label="layer",
        inline=inline,
    )


def heat_map(
    cells: Mapping[tuple[int, int], float],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    form: str,
    column_label: str,
    inline: bool = False,
    logarithmic: bool = False,
) -> str:
    """Return a heat map as SVG, with a scale below it and cell values as tooltips.

    Args:
        cells: Value by the positions of row and column; other cells stay empty.
        rows: Label of each row.
        columns: Label of each column; as many are shown as fit.
        title: Title of the picture.
        form: Format of a value, such as `"{:.1%}"`.
        column_label: Label of the column axis.
        inline: As for `sparsity_picture`.
        logarithmic: Whether colors follow the logarithm of the values; the positive ones then
            determine the scale.
    """
    rows, columns = [printable(row) for row in rows], [printable(each) for each in columns]
    width = max(_NARROWEST, min(_WIDEST, _WIDTH // len(columns)))
    left = round(_CHARACTER * max(len(row) for row in rows)) + 16
    bottom = _HEIGHT * len(rows)
    low, high = min(cells.values()), max(cells.values())
    position = partial(_position, low=low, high=high)
    if logarithmic and high > 0:
        low = min(value for value in cells.values() if value > 0)
        position = partial(_log_position, low=low, high=high)
    parts = [
        f'<text x="{left - 8}" y="{_HEIGHT * row + 14}" text-anchor="end">{escape(label)}</text>'
        for row, label in enumerate(rows)
    ]
    for (row, column), value in cells.items():
        name = f"{rows[row]}, {column_label} {columns[column]}: {form.format(value)}"
        parts.append(
            f'<rect x="{left + width * column}" y="{_HEIGHT * row}" width="{width - 1}" '
            f'height="{_HEIGHT - 1}" fill="{_color(position(value))}">'
            f"<title>{escape(name)}</title></rect>"
        )
    step = -(-len(columns) // _TICKS)
    parts += [
        f'<text x="{left + width * column + width / 2:g}" y="{bottom + 14}" '
        f'text-anchor="middle">{escape(columns[column])}</text>'
        for column in range(0, len(columns), step)
    ]
    parts.append(f'<text x="{left - 8}" y="{bottom + 14}" text-anchor="end">{column_label}</text>')
    scale, label_low, label_high = _scale(left, bottom + 24, low, high, form)
    parts += scale
    # The scale may be wider than the cells.
    widest = max(width * len(columns), round(100 + _CHARACTER * len(label_low + label_high)) + 24)
    size = (left + widest, bottom + 46)
    background = "" if inline else '<rect x="-8" y="-8" width="100%" height="100%" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {size[0] + 16} {size[1] + 16}" '
        f'width="{size[0] + 16}" role="img" font-family="ui-monospace, monospace" font-size="12" '
        f'fill="{"currentColor" if inline else "#222"}"><title>{escape(title)}</title>'
        f"{background}{''.join(parts)}</svg>\n"
    )


def _scale(left: int, top: int, low: float, high: float, form: str) -> tuple[list[str], str, str]:
    """Return the color scale with its two labels."""
    labels = form.format(low), form.format(high)
    start = left + round(_CHARACTER * len(labels[0])) + 8
    parts = [f'<text x="{left}" y="{top + 14}">{labels[0]}</text>']
    parts += [
        f'<rect x="{start + step}" y="{top + 3}" width="5" height="14" fill="{_color(step / 95)}"/>'
        for step in range(0, 100, 5)
    ]
    parts.append(f'<text x="{start + 108}" y="{top + 14}">{labels[1]}</text>')
    return parts, *labels


def _position(value: float, low: float, high: float) -> float:
    """Return the position of a value on the scale, from 0 to 1; 0.5 if all values are equal."""
    return (value - low) / (high - low) if high > low else 0.5


def _log_position(value: float, low: float, high: float) -> float:
    return _position(math.log(max(value, low)), math.log(low), math.log(high))


def _color(place: float) -> str:
    """Return the color at a position of the scale, from 0 to 1."""
    position = place * (len(_COLORS) - 1)
    index = min(int(position), len(_COLORS) - 2)
    share = position - index
    channels = (
        round(first + share * (second - first))
        for first, second in zip(_COLORS[index], _COLORS[index + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)
