"""Peripheral blood cells (A. Acevedo et al., Data in Brief 30:105474, 2020), for prepare.py.

The published set has no split. Here ``test`` is TEST_SHARE of each class, chosen by a hash of the files' bytes, the
same on every machine; rows come in the order of that hash, so that ``train[:5000]`` is a random sample. The images with
boxes are ``boxed``, and in neither of the two others. As the cell is nearly always in the middle, where a fixed square
finds it too, ``boxed_crops`` are random windows of them.

No picture is on both sides: files with the same pixels, or nearly, count as one. Copies of a boxed image are left out,
and so are copies that stand in two classes.
"""
import hashlib
import io
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from tqdm import tqdm

from .source import Row, Source, boxes_by_image

__all__ = ['CLASSES', 'TOP', 'blood_cells', 'random_window']

TOP = 'PBC_dataset_normal_DIB'
# class (ig: immature granulocytes) -> images as published
CLASSES = {'basophil': 1218, 'eosinophil': 3117, 'erythroblast': 1551, 'ig': 2895, 'lymphocyte': 1214, 'monocyte': 1420,
           'neutrophil': 3329, 'platelet': 2348}
TEST_SHARE = 0.15
THUMBNAIL = 16  # pixels a side
# Grey levels, root mean square over thumbnails. Of the published set, equal pictures differ by 0.1 at most; then come
# four pairs between 4 and 10, and from 12 on many.
SAME_PICTURE = 10.
WINDOW = (224, 300)  # pixels a side, of 360 × 363


def read_image(source: Source, name: str) -> tuple[str, np.ndarray, tuple[int, int]]:
    """SHA-256 of a file's bytes, thumbnail of its picture (THUMBNAIL² · 3,), width and height.

    Raises:
        ValueError: it is no image.
    """
    content = source.read(name)
    try:
        with PillowImage.open(io.BytesIO(content)) as image:
            small = image.convert('RGB').resize((THUMBNAIL, THUMBNAIL), PillowImage.Resampling.BOX)
            return hashlib.sha256(content).hexdigest(), np.asarray(small, np.float32).ravel(), image.size
    except OSError as error:
        raise ValueError(f'{source.path}: {name} is no readable image ({error})') from error


def same_pictures(thumbnails: np.ndarray) -> list[list[int]]:
    """Groups of images that show the same picture, of two or more each.

    Args:
        thumbnails: (N, F) grey levels.
    """
    norms = (thumbnails ** 2).sum(1)
    group = {i: [i] for i in range(len(thumbnails))}
    for start in range(0, len(thumbnails), 1000):
        part = thumbnails[start:start + 1000]
        squares = (norms[start:start + 1000, None] + norms - 2 * part @ thumbnails.T) / thumbnails.shape[1]
        for i, j in zip(*np.nonzero(squares < SAME_PICTURE ** 2)):
            first, second = group[start + int(i)], group[int(j)]
            if first is not second:
                first += second
                group.update((k, first) for k in second)
    return [members for i, members in group.items() if len(members) > 1 and i == min(members)]


def random_window(seed: str, size: tuple[int, int], boxes: list[list[float]]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of a square window of an image that holds all of its boxes.

    Its side is uniform in WINDOW, or as large as the boxes need, and its place uniform among those that hold them. 
    Where no square does, because boxes touch opposite borders, the window is the whole image.

    Args:
        seed: the same window for the same seed.
        size: width and height of the image.
        boxes: x0, y0, x1, y1.

    Raises:
        ValueError: a box is not inside of the image.
    """
    low = [math.floor(min(box[k] for box in boxes)) for k in (0, 1)]
    high = [math.ceil(max(box[k] for box in boxes)) for k in (2, 3)]
    needed = max(end - start for start, end in zip(low, high))
    if min(low) < 0 or any(end > length for end, length in zip(high, size)):
        raise ValueError(f'--boxes: {boxes} are not inside of an image of {size[0]}×{size[1]} pixels')
    draw = random.Random(seed)
    side = max(draw.randint(*WINDOW), needed)
    if side > min(size):
        return 0, 0, *size
    left, top = (draw.randint(max(0, end - side), min(start, length - side))
                 for start, end, length in zip(low, high, size))
    return left, top, left + side, top + side


def blood_cells(path: Path, table: Path) -> tuple[list[str], dict[str, list[Row]], Source, dict[str, int]]:
    """Class names, rows of each split, their files, and how many images were left out and why.

    Args:
        path: folder with a sub-folder for each class.
        table: boxes of white cells, see ``boxes_by_image``; its column pbc_path says which image.

    Raises:
        ValueError: files are missing, unreadable or too many, or boxes that do not fit.
    """
    if not path.is_dir():
        raise ValueError(f'SOURCE: no such folder: {path}')
    source = Source(path, TOP)
    names = [f'{label}/{file.name}' for label in CLASSES for file in sorted((source.folder / label).glob('*.jpg'))
             if not file.name.startswith('.')]
    found = {label: sum(name.startswith(f'{label}/') for name in names) for label in CLASSES}
    missing = [label for label, count in found.items() if not count]
    if missing:
        raise ValueError(f'SOURCE: {source.folder} has no image in {missing[0]}/')
    if len(names) > 1000 and found != CLASSES:  # not somebody's sample of it
        raise ValueError(f'SOURCE: {source.folder} has {found}, the published set {CLASSES}')
    boxes = boxes_by_image(table, 'pbc_path')
    unknown = sorted(set(boxes) - set(names))
    if unknown:
        raise ValueError(f'--boxes: {table} has {unknown[0]}, which is not in {source.folder}')

    read = [read_image(source, name) for name in tqdm(names, desc='read', leave=False, dynamic_ncols=True)]
    groups = {members[0]: members for members in same_pictures(np.stack([thumbnail for _, thumbnail, _ in read]))}
    copies = {i for members in groups.values() for i in members}
    groups |= {i: [i] for i in range(len(names)) if i not in copies}
    label_of = [list(CLASSES).index(name.split('/')[0]) for name in names]
    by_label: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    boxed: list[int] = []
    left_out = {'copies of images with boxes': 0, 'copies in two classes': 0}
    for members in groups.values():
        with_boxes = [i for i in members if names[i] in boxes]
        boxed += with_boxes
        if with_boxes:
            left_out['copies of images with boxes'] += len(members) - len(with_boxes)
        elif len({label_of[i] for i in members}) > 1:
            left_out['copies in two classes'] += len(members)
        else:
            by_label[label_of[members[0]]].append((min(read[i][0] for i in members), members))
    chosen: dict[str, list[int]] = {'train': [], 'test': [], 'boxed': boxed}
    for candidates in by_label.values():
        wanted, taken = round(TEST_SHARE * sum(len(members) for _, members in candidates)), 0
        for _, members in sorted(candidates):
            chosen['test' if taken < wanted else 'train'] += members
            taken += len(members)

    def row(i: int) -> dict[str, Any]:
        return {'image': names[i], 'label': label_of[i], 'boxes': boxes.get(names[i], [])}

    ordered = {split: sorted(indices, key=lambda i: (read[i][0], names[i])) for split, indices in chosen.items()}
    splits = {split: [row(i) for i in indices] for split, indices in ordered.items()}
    splits['boxed_crops'] = [row(i) | {'window': random_window(read[i][0], read[i][2], boxes[names[i]])}
                             for i in ordered['boxed']]
    return list(CLASSES), splits, source, left_out
