"""cli.py in-process: what is asked and answered: numbers, classes, labels, panels, usage."""
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli_run import CAPS, CAT, NANO, SHIP, error_line, written
from timm_lossattn.cli import class_slug, main, true_class
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.preprocessing import open_image, preprocess
from timm_lossattn.models.entrypoints import CIFAR10_LABELS
from timm_lossattn.text import percent


@pytest.mark.parametrize('name', [NANO, CAPS])
def test_explain_numbers(run, models, tmp_path, capsys, name):
    """The JSON holds what the model computes when it is called directly."""
    assert run(CAT, model=name) == 0
    assert written(tmp_path) == [f'{CAT.stem}.json', f'{CAT.stem}.png']
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    model = models[name][0]
    with torch.no_grad():
        expected = model.forward_patches(preprocess(model, open_image(CAT)).x[None])

    logits = torch.tensor(numbers['logits'])
    best = int(logits.argmax())
    shares = torch.tensor(numbers['contributions']['target'])
    torch.testing.assert_close(logits, expected.logits[0])
    torch.testing.assert_close(torch.tensor(numbers['alpha']).flatten(), expected.alpha[0])
    torch.testing.assert_close(shares, expected.contributions[0, :, best].view(6, 6))
    torch.testing.assert_close(shares.sum(), logits[best])
    assert numbers['patch_grid'] == [6, 6]
    assert numbers['image_size'] == numbers['input_size'] == [32, 32]
    assert numbers['labels'] == list(CIFAR10_LABELS)
    assert numbers['selected'] == (expected.alpha[0] > 0).view(6, 6).tolist()
    assert numbers['model'] == name
    assert numbers['image'] == str(CAT)

    assert numbers['target'] == {'class': best, 'label': numbers['labels'][best]}
    assert numbers['against'] == 'rest'
    rivals = logits[torch.arange(10) != best]
    lead = logits[best] - (rivals.softmax(0) * rivals).sum()
    assert sum(map(sum, numbers['evidence'])) == pytest.approx(float(lead), abs=1e-4)
    top = numbers['top5']
    assert [t['class'] for t in top] == logits.topk(5).indices.tolist()
    assert [t['label'] for t in top] == [numbers['labels'][t['class']] for t in top]
    assert [t['logit'] for t in top] == pytest.approx(logits.topk(5).values.tolist())
    assert [t['probability'] for t in top] == pytest.approx(logits.softmax(0).topk(5).values.tolist())
    assert f'{CAT.name}: {top[0]["label"]} {percent(top[0]["probability"])}  ->' in capsys.readouterr().out


def test_numbers_that_are_not_finite(run, tmp_path, monkeypatch, capsys):
    """Reported and left out, without a file; the images after it are explained."""
    def broken(model, path, *args, **kwargs):
        explanation = explain(model, path, *args, **kwargs)
        if path == CAT:
            explanation.prediction.contributions[0, 3, 4] = float('nan')
        return explanation
    monkeypatch.setattr('timm_lossattn.cli.explain', broken)
    assert run(CAT, SHIP) == 1
    assert f'{CAT.name}: its logits or contributions are not finite' in ' '.join(capsys.readouterr().out.split())
    assert written(tmp_path) == [f'{SHIP.stem}.json', f'{SHIP.stem}.png']


@pytest.mark.parametrize(('arguments', 'known'), [(['test_resnet'], True), (['test_resnet', '--pretrained'], False)])
def test_check_says_what_it_knows(monkeypatch, capsys, arguments, known):
    """Of a model whose weights cannot be had there is no number of parameters."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert main(['check', *arguments]) == (0 if known else 1)
    assert ('million' in capsys.readouterr().out) is known


def test_all_classes(run, models, tmp_path):
    """On request the JSON holds the contributions to every class."""
    assert run(CAT, '--all-classes') == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    contributions = torch.tensor(numbers['contributions'])
    assert contributions.shape == (6, 6, 10)
    torch.testing.assert_close(contributions.sum((0, 1)), torch.tensor(numbers['logits']))


@pytest.mark.parametrize(('target', 'index'), [('truck', 9), ('Truck', 9), ('0', 0), ('9', 9)])
def test_target(run, tmp_path, target, index):
    """A class by name, in any case, and by index; the file says which."""
    assert run(CAT, '--target', target) == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}-{CIFAR10_LABELS[index]}.json').read_text())
    assert numbers['target'] == {'class': index, 'label': numbers['labels'][index]}


def test_slugs():
    """Of labels that are one in a file's name the index tells which; two long ones and an image's name are a name."""
    labels = ['a b', 'A-b', '??', '図' * 60, '図' * 60 + '?']
    slugs = [class_slug(k, labels) for k in range(5)]
    assert slugs[:3] == ['a_b_0', 'A_b_1', '_2']
    assert slugs[3:] == [f'{"図" * 26}_{k}' for k in (3, 4)]


def test_target_name_before_index(run, tmp_path, monkeypatch):
    """Where a class is called '7', '--target 7' means that class."""
    for module in ('cli', 'explanation.explain'):
        monkeypatch.setattr(
            sys.modules[f'timm_lossattn.{module}'], 'class_labels', lambda model, classes: ['9', '8', '7', *'abcdefg'])
    assert run(CAT, '--target', '7') == 0
    assert json.loads((tmp_path / 'out' / f'{CAT.stem}-7.json').read_text())['target'] == {'class': 2, 'label': '7'}


def test_against(run, tmp_path, capsys):
    """Why not another class: evidence that sums to the difference of the logits, in a file of its own and in a line."""
    assert run(CAT) == 0
    assert run(CAT, '--target', 'cat', '--against', 'truck') == 0
    assert written(tmp_path) == [f'{CAT.stem}{q}.{e}' for q in ('-cat-vs-truck', '') for e in ('json', 'png')]
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}-cat-vs-truck.json').read_text())
    evidence = [value for row in numbers['evidence'] for value in row]
    positive = sum(value > 0 for value in evidence)
    answer = f'cat over truck: {sum(evidence):+.2f}; {positive} of 36 patches for it'
    assert capsys.readouterr().out.splitlines()[-1].strip() == answer
    assert numbers['against'] == {'class': 9, 'label': 'truck'}
    difference = numbers['logits'][3] - numbers['logits'][9]
    assert sum(map(sum, numbers['evidence'])) == pytest.approx(difference, abs=1e-4)


def run_shipped(tmp_path, *args):
    """``explain`` with the weights that ship, which tell a cat from a ship."""
    return main(['explain', *map(str, args), '--model', NANO, '--out', str(tmp_path / 'out')])


def test_against_itself(run, tmp_path, capsys):
    """An image that is classified as that class is reported and skipped; the others are explained."""
    assert run_shipped(tmp_path, CAT, '--against', 'cat') == 1
    assert f'--against: {CAT.name}: cat is what it is classified as; ' in capsys.readouterr().out
    assert run(CAT, '--target', 'cat', '--against', 'CAT') == 2
    assert '--against: cat is --target as well; choose another class.' in error_line(capsys)
    assert written(tmp_path) == []
    assert run_shipped(tmp_path, CAT, SHIP, '--against', 'cat') == 1
    assert written(tmp_path) == [f'{SHIP.stem}-vs-cat.{end}' for end in ('json', 'png')]


@pytest.mark.parametrize(('label', 'true'), [
    ('truck', 'truck'), ('folder', 'truck'), ('name', 'truck'), ('cat', 'cat')])
def test_label(tmp_path, capsys, label, true):
    """What an image shows, as a class or from a name: in the file, and in the line if the prediction is another."""
    (tmp_path / 'truck').mkdir()
    image = tmp_path / 'truck' / 'photo_7_truck.png'
    image.symlink_to(CAT.resolve())  # its folder is where it stands, not where it leads
    (tmp_path / 'other').mkdir()
    assert run_shipped(tmp_path, tmp_path / 'other' / '..' / 'truck' / image.name, '--label', label) == 0
    numbers = json.loads((tmp_path / 'out' / f'{image.stem}.json').read_text())
    assert numbers['true_class'] == {'class': CIFAR10_LABELS.index(true), 'label': true}
    assert numbers['target']['label'] == 'cat'
    out = capsys.readouterr().out
    assert (', wrong' in out) == (', wrong: truck' in out) == (true == 'truck')


@pytest.mark.parametrize(('label', 'file', 'expected'), [
    ('folder', 'horse cart/a.png', 0), ('folder', 'Horse_Cart/a.png', 0), ('folder', 'Pickup truck/a.png', 2),
    ('folder', '2/a.png', 2), ('folder', 'horse/a.png', None), ('folder', '4/a.png', None),
    ('name', 'a_horse cart.png', 0), ('name', 'a_CRAB.png', 1), ('name', 'crab.png', 1), ('name', 'IMG_0002.png', None),
    ('name', 'a_horse.png', None)])
def test_labels_of_names_are_whole(label, file, expected):
    """A word or a running number in the name of a file is no class."""
    labels = ['horse cart', 'crab', 'pickup_truck', 'custard apple']
    if expected is None:
        with pytest.raises(ValueError, match=r"^--label: no class '.*', as the (folder|name) of "):
            true_class(label, Path(file), labels)
    else:
        assert true_class(label, Path(file), labels) == expected


def test_label_that_is_no_class(run, capsys):
    """A folder that is no class of the model is said to be none."""
    assert run(CAT, '--label', 'folder') == 1
    assert f"--label: no class 'data', as the folder of {CAT.name} says" in capsys.readouterr().out
    assert run(CAT, CAT, '--label', 'cart') == 2  # what holds for all is said once, before anything is written
    assert "--label: no class 'cart'; choose one of" in error_line(capsys)
    assert run(CAT, '--label', 'cat', '--multi-label') == 2
    assert '--label: one class is the true one, which does not go with --multi-label' in error_line(capsys)


def test_classes_of_equal_probability(run, tmp_path, capsys, monkeypatch):
    """Sigmoids that round to 1: the class of the largest logit is named, as in the picture."""
    def certain(model, *args, **kwargs):
        for parameter in model.get_classifier().parameters():
            parameter.data *= 0
        model.get_classifier().bias.data += torch.arange(18., 37., 2.)
        return explain(model, *args, **kwargs)

    monkeypatch.setattr('timm_lossattn.cli.explain', certain)
    assert run(CAT, '--multi-label') == 0
    assert f'{CAT.name}: truck > 99.9 %' in capsys.readouterr().out
    top = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())['top5']
    assert [entry['class'] for entry in top] == [9, 8, 7, 6, 5]


def test_panels(run, tmp_path, capsys):
    """More panels make a wider picture, stacked ones a higher one; one that does not exist is refused."""
    sizes = []
    for flags in (['--panels', 'outline'], ['--panels', 'outline,alpha'], ['--panels', 'outline,alpha', '--stacked']):
        assert run(CAT, *flags) == 0
        sizes.append(Image.open(tmp_path / 'out' / f'{CAT.stem}.png').size)
    assert sizes[0][0] < sizes[1][0]
    assert sizes[2][0] == sizes[0][0]
    assert sizes[0][1] < sizes[2][1]
    capsys.readouterr()
    assert run(CAT, '--panels', 'outline,heat') == 2
    assert "--panels: no panel 'heat'" in error_line(capsys)


@pytest.mark.parametrize('target', ['zebra', '10', '-1', '1.5', ''])
@pytest.mark.parametrize('flag', ['--target', '--against'])
def test_bad_class(run, tmp_path, capsys, flag, target):
    """Names the option and the classes; nothing is written."""
    assert run(CAT, f'{flag}={target}') == 2
    message = error_line(capsys)
    assert f"{flag}: no class '{target}'" in message
    assert 'airplane' in message
    assert written(tmp_path) == []


@pytest.mark.parametrize('argv', [[], ['explain'], ['unknown'], ['explain', 'a.png', '--no-such-option']])
def test_usage(argv, capsys):
    """argparse's exit code and usage line."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert 'usage: timm-lossattn' in capsys.readouterr().err
