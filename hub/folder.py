"""What goes up for one set of weights: model.safetensors, config.json, README.md, result.json, example.png.

``make_folder`` makes such a folder of a run of train.py, or of any folder that timm can load; ``copy_bundle`` copies
one that ``bundle.py`` made and that lies in hub/weights, as it is.
"""
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from card import Words, make_card
from timm_lossattn import explain, load_model
from timm_lossattn.explanation.labels import by_index
from timm_lossattn.explanation.preprocessing import PREPROCESSING
from timm_lossattn.files import replace_file, replacing, sha256_of, write_json
from timm_lossattn.loading import full_name, list_patch_models
from timm_lossattn.models.entrypoints import CIFAR10_LABELS
from timm_lossattn.models.lossattn import TRAINED
from timm_lossattn.models.pretrained import WEIGHTS_NAME, bundle_folder, bundled_weights

__all__ = [
    'CONFIG', 'EXAMPLE', 'FILES', 'RESULT', 'WEIGHTS', 'bundle_name', 'check_tag', 'copy_bundle', 'draw_example',
    'list_bundles', 'make_folder', 'model_differences', 'write_card', 'write_config',
]

CONFIG, RESULT, CARD, EXAMPLE = 'config.json', 'result.json', 'README.md', 'example.png'
FILES = (WEIGHTS_NAME, CONFIG, RESULT, CARD, EXAMPLE)
WEIGHTS = Path(__file__).resolve().parent / 'weights'
CIFAR_EXAMPLE = Path(__file__).parent / 'space' / 'examples' / 'cifar10_test_00001_ship.png'
MAX_BYTES = 50 * 10 ** 9  # the Hub's limit for one file
SAME = (*PREPROCESSING, 'label_names')  # of a pretrained_cfg
SAME_ATTRIBUTES = ('num_classes', 'xi', 'backbone_stride', 'patch_stride', 'patch_padding', 'global_pool')  # of a model


def list_bundles() -> list[str]:
    """``arch.tag`` of everything in hub/weights."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / RESULT).is_file())


def bundle_name(source: str | Path) -> str | None:
    """The ``arch.tag`` that a source names: itself, or the folder in hub/weights. None if it is something else."""
    path = Path(source)
    name = path.name if path.is_dir() and path.resolve().parent == WEIGHTS else str(source)
    return name if name in list_bundles() else None


def copy_bundle(name: str, folder: Path) -> None:
    """Copy what hub/weights has of an ``arch.tag`` into the folder, with the weights if those lie in the package.

    Raises:
        ValueError: files are missing or do not belong together.
    """
    weights, bundle = bundled_weights(name), bundle_folder(name)
    missing = [file for file in (CONFIG, CARD) if not (bundle / file).is_file()]
    if weights is None or missing:
        raise ValueError(f'RUN_OR_FOLDER: {name} has no {", ".join(missing) or WEIGHTS_NAME}; make it with bundle.py')
    for file in FILES:
        if file != WEIGHTS_NAME and (bundle / file).is_file():
            shutil.copyfile(bundle / file, folder / file)
    shutil.copyfile(weights, folder / WEIGHTS_NAME)
    result, config = read_json(folder, str(name))
    check_pair(name, folder, result, config)
    if sha256_of(folder / WEIGHTS_NAME) not in (folder / CARD).read_text('utf-8'):
        raise ValueError(f'RUN_OR_FOLDER: the card of {name} is of other weights; run `python hub/bundle.py --rewrite`')
    load_folder(folder, name)


def make_folder(source: str, folder: Path, repo_id: str, words: Words, example: str | None) -> Any:
    """Fill the folder from a run or a folder.

    Args:
        source: of train.py (weights in its ``hub/``, beside its result.json), or with model.safetensors and config.json
            as ``timm.models.save_for_hf`` writes them.
        folder: exists and is empty.
        repo_id: where it will go.
        words: for the card.
        example: image to explain; by default, for CIFAR-10's classes, the ship.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: files are missing, do not belong together, or do not load, or the example is unreadable.
    """
    path = Path(source)
    if not path.is_dir():
        raise ValueError(f'RUN_OR_FOLDER: {source} is no folder, and no arch.tag in hub/weights')
    run = (path / 'hub').is_dir()
    weights = path / 'hub' if run else path
    found = {WEIGHTS_NAME: weights / WEIGHTS_NAME, CONFIG: weights / CONFIG}
    if run or (path / RESULT).is_file():
        found[RESULT] = path / RESULT
    missing = [name for name, file in found.items() if not file.is_file()]
    if missing:
        pickles = sorted(p.name for p in weights.iterdir() if p.suffix in ('.bin', '.pth', '.pt', '.tar'))
        raise ValueError(f'RUN_OR_FOLDER: {path} has no {", ".join(missing)}; is the run finished?' + (
            f' {", ".join(pickles)} are pickles, which are not published.' if pickles else ''))
    for name, file in found.items():
        shutil.copyfile(file, folder / name)
    result, config = read_json(folder, source)
    check_pair(source, folder, result, config)
    tidy_config(config, result)
    write_json(folder / CONFIG, config)
    model = load_folder(folder, source)
    draw_example(folder, model, example, bool(result and result['args'].get('multi_label')))
    card = make_card(folder, model, result, config, repo_id.split('/')[-1], f'hf-hub:{repo_id}', words)
    replace_file(folder / CARD, str(card).encode())
    for file in folder.iterdir():
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(
                f'RUN_OR_FOLDER: {file.name} has {file.stat().st_size:,} bytes, the Hub takes {MAX_BYTES:,}')
    return model


def read_json(folder: Path, source: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """result.json, None if there is none, and config.json.

    Raises:
        ValueError: no JSON.
    """
    try:
        result = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else None
        return result, json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f'RUN_OR_FOLDER: result.json or config.json of {source} is damaged: {error!r}') from error


def check_pair(source: str, folder: Path, result: dict[str, Any] | None, config: dict[str, Any]) -> None:
    """Whether result.json, if there is one, config.json and the weights belong together.

    Raises:
        ValueError: they do not.
    """
    try:
        if isinstance(config, dict) and 'pretrained_cfg' not in config:  # timm wrote it so once, and still reads it
            raise ValueError(f'RUN_OR_FOLDER: config.json of {source} has no pretrained_cfg; write it again with '
                             'timm.models.save_for_hf')
        here = config['architecture'], config['num_classes']
        if result is None:
            return
        trained = result['model'].split('.')[0], result['args']['num_classes']
        measured_on = result['shipped']['sha256'] if 'shipped' in result else None
    except (KeyError, TypeError) as error:
        raise ValueError(f'RUN_OR_FOLDER: result.json or config.json of {source} is damaged: {error!r}') from error
    if trained != here:
        raise ValueError(f'RUN_OR_FOLDER: result.json is of {trained[0]} with {trained[1]} classes, the weights are of '
                         f'{here[0]} with {here[1]}')
    if measured_on and measured_on != sha256_of(folder / WEIGHTS_NAME):
        raise ValueError(f'RUN_OR_FOLDER: result.json was measured on other weights than {source}')


def tidy_config(config: dict[str, Any], result: dict[str, Any] | None) -> None:
    """Put what transformers reads where it looks: it passes num_classes on by itself, and wants labels at the top.

    Labels are those of the weights: what the run says, or else config.json, as many as there are classes.
    """
    config.get('model_args', {}).pop('num_classes', None)
    labels = config.pop('label_names', None) or config['pretrained_cfg'].get('label_names')
    if result and 'label_names' in result['args']:  # a run from pretrained weights may have kept those of their classes
        labels = result['args']['label_names'] or ()
    config['pretrained_cfg'].pop('label_names', None)
    labels = by_index(labels, config['num_classes']) if isinstance(labels, dict) else labels
    if labels and len(labels) == config['num_classes']:
        config['label_names'] = list(labels)
    elif labels is not None and not labels:  # known to have no names: not those of the tag either
        config['pretrained_cfg']['label_names'] = []


def load_folder(folder: Path, source: str) -> Any:
    """The folder's model; ValueError if its weights do not load."""
    try:
        return load_model(f'local-dir:{folder}')
    except ValueError as error:
        raise ValueError(f'RUN_OR_FOLDER: {source}: the weights do not load: {error}') from error


def write_config(file: Path, model: Any) -> None:
    """config.json of a model with its pretrained weights, as timm and transformers read it."""
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, safe_serialization=True)
        config = json.loads(Path(folder, CONFIG).read_text())
    tidy_config(config, None)
    write_json(file, config)


def draw_example(folder: Path, model: Any, example: str | None, multi_label: bool) -> None:
    """example.png, the explanation of an image; without one, of patch models of CIFAR-10's classes, of a test image.

    Raises:
        ValueError: the image is unreadable, or the logits of the model are no sum over patches.
    """
    of_cifar = tuple(model.pretrained_cfg.get('label_names') or ()) == CIFAR10_LABELS
    if example is None and of_cifar and hasattr(model, 'forward_patches'):
        example = str(CIFAR_EXAMPLE)
    if example is None:
        return
    try:
        explanation = explain(model, example, multi_label=multi_label)
    except (TypeError, ValueError) as error:  # TypeError: of a model that is none of timm's usual kind
        raise ValueError(f'--example: {error}') from error
    figure = explanation.figure(title=f'{Path(example).name} · {full_name(model)}')
    with replacing(folder / EXAMPLE) as temporary:
        figure.savefig(temporary, format='png')


def write_card(folder: Path, name: str, model: Any) -> None:
    """README.md of a bundle, from its other files; result.json has its words under "card"."""
    result, config = read_json(folder, name)
    words = Words(**(result or {}).get('card', {}))
    replace_file(folder / CARD, str(make_card(folder, model, result, config, name, name, words)).encode())


def model_differences(name: str, model: Any) -> list[str]:
    """In what a model differs from a registered ``arch.tag``, so that ``pretrained=True`` would not restore it.

    Labels that are not known count as no difference.

    Raises:
        ValueError: no such name, or one whose weights timm looks for elsewhere.
    """
    architecture, _, tag = name.partition('.')
    if timm.is_model(architecture) and (
            tag not in TRAINED if architecture == 'lossattn' else architecture not in list_patch_models()):
        raise ValueError(f'{name} takes no weights from here; those that `timm-lossattn list` names do, and '
                         f'lossattn.{", lossattn.".join(TRAINED)}')
    try:
        registered: Any = timm.create_model(name, device='meta')
        cfg = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f'{name} is not registered: {error}; add it to the default_cfgs first') from error

    def plain(value: Any) -> Any:
        if isinstance(value, nn.Module):  # timm's global_pool
            return repr(value)
        return tuple(value) if isinstance(value, list) else value

    found = [key for key in SAME if plain(model.pretrained_cfg.get(key)) != plain(getattr(cfg, key))
             and not (key == 'label_names' and not model.pretrained_cfg.get(key))]
    return found + [key for key in SAME_ATTRIBUTES
                    if plain(getattr(model, key, None)) != plain(getattr(registered, key, None))]


def check_tag(model: Any, tag: str) -> None:
    """Refuse weights that ``pretrained=True`` would not load, or would load into another model.

    Raises:
        ValueError: no such tag, a model that is not as registered, or other weights on this machine.
    """
    name = f'{model.pretrained_cfg["architecture"]}.{tag}'
    try:
        differ = model_differences(name, model)
    except ValueError as error:
        raise ValueError(f'--tag: {error}') from error
    if differ:
        raise ValueError(f'--tag: these weights differ from {name} as it is registered in {", ".join(differ)}')
    if bundled_weights(name):
        raise ValueError(f'--tag: {bundled_weights(name)} would come first; publish {name} itself')
