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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from lib.boxes import collate_boxes, open_patch_model
from lib.extras import need
from lib.flags import flag, parse, positive_int
from lib.options import EvalOptions
from lib.plots import ORANGE, draw_box, images_of, panels, save, show_heat
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.evaluation.faithfulness import completeness_error, deletion_insertion, patch_scores, pointing_game
from timm_lossattn.explanation import explain, square_box
from timm_lossattn.files import replace_file, write_json

try:
    from captum.attr import IntegratedGradients
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from timm_lossattn.evaluation.metrics import BoxLocalization
except ImportError:
    need('train,compare', 'torchmetrics', 'captum', 'pytorch_grad_cam')
    raise

THRESHOLD = 0.2  # of the hottest pixel: B. Zhou et al., "Learning Deep Features for Discriminative Localization"
Explainer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CompareOptions(EvalOptions):
    """Comparison."""
    images: int = flag(200, 'in a fixed random order', type=positive_int, metavar='N')
    batch_size: int = flag(20, short='-b', type=positive_int, metavar='N')
    ig_steps: int = flag(50, 'of integrated gradients; 0: without', metavar='N')
    deletion: bool = flag(True, 'deletion and insertion: 2 (M + 1) forward passes for each image and tool',
                          action=argparse.BooleanOptionalAction)
    rows: int = flag(6, 'images in the picture', type=positive_int, metavar='N')
    output: Path = flag(Path('output/compare'), metavar='DIR')


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
    return square_box(torch.stack([x, y, x + 1, y + 1], dim=1), (heat.shape[0], heat.shape[1]))


def compare(options: CompareOptions, model: Any, loader: DataLoader) -> tuple[dict[str, dict[str, float]], list]:
    """Measures of each tool, and (image, boxes, heat maps) of the first images for the picture."""
    explainers = create_explainers(model, options.ig_steps)
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
            if len(x) == options.batch_size:
                found['ms'].append(1000 * seconds / len(x))
            located[name].update(torch.stack([hot_box(one) for one in heat]), boxes, correct)
            where = [i for i, truth in enumerate(boxes) if len(truth)]
            if where:
                found['pointing'] += (100 * pointing_game(heat[where], [boxes[i] for i in where])).tolist()
            if options.deletion:
                scores = patch_scores(heat, first.patch_boxes)
                deletion, insertion = deletion_insertion(model, x, scores, y, first.patch_boxes)
                found['deletion'] += deletion.tolist()
                found['insertion'] += insertion.tolist()
            found['completeness'] += completeness_error(parts, total).tolist()
        shown += [(x[i], boxes[i], int(y[i]), {n: maps[n][i] for n in explainers}) for i in range(len(x))]
        shown = shown[:options.rows]
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
    names = list(shown[0][3])
    figure, axes = panels(len(shown), 1 + len(names), 2.3 * (1 + len(names)), 2.4 * len(shown) + 0.4)
    for row, (x, boxes, y, maps) in zip(axes, shown):
        image = images_of(x, data_config)
        row[0].imshow(image)
        row[0].set_title(labels[y], fontsize=10, parse_math=False)
        for ax, name in zip(row[1:], names):
            show_heat(ax, image, maps[name])
            if ax in axes[0]:
                ax.set_title(name, fontsize=10)
        for ax in row:
            ax.set(xticks=[], yticks=[])
            for box in boxes:
                draw_box(ax, box, ORANGE)
    figure.supxlabel(
        'brown: for the label, purple: against it, each map scaled by itself'
        + ('; orange: true box' if any(len(boxes) for _, boxes, *_ in shown) else ''), fontsize=9)
    save(figure, file)


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


@script
def main(argv: list[str] | None = None) -> int:
    """Compare; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(CompareOptions, __doc__, argv)
    if options.multi_label:
        raise ValueError('--multi-label: each image must have one label to explain')
    model, data_config, boxed, labels = open_patch_model(options)
    order = torch.randperm(len(boxed), generator=torch.Generator().manual_seed(0))[:options.images].tolist()
    loader: Any = DataLoader(Subset(boxed, order), options.batch_size, collate_fn=collate_boxes)
    result, shown = compare(options, model, loader)
    options.output.mkdir(parents=True, exist_ok=True)
    command = command_line(argv)
    text = markdown(result, len(order), options.batch_size, command)
    replace_file(options.output / 'compare.md', text.encode())
    write_json(options.output / 'compare.json', {
        'model': options.name, 'images': len(order), 'batch_size': options.batch_size, 'tools': result,
        'command': command, **environment()})
    draw(shown, data_config, labels, options.output / 'compare.png')
    print(f'{text}\n{options.output}/compare.json, .md, .png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
