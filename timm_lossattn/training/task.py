"""LossAttentionTask: the loss-attention loss as a timm TrainingTask."""
from fnmatch import fnmatch
from typing import Any, Optional

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator, TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..prediction import PatchPrediction
from .freeze import classifiers
from .loss import LossAttentionLoss, gamma_rampup

__all__ = ['LossAttentionTask', 'PatchTrainingModule']


class PatchTrainingModule(nn.Module):
    """Gives ``forward_patches`` a ``__call__``, which is what DistributedDataParallel and torch.compile wrap.

    Args:
        model: a patch model; checkpoints hold its state dict, not this module's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def no_weight_decay(self) -> set[str]:
        """The model's own, under this module's names."""
        own: set[str] = getattr(unwrap_model(self.model), 'no_weight_decay', set)()  # some models of timm have none
        names = {name.replace('_orig_mod.', ''): name for name, _ in self.named_parameters()}
        return {full for name, full in names.items() if any(fnmatch(name, f'model.{pattern}') for pattern in own)}

    def group_matcher(self, coarse: bool = False):
        """The model's own, under this module's names."""
        model = unwrap_model(self.model)
        layer_map = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True) \
            if hasattr(model, 'group_matcher') else auto_group_layers(model)  # as timm does
        return lambda name: layer_map[name.replace('_orig_mod.', '').removeprefix('model.')]

    def forward(self, x: torch.Tensor) -> PatchPrediction:
        """(B, C, H, W) images to PatchPrediction."""
        return self.model.forward_patches(x)


class LossAttentionTask(TrainingTask):
    """Training task for patch models: Eqs. 9 and 10 with the ramp-up of γ.

    Time τ is set by ``set_epoch`` (fractions allowed); until it is, γ is γ_max. With ``updates_per_epoch``, τ begins at
    0, and ``update_ema``, which timm's train.py calls after each update with or without an EMA, forwards its step.

    Args:
        model: model with ``forward_patches``.
        loss: LossAttentionLoss; by default for single-label targets.
        gamma_max: γ_max, the weight of the patch term after the ramp.
        rampup_epochs: length of the ramp in epochs.
        updates_per_epoch: optimizer updates in an epoch, to follow τ by update.
        device: device of the task.
        dtype: dtype of the task.
        verbose: log what the task does.
        threshold: of the probability, in evaluation with multi-label targets.

    Raises:
        TypeError: the model has no ``forward_patches``.
        ValueError: negative gamma_max or rampup_epochs, updates_per_epoch under 1, or threshold outside of (0, 1).

    Examples:
        >>> task = LossAttentionTask(model, rampup_epochs=0.4 * epochs)
        >>> task.set_epoch(3)                # γ ramps up; without it γ = γ_max
        >>> result = task(images, target)    # {'loss', 'output', 'image_loss', 'patch_loss', 'gamma'}
        >>> result['loss'].backward()
    """

    def __init__(
            self,
            model: nn.Module,
            loss: Optional[LossAttentionLoss] = None,
            gamma_max: float = 0.1,
            rampup_epochs: float = 80.,
            updates_per_epoch: Optional[int] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
            threshold: float = 0.5,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not hasattr(unwrap_model(model), 'forward_patches'):
            raise TypeError(f'model must have forward_patches, as patch models do; {type(model).__name__} has not.')
        gamma_rampup(0., gamma_max, rampup_epochs)  # checks the arguments
        if updates_per_epoch is not None and updates_per_epoch < 1:
            raise ValueError(f'updates_per_epoch must be at least 1, got {updates_per_epoch}.')
        if not 0. < threshold < 1.:
            raise ValueError(f'threshold must lie between 0 and 1, got {threshold}.')
        self.trainable_module: Any = PatchTrainingModule(model)
        self.loss = (loss if loss is not None else LossAttentionLoss()).to(self.device)
        self.threshold = threshold
        self.gamma_max = gamma_max
        self.rampup_epochs = rampup_epochs
        self.updates_per_epoch = updates_per_epoch
        self.epoch: Optional[float] = None if updates_per_epoch is None else 0.

    @property
    def gamma(self) -> float:
        """γ(τ) at the present time, γ_max if none was set."""
        return self.gamma_max if self.epoch is None else gamma_rampup(self.epoch, self.gamma_max, self.rampup_epochs)

    def set_epoch(self, epoch: float) -> None:
        """Set τ, in epochs."""
        self.epoch = float(epoch)

    def update_ema(self, step: Optional[int] = None) -> None:
        """Update the EMA, if there is one; with ``updates_per_epoch``, ``set_epoch`` to where ``step`` updates lead."""
        super().update_ema(step=step)
        if self.updates_per_epoch is not None and step is not None:
            self.set_epoch(step / self.updates_per_epoch)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'LossAttentionTask':
        """Wrap the trainable module in DistributedDataParallel."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # timm's signature
            self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> Any:
        """Compile the training forward (all patch outputs) and the evaluation forward (plain logits)."""
        self.eval_model = torch.compile(self.trainable_module.model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Any:
        """The bare model behind the wrappers, so that checkpoints are those of the model."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(resolved) if resolved is not None else None
        return inner.model if isinstance(inner, PatchTrainingModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters to clip; with exclude_head, as adaptive gradient clipping wants it, without the classifier."""
        model = self.get_eval_model()
        if not exclude_head or not hasattr(model, 'get_classifier'):
            return list(model.parameters())
        left_out = {id(p) for head in classifiers(model) for p in head.parameters()}
        return [p for p in model.parameters() if id(p) not in left_out]

    def create_evaluator(self, **kwargs: Any) -> Any:
        """timm's evaluator for single-label or, if the loss is, for multi-label targets."""
        if self.loss.multi_label:
            return MultiLabelClassificationEvaluator(device=self.device, **{'threshold': self.threshold, **kwargs})
        return ClassificationEvaluator(device=self.device, **kwargs)

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> dict[str, Any]:
        """τ, for checkpoints."""
        return {} if ema else {'epoch': self.epoch}

    def load_task_state(
            self, state: Optional[dict[str, Any]], strict: bool = True, module: Optional[nn.Module] = None,
            ema: bool = False) -> None:
        """Restore τ."""
        if state and not ema and state['epoch'] is not None:
            self.set_epoch(state['epoch'])

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Loss of a batch.

        Args:
            input: (B, C, H, W) images.
            target: (B,) class indices or (B, K) probabilities.

        Returns:
            'loss' (for backward), 'output' (B, K) logits, 'image_loss', 'patch_loss' (before γ), and 'gamma'.
        """
        prediction = self.trainable_module(input)
        gamma = self.gamma
        loss, image_loss, patch_loss = self.loss(prediction, target, gamma)
        return {
            'loss': loss,
            'output': prediction.logits,
            'image_loss': image_loss.detach(),
            'patch_loss': patch_loss.detach(),
            'gamma': gamma,
        }
