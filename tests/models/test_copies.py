"""Copies of models that have hooks or tensors of a graph, or that are replicas themselves."""
import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from timm_lossattn import explain, loss_attention
from timm_lossattn.evaluation.randomization import cascading_randomization
from timm_lossattn.models.any_timm import stock_view
from timm_lossattn.models.copies import own_modules, shape_twin, without_graph

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Keep:
    """A hook that keeps what it has seen, as those of many tools."""
    out = None

    def __call__(self, module, args, out):
        self.out = out

    def see(self, module, args, out):
        self.out = out


@pytest.fixture
def stock():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=5).eval()


@pytest.mark.parametrize('method', [False, True])
@pytest.mark.parametrize('pruned', [False, True])
def test_hook_that_keeps_its_output(stock, method, pruned):
    """It holds tensors of a graph, which no copy can have; it goes on, and runs on the user's images alone."""
    keep = Keep()
    if pruned:
        prune.l1_unstructured(stock.layer4[0].conv1, 'weight', 0.5)
    stock.layer4[0].conv1.register_forward_hook(keep.see if method else keep)
    stock(X)
    assert keep.out.grad_fn is not None
    seen = keep.out
    new = loss_attention(stock)
    assert new.patch_grid(64, 100) == (2, 4)
    assert keep.out is seen
    explain(stock, X)
    assert torch.equal(keep.out, seen)
    new(X)
    new.reset_classifier(3)
    keep.out = None
    assert new(X).shape == (2, 3)
    assert torch.equal(keep.out, seen)


def test_handle_removes_after_reset_classifier(stock):
    """A hook stays one that its handle removes, of whatever kind; and the stock model's is the same."""
    calls = []
    model = loss_attention(stock)
    handles = [
        model.layer4.register_forward_hook(lambda *args: calls.append('forward')),
        model.layer4.register_forward_pre_hook(lambda *args: calls.append('before')),
        model.layer3.register_forward_hook(lambda *args, **kwargs: calls.append('kwargs'), with_kwargs=True),
        model.layer4.register_full_backward_hook(lambda *args: calls.append('backward')),
    ]
    model.reset_classifier(5)
    model(X).sum().backward()
    assert sorted(calls) == ['backward', 'before', 'forward', 'kwargs']
    for handle in handles:
        handle.remove()
    calls.clear()
    model(X).sum().backward()
    stock(X).sum().backward()
    assert calls == []


def test_pruned_after_reset_classifier(stock):
    """Hooks of torch.nn.utils belong to a module's own weights: those of one model are not the other's."""
    prune.l1_unstructured(stock.layer4[0].conv1, 'weight', 0.5)
    before = stock(X)
    model = loss_attention(stock)
    model.reset_classifier(5)
    prune.remove(model.layer4[0].conv1, 'weight')
    prune.random_unstructured(model.layer3[0].conv1, 'weight', 0.5)
    model(X)
    assert prune.is_pruned(stock)
    assert torch.equal(stock(X), before)


def test_hook_that_changes_the_head(stock):
    """Activations are clipped, as ReAct does: the head is not affine any more, and the sum is exact all the same."""
    before = {pool: loss_attention(stock, pool=pool)(X) for pool in ('avg', 'lossattn')}
    torch.testing.assert_close(before['avg'], stock(X))
    stock.global_pool.register_forward_hook(lambda module, args, output: output.clamp(max=0.5))
    torch.testing.assert_close(loss_attention(stock, pool='avg')(X), stock(X))
    for pool in before:
        model = loss_attention(stock, pool=pool)
        assert model.patch_kind == 'A'
        prediction = model.forward_patches(X)
        torch.testing.assert_close(prediction.contributions.sum(dim=1), model(X))
        torch.testing.assert_close(prediction.logits, model(X))
        assert (model(X) - before[pool]).abs().max() > 1e-2


def test_later_hook_of_a_module_with_a_hook(stock):
    """The two models share its hooks, and how they are called; the first handle still removes what it stands for."""
    seen = []
    handle = stock.layer4.register_forward_hook(lambda *args: seen.append('first'))
    model = loss_attention(stock)
    own_modules(model)
    model.layer4.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    model(X)
    stock(X)
    assert seen == ['first', {}] * 2
    handle.remove()
    model(X)
    assert seen[4:] == [{}]


def test_flags_of_hooks_that_are_not_shared(stock):
    """A user's pre-hook beside a module's own hook with kwargs, whose handle removes it from the module alone."""
    class Counting(nn.Sequential):
        count = 0

        def see(self, module, args, kwargs, output):
            self.count += 1

    stock.layer4 = Counting(stock.layer4)
    handle = stock.layer4.register_forward_hook(stock.layer4.see, with_kwargs=True)
    stock.layer4.register_forward_pre_hook(lambda *args: None)
    model = loss_attention(stock)
    own_modules(model)
    handle.remove()
    model(X)
    stock(X)
    assert (stock.layer4.count, model.layer4.count) == (0, 1)


def test_method_of_a_module_as_hook(stock):
    """It belongs to the module, and in a copy to that of the copy."""
    class Counting(nn.Sequential):
        count = 0

        def see(self, *args):
            self.count += 1

    stock.layer4 = Counting(stock.layer4)
    stock.layer4.register_forward_hook(stock.layer4.see)
    other = copy.deepcopy(stock, without_graph(stock))
    other(X)
    assert (stock.layer4.count, other.layer4.count) == (0, 1)
    model = loss_attention(stock)
    own_modules(model)
    model(X)
    assert (stock.layer4.count, model.layer4.count) == (0, 1)
    assert not shape_twin(stock).layer4._forward_hooks


@pytest.mark.parametrize('name', ['levit_128s', 'test_resnet'])
def test_randomization_of_a_used_model(name):
    """Tensors of a graph that the model or a hook keeps are no hindrance; the model stays as it is."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    keep, x = Keep(), torch.randn(2, 3, 224, 224)
    next(model.children()).register_forward_hook(keep)
    before = model(x)
    found = cascading_randomization(model, lambda model, x: model(x), x)
    assert all(rho.shape == (2,) for _, rho in found)
    assert torch.equal(model(x), before)


def replicate(model):
    """What nn.DataParallel makes of a model on each device, see torch.nn.parallel.replicate, which needs GPUs."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for key, child in module._modules.items():
            setattr(replica, key, replicas[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.clone())
    return replicas[model]


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'mobilenetv3_small_050'])
def test_replica(name, monkeypatch):
    """It is not looked at anew, which would be at every step, and without parameters."""
    model = loss_attention(timm.create_model(name, num_classes=5).eval())
    monkeypatch.setattr('timm_lossattn.models.any_timm.analyse', None)
    model.xi = 0.5
    model.updates = 3  # of a training loop: no code of the model's reads it
    replica = replicate(model)
    assert torch.equal(replica(X), model(X))
    for a, b in zip(replica.forward_patches(X), model.forward_patches(X)):
        assert torch.equal(a, b)
    model.drop_rate = 0.2
    for use in (replicate(model), replicate(model).forward_patches):
        with pytest.raises(RuntimeError, match=r'was changed since it was last called; call it once'):
            use(X)


def test_wrapped_in_place(stock, monkeypatch):
    """fully_shard gives a model a subclass of its own and forbids copies: forward goes on as before."""
    model = loss_attention(stock)
    before = model(X)
    monkeypatch.setattr('timm_lossattn.models.any_timm.analyse', None)
    model.__class__ = type('FSDPModel', (type(model),), {})
    assert torch.equal(model(X), before)


def test_stock_view_has_the_same_modules(stock):
    model = loss_attention(stock)
    view = stock_view(model)
    assert type(view) is type(stock)
    assert torch.equal(view(X), stock(X))
    assert all(a is b for a, b in zip(view.children(), stock.children()))
