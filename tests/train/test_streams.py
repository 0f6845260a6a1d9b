"""train.py on streamed datasets."""
import io
import json
import tarfile

from datasets import load_dataset
from test_train import QUICK

import train as train_script


def quick(*flags):
    return [*(f for f in QUICK if f not in ('--val-split', 'val')), '--epochs', '1', *map(str, flags)]


def test_hfids(folder, tmp_path):
    """A Hugging Face dataset, streamed from parquet."""
    for split in ('train', 'validation'):
        data = load_dataset(str(folder), split=split, cache_dir=str(tmp_path / 'cache'))
        (tmp_path / 'set').mkdir(exist_ok=True)
        data.to_parquet(tmp_path / 'set' / f'{split}-0.parquet')
    assert train_script.main(quick(
        '--dataset', f'hfids/{tmp_path / "set"}', '--data-dir', tmp_path, '--train-num-samples', 32,
        '--val-num-samples', 16, '--output', tmp_path, '--experiment', 'x')) == 0
    assert json.loads((tmp_path / 'x' / 'result.json').read_text())['epochs'][0]['train']['loss'] > 0


def test_wds(folder, tmp_path):
    """WebDataset tar files."""
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}-0000.tar', 'w') as tar:
            for i, file in enumerate(sorted((folder / split).rglob('*.png'))):
                label = str(('left', 'right').index(file.parent.name)).encode()
                for name, content in ((f'{i:04d}.png', file.read_bytes()), (f'{i:04d}.cls', label)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    assert train_script.main(quick(
        '--dataset', 'wds/toy', '--data-dir', tmp_path, '--train-split', 'train-0000.tar|32', '--val-split',
        'val-0000.tar|16', '--output', tmp_path, '--experiment',
        'x')) == 0
