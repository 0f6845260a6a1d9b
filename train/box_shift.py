#!/usr/bin/env python3
"""Do the boxes of the patches lie where the evidence comes from? The true boxes' share of it, were they all moved.

    python train/box_shift.py --model lossattn.tf_efficientnet_lite0 --xi 1 --dataset hfds/data/imagenette_val500 \\
        --crop-pct 1 --output output/box_shift

A patch's box is an equal part of the image, but the padding of strided layers puts the middle of what a position reads
up to half a patch beside the box's. If the evidence of trained weights did come from there, boxes moved by as much
would lie better. Asked are, for the lead of the image's label over its rivals, energy and pointing
(timm_lossattn/evaluation/pointing.py), with all boxes of patches moved by quarters of a patch to the right, down and
both ways. It is the true boxes that move, the other way, which is the same but at the image's edges. Objects lie in the
middle more often than not, so that a move costs something to whatever side: compare moves of opposite sign. Writes
box_shift.json and .md with bootstrap intervals over images, 95 %.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from lib.boxes import collate_boxes, fixed_order, has_boxes, open_patch_model
from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.options import EvalOptions
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.explanation.evidence import direction, evidence_along
from timm_lossattn.explanation.geometry import patches_to_pixels
from timm_lossattn.files import replace_file, write_json

try:
    from timm_lossattn.evaluation.intervals import mean_interval
    from timm_lossattn.evaluation.pointing import EnergyPointing, PointingGame
except ImportError:
    need('train,compare', 'torchmetrics', 'scipy')
    raise

STEPS = (-0.5, -0.25, 0.25, 0.5)  # of a patch
MOVES = [(0., 0.), *((s, 0.) for s in STEPS), *((0., s) for s in STEPS), *((s, s) for s in STEPS)]  # right, down


@dataclass(frozen=True)
class ShiftOptions(EvalOptions):
    """Shift."""
    images: int = flag(500, 'in a fixed random order', type=positive_int, metavar='N')
    batch_size: int = flag(50, short='-b', type=positive_int, metavar='N')
    output: Path = flag(Path('output/box_shift'), metavar='DIR')


@torch.no_grad()
def measure(model: Any, x: torch.Tensor, target: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
    """Energy and pointing of each image for each move: (2, moves, B)."""
    size = (x.shape[-2], x.shape[-1])
    prediction = model.forward_patches(x)
    evidence = evidence_along(prediction.contributions.float(), direction(prediction.logits, target))
    heat = patches_to_pixels(evidence, model.patch_boxes(*size), size)
    rows, columns = model.patch_grid(*size)
    step = torch.tensor([size[1] / columns, size[0] / rows]).repeat(2)
    moves = [[truth - step * torch.tensor(move).repeat(2) for truth in boxes] for move in MOVES]
    return torch.stack([torch.stack([measured(heat, moved) for moved in moves])
                        for measured in (EnergyPointing().measure, PointingGame().measure)])


@script
def main(argv: list[str] | None = None) -> int:
    """Measure; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(ShiftOptions, __doc__, argv)
    model, _, boxed, _ = open_patch_model(options)
    if not has_boxes(boxed.dataset) or options.multi_label:
        raise ValueError('--dataset: must have boxes and one label an image')
    order = fixed_order(boxed, options.images)
    loader: Any = DataLoader(
        Subset(boxed, order), options.batch_size, num_workers=options.workers, collate_fn=collate_boxes)
    found = torch.cat([measure(model, x, y, boxes) for x, y, boxes, _ in tqdm(loader, leave=False)], dim=2)
    command = command_line(argv)
    lines = [f'`{options.name}`, {len(order)} images: `{command}`', '',
             '| boxes moved right, down (patches) | energy | difference | pointing | difference |',
             '|---|--:|--:|--:|--:|']
    rows: list[dict[str, Any]] = []
    for i, (right, down) in enumerate(MOVES):
        rows.append({'right': right, 'down': down})
        cells = [f'{right:+g}, {down:+g}' if i else 'where they are']
        for name, values in zip(('energy', 'pointing'), found):
            mean, difference = mean_interval(values[i]), mean_interval(values[i] - values[0])
            rows[-1][name] = {'mean': mean.to_dict()} | ({'difference': difference.to_dict()} if i else {})
            cells += [f'{mean.mean:.3f}', difference.as_difference() if i else '–']
        lines.append(f'| {" | ".join(cells)} |')
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / 'box_shift.json', {
        'model': options.name, 'weights': repr(model.patch_weights), 'images': len(order), 'command': command,
        'moves': rows, **environment()})
    text = '\n'.join(lines) + '\n'
    replace_file(options.output / 'box_shift.md', text.encode())
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
