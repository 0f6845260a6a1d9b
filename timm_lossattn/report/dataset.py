"""What is explained: timm's data sets by index, each image as a model's input, with its class among the model's."""
import csv
import hashlib
import io
import operator
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_dataset, infer_imagenet_subset
from torch.utils.data import Dataset, IterableDataset

from ..explanation import Preprocessed, Preprocessing
from ..explanation.labels import class_names, numbered
from ..explanation.preprocessing import image_endings, to_rgb, upright
from ..hub_access import hub_or_cache
from ..text import one_line, printable, shorten

__all__ = ['Item', 'ReportImages', 'match_classes', 'open_images', 'read_boxes', 'split_readable']

STREAMS = ('hfids', 'wds', 'tfds')
SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test', 'testing'}  # no classes


@dataclass(frozen=True)
class Item:
    """One image on its way to the model; the picture itself stays behind, for it may be large.

    Attributes:
        index: in the data set.
        file: its name there; None if it has none.
        label: class of the model; None if it is not known.
        x: (C, H, W) input; None if the image cannot be read.
        size, scale, offset: of the image and of the input in it, see ``Preprocessed``.
        boxes: (L, 4) ground truth in pixels of the image; None in a data set without boxes.
        error: why it cannot be read.
    """
    index: int
    file: str | None
    label: int | None
    x: torch.Tensor | None
    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    boxes: torch.Tensor | None
    error: str | None = None


class ReportImages(Dataset):
    """Images of one of timm's data sets as Items.

    Args:
        images: timm's ImageDataset, or one of torchvision.
        preprocessing: of the model.
        num_classes: K of the model.
        classes: class of the model for each class of the data set; None if its labels are the model's classes.
        labelled: False: labels are not looked at.
        boxes: by file name; None if the data set brings its boxes along, or has none.
        boxed: there are boxes.
        split: which part of the data set it is; empty for all of a folder.
    """

    def __init__(
            self, images: Any, preprocessing: Preprocessing, num_classes: int, classes: Sequence[int] | None = None,
            labelled: bool = True, boxes: dict[str, list[list[float]]] | None = None, boxed: bool = False,
            split: str = '') -> None:
        self.images, self.preprocessing = images, preprocessing
        self.num_classes, self.classes, self.labelled = num_classes, classes, labelled
        self.boxes, self.boxed, self.split = boxes, boxed, split

    def __len__(self) -> int:
        return len(self.images)

    def file(self, index: int) -> str | None:
        """Name of an image's file, relative to the data set's folder, where it has one."""
        reader = getattr(self.images, 'reader', None)
        samples = getattr(self.images, 'samples', None)  # torchvision's folders
        try:
            name = reader.filename(index) if reader is not None else (
                str(Path(samples[index][0]).relative_to(self.images.root)) if samples else None)
        except TypeError:  # a row without image
            return None
        return name and printable(name)

    def label(self, target: Any) -> int | None:
        """A target of the data set as a class of the model; None for a negative one, which says that it is not known.

        Raises:
            ValueError: it is no class, or one that the model has not.
        """
        if not self.labelled:
            return None
        try:
            target = int(operator.index(target))  # int alone makes classes of 0.7 and '1' too; index leaves True
        except TypeError:
            raise ValueError(f'DATASET: a label must be one class for each image, got {target!r}; without labels: '
                             '--no-labels') from None
        if target < 0:
            return None
        limit = self.num_classes if self.classes is None else len(self.classes)
        if target >= limit:
            raise ValueError(f'DATASET: label {target} outside [0, {limit - 1}], the classes of the model.')
        return target if self.classes is None else self.classes[target]

    def read(self, index: int) -> tuple[Image.Image, Any, Any]:
        """Image, upright in RGB as ``explain`` opens files, the data set's target, and its boxes or None.

        Raises:
            OSError: and many others; the image is broken.
        """
        image: Any
        more: list[Any] = []
        if hasattr(self.images, 'reader'):  # not its own []: that would go on to the next image if one is broken
            file, target, *more = self.images.reader[index]
            with file:
                image = Image.open(io.BytesIO(file.read()))
        elif hasattr(self.images, 'samples'):  # nor torchvision's: for RGB it clips 16-bit grey and drops alpha
            path, target = self.images.samples[index]
            image = Image.open(io.BytesIO(Path(path).read_bytes()))
        else:
            image, target, *more = self.images[index]
        return to_rgb(upright(image)), target, more[0] if more else None

    def preprocessed(self, index: int) -> Preprocessed:
        """An image with the geometry of its input."""
        return self.preprocessing(self.read(index)[0])

    def __getitem__(self, index: int) -> Item:
        file = self.file(index)
        try:
            image, target, found = self.read(index)
            source = self.preprocessing(image)
        except Exception as error:  # broken files raise whatever their readers raise
            return Item(index, file, None, None, (0, 0), (1., 1.), (0., 0.), None, reason(error))
        boxes = None
        if self.boxed:
            rows = found if self.boxes is None else self.boxes.get(Path(file or '').as_posix(), [])
            boxes = torch.tensor(rows if rows is not None else [], dtype=torch.float32).reshape(-1, 4)
        return Item(index, file, self.label(target), source.x, image.size, source.scale, source.offset, boxes)

    def fingerprint(self) -> str:
        """Digest of what a resumed run must find again: the number of images, and of files their names and sizes."""
        digest = hashlib.sha256(str(len(self)).encode())
        source = getattr(self.images, 'reader', self.images)
        for index, (file, *_) in enumerate(getattr(source, 'samples', None) or ()):
            try:
                size = file.size if isinstance(file, tarfile.TarInfo) else os.path.getsize(file)
            except OSError:  # it will be named as one that cannot be read
                size = -1
            digest.update(f'\0{self.file(index)}\0{size}'.encode())
        return digest.hexdigest()


def reason(error: Exception) -> str:
    """Why an image cannot be read; without the address in memory that Pillow's message ends with."""
    return 'no image that Pillow can read' if isinstance(error, UnidentifiedImageError) else one_line(error)


def split_readable(batch: list[Item]) -> tuple[list[Item], torch.Tensor | None, list[Item]]:
    """For DataLoader: the items that can be read, without their inputs, those inputs (B, C, H, W), and the others."""
    good, bad = [i for i in batch if i.x is not None], [i for i in batch if i.x is None]
    x = torch.stack([i.x for i in good if i.x is not None]) if good else None
    return [replace(i, x=None) for i in good], x, bad


def read_boxes(path: str | Path, column: str = 'file') -> dict[str, list[list[float]]]:
    """Boxes x0, y0, x1, y1 by the path of their image, from a CSV with a heading.

    Args:
        path: of the CSV, with the columns x0, y0, x1, y1.
        column: the one with the image's path.

    Raises:
        ValueError: no such file, or other columns or no numbers in it.
    """
    found: dict[str, list[list[float]]] = defaultdict(list)
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            for row in csv.DictReader(file):
                found[Path(row[column]).as_posix()].append([float(row[key]) for key in ('x0', 'y0', 'x1', 'y1')])
    except OSError as error:
        raise ValueError(f'--boxes: {error}') from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'--boxes: {path} must have the columns {column}, x0, y0, x1, y1 with numbers: {error!r}') from None
    return dict(found)


def check_box_names(images: ReportImages, path: str | Path) -> str:
    """A note if some files of a CSV with boxes are not in the data set, else ''.

    Raises:
        ValueError: none of them is, or its images have no names.
    """
    files = (images.file(index) for index in range(len(images)))
    known = {Path(file).as_posix() for file in files if file}
    if not known:
        raise ValueError('--boxes: the images of this data set have no file names')
    boxes = images.boxes or {}
    missing = [name for name in boxes if name not in known]
    if boxes and len(missing) == len(boxes):
        raise ValueError(f'--boxes: {path} is of other files, such as {missing[0]}; those of the data set are named as '
                         f'{min(known)}, from its folder on')
    return f'{len(missing)} of the {len(boxes)} files with boxes are not in the data set' if missing else ''


def match_classes(names: Sequence[str], labels: Sequence[str], synsets: Sequence[str] = ()) -> tuple[list[int], str]:
    """Class of the model for each class of the data set, and a note if they were matched by place and not by name.

    Names are compared as they are, and then without case and with '_' and '-' as spaces. A data set may have fewer
    classes than the model.

    Args:
        names: classes of the data set.
        labels: classes of the model; 'class 0', 'class 1', ... if they have no names.
        synsets: of an ImageNet model's classes, for data sets whose folders are called so.

    Raises:
        ValueError: neither the names are the model's nor are their number and order.
    """
    def plain(name: str) -> str:
        return re.sub(r'[\s_-]+', ' ', name).strip().casefold()
    for known in (labels, synsets):
        for form in (str, plain):
            places = {form(name): k for k, name in enumerate(known)}
            if all(form(name) in places for name in names) and len(places) == len(known) and len(
                    {form(name) for name in names}) == len(names):  # letters: A is not a
                return [places[form(name)] for name in names], ''
    if len(names) == len(labels):
        places = {plain(name): k for k, name in enumerate(labels)}
        elsewhere = next((name for k, name in enumerate(names) if places.get(plain(name), k) != k), None)
        if elsewhere is not None:
            raise ValueError(
                f"DATASET: not all of its classes have the model's names, and their order is another: {elsewhere!r} "
                f"is the model's class {places[plain(elsewhere)]}; rename them, or without labels: --no-labels")
        different = next((a, b) for a, b in zip(names, labels) if plain(a) != plain(b))
        unnamed = list(labels) == numbered(len(labels))
        note = '' if unnamed else (
            f"Names of classes differ and were matched by their order: {different[0]!r} is the model's "
            f'{different[1]!r}.')
        return list(range(len(names))), note
    strange = [name for name in names if plain(name) not in {plain(label) for label in labels}]
    raise ValueError(
        f'DATASET: its {len(names)} classes are not those of the model, which has {len(labels)} and no '
        f'{strange[:3]}; without labels: --no-labels')


def imagenet_synsets(model: Any) -> list[str]:
    """WordNet ids of an ImageNet model's classes, or nothing."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    subset = infer_imagenet_subset(cfg) if cfg.get('label_names') is None or cfg['label_names'] else None
    found = list(ImageNetInfo(subset).label_names()) if subset else []
    return found if len(found) == model.num_classes else []


def open_images(
        name: str, model: Any, labels: Sequence[str], preprocessing: Preprocessing, split: str | None = None,
        root: str | None = None, input_key: str | None = None, target_key: str | None = None, labelled: bool = True,
        boxes: str | None = None) -> tuple[ReportImages, list[str], str]:
    """A data set by timm's name, or a folder of images, with or without one sub-folder for each class.

    Args:
        name: ``hfds/...``, ``torch/...``, or the path of a folder or tar file.
        model: its classes are those of the labels.
        labels: names of its classes.
        preprocessing: of the model.
        split: of the data set; of a folder the sub-folder of that name. By default validation, if a folder has one.
        root: where a torch/ data set lies; cache of an hfds/ one.
        input_key, target_key: columns of an hfds/ data set, 'image' and 'label' unless they are given.
        labelled: look at the labels; without, or where there are none, the report has predictions alone.
        boxes: CSV, see ``read_boxes``; hfds/ data sets have a column ``boxes``.

    Returns:
        The images, names of the model's classes (the data set's if the model has none) and a note or ''.

    Raises:
        ValueError: no such data set or split, a stream, or classes that are not the model's.
        ImportError: an hfds/ data set without the package datasets.
    """
    kind = name.partition('/')[0].lower()
    if kind in STREAMS:
        raise ValueError(f'DATASET: {name} is a stream, which cannot be resumed; choose hfds/, torch/ or a folder.')
    remote = kind in ('hfds', 'torch') and '/' in name
    from_hub = kind == 'hfds' and not Path(name.partition('/')[2]).exists()
    if not remote and not Path(name).exists():
        raise ValueError(f'DATASET: no such folder: {name}; or give hfds/NAME or torch/NAME')
    folder = not remote and Path(name).is_dir()
    if folder:
        input_key = input_key or ';'.join(sorted(image_endings()))  # by itself timm takes .png and .jpg alone
    keys = {key: value for key, value in (('input_key', input_key), ('target_key', target_key)) if value}
    wanted = split or 'validation'

    def create(**more: Any) -> Any:
        try:
            with hub_or_cache() if from_hub else nullcontext():
                return create_dataset(
                    name if remote else '', root=root if remote else name, split=wanted, **{**keys, **more})
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed: pip install 'timm-lossattn[report]'") from None
        except Exception as error:  # unknown names, splits and columns, no network: many kinds
            empty = re.search(r'Found 0 images in subfolders of (.*)\. Supported', str(error))
            if folder and empty:  # timm goes on with its own list of endings, which is not ours
                raise ValueError(f'DATASET: no images in the folder {empty[1]}, nor in folders of it.') from None
            hint = '; where the Hub is out of reach, hfds/FOLDER takes a copy on disk' if from_hub else ''
            place = repr(name) + (f', split {wanted!r}' if remote or split else '')
            raise ValueError(f'DATASET: cannot open {place}: {one_line(error)}{hint}') from error

    images = create()
    if isinstance(images, IterableDataset) or not len(images):
        raise ValueError(f'DATASET: no image in {name}, split {wanted!r}')
    if folder and Path(images.reader.root) == Path(name):  # there is no such sub-folder: all images
        inside = sorted(path.name for path in Path(name).iterdir() if path.is_dir())
        if split is not None or (inside and {*inside} <= SPLITS):
            raise ValueError(f'--split: {name} has no folder {wanted}' + (
                f', but {shorten(", ".join(inside), 100)}' if inside else ''))
    by_name = read_boxes(boxes) if boxes else None
    boxed = by_name is not None
    columns = getattr(getattr(getattr(images, 'reader', None), 'dataset', None), 'features', None)
    if columns is not None:
        more: dict[str, Any] = {}
        if target_key is None and 'label' not in columns:
            labelled = False
        if not labelled:
            more['target_key'] = input_key or 'image'  # timm reads a target in any case; this one is there
        if by_name is None and 'boxes' in columns:
            more['additional_features'], boxed = ['boxes'], True
        images = create(**more) if more else images
    names = class_names(images)
    if names in ([''], ['.']):  # a folder without sub-folders
        labelled = False
    classes, note, shown = None, '', list(labels)
    if labelled and names:
        classes, note = match_classes(names, labels, imagenet_synsets(model))
        if len(names) == len(labels) and list(labels) == numbered(len(labels)):
            shown = names
    if not remote:
        root = str(images.reader.root)
        wanted = '' if Path(root) == Path(name) else Path(root).name
    report_images = ReportImages(images, preprocessing, len(labels), classes, labelled, by_name, boxed, wanted)
    if boxes and not from_hub:
        note = '; '.join(filter(None, [note, check_box_names(report_images, boxes)]))
    return report_images, shown, note
