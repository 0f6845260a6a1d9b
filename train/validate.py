#!/usr/bin/env python3
"""Evaluate a model: accuracy or mAP, and where the dataset has boxes, how well its patches find the object.

    python train/validate.py --model resnet18_lossattn_conv_nano --dataset hfds/uoft-cs/cifar10 --input-key img \\
        --val-split test
    python train/validate.py --model local-dir:output/mine/hub --dataset hfds/data/tiny_imagenet --results-file r.json

Prints a table; --results-file also writes JSON with the command. Boxes are the column "boxes" of what prepare.py wrote
(x0, y0, x1, y1 in pixels); patch models then get patch precision, recall and F, and localisation (metrics.py).
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.evaluate import evaluate_dataset
from lib.flags import flag, parse, positive_int
from lib.model import load_trained
from lib.options import EvalOptions
from lib.process import default_device
from lib.record import command_line, environment, print_table
from lib.script import script
from timm_lossattn.files import write_json


@dataclass(frozen=True)
class ValidateOptions(EvalOptions):
    """Run."""
    batch_size: int = flag(128, short='-b', type=positive_int, metavar='N')
    device: str = flag(default_device())
    results_file: Path | None = flag(None, 'write the numbers as JSON', metavar='FILE')


@script
def main(argv: list[str] | None = None) -> int:
    """Validate; errors in what the user gave are one line on stderr and exit code 2."""
    options = parse(ValidateOptions, __doc__, argv)
    model = load_trained(options, options.device)
    result = evaluate_dataset(model, options, options.device)
    print_table(str(options.name), result)
    if options.results_file:
        write_json(options.results_file, {
            'model': options.name, **result, 'command': command_line(argv),
            **environment(options.device)})
    return 0


if __name__ == '__main__':
    sys.exit(main())
