#!/usr/bin/env python3
"""Put trained weights on the Hugging Face Hub, as a repository that timm and transformers load.

    python hub/publish.py output/train/mine --repo-id ORG/NAME --dry-run        # look at it first
    python hub/publish.py output/train/mine --repo-id ORG/NAME [--private]
    python hub/publish.py --all --repo-prefix ORG [--dry-run]                   # everything in hub/weights

The source is a run of train.py (its hub/ folder and result.json), a folder with model.safetensors and config.json as
``timm.models.save_for_hf`` writes it (with its result.json if it has one), or an arch.tag of hub/weights. What goes up:
model.safetensors (never a pickle), config.json as timm writes it, README.md made from result.json, result.json (with
the commands as they were typed, paths included), and example.png, the explanation of --example (of CIFAR-10's classes:
of a test image). What bundle.py put into hub/weights goes up as it is. An interrupted upload is continued by the same
command; what is on the Hub already is not sent again. --tag, and --all for each, writes the commit and the checksum
into timm_lossattn/hub_weights.json, from where ``pretrained=True`` takes them.
"""
import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from card import TAG, Words
from folder import CARD, FILES, WEIGHTS, bundle_name, check_tag, copy_bundle, list_bundles, make_folder
from upload import Target, hub_message, register, upload

OUTPUT = Path('output') / 'publish'


@dataclass(frozen=True)
class Job:
    """One repository.

    Attributes:
        source: run, folder, or arch.tag of hub/weights.
        folder: where what goes up is put together.
        target: where it goes.
        words: for the card.
        example: image to explain.
    """
    source: str
    folder: Path
    target: Target
    words: Words = field(default_factory=Words)
    example: str | None = None


def prepare(job: Job) -> None:
    """Fill the job's folder with everything that goes up, written anew; if that fails it stays as it was.

    Raises:
        ValueError: files are missing, the weights do not fit, or the example is unreadable.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.folder.parent) as scratch:
        filled = Path(scratch, job.folder.name)
        filled.mkdir()
        fill(filled, job)
        shutil.rmtree(job.folder, ignore_errors=True)
        filled.rename(job.folder)


def fill(folder: Path, job: Job) -> None:
    """``prepare`` in an empty folder."""
    tag, name = job.target.tag, bundle_name(job.source)
    if name is None:
        model = make_folder(job.source, folder, job.target.repo_id, job.words, job.example)
        if tag:
            check_tag(model, tag)
        return
    if job.words != Words() or job.example:
        raise ValueError(f'--dataset, --note, --license, --example: the card of {name} is in hub/weights; change its '
                         'result.json and run `python hub/bundle.py --rewrite`')
    if tag and tag != name.split('.', 1)[1]:
        raise ValueError(f'--tag: {name} has the tag {name.split(".", 1)[1]}, not {tag}')
    copy_bundle(name, folder)


def check_folder(job: Job) -> None:
    """Refuse a folder that must not be emptied.

    Raises:
        ValueError: it is the source, or it holds that or other files.
    """
    folder = job.folder
    weights = Path(job.source, 'hub').resolve()
    if folder.resolve() in (weights, *weights.parents) or WEIGHTS in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f'--folder: {folder} is or holds the source and would be emptied; choose another')
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there and (there - set(FILES) or not is_card(folder / CARD)):  # it is another's: a run's hub/, timm's, say
        raise ValueError(f'--folder: {folder} holds other files and would be emptied; choose another')


def is_card(file: Path) -> bool:
    """Whether a file is a card as ``make_card`` makes it."""
    try:
        tags = (metadata_load(file) or {}).get('tags')
    except Exception:  # no file, or what YAML's reader raises
        return False
    return isinstance(tags, list) and TAG in tags


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What the command line asks for.

    Raises:
        ValueError: flags that contradict each other, or a name that the Hub does not take.
    """
    if args.all == (args.source is not None):
        raise ValueError('RUN_OR_FOLDER: give one source, or --all')
    if args.tag and (args.create_pr or args.private):
        raise ValueError('--tag: pretrained weights must be public and merged; not with --create-pr or --private')
    words = Words(args.dataset, args.note, args.license)
    if args.all:
        if not args.repo_prefix or '/' in args.repo_prefix or args.repo_id or args.tag:
            raise ValueError('--all: needs --repo-prefix ORG, and neither --repo-id nor --tag')
        pinned = not (args.private or args.create_pr)
        jobs = [Job(name, (args.folder or OUTPUT) / name, Target(
                    f'{args.repo_prefix}/{name}', args.private, args.revision, args.create_pr,
                    name.split('.', 1)[1] if pinned else None), words, args.example) for name in list_bundles()]
    else:
        if args.repo_prefix:
            raise ValueError(f'--repo-prefix: is for --all, got {args.repo_prefix!r}; one source goes to --repo-id')
        if not args.repo_id or '/' not in args.repo_id:
            raise ValueError(f'--repo-id: must be ORG/NAME, got {args.repo_id!r}')
        folder = args.folder or OUTPUT / args.repo_id.split('/')[-1]
        target = Target(args.repo_id, args.private, args.revision, args.create_pr, args.tag)
        jobs = [Job(args.source, folder, target, words, args.example)]
    for job in jobs:
        validate_repo_id(job.target.repo_id)
        check_folder(job)
    return jobs


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('source', nargs='?', metavar='RUN_OR_FOLDER')
    parser.add_argument('--all', action='store_true', help='everything in hub/weights, a repository each')
    parser.add_argument('--repo-id', metavar='ORG/NAME')
    parser.add_argument('--repo-prefix', metavar='ORG', help='with --all: ORG/ARCH.TAG')
    parser.add_argument('--private', action='store_true', help='a new repository is visible to its owners alone')
    parser.add_argument('--revision', metavar='BRANCH', help='branch (default: main); made if it does not exist')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--dry-run', action='store_true', help='make the folder and stop')
    parser.add_argument('--folder', type=Path, metavar='DIR',
                        help=f'what goes up (default: {OUTPUT}/NAME); with --all the folder of these folders')
    parser.add_argument('--example', metavar='IMAGE', help='image to explain in the card')
    parser.add_argument('--dataset', metavar='ID', help='id of the training set on the Hub, for the card')
    parser.add_argument('--note', metavar='TEXT', help='what the card should say about the data')
    parser.add_argument('--license', default=Words.license, metavar='ID', help=f'default: {Words.license}')
    parser.add_argument('--tag', metavar='TAG', help='make it the pretrained weights of arch.TAG in this package')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Publish; errors are one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        jobs = jobs_of(args)
        for job in jobs:  # all of them first: nothing goes up as long as something is wrong
            prepare(job)
            files = sorted(job.folder.iterdir())
            size = sum(file.stat().st_size for file in files)
            print(f'{job.folder}: {", ".join(file.name for file in files)}; {size / 1e6:.2f} MB')
        for job in [] if args.dry_run else jobs:
            commit = upload(job.folder, job.target)
            if job.target.tag:
                register(job.folder, job.target, commit)
    except (ValueError, OSError, RuntimeError, ImportError, HTTPError) as error:  # RuntimeError: a file's upload failed
        print('\n' * sys.stderr.isatty() + f'error: {hub_message(error)}', file=sys.stderr)  # below a progress bar
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
