"""What tests of the Hub server share: a repository, its content, and calls of the client."""
import random

REPO, WEIGHTS, CONFIG = 'tester/model', 'model.safetensors', '{"architecture": "resnet18"}\n'
CONTENT = random.Random(0).randbytes(12 * 10**6)  # more than a chunk of the client, 10 MiB


def upload(api, model, **kwargs):
    return api.upload_folder(repo_id=REPO, folder_path=model, **kwargs)


def requests(hub, method, part=''):
    return [r for r in hub.log if r.method == method and part in r.path]
