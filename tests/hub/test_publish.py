"""hub/publish.py without a Hub: the folder, the card, and what is refused. test_hub_round_trip.py has the uploads."""
import argparse
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file

import card
import publish
import train
from timm_lossattn.cli import main as cli_main

NANO = 'resnet18_lossattn_conv_nano'
SHIP = Path(__file__).parent / 'data' / 'cifar10_test_00001_ship.png'


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    """Folder of the weights that ship."""
    folder = tmp_path_factory.mktemp('publish') / 'nano'
    assert publish.main([f'{NANO}.cifar10', '--repo-id', 'me/nano', '--dataset', 'uoft-cs/cifar10', '--dry-run',
                         '--folder', str(folder), '--note', 'A remark.']) == 0
    return folder


def test_folder(shipped):
    """Exactly the files that go up; the weights are the bytes that ship, and timm loads them."""
    assert {p.name for p in shipped.iterdir()} == set(publish.FILES)
    model = timm.create_model(NANO, pretrained=True).eval()
    assert (shipped / 'model.safetensors').read_bytes() == Path(model.pretrained_cfg['file']).read_bytes()
    loaded = timm.create_model(f'local-dir:{shipped}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.pretrained_cfg['label_names']) == list(model.pretrained_cfg['label_names'])
    assert (shipped / 'example.png').read_bytes().startswith(b'\x89PNG')


def test_card(shipped):
    """The Hub's own classes read it; its numbers are those of result.json."""
    model_card = ModelCard.load(shipped / 'README.md')
    result = json.loads((shipped / 'result.json').read_text())['shipped']
    found = {r.metric_name: r.metric_value for r in model_card.data.eval_results}
    assert found == {'top-1 accuracy (%)': result['top1'], 'top-5 accuracy (%)': result['top5']}
    assert {r.dataset_type for r in model_card.data.eval_results} == {'uoft-cs/cifar10'}
    assert {r.dataset_split for r in model_card.data.eval_results} == {'test'}
    data = metadata_load(shipped / 'README.md')
    assert (data['library_name'], data['license'], data['datasets']) == ('timm', 'apache-2.0', ['uoft-cs/cifar10'])
    assert data['pipeline_tag'] == 'image-classification'
    for text in (f'{result["top1"]:.2f}', result['sha256'], 'A remark.', '(example.png)', 'hf-hub:me/nano', 'train.py'):
        assert text in model_card.text
    assert '{{' not in model_card.text
    assert '{%' not in model_card.text


def test_from_images_to_card(folder, tmp_path):
    """One's own images: fine-tune the shipped weights, explain, and look at what would be published."""
    run = tmp_path / 'mine'
    assert train.main([
        '--data-dir', str(folder), '--num-classes', '2', '--model', NANO, '--pretrained', '--epochs', '1',
        '--batch-size', '8', '--lr', '0.01', '--workers', '0', '--device', 'cpu', '--output', str(tmp_path),
        '--experiment', 'mine']) == 0
    assert cli_main(['explain', str(SHIP), '--checkpoint', str(run / 'model_best.pth.tar'), '--out',
                     str(tmp_path / 'explained')]) == 0
    numbers = json.loads((tmp_path / 'explained' / f'{SHIP.stem}.json').read_text())
    assert len(numbers['labels']) == 2
    out = tmp_path / 'publish'
    assert publish.main([str(run), '--repo-id', 'me/mine', '--example', str(SHIP), '--dry-run', '--folder',
                         str(out)]) == 0
    result = json.loads((out / 'result.json').read_text())
    model_card = ModelCard.load(out / 'README.md')
    best = next(e for e in result['epochs'] if e['epoch'] == result['best']['epoch'])
    assert model_card.data.eval_results[0].metric_value == best['eval']['top1']
    assert model_card.data.datasets is None  # images on a disk have no id on the Hub
    assert result['commands'][0] in model_card.text
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == numbers['labels']


@pytest.mark.parametrize(('name', 'words', 'absent'), [
    (NANO, ['loss-based attention', 'α says', 'lead over the others'], 'plain image classifier'),
    ('resnet18_meanpool_conv', ['all with the same weight', 'A patch sees'], 'α says'),
    ('vgg11_bn_cifar', ['plain image classifier'], 'A patch sees')])
@pytest.mark.parametrize('multi_label', [False, True])
def test_card_of_other_models(shipped, tmp_path, name, words, absent, multi_label):
    """The words fit the model: its head, whether it has patches, whether its classes are independent."""
    shutil.copyfile(shipped / 'model.safetensors', tmp_path / 'model.safetensors')
    result = json.loads((shipped / 'result.json').read_text())
    result['args']['multi_label'] = multi_label
    config = json.loads((shipped / 'config.json').read_text()) | {'architecture': name}
    args = argparse.Namespace(repo_id='me/x', dataset=None, license='apache-2.0', note=None)
    model = timm.create_model(name, device='meta')
    text = card.make_card(tmp_path, model, result, config, args).text
    for word in words:
        assert (word in text) != (multi_label and word == 'lead over the others')
    assert absent not in text
    assert ('multi_label=True' in text) == (multi_label and name != 'vgg11_bn_cifar')
    assert f'| parameters | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |' in text


def expect(capsys, text, *args):
    """One line with the error, the last on stderr, exit code 2. timm's log may stand before it, once it is set up."""
    assert publish.main([*map(str, args)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    assert text in lines[-1]


def test_errors(shipped, tmp_path, capsys, monkeypatch):
    """Each says which flag, and what is accepted."""
    def source(name, **changes):
        folder = tmp_path / name
        shutil.copytree(shipped, folder)
        for file, content in changes.items():
            path = folder / file.replace('_json', '.json').replace('_safetensors', '.safetensors')
            path.unlink() if content is None else path.write_bytes(content)
        return folder

    out = tmp_path / 'out'
    flags = ('--repo-id', 'me/x', '--dry-run', '--folder', out)
    expect(capsys, 'is no folder, and no arch.tag', tmp_path / 'nothing', *flags)
    expect(capsys, 'has no result.json', source('a', result_json=None), *flags)
    pickled = source('b', model_safetensors=None)
    torch.save({}, pickled / 'pytorch_model.bin')
    expect(capsys, 'pytorch_model.bin are pickles, which are not published', pickled, *flags)
    expect(capsys, 'was measured on other weights', source('c', model_safetensors=b'broken'), *flags)
    result = json.loads((shipped / 'result.json').read_text())
    run = {k: v for k, v in result.items() if k != 'shipped'}  # as train.py leaves it
    expect(capsys, 'the weights do not load',
           source('d', model_safetensors=b'broken', result_json=json.dumps(run).encode()), *flags)
    other = run | {'model': 'resnet18_lossattn_caps_nano'}
    expect(capsys, 'result.json is of resnet18_lossattn_caps_nano with 10 classes',
           source('e', result_json=json.dumps(other).encode()), *flags)
    expect(capsys, "is damaged: KeyError('model')", source('f', result_json=b'{}'), *flags)
    expect(capsys, 'is damaged', source('g', config_json=b'{"archi'), *flags)
    expect(capsys, 'is no folder, and no arch.tag', 'resnet18.a1_in1k', *flags)
    expect(capsys, f'{NANO}.mine is not registered', shipped, *flags, '--tag', 'mine')
    expect(capsys, 'the package holds weights', shipped, *flags, '--tag', 'cifar10')
    config = json.loads((shipped / 'config.json').read_text())
    config['model_args'] = {'xi': 0.5}
    expect(capsys, f'these weights differ from {NANO}.cifar10 as it is registered in xi',
           source('h', config_json=json.dumps(config).encode()), *flags, '--tag', 'cifar10')
    expect(capsys, '--example', shipped, *flags, '--example', tmp_path / 'no.png')
    expect(capsys, 'must be ORG/NAME', shipped, '--repo-id', 'nano', '--dry-run')
    expect(capsys, "'a b/c'", shipped, '--repo-id', 'a b/c', '--dry-run')
    expect(capsys, '--tag: pretrained weights must be public', shipped, *flags, '--private', '--tag', 'mine')
    expect(capsys, 'is the source', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', shipped)
    assert (shipped / 'model.safetensors').exists()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('')
    expect(capsys, 'holds other files', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', tmp_path / 'full')
    assert (tmp_path / 'full' / 'thesis.tex').exists()
    monkeypatch.setattr(publish, 'MAX_BYTES', 1000)
    expect(capsys, 'the Hub takes 1,000', shipped, *flags)


def test_shipped_weights_are_half_precision(shipped):
    """What goes up for the shipped weights is the float16 file that was measured."""
    state = load_file(shipped / 'model.safetensors')
    assert state['head.fc.weight'].dtype == torch.float16
