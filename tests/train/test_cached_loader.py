"""Whole-batch augmentation against loops over images, and the order of a cached dataset."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.augment import BatchAugment
from lib.cached_loader import CachedLoader

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
IMAGES = torch.randint(256, (6, 3, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def create(**kwargs):
    return BatchAugment((8, 10), MEAN, STD, **kwargs)


def normalise(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x / 255 - mean) / std


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_disabled_normalises_only():
    torch.testing.assert_close(create(enabled=False)(IMAGES), normalise(IMAGES.float()))


@pytest.mark.parametrize('padding', [0, 1, 4])
def test_padded_crop_is_some_window_of_the_padded_image(padding):
    """Every image is a window of its own zero-padded image, perhaps mirrored; the windows differ between images."""
    out = create(crop_padding=padding)(IMAGES, seeded())
    places = set()
    for image, result in zip(IMAGES.float(), out):
        padded = torch.zeros(3, 8 + 2 * padding, 10 + 2 * padding)
        padded[:, padding:padding + 8, padding:padding + 10] = image
        windows = {(top, left): padded[:, top:top + 8, left:left + 10]
                   for top in range(2 * padding + 1) for left in range(2 * padding + 1)}
        found = [place for place, window in windows.items()
                 if any(torch.allclose(result, normalise(w), atol=1e-5) for w in (window, window.flip(2)))]
        assert found, 'no window'
        places.add(found[0])
    assert len(places) > 1 or padding == 0


@pytest.mark.parametrize(('hflip', 'flipped'), [(0., False), (1., True)])
def test_full_area_crop_is_the_image(hflip, flipped):
    """scale = ratio = 1 leaves the image, up to the flip, for both kinds of crop."""
    want = normalise(IMAGES.float())
    want = want.flip(3) if flipped else want
    square = IMAGES[..., :8]
    for augment, images, expected in (
            (create(crop_padding=0, hflip=hflip), IMAGES, want),
            (BatchAugment((8, 8), MEAN, STD, scale=(1, 1), ratio=(1, 1), hflip=hflip), square,
             normalise(square.flip(3).float() if flipped else square.float()))):
        torch.testing.assert_close(augment(images, seeded()), expected, rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 1.))
def test_resized_crop_stays_within_the_image(seed, area):
    """Bilinear samples of an image never leave its range: nothing is taken from outside."""
    images = IMAGES[:, :, :, :8]
    out = BatchAugment((8, 8), (0., 0., 0.), (1 / 255,) * 3, scale=(area, 1.))(images, seeded(seed))
    low, high = images.amin(dim=(2, 3)).float(), images.amax(dim=(2, 3)).float()
    assert (out.amin(dim=(2, 3)) >= low - 1e-3).all()
    assert (out.amax(dim=(2, 3)) <= high + 1e-3).all()


def test_other_size_and_erasing():
    """A batch can be asked for at another resolution; erasing sets some pixels to zero."""
    assert create(scale=(0.7, 1))(IMAGES, seeded(), size=(4, 6)).shape == (6, 3, 4, 6)
    torch.manual_seed(0)
    erased = create(reprob=1., crop_padding=0, hflip=0.)(IMAGES, seeded())
    assert ((erased == 0) & (normalise(IMAGES.float()) != 0)).any()


def loader(n=50, batch=4, **kwargs):
    """Images whose first pixel is their index."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    augment = BatchAugment((4, 4), (0.,) * 3, (1 / 255,) * 3, enabled=False)
    return CachedLoader(images, torch.arange(n), batch, augment, **kwargs)


def epoch_of(instance, epoch=0):
    instance.set_epoch(epoch)
    return [y.tolist() for _, y in instance]


def test_order():
    """Each epoch is a new permutation; the same epoch the same one, in a new loader as well; images match targets."""
    first = loader()
    batches = epoch_of(first)
    assert [len(b) for b in batches] == [4] * 12
    assert len({i for b in batches for i in b}) == 48
    assert epoch_of(first, 1) != batches
    assert epoch_of(loader()) == batches
    assert epoch_of(loader(seed=1)) != batches
    for x, y in first:
        assert torch.equal(x[:, 0, 0, 0].round().long(), y)


@pytest.mark.parametrize('world_size', [2, 3])
def test_processes_share_global_batches(world_size):
    """N processes together see the batches of one process with N times the batch size."""
    together = [epoch_of(loader(batch=4, rank=r, world_size=world_size)) for r in range(world_size)]
    alone = epoch_of(loader(batch=4 * world_size))
    assert [sorted(i for part in parts for i in part) for parts in zip(*together)] == [sorted(b) for b in alone]


@pytest.mark.parametrize('world_size', [1, 3])
def test_evaluation_sees_every_image_once(world_size):
    """In order, without dropping or repeating any."""
    parts = [epoch_of(loader(n=50, batch=4, rank=r, world_size=world_size, is_training=False))
             for r in range(world_size)]
    assert sorted(i for part in parts for b in part for i in b) == list(range(50))


def test_progressive_sizes():
    """Small images first, large ones at the end."""
    instance = loader(sizes=[4, 8], progressive_epochs=10)
    means = []
    for epoch in (0, 9):
        instance.set_epoch(epoch)
        sizes = [x.shape[-1] for x, _ in instance]
        assert len(sizes) == 12
        assert set(sizes) <= {4, 8}
        means.append(sum(sizes) / 12)
    assert means[0] < means[1]
    stages = loader(sizes=[4, 8, 16], progressive_epochs=8, spread=0., random_mix=0.)
    found = []
    for epoch in range(8):
        stages.set_epoch(epoch)
        size, = {x.shape[-1] for x, _ in stages}  # one in each epoch
        found.append(size)
    assert found == [4, 4, 8, 8, 8, 8, 16, 16]


def test_blank_cells():
    """Cells as single deletion blanks them, as often as was said, the same ones in all channels, never all."""
    augment = BatchAugment((8, 12), (0.,) * 3, (1 / 255,) * 3, crop_padding=0, hflip=0., blank_cells=0.3)
    x = augment(torch.ones(400, 3, 8, 12, dtype=torch.uint8), seeded(0))
    assert x.unique().tolist() == [0., 1.]
    assert torch.equal(x, x[:, :1].expand_as(x))
    cells = x[:, 0].reshape(400, 4, 2, 4, 3).transpose(2, 3).flatten(3)  # (B, 4, 4, pixels)
    assert torch.equal(cells.amin(3), cells.amax(3))
    blank = 1 - float(cells.amax(3).mean())
    assert abs(blank - 0.3 * 15 / 16) < 0.03
    always = BatchAugment((8, 12), (0.,) * 3, (1 / 255,) * 3, crop_padding=0, blank_cells=1.)
    assert always(torch.ones(50, 3, 8, 12, dtype=torch.uint8), seeded(0)).amax((1, 2, 3)).tolist() == [1.] * 50
