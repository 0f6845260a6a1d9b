"""Text that fits into one line: of errors, of titles, and probabilities."""
import re

__all__ = ['one_line', 'percent', 'printable', 'shorten']


def shorten(text: str, length: int) -> str:
    """At most length characters, with an ellipsis in the middle."""
    half = (length - 1) // 2
    return text if len(text) <= length else f'{text[:length - 1 - half]}…{text[len(text) - half:]}'


def printable(name: str) -> str:
    """The name of a file that may be no UTF-8, which Python keeps in characters that nothing can print."""
    return name.encode(errors='surrogateescape').decode(errors='replace')


def percent(probability: float) -> str:
    """Whole percents; with a decimal below 1 and above 99, never "0.0 %" nor "100.0 %"."""
    if probability < 0.001:
        return '< 0.1 %'
    if probability > 0.999:
        return '> 99.9 %'
    return f'{100 * probability:.{0 if 0.0095 <= probability < 0.99 else 1}f} %'


def one_line(error: Exception, length: int = 300) -> str:
    """The message of an exception, or else its type, shortened; readers and exporters print whole files."""
    text = re.sub(r'\x1b\[[0-9;]*m', '', str(error))  # colours of a terminal
    return shorten(' '.join(text.split()) or type(error).__name__, length)
