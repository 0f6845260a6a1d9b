"""A model with a checkpoint, and the command line that explains with it."""
import argparse

import pytest
import torch

from cli_run import CAPS, NANO, random_model
from timm_lossattn.cli import main
from timm_lossattn.loading import MODEL_CONFIG, model_config
from timm_lossattn.models.entrypoints import CIFAR10_LABELS


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Name -> (model, checkpoint file)."""
    folder = tmp_path_factory.mktemp('checkpoints')
    found = {}
    for name in (NANO, CAPS):
        model = random_model(name)
        torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(lr=0.1),  # as timm's saver
                    MODEL_CONFIG: model_config(name, {}, list(CIFAR10_LABELS))}, folder / f'{name}.pth.tar')
        found[name] = model, str(folder / f'{name}.pth.tar')
    return found


@pytest.fixture
def run(models, tmp_path):
    """Run ``explain`` with a checkpoint into tmp_path/out."""
    def run_explain(*args, model=NANO):
        return main(['explain', *map(str, args), '--model', model, '--checkpoint', models[model][1],
                     '--out', str(tmp_path / 'out')])
    return run_explain
