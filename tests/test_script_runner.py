"""``timm-lossattn run``: a script of timm's with our models and our task."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_lossattn.cli import main

SCRIPT = '''
import json, sys
import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

name, *kwargs, out = sys.argv[1:]
model = timm.create_model(name, num_classes=3, **dict(text.split('=') for text in kwargs))
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(label_smoothing=0.1), device=torch.device('cpu'))
optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
create_scheduler_v2(optimizer, num_epochs=10, updates_per_epoch=5)
first = getattr(task, 'gamma', None)
task.update_ema(step=10)
result = task(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))
json.dump({'task': type(task).__name__, 'terms': sorted(result), 'gamma': result.get('gamma'), 'first': first,
           'smoothing': getattr(getattr(task, 'loss', None), 'smoothing', None)}, open(out, 'w'))
'''


@pytest.mark.parametrize(('name', 'flags', 'task', 'gamma'), [
    ('resnet18_lossattn_conv_nano', (), 'LossAttentionTask', 0.1 * 2.718281828 ** (-5 * (1 - 2 / 4) ** 2)),
    ('resnet18_lossattn_caps_nano', ('--gamma-max', '0.3', '--rampup-epochs', '2'), 'LossAttentionTask', 0.3),
    ('resnet18_cifar', (), 'ClassificationTask', None),
    ('lossattn.test_efficientnet', ('--gamma-max', '0.3', '--rampup-epochs', '2'), 'LossAttentionTask', 0.3),
    ('lossattn backbone=test_convnext', (), 'LossAttentionTask', 0.1 * 2.718281828 ** (-5 * (1 - 2 / 4) ** 2)),
    ('lossattn backbone=test_convnext pool=avg', (), 'ClassificationTask', None),
])
def test_task_is_chosen_by_the_model(tmp_path, name, flags, task, gamma):
    """Loss-attention models get our task with the script's criterion, epoch 2 of the ramp; others keep theirs."""
    script, out = tmp_path / 'script.py', tmp_path / 'out.json'
    script.write_text(SCRIPT)
    before = sys.argv
    assert main(['run', *flags, str(script), *name.split(), str(out)]) == 0
    assert sys.argv is before
    result = json.loads(out.read_text())
    assert result['task'] == task
    assert result['gamma'] == (None if gamma is None else pytest.approx(gamma))
    assert result['first'] == (None if gamma is None else 0.)  # γ(0), from the first update on
    assert result['smoothing'] == (0.1 if gamma is not None else None)
    import timm.task
    assert timm.task.ClassificationTask.__name__ == 'ClassificationTask'  # put back


def test_errors(tmp_path, capsys):
    """A missing script is one line; what a script raises is the script's."""
    with pytest.raises(SystemExit) as error:
        main(['run', 'no_such_script.py'])
    assert error.value.code == 2
    assert 'no such file: no_such_script.py' in capsys.readouterr().err
    script = tmp_path / 'script.py'
    script.write_text('raise ValueError("mine")')
    with pytest.raises(ValueError, match='mine'):
        main(['run', str(script)])


@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason='TIMM_REPO is not set: no checkout of timm with its scripts')
@pytest.mark.parametrize('model', [
    ('--model', 'resnet18_lossattn_conv_nano'),
    ('--model', 'lossattn', '--model-kwargs', 'backbone=test_efficientnet')], ids=['paper', 'any'])
def test_real_scripts(model, folder, tmp_path):
    """train.py logs the patch term's weight in its loss; validate.py reads the checkpoint."""
    repo = Path(os.environ['TIMM_REPO'])
    base = [sys.executable, '-m', 'timm_lossattn.cli', 'run']
    common = ['--data-dir', str(folder), '--num-classes', '2', '--batch-size', '8', '--workers', '0', '--device', 'cpu',
              *model]
    done = subprocess.run(
        [*base, '--gamma-max', '0.2', str(repo / 'train.py'), *common, '--val-split', 'val', '--epochs', '1',
         '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'x'],
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(tmp_path / 'x' / 'last.pth.tar', weights_only=False)
    assert checkpoint['task_state'] == {'epoch': 1.}  # our task's; timm's ClassificationTask has no state
    done = subprocess.run(
        [*base, str(repo / 'validate.py'), *common, '--split', 'val', '--checkpoint',
         str(tmp_path / 'x' / 'last.pth.tar')], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"top1"' in done.stdout
