"""benchmark.py and explain_cost.py: what they measure of a model, and what they refuse."""
import json

import pytest

import benchmark
import explain_cost


def test_benchmark(tmp_path, capsys):
    """Every number is there, positive where it is an amount."""
    file = tmp_path / 'benchmark.json'
    assert benchmark.main(['--model', 'resnet18_lossattn_conv_nano', '--batch-size', '2', '--device', 'cpu',
                           '--channels-last', '--gathered', '--matmul-size', '128', '--repeats', '1', '--json',
                           str(file)]) == 0
    result = json.loads(file.read_text())
    assert result['parameters_million'] == pytest.approx(0.51, abs=0.01)
    assert result['gathered_convolutions'] == 1
    assert result['gmacs'] == pytest.approx(0.19, abs=0.01)
    for name in ('forward_images_per_second', 'train_images_per_second', 'matmul_gflops', 'peak_memory_mib',
                 'forward_fraction_of_matmul', 'train_fraction_of_matmul', 'gathered_forward_speedup',
                 'gathered_explain_speedup', 'gathered_train_speedup'):
        assert result[name] > 0
    assert {'patch_outputs_cost', 'explain_cost', 'task_cost', 'loss_cost', 'peak_memory_checkpointing_mib', 'command',
            'hardware'} <= set(result)
    assert benchmark.main(['--model', 'no_such_model']) == 2
    for flags, message in ((['--gathered', '--only', 'memory'], '--gathered: is for the CPU, and for speed'),
                           (['--winograd', '--dtype', 'bfloat16'], '--winograd: is for float32')):
        capsys.readouterr()
        assert benchmark.main([*flags, '--device', 'cpu']) == 2
        assert message in capsys.readouterr().err
    assert benchmark.main(['--capsules', '--dtype', 'bfloat16', '--device', 'cpu']) == 2  # it would not have been so
    assert '--dtype: --capsules measures' in capsys.readouterr().err


def test_explain_cost(tmp_path, capsys):
    """Every ratio is there; a layer that the model has not is one line."""
    file = tmp_path / 'cost.json'
    assert explain_cost.main(['--model', 'test_resnet', '--target-layer', 'layer4', '--batch-size', '1', '--repeats',
                              '1', '--warmup', '0', '--device', 'cpu', '--json', str(file)]) == 0
    result = json.loads(file.read_text())
    for name in ('explain', 'explain_stock', 'explain_map'):
        assert result[f'{name}_over_forward'] > 0
        assert result[f'grad_cam_over_{name}'] > 0
    capsys.readouterr()
    assert explain_cost.main(['--model', 'test_resnet', '--device', 'cpu']) == 2
    assert "--target-layer: test_resnet has no layer 'bn2'; on top it has conv1, " in capsys.readouterr().err
    assert explain_cost.main(['--model', 'no_such_model']) == 2
