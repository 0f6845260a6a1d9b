"""Judge: asks every tool the same questions and measures what they answer, image by image and grid by grid."""
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from timm_lossattn.explanation.evidence import direction
from timm_lossattn.explanation.geometry import patches_to_pixels, spread_over_neighbours

from .explainers import Answer, Question, Tool, pooled
from .extras import need

try:
    from timm_lossattn.evaluation.constant_boxes import square_hits, whole_hits
    from timm_lossattn.evaluation.faithfulness import Blank, Completeness, Deletion, Insertion, SingleDeletion
    from timm_lossattn.evaluation.localization import MaxBoxAccV2
    from timm_lossattn.evaluation.pointing import EnergyPointing, GridPointing, PointingGame, make_grids

    from .image_records import SPREAD, hits_to_text
except ImportError:
    need('train,compare', 'torchmetrics', 'scipy')
    raise

__all__ = ['Judge', 'Settings', 'grid_entries']

Rows = dict[str, dict[str, Any]]  # row of the table -> measure -> value of one image


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        removal: deletion and insertion of 'patches', of 'pixels', of both, or of neither.
        blanks: for these, 'mean' and 'blur'.
        steps: of each.
        single: also blank one cell at a time.
        multi_label: probabilities are sigmoids.
        spread: also judge every map of patches after ``spread_over_neighbours`` with this σ; 0: not.
    """
    removal: Sequence[str]
    blanks: Sequence[Blank]
    steps: int
    single: bool
    multi_label: bool
    spread: float = 0.


class Judge:
    """Measures of every tool for batches of images.

    Args:
        model: patch model.
        tools: by name.
        settings: what is measured.
    """

    def __init__(self, model: Any, tools: dict[str, Tool], settings: Settings) -> None:
        self.model, self.tools, self.settings = model, tools, settings
        self.single = SingleDeletion()

    @torch.no_grad()
    def patch_logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """(B, M, K), if maps are to be spread."""
        return self.model.forward_patches(x).patch_logits if self.settings.spread else None

    def images(
            self, question: Question, boxes: Sequence[torch.Tensor], reverse: bool = False, timed: bool = True,
    ) -> list[Rows]:
        """One entry for each image of the question.

        Args:
            question: what the tools are asked.
            boxes: true boxes, B tensors (L, 4); L may be 0.
            reverse: ask the tools in the other order, so that none always comes first.
            timed: keep the times.
        """
        B, (H, W) = len(question.index), question.x.shape[-2:]
        patch_boxes = self.model.patch_boxes(H, W)
        drops = self.single.drops(self.model, question.x, question.v) if self.settings.single else None
        answers, seconds, patch_logits = {}, {}, self.patch_logits(question.x)
        for name, tool in list(self.tools.items())[::-1 if reverse else 1]:
            start = time.perf_counter()
            answers[name] = tool(question)
            seconds[name] = time.perf_counter() - start
        rows: list[Rows] = [{} for _ in range(B)]
        for name in self.tools:
            answer = answers[name]
            found = self.measures(question, answer, boxes, patch_boxes, drops)
            if timed:
                found['ms'] = [1000 * seconds[name] / B] * B
            forms = {name: found}
            for form, other in self.other_forms(name, answer, patch_boxes, patch_logits):
                forms[form] = self.measures(question, other, boxes, patch_boxes, drops)
            for form, values in forms.items():
                for i in range(B):
                    rows[i][form] = {measure: column[i] for measure, column in values.items()}
        given = [i for i, truth in enumerate(boxes) if len(truth)]
        if given:
            low, high = patch_boxes[:, :2].amin(0), patch_boxes[:, 2:].amax(0)
            true = [boxes[i] for i in given]
            constant = {
                'box: whole image': whole_hits(torch.tensor([0, 0, W, H]), true),
                'box: all patches': whole_hits(torch.cat([low, high]), true),
                'box: best centred square': square_hits((H, W), true)}
            for form, hits in constant.items():
                for i, hit in zip(given, hits):
                    rows[i][form] = {'boxes': hits_to_text(hit)}
        return rows

    def other_forms(
            self, name: str, answer: Answer, patch_boxes: torch.Tensor, patch_logits: torch.Tensor | None,
    ) -> list[tuple[str, Answer]]:
        """The answer of a tool of pixels by patch, and if asked for, the answers by patch spread over neighbours."""
        forms = []
        if answer.scores is None:
            name, answer = f'{name}, by patch', pooled(answer, patch_boxes)
            forms.append((name, answer))
        if patch_logits is not None and answer.scores is not None:
            H, W = answer.heat.shape[-2:]
            scores = spread_over_neighbours(
                answer.scores, patch_logits, self.model.patch_grid(H, W), self.settings.spread,
                self.settings.multi_label or patch_logits.shape[2] == 1)
            heat = patches_to_pixels(scores, patch_boxes, (H, W))
            parts = scores if answer.parts is not None and answer.parts.shape == scores.shape else None
            forms.append((name + SPREAD, Answer(heat, scores, parts, answer.total)))
        return forms

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) images to (N, K)."""
        return self.model.patch_weights.probabilities(self.model(x).float(), self.settings.multi_label)

    def measures(
            self, question: Question, answer: Answer, boxes: Sequence[torch.Tensor], patch_boxes: torch.Tensor,
            drops: torch.Tensor | None) -> dict[str, list[Any]]:
        """Measure -> B values."""
        found: dict[str, list[Any]] = {}
        given = [i for i, truth in enumerate(boxes) if len(truth)]
        if given:
            heat, true = answer.heat[given], [boxes[i] for i in given]
            hits = [hits_to_text(one) for one in MaxBoxAccV2().measure(heat, true)]
            for name, values in (('boxes', hits), ('pointing', PointingGame().measure(heat, true).tolist()),
                                 ('energy', EnergyPointing().measure(heat, true).tolist())):
                found[name] = [None] * len(boxes)
                for i, value in zip(given, values):
                    found[name][i] = value
        for unit in self.settings.removal:
            if unit == 'pixels':
                place: Any = (answer.heat, question.target)
            elif answer.scores is not None:
                place = (answer.scores, question.target, patch_boxes)
            else:
                continue  # a map of pixels has a row of its own for its mean over patches
            units = place[0][0].numel()
            for blank in self.settings.blanks:
                for name, cls in (('deletion', Deletion), ('insertion', Insertion)):
                    measure: Any = cls(blank, min(self.settings.steps, units))
                    found[f'{name}, {unit}, {blank}'] = measure.measure(self.probabilities, question.x, *place).tolist()
        if drops is not None:
            found['single'] = self.single.measure(answer.heat, drops).tolist()
        if answer.parts is not None and answer.total is not None:
            found['complete'] = Completeness().measure(answer.parts, answer.total()).tolist()
        return found


def grid_entries(
        judge: Judge, x: torch.Tensor, target: torch.Tensor, n: int, number: int, against: Any,
        batch_size: int) -> Rows:
    """Grid pointing of every tool, mean over the cells of one grid.

    Args:
        judge: with the model and the tools.
        x: (n², C, H, W) images of the cells.
        target: (n²,) their classes.
        n: cells a side.
        number: of the grid.
        against: see ``direction``; the rivals are those in the logits of the whole grid.
        batch_size: images of a cell's size in a forward pass.
    """
    model, grid, pointing = judge.model, make_grids(x, n), GridPointing(n)
    with torch.no_grad():
        logits = model(grid).float()
    patch_logits = judge.patch_logits(grid)
    rows: Rows = {}
    for part in torch.arange(n * n).split(max(1, batch_size // n ** 2)):
        v = direction(logits.expand(len(part), -1), target[part], against)
        question = Question(grid, target[part], v, (number * n * n + part).tolist())
        patch_boxes = model.patch_boxes(*grid.shape[-2:])
        for name, tool in judge.tools.items():
            answer = tool(question)
            for form, one in [(name, answer), *judge.other_forms(name, answer, patch_boxes, patch_logits)]:
                shares = pointing.measure(one.heat, part)
                rows.setdefault(form, {}).setdefault('grid', []).extend(shares.tolist())
    return {form: {'grid': sum(shares['grid']) / n ** 2} for form, shares in rows.items()}
