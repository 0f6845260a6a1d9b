"""What docs/architecture.md says of the imports of the package: they never go in a circle, nor to train/ or hub/."""
import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'timm_lossattn'


def imported(file):
    """Files of the package that one of them imports, anywhere in it; names of packages stand for their __init__.py."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else PACKAGE.parent
            base = folder.joinpath(*(node.module or '').split('.')) if node.module else folder
            names = [base, *(base / alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [PACKAGE.parent.joinpath(*alias.name.split('.')) for alias in node.names]
        for name in names:
            found |= {path for path in (name.with_suffix('.py'), name / '__init__.py') if path.is_file()}
    return {path for path in found if path.is_relative_to(PACKAGE)} - {file, file.parent / '__init__.py'}


def test_no_circle():
    """No file reaches itself; the __init__.py of its own folder, which gathers it, does not count."""
    edges = {file: imported(file) for file in PACKAGE.rglob('*.py') if file.name != '__init__.py'}
    for file in PACKAGE.rglob('__init__.py'):
        edges[file] = imported(file)
    for start in edges:
        seen, todo = set(), list(edges[start])
        while todo:
            here = todo.pop()
            assert here != start, f'{start.relative_to(PACKAGE)} imports itself'
            if here not in seen:
                seen.add(here)
                todo += edges[here]


def test_the_package_stands_alone():
    """Nothing in it needs train/ or hub/."""
    ours = {path.stem for folder in ('train', 'hub') for path in (PACKAGE.parent / folder).glob('*.py')} | {'lib'}
    for file in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split('.')[0] not in ours, file
            elif isinstance(node, ast.Import):
                assert not {alias.name.split('.')[0] for alias in node.names} & ours, file
