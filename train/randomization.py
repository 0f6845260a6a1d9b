#!/usr/bin/env python3
"""Cascading randomisation: how fast evidence and α forget, while a model's layers begin anew from the logits downwards.

    python train/randomization.py --model resnet18_lossattn_conv_nano --dataset hfds/data/cifar10 --input-key img \\
        --val-split test --images 200 --output output/randomization

The class, and what it is compared with, stay those of the trained model. A map that does not depend on what was learned
stays the same (rank correlation 1). Writes randomization.json, .md and .png.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.boxes import collate_boxes, fixed_order, open_patch_model
from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.markdown import markdown_table
from lib.options import EvalOptions
from lib.plots import COLORS, panels, save
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.explanation.evidence import direction, evidence_along
from timm_lossattn.files import replace_file, write_json

try:
    from timm_lossattn.evaluation.intervals import mean_interval
    from timm_lossattn.evaluation.randomization import cascading_randomization
except ImportError:
    need('train,compare', 'torchmetrics', 'scipy')
    raise


@dataclass(frozen=True)
class RandomizationOptions(EvalOptions):
    """Randomisation."""
    images: int = flag(200, 'in a fixed random order', type=positive_int, metavar='N')
    seed: int = flag(0, 'of the new parameters')
    output: Path = flag(Path('output/randomization'), metavar='DIR')


@script
def main(argv: list[str] | None = None) -> int:
    """Measure; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(RandomizationOptions, __doc__, argv)
    model, _, boxed, _ = open_patch_model(options)
    order = fixed_order(boxed, options.images)
    x, *_ = collate_boxes([boxed[i] for i in order])
    with torch.no_grad():
        logits = model(x).float()
    v = direction(logits, logits.argmax(dim=1), None if options.multi_label else 'rest')

    @torch.no_grad()
    def evidence(one: Any, images: torch.Tensor) -> torch.Tensor:
        return evidence_along(one.forward_patches(images).contributions.float(), v)

    @torch.no_grad()
    def alpha(one: Any, images: torch.Tensor) -> torch.Tensor:
        return one.forward_patches(images).alpha.float()

    found = {name: cascading_randomization(model, scores, x, options.seed)
             for name, scores in (('evidence', evidence), ('α', alpha))}
    curves = {name: [(layer, mean_interval(rho)) for layer, rho in steps] for name, steps in found.items()}
    command = command_line(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / 'randomization.json', {
        'model': options.name, 'images': len(x), 'seed': options.seed, 'command': command,
        **{name: [{'layer': layer, **mean.to_dict()} for layer, mean in curve] for name, curve in curves.items()},
        **environment()})
    lines = [f'{len(x)} images, rank correlation with the map of the trained model, 95 % interval over images; '
             f'`{command}`', '', *markdown_table(
                 ['', 'after the classifier', 'half of the layers', 'all layers'],
                 [[name, *(str(mean) for _, mean in (curve[0], curve[len(curve) // 2], curve[-1]))]
                  for name, curve in curves.items()])]
    text = '\n'.join(lines) + '\n'
    replace_file(options.output / 'randomization.md', text.encode())
    figure, ((ax,),) = panels(1, 1, 8, 4)
    for (name, curve), color in zip(curves.items(), COLORS):
        ax.plot(range(len(curve) + 1), [1.] + [mean.mean for _, mean in curve], color=color, lw=2, label=name)
        ax.fill_between(range(1, len(curve) + 1), [mean.low for _, mean in curve], [mean.high for _, mean in curve],
                        color=color, alpha=0.2)
    ax.axhline(0, color='grey', lw=1)
    ax.set(xlabel='layers that began anew, from the logits downwards', ylabel='rank correlation', ylim=(-1, 1.05),
           title=f'{options.name}, {len(x)} images')
    ax.legend(frameon=False)
    save(figure, options.output / 'randomization.png')
    print(f'{text}\n{options.output}: randomization.json, .md, .png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
