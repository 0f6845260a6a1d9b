"""Images with ground-truth boxes that follow them through resize, crop and flip."""
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ['BoxDataset', 'collate_boxes', 'evaluation_transform']


def evaluation_transform(data_config: dict[str, Any]) -> v2.Compose:
    """timm's evaluation preprocessing (resize the shorter side, centre crop, normalise) for an image and its boxes."""
    _, height, width = data_config['input_size']
    crop_pct = data_config['crop_pct'] or 1.
    return v2.Compose([
        v2.Resize(
            int(min(height, width) / crop_pct) if height == width else (int(height / crop_pct), int(width / crop_pct)),
            interpolation=v2.InterpolationMode(data_config['interpolation']), antialias=True),
        v2.CenterCrop((height, width)),
        v2.ClampBoundingBoxes(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(data_config['mean']), std=list(data_config['std'])),
    ])


class BoxDataset(Dataset):
    """(image, target, boxes) from a Hugging Face dataset that train/prepare.py wrote, or without boxes from any other.

    Args:
        dataset: timm's dataset, over hfds/ with ``additional_features=['boxes']`` where it has boxes.
        transform: of torchvision.transforms.v2, for an image and its boxes.
    """

    def __init__(self, dataset, transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any, torch.Tensor]:
        image, target, *given = self.dataset[index]
        boxes = tv_tensors.BoundingBoxes(
            torch.tensor(given[0] if given else [], dtype=torch.float32).reshape(-1, 4), format='XYXY',
            canvas_size=image.size[::-1])
        image, boxes = self.transform(image, boxes)
        size = boxes[:, 2:] - boxes[:, :2]
        return image.as_subclass(torch.Tensor), target, boxes[(size > 0).all(dim=1)].as_subclass(torch.Tensor)


def collate_boxes(batch: list) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Images (B, C, H, W), targets (B,) or (B, K), and B tensors of boxes (L, 4)."""
    images, targets, boxes = zip(*batch)
    return torch.stack(images), torch.stack([torch.as_tensor(t) for t in targets]), list(boxes)
