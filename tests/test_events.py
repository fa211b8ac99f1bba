"Events: labels against another reading of the truth, balance, scenes in common with nobody, one stretch of time at every rate; and the two experiments on run-length tokens."
import json, math, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

pytest.importorskip('mujoco')

from slotnb.batch.sweep import plan, read_sweep
from slotnb.data.clips import Loader, to_float
from slotnb.data.events import FIRST, RATES, SCENE, TASKS, EventConfig, Events, circled, event, event_clips, film, from_side, thrown
from slotnb.data.physics import SHAPES, Camera, project, simulate
from slotnb.data.scenes import PRESETS as SCENES, make_clip, render
from slotnb.data.texture import TEXTURES
from slotnb.layers.run_length import keep_mask, run_lengths
from slotnb.models.video_vit import CrossEntropy, VideoViT
from slotnb.training.events import POLICIES, classify, event_material, event_model, event_recipe, faded, restored, step_of, under, wilson
from slotnb.training.fit import FitConfig, fit

ROOT = Path(__file__).resolve().parent.parent
TRAIN, TEST = 24, 12

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp('events')
    return {task: [event_clips(EventConfig(task, frames=32), split, n, root=root) for split, n in (('train', TRAIN), ('test', TEST))] for task in TASKS}

def every(data): return (data[i] for i in range(len(data)))

# ---------------------------------------------------------------- labels

def centroid(labels, k): # of object k in a frame, from its pixels: (y, x) in [-1, 1]
    y, x = np.nonzero(labels == k + 1)
    return (np.array([y.mean(), x.mean()])*2 + 1)/32 - 1

def test_collisions_by_distance(clips):
    "Objects that touch come as near as their sizes; those that never do keep apart. Read from positions and extents alone."
    for data in clips['collision']:
        for c in every(data):
            p, half, gap = c.truth['position'].double(), c.truth['half'][0].double(), []
            reach, least = half.norm(dim=-1), half.amin(-1)
            for a, b in ((0, 1), (0, 2), (1, 2)):
                d = (p[:, a] - p[:, b]).norm(dim=-1)
                gap.append((d.min()/(reach[a] + reach[b]), d.min()/(least[a] + least[b])))
            if c.truth['event'][0]: assert min(g[0] for g in gap) < 1, f'{c.name}: said to collide, and never near'
            else: assert min(g[1] for g in gap) > 1, f'{c.name}: said not to collide, and overlapping'

def test_a_collision_sets_something_in_motion(clips):
    "In most clips with a collision a second object moves, in those without none does."
    for data in clips['collision']:
        moved = {0: [], 1: []}
        for c in every(data): moved[int(c.truth['event'][0])].append(int(((c.truth['position'][-1] - c.truth['position'][0]).norm(dim=-1) > 0.03).sum()))
        assert max(moved[0]) == 1 and np.mean(moved[1]) > 1.4, moved

def test_shapes_by_who_moves(clips):
    "The object whose pixels move between the first two frames that differ is of the labelled shape."
    for data in clips['shape']:
        for c in every(data):
            way = (c.truth['position'][2] - c.truth['position'][0]).norm(dim=-1)
            assert way.argmax() == c.truth['velocity'][0].norm(dim=-1).argmax() and way.sort().values[-2] < 0.5*way.max()
            assert c.truth['shape'][0][way.argmax()] == c.truth['event'][0]

def test_directions_by_pixels(clips):
    "Where the thrown object's pixels go, as long as nothing hides them."
    checked = 0
    for data in clips['direction']:
        for c in every(data):
            k = int(c.truth['velocity'][0].norm(dim=-1).argmax())
            touch = c.truth['collisions'][:, k].any(1).nonzero()[:, 0].tolist()
            end = touch[0] if touch else len(c) - 1
            pixels = c.truth['pixels'][[0, end], k]
            if pixels.min() < 0.8*c.truth['pixels'][:, k].max(): continue
            (y0, x0), (y1, x1) = (centroid(c.labels[t].numpy(), k) for t in (0, end))
            right, up = x1 - x0, y0 - y1
            said = TASKS['direction'][int(c.truth['event'][0])]
            assert said == (('right' if right > 0 else 'left') if abs(right) > abs(up) else ('away' if up > 0 else 'near')), f'{c.name}: {said}, moved by ({right:.2f}, {up:.2f})'
            checked += 1
    assert checked >= 12

@pytest.mark.parametrize('task', TASKS)
def test_classes_are_balanced_and_in_turn(clips, task):
    for data in clips[task]:
        labels = Events(data).label.tolist()
        assert labels == [i % len(TASKS[task]) for i in range(len(data))]

@pytest.mark.parametrize('task', TASKS)
def test_no_scene_twice(clips, task):
    train, test = ([int(c.truth['scene'][0]) for c in every(data)] for data in clips[task])
    assert len({*train, *test}) == TRAIN + TEST
    assert {s//(1000*FIRST['val']) for s in train} == {0} and {s//(1000*FIRST['val']) for s in test} == {2}
    videos = {c.video.numpy().tobytes() for data in clips[task] for c in every(data)}
    assert len(videos) == TRAIN + TEST

def test_first_numbers_leave_the_class_to_the_clip():
    for task in TASKS: assert all(f % len(TASKS[task]) == 0 for f in FIRST.values())

def test_who_is_undecided():
    "A touch in the last quarter is passed over, a way of no clear direction too."
    found = {task: set() for task in TASKS}
    for i in range(40):
        tr = simulate(EventConfig().filmed, 1, i)
        for task in TASKS: found[task].add(event(task, tr))
        late = tr.collisions.flatten(1).any(1).nonzero()
        assert (event('collision', tr) == -1) == bool(len(late) and late[0] >= 24)
    assert -1 in found['direction'] and found['shape'] == {0, 1, 2}
    with pytest.raises(ValueError, match='one object moves first, here 2 do'): thrown(simulate(EventConfig().filmed.but(launched=(2, 2)), 0, 0))

# ---------------------------------------------------------------- rates

@pytest.mark.parametrize('task', TASKS)
def test_one_stretch_of_time_at_every_rate(clips, task):
    data, batches = clips[task][0], {}
    for fps, step in RATES.items():
        view = Events(data, fps)
        batches[fps] = Loader(view, 6, seed=3).batch(1)
        assert view.length/fps == 32/30 and view.length == 32//step and len(view) == TRAIN and view[4].meta['fps'] == fps
    for fps, step in RATES.items():
        assert torch.equal(batches[fps]['video'], batches[30.]['video'][:, ::step]) and torch.equal(batches[fps]['label'], batches[30.]['label']) and batches[fps]['labels'] is None
    assert len({Events(data, fps).fingerprint for fps in RATES}) == 3

def test_batches_carry_their_own_labels(clips):
    view = Events(clips['shape'][0], 15.)
    for step in range(6):
        b = Loader(view, 8, seed=1).batch(step)
        assert torch.equal(b['label'], b['index'] % 3)
        for row, i in enumerate(b['index'].tolist()): assert torch.equal(b['video'][row], view[i].video)

# ---------------------------------------------------------------- camera

def test_a_still_camera_is_the_generators(clips):
    c = EventConfig(frames=8)
    tr = simulate(c.filmed, 0, 0)
    assert torch.equal(film(tr, c)['video'], render(tr, c.filmed)['video']) and torch.equal(film(tr, c)['video'], make_clip(c.filmed, 0, 0).video)

def test_a_circling_camera_is_a_camera_there():
    "Frame by frame the picture is the one that a still camera at that azimuth takes."
    c = EventConfig(frames=8, turn=45.)
    tr, scene = simulate(c.filmed, 0, 2), c.filmed
    out = film(tr, c)
    for t in (0, 3, 7):
        there = simulate(scene.but(camera_azimuth=(45*t/30,)*2), 0, 2) # nothing but camera and lamp depends on it
        assert torch.equal(there.position, tr.position) and torch.allclose(there.camera.position, out['camera_position'][t], atol=1e-5) and torch.allclose(there.camera.rotation, out['camera_rotation'][t], atol=1e-6)
        there.light = tr.light
        assert (render(there, scene)['video'][t].int() - out['video'][t].int()).abs().float().mean() < 0.2
    assert not torch.equal(out['video'][7], film(tr, EventConfig(frames=8))['video'][7])

def test_from_all_sides():
    tr = simulate(EventConfig().filmed, 0, 1)
    for k in range(5):
        other = from_side(tr, k)
        assert torch.allclose(other.camera.rotation @ other.light, tr.camera.rotation @ tr.light, atol=1e-5) and torch.allclose(other.camera.position.norm(), tr.camera.position.norm())
    assert torch.allclose(project(tr.position[0], from_side(tr, 4).camera), project(tr.position[0], tr.camera), atol=1e-4)

def test_keep_rates_rise_with_a_moving_camera_and_fall_with_the_rate():
    "What the experiments show: more tokens with a camera that moves over patterns, a smaller share at a higher rate."
    kept = {}
    for name, more in (('still', {}), ('patterns', dict(turn=20., scene=SCENE.but(textures=TEXTURES)))):
        c = EventConfig('shape', frames=32, **more)
        video = to_float(torch.stack([film(simulate(c.filmed, 0, i), c)['video'] for i in range(3)]))
        kept[name] = [keep_mask(video[:, ::step], 0.1, 2, 8).float().mean().item() for step in RATES.values()]
    for shares in kept.values(): assert shares == sorted(shares), 'from 30 to 7.5 frames per second'
    assert kept['still'][0] < 0.4 < 0.5 < kept['patterns'][0] and kept['still'][2] < 0.6 < 0.9 < kept['patterns'][2]

# ---------------------------------------------------------------- recipes, scores, times

def test_policies_differ_by_a_word():
    recipes = {p: event_recipe('study', policy=p) for p in POLICIES}
    assert len({r.model.but(policy='all') for r in recipes.values()}) == 1 and len({(r.events, r.fit, r.clips) for r in recipes.values()}) == 1
    for p, r in recipes.items():
        recipes[p] = event_model(r).state_dict()
    told = event_model(event_recipe('study', lengths=True)).state_dict()
    for weights in (*recipes.values(), told): assert all(torch.equal(v, weights[k]) for k, v in recipes['all'].items()), 'the same seed, the same weights'
    assert 'length' in told and len({event_model(event_recipe('study'), seed).blocks[0].fc1.weight[0, 0].item() for seed in range(3)}) == 3

def test_a_quarter_of_the_rate_a_quarter_of_the_tokens():
    for preset in ('smoke', 'study', 'laptop'):
        grids = {fps: math.prod(event_recipe(preset, fps=fps).model.grid) for fps in RATES}
        assert grids[30.] == 2*grids[15.] == 4*grids[7.5]

@pytest.mark.parametrize('given,words', [
    (dict(preset='studdy'), "unknown preset 'studdy'.*Did you mean 'study'"), (dict(task='collisions'), "Did you mean 'collision'"), (dict(policy='merge'), "unknown policy 'merge'"),
    (dict(fps=25.), "unknown frames per second 25.0: allowed are 30.0, 15.0, 7.5"), (dict(threshold=-0.1), 'threshold must be at least 0'), (dict(steps=-3), 'steps must be an integer of at least 1, got -3')])
def test_mistakes_have_names(given, words):
    with pytest.raises(ValueError, match=words): event_recipe(**(dict(preset='smoke') | given))

def test_wilson_against_its_definition():
    "At the ends of the interval the score test is just at 1.96 standard errors."
    for hits, n in ((1, 10), (50, 100), (283, 288)):
        for p in wilson(hits, n): assert abs(abs(hits/n - p)/math.sqrt(p*(1 - p)/n) - 1.959964) < 1e-5
    for wrong in ((3, 2), (0, 0), (-1, 4)):
        with pytest.raises(ValueError, match='a proportion needs'): wilson(*wrong)

def test_scores_are_of_the_clips(clips):
    data, recipe = Events(clips['direction'][1]), event_recipe('study')
    model = event_model(recipe).eval()
    out = {p: classify(under(model, p), data, batch=5) for p in POLICIES}
    video = torch.stack([data[i].video for i in range(TEST)])
    with torch.no_grad(): whole = under(model, 'all')(to_float(video)).logits
    assert torch.allclose(out['all'].probability, whole.softmax(1), atol=1e-5) and out['all'].metrics('all')['accuracy.all.clip'] == (whole.argmax(1) == data.label).float().mean().item()
    assert out['all'].tokens.tolist() == [256]*TEST and torch.equal(out['random'].tokens, out['run_length'].tokens)
    assert out['run_length'].tokens.tolist() == keep_mask(to_float(video), 0.1, 2, 8).flatten(1).sum(1).tolist()
    assert torch.equal(classify(under(model, 'random'), data, seed=1).probability, classify(under(model, 'random'), data, seed=1).probability)

def test_restored_by_hand(clips):
    "Every dropped patch is the last kept one at its place."
    video = to_float(Loader(Events(clips['shape'][0]), 3).batch(0)['video'])
    mask = keep_mask(video, 0.1, 2, 8)
    back, lengths = restored(video, mask), run_lengths(mask)
    for b, t, i, j in mask.nonzero()[::7].tolist():
        cell = lambda v, k: v[b, 2*k:2*k + 2, :, 8*i:8*i + 8, 8*j:8*j + 8]
        for k in range(t, t + int(lengths[b, t, i, j])): assert torch.equal(cell(back, k), cell(video, t))
    kept = mask.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]
    seen = faded(video, mask)
    assert torch.equal(torch.where(kept, seen, 0), torch.where(kept, video, 0)) and torch.allclose(torch.where(kept, 0, 1 - seen), torch.where(kept, 0, 0.25*(1 - video)))

def test_a_step_leaves_gradients_only_where_it_should(clips):
    recipe = event_recipe('smoke')
    model, video = VideoViT(recipe.model), torch.rand(2, 16, 3, 32, 32)
    step_of(model, video)()
    assert all(p.grad is None for p in model.parameters())
    for half in (False, True):
        step_of(model, video, True, half=half)()
        assert all(p.grad is not None for p in model.parameters())

@pytest.mark.slow
def test_it_learns_which_way(tmp_path):
    "Training in small: on run-length tokens a few clips are told apart far above chance."
    recipe = event_recipe('study', steps=300)
    recipe = recipe.but(clips=64, eval_clips=16)
    train, _ = event_material(recipe, tmp_path)
    model = event_model(recipe)
    fit(model, Loader(train, recipe.fit.batch_size), CrossEntropy(), recipe.fit.but(warmup=20), device='cpu')
    assert classify(model, train).metrics('own')['accuracy.own.clip'] > 0.6

# ---------------------------------------------------------------- experiments

def cells(name, upto, **parameters): # the namespace
    "An experiment's code cells in this process, to the first one that holds `upto`."
    for package in ('IPython', 'matplotlib', 'pandas', 'seaborn'): pytest.importorskip(package)
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in (c for c in nbformat.read(ROOT/f'nbs/experiments/{name}.ipynb', 4).cells if c.cell_type == 'code'):
        exec(compile(cell.source, f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []): space.update(parameters, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in parameters.items())])
        if upto in cell.source: return space
    raise AssertionError(f'no cell holds {upto!r}')

@pytest.mark.parametrize('name,parameters,error,words', [
    ('78_run_length', dict(policy='runlength'), ValueError, "Did you mean 'run_length'"), ('78_run_length', dict(task='colour'), ValueError, "unknown task 'colour'"),
    ('78_run_length', dict(fps=24.), ValueError, 'unknown frames per second 24.0'), ('78_run_length', dict(fps='30'), ValueError, 'parameter fps must be float'),
    ('78_run_length', dict(threads=0), ValueError, 'threads must be at least 1'), ('78_run_length', dict(threshold=-1.), ValueError, 'threshold must be at least 0'),
    ('79_run_length_speed', dict(batch=1), ValueError, 'batch 0 or at least 2'), ('79_run_length_speed', dict(backend='fast'), ValueError, "unknown backend 'fast'"),
    ('79_run_length_speed', dict(model='xl'), ValueError, "unknown model 'xl'"), ('79_run_length_speed', dict(data='no/such/folder'), FileNotFoundError, 'no/such/folder does not exist'),
    ('79_run_length_speed', dict(threshold=float('nan')), ValueError, 'threshold must be a number of at least 0')])
def test_refused_before_anything_is_made(name, parameters, error, words, tmp_path):
    with pytest.raises(error, match=words): cells(name, 'start_run(', runs_dir=str(tmp_path/'runs'), device='cpu', **parameters)
    assert not (tmp_path/'runs').exists()

def test_the_sweep_is_a_plan(tmp_path):
    runs = plan(read_sweep('run_length'), tmp_path, 'cpu')
    assert len(runs) == 9 and {r.parameters['policy'] for r in runs} == set(POLICIES) and {r.parameters['fps'] for r in runs} == {30.} and {r.parameters['preset'] for r in runs} == {'study'}

def smoke(folder, name, **parameters): # metrics, folder of the run, what the notebook shows
    pytest.importorskip('papermill')
    given = dict(runs_dir=str(folder), device='cpu', run='a') | parameters
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT/f'nbs/experiments/{name}.ipynb'), str(folder/f'{given["run"]}.ipynb')]
    done = subprocess.run(command + [x for k, v in given.items() for x in ('-p', k, str(v))], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    home = folder/name/given['run']
    shown = [o for c in nbformat.read(folder/f'{given["run"]}.ipynb', 4).cells for o in c.get('outputs', [])]
    return json.loads((home/'metrics.json').read_text()), home, '\n'.join(o.get('text', '') + o.get('data', {}).get('text/html', '') for o in shown)

@pytest.mark.slow
def test_smoke_runs_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path/'data'))
    found = {p: smoke(tmp_path, '78_run_length', policy=p, run=p) for p in ('all', 'run_length')}
    for p, (m, home, text) in found.items():
        for key in ('accuracy.own.clip', 'accuracy_low.own.clip', 'kept.own.clip', 'tokens.run_length.clip', 'speedup.own.training', 'seconds_epoch.own.train', 'clips_per_second.own.inference', 'seconds.loader'): assert isinstance(m[key], float), key
        for name in ('clips.png', 'curves.png'): assert (home/'figures'/name).is_file(), name
        assert m['accuracy.own.clip'] == m[f'accuracy.{p}.clip'] and m['kept.all.clip'] == 1 and m['tokens.random.clip'] == m['tokens.run_length.clip']
    assert 'not run: needs policy all' in found['run_length'][2] and 'not run: needs policy all' not in found['all'][2]
    again, _, _ = smoke(tmp_path, '78_run_length', policy='run_length', run='again')
    assert all(again[k] == v for k, v in found['run_length'][0].items() if k.startswith(('accuracy', 'kept', 'tokens'))), 'same seed, same numbers'

@pytest.mark.slow
def test_a_smoke_run_of_the_law(tmp_path, monkeypatch):
    "Without the folder of real clips it says so; with a user's own it shows them."
    for name, value in (('SLOTNB_DATA', 'data'), ('SLOTNB_REAL_DATA', 'nothing')): monkeypatch.setenv(name, str(tmp_path/value))
    m, home, text = smoke(tmp_path, '79_run_length_speed')
    assert 'NOT RUN, absent or unreadable' in text and 'others: not run' in text and 'clips.real' not in m
    assert m['kept.still.fps30.threshold0.1'] < m['kept.still.fps7.5.threshold0.1'] < 1 and m['kept.patterns.fps30.threshold0.1'] > m['kept.still.fps30.threshold0.1'] and m['speedup.auto_inference.keep1'] == 1
    assert m['dropped_error_max.circling.anchor_all_frames'] <= 0.1*1.0001 < m['dropped_error_max.circling.previous'] and m['speedup_ideal.blocks.keep0.3'] > 3
    np.savez(tmp_path/'mine.npz', video=np.random.default_rng(0).integers(0, 256, (1, 16, 64, 64, 3), dtype=np.uint8))
    m, home, text = smoke(tmp_path, '79_run_length_speed', data=str(tmp_path/'mine.npz'), run='own')
    assert m['clips.real'] == 1 and m['kept.real.every_frame'] == 1 and 'NOT RUN' not in text
