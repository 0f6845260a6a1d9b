#!/usr/bin/env python3
"""Run rows of the paper's tables, or one of its figures, and set our numbers beside the paper's.

    python train/reproduce.py --table 2 --rows 'resnet18_*' --columns CIFAR-10 --runs 4 --output output/reproduce
    python train/reproduce.py --figure 7 --runs 1
    python train/reproduce.py --table 4 --runs 0          # the table of what has been run so far
    python train/reproduce.py --table 2 --nano --runs 3 --columns CIFAR-10 -- --epochs 8    # at an eighth of the widths

Each run is train.py in a process of its own, with the paper's recipe for its model (adam for mean pooling and routing,
sgd for the rest) or --recipe; what stands after ``--`` goes to train.py as it is. Runs that are finished are not run
again, one that was interrupted goes on, and tables and figures share runs. Writes <output>/table2.md and table2.png:
mean ± standard deviation over seeds 0, 1, ... of the last epoch's model (no choice of an epoch by test accuracy), and
n; for accuracies and mAP beside it that of the epoch with the best test accuracy; table2-runs.jsonl has every run by
itself, with its command. A figure of images (4, 5, 6) is drawn by figures.py from the run of seed 0.
"""
import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import timm
import yaml

import timm_lossattn  # noqa: F401  (registers the models)
from lib.command import recipe_names
from lib.markdown import markdown_table
from lib.paper import BASELINES, NANO, Cell, Cells, Job, RunOptions, all_cells, pictures, sweep_cells, table_cells
from lib.paper_report import draw_sweeps, draw_table, header, markdown
from lib.script import script
from timm_lossattn.files import replace_file

HERE = Path(__file__).parent
CHECKPOINTS = {'last': 'last.pth.tar', 'best': 'model_best.pth.tar'}
CELLS = ('Each cell: ours, mean ± standard deviation (n runs){}; percent where the column names no unit. Ours '
         'is the last epoch')
LEGEND = CELLS.format(" / the paper's number") + '; the paper does not say which epoch its numbers are of.'
NANO_LEGEND = CELLS.format('') + (
    '. All models at an eighth of their widths, Tiny ImageNet with ten of its classes: not the networks of the paper, '
    'whose numbers are left out.')
BASELINE_NOTE = (
    'Beside localisation and patches stands what takes no choice, of which the paper has no number: a box around all '
    'patches, the same for every image; the centred square whose size is best on the other half of the images; all '
    "patches instead of the selected ones, with the model's own classes; and the share of all patches that lie in the "
    'object, the precision of a choice that knows neither image nor class.')


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


def is_finished(run: Path) -> bool:
    """Whether train.py has written what it writes last: the model."""
    return (run / 'hub').is_dir()


def train(job: Job, seed: int, options: RunOptions) -> None:
    """Train unless the run is finished; go on where it was interrupted."""
    folder = job.folder(seed, options)
    if is_finished(folder):
        return
    flags = [f for name, value in job.flags for f in (f'--{name.replace("_", "-")}', value)]
    run_script('train.py', [
        '--recipe', f'{job.recipe}/{job.dataset}', '--model', job.model, '--seed', str(seed), '--output',
        options.output, '--experiment', folder.name, '--resume', 'auto', *flags, *options.train_flags])


def data_flags(folder: Path) -> list[str]:
    """Flags of a run's validation data, for validate.py and figures.py."""
    result = json.loads((folder / 'result.json').read_text())
    a, config = result['args'], result['data_config']
    flags: list[str] = []
    for flag in ('dataset', 'data_dir', 'val_split', 'input_key', 'target_key', 'num_classes', 'xi', 'workers'):
        if a[flag] is not None:
            flags += [f'--{flag.replace("_", "-")}', str(a[flag])]
    for flag in ('input_size', 'mean', 'std'):
        flags += [f'--{flag.replace("_", "-")}', *map(str, config[flag])]
    return [*flags, *(['--multi-label'] if a['multi_label'] else [])]


def lacks_baselines(validated: dict[str, Any]) -> bool:
    """Whether they are older than what stands beside them today."""
    return any(baseline not in validated for name in validated for baseline in BASELINES.get(name, {}).values())


def measure(job: Job, seed: int, name: str, options: RunOptions, epoch: str = 'last') -> float | None:
    """A measure of a finished run: from its result.json, or else from validate.py; None if the run is not finished.

    Args:
        job: what was run.
        seed: of the run.
        name: of the measure; 'epoch_seconds' is the median over epochs of training and evaluation.
        options: of the run.
        epoch: 'last', or 'best' for the one with the best test accuracy.
    """
    folder = job.folder(seed, options)
    if not is_finished(folder):
        return None
    result = json.loads((folder / 'result.json').read_text())
    if name == 'epoch_seconds':
        return statistics.median(entry['seconds'] for entry in result['epochs'])
    if name in result[epoch]:
        return result[epoch][name]
    file = folder / ('validation.json' if epoch == 'last' else f'validation_{epoch}.json')
    if not file.is_file() or lacks_baselines(json.loads(file.read_text())):
        run_script('validate.py', ['--model', job.model, '--checkpoint', str(folder / CHECKPOINTS[epoch]),
                                   '--results-file', str(file), *data_flags(folder)])
    return json.loads(file.read_text()).get(name)


def parameters(model: str, options: RunOptions) -> float:
    """Millions of parameters, with ten classes as in the paper's Table 2."""
    created = timm.create_model(model, num_classes=10, width_mult=NANO if options.nano else 1., device='meta')
    return sum(p.numel() for p in created.parameters()) / 1e6


def chosen(name: str, patterns: list[str]) -> bool:
    """Whether one of the patterns fits."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def notes(entry: dict[str, Any], options: RunOptions) -> list[str]:
    """How a table or a figure is to be read."""
    measures = [*entry.get('measures', {}).values(), *(spec['measure'] for spec in entry.get('columns', {}).values())]
    return [NANO_LEGEND if options.nano else LEGEND, *([BASELINE_NOTE] if set(measures) & set(BASELINES) else []),
            *([entry['note']] if 'note' in entry else [])]


def first_error(calls: Iterable[Callable[[], Any]]) -> ValueError | None:
    """Make all calls; the first error, if there is one: the rest is run, and shown, all the same."""
    failure = None
    for call in calls:
        try:
            call()
        except ValueError as error:
            failure = failure or error
    return failure


def seeds(job: Job, runs: int, options: RunOptions) -> range:
    """Those that may be finished: all that are asked for, and those of other calls, one after the other."""
    count = max(runs, 4)
    while is_finished(job.folder(count, options)):
        count += 1
    return range(count)


def fill(cells: Iterable[Cells], runs: int, options: RunOptions) -> ValueError | None:
    """Take the numbers of all runs that are finished; the first error."""
    def take(cell: Cell, seed: int, epoch: str) -> None:
        value = measure(cell.job, seed, cell.measure, options, epoch)  # type: ignore[arg-type]  # of those with a job
        if value is not None:
            (cell.values if epoch == 'last' else cell.best).append(value)

    return first_error(
        partial(take, cell, seed, epoch) for some in cells for cell in all_cells(some) if cell.job is not None
        for epoch in ('last', 'best')[:1 + bool(cell.chosen)] for seed in seeds(cell.job, runs, options))


def finished(cells: Iterable[Cells], runs: int, options: RunOptions) -> list[dict[str, Any]]:
    """What is on record of each finished run behind some cells: command, seconds, machine and measures."""
    records = []
    jobs = dict.fromkeys(cell.job for some in cells for cell in all_cells(some) if cell.job is not None)
    for folder in [job.folder(seed, options) for job in jobs for seed in seeds(job, runs, options)]:
        if is_finished(folder):
            result = json.loads((folder / 'result.json').read_text())
            record = {key: value for key, value in result.items() if key not in ('args', 'epochs', 'data_config')}
            validated = folder / 'validation.json'
            records.append(record | ({'validation': json.loads(validated.read_text())} if validated.is_file() else {}))
    return records


def spent(records: list[dict[str, Any]], folder: Path) -> str:
    """What runs took together, in words."""
    if not records:
        return f'\nNo finished run lies in {folder}.\n'
    machines = ' and '.join(sorted({record['hardware'] for record in records}))
    hours = sum(record['seconds'] for record in records) / 3600
    return f'\nRuns: {len(records)}, {hours:.1f} hours in all ({machines}).\n'


def write(file: Path, text: str, records: list[dict[str, Any]], draw: Callable[[Path], Any]) -> None:
    """A table or figure, its picture, and a line for each run. Without any run, what stands there is kept."""
    if not records and file.with_suffix('.md').is_file():
        print(f'{file.with_suffix(".md")} stays as it was.', file=sys.stderr)
        return
    draw(file.with_suffix('.png'))
    if records:
        replace_file(file.with_name(f'{file.name}-runs.jsonl'),
                     ''.join(f'{json.dumps(record, ensure_ascii=False)}\n' for record in records).encode())
    replace_file(file.with_suffix('.md'), text.encode())


def run_jobs(jobs: Iterable[Job], runs: int, options: RunOptions) -> ValueError | None:
    """Train what is not finished, seed by seed; the first error."""
    wanted = list(dict.fromkeys(jobs))
    if not wanted:
        raise ValueError('--rows and --columns: no cell matches')
    return first_error(partial(train, job, seed, options) for seed in range(runs) for job in wanted)


def reproduce_table(
        title: str, table: dict[str, Any], args: argparse.Namespace, options: RunOptions, file: Path,
        argv: list[str]) -> tuple[str, ValueError | None]:
    """Run, fill and draw a table; its text and the first error."""
    cells = table_cells(table, options)
    failure = run_jobs((cell.job for row, columns in cells.items() if chosen(row, args.rows)
                        for column, cell in columns.items()
                        if cell is not None and cell.job is not None and chosen(column, args.columns)),
                       args.runs, options)
    for row, columns in cells.items():
        for cell in columns.values():
            if cell is not None and cell.measure == 'parameters' and 'model' in table['rows'][row]:
                cell.values = [parameters(table['rows'][row]['model'], options)]
    unread = fill([cells], args.runs, options)
    records = finished([cells], args.runs, options)
    text = header(title, argv, *notes(table, options)) + markdown(cells) + spent(records, file.parent)
    write(file, text, records, partial(draw_table, title, cells))
    return text, failure or unread


def reproduce_sweeps(
        title: str, figure: dict[str, Any], args: argparse.Namespace, options: RunOptions, file: Path,
        argv: list[str]) -> tuple[str, ValueError | None]:
    """Run, fill and draw a figure of curves; its numbers as text and the first error."""
    sweeps = sweep_cells(figure, options)
    symbols = {flag: sweep['symbol'] for flag, sweep in figure['sweeps'].items()}
    names = {key: f'{key[1]}, {symbols[key[0]]}' for key in sweeps}
    failure = run_jobs((cell.job for key, cells in sweeps.items() for value, columns in cells.items()
                        if chosen(f'{names[key]} = {value}', args.rows)
                        for column, cell in columns.items()
                        if cell is not None and cell.job is not None and chosen(column, args.columns)),
                       args.runs, options)
    unread = fill(sweeps.values(), args.runs, options)
    rows: Cells = {f'{names[key]} = {value}': columns for key, cells in sweeps.items()
                   for value, columns in cells.items()}
    records = finished(sweeps.values(), args.runs, options)
    text = header(title, argv, *notes(figure, options)) + markdown(rows) + spent(records, file.parent)
    write(file, text, records, partial(draw_sweeps, title, sweeps, symbols))
    return text, failure or unread


def draw_picture(number: str, run: Path, file: Path) -> None:
    """Figure 4, 5 or 6 from the model of a finished run."""
    run_script('figures.py', ['--figure', number, '--model', f'local-dir:{run / "hub"}', '--output', str(file),
                              *data_flags(run)])


def reproduce_pictures(
        title: str, figure: dict[str, Any], number: str, args: argparse.Namespace, options: RunOptions, file: Path,
        argv: list[str]) -> tuple[str, ValueError | None]:
    """Train what a figure of images needs, and have it drawn; which pictures there are, and the first error."""
    jobs = pictures(figure, options)
    failure = run_jobs((job for name, job in jobs.items() if chosen(name, args.rows)), min(args.runs, 1), options)
    files = {name: file.with_name(f'{file.name}-{job.folder(0, options).name}.png') for name, job in jobs.items()}
    undrawn = first_error(
        partial(draw_picture, number, job.folder(0, options), files[name]) for name, job in jobs.items()
        if is_finished(job.folder(0, options)) and not files[name].is_file())
    shown = {name: f'![{name}]({picture.name})' if picture.is_file() else 'not run' for name, picture in files.items()}
    lines = markdown_table(['', 'picture'], list(shown.items()), 'll')
    text = header(title, argv) + '\n'.join(lines) + '\n'
    replace_file(file.with_suffix('.md'), text.encode())
    return text, failure or undrawn


@script
def main(argv: list[str] | None = None) -> int:
    """Reproduce; errors are one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    own, train_flags = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
    known = yaml.safe_load((HERE / 'paper_tables.yaml').read_text('utf-8'))
    tables, figures = ({str(key): value for key, value in known[kind].items()} for kind in ('tables', 'figures'))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--table', choices=list(tables))
    what.add_argument('--figure', choices=list(figures))
    parser.add_argument('--rows', nargs='+', default=['*'], metavar='PATTERN', help='rows to run (default: all)')
    parser.add_argument('--columns', nargs='+', default=['*'], metavar='PATTERN', help='columns to run (default: all)')
    parser.add_argument('--runs', type=int, default=4, metavar='N', help='seeds 0 to N − 1 (default: 4, as the paper)')
    parser.add_argument('--recipe', choices=recipe_names(),
                        help="default: the paper's for each model (Table 1 is about recipes and keeps its own)")
    parser.add_argument('--nano', action='store_true',
                        help='every model at an eighth of its widths, Tiny ImageNet with ten of its classes')
    parser.add_argument('--output', default='output/reproduce', metavar='DIR')
    args = parser.parse_args(own)
    options = RunOptions(args.output, args.recipe, tuple(train_flags), args.nano)
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    kind, number = ('table', args.table) if args.table else ('figure', args.figure)
    entry = (tables if args.table else figures)[number]
    file = out / f'{kind}{number}{"-nano" if args.nano else ""}'
    name = f'{kind.capitalize()} {number}' if number[0].isdigit() else number
    title = f'{name}{", nano" if args.nano else ""}: {entry["title"]}'
    if args.table:
        text, failure = reproduce_table(title, entry, args, options, file, argv)
    elif 'sweeps' in entry:
        text, failure = reproduce_sweeps(title, entry, args, options, file, argv)
    else:
        text, failure = reproduce_pictures(title, entry, number, args, options, file, argv)
    print(f'{text}\n{file.with_suffix(".md")}')
    if failure is not None:
        raise failure
    return 0


if __name__ == '__main__':
    sys.exit(main())
