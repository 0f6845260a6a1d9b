"""LossAttentionTask with timm's training machinery: checkpoints, EMA, compile, optimizers, DDP."""
import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from timm_lossattn import LossAttentionLoss, LossAttentionTask, gamma_rampup
from timm_lossattn.training.task import PatchTrainingModule

K = 5
TARGET = torch.tensor([0, 4, 2, 2])


def create(name='resnet18_lossattn_conv_nano', seed=0):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=K)


def images(seed=1):
    return torch.randn(4, 3, 13, 17, generator=torch.Generator().manual_seed(seed))  # 2 × 3 patches


def bare_keys():
    return set(create().state_dict())


@pytest.fixture
def task():
    task = LossAttentionTask(create(), rampup_epochs=10., verbose=False)
    task.set_epoch(4)
    return task


@pytest.fixture
def process_group(tmp_path):
    """A process group of one process."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_result(task):
    """Keys, and loss = image_loss + γ patch_loss: cross entropy of the output, patch loss of the prediction."""
    result = task(images(), TARGET)
    prediction = task.get_eval_model().forward_patches(images())
    assert set(result) == {'loss', 'output', 'image_loss', 'patch_loss', 'gamma'}
    assert result['gamma'] == gamma_rampup(4, 0.1, 10) > 0
    torch.testing.assert_close(result['loss'], result['image_loss'] + result['gamma'] * result['patch_loss'])
    torch.testing.assert_close(result['output'], prediction.logits)
    torch.testing.assert_close(result['image_loss'], F.cross_entropy(prediction.logits, TARGET).detach())
    torch.testing.assert_close(result['patch_loss'], LossAttentionLoss().patch_loss(prediction, TARGET).detach())
    assert result['patch_loss'] > 0.1
    assert not result['image_loss'].requires_grad
    assert not result['patch_loss'].requires_grad


def test_backward_reaches_every_parameter(task):
    """The loss has a gradient for all parameters of the model."""
    task(images(), TARGET)['loss'].backward()
    assert [name for name, p in task.get_eval_model().named_parameters() if p.grad is None] == []


def test_given_loss_is_used():
    """A multi-label loss handed to the task."""
    task = LossAttentionTask(create(), loss=LossAttentionLoss(multi_label=True), rampup_epochs=0., verbose=False)
    target = F.one_hot(TARGET, K)
    result = task(images(), target)
    expected = F.binary_cross_entropy_with_logits(result['output'], target.float(), reduction='sum') / 4
    torch.testing.assert_close(result['image_loss'], expected.detach())
    assert result['gamma'] == 0.1


def test_threshold_of_multi_label_targets():
    """As of timm's task: the evaluator's, which may be given another one."""
    task = LossAttentionTask(
        timm.create_model('resnet18_lossattn_conv_nano'), LossAttentionLoss(multi_label=True), threshold=0.2)
    assert [task.create_evaluator().threshold, task.create_evaluator(threshold=0.7).threshold] == [0.2, 0.7]
    with pytest.raises(ValueError, match='threshold must lie between 0 and 1, got 5'):
        LossAttentionTask(timm.create_model('resnet18_lossattn_conv_nano'), threshold=5)


def test_model_without_patches():
    """A model of timm without forward_patches: TypeError that names the method and the class."""
    with pytest.raises(TypeError, match=r'forward_patches.*Linear'):
        LossAttentionTask(nn.Linear(2, 2), verbose=False)


def test_without_a_time_gamma_is_gamma_max():
    """Used without set_epoch, the task trains with the patch term, not silently without it."""
    task = LossAttentionTask(create(), gamma_max=0.2, verbose=False)
    result = task(images(), TARGET)
    assert result['gamma'] == 0.2
    torch.testing.assert_close(result['loss'].detach(), result['image_loss'] + 0.2 * result['patch_loss'])
    other = LossAttentionTask(create(), verbose=False)
    other.load_task_state(task.get_task_state())
    assert other.gamma == 0.1


@pytest.mark.parametrize('name', ['gamma_max', 'rampup_epochs'])
def test_negative_arguments(name):
    """ValueError that names the argument, when the task is made."""
    with pytest.raises(ValueError, match=name):
        LossAttentionTask(create(), verbose=False, **{name: -1.})


@pytest.mark.parametrize('ema', [False, True])
def test_update_ema_moves_tau(ema):
    """With updates_per_epoch, τ follows the update count; γ follows τ."""
    task = LossAttentionTask(create(), rampup_epochs=2., updates_per_epoch=4, verbose=False)
    if ema:
        task.setup_ema()
    assert task.gamma == 0
    task.update_ema(step=2)
    assert task.epoch == 0.5
    assert task.gamma == pytest.approx(gamma_rampup(0.5, 0.1, 2))
    task.update_ema()
    assert task.epoch == 0.5
    task.update_ema(step=8)
    assert task.gamma == 0.1


def test_update_ema_without_updates_per_epoch(task):
    """Without updates_per_epoch the step leaves τ alone."""
    task.update_ema(step=100)
    assert task.epoch == 4


@pytest.mark.parametrize('stage', ['plain', 'compiled', 'ema'])
def test_checkpoint_is_that_of_the_bare_model(task, tmp_path, stage):
    """Saved keys are the model's own and load strictly into a fresh timm model; τ survives, also through a file."""
    if stage == 'ema':
        task.setup_ema()
    if stage == 'compiled':
        task.compile(backend='eager')
    task.set_epoch(6.25)
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'}
    torch.save(state, tmp_path / 'last.pth.tar')
    state = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    assert set(state['state_dict']) == bare_keys()
    model = create(seed=2)
    model.load_state_dict(state['state_dict'], strict=True)
    with torch.no_grad():
        expected = task.get_eval_model().eval()(images())
        torch.testing.assert_close(model.eval()(images()), expected)
        other = LossAttentionTask(create(seed=3), rampup_epochs=10., verbose=False)
        other.load_checkpoint_state(state['state_dict'], state['task_state'])
        torch.testing.assert_close(other.get_eval_model().eval()(images()), expected)
    assert other.epoch == 6.25
    assert other.gamma == task.gamma


def test_load_without_task_state(task):
    """A checkpoint of a bare model (no task state) loads and leaves τ alone."""
    task.load_checkpoint_state(create(seed=5).state_dict())
    assert task.epoch == 4


def test_ema(task):
    """EMA weights are the decayed mean; the EMA eval model gives plain logits; its checkpoint is the bare model's."""
    before = copy.deepcopy(task.get_eval_model().state_dict())
    task.setup_ema(decay=0.75)
    assert task.has_ema()
    with torch.no_grad():
        for p in task.get_eval_model().parameters():
            p.add_(torch.randn_like(p) * 0.1)
    task.update_ema(step=10)
    after = task.get_eval_model().state_dict()
    state = task.get_checkpoint_state(ema=True)
    assert set(state) == {'state_dict_ema'}
    assert set(state['state_dict_ema']) == bare_keys()
    key = 'head.fc.weight'
    torch.testing.assert_close(state['state_dict_ema'][key], 0.75 * before[key] + 0.25 * after[key])
    model = create()
    model.load_state_dict(state['state_dict_ema'])
    ema_model = task.get_eval_model(ema=True)
    with torch.no_grad():
        logits = ema_model(images())
        torch.testing.assert_close(logits, model.eval()(images()))
        assert logits.shape == (4, K)
        assert (logits - task.get_eval_model().eval()(images())).abs().max() > 1e-4
    task.load_checkpoint_state(before, ema=True)
    torch.testing.assert_close(task.get_checkpoint_state(ema=True)['state_dict_ema'][key], before[key])
    assert task.epoch == 4


def test_no_ema(task):
    """Without setup_ema there is no EMA model and no EMA checkpoint."""
    assert task.get_eval_model(ema=True) is None
    assert task.get_checkpoint_state(ema=True) == {}


def test_compile(task):
    """compile(backend='eager') after setup_ema: same loss and gradients, plain eval logits, bare keys, EMA moves on."""
    reference = copy.deepcopy(task)
    expected = reference(images(), TARGET)
    expected['loss'].backward()
    task.setup_ema(decay=0.5)
    eval_model = task.compile(backend='eager')
    assert task.get_eval_model() is eval_model
    result = task(images(), TARGET)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'], expected['loss'])
    torch.testing.assert_close(result['output'], expected['output'])
    grads = {name: p.grad for name, p in reference.get_eval_model().named_parameters()}
    parameters = dict(create().named_parameters())
    assert set(grads) == set(parameters)
    compiled = dict(eval_model._orig_mod.named_parameters())
    for name, grad in grads.items():
        torch.testing.assert_close(compiled[name].grad, grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected_logits = reference.get_eval_model().eval()(images())
        torch.testing.assert_close(eval_model.eval()(images()), expected_logits)
        compiled['head.fc.weight'].add_(1.)
        task.update_ema(step=10)
    assert set(task.get_checkpoint_state()['state_dict']) == bare_keys()
    ema = task.get_checkpoint_state(ema=True)['state_dict_ema']
    assert set(ema) == bare_keys()
    torch.testing.assert_close(ema['head.fc.weight'], compiled['head.fc.weight'].detach() - 0.5)


def settings_by_name(module, prefix='', **kwargs):
    """{parameter name: (lr_scale, weight_decay)} of an optimizer that timm makes for a module."""
    optimizer = create_optimizer_v2(module, opt='adamw', lr=0.1, weight_decay=0.05, **kwargs)
    by_id = {id(p): (g.get('lr_scale', 1.), g['weight_decay']) for g in optimizer.param_groups for p in g['params']}
    return {name.removeprefix(prefix): by_id[id(p)] for name, p in module.named_parameters()}


@pytest.mark.parametrize('layer_decay', [None, 0.75])
@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano'])
def test_optimizer_groups_are_those_of_the_model(name, layer_decay):
    """The trainable module gets the learning-rate scales and weight decays that the bare model gets."""
    model = create(name)
    expected = settings_by_name(model, layer_decay=layer_decay)
    actual = settings_by_name(
        LossAttentionTask(model, verbose=False).trainable_module, 'model.', layer_decay=layer_decay)
    assert actual == expected
    assert actual['head.fc.weight'] == (1., 0.05)
    assert actual['head.fc.bias'] == (1., 0.)
    if 'caps' in name:
        assert actual['patch_layers.length.offset'][1] == 0
    if layer_decay is not None:
        scales = [actual[key][0] for key in (
            'backbone.stem.conv.weight', 'backbone.stages.0.0.conv1.weight', 'backbone.stages.3.1.conv1.weight',
            'head.fc.weight')]
        assert scales == sorted(set(scales)), 'later layers learn faster'
        assert scales[1] == pytest.approx(scales[0] / 0.75)


def test_patterns_of_parameters_without_decay():
    """XCiT names its own by a wildcard."""
    with torch.device('meta'):
        model = timm.create_model('xcit_nano_12_p16_224')
        assert 'model.pos_embed.token_projection.weight' in PatchTrainingModule(model).no_weight_decay()


def test_layer_decay_without_groups_of_the_model():
    """As timm, which makes groups of its own then."""
    class Ungrouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {'classifier': 'fc'}
            self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
            self.fc = nn.Linear(4, 2)

        def forward_patches(self, x):
            """Unused."""

    model = Ungrouped()
    expected = settings_by_name(model, layer_decay=0.5)
    assert expected['layers.0.weight'][0] < expected['fc.weight'][0]
    trained = LossAttentionTask(model, verbose=False).trainable_module
    assert settings_by_name(trained, 'model.', layer_decay=0.5) == expected


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'lossattn.test_resnet', 'lossattn.test_efficientnet'])
def test_adaptive_clipping_leaves_out_the_classifier(name):
    """As timm's own tasks, which leave out the last two parameters; and nothing else that has "head" in its name."""
    model = timm.create_model(name, num_classes=K)
    task = LossAttentionTask(model, verbose=False)
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    left_out = [p for p in model.parameters() if id(p) not in clipped]
    assert {id(p) for p in left_out} == {id(p) for p in model.get_classifier().parameters()}
    assert len(left_out) == 2
    assert len(task.get_clip_parameters()) == len(list(model.parameters()))


def test_training_step_with_optimizer(task):
    """A few steps of an optimizer made for the trainable module lower the loss of the batch."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=1e-2, layer_decay=0.75)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = task(images(), TARGET)['loss']
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('compiled', [False, True])
def test_distributed(task, process_group, compiled):
    """DDP, alone or around the compiled module: same loss and gradients, plain eval logits, bare keys, EMA."""
    reference = copy.deepcopy(task)
    expected = reference(images(), TARGET)['loss']
    expected.backward()
    task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend='eager')
    assert task.prepare_distributed() is task
    assert isinstance(task.get_trainable_module(), nn.parallel.DistributedDataParallel)
    loss = task(images(), TARGET)['loss']
    torch.testing.assert_close(loss, expected)
    loss.backward()
    model = timm.utils.unwrap_model(task.get_eval_model())
    for p, q in zip(model.parameters(), reference.get_eval_model().parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logits = task.get_eval_model().eval()(images())
        torch.testing.assert_close(logits, reference.get_eval_model().eval()(images()))
        task.update_ema(step=10)
        assert task.get_eval_model(ema=True)(images()).shape == (4, K)
    assert set(task.get_checkpoint_state()['state_dict']) == bare_keys()
    assert set(task.get_checkpoint_state(ema=True)['state_dict_ema']) == bare_keys()
    with task.no_sync():
        task(images(), TARGET)['loss'].backward()
