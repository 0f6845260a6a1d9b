#!/usr/bin/env python3
"""Turn Tiny ImageNet, COCO, ImageNet images and blood cells with boxes into parquet datasets as the Hub stores them.

    python train/prepare.py tiny-imagenet tiny-imagenet-200.zip data/tiny_imagenet
    python train/prepare.py coco FOLDER data/coco2014 --size 64
    python train/prepare.py imagenet FOLDER data/imagenette_val500 --boxes BOXES.csv
    python train/prepare.py pbc FOLDER data/pbc --boxes BOXES.csv

The source of Tiny ImageNet is the zip or the folder that it unpacks to; that of COCO a folder with train2014.zip,
val2014.zip and annotations_trainval2014.zip, or what they unpack to (2017 works as well). Zips are never unpacked.
That of ImageNet is a folder with a sub-folder for each synset, whatever part of the validation set it holds; labels are
the 1,000 classes. Boxes are a CSV file with the columns path (its last two parts are synset and file), x0, y0, x1, y1.
That of peripheral blood cells is PBC_dataset_normal_DIB, a sub-folder for each class; the boxes' path is pbc_path. The
splits are our own (lib/blood_cells.py): train, test, boxed, and boxed_crops, whose cells are moved off the centre.
Columns: image (the original bytes, or with --size PNG), label (Tiny ImageNet) or labels (COCO), boxes (x0, y0, x1, y1
in pixels, x1 and y1 exclusive), and for COCO box_labels. Images without a label are left out, as the paper does.

Every parquet file is written under a temporary name and renamed; a second run writes what is missing.
"""
import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image as PillowImage
from timm.data import ImageNetInfo
from tqdm import tqdm

from lib.blood_cells import blood_cells
from lib.extras import need
from lib.script import script
from lib.source import Row, Source, boxes_by_image
from timm_lossattn.files import replace_file, replacing, sha256_of, write_json

try:
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
except ImportError:
    need('train', 'pyarrow', 'datasets')
    raise

# images with labels; the paper, section 5.1
COUNTS = {('tiny-imagenet', 200): (100_000, 10_000), ('coco', 2014): (82_081, 40_137)}


def tiny_imagenet(path: Path) -> tuple[Features, dict[str, tuple[Source, list[Row]]], tuple[int, int] | None]:
    """Features, rows of each split, and the official counts if it is the complete set."""
    source = Source(path, 'tiny-imagenet-200')
    wnids = sorted(source.read('wnids.txt').decode().split())
    words = dict(line.split('\t', 1) for line in source.read('words.txt').decode().splitlines() if '\t' in line)
    names = [words.get(wnid, wnid).split(',')[0].strip() for wnid in wnids]
    names = [f'{name} ({wnid})' if names.count(name) > 1 else name for name, wnid in zip(names, wnids)]
    label = {wnid: index for index, wnid in enumerate(wnids)}

    def row(file: str, wnid: str, corners: list[str]) -> Row:
        x0, y0, x1, y1 = map(float, corners)  # inclusive in the archive
        return {'image': file, 'label': label[wnid], 'boxes': [[x0, y0, x1 + 1, y1 + 1]]}

    train = [row(f'train/{wnid}/images/{name}', wnid, corners) for wnid in wnids
             for name, *corners in _tsv(source.read(f'train/{wnid}/{wnid}_boxes.txt'))]
    validation = [row(f'val/images/{name}', wnid, corners)
                  for name, wnid, *corners in _tsv(source.read('val/val_annotations.txt')) if wnid in label]
    features = Features({
        'image': Image(), 'label': ClassLabel(names=names), 'boxes': Sequence(Sequence(Value('float32'), length=4))})
    splits = {'train': (source, train), 'validation': (source, validation)}
    return features, splits, COUNTS.get(('tiny-imagenet', len(wnids)))


def _tsv(content: bytes) -> list[list[str]]:
    return [line.split() for line in content.decode().splitlines() if line.strip()]


def coco(path: Path) -> tuple[Features, dict[str, tuple[Source, list[Row]]], tuple[int, int] | None]:
    """As ``tiny_imagenet``; class indices are the 80 categories in the order of their ids, crowds count as objects."""
    if not path.is_dir():
        raise ValueError(f'SOURCE: no such folder: {path}')
    year = next((year for year in (2014, 2017) if list(path.glob(f'*{year}*'))
                 or list(path.glob(f'annotations/*{year}*'))), None)
    if year is None:
        raise ValueError(f'SOURCE: {path} has neither *2014* nor *2017* of COCO')

    def part(name: str, top: str, archive: str) -> Source:
        return Source(path if (path / top).is_dir() else path / archive, top)

    annotations = part('annotations', 'annotations', f'annotations_trainval{year}.zip')
    splits, names = {}, None
    for split, short in (('train', 'train'), ('validation', 'val')):
        content = json.loads(annotations.read(f'instances_{short}{year}.json'))
        categories = sorted(content['categories'], key=lambda category: category['id'])
        names = [category['name'] for category in categories]
        label = {category['id']: index for index, category in enumerate(categories)}
        objects = defaultdict(list)
        for item in content['annotations']:
            x, y, width, height = item['bbox']
            objects[item['image_id']].append((label[item['category_id']], [x, y, x + width, y + height]))
        rows = [{
            'image': image['file_name'], 'labels': sorted({k for k, _ in objects[image['id']]}),
            'boxes': [box for _, box in objects[image['id']]], 'box_labels': [k for k, _ in objects[image['id']]],
        } for image in sorted(content['images'], key=lambda image: image['id']) if objects[image['id']]]
        splits[split] = part(short, f'{short}{year}', f'{short}{year}.zip'), rows
    features = Features({
        'image': Image(), 'labels': Sequence(ClassLabel(names=names)),
        'boxes': Sequence(Sequence(Value('float32'), length=4)), 'box_labels': Sequence(ClassLabel(names=names))})
    complete = sum(len(rows) for _, rows in splits.values()) > 1000  # not somebody's sample of it
    return features, splits, COUNTS.get(('coco', year)) if complete else None


def imagenet(path: Path, boxes: Path) -> tuple[Features, dict[str, tuple[Source, list[Row]]], None]:
    """As ``tiny_imagenet``, of images that have boxes; there is only a validation split."""
    if not path.is_dir():
        raise ValueError(f'SOURCE: no such folder: {path}')
    names = ImageNetInfo('imagenet-1k').label_names()
    label = {synset: k for k, synset in enumerate(names)}
    found = boxes_by_image(boxes, 'path')
    unknown = sorted({Path(place).parts[0] for place in found} - set(label))
    if unknown:
        raise ValueError(f'--boxes: {boxes} has {unknown[0]}, which is no synset of ImageNet')
    places = [place for place in sorted(found) if (path / place).is_file()]
    if not places:
        raise ValueError(f'SOURCE: {path} has none of the {len(found):,} images of {boxes}')
    if len(places) < len(found):
        print(f'left out: {len(found) - len(places):,} images of {boxes}, which are not in {path}')
    rows: list[Row] = [{'image': place, 'label': label[Path(place).parts[0]], 'boxes': found[place]}
                       for place in places]
    features = Features({
        'image': Image(), 'label': ClassLabel(names=names), 'boxes': Sequence(Sequence(Value('float32'), length=4))})
    return features, {'validation': (Source(path, ''), rows)}, None


def pbc(path: Path, boxes: Path) -> tuple[Features, dict[str, tuple[Source, list[Row]]], None]:
    """As ``tiny_imagenet``, of peripheral blood cells; prints what was left out."""
    names, splits, source, left_out = blood_cells(path, boxes)
    print('left out: ' + ', '.join(f'{count} {why}' for why, count in left_out.items()))
    features = Features({
        'image': Image(), 'label': ClassLabel(names=names), 'boxes': Sequence(Sequence(Value('float32'), length=4))})
    return features, {split: (source, rows) for split, rows in splits.items()}, None


def load_row(source: Source, row: Row, size: int | None) -> Row:
    """The row with its image and boxes, cut to its window (left, top, right, bottom) if it has one, and if ``size`` is
    given stretched to size × size pixels.

    Raises:
        ValueError: the image is missing or unreadable.
    """
    content = source.read(row['image'])
    try:
        with PillowImage.open(io.BytesIO(content)) as image:
            image.load()
            left, top, *_ = window = row.get('window') or (0, 0, *image.size)
            shown = image.crop(window) if 'window' in row else image
            width, height = shown.size
            if size:
                shown = shown.convert('RGB').resize((size, size), PillowImage.Resampling.BICUBIC)
            if shown is not image:
                buffer = io.BytesIO()
                shown.save(buffer, 'PNG')
                content = buffer.getvalue()
    except OSError as error:
        raise ValueError(f'{source.path}: {row["image"]} is no readable image ({error})') from error
    scale = [size / width, size / height] * 2 if size else [1, 1, 1, 1]
    boxes = [[(c - offset) * s for c, offset, s in zip(box, (left, top, left, top), scale)] for box in row['boxes']]
    return row | {'image': {'bytes': content, 'path': Path(row['image']).name}, 'boxes': boxes}


def shards(rows: list[Row], shard_size: int) -> Iterator[tuple[int, int, list[Row]]]:
    """(index, number of shards, rows) in order."""
    count = max(1, -(-len(rows) // shard_size))
    for index in range(count):
        yield index, count, rows[index * shard_size:(index + 1) * shard_size]


def write_split(out: Path, split: str, features: Features, source: Source, rows: list[Row], size: int | None,
                shard_size: int) -> int:
    """Write the parquet files that are not there yet. Returns the number of images of the split."""
    for index, count, part in shards(rows, shard_size):
        file = out / 'data' / f'{split}-{index:05d}-of-{count:05d}.parquet'
        if file.is_file() and pq.read_metadata(file).num_rows == len(part):
            continue
        with tqdm(part, desc=file.name, leave=False, dynamic_ncols=True) as bar:
            loaded = [load_row(source, row, size) for row in bar]
        columns = {name: [row[name] for row in loaded] for name in features}
        with replacing(file) as temporary:
            Dataset.from_dict(columns, features=features).to_parquet(temporary)
    return len(rows)


CARD = """---
pretty_name: {title}
task_categories: [image-classification]
configs:
- config_name: default
  data_files:
{files}
---
# {title}

{counts}, written by `{command}`. {terms}
"""
TERMS = {
    'tiny-imagenet': ('Tiny ImageNet', 'ImageNet terms: non-commercial research and education.'),
    'imagenet': ('ImageNet validation images with boxes', 'ImageNet terms: non-commercial research and education.'),
    'pbc': ('Peripheral blood cells', 'CC BY 4.0 as published: A. Acevedo et al., Data in Brief 30:105474, 2020, '
            'doi:10.1016/j.dib.2020.105474. Boxes: TXL-PBC, MIT.'),
    'coco': ('COCO', 'Annotations CC BY 4.0; each image under its own Flickr licence.'),
}


@script
def main(argv: list[str] | None = None) -> int:
    """Prepare; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=('tiny-imagenet', 'coco', 'imagenet', 'pbc'))
    parser.add_argument('source', type=Path, metavar='SOURCE')
    parser.add_argument('out', type=Path, metavar='OUT')
    parser.add_argument('--size', type=int, metavar='N', help='stretch images to N × N (the paper: 64 for COCO)')
    parser.add_argument('--boxes', type=Path, metavar='CSV', help='imagenet, pbc: the boxes')
    parser.add_argument('--shard-size', type=int, default=10_000, metavar='N', help='images in a parquet file')
    args = parser.parse_args(argv)
    for name, value in (('--shard-size', args.shard_size), ('--size', args.size)):
        if value is not None and value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    with_table = {'imagenet': imagenet, 'pbc': pbc}
    if (args.boxes is not None) != (args.dataset in with_table):
        raise ValueError(f'--boxes: {"needed for" if args.boxes is None else "is for"} {" and ".join(with_table)}')
    features, splits, official = with_table[args.dataset](args.source, args.boxes) if args.dataset in with_table else (
        tiny_imagenet if args.dataset == 'tiny-imagenet' else coco)(args.source)
    found = tuple(len(rows) for _, rows in splits.values())
    if official and found != official:
        raise ValueError(f'{args.source}: {found[0]} training and {found[1]} validation images with labels, the '
                         f'complete set has {official[0]} and {official[1]}')
    settings = {'dataset': args.dataset, 'size': args.size, 'shard_size': args.shard_size, 'images': list(found),
                **({'boxes_sha256': sha256_of(args.boxes)} if args.boxes else {})}
    note = args.out / 'prepare.json'
    if note.is_file() and json.loads(note.read_text()) != settings:
        raise ValueError(f'OUT: {args.out} was begun with {note.read_text()}; go on with that, or choose another')
    (args.out / 'data').mkdir(parents=True, exist_ok=True)
    write_json(note, settings)
    written = {split: write_split(args.out, split, features, source, rows, args.size, args.shard_size)
               for split, (source, rows) in splits.items()}
    title, terms = TERMS[args.dataset]
    counts = ', '.join(f'{n:,} {split} images' for split, n in written.items())
    flags = (f' --boxes {args.boxes.name}' if args.boxes else '') + (f' --size {args.size}' if args.size else '')
    replace_file(args.out / 'README.md', CARD.format(
        title=title, terms=terms, counts=counts,
        files='\n'.join(f'  - {{split: {split}, path: data/{split}-*}}' for split in written),
        command=f'python train/prepare.py {args.dataset} {args.source.name} {args.out.name}{flags}').encode())
    print(f'{args.out}: {counts}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
