"""Classes as users name them: by index or by name."""
import re
from collections.abc import Sequence
from difflib import get_close_matches

__all__ = ['class_named']


def class_named(name: str, labels: Sequence[str]) -> int:
    """Index of the class that a name means: the label itself, or, whatever the case, the only one with these words.

    The first rule that fits anything decides: the same text; the same but for case; labels that hold the name as whole
    words.

    Raises:
        ValueError: no such class, or several; the message says which come close.
    """
    wanted = name.casefold()
    words = re.compile(rf'(?<!\w){re.escape(wanted)}(?!\w)')
    rules = ([k for k, label in enumerate(labels) if label == name],
             [k for k, label in enumerate(labels) if label.casefold() == wanted],
             [k for k, label in enumerate(labels) if wanted.strip() and words.search(label.casefold())])
    found = next((rule for rule in rules if rule), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f'{name!r} may be any of {[labels[k] for k in found][:10]}; name one of them or an index.')
    lower = {label.casefold(): label for label in labels}
    close = list(labels) if len(labels) <= 20 else [lower[key] for key in get_close_matches(wanted, lower, 5, 0.5)]
    choose = f'choose one of {close}' if close else f'choose one of {len(labels)} names'
    raise ValueError(f'no class {name!r}; {choose} or an index.')
