"""The numbers behind the page: accuracy, confusion, mean evidence of each class, and classes that look at one place.

A class looks at one place if its images, however different they are, put their evidence there and the other classes do
not: a watermark in the corner, a ruler beside the lesion. Natural classes share the middle of the image.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .table import ReportTable

__all__ = ['MIN_IMAGES', 'SCORE', 'Summary', 'leave_one_out_median', 'pick_gallery', 'place_scores', 'summarise']

SCORE = 3.  # a class is flagged from this score on
MIN_IMAGES = 10  # with fewer a mean says nothing of a class
ERRORS = 3.  # standard errors that a share must be above chance: places and classes are many


@dataclass(frozen=True)
class Summary:
    """A report in numbers. N images, K classes, M patches; what is of a class is of the images *predicted* as it.

    Attributes:
        images: N.
        labelled: N', images with a label.
        correct: of them.
        top_correct: of them, label among the top classes.
        confusion: number of labelled images by (label, prediction), where it is not zero.
        predicted: (K,) images predicted as a class.
        true: (K,) images of a class.
        evidence: (K, M) mean evidence; zero for a class that is never predicted.
        share: (K, M) mean share of an image's positive evidence that lies in a patch; sums to 1 over patches.
        usual: (K, M) median of that share over the other classes.
        score: (K,) see ``place_scores``.
        place: (K,) patch of that score.
        flagged: classes whose score is SCORE or more, largest first.
        in_box: mean share of the positive evidence inside the boxes, and the number of images it is of; None without.
    """
    images: int
    labelled: int
    correct: int
    top_correct: int
    confusion: dict[tuple[int, int], int]
    predicted: np.ndarray
    true: np.ndarray
    evidence: np.ndarray
    share: np.ndarray
    usual: np.ndarray
    score: np.ndarray
    place: np.ndarray
    flagged: list[int]
    in_box: tuple[float, int] | None


def leave_one_out_median(values: np.ndarray) -> np.ndarray:
    """For each row of (n, M), n >= 2, the median of all other rows, column by column: (n, M)."""
    n = len(values)
    order = values.argsort(axis=0, kind='stable')
    rank, ordered = order.argsort(axis=0, kind='stable'), np.take_along_axis(values, order, axis=0)
    low, high = (n - 2) // 2, (n - 1) // 2  # of the n - 1 others; from a row's own rank on they have moved up by one
    return (np.take_along_axis(ordered, low + (low >= rank), axis=0)
            + np.take_along_axis(ordered, high + (high >= rank), axis=0)) / 2.


def place_scores(
        share: np.ndarray, error: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much more of a class's evidence lies at one place than of the others'.

        score_k = max_m (share_km − 3 error_km) / max(median_{j≠k} share_jm, 1/M)

    so that 3 means: surely three times what is usual at this place, and three times an even share.

    Args:
        share: (K, M) mean share of the positive evidence in each patch.
        error: (K, M) its standard error.
        count: (K,) images of each class; classes with fewer than MIN_IMAGES have score 0 and are no others.

    Returns:
        Scores (K,), their patches (K,), and what is usual (K, M): the median, or with no other class 1/M.
    """
    K, M = share.shape
    usual, score, place = np.full((K, M), 1. / M), np.zeros(K), share.argmax(axis=1)
    enough = np.flatnonzero(count >= MIN_IMAGES)
    if len(enough) > 1:
        usual[enough] = leave_one_out_median(share[enough])
    if len(enough):
        ratio = (share - ERRORS * error)[enough] / np.maximum(usual[enough], 1. / M)
        score[enough], place[enough] = ratio.max(axis=1).clip(min=0), ratio.argmax(axis=1)
    return score, place, usual


def summarise(table: ReportTable) -> Summary:
    """One pass over the table's evidence, a row group at a time."""
    K, M = len(table.notes['labels']), int(np.prod(table.grid))
    label, prediction = table.column('label', -1), table.column('prediction', -1)
    known = label >= 0
    top = table.top_classes()
    evidence, share, squares = (np.zeros((K, M)) for _ in range(3))
    for group in table.groups(('prediction', 'evidence')):
        values, of = group['evidence'], group['prediction']
        positive = values.clip(min=0)
        total = positive.sum(axis=1, keepdims=True)
        positive = np.where(total > 0, positive / np.where(total > 0, total, 1.), 1. / M)
        for into, what in ((evidence, values), (share, positive), (squares, positive ** 2)):
            np.add.at(into, of, what)
    count = np.bincount(prediction, minlength=K)
    n = np.maximum(count, 1)[:, None]
    evidence, share = evidence / n, share / n
    error = np.sqrt(np.maximum(squares / n - share ** 2, 0.) / np.maximum(n - 1, 1))
    score, place, usual = place_scores(share, error, count)
    pairs, numbers = np.unique(label[known].astype(np.int64) * K + prediction[known], return_counts=True)
    in_box = table.column('evidence_in_box', np.nan) if table.notes['boxed'] else np.array([])
    in_box = in_box[~np.isnan(in_box)]
    return Summary(
        images=len(table), labelled=int(known.sum()), correct=int((label == prediction)[known].sum()),
        top_correct=int((top == label[:, None])[known].any(axis=1).sum()),
        confusion={(int(p) // K, int(p) % K): int(c) for p, c in zip(pairs, numbers)},
        predicted=count, true=np.bincount(label[known], minlength=K), evidence=evidence, share=share, usual=usual,
        score=score, place=place,
        flagged=[int(k) for k in np.argsort(-score, kind='stable') if score[k] >= SCORE],
        in_box=(float(in_box.mean()), len(in_box)) if len(in_box) else None)


def in_turns(positions: np.ndarray, badness: np.ndarray, classes: np.ndarray) -> list[int]:
    """Positions, the worst first, each class in its turn: the worst of every class, then the second of every class."""
    order = positions[np.argsort(-badness[positions], kind='stable')]
    seen: dict[int, int] = {}
    turn = []
    for p in order:
        turn.append(seen.get(int(classes[p]), 0))
        seen[int(classes[p])] = turn[-1] + 1
    return [int(p) for p in order[np.argsort(turn, kind='stable')]]


def first_of(lists: Iterable[tuple[list[int], int]]) -> list[list[int]]:
    """From each list of positions its first ones, up to a number, that no list before it has taken."""
    taken: set[int] = set()
    result = []
    for positions, number in lists:
        chosen = [p for p in positions if p not in taken][:max(number, 0)]
        taken.update(chosen)
        result.append(chosen)
    return result


def pick_gallery(table: ReportTable, limit: int) -> list[int]:
    """Places in the table of the images to show, wrong predictions first, those with the largest probability.

    At most half of them are wrong if there are enough others, and a quarter right with most evidence outside of the
    box; the rest are the least certain ones. Classes take turns.
    """
    label, prediction = table.column('label', -1), table.column('prediction', -1)
    probability = table.column('probability', 0.)
    inside = table.column('evidence_in_box', np.nan) if table.notes['boxed'] else np.full(len(table), np.nan)
    wrong = (label >= 0) & (label != prediction)
    places = np.arange(len(table))
    mistakes = in_turns(places[wrong], probability, label)
    outside = in_turns(places[~wrong & (inside < 0.5)], -np.nan_to_num(inside, nan=1.), prediction)
    unsure = in_turns(places[~wrong], -probability, prediction)
    half = max(limit // 2, limit - len(unsure))
    shown = first_of([(mistakes, half), (outside, limit // 4), (unsure, limit)])
    return [p for chosen in shown for p in chosen][:limit]
