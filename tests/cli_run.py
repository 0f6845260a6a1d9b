"""What tests of the command line share: images, models, and what a run left."""
import os
from pathlib import Path

import timm
import torch

DATA = Path(__file__).parent / 'data'
CAT, SHIP = DATA / 'cifar10_test_00000_cat.png', DATA / 'cifar10_test_00001_ship.png'
NANO, CAPS = 'resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano'


def random_model(name):
    """Random weights, the same in every call, with logits that are not all alike."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch.nn.init.normal_(model.head.fc.weight)
    return model.eval()


def written(tmp_path):
    """Names in the output folder, hidden ones too."""
    return sorted(os.listdir(tmp_path / 'out')) if (tmp_path / 'out').exists() else []


def error_line(capsys):
    """The one line on stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error ')
    assert err.count('\n') == 1
    return err
