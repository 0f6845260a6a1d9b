"""loss_attention: any timm model whose head averages positions, as a patch model, with the weights that it already has.

Loss attention has no parameters of its own: it reuses the classifier. ``forward_features`` and ``forward_head`` of the
stock model carry it: a patch's own logits p_m are the head on the features of that patch alone, and the image logits
are the head on Σ_m α_m h_m.
"""
import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, lru_cache, wraps
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.fx
from timm.utils import unwrap_model
from torch import nn

from ..attention.weights import PatchWeights, create_weights, list_weights, weighted_sum
from ..prediction import PatchPrediction, upcast
from .held import Record, Replay, frozen_batch_norms
from .probe import PatchAccess, analyse, feature_grid, join_patches, split_patches, without_graph

__all__ = ['LossAttentionMixin', 'loss_attention']

Base: Any = nn.Module if TYPE_CHECKING else object
RESTRUCTURING = ('reset_classifier', 'set_input_size', 'prune_intermediate_layers')
# what is known of a stock model, with the modules and their settings that it had then
_known: 'WeakKeyDictionary[nn.Module, tuple[list[ref], dict[str, Any], PatchAccess]]' = WeakKeyDictionary()


@torch.fx.wrap  # reason: dtype dependent control flow
def pool_patches(alpha: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Σ_m α_m h_m of (B, M) and (B, M, C), to (B, C) in the precision of h; summed in float32."""
    return weighted_sum(alpha, upcast(h)).to(h.dtype)


@lru_cache(maxsize=64)
def equal_boxes(rows: int, cols: int, height: int, width: int) -> torch.Tensor:
    """height × width pixels in rows × cols equal parts, rounded to whole pixels, (rows · cols, 4)."""
    y, x = ((torch.arange(n + 1, device='cpu') * size / n).round().long()
            for n, size in ((rows, height), (cols, width)))
    top, left = torch.meshgrid(y[:-1], x[:-1], indexing='ij')
    bottom, right = torch.meshgrid(y[1:], x[1:], indexing='ij')
    return torch.stack((left, top, right, bottom), dim=-1).reshape(-1, 4)


class LossAttentionMixin(Base):
    """What loss attention adds to a timm model class, before which it stands; see ``loss_attention``.

    Attributes:
        patch_weights: α of features and patch logits, without parameters: PatchWeights.
        patch_kind: A: the head is affine, a patch contributes α_m p_m; B: it normalises the pooled vector, whose 1/σ is
            held; C: it has activations, whose gates are held, the whole image's. Exact in each case. '' without
            classifier.
        patch_layout: of the features: NCHW, NHWC or NLC.
        patch_prefix: tokens before those of the patches, which the head does not read.
        patch_refusal: why the logits are no sum over patches since ``reset_classifier`` and the like; raised when used.
    """
    if TYPE_CHECKING:  # TorchScript would read annotations of the class
        forward_features: Any
        num_classes: int
        patch_access: PatchAccess
        patch_batch_norm: bool
        patch_kind: str
        patch_layout: str
        patch_prefix: int
        patch_refusal: str
        patch_weights: PatchWeights
        patches_differ: bool
        stock_class: type[nn.Module]
        stock_forward_head: Any
    __jit_unused_properties__ = ('xi',)

    @property
    def xi(self) -> float:
        """ξ of Eq. 5b."""
        return self.patch_weights.xi

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False):
        """Features to image logits (B, K), or with pre_logits to what the classifier reads.

        Without classifier they are the stock model's, the plain mean.
        """
        if self.num_classes > 0 and self.patches_differ:
            if self.patch_refusal:
                raise ValueError(self.patch_refusal)
            x = self.pooled_features(x)
        return self.stock_forward_head(x, pre_logits) if pre_logits else self.stock_forward_head(x)

    def pooled_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features to those of one patch that holds Σ_m α_m h_m."""
        h = split_patches(x, self.patch_layout, self.patch_prefix)
        alpha = self.patch_weights(h, self.logits_of_patches(h))
        return join_patches(pool_patches(alpha, h), self.patch_layout, self.patch_prefix)

    def logits_of_patches(self, h: torch.Tensor) -> torch.Tensor:
        """Patch features (B, M, C) to each patch's own logits (B, M, K): the head on each of them alone."""
        x = join_patches(h.flatten(0, 1), self.patch_layout, self.patch_prefix)
        if self.patch_batch_norm and self.training:
            p = self._head_with_running_statistics(x)
        else:
            p = self.stock_forward_head(x)
        return p.reshape(h.shape[0], h.shape[1], p.shape[-1])

    @torch.jit.unused
    def _head_with_running_statistics(self, x: torch.Tensor) -> torch.Tensor:
        """The statistics of a batch are those of the pooled vectors, and must not be those of patches."""
        with frozen_batch_norms(self):
            return self.stock_forward_head(x)

    @torch.jit.ignore
    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        """(B, in_chans, H, W) images to PatchPrediction(logits, patch_logits, alpha, contributions).

        The logits are those of ``forward``; the contributions sum to them to rounding.

        Raises:
            ValueError: the model has no classifier (num_classes=0), or now one whose logits are no sum over patches.
        """
        if self.num_classes == 0:
            raise ValueError('forward_patches needs a classifier, but the model has num_classes=0.')
        if not torch.compiler.is_compiling() and structure(self) != self._structure_then:
            self._set_patch_access(analyse(stock_view(self)))  # changed by hand: it may be of another kind
        if self.patch_refusal:
            raise ValueError(self.patch_refusal)
        features = self.forward_features(x)
        h = split_patches(features, self.patch_layout, self.patch_prefix)
        own = None
        if self.patch_access.one_norm and not self.training:
            p, own = self._recorded_logits(h)
        else:
            p = self.logits_of_patches(h)
        alpha = self.patch_weights(h, p)
        if self.patches_differ:
            features = join_patches(pool_patches(alpha, h), self.patch_layout, self.patch_prefix)
        if self.patch_kind == 'A' and not self.training:
            logits, parts = self.stock_forward_head(features), p
        else:
            logits, parts = self._held_head(features, h, p, own)
        return PatchPrediction(logits, p, alpha, alpha.unsqueeze(-1) * upcast(parts))

    @torch.jit.ignore
    @torch.compiler.disable
    def _recorded_logits(self, h: torch.Tensor) -> tuple[torch.Tensor, Record]:
        """``logits_of_patches``, and what the head's normalisation does to each patch."""
        x = join_patches(h.flatten(0, 1), self.patch_layout, self.patch_prefix)
        with Record(x) as own:
            return self.stock_forward_head(x).reshape(h.shape[0], h.shape[1], -1), own

    @torch.jit.ignore
    @torch.compiler.disable  # the modes are Python; torch.export runs them
    def _held_head(
            self, features: torch.Tensor, h: torch.Tensor, p: torch.Tensor, own: Record | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image logits (B, K) of the features; of patch features h (B, M, C) the head (B, M, K) held at that state.

        If nothing had to be held, the latter are the patch logits p; if one 1/σ, they follow from p and the own ones.
        """
        with Record(features) as record:
            logits = self.stock_forward_head(features)
        if record.affine:
            return logits, p
        if own is not None and own.scale is not None and record.scale is not None:
            zero = self.stock_forward_head(torch.zeros_like(features[:1]))
            ratio = record.scale.unsqueeze(1) / own.scale.view(p.shape[0], p.shape[1])
            return logits, torch.lerp(upcast(zero), upcast(p), ratio.to(upcast(p).dtype).unsqueeze(-1))
        x = join_patches(h.flatten(0, 1), self.patch_layout, self.patch_prefix)
        with frozen_batch_norms(self) if self.patch_batch_norm else nullcontext(), Replay(x, record, h.shape[1]):
            return logits, self.stock_forward_head(x).reshape(p.shape)

    @torch.jit.ignore
    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') of the patch grid for an input of height × width pixels: the positions of the features.

        Raises:
            ValueError: the model does not take this size, or does not say how its tokens lie.
        """
        return feature_grid(stock_view(self), self.patch_access, height, width)

    @torch.jit.ignore
    def patch_boxes(self, height: int, width: int) -> torch.Tensor:
        """Nominal pixels of each patch, (M, 4) as x0, y0, x1, y1 (exclusive): the input in equal parts."""
        return equal_boxes(*self.patch_grid(height, width), height, width).clone()

    @torch.jit.ignore
    def _set_patch_access(self, access: PatchAccess) -> None:
        self.patch_access = access
        self.patch_kind, self.patch_layout, self.patch_prefix = access.kind, access.layout, access.prefix
        self.patch_batch_norm, self.patch_refusal = access.batch_norm, ''
        self._structure_then = structure(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copy and pickle: the class is made of the stock model's, not looked up by name."""
        reduced = super().__reduce_ex__(protocol)
        return (empty_model, (self.stock_class,), *reduced[2:])


def own_modules(model: nn.Module) -> None:
    """Give a model modules of its own, of the same parameters and buffers, before it is restructured."""
    shared = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    model._modules = copy.deepcopy(model._modules, without_graph(model) | shared)


def restructuring(method: Callable) -> Callable:
    """A stock method that changes the model, which is then looked at anew; the model it was made of stays as it is."""
    @torch.jit.ignore
    @wraps(method)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nested, self._restructuring = getattr(self, '_restructuring', False), True
        try:
            if not nested:
                own_modules(self)
            result = method(self, *args, **kwargs)
        finally:
            self._restructuring = nested
        cfg = getattr(self, 'pretrained_cfg', None)
        if cfg and method.__name__ == 'reset_classifier':  # the new classes have no names yet, nor those of the tag
            self.pretrained_cfg = self.default_cfg = {**cfg, 'label_names': ()}
        if self.num_classes > 0 and not nested:
            try:
                self._set_patch_access(analyse(stock_view(self)))
            except ValueError as error:  # timm's models may be without pooling for a while; said when it is used
                self.patch_kind, self.patch_refusal = '', str(error)
        return result
    return changed


def renamed(function: Any, name: str) -> Any:
    """The same function under another name, which TorchScript reads from the function."""
    copied = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    return copied


@cache
def loss_attention_class(stock: Any) -> Any:
    """The subclass of a stock model class that loss_attention uses."""
    namespace: dict[str, Any] = {
        '__module__': __name__,
        '__doc__': f'{stock.__name__} whose logits are a sum over patches, see LossAttentionMixin.',
        '__annotations__': dict(getattr(stock, '__annotations__', {})),  # what TorchScript reads: Final and the like
        '__jit_unused_properties__': (*getattr(stock, '__jit_unused_properties__', ()), 'xi'),
        'stock_class': stock,
        # TorchScript knows no super()
        'stock_forward_head': renamed(stock.forward_head, 'stock_forward_head'),
    }
    for name in RESTRUCTURING:
        if hasattr(stock, name):
            namespace[name] = restructuring(getattr(stock, name))
    return type(f'LossAttention{stock.__name__}', (LossAttentionMixin, stock), namespace)


def empty_model(stock: Any) -> Any:
    """A model of the loss-attention subclass, without anything in it."""
    cls = loss_attention_class(stock)
    return object.__new__(cls)


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


def stock_view(model: Any) -> Any:
    """The stock model that a loss-attention model was made of, with the same modules."""
    stock = type(model).stock_class
    view = shallow_copy(model, object.__new__(stock))
    del view._modules['patch_weights']
    return view


def structure(model: nn.Module) -> dict[str, Any]:
    """Names and classes of all modules, with their settings: what a model is, but for its tensors and the mode."""
    def plain(value: Any) -> bool:
        return value is None or isinstance(value, (str, int, float)) or (
            isinstance(value, tuple) and all(map(plain, value)))

    return {f'{name}: {type(module).__qualname__}': {
        key: value for key, value in vars(module).items() if key != 'training' and plain(value)}
        for name, module in model.named_modules()}


def access_to(model: Any) -> PatchAccess:
    """``analyse``, once for a model as long as its modules and their settings stay the same."""
    modules, now = list(model.modules()), structure(model)
    known = _known.get(model)
    if known is not None and known[1] == now and all(then() is module for then, module in zip(known[0], modules)):
        return known[2]
    access = analyse(model)
    _known[model] = [ref(module) for module in modules], now, access
    return access


def loss_attention(model: Any, pool: str = 'lossattn', xi: float = 0.1) -> Any:
    """A patch model made of a timm model, without training and without new parameters.

    The new model has the stock model's parameters and buffers (shared, not copied), its state-dict keys and everything
    else of timm; it is an instance of the stock model's class. The given model is not changed.

    Args:
        model: timm model, or a wrapper as torch.compile's, with a classifier and a head that averages all positions;
            without classifier (``num_classes=0``) it is left as it is until ``reset_classifier`` gives it one.
        pool: how patches are weighed: 'lossattn' (Eqs. 5a, 5b), 'avg' (α = 1/M: the stock model's own logits), or any
            registered patch weights without parameters of their own.
        xi: ξ in [0, 1] of Eq. 5b.

    Returns:
        The model, with ``forward_patches``, ``patch_grid``, ``patch_boxes``, ``patch_weights`` and ``patch_kind``.

    Raises:
        TypeError: the model has no forward_features and forward_head.
        ValueError: its logits are no exact sum over patches, its forward was replaced on the object, or there is no
            such pool or xi.

    Examples:
        >>> model = loss_attention(timm.create_model('resnet50', pretrained=True)).eval()
        >>> model.forward_patches(x).contributions.sum(dim=1)  # model(x)
    """
    model = unwrap_model(model)
    if isinstance(model, LossAttentionMixin):
        model = stock_view(model)
    if isinstance(model, nn.Module) and hasattr(type(model), 'forward_patches'):
        raise ValueError(f'{type(model).__name__} is a patch model already.')
    if not isinstance(model, nn.Module) or not all(
            hasattr(type(model), name) for name in ('forward_features', 'forward_head')):
        raise TypeError(
            f'model must have forward_features and forward_head, as timm models do; {type(model).__name__} has not.')
    classes = getattr(model, 'num_classes', None)
    if not isinstance(classes, int):
        raise TypeError(f'model must have num_classes, as timm models do; {type(model).__name__} has not.')
    own = [name for name in ('forward', 'forward_features', 'forward_head') if name in vars(model)]
    if own:  # what it calls, and with which model, cannot be known
        raise ValueError(f'model has a {own[0]} of its own, set on this object; loss attention goes by that of its '
                         f'class: `del model.{own[0]}` first.')
    access = access_to(model) if classes > 0 else PatchAccess('', 'NCHW', 0, 0, False)
    weights = plain_weights(pool, access.channels, xi)
    new = shallow_copy(model, empty_model(type(model)))
    new.patch_weights = weights.train(model.training)
    new.patches_differ = bool(weights.informative)
    new._set_patch_access(access)
    describe(new, pool, xi)
    return new


def describe(model: Any, pool: str, xi: float) -> None:
    """Make config.json of ``timm.models.save_for_hf`` name the entry point ``lossattn`` and its arguments."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    backbone = cfg.get('architecture')
    if backbone == 'lossattn':  # made of another one, whose arguments it has
        backbone = model._model_args['backbone']
    elif backbone and cfg.get('tag'):
        backbone = f'{backbone}.{cfg["tag"]}'
    if backbone:
        model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': 'lossattn', 'tag': backbone}
        model._model_args = {**getattr(model, '_model_args', {}), 'backbone': backbone, 'pool': pool, 'xi': xi}


def plain_weights(pool: str, channels: int, xi: float) -> PatchWeights:
    """Registered patch weights that have no parameters.

    Raises:
        ValueError: they do not exist, or have parameters.
    """
    if pool not in list_weights():
        raise ValueError(f'pool must be one of {list_weights()}, got {pool!r}.')
    weights = create_weights(pool, channels, xi)
    if list(weights.parameters()):
        raise ValueError(
            f"pool={pool!r} has parameters to learn, which no stock model holds; 'lossattn' and 'avg' have none.")
    return weights
