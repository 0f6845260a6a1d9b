"""Pictures of explanations. Needs matplotlib, the ``viz`` extra."""
from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import percent, shorten
from .evidence import AGAINST
from .geometry import cell_edges, interpolate
from .labels import known_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['PANELS', 'draw_explanation']

PANELS = ('outline', 'evidence', 'why-not', 'alpha', 'selected')  # of a picture; the first three are the default
FOR, AGAINST_IT = (0.87, 0.36, 0.0), (0.33, 0.17, 0.60)  # orange and purple, told apart by all colour-blind readers
OUTLINE, BOX_COLOR, WRONG = '#0072B2', '#E69F00', '#C04000'
GREY = '#555555'
LITTLE = 0.05  # of what speaks against a class: less that speaks for it is not outlined
MAX_ASPECT = 4.  # of longer images only the part around the model's input is shown
ENLARGED = 0.25  # pixels of the image for one of the input: with fewer it is said that it was enlarged
MAX_PIXELS = 1200  # larger images are drawn at a lower resolution
FINE = 480  # points along the longer side at least, so that a map is smooth over a thumbnail too
DPI = (140, 200)  # a panel has the photograph's own pixels where that is between these
TITLE_H, BAR_H, WORDS_H, NAME_H, LINE_H = 0.55, 0.42, 0.45, 0.27, 0.19  # inches


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


def signed_colors(share: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] to RGBA: orange above zero, purple below, the more opaque the larger."""
    rgb = np.where(share[..., None] > 0, FOR, AGAINST_IT)
    return np.concatenate([rgb, 0.9 * np.abs(share)[..., None] ** 0.8], axis=-1)


class Canvas:
    """One image in a picture of several panels: what is shown of it, its grid, and where each panel goes.

    Args:
        explanation: an Explanation of a batch, which imports this file to draw itself.
        index: which image of it.
        panels: how many.
        stacked: one below the other.
        head: inches above the panels.
    """

    def __init__(self, explanation: Any, index: int, panels: int, stacked: bool, head: float) -> None:
        self.head = head
        self.source = explanation.source(index)
        self.rows, self.columns = explanation.spans(index)
        self.grid = explanation.grid
        (ox, oy), (sx, sy) = self.source.offset, self.source.scale
        height, width = explanation.input_size
        frame = [ox, oy, ox + sx * width, oy + sy * height]  # may reach outside the image where timm's transform pads
        self.window = view_window(self.source.image.size, frame)
        x0, y0, x1, y1 = self.window
        self.part = (x1 - x0, y1 - y0) != self.source.image.size
        self.hull = self.columns[0, 0], self.rows[0, 0], self.columns[-1, 1], self.rows[-1, 1]
        self.cut = (self.hull[0] > x0 + 1 or self.hull[1] > y0 + 1 or self.hull[2] < x1 - 1 or self.hull[3] < y1 - 1)
        shown = self.source.image.crop(self.window)
        shown.thumbnail((MAX_PIXELS, MAX_PIXELS))
        self.photo = np.asarray(shown.convert('RGB'), dtype=float) / 255.
        self.pale = 0.6 + 0.38 * np.asarray(shown.convert('L'), dtype=float)[..., None].repeat(3, axis=2) / 255.

        # All sizes in inches; text has a place of its own, whatever the shape of the image.
        aspect = min(max((y1 - y0) / (x1 - x0), 1 / MAX_ASPECT), MAX_ASPECT)
        self.in_row = panels if aspect > 0.4 and not stacked else 1
        self.panel_w = min(3.1 if aspect > 0.4 else 6.2, 4.2 / aspect)
        self.panel_h = self.panel_w * aspect
        self.cell_w, self.cell_h = max(self.panel_w, 2.7), TITLE_H + self.panel_h + BAR_H
        if self.in_row < panels:
            self.cell_h += 0.15
        self.width = self.in_row * self.cell_w + (self.in_row - 1) * 0.2 + 0.3
        self.above = -(-panels // self.in_row) * self.cell_h + head
        self.dpi = float(np.clip(shown.width / self.panel_w, *DPI))

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, in the image's pixels, at which maps are drawn."""
        x0, y0, x1, y1 = self.window
        finer = max(1., FINE / max(self.photo.shape[:2]))
        height, width = (max(1, round(finer * side)) for side in self.photo.shape[:2])
        return y0 + (np.arange(height) + 0.5) / height * (y1 - y0), x0 + (np.arange(width) + 0.5) / width * (x1 - x0)

    def smooth(self, values: Any) -> np.ndarray:
        """(M,) values of patches as a smooth map over what is shown."""
        return interpolate(values.view(self.grid).double().numpy(), self.rows, self.columns, *self.points())

    def sharp(self, chosen: Any) -> np.ndarray:
        """(M,) True or False as a map of cells over what is shown."""
        return interpolate(chosen.view(self.grid).double().numpy(), self.rows, self.columns, *self.points(),
                           smooth=False) > 0.5

    def segments(self, chosen: Any) -> np.ndarray:
        """Outline of the chosen of the (M,) patches, in the image's pixels, within what is shown."""
        lines = outline(chosen.view(self.grid).numpy())
        x_edges, y_edges = cell_edges(self.columns), cell_edges(self.rows)
        placed = np.stack([x_edges[lines[..., 0].astype(int)], y_edges[lines[..., 1].astype(int)]], axis=-1)
        x0, y0, x1, y1 = self.window
        return placed.clip((x0, y0), (x1, y1))


def draw_explanation(
        explanation: Any, index: int, title: str = '', panels: Sequence[str] | str = PANELS[:3],
        stacked: bool = False) -> Figure:
    """The prediction in words, panels in a row (of long images one below the other), and what the model knows.

    'outline': the image, outlined the fewest patches that hold half of all positive evidence. 'evidence': what each
    patch adds, orange for the target and purple against it. 'why-not': the same against one class, see
    ``Explanation.why_not``. 'alpha': patch weights. 'selected': patches with a weight, and the estimated box. Maps are
    interpolated between the middles of patches, whose grid is drawn; where there is no patch nothing is laid over the
    image. Of an image more than four times as long as wide, the part around the model's input is shown.

    Args:
        explanation: an Explanation of a batch, which imports this file to draw itself.
        index: which image of the batch.
        title: small, above the panels: the file's name, say.
        panels: which, in this order, or the name of one. 'why-not' is left out where nothing is compared, and of a
            model with one class or two, where it would be 'evidence' again.
        stacked: panels one below the other, for narrow pages and telephones.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no panel, or one that does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Drawing needs matplotlib: pip install 'timm-lossattn[viz]'") from None
    panels = [panels] if isinstance(panels, str) else panels
    unknown = [name for name in panels if name not in PANELS]
    if unknown or not panels:
        raise ValueError(f'panels must be some of {", ".join(PANELS)}, got {", ".join(panels) or "none"}.')
    K = len(explanation.labels)
    if explanation.against is None or K == 1 or (K == 2 and not explanation.independent):
        panels = [name for name in panels if name != 'why-not'] or ['evidence']

    canvas = Canvas(explanation, index, len(panels), stacked, WORDS_H + (NAME_H if title else 0))
    notes = footnotes(explanation, index, canvas)
    lines = [(line, color) for note, color in notes for line in wrap(note, int((canvas.width - 0.3) * 14.6))]
    height = canvas.above + LINE_H * len(lines) + 0.12
    figure = Figure(figsize=(canvas.width, height), dpi=canvas.dpi)
    draw = Panels(figure, canvas, explanation, index, len(lines))
    draw.head(title)
    for number, name in enumerate(panels):
        getattr(draw, name.replace('-', '_'))(number)
    for n, (line, color) in enumerate(lines, start=1):
        draw.text(0.15, height - 0.17 - LINE_H * (len(lines) - n), line, fontsize=9, color=color)
    return figure


def two_digits(value: float) -> str:
    """0.30, 1.4, 12."""
    return f'{value:#.2g}'.rstrip('.')


def signed(values: Any) -> str:
    """The sum of some values with its sign: +1.23, −0.08."""
    return f'{float(values.sum()):+.2f}'.replace('-', '−')


def footnotes(explanation: Any, index: int, canvas: Canvas) -> list[tuple[str, str]]:
    """What stands under the panels, each with its colour."""
    labels = explanation.labels
    probabilities = explanation.probabilities[index].tolist()
    following = explanation.ranked(4, index)[1:].tolist()
    others = ', '.join(f'{shorten(labels[k], 24)} {percent(probabilities[k])}' for k in following)
    height, width = explanation.input_size
    hint = explanation.unlike_training(index)
    knows = hint or f'The model {known_classes(labels, explanation.data)}; it reads {width}×{height} pixels.'
    if canvas.cut:
        knows += ' Outside of the grid: not seen, or no patch.'
    if canvas.part:
        knows += f' Part of an image of {canvas.source.image.width}×{canvas.source.image.height} pixels.'
    if max(canvas.source.scale) < ENLARGED:
        knows += f' Enlarged from {canvas.source.image.width}×{canvas.source.image.height} pixels.'
    if explanation.held:
        knows += f' Sums are exact with {explanation.held} held as for the whole image.'
    notes = [(f'Next: {others}.', GREY)] if others else []
    return [*notes, (knows, WRONG if hint else GREY)]


class Panels:
    """Draws into a figure, see ``draw_explanation``; a method for each panel, given its number in the row.

    Args:
        figure: empty.
        canvas: where things go.
        explanation: an Explanation of a batch, which imports this file to draw itself.
        index: which image of it.
        lines: of text under the panels.
    """

    def __init__(self, figure: Figure, canvas: Canvas, explanation: Any, index: int, lines: int) -> None:
        self.figure, self.canvas, self.explanation, self.index = figure, canvas, explanation, index
        self.height = canvas.above + LINE_H * lines + 0.12
        self.target = explanation.labels[int(explanation.target[index])]
        # a class that is asked about has a panel of its own
        asked = explanation.against is not None and not isinstance(explanation.against, str)
        self.main = explanation.versus(None if explanation.independent else 'rest') if asked else explanation

    def text(self, x: float, y: float, text: str, **kwargs: Any) -> None:
        """Text at x inches from the left and y from the top, its middle; a $ in a name is just that."""
        style: dict[str, Any] = {'va': 'center', 'parse_math': False, **kwargs}
        self.figure.text(x / self.canvas.width, 1 - y / self.height, text, **style)

    def head(self, title: str) -> None:
        """The prediction, whether it is right if that is known, and the title."""
        explanation, index = self.explanation, self.index
        k = int(explanation.predicted[index])
        words = f'{shorten(explanation.labels[k], 30)}, {percent(float(explanation.probabilities[index, k]))}'
        color = 'black'
        if explanation.true_class is not None:
            true = int(explanation.true_class[index])
            color = 'black' if true == k else WRONG
            words = f'✓ {words}' if true == k else f'✗ {words}; it is {shorten(explanation.labels[true], 30)}'
        fit = 100. * (self.canvas.width - 0.3)  # points: a bold letter is 0.7 of its size wide
        self.text(0.15, 0.24, words, fontsize=min(15., fit / len(words)), fontweight='bold', color=color)
        self.text(0.15, 0.52, shorten(title, int((self.canvas.width - 0.3) * 13.5)), fontsize=9, color=GREY)

    def axes(self, number: int, name: str, detail: str) -> tuple[Any, float, float]:
        """Axes of a panel under its two lines of title; its left and its lower end in inches from left and top."""
        canvas = self.canvas
        left = 0.15 + number % canvas.in_row * (canvas.cell_w + 0.2)
        top = canvas.head + number // canvas.in_row * canvas.cell_h
        characters = int(canvas.cell_w * 10)
        self.text(left, top + 0.12, shorten(name, characters), fontsize=12)
        self.text(left, top + 0.35, shorten(detail, int(characters * 1.35)), fontsize=9, color=GREY)
        lower = top + TITLE_H + canvas.panel_h
        ax = self.figure.add_axes((
            left / canvas.width, 1 - lower / self.height, canvas.panel_w / canvas.width, canvas.panel_h / self.height))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        return ax, left, lower

    def show(self, ax: Any, pixels: np.ndarray) -> None:
        """An array over the whole panel, in the image's coordinates."""
        x0, y0, x1, y1 = self.canvas.window
        ax.imshow(pixels.clip(0, 1), extent=(x0, x1, y1, y0))
        ax.set(xlim=(x0, x1), ylim=(y1, y0), aspect='auto')

    def lines(self, ax: Any, segments: np.ndarray, **kwargs: Any) -> None:
        """Line segments (N, 2, 2) in the image's coordinates; unclipped, so that those on the border are whole."""
        from matplotlib.collections import LineCollection
        ax.add_collection(LineCollection(list(segments), capstyle='projecting', clip_on=False, **kwargs))

    def grid(self, ax: Any) -> None:
        """The patches' cells."""
        canvas = self.canvas
        x, y = cell_edges(canvas.columns), cell_edges(canvas.rows)
        across = [((x[0], v), (x[-1], v)) for v in y]
        down = [((v, y[0]), (v, y[-1])) for v in x]
        x0, y0, x1, y1 = canvas.window
        self.lines(ax, np.array(across + down).clip((x0, y0), (x1, y1)), colors=[(1, 1, 1, 0.55)], linewidths=0.6)

    def bar(self, left: float, lower: float, pixels: np.ndarray, ends: tuple[str, str]) -> None:
        """A colour bar under a panel, (1, N, 4) over grey, and what its ends mean."""
        from matplotlib.axes import Axes
        width, height = self.canvas.width, self.height
        length = self.canvas.cell_w if self.canvas.panel_w < 2 else self.canvas.panel_w
        ax: Axes = self.figure.add_axes((left / width, 1 - (lower + 0.14) / height, length / width, 0.07 / height))
        ax.imshow(np.full((1, 1, 3), 0.82), extent=(0, 1, 0, 1))
        ax.imshow(pixels, extent=(0, 1, 0, 1))
        ax.set(xticks=[], yticks=[], aspect='auto')
        ax.spines[:].set_visible(False)
        low, high = ends
        self.text(left, lower + 0.26, low, fontsize=8.5, color=GREY)
        self.text(left + length, lower + 0.26, high, fontsize=8.5, color=GREY, ha='right')

    def signed(self, number: int, name: str, detail: str, evidence: Any, ends: tuple[str, str]) -> None:
        """A panel of evidence, orange for and purple against, scaled by itself."""
        ax, left, lower = self.axes(number, name, detail)
        limit = float(evidence.abs().max()) or 1.
        self.show(ax, self.canvas.pale)
        self.show(ax, signed_colors(self.canvas.smooth(evidence) / limit))
        self.grid(ax)
        room = int((self.canvas.cell_w if self.canvas.panel_w < 2 else self.canvas.panel_w) * 6.5) - 8
        low, high = (shorten(end, room) for end in ends)
        ends = f'−{two_digits(limit)} {low}', f'{high} +{two_digits(limit)}'
        self.bar(left, lower, signed_colors(np.linspace(-1, 1, 256)[None]), ends)

    def outline(self, number: int) -> None:
        """The image; what lies outside of the patches that hold half of the positive evidence is paler."""
        core, values = self.main.core()[self.index], self.main.evidence[self.index]
        speaks, against = float(values.clamp(min=0).sum()), float(-values.clamp(max=0).sum())
        if not core.any():
            words = 'no patch speaks for it'
        elif speaks < LITTLE * against:
            core = core & False
            words = f'next to nothing: +{two_digits(speaks)}, against it −{two_digits(against)}'
        else:
            words = f'half of it lies in {int(core.sum())} of {len(core)} patches'
        ax, left, lower = self.axes(number, f'what speaks for {shorten(self.target, 24)}', words)
        inside = self.canvas.sharp(core)
        self.show(ax, self.canvas.photo)
        if core.any():
            veil = np.ones((*inside.shape, 4)) * (1, 1, 1, 0.25)
            veil[inside] = 0
            self.show(ax, veil)
            segments = self.canvas.segments(core)
            self.lines(ax, segments, colors='white', linewidths=3.4, zorder=4)
            self.lines(ax, segments, colors=OUTLINE, linewidths=1.8, zorder=5)
        weightless = int((~self.explanation.selected[self.index]).sum())
        if weightless:
            words = f'{weightless} patch{"es have" if weightless > 1 else " has"} no weight at all'
            self.text(left, lower + 0.16, words, fontsize=8.5, color=GREY)

    def evidence(self, number: int) -> None:
        """What each patch adds to the target's lead."""
        one = self.main
        values = one.evidence[self.index]
        if one.against is None:
            total = 'its logit'
        elif len(one.labels) == 2:
            total = f'its lead over {one.labels[1 - int(one.target[self.index])]}'
        else:
            total = f'its lead over {AGAINST[str(one.against)]}'
        self.signed(number, f'why {shorten(self.target, 24)}?', f'sum: {signed(values)}, {total}', values,
                    ('against', 'for'))

    def why_not(self, number: int) -> None:
        """The same against one class."""
        one = self.explanation.why_not()
        values, against = one.evidence[self.index], one.direction[self.index].argmin()
        rival = one.labels[int(against)]
        self.signed(number, f'why not {shorten(rival, 22)}?', f'sum: {signed(values)}, its lead over that',
                    values, (rival, self.target))

    def alpha(self, number: int) -> None:
        """Patch weights."""
        from matplotlib import colormaps
        values = self.explanation.prediction.alpha[self.index]
        ax, left, lower = self.axes(number, 'patch weight α', 'how much each patch counts')
        largest = float(values.max()) or 1.

        def colors(share: np.ndarray) -> np.ndarray:
            return np.concatenate([colormaps['viridis'](share)[..., :3], np.full((*share.shape, 1), 0.75)], axis=-1)
        x0, y0, x1, y1 = self.canvas.hull
        y, x = self.canvas.points()
        inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
        pixels = colors(self.canvas.smooth(values) / largest)
        pixels[..., 3] *= inside
        self.show(ax, self.canvas.pale)
        self.show(ax, pixels)
        self.grid(ax)
        self.bar(left, lower, colors(np.linspace(0, 1, 256)[None]), ('0', two_digits(largest)))

    def selected(self, number: int) -> None:
        """Patches with a weight, and the smallest square around them."""
        from matplotlib.patches import Rectangle
        chosen = self.explanation.selected[self.index]
        ax, _, _ = self.axes(
            number, f'{int(chosen.sum())} of {len(chosen)} patches selected', 'dashed: estimated box')
        self.show(ax, self.canvas.photo)
        self.lines(ax, self.canvas.segments(chosen), colors=OUTLINE, linewidths=2.6, zorder=4)
        x0, y0, x1, y1 = self.canvas.source.to_image(self.explanation.boxes[self.index]).tolist()
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BOX_COLOR, linewidth=2,
                               linestyle='--', zorder=5, clip_on=False))
