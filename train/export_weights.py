#!/usr/bin/env python3
"""Turn a training run into weights that ship in the package, and measure the weights that ship.

    python train/export_weights.py RUN_FOLDER --dataset hfds/uoft-cs/cifar10 --input-key img --val-split test

Takes model_best.pth.tar and result.json of the run (EMA weights if it has them), stores convolutions and linear layers
as float16 and everything of a normalisation layer as float32, writes timm_lossattn/weights/<model>.<tag>.safetensors,
loads that file again into a fresh model, evaluates it on the whole split in float32, and writes
train/results/<model>.<tag>.json: the run's result.json with the accuracy after conversion under "shipped" and, if the
run started from another run's checkpoint, that run's result.json under "initial".
"""
import argparse
import hashlib
import json
import os
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import load_state_dict
from timm.task import ClassificationTask
from torch import nn

import timm_lossattn  # noqa: F401  (registers the models)
from record import command_line

ROOT = Path(__file__).parent.parent


def shipped_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict with float16 weights, but float32 normalisation layers, biases and thresholds."""
    state = {}
    for name, tensor in model.state_dict().items():
        half = tensor.is_floating_point() and tensor.dim() > 1 and name.endswith('.weight')
        state[name] = tensor.half().contiguous() if half else tensor.contiguous()
    return state


def check_is_default(result: dict, model: nn.Module) -> None:
    """Refuse what ``pretrained=True`` could not restore.

    Raises:
        SystemExit: the run changed the model or its preprocessing.
    """
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in resolve_model_data_config(model).items()}
    changed = {k: v for k, v in result['data_config'].items() if k in config and config[k] != v}
    changed |= {k: result['args'][k] for k in ('xi', 'model_kwargs', 'backbone_stride')
                if result['args'].get(k) and result['args'][k] != getattr(model, k, None)}
    if result['args']['num_classes'] != model.num_classes:
        changed['num_classes'] = result['args']['num_classes']
    if changed:
        raise SystemExit(f'{result["model"]}: the run differs from the registered model in {changed}')


@torch.inference_mode()
def evaluate(model: nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Loss, top-1 and top-5 on the whole split."""
    config = resolve_model_data_config(model)
    dataset = create_dataset(args.dataset, root=None, split=args.val_split, input_key=args.input_key)
    loader = create_loader(
        dataset, config['input_size'], batch_size=250, mean=config['mean'], std=config['std'],
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], num_workers=1,
        device=torch.device(args.device))
    evaluator = ClassificationTask(model, verbose=False).create_evaluator()
    for x, y in loader:
        evaluator.update(model(x), y)
    return dict(evaluator.compute()) | {'images': len(dataset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, metavar='RUN_FOLDER')
    parser.add_argument('--tag', default='cifar10')
    parser.add_argument('--dataset', required=True, metavar='NAME')
    parser.add_argument('--input-key', default='image')
    parser.add_argument('--val-split', default='validation')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--checkpoint', default='model_best.pth.tar', metavar='FILE', help='in RUN_FOLDER')
    args = parser.parse_args()

    result = json.loads((args.run / 'result.json').read_text())
    name = f'{result["model"]}.{args.tag}'
    model = timm.create_model(result['model'])
    check_is_default(result, model)
    model.load_state_dict(load_state_dict(str(args.run / args.checkpoint)))
    file = ROOT / 'timm_lossattn' / 'weights' / f'{name}.safetensors'
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix('.tmp')
    save_file(shipped_state_dict(model), temporary, metadata={'format': 'pt'})
    os.replace(temporary, file)

    fresh = timm.create_model(result['model'])
    fresh.load_state_dict(load_file(file))
    metrics = evaluate(fresh.eval().to(args.device), args)
    if result['args']['initial_checkpoint']:
        initial = Path(result['args']['initial_checkpoint']).parent / 'result.json'
        result['initial'] = json.loads(initial.read_text())
    result['shipped'] = {
        'file': str(file.relative_to(ROOT)), 'bytes': file.stat().st_size,
        'sha256': hashlib.sha256(file.read_bytes()).hexdigest(), **metrics,
        'command': command_line(None),
    }
    out = ROOT / 'train' / 'results' / f'{name}.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + '\n')
    print(f'{file}: {result["shipped"]["bytes"]} bytes, top-1 {metrics["top1"]:.2f} % of {metrics["images"]} images')


if __name__ == '__main__':
    main()
