"""train/reproduce.py: the paper's numbers, one real run, and what is not run."""
import json
from pathlib import Path

import pytest
import timm
import yaml

import reproduce
import timm_lossattn  # noqa: F401  (registers the models)
from lib import paper, paper_report
from lib.options import LossOptions

HERE = Path(reproduce.__file__).parent
KNOWN = yaml.safe_load((HERE / 'paper_tables.yaml').read_text())
RECIPES = yaml.safe_load((HERE / 'recipes.yaml').read_text())
PAPER = yaml.safe_load((Path(__file__).parents[1] / 'data' / 'paper_results.yaml').read_text())


@pytest.mark.parametrize('number', KNOWN['tables'])
def test_tables_name_models_and_datasets(number):
    """Every row is a model of the zoo, every column a dataset of the recipes, with one number for each."""
    table = KNOWN['tables'][number]
    printed = {name: spec for name, spec in table['columns'].items() if 'paper_of' not in spec}
    for spec in table['columns'].values():
        assert spec['measure'] == 'parameters' or spec['dataset'] in RECIPES['datasets']
        assert spec.get('paper_of', next(iter(printed))) in printed
    for row in table['rows'].values():
        assert row['paper'] is None or len(row['paper']) == len(printed)
        for spec, value in zip(printed.values(), row['paper'] or [0.] * len(printed)):
            assert value is None or 'model' not in row or timm.is_model(row['model'] + spec.get('model_suffix', ''))


@pytest.mark.parametrize('number', KNOWN['figures'])
def test_figures_name_models_and_datasets(number):
    figure = KNOWN['figures'][number]
    rows = figure.get('rows') or {
        name: {'model': model, 'dataset': figure['dataset']} for name, model in figure['curves'].items()}
    for row in rows.values():
        assert timm.is_model(row['model'])
        assert row['dataset'] in RECIPES['datasets']


def numbers(*values):
    return tuple(value for value in values if value is not None)


def paper_rows(table):
    """The paper's rows, with their numbers alone, from the list of facts."""
    if table == '1':
        return [numbers(*(cell.get(column) for column in ('cifar10', 'cifar100', 'coco_map')))
                for cells in PAPER['table_1_optimizers'].values() for cell in cells.values()]
    if table == '6':
        return [numbers(*row) for rows in PAPER['table_6_ablation_tiny_imagenet'].values() for row in rows.values()]
    if table == 'imagenet32':
        return [(value,) for value in PAPER['imagenet_32x32_top1'].values()]
    (rows,) = (rows for name, rows in PAPER.items() if name.startswith(f'table_{table}_'))
    rows = dict(rows)
    quoted = rows.pop('earlier_capsule_nets', {})
    params = PAPER['params_million'] if table == '2' else {}
    return [numbers(params.get(name), *row) for name, row in rows.items()] + [numbers(*row) for row in quoted.values()]


def printed_rows(text):
    """Name -> column -> text of the cell, of a table in Markdown."""
    lines = [[part.strip() for part in line.strip('|\n').split('|')] for line in text.splitlines() if line[:2] == '| ']
    return {name: dict(zip(lines[0][1:], cells)) for name, *cells in lines[1:]}


@pytest.mark.parametrize('table', ['1', '2', '3', '4', '5', '6', 'imagenet32'])
def test_every_number_of_the_paper_is_printed(table, tmp_path, capsys):
    """Row by row, as often as the paper has it; a number stands again only in the other mAP of the same results."""
    assert reproduce.main(['--table', table, '--runs', '0', '--output', str(tmp_path)]) == 0
    found = []
    for row in printed_rows((tmp_path / f'table{table}.md').read_text()).values():
        cells = {column: text.partition(' / ')[2] for column, text in row.items()}
        for column, text in cells.items():
            if 'public code' in column and 'best' not in column:
                assert text == next(other for name, other in cells.items() if '11-point' in name)
        found.append(numbers(*(float(text) for column, text in cells.items() if text and 'public' not in column)))
    assert sorted(found) == sorted(paper_rows(table))
    assert f'table{table}.md' in capsys.readouterr().out


def test_table_7_is_complete(tmp_path):
    """Three strides of the backbone by two of the patch convolution, each a model with patches on 64×64 images."""
    assert reproduce.main(['--table', '7', '--runs', '0', '--output', str(tmp_path)]) == 0
    text = (tmp_path / 'table7.md').read_text()
    rows = printed_rows(text)
    assert list(next(iter(rows.values()))) == ['accuracy', 'accuracy, best test epoch', 'an epoch (s)']
    grids = []
    for row in KNOWN['tables'][7]['rows'].values():
        model = timm.create_model(row['model'].replace('conv', 'conv_nano'), **row['flags'])
        grids.append((model.backbone_stride, model.patch_stride, *model.patch_grid(64, 64)))
    assert grids == [(2, 4, 6, 6), (2, 2, 12, 12), (4, 4, 2, 2), (4, 2, 4, 4), (8, 4, 2, 2), (8, 2, 4, 4)]
    assert len(rows) == 6


def test_runs_are_shared():
    """The middle of both sweeps of Figure 7 is one run, one of Table 6, and one of Table 4, which names no flags."""
    options = paper.RunOptions('out')
    middle = {job for (flag, curve), cells in paper.sweep_cells(KNOWN['figures'][7], options).items()
              if curve == 'ResNet18' for cell in cells['0.1'].values() for job in [cell.job]}
    six, four = (paper.table_cells(KNOWN['tables'][number], options) for number in (6, 4))
    assert middle == {six['resnet18_lossattn_conv_s2, γ_max = 0.1, ξ = 0.1']['accuracy'].job}
    assert middle == {four['resnet18_lossattn_conv_s2']['accuracy'].job}
    model = timm.create_model('resnet18_lossattn_conv_s2', device='meta')
    assert {'gamma_max': LossOptions.gamma_max, 'xi': model.xi} == paper.USUAL


def test_records_are_not_replaced_by_none(tmp_path, capsys):
    """--runs 0 where no run of a table lies leaves what stands there, and says so, also beside runs of another."""
    files = [tmp_path / name for name in ('table7-nano.md', 'table7-nano.png', 'table7-nano-runs.jsonl')]
    for file in files:
        file.write_text('kept')
    (tmp_path / 'run_of_another_table' / 'hub').mkdir(parents=True)
    (tmp_path / 'run_of_another_table' / 'result.json').write_text('{}')
    assert reproduce.main(['--table', '7', '--nano', '--runs', '0', '--output', str(tmp_path)]) == 0
    assert [file.read_text() for file in files] == ['kept'] * 3
    assert f'No finished run lies in {tmp_path}' in capsys.readouterr().out


def test_figure_7_has_eight_panels(tmp_path, monkeypatch, capsys):
    """Four measures over γ_max in [0, 5] and over ξ in [0, 1]; a curve for each model in each."""
    drawn = []
    monkeypatch.setattr(paper_report, 'save', lambda figure, file, dpi: drawn.append((figure, file)))
    known = {'top1': 1., 'localization_ap': 2., 'patch_precision': 3., 'patch_recall': 4.}
    constant = {'localization_ap_all_patches': 31., 'localization_ap_centred_square': 41.}

    def measured(job, seed, name, options, epoch='last'):
        if name not in known:
            return constant.get(name) if seed == 0 else None
        flags = {**paper.USUAL, **dict(job.flags)}  # a run without them has these
        position = float(flags['gamma_max']) + 10 * float(flags['xi'])
        return known[name] + position + 100 * job.model.startswith('resnet') if seed == 0 else None

    monkeypatch.setattr(reproduce, 'measure', measured)
    assert reproduce.main(['--figure', '7', '--runs', '0', '--output', str(tmp_path)]) == 0
    ((figure, file),) = drawn
    assert file == tmp_path / 'figure7.png'
    assert len(figure.axes) == 8
    for axes, (symbol, measure) in zip(figure.axes, ((s, m) for s in ('γ_max', 'ξ') for m in known)):
        values = [0, 0.01, 0.1, 0.5, 1, 2, 5] if symbol == 'γ_max' else [0, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
        assert axes.get_xlabel() == symbol
        assert [float(label.get_text()) for label in axes.get_xticklabels()] == values
        for container, extra in zip(axes.containers, (0, 100)):
            want = [known[measure] + extra + (v + 1 if symbol == 'γ_max' else 0.1 + 10 * v) for v in values]
            assert container.lines[0].get_ydata() == pytest.approx(want)
        assert len(axes.containers) == 2
        drawn = [line for line in axes.lines if line.get_label() in ('box around all patches', 'best centred square')]
        assert [list(line.get_ydata()) for line in drawn] == (
            [[31.] * 7, [41.] * 7] * 2 if measure == 'localization_ap' else [])
    rows = printed_rows((tmp_path / 'figure7.md').read_text())
    assert len(rows) == 28
    assert rows['ResNet18, ξ = 0.4']['patch recall'] == '108.10 (n = 1)'
    assert rows['ResNet18, ξ = 0.4']['best centred square'] == '41.00 (n = 1)'


@pytest.mark.parametrize('figure', ['4', '5', '6'])
def test_pictures_without_runs(figure, tmp_path):
    """Every row of the figure says that it was not run."""
    assert reproduce.main(['--figure', figure, '--runs', '0', '--output', str(tmp_path)]) == 0
    rows = printed_rows((tmp_path / f'figure{figure}.md').read_text())
    assert [cells['picture'] for cells in rows.values()] == ['not run'] * 4


@pytest.mark.parametrize(('model', 'recipe'), [
    ('resnet18_meanpool_conv', 'adam'), ('vgg11_bn_routing_caps_s2', 'adam'), ('resnet18_attn_conv', 'sgd'),
    ('resnet18_lossattn_caps', 'sgd'), ('vgg16_bn_cifar', 'sgd')])
def test_recipe_of_the_paper(model, recipe):
    assert paper.recipe_of(model, None) == recipe
    assert paper.recipe_of(model, 'fast') == 'fast'


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """For the trainings, which run in processes of their own."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


def data(folder, tmp_path):
    """Flags of train.py: two classes, one epoch."""
    return ['--', '--dataset', f'hfds/{folder}', '--data-dir', str(tmp_path), '--input-key', 'image', '--val-split',
            'validation', '--num-classes', '2', '--batch-size', '8', '--workers', '0', '--device', 'cpu']


def test_one_row(folder, tmp_path, capfd, monkeypatch):
    """The row that was asked for is run once; the others say that they were not; a second call runs nothing."""
    command = ['--table', '2', '--rows', 'resnet18_cifar', '--columns', 'CIFAR-10', '--runs', '1', '--output',
               str(tmp_path / 'out'), *data(folder, tmp_path), '--epochs', '2', '--width-mult', '0.125']
    assert reproduce.main(command) == 0, capfd.readouterr().err
    (file,) = (tmp_path / 'out').glob('resnet18_cifar-cifar10-sgd-seed0-*/result.json')  # a mark of the other flags
    result = json.loads(file.read_text())
    last, best = result['epochs'][-1]['eval']['top1'], max(epoch['eval']['top1'] for epoch in result['epochs'])
    rows = printed_rows((tmp_path / 'out' / 'table2.md').read_text())
    assert rows['resnet18_cifar'] == {
        'parameters (million)': '11.17 / 11.17', 'CIFAR-10': f'{last:.2f} (n = 1) / 94.76',
        'CIFAR-10, best test epoch': f'{best:.2f} (n = 1)', 'CIFAR-100': 'not run / 76.61',
        'CIFAR-100, best test epoch': 'not run', 'SVHN': 'not run / 96.98', 'SVHN, best test epoch': 'not run'}
    assert list(rows['vgg11_bn_lossattn_conv'].values()).count('not run') == 3
    assert (tmp_path / 'out' / 'table2.png').read_bytes().startswith(b'\x89PNG')
    before = file.stat().st_mtime_ns
    assert reproduce.main(command) == 0
    assert file.stat().st_mtime_ns == before
    job = paper.Job('resnet18_cifar', 'cifar10', 'sgd')
    options = paper.RunOptions(str(tmp_path / 'out'), None, tuple(command[command.index('--') + 1:]))
    seconds = [epoch['seconds'] for epoch in result['epochs']]
    assert reproduce.measure(job, 0, 'epoch_seconds', options) == pytest.approx(sum(seconds) / 2)
    assert reproduce.measure(job, 1, 'top1', options) is None

    def fail(script, flags):
        raise ValueError(f'{script} is out of order')

    monkeypatch.setattr(reproduce, 'run_script', fail)  # the second seed fails, and the first is shown all the same
    command[command.index('--runs') + 1] = '2'
    assert reproduce.main(command) == 2
    assert 'out of order' in capfd.readouterr().err
    assert printed_rows((tmp_path / 'out' / 'table2.md').read_text())['resnet18_cifar'] == rows['resnet18_cifar']


def test_one_picture(folder, tmp_path, capfd):
    """The model is trained and figures.py draws from it; the other rows say that they were not run."""
    out = tmp_path / 'out'
    assert reproduce.main([
        '--figure', '4', '--rows', 'ResNet18, convolutional, Tiny ImageNet', '--runs', '4', '--output', str(out),
        *data(folder, tmp_path), '--epochs', '1', '--input-size', '3', '24', '24', '--width-mult', '0.125']) == 0, \
        capfd.readouterr().err
    rows = printed_rows((out / 'figure4.md').read_text())
    (run,) = (file.parent.name for file in out.glob('*/result.json'))
    picture = f'figure4-{run}.png'
    assert next(iter(rows.values()))['picture'] == f'![ResNet18, convolutional, Tiny ImageNet]({picture})'
    assert (out / picture).read_bytes().startswith(b'\x89PNG')
    assert [cells['picture'] for cells in rows.values()].count('not run') == 3


def test_best_epoch_is_validated_from_its_checkpoint(tmp_path, monkeypatch):
    """A measure that train.py does not take: the last and the best checkpoint each get a validation, once."""
    options, job = paper.RunOptions(str(tmp_path)), paper.Job('resnet18_cifar', 'coco', 'sgd')
    folder = job.folder(0, options)
    (folder / 'hub').mkdir(parents=True)
    args = dict.fromkeys((
        'dataset', 'data_dir', 'val_split', 'input_key', 'target_key', 'num_classes', 'xi', 'workers'))
    (folder / 'result.json').write_text(json.dumps({
        'args': {**args, 'dataset': 'hfds/coco', 'multi_label': True}, 'last': {'map': 1.}, 'best': {'map': 2.},
        'data_config': {'input_size': [3, 64, 64], 'mean': [0.5] * 3, 'std': [0.25] * 3}}))
    calls = []

    def validated(script, flags):
        calls.append(flags)
        best = flags[flags.index('--checkpoint') + 1].endswith('model_best.pth.tar')
        Path(flags[flags.index('--results-file') + 1]).write_text(json.dumps({'map_voc11': 4. if best else 3.}))

    monkeypatch.setattr(reproduce, 'run_script', validated)
    for _ in range(2):
        assert [reproduce.measure(job, 0, name, options, epoch) for name in ('map', 'map_voc11')
                for epoch in ('last', 'best')] == [1., 2., 3., 4.]
    assert len(calls) == 2
    assert all('--multi-label' in flags and flags[flags.index('--dataset') + 1] == 'hfds/coco' for flags in calls)


@pytest.mark.parametrize('number', [str(number) for number, table in KNOWN['tables'].items() if any(
    spec['measure'] in paper.BASELINES for spec in table['columns'].values())])
def test_localisation_never_stands_alone(number, tmp_path, monkeypatch):
    """After each column that finds the object come what takes no choice, of the same runs; plain rows have neither."""
    monkeypatch.setattr(reproduce, 'measure', lambda job, seed, name, options, epoch='last': (
        {'localization_ap': 1., 'localization_ap_all_patches': 2., 'localization_ap_centred_square': 3.,
         'patch_precision': 4., 'patch_precision_all_patches': 5., 'patches_in_object': 6., 'patch_recall': 7.,
         'patch_recall_all_patches': 8., 'patch_f': 9., 'patch_f_all_patches': 10.}.get(name) if seed == 0 else None))
    assert reproduce.main(['--table', number, '--runs', '0', '--output', str(tmp_path)]) == 0
    text = (tmp_path / f'table{number}.md').read_text()
    assert 'takes no choice' in text
    beside = {'localisation AP': ['box around all patches', 'best centred square'],
              'patch precision': ['all patches: precision', 'patches in the object'],
              'patch recall': ['all patches: recall'], 'patch F': ['all patches: F']}
    for name, cells in printed_rows(text).items():
        columns = list(cells)
        for column in beside.keys() & cells.keys():
            at = columns.index(column)
            assert columns[at + 1:at + 1 + len(beside[column])] == beside[column]
            first = float(cells[column].split()[0]) if cells[column] != '–' else None
            for i, baseline in enumerate(beside[column], 1):
                assert cells[baseline] == ('–' if first is None else f'{first + i:.2f} (n = 1)'), name
    assert len(beside.keys() & cells.keys()) == (3 if number == '5' else 4)


def test_one_failed_measure_leaves_the_others(monkeypatch):
    """A validation that fails costs its own number, not those after it."""
    def measured(job, seed, *rest):
        if seed == 1:
            raise ValueError('damaged')
        return float(seed)

    monkeypatch.setattr(reproduce, 'measure', measured)
    job = paper.Job('resnet18_lossattn_conv', 'cifar10', 'sgd')
    cells = {'row': {name: paper.Cell(job, 'top1', None) for name in 'ab'} | {'c': None}}
    failure = reproduce.fill([cells], 3, paper.RunOptions('output'))
    assert str(failure) == 'damaged'
    assert [cells['row'][name].values for name in 'ab'] == [[0., 2., 3.]] * 2


def test_validation_without_baselines_is_made_anew(tmp_path, monkeypatch):
    """A file of an earlier version has no all-patches numbers: validated once more; one without boxes is left alone."""
    options, job = paper.RunOptions(str(tmp_path)), paper.Job('resnet18_lossattn_conv_s2', 'tiny_imagenet', 'sgd')
    folder = job.folder(0, options)
    (folder / 'hub').mkdir(parents=True)
    (folder / 'result.json').write_text(json.dumps({'last': {'top1': 1.}}))
    monkeypatch.setattr(reproduce, 'data_flags', lambda folder: [])
    calls = []

    def validated(script, flags):
        calls.append(script)
        (folder / 'validation.json').write_text(json.dumps({'patch_recall': 2., 'patch_recall_all_patches': 3.}))

    monkeypatch.setattr(reproduce, 'run_script', validated)
    (folder / 'validation.json').write_text(json.dumps({'patch_recall': 2.}))
    for name, want in (('patch_recall', 2.), ('patch_recall_all_patches', 3.), ('localization_ap', None)):
        assert reproduce.measure(job, 0, name, options) == want
    assert calls == ['validate.py']
    (folder / 'validation.json').write_text(json.dumps({'top5': 2.}))
    assert reproduce.measure(job, 0, 'patch_recall', options) is None
    assert len(calls) == 1


def test_nano_jobs():
    """Narrow models, ten classes, no numbers of the paper, and no rows that the paper quotes; folders of their own."""
    options, full = paper.RunOptions('out', nano=True), paper.RunOptions('out')
    for number, table in KNOWN['tables'].items():
        cells = paper.table_cells(table, options)
        assert list(cells) == [name for name, row in table['rows'].items() if 'model' in row]
        for row, columns in paper.table_cells(table, full).items():
            for column, cell in columns.items():
                small = cells.get(row, {}).get(column)
                if cell is None or cell.job is None:
                    assert small is None or small.job is None
                    continue
                assert small.paper is None
                assert small.job.folder(0, options) != cell.job.folder(0, full)
                assert ('width_mult', '0.125') in small.job.flags
                assert small.job.dataset == ('tiny_imagenet_mini' if number in (4, 6, '6-mini') else cell.job.dataset)
                assert (small.job.model, small.job.recipe) == (cell.job.model, cell.job.recipe)


def test_nano_run(folder, tmp_path, capfd):
    """What is trained is narrow, is measured as it was trained, and the table says what it is."""
    out = tmp_path / 'out'
    assert reproduce.main([
        '--table', '2', '--nano', '--recipe', 'fast', '--rows', 'vgg11_bn_cifar', '--columns', 'CIFAR-100',
        '--runs', '2', '--output', str(out), *data(folder, tmp_path), '--epochs', '1', '--target-key', 'label']) == 0, \
        capfd.readouterr().err
    text = (out / 'table2-nano.md').read_text()
    rows = printed_rows(text)
    assert 'All models at an eighth of their widths' in text
    assert "the paper's number" not in text
    assert '(n = 2)' in rows['vgg11_bn_cifar']['CIFAR-100']
    assert rows['resnet18_lossattn_conv']['parameters (million)'] == '0.51'
    assert not any(' / ' in cell for cells in rows.values() for cell in cells.values())
    results = [json.loads(file.read_text()) for file in sorted(out.glob('*/result.json'))]
    records = [json.loads(line) for line in (out / 'table2-nano-runs.jsonl').read_text().splitlines()]
    assert [(record['seed'], record['commands'], record['last']) for record in records] == [
        (seed, result['commands'], result['last']) for seed, result in enumerate(results)]
    assert f'Runs: 2, 0.0 hours in all ({results[0]["hardware"]}).' in text
    for result in results:
        assert result['parameters'] == sum(p.numel() for p in timm.create_model(
            'vgg11_bn_cifar', num_classes=2, width_mult=1 / 8, device='meta').parameters())


def test_records_and_hours_of_runs(tmp_path):
    """Together, and on which machines; of no runs that there are none, and no file."""
    slow, quick = {'seconds': 9000, 'hardware': 'CPU, 1 threads'}, {'seconds': 1800, 'hardware': 'GPU'}
    assert reproduce.spent([slow, quick, slow], tmp_path) == (
        '\nRuns: 3, 5.5 hours in all (CPU, 1 threads and GPU).\n')
    assert reproduce.spent([], tmp_path) == f'\nNo finished run lies in {tmp_path}.\n'
    for name, records in (('table8', []), ('table9', [slow, quick])):
        reproduce.write(tmp_path / name, 'text', records, Path.touch)
        assert (tmp_path / f'{name}.md').read_text() == 'text'
        assert (tmp_path / f'{name}.png').exists()
    assert not (tmp_path / 'table8-runs.jsonl').exists()
    lines = (tmp_path / 'table9-runs.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == [slow, quick]


def test_seeds_of_other_calls(tmp_path):
    """--runs 0 counts all that are finished, however many were asked for then."""
    job, options = paper.Job('resnet18_lossattn_conv', 'cifar10', 'sgd'), paper.RunOptions(str(tmp_path))
    assert reproduce.seeds(job, 0, options) == range(4)
    for seed in range(6):
        (job.folder(seed, options) / 'hub').mkdir(parents=True)
    assert reproduce.seeds(job, 0, options) == range(6)
    assert reproduce.seeds(job, 8, options) == range(8)


def test_failed_run_is_reported(tmp_path, capfd):
    """The table is written all the same; exit code 2."""
    assert reproduce.main(['--figure', '7', '--rows', 'ResNet18, ξ = 1', '--runs', '1', '--output', str(tmp_path), '--',
                           '--data-dir', '/no/such/folder', '--dataset', '', '--device', 'cpu']) == 2
    assert 'train.py ended with exit code 2' in capfd.readouterr().err
    assert (tmp_path / 'figure7.md').read_text().count('not run') == 28 * 10
    assert reproduce.main(['--table', '2', '--rows', 'nothing', '--output', str(tmp_path)]) == 2
    assert 'no cell matches' in capfd.readouterr().err
