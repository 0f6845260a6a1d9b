"""lib/script.py: what every script of train/ does before and after its own work."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_warnings_of_the_hub_once():
    """The Hub's client writes its warnings itself; a script's log does not repeat them."""
    code = '''
import logging
from lib.script import script
@script
def main(argv=None):
    logging.getLogger('huggingface_hub.utils').warning('the Hub is slow')
    logging.getLogger('timm.data').warning('a broken image')
    return 0
main()
'''
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT / 'train')))})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('the Hub is slow') == 1
    assert done.stderr.count('a broken image') == 1
