#!/usr/bin/env python3
"""Our explanations beside Grad-CAM and integrated gradients: same weights, same images, same measures.

    pip install -e '.[train,viz,compare]'
    python train/compare_explanations.py --model local-dir:output/tiny/hub --dataset hfds/data/tiny_imagenet \\
        --images 200 --output output/compare

Each tool explains the image's own label. Its heat map is judged by
  localisation   the smallest square around all pixels hotter than 20 % of the hottest has IoU > 0.5 with a box
  pointing       the hottest pixel lies in a box
  deletion, insertion   areas under the curves of faithfulness.py, patches of our grid by the map's mean over them
  completeness   |sum of the map's parts - logit| / max(1, |logit|): share of images where it is at most 1e-5, median,
                 and worst; for integrated gradients the logit's difference to the baseline (the mean colour), for
                 Grad-CAM the map before ReLU, scaling and upsampling. It does not claim to add up
  ms             wall time per image at --batch-size, tools by turns in changing order, median
"ours" is the lead over the mean of the other classes, "ours, logit alone" the share in the label's own logit, and
"ours, alpha > 0" is localisation by the model's own selection of patches. Localisation and pointing need boxes
(prepare.py). Writes compare.json, .md and .png.
"""
import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import IntegratedGradients
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch.utils.data import DataLoader
from tqdm import tqdm

from boxes import collate_boxes
from flags import add_data_flags, positive_int
from record import command_line, environment, write_json
from timm_lossattn.explanation import explain, square_box
from timm_lossattn.evaluation.faithfulness import completeness_error, deletion_insertion, patch_scores, pointing_game
from timm_lossattn.evaluation.metrics import BoxLocalization
from validate import add_weights_flags, open_boxed

THRESHOLD = 0.2  # of the hottest pixel: B. Zhou et al., "Learning Deep Features for Discriminative Localization"
Explainer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class RawGradCAM(GradCAM):
    """Keeps the map before ReLU, scaling to [0, 1] and upsampling, which alone has the logit's unit."""
    raw: Any = None

    def get_cam_image(self, *args: Any, **kwargs: Any) -> Any:
        self.raw = super().get_cam_image(*args, **kwargs)
        return self.raw


def create_explainers(model: Any, ig_steps: int) -> dict[str, Explainer]:
    """Name -> (images, classes) -> heat maps (B, H, W), their parts (B, ...), and what these should add up to (B,)."""
    def ours(x: torch.Tensor, y: torch.Tensor,
             against: Any = 'rest') -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        explanation = explain(model, x, y, against)
        logits = explanation.prediction.logits
        total = logits.gather(1, y[:, None]).squeeze(1)
        if against == 'rest':
            total = total - (logits.sum(dim=1) - total) / (logits.shape[1] - 1)
        return explanation.pixel_map(explanation.evidence), explanation.evidence, total

    def grad_cam(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with RawGradCAM(model, target_layers=[model.patch_layers]) as cam:  # its hooks go with it
            heat = torch.from_numpy(cam(input_tensor=x, targets=[ClassifierOutputTarget(int(k)) for k in y]))
        return heat, torch.as_tensor(cam.raw), cam.outputs.detach().gather(1, y[:, None]).squeeze(1)

    gradients = IntegratedGradients(model)

    def integrated_gradients(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = gradients.attribute(x, target=y, n_steps=ig_steps, internal_batch_size=len(x)).detach()
        with torch.no_grad():
            logits = model(torch.cat([x, torch.zeros_like(x[:1])]))
        difference = logits[:-1] - logits[-1]
        return parts.sum(dim=1), parts, difference.gather(1, y[:, None]).squeeze(1)

    tools: dict[str, Explainer] = {
        'ours': ours, 'ours, logit alone': partial(ours, against=None), 'Grad-CAM': grad_cam}
    return tools | ({f'integrated gradients ({ig_steps} steps)': integrated_gradients} if ig_steps else {})


def hot_box(heat: torch.Tensor) -> torch.Tensor:
    """(H, W) heat map to (4,): smallest square around all pixels hotter than THRESHOLD of the hottest one.

    Empty if nothing in the map speaks for the class.
    """
    heat = heat.nan_to_num(-torch.inf)
    y, x = torch.nonzero(heat >= THRESHOLD * heat.max(), as_tuple=True)
    if not heat.max() > 0:
        return torch.zeros(4, dtype=torch.long)
    return square_box(torch.stack([x, y, x + 1, y + 1], dim=1), tuple(heat.shape))


def compare(args, model: Any, loader: DataLoader) -> tuple[dict[str, dict[str, float]], list]:
    """Measures of each tool, and (image, boxes, heat maps) of the first images for the picture."""
    explainers = create_explainers(model, args.ig_steps)
    located = {name: BoxLocalization() for name in [*explainers, 'ours, α > 0']}
    collected: dict[str, dict[str, list]] = {
        name: {k: [] for k in ('pointing', 'deletion', 'insertion', 'completeness', 'ms')} for name in explainers}
    shown: list = []
    for turn, (x, y, boxes) in enumerate(tqdm(loader, desc='compare', leave=False, dynamic_ncols=True)):
        first = explain(model, x, y)
        correct = first.prediction.logits.argmax(dim=1) == y
        located['ours, α > 0'].update(first.boxes, boxes, correct)
        maps = {}
        for name, explainer in list(explainers.items())[::1 if turn % 2 else -1]:
            start = time.perf_counter()
            heat, parts, total = explainer(x, y)
            seconds = time.perf_counter() - start
            maps[name] = heat
            found = collected[name]
            if len(x) == args.batch_size:
                found['ms'].append(1000 * seconds / len(x))
            located[name].update(torch.stack([hot_box(one) for one in heat]), boxes, correct)
            where = [i for i, truth in enumerate(boxes) if len(truth)]
            if where:
                found['pointing'] += (100 * pointing_game(heat[where], [boxes[i] for i in where])).tolist()
            if args.deletion:
                scores = patch_scores(heat, first.patch_boxes)
                deletion, insertion = deletion_insertion(model, x, scores, y, first.patch_boxes)
                found['deletion'] += deletion.tolist()
                found['insertion'] += insertion.tolist()
            found['completeness'] += completeness_error(parts, total).tolist()
        shown += [(x[i], boxes[i], int(y[i]), {n: maps[n][i] for n in explainers}) for i in range(len(x))]
        shown = shown[:args.rows]
    result: dict[str, dict[str, float]] = {}
    for name, metric in located.items():
        result[name] = {k: float(v) for k, v in metric.compute().items()} if metric.images else {}
        if name in collected:
            errors = collected[name].pop('completeness')
            result[name] |= {
                'complete': 100 * statistics.mean(error <= 1e-5 for error in errors),
                'completeness_median': statistics.median(errors), 'completeness_worst': max(errors)}
            for measure, values in collected[name].items():
                if values:
                    result[name][measure] = statistics.median(values) if measure == 'ms' else statistics.mean(values)
    return result, shown


def draw(shown: list, data_config: dict[str, Any], labels: list[str], file: Path) -> None:
    """A row for each image: the image with its boxes, then each tool's heat map over it."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle
    names = list(shown[0][3])
    figure, axes = plt.subplots(len(shown), 1 + len(names), figsize=(2.3 * (1 + len(names)), 2.4 * len(shown) + 0.4),
                                squeeze=False, layout='constrained')
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    for row, (x, boxes, y, maps) in zip(axes, shown):
        image = (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        row[0].imshow(image)
        row[0].set_title(labels[y], fontsize=10, parse_math=False)
        for x0, y0, x1, y1 in boxes.tolist():
            for ax in row:
                ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor='#E69F00', lw=2))
        for ax, name in zip(row[1:], names):
            heat = maps[name].numpy()
            limit = float(abs(maps[name].nan_to_num(0.)).max()) or 1.
            ax.imshow(image.mean(axis=2), cmap='gray', alpha=0.6)
            ax.imshow(heat, cmap='PuOr_r', vmin=-limit, vmax=limit, alpha=0.65)
            if ax in axes[0]:
                ax.set_title(name, fontsize=10)
        for ax in row:
            ax.set(xticks=[], yticks=[])
    figure.supxlabel(
        'brown: for the label, purple: against it, each map scaled by itself'
        + ('; orange: true box' if any(len(boxes) for _, boxes, *_ in shown) else ''), fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def markdown(result: dict[str, dict[str, float]], images: int, batch_size: int, command: str) -> str:
    """The table."""
    columns = {'localization_ap': 'localisation ↑ (%)', 'pointing': 'pointing ↑ (%)', 'deletion': 'deletion ↓',
               'insertion': 'insertion ↑', 'complete': 'complete ↑ (%)', 'completeness_median': 'error, median ↓',
               'completeness_worst': 'error, worst ↓', 'ms': 'ms/image ↓'}
    columns = {key: title for key, title in columns.items() if any(key in row for row in result.values())}
    lines = [f'{images:,} images, batch size {batch_size}: `{command}`', '',
             '| | ' + ' | '.join(columns.values()) + ' |', '|---|' + '--:|' * len(columns)]
    for name, row in result.items():
        if row:
            lines.append(f'| {name} | ' + ' | '.join(f'{row[c]:.3g}' if c in row else '–' for c in columns) + ' |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> int:
    """Compare; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_data_flags(parser)
    add_weights_flags(parser)
    parser.add_argument('--images', type=positive_int, default=200, metavar='N', help='in a fixed random order')
    parser.add_argument('-b', '--batch-size', type=positive_int, default=20, metavar='N')
    parser.add_argument('--ig-steps', type=int, default=50, metavar='N', help='of integrated gradients; 0: without')
    parser.add_argument('--deletion', action=argparse.BooleanOptionalAction, default=True,
                        help='deletion and insertion: 2 (M + 1) forward passes for each image and tool')
    parser.add_argument('--rows', type=positive_int, default=6, metavar='N', help='images in the picture')
    parser.add_argument('--output', type=Path, default=Path('output/compare'), metavar='DIR')
    parser.set_defaults(distributed=False, rank=0, world_size=1, device='cpu')
    args = parser.parse_args(argv)
    try:
        if args.multi_label:
            raise ValueError('--multi-label: each image must have one label to explain')
        model, data_config, boxed, labels = open_boxed(args)
    except (ValueError, OSError) as error:
        print('error: ' + ' '.join(str(error).split()), file=sys.stderr)
        return 2
    order = torch.randperm(len(boxed), generator=torch.Generator().manual_seed(0))[:args.images].tolist()
    loader = DataLoader(torch.utils.data.Subset(boxed, order), args.batch_size, collate_fn=collate_boxes)
    result, shown = compare(args, model, loader)
    args.output.mkdir(parents=True, exist_ok=True)
    command = command_line(argv)
    text = markdown(result, len(order), args.batch_size, command)
    (args.output / 'compare.md').write_text(text)
    write_json(args.output / 'compare.json', {
        'model': args.model, 'images': len(order), 'batch_size': args.batch_size, 'tools': result,
        'command': command, **environment('cpu', 1)})
    draw(shown, data_config, labels, args.output / 'compare.png')
    print(f'{text}\n{args.output}/compare.json, .md, .png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
