#!/usr/bin/env python3
"""Kill training with SIGKILL at random moments, resume it, and compare with a run that nobody disturbed.

    python tests/kill_and_resume.py --kills 20

Trains a nano model on images made here, on the CPU: once to the end, then --kills times with a kill at a random moment
followed by --resume auto. Model, EMA and optimizer of the last checkpoint must be identical to the bit. Prints a line
for each kill and exits with 1 if any differs.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

TRAIN = Path(__file__).parent.parent / 'train' / 'train.py'
FLAGS = ('--model', 'resnet18_lossattn_conv_nano', '--num-classes', '2', '--val-split', 'val', '--batch-size', '16',
         '--epochs', '4', '--warmup-epochs', '1', '--lr', '0.02', '--device', 'cpu', '--train-img-sizes', '12', '16',
         '--train-size-schedule', 'progressive', '--drop', '0.1', '--drop-path', '0.1', '--model-ema',
         '--model-ema-decay', '0.9', '--sched', 'plateau', '--mixup', '0.2', '--resume', 'auto')


def make_images(root: Path, size: int, train: int, val: int) -> None:
    """Image folder of two classes of train + val images each: a bright block in noise, on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    half, quarter = size // 2, size // 4
    for split, n in (('train', train), ('val', val)):
        for k, name in enumerate(('left', 'right')):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 80, (size, size, 3), generator=generator)
                x[quarter:quarter + half, half * k:half * (k + 1)] += 150
                Image.fromarray(x.byte().numpy()).save(root / split / name / f'{i}.png')


def start(images: Path, out: Path, name: str, extra: list[str]) -> subprocess.Popen:
    """Training in a process group of its own, so that a kill takes its loader workers along."""
    return subprocess.Popen(
        [sys.executable, str(TRAIN), '--data-dir', str(images), '--output', str(out), '--experiment', name, *FLAGS,
         *extra], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'))


def finish(process: subprocess.Popen) -> None:
    """Wait for the end.

    Raises:
        RuntimeError: the training failed.
    """
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])


def state(folder: Path) -> dict:
    """What must not differ."""
    last, best = (torch.load(folder / f'{name}.pth.tar', weights_only=False) for name in ('last', 'model_best'))
    return {key: (last[key], best[key])
            for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'metric') if key in last}


def identical(a, b) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill_and_resume(kills: int, seed: int = 0, extra: tuple[str, ...] = ()) -> list[bool]:
    """For each kill: whether the resumed run ended like the undisturbed one."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        images, out = Path(temporary) / 'images', Path(temporary) / 'out'
        make_images(images, size=16, train=48, val=8)
        begun = time.monotonic()
        finish(start(images, out, 'undisturbed', list(extra)))
        duration = time.monotonic() - begun
        reference = state(out / 'undisturbed')
        results = []
        for i in range(kills):
            name, killed = f'kill{i}', False
            while not killed:  # a run that was over before its kill does not count
                shutil.rmtree(out / name, ignore_errors=True)
                process = start(images, out, name, list(extra))
                moment = draw.uniform(0.3, 1.) * duration  # before that, Python is still importing
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                killed = process.returncode == -signal.SIGKILL
            done = sorted(file.name for file in (out / name).glob('checkpoint-*')) if (out / name).exists() else []
            finish(start(images, out, name, list(extra)))
            results.append(identical(state(out / name), reference))
            print(f'kill {i + 1}: after {moment:.1f} s of {duration:.1f}, exit {process.returncode}, checkpoints '
                  f'{len(done)}: {"identical" if results[-1] else "DIFFERENT"}', flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args, extra = parser.parse_known_args()
    results = kill_and_resume(args.kills, args.seed, tuple(extra))
    print(f'{sum(results)} of {len(results)} identical')
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
