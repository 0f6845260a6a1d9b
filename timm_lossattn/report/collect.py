"""Data set -> shards -> one table. A shard is a fixed range of images, so that it does not matter who computes it.

Any number of processes share the shards; each is written whole or not at all, and those that are there are kept.
Batches begin anew with every shard, so that a resumed run and several processes compute the same numbers as one
undisturbed run. At most one shard is in memory.
"""
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..explanation import Explanation, explain
from ..explanation.geometry import inside_boxes, share_of_positive
from ..explanation.preprocessing import boxes_to_image, boxes_to_input
from .dataset import Item, ReportImages, split_readable
from .table import half, make_schema, map_array, merge_shards, read_notes, write_shard

__all__ = ['TABLE', 'Run', 'collect', 'positive_share']

TABLE = 'report.parquet'
SHARDS = f'{TABLE}.shards'  # a name that is nobody else's, for the folder is deleted with all that is in it
BATCHES = 16  # a shard
PATIENCE = 30.  # seconds after which the first process says what it waits for
_logger = logging.getLogger('timm_lossattn')


def positive_share(explanation: Explanation, boxes: list[torch.Tensor]) -> list[float | None]:
    """Share of the positive evidence whose nominal pixels have their middle in a box ("energy pointing").

    Args:
        explanation: of B images.
        boxes: B tensors (L, 4) in pixels of the model's input.

    Returns:
        In [0, 1]; None if no pixel lies in a box.
    """
    inside = inside_boxes(boxes, explanation.input_size)
    shares = share_of_positive(explanation.pixel_map(explanation.evidence), inside)
    return [float(share) if one.any() else None for share, one in zip(shares, inside)]


def explain_batch(model: Any, items: list[Item], x: torch.Tensor) -> dict[str, Any]:
    """Columns of the table for the images of one batch, see ``make_schema``.

    Raises:
        ValueError: numbers that are not finite.
    """
    explanation = explain(model, x)
    prediction, files = explanation.prediction, [item.file or item.index for item in items]
    top_classes = explanation.ranked()  # by logits, for probabilities below 1e-45 are all 0
    top_probabilities = explanation.probabilities.gather(1, top_classes)
    runner_up = top_classes[:, 1]
    label = torch.tensor([-1 if item.label is None else item.label for item in items])
    wrong = (label >= 0) & (label != explanation.target)
    against_label = explanation.versus(torch.where(wrong, label, runner_up)).evidence
    maps = {'alpha': prediction.alpha, 'evidence': explanation.evidence,
            'why_not_runner_up': explanation.versus(runner_up).evidence, 'why_not_label': against_label}
    columns: dict[str, Any] = {
        name: map_array(half(name, values.numpy(), files), (~wrong).numpy() if name == 'why_not_label' else None)
        for name, values in maps.items()}
    places = [(item.size, item.scale, item.offset) for item in items]
    boxes = torch.stack([boxes_to_image(box, *place) for box, place in zip(explanation.boxes, places)])
    height, width = explanation.input_size
    boxed = any(item.boxes is not None for item in items)
    shares = positive_share(explanation, [
        boxes_to_input(item.boxes if item.boxes is not None else torch.zeros(0, 4), (width, height), *place[1:])
        for item, place in zip(items, places)]) if boxed else [None] * len(items)
    return columns | {
        'index': [item.index for item in items],
        'file': [item.file for item in items],
        'width': [item.size[0] for item in items],
        'height': [item.size[1] for item in items],
        'label': [item.label for item in items],
        'prediction': explanation.target.tolist(),
        'probability': explanation.probabilities.gather(1, explanation.target[:, None])[:, 0].tolist(),
        'top_classes': map_array(top_classes.numpy().astype(np.int32)),
        'top_probabilities': map_array(half('probability', top_probabilities.numpy(), files)),
        'box': map_array(boxes.numpy().astype(np.float32)),
        'boxes': [None if item.boxes is None else item.boxes.tolist() for item in items],
        'evidence_in_box': shares,
    }


@dataclass(frozen=True)
class Run:
    """One process of a report.

    Attributes:
        out: folder of the report, seen by all processes.
        notes: metadata of the table; under ``settings`` what must be the same in a run that goes on.
        batch_size: images a forward pass.
        workers: processes that read images.
        rank, world_size: which process this is, and of how many.
    """
    out: Path
    notes: dict[str, Any]
    batch_size: int
    workers: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def shards(self) -> list[Path]:
        """Where the shards of the data set lie, whether they are there or not."""
        size = BATCHES * self.batch_size
        return [self.out / SHARDS / f'{s:06d}.parquet' for s in range(-(-self.notes['settings']['images'] // size))]

    def check(self, path: Path) -> None:
        """ValueError if a table there is of another run."""
        found, own = read_notes(path)['settings'], self.notes['settings']
        different = [key for key in own if found.get(key) != own[key]]
        if different:
            key = different[0]
            raise ValueError(f'--out: {path} is of another report ({key}: {found.get(key)}, now {own[key]}); remove it '
                             'or choose another folder.')


def collect(
        model: Any, images: ReportImages, run: Run,
        advance: Callable[[int], None] = lambda done: None) -> Path | None:
    """Explain all images; what is there already is kept.

    Args:
        model: patch model in eval mode.
        images: the data set.
        run: where to, and which part of it is this process's.
        advance: called with the number of images after each batch, and once for what was there already.

    Returns:
        The table; None in every process but the first, whose shards are merged by the first.

    Raises:
        ValueError: the folder holds another report, or the model gives numbers that are not finite.
        OSError: the folder cannot be written.
    """
    table, shards = run.out / TABLE, run.shards
    if table.exists():
        run.check(table)
        advance(len(images))
        if run.rank:
            return None
        shutil.rmtree(run.out / SHARDS, ignore_errors=True)  # a kill may have left them
        return table
    (run.out / SHARDS).mkdir(parents=True, exist_ok=True)
    mine = list(range(run.rank, len(shards), run.world_size))
    size, kept = BATCHES * run.batch_size, 0
    for s in [s for s in mine if shards[s].exists()]:
        run.check(shards[s])
        mine.remove(s)
        kept += min(size, len(images) - s * size)
    advance(kept)
    explain_shards(model, images, run, mine, advance)
    if run.rank:
        return None
    patience: float | None = time.monotonic() + PATIENCE
    while not all(shard.exists() for shard in shards):  # no collective call: those give up after some minutes
        if table.exists():  # by another process with the same command
            run.check(table)
            return table
        if patience is not None and time.monotonic() > patience:
            patience = None
            _logger.warning(f'waiting for {sum(not shard.exists() for shard in shards)} of {len(shards)} shards, of '
                            f'other processes: RANK is {run.rank} and WORLD_SIZE {run.world_size}')
        time.sleep(0.2)
    for shard in shards:
        run.check(shard)
    merge_shards(shards, table)
    shutil.rmtree(run.out / SHARDS)
    return table


def explain_shards(
        model: Any, images: ReportImages, run: Run, wanted: list[int], advance: Callable[[int], None]) -> None:
    """Compute and write shards by their numbers, one after the other; one loader reads ahead over all of them."""
    size, end = BATCHES * run.batch_size, len(images)
    schema = make_schema(len(run.notes['patch_boxes']), min(5, len(run.notes['labels'])), run.notes)
    batches = {s: [list(range(i, min(end, (s + 1) * size, i + run.batch_size)))
                   for i in range(s * size, min(end, (s + 1) * size), run.batch_size)] for s in wanted}
    loader = iter(DataLoader(
        images, batch_sampler=[batch for s in wanted for batch in batches[s]], num_workers=run.workers,
        collate_fn=split_readable))  # type: ignore[arg-type]
    for s in wanted:
        columns: list[dict[str, Any]] = []
        unreadable: list[list[Any]] = []
        for _ in batches[s]:
            try:
                items, x, bad = next(loader)
            except ValueError as error:  # of a worker, with its whole traceback, whose last line says it
                raise ValueError(str(error).strip().splitlines()[-1].removeprefix('ValueError: ')) from error
            unreadable += [[item.index, item.file, item.error] for item in bad]
            if x is not None:
                columns.append(explain_batch(model, items, x))
            advance(len(items) + len(bad))
        write_shard(run.shards[s], schema, columns, unreadable)
