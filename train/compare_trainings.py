#!/usr/bin/env python3
"""One data set, several ways to train: accuracy, and where the evidence lies, in one table with intervals.

    python train/compare_trainings.py average=FOLDER 'loss attention=FOLDER' --out FILE.md

A folder holds result.json of train.py, test.json and boxed.json of validate.py --results-file on images held out and
on images with boxes, and compare.json and images.jsonl of compare_explanations.py on the latter. Two folders may hold
the same training, weighed in two ways. The interval of the accuracy is Wilson's, 95 %; the others are bootstrap over
images. The differences are to the first way, image by image; those of α to its evidence, because α may be the same
everywhere there. *all patches*: all of them taken, by what the way calls them; *patches in the object*: the precision
of a choice that knows neither image nor class. Rows that need no model are those of the first way.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lib.image_records import column
from lib.markdown import markdown_table
from lib.record import command_line
from lib.script import script
from timm_lossattn.evaluation.intervals import Interval, mean_interval
from timm_lossattn.evaluation.proportion import top1_interval
from timm_lossattn.files import replace_file

PATCHES = {'patch_precision': 'patch precision', 'patch_recall': 'patch recall', 'patch_f': 'patch F'}
MEASURES = {'energy': 'energy', 'pointing': 'pointing', 'boxes': 'MaxBoxAccV2'}
TOOLS = {'ours': 'evidence', 'α alone': 'α alone', 'Grad-CAM': 'Grad-CAM'}
NO_MODEL = ('random', 'centre', 'box: whole image', 'box: all patches', 'box: best centred square')


def read(folder: Path) -> dict[str, Any]:
    """What a folder holds.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        found = {name: json.loads((folder / f'{name}.json').read_text())
                 for name in ('result', 'test', 'boxed', 'compare')}
        lines = [json.loads(line) for line in (folder / 'images.jsonl').read_text().splitlines()]
        missing = [key for key in PATCHES if f'{key}_all_patches' not in found['boxed']]
        if missing:
            raise ValueError(f'boxed.json has no {missing[0]}_all_patches; run validate.py again')
    except (OSError, ValueError) as error:
        raise ValueError(f'FOLDER: {folder}: {error}') from error
    return found | {'images': {line['index']: line for line in lines if line['kind'] == 'image'}}


def accuracy(measured: dict[str, Any]) -> str:
    """Top-1 in percent with its interval."""
    low, high = top1_interval(measured)
    return f'{measured["top1"]:.2f} [{low:.2f}, {high:.2f}]'


def markdown(ways: dict[str, dict[str, Any]], command: str) -> str:
    """The page; ways by name."""
    first, *others = ways
    test, boxed = ways[first]['test'], ways[first]['boxed']
    lines = [
        f'Top-1 in percent of {test["images"]:,} images; the rest of {boxed["images"]} images with boxes, patches in '
        f'percent. One run of each training, n = 1; `{command}`',
        '', *markdown_table([
            'way', 'top-1 (%)', 'log loss', *PATCHES.values(), 'seconds an epoch', 'training images/s'], [
            *([name, accuracy(way['test']), f'{way["test"]["loss"]:.3f}',
               *(f'{way["boxed"][key]:.1f}' for key in PATCHES),
               f'{way["result"]["epochs"][-1]["seconds"]:.0f}',
               f'{way["result"]["epochs"][-1]["train"]["images_per_second"]:.1f}'] for name, way in ways.items()),
            *([f'{name}: all patches', '–', '–', *(f'{way["boxed"][f"{key}_all_patches"]:.1f}' for key in PATCHES),
               '–', '–'] for name, way in ways.items()),
            ['patches in the object', '–', '–', f'{boxed["patches_in_object"]:.1f}', *'––––']]),
        '', *markdown_table(['map', *(f'{title} ↑' for title in MEASURES.values())], [
            *([f'{name}: {title}', *(cell(way, tool, key) for key in MEASURES)]
              for name, way in ways.items() for tool, title in TOOLS.items()),
            *([row.removeprefix('box: '), *(cell(ways[first], row, key) for key in MEASURES)] for row in NO_MODEL)]),
        '', f'Differences to {first}, image by image; bold where zero lies outside of the interval:',
        '', *markdown_table(['map', *(f'{title} ↑' for title in MEASURES.values())], [
            [f'{name}: {title}{" less evidence" * (tool == "α alone")}',
             *(difference(ways[name], ways[first], tool, key).as_difference() for key in MEASURES)]
            for name in others for tool, title in TOOLS.items()]),
        '', 'Commands:', '', '```bash',
        *dict.fromkeys(command for way in ways.values() for command in (
            *way['result']['commands'], way['test']['command'], way['boxed']['command'], way['compare']['command'])),
        '```', '']
    return '\n'.join(lines)


def cell(way: dict[str, Any], row: str, measure: str) -> str:
    """Of one way's comparison."""
    found = way['compare']['image'].get(row, {}).get(measure)
    return f'{Interval.from_dict(found):.3f}' if found else '–'


def difference(way: dict[str, Any], other: dict[str, Any], tool: str, measure: str) -> Interval:
    """Of two ways, for the images that both have; the threshold of boxes is chosen for each.

    α is compared with the other way's evidence.
    """
    both = sorted(way['images'].keys() & other['images'].keys())
    values = column([way['images'][i] for i in both], tool, measure)
    others = column([other['images'][i] for i in both], 'ours' if tool == 'α alone' else tool, measure)
    return mean_interval(values - others)


@script
def main(argv: list[str] | None = None) -> int:
    """Write the table; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('ways', nargs='+', metavar='NAME=FOLDER')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE')
    args = parser.parse_args(argv)
    ways = {}
    for given in args.ways:
        name, _, folder = given.partition('=')
        if not folder or name in ways:
            raise ValueError(f'NAME=FOLDER: must be a name of its own and a folder, got {given!r}')
        ways[name] = read(Path(folder))
        first, this = next(iter(ways.values()))['compare'], ways[name]['compare']
        for key in ('dataset', 'split', 'scalar', 'input_size', 'crop_pct'):
            if this.get(key) != first.get(key):
                raise ValueError(f'NAME=FOLDER: {given} was compared with {key} {this.get(key)!r}, the first '
                                 f'with {first.get(key)!r}')
    text = markdown(ways, command_line(argv))
    replace_file(args.out, text.encode())
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
