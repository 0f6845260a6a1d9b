"""train/train.py end to end on images made here, as a user runs it: in a process of its own."""
import csv
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import train as train_script
import validate
from lib import command
from lib.data import same_folder
from lib.record import save_hub_folder
from timm_lossattn import load_model
from timm_lossattn.explanation import class_labels, input_config
from timm_lossattn.loading import model_config

ROOT = Path(__file__).parents[2]
QUICK = ('--model', 'resnet18_lossattn_conv_nano', '--num-classes', '2', '--val-split', 'val', '--batch-size', '8',
         '--epochs', '2', '--warmup-epochs', '0', '--workers', '0', '--lr', '0.02', '--device', 'cpu',
         '--color-jitter', '0', '--input-size', '3', '16', '16')


def train(*flags, script=ROOT / 'train' / 'train.py', **kwargs):
    """Run a training script; the finished process."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, flags)], capture_output=True, text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'), **kwargs)


def main(*flags):
    """The same in this process; its exit code."""
    return train_script.main([*map(str, flags)])


def loss_of_the_best(run, folder, tmp_path):
    """Validation loss of the model that a run saved in hub/, as validate.py measures it in one process."""
    assert validate.main(['--model', f'local-dir:{run / "hub"}', '--data-dir', str(folder), '--val-split', 'val',
                          '--workers', '0', '--device', 'cpu', '--results-file', str(tmp_path / 'best.json')]) == 0
    return json.loads((tmp_path / 'best.json').read_text())['loss']


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
    """Folder of a finished two-epoch run with EMA."""
    out = tmp_path_factory.mktemp('out')
    done = train('--data-dir', folder, *QUICK, '--model-ema', '--model-ema-decay', '0.5', '--channels-last',
                 '--output', out, '--experiment', 'run')
    assert done.returncode == 0, done.stderr
    assert 'epoch 2/2  top1' in done.stderr
    assert 'Current checkpoints' not in done.stderr  # of timm's own words only warnings
    return out / 'run'


def test_run_writes_its_files(run):
    """result.json, summary.csv with the loss terms by name, and a checkpoint of the bare model."""
    result = json.loads((run / 'result.json').read_text())
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert [int(r['epoch']) for r in rows] == [0, 1] == [e['epoch'] for e in result['epochs']]
    assert {'train_loss', 'train_image_loss', 'train_patch_loss', 'train_gamma', 'eval_top1'} <= set(rows[0])
    first, second = (float(r['train_gamma']) for r in rows)
    assert 0 < first < second <= 0.1 + 1e-9
    assert result['seed'] == 42
    assert len(result['commands']) == 1
    assert 'train.py' in result['commands'][0]
    assert result['best']['top1'] == max(e['eval']['top1'] for e in result['epochs'])
    model = timm.create_model('resnet18_lossattn_conv_nano', num_classes=2, checkpoint_path=str(run / 'last.pth.tar'))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_the_model_that_was_evaluated_is_saved(run, folder, tmp_path):
    """With EMA: the best epoch's numbers are those of the weights in hub/, not of the ones that trained."""
    best = json.loads((run / 'result.json').read_text())['best']
    assert loss_of_the_best(run, folder, tmp_path) == pytest.approx(best['loss'], abs=1e-5)
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=True)
    name = 'head.fc.weight'
    assert float((checkpoint['state_dict'][name] - checkpoint['state_dict_ema'][name]).abs().max()) > 1e-3


def test_resume(run, folder, tmp_path):
    """--resume goes on after the last epoch and keeps the history."""
    run = shutil.copytree(run, tmp_path / 'run')
    done = train('--data-dir', folder, *QUICK, '--epochs', '3', '--model-ema', '--resume', run / 'last.pth.tar',
                 '--output', run.parent, '--experiment', 'run')
    assert done.returncode == 0, done.stderr
    result = json.loads((run / 'result.json').read_text())
    assert [e['epoch'] for e in result['epochs']] == [0, 1, 2]
    assert len(result['commands']) == 2
    assert '--resume' in result['commands'][1]


def test_a_run_is_not_overwritten(run, folder, capsys):
    assert main('--data-dir', folder, *QUICK, '--output', run.parent, '--experiment', 'run') == 2
    assert 'holds a run' in capsys.readouterr().err.strip().splitlines()[-1]


def test_explain_reads_how_the_checkpoint_was_built(run, tmp_path):
    """Number of classes and labels come from the training checkpoint."""
    from timm_lossattn.cli import main
    image = ROOT / 'tests' / 'data' / 'cifar10_test_00001_ship.png'
    assert main(['explain', str(image), '--checkpoint', str(run / 'last.pth.tar'), '--out', str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / f'{image.stem}.json').read_text())
    assert numbers['labels'] == ['left', 'right']


def test_the_model_is_built_as_it_was_trained(folder, tmp_path, capsys):
    """From the checkpoint alone and from hub/: arguments of the model, channels, labels, preprocessing."""
    assert main('--data-dir', folder, *QUICK, '--epochs', '1', '--output', tmp_path, '--experiment', 'x',
                '--xi', '0.5', '--backbone-stride', '2', '--patch-stride', '2', '--patch-padding', '1',
                '--model-kwargs', 'global_pool=attn',
                '--input-size', '1', '40', '36', '--crop-mode', 'squash') == 0
    checkpoint = torch.load(tmp_path / 'x' / 'last.pth.tar', weights_only=True)  # plain data, no classes
    assert checkpoint['args']['model'] == checkpoint['arch'] == 'resnet18_lossattn_conv_nano'
    x = torch.randn(2, 1, 40, 36)
    outputs = []
    for model in (load_model(checkpoint=tmp_path / 'x' / 'model_best.pth.tar'),
                  load_model(f'local-dir:{tmp_path / "x" / "hub"}')):
        assert (model.xi, model.backbone_stride, model.global_pool, model.in_chans) == (0.5, 2, 'attn', 1)
        assert (model.patch_stride, model.patch_padding) == (2, 1)
        config = input_config(model)
        assert (tuple(config['input_size']), config['crop_mode']) == ((1, 40, 36), 'squash')
        assert list(model.pretrained_cfg['label_names']) == ['left', 'right']
        outputs.append(model(x))
    assert torch.equal(*outputs)
    assert validate.main(['--checkpoint', str(tmp_path / 'x' / 'last.pth.tar'), '--data-dir', str(folder),
                          '--val-split', 'val', '--workers', '0']) == 0  # one channel, as the model says
    swapped = tmp_path / 'swapped.pth.tar'
    checkpoint['model_config']['label_names'] = ['right', 'left']
    torch.save(checkpoint, swapped)
    assert validate.main(['--checkpoint', str(swapped), '--data-dir', str(folder), '--val-split', 'val']) == 2
    assert "class 0 is 'left', the model's is 'right'" in capsys.readouterr().err

    # fine-tuned from that folder: the same model again, called by its architecture
    flags = [*QUICK[4:], '--num-classes', '3', '--epochs', '1', '--pretrained', '--model',
             f'local-dir:{tmp_path / "x" / "hub"}']
    folder = shutil.copytree(folder, tmp_path / 'images')
    for split in ('train', 'val'):
        (folder / split / 'none').mkdir()
        shutil.copy(next((folder / split / 'left').iterdir()), folder / split / 'none')
    assert train_script.main(['--data-dir', str(folder), *flags, '--output', str(tmp_path), '--experiment', 'y']) == 0
    assert json.loads((tmp_path / 'y' / 'result.json').read_text())['model'] == 'resnet18_lossattn_conv_nano'
    for model in (load_model(checkpoint=tmp_path / 'y' / 'model_best.pth.tar'),
                  load_model(f'local-dir:{tmp_path / "y" / "hub"}')):
        assert (model.xi, model.backbone_stride, model.global_pool, model.patch_padding) == (0.5, 2, 'attn', 1)


def test_classes_without_names(tmp_path):
    """A run on images whose classes have no names does not keep those of the weights that it began with."""
    model = timm.create_model('resnet18_lossattn_conv_nano.cifar10', pretrained=True)
    torch.save({'epoch': 0, 'optimizer': {}, 'state_dict': model.state_dict(),
                'model_config': model_config('resnet18_lossattn_conv_nano', {})}, tmp_path / 'model_best.pth.tar')
    save_hub_folder(tmp_path / 'hub', tmp_path / 'model_best.pth.tar')
    loaded = load_model(f'local-dir:{tmp_path / "hub"}')
    assert class_labels(loaded, 10)[0] == 'class 0'


@pytest.mark.parametrize(('script', 'module', 'extra'), [
    ('train', 'tqdm', 'train'), ('validate', 'yaml', 'train'), ('prepare', 'pyarrow', 'train'),
    ('prepare', 'datasets', 'train'), ('figures', 'matplotlib', 'viz'), ('compare_explanations', 'captum', 'compare'),
    ('compare_explanations', 'torchmetrics', 'compare')])
def test_missing_packages(script, module, extra, monkeypatch, capsys):
    """One line that names the extra."""
    def loaded(*packages):
        return [name for name in sys.modules if any(f'{name}.'.startswith(f'{package}.') for package in packages)]

    monkeypatch.setattr(sys, 'argv', ['x'])
    for name in {module, *loaded(module)}:
        monkeypatch.setitem(sys.modules, name, None)
    ours = 'lib', 'timm_lossattn.evaluation'  # which look for the packages
    monkeypatch.setattr('timm_lossattn.evaluation', importlib.import_module('timm_lossattn.evaluation'))  # put back
    kept = {name: sys.modules.pop(name) for name in loaded(*ours)}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / 'train' / f'{script}.py'), run_name='__main__')
    finally:
        for name in loaded(*ours):
            del sys.modules[name]
        sys.modules.update(kept)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith('error: ')
    assert 'is not installed' in line
    assert extra in line.partition('pip install')[2]


@pytest.mark.parametrize(('flags', 'loss_terms'), [
    (('--no-patch-loss',), {'loss'}),
    (('--mixup', '0.2', '--train-img-sizes', '16', '24', '--train-size-schedule', 'progressive'), {'patch_loss'}),
    (('--model-kwargs', 'global_pool=attn', '--in-chans', '1', '--input-size', '1', '32', '32'), {'loss'}),
    (('--cache-dataset', '--in-chans', '1', '--cutmix', '1', '--grad-accum-steps', '3'), {'patch_loss'}),
    (('--pretrained-backbone', 'resnet18_lossattn_caps_nano', '--sched', 'plateau'), {'patch_loss'}),
    (('--torchcompile', 'eager', '--model-ema'), {'patch_loss'}),
    (('--opt', 'adahessian'), {'patch_loss'}),
    (('--amp', '--amp-dtype', 'bfloat16', '--xi', '0.5', '--clip-grad', '1', '--sched-on-updates'), {'patch_loss'}),
])
def test_variants(folder, tmp_path, flags, loss_terms):
    """Other heads and flags train; the patch term appears for loss attention only, unless it is switched off."""
    assert main('--data-dir', folder, *QUICK, '--epochs', '1', '--output', tmp_path, '--experiment', 'x', *flags) == 0
    terms = json.loads((tmp_path / 'x' / 'result.json').read_text())['epochs'][0]['train']
    assert loss_terms <= set(terms)
    assert ('patch_loss' in terms) == ('patch_loss' in loss_terms)


@pytest.mark.parametrize(('flags', 'message'), [
    (('--xi', '2'), '--xi must lie in [0, 1]'),
    (('--gamma-max', '-1'), '--gamma-max must lie in'),
    (('--batch-size', '0'), '--batch-size must lie in'),
    (('--nonsense',), 'unrecognized arguments'),
    (('--num-classes', '3'), '--num-classes'),
    (('--model', 'no_such_model'), 'no_such_model'),
    (('--data-dir', '/no/such/folder'), '/no/such/folder'),
    (('--batch-size', '1000'), '--batch-size: 1000 is more than the 32 training images'),
    (('--resume', 'no_such_file'), '--resume: no such file'),
    (('--resume', 'auto'), '--resume auto: needs the --experiment'),
    (('--pretrained-backbone', 'resnet18_attn_conv'), '--pretrained-backbone'),
    (('--pretrained-backbone', 'resnet18_lossattn_conv_nano', '--model', 'vgg11_bn_cifar'), 'no separate backbone'),
    (('--recipe', 'best'), "no recipe 'best'; there are sgd, adam, fast, cpu, finetune, smoke"),
    (('--recipe', 'sgd/mnist'), "no dataset 'mnist'"),
    (('--mixup', '0.2', '--batch-size', '7'), '--batch-size must be even'),
    (('--multi-label', '--mixup', '0.2'), '--multi-label: goes with'),
    (('--cache-dataset', '--aa', 'rand-m9'), '--cache-dataset: goes with none of --aa'),
    (('--crop-padding', '4', '--color-jitter', '0.4'), '--crop-padding: goes with none of'),
    (('--recipe', 'sgd/cifar10', '--scale', '0.5', '1'), '--crop-padding: is in place of --scale and --ratio'),
    (('--recipe', 'fast/cifar10', '--train-size-schedule', 'progressive'),
     '--train-size-schedule: needs --train-img-sizes'),
    (('--train-img-sizes', '16', '24', '--train-size-random-mix', '0.5'),
     '--train-size-random-mix: is of --train-size-schedule progressive'),
    (('--model-kwargs', 'no_such_argument=1'), 'no_such_argument'),
    (('--eval-metric', 'top7', '--cache-dataset'), "--eval-metric: 'top7' is none of loss, top1, top5"),
    (('--grow-from', 'resnet18_lossattn_conv_nano', '--pretrained'), '--grow-from: goes with none of --pretrained'),
    (('--blank-cells', '0.3', '--cache-dataset', '--no-aug'), '--blank-cells: needs --cache-dataset, without --no-aug'),
    (('--blank-cells', '30', '--cache-dataset'), '--blank-cells must lie in'),
    (('--gathered', '--torchcompile'), '--gathered: is for the CPU, without --torchcompile'),
    (('--multi-label', '--smoothing', '0.1'), '--multi-label: goes with none of --mixup, --cutmix, --smoothing'),
    (('--layer-decay', '0.8', '--sched', 'none'), '--layer-decay: needs a schedule'),
    (('--xi', '0.5', '--model', 'resnet18_meanpool_conv', '--width-mult', '0.125'), '--xi: resnet18_meanpool_conv has'),
    (('--train-split', 'train[:4]'), "has no parts of splits, got 'train[:4]'"),
    (('--dataset', 'torch/cifar10', '--train-split', 'train[:90%]'), "has no parts of splits, got 'train[:90%]'"),
    (('--dataset', 'torch/cifar10', '--train-split', 'trian'), "--dataset torch/cifar10: has no split 'trian'"),
    (('--in-chans', '4'), '--in-chans: images are read in grey, 1, or colours, 3, got 4'),
    (('--log-wandb', '--workers', '0'), '--log-wandb: not installed'),
])
def test_bad_flags(folder, tmp_path, flags, message, capsys):
    """What is wrong stands in the last line, without a traceback; the exit code is 2."""
    try:
        code = train_script.main(['--data-dir', str(folder), *QUICK, '--output', str(tmp_path), *flags])
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_config_file(folder, tmp_path, capsys):
    """A --config file gives defaults, the command line wins, unknown keys are refused."""
    config = tmp_path / 'config.yaml'
    config.write_text('epochs: 1\nlr: 0.5\nmodel: resnet18_lossattn_caps_nano\n')
    flags = [f for f in QUICK if f not in ('--model', 'resnet18_lossattn_conv_nano')]
    flags[flags.index('--epochs'):flags.index('--epochs') + 2] = []
    assert main('-c', config, '--data-dir', folder, *flags, '--output', tmp_path, '--experiment', 'x') == 0
    args = json.loads((tmp_path / 'x' / 'result.json').read_text())['args']
    assert (args['epochs'], args['lr'], args['model']) == (1, 0.02, 'resnet18_lossattn_caps_nano')
    config.write_text('epoch: 1\n')
    with pytest.raises(SystemExit, match='2'):
        main('-c', config, '--data-dir', folder, *flags)
    assert "unknown keys ['epoch']" in capsys.readouterr().err
    config.write_text('train_size_schedule: progresive\n')
    with pytest.raises(SystemExit, match='2'):
        main('-c', config, '--data-dir', folder, *flags)
    assert "train_size_schedule must be one of constant, progressive, got 'progresive'" in capsys.readouterr().err


def test_folder_without_splits(folder, capsys):
    """timm would take all of it for both; both splits of torchvision's sets have the same root."""
    svhn = SimpleNamespace(root='data/svhn')
    assert not same_folder(svhn, svhn, command.parse_args(['--dataset', 'torch/svhn', '--val-split', 'test']))
    assert main('--data-dir', folder / 'train', *QUICK) == 2
    assert "has no sub-folders for --train-split 'train' and --val-split 'val'" in capsys.readouterr().err


@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason='TIMM_REPO is not set: no checkout of timm with its train.py')
def test_unmodified_timm_train_script(folder, tmp_path):
    """timm's own train.py trains a model of this package when --device-modules imports it.

    A copy outside the checkout, so that it imports the installed timm and not the checkout's.
    """
    script = tmp_path / 'train.py'
    shutil.copy(Path(os.environ['TIMM_REPO']) / 'train.py', script)
    done = train(
        '--device-modules', 'timm_lossattn', '--data-dir', folder, '--val-split', 'val', '--device', 'cpu',
        '--model', 'resnet18_lossattn_conv_nano', '--num-classes', '2', '--epochs', '1', '--warmup-epochs', '0',
        '--batch-size', '8', '--workers', '0', '--output', tmp_path, '--experiment', 'x',
        script=script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'x' / 'summary.csv').exists()
