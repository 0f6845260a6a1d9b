#!/usr/bin/env python3
"""Our explanations beside other tools': same weights, images, question, placement and measures.

    pip install -e '.[train,viz,compare]'
    python train/compare_explanations.py --model local-dir:output/tiny/hub --dataset hfds/data/tiny_imagenet \\
        --images 500 --grids 3 2 --output output/compare

Every tool is asked about the image's own label, and about the same number: with --scalar lead its lead over its rivals
(the other classes by their softmax), with --scalar logit its logit. Maps of patches are placed by the model's patch
boxes (lib/explainers.py). Rows that need no model, and α alone, stand beside them. Measures, one value an image:
  boxes       MaxBoxAccV2: a box at the best threshold of the other half of the images, mean over IoU 0.3, 0.5, 0.7
  pointing    the hottest pixel lies in a box;  energy   share of the positive heat in the boxes
  deletion, insertion   of patches and of pixels, most important first, with two blanks: mean colour and blur
  single      rank correlation with the drop when one of 4 × 4 cells is blanked; with --single-deletion
  complete    |sum of the parts - what they explain| / max(1, |…|), median; a sum that a tool does not claim is no fault
  ms          wall time an image at --batch-size, tools by turns in changing order, median
--grids also measures, on grids of rightly classified images of distinct classes, the most confident first and each
at most once, the share of the positive heat for a class in its own cell. The model sees the whole grid. --spread adds
a row for each map of patches, whoever made it, after it was spread over similar neighbours, its sum unchanged.

Boxes, pointing and energy need boxes (prepare.py). With --multi-label an image is explained for the label with the
largest logit, by that logit, and only boxes of that class count, where the data set names theirs. Writes images.jsonl,
a line an image, which an interrupted run goes on with and from which compare.json, compare.md and compare.png are made.
Intervals are bootstrap over images, or grids, 95 %.
"""
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from lib.boxes import box_columns, boxed_loader, fixed_order, open_patch_model
from lib.comparison import Judge, Settings, grid_entries
from lib.explainers import OURS, Question, create_tools
from lib.flags import flag, parse, positive_int
from lib.image_records import SPREAD, Records, Table, means_and_differences
from lib.markdown import markdown_table
from lib.options import EvalOptions
from lib.plots import ORANGE, draw_box, images_of, panels, save, show_heat
from lib.record import command_line, environment
from lib.script import script
from timm_lossattn.evaluation.faithfulness import Blank
from timm_lossattn.evaluation.pointing import choose_grids
from timm_lossattn.explanation.evidence import direction
from timm_lossattn.explanation.preprocessing import PREPROCESSING
from timm_lossattn.files import replace_file, weights_digest, write_json

# name in images.jsonl -> title, +1 if high is good
MEASURES = {
    'boxes': ('MaxBoxAccV2', 1), 'pointing': ('pointing', 1), 'energy': ('energy', 1),
    'deletion, patches, mean': ('deletion', -1), 'insertion, patches, mean': ('insertion', 1),
    'deletion, patches, blur': ('deletion, blur', -1), 'insertion, patches, blur': ('insertion, blur', 1),
    'deletion, pixels, mean': ('deletion, pixels', -1), 'insertion, pixels, mean': ('insertion, pixels', 1),
    'deletion, pixels, blur': ('deletion, pixels, blur', -1), 'insertion, pixels, blur': ('insertion, pixels, blur', 1),
    'single': ('single deletion', 1), 'grid': ('grid pointing', 1), 'complete': ('completeness error', -1),
    'ms': ('ms', -1),
}

@dataclass(frozen=True)
class CompareOptions(EvalOptions):
    """Comparison."""
    images: int = flag(500, 'in a fixed random order', type=positive_int, metavar='N')
    batch_size: int = flag(20, short='-b', type=positive_int, metavar='N')
    scalar: str = flag('lead', 'what is explained', choices=('lead', 'logit'))
    tools: list[str] | None = flag(None, 'parts of the names of tools to compare (default: all)', nargs='+',
                                   metavar='NAME')
    left_out: bool = flag(False, 'ask ours for what is lost without a patch as well')
    ig_steps: int = flag(32, 'of integrated gradients; 0: without', metavar='N')
    removal: list[str] = flag(['patches', 'pixels'], 'deletion and insertion of these; none: without',
                              nargs='*', choices=('patches', 'pixels'))
    blanks: list[Blank] = flag(['mean', 'blur'], 'what stands in the place of what is removed', nargs='+',
                               type=str, choices=('mean', 'blur'))
    steps: int = flag(8, 'of deletion and insertion', type=positive_int, metavar='N')
    single_deletion: bool = flag(False, 'blank one cell at a time')
    spread: float = flag(0., 'σ in steps of the patch grid', metavar='SIGMA')
    grids: list[int] = flag([], 'cells a side, 3 2 for two kinds of grids', nargs='*', type=positive_int, metavar='N')
    max_grids: int = flag(1000, 'of a kind', type=positive_int, metavar='N')
    rows: int = flag(6, 'images in the picture', type=positive_int, metavar='N')
    output: Path = flag(Path('output/compare'), metavar='DIR')


def questions(options: CompareOptions, model: Any, boxed: Any, indices: list[int]) -> Iterator[
        tuple[Question, torch.Tensor, list[torch.Tensor]]]:
    """Batches of what is asked, with the logits and the true boxes of the class that is asked about."""
    loader = boxed_loader(Subset(boxed, indices), options)
    for start, (x, y, boxes, classes) in zip(range(0, len(indices), options.batch_size), loader):
        with torch.no_grad():
            logits = model(x).float()
        target = y if y.dim() == 1 else logits.masked_fill(y < 0.5, -torch.inf).argmax(dim=1)
        v = direction(logits, target, against_of(options))  # type: ignore[arg-type]
        own = [b[(c < 0) | (c == t)] for b, c, t in zip(boxes, classes, target)]
        yield Question(x, target, v, indices[start:start + len(x)]), logits, own


def against_of(options: CompareOptions) -> str | None:
    """For ``explain``."""
    return 'rest' if options.scalar == 'lead' and not options.multi_label else None


def measure_images(options: CompareOptions, judge: Judge, boxed: Any, indices: list[int], records: Records) -> None:
    """Ask every tool about every image that has no line yet."""
    done = {entry['index'] for entry in records.of('image')}
    left = [i for i in indices if i not in done]
    bar = tqdm(total=len(indices), initial=len(indices) - len(left), desc='images', unit='image', dynamic_ncols=True,
               leave=False)
    for turn, (question, logits, boxes) in enumerate(questions(options, judge.model, boxed, left)):
        found = judge.images(question, boxes, reverse=bool(turn % 2), timed=len(question.index) == options.batch_size)
        probabilities = judge.model.patch_weights.probabilities(logits, options.multi_label)
        chosen = probabilities.gather(1, question.target[:, None]).squeeze(1)
        records.add([
            {'kind': 'image', 'index': index, 'target': int(t), 'probability': float(p),
             'right': int(t) == int(best), 'rows': rows}
            for index, t, p, best, rows in zip(
                question.index, question.target, chosen, logits.argmax(dim=1), found)])
        bar.update(len(question.index))
    bar.close()


def measure_grids(
        options: CompareOptions, judge: Judge, boxed: Any, indices: list[int], n: int, records: Records) -> None:
    """Ask every tool about every cell of the grids of these images that have no line yet."""
    among = set(indices)
    images = [entry for entry in records.of('image') if entry['index'] in among]
    grids = choose_grids(
        torch.tensor([entry['probability'] for entry in images]), torch.tensor([entry['target'] for entry in images]),
        torch.tensor([entry['right'] for entry in images]), n, options.max_grids)
    done = {entry['index']: entry['images'] for entry in records.of(f'grid {n}')}
    chosen = [[images[i]['index'] for i in grid] for grid in grids]
    if any(number >= len(chosen) or done[number] != chosen[number] for number in done):
        raise ValueError(f'--output: its {n}×{n} grids are of other --images or --max-grids; choose another folder')
    for number, grid in enumerate(tqdm(grids, desc=f'{n}×{n} grids', unit='grid', dynamic_ncols=True, leave=False)):
        if number in done:
            continue
        members = [images[i] for i in grid]
        x = torch.stack([boxed[entry['index']][0] for entry in members])
        target = torch.tensor([entry['target'] for entry in members])
        rows = grid_entries(judge, x, target, n, number, against_of(options), options.batch_size)
        records.add([{'kind': f'grid {n}', 'index': number, 'images': [entry['index'] for entry in members],
                      'rows': rows}])


def measured_where(records: Records, summary: Path) -> dict[str, Any]:
    """Commit, versions and hardware of each start that measured; of older records what their compare.json says."""
    starts = [{key: value for key, value in entry.items() if key not in ('kind', 'index')}
              for entry in records.of('start')]
    if starts:
        return {'starts': starts}
    before = json.loads(summary.read_text()) if summary.is_file() else {}
    return {key: before[key] for key in records.environment if key in before}


def markdown(tables: dict[str, Table], records: Records, scalar: str, command: str) -> str:
    """Two tables for the images and for each kind of grids: means, and what ours is ahead, with intervals."""
    lines = []
    for kind, table in tables.items():
        entries = records.of(kind)
        measures = [m for m in MEASURES if any(m in row for row in table.values())]
        if not entries or not measures:
            continue
        what = f'{len(entries):,} images' if kind == 'image' else f'{len(entries)} grids of {kind[5:]}×{kind[5:]}'
        lines += [f'{what}, what is explained: the {scalar}; `{command}`', '']
        titles = [f'{MEASURES[m][0]} {"↑" if MEASURES[m][1] > 0 else "↓"}' for m in measures]
        lines += markdown_table(['', *titles], [
            [row, *(shown_mean(entries, row, m, cells[m][0]) if m in cells else '–' for m in measures)]
            for row, cells in table.items()])
        compared = [m for m in measures if m not in ('complete', 'ms')]
        if compared:
            like = ' (of spread maps, ours spread)' if any(row.endswith(SPREAD) for row in table) else ''
            lines += ['', f'Ours less theirs{like}, with 95 % intervals; bold where zero lies outside:', '']
            differences = {row: [cells[m][1] if m in cells else None for m in compared]
                           for row, cells in table.items() if row != OURS}
            lines += markdown_table(['', *(titles[measures.index(m)] for m in compared)], [
                [row, *('–' if one is None else one.as_difference() for one in found)]
                for row, found in differences.items() if any(found)])
        lines.append('')
    return '\n'.join(lines)


def shown_mean(entries: list[dict[str, Any]], row: str, measure: str, mean: Any) -> str:
    """A mean; of errors and times, which have long tails, the median."""
    if measure not in ('complete', 'ms'):
        return f'{mean.mean:.3f}' if mean.n else '–'
    values = [entry['rows'][row][measure] for entry in entries if entry['rows'].get(row, {}).get(measure) is not None]
    return f'{statistics.median(values):.2g}' if values else '–'


def draw(options: CompareOptions, judge: Judge, boxed: Any, indices: list[int], config: dict[str, Any],
         labels: list[str]) -> None:
    """A row for each image: the image with its boxes, then each tool's heat map over it."""
    shown = indices[:options.rows]
    names = [*judge.tools]
    figure, axes = panels(len(shown), 1 + len(names), 2.0 * (1 + len(names)), 2.15 * len(shown) + 0.4)
    row, boxed_at_all = 0, False
    for question, _, boxes in questions(options, judge.model, boxed, shown):
        maps = {name: tool(question).heat for name, tool in judge.tools.items()}
        for i in range(len(question.index)):
            image = images_of(question.x[i], config)
            axes[row, 0].imshow(image)
            axes[row, 0].set_title(labels[int(question.target[i])], fontsize=10, parse_math=False)
            for ax, name in zip(axes[row, 1:], names):
                show_heat(ax, image, maps[name][i])
                if row == 0:
                    ax.set_title(name, fontsize=9)
            for ax in axes[row]:
                ax.set(xticks=[], yticks=[])
                for box in boxes[i]:
                    draw_box(ax, box, ORANGE)
            boxed_at_all |= len(boxes[i]) > 0
            row += 1
    figure.supxlabel('brown: for the label, purple: against it, each map scaled by itself'
                     + ('; orange: true box' if boxed_at_all else ''), fontsize=9)
    save(figure, options.output / 'compare.png')


@script
def main(argv: list[str] | None = None) -> int:
    """Compare; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(CompareOptions, __doc__, argv)
    model, config, boxed, labels = open_patch_model(options)
    model.to(memory_format=torch.channels_last)  # faster, for all tools alike
    tools = create_tools(model, against_of(options), options.ig_steps, options.left_out)
    if options.tools is not None:
        unknown = [part for part in options.tools if not any(part in name for name in tools)]
        if unknown:
            raise ValueError(f'--tools: {unknown[0]!r} is part of none of {", ".join(tools)}')
        tools = {name: tool for name, tool in tools.items() if name == OURS or any(t in name for t in options.tools)}
    judge = Judge(model, tools, Settings(
        options.removal, options.blanks, options.steps, options.single_deletion, options.multi_label,
        options.spread))
    indices = fixed_order(boxed, options.images)
    grids = [f'grid {n}' for n in options.grids]
    asked: dict[str, Any] = {
        'model': options.name, 'weights': repr(model.patch_weights), 'weights_sha256': weights_digest(model),
        'model_kwargs': options.model_kwargs or None, 'dataset': options.dataset, 'data_dir': options.data_dir,
        'input_key': options.input_key, 'target_key': options.target_key, 'split': options.val_split,
        'images_in_split': len(boxed), **{key: value for key, value in config.items() if key in PREPROCESSING},
        'scalar': 'lead' if against_of(options) else 'logit', 'tools': list(tools), 'removal': options.removal,
        'blanks': options.blanks,
        'steps': options.steps, 'single_deletion': options.single_deletion, 'spread': options.spread}
    if 'box_labels' in box_columns(boxed.dataset):
        asked['boxes'] = 'of the target'  # in earlier records of all classes
    records, command = Records(options.output / 'images.jsonl', asked, environment()), command_line(argv)
    if {*indices} - {entry['index'] for entry in records.of('image')} and any(map(records.of, grids)):
        raise ValueError(f'--images: {records.path} has grids of fewer images; choose another --output')
    measure_images(options, judge, boxed, indices, records)
    for n in options.grids:
        measure_grids(options, judge, boxed, indices, n, records)
    tables = {kind: means_and_differences(records.of(kind), OURS) for kind in ('image', *grids)}
    text = markdown(tables, records, asked['scalar'], command)
    replace_file(options.output / 'compare.md', text.encode())
    summary = options.output / 'compare.json'
    write_json(summary, {
        **records.asked, 'command': command, **measured_where(records, summary), 'images': len(records.of('image')),
        'accuracy': statistics.mean(float(entry['right']) for entry in records.of('image')),
        **{kind: {row: {m: mean.to_dict() for m, (mean, _) in cells.items() if m != 'ms'}  # a time is a batch's
                  for row, cells in table.items()} for kind, table in tables.items()}})
    draw(options, judge, boxed, indices, config, labels)
    print(f'{text}\n{options.output}: images.jsonl, compare.json, .md, .png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
