"Scenes: physics, ray casting and stored sets, beyond what the notebooks show."
import functools, hashlib, math, subprocess, sys

import numpy as np
import pytest
import torch

pytest.importorskip('mujoco', reason="scenes are simulated by MuJoCo: pip install 'slotnb[data]'")

from slotnb.data.physics import COLOURS, SHAPES, Camera, SceneConfig, Trajectory, look_at, project, rotation_matrix, simulate
from slotnb.data.raycast import render
from slotnb.data.scenes import CLIPS, PRESETS, SPLITS, camera, clip_arrays, code_fingerprint, make_clip, scenes
from slotnb.data.shards import ShardedClips, write_shards

PHYSICS = [n for n, c in PRESETS.items() if c.kind == 'physics']

def still(position, shape, half, frames=1, eye=None, light=(0.6, 0.0, 0.8)):
    "A hand-made trajectory in which nothing moves."
    n = len(shape)
    zeros = torch.zeros(frames, n, 3)
    position, half = torch.tensor(position, dtype=torch.float32), torch.tensor(half, dtype=torch.float32)
    eye = eye or Camera(torch.tensor([0., -8., 6.]), torch.tensor([[1., 0., 0.], [0., -.6, -.8], [0., .8, -.6]]), torch.tensor(3.))
    return Trajectory(position.expand(frames, n, 3), torch.tensor([1., 0, 0, 0]).expand(frames, n, 4), zeros, zeros, torch.zeros(frames, n, n, dtype=torch.bool),
                      torch.ones(n, dtype=torch.bool), torch.tensor(shape), half, torch.arange(n) % len(COLOURS), torch.arange(n) % 2, eye, torch.tensor(light))

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_the_picture_of_a_fixed_scene_stays_what_it_is():
    "Painting uses correctly rounded operations only, so these bytes hold on every machine. A wanted change of the look changes the hash here."
    tr = still([(-1.2, 0., .5), (0.2, .4, .5), (1.5, -.5, .5)], [0, 1, 2], [(.5, .5, .5), (.5, .5, .5), (.5, .5, .5)])
    out = render(tr, SceneConfig('golden', frames=1))
    digest = hashlib.sha256(out['video'].numpy().tobytes() + out['labels'].numpy().tobytes()).hexdigest()[:16]
    assert digest == 'd4a67815610c73fc'

@pytest.mark.parametrize('name', PHYSICS)
def test_bits_do_not_depend_on_chunk_or_threads(name):
    config = PRESETS[name].but(frames=11)
    tr = simulate(config, 0, 4)
    whole, threads = render(tr, config), torch.get_num_threads()
    for chunk in (1, 3, 4, 10): assert same(whole, render(tr, config, chunk=chunk))
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert same(whole, render(tr, config))
    finally: torch.set_num_threads(threads)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('name', PHYSICS)
def test_bits_do_not_depend_on_the_device(name):
    config = PRESETS[name].but(frames=8)
    tr = simulate(config, 0, 0)
    assert same(render(tr, config), render(tr, config, device='cuda'))

def test_a_balls_area_is_that_of_its_ellipse():
    "A ball at distance D and depth Z projects to an ellipse of area pi (phi r)^2 sqrt(D^2 - r^2)/(Z^2 - r^2)^(3/2)."
    eye = look_at(8., 40., 15., 40.)
    for xy in ((0., 0.), (1.5, .7), (-1.4, 1.2), (.8, -1.6)):
        r, size = .5, 128
        tr = still([(*xy, r)], [0], [(r, r, r)], eye=eye)
        out = render(tr, SceneConfig('area', size=size, frames=1))
        q = eye.rotation @ (tr.position[0, 0] - eye.position)
        D2, Z = float(q @ q), float(q[2])
        area = math.pi*(float(eye.focal)*r)**2*math.sqrt(D2 - r*r)/(Z*Z - r*r)**1.5*(size/2)**2
        assert int(out['pixels'][0, 0]) == pytest.approx(area, rel=.03)

def test_a_boxs_silhouette_is_the_hull_of_its_corners():
    from scipy.spatial import ConvexHull
    q = torch.tensor([.8, .3, -.2, .45]); q = q/q.norm()
    tr = still([(.4, .3, 1.)], [1], [(.5, .7, .4)], eye=look_at(7., 35., 30., 35.))
    tr.rotation = q.expand(1, 1, 4)
    corners = torch.tensor([[x, y, z] for x in (-.5, .5) for y in (-.7, .7) for z in (-.4, .4)])
    hull = ConvexHull(project(corners @ rotation_matrix(q).T + tr.position[0, 0], tr.camera).numpy())
    out = render(tr, SceneConfig('hull', size=128, frames=1))
    assert int(out['pixels'][0, 0]) == pytest.approx(hull.volume*64**2, rel=.02)

def test_what_hides_what():
    "Along the view: a large ball before a small one hides it, and visibility says so."
    eye = Camera(torch.tensor([0., -8., 1.]), torch.tensor([[1., 0., 0.], [0., 0., -1.], [0., 1., 0.]]), torch.tensor(2.))
    out = render(still([(0., 0., 1.), (0., 3., 1.)], [0, 0], [(1.,)*3, (.5,)*3], eye=eye), SceneConfig('hide', frames=1))
    assert out['pixels'][0, 1] == 0 and out['full'][0, 1] > 10 and out['pixels'][0, 0] == out['full'][0, 0]
    assert out['labels'][0, 32, 32] == 1 and out['depth'][0, 32, 32] == pytest.approx(7., abs=.01)
    nothing = render(still([(0., -20., 1.)], [0], [(1.,)*3], eye=eye), SceneConfig('behind', frames=1))
    assert not nothing['labels'].any() and nothing['full'].sum() == 0

def test_a_shadow_falls_where_the_lamp_says():
    "The ground is darker at the foot of the line from a ball along the light, and nowhere else."
    eye, light = look_at(9., 60., 0., 40.), torch.tensor([.6, 0., .8])
    config = SceneConfig('shadow', frames=1, samples=1)
    ball = still([(0., 0., 2.)], [0], [(.4,)*3], eye=eye)
    with_, without = (render(t, config)['video'][0].int().sum(0) for t in (ball, still([(0., 0., -5.)], [0], [(.4,)*3], eye=eye)))
    darker = (without - with_ > 20) & (render(ball, config)['labels'][0] == 0)
    centre = (2*darker.nonzero().float().mean(0) + 1 - 64)/64
    assert darker.sum() > 10 and (centre - project(-light*(2/light[2]) + torch.tensor([0., 0., 2.]), eye)).abs().max() < 2/64

def test_antialiasing_approaches_a_finer_picture():
    "Averaged down from 4 x 4 the size, the picture is nearer to the anti-aliased one than to the plain one."
    config = PRESETS['tiny'].but(frames=1)
    plain, smooth = [], []
    for i in range(5):
        tr = simulate(config, 3, i)
        square = lambda v: (v.float()/255)**2 # linear light
        fine = square(render(tr, config.but(size=128))['video'])
        fine = torch.nn.functional.avg_pool2d(fine, 4)
        for n, errors in ((1, plain), (4, smooth)): errors.append(float((square(render(tr, config.but(samples=n))['video']) - fine).square().mean()))
    assert sum(smooth) < .35*sum(plain)

@pytest.mark.slow
@pytest.mark.parametrize('name', PHYSICS)
def test_physics_is_sane(name):
    "No energy from nowhere, nothing in the ground, nothing flies, and things do collide."
    config, collided = PRESETS[name], 0
    for i in range(60):
        tr = simulate(config, 11, i)
        p, mass = tr.present, tr.half[tr.present].prod(-1)
        energy = (mass*(.5*tr.velocity[:, p].square().sum(-1) + 9.81*tr.position[:, p, 2])).sum(-1)
        if config.launch_frames[1] == 0: assert energy.max() < 1.1*energy[0] # spin is not counted: a tumbling box gives some of it back
        assert (tr.half.amin(-1) - tr.position[..., 2])[:, p].max() < .02 and (tr.position[:, p, 2] - tr.half[p].norm(dim=-1)).max() < .5
        assert (tr.rotation.norm(dim=-1) - 1).abs().max() < 1e-5
        assert torch.equal(tr.collisions, tr.collisions.mT) and not tr.collisions[:, ~p].any()
        assert not tr.collisions.diagonal(dim1=1, dim2=2).any()
        collided += bool(tr.collisions.any())
        if config.walls: assert tr.position[:, p, :2].abs().max() < config.walls
    assert collided > 30

def test_objects_enter_and_leave_clevrer():
    entered = left = 0
    config = PRESETS['clevrer'].but(samples=1)
    for i in range(8):
        seen = render(simulate(config, 0, i), config)['pixels'] > 0
        first, last = seen[0], seen[-1]
        entered += int((~first & seen.any(0)).sum())
        left += int((seen.any(0) & ~last).sum())
    assert entered >= 4 and left >= 1

def test_obj3d_throws_one_ball():
    for i in range(10):
        tr = simulate(PRESETS['obj3d'], 0, i)
        moving = (tr.velocity[0].norm(dim=-1) > .1).nonzero()[:, 0]
        assert len(moving) == 1 and SHAPES[tr.shape[moving[0]]] == 'sphere' and 4 <= int(tr.present.sum()) <= 6

def test_colours_repeat_within_scenes():
    repeats = sum(len(set(c)) < len(c) for c in (simulate(PRESETS['tiny'].but(frames=1), 0, i) for i in range(40)) for c in [c.colour[c.present].tolist()])
    assert repeats > 5

@pytest.mark.slow
def test_workers_make_the_same_clips(tmp_path):
    config = PRESETS['tiny']
    make = functools.partial(clip_arrays, config, 7, SPLITS['test'], True)
    spec = dict(name='tiny', fps=config.fps)
    one, two = (ShardedClips(write_shards(tmp_path/str(w), spec, 7, make, workers=w, clips_per_shard=2)) for w in (1, 2))
    for i in range(7):
        want = make_clip(config, 7, SPLITS['test'] + i)
        for data in (one, two):
            assert torch.equal(data[i].video, want.video) and torch.equal(data[i].labels, want.labels)
            assert data[i].truth.keys() == want.truth.keys() and all(torch.equal(data[i].truth[k], want.truth[k]) for k in want.truth)

def test_splits_share_no_clip(tmp_path):
    assert max(CLIPS.values()) <= min(b - a for a, b in zip(list(SPLITS.values()), list(SPLITS.values())[1:]))
    sets = [scenes('tetrominoes', s, n=40, root=tmp_path) for s in SPLITS]
    assert len({d[i].video.numpy().tobytes() for d in sets for i in range(40)}) == 120
    assert len({d.fingerprint for d in sets}) == 3 and all(d.max_objects == 3 for d in sets)

def test_code_fingerprint_sees_code_only(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for i, text in enumerate(('def f(x):\n    "Doc."\n    return x + 1\n', '# why\ndef f(x): return x + 1\n', 'def f(x): return x + 2\n',
                              'PRESETS = dict(a=1)\nPRESETS["b"] = 2\ndef f(x): return x + 1\n')):
        (tmp_path/f'generator_{i}.py').write_text(text)
        prints.append(code_fingerprint((f'generator_{i}',)))
    assert prints[0] == prints[1] == prints[3] != prints[2]

def test_importing_needs_no_mujoco():
    code = 'import sys, slotnb.data.scenes; assert not {"mujoco", "PIL", "matplotlib"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)

@pytest.mark.parametrize('changes', [dict(kind='film'), dict(resting=(0, 0), launched=(0, 0)), dict(resting=(0, 40)), dict(colours=('pink',)), dict(launch_from='sky'), dict(frames=0)])
def test_impossible_configs_are_refused(changes):
    with pytest.raises(ValueError): SceneConfig('bad').but(**changes)

def test_a_crowded_stage_is_refused():
    with pytest.raises(ValueError, match='no room for'): simulate(SceneConfig('crowd', resting=(9, 9), stage=.5), 0, 0)
    with pytest.raises(ValueError, match='not simulated'): simulate(PRESETS['tetrominoes'], 0, 0)
    with pytest.raises(ValueError, match='no camera'): camera(make_clip(PRESETS['tetrominoes'], 0, 0))

@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip():
    "Beyond the pictures themselves (8 bytes a pixel, held twice while joined) 1,000 frames need no more than 100."
    code = '''
import resource, torch
torch.set_num_threads(1)
from slotnb.data.scenes import PRESETS, simulate, render
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
config = PRESETS['clevrer']
short, long = (simulate(config.but(frames=n), 0, 0) for n in (100, 1000))
render(short, config); a = peak()
render(long, config); b = peak()
print(b - a)'''
    grown = float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)
    assert grown < 2.5*900*64*64*8/2**20
