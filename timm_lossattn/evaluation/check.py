"""check_model: is loss attention exact in a timm model? Measured, with random weights if need be."""
import time
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch

from ..hub_access import create_model
from ..loading import MODULES, backbone_name, check_name, list_patch_models
from ..models import loss_attention
from ..models.any_timm import stock_view
from ..models.lite_weights import lite_overlay
from ..models.lossattn import TRAINED, refuse_early
from ..models.probe import NoPatchSum, input_size
from ..text import one_line
from ..training.freeze import classifiers
from .receptive_field import influence, middle_patch, share_in_box, side_for, square_shares

__all__ = ['Check', 'check_model', 'million_parameters']

OURS = (*MODULES, 'lossattn')


@dataclass(frozen=True)
class Check:
    """What was found out about one model.

    Attributes:
        name: of the model.
        family: timm's module.
        parameters_million: of the model.
        kind: A, B or C, see models/any_timm.py; D if it is refused; 'error' if the model's own code, or the download of
            its weights, failed, which says nothing about it; 'large' if ``check_all`` left it out.
        reason: why it is refused, or what went wrong.
        why: the same in a few words; of an error its type.
        layout: of its features: NCHW, NHWC or NLC.
        grid: 'rows×columns' of patches at the model's input size.
        additive_error: largest |Σ_m contributions − logits| with loss attention, over the largest |logit|.
        stock_error: largest difference between the logits with pool='avg' and the stock model's, likewise.
        strict: the state dict is the stock model's, key for key, both ways.
        own_share: share of the influence on the middle patch's logit that comes from inside its own box, see
            ``receptive_field.influence``; of one random image.
        side_half: side in pixels of the smallest square around that patch that holds half of it.
        side_90: of the one that holds 90 %.
        seconds: that the check took.
        with_avg: what ``check_all`` found with ``global_pool='avg'``, of a model that is refused as it stands.
    """
    name: str
    family: str = ''
    parameters_million: float | None = None
    kind: str = 'error'
    reason: str = ''
    why: str = ''
    layout: str = ''
    grid: str = ''
    additive_error: float | None = None
    stock_error: float | None = None
    strict: bool | None = None
    own_share: float | None = None
    side_half: int | None = None
    side_90: int | None = None
    seconds: float = 0.
    with_avg: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def million_parameters(name: str) -> float:
    """Parameters of a timm model, which is built without numbers."""
    return sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) / 1e6


@torch.no_grad()
def check_model(name: str, pretrained: bool = False, receptive_field: bool = True, **kwargs: Any) -> Check:
    """Put loss attention into a model and measure whether it is exact, on two random images of its input size.

    What the model's own code raises, or the download of its weights, is reported as kind 'error'.

    Args:
        name: timm model, with or without ``lossattn.`` before it.
        pretrained: with its weights, which are not downloaded for a model that is refused; else random ones.
        receptive_field: measure it too, which takes a backward pass.
        kwargs: arguments of the model, ``global_pool='avg'`` for one.

    Raises:
        ValueError: timm has no such model, or it is one of this package's.
    """
    start = time.perf_counter()
    check_name(name)
    name = backbone_name(name)
    if name.split('.')[0] in list_patch_models():
        raise ValueError(f'model: {name} is a patch model already, exact by its own head; check is for other models.')
    about: dict[str, Any] = dict(name=name)
    if pretrained:
        try:
            refuse_early(name, kwargs)
        except NoPatchSum:
            pretrained = False  # weights would not change it, so none are downloaded
    try:
        with torch.random.fork_rng(devices=[]):  # with devices each GPU would be started
            torch.default_generator.manual_seed(0)
            stock = create_stock(name, pretrained, kwargs)
            about |= dict(family=type(stock).__module__.rsplit('.', 1)[-1],
                          parameters_million=sum(p.numel() for p in stock.parameters()) / 1e6)
            measured = measure(stock, receptive_field)
    except NoPatchSum as error:
        measured = dict(kind='D', reason=' '.join(str(error).split()), why=error.why)
    except Exception as error:  # whatever a model's code, or a download, raises
        measured = dict(kind='error', reason=f'{type(error).__name__}: {one_line(error)}', why=type(error).__name__)
    return Check(**about, **measured, seconds=time.perf_counter() - start)


def create_stock(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    """The stock model in eval mode; without pretrained weights with a classifier that says something."""
    if name in TRAINED:
        stock = stock_view(create_model(f'lossattn.{name}', pretrained, **kwargs)).eval()
    else:
        overlay = lite_overlay(name) if pretrained else None
        stock = create_model(name, pretrained, pretrained_cfg_overlay=overlay, **kwargs).eval()
    if not stock.num_classes:  # published as a feature extractor
        stock.reset_classifier(1000)
    if not pretrained:  # many heads start at zero, and zeros add up to zero whatever is done with them
        for classifier in classifiers(stock):
            for parameter in classifier.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    return stock


def measure(stock: Any, receptive_field: bool) -> dict[str, Any]:
    """What Check says of an exact model.

    Raises:
        NoPatchSum: it is not exact.
    """
    model, average = loss_attention(stock), loss_attention(stock, pool='avg')
    channels, height, width = input_size(stock)
    x = torch.randn(2, channels, height, width)
    expected = stock(x)
    scale = float(expected.abs().max()) or 1.
    out = model.forward_patches(x)
    rows, columns = model.patch_grid(height, width)
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    found: dict[str, Any] = dict(
        kind=model.patch_kind, layout=model.patch_layout, grid=f'{rows}×{columns}',
        additive_error=float((out.contributions.sum(1) - model(x)).abs().max() / out.logits.abs().max()),
        stock_error=float((average(x) - expected).abs().max() / scale),
        strict=list(model.state_dict()) == list(stock.state_dict()))
    if receptive_field:
        patch, box = middle_patch(model, height, width)
        seen = influence(model, x[:1], patch)[0].double()
        shares = square_shares(seen, box)
        found |= dict(own_share=share_in_box(seen, box), side_half=side_for(shares, 0.5), side_90=side_for(shares, 0.9))
    return found
