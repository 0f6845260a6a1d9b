"""A frozen backbone, and training of what stands behind it."""
from collections.abc import Callable
from typing import Any

from timm.utils import unwrap_model
from torch import nn

__all__ = ['freeze_backbone']


class FrozenTrain:
    """``model.train`` of a model whose backbone is frozen: that part of it stays in eval mode.

    Args:
        model: the model.
        frozen: names of the modules that stay in eval mode.
    """

    def __init__(self, model: nn.Module, frozen: list[str]) -> None:
        self.model, self.frozen = model, frozenset(frozen)

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.model).train(self.model, mode)
        for name, module in self.model.named_modules() if mode else ():  # reset_classifier may have taken some out
            if name in self.frozen:
                module.eval()
        return self.model


def classifiers(model: Any) -> list[nn.Module]:
    """What ``get_classifier`` returns, one or several, as far as it has parameters."""
    found = model.get_classifier()
    return [head for head in (found if isinstance(found, (tuple, list)) else [found])
            if isinstance(head, nn.Module) and list(head.parameters())]


def freeze_backbone(model: Any) -> list[str]:
    """Freeze all of a model but its classifier, what weighs its patches, and the patch layers of this package's models.

    The frozen parameters get no gradient. The frozen modules are in eval mode and stay so whatever ``train`` is called
    with, on the model or on what holds it: batch norms keep their statistics, drop path and dropout inside the backbone
    are off. Dropout between the last of them and the classifier is the classifier's and stays on.

    Args:
        model: of timm or of this package, with a classifier; or a wrapper of one, as torch.compile's.

    Returns:
        Names, in the model without wrapper, of the parameters that are left to train.

    Raises:
        ValueError: the model has no classifier with parameters.
    """
    model = unwrap_model(model)
    heads = classifiers(model)
    if not heads:
        raise ValueError(f'{type(model).__name__} has no classifier to train.')
    after = (getattr(model, name, None) for name in ('patch_layers', 'patch_weights'))
    heads += [module for module in after if isinstance(module, nn.Module)]
    trained = {id(parameter) for head in heads for parameter in head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    ends = {id(head) for head in heads}
    frozen: list[str] = []
    visit(model, '', ends, frozen.append)
    model.train = FrozenTrain(model, frozen)
    model.train(model.training)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def visit(module: nn.Module, prefix: str, heads: set[int], freeze: Callable[[str], None]) -> None:
    """Call freeze with the names of the largest modules without a head in them, but for dropout before one."""
    children = list(module.named_children())
    last = max((i for i, (_, child) in enumerate(children) if not has_head(child, heads) and list(child.parameters())),
               default=-1)
    for i, (name, child) in enumerate(children):
        if id(child) in heads or (isinstance(child, nn.Dropout) and i > last):
            continue
        if has_head(child, heads):
            visit(child, f'{prefix}{name}.', heads, freeze)
        else:
            freeze(f'{prefix}{name}')


def has_head(module: nn.Module, heads: set[int]) -> bool:
    """Whether one of them is in it."""
    return any(id(inner) in heads for inner in module.modules())
