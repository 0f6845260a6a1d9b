#!/usr/bin/env python3
"""How exactly contributions add up to the logits, in each precision.

    python train/additive_error.py --model resnet18_lossattn_conv_nano --dataset hfds/data/cifar10 --input-key img \\
        --val-split test --images 1000

error: |Σ_m contributions − logits| / max(1, |logit|), the logits those of the model's forward, over all images and
classes: median and largest. agreement: share
of images with the same top class as in float64. Writes FILE.json and FILE.md.
"""
import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from lib.boxes import boxed_loader, fixed_order, open_patch_model
from lib.flags import flag, parse, positive_int
from lib.markdown import markdown_table
from lib.options import EvalOptions
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.files import replace_file, write_json

PRECISIONS = {  # title -> dtype of parameters and images, dtype of autocast
    'float64': (torch.float64, None), 'float32': (torch.float32, None),
    'bfloat16 autocast': (torch.float32, torch.bfloat16),
    'bfloat16': (torch.bfloat16, None), 'float16': (torch.float16, None)}


@dataclass(frozen=True)
class ErrorOptions(EvalOptions):
    """Precision."""
    images: int = flag(1000, 'in a fixed random order', type=positive_int, metavar='N')
    batch_size: int = flag(50, short='-b', type=positive_int, metavar='N')
    output: Path = flag(Path('output/additive_error'), 'without extension', metavar='FILE')


@torch.no_grad()
def measure(model: Any, x: torch.Tensor, dtype: torch.dtype, autocast: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors (B, K) and top classes (B,)."""
    with torch.autocast('cpu', autocast) if autocast else nullcontext():
        out, logits = model.forward_patches(x.to(dtype)), model(x.to(dtype)).double()
    errors = (out.contributions.double().sum(dim=1) - logits).abs() / logits.abs().clamp(min=1)
    return errors, logits.argmax(dim=1)


@script
def main(argv: list[str] | None = None) -> int:
    """Measure; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(ErrorOptions, __doc__, argv)
    model, _, boxed, _ = open_patch_model(options)
    models = {name: copy.deepcopy(model).to(dtype) for name, (dtype, _) in PRECISIONS.items()}
    order = fixed_order(boxed, options.images)
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in PRECISIONS}
    loader = boxed_loader(Subset(boxed, order), options)
    for x, *_ in tqdm(loader, leave=False, dynamic_ncols=True):
        for name, precision in PRECISIONS.items():
            found[name].append(measure(models[name], x, *precision))
    top = torch.cat([best for _, best in found['float64']])
    rows = {}
    for name, batches in found.items():
        errors = torch.cat([e for e, _ in batches]).flatten()
        agreement = (torch.cat([best for _, best in batches]) == top).double().mean()
        rows[name] = {'median': float(errors.median()), 'largest': float(errors.max()),
                      'agreement': float(agreement)}
    command = command_line(argv)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output.with_name(f'{options.output.name}.json'), {
        'model': options.name, 'images': len(order), 'command': command, 'precisions': rows, **environment()})
    text = '\n'.join([f'`{options.name}`, {len(order):,} images: `{command}`', '', *markdown_table(
        ['precision', 'error, median', 'largest', 'same top class'],
        [[name, f'{row["median"]:.1e}', f'{row["largest"]:.1e}', f'{100 * row["agreement"]:.1f} %']
         for name, row in rows.items()])]) + '\n'
    replace_file(options.output.with_name(f'{options.output.name}.md'), text.encode())
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
