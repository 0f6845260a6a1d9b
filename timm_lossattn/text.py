"""Text that fits into one line: of errors, of titles."""
__all__ = ['one_line', 'shorten']


def shorten(text: str, length: int) -> str:
    """At most length characters, with an ellipsis in the middle."""
    half = (length - 1) // 2
    return text if len(text) <= length else f'{text[:length - 1 - half]}…{text[len(text) - half:]}'


def one_line(error: Exception, length: int = 300) -> str:
    """The message of an exception, or else its type, shortened; readers and exporters print whole files."""
    return shorten(' '.join(str(error).split()) or type(error).__name__, length)
