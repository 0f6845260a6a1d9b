"""lossattn: how the classifier of a pretrained backbone begins for other classes than its weights have."""
import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_lossattn import load_model
from timm_lossattn.models.lossattn import begin_small, refuse_early


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'caformer_s18', 'levit_128s', 'repvit_m0_9'])
def test_new_classifier_of_pretrained_weights(tmp_path, name):
    """Of few classes it begins as PyTorch's layers do, which timm's need not; all that timm loads stays loaded."""
    stock = timm.create_model(name)
    save_file(stock.state_dict(), tmp_path / 'model.safetensors')
    overlay = {'pretrained_cfg_overlay': {'file': str(tmp_path / 'model.safetensors')}}
    model = timm.create_model('lossattn', True, backbone=name, num_classes=2, **overlay)
    names = stock.pretrained_cfg['classifier']
    classifiers = (names,) if isinstance(names, str) else names
    for classifier in classifiers:
        layer = model.get_submodule(classifier)
        assert layer.weight.abs().max() <= layer.in_features ** -0.5
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in model.state_dict().items()
               if not key.startswith(classifiers))
    same = timm.create_model('lossattn', True, backbone=name, **overlay)
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in same.state_dict().items())


@pytest.mark.parametrize('cfg', [{}, {'classifier': None}])
def test_weights_without_a_classifier(cfg):
    """Of encoders timm names no classifier: there is nothing to begin anew."""
    model = timm.create_model('test_resnet')
    before, model.pretrained_cfg = model.fc.weight.clone(), cfg
    begin_small(model)
    assert torch.equal(model.fc.weight, before)


@pytest.mark.parametrize('name', [{'name': 'lossattn.mobilenetv3_small_050'},
                                  {'name': 'lossattn', 'backbone': 'mobilenetv3_small_050'}])
def test_weights_in_a_file_say_how_many_classes(name, tmp_path):
    """Of either name of the model, whose classifier has another name than that of the default backbone."""
    stock = timm.create_model('mobilenetv3_small_050', num_classes=3)
    save_file(stock.state_dict(), tmp_path / 'weights.safetensors')
    assert load_model(checkpoint=tmp_path / 'weights.safetensors', **name).num_classes == 3


def test_refused_before_the_download_without_numbers():
    """The model that shows whether it is refused is on no device, whichever the real one goes to."""
    before = torch.get_rng_state()
    refuse_early('test_resnet', {'device': 'cpu'})
    assert torch.equal(torch.get_rng_state(), before)
