#!/usr/bin/env python3
"""Loss attention in ImageNet models without training, against the models as they are: accuracy and confidence.

    python train/compare_pools.py --models tf_efficientnet_lite0 --dataset hfds/data/imagenette_val500 --workers 0

For each model, features are computed once; the stock head (mean pooling) and loss attention at each ξ read them.
*gained* and *lost* are images that loss attention gets right and the stock model wrong, and the other way round; p is
that of the exact two-sided McNemar test (binomial on those images), intervals of differences to the stock model are
paired bootstraps over images. *confidence*: mean probability of the predicted class, where it is right and where it is
wrong. *calibration error*: of that probability, in 15 bins (M. Naeini et al., AAAI 2015; torchmetrics). *log loss*: of
the true class; *at T*: with all logits divided by one number, chosen on the other half of the images (C. Guo et al.,
ICML 2017). Writes pools.json, with what every image got, and pools.md.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lib.boxes import boxed_loader, open_boxed
from lib.data import input_config
from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.markdown import markdown_table
from lib.options import DataOptions
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn import load_model, loss_attention
from timm_lossattn.files import replace_file, write_json
from timm_lossattn.models.probe import split_patches

try:
    from scipy.optimize import minimize_scalar
    from scipy.stats import binomtest
    from torchmetrics.functional.classification import binary_calibration_error

    from timm_lossattn.evaluation.intervals import Interval, mean_interval
except ImportError:
    need('train,compare', 'torchmetrics', 'scipy')
    raise

XIS = (0., 0.1, 0.5, 1.)
BINS = 15
LOSSES = ('log_loss', 'log_loss_at_t')


@dataclass(frozen=True)
class PoolOptions(DataOptions):
    """Comparison."""
    models: list[str] = flag([], 'timm models as they are', nargs='+', metavar='NAME', required=True)
    batch_size: int = flag(50, short='-b', type=positive_int, metavar='N')
    output: Path = flag(Path('output/pools'), metavar='DIR')


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of so many gains and losses, if both were as likely."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.


def temperature(logits: torch.Tensor, y: torch.Tensor) -> float:
    """What to divide (B, K) logits by for the smallest log loss."""
    found: Any = minimize_scalar(
        lambda log_t: float(cross_entropy(logits / math.exp(log_t), y)), bounds=(-3, 3), method='bounded')
    return math.exp(found.x)


def losses_at_temperature(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Log loss (B,) of (B, K) logits, divided by what is best for the other half; halves are every second image."""
    losses = torch.empty(len(y), dtype=logits.dtype)
    for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        losses[own] = cross_entropy(logits[own] / temperature(logits[other], y[other]), y[own], reduction='none')
    return losses


@torch.inference_mode()
def compare(name: str, options: PoolOptions) -> dict[str, Any]:
    """What every image gets from the stock model and at each ξ, and the share of patches without weight."""
    stock: Any = load_model(name)
    models = {xi: loss_attention(stock, xi=xi) for xi in XIS}
    dataset = open_boxed(options, stock.num_classes, input_config(options, stock))
    loader = boxed_loader(dataset, options)
    found: dict[str, list[torch.Tensor]] = {key: [] for key in ('stock', *map(str, XIS))}
    labels: list[torch.Tensor] = []
    zero = dict.fromkeys(XIS, 0.)
    for x, y, *_ in tqdm(loader, desc=name, leave=False, dynamic_ncols=True):
        features = stock.forward_features(x)
        labels.append(y)
        found['stock'].append(stock.forward_head(features))
        for xi, model in models.items():
            h = split_patches(features, model.patch_layout, model.patch_prefix)
            alpha = model.patch_weights(h, model.logits_of_patches(h))
            zero[xi] += float((alpha == 0).double().mean(1).sum())
            found[str(xi)].append(model.forward_head(features))
    y = torch.cat(labels)
    zero_patches = {'stock': 0., **{str(xi): 100 * zero[xi] / len(y) for xi in XIS}}
    logits = {key: torch.cat(parts).double() for key, parts in found.items()}
    images = {key: judged(z, y) for key, z in logits.items()}
    return {'rows': {key: row(image, images['stock']) | {
                'zero_patches': zero_patches[key], 'temperature': temperature(logits[key], y)}
                     for key, image in images.items()},
            'images': {key: {  # as text: a line for each number would be 600 kB
                'right': ''.join('01'[int(v)] for v in image['right']),
                **{name: ' '.join(f'{v:.4f}' for v in image[name]) for name in ('confidence', 'log_loss')},
            } for key, image in images.items()}}


def judged(logits: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each image (B,): whether it is right, how sure, and its log losses. Logits (B, K), labels (B,)."""
    confidence, predicted = logits.softmax(1).max(1)
    return {'right': (predicted == y).double(), 'confidence': confidence,
            'log_loss': cross_entropy(logits, y, reduction='none'), 'log_loss_at_t': losses_at_temperature(logits, y)}


def row(image: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Means over images, and differences to the stock model with their intervals."""
    change = image['right'] - stock['right']
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return {
        'top1': 100 * float(image['right'].mean()), 'difference': mean_interval(100 * change).to_dict(),
        'gained': gained, 'lost': lost, 'p': mcnemar(gained, lost),
        'confidence': {name: 100 * float(image['confidence'][chosen].mean()) for name, chosen in (
            ('right', image['right'] > 0), ('wrong', image['right'] == 0))},
        'calibration_error': 100 * float(
            binary_calibration_error(image['confidence'], image['right'].long(), BINS)),
        **{key: float(image[key].mean()) for key in LOSSES},
        **{f'{key}_difference': mean_interval(image[key] - stock[key]).to_dict() for key in LOSSES}}


def markdown(result: dict[str, Any]) -> str:
    """Two tables: accuracy, and confidence."""
    rows = [([f'`{name}`', 'mean (stock)'] if key == 'stock' else ['', f'ξ = {float(key):g}'], key != 'stock', found)
            for name, model in result['models'].items() for key, found in model['rows'].items()]

    def difference(found: dict[str, Any], key: str, form: str) -> str:
        return f'{Interval.from_dict(found[key]):{form}}'

    accuracy = [
        [*name, f'{found["top1"]:.1f}',
         *([difference(found, 'difference', '+.1f'), f'{found["gained"]} / {found["lost"]}', f'{found["p"]:.2f}']
           if changed else '–––'),
         f'{found["zero_patches"]:.0f}'] for name, changed, found in rows]
    confidence = [
        [*name, f'{found["confidence"]["right"]:.0f}', f'{found["confidence"]["wrong"]:.0f}',
         f'{found["calibration_error"]:.1f}', *(cell for key in LOSSES for cell in (
             f'{found[key]:.3f}', difference(found, f'{key}_difference', '+.3f') if changed else '–')),
         f'{found["temperature"]:.2f}'] for name, changed, found in rows]
    return '\n'.join([
        f'{result["images"]} images, timm {timm.__version__}: `{result["command"]}`', '',
        *markdown_table(['model', 'pooling', 'top-1 (%)', 'difference, 95 %', 'gained / lost', 'p',
                         'patches at zero (%)'], accuracy, 'llrrrrr'), '',
        *markdown_table(['model', 'pooling', 'confidence, right (%)', 'wrong (%)', 'calibration error (%)', 'log loss',
                         'difference, 95 %', 'log loss at T', 'difference, 95 %', 'T'], confidence, 'llrrrrrrrr'), ''])


@script
def main(argv: list[str] | None = None) -> int:
    """Compare; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(PoolOptions, __doc__, argv)
    if options.multi_label:
        raise ValueError('--multi-label: images have one class each here')
    models = {name: compare(name, options) for name in options.models}
    result = {
        'command': command_line(argv), **environment(),
        'images': len(models[options.models[0]]['images']['stock']['right']), 'models': models}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / 'pools.json', result)
    replace_file(options.output / 'pools.md', markdown(result).encode())
    print(markdown(result))
    return 0


if __name__ == '__main__':
    sys.exit(main())
