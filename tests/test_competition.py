"PSB's attention: three forms, one meaning; what they cost, and what they refuse."
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slotnb.layers.competition import FORMS, STARVED, apart as split_heads, attend, compete, own_frame, share, span_of, visible, weights

def tensor(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def scene(frames=4, keys=None, slots=3, tokens=5, dim=8, batch=2):
    keys = keys or frames
    return tensor(batch, frames, slots, dim, seed=1), tensor(batch, keys, tokens, dim, seed=2), tensor(batch, keys, tokens, dim, seed=3)

def with_gradients(form, q, k, v, bias=None, **more):
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *([] if bias is None else [bias]))]
    out = compete(*leaves[:3], form=form, **({} if bias is None else {'bias': leaves[3]}), **more)
    return [out, *torch.autograd.grad((out*tensor(*out.shape, seed=9)).sum(), leaves)]

def scaled(q, k, heads=1): return split_heads(q*(q.shape[3]//heads)**-0.5, heads), split_heads(k, heads)

def apart(a, b): return max((x - y).abs().max().item() for x, y in zip(a, b))

every_form = pytest.mark.parametrize('form', FORMS)

def loops(q, k, v, heads=1, history='all', causal=True, bias=None, weight=None, eps=0.):
    "Query frame, slot, key frame, token: four loops."
    (b, t, n, dim), (s, l), d = q.shape, k.shape[1:3], q.shape[3]//heads
    back, ahead = span_of(history, causal)
    out, first = torch.zeros_like(q), s - t
    for i in range(b):
        for at in range(t):
            for me in range(n):
                for h in range(heads):
                    mine, mass, mix = slice(h*d, (h + 1)*d), 0., torch.zeros(d, dtype=q.dtype)
                    for key in range(s):
                        if not -back <= key - (first + at) <= ahead: continue
                        for token in range(l):
                            logits = torch.stack([torch.stack([q[i, at, m, g*d:(g + 1)*d] @ k[i, key, token, g*d:(g + 1)*d]/d**0.5 + (0. if bias is None else bias[g, at, key]) for m in range(n)]) for g in range(heads)])
                            won = (logits.exp()/logits.exp().sum())[h, me]*(1. if weight is None else weight[i, at, key, token])
                            mass, mix = mass + won, mix + won*v[i, key, token, mine]
                    out[i, at, me, mine] = mix/(mass + eps)
    return out

@every_form
@pytest.mark.parametrize('heads', [1, 2])
@pytest.mark.parametrize('history,causal', [('all', True), ('all', False), ('window:2', True), ('window:2', False), ('frame', True)])
def test_equals_loops(form, heads, history, causal):
    q, k, v = scene(3, 4, slots=2, tokens=3)
    bias, weight = tensor(heads, 3, 4, seed=4), torch.randint(1, 4, (2, 3, 4, 3), generator=torch.Generator().manual_seed(5)).double()
    settings = dict(heads=heads, history=history, causal=causal, bias=bias, weight=weight, eps=1e-3)
    assert (compete(q, k, v, form=form, **settings) - loops(q, k, v, **settings)).abs().max() < 1e-10

@pytest.mark.parametrize('form', ['chunked', 'lse'])
@pytest.mark.parametrize('heads', [1, 2, 4])
@pytest.mark.parametrize('eps', [0., 1e-5, 0.1])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('history,causal', [('all', True), ('all', False), ('window:3', True), ('frame', True)])
def test_forms_agree_in_values_and_gradients(form, heads, eps, weighted, history, causal):
    q, k, v = scene(5, 6)
    weight = torch.randint(0, 3, (2, 5, 6, 5), generator=torch.Generator().manual_seed(5)).double() + (torch.arange(5) == 0) if weighted else None
    alive = torch.tensor([[True, True, False], [True, True, True]]) if weighted else None
    settings = dict(heads=heads, eps=eps, weight=weight, alive=alive, history=history, causal=causal)
    bias = tensor(heads, 5, 6, seed=4)
    assert apart(with_gradients(form, q, k, v, bias, **settings), with_gradients('direct', q, k, v, bias, **settings)) < 1e-10

@pytest.mark.parametrize('chunk', range(1, 7))
@pytest.mark.parametrize('form', ['chunked', 'lse'])
def test_every_chunk_gives_the_same(chunk, form):
    q, k, v = scene(6)
    assert apart(with_gradients(form, q, k, v, chunk=chunk), with_gradients('direct', q, k, v)) < 1e-10

@pytest.mark.parametrize('eps', [0., 1e-5])
def test_hand_written_gradients(eps):
    q, k, v = (x.requires_grad_() for x in scene(3, 4, slots=2, tokens=2, dim=4, batch=1))
    bias, weight = tensor(2, 3, 4).requires_grad_(), torch.tensor([1., 3.]).double().expand(1, 4, 2)
    assert torch.autograd.gradcheck(lambda *a: compete(*a[:3], heads=2, bias=a[3], weight=weight, eps=eps, chunk=3), (q, k, v, bias))

def test_the_slots_of_a_frame_share_every_token():
    q, k, _ = scene()
    for heads in (1, 2):
        a, w = weights(*scaled(q, k, heads), span_of('all'))
        assert torch.allclose(a.sum((1, 3)), torch.ones(()).double(), atol=1e-10) and torch.allclose(w.sum(-1), torch.ones(()).double(), atol=1e-10)
        unseen = ~visible(4, 4, span_of('all')).repeat_interleave(5, 1)
        assert (w.abs().amax((0, 1, 3))[unseen] == 0).all() and (w.abs().amax((0, 1, 3))[~unseen] > 0).all()
        assert torch.allclose(own_frame(*scaled(q, k, heads)).sum(2), torch.ones(()).double(), atol=1e-10)
        own = torch.stack([a.sum(1)[:, t, :, 5*t:5*t + 5] for t in range(4)], 1)
        assert torch.allclose(own_frame(*scaled(q, k, heads)), own, atol=1e-12)

@every_form
def test_one_head_does_not_feel_a_time_bias(form):
    q, k, v = scene()
    bias = 10*tensor(1, 4, 4, seed=6)
    out, _, _, _, d_bias = with_gradients(form, q, k, v, bias)
    assert (out - compete(q, k, v, form=form)).abs().max() < 1e-10 and d_bias.abs().max() < 1e-12
    two = 10*tensor(2, 4, 4, seed=6)
    out, _, _, _, d_bias = with_gradients(form, q, k, v, two, heads=2)
    assert (out - compete(q, k, v, form=form, heads=2)).abs().max() > 1e-2 and d_bias.abs().max() > 1e-3

@every_form
def test_weights_enter_after_the_softmax_over_slots(form):
    q, k, v = scene()
    w = torch.randint(1, 5, (5,), generator=torch.Generator().manual_seed(5))
    twice = lambda x: x.repeat_interleave(w, 2)
    plain, weighted = compete(q, k, v, form=form), compete(q, k, v, form=form, weight=w.double().expand(2, 4, 5))
    assert (weighted - compete(q, twice(k), twice(v), form=form)).abs().max() < 1e-10
    assert (weighted - plain).abs().max() > 1e-2
    share_of = lambda more: torch.einsum('bntj->btnj', (torch.einsum('btnd,bsjd->bntsj', q, k)/8**0.5 + more).flatten(-2).softmax(1))
    assert torch.allclose(share_of(w.double().log()), share_of(0.), atol=1e-12) # in the logits they would cancel

@every_form
def test_run_lengths_stand_for_the_tokens_they_replace(form):
    "Tokens that repeat those of the frame before, replaced by one token whose weight grows with the time it is looked at."
    q, _, _ = scene()
    first, k_new, v_new = torch.tensor([0, 0, 1, 2, 2, 3]), tensor(2, 6, 8, seed=7), tensor(2, 6, 8, seed=8) # six runs, and where they begin
    length = torch.tensor([4, 2, 3, 1, 2, 1]) # in frames
    frames = [[j for j in range(6) if first[j] <= t < first[j] + length[j]] for t in range(4)]
    widest = max(map(len, frames))
    pad = [f + [0]*(widest - len(f)) for f in frames]
    there = torch.tensor([[1.]*len(f) + [0.]*(widest - len(f)) for f in frames]).double().expand(2, -1, -1)
    dense = compete(q, k_new[:, torch.tensor(pad)], v_new[:, torch.tensor(pad)], weight=there, form=form)
    age = (torch.arange(4)[:, None] - first + 1).clamp_min(0).minimum(length).double() # (T, tokens)
    packed = lambda w: compete(q, k_new[:, None], v_new[:, None], weight=w.expand(2, 4, 6)[:, :, None].contiguous(), causal=False, form=form)
    assert (packed(age) - dense).abs().max() < 1e-10
    final = torch.where(age > 0, length.double(), 0.)
    assert (packed(final) - dense).abs().max() > 1e-2 # final lengths know the future

@every_form
def test_a_starved_slot_gets_nothing(form):
    q, k, v = torch.tensor([[[[1.], [1. - 40/1e2]]]]).double()*1e2, torch.ones(1, 1, 3, 1).double(), torch.tensor([1., 2., 3.]).double().view(1, 1, 3, 1)
    out, d_q, d_k, d_v = with_gradients(form, q, k, v)
    assert share(q.unsqueeze(1), k.unsqueeze(1))[..., 1, :].sum() < STARVED
    assert out[0, 0, 1, 0].item() == 0 and out[0, 0, 0, 0].item() == pytest.approx(2.) and all(g.isfinite().all() for g in (d_q, d_k, d_v))
    assert apart([out, d_q, d_k, d_v], with_gradients('direct', q, k, v)) < 1e-10
    little = q.clone()
    little[0, 0, 1] = q[0, 0, 0] - 20 # wins 6e-9: little, and not starved
    out = compete(little, k, v, form=form)
    assert out[0, 0, 1, 0].item() == pytest.approx(2.)

@every_form
@pytest.mark.parametrize('sizes', [dict(frames=1), dict(slots=1), dict(tokens=1), dict(frames=1, slots=1, tokens=1)], ids=str)
def test_no_nan_at_the_edges(form, sizes):
    with torch.autograd.set_detect_anomaly(True):
        found = with_gradients(form, *scene(**sizes))
    assert all(x.isfinite().all() for x in found)
    if 'slots' in sizes:
        _, _, v = scene(**sizes)
        assert torch.allclose(found[0][:, -1, 0], v.flatten(1, 2).mean(1), atol=1e-12) # one slot takes everything: the mean

@every_form
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_no_nan_in_half_precision_with_large_inputs(form, dtype):
    leaves = [(1e3*x).to(dtype).requires_grad_() for x in scene()]
    with torch.autograd.set_detect_anomaly(True):
        out = compete(*leaves, form=form)
        out.sum().backward()
    assert out.dtype == torch.float32 and out.isfinite().all() and all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in leaves)

@every_form
def test_autocast_leaves_the_softmax_in_fp32(form):
    q, k, v = (x.float() for x in scene(tokens=300))
    with torch.autocast('cpu', torch.bfloat16): inside = compete(q, k, v, form=form)
    assert torch.equal(inside, compete(q, k, v, form=form)) # fp32 in: nothing is rounded
    low = compete(*(x.bfloat16() for x in (q, k, v)), form=form)
    assert 0 < (low - inside).abs().max() < 0.05 and low.dtype == torch.float32

@every_form
def test_keys_may_be_the_values(form):
    q, k, _ = scene()
    found = []
    for v in (None, k):
        leaves = [x.clone().requires_grad_() for x in scaled(q, k)]
        out = attend(*leaves, None if v is None else leaves[1], span_of('all'), form=form)
        found.append([out, *torch.autograd.grad((out*tensor(*out.shape, seed=9)).sum(), leaves)])
    assert apart(*found) < 1e-10

class Peak(TorchDispatchMode):
    "The most bytes of tensors made inside that lived at one time."
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def _free(self, key, size):
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor): continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key in self.known: continue
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())
            self.most = max(self.most, self.now)
        return out

def peak(form, frames, **more):
    q, k, v = (tensor(1, frames, n, 8, dtype=torch.float32).requires_grad_() for n in (4, 64, 64))
    with Peak() as p: compete(q, k, v, form=form, **more).sum().backward()
    return p.most

def test_memory_is_linear_in_time():
    linear, dense = [peak('chunked', t, chunk=1) for t in (16, 32, 64)], [peak('direct', t) for t in (16, 32, 64)]
    print(linear, dense)
    assert all(b/a < 2.2 for a, b in zip(linear, linear[1:])) and all(b/a > 3 for a, b in zip(dense, dense[1:]))

# ---- what is refused ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text,more', [
    ('negative', dict(weight=torch.tensor([1., 1., -1., 1., 1.]).expand(2, 4, 5))),
    ('negative', dict(weight=torch.full((2, 4, 5), float('nan')))),
    ('not negative', dict(weight=torch.full((2, 4, 5), float('inf')))),
    ('query frame 0 of clip 0 sees are zero', dict(weight=torch.zeros(2, 4, 5))),
    ('query frame 2 of clip 1 sees are zero', dict(weight=(torch.arange(8).view(2, 4, 1) != 6).double().expand(2, 4, 5), history='frame')),
    (r'token weights must be \(2, 4, 5\) or \(2, 4, 4, 5\), got \(2, 5\)', dict(weight=torch.ones(2, 5))),
    ('carry no gradient', dict(weight=torch.ones(2, 4, 5, requires_grad=True))),
    ("Did you mean 'window'", dict(history='windw:3')), ("window:w' with a number w", dict(history='window:0')), ('form of the attention', dict(form='chunkd')),
    ('cannot be divided', dict(heads=3)), ('the bias must be', dict(bias=torch.zeros(2, 4, 4))), ('must not be negative', dict(eps=-1e-5)),
    ('one per slot', dict(alive=torch.ones(2, 4, dtype=torch.bool))), ('one per slot', dict(alive=torch.ones(2, 3))), ('clip 1 has no slot', dict(alive=torch.tensor([[True]*3, [False]*3]))),
], ids=lambda x: None if isinstance(x, dict) else x)
def test_refused(text, more):
    with pytest.raises(ValueError, match=text): compete(*scene(), **more)

def test_shapes_are_named():
    q, k, v = scene()
    for wrong in ((q[0], k, v), (q, k, v[:, 1:]), (q[..., :4], k, v), (q[:1], k, v)):
        with pytest.raises(ValueError, match='queries must be'): compete(*wrong)
    with pytest.raises(ValueError, match='at least as many keys'): compete(q, k[:, :2], v[:, :2])
