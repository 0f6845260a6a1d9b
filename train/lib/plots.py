"""Pictures: curves of runs, heat maps over images, boxes."""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_lossattn.files import replacing

from .extras import need

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError:
    need('viz', 'matplotlib')
    raise

__all__ = ['BLUE', 'COLORS', 'ORANGE', 'draw_box', 'draw_runs', 'images_of', 'panels', 'save', 'show_heat']

COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')  # Okabe & Ito's palette
ORANGE, BLUE = '#E69F00', '#56B4E9'


def panels(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, np.ndarray]:
    """A figure of that many inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """As PNG, whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format='png')


def images_of(x: torch.Tensor, config: Mapping[str, Any]) -> np.ndarray:
    """(C, H, W) normalised input to (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return (x * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def show_heat(ax: Any, image: np.ndarray, heat: torch.Tensor) -> None:
    """A heat map (H, W) over the image (H, W, 3) in grey: brown for, purple against, scaled by itself."""
    limit = float(heat.nan_to_num(0.).abs().max()) or 1.
    ax.imshow(image.mean(axis=2), cmap='gray', vmin=0, vmax=1, alpha=0.6)
    ax.imshow(heat.numpy(), cmap='PuOr_r', vmin=-limit, vmax=limit, alpha=0.65)


def draw_box(ax: Any, box: Any, color: str, style: str = '-', label: str | None = None) -> None:
    """x0, y0, x1, y1 (exclusive) in pixels, over an image."""
    x0, y0, x1, y1 = (float(value) for value in box)
    ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=color, lw=2.5,
                           linestyle=style, label=label, clip_on=False))


def draw_runs(path: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Metric and training loss by epoch; of a single run all loss terms, and which epoch was best.

    Args:
        path: of the picture.
        runs: name -> result.json.
    """
    figure, ((left, right),) = panels(1, 2, 10, 3.8)
    for (name, result), color in zip(runs.items(), COLORS * len(runs)):
        epochs, metric = result['epochs'], result['metric']
        x = [entry['epoch'] + 1 for entry in epochs]
        marker = 'o' if len(x) < 40 else ''
        values = [entry['eval'][metric] for entry in epochs]
        left.plot(x, values, color=color, marker=marker, ms=3, label=name)
        left.set(xlabel='epoch', ylabel=', '.join(dict.fromkeys(
            f'eval {run["metric"]}{"" if run["metric"] == "loss" else " (%)"}' for run in runs.values())))
        if len(runs) == 1:
            best = (min if metric == 'loss' else max)(range(len(x)), key=values.__getitem__)
            left.set(title=f'best: {values[best]:.2f} in epoch {x[best]}')
            terms = {f'train {term}': [entry['train'].get(term, math.nan) for entry in epochs]  # --no-patch-loss since
                     for term in ('loss', 'image_loss', 'patch_loss') if any(term in e['train'] for e in epochs)}
            for term, losses in (terms | {'eval loss': [entry['eval']['loss'] for entry in epochs]}).items():
                right.plot(x, losses, marker=marker, ms=3, label=term)
            right.set(xlabel='epoch', ylabel='loss')
        else:
            right.plot(x, [entry['train'].get('image_loss', entry['train']['loss']) for entry in epochs], color=color,
                       marker=marker, ms=3)
            right.set(xlabel='epoch', ylabel='train image loss (with its label smoothing)')
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    (right if len(runs) == 1 else left).legend(frameon=False)
    save(figure, path)
