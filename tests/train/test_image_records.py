"""images.jsonl of a comparison: read again, each image once, and compared like with like."""
import json

import pytest

from lib.image_records import Records, means_and_differences

ASKED = {'model': 'm'}
HERE = {'commit': 'abc', 'hardware': 'CPU'}


def entry(index, ours, theirs):
    rows = {'ours': ours, 'ours, spread': ours + 1, 'theirs': theirs, 'theirs, spread': theirs + 3}
    return {'kind': 'image', 'index': index, 'rows': {row: {'energy': value} for row, value in rows.items()}}


def test_each_image_once(tmp_path):
    """Of lines for the same image the first counts; grids have numbers of their own."""
    records = Records(tmp_path / 'images.jsonl', ASKED, HERE)
    records.add([entry(0, 1., 2.), entry(1, 1., 2.), {**entry(0, 5., 5.), 'kind': 'grid 2'}])
    records.add([entry(0, 7., 7.)])
    again = Records(tmp_path / 'images.jsonl', ASKED, {'commit': 'def', 'hardware': 'GPU'})
    again.add([entry(2, 1., 2.)])
    assert [(one['commit'], one['hardware']) for one in again.of('start')] == [('abc', 'CPU'), ('def', 'GPU')]
    assert [one['rows']['ours']['energy'] for one in again.of('image')] == [1., 1., 1.]
    assert len(again.of('grid 2')) == 1
    with pytest.raises(ValueError, match='begun with another model'):
        Records(tmp_path / 'images.jsonl', {'model': 'other'}, HERE)


def test_half_a_line_is_dropped(tmp_path):
    """A kill may leave one; what follows is a line of its own again."""
    file = tmp_path / 'images.jsonl'
    Records(file, ASKED, HERE).add([entry(0, 1., 2.)])
    with file.open('ab') as lines:
        lines.write('{"kind": "image", "index": 5, "rows": {"α'.encode()[:-1])  # within a letter
    Records(file, ASKED, HERE).add([entry(1, 1., 2.)])
    assert [json.loads(line).get('index') for line in file.read_text().splitlines()] == [None, 0, 0, 1, 1]


def test_files_that_say_less(tmp_path):
    """One that does not say which weights: tables are made again, nothing is added; what it says has to be the same."""
    file = tmp_path / 'images.jsonl'
    Records(file, ASKED, HERE).add([entry(0, 1., 2.)])
    records = Records(file, ASKED | {'weights_sha256': 'abc', 'none': None}, HERE)
    assert (len(records.of('image')), records.unknown, records.asked) == (1, ['weights_sha256'], ASKED)
    before = file.read_text()
    with pytest.raises(ValueError, match='does not say of which weights_sha256'):
        records.add([entry(1, 1., 2.)])
    assert file.read_text() == before
    with pytest.raises(ValueError, match='begun with another model'):
        Records(file, {'weights_sha256': 'abc'}, HERE)


def test_spread_against_spread():
    """Ours less theirs; of a spread map ours spread; ours spread itself against ours as it is."""
    entries = [entry(i, 1. + 0.1 * i, 0.5 + 0.05 * i) for i in range(20)]
    table = means_and_differences(entries, 'ours')
    means = {row: cells['energy'][0].mean for row, cells in table.items()}
    found = {row: cells['energy'][1] and cells['energy'][1].mean for row, cells in table.items()}
    assert found['ours'] is None
    assert found['theirs'] == pytest.approx(means['ours'] - means['theirs'])
    assert found['theirs, spread'] == pytest.approx(means['ours, spread'] - means['theirs, spread'])
    assert found['ours, spread'] == pytest.approx(-1)
