"Readers of published data sets on real files of the real format: what is written comes back, what is broken is named, what is not wanted is not read."
import json, re, shutil, warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from slotnb.data import clevrer, obj3d, published, rle
from slotnb.data.clevrer import CLEVRER, CLEVRERConfig, open_clevrer, read_proposals
from slotnb.data.clips import Clip, ClipList, Loader, Subset, grayscale, to_rgb
from slotnb.data.export import WRITERS, export_as
from slotnb.data.files import BrokenFile
from slotnb.data.obj3d import OBJ3D, OBJ3DConfig, open_obj3d
from slotnb.data.scenes import PRESETS, make_clip

pytest.importorskip('av', reason='av (PyAV) is not installed: no mp4')
pytest.importorskip('mujoco', reason='mujoco is not installed: no scenes to write')
pytestmark = pytest.mark.filterwarnings('ignore:.*are broken and left out')
FRAMES = 20

def _matches(pattern, text): assert re.search(pattern, text), text

# ---- run lengths

def naive_text(counts):
    "The definition, character by character."
    text = ''
    for i, x in enumerate(counts):
        x = int(x) - (int(counts[i - 2]) if i > 2 else 0)
        more = True
        while more:
            five, x = x & 31, x >> 5
            more = x != (-1 if five & 16 else 0)
            text += chr(48 + five + 32*more)
    return text

@settings(max_examples=200, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_masks_come_back_through_run_lengths(mask):
    counts = rle.mask_to_counts(mask)
    flat = [bool(mask[y, x]) for x in range(mask.shape[1]) for y in range(mask.shape[0])] # down the columns
    assert [v for i, c in enumerate(counts) for v in [i % 2 == 1]*c] == flat and (counts[1:] > 0).all()
    for compress in (True, False):
        record = json.loads(json.dumps(rle.encode(mask, compress)))
        assert (rle.decode(record) == mask).all() and rle.area(record) == mask.sum()
    assert (rle.decode(dict(record, counts=rle.counts_to_text(counts).encode())) == mask).all() # bytes, too

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**35), max_size=30))
def test_text_is_the_definition(counts):
    assert rle.counts_to_text(counts) == naive_text(counts)
    assert rle.text_to_counts(naive_text(counts)).tolist() == counts

Y, X = np.mgrid[:320, :480]
KNOWN = [ # texts as COCO's own C code writes them
    (((Y - 5)**2 + (X - 8)**2 < 30)[:12, :20], 'W1562N2N2O00000001N2N2NV2'),
    (((X//7 + Y//3) % 2 == 0)[:12, :20], '033000000000000000000000000030M00000000000000000000000030M000000000000000000000'),
    (X < 0, 'PPf4'), (X >= 0, '0PPf4'), ((Y < 2) & (X < 2), '02n90P\\e4')]

@pytest.mark.parametrize('mask, text', KNOWN, ids=['disc', 'stripes', 'nothing', 'everything', 'corner'])
def test_known_texts(mask, text):
    assert rle.encode(mask)['counts'] == text and (rle.decode(dict(size=list(mask.shape), counts=text)) == mask).all()

def test_like_pycocotools():
    coco = pytest.importorskip('pycocotools.mask', reason='pycocotools is not installed: known texts of its C code are compared instead')
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 80, 2)) < rng.random()
        theirs, ours = coco.encode(np.asfortranarray(mask.astype(np.uint8))), rle.encode(mask)
        assert theirs['counts'].decode() == ours['counts'] and (coco.decode(ours).astype(bool) == mask).all()
        assert (rle.decode(theirs | dict(size=list(theirs['size']))) == mask).all() and coco.area(theirs) == rle.area(ours)

@pytest.mark.parametrize('record, says', [
    ([1, 2], 'record with "size"'), (dict(size=[2], counts='4'), 'two positive integers'), (dict(size=[2, 2], counts=4), 'text or a list'), (dict(size=[2, 2], counts='3'), 'sum 3'),
    (dict(size=[2, 2], counts=[5, -1]), 'least -1'), (dict(size=[2, 2], counts='P'), 'middle of a number'), (dict(size=[2, 2], counts='\x7f'), 'characters "0" to "o"'),
    (dict(size=[2, 2], counts='é'), 'ASCII'), (dict(size=[2, 2], counts='o'*20 + '0'), '21 characters')])
def test_wrong_records_are_refused(record, says):
    with pytest.raises(ValueError, match=says): rle.decode(record)

# ---- mp4

@pytest.mark.parametrize('gop', [1, 7, 12, 250])
def test_a_window_of_a_video_is_a_piece_of_it(tmp_path, gop):
    video = torch.zeros(30, 3, 32, 48, dtype=torch.uint8)
    for t in range(30): video[t, :, 8:20, t:t + 12] = 8*t
    published.write_mp4(tmp_path/'v.mp4', video, gop=gop)
    whole = published.read_mp4(tmp_path/'v.mp4', range(30))
    assert (whole.float() - video.float()).abs().mean() < 4
    for wanted in (range(1, 2), range(11, 14), range(12, 15), range(29, 30), range(5, 30, 6)):
        assert (published.read_mp4(tmp_path/'v.mp4', wanted) == whole[wanted.start:wanted.stop:wanted.step]).all(), wanted

def test_a_video_with_reordered_frames(tmp_path):
    import av
    video = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with av.open(str(tmp_path/'v.mp4'), 'w') as box:
        stream = box.add_stream('libx264', rate=25, options=dict(preset='slow', bf='3'))
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 32, 48, 'yuv420p', 9
        for t in range(40): box.mux(stream.encode(av.VideoFrame.from_ndarray(video[0].roll(2*t, 2).permute(1, 2, 0).contiguous().numpy(), format='rgb24')))
        box.mux(stream.encode())
    whole = published.read_mp4(tmp_path/'v.mp4', range(40))
    for t in range(40): assert (published.read_mp4(tmp_path/'v.mp4', range(t, t + 1)) == whole[t]).all(), t

# ---- OBJ3D

@pytest.fixture(scope='module')
def balls(): return ClipList([make_clip(PRESETS['obj3d'].but(frames=FRAMES, size=32), 0, i) for i in range(12)], 'obj3d')

@pytest.fixture
def obj3d_root(tmp_path, balls):
    export_as('obj3d', balls, tmp_path/'OBJ3D', size=64)
    export_as('obj3d', Subset(balls, [3, 4]), tmp_path/'OBJ3D', split='val', size=64)
    return tmp_path/'OBJ3D'

def test_obj3d_comes_back(obj3d_root, balls):
    data = OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=FRAMES, size=None))
    assert len(data) == 12 and data.lengths == [FRAMES]*12 and data.max_objects is None and not data.skipped
    for i, sample in enumerate(data.samples):
        wanted = published.shrink(balls[int(sample.name)].video, 64, True)
        assert (data[i].video == wanted).all() and data[i].labels is None
    assert obj3d.check(obj3d_root, 'train', 'decode', OBJ3DConfig(frames=FRAMES)).ok

def test_obj3d_conventions(obj3d_root):
    names = lambda order: [s.name for s in OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=5, order=order)).samples]
    assert names('text') == sorted(map(str, range(12))) and names('number') == list(map(str, range(12)))
    preset = OBJ3DConfig()
    assert (preset.frames, preset.size, preset.antialias, preset.order) == (50, 64, False, 'text')
    disk = OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=5, size=None))[0].video.double()
    small = OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=5, size=32))[0].video
    assert (small - disk.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))).abs().max() <= .5, 'the mean of 2x2'
    assert (small != OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=5, size=32, antialias=True))[0].video).any()
    assert len(open_obj3d(obj3d_root, length=6, frames=FRAMES)) == 12*(FRAMES - 5)
    held_out = open_obj3d(obj3d_root, 'val', length=6, frames=FRAMES)
    assert len(held_out) == 2 and held_out.where(1)[1] == 0, 'held-out windows begin at the first frame only'

DAMAGE = {
    'gap': (lambda p: p.unlink(), 'lacks 1 of its first', 'names'),
    'empty': (lambda p: p.write_bytes(b''), r'test_4\.png is empty', 'whole'),
    'cut off': (lambda p: p.write_bytes(p.read_bytes()[:-30]), r'test_4\.png is cut off', 'whole'),
    'a web page': (lambda p: p.write_bytes(b'<html>Quota exceeded</html>'), r'test_4\.png is not a png file', 'whole'),
    'a hole inside': (lambda p: p.write_bytes(p.read_bytes()[:60] + bytes(200) + p.read_bytes()[260:]), r'test_4\.png is damaged: bytes', 'whole')}

@pytest.mark.parametrize('kind', DAMAGE)
def test_broken_episodes_are_named_and_left_out(obj3d_root, kind):
    harm, says, level = DAMAGE[kind]
    harm(obj3d_root/'train/7/test_4.png')
    config = OBJ3DConfig(frames=FRAMES)
    found = obj3d.check(obj3d_root, 'train', level, config)
    assert list(found.broken) == ['train/7'] and not found.ok
    _matches(says, found.broken['train/7'])
    with pytest.warns(UserWarning, match=r'1 of 12 clips are broken and left out \(7\)'): data = OBJ3D(obj3d_root, 'train', config, level)
    assert len(data) == 11 and '7' not in [s.name for s in data.samples] and data.settings['skipped'] == 1 and '7' in data.settings['skipped_first']
    assert (data[0].video == OBJ3D(obj3d_root, 'train', config.but(exclude=('7',)), 'names')[0].video).all()

def test_damage_met_while_reading_says_what_to_do(obj3d_root):
    DAMAGE['a hole inside'][0](obj3d_root/'train/7/test_4.png')
    data = OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=FRAMES, exclude=('2',)), 'names')
    i = [s.name for s in data.samples].index('7')
    assert data.window(i, 4, 6).video.shape[0] == 6, 'a window that does not touch it'
    with pytest.raises(BrokenFile, match=r"test_4\.png.*Clip '7' of OBJ3D train .*exclude=\('2', '7'\) leaves it out; check='decode'"): data.window(i, 0, 6)
    with pytest.raises(IndexError, match='11'): data[11]
    with pytest.raises(ValueError, match='it has 20'): data.window(0, 15, 6)

def test_absent_obj3d(tmp_path, obj3d_root):
    with pytest.raises(FileNotFoundError, match='Google Drive'): OBJ3D(obj3d_root, 'test')
    with pytest.raises(FileNotFoundError, match='give that'): OBJ3D(tmp_path, 'train')
    with pytest.raises(FileNotFoundError, match='does not exist'): OBJ3D(tmp_path/'nowhere')
    with pytest.raises(ValueError, match="'valid'"): OBJ3D(obj3d_root, 'valid')
    with pytest.raises(ValueError, match='(?s)nothing of OBJ3D train can be read.*12, left out'): OBJ3D(obj3d_root, 'train', OBJ3DConfig(frames=FRAMES + 1))

def test_only_the_window_is_read(obj3d_root, monkeypatch):
    data, reads, read = open_obj3d(obj3d_root, length=4, step=2, frames=FRAMES), [], published.read_picture
    monkeypatch.setattr(published, 'read_picture', lambda p, *more: reads.append(p.name) or read(p, *more))
    clip = data[3]
    assert reads == [f'test_{i}.png' for i in (4, 6, 8, 10)] and clip.meta['start'] == 3 and clip.meta['step'] == 2

def test_batches_do_not_depend_on_threads(obj3d_root):
    one, many = (list(Loader(open_obj3d(obj3d_root, length=4, frames=FRAMES), 8, seed=1, workers=w).stream(0, 5)) for w in (0, 3))
    assert all((a['video'] == b['video']).all() and (a['index'] == b['index']).all() for a, b in zip(one, many))

# ---- CLEVRER

SHORT = dict(frames=FRAMES)

@pytest.fixture(scope='module')
def collisions(): return ClipList([make_clip(PRESETS['clevrer'].but(frames=FRAMES, launch_frames=(0, 2), fps=8.), 5, i) for i in range(6)], 'clevrer')

@pytest.fixture(scope='module')
def written(tmp_path_factory, collisions):
    root = tmp_path_factory.mktemp('written')/'CLEVRER'
    return {s: export_as('clevrer', collisions, root, n, s) for s, n in (('train', 4), ('val', 1), ('test', 1))}

@pytest.fixture
def clevrer_root(tmp_path, written): return shutil.copytree(written['train'].folder, tmp_path/'CLEVRER')

def test_clevrer_comes_back(written, collisions):
    root, out = written['train'].folder, written['train']
    large, small = (CLEVRER(root, 'train', CLEVRERConfig(size=s, colour='rgb', **SHORT)) for s in (None, 64))
    assert large.max_objects == 6 and [s.name for s in large.samples] == out.names
    for i, k in enumerate(out.clips):
        true, a, b = collisions[k], large[i], small[i]
        stretched = torch.nn.functional.interpolate(true.labels[:, None], (320, 480), mode='nearest-exact')[:, 0]
        assert (a.labels == stretched).all() and (b.labels == true.labels).all(), 'true masks come back identical'
        assert (b.video.float() - true.video.float()).abs().mean() < 3
        here = true.truth['present'][0]
        for ours, theirs in (('position', 'location'), ('velocity', 'velocity'), ('angular_velocity', 'angular_velocity')):
            assert torch.allclose(true.truth[ours][:, here], b.truth[theirs].float(), atol=1e-5)
        assert (b.truth['inside_camera_view'] == (true.truth['pixels'][:, here] > 0)).all()
        assert (b.truth['collisions'] == true.truth['collisions'][:, here][:, :, here]).all()
    assert any(true.truth['collisions'].any() for true in collisions), 'or the line before says nothing'

def test_clevrer_splits(written):
    root = written['train'].folder
    assert written['val'].names == ['video_10000'] and written['test'].names == ['video_15000']
    assert (root/'videos/test/video_15000-16000/video_15000.mp4').is_file() and not (root/'annotations/test').exists()
    test = CLEVRER(root, 'test', CLEVRERConfig(**SHORT))
    assert test[0].labels is not None and not test[0].truth and test[0].meta['objects'] == []
    found = clevrer.check(root, how='decode', config=CLEVRERConfig(**SHORT))
    assert found.ok and found.found['videos of val'] == 1 and not [m for m in found.missing if 'test' in m and 'annotations' in m]
    one = CLEVRER(root, 'val', CLEVRERConfig(**SHORT))[0]
    assert one.name == 'CLEVRER val/video_10000'

def test_clevrer_conventions(written):
    preset, root = CLEVRERConfig(), written['train'].folder
    assert (preset.size, preset.colour, preset.antialias, preset.frames, preset.exclude) == (64, 'bgr', False, 128, ('video_10800',))
    read = lambda **more: CLEVRER(root, 'train', CLEVRERConfig(**SHORT, **more), 'names')
    assert (read()[0].video.flip(1) == read(colour='rgb')[0].video).all() and (read()[0].video != read(colour='rgb')[0].video).any()
    assert (read()[0].video != read(antialias=True)[0].video).any()
    full = read(size=None)[0].labels
    assert (read()[0].labels == full[:, ::5][:, :, [int(7.5*i) for i in range(64)]]).all(), 'picked at the corners'
    assert (read(size=(64, 96), pick='nearest-exact')[0].labels == full[:, 2::5, 2::5]).all(), 'picked at the centres'
    assert len(open_clevrer(root, length=6, **SHORT)) == 4*(FRAMES - 5) and open_clevrer(root, 'val', length=6, **SHORT).where([0, 1, 2])[1].tolist() == [0, 6, 12]
    assert read(masks='none')[0].labels is None and read(masks='none').max_objects is None and not read(annotations='none')[0].truth
    prints = [d.fingerprint for d in (read(), read(colour='rgb'), read(ids='position'), CLEVRER(root, 'val', CLEVRERConfig(**SHORT)))]
    assert len(set(prints)) == 4

def test_the_fingerprint_stays_with_a_copy(written, clevrer_root):
    config = CLEVRERConfig(**SHORT)
    assert CLEVRER(clevrer_root, 'train', config).fingerprint == CLEVRER(written['train'].folder, 'train', config).fingerprint

def test_labels_follow_objects_or_places(tmp_path):
    a, b = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    a[:, :2], b[:, 1:4] = True, True
    red, blue = dict(color='red', material='metal', shape='cube'), dict(color='blue', material='metal', shape='cube')
    lists = [[(a, red), (b, blue)], [(b, blue)], [], [(b, blue), (a, red)]]
    frames = [dict(frame_index=i, objects=[dict(mask=rle.encode(m), **o) for m, o in l]) for i, l in enumerate(lists)]
    path = tmp_path/'proposal_00000.json'
    path.write_text(json.dumps(dict(frames=frames[::-1])))
    rows = lambda **more: read_proposals(path, range(4), **more)[:, 0].tolist()
    assert rows() == [[1, 1, 2, 2, 0, 0], [0, 2, 2, 2, 0, 0], [0]*6, [1, 2, 2, 2, 0, 0]], 'the first of two that overlap, no object, another order'
    assert rows(ids='position') == [[1, 1, 2, 2, 0, 0], [0, 1, 1, 1, 0, 0], [0]*6, [2, 1, 1, 1, 0, 0]]
    assert rows(objects=(('blue', 'metal', 'cube'),))[0] == [2, 2, 1, 1, 0, 0], 'annotated objects come first'
    path.write_text(json.dumps(dict(frames=frames[:1])))
    with pytest.raises(BrokenFile, match='no frame 1'): rows()

def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))

PROPOSAL, ANNOTATION, MP4 = 'derender_proposals/proposal_00001.json', 'annotations/train/annotation_00000-01000/annotation_00001.json', 'videos/train/video_00000-01000/video_00001.mp4'
def first_mask(record): return next(o for f in record['frames'] for o in f['objects'])['mask']
def spoil(record): first_mask(record)['counts'] += '1'
CLEVRER_DAMAGE = {
    'no proposals': (PROPOSAL, lambda p: p.unlink(), 'no derender_proposals/proposal_00001.json', 'names'),
    'no annotation': (ANNOTATION, lambda p: p.unlink(), 'annotation_00001.json', 'names'),
    'video cut off': (MP4, lambda p: p.write_bytes(p.read_bytes()[:-100]), r'video_00001\.mp4 is cut off', 'whole'),
    'video empty': (MP4, lambda p: p.write_bytes(b''), 'is empty', 'whole'),
    'a web page': (MP4, lambda p: p.write_bytes(b'<html></html>'), 'is not an mp4', 'whole'),
    'proposals cut off': (PROPOSAL, lambda p: p.write_text(p.read_text()[:-30]), r'proposal_00001\.json is cut off', 'whole'),
    'proposals cut off at a brace': (PROPOSAL, lambda p: p.write_text(p.read_text()[:-2]), r'proposal_00001\.json is no whole JSON', 'whole'),
    'a mask that does not fill its frame': (PROPOSAL, lambda p: edit(p, spoil), 'frame 0: counts of a 320x480 mask', 'whole'),
    'a mask of three pixels': (PROPOSAL, lambda p: edit(p, lambda r: first_mask(r).update(counts='3')), 'frame 0: counts of a 320x480 mask', 'whole'),
    'a mask of another size': (PROPOSAL, lambda p: edit(p, lambda r: r['frames'][-1]['objects'][-1]['mask'].update(size=[64, 64])), f'frame {FRAMES - 1}: masks of one frame must all be 320x480', 'whole'),
    'a mask of no size': (PROPOSAL, lambda p: edit(p, lambda r: [o['mask'].update(size=['a', 'b']) for f in r['frames'] for o in f['objects']]), r"a mask of size \('a', 'b'\)", 'whole'),
    'attributes that are lists': (PROPOSAL, lambda p: edit(p, lambda r: [o.update(color=[]) for f in r['frames'] for o in f['objects']]), 'no file of proposals', 'whole'),
    'proposals without masks': (PROPOSAL, lambda p: edit(p, lambda r: [o.pop('mask') for f in r['frames'] for o in f['objects']]), 'no file of proposals', 'whole'),
    'too few frames of proposals': (PROPOSAL, lambda p: edit(p, lambda r: r['frames'].pop()), f'no frame {FRAMES - 1}', 'whole'),
    'motion ends early': (ANNOTATION, lambda p: edit(p, lambda r: r['motion_trajectory'].pop()), 'no whole annotation', 'whole'),
    'no motion': (ANNOTATION, lambda p: edit(p, lambda r: r.pop('motion_trajectory')), "no whole annotation: KeyError 'motion_trajectory'", 'whole'),
    'no place': (ANNOTATION, lambda p: edit(p, lambda r: r['motion_trajectory'][2]['objects'][0].update(location=[None]*3)), 'no whole annotation: .*location that is no number', 'whole'),
    'no colour': (ANNOTATION, lambda p: edit(p, lambda r: r['object_property'][0].pop('color')), "no whole annotation: KeyError 'color'", 'whole'),
    'a hole in the video': (MP4, lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes())//2] + bytes(3000) + p.read_bytes()[len(p.read_bytes())//2 + 3000:]), r'video_00001\.mp4', 'decode'),
    'an object nobody knows': (ANNOTATION, lambda p: edit(p, lambda r: r['object_property'].pop(0)), 'no whole annotation', 'whole')}

@pytest.mark.parametrize('kind', CLEVRER_DAMAGE)
def test_broken_videos_are_named_and_left_out(clevrer_root, kind):
    where, harm, says, level = CLEVRER_DAMAGE[kind]
    harm(clevrer_root/where)
    config = CLEVRERConfig(**SHORT)
    found = clevrer.check(clevrer_root, 'train', level, config)
    assert list(found.broken) == ['video_00001'] and not found.excluded and repr(found).count('left out')
    _matches(says, found.broken['video_00001'])
    with pytest.warns(UserWarning, match=r'1 of 4 clips are broken and left out \(video_00001\)'): data = CLEVRER(clevrer_root, 'train', config, level)
    assert [s.name for s in data.samples] == ['video_00000', 'video_00002', 'video_00003']
    for i in range(3): data.window(i, 3, 4)

def test_a_look_without_decoding_says_so(clevrer_root):
    found = [clevrer.check(clevrer_root, 'train', how, CLEVRERConfig(**SHORT)) for how in ('whole', 'decode')]
    assert found[0].ok and 'no frame was decoded' in repr(found[0]) and found[1].ok and 'no frame was decoded' not in repr(found[1])

@pytest.mark.parametrize('texts', [['PPf4', '0PPf4'], ['PPf4', '02n90P\\e4', 'W1562N2N2O00000001N2N2NV2', '0PPf4']])
def test_many_masks_are_checked_as_one_by_one(texts):
    size = [320, 480]
    fits = [rle.text_to_counts(t).sum() == 320*480 for t in texts]
    assert rle._all_fill(texts, 320*480) == all(fits) and rle._all_fill([t for t, f in zip(texts, fits) if f], 320*480)
    rng = np.random.default_rng(0)
    masks = [rle.encode(rng.random(size) < p) for p in (0, .01, .5, .99, 1)]
    rle.check_masks(masks, size)
    for bad in ('', 'P', '3', 'o'*20 + '0', 'é', rle.counts_to_text([320*480 + 5, -5][::-1]), rle.counts_to_text([0, 5, -5, 320*480])):
        with pytest.raises(ValueError): rle.check_masks([*masks, dict(size=size, counts=bad)], size)

def test_a_look_is_taken_once(clevrer_root, obj3d_root, monkeypatch):
    looks, whole = [], published.check_whole
    for module in (obj3d, clevrer): monkeypatch.setattr(module, 'check_whole', lambda path: looks.append(path.name) or whole(path))
    def opened(cls, root, config, how='whole'):
        del looks[:]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            data = cls(root, 'train', config, how)
        return [s.name for s in data.samples]
    for cls, root, config, file, name in ((OBJ3D, obj3d_root, OBJ3DConfig(frames=FRAMES), obj3d_root/'train/7/test_4.png', '7'),
                                          (CLEVRER, clevrer_root, CLEVRERConfig(**SHORT), clevrer_root/PROPOSAL, 'video_00001')):
        before = opened(cls, root, config)
        assert looks and name in before
        assert opened(cls, root, config) == before == opened(cls, root, config.but(exclude=('x',))) and not looks, 'known'
        raw = file.read_bytes()
        file.write_bytes(raw[:100] + bytes(40) + raw[140:])
        assert opened(cls, root, config) == [n for n in before if n != name] and set(looks) <= {*(f'test_{i}.png' for i in range(1, 21)), MP4[-15:], PROPOSAL[-19:], ANNOTATION[-21:]} and looks, 'one has changed'
        assert opened(cls, root, config) == [n for n in before if n != name] and not looks, 'and stays broken'
        file.write_bytes(raw)
        assert opened(cls, root, config) == before and looks
        assert opened(cls, root, config, 'decode') == before and looks, 'another level is another look'

@pytest.mark.parametrize('layout', ['obj3d', 'clevrer'])
def test_a_stride_of_nothing_is_refused(obj3d_root, clevrer_root, layout):
    with pytest.raises(ValueError, match='stride of a window must be a positive integer, got 0'):
        (open_obj3d if layout == 'obj3d' else open_clevrer)(obj3d_root if layout == 'obj3d' else clevrer_root, length=4, stride=0, frames=FRAMES)

def test_a_clip_knows_the_order_of_its_channels(written, tmp_path):
    read = lambda colour: CLEVRER(written['train'].folder, 'train', CLEVRERConfig(colour=colour, **SHORT))
    bgr, rgb = read('bgr'), read('rgb')
    assert bgr[0].meta['colour'] == 'bgr' and rgb[0].meta['colour'] == 'rgb' and (grayscale(bgr[0]).video == grayscale(rgb[0]).video).all()
    assert (to_rgb(bgr[0]).video == rgb[0].video).all() and (to_rgb(to_rgb(bgr[0])).video == rgb[0].video).all()
    assert (grayscale(bgr.window(0, 2, 3)).video == grayscale(rgb[0]).video[2:5]).all()
    for name, data in (('a', bgr), ('b', rgb)): export_as('obj3d', data, tmp_path/name, 1, size=64)
    a, b = (OBJ3D(tmp_path/name, 'train', OBJ3DConfig(frames=FRAMES))[0].video for name in 'ab')
    assert (a == b).all(), 'written as what it shows'

def test_a_video_of_another_length_is_broken(clevrer_root):
    found = clevrer.check(clevrer_root, 'train') # 128 frames are expected
    assert len(found.broken) == 4 and f'has {FRAMES} frames, not 128; the setting frames={FRAMES} takes' in found.broken['video_00000'] and not found.ok
    with pytest.raises(ValueError, match='(?s)nothing of CLEVRER train.*not 128'): CLEVRER(clevrer_root, 'train')

def test_the_published_exclusion(clevrer_root):
    for kind, folder in (('video', 'videos/val'), ('annotation', 'annotations/val')):
        place = clevrer_root/folder/clevrer.thousand(10000, kind)
        for p in place.iterdir(): shutil.copy(p, p.with_name(p.name.replace('10000', '10800')))
    shutil.copy(clevrer_root/'derender_proposals/proposal_10000.json', clevrer_root/'derender_proposals/proposal_10800.json')
    data = CLEVRER(clevrer_root, 'val', CLEVRERConfig(**SHORT))
    assert len(data) == 1 and data.skipped == {'video_10800': 'by the setting `exclude`'}
    assert len(CLEVRER(clevrer_root, 'val', CLEVRERConfig(exclude=(), **SHORT))) == 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        CLEVRER(clevrer_root, 'val', CLEVRERConfig(**SHORT)) # a choice is no warning

def test_extracted_frames(tmp_path, collisions, written):
    export_as('clevrer', collisions, tmp_path/'both', 2, frames='both')
    export_as('clevrer', collisions, tmp_path/'jpg', 2, frames='jpg')
    folder = tmp_path/'both/videos/train/video_00000-01000/video_00000'
    assert sorted(p.name for p in folder.iterdir()) == [f'{i:06d}.jpg' for i in range(FRAMES)]
    read = lambda root, **more: CLEVRER(root, 'train', CLEVRERConfig(colour='rgb', **SHORT, **more))
    auto, mp4, jpg = read(tmp_path/'both')[0], read(tmp_path/'both', source='mp4')[0], read(tmp_path/'jpg')[0]
    assert (auto.video == jpg.video).all() and (auto.video != mp4.video).any(), 'frames are read where they were extracted'
    assert (auto.video.float() - collisions[written['train'].clips[0]].video.float()).abs().mean() < 4 and (auto.labels == mp4.labels).all()
    odd = tmp_path/'jpg/videos/train/video_00000-01000/video_00000/000003.jpg'
    kept = odd.read_bytes()
    published.require('PIL.Image', 'data').new('RGB', (64, 64)).save(odd)
    with pytest.raises(BrokenFile, match='video_00000 has frames of different sizes'): read(tmp_path/'jpg')[0]
    odd.write_bytes(kept)
    (folder/'000007.jpg').unlink()
    with pytest.warns(UserWarning, match='video_00000'): assert len(read(tmp_path/'both')) == 1, 'no silent way back to the mp4'
    assert len(read(tmp_path/'both', source='mp4')) == 2
    with pytest.raises(ValueError, match='nothing of CLEVRER train'): read(tmp_path/'jpg', source='mp4')

def test_without_masks_or_annotations(clevrer_root):
    shutil.rmtree(clevrer_root/'derender_proposals')
    shutil.rmtree(clevrer_root/'annotations')
    data = CLEVRER(clevrer_root, 'train', CLEVRERConfig(**SHORT))
    assert data[0].labels is None and data.max_objects is None and not data.skipped
    missing = ' '.join(clevrer.check(clevrer_root, 'train', config=CLEVRERConfig(**SHORT)).missing)
    assert 'no masks' in missing and 'no truth about motion' in missing and '9,996 of the 10,000' in missing

def test_clevrer_in_a_loader(written):
    windows = open_clevrer(written['train'].folder, length=6, **SHORT)
    one, many = (list(Loader(windows, 4, workers=w).stream(0, 4)) for w in (0, 3))
    for a, b in zip(one, many): assert all((a[k] == b[k]).all() for k in ('video', 'labels', 'index'))
    whole = windows.dataset[1]
    i = int(np.flatnonzero(windows.where(np.arange(len(windows)))[0] == 1)[4])
    assert (windows[i].video == whole.video[4:10]).all() and (windows[i].labels == whole.labels[4:10]).all() and (windows[i].truth['location'] == whole.truth['location'][4:10]).all()
    assert windows.settings['colour'] == 'bgr' and windows.settings['window'] == dict(length=6, step=1, stride=1)
    json.dumps(windows.settings)

# ---- export

def test_what_cannot_be_written_is_named(tmp_path, collisions, balls):
    twins = collisions[0]
    truth = dict(twins.truth)
    for key in ('shape', 'colour', 'material'):
        truth[key] = truth[key].clone()
        truth[key][:, 1] = truth[key][:, 0]
    clips = ClipList([Clip(twins.video, twins.labels, truth, dict(name='twins')), collisions[0]], 'mixed')
    with pytest.warns(UserWarning, match='1 of 2 clips written as clevrer: 1 of .mixed. cannot be .twins has two objects'): out = export_as('clevrer', clips, tmp_path/'a', 2)
    assert out.clips == [1] and list(out.left_out) == [0] and out.names == ['video_00000']
    with pytest.raises(ValueError, match='no clip of .mixed. can be written'): export_as('clevrer', ClipList(clips.clips[:1], 'mixed'), tmp_path/'b')
    with pytest.raises(ValueError, match='has no present, shape'): export_as('clevrer', ClipList([Clip(twins.video, twins.labels)]), tmp_path/'c')
    with pytest.raises(FileExistsError, match='never overwrites'): export_as('clevrer', collisions, tmp_path/'a', 1)
    with pytest.raises(ValueError, match='clevrer'): export_as('clever', balls, tmp_path/'d')
    assert {'obj3d', 'clevrer'} <= set(WRITERS) and not (tmp_path/'b/videos').exists()

def test_a_killed_export_leaves_no_half_episode(tmp_path, balls, monkeypatch):
    from PIL import Image
    save, saved = Image.Image.save, []
    def dies(self, path, *a, **k):
        saved.append(path)
        if len(saved) == FRAMES + 3: raise KeyboardInterrupt
        return save(self, path, *a, **k)
    monkeypatch.setattr(Image.Image, 'save', dies)
    with pytest.raises(KeyboardInterrupt): export_as('obj3d', balls, tmp_path, 3, size=32)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path/'train').iterdir() if p.name.isdigit()] == ['0']
    assert len(OBJ3D(tmp_path, 'train', OBJ3DConfig(frames=FRAMES))) == 1, 'the half one is not an episode'
