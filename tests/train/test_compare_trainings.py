"""compare_trainings.py on measurements whose means and differences are known."""
import json

import pytest

import compare_trainings


def way(folder, top1, energies, precision):
    """What the scripts leave of one way to train: evidence of the given energies, whatever the box."""
    folder.mkdir()
    epoch = {'epoch': 0, 'seconds': 61.2, 'train': {'images_per_second': 7.25}, 'eval': {'top1': 12.}}
    (folder / 'result.json').write_text(json.dumps({
        'last': {'top1': 12.}, 'commands': [f'train {folder.name}'], 'epochs': [epoch]}))
    (folder / 'test.json').write_text(json.dumps(
        {'top1': top1, 'loss': 0.25, 'images': 200, 'command': f'validate --val-split test {folder.name}'}))
    (folder / 'boxed.json').write_text(json.dumps({
        'images': len(energies), 'patch_precision': precision, 'patch_recall': 50., 'patch_f': 55.,
        'patch_precision_all_patches': 20., 'patch_recall_all_patches': 100., 'patch_f_all_patches': 33.3,
        'patches_in_object': 17.,
        'command': f'validate {folder.name}'}))
    mean = sum(energies) / len(energies)
    (folder / 'compare.json').write_text(json.dumps({
        'command': 'compare', 'image': {
            'ours': {'energy': {'mean': mean, 'low': mean - .01, 'high': mean + .01, 'n': len(energies)}},
            'random': {'energy': {'mean': 0.25, 'low': None, 'high': None, 'n': 3}}}}))
    lines = [{'kind': 'asked'}, *({'kind': 'image', 'index': i, 'rows': {
        'ours': {'energy': energy}, 'α alone': {'energy': energy + 0.5}}} for i, energy in enumerate(energies))]
    (folder / 'images.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return folder


def rows(text):
    return {cells[0]: cells[1:] for cells in (
        [cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('| '))}


def test_table(tmp_path, capsys):
    first = way(tmp_path / 'a', 90., [0.2 + 0.01 * i for i in range(20)], 61.25)
    better = way(tmp_path / 'b', 95., [0.3 + 0.01 * i + 0.002 * (i % 2) for i in range(20)], 70.)
    same = way(tmp_path / 'c', 90., [0.2 + 0.01 * i + (0.05 if i % 2 else -0.05) for i in range(20)], 61.)
    out = tmp_path / 'table.md'
    assert compare_trainings.main(
        [f'mean={first}', f'other={better}', f'third={same}', '--out', str(out)]) == 0
    text = out.read_text()
    summary, differences = (rows(part) for part in text.split('Differences'))
    # Wilson's interval of 180 of 200, by its formula
    assert summary['mean'] == ['90.00 [85.06, 93.43]', '0.250', '61.2', '50.0', '55.0', '61', '7.2']
    assert summary['other: all patches'] == ['–', '–', '20.0', '100.0', '33.3', '–', '–']
    assert summary['patches in the object'] == ['–', '–', '17.0', '–', '–', '–', '–']
    assert summary['other: evidence'][0] == '0.396 [0.386, 0.406]'
    assert summary['random'] == ['0.250', '–', '–']
    assert differences['other: evidence'][0].startswith('**+0.10')
    assert differences['third: evidence'][0].startswith('+0.000 [-0.0')
    assert differences['other: α alone less evidence'][0].startswith('**+0.60')  # not to the first way's own α
    assert text.count('compare\n') == 1
    for name in 'abc':
        for command in ('train', 'validate --val-split test', 'validate'):
            assert f'{command} {name}\n' in text
    capsys.readouterr()


@pytest.mark.parametrize('given', ['folder', 'name=', 'name=/no/such/folder'])
def test_errors(given, tmp_path, capsys):
    assert compare_trainings.main([given, '--out', str(tmp_path / 'x.md')]) == 2
    assert 'FOLDER: ' in capsys.readouterr().err


def test_measurements_that_do_not_compare(tmp_path, capsys):
    """Another data set, or another number explained, is no difference between trainings."""
    first, other = way(tmp_path / 'a', 90., [0.2], 61.), way(tmp_path / 'b', 90., [0.2], 61.)
    asked = json.loads((other / 'compare.json').read_text())
    (other / 'compare.json').write_text(json.dumps(asked | {'scalar': 'logit'}))
    assert compare_trainings.main([f'a={first}', f'b={other}', '--out', str(tmp_path / 'x.md')]) == 2
    assert "b was compared with scalar 'logit', the first with None" in capsys.readouterr().err
    assert not (tmp_path / 'x.md').exists()


def test_older_measurement(tmp_path, capsys):
    """A boxed.json from before there were baselines is an error that says what to do."""
    folder = way(tmp_path / 'a', 90., [0.2], 61.)
    boxed = json.loads((folder / 'boxed.json').read_text())
    del boxed['patch_f_all_patches']
    (folder / 'boxed.json').write_text(json.dumps(boxed))
    assert compare_trainings.main([f'a={folder}', '--out', str(tmp_path / 'x.md')]) == 2
    assert 'boxed.json has no patch_f_all_patches; run validate.py again' in capsys.readouterr().err
