"""lib/history.py: what a card and the table of weights say of runs that began with the weights of others."""
from lib.history import commands_of, hardware_of, runs_of

FIRST = {'commands': ['a', 'b'], 'starts': [{'epoch': 0, 'commit': 'old'}, {'epoch': 2, 'commit': 'new'}],
         'commit': 'new', 'hardware': 'X'}
OLDER = {'commands': ['c', 'd'], 'commit': 'older+', 'hardware': 'Y', 'initial': FIRST}  # without starts
LAST = {'commands': ['e'], 'starts': [{'epoch': 0, 'commit': 'new'}], 'commit': 'new', 'hardware': 'X',
        'initial': OLDER}


def test_runs():
    """From the first to the last; a machine is named once."""
    assert runs_of(LAST) == [FIRST, OLDER, LAST]
    assert hardware_of(LAST) == 'X; Y'
    assert hardware_of({**FIRST, 'starts': [{**FIRST['starts'][0], 'hardware': 'Z'}]}) == 'Z; X'


def test_commands():
    """Another commit than the record's is said, of the first command too; what an older record does not know is not."""
    another = 'another run, started from the weights of the one above'
    assert commands_of(LAST) == [
        '# at commit old', 'a', '# after 2 epochs', 'b', f'# {another}, at a commit that was not recorded', 'c',
        '# resumed, at commit older with changes that were not yet committed', 'd', f'# {another}', 'e']


def test_conversion():
    """The command that converted and measured has a commit of its own."""
    run = {'commands': ['a'], 'commit': 'new'}
    assert commands_of(run | {'shipped': {'command': 'b', 'commit': 'new'}}) == ['a', 'b']
    assert commands_of(run | {'shipped': {'command': 'b', 'commit': 'newer'}}) == ['a', '# at commit newer', 'b']
    assert commands_of(run | {'shipped': {'command': 'b'}}) == ['a', '# at a commit that was not recorded', 'b']


def test_gone_on_in_another_folder():
    """With --resume FILE: optimizer and epochs went on, which a start from its weights would not be."""
    run = {'commands': ['f'], 'starts': [{'epoch': 3, 'commit': 'new'}], 'commit': 'new', 'initial': FIRST}
    assert commands_of(run)[-2:] == ['# after 3 epochs', 'f']
