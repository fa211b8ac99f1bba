"""Published weights give published numbers: SlotFormer's SAVi against numbers of its own code, ISA against its equations.

`fixtures/slotformer_savi.json` holds samples of what SlotFormer's code (pairlab/SlotFormer @10a6d9b, with its dependency nerv) computes from the weights and frames below. Made by
    SLOTNB_SLOTFORMER=<SlotFormer checkout> PYTHONPATH=<folder of nerv> python tests/test_interop.py
With the same variable set, the tests also compare every number with that checkout."""
import importlib, json, math, os, sys, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from slotnb.interop import load_isa_attention, load_slotformer_savi
from slotnb.layers.slot_attention import SlotState
from slotnb.models.savi import PRESETS, SAVi
from slotnb.training.losses import KLD

FIXTURES = Path(__file__).resolve().parent/'fixtures'/'slotformer_savi.json'

# ---- SlotFormer's SAVi: names and shapes, written down from its documentation of the layout ----------------------------------------

WIDE = dict(K=6, D=128, mlp=256, enc=(64, 64, 64, 64), tokens=128, dec=(64, 64, 64, 64), layers=2, heads=4, ffn=512, iterations=2, size=64)
SLIM = dict(WIDE, K=3, D=16, mlp=24, enc=(8, 12, 8), tokens=20, dec=(8, 12, 8, 6), ffn=40, heads=2)
CASES = {
    'obj3d': dict(WIDE, kernel_mlp=True, kind='transformer', lstm=True, sto=False),
    'clevrer': dict(WIDE, K=7, kernel_mlp=False, kind='mlp', lstm=False, sto=True),
    'slim_obj3d': dict(SLIM, kernel_mlp=True, kind='transformer', lstm=True, sto=False, iterations=3),
    'slim_clevrer': dict(SLIM, kernel_mlp=False, kind='mlp', lstm=False, sto=True),
    'transformer_alone': dict(SLIM, kernel_mlp=False, kind='transformer', lstm=False, sto=True, layers=1),
    'mlp_then_lstm': dict(SLIM, kernel_mlp=True, kind='mlp', lstm=True, sto=False),
    'starved': dict(SLIM, kernel_mlp=True, kind='transformer', lstm=True, sto=False, K=6, gain={'slot_attention.project_k': 12, 'encoder_out_layer.3': 0.05}),  # the epsilons matter
    'frames_of_128': dict(SLIM, kernel_mlp=True, kind='transformer', lstm=True, sto=False, size=128),
}
BATCH, FRAMES = 1, 3

def layout(K, D, mlp, enc, tokens, dec, layers, ffn, kernel_mlp, kind, lstm, **_):
    "Name -> shape."
    out = {'init_latents': (1, K, D), 'encoder_pos_embedding.grid': (1, 64, 64, 4), 'decoder_pos_embedding.grid': (1, 8, 8, 4)}
    def both(name, *shape, out_dim=None): out.update({f'{name}.weight': shape, f'{name}.bias': (out_dim or shape[0],)})
    for i, (a, b) in enumerate(zip((3, *enc), enc)): both(f'encoder.{i}.0', b, a, 5, 5)
    for i, (a, b) in enumerate(zip((D, *dec), dec)): both(f'decoder.{i}.0', a, b, 5, 5, out_dim=b)
    both(f'decoder.{len(dec)}', 4, dec[-1], 1, 1)
    both('encoder_pos_embedding.dense', enc[-1], 4); both('decoder_pos_embedding.dense', D, 4)
    both('encoder_out_layer.0', enc[-1]); both('encoder_out_layer.1', tokens, enc[-1]); both('encoder_out_layer.3', tokens, tokens)
    both('slot_attention.norm_inputs', tokens); both('slot_attention.project_q.0', D)
    out.update({'slot_attention.project_q.1.weight': (D, D), 'slot_attention.project_k.weight': (D, tokens), 'slot_attention.project_v.weight': (D, tokens)})
    for p in ('ih', 'hh'): out.update({f'slot_attention.gru.weight_{p}': (3*D, D), f'slot_attention.gru.bias_{p}': (3*D,)})
    both('slot_attention.mlp.0', D); both('slot_attention.mlp.1', mlp, D); both('slot_attention.mlp.3', D, mlp)
    both('kernel_dist_layer.0', 2*D, D)
    if kernel_mlp: both('kernel_dist_layer.1', 2*D); both('kernel_dist_layer.3', 2*D, 2*D)
    both('prior_slot_layer.0', D, D); both('prior_slot_layer.1', D); both('prior_slot_layer.3', D, D)
    base = 'predictor.base_predictor' if lstm else 'predictor'
    if kind == 'mlp': both(f'{base}.ln', D); both(f'{base}.mlp.0', 2*D, D); both(f'{base}.mlp.2', D, 2*D)
    else:
        for i in range(layers):
            at = f'{base}.transformer_encoder.layers.{i}'
            out.update({f'{at}.self_attn.in_proj_weight': (3*D, D), f'{at}.self_attn.in_proj_bias': (3*D,)})
            both(f'{at}.self_attn.out_proj', D, D); both(f'{at}.linear1', ffn, D); both(f'{at}.linear2', D, ffn); both(f'{at}.norm1', D); both(f'{at}.norm2', D)
    if lstm:
        out.update({'predictor.rnn.weight_ih_l0': (4*mlp, D), 'predictor.rnn.weight_hh_l0': (4*mlp, mlp), 'predictor.rnn.bias_ih_l0': (4*mlp,), 'predictor.rnn.bias_hh_l0': (4*mlp,)})
        both('predictor.out_projector', D, mlp)
    return out

def noise(name, *shape): # RandomState's stream is frozen by numpy
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)

def weights(case):
    "Weights whose every tensor matters: unit gain, norms away from the identity, biases away from zero."
    out = {}
    for name, shape in layout(**CASES[case]).items():
        if name.endswith('.grid'):
            axes = np.stack(np.meshgrid(*[np.linspace(0, 1, n) for n in shape[1:3]], indexing='ij'), -1)
            value = np.concatenate([axes, 1 - axes], -1)[None]
        elif len(shape) == 1: value = 0.2*noise(name, *shape) + (name.endswith('weight'))
        elif name == 'init_latents': value = noise(name, *shape)
        else: value = noise(name, *shape)/math.sqrt(math.prod(shape[1:]))
        gain = next((g for n, g in CASES[case].get('gain', {}).items() if name.startswith(n)), 1)
        out[name] = torch.tensor(gain*value, dtype=torch.float32)
    return out

def frames(case): # a chequer of noise in [0, 1], (B, T, 3, H, W)
    tiles = (0.5 + 0.3*noise(f'{case} frames', BATCH, FRAMES, 3, 8, 8)).clip(0, 1)
    return torch.tensor(np.kron(tiles, np.ones((CASES[case]['size']//8,)*2)), dtype=torch.float32)

def load(case, **more):
    c = CASES[case]
    return load_slotformer_savi(weights(case), c['heads'], c['iterations'], size=c['size'], **more)

@torch.no_grad()
def run(model, case, pieces=(FRAMES,)):
    "Slots and reconstruction of a clip, in one go or in pieces."
    video, state, slots, recon, kl = frames(case), None, [], [], float('nan')
    for part in video.split(list(pieces), 1):
        record = model(part, state)
        state = record.state
        slots.append(record.slots.content); recon.append(record.recon)
        if 'kernel_logvar' in record.extras: kl = KLD(weight=1.)(record)['kld'].item()
    return torch.cat(slots, 1), torch.cat(recon, 1), kl

def sampled(slots, recon): # some of the numbers, a kB or two
    n = recon.shape[-1]//3
    return {'slots': slots[..., ::slots.shape[-1]//4], 'recon': recon[..., n//2::n, n//2::n]}

# ---- the published code, where it is at hand ------------------------------------------------------------------------------------

def published(case):
    "SlotFormer's own model with these weights; its kernels are means, as ours are in eval()."
    root = os.environ.get('SLOTNB_SLOTFORMER')
    if not root: pytest.skip('SLOTNB_SLOTFORMER does not name a checkout of pairlab/SlotFormer')
    folder = Path(root)/'slotformer/base_slots/models'
    if not (folder/'savi.py').is_file(): pytest.skip(f'SLOTNB_SLOTFORMER: {folder/"savi.py"} is not there')
    pytest.importorskip('nerv', reason="SlotFormer's dependency nerv is not importable: put it on PYTHONPATH")
    package = sys.modules.setdefault('_slotformer_models', types.ModuleType('_slotformer_models'))  # importing the real package would import all its data sets
    package.__path__ = [str(folder)]
    c = CASES[case]
    model = importlib.import_module('_slotformer_models.savi').StoSAVi(
        (c['size'],)*2, 6,
        dict(num_slots=c['K'], slot_size=c['D'], slot_mlp_size=c['mlp'], num_iterations=c['iterations'], kernel_mlp=c['kernel_mlp']),
        dict(enc_channels=(3, *c['enc']), enc_ks=5, enc_out_channels=c['tokens'], enc_norm=''),
        dict(dec_channels=(c['D'], *c['dec']), dec_resolution=(8, 8), dec_ks=5, dec_norm=''),
        dict(pred_type=c['kind'], pred_rnn=c['lstm'], pred_norm_first=True, pred_num_layers=c['layers'], pred_num_heads=c['heads'], pred_ffn_dim=c['ffn'], pred_sg_every=None),
        dict(use_post_recon_loss=True, kld_method='var-0.01' if c['sto'] else 'none'))
    model.load_state_dict(weights(case))
    model._sample = model._sample_dist
    model._sample_dist = lambda dist: dist[..., :c['D']]
    return model.eval()

@torch.no_grad()
def run_published(model, case):
    model._reset_rnn() if hasattr(model.predictor, 'reset') else None
    out = model._forward(frames(case)*2 - 1, None)
    return out['post_slots'], (out['post_recon_combined'] + 1)/2, model.calc_train_loss({}, out)['kld_loss'].item()

def write_fixtures():
    entries = {}
    for case in CASES:
        model = published(case)
        slots, recon, kl = run_published(model, case)
        numbers = {k: [round(x, 6) for x in v.flatten().tolist()] for k, v in sampled(slots, recon).items()}
        entries[case] = dict(parameters=sum(p.numel() for p in model.parameters()), kld=kl, **numbers)
    FIXTURES.parent.mkdir(exist_ok=True)
    FIXTURES.write_text(json.dumps(entries, separators=(',', ':')) + '\n')

# ---- parity -------------------------------------------------------------------------------------------------------------------------

EXPECTED = json.loads(FIXTURES.read_text()) if FIXTURES.is_file() else {}
every = pytest.mark.parametrize('case', CASES)

@every
@pytest.mark.parametrize('pieces', [(3,), (1, 2), (1, 1, 1)], ids=str)
def test_savi_gives_published_numbers(case, pieces):
    slots, recon, kl = run(load(case, stochastic=CASES[case]['sto']), case, pieces)
    for name, value in sampled(slots, recon).items():
        worst = np.abs(value.flatten().numpy() - EXPECTED[case][name]).max()
        assert worst < 1e-4, f'{name} differ by {worst:.2e}'
    if CASES[case]['sto'] and pieces == (3,): assert kl == pytest.approx(EXPECTED[case]['kld'], rel=1e-5)

@every
def test_savi_equals_a_checkout(case):
    ours, theirs = run(load(case, stochastic=CASES[case]['sto']), case), run_published(published(case), case)
    for name, a, b in zip(('slots', 'reconstruction'), ours, theirs):
        worst = (a - b).abs().max().item()
        print(f'{case} {name}: {worst:.2e}')
        assert worst < 1e-4, f'{name} differ by {worst:.2e}'
    if CASES[case]['sto']: assert ours[2] == pytest.approx(theirs[2], rel=1e-6)

def test_sampled_kernels_equal_a_checkout():
    theirs, ours = published('clevrer'), load('clevrer')
    theirs._sample_dist, ours.sample_kernels = theirs._sample, True
    torch.manual_seed(0)
    a = run(ours, 'clevrer')
    torch.manual_seed(0)
    b = run_published(theirs, 'clevrer')
    assert (a[0] - b[0]).abs().max() < 1e-4 and (a[1] - b[1]).abs().max() < 1e-4

@every
def test_counts_and_dead_head(case):
    count = lambda m: sum(p.numel() for p in m.parameters())
    dead = sum(t.numel() for n, t in weights(case).items() if n.startswith('prior_slot_layer'))
    assert count(load(case, dead_head=True)) == EXPECTED[case]['parameters'] == count(load(case)) + dead
    assert {'obj3d': 2_023_684, 'clevrer': 1_198_980}.get(case, EXPECTED[case]['parameters']) == EXPECTED[case]['parameters']

@pytest.mark.parametrize('name', ['obj3d', 'clevrer'])
def test_configuration_is_the_preset(name):
    model = load(name, dead_head=True)
    assert model.config == PRESETS[name] and model.config.stochastic == (name == 'clevrer') and not model.training
    assert torch.equal(model.prior[3].weight, weights(name)['prior_slot_layer.3.weight'])

def test_kld_is_the_published_formula():
    mu, logvar = noise('mu', 2, 3, 4, 5), noise('logvar', 2, 3, 4, 5)
    s1, s2 = np.exp(logvar/2), math.sqrt(0.01)
    expect = (np.log(s2/s1) + s1**2/(2*s2**2) - 0.5).sum(-1).mean()
    record = types.SimpleNamespace(extras={'kernel_mean': torch.tensor(mu), 'kernel_logvar': torch.tensor(logvar)})
    assert KLD(weight=1.)(record)['kld'].item() == pytest.approx(expect, rel=1e-6)
    assert KLD()(record)['kld'].item() == pytest.approx(1e-4*expect, rel=1e-6)

def test_stochastic_means_unless_asked():
    model, video = load('slim_clevrer'), frames('slim_clevrer')
    slots = lambda seed: model(video, generator=torch.Generator().manual_seed(seed)).slots.content
    with torch.no_grad():
        assert torch.equal(slots(0), slots(1))
        model.sample_kernels = True
        assert not torch.allclose(slots(0), slots(1), atol=1e-2) and torch.equal(slots(1), slots(1))
        model.sample_kernels = False
        model.train()
        assert not torch.allclose(slots(0), slots(1), atol=1e-2)

def test_saved_and_loaded_again(tmp_path):
    for case in ('slim_clevrer', 'slim_obj3d'):
        model = load(case)
        again = SAVi.from_pretrained(model.save_pretrained(tmp_path/case))
        assert torch.equal(run(again, case)[1], run(model, case)[1])

# ---- what is refused ------------------------------------------------------------------------------------------------------------

def refused(w, *args, **kwargs):
    with pytest.raises(ValueError) as e: load_slotformer_savi(w, *args, **kwargs)
    return str(e.value).splitlines()

@pytest.mark.parametrize('case', [c for c in CASES if c not in ('obj3d', 'clevrer')])
def test_every_missing_tensor_is_named(case):
    full, size = weights(case), CASES[case]['size']
    for name in full:
        less = {n: t for n, t in full.items() if n != name}
        if name.endswith('.grid') or name.startswith('prior_slot_layer'): load_slotformer_savi(less, CASES[case]['heads'], size=size)
        else: assert f'  missing: {name}' in refused(less, CASES[case]['heads'], size=size), name

def test_unknown_tensors_are_named():
    full = weights('slim_obj3d')
    for name in ('encoder.1.1.running_mean', 'decoder.4.1.weight', 'slot_attention.gru.bias', 'predictor.ln.weight', 'prior_slot_layer.2.weight', 'rollouter.in_proj.weight', 'grid', 'encoder.0.0.weight '):
        assert f'  unknown: {name} (2,)' in refused({**full, name: torch.zeros(2)}, 2), name
    both = refused({**{n: t for n, t in full.items() if n not in ('init_latents', 'predictor.rnn.bias_hh_l0')}, 'a': torch.zeros(1), 'b.c': torch.zeros(1)}, 2)
    assert set(both[1:]) == {'  missing: predictor.rnn.bias_hh_l0', '  missing: init_latents', '  unknown: a (1,)', '  unknown: b.c (1,)'}
    assert any('missing: init_latents' in line for line in refused({}))
    assert 'weights must be arrays' in refused({**full, 'epoch': 'seven'})[0]
    assert 'must be a dict' in refused('weights.pth')[0]

@pytest.mark.parametrize('case', ['slim_obj3d', 'slim_clevrer'])
def test_every_wrong_shape_is_refused(case):
    full = weights(case)
    for name, t in full.items():
        if name.endswith('.grid') or name.startswith('prior_slot_layer'): continue
        for wrong in (torch.cat([t, t]), t[None], t[..., :-1]):
            lines = refused({**full, name: wrong}, 2)
            assert 'shape of' in '\n'.join(lines) or 'must be' in lines[0] or 'match' in lines[0] or 'multiple' in lines[0], (name, lines)

def test_wrappers_and_kinds_of_array():
    full, expect = weights('slim_obj3d'), run(load('slim_obj3d'), 'slim_obj3d')[1]
    for wrapped in ({'state_dict': full, 'epoch': 3}, {f'module.{n}': t for n, t in full.items()}, {'state_dict': {f'module.{n}': t for n, t in full.items()}},
                    {n: t.double() for n, t in full.items()}, {n: t.numpy() for n, t in full.items()}, {n: torch.nn.Parameter(t) for n, t in full.items()}):
        assert torch.equal(run(load_slotformer_savi(wrapped, 2, 3), 'slim_obj3d')[1], expect)

def test_keywords_matter():
    full, base = weights('slim_obj3d'), run(load('slim_obj3d'), 'slim_obj3d')[0]
    for args in ((4, 3), (2, 2)): assert (run(load_slotformer_savi(full, *args), 'slim_obj3d')[0] - base).abs().max() > 1e-2
    assert 'multiple of the feature map' in refused(full, 2, size=100)[0]
    assert refused(full, 3)  # 16 numbers per slot are not 3 heads
    assert refused(full, 2, 0)
    assert load_slotformer_savi({n: t for n, t in full.items() if 'grid' not in n}, 2, size=128).config.size == (128, 128)

# ---- ISA: the equations, in float64 and with loops ----------------------------------------------------------------------------------

D, D_IN, MLP, HIDDEN = 8, 10, 12, 6

def isa_layout():
    out = {'LayerNorm_0/scale': (D_IN,), 'LayerNorm_0/bias': (D_IN,), 'LayerNorm_1/scale': (D,), 'LayerNorm_1/bias': (D,), 'dense_gp_0/kernel': (2, D), 'dense_gp_0/bias': (D,),
           'general_dense_q_0/kernel': (D, D), 'general_dense_k_0/kernel': (D_IN, D), 'general_dense_v_0/kernel': (D_IN, D)}
    for m, h in (('MLP_0', HIDDEN), ('MLP_1', MLP)):
        out |= {f'{m}/LayerNorm_0/scale': (D,), f'{m}/LayerNorm_0/bias': (D,), f'{m}/dense_mlp_0/kernel': (D, h), f'{m}/dense_mlp_0/bias': (h,),
                f'{m}/dense_mlp_1/kernel': (h, D), f'{m}/dense_mlp_1/bias': (D,)}
    for g in ('ir', 'iz', 'in', 'hr', 'hz', 'hn'):
        out[f'GRU_0/GRUCell_0/{g}/kernel'] = (D, D)
        if g not in ('hr', 'hz'): out[f'GRU_0/GRUCell_0/{g}/bias'] = (D,)
    return out

def isa_params():
    return {n: noise(n, *s)/math.sqrt(s[0]) if len(s) == 2 else 0.2*noise(n, *s) + n.endswith('scale') for n, s in isa_layout().items()}

def layer_norm(p, name, x): return (x - x.mean())/np.sqrt(x.var() + 1e-6)*p[f'{name}/scale'] + p[f'{name}/bias']
def dense(p, name, x): return x @ p[f'{name}/kernel'] + p.get(f'{name}/bias', 0)
def mlp(p, name, x): return dense(p, f'{name}/dense_mlp_1', np.maximum(dense(p, f'{name}/dense_mlp_0', layer_norm(p, f'{name}/LayerNorm_0', x)), 0))
def turned_back(r, z):  # R^-1 z of an offset in (y, x), R acts in (x, y)
    x, y = np.linalg.inv(r) @ np.array([z[1], z[0]])
    return np.array([y, x])

def gru(p, h, u):
    sigmoid, d = lambda v: 1/(1 + np.exp(-v)), lambda g, v: dense(p, f'GRU_0/GRUCell_0/{g}', v)
    r, z = sigmoid(d('ir', u) + d('hr', h)), sigmoid(d('iz', u) + d('hz', h))
    return (1 - z)*np.tanh(d('in', u) + r*d('hn', h)) + z*h

def frame_45(c):
    "Columns: the axes of a covariance in (x, y), limited to 45 degrees."
    a, b, d = c[0, 0], c[0, 1], c[1, 1]
    if abs(b) < 1e-6: v1, v2 = np.array([1., 0]), np.array([0, 1.])
    else:
        pm = math.sqrt(4*b*b + (a - d)**2 + 1e-16)
        v1, v2 = (np.array([((a + d + s*pm)/2 - d)/(b + 1e-16), 1]) for s in (1, -1))
        v1, v2 = v1/np.linalg.norm(v1), v2/np.linalg.norm(v2)
    if abs(v1[0]) < 0.707: v1, v2 = v2, v1
    return np.stack([v1 if v1[0] >= 0 else -v1, v2], -1)

def isa_oracle(p, variant, x, g, content, position, scale, rotation, iterations):
    "One sample: features (N, D_in), grid (N, 2), slots (K, ...)."
    (n_in, k_n), eye, delta = (len(x), len(content)), np.eye(2), 5. if 's' in variant else 1.
    s, pos, scl, rot = content.copy(), position.clip(-1, 1), scale.clip(0.001, 2), rotation.copy()
    x = np.stack([layer_norm(p, 'LayerNorm_0', v) for v in x])
    for turn in range(iterations + 1):
        logits, values = np.zeros((k_n, n_in)), np.zeros((k_n, n_in, D))
        for k in range(k_n):
            q = dense(p, 'general_dense_q_0', layer_norm(p, 'LayerNorm_1', s[k]))
            for n in range(n_in):
                rel = g[n] - pos[k]
                if 'r' in variant: rel = turned_back(rot[k], rel)
                if 's' in variant: rel = rel/delta/scl[k]
                where = dense(p, 'dense_gp_0', rel)
                logits[k, n] = q @ mlp(p, 'MLP_0', dense(p, 'general_dense_k_0', x[n]) + where)/math.sqrt(D)
                values[k, n] = mlp(p, 'MLP_0', dense(p, 'general_dense_v_0', x[n]) + where)
        attention = np.exp(logits - logits.max(0))
        attention /= attention.sum(0)
        for k in range(k_n):
            w = attention[k]/(attention[k].sum() + 1e-8)
            pos[k] = sum(w[n]*g[n] for n in range(n_in))
            offsets = [g[n] - pos[k] for n in range(n_in)]
            if 'r' in variant:
                rot[k] = frame_45(sum(w[n]*np.outer(offsets[n][::-1], offsets[n][::-1]) for n in range(n_in)))
                offsets = [turned_back(rot[k], z) for z in offsets]
            if 's' in variant: scl[k] = np.sqrt(sum((w[n] + 1e-8)*offsets[n]**2 for n in range(n_in))).clip(0.001, 2)
            if turn < iterations:
                s[k] = gru(p, s[k], sum(w[n]*values[k, n] for n in range(n_in)))
                s[k] = s[k] + mlp(p, 'MLP_1', s[k])
    return s, pos, scl, rot, attention

def isa_scene(kind, batch=2, slots=4, h=5, w=7):
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing='ij')
    g = np.stack([y, x], -1).reshape(1, h*w, 2).repeat(batch, 0)
    angle = noise(f'{kind} angle', batch, slots)*0.4
    v = dict(features=2*noise(f'{kind} x', batch, h*w, D_IN) + 0.5, grid=g, content=noise(f'{kind} s', batch, slots, D), position=0.5*noise(f'{kind} p', batch, slots, 2),
             scale=0.1 + 0.1*noise(f'{kind} scale', batch, slots, 2), rotation=np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], -2))
    if kind == 'outside': v |= dict(position=3*v['position'], scale=5*v['scale'])  # what published code clips on entry
    if kind == 'grids differ': g[1] = 0.7*g[1, :, ::-1] + 0.1
    if kind == 'all alike': v |= {n: v[n][:, :1].repeat(slots, 1) for n in ('content', 'position', 'scale', 'rotation')}  # uniform attention: a covariance along the axes
    if kind == 'loud': v |= dict(features=20*v['features'], content=5*v['content'])
    return v

@pytest.mark.parametrize('kind', ['plain', 'outside', 'grids differ', 'all alike', 'loud'])
@pytest.mark.parametrize('variant', ['t', 'ts', 'tsr'])
@pytest.mark.parametrize('iterations', [1, 3])
def test_isa_equals_its_equations(variant, kind, iterations):
    p, v = isa_params(), isa_scene(kind)
    module = load_isa_attention(p, variant, iterations)
    t = {k: torch.tensor(a, dtype=torch.float32) for k, a in v.items()}
    state, attention = module(t['features'], t['grid'], SlotState(*(t[n] for n in ('content', 'position', 'scale', 'rotation'))))
    expect = [np.stack(part) for part in zip(*(isa_oracle(p, variant, *(v[n][b] for n in ('features', 'grid', 'content', 'position', 'scale', 'rotation')), iterations) for b in range(2)))]
    got = dict(content=state.content, position=state.position, scale=state.scale, rotation=state.rotation, attention=attention)
    has = dict(scale='s' in variant, rotation='r' in variant)
    for (name, a), b in zip(got.items(), expect):
        assert (a is not None) == has.get(name, True)
        if a is None: continue
        worst = np.abs(a.detach().numpy() - b).max()
        print(f'{variant} {kind} {iterations} {name}: {worst:.1e}')
        assert worst < 1e-4, f'{name} differs by {worst:.1e}'
    if kind == 'all alike' and variant == 'tsr': assert np.allclose(expect[3], np.eye(2))
    elif variant == 'tsr': assert np.abs(expect[3] - np.eye(2)).max() > 0.1

def test_isa_names_what_does_not_fit():
    p = isa_params()
    message = lambda q, variant='ts': str(pytest.raises(ValueError, load_isa_attention, q, variant).value).splitlines()
    assert set(isa_layout()) == {line.split(': ')[1] for line in message({})[1:]}
    for name in p: assert message({n: a for n, a in p.items() if n != name})[1:] == [f'  missing: {name}']
    for name in ('GRU_0/GRUCell_0/hr/bias', 'dense_embed_0/kernel', 'general_dense_q_0/bias', 'MLP_2/dense_mlp_0/kernel', 'corrector/LayerNorm_0/scale'):
        assert message({**p, name: np.zeros((3, 2))})[1:] == [f'  unknown: {name} (3, 2)'], name
    for name, a in p.items():
        for wrong in (np.concatenate([a, a]), a[None], a[..., :-1]):
            lines = message({**p, name: wrong})
            assert lines[1:] and all(line.startswith('  shape of ') for line in lines[1:]), (name, lines)
            if name not in ('LayerNorm_0/scale', 'LayerNorm_1/scale', 'MLP_0/dense_mlp_0/bias', 'MLP_1/dense_mlp_0/bias'): assert len(lines) == 2 and name in lines[1]  # the others give the sizes
    assert "Did you mean 'tsr'" in message(p, 'tsrr')[0]
    with pytest.raises(ValueError, match='at least 1'): load_isa_attention(p, 't', 0)

def test_isa_refuses_what_it_cannot_see():
    module, t = load_isa_attention(isa_params(), 'tsr'), {k: torch.tensor(a, dtype=torch.float32) for k, a in isa_scene('plain').items()}
    state = SlotState(*(t[n] for n in ('content', 'position', 'scale', 'rotation')))
    for wrong, args in (('features must be', (t['features'][..., 1:], t['grid'], state)), ('grid must be', (t['features'], t['grid'][0], state)), ('grid must be', (t['features'], t['grid'][..., :1], state)),
                        ('slots must be', (t['features'], t['grid'], state.map(lambda v: v[:1]))), ('missing: rotation', (t['features'], t['grid'], state.replace(rotation=None)))):
        with pytest.raises(ValueError, match=wrong): module(*args)

def test_gradients_reach_every_isa_parameter():
    t = {k: torch.tensor(a, dtype=torch.float32) for k, a in isa_scene('plain').items()}
    for variant in ('t', 'ts', 'tsr'):
        module = load_isa_attention(isa_params(), variant)
        state, _ = module(t['features'], t['grid'], SlotState(*(t[n] for n in ('content', 'position', 'scale', 'rotation'))))
        state.content.square().sum().backward()
        assert all(q.grad is not None and q.grad.abs().max() > 0 for q in module.parameters())

if __name__ == '__main__':
    write_fixtures()
    print(FIXTURES, FIXTURES.stat().st_size, 'bytes')
