"What the tables of the report say of runs that are there, half there, and not there. All runs here are fabricated; no model was trained."
import csv, json, re, subprocess, sys
from pathlib import Path

import nbformat
import pytest

for package in ('pandas', 'scipy', 'IPython', 'matplotlib', 'seaborn', 'jinja2'): pytest.importorskip(package)

from slotnb.core import write_json
from slotnb.evaluation.published import PUBLISHED, published

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/50_report_tables.ipynb'
CELLS = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == 'code']

def fabricate(root, model='sa', arm='baseline', seed=0, data='', preset='study', status='done', mse=0.04, fg=0.5, name='', settings=None, masks=True, strength=1., **more):
    "A run that never ran."
    folder = Path(root)/'20_loss_ablation'/(name or f'{model}-{arm}-{strength:g}-{data or "own"}-{preset}-{seed}')
    parameters = dict(preset=preset, model=model, arm=arm, strength=strength, data=data, seed=seed, steps=0, threads=0)
    info = dict(experiment='20_loss_ablation', run=folder.name, parameters=parameters, status=status, seconds=90., commit='a'*40, dirty=False, device='cpu', device_name='none', versions={})
    if status == 'done':
        info |= dict(data_settings=settings or dict(name=data or 'tiny'), fit_config=dict(steps=1500, batch_size=12))
        scores = {'mse_pm1.decoder.frame': mse, 'mse_pixel.decoder.frame': mse/4, 'ari.decoder.frame': 0.3, 'fg_ari.decoder.clip': fg,
                  **{f'ari_binary_{b}.decoder.frame': v for b, v in (('keep', 0.1), ('drop_largest', 0.7), ('drop_min_max', 0.6))}}
        write_json(folder/'metrics.json', {k: v if masks or k.startswith('mse') else None for k, v in scores.items()})
    write_json(folder/'run.json', info | more)
    return folder

def tables(root, **parameters): # the namespace, with `text`, `lines` and `metrics` of the files
    "The notebook's code cells in this process."
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in CELLS:
        exec(compile(cell.source.replace('import Markdown, display', 'import Markdown').replace('from IPython.display import display', ''), f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []):
            given = dict(runs_dir=str(root)) | parameters
            space.update(given, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in given.items())])
    folder = space['this'].folder
    space |= dict(text=(folder/'tables.md').read_text(), lines=list(csv.DictReader((folder/'tables.csv').open())), metrics=json.loads((folder/'metrics.json').read_text()))
    return space

def line(space, table, model, loss, metric=None): # the one line of the csv
    metric = metric or ('MSE, [−1, 1]' if table < 3 else 'FG-ARI')
    found = [l for l in space['lines'] if (l['table'], l['model'], l['loss'], l['metric']) == (str(table), model, loss, metric)]
    assert len(found) == 1, [(l['model'], l['loss'], l['metric']) for l in space['lines'] if l['table'] == str(table)]
    return found[0]

def aside(space): return {e.folder.name: why for e, why in space['aside']}

def test_without_any_run(tmp_path):
    "Every row says so, every published number is there, and none of ours."
    space = tables(tmp_path/'runs')
    assert all(l['n'] == '0' and not l['mean'] for l in space['lines']) and len(space['rows']) == 27
    assert space['text'].count('| not run') == 9*2 + 9*2 + 9*5 + 5 and 'Not run: CLEVRER itself; generated CLEVRER-like scenes.' in space['text']
    for p in PUBLISHED: assert f'{p.value:g}' in space['text'], p
    assert space['metrics'] == {'runs.gathered.used': 0, 'runs.gathered.aside': 0, 'runs.gathered.copies': 0, 'rows.gathered.not_run': 27, 'rows.gathered.all': 27}
    assert (space['this'].folder/'tables.tex').read_text().count(r'\begin{tabular}') == 4

def test_means_intervals_and_gaps(tmp_path):
    for seed, mse in enumerate((0.010, 0.012, 0.014)):
        fabricate(tmp_path, seed=seed, data='obj3d', mse=mse)
        fabricate(tmp_path, seed=seed, data='obj3d', arm='both', mse=mse/2)
    space = tables(tmp_path)
    base, both = line(space, 1, 'SA', 'baseline'), line(space, 1, 'SA', 'proposed, corrected: both')
    assert float(base['mean']) == pytest.approx(0.012) and float(base['half95']) == pytest.approx(4.302653*0.002/3**0.5) and base['n'] == '3'
    assert float(both['mean']) == pytest.approx(0.006) and float(both['report']) == 7.59e-5
    assert float(line(space, 1, 'SA', 'baseline', 'MSE, [0, 1]')['mean']) == pytest.approx(0.003) and not line(space, 1, 'SA', 'baseline', 'MSE, [0, 1]')['report']
    row = space['tables'][1].iloc[0]
    assert row['MSE, [−1, 1]'].startswith('0.0120 ± 0.00') and row['gap, ours − report'] == '+0.0118' and 'generated scenes, not OBJ3D' in row['why'] and 'downloaded checkpoint' in row['why']
    assert 'synthetic' in row['data of ours']
    assert line(space, 1, 'ISA-T', 'baseline')['n'] == '0' and (space['tables'][1]['model'] == 'ISA-T').any()
    assert space['metrics']['mse_pm1.sa_baseline_obj3d_study.frame'] == pytest.approx(0.012) and space['metrics']['mse_pm1.sa_baseline_obj3d_study.frame.n'] == 3
    assert all(l['n'] == '0' for l in space['lines'] if l['table'] in '23'), 'runs on OBJ3D-like scenes are none on CLEVRER-like ones'

def test_as_printed_repeats_the_baseline(tmp_path):
    for seed in (0, 1): fabricate(tmp_path, seed=seed, data='clevrer', mse=0.01 + seed/1000)
    fabricate(tmp_path, seed=0, data='clevrer', arm='literal', mse=0.01, strength=3.)
    fabricate(tmp_path, seed=1, data='clevrer', arm='literal', mse=0.5)
    space = tables(tmp_path)
    base, printed = line(space, 2, 'SA', 'baseline'), line(space, 2, 'SA', 'proposed, as printed')
    assert (base['mean'], base['n']) == (printed['mean'], printed['n']) and float(printed['report']) == 0.00015
    assert 'the baseline\'s runs again' in printed['why'] and '1 of 2 runs made with it have exactly' in printed['why']
    assert space['metrics']['mse_pm1.sa_literal_clevrer_study.frame'] == space['metrics']['mse_pm1.sa_baseline_clevrer_study.frame']

def test_tiny_scenes_stand_in_only_alone(tmp_path):
    fabricate(tmp_path/'a', fg=0.6)
    space = tables(tmp_path/'a')
    assert 'nothing like CLEVRER' in line(space, 3, 'SA', 'baseline')['why'] and 'one run: no interval' in line(space, 3, 'SA', 'baseline')['why']
    assert float(line(space, 3, 'SA', 'baseline')['mean']) == pytest.approx(60)
    assert 'synthetic: `tiny` scenes' in space['tables'][1].iloc[0]['data of ours'] and 'Not run: OBJ3D itself; generated OBJ3D-like scenes.' in space['text']
    fabricate(tmp_path/'b'); fabricate(tmp_path/'b', data='clevrer', model='isa_t')
    space = tables(tmp_path/'b')
    assert {l['data'] for l in space['lines'] if l['table'] == '3'} == {'synthetic: `clevrer` scenes'} and line(space, 3, 'SA', 'baseline')['n'] == '0'
    assert {l['data'] for l in space['lines'] if l['table'] == '1'} == {'synthetic: `tiny` scenes'}

def test_files_of_the_layout_come_first(tmp_path):
    fabricate(tmp_path, data='somewhere/clevrer', settings=dict(reader='CLEVRER', split='val', root='somewhere/clevrer'), name='files')
    fabricate(tmp_path, data='clevrer')
    space = tables(tmp_path)
    data = list(dict.fromkeys(l['data'] for l in space['lines'] if l['table'] == '3'))
    assert data == ['files in the layout of CLEVRER (val split)', 'synthetic: `clevrer` scenes'] and space['absent'](2) == '' != space['absent'](1)

def test_three_readings_of_the_binary_ari(tmp_path):
    fabricate(tmp_path, data='clevrer'); fabricate(tmp_path, data='clevrer', seed=1)
    fabricate(tmp_path, data='clevrer', model='isa_t', masks=False)
    space = tables(tmp_path)
    row = space['tables'][3].iloc[0]
    assert row['gap, ours − report'] == '−76.30 / −16.30 / −26.30' and row['report'] == '86.3' and row['slides'] == '86.24'
    assert [float(line(space, 3, 'SA', 'baseline', k)['mean']) for k in ('binary ARI, keep', 'binary ARI, drop_largest', 'binary ARI, drop_min_max', 'ARI', 'FG-ARI')] == pytest.approx([10, 70, 60, 30, 50])
    bare = space['tables'][3].set_index(['model', 'loss']).loc[('ISA-T', 'baseline')]
    assert bare['FG-ARI'] == 'no ground truth' and bare['gap, ours − report'] == '' and 'no true masks' in bare['why'] and float(line(space, 2, 'ISA-T', 'baseline')['mean']) == 0.04

def test_what_does_not_count_is_named(tmp_path):
    fabricate(tmp_path, name='good', started='2026-01-02')
    fabricate(tmp_path, name='failed', seed=1, status='failed', error=dict(name='DivergedError', message='step 7 is not finite'))
    fabricate(tmp_path, name='stopped', seed=2, status='stopped')
    fabricate(tmp_path, name='changed', seed=3, dirty=True)
    fabricate(tmp_path, name='smoke', seed=4, preset='smoke')
    fabricate(tmp_path, name='unknown', seed=5, arm='magic')
    (fabricate(tmp_path, name='damaged', seed=6)/'metrics.json').write_text('{"mse')
    (fabricate(tmp_path, name='broken', seed=7)/'run.json').write_text('{')
    fabricate(tmp_path, name='other', mse=0.9, started='2026-01-01')
    space = tables(tmp_path)
    why = aside(space)
    assert set(why) == {'failed', 'stopped', 'changed', 'smoke', 'unknown', 'damaged', 'broken', 'other'}
    assert why['failed'] == 'failed: DivergedError, step 7 is not finite' and why['stopped'] == 'stopped' and 'not committed' in why['changed'] and why['smoke'] == 'a smoke test'
    assert 'magic' in why['unknown'] and 'Damaged' in why['damaged'] and 'Damaged' in why['broken'] and why['other'] == '20_loss_ablation/good is a later run of the same seed, with other results'
    base = line(space, 3, 'SA', 'baseline')
    assert base['n'] == '1' and base['failed'] == '1' and '1 (1 failed)' in space['text'] and all(f'/{name}: ' in space['text'] for name in why)
    assert space['metrics']['runs.gathered.aside'] == 8

def test_uncommitted_and_mixed_code_is_marked(tmp_path):
    fabricate(tmp_path); fabricate(tmp_path, seed=1, commit='b'*40); fabricate(tmp_path, seed=2, dirty=True); fabricate(tmp_path, seed=3, commit=None)
    space = tables(tmp_path, dirty=True)
    base = line(space, 3, 'SA', 'baseline')
    assert base['n'] == '4' and '1 of 4 from code that was not committed' in base['why'] and '1 from an unknown commit' in base['why']
    assert re.search(r'different commits: aaaaaaa \(1\), bbbbbbb \(1\), aaaaaaa \+ changes \(1\), unknown \(1\)', base['why'])

def test_copies_count_once_and_setups_are_kept_apart(tmp_path):
    for seed in (0, 1):
        fabricate(tmp_path, seed=seed, mse=0.04 + seed/100)
        fabricate(tmp_path/'reference', seed=seed, mse=0.04 + seed/100, name=f'kept-{seed}')
    fabricate(tmp_path, preset='laptop', mse=0.001)
    space = tables(tmp_path)
    assert space['metrics']['runs.gathered.copies'] == 2 and space['metrics']['runs.gathered.used'] == 3
    assert {(l['setup'], l['n']) for l in space['lines'] if (l['table'], l['model'], l['loss'], l['metric']) == ('1', 'SA', 'baseline', 'MSE, [−1, 1]')} == {('study', '2'), ('laptop', '1')}

def test_the_best_corrected_arm_says_how_it_was_chosen(tmp_path):
    for seed in (0, 1):
        for arm, fg in (('both', 0.5), ('spatial', 0.8), ('flip', 0.95)): fabricate(tmp_path, arm=arm, fg=fg, seed=seed)
    fabricate(tmp_path, arm='overlap', fg=0.99) # one lucky seed
    fabricate(tmp_path, arm='both', strength=0.5, fg=0.1)
    space = tables(tmp_path)
    losses = list(space['tables'][3].query('model == "SA"')['loss'])
    assert losses == ['baseline', 'proposed, as printed', 'proposed, corrected: both ×0.5', 'proposed, corrected: both', 'proposed, corrected: spatial']
    best = line(space, 3, 'SA', 'proposed, corrected: spatial')
    assert 'best of 4 corrected forms' in best['why'] and 'biased upwards' in best['why'] and 'biased' not in line(space, 3, 'SA', 'proposed, corrected: both')['why']
    assert space['metrics']['fg_ari.sa_both_0_5_tiny_study.clip'] == 0.1

def test_other_folders_and_bad_ones(tmp_path):
    fabricate(tmp_path/'theirs'); fabricate(tmp_path/'more', seed=1)
    assert tables(tmp_path/'mine', gather=f'{tmp_path/"theirs"}, {tmp_path/"more"}')['metrics']['runs.gathered.used'] == 2
    with pytest.raises(FileNotFoundError, match='nowhere, which is no folder'): tables(tmp_path/'mine2', gather=str(tmp_path/'nowhere'))
    assert not (tmp_path/'mine2').exists()
    assert published(1)

def test_under_papermill(tmp_path):
    pytest.importorskip('papermill')
    done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(NOTEBOOK), str(tmp_path/'out.ipynb'), '-p', 'runs_dir', str(tmp_path/'runs')], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics, = (tmp_path/'runs').glob('50_report_tables/*/metrics.json')
    assert json.loads(metrics.read_text())['runs.gathered.used'] == 0
