"""A patch model with known answers, made by hand."""
import torch
from torch import nn

from timm_lossattn import PatchPrediction
from timm_lossattn.attention import LossAttentionWeights

GRID, PATCH, STEP = (3, 4), 9, 4  # rows, columns of the fake model


class FakePatchModel(nn.Module):
    """Answers with given contributions and alpha, whatever the images; 3×4 patches of 9×9 pixels, 4 apart."""

    def __init__(self, contributions, alpha, weights=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.contributions, self.alpha = contributions, alpha
        self.patch_weights = weights or LossAttentionWeights()

    def forward_patches(self, x):
        patch_logits = self.contributions / self.alpha.clamp(min=1e-9).unsqueeze(-1)
        return PatchPrediction(
            self.contributions.sum(1) * self.scale, patch_logits, self.alpha, self.contributions * self.scale)

    def patch_grid(self, height, width):
        return GRID

    def patch_boxes(self, height, width):
        corners = [(STEP * j, STEP * i) for i in range(GRID[0]) for j in range(GRID[1])]
        return torch.tensor([(x, y, x + PATCH, y + PATCH) for x, y in corners])


SIZE = (STEP * (GRID[0] - 1) + PATCH + 2, STEP * (GRID[1] - 1) + PATCH + 1)  # 19 × 22: margins of 2 rows, 1 column


def planted():
    """Image 0: patch 6, row 1, column 2, gives 3 for class 2; image 1: patch 0 gives 1 for class 0; all else is 0."""
    contributions, alpha = torch.zeros(2, 12, 5), torch.zeros(2, 12)
    contributions[0, 6, 2], contributions[0, 6, 4], contributions[1, 0, 0] = 3., -2., 1.
    alpha[0, 6] = alpha[1, 0] = 1.
    return FakePatchModel(contributions, alpha).eval()
