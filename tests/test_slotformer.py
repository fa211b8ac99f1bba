"""SlotFormer: the published rollouter's numbers, equivariance, the cache, and what is refused.

`fixtures/slotformer_rollouter.json` holds samples of what SlotFormer's code (pairlab/SlotFormer @10a6d9b, with its dependency nerv) rolls out from the weights and slots below. Made by
    SLOTNB_SLOTFORMER=<SlotFormer checkout> PYTHONPATH=<folder of nerv> python tests/test_slotformer.py
With the same variable set, the tests also compare every number with that checkout."""
import importlib.util, json, math, os, sys, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slotnb.data.clips import Loader
from slotnb.interop import load_slotformer_rollouter
from slotnb.layers.slot_attention import SlotState
from slotnb.layers.weights import CheckpointError
from slotnb.models.savi import SAVi, preset
from slotnb.models.slotformer import PRESETS, SlotFormer, SlotFormerConfig
from slotnb.training.fit import FitConfig, fit
from slotnb.training.rollout import Rollout, RolloutLoss

FIXTURES = Path(__file__).resolve().parent/'fixtures'/'slotformer_rollouter.json'
CASES = {
    'obj3d': dict(K=6, D=128, T=6, width=128, layers=4, heads=8, ffn=512),
    'clevrer': dict(K=7, D=128, T=6, width=256, layers=4, heads=8, ffn=1024),
    'slim': dict(K=3, D=16, T=4, width=32, layers=2, heads=4, ffn=40),
    'one_layer': dict(K=5, D=12, T=3, width=16, layers=1, heads=2, ffn=24),
    'one_frame': dict(K=4, D=12, T=1, width=24, layers=3, heads=2, ffn=24),
}
every = pytest.mark.parametrize('case', CASES)

def noise(name, *shape): return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)

def weights(case):
    "A published state dict; every tensor matters, and slots keep the size they have (2 to 6) over the rollout."
    c = CASES[case]
    D, d, f = c['D'], c['width'], c['ffn']
    shapes = {'in_proj.weight': (d, D), 'in_proj.bias': (d,), 'out_proj.weight': (D, d), 'out_proj.bias': (D,)}
    for i in range(c['layers']):
        at = f'transformer_encoder.layers.{i}'
        shapes |= {f'{at}.self_attn.in_proj_weight': (3*d, d), f'{at}.self_attn.in_proj_bias': (3*d,), f'{at}.self_attn.out_proj.weight': (d, d), f'{at}.self_attn.out_proj.bias': (d,),
                   f'{at}.linear1.weight': (f, d), f'{at}.linear1.bias': (f,), f'{at}.linear2.weight': (d, f), f'{at}.linear2.bias': (d,)}
        shapes |= {f'{at}.norm{n}.{p}': (d,) for n in (1, 2) for p in ('weight', 'bias')}
    scale = lambda name, s: 0.2*noise(name, *s) + name.endswith(('norm1.weight', 'norm2.weight')) if len(s) == 1 else (0.35 if name == 'out_proj.weight' else 1)*noise(name, *s)/math.sqrt(s[1])
    out = {n: torch.tensor(scale(n, s), dtype=torch.float32) for n, s in shapes.items()}
    waves = np.outer(np.arange(c['T'] - 1, -1, -1), 1/10000**(np.arange(0, d, 2)/d)) # the newest frame is 0
    return {**out, 'enc_t_pe': torch.tensor(np.concatenate([np.sin(waves), np.cos(waves)], 1)[None], dtype=torch.float32)}

def past(case, extra=0): return torch.tensor(2*noise(f'{case} slots', 2, CASES[case]['T'] + extra, CASES[case]['K'], CASES[case]['D']), dtype=torch.float32)
def load(case): return load_slotformer_rollouter(weights(case), CASES[case]['K'], CASES[case]['heads'])
STEPS = 44 # the published horizon of OBJ3D

def published(case):
    "SlotFormer's own rollouter with these weights."
    root = os.environ.get('SLOTNB_SLOTFORMER')
    if not root: pytest.skip('SLOTNB_SLOTFORMER does not name a checkout of pairlab/SlotFormer')
    path = Path(root)/'slotformer/video_prediction/models/slotformer.py'
    if not path.is_file(): pytest.skip(f'SLOTNB_SLOTFORMER: {path} is not there')
    pytest.importorskip('nerv', reason="SlotFormer's dependency nerv is not importable: put it on PYTHONPATH")
    names = ['slotformer', 'slotformer.base_slots', 'slotformer.base_slots.models'] # importing the real ones would import all their data sets
    before = {n: sys.modules.get(n) for n in names}
    try:
        for n in names: sys.modules[n] = types.ModuleType(n)
        sys.modules[names[-1]].StoSAVi = None
        spec = importlib.util.spec_from_file_location('_published_slotformer', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for n, m in before.items(): sys.modules.pop(n) if m is None else sys.modules.update({n: m})
    c = CASES[case]
    model = module.SlotRollouter(num_slots=c['K'], slot_size=c['D'], history_len=c['T'], d_model=c['width'], num_layers=c['layers'], num_heads=c['heads'], ffn_dim=c['ffn'])
    model.load_state_dict(weights(case))
    return model.eval()

def sampled(future): return future[:, ::6, :, ::future.shape[-1]//4]

def write_fixtures():
    entries = {}
    for case in CASES:
        model = published(case)
        with torch.no_grad(): future = model(past(case), STEPS)
        entries[case] = dict(trainable=sum(p.numel() for p in model.parameters() if p.requires_grad), slots=[round(x, 6) for x in sampled(future).flatten().tolist()])
    FIXTURES.write_text(json.dumps(entries, separators=(',', ':')) + '\n')

EXPECTED = json.loads(FIXTURES.read_text()) if FIXTURES.is_file() else {}

# ---- parity ------------------------------------------------------------------------------------------------------------------------

@every
@torch.no_grad()
def test_rollout_gives_published_numbers(case):
    model = load(case)
    future = model.rollout(past(case), STEPS)
    assert future.shape == (2, STEPS, *past(case).shape[2:])
    worst = np.abs(sampled(future).flatten().numpy() - EXPECTED[case]['slots']).max()
    assert worst < 1e-4, f'slots differ by {worst:.2e}'
    assert sum(p.numel() for p in model.parameters()) == EXPECTED[case]['trainable'] == {'obj3d': 826_112, 'clevrer': 3_224_960}.get(case, EXPECTED[case]['trainable'])

@every
@torch.no_grad()
def test_rollout_equals_a_checkout(case):
    theirs, ours, x = published(case), load(case), past(case)
    expect = theirs(x, STEPS)
    worst = (ours.rollout(x, STEPS) - expect).abs().max().item()
    print(f'{case}: slots up to {expect.abs().max():.1f} differ by {worst:.2e}')
    assert 1 < expect.abs().max() < 20 and worst < 1e-4
    ours.double().time.copy_(theirs.double().enc_t_pe[0]) # the sinusoids are rounded to fp32 in both
    assert (ours.rollout(x.double(), STEPS) - theirs(x.double(), STEPS)).abs().max() < 1e-10

def test_gradients_equal_a_checkout():
    theirs, ours, x = published('slim'), load('slim'), past('slim')
    grads = []
    for model, roll in ((ours, ours.rollout), (theirs, theirs)):
        roll(x, 5).square().mean().backward()
        grads.append((model.in_proj.weight.grad, model.out_proj.bias.grad))
    for a, b in zip(*grads): assert (a - b).abs().max() < 1e-5*b.abs().max()

@pytest.mark.parametrize('name', ['obj3d', 'clevrer'])
def test_configuration_is_the_preset(name):
    model = load(name)
    assert model.config == PRESETS[name] and not model.training

# ---- what is refused by the loader -----------------------------------------------------------------------------------------------

def test_every_misfit_is_named():
    full = weights('slim')
    message = lambda w, *args: str(pytest.raises(CheckpointError, load_slotformer_rollouter, w, 3, 4).value).splitlines()[1:]
    for name, t in full.items():
        assert f'  missing: {name}' in message({n: v for n, v in full.items() if n != name})
        for wrong in (torch.cat([t, t], -1), t[None], t[..., :-1]):
            assert (lines := str(pytest.raises(ValueError, load_slotformer_rollouter, {**full, name: wrong}, 3, 4).value)), name
            assert 'shape of' in lines or 'width' in lines or 'sinusoidal' in lines, (name, lines)
    for name in ('enc_slots_pe', 'transformer_encoder.norm.weight', 'in_proj', 'decoder.0.0.weight'): assert message({**full, name: torch.zeros(2)}) == [f'  unknown: {name} (2,)']
    whole = {f'rollouter.{n}': t for n, t in full.items()}
    load_slotformer_rollouter({**whole, 'decoder.0.0.weight': torch.zeros(2), 'decoder_pos_embedding.grid': torch.zeros(2)}, 3, 4)
    assert message({**whole, 'in_proj.bias.old': torch.zeros(2)}) == ['  unknown: in_proj.bias.old (2,)']
    assert f'  missing: in_proj.weight' in message({})
    with pytest.raises(ValueError, match='heads'): load_slotformer_rollouter(full, 3, 5)
    with pytest.raises(ValueError, match=r'slots must be \(B, T, 3, 16\)'): load_slotformer_rollouter(full, 3, 4).rollout(torch.zeros(1, 4, 5, 16), 1)

# ---- the model ---------------------------------------------------------------------------------------------------------------------

PARTS = ('content', 'position', 'scale', 'rotation')
def clip(pose, b=2, t=6, k=5, d=32, dtype=torch.float32):
    n = lambda name, *shape: torch.tensor(noise(f'{pose} {name}', b, t, k, *shape), dtype=dtype)
    a = 0.5*n('angle').tanh()
    return SlotState(n('content', d), 0.4*n('position', 2) if pose else None, 0.2*(0.3*n('scale', 2)).exp() if 's' in pose else None,
                     torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1).unflatten(-1, (2, 2)) if 'r' in pose else None)

def model_of(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = SlotFormer(PRESETS['smoke'].but(**changes)).eval()
    if model.config.moves: nn.init.normal_(model.motion.weight, std=0.2)
    return model.to(dtype)

def gap(a, b): return max((getattr(a, n) - getattr(b, n)).abs().max().item() for n in PARTS if getattr(a, n) is not None)

@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('pose, equivariance', [('t', 'shift'), ('ts', 'shift'), ('tsr', 'shift'), ('ts', 'scale'), ('tsr', 'scale')])
def test_equivariance(pose, equivariance, causal):
    for dtype, tolerance, steps in ((torch.float32, 1e-5, 5), (torch.float64, 1e-9, 30)):
        model, x = model_of(dtype, pose=pose, equivariance=equivariance, causal=causal), clip(pose, dtype=dtype)
        future, c = model.rollout(x, steps), torch.tensor([0.45, -1.3], dtype=dtype)
        assert (future.position - x.position[:, -1:]).abs().max() > 0.05 # otherwise there is nothing to compare
        move = lambda s: s.replace(position=s.position + c)
        assert gap(model.rollout(move(x), steps), move(future)) < tolerance
        if equivariance == 'scale':
            within = ((future.scale > 0.002) & (future.scale < 1.9)).flatten(2).all(2).all(0) # the limits of scales, where scaling ends
            inside = int(within.long().cumprod(0).sum())
            grow = lambda s: s.replace(position=0.7*s.position, scale=0.7*s.scale)
            assert inside > 2 and gap(model.rollout(grow(x), inside), grow(future.map(lambda v: v[:, :inside]))) < tolerance

@torch.no_grad()
@pytest.mark.parametrize('pose', ['', 't', 'ts', 'tsr'])
def test_cache_equals_the_full_pass(pose):
    for history in (1, 2, 3):
        model, x = model_of(pose=pose, causal=True, history=history), clip(pose, t=history)
        future = model.rollout(x, 16)
        whole = SlotState(**{n: torch.cat([getattr(x, n), getattr(future, n)], 1) for n in PARTS if getattr(x, n) is not None})
        once = model.full(whole).map(lambda v: v[:, history - 1:-1])
        assert gap(once, future) < 1e-5

@torch.no_grad()
def test_cache_work_is_constant():
    model, seen = model_of(causal=True), []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append((args[0].shape[1], out[1][0].shape[2]))) for b in model.blocks]
    model.rollout(clip('').content, 20)
    assert seen[0] == (3*5, 3*5) and set(seen[2:]) == {(5, 3*5)} and len(seen) == 2*20 # a frame's tokens against three frames' keys
    for h in hooks: h.remove()

@torch.no_grad()
def test_past_decides_the_future_and_nothing_else():
    for causal in (False, True):
        model, x = model_of(causal=causal), clip('').content
        a = model.rollout(x, 8)
        assert torch.equal(model.rollout(x, 3), a[:, :3]) and torch.equal(model.rollout(x[:, -3:], 8), a)
        for t in range(1, 4): # every frame of the window matters
            changed = x.clone(); changed[:, -t] += 1
            assert (model.rollout(changed, 1) - a[:, :1]).abs().max() > 1e-3
        assert (model.rollout(x.flip(1)[:, -3:], 1) - model.rollout(x.flip(1)[:, -3:].flip(1), 1)).abs().max() > 1e-3 # and so does their order

def test_refusals():
    model = model_of()
    for wrong, match in ((lambda: model.rollout(clip('').content, 0), 'steps must be'), (lambda: model.rollout(clip('').content, 1.5), 'steps must be'), (lambda: model.rollout(clip('', t=2), 1), 'at least 3 frames'),
                         (lambda: model.rollout(clip('ts'), 1), 'content alone'), (lambda: model.rollout(clip('', d=31), 1), 'slots must be'), (lambda: model.rollout(clip('').content[0], 1), 'slots must be'),
                         (lambda: model.rollout(clip('').content.long(), 1), 'floating point'), (lambda: model.rollout('slots', 1), 'tensor'), (lambda: model_of(pose='ts').rollout(clip('t'), 1), "the slots have 't'"),
                         (lambda: model_of(pose='t').rollout(clip('').content, 1), 'no pose'), (lambda: model_of(pose='hold').rollout(clip(''), 1), 'hold'), (lambda: model.full(clip('')), 'causal'),
                         (lambda: SlotFormerConfig(pose='tr'), 'unknown pose'), (lambda: SlotFormerConfig(width=130), 'multiple of heads'), (lambda: SlotFormerConfig(history=0), 'at least 1')):
        with pytest.raises(ValueError, match=match): wrong()

def test_saved_and_loaded_again(tmp_path):
    for changes in (dict(), dict(causal=True), dict(pose='tsr', equivariance='scale')):
        model, x = model_of(**changes), clip(changes.get('pose', ''))
        again = SlotFormer.from_pretrained(model.save_pretrained(tmp_path/str(len(changes))))
        with torch.no_grad(): assert gap(again.rollout(x, 3), model.rollout(x, 3)) == 0

def test_autocast_keeps_slots_in_fp32():
    for causal in (False, True):
        model, x = model_of(pose='ts', causal=causal), clip('ts')
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): low = model.rollout(x, 4)
        with torch.no_grad(): high = model.rollout(x, 4)
        assert low.content.dtype == low.position.dtype == torch.float32 and 0 < gap(low, high) < 0.2

# ---- in training -------------------------------------------------------------------------------------------------------------------

class Slots: # a data set of slots, as the store gives it
    name, fingerprint, lengths = 'slots', 'f', [6]*8
    def __init__(self, pose, video): self.state, self.video = clip(pose, b=8), video
    def __len__(self): return 8
    def gather(self, index, start, length, step=1):
        out = {n: getattr(self.state, n)[index] for n in PARTS if getattr(self.state, n) is not None}
        return out | ({'video': torch.full((len(index), 6, 3, 32, 32), 90, dtype=torch.uint8)} if self.video else {})

@pytest.mark.parametrize('pose', ['', 'ts'])
@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_training_resumes_to_the_same_bits(tmp_path, pose, amp):
    def run(folder, steps, painter):
        torch.manual_seed(0)
        model = Rollout(SlotFormer(PRESETS['smoke'].but(pose=pose, dropout=0.1)), 3, painter)
        config = FitConfig(steps=6, batch_size=4, lr=1e-3, schedule='constant', checkpoint_every=3, amp=amp, tensorboard=False)
        stop = (lambda step, run: (_ for _ in ()).throw(KeyboardInterrupt) if step == steps else {},)
        class At: # every step
            every = 1
            def __call__(self, step, run): return stop[0](step, run)
        try: fit(model, Loader(Slots(pose, True), 4, seed=0), RolloutLoss(), config, folder, 'cpu', callbacks=[At()])
        except KeyboardInterrupt: pass
        return model.model.state_dict()
    torch.manual_seed(1)
    painter = SAVi(preset('smoke', 'isa_ts' if pose else 'sa'))
    whole = run(tmp_path/'whole', 99, painter)
    run(tmp_path/'cut', 4, painter)
    again = run(tmp_path/'cut', 99, painter)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert any(not torch.equal(whole[n], v) for n, v in SlotFormer(PRESETS['smoke'].but(pose=pose)).state_dict().items())
    assert all(p.requires_grad for p in painter.parameters()) # the caller's own model stays trainable
    other = SAVi(preset('smoke', 'isa_ts' if pose else 'sa'))
    with pytest.raises(CheckpointError, match='painter'): run(tmp_path/'cut', 99, other)

def test_the_decoder_moves_with_the_model():
    painter = SAVi(preset('smoke', 'sa'))
    rollout = Rollout(model_of(), 3, painter).double().train()
    assert {p.dtype for p in rollout._painter[0].parameters()} == {torch.float64} and {p.dtype for p in painter.parameters()} == {torch.float32}
    assert not rollout._painter[0].training and not any('decoder' in n for n in rollout.state_dict())

def test_training_without_frames():
    model = Rollout(model_of().train(), 3)
    result = fit(model, Loader(Slots('', False), 4, seed=0), RolloutLoss(image=0), FitConfig(steps=2, batch_size=4, tensorboard=False), device='cpu')
    assert result.status == 'done' and set(result.history) >= {'slot_recon'} and 'img_recon' not in result.history
    with pytest.raises(ValueError, match='with_video'): fit(Rollout(model_of(), 3, SAVi(preset('smoke', 'sa'))), Loader(Slots('', False), 4, seed=0), RolloutLoss(), FitConfig(steps=1, batch_size=4, tensorboard=False), device='cpu')

if __name__ == '__main__':
    write_fixtures()
    print(FIXTURES, FIXTURES.stat().st_size, 'bytes')
