"""Measured numbers, one JSON object a line and image, from which every table can be made again.

The first line says what was asked. A run that was interrupted, or wants more images, goes on after the last whole line,
behind a line that says at which commit and on which machine.
Of a file that says less than is asked today, as those from before it said which weights, tables can be made again.
"""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timm_lossattn.evaluation.constant_boxes import IOUS, cross_fitted_accuracy
from timm_lossattn.evaluation.intervals import Interval, mean_interval
from timm_lossattn.files import replace_file

__all__ = ['SPREAD', 'Records', 'Table', 'hits_to_text', 'means_and_differences', 'text_to_hits']

SPREAD = ', spread'  # behind the name of a map: after it was spread over neighbours
Table = dict[str, dict[str, tuple[Interval, Interval | None]]]  # row -> measure -> mean, and ours less it


class Records:
    """The file.

    Args:
        path: of it; read if it exists.
        asked: what was asked, and what the answers depend on; in the file it has to be the same.
        environment: commit, versions and hardware of what this process adds.

    Attributes:
        asked: what the file says of it.
        unknown: what it does not say.

    Raises:
        ValueError: the file is of another measurement.
    """

    def __init__(self, path: Path, asked: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path, self.environment = path, environment
        self.entries: list[dict[str, Any]] = []
        self.started = False
        asked = json.loads(json.dumps(asked))  # as it is in the file: tuples are lists
        *lines, rest = path.read_bytes().split(b'\n') if path.is_file() else [b'']
        whole = [line.decode() + '\n' for line in lines]
        if not whole:
            whole = [json.dumps({'kind': 'asked', **asked}, ensure_ascii=False) + '\n']
        found = json.loads(whole[0])
        self.asked = {key: value for key, value in found.items() if key != 'kind'}
        self.unknown = sorted(key for key, value in asked.items() if key not in found and value is not None)
        differ = sorted(key for key in {*asked, *self.asked} - {*self.unknown} if asked.get(key) != found.get(key))
        if differ:
            raise ValueError(f'--output: {path} was begun with another {differ[0]}, {found.get(differ[0])!r}; choose '
                             'another folder')
        first: dict[tuple[str, int], dict[str, Any]] = {}  # two processes may have measured the same image
        for entry in map(json.loads, whole[1:]):
            first.setdefault((entry['kind'], entry['index']), entry)
        self.entries = list(first.values())
        if rest or not lines:  # half a line, or nothing yet
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, ''.join(whole).encode())

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Append, on disk at once.

        Raises:
            ValueError: the file does not say what its lines depend on.
        """
        if self.unknown:
            raise ValueError(f'--output: {self.path} does not say of which {", ".join(self.unknown)} it is; choose '
                             'another folder')
        entries = [rounded(entry) for entry in entries]
        if not self.started:
            entries.insert(0, {'kind': 'start', 'index': len(self.of('start')), **self.environment})
            self.started = True
        with self.path.open('a', encoding='utf-8') as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + '\n' for entry in entries)
        self.entries += entries

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Entries of one kind, in the order of their index."""
        return sorted((entry for entry in self.entries if entry['kind'] == kind), key=lambda entry: entry['index'])


def rounded(value: Any) -> Any:
    """Numbers with five significant digits; NaN, which JSON has not, as null."""
    if isinstance(value, float):
        return float(f'{value:.5g}') if value == value else None
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def hits_to_text(hits: torch.Tensor) -> str:
    """(T, 3) bool as T octal digits, one bit an IoU."""
    return ''.join(str(int(a) + 2 * int(b) + 4 * int(c)) for a, b, c in hits.tolist())


def text_to_hits(text: str) -> torch.Tensor:
    """The other way round."""
    return torch.tensor([[bool(int(digit) >> bit & 1) for bit in range(len(IOUS))] for digit in text])


def rows_of(entries: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Every (row, measure) that occurs, in the order of the first entry that has it."""
    seen: dict[tuple[str, str], None] = {}
    for entry in entries:
        for row, measures in entry['rows'].items():
            seen.update(dict.fromkeys((row, measure) for measure in measures))
    return iter(seen)


def column(entries: list[dict[str, Any]], row: str, measure: str) -> torch.Tensor:
    """(N,) values of the entries; NaN where one has none. Boxes are judged here: it takes all images."""
    given = [entry['rows'].get(row, {}).get(measure) for entry in entries]
    if measure != 'boxes':
        return torch.tensor([torch.nan if value is None else float(value) for value in given])
    result = torch.full((len(given),), torch.nan)
    known = [i for i, value in enumerate(given) if value]
    if known:
        result[known] = cross_fitted_accuracy(torch.stack([text_to_hits(given[i]) for i in known]))
    return result


def means_and_differences(entries: list[dict[str, Any]], ours: str) -> Table:
    """Mean of every row and measure, and the paired difference of ours to it, over images or grids.

    Of a map that was spread over neighbours ours is taken as well that was spread.
    """
    table: Table = {}
    columns = {(row, measure): column(entries, row, measure) for row, measure in rows_of(entries)}
    nothing = torch.full((len(entries),), torch.nan)
    for (row, measure), values in columns.items():
        spread = ours + SPREAD
        own = columns.get((spread if row.endswith(SPREAD) and row != spread else ours, measure), nothing)
        other = None if row == ours or own.isnan().all() else mean_interval(own - values)
        table.setdefault(row, {})[measure] = mean_interval(values), other
    return table
