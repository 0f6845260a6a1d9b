"""labels.py: names of classes, told apart, and what a model knows."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_lossattn  # noqa: F401  (registers the models)
from fake_patch_model import SIZE, planted
from timm_lossattn.explanation import class_labels, explain
from timm_lossattn.explanation.labels import class_names, data_of, find_class, known_classes, training_data
from timm_lossattn.loading import full_name, load_patch_model

NANO = 'resnet18_lossattn_conv_nano'
PBC = 'lossattn.tf_efficientnet_lite0.pbc'
CELL = Path(__file__).parents[1] / 'data' / 'pbc_test_eosinophil_EO_170787.jpg'


def test_labels_are_different_text():
    """Whatever the weights call their classes; so that the model can be explained."""
    model = timm.create_model(NANO, num_classes=3, pretrained_cfg_overlay={'num_classes': 3}).eval()
    for names, expected in ((['crane', 'crane', 'crane (1)'], ['crane (0)', 'crane (1) (1)', 'crane (1) (2)']),
                            ([0, 1, 2], ['0', '1', '2'])):
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}
        assert class_labels(model, 3) == expected
        explanation = explain(model, torch.randn(1, 3, 32, 32))
        assert explanation.labels == expected
        assert explanation.figure()
    assert explain(model, torch.randn(1, 3, 32, 32), labels=[7, 8, 9]).labels == ['7', '8', '9']


def test_class_labels():
    """Names are those of weights that were loaded; other classes, or weights of one's own, have numbers."""
    model = timm.create_model(NANO, pretrained=True)
    assert class_labels(model, 10)[:2] == ['airplane', 'automobile']
    assert class_labels(model, 3) == ['class 0', 'class 1', 'class 2']
    assert class_labels(timm.create_model(NANO), 10)[:2] == ['class 0', 'class 1']
    model.reset_classifier(10)
    assert class_labels(model, 10)[:2] == ['class 0', 'class 1']


def test_names_by_index():
    """timm takes a dictionary for label_names; from JSON its keys are text."""
    model = timm.create_model(NANO, num_classes=3)
    for names in ({'0': 'cat', '2': 'dog'}, {0: 'cat', 2: 'dog'}):
        model.pretrained_cfg = {'label_names': names}
        assert class_labels(model, 3) == ['cat', 'class 1', 'dog']


def test_a_thousand_classes_of_ones_own():
    """A patch model that begins anew knows no names, not those of ImageNet, whatever its tag will be of."""
    model = timm.create_model('resnet18_lossattn_conv_s8', num_classes=1000)
    assert class_labels(model, 1000)[0] == 'class 0'
    model.reset_classifier(1000)
    assert class_labels(model, 1000)[0] == 'class 0'


def test_names_in_python():
    """Classes by name, for all images or for each, as target and as what it is compared with; the answer in a line."""
    model = planted()
    model.pretrained_cfg = {'label_names': ['tabby', 'Persian cat', 'tiger cat', 'dog', 'crane (n1)']}
    x = torch.zeros(2, 3, *SIZE)
    e = explain(model, x, target='dog', against='Tabby')
    assert (e.target.tolist(), e.against.tolist()) == ([3, 3], [0, 0])
    assert explain(model, x, ['persian', 4]).target.tolist() == [1, 4]
    for one in (3, np.int64(3), np.array(3), torch.tensor(3)):
        assert explain(model, x, one).target.tolist() == [3, 3]
    for few in ([3], torch.tensor([3])):
        with pytest.raises(ValueError, match='target must hold 2 classes'):
            explain(model, x, few)
    assert explain(model, x).versus(['crane', 'tiger cat']).against.tolist() == [4, 2]
    for value, reason in (('cat', r"'cat' may be 2 classes; choose one of \['Persian cat', 'tiger cat'\]"),
                          ('do', "no class 'do'"), ('', "no class ''"), ('5', "no class '5'")):
        with pytest.raises(ValueError, match=f'^target: {reason}'):
            explain(model, x, value)
    e = explain(model, x, against='crane')
    total, positive = float(e.evidence[0].sum()), int((e.evidence[0] > 0).sum())
    assert e.answer() == f'tiger cat over crane (n1): {total:+.2f}; {positive} of 12 patches for it'
    assert explain(model, x, against=None).answer(1).startswith('tabby, its logit: ')
    with pytest.raises(ValueError, match='against must differ from the target'):
        e.versus('tiger cat')


def test_close_names_of_many_classes():
    """Of a thousand names those that look alike are proposed; whole words come before them."""
    labels = [f'thing{k}' for k in range(1000)] + ['tabby', 'Egyptian cat']
    assert find_class('target', 'egyptian', labels) == 1001
    with pytest.raises(ValueError, match=r"^--target: no class 'taby'; choose one of \['tabby'\] or an index"):
        find_class('--target', 'taby', labels)


@pytest.mark.parametrize('value', ['Aquarium_Fish', 'aquarium fish', 'aquarium', 'FISH'])
def test_underscores_are_spaces(value):
    assert find_class('target', value, ['apple', 'aquarium_fish', 'baby']) == 1


@pytest.mark.parametrize(('tag', 'data'), [
    ('clip_laion2b_augreg_ft_in12k_in1k', 'ImageNet-1k'), ('a1_in1k', 'ImageNet-1k'), ('fb_in22k', 'ImageNet-22k')])
def test_training_data_of_timm_tags(tag, data):
    """The last ImageNet in a tag is the one whose classes the model has."""
    model = SimpleNamespace(pretrained_cfg={'tag': tag})
    assert training_data(model, ['tench', 'goldfish']) == data
    assert training_data(model, ['class 0', 'class 1']) == ''


def test_training_data():
    """What the tag says, where the classes are those of its weights; fine-tuned classes are of other data."""
    model = timm.create_model('resnet18_lossattn_conv_nano', pretrained=True)
    labels = class_labels(model, 10)
    assert training_data(model, labels) == 'CIFAR-10'
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': ['ant', *labels[1:]]}
    assert training_data(model, class_labels(model, 10)) == ''
    for name, data in (('resnet18.a1_in1k', 'ImageNet-1k'), ('convnext_tiny.fb_in22k_ft_in1k', 'ImageNet-1k'),
                       ('convnext_tiny.fb_in22k', 'ImageNet-22k')):
        model = timm.create_model(name, device='meta')
        assert training_data(model, class_labels(model, model.num_classes)) == data
    assert training_data(timm.create_model('resnet18.a1_in1k', num_classes=5, device='meta'), ['class 0']) == ''


def test_known_classes():
    """What a model knows, in a few words."""
    assert known_classes(['cat', 'dog', 'eel']) == 'knows 3 classes: cat … eel'
    assert known_classes(['cat', 'dog'], 'PETS') == 'knows 2 classes of PETS: cat, dog'  # there is none between them
    assert known_classes(['cell']) == 'knows 1 class: cell'
    assert known_classes([f'class {k}' for k in range(1000)]) == 'knows 1,000 classes, without names'


def test_names_given_with_a_model():
    """The registered ones are those of weights that are not loaded; those that the caller gives are kept."""
    name = 'resnet18_lossattn_conv_nano'
    cfg = {**timm.get_pretrained_cfg(name).to_dict(), 'num_classes': 3, 'label_names': list('abc')}
    assert class_labels(timm.create_model(name, num_classes=3, pretrained_cfg=cfg), 3) == list('abc')
    assert class_labels(timm.create_model(name, num_classes=10), 10)[0] == 'class 0'


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


def test_fine_tuned_weights_have_no_tag(tmp_path):
    """A model of one's own classes is called by its backbone alone, the tag of which is that of its start."""
    tagged = 'lossattn.test_resnet.r160_in1k'
    assert full_name(timm.create_model(tagged)) == tagged
    assert full_name(timm.create_model(tagged, pool='avg', num_classes=2)) == 'lossattn.test_resnet with pool=avg'
    model = timm.create_model(tagged, num_classes=1000)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': [f'kind {k}' for k in range(1000)]}
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert full_name(load_patch_model(f'local-dir:{tmp_path}')) == 'lossattn.test_resnet'


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
        explanation = explain(model, CELL)
        assert explanation.data == 'PBC (blood cells)'
        assert explanation.labels[int(explanation.predicted)] == 'eosinophil'


@pytest.mark.parametrize(('numbers', 'names'), [
    ((1, 0), ['b', 'a']), ((0, 0), ['a']), ((0, 2), []), ((1, 2), [])])
def test_class_names(numbers, names):
    """In the order of their numbers; none where numbers are missing."""
    assert class_names(SimpleNamespace(class_to_idx=dict(zip('ab', numbers)))) == names
