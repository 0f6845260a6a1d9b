#!/usr/bin/env python3
"""Loss attention in ImageNet models without training, against the models as they are: accuracy, image by image.

    python train/compare_pools.py --models tf_efficientnet_lite0 --images FOLDER --output output/pools

FOLDER has a sub-folder for each synset (n01440764, ...); classes are those of ImageNet-1k. For each model, features are
computed once; the stock head (mean pooling) and loss attention at each ξ read them. *gained* and *lost* are images that
loss attention gets right and the stock model wrong, and the other way round; p is that of the exact two-sided McNemar
test (binomial on those images), the interval of the difference a paired bootstrap over images. Writes pools.json,
with the correctness of every image, and pools.md.
"""
import argparse
import math
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from tqdm import tqdm

from lib.record import command_line, environment
from lib.script import script
from timm_lossattn import load_model, loss_attention
from timm_lossattn.evaluation.intervals import Interval, mean_interval
from timm_lossattn.explanation import Preprocessing, input_config, open_image
from timm_lossattn.files import replace_file, write_json
from timm_lossattn.models.probe import split_patches

XIS = (0., 0.1, 0.5, 1.)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of so many gains and losses, if both were as likely."""
    n, k = gained + lost, min(gained, lost)
    return min(1., 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)


@torch.inference_mode()
def compare(name: str, files: list[Path], batch_size: int) -> dict[str, Any]:
    """Correctness of every image with the stock model and with each ξ, and the share of patches without weight."""
    stock: Any = load_model(name)
    models = {xi: loss_attention(stock, xi=xi) for xi in XIS}
    preprocessing = Preprocessing(input_config(stock))
    classes = {synset: k for k, synset in enumerate(ImageNetInfo('imagenet-1k').label_names())}
    correct: dict[str, list[bool]] = {key: [] for key in ('stock', *map(str, XIS))}
    zero = dict.fromkeys(XIS, 0.)
    for start in tqdm(range(0, len(files), batch_size), desc=name, leave=False, dynamic_ncols=True):
        batch = files[start:start + batch_size]
        x = torch.stack([preprocessing(open_image(file)).x for file in batch])
        y = torch.tensor([classes[file.parent.name] for file in batch])
        features = stock.forward_features(x)
        correct['stock'] += (stock.forward_head(features).argmax(1) == y).tolist()
        for xi, model in models.items():
            h = split_patches(features, model.patch_layout, model.patch_prefix)
            alpha = model.patch_weights(h, model.logits_of_patches(h))
            zero[xi] += float((alpha == 0).double().mean(1).sum())
            correct[str(xi)] += (model.forward_head(features).argmax(1) == y).tolist()
    right = {key: torch.tensor(values).float() for key, values in correct.items()}
    rows = {'stock': {'top1': 100 * float(right['stock'].mean())}}
    for xi in XIS:
        difference = right[str(xi)] - right['stock']
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        found = mean_interval(100 * difference)
        rows[str(xi)] = {
            'top1': 100 * float(right[str(xi)].mean()), 'difference': found.mean, 'low': found.low,
            'high': found.high, 'gained': gained, 'lost': lost, 'p': mcnemar(gained, lost),
            'zero_patches': 100 * zero[xi] / len(files)}
    return {'rows': rows, 'correct': {key: ''.join('01'[v] for v in values) for key, values in correct.items()}}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    lines = [f'{result["images"]} images, timm {timm.__version__}: `{result["command"]}`', '',
             '| model | pooling | top-1 (%) | difference, 95 % | gained / lost | p | patches at zero (%) |',
             '|---|---|--:|--:|--:|--:|--:|']
    for name, found in result['models'].items():
        for key, row in found['rows'].items():
            if key == 'stock':
                lines.append(f'| `{name}` | mean (stock) | {row["top1"]:.1f} | – | – | – | 0 |')
                continue
            difference = Interval(row['difference'], row['low'], row['high'], result['images'])
            lines.append(
                f'| | ξ = {float(key):g} | {row["top1"]:.1f} | {difference:+.1f} | {row["gained"]} / {row["lost"]} | '
                f'{row["p"]:.2f} | {row["zero_patches"]:.0f} |')
    return '\n'.join(lines) + '\n'


@script
def main(argv: list[str] | None = None) -> int:
    """Compare; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', required=True, metavar='NAME')
    parser.add_argument('--images', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('-b', '--batch-size', type=int, default=50, metavar='N')
    parser.add_argument('--output', type=Path, default=Path('output/pools'), metavar='DIR')
    args = parser.parse_args(argv)
    files = sorted(file for file in args.images.glob('n*/*') if file.is_file())
    if not files:
        raise ValueError(f'--images: no synset folder with images in {args.images}')
    result = {
        'command': command_line(argv), **environment('cpu', 1), 'images': len(files),
        'models': {name: compare(name, files, args.batch_size) for name in args.models},
        'files': ['/'.join(file.parts[-2:]) for file in files]}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / 'pools.json', result)
    replace_file(args.output / 'pools.md', markdown(result).encode())
    print(markdown(result))
    return 0


if __name__ == '__main__':
    sys.exit(main())
