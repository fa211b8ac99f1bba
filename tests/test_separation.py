"The report's penalty trains nothing; its corrections do, and only what they say."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slotnb.core import generator, seeded
from slotnb.evaluation.segmentation import ari, ari_binary_sum, fg_ari, masks_to_labels
from slotnb.layers.slot_attention import SlotState
from slotnb.models.autoencoder import Record
from slotnb.models.savi import SAVi, preset
from slotnb.training.fit import FitConfig, fit
from slotnb.training.losses import Losses, Reconstruction, total
from slotnb.training.separation import (ARMS, UNITS, Compactness, MaskOverlap, Sham, SlotContrast, SlotRepulsion, SoftCentroids, StudentRepulsion, TemporalAttraction,
                                        TSNELiteral, arm, embed, feature_sum, moments, spatial_constant, tsne_literal)

torch.set_num_threads(1)

class Squares:
    "Two bright squares that drift, drawn for each step."
    batch_size, seed, length = 8, 0, 2

    def batch(self, step):
        g = generator(0, 'data', step)
        video = torch.zeros(8, self.length, 3, 32, 32, dtype=torch.uint8)
        for clip in video:
            for colour in torch.randint(80, 256, (2, 3, 1, 1), generator=g, dtype=torch.uint8):
                (y, x), (dy, dx) = torch.randint(4, 20, (2,), generator=g).tolist(), torch.randint(-2, 3, (2,), generator=g).tolist()
                for t, frame in enumerate(clip): frame[:, y + t*dy:y + t*dy + 8, x + t*dx:x + t*dx + 8] = colour
        return {'video': video, 'labels': None}

    def stream(self, start, stop): yield from map(self.batch, range(start, stop))

def train(loss, steps=50, model='sa', **fields):
    with seeded(0, 'init'): savi = SAVi(preset('smoke', model))
    config = FitConfig(steps=steps, batch_size=8, lr=1e-3, warmup=5, clip_norm=0.05, log_every=1, tensorboard=False, **fields)
    result = fit(savi, Squares(), loss, config, device='cpu')
    assert result.status == 'done' and result.steps == steps
    return savi, result.history

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_the_spatial_term_is_a_constant_of_algorithm_3():
    def loops(n, w, cells, step, near=5.):
        total = 0.
        for i in range(n):
            for j in range(i + 1, n):
                p, q = i % cells, j % cells
                d = step*math.hypot(p//w - q//w, p % w - q % w)
                if d < near: total += (1 - d)**2
        return total
    assert round(spatial_constant(576, (64, 64)), 1) == 78169.2
    assert math.isclose(spatial_constant(576, (64, 64)), loops(576, 64, 4096, 1.))
    assert [round(spatial_constant(n, (64, 64), '01'), 1) for n in (96, 576)] == [2335.7, 79278.6]
    assert [round(spatial_constant(n, (64, 64), 'pm1'), 1) for n in (96, 576)] == [1565.1, 51123.1]
    assert [round(spatial_constant(n, (64, 64), u)) for n in (1152, 2304) for u in UNITS] == [186291, 298557, 180344, 402535, 1012695, 573827]
    assert math.isclose(spatial_constant(100, (4, 6)), loops(100, 6, 24, 1.)) # more rows than cells: they begin again
    assert spatial_constant(1, (64, 64)) == 0 and spatial_constant(3, (1, 1), '01') == 3

@pytest.mark.parametrize('index', ['literal', 'slot'])
def test_the_feature_term_is_the_loop_of_algorithm_3(index):
    e, y, expected = np.random.default_rng(0).normal(size=(24, 2))*2, 4, 0.
    for i in range(24):
        for j in range(i + 1, 24):
            d = np.linalg.norm(e[i] - e[j])
            if d < 2 and (i//y != j//y if index == 'literal' else i % y != j % y): expected += (1 - d)**2
    assert expected > 1 and math.isclose(feature_sum(e, y, index)[0], expected)

def test_options_and_odd_inputs_of_the_literal_penalty():
    slots, before = torch.randn(2, 3, 4, 8, generator=generator(0, 'slots'), requires_grad=True), np.random.get_state()[1].copy()
    base = tsne_literal(slots, (16, 16))
    assert isinstance(base, float) and base == tsne_literal(slots.detach().numpy(), (16, 16)) == tsne_literal(slots.flatten(0, 1), (16, 16))
    wide = dict(close=9., init='random')
    for other in (dict(perplexity=5.), dict(n_iter=500), dict(seed=1), dict(init='pca'), dict(units='pm1'), dict(index='slot'), dict(close=3.), dict(near=2.)):
        assert tsne_literal(slots, (16, 16), **wide | other) != tsne_literal(slots, (16, 16), **wide), other
    assert (np.random.get_state()[1] == before).all() # t-SNE draws from its own generator
    assert tsne_literal(torch.ones(1, 1, 1, 4), (8, 8)) == 0 and math.isnan(tsne_literal(torch.full((2, 2, 4), math.nan), (8, 8)))
    for wrong in (dict(perplexity=24.), dict(units='px'), dict(index='//')):
        with pytest.raises(ValueError): tsne_literal(slots, (16, 16), **wrong)
    with pytest.raises(ValueError, match='slots must be'): tsne_literal(torch.ones(4), (8, 8))

@pytest.mark.parametrize('fields', [{}, dict(amp='bf16', channels_last=True)], ids=['fp32', 'bf16'])
def test_fifty_steps_with_the_literal_penalty_are_the_baselines_bit_for_bit(fields):
    baseline, plain = train(arm('baseline'), **fields)
    penalised, history = train(Losses([Reconstruction(), TSNELiteral(factor=1., every=25)]), **fields)
    assert same(baseline, penalised)
    assert plain['recon'] == history['recon'] and plain['grad_norm'] == history['grad_norm']
    assert min(history['tsne']) > 100*max(plain['recon']) # it was there, and large
    if not fields: assert not same(baseline, train(arm('feature'))[0]) # a term with a gradient is noticed

@pytest.mark.slow
def test_what_the_literal_rule_finds_is_one_object_in_other_frames():
    g = generator(0, 'toy')
    slots = torch.randn(16, 1, 6, 64, generator=g) + 0.05*torch.randn(16, 6, 6, 64, generator=g)
    e = embed(slots.flatten(0, 2).numpy())
    value, pairs = feature_sum(e, 6)
    assert len(pairs) == 16*6*math.comb(6, 2) == 1440
    assert (pairs[:, 0]//36 == pairs[:, 1]//36).all() and (pairs[:, 0] % 6 == pairs[:, 1] % 6).all()
    assert feature_sum(e, 6, 'slot')[0] == 0 and value < spatial_constant(576, (64, 64))/50

def free_record(b=4, t=2, k=3, seed=0, dtype=torch.float32):
    g = generator(seed, 'record')
    leaf = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()
    leaves = [leaf(b, t, k, 5), leaf(b, t, k, 6, 6), leaf(b, t, k, 2), leaf(b, t, k, 2)]
    content, logits, position, scale = leaves
    return leaves, lambda c, l, p, s: Record(SlotState(c, p, s), torch.zeros(b, t, 3, 6, 6), l.softmax(2), (2*l).softmax(2))

CORRECTIONS = [
    SlotRepulsion(1., 1.5), SlotRepulsion(1., 1.5, pairs='index'), StudentRepulsion(1.), StudentRepulsion(1., norm='layer'),
    SoftCentroids(1.), SoftCentroids(1., power=4., background=True), SoftCentroids(1., where='pose'), MaskOverlap(1.), MaskOverlap(1., 'entropy', 'attention'),
    Compactness(1.), Compactness(1., where='pose'), TemporalAttraction(1.), SlotContrast(1.), SlotContrast(1., across='clip'), Sham(SlotRepulsion(1., 1.5)), Sham(SoftCentroids(1.))]

@pytest.mark.parametrize('loss', CORRECTIONS, ids=repr)
def test_one_gradient_step_makes_a_term_smaller_and_its_flip_larger(loss):
    leaves, record = free_record()
    value, = loss(record(*leaves), None).values()
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    moved = lambda h: next(iter(loss(record(*(v - (h*g if g is not None else 0) for v, g in zip(leaves, grads))), None).values()))
    assert moved(1e-2) < value < moved(-1e-2)

@pytest.mark.parametrize('loss', [c for c in CORRECTIONS if not isinstance(c, Sham)], ids=repr)
def test_order_of_slots_and_clips_does_not_matter(loss):
    leaves, record = free_record(dtype=torch.float64)
    value, = loss(record(*leaves), None).values()
    for again in ([v[:, :, [2, 0, 1]] for v in leaves], [v[[1, 3, 0, 2]] for v in leaves]):
        assert torch.isclose(next(iter(loss(record(*again), None).values())), value, rtol=1e-10)
    twice = [torch.cat([v, v]) for v in leaves] # a mean over clips: nor does the size of the batch
    if getattr(loss, 'pairs', '') != 'index' and getattr(loss, 'across', '') != 'batch': assert torch.isclose(next(iter(loss(record(*twice), None).values())), value, rtol=1e-10)

@pytest.mark.parametrize('loss', CORRECTIONS, ids=repr)
@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 1, 2), (3, 2, 3)])
def test_degenerate_clips_give_numbers(loss, shape):
    b, t, k = shape
    for masks in (torch.zeros, torch.ones, lambda *s: F.one_hot(torch.zeros(s[0], s[1], *s[3:], dtype=torch.long), s[2]).movedim(-1, 2).float()):
        m, content = masks(b, t, k, 6, 6).requires_grad_(), torch.zeros(b, t, k, 4, requires_grad=True)
        position, scale = torch.zeros(b, t, k, 2, requires_grad=True), torch.zeros(b, t, k, 2, requires_grad=True)
        value, = loss(Record(SlotState(content, position, scale), torch.zeros(b, t, 3, 6, 6), m, m), None).values()
        assert value.isfinite() and value.shape == () and value.dtype == torch.float32
        for g in torch.autograd.grad(value, [m, content, position, scale], allow_unused=True): assert g is None or g.isfinite().all()

def test_masks_of_a_half_are_summed_in_full_precision():
    masks = torch.rand(1, 1, 3, 128, 128, generator=generator(0, 'm')).softmax(2).bfloat16()
    for narrow, wide in zip(moments(masks), moments(masks.double())):
        assert narrow.dtype == torch.float32 and torch.allclose(narrow.double(), wide, atol=1e-6)

@pytest.mark.parametrize('model', ['sa', 'isa_ts'])
@pytest.mark.parametrize('name', ARMS)
def test_every_arm_trains_every_model(name, model):
    savi, history = train(arm(name), steps=2, model=model, amp='bf16')
    assert all(p.isfinite().all() for p in savi.parameters()) and math.isfinite(history['loss'][-1])
    assert len(set(history) - {'step', 'seconds', 'lr', 'loss', 'recon', 'grad_norm'}) == {'baseline': 0, 'both': 2, 'sham': 2, 'flip': 2}.get(name, 1)

@pytest.mark.parametrize('loss', [SoftCentroids(1., where='pose', background=True), Compactness(1., where='pose', background=True),
                                  SlotRepulsion(1., 2.), MaskOverlap(1.)], ids=repr)
def test_the_gradient_reaches_the_weights_of_an_invariant_model(loss):
    with seeded(0, 'init'): savi = SAVi(preset('smoke', 'isa_ts'))
    video = Squares().batch(0)['video'].float()/255
    total(loss(savi(video, generator=generator(0, 'slots')), video)).backward()
    touched = {n.split('.')[0] for n, p in savi.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {'encoder', 'corrector'} <= touched and ('decoder' in touched) == isinstance(loss, MaskOverlap), touched

def test_a_negative_strength_turns_an_arm_around_and_unknown_arms_are_named():
    leaves, record = free_record()
    r = record(*leaves)
    one, flip = (arm(n)(r, r.recon) for n in ('both', 'flip'))
    assert one['recon'] == flip['recon'] and one['repulsion'] == -flip['repulsion'] != 0
    assert arm('feature', strength=2.)(r, r.recon)['repulsion'] == 2*one['repulsion']
    with pytest.raises(ValueError, match="unknown arm 'sign flip'.*baseline, literal"): arm('sign flip')
    with pytest.raises(ValueError, match='at least 5 clips, got 4'): Sham(SlotRepulsion())(free_record(k=5)[1](*free_record(k=5)[0]), None)

def test_the_reports_score_on_the_toy_table():
    "Three squares, seven slots: the two-cluster score hangs on who owns the background, and rewards merging."
    true = torch.zeros(1, 1, 64, 64, dtype=torch.long)
    true[..., 4:16, 4:16], true[..., 4:16, 30:42], true[..., 30:44, 20:34] = 1, 2, 3
    def masks(objects, shared):
        m = F.one_hot(torch.tensor([0, *objects])[true], 7).movedim(-1, 2).float()
        return torch.where(true[:, :, None] == 0, 1/7, m) if shared else m
    table = {((1, 2, 3), False): (0.000, 1.000, 1.000, 1.000), ((1, 2, 3), True): (1.000, 0.680, 1.000, 1.000),
             ((1, 1, 1), True): (1.000, 0.000, 0.973, 0.000), ((1, 1, 1), False): (0.000, 1.000, 0.973, 0.000)}
    for case, expected in table.items():
        m = masks(*case)
        labels = masks_to_labels(m)
        got = (ari_binary_sum(true, m, background='keep'), ari_binary_sum(true, m, background='drop_largest'), ari(true, labels), fg_ari(true, labels))
        assert [round(v.item(), 3) for v in got] == list(expected), case
