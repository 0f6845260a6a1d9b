#!/usr/bin/env python3
"""What explain() costs beside the stock model's own forward pass, and beside Grad-CAM.

    python train/explain_cost.py --model tf_efficientnet_lite0 --target-layer bn2
    python train/explain_cost.py --model vit_small_patch16_224 --model-kwargs global_pool=avg \\
        --target-layer blocks.11.norm1

All run by turns in one process, in an order that turns round each time; ratios are medians of the ratios within a turn.
On a busy machine trust the ratios, not the times. Weights are random: they do not change the work. "map" adds the heat
map in the input's resolution, which Grad-CAM always makes.
"""
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs

from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.process import default_device
from lib.record import command_line, environment, print_table
from lib.script import script
from lib.timing import by_turns, ratio
from timm_lossattn import explain, loss_attention
from timm_lossattn.files import write_json
from timm_lossattn.loading import check_name
from timm_lossattn.models.probe import split_patches

try:
    from pytorch_grad_cam import GradCAM
except ImportError:
    need('train,compare', 'pytorch_grad_cam')
    raise


@dataclass(frozen=True)
class CostOptions:
    """Cost."""
    model: str = flag('tf_efficientnet_lite0', 'stock timm model', metavar='NAME')
    model_kwargs: dict[str, Any] = flag({}, nargs='*', action=ParseKwargs, metavar='KEY=VALUE')
    target_layer: str = flag('bn2', 'of Grad-CAM', metavar='NAME')
    batch_size: int = flag(8, short='-b', type=positive_int, metavar='N')
    warmup: int = flag(2, metavar='N')
    repeats: int = flag(15, type=positive_int, metavar='N')
    device: str = flag(default_device())
    json: Path | None = flag(None, metavar='FILE')


def measure(options: CostOptions) -> dict[str, Any]:
    """Median milliseconds of a batch, and ratios."""
    torch.manual_seed(0)
    check_name(options.model)
    model: Any = timm.create_model(options.model, **options.model_kwargs).eval().to(options.device)
    if options.target_layer not in dict(model.named_modules()):
        raise ValueError(f'--target-layer: {options.model} has no layer {options.target_layer!r}; on top it has '
                         f'{", ".join(name for name, _ in model.named_children())}')
    x = torch.randn(options.batch_size, *model.default_cfg['input_size'], device=options.device)
    patches, averaged = loss_attention(model), loss_attention(model, pool='avg')
    rows, cols = patches.patch_grid(*x.shape[-2:])

    def tokens_to_map(tokens: torch.Tensor) -> torch.Tensor:
        return split_patches(tokens, 'NLC', patches.patch_prefix).transpose(1, 2).unflatten(2, (rows, cols))

    def forward() -> None:
        with torch.inference_mode():
            model(x)

    def explain_with_map() -> None:
        explanation = explain(patches, x)
        explanation.pixel_map(explanation.evidence)

    def grad_cam() -> None:
        with GradCAM(model, [model.get_submodule(options.target_layer)],
                     reshape_transform=tokens_to_map if patches.patch_layout == 'NLC' else None) as cam:
            cam(input_tensor=x, targets=None)  # the predicted classes, as explain

    seconds = by_turns({
        'forward': forward, 'explain': lambda: explain(patches, x), 'explain_stock': lambda: explain(averaged, x),
        'explain_map': explain_with_map, 'grad_cam': grad_cam},
        options.warmup, options.repeats, options.device)
    result: dict[str, Any] = {
        'batch_size': options.batch_size, 'img_size': x.shape[-1], 'patches': rows * cols, 'kind': patches.patch_kind}
    result |= {f'{name}_ms': 1000 * statistics.median(times) for name, times in seconds.items()}
    for name in ('explain', 'explain_stock', 'explain_map'):
        result[f'{name}_over_forward'] = ratio(seconds, name, 'forward')
        result[f'grad_cam_over_{name}'] = ratio(seconds, 'grad_cam', name)
    return result


@script
def main(argv: list[str] | None = None) -> int:
    """Measure; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(CostOptions, __doc__, argv)
    result = measure(options)
    print_table(options.model, result)
    if options.json:
        write_json(options.json, {
            'model': options.model, **options.model_kwargs, 'target_layer': options.target_layer, **result,
            'command': command_line(argv), **environment(options.device)})
    return 0


if __name__ == '__main__':
    sys.exit(main())
