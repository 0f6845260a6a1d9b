"""What a run leaves behind besides checkpoints: result.json, summary.csv, curves.png, trackers, the hub folder."""
import csv
import importlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict, save_for_hf

import timm_lossattn
from checkpoint import load_checkpoint

__all__ = ['Trackers', 'command_line', 'environment', 'save_hub_folder', 'write_curves', 'write_json', 'write_summary']

_logger = logging.getLogger('train')


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary file, then rename."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(temporary, path)


def write_summary(path: Path, epochs: list[dict[str, Any]]) -> None:
    """timm's summary.csv, a line per epoch, written anew each time: a kill leaves the old one or the new one."""
    rows = [{'epoch': entry['epoch']}
            | {f'train_{name}': value for name, value in entry['train'].items()}
            | {f'eval_{name}': value for name, value in entry['eval'].items()}
            | {'lr': entry['lr']} for entry in epochs]
    temporary = path.with_suffix('.tmp')
    with temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def write_curves(path: Path, epochs: list[dict[str, Any]], metric: str) -> None:
    """Picture of the loss terms and of the metric by epoch, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator
    x = [entry['epoch'] + 1 for entry in epochs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    marker = 'o' if len(x) < 40 else ''
    for name in ('loss', 'image_loss', 'patch_loss'):
        if name in epochs[0]['train']:
            left.plot(x, [entry['train'][name] for entry in epochs], marker=marker, ms=3, label=f'train {name}')
    left.plot(x, [entry['eval']['loss'] for entry in epochs], marker=marker, ms=3, label='eval loss')
    left.set(xlabel='epoch', ylabel='loss')
    left.legend(frameon=False)
    values = [entry['eval'][metric] for entry in epochs]
    right.plot(x, values, marker=marker, ms=3, color='C3')
    best = (min if metric == 'loss' else max)(range(len(x)), key=values.__getitem__)
    unit = '' if metric == 'loss' else ' %'
    right.set(xlabel='epoch', ylabel=f'eval {metric}{unit}', title=f'best: {values[best]:.2f}{unit} in epoch {x[best]}')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    temporary = path.with_suffix('.tmp')
    figure.savefig(temporary, dpi=120, format='png')
    plt.close(figure)
    os.replace(temporary, path)


def command_line(argv: list[str] | None) -> str:
    """The command that runs now, with the script's path from the root of the repository.

    Args:
        argv: what the script's main was called with; None for the process's own arguments.
    """
    if argv is not None:
        return shlex.join(['python', *argv])
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).parents[1].resolve()
    name = script.relative_to(root) if script.is_relative_to(root) else Path(sys.argv[0])
    return shlex.join(['python', str(name), *sys.argv[1:]])


def environment(device_type: str, world_size: int) -> dict[str, Any]:
    """Commit, versions and hardware, for result.json."""
    hardware = torch.cuda.get_device_name() if device_type == 'cuda' else \
        f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    return {
        'commit': git_commit(),
        'versions': {
            'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
            'timm_lossattn': timm_lossattn.__version__},
        'hardware': f'{world_size} × {hardware}' if world_size > 1 else hardware,
    }


def git_commit() -> str | None:
    """Commit of the checkout that this file belongs to, with '+' if files differ from it; None outside a checkout."""
    def git(*command: str) -> str:
        return subprocess.run(
            ['git', '-C', str(Path(__file__).parent), *command], capture_output=True, text=True, check=True).stdout
    try:
        return git('rev-parse', 'HEAD').strip() + ('+' if git('status', '--porcelain', '-uno').strip() else '')
    except (OSError, subprocess.CalledProcessError):
        return None


class Trackers:
    """TensorBoard, trackio and wandb, those that the flags ask for.

    Args:
        args: ``log_tensorboard``, ``log_trackio``, ``log_wandb``.
        output: folder of the run.
    """

    def __init__(self, args, output: Path) -> None:
        self.modules, self.writer = [], None
        for name in ('trackio', 'wandb'):  # the same interface
            if getattr(args, f'log_{name}'):
                self.modules.append(importlib.import_module(name))
                self.modules[-1].init(project='timm_lossattn', name=output.name, config=vars(args))
        if args.log_tensorboard:
            self.writer = importlib.import_module('torch.utils.tensorboard').SummaryWriter(str(output))

    def log(self, entry: dict[str, Any]) -> None:
        """Send one epoch's numbers."""
        numbers = {f'train/{k}': v for k, v in entry['train'].items()} | {
            f'eval/{k}': v for k, v in entry['eval'].items()} | {'lr': entry['lr']}
        for module in self.modules:
            module.log(numbers, step=entry['epoch'])
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, entry['epoch'])

    def close(self) -> None:
        """Flush."""
        for module in self.modules:
            module.finish()
        if self.writer is not None:
            self.writer.close()


def save_hub_folder(
        folder: Path, model: torch.nn.Module, checkpoint: Path, data_config: dict[str, Any],
        labels: list[str] | None) -> None:
    """The run's best weights (EMA if there is one) as timm stores models on the Hub: safetensors and config.json.

    ``timm.create_model('local-dir:<folder>', pretrained=True)`` loads it with the labels and preprocessing of the run.

    Args:
        folder: written anew.
        model: any model of the run; its weights are replaced.
        checkpoint: model_best.pth.tar.
        data_config: resolved by timm.
        labels: class names.
    """
    state = load_checkpoint(checkpoint)
    model.load_state_dict(clean_state_dict(state.get('state_dict_ema') or state['state_dict']))
    temporary = folder.with_name('hub.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(memory_format=torch.contiguous_format)  # safetensors stores no strides
    save_for_hf(
        model, str(temporary), model_config={'label_names': labels} if labels else None, safe_serialization=True,
        data_config=data_config)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
