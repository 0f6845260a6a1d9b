"""Everything that evaluates sees the pixels of timm's evaluation transform, to the last bit, and boxes follow them."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from lib.boxes import BoxDataset, collate_boxes
from lib.data import create_eval_loader, fit
from lib.options import DataOptions
from lib.process import Process

CONFIGS = [
    pytest.param({'input_size': size, 'crop_mode': mode, 'crop_pct': pct, 'interpolation': interpolation,
                  'mean': (0.5, 0.4, 0.3)[:size[0]], 'std': (0.2, 0.25, 0.3)[:size[0]]}, id=f'{size}-{mode}-{pct}')
    for size, pct, interpolation in (((3, 64, 64), 1., 'bicubic'), ((3, 64, 96), 0.875, 'bilinear'),
                                     ((3, 32, 32), 0.9, 'bilinear'), ((1, 48, 32), 1., 'bicubic'))
    for mode in ('center', 'squash', 'border')]


class Images(Dataset):
    """Noise of several sizes, as timm's datasets give it: an image before a transform is set, then what it makes."""
    sizes = ((64, 64), (80, 50), (41, 77), (96, 64), (300, 200))

    def __init__(self, channels, boxes=None):
        generator = torch.Generator().manual_seed(0)
        self.images = [
            Image.fromarray(torch.randint(256, (height, width, 3), generator=generator).byte().numpy()).convert(
                'RGB' if channels == 3 else 'L') for width, height in self.sizes]
        self.transform, self.target_transform, self.boxes = None, None, boxes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i] if self.transform is None else self.transform(self.images[i])
        return (image, i) if self.boxes is None else (image, i, self.boxes)


@pytest.mark.parametrize('config', CONFIGS)
def test_the_same_pixels_everywhere(config):
    """The loader of train.py and validate.py, cached or not, and images with boxes: max |Δ| = 0."""
    channels = config['input_size'][0]
    transform = create_transform(is_training=False, **config)
    want = torch.stack([transform(image) for image in Images(channels).images])
    options = {'workers': 0, 'batch_size': 8}
    for data in (DataOptions(**options), DataOptions(**options, cache_dataset=True)):
        ((x, y),) = create_eval_loader(data, Process(), Images(channels), config)
        assert float((x - want).abs().max()) == 0
        assert y.tolist() == list(range(5))
    boxed = BoxDataset(Images(channels, boxes=[]), config)
    ((x, *_),) = DataLoader(boxed, batch_size=8, collate_fn=collate_boxes)
    assert float((x - want).abs().max()) == 0


@pytest.mark.parametrize('config', CONFIGS)
def test_boxes_follow_the_pixels(config):
    """A white rectangle's box lands where the rectangle does; what is cropped away has no box."""
    truth = [120, 70, 180, 131]
    pixels = np.zeros((200, 300), dtype=np.uint8)
    pixels[truth[1]:truth[3], truth[0]:truth[2]] = 255
    images = Images(config['input_size'][0], boxes=[truth, [0, 0, 300, 200]])
    images.images = [Image.fromarray(pixels).convert(images.images[0].mode)]
    x, _, boxes, classes = BoxDataset(images, config)[0]
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    white = (x * std + mean)[0] > 0.7  # what is filled in around the image is darker
    rows, columns = white.any(dim=1).nonzero().flatten(), white.any(dim=0).nonzero().flatten()
    found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert float((boxes[0] - found).abs().max()) <= 1
    assert len(boxes) == 2
    assert classes.tolist() == [-1, -1]  # not said

    images.boxes = [[0, 0, 1, 1], [299, 199, 300, 200]]
    cropped = len(BoxDataset(images, config)[0][2])
    shown = config['crop_mode'] != 'center' and config['crop_pct'] == 1
    assert cropped == (2 if shown else 0)


@pytest.mark.parametrize('config', CONFIGS)
def test_fit_leaves_the_right_size_alone(config):
    """Before the paper's random crop, nothing is cut off an image of the input's size; others get it."""
    channels, height, width = config['input_size']
    for image in Images(channels).images:
        made = fit(config)(image)
        assert made.shape == (channels, height, width)
        assert made.dtype == torch.uint8
        right = image.resize((width, height))
        pixels = torch.from_numpy(np.array(right)).reshape(height, width, channels).permute(2, 0, 1)
        assert torch.equal(fit(config)(right), pixels)
