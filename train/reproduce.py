#!/usr/bin/env python3
"""Run rows of the paper's tables, or a sweep of Figure 7, and set our numbers beside the paper's.

    python train/reproduce.py --table 2 --rows 'resnet18_*' --columns CIFAR-10 --runs 4 --output output/reproduce
    python train/reproduce.py --sweep xi
    python train/reproduce.py --table 4 --runs 0          # the table of what has been run so far

Each run is train.py in a process of its own, with the paper's recipe for its model (adam for mean pooling and routing,
sgd for the rest) or --recipe; what stands after ``--`` goes to train.py as it is. Runs that are finished are not run
again, one that was interrupted goes on, and tables share runs. Writes <output>/table2.md and table2.png: mean ±
standard deviation over seeds 0, 1, ... of the last epoch's model (no choice of an epoch by test accuracy), and n.
"""
import argparse
import hashlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from lib.plots import panels, save
from lib.script import script
from timm_lossattn.files import replace_file

HERE = Path(__file__).parent
ADAM = ('*_meanpool_*', '*_routing_*')  # the paper trains these with Adam


@dataclass(frozen=True)
class RunOptions:
    """How runs are made: their folder, the recipe if not the paper's, and what goes to train.py as it is."""
    output: str
    recipe: str | None = None
    train_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One model on one dataset with one recipe; runs differ in their seed."""
    model: str
    dataset: str
    recipe: str
    flags: tuple[tuple[str, str], ...] = ()

    def folder(self, seed: int, options: RunOptions) -> Path:
        """The run's; equal jobs of different tables share it, other flags for train.py never do."""
        parts = [self.model, self.dataset, self.recipe, *(f'{k}={v}' for k, v in self.flags), f'seed{seed}']
        if options.train_flags:
            parts.append(hashlib.sha256(shlex.join(options.train_flags).encode()).hexdigest()[:8])
        return Path(options.output) / re.sub(r'[^\w.=-]+', '_', '-'.join(parts))


@dataclass
class Cell:
    """One number of a table."""
    job: Job
    measure: str
    paper: float | None
    values: list[float] = field(default_factory=list)

    def text(self) -> str:
        """For Markdown."""
        if not self.values:
            ours = 'not run'
        elif len(self.values) == 1:
            ours = f'{self.values[0]:.2f} (n = 1)'
        else:
            ours = f'{statistics.mean(self.values):.2f} ± {statistics.stdev(self.values):.2f} (n = {len(self.values)})'
        return ours if self.paper is None else f'{ours} / {self.paper:.2f}'


def recipe_of(model: str, chosen: str | None) -> str:
    """The recipe asked for, or the paper's for this model."""
    return chosen or ('adam' if any(fnmatch(model, pattern) for pattern in ADAM) else 'sgd')


def table_cells(table: dict[str, Any], options: RunOptions) -> dict[str, dict[str, Cell | None]]:
    """Row -> column -> cell; None where the paper's row has no number."""
    cells: dict[str, dict[str, Cell | None]] = {}
    for name, row in table['rows'].items():
        cells[name] = {}
        numbers = row['paper'] or [None] * len(table['columns'])
        for (column, spec), paper in zip(table['columns'].items(), numbers):
            job = Job(row['model'] + spec.get('model_suffix', ''), spec['dataset'],
                      row.get('recipe') or recipe_of(row['model'], options.recipe),
                      tuple((k, str(v)) for k, v in row.get('flags', {}).items()))
            cells[name][column] = None if row['paper'] and paper is None else Cell(job, spec['measure'], paper)
    return cells


def sweep_cells(sweep: dict[str, Any], options: RunOptions) -> dict[str, dict[str, Cell | None]]:
    """Row for each value of the sweep."""
    flags = tuple((k, str(v)) for k, v in sweep['fixed'].items())
    return {str(value): {sweep['measure']: Cell(
        Job(sweep['model'], sweep['dataset'], recipe_of(sweep['model'], options.recipe),
            (*flags, (sweep['flag'], str(value)))), sweep['measure'], None)} for value in sweep['values']}


def run_script(script: str, flags: list[str]) -> None:
    """Run a script of this folder.

    Raises:
        ValueError: it failed.
    """
    command = [sys.executable, str(HERE / script), *flags]
    print('$ ' + shlex.join(command[1:]), flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise ValueError(f'{script} ended with exit code {code}; its message stands above')


def train(job: Job, seed: int, options: RunOptions) -> None:
    """Train unless the run is finished; go on where it was interrupted."""
    folder = job.folder(seed, options)
    if (folder / 'hub').is_dir():
        return
    flags = [f for name, value in job.flags for f in (f'--{name.replace("_", "-")}', value)]
    run_script('train.py', [
        '--recipe', f'{job.recipe}/{job.dataset}', '--model', job.model, '--seed', str(seed), '--output',
        options.output, '--experiment', folder.name, '--resume', 'auto', *flags, *options.train_flags])


def measure(job: Job, seed: int, name: str, options: RunOptions) -> float | None:
    """A measure of a finished run: from its result.json, or else from validate.py; None if the run is not finished."""
    folder = job.folder(seed, options)
    if not (folder / 'hub').is_dir():
        return None
    result = json.loads((folder / 'result.json').read_text())
    if name in result['last']:
        return result['last'][name]
    file = folder / 'validation.json'
    if not file.is_file():
        a, config = result['args'], result['data_config']
        flags = ['--model', job.model, '--checkpoint', str(folder / 'last.pth.tar'), '--results-file', str(file)]
        for flag in ('dataset', 'data_dir', 'val_split', 'input_key', 'target_key', 'num_classes', 'xi', 'workers'):
            if a[flag] is not None:
                flags += [f'--{flag.replace("_", "-")}', str(a[flag])]
        for flag in ('input_size', 'mean', 'std'):
            flags += [f'--{flag.replace("_", "-")}', *map(str, config[flag])]
        run_script('validate.py', [*flags, *(['--multi-label'] if a['multi_label'] else [])])
    return json.loads(file.read_text()).get(name)


def markdown(title: str, cells: dict[str, dict[str, Cell | None]], argv: list[str]) -> str:
    """The table: ours / paper in every cell."""
    columns = list(next(iter(cells.values())))
    lines = [f'# {title}', '', "Each cell: ours, mean ± standard deviation (n runs) / the paper's number; percent.", '',
             f'`{shlex.join(["python", "train/reproduce.py", *argv])}`', '',
             '| | ' + ' | '.join(columns) + ' |', '|---|' + '---|' * len(columns)]
    lines += [f'| {name} | ' + ' | '.join('–' if cell is None else cell.text() for cell in row.values()) + ' |'
              for name, row in cells.items()]
    return '\n'.join(lines) + '\n'


def draw(title: str, cells: dict[str, dict[str, Cell | None]], file: Path, sweep: str | None) -> None:
    """Ours beside the paper's, a panel for each column; a sweep as a curve over its values."""
    columns = list(next(iter(cells.values())))
    rows = list(cells)
    height = 3.5 if sweep else 1.6 + 0.3 * len(rows)
    figure, (row_of_axes,) = panels(
        1, len(columns), 5 if sweep else 3 + 2.6 * len(columns), height, sharey=not sweep)
    for axes, column in zip(row_of_axes, columns):
        shown = [(i, cells[row][column]) for i, row in enumerate(rows)]
        ours = [(i, cell) for i, cell in shown if cell is not None and cell.values]
        mean = [statistics.mean(cell.values) for _, cell in ours]
        error = [statistics.stdev(cell.values) if len(cell.values) > 1 else 0. for _, cell in ours]
        if sweep:
            axes.errorbar([i for i, _ in ours], mean, yerr=error, marker='o', color='#0072B2', capsize=3)
            axes.set_xticks(range(len(rows)), rows)
            axes.set(xlabel=sweep, ylabel=f'{column} (%)')
        else:
            paper = [(i, cell.paper) for i, cell in shown if cell is not None and cell.paper is not None]
            if paper:
                axes.plot([p for _, p in paper], [i for i, _ in paper], 'D', mfc='none', color='#D55E00', label='paper')
            axes.errorbar(mean, [i for i, _ in ours], xerr=error, fmt='o', color='#0072B2', capsize=3, label='ours')
            axes.set_yticks(range(len(rows)), rows)
            axes.set(xlabel=f'{column} (%)', ylim=(len(rows) - 0.5, -0.5))
        axes.grid(alpha=0.3)
    if not sweep:
        handles, labels = row_of_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
    figure.suptitle(title)
    save(figure, file, dpi=120)


@script
def main(argv: list[str] | None = None) -> int:
    """Reproduce; errors are one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    own, train_flags = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
    known = yaml.safe_load((HERE / 'paper_tables.yaml').read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--table', choices=[str(number) for number in known['tables']])
    what.add_argument('--sweep', choices=sorted(known['sweeps']), help='of Figure 7')
    parser.add_argument('--rows', nargs='+', default=['*'], metavar='PATTERN', help='rows to run (default: all)')
    parser.add_argument('--columns', nargs='+', default=['*'], metavar='PATTERN', help='columns to run (default: all)')
    parser.add_argument('--runs', type=int, default=4, metavar='N', help='seeds 0 to N − 1 (default: 4, as the paper)')
    parser.add_argument('--recipe', choices=('sgd', 'adam', 'fast'),
                        help="default: the paper's for each model (Table 1 is about recipes and keeps its own)")
    parser.add_argument('--output', default='output/reproduce', metavar='DIR')
    args = parser.parse_args(own)
    options = RunOptions(args.output, args.recipe, tuple(train_flags))
    if args.table:
        table = {str(number): table for number, table in known['tables'].items()}[args.table]
        title, name = f'Table {args.table}: {table["title"]}', f'table{args.table}'
        cells = table_cells(table, options)
    else:
        sweep = known['sweeps'][args.sweep]
        title, name = f'Figure 7: {args.sweep} with {sweep["model"]} on {sweep["dataset"]}', f'figure7_{args.sweep}'
        cells = sweep_cells(sweep, options)

    def chosen(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    wanted = [cell.job for row, columns in cells.items() if chosen(row, args.rows)
              for column, cell in columns.items() if cell is not None and chosen(column, args.columns)]
    if not wanted:
        raise ValueError(f'no cell matches --rows {args.rows} and --columns {args.columns}')
    failure: ValueError | None = None
    for seed in range(args.runs):
        for job in dict.fromkeys(wanted):
            try:
                train(job, seed, options)
            except ValueError as error:  # the other rows are run, and what has been run is shown, all the same
                failure = failure or error
    try:
        for columns in cells.values():
            for cell in columns.values():
                if cell is not None:
                    found = [measure(cell.job, seed, cell.measure, options) for seed in range(max(args.runs, 4))]
                    cell.values = [value for value in found if value is not None]
    except ValueError as error:
        failure = failure or error
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(title, cells, argv)
    replace_file(out / f'{name}.md', text.encode())
    draw(title, cells, out / f'{name}.png', args.sweep)
    print(f'{text}\n{out / name}.md, .png')
    if failure is not None:
        raise failure
    return 0


if __name__ == '__main__':
    sys.exit(main())
