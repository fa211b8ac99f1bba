"""Every figure in the README's results table is the one a reference run printed."""
import json, re, statistics

from slotnb.core import project_root

ROOT = project_root()
RUNS = ROOT/'runs'/'reference'/'10_decomposition'


def seeds():
    folders = sorted(RUNS.glob('laptop-sa-seed*'))
    return {int(re.search(r'\d+$', f.name)[0]): (json.loads((f/'metrics.json').read_text()), json.loads((f/'run.json').read_text())) for f in folders}


def test_runs_are_finished_and_alike():
    runs = seeds()
    assert sorted(runs) == [0, 1, 2, 3, 4]  # none dropped
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
