"""labels.py: names that are told apart, and what a tag says of the data."""
from types import SimpleNamespace

import pytest
import timm
from timm.models import save_for_hf

from timm_lossattn import explain
from timm_lossattn.explanation import class_labels
from timm_lossattn.explanation.labels import data_of, find_class, training_data
from timm_lossattn.loading import full_name, load_patch_model

PBC = 'lossattn.tf_efficientnet_lite0.pbc'


def test_equal_names():
    """Classes that are called the same, by timm or by the weights, each have a name of their own."""
    crane = class_labels(timm.create_model('resnet18.a1_in1k', device='meta'), 1000)
    assert len(set(crane)) == 1000
    assert [crane.index(name) for name in crane if name.startswith('crane (')] == [134, 517]
    labels = class_labels(SimpleNamespace(pretrained_cfg={'label_names': ['crane', 'maillot', 'crane']}), 3)
    assert labels == ['crane (0)', 'maillot', 'crane (2)']
    assert find_class('target', labels[2], labels) == 2
    with pytest.raises(ValueError, match=r"may be 2 classes; choose one of \['crane \(0\)', 'crane \(2\)'\]"):
        find_class('target', 'crane', labels)


@pytest.mark.parametrize(('name', 'data'), [
    ('lossattn.convnext_tiny.fb_in22k_ft_in1k', ['in22k', 'in1k']),
    ('resnet18_lossattn_conv_nano.cifar10', ['cifar10']), ('resnet18.cifar100', ['cifar100']), ('resnet18', []),
    ('resnet18_lossattn_conv_nano_s2.tiny_imagenet_mini', ['tiny_imagenet_mini']), ('resnet50.tv_cifar10x', []),
    (PBC, ['pbc'])])
def test_data_of(name, data):
    """Whole words of a tag."""
    assert data_of(name) == data


def test_unregistered_tag():
    """A tag that only a folder has is no error; it is not believed."""
    model = SimpleNamespace(pretrained_cfg={'architecture': 'resnet18', 'tag': 'cifar10', 'label_names': ['a', 'b']})
    assert training_data(model, ['a', 'b']) == ''


def test_folder_of_a_trained_model(tmp_path):
    """Saved and read twice, loss attention in a timm model keeps its tag as it was, and what it was trained on."""
    model = timm.create_model(PBC, pretrained=True)
    for name in ('first', 'second'):
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        model = load_patch_model(f'local-dir:{tmp_path / name}')
        assert model.pretrained_cfg['tag'] == 'tf_efficientnet_lite0.pbc'
        assert full_name(model) == PBC
        explanation = explain(model, 'tests/data/pbc_test_eosinophil_EO_170787.jpg')
        assert explanation.data == 'PBC (blood cells)'
        assert explanation.labels[int(explanation.predicted)] == 'eosinophil'
