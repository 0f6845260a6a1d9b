"""PatchClassifier: the one module that carries timm's model API for every backbone, patch layers and head."""
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq

# Private, but every timm model imports it: the one definition of how `indices` selects feature levels.
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import nn

from .attention import CapsuleLossAttentionHead, ConvPatchHead, PatchPrediction
from .dynamic_routing import DynamicRoutingHead
from .hub_weights import verified_overlay
from .patch_layers import CapsulePatchLayers, ConvPatchLayers, NoPatchLayers, PrimaryCapsules

__all__ = ['BACKBONE_STRIDES', 'PatchClassifier']

BACKBONE_STRIDES = (1, 2, 4, 8)

_PATCH_LAYERS: dict[str, Callable[..., Any]] = {
    'conv': ConvPatchLayers, 'caps': CapsulePatchLayers, 'primarycaps': PrimaryCapsules, 'none': NoPatchLayers}
_DEFAULT_POOL = {'conv': 'lossattn', 'caps': 'lossattn', 'primarycaps': 'routing', 'none': 'avg'}


class PatchClassifier(nn.Module):
    """Image classifier whose logits are the sum of patch contributions: backbone -> patch layers -> head.

    Args:
        backbone: called with (in_chans, backbone_stride, drop_path_rate, device, dtype), gives a module with ``stem``,
            ``stages`` (an nn.Sequential), ``feature_info`` and ``num_features``.
        patch: 'conv', 'caps', 'primarycaps' or 'none' (plain classifiers), the kind of patch layers.
        patch_args: widths of the patch layers.
        num_classes: K; 0 for pooled features without a classifier (the plain mean over patches for 'lossattn').
        in_chans: image channels.
        global_pool: the head: 'lossattn', 'avg', 'attn', 'gatedattn' for conv, 'lossattn' for caps, 'routing' for
            primarycaps, 'avg' for none; '' leaves the features unpooled.
        backbone_stride: s, one of 1, 2, 4, 8; patch (i, j) covers pixels [4·s·i, 4·s·i + 9·s) × [4·s·j, 4·s·j + 9·s).
        xi: ξ in [0, 1] of Eqs. 5b and 6b; used by 'lossattn' only.
        drop_rate: dropout on the patch features, before the classifier.
        drop_path_rate: stochastic depth in residual backbones.
        img_size: input height and width; only dynamic routing, whose weights belong to positions, depends on it.

    Raises:
        ValueError: an argument outside of what is listed above.
    """

    def __init__(
            self,
            backbone: Callable[..., Any],
            patch: str = 'conv',
            patch_args: Optional[dict[str, Any]] = None,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'lossattn',
            backbone_stride: int = 1,
            xi: float = 0.1,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            img_size: Union[int, tuple[int, int]] = 32,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if backbone_stride not in BACKBONE_STRIDES:
            raise ValueError(f'backbone_stride must be one of {BACKBONE_STRIDES}, got {backbone_stride!r}.')
        if not 0. <= xi <= 1.:
            raise ValueError(f'xi must lie in [0, 1], got {xi!r}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.classifier_pool = global_pool or _DEFAULT_POOL[patch]
        self.backbone_stride = backbone_stride
        self.xi = xi
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.backbone = backbone(in_chans, backbone_stride, drop_path_rate, **dd)
        self.feature_info = [
            dict(info, module=f'backbone.{info["module"]}') for info in self.backbone.feature_info]
        self.patch_layers = _PATCH_LAYERS[patch](
            self.backbone.num_features, backbone_stride=backbone_stride, **(patch_args or {}), **dd)
        self.patch_kind = patch
        self.patch_kernel: int = self.patch_layers.kernel
        self.patch_stride: int = self.patch_layers.stride
        self.capsules: int = self.patch_layers.capsules
        self.num_features: int = self.patch_layers.num_features
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = self.patch_grid(height, width)
        self.head = self._create_head(num_classes, global_pool, **dd)
        self.head_hidden_size: int = self.head.num_features
        self.init_weights()

    def _create_head(self, num_classes: int, global_pool: str, device=None, dtype=None) -> Any:
        kwargs: dict[str, Any] = dict(
            num_classes=num_classes, pool_type=global_pool, drop_rate=self.drop_rate, device=device, dtype=dtype)
        if not self.capsules:
            return ConvPatchHead(self.num_features, xi=self.xi, **kwargs)
        capsule_dim = self.num_features // self.capsules
        if self.patch_kind == 'primarycaps':
            return DynamicRoutingHead(self.capsules, capsule_dim, self.grid_size, **kwargs)
        return CapsuleLossAttentionHead(self.capsules, capsule_dim, xi=self.xi, **kwargs)

    def init_weights(self) -> None:
        """He initialisation of all convolutions; residual branches start at zero where the backbone has them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BasicBlock):
                module.zero_init_last()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Eq. 11's offsets are thresholds, not weights."""
        return {'patch_layers.length.offset'} if self.patch_kind == 'caps' else set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups: stem, backbone stages (coarse) or their layers, patch layers; the head is the rest."""
        return dict(
            stem=r'^backbone\.stem',
            blocks=[
                (r'^backbone\.stages\.(\d+)' if coarse else r'^backbone\.stages\.(\d+)\.(\d+)', None),
                (r'^patch_layers', (1000,)),  # after all stages, before the head
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's stages in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """θ; except for routing, ``θ(forward_head(x, pre_logits=True))`` is the image logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head, keeping device, dtype, train mode and the frozen state of everything else.

        Args:
            num_classes: new K; 0 removes the classifier.
            global_pool: new head, '' for no pooling; None keeps the present one (a classifier that comes back after
                '' gets the head that was there before).

        Raises:
            ValueError: this kind of patch features has no such global_pool.
        """
        if global_pool is None:
            global_pool = self.classifier_pool if num_classes > 0 and not self.global_pool else self.global_pool
        head = self._create_head(num_classes, global_pool, **get_device_dtype(self))  # first: it may refuse
        if global_pool == self.global_pool and list(self.head.attn.parameters()):
            head.attn = self.head.attn  # learned attention does not depend on the classes
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.classifier_pool = global_pool or self.classifier_pool
        self.head = head.train(self.training)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, list[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[list[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]:
        """Patch features and the feature maps of the backbone's stages.

        Args:
            x: (B, in_chans, H, W) images.
            indices: the last n stages if int, all if None, else those listed.
            norm: no effect, there is no final norm.
            stop_early: do not run what follows the last stage asked for.
            output_fmt: 'NCHW'.
            intermediates_only: return the feature maps only.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.backbone.stages), indices)
        last_idx = len(self.backbone.stages) - 1

        x = self.backbone.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice in TorchScript
            stages = self.backbone.stages
        else:
            stages = self.backbone.stages[:max_index + 1]
        feat_idx = 0
        for feat_idx, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if feat_idx == last_idx:
            x = self.patch_layers(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, list[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop what the given stages do not need; the patch layers go as a final norm would in other timm models.

        Args:
            indices: stages to keep, as in forward_intermediates.
            prune_norm: drop the patch layers even if the last stage is kept.
            prune_head: drop the head.
        """
        take_indices, max_index = feature_take_indices(len(self.backbone.stages), indices)
        prune_end = max_index < len(self.backbone.stages) - 1
        self.backbone.stages = self.backbone.stages[:max_index + 1]
        if prune_norm or prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
            self.backbone_stride = self.feature_info[max_index]['reduction']
            self.patch_layers = NoPatchLayers(self.num_features)  # a head now sees the feature map itself
            self.patch_kind, self.capsules, self.patch_kernel, self.patch_stride = 'none', 0, 1, 1
            self.classifier_pool = _DEFAULT_POOL[self.patch_kind]
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) images to patch features (B, num_features, H', W').

        Raises:
            ValueError: H or W is too small for one patch.
        """
        x = self.backbone.stem(x)
        for stage in self.backbone.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return self.patch_layers(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Patch features to image logits (B, K), or with pre_logits to the pooled features Σ_m α_m h_m."""
        if pre_logits or self.num_classes == 0:
            return self.head.pool(x)
        return self.head(x).logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) images to image logits (B, K), in train and eval mode."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.export
    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        """(B, in_chans, H, W) images to PatchPrediction(logits, patch_logits, alpha, contributions).

        Raises:
            ValueError: the model has no classifier (num_classes=0).
        """
        if self.num_classes == 0:
            raise ValueError('forward_patches needs a classifier, but the model has num_classes=0.')
        return self.head(self.forward_features(x))

    @torch.jit.ignore
    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') of the patch grid for an input of height × width pixels."""
        s = self.backbone_stride  # a padded 3×3 convolution of stride s maps n positions to ceil(n / s)
        rows, cols = ((-(-n // s) - self.patch_kernel) // self.patch_stride + 1 for n in (height, width))
        return rows, cols

    @torch.jit.ignore
    def patch_boxes(self, height: int, width: int) -> torch.Tensor:
        """Nominal pixels of each patch, (M, 4) as x0, y0, x1, y1 (exclusive), for an input of height × width pixels."""
        rows, cols = self.patch_grid(height, width)
        step, size = self.patch_stride * self.backbone_stride, self.patch_kernel * self.backbone_stride
        y, x = torch.meshgrid(torch.arange(rows) * step, torch.arange(cols) * step, indexing='ij')
        boxes = torch.stack((x, y, x + size, y + size), dim=-1).reshape(-1, 4)
        # feature maps are rounded up to whole positions, so the last patch may reach up to s − 1 pixels outside
        return boxes.minimum(torch.tensor([width, height, width, height]))


_VARIANT = re.compile(
    r'(?P<backbone>.+?)_(?P<head>lossattn|meanpool|attn|gatedattn|routing)_(?P<patch>conv|caps)'
    r'(?P<nano>_nano)?(?:_s(?P<stride>[248]))?')
_GLOBAL_POOL = {'meanpool': 'avg'}


def patch_model_args(variant: str) -> dict[str, Any]:
    """Constructor arguments that the name ``{backbone}_{head}_{conv|caps}[_nano][_s2|_s8]`` stands for.

    ``_nano`` has 1/8 of the widths: 64 patch channels; capsules keep their numbers and have 2 and 16 dimensions.
    """
    match = _VARIANT.fullmatch(variant)
    assert match is not None, variant
    head, patch = match['head'], match['patch']
    if head == 'routing':
        patch = 'primarycaps'
    patch_args: dict[str, Any] = {}
    if match['nano']:
        patch_args = dict(width=64) if patch == 'conv' else dict(primary=(32, 2), secondary=(64, 16))
    return dict(
        patch=patch,
        patch_args=patch_args,
        global_pool=_GLOBAL_POOL.get(head, head),
        backbone_stride=int(match['stride'] or 1),
    )


def create_patch_classifier(variant: str, pretrained: bool, num_stages: int, **kwargs: Any) -> PatchClassifier:
    """PatchClassifier, or its backbone with ``features_only=True``, through timm's model builder."""
    return build_model_with_cfg(
        PatchClassifier,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), feature_cls='getter'),
        **verified_overlay(variant, pretrained, kwargs),
    )


CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_LABELS = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
TINY_IMAGENET_MINI_LABELS = (
    'goldfish', 'king penguin', 'ladybug', 'monarch', 'gazelle', 'lifeboat', 'trolleybus', 'umbrella', 'orange',
    'banana')


def bundled_weights(name: str) -> str:
    """Path of weights that ship inside the package, for ``file`` in a default_cfg."""
    return str(Path(__file__).parent / 'weights' / f'{name}.safetensors')


def patch_model_cfg(size: int = 32, **kwargs: Any) -> dict[str, Any]:
    """default_cfg for images of size × size pixels: CIFAR-10 (32), Tiny ImageNet (64), ImageNet (224)."""
    num_classes, pool_size = {32: (10, (6, 6)), 64: (200, (6, 6)), 224: (1000, (5, 5))}[size]
    return {
        'num_classes': num_classes, 'input_size': (3, size, size), 'pool_size': pool_size,
        'crop_pct': 1.0 if size < 224 else 0.875, 'interpolation': 'bicubic', 'fixed_input_size': False,
        'mean': CIFAR_MEAN if size == 32 else IMAGENET_DEFAULT_MEAN,
        'std': CIFAR_STD if size == 32 else IMAGENET_DEFAULT_STD,
        'first_conv': 'backbone.stem.conv', 'classifier': 'head.fc', 'license': 'apache-2.0',
        'label_names': CIFAR10_LABELS if size == 32 else None,
        'paper_name': 'Loss-based Attention for Interpreting Image-level Prediction of Convolutional Neural Networks',
        **kwargs,
    }
