"""How patches are weighed: patch weights, and the heads that turn patch features into a PatchPrediction."""
from .capsule_head import CapsuleLossAttentionHead
from .conv_head import ConvPatchHead
from .head import PatchHead
from .routing_head import DynamicRoutingHead
from .weights import (
    AttentionWeights,
    GatedAttentionWeights,
    LossAttentionWeights,
    MeanWeights,
    PatchWeights,
    list_weights,
    register_weights,
)

__all__ = [
    'AttentionWeights', 'CapsuleLossAttentionHead', 'ConvPatchHead', 'DynamicRoutingHead', 'GatedAttentionWeights',
    'LossAttentionWeights', 'MeanWeights', 'PatchHead', 'PatchWeights', 'list_weights', 'register_weights',
]
