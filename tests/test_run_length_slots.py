"Slots on run-length tokens: equal to those on all tokens where patches repeat exactly, blind for the future, and cheaper by what is not looked at."
import math

import pytest
import torch
from einops import rearrange
from torch import Tensor

from slotnb.core import generator
from slotnb.evaluation.decompose import decompose
from slotnb.layers.run_length import Runs, ages, expand, pack, padded, patches
from slotnb.layers.weights import CheckpointError
from slotnb.models import kept_binder
from slotnb.models.kept_binder import Held, KeptBinder, attend_kept, changes, slices
from slotnb.models.savi import PRESETS as SAVI
from slotnb.models.run_length_slots import MODELS, PRESETS, PatchEncoder, RunLengthPSB, RunLengthPSBConfig, RunLengthSAVi, macs, preset, speed

EVER = (2**30, 0)

@pytest.fixture(autouse=True)
def wide():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def mask(b=2, t=6, h=3, w=3, change=0.35):
    m = torch.rand(b, t, h, w) < change
    m[:, 0] = True
    if b > 1 and len(set(Runs.of(m).counts)) == 1: m[0, -1, 0, 0] ^= True # rows of unequal length are part of the test
    return m

def in_parts(b=2, t=5, size=32, patch=4, change=0.3):
    "A video whose patches repeat exactly, or are drawn anew."
    runs = Runs.of(mask(b, t, size//patch, size//patch, change))
    return rearrange(expand(torch.rand(len(runs.index), 3, patch, patch), runs), 'b t h w c p q -> b t c (h p) (w q)'), runs

def binder_and_tokens(m=None, **more):
    runs = Runs.of(mask() if m is None else m)
    return KeptBinder(8, 12, heads=2, **more), torch.randn(4, 8), torch.randn(len(runs.index), 12), runs

def dense(binder, start, x, runs): return binder(start, expand(x, runs).flatten(2, 3))

def pair(name, **more):
    "A model that looks at what changed, and one with its weights that looks at everything."
    c = preset('smoke', name).but(**{'threshold': 0., 'init': 'learned', **more})
    model, every = MODELS[name](c).eval(), MODELS[name](c.but(threshold=None)).eval()
    every.load_state_dict(model.state_dict())
    return model, every

def worst(a: Tensor, b: Tensor) -> float: return (a - b).abs().max().item()

# ---- 1: exact on exact runs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('more', [{}, dict(history='window:3'), dict(history='window:1'), dict(history='frame'), dict(causal=False), dict(causal=False, history='window:2'), dict(eps=1e-5), dict(form='lse'),
                                  dict(form='direct'), dict(chunk=1), dict(dead_bias=True)], ids=str)
def test_the_binder_equals_the_binder_of_all_tokens(more):
    binder, start, x, runs = binder_and_tokens(**more)
    assert len(binder.blocks) == 3
    found = []
    for kept in (True, False):
        z, s = x.clone().requires_grad_(), start.clone().requires_grad_()
        slots, own, _ = binder.bind(s, z, runs) if kept else dense(binder, s, z, runs)
        names, params = zip(*binder.named_parameters())
        grads = torch.autograd.grad((slots*torch.arange(slots.numel()).view_as(slots).sin()).sum() + own.square().sum(), (z, s, *params), allow_unused=True)
        found.append({'slots': slots, 'shares': own, 'tokens': grads[0], 'start': grads[1], **dict(zip(names, grads[2:]))})
    for name, value in found[0].items():
        other = found[1][name]
        assert (value is None) == (other is None), name
        if value is not None: assert worst(value, other) < 1e-10, name

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('more', [{}, dict(reference='previous'), dict(pixels='pm1'), dict(patch=8)], ids=str)
def test_a_model_equals_the_model_of_all_tokens(name, more):
    model, every = pair(name, **more)
    video, runs = in_parts(patch=more.get('patch', 4))
    a, b = model(video), every(video)
    assert a.extras['kept'].equal(runs.mask) and b.extras['kept'].all()
    for x, y in ((a.recon, b.recon), (a.decoder_masks, b.decoder_masks), (a.attention_masks, b.attention_masks), (a.slots.content, b.slots.content)): assert worst(x, y) < 1e-10
    grads = (torch.autograd.grad(r.recon.sin().mean() + r.attention_masks.square().mean(), list(m.parameters()), allow_unused=True) for r, m in ((a, model), (b, every)))
    for (name, _), g, h in zip(model.named_parameters(), *grads): assert (g is None) == (h is None) and (g is None or worst(g, h) < 1e-10), name

def test_a_patch_is_a_patch():
    encoder, frames = PatchEncoder((16, 16), 4, (8, 8), 'fourier', (8,)), torch.rand(2, 3, 16, 16)
    tokens, (h, w) = encoder(frames)
    assert (h, w) == (4, 4) and encoder.dim == 8
    other = frames.clone()
    other[:, :, 4:8, 8:12] = torch.rand(2, 3, 4, 4)
    changed = (encoder(other)[0] != tokens).any(-1)
    assert changed.sum() == 2 and changed[:, 1*4 + 2].all()
    still = Runs.of(torch.rand(2, 1, 4, 4) > 0.5)
    assert worst(encoder.rows(patches(frames[:, None], still), still.place), tokens.view(2, 1, 4, 4, 8)[still.mask]) < 1e-12

# ---- 2 and 3: what would be wrong ----------------------------------------------------------------------------------------------------

def by_hand(q, k, w, inside=False, after=True):
    "Inverted attention with weights inside the logits, after the softmax over slots, both, or none."
    logits = torch.einsum('btnp,bmp->btnm', q, k)
    if inside: logits = logits + w.clamp(min=1e-300).log()[:, :, None]
    won = logits.softmax(2)*(w if after else (w > 0).double())[:, :, None]
    return torch.einsum('btnm,bmp->btnp', won/won.sum(-1, keepdim=True), k)

def test_weights_belong_behind_the_softmax():
    runs = Runs.of(mask())
    k, q = padded(torch.randn(len(runs.index), 5), runs), torch.randn(2, 6, 3, 5)
    w = torch.stack([padded(a, runs) for a in ages(runs)], 1).double()
    right, off = attend_kept(q, k, w), attend_kept(q, k, (w > 0).double())
    assert worst(right, by_hand(q, k, w)) < 1e-12 and worst(off, by_hand(q, k, w, after=False)) < 1e-12
    assert worst(by_hand(q, k, w, inside=True, after=False), off) < 1e-12 # the softmax over slots does not feel them
    assert worst(right, off) > 0.05

def with_weight(monkeypatch, wrong):
    true = Held.weight
    monkeypatch.setattr(Held, 'weight', lambda self, *a: wrong(self, true(self, *a)))

def test_counting_each_token_once_differs(monkeypatch):
    binder, start, x, runs = binder_and_tokens()
    truth = dense(binder, start, x, runs)[0]
    assert worst(binder.bind(start, x, runs)[0], truth) < 1e-10
    with_weight(monkeypatch, lambda held, w: (w > 0).long())
    assert worst(binder.bind(start, x, runs)[0], truth) > 0.01

def future_changes(binder, start, x, runs):
    "By how much slots of the first 3 frames move when all runs end with the third frame."
    m = runs.mask.clone(); m[:, 3:] = True
    other = Runs.of(m)
    early = other.time < 3
    y = torch.randn(len(other.index), x.shape[1])
    y[early] = x[runs.time < 3]
    return worst(binder.bind(start, x, runs)[0][:, :3], binder.bind(start, y, other)[0][:, :3])

def test_final_lengths_leak_the_future_and_ages_do_not(monkeypatch):
    binder, start, x, runs = binder_and_tokens()
    assert future_changes(binder, start, x, runs) < 1e-12
    with_weight(monkeypatch, lambda held, w: held.length.unsqueeze(1)*(w > 0))
    assert future_changes(binder, start, x, runs) > 0.01
    assert worst(binder.bind(start, x, runs)[0], dense(binder, start, x, runs)[0]) > 0.01

def test_no_gradient_comes_from_the_future():
    binder, start, x, runs = binder_and_tokens()
    x.requires_grad_()
    slots = binder.bind(start, x, runs)[0]
    for t in range(6):
        g, = torch.autograd.grad(slots[:, t].sin().sum(), x, retain_graph=True)
        assert not g[runs.time > t].any() and g[runs.time == 0].any()

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('reference', ['anchor', 'previous'])
def test_frames_to_come_are_unseen(name, reference):
    model, _ = pair(name, threshold=0.2, reference=reference)
    video = in_parts()[0]
    later = torch.cat([video[:, :3], torch.rand(2, 2, 3, 32, 32)], 1)
    a, b = model(video).slots.content, model(later).slots.content
    assert worst(a[:, :3], b[:, :3]) < 1e-12 and worst(a[:, 3:], b[:, 3:]) > 1e-3

# ---- 4: a stream ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('history', ['all', 'window:3', 'window:1', 'frame'])
@pytest.mark.parametrize('pieces', [(1,)*6, (2, 2, 2), (3, 3), (1, 4, 1)], ids=str)
def test_the_binder_in_pieces(history, pieces):
    binder, start, x, runs = binder_and_tokens(history=history)
    whole, shares, _ = binder.bind(start, x, runs)
    state, parts = None, []
    for grid, m in zip(expand(x, runs).split(pieces, 1), runs.mask.split(pieces, 1)):
        parts.append(binder.bind(None if state else start, *pack(grid, m), state=state))
        state = parts[-1][2]
    assert worst(torch.cat([p[0] for p in parts], 1), whole) < 1e-12 and worst(torch.cat([p[1] for p in parts], 1), shares) < 1e-12
    assert state.frames == 6
    if history == 'all': assert state.held.counts == runs.counts and state.held.length.sum(1).tolist() == [6*9]*2
    if history in ('window:1', 'frame'): assert state.held.counts == (9, 9) # memory is bounded by what is shown
    if history == 'window:3':
        seen = [len({n for n in (runs.index.new_tensor(range(len(runs.index)))[runs.clip == b]).tolist() if runs.time[n] + runs.length[n] > 4}) for b in range(2)]
        assert state.held.counts == tuple(seen)

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('more', [{}, dict(threshold=0.3), dict(threshold=0.3, reference='previous')], ids=str)
@pytest.mark.parametrize('pieces', [(1,)*5, (2, 3)], ids=str)
def test_a_model_in_pieces(name, more, pieces):
    model, _ = pair(name, **more)
    video = in_parts()[0]
    video = (0.9*video + 0.1*torch.rand_like(video)) if more else video # nothing repeats exactly
    whole, state, parts = model(video), None, []
    assert 0.2 < whole.extras['kept'].double().mean() < 0.95
    for piece in video.split(pieces, 1):
        parts.append(model(piece, state))
        state = parts[-1].state
    join = lambda get: torch.cat([get(p) for p in parts], 1)
    assert join(lambda p: p.extras['kept']).equal(whole.extras['kept'])
    assert worst(join(lambda p: p.recon), whole.recon) < 1e-10 and worst(join(lambda p: p.attention_masks), whole.attention_masks) < 1e-10

def test_a_repeated_patch_moves_a_counter_and_stores_nothing():
    model, _ = pair('psb')
    video, runs = in_parts(b=1, t=4)
    state, rows = model.step(video[:, 0]).state, []
    model.encoder.embed.register_forward_hook(lambda m, x, y: rows.append(len(x[0])))
    for t in range(1, 4):
        before, state = state, model.step(video[:, t], state).state
        new, had = int(runs.mask[0, t].sum()), before.held.counts[0]
        assert rows[-1] == new > 0 and state.held.counts == (had + new,)
        assert state.held.tokens[:, :had].equal(before.held.tokens) and state.held.born[:, :had].equal(before.held.born)
        grown = (state.held.length[:, :had] - before.held.length)[0]
        assert grown.sum() == 64 - new and grown.max() == 1
    again = model.step(video[:, 3], state).state
    assert rows[-1] == 0 and again.held.tokens is state.held.tokens and again.held.born is state.held.born and (again.held.length - state.held.length).sum() == 64

def test_savi_keeps_its_keys_where_nothing_is_new():
    model, _ = pair('savi')
    video, rows = in_parts()[0], []
    state = model(video[:, :2]).state
    model.encoder.embed.register_forward_hook(lambda m, x, y: rows.append(len(x[0])))
    again = model(video[:, 1:2].expand(-1, 3, -1, -1, -1), state).state
    assert not rows and again.held is state.held

# ---- 5 to 7: thresholds and maps -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MODELS)
def test_a_tiny_threshold_is_none(name):
    model, _ = pair(name)
    tiny = MODELS[name](model.config.but(threshold=1e-6)).eval()
    tiny.load_state_dict(model.state_dict())
    video = in_parts()[0]
    assert torch.equal(model(video).recon, tiny(video).recon)

def sprites(seed, t=6):
    "Soft discs that move by parts of a pixel over a still ground, under light that flickers a little."
    g = generator(seed, 'sprites')
    y, x = torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing='ij')
    video = torch.rand(3, 1, 1, generator=g).expand(t, 3, 32, 32).clone()
    for _ in range(3):
        at, by, colour = 6 + 20*torch.rand(2, generator=g), 3*torch.rand(2, generator=g) - 1.5, torch.rand(3, 1, 1, generator=g)
        for i in range(t):
            d = ((y - at[0] - i*by[0])**2 + (x - at[1] - i*by[1])**2).sqrt()
            a = torch.sigmoid(2*(4 - d))
            video[i] = video[i]*(1 - a) + a*colour
    light = 1 + 0.02*torch.randn(t, 1, 1, 1, generator=g).cumsum(0)*(torch.rand(1, 1, 32, 32, generator=g) > 0.5)
    return ((video*light).clamp(0, 1)*255).round()/255

@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_the_error_grows_with_the_threshold(name):
    _, every = pair(name)
    video = torch.stack([sprites(s) for s in range(20)])
    truth, errors, kept = every(video).slots.content, [], []
    for threshold in (0., .02, .05, .1, .2):
        model = MODELS[name](every.config.but(threshold=threshold)).eval()
        model.load_state_dict(every.state_dict())
        record = model(video)
        errors.append((record.slots.content - truth).abs().mean().item()); kept.append(record.extras['kept'].double().mean().item())
    assert errors[0] < 1e-12 and errors == sorted(errors) and errors[-1] > 1e-5 and kept == sorted(kept, reverse=True)

def test_maps_come_back_on_the_full_grid():
    model, every = pair('psb')
    video = in_parts()[0]
    a, b = model(video), every(video)
    assert a.attention_masks.shape == (2, 5, 5, 8, 8) and worst(a.attention_masks.sum(2), torch.ones(2, 5, 8, 8)) < 1e-12
    assert worst(a.attention_masks, b.attention_masks) < 1e-10
    assert a.recon.shape == video.shape and a.decoder_masks.shape == (2, 5, 5, 32, 32)

# ---- 8: one frame at a time ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('more', [{}, dict(invariance='ts', position='', token_mlp=(), delta=1.), dict(predictor='mlp', lstm=8, kernel_head='mlp', stochastic=True)], ids=str)
def test_held_keys_and_values_are_those_of_the_frame(more):
    model, every = pair('savi', **more)
    video = in_parts()[0]
    prepared, *_ = model.held_tokens(video)
    expected = every.tokens(rearrange(video, 'b t c h w -> (t b) c h w'))[0]
    for a, b in zip(prepared, expected): assert a.shape == b.shape and worst(a, b) < 1e-12
    draw = lambda: torch.Generator().manual_seed(3)
    assert worst(model(video, generator=draw()).recon, every(video, generator=draw()).recon) < 1e-10

# ---- 9: what it costs ----------------------------------------------------------------------------------------------------------------

def test_work_is_that_of_kept_tokens(monkeypatch):
    model, _ = pair('psb', chunk=1, blocks=2) # slices of a frame's 64 tokens
    pairs, rows, share = [], [], kept_binder.share
    monkeypatch.setattr(kept_binder, 'share', lambda q, k, *a: (pairs.append(q.shape[2]*k.shape[3]), share(q, k, *a))[1])
    model.encoder.embed.register_forward_hook(lambda m, x, y: rows.append(len(x[0])))
    plain = model.binder.plain
    model.binder.plain = lambda x: (rows.append(len(x)), plain(x))[1]
    work = {}
    for change in (0.1, 0.5, 1.):
        pairs.clear(); rows.clear()
        video, runs = in_parts(b=1, t=12, change=change)
        model(video)
        assert rows == [len(runs.index)]*2
        needed, dense_pairs = int((ages(runs) > 0).sum()), 64*12*13//2
        per_block = sum(pairs)/2
        assert needed <= per_block <= needed + 64*12, 'no more is computed than is seen, but for the border of a slice'
        assert macs(model.config, runs)['competition'] == 2*2*5*32*needed
        work[change] = needed/dense_pairs
    assert work[1.] == 1 and work[0.1] < work[0.5] < 0.75 and work[0.1] < 0.35

def test_macs():
    full = Runs.of(torch.ones(2, 4, 8, 8, dtype=torch.bool))
    c = RunLengthPSBConfig(size=(32, 32), dim=8, slots=3, heads=2, blocks=1, channels=(10,), token_mlp=(6,), start=(4, 4))
    assert macs(c, full) == {'front end': 512*(48*10 + 10*6), 'competition': 2*3*6*128*10}
    assert macs(c.but(history='window:2'), full)['competition'] == 2*3*6*128*7 and macs(c.but(history='frame'), full)['competition'] == 2*3*6*512
    assert macs(c.but(causal=False), full)['competition'] == 2*3*6*128*16
    assert macs(preset('smoke', 'savi'), full)['projections'] == 2*512*32*32

def test_memory_is_not_that_of_all_pairs():
    "Beside the weights, what is kept for the backward pass grows with frames and tokens, not with their product."
    def saved(t, form):
        sizes, runs = [], Runs.of(torch.ones(1, t, 2, 2, dtype=torch.bool))
        q, k, w = torch.randn(1, t, 6, 8, requires_grad=True), torch.randn(1, 4*t, 8, requires_grad=True), ages(runs)[None].double()
        with torch.autograd.graph.saved_tensors_hooks(lambda v: (sizes.append(v.numel()*(v.shape != w.shape)), v)[1], lambda v: v): attend_kept(q, k, w, form=form)
        return sum(sizes)
    for form, grows in (('chunked', (1.9, 2.1)), ('direct', (3, 4.1))):
        a, b, c = (saved(t, form) for t in (16, 32, 64))
        assert all(grows[0] < r < grows[1] for r in (b/a, c/b)), form

# ---- edges ---------------------------------------------------------------------------------------------------------------------------

def test_clips_do_not_know_each_other():
    binder, start, x, runs = binder_and_tokens()
    slots = binder.bind(start, x, runs)[0]
    for b in range(2): assert worst(binder.bind(start, x[runs.clip == b], Runs.of(runs.mask[b:b + 1]))[0], slots[b:b + 1]) < 1e-12

def test_slots_that_take_no_part():
    binder, start, x, runs = binder_and_tokens()
    alive = torch.tensor([True, False, True, True])
    less, fewer = binder.bind(start, x, runs, alive=alive.expand(2, -1)), binder.bind(start[alive], x, runs)
    assert worst(less[0][:, :, alive], fewer[0]) < 1e-12 and worst(less[1][:, :, alive], fewer[1]) < 1e-12

@pytest.mark.filterwarnings('ignore:Anomaly Detection')
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (3, 1, 2, 2), (1, 5, 1, 1)], ids=str)
def test_the_smallest_without_a_nan(shape):
    runs = Runs.of(torch.ones(shape, dtype=torch.bool))
    binder, x = KeptBinder(8, 8, heads=2), torch.randn(len(runs.index), 8, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        for n in (1, 3): binder.bind(torch.randn(n, 8), 1e3*x, runs)[0].sum().backward()
    assert x.grad.isfinite().all()

def test_a_starved_slot_gets_nothing():
    q = torch.tensor([[[[40., 0.], [-40., 0.]]]], requires_grad=True)
    k, w = torch.tensor([[[1., 2.], [1., 3.]]], requires_grad=True), torch.tensor([[[1., 5.]]])
    out = attend_kept(q, k, w)
    assert out[0, 0, 1].eq(0).all() and torch.allclose(out[0, 0, 0], torch.tensor([1., 17/6]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k)))

def test_gradients_by_differences():
    runs = Runs.of(mask(2, 3, 2, 2, 0.5))
    k, q = padded(torch.randn(len(runs.index), 3), runs).requires_grad_(), torch.randn(2, 3, 3, 3, requires_grad=True)
    w, alive = torch.stack([padded(a, runs) for a in ages(runs)], 1).double(), torch.tensor([[True, True, False], [True, True, True]])
    for eps in (0., 0.1): assert torch.autograd.gradcheck(lambda q, k: attend_kept(q, k, w, alive, eps, parts=slices(w, 3)), (q, k))

def test_half_precision():
    torch.set_default_dtype(torch.float32)
    for name in MODELS:
        model, _ = pair(name)
        video = in_parts()[0].float()
        with torch.autocast('cpu', torch.bfloat16): low = model(video)
        assert low.recon.dtype == low.slots.content.dtype == torch.float32 and worst(low.recon, model(video).recon) < 0.2
        low.recon.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if 'prior' not in n)

def test_the_same_weights_from_the_same_seed():
    for name in MODELS:
        made = []
        for threshold in (None, 0., 0.2):
            torch.manual_seed(5)
            made.append(MODELS[name](preset('smoke', name).but(threshold=threshold)).state_dict())
        assert all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(made, made[1:]))

def test_longer_and_shorter_than_a_window():
    model, every = pair('psb')
    video = in_parts()[0]
    for window in (1, 2, 5, 9):
        slide = model.sliding(video, window)
        assert worst(slide.recon, every.sliding(video, window).recon) < 1e-10 and slide.extras['kept'].shape == (2, 5, 8, 8)
    assert worst(model.sliding(video, 2).recon[:, 4], model(video[:, 3:]).recon[:, 1]) < 1e-12
    with pytest.raises(ValueError, match='at least 1 frame'): model.sliding(video, 0)

@pytest.mark.parametrize('name', MODELS)
def test_predicted_stored_and_read_back(name, tmp_path):
    torch.set_default_dtype(torch.float32)
    model, _ = pair(name, init='gaussian')
    video = in_parts()[0].float()
    a, b = model.predict(video, frames=64), model.predict(video, frames=2)
    assert a.extras['kept'].equal(b.extras['kept']) and worst(a.recon, b.recon) < 1e-4
    again = MODELS[name].from_pretrained(model.save_pretrained(tmp_path/'model'))
    assert again.config == model.config and torch.equal(decompose(again, video).recon, decompose(model, video).recon)
    other = {'psb': RunLengthSAVi, 'savi': RunLengthPSB}[name]
    with pytest.raises(CheckpointError, match=f'holds a {type(model).__name__}'): other.from_pretrained(tmp_path/'model')

def test_conditioned_on_boxes_and_slots_of_ones_own():
    video, boxes = in_parts()[0], torch.rand(2, 3, 4).sort(-1).values
    torch.set_default_dtype(torch.float32)
    video, boxes = video.float(), boxes.float()
    for name in MODELS:
        model, every = pair(name, init='boxes')
        assert worst(model(video, condition=boxes).recon, every(video, condition=boxes).recon) < 1e-4
    model, every = pair('psb')
    own = torch.randn(7, 32)
    assert worst(model(video, slots=own).recon, every(video, slots=own).recon) < 1e-4

def test_speed_reports_every_model():
    torch.set_default_dtype(torch.float32)
    models, video = {str(t): RunLengthPSB(preset('smoke').but(threshold=t)) for t in (None, 0.)}, torch.rand(1, 2, 3, 32, 32)
    found = speed(models, video, 2)
    assert list(found) == ['None', '0.0'] and found['None']['encoder_ratio'] == found['None']['step_ratio'] == 1
    assert all(v > 0 for f in found.values() for v in f.values())
    assert {'encoder', 'step'} < speed({'savi': RunLengthSAVi(preset('smoke', 'savi'))}, video, 1)['savi'].keys()

# ---- what is refused -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('text,more', [('cannot be cut into patches of 5x5', dict(patch=5)), ('cannot be cut', dict(patch=0)), ('threshold must be', dict(threshold=math.nan)), ('threshold must be at least 0', dict(threshold=-.1)), ('threshold must be', dict(threshold=math.inf)),
                                       ("Did you mean 'anchor'", dict(reference='ancor')), ('strides is of a CNN', dict(strides=(2, 1))), ('kernel is of a CNN', dict(kernel=5)), ('at least one', dict(channels=())), ('Did you mean', dict(threshhold=0.1))], ids=str)
def test_configs_that_cannot_be(name, text, more):
    with pytest.raises(ValueError, match=text): PRESETS[name]['smoke'].but(**more)

def test_several_heads_need_all_tokens():
    with pytest.raises(ValueError, match='one bottom-up head'): preset('smoke').but(heads_bu=2)
    assert RunLengthPSB(preset('smoke').but(heads_bu=2, threshold=None))(torch.rand(1, 2, 3, 32, 32)).extras['kept'].all()

def test_the_front_end_and_the_width_of_another_model():
    c = RunLengthPSBConfig.like(SAVI['laptop'], blocks=2, threshold=0.)
    assert (c.dim, c.channels, c.strides, c.patch, c.blocks) == (64, (32, 64, 64), (), 4, 2) and RunLengthPSB(c).encoder.embed[-1].out_features == 64
    with pytest.raises(ValueError, match='field|unexpected'): RunLengthPSBConfig.of(preset('smoke'), blokcs=2)

def test_bad_input():
    psb, other, savi, again = (MODELS[n](preset('smoke', n)) for n in ('psb', 'psb', 'savi', 'savi'))
    every, ahead, short = (RunLengthPSB(preset('smoke').but(**m)) for m in (dict(threshold=None), dict(causal=False), dict(max_frames=3)))
    video = torch.rand(2, 2, 3, 32, 32)
    state, seen, plain = psb(video).state, savi(video).state, every(video).state
    for text, call in (('another model', lambda: other(video, state)), ('another model', lambda: again(video, seen)), ('KeptState of the frames before', lambda: psb(video, plain)), ('KeptState', lambda: psb(video, seen)), ('HeldSAViState', lambda: savi(video, state)),
                       ('PSBState', lambda: every(video, state)), ('2 clips with 64 places, these frames are of 1', lambda: psb(video[:1], state)), ('of 2 clips, these frames are of 1', lambda: savi(video[:1], seen)), ('looks ahead', lambda: ahead(video, ahead(video).state)),
                       ('4 frames, but max_frames is 3', lambda: short(video, short(video).state)), ('got torch.uint8', lambda: psb((video*255).to(torch.uint8))), ('got torch.int64', lambda: savi(video.long())), ('takes frames of', lambda: psb(video[..., :30])),
                       ('video must be', lambda: savi(video[0])), ('at least one clip and one frame', lambda: psb(video[:0])), ('without a state', lambda: psb(video, state, slots=torch.randn(5, 32))), ('without a state', lambda: savi(video, seen, condition=torch.rand(2, 1, 4))),
                       ('initial slots must be', lambda: psb(video, slots=torch.randn(5, 31))), ('takes no condition', lambda: savi(video, condition=torch.rand(2, 1, 4))), ('unknown model', lambda: preset('smoke', 'pbs')), ("Did you mean 'study'", lambda: preset('studdy'))):
        with pytest.raises(ValueError, match=text): call()

def test_kept_tokens_that_do_not_fit():
    binder, start, x, runs = binder_and_tokens()
    m = runs.mask.clone(); m[0, 0, 1, 1] = m[1, 0, 0, 2] = False
    state = binder.bind(start, x, runs)[2]
    for text, call in (('as many as the runs say', lambda: binder.bind(start, x[1:], runs)), ('12', lambda: binder.bind(start, x[:, :8], runs)), ('2 places of the first frame', lambda: binder.bind(start, x[:int(m.sum())], Runs.of(m))), ('give one of them', lambda: binder.bind(start, x, runs, state)),
                       ('give one of them', lambda: binder.bind(None, x, runs)), ('initial slots', lambda: binder.bind(start[:, :4], x, runs)), ('one bottom-up head', lambda: KeptBinder(8, 12, heads=2, heads_bu=2).bind(start, x, runs)), ('one per slot', lambda: binder.bind(start, x, runs, alive=torch.ones(2, 3, dtype=torch.bool)))):
        with pytest.raises(ValueError, match=text): call()

# ---- a GPU ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('name', MODELS)
def test_on_a_gpu(name):
    model, every = (m.to('cuda') for m in pair(name))
    video = in_parts()[0].to('cuda')
    a, state = model(video), None
    assert worst(a.recon, every(video).recon) < 1e-10
    for t in range(5):
        one = model.step(video[:, t], state)
        state = one.state
    assert worst(one.recon[:, 0], a.recon[:, -1]) < 1e-10
    a.recon.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
