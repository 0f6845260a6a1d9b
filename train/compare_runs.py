#!/usr/bin/env python3
"""Curves of several runs in one picture.

    python train/compare_runs.py output/fast output/sgd --out output/fast_and_sgd.png

Reads each run's result.json; the metric is the one that chose its best checkpoint. Prints the last values.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')  # Okabe & Ito


def main(argv: list[str] | None = None) -> int:
    """Draw; a missing run is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_FOLDER')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE')
    args = parser.parse_args(argv)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
    for i, run in enumerate(args.runs):
        try:
            result = json.loads((run / 'result.json').read_text())
        except OSError as error:
            print(f'error: RUN_FOLDER: {error}', file=sys.stderr)
            return 2
        epochs, metric = result['epochs'], result['metric']
        x = [entry['epoch'] + 1 for entry in epochs]
        style = dict(color=COLORS[i % len(COLORS)], marker='o', ms=4, label=f'{run.name} (seed {result["seed"]})')
        axes[0].plot(x, [entry['eval'][metric] for entry in epochs], **style)
        axes[1].plot(x, [entry['train'].get('image_loss', entry['train']['loss']) for entry in epochs], **style)
        print(f'{run.name}: {metric} {epochs[-1]["eval"][metric]:.2f} after {len(epochs)} epochs, '
              f'{result["seconds"]:.0f} s')
    axes[0].set(xlabel='epoch', ylabel=f'eval {metric} (%)')
    axes[1].set(xlabel='epoch', ylabel='train image loss (with its label smoothing)')
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110, format='png')
    print(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
