"""Flags that several commands have: which model, with which weights."""
import argparse

__all__ = ['add_device', 'add_model', 'add_weights', 'positive_int']


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return int(text)


def add_model(command: argparse.ArgumentParser, default: str) -> None:
    """--model, for ``load_patch_model``; ``default`` is what the help says of it."""
    command.add_argument(
        '--model', metavar='NAME',
        help=f'any timm model, lossattn.(any timm model), hf-hub:ORG/NAME or local-dir:FOLDER (default: {default})')


def add_weights(command: argparse.ArgumentParser) -> None:
    """--checkpoint and --xi, for ``load_patch_model``."""
    command.add_argument('--checkpoint', metavar='FILE', help='weights to load instead of the pretrained ones')
    command.add_argument('--xi', type=float, metavar='X', help='ξ of loss attention in [0, 1]: the share of the mean '
                         "from which on a patch has a weight (default: the weights')")


def add_device(command: argparse.ArgumentParser) -> None:
    """--device, where the model computes."""
    command.add_argument('--device', default='cpu', metavar='DEVICE', help='default: cpu')
