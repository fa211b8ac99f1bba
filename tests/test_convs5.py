"ConvS5: its mathematics, its state, its stability, the published parameters against an implementation in numpy, and training."
import math, zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from slotnb.data.clips import Loader
from slotnb.interop import load_convs5
from slotnb.layers.frames import ResDecoder, ResEncoder
from slotnb.layers.recurrence import linear_recurrence
from slotnb.layers.weights import CheckpointError
from slotnb.models.convs5 import FLOOR, PRESETS, ConvS5, ConvS5Config, ConvS5Memory, ConvSSM, _he, expm1_ratio, hippo
from slotnb.models.frame_predictor import PUBLISHED_LOSS, FrameLoss
from slotnb.training.fit import FitConfig, fit

TINY = PRESETS['smoke']
VARIANTS = [dict(), dict(norm='pre'), dict(block='glu'), dict(stability='clip'), dict(tiles=2), dict(kernels=(1, 5, 3)), dict(backend='tree')]

def model_of(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return ConvS5(TINY.but(**changes)).to(dtype).eval()

def ssm_of(dim=3, states=8, **more):
    torch.manual_seed(0)
    return ConvSSM(dim, states, **more).double()

def noise(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
def clips(b=2, t=6, size=8, dtype=torch.float32, seed=0): return torch.rand(b, t, 1, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
def kernels(ssm): # complex B-bar (P, D, k, k) and C (D, P, k, k)
    a, w_in, _ = ssm.discretise()
    return a.detach(), torch.complex(w_in[::2], w_in[1::2]).detach(), torch.complex(ssm.C[:, ::2], ssm.C[:, 1::2]).detach()

# ---- the state space model ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('states, extremes', [(16, (-80.97, -0.35202)), (64, (-1303, -0.26386))])
def test_initial_spectrum(states, extremes):
    values, V = hippo(states)
    assert np.abs(values.real + 0.5).max() < 1e-9 and (np.diff(values.imag) > 0).all() and (values.imag < 0).all()
    assert np.abs(V.conj().T @ V - np.eye(states//2)).max() < 1e-12
    assert np.allclose(values.imag[[0, -1]], extremes, rtol=5e-4)

@pytest.mark.parametrize('stability', ['softplus', 'clip'])
def test_initial_system(stability):
    ssm = ssm_of(states=64, tiles=4, stability=stability)
    rate, dt = ssm.poles()
    assert (rate.real + 0.5).abs().max() < 1e-6 and (rate.imag[:8] - rate.imag[8:16]).abs().max() == 0 and abs(rate.imag[0].item() + 80.97) < 0.01
    assert 1e-3*(1 - 1e-5) < dt.min() < 5e-3 and 0.03 < dt.max() < 0.1*(1 + 1e-5)
    size = ssm.discretise()[0].abs()
    assert math.exp(-0.05) - 1e-6 < size.min() and size.max() < math.exp(-0.0005) + 1e-6
    torch.manual_seed(0)
    other = ConvSSM(3, 64, tiles=4, stability='softplus' if stability == 'clip' else 'clip').double()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(ssm.discretise(), other.discretise())) # the same system either way

def test_half_the_spectrum_is_the_whole_real_system():
    ssm, N = ssm_of(states=16), 16
    torch.manual_seed(0)
    torch.rand(8, dtype=torch.float64) # the steps are drawn before the matrices
    B, C = _he(N, 3, 3), _he(3, N, 3)
    n = torch.arange(N, dtype=torch.float64)
    A = -torch.tril(torch.sqrt(torch.outer(2*n + 1, 2*n + 1)), -1) - torch.diag(n + 1) + torch.outer((n + 0.5).sqrt(), (n + 0.5).sqrt())
    values, V = (torch.from_numpy(v) for v in hippo(N))
    b, c = torch.complex(ssm.B[::2], ssm.B[1::2]), torch.complex(ssm.C[:, ::2], ssm.C[:, 1::2])
    assert (b - torch.einsum('np,nuij->puij', V.conj(), B.to(V.dtype))).abs().max() < 1e-6 # stored in fp32
    for k in (0, 1, 3):
        M = torch.matrix_exp(0.05*k*A) # Markov parameters of the real system, and of half of the complex one
        real = torch.einsum('unij,nm,mvab->uvijab', C, M, B)
        half = 2*torch.einsum('upij,p,pvab->uvijab', torch.einsum('unij,np->upij', C.to(V.dtype), V), torch.exp(0.05*k*values), torch.einsum('np,nuij->puij', V.conj(), B.to(V.dtype))).real
        assert (real - half).abs().max() < 1e-12*max(1, real.abs().max())
    assert (c - torch.einsum('unij,np->upij', C.to(V.dtype), V)).abs().max() < 1e-6

def test_zero_order_hold():
    rate, dt = torch.complex(-torch.rand(20, dtype=torch.float64), 60*noise(20)), 0.1*torch.rand(20, dtype=torch.float64)
    rate[:4] = torch.tensor([0, 1e-9j, -1e-6, -1e-4 + 1e-3j], dtype=torch.complex128)
    block = torch.zeros(20, 2, 2, dtype=torch.complex128)
    block[:, 0, 0], block[:, 0, 1] = rate*dt, dt # exp of [[A, B], [0, 0]] dt holds both
    expected = torch.matrix_exp(block)
    assert (torch.exp(rate*dt) - expected[:, 0, 0]).abs().max() < 1e-13 and (dt*expm1_ratio(rate*dt) - expected[:, 0, 1]).abs().max() < 1e-13
    ssm = ssm_of(stability='clip')
    with torch.no_grad(): ssm.frequency.zero_(); ssm.decay.fill_(-1e-12)
    w = ssm.discretise()[1]
    w.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in ssm.parameters())
    assert torch.allclose(w, ssm.poles()[1].repeat_interleave(2)[:, None, None, None]*ssm.B, rtol=1e-4) # the limit is the step times B

def test_impulse_response():
    ssm, u = ssm_of(), torch.zeros(10, 1, 3, 11, 11, dtype=torch.float64)
    u[0, 0, 2, 5, 5] = 1
    y, (a, B, C) = ssm(u)[0].detach(), kernels(ssm)
    drive = torch.zeros(1, 4, 11, 11, dtype=torch.complex128)
    drive[0, :, 4:7, 4:7] = B[:, 2].flip(1, 2) # a convolution of layers is a correlation
    for k in range(10): assert (y[k] - 2*F.conv2d((a**k)[:, None, None]*drive, C, padding=1).real).abs().max() < 1e-12
    inside = torch.zeros(11, 11, dtype=torch.bool); inside[3:8, 3:8] = True
    assert (y[..., ~inside] == 0).all() and (y[..., inside] != 0).all()

def test_linear_and_time_invariant():
    ssm, u, v = ssm_of(), noise(12, 2, 3, 5, 5), noise(12, 2, 3, 5, 5, seed=1)
    with torch.no_grad():
        y = ssm(u)[0]
        assert (ssm(2*u - 3*v)[0] - 2*y + 3*ssm(v)[0]).abs().max() < 1e-12
        later = ssm(torch.cat([torch.zeros_like(u[:4]), u]))[0]
        assert (later[4:] - y).abs().max() < 1e-12 and (later[:4] == 0).all()
        moved = ssm(F.pad(u, (2, 0, 1, 0)))[0][..., 1:, 2:] # content moved, seen again where it went
        assert (moved[..., 2:-2, 2:-2] - y[..., 2:-2, 2:-2]).abs().max() < 1e-12

def test_every_pixel_is_a_state_space_model():
    ssm, u = ssm_of(kernels=(1, 1)), noise(9, 2, 3, 3, 3)
    (a, B, C), y = kernels(ssm), ssm(u)[0].detach()
    lanes = rearrange(u, 't b c h w -> t (b h w) c').to(torch.complex128)
    x, _ = linear_recurrence(a, lanes @ B[:, :, 0, 0].T, backend='reference')
    assert (rearrange(y, 't b c h w -> t (b h w) c') - 2*(x @ C[:, :, 0, 0].T).real).abs().max() < 1e-12
    dense, state, whole = torch.kron(torch.eye(9, dtype=a.dtype), torch.diag(a)), torch.zeros(2, 36, dtype=a.dtype), rearrange(lanes, 't (b n) c -> t b n c', b=2)
    for t in range(9): # one block-diagonal matrix over all pixels
        state = state @ dense.T + rearrange(whole[t] @ B[:, :, 0, 0].T, 'b n p -> b (n p)')
        out = 2*(rearrange(state, 'b (n p) -> b n p', n=9) @ C[:, :, 0, 0].T).real
        assert (rearrange(y[t], 'b c h w -> b (h w) c') - out).abs().max() < 1e-12

def test_wider_kernels_are_patches():
    ssm, u = ssm_of(kernels=(3, 1)), noise(5, 2, 3, 4, 6)
    (a, B, C), y = kernels(ssm), ssm(u)[0].detach()
    patches = rearrange(F.unfold(u.flatten(0, 1), 3, padding=1), '(t b) d n -> t (b n) d', t=5).to(a.dtype)
    x, _ = linear_recurrence(a, patches @ B.flatten(1).T, backend='reference')
    assert (rearrange(y, 't b c h w -> t (b h w) c') - 2*(x @ C[:, :, 0, 0].T).real).abs().max() < 1e-12

def test_real_convolutions_are_the_complex_ones_without_a_copy():
    ssm, u = ssm_of(), noise(5, 2, 3, 6, 6)
    a, B, C = kernels(ssm)
    drive = F.conv2d(u.flatten(0, 1).to(a.dtype), B, padding=1)
    x, _ = linear_recurrence(a, rearrange(drive, '(t b) p h w -> t b h w p', t=5), backend='reference')
    y = 2*F.conv2d(rearrange(x, 't b h w p -> (t b) p h w'), C, padding=1).real
    assert (ssm(u)[0] - y.unflatten(0, (5, 2))).abs().max() < 1e-13*max(1, y.abs().max())
    v = torch.zeros(10, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert rearrange(v, '(t b) (p c) h w -> t b h w p c', t=5, c=2).is_contiguous()

@pytest.mark.parametrize('tiles', [1, 2])
def test_stable_for_any_parameters(tiles):
    torch.manual_seed(0)
    ssm = ConvSSM(2, 16, tiles=tiles)
    optimizer = torch.optim.Adam(ssm.parameters(), lr=10)
    for i in range(200):
        if i % 50 == 0: push = {n: torch.randn_like(p) for n, p in ssm.named_parameters()}
        a, w_in, _ = ssm.discretise()
        optimizer.zero_grad()
        (-torch.view_as_real(a).square().sum() + 0*w_in.sum()).backward() # asks for growth, and noise pushes everything about
        for n, p in ssm.named_parameters(): p.grad = (0 if p.grad is None else p.grad) + push[n] + torch.randn_like(p)
        optimizer.step()
        if i % 20 == 19: assert ssm.discretise()[0].abs().max() < 1
    for value in (-1e4, 1e4):
        with torch.no_grad(): ssm.decay.fill_(value); ssm.step.fill_(-1e4)
        a, w_in, _ = ssm.discretise()
        assert a.abs().max() < 1 and torch.isfinite(torch.view_as_real(a)).all() and torch.isfinite(w_in).all()
    assert ssm.poles()[0].real.max() <= -FLOOR

def test_published_clip():
    ssm = ssm_of(stability='clip')
    with torch.no_grad(): ssm.decay[:2] = torch.tensor([0.3, -1e-5])
    rate, _ = ssm.poles()
    assert (rate.real[:2] == -1e-4).all() and (rate.real[2:] == ssm.decay[2:]).all()
    rate.real.sum().backward()
    assert (ssm.decay.grad[:2] == 0).all() and (ssm.decay.grad[2:] == 1).all()

@pytest.mark.parametrize('dt, learns', [((1e-3, 0.1), True), ((1., 10.), False)])
def test_a_pattern_is_held_over_a_hundred_blank_frames(dt, learns):
    torch.manual_seed(0)
    ssm = ConvSSM(1, 16, kernels=(1, 1), dt=dt)
    optimizer, pattern = torch.optim.Adam(ssm.parameters(), 0.03), torch.randn(4, 1, 4, 4)
    u = torch.cat([pattern[None], torch.zeros(100, 4, 1, 4, 4)])
    for _ in range(60):
        loss = (ssm(u)[0][-1] - pattern).square().mean()/pattern.square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss < 0.05 if learns else loss > 0.9

# ---- the model ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_a_clip_in_pieces_is_the_clip(changes):
    model, video = model_of(torch.float64, **changes), clips(t=17, dtype=torch.float64)
    with torch.no_grad():
        whole, last = model(video)
        state, parts = None, []
        for piece in video.split([1, 3, 5, 8], 1):
            y, state = model(piece, state)
            parts.append(y)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12 and max((a - b).abs().max() for a, b in zip(state, last)) < 1e-12
        assert whole.shape == video.shape and 0 <= whole.min() <= whole.max() <= 1
        assert (model.next_frames(video, frames=6) - whole[:, :-1]).abs().max() < 1e-12

@torch.no_grad()
def test_frame_by_frame_in_fp32_through_eight_layers():
    model, video = model_of(layers=8), clips(t=20)
    whole, state, gap = model(video)[0], None, 0
    for t, frame in enumerate(video.unbind(1)):
        y, state = model.step(frame, state)
        gap = max(gap, (y - whole[:, t]).abs().max().item())
    assert gap < 5e-6 and all(s.dtype == torch.complex64 for s in state)

def test_generation_is_the_loop_of_steps():
    model, video = model_of(), clips(t=7)
    future = model.generate(video, 5)
    frame, state = None, None
    with torch.no_grad():
        for f in video.unbind(1): frame, state = model.step(f, state)
        for t in range(5):
            assert (future[:, t] - frame).abs().max() < 1e-5
            frame, state = model.step(frame, state)
    assert future.shape == (2, 5, 1, 8, 8) and torch.equal(model.generate(video, 2), future[:, :2]) and not future.requires_grad
    state = model(video[:, :4])[1]
    assert (model.generate(video[:, 4:], 5, state, frames=2) - future).abs().max() < 1e-5
    assert all(layer.ssm.ready is None for layer in model.memory.layers) # what was kept for generation is gone
    with torch.no_grad():
        model.memory.layers[0].ssm.C.mul_(-1)
        assert (model.generate(video, 1) - future[:, :1]).abs().max() > 1e-4

def test_generation_discretises_once():
    model, count = model_of(), []
    for layer in model.memory.layers:
        layer.ssm.discretise = (lambda own: lambda: count.append(1) or own())(layer.ssm.discretise)
    model.generate(clips(), 10)
    assert len(count) == 2

@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_causal(changes):
    model, video = model_of(torch.float64, **changes), clips(t=7, dtype=torch.float64).requires_grad_()
    y, _ = model(video)
    for t in (0, 3, 6):
        g, = torch.autograd.grad(y[:, t].sum(), video, retain_graph=True)
        assert (g[:, t + 1:] == 0).all() and (g[:, :t + 1].abs().amax((0, 2, 3, 4)) > 0).all()
    changed = video.detach().clone(); changed[:, 4] = 0
    assert torch.equal(model(changed)[0][:, :4], y[:, :4]) and not torch.equal(model(changed)[0][:, 4], y[:, 4])

@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_every_parameter_learns(changes):
    model, video = model_of(**changes), clips(t=5)
    sum(FrameLoss(0.5, 0.5)(model(video, ahead=False), video).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0 or not p.grad.isfinite().all()]

@torch.no_grad()
def test_batch_and_size_are_free():
    model = model_of()
    for h, w in ((8, 8), (16, 16), (8, 20)):
        video = torch.rand(5, 4, 1, h, w)
        whole, last = model(video)
        for b in (1, 3): assert (model(video[:b])[0] - whole[:b]).abs().max() < 1e-5
        assert last[0].shape == (5, h//4, w//4, 8)

@torch.no_grad()
def test_shift_within_the_memory():
    torch.manual_seed(0) # the block's group norm sees the whole frame, GLU does not
    memory = ConvS5Memory(TINY.but(block='glu')).double()
    u = torch.zeros(6, 1, 16, 24, 24, dtype=torch.float64)
    u[..., 8:14, 8:14] = noise(6, 1, 16, 6, 6)
    reach = 2*2 # two layers of two 3x3 kernels
    y, z = memory(u)[0], memory(u.roll((1, 1), (3, 4)))[0]
    inner = slice(reach + 1, -reach - 1)
    assert (z.roll((-1, -1), (3, 4)) - y)[..., inner, inner].abs().max() < 1e-12 and y.std() > 0.1

def test_chunks_have_the_same_gradients_and_keep_less():
    found = {}
    for chunk in (0, 5, 16):
        model, video, kept = model_of(torch.float64, chunk=chunk), clips(t=33, dtype=torch.float64), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): output, _ = model(video, ahead=False)
        output.square().sum().backward()
        found[chunk] = [p.grad for p in model.parameters()], sum(kept), output.detach()
    for chunk in (5, 16):
        assert max((a - b).abs().max()/a.abs().max() for a, b in zip(found[0][0], found[chunk][0])) < 1e-11 and (found[chunk][2] - found[0][2]).abs().max() < 1e-12
        assert found[chunk][1] < 0.1*found[0][1] # what is kept between the pieces
    with torch.no_grad(): assert not model_of(chunk=4)(clips(t=9))[0].requires_grad

def test_gradient_through_a_state_and_cut():
    model, video = model_of(torch.float64), clips(t=8, dtype=torch.float64)
    grads = lambda out: [g.clone() for g in torch.autograd.grad(out.sum(), list(model.parameters()))]
    whole = grads(model(video)[0][:, 4:])
    _, state = model(video[:, :4])
    assert max((a - b).abs().max() for a, b in zip(whole, grads(model(video[:, 4:], state)[0]))) < 1e-10
    cut = grads(model(video[:, 4:], tuple(s.detach() for s in state))[0])
    assert max((a - b).abs().max() for a, b in zip(whole, cut)) > 1e-6

@torch.no_grad()
def test_autocast():
    model, video = model_of(dim=32, groups=8, depths=(8, 16)), clips(t=12, size=16)
    seen, high = [], model(video)[0]
    hooks = [m.register_forward_hook(lambda m, args, out: seen.append((type(m).__name__, out.dtype))) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm, nn.LayerNorm))]
    with torch.autocast('cpu', torch.bfloat16): low, state = model(video)
    assert low.dtype == torch.float32 and all(s.dtype == torch.complex64 for s in state)
    assert {d for n, d in seen if n == 'Conv2d'} == {torch.bfloat16} and {d for n, d in seen if n != 'Conv2d'} == {torch.float32}
    assert 0 < (low - high).norm()/high.norm() < 2e-2
    for h in hooks: h.remove()

def test_parameters_of_the_published_models():
    counts = {'moving_mnist_300': (21_681_153, 21.68), 'moving_mnist_600': (7_409_025, 7.41)}
    for name, (own, published) in counts.items():
        c = PRESETS[name]
        with torch.device('meta'): ends = [sum(p.numel() for p in m.parameters()) for m in (ResEncoder(1, c.dim), ResDecoder(1, c.dim))]
        memory = c.layers*sum(p.numel() for p in ConvS5Memory(c.but(layers=1)).parameters())
        action = c.dim + 2 # weights of a constant channel, and an embedding of two rows of one number: a bias here
        assert sum(ends) + memory == own and round((own + action)/1e6, 2) == published
    assert round(8*sum(p.numel() for p in ConvS5Memory(PRESETS['moving_mnist_300'].but(layers=1)).parameters())/1e6, 2) == 18.89

def test_refusals():
    model, video = model_of(), clips()
    state = model(video)[1]
    for wrong, match in ((lambda: model(video[:, :0]), 'at least 1 frame'), (lambda: model(video[:, :1], ahead=False), 'at least 2 frames'), (lambda: model.next_frames(video[:, :1]), 'at least 2'),
                         (lambda: model(video.expand(-1, -1, 3, -1, -1)), r'video must be \(B, T, 1'), (lambda: model(video[0]), 'video must be'), (lambda: model((video*255).byte()), 'floating point'),
                         (lambda: model(clips(size=10)), 'multiples of 4'), (lambda: model.step(video), 'frame must be'), (lambda: model.generate(video, 0), 'steps must be'), (lambda: model.generate(video, 2.5), 'steps must be'),
                         (lambda: model(video, state[:1]), 'tuple of 2 tensors'), (lambda: model(video, torch.zeros(3)), 'tuple of 2 tensors'), (lambda: model(clips(b=3), state), 'state of layer 0'),
                         (lambda: model(clips(size=16), state), r'state of layer 0 must be \(2, 4, 4, 8\)'), (lambda: model(video, tuple(s.real for s in state)), 'complex64'),
                         (lambda: model.double()(video.double(), state), 'complex128'), (lambda: TINY.but(dim=18), 'groups must divide dim'), (lambda: TINY.but(depths=(8, 10)), 'groups must divide every'),
                         (lambda: TINY.but(states=7), 'states must be'), (lambda: TINY.but(kernels=(3, 3)), 'kernels must be'), (lambda: TINY.but(backend='reference'), 'backend'), (lambda: TINY.but(chunk=-1), 'chunk'),
                         (lambda: FrameLoss(0, 0), 'weights'), (lambda: FrameLoss()((video[:, :3], None), video), 'do not fit')):
        with pytest.raises(ValueError, match=match): wrong()

def test_saved_and_loaded_again(tmp_path):
    model, video = model_of(stability='clip', tiles=2), clips()
    again = ConvS5.from_pretrained(model.save_pretrained(tmp_path))
    with torch.no_grad(): assert torch.equal(again(video)[0], model(video)[0])

# ---- published parameters against numpy --------------------------------------------------------------------------------------------

CASES = {
    'small': dict(U=64, P=8, layers=2, depths=(64, 128), blocks=1, e=1, groups=32, k=(3, 3, 3), C=1, skip=2),
    'wider': dict(U=32, P=4, layers=3, depths=(16, 16, 32), blocks=2, e=3, groups=8, k=(1, 5, 3), C=3, skip=0),
}

def flax_layout(U, P, layers, depths, blocks, e, k, C, skip, **_):
    "Flat name -> shape; `skip` is the number of the 1x1 convolution in a block that has one."
    out = {}
    def conv(name, *shape, bias=True): out.update({f'{name}/kernel': shape} | ({f'{name}/bias': shape[-1:]} if bias else {}))
    def norm(name, d): out.update({f'{name}/scale': (d,), f'{name}/bias': (d,)})
    def block(name, a, b):
        numbers = [i for i in range(3) if i != skip] if a != b else [0, 1]
        norm(f'{name}/GroupNorm_0', a); norm(f'{name}/GroupNorm_1', b)
        conv(f'{name}/Conv_{numbers[0]}', 3, 3, a, b); conv(f'{name}/Conv_{numbers[1]}', 3, 3, b, b, bias=False)
        if a != b: conv(f'{name}/Conv_{skip}', 1, 1, a, b, bias=False)
        out[f'{name}/AddBias_0/bias'] = (b,)
    conv('encoder/Conv_0', 3, 3, C, depths[0])
    widths = [depths[0]] + [d for d in depths[1:] for _ in range(blocks)]
    for i, (a, b) in enumerate(zip((depths[0], *widths), widths)): block(f'encoder/ResNetBlock_{i}', a, b)
    out['action_embeds/embedding'] = (2, e)
    conv('action_conv/Conv_0', 1, 1, depths[-1] + e, U)
    for i in range(layers):
        at = f'sequence_model/layers_{i}'
        out |= {f'{at}/seq/Lambda_re': (P,), f'{at}/seq/Lambda_im': (P,), f'{at}/seq/log_step': (P, 1), f'{at}/seq/B': (P, U*k[0]**2, 2), f'{at}/seq/C': (k[1], k[1], P, U, 2)}
        for j in (0, 1): norm(f'{at}/seq/C_D_conv/GroupNorm_{j}', U); conv(f'{at}/seq/C_D_conv/Conv_{j}', k[2], k[2], U, U)
        norm(f'{at}/norm', U)
    conv('decoder/Conv_0', 3, 3, U, depths[0])
    widths = [d for d in reversed(depths) for _ in range(blocks)]
    for i, (a, b) in enumerate(zip((depths[0], *widths), widths)): block(f'decoder/ResNetBlock_{i}', a, b)
    norm('decoder/LayerNorm_0', depths[0]); conv('decoder/Dense_0', depths[0], C)
    return out

def draws(name, *shape): return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)

def weights(case):
    "Every parameter matters: norms away from one, biases from zero, one eigenvalue beyond the clip, others that turn fast."
    out = {}
    for name, shape in flax_layout(**CASES[case]).items():
        last, v = name.split('/')[-1], draws(name, *shape)
        if last == 'Lambda_re': v = -0.5 + 0.2*v; v[0] = 0.3
        elif last == 'Lambda_im': v = -np.exp(2 + 1.5*v)
        elif last == 'log_step': v = np.log(0.03) + 0.7*v
        elif last == 'scale': v = 1 + 0.3*v
        elif last == 'bias': v = 0.3*v
        elif last == 'B': v = v*3
        elif last == 'C': v = v/math.sqrt(math.prod(shape[:3]))
        elif last == 'kernel': v = v*1.4/math.sqrt(math.prod(shape[:-1]))
        out[name] = v.astype(np.float32)
    return out

def same(x, kernel): # (N, H, W, a) with (k, k, a, b): padded with zeros, one sum per tap
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (k//2, k//2), (k//2, k//2), (0, 0)))
    h, w = x.shape[1] - k + 1, x.shape[2] - k + 1
    return sum(x[:, i:i + h, j:j + w] @ kernel[i, j] for i in range(k) for j in range(k))

def normed(x, p, at, groups=None): # over the pixels of a group of channels; without groups over a pixel's channels
    n, h, w, c = x.shape
    y = x.reshape(n, h*w, groups, c//groups) if groups else x
    axes = (1, 3) if groups else (3,)
    y = (y - y.mean(axes, keepdims=True))/np.sqrt(y.var(axes, keepdims=True) + 1e-6)
    return y.reshape(x.shape)*p[f'{at}/scale'] + p[f'{at}/bias']

def elu(x): return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
def gelu(x): return 0.5*x*(1 + np.tanh(math.sqrt(2/math.pi)*(x + 0.044715*x**3)))

def by_numpy(p, video, groups, layers, depths, blocks, skip, k, **_): # (B, T, C, H, W) in [0, 1] -> predictions of frames 1 to T-1
    p = {n: v.astype(np.float64) for n, v in p.items()}
    def residual(x, at):
        a, b = (0, 1) if f'{at}/Conv_2/kernel' not in p else [i for i in range(3) if i != skip]
        h = same(elu(normed(x, p, f'{at}/GroupNorm_0', groups)), p[f'{at}/Conv_{a}/kernel']) + p[f'{at}/Conv_{a}/bias']
        h = same(elu(normed(h, p, f'{at}/GroupNorm_1', groups)), p[f'{at}/Conv_{b}/kernel']) + p[f'{at}/AddBias_0/bias']
        return (x if f'{at}/Conv_2/kernel' not in p else x @ p[f'{at}/Conv_{skip}/kernel'][0, 0]) + 0.1*h
    def several(x, end, first, n):
        for i in range(first, first + n): x = residual(x, f'{end}/ResNetBlock_{i}')
        return x
    b, t = video.shape[0], video.shape[1] - 1
    x = 2*video[:, :-1].transpose(1, 0, 3, 4, 2).reshape(t*b, *video.shape[3:], -1).astype(np.float64) - 1
    x = several(same(x, p['encoder/Conv_0/kernel']) + p['encoder/Conv_0/bias'], 'encoder', 0, 1)
    for i in range(len(depths) - 1):
        n, h, w, c = x.shape
        x = several(x.reshape(n, h//2, 2, w//2, 2, c).mean((2, 4)), 'encoder', 1 + i*blocks, blocks)
    action = np.broadcast_to(p['action_embeds/embedding'][0], (*x.shape[:3], p['action_embeds/embedding'].shape[1]))
    u = np.concatenate([x, action], -1) @ p['action_conv/Conv_0/kernel'][0, 0] + p['action_conv/Conv_0/bias']
    for i in range(layers):
        at = f'sequence_model/layers_{i}'
        q = lambda n: p[f'{at}/seq/{n}']
        rate, step = np.minimum(q('Lambda_re'), -1e-4) + 1j*q('Lambda_im'), np.exp(q('log_step')[:, 0])
        gate = np.exp(rate*step)
        B = (q('B')[..., 0] + 1j*q('B')[..., 1])*((gate - 1)/rate)[:, None]
        B = B.reshape(len(gate), -1, k[0], k[0]).transpose(2, 3, 1, 0)
        drive = same(u, B).reshape(t, b, *u.shape[1:3], len(gate))
        states, now = [], np.zeros_like(drive[0])
        for d in drive:
            now = gate*now + d
            states.append(now)
        y = 2*same(np.concatenate(states), q('C')[..., 0] + 1j*q('C')[..., 1]).real
        h = same(gelu(normed(y, p, f'{at}/seq/C_D_conv/GroupNorm_0', groups)), q('C_D_conv/Conv_0/kernel')) + q('C_D_conv/Conv_0/bias')
        h = same(gelu(normed(h, p, f'{at}/seq/C_D_conv/GroupNorm_1', groups)), q('C_D_conv/Conv_1/kernel')) + q('C_D_conv/Conv_1/bias')
        u = normed(u + gelu(y + h), p, f'{at}/norm')
    x = same(u, p['decoder/Conv_0/kernel']) + p['decoder/Conv_0/bias']
    for i in range(len(depths)):
        if i: x = x.repeat(2, 1).repeat(2, 2)
        x = several(x, 'decoder', i*blocks, blocks)
    x = np.tanh(normed(x, p, 'decoder/LayerNorm_0') @ p['decoder/Dense_0/kernel'] + p['decoder/Dense_0/bias'])
    return ((x + 1)/2).reshape(t, b, *x.shape[1:]).transpose(1, 0, 4, 2, 3)

@pytest.mark.parametrize('prefix', ['', 'params/'])
@pytest.mark.parametrize('case', CASES)
def test_published_parameters_give_the_equations(case, prefix):
    c, p = CASES[case], weights(case)
    model = load_convs5({prefix + n: v for n, v in p.items()}, c['groups'])
    own = model.config
    assert (own.dim, own.states, own.layers, own.depths, own.blocks, own.kernels, own.channels, own.stability) == (c['U'], 2*c['P'], c['layers'], c['depths'], c['blocks'], c['k'], c['C'], 'clip')
    video = np.random.RandomState(0).rand(2, 7, c['C'], 8, 8).astype(np.float32)
    expected = by_numpy(p, video, **c)
    assert expected.std() > 0.1 and np.abs(np.diff(expected, axis=1)).mean() > 0.01
    predicted = model.next_frames(torch.from_numpy(video)).numpy()
    assert predicted.dtype == np.float32 and np.abs(predicted - expected).max() < 1e-4
    if prefix: return
    names = [n for n in p if not n.endswith('embedding')] # and every one of them has its part in it
    for name in names[::7] + [f'sequence_model/layers_0/seq/{n}' for n in ('Lambda_re', 'Lambda_im', 'log_step', 'B', 'C')]:
        other = load_convs5(p | {name: p[name] + 0.2*np.abs(p[name]).mean()*draws('x', *p[name].shape).astype(np.float32)}, c['groups'])
        assert np.abs(other.next_frames(torch.from_numpy(video)).numpy() - predicted).max() > 1e-5, name

def test_parameters_that_do_not_fit_are_named():
    p = weights('small')
    def message(changed):
        with pytest.raises(CheckpointError) as e: load_convs5(changed)
        return str(e.value)
    without = lambda *names: {n: v for n, v in p.items() if n not in names}
    for name in p:
        got = message(without(name))
        assert name in got and 'missing' in got
        assert name in message(p | {name: np.where(np.arange(p[name].size).reshape(p[name].shape) == p[name].size - 1, np.inf, p[name])}), name
        if not name.endswith('log_step') and p[name].ndim > 1: assert name in message(p | {name: p[name][0]}), name
    assert 'unknown: sequence_model/layers_0/seq/D (32,)' in message(p | {'sequence_model/layers_0/seq/D': np.zeros(32)})
    short = p['sequence_model/layers_1/seq/Lambda_im'][:-1]
    assert message(p | {'sequence_model/layers_1/seq/Lambda_im': short}).splitlines()[1:] == ['  shape of sequence_model/layers_1/seq/Lambda_im: (7,) does not fit the others']
    assert 'missing' in message({}) and 'action_conv' in message(p | {'action_conv/Conv_0/kernel': p['action_conv/Conv_0/kernel'][:, :, 1:]})
    assert 'arrays' in message(p | {'decoder/Conv_0/bias': 'zeros'})
    with pytest.raises(ValueError, match='groups'): load_convs5(p, groups=24)
    with pytest.raises(ValueError, match='dict'): load_convs5([1])

# ---- in training -------------------------------------------------------------------------------------------------------------------

class Squares: # a data set: one square per clip, bouncing
    name, fingerprint, lengths = 'squares', 'f', [10]*16
    def __len__(self): return 16
    def gather(self, index, start, length, step=1):
        rows = []
        for i in map(int, index):
            place = (np.array([[(7*i) % 11], [(5*i) % 11]])/11 + 0.15*np.arange(length)) % 2
            y, x = np.round(np.where(place > 1, 2 - place, place)*12).astype(int)
            clip = np.zeros((length, 1, 16, 16), np.uint8)
            for t in range(length): clip[t, 0, y[t]:y[t] + 4, x[t]:x[t] + 4] = 255
            rows.append(clip)
        return {'video': torch.from_numpy(np.stack(rows))}

@pytest.mark.parametrize('changes, amp, layout', [(dict(), 'off', False), (dict(chunk=4), 'bf16', True)])
def test_training_resumes_to_the_same_bits(tmp_path, changes, amp, layout):
    def run(folder, stop):
        model = model_of(**changes)
        config = FitConfig(steps=6, batch_size=4, lr=1e-3, warmup=2, checkpoint_every=3, amp=amp, channels_last=layout, tensorboard=False)
        class Stop:
            every = 1
            def __call__(self, step, run):
                if step == stop: raise KeyboardInterrupt
        try: fit(model, Loader(Squares(), 4, seed=0), FrameLoss(), config, folder, 'cpu', callbacks=[Stop()])
        except KeyboardInterrupt: pass
        return {n: v.clone() for n, v in model.state_dict().items()}
    whole = run(tmp_path/'whole', 99)
    run(tmp_path/'cut', 4)
    again = run(tmp_path/'cut', 99)
    assert all(torch.equal(whole[n], again[n]) for n in whole) and any(not torch.equal(whole[n], v) for n, v in model_of(**changes).state_dict().items())

@pytest.mark.slow
def test_it_learns_to_move_a_square():
    model, test = model_of(depths=(16, 16), groups=8), Squares().gather(range(16), 0, 10)['video'].float()/255
    result = fit(model, Loader(Squares(), 8, seed=0), FrameLoss(), FitConfig(steps=70, batch_size=8, lr=1e-2, clip_norm=1., tensorboard=False), device='cpu')
    error = (model.next_frames(test) - test[:, 1:]).square().mean()
    assert result.status == 'done' and error < 0.4*(test[:, 1:] - test[:, :-1]).square().mean() and error < 0.5*test.square().mean()

def test_published_loss():
    video, predicted = clips(t=4), clips(t=3, seed=1)
    terms = PUBLISHED_LOSS((predicted, None), video)
    d = (2*predicted - 2*video[:, 1:]).double()
    assert terms['square'].item() == pytest.approx(0.5*d.square().sum((2, 4)).mean().item(), rel=1e-5) and terms['absolute'].item() == pytest.approx(0.5*d.abs().sum((2, 4)).mean().item(), rel=1e-5)
