"""preprocessing.py: every kind of file gives 8-bit RGB or a one-line error, and boxes map back to the file's pixels."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_lossattn  # noqa: F401  (registers the models)
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.preprocessing import Preprocessing, input_config, open_image, preprocess, to_rgb

NANO = 'resnet18_lossattn_conv_nano'


def opened(image, path, **kwargs):
    """Save, open again, check the mode, return the pixels (H, W, 3)."""
    image.save(path, **kwargs)
    result = open_image(path)
    assert result.mode == 'RGB'
    return np.asarray(result)


@pytest.mark.parametrize(('mode', 'color', 'rgb'), [
    ('RGB', (10, 20, 30), (10, 20, 30)),
    ('L', 77, (77, 77, 77)),
    ('1', 1, (255, 255, 255)),
    ('1', 0, (0, 0, 0)),
    ('LA', (77, 255), (77, 77, 77)),
    ('LA', (77, 0), (255, 255, 255)),
    ('RGBA', (10, 20, 30, 255), (10, 20, 30)),
    ('RGBA', (10, 20, 30, 0), (255, 255, 255)),  # over white
    ('RGBA', (0, 100, 200, 51), (204, 224, 244)),  # 20 % of it
])
def test_png_modes(tmp_path, mode, color, rgb):
    """PNG modes of one colour; transparent ones are laid over white."""
    pixels = opened(Image.new(mode, (7, 5), color), tmp_path / 'a.png')
    assert pixels.shape == (5, 7, 3)
    assert np.abs(pixels.astype(int) - rgb).max() <= 1


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P'])
@pytest.mark.parametrize('transparent', [False, True])
def test_transparent_color(tmp_path, mode, transparent):
    """One colour or palette entry declared transparent becomes white, the other stays."""
    image = Image.new(mode, (4, 2), {'RGB': (9, 9, 9), 'L': 9, 'P': 0}[mode])
    if mode == 'P':
        image.putpalette([9, 9, 9, 60, 60, 60])
    image.putpixel((3, 1), {'RGB': (60, 60, 60), 'L': 60, 'P': 1}[mode])
    kwargs = {'transparency': {'RGB': (9, 9, 9), 'L': 9, 'P': 0}[mode]} if transparent else {}
    pixels = opened(image, tmp_path / 'a.png', **kwargs)
    assert pixels[0, 0].tolist() == [255 if transparent else 9] * 3
    assert pixels[1, 3].tolist() == [60] * 3


def test_premultiplied_grey():
    """A mode of Pillow that no file has."""
    image = Image.new('LA', (2, 1), (77, 255)).convert('La')
    assert np.asarray(to_rgb(image)).tolist() == [[[77] * 3] * 2]


def test_cmyk_jpeg(tmp_path):
    """A CMYK JPEG of pure cyan."""
    pixels = opened(Image.new('CMYK', (16, 16), (255, 0, 0, 0)), tmp_path / 'a.jpg', quality=95)
    assert np.abs(pixels.astype(int) - (0, 255, 255)).max() <= 6


def test_16_bit_png(tmp_path):
    """All of the 16-bit range is kept, not clipped at 255."""
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    pixels = opened(Image.fromarray(values), tmp_path / 'a.png')
    assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_dark_16_bit_png(tmp_path):
    """A 16-bit image stays dark when all its values are under 256."""
    assert opened(Image.fromarray(np.full((2, 2), 200, np.uint16)), tmp_path / 'a.png').max() == 1


@pytest.mark.parametrize(('values', 'dtype', 'expected'), [
    ([-1000, 500, 2000], np.int16, [0, 128, 255]),
    ([0, 500_000, 1_000_000], np.int32, [0, 128, 255]),
    ([-3, -3, -3], np.int32, [0, 0, 0]),
    ([0, 257, 65535], np.int32, [0, 1, 255]),
    ([0, 7, 255], np.int32, [0, 7, 255]),
])
def test_integer_tiff(tmp_path, values, dtype, expected):
    """Beyond 16 bits without a sign, as in tomography, the range is the image's own; within it stays what it is."""
    pixels = opened(Image.fromarray(np.array([values], dtype=dtype)), tmp_path / 'a.tiff')
    assert pixels[0, :, 0].tolist() == expected


@pytest.mark.parametrize(('values', 'expected'), [
    ([-1., 0., 1.], [0, 128, 255]),
    ([0., 1e6, 5e5], [0, 255, 128]),
    ([3., 3., 3.], [0, 0, 0]),
    ([0., np.nan, 2.], [0, 0, 255]),
    ([0., np.inf, 2.], [0, 255, 255]),
    ([-np.inf, 1., 2.], [0, 0, 255]),
    ([np.nan] * 3, [0, 0, 0]),
])
@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_float_tiff(tmp_path, values, expected):
    """Float images are scaled from their finite range, whatever else is in them."""
    pixels = opened(Image.fromarray(np.array([values], dtype=np.float32)), tmp_path / 'a.tiff')
    assert pixels[0, :, 0].tolist() == expected
    assert (pixels == pixels[..., :1]).all()


def test_animated_gif(tmp_path):
    """The first frame."""
    frames = [Image.new('RGB', (6, 4), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    pixels = opened(frames[0], tmp_path / 'a.gif', save_all=True, append_images=frames[1:], duration=50)
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize(('orientation', 'corner'), [(1, (0, 0)), (3, (3, 7)), (6, (0, 3)), (8, (7, 0))])
def test_exif_rotation(tmp_path, orientation, corner):
    """A bright corner at row, column (0, 0) of the stored 8×4 blocks lands where the camera meant it."""
    pixels = np.zeros((4 * 16, 8 * 16, 3), dtype=np.uint8)
    pixels[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / 'a.jpg'
    result = opened(Image.fromarray(pixels), path, exif=exif, quality=95)
    assert result.shape == ((64, 128, 3) if orientation in (1, 3) else (128, 64, 3))
    blocks = result[8::16, 8::16, 0]
    assert np.argwhere(blocks > 128).tolist() == [list(corner)]


@pytest.mark.parametrize('extension', ['png', 'webp', 'jpg'])
def test_damaged_exif(tmp_path, extension):
    """It says nothing of the pixels, which are read; broken pixels stay an error."""
    path, image = tmp_path / f'a.{extension}', Image.new('RGB', (6, 4), (200, 0, 0))
    pixels = opened(image, path, exif=b'Exif\x00\x00garbage of no TIFF')
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels.astype(int) - (200, 0, 0)).max() <= 6
    model = timm.create_model(NANO).eval()
    with Image.open(path) as lazy:
        assert explain(model, lazy).source(0).image.size == (6, 4)
    write_truncated(path, exif=b'Exif\x00\x00garbage of no TIFF')
    with pytest.raises(ValueError, match=r'^image: cannot read'):
        open_image(path)


@pytest.mark.parametrize('size', [(1, 1), (3000, 5), (5, 3000), (2, 1)])
def test_extreme_sizes(tmp_path, size):
    """Tiny and thin images open and become model inputs whose boxes lie in the image."""
    pixels = opened(Image.new('RGB', size, (1, 2, 3)), tmp_path / 'a.png')
    assert pixels.shape == (size[1], size[0], 3)
    assert (pixels == (1, 2, 3)).all()
    source = preprocess(timm.create_model(NANO), open_image(tmp_path / 'a.png'))
    assert source.x.shape == (3, 32, 32)
    x0, y0, x1, y1 = source.to_image(torch.tensor([0, 0, 32, 32])).tolist()
    side = min(size)
    assert (x1 - x0, y1 - y0) == pytest.approx((side, side), abs=side / 16)
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]


def write_truncated(path, **kwargs):
    """A file whose second half is missing."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **kwargs)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


@pytest.mark.parametrize('kind', [
    'text', 'empty', 'truncated.png', 'truncated.jpg', 'truncated.gif', 'truncated.tiff', 'truncated.webp',
    'header.png', 'flags.dds', 'missing', 'directory'])
def test_unreadable_file(tmp_path, kind):
    """One line that names the path, for everything that is no image."""
    path = tmp_path / f'the {kind}'
    if kind == 'text':
        path.write_text('not an image')
    elif kind == 'empty':
        path.touch()
    elif kind.startswith('truncated'):
        write_truncated(path)
    elif kind == 'header.png':
        path.write_bytes(b'\x89PNG\r\n\x1a\n')
    elif kind == 'flags.dds':  # Pillow raises NotImplementedError
        Image.new('RGB', (4, 4)).save(path)
        content = bytearray(path.read_bytes())
        content[80] = 153
        path.write_bytes(content)
    elif kind == 'directory':
        path.mkdir()
    with pytest.raises(ValueError, match=r'^image: ') as caught:
        open_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert '\n' not in message


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's, about the broken parts of TIFF files
@pytest.mark.parametrize('extension', ['png', 'jpg', 'gif', 'tiff', 'bmp', 'webp', 'ppm', 'tga', 'ico'])
def test_corrupted_file(tmp_path, extension):
    """Files with wrong bytes give an image or a ValueError, never another exception."""
    rng = np.random.default_rng(0)
    path = tmp_path / f'a.{extension}'
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    modes, messages = [], []
    for _ in range(40):
        broken = content.copy()
        at = rng.integers(0, min(len(broken), 120), 4)
        broken[at] = rng.integers(0, 256, 4)
        path.write_bytes(broken.tobytes())
        try:
            modes.append(open_image(path).mode)
        except ValueError as error:
            messages.append(str(error))
    assert set(modes) <= {'RGB'}
    assert all(m.startswith('image: ') and str(path) in m and '\n' not in m for m in messages)


def red_square(size, box):
    """Black image with a red square at x0, y0, x1, y1."""
    image = Image.new('RGB', size)
    image.paste((255, 0, 0), box)
    return image


def find_red(x, mean, std):
    """Box of the pixels of a normalised input that are red by more than half."""
    red = (x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])[0]
    rows, columns = (red > 0.5).any(1).nonzero().flatten(), (red > 0.5).any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


GEOMETRIES = {
    'plain': {},
    'crop 0.875': dict(crop_pct=0.875),
    'rectangle': dict(input_size=(3, 32, 48)),
    'tall rectangle, crop': dict(input_size=(3, 56, 32), crop_pct=0.9),
    'squash': dict(crop_mode='squash', crop_pct=0.875),
    'border': dict(crop_mode='border'),
    'border, crop': dict(crop_mode='border', crop_pct=0.8, input_size=(3, 33, 33)),
}


@pytest.mark.parametrize('size', [(320, 320), (900, 300), (300, 900), (640, 427), (333, 500)])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_boxes_map_back(size, geometry):
    """A square near the middle is found in the input and its box maps back within one input pixel."""
    model = timm.create_model(NANO, pretrained_cfg_overlay=GEOMETRIES[geometry])
    side = min(size) // 4
    x0, y0 = size[0] // 2 - side + 10, size[1] // 2 - side // 3
    box = (x0, y0, x0 + side, y0 + side)
    source = preprocess(model, red_square(size, box))
    cfg = model.pretrained_cfg
    assert source.x.shape == cfg['input_size']
    found = source.to_image(find_red(source.x, cfg['mean'], cfg['std']))
    tolerance = torch.tensor([*source.scale, *source.scale], dtype=torch.float64)
    assert ((found - torch.tensor(box)).abs() <= tolerance).all(), (found.tolist(), box)


@pytest.mark.parametrize(('size', 'overlay', 'expected'), [
    ((64, 64), {}, [0, 0, 64, 64]),
    ((192, 64), {}, [64, 0, 128, 64]),
    ((64, 192), {}, [0, 64, 64, 128]),
    ((72, 72), dict(crop_pct=8 / 9), [4, 4, 68, 68]),
    ((192, 64), dict(crop_mode='squash'), [0, 0, 192, 64]),
    ((192, 64), dict(crop_mode='border'), [0, 0, 192, 64]),
])
def test_input_frame(size, overlay, expected):
    """The part of the image that the input shows, computed by hand."""
    model = timm.create_model(NANO, pretrained_cfg_overlay=overlay)
    source = preprocess(model, Image.new('RGB', size))
    assert source.to_image(torch.tensor([0., 0., 32., 32.])).tolist() == pytest.approx(expected)


def test_frame_that_is_padded_starts_outside():
    """timm's border mode pads a wide image above and below: the input begins above the image."""
    source = preprocess(
        timm.create_model(NANO, pretrained_cfg_overlay=dict(crop_mode='border')), Image.new('RGB', (192, 64)))
    assert source.scale == pytest.approx((6., 64 / 11))  # 64 / 6 = 10.67 pixels are rounded to 11
    assert source.offset == pytest.approx((0., -10 * 64 / 11))  # 21 rows of padding: 10 above, 11 below


@pytest.mark.parametrize('overlay', [{}, dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))])
def test_one_channel(overlay):
    """A grey model gets one normalised channel, whether or not its pretrained_cfg was adapted."""
    model = timm.create_model(NANO, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    source = preprocess(model, Image.new('RGB', (40, 50), (100, 100, 100)))
    mean, std = (0.5, 0.25) if overlay else ((0.4914 + 0.4822 + 0.4465) / 3, (0.2470 + 0.2435 + 0.2616) / 3)
    assert source.x.shape == (1, 32, 32)
    torch.testing.assert_close(source.x, torch.full((1, 32, 32), (100 / 255 - mean) / std))
    assert source.image.mode == 'RGB'
    assert explain(model, source.x[None]).evidence.shape == (1, 36)


def test_channels_that_no_image_has():
    """Four channels cannot come from an RGB image."""
    with pytest.raises(ValueError, match='input channels, got 4'):
        preprocess(timm.create_model(NANO, in_chans=4), Image.new('RGB', (32, 32)))


def test_input_equals_timm():
    """The input is exactly that of timm's own evaluation transform."""
    model = timm.create_model(NANO, pretrained_cfg_overlay=dict(crop_pct=0.875))
    noise = np.random.default_rng(0).integers(0, 256, (47, 81, 3), dtype=np.uint8)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image = Image.fromarray(noise)
    assert torch.equal(preprocess(model, image).x, transform(image))


def test_channels_are_the_models_own():
    """Weights of three channels in a model of one: its data config has one, and mean and std of one."""
    model = timm.create_model('test_resnet', in_chans=1)
    assert model.pretrained_cfg['input_size'][0] == 3
    config = input_config(model)
    assert (config['input_size'][0], len(config['mean']), len(config['std'])) == (1, 1, 1)
    assert Preprocessing(config)(Image.new('RGB', (50, 40))).x.shape[0] == 1
