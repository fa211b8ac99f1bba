"Scenes with a wall, returns from behind it, slots on a memory of pixels, and experiment 72."
import contextlib, json, subprocess, sys
from pathlib import Path

import nbformat
import pytest
import torch

from slotnb.data.scenes import code_fingerprint
from slotnb.evaluation import tracking
from slotnb.models.memory_slots import MemorySlots, MemorySlotsConfig, MemoryState, preset
from slotnb.models.slot_store import encode
from slotnb.batch.sweep import plan, read_sweep

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/72_occlusion.ipynb'

# ---------------------------------------------------------------- scenes

def test_objects_stay_behind_the_wall_and_come_back():
    pytest.importorskip('mujoco', reason="scenes are simulated by MuJoCo: pip install 'slotnb[data]'")
    from slotnb.data.occlusion import PRESETS, THICK, occluded_clip
    c = PRESETS['tiny_occluded'].but(samples=1)
    front, long = -c.walls - 2*THICK + THICK, 0
    for i in range(12):
        clip = occluded_clip(c, 3, i)
        t = clip.truth
        reach = t['half'][0].norm(dim=-1) # of any corner
        assert (t['position'][..., 1] - reach)[:, t['present'][0]].min() > front - 0.3 and t['position'][:, t['present'][0], :2].abs().max() < c.walls
        counts = torch.stack([torch.bincount(l.flatten().long(), minlength=c.max_objects + 1) for l in clip.labels])[:, 1:]
        assert torch.equal(counts.int(), t['pixels']) and (t['visibility'] <= 1).all() and t['pixels'][0].sum() > 20
        back = tracking.returns(clip.labels[None].long(), clip.labels[None].long())
        long += int((back['hidden'] >= 8).sum())
    assert long >= 4

def test_the_wall_is_scenery():
    pytest.importorskip('mujoco', reason="scenes are simulated by MuJoCo: pip install 'slotnb[data]'")
    from slotnb.data.occlusion import PRESETS, occluded_clip
    c = PRESETS['tiny_occluded'].but(frames=1, samples=1)
    clips = [occluded_clip(c, 0, i) for i in range(6)]
    wall = torch.stack([cl.video[0] for cl in clips]).float().std(0).amax(0) < 12 # nearly the same in all clips, but for the light
    assert wall[14:20, 13:18].all() and all((cl.labels[0, 14:20, 13:18] == 0).all() for cl in clips)

def test_other_scenes_do_not_know_of_it():
    assert code_fingerprint.__wrapped__.__defaults__[0] == ('slotnb.data.texture', 'slotnb.data.physics', 'slotnb.data.raycast', 'slotnb.data.scenes')

# ---------------------------------------------------------------- returns

def test_returns_equal_a_loop():
    g = torch.Generator().manual_seed(0)
    true, pred = torch.randint(0, 4, (4, 12, 5, 5), generator=g), torch.randint(0, 3, (4, 12, 5, 5), generator=g)
    for b, c, a, z in ((0, 1, 2, 5), (1, 2, 4, 9), (1, 3, 1, 2), (2, 1, 0, 4), (3, 3, 6, 12)): true[b, a:z][true[b, a:z] == c] = 0
    found, expect = tracking.returns(true, pred, 3), []
    for b in range(4):
        most = torch.bincount(pred[b][true[b] == 0], minlength=3).argmax()
        for c in (1, 2, 3):
            held = [torch.bincount(pred[b, t][true[b, t] == c], minlength=3) for t in range(12)]
            last, gone = None, False
            for t, h in enumerate(held):
                gone |= bool(h.sum() == 0)
                if h.sum() < 3: continue
                if last is not None and gone: expect.append([b, c, last, t, t - last - 1, int(held[last].argmax()), int(h.argmax()), held[last].argmax() != most and h.argmax() != most])
                last, gone = t, False
    rows = [list(r) for r in zip(*(v.tolist() for v in found.values()))]
    assert len(expect) >= 3 and rows == [[*r[:-1], bool(r[-1])] for r in expect]

def test_scores_of_returns():
    true = torch.zeros(2, 20, 6, 6, dtype=torch.int64)
    true[:, :, :3] = 1
    true[0, 3:7, :3], true[1, 2:14, :3] = 0, 0 # gone for 4 and for 12 frames
    pred = true + 1
    pred[1, 14:][pred[1, 14:] == 2] = 3 # the second returns in another slot
    scores = tracking.score_returns(true, pred, 'model')
    assert (scores['swap_after.model.hidden_4_7'], scores['swap_after.model.hidden_12_up'], scores['swap_after.model.all'], scores['swap_after.model.all.n']) == (0, 1, 0.5, 2)
    assert scores['untracked_after.model.all'] == 0 and scores['swap_in_view.model.all'] == 0
    assert tracking.score_returns(None, pred) == {} and tracking.score_returns(true, torch.ones_like(true))['failed_after.decoder.all'] == 1
    with pytest.raises(ValueError, match='min_pixels must be at least 1'): tracking.returns(true, pred, 0)
    with pytest.raises(ValueError, match='lag must be at least 1'): tracking.swap_rate(true, pred, lag=0)

def test_swaps_over_a_lag_equal_a_loop():
    g = torch.Generator().manual_seed(1)
    true, pred = torch.randint(0, 3, (2, 9, 4, 4), generator=g), torch.randint(0, 3, (2, 9, 4, 4), generator=g)
    true[0, 4][true[0, 4] == 1] = 0
    for lag in (1, 2, 3):
        for b, rate in enumerate(tracking.swap_rate(true, pred, lag=lag)):
            swaps, n = 0, 0
            for c in (1, 2):
                best = [torch.bincount(pred[b, t][true[b, t] == c], minlength=3).argmax() if (true[b, t] == c).any() else None for t in range(9)]
                for t in range(9 - lag):
                    if any(x is None for x in best[t:t + lag + 1]): continue
                    swaps, n = swaps + int(best[t] != best[t + lag]), n + 1
            assert float(rate) == pytest.approx(swaps/n)

# ---------------------------------------------------------------- slots on a memory

def video(b=2, t=6): return torch.rand(b, t, 3, 32, 32, generator=torch.Generator().manual_seed(0))

@torch.no_grad()
@pytest.mark.parametrize('changes', [dict(), dict(block='resnet', groups=4), dict(init='gaussian'), dict(memory_layers=3, states=12, tiles=3), dict(memory_layers=0)])
def test_pieces_and_steps_are_the_whole(changes):
    torch.manual_seed(0)
    model, clip, draw = MemorySlots(preset('smoke').but(**changes)).eval(), video(), lambda: torch.Generator().manual_seed(3)
    whole, state, frames = model(clip, generator=draw()), None, []
    for t in range(6):
        one = model.step(clip[:, t], state, draw())
        state = one.state
        frames.append(one)
    for get in (lambda r: r.slots.content, lambda r: r.recon, lambda r: r.attention_masks): assert (torch.cat([get(f) for f in frames], 1) - get(whole)).abs().max() < 2e-5
    first = model(clip[:, :2], generator=draw())
    assert (model(clip[:, 2:], first.state).recon - whole.recon[:, 2:]).abs().max() < 2e-5 and (first.recon - whole.recon[:, :2]).abs().max() < 2e-5
    slots, kept = encode(model, clip[:, 2:], first.state)
    assert (slots.content - whole.slots.content[:, 2:]).abs().max() < 2e-5 and all((a - b).abs().max() < 2e-5 for a, b in zip(kept.memory, whole.state.memory))

@torch.no_grad()
def test_a_frame_begins_as_any_other():
    "Without the memory's output every frame is for itself: the same frame gives the same slots, whenever it comes."
    torch.manual_seed(0)
    model = MemorySlots(preset('smoke')).eval()
    clip = video()[:, [0, 1, 2, 0]]
    remembered = model(clip).slots.content
    assert (remembered[:, 0] - remembered[:, 3]).abs().max() > 1e-4
    for layer in model.memory.layers: layer.ssm.C.zero_()
    alone = model(clip).slots.content
    assert (alone[:, 0] - alone[:, 3]).abs().max() < 2e-5 and (alone[:, 0] - alone[:, 1]).abs().max() > 1e-4

@torch.no_grad()
def test_slots_follow_their_beginnings():
    "Initial slots permuted permute what comes out."
    torch.manual_seed(0)
    model = MemorySlots(preset('smoke')).eval()
    was, order = model(video()), [4, 2, 0, 1, 3]
    model.init.mean.copy_(model.init.mean[:, order])
    assert (model(video()).slots.content - was.slots.content[:, :, order]).abs().max() < 2e-5

def test_gradients_reach_the_first_frame(tmp_path):
    torch.manual_seed(0)
    model, clip = MemorySlots(preset('smoke')), video().requires_grad_()
    model(clip).recon[:, -1].square().mean().backward()
    assert clip.grad.isfinite().all() and (clip.grad.flatten(2).abs().amax(2) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = MemorySlots.from_pretrained(model.save_pretrained(tmp_path/'m'))
    assert again.config == model.config and torch.equal(again.predict(video()).recon, model.predict(video()).recon)

@pytest.mark.parametrize('wrong,words', [
    (lambda m, s: m(video(), 3), 'must be the MemoryState of the frames before, got int'), (lambda m, s: m(video(1), s), 'the state is of 2 clips, the video of 1'),
    (lambda m, s: m(video(), MemoryState(s.memory[:0], s.start)), 'a tuple of 1 tensors'), (lambda m, s: m(video(), MemoryState(tuple(x.to(torch.complex128) for x in s.memory), s.start)), 'complex64, got .*complex128'),
    (lambda m, s: m(video()[..., :16], s), 'frames of .32, 32.'), (lambda m, s: m(video(), s, condition=torch.zeros(2, 1, 4)), 'give it without a state'), (lambda m, s: m.step(video(), s), 'video must be'),
])
def test_bad_input_has_a_name(wrong, words):
    model = MemorySlots(preset('smoke'))
    with pytest.raises(ValueError, match=words): wrong(model, model(video()).state)

def test_impossible_configs():
    for changes, words in ((dict(invariance='t'), 'slots of a memory are plain'), (dict(states=9), 'states must be a positive multiple'), (dict(memory_layers=-1), 'memory_layers must be at least 0'), (dict(block='resnet', groups=5), 'groups must divide'), (dict(kernels=(2, 3, 3)), 'three odd sizes')):
        with pytest.raises(ValueError, match=words): MemorySlotsConfig(**changes)

# ---------------------------------------------------------------- the experiment

def cells(upto, **parameters): # the namespace
    "The notebook's code cells in this process, to the first one that holds `upto`."
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in (c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == 'code'):
        exec(compile(cell.source.replace('import Image, display', 'import Image'), f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []): space.update(parameters, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in parameters.items())])
        if upto in cell.source: return space
    raise AssertionError(f'no cell holds {upto!r}')

@pytest.mark.parametrize('parameters,words', [
    (dict(model='savvy'), "unknown model 'savvy'.*Did you mean 'savi'"), (dict(preset='laptop'), "unknown preset 'laptop'"), (dict(length=1), 'length must be 2 to 32'), (dict(length=33), 'length must be 2 to 32'),
    (dict(clips=-1), 'clips must be at least 1'), (dict(steps=-5), 'steps must be an integer of at least 1'), (dict(find_steps=-1), 'steps must be an integer of at least 1'),
])
def test_refused_before_anything_is_made(parameters, words, tmp_path):
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    with pytest.raises(ValueError, match=words): cells('start_run(', runs_dir=str(tmp_path/'runs'), device='cpu', **parameters)
    assert not (tmp_path/'runs').exists()

def test_the_models_are_of_one_size():
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    with contextlib.ExitStack() as stack:
        space = cells('plans = {', preset='study', runs_dir=str(stack.enter_context(__import__('tempfile').TemporaryDirectory())), device='cpu')
        space['this']._abandon()
    size = {m: sum(p.numel() for p in space['builders'][m]().parameters()) for m in space['builders']}
    assert abs(size['memory']/size['savi'] - 1) < 0.001, size

def test_the_sweep_is_a_plan(tmp_path):
    runs = plan(read_sweep('occlusion'), tmp_path, 'cpu')
    assert len(runs) == 12 and {r.parameters['model'] for r in runs} == {'savi', 'memory', 'frames', 'psb'}

@pytest.mark.slow
@pytest.mark.parametrize('model', ['memory', 'psb'])
def test_a_smoke_run(model, tmp_path, monkeypatch):
    for package in ('papermill', 'mujoco'): pytest.importorskip(package)
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path/'data'))
    given = dict(runs_dir=str(tmp_path), device='cpu', run='a', model=model)
    done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(NOTEBOOK), str(tmp_path/'out.ipynb')] + [x for k, v in given.items() for x in ('-p', k, str(v))], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    home = tmp_path/'72_occlusion'/'a'
    metrics = json.loads((home/'metrics.json').read_text())
    for key in ('swap_after.decoder.all', 'failed_after.attention.all', 'swap_in_view.decoder.all', 'swap_after.colour.all', 'fg_ari.decoder.clip', 'mse_pixel.decoder.frame'): assert isinstance(metrics[key], float), key
    assert metrics['swap_after.decoder.all.n'] > 3 and metrics['failed_after.decoder.all'] >= metrics['swap_after.decoder.all']
    for name in ('hidden.png', 'curves.png', 'returns.png', 'best.png', 'median.png', 'worst.png', 'clips.gif'): assert (home/'figures'/name).is_file(), name
