"""PSB: published weights give published numbers, the future stays unseen, a stream equals the clip, and what is refused.

`fixtures/psb.json` holds samples of what the published code (NVlabs/PSB @64aabf3) computes from the weights and frames below. Made by
    SLOTNB_PSB=<PSB checkout> python tests/test_psb.py
With the same variable set, the tests also compare every number with that checkout."""
import importlib, json, math, os, sys, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slotnb.core import generator
from slotnb.interop import load_psb
from slotnb.layers.competition import visible
from slotnb.layers.slot_attention import SlotState
from slotnb.models.binder import Binder, Block, TimeBias
from slotnb.models.psb import PRESETS, PSB, PSBConfig, preset
from slotnb.models.savi import PRESETS as SAVI, SAVi

FIXTURES = Path(__file__).resolve().parent/'fixtures'/'psb.json'

# ---- the published auto-encoder: names and shapes, written down from its layout ----------------------------------------------------

CASES = {'small': dict(size=64, D=16, N=4, K=2, heads=2, T=3), 'wide': dict(size=128, D=12, N=3, K=1, heads=4, T=2), 'starved': dict(size=64, D=16, N=6, K=3, heads=4, T=3, gain={'cross_attn.proj_k': 8, 'cross_attn.proj_q': 8})}
every = pytest.mark.parametrize('case', CASES)

def noise(name, *shape): # RandomState's stream is frozen by numpy
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)

def layout(D, N, K, heads, **_):
    "Name -> shape of what is learned."
    out = {'encoder.slot_init': (1, 1, N, D)}
    def both(name, *shape, out_dim=None): out.update({f'{name}.weight': shape, f'{name}.bias': (out_dim or shape[0],)})
    for i, c in zip((0, 2, 4, 6), (3, D, D, D)): both(f'encoder.encoder_cnn.{i}', D, c, 5, 5)
    for at in ('encoder.encoder_pos', 'decoder.decoder_pos'): both(f'{at}.projection', D, 4, 1, 1)
    for at in ('encoder.layer_norm', 'encoder.binder.norm', 'decoder.slots_norm', 'decoder.decoder_cnn.0'): both(at, D)
    both('encoder.mlp.0', D, D); both('encoder.mlp.2', D, D)
    for i in range(K):
        at = f'encoder.binder.blocks.{i}'
        both(f'{at}.relpos_mlp.1', 128, 16); both(f'{at}.relpos_mlp.3', 1 + heads, 128); both(f'{at}.ffn.0', 4*D, D); both(f'{at}.ffn.2', D, 4*D)
        out.update({f'{at}.{m}.proj_{p}.weight': (D, D) for m in ('cross_attn', 'self_attn_across_time', 'self_attn') for p in 'qkvo'})
        for m in ('cross_attn_input', 'cross_attn_cond', 'self_attn_across_time', 'self_attn', 'ffn'): both(f'{at}.norm_{m}', D)
    for i, (a, b) in zip((1, 3, 5, 7), ((D, 64), (64, 64), (64, 64), (64, 4))): both(f'decoder.decoder_cnn.{i}', a, b, 5, 5, out_dim=b)
    return out

def fixed(size, K, **_):
    "What is stored and never learned."
    def grid(n):
        c = np.linspace(-math.sqrt(2), math.sqrt(2), n + 1)
        y, x = np.meshgrid(*[(c[:-1] + c[1:])/2]*2, indexing='ij')
        return np.stack([x, y, -x, -y])[None]
    waves = 2.**np.arange(8)*2*math.pi/2047
    return {'encoder.image_norm.mean': [0.485, 0.456, 0.406], 'encoder.image_norm.std': [0.229, 0.224, 0.225], 'encoder.encoder_pos.pe': grid(size), 'decoder.decoder_pos.pe': grid(8),
            **{f'encoder.binder.blocks.{i}.relpos_mlp.0.multipliers': waves for i in range(K)}}

def published_weights(case, seed=''):
    "Weights whose every tensor matters: unit gain, norms away from the identity, biases away from zero."
    out, c = {n: torch.tensor(np.array(v), dtype=torch.float32) for n, v in fixed(**CASES[case]).items()}, CASES[case]
    for name, shape in layout(**c).items():
        one_axis = len(shape) == 1
        value = 0.2*noise(seed + name, *shape) + name.endswith('weight') if one_axis else noise(seed + name, *shape)/(1 if name.endswith('slot_init') else math.sqrt(math.prod(shape[1:])))
        out[name] = torch.tensor(next((g for part, g in c.get('gain', {}).items() if part in name), 1)*value, dtype=torch.float32)
    return out

def frames(case): # a chequer of noise in [0, 1], (B, T, 3, H, W)
    c = CASES[case]
    tiles = (0.5 + 0.3*noise(f'{case} frames', 2, c['T'], 3, 8, 8)).clip(0, 1)
    return torch.tensor(np.kron(tiles, np.ones((c['size']//8,)*2)), dtype=torch.float32)

def sampled(slots, recon):
    n = recon.shape[-1]//3
    return {'slots': slots[..., ::slots.shape[-1]//4], 'recon': recon[..., n//2::n, n//2::n]}

def module(name):
    "A module of the published checkout."
    root = os.environ.get('SLOTNB_PSB')
    if not root: pytest.skip('SLOTNB_PSB does not name a checkout of NVlabs/PSB')
    if not (Path(root)/'psb.py').is_file(): pytest.skip(f'SLOTNB_PSB: {Path(root)/"psb.py"} is not there')
    own = {n: sys.modules.pop(n, None) for n in ('utils', 'psb', 'model')} # its modules have names that others have too
    sys.path.insert(0, str(root))
    try: return importlib.import_module(name)
    finally:
        sys.path.remove(str(root))
        for n, m in own.items():
            if m is None: sys.modules.pop(n, None)
            else: sys.modules[n] = m

def published(case):
    c = CASES[case]
    model = module('model').PSBAutoEncoder(types.SimpleNamespace(image_size=c['size'], d_model=c['D'], num_slots=c['N'], image_channels=3, psb_num_blocks=c['K'], psb_num_heads=c['heads']))
    wrong = model.load_state_dict(published_weights(case), strict=False)
    assert not wrong.unexpected_keys and all(n.endswith('causal_mask') for n in wrong.missing_keys)
    return model.eval()

@torch.no_grad()
def run_published(case):
    _, slots, _, _, recon = published(case)(frames(case))
    return slots, recon

def write_fixtures():
    entries = {case: {k: [round(x, 6) for x in v.flatten().tolist()] for k, v in sampled(*run_published(case)).items()} for case in CASES}
    FIXTURES.write_text(json.dumps(entries, separators=(',', ':')) + '\n')

EXPECTED = json.loads(FIXTURES.read_text()) if FIXTURES.is_file() else {}

@torch.no_grad()
def run(model, case, pieces):
    state, parts = None, []
    for piece in frames(case).split(list(pieces), 1):
        record = model(piece, state)
        state = record.state
        parts.append((record.slots.content, record.recon))
    return tuple(torch.cat(x, 1) for x in zip(*parts))

@every
@pytest.mark.parametrize('whole', [True, False])
def test_published_numbers(case, whole):
    t = CASES[case]['T']
    for name, value in sampled(*run(load_psb(published_weights(case), CASES[case]['heads']), case, (t,) if whole else (1,)*t)).items():
        worst = np.abs(value.flatten().numpy() - EXPECTED[case][name]).max()
        assert worst < 1e-4, f'{name} differ by {worst:.2e}'

@every
def test_equals_a_checkout(case):
    ours, theirs = run(load_psb(published_weights(case), CASES[case]['heads']), case, (CASES[case]['T'],)), run_published(case)
    for name, a, b in zip(('slots', 'reconstruction'), ours, theirs):
        worst = (a - b).abs().max().item()
        print(f'{case} {name}: {worst:.2e}')
        assert worst < 1e-4, f'{name} differ by {worst:.2e}'

@pytest.mark.parametrize('heads_bu', [1, 2])
def test_a_block_and_its_gradients_equal_a_checkout(heads_bu):
    torch.manual_seed(0)
    theirs = module('psb').PSBBlock(8, 2, max_len=16, num_heads_bu=heads_bu).double()
    ours = Binder(8, blocks=1, heads=2, heads_bu=heads_bu, longest=16, eps=1e-5, dead_bias=heads_bu == 1).double()
    block, cat = ours.blocks[0], lambda m, letters: torch.cat([getattr(m, f'proj_{p}').weight for p in letters])
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad and p.ndim == 1: p.copy_(torch.randn_like(p))
        for a, b in ((block.q, cat(theirs.cross_attn, 'q')), (block.kv, cat(theirs.cross_attn, 'kv')), (block.out, cat(theirs.cross_attn, 'o')), (block.time.qkv, cat(theirs.self_attn_across_time, 'qkv')),
                     (block.time.out, cat(theirs.self_attn_across_time, 'o')), (block.objects.qkv, cat(theirs.self_attn, 'qkv')), (block.objects.out, cat(theirs.self_attn, 'o'))): a.weight.copy_(b)
        for a, b in ((block.norm_slots, theirs.norm_cross_attn_input), (block.norm_tokens, theirs.norm_cross_attn_cond), (block.norm_time, theirs.norm_self_attn_across_time), (block.norm_objects, theirs.norm_self_attn),
                     (block.norm_ffn, theirs.norm_ffn), (block.ffn[0], theirs.ffn[0]), (block.ffn[2], theirs.ffn[2]), (block.distance.mlp[0], theirs.relpos_mlp[1]), (block.distance.mlp[2], theirs.relpos_mlp[3])):
            a.load_state_dict(b.state_dict())
    theirs.relpos_mlp[0].multipliers.data = 2.**torch.arange(8).double()*2*math.pi/31
    start, tokens = torch.randn(3, 8).double(), torch.randn(2, 4, 5, 8).double()
    results = []
    for fn in (lambda s, e: ours(s, e)[0], lambda s, e: theirs(ours.norm(s).expand(2, 4, -1, -1), e)):
        leaves = [start.clone().requires_grad_(), tokens.clone().requires_grad_()]
        out = fn(*leaves)
        torch.manual_seed(1)
        results.append([out, *torch.autograd.grad((out*torch.randn(out.shape).double()).sum(), leaves)])
    assert max((a - b).abs().max().item() for a, b in zip(*results)) < 1e-10

def test_parameter_counts():
    count = lambda m: sum(p.numel() for p in m.parameters())
    model = PSB(PRESETS['published'])
    assert count(model.binder) == 2_229_327 and count(model) == 5_607_187 and count(model.binder.blocks[0]) == 742_981
    assert not [n for n, t in model.state_dict().items() if 'mask' in n or t.dtype == torch.bool]
    assert sum(t.numel() for t in model.state_dict().values()) == 5_607_187 # no length is stored

# ---- the future is not seen -----------------------------------------------------------------------------------------------------

def binder(seed=0, dim=16, **more): # in float64, with every parameter away from its beginning
    torch.manual_seed(seed)
    b = Binder(dim, **{'heads': 2, **more}).double()
    with torch.no_grad():
        for p in b.parameters(): p.add_(0.2*torch.randn_like(p))
    return b

def clip(frames=6, slots=4, tokens=7, dim=16, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(slots, dim, generator=g).double(), torch.randn(batch, frames, tokens, dim, generator=g).double()

def leaks(encode, tokens): # encode: tokens (B, T, L, D) -> slots (B, T, N, D)
    "The frames whose slots change when later frames become noise: none, if the encoder is causal."
    before, found = encode(tokens), []
    for t0 in range(1, tokens.shape[1]):
        later = tokens.clone()
        later[:, t0:] = torch.randn(later[:, t0:].shape, dtype=tokens.dtype) # a constant would be invisible behind a LayerNorm
        after = encode(later)
        found += [t for t in range(t0) if not torch.equal(after[:, t], before[:, t])]
        assert all(not torch.allclose(after[:, t], before[:, t]) for t in range(t0, tokens.shape[1])), 'frames from the change on must change'
    return sorted(set(found))

modes = pytest.mark.parametrize('more', [dict(), dict(heads_bu=2), dict(history='frame'), dict(history='window:3'), dict(form='direct'), dict(form='lse'), dict(chunk=3)], ids=str)

@modes
def test_the_future_is_not_seen(more):
    start, tokens = clip()
    b = binder(**more)
    with torch.no_grad(): assert leaks(lambda x: b(start, x)[0], tokens) == []

@modes
def test_no_gradient_comes_from_the_future(more):
    start, tokens = clip(4)
    tokens.requires_grad_()
    slots = binder(**more)(start, tokens)[0]
    for t in range(4):
        g = torch.autograd.grad(slots[:, t].square().sum(), tokens, retain_graph=True)[0].abs().amax((0, 2, 3))
        assert (g[t + 1:] == 0).all() and (g[:t + 1] > 0).all()

def test_the_leak_detector_catches_a_tiled_mask(monkeypatch):
    "A causal mask that is tiled over time-major rows instead of repeated per slot and token: a public implementation has it."
    def tiled(frames, keys, sizes, span, weight, like):
        t, s, l = sizes
        n = 4
        rows = visible(t, s, span).repeat(n, l).reshape(t, n, s*l) # should be repeat_interleave
        return rows.to(like.dtype)[None, None]
    import slotnb.layers.competition as competition
    start, tokens = clip()
    b = binder(form='direct', blocks=1)
    monkeypatch.setattr(competition, 'keep', tiled)
    with torch.no_grad(): assert leaks(lambda x: b(start, x)[0], tokens) != []

def test_a_model_that_looks_ahead_is_found_out():
    start, tokens = clip()
    with torch.no_grad(): assert leaks(lambda x: binder(causal=False)(start, x)[0], tokens) == list(range(5))

# ---- a stream equals the clip ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pieces', [(1,)*6, (2, 2, 2), (3, 3), (1, 2, 3), (5, 1)], ids=str)
@pytest.mark.parametrize('more', [dict(), dict(heads_bu=4), dict(history='window:1'), dict(history='window:2'), dict(history='window:4', heads_bu=2), dict(history='frame', heads_bu=2)], ids=str)
def test_streaming(more, pieces):
    start, tokens = clip()
    b, state, parts = binder(**more), None, []
    with torch.no_grad():
        whole, shares, last = b(start, tokens)
        for piece in tokens.split(pieces, 1):
            x, a, state = b(None if state else start, piece, state=state)
            parts.append((x, a))
    x, a = (torch.cat(p, 1) for p in zip(*parts))
    assert (x - whole).abs().max() < 1e-10 and (a - shares).abs().max() < 1e-10
    assert state.frames == last.frames == 6
    assert state.tokens.shape == last.tokens.shape and torch.allclose(state.tokens, last.tokens)
    for ours, theirs in zip(state.blocks, last.blocks): assert torch.allclose(ours[0], theirs[0]) and torch.allclose(ours[1], theirs[1])
    if more.get('history', '').startswith('window'): assert state.tokens.shape[1] == int(more['history'][7:]) - 1 == state.blocks[0][0].shape[2]

def test_a_window_bounds_the_cache_to_the_byte():
    model, state, sizes = PSB(PRESETS['smoke'].but(history='window:3')).eval(), None, []
    with torch.no_grad():
        for frame in torch.rand(8, 1, 3, 32, 32):
            state = model.step(frame, state).state
            sizes.append(sum(t.untyped_storage().nbytes() for t in (state.tokens, *(x for pair in state.blocks for x in pair))))
    assert len(set(sizes[3:])) == 1, sizes

def test_history():
    start, tokens = clip()
    same = lambda a, b, t: (binder(history=a)(start, tokens[:, :t])[0] - binder(history=b)(start, tokens[:, :t])[0]).abs().max() < 1e-10
    with torch.no_grad():
        assert same('all', 'frame', 1) and not same('all', 'frame', 3)
        assert same('window:6', 'all', 6) and not same('window:5', 'all', 6)

def test_only_distances_in_time_matter():
    start, tokens = clip(12)
    last = lambda b, frames: b(start, tokens[:, -frames:])[0][:, -1]
    same = lambda b, one, two: torch.allclose(last(b, one), last(b, two), atol=1e-10)
    with torch.no_grad():
        for heads_bu in (1, 2):
            bias = binder(heads_bu=heads_bu).blocks[0].distance(8, 8)
            assert torch.allclose(bias[:, 1:, 1:].tril(), bias[:, :-1, :-1].tril(), atol=1e-12)
            for blocks in (1, 2, 3): # competition and time axis look back in turn: (blocks + 1)*(3 - 1) + 1 frames, wherever in the clip, and not one less
                reach, b = 2*blocks + 3, binder(heads_bu=heads_bu, history='window:3', blocks=blocks)
                assert same(b, 12, reach) and not same(b, 12, reach - 1)
                assert not same(b, 12, 3) # so a window is not a sub-clip on its own

def test_sliding_is_the_sub_clip():
    model, video = PSB(PRESETS['smoke']).eval(), torch.rand(2, 5, 3, 32, 32)
    slide = model.sliding(video, 3)
    with torch.no_grad():
        for t in range(5): assert torch.allclose(slide.slots.content[:, t], model(video[:, max(0, t - 2):t + 1]).slots.content[:, -1], atol=1e-5)
    with pytest.raises(ValueError, match='at least 1 frame'): model.sliding(video, 0)

# ---- symmetries ---------------------------------------------------------------------------------------------------------------------

@modes
def test_symmetries(more):
    start, tokens = clip()
    b, order, shuffle = binder(**more), torch.tensor([2, 0, 3, 1]), torch.randperm(7)
    with torch.no_grad():
        slots, shares, _ = b(start, tokens)
        assert torch.allclose(b(start[order], tokens)[0], slots[:, :, order], atol=1e-10)
        assert torch.allclose(b(start, tokens[:, :, shuffle])[0], slots, atol=1e-10) and torch.allclose(b(start, tokens[:, :, shuffle])[1], shares[..., shuffle], atol=1e-10)
        assert torch.allclose(b(start, tokens.repeat(1, 1, 3, 1))[0], slots, atol=1e-10)
        equal = b(start[:1].expand(4, -1), tokens)[0]
        assert torch.allclose(equal, equal[:, :, :1].expand_as(equal), atol=1e-10) # nothing else would break the symmetry

def test_equal_frames_give_equal_slots():
    start, tokens = clip()
    still = tokens[:, :1].expand(-1, 6, -1, -1)
    spread = lambda **more: (lambda s: (s - s[:, :1]).abs().max().item())(binder(**more)(start, still)[0])
    with torch.no_grad(): assert spread() < 1e-10 and spread(eps=1e-5) < 1e-4 and spread(heads_bu=2) > 1e-4

def test_one_block_as_four_loops():
    from test_competition import loops
    start, tokens = clip(3, slots=3, tokens=4, dim=8)
    b = binder(dim=8, blocks=1, heads_bu=2)
    block = b.blocks[0]
    with torch.no_grad():
        out = b(start, tokens)[0]
        x = b.norm(start).expand(2, 3, -1, -1)
        k, v = block.kv(block.norm_tokens(tokens)).chunk(2, -1)
        bias = block.distance(3, 3)
        x = x + block.out(loops(block.q(block.norm_slots(x)), k, v, heads=2, bias=bias[:2]))
        q, k, v = block.time.qkv(block.norm_time(x)).chunk(3, -1)
        y = torch.zeros_like(x)
        for n in range(3):
            for t in range(3):
                for h in range(2):
                    c = slice(4*h, 4*h + 4)
                    logits = torch.stack([(q[:, t, n, c]*k[:, s, n, c]).sum(-1)/2 + bias[2 + h, t, s] for s in range(t + 1)], -1).softmax(-1)
                    y[:, t, n, c] = sum(logits[:, s, None]*v[:, s, n, c] for s in range(t + 1))
        x = x + block.time.out(y)
        q, k, v = block.objects.qkv(block.norm_objects(x)).chunk(3, -1)
        y = torch.zeros_like(x)
        for n in range(3):
            for h in range(2):
                c = slice(4*h, 4*h + 4)
                w = ((q[:, :, n, None, c]*k[..., c]).sum(-1)/2).softmax(-1)
                y[:, :, n, c] = (w[..., None]*v[..., c]).sum(2)
        x = x + block.objects.out(y)
        x = x + block.ffn[2](nn.functional.gelu(block.ffn[0](block.norm_ffn(x))))
    assert (out - x).abs().max() < 1e-10

def test_axes_of_self_attention():
    b = binder().blocks[0]
    x = torch.randn(2, 5, 4, 16).double()
    other = x.clone()
    other[:, :, 1] = torch.randn(2, 5, 16).double()
    with torch.no_grad():
        changed = (b._over_time(other, None, None)[0] - b._over_time(x, None, None)[0]).abs().amax((0, 1, 3))
        assert changed[1] > 0 and not changed[[0, 2, 3]].any() # over time, each slot for itself
        other = x.clone()
        other[:, 2] = torch.randn(2, 4, 16).double()
        changed = (b._among_objects(other, None) - b._among_objects(x, None)).abs().amax((0, 2, 3))
        assert changed[2] > 0 and not changed[[0, 1, 3, 4]].any() # among objects, each frame for itself

@pytest.mark.parametrize('more', [dict(), dict(heads_bu=2), dict(form='lse')], ids=str)
def test_slots_that_take_no_part_leave_no_trace(more):
    start, tokens = clip()
    alive, b = torch.tensor([[True, False, True, True], [False, True, True, False]]), binder(**more)
    with torch.no_grad():
        slots, shares, state = b(start, tokens[:, :4], alive=alive)
        later, _, _ = b(None, tokens[:, 4:], state=state)
        for i, on in enumerate(alive):
            fewer, f_shares, _ = b(start[on], tokens[i:i + 1])
            assert torch.allclose(torch.cat([slots, later], 1)[i:i + 1, :, on], fewer, atol=1e-10) and torch.allclose(shares[i:i + 1, :, on], f_shares[:, :4], atol=1e-10)
        assert not shares.transpose(1, 2)[~alive].any()
    assert b(torch.randn(9, 16).double(), tokens)[0].shape == (2, 6, 9, 16) # another number than the model was made for

def test_unused_slots_cannot_drown_the_picture():
    model = PSB(PRESETS['smoke']).eval()
    nn.init.constant_(model.decoder.cnn[-1].bias, 0.)
    slots, alive = torch.randn(1, 2, 3, 32), torch.tensor([[False, True, True]])
    slots[:, :, 0] *= 1e4 # what an unused slot became is nobody's business
    with torch.no_grad():
        recon, masks, _ = model.decode(SlotState(slots), alive)
        fewer = model.decode(SlotState(slots[:, :, 1:]))
    assert torch.allclose(recon, fewer[0], atol=1e-5) and torch.allclose(masks[:, :, 1:], fewer[1], atol=1e-5) and not masks[:, :, 0].any()

# ---- numbers ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('sizes', [dict(frames=1), dict(slots=1), dict(tokens=1)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_no_nan(sizes, dtype):
    start, tokens = clip(**sizes)
    b = Binder(16, heads=2).to(dtype)
    tokens = (1e3*tokens).to(dtype).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        slots = b(start.to(dtype), tokens)[0]
        slots.sum().backward()
    assert slots.isfinite().all() and tokens.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in b.parameters())

def test_two_thousand_frames():
    b = Binder(8, blocks=1, heads=2)
    with torch.no_grad(): slots, _, state = b(torch.randn(2, 8), torch.randn(1, 2000, 4, 8))
    assert slots.isfinite().all() and state.frames == 2000

def test_distances_beyond_the_longest_are_alike():
    bias = TimeBias(2, longest=4)(9, 9)[:, 8]
    assert torch.allclose(bias[:, 0], bias[:, 5], atol=1e-6) and not torch.allclose(bias[:, 5], bias[:, 6], atol=1e-3)

def test_gradients_reach_every_parameter():
    for more, dead in ((dict(), set()), (dict(heads_bu=2), set()), (dict(dead_bias=True), {'distance'})):
        model = PSB(PRESETS['smoke'].but(**more))
        video = torch.rand(2, 3, 3, 32, 32)
        (model(video).recon - video).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        for block in model.binder.blocks if dead else (): # the one row that cannot matter
            g = block.distance.mlp[2].weight.grad
            assert not g[0].any() and g[1:].any(1).all()

def test_masks_and_order_of_slots():
    model, video = PSB(PRESETS['smoke']).eval(), torch.rand(1, 2, 3, 32, 32)
    with torch.no_grad():
        record = model(video)
        turned = model(video, slots=model.init.mean[0].flip(0))
    assert torch.allclose(record.decoder_masks.sum(2), torch.ones(()), atol=1e-5) and torch.allclose(record.attention_masks.sum(2), torch.ones(()), atol=1e-5)
    assert torch.allclose(turned.recon, record.recon, atol=1e-5) and torch.allclose(turned.decoder_masks.flip(2), record.decoder_masks, atol=1e-5)

def test_drawn_slots_are_those_of_the_whole_clip():
    model, video = PSB(PRESETS['smoke'].but(init='gaussian')).eval(), torch.rand(2, 4, 3, 32, 32)
    with torch.no_grad():
        whole = model(video, generator=generator(0, 'slots'))
        assert torch.equal(whole.state.start, model(video[:, :1], generator=generator(0, 'slots')).state.start)
        assert not torch.equal(whole.state.start[0], whole.state.start[1])
    assert torch.allclose(model.predict(video, seed=0, frames=2).recon, whole.recon, atol=1e-5)

def test_saved_and_loaded_again(tmp_path):
    for name in ('smoke', 'study'):
        model = PSB(preset(name)).eval()
        again = PSB.from_pretrained(model.save_pretrained(tmp_path/name))
        video = torch.rand(1, 2, 3, 32, 32)
        draw = lambda: torch.Generator().manual_seed(1)
        with torch.no_grad(): assert torch.equal(again(video, generator=draw()).recon, model(video, generator=draw()).recon) and again.config == model.config

def test_savi_and_psb_share_both_ends():
    for name in ('smoke', 'laptop'):
        savi, psb = SAVi(SAVI[name]), PSB(PSBConfig.like(SAVI[name]))
        for end in ('encoder', 'decoder'):
            shapes = [{n: tuple(t.shape) for n, t in getattr(m, end).state_dict().items()} for m in (savi, psb)]
            assert shapes[0] == shapes[1]
        video = torch.rand(1, 2, 3, *psb.config.size)
        psb.encoder.load_state_dict(savi.encoder.state_dict())
        with torch.no_grad(): assert torch.equal(psb.tokens(video[0])[0], savi.encoder(video[0])[0])

def test_trained_scored_and_extracted_like_savi(tmp_path):
    from slotnb.data.clips import Loader
    from slotnb.data.open import open_data
    from slotnb.evaluation.decompose import decompose, score_decomposition, stack_clips
    from slotnb.models.slot_store import extract_slots
    from slotnb.training.fit import FitConfig, fit
    from slotnb.training.recipes import loss_of
    data = open_data('tiny', 'train', size=(32, 32), n=8, seed=0, length=3)
    model = PSB(PRESETS['smoke'])
    result = fit(model, Loader(data, 4, seed=0), loss_of(model.config), FitConfig(steps=6, batch_size=4, log_every=3, amp='bf16', channels_last=True, tensorboard=False, checkpoint_every=3), run_dir=tmp_path, device='cpu')
    assert result.status == 'done' and result.history['loss'][-1] < result.history['loss'][0]
    clips = open_data('tiny', 'val', size=(32, 32), n=3, seed=0)
    video, labels = stack_clips(clips)
    record = decompose(model, video, batch=2)
    entries, scores, _ = score_decomposition(video, labels, record, lpips=False)
    assert record.state is None and math.isfinite(entries['fg_ari.decoder.clip']) and len(scores) == 3
    store = extract_slots(model, clips, tmp_path/'slots', frames=4, device='cpu')
    with torch.no_grad(): assert torch.allclose(store[1].slots.content, model(video[1:2]).slots.content[0], atol=1e-4)

# ---- what is refused ------------------------------------------------------------------------------------------------------------

def test_states_that_do_not_fit():
    start, tokens = clip()
    a, b, short = binder(), binder(), binder(max_frames=4)
    state = a(start, tokens[:, :2])[2]
    for text, call in (('another model', lambda: b(None, tokens[:, 2:], state=state)), ('PSBState of the frames before', lambda: a(None, tokens, state=start)),
                       ('the state is of 2 clips with 7 tokens', lambda: a(None, tokens[:1], state=state)), ('of 2 with 6', lambda: a(None, tokens[:, :, 1:], state=state)),
                       ('give one of them', lambda: a(start, tokens, state=state)), ('give one of them', lambda: a(None, tokens)), ('initial slots must be', lambda: a(start[:, :8], tokens)),
                       ('initial slots must be', lambda: a(start.expand(3, -1, -1), tokens)), ('tokens must be', lambda: a(start, tokens[..., :8])), ('6 frames, but max_frames is 4', lambda: short(start, tokens)),
                       ('5 frames, but max_frames is 4', lambda: short(None, tokens[:, 3:5], state=short(start, tokens[:, :3])[2])), ('one per slot', lambda: a(start, tokens, alive=torch.ones(2, 5, dtype=torch.bool))),
                       ('negative', lambda: a(start, tokens, -torch.ones(2, 6, 7))), ('are zero', lambda: a(start, tokens, torch.zeros(2, 6, 7))), (r'\(2, 6, 7\) or \(2, 4, 6, 7\)', lambda: a(None, tokens[:, 2:], torch.ones(2, 4, 7), state)),
                       ('causal=False', lambda: (lambda m: m(None, tokens, state=m(start, tokens)[2]))(binder(causal=False)))):
        with pytest.raises(ValueError, match=text): call()

def test_records_that_do_not_fit():
    model, other, video = PSB(PRESETS['smoke']), PSB(PRESETS['smoke']), torch.rand(1, 2, 3, 32, 32)
    state = model(video).state
    for text, call in (('another model', lambda: other(video, state)), ('give them without a state', lambda: model(video, state, slots=torch.randn(5, 32))), ('video must be', lambda: model(video[0])), ('frames of', lambda: model(video[..., :16])),
                       ('takes no condition', lambda: model(video, condition=torch.rand(1, 2, 4))), ('N <= 5 slots', lambda: PSB(PRESETS['smoke'].but(init='boxes'))(video, condition=torch.rand(1, 9, 4))),
                       ('initial slots must be', lambda: model(video, slots=torch.randn(5, 31)))):
        with pytest.raises(ValueError, match=text): call()

@pytest.mark.parametrize('text,more', [('multiple of heads', dict(heads=5)), ('multiple of heads_bu', dict(heads_bu=7)), ("Did you mean 'window'", dict(history='windw:2')), ('at least 0', dict(eps=-1.)), ('slots must be', dict(slots=0)),
                                       ('dead_bias', dict(dead_bias=True, heads_bu=2)), ("Did you mean 'mixture'", dict(decoder='mixtur')), ('no shuffle', dict(decoder='mixture', shuffle=2)), ('field of PSBConfig', dict(head=4)),
                                       ('must be an integer', dict(blocks=2.)), ('one stride and kernel more', dict(decoder='mixture', shuffle=1))], ids=str)
def test_configs_that_cannot_be(text, more):
    with pytest.raises(ValueError, match=text): PSB(PSBConfig().but(**more))

def refused(*args):
    with pytest.raises(ValueError) as e: load_psb(*args)
    return str(e.value).splitlines()

def test_checkpoints_that_do_not_fit():
    full = published_weights('small')
    for name in full: assert f'  missing: {name}' in refused({n: t for n, t in full.items() if n != name}, 2), name
    for name in ('encoder.gate', 'encoder.binder.blocks.0.cross_attn.proj_q.bias', 'causal_mask', 'decoder.decoder_cnn.2.weight', 'encoder.slot_init '): assert f'  unknown: {name} (2,)' in refused({**full, name: torch.zeros(2)}, 2), name
    for name, t in full.items():
        if 'blocks.1.' in name: continue
        for wrong in (torch.cat([t, t]), t[None]):
            lines = refused({**full, name: wrong}, 2)
            assert any(word in '\n'.join(lines) for word in ('shape of', 'must be', 'multiple', 'paints', 'not as published')), (name, lines)
    for name in fixed(**CASES['small']): assert name in refused({**full, name: full[name] + 0.1}, 2)[0] or 'multipliers' in name
    assert 'num_heads must be between 1 and 2' in refused(full, 3)[0] and 'num_heads' in refused(full, 0)[0]
    assert 'must be a dict' in refused('weights.pth')[0]
    expect = run(load_psb(full, 2), 'small', (3,))[1]
    masked = {**full, **{f'encoder.binder.blocks.{i}.causal_mask': torch.ones(4, 4).triu(1).bool() for i in range(2)}}
    for wrapped in (masked, {'model': full, 'epoch': 1}, {'model': {f'module.{n}': t for n, t in full.items()}}, {'state_dict': full}, {n: t.numpy() for n, t in full.items()}): assert torch.equal(run(load_psb(wrapped, 2), 'small', (3,))[1], expect)

if __name__ == '__main__':
    write_fixtures()
    print(FIXTURES, FIXTURES.stat().st_size, 'bytes')
