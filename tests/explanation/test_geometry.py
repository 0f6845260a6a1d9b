"""geometry.py: boxes, pixel maps, and the patch geometry of real models."""
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_lossattn  # noqa: F401  (registers the models)
from timm_lossattn.explanation import patches_to_pixels, square_box
from timm_lossattn.explanation.geometry import patch_scores

NANO = 'resnet18_lossattn_conv_nano'


@pytest.mark.parametrize(('boxes', 'size', 'expected'), [
    ([[8, 4, 17, 13]], (32, 32), [8, 4, 17, 13]),  # one patch: itself
    ([[0, 0, 9, 9], [20, 20, 29, 29]], (32, 32), [0, 0, 29, 29]),  # opposite corners
    ([[0, 20, 9, 29], [20, 0, 29, 9]], (32, 32), [0, 0, 29, 29]),
    ([[8, 8, 17, 17], [16, 8, 25, 17]], (32, 32), [8, 4, 25, 21]),  # a row: centred
    ([[8, 0, 17, 9], [16, 0, 25, 9]], (32, 32), [8, 0, 25, 17]),  # a row at the top: moved down
    ([[20, 0, 29, 9], [20, 12, 29, 21]], (29, 29), [8, 0, 29, 21]),  # a column at the right border: moved left
    ([[0, 0, 9, 9], [40, 0, 49, 9]], (20, 50), [0, 0, 49, 20]),  # wide image: clipped to its height
    ([[0, 0, 9, 9], [0, 40, 9, 49]], (50, 9), [0, 0, 9, 49]),  # tall image: clipped to its width
])
def test_square_box(boxes, size, expected):
    """Hand-made cases."""
    assert square_box(torch.tensor(boxes), size).tolist() == expected


@st.composite
def boxes_in_image(draw):
    """Image size and 1 to 5 boxes within it."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    boxes = []
    for _ in range(draw(st.integers(1, 5))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))))
    return boxes, (height, width)


@settings(max_examples=150, deadline=None)
@given(boxes_in_image())
def test_square_box_properties(case):
    """Always within the image and around all boxes; a square of the longer side unless the image is narrower."""
    boxes, (height, width) = case
    x0, y0, x1, y1 = square_box(torch.tensor(boxes), (height, width)).tolist()
    side = max(max(b[2] for b in boxes) - min(b[0] for b in boxes), max(b[3] for b in boxes) - min(b[1] for b in boxes))
    assert x0 >= 0
    assert y0 >= 0
    assert x1 <= width
    assert y1 <= height
    assert all(x0 <= b[0] and y0 <= b[1] and x1 >= b[2] and y1 >= b[3] for b in boxes)
    assert (x1 - x0, y1 - y0) == (min(side, width), min(side, height))


def test_patches_to_pixels_is_the_average():
    """Against a loop over pixels; NaN exactly where no patch lies."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0, 0, 4, 4], [2, 1, 6, 5], [5, 5, 8, 7], [5, 5, 8, 7]])
    values = torch.randn(2, 4)
    maps = patches_to_pixels(values, boxes, (8, 9))
    assert maps.shape == (2, 8, 9)
    for b in range(2):
        for y in range(8):
            for x in range(9):
                over = [float(values[b, m]) for m, (x0, y0, x1, y1) in enumerate(boxes.tolist())
                        if x0 <= x < x1 and y0 <= y < y1]
                got = float(maps[b, y, x])
                assert math.isnan(got) if not over else got == pytest.approx(sum(over) / len(over), abs=1e-6)


@pytest.mark.parametrize(('stride', 'size', 'grid'), [(1, 32, 6), (2, 64, 6), (8, 224, 5)])
def test_patch_geometry_of_the_design(stride, size, grid):
    """DESIGN.md section 3: grids, and patch (i, j) covers [4si, 4si + 9s) × [4sj, 4sj + 9s)."""
    model = timm.create_model(NANO, backbone_stride=stride)
    assert model.patch_grid(size, size) == (grid, grid)
    boxes = model.patch_boxes(size, size)
    assert boxes.shape == (grid * grid, 4)
    assert boxes.max() <= size
    s = stride
    for i, j in ((0, 0), (1, 3), (grid - 1, grid - 2)):
        assert boxes[i * grid + j].tolist() == [4 * s * j, 4 * s * i, 4 * s * j + 9 * s, 4 * s * i + 9 * s]


def test_patch_boxes_of_a_rectangle():
    """x belongs to columns and y to rows when height and width differ."""
    model = timm.create_model(NANO)
    assert model.patch_grid(20, 36) == (3, 7)
    boxes = model.patch_boxes(20, 36)
    assert boxes[7].tolist() == [0, 4, 9, 13]
    assert boxes[6].tolist() == [24, 0, 33, 9]


@pytest.mark.parametrize('stride', [1, 2, 4, 8])
def test_patch_grid_is_that_of_the_feature_map(stride):
    """For odd sizes too; boxes stay within the image."""
    model = timm.create_model(NANO, backbone_stride=stride).eval()
    first = 8 * stride + 1  # the smallest image with one patch
    sizes = [(first, first), (first, first + 1), (first + stride, first + 4 * stride - 1)]
    sizes += [(first + d, first + 5 * stride - d) for d in range(0, 5 * stride, max(1, stride - 1))][:6]
    for height, width in sizes:
        with torch.no_grad():
            features = model.forward_features(torch.zeros(1, 3, height, width))
        assert model.patch_grid(height, width) == tuple(features.shape[-2:]), (height, width)
        boxes = model.patch_boxes(height, width)
        assert len(boxes) == features.shape[-2] * features.shape[-1]
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_patch_scores():
    """Means over patches; pixels without a value do not count."""
    heat = torch.zeros(1, 6, 6)
    heat[0, 4, 4], heat[0, 0, 0] = 8., torch.nan
    boxes = torch.tensor([[0, 0, 3, 3], [2, 0, 5, 3], [0, 2, 3, 5], [2, 2, 5, 5]])  # 2×2 patches of 3×3, 2 apart
    assert patch_scores(heat, boxes)[0].tolist() == pytest.approx([0., 0., 0., 8 / 9])
