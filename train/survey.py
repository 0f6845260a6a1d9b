#!/usr/bin/env python3
"""For which timm models is loss attention exact? docs/timm_models.md, a row a family.

    python train/survey.py [--output output/survey.jsonl] [--write]
    python train/survey.py --checks [--write]    # counts train/results/check_all.jsonl

Checks the smallest model under 100 million parameters of each of timm's modules, with random weights, in processes of
their own; what is in --output already is not checked again. Models whose class token or attention pooling decides are
checked a second time with global_pool='avg'. With --checks nothing is checked: what
``timm-lossattn check --all`` wrote there is counted by kind. --write puts the table into docs/timm_models.md.
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
from timm_lossattn.evaluation.check_all import LIMIT_MILLION, models_to_check, read_checks
from timm_lossattn.files import replace_file

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'timm_models.md'
CHECKS = Path(__file__).parent / 'results' / 'check_all.jsonl'
BEGIN, END = '<!-- begin: python train/survey.py --write -->', '<!-- end -->'
BEGIN_COUNTS = '<!-- begin: python train/survey.py --checks --write -->'
KINDS = {
    'A': 'A', 'B': 'B', 'C': 'C', 'D': 'D', 'error': 'not known: an error',
    'large': f'over {LIMIT_MILLION:.0f} million parameters, not checked'}
SECONDS = 300  # for one model
LATE = f'not finished in {SECONDS} s'


def checked(name: str) -> dict[str, Any]:
    """The check of a model, and with average pooling if it is refused as it stands."""
    row = check_model(name, receptive_field=False).to_dict()
    refused = row['kind'] == 'D'
    average = check_model(name, receptive_field=False, global_pool='avg').to_dict() if refused else None
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


def counts_by_kind(rows: dict[str, dict[str, Any]]) -> str:
    """Models and published checkpoints by kind, and how exact A to C are, of ``read_checks``."""
    checkpoints = Counter(name.split('.')[0] for name in timm.list_pretrained())
    exact = [row for row in rows.values() if row['kind'] in ('A', 'B', 'C')]
    numbers = [max((row[key] for row in exact), default=0.) for key in ('additive_error', 'stock_error')]
    todo = len(set(models_to_check()) - rows.keys())
    text = (f'{len(rows)} models of timm {timm.__version__}{f", {todo} are still to be checked" if todo else ""}. Of '
            f'those of kind A, B and C the largest additive error is {numbers[0]:.0e}, the largest difference from the '
            f'stock logits {numbers[1]:.0e}; {sum(not row["strict"] for row in exact)} have another state dict than '
            'the stock model.')
    lines = [text, '', '| kind | models | published checkpoints | why |', '|---|--:|--:|---|']
    for kind, title in KINDS.items():
        names = [name for name, row in rows.items() if row['kind'] == kind]
        reasons = Counter(rows[name]['why'].partition(' (')[0] for name in names if rows[name]['why'])
        why = '; '.join(f'{reason} ({number})' for reason, number in reasons.most_common())
        lines.append(f'| {title} | {len(names)} | {sum(checkpoints[name] for name in names)} | {why or "–"} |')
    return '\n'.join(lines)


def write_section(begin: str, text: str) -> None:
    """Put a text between its marks in the document."""
    before, rest = DOCUMENT.read_text().split(begin)
    replace_file(DOCUMENT, f'{before}{begin}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}'.encode())


def main(argv: list[str] | None = None) -> int:
    """Survey."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('output/survey.jsonl'), metavar='FILE')
    parser.add_argument('--write', action='store_true', help='the table into docs/timm_models.md')
    parser.add_argument('--checks', action='store_true', help='count what is in train/results/check_all.jsonl')
    args = parser.parse_args(argv)
    if args.checks:
        text = counts_by_kind(read_checks(CHECKS))
        print(text)
        if args.write:
            write_section(BEGIN_COUNTS, text)
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    if args.output.is_file():
        whole = [line for line in args.output.read_text().splitlines(keepends=True) if line.endswith('\n')]
        replace_file(args.output, ''.join(whole).encode())  # a kill may have left half a line
        rows = {row['module']: row for row in map(json.loads, whole)}
    todo = {module: name for module, name in smallest_models().items() if module not in rows}
    context = multiprocessing.get_context('fork')
    with args.output.open('a') as file:
        for module, name in tqdm(todo.items(), dynamic_ncols=True):
            with context.Pool(1) as pool:
                try:
                    row = pool.apply_async(checked, (name,)).get(SECONDS)
                except multiprocessing.TimeoutError:
                    row = {'name': name, 'kind': 'error', 'reason': LATE, 'with_avg': None}
            rows[module] = {'module': module, **row}
            if row['reason'] != LATE:  # another day it may be
                file.write(json.dumps(rows[module]) + '\n')
                file.flush()
    text = table(rows)
    print(text)
    if args.write:
        write_section(BEGIN, text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
