"""drawing.py: outlines, windows, and text that nothing covers."""
import dataclasses

import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cli_run import CAT, NANO, random_model
from fake_patch_model import SIZE, planted
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.drawing import (
    FOR,
    PANELS,
    draw_explanation,
    outline,
    signed_colors,
    two_digits,
    view_window,
)
from timm_lossattn.explanation.preprocessing import preprocess
from timm_lossattn.text import one_line, percent, shorten


def test_outline():
    """An L of three cells has eight sides; together they close."""
    segments = outline(torch.tensor([[True, False], [True, True]]).numpy())
    assert sorted(map(str, segments.astype(int).tolist())) == sorted(map(str, [
        [[0, 0], [1, 0]], [[0, 0], [0, 1]], [[1, 0], [1, 1]], [[0, 1], [0, 2]], [[0, 2], [1, 2]], [[1, 1], [2, 1]],
        [[1, 2], [2, 2]], [[2, 1], [2, 2]]]))
    assert outline(torch.zeros(2, 2, dtype=torch.bool).numpy()).shape == (0, 2, 2)


@pytest.mark.parametrize(('size', 'frame', 'window'), [
    ((32, 32), [0, 0, 32, 32], (0, 0, 32, 32)),
    ((400, 100), [150, 0, 250, 100], (0, 0, 400, 100)),
    ((1000, 100), [450, 0, 550, 100], (300, 0, 700, 100)),
    ((100, 1000), [0, 0, 100, 100], (0, 0, 100, 400)),
    ((1000, 100), [0, 0, 1000, 100], (0, 0, 1000, 100)),  # all of it goes into the model
    ((1000, 100), [0, -450, 1000, 550], (0, 0, 1000, 100)),  # padded
])
def test_view_window(size, frame, window):
    """What is shown lies in the image and contains the input's part of it."""
    assert view_window(size, frame) == window


def test_shorten():
    """Both ends stay, and the length is kept."""
    assert shorten('short', 5) == 'short'
    assert shorten('abcdefghij', 5) == 'ab…ij'
    assert shorten('abcdefghij', 6) == 'abc…ij'


def texts_of(figure):
    """Every text of a figure, and where it is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in figure.texts if t.get_text()]


@pytest.mark.parametrize('size', [(32, 32), (400, 100), (100, 400), (3000, 20), (20, 3000)])
@pytest.mark.parametrize(('panels', 'stacked', 'against'), [
    (PANELS[:3], False, 'rest'), (PANELS[:2], False, [1]), (PANELS[:1], False, 'mean'), (PANELS, False, [1]),
    (PANELS, True, None)])
def test_text_of_the_picture(size, against, panels, stacked):
    """No text is clipped and none overlaps another, with long names too; one panel fewer where nothing is compared."""
    model = random_model(NANO)
    source = preprocess(model, Image.open(CAT).resize(size))
    explanation = explain(model, [source], against=against, true_class=2)
    chosen = torch.zeros_like(explanation.selected)
    chosen[0, 1] = True
    labels = [f'American Staffordshire bull terrier {k}' for k in range(10)]
    figure = draw_explanation(dataclasses.replace(explanation, selected=chosen, labels=labels), 0,
                              'long title ' * 30, panels, stacked)
    boxes = texts_of(figure)
    caption = ' '.join(text for text, _ in boxes)
    assert ('why not A' in caption) == ('why-not' in panels and against is not None)
    assert ('1 of 36 patches selected' in caption) == ('selected' in panels)
    assert '35 patches have no weight at all' in caption
    assert 'knows 10 classes: America' in caption
    if size == (32, 32):
        assert 'it reads 32×32 pixels' in caption
        assert 'Outside of the grid: not seen, or no patch.' in caption  # 6 patches end before pixel 32
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for n, (text, box) in enumerate(boxes):
        for other, other_box in boxes[n + 1:]:
            assert not box.overlaps(other_box), (text, other)


def test_places_in_the_picture():
    """Of an image wider than high: outline, evidence and box lie where the one patch does, in the image's pixels."""
    explanation = explain(planted(), torch.zeros(2, 3, *SIZE), against=None)
    panels = explanation.figure(0, panels=['outline', 'evidence', 'selected']).axes
    assert len(panels) == 4  # one is the colour bar of the evidence
    outlined, evidence, _, selected = panels
    height, width = SIZE
    for ax in (outlined, evidence, selected):
        assert (ax.get_xlim(), ax.get_ylim()) == ((0, width), (height, 0))
        for image in ax.images:
            assert (image.origin, tuple(image.get_extent())) == ('upper', (0, width, height, 0))
    x0, y0, x1, y1 = 10.5, 6.5, 14.5, 10.5  # row 1, column 2: between the middles of the overlaps of 9 pixels, 4 apart
    cell = [[[x0, y0], [x0, y1]], [[x0, y0], [x1, y0]], [[x0, y1], [x1, y1]], [[x1, y0], [x1, y1]]]
    assert len(outlined.collections) == 2
    for lines in (*outlined.collections, *selected.collections):
        assert sorted(segment.tolist() for segment in lines.get_segments()) == cell
    veil = outlined.images[1].get_array()[..., 3]
    rows, columns = (side * (np.arange(n) + 0.5) / n for side, n in zip(SIZE, veil.shape))
    clear = np.outer((y0 < rows) & (rows < y1), (x0 < columns) & (columns < x1))
    assert ((veil == 0) == clear).all()

    colors = evidence.images[1].get_array()
    assert colors[..., 3].max() == pytest.approx(0.9, abs=1e-2)
    assert np.allclose(colors[colors[..., 3] > 0, :3], FOR)
    rows, columns = (side * (np.arange(n) + 0.5) / n for side, n in zip(SIZE, colors.shape))
    share = colors[..., 3] / colors[..., 3].sum()
    middle = (share.sum(0) @ columns, share.sum(1) @ rows)
    assert middle == pytest.approx((12.5, 8.5), abs=0.05)
    ((box,),) = [[patch.get_bbox().bounds for patch in selected.patches]]
    assert box == (8, 4, 9, 9)


@pytest.mark.parametrize(('name', 'held'), [
    ('test_resnet', None), ('test_convnext', "the head's 1/σ"),
    ('mobilenetv3_small_050', "the head's gates and any 1/σ"), ('test_mambaout', "the head's gates and any 1/σ")])
def test_what_is_held(name, held):
    """A head that is not affine adds up with one factor held: picture and numbers say which."""
    explanation = explain(timm.create_model(f'lossattn.{name}').eval(), [Image.new('RGB', (64, 64))])
    assert explanation.to_dict()['held'] == held
    texts = ' '.join(text for text, _ in texts_of(explanation.figure()))
    assert (f'Sums are exact with {held} held as for the whole image.' in texts) is (held is not None)
    assert ('held' in texts) is (held is not None)


@pytest.mark.parametrize(('size', 'said'), [((7, 7), True), ((8, 8), False), ((7, 40), True)])
def test_enlarged(size, said):
    """It is said of an image whose shorter side has less than a quarter of the input's pixels."""
    texts = [text for text, _ in texts_of(explain(random_model(NANO), [Image.new('RGB', size)]).figure())]
    assert (f'Enlarged from {size[0]}×{size[1]} pixels.' in ' '.join(texts)) is said


def test_one_line():
    """Errors of other libraries in a line, without a terminal's colours, and never empty."""
    assert one_line(ValueError('a\x1b[1m b\n\x1b[0mc')) == 'a b c'
    assert one_line(KeyError()) == 'KeyError'


def test_right_or_wrong():
    """The first line says whether the prediction is right, where that is known, and the third panel asks about it."""
    model = random_model(NANO)
    predicted = int(explain(model, CAT).predicted)
    wrong = (predicted + 1) % 10
    right, other, unknown = (
        [text for text, _ in texts_of(explain(model, CAT, true_class=k).figure())] for k in (predicted, wrong, None))
    assert right[0].startswith(f'✓ class {predicted}, ')
    assert other[0].startswith(f'✗ class {predicted}, ')
    assert other[0].endswith(f'; it is class {wrong}')
    assert f'why not class {wrong}?' in other
    assert unknown[0].startswith(f'class {predicted}, ')


@pytest.mark.parametrize(('share', 'words'), [
    (0.01, 'next to nothing: +0.30, against it −30'), (0.1, 'half of it lies in')])
def test_next_to_nothing_is_not_outlined(share, words):
    """Half of what hardly is there says nothing: its size stands in its place."""
    explanation = explain(random_model(NANO), CAT, target=0, against=None)
    contributions = torch.full_like(explanation.prediction.contributions, -30 / 35)
    contributions[:, 0] = 30 * share
    prediction = explanation.prediction._replace(contributions=contributions)
    texts = [text for text, _ in texts_of(dataclasses.replace(explanation, prediction=prediction).figure())]
    assert [text for text in texts if text.startswith(words)]


def test_two_classes():
    """Of two classes "why" and "why not the other" are the same; independent ones, and three, have both panels."""
    def titles(classes, **kwargs):
        torch.manual_seed(0)
        model = timm.create_model(NANO, num_classes=classes).eval()
        explanation = explain(model, CAT, labels=['dog', 'fish', 'owl'][:classes], target='dog', **kwargs)
        return [text for text, _ in texts_of(explanation.figure())]

    two = titles(2)
    assert 'why dog?' in two
    assert not [text for text in two if text.startswith('why not')]
    assert [text for text in two if text.endswith('its lead over fish')]
    for others in (titles(3), titles(2, multi_label=True, against='fish')):
        assert [text for text in others if text.startswith('why not')]


def test_colors_of_the_evidence():
    """Orange where a patch speaks for the class, purple where against it, and nothing laid over where there is none."""
    colors = signed_colors(np.array([[-1., 0., 0.5, 1.]]))[0]
    assert colors[0, 2] > colors[0, 0] > colors[0, 1]
    assert colors[3, 0] > colors[3, 1] > colors[3, 2]
    assert colors[1, 3] == 0
    assert 0 < colors[2, 3] < colors[3, 3] < 1


def test_words_for_numbers():
    """Nothing is said to be certain, and nothing to be impossible."""
    assert [percent(p) for p in (0., 0.0004, 0.004, 0.0098, 0.43, 0.993, 0.99999, 1.)] == [
        '< 0.1 %', '< 0.1 %', '0.4 %', '1 %', '43 %', '99.3 %', '> 99.9 %', '> 99.9 %']
    assert [two_digits(v) for v in (0.3, 1.449, 12.2)] == ['0.30', '1.4', '12']


def test_panels_that_do_not_exist():
    """One error that names what there is; of a model with one class there is nothing to compare."""
    explanation = explain(random_model(NANO), CAT)
    with pytest.raises(ValueError, match='some of outline, evidence, why-not, alpha, selected, got heat'):
        explanation.figure(panels=['heat'])
    with pytest.raises(ValueError, match='got none'):
        explanation.figure(panels=[])
    with pytest.raises(ValueError, match='got heat'):
        explanation.figure(panels='heat')


def test_one_panel():
    """Its name alone is enough."""
    explanation = explain(random_model(NANO), CAT)
    assert [text for text, _ in texts_of(explanation.figure(panels='alpha'))] == [
        text for text, _ in texts_of(explanation.figure(panels=['alpha']))]
