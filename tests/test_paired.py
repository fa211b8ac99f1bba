"Arms compared over the same seeds: who is paired with whom, what the page says of it, and what it says where there is nothing to say. All runs here are fabricated."
import html, json, math, re

import numpy as np
import pytest

for package in ('jinja2', 'scipy', 'matplotlib', 'seaborn', 'pandas', 'yaml'): pytest.importorskip(package)

from slotnb.batch.compare import make_arms, read_entry, too_weak
from slotnb.batch.report import report, report_runs
from slotnb.batch.sweep import Sweep, read_sweep
from slotnb.core import write_json
from slotnb.evaluation.paired import holm, paired, sign_flip

LUCK = [0.80, 0.85, 0.79, 0.42, 0.83, 0.81, 0.86, 0.77]
METRICS = {'fg_ari.decoder.clip': 'FG-ARI', 'mse_pixel.decoder.frame': 'MSE'}
SPEC = dict(rows=['model', 'arm'], metrics=METRICS, curves=[], pictures=[], paired=dict(arm='baseline'))

def fabricate(root, arm, seed, gain, model='sa', status='done', **more):
    "A run that never ran."
    folder, values = root/'20_fabricated'/f'{model}-{arm}-{seed}-{"-".join(map(str, more.values()))}', dict(model=model, arm=arm, seed=seed, **more)
    write_json(folder/'run.json', dict(experiment='20_fabricated', run=folder.name, parameters=dict(preset='study', **values), status=status, seconds=90.))
    if status == 'done': write_json(folder/'metrics.json', {'fg_ari.decoder.clip': LUCK[seed] + gain if gain is not None else None, 'mse_pixel.decoder.frame': 0.01*(1 + seed)})
    return folder

def arm(root, name, gain, model='sa', seeds=range(8), wobble=0.01, **more): return [fabricate(root, name, s, gain + wobble*(-1)**(s*s//2 + s), model, **more) for s in seeds]

def made(root, folders, spec=SPEC):
    "The page's HTML, its text without tags, and the Markdown."
    text = report_runs(folders, 'Fabricated', spec, root/'out').read_text()
    return text, html.unescape(re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', text.split('</style>')[1]))).replace('\xa0', ' '), (root/'out/report.md').read_text()

def test_every_arm_against_the_baseline_with_the_same_seed(tmp_path):
    folders = [*arm(tmp_path, 'baseline', 0, wobble=0), *arm(tmp_path, 'better', 0.05), *arm(tmp_path, 'sham', 0)]
    text, words, markdown = made(tmp_path, folders)
    differences = [json.loads((tmp_path/f'20_fabricated/sa-better-{s}-/metrics.json').read_text())['fg_ari.decoder.clip'] - LUCK[s] for s in range(8)]
    assert f'| sa | better | +{np.mean(differences):.3f} |' in markdown and '| 0.008 | 0.016 | 8 of 8 |' in markdown
    assert 'sa · better higher by 0.05' in words and 'sa · sham no difference found' in words and 'would have been found (80 % power)' in words
    section = text.split('<section id="paired">')[1].split('</section>')[0]
    drawn = re.search(r'<figure class="pairs">(.*?)</figure>', section, re.S)[1]
    dots = [g.count('<use ') for g in re.findall(r'PathCollection_\d+">(.*?)</g>', drawn, re.S)]
    assert dots == [8, 8] and section.count('<figure') == 2 # a dot for every pair
    assert 'equal in all 8 pairs' in words # MSE is the same in all arms
    assert 'href="#paired"' in text and 'id="paired"' not in made(tmp_path, folders, {k: v for k, v in SPEC.items() if k != 'paired'})[0]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and {h[1:] for h in re.findall(r'href="(#[^"]+)"', text)} <= set(ids)

def test_models_are_not_mixed(tmp_path):
    folders = [f for m, base in (('sa', 0), ('isa', -0.2)) for f in (*arm(tmp_path, 'baseline', base, m, wobble=0), *arm(tmp_path, 'better', base + 0.05, m))]
    entries = [read_entry(f, json.loads((f/'run.json').read_text())['parameters']) for f in folders]
    for spread in (entries, entries[::-1]): # whatever the order of the plan
        _, arms = make_arms(spread, dict(arm='baseline'), ['model', 'arm'])
        assert len(arms) == 2 and all({e.get('model') for e in (*a.runs.values(), *a.base.values())} == {a.cell[0]} for a in arms)
    _, words, markdown = made(tmp_path, folders)
    assert markdown.count('| +0.050 |') == 2 and 'lower' not in words.split('Compared')[2].split('MSE')[0]

def test_a_pair_shares_whatever_else_was_swept(tmp_path):
    folders = [f for d, shift in (('tiny', 0), ('obj3d', -0.3)) for f in (*arm(tmp_path, 'baseline', shift, data=d, wobble=0), *arm(tmp_path, 'better', shift + 0.05, data=d))]
    assert '| +0.0500 |' in (markdown := made(tmp_path, folders)[2]) and '16 of 16' in markdown

def test_what_is_not_there_is_named(tmp_path):
    folders = [*arm(tmp_path, 'baseline', 0), *arm(tmp_path, 'better', 0.05, seeds=range(6)), fabricate(tmp_path, 'better', 6, 0, status='failed'), fabricate(tmp_path, 'better', 7, None), *arm(tmp_path, 'waits', 0, status='queued')]
    folders[2].joinpath('metrics.json').write_text('{"fg_ari') # outside a plan nobody knows what a damaged run was
    _, words, markdown = made(tmp_path, folders)
    assert 'Left out: sa · better, seed 2 (baseline not there), seed 6 (failed), seed 7 (not computed).' in words and '5 of 8' in markdown and 'sa · waits not run' in words and '| sa | waits | not run |' in markdown
    assert '5 pairs are too few for p < 0.05' in words

def test_a_missing_baseline_is_a_sentence(tmp_path):
    _, words, markdown = made(tmp_path, [*arm(tmp_path, 'baseline', 0), *arm(tmp_path, 'better', 0.1), *arm(tmp_path, 'better', 0.1, 'isa')])
    assert 'There is no run with arm = baseline, model = isa, so there is nothing to compare better with; arm = baseline is there for sa.' in words and 'isa · better no baseline' in words
    assert '**There is no run with' in markdown
    alone = made(tmp_path, arm(tmp_path, 'better', 0.1), SPEC | dict(rows=['model']))[1]
    assert 'There is no run with arm = baseline, model = sa' in alone
    assert 'No run differs from arm = baseline' in made(tmp_path, arm(tmp_path, 'baseline', 0), SPEC)[1]
    unrun = made(tmp_path, [*arm(tmp_path, 'baseline', 0, status='queued'), *arm(tmp_path, 'better', 0.1)])[1]
    assert 'sa · better baseline not run' in unrun

def test_strengths_join_the_baseline_by_name(tmp_path):
    folders = [*arm(tmp_path, 'baseline', 0, strength=0.0, wobble=0), *arm(tmp_path, 'better', 0.02, strength=0.1), *arm(tmp_path, 'better', 0.07, strength=1.0)]
    spec = SPEC | dict(rows=['model', 'arm', 'strength'])
    assert 'There is no run with arm = baseline, model = sa, strength = 0.1' in made(tmp_path, folders, spec)[1] # never a silent comparison of unlike runs
    _, words, markdown = made(tmp_path, folders, spec | dict(paired=dict(arm='baseline', strength=0)))
    assert 'sa · better · 0.1 higher by 0.020' in words and 'sa · better · 1 higher by 0.070' in words and '| sa | better | 1 | +0.070' in markdown

def test_the_same_seed_twice_is_not_averaged(tmp_path):
    folders = [*arm(tmp_path, 'baseline', 0), *arm(tmp_path, 'better', 0.1)]
    assert 'seed 0 is there twice' in made(tmp_path, [*folders, folders[-8]])[1]

def test_too_many_arms_for_so_few_pairs_is_said(tmp_path):
    seven = [*arm(tmp_path, 'baseline', 0), *(f for i in range(7) for f in arm(tmp_path, f'arm{i}', 0.3, wobble=0.001*i))]
    words = made(tmp_path, seven)[1]
    assert 'sa: with 8 pairs and 7 arms no p can be below 0.055 after Holm, so no arm can be told from chance; 9 pairs could.' in words and 'perhaps higher' in words and 'arm0 higher' not in words
    assert 'no p can be' not in made(tmp_path, seven[:56])[1] and too_weak([], []) == []

@pytest.mark.parametrize('wrong, words', [
    (dict(paired=dict(amr='baseline')), "parameter in paired 'amr'.*Did you mean 'arm'"), (dict(paired=['arm']), 'name: value'), (dict(paired=dict(seed=0)), 'one seed'),
    (dict(paired_metrics=['fg_ari']), "metric in paired_metrics 'fg_ari'"), (dict(pared=dict(arm='baseline')), "Did you mean 'paired'")])
def test_wrong_wishes_are_named(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words): made(tmp_path, arm(tmp_path, 'baseline', 0), SPEC | wrong)

@pytest.mark.parametrize('paired_, words', [('{amr: baseline}', "'amr'.*Did you mean 'arm'"), ('{arm: basline}', "arm: 'basline', which no run of the sweep has: there are 'baseline', 'better'"), ('baseline', 'name: value'), ('{}', 'name: value'), ('{strength: 3}', None), ('{arm: baseline}', None), ('{model: sa}', None)])
def test_at_the_sweep_files_door(tmp_path, paired_, words):
    (tmp_path/'s.yaml').write_text(f'experiment: 10_decomposition\nparameters: {{data: tiny}}\ngrid: {{model: [sa, isa_t]}}\nlist: [{{arm: baseline}}, {{arm: better, strength: 0.1}}]\nreport: {{paired: {paired_}}}\n')
    if words is None: assert read_sweep(tmp_path/'s.yaml').report['paired']
    else:
        with pytest.raises(ValueError, match=f's.yaml.*{words}'): read_sweep(tmp_path/'s.yaml')

def test_an_arm_fixed_on_the_command_line_is_no_error(tmp_path):
    (tmp_path/'s.yaml').write_text('experiment: 10_decomposition\ngrid: {model: [sa, isa_t]}\nreport: {paired: {model: sa}}\n')
    assert read_sweep(tmp_path/'s.yaml', parameters=dict(model='isa_t')).grid == {}

def test_of_a_sweep(tmp_path):
    home = tmp_path/'sweeps/s'
    folders = [*arm(tmp_path, 'baseline', 0, wobble=0), *arm(tmp_path, 'better', 0.05)]
    plan = [dict(experiment='20_fabricated', run=f.name, parameters={}, labels={k: v for k, v in json.loads((f/'run.json').read_text())['parameters'].items() if k in ('model', 'arm', 'seed')}, notebook='') for f in folders]
    write_json(home/'sweep.json', dict(name='s', experiment='20_fabricated', list=[dict(arm='baseline'), dict(arm='better')], report=SPEC))
    (home/'plan.jsonl').write_text(''.join(json.dumps(p) + '\n' for p in plan))
    report('s', tmp_path)
    assert 'sa · better: higher by 0.050' in (home/'report.md').read_text()

def test_nobodys_text_becomes_markup(tmp_path):
    evil = '<script>alert(1)</script>'
    text, *_ = made(tmp_path, [*arm(tmp_path, 'baseline', 0), *arm(tmp_path, 'x', 0.1)], SPEC | dict(metrics={'fg_ari.decoder.clip': evil}))
    for f in (tmp_path/'20_fabricated').glob('*-x-*/run.json'): f.write_text(f.read_text().replace('"x"', json.dumps(evil)))
    assert '<script' not in text and '<script' not in made(tmp_path, [*(tmp_path/'20_fabricated').glob('*')])[0]

def test_p_is_uniform_where_nothing_differs():
    draw = np.random.default_rng(1)
    for n, noise in ((6, draw.standard_normal), (8, draw.standard_cauchy), (20, lambda size: draw.exponential(size=size) - draw.exponential(size=size))):
        ps = np.array([sign_flip(x, flips=2000) for x in noise(size=(600, n))])
        for level in (0.05, 0.2, 0.5, 0.8): assert (ps <= level).mean() < level + 0.07 and (ps <= level).mean() > level - 0.1 - 2/2**n, (n, level)

def test_values_of_every_kind():
    a = {0: 1, 1: np.float32(0.5), 2: math.inf, 3: '0.5', 4: True, 'x': 2.}
    p = paired(a, dict.fromkeys(a, 0.))
    assert p.seeds == (0, 1, 4, 'x') and p.dropped == {2: 'inf in a', 3: "'0.5' in a"}
    assert Sweep(name='s', experiment='e').report == {} and all(x == x or y for x, y in zip(holm([0.5, math.nan]), (False, True)))
