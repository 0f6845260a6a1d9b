"""What a timm model offers to loss attention: the layout of its features, and which kind of sum its head allows.

Found by running it, never by its name: shapes on the meta device, where nothing is computed, and the head in float64 on
random features, with random weights in place of the model's own, which may be zero before training. The model
itself, its mode and the random state are not touched, and it may lie on the meta device itself.
"""
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import timm
import torch
from timm.data import resolve_input_data_config
from torch import nn
from torch.nn import functional as F

from ..text import one_line
from .copies import shape_twin
from .held import Record, Replay
from .structure import structure, unchanged

__all__ = [
    'NoPatchSum', 'PatchAccess', 'access_to', 'analyse', 'feature_grid', 'input_size', 'is_given', 'join_patches',
    'split_patches',
]

ROWS, COLS = 2, 3  # of the probe's features
TOLERANCE = 1e-9  # of the logits' scale, in float64
PERIOD = 1_000_003  # a prime


class NoPatchSum(ValueError):
    """The logits of a model are no exact sum over patches: a refusal, and nothing that went wrong.

    Attributes:
        why: in a few words, what stands in the way.
    """

    def __init__(self, message: str, why: str = '') -> None:
        super().__init__(message)
        self.why = why


@dataclass
class PatchAccess:
    """How to get at the patches of a model.

    Attributes:
        kind: A, B or C: what is held to make the head affine: nothing, normalisations, gates too.
        layout: of the features: NCHW, NHWC or NLC.
        prefix: tokens before those of the patches, for NLC.
        channels: C of the features.
        batch_norm: the head has batch norms.
        one_norm: a single 1/σ is held, so that a patch's share is its own logits p_m but for that factor: with z_0 =
            head(0) it is z_0 + (p_m − z_0) σ(h_m)/σ(h̄).
        grids: (H', W') of the patch grid by (H, W) of the input, as far as known.
    """
    kind: str
    layout: str
    prefix: int
    channels: int
    batch_norm: bool
    one_norm: bool = False
    grids: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


# what is known of a stock model, with the modules and their settings that it had then
_known: 'WeakKeyDictionary[nn.Module, tuple[list[ref], dict[str, Any], PatchAccess]]' = WeakKeyDictionary()


def split_patches(x: torch.Tensor, layout: str, prefix: int) -> torch.Tensor:
    """Features to those of the patches (B, M, C)."""
    if layout == 'NCHW':
        return x.flatten(2).transpose(1, 2)
    if layout == 'NHWC':
        return x.flatten(1, 2)
    return x[:, prefix:]


def join_patches(h: torch.Tensor, layout: str, prefix: int) -> torch.Tensor:
    """(N, C) to features of one patch each; the prefix tokens, which do not matter, are zero."""
    if layout == 'NCHW':
        return h.unsqueeze(-1).unsqueeze(-1)
    if layout == 'NHWC':
        return h.unsqueeze(1).unsqueeze(1)
    return F.pad(h.unsqueeze(1), (0, 0, prefix, 0))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model was made for: of its weights, unless its arguments say something else."""
    one_channel = {'mean': (0.,), 'std': (1.,)}  # timm would warn of those that do not fit the channels
    channels, height, width = resolve_input_data_config(model, one_channel)['input_size']
    if not getattr(model, 'pretrained_cfg', None):  # made by hand: timm takes 224, a model of one size has its own
        sizes = (getattr(module, 'img_size', None) for module in model.modules())
        size: Any = next((size for size in sizes if size is not None), (height, width))
        height, width = (size, size) if isinstance(size, int) else size
    return getattr(model, 'in_chans', channels), height, width


def meta_input(model: nn.Module, height: int, width: int) -> torch.Tensor:
    """Two images without numbers."""
    channels = input_size(model)[0]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(2, channels, height, width, device='meta', dtype=dtype)


def refuse(model: nn.Module, reason: str) -> NoPatchSum:
    """The error of a model whose logits are no sum over patches."""
    return NoPatchSum(f'{type(model).__name__}: the logits are no sum over patches: {reason}.', reason)


def way_out(model: Any) -> str:
    """What to do about a refused model."""
    name = getattr(model, '_model_args', {}).get('backbone') or (
        getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if not name or not timm.is_model(name):  # made by hand: nothing to try
        return ('If it can be made with global_pool="avg", so that its head averages all positions, do so and train '
                'the head; else choose a model that averages its positions.')
    norm = 'fc_norm' in signature(type(model).__init__).parameters  # by default a new one takes the trained one's place
    if has_average_head(name, norm):
        return (f'Create the model with global_pool="avg"{", fc_norm=False" if norm else ""}, so that its head '
                'averages all positions, and train the head.')
    return 'It has no head whose logits are a sum over patches: choose a model that averages its positions.'


@cache
def has_average_head(name: str, keep_norm: bool) -> bool:
    """Whether timm makes an architecture with a head that averages all positions: tried once, without numbers.

    Args:
        name: of it.
        keep_norm: with its norm before the pooling, where ``global_pool='token'`` has it.
    """
    options: dict[str, Any] = {'fc_norm': False} if keep_norm else {}
    try:
        with torch.device('meta'):
            find_access(timm.create_model(name, global_pool='avg', **options))
    except Exception:  # a refusal, or whatever a model's code raises for a pooling that it has not
        return False
    return True


def traced_forward(model: nn.Module, twin: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of the model, without numbers.

    Raises:
        ValueError: forward is something else than forward_head(forward_features(x)), of one tensor.
    """
    calls: dict[str, list[tuple[list[Any], Any]]] = {'forward_features': [], 'forward_head': []}

    def watched(name: str) -> Callable:
        method = getattr(twin, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = method(*args, **kwargs)
            calls[name].append(([*args, *kwargs.values()], out))
            return out
        return call

    methods = {name: watched(name) for name in calls}
    twin.__dict__.update(methods)
    try:
        with torch.no_grad(), x.device:
            logits = twin(x)
    except Exception as error:  # whatever a model's code raises without numbers
        raise ValueError(f'{type(model).__name__} cannot be run without numbers: {said(error)}') from error
    finally:
        for name in methods:
            del twin.__dict__[name]
    features, heads = calls['forward_features'], calls['forward_head']
    if len(features) != 1 or len(heads) != 1 or heads[0][0][0] is not features[0][1] or heads[0][1] is not logits:
        raise refuse(model, 'its forward is not forward_head(forward_features(x))')
    if any(map(is_given, heads[0][0][1:])):
        raise refuse(model, 'its forward hands forward_head something else beside the features')
    if not isinstance(features[0][1], torch.Tensor) or features[0][1].dim() not in (3, 4):
        raise refuse(model, 'its features are no map and no sequence of tokens')
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise refuse(model, 'its output is no (B, K) matrix of logits')
    return features[0][1], logits


def is_given(argument: Any) -> bool:
    """An optional argument of forward_head, a mask or pre_logits, is neither None nor False."""
    return argument is not None and argument is not False


def said(error: Exception) -> str:
    """Type and message, for errors of a model's own code."""
    return f'{type(error).__name__}: {one_line(error, 120)}'


def layout_of(model: nn.Module, shape: torch.Size) -> tuple[str, int, int]:
    """Layout, prefix tokens and channels of features of this shape."""
    if len(shape) == 3:
        return 'NLC', int(getattr(model, 'num_prefix_tokens', 0)), shape[2]
    width = getattr(model, 'num_features', None)
    fmt = str(getattr(getattr(model, 'output_fmt', ''), 'value', getattr(model, 'output_fmt', '')))
    last = fmt == 'NHWC' if shape[1] == shape[3] or width not in (shape[1], shape[3]) else shape[3] == width
    return ('NHWC', 0, shape[3]) if last else ('NCHW', 0, shape[1])


def analyse(model: nn.Module) -> PatchAccess:
    """Find out how the model makes logits of features.

    Args:
        model: stock model with forward_features, forward_head and num_classes > 0, on any device, in any mode.

    Raises:
        ValueError: its logits are no exact sum over patches; the message says why and what to do.
    """
    try:
        return find_access(model)
    except NoPatchSum as error:
        raise NoPatchSum(f'{error} {way_out(model)}', error.why) from error.__cause__


def access_to(model: nn.Module) -> PatchAccess:
    """``analyse``, once for a model as long as its modules and their settings stay the same."""
    modules = list(model.modules())
    known = _known.get(model)
    if known is not None and unchanged(model, known[1]) and all(
            then() is module for then, module in zip(known[0], modules)):
        return known[2]
    access = analyse(model)
    _known[model] = [ref(module) for module in modules], structure(model), access
    return access


def find_access(model: nn.Module) -> PatchAccess:
    """``analyse``, with the reason alone where it refuses."""
    twin = shape_twin(model)
    size = input_size(model)[1:]
    features, _ = traced_forward(model, twin, meta_input(model, *size))
    layout, prefix, channels = layout_of(model, features.shape)
    access = PatchAccess('', layout, prefix, channels, False)
    if features.dim() == 4:
        access.grids[size] = (features.shape[2], features.shape[3]) if layout == 'NCHW' else (
            features.shape[1], features.shape[2])
    try:
        with torch.no_grad(), torch.device('cpu'):
            probe(model, twin, access)
    except (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise refuse(model, 'its head does not take single patches') from error
    return access


def probe(model: nn.Module, twin: Any, access: PatchAccess) -> None:
    """Fill in kind and batch_norm, or raise ValueError, see ``analyse``. The twin's head gets random numbers."""
    layout, prefix, channels = access.layout, access.prefix, access.channels
    x = join_patches(torch.empty(2, channels, device='meta'), layout, prefix)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    x = x.to(dtype)
    with Record(x) as record:
        twin.forward_head(x)
    randomise(model, twin, record.constants)

    random = torch.Generator().manual_seed(0)
    M = ROWS * COLS
    h = torch.randn(2, M, channels, generator=random, dtype=torch.float64)
    prefixes = [torch.randn(2, prefix, channels, generator=random, dtype=torch.float64) for _ in range(2)]
    alpha = torch.rand(2, M, generator=random, dtype=torch.float64)
    alpha = alpha / alpha.sum(dim=1, keepdim=True)

    def join(h: torch.Tensor, prefix_tokens: torch.Tensor) -> torch.Tensor:
        if layout == 'NLC':
            return torch.cat([prefix_tokens, h], dim=1)
        x = h.unflatten(1, (ROWS, COLS))
        return x.permute(0, 3, 1, 2) if layout == 'NCHW' else x

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        scale = max(float(a.abs().max()), float(b.abs().max()))
        return a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * scale

    def replay(record: Record, alpha: torch.Tensor) -> torch.Tensor:
        single = join_patches(h.flatten(0, 1), layout, prefix)
        with Replay(single, record, M):
            parts = twin.forward_head(single)
        return (alpha.unsqueeze(-1) * parts.unflatten(0, (2, M))).sum(dim=1)

    weighted = h * (M * alpha).unsqueeze(-1)
    if prefix and not close(twin.forward_head(join(h, prefixes[0])), twin.forward_head(join(h, prefixes[1]))):
        raise refuse(model, 'its class token decides')
    single = join_patches((alpha.unsqueeze(-1) * h).sum(dim=1), layout, prefix)
    with Record(single) as record:
        pooled = twin.forward_head(single)
    if not close(pooled, twin.forward_head(join(weighted, prefixes[0]))):
        raise refuse(model, 'its head does not average the positions before everything that is not linear')
    if not close(pooled, replay(record, alpha)):
        raise refuse(model, 'its head does something after the pooling that cannot be held')
    uniform = torch.full_like(alpha, 1. / M)
    maps = join(h, prefixes[0])
    with Record(maps) as whole:
        mean = twin.forward_head(maps)
    if not close(mean, replay(whole, uniform)):
        raise refuse(model, 'its head does something before the pooling that is not linear')
    access.kind, access.batch_norm = record.kind, record.batch_norm
    patches = join_patches(h.flatten(0, 1), layout, prefix)
    with Record(patches) as own:
        p = twin.forward_head(patches)
    if record.scale is not None and own.scale is not None:
        zero = twin.forward_head(torch.zeros_like(patches[:1]))
        parts = torch.lerp(zero, p, (record.scale.repeat_interleave(M) / own.scale).unsqueeze(-1))
        access.one_norm = close(pooled, (alpha.unsqueeze(-1) * parts.unflatten(0, (2, M))).sum(dim=1))


def randomise(model: nn.Module, twin: nn.Module, used: dict[int, torch.Tensor]) -> None:
    """Give the twin's parameters that are in use random numbers in float64, and the buffers their own (meta: ones)."""
    random = torch.Generator().manual_seed(1)
    own = dict(model.named_buffers(remove_duplicate=False))
    for name, module in twin.named_modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in used:
                count = parameter.numel()  # huge ones repeat their numbers: drawing them would take longest of all
                numbers = torch.randn(min(count, PERIOD), generator=random, dtype=torch.float64)
                numbers = numbers.repeat(-(-count // PERIOD))[:count].view(parameter.shape)
                module._parameters[key] = nn.Parameter(numbers, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in used:
                given = own[f'{name}.{key}' if name else key]
                numbers = torch.ones(buffer.shape) if given.is_meta else given.detach().cpu()
                module._buffers[key] = numbers.double() if buffer.is_floating_point() else numbers.to(buffer.dtype)


@lru_cache(maxsize=64)
def equal_boxes(rows: int, cols: int, height: int, width: int) -> torch.Tensor:
    """height × width pixels in rows × cols equal parts, rounded to whole pixels, (rows · cols, 4)."""
    y, x = ((torch.arange(n + 1, device='cpu').double() * size / n).round().long()
            for n, size in ((rows, height), (cols, width)))
    top, left = torch.meshgrid(y[:-1], x[:-1], indexing='ij')
    bottom, right = torch.meshgrid(y[1:], x[1:], indexing='ij')
    return torch.stack((left, top, right, bottom), dim=-1).reshape(-1, 4)


def feature_grid(model: nn.Module, access: PatchAccess, height: int, width: int) -> tuple[int, int]:
    """(H', W') of the patch grid for an input of height × width pixels.

    Raises:
        ValueError: the model does not take this size, or does not say how its tokens lie.
    """
    if (height, width) in access.grids:
        return access.grids[height, width]
    twin, last = shape_twin(model), None
    x = meta_input(model, height, width)
    with torch.no_grad(), x.device:
        try:
            shape = twin.forward_features(x).shape
        except Exception as error:  # whatever a model's code raises for a size that it does not take
            raise ValueError(
                f'{type(model).__name__} does not take images of {height}×{width} pixels ({said(error)}).') from error
        if access.layout == 'NLC' and hasattr(twin, 'forward_intermediates'):
            with suppress(Exception):  # some models' code reads numbers here
                last = twin.forward_intermediates(x, indices=1, output_fmt='NCHW', intermediates_only=True)[-1]
    reroll = getattr(twin, 'reroll', None)
    if reroll is not None and reroll.schedule[max(reroll.schedule)][0]:  # Hiera whose tokens still lie unit by unit
        last = None
    if access.layout == 'NLC':
        grid = (last.shape[2], last.shape[3]) if last is not None else (0, 0)
        if grid[0] * grid[1] != shape[1] - access.prefix:
            raise ValueError(f'{type(model).__name__} does not say how its {shape[1] - access.prefix} tokens lie.')
    else:
        grid = (shape[2], shape[3]) if access.layout == 'NCHW' else (shape[1], shape[2])
    access.grids[height, width] = grid
    return grid
