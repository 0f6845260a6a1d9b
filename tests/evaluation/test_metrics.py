"""Measures against loops written from their definitions, planted cases with known answers, and many processes."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_lossattn.evaluation.metrics import (
    BoxLocalization,
    PatchLocalization,
    PublicCodeMeanAveragePrecision,
    VOCMeanAveragePrecision,
    box_iou,
    patches_in_boxes,
)

GRID = torch.tensor([[4 * j, 4 * i, 4 * j + 9, 4 * i + 9] for i in range(6) for j in range(6)])  # 32×32, stride 1


def naive_inside(patch_boxes, boxes):
    """Count the pixels of each patch in each box, one by one."""
    result = []
    for x0, y0, x1, y1 in patch_boxes.tolist():
        best = 0
        for a0, b0, a1, b1 in boxes.tolist():
            best = max(best, sum(a0 <= x < a1 and b0 <= y < b1 for y in range(y0, y1) for x in range(x0, x1)))
        result.append(best > 0.5 * (x1 - x0) * (y1 - y0))
    return torch.tensor(result)


corners = st.tuples(*(st.integers(0, 31) for _ in range(4))).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1])


@settings(max_examples=30, deadline=None)
@given(st.lists(corners, min_size=1, max_size=3))
def test_patches_in_boxes(boxes):
    boxes = torch.tensor(boxes)
    assert torch.equal(patches_in_boxes(GRID, boxes), naive_inside(GRID, boxes))


@settings(max_examples=50, deadline=None)
@given(corners, corners)
def test_iou_counts_pixels(a, b):
    """Integer boxes: intersection and union are sets of pixels."""
    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    want = len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b))
    assert box_iou(torch.tensor([a]), torch.tensor([b])).item() == pytest.approx(want)


def random_batch(seed, multi_label, B=5, K=3):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (B, K), generator=g) if multi_label else torch.randint(K, (B,), generator=g)
    boxes = []
    for _ in range(B):
        count = int(torch.randint(0, 3, (), generator=g))
        a, b = (torch.randint(0, 31, (count, 2), generator=g) for _ in range(2))
        boxes.append(torch.cat([a.minimum(b), a.maximum(b) + 1], dim=1))
    selected = torch.rand(B, 36, generator=g) < 0.6
    return selected, torch.randn(B, 36, K, generator=g), target, boxes


@pytest.mark.parametrize('multi_label', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_patch_localization(seed, multi_label):
    """Against loops over images and patches; batches and processes (merged states) do not matter.

    Images without box do not count.
    """
    hits = chosen = inside_count = patches = 0
    whole, parts = PatchLocalization(), [PatchLocalization(), PatchLocalization()]
    for step in range(3):
        selected, p, target, boxes = random_batch(10 * seed + step, multi_label)
        for metric in (whole, parts[step % 2]):
            metric.update(selected, p, target, GRID, boxes)
        for i in (i for i in range(len(p)) if len(boxes[i])):
            inside = naive_inside(GRID, boxes[i])
            for m in range(36):
                if multi_label:
                    consistent = any(target[i, k] == 1 and 1 / (1 + (-p[i, m, k]).exp()) > 0.5 for k in range(3))
                else:
                    consistent = int(p[i, m].argmax()) == int(target[i])
                choose = bool(selected[i, m]) and consistent
                hits += choose and bool(inside[m])
                chosen += choose
                inside_count += bool(inside[m])
                patches += 1
    result = whole.compute()
    precision, recall = hits / chosen, hits / inside_count
    assert result['patch_precision'].item() == pytest.approx(100 * precision)
    assert result['patch_recall'].item() == pytest.approx(100 * recall)
    assert result['patch_f'].item() == pytest.approx(200 * precision * recall / (precision + recall))
    assert result['patches_in_object'].item() == pytest.approx(100 * inside_count / patches)
    for name in ('hits', 'chosen', 'inside', 'patches'):  # what torchmetrics sums over processes
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)


def test_planted_object():
    """Patches on the object selected and right: everything is 100 %. None selected: precision and recall are 0."""
    boxes = [torch.tensor([[0, 0, 12, 12]])]
    inside = patches_in_boxes(GRID, boxes[0])
    assert inside.view(6, 6).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    p = torch.zeros(1, 36, 2)
    p[..., 1] = 1.
    for selected, want in ((inside[None], 100.), (torch.zeros(1, 36, dtype=torch.bool), 0.)):
        metric = PatchLocalization()
        metric.update(selected, p, torch.tensor([1]), GRID, boxes)
        assert {name: float(value) for name, value in metric.compute().items()} == {
            'patch_precision': want, 'patch_recall': want, 'patch_f': want,
            'patches_in_object': pytest.approx(100 * 4 / 36)}


def test_no_boxes():
    """Nothing counts, nothing fails."""
    selected, p, target, _ = random_batch(0, False)
    metric = PatchLocalization()
    metric.update(selected, p, target, GRID, [torch.zeros(0, 4)] * 5)
    assert {float(metric.hits), float(metric.chosen), float(metric.inside), float(metric.patches)} == {0.}


def test_box_localization():
    """Right box and class, right box and wrong class, wrong box, an image without boxes, exactly IoU 0.5."""
    truth = torch.tensor([[0, 0, 10, 10]])
    estimated = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 1, 1], [0, 0, 10, 5]])
    boxes = [truth, truth, truth, truth[:0], truth]
    metric = BoxLocalization()
    metric.update(estimated, boxes, torch.tensor([True, False, True, True, True]))
    result = metric.compute()
    assert result['localization_ap'].item() == pytest.approx(50.)  # 2 of 4: 0.5 is not more than 0.5
    assert result['top1_localization'].item() == pytest.approx(25.)


def naive_voc(scores, positives):
    """VOC 2007: for every threshold its precision and recall; the mean over 11 recalls of the best precision."""
    points = [(sum(positives[i] for i in above) / sum(positives), sum(positives[i] for i in above) / len(above))
              for t in sorted(set(scores)) if (above := [i for i, s in enumerate(scores) if s >= t])]
    return sum(max((p for r, p in points if r >= level / 10 - 1e-9), default=0.) for level in range(11)) / 11


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25))
def test_voc_average_precision(rows):
    """With ties; a class without positives does not count."""
    scores, positive = zip(*rows)
    metric = VOCMeanAveragePrecision()
    other = torch.zeros(len(rows), dtype=torch.bool)
    metric.update(torch.tensor([scores, scores]).T.float(), torch.stack([torch.tensor(positive), other], dim=1))
    want = 100 * naive_voc(scores, positive) if any(positive) else 0.
    assert float(metric.compute()) == pytest.approx(want)


def test_voc_by_hand():
    """Ranking + − +: precision 1 up to recall 0.5 (6 levels), then 2/3 (5 levels)."""
    metric = VOCMeanAveragePrecision()
    metric.update(torch.tensor([[3.], [2.]]), torch.tensor([[1], [0]]))
    metric.update(torch.tensor([[1.]]), torch.tensor([[1]]))
    assert float(metric.compute()) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=25),
       st.integers(3, 12))
def test_public_code_average_precision(rows, columns):
    """A loop over recall bins that reads each bin's precision in the bin below, and a sum over all columns."""
    scores, *positives = zip(*rows)
    total = 0.
    for positive in (p for p in positives if any(p)):
        bins = [0.] * 11  # best precision at recall of this bin or more
        for t in set(scores):
            above = [is_positive for score, is_positive in zip(scores, positive) if score >= t]
            for level in range(11):
                if 10 * sum(above) >= level * sum(positive):
                    bins[level] = max(bins[level], sum(above) / len(above))
        total += sum(bins[max(level - 1, 0)] for level in range(11)) / 11
    target = torch.tensor([*positives, [False] * len(rows)]).T
    metric, voc = PublicCodeMeanAveragePrecision(columns), VOCMeanAveragePrecision()
    for one in (metric, voc):
        one.update(torch.tensor([scores] * 3).T.float(), target)
    assert float(metric.compute()) == pytest.approx(100 * total / columns)
    classes = sum(map(any, positives))
    assert float(metric.compute()) * columns >= float(voc.compute()) * classes - 1e-4  # no AP is lower for it


def test_public_code_by_hand():
    """Ranking + − + again: 7 levels of precision 1 and 4 of 2/3, in one of 91 columns."""
    metric = PublicCodeMeanAveragePrecision()
    metric.update(torch.tensor([[3.], [2.], [1.]]), torch.tensor([[1], [0], [1]]))
    assert float(metric.compute()) == pytest.approx(100 * (7 + 4 * 2 / 3) / 11 / 91)


def test_voc_against_peer():
    """An image is a detection of every class with one and the same box: the VOC 2007 measure of a detection library.

    13 positives a class: no recall k/13 but 0 and 1 is one of the 11 levels, on which rounding would decide.
    """
    builder = pytest.importorskip('mean_average_precision').MetricBuilder
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 4, generator=generator)
    target = torch.zeros(60, 4)
    for k in range(4):
        target[torch.randperm(60, generator=generator)[:13], k] = 1
    peer = builder.build_evaluation_metric('map_2d', async_mode=False, num_classes=4)
    box = [0, 0, 10, 10]
    for s, y in zip(scores.sigmoid(), target):
        peer.add(np.array([[*box, k, float(s[k])] for k in range(4)]),
                 np.array([[*box, k, 0, 0] for k in range(4) if y[k]]).reshape(-1, 7))
    metric = VOCMeanAveragePrecision()
    metric.update(scores, target)
    want = peer.value(iou_thresholds=0.5, recall_thresholds=np.linspace(0, 1, 11), mpolicy='greedy')['mAP']
    assert float(metric.compute()) == pytest.approx(100 * want, rel=1e-5)


def test_errors():
    selected, p, target, boxes = random_batch(0, False)
    with pytest.raises(ValueError, match=r'patch_boxes \(36, 4\)'):
        PatchLocalization().update(selected, p, target, GRID[:5], boxes)
    with pytest.raises(ValueError, match='one entry per image'):
        BoxLocalization().update(GRID[:2], boxes, target == target)
    with pytest.raises(ValueError, match=r'must be \(B, K\)'):
        VOCMeanAveragePrecision().update(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match='columns must be at least 1, got 0'):
        PublicCodeMeanAveragePrecision(0)
    metric = PublicCodeMeanAveragePrecision(2)
    metric.update(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match='number of classes, 3, got 2'):
        metric.compute()
