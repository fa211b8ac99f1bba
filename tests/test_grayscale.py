"Gray levels are PIL's, a gray view of a data set is another data set, and the experiment fills its four cells."
import json, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slotnb.data.clips import Clip, ClipList, Loader, Mapped, Windows, grayscale
from slotnb.models.savi import SAVi, preset
from slotnb.training.fit import FitConfig, fit
from slotnb.training.losses import Reconstruction

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/40_grayscale.ipynb'

def test_gray_levels_are_those_of_pil():
    "All 16.8 million colours."
    Image = pytest.importorskip('PIL.Image')
    level = torch.arange(256, dtype=torch.uint8)
    g, b = level[:, None].expand(256, 256), level[None].expand(256, 256)
    for red in range(256):
        colours = torch.stack([torch.full_like(g, red), g, b])
        assert np.array_equal(grayscale(Clip(colours[None]), channels=1).video[0, 0].numpy(), np.asarray(Image.fromarray(colours.permute(1, 2, 0).numpy()).convert('L'))), f'red {red}'

def material():
    g = torch.Generator().manual_seed(0)
    return ClipList([Clip(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=g), torch.zeros(4, 32, 32, dtype=torch.uint8)) for _ in range(6)], 'noise')

def test_a_gray_view_keeps_everything_but_the_pixels(tmp_path):
    colour = Windows(material(), 2)
    gray = Mapped(colour, grayscale, 'grayscale')
    a, b = Loader(colour, 4, seed=1).batch(3), Loader(gray, 4, seed=1).batch(3)
    assert torch.equal(a['index'], b['index']) and torch.equal(a['labels'], b['labels'])
    assert (b['video'] == b['video'][:, :, :1]).all() and torch.equal(b['video'], torch.stack([grayscale(Clip(v)).video for v in a['video']]))
    assert gray.fingerprint != colour.fingerprint and 'grayscale' in gray.settings['transform']

def test_a_checkpoint_of_colour_is_not_continued_on_gray(tmp_path):
    colour = Windows(material(), 2)
    config = FitConfig(steps=1, batch_size=4, checkpoint_every=1, tensorboard=False)
    train = lambda data, c: fit(SAVi(preset('smoke')), Loader(data, 4), Reconstruction(), c, tmp_path, 'cpu')
    train(colour, config)
    with pytest.raises(ValueError, match='fingerprint'): train(Mapped(colour, grayscale, 'grayscale'), config)

def smoke(folder, *more): # metrics, run.json, folder of the run
    pytest.importorskip('papermill')
    done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(NOTEBOOK), str(folder/'out.ipynb'), '-p', 'runs_dir', str(folder), '-p', 'device', 'cpu', *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    home, = (p.parent for p in folder.glob('40_grayscale/*/metrics.json'))
    return json.loads((home/'metrics.json').read_text()), json.loads((home/'run.json').read_text()), home

@pytest.mark.slow
def test_the_experiment_fills_four_cells(tmp_path):
    metrics, info, home = smoke(tmp_path)
    cells = [f'{a}_on_{b}' for a in ('colour', 'gray') for b in ('colour', 'gray')]
    for cell in cells:
        for key in ('fg_ari.decoder_{}.clip', 'ari.decoder_{}.frame', 'fg_miou.attention_{}.clip', 'mse_pm1.decoder_{}.frame', 'psnr.decoder_{}.frame', 'swap_rate.decoder_{}.clip', 'background_share.decoder_{}.clip'):
            assert isinstance(metrics[key.format(cell)], float), key.format(cell)
        assert (home/f'figures/{cell}.png').is_file()
    assert metrics['fg_ari.kmeans_on_colour.clip'] > metrics['fg_ari.kmeans_on_gray.clip'], 'colour gives objects away'
    assert info['data_fingerprint']['colour'] != info['data_fingerprint']['gray']
    assert (home/'figures/cells.png').is_file() and (home/'model_gray').is_dir() and len((home/'history.jsonl').read_text().splitlines()) == len((home/'compare/gray/history.jsonl').read_text().splitlines())

@pytest.mark.slow
def test_half_of_the_experiment(tmp_path):
    metrics, info, home = smoke(tmp_path, '-p', 'train', 'gray')
    assert 'fg_ari.decoder_gray_on_colour.clip' in metrics and not [k for k in metrics if 'decoder_colour' in k]
    assert (home/'model_gray').is_dir() and not (home/'model_colour').exists() and 'not run' in (tmp_path/'out.ipynb').read_text()
