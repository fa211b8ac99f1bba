"Bad input to the data floor: every fault is named, nothing is lost, nothing is replaced silently."
import errno, os, re, shutil, subprocess, time, warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from slotnb.core import real_data_dir
from slotnb.data import shards
from slotnb.data.clips import Clip, ClipList, Loader, Mapped, Windows
from slotnb.data.files import at_rate, read_npz, video_frames
from slotnb.data.folder import BrokenFile, Folder, FolderConfig, read_video
from slotnb.data.open import open_data
from slotnb.data.shards import ShardedClips, check_shards, repair_shards, write_shards

av = pytest.importorskip('av')
Image = pytest.importorskip('PIL.Image')
real = real_data_dir()
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'the folder of real inputs is not there: {real}')

# ---------------------------------------------------------------- files to break

def pixels(n=24, h=32, w=48, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (h//8, w//8, 3)).repeat(8, 0).repeat(8, 1)
    return [np.roll(base, 2*t, 1).astype(np.uint8) for t in range(n)]

def write_video(path, frames, fps=12, codec='mpeg4', gop=None, options=None, audio=False):
    with av.open(str(path), 'w', options=options or {}) as box:
        s = box.add_stream('gif' if path.suffix == '.gif' else codec, rate=fps)
        s.height, s.width = frames[0].shape[:2]
        s.pix_fmt = 'rgb8' if path.suffix == '.gif' else 'yuv420p'
        if gop: s.gop_size = gop
        for f in frames:
            for p in s.encode(av.VideoFrame.from_ndarray(f, format='rgb24')): box.mux(p)
        for p in s.encode(): box.mux(p)
    return path

def write_audio(path):
    with av.open(str(path), 'w') as box:
        s = box.add_stream('aac', rate=16000)
        s.layout = 'mono'
        for i in range(20):
            f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
            f.sample_rate, f.pts = 16000, 1024*i
            for p in s.encode(f): box.mux(p)
        for p in s.encode(): box.mux(p)
    return path

@pytest.fixture
def noisy(tmp_path):
    "An mp4 whose index comes first, so that it can be cut off and still be opened."
    rng = np.random.default_rng(0)
    return write_video(tmp_path/'noisy.mp4', [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(40)], options={'movflags': 'faststart'})

# ---------------------------------------------------------------- videos

def test_every_cut_is_noticed(noisy, tmp_path):
    "Wherever the file ends too early, either it does not open or the frame is named, and it is the right one."
    whole = [f for _, f in video_frames(noisy)]
    data = noisy.read_bytes()
    for share in np.linspace(.02, .97, 12):
        part = tmp_path/'part.mp4'
        part.write_bytes(data[:int(len(data)*share)])
        got = []
        with pytest.raises(BrokenFile) as e:
            for _, f in video_frames(part): got.append(f)
        assert str(part) in str(e.value) and all(torch.equal(a, b) for a, b in zip(got, whole))
        if got: assert f'broken at frame {len(got)} of 40' in str(e.value)

def test_cut_between_packets(noisy, tmp_path):
    "No packet is damaged, the video merely ends before its header says."
    with av.open(str(noisy)) as box: at = [p.pos for p in box.demux(video=0) if p.size][30]
    (tmp_path/'p.mp4').write_bytes(noisy.read_bytes()[:at])
    with pytest.raises(BrokenFile, match=r'broken at frame 30 of 40'): list(video_frames(tmp_path/'p.mp4'))

@pytest.mark.parametrize('suffix', ['.avi', '.mkv', '.mov', '.gif'])
def test_cut_formats(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = write_video(tmp_path/f'v{suffix}', [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(30)],
                       options={'movflags': 'faststart'} if suffix == '.mov' else None)
    assert len(list(video_frames(path))) == 30
    path.write_bytes(path.read_bytes()[:path.stat().st_size*6//10])
    with pytest.raises(BrokenFile, match='broken at frame'): list(video_frames(path))
    c = read_video(path, FolderConfig(on_error='salvage'))
    assert 5 < len(c) < 25 and 'salvaged' in c.meta['note']

def test_flipped_bytes(noisy, tmp_path):
    data = bytearray(noisy.read_bytes())
    middle = len(data)//2
    data[middle:middle + 3000] = bytes(b ^ 0x5a for b in data[middle:middle + 3000])
    (tmp_path/'flipped.mp4').write_bytes(data)
    with pytest.raises(BrokenFile, match=r'flipped.mp4: broken at frame \d+ of 40'): list(video_frames(tmp_path/'flipped.mp4'))

def test_no_video(tmp_path):
    with pytest.raises(BrokenFile, match='no video stream, only audio'): read_video(write_audio(tmp_path/'a.mp4'))
    (tmp_path/'zero.mp4').touch()
    with pytest.raises(BrokenFile, match='0 bytes'): read_video(tmp_path/'zero.mp4')
    (tmp_path/'text.mkv').write_text('hello')
    with pytest.raises(BrokenFile, match='text.mkv cannot be opened'): read_video(tmp_path/'text.mkv')
    with pytest.raises(FileNotFoundError, match='gone.mp4'): read_video(tmp_path/'gone.mp4')
    with pytest.raises(ValueError, match="unknown video format .*'.png'"): read_video((tmp_path/'a.mp4').rename(tmp_path/'a.png'))

def test_long_video_is_bounded(tmp_path):
    path = write_video(tmp_path/'long.mp4', pixels(300))
    t = time.perf_counter()
    c = read_video(path, FolderConfig(max_frames=10, size=8))
    assert c.video.shape == (10, 3, 8, 8) and 'max_frames=10' in c.meta['note'] and time.perf_counter() - t < 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'max_frames' in Folder(path, FolderConfig(max_frames=10)).settings['notes'][0]
    with pytest.raises(ValueError, match='max_gb'): Folder(path, FolderConfig(max_gb=1e-4))

def test_frame_rate(tmp_path):
    path = write_video(tmp_path/'v.mp4', pixels(24), fps=12)
    every, third = read_video(path), read_video(path, FolderConfig(fps=4))
    assert torch.equal(third.video, every.video[::3]) and (every.meta['fps'], third.meta['fps']) == (12, 4)
    with pytest.raises(ValueError, match='fps 24 is above the 12'): read_video(path, FolderConfig(fps=24))

@given(st.lists(st.floats(.01, .5), min_size=1, max_size=30), st.floats(.5, 20))
@settings(max_examples=60, deadline=None)
def test_rate_shows_what_was_on_screen(gaps, fps):
    times = np.cumsum([0, *gaps])
    got = [i for i, _ in at_rate(zip(times.tolist(), range(len(times))), fps)]
    want = [int(np.searchsorted(times, j/fps + 1e-6, side='right')) - 1 for j in range(int(times[-1]*fps) + 2) if j/fps <= times[-1] + 1e-6]
    assert abs(len(got) - len(want)) <= 1 and all(abs(a - b) <= (abs(times[max(a, b)] - j/fps) < 1e-5) for j, (a, b) in enumerate(zip(got, want)))

def test_upright(tmp_path):
    "A picture that a phone stored lying down is turned."
    path = tmp_path/'phone.mp4'
    with av.open(str(path), 'w') as box:
        s = box.add_stream('mpeg4', rate=10)
        s.height, s.width, s.pix_fmt = 32, 48, 'yuv420p'
        if not hasattr(s, 'set_display_rotation'): pytest.skip('this PyAV cannot write a rotation')
        s.set_display_rotation(90)
        for f in pixels(5):
            for p in s.encode(av.VideoFrame.from_ndarray(f, format='rgb24')): box.mux(p)
        for p in s.encode(): box.mux(p)
    assert read_video(path).video.shape[2:] == (48, 32)

# ---------------------------------------------------------------- folders

def test_folder_policy(tmp_path, noisy):
    folder = tmp_path/'many'
    folder.mkdir()
    for i in range(3): write_video(folder/f'{i}.mp4', pixels(20, 64, 64, i))
    (folder/'9.mp4').write_bytes(noisy.read_bytes()[:noisy.stat().st_size//2])
    (folder/'nothing.mp4').touch()
    with pytest.raises(BrokenFile, match='9.mp4: broken at frame'): Folder(folder)
    with pytest.warns(UserWarning) as w: d = Folder(folder, FolderConfig(on_error='skip'))
    assert len(d) == 3 and sorted(re.search(r'left out (\S+):', str(x.message)).group(1) for x in w) == ['9.mp4', 'nothing.mp4'] and len(d.settings['notes']) == 2
    with pytest.warns(UserWarning) as w: d = Folder(folder, FolderConfig(on_error='salvage'))
    assert any('salvaged' in str(x.message) for x in w)
    assert len(d) == 4 and any('left out nothing.mp4' in n for n in d.notes)
    for i in range(3): (folder/f'{i}.mp4').unlink()
    (folder/'9.mp4').unlink()
    with pytest.raises(ValueError, match='nothing of .* could be read'): Folder(folder, FolderConfig(on_error='skip'))

def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match='holds nothing to read'): open_data(tmp_path)
    (tmp_path/'sound.wav').touch()
    with pytest.raises(ValueError, match=r'1 other files \(.wav\)'): open_data(tmp_path)
    with pytest.raises(ValueError, match="unknown file format .*'.wav'"): open_data(tmp_path/'sound.wav')
    with pytest.raises(FileNotFoundError, match='none at'): open_data(tmp_path/'missing')
    with pytest.raises(ValueError, match="Did you mean 'obj3d'"): open_data('obj3')

def test_images(tmp_path):
    for i, f in enumerate(pixels(12)): Image.fromarray(f).save(tmp_path/f'{i}.png')
    assert Folder(tmp_path).lengths == [1]*12
    clip, = Folder(tmp_path, FolderConfig(images='frames')).clips
    assert np.array_equal(clip.video.permute(0, 2, 3, 1), pixels(12))              # 2.png comes before 10.png
    with pytest.raises(ValueError, match='images="frames"'): open_data(tmp_path, length=4)
    data = (tmp_path/'7.png').read_bytes()
    (tmp_path/'7.png').write_bytes(data[:len(data)//2])
    with pytest.raises(BrokenFile, match=r'7.png cannot be read as an image'): Folder(tmp_path)
    with pytest.raises(BrokenFile, match=r'broken at frame 7 of 12 .*7.png'): Folder(tmp_path, FolderConfig(images='frames'))
    with pytest.warns(UserWarning, match='salvaged 7 frames'): assert Folder(tmp_path, FolderConfig(images='frames', on_error='salvage')).lengths == [7]
    Image.fromarray(pixels(1, 16, 16)[0]).save(tmp_path/'7.png')
    with pytest.raises(ValueError, match='different sizes.*32x48.*16x16'): Folder(tmp_path)
    assert len(Folder(tmp_path, FolderConfig(size=16))) == 12
    with pytest.raises(ValueError, match='7.png .* is .16, 16.'): Folder(tmp_path, FolderConfig(images='frames'))
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(tmp_path/'7.png')
    with pytest.raises(ValueError, match='8 bits'): Folder(tmp_path)

def test_masks_must_fit(tmp_path):
    path, ids = write_video(tmp_path/'v.mp4', pixels(24)), np.zeros((24, 32, 48), np.int64)
    ids[:, :8] = 3
    def beside(**arrays): np.savez(tmp_path/'v_masks.npz', **arrays)
    beside(labels=ids)
    assert read_video(path).labels.unique().tolist() == [0, 3] and open_data(path, length=4).max_objects == 3
    assert read_video(path, FolderConfig(background=3)).labels[0, 0, 0] == 0 and read_video(path, FolderConfig(masks='none')).labels is None
    assert read_video(path, FolderConfig(fps=4, size=16)).labels.shape == (8, 16, 16)
    for bad, why in [(dict(labels=ids[:20]), 'more than 20 frames'), (dict(labels=np.concatenate([ids, ids])), 'has 24 frames, but its masks are 48'),
                     (dict(labels=ids[:, :16]), 'masks of .* are 16x48, its frames 32x48'), (dict(labels=ids.astype(float)), 'must be integers'),
                     (dict(labels=ids*100), 'from 0 to 255'), (dict(mask=ids), 'must hold labels'), (dict(masks=np.full((24, 2, 32, 48), .5)), 'one-hot'),
                     (dict(masks=np.ones((24, 2, 32, 48), bool)), 'overlap')]:
        beside(**bad)
        with pytest.raises(ValueError, match=why): read_video(path)
    Image.fromarray(pixels(1)[0]).save(tmp_path/'still.png')
    (tmp_path/'masks').mkdir()
    Image.fromarray(ids[0, :16].astype(np.uint8)).save(tmp_path/'masks/still.png')
    with pytest.raises(ValueError, match='masks of .*still.png are 16x48'): open_data(tmp_path/'still.png')

def test_some_masks_are_not_enough(tmp_path):
    for i in range(3): Image.fromarray(pixels(1)[0]).save(tmp_path/f'{i}.png')
    (tmp_path/'masks').mkdir()
    Image.fromarray(np.ones((32, 48), np.uint8)).save(tmp_path/'masks/1.png')
    with pytest.raises(ValueError, match='2 of the 3 clips .* have no labels'): Folder(tmp_path)
    with pytest.raises(ValueError, match='frame 1.png'): Folder(tmp_path, FolderConfig(images='frames'))

def test_parts_of_a_path(tmp_path):
    "Disjoint in clips or in time, the same every time; shared only where it says so."
    for i in range(10): write_video(tmp_path/f'{i}.mp4', pixels(12, seed=i))
    parts = {s: open_data(tmp_path, s, size=8, seed=1) for s in ('train', 'val', 'test', 'all')}
    names = {s: {d[i].name for i in range(len(d))} for s, d in parts.items()}
    assert len(names['train']) == 8 and not names['train'] & names['val'] and names['val'] == names['test'] and len(names['all']) == 10
    assert parts['train'].fingerprint == open_data(tmp_path, 'train', size=8, seed=1).fingerprint != open_data(tmp_path, 'train', size=8, seed=2).fingerprint
    assert len(open_data(tmp_path, 'train', size=8, n=3)) == 3 and len(open_data(tmp_path, 'train', size=8, n=300)) == 8
    one = {s: open_data(tmp_path/'3.mp4', s, length=3) for s in ('train', 'val')}
    at = {s: {d[i].meta['start'] + k for i in range(len(d)) for k in range(3)} for s, d in one.items()}
    assert max(at['train']) + 1 < min(at['val']) and 'time: frames 0 to 7 train, 9 to 11' in one['val'].settings['split']
    short = open_data(tmp_path/'3.mp4', 'val', length=9)
    assert 'shared' in short.settings['split'] and len(short) == 1
    with pytest.raises(ValueError, match="'3.mp4' has 12 frames, but a window of 13"): open_data(tmp_path/'3.mp4', length=13)
    with pytest.raises(ValueError, match='unknown split of a path'): open_data(tmp_path, 'valid')
    with pytest.raises(ValueError, match='unknown setting of data read as files'): open_data(tmp_path, frame_rate=3)
    with pytest.raises(ValueError, match='n must be'): open_data(tmp_path, n=0)

def test_scenes_by_name(tmp_path):
    pytest.importorskip('mujoco')
    d = open_data('tiny', 'val', n=2, length=4, size=16, root=tmp_path, workers=1)
    assert d[0].video.shape == (4, 3, 16, 16) and d.settings['window']['stride'] == 4 and len({d.where(i)[0].item() for i in range(len(d))}) == 2
    with pytest.raises(ValueError, match="'fps': allowed are root, workers"): open_data('tiny', fps=3)
    with pytest.raises(ValueError, match='scenes are square'): open_data('tiny', size=(16, 32))

def test_a_changed_file_is_read_again(tmp_path):
    path = write_video(tmp_path/'v.mp4', pixels(12))
    a = open_data(path)
    assert open_data(path).source is a.source
    write_video(path, pixels(14, seed=1))
    assert sum(open_data(path, 'all').lengths) == 14

# ---------------------------------------------------------------- npz

X = np.random.default_rng(0).integers(0, 255, (4, 6, 16, 24, 3), dtype=np.uint8)   # N T H W C

@pytest.mark.parametrize('arrays,why', [
    (dict(image=X[:, 0].astype(np.float32)), 'must be uint8 from 0 to 255, got float32'),
    (dict(image=np.where(X[:, 0] > 250, np.nan, X[:, 0])), 'pixels that are NaN'),
    (dict(image=X[:, 0].astype(np.int64)*9), 'got int64 from 0 to'),
    (dict(image=X[:0, 0]), 'is empty'),
    (dict(image=X[:, 0, :, :, :2]), 'allowed are NHWC'),
    (dict(image=X[:3, 0, :, :, 0]), 'may be NHW or CHW'),
    (dict(video=np.moveaxis(X[0], -1, 1)), 'may be NTHW or TCHW'),
    (dict(pictures=X), 'must hold either "video" or "image"'),
    (dict(image=X[:, 0], video=X), 'must hold either'),
    (dict(image=X[:, 0], labels=np.zeros((3, 16, 24), np.uint8)), r"'labels' of .* is \(3, 16, 24\), which does not fit 4 clips of 1 frames 16x24"),
    (dict(image=X[:, 0], masks=np.ones((4, 2, 24, 16), bool)), "'masks' of .* does not fit"),
    (dict(image=X[:, 0], masks=np.ones((4, 1, 16, 24), bool), labels=np.zeros((4, 16, 24), int)), 'only one of them'),
    (dict(image=np.array([{}, 1], dtype=object)), 'cannot be read as npz'),
])
def test_bad_npz(tmp_path, arrays, why):
    np.savez(tmp_path/'x.npz', **arrays)
    with pytest.raises(ValueError, match=why) as e: read_npz(tmp_path/'x.npz')
    assert 'x.npz' in str(e.value)

def test_broken_npz(tmp_path):
    np.savez(tmp_path/'x.npz', video=X)
    data = (tmp_path/'x.npz').read_bytes()
    for bad in (data[:len(data)//2], b'', b'PK\x03\x04 but no zip', data[:3000] + bytes(50) + data[3050:]):
        (tmp_path/'x.npz').write_bytes(bad)
        with pytest.raises(BrokenFile, match='x.npz cannot be read'): open_data(tmp_path/'x.npz')

@pytest.mark.parametrize('order', ['NTHWC', 'NTCHW', 'NCTHW', 'NTHW'])
def test_layouts(tmp_path, order):
    ids = np.random.default_rng(1).integers(0, 4, X.shape[:4])
    x = np.transpose(X, ['NTHWC'.index(a) for a in order]) if 'C' in order else X[..., 0]
    one_hot = np.moveaxis(np.eye(4, dtype=bool)[ids], -1, 2)
    for masks in (dict(labels=ids), dict(masks=one_hot), dict(true_mask=one_hot.astype(np.uint8)*255)):
        np.savez(tmp_path/'x.npz', video=x, **masks)
        clips = read_npz(tmp_path/'x.npz')
        assert len(clips) == 4 and all(len(c) == 6 for c in clips)
        for i, c in enumerate(clips):
            want = X[i] if 'C' in order else X[i, ..., :1].repeat(3, -1)
            assert np.array_equal(c.video.permute(0, 2, 3, 1), want) and np.array_equal(c.labels, ids[i])

# ---------------------------------------------------------------- windows, loader

def lists(n=3, t=10): return ClipList([Clip(torch.full((t + i, 3, 8, 8), i, dtype=torch.uint8), meta=dict(name=f'c{i}')) for i in range(n)], 'list')

@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_windows_are_all_and_only(lengths, length, step, stride):
    data = ClipList([Clip((torch.arange(t) + 20*i).to(torch.uint8).reshape(t, 1, 1, 1).repeat(1, 3, 2, 2)) for i, t in enumerate(lengths)])
    if min(lengths) < (length - 1)*step + 1:
        with pytest.raises(ValueError, match='too short'): Windows(data, length, step, stride)
        return
    w = Windows(data, length, step, stride)
    naive = [[20*i + s + k*step for k in range(length)] for i, t in enumerate(lengths) for s in range(0, t - (length - 1)*step, stride)]
    assert [w[i].video[:, 0, 0, 0].tolist() for i in range(len(w))] == naive
    assert w.batch(torch.arange(len(w)))['video'][:, :, 0, 0, 0].tolist() == naive

@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_batches_are_a_function_of_seed_and_step(n, size, workers, seed):
    data = ClipList([Clip(torch.full((1, 3, 2, 2), i, dtype=torch.uint8)) for i in range(n)])
    if n < size: return
    a, b = Loader(data, size, seed), Loader(data, size, seed, workers=workers)
    steps = range(3, 3 + 2*len(a))
    backwards = {s: a.batch(s)['index'] for s in reversed(steps)}
    assert all(torch.equal(x['index'], backwards[s]) for s, x in zip(steps, b.stream(steps[0], steps[-1] + 1), strict=True))

def test_loader_complaints():
    for args, why in [((0,), 'batch_size'), ((99,), 'fewer than batch_size 99'), ((2.,), 'batch_size')]:
        with pytest.raises(ValueError, match=why): Loader(Windows(lists(), 4), *args)
    for kw in (dict(length=0), dict(length=4, step=0), dict(length=4, stride=-1)):
        with pytest.raises(ValueError, match='positive integer'): Windows(lists(), **kw)
    with pytest.raises(ValueError, match='frames: a loader needs equal'): Loader(lists(), 2)
    with pytest.raises(ValueError, match='is empty'): ClipList([], 'none')
    with pytest.raises(IndexError, match='window 99'): Windows(lists(), 4)[99]

def test_a_failing_read_reaches_the_caller():
    def bad(c): raise ValueError('broken in a thread')
    loader = Loader(Windows(Mapped(lists(), bad, 'bad'), 4), 2, workers=2)
    with pytest.raises(ValueError, match='broken in a thread'): list(loader.stream(0, 5))

def test_stream_abandoned_early_stops_its_threads():
    import threading
    stream = Loader(Windows(lists(), 4), 2, workers=2).stream(0, 10**9)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith('slotnb-loader')]

# ---------------------------------------------------------------- shards

def make(i, t=5, fail_at=None, log=None):
    if log is not None: log.append(i)
    if i == fail_at: raise KeyboardInterrupt
    v = np.random.default_rng(i).integers(0, 255, (t, 3, 8, 8), dtype=np.uint8)
    return dict(video=v, labels=v[:, 0] // 64, speed=v[:, 0, 0, :2].astype(np.float32))

def same(data, n): return len(data) == n and all(np.array_equal(data[i].video, make(i)['video']) and np.array_equal(data[i].truth['speed'], make(i)['speed']) for i in range(n))

def test_interrupted_generation_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt): write_shards(tmp_path/'d', dict(a=1), 20, partial(make, fail_at=11), clips_per_shard=3)
    folder, = tmp_path.glob('d-*')
    with pytest.raises(ValueError, match='incomplete, 3 of 7 shards'): ShardedClips(folder)
    (folder/'.video.00003.npy.xyz.part').write_bytes(b'left by a killed process')
    log = []
    assert write_shards(tmp_path/'d', dict(a=1), 20, partial(make, log=log), clips_per_shard=3) == folder
    assert log == [0, *range(9, 20)] and not list(folder.glob('.*.part'))          # 0 shows the shapes, 0 to 8 were there
    assert same(ShardedClips(folder, check='hash'), 20)

def test_other_spec_other_folder(tmp_path):
    a, b = write_shards(tmp_path/'d', dict(a=1), 4, make), write_shards(tmp_path/'d', dict(a=2), 4, make)
    assert a != b and ShardedClips(a).fingerprint != ShardedClips(b).fingerprint

@pytest.mark.slow
def test_workers_make_the_same(tmp_path):
    one = write_shards(tmp_path/'one', dict(a=1), 12, make, clips_per_shard=4)
    two = write_shards(tmp_path/'two', dict(a=1), 12, make, workers=2, clips_per_shard=4)
    assert check_shards(one)['shards'] == check_shards(two)['shards']

def test_damaged_shard_is_named(tmp_path):
    folder = write_shards(tmp_path/'d', dict(a=1), 10, make, clips_per_shard=3)
    shard = folder/'video.00002.npy'
    good = shard.read_bytes()
    shard.write_bytes(good[:-7])
    with pytest.raises(ValueError, match='video.00002.npy is damaged'): ShardedClips(folder)
    shard.write_bytes(good[:200] + bytes([good[200] ^ 4]) + good[201:])
    ShardedClips(folder)
    with pytest.raises(ValueError, match='video.00002.npy is damaged: its content'): ShardedClips(folder, check='hash')
    shard.unlink()
    with pytest.raises(ValueError, match='video.00002.npy is missing'): ShardedClips(folder)
    assert repair_shards(folder) == [2]
    assert same(ShardedClips(write_shards(tmp_path/'d', dict(a=1), 10, make), check='hash'), 10)
    (folder/'manifest.json').write_text('{"format": 1, ')
    with pytest.raises(ValueError, match='manifest.json is damaged'): ShardedClips(folder)
    with pytest.raises(FileNotFoundError, match='no manifest.json'): ShardedClips(tmp_path)
    with pytest.raises(ValueError, match='unknown check'): check_shards(folder, 'hsah')

def test_full_disk(tmp_path, monkeypatch):
    "The disk fills up in the third shard; the two before are kept, and the call continues when there is room."
    real_sync, calls = os.fsync, []
    def full(fd):
        calls.append(fd)
        if len(calls) > 9: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_sync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match=r'No space left on device.*2 of 4 shards in .* are whole and kept') as e:
        write_shards(tmp_path/'d', dict(a=1), 10, make, clips_per_shard=3)
    assert e.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, 'fsync', real_sync)
    log = []
    folder = write_shards(tmp_path/'d', dict(a=1), 10, partial(make, log=log), clips_per_shard=3)
    assert log == [0, *range(6, 10)] and same(ShardedClips(folder, check='hash'), 10) and not list(folder.glob('.*.part'))

def test_really_full_disk(tmp_path):
    "A file system of 200 kB, where this process may make one."
    small = tmp_path/'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', small], capture_output=True).returncode: pytest.skip('mounting a small file system needs root')
    try:
        with pytest.raises(OSError, match=r'No space left on device.* of 100 shards in .* are whole and kept'):
            write_shards(small/'d', dict(a=1), 300, partial(make, t=20), clips_per_shard=3)
        folder, = small.glob('d-*')
        done = shards._read_manifest(folder)['shards']
        assert len(done) >= 3 and not list(folder.glob('.*.part'))
        for record in done.values():
            for f in record['files'].values(): assert shards._sha256(folder/f['name']) == f['sha256']
    finally: subprocess.run(['umount', small], check=True)

def test_two_runs_at_once(tmp_path):
    "The second waits for the first and finds everything done."
    from concurrent.futures import ThreadPoolExecutor
    log = []
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: write_shards(tmp_path/'d', dict(a=1), 10, partial(make, log=log), clips_per_shard=2), range(2)))
    assert folders[0] == folders[1] and log == [0, *range(10)] and same(ShardedClips(folders[0], 'hash'), 10)

@pytest.mark.parametrize('bad,why', [
    (lambda i: dict(labels=make(i)['labels']), 'no array "video"'),
    (lambda i: make(i, t=5 + i//4), 'clip 4 differs from clip 0'),
    (lambda i: {**make(i), 'speed': np.full((5, 2), np.nan if i == 3 else 0, np.float32)}, "'speed' of clip 3 has 10 values that are NaN"),
])
def test_bad_generator(tmp_path, bad, why):
    with pytest.raises(ValueError, match=why): write_shards(tmp_path/'d', dict(a=1), 8, bad, clips_per_shard=2)

# ---------------------------------------------------------------- real files

@needs_real
@pytest.mark.parametrize('path,frames,labels', [('movi/movi_a_1.gif', 24, None), ('movi/movi_b_1.gif', 24, None), ('physion/0001_img.mp4', 205, None), ('physion/0002_img.mp4', 161, None),
    ('kth/train_example1.avi', 75, None), ('kth/val_example1.avi', 75, None), ('video/carphone_pristine.mp4', 120, None), ('video/bikes.mp4', 250, None), ('clevr/img1.png', 1, None),
    ('clevr/img2.png', 1, None), ('kubric/kubric_helloworld.png', 1, 2), ('tetrominoes/tetrominoes5.npz', 1, 3)])
def test_real_files(path, frames, labels):
    data = Folder(real/path, FolderConfig(size=32))
    assert data[0].video.shape == (frames, 3, 32, 32) and data.max_objects == labels and data[0].video.float().std() > 5

@needs_real
def test_real_corrupted():
    with pytest.raises(BrokenFile, match=r'video/corrupted.mp4: broken at frame 28 of 50 \(Invalid data'): open_data(real/'video/corrupted.mp4')
    with pytest.warns(UserWarning, match='salvaged 28 frames'): assert Folder(real/'video/corrupted.mp4', FolderConfig(on_error='salvage')).lengths == [28]
    with pytest.warns(UserWarning, match='left out corrupted.mp4'): assert len(Folder(real/'video', FolderConfig(on_error='skip', size=32))) == 2

@needs_real
def test_real_tetrominoes():
    z = np.load(real/'tetrominoes/tetrominoes5.npz')
    data = open_data(real/'tetrominoes', 'val')
    assert len(data) == 5 and data.max_objects == 3 and 'shared' in data.settings['split']
    for i in range(5): assert np.array_equal(data[i].labels[0], z['true_mask'][i].argmax(0)) and np.array_equal(data[i].video[0].permute(1, 2, 0), z['image'][i])

@needs_real
def test_real_folders_are_split():
    train, held = (open_data(real/'movi', s, size=32, length=6) for s in ('train', 'val'))
    assert (len(train), len(held)) == (19, 4) and train[0].name != held[0].name
    assert 'clips: 1 of 2 held out' in held.settings['split'] and held.settings['window'] == dict(length=6, step=1, stride=6) and held.settings['size'] == 32

@needs_real
def test_real_kubric_masks(tmp_path):
    ids = np.asarray(Image.open(real/'kubric/kubric_helloworld_segmentation.png'))
    for name in ('masks/hello.png', 'hello_segmentation.png', 'hello_mask.png', 'hello_masks.png'):
        home = tmp_path/name.replace('/', '_')
        (home/'masks').mkdir(parents=True)
        shutil.copy(real/'kubric/kubric_helloworld.png', home/'hello.png')
        shutil.copy(real/'kubric/kubric_helloworld_segmentation.png', home/name)
        data = open_data(home, background=1)
        assert len(data) == 1 and np.array_equal(data[0].labels[0] == 0, ids == 1) and (ids == 1).mean() > .5
        alone = open_data(home, masks='none')
        assert len(alone) == 1 and alone[0].labels is None
    data = open_data(real/'kubric', background=1)
    assert len(data) == 1 and data[0].labels.unique().tolist() == [0, 2]
