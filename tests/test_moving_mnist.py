"Moving-MNIST: the published rule, seeds, disjoint digits, broken files, and the scores of moving digits."
import gzip, math, warnings

import numpy as np
import pytest
import torch

from slotnb.core import real_data_dir
from slotnb.data.clips import Loader, Windows, stack, to_float
from slotnb.data.files import BrokenFile
from slotnb.data import moving_mnist
from slotnb.data.moving_mnist import PRESETS, SPLITS, VISIBLE, MovingMNIST, MovingMNISTConfig, check, digit_files, digit_pool, flight, open_moving_mnist, paint, read_idx, write_idx
from slotnb.evaluation.digits import FLOOR, LOST, compare_digits, digit_errors, digit_metrics, find_digits, psnr_capped, score_digits
from slotnb.evaluation.image_quality import ssim

pytest.importorskip('sklearn')
real = real_data_dir()/'mnist'
needs_mnist = pytest.mark.skipif(not digit_files(real if real.is_dir() else None), reason=f'NOT TESTED on real digits: {real} is absent (set SLOTNB_REAL_DATA)')
SMALL = PRESETS['laptop'].but(source='sklearn')

def lines(n=200, seed=0):
    rng = np.random.default_rng(seed)
    start, angle = rng.random((n, 2)), rng.random(n)*2*np.pi
    return start, np.stack([np.sin(angle), np.cos(angle)], -1)

def told(start, direction, speed, frames):
    "The rule in words: step, clamp, turn on contact."
    x, v, places, bounces = start.copy(), direction.copy(), [], []
    for _ in range(frames):
        x = x + speed*v
        wall = (x <= 0) | (x >= 1)
        x, v = x.clip(0, 1), np.where(wall, -v, v)
        places.append(x); bounces.append(wall)
    return np.stack(places), np.stack(bounces)

# ---------------------------------------------------------------- motion

@pytest.mark.parametrize('speed', [0.003, 0.08, 0.15, 0.62, 1.0])
def test_flight_is_the_published_rule(speed):
    (x, hit), (y, wall) = flight(*lines(), speed, np.arange(1, 1301)), told(*lines(), speed, 1300)
    assert np.abs(x - y).max() < 1e-11 and np.array_equal(hit, wall)

def test_no_drift_in_a_long_clip():
    start, direction = lines(20)
    x, hit = flight(start, direction, 0.15, np.arange(1, 20_001))
    assert x.min() == 0 and x.max() == 1 and np.isin(x[hit], (0, 1)).all() # contact is exactly at a wall, after twenty thousand frames too
    assert not (hit[1:] & hit[:-1]).all(0).any()
    step = np.abs(np.diff(x, axis=0))
    fly = 0.15*np.abs(direction)
    free = ~hit[1:]
    assert np.abs(np.where(free, step - fly, 0)).max() < 1e-9 and (step <= fly + 1e-9).all() # full speed, but for the step that meets a wall
    turned = np.sign(np.diff(x, axis=0))
    assert (turned[1:][~hit[1:-1] & (step[1:] > 0)] == turned[:-1][~hit[1:-1] & (step[1:] > 0)]).all() # flips only at walls

def test_straight_along_an_axis_and_standing_still():
    x, hit = flight(np.array([[0.5, 0.5]]), np.array([[0., 1.]]), 0.15, np.arange(1, 50))
    assert np.allclose(x[:, 0, 0], 0.5) and not hit[:, 0, 0].any() and hit[:, 0, 1].any()
    x, hit = flight(np.array([[0.25, 0.5]]), np.array([[0.6, 0.8]]), 0., np.arange(1, 50))
    assert np.allclose(x, [0.25, 0.5]) and not hit.any()

def test_clips_follow_the_rule_in_pixels():
    data = MovingMNIST(MovingMNISTConfig(frames=400, source='sklearn'), n=5)
    for i in range(5):
        t = data[i].truth
        corner = t['corner']
        assert corner.min() >= 0 and corner.max() <= 36 and (corner[1:] - corner[:-1]).abs().max() <= 6 # 5.4 pixels, truncated
        at_wall = (corner == 0) | (corner == 36)
        assert at_wall[t['bounce']].all() # every bounce is at a wall
        assert torch.allclose(t['position'], (2*corner + 28)/64 - 1)
    bounces = sum(data[i].truth['bounce'].sum().item() for i in range(5))/5/2/4
    assert 12 < bounces < 25 # 18.4 per digit and 100 frames

# ---------------------------------------------------------------- pictures and truth

def test_frames_are_the_maximum_and_truth_says_so():
    data = MovingMNIST(SMALL.but(digits=3, frames=30), n=3)
    for i in range(3):
        clip, track = data[i], data.tracks([i])
        layers = np.zeros((30, 3, 32, 32), np.uint8)
        for t in range(30):
            for n in range(3):
                y, x = track['corner'][0, t, n].tolist()
                layers[t, n, y:y + 14, x:x + 14] = track['patches'][0, n]
        assert np.array_equal(clip.video[:, 0], layers.max(1)) and np.array_equal(clip.truth['masks'], layers >= VISIBLE)
        owner = np.where(layers.max(1) >= VISIBLE, layers.argmax(1) + 1, 0)
        assert np.array_equal(clip.labels, owner)
        pixels = np.stack([(owner == n).sum((1, 2)) for n in (1, 2, 3)], 1)
        assert np.array_equal(clip.truth['pixels'], pixels) and np.array_equal(clip.truth['present'], pixels > 0)
        assert np.allclose(clip.truth['visibility'], pixels/(layers >= VISIBLE).sum((2, 3)), atol=1e-6) and clip.truth['visibility'].min() < 1
        assert len(clip.truth['digit']) == 30 and (clip.truth['kind'] <= 9).all()

def test_two_ways_to_the_same_batch():
    data = MovingMNIST(SMALL, n=6)
    index, start = torch.tensor([4, 0, 5]), torch.tensor([3, 0, 9])
    batch, slow = data.gather(index, start, 5, 2), stack([data.window(i, s, 5, 2) for i, s in zip(index.tolist(), start.tolist())], index)
    assert all(torch.equal(batch[k], slow[k]) for k in ('video', 'labels', 'index'))
    assert torch.equal(data.window(4, 3, 5, 2).truth['corner'], data[4].truth['corner'][3:13:2])
    assert torch.equal(data.tracks(index, 3, 5, 2)['corner'][0], data[4].truth['corner'][3:13:2])

def test_rgb_and_sizes():
    grey, colour = MovingMNIST(SMALL, n=1)[0].video, MovingMNIST(SMALL.but(channels=3), n=1)[0].video
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))
    assert MovingMNIST(SMALL.but(size=40, digit=40), n=1)[0].truth['corner'].max() == 0 # no room to move

# ---------------------------------------------------------------- seeds and splits

def test_seeds():
    data = MovingMNIST(SMALL, n=5)
    assert torch.equal(data[2].video, MovingMNIST(SMALL, n=50)[2].video) and data.fingerprint != MovingMNIST(SMALL, n=50).fingerprint
    assert torch.equal(data[2].video, MovingMNIST(SMALL.but(frames=70), n=5)[2].video[:20])
    assert not torch.equal(data[2].video, data[3].video) and not torch.equal(data[2].video, MovingMNIST(SMALL, n=5, seed=1)[2].video)
    assert len({MovingMNIST(SMALL, s, n=5, seed=k).fingerprint for s in SPLITS for k in (0, 1)}) == 6
    before = np.random.get_state()[1].copy()
    data[0]
    assert np.array_equal(before, np.random.get_state()[1])

def test_threads_change_nothing():
    one, two = (Loader(Windows(MovingMNIST(SMALL, n=9), 5), 4, workers=w) for w in (0, 3))
    assert all(torch.equal(a['video'], b['video']) for a, b in zip(one.stream(0, 12), two.stream(0, 12)))

def disjoint(pools):
    known = [{d.tobytes() for d in pools[s]} for s in SPLITS]
    return not (known[0] & known[1] or known[0] & known[2] or known[1] & known[2])

def test_splits_have_other_digits_of_scikit_learn():
    pools = {s: digit_pool(s, 8, 'sklearn')[0] for s in SPLITS}
    assert sum(map(len, pools.values())) == 1797 and [len(pools[s]) for s in SPLITS] == [1260, 179, 358]
    kinds = {s: digit_pool(s, 8, 'sklearn')[1] for s in SPLITS}
    assert all(set(k) == set(range(10)) for k in kinds.values())

@needs_mnist
def test_splits_have_other_digits_of_the_real_test_set():
    pools = {s: digit_pool(s, 28, 'mnist', real)[0] for s in SPLITS}
    assert disjoint(pools) and [len(pools[s]) for s in SPLITS] == [7000, 1000, 2000]
    assert check(real).ok and any('checksum as published' in k for k in check(real).found)
    a, b = (MovingMNIST(MovingMNISTConfig(frames=5, source='mnist'), s, n=200, root=real) for s in ('train', 'test'))
    used = [{p.numpy().tobytes() for p in d.tracks(range(200))['patches'].flatten(0, 1)} for d in (a, b)]
    assert not used[0] & used[1] and len(used[0]) > 300

@pytest.fixture
def both(tmp_path):
    "MNIST's two files, with digits that tell where they come from."
    rng = np.random.default_rng(0)
    images = {k: rng.integers(0, 256, (n, 28, 28), np.uint8) for k, n in dict(train=60, t10k=20).items()}
    for k, v in images.items(): write_idx(tmp_path/f'{k}-images-idx3-ubyte', v)
    (tmp_path/'train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 60, *[i % 10 for i in range(60)]])))
    return tmp_path, images

def test_both_files(both):
    folder, images = both
    pools = {s: digit_pool(s, 28, root=folder) for s in SPLITS}
    assert np.array_equal(pools['train'][0], images['train'][:50]) and np.array_equal(pools['val'][0], images['train'][50:]) and np.array_equal(pools['test'][0], images['t10k'])
    assert pools['val'][1].tolist() == [i % 10 for i in range(50, 60)] and (pools['test'][1] == 255).all() # unknown
    (folder/'t10k-images-idx3-ubyte').rename(folder/'away')
    assert np.array_equal(digit_pool('test', 28, root=folder)[0], images['train'][np.arange(60) % 10 >= 8]) and any('t10k' in m for m in check(folder).missing)

# ---------------------------------------------------------------- faults

def test_no_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path)); monkeypatch.setenv('SLOTNB_REAL_DATA', str(tmp_path))
    with pytest.warns(UserWarning, match='no MNIST files found.*scikit-learn'): data = MovingMNIST(SMALL.but(source='auto'), n=1)
    assert data.settings['source'] == 'sklearn' and 'sklearn' in repr(data)
    with pytest.raises(FileNotFoundError, match='MNIST is not at .*To get it: t10k-images'): MovingMNIST(SMALL.but(source='mnist'), n=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        MovingMNIST(SMALL, n=1) # asked for: no warning
    assert len(check().missing) == 2 and check().ok # scikit-learn's are there
    with pytest.raises(FileNotFoundError, match='is not a folder'): digit_files(tmp_path/'nowhere')

@pytest.mark.parametrize('damage, why', [(lambda d: d[:-1], 'its header promises'), (lambda d: d[:100], 'its header promises'), (lambda d: b'\x89PNG' + d[4:], 'not an idx file'),
                                         (lambda d: b'', 'not an idx file'), (lambda d: gzip.compress(d)[:-20], 'cut off or damaged'), (lambda d: d + b'x', 'its header promises')])
def test_broken_files_are_named(both, damage, why):
    folder, _ = both
    path = folder/'t10k-images-idx3-ubyte'
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BrokenFile, match=why): read_idx(path)
    with pytest.raises(BrokenFile, match='t10k-images'): MovingMNIST(SMALL.but(source='auto'), 'test', n=1, root=folder)
    looked = check(folder)
    assert not looked.ok and list(looked.broken) == [path.name] and why.split()[-1] in repr(looked)
    moving_mnist._read.cache_clear()

def test_labels_that_do_not_fit(both):
    folder, _ = both
    write_idx(folder/'t10k-labels-idx1-ubyte', np.zeros(7, np.uint8))
    with pytest.raises(BrokenFile, match='labels for the 20 images'): digit_pool('test', root=folder)

@pytest.mark.parametrize('wrong, why', [(dict(size=8), 'size must be at least 16'), (dict(digits=0), 'digits must be at least 1'), (dict(frames=0), 'frames must be at least 1'), (dict(speed=1.5), 'speed must be from 0 to 1'),
    (dict(speed=float('nan')), 'finite number'), (dict(digit=65), 'digit must be 0 or from 4'), (dict(channels=2), 'channels'), (dict(source='mnst'), "Did you mean 'mnist'"), (dict(digits=300), 'at most 254'), (dict(sped=1), "Did you mean 'speed'")])
def test_bad_settings(wrong, why):
    with pytest.raises(ValueError, match=why): open_moving_mnist(**wrong)

def test_bad_requests():
    data = MovingMNIST(SMALL, n=3)
    with pytest.raises(IndexError, match='clip 3 does not exist'): data[3]
    with pytest.raises(ValueError, match='frames 15 to 24 of clip 0 do not exist'): data.window(0, 15, 10)
    with pytest.raises(ValueError, match='do not exist'): data.window(0, 0, 0)
    with pytest.raises(ValueError, match='positive integer'): MovingMNIST(SMALL, n=0)
    with pytest.raises(ValueError, match="unknown split 'tset'.*Did you mean 'test'"): MovingMNIST(SMALL, 'tset')
    with pytest.raises(ValueError, match='unknown preset'): open_moving_mnist(preset='big')
    with pytest.raises(ValueError, match='needs'): open_moving_mnist(n=2, length=30, preset='laptop', source='sklearn')

# ---------------------------------------------------------------- scores

def places(n_clips=6, frames=8, digits=2, source='sklearn', seed=0):
    data = MovingMNIST(MovingMNISTConfig(frames=frames, digits=digits, source=source), 'test', n=n_clips, seed=seed)
    track = data.tracks(range(n_clips))
    return track, torch.stack([to_float(data[i].video) for i in range(n_clips)])

def painted(patches, corners):
    return torch.from_numpy(np.stack([paint(p.numpy(), c.numpy(), 64).max(1) for p, c in zip(patches, corners)]))[:, :, None].float()/255

@pytest.mark.parametrize('digits', [1, 2, 3])
def test_digits_are_found_wherever_they_are(digits):
    track, _ = places(digits=digits)
    g = torch.Generator().manual_seed(digits)
    corners = torch.randint(0, 37, track['corner'].shape, generator=g)
    found, score = find_digits(painted(track['patches'], corners), track['patches'])
    off = (found - corners).double().norm(dim=-1)
    assert off.mean() < {1: 1e-9, 2: 0.3, 3: 1.2}[digits] and off.median() == 0 and (score > LOST).double().mean() > 0.97

@pytest.mark.parametrize('shift', [(0, 1), (2, -1), (-4, 3)])
def test_the_error_is_the_distance(shift):
    track, _ = places(digits=1)
    corners = (track['corner'] + torch.tensor(shift)).clamp(0, 36)
    errors = score_digits(painted(track['patches'], track['corner']), painted(track['patches'], corners), track['patches'], track['corner'], lpips=False)
    assert torch.allclose(errors['digit_px'], (corners - track['corner']).double().norm(dim=-1).mean(-1)) and not errors['digit_lost'].any()

def test_nothing_is_gained_by_painting_nothing():
    track, video = places()
    for empty in (torch.zeros_like(video), torch.full_like(video, 0.3), torch.ones_like(video)):
        errors = digit_errors(*find_digits(empty, track['patches']), track['corner'], 36)
        assert (errors['digit_lost'] == 1).all() and torch.allclose(errors['digit_px'], (track['corner'].double() - 18).norm(dim=-1).mean(-1))

def test_swapped_digits():
    true = torch.tensor([[0., 0.], [20., 20.]]).expand(1, 1, 2, 2)
    errors = digit_errors(true.flip(2).long(), torch.ones(1, 1, 2), true, 36)
    assert errors['digit_px'].item() == pytest.approx(20*2**0.5) and errors['digit_px_any'].item() == 0

def test_perfect_frames_have_finite_scores():
    track, video = places()
    metrics = digit_metrics(compare_digits(video, {'true': video[:, 3:]}, 3, track['patches'], track['corner'], video.mean((0, 1)), lpips=False))
    assert all(math.isfinite(v) for v in metrics.values()) and metrics['psnr_capped.true.frame'] == pytest.approx(-10*math.log10(FLOOR)) == pytest.approx(58.92, abs=0.01)
    assert metrics['ssim.true.frame'] == pytest.approx(1) and metrics['mse_pixel.true.frame'] == 0
    assert {k.split('.')[1] for k in metrics} == {'true', 'black', 'copy_last', 'mean'}

@pytest.mark.parametrize('wrong, why', [(lambda v, p: (v.half()[:, :, 0], p), 'frames must be square floats'), (lambda v, p: ((v*255).byte(), p), 'frames must be square floats'), (lambda v, p: (v[..., :40], p), 'frames must be square'),
    (lambda v, p: (v, p[:2]), 'patches must be'), (lambda v, p: (v[..., :20, :20], p), 'patches must be'), (lambda v, p: (v*float('nan'), p), 'NaN or infinite')])
def test_bad_frames(wrong, why):
    track, video = places(n_clips=3)
    with pytest.raises(ValueError, match=why): find_digits(*wrong(video, track['patches']))

def test_predictions_of_another_length():
    track, video = places()
    with pytest.raises(ValueError, match=r'mine \(6, 4, 1, 64, 64\): predictions must be \(6, 5, 1, 64, 64\)'): compare_digits(video, {'mine': video[:, :4]}, 3, track['patches'], track['corner'])

@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_black_video_scores_as_published(split):
    data = MovingMNIST(MovingMNISTConfig(frames=500, source='mnist'), split, n=500, root=real)
    db, similar = [], []
    for i in range(0, 500, 50):
        video = to_float(data.gather(torch.arange(i, i + 50), torch.full((50,), 100), 10, 40)['video'])
        db.append(psnr_capped(video, torch.zeros_like(video)))
        similar.append(ssim(video[:, ::5], torch.zeros_like(video[:, ::5])))
    assert abs(torch.cat(db).mean() - 13.84) < 0.25 and abs(torch.cat(similar).mean() - 0.72) < 0.02
