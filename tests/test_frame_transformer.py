"Frame transformer: cache and recomputation, causality, counts, states, and what is refused."
import pytest
import torch

from slotnb.models import convs5
from slotnb.models.frame_predictor import FrameLoss
from slotnb.models.frame_transformer import PRESETS, FrameTransformer, FrameTransformerConfig, FrameTransformerState, sinusoids

TINY = FrameTransformerConfig(dim=3, depths=(4, 8), groups=2, size=(8, 12), width=16, layers=3, heads=4, ffn=32)

def make(config=TINY, double=True, seed=0):
    torch.manual_seed(seed)
    model = FrameTransformer(config).eval()
    return model.double() if double else model

def noise(*shape, seed=1): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

def naive(model, video):
    "The definition: every token of a clip in full matrices, an explicit mask, one head at a time."
    m, c, b = model.memory, model.config, len(video)
    z = torch.stack([m.pack(model.encoder(frame).flatten(1)) for frame in video.unbind(1)], 1)
    x = m.enter(torch.cat([m.first.expand(b, 1, -1), z], 1)) + sinusoids(torch.arange(z.shape[1] + 1), c.width)
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    for block in m.blocks:
        q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
        heads = [((q_ @ k_.transpose(1, 2))/q_.shape[-1]**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v_ for q_, k_, v_ in zip(*(y.chunk(c.heads, -1) for y in (q, k, v)))]
        x = x + block.out(torch.cat(heads, -1))
        hidden = block.inner(block.norm2(x))
        x = x + block.outer(hidden/(1 + (-1.702*hidden).exp()))
    y = m.unpack(m.norm(torch.nn.functional.gelu(m.leave(x[:, 1:]), approximate='tanh')))
    return torch.stack([model.decoder(t.reshape(b, -1, *c.grid)) for t in y.unbind(1)], 1)

@torch.no_grad()
def test_it_is_the_definition():
    model, video = make(), noise(2, 6, 1, 8, 12)
    assert (model(video)[0] - naive(model, video)).abs().max() < 1e-12

@torch.no_grad()
def test_one_pass_is_pieces_is_steps():
    model, video = make(), noise(2, 9, 1, 8, 12)
    whole, last = model(video)
    state, out = None, []
    for piece in video.split([1, 3, 5], 1):
        y, state = model(piece, state)
        out.append(y)
    assert (torch.cat(out, 1) - whole).abs().max() < 1e-10 and all((a - b).abs().max() < 1e-10 for x, y in zip(state, last) for a, b in zip(x, y))
    assert last.keys[0].shape == (2, 4, 10, 4) # the first token and nine frames
    state, out = None, []
    for frame in video.unbind(1):
        y, state = model.step(frame, state)
        out.append(y)
    assert (torch.stack(out, 1) - whole).abs().max() < 1e-10
    assert (model.next_frames(video, frames=4) - whole[:, :-1]).abs().max() < 1e-10

@torch.no_grad()
def test_the_cache_equals_recomputation():
    model, video = make(), noise(2, 4, 1, 8, 12)
    future, seen = model.generate(video, 12), video
    for t in range(12): # the model asked anew about all that is there
        frame = model(seen)[0][:, -1]
        assert (future[:, t] - frame).abs().max() < 1e-10
        seen = torch.cat([seen, frame[:, None]], 1)
    for how in (dict(), dict(positions=15), dict(positions=50), dict(frames=2)):
        assert (model.generate(video, 12, sampler='recompute', **how) - future).abs().max() < 1e-10
    one = model.generate(video[:, :1], 1, sampler='recompute')
    assert one.shape == (2, 1, 1, 8, 12) and (one - model.generate(video[:, :1], 1)).abs().max() < 1e-10

@torch.no_grad()
def test_a_state_can_be_used_twice():
    model, video = make(), noise(1, 5, 1, 8, 12)
    _, state = model(video[:, :3])
    a, b = model(video[:, 3:], state)[0], model(video[:, 3:], state)[0]
    assert torch.equal(a, b) and (model.generate(video[:, 3:], 4, state) - model.generate(video, 4)).abs().max() < 1e-10

@torch.no_grad()
def test_the_cache_computes_one_token_per_frame():
    model, video = make(), noise(1, 6, 1, 8, 12)
    rows = []
    hook = model.memory.blocks[0].qkv.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    model.generate(video, 5)
    assert rows == [7, 1, 1, 1, 1]
    rows.clear()
    model.generate(video, 5, sampler='recompute', positions=20)
    assert rows == [21]*5
    hook.remove()

@torch.no_grad()
@pytest.mark.parametrize('at', [0, 3, 6])
def test_causality_by_noise(at):
    model, video = make(), noise(2, 7, 1, 8, 12)
    other = video.clone()
    other[:, at] = noise(2, 1, 8, 12, seed=9)
    difference = (model(video)[0] - model(other)[0]).abs().amax((0, 2, 3, 4))
    assert (difference[:at] < 1e-14).all()
    assert (difference[at:] > 1e-9).all()

def test_no_gradient_from_the_future():
    model, video = make(), noise(1, 6, 1, 8, 12).requires_grad_()
    model(video)[0][:, 3].sum().backward()
    assert video.grad[:, 4:].abs().max() == 0 and (video.grad[:, :4].abs().amax((0, 2, 3, 4)) > 0).all()

@torch.no_grad()
def test_clips_of_a_batch_do_not_meet():
    model, video = make(), noise(3, 5, 1, 8, 12)
    assert (model(video)[0][1:2] - model(video[1:2])[0]).abs().max() < 1e-12

def test_chunks_have_the_same_gradients():
    gradients = []
    for chunk in (0, 2):
        model = make(TINY.but(chunk=chunk)).train()
        sum(FrameLoss()(model(noise(2, 7, 1, 8, 12), ahead=False), noise(2, 7, 1, 8, 12)).values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert max((a - b).abs().max() for a, b in zip(*gradients)) < 1e-12 and all(g.abs().max() > 0 for g in gradients[0])

def test_bf16():
    model, video = make(double=False), noise(1, 4, 1, 8, 12).float()
    with torch.autocast('cpu', torch.bfloat16):
        y, state = model(video)
        again, _ = model(video[:, :2], state)
    assert y.dtype == torch.float32 and (y - model(video)[0]).abs().mean() < 0.02
    with pytest.raises(ValueError, match='keys in torch.bfloat16.*computes in torch.float32'): model(video, state)

def test_published_counts():
    def count(cls, config):
        with torch.device('meta'): return sum(p.numel() for p in cls(config).parameters())
    for name, published in dict(moving_mnist_300=240.07, moving_mnist_600=163.50).items(): # which read an action channel instead of going through a 1x1 convolution
        c = PRESETS[name]
        assert round((count(FrameTransformer, c) - (c.dim*c.dim + c.dim) + c.grid[0]*c.grid[1]*c.width)/1e6, 2) == published
    for name in ('smoke', 'study', 'laptop'): assert abs(count(FrameTransformer, PRESETS[name])/count(convs5.ConvS5, convs5.PRESETS[name]) - 1) < 0.06

@torch.no_grad()
def test_unpacked_features_of_another_width():
    model = make(TINY.but(unpacked=5))
    assert model(noise(1, 3, 1, 8, 12))[0].shape == (1, 3, 1, 8, 12) and model.decoder.cnn[0].in_channels == 5
    assert (model.generate(noise(1, 3, 1, 8, 12), 3, sampler='recompute') - model.generate(noise(1, 3, 1, 8, 12), 3)).abs().max() < 1e-10

def test_stored_and_read(tmp_path):
    model, video = make(double=False), noise(1, 3, 1, 8, 12).float()
    again = FrameTransformer.from_pretrained(model.save_pretrained(tmp_path/'m'))
    assert again.config == model.config and torch.equal(again(video)[0], model(video)[0])

# ---------------------------------------------------------------- faults

def change(state, fn): return FrameTransformerState(*[tuple(fn(v) for v in parts) for parts in state])

@pytest.mark.parametrize('wrong, why', [
    (lambda s: change(s, lambda v: v.float()), 'keys in torch.float32.*computes in torch.float64'), (lambda s: change(s, lambda v: v[:1]), r'keys of layer 0 must be \(2, 4, 4, 4\).*got \(1, 4, 4, 4\)'),
    (lambda s: change(s, lambda v: v[:, :2]), r'got \(2, 2, 4, 4\)'), (lambda s: FrameTransformerState(s.keys, s.values[:2]), 'values of the state are of 2 layers, this model has 3'),
    (lambda s: FrameTransformerState(s.keys, tuple(v[:, :, :2] for v in s.values)), r'values of layer 0 must be \(2, 4, 4, 4\)'), (lambda s: s.keys, 'must be a FrameTransformerState .* got tuple'), (lambda s: FrameTransformerState((), ()), 'of 0 layers')])
def test_states_that_do_not_fit(wrong, why):
    model, video = make(), noise(2, 3, 1, 8, 12)
    state = model(video)[1]
    with pytest.raises(ValueError, match=why): model(video, wrong(state))
    with pytest.raises(ValueError, match=why): model.step(video[:, 0], wrong(state))

@pytest.mark.parametrize('video, why', [(torch.rand(1, 0, 1, 8, 12), 'at least 1 frame, got 0'), (torch.rand(1, 2, 1, 12, 8), r'built for frames of \(8, 12\), got \(12, 8\)'), (torch.rand(1, 2, 3, 8, 12), r'video must be \(B, T, 1, H, W\)')])
def test_videos_that_do_not_fit(video, why):
    model = make(double=False)
    with pytest.raises(ValueError, match=why): model(video)
    for sampler in ('cache', 'recompute'):
        with pytest.raises(ValueError, match=why): model.generate(video, 2, sampler=sampler)

def test_bad_samplers():
    model, video = make(), noise(1, 3, 1, 8, 12)
    with pytest.raises(ValueError, match="Did you mean 'cache'"): model.generate(video, 2, sampler='cach')
    with pytest.raises(ValueError, match='has no state'): model.generate(video, 2, model(video)[1], sampler='recompute')
    with pytest.raises(ValueError, match='positions must be 0 or at least 6 for 3 observed and 4 new frames, got 5'): model.generate(video, 4, sampler='recompute', positions=5)
    with pytest.raises(ValueError, match='positions'): model.generate(video, 4, positions=10)
    for sampler in ('cache', 'recompute'):
        for steps in (0, 1.5):
            with pytest.raises(ValueError, match='steps must be an integer'): model.generate(video, steps, sampler=sampler)

@pytest.mark.parametrize('wrong, why', [(dict(heads=3), 'even and a multiple of heads 3'), (dict(width=15, heads=5), 'must be even'), (dict(size=(8, 9)), 'size must be multiples of 2'), (dict(layers=0), 'layers must be at least 1'), (dict(unpacked=-1), 'unpacked must be at least 0'), (dict(size=8), 'size must be a tuple')])
def test_bad_settings(wrong, why):
    with pytest.raises(ValueError, match=why): TINY.but(**wrong)
