"Slot S5: the recurrence against naive loops, its state, and what is refused."
import pytest
import torch

from slotnb.layers.slot_attention import SlotState
from slotnb.models.savi import SAVi, preset as savi_preset
from slotnb.models.slot_s5 import PRESETS, SlotS5, SlotS5Config, SlotSSM
from slotnb.models.slotformer import PRESETS as SLOTFORMERS, SlotFormer
from slotnb.training.dynamics import DYNAMICS_RECIPES, count, make_rollouter
from slotnb.training.rollout import Rollout, RolloutLoss

def model_of(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return SlotS5(PRESETS['smoke'].but(**changes)).to(dtype).eval()

def past(*shape, dtype=torch.float64): return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))

def posed(t=4, dtype=torch.float64):
    angle = past(2, t, 5, dtype=dtype).tanh()/2
    return SlotState(past(2, t, 5, 32, dtype=dtype), past(2, t, 5, 2, dtype=dtype).tanh(), past(2, t, 5, 2, dtype=dtype).exp()/5, torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2)))

@torch.no_grad()
def test_the_recurrence_equals_a_naive_loop():
    torch.manual_seed(0)
    ssm = SlotSSM(6, 8, 2).double()
    rate, dt = ssm.poles()
    a = torch.exp(rate*dt)
    B = torch.view_as_complex(ssm.B.flatten(1).unflatten(0, (-1, 2)).movedim(1, -1).contiguous())*((a - 1)/rate)[:, None]
    C = torch.view_as_complex(ssm.C.flatten(1).unflatten(1, (-1, 2)).contiguous())
    u, x0 = past(7, 2, 3, 6), torch.complex(past(2, 3, 4), past(2, 3, 4))
    x, out = x0, []
    for t in range(7):
        x = a*x + u[t].to(x.dtype) @ B.T
        out.append(2*(x @ C.T).real)
    y, last = ssm(u, x0)
    assert (y - torch.stack(out)).abs().max() < 1e-12 and (last - x).abs().max() < 1e-12

@torch.no_grad()
@pytest.mark.parametrize('pose', ['', 'tsr', 'hold'])
def test_step_equals_the_parallel_pass(pose):
    model = model_of(pose=pose)
    slots = posed(9) if pose else past(2, 9, 5, 32)
    content = lambda s: s if isinstance(s, torch.Tensor) else torch.cat([v.flatten(3) if v.ndim > 3 else v for v in vars(s).values()], -1)
    each = (lambda s, f: f(s)) if not pose else (lambda s, f: s.map(f))
    whole, end = model.observe(slots)
    state, out = None, []
    for t in range(9):
        ahead, state = model.step(each(slots, lambda v: v[:, t]), state)
        out.append(content(each(ahead, lambda v: v.unsqueeze(1))))
    assert (torch.cat(out, 1) - content(whole)).abs().max() < 1e-10 and all((a - b).abs().max() < 1e-10 for a, b in zip(state, end))
    ahead, state = model.observe(slots) # a rollout is the same steps on predictions
    now, out = each(ahead, lambda v: v[:, -1]), []
    for _ in range(5):
        out.append(content(each(now, lambda v: v.unsqueeze(1))))
        now, state = model.step(now, state)
    rolled = model.rollout(slots, 5)
    if pose != 'hold': assert (content(rolled) - torch.cat(out, 1)).abs().max() < 1e-10
    else: assert torch.equal(rolled.position, slots.position[:, -1:].expand(2, 5, 5, 2))

@torch.no_grad()
def test_the_state_has_one_size_and_the_past_is_all_taken_in():
    model = model_of()
    sizes = {tuple(tuple(s.shape) for s in model.observe(past(2, t, 5, 32))[1]) for t in (1, 3, 40)}
    assert sizes == {((2, 5, 8),)*2}
    slots = past(2, 12, 5, 32)
    other = slots.clone()
    other[:, 0] += past(5, 32)
    assert (model.rollout(slots, 3) - model.rollout(other, 3)).abs().max() > 1e-6 # SlotFormer would not see frame 0 of 12

@torch.no_grad()
def test_permuting_slots_permutes_the_future():
    model, slots, order = model_of(), past(2, 4, 5, 32), [3, 0, 4, 1, 2]
    assert (model.rollout(slots[:, :, order], 6) - model.rollout(slots, 6)[:, :, order]).abs().max() < 1e-12
    _, state = model.observe(slots)
    a, b = model.step(slots[:, -1], state)[0][:, order], model.step(slots[:, -1, order], tuple(s[:, order] for s in state))[0]
    assert (a - b).abs().max() < 1e-12
    assert (model.step(slots[:, -1, order], state)[0] - a).abs().max() > 1e-6 # states belong to their slots

@torch.no_grad()
def test_the_future_is_not_seen():
    model, slots = model_of(), past(1, 6, 5, 32)
    other = slots.clone()
    other[:, 4:] = past(1, 2, 5, 32)
    a, b = model.observe(slots)[0], model.observe(other)[0]
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4:], b[:, 4:])

def test_gradients_are_those_of_finite_differences_and_reach_everything():
    model = model_of(layers=1, width=8, heads=2, ffn=6, states=4, tiles=1, dim=4, history=2)
    slots = past(1, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: model.rollout(s, 3), slots)
    model.rollout(slots, 3).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        flat, step = p.data.view(-1), 1e-6
        i = int(p.grad.abs().argmax())
        with torch.no_grad():
            was, ends = flat[i].item(), []
            for d in (step, -step):
                flat[i] = was + d
                ends.append(model.rollout(slots, 3).square().sum().item())
            flat[i] = was
        assert p.grad.view(-1)[i].item() == pytest.approx((ends[0] - ends[1])/(2*step), rel=1e-4), name
    assert all(layer.ssm.ready is None for layer in model.layers)

def test_weights_that_change_are_noticed():
    "What a rollout discretises once does not outlive it, not even where it fails."
    model, slots = model_of(), past(1, 3, 5, 32)
    was = model.rollout(slots, 2).detach()
    with torch.no_grad(): model.layers[0].ssm.B.mul_(2)
    assert (model.rollout(slots, 2) - was).abs().max() > 1e-6
    model.layers[1].forward = lambda *a: (_ for _ in ()).throw(RuntimeError('broken'))
    with pytest.raises(RuntimeError, match='broken'): model.rollout(slots, 2)
    assert all(layer.ssm.ready is None for layer in model.layers)

def test_any_parameters_are_stable():
    model = model_of()
    with torch.no_grad():
        for layer in model.layers:
            for p in (layer.ssm.decay, layer.ssm.frequency, layer.ssm.step): p.normal_(std=50)
            assert layer.ssm.discretise()[0].abs().max() < 1
        assert model.rollout(past(1, 3, 5, 32), 300).isfinite().all()

@pytest.mark.parametrize('wrong,words', [
    (lambda m, s: m.rollout(s[:, :2], 3), 'at least 3 frames .history., got 2'), (lambda m, s: m.rollout(s, 0), 'steps must be an integer of at least 1'), (lambda m, s: m.rollout(s, True), 'steps must be'),
    (lambda m, s: m.rollout(s[..., :7], 3), r'slots must be \(B, T, K, 32\)'), (lambda m, s: m.rollout(s.long(), 3), 'floating point'), (lambda m, s: m.rollout([s], 3), 'got list'),
    (lambda m, s: m.observe(s, m.observe(s)[1][:1]), 'a tuple of 2 tensors, one per layer, got 1'), (lambda m, s: m.observe(s, 'state'), 'got str'),
    (lambda m, s: m.observe(s[:1], m.observe(s)[1]), r'state of layer 0 must be \(1, 5, 8\)'), (lambda m, s: m.observe(s[:, :, :4], m.observe(s)[1]), r'must be \(2, 4, 8\)'),
    (lambda m, s: m.observe(s, tuple(x.to(torch.complex64) for x in m.observe(s)[1])), 'complex128, got .*complex64'), (lambda m, s: m.rollout(posed(), 2), "made for pose '', the slots have 'tsr'"),
    (lambda m, s: model_of(pose='hold').rollout(s, 2), 'the slots have no pose'), (lambda m, s: model_of(pose='t').rollout(s, 2), "made for pose 't', the slots have no pose"),
])
def test_bad_input_has_a_name(wrong, words):
    with pytest.raises(ValueError, match=words): wrong(model_of(), past(2, 4, 5, 32))

@pytest.mark.parametrize('changes,words', [(dict(states=6, tiles=2), 'multiple of 2.tiles'), (dict(heads=5), 'multiple of heads'), (dict(dt=(0.1,)), 'dt must be two numbers'), (dict(layers=0), 'layers must be at least 1'),
                                           (dict(pose='st'), 'unknown pose'), (dict(dropout=1.), 'dropout'), (dict(backend='reference'), 'unknown backend')])
def test_impossible_configs(changes, words):
    with pytest.raises(ValueError, match=words): SlotS5Config(**changes)

def test_the_size_is_slotformers():
    for name in PRESETS: assert 0.95*count(SlotFormer(SLOTFORMERS[name])) < count(SlotS5(PRESETS[name])) <= count(SlotFormer(SLOTFORMERS[name]))
    for preset in ('study', 'obj3d', 'clevrer'):
        for model in ('sa', 'isa_ts'):
            recipe, encoder = DYNAMICS_RECIPES[preset], SAVi(savi_preset(DYNAMICS_RECIPES[preset].encoder.model, model))
            rival = count(make_rollouter('slotformer', recipe, encoder))
            for name in ('slot_s5', 'slot_s5_channels')[:1 + (model != 'sa')]: assert 0.95*rival < count(make_rollouter(name, recipe, encoder)) <= rival
    with pytest.raises(ValueError, match="dynamics 'slot_s5_channels' predicts the pose"): make_rollouter('slot_s5_channels', DYNAMICS_RECIPES['smoke'], SAVi(savi_preset('smoke')))

def test_saved_and_trained_like_any_rollouter(tmp_path):
    for pose in ('', 'tsr'):
        model, slots = model_of(torch.float32, pose=pose), posed(6, torch.float32)
        if not pose: slots = SlotState(slots.content)
        again = SlotS5.from_pretrained(model.save_pretrained(tmp_path/f'm{pose}'))
        record = Rollout(again, 3)(slots=slots)
        assert torch.equal(record.slots.content, model.rollout(slots.map(lambda v: v[:, :3]), 3).content)
        assert set(RolloutLoss(image=0.)(record)) == {'slot_recon'} | ({'pose_recon'} if pose else set())
