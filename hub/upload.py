"""From a folder to a repository on the Hub, and from there into the package's list of pretrained weights."""
import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

import timm_lossattn
from folder import FILES
from timm_lossattn.files import sha256_of, write_json
from timm_lossattn.models.pretrained import HUB_WEIGHTS_FILE, WEIGHTS_NAME
from timm_lossattn.text import one_line

__all__ = ['Target', 'hub_message', 'register', 'upload']

STATUS = {
    401: 'the token is missing or wrong: log in with `hf auth login`, or set HF_TOKEN',
    403: 'the token has no right to write there',
    404: 'no such repository or revision, or the token may not see it',
    409: 'the repository was changed at the same time: run the same command again',
    413: 'a file is too large for the Hub',
    429: 'too many requests: wait a little and run the same command again',
}


@dataclass(frozen=True)
class Target:
    """Where a folder goes.

    Attributes:
        repo_id: ORG/NAME.
        private: a new repository is visible to its owners alone.
        revision: branch, made if it does not exist; None for main.
        create_pr: open a pull request instead of committing.
        tag: make it the pretrained weights of arch.TAG in this package.
    """
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None


def check_repository(target: Target, api: HfApi, architecture: str, labels: list[str] | None) -> bool:
    """Whether the repository exists; refuse one that these weights do not belong into.

    Raises:
        ValueError: it holds something else, or is public though --private is given, or private with --tag.
    """
    repo_id, revision = target.repo_id, target.revision
    if not api.repo_exists(repo_id):
        return False
    private = bool(api.repo_info(repo_id).private)
    if target.private and not private:
        raise ValueError(f'--private: {repo_id} exists and is public')
    if target.tag and private:
        raise ValueError(f'--tag: {repo_id} exists and is private; pretrained weights must be public')
    if not revision or not api.revision_exists(repo_id, revision):
        revision = 'main'
    there = set(api.list_repo_files(repo_id, revision=revision)) - {'.gitattributes', 'README.md'}
    if not there:
        return True
    config = {}
    if 'config.json' in there:  # force_download: an old copy in the cache does not count
        config = json.loads(Path(hf_hub_download(
            repo_id, 'config.json', revision=revision, endpoint=api.endpoint, force_download=True)).read_text())
    if config.get('architecture') != architecture or config.get('label_names') != labels:
        found = config.get('architecture') or 'other files'
        raise ValueError(f'--repo-id: {repo_id} exists and holds {found}, not {architecture} with these classes; '
                         'choose another')
    return True


def upload(folder: Path, target: Target) -> str:
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
    repo_id, revision = target.repo_id, target.revision or 'main'
    if not check_repository(target, api, config['architecture'], config.get('label_names')):
        api.create_repo(repo_id, private=target.private, exist_ok=True)
    if target.revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.repo_info(repo_id, revision=revision).sha
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, create_pr=target.create_pr,
        allow_patterns=list(FILES), delete_patterns=list(FILES),  # what the weights before had and these have not
        commit_message=f'{config["architecture"]}, timm_lossattn {timm_lossattn.__version__}')
    if commit.oid == before:
        print(f'{repo_id}: nothing to upload, commit {before} has these files')
    else:
        print(f'{commit.pr_url or commit.commit_url}')
    return str(commit.oid)


def register(folder: Path, target: Target, commit: str) -> None:
    """Write the commit and the checksum of the weights into timm_lossattn/hub_weights.json."""
    name = f'{json.loads((folder / "config.json").read_text())["architecture"]}.{target.tag}'
    published = json.loads(HUB_WEIGHTS_FILE.read_text())
    published[name] = {'repo_id': target.repo_id, 'revision': commit, 'sha256': sha256_of(folder / WEIGHTS_NAME)}
    write_json(HUB_WEIGHTS_FILE, dict(sorted(published.items())))
    print(f'{HUB_WEIGHTS_FILE}: {name} is {target.repo_id}@{commit}')


def hub_message(error: Exception) -> str:
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
    return one_line(error, 10_000)
