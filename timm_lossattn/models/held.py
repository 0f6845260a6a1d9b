"""Holding the nonlinearities of a classifier head at the state of one image, so that the head becomes affine.

A head f maps the pooled vector h̄ = Σ_m α_m h_m to logits. Run on h̄, every step that is not affine is recorded
(``Record``): the 1/σ of a normalisation, the gate g(ū) = (f(ū) − f(0))/ū of an activation, the second factor of a
product, the mask of a dropout, the batch statistics of a batch norm in train mode. Run on the patches with what was
recorded (``Replay``) the head is an affine map L, and as Σα = 1, Σ_m α_m L(h_m) = L(h̄) = f(h̄), to rounding. What is not
known here runs as it is; ``probe.analyse`` finds out whether the sum is still exact.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm  # what all batch norms are, SyncBatchNorm included
from torch.overrides import TorchFunctionMode

from ..prediction import upcast

__all__ = ['Record', 'Replay', 'frozen_batch_norms']

# functions of each number by itself, finite at 0, under their names in torch, torch.Tensor and torch.nn.functional,
# without underscores (relu_, __mul__)
POINTWISE = frozenset({
    'relu', 'relu6', 'gelu', 'silu', 'mish', 'hardswish', 'hardtanh', 'hardsigmoid', 'leaky_relu', 'prelu', 'elu',
    'selu', 'celu', 'softplus', 'softsign', 'tanhshrink', 'softshrink', 'hardshrink', 'threshold', 'logsigmoid', 'tanh',
    'sigmoid', 'abs', 'square', 'sqrt', 'exp', 'log1p', 'erf', 'sin', 'clamp', 'clip',
})
PRODUCTS = frozenset({'mul', 'imul', 'rmul', 'multiply', 'div', 'divide', 'true_divide', 'truediv', 'itruediv'})
NORMS: dict[str, tuple[str, ...]] = {  # the arguments after the input, in their order
    'layer_norm': ('normalized_shape', 'weight', 'bias', 'eps'),
    'rms_norm': ('normalized_shape', 'weight', 'eps'),
    'group_norm': ('num_groups', 'weight', 'bias', 'eps'),
    'normalize': ('p', 'dim', 'eps'),
}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def batch_norm_trains(arguments: dict[str, Any]) -> bool:
    """Whether F.batch_norm takes the statistics of the batch."""
    return arguments.get('training', False) or arguments['running_mean'] is None


class HeadMode(TorchFunctionMode):
    """What both passes share: which numbers come from the features, and which steps are not affine.

    Args:
        features: the input of the head.
    """

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.derived: dict[int, torch.Tensor] = {id(features): features}  # holds them, so that no id is used twice

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in((args, kwargs)))
        if not any(id(t) in self.derived for t in inputs):
            self.see_constants(inputs)
            return func(*args, **kwargs)
        self.see_constants([t for t in inputs if id(t) not in self.derived])
        rule = self.rule(getattr(func, '__name__', '').strip('_'), func, args)
        out = func(*args, **kwargs) if rule is None else self.apply(rule, func, args, kwargs)
        self.derived.update((id(t), t) for t in tensors_in(out))
        return out

    def see_constants(self, tensors: list[torch.Tensor]) -> None:
        """Tensors that do not come from the features: parameters, buffers."""

    def rule(self, name: str, func: Callable, args: tuple) -> str | None:
        """How a call is held, None if it is run as it is."""
        if not args or not isinstance(args[0], torch.Tensor):
            return None
        if name in NORMS or func in (F.batch_norm, F.dropout, torch.dropout):
            return name
        if name in POINTWISE:
            return 'pointwise'
        if name == 'pow' and len(args) == 2 and not isinstance(args[1], torch.Tensor):
            return 'pointwise'
        if name in PRODUCTS and len(args) == 2 and all(id(a) in self.derived for a in args):
            return 'product'
        return None

    def apply(self, rule: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class Record(HeadMode):
    """First pass: the head on pooled vectors; it computes what it always does.

    Attributes:
        states: (rule, what is held) of every step that is not affine, in their order.
        constants: parameters and buffers that the head uses, by id.
    """

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__(features)
        self.states: list[tuple[str, Any]] = []
        self.constants: dict[int, torch.Tensor] = {}

    @property
    def kind(self) -> str:
        """A: affine; B: but for normalisations; C: with gates."""
        rules = {rule for rule, _ in self.states}
        return 'C' if rules & {'pointwise', 'product'} else 'B' if rules & NORMS.keys() else 'A'

    @property
    def affine(self) -> bool:
        """Nothing had to be held."""
        return all(held is None for _, held in self.states)

    @property
    def batch_norm(self) -> bool:
        """The head has batch norms."""
        return any(rule == 'batch_norm' for rule, _ in self.states)

    def see_constants(self, tensors: list[torch.Tensor]) -> None:
        self.constants.update((id(t), t) for t in tensors)

    def apply(self, rule: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        x, rest = args[0], args[1:]
        held: Any
        if rule == 'pointwise':
            held = gate(func, x, rest, kwargs)
        elif rule == 'product':
            held = args[1]
        elif rule == 'dropout':
            training = kwargs.get('training', rest[1] if len(rest) > 1 else True)
            held = F.dropout(torch.ones_like(x), kwargs.get('p', rest[0] if rest else 0.5)) if training else None
            self.states.append((rule, held))
            return x if held is None else x * held
        elif rule == 'batch_norm':
            arguments = batch_norm_arguments(rest, kwargs)
            held = None
            if batch_norm_trains(arguments):
                dims = [d for d in range(x.dim()) if d != 1]
                mean = upcast(x).mean(dims, keepdim=True)
                var = upcast(x).var(dims, keepdim=True, unbiased=False)
                held = mean, torch.rsqrt(var + arguments.get('eps', 1e-5))
        else:
            held = norm_scale(rule, x, norm_arguments(rule, rest, kwargs))
        out = func(*args, **kwargs)
        self.states.append((rule, (held, out.dtype) if rule in NORMS else held))
        return out


class Replay(HeadMode):
    """Second pass: the head on M patches of each image, with what the pooled vectors of the B images left.

    Args:
        features: the input of the head, patches of one image after the other (B·M first).
        record: the first pass.
        patches: M.
    """

    def __init__(self, features: torch.Tensor, record: Record, patches: int) -> None:
        super().__init__(features)
        self.states = iter(record.states)
        self.patches = patches

    def spread(self, held: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B·M, ...)."""
        return held.unsqueeze(1).expand(-1, self.patches, *held.shape[1:]).flatten(0, 1)

    def apply(self, rule: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        recorded, held = next(self.states, (None, None))
        if recorded != rule:
            raise ValueError(f'the head took another way for patches: {rule} in place of {recorded}.')
        x, rest = args[0], args[1:]
        if rule == 'pointwise':
            scale, zero = held
            return x * self.spread(scale) + self.spread(zero)
        if rule == 'product':
            return func(x, self.spread(held), **kwargs)
        if rule == 'dropout':
            return x if held is None else x * self.spread(held)
        if rule == 'batch_norm':
            if held is None:
                return func(*args, **kwargs)
            arguments = batch_norm_arguments(rest, kwargs)
            mean, scale = held
            out = ((upcast(x) - mean) * scale).to(x.dtype)
            shape = [1, -1] + [1] * (x.dim() - 2)
            weight, bias = arguments.get('weight'), arguments.get('bias')
            out = out if weight is None else out * weight.view(shape)
            return out if bias is None else out + bias.view(shape)
        scale, dtype = held
        return norm_with(rule, x, norm_arguments(rule, rest, kwargs), self.spread(scale), dtype)


def gate(func: Callable, u: torch.Tensor, rest: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """((f(u) − f(0))/u, f(0)) of a function of each number; towards u = 0 the slope at this side of it."""
    x = upcast(u)
    tiny = 1e-12 if x.dtype == torch.float64 else 1e-6
    signed = torch.where(x < 0, torch.full_like(x, -tiny), torch.full_like(x, tiny))
    x = torch.where(x.abs() < tiny, signed, x)
    kwargs = {key: value for key, value in kwargs.items() if key != 'inplace'}
    function = getattr(torch, func.__name__[:-1], func) if func.__name__.endswith('_') else func  # nothing in place
    zero = function(torch.zeros_like(x), *rest, **kwargs)
    return ((function(x.clone(), *rest, **kwargs) - zero) / x).to(u.dtype), zero.to(u.dtype)


def batch_norm_arguments(rest: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of F.batch_norm after the input, by name."""
    names = ('running_mean', 'running_var', 'weight', 'bias', 'training', 'momentum', 'eps')
    return {**dict(zip(names, rest)), **kwargs}


def norm_arguments(rule: str, rest: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a normalisation after the input, by name."""
    return {**dict(zip(NORMS[rule], rest)), **kwargs}


def norm_dims(arguments: dict[str, Any]) -> tuple[int, ...]:
    """The dimensions that layer_norm and rms_norm run over: the last ones."""
    shape = arguments['normalized_shape']
    return tuple(range(-1 if isinstance(shape, int) else -len(shape), 0))


def norm_scale(rule: str, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """What a normalisation multiplies by: 1/σ of x, kept in the dimensions of x (of its groups for group_norm)."""
    eps = arguments.get('eps', 1e-12 if rule == 'normalize' else None if rule == 'rms_norm' else 1e-5)
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    x = upcast(x)
    if rule == 'layer_norm':
        return torch.rsqrt(x.var(norm_dims(arguments), unbiased=False, keepdim=True) + eps)
    if rule == 'rms_norm':
        return torch.rsqrt(x.square().mean(norm_dims(arguments), keepdim=True) + eps)
    if rule == 'group_norm':
        groups = x.reshape(x.shape[0], arguments['num_groups'], -1)
        return torch.rsqrt(groups.var(2, unbiased=False, keepdim=True) + eps)
    p, dim = arguments.get('p', 2.0), arguments.get('dim', 1)
    return 1 / torch.linalg.vector_norm(x, p, dim, keepdim=True).clamp_min(eps)


def norm_with(
        rule: str, x: torch.Tensor, arguments: dict[str, Any], scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A normalisation whose 1/σ is given; the mean that it subtracts is linear and stays x's own."""
    weight, bias = arguments.get('weight'), arguments.get('bias')
    y = upcast(x)
    if rule == 'layer_norm':
        y = (y - y.mean(norm_dims(arguments), keepdim=True)) * scale
    elif rule == 'group_norm':
        groups = y.reshape(y.shape[0], arguments['num_groups'], -1)
        y = ((groups - groups.mean(2, keepdim=True)) * scale).reshape(x.shape)
        shape = [1, -1] + [1] * (x.dim() - 2)
        weight, bias = (None if t is None else t.view(shape) for t in (weight, bias))
    else:
        y = y * scale
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(dtype)


@contextmanager
def frozen_batch_norms(model: nn.Module) -> Iterator[None]:
    """Within it, batch norms use their running statistics and leave them as they are."""
    modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True
