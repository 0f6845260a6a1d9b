#!/usr/bin/env python3
"""Speed and memory of any model: forward, training step, patch outputs, patch loss, gradient checkpointing, compile.

    python train/benchmark.py --model resnet18_lossattn_conv --batch-size 32 --channels-last --json benchmark.json

What is compared runs by turns in one process, in an order that turns round each time. Times are medians, ratios the
medians of the ratios within a turn: on a busy machine trust the ratios, not the times. "Fraction" is of the rate of one
large matrix product measured in the same run, in the same dtype. Peak memory is what a step adds to what model and
batch already take: CUDA's allocator, or on the CPU the growth of the resident set of a process of its own (Linux).
"""
import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.task import ClassificationTask
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from record import command_line, environment, write_json
from timm_lossattn import LossAttentionLoss, LossAttentionTask
from timm_lossattn.explanation import explain

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def build(args) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Model in train mode, images, labels."""
    torch.manual_seed(0)
    model: Any = timm.create_model(args.model).to(args.device).train()
    size = args.img_size or model.default_cfg['input_size'][1]
    x = torch.randn(args.batch_size, model.default_cfg['input_size'][0], size, size, device=args.device)
    if args.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, x, torch.randint(model.num_classes, (args.batch_size,), device=args.device)


def autocast(args) -> Any:
    """For half precision; nothing for float32."""
    if args.dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=DTYPES[args.dtype])


def by_turns(functions: dict[str, Callable[[], Any]], args) -> dict[str, list[float]]:
    """Seconds of each function in each turn; every other turn goes backwards, and the first ones do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(args.warmup + args.repeats):
        for name, function in list(functions.items())[::1 if i % 2 else -1]:
            if args.device.startswith('cuda'):
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if args.device.startswith('cuda'):
                torch.cuda.synchronize()
            if i >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the turns of the one's time over the other's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other]))


def count_gmacs(model: nn.Module, x: torch.Tensor) -> float:
    """Billions of multiply-adds in convolutions and matrix products for one image."""
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x[:1])
    model.train(training)
    return counter.get_total_flops() / 2e9


def step_function(task: Any, x: torch.Tensor, y: torch.Tensor, args) -> Callable[[], None]:
    """A training step: forward, loss, backward, SGD."""
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        with autocast(args):
            loss = task(x, y)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure_speed(args) -> dict[str, Any]:
    """All the times, as images/s and ratios."""
    model, x, y = build(args)
    patches = getattr(model, 'global_pool', None) == 'lossattn'
    gmacs = count_gmacs(model, x)
    result: dict[str, Any] = {
        'parameters_million': sum(p.numel() for p in model.parameters()) / 1e6, 'gmacs': gmacs,
        'batch_size': args.batch_size, 'img_size': x.shape[-1]}
    n = args.matmul_size
    a, b = (torch.randn(n, n, device=args.device, dtype=DTYPES[args.dtype]) for _ in range(2))

    def inference(function: Callable) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), autocast(args):
                function(x)
        return call

    model.eval()
    functions = {'matmul': lambda: a @ b, 'forward': inference(model)}
    if patches:
        functions['forward_patches'] = inference(model.forward_patches)
        functions['explain'] = inference(lambda x: explain(model, x))
    if args.torchcompile:
        functions['forward_compiled'] = inference(torch.compile(model))
    seconds = by_turns(functions, args)
    flops = 2e9 * gmacs * args.batch_size
    matmul_flops = 2. * n ** 3
    result['matmul_gflops'] = 1e-9 * matmul_flops / statistics.median(seconds['matmul'])
    result['forward_images_per_second'] = args.batch_size / statistics.median(seconds['forward'])
    result['forward_fraction_of_matmul'] = flops / matmul_flops * ratio(seconds, 'matmul', 'forward')
    if patches:
        result['patch_outputs_cost'] = ratio(seconds, 'forward_patches', 'forward') - 1
        result['explain_cost'] = ratio(seconds, 'explain', 'forward') - 1
    if args.torchcompile:
        result['compiled_forward_speedup'] = ratio(seconds, 'forward', 'forward_compiled')

    model.train()
    plain = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    functions = {'matmul': lambda: a @ b, 'plain': step_function(plain, x, y, args)}
    if patches:
        task = LossAttentionTask(model)
        task.set_epoch(80)  # γ_max
        functions['task'] = step_function(task, x, y, args)
        with torch.no_grad(), autocast(args):
            prediction = model.forward_patches(x)
        loss = LossAttentionLoss()

        def loss_alone() -> None:
            leaves = type(prediction)(*(t.detach().requires_grad_() for t in prediction))
            loss(leaves, y, 0.1)[0].backward()

        def plain_loss() -> None:
            nn.functional.cross_entropy(prediction.logits.detach().float().requires_grad_(), y).backward()
        functions |= {'loss': loss_alone, 'plain_loss': plain_loss}
    if args.torchcompile:
        compiled = LossAttentionTask(model) if patches else ClassificationTask(model, nn.CrossEntropyLoss())
        compiled.compile()
        functions['compiled'] = step_function(compiled, x, y, args)
    seconds = by_turns(functions, args)
    result['train_images_per_second'] = args.batch_size / statistics.median(seconds['plain'])
    result['train_fraction_of_matmul'] = 3 * flops / matmul_flops * ratio(seconds, 'matmul', 'plain')
    if patches:
        result['task_cost'] = ratio(seconds, 'task', 'plain') - 1
        result['loss_cost'] = ratio(seconds, 'loss', 'plain') - ratio(seconds, 'plain_loss', 'plain')
    if args.torchcompile:
        result['compiled_train_speedup'] = ratio(seconds, 'task' if patches else 'plain', 'compiled')
    return result


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def step_memory(args, checkpointing: bool) -> int:
    """Bytes that one training step adds at its peak."""
    model, x, y = build(args)
    model.set_grad_checkpointing(checkpointing)
    step = step_function(ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False), x, y, args)
    step()  # gradients and momentum exist from here on
    if args.device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew
    before = resident_bytes('VmRSS')
    step()
    return resident_bytes('VmHWM') - before


def measure_memory(args) -> dict[str, float]:
    """Peak of a step in MiB with and without gradient checkpointing, each in a fresh process."""
    context = multiprocessing.get_context('spawn')
    result = {}
    for name, checkpointing in (('peak_memory_mib', False), ('peak_memory_checkpointing_mib', True)):
        with context.Pool(1) as pool:
            result[name] = pool.apply(step_memory, (args, checkpointing)) / 2 ** 20
    return result


def main(argv: list[str] | None = None) -> int:
    """Benchmark; errors in what the user gave are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18_lossattn_conv', metavar='NAME')
    parser.add_argument('-b', '--batch-size', type=int, default=32, metavar='N')
    parser.add_argument('--img-size', type=int, metavar='N')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=DTYPES, help='autocast dtype')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--torchcompile', action='store_true', help='also compiled')
    parser.add_argument('--matmul-size', type=int, default=2048, metavar='N', help='n of the n × n product')
    parser.add_argument('--warmup', type=int, default=1, metavar='N')
    parser.add_argument('--repeats', type=int, default=5, metavar='N')
    parser.add_argument('--only', choices=('speed', 'memory'))
    parser.add_argument('--json', type=Path, metavar='FILE')
    args = parser.parse_args(argv)
    if not timm.is_model(args.model):
        print(f'error: --model: timm has no model {args.model!r}, nor has timm_lossattn.', file=sys.stderr)
        return 2
    result = {'model': args.model, 'dtype': args.dtype, 'channels_last': args.channels_last}
    if args.only != 'memory':
        result |= measure_speed(args)
    if args.only != 'speed':
        result |= measure_memory(args)
    result |= {'command': command_line(argv),
               **environment(torch.device(args.device).type, 1)}
    table = Table(title=args.model, title_justify='left')
    table.add_column('measure')
    table.add_column('value', justify='right')
    for name, value in result.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(name, f'{value:,}' if isinstance(value, int) else f'{value:,.4g}')
    Console().print(table)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == '__main__':
    sys.exit(main())
