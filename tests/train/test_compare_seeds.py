"""compare_seeds.py against Student's t by hand, and what it refuses."""
import json
import math

import pytest

import compare_seeds

T = 4.302652729911275  # 97.5 % quantile with two degrees of freedom


@pytest.fixture
def file(tmp_path):
    """Three runs each of two networks; one of them has a fourth."""
    def run(name, seed, top1, precision):
        command = f'python train/train.py --seed {seed} --experiment {name}-cifar10-nano-seed{seed}-b793c393'
        return {'seed': seed, 'commands': [command], 'last': {'epoch': 1, 'loss': 1., 'top1': top1},
                'validation': {'top1': 0., 'patch_precision': precision, 'patch_precision_all_patches': 60.,
                               'images': 500, 'command': 'x'}}
    rows = [run('a', seed, *values) for seed, values in enumerate([(70., 61.), (71., 63.), (75., 62.), (99., 99.)])]
    rows += [run('b', seed, *values) for seed, values in enumerate([(69., 61.), (68., 61.), (70., 61.)])]
    path = tmp_path / 'runs.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    return path


def test_differences_of_seeds(file, capsys):
    """Means of the seeds that both have, and their difference seed by seed: 1, 3, 5."""
    assert compare_seeds.main([str(file), 'a-*', 'b-*']) == 0
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ['3 seeds', 'a-*', 'b-*', 'difference']
    cells = {row[0]: row[1:] for row in lines[2:]}
    half = T * 2 / math.sqrt(3)
    assert cells['top1'][2] == f'+3.00 [{3 - half:+.2f}, {3 + half:+.2f}]'
    assert cells['top1'][0].startswith('72.00 [')
    half = T / math.sqrt(3)
    assert cells['patch_precision, less all patches'] == [
        f'2.00 [{2 - half:.2f}, {2 + half:.2f}]', '1.00', f'+1.00 [{1 - half:+.2f}, {1 + half:+.2f}]']
    assert cells['patch_precision_all_patches'] == ['60.00', '60.00', '+0.00']
    assert set(cells) == {'top1', 'patch_precision', 'patch_precision_all_patches', 'patch_precision, less all patches'}


@pytest.mark.parametrize(('patterns', 'message'), [
    (('c-*', 'b-*'), "PATTERN: 'c-*' must choose one of a-cifar10"), (('*', 'b-*'), "PATTERN: '*' must choose one of")])
def test_patterns_of_no_network_or_two(file, capsys, patterns, message):
    assert compare_seeds.main([str(file), *patterns]) == 2
    assert message in capsys.readouterr().err
