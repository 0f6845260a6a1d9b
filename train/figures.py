#!/usr/bin/env python3
"""The paper's Figures 4, 5 and 6, from any trained patch model and a dataset with boxes.

    python train/figures.py --figure 4 --model local-dir:output/tiny/hub --dataset hfds/data/tiny_imagenet

Figure 4: what each patch adds to the label's lead over its rivals (multi-label: to its logit), as a heat map.
Figure 5: the selected patches, brighter the larger their weight. Figure 6: the estimated box and the true ones, with
their IoU. Images are the first --images that the model classifies correctly, in a fixed random order. Figures 4 and 5
need no boxes.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.boxes import fixed_order, open_patch_model
from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.options import EvalOptions
from lib.plots import BLUE, ORANGE, draw_box, images_of, panels, save, show_heat
from lib.script import script
from timm_lossattn.explanation import Explanation, explain

TITLES = {
    4: 'Evidence for the label: brown for, purple against, each image scaled by itself',
    5: 'Selected patches: brighter where the weight α is larger, black where nothing is selected',
    6: 'Estimated box (orange, dashed) and true box (blue), with their IoU',
}


@dataclass(frozen=True)
class FigureOptions(EvalOptions):
    """Figure."""
    figure: int = flag(None, type=int, required=True, choices=(4, 5, 6))
    images: int = flag(12, type=positive_int, metavar='N')
    columns: int = flag(6, type=positive_int, metavar='N')
    output: Path | None = flag(None, 'default: output/figureN.png', metavar='FILE')


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
        show_heat(ax, image, explanation.pixel_map(explanation.evidence)[0])
    elif figure == 5:
        weight = explanation.pixel_map(explanation.prediction.alpha * explanation.selected)[0].nan_to_num(0.)
        ax.imshow(image * (weight / weight.max()).sqrt().numpy()[..., None])
    else:
        from timm_lossattn.evaluation.metrics import box_iou
        ax.imshow(image)
        for box in boxes:
            draw_box(ax, box, BLUE)
        draw_box(ax, explanation.boxes[0], ORANGE, '--')
        ax.set_xlabel(f'IoU {float(box_iou(explanation.boxes, boxes).max()):.2f}', fontsize=9)


@script
def main(argv: list[str] | None = None) -> int:
    """Draw; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(FigureOptions, __doc__, argv)
    need('train', 'torchmetrics')
    model, config, boxed, labels = open_patch_model(options)
    chosen: list = []
    for index in fixed_order(boxed):
        x, y, boxes, _ = boxed[index]
        explanation = explain(model, x[None], multi_label=options.multi_label)
        k = int(explanation.target)
        right = k == y if isinstance(y, int) else bool(y[k] > 0.5)  # multi-label: (K,)
        if right and (len(boxes) or options.figure != 6):
            chosen.append((images_of(x, config), k, boxes, explanation))
        if len(chosen) == options.images:
            break
    if not chosen:
        raise ValueError('--model: no image (Figure 6: none with boxes) is classified correctly')
    rows = -(-len(chosen) // options.columns)
    picture, axes = panels(rows, options.columns, 1.9 * options.columns, 2.25 * rows + 0.4)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_axis_off()
    for ax, (image, k, boxes, explanation) in zip(axes.flat, chosen):
        ax.set_axis_on()
        ax.set_title(labels[k], fontsize=10, parse_math=False)
        draw_panel(options.figure, ax, image, explanation, boxes)
    picture.suptitle(TITLES[options.figure], fontsize=11)
    out = options.output or Path(f'output/figure{options.figure}.png')
    save(picture, out)
    print(out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
