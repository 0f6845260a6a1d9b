"""drawing.py: outlines, windows, and text that nothing covers."""
import dataclasses

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from test_cli import CAT, NANO, random_model
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.drawing import draw_explanation, outline, shorten, view_window
from timm_lossattn.explanation.preprocessing import preprocess


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


@pytest.mark.parametrize('against', ['rest', None, [1]])
@pytest.mark.parametrize('size', [(32, 32), (400, 100), (100, 400), (3000, 20), (20, 3000)])
@pytest.mark.parametrize('selected', [1, 36])
def test_text_of_the_picture(size, against, selected):
    """No text is clipped and none overlaps another, with long names too; a panel of all patches is left out."""
    model = random_model(NANO)
    source = preprocess(model, Image.open(CAT).resize(size))
    explanation = explain(model, [source], against=against)
    chosen = torch.zeros_like(explanation.selected)
    chosen[0, :selected] = True
    explanation = dataclasses.replace(
        explanation, selected=chosen, labels=['American Staffordshire bull terrier'] * 10)
    figure = draw_explanation(explanation, 0, title='long title ' * 30)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [*figure.texts, *(ax.title for ax in figure.axes)]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        low, high = ax.get_ylim()  # ticks outside are not drawn
        texts += [label for label, at in zip(ax.get_yticklabels(), ax.get_yticks()) if low <= at <= high]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    assert len(boxes) > 10
    assert ('1 of 36 patches selected' in [text for text, _ in boxes]) == (selected == 1)
    assert len(figure.legends) == (selected == 1)
    caption = ' '.join(text.get_text() for text in figure.texts)
    assert 'The model knows 10 classes: America' in caption
    assert 'Grey: no patch, or cut off by the crop.' in caption  # 6 patches end before pixel 32
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for n, (text, box) in enumerate(boxes):
        for other, other_box in boxes[n + 1:]:
            assert not box.overlaps(other_box), (text, other)
