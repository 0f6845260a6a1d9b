#!/usr/bin/env python3
"""Do the boxes of the patches lie where the evidence comes from? Asked by images and their mirror images.

    python train/mirror_images.py --model lossattn.tf_efficientnet_lite0 --xi 1 --dataset hfds/data/imagenette_val500 \\
        --crop-pct 1 --output output/mirror_images

A patch's box is an equal part of the image, but the padding of strided layers puts the middle of what a position can
read up to half a patch beside it. A patch whose box lies at c, but which reads at c + d, shows what is at t at t − d;
in the mirror image, mirrored back, at t + d. So half of the distance between the mean positions of both maps,

    d = ½ (mean position in the mirror image, mirrored back − mean position in the image),

is how far the evidence comes from beside the boxes, wherever the objects lie. It is 0 for a model whose map of a
mirror image is the mirrored map. A map that lies everywhere hardly moves with what it shows: how far the mean
position moves when the image moves by half a box says how much of d is seen. Maps are the positive evidence for the
lead of the image's label over its rivals, and α. Upside down the same is asked of images that most models have not
seen in training: top-1 says what that does to them. Writes FILE.json and FILE.md with bootstrap intervals over
images, 95 %.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from lib.boxes import boxed_loader, fixed_order, open_patch_model
from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.markdown import markdown_table
from lib.options import EvalOptions
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.explanation.evidence import direction, evidence_along
from timm_lossattn.files import replace_file, write_json

try:
    from timm_lossattn.evaluation.intervals import mean_interval
except ImportError:
    need('compare', 'scipy')
    raise

AXES = {'right': 0, 'down': 1}  # x and y: index in a position


@dataclass(frozen=True)
class MirrorOptions(EvalOptions):
    """Mirror images."""
    images: int = flag(500, 'in a fixed random order', type=positive_int, metavar='N')
    batch_size: int = flag(50, short='-b', type=positive_int, metavar='N')
    output: Path = flag(Path('output/mirror_images'), 'without extension', metavar='FILE')


@torch.no_grad()
def mean_positions(model: Any, x: torch.Tensor, target: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of positive evidence and of α, in pixels (B, 2), NaN without any; whether the label is the top class, (B,)."""
    prediction = model.forward_patches(x)
    evidence = evidence_along(prediction.contributions.float(), direction(prediction.logits, target))
    boxes = model.patch_boxes(*x.shape[-2:]).double()
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    weights = {'evidence': evidence.clamp(min=0).double(), 'α': prediction.alpha.double()}
    return ({name: w @ middles / w.sum(dim=1, keepdim=True) for name, w in weights.items()},
            prediction.logits.argmax(dim=1) == target)


def offsets(model: Any, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name, (B,): offsets and moves in pixels, and which images and mirror images the model is right about."""
    own, right = mean_positions(model, x, target)
    found = {'top1': right.float()}
    for name, axis in AXES.items():
        size, half = x.shape[-1 - axis], half_box(model, x, axis)
        border = (half, 0, 0, 0) if axis == 0 else (0, 0, half, 0)
        moved, _ = mean_positions(model, F.pad(x, border, mode='replicate')[..., :x.shape[-2], :x.shape[-1]], target)
        mirrored, right = mean_positions(model, x.flip(-1 - axis), target)
        found[f'top1, {name}'] = right.float()
        for kind, position in own.items():
            found[f'{kind}, {name}'] = (size - mirrored[kind][:, axis] - position[:, axis]) / 2
            found[f'{kind}, moved {name}'] = moved[kind][:, axis] - position[:, axis]
    return found


def half_box(model: Any, x: torch.Tensor, axis: int) -> int:
    """Half of the width of a patch's box in images x, or of its height."""
    box = model.patch_boxes(*x.shape[-2:])[0].tolist()
    return (box[2 + axis] - box[axis]) // 2


@script
def main(argv: list[str] | None = None) -> int:
    """Measure; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(MirrorOptions, __doc__, argv)
    if options.multi_label:
        raise ValueError('--multi-label: an image must have one label here')
    model, _, boxed, _ = open_patch_model(options)
    order = fixed_order(boxed, options.images)
    loader = boxed_loader(Subset(boxed, order), options)
    batches = []
    for x, y, *_ in tqdm(loader, leave=False, dynamic_ncols=True):
        batches.append(offsets(model, x, y))
    half = [half_box(model, x, axis) for axis in AXES.values()]
    found = {name: mean_interval(torch.cat([batch[name] for batch in batches])) for name in batches[0]}
    command = command_line(argv)
    rows = []
    for name, axis in AXES.items():
        cells = [name, f'{100 * found[f"top1, {name}"].mean:.1f} %']
        for kind in ('evidence', 'α'):
            cells += [f'{found[f"{kind}, {name}"]:+.1f}', f'{found[f"{kind}, moved {name}"]:+.1f} of {half[axis]}']
        rows.append(cells)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output.with_name(f'{options.output.name}.json'), {
        'model': options.name, 'weights': repr(model.patch_weights), 'images': len(order), 'command': command,
        **{name: mean.to_dict() for name, mean in found.items()}, **environment()})
    text = '\n'.join([
        f'`{options.name}`, {len(order):,} images, top-1 {100 * found["top1"].mean:.1f} %: `{command}`', '',
        *markdown_table(['pixels', 'top-1 of mirror images', 'evidence beside its boxes',
                         'with an image that moves it moves', 'α beside its boxes', 'α moves'], rows)]) + '\n'
    replace_file(options.output.with_name(f'{options.output.name}.md'), text.encode())
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
