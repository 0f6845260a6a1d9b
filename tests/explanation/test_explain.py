"""explain.py: known answers on a hand-made model, boxes, pixel maps, and the patch geometry of real models."""
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import timm_lossattn  # noqa: F401  (registers the models)
from timm_lossattn import PatchPrediction
from timm_lossattn.attention import AttentionWeights, GatedAttentionWeights, LossAttentionWeights, MeanWeights
from timm_lossattn.attention.routing_head import RoutingWeights
from timm_lossattn.explanation import class_labels, explain, patches_to_pixels, square_box
from timm_lossattn.explanation.labels import find_class, known_classes, training_data
from timm_lossattn.explanation.preprocessing import open_image, preprocess

NANO = 'resnet18_lossattn_conv_nano'
FILES = sorted((Path(__file__).parents[1] / 'data').glob('*.png'))[:2]
GRID, PATCH, STEP = (3, 4), 9, 4  # rows, columns of the fake model


class FakePatchModel(nn.Module):
    """Answers with given contributions and alpha, whatever the images; 3×4 patches of 9×9 pixels, 4 apart."""

    def __init__(self, contributions, alpha, weights=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.contributions, self.alpha = contributions, alpha
        self.patch_weights = weights or LossAttentionWeights()

    def forward_patches(self, x):
        patch_logits = self.contributions / self.alpha.clamp(min=1e-9).unsqueeze(-1)
        return PatchPrediction(
            self.contributions.sum(1) * self.scale, patch_logits, self.alpha, self.contributions * self.scale)

    def patch_grid(self, height, width):
        return GRID

    def patch_boxes(self, height, width):
        corners = [(STEP * j, STEP * i) for i in range(GRID[0]) for j in range(GRID[1])]
        return torch.tensor([(x, y, x + PATCH, y + PATCH) for x, y in corners])


SIZE = (STEP * (GRID[0] - 1) + PATCH + 2, STEP * (GRID[1] - 1) + PATCH + 1)  # 19 × 22: margins of 2 rows, 1 column


def planted():
    """Image 0: patch 6, row 1, column 2, gives 3 for class 2; image 1: patch 0 gives 1 for class 0; all else is 0."""
    contributions, alpha = torch.zeros(2, 12, 5), torch.zeros(2, 12)
    contributions[0, 6, 2], contributions[0, 6, 4], contributions[1, 0, 0] = 3., -2., 1.
    alpha[0, 6] = alpha[1, 0] = 1.
    return FakePatchModel(contributions, alpha).eval()


def test_planted_patch():
    """The planted patch is what explain reports: class, selection, evidence, box, pixel map."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), against='mean')
    assert len(e) == 2
    assert e.grid == GRID
    assert e.input_size == SIZE
    assert e.target.tolist() == [2, 0]
    assert e.selected.nonzero().tolist() == [[0, 6], [1, 0]]
    assert e.boxes.tolist() == [[8, 4, 17, 13], [0, 0, 9, 9]]
    assert e.evidence[0].tolist() == [0.] * 6 + [3. + 2. / 4] + [0.] * 5  # −2 for one of the four other classes
    e = explain(planted(), torch.zeros(2, 3, *SIZE), against=None)
    assert e.evidence[0].tolist() == [0.] * 6 + [3.] + [0.] * 5
    maps = e.pixel_map(e.evidence)
    assert maps.shape == (2, *SIZE)
    assert float(maps[0, 4, 8]) == pytest.approx(3 / 6)  # covered by rows 0-1 and columns 0-2
    assert float(maps[0, 12, 16]) == pytest.approx(3 / 4)  # covered by rows 1-2 and columns 2-3
    assert float(maps[1, 0, 0]) == 1.
    assert float(maps[1, 0, 4]) == pytest.approx(1 / 2)
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[4:13, 8:17] = True
    assert torch.equal(maps[0].nan_to_num(0.) > 0, inside)
    torch.testing.assert_close(e.probabilities, e.prediction.logits.softmax(1))


def test_why_not():
    """The difference of two classes' contributions; its sum is the difference of the logits."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), against=[4, 1])
    assert e.evidence[0].tolist() == [0.] * 6 + [5.] + [0.] * 5
    logits = e.prediction.logits
    difference = torch.stack([logits[0, 2] - logits[0, 4], logits[1, 0] - logits[1, 1]])
    torch.testing.assert_close(e.evidence.sum(1), difference)
    with pytest.raises(ValueError, match=r'against must hold 2 classes in \[0, 4\], got \[5, 0\]'):
        explain(planted(), torch.zeros(2, 3, *SIZE), against=[5, 0])
    with pytest.raises(ValueError, match=r"against: no class 'dog'; choose one of \['class 0', .*or an index"):
        explain(planted(), torch.zeros(2, 3, *SIZE), against='dog')


def test_common_shift():
    """What a patch adds to all logits alike changes no probability, nor the evidence over the other classes."""
    model = planted()
    before = explain(model, torch.zeros(2, 3, *SIZE))
    model.contributions = model.contributions + torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(0))
    after = explain(model, torch.zeros(2, 3, *SIZE))
    torch.testing.assert_close(after.probabilities, before.probabilities)
    torch.testing.assert_close(after.evidence, before.evidence, rtol=0., atol=1e-6)
    one = FakePatchModel(torch.ones(1, 12, 1), torch.full((1, 12), 1 / 12)).eval()
    assert explain(one, torch.zeros(1, 3, *SIZE)).against is None  # a single class has no others


@pytest.mark.parametrize('target', [[4, 1], torch.tensor([4, 1]), torch.tensor([[4], [1]], dtype=torch.int32)])
def test_target_argument(target):
    """Evidence of the classes asked for, given as list or as tensor of any integer type."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), target, against=None)
    assert e.target.tolist() == [4, 1]
    assert e.evidence[0].tolist() == [0.] * 6 + [-2.] + [0.] * 5
    assert e.evidence[1].abs().max() == 0


@pytest.mark.parametrize('name', [NANO, 'resnet18_lossattn_caps_nano'])
@pytest.mark.parametrize('target', [None, [3, 9]])
def test_evidence_sums(name, target):
    """Real models: over patches it adds up to the target's lead or logit, and pixel maps have the input's size."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 32, 40)
    e = explain(model, images, target)
    with torch.no_grad():
        logits = model(images)
    expected = logits.argmax(1) if target is None else torch.tensor(target)
    assert e.target.tolist() == expected.tolist()
    others = torch.ones_like(logits).scatter(1, expected[:, None], 0.).bool()
    logit = logits.gather(1, expected[:, None])[:, 0]
    rest = logits[others].view(2, 9)
    torch.testing.assert_close(e.evidence.sum(1), logit - (rest.softmax(1) * rest).sum(1))
    torch.testing.assert_close(e.versus('mean').evidence.sum(1), logit - rest.mean(1))
    torch.testing.assert_close(explain(model, images, target, against=None).evidence.sum(1), logit)
    assert e.grid[0] * e.grid[1] == e.evidence.shape[1]
    assert e.pixel_map(e.evidence).shape == (2, 32, 40)


@pytest.mark.parametrize(('weights', 'selected'), [
    (LossAttentionWeights(xi=0.5), [3, 5, 7]),  # α > 0
    (AttentionWeights(2, xi=0.5), [5, 7]),  # α > ξ/M = 0.5/12
    (GatedAttentionWeights(2, xi=0.5), [5, 7]),
    (MeanWeights(), list(range(12))),
    (RoutingWeights(), list(range(12))),
])
def test_selected_rule(weights, selected):
    """DESIGN.md section 7: which patches count as selected with each head."""
    alpha = torch.zeros(1, 12)
    alpha[0, 3], alpha[0, 5], alpha[0, 7] = 0.04, 0.044, 0.916  # ξ/M = 0.0417
    e = explain(FakePatchModel(torch.zeros(1, 12, 5), alpha, weights).eval(), torch.zeros(1, 3, *SIZE))
    assert e.selected[0].nonzero().flatten().tolist() == selected


def test_prediction_is_float32_without_graph():
    """A half-precision model is explained in float32, without a graph."""
    model = timm.create_model(NANO).eval().to(torch.bfloat16)
    e = explain(model, torch.randn(1, 3, 32, 32))
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in e.prediction)


def test_no_patch_model():
    """Any other module is refused by its type."""
    with pytest.raises(TypeError, match=r'model must have forward_patches.*Linear'):
        explain(nn.Linear(2, 2), torch.zeros(1, 3, 32, 32))


def test_train_mode():
    """Batch statistics would make explanations depend on the rest of the batch."""
    with pytest.raises(ValueError, match=r'model must be in eval mode'):
        explain(planted().train(), torch.zeros(2, 3, *SIZE))


@pytest.mark.parametrize('target', [
    [5, 0], [0, -1], [0], [0, 1, 2], 5, True, [None, 1], [0.5, 1.], torch.tensor([True, False])])
def test_bad_target(target):
    """Classes that do not exist, a wrong number of them, and what is no class at all."""
    with pytest.raises(ValueError, match=r'^target must hold 2 classes in \[0, 4\]'):
        explain(planted(), torch.zeros(2, 3, *SIZE), target)


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


def test_images_as_files_and_tensors():
    """Files, PIL images, preprocessed images and the tensor made of them give the same numbers and the same picture."""
    model = timm.create_model(NANO, pretrained=True).eval()
    sources = [preprocess(model, open_image(file)) for file in FILES]
    found = [explain(model, images) for images in (
        torch.stack([s.x for s in sources]), sources, FILES, list(map(str, FILES)), [s.image for s in sources])]
    assert [e.to_dict(1) for e in found] == [found[0].to_dict(1)] * 5
    assert json.loads(found[0].to_json(1, image='ship')) == {'image': 'ship', **found[0].to_dict(1)}
    for e in found:  # CIFAR's images are of the input's size: undoing the normalisation gives them back
        assert np.array_equal(np.asarray(e.source(1).image), np.asarray(sources[1].image))
    grey = Image.open(FILES[0]).convert('L')
    assert explain(model, [grey]).source(0).image.mode == 'RGB'
    one = timm.create_model(NANO, in_chans=1).eval()
    assert explain(one, torch.zeros(1, 1, 32, 32)).source(0).image.getextrema() == ((121, 121),) * 3  # the mean, 0.473
    for images, message in (([torch.zeros(3, 32, 32)], 'a list with a Tensor'), (['no/such.png'], 'no such file')):
        with pytest.raises(ValueError, match=message):
            explain(model, images)


def test_one_image():
    """A file or a PIL image need no list; a photograph's orientation is applied in both cases; one int is for all."""
    model = timm.create_model(NANO, pretrained=True).eval()
    photo = Image.open(FILES[0]).resize((40, 32))
    photo.getexif()[0x0112] = 6  # turned by 90°
    e = explain(model, photo)
    assert len(e) == 1
    assert e.source(0).image.size == (32, 40)
    assert explain(model, FILES[0]).to_dict() == explain(model, [FILES[0]]).to_dict()
    two = explain(model, FILES, target=9, against=1)
    assert two.target.tolist() == [9, 9]
    assert two.against.tolist() == [1, 1]
    with pytest.raises(ValueError, match='against must differ from the target'):
        explain(model, FILES, target=9, against=9)
    with pytest.raises(ValueError, match='without pretrained_cfg'):
        explain(planted(), FILES)


def test_multi_label():
    """Independent classes: sigmoids, and the evidence is the share in the logit itself. So it is for a single class."""
    model = timm.create_model(NANO, pretrained=True).eval()
    e = explain(model, FILES, multi_label=True)
    torch.testing.assert_close(e.probabilities, e.prediction.logits.sigmoid())
    assert e.against is None
    torch.testing.assert_close(e.evidence.sum(1), e.prediction.logits.amax(1))
    one = timm.create_model(NANO, num_classes=1).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(explain(one, x).probabilities, one(x).sigmoid().detach())


def test_own_copy():
    """What the caller does to the images afterwards does not change the explanation."""
    x = torch.zeros(1, 3, 32, 32)
    e = explain(timm.create_model(NANO).eval(), x)
    before = e.source(0).image.tobytes()
    x.fill_(2.)
    assert e.source(0).image.tobytes() == before


def test_save(tmp_path):
    """A picture and the numbers for each image; wrong counts are refused before anything is written."""
    e = explain(timm.create_model(NANO).eval(), torch.zeros(2, 3, 32, 32))
    assert e.save(tmp_path / 'a' / 'b', notes='mine') == [tmp_path / 'a' / 'b' / f'{i}.png' for i in range(2)]
    assert sorted(p.name for p in (tmp_path / 'a' / 'b').iterdir()) == ['0.json', '0.png', '1.json', '1.png']
    assert json.loads((tmp_path / 'a' / 'b' / '1.json').read_text()) == {'notes': 'mine', **e.to_dict(1)}
    with pytest.raises(ValueError, match='names and titles must have 2 entries'):
        e.save(tmp_path / 'c', names=['one'])
    for names in (['a', 'a'], ['a', '../b'], ['a', 'b/c']):
        with pytest.raises(ValueError, match='different plain file names'):
            e.save(tmp_path / 'c', names=names)
    assert not (tmp_path / 'c').exists()


def test_show(monkeypatch):
    """One PNG for each image goes to the notebook."""
    shown = []
    monkeypatch.setattr('IPython.display.display', shown.append)
    explain(timm.create_model(NANO).eval(), torch.zeros(2, 3, 32, 32)).show()
    assert [image.data[:4] for image in shown] == [b'\x89PNG'] * 2


def test_class_labels():
    """Names are those of weights that were loaded; other classes, or weights of one's own, have numbers."""
    model = timm.create_model(NANO, pretrained=True)
    assert class_labels(model, 10)[:2] == ['airplane', 'automobile']
    assert class_labels(model, 3) == ['class 0', 'class 1', 'class 2']
    assert class_labels(timm.create_model(NANO), 10)[:2] == ['class 0', 'class 1']
    model.reset_classifier(10)
    assert class_labels(model, 10)[:2] == ['class 0', 'class 1']


def test_a_part_in_train_mode():
    """Batch norm in train mode anywhere would explain another model: refused, and named."""
    model = timm.create_model(NANO).eval()
    model.backbone.stages[1].train()
    with pytest.raises(ValueError, match=r"eval mode.*part 'backbone\.stages\.1' is in train mode"):
        explain(model, torch.zeros(1, 3, 32, 32))


def test_versus():
    """Another comparison of the same forward pass equals explaining anew; the target and strangers are refused."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE))
    anew = explain(planted(), torch.zeros(2, 3, *SIZE), against=[4, 1])
    torch.testing.assert_close(e.versus([4, 1]).evidence, anew.evidence)
    torch.testing.assert_close(e.versus(None).versus('rest').evidence, e.evidence)
    assert e.versus(1).against.tolist() == [1, 1]
    for wrong, message in ((2, 'must differ from the target'), (5, r'in \[0, 4\]'), ('dog', "'dog'")):
        with pytest.raises(ValueError, match=message):
            e.versus(wrong)


def test_json_holds_what_is_compared():
    """The map of the target and of the class it is compared with; every class on request."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), against=[4, 1])
    shares = e.to_dict(0)['contributions']
    assert set(shares) == {'target', 'against'}
    assert (shares['target'][1][2], shares['against'][1][2]) == (3., -2.)
    assert set(e.versus('rest').to_dict(0)['contributions']) == {'target'}
    assert torch.tensor(e.to_dict(0, all_classes=True)['contributions']).shape == (*GRID, 5)


def test_names_in_python():
    """Classes by name, for all images or for each, as target and as what it is compared with; the answer in a line."""
    model = planted()
    model.pretrained_cfg = {'label_names': ['tabby', 'Persian cat', 'tiger cat', 'dog', 'crane (n1)']}
    x = torch.zeros(2, 3, *SIZE)
    e = explain(model, x, target='dog', against='Tabby')
    assert (e.target.tolist(), e.against.tolist()) == ([3, 3], [0, 0])
    assert explain(model, x, ['persian', 4]).target.tolist() == [1, 4]
    assert explain(model, x).versus(['crane', 'tiger cat']).against.tolist() == [4, 2]
    for value, reason in (('cat', r"'cat' may be 2 classes; choose one of \['Persian cat', 'tiger cat'\]"),
                          ('do', "no class 'do'"), ('', "no class ''"), ('5', "no class '5'")):
        with pytest.raises(ValueError, match=f'^target: {reason}'):
            explain(model, x, value)
    e = explain(model, x, against='crane')
    total, positive = float(e.evidence[0].sum()), int((e.evidence[0] > 0).sum())
    assert e.answer() == f'tiger cat over crane (n1): {total:+.2f}; {positive} of 12 patches for it'
    assert explain(model, x, against=None).answer(1).startswith('tabby, its logit: ')
    with pytest.raises(ValueError, match='against must differ from the target'):
        e.versus('tiger cat')


def test_close_names_of_many_classes():
    """Of a thousand names those that look alike are proposed; whole words come before them."""
    labels = [f'thing{k}' for k in range(1000)] + ['tabby', 'Egyptian cat']
    assert find_class('target', 'egyptian', labels) == 1001
    with pytest.raises(ValueError, match=r"^--target: no class 'taby'; choose one of \['tabby'\] or an index"):
        find_class('--target', 'taby', labels)


@pytest.mark.parametrize(('tag', 'data'), [
    ('clip_laion2b_augreg_ft_in12k_in1k', 'ImageNet-1k'), ('a1_in1k', 'ImageNet-1k'), ('fb_in22k', 'ImageNet-22k')])
def test_training_data_of_timm_tags(tag, data):
    """The last ImageNet in a tag is the one whose classes the model has."""
    model = SimpleNamespace(pretrained_cfg={'tag': tag})
    assert training_data(model, ['tench', 'goldfish']) == data
    assert training_data(model, ['class 0', 'class 1']) == ''


def test_training_data():
    """What the tag says, where the classes are those of its weights; fine-tuned classes are of other data."""
    model = timm.create_model('resnet18_lossattn_conv_nano', pretrained=True)
    labels = class_labels(model, 10)
    assert training_data(model, labels) == 'CIFAR-10'
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': ['ant', *labels[1:]]}
    assert training_data(model, class_labels(model, 10)) == ''
    for name, data in (('resnet18.a1_in1k', 'ImageNet-1k'), ('convnext_tiny.fb_in22k_ft_in1k', 'ImageNet-1k'),
                       ('convnext_tiny.fb_in22k', 'ImageNet-22k')):
        model = timm.create_model(name, device='meta')
        assert training_data(model, class_labels(model, model.num_classes)) == data
    assert training_data(timm.create_model('resnet18.a1_in1k', num_classes=5, device='meta'), ['class 0']) == ''


def test_known_classes():
    """What a model knows, in a few words."""
    assert known_classes(['cat', 'dog', 'eel']) == 'knows 3 classes: cat … eel'
    assert known_classes(['cat', 'dog'], 'PETS') == 'knows 2 classes of PETS: cat … dog'
    assert known_classes(['cell']) == 'knows 1 class: cell'
    assert known_classes([f'class {k}' for k in range(1000)]) == 'knows 1,000 classes, without names'


def test_one_image_or_none():
    """An image without batch dimension, and no image at all: what is wrong and what helps."""
    with pytest.raises(ValueError, match=r'got a tensor of shape \(3, 20, 24\); .*x\.unsqueeze\(0\)'):
        explain(planted(), torch.zeros(3, 20, 24))
    with pytest.raises(ValueError, match='images must hold at least one image, got an empty list'):
        explain(planted(), [])


def test_notebook_shows_the_picture():
    """An Explanation at the end of a cell is the picture of its first image."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE))
    with Image.open(io.BytesIO(e._repr_png_())) as picture:
        assert picture.format == 'PNG'
        assert min(picture.size) > 100
