"""The paper's tables and curves with our numbers beside its own: Markdown and pictures."""
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .markdown import markdown_table
from .paper import Cell, Cells
from .plots import COLORS, panels, save

__all__ = ['draw_sweeps', 'draw_table', 'header', 'markdown']

OURS, PAPER = COLORS[:2]


def header(title: str, argv: list[str], *notes: str) -> str:
    """Title, notes and the command."""
    return '\n\n'.join([f'# {title}', *notes, f'`{shlex.join(["python", "train/reproduce.py", *argv])}`']) + '\n\n'


def markdown(cells: Cells) -> str:
    """A table: ours / paper in every cell, and ours of the best test epoch in a column beside."""
    columns = dict.fromkeys(next(iter(cells.values())), False)  # column -> whether the best epoch stands beside it
    units: dict[str, str] = {}
    for row in cells.values():
        columns |= {name: True for name, cell in row.items() if cell is not None and cell.chosen}
        units |= {name: f' ({cell.unit})' for name, cell in row.items() if cell is not None and cell.unit != '%'}
    names = [title for name, chosen in columns.items()
             for title in ([name, f'{name}, best test epoch'] if chosen else [name + units.get(name, '')])]
    rows = []
    for name, row in cells.items():
        texts = [name]
        for column, chosen in columns.items():
            cell = row[column]
            texts.append('–' if cell is None else cell.text())
            if chosen:
                texts.append('–' if cell is None else cell.ours(cell.best))
        rows.append(texts)
    return '\n'.join(markdown_table(['', *names], rows, 'l' * (1 + len(names)))) + '\n'


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Of runs; no deviation of one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.


def baselines(cells: Mapping[str, Cell | None], column: str) -> list[str]:
    """Those that stand beside a column."""
    return [name for name, cell in cells.items() if cell is not None and cell.beside == column]


def legend(figure: Any) -> None:
    """One for all panels, below them; what has the same name in several panels stands there once."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc='outside lower center', ncols=4, frameon=False)


def draw_table(title: str, cells: Cells, file: Path) -> None:
    """Ours beside the paper's, a panel for each measured column."""
    rows = list(cells)
    measured = {name: cell for row in cells.values() for name, cell in row.items()
                if cell is not None and cell.job is not None}
    columns = [name for name, cell in measured.items() if cell.beside is None]
    figure, (row_of_axes,) = panels(1, len(columns), 3 + 2.6 * len(columns), 1.6 + 0.3 * len(rows), sharey=True)
    for axes, column in zip(row_of_axes, columns):
        shown = [(i, cell) for i, row in enumerate(rows) if (cell := cells[row][column]) is not None]
        paper = [(cell.paper, i) for i, cell in shown if cell.paper is not None]
        if paper:
            axes.plot(*zip(*paper), 'D', mfc='none', color=PAPER, label='paper')
        position, mean, error = points([cells[row][column] for row in rows])
        axes.errorbar(mean, position, xerr=error, fmt='o', color=OURS, capsize=3, label='ours')
        best = [(statistics.mean(cell.best), i) for i, cell in shown if cell.best]
        if best:
            axes.plot(*zip(*best), '|', ms=10, color=OURS, label='ours, best test epoch')
        for baseline, marker in zip(baselines(measured, column), 'x+'):
            position, mean, _ = points([cells[row][baseline] for row in rows])
            axes.plot(mean, position, marker, color='grey', label=baseline)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel=f'{column} ({shown[0][1].unit})', ylim=(len(rows) - 0.5, -0.5))
        axes.grid(alpha=0.3)
    legend(figure)
    figure.suptitle(title)
    save(figure, file, dpi=120)


def draw_sweeps(title: str, sweeps: Mapping[tuple[str, str], Cells], symbols: Mapping[str, str], file: Path) -> None:
    """A row of panels for each flag that is swept, a panel for each measure, a curve for each model; baselines thin.

    Args:
        title: of the figure.
        sweeps: see ``sweep_cells``.
        symbols: flag -> how its axis is labelled.
        file: of the picture.
    """
    flags = list(dict.fromkeys(flag for flag, _ in sweeps))
    some = next(iter(next(iter(sweeps.values())).values()))
    measures = [name for name, cell in some.items() if cell is not None and cell.beside is None]
    figure, grid = panels(len(flags), len(measures), 3.4 * len(measures), 2.9 * len(flags) + 0.8)
    for row, flag in zip(grid, flags):
        curves = {curve: cells for (of, curve), cells in sweeps.items() if of == flag}
        for axes, measure in zip(row, measures):
            for (curve, cells), color, marker in zip(curves.items(), COLORS, 'os^v'):
                draw_curve(axes, [column[measure] for column in cells.values()], curve, color, marker)
                for baseline, style in zip(baselines(some, measure), (':', '--')):
                    x, mean, _ = points([column[baseline] for column in cells.values()])
                    axes.plot(x, mean, style, lw=1, color=color, label=baseline)
                axes.set_xticks(range(len(cells)), list(cells))  # evenly: small values would lie on each other
            axes.set(xlabel=symbols[flag], ylabel=f'{measure} (%)', xlim=(-0.4, len(cells) - 0.6))
            axes.grid(alpha=0.3)
    legend(figure)
    figure.suptitle(title)
    save(figure, file, dpi=120)


def points(cells: list[Cell | None]) -> tuple[tuple, tuple, tuple]:
    """Position, mean and deviation of the cells that have been run."""
    found = [(i, *mean_and_deviation(cell.values)) for i, cell in enumerate(cells) if cell is not None and cell.values]
    x, mean, error = zip(*found) if found else ((), (), ())
    return x, mean, error


def draw_curve(axes: Any, cells: list[Cell | None], name: str, color: str, marker: str) -> None:
    """Mean and deviation over the values that have been run."""
    x, mean, error = points(cells)
    axes.errorbar(x, mean, yerr=error, marker=marker, color=color, capsize=3, label=name)
