"""Parts of train/: recipes, schedule, optimizer steps, checkpoints, backbone weights."""
import copy
import json
import resource
import shutil
import signal
from contextlib import nullcontext
from functools import cache

import datasets
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_train import QUICK, train
from timm.task import ClassificationTask
from torch import nn

import compare_runs
import train as train_script
from kill_and_resume import identical, kill_and_resume, state
from lib import build, checkpoint, command
from lib.engine import train_one_epoch
from lib.evaluate import evaluate_task
from lib.model import create_model, model_args, renamed_backbone
from lib.process import Process
from lib.schedule import GaussianRampupScheduler


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
    """Folder of a two-epoch run on a cached dataset with the paper's augmentation."""
    out = tmp_path_factory.mktemp('out')
    code = train_script.main(['--data-dir', str(folder), *QUICK, '--cache-dataset', '--crop-padding', '4',
                              '--output', str(out), '--experiment', 'run'])
    assert code == 0
    return out / 'run'


@pytest.fixture
def run_copy(finished, tmp_path):
    """A copy of that run, to damage."""
    shutil.copytree(finished, tmp_path / 'run')
    return tmp_path / 'run'


def go_on(folder, run, epochs, *more, runner=None):
    """Resume the run in place with ``--resume auto``."""
    command = ['--data-dir', str(folder), *QUICK, '--cache-dataset', '--crop-padding', '4', '--epochs', str(epochs),
               '--output', str(run.parent), '--experiment', run.name, '--resume', 'auto', *more]
    return train_script.main(command) if runner is None else runner(command)


RECIPES = yaml.safe_load(command.RECIPES.read_text())


@pytest.mark.parametrize('recipe', RECIPES['recipes'])
@pytest.mark.parametrize('dataset', ['', *RECIPES['datasets']])
def test_recipes_hold_flags(recipe, dataset):
    """Every key is a flag of train.py, and all values are accepted."""
    args = command.parse_args(['--recipe', f'{recipe}/{dataset}' if dataset else recipe])
    entry = RECIPES['recipes'][recipe]
    for values in (entry['flags'], *entry.get('models', {}).values(), RECIPES['datasets'].get(dataset, {})):
        assert set(values) <= set(vars(command.build_parser().parse_args([])))
    dataset = dataset or RECIPES['recipes'][recipe].get('default_dataset')
    assert args.dataset == (RECIPES['datasets'][dataset]['dataset'] if dataset else '')


def test_recipe_is_overridden(tmp_path):
    """By its own changes for a model and a dataset, then by --config, then by the command line."""
    def lr(*argv):
        return command.parse_args(['--recipe', *argv]).lr

    config = tmp_path / 'config.yaml'
    config.write_text('lr: 0.7\n')
    assert lr('sgd') == 0.1
    assert lr('sgd', '--model', 'resnet50_lossattn_conv') == 0.02
    assert lr('sgd/coco') == 0.05
    assert lr('sgd/coco', '--config', str(config)) == 0.7
    assert lr('sgd/coco', '--config', str(config), '--lr', '0.3') == 0.3


def schedule_of(recipe, optimizer):
    """Learning rate and β₂ at the start of each epoch under a recipe, 10 updates an epoch."""
    args = command.parse_args(['--recipe', recipe])
    scheduler, epochs = build.create_scheduler(args, optimizer, updates_per_epoch=10)
    trace = []
    for epoch in range(epochs):
        group = optimizer.param_groups[0]
        trace.append((group['lr'], group.get('betas', (None, None))[1]))
        for i in range(10):
            scheduler.step_update(epoch * 10 + i + 1)
        scheduler.step(epoch + 1)
    return trace


def test_schedules_of_the_paper():
    """sgd: 0.1, from epoch 100 on 0.01, from 150 on 0.001. adam: Gaussian ramp to 0.003, steps, β₂ from epoch 80 on."""
    weight = nn.Parameter(torch.zeros(1))
    sgd = [lr for lr, _ in schedule_of('sgd', torch.optim.SGD([weight], lr=0.1))]
    assert sgd == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)
    adam = schedule_of('adam', torch.optim.Adam([weight], lr=0.003, betas=(0.9, 0.99)))
    ramp = [0.003 * 2.718281828459045 ** (-5 * (1 - t / 80) ** 2) for t in range(80)]
    assert [lr for lr, _ in adam] == pytest.approx(ramp + [0.003] * 40 + [0.0003] * 40 + [0.00003] * 40)
    assert [beta for _, beta in adam] == [0.99] * 80 + [0.999] * 120


def test_schedule_refuses():
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match='rampup_t'):
        GaussianRampupScheduler(torch.optim.SGD([weight], lr=0.1), rampup_t=-1)
    with pytest.raises(ValueError, match='SGD has no β₂'):
        GaussianRampupScheduler(torch.optim.SGD([weight], lr=0.1), beta2_after_rampup=0.999)


@pytest.mark.parametrize(('batches', 'accum'), [(4, 2), (5, 2), (3, 4)])
def test_gradient_accumulation(batches, accum):
    """N batches in an update give the step of one batch of all their images; also a last update of fewer."""
    torch.manual_seed(0)
    data = [(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(batches)]
    merged = [tuple(map(torch.cat, zip(*data[i:i + accum]))) for i in range(0, batches, accum)]
    weights = []
    for loader, steps in ((data, accum), (merged, 1)):
        torch.manual_seed(1)
        task = ClassificationTask(nn.Linear(3, 2), nn.CrossEntropyLoss(), verbose=False)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.5, momentum=0.9)
        options = command.parse_args(['--grad-accum-steps', str(steps), '--device', 'cpu'])
        train_one_epoch(0, options, Process(), task, loader, optimizer, None, nullcontext, None)
        weights.append(task.trainable_module.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('source', 'model', 'missing'), [
    ('resnet18', 'resnet18_lossattn_conv', {'stem.conv.weight'}),  # 7×7 there, 3×3 here
    ('resnet34', 'resnet34_lossattn_conv', {'stem.conv.weight'}),
    ('vgg11_bn', 'vgg11_bn_lossattn_caps', set()),
])
def test_backbone_of_timm(source, model, missing):
    """timm's ResNets and VGGs lend their weights under our names, layer for layer."""
    own = {k: v for k, v in timm.create_model(model, device='meta').state_dict().items() if k.startswith('backbone.')}
    state = timm.create_model(source, device='meta').state_dict()
    renamed = renamed_backbone(state, list(own))
    fits = {name for name, tensor in own.items() if name in renamed and renamed[name].shape == tensor.shape}
    assert {name.removeprefix('backbone.') for name in set(own) - fits} == missing


@pytest.mark.parametrize(('name', 'ema'), [
    ('resnet18_lossattn_conv_nano', False), ('resnet18_lossattn_conv_nano', True), ('resnet18_cifar', True)])
def test_compiled_models_are_evaluated_compiled(name, ema):
    """With and without EMA, and the numbers are those of the model as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = command.parse_args(['--device', 'cpu', '--smoothing', '0'])
    model = timm.create_model(name, num_classes=2)
    task = build.create_task(options, model, 1, torch.device('cpu'))
    judged = copy.deepcopy(model).eval()
    if ema:
        task.setup_ema(decay=0.5)
        model.get_classifier().bias.data += torch.tensor([0., 3.])  # as if it had been trained since
    loader = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]
    plain = evaluate_task(task, loader, Process(), nullcontext, False)
    loss = nn.functional.cross_entropy(judged(loader[0][0]), loader[0][1])
    assert plain['loss'] == pytest.approx(loss.item(), abs=1e-5)
    task.compile(backend=backend)
    task.compile_ema(backend=backend)
    assert not graphs
    assert evaluate_task(task, loader, Process(), nullcontext, False) == pytest.approx(plain)
    assert graphs


def test_sync_bn_needs_gpus():
    options = command.parse_args(['--model', 'resnet18_lossattn_conv_nano', '--sync-bn', '--device', 'cpu'])
    with pytest.raises(ValueError, match='--sync-bn: PyTorch has it on GPUs only'):
        create_model(options, Process(world_size=2))


def test_hub_folder(finished):
    """hub/ holds the best weights; timm loads them, with the labels."""
    best = torch.load(finished / 'model_best.pth.tar', weights_only=False)
    model = timm.create_model(f'local-dir:{finished / "hub"}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == ['left', 'right']
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, best['state_dict'][name]), name
    assert sorted(p.name for p in (finished / 'hub').iterdir()) == ['config.json', 'model.safetensors']


def test_curves(finished):
    """A PNG picture."""
    assert (finished / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_truncated_checkpoint_is_skipped(folder, run_copy, caplog):
    """--resume auto warns about it and goes on from the one before; afterwards all is as it was."""
    last = run_copy / 'last.pth.tar'
    content = last.read_bytes()
    last.write_bytes(content[:len(content) // 2])
    (run_copy / 'checkpoint-1.pth.tar').unlink()
    assert go_on(folder, run_copy, epochs=2) == 0
    assert 'skipped' in caplog.text
    result = json.loads((run_copy / 'result.json').read_text())
    assert [entry['epoch'] for entry in result['epochs']] == [0, 1]
    assert checkpoint.load_checkpoint(last)['epoch'] == 1


def test_lost_copies_are_mended(folder, run_copy):
    """A kill between writing last.pth.tar and its copies loses nothing."""
    best = torch.load(run_copy / 'model_best.pth.tar', weights_only=False)['epoch']
    (run_copy / 'model_best.pth.tar').unlink()
    (run_copy / 'checkpoint-1.pth.tar').unlink()
    shutil.rmtree(run_copy / 'hub')
    assert go_on(folder, run_copy, epochs=2) == 0
    assert torch.load(run_copy / 'model_best.pth.tar', weights_only=False)['epoch'] == best
    assert (run_copy / 'checkpoint-1.pth.tar').exists()
    assert (run_copy / 'hub' / 'model.safetensors').exists()


def test_files_are_independent(finished):
    """Damage to one checkpoint is not damage to another."""
    names = ('last.pth.tar', 'model_best.pth.tar', 'checkpoint-1.pth.tar')
    assert len({(finished / name).stat().st_ino for name in names}) == 3


def test_going_back(folder, run_copy):
    """--resume of an older checkpoint drops what came after it."""
    assert go_on(folder, run_copy, 2, '--resume', str(run_copy / 'checkpoint-0.pth.tar')) == 0
    result = json.loads((run_copy / 'result.json').read_text())
    assert [entry['epoch'] for entry in result['epochs']] == [0, 1]
    assert len(result['commands']) == 2
    best = torch.load(run_copy / 'model_best.pth.tar', weights_only=False)['epoch']
    assert best == result['best']['epoch']


def test_resume_into_another_run_is_refused(folder, run_copy, finished, capsys):
    """A run's history is not mixed with another's."""
    assert go_on(folder, run_copy, 3, '--resume', str(finished / 'last.pth.tar')) == 2
    assert 'holds a run' in capsys.readouterr().err


def test_hub_folder_of_another_command(folder, run_copy, finished):
    """It says what its weights were trained with, not what a later command wants."""
    assert go_on(folder, run_copy, 2, '--xi', '0.9', '--mean', '0.1', '0.1', '0.1') == 0
    assert (run_copy / 'hub' / 'config.json').read_text() == (finished / 'hub' / 'config.json').read_text()


def test_config_of_a_run(folder, run_copy):
    """args.yaml of a run is a --config file that gives the same command."""
    args = command.parse_args(['--config', str(run_copy / 'args.yaml')])
    recorded = yaml.safe_load((run_copy / 'args.yaml').read_text())
    assert {k: v for k, v in vars(args).items() if k in recorded} == recorded


@pytest.mark.parametrize(('flag', 'value'), [('lr', None), ('decay_milestones', [13, 17]), ('warmup_epochs', 0)])
def test_recipe_at_another_pace(flag, value):
    """20 epochs instead of 200: decay after 10 and 15 (sgd) or 12 and 16 (adam), warm-up and ramp at the same pace."""
    argv = ['--recipe', 'sgd', '--epochs', '20']
    if flag == 'decay_milestones':
        assert command.parse_args(argv).decay_milestones == [11, 16]
        argv += ['--decay-milestones', '13', '17']
    args = command.parse_args(argv)
    assert args.rampup_epochs == 8
    assert value is None or getattr(args, flag) == value
    adam = command.parse_args(['--recipe', 'adam', '--epochs', '20'])
    assert (adam.warmup_epochs, adam.decay_milestones) == (8, [12, 16])


def test_full_disk(folder, run_copy):
    """One line, exit code 2, and the older checkpoint is still there."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = go_on(folder, run_copy, 3, runner=lambda command: train(*command, preexec_fn=limit))
    assert done.returncode == 2
    assert 'checkpoint of epoch 3 not written' in done.stderr.strip().splitlines()[-1]
    assert checkpoint.load_checkpoint(run_copy / 'last.pth.tar')['epoch'] == 1


def test_killed_runs_end_like_undisturbed_ones():
    """One of the kills that tests/kill_and_resume.py makes, with a loader worker."""
    assert kill_and_resume(1, seed=1, extra=('--workers', '1')) == [True]


@pytest.fixture(scope='module')
def undisturbed(folder, tmp_path_factory):
    """Flags -> folder of a run with them that nothing stops; each is made once."""
    @cache
    def run(flags):
        out = tmp_path_factory.mktemp('undisturbed')
        assert train_script.main(saving(folder, out, *flags)) == 0
        return out / 'run'
    return run


def saving(folder, out, *flags):
    """A training that saves its position after every update, and goes on from there."""
    return ['--data-dir', str(folder), *QUICK, *flags, '--checkpoint-minutes', '0', '--output', str(out),
            '--experiment', 'run', '--resume', 'auto']


@pytest.mark.parametrize('save', [2, 5])
@pytest.mark.parametrize('flags', [
    ('--mixup', '0.2', '--reprob', '0.5', '--drop', '0.1', '--sched-on-updates', '--workers', '1'),
    ('--mixup', '0.2', '--reprob', '0.5', '--drop', '0.1', '--drop-path', '0.1', '--model-ema'),
    ('--cache-dataset', '--cutmix', '1', '--reprob', '0.5', '--drop', '0.1', '--batch-size', '4', '--grad-accum-steps',
     '2', '--model-ema')])
def test_resumed_within_an_epoch(folder, tmp_path, monkeypatch, undisturbed, flags, save):
    """--checkpoint-minutes: a run that ends after some update and goes on from there ends with the same bits."""
    saves, command, run = [], saving(folder, tmp_path, *flags), tmp_path / 'run'
    original = checkpoint.AtomicSaver.save_position

    def save_and_stop(self, epoch, position):
        original(self, epoch, position)
        saves.append(epoch)
        if len(saves) == save:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.AtomicSaver, 'save_position', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_script.main(command)
    assert checkpoint.load_checkpoint(run / 'last.pth.tar')['epoch'] == saves[-1] - 1
    other = '--no-cache-dataset' if '--cache-dataset' in flags else '--cache-dataset'  # whose order is another
    assert train_script.main([*command, other]) == 2
    assert train_script.main(command) == 0
    assert identical(state(run), state(undisturbed(flags)))
    results = [json.loads((out / 'result.json').read_text()) for out in (run, undisturbed(flags))]
    assert [[len(result[key]) for key in ('commands', 'starts')] for result in results] == [[2, 2], [1, 1]]
    for ours, theirs in zip(*(result['epochs'] for result in results)):
        assert ours['eval'] == theirs['eval']
        assert ours['train']['loss'] == theirs['train']['loss']


@pytest.mark.parametrize('workers', ['0', '1'])
def test_unreadable_image(folder, tmp_path, capfd, workers):
    """An error that names it, not a silent replacement."""
    shutil.copytree(folder, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / 'left' / '3.png').write_text('no image')
    assert train_script.main(['--data-dir', str(tmp_path / 'data'), *QUICK, '--workers', workers, '--output',
                              str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert 'error: --dataset: unreadable image' in error.strip().splitlines()[-1]
    assert '3.png' in error


@pytest.mark.parametrize('workers', ['0', '1'])
def test_label_outside_the_range(tmp_path, capsys, workers):
    """A label that the model has no class for, in a dataset that does not name its classes."""
    images = [Image.new('RGB', (32, 32), (k, k, k)) for k in range(16)]
    rows = datasets.Dataset.from_dict({'image': images, 'label': [0, 1] * 7 + [0, 7]}, features=datasets.Features(
        {'image': datasets.Image(), 'label': datasets.Value('int64')}))
    for split in ('train', 'val'):
        (tmp_path / 'set').mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / 'set' / f'{split}-0.parquet')
    assert train_script.main(['--dataset', f'hfds/{tmp_path / "set"}', '--data-dir', str(tmp_path), *QUICK,
                              '--val-split', 'validation', '--workers', workers, '--output', str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == 'error: --dataset: label 7 outside [0, 2), the classes of the model'


def test_compare_runs(finished, tmp_path, capsys):
    """A picture, and each run's last value; a missing run is an error."""
    out = tmp_path / 'curves.png'
    assert compare_runs.main([str(finished), str(finished), '--out', str(out)]) == 0
    assert out.read_bytes().startswith(b'\x89PNG')
    top1 = json.loads((finished / 'result.json').read_text())['last']['top1']
    assert f'run: top1 {top1:.2f} after 2 epochs' in capsys.readouterr().out
    assert compare_runs.main([str(tmp_path / 'none'), '--out', str(out)]) == 2


def test_routing_takes_the_input_size():
    """Its weights belong to positions: the model is made for the size of the run's images, as its checkpoint says."""
    options = command.parse_args(['--model', 'resnet18_routing_caps', '--input-size', '3', '16', '20', '--width-mult',
                                  '0.125', '--num-classes', '3', '--device', 'cpu'])
    model = create_model(options, Process.start('cpu'))
    assert model(torch.zeros(2, 3, 16, 20)).shape == (2, 3)
    assert model_args(options) == {'width_mult': 0.125, 'img_size': [16, 20]}
    plain = command.parse_args(['--model', 'resnet18_lossattn_conv', '--input-size', '3', '16', '20'])
    assert model_args(plain) == {}
