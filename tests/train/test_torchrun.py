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


def torchrun(*command):
    """Two processes on this machine."""
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *map(str, command)],
        capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'lossattn.test_resnet'])
def test_two_processes_train_like_one(tmp_path, name):
    """Same global batches, 20 steps, with frozen batch norm: the gradients of the first, and the weights at the end."""
    script = ROOT / 'tests' / 'ddp_steps.py'
    one, two = tmp_path / 'one.pt', tmp_path / 'two.pt'
    done = [subprocess.run([sys.executable, str(script), str(one), name], capture_output=True, text=True),
            torchrun(script, two, name)]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    one, two = torch.load(one), torch.load(two)
    assert one.keys() == two.keys()
    assert max(float(t.abs().max()) for key, t in one.items() if key.startswith('gradient of ')) > 1e-2
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=lambda m, n=key: f'{n}: {m}')


@pytest.mark.parametrize('cache', [('--model-ema',), ('--cache-dataset', '--dist-bn', 'broadcast'), (
    '--cache-dataset', '--no-patch-loss', '--validation-batch-size', '7', '--checkpoint-minutes', '0', '--batch-size',
    '2')])
def test_torchrun(folder, tmp_path, cache):
    """One writer; metrics of the saved model over all 15 images, of which the last batch has none for rank 1."""
    shutil.copytree(folder, tmp_path / 'data')
    next((tmp_path / 'data' / 'val' / 'left').iterdir()).unlink()
    folder = tmp_path / 'data'
    done = torchrun(Path(train_script.__file__), '--data-dir', folder, *QUICK, '--epochs', '1', '--output', tmp_path,
                    '--experiment', 'x', *cache)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'x' / 'result.json').read_text())
    assert result['hardware'].startswith('2 × ')
    correct = result['last']['top1'] * 15 / 100
    assert correct == pytest.approx(round(correct))
    assert len(list(csv.DictReader((tmp_path / 'x' / 'summary.csv').open()))) == len(result['epochs']) == 1
    assert loss_of_the_best(tmp_path / 'x', folder, tmp_path) == pytest.approx(result['best']['loss'], abs=1e-5)
