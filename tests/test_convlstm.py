"ConvLSTM: the naive cell, states, causality, gradients of chunks, counts, and what is refused."
import pytest
import torch
import torch.nn.functional as F

from slotnb.data.clips import Loader
from slotnb.data.moving_mnist import PRESETS as DATA, MovingMNIST
from slotnb.models import convs5
from slotnb.models.convlstm import PRESETS, ConvLSTM, ConvLSTMConfig, ConvLSTMLayer, ConvLSTMState
from slotnb.models.frame_predictor import FrameLoss
from slotnb.training.fit import FitConfig, fit

TINY = ConvLSTMConfig(dim=6, depths=(4, 8), groups=2, layers=3)

def make(config=TINY, double=True, seed=0):
    torch.manual_seed(seed)
    model = ConvLSTM(config).eval()
    return model.double() if double else model

def noise(*shape, seed=1): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

@pytest.mark.parametrize('kernel, bias', [(1, 0.), (3, 0.), (3, 1.), (5, 1.)])
def test_the_cell_is_the_naive_one(kernel, bias):
    "Inputs and state in one convolution, frame by frame; forward and gradients."
    torch.manual_seed(0)
    layer = ConvLSTMLayer(5, kernel, bias).double()
    u, h0, c0 = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((7, 2, 5, 4, 3), (2, 5, 4, 3), (2, 5, 4, 3)))
    h, c, naive = h0, c0, []
    for frame in u:
        i, f, o, g = F.conv2d(torch.cat([frame, h], 1), layer.weight, padding=kernel//2).chunk(4, 1)
        c = torch.sigmoid(f + bias)*c + torch.sigmoid(i)*torch.tanh(g)
        h = torch.sigmoid(o)*torch.tanh(c)
        z = frame + h
        naive.append(layer.norm.weight[:, None, None]*(z - z.mean(1, keepdim=True))/(z.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt() + layer.norm.bias[:, None, None])
    y, last, cell = layer(u.flatten(0, 1), h0, c0)
    assert (y - torch.cat(naive)).abs().max() < 1e-12 and (last - h).abs().max() < 1e-12 and (cell - c).abs().max() < 1e-12
    leaves, weights = [u, h0, c0, *layer.parameters()], torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((v*weights).sum(), leaves) for v in (y, torch.cat(naive)))
    assert max((a - b).abs().max() for a, b in zip(ours, theirs)) < 1e-11

def test_forget_bias_is_no_parameter_and_matters():
    a, b = make(), make(TINY.but(forget_bias=1.))
    b.load_state_dict(a.state_dict())
    video = noise(1, 6, 1, 8, 8)
    assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters())
    assert (a(video)[0] - b(video)[0]).abs()[:, 1:].max() > 1e-5
    assert torch.equal(a(video)[0][:, 0], b(video)[0][:, 0]) # an empty cell has nothing to forget

@torch.no_grad()
def test_one_pass_is_pieces_is_steps():
    model, video = make(), noise(2, 9, 1, 8, 12)
    whole, last = model(video)
    state, out = None, []
    for piece in video.split([1, 3, 5], 1):
        y, state = model(piece, state)
        out.append(y)
    assert (torch.cat(out, 1) - whole).abs().max() < 1e-12 and all((a - b).abs().max() < 1e-12 for x, y in zip(state, last) for a, b in zip(x, y))
    state, out = None, []
    for frame in video.unbind(1):
        y, state = model.step(frame, state)
        out.append(y)
    assert (torch.stack(out, 1) - whole).abs().max() < 1e-12
    assert (model.next_frames(video) - whole[:, :-1]).abs().max() < 1e-12 and model.next_frames(video).shape == (2, 8, 1, 8, 12)

@torch.no_grad()
def test_generate_feeds_its_own_frames():
    model, video = make(), noise(2, 4, 1, 8, 8)
    future, seen = model.generate(video, 5), video
    for t in range(5):
        frame = model(seen)[0][:, -1]
        assert (future[:, t] - frame).abs().max() < 1e-12
        seen = torch.cat([seen, frame[:, None]], 1)
    assert future.min() >= 0 and future.max() <= 1

@torch.no_grad()
@pytest.mark.parametrize('at', [0, 3, 6])
def test_causality_by_noise(at):
    model, video = make(), noise(2, 7, 1, 8, 8)
    other = video.clone()
    other[:, at] = noise(2, 1, 8, 8, seed=9)
    difference = (model(video)[0] - model(other)[0]).abs().amax((0, 2, 3, 4))
    assert (difference[:at] == 0).all() and (difference[at:] > 0).all()

@torch.no_grad()
def test_clips_of_a_batch_do_not_meet():
    model, video = make(), noise(3, 5, 1, 8, 8)
    assert (model(video)[0][1:2] - model(video[1:2])[0]).abs().max() < 1e-12

def test_chunks_have_the_same_gradients():
    gradients = []
    for chunk in (0, 2):
        model = make(TINY.but(chunk=chunk)).train()
        sum(FrameLoss()(model(noise(2, 7, 1, 8, 8), ahead=False), noise(2, 7, 1, 8, 8)).values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert max((a - b).abs().max() for a, b in zip(*gradients)) < 1e-12 and all(g.abs().max() > 0 for g in gradients[0])

def test_bf16_keeps_states_wide():
    model, video = make(double=False), noise(1, 4, 1, 8, 8).float()
    with torch.autocast('cpu', torch.bfloat16): y, state = model(video)
    assert all(v.dtype == torch.float32 for maps in state for v in maps) and y.dtype == torch.float32
    assert (y - model(video)[0]).abs().max() < 0.05
    with torch.autocast('cpu', torch.bfloat16): model(video, state)

def test_published_counts():
    def count(cls, config):
        with torch.device('meta'): return sum(p.numel() for p in cls(config).parameters())
    assert round(count(ConvLSTM, PRESETS['moving_mnist_300'])/1e6, 2) == 40.54 and round(count(ConvLSTM, PRESETS['moving_mnist_600'])/1e6, 2) == 12.12
    for name in ('smoke', 'study', 'laptop'): assert abs(count(ConvLSTM, PRESETS[name])/count(convs5.ConvS5, convs5.PRESETS[name]) - 1) < 0.06

def test_stored_and_read(tmp_path):
    model, video = make(double=False), noise(1, 3, 1, 8, 8).float()
    again = ConvLSTM.from_pretrained(model.save_pretrained(tmp_path/'m'))
    assert again.config == model.config and torch.equal(again(video)[0], model(video)[0])

def test_fit_resumes_to_the_same_bits(tmp_path):
    clip = MovingMNIST(DATA['smoke'].but(source='sklearn', frames=5, size=16), n=8)
    def run(folder, steps, kill=None):
        model = make(TINY.but(layers=1), double=False)
        loader = Loader(clip, 4)
        config = FitConfig(steps=steps, batch_size=4, lr=3e-3, log_every=2, checkpoint_every=2, tensorboard=False)
        class Killed(Exception): pass
        def stop(step, run):
            if step == kill: raise Killed
        try: fit(model, loader, FrameLoss(), config, folder, 'cpu', callbacks=[stop])
        except Killed: pass
        return model
    whole, part = run(tmp_path/'a', 8), run(tmp_path/'b', 8, kill=6)
    assert not torch.equal(whole.memory.layers[0].weight, part.memory.layers[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), run(tmp_path/'b', 8).parameters()))

# ---------------------------------------------------------------- faults

def change(state, fn): return ConvLSTMState(*[tuple(fn(v) for v in maps) for maps in state])

@pytest.mark.parametrize('wrong, why', [
    (lambda s: change(s, lambda v: v.float()), r'hidden of layer 0 must be torch.float64 .* got torch.float32'), (lambda s: change(s, lambda v: v[:1]), r'hidden of layer 0 must be .*\(2, 6, 4, 4\).*got .*\(1, 6, 4, 4\)'),
    (lambda s: change(s, lambda v: v[..., :2]), r'got torch.float64 \(2, 6, 4, 2\)'), (lambda s: change(s, lambda v: v[:, :3]), r'\(2, 3, 4, 4\)'), (lambda s: ConvLSTMState(s.hidden, s.cell[:2]), 'cell of the state is of 2 layers, this model has 3'),
    (lambda s: s.hidden, 'must be a ConvLSTMState .* got tuple'), (lambda s: torch.zeros(2), 'got Tensor')])
def test_states_that_do_not_fit(wrong, why):
    model, video = make(), noise(2, 3, 1, 8, 8)
    state = model(video)[1]
    with pytest.raises(ValueError, match=why): model(video, wrong(state))
    with pytest.raises(ValueError, match=why): model.step(video[:, 0], wrong(state))

@pytest.mark.parametrize('video, why', [(torch.rand(1, 0, 1, 8, 8), 'at least 1 frame, got 0'), (torch.rand(1, 2, 3, 8, 8), r'video must be \(B, T, 1, H, W\)'), (torch.rand(1, 2, 1, 8, 9), 'multiples of 2'),
    (torch.zeros(1, 2, 1, 8, 8, dtype=torch.uint8), 'to_float'), (torch.rand(2, 1, 8, 8), 'video must be'), ([1], 'video must be .* got list')])
def test_videos_that_do_not_fit(video, why):
    with pytest.raises(ValueError, match=why): make(double=False)(video)

def test_bad_steps_and_short_clips():
    model, video = make(), noise(1, 2, 1, 8, 8)
    for steps in (0, -1, 1.5):
        with pytest.raises(ValueError, match='steps must be an integer of at least 1'): model.generate(video, steps)
    with pytest.raises(ValueError, match='at least 2 frames, got 1'): model.next_frames(video[:, :1])
    with pytest.raises(ValueError, match='frame must be'): model.step(video)

@pytest.mark.parametrize('wrong, why', [(dict(kernel=4), 'kernel must be an odd'), (dict(layers=0), 'layers must be at least 1'), (dict(dim=0), 'dim must be at least 1'), (dict(groups=3), 'groups must divide'), (dict(forget_bias=float('nan')), 'finite'), (dict(forget=1.), "Did you mean 'forget_bias'")])
def test_bad_settings(wrong, why):
    with pytest.raises(ValueError, match=why): TINY.but(**wrong)
