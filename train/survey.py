#!/usr/bin/env python3
"""For which timm models is loss attention exact? The tables of docs/timm_models.md, by kind and by family.

    timm-lossattn check --all --out train/results/check_all.jsonl    # goes on where it was stopped
    python train/survey.py [--write]

A family is one of timm's modules; its row is the smallest model that was checked. --write puts the tables into
docs/timm_models.md.
"""
import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import timm

from lib.markdown import markdown_table, replace_section
from lib.script import script
from timm_lossattn.evaluation.check_all import LIMIT_MILLION, models_to_check, read_checks

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'timm_models.md'
CHECKS = Path(__file__).parent / 'results' / 'check_all.jsonl'
BEGIN_KINDS, BEGIN_FAMILIES = (
    f'<!-- begin: python train/survey.py --write, by {what} -->' for what in ('kind', 'family'))
KINDS = {
    'A': 'A', 'B': 'B', 'C': 'C', 'D': 'D', 'error': 'not known: an error',
    'large': f'over {LIMIT_MILLION:.0f} million parameters, not checked'}


def smallest(checks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of ``read_checks`` that of the smallest model of each of timm's modules that have one."""
    found = {module: [checks[name] for name in timm.list_models(module=module)
                      if name in checks and checks[name]['kind'] != 'large' and checks[name]['parameters_million']]
             for module in timm.list_modules()}
    return {module: min(rows, key=lambda row: row['parameters_million']) for module, rows in found.items() if rows}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The counts and a row for each family, of ``smallest``."""
    kinds = Counter(row['kind'] for row in rows.values())
    rescued = Counter(row['with_avg']['kind'] for row in rows.values() if row['with_avg'])
    counts = ', '.join(f'{kinds[kind]} of kind {kind}' for kind in 'ABCD')
    average = ', '.join(f'{rescued[kind]} of kind {kind}' for kind in 'ABC')
    failed = f', {kinds["error"]} not checked for an error' if kinds['error'] else ''
    text = (f'{len(rows)} families of timm {timm.__version__}: {counts}{failed}. '
            f'Of kind D, with `global_pool="avg"`: {average}.')
    cells = []
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
        cells.append([family, f'`{row["name"]}`', kind, best.get('layout') or '–', best.get('grid') or '–', *numbers,
                      note or '–'])
    head = ['family', 'smallest model', 'kind', 'features', 'patches', 'additive error', 'against stock', 'if refused']
    return '\n'.join([text, '', *markdown_table(head, cells, 'lllllrrl')])


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
    cells = []
    for kind, title in KINDS.items():
        names = [name for name, row in rows.items() if row['kind'] == kind]
        reasons = Counter(rows[name]['why'] for name in names if rows[name]['why'])
        why = '; '.join(f'{reason} ({number})' for reason, number in reasons.most_common())
        cells.append([title, str(len(names)), str(sum(checkpoints[name] for name in names)), why or '–'])
    return '\n'.join([text, '', *markdown_table(['kind', 'models', 'published checkpoints', 'why'], cells, 'lrrl')])


@script
def main(argv: list[str] | None = None) -> int:
    """Count; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='the tables into docs/timm_models.md')
    args = parser.parse_args(argv)
    checks = read_checks(CHECKS)
    if not checks:
        raise ValueError(f'there is no {CHECKS}: timm-lossattn check --all --out {CHECKS}')
    for begin, text in ((BEGIN_KINDS, counts_by_kind(checks)), (BEGIN_FAMILIES, table(smallest(checks)))):
        print(f'{text}\n')
        if args.write:
            replace_section(DOCUMENT, begin, text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
