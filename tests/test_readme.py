"""The documents are true: snippets run as printed, tables are what the commands print, links point somewhere."""
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest

from lib.command import parse_args

ROOT = Path(__file__).parent.parent


def test_readme_snippets(monkeypatch, capsys):
    """The Python snippets of the README, in order, in one session, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    snippets = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), flags=re.DOTALL)
    assert len(snippets) >= 4
    namespace: dict = {}
    for snippet in snippets:
        exec(compile(snippet, 'README.md', 'exec'), namespace)


@pytest.mark.parametrize(('document', 'function'), [
    ('README.md', 'model_table'), ('MODEL_CARD.md', 'weights_table'),
    ('docs/reading_explanations.md', 'receptive_field_table'), ('train/TRAINING.md', None),
    ('docs/timm_models.md', None), ('docs/blood_cells.md', None), ('docs/leaderboard.md', 'leaderboard_table')])
def test_tables_are_current(document, function):
    """The tables are what `python train/model_table.py` prints, and what the files hold that marks name."""
    functions = runpy.run_path(str(ROOT / 'train' / 'model_table.py'))
    text = (ROOT / document).read_text()
    assert function is None or functions[function]() in text
    assert functions['with_included_files'](text) == text


@pytest.mark.parametrize('document', [
    'README.md', 'MODEL_CARD.md', 'docs/paper_to_code.md', 'docs/reading_explanations.md', 'docs/architecture.md',
    'docs/timm_models.md', 'docs/leaderboard.md', 'docs/report.md', 'docs/blood_cells.md', 'train/TRAINING.md',
    'hub/README.md'])
def test_links_exist(document):
    """Relative links and pictures exist."""
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in link]
    for link in links:
        assert ((ROOT / document).parent / link).exists(), link


def test_paper_to_code_names_exist():
    """Names of the paper-to-code table, `room.name` or `room.file.name`, are there."""
    text = (ROOT / 'docs' / 'paper_to_code.md').read_text()
    rooms = '|'.join(p.parent.name for p in (ROOT / 'timm_lossattn').glob('*/__init__.py'))
    names = re.findall(rf'`((?:{rooms})(?:\.\w+)+)', text)
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(f'timm_lossattn.{name}')


@pytest.mark.parametrize('document', ['README.md', 'MODEL_CARD.md', 'train/TRAINING.md'])
def test_training_commands_parse(document):
    """train.py accepts the flags of every command that a document prints."""
    text = (ROOT / document).read_text().replace('\\\n', ' ')
    commands = re.findall(r'train/train\.py ([^`\n|]*)', text)
    assert commands or document == 'README.md'
    for command in commands:
        if not command.strip() or '...' in command:
            continue
        assert parse_args(shlex.split(command)).model
