#!/usr/bin/env python3
"""For which timm models is loss attention exact? docs/timm_models.md, a row a family.

    python train/survey.py [--output output/survey.jsonl] [--write]

Checks the smallest model under 100 million parameters of each of timm's modules, with random weights, in processes of
their own; what is in --output already is not checked again. Models whose class token or attention pooling decides are
checked a second time with global_pool='avg'. --write puts the table into docs/timm_models.md.
"""
import argparse
import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import timm
from tqdm import tqdm

from timm_lossattn.evaluation.check import check_model, smallest_models
from timm_lossattn.files import replace_file

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'timm_models.md'
BEGIN, END = '<!-- begin: python train/survey.py --write -->', '<!-- end -->'
SECONDS = 300  # for one model


def checked(name: str) -> dict[str, Any]:
    """The check of a model, and with average pooling if it is refused as it stands."""
    row: dict[str, Any] = {'name': name, 'kind': 'error', 'reason': ''}
    average = None
    try:
        row = check_model(name, receptive_field=False).to_dict()
        if row['kind'] == 'D':
            average = check_model(name, receptive_field=False, global_pool='avg').to_dict()
    except Exception as error:  # whatever a model's constructor raises: it has no such pooling, it needs a package
        row['reason'] = row['reason'] or f'{type(error).__name__}: {" ".join(str(error).split())}'[:300]
    return {**row, 'with_avg': average}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The counts and a row for each family."""
    kinds = Counter(row['kind'] for row in rows.values())
    rescued = Counter(row['with_avg']['kind'] for row in rows.values() if row['with_avg'])
    counts = ', '.join(f'{kinds[kind]} of kind {kind}' for kind in 'ABCD')
    average = ', '.join(f'{rescued[kind]} of kind {kind}' for kind in 'ABC')
    failed = f', {kinds["error"]} not checked for an error' if kinds['error'] else ''
    lines = [
        f'{len(rows)} families of timm {timm.__version__}: {counts}{failed}. '
        f'Of kind D, with `global_pool="avg"`: {average}.',
        '', '| family | smallest model | kind | features | patches | additive error | against stock | if refused |',
        '|---|---|---|---|---|--:|--:|---|']
    for family, row in sorted(rows.items()):
        best, note = row, ''
        if row['kind'] in ('D', 'error'):
            note = row['reason'].partition(': the logits are no sum over patches: ')[2] or row['reason']
            note = note.split('. ')[0].replace('|', '/')[:110]
            if row['with_avg'] and row['with_avg']['kind'] in ('A', 'B', 'C'):
                best, note = row['with_avg'], f'{note}; with `global_pool="avg"`'
        errors = [best.get(key) for key in ('additive_error', 'stock_error')]
        numbers = ['–' if error is None else f'{error:.0e}' for error in errors]
        kind = best['kind'] if best is row else f'D → {best["kind"]}'
        cells = [family, f'`{row["name"]}`', kind, best.get('layout') or '–', best.get('grid') or '–', *numbers]
        lines.append(f'| {" | ".join(cells)} | {note or "–"} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Survey."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('output/survey.jsonl'), metavar='FILE')
    parser.add_argument('--write', action='store_true', help='the table into docs/timm_models.md')
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    if args.output.is_file():
        rows = {row['module']: row for row in map(json.loads, args.output.read_text().splitlines())}
    todo = {module: name for module, name in smallest_models().items() if module not in rows}
    context = multiprocessing.get_context('fork')
    with args.output.open('a') as file:
        for module, name in tqdm(todo.items(), dynamic_ncols=True):
            with context.Pool(1) as pool:
                try:
                    row = pool.apply_async(checked, (name,)).get(SECONDS)
                except multiprocessing.TimeoutError:
                    row = {'name': name, 'kind': 'error', 'reason': f'not finished in {SECONDS} s', 'with_avg': None}
            rows[module] = {'module': module, **row}
            file.write(json.dumps(rows[module]) + '\n')
            file.flush()
    text = table(rows)
    print(text)
    if args.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        replace_file(DOCUMENT, f'{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}'.encode())
    return 0


if __name__ == '__main__':
    sys.exit(main())
