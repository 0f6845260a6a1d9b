"""PatchClassifier: the one module that carries timm's model API for every backbone, patch layers and head."""
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from timm.layers import get_device_dtype
from torch import nn

from ..attention import PatchHead
from ..attention.weights import checked_xi
from ..prediction import PatchPrediction
from .backbone import init_convolutions
from .copies import shape_twin
from .patch_layers import ConvPatchLayers, NoPatchLayers

__all__ = ['BACKBONE_STRIDES', 'PatchClassifier']

BACKBONE_STRIDES = (1, 2, 4, 8)


class PatchClassifier(nn.Module):
    """Image classifier whose logits are the sum of patch contributions: backbone -> patch layers -> head.

    Args:
        backbone: called with (in_chans, backbone_stride, drop_path_rate, device, dtype), and with width_mult unless it
            is 1; gives what ``backbone.StagedBackbone`` describes, initialised.
        patch_layers: called with (channels of the backbone, backbone_stride, device, dtype), and with patch_stride,
            patch_padding and width_mult if those are given; see ``patch_layers``.
        head: a PatchHead class; by default the one that the patch layers name.
        num_classes: K; 0 for pooled features without a classifier (the plain mean over patches for 'lossattn').
        in_chans: image channels.
        global_pool: how the head weighs patches: 'lossattn', 'avg', 'attn', 'gatedattn' for convolutional features and
            plain classifiers, 'lossattn' for capsules, 'routing' for primary capsules; '' leaves the features unpooled.
            By default that of the patch layers, or of a head that is given.
        backbone_stride: s, one of 1, 2, 4, 8.
        patch_stride: t, of the patch convolution, 4 (default) or 2.
        patch_padding: q, zeros around the backbone's feature map, 0 (default) to 4. Patch (i, j) covers the pixels
            [s·(t·i − q), s·(t·i − q + 9)) × [s·(t·j − q), s·(t·j − q + 9)), as far as they lie in the image.
        width_mult: width multiplier of the backbone's channels and of the patch features.
        xi: ξ in [0, 1] of Eqs. 5b and 6b.
        drop_rate: dropout on the patch features, before the classifier.
        drop_path_rate: stochastic depth in residual backbones.
        img_size: input height and width; only dynamic routing, whose weights belong to positions, depends on it.

    Raises:
        TypeError: backbone is a module, not what makes one.
        ValueError: an argument outside of what is listed above.
    """

    def __init__(
            self,
            backbone: Callable[..., Any],
            patch_layers: Callable[..., Any] = ConvPatchLayers,
            head: Optional[type[PatchHead]] = None,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: Optional[str] = None,
            backbone_stride: int = 1,
            patch_stride: Optional[int] = None,
            patch_padding: Optional[int] = None,
            width_mult: float = 1.,
            xi: float = 0.1,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            img_size: Union[int, tuple[int, int]] = 32,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if isinstance(backbone, nn.Module):
            raise TypeError(
                f'backbone must be a callable that makes a backbone, got a {type(backbone).__name__} module. To put '
                'loss attention into a model that you have, call timm_lossattn.loss_attention(model).')
        if backbone_stride not in BACKBONE_STRIDES:
            raise ValueError(f'backbone_stride must be one of {BACKBONE_STRIDES}, got {backbone_stride!r}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.backbone_stride = backbone_stride
        self.drop_rate = drop_rate

        scaled = {} if width_mult == 1. else {'width_mult': width_mult}
        self.backbone = backbone(in_chans, backbone_stride, drop_path_rate, **scaled, **dd)
        self.feature_info = [
            dict(info, module=f'backbone.{info["module"]}') for info in self.backbone.feature_info]
        patches = {'patch_stride': patch_stride, 'patch_padding': patch_padding}
        given = {name: value for name, value in patches.items() if value is not None}
        if given and patch_layers is NoPatchLayers:
            raise ValueError(f'{" and ".join(given)}: a plain classifier has no patch convolution.')
        self.patch_layers = patch_layers(
            self.backbone.num_features, backbone_stride=backbone_stride, **given, **scaled, **dd)
        init_convolutions(self.patch_layers)
        self.num_features: int = self.patch_layers.num_features
        self._head_class = head or self.patch_layers.head
        if global_pool is None:
            global_pool = head.default_pool if head is not None else self.patch_layers.default_pool
        self.global_pool = global_pool
        self.classifier_pool = global_pool or self._head_class.default_pool
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self.head = self._create_head(num_classes, global_pool, xi, **dd)
        self.head_hidden_size: int = self.head.num_features

    def _create_head(self, num_classes: int, global_pool: str, xi: float, device=None, dtype=None) -> Any:
        grid = self.patch_grid(*self.img_size) if self._head_class.fixed_grid else (0, 0)
        return self._head_class.create(
            self.patch_layers, grid, num_classes=num_classes, pool_type=global_pool, xi=xi, drop_rate=self.drop_rate,
            device=device, dtype=dtype)

    __jit_unused_properties__ = ('patch_weights', 'xi', 'patch_stride', 'patch_padding')
    __jit_ignored_attributes__ = ('_grids',)

    @property
    def patch_weights(self) -> Any:
        """Patch weights, which say what the model's numbers mean: attention.PatchWeights."""
        return self.head.attn

    @property
    def xi(self) -> float:
        """ξ of Eqs. 5b and 6b; may be set, and ``timm.models.save_for_hf`` saves it."""
        return self.head.attn.xi

    @xi.setter
    def xi(self, xi: float) -> None:
        self.head.attn.xi = checked_xi(xi)
        self._model_args = {**getattr(self, '_model_args', {}), 'xi': self.xi}  # what timm saves of a model

    @property
    def patch_stride(self) -> int:
        """Positions of the backbone's feature map from patch to patch."""
        return self.patch_layers.stride

    @property
    def patch_padding(self) -> int:
        """Zeros around the backbone's feature map."""
        return self.patch_layers.padding

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the parts say of themselves: the thresholds of Eq. 11, for one."""
        return {f'{name}.{own}' for name, module in self.named_modules()
                if name and hasattr(module, 'no_weight_decay') for own in module.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups: those of the backbone, then the patch layers; the head is the rest."""
        def below(pattern: str) -> str:
            return r'^backbone\.' + pattern.removeprefix('^')

        groups = self.backbone.group_matcher(coarse)
        blocks = groups['blocks'] if isinstance(groups['blocks'], (list, tuple)) else [(groups['blocks'], None)]
        return dict(
            stem=below(groups['stem']),
            blocks=[*((below(pattern), order) for pattern, order in blocks),
                    (r'^patch_layers', (1000,))],  # after all stages, before the head
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's stages in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """θ; if it is affine, not for routing, ``θ(forward_head(x, pre_logits=True))`` is the image logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head, keeping device, dtype, train mode and the frozen state of everything else.

        Args:
            num_classes: new K; 0 removes the classifier.
            global_pool: new head, '' for no pooling; None keeps the present one (a classifier that comes back after
                '' gets the kind of head that was there before, learned attention new).

        Raises:
            ValueError: this kind of patch features has no such global_pool.
        """
        if global_pool is None:
            global_pool = self.classifier_pool if num_classes > 0 and not self.global_pool else self.global_pool
        head = self._create_head(num_classes, global_pool, self.xi, **get_device_dtype(self))  # first: it may refuse
        if global_pool == self.global_pool and list(self.head.attn.parameters()):
            head.attn = self.head.attn  # learned attention does not depend on the classes
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.classifier_pool = global_pool or self.classifier_pool
        self.head = head.train(self.training)
        self.head_hidden_size = self.head.num_features
        cfg: Any = getattr(self, 'pretrained_cfg', None)
        if cfg:  # the new classes have no names yet
            self.pretrained_cfg = self.default_cfg = {**cfg, 'label_names': ()}

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
        x, intermediates = self.backbone.forward_intermediates(x, indices, stop_early=stop_early)
        if intermediates_only:
            return intermediates
        if not stop_early or self.backbone.reaches_end(indices):
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
            prune_norm: drop the patch layers, if there are any, and with them the head, even if the last stage is kept.
            prune_head: drop the head.
        """
        prune_end = not self.backbone.reaches_end(indices)
        prune_norm = prune_norm and not isinstance(self.patch_layers, NoPatchLayers)
        take_indices = self.backbone.prune_intermediate_layers(indices)
        self.feature_info = self.feature_info[:max(take_indices) + 1]
        if prune_norm or prune_end:
            self.backbone_stride = self.feature_info[-1]['reduction']
            self.num_features = self.backbone.num_features
            self.patch_layers = NoPatchLayers(self.num_features)  # a head now sees the feature map itself
            self._head_class = NoPatchLayers.head
            self.classifier_pool = NoPatchLayers.default_pool
            self._grids = {}
        if prune_head or prune_norm or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) images to patch features (B, num_features, H', W').

        Raises:
            ValueError: H or W is too small for one patch.
        """
        return self.patch_layers(self.backbone(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Patch features to image logits (B, K), or with pre_logits to the pooled features Σ_m α_m h_m."""
        if pre_logits or self.num_classes == 0:
            return self.head.pool(x)
        return self.head(x)

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
        return self.head.forward_patches(self.forward_features(x))

    @torch.jit.ignore
    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') of the patch grid for an input of height × width pixels: the shape of the features.

        Raises:
            ValueError: height or width is too small for one patch.
        """
        if (height, width) not in self._grids:
            self._grids[height, width] = self._feature_size(height, width)
        return self._grids[height, width]

    def _feature_size(self, height: int, width: int) -> tuple[int, int]:
        twin = shape_twin(nn.Sequential(self.backbone, self.patch_layers))
        x = torch.empty(1, self.in_chans, height, width, device='meta', dtype=next(self.backbone.parameters()).dtype)
        with torch.no_grad():
            features = twin(x)
        return features.shape[-2], features.shape[-1]

    @torch.jit.ignore
    def patch_boxes(self, height: int, width: int) -> torch.Tensor:
        """Nominal pixels of each patch, (M, 4) as x0, y0, x1, y1 (exclusive), for an input of height × width pixels.

        Zeros that pad the feature map are no pixels: a patch that begins or ends among them is cut at the border.
        """
        rows, cols = self.patch_grid(height, width)
        step, size, before = (
            n * self.backbone_stride for n in (self.patch_stride, self.patch_layers.kernel, self.patch_padding))
        y, x = torch.meshgrid(
            *(torch.arange(n, device='cpu') * step - before for n in (rows, cols)), indexing='ij')
        boxes = torch.stack((x, y, x + size, y + size), dim=-1).reshape(-1, 4).clamp(min=0)
        # feature maps are rounded up to whole positions, so the last patch may reach up to s − 1 pixels outside
        return boxes.minimum(torch.tensor([width, height, width, height], device='cpu'))
