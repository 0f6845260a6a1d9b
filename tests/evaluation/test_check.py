"""check.py and the command: exact models by kind, refused ones with a reason."""
import pytest

from timm_lossattn.cli import main
from timm_lossattn.evaluation.check import check_model


@pytest.mark.parametrize(('name', 'kind', 'layout'), [
    ('test_resnet', 'A', 'NCHW'), ('test_convnext', 'B', 'NCHW'), ('mobilenetv3_small_050', 'C', 'NCHW')])
def test_exact(name, kind, layout):
    """Kind, errors at rounding, the stock state dict."""
    found = check_model(name)
    assert (found.kind, found.layout, found.strict) == (kind, layout, True)
    assert 0 <= found.additive_error <= 1e-5
    assert 0 <= found.stock_error <= 1e-5
    assert found.grid == ('7×7' if kind == 'C' else '5×5')


def test_refused_and_with_average_pooling():
    """A class token decides: refused, with the way out; with average pooling the same model is exact."""
    found = check_model('test_vit')
    assert found.kind == 'D'
    assert 'global_pool="avg"' in found.reason
    assert found.additive_error is None
    assert check_model('test_vit', global_pool='avg').kind in 'AB'


def test_command(capsys):
    """A table, exit code 1 for a refused model, one line for no model."""
    assert main(['check', 'lossattn.test_resnet']) == 0
    assert 'A: the head is affine' in capsys.readouterr().out
    assert main(['check', 'test_vit']) == 1
    assert 'class token decides' in ' '.join(capsys.readouterr().out.split())
    assert main(['check', 'test_vit', '--global-pool', 'avg']) == 0
    capsys.readouterr()
    assert main(['check', 'resnet18_lossattn_conv_nano']) == 2
    assert 'a patch model already, exact by its own head' in capsys.readouterr().err
    assert main(['check', 'nonsense']) == 2
    assert "timm has no model 'nonsense'" in capsys.readouterr().err
