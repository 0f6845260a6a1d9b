"""The tools that are compared. All are asked about the same number, v·z of the logits z, and answer with a heat map.

Maps of patches are placed by the model's own patch boxes, whoever made them: ours, α, and those of the grad-cam
package, which here gives its map at the size of the features and with its sign, before ReLU and resizing. Maps of
pixels stand as they are, and once more as the mean over each patch.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timm_lossattn.explanation import explain
from timm_lossattn.explanation.evidence import evidence_along, leave_one_out
from timm_lossattn.explanation.geometry import patch_scores, patches_to_pixels
from timm_lossattn.models.probe import split_patches

from .extras import need

try:
    from captum.attr import InputXGradient, IntegratedGradients
    from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM
except ImportError:
    need('train,compare', 'captum', 'pytorch_grad_cam')
    raise

__all__ = ['OURS', 'Answer', 'Question', 'create_tools', 'pooled']

OURS = 'ours'


@dataclass(frozen=True)
class Question:
    """What a tool is asked: which part of each image made v·z as large as it is?

    Attributes:
        x: (B, C, H, W) normalised images; or (1, C, H, W), one for all B.
        target: (B,) classes.
        v: (B, K) direction in the space of the logits, see explanation/evidence.py.
        index: (B,) numbers of the images in their set.
    """
    x: torch.Tensor
    target: torch.Tensor
    v: torch.Tensor
    index: list[int]

    @property
    def images(self) -> torch.Tensor:
        """(B, C, H, W), for tools that answer for each image anew."""
        return self.x.expand(len(self.v), -1, -1, -1)


@dataclass(frozen=True)
class Answer:
    """What a tool says.

    Attributes:
        heat: (B, H, W) in pixels; NaN where it says nothing.
        scores: (B, M) of patches, or None for a tool of pixels.
        parts: (B, ...) what should add up to ``total``, or None for a tool that does not say.
        total: gives these (B,) sums; a function, because a tool that does not know them is not timed with them.
    """
    heat: torch.Tensor
    scores: torch.Tensor | None
    parts: torch.Tensor | None = None
    total: Callable[[], torch.Tensor] | None = None


Tool = Callable[[Question], Answer]


class FeatureMap(nn.Module):
    """The part of a timm model that gives the features, as a module of its own, which the grad-cam package hooks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


class FeaturesThenHead(nn.Module):
    """A timm model in two parts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.features = FeatureMap(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features.model.forward_head(self.features(x))


class Along:
    """For the grad-cam package: v·z of one image."""

    def __init__(self, v: torch.Tensor) -> None:
        self.v = v

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return (output * self.v).sum()


def raw_cam(method: Any, model: Any, question: Question) -> torch.Tensor:
    """(B, M) map of a method of the grad-cam package at the features, before it is rectified, scaled and resized."""
    class Raw(method):
        raw: Any = None

        def get_cam_image(self, *args: Any, **kwargs: Any) -> Any:
            self.raw = super().get_cam_image(*args, **kwargs)
            return self.raw

    grid = model.patch_grid(*question.x.shape[-2:])
    layout, prefix = getattr(model, 'patch_layout', 'NCHW'), getattr(model, 'patch_prefix', 0)

    def as_map(features: torch.Tensor) -> torch.Tensor:
        return split_patches(features, layout, prefix).transpose(1, 2).unflatten(2, grid)

    split = FeaturesThenHead(model)
    with Raw(split, target_layers=[split.features], reshape_transform=as_map) as cam:  # its hooks go with it
        cam(input_tensor=question.images, targets=[Along(v) for v in question.v])
    return torch.as_tensor(cam.raw).float().flatten(1)


def create_tools(model: Any, against: str | None, ig_steps: int, left_out: bool = False) -> dict[str, Tool]:
    """Name -> tool, ours first.

    Args:
        model: patch model.
        against: what ``explain`` compares the target with: the same that v says.
        ig_steps: of integrated gradients; 0: without.
        left_out: also what v·z loses without a patch, ``Explanation.leave_one_out``.
    """
    def place(scores: torch.Tensor, question: Question) -> torch.Tensor:
        H, W = question.x.shape[-2:]
        return patches_to_pixels(scores, model.patch_boxes(H, W), (H, W))

    def explained(question: Question, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (model(x).float() * question.v).sum(dim=1)

    def ours(question: Question) -> Answer:
        e = explain(model, question.x, question.target[:len(question.x)], against)  # type: ignore[arg-type]
        shared = len(question.v) > len(question.x)  # one pass answers for every class
        evidence = evidence_along(
            e.prediction.contributions.expand(len(question.v), -1, -1), question.v) if shared else e.evidence
        return Answer(place(evidence, question), evidence, evidence, lambda: explained(question, question.x))

    def ours_left_out(question: Question) -> Answer:
        with torch.no_grad():
            out = model.forward_patches(question.x)
        n = len(question.v)
        scores = leave_one_out(evidence_along(out.contributions.expand(n, -1, -1), question.v), out.alpha.expand(n, -1))
        return Answer(place(scores, question), scores)

    def alpha(question: Question) -> Answer:
        with torch.no_grad():
            scores = model.forward_patches(question.x).alpha.float().expand(len(question.v), -1)
        return Answer(place(scores, question), scores)

    def cam(method: Any) -> Tool:
        def tool(question: Question) -> Answer:
            scores = raw_cam(method, model, question)
            return Answer(place(scores, question), scores, scores, lambda: explained(question, question.x))
        return tool

    def along(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (model(x) * v).sum(dim=1)

    def integrated_gradients(question: Question) -> Answer:
        parts = IntegratedGradients(along).attribute(
            question.images, additional_forward_args=question.v, n_steps=ig_steps,
            internal_batch_size=len(question.v)).detach()
        return Answer(parts.sum(dim=1), None, parts, lambda: (
            explained(question, question.x) - explained(question, torch.zeros_like(question.x))))

    def input_x_gradient(question: Question) -> Answer:
        parts = InputXGradient(along).attribute(
            question.images.clone().requires_grad_(), additional_forward_args=question.v).detach()
        return Answer(parts.sum(dim=1), None, parts, lambda: explained(question, question.x))

    def random(question: Question) -> Answer:
        M = len(model.patch_boxes(*question.x.shape[-2:]))
        scores = torch.stack([torch.rand(M, generator=torch.Generator().manual_seed(i)) for i in question.index])
        return Answer(place(scores, question), scores)

    def centre(question: Question) -> Answer:
        H, W = question.x.shape[-2:]
        boxes = model.patch_boxes(H, W).float()
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2. - torch.tensor([W, H]) / 2.
        distance = middle.norm(dim=1)
        scores = (distance.max() - distance).expand(len(question.v), -1)
        return Answer(place(scores, question), scores)

    tools: dict[str, Tool] = {OURS: ours}
    if left_out:
        tools[f'{OURS}, left out'] = ours_left_out
    tools |= {
        'α alone': alpha, 'Grad-CAM': cam(GradCAM), 'HiResCAM': cam(HiResCAM), 'LayerCAM': cam(LayerCAM)}
    if ig_steps:
        tools[f'integrated gradients ({ig_steps} steps)'] = integrated_gradients
    return tools | {'input × gradient': input_x_gradient, 'random': random, 'centre': centre}


def pooled(answer: Answer, patch_boxes: torch.Tensor) -> Answer:
    """A map of pixels as its mean over each patch, placed like any other map of patches."""
    scores = patch_scores(answer.heat, patch_boxes)
    H, W = answer.heat.shape[-2:]
    return Answer(patches_to_pixels(scores, patch_boxes, (H, W)), scores)
