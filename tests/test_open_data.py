"One door for all data: layouts are recognised by what lies there, never by a guess, and every written layout is opened by its path."
import json, re, shutil, warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from slotnb.core import project_root
from slotnb.data import clevrer, open as door
from slotnb.data.clevrer import CLEVRER, open_clevrer
from slotnb.data.clips import Clip, ClipList, Loader
from slotnb.data.converted import Converted
from slotnb.data.export import WRITERS, export_as
from slotnb.data.folder import Part
from slotnb.data.movi import MOVi
from slotnb.data.multi_object import VARIANTS
from slotnb.data.obj3d import OBJ3D, open_obj3d
from slotnb.data.open import LAYOUTS, locate, open_data, recognise
from slotnb.data.scenes import PRESETS, make_clip

for package in ('av', 'PIL', 'mujoco'): pytest.importorskip(package)
FRAMES = 12

def made(preset, n, **changes): return ClipList([make_clip(PRESETS[preset].but(**changes), 5, i) for i in range(n)], preset)

@pytest.fixture(scope='module')
def balls(): return made('obj3d', 4, frames=FRAMES, size=32)

@pytest.fixture(scope='module')
def collisions(): return made('clevrer', 5, frames=FRAMES, launch_frames=(0, 4))

@pytest.fixture(scope='module')
def pieces(): return made('tetrominoes', 8)

@pytest.fixture(scope='module')
def originals(tmp_path_factory, balls, collisions, pieces): # one folder for each layout
    home = tmp_path_factory.mktemp('sets')
    for split in ('train', 'val'):
        export_as('obj3d', balls, home/'OBJ3D', 3, split, size=64)
        export_as('clevrer', collisions, home/'CLEVRER', 2, split)
        export_as('movi', balls, home/'movi', 2, split, masks=8)
    export_as('tetrominoes', pieces, home/'tetrominoes')
    return home

@pytest.fixture
def home(originals, tmp_path): # a copy to harm
    return Path(shutil.copytree(originals, tmp_path/'sets'))

def same(a, b): return torch.equal(a.video, b.video) and (a.labels is None) == (b.labels is None) and (a.labels is None or torch.equal(a.labels, b.labels))

# ---- by its path alone

@pytest.mark.parametrize('name, layout, kind', [('OBJ3D', 'obj3d', OBJ3D), ('CLEVRER', 'clevrer', CLEVRER), ('movi', 'movi', MOVi)])
def test_a_layout_is_recognised_and_its_reader_opens_it(originals, name, layout, kind):
    path = originals/name
    assert recognise(path) == (layout, path) and locate(str(path)) == (layout, path)
    for data in (path, str(path), f'{layout}:{path}'):
        whole = open_data(data, 'train', **({} if layout == 'movi' else dict(frames=FRAMES)))
        assert type(whole) is kind and whole.lengths == [FRAMES]*len(whole)
    windows = open_data(path, 'val', length=4, frames=FRAMES, size=(16, 24))
    assert type(windows.dataset) is kind and windows[0].video.shape == (4, 3, 16, 24) and windows.dataset.split == 'val'
    batch = Loader(windows, 2, seed=0).batch(0)
    assert batch['video'].shape == (2, 4, 3, 16, 24) and (batch['labels'] is None) == (layout == 'obj3d') and windows.fingerprint
    json.dumps(windows.settings)

def test_it_is_the_reader_itself_with_its_conventions(originals):
    a, b = open_data(originals/'CLEVRER', length=6, frames=FRAMES, colour='bgr'), open_clevrer(originals/'CLEVRER', length=6, frames=FRAMES)
    assert a.fingerprint == b.fingerprint and a.settings == b.settings and a.settings['colour'] == 'bgr' and a.settings['antialias'] is False and a.settings['size'] == 64
    assert a.max_objects == 6 and same(a[3], b[3]) and len(a) == len(b)
    val = open_data(originals/'OBJ3D', 'val', length=6, frames=FRAMES)
    assert len(val) == 3 == len(open_obj3d(originals/'OBJ3D', 'val', length=6, frames=FRAMES)), 'published: the first window of an episode'
    assert len(open_data(originals/'OBJ3D', 'val', length=6, frames=FRAMES, stride=6)) == 6

def test_conventions_are_keywords(originals):
    read = lambda **more: open_data(originals/'CLEVRER', frames=FRAMES, **more)[0]
    assert torch.equal(read().video.flip(1), read(colour='bgr').video) and read().meta['colour'] == 'rgb' and clevrer.CLEVRERConfig().colour == 'bgr' and (read().video != read(antialias=True).video).any()
    assert read(masks='none').labels is None and read(size=None).video.shape[2:] == (64, 64) and read(size=32).video.shape[2:] == (32, 32)
    assert open_data(originals/'OBJ3D', frames=5).lengths == [5]*3
    assert len(open_data(originals/'OBJ3D', n=2, frames=FRAMES)) == 2 and len(open_data(originals/'OBJ3D', n=99, frames=FRAMES)) == 3
    assert open_data(originals/'movi', level='b').max_objects == 10

@pytest.mark.parametrize('name, wrong, allowed', [('OBJ3D', 'colour', 'antialias, frames, order, exclude, check'), ('CLEVRER', 'color', "Did you mean 'colour'"),
                                                 ('movi', 'root', 'level'), ('tetrominoes', 'fps', 'held_out'), ('files:OBJ3D', 'colour', 'max_frames')])
def test_an_unknown_keyword_names_what_is_allowed(originals, name, wrong, allowed):
    layout, _, folder = name.rpartition(':')
    with pytest.raises(ValueError, match=f'unknown setting of data read as .*{wrong}.*allowed are') as e: open_data((f'{layout}:' if layout else '') + str(originals/folder), **{wrong: 'x'})
    assert allowed in str(e.value)

def test_splits_that_a_layout_has_not(originals):
    with pytest.raises(ValueError, match='unknown split of OBJ3D .all.'): open_data(originals/'OBJ3D', 'all')
    with pytest.raises(ValueError, match="unknown split 'test'"): open_data(originals/'movi', 'test')

# ---- images in one file

def test_images_by_file_by_folder_and_by_name(originals, pieces, tmp_path):
    folder, more = originals/'tetrominoes', dict(root=tmp_path/'shards')
    file = folder/'tetrominoes_train.tfrecords'
    assert recognise(folder) == ('multi_object', file) == recognise(file)
    for data in (folder, file, f'tetrominoes:{folder}', f'tetrominoes:{file}', f'tetrominoes:{originals}', f'multi_object:{folder}'):
        read = open_data(data, 'all', **more)
        assert type(read) is Converted and all(same(read[i], pieces[i]) for i in range(8)), data
    train, val = (open_data(folder, s, length=1, held_out=3, **more) for s in ('train', 'val'))
    assert (len(train), len(val), train.max_objects) == (5, 3, 3) and torch.equal(val[2].video, pieces[2].video)
    assert open_data(folder, 'all', size=16, **more)[0].video.shape[2:] == (16, 16)
    with pytest.raises(ValueError, match='has 1 frames, but a window of 6'): open_data(folder, 'all', length=6, **more)
    with pytest.raises(FileNotFoundError, match='holds no file of clevr_with_masks .*To get it'): open_data(f'clevr6:{folder}', **more)
    with pytest.raises(ValueError, match='is no objects_room'): open_data(f'objects_room:{file}', **more)

def test_clevr6_is_the_published_crop(tmp_path):
    export_as('clevr_with_masks', made('obj3d', 3, frames=1, resting=(5, 7), size=64), tmp_path)
    one = {k: open_data(f'{k}:{tmp_path}', 'all', root=tmp_path/'shards') for k in ('clevr10', 'clevr_with_masks')}
    assert one['clevr10'][0].video.shape[2:] == (128, 128) and one['clevr_with_masks'][0].video.shape[2:] == (240, 320) and one['clevr10'].settings['config']['crop'] == [29, 64, 192, 192]
    assert open_data(f'clevr6:{tmp_path}', 'all', root=tmp_path/'shards', size=32).settings['config']['max_objects'] == 6

def test_several_files_are_a_question(originals, home, pieces):
    export_as('objects_room', made('obj3d', 2, frames=1, resting=(1, 2)), home/'tetrominoes')
    with pytest.raises(ValueError, match='more than one data set: .*objects_room_train.*tetrominoes_train') as e: open_data(home/'tetrominoes')
    for name in re.findall("'([a-z_0-9]+:[^']+)'", str(e.value))[:2]: assert locate(name)[1].is_file(), 'what the error proposes works'
    assert len(open_data(f'tetrominoes:{home}/tetrominoes', 'all', root=home/'shards')) == 8
    with pytest.raises(ValueError, match='holds 2 files that can be meant'): open_data(f'multi_object:{home}/tetrominoes')

def test_an_npz_is_a_users_own_unless_it_is_named(tmp_path, pieces):
    export_as('tetrominoes', pieces, tmp_path/'t', file='npz')
    path = tmp_path/'t/tetrominoes.npz'
    assert recognise(path) == ('files', path) and type(open_data(path)) is Part and all(same(open_data(path, 'all')[i], pieces[i]) for i in range(8))
    assert type(open_data(f'tetrominoes:{path}', 'all', root=tmp_path/'shards')) is Converted
    room = made('obj3d', 3, frames=1, resting=(1, 2))
    export_as('objects_room', room, tmp_path/'r', file='npz')
    read = open_data(tmp_path/'r/objects_room.npz', 'all', root=tmp_path/'shards')
    assert type(read) is Converted and all(same(read[i], room[i]) for i in range(3)), 'four of its masks are background'

# ---- settings in the text

def test_settings_can_stand_in_the_text(originals, tmp_path):
    by_text, by_word = open_data(f'{originals}/CLEVRER?frames={FRAMES}&colour=bgr&exclude=("video_00001",)', size=32), open_data(originals/'CLEVRER', frames=FRAMES, colour='bgr', exclude=('video_00001',), size=32)
    assert by_text.fingerprint == by_word.fingerprint and len(by_text) == 1 and by_text.settings == by_word.settings
    assert len(open_data(f'tetrominoes:{originals}/tetrominoes?held_out=3', 'val', root=tmp_path)) == 3
    assert len(open_data('tiny?workers=1', n=2, size=16, root=tmp_path)) == 2
    for text, says in ((f'{originals}/CLEVRER?frame=3', "'frame': allowed are .*Did you mean 'frames'"), (f'{originals}/CLEVRER?size=3', "'size': allowed are"), ('tiny?n=3', "'n': allowed are root, workers"),
                       (f'{originals}/CLEVRER?frames', 'each name once'), (f'{originals}/CLEVRER?', 'each name once'), (f'{originals}/CLEVRER?frames=3&frames=4', 'each name once')):
        with pytest.raises(ValueError, match=says): open_data(text)
    with pytest.raises(ValueError, match='frames is set behind the "."'): open_data(f'{originals}/CLEVRER?frames=3', frames=FRAMES)
    odd = tmp_path/'what?a=b'
    shutil.copytree(originals/'OBJ3D', odd)
    assert len(open_data(odd, frames=FRAMES)) == len(open_data(f'obj3d:{odd}', frames=FRAMES)) == len(open_data(f'{odd}?frames={FRAMES}')) == 3, 'a path that is there is a path'

def test_an_experiment_can_say_them(originals):
    from slotnb.training.recipes import material, recipe
    got = material(recipe('smoke'), (32, 32), f'clevrer:{originals}/CLEVRER?frames={FRAMES}&exclude=("video_00001",)')
    assert len(got.train.dataset) == 1 and got.has_masks and got.train.settings['colour'] == 'rgb' and got.held_out.dataset.lengths == [FRAMES]*2

@pytest.mark.parametrize('layout, options', [('obj3d', {}), ('clevrer', {}), ('clevrer', dict(frames='jpg')), ('movi', {}), ('tetrominoes', {}), ('tetrominoes', dict(file='npz')), ('tetrominoes', dict(file='hdf5'))])
def test_what_was_written_opens_with_what_the_writer_says(tmp_path, balls, collisions, pieces, layout, options):
    if options.get('file') == 'hdf5': pytest.importorskip('h5py')
    out = export_as(layout, dict(obj3d=balls, movi=balls, clevrer=collisions, tetrominoes=pieces)[layout], tmp_path/'set', **options)
    shards = dict(root=tmp_path/'shards') if layout == 'tetrominoes' else {}
    train = open_data(out.path, **out.settings, **shards)
    assert len(train) == len(out.names) - out.settings.get('held_out', 0) and train.lengths == [1 if layout == 'tetrominoes' else FRAMES]*len(train)
    if 'held_out' in out.settings: assert len(open_data(out.path, 'val', **out.settings, **shards)) == 1
    needed = {k: v for k, v in out.settings.items() if k in ('frames', 'held_out')}
    if needed: # and without them the error names them
        (k, v), = needed.items()
        with pytest.raises(ValueError, match=f'frames={v} ' if k == 'frames' else r'from number 100 \(held_out=100\), only 8 in all'): open_data(out.path, **shards)
    else: assert layout == 'movi' or options == dict(file='hdf5')

def test_clips_of_another_length_are_not_written_as_clevrer(tmp_path, collisions):
    from slotnb.data.clips import cut
    out = export_as('clevrer', ClipList([collisions[0], cut(collisions[1], 0, 5), collisions[1]], 'mixed'), tmp_path)
    assert out.clips == [0, 2] and 'has 5 frames, unlike the first one with 12' in out.left_out[1] and len(open_data(out.path, **out.settings)) == 2

# ---- what is not quite a layout

def refused(path, *words):
    with pytest.raises(ValueError) as e: open_data(path)
    for word in (*words, f"'files:{path}'"): assert word in str(e.value), f'{word!r} is not in: {e.value}'
    return str(e.value)

def test_a_part_of_a_layout_names_the_whole(home):
    for path, root, layout in (('OBJ3D/train', 'OBJ3D', 'obj3d'), ('OBJ3D/train/0', 'OBJ3D', 'obj3d'), ('CLEVRER/videos', 'CLEVRER', 'clevrer'), ('CLEVRER/videos/train', 'CLEVRER', 'clevrer'),
                               ('CLEVRER/videos/train/video_00000-01000', 'CLEVRER', 'clevrer'), ('movi/train/00000000', 'movi/train', 'movi')):
        refused(home/path, f"'{layout}:{home/root}'")
        assert recognise(home/root)[0] == layout

def test_the_folder_above_is_no_heap_of_films(home):
    text = refused(home, 'OBJ3D/ with train/0/test_1.png', 'CLEVRER/ with', 'movi/ with', 'tetrominoes_train.tfrecords')
    assert f"'clevrer:{home}/CLEVRER'" in text

def test_two_layouts_in_one_folder_are_a_question(home):
    shutil.copytree(home/'OBJ3D/train', home/'CLEVRER/train')
    refused(home/'CLEVRER', 'more than one', 'obj3d (train/0/test_1.png)', 'clevrer (videos/train/')
    assert type(open_data(f'clevrer:{home}/CLEVRER', frames=FRAMES)) is CLEVRER and type(open_data(f'obj3d:{home}/CLEVRER', frames=FRAMES)) is OBJ3D

def test_a_layout_whose_videos_are_lost(home):
    for split in ('train', 'val'): shutil.rmtree(home/'CLEVRER/videos'/split)
    refused(home/'CLEVRER', 'derender_proposals', 'but no videos/')
    with pytest.raises(FileNotFoundError, match='clevrer.csail.mit.edu'): open_data(f'clevrer:{home}/CLEVRER')
    shutil.rmtree(home/'CLEVRER/derender_proposals')
    refused(home/'CLEVRER', 'annotations/train/annotation_00000-01000')

def test_broken_samples_are_the_readers_business(home):
    (home/'OBJ3D/train/0/test_1.png').unlink()
    with pytest.warns(UserWarning, match='1 of 3 clips are broken and left out'): data = open_data(home/'OBJ3D', frames=FRAMES)
    assert [s.name for s in data.samples] == ['1', '2']
    for i in (1, 2): shutil.rmtree(home/f'OBJ3D/train/{i}'), (home/f'OBJ3D/train/{i}').mkdir()
    with pytest.raises(ValueError, match='nothing of OBJ3D train can be read'): open_data(home/'OBJ3D', frames=FRAMES)

def test_own_material_beside_a_packed_file(home):
    shutil.copy(home/'OBJ3D/train/0/test_1.png', home/'tetrominoes/still.png')
    refused(home/'tetrominoes', 'tetrominoes_train.tfrecords, beside still.png')
    (home/'films').mkdir()
    shutil.copy(home/'CLEVRER/videos/train/video_00000-01000/video_00000.mp4', home/'films/a.mp4')
    (home/'films/net').mkdir()
    (home/'films/net/weights.h5').write_bytes(b'x')
    assert recognise(home/'films')[0] == 'files', 'an .h5 deeper down is nobody'

def test_own_files_stay_own_files(home, tmp_path):
    video = home/'CLEVRER/videos/train/video_00000-01000/video_00000.mp4'
    own = open_data(video, 'all', size=32)
    assert type(own) is Part and own.max_objects is None
    assert (open_data(f'files:{home}/CLEVRER/videos/train', 'all', size=16)[0].video.float().mean((0, 2, 3)) - own[0].video.float().mean((0, 2, 3))).abs().max() < 2, 'RGB, as a heap of films is read'
    numbered = tmp_path/'mine/train/0'
    numbered.mkdir(parents=True)
    shutil.copy(home/'OBJ3D/train/0/test_1.png', numbered/'picture_1.png')
    assert recognise(tmp_path/'mine')[0] == 'files'
    assert open_data('tiny', n=2, length=4, size=16, root=tmp_path, workers=1).max_objects == 4

# ---- names

def test_names_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown layout 'obj3': allowed are files, obj3d.*Did you mean 'obj3d'"): open_data(f'obj3:{tmp_path}')
    with pytest.raises(ValueError, match="'obj3d:' lacks the path .*scenes are called 'obj3d'"): open_data('obj3d:')
    with pytest.raises(ValueError, match="Did you mean 'obj3d'.*there is none at"): open_data('obj3')
    with pytest.raises(FileNotFoundError, match='no/such does not exist'): open_data('clevrer:no/such')
    with pytest.raises(FileNotFoundError, match='Nothing is downloaded'): open_data('tetrominoes:no/such')
    with pytest.raises(ValueError, match="unknown layout 'https'"): open_data('https://example.org/video.mp4')
    (tmp_path/'a:b').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='holds nothing to read'): open_data('a:b')
    (tmp_path/'sess:x').mkdir()
    assert locate('sess:x')[0] == 'files', 'a path that is there is a path'

def test_every_layout_has_a_reader_and_every_writer_a_layout():
    assert set(WRITERS) <= set(LAYOUTS) and set(VARIANTS) <= set(LAYOUTS)
    for name, layout in LAYOUTS.items(): assert callable(layout.open) and 'size' not in layout.settings, name

def test_only_names_are_read_to_recognise(originals, monkeypatch):
    for name in ('open', 'read_bytes', 'read_text'): monkeypatch.setattr(Path, name, lambda *a, **k: pytest.fail('a file was opened'))
    assert [recognise(originals/n)[0] for n in ('OBJ3D', 'CLEVRER', 'movi', 'tetrominoes')] == ['obj3d', 'clevrer', 'movi', 'multi_object']

# ---- writers

@pytest.mark.parametrize('style', ['steve', 'kubric'])
def test_movi_comes_back_through_the_door(tmp_path, balls, style):
    out = export_as('movi', balls, tmp_path, style=style, masks=9)
    export_as('movi', balls, tmp_path, 1, 'test', style=style, masks=9)
    data = open_data(tmp_path)
    assert out.clips == [0, 1, 2, 3] and out.names == [s.name for s in data.samples] and all(same(data[i], balls[i]) for i in range(4)) and len(open_data(tmp_path, 'test')) == 1
    with pytest.raises(FileExistsError): export_as('movi', balls, tmp_path, 1, style=style, masks=9)
    if style == 'steve':
        with pytest.raises(ValueError, match='no clip of .obj3d. can be written as movi: .* more than 1'): export_as('movi', balls, tmp_path/'few', masks=2)

@pytest.mark.parametrize('file', ['tfrecords', 'hdf5', 'npz'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_multi_object_variant_comes_back_through_the_door(tmp_path, variant, file):
    if file == 'hdf5': pytest.importorskip('h5py')
    v, rng = VARIANTS[variant], np.random.default_rng(0)
    def clip(i):
        image = np.broadcast_to(rng.integers(0, 256, (v.image[2], *v.image[:2])), (3, *v.image[:2])).astype(np.uint8)
        return Clip(torch.from_numpy(image.copy())[None], torch.from_numpy(rng.integers(0, v.objects + 1, (1, *v.image[:2])).astype(np.uint8)), {}, dict(name=str(i)))
    clips = ClipList([clip(i) for i in range(3)], 'noise')
    out = export_as(variant, clips, tmp_path/'set', file=file)
    assert out.names == ['0', '1', '2'] and out.clips == [0, 1, 2]
    data = open_data(f'{variant}:{tmp_path}/set', 'train' if file == 'hdf5' else 'all', root=tmp_path/'shards')
    assert data.settings['variant'] == variant and data.max_objects == v.objects and all(same(data[i], clips[i]) for i in range(3))
    if file != 'npz': assert recognise(tmp_path/'set')[0] == 'multi_object'

def test_what_an_image_set_cannot_hold_is_left_out_by_name(tmp_path):
    clips = made('obj3d', 4, frames=1, resting=(2, 4))
    few = [i for i in range(4) if clips[i].labels.max() <= 3]
    assert 0 < len(few) < 4
    out = export_as('objects_room', clips, tmp_path)
    assert out.clips == few and all('objects_room holds 3 at most' in why for why in out.left_out.values()) and len(out.left_out) == 4 - len(few)
    with pytest.raises(ValueError, match='has colours, multi_dsprites_binarized holds grey'): export_as('multi_dsprites_binarized', clips, tmp_path)
    with pytest.raises(ValueError, match='has no labels'): export_as('tetrominoes', ClipList([Clip(clips[0].video)]), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['objects_room_train.tfrecords'], 'nothing is left of what failed'

def test_splits_of_an_hdf5(tmp_path, pieces):
    pytest.importorskip('h5py')
    for split, n in (('train', 5), ('val', 2), ('test', 1)): export_as('tetrominoes', pieces, tmp_path, n, split, file='hdf5')
    assert [len(open_data(tmp_path, s, root=tmp_path/'shards')) for s in ('train', 'val', 'test')] == [5, 2, 1]
    with pytest.raises(FileExistsError): export_as('tetrominoes', pieces, tmp_path, 2, 'val', file='hdf5')
    with pytest.raises(ValueError, match='has no splits'): export_as('tetrominoes', pieces, tmp_path/'x', 2, 'val')

def test_a_killed_movi_export_leaves_no_half_video(tmp_path, balls, monkeypatch):
    from PIL import Image
    save, saved = Image.Image.save, []
    def dies(self, path, *a, **k):
        saved.append(path)
        if len(saved) == FRAMES*9 + 30: raise KeyboardInterrupt
        return save(self, path, *a, **k)
    monkeypatch.setattr(Image.Image, 'save', dies)
    with pytest.raises(KeyboardInterrupt): export_as('movi', balls, tmp_path, 2, masks=8)
    monkeypatch.undo()
    assert [s.name for s in open_data(tmp_path).samples] == ['00000000']

# ---- the experiment

@pytest.mark.parametrize('name', ['OBJ3D', 'CLEVRER', 'movi', 'tetrominoes'])
def test_the_experiment_takes_each_layout(originals, tmp_path, name, monkeypatch):
    "The cells of 10_decomposition to its end, on files as published but for their number of frames."
    pytest.importorskip('matplotlib').use('Agg')
    from matplotlib import pyplot as plt
    from slotnb.data import multi_object, obj3d
    monkeypatch.setenv('SLOTNB_DATA', str(tmp_path))
    short = lambda config: (lambda values: config.from_dict(dict(values, frames=FRAMES)))
    for module, config in ((obj3d, 'OBJ3DConfig'), (clevrer, 'CLEVRERConfig')): monkeypatch.setattr(module, config, type(config, (), dict(from_dict=staticmethod(short(getattr(module, config))))))
    monkeypatch.setitem(LAYOUTS, 'multi_object', door.Layout(lambda *a, **k: door._open_images(*a, held_out=2, **k), multi_object.MultiObjectConfig))
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in nbformat.read(project_root()/'nbs/experiments/10_decomposition.ipynb', 4).cells:
        if cell.cell_type != 'code': continue
        exec(cell.source.replace('import Image, display', 'import Image'), space)
        if 'parameters' in cell.metadata.get('tags', []):
            given = dict(device='cpu', compare='none', steps=2, data=str(originals/name), runs_dir=str(tmp_path/'runs'), slots=7)
            space.update(given, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in given.items())])
    plt.close('all')
    metrics = json.loads((space['this'].folder/'metrics.json').read_text())
    assert (metrics.get('fg_ari.decoder.clip') is None) == (name == 'OBJ3D') and metrics['mse_pixel.decoder.frame'] > 0
