"""What has to learn, learns: minutes each, so `make test-slow` only."""
import json

import pytest

papermill = pytest.importorskip('papermill')

from slotnb.core import project_root


def run(tmp_path, experiment='10_decomposition', **parameters):
    if experiment == '10_decomposition': parameters['compare'] = 'none'
    papermill.execute_notebook(project_root()/'nbs'/'experiments'/f'{experiment}.ipynb', tmp_path/'out.ipynb', dict(runs_dir=str(tmp_path), run='test', **parameters), progress_bar=False)
    folder = tmp_path/experiment/'test'
    return json.loads((folder/'metrics.json').read_text()), json.loads((folder/'run.json').read_text())


@pytest.mark.slow
def test_study_leaves_the_plateau(tmp_path):
    "Ninety seconds of training: slots have begun to hold objects, well above one slot for everything."
    metrics, info = run(tmp_path, preset='study')
    assert info['status'] == 'done' and metrics['fg_ari.decoder.frame.n'] >= 1000
    assert metrics['fg_ari.decoder.frame'] > metrics['fg_ari.one_slot.frame'] + 0.2
    assert metrics['mse_pixel.decoder.frame'] < 0.02


@pytest.mark.slow
def test_laptop_finds_the_objects(tmp_path):
    "One seed of the laptop preset: well above the trivial segmentations."
    metrics, _ = run(tmp_path, preset='laptop', seed=0)
    assert metrics['fg_ari.decoder.clip.n'] >= 200
    assert metrics['fg_ari.decoder.clip'] > 0.8
    assert metrics['fg_ari.decoder.clip'] > max(metrics['fg_ari.grid.clip'], metrics['fg_ari.colour.clip']) + 0.2


@pytest.mark.slow
def test_parallel_slots_find_the_objects(tmp_path):
    "One seed of PSB on clips of four frames: at least five times below the mean image, objects found, and no divergence on the way."
    metrics, _ = run(tmp_path, '70_parallel_binding', preset='laptop', seed=0)
    assert metrics['gain.val.run'] >= 5 and metrics['divergences.val.run'] == 0
    assert metrics['fg_ari.decoder.clip'] > 0.75
