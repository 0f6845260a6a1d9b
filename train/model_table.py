#!/usr/bin/env python3
"""Markdown table of all models: input, parameters, GMACs, weights. The README holds its output.

    python train/model_table.py [--write README.md]

GMACs are half the FLOPs that torch.utils.flop_counter counts for convolutions and matrix products in one forward pass
of one image, on the meta device.
"""
import argparse
import json
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_lossattn.cli import list_patch_models

BEGIN, END = '<!-- begin: python train/model_table.py -->', '<!-- end -->'
RESULTS = Path(__file__).parent / 'results'


def weights(name: str) -> str:
    """Tags with weights and their measured accuracy, from train/results."""
    tags = []
    for tagged in timm.list_pretrained(name):
        result = json.loads((RESULTS / f'{tagged}.json').read_text())
        tags.append(f'`{tagged.split(".", 1)[1]}` {result["shipped"]["top1"]:.2f} %')
    return ', '.join(tags) or '–'


def model_table() -> str:
    """The table, with its markers."""
    lines = [BEGIN, '', '| model | input | parameters (M) | GMACs | weights, top-1 |', '|---|---|--:|--:|---|']
    for name in list_patch_models():
        model = timm.create_model(name, device='meta').eval()
        size = model.default_cfg['input_size']
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *size, device='meta'))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        lines.append(f'| `{name}` | {size[1]}×{size[2]} | {parameters:.2f} | {counter.get_total_flops() / 2e9:.2f} | '
                     f'{weights(name)} |')
    return '\n'.join([*lines, '', END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', metavar='FILE', help='replace the table in this file')
    args = parser.parse_args()
    table = model_table()
    if not args.write:
        print(table)
        return
    path = Path(args.write)
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + table + rest.split(END, 1)[1])


if __name__ == '__main__':
    main()
