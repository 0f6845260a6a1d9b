"""How weights came about, from their result.json: the runs, each begun with the weights of the one before."""
from typing import Any

__all__ = ['commands_of', 'hardware_of', 'runs_of']


def runs_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The record and, before it, those of the runs whose weights it started from, the first one first."""
    runs = [result]
    while 'initial' in runs[0]:
        runs.insert(0, runs[0]['initial'])
    return runs


def hardware_of(result: dict[str, Any]) -> str:
    """Every machine of these runs, once. Of older records, which have one only, that on which the run ended."""
    machines = []
    for run in runs_of(result):
        machines += [start['hardware'] for start in run.get('starts', []) if 'hardware' in start]
        machines.append(run['hardware'])
    return '; '.join(dict.fromkeys(machines))


def place_of(commit: str | None) -> str:
    """A commit in words; with '+' the checkout had changes."""
    if commit is None:
        return 'at a commit that was not recorded'
    changed = ' with changes that were not yet committed' if commit.endswith('+') else ''
    return f'at commit {commit.removesuffix("+")}{changed}'


def commands_of(result: dict[str, Any]) -> list[str]:
    """The commands of all runs and, if they ship, of what converted the last one's weights and measured them.

    Comments say where they go on, and at which commit if not at that of the record. Of a run that was resumed, older
    records know the last command's commit only, and no numbers of epochs; nor that of the conversion.
    """
    lines: list[str] = []
    for run in runs_of(result):
        commands = run['commands']
        for i, command in enumerate(commands):
            last: dict[str, Any] = {'epoch': 0, 'commit': run.get('commit') if i == len(commands) - 1 else None}
            start = run['starts'][i] if 'starts' in run else last
            notes = []
            if start['epoch']:
                notes.append(f'after {start["epoch"]} epoch' + 's' * (start['epoch'] > 1))
            elif i or lines:
                notes.append('resumed' if i else 'another run, started from the weights of the one above')
            if result.get('commit') and start['commit'] != result['commit']:
                notes.append(place_of(start['commit']))
            lines += [f'# {", ".join(notes)}'] if notes else []
            lines.append(command)
    if 'shipped' in result:
        commit = result['shipped'].get('commit')
        lines += [f'# {place_of(commit)}'] if commit != result.get('commit') else []
        lines.append(result['shipped']['command'])
    return lines
