"""train.py --resume: what it goes on with, and what it refuses to go on with."""
import json
import shutil

import pytest
import torch
from test_train import QUICK

import compare_runs
import train
from lib import checkpoint, record
from lib.history import commands_of


@pytest.fixture
def command(folder, tmp_path):
    """Two epochs of two updates each in tmp_path/run, which --resume auto goes on with."""
    return ['--data-dir', str(folder), *QUICK, '--cache-dataset', '--batch-size', '16', '--output', str(tmp_path),
            '--experiment', 'run', '--resume', 'auto']


def test_killed_while_its_first_checkpoint_was_written(command, tmp_path):
    """A summary and half a temporary file: the run begins anew."""
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'summary.csv').write_text('epoch\n0\n')
    (run / 'tmp.pth.tar').write_bytes(b'half')
    assert train.main(command) == 0
    assert len(json.loads((run / 'result.json').read_text())['epochs']) == 2


def test_a_run_of_which_the_best_is_left(command, tmp_path, capsys):
    """Its other checkpoints were deleted: it is not trained anew over what is left."""
    assert train.main([*command, '--epochs', '1']) == 0
    run = tmp_path / 'run'
    for file in (*run.glob('checkpoint-*'), run / 'last.pth.tar'):
        file.unlink()
    kept = (run / 'result.json').read_text()
    assert train.main(command) == 2
    assert 'holds a run' in capsys.readouterr().err
    assert (run / 'result.json').read_text() == kept


def test_nothing_but_damaged_checkpoints(command, tmp_path, capsys):
    """That is said; nothing is overwritten."""
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'summary.csv').write_text('epoch\n0\n')
    (run / 'last.pth.tar').write_bytes(b'half')
    assert train.main(command) == 2
    assert 'every checkpoint in' in capsys.readouterr().err
    assert sorted(file.name for file in run.iterdir()) == ['last.pth.tar', 'summary.csv']


@pytest.mark.parametrize('more', [('--sched', 'none'), ('--sched-on-updates',)])
def test_another_learning_rate(command, tmp_path, more):
    """--lr and --weight-decay of the resumed command hold, as its record says, and its schedule begins with them."""
    assert train.main([*command, *more, '--epochs', '1', '--lr', '0.04', '--weight-decay', '1e-3']) == 0
    assert train.main([*command, *more, '--epochs', '3', '--lr', '0.01', '--weight-decay', '1e-4']) == 0
    saved = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert {group['weight_decay'] for group in saved['optimizer']['param_groups']} == {0., 1e-4}
    rates = [entry['lr'] for entry in json.loads((tmp_path / 'run' / 'result.json').read_text())['epochs']]
    assert rates[0] <= 0.04
    assert rates[1:] == [0.01, 0.01] if 'none' in more else max(rates[1:]) < 0.01
    assert saved['args']['lr'] == 0.01


def test_another_momentum(command, tmp_path):
    """The optimizer's other hyperparameters as well."""
    assert train.main([*command, '--epochs', '1', '--momentum', '0.9']) == 0
    assert train.main([*command, '--epochs', '2', '--momentum', '0.5']) == 0
    saved = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert {group['momentum'] for group in saved['optimizer']['param_groups']} == {0.5}


def test_what_began_where(command, tmp_path, capsys):
    """result.json says with which epoch each command began; the card says it; a finished run is left as it is."""
    run = tmp_path / 'run'
    assert train.main([*command, '--epochs', '1']) == 0
    assert train.main(command) == 0
    result = json.loads((run / 'result.json').read_text())
    assert [start['epoch'] for start in result['starts']] == [0, 1]
    assert {start['commit'] for start in result['starts']} == {result['commit']}
    assert commands_of(result) == [result['commands'][0], '# after 1 epoch', result['commands'][1]]
    other = {**result, 'starts': [result['starts'][0], {'epoch': 1, 'commit': 'abc'}]}
    assert commands_of(other)[1] == '# after 1 epoch, at commit abc'
    assert commands_of({'commands': ['python a.py']}) == ['python a.py']  # older records

    kept = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    capsys.readouterr()
    assert train.main([*command, '--lr', '0.5']) == 0
    assert 'nothing left to train: 2 of 2 epochs are done' in capsys.readouterr().err
    for name in ('args.yaml', 'result.json', 'summary.csv'):
        assert (run / name).read_bytes() == kept[name]
    assert train.main([*command, '--epochs', '3', '--eval-metric', 'loss']) == 2
    assert '--eval-metric: the run has chosen its best epoch by top1, got loss' in capsys.readouterr().err
    elsewhere = [*command, '--experiment', 'other', '--resume', str(run / 'last.pth.tar')]
    assert train.main(elsewhere) == 2
    assert 'has 2 epochs already; raise --epochs' in capsys.readouterr().err
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(('world', 'local', 'launcher'), [
    (None, None, 'python'), ('1', '1', 'python'), ('4', '4', 'torchrun --nproc-per-node 4'),
    ('8', '4', 'torchrun --nnodes 2 --nproc-per-node 4')])
def test_recorded_launcher(monkeypatch, world, local, launcher):
    """What is recorded as typed has the processes in it."""
    for name, value in (('WORLD_SIZE', world), ('LOCAL_WORLD_SIZE', local)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setattr('sys.argv', [train.__file__, '--lr', '0.1'])
    assert record.command_line(None) == f'{launcher} train/train.py --lr 0.1'
    monkeypatch.delenv('TORCHELASTIC_RUN_ID')  # mpirun or another launcher, whose command is not known
    assert record.command_line(None) == 'python train/train.py --lr 0.1'


@pytest.mark.parametrize('flags', [('--batch-size', '8'), ('--grad-accum-steps', '2'), ('--seed', '1')])
def test_other_batches_within_an_epoch(command, monkeypatch, capsys, flags):
    """A position within an epoch counts batches: of another size they would be other images."""
    save = checkpoint.AtomicSaver.save_position

    def save_and_stop(self, epoch, position):
        save(self, epoch, position)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.AtomicSaver, 'save_position', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, '--checkpoint-minutes', '0'])
    assert train.main([*command, *flags]) == 2
    assert f'{flags[0]}: ' in capsys.readouterr().err
    assert train.main(command) == 0


@pytest.mark.parametrize(('flags', 'message'), [
    (('--opt', 'adamw'), '--opt: '), (('--model', 'resnet18_cifar'), 'of resnet18_lossattn_conv_nano, does not fit')])
def test_another_optimizer_or_model(command, capsys, flags, message):
    """Is one line."""
    assert train.main([*command, '--epochs', '1']) == 0
    capsys.readouterr()
    assert train.main([*command, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: --')
    assert message in error


def test_without_the_patch_term_from_then_on(command, tmp_path):
    """The loss terms of the first epoch are not in the second; the run has its curves and its folder all the same."""
    assert train.main([*command, '--epochs', '1']) == 0
    assert train.main([*command, '--no-patch-loss']) == 0
    assert (tmp_path / 'run' / 'hub' / 'config.json').is_file()


@pytest.mark.parametrize(('begun', 'experiment'), [(0, 'run'), (2, 'other')])
def test_warm_up_of_plateau(command, tmp_path, begun, experiment):
    """A part of an epoch, or longer ago than another run's end: the learning rate is --lr afterwards."""
    flags = ['--sched', 'plateau', '--lr', '0.04', '--warmup-lr', '1e-5', '--warmup-epochs', '0.3']
    if begun:
        assert train.main([*command, '--epochs', '2', '--sched', 'none']) == 0
        command = [*command, '--resume', str(tmp_path / 'run' / 'last.pth.tar'), '--experiment', experiment]
    assert train.main([*command, *flags, '--epochs', str(begun + 2)]) == 0
    last = json.loads((tmp_path / experiment / 'result.json').read_text())['epochs'][-1]
    assert last['lr'] == pytest.approx(0.04)


def test_full_disk_within_an_epoch(command, monkeypatch, capsys):
    """torch.save's RuntimeError is one line here as well."""
    def full(*args, **kwargs):
        raise RuntimeError('unexpected pos 64 vs 0')

    monkeypatch.setattr(checkpoint.torch, 'save', full)
    assert train.main([*command, '--checkpoint-minutes', '0']) == 2
    assert 'checkpoint of epoch 1, within not written' in capsys.readouterr().err


def test_classes_of_the_splits(folder, tmp_path, capsys):
    """Folders of other names in train and val would be other classes under the same numbers."""
    data = tmp_path / 'data'
    shutil.copytree(folder, data)
    first, *_ = sorted((data / 'val').iterdir())
    first.rename(first.with_name('zz_' + first.name))
    flags = ['--data-dir', str(data), *QUICK, '--output', str(tmp_path), '--experiment', 'run']
    assert train.main(flags) == 2
    assert "--val-split: has a class 'right' where --train-split has 'left'" in capsys.readouterr().err


def test_runs_of_the_same_name(command, tmp_path, capsys):
    """compare_runs draws both, by their paths; training at another size than evaluation was said before."""
    assert train.main([*command, '--epochs', '1', '--train-img-sizes', '12']) == 0
    assert 'at most 12 pixels, where evaluation has 16' in capsys.readouterr().err
    other = shutil.copytree(tmp_path / 'run', tmp_path / 'other' / 'run')
    assert compare_runs.main([str(tmp_path / 'run'), str(other), '--out', str(tmp_path / 'curves.png')]) == 0
    said = capsys.readouterr().out
    assert f'{tmp_path / "run"}: top1' in said
    assert f'{other}: top1' in said
