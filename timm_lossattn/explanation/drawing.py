"""Pictures of explanations. Needs matplotlib, the ``viz`` extra."""
from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import shorten
from .evidence import AGAINST
from .labels import known_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['draw_explanation']

SELECTED_COLOR, BOX_COLOR = '#56B4E9', '#E69F00'  # Okabe & Ito's palette, safe for colour-blind readers
MAX_ASPECT = 4.  # of longer images only the part around the model's input is shown
MAX_PIXELS = 1200  # larger images are drawn at a lower resolution
NEARLY_ALL = 0.9  # an outline of more of the patches than this says nothing


def view_window(size: tuple[int, int], frame: list[float]) -> tuple[int, int, int, int]:
    """Part of an image of size (width, height) to show: all of it, or of a long image what is around the frame."""
    low, high = [], []
    for length, start, end in ((size[0], frame[0], frame[2]), (size[1], frame[1], frame[3])):
        shown = int(min(length, max(MAX_ASPECT * min(size), end - start)))
        low.append(max(0, min(round((start + end - shown) / 2.), length - shown)))
        high.append(low[-1] + shown)
    return low[0], low[1], high[0], high[1]


def outline(chosen: np.ndarray) -> np.ndarray:
    """Borders of the True cells of an (H, W) array: (N, 2, 2) segments, each two points x, y on the cells' corners."""
    padded = np.pad(chosen, 1)
    segments = []
    for r, c in zip(*np.nonzero(chosen)):  # an edge wherever a neighbour is not chosen
        for inside, line in (
                (padded[r, c + 1], ((c, r), (c + 1, r))),
                (padded[r + 2, c + 1], ((c, r + 1), (c + 1, r + 1))),
                (padded[r + 1, c], ((c, r), (c, r + 1))),
                (padded[r + 1, c + 2], ((c + 1, r), (c + 1, r + 1)))):
            if not inside:
                segments.append(line)
    return np.array(segments, dtype=float).reshape(-1, 2, 2)


def draw_explanation(explanation: Any, index: int, title: str = '') -> Figure:
    """Image, α map, class evidence, and selected patches with the estimated box, in one row (wide images: in two).

    Where at least nine tenths of the patches are selected, the last panel is left out (wide images: one column).
    Maps are drawn by nominal patch geometry, averaged where patches overlap; pixels that belong to no patch stay grey.
    Of an image more than four times as long as wide, the part around the model's input is shown.

    Args:
        explanation: an Explanation of a batch, which imports this file to draw itself.
        index: which image of the batch.
        title: what stands above the panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError("Drawing needs matplotlib: pip install 'timm-lossattn[viz]'") from None

    one = slice(index, index + 1)
    source, labels = explanation.source(index), explanation.labels
    target = int(explanation.target[index])
    alpha = explanation.pixel_map(explanation.prediction.alpha[one])[0].numpy()
    evidence = explanation.pixel_map(explanation.evidence[one])[0].numpy()
    chosen = explanation.pixel_map(explanation.selected[one].float())[0].nan_to_num(0.).numpy() > 0
    probabilities, order = explanation.probabilities[index].topk(min(5, len(labels)))
    evidence_name = f'evidence for "{shorten(labels[target], 20)}"'
    total = float(explanation.evidence[index].sum())
    if explanation.against is None:
        evidence_name += f'\n(logit {total:.2f})'
    elif isinstance(explanation.against, str):
        evidence_name += f'\nover {AGAINST[explanation.against]} ({total:+.2f})'
    else:
        evidence_name += f'\nand not "{shorten(labels[int(explanation.against[index])], 20)}" ({total:+.2f})'

    height, width = explanation.input_size
    (ox, oy), (sx, sy) = source.offset, source.scale
    frame = [ox, oy, ox + sx * width, oy + sy * height]  # may reach outside the image where timm's transform pads
    x0, y0, x1, y1 = view_window(source.image.size, frame)
    shown = source.image.crop((x0, y0, x1, y1))
    shown.thumbnail((MAX_PIXELS, MAX_PIXELS))
    image, grey = np.asarray(shown), np.asarray(shown.convert('L'))
    part = '' if (x1 - x0, y1 - y0) == source.image.size else ', part of it'

    # All sizes in inches; text has a place of its own, whatever the shape of the image.
    outlined = float(explanation.selected[index].float().mean()) < NEARLY_ALL
    panels = 4 if outlined else 3
    aspect = min(max((y1 - y0) / (x1 - x0), 1 / MAX_ASPECT), MAX_ASPECT)
    columns, width_limit = (panels, 2.6 if outlined else 3.2) if aspect > 0.6 else (2, 5.4) if outlined else (1, 7.5)
    panel_w = min(width_limit, (5.2 if outlined else 4.1 if columns == 1 else 5.6) / aspect)
    panel_h = panel_w * aspect
    cell_w, cell_h = max(panel_w, 2.3), panel_h + 0.6
    # to the right of each column; a colour bar with its numbers is wider
    gaps = [0.25, 0.95, 0.95, 0.25][:panels] if columns == panels else [0.95] * columns
    figure_w = columns * cell_w + sum(gaps) + 0.15
    best = ',  '.join(
        f'{shorten(labels[k], 20)} {100 * p:.1f} %' for p, k in zip(probabilities.tolist(), order.tolist()))
    notes = [f'top {len(order)}:  {best}', f'The model {known_classes(labels)}.']
    if np.isnan(alpha).any() or frame[0] > x0 + 1 or frame[1] > y0 + 1 or frame[2] < x1 - 1 or frame[3] < y1 - 1:
        notes[1] += ' Grey: no patch, or cut off by the crop.'
    characters = int(figure_w * 13)  # of 9 points, in a line
    lines = [line for note in notes for line in wrap(note, characters)]
    footer = 0.17 * len(lines) + (0.5 if outlined else 0.2)
    figure_h = panels // columns * cell_h + footer + 0.42
    figure = Figure(figsize=(figure_w, figure_h), dpi=110)

    def panel(number: int, name: str) -> Any:
        column = number % columns
        left = 0.15 + column * cell_w + sum(gaps[:column]) + (cell_w - panel_w) / 2.
        bottom = figure_h - 0.35 - (number // columns + 1) * cell_h
        ax = figure.add_axes((left / figure_w, bottom / figure_h, panel_w / figure_w, panel_h / figure_h))
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=11, parse_math=False)
        return ax

    def show(ax: Any, pixels: np.ndarray, **kwargs: Any) -> None:
        ax.imshow(pixels, extent=(x0, x1, y1, y0), interpolation='nearest', **kwargs)
        ax.set(xlim=(x0, x1), ylim=(y1, y0), aspect='auto')

    def heat(ax: Any, values: np.ndarray, **kwargs: Any) -> None:
        mapped = ax.imshow(
            np.ma.masked_invalid(values), extent=(frame[0], frame[2], frame[3], frame[1]), interpolation='nearest',
            alpha=0.75, **kwargs)
        show(ax, grey, cmap='gray', vmin=0, vmax=255, alpha=0.5, zorder=-1)
        at = ax.get_position()
        bar = figure.colorbar(mapped, cax=figure.add_axes((at.x1 + 0.06 / figure_w, at.y0, 0.12 / figure_w, at.height)),
                              ticks=MaxNLocator(max(2, min(8, int(panel_h / 0.35)))))
        bar.ax.tick_params(labelsize=8)

    show(panel(0, f'image ({source.image.width}×{source.image.height}){part}'), image)
    heat(panel(1, 'patch weight α'), alpha, cmap='viridis', vmin=0.)
    limit = float(np.nanmax(np.abs(evidence))) or 1.
    heat(panel(2, evidence_name), evidence, cmap='PuOr_r', vmin=-limit, vmax=limit)

    if outlined:
        ax = panel(3, f'{int(explanation.selected[index].sum())} of {explanation.selected.shape[1]} patches selected')
        show(ax, image)
        segments = outline(chosen) * (sx, sy) + (ox, oy)
        segments = segments.clip((x0, y0), (x1, y1))
        ax.add_collection(LineCollection(  # unclipped, so that lines on the image's border have their full width
            list(segments), colors=SELECTED_COLOR, linewidths=4, capstyle='projecting', clip_on=False, zorder=4))
        left, top, right, bottom = source.to_image(explanation.boxes[index]).tolist()
        ax.add_patch(Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=BOX_COLOR, linewidth=2, linestyle='--',
            zorder=5, clip_on=False))
        figure.legend(
            handles=[Line2D([], [], color=SELECTED_COLOR, linewidth=4, label='selected patches'),
                     Line2D([], [], color=BOX_COLOR, linewidth=2, linestyle='--', label='estimated box')],
            loc='center', bbox_to_anchor=(0.5, (footer - 0.13) / figure_h), ncols=2, frameon=False, fontsize=9)
    # a $ in a file's or a class's name is just that
    middle: dict[str, Any] = dict(ha='center', va='center', parse_math=False)
    for n, line in enumerate(lines, start=1):
        figure.text(0.5, (0.15 + 0.17 * (len(lines) - n)) / figure_h, line, fontsize=9, **middle)
    figure.text(0.5, 1 - 0.22 / figure_h, shorten(title, int(figure_w * 9)), fontsize=12, **middle)
    return figure
