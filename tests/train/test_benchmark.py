"""benchmark.py: what it measures of a model, and what it refuses."""
import json

import pytest

import benchmark


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
