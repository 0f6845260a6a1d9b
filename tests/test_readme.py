"""The documents are true: snippets run as printed, tables are what the commands print, links point somewhere."""
import importlib
import inspect
import json
import pkgutil
import re
import runpy
import shlex
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gallery import commands, draw
from lib.command import parse_args
from timm_lossattn import explain, load_model
from timm_lossattn.cli import build_parser
from timm_lossattn.evaluation.check import check_model
from timm_lossattn.explanation.drawing import PANELS
from timm_lossattn.report.table import make_schema

ROOT = Path(__file__).parent.parent
OTHERS = ['MODEL_CARD.md', 'train/TRAINING.md', 'hub/README.md']
DOCUMENTS = ['README.md', *sorted(f'docs/{file.name}' for file in (ROOT / 'docs').glob('*.md'))]


def snippets(document):
    """The Python snippets of a document."""
    return re.findall(r'```python\n(.*?)```', (ROOT / document).read_text(), flags=re.DOTALL)


ALONE = [(document, number) for document in DOCUMENTS for number in range(len(snippets(document)))]
AT_LEAST = {'README.md': 3, 'docs/explain.md': 4, 'docs/fine_tune.md': 1, 'docs/publish.md': 1, 'docs/report.md': 1}
NEEDS_A_REPORT = ('docs/report.md', 0)  # tests/report runs it on one


@pytest.mark.parametrize('document', DOCUMENTS)
def test_snippets_are_found(document):
    """A fence that is broken would take its snippet's test with it; a document that gets its first is entered."""
    found = len(snippets(document))
    assert found >= AT_LEAST.get(document, 0)
    assert bool(found) is (document in AT_LEAST)


@pytest.mark.parametrize(('document', 'number'), [one for one in ALONE if one != NEEDS_A_REPORT])
def test_snippets(monkeypatch, capsys, tmp_path, document, number):
    """Each Python snippet runs by itself, as if from the root, where it writes; it prints what the README says."""
    for name in ('hub', 'tests'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    snippet = snippets(document)[number]
    assert re.search('^(import|from) timm_lossattn', snippet, re.MULTILINE)  # here its models are registered already
    exec(compile(snippet, document, 'exec'), {})
    said = re.findall(r'^print\(.*\)\s+# (.*)$', snippet, flags=re.MULTILINE) if document == 'README.md' else []
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= len(said)
    for comment, line in zip(said, printed):
        assert line.startswith(re.split(r'; \.\.\.|: [a-z]', comment)[0])


def test_number_of_exact_models():
    """The README counts what `timm-lossattn check --all` found."""
    checks = (ROOT / 'train' / 'results' / 'check_all.jsonl').read_text().splitlines()
    kinds = [kind for kind in (json.loads(line)['kind'] for line in checks) if kind != 'large']
    exact = sum(kind in ('A', 'B', 'C') for kind in kinds)
    text = (ROOT / 'README.md').read_text().replace('\n', ' ')
    assert f'exact for {exact:,} of the {len(kinds):,} models under 100 million parameters' in text
    assert f'for {kinds.count("A"):,} a plain sum of what patches say' in text
    assert f'for {kinds.count("B") + kinds.count("C"):,} once a factor of the whole image' in text


def first_cells(document, heading):
    """Names in code of the first column of the first table after a heading, in their order."""
    table = (ROOT / document).read_text().split(f'\n{heading}\n')[1].split('\n|---|---|\n')[1].split('\n\n')[0]
    return [name for row in table.splitlines() for name in re.findall(r'`(\w+)`', row.split('|')[1])]


def test_fields_of_the_numbers():
    """The table of docs/explain.md has every field of the JSON that the shell writes, once, and no other."""
    cat = ROOT / 'tests' / 'data' / 'cifar10_test_00000_cat.png'
    numbers = explain(load_model('resnet18_lossattn_conv_nano'), cat).to_dict()
    assert sorted(first_cells('docs/explain.md', '## The numbers')) == sorted(
        [*numbers, 'image', 'model', 'architecture', 'checkpoint', 'xi', 'version'])


def test_columns_of_the_report():
    """The table of docs/report.md has the columns of the file, in their order."""
    assert first_cells('docs/report.md', '## The table') == make_schema(36, 5, {}).names


def test_overlay():
    """The recipe of docs/explain.md, on a picture as orange as its colour: the evidence can be seen all the same."""
    (recipe,) = [code for code in snippets('docs/explain.md') if 'overlay =' in code]
    lines = [line for line in recipe.splitlines() if re.match('share|color|grey|overlay', line)]
    orange = Image.new('RGB', (2, 1), (222, 92, 0))
    namespace = {'np': np, 'heat': np.array([[0., 1.]]),
                 'explanation': SimpleNamespace(source=lambda index: SimpleNamespace(image=orange))}
    exec('\n'.join(lines), namespace)
    ((without, most),) = namespace['overlay']
    assert np.abs(most - without).max() > 0.5
    assert np.ptp(without) == 0  # grey


def printed_commands(document, beginning):
    """What a document prints after a beginning, whose only group is the name, to the end of the line or of its code."""
    text = re.sub('<!--.*?-->', '', (ROOT / document).read_text().replace('\\\n', ' '))
    return [(name, shlex.split(rest, comments=True))
            for name, rest in re.findall(rf'{beginning}([^`\n]*)', text)]


@pytest.mark.parametrize('document', [*DOCUMENTS, *OTHERS])
def test_commands_parse(document):
    """The command line has every flag of every `timm-lossattn` command that a document prints, and every panel."""
    found = printed_commands(
        document, r'(?:timm-lossattn |-m timm_lossattn\.cli )(explain|report|check|export|list)\b')
    assert found or document not in ('README.md', 'docs/explain.md', 'docs/gallery.md', 'docs/report.md')
    for name, arguments in found:
        if arguments or name == 'list':  # else it is only named
            args = build_parser().parse_args([name, *arguments])
            assert set(getattr(args, 'panels', PANELS[0]).split(',')) <= set(PANELS)


class Parsed(BaseException):
    """What ends a script after its command line was read; no handler of errors takes it."""


ELSEWHERE = [
    'train/export_weights.py',  # MODEL_CARD.md has the command at the commit that it names
    'train/train.py']  # test_training_commands_parse


@pytest.mark.parametrize('document', [*DOCUMENTS, *OTHERS])
def test_script_commands_parse(document, monkeypatch):
    """Every script takes the flags of every `python train/…` and `python hub/…` command that a document prints."""
    parse = ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    found = printed_commands(document, r'python ((?:train|hub)/\w+\.py)')
    assert found or document not in (*OTHERS, 'docs/blood_cells.md', 'docs/leaderboard.md', 'docs/publish.md')
    for script, arguments in found:
        if script in ELSEWHERE:
            continue
        main = inspect.unwrap(importlib.import_module(Path(script).stem).main)  # without its handler of errors
        with monkeypatch.context() as patch:
            patch.setattr('sys.argv', [script, *arguments])
            patch.setattr(ArgumentParser, 'parse_args', parse_and_stop)
            with pytest.raises(Parsed):
                main()
        if '--' in arguments:  # flags of train.py, which also looks whether they go together
            parse_args(arguments[arguments.index('--') + 1:])


def test_gallery_is_drawn():
    """Every picture of the gallery stands below the one command that draws it, and the README shows two of them."""
    text = (ROOT / 'docs' / 'gallery.md').read_text()
    drawn = commands(text)
    assert list(drawn) == re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)
    for picture, arguments in drawn.items():
        assert arguments[0] == 'explain'
        assert (ROOT / 'docs' / picture).is_file()
        assert (ROOT / arguments[1]).is_file()
    shown = re.findall(r'docs/(gallery/\w+\.jpg)', (ROOT / 'README.md').read_text())
    assert shown
    assert set(shown) <= set(drawn)
    demo = [shlex.split(line)[1:-2] for line in (ROOT / 'Makefile').read_text().replace('\\\n', ' ').splitlines()
            if line.startswith('\t$(BIN)/timm-lossattn explain')]
    assert drawn[shown[1]] in demo  # `make demo` draws the README's picture as well


def test_gallery_draws_again(tmp_path, monkeypatch):
    """A command of the gallery draws the picture that is there: same size, hardly another pixel."""
    monkeypatch.chdir(ROOT)
    drawn = commands((ROOT / 'docs' / 'gallery.md').read_text())
    draw(drawn['gallery/bird.jpg'], tmp_path / 'again.jpg')
    with Image.open(tmp_path / 'again.jpg') as again, Image.open(ROOT / 'docs' / 'gallery' / 'bird.jpg') as there:
        assert again.size == there.size
        assert np.abs(np.asarray(again, dtype=float) - np.asarray(there)).mean() < 1  # fonts differ a little


def test_numbers_of_tiny_imagenet():
    """The table of TRAINING.md has the numbers of the two commands above it, and the paper's."""
    text = (ROOT / 'train' / 'TRAINING.md').read_text()
    kept = [json.loads((ROOT / 'train' / 'results' / 'tiny_imagenet' / f'{name}.json').read_text())
            for name in ('shipped', 'shipped_xi1')]
    measures = ['localization_ap', 'patch_precision', 'patch_recall', 'patch_f']
    rows = {name: ' | '.join(f'{found[key]:.2f}' for key in ('top1', *measures))
            for name, found in zip(('ξ = 0.1, as they ship', 'ξ = 1'), kept)}
    none = ' | '.join(f'{kept[0][key + "_all_patches"]:.2f}' for key in measures)
    rows['no choice: all patches, or a box around them'] = f'– | {none}'
    rows['no choice: the best centred square'] = f'– | {kept[0]["localization_ap_centred_square"]:.2f} | – | – | –'
    paper = yaml.safe_load((ROOT / 'tests' / 'data' / 'paper_results.yaml').read_text())['table_4_tiny_imagenet_64px']
    rows["the paper's ResNet18 in full size, ξ = 0.1"] = ' | '.join(
        f'{value:.2f}' for value in paper['resnet18_lossattn_conv_s2'])
    for name, row in rows.items():
        assert f'| {name} | {row} |' in text
    for found in kept:
        assert found['command'] in text.replace('\\\n    ', '')


def test_numbers_of_photographs():
    """What the README says of the tripod and of the receptive field is what stock weights with and without say."""
    text = (ROOT / 'README.md').read_text().replace('\n', ' ')
    photo = ROOT / 'tests' / 'data' / 'photo_camera.jpg'
    stock, put_in = (explain(load_model(name), photo, target='tripod', against=None)
                     for name in ('tf_efficientnet_lite2', 'lossattn.tf_efficientnet_lite2'))
    assert torch.equal(stock.predicted, stock.target)
    assert torch.equal(put_in.predicted, put_in.target)
    assert float(put_in.probabilities[0, put_in.target]) > 0.999
    stated = f'{100 * float(stock.probabilities[0, stock.target]):.0f} %'
    assert f'say "tripod", with a probability of {stated} instead of more than 99.9 %' in text
    share = check_model('lossattn.tf_efficientnet_lite0', pretrained=True).own_share
    assert f'on a random input: {100 * (1 - share):.0f} % there' in text


def test_numbers_of_the_pictures():
    """What reading_explanations.md says of the bird is what the weights that ship say."""
    text = (ROOT / 'docs' / 'reading_explanations.md').read_text().replace('\n', ' ')
    bird = ROOT / 'tests' / 'data' / 'cifar10_test_00025_bird.png'
    why_not = explain(load_model('resnet18_lossattn_caps_nano'), bird, target='bird', against='cat')
    assert why_not.labels[int(why_not.prediction.logits.argmax())] == 'cat'
    assert f'the sum, {float(why_not.evidence.sum()):.2f}, is'.replace('-', '−') in text
    explanation = explain(load_model('resnet18_lossattn_conv_nano'), bird)
    weight, evidence = explanation.prediction.alpha[0], explanation.evidence[0]
    largest, second, _, fourth = weight.argsort(descending=True)[:4].tolist()
    assert f"the bird's head ({float(weight[largest]):.2f})" in text
    assert largest == int(evidence.argmax())
    assert f'one of {float(weight[second]):.2f} that adds nothing ({float(evidence[second]):+.2f})' in text
    assert f'one of {float(weight[fourth]):.2f} that speaks against bird ({float(evidence[fourth]):+.2f})'.replace(
        '-', '−') in text
    low, high = map(float, explanation.prediction.logits.aminmax())
    assert f'ten logits between {low:.1f} and {high:.1f}' in (
        ROOT / 'docs' / 'other_tools.md').read_text().replace('\n  ', ' ')


TABLES = {'docs/models.md': 'model_table', 'MODEL_CARD.md': 'weights_table',
          'docs/reading_explanations.md': 'receptive_field_table', 'docs/leaderboard.md': 'leaderboard_table'}


@pytest.mark.parametrize('document', [*DOCUMENTS, 'MODEL_CARD.md', 'train/TRAINING.md'])
def test_tables_are_current(document):
    """The tables are what `python train/model_table.py` prints, and what the files hold that marks name."""
    function = TABLES.get(document)
    functions = runpy.run_path(str(ROOT / 'train' / 'model_table.py'))
    text = (ROOT / document).read_text()
    assert function is None or functions[function]() in text
    assert functions['with_included_files'](text) == text


@pytest.mark.parametrize('document', [
    *DOCUMENTS, 'MODEL_CARD.md', 'train/TRAINING.md', 'hub/README.md', 'tests/data/README.md'])
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


@pytest.mark.parametrize('document', [*DOCUMENTS, 'MODEL_CARD.md', 'train/TRAINING.md'])
def test_training_commands_parse(document):
    """train.py accepts the flags of every command that a document prints."""
    text = (ROOT / document).read_text().replace('\\\n', ' ')
    found = re.findall(r'train/train\.py ([^`\n|#]*)', text)
    assert found or document not in ('docs/fine_tune.md', 'MODEL_CARD.md', 'train/TRAINING.md')
    for command in found:
        if not command.strip() or '...' in command:
            continue
        assert parse_args(shlex.split(command)).model


@pytest.mark.parametrize('document', ['MODEL_CARD.md', 'docs/blood_cells.md', 'docs/fine_tune.md', 'train/TRAINING.md'])
def test_commands_read_what_others_wrote(document):
    """A run that a command names under output/ is where a train.py command of the page puts it."""
    text = (ROOT / document).read_text().replace('\\\n', ' ')
    runs = {str(parse_args(shlex.split(command)).folder)
            for command in re.findall(r'train/train\.py ([^`\n|#]*)', text) if '--experiment' in command}
    read = re.findall(
        r'(?:local-dir:|bundle\.py |-checkpoint )(output/[^\s`]+?)(?:/hub|/(?:model_best|last)\.pth\.tar|\s)', text)
    assert read
    assert set(read) <= runs


def test_numbers_beside_table_6_mini():
    """What TRAINING.md says of choosing nothing is what its command wrote."""
    measured = json.loads((ROOT / 'train' / 'results' / 'table6-mini' / 'shipped.json').read_text())
    text = (ROOT / 'train' / 'TRAINING.md').read_text()
    assert f"validate.py {measured['command'].split('validate.py ')[1]}" in text.replace('\\\n    ', '')
    text = ' '.join(text.split('Localisation says nothing here')[1].split('##')[0].split())
    for name in ('localization_ap_all_patches', 'localization_ap_centred_square', 'patches_in_object',
                 *(f'patch_{one}{which}' for one in ('precision', 'recall', 'f') for which in ('', '_all_patches'))):
        assert f'{measured[name]:.1f} %' in text, name
