"""What every script does around its work: logging, and errors in one line."""
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.utils.logging import disable_propagation
from timm.utils import setup_default_logging

__all__ = ['script', 'user_message']

_logger = logging.getLogger('train')
Main = TypeVar('Main', bound=Callable[..., int])


def user_message(error: Exception) -> str:
    """What a user's mistake says; of an error in a loader's worker, the last line of its traceback.

    Raises:
        RuntimeError: the error itself, if it is one that a user cannot have caused.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, RuntimeError):
        if 'would receive no data' in str(error):  # timm's words for a stream of few files
            return '--workers: ' + ' '.join(lines[-1].partition('Error: ')[2].split() or lines[-1].split())
        if 'consecutive samples' not in str(error):  # timm's words for an unreadable image
            raise error
        return ('--dataset: unreadable image (named in the warning above; set TIMM_DATASET_MAX_RETRIES to skip such '
                'images)')
    text = lines[-1].partition(': ')[2] or lines[-1] if 'DataLoader worker' in lines[0] else ' '.join(lines)
    return ' '.join(text.split())


def script(main: Main) -> Main:
    """Decorator of a script's main: what was wrong with the input is one line on stderr, and exit code 2.

    Of timm and PyTorch only warnings are shown: what a script says would drown in their notes.
    """
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> Any:
        setup_default_logging()
        for name in ('timm', 'torch'):
            logging.getLogger(name).setLevel(logging.WARNING)
        disable_propagation()  # the Hub's client writes its warnings itself; the root logger would repeat each
        warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores: --workers says it
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
            _logger.debug('traceback', exc_info=True)
            print('error: ' + user_message(error), file=sys.stderr)
            return 2
    return wrapped  # type: ignore[return-value]  # it takes what main takes
