"""Evidence: what each patch adds to a class's lead. Explanations and exported files take it from here."""
import torch

__all__ = ['contributions_to', 'evidence_against_rest']


def contributions_to(contributions: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Of contributions (B, M, K), those to one class for each image, (B,): (B, M)."""
    index = classes.view(-1, 1, 1).expand(-1, contributions.shape[1], 1)
    return contributions.gather(2, index).squeeze(2)


def evidence_against_rest(contributions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """c_mt − mean_{k≠t} c_mk of contributions (B, M, K) and the target t, (B,): (B, M).

    It sums to z_t − mean_{k≠t} z_k over the patches. A single class has no rest: c_mt.
    """
    evidence = contributions_to(contributions, target)
    others = contributions.shape[2] - 1
    return evidence - (contributions.sum(dim=2) - evidence) / others if others > 0 else evidence
