"""Packages of the extras: without one a script ends in a line that says what to install."""
import sys
from importlib import import_module

__all__ = ['need']


def need(extra: str, *modules: str) -> None:
    """End the script unless these modules can be imported.

    Args:
        extra: of pyproject.toml, which has their packages.
        modules: names as in ``import``.

    Raises:
        SystemExit: one is missing; exit code 2, after one line on stderr.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            print(f"error: {error.name or module} is not installed: pip install -e '.[{extra}]'", file=sys.stderr)
            raise SystemExit(2) from None
