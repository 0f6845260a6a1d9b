"""What recipes.yaml leads to: which parameters decay, what is mirrored, how a schedule begins, for which models."""
import json
import math

import pytest
import timm
import torch
import yaml

import timm_lossattn  # noqa: F401  (registers the models)
import train
from lib import build, command
from lib.data import create_train_loader, open_dataset, padded_crop
from lib.model import create_model
from lib.process import Process
from timm_lossattn.training import MarginLoss

TABLE_4 = yaml.safe_load((command.RECIPES.parent / 'paper_tables.yaml').read_text())['tables'][4]['rows']


def decays(recipe):
    """Weight decay by parameter of the small capsule model."""
    options = command.parse_args(['--recipe', recipe, '--model', 'resnet18_lossattn_caps_nano', '--device', 'cpu'])
    model = create_model(options, Process.start('cpu'))
    task = build.create_task(options, model, 10, Process.start('cpu').device)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group['weight_decay'] for group in build.create_optimizer(options, task).param_groups
            for parameter in group['params']}


def test_dictionaries_are_merged():
    """A key that is not given stays as the recipe has it."""
    kwargs = command.parse_args(['--recipe', 'sgd', '--opt-kwargs', 'nesterov=True']).opt_kwargs
    assert kwargs == {'filter_bias_and_bn': False, 'nesterov': True}


def test_empty_dictionary_in_a_config(tmp_path):
    """A key without a value is none at all."""
    (tmp_path / 'config.yaml').write_text('model_kwargs:\nopt_kwargs:\n')
    options = command.parse_args(['--recipe', 'sgd', '--config', str(tmp_path / 'config.yaml')])
    assert (options.model_kwargs, options.opt_kwargs) == ({}, {'filter_bias_and_bn': False})


def test_patch_term_of_routing():
    """--patch-loss adds a term to the margin loss; it does not take its place."""
    options = command.parse_args(['--model', 'resnet18_routing_caps', '--width-mult', '0.125', '--device', 'cpu',
                                  '--patch-loss', '--smoothing', '0.1'])
    task = build.create_task(options, create_model(options, Process.start('cpu')), 10, Process.start('cpu').device)
    assert type(task.loss.criterion) is MarginLoss
    assert task.loss.smoothing == 0


@pytest.mark.parametrize(('recipe', 'weights', 'others'), [
    ('sgd/cifar10', 5e-4, 5e-4), ('fast/cifar10', 5e-4, 0.), ('adam/cifar10', 0., 0.)])
def test_thresholds_decay_as_biases_do(recipe, weights, others):
    """The offsets of Eq. 11 are treated as biases: the paper's recipe lets all parameters decay, ours weights alone."""
    found = decays(recipe)
    assert found['patch_layers.primary.conv.conv.weight'] == weights
    assert found['head.fc.weight'] == weights
    for name in ('patch_layers.length.offset', 'patch_layers.primary.conv.bn.weight', 'head.fc.bias'):
        assert found[name] == others, name


@pytest.mark.parametrize('recipe', sorted({*command.recipe_names()} - {'smoke'}))  # it is of CIFAR-10, and of fast
def test_every_recipe_trains(recipe, folder, tmp_path):
    """On small images: its optimizer, its schedule and its flags exist in the timm that is installed."""
    assert train.main([
        '--recipe', recipe, '--dataset', '', '--data-dir', str(folder), '--train-split', 'train', '--val-split', 'val',
        '--model', 'resnet18_lossattn_conv_nano', '--num-classes', '2', '--input-size', '3', '16', '16',
        '--batch-size', '16', '--epochs', '1', '--workers', '0', '--device', 'cpu', '--output', str(tmp_path),
        '--experiment', 'x', *(('--train-img-sizes', '12', '16') if recipe == 'cpu' else ())]) == 0
    entry, = json.loads((tmp_path / 'x' / 'result.json').read_text())['epochs']
    assert math.isfinite(entry['train']['loss'])


@pytest.mark.parametrize('recipe', ['sgd', 'adam', 'fast'])
@pytest.mark.parametrize(('dataset', 'share'), [('cifar10', 0.5), ('cifar100', 0.5), ('svhn', 0.), ('coco', 0.5)])
def test_digits_are_not_mirrored(recipe, dataset, share):
    assert command.parse_args(['--recipe', f'{recipe}/{dataset}', '--device', 'cpu']).hflip == share


def test_svhn_images_keep_their_sides():
    """Through the transform itself: an image whose left half is white never has it on the right."""
    from PIL import Image
    image = Image.new('RGB', (32, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))
    options = command.parse_args(['--recipe', 'sgd/svhn', '--device', 'cpu'])
    config = {'input_size': (3, 32, 32), 'interpolation': 'bicubic', 'crop_pct': 1.0, 'crop_mode': 'center',
              'mean': (0.,) * 3, 'std': (1.,) * 3}
    transform = padded_crop(options, config)
    for _ in range(20):
        x = transform(image).float()
        assert x[..., :16].sum() > x[..., 16:].sum()


def test_patterns_of_a_recipe(tmp_path):
    """They hold for the model that is trained, also for the default one; flags win."""
    def stride(*argv):
        return command.parse_args(['--recipe', *argv]).backbone_stride

    config = tmp_path / 'config.yaml'
    config.write_text('model: resnet18_cifar\n')
    assert command.TrainOptions.model == 'resnet18_lossattn_conv'
    assert stride('nano/cifar10') == stride('nano/cifar10', '--model', 'resnet18_lossattn_conv') == 2
    assert stride('nano/cifar10', '--backbone-stride', '4') == 4
    for other in ('resnet18_cifar', 'resnet18_lossattn_conv_nano', 'resnet18_lossattn_conv_s2'):
        assert stride('nano/cifar10', '--model', other) is None
    assert stride('nano/cifar10', '--config', str(config)) is None


@pytest.mark.parametrize('model', [row['model'] for name, row in TABLE_4.items() if name != 'vgg11_bn_cifar'])
def test_small_networks_begin_with_weights_that_ship(model):
    """All networks of Table 4 but the plain VGG begin with the first convolution of the weights of their kind."""
    options = command.parse_args(
        ['--recipe', 'nano_finetune/tiny_imagenet_mini', '--width-mult', '0.125', '--model', model])
    kind = 'vgg11_bn' if model.startswith('vgg11_bn') else 'resnet18'
    source = timm.create_model(f'{kind}_lossattn_conv_nano', pretrained=True)
    first, begun = (next(value for name, value in one.state_dict().items()
                         if name.startswith('backbone.') and value.dim() == 4)
                    for one in (source, create_model(options, Process())))
    assert torch.equal(first, begun)


def test_flags_switch_off_what_a_recipe_switches_on():
    """--no-amp and its like, beside the switches that have a no in their name."""
    assert command.parse_args(['--recipe', 'cpu/cifar10']).amp
    options = command.parse_args(['--recipe', 'cpu/cifar10', '--no-amp', '--no-channels-last', '--no-aug'])
    assert (options.amp, options.channels_last, options.no_aug, options.patch_loss) == (False, False, True, None)


@pytest.mark.parametrize('supported', [False, True])
def test_bfloat16_without_its_instructions(supported, monkeypatch, caplog):
    """Ten times as slow as float32: said where it begins, and only on CPUs that lack it."""
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: supported)
    build.create_precision(command.parse_args(['--recipe', 'cpu/cifar10']), torch.device('cpu'))
    build.create_precision(command.parse_args(['--recipe', 'cpu/cifar10', '--no-amp']), torch.device('cpu'))
    assert caplog.text.count('--no-amp') == (not supported)


def test_schedules_that_are_given_stay(tmp_path):
    """Of another number of epochs, also where the given value is that of the recipe; a --config file gives as well."""
    assert command.parse_args(['--recipe', 'fast', '--epochs', '8']).warmup_epochs == pytest.approx(0.8)
    assert command.parse_args(['--recipe', 'fast', '--epochs', '8', '--warmup-epochs', '4']).warmup_epochs == 4
    config = tmp_path / 'config.yaml'
    config.write_text('warmup_epochs: 4\nepochs: 8\n')
    assert command.parse_args(['--recipe', 'fast', '--config', str(config)]).warmup_epochs == 4


@pytest.mark.parametrize('flags', [('--recipe', 'cpu/cifar10'), ('--torchcompile',), ('--amp',)])
def test_winograd_that_would_not_be_used(flags, capsys):
    """It is for eager float32 on the CPU; elsewhere it would do nothing."""
    with pytest.raises(SystemExit):
        command.parse_args([*flags, '--winograd', '--device', 'cpu'])
    assert '--winograd: is for float32 on the CPU' in capsys.readouterr().err
    assert command.parse_args(['--recipe', 'cpu/cifar10', '--no-amp', '--winograd', '--device', 'cpu']).winograd


def test_patch_loss_needs_patches():
    """A stock timm model has none; said by the flag's name."""
    options = command.parse_args(['--model', 'test_resnet', '--num-classes', '3', '--patch-loss', '--device', 'cpu'])
    with pytest.raises(ValueError, match='--patch-loss: test_resnet has no patches'):
        build.create_task(options, create_model(options, Process()), 10, Process().device)


@pytest.mark.parametrize('cached', [True, False])
def test_sizes_one_after_the_other(cached, folder):
    """Recipe cpu: timm's schedule without a spread, whoever loads the images."""
    options = command.parse_args(['--recipe', 'cpu', '--data-dir', str(folder), '--batch-size', '8', '--device', 'cpu',
                                  *(() if cached else ('--no-cache-dataset',))])
    dataset = open_dataset(options, 'train', 2, True)
    config = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear',
              'crop_pct': 1., 'crop_mode': 'center'}
    loader = create_train_loader(options, Process(), dataset, config, 2)
    schedule = loader.schedule if cached else loader.batch_sampler
    assert (schedule.schedule_spread, schedule.schedule_random_mix, schedule.schedule_epochs) == (0., 0., 30)
