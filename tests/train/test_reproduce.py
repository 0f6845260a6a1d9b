"""train/reproduce.py: the paper's numbers, one real run, and what is not run; train/benchmark.py."""
import json
import os
from pathlib import Path

import pytest
import timm
import yaml

import benchmark
import reproduce
import timm_lossattn  # noqa: F401  (registers the models)

TABLES = yaml.safe_load((Path(reproduce.__file__).parent / 'paper_tables.yaml').read_text())
RECIPES = yaml.safe_load((Path(reproduce.__file__).parent / 'recipes.yaml').read_text())


@pytest.mark.parametrize('number', TABLES['tables'])
def test_tables_name_models_and_datasets(number):
    """Every row is a model of the zoo, every column a dataset of the recipes, with one number for each."""
    table = TABLES['tables'][number]
    for row in table['rows'].values():
        assert row['paper'] is None or len(row['paper']) == len(table['columns'])
        for spec, value in zip(table['columns'].values(), row['paper'] or [0.] * len(table['columns'])):
            assert spec['dataset'] in RECIPES['datasets']
            assert value is None or timm.is_model(row['model'] + spec.get('model_suffix', ''))


@pytest.mark.parametrize(('model', 'recipe'), [
    ('resnet18_meanpool_conv', 'adam'), ('vgg11_bn_routing_caps_s2', 'adam'), ('resnet18_attn_conv', 'sgd'),
    ('resnet18_lossattn_caps', 'sgd'), ('vgg16_bn_cifar', 'sgd')])
def test_recipe_of_the_paper(model, recipe):
    assert reproduce.recipe_of(model, None) == recipe
    assert reproduce.recipe_of(model, 'fast') == 'fast'


def test_one_row(folder, tmp_path, capfd):
    """The row that was asked for is run once; the others say that they were not; a second call runs nothing."""
    command = ['--table', '2', '--rows', 'resnet18_cifar', '--columns', 'CIFAR-10', '--runs', '1', '--output',
               str(tmp_path / 'out'), '--', '--dataset', f'hfds/{folder}', '--data-dir', str(tmp_path), '--input-key',
               'image', '--val-split', 'validation', '--num-classes', '2', '--epochs', '1', '--batch-size', '8',
               '--workers', '0', '--device', 'cpu']
    os.environ['OMP_NUM_THREADS'] = '1'
    assert reproduce.main(command) == 0, capfd.readouterr().err
    table = (tmp_path / 'out' / 'table2.md').read_text()
    (result,) = (tmp_path / 'out').glob('resnet18_cifar-cifar10-sgd-seed0-*/result.json')  # a mark of the other flags
    top1 = json.loads(result.read_text())['last']['top1']
    rows = {line.split('|')[1].strip(): line for line in table.splitlines() if line.startswith('| ')}
    assert rows['resnet18_cifar'] == \
        f'| resnet18_cifar | {top1:.2f} (n = 1) / 94.76 | not run / 76.61 | not run / 96.98 |'
    assert rows['vgg11_bn_lossattn_conv'].count('not run') == 3
    assert (tmp_path / 'out' / 'table2.png').read_bytes().startswith(b'\x89PNG')
    before = result.stat().st_mtime_ns
    assert reproduce.main(command) == 0
    assert result.stat().st_mtime_ns == before


def test_failed_run_is_reported(tmp_path, capfd):
    """The table is written all the same; exit code 2."""
    assert reproduce.main(['--sweep', 'xi', '--runs', '1', '--output', str(tmp_path), '--', '--data-dir',
                           '/no/such/folder', '--dataset', '', '--device', 'cpu']) == 2
    assert 'train.py ended with exit code 2' in capfd.readouterr().err
    assert (tmp_path / 'figure7_xi.md').read_text().count('not run') == 7


def test_benchmark(tmp_path):
    """Every number is there, positive where it is an amount."""
    file = tmp_path / 'benchmark.json'
    assert benchmark.main(['--model', 'resnet18_lossattn_conv_nano', '--batch-size', '2', '--device', 'cpu',
                           '--channels-last', '--matmul-size', '128', '--repeats', '1', '--json', str(file)]) == 0
    result = json.loads(file.read_text())
    assert result['parameters_million'] == pytest.approx(0.51, abs=0.01)
    assert result['gmacs'] == pytest.approx(0.19, abs=0.01)
    for name in ('forward_images_per_second', 'train_images_per_second', 'matmul_gflops', 'peak_memory_mib',
                 'forward_fraction_of_matmul', 'train_fraction_of_matmul'):
        assert result[name] > 0
    assert {'patch_outputs_cost', 'explain_cost', 'task_cost', 'loss_cost', 'peak_memory_checkpointing_mib', 'command',
            'hardware'} <= set(result)
    assert benchmark.main(['--model', 'no_such_model']) == 2
