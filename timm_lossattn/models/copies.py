"""Copies of models: without numbers, with modules of their own, or as another class with the same modules.

Objects that a user has registered as hooks are never copied: they are no part of the model, and may hold whatever they
have seen.
"""
import copy
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

__all__ = ['own_modules', 'renamed', 'shallow_copy', 'shape_twin', 'without_graph']

CALL_HOOKS = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')
HOOK_FLAGS = (('_forward_pre_hooks', '_forward_pre_hooks_with_kwargs'),
              ('_forward_hooks', '_forward_hooks_with_kwargs'), ('_forward_hooks', '_forward_hooks_always_called'))


def made_by_torch(hook: Any) -> bool:
    """A hook of torch.nn.utils, which makes a module's weight before each call: pruning, weight norm."""
    return type(hook).__module__.startswith('torch.nn.utils.') or isinstance(hook, BasePruningMethod)


def users_hooks(model: nn.Module) -> Iterator[tuple[dict[int, Any], list[Any]]]:
    """Each dict of hooks on calls, with those in it that are neither torch's own nor methods of the model's modules."""
    modules = list(model.modules())
    own = {id(module) for module in modules}
    for module in modules:
        for name in CALL_HOOKS:
            hooks = vars(module)[name]
            yield hooks, [hook for hook in hooks.values()
                          if not made_by_torch(hook) and id(getattr(hook, '__self__', None)) not in own]


def without_graph(model: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy``, which refuses tensors of a graph: what takes the place of those that modules keep.

    Caches of them, as timm's attention biases, are empty in the copy, and computed anew; others are detached. The
    user's hooks, which may keep such tensors as well, are the same objects in the copy.
    """
    def in_graph(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.grad_fn is not None

    memo: dict[int, Any] = {id(hook): hook for _, users in users_hooks(model) for hook in users}
    for module in model.modules():
        for name, value in vars(module).items():
            if in_graph(value):
                memo[id(value)] = value.detach()
            elif isinstance(value, dict) and name != '_buffers' and any(map(in_graph, value.values())):
                memo[id(value)] = {}
    return memo


def shape_twin(model: nn.Module) -> Any:
    """The model in eval mode on the meta device; modules are copied, weights are not."""
    memo = without_graph(model)
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device='meta'), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device='meta')
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):  # the user's expect numbers
            for key, hook in list(hooks.items()):
                if not made_by_torch(hook):
                    del hooks[key]
        module.training = False  # not by eval(), which a frozen model has changed
    return twin


def own_modules(model: nn.Module) -> None:
    """Give a model modules of its own, of the same parameters and buffers, before it is restructured.

    The user's hooks stay registered in one place, from which the handle that the user has removes them; hooks of
    the same kind that such a module gets later are called in both models.
    """
    memo = without_graph(model)
    memo |= {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    memo |= {id(hooks): hooks for hooks, users in users_hooks(model) if users and len(users) == len(hooks)}
    for module in model.modules():
        own = vars(module)
        memo |= {id(own[flags]): own[flags] for hooks, flags in HOOK_FLAGS if id(own[hooks]) in memo}
    model._modules = copy.deepcopy(model._modules, memo)


def shallow_copy(model: nn.Module, new: Any) -> Any:
    """Fill a new module with the attributes, modules, parameters and buffers of another.

    What is bound to the other one, as ``freeze_backbone`` does with ``train``, is bound to the new one instead;
    ``nn.Module.compile`` is to be called anew.
    """
    new.__dict__.update({key: rebound(value, model, new) for key, value in model.__dict__.items()
                         if key != '_compiled_call_impl'})
    return new


def rebound(value: Any, model: nn.Module, new: nn.Module) -> Any:
    """An attribute's value for a copy: a copy of a container, a method of the model or an object that holds it anew."""
    if isinstance(value, (dict, list, set)):
        return copy.copy(value)
    if isinstance(value, MethodType) and value.__self__ is model:
        return MethodType(value.__func__, new)
    holding = [] if isinstance(value, (FunctionType, nn.Module)) else [
        name for name, held in getattr(value, '__dict__', {}).items() if held is model]
    if holding:
        value = copy.copy(value)
        value.__dict__.update(dict.fromkeys(holding, new))
    return value


def renamed(function: Any, name: str) -> Any:
    """The same function under another name, which TorchScript reads from the function."""
    copied = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    return copied
