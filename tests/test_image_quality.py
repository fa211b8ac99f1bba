"Image scores against scikit-image, the LPIPS wrapper with and without its trunk, and input that is wrong."
import hashlib, math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from slotnb.evaluation import image_quality as iq

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(11, 40), st.integers(11, 40), st.sampled_from([1, 3]), st.sampled_from([0.0, 0.02, 0.5]))
def test_scores_are_scikit_images(seed, height, width, channels, noise):
    metrics = pytest.importorskip('skimage.metrics')
    g = torch.Generator().manual_seed(seed)
    true = torch.rand(1, 2, channels, height, width, generator=g)
    pred = true + noise*torch.randn(true.shape, generator=g)
    image = lambda v, t: np.moveaxis(v[0, t].clamp(0, 1).double().numpy(), 0, -1)
    options = dict(channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for t in range(2):
        assert float(iq.ssim(true, pred)[0, t]) == pytest.approx(metrics.structural_similarity(image(true, t), image(pred, t), **options), abs=1e-9)
        if noise: assert float(iq.psnr(true, pred)[0, t]) == pytest.approx(metrics.peak_signal_noise_ratio(image(true, t), image(pred, t), data_range=1), abs=1e-9)
        else: assert math.isinf(iq.psnr(true, pred)[0, t])

@pytest.mark.parametrize('true, pred, error, says', [
    (torch.zeros(1, 1, 3, 16, 16).byte(), torch.zeros(1, 1, 3, 16, 16), TypeError, 'to_float'),
    (torch.full((1, 1, 3, 16, 16), -1.0), torch.zeros(1, 1, 3, 16, 16), ValueError, r'\[0, 1\]'),
    (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), ValueError, r'\(B, T, C, H, W\)'),
    (torch.zeros(1, 1, 3, 16, 16), torch.zeros(1, 1, 3, 16, 17), ValueError, 'must be equal'),
    (torch.zeros(1, 1, 3, 16, 16), torch.full((1, 1, 3, 16, 16), math.nan), ValueError, 'predicted video .* NaN'),
])
def test_wrong_videos(true, pred, error, says):
    for score in (iq.mse_pixel, iq.mse_sum_hw, iq.mse_pm1, iq.psnr, iq.ssim, iq.lpips_distance):
        with pytest.raises(error, match=says): score(true, pred)

def test_small_frames():
    tiny = torch.rand(1, 1, 3, 8, 8)
    with pytest.raises(ValueError, match='11 x 11'): iq.ssim(tiny, tiny)
    with pytest.raises(ValueError, match='16 x 16'): iq.lpips_distance(tiny, tiny)
    assert 'ssim.decoder.frame' not in iq.score_images(tiny, tiny) and iq.score_images(tiny, tiny)['psnr.decoder.frame'] == math.inf

def test_lpips_without_trunk_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    video = torch.rand(1, 2, 3, 16, 16)
    with pytest.warns(UserWarning, match='not computed.*vgg16'): assert iq.lpips_distance(video, video) is None
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints'/iq.VGG_TRUNK).write_bytes(b'not a network')
    with pytest.warns(UserWarning, match='damaged'): entries = iq.score_images(video, video)
    assert math.isnan(entries['lpips.decoder.frame']) and entries['lpips.decoder.frame.n'] == 0 and entries['lpips.decoder.frame.nan'] == 2

def test_lpips_feeds_the_network_what_it_expects(monkeypatch):
    seen = []
    def net(x, y):
        seen.append((x, y))
        return (x - y).abs().mean((1, 2, 3), keepdim=True)
    monkeypatch.setattr(iq, 'lpips_missing', lambda: None)
    monkeypatch.setattr(iq, '_lpips_net', lambda device: net)
    true, pred = torch.zeros(2, 3, 3, 16, 16), torch.full((2, 3, 3, 16, 16), 7.0)
    distance = iq.lpips_distance(true, pred, chunk=4)
    assert distance.shape == (2, 3) and (distance == 2).all() # from -1 to 1: converted, and the prediction clamped
    assert [len(x) for x, _ in seen] == [4, 2] and all((x == -1).all() and (y == 1).all() and x.dtype == torch.float32 for x, y in seen)

@pytest.mark.slow
def test_lpips_package_loads_beside_this_torch():
    "Architecture and heads of the real package; the random trunk never leaves this test."
    pytest.importorskip('scipy')
    net = iq._import_lpips().LPIPS(net='vgg', pnet_rand=True, verbose=False).eval()
    assert iq._import_lpips() is not None and all((p >= 0).all() for p in net.lins.parameters())
    x = torch.rand(2, 3, 32, 32)*2 - 1
    with torch.no_grad(): assert net(x, x).flatten().tolist() == [0, 0] and (net(x, -x) > 0).all()
