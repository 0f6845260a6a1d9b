#!/usr/bin/env python3
"""Are two networks further apart than their seeds? Paired differences of runs that reproduce.py wrote down.

    python train/compare_seeds.py train/results/nano/table4-nano-runs.jsonl 'resnet18_attn_conv_s2-*' \\
        'resnet18_lossattn_conv_s2-*'

Each pattern chooses the runs of one network, by the name of their folder without its seed. Every measure is shown with
its mean over the seeds that both have and their difference seed by seed, all with 95 % intervals of Student's t: over
seeds, for the images are the same. "less all patches" is what choosing patches adds.
"""
import argparse
import json
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lib.extras import need
from lib.markdown import markdown_table
from lib.script import script

try:
    from scipy.stats import ttest_1samp
except ImportError:
    need('train,compare', 'scipy')
    raise

LEFT_OUT = {'epoch', 'images', 'images_per_second', 'loss'}
ALL_PATCHES = '_all_patches'


def folder_of(run: dict[str, Any]) -> str:
    """Name of a run's folder without its seed."""
    return re.sub(r'-seed\d+', '', re.search(r'--experiment (\S+)', run['commands'][0])[1])  # type: ignore[index]


def measures_of(run: dict[str, Any]) -> dict[str, float]:
    """What was measured of a run, at its end."""
    found = {name: value for name, value in (run.get('validation', {}) | run['last']).items()
             if isinstance(value, (int, float)) and name not in LEFT_OUT}
    return found | {f'{name}, less all patches': value - found[name + ALL_PATCHES]
                    for name, value in found.items() if name + ALL_PATCHES in found}


def runs_of(runs: list[dict[str, Any]], pattern: str) -> dict[int, dict[str, float]]:
    """Measures of one network's runs, by seed.

    Raises:
        ValueError: the pattern is that of no network, or of several.
    """
    there = sorted({*map(folder_of, runs)})
    names = [name for name in there if fnmatch(name, pattern)]
    if len(names) != 1:
        raise ValueError(f'PATTERN: {pattern!r} must choose one of {", ".join(names or there)}')
    return {run['seed']: measures_of(run) for run in runs if folder_of(run) == names[0]}


def mean_over_seeds(values: Sequence[float], form: str) -> str:
    """Mean and 95 % interval, Student's t."""
    if len({*values}) == 1:
        return format(values[0], form)
    low, high = ttest_1samp(values, 0.).confidence_interval(0.95)
    return f'{sum(values) / len(values):{form}} [{low:{form}}, {high:{form}}]'


@script
def main(argv: list[str] | None = None) -> int:
    """Compare; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, metavar='FILE', help='…-runs.jsonl')
    parser.add_argument('patterns', nargs=2, metavar='PATTERN', help='of a folder, as "resnet18_attn_conv-cifar10-*"')
    args = parser.parse_args(argv)
    runs = [json.loads(line) for line in args.file.read_text().splitlines()]
    first, second = (runs_of(runs, pattern) for pattern in args.patterns)
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        raise ValueError(f'PATTERN: both must have two seeds or more that are the same, they have {seeds}')
    rows = []
    for name in first[seeds[0]]:
        if all(name in one[seed] for one in (first, second) for seed in seeds):
            a, b = ([one[seed][name] for seed in seeds] for one in (first, second))
            rows.append([name, mean_over_seeds(a, '.2f'), mean_over_seeds(b, '.2f'),
                         mean_over_seeds([x - y for x, y in zip(a, b)], '+.2f')])
    print('\n'.join(markdown_table([f'{len(seeds)} seeds', *args.patterns, 'difference'], rows)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
