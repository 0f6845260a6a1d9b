"""hub/publish.py without a Hub: the folder, the card, and what is refused. test_hub_round_trip.py has the uploads."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from timm.models import save_for_hf

import card
import folder as hub_folder
import publish
import train
from timm_lossattn import load_model
from timm_lossattn.cli import main as cli_main
from timm_lossattn.models.entrypoints import CIFAR10_LABELS

NANO = 'resnet18_lossattn_conv_nano'
SHIP = Path(publish.__file__).parent / 'space' / 'examples' / 'cifar10_test_00001_ship.png'


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    """Folder of the weights that ship."""
    folder = tmp_path_factory.mktemp('publish') / 'nano'
    assert publish.main([f'{NANO}.cifar10', '--repo-id', 'me/nano', '--dry-run', '--folder', str(folder)]) == 0
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
    for text in (f'{result["top1"]:.2f}', result['sha256'], 'JPEG', '(example.png)', f"'{NANO}.cifar10'", 'train.py'):
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
    assert f'of the images in `{folder.name}`' in model_card.text
    assert result['commands'][0] in model_card.text
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == numbers['labels']


@pytest.mark.parametrize(('name', 'words', 'absent'), [
    (NANO, ['(loss attention)', 'α says', 'lead over the others'], 'plain image classifier'),
    ('resnet18_meanpool_conv', ['all with the same weight', 'A patch sees'], 'α says'),
    ('resnet18_routing_caps', ['dynamic routing', 'A patch sees'], 'plain image classifier'),
    ('vgg11_bn_cifar', ['classifier, a baseline of timm_lossattn.', 'import timm_lossattn'], 'A patch sees'),
    ('resnet18', ['plain image classifier of timm.'], 'import timm_lossattn')])
@pytest.mark.parametrize('multi_label', [False, True])
def test_card_of_other_models(shipped, tmp_path, name, words, absent, multi_label):
    """The words fit the model: its head, whether it has patches, whose it is, whether its classes are independent."""
    shutil.copyfile(shipped / 'model.safetensors', tmp_path / 'model.safetensors')
    result = json.loads((shipped / 'result.json').read_text())
    result['args']['multi_label'] = multi_label
    config = json.loads((shipped / 'config.json').read_text()) | {'architecture': name}
    model = timm.create_model(name, device='meta')
    model_card = card.make_card(tmp_path, model, result, config, 'x', 'hf-hub:me/x', card.Words(note='A remark.'))
    text = model_card.text
    assert card.TAG in model_card.data.tags
    assert ("pip install -e '.[viz]'" in text) == (name != 'resnet18')
    assert "'hf-hub:me/x'" in text
    assert 'A remark.' in text
    for word in words:
        assert (word in text) != (multi_label and word == 'lead over the others')
    assert absent not in text
    assert ('multi_label=True' in text) == (multi_label and hasattr(model, 'forward_patches'))
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
    run_folder = tmp_path / 'run'
    shutil.copytree(shipped, run_folder / 'hub')
    expect(capsys, 'has no result.json', run_folder, *flags)
    expect(capsys, 'has no config.json', source('a', config_json=None), *flags)
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
    config = json.loads((shipped / 'config.json').read_text())
    flat = {key: config[key] for key in ('architecture', 'num_classes')} | config['pretrained_cfg']  # timm's older form
    expect(capsys, 'has no pretrained_cfg; write it again', source('i', config_json=json.dumps(flat).encode()), *flags)
    expect(capsys, 'is damaged', source('j', config_json=b'[]'), *flags)
    expect(capsys, 'is no folder, and no arch.tag', 'resnet18.a1_in1k', *flags)
    expect(capsys, f'{NANO}.mine is not registered', shipped, *flags, '--tag', 'mine')
    expect(capsys, 'would come first', shipped, *flags, '--tag', 'cifar10')
    expect(capsys, 'has the tag cifar10, not mine', f'{NANO}.cifar10', *flags, '--tag', 'mine')
    expect(capsys, 'the card of', f'{NANO}.cifar10', *flags, '--note', 'No.')
    expect(capsys, 'give one source, or --all', shipped, *flags, '--all')
    expect(capsys, 'give one source, or --all', *flags)
    expect(capsys, 'needs --repo-prefix ORG', '--all', *flags)
    expect(capsys, 'needs --repo-prefix ORG', '--all', '--repo-prefix', 'a/b', '--dry-run')
    expect(capsys, "--repo-prefix: is for --all, got 'me'", shipped, *flags, '--repo-prefix', 'me')
    config['model_args'] = {'xi': 0.5}
    expect(capsys, f'these weights differ from {NANO}.cifar10 as it is registered in xi',
           source('h', config_json=json.dumps(config).encode()), *flags, '--tag', 'cifar10')
    expect(capsys, '--example', shipped, *flags, '--example', tmp_path / 'no.png')
    expect(capsys, 'must be ORG/NAME', shipped, '--repo-id', 'nano', '--dry-run')
    expect(capsys, "'a b/c'", shipped, '--repo-id', 'a b/c', '--dry-run')
    expect(capsys, '--tag: pretrained weights must be public', shipped, *flags, '--private', '--tag', 'mine')
    expect(capsys, 'is or holds the source', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', shipped)
    assert (shipped / 'model.safetensors').exists()
    expect(capsys, 'is or holds the source', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', shipped.parent)
    with monkeypatch.context() as patch:
        patch.setattr(publish, 'prepare', None)  # which would empty it
        for where in (hub_folder.WEIGHTS / f'{NANO}.cifar10', hub_folder.WEIGHTS, hub_folder.WEIGHTS / 'new'):
            for what in ((f'{NANO}.cifar10', '--repo-id', 'me/x'), ('--all', '--repo-prefix', 'me')):
                expect(capsys, 'is or holds the source', *what, '--dry-run', '--folder', where)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shipped, 'output/publish/x/run/hub')
    expect(capsys, 'is or holds the source', 'output/publish/x/run', '--repo-id', 'me/x', '--dry-run')
    assert Path('output/publish/x/run/hub/model.safetensors').exists()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('')
    expect(capsys, 'holds other files', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', tmp_path / 'full')
    assert (tmp_path / 'full' / 'thesis.tex').exists()
    save_for_hf(timm.create_model(NANO), str(tmp_path / 'mine'), safe_serialization=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'mine').iterdir()}
    expect(capsys, 'holds other files', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', tmp_path / 'mine')
    assert {path.name: path.read_bytes() for path in (tmp_path / 'mine').iterdir()} == before
    for words in ('# My network', '---\ntags:\n- timm\n---\n# My network', '---\ntags: [\n---\n'):  # others' cards
        (tmp_path / 'mine' / 'README.md').write_text(words)
        expect(capsys, 'holds other files', shipped, '--repo-id', 'me/x', '--dry-run', '--folder', tmp_path / 'mine')
        assert (tmp_path / 'mine' / 'README.md').read_text() == words
    shutil.copytree(shipped, tmp_path / 'older')
    flags = ('--repo-id', 'me/x', '--dry-run', '--folder', tmp_path / 'older')
    expect(capsys, 'is no folder', tmp_path / 'nothing', *flags)
    assert (tmp_path / 'older' / 'model.safetensors').exists()
    monkeypatch.setattr(hub_folder, 'MAX_BYTES', 1000)
    expect(capsys, 'the Hub takes 1,000', shipped, *flags)


def test_folder_of_timm(tmp_path):
    """What ``save_for_hf`` wrote, without result.json: a card that says that nothing was measured."""
    torch.manual_seed(0)
    model = timm.create_model(NANO, num_classes=3, pretrained_cfg_overlay={'label_names': ['a', 'b', 'c']}).eval()
    save_for_hf(model, str(tmp_path / 'timm'), model_config={'label_names': ['a', 'b', 'c']}, safe_serialization=True)
    out = tmp_path / 'out'
    assert publish.main([str(tmp_path / 'timm'), '--repo-id', 'me/x', '--dry-run', '--folder', str(out), '--dataset',
                         'me/images', '--example', str(SHIP)]) == 0
    assert {p.name for p in out.iterdir()} == set(publish.FILES) - {'result.json'}
    model_card = ModelCard.load(out / 'README.md')
    assert not model_card.data.eval_results
    assert model_card.data.datasets == ['me/images']
    for text in ('no measurement came with these weights', 'is not recorded', 'a, b, c', 'hf-hub:me/x'):
        assert text in model_card.text
    assert 'result.json' not in model_card.text
    loaded = load_model(f'local-dir:{out}')
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(('name', 'tag'), [
    ('resnet18', 'a1_in1k'), ('lossattn', 'resnet18.a1_in1k'), ('lossattn.resnet18', 'resnet18.a1_in1k')])
def test_tags_that_nobody_reads(name, tag):
    """hub_weights.json is for names of this package; timm takes its own models' weights from elsewhere."""
    with pytest.raises(ValueError, match=r'--tag: \S*resnet18.a1_in1k takes no weights from here'):
        hub_folder.check_tag(timm.create_model(name, device='meta'), tag)


def test_tags_that_are_read(monkeypatch):
    """Of this package's models, and of backbones whose weights were trained here."""
    monkeypatch.setattr(hub_folder, 'bundled_weights', lambda name: None)  # as on a machine without them
    for name in (f'{NANO}.cifar10', 'vgg11_bn_cifar.cifar10', 'lossattn.tf_efficientnet_lite0.pbc'):
        hub_folder.check_tag(timm.create_model(name, device='meta'), name.split('.', 1)[1])


def test_picture_of_a_stock_model(tmp_path, capsys):
    """--example is drawn, or it is said why not; nothing is drawn without it, whatever the classes."""
    labels = {'label_names': list(CIFAR10_LABELS)}
    for name in ('test_resnet', 'test_vit'):
        save_for_hf(timm.create_model(name, num_classes=10), str(tmp_path / name), model_config=labels,
                    safe_serialization=True)
    out = tmp_path / 'out'
    flags = ('--repo-id', 'me/x', '--dry-run', '--folder', str(out))
    assert publish.main([str(tmp_path / 'test_resnet'), *flags]) == 0
    assert not (out / 'example.png').exists()
    assert publish.main([str(tmp_path / 'test_resnet'), *flags, '--example', str(SHIP)]) == 0
    assert (out / 'example.png').read_bytes().startswith(b'\x89PNG')
    text = (out / 'README.md').read_text()
    assert '(example.png)' in text
    assert 'Drawn by timm_lossattn' in text
    expect(capsys, '--example: ', tmp_path / 'test_vit', *flags, '--example', SHIP)


@pytest.mark.parametrize(('model', 'flags', 'words'), [
    ('lossattn.resnet18.a1_in1k', {}, 'pretrained weights of `resnet18.a1_in1k`.'),
    ('lossattn', {'model_kwargs': {'backbone': 'resnet18.a1_in1k'}}, 'pretrained weights of `resnet18.a1_in1k`.'),
    ('resnet18.a1_in1k', {}, 'pretrained weights of `resnet18.a1_in1k`.'),
    (NANO, {}, 'weights that the package had for this architecture at that time.'),
    ('resnet18_cifar', {}, 'weights that the package had for this architecture at that time.')])
def test_origin(model, flags, words):
    """Whose weights a run began with."""
    args = {'model': model, 'pretrained': True, **flags}
    assert card.origin({'model': model, 'args': args}) == f'Started from the {words}'
    assert card.origin({'model': model, 'args': args | {'pretrained': False}}) == ''


@pytest.mark.parametrize(('num_classes', 'multi_label', 'third'), [
    (2, False, False), (3, False, True), (3, True, False)])
def test_picture_of_a_card(shipped, tmp_path, num_classes, multi_label, third):
    """Its text names the third panel where there is one."""
    for file in ('model.safetensors', 'example.png'):
        shutil.copyfile(shipped / file, tmp_path / file)
    result = json.loads((shipped / 'result.json').read_text())
    result['args']['multi_label'] = multi_label
    config = json.loads((shipped / 'config.json').read_text()) | {'num_classes': num_classes}
    text = card.make_card(
        tmp_path, timm.create_model(NANO, device='meta'), result, config, 'x', 'hf-hub:me/x', card.Words()).text
    assert '![The image, what speaks for the predicted class' in text
    assert ('why not another one](example.png)' in text) is third


@pytest.mark.parametrize('num_classes', [10, 4])
def test_labels_are_those_of_the_weights(tmp_path, num_classes):
    """Weights that know other classes, or nobody knows which, are not said to know those of CIFAR-10."""
    model = timm.create_model(NANO, pretrained=num_classes == 4, num_classes=num_classes)
    save_for_hf(model, str(tmp_path / 'timm'), safe_serialization=True)
    out = tmp_path / 'out'
    assert publish.main([str(tmp_path / 'timm'), '--repo-id', 'me/x', '--dry-run', '--folder', str(out)]) == 0
    assert 'airplane' not in (out / 'README.md').read_text() + (out / 'config.json').read_text()
    assert not (out / 'example.png').exists()
    assert tuple(timm.get_pretrained_cfg(NANO).label_names) == CIFAR10_LABELS


def test_labels_of_a_run_without_names(shipped, tmp_path):
    """A run that started from weights with names, on data without, has no names."""
    run = tmp_path / 'run'
    shutil.copytree(shipped, run / 'hub')
    result = json.loads((shipped / 'result.json').read_text())
    del result['shipped']
    result['args']['label_names'] = None
    (run / 'result.json').write_text(json.dumps(result))
    assert publish.main([str(run), '--repo-id', 'me/x', '--dry-run', '--folder', str(tmp_path / 'out')]) == 0
    assert 'label_names' not in json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert 'airplane' not in (tmp_path / 'out' / 'README.md').read_text()


def test_shipped_weights_are_half_precision(shipped):
    """What goes up for the shipped weights is the float16 file that was measured."""
    state = load_file(shipped / 'model.safetensors')
    assert state['head.fc.weight'].dtype == torch.float16
