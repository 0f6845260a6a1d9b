"""Training in two processes: the steps of one, one writer, and metrics over all images."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import QUICK, ROOT, loss_of_the_best

import train as train_script

MODELS = ('resnet18_lossattn_conv_nano', 'lossattn.test_resnet')


def torchrun(*command):
    """Two processes on this machine."""
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *map(str, command)],
        capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    """Folders with what tests/ddp_steps.py saves, of one process and of two."""
    script, root = ROOT / 'tests' / 'ddp_steps.py', tmp_path_factory.mktemp('steps')
    folders = root / 'one', root / 'two'
    for folder in folders:
        folder.mkdir()
    done = [subprocess.run([sys.executable, str(script), str(folders[0]), *MODELS], capture_output=True, text=True),
            torchrun(script, folders[1], *MODELS)]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    return folders


@pytest.mark.parametrize('name', MODELS)
def test_two_processes_train_like_one(steps, name):
    """Same global batches, 20 steps, with frozen batch norm: the gradients of the first, and the weights at the end."""
    one, two = (torch.load(folder / f'{name}.pt') for folder in steps)
    assert one.keys() == two.keys()
    assert max(float(t.abs().max()) for key, t in one.items() if key.startswith('gradient of ')) > 1e-2
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=lambda m, n=key: f'{n}: {m}')


@pytest.mark.parametrize('flags', [('--model-ema', '--dist-bn', 'broadcast'), (
    '--cache-dataset', '--no-patch-loss', '--validation-batch-size', '7', '--checkpoint-minutes', '0', '--batch-size',
    '2')])
def test_torchrun(folder, tmp_path, flags):
    """One writer; metrics of the saved model over all 15 images, of which the last batch has none for rank 1."""
    shutil.copytree(folder, tmp_path / 'data')
    next((tmp_path / 'data' / 'val' / 'left').iterdir()).unlink()
    folder = tmp_path / 'data'
    done = torchrun(Path(train_script.__file__), '--data-dir', folder, *QUICK, '--epochs', '1', '--output', tmp_path,
                    '--experiment', 'x', *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'x' / 'result.json').read_text())
    assert result['hardware'].startswith('2 × ')
    correct = result['last']['top1'] * 15 / 100
    assert correct == pytest.approx(round(correct))
    assert len(list(csv.DictReader((tmp_path / 'x' / 'summary.csv').open()))) == len(result['epochs']) == 1
    assert loss_of_the_best(tmp_path / 'x', folder, tmp_path) == pytest.approx(result['best']['loss'], abs=1e-5)
