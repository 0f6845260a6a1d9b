"""The model card of one set of weights: every number from result.json and config.json, the words from a template."""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import model_entrypoint

from timm_lossattn.evaluation.proportion import top1_interval
from timm_lossattn.explanation import held_of
from timm_lossattn.files import sha256_of
from timm_lossattn.loading import full_name
from timm_lossattn.models.pretrained import WEIGHTS_NAME

sys.path.append(str(Path(__file__).resolve().parents[1] / 'train'))  # for lib, which knows its records
from lib.history import commands_of, hardware_of, runs_of

__all__ = ['TAG', 'Words', 'make_card', 'measures']

TAG = 'timm_lossattn'  # of every card that is made here
BEST = 'model_best.pth.tar'  # train.py's checkpoint of the best epoch
TEMPLATE = Path(__file__).with_name('card_template.md')
# measure of result.json -> metric type of the Hub, name; percent all of them
METRICS = {
    'top1': ('accuracy', 'top-1 accuracy (%)'), 'top5': ('top-5-accuracy', 'top-5 accuracy (%)'),
    'map': ('mAP', 'mean average precision (%)'), 'map_voc11': ('mAP', '11-point mAP (%)'),
    'patch_precision': ('precision', 'patch precision (%)'), 'patch_recall': ('recall', 'patch recall (%)'),
    'patch_f': ('f1', 'patch F (%)'), 'localization_ap': ('localization_ap', 'localisation AP (%)'),
}


@dataclass(frozen=True)
class Words:
    """What a card says that no file of a run knows.

    Attributes:
        dataset: id of the training set on the Hub.
        note: about the data.
        license: id of the weights' licence.
    """
    dataset: str | None = None
    note: str | None = None
    license: str = 'apache-2.0'


def measures(result: dict[str, Any]) -> tuple[dict[str, float], str]:
    """What was measured on the weights, and how it came about.

    Args:
        result: result.json of train.py, or with "shipped" that of bundle.py.
    """
    epochs = {entry['epoch']: entry['eval'] for entry in result['epochs']}
    best = f'the best epoch ({len(epochs)} in all) by {result.get("metric", "top1")} on this split'
    if 'shipped' in result:
        found, source = result['shipped'], 'measured on this file, after its conversion to float16'
        if found.get('checkpoint') == BEST and len(epochs) > 1:
            source = f'{source}; {best}'
    else:
        found, source = epochs[result['best']['epoch']], best
    few = result['args']['num_classes'] <= 5  # top-5 says nothing then
    names = [name for name in METRICS if name in found and math.isfinite(found[name]) and not (few and name == 'top5')]
    return {name: found[name] for name in names}, source


def is_of_package(architecture: str) -> bool:
    """Whether this package registers an architecture; else it is timm's own."""
    return model_entrypoint(architecture).__module__.startswith('timm_lossattn.')


def origin(run: dict[str, Any]) -> str:
    """What the first run started from."""
    flags = run['args']
    if ':' in flags['model'] or flags.get('pretrained_path') or flags.get('initial_checkpoint'):
        started = flags.get('pretrained') or flags.get('initial_checkpoint')
        return 'Started from other weights, see the command.' if started else ''
    if flags.get('pretrained'):
        architecture, _, tag = run['model'].partition('.')
        ours = is_of_package(architecture)
        if ours and architecture != 'lossattn':
            return 'Started from the weights that the package had for this architecture at that time.'
        backbone = (flags.get('model_kwargs') or {}).get('backbone') or tag if ours else run['model']
        return f'Started from the pretrained weights of `{backbone}`.'
    if flags.get('grow_from'):
        return f'The first channels of each layer started as `{flags["grow_from"]}`.'
    if flags.get('pretrained_backbone'):
        return f'The backbone started from the weights that `{flags["pretrained_backbone"]}` had at that time.'
    return ''


def went_on(runs: list[dict[str, Any]]) -> str:
    """What the last run started from, if it is not the first."""
    if len(runs) == 1:
        return ''
    before = runs[-2].get('shipped')
    if before:
        return (f'The last run went on from weights with {before["top1"]:.2f} % (`{before["file"]}` of that time, '
                f'SHA-256 `{before["sha256"]}`).')
    return 'The last run went on from the weights of the run before it.'


def training(result: dict[str, Any]) -> dict[str, Any]:
    """What the template says about how the weights came about."""
    runs = runs_of(result)
    seconds = sum(run['seconds'] for run in runs)
    return {
        'epochs': ' + '.join(str(len(run['epochs'])) for run in runs),
        'seed': ', '.join(str(run['seed']) for run in runs),
        'time': f'{seconds / 3600:.2f} hours' if seconds >= 3600 else f'{seconds / 60:.1f} minutes',
        'start': ' '.join(filter(None, (origin(runs[0]), went_on(runs)))),
        'hardware': hardware_of(result), 'torch': result['versions']['torch'],
        'timm': result['versions']['timm'], 'commit': result.get('commit') or '',
        'command': '\n'.join(commands_of(result)),
    }


def make_card(
        folder: Path, model: Any, result: dict[str, Any] | None, config: dict[str, Any], name: str, load: str,
        words: Words) -> ModelCard:
    """Card for the weights in a folder.

    Args:
        folder: holds example.png if there is a picture.
        model: the weights' model; its pretrained_cfg names their file, or it lies in the folder.
        result: their result.json; None if nothing was measured.
        config: their config.json, as timm writes it.
        name: title.
        load: what ``timm.create_model`` takes to load them: ``hf-hub:ORG/NAME``, or ``arch.tag``.
        words: the rest.
    """
    found, source = measures(result) if result else ({}, '')
    flags: dict[str, Any] = result['args'] if result else {}
    dataset = words.dataset or Path(flags.get('dataset') or flags.get('data_dir') or 'images').name
    split = flags.get('val_split')
    patches = hasattr(model, 'forward_patches')
    data = ModelCardData(
        library_name='timm', license=words.license, pipeline_tag='image-classification', model_name=name,
        tags=['image-classification', 'timm', 'transformers', TAG,
              *(['interpretability', 'explainable-ai', 'attention'] if patches else [])],
        datasets=[words.dataset] if words.dataset else None,
        metrics=list(dict.fromkeys(METRICS[measure][0] for measure in found)) or None,
        eval_results=[EvalResult(
            task_type='image-classification', dataset_type=dataset, dataset_name=dataset, dataset_split=split,
            metric_type=METRICS[measure][0], metric_name=METRICS[measure][1], metric_value=value)
            for measure, value in found.items()] or None)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        weights = Path(model.pretrained_cfg['file'])
    shipped = (result or {}).get('shipped', {})
    size, labels = config['pretrained_cfg']['input_size'], config.get('label_names') or []
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=name, architecture=f'`{full_name(model)}`',
        picture='example.png' if (folder / 'example.png').exists() else None,
        ours=is_of_package(config['architecture']), patches=patches,
        head=model.patch_weights.description if patches else '', held=held_of(model),
        weighted=patches and model.patch_weights.informative, multi_label=flags.get('multi_label'),
        parameters=f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
        input_size=f'{size[0]} × {size[1]} × {size[2]}', num_classes=config['num_classes'],
        labels=', '.join(labels) if len(labels) <= 20 else '', megabytes=f'{weights.stat().st_size / 1e6:.2f}',
        sha256=sha256_of(weights),
        measures=[{'name': METRICS[measure][1], 'value': f'{value:.2f}'} for measure, value in found.items()],
        interval=[f'{bound:.2f}' for bound in top1_interval(shipped)] if 'top1' in shipped else [],
        split=split, dataset_name=words.dataset or f'the images in `{dataset}`',
        images=shipped.get('images'),
        note=words.note, source=source, load=load, training=training(result) if result else None)
