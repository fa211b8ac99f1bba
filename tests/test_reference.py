"""Every figure in the README's results table is the one a reference run printed."""
import importlib, json, re, statistics

from slotnb.core import project_root

ROOT = project_root()
RUNS = ROOT/'runs'/'reference'/'10_decomposition'


def seeds():
    folders = sorted(RUNS.glob('laptop-sa-seed*'))
    return {int(re.search(r'\d+$', f.name)[0]): (json.loads((f/'metrics.json').read_text()), json.loads((f/'run.json').read_text())) for f in folders}


def test_runs_are_finished_and_alike():
    runs = seeds()
    assert sorted(runs) == list(range(10))  # none dropped
    for seed, (metrics, info) in runs.items():
        assert info['status'] == 'done' and info['dirty'] is False and info['parameters']['seed'] == seed
        assert metrics['fg_ari.decoder.clip.n'] + metrics['fg_ari.decoder.clip.nan'] >= 200
    for key in ('commit', 'fit_config', 'model_config', 'data_fingerprint'):
        assert len({json.dumps(info[key]) for _, info in runs.values()}) == 1, key


def test_readme_quotes_them():
    text, runs = (ROOT/'README.md').read_text(), seeds()
    for seed, (m, info) in runs.items():
        row = f"| {seed} | {m['fg_ari.decoder.clip']:.2f} | {m['fg_ari.decoder.frame']:.2f} | {m['fg_miou.decoder.clip']:.2f} | {m['mse_pixel.decoder.frame']:.4f} | {info['wall_seconds']/60:.1f} |"
        assert row in text, row
    clip = lambda source: [m[f'fg_ari.{source}.clip'] for m, _ in runs.values()]
    assert f"median FG-ARI {statistics.median(clip('decoder')):.2f}" in re.sub(r'\s+', ' ', text)
    for baseline in ('grid', 'colour'): assert f"{baseline} {statistics.median(clip(baseline)):.2f}" in text


def test_the_study_sweep_is_whole_and_alike():
    "The runs behind the pictures of the tutorial on clusters: every kind of slots with seeds 0 to 4, none dropped, one commit."
    runs = [json.loads(p.read_text()) for p in sorted(RUNS.glob('study-*/run.json'))]
    assert sorted((r['parameters']['model'], r['parameters']['seed']) for r in runs) == [(m, s) for m in ('isa_t', 'isa_ts', 'isa_tsr', 'sa') for s in range(5)]
    assert {(r['status'], r['dirty'], r['parameters']['preset']) for r in runs} == {('done', False, 'study')} and len({r['commit'] for r in runs}) == 1


def ablation():
    "(model, arm) -> seed -> metrics, of all runs."
    found = {}
    for path in sorted((ROOT/'runs'/'reference'/'20_loss_ablation').glob('*/run.json')):
        info = json.loads(path.read_text())
        assert (info['status'], info['dirty'], info['parameters']['preset'], info['parameters']['strength']) == ('done', False, 'study', 1.)
        found.setdefault((info['parameters']['model'], info['parameters']['arm']), {})[info['parameters']['seed']] = json.loads((path.parent/'metrics.json').read_text())
    return found


def test_the_ablation_is_whole_and_the_notebook_quotes_it():
    "Eight seeds in every arm, none dropped; each row of the notebook's table is what the runs give."
    paired = importlib.import_module('slotnb.evaluation.paired')
    runs, text = ablation(), (ROOT/'nbs'/'experiments'/'20_loss_ablation.ipynb').read_text()
    signed = lambda x, n: f'{x:+.{n}f}'.replace('-', '−')
    for model, family in (('sa', ['feature', 'spatial', 'both', 'index', 'sham', 'flip']), ('sa', ['contrast']), ('isa_t', ['feature', 'both']), ('isa_ts', ['feature', 'both'])):
        assert all(sorted(runs[model, arm]) == list(range(8)) for arm in ('baseline', *family))
        of = lambda arm, key: {s: m[key] for s, m in runs[model, arm].items()}
        fg, mse = ({a: paired.paired(of(a, key), of('baseline', key)) for a in family} for key in ('fg_ari.decoder.clip', 'mse_pixel.decoder.frame'))
        p_fg, p_mse = (dict(zip(family, paired.holm([r.p for r in of_arm.values()]))) for of_arm in (fg, mse))
        name = '' if model == 'sa' else f'`{model}`, '
        for a in ('baseline', *family):
            v, w = of(a, 'fg_ari.decoder.clip').values(), of(a, 'mse_pixel.decoder.frame').values()
            row = [f'{name}`{a}`', f'{sum(v)/8:.3f}', f'{min(v):.2f} – {max(v):.2f}']
            if a == 'baseline': row += ['', '', '', f'{sum(w)/8:.4f}', '', '']
            else: row += [f'{signed(fg[a].mean, 3)} ({signed(fg[a].low, 3)} to {signed(fg[a].high, 3)})', f'{fg[a].p:.3f}', f'{p_fg[a]:.3f}', f'{sum(w)/8:.4f}', signed(mse[a].mean, 4), f'{p_mse[a]:.3f}']
            assert '| ' + ' | '.join(row) + ' |' in text, row
            if (model, a) == ('isa_t', 'feature'): worse = f"FG-ARI {sum(of('baseline', 'fg_ari.decoder.clip').values())/8:.3f} to {sum(v)/8:.3f} (ISA-T, p = {p_fg[a]:.2f})"
            if (model, a) == ('isa_ts', 'feature'): worse += f" and {sum(of('baseline', 'fg_ari.decoder.clip').values())/8:.3f} to {sum(v)/8:.3f} (ISA-TS, p = {p_fg[a]:.2f})"
            if (model, a) == ('sa', 'feature'): said = f"{sum(of('baseline', 'fg_ari.decoder.clip').values())/8:.3f} to {sum(v)/8:.3f} (p = {p_fg[a]:.2f}", f'(p = {p_mse[a]:.3f})'
    readme = (ROOT/'README.md').read_text()
    assert all(s in readme for s in (*said, worse)), (said, worse)


def futures(preset):
    "(model, dynamics) -> seed -> metrics, of the runs of a preset."
    found = {}
    for path in sorted((ROOT/'runs'/'reference'/'60_dynamics').glob(f'{preset}-*/run.json')):
        info = json.loads(path.read_text())
        assert (info['status'], info['dirty'], info['parameters']['preset'], info['parameters']['arm']) == ('done', False, preset, 'baseline')
        found.setdefault((info['parameters']['model'], info['parameters']['dynamics']), {})[info['parameters']['seed']] = json.loads((path.parent/'metrics.json').read_text())
    return found


FUTURE_COLUMNS = (('mse_pixel', 'frame', 4), ('mse_pixel', 'at10', 4), ('psnr', 'frame', 2), ('fg_ari', 'frame', 3), ('position_px', 'at10', 2))


def future_rows(preset):
    "The rows of the notebook's table, from the runs: mean over seeds, and from the lowest to the highest."
    runs, rows = futures(preset), []
    def row(words, seeds, source, only=None):
        cells = []
        for metric, scope, digits in FUTURE_COLUMNS:
            values = [m[k] for m in seeds.values() if (k := f'{metric}.{(only or {}).get(metric, source)}.{scope}') in m]
            spread = f' ({min(values):.{digits}f} – {max(values):.{digits}f})' if values and f'{min(values):.{digits}f}' != f'{max(values):.{digits}f}' else ''
            cells.append(f'{statistics.mean(values):.{digits}f}{spread}' if values else '')
        rows.append('| ' + ' | '.join([*words, *cells]) + ' |')
    for (model, dynamics), seeds in sorted(runs.items(), key=lambda kv: (kv[0][0] != 'sa', kv[0])): row((f'`{model}`', f'`{dynamics}`'), seeds, 'rollout')
    for model in sorted({m for m, _ in runs}, key=lambda m: (m != 'sa', m)): row((f'`{model}`', 'true slots decoded'), runs[model, 'slotformer'], 'decoder')
    first = runs['sa', 'slotformer']
    row(('', 'copy of the last frame, objects stay'), first, 'copy_last', {'position_px': 'stay'})
    row(('', 'constant velocity, from the true past'), {s: {k: v for k, v in m.items() if k.startswith('position')} for s, m in first.items()}, 'constant_velocity_last')
    return rows


def test_the_futures_are_whole_and_the_notebook_quotes_them():
    "Three seeds in every cell, none dropped; each row of the tables is what the runs give; ten frames ahead the laptop's rollout beats copying and constant velocity in every seed."
    text = (ROOT/'nbs'/'experiments'/'60_dynamics.ipynb').read_text()
    for preset in ('laptop', 'study', 'study_clevrer'):
        assert all(sorted(seeds) == [0, 1, 2] for seeds in futures(preset).values()), preset
        for row in future_rows(preset): assert row in text, row
    for m in futures('laptop')['sa', 'slotformer'].values():
        assert m['mse_pixel.rollout.at10'] < m['mse_pixel.copy_last.at10'] and m['position_px.rollout.at10'] < m['position_px.constant_velocity_last.at10']


def kept(folder): return json.loads((ROOT/'runs'/'reference'/folder/'metrics.json').read_text()), json.loads((ROOT/'runs'/'reference'/folder/'run.json').read_text())


def test_grayscale_embeddings_and_rotation_quote_their_runs():
    notebook = lambda name: (ROOT/'nbs'/'experiments'/name).read_text()
    cells = [kept(f'40_grayscale/study-sa-seed{s}') for s in (0, 1, 2)]
    assert all(info['status'] == 'done' and not info['dirty'] and info['parameters']['seed'] == s for s, (_, info) in enumerate(cells))
    mean = lambda a, b: (lambda v: f'{statistics.mean(v):.3f} ({min(v):.2f} – {max(v):.2f})')([m[f'fg_ari.decoder_{a}_on_{b}.clip'] for m, _ in cells])
    for a in ('colour', 'gray'): assert f"| {a} | {mean(a, 'colour')} | {mean(a, 'gray')} |" in notebook('40_grayscale.ipynb')
    assert all(m['fg_ari.decoder_colour_on_colour.clip'] == max(v for k, v in m.items() if k.startswith('fg_ari.decoder_') and k.endswith('.clip')) for m, _ in cells)
    maps = [kept(f'30_embeddings/study-{model}-seed0')[0] for model in ('sa', 'isa_tsr')]
    for key in ('purity.slots.clip', 'fg_purity.slots.clip', 'fg_purity.slots.colour', 'fg_purity.cnn.clip', 'fg_purity.cnn.colour'):
        assert ' | '.join(f"{m[key]:.2f} ({m[f'{key}.chance']:.2f})" for m in maps) in notebook('30_embeddings.ipynb'), key
    turned = kept('35_rotation/study')[0]
    for key in [f'frame_jump.{shape}.{scene}' for shape in ('sphere', 'box') for scene in ('tiny', 'obj3d', 'clevrer')] + ['frame_jump.round.all']: assert f'{turned[key]:.1%}' in notebook('35_rotation.ipynb'), key


def test_the_readme_quotes_the_futures():
    text = re.sub(r'\s+', ' ', (ROOT/'README.md').read_text())
    mean = lambda preset, cell, key: statistics.mean(m[key] for m in futures(preset)[cell].values())
    first, content, pose = ('sa', 'slotformer'), ('isa_ts', 'slotformer'), ('isa_ts', 'pose')
    assert f"{mean('laptop', first, 'mse_pixel.rollout.at10'):.3f} against {mean('laptop', first, 'mse_pixel.copy_last.at10'):.3f} for a copied frame" in text
    assert f"{mean('laptop', first, 'position_px.rollout.at10'):.1f} pixels off against {mean('laptop', first, 'position_px.constant_velocity_last.at10'):.1f}" in text
    assert f"PSNR {mean('study', pose, 'psnr.rollout.frame'):.1f} against {mean('study', content, 'psnr.rollout.frame'):.1f} dB" in text
    assert f"it does not ({mean('study_clevrer', pose, 'psnr.rollout.frame'):.1f} against {mean('study_clevrer', content, 'psnr.rollout.frame'):.1f})" in text
