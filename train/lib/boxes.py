"""Images with ground-truth boxes that follow them through timm's evaluation transform."""
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from timm_lossattn.explanation import Preprocessing, class_labels
from timm_lossattn.explanation.labels import class_names

from .data import input_config, open_dataset
from .model import load_trained
from .options import DataOptions, EvalOptions

__all__ = [
    'BoxDataset', 'box_columns', 'boxed_loader', 'collate_boxes', 'fixed_order', 'has_boxes', 'open_boxed',
    'open_patch_model',
]


class BoxDataset(Dataset):
    """(image, target, boxes, classes) from a Hugging Face dataset of train/prepare.py, or without boxes from any other.

    Boxes are x0, y0, x1, y1 in pixels of the model's input, (L, 4) float32; those that are cropped away are left out.
    Classes are those of the objects in them, (L,) int64, -1 where the dataset does not say.

    Args:
        dataset: timm's dataset, over hfds/ with ``additional_features=['boxes']``, or also ``'box_labels'``, where it
            has these.
        config: timm's data config.
    """

    def __init__(self, dataset: Any, config: dict[str, Any]) -> None:
        self.dataset = dataset
        self.preprocessing = Preprocessing(config)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        image, target, *given = self.dataset[index]
        preprocessed = self.preprocessing(image)
        boxes = preprocessed.to_input(
            torch.tensor(given[0] if given else [], dtype=torch.float32).reshape(-1, 4)).float()
        classes = torch.tensor(given[1] if given[1:] else [-1] * len(boxes), dtype=torch.int64)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return preprocessed.x, target, boxes[seen], classes[seen]


def collate_boxes(batch: list) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Images (B, C, H, W), targets (B,) or (B, K), B tensors of boxes (L, 4), and B of their classes (L,)."""
    images, targets, boxes, classes = zip(*batch)
    return torch.stack(images), torch.stack([torch.as_tensor(t) for t in targets]), list(boxes), list(classes)


def box_columns(dataset: Any) -> list[str]:
    """Its columns of boxes and of their classes, as prepare.py writes them."""
    columns = getattr(getattr(getattr(dataset, 'reader', None), 'dataset', None), 'features', None) or {}
    return [name for name in ('boxes', 'box_labels') if name in columns]


def has_boxes(dataset: Any) -> bool:
    """Whether it is one that prepare.py wrote."""
    return 'boxes' in box_columns(dataset)


def open_boxed(data: DataOptions, num_classes: int, config: dict[str, Any], dataset: Any = None) -> BoxDataset:
    """Images of --val-split, with boxes where there are any; ``dataset`` if it is open already, without boxes.

    Raises:
        ValueError: what ``open_dataset`` raises.
    """
    dataset = open_dataset(data, data.val_split, num_classes) if dataset is None else dataset
    if has_boxes(dataset):
        dataset = open_dataset(data, data.val_split, num_classes, additional_features=box_columns(dataset))
    return BoxDataset(dataset, config)


def open_patch_model(options: EvalOptions) -> tuple[Any, dict[str, Any], BoxDataset, list[str]]:
    """Patch model on the CPU, its data config, images with boxes where there are any, and label names.

    Raises:
        ValueError: the model has no patches, or what ``load_trained`` and ``open_dataset`` raise.
    """
    model = load_trained(options, patches=True)
    config = input_config(options, model)
    dataset = open_boxed(options, model.num_classes, config)
    return model, config, dataset, class_names(dataset.dataset) or class_labels(model, model.num_classes)


def boxed_loader(dataset: Dataset, data: DataOptions) -> Any:
    """Batches as ``collate_boxes`` makes them, of a ``BoxDataset`` or a part of it, in its order."""
    return DataLoader(dataset, data.batch_size, num_workers=data.workers, collate_fn=collate_boxes)


def fixed_order(dataset: BoxDataset, images: int | None = None) -> list[int]:
    """Indices of so many images, or all, in a random order that is the same for every script."""
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:images].tolist()
