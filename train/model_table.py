#!/usr/bin/env python3
"""Markdown tables of models, weights and measurements, for MODEL_CARD.md, train/TRAINING.md and docs/.

    python train/model_table.py [--write]

A table stands between the marks "begin" and "end". Marks that name a Markdown file hold that file.

GMACs are half the FLOPs that torch.utils.flop_counter counts for convolutions and matrix products in one forward pass
of one image, on the meta device.
"""
import argparse
import json
import re
from pathlib import Path
from typing import Any

import timm
import torch

from lib.history import commands_of, hardware_of, runs_of
from lib.markdown import END, markdown_table, replace_section
from lib.model import count_gmacs
from timm_lossattn.files import replace_file
from timm_lossattn.loading import list_patch_models

BEGIN = '<!-- begin: python train/model_table.py -->'
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'train' / 'results'
WEIGHTS = ROOT / 'hub' / 'weights'


def weights(name: str) -> str:
    """Tags with weights and their measured accuracy, from hub/weights."""
    tags = []
    for tagged in timm.list_pretrained(name):
        file, tag = WEIGHTS / tagged / 'result.json', f'`{tagged.split(".", 1)[1]}`'
        shipped = json.loads(file.read_text())['shipped'] if file.is_file() else None  # None: on the Hub alone
        tags.append(f'{tag} {shipped["top1"]:.2f} %' if shipped else tag)
    return ', '.join(tags) or '–'


def model_table() -> str:
    """The models of this package."""
    rows = []
    for name in list_patch_models():
        model: Any = timm.create_model(name, device='meta').eval()
        size = model.default_cfg['input_size']
        gmacs = count_gmacs(model, torch.empty(1, *size, device='meta'))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append([f'`{name}`', f'{size[1]}×{size[2]}', f'{parameters:.2f}', f'{gmacs:.2f}', weights(name)])
    return '\n'.join(markdown_table(['model', 'input', 'parameters (M)', 'GMACs', 'weights, top-1'], rows, 'llrrl'))


def weights_table() -> str:
    """Everything in hub/weights: what was measured on the weights, and how they were made."""
    rows: list[list[str]] = []
    commands: list[str] = []
    for file in sorted(WEIGHTS.glob('*/result.json')):
        name, result = file.parent.name, json.loads(file.read_text())
        shipped = result['shipped']
        runs = runs_of(result)
        epochs = ' + '.join(str(len(run['epochs'])) for run in runs)
        seeds = ', '.join(str(run['seed']) for run in runs)
        seconds = sum(run['seconds'] for run in runs)
        rows.append([
            f'`{name}`', f'{shipped["top1"]:.2f} %', f'{shipped["top5"]:.2f} %', f'{shipped["images"]:,}',
            f'{shipped["bytes"] / 1e6:.2f} MB', epochs, seeds, f'{seconds / 3600:.2f}', hardware_of(result)])
        commands += ['', f'`{name}`:', '', '```bash']
        for command in commands_of(result):
            commands += wrap(command)
        commands.append('```')
    head = ['weights', 'top-1', 'top-5', 'images', 'file', 'epochs', 'seed', 'hours', 'on']
    return '\n'.join(markdown_table(head, rows, 'lrrrrrrrl') + commands)


def receptive_field_table() -> str:
    """What train/receptive_field.py measured."""
    rows = []
    for file in sorted((RESULTS / 'explanations').glob('receptive_field_*.json')):
        r = json.loads(file.read_text())
        side = r['patch_box'][2] - r['patch_box'][0]
        rows.append([
            f'`{r["model"]}`', f'{side}×{side}', f'{100 * r["share_in_patch_box"]:.0f} %',
            f'{r["side_half"]}×{r["side_half"]}', f'{r["side_90"]}×{r["side_90"]}',
            f'{100 * r["pixels_with_influence"]:.0f} %'])
    head = ['model', 'patch box', 'influence inside', 'half of it within', '90 % within', 'pixels with any']
    return '\n'.join(markdown_table(head, rows))


BOARD = (  # title, kind of entry, measure, row of the comparison
    ('3×3 grids', 'grid 3', 'grid', 'ours'), ('spread', 'grid 3', 'grid', 'ours, spread'),
    ('2×2 grids', 'grid 2', 'grid', 'ours'), ('spread', 'grid 2', 'grid', 'ours, spread'),
    ('energy', 'image', 'energy', 'ours'), ('pointing', 'image', 'pointing', 'ours'),
    ('MaxBoxAccV2', 'image', 'boxes', 'ours'))


def leaderboard_table() -> str:
    """A row for each model of train/results/leaderboard, for its α alone, and for what needs no model."""
    results = [json.loads(file.read_text()) for file in sorted((RESULTS / 'leaderboard').glob('*/compare.json'))]

    def cells(result: dict[str, Any], rows: dict[str, str]) -> list[str]:
        found = [result.get(kind, {}).get(rows.get(row, row), {}).get(measure) for _, kind, measure, row in BOARD]
        return [f'{one["mean"]:.3f} ± {(one["high"] - one["low"]) / 2:.3f}' if one else '–' for one in found]

    def names(result: dict[str, Any]) -> list[str]:
        return [f'`{result["model"].removeprefix("lossattn.")}`', pool_name(result['weights'])]

    def baseline(result: dict[str, Any], row: str, title: str) -> list[str]:
        return [title, '–', '–', '–', *cells(result, {'ours': row, 'ours, spread': f'{row}, spread'})]

    def counts(result: dict[str, Any]) -> str:
        return ', '.join(str(result[kind]['ours']['grid']['n']) for kind in ('grid 3', 'grid 2'))

    rows = [[*names(result), f'{100 * result["accuracy"]:.1f}', counts(result), *cells(result, {})]
            for result in results]
    for result in results:
        if not result['weights'].startswith('Mean'):  # whose α is the same everywhere
            rows.append(baseline(result, 'α alone', f'α alone of {", ".join(names(result))}'))
    if results:
        rows += [baseline(results[0], row, row) for row in ('random', 'centre')]
        rows += [baseline(results[0], f'box: {box}', f'{box}, as a box')
                 for box in ('whole image', 'all patches', 'best centred square')]
    head = ['model', 'weights of patches', 'accuracy (%)', 'grids, 3×3 and 2×2', *(f'{title} ↑' for title, *_ in BOARD)]
    return '\n'.join([*markdown_table(head, rows, 'll' + 'r' * (len(head) - 2)),
                      '', 'Commands:', '', '```bash', *(result['command'] for result in results), '```'])


def pool_name(weights: str) -> str:
    """Of the printed form of patch weights."""
    if weights.startswith('Mean'):
        return 'all the same (stock)'
    match = re.search(r'xi=([0-9.]+)', weights)
    return f'loss attention, ξ = {float(match[1]):g}' if match else weights


def with_included_files(text: str) -> str:
    """The text with what the files hold that marks name."""
    def block(match: re.Match) -> str:
        content = re.sub(r'^# .*\n+', '', (ROOT / match[1]).read_text()).strip()  # without its title
        return f'<!-- begin: {match[1]} -->\n\n{content}\n\n{END}'
    return re.sub(rf'<!-- begin: (\S+\.md) -->.*?{re.escape(END)}', block, text, flags=re.DOTALL)


def wrap(command: str) -> list[str]:
    """A command over several lines, one flag on each but the first."""
    first, *flags = command.split(' --')
    return [f'{first} \\', *(f'    --{flag} \\' for flag in flags[:-1]), f'    --{flags[-1]}'] if flags else [first]


TABLES = {'docs/models.md': model_table, 'MODEL_CARD.md': weights_table,
          'docs/reading_explanations.md': receptive_field_table, 'docs/leaderboard.md': leaderboard_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='replace the tables in the documents')
    args = parser.parse_args()
    for path in (ROOT / 'MODEL_CARD.md', ROOT / 'train' / 'TRAINING.md', *sorted((ROOT / 'docs').glob('*.md'))):
        create = TABLES.get(str(path.relative_to(ROOT)))
        table = create() if create else ''
        if not args.write:
            if table:
                print(table)
            continue
        if table:
            replace_section(path, BEGIN, table)
        replace_file(path, with_included_files(path.read_text()).encode())


if __name__ == '__main__':
    main()
