"""The page: one HTML file with everything in it, for a browser without a server and without a network.

Heat maps travel as one signed byte a patch and are drawn by the browser; pictures of them would be ten times as large.
"""
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.proportion import wilson_interval
from ..explanation import Preprocessed
from ..explanation.drawing import WRONG, signed_colors
from ..explanation.preprocessing import boxes_to_input
from ..files import replace_file
from ..text import percent
from .dataset import ReportImages
from .summary import MIN_IMAGES, SCORE, Summary, pick_gallery, summarise
from .table import ReportTable

try:
    from jinja2 import Environment, PackageLoader, select_autoescape
except ImportError as error:
    raise ImportError(f"a report needs {error.name}: pip install 'timm-lossattn[report]'") from None

__all__ = ['check_page', 'encode_map', 'patch_intervals', 'place_name', 'thumbnail', 'write_page']

SIDE = 144  # pixels of a thumbnail's longer side
MATRIX = 20  # classes; a larger table of confusions is a list
TILES = 12  # classes whose mean evidence is shown at once
GENERATOR = b'<meta name="generator" content="timm-lossattn '  # in the head of the template


def encode_map(values: Sequence[float] | np.ndarray) -> str:
    """A map of M values as base64 of M signed bytes; ±127 is the largest magnitude."""
    numbers = np.nan_to_num(np.asarray(values, dtype=np.float64))
    limit = float(np.abs(numbers).max()) or 1.
    return base64.b64encode(np.rint(numbers * 127. / limit).astype(np.int8).tobytes()).decode()


def thumbnail(source: Preprocessed) -> str:
    """What the model sees of an image, at most SIDE pixels wide and high, as a data URI."""
    height, width = source.x.shape[-2:]
    (left, top), (sx, sy) = source.offset, source.scale
    frame = tuple(round(v) for v in (left, top, left + sx * width, top + sy * height))
    view = Image.new('RGB', (max(1, frame[2] - frame[0]), max(1, frame[3] - frame[1])), 'white')
    view.paste(source.image, (-frame[0], -frame[1]))
    view.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    view.save(content, 'WEBP', quality=80, lossless=max(view.size) <= 64, method=6)
    return f'data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}'


def patch_intervals(
        patch_boxes: Sequence[Sequence[int]], grid: tuple[int, int],
        size: tuple[int, int]) -> tuple[list[list[float]], list[list[float]]]:
    """Where the rows and the columns of patches lie, from and to, as shares of the input's height and width.

    Args:
        patch_boxes: M boxes x0, y0, x1, y1.
        grid: (H', W').
        size: (width, height) of the input.
    """
    boxes = np.asarray(patch_boxes, dtype=float).reshape(*grid, 4) / [*size, *size]
    return boxes[:, 0, [1, 3]].round(5).tolist(), boxes[0, :, [0, 2]].T.round(5).tolist()


def place_name(patch: int, grid: tuple[int, int]) -> str:
    """Where a patch lies, in words: 'top left', 'middle', ..."""
    row, column = (min(2, int(3 * (i + 0.5) / n)) for i, n in zip(divmod(patch, grid[1]), grid))
    words = [w for w in (('top', '', 'bottom')[row], ('left', '', 'right')[column]) if w]
    return ' '.join(words) or 'middle'


def class_rows(summary: Summary, table: ReportTable) -> list[dict[str, Any]]:
    """What the page says of each class that is predicted at all, the most conspicuous first."""
    labels = table.notes['labels']
    order = sorted(np.flatnonzero(summary.predicted), key=lambda k: (-summary.score[k], -summary.predicted[k], k))
    return [{
        'id': int(k), 'name': labels[k], 'count': int(summary.predicted[k]), 'score': float(summary.score[k]),
        'share': float(summary.share[k, summary.place[k]]), 'usual': float(summary.usual[k, summary.place[k]]),
        'place': place_name(int(summary.place[k]), table.grid), 'map': encode_map(summary.evidence[k]),
        'flagged': int(k) in summary.flagged,
    } for k in order]


def cards(table: ReportTable, images: ReportImages, positions: Sequence[int]) -> list[dict[str, Any]]:
    """What the page says of each image of the gallery."""
    labels, size = table.notes['labels'], tuple(table.notes['input_size'])
    found = []
    for row in table.rows(positions):
        source = images.preprocessed(row['index'])
        prediction, label = row['prediction'], row['label']
        wrong = label is not None and label != prediction
        rival = label if wrong else next(k for k in row['top_classes'] if k != prediction)
        rival_map = row['why_not_label' if wrong else 'why_not_runner_up']
        boxes = np.asarray(row['boxes'] or [], dtype=np.float32).reshape(-1, 4)
        inside = boxes_to_input(source.x.new_tensor(boxes.tolist()).reshape(-1, 4), (size[0], size[1]), source.scale,
                                source.offset).numpy() / [*size, *size]
        found.append({
            'name': row['file'] or f'image {row["index"]:,}', 'label': label, 'prediction': prediction, 'wrong': wrong,
            'label_name': None if label is None else labels[label], 'prediction_name': labels[prediction],
            'probability': row['probability'], 'rival_name': labels[rival],
            'top': [(labels[k], float(p)) for k, p in zip(row['top_classes'], row['top_probabilities'])],
            'evidence': encode_map(row['evidence']), 'lead': float(np.sum(row['evidence'], dtype=np.float64)),
            'rival': encode_map(rival_map), 'difference': float(np.sum(rival_map, dtype=np.float64)),
            'in_box': row['evidence_in_box'], 'boxes': inside.round(4).tolist(), 'thumbnail': thumbnail(source)})
    return found


def confusion_table(summary: Summary, labels: Sequence[str]) -> dict[str, Any]:
    """The most frequent confusions, and if few enough classes occur the whole table with shares of its rows."""
    pairs = sorted(((n, *pair) for pair, n in summary.confusion.items() if pair[0] != pair[1]),
                   key=lambda p: (-p[0], p[1], p[2]))
    classes = sorted({k for pair in summary.confusion for k in pair})
    rows = [{'id': t, 'name': labels[t], 'cells': [
        {'id': p, 'n': summary.confusion.get((t, p), 0),
         'share': summary.confusion.get((t, p), 0) / max(1, int(summary.true[t]))} for p in classes]} for t in classes]
    return {'pairs': [{'n': n, 'label': t, 'prediction': p, 'label_name': labels[t], 'prediction_name': labels[p],
                       'share': n / int(summary.true[t])} for n, t, p in pairs[:10]],
            'columns': [labels[k] for k in classes], 'rows': rows if len(classes) <= MATRIX else []}


def options(cards: Sequence[dict[str, Any]], key: str) -> list[tuple[int, str, int]]:
    """Classes for a menu: number, name and how many cards have it."""
    numbers: dict[tuple[str, int], int] = {}
    for card in cards:
        if card[key] is not None:
            entry = (card[f'{key}_name'], card[key])
            numbers[entry] = numbers.get(entry, 0) + 1
    return [(k, name, n) for (name, k), n in sorted(numbers.items())]


def check_page(path: Path) -> None:
    """Before anything is computed: the page may be written there.

    Raises:
        ValueError: something else than a page of a report is there.
    """
    try:
        with open(path, 'rb') as file:
            ours = GENERATOR in file.read(4096)
    except FileNotFoundError:
        return
    except OSError:  # a folder
        ours = False
    if not ours:
        raise ValueError(f'--out: {path} is there and no page of a report; choose another folder.')


def write_page(path: Path, table: ReportTable, images: ReportImages, gallery: int) -> None:
    """Write the page of a report.

    Args:
        path: of the HTML file.
        table: the report.
        images: the data set that it is of; those of the gallery are read again.
        gallery: how many of them.

    Raises:
        OSError: the file cannot be written.
    """
    summary, notes = summarise(table), table.notes
    shown = cards(table, images, pick_gallery(table, gallery))
    rows, columns = patch_intervals(notes['patch_boxes'], table.grid, tuple(notes['input_size']))
    colors = signed_colors(np.linspace(-1., 1., 255)) * [255, 255, 255, 1]  # one for each byte of ``encode_map``
    palette = [f'rgba({r:.0f},{g:.0f},{b:.0f},{a:.3f})' for r, g, b, a in colors]
    classes = class_rows(summary, table)
    low, high = wilson_interval(summary.correct, summary.labelled) if summary.labelled else (0., 0.)
    environment = Environment(
        loader=PackageLoader('timm_lossattn.report'), autoescape=select_autoescape(['html']), trim_blocks=True,
        lstrip_blocks=True)
    environment.filters['as_probability'] = percent
    html = environment.get_template('index.html').render(
        notes=notes, summary=summary, interval=(low, high), classes=classes, tiles=TILES,
        enough=bool((summary.predicted >= MIN_IMAGES).any()), flagged=[c for c in classes if c['flagged']],
        confusion=confusion_table(summary, notes['labels']), cards=shown, wrong=summary.labelled - summary.correct,
        label_options=options(shown, 'label'), prediction_options=options(shown, 'prediction'),
        patches=table.grid[0] * table.grid[1], score=SCORE, min_images=MIN_IMAGES, wrong_color=WRONG,
        settings={'palette': palette, 'rows': rows, 'columns': columns,
                  'labels': {c['id']: c['name'] for c in classes} | {
                      k: notes['labels'][k] for pair in summary.confusion for k in pair}})
    replace_file(path, html.encode())
