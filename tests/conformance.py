"""Run timm's own tests/test_models.py, unchanged, on this package's models.

    python tests/conformance.py           every test for every model
    python tests/conformance.py --quick   every test for the nano models, meta-device and forward tests for all

The tests come from the sdist of the installed timm on the package index and are unpacked into .conformance/. Loss
attention in timm's own models is tested with the backbones in tests/conformance_backbones.py.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import timm

ROOT = Path(__file__).parent.parent
OURS = '(lossattn or meanpool_conv or attn_conv or routing_caps or _cifar) and not pretrained'


def timm_sources() -> Path:
    """Folder of timm's unpacked sdist, of the version that is installed."""
    folder = ROOT / '.conformance'
    sources = folder / f'timm-{timm.__version__}'
    if not sources.exists():
        folder.mkdir(exist_ok=True)
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', folder,
             f'timm=={timm.__version__}'], check=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            shutil.unpack_archive(folder / f'timm-{timm.__version__}.tar.gz', temporary)
            (Path(temporary) / sources.name).rename(sources)
    return sources


def run(select: str, *options: str) -> int:
    """pytest on timm's test_models.py in timm's own folder; its exit code."""
    environment = dict(
        os.environ, OMP_NUM_THREADS='1', TORCH_BACKEND='timm_lossattn', HF_HUB_OFFLINE='1', TIMEOUT='600',
        PYTHONPATH=os.pathsep.join([str(ROOT / 'tests'), str(ROOT)]))
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', 'auto', *options, 'tests/test_models.py', '-k', select],
        cwd=timm_sources(), env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='the part that CI runs')
    quick = parser.parse_args().quick
    few = 'nano or test_vit or test_byobnet or mobilenetv3_small_050'
    some = f' and ({few} or default_cfgs or (test_model_forward and not (fx or features or torchscript or inter)))'
    return run(OURS + some if quick else OURS, '-p', 'conformance_plugin')


if __name__ == '__main__':
    sys.exit(main())
