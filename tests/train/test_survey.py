"""survey.py: models and checkpoints counted by kind."""
import json
import multiprocessing
from types import SimpleNamespace

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


def test_interrupted(tmp_path, monkeypatch, capsys):
    """Half a line is checked again, what took too long as well; the rest is kept."""
    names = {'resnet': 'test_resnet', 'vision_transformer': 'test_vit', 'slow': 'test_convnext'}
    checked = []

    class Pool:
        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def apply_async(self, function, args):
            self.name, = args
            return self

        def get(self, timeout):
            checked.append(self.name)
            if self.name == names['slow']:
                raise multiprocessing.TimeoutError
            return {**Check(self.name, kind='A').to_dict(), 'with_avg': None}

    monkeypatch.setattr(survey, 'smallest_models', lambda: names)
    monkeypatch.setattr(survey.multiprocessing, 'get_context', lambda method: SimpleNamespace(Pool=Pool))
    file = tmp_path / 'survey.jsonl'
    assert survey.main(['--output', str(file)]) == 0
    assert f'not finished in {survey.SECONDS} s' in capsys.readouterr().out
    kept = file.read_text()
    assert [json.loads(line)['module'] for line in kept.splitlines()] == ['resnet', 'vision_transformer']
    file.write_text(kept[:-20])
    assert survey.main(['--output', str(file)]) == 0
    assert checked == ['test_resnet', 'test_vit', 'test_convnext', 'test_vit', 'test_convnext']
    assert file.read_text() == kept


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
