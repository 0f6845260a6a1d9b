"""check_model: is loss attention exact in a timm model? Measured, with random weights if need be."""
import time
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch

from ..loading import MODULES, backbone_name, check_name
from ..models import loss_attention

__all__ = ['Check', 'check_model', 'smallest_models']

OURS = (*MODULES, 'lossattn')


@dataclass(frozen=True)
class Check:
    """What was found out about one model.

    Attributes:
        name: of the model.
        family: timm's module.
        parameters_million: of the model.
        kind: A, B or C, see models/any_timm.py; D if it is refused.
        reason: why it is refused, or what went wrong.
        layout: of its features: NCHW, NHWC or NLC.
        grid: 'rows×columns' of patches at the model's input size.
        additive_error: largest |Σ_m contributions − logits| with loss attention, over the largest |logit|.
        stock_error: largest difference between the logits with pool='avg' and the stock model's, likewise.
        strict: the state dict is the stock model's, key for key, both ways.
        seconds: that the check took.
    """
    name: str
    family: str
    parameters_million: float
    kind: str = 'D'
    reason: str = ''
    layout: str = ''
    grid: str = ''
    additive_error: float | None = None
    stock_error: float | None = None
    strict: bool | None = None
    seconds: float = 0.

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def smallest_models(limit_million: float = 100.) -> dict[str, str]:
    """timm's module -> its smallest model, of all modules that have one under the limit of parameters."""
    found: dict[str, tuple[float, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module) if module not in OURS else ():
            try:
                model = timm.create_model(name, device='meta')
            except Exception:  # a model that does not build without numbers is not the smallest of its module
                continue
            size = sum(p.numel() for p in model.parameters()) / 1e6
            if size <= limit_million and size < found.get(module, (limit_million + 1., ''))[0]:
                found[module] = size, name
    return {module: name for module, (_, name) in sorted(found.items())}


@torch.inference_mode()
def check_model(name: str, pretrained: bool = False, **kwargs: Any) -> Check:
    """Put loss attention into a model and measure whether it is exact, on two random images of its input size.

    Args:
        name: timm model, with or without ``lossattn.`` before it.
        pretrained: with its weights; else random ones.
        kwargs: arguments of the model, ``global_pool='avg'`` for one.

    Raises:
        ValueError: timm has no such model, or it is one of this package's.
    """
    start = time.perf_counter()
    check_name(name)
    name = backbone_name(name)
    torch.manual_seed(0)
    stock: Any = timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    if not stock.num_classes:  # published as a feature extractor
        stock.reset_classifier(1000)
    about: dict[str, Any] = dict(
        name=name, family=type(stock).__module__.rsplit('.', 1)[-1],
        parameters_million=sum(p.numel() for p in stock.parameters()) / 1e6)
    if not pretrained:  # many heads start at zero, and zeros add up to zero whatever is done with them
        classifiers = stock.get_classifier()  # distilled models have two
        for classifier in classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,):
            for parameter in classifier.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    if hasattr(stock, 'forward_patches'):
        raise ValueError(f'model: {name} is a patch model already, exact by its own head; check is for other models.')
    try:
        model, average = loss_attention(stock), loss_attention(stock, pool='avg')
        channels, height, width = timm.data.resolve_model_data_config(stock)['input_size']
        x = torch.randn(2, channels, height, width)
        expected = stock(x)
        scale = float(expected.abs().max()) or 1.
        out = model.forward_patches(x)
        rows, columns = model.patch_grid(height, width)
        stock.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(stock.state_dict(), strict=True)
        return Check(
            **about, kind=model.patch_kind, layout=model.patch_layout, grid=f'{rows}×{columns}',
            additive_error=float((out.contributions.sum(1) - model(x)).abs().max() / out.logits.abs().max()),
            stock_error=float((average(x) - expected).abs().max() / scale),
            strict=list(model.state_dict()) == list(stock.state_dict()), seconds=time.perf_counter() - start)
    except (TypeError, ValueError) as error:
        return Check(**about, reason=' '.join(str(error).split()), seconds=time.perf_counter() - start)
