"Experiment 60: every mistake has a named error before anything is trained, and a smoke run leaves what it should."
import contextlib, json, subprocess, sys
from pathlib import Path

import nbformat
import pytest
import torch

from slotnb.batch.sweep import plan, read_sweep
from slotnb.data.clips import Clip, ClipList, Windows
from slotnb.evaluation.forecast import forecast
from slotnb.layers.slot_attention import SlotState
from slotnb.models.savi import SAVi, preset as savi_preset
from slotnb.models.slot_store import WrongEncoderError, extract_slots
from slotnb.training.dynamics import DYNAMICS_RECIPES, PoseChannels, Settled, count, dynamics_recipe, find_encoder, future_material, make_rollouter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/60_dynamics.ipynb'
SMOKE = DYNAMICS_RECIPES['smoke']

# ---------------------------------------------------------------- rollouters

@pytest.mark.parametrize('model', ['isa_t', 'isa_ts', 'isa_tsr'])
def test_rollouters_get_the_same_size(model):
    for preset in ('laptop', 'obj3d', 'clevrer'):
        encoder = SAVi(savi_preset(preset, model))
        sizes = {d: count(make_rollouter(d, DYNAMICS_RECIPES[preset], encoder)) for d in ('slotformer', 'channels', 'pose', 'causal')}
        assert 0.99*sizes['slotformer'] < min(sizes.values()) and max(sizes.values()) == sizes['slotformer'], sizes

def test_published_sizes():
    for preset, n in (('obj3d', 826_112), ('clevrer', 3_224_960)): assert count(make_rollouter('slotformer', DYNAMICS_RECIPES[preset], SAVi(savi_preset(preset)))) == n

def test_the_size_does_not_depend_on_what_was_tried():
    "Looking for a size draws nothing: the weights are those of the seed."
    encoder = SAVi(savi_preset('laptop', 'isa_ts'))
    torch.manual_seed(0)
    a = make_rollouter('pose', DYNAMICS_RECIPES['laptop'], encoder)
    torch.manual_seed(0)
    b = type(a)(a.config)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

def test_channels_carry_every_pose(tmp_path):
    "The inner SlotFormer sees each number of the pose: change one, and what it predicts changes."
    m = make_rollouter('channels', SMOKE, SAVi(savi_preset('smoke', 'isa_ts'))).eval()
    g = torch.Generator().manual_seed(0)
    slots = SlotState(torch.randn(1, 3, 5, 32, generator=g), torch.rand(1, 3, 5, 2, generator=g) - 0.5, torch.rand(1, 3, 5, 2, generator=g) + 0.1)
    with torch.no_grad():
        was = m.rollout(slots, 2)
        for other in (slots.replace(position=slots.position + 0.1), slots.replace(scale=2*slots.scale)): assert not torch.allclose(m.rollout(other, 2).content, was.content)
    again = PoseChannels.from_pretrained(m.save_pretrained(tmp_path/'m'))
    assert torch.equal(again.rollout(slots, 2).position, was.position) and (was.scale > 0).all()

def test_poses_are_asked_of_slots_that_have_some():
    for d in ('pose', 'channels'):
        with pytest.raises(ValueError, match=f"dynamics '{d}' predicts the pose of slots, and those of this encoder have none"): make_rollouter(d, SMOKE, SAVi(savi_preset('smoke')))

# ---------------------------------------------------------------- slots and clips

@pytest.fixture
def stored(tmp_path):
    encoder = SAVi(savi_preset('smoke'))
    clips = ClipList([Clip(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.ones(8, 32, 32, dtype=torch.uint8)) for _ in range(3)], 'noise')
    return encoder, extract_slots(encoder, clips, tmp_path, device='cpu')

def test_slots_of_another_encoder(stored):
    encoder, store = stored
    rollouter = make_rollouter('slotformer', SMOKE, encoder)
    other = SAVi(savi_preset('smoke'))
    with pytest.raises(WrongEncoderError, match=f'are of encoder {store.encoder}'): forecast(other, rollouter, Windows(store, 8), 3)

def test_history_and_horizon(stored):
    encoder, store = stored
    rollouter = make_rollouter('slotformer', SMOKE, encoder)
    with pytest.raises(ValueError, match='at least 3 frames .history., got 2'): forecast(encoder, rollouter, Windows(store, 8), 2)
    with pytest.raises(ValueError, match='leave a horizon of 0'): forecast(encoder, rollouter, Windows(store, 8), 8)
    with pytest.raises(ValueError, match='windows over a SlotStore'): forecast(encoder, rollouter, Windows(store.dataset, 8), 3)

def test_windows_with_late_comers_only():
    labels = torch.zeros(10, 8, 8, dtype=torch.uint8)
    labels[6:, 0] = 1
    clips = ClipList([Clip(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), labels)], 'late')
    with pytest.raises(ValueError, match='all 1 windows of 10 frames .* enter after the first 4'): Settled(clips, clips, 10, observed=4)
    assert len(Settled(clips, clips, 6, observed=4)) == 1 # frames 0 to 5: nobody is there yet
    assert Settled(clips, clips, 6, observed=4).fingerprint != Windows(clips, 6).fingerprint

def test_clips_too_short_for_the_horizon(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path))
    r = dynamics_recipe('smoke', horizon=40)
    clips = future_material(r.but(encoder=r.encoder.but(clips=2, eval_clips=1)), (32, 32))
    with pytest.raises(ValueError, match='has 24 frames, but a window of 43'): clips.windows(r, clips.train, clips.held_out)

# ---------------------------------------------------------------- the notebook

def cells(upto, **parameters): # the namespace
    "The notebook's code cells in this process, to the first one that holds `upto`."
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in (c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == 'code'):
        exec(compile(cell.source.replace('import Image, display', 'import Image'), f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []): space.update(parameters, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in parameters.items())])
        if upto in cell.source: return space
    raise AssertionError(f'no cell holds {upto!r}')

@pytest.mark.parametrize('parameters,error,words', [
    (dict(dynamics='pose'), ValueError, 'have none: use an encoder with invariant slots'),
    (dict(dynamics='poze'), ValueError, "unknown dynamics 'poze'.*Did you mean 'pose'"),
    (dict(model='isa_q'), ValueError, "unknown model 'isa_q'"),
    (dict(preset='laptops'), ValueError, "Did you mean 'laptop'"),
    (dict(horizon=-3), ValueError, 'horizon must be at least 1, got -3'),
    (dict(burn_in=-1), ValueError, 'observed must be at least 1, got -1'),
    (dict(encoder='no/such'), FileNotFoundError, 'no folder no/such to take an encoder from'),
    (dict(encoder='tiny', model='isa_t'), ValueError, "is sa, and model 'isa_t' was asked for"),
    (dict(arm='bothh'), ValueError, "unknown arm 'bothh'"),
])
def test_refused_before_anything_is_made(parameters, error, words, tmp_path):
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    with pytest.raises(error, match=words): cells('start_run(', runs_dir=str(tmp_path/'runs'), device='cpu', **parameters)
    assert not (tmp_path/'runs').exists()

def test_the_sweep_is_a_plan(tmp_path):
    runs = plan(read_sweep('dynamics'), tmp_path, 'cpu')
    assert len(runs) == 18 and {(r.parameters['model'], r.parameters['dynamics']) for r in runs} >= {('sa', 'slotformer'), ('isa_ts', 'slotformer'), ('isa_ts', 'pose')}

def smoke(folder, **parameters): # metrics, run.json, folder of the run
    pytest.importorskip('papermill')
    given = dict(runs_dir=str(folder), device='cpu') | parameters
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(NOTEBOOK), str(folder/'out.ipynb')]
    done = subprocess.run(command + [x for k, v in given.items() for x in ('-p', k, str(v))], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    home = folder/'60_dynamics'/parameters['run']
    return json.loads((home/'metrics.json').read_text()), json.loads((home/'run.json').read_text()), home

@pytest.mark.slow
def test_a_smoke_run_and_a_second_rollouter_on_its_slots(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path/'data'))
    first, info, home = smoke(tmp_path, run='a', model='isa_ts', dynamics='slotformer')
    for key in ('mse_sum_hw.rollout.frame', 'psnr.copy_last.frame', 'fg_ari.decoder.frame', 'mse_pixel.mean_image.frame', 'position_px.constant_velocity_last.frame', 'position_px_collision.rollout.frame',
                'mse_pixel.rollout.at1', 'decoding_share.rollout.frame', 'mse_part.dynamics.frame'): assert isinstance(first[key], float), key
    for name in ('curves.png', 'horizon.png', 'best.png', 'median.png', 'worst.png', 'paths_median.png', 'futures.gif'): assert (home/'figures'/name).is_file(), name
    curves = json.loads((home/'curves.json').read_text())
    assert len(curves['psnr.rollout.step']) == 6 and abs(sum(curves['mse_pixel.rollout.step'])/6 - first['mse_pixel.rollout.frame']) < 1e-9
    second, more, other = smoke(tmp_path, run='b', model='isa_ts', dynamics='pose', encoder='60_dynamics/a')
    assert info['encoder_fingerprint'] == more['encoder_fingerprint'] and not (other/'encoder').exists()
    assert all(second[k] == v for k, v in first.items() if '.decoder.' in k or '.copy_last.' in k), 'the same slots of the same clips'
    assert find_encoder('60_dynamics', 'isa_ts', 0, root=tmp_path) == home/'encoder'/'model', 'the run that trained it, not the one that borrowed it'
    again, _, _ = smoke(tmp_path, run='c', model='isa_ts', dynamics='slotformer')
    assert again['mse_pixel.rollout.frame'] == first['mse_pixel.rollout.frame'], 'same seed, same numbers'
