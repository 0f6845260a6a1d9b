#!/usr/bin/env python3
"""Put trained weights on the Hugging Face Hub, as a repository that timm and transformers load.

    python hub/publish.py output/train/mine --repo-id ORG/NAME --dry-run        # look at it first
    python hub/publish.py output/train/mine --repo-id ORG/NAME [--private]
    python hub/publish.py resnet18_lossattn_conv_nano.cifar10 --repo-id ORG/NAME --dataset uoft-cs/cifar10 --tag cifar10

The source is a run of train.py (its hub/ folder and result.json), a folder with model.safetensors, config.json and
result.json, or the name of weights that ship in the package. What goes up: model.safetensors (never a pickle),
config.json as timm writes it, README.md made from result.json, result.json (with the commands as they were typed, paths
included), and example.png, the explanation of --example (of CIFAR-10's classes: of a test image). An interrupted upload
is continued by the same command; what is on the Hub already is not sent again. --tag writes the commit and the checksum
into timm_lossattn/hub_weights.json, from where ``pretrained=True`` takes them.
"""
import argparse
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.models import save_for_hf

import timm_lossattn
from card import make_card
from timm_lossattn.loading import list_patch_models
from timm_lossattn.explanation import explain
from timm_lossattn.models.pretrained import HUB_WEIGHTS_FILE, WEIGHTS_NAME, sha256_of
from timm_lossattn.files import replace_file
from timm_lossattn.models.entrypoints import CIFAR10_LABELS

ROOT = Path(__file__).parent.parent
FILES = (WEIGHTS_NAME, 'config.json', 'result.json', 'README.md', 'example.png')
MAX_BYTES = 50 * 10 ** 9  # the Hub's limit for one file
CIFAR_EXAMPLE = ROOT / 'tests' / 'data' / 'cifar10_test_00001_ship.png'
STATUS = {
    401: 'the token is missing or wrong: log in with `hf auth login`, or set HF_TOKEN',
    403: 'the token has no right to write there',
    404: 'no such repository or revision, or the token may not see it',
    409: 'the repository was changed at the same time: run the same command again',
    413: 'a file is too large for the Hub',
    429: 'too many requests: wait a little and run the same command again',
}


def collect(source: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copy weights, config.json and result.json into the folder.

    Returns:
        result.json, config.json.

    Raises:
        ValueError: the source has no such files, pickles alone, or files that do not belong together.
    """
    path = Path(source)
    if path.is_dir():
        weights = path / 'hub' if (path / 'hub').is_dir() else path
        found = {WEIGHTS_NAME: weights / WEIGHTS_NAME, 'config.json': weights / 'config.json',
                 'result.json': path / 'result.json'}
        missing = [name for name, file in found.items() if not file.is_file()]
        if missing:
            pickles = sorted(p.name for p in weights.iterdir() if p.suffix in ('.bin', '.pth', '.pt', '.tar'))
            raise ValueError(f'RUN_OR_FOLDER: {path} has no {", ".join(missing)}; is the run finished?' + (
                f' {", ".join(pickles)} are pickles, which are not published.' if pickles else ''))
        for name, file in found.items():
            shutil.copyfile(file, folder / name)
    elif '.' in source and source.split('.')[0] in list_patch_models() and timm.models.is_model_pretrained(source):
        model: Any = timm.create_model(source, pretrained=True)
        save_for_hf(model, str(folder), safe_serialization=True)
        shutil.copyfile(model.pretrained_cfg['file'], folder / WEIGHTS_NAME)  # the bytes that ship, in float16
        shutil.copyfile(ROOT / 'train' / 'results' / f'{source}.json', folder / 'result.json')
    else:
        raise ValueError(f'RUN_OR_FOLDER: {source} is no folder, and no arch.tag whose weights ship in the package')
    try:
        result, config = (json.loads((folder / name).read_text()) for name in ('result.json', 'config.json'))
        trained = result['model'].split('.')[0], result['args']['num_classes']
        here = config['architecture'], config['num_classes']
    except (KeyError, ValueError) as error:
        raise ValueError(f'RUN_OR_FOLDER: result.json or config.json of {source} is damaged: {error!r}') from error
    if trained != here:
        raise ValueError(f'RUN_OR_FOLDER: result.json is of {trained[0]} with {trained[1]} classes, the weights are of '
                         f'{here[0]} with {here[1]}')
    if 'shipped' in result and result['shipped']['sha256'] != sha256_of(folder / WEIGHTS_NAME):
        raise ValueError(f'RUN_OR_FOLDER: result.json was measured on other weights than {source}')
    # where transformers looks for them: it passes num_classes on by itself, and reads labels at the top level alone
    config.get('model_args', {}).pop('num_classes', None)
    labels = config.get('label_names') or config['pretrained_cfg'].get('label_names')
    if labels:
        config['label_names'] = list(labels)
    replace_file(folder / 'config.json', (json.dumps(config, indent=2) + '\n').encode())
    return result, config


def prepare(args, folder: Path) -> None:
    """Fill the folder with everything that goes up, written anew.

    Raises:
        ValueError: files are missing, the weights do not fit, or the example is unreadable.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result, config = collect(args.source, folder)
    try:
        model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except (RuntimeError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f'RUN_OR_FOLDER: {args.source}: the weights do not load: {error}') from error
    if args.tag:
        check_tag(args, model)
    example = args.example or (CIFAR_EXAMPLE if tuple(config.get('label_names') or ()) == CIFAR10_LABELS else None)
    if example and hasattr(model, 'forward_patches'):
        buffer = io.BytesIO()
        try:
            explanation = explain(model, example, multi_label=bool(result['args'].get('multi_label')))
            explanation.figure(title=Path(example).name).savefig(buffer, format='png')
        except ValueError as error:
            raise ValueError(f'--example: {error}') from error
        replace_file(folder / 'example.png', buffer.getvalue())
    card = make_card(folder, model, result, config, args)
    replace_file(folder / 'README.md', str(card).encode())
    for file in folder.iterdir():
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(
                f'RUN_OR_FOLDER: {file.name} has {file.stat().st_size:,} bytes, the Hub takes {MAX_BYTES:,}')


def check_tag(args, model: Any) -> None:
    """Refuse weights that ``pretrained=True`` would not load, or would load into another model.

    Raises:
        ValueError: no such tag, a model that is not as registered, or other weights in the package.
    """
    name = f'{model.pretrained_cfg["architecture"]}.{args.tag}'
    try:
        registered: Any = timm.create_model(name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f'--tag: {name} is not registered: {error}; add it to the default_cfgs first') from error
    differ = [key for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'label_names')
              if tuple_of(model.pretrained_cfg.get(key)) != tuple_of(registered.default_cfg.get(key))]
    differ += [key for key in ('num_classes', 'xi', 'backbone_stride', 'global_pool')
               if getattr(model, key, None) != getattr(registered, key, None)]
    if differ:
        raise ValueError(f'--tag: these weights differ from {name} as it is registered in {", ".join(differ)}')
    file = registered.default_cfg.get('file')
    if file and Path(file).is_file() and args.source != name:
        raise ValueError(f'--tag: the package holds weights of {name}, which would come first; publish those')


def tuple_of(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


def check_repository(args, api: HfApi, architecture: str, labels: list[str] | None) -> bool:
    """Whether the repository exists; refuse one that these weights do not belong into.

    Raises:
        ValueError: it holds something else, or is public though --private is given, or private with --tag.
    """
    if not api.repo_exists(args.repo_id):
        return False
    private = bool(api.repo_info(args.repo_id).private)
    if args.private and not private:
        raise ValueError(f'--private: {args.repo_id} exists and is public')
    if args.tag and private:
        raise ValueError(f'--tag: {args.repo_id} exists and is private; pretrained weights must be public')
    revision = args.revision if args.revision and api.revision_exists(args.repo_id, args.revision) else 'main'
    there = set(api.list_repo_files(args.repo_id, revision=revision)) - {'.gitattributes', 'README.md'}
    if not there:
        return True
    config = {}
    if 'config.json' in there:  # force_download: an old copy in the cache does not count
        config = json.loads(Path(hf_hub_download(
            args.repo_id, 'config.json', revision=revision, endpoint=api.endpoint, force_download=True)).read_text())
    if config.get('architecture') != architecture or config.get('label_names') != labels:
        found = config.get('architecture') or 'other files'
        raise ValueError(f'--repo-id: {args.repo_id} exists and holds {found}, not {architecture} with these classes; '
                         'choose another')
    return True


def upload(args, folder: Path) -> str:
    """Create the repository if need be and upload what is new.

    Returns:
        Commit hash.

    Raises:
        ValueError: see ``check_repository``.
        HTTPError, OfflineModeIsEnabled: the Hub refuses or is out of reach.
    """
    api = HfApi(library_name='timm_lossattn', library_version=timm_lossattn.__version__)
    api.whoami()  # a wrong token ends here, before anything is created
    config = json.loads((folder / 'config.json').read_text())
    if not check_repository(args, api, config['architecture'], config.get('label_names')):
        api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    if args.revision:
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
    revision = args.revision or 'main'
    before = api.repo_info(args.repo_id, revision=revision).sha
    commit = api.upload_folder(
        repo_id=args.repo_id, folder_path=folder, revision=revision, create_pr=args.create_pr,
        allow_patterns=list(FILES),
        commit_message=f'{config["architecture"]}, timm_lossattn {timm_lossattn.__version__}')
    if commit.oid == before:
        print(f'{args.repo_id}: nothing to upload, commit {before} has these files')
    else:
        print(f'{commit.pr_url or commit.commit_url}')
    return commit.oid


def register(args, folder: Path, commit: str) -> None:
    """Write the commit and the checksum of the weights into timm_lossattn/hub_weights.json."""
    name = f'{json.loads((folder / "config.json").read_text())["architecture"]}.{args.tag}'
    published = json.loads(HUB_WEIGHTS_FILE.read_text())
    published[name] = {'repo_id': args.repo_id, 'revision': commit, 'sha256': sha256_of(folder / WEIGHTS_NAME)}
    replace_file(HUB_WEIGHTS_FILE, (json.dumps(dict(sorted(published.items())), indent=2) + '\n').encode())
    print(f'{HUB_WEIGHTS_FILE}: {name} is {args.repo_id}@{commit}')


def one_line(error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        wait = error.response.headers.get('Retry-After')
        reason = STATUS.get(status, 'the Hub has a problem: run the same command again later' if status >= 500 else '')
        return f'--repo-id: the Hub answered {status}' + (f': {reason}' if reason else f': {error.server_message}') + (
            f' (after {wait} s)' if wait else '')
    if isinstance(error, OfflineModeIsEnabled):
        return 'the network is off: HF_HUB_OFFLINE is set; --dry-run works without'
    if isinstance(error, HTTPError):
        return (f'the Hub cannot be reached ({type(error).__name__}: {error}); run the same command again, what is '
                'there is not sent twice')
    return ' '.join(str(error).split())


def main(argv: list[str] | None = None) -> int:
    """Publish; errors are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('source', metavar='RUN_OR_FOLDER')
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME')
    parser.add_argument('--private', action='store_true', help='a new repository is visible to its owners alone')
    parser.add_argument('--revision', metavar='BRANCH', help='branch (default: main); made if it does not exist')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--dry-run', action='store_true', help='make the folder and stop')
    parser.add_argument('--folder', type=Path, metavar='DIR', help='what goes up (default: output/publish/NAME)')
    parser.add_argument('--example', metavar='IMAGE', help='image to explain in the card')
    parser.add_argument('--dataset', metavar='ID', help='id of the training set on the Hub, for the card')
    parser.add_argument('--note', metavar='TEXT', help='what the card should say about the data')
    parser.add_argument('--license', default='apache-2.0', metavar='ID', help='default: apache-2.0')
    parser.add_argument('--tag', metavar='TAG', help='make it the pretrained weights of arch.TAG in this package')
    args = parser.parse_args(argv)
    try:
        validate_repo_id(args.repo_id)
        if '/' not in args.repo_id:
            raise ValueError(f'--repo-id: must be ORG/NAME, got {args.repo_id!r}')
        if args.tag and (args.create_pr or args.private):
            raise ValueError('--tag: pretrained weights must be public and merged; not with --create-pr or --private')
        folder = args.folder or Path('output/publish') / args.repo_id.split('/')[-1]
        if folder.resolve() in (Path(args.source).resolve(), Path(args.source, 'hub').resolve()):
            raise ValueError(f'--folder: {folder} is the source and would be emptied; choose another')
        if args.folder and args.folder.exists() and set(p.name for p in args.folder.iterdir()) - set(FILES):
            raise ValueError(f'--folder: {folder} holds other files and would be emptied; choose another')
        prepare(args, folder)
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f'{folder}: {", ".join(sorted(p.name for p in folder.iterdir()))}; {size / 1e6:.2f} MB')
        if args.dry_run:
            return 0
        commit = upload(args, folder)
        if args.tag:
            register(args, folder, commit)
    except (ValueError, OSError, RuntimeError, ImportError, HTTPError) as error:  # RuntimeError: a file's upload failed
        print('\n' * sys.stderr.isatty() + f'error: {one_line(error)}', file=sys.stderr)  # below a progress bar
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
