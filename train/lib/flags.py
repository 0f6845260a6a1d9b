"""Options as dataclasses whose fields are also the flags of a script: each is declared once, with its type."""
import argparse
import copy
import inspect
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from timm_lossattn.flags import positive_int

__all__ = ['add_flags', 'flag', 'options_from', 'parse', 'positive_int']

Options = TypeVar('Options')


def flag(default: Any = None, help: str | None = None, short: str | None = None, **kwargs: Any) -> Any:
    """A field of an options dataclass that is a flag.

    Args:
        default: its value if the flag is not given; lists and dictionaries are copied.
        help: as in argparse.
        short: another name, as '-b'.
        kwargs: for ``add_argument``, where the type of the field does not say enough.
    """
    metadata = {'help': help, 'short': short, **kwargs}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def add_flags(parser: argparse.ArgumentParser, options: type, defaults: bool = True) -> None:
    """Add every field as a flag, --no-underscores; a class and each of its bases is a group, named by its docstring.

    bool is a switch with a --no- of its own, for what a recipe or a file has switched on; list takes several values,
    ``X | None`` is an X that need not be given. Without ``defaults`` the parser finds only what is given.
    """
    hints = get_type_hints(options)
    groups: dict[type, Any] = {}
    for one in fields(options):  # type: ignore[arg-type]  # of any dataclass
        owner = next(base for base in options.__mro__ if one.name in inspect.get_annotations(base))
        if owner not in groups:
            groups[owner] = parser.add_argument_group((owner.__doc__ or '').splitlines()[0].rstrip('.').lower())
        kwargs: dict[str, Any] = dict(one.metadata)
        names = [f'--{one.name.replace("_", "-")}']
        if kwargs.pop('short'):
            names.insert(0, one.metadata['short'])
        kind = hints[one.name]
        if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
            kind = next(part for part in get_args(kind) if part is not type(None))
        if kind is bool and 'action' not in kwargs:
            kwargs['action'] = 'store_true' if one.name.startswith('no_') else argparse.BooleanOptionalAction
        elif 'action' not in kwargs:
            if get_origin(kind) is list:
                kwargs.setdefault('nargs', '+')
                kind = get_args(kind)[0]
            kwargs.setdefault('type', kind)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        default = default if defaults else argparse.SUPPRESS
        groups[owner].add_argument(*names, dest=one.name, default=default, **kwargs)


def options_from(options: type[Options], args: argparse.Namespace) -> Options:
    """The dataclass with the values that argparse found."""
    return options(**{one.name: getattr(args, one.name) for one in fields(options)})  # type: ignore[arg-type]


def parse(options: type[Options], description: str | None, argv: Sequence[str] | None = None) -> Options:
    """The flags of a script as options; argparse exits with status 2 and one line where they are wrong."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flags(parser, options)
    return options_from(options, parser.parse_args(argv))
