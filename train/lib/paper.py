"""The paper's tables and figures as paper_tables.yaml has them, and which runs of ours fill them."""
import hashlib
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ['ADAM', 'BASELINES', 'NANO', 'Cell', 'Cells', 'Job', 'RunOptions', 'all_cells', 'pictures', 'recipe_of',
           'sweep_cells', 'table_cells']

NANO = 1 / 8  # of the widths
USUAL = {'gamma_max': 0.1, 'xi': 0.1}  # of a run without flags, which a row that names nothing else shares
NANO_DATASETS = {'tiny_imagenet': 'tiny_imagenet_mini'}
ADAM = ('*_meanpool_*', '*_routing_*')  # the paper trains these with Adam
# measure -> what stands beside it wherever it is reported, because it takes no choice: name, and measure of validate.py
BASELINES = {
    'localization_ap': {'box around all patches': 'localization_ap_all_patches',
                        'best centred square': 'localization_ap_centred_square'},
    'patch_precision': {'all patches: precision': 'patch_precision_all_patches',
                        'patches in the object': 'patches_in_object'},
    'patch_recall': {'all patches: recall': 'patch_recall_all_patches'},
    'patch_f': {'all patches: F': 'patch_f_all_patches'},
}
CHOSEN_BY = ('top1', 'map_voc11', 'map_public_code')  # measures of which a best epoch is reported beside the last


@dataclass(frozen=True)
class RunOptions:
    """How runs are made.

    Attributes:
        output: their folder.
        recipe: if not the paper's.
        train_flags: what goes to train.py as it is.
        nano: an eighth of the widths, and ten classes of Tiny ImageNet; no numbers of the paper stand beside those.
    """
    output: str
    recipe: str | None = None
    train_flags: tuple[str, ...] = ()
    nano: bool = False

    def job(self, model: str, dataset: str, recipe: str | None = None, flags: Mapping[str, Any] | None = None) -> 'Job':
        """What is run for a model on a dataset, by a recipe of the table or else the one of these options."""
        flags = dict(flags or {})
        if flags.items() <= USUAL.items():
            flags = {}
        if self.nano:
            flags['width_mult'] = NANO
            dataset = NANO_DATASETS.get(dataset, dataset)
        return Job(model, dataset, recipe or recipe_of(model, self.recipe), as_flags(flags))


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
    """One number of a table.

    Attributes:
        job: whose runs give it; None for what is not run: numbers of others that the paper quotes, parameter counts.
        measure: of train.py or validate.py; 'epoch_seconds' or 'parameters'.
        paper: its number, if it has one.
        unit: of the numbers.
        beside: the column that it is a baseline of, if it is one.
        values: of the last epoch of each run.
        best: of the epoch with the best test accuracy of each run.
    """
    job: Job | None
    measure: str
    paper: float | None
    unit: str = '%'
    beside: str | None = None
    values: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    @property
    def chosen(self) -> bool:
        """Whether the best epoch is reported as well."""
        return self.measure in CHOSEN_BY

    def text(self) -> str:
        """For Markdown: ours / the paper's."""
        ours = self.ours(self.values)
        return ours if self.paper is None else f'{ours} / {self.paper:.2f}'

    def ours(self, values: list[float]) -> str:
        """Mean ± standard deviation of runs, and how many."""
        if self.job is None:
            return f'{values[0]:.2f}' if values else '–'
        if not values:
            return 'not run'
        if len(values) == 1:
            return f'{values[0]:.2f} (n = 1)'
        return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (n = {len(values)})'


Cells = dict[str, dict[str, Cell | None]]  # row -> column -> cell; None where the paper's row has no number


def recipe_of(model: str, chosen: str | None) -> str:
    """The recipe asked for, or the paper's for this model."""
    return chosen or ('adam' if any(fnmatch(model, pattern) for pattern in ADAM) else 'sgd')


def as_flags(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """In one order, so that equal jobs are equal."""
    return tuple(sorted((name, str(value)) for name, value in values.items()))


def with_baselines(column: str, cell: Cell | None, measure: str) -> dict[str, Cell | None]:
    """A cell by the name of its column, and after it those of its baselines, of which the paper has no numbers."""
    return {column: cell} | {
        name: cell and Cell(cell.job, baseline, None, cell.unit, column)
        for name, baseline in BASELINES.get(measure, {}).items()}


def table_cells(table: Mapping[str, Any], options: RunOptions) -> Cells:
    """A cell for each number of a table, ours or the paper's."""
    columns = table['columns']
    printed = [name for name, spec in columns.items() if 'paper_of' not in spec]  # where the paper has numbers
    cells: Cells = {}
    for name, row in table['rows'].items():
        if options.nano and 'model' not in row:
            continue
        numbers = dict(zip(printed, row['paper'] or [None] * len(printed)))
        cells[name] = {}
        for column, spec in columns.items():
            paper = numbers[spec.get('paper_of', column)]
            job = None
            if 'model' in row and 'dataset' in spec:
                job = options.job(row['model'] + spec.get('model_suffix', ''), spec['dataset'], row.get('recipe'),
                                  row.get('flags'))
            empty = row['paper'] and paper is None
            cells[name] |= with_baselines(column, None if empty else Cell(
                job, spec['measure'], None if options.nano else paper, spec.get('unit', '%')), spec['measure'])
    return cells


def swept_cells(job: Job, measures: Mapping[str, str]) -> dict[str, Cell | None]:
    """Name of the measure, and of its baselines -> cell, of one job of a figure of curves."""
    cells: dict[str, Cell | None] = {}
    for name, measure in measures.items():
        cells |= with_baselines(name, Cell(job, measure, None), measure)
    return cells


def sweep_cells(figure: Mapping[str, Any], options: RunOptions) -> dict[tuple[str, str], Cells]:
    """(Flag that is swept, name of the curve) -> value of the flag -> measure -> cell, of a figure of curves."""
    return {
        (flag, curve): {
            str(value): swept_cells(
                options.job(model, figure['dataset'], flags={**sweep['fixed'], flag: value}), figure['measures'])
            for value in sweep['values']}
        for flag, sweep in figure['sweeps'].items() for curve, model in figure['curves'].items()}


def pictures(figure: Mapping[str, Any], options: RunOptions) -> dict[str, Job]:
    """Row -> the job whose model draws it, of a figure of images."""
    return {name: options.job(row['model'], row['dataset']) for name, row in figure['rows'].items()}


def all_cells(cells: Cells) -> Iterator[Cell]:
    """Those that have numbers."""
    return (cell for row in cells.values() for cell in row.values() if cell is not None)
