"Futures of pixels without slots in experiment 60, beside those of slots."
import json, subprocess, sys
from pathlib import Path

import pytest
import torch

from slotnb.batch.sweep import plan, read_sweep
from slotnb.data.clips import Clip, ClipList, Windows, to_float
from slotnb.evaluation.forecast import Forecasts, forecast_frames
from slotnb.evaluation.futures import score_future
from slotnb.models.convlstm import ConvLSTM
from slotnb.models.convs5 import ConvS5
from slotnb.models.savi import SAVi, preset as savi_preset
from slotnb.training.dynamics import DYNAMICS_RECIPES, PIXEL_DYNAMICS, count, make_predictor, make_rollouter, predictor_fit

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/60_dynamics.ipynb'
CLIPS = ClipList([Clip(torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))) for i in range(5)], 'noise')

def test_as_many_parameters_as_the_rollouter():
    for preset in ('study', 'laptop'):
        rival = count(make_rollouter('slotformer', DYNAMICS_RECIPES[preset], SAVi(savi_preset('laptop'))))
        for name in PIXEL_DYNAMICS: assert 0.95*rival < count(make_predictor(name, DYNAMICS_RECIPES[preset])) <= rival
    assert isinstance(make_predictor('convs5', DYNAMICS_RECIPES['smoke']), ConvS5) and isinstance(make_predictor('convlstm', DYNAMICS_RECIPES['smoke']), ConvLSTM)
    with pytest.raises(ValueError, match="unknown pixel dynamics 'convs4'.*Did you mean 'convs5'"): make_predictor('convs4', DYNAMICS_RECIPES['smoke'])
    f = predictor_fit(DYNAMICS_RECIPES['study'])
    assert (f.steps, f.batch_size, f.lr) == (DYNAMICS_RECIPES['study'].fit.steps, 8, 1e-3)

@pytest.mark.parametrize('name', PIXEL_DYNAMICS)
def test_scores_are_those_of_the_frames_it_makes(name):
    torch.manual_seed(0)
    model = make_predictor(name, DYNAMICS_RECIPES['smoke']).eval()
    out = forecast_frames(model, Windows(CLIPS, 7, 1, 10), 3, batch=2, lpips=False)
    video = to_float(torch.stack([c.video[:7] for c in CLIPS.clips]))
    made = model.generate(video[:, :3], 4)
    for k, v in score_future(video[:, 3:], made, lpips=False).items(): assert torch.allclose(out.scores['rollout'][k], v, atol=1e-5), k
    assert list(out.scores) == ['rollout', 'copy_last'] and not (out.positions or out.parts or out.paths) and (out.predicted.float()/255 - made).abs().max() < 0.01
    assert not any(k.startswith(('fg_ari', 'position', 'decoding', 'mse_part')) for k in out.metrics()) and len(out.curves()['psnr.rollout.step']) == 4

def test_windows_without_a_future():
    model = make_predictor('convs5', DYNAMICS_RECIPES['smoke'])
    for observed in (0, 7):
        with pytest.raises(ValueError, match='both must be at least 1'): forecast_frames(model, Windows(CLIPS, 7), observed)
    assert Forecasts(1, 1).metrics() == {} and 'do not apply' in Forecasts(1, 1).sentence

def test_the_sweep_is_a_plan(tmp_path):
    runs = plan(read_sweep('dynamics_memory'), tmp_path, 'cpu')
    assert len(runs) == 15 and {r.parameters['dynamics'] for r in runs} == {'slotformer', 'slot_s5', 'slot_s5_channels', 'convs5', 'convlstm'}

@pytest.mark.slow
def test_smoke_runs_meet_in_one_table(tmp_path, monkeypatch):
    "Pixels and slots are scored on the same clips: what depends on the clips alone is equal."
    for package in ('papermill', 'mujoco'): pytest.importorskip(package)
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path/'data'))
    metrics = {}
    for name in ('convs5', 'slot_s5'):
        given = dict(runs_dir=str(tmp_path), device='cpu', run=name, dynamics=name)
        done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(NOTEBOOK), str(tmp_path/'out.ipynb')] + [x for k, v in given.items() for x in ('-p', k, str(v))], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        home = tmp_path/'60_dynamics'/name
        metrics[name], info = json.loads((home/'metrics.json').read_text()), json.loads((home/'run.json').read_text())
        for picture in ('curves.png', 'horizon.png', 'best.png', 'median.png', 'worst.png', 'futures.gif'): assert (home/'figures'/picture).is_file(), picture
        assert (home/'encoder').exists() == ('encoder_fingerprint' in info) == (name == 'slot_s5')
    pixels, slots = metrics['convs5'], metrics['slot_s5']
    for key in ('mse_pixel.copy_last.frame', 'psnr.mean_image.frame', 'ssim.copy_last.frame'): assert pixels[key] == pytest.approx(slots[key], rel=1e-9), key
    assert isinstance(pixels['mse_pixel.rollout.at1'], float) and pixels['seconds.encoder'] == 0 and 'position_px.rollout.frame' in slots and not any('position' in k for k in pixels)
