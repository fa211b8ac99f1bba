"Textures: patterns that belong to their objects, and nothing else of a scene that changes with them."
import dataclasses, hashlib, math

import pytest
import torch

pytest.importorskip('mujoco', reason="scenes are simulated by MuJoCo: pip install 'slotnb[data]'")

from slotnb.data.physics import COLOURS, Camera, SceneConfig, Trajectory, look_at, rotation_matrix, simulate
from slotnb.data.raycast import render
from slotnb.data.scenes import PRESETS, code_fingerprint, make_clip
from slotnb.data.texture import TEXTURES, Texture, second_share

TEXTURED = PRESETS['tiny_textured']

def patterned(kind, turn=0., shift=(0., 0., 0.), texture=True):
    "Three objects, seen from a camera; all of it, lamp and camera too, turned about the vertical and shifted."
    c, s = math.cos(turn), math.sin(turn)
    r, shift = torch.tensor([[c, -s, 0.], [s, c, 0.], [0., 0., 1.]]), torch.tensor(shift)
    position = torch.tensor([(-1.2, 0., .5), (.2, .4, .5), (1.5, -.5, .5)]) @ r.T + shift
    eye = look_at(8., 45., 20., 36.)
    eye = Camera(r @ eye.position + shift, eye.rotation @ r.T, eye.focal)
    n, zeros = 3, torch.zeros(1, 3, 3)
    quaternion = torch.tensor([math.cos(turn/2 + .2), 0., 0., math.sin(turn/2 + .2)]).expand(1, n, 4)
    pattern = Texture(torch.full((n + 1,), TEXTURES.index(kind)), torch.tensor([1, 2, 3, 4]), torch.tensor([1., 3., 3., 3.]), torch.arange(12.).reshape(4, 3) + .3)
    return Trajectory(position[None], quaternion, zeros, zeros, torch.zeros(1, n, n, dtype=torch.bool), torch.ones(n, dtype=torch.bool), torch.arange(3), torch.full((n, 3), .5),
                      torch.tensor([5, 6, 7]), torch.zeros(n, dtype=torch.int64), eye, r @ torch.tensor([.6, 0., .8]), pattern if texture else None)

def test_the_picture_of_a_textured_scene_stays_what_it_is():
    "Integers and correctly rounded operations only: these bytes hold on every machine. A wanted change of the look changes the hash here."
    tr = dataclasses.replace(patterned('noise'), rotation=torch.tensor([1., 0., 0., 0.]).expand(1, 3, 4), light=torch.tensor([.6, 0., .8]),
                             camera=Camera(torch.tensor([0., -8., 6.]), torch.tensor([[1., 0., 0.], [0., -.6, -.8], [0., .8, -.6]]), torch.tensor(3.)))
    tr.texture.kind[:] = torch.tensor([0, 0, 1, 2])
    out = render(tr, SceneConfig('golden', frames=1))
    assert hashlib.sha256(out['video'].numpy().tobytes() + out['labels'].numpy().tobytes()).hexdigest()[:16] == '1baa9d56d7ae7281'

@pytest.mark.parametrize('kind', TEXTURES)
@pytest.mark.parametrize('turn,shift', [(math.pi/2, (0., 0., 0.)), (1., (0., 0., 0.)), (0., (1.7, -.6, 0.))])
def test_patterns_move_and_turn_with_their_objects(kind, turn, shift):
    "Seen by a camera that turns and moves along, objects look the same, and the ground, which stays, does not."
    config = SceneConfig('moved', frames=1, samples=1) # a pixel on an edge has some ground in it otherwise
    a, b = (render(patterned(kind, *how), config) for how in ((), (turn, shift)))
    assert (a['labels'] != b['labels']).float().mean() < .002
    apart = (a['video'].int() - b['video'].int()).abs().amax(1)
    inside = (a['labels'] == b['labels']) & (a['labels'] > 0)
    assert inside.sum() > 300 and (apart[inside] > 4).float().mean() < .02
    assert (apart[a['labels'] == 0] > 4).float().mean() > .1
    plain = render(patterned(kind, texture=False), config)
    assert ((a['video'].int() - plain['video'].int()).abs().amax(1)[inside] > 20).float().mean() > .2

def test_all_but_colours_is_that_of_the_scene_without_textures():
    for i in range(6):
        plain, textured = make_clip(PRESETS['tiny'], 5, i), make_clip(TEXTURED, 5, i)
        assert torch.equal(plain.labels, textured.labels) and all(torch.equal(v, textured.truth[k]) for k, v in plain.truth.items())
        assert set(textured.truth) - set(plain.truth) == {'texture', 'second_colour'}
        changed = (plain.video.int() - textured.video.int()).abs().amax(1) > 8
        for inside in (plain.labels == 0, plain.labels > 0): assert changed[inside].float().mean() > .2

def test_textures_come_from_seed_and_index_alone():
    a, b = make_clip(TEXTURED, 0, 7), make_clip(TEXTURED, 0, 7)
    assert torch.equal(a.video, b.video)
    drawn = [simulate(TEXTURED.but(frames=1), seed, i) for seed in range(2) for i in range(30)]
    assert len({tuple(t.texture.offset.flatten().tolist()) for t in drawn}) == 60
    assert {k for t in drawn for k in t.texture.kind.tolist()} == {0, 1, 2} and all((t.texture.colour[1:] != t.colour).all() for t in drawn)
    one = [simulate(TEXTURED.but(frames=1, textures=('stripes',), texture_cells=(3., 3.)), 0, i).texture for i in range(5)]
    assert all((t.kind == 1).all() and (t.cells[1:] == 3).all() and t.cells[0] == 1.5 for t in one)

def test_absent_objects_have_no_texture():
    clip = next(c for c in (make_clip(TEXTURED.but(frames=2), 0, i) for i in range(20)) if not c.truth['present'].all())
    for key in ('texture', 'second_colour'): assert torch.equal(clip.truth[key] >= 0, clip.truth['present'])

def test_no_colour_is_only_an_objects():
    "Pixels of one colour belong to several objects or the ground: whoever clusters colours finds no objects."
    clip = make_clip(TEXTURED, 0, 1)
    luminance = clip.video.float().mean(1)
    spread = [luminance[clip.labels == k + 1].std() for k in range(4) if clip.truth['pixels'][:, k].sum() > 100]
    flat = make_clip(PRESETS['tiny'], 0, 1).video.float().mean(1)
    assert sum(spread) > sum(flat[clip.labels == k + 1].std() for k in range(4) if clip.truth['pixels'][:, k].sum() > 100)

@pytest.mark.parametrize('changes,says', [
    (dict(textures=('marble',)), "unknown texture 'marble'"), (dict(textures=TEXTURES, colours=('red',)), 'two colours at least'), (dict(texture_cells=(0., 1.)), 'above 0'),
    (dict(texture_cells=(3., 1.)), 'must be a range'), (dict(textures='noise'), 'textures')])
def test_impossible_textures_are_refused(changes, says):
    with pytest.raises(ValueError, match=says): SceneConfig('bad').but(**changes)

def test_tetrominoes_have_none():
    with pytest.raises(ValueError, match="kind 'physics'"): PRESETS['tetrominoes'].but(textures=TEXTURES)

def test_stored_sets_know_the_code_that_painted_them():
    assert 'slotnb.data.texture' in code_fingerprint.__wrapped__.__defaults__[0]
