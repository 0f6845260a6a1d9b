"""Checks of many models, each in a process of its own, with a line of JSON for each in a file: resumable."""
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from ..files import replace_file
from ..text import one_line
from .check import OURS, Check, check_model, million_parameters

__all__ = ['check_all', 'models_to_check', 'read_checks']

LIMIT_MILLION = 100.
ROW = '{"name": "'  # that all rows begin with


def models_to_check() -> list[str]:
    """All models of timm, without those of this package."""
    own = {name for module in OURS for name in timm.list_models(module=module)}
    return [name for name in timm.list_models() if name not in own]


def read_checks(file: str | Path) -> dict[str, dict[str, Any]]:
    """``Check.to_dict`` of every model in a file, by name; of a last line that a kill has cut off nothing.

    Raises:
        ValueError: there is something else in the file.
    """
    lines = Path(file).read_text('utf-8').split('\n') if Path(file).is_file() else []
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row['name']] = Check(**row).to_dict()
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            unfinished = number == len(lines) and isinstance(error, json.JSONDecodeError)
            if unfinished and line[:len(ROW)] == ROW[:len(line)]:  # or the end of whole lines, ''
                break
            raise ValueError(f'{file}, line {number}, is no check of a model: {one_line(error)}') from error
    return rows


def check_all(file: str | Path, names: Sequence[str] | None = None, limit_million: float = LIMIT_MILLION) -> Iterator[
        tuple[Check, int, int]]:
    """Check models with random weights, see ``check_model``, and append each result to a file as soon as it is there.

    Args:
        file: lines of JSON, one a model; models that are in it already are not checked again, unless they were
            refused and older lines do not say what average pooling makes of them.
        names: of timm models; by default all of them.
        limit_million: models with more parameters are named there with kind 'large', and not checked.

    Yields:
        What was found, how many of the models are done, and how many there are. A process that dies, for want of
        memory for one, gives kind 'error'.

    Raises:
        ValueError: there is something else in the file.
        OSError: it cannot be written.
    """
    file, names = Path(file), models_to_check() if names is None else names
    done = {name: row for name, row in read_checks(file).items() if row['kind'] != 'D' or row['with_avg']}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, ''.join(f'{json.dumps(row)}\n' for row in done.values()).encode())
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    if context.get_start_method() == 'forkserver':
        context.set_forkserver_preload([__name__])  # or each process would import everything anew
    todo = [name for name in names if name not in done]
    for count, name in enumerate(todo, len(names) - len(todo) + 1):
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # one for each: memory goes back, crashes stay inside
            try:
                found = pool.submit(check_small, name, limit_million).result()
            except BrokenProcessPool as error:
                found = Check(name, reason=f'the process was killed: {one_line(error)}', why='killed')
        with file.open('a') as lines:
            lines.write(f'{json.dumps(found.to_dict())}\n')
        yield found, count, len(names)


def check_small(name: str, limit_million: float) -> Check:
    """``check_model``, unless the model has more parameters than the limit; a refused one with average pooling too."""
    try:
        size = million_parameters(name)
    except Exception:  # the check will say it
        size = 0.
    if size > limit_million:
        return Check(name, parameters_million=size, kind='large')
    found = check_model(name, receptive_field=False)
    if found.kind != 'D':
        return found
    return replace(found, with_avg=check_model(name, receptive_field=False, global_pool='avg').to_dict())
