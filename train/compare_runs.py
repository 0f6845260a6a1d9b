#!/usr/bin/env python3
"""Curves of several runs in one picture.

    python train/compare_runs.py output/fast output/sgd --out output/fast_and_sgd.png

Reads each run's result.json; the metric is the one that chose its best checkpoint. Prints the last values.
"""
import argparse
import json
import sys
from pathlib import Path

from lib.plots import draw_runs
from lib.script import script


@script
def main(argv: list[str] | None = None) -> int:
    """Draw; a missing run is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_FOLDER')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE')
    args = parser.parse_args(argv)
    results = {run: json.loads((run / 'result.json').read_text()) for run in args.runs}
    named = {run: run.name if [other.name for other in results].count(run.name) == 1 else str(run) for run in results}
    draw_runs(args.out, {f'{named[run]} (seed {result["seed"]})': result for run, result in results.items()})
    for run, result in results.items():
        epochs, metric = result['epochs'], result['metric']
        print(f'{named[run]}: {metric} {epochs[-1]["eval"][metric]:.2f} after {len(epochs)} epochs, '
              f'{result["seconds"]:.0f} s')
    print(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
