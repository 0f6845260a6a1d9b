"""The table of a report: its columns, shards that appear whole or not at all, and reading it piece by piece.

One row an image, one row group a shard. Maps are float16 over the M patches, row after row of the patch grid. The
schema's metadata holds, as JSON under ``timm_lossattn``, model, ξ, grid, names of the classes and the command.
"""
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ImportError("a report needs pyarrow: pip install 'timm-lossattn[report]'") from None

__all__ = ['MAPS', 'ReportTable', 'half', 'make_schema', 'map_array', 'merge_shards', 'read_notes', 'write_shard']

KEY = b'timm_lossattn'
MAPS = ('alpha', 'evidence', 'why_not_runner_up', 'why_not_label')


def make_schema(patches: int, top: int, notes: dict[str, Any]) -> pa.Schema:
    """Columns of a report.

        index               in the data set
        file                its name there, null if it has none
        width, height       of the image
        label               class of the model, null if it is not known
        prediction          the class of the largest logit
        probability         of the prediction
        top_classes, top_probabilities    the five most probable classes (all if there are fewer), best first
        alpha               weight of each patch
        evidence            what each patch adds to the prediction's lead over the others, ``Explanation.evidence``
        why_not_runner_up   the same against the second class alone; its sum is the difference of the two logits
        why_not_label       the same against the true class, null if the prediction is right or there is no label
        box                 x0, y0, x1, y1 of the estimated box in pixels of the image
        boxes               ground truth, likewise; null in a data set without boxes
        evidence_in_box     share of the positive evidence inside the ground truth; null without any

    Args:
        patches: M.
        top: number of classes in the top lists.
        notes: for the metadata.
    """
    grid, four = pa.list_(pa.float16(), patches), pa.list_(pa.float32(), 4)
    return pa.schema([
        ('index', pa.int64()), ('file', pa.string()), ('width', pa.int32()), ('height', pa.int32()),
        ('label', pa.int32()), ('prediction', pa.int32()), ('probability', pa.float32()),
        ('top_classes', pa.list_(pa.int32(), top)), ('top_probabilities', pa.list_(pa.float16(), top)),
        *((name, grid) for name in MAPS),
        ('box', four), ('boxes', pa.list_(four)), ('evidence_in_box', pa.float32()),
    ], metadata={KEY: json.dumps(notes, ensure_ascii=False).encode()})


def half(name: str, values: np.ndarray, files: Sequence[Any]) -> np.ndarray:
    """Values (N, ...) of N images as float16.

    Raises:
        ValueError: some are not finite, or too large.
    """
    with np.errstate(over='ignore'):
        result = values.astype(np.float16)
    broken = ~np.isfinite(result).reshape(len(result), -1).all(axis=1)
    if broken.any():
        raise ValueError(f'model: {name} of image {files[int(broken.argmax())]} is not finite, or beyond 65,504.')
    return result


def map_array(values: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    """Rows of (N, M) as one list column; those that are missing, (N,) bool, become null."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1],
        mask=None if missing is None else pa.array(missing))


def read_notes(path: Path) -> dict[str, Any]:
    """The metadata of a report or shard.

    Raises:
        ValueError: the file is none.
    """
    try:
        return json.loads(pq.read_schema(path).metadata[KEY])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'--out: {path} is no table of a report ({error!r}); remove it.') from None


def replace_table(path: Path, schema: pa.Schema, groups: Iterator[pa.Table] | Sequence[pa.Table]) -> None:
    """Write row groups to a file, as a whole."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression='zstd') as writer:
        for table in groups:
            writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))


def write_shard(path: Path, schema: pa.Schema, columns: Sequence[dict[str, Any]], unreadable: list[list[Any]]) -> None:
    """One shard from the columns of its batches; [index, file, reason] of what could not be read goes along."""
    notes = {**json.loads(schema.metadata[KEY]), 'unreadable': unreadable}
    named = schema.with_metadata({KEY: json.dumps(notes, ensure_ascii=False).encode()})
    replace_table(path, named, [pa.Table.from_batches(
        [pa.record_batch([pa.array(batch[f.name], f.type) if isinstance(batch[f.name], list) else batch[f.name]
                          for f in named], schema=named) for batch in columns], schema=named)])


def merge_shards(shards: Sequence[Path], path: Path) -> None:
    """All shards as one table, one at a time in memory; the notes are the first one's, with all unreadable images."""
    notes = read_notes(shards[0])
    notes['unreadable'] = [entry for shard in shards for entry in read_notes(shard)['unreadable']]
    schema = pq.read_schema(shards[0]).with_metadata({KEY: json.dumps(notes, ensure_ascii=False).encode()})
    replace_table(path, schema, (table for shard in shards if len(table := pq.read_table(shard))))


class ReportTable:
    """A report's parquet, read by row groups.

    Attributes:
        notes: its metadata.

    Raises:
        ValueError: no table of a report.
    """

    def __init__(self, path: str | Path) -> None:
        self.notes = read_notes(Path(path))
        self.file = pq.ParquetFile(path)

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    @property
    def grid(self) -> tuple[int, int]:
        """(H', W') of the patch grid."""
        rows, columns = self.notes['grid']
        return rows, columns

    def column(self, name: str, missing: float) -> np.ndarray:
        """A column of numbers for all images, (N,), with ``missing`` for null."""
        return self.file.read([name]).column(name).fill_null(missing).combine_chunks().to_numpy(zero_copy_only=False)

    def top_classes(self) -> np.ndarray:
        """(N, top) most probable classes, best first."""
        column = self.file.read(['top_classes']).column('top_classes').combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1)

    def groups(self, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """For each row group the columns, numbers as (N,) and maps as (N, M) float64."""
        for g in range(self.file.num_row_groups):
            table = self.file.read_row_group(g, list(columns))
            yield {name: (map_values(table.column(name)) if name in MAPS else table.column(name).to_numpy())
                   for name in columns}

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Whole rows by their place in the table, in the order given; maps are lists."""
        found: dict[int, dict[str, Any]] = {}
        start = 0
        for g in range(self.file.num_row_groups):
            stop = start + self.file.metadata.row_group(g).num_rows
            here = sorted({p for p in positions if start <= p < stop})
            if here:
                rows = self.file.read_row_group(g).take([p - start for p in here]).to_pylist()
                found.update(zip(here, rows))
            start = stop
        return [found[p] for p in positions]


def map_values(column: Any) -> np.ndarray:
    """A list column without nulls as (N, M) float64."""
    lists = column.combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(lists), -1)
