"""survey.py: models and checkpoints counted by kind, and the smallest model of each family."""
import json

import pytest
import timm

import survey
from lib.markdown import END
from timm_lossattn.evaluation.check import Check
from timm_lossattn.evaluation.check_all import models_to_check


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """The file of checks has four models."""
    exact = {'layout': 'NCHW', 'grid': '7×7', 'strict': True}
    found = [
        Check('resnet18', kind='A', parameters_million=12., additive_error=2e-7, stock_error=0., **exact),
        Check('resnet34', kind='A', parameters_million=11., additive_error=4e-7, stock_error=1e-8, **exact),
        Check('vit_tiny_patch16_224', kind='D', parameters_million=5.7, why='its class token decides',
              reason='X: the logits are no sum over patches: its class token decides. Y.',
              with_avg=Check('vit_tiny_patch16_224', kind='B', **exact).to_dict()),
        Check('volo_d1_224', kind='D', parameters_million=26., why='its head does not take single patches'),
    ]
    file = tmp_path / 'checks.jsonl'
    file.write_text(''.join(f'{json.dumps(check.to_dict())}\n' for check in found))
    monkeypatch.setattr(survey, 'CHECKS', file)


def published(*names):
    return sum(len(timm.list_pretrained(f'{name}.*')) for name in names)


def test_counts(checks, capsys):
    """Against timm's own lists of a model's weights; an unfinished file says how much is missing."""
    assert survey.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f'| A | 2 | {published("resnet18", "resnet34")} | – |' in lines
    assert '| B | 0 | 0 | – |' in lines
    tokens = published('vit_tiny_patch16_224', 'volo_d1_224')
    assert f'| D | 2 | {tokens} | its class token decides (1); its head does not take single patches (1) |' in lines
    assert published('resnet18') > 1
    assert f', {len(models_to_check()) - 4} are still to be checked.' in lines[0]
    assert 'additive error is 4e-07' in lines[0]
    assert 'stock logits 1e-08; 0 have another' in lines[0]


def test_families(checks, capsys):
    """The smallest model that was checked of each of timm's modules; of a refused one also with average pooling."""
    assert survey.main([]) == 0
    out = capsys.readouterr().out
    rows = {line.split(' | ')[0][2:]: line for line in out.split('| family |')[1].splitlines() if line.startswith('| ')}
    assert set(rows) == {'resnet', 'vision_transformer', 'volo'}
    assert '`resnet34` | A | NCHW | 7×7 | 4e-07 | 1e-08 | – |' in rows['resnet']
    assert '`vit_tiny_patch16_224` | D → B | ' in rows['vision_transformer']
    assert 'its class token decides; with `global_pool="avg"` |' in rows['vision_transformer']
    assert '`volo_d1_224` | D | ' in rows['volo']
    assert '3 families' in out
    assert '1 of kind A, 0 of kind B, 0 of kind C, 2 of kind D. ' in out
    assert 'Of kind D, with `global_pool="avg"`: 0 of kind A, 1 of kind B, 0 of kind C.' in out


def test_no_checks(tmp_path, monkeypatch, capsys):
    """Nothing is written."""
    monkeypatch.setattr(survey, 'CHECKS', tmp_path / 'none.jsonl')
    monkeypatch.setattr(survey, 'DOCUMENT', None)
    assert survey.main(['--write']) == 2
    assert 'there is no' in capsys.readouterr().err


def test_write_leaves_the_rest_of_the_document(checks, tmp_path, monkeypatch):
    """Only what stands between its marks changes, and a second time nothing."""
    document = tmp_path / 'timm_models.md'
    before = survey.DOCUMENT.read_text()
    document.write_text(before)
    monkeypatch.setattr(survey, 'DOCUMENT', document)
    assert survey.main(['--write']) == 0
    after = document.read_text()

    def around(text):
        """What stands before, between and behind the two tables."""
        first, rest = text.split(survey.BEGIN_KINDS)
        between, last = rest.split(END, 1)[1].split(survey.BEGIN_FAMILIES)
        return first, between, last.split(END, 1)[1]
    assert around(after) == around(before)
    assert '| A | 2 |' in after
    assert '3 families' in after
    assert survey.main(['--write']) == 0
    assert document.read_text() == after
