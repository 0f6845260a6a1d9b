"""What a model is, but for its tensors and its mode: to notice that it was changed by hand since it was looked at."""
from typing import Any

from torch import nn

__all__ = ['structure', 'surface_unchanged', 'unchanged']

NO_SETTINGS = ('training', 'grad_checkpointing')  # neither changes what a model in eval mode computes


def settings(module: nn.Module) -> dict[str, Any]:
    """Public attributes that are plain values. Private ones are PyTorch's own: whether it is a replica, say."""
    def plain(value: Any) -> bool:
        return value is None or isinstance(value, (str, int, float)) or (
            isinstance(value, tuple) and all(map(plain, value)))

    return {key: value for key, value in vars(module).items()
            if not key.startswith('_') and key not in NO_SETTINGS and plain(value)}


def structure(model: nn.Module) -> dict[str, Any]:
    """Classes and settings of all modules by name: what a model is, but for its tensors and the mode."""
    return {name: (type(module).__qualname__, settings(module)) for name, module in model.named_modules()}


def same_settings(module: nn.Module, before: dict[str, Any]) -> bool:
    """Whether a module has the settings that it had before.

    An attribute that is new is no setting unless its class has it too: no code of the model's reads it, a counter that
    a training loop keeps there, say.
    """
    now = settings(module)
    return all(
        key in now and now[key] == value for key, value in before.items()) and not any(
        hasattr(type(module), key) for key in now.keys() - before.keys())


def unchanged(model: nn.Module, then: dict[str, Any]) -> bool:
    """Whether a model has the modules and settings of that ``structure``."""
    modules = dict(model.named_modules())
    return modules.keys() == then.keys() and all(
        type(modules[name]).__qualname__ == kind and same_settings(modules[name], before)
        for name, (kind, before) in then.items())


def surface_unchanged(model: nn.Module, then: dict[str, Any]) -> bool:
    """``unchanged`` for the model itself and the modules that are its own attributes, in a small part of the time.

    A subclass of a module's class is no change: fully_shard gives modules such, and forbids copies to look at.
    """
    def same(module: nn.Module, before: tuple[str, dict[str, Any]] | None) -> bool:
        return before is not None and same_settings(module, before[1]) and any(
            cls.__qualname__ == before[0] for cls in type(module).__mro__)

    return same(model, then['']) and all(same(child, then.get(name)) for name, child in model.named_children())
