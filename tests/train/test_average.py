"""average.py: means of parameters, and batch norms against a pass by hand."""
import timm
import torch
from PIL import Image

from lib.average import average_weights, measure_statistics
from lib.options import DataOptions
from timm_lossattn.explanation import preprocess

NANO = 'resnet18_lossattn_conv_nano'


def test_average_of_three():
    """Each parameter is the mean of three; buffers are the last one's."""
    torch.manual_seed(0)
    models = [timm.create_model(NANO, pretrained=i == 0) for i in range(3)]
    states = [{key: value.clone() for key, value in model.state_dict().items()} for model in models]
    average_weights(models[0], states[1:])
    parameters = dict(models[0].named_parameters())
    for key, value in models[0].state_dict().items():
        expected = sum(state[key] for state in states) / 3 if key in parameters else states[2][key]
        torch.testing.assert_close(value, expected)


def test_statistics(folder):
    """The first batch norm's are those of the first convolution over all images, of which it saw four at a time."""
    model = timm.create_model(NANO, pretrained=True, num_classes=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measure_statistics(model, DataOptions(data_dir=str(folder), val_split='train', workers=0, batch_size=4))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in parameters.items())
    assert model.training
    images = [Image.open(file) for file in sorted(folder.glob('train/*/*.png'))]
    assert len(images) == 32
    stem = model.backbone.stem
    with torch.no_grad():
        x = stem.conv(torch.stack([preprocess(model, image.convert('RGB')).x for image in images]))
    torch.testing.assert_close(stem.bn.running_mean, x.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert bool((stem.bn.running_var < 1.01 * x.var(dim=(0, 2, 3))).all())  # within batches of four
