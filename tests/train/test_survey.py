"""survey.py: models and checkpoints counted by kind."""
import json

import pytest
import timm

import survey
from timm_lossattn.evaluation.check import Check
from timm_lossattn.evaluation.check_all import models_to_check


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """The file of checks has four models."""
    exact = {'layout': 'NCHW', 'grid': '7×7', 'strict': True}
    found = [
        Check('resnet18', kind='A', additive_error=2e-7, stock_error=0., **exact),
        Check('resnet34', kind='A', additive_error=4e-7, stock_error=1e-8, **exact),
        Check('vit_tiny_patch16_224', kind='D', why='its class token decides'),
        Check('volo_d1_224', kind='D', why='its head does not take single patches (IndexError: max())'),
    ]
    file = tmp_path / 'checks.jsonl'
    file.write_text(''.join(f'{json.dumps(check.to_dict())}\n' for check in found))
    monkeypatch.setattr(survey, 'CHECKS', file)


def published(*names):
    return sum(len(timm.list_pretrained(f'{name}.*')) for name in names)


def test_counts(checks, capsys):
    """Against timm's own lists of a model's weights; an unfinished file says how much is missing."""
    assert survey.main(['--checks']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f'| A | 2 | {published("resnet18", "resnet34")} | – |' in lines
    assert '| B | 0 | 0 | – |' in lines
    tokens = published('vit_tiny_patch16_224', 'volo_d1_224')
    assert (f'| D | 2 | {tokens} | its class token decides (1); its head does not take single patches (1) |') in lines
    assert published('resnet18') > 1
    assert f', {len(models_to_check()) - 4} are still to be checked.' in lines[0]
    assert 'additive error is 4e-07' in lines[0]
    assert 'stock logits 1e-08; 0 have another' in lines[0]


def test_write_leaves_the_rest_of_the_document(checks, tmp_path, monkeypatch):
    """Only what stands between its own marks changes, and a second time nothing."""
    document = tmp_path / 'timm_models.md'
    before = survey.DOCUMENT.read_text()
    document.write_text(before)
    monkeypatch.setattr(survey, 'DOCUMENT', document)
    survey.main(['--checks', '--write'])
    after = document.read_text()
    for text in (before, after):
        assert text.count(survey.BEGIN_COUNTS) == text.count(survey.BEGIN) == 1
    assert after.split(survey.BEGIN_COUNTS)[0] == before.split(survey.BEGIN_COUNTS)[0]
    assert after.split(survey.BEGIN)[1] == before.split(survey.BEGIN)[1]
    assert '| A | 2 |' in after
    survey.main(['--checks', '--write'])
    assert document.read_text() == after
