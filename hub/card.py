"""The model card of one set of weights: every number from result.json and config.json, the words from a template."""
import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_lossattn.files import sha256_of

__all__ = ['make_card', 'measures']

TEMPLATE = Path(__file__).with_name('card_template.md')
# measure of result.json -> metric type of the Hub, name; percent all of them
METRICS = {
    'top1': ('accuracy', 'top-1 accuracy (%)'), 'top5': ('top-5-accuracy', 'top-5 accuracy (%)'),
    'map': ('mAP', 'mean average precision (%)'), 'map_voc11': ('mAP', '11-point mAP (%)'),
    'patch_precision': ('precision', 'patch precision (%)'), 'patch_recall': ('recall', 'patch recall (%)'),
    'patch_f': ('f1', 'patch F (%)'), 'localization_ap': ('localization_ap', 'localisation AP (%)'),
}

HEADS = {
    'lossattn': 'weighted by loss-based attention (X. Shi et al., IEEE TIP 2021)',
    'avg': 'all with the same weight',
    'attn': 'weighted by the attention of M. Ilse et al., ICML 2018',
    'gatedattn': 'weighted by the gated attention of M. Ilse et al., ICML 2018',
    'routing': 'combined by dynamic routing (S. Sabour et al., NeurIPS 2017)',
}


def measures(result: dict[str, Any]) -> tuple[dict[str, float], str]:
    """What was measured on the weights, and how it came about.

    Args:
        result: result.json of train.py, or with "shipped" that of export_weights.py.
    """
    if 'shipped' in result:
        found, source = result['shipped'], 'measured on this file, after its conversion to float16'
    else:
        epochs = {entry['epoch']: entry['eval'] for entry in result['epochs']}
        found = epochs[result['best']['epoch']]
        source = f'the best epoch ({len(epochs)} in all) by {result.get("metric", "top1")} on this split'
    few = result['args']['num_classes'] <= 5  # top-5 says nothing then
    names = [name for name in METRICS if name in found and math.isfinite(found[name]) and not (few and name == 'top5')]
    return {name: found[name] for name in names}, source


def make_card(folder: Path, model: Any, result: dict[str, Any], config: dict[str, Any], args: Any) -> ModelCard:
    """Card for the weights in a folder.

    Args:
        folder: holds model.safetensors, and example.png if there is a picture.
        model: the weights' model.
        result: their result.json.
        config: their config.json, as timm writes it.
        args: of publish.py: repo_id, dataset (id on the Hub or None), license, note.
    """
    found, source = measures(result)
    runs = [result]
    while 'initial' in runs[0]:  # started from another run's checkpoint
        runs.insert(0, runs[0]['initial'])
    commands = [command for run in runs for command in run['commands']]
    if 'shipped' in result:
        commands.append(result['shipped']['command'])
    flags = result['args']
    seconds = sum(run['seconds'] for run in runs)
    start = 'Started from the weights that the package ships for this architecture.' if flags.get('pretrained') else (
        f'The backbone started from the weights of `{flags["pretrained_backbone"]}`.'
        if flags.get('pretrained_backbone') else '')
    name = args.repo_id.split('/')[-1]
    trained_on = Path(flags['dataset'] or flags['data_dir'] or 'images').name
    dataset_name = args.dataset or trained_on
    patches = hasattr(model, 'forward_patches')
    data = ModelCardData(
        library_name='timm', license=args.license, pipeline_tag='image-classification', model_name=name,
        tags=['image-classification', 'timm', 'transformers', 'timm_lossattn',
              *(['interpretability', 'explainable-ai', 'attention'] if patches else [])],
        datasets=[args.dataset] if args.dataset else None,
        metrics=list(dict.fromkeys(METRICS[measure][0] for measure in found)) or None,
        eval_results=[EvalResult(
            task_type='image-classification', dataset_type=dataset_name, dataset_name=dataset_name,
            dataset_split=flags['val_split'], metric_type=METRICS[measure][0], metric_name=METRICS[measure][1],
            metric_value=value) for measure, value in found.items()] or None)
    weights = folder / 'model.safetensors'
    size, labels = config['pretrained_cfg']['input_size'], config.get('label_names') or []
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=name, architecture=f'`{config["architecture"]}`',
        picture='example.png' if (folder / 'example.png').exists() else None,
        patches=patches, head=HEADS.get(getattr(model, 'global_pool', ''), ''), multi_label=flags.get('multi_label'),
        weighted=getattr(model, 'global_pool', '') in ('lossattn', 'attn', 'gatedattn'),
        parameters=f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
        input_size=f'{size[0]} × {size[1]} × {size[2]}', num_classes=config['num_classes'],
        labels=', '.join(labels) if len(labels) <= 20 else '', megabytes=f'{weights.stat().st_size / 1e6:.2f}',
        sha256=sha256_of(weights),
        measures=[{'name': METRICS[measure][1], 'value': f'{value:.2f}'} for measure, value in found.items()],
        split=flags['val_split'], dataset_name=dataset_name, images=result.get('shipped', {}).get('images'),
        note=args.note, source=source, hub_id=f'hf-hub:{args.repo_id}',
        epochs=' + '.join(str(len(run['epochs'])) for run in runs), seed=', '.join(str(run['seed']) for run in runs),
        time=f'{seconds / 3600:.2f} hours' if seconds >= 3600 else f'{seconds / 60:.1f} minutes', start=start,
        hardware=result['hardware'], torch=result['versions']['torch'], timm=result['versions']['timm'],
        command='\n'.join(commands))
