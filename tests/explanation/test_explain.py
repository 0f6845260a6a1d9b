"""explain.py: known answers on a hand-made model, real models, and what it takes and refuses."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_lossattn  # noqa: F401  (registers the models)
from fake_patch_model import GRID, SIZE, FakePatchModel, planted
from timm_lossattn.attention import AttentionWeights, GatedAttentionWeights, LossAttentionWeights, MeanWeights
from timm_lossattn.attention.routing_head import RoutingWeights
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.preprocessing import open_image, preprocess

NANO = 'resnet18_lossattn_conv_nano'
FILES = sorted((Path(__file__).parents[1] / 'data').glob('*.png'))[:2]


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
    with pytest.raises(TypeError, match=rf"got the name '{NANO}': timm_lossattn\.load_model\('{NANO}'\) gives it"):
        explain(NANO, torch.zeros(1, 3, 32, 32))


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


def test_arrays():
    """A NumPy image, or a list of them, is what Pillow makes of it; others are refused with what is wanted."""
    model = timm.create_model(NANO, pretrained=True).eval()
    arrays = [np.asarray(Image.open(file)) for file in FILES]
    assert explain(model, arrays).to_dict(1) == explain(model, FILES).to_dict(1)
    assert explain(model, arrays[0]).to_dict() == explain(model, FILES[0]).to_dict()
    for wrong in (arrays[0] / 255, np.stack(arrays), arrays[0].transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r'\(H, W, 3\) uint8 say, got \((32, 32, 3\) float64|[23], .*uint8)'):
            explain(model, wrong)


def test_labels():
    """Names of one's own classes, in place of the weights'; not those of other data, and neither too few nor equal."""
    model = timm.create_model('resnet18.a1_in1k', num_classes=3).eval()
    e = explain(model, FILES[0], target='b', against='c', labels=['a', 'b', 'c'])
    assert (e.labels, e.target.tolist(), e.against.tolist(), e.data) == (['a', 'b', 'c'], [1], [2], '')
    assert explain(model, FILES[0]).labels[0] == 'class 0'
    assert explain(model, FILES[0], labels={0: 'x', '2': 'z'}).labels == ['x', 'class 1', 'z']
    for wrong in (['a', 'b'], ['a', 'b', 'b'], [], {'a', 'b', 'c'}, 'abc', {'a': 0, 'b': 1}, {1: 'a', 3: 'c'}):
        with pytest.raises(ValueError, match=r'^labels must be 3 different names in a list, or by index, got '):
            explain(model, FILES[0], labels=wrong)


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


def test_a_part_in_train_mode():
    """Batch norm in train mode anywhere would explain another model: refused, and named."""
    model = timm.create_model(NANO).eval()
    model.backbone.stages[1].train()
    with pytest.raises(ValueError, match=r"eval mode.*part 'backbone\.stages\.1' is in train mode"):
        explain(model, torch.zeros(1, 3, 32, 32))


def test_one_image_or_none():
    """An image without batch dimension, and no image at all: what is wrong and what helps."""
    with pytest.raises(ValueError, match=r'got a tensor of shape \(3, 20, 24\); .*x\.unsqueeze\(0\)'):
        explain(planted(), torch.zeros(3, 20, 24))
    with pytest.raises(ValueError, match='images must hold at least one image, got an empty list'):
        explain(planted(), [])


def test_pixels_are_no_normalised_numbers():
    """A tensor of bytes would be explained as if 255 were a normalised number."""
    model = timm.create_model(NANO).eval()
    with pytest.raises(ValueError, match=r'normalised numbers, got torch\.uint8'):
        explain(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_third_panel_is_in_the_numbers():
    """why_not: the runner-up, or the class that is asked for."""
    model = timm.create_model(NANO, pretrained=True).eval()
    e = explain(model, FILES[0])
    for one in (e, e.versus('frog' if e.labels[int(e.target)] != 'frog' else 'bird')):
        numbers, other = one.to_dict()['why_not'], one.why_not()
        assert numbers['class'] == int(other.against)
        assert numbers['label'] == one.labels[int(other.against)]
        assert torch.tensor(numbers['evidence']).flatten().tolist() == pytest.approx(other.evidence[0].tolist())
    single = explain(timm.create_model(NANO, num_classes=1).eval(), FILES[0])
    assert single.to_dict()['why_not'] is None
    assert explain(model, FILES[0], multi_label=True).to_dict()['why_not'] is None  # nothing is compared
