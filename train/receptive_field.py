#!/usr/bin/env python3
"""How much of the image a patch really sees: its effective receptive field beside its nominal box.

    python train/receptive_field.py --model resnet18_lossattn_conv_nano --dataset hfds/uoft-cs/cifar10 \\
        --input-key img --val-split test --output output/receptive_field

A patch's logit depends on more pixels than the box that is drawn for it: the backbone's 3×3 convolutions reach further.
As W. Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", we take the
gradient of one patch's outputs with respect to the input, here of its logit for the predicted class,

    G(x, y) = mean over images of  Σ_channels |∂ p_mk / ∂ image(x, y)|

for the patch in the middle of the grid, and report the share of ΣG inside the nominal box, the side of the squares
around the patch's centre that hold half and 90 % of it, and the share of pixels with any influence at all. Writes
receptive_field.png and .json.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from lib.boxes import boxed_loader, fixed_order, open_patch_model
from lib.flags import flag, parse, positive_int
from lib.options import EvalOptions
from lib.plots import draw_box, panels, save
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.evaluation.receptive_field import influence, middle_patch, share_in_box, side_for, square_shares
from timm_lossattn.files import write_json

NOMINAL_COLOR, HALF_COLOR, MOST_COLOR = '#E69F00', '#56B4E9', '#CC79A7'  # Okabe & Ito


@dataclass(frozen=True)
class FieldOptions(EvalOptions):
    """Receptive field."""
    images: int = flag(500, 'in a fixed random order', type=positive_int, metavar='N')
    batch_size: int = flag(50, short='-b', type=positive_int, metavar='N')
    output: Path = flag(Path('output/receptive_field'), metavar='DIR')


def draw(field: torch.Tensor, box: list[int], shares: dict[int, float], result: dict[str, Any], file: Path) -> None:
    """The influence of each pixel with the squares, and the share by the side of a square."""
    figure, ((left, right),) = panels(1, 2, 10, 4.2)
    image = left.imshow((field / field.max()).numpy(), cmap='viridis', vmin=0, vmax=1)
    figure.colorbar(image, ax=left, label='influence on the patch (largest = 1)')
    x0, y0, x1, y1 = box
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    right.plot(list(shares), [100 * share for share in shares.values()], color='#0072B2', lw=2, marker='.')
    for name, color, style, side in (
            ('nominal box', NOMINAL_COLOR, '-', x1 - x0),
            ('half of the influence', HALF_COLOR, '--', result['side_half']),
            ('90 % of it', MOST_COLOR, ':', result['side_90'])):
        draw_box(left, (cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2), color, style, name)
        right.axvline(side, color=color, lw=2.5, linestyle=style,
                      label=f'{name}: {side} pixels, {100 * shares[side]:.0f} %')
    left.set(xlabel='pixel', ylabel='pixel', title='What one patch sees', xlim=(-0.5, field.shape[1] - 0.5),
             ylim=(field.shape[0] - 0.5, -0.5))
    right.set(xlabel="side of a square around the patch's centre (pixels)", ylabel='share of the influence (%)',
              ylim=(0, 102), title=f'{result["model"]}, {result["images"]} images')
    right.grid(alpha=0.3)
    right.legend(loc='lower right', fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    save(figure, file)


@script
def main(argv: list[str] | None = None) -> int:
    """Measure; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(FieldOptions, __doc__, argv)
    model, _, dataset, _ = open_patch_model(options)
    order = fixed_order(dataset, options.images)
    total: Any = 0.
    loader = boxed_loader(Subset(dataset, order), options)
    for x, *_ in tqdm(loader, leave=False):
        patch, box = middle_patch(model, *x.shape[-2:])
        total = total + influence(model, x, patch).double().sum(dim=0)
    x0, y0, x1, y1 = box
    shares = square_shares(total, box)
    result: dict[str, Any] = {
        'model': options.name, 'images': len(order), 'input_size': list(x.shape[-2:]), 'patch_box': box,
        'share_in_patch_box': share_in_box(total, box),
        'side_half': side_for(shares, 0.5), 'side_90': side_for(shares, 0.9),
        'pixels_with_influence': float((total > 0).double().mean()), 'share_by_side': shares,
        'command': command_line(argv), **environment()}
    draw(total, box, shares, result, options.output / 'receptive_field.png')
    write_json(options.output / 'receptive_field.json', result)
    inside, some = 100 * result['share_in_patch_box'], 100 * result['pixels_with_influence']
    print(f'{options.name}: the patch box, {x1 - x0} × {y1 - y0} pixels, holds {inside:.1f} % of the influence; '
          f'squares with half of it and with 90 % have sides of {result["side_half"]} and {result["side_90"]} pixels; '
          f'{some:.0f} % of all pixels have some.\n{options.output}/receptive_field.png, .json')
    return 0


if __name__ == '__main__':
    sys.exit(main())
