#!/usr/bin/env python3
"""The paper's Figures 4, 5 and 6, from any trained patch model and a dataset with boxes.

    python train/figures.py --figure 4 --model local-dir:output/tiny/hub --dataset hfds/data/tiny_imagenet

Figure 4: what each patch adds to the label's lead over the other classes (multi-label: to its logit), as a heat map.
Figure 5: the selected patches, brighter the larger their weight. Figure 6: the estimated box and the true ones, with
their IoU. Images are the first --images that the model classifies correctly, in a fixed random order. Figures 4 and 5
need no boxes.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

from flags import add_data_flags, positive_int
from timm_lossattn.explanation import Explanation, explain
from timm_lossattn.evaluation.metrics import box_iou
from validate import add_weights_flags, open_boxed

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

TRUE_COLOR, ESTIMATED_COLOR = '#56B4E9', '#E69F00'  # Okabe & Ito
TITLES = {
    4: 'Evidence for the label: brown for, purple against, each image scaled by itself',
    5: 'Selected patches: brighter where the weight α is larger, black where nothing is selected',
    6: 'Estimated box (orange, dashed) and true box (blue), with their IoU',
}


def draw_panel(figure: int, ax: Any, image: Any, explanation: Explanation, boxes: torch.Tensor) -> None:
    """One image of the figure.

    Args:
        figure: 4, 5 or 6.
        ax: axes to draw into.
        image: (H, W, 3) in [0, 1].
        explanation: of this image alone.
        boxes: (L, 4) true boxes.
    """
    if figure == 4:
        heat = explanation.pixel_map(explanation.evidence)[0]
        limit = float(heat.nan_to_num(0.).abs().max()) or 1.
        ax.imshow(image.mean(axis=2), cmap='gray', vmin=0, vmax=1, alpha=0.6)
        ax.imshow(heat.numpy(), cmap='PuOr_r', vmin=-limit, vmax=limit, alpha=0.65)
    elif figure == 5:
        weight = explanation.pixel_map(explanation.prediction.alpha * explanation.selected)[0].nan_to_num(0.)
        ax.imshow(image * (weight / weight.max()).sqrt().numpy()[..., None])
    else:
        ax.imshow(image)
        estimated = explanation.boxes
        for color, style, box in [*((TRUE_COLOR, '-', b) for b in boxes), (ESTIMATED_COLOR, '--', estimated[0])]:
            x0, y0, x1, y1 = box.tolist()
            ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=color, lw=2.5,
                                   linestyle=style, clip_on=False))
        ax.set_xlabel(f'IoU {float(box_iou(estimated, boxes).max()):.2f}', fontsize=9)


def main(argv: list[str] | None = None) -> int:
    """Draw; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_data_flags(parser)
    parser.add_argument('--figure', type=int, required=True, choices=(4, 5, 6))
    add_weights_flags(parser)
    parser.add_argument('--images', type=positive_int, default=12, metavar='N')
    parser.add_argument('--columns', type=positive_int, default=6, metavar='N')
    parser.add_argument('--output', type=Path, metavar='FILE', help='default: output/figureN.png')
    parser.set_defaults(distributed=False, rank=0, world_size=1, device='cpu', batch_size=1)
    args = parser.parse_args(argv)
    try:
        model, config, boxed, labels = open_boxed(args)
    except (ValueError, OSError) as error:
        print('error: ' + ' '.join(str(error).split()), file=sys.stderr)
        return 2
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    chosen: list = []
    for index in torch.randperm(len(boxed), generator=torch.Generator().manual_seed(0)).tolist():
        x, y, boxes = boxed[index]
        explanation = explain(model, x[None], multi_label=args.multi_label)
        k = int(explanation.target)
        right = k == y if isinstance(y, int) else bool(y[k] > 0.5)  # multi-label: (K,)
        if right and (len(boxes) or args.figure != 6):
            chosen.append(((x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), k, boxes, explanation))
        if len(chosen) == args.images:
            break
    if not chosen:
        print('error: --model: no image (Figure 6: none with boxes) is classified correctly', file=sys.stderr)
        return 2
    rows = -(-len(chosen) // args.columns)
    picture, axes = plt.subplots(
        rows, args.columns, figsize=(1.9 * args.columns, 2.25 * rows + 0.4), squeeze=False, layout='constrained')
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_axis_off()
    for ax, (image, k, boxes, explanation) in zip(axes.flat, chosen):
        ax.set_axis_on()
        ax.set_title(labels[k], fontsize=10, parse_math=False)
        draw_panel(args.figure, ax, image, explanation, boxes)
    picture.suptitle(TITLES[args.figure], fontsize=11)
    out = args.output or Path(f'output/figure{args.figure}.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(out, dpi=110)
    print(out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
