"""The heads as loops over Python floats, from the equations of DESIGN.md section 2: references for test_equations.py.

A feature map is a (C, H', W') tensor of one image; weights and results are nested lists.
"""
import math

from timm_lossattn.attention import CapsuleLossAttentionHead, ConvPatchHead
from timm_lossattn.attention.routing_head import DynamicRoutingHead


def linear(weight, bias, h):
    return [math.fsum(w * v for w, v in zip(row, h)) + b for row, b in zip(weight, bias)]


def norm(v):
    return math.sqrt(math.fsum(e * e for e in v))


def softmax(v):
    top = max(v)
    e = [math.exp(i - top) for i in v]
    return [i / math.fsum(e) for i in e]


def threshold(share, xi):
    """Eq. 5b on a list; uniform if nothing is left."""
    M = len(share)
    left = [max(a - xi / M, 0.) for a in share]
    total = math.fsum(left)
    return [a / total for a in left] if total > 0 else [1. / M] * M


def patches_of(x):
    """(C, H', W') to a list of M channel lists, row by row."""
    return [x[:, i, j].tolist() for i in range(x.shape[1]) for j in range(x.shape[2])]


def naive_conv(x, weight, bias, xi=None, weights=None):
    """Eq. 5 for one image; ``weights`` (of a list of h) replaces 5a, 5b. Returns p, α, contributions, z, θ(Σ α h)."""
    hs = patches_of(x)
    p = [linear(weight, bias, h) for h in hs]
    if weights is None:
        norms = [norm(v) for v in p]
        total = math.fsum(norms)
        alpha = threshold([n / total for n in norms], xi)
    else:
        alpha = weights(hs)
    K, M = len(bias), len(hs)
    contributions = [[alpha[m] * p[m][k] for k in range(K)] for m in range(M)]
    z = [math.fsum(contributions[m][k] for m in range(M)) for k in range(K)]
    pre = [math.fsum(alpha[m] * hs[m][c] for m in range(M)) for c in range(len(hs[0]))]
    return p, alpha, contributions, z, linear(weight, bias, pre)


def naive_capsules(x, capsules, weight, bias, xi):
    """Eq. 6 for one image. Returns Σ_c p_cm, α, contributions, z, θ(Σ a h)."""
    D, K = x.shape[0] // capsules, len(bias)
    hs = [patches_of(x[c * D:(c + 1) * D]) for c in range(capsules)]  # [c][m][d]
    M = len(hs[0])
    p = [[linear(weight, bias, hs[c][m]) for m in range(M)] for c in range(capsules)]
    total = math.fsum(norm(p[c][m]) for c in range(capsules) for m in range(M))
    a = [[norm(p[c][m]) / total for m in range(M)] for c in range(capsules)]
    alpha = threshold([math.fsum(a[c][m] for c in range(capsules)) for m in range(M)], xi)
    kept = [[a[c][m] if alpha[m] > 0 else 0. for m in range(M)] for c in range(capsules)]
    total = math.fsum(v for row in kept for v in row)
    a = [[v / total for v in row] for row in kept]
    patch_logits = [[math.fsum(p[c][m][k] for c in range(capsules)) for k in range(K)] for m in range(M)]
    contributions = [[math.fsum(a[c][m] * p[c][m][k] for c in range(capsules)) for k in range(K)] for m in range(M)]
    z = [math.fsum(a[c][m] * p[c][m][k] for c in range(capsules) for m in range(M)) for k in range(K)]
    pre = [math.fsum(a[c][m] * hs[c][m][d] for c in range(capsules) for m in range(M)) for d in range(D)]
    return patch_logits, alpha, contributions, z, linear(weight, bias, pre)


def naive_squash(s):
    n2 = math.fsum(e * e for e in s)
    return [n2 / (1 + n2) * e / math.sqrt(n2) for e in s]


def naive_routing(x, capsules, weight):
    """Sabour et al., Procedure 1, 3 iterations, one image; weight (N, K, O, D). Returns p, contributions, z."""
    D = x.shape[0] // capsules
    u = [naive_squash(h) for c in range(capsules) for h in patches_of(x[c * D:(c + 1) * D])]
    N, K, width = len(u), len(weight[0]), len(weight[0][0])
    M = N // capsules
    votes = [[linear(weight[i][k], [0.] * width, u[i]) for k in range(K)] for i in range(N)]
    b = [[0.] * K for _ in range(N)]
    for _ in range(3):
        c = [softmax(row) for row in b]
        s = [[math.fsum(c[i][k] * votes[i][k][o] for i in range(N)) for o in range(width)] for k in range(K)]
        v = [naive_squash(row) for row in s]
        b = [[b[i][k] + math.fsum(f * g for f, g in zip(votes[i][k], v[k])) for k in range(K)] for i in range(N)]
    p = [[math.fsum(c[i][k] * math.fsum(f * g for f, g in zip(votes[i][k], s[k])) / norm(s[k])
                    for i in range(m, N, M)) for k in range(K)] for m in range(M)]
    contributions = [[p[m][k] * norm(s[k]) / (1 + norm(s[k]) ** 2) for k in range(K)] for m in range(M)]
    return p, contributions, [norm(row) for row in v]


def create_head(kind, channels, num_classes, pool_type, capsules=0, grid_size=None, xi=0.1, drop_rate=0., dtype=None):
    """A head for one kind of patch features, 'conv', 'caps' or 'primarycaps'."""
    kwargs = dict(num_classes=num_classes, pool_type=pool_type, drop_rate=drop_rate, dtype=dtype)
    if kind == 'conv':
        return ConvPatchHead(channels, xi=xi, **kwargs)
    if kind == 'caps':
        return CapsuleLossAttentionHead(capsules, channels // capsules, xi=xi, **kwargs)
    return DynamicRoutingHead(capsules, channels // capsules, grid_size, **kwargs)
