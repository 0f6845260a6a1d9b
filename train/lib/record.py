"""What a run leaves behind besides checkpoints: summary.csv, the hub folder, trackers; and who measured what where."""
import contextlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.models import save_for_hf

import timm_lossattn
from timm_lossattn.files import write_csv
from timm_lossattn.loading import load_model, read_checkpoint

from .options import RunOptions

__all__ = ['command_line', 'environment', 'print_table', 'save_hub_folder', 'trackers', 'write_summary']

ROOT = Path(__file__).resolve().parents[2]


def write_summary(path: Path, epochs: list[dict[str, Any]]) -> None:
    """timm's summary.csv, a line per epoch, written anew each time: a kill leaves the old one or the new one."""
    write_csv(path, [
        {'epoch': entry['epoch'], **numbers(entry, '_'), 'lr': entry['lr']} for entry in epochs])


def numbers(entry: dict[str, Any], separator: str) -> dict[str, float]:
    """The measures of an epoch under one name each."""
    return {f'{part}{separator}{name}': value for part in ('train', 'eval') for name, value in entry[part].items()}


@contextlib.contextmanager
def trackers(options: RunOptions, folder: Path, config: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What sends an epoch to TensorBoard, trackio and wandb, those that the flags ask for."""
    with contextlib.ExitStack() as stack:
        modules = []
        for name in ('trackio', 'wandb'):  # the same interface
            if getattr(options, f'log_{name}'):
                modules.append(importlib.import_module(name))
                modules[-1].init(project='timm_lossattn', name=folder.name, config=config)
                stack.callback(modules[-1].finish)
        writer: Any = None
        if options.log_tensorboard:
            writer = importlib.import_module('torch.utils.tensorboard').SummaryWriter(str(folder))
            stack.callback(writer.close)

        def log(entry: dict[str, Any]) -> None:
            values = {**numbers(entry, '/'), 'lr': entry['lr']}
            for module in modules:
                module.log(values, step=entry['epoch'])
            for name, value in values.items() if writer is not None else ():
                writer.add_scalar(name, value, entry['epoch'])
        yield log


def command_line(argv: list[str] | None) -> str:
    """The command that runs now, torchrun included, with the script's path from the root of the repository.

    Args:
        argv: what the script's main was called with; None for the process's own arguments.
    """
    if argv is not None:
        return shlex.join(['python', *argv])
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(sys.argv[0])
    world, local = (os.environ.get(variable, '1') for variable in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
    launcher = ['python']
    if int(world) > 1 and 'TORCHELASTIC_RUN_ID' in os.environ:  # others, as mpirun, leave no trace of their command
        nodes = [] if world == local else ['--nnodes', str(int(world) // int(local))]
        launcher = ['torchrun', *nodes, '--nproc-per-node', local]
    return shlex.join([*launcher, str(name), *sys.argv[1:]])


def environment(device: torch.device | str = 'cpu', world_size: int = 1) -> dict[str, Any]:
    """Commit, versions and hardware, for what is written as JSON."""
    device = torch.device(device)
    hardware = torch.cuda.get_device_name(device) if device.type == 'cuda' else \
        f'{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads'
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
            ['git', '-C', str(ROOT), *command], capture_output=True, text=True, check=True).stdout
    try:
        return git('rev-parse', 'HEAD').strip() + ('+' if git('status', '--porcelain', '-uno').strip() else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def print_table(title: str, values: Mapping[str, Any]) -> None:
    """Numbers, a line for each."""
    table = Table(title=title, title_justify='left')
    table.add_column('measure')
    table.add_column('value', justify='right')
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(name, f'{value:,}' if isinstance(value, int) else f'{value:,.4f}')
    Console().print(table)


def save_hub_folder(folder: Path, checkpoint: Path) -> None:
    """The run's best weights (EMA if there is one) as timm stores models on the Hub: safetensors and config.json.

    ``timm.create_model('local-dir:<folder>', pretrained=True)`` loads it with the arguments, labels and preprocessing
    that it was trained with, whatever a command that goes on says.

    Args:
        folder: written anew.
        checkpoint: model_best.pth.tar.
    """
    _, trained = read_checkpoint(checkpoint)
    model, labels = load_model(checkpoint=checkpoint), trained['label_names']
    args = {key: value for key, value in trained['model_args'].items() if key not in ('num_classes', 'in_chans')}
    temporary = folder.with_name('hub.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    save_for_hf(
        model, str(temporary), model_config={'label_names': labels} if labels else None, model_args=args,
        safe_serialization=True, data_config=trained['data_config'])
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
