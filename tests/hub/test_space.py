"""hub/space/app.py: its functions in-process, and the page in a real browser."""
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from packaging.requirements import Requirement
from PIL import Image

from timm_lossattn.explanation import explain

pytest.importorskip('gradio')

ROOT = Path(__file__).parents[2]
SPACE = ROOT / 'hub' / 'space'
DATA = SPACE / 'examples'
CAT, SHIP = DATA / 'cifar10_test_00000_cat.png', DATA / 'cifar10_test_00001_ship.png'
CONV, CAPS = 'resnet18_lossattn_conv_nano.cifar10', 'resnet18_lossattn_caps_nano.cifar10'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def load_app(path):
    """app.py as a module; building the page is part of it."""
    spec = importlib.util.spec_from_file_location('space_app', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def app():
    """The module."""
    return load_app(SPACE / 'app.py')


def error_message(app, path, **classes):
    """The message for a file that is refused; there is nothing else on the page then."""
    outputs = list(app.answer(CONV, str(path), classes.get('target', -1), classes.get('against', -1)))
    assert len(outputs) == 1
    message, top, picture, numbers = outputs[0]
    assert top is None
    assert picture is None
    assert numbers['value'] is None
    assert numbers['interactive'] is False
    assert message.startswith('<p role="alert">')
    assert str(path.parent) not in message
    return message


def png(width, height):
    """The beginning of a PNG, all there is to it in a file that lies about its size."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 100))


def test_models(app):
    """All patch models with weights, the smallest good one first; each is loaded once."""
    assert app.list_models()[0] == CONV
    assert set(app.list_models()) >= {CONV, CAPS}
    for name in app.list_models():
        model = app.load_model(name)
        assert not model.training
        assert app.load_model(name) is model
        assert hasattr(model, 'forward_patches')


def test_plain_models_are_not_offered(app, monkeypatch):
    """Fully connected layers over the whole map have no patches to explain, weights or not."""
    monkeypatch.setattr(app, 'list_patch_models', lambda: ['vgg11_bn_cifar', 'resnet18_lossattn_conv_nano'])
    monkeypatch.setattr(app.timm, 'list_pretrained', lambda name: [name])
    monkeypatch.setattr(app.timm, 'get_pretrained_cfg_value', lambda name, key: __file__)
    assert app.list_models() == ['resnet18_lossattn_conv_nano']


@pytest.mark.parametrize('name', [CONV, CAPS])
@pytest.mark.parametrize(('target', 'against'), [(-1, -1), (8, -1), (-1, 9), (0, 9)])
def test_numbers_are_those_of_explain(app, name, target, against):
    """The JSON, the five classes and the picture are those of the library; the files are gone afterwards."""
    model = timm.create_model(name, pretrained=True).eval()
    expected = explain(
        model, [CAT], None if target < 0 else [target], 'rest' if against < 0 else [against])
    outputs = app.answer(name, str(CAT), target, against)
    message, top, picture, numbers = next(outputs)
    assert message == ''
    assert Path(numbers['value']).read_text() == expected.to_json(image=CAT.name, model=name)
    probabilities, classes = expected.probabilities[0].topk(5)
    assert list(top) == [expected.labels[k] for k in classes]
    assert list(top.values()) == pytest.approx(probabilities.tolist())
    with Image.open(picture) as drawn:
        assert drawn.format == 'PNG'
        assert min(drawn.size) > 400
    assert list(outputs) == []
    assert not Path(picture).parent.exists()


def test_no_image(app):
    """Removing the image empties the page."""
    [(message, top, picture, numbers)] = app.answer(CONV, None, -1, -1)
    assert (message, top, picture, numbers['value']) == ('', None, None, None)


@pytest.mark.parametrize(('name', 'content', 'what'), [
    ('text.png', b'not an image\n', 'text.png is no image that can be read'),
    ('empty.png', b'', 'empty.png is no image that can be read'),
    ('cut.png', CAT.read_bytes()[:800], 'cut.png is no image that can be read'),
    ('large.png', png(9000, 9000), 'large.png is too large: at most 60 megapixels'),
    ('bomb.png', png(100_000, 100_000), 'bomb.png is too large: at most 60 megapixels'),  # Pillow refuses by itself
    ('line.png', png(5_000_000, 1), 'line.png is 5000000×1: at most 100 times as long as wide'),
    ('drawing.svg', b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'drawing.svg is no image that can be read'),
    ('<b>&.png', b'not an image\n', '&lt;b&gt;&amp;.png is no image that can be read'),
])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bad_files(app, tmp_path, name, content, what):
    """One message that names the file, in words for a visitor."""
    (tmp_path / name).write_bytes(content)
    assert what in error_message(app, tmp_path / name)


def test_class_against_itself(app):
    """Whether the class was chosen or predicted."""
    assert '"truck"' in error_message(app, CAT, target=9, against=9)
    assert '"cat"' in error_message(app, CAT, against=3)


def test_animated_gif(app, tmp_path):
    """The first frame."""
    with Image.open(CAT) as cat, Image.open(SHIP) as ship:
        cat.save(tmp_path / 'a.gif', save_all=True, append_images=[ship], duration=100)
    explanation = app.explain_file(CONV, str(tmp_path / 'a.gif'))
    assert explanation.labels[explanation.target[0]] == 'cat'


def test_rotated_jpeg(app, tmp_path):
    """Upright, with the maps on the upright image."""
    with Image.open(CAT) as cat:
        upright = cat.resize((320, 240))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    explanation = app.explain_file(CONV, str(tmp_path / 'a.jpg'))
    seen = explanation.source(0).image
    assert seen.size == (320, 240)
    assert np.abs(np.asarray(seen, float) - np.asarray(upright, float)).mean() < 3


def test_cmyk_jpeg(app, tmp_path):
    """The colours are right, not inverted."""
    with Image.open(CAT) as cat:
        cat.convert('CMYK').save(tmp_path / 'a.jpg', quality=95)
        expected = np.asarray(cat, float)
    explanation = app.explain_file(CONV, str(tmp_path / 'a.jpg'))
    assert np.abs(np.asarray(explanation.source(0).image, float) - expected).mean() < 12


def test_16_bit_png(app, tmp_path):
    """All grey levels, not only white."""
    with Image.open(CAT) as cat:
        grey = np.asarray(cat.convert('L'))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'a.png')
    explanation = app.explain_file(CONV, str(tmp_path / 'a.png'))
    assert np.array_equal(np.asarray(explanation.source(0).image)[..., 0], grey)


def test_50_megapixels(app, tmp_path):
    """Works, in seconds."""
    with Image.open(CAT) as cat:
        cat.resize((8660, 5774)).save(tmp_path / 'a.jpg')
    begin = time.monotonic()
    outputs = app.answer(CONV, str(tmp_path / 'a.jpg'), -1, -1)
    message, top, _, numbers = next(outputs)
    assert time.monotonic() - begin < 60
    assert message == ''
    assert next(iter(top)) == 'cat'
    assert json.loads(Path(numbers['value']).read_text())['image_size'] == [8660, 5774]


@pytest.mark.parametrize('names', [[], [CAT.name, SHIP.name]])
def test_space_by_itself(app, tmp_path, names):
    """A Space has the folder alone: examples lie beside app.py, or there are none."""
    shutil.copy(SPACE / 'app.py', tmp_path)
    for name in names:
        (tmp_path / 'examples').mkdir(exist_ok=True)
        shutil.copy(DATA / name, tmp_path / 'examples')
    alone = load_app(tmp_path / 'app.py')
    assert [path.name for path in alone.EXAMPLES] == names
    [examples] = [block for block in alone.demo.blocks.values() if block.get_block_name() == 'dataset']
    assert examples.visible == bool(names)
    assert len(app.EXAMPLES) == 5


def test_front_matter():
    """What the Hub reads: the app and the Gradio it was tested with, which the requirements allow."""
    matter = yaml.safe_load((SPACE / 'README.md').read_text().split('---')[1])
    assert matter['sdk'] == 'gradio'
    assert (SPACE / matter['app_file']).is_file()
    assert matter['license'] == 'apache-2.0'
    assert len(matter['short_description']) <= 60  # the Hub's limit
    requirements = {r.name: r for r in map(Requirement, (SPACE / 'requirements.txt').read_text().split('\n')[:-1])}
    assert set(requirements) == {'timm-lossattn', 'gradio'}
    assert requirements['gradio'].specifier.contains(matter['sdk_version'])


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """Address of the app in a process of its own; its log must be free of tracebacks in the end."""
    pytest.importorskip('playwright')
    if CHROMIUM is None:
        pytest.skip('needs chromium')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = f'http://127.0.0.1:{port}'
    log = tmp_path_factory.mktemp('space') / 'app.log'
    env = {**os.environ, 'GRADIO_SERVER_PORT': str(port), 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT),
           'GRADIO_TEMP_DIR': str(log.parent / 'cache'), 'no_proxy': '127.0.0.1'}
    with log.open('w') as output, subprocess.Popen(
            [sys.executable, str(SPACE / 'app.py')], env=env, stdout=output, stderr=output) as process:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    opener.open(address, timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            else:
                pytest.fail(f'The app does not answer:\n{log.read_text()}')
            yield address
        finally:
            process.terminate()
    assert 'Traceback' not in log.read_text()


@pytest.fixture
def page(server):
    """The page in a browser, as a visitor finds it."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1280, 'height': 1100})
        page.set_default_timeout(120_000)
        page.requested = []
        page.on('request', lambda request: page.requested.append(request.url))
        page.goto(server)
        page.locator('#file input[type=file]').wait_for(state='attached')
        yield page
        browser.close()


def next_picture(page, old):
    """Wait for another picture than the old one, loaded and visible; returns its address."""
    page.wait_for_function("""old => {
        const image = document.querySelector('#picture img');
        return image && image.complete && image.naturalWidth > 400 && image.src !== old && image.offsetWidth > 400;
    }""", arg=old)
    return page.locator('#picture img').evaluate('image => image.src')


def choose(page, label, option):
    """Choose from a menu as a visitor does."""
    page.get_by_label(label).click()
    page.get_by_role('option', name=option, exact=True).click()


def test_page(page, server, tmp_path):
    """Upload, example, other classes, other model; nothing is loaded from elsewhere."""
    assert page.locator('#numbers').is_disabled()
    page.set_input_files('#file input[type=file]', CAT)
    picture = next_picture(page, '')
    expected = explain(timm.create_model(CONV, pretrained=True).eval(), [CAT])
    top = page.locator('#top').inner_text().split()
    for label in (expected.labels[k] for k in expected.probabilities[0].topk(5).indices):
        assert label in top
    assert f'{100 * float(expected.probabilities.max()):.0f}%' in top
    assert not page.locator('#message').is_visible()

    begin = time.monotonic()
    page.locator('#examples button').nth(1).click()
    picture = next_picture(page, picture)
    seconds = time.monotonic() - begin
    print(f'from click to picture: {seconds:.2f} s')
    assert seconds < 30  # 0.6 s on two cores with one training on them, 9 s with a load of 14: this only sees hangs
    assert 'ship' in page.locator('#top').inner_text()

    before = page.request.get(picture).body()
    choose(page, 'compared with', 'truck')
    picture = next_picture(page, picture)
    assert page.request.get(picture).body() != before
    page.wait_for_timeout(1000)  # it fades in
    page.screenshot(path=tmp_path / 'space.png', full_page=True)
    assert (tmp_path / 'space.png').stat().st_size > 50_000
    with page.expect_download() as download:
        page.locator('#numbers').click()
    numbers = json.loads(Path(download.value.path()).read_text())
    assert download.value.suggested_filename == f'{SHIP.stem}.json'
    assert numbers['target']['label'] == 'ship'
    assert numbers['against']['label'] == 'truck'

    choose(page, 'Evidence for', 'cat')
    picture = next_picture(page, picture)
    choose(page, 'Model', CAPS)
    next_picture(page, picture)
    assert page.get_by_label('Evidence for').input_value() == 'the predicted class'
    assert all(url.startswith((server, 'data:', 'blob:')) for url in page.requested), page.requested


def test_bad_upload_on_page(page, tmp_path):
    """The message instead of the old answer; the next good image is answered as usual."""
    page.locator('#examples button').first.click()
    picture = next_picture(page, '')
    for name, content in (('text.png', b'not an image\n'), ('empty.png', b'')):
        (tmp_path / name).write_bytes(content)
        page.get_by_label('Clear').click()
        page.locator('#picture img').wait_for(state='detached')
        page.set_input_files('#file input[type=file]', tmp_path / name)
        page.get_by_role('alert').filter(has_text=f'{name} is no image that can be read').wait_for()
        assert page.locator('#picture img').count() == 0
        assert page.locator('#numbers').is_disabled()
        assert 'Error' not in page.locator('body').inner_text()
    page.screenshot(path=tmp_path / 'error.png', full_page=True)
    page.locator('#examples button').nth(1).click()
    assert next_picture(page, '') != picture
    assert not page.locator('#message').is_visible()


def test_phone(page):
    """The picture keeps a size that can be read and scrolls from its left end to its right; the page does not."""
    page.set_viewport_size({'width': 390, 'height': 844})
    page.locator('#examples button').first.click()
    next_picture(page, '')
    edges = page.locator('#picture .image-container').evaluate("""container => {
        const image = container.querySelector('img');
        const left = image.getBoundingClientRect().left - container.getBoundingClientRect().left;
        container.scrollLeft = 9999;
        return [left, container.getBoundingClientRect().right - image.getBoundingClientRect().right,
                container.scrollLeft, document.documentElement.scrollWidth];
    }""")
    assert edges[0] >= -1
    assert edges[1] >= -1
    assert edges[2] > 300
    assert edges[3] <= 390
