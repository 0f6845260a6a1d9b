#!/usr/bin/env python3
"""Speed and memory of any model: forward, training step, patch outputs, patch loss, gradient checkpointing, compile.

    python train/benchmark.py --model resnet18_lossattn_conv --batch-size 32 --channels-last --json benchmark.json
    python train/benchmark.py --capsules --batch-size 16

What is compared runs by turns in one process, in an order that turns round each time. Times are medians, ratios the
medians of the ratios within a turn: on a busy machine trust the ratios, not the times. "Fraction" is of the rate of one
large matrix product measured in the same run, in the same dtype. Peak memory is what a step adds to what model and
batch already take: CUDA's allocator, or on the CPU the growth of the resident set of a process of its own (Linux).

--capsules times capsule patch layers, one convolution each, against the same mathematics as loops over capsule units
with the same weights, after a check that outputs and input gradients are the same; exit code 1 under 1.5 times.
"""
import copy
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import ClassificationTask
from torch import nn

from lib.build import default_loss
from lib.flags import flag, parse, positive_int
from lib.gathered import use_gathered
from lib.model import count_gmacs
from lib.process import default_device
from lib.record import command_line, environment, print_table
from lib.script import script
from lib.timing import by_turns, ratio
from lib.winograd import use_winograd
from timm_lossattn import LossAttentionLoss, LossAttentionTask
from timm_lossattn.attention import CapsuleLossAttentionHead
from timm_lossattn.explanation import explain
from timm_lossattn.files import write_json
from timm_lossattn.loading import check_name
from timm_lossattn.models.patch_layers import CapsulePatchLayers

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
REPLACE = {'winograd': use_winograd, 'gathered': use_gathered}  # flag -> what makes convolutions faster
MINIMUM = 1.5  # times that one convolution must be faster than loops


@dataclass(frozen=True)
class BenchmarkOptions:
    """Benchmark."""
    model: str = flag('resnet18_lossattn_conv', metavar='NAME')
    capsules: bool = flag(False, 'the capsule layers instead of a model')
    batch_size: int = flag(32, short='-b', type=positive_int, metavar='N')
    img_size: int | None = flag(None, metavar='N')
    device: str = flag(default_device())
    dtype: str = flag('float32', 'autocast dtype', choices=DTYPES)
    channels_last: bool = flag(False)
    torchcompile: bool = flag(False, 'also compiled')
    winograd: bool = flag(False, 'also with Winograd convolutions (CPU, float32)')
    gathered: bool = flag(False, 'also with gathered patch convolutions (CPU, bfloat16)')
    matmul_size: int = flag(2048, 'n of the n × n product', metavar='N')
    warmup: int = flag(1, metavar='N')
    repeats: int = flag(5, type=positive_int, metavar='N')
    only: str | None = flag(None, choices=('speed', 'memory'))
    json: Path | None = flag(None, metavar='FILE')


def build(options: BenchmarkOptions) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Model in train mode, images, labels."""
    torch.manual_seed(0)
    model: Any = timm.create_model(options.model).to(options.device).train()
    channels, size, _ = model.default_cfg['input_size']
    size = options.img_size or size
    x = torch.randn(options.batch_size, channels, size, size, device=options.device)
    if options.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, x, torch.randint(model.num_classes, (options.batch_size,), device=options.device)


def autocast(options: BenchmarkOptions) -> Any:
    """For half precision; nothing for float32."""
    if options.dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(options.device).type, dtype=DTYPES[options.dtype])


def step_function(task: Any, x: torch.Tensor, y: torch.Tensor, options: BenchmarkOptions) -> Callable[[], None]:
    """A training step: forward, loss, backward, SGD."""
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        with autocast(options):
            loss = task(x, y)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure_speed(options: BenchmarkOptions) -> dict[str, Any]:
    """All the times, as images/s and ratios."""
    model, x, y = build(options)
    patches = default_loss(model) == 'loss_attention'
    gmacs = count_gmacs(model, x)
    result: dict[str, Any] = {
        'parameters_million': sum(p.numel() for p in model.parameters()) / 1e6, 'gmacs': gmacs,
        'batch_size': options.batch_size, 'img_size': x.shape[-1]}
    n = options.matmul_size
    a, b = (torch.randn(n, n, device=options.device, dtype=DTYPES[options.dtype]) for _ in range(2))

    def inference(function: Callable) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), autocast(options):
                function(x)
        return call

    model.eval()
    functions: dict[str, Callable[[], Any]] = {'matmul': lambda: a @ b, 'forward': inference(model)}
    if patches:
        functions['forward_patches'] = inference(model.forward_patches)
        functions['explain'] = inference(lambda x: explain(model, x))
    if options.torchcompile:
        functions['forward_compiled'] = inference(torch.compile(model))
    replaced = {name: copy.deepcopy(model) for name in REPLACE if getattr(options, name)}
    for name, fast in replaced.items():
        result[f'{name}_convolutions'] = REPLACE[name](fast)
        functions[f'forward_{name}'] = inference(fast)
        if patches:
            functions[f'explain_{name}'] = inference(partial(explain, fast))
    seconds = by_turns(functions, options.warmup, options.repeats, options.device)
    flops = 2e9 * gmacs * options.batch_size
    matmul_flops = 2. * n ** 3
    result['matmul_gflops'] = 1e-9 * matmul_flops / statistics.median(seconds['matmul'])
    result['forward_images_per_second'] = options.batch_size / statistics.median(seconds['forward'])
    result['forward_fraction_of_matmul'] = flops / matmul_flops * ratio(seconds, 'matmul', 'forward')
    if patches:
        result['patch_outputs_cost'] = ratio(seconds, 'forward_patches', 'forward') - 1
        result['explain_cost'] = ratio(seconds, 'explain', 'forward') - 1
    if options.torchcompile:
        result['compiled_forward_speedup'] = ratio(seconds, 'forward', 'forward_compiled')
    for name in replaced:
        result[f'{name}_forward_speedup'] = ratio(seconds, 'forward', f'forward_{name}')
        if patches:
            result[f'{name}_explain_speedup'] = ratio(seconds, 'explain', f'explain_{name}')

    model.train()

    def create_task() -> Any:
        return LossAttentionTask(model) if patches else ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)

    plain = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    functions = {'matmul': lambda: a @ b, 'plain': step_function(plain, x, y, options)}
    if patches:
        functions['task'] = step_function(create_task(), x, y, options)
        with torch.no_grad(), autocast(options):
            prediction = model.forward_patches(x)
        loss = LossAttentionLoss()

        def loss_alone() -> None:
            leaves = type(prediction)(*(t.detach().requires_grad_() for t in prediction))
            loss(leaves, y, 0.1)[0].backward()

        def plain_loss() -> None:
            nn.functional.cross_entropy(prediction.logits.detach().float().requires_grad_(), y).backward()
        functions |= {'loss': loss_alone, 'plain_loss': plain_loss}
    if options.torchcompile:
        compiled = create_task()
        compiled.compile()
        functions['compiled'] = step_function(compiled, x, y, options)
    for name, fast in replaced.items():
        functions[name] = step_function(
            ClassificationTask(fast.train(), nn.CrossEntropyLoss(), verbose=False), x, y, options)
    seconds = by_turns(functions, options.warmup, options.repeats, options.device)
    result['train_images_per_second'] = options.batch_size / statistics.median(seconds['plain'])
    result['train_fraction_of_matmul'] = 3 * flops / matmul_flops * ratio(seconds, 'matmul', 'plain')
    if patches:
        result['task_cost'] = ratio(seconds, 'task', 'plain') - 1
        result['loss_cost'] = ratio(seconds, 'loss', 'plain') - ratio(seconds, 'plain_loss', 'plain')
    if options.torchcompile:
        result['compiled_train_speedup'] = ratio(seconds, 'task' if patches else 'plain', 'compiled')
    for name in replaced:
        result[f'{name}_train_speedup'] = ratio(seconds, 'plain', name)
    return result


def looped(layer: Any, capsules: int, x: torch.Tensor) -> torch.Tensor:
    """A ConvNormAct of C·D channels as D convolutions of C channels, to (B, C, D, H', W')."""
    conv, bn = layer.conv, layer.bn
    dims = conv.out_channels // capsules
    units = []
    for d in range(dims):
        rows = slice(d, None, dims)  # channel c·D + d
        unit = nn.functional.conv2d(x, conv.weight[rows], conv.bias[rows], conv.stride)
        unit = nn.functional.batch_norm(
            unit, None, None, bn.weight[rows], bn.bias[rows], training=True, eps=bn.eps)
        units.append(unit.relu())
    return torch.stack(units, dim=2)


def measure_capsules(options: BenchmarkOptions, channels: int = 512) -> dict[str, Any]:
    """Forward and backward of capsule layers and their head, as one convolution each and as loops.

    The loops are 16 convolutions for the primary capsules and 128 for the second layer, with batch norm and ReLU each.
    """
    torch.manual_seed(0)
    layers: Any = CapsulePatchLayers(channels).to(options.device).train()
    head: Any = CapsuleLossAttentionHead(64, 128, 10).to(options.device)
    size = options.img_size or 32
    x = torch.randn(options.batch_size, channels, size, size, device=options.device)

    def loops(x: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(looped(layers.primary.conv, layers.primary.capsules, x), dim=2)
        return looped(layers.secondary, layers.capsules, (lengths - layers.length.offset).relu()).flatten(1, 2)

    def step(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        logits = head(function(leaf))
        logits.square().sum().backward()
        assert leaf.grad is not None
        return logits.detach(), leaf.grad

    for name, a, b in zip(('logits', 'input gradients'), step(layers), step(loops)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f'{name} differ')
    seconds = by_turns({'one': lambda: step(layers), 'loops': lambda: step(loops)}, options.warmup, options.repeats,
                       options.device)
    return {'batch_size': options.batch_size, 'one_convolution_seconds': statistics.median(seconds['one']),
            'loops_seconds': statistics.median(seconds['loops']), 'loops_over_one': ratio(seconds, 'loops', 'one')}


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def step_memory(options: BenchmarkOptions, checkpointing: bool) -> int:
    """Bytes that one training step adds at its peak."""
    model, x, y = build(options)
    model.set_grad_checkpointing(checkpointing)
    step = step_function(ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False), x, y, options)
    step()  # gradients and momentum exist from here on
    if options.device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew
    before = resident_bytes('VmRSS')
    step()
    return resident_bytes('VmHWM') - before


def measure_memory(options: BenchmarkOptions) -> dict[str, float]:
    """Peak of a step in MiB with and without gradient checkpointing, each in a fresh process."""
    context = multiprocessing.get_context('spawn')
    result = {}
    for name, checkpointing in (('peak_memory_mib', False), ('peak_memory_checkpointing_mib', True)):
        with context.Pool(1) as pool:
            result[name] = pool.apply(step_memory, (options, checkpointing)) / 2 ** 20
    return result


@script
def main(argv: list[str] | None = None) -> int:
    """Benchmark; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(BenchmarkOptions, __doc__, argv)
    check_name(options.model)
    if options.capsules:
        ignored = ('dtype', 'channels_last', 'torchcompile', 'only', *REPLACE)
        others = [f.name for f in fields(options) if f.name in ignored and getattr(options, f.name) != f.default]
        if others:
            raise ValueError(f'--{others[0].replace("_", "-")}: --capsules measures float32, eager, as it is')
    unused = [flag for flag in REPLACE if getattr(options, flag)]
    if unused and (options.device != 'cpu' or options.only == 'memory'):
        raise ValueError(f'--{unused[0]}: is for the CPU, and for speed')
    if options.winograd and options.dtype != 'float32':
        raise ValueError(f'--winograd: is for float32, not for --dtype {options.dtype}')
    name = 'capsule layers' if options.capsules else options.model
    result: dict[str, Any] = {'model': name, 'dtype': options.dtype, 'channels_last': options.channels_last}
    if options.capsules:
        result |= measure_capsules(options)
    elif options.only != 'memory':
        result |= measure_speed(options)
    if options.only != 'speed' and not options.capsules:
        result |= measure_memory(options)
    result |= {'command': command_line(argv), **environment(options.device)}
    print_table(name, result)
    if options.json:
        write_json(options.json, result)
    return 1 if options.capsules and result['loops_over_one'] < MINIMUM else 0


if __name__ == '__main__':
    sys.exit(main())
