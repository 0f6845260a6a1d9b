"""report/summary.py against loops over single images, and the statistics against other ways to compute them."""
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_lossattn.report.summary import (
    MIN_IMAGES,
    SCORE,
    leave_one_out_median,
    pick_gallery,
    place_scores,
    summarise,
)
from timm_lossattn.report.table import ReportTable, make_schema, map_array, merge_shards, write_shard

K, GRID, SHARDS, ROWS = 5, (2, 3), 4, 60
M = GRID[0] * GRID[1]
CORNER = 5


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    """Made-up rows in several shards: class 2 puts its evidence into the corner, class 4 is never predicted."""
    folder = tmp_path_factory.mktemp('summary')
    draw = np.random.default_rng(0)
    notes = {'grid': list(GRID), 'labels': list('abcde'), 'boxed': True}
    schema = make_schema(M, 3, notes)
    for s in range(SHARDS):
        label = draw.integers(-1, K, ROWS)
        prediction = np.where(draw.random(ROWS) < 0.6, label, draw.integers(0, K - 1, ROWS)) % (K - 1)
        evidence = draw.normal(size=(ROWS, M))
        evidence[prediction == 2, CORNER] += 20
        evidence[0] = -1  # no positive evidence at all
        top = np.stack([prediction, (prediction + 1) % K, (prediction + 2) % K], axis=1)
        inside = np.where(draw.random(ROWS) < 0.2, np.nan, draw.random(ROWS))
        half = evidence.astype(np.float16)
        write_shard(folder / f'{s}.parquet', schema, [{
            'index': list(range(s * ROWS, (s + 1) * ROWS)), 'file': [f'{i}.png' for i in range(ROWS)],
            'width': [8] * ROWS, 'height': [8] * ROWS, 'label': [None if y < 0 else int(y) for y in label],
            'prediction': prediction.tolist(), 'probability': draw.random(ROWS).tolist(),
            'top_classes': map_array(top.astype(np.int32)),
            'top_probabilities': map_array(np.zeros((ROWS, 3), np.float16)),
            'alpha': map_array(half), 'evidence': map_array(half), 'why_not_runner_up': map_array(half),
            'why_not_label': map_array(half, (label < 0) | (label == prediction)),
            'box': map_array(np.zeros((ROWS, 4), np.float32)), 'boxes': [None] * ROWS,
            'evidence_in_box': [None if np.isnan(v) else float(v) for v in inside],
        }], [[s, 'broken.png', 'no image']] if s == 1 else [])
    merge_shards([folder / f'{s}.parquet' for s in range(SHARDS)], folder / 'report.parquet')
    return ReportTable(folder / 'report.parquet')


@pytest.fixture(scope='module')
def rows(table):
    """The same as a list of dictionaries."""
    return table.rows(range(len(table)))


def test_merged(table, rows):
    """All rows in their order, nulls as nulls, and what could not be read."""
    assert [row['index'] for row in rows] == list(range(SHARDS * ROWS))
    assert table.notes['unreadable'] == [[1, 'broken.png', 'no image']]
    for row in rows:
        assert (row['why_not_label'] is None) == (row['label'] is None or row['label'] == row['prediction'])
    assert [row['index'] for row in table.rows([130, 2, 61])] == [130, 2, 61]


def test_numbers_against_loops(table, rows):
    """Accuracy, confusion, means, shares and their errors, image by image in plain Python."""
    summary = summarise(table)
    known = [row for row in rows if row['label'] is not None]
    assert 0 < len(known) < len(rows) == summary.images
    assert summary.labelled == len(known)
    assert summary.correct == sum(row['label'] == row['prediction'] for row in known)
    assert summary.top_correct == sum(row['label'] in row['top_classes'] for row in known)
    assert summary.confusion == Counter((row['label'], row['prediction']) for row in known)
    assert summary.true.tolist() == [sum(row['label'] == k for row in known) for k in range(K)]
    inside = [row['evidence_in_box'] for row in rows if row['evidence_in_box'] is not None]
    assert summary.in_box == (pytest.approx(statistics.fmean(inside)), len(inside))
    shares, errors = np.zeros((K, M)), np.zeros((K, M))
    for k in range(K):
        mine = [row['evidence'] for row in rows if row['prediction'] == k]
        assert summary.predicted[k] == len(mine)
        for m in range(M if mine else 0):
            assert summary.evidence[k, m] == pytest.approx(statistics.fmean(e[m] for e in mine))
            each = [max(e[m], 0) / sum(max(v, 0) for v in e) if max(e) > 0 else 1 / M for e in mine]
            shares[k, m], errors[k, m] = statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5
    assert not summary.evidence[K - 1].any()
    np.testing.assert_allclose(summary.share, shares, atol=1e-12)
    for k in range(K):
        others = [shares[j] for j in range(K - 1) if j != k]
        ratios = [(shares[k, m] - 3 * errors[k, m]) / max(statistics.median(o[m] for o in others), 1 / M)
                  for m in range(M)]
        assert summary.score[k] == pytest.approx(max(0., *ratios) if k < K - 1 else 0.)
    assert summary.flagged == [2]
    assert summary.place[2] == CORNER
    assert summary.usual[2, CORNER] == pytest.approx(statistics.median(shares[j, CORNER] for j in (0, 1, 3)))


@given(st.integers(2, 9).flatmap(lambda n: st.lists(
    st.lists(st.sampled_from([0., 0.1, 0.2, 0.5, 1.]), min_size=3, max_size=3), min_size=n, max_size=n)))
def test_leave_one_out_median(values):
    """Ties included."""
    values = np.array(values)
    expected = [np.median(np.delete(values, i, axis=0), axis=0) for i in range(len(values))]
    np.testing.assert_allclose(leave_one_out_median(values), expected)


@pytest.mark.parametrize('classes', [2, 3, 10])
def test_scores_of_random_classes_stay_low(classes):
    """Nothing planted, nothing found: images that look anywhere, a middle that all classes share, few images."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        middle = np.zeros(49)
        middle[[16, 17, 18, 23, 24, 25, 30, 31, 32]] = 3.
        for n in (MIN_IMAGES, 200):
            images = draw.exponential(size=(classes, n, 49)) ** 3 + middle
            images /= images.sum(axis=2, keepdims=True)
            error = images.std(axis=1, ddof=1) / n ** 0.5
            score, _, _ = place_scores(images.mean(axis=1), error, np.full(classes, n))
            assert score.max() < SCORE


def test_few_images_are_no_class():
    """One image of a class always looks at one place; it is neither flagged nor what is usual."""
    share = np.full((3, 9), 1 / 9)
    share[2] = np.eye(9)[4]
    score, _, usual = place_scores(share, np.zeros((3, 9)), np.array([50, 50, MIN_IMAGES - 1]))
    assert score[2] == 0
    np.testing.assert_allclose(usual, 1 / 9)
    score, place, _ = place_scores(share, np.zeros((3, 9)), np.array([50, 50, MIN_IMAGES]))
    assert score[2] == pytest.approx(9)
    assert place[2] == 4


def test_gallery(table, rows):
    """Wrong ones first, the most certain of every class in turn; then evidence outside of the box; nothing twice."""
    shown = pick_gallery(table, 40)
    assert len(shown) == len(set(shown)) == 40
    chosen = [rows[p] for p in shown]
    wrong = [row['label'] is not None and row['label'] != row['prediction'] for row in chosen]
    assert wrong == [True] * 20 + [False] * 20
    mistakes = [row for row in rows if row['label'] is not None and row['label'] != row['prediction']]
    first = chosen[:len({row['label'] for row in mistakes})]
    for row in first:
        assert row['probability'] == max(r['probability'] for r in mistakes if r['label'] == row['label'])
    assert [row['probability'] for row in first] == sorted((row['probability'] for row in first), reverse=True)
    assert all(row['evidence_in_box'] < 0.5 for row in chosen[20:30])
    assert sorted(pick_gallery(table, 10_000)) == list(range(len(rows)))
    assert len(pick_gallery(table, 1)) == 1
