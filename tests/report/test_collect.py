"""report/collect.py and table.py: the numbers are those of explain, however often a run is killed or shared."""
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_lossattn.cli import main
from timm_lossattn.explanation import Explanation, Preprocessing, explain, input_config, open_image, preprocess
from timm_lossattn.report import collect as collecting
from timm_lossattn.report import command
from timm_lossattn.report.dataset import open_images, split_readable
from timm_lossattn.report.table import ReportTable

ROOT = Path(__file__).parents[2]
NANO = 'resnet18_lossattn_conv_nano'
IMAGES, BATCH = 170, 2
SHARDS = -(-IMAGES // (BATCH * collecting.BATCHES))


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder of photos of several sizes without labels, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp('collect')
    torch.manual_seed(0)
    model = timm.create_model(NANO).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    save_file(model.state_dict(), folder / 'random.safetensors')
    draw = np.random.default_rng(0)
    (folder / 'photos').mkdir()
    for i in range(IMAGES):
        height, width = draw.integers(30, 50, 2)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f'photos/{i}.png')
    return folder


def flags(work, *more):
    """The command line, the same in every folder that it runs in."""
    return ['report', str(work / 'photos'), '--model', NANO, '--checkpoint', str(work / 'random.safetensors'), '--out',
            'out', '--batch-size', str(BATCH), '--workers', '0', '--gallery', '3', *more]


def start(work, cwd, *launcher, program=('-m', 'timm_lossattn.cli')):
    """The command in a process group of its own."""
    cwd.mkdir()
    return subprocess.Popen(
        [sys.executable, *launcher, *program, *flags(work)], cwd=cwd, start_new_session=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope='module')
def undisturbed(work):
    """Folder of a report that one process made without a break."""
    process = start(work, work / 'undisturbed')
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return work / 'undisturbed' / 'out'


def test_files(undisturbed):
    """A table and a page, nothing else; a row group a shard, so that a reader needs no more memory than the writer."""
    assert sorted(os.listdir(undisturbed)) == ['index.html', 'report.parquet']
    metadata = pq.read_metadata(undisturbed / 'report.parquet')
    assert metadata.num_rows == IMAGES
    assert metadata.num_row_groups == SHARDS
    assert metadata.row_group(0).num_rows == BATCH * collecting.BATCHES


def test_rows_are_explanations(work, undisturbed):
    """Every column against explain() on the file, image by image."""
    model = timm.create_model(NANO).eval()
    model.load_state_dict(timm.models.load_state_dict(str(work / 'random.safetensors')))
    table = ReportTable(undisturbed / 'report.parquet')
    assert table.notes['model'] == NANO
    assert table.notes['xi'] == 0.1
    assert table.grid == (6, 6)
    assert table.notes['command'].startswith('timm-lossattn report ')
    for row in table.rows([0, 5, 42, IMAGES - 1]):
        path = work / 'photos' / row['file']
        assert row['index'] == int(path.stem)
        source = preprocess(model, open_image(path))
        explanation = explain(model, source)
        assert (row['width'], row['height']) == source.image.size
        assert row['label'] is None
        assert row['why_not_label'] is None
        assert row['boxes'] is None
        assert row['evidence_in_box'] is None
        top = explanation.probabilities[0].topk(5)
        assert row['prediction'] == int(explanation.target) == row['top_classes'][0]
        assert row['top_classes'] == top.indices.tolist()
        assert row['probability'] == pytest.approx(float(top.values[0]), rel=1e-4)
        assert row['top_probabilities'] == pytest.approx(top.values.tolist(), rel=1e-3)
        assert row['box'] == pytest.approx(source.to_image(explanation.boxes[0]).tolist(), rel=1e-5)
        for name, expected in (
                ('alpha', explanation.prediction.alpha), ('evidence', explanation.evidence),
                ('why_not_runner_up', explanation.versus(row['top_classes'][1]).evidence)):
            assert row[name] == pytest.approx(expected[0].tolist(), rel=2e-3, abs=1e-5), name


def test_saturated_probabilities(work):
    """Where all but one underflow to 0, the logits still say which class is second."""
    model = timm.create_model(NANO).eval()
    model.load_state_dict(timm.models.load_state_dict(str(work / 'random.safetensors')))
    model.head.fc.weight.data *= 100
    images, *_ = open_images(str(work / 'photos'), model, list('abcdefghij'), Preprocessing(input_config(model)))
    items, x, _ = split_readable([images[i] for i in range(8)])
    explanation = explain(model, x)
    assert ((explanation.probabilities > 0).sum(dim=1) < 5).any()
    found = collecting.explain_batch(model, items, x)
    logits = explanation.prediction.logits.sort(dim=1, descending=True)
    assert found['top_classes'].to_pylist() == logits.indices[:, :5].tolist()
    assert [sum(row) for row in found['why_not_runner_up'].to_pylist()] == pytest.approx(
        (logits.values[:, 0] - logits.values[:, 1]).tolist(), rel=1e-2)


@pytest.mark.parametrize(('boxes', 'expected'), [
    ([[0, 0, 32, 32]], 1.), ([[0, 0, 16, 32]], 0.25), ([[0, 0, 16, 32], [8, 0, 16, 32]], 0.25),
    ([[0, 0, 16, 32], [16, 0, 32, 16]], 0.625), ([], None), ([[3, 3, 3, 9]], None)])
def test_positive_share(boxes, expected):
    """A quarter of the positive evidence on the left, three quarters on the right; what is negative does not count."""
    class Fixed:
        """Evidence that is known, on 2×2 patches of 16 pixels."""
        patch_boxes = torch.tensor([[x, y, x + 16, y + 16] for y in (0, 16) for x in (0, 16)])
        input_size, pixel_map = (32, 32), Explanation.pixel_map

        def __init__(self, *evidence):
            self.evidence = torch.tensor([evidence])

    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    [share] = collecting.positive_share(Fixed(1., 3., 1., 3.), [boxes])
    assert share == (expected if expected is None else pytest.approx(expected))
    [share] = collecting.positive_share(Fixed(1., 3., 1., -9.), [torch.tensor([[0., 0., 16., 32.]])])
    assert share == pytest.approx(0.4)
    none = collecting.positive_share(Fixed(-1., -3., -1., 0.), [torch.tensor([[0., 0., 32., 32.]])])
    assert none == [0.]  # none may abstain


def test_reading_in_three_lines(undisturbed, tmp_path, monkeypatch):
    """As docs/report.md says."""
    (tmp_path / 'report').symlink_to(undisturbed)
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'report.md').read_text(), flags=re.DOTALL)
    found: dict = {}
    exec(compile(snippet, 'report.md', 'exec'), found)
    assert found['grid'] == [6, 6]
    assert found['evidence'].dtype == np.float16
    assert found['evidence'].shape == (IMAGES, 6, 6)
    assert found['evidence'][7].reshape(-1).tolist() == found['table']['evidence'][7].as_py()


KILLED = '''
import os, signal, sys
from timm_lossattn.cli import main
from timm_lossattn.report import collect
write = collect.write_shard
def write_and_die(path, *rest):
    write(path, *rest)
    if path.name == '000002.parquet':
        os.kill(os.getpid(), signal.SIGKILL)
collect.write_shard = write_and_die
main(sys.argv[1:])
'''


@pytest.fixture
def one_thread():
    """As many threads as the processes have that ``start`` starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_and_resumed(work, undisturbed, one_thread, monkeypatch):
    """SIGKILL after the third shard; the second run keeps what is there and ends with the same bytes."""
    process = start(work, work / 'killed', program=('-c', KILLED))
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    shards = work / 'killed' / 'out' / collecting.SHARDS
    kept = {path.name for path in shards.glob('*.parquet')}
    assert kept == {f'{s:06d}.parquet' for s in range(3)}
    assert not (work / 'killed' / 'out' / 'report.parquet').exists()
    (shards / '.000001.parquet.1234.tmp').write_bytes(b'half a shard')  # what a kill while writing leaves

    written = []
    write = collecting.write_shard
    monkeypatch.setattr(collecting, 'write_shard', lambda path, *rest: (written.append(path.name), write(path, *rest)))
    monkeypatch.chdir(work / 'killed')
    monkeypatch.setattr(sys, 'argv', ['timm-lossattn', *flags(work)])
    assert main(flags(work)) == 0
    assert set(written) == {f'{s:06d}.parquet' for s in range(SHARDS)} - kept
    for name in ('report.parquet', 'index.html'):
        assert (work / 'killed' / 'out' / name).read_bytes() == (undisturbed / name).read_bytes()
    assert sorted(os.listdir('out')) == ['index.html', 'report.parquet']


def test_killed_before_the_shards_went(work, undisturbed, tmp_path, monkeypatch):
    """The table is there, and so are its shards: they go. A folder of the user's stays."""
    shutil.copytree(undisturbed, tmp_path / 'out')
    for name in (collecting.SHARDS, 'shards'):
        (tmp_path / 'out' / name).mkdir(exist_ok=True)
        (tmp_path / 'out' / name / '000000.parquet').write_bytes(b'of no use')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['timm-lossattn', *flags(work)])
    assert main(flags(work)) == 0
    assert sorted(os.listdir('out')) == ['index.html', 'report.parquet', 'shards']
    assert os.listdir('out/shards') == ['000000.parquet']


def test_table_of_another_process(work, undisturbed, tmp_path, monkeypatch, caplog):
    """Two that were started with the same command: the one that waits takes the table of the one that ended."""
    shutil.copytree(undisturbed, tmp_path / 'out')
    table = (tmp_path / 'out' / 'report.parquet').rename(tmp_path / 'table')
    monkeypatch.setattr(collecting, 'explain_shards', lambda *args: None)
    monkeypatch.setattr(collecting, 'PATIENCE', -1.)
    monkeypatch.setattr(collecting.time, 'sleep', lambda seconds: table.rename(tmp_path / 'out' / 'report.parquet'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['timm-lossattn', *flags(work)])
    assert main(flags(work)) == 0
    assert 'RANK is 0 and WORLD_SIZE 1' in caplog.text
    assert (tmp_path / 'out' / 'report.parquet').read_bytes() == (undisturbed / 'report.parquet').read_bytes()


def test_two_processes(work, undisturbed):
    """torchrun: each computes its shards, the first merges; the same bytes as from one."""
    process = start(work, work / 'two', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for name in ('report.parquet', 'index.html'):
        assert (work / 'two' / 'out' / name).read_bytes() == (undisturbed / name).read_bytes()
    assert sorted(os.listdir(work / 'two' / 'out')) == ['index.html', 'report.parquet']


def test_one_shard_in_memory(work, tmp_path, monkeypatch):
    """When a shard is written, no map of an earlier one is alive any more."""
    maps, counts = [], []
    half, write = collecting.half, collecting.write_shard

    def counted(name, values, files):
        result = half(name, values, files)
        maps.append(weakref.ref(result))
        return result

    def written(*args):
        counts.append(sum(ref() is not None for ref in maps))
        return write(*args)

    monkeypatch.setattr(collecting, 'half', counted)
    monkeypatch.setattr(collecting, 'write_shard', written)
    monkeypatch.chdir(tmp_path)
    assert main(flags(work)) == 0
    assert len(counts) == SHARDS
    assert counts[0] > 0
    assert max(counts) <= 5 * collecting.BATCHES  # four maps and the probabilities of each batch


def test_other_settings_are_refused(work, undisturbed, monkeypatch, capsys):
    """A folder belongs to one report; a page of another size may be made from it without computing anything."""
    monkeypatch.chdir(undisturbed.parent)
    monkeypatch.setattr(collecting, 'explain', None)
    before = (undisturbed / 'report.parquet').read_bytes()
    assert main(flags(work, '--gallery', '5')) == 0
    assert (undisturbed / 'index.html').read_text().count('<article') == 5
    assert (undisturbed / 'report.parquet').read_bytes() == before
    capsys.readouterr()
    assert main(flags(work, '--batch-size', '3')) == 2
    error = ' '.join(capsys.readouterr().err.split())
    assert 'is of another report (batch_size: 2, now 3)' in error
    assert main(flags(work, '--data-dir', str(work))) == 2  # as many images of another folder would pass
    assert 'is of another report (data_dir: ' in ' '.join(capsys.readouterr().err.split())
    with monkeypatch.context() as other:  # a local-dir: model whose config.json was changed
        other.setattr(command, 'input_config', lambda model: {**input_config(model), 'mean': (0.4, 0.5, 0.5)})
        assert main(flags(work)) == 2
    said = ' '.join(capsys.readouterr().err.split())
    assert re.search(r"is of another report \(preprocessing: \{.*'mean': \[0\.4, 0\.5, 0\.5\]", said)
    assert main(flags(work, '--gallery', '3')) == 0  # as other tests expect it
