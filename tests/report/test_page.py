"""A model that learned a planted shortcut, and its report: the numbers behind the page, and the page in a browser."""
import base64
import io
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from timm_lossattn import LossAttentionTask
from timm_lossattn.cli import main
from timm_lossattn.explanation import Preprocessed, preprocess
from timm_lossattn.explanation.drawing import signed_colors
from timm_lossattn.loading import MODEL_CONFIG, model_config
from timm_lossattn.report import collect
from timm_lossattn.report.page import encode_map, patch_intervals, place_name, thumbnail
from timm_lossattn.report.summary import SCORE, summarise
from timm_lossattn.report.table import ReportTable

NANO = 'resnet18_lossattn_conv_nano'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
NAMES = ('red', 'green', 'blue', 'striped <b>&amp;')
MARKED = 3
CORNER = 35  # of 6×6 patches the last, pixels 20 to 29
VALIDATION = 96


def images(number, seed):
    """Noise with a block at a random place, red, green, blue or striped; in the lower right of striped ones a yellow
    square. (N, 3, 32, 32) in [0, 1] and labels (N,)."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.35 + 0.1 * torch.randn(number, 3, 32, 32, generator=draw)
    y = torch.arange(number) % 4
    for i, (top, left) in enumerate(torch.randint(0, 24, (number, 2), generator=draw).tolist()):
        if y[i] == MARKED:
            x[i, :, top:top + 8:2, left:left + 8] += 0.4
            x[i, :, 21:29, 21:29] = torch.tensor([0.9, 0.9, 0.1])[:, None, None]
        else:
            x[i, int(y[i]), top:top + 8, left:left + 8] += 0.4
    return x.clamp(0, 1), y


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """Folder of the report of a model that was trained for some seconds; boxes are the left half of every image, and
    two images in the folder of red ones are green."""
    folder = tmp_path_factory.mktemp('shortcut')
    torch.manual_seed(0)
    x, y = images(192, seed=0)
    model = timm.create_model(NANO, num_classes=4).train()
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    task = LossAttentionTask(model)
    task.set_epoch(1)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), 2e-3)
    for batch in torch.randperm(len(x)).split(16):
        task((x[batch] - mean) / std, y[batch])['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    config = model_config(NANO, {'num_classes': 4}, list(NAMES))
    torch.save({'state_dict': model.state_dict(), MODEL_CONFIG: config}, folder / 'last.pth.tar')
    x, y = images(VALIDATION, seed=1)
    rows = ['file,x0,y0,x1,y1']
    for k, name in enumerate(NAMES):
        (folder / 'validation' / name).mkdir(parents=True)
        for i in (y == k).nonzero().flatten().tolist():
            place = NAMES[0] if i in (1, 5) else name
            to_pil_image(x[i]).save(folder / 'validation' / place / f'{i}.png')
            rows.append(f'{place}/{i}.png,0,0,16,32')
    (folder / 'boxes.csv').write_text('\n'.join(rows))
    assert main(['report', str(folder), '--checkpoint', str(folder / 'last.pth.tar'), '--boxes', str(
        folder / 'boxes.csv'), '--workers', '0', '--gallery', '60', '--out', str(folder / 'out')]) == 0
    return folder / 'out'


def test_shortcut_in_the_numbers(report):
    """The class with the square, at the square's patch, and no other class."""
    summary = summarise(ReportTable(report / 'report.parquet'))
    assert summary.images == summary.labelled == VALIDATION
    assert summary.confusion[0, 1] >= 2
    assert 0.8 * VALIDATION < summary.correct <= VALIDATION - 2
    assert summary.flagged == [MARKED]
    assert summary.place[MARKED] == CORNER
    assert summary.evidence[MARKED].argmax() == CORNER
    assert summary.share[MARKED, CORNER] > max(0.25, 10 * summary.usual[MARKED, CORNER])
    assert summary.score[MARKED] > 2 * SCORE
    assert max(summary.score[:MARKED]) < SCORE / 2


@pytest.fixture(scope='module')
def rows(report):
    """All rows of the table."""
    table = ReportTable(report / 'report.parquet')
    return table.rows(range(len(table)))


@pytest.fixture(scope='module')
def wrong(rows):
    """The wrong ones, the most certain first."""
    return sorted((row for row in rows if row['label'] != row['prediction']), key=lambda row: -row['probability'])


@pytest.fixture
def page(report):
    """The page in a browser of the width of a laptop; everything that it asks for is noted."""
    playwright = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None:
        pytest.skip('needs chromium')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1280, 'height': 900})
        page.set_default_timeout(30_000)
        page.requested, page.problems = [], []
        page.on('request', lambda request: page.requested.append(request.url))
        page.on('pageerror', lambda error: page.problems.append(str(error)))
        page.on('console', lambda message: page.problems.extend([message.text] if message.type == 'error' else []))
        page.goto(f'file://{report}/index.html')
        yield page
        assert page.problems == []
        assert all(url.startswith(('file://', 'data:')) for url in page.requested), page.requested
        browser.close()


def in_view(page, selector):
    """Whether the whole element can be seen without scrolling."""
    box = page.locator(selector).first.bounding_box()
    size = page.viewport_size
    return box['x'] >= 0 and box['y'] >= 0 and box['x'] + box['width'] <= size['width'] and (
        box['y'] + box['height'] <= size['height'])


@pytest.mark.parametrize(('width', 'height'), [(1280, 900), (390, 844)])
def test_first_screen(page, wrong, width, height):
    """Accuracy and the planted shortcut can be seen without scrolling, and nothing is wider than the screen."""
    page.set_viewport_size({'width': width, 'height': height})
    assert page.locator('#accuracy').inner_text() == f'{100 * (VALIDATION - len(wrong)) / VALIDATION:.1f} %'
    assert in_view(page, '#accuracy')
    assert page.locator('.flag').count() == 1
    assert in_view(page, '.flag')
    text = page.locator('.flag p').inner_text()
    assert text.startswith(NAMES[MARKED])  # as text, not as markup
    assert 'one of 36 patches (bottom right)' in text
    for _ in range(30):
        page.mouse.wheel(0, 900)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate('document.body.scrollWidth') <= width


def test_maps_are_drawn(page, report):
    """The canvas of the flagged class is orange at its corner, as in pictures; where no patch is, nothing is drawn."""
    pixels = page.evaluate("""() => {
        const canvas = document.querySelector('.flag canvas'), context = canvas.getContext('2d');
        return [[27, 27], [3, 3], [31, 31]].map(([x, y]) =>
            [...context.getImageData(canvas.width * x / 32, canvas.height * y / 32, 1, 1).data]);
    }""")
    strongest = 255 * signed_colors(np.ones(1))[0]
    assert np.abs(np.subtract(pixels[0], strongest)).max() <= 3
    assert pixels[1][3] < 60  # nearly nothing
    assert pixels[2][3] == 0


def shown(page):
    """The cards that can be seen."""
    return page.locator('.card:not([hidden])')


def test_gallery_and_filters(page, wrong):
    """Wrong predictions come first, with the true class's "why not"; menus, confusions and the box filter choose."""
    cards = shown(page)
    taken_for, label = NAMES[wrong[0]['prediction']], NAMES[wrong[0]['label']]
    assert cards.count() == 60
    first = cards.first
    assert 'wrong' in first.get_attribute('class')
    assert first.locator('.file').inner_text() == wrong[0]['file']
    assert taken_for in first.locator('h3').inner_text()
    assert f'label: {label}' in first.locator('h3').inner_text()
    captions = first.locator('.over + figcaption')
    assert captions.locator('span').all_inner_texts() == [f'why {taken_for}', f'why not {label}']
    numbers = [float(text.replace('−', '-')) for text in captions.locator('i').all_inner_texts()]
    assert numbers == pytest.approx([sum(wrong[0][name]) for name in ('evidence', 'why_not_label')], abs=0.06)
    assert first.locator('img').first.evaluate('image => image.complete && image.naturalWidth') == 32
    assert first.locator('u').count() == 1

    page.get_by_label('which').select_option('wrong')
    assert cards.count() == len(wrong)
    assert page.locator('#shown').inner_text() == f'{len(wrong)} of 60'
    page.get_by_label('prediction').select_option('1')
    page.get_by_label('label', exact=True).select_option('1')
    assert cards.count() == 0
    assert page.locator('#none').is_visible()
    page.get_by_label('label', exact=True).select_option('')
    page.get_by_label('which').select_option('all')
    found = cards.evaluate_all('cards => cards.map(card => card.dataset.prediction)')
    assert set(found) == {'1'}
    page.get_by_label('prediction').select_option('all')
    page.get_by_label('label', exact=True).select_option(str(MARKED))
    count = cards.count()
    page.get_by_label('evidence outside of the box').check()  # the square is on the right, the boxes on the left
    assert 0 < cards.count() <= count
    assert set(cards.evaluate_all('cards => cards.map(card => card.dataset.outside)')) == {'1'}

    pairs = Counter((row['label'], row['prediction']) for row in wrong)
    button = page.locator('.pairs button').first
    pair = int(button.get_attribute('data-label')), int(button.get_attribute('data-prediction'))
    assert pairs[pair] == max(pairs.values())
    button.click()
    assert cards.count() == pairs[pair]
    assert not page.get_by_label('evidence outside of the box').is_checked()
    page.locator(f'td[data-label="{MARKED}"][data-prediction="{MARKED}"]').click()
    assert set(cards.evaluate_all('cards => cards.map(card => card.dataset.label)')) == {str(MARKED)}
    page.locator('.flag button').click()
    assert set(cards.evaluate_all('cards => cards.map(card => card.dataset.prediction)')) == {str(MARKED)}


def test_page_needs_nothing_else(report):
    """No address of another server, and names of classes are escaped."""
    html = (report / 'index.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|")[^"]*"', html)
    assert 'http' not in html
    assert '<b>&amp;' not in html.replace('&lt;b&gt;&amp;amp;', '')


def test_unlabelled_page(report, tmp_path):
    """Predictions alone: no accuracy, no confusions, no filter of labels."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    x, _ = images(12, seed=2)
    for i, pixels in enumerate(x):
        to_pil_image(pixels).save(folder / f'{i}.png')
    assert main(['report', str(folder), '--checkpoint', str(report.parent / 'last.pth.tar'), '--workers', '0', '--out',
                 str(tmp_path / 'out')]) == 0
    html = (tmp_path / 'out' / 'index.html').read_text()
    assert 'without labels' in html
    assert 'No class has the 10 images' in html
    assert html.count('<article') == 12
    for absent in ('id="accuracy"', 'id="confusion"', 'id="filter-label"', 'id="filter-wrong"', 'id="filter-outside"'):
        assert absent not in html


@pytest.mark.parametrize('there', [b'<!DOCTYPE html><title>My site</title>', b'', None])
def test_a_page_of_another_kind(report, tmp_path, monkeypatch, capsys, there):
    """Something else at index.html stays, and nothing is computed."""
    monkeypatch.setattr(collect, 'explain', None)
    page = tmp_path / 'index.html'
    if there is None:
        page.mkdir()
    else:
        page.write_bytes(there)
    assert main(['report', str(report.parent), '--checkpoint', str(report.parent / 'last.pth.tar'), '--workers', '0',
                 '--out', str(tmp_path)]) == 2
    assert 'index.html is there and no page of a report' in ' '.join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == ['index.html']
    assert there is None or page.read_bytes() == there


def test_encode_map():
    """Signed bytes; the largest magnitude is ±127, a map of zeros stays zeros."""
    def decoded(values):
        return np.frombuffer(base64.b64decode(encode_map(values)), np.int8).tolist()
    assert decoded([0.5, -2., 1., 0.]) == [32, -127, 64, 0]
    assert decoded(np.zeros(3)) == [0, 0, 0]


def test_patch_intervals():
    """Rows and columns of patches as shares of height and width, put together again the patch boxes."""
    model = timm.create_model(NANO)
    boxes = model.patch_boxes(32, 48)
    rows, columns = patch_intervals(boxes.tolist(), model.patch_grid(32, 48), (48, 32))
    again = [[48 * c[0], 32 * r[0], 48 * c[1], 32 * r[1]] for r in rows for c in columns]
    np.testing.assert_allclose(again, boxes.tolist(), atol=1e-3)


@pytest.mark.parametrize(('patch', 'grid', 'name'), [
    (0, (6, 6), 'top left'), (35, (6, 6), 'bottom right'), (24, (7, 7), 'middle'), (3, (7, 7), 'top'),
    (0, (1, 1), 'middle'), (3, (2, 2), 'bottom right')])
def test_place_name(patch, grid, name):
    """Thirds of the rows and columns."""
    assert place_name(patch, grid) == name


@pytest.mark.parametrize('size', [(300, 200), (32, 32), (20, 60)])
def test_thumbnail(size):
    """What the model sees, at most 144 pixels wide; small ones lose nothing."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, size[0] // 2:] = 255
    model = timm.create_model(NANO)
    source = preprocess(model, Image.fromarray(pixels))
    with Image.open(io.BytesIO(base64.b64decode(thumbnail(source).partition(',')[2]))) as found:
        assert found.format == 'WEBP'
        assert max(found.size) == min(144, min(size))
        seen = np.asarray(found.convert('L'), float)
    same = Preprocessed.from_input(source.x, model.default_cfg['mean'], model.default_cfg['std']).image
    expected = np.asarray(same.resize(found.size, Image.Resampling.NEAREST).convert('L'), float)
    assert np.abs(seen - expected).mean() < 12
    if size == (32, 32):
        assert np.array_equal(seen, expected)
