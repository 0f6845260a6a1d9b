"""train.py --resume: what it goes on with, and what it refuses to go on with."""
import json
import shutil

import pytest
import torch
from test_train import QUICK

import compare_runs
import train
from lib import checkpoint


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


@pytest.mark.parametrize('flags', [('--batch-size', '8'), ('--grad-accum-steps', '2')])
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
    assert train.main([*command, '--epochs', '1', '--train-img-sizes', '16']) == 0
    assert 'at most 16 pixels, where evaluation has 32' in capsys.readouterr().err
    other = shutil.copytree(tmp_path / 'run', tmp_path / 'other' / 'run')
    assert compare_runs.main([str(tmp_path / 'run'), str(other), '--out', str(tmp_path / 'curves.png')]) == 0
    said = capsys.readouterr().out
    assert f'{tmp_path / "run"}: top1' in said
    assert f'{other}: top1' in said
