"""loss_attention: any timm model whose head averages positions, as a patch model, with the weights that it already has.

Loss attention has no parameters of its own: it reuses the classifier. ``forward_features`` and ``forward_head`` of the
stock model carry it: a patch's own logits p_m are the head on the features of that patch alone, and the image logits
are the head on Σ_m α_m h_m.
"""
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.utils import unwrap_model
from torch import nn

from ..attention.weights import PatchWeights, checked_xi, plain_weights, weighted_sum
from ..prediction import PatchPrediction, upcast
from .copies import own_modules, renamed, shallow_copy, users_hooks
from .held import Record, Replay, frozen_batch_norms
from .probe import (
    PatchAccess,
    access_to,
    analyse,
    equal_boxes,
    feature_grid,
    is_given,
    join_patches,
    split_patches,
)
from .structure import structure, surface_unchanged, unchanged

__all__ = ['LossAttentionMixin', 'loss_attention']

Base: Any = nn.Module if TYPE_CHECKING else object
RESTRUCTURING = ('reset_classifier', 'set_input_size', 'prune_intermediate_layers')


@torch.fx.wrap  # reason: dtype dependent control flow
def pool_patches(alpha: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Σ_m α_m h_m of (B, M) and (B, M, C), to (B, C) in the precision of h; summed in float32."""
    return weighted_sum(alpha, upcast(h)).to(h.dtype)


class LossAttentionMixin(Base):
    """What loss attention adds to a timm model class, before which it stands; see ``loss_attention``.

    Attributes:
        patch_weights: α of features and patch logits, without parameters: PatchWeights.
        patch_kind: A: the head is affine, a patch contributes α_m p_m; B: it normalises the pooled vector, whose 1/σ is
            held; C: it has activations, whose gates are held, the whole image's. Exact in each case. '' without
            classifier.
        patch_layout: of the features: NCHW, NHWC or NLC; '' if the model never had a classifier.
        patch_prefix: tokens before those of the patches, which the head does not read.
        patch_refusal: why the logits are no sum over patches since ``reset_classifier`` and the like, or since a change
            by hand; raised when used.
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
        _model_args: dict[str, Any]
        _structure_then: dict[str, Any]
        stock_forward_head: Any
    __jit_unused_properties__ = ('xi',)

    @property
    def xi(self) -> float:
        """ξ of Eq. 5b; may be set, and ``timm.models.save_for_hf`` saves it."""
        return self.patch_weights.xi

    @xi.setter
    def xi(self, xi: float) -> None:
        self.patch_weights.xi = checked_xi(xi)
        self._structure_then = {  # which is no reason to look anew
            **self._structure_then, 'patch_weights': structure(self.patch_weights)['']}
        if 'backbone' in getattr(self, '_model_args', {}):  # see ``describe``
            self._model_args = {**self._model_args, 'xi': self.xi}

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False):
        """Features to image logits (B, K), or with pre_logits to what the classifier reads.

        Without classifier they are the stock model's, the plain mean.

        Raises:
            ValueError: the logits are no sum over patches any more.
        """
        if self.num_classes > 0 and self.patches_differ:
            if not torch.jit.is_scripting():
                self._notice_changes()
            if self.patch_refusal:
                raise ValueError(self.patch_refusal)
            x = self.pooled_features(x)
        return self.stock_forward_head(x, pre_logits=pre_logits) if pre_logits else self.stock_forward_head(x)

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
            TypeError: x is no tensor.
            ValueError: the model has no classifier (num_classes=0), or now one whose logits are no sum over patches.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f'x must be a tensor (B, in_chans, H, W), got a {type(x).__name__}.')
        self._check_patches('forward_patches')
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
        if self.patch_kind == 'A' and not self._head_may_differ():
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
            p = self.stock_forward_head(x)
        return p.reshape(h.shape[0], h.shape[1], p.shape[-1]), own

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
            zero = self.stock_forward_head(features.new_zeros(1, *features.shape[1:]))
            ratio = record.scale.unsqueeze(1) / own.scale.view(p.shape[0], p.shape[1])
            return logits, torch.lerp(upcast(zero), upcast(p), ratio.to(upcast(p).dtype).unsqueeze(-1))
        x = join_patches(h.flatten(0, 1), self.patch_layout, self.patch_prefix)
        with frozen_batch_norms(self) if self.patch_batch_norm else nullcontext(), Replay(x, record, h.shape[1]):
            return logits, self.stock_forward_head(x).reshape(p.shape)

    @torch.jit.ignore
    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') of the patch grid for an input of height × width pixels: the positions of the features.

        Raises:
            ValueError: as ``forward_patches``; or the model does not take this size, or does not say how its tokens
                lie.
        """
        self._check_patches('patch_grid')
        return feature_grid(stock_view(self), self.patch_access, height, width)

    @torch.jit.ignore
    def patch_boxes(self, height: int, width: int) -> torch.Tensor:
        """Nominal pixels of each patch, (M, 4) as x0, y0, x1, y1 (exclusive): the input in equal parts.

        Raises:
            ValueError: as ``patch_grid``.
        """
        return equal_boxes(*self.patch_grid(height, width), height, width).clone()

    @torch.jit.ignore
    def _check_patches(self, use: str) -> None:
        """Raise ValueError if there are no patches; a model that was changed by hand is looked at anew."""
        if self.num_classes == 0:
            raise ValueError(f'{use} needs a classifier, but the model has num_classes=0.')
        if not torch.compiler.is_compiling() and not unchanged(self, self._structure_then):
            self._look_anew()
        if self.patch_refusal:
            raise ValueError(self.patch_refusal)

    @torch.jit.ignore
    def _head_may_differ(self) -> bool:
        """Whether a part of it draws anew in each call, as a dropout left on at test time, or has hooks of the user."""
        return self.training or (not torch.compiler.is_compiling() and (
            any(module.training for module in self.modules()) or any(users for _, users in users_hooks(self))))

    @torch.jit.ignore
    def _notice_changes(self) -> None:
        """Look anew if the model was changed by hand: its own settings, as ``global_pool``, or parts, as ``fc``.

        To go through all modules, as ``forward_patches`` does, takes 1 to 2 ms: too long for each forward. Compiled
        code looks at nothing: after such a change the model is to be called once before it is compiled.
        """
        if not torch.compiler.is_compiling() and not surface_unchanged(self, self._structure_then):
            self._look_anew()

    @torch.jit.ignore
    def _look_anew(self) -> None:
        """Find out what the model is now: how its patches are got at, or why there are none, said when it is used.

        Raises:
            RuntimeError: in a replica of DataParallel, which has no parameters to look at and is thrown away.
        """
        if getattr(self, '_is_replica', False):
            raise RuntimeError(f'{type(self).__name__} was changed since it was last called; call it once as it is '
                               'before torch.nn.DataParallel copies it.')
        try:
            self._set_patch_access(analyse(stock_view(self)))
        except ValueError as error:  # timm's models may be without pooling for a while
            self.patch_kind, self.patch_refusal = '', str(error)
            self._structure_then = structure(self)

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
            self._look_anew()
        return result
    return changed


def head_with_options(stock_forward_head: Callable) -> Callable:
    """forward_head for a stock class whose own takes more than features and pre_logits, as a mask of tokens.

    The stock forward may hand it on as None, what it is for whole images. A function of fixed arguments, as that of the
    mixin, is what TorchScript needs of all others.
    """
    names = list(signature(stock_forward_head).parameters)[1:]

    def forward_head(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.num_classes == 0 or not self.patches_differ:
            return self.stock_forward_head(*args, **kwargs)
        options = {**dict(zip(names, args)), **kwargs}
        x, pre_logits = options.pop(names[0]), options.pop('pre_logits', False)
        given = [name for name, value in options.items() if is_given(value)]
        if given:
            raise ValueError(f'{given[0]} must be None: loss attention weighs all positions of images (B, C, H, W).')
        return LossAttentionMixin.forward_head(self, x, pre_logits)
    return forward_head


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
    if list(signature(stock.forward_head).parameters)[1:] not in (['x'], ['x', 'pre_logits']):
        namespace['forward_head'] = head_with_options(stock.forward_head)
    for name in RESTRUCTURING:
        if hasattr(stock, name):
            namespace[name] = restructuring(getattr(stock, name))
    return type(f'LossAttention{stock.__name__}', (LossAttentionMixin, stock), namespace)


def empty_model(stock: Any) -> Any:
    """A model of the loss-attention subclass, without anything in it."""
    cls = loss_attention_class(stock)
    return object.__new__(cls)


def stock_view(model: Any) -> Any:
    """The stock model that a loss-attention model was made of, with the same modules."""
    stock = type(model).stock_class
    view = shallow_copy(model, object.__new__(stock))
    del view._modules['patch_weights']
    return view


def loss_attention(model: Any, pool: str = 'lossattn', xi: float = 0.1) -> Any:
    """A patch model made of a timm model, without training and without new parameters.

    The new model has the stock model's modules, parameters and buffers (shared, not copied), its state-dict keys and
    everything else of timm; it is an instance of the stock model's class. The given model is not changed; what changes
    its modules in place later, ``train()``, ``eval()``, hooks, or ``reset_classifier`` of some families, changes both.

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
    access = access_to(model) if classes > 0 else PatchAccess('', '', 0, 0, False)
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
