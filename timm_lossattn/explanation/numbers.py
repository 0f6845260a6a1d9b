"""The numbers of an explanation as plain data: the JSON beside each picture, whose fields docs/explain.md has."""
from typing import Any

import torch

__all__ = ['numbers_of']


def numbers_of(explanation: Any, index: int, all_classes: bool) -> dict[str, Any]:
    """See ``Explanation.to_dict``, which imports this file."""
    source, labels, prediction = explanation.source(index), explanation.labels, explanation.prediction
    target = int(explanation.target[index])
    rivals = (-explanation.direction[index]).topk(min(5, len(labels)))
    compared = len(labels) > 1 and explanation.against is not None
    other: Any = explanation.why_not() if compared else None  # against one class
    contributions = prediction.contributions[index].view(*explanation.grid, -1)
    if all_classes:
        shares: Any = contributions.tolist()
    else:
        shares = {'target': contributions[..., target].tolist()}
        if isinstance(explanation.against, torch.Tensor):
            shares['against'] = contributions[..., int(explanation.against[index])].tolist()
    return {
        'image_size': list(source.image.size),
        'input_size': list(explanation.input_size[::-1]),
        'labels': labels,
        'data': explanation.data,
        'held': explanation.held or None,
        'logits': prediction.logits[index].tolist(),
        'top5': [
            {'class': k, 'label': labels[k], 'probability': float(explanation.probabilities[index, k]),
             'logit': float(prediction.logits[index, k])} for k in explanation.ranked(5, index).tolist()],
        'target': {'class': target, 'label': labels[target]},
        'against': explanation.against if explanation.against is None or isinstance(explanation.against, str) else {
            'class': int(explanation.against[index]), 'label': labels[int(explanation.against[index])]},
        'true_class': None if explanation.true_class is None else {
            'class': int(explanation.true_class[index]), 'label': labels[int(explanation.true_class[index])]},
        'rivals': [
            {'class': k, 'label': labels[k], 'weight': w}
            for w, k in zip(*(t.tolist() for t in rivals)) if w > 0],
        'evidence': explanation.evidence[index].view(explanation.grid).tolist(),
        'why_not': None if other is None else {
            'class': int(other.against[index]), 'label': labels[int(other.against[index])],
            'evidence': other.evidence[index].view(explanation.grid).tolist()},
        'patch_grid': list(explanation.grid),
        'alpha': prediction.alpha[index].view(explanation.grid).tolist(),
        'contributions': shares,
        'selected': explanation.selected[index].view(explanation.grid).tolist(),
        'patch_boxes': source.to_image(explanation.patch_boxes).view(*explanation.grid, 4).tolist(),
        'box': source.to_image(explanation.boxes[index]).tolist(),
    }
