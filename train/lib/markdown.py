"""Tables and generated sections of Markdown documents."""
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm_lossattn.files import replace_file

__all__ = ['END', 'markdown_table', 'replace_section']

END = '<!-- end -->'


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = '') -> list[str]:
    """Lines of a table.

    Args:
        head: a title for each column.
        rows: as many cells each.
        align: 'l' or 'r' for each column; by default the first is text and the others are numbers.
    """
    align = align or 'l' + 'r' * (len(head) - 1)
    rule = ''.join({'l': '---|', 'r': '--:|'}[side] for side in align)
    titles, *body = (''.join(f' {cell} |' if cell else ' |' for cell in row) for row in (head, *rows))
    return [f'|{line}' for line in (titles, rule, *body)]


def replace_section(file: Path, begin: str, text: str) -> None:
    """Put a text between its marks, ``begin`` and END."""
    before, rest = file.read_text().split(begin)
    replace_file(file, f'{before}{begin}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}'.encode())
