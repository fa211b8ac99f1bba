"""Every row of results in the notebooks of parallel binding, long range and run-length tokens is what the reference runs printed."""
import json, re, statistics

import pytest

from slotnb.core import project_root

ROOT = project_root()


def runs(experiment, preset, *by, **only):
    "Values of the parameters `by` -> seed -> metrics (and the run's minutes), of all reference runs of a preset; all finished, all of clean code."
    found = {}
    for path in sorted((ROOT/'runs'/'reference'/experiment).glob(f'{preset}-*/run.json')):
        info = json.loads(path.read_text())
        assert (info['status'], info['dirty'], info['parameters']['preset']) == ('done', False, preset), path
        if any(info['parameters'][k] != v for k, v in only.items()): continue
        metrics = json.loads((path.parent/'metrics.json').read_text()) | {'minutes': info['wall_seconds']/60}
        found.setdefault(tuple(info['parameters'][k] for k in by), {})[info['parameters'].get('seed', 0)] = metrics
    return found


def cell(seeds, key, digits=3, scale=1.):
    "Mean over seeds, and from the lowest to the highest."
    values = [scale*m[key] for m in seeds.values()]
    mean, low, high = (f'{v:.{digits}f}'.replace('-', '−') for v in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f'{mean} ({low} – {high})'


def row(*cells): return '| ' + ' | '.join(str(c) for c in cells) + ' |'


def binding_rows():
    "Tables of 70_parallel_binding: laptop seed by seed, study over seeds."
    rows = []
    laptop = runs('70_parallel_binding', 'laptop', 'model')[('psb',)]
    for seed, m in sorted(laptop.items()):
        rows.append(row(seed, *(f'{m[k]:.{d}f}' for k, d in (('fg_ari.decoder.clip', 3), ('fg_ari.decoder.frame', 3), ('mbo.decoder.clip', 3), ('psnr.decoder.frame', 1), ('swap_rate.decoder.clip', 3), ('fg_ari.full_x2.clip', 3), ('fg_ari.full_x4.clip', 3), ('minutes', 1)))))
    study = runs('70_parallel_binding', 'study', 'length', 'model')
    for (length, model), seeds in sorted(study.items()):
        length = length or 6  # the preset's
        total = lambda key: int(sum(m[key] for m in seeds.values()))
        rows.append(row(f'`{model}`', length, len(seeds), total('learned.val.run'), total('spikes.val.run'), total('divergences.val.run'), *(cell(seeds, k, d) for k, d in (('gain.val.run', 1), ('fg_ari.decoder.clip', 3), ('fg_ari.decoder.frame', 3), ('mbo.decoder.clip', 3), ('psnr.decoder.frame', 1), ('swap_rate.decoder.clip', 3)))))
        rows.append(row(f'`{model}`', length, *(cell(seeds, k, 2) for k in ('r2_position.slots.frame', 'r2_velocity.slots.frame', 'accuracy_colour.slots.frame', 'accuracy_shape.slots.frame'))))
        longer = [('full', 'all it remembers')] + [('sliding', 'sliding window')]*(model == 'psb')
        for way, words in longer: rows.append(row(f'`{model}`', length, words, *(cell(seeds, f'fg_ari.{way}_x{x}.clip') for x in (1, 2, 3, 4))))
    return rows


def binding_speed_rows():
    "Tables of 71_binding_speed: PSB's speed over SAVi's by tokens and frames, and that of variants at 256 tokens."
    (m,), rows = runs('71_binding_speed', 'study')[()].values(), []
    ratio = lambda key: f"{m[key]:.2f} [{m[key + '.min']:.2f}, {m[key + '.max']:.2f}]"
    for l in (64, 256, 1024):
        for t in (6, 12, 24, 48, 96): rows.append(row(l, t, *(ratio(f'speedup.{part}.T{t}_L{l}') for part in ('binding', 'encoder', 'training_step')), f"{m[f'gflop.binding.psb.T{t}_L{l}']/m[f'gflop.binding.savi.T{t}_L{l}']:.1f}"))
    for key, words in (('psb', 'PSB, all frames'), ('window', 'window of 6 frames'), ('own_frame', 'own frame'), ('one_block', 'one block'), ('chunks_of_one_frame', 'chunks of one frame'), ('direct', 'without chunks'), ('savi_two_passes', 'SAVi, two passes')):
        rows.append(row(words, *(f"{m[f'speedup.variant.{key}.T{t}']:.2f}" for t in (6, 12, 24, 48, 96)), f"{m[f'memory_when_doubled.{key}']:.2f}"))
    return rows


def run_length_rows():
    "Table of 78_run_length; times are those taken in turns, in the processes that trained on run-length tokens."
    rows, found = [], runs('78_run_length', 'study', 'policy')
    timed = found['run_length',]
    for (policy,), seeds in sorted(found.items()):
        rows.append(row(f'`{policy}`', *(cell(seeds, f'accuracy.{k}.clip') for k in ('own', 'run_length', 'all')), cell(seeds, 'kept.own.clip', 2),
                        cell(timed, f'seconds_epoch.{policy}.train', 1), *(cell(timed, f'speedup.{policy}.{k}', 2) for k in ('training', 'inference'))))
    return rows


TABLES = {'70_parallel_binding': binding_rows, '71_binding_speed': binding_speed_rows, '78_run_length': run_length_rows}
SEEDS = {'70_parallel_binding': ('study', ('length', 'model'), {(0, 'psb'): 5, (0, 'savi'): 5, (12, 'psb'): 3, (12, 'savi'): 3}),
         '78_run_length': ('study', ('policy',), {('all',): 3, ('run_length',): 3, ('random',): 3})}


@pytest.mark.parametrize('experiment', TABLES)
def test_the_notebook_quotes_the_runs(experiment):
    text = json.loads((ROOT/'nbs'/'experiments'/f'{experiment}.ipynb').read_text())
    text = '\n'.join(''.join(c['source']) for c in text['cells'] if c['cell_type'] == 'markdown')
    for line in TABLES[experiment](): assert line in text, line


@pytest.mark.parametrize('experiment', SEEDS)
def test_no_seed_is_left_out(experiment):
    preset, by, expected = SEEDS[experiment]
    found = runs(experiment, preset, *by)
    assert {k: sorted(v) for k, v in found.items()} == {k: list(range(n)) for k, n in expected.items()}


def test_the_readme_quotes_parallel_binding():
    text = re.sub(r'\s+', ' ', (ROOT/'README.md').read_text())
    laptop = runs('70_parallel_binding', 'laptop', 'model')[('psb',)]
    study = runs('70_parallel_binding', 'study', 'length', 'model')
    value = lambda key: [m[key] for m in laptop.values()]
    assert sorted(laptop) == [0, 1, 2] and statistics.median(value('fg_ari.decoder.clip')) >= 0.8
    clip, far = value('fg_ari.decoder.clip'), value('fg_ari.full_x4.clip')
    assert f"median FG-ARI {statistics.median(clip):.2f} ({min(clip):.2f} to {max(clip):.2f})" in text
    assert f"four times as long it is {statistics.median(far):.2f}" in text
    both = [cell(study[0, model], 'fg_ari.decoder.clip', 2) for model in ('savi', 'psb')]
    assert f"FG-ARI {both[0]} against {both[1]}" in text
    assert sum(m[k] for seeds in study.values() for m in seeds.values() for k in ('spikes.val.run', 'divergences.val.run')) == 0 and 'none of the 16 runs spikes or diverges' in text


def test_decomposition_quotes_the_textured_pair():
    text, pair = (ROOT/'nbs'/'experiments'/'10_decomposition.ipynb').read_text(), [json.loads((ROOT/'runs'/'reference'/'10_decomposition'/f'textured-{d}-seed0'/'metrics.json').read_text()) for d in ('broadcast', 'words')]
    key = lambda m, source: f"{m[f'fg_ari.{source}.frame']:.2f}"
    assert f"FG-ARI of frames {key(pair[0], 'decoder')} and {key(pair[1], 'decoder')}, one seed (grid {key(pair[1], 'grid')})" in text


def test_the_readme_quotes_run_length_tokens():
    text, found = re.sub(r'\s+', ' ', (ROOT/'README.md').read_text()), {policy: seeds for (policy,), seeds in runs('78_run_length', 'study', 'policy').items()}
    mean = lambda policy, key: statistics.mean(m[key] for m in found[policy].values())
    assert f"{mean('run_length', 'kept.own.clip'):.0%} of the tokens are left".replace('%', ' %') in text
    assert f"training is {mean('run_length', 'speedup.run_length.training'):.1f} times as fast" in text
    shares = [f"{mean(policy, 'accuracy.own.clip'):.2f}" for policy in ('run_length', 'all', 'random')]
    assert f"accuracy is {shares[0]} with them, {shares[1]} with all tokens (which had not converged) and {shares[2]} with as many drawn at random" in text


if __name__ == '__main__':
    import sys
    for name in sys.argv[1:] or TABLES: print(name, *TABLES[name](), sep='\n')
