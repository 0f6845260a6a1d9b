"""Heads with random parameters, feature maps for them, and comparisons within a tolerance."""
import torch

from naive_heads import create_head
from timm_lossattn.attention import CapsuleLossAttentionHead

HEADS = {
    'lossattn': ('conv', 'lossattn'),
    'avg': ('conv', 'avg'),
    'attn': ('conv', 'attn'),
    'gatedattn': ('conv', 'gatedattn'),
    'caps': ('caps', 'lossattn'),
    'routing': ('primarycaps', 'routing'),
}
WIDTHS = {'conv': (0, 5), 'caps': (3, 12), 'primarycaps': (2, 6)}  # capsule channels, channels of the feature map
LOSS_ATTENTION = ('lossattn', 'caps')
XIS = (0., 0.1, 0.5, 1.)
SHAPES = [(1, (1, 1)), (1, (2, 3)), (3, (2, 2)), (2, (3, 1)), (2, (1, 4))]  # batch, patch grid


def make(name, batch=2, grid=(2, 3), num_classes=4, xi=0.1, drop_rate=0., dtype=torch.float64, seed=0):
    """A head with generic (normal) parameters and a random feature map for it."""
    kind, global_pool = HEADS[name]
    capsules, channels = WIDTHS[kind]
    torch.manual_seed(seed)
    head = create_head(
        kind, channels, num_classes, global_pool, capsules=capsules, grid_size=grid, xi=xi, drop_rate=drop_rate,
        dtype=torch.float64)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 1.)
    x = torch.randn(batch, channels, *grid, dtype=torch.float64)
    x = x * torch.randn(batch, 1, *grid, dtype=torch.float64).exp()  # strong and weak patches
    return head.to(dtype), x.to(dtype)


def shares(p):
    """Eq. 5a or 6a, summed over capsule channels: (B, M, K) or (B, C, M, K) logits to (B, M)."""
    norms = p.double().square().sum(-1).sqrt()
    norms = norms.sum(1) if norms.dim() == 3 else norms
    return norms / norms.sum(1, keepdim=True)


def patch_shares(head, x):
    """Eq. 5a or 6a of a loss-attention head, before the threshold."""
    if isinstance(head, CapsuleLossAttentionHead):
        return shares(head.fc(x.unflatten(1, (head.capsules, -1)).flatten(3).transpose(2, 3)))
    return shares(head.fc(x.flatten(2).transpose(1, 2)))


def assert_near(actual, expected, tolerance):
    """|actual − expected| <= tolerance · max(1, |expected|), element by element."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= tolerance
