"TFRecord, the multi-object data sets and MOVi: the formats as published, exact round trips, and every fault named."
import bz2, gzip, itertools, re, sys, tracemalloc, types, warnings, zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from slotnb.core import real_data_dir
from slotnb.data import converted, movi, multi_object as mo, tfrecord as tf
from slotnb.data.clips import Loader, Windows
from slotnb.data.files import BrokenFile
from slotnb.data.scenes import PRESETS, make_clip

TETROMINOES = real_data_dir()/'tetrominoes/tetrominoes5.npz'

def noise(v, seed=0):
    "A record of a variant with every number drawn, as the writer takes it."
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, v.masks, v.image[:2])
    return dict(image=rng.integers(0, 256, v.image).astype(np.uint8), mask=((owner == np.arange(v.masks)[:, None, None])*255).astype(np.uint8),
                **{k: rng.normal(size=(v.masks, n) if n > 1 else v.masks).astype(np.float32) for k, n in v.factors},
                **{k: rng.integers(0, 9, v.masks).astype(np.uint8) for k in v.codes})

@pytest.fixture
def pieces(): return [mo.example_of(make_clip(PRESETS['tetrominoes'], 0, i), 'tetrominoes') for i in range(12)]

@pytest.fixture
def quiet(monkeypatch): warnings.simplefilter('ignore')

def all_of(path, tmp_path, **kwargs): return mo.open_multi_object(path, split='all', root=tmp_path/'shards', **kwargs)

def same(example, clip, background=1):
    image = torch.from_numpy(np.broadcast_to(example['image'], (*example['image'].shape[:2], 3)).copy()).permute(2, 0, 1)
    return torch.equal(image, clip.video[0]) and np.array_equal(np.maximum(0, example['mask'].argmax(0) - background + 1), clip.labels[0].numpy())

# ---------------------------------------------------------------- the format, against others' implementations

def test_checksum_is_the_one_of_tensorboard():
    theirs = pytest.importorskip('tensorboard.compat.tensorflow_stub.pywrap_tensorflow')
    rng = np.random.default_rng(0)
    for n in (0, 1, 8, 64, 65, 1000, 4099, 70_001):
        data = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
        assert tf.masked_crc(data) == theirs.masked_crc32c(data), n

def test_records_pass_between_tensorboard_and_us(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
    from tensorboard.summary.writer.record_writer import RecordWriter
    records = [b'first', b'', bytes(range(256))*100]
    with open(tmp_path/'theirs', 'wb') as f:
        writer = RecordWriter(f)
        for r in records: writer.write(r)
        writer.flush()
    assert list(tf.read_records(tmp_path/'theirs')) == records
    tf.write_records(tmp_path/'ours', records, compress=False)
    assert (tmp_path/'ours').read_bytes() == (tmp_path/'theirs').read_bytes()
    reader, got = PyRecordReader_New(str(tmp_path/'ours')), []
    for _ in records:
        reader.GetNext()
        got.append(reader.record())
    assert got == records

def protobuf_example():
    "`tf.train.Example` as google's protobuf knows it, built from its description."
    pb, pool = pytest.importorskip('google.protobuf.descriptor_pb2'), pytest.importorskip('google.protobuf.descriptor_pool').DescriptorPool()
    factory = pytest.importorskip('google.protobuf.message_factory')
    file = pb.FileDescriptorProto(name='example.proto', package='t', syntax='proto3')
    def message(name, *fields):
        m = file.message_type.add(name=name)
        for number, (field, label, kind, of) in enumerate(fields, 1):
            f = m.field.add(name=field, number=number, label=label, type=kind)
            if of: f.type_name = f'.t.{of}'
        return m
    many, one, F = 3, 1, pb.FieldDescriptorProto
    message('BytesList', ('value', many, F.TYPE_BYTES, None))
    message('FloatList', ('value', many, F.TYPE_FLOAT, None))
    message('Int64List', ('value', many, F.TYPE_INT64, None))
    feature = message('Feature', ('bytes_list', one, F.TYPE_MESSAGE, 'BytesList'), ('float_list', one, F.TYPE_MESSAGE, 'FloatList'), ('int64_list', one, F.TYPE_MESSAGE, 'Int64List'))
    feature.oneof_decl.add(name='kind')
    for f in feature.field: f.oneof_index = 0
    features = message('Features', ('feature', many, F.TYPE_MESSAGE, 'Features.FeatureEntry'))
    entry = features.nested_type.add(name='FeatureEntry')
    entry.field.add(name='key', number=1, label=one, type=F.TYPE_STRING)
    entry.field.add(name='value', number=2, label=one, type=F.TYPE_MESSAGE, type_name='.t.Feature')
    entry.options.map_entry = True
    message('Example', ('features', one, F.TYPE_MESSAGE, 'Features'))
    pool.Add(file)
    return factory.GetMessageClass(pool.FindMessageTypeByName('t.Example'))()

def test_examples_pass_between_protobuf_and_us():
    theirs, rng = protobuf_example(), np.random.default_rng(0)
    image, x, ids = rng.integers(0, 256, 500).astype(np.uint8), rng.normal(size=7).astype(np.float32), np.array([-1, 0, 300, -2**62])
    theirs.features.feature['image'].bytes_list.value.extend(bytes([v]) for v in image)
    theirs.features.feature['x'].float_list.value.extend(x.tolist())
    theirs.features.feature['ids'].int64_list.value.extend(ids.tolist())
    theirs.features.feature['names'].bytes_list.value.extend([b'', b'two', b'x'*300])
    got = tf.parse_example(theirs.SerializeToString())
    assert np.array_equal(got['image'], image) and np.array_equal(got['x'], x) and np.array_equal(got['ids'], ids) and got['names'] == [b'', b'two', b'x'*300]
    back = protobuf_example()
    back.ParseFromString(tf.example_bytes(got))
    assert back.features.feature['names'].bytes_list.value[1] == b'two' and list(back.features.feature['ids'].int64_list.value) == ids.tolist()
    assert b''.join(back.features.feature['image'].bytes_list.value) == image.tobytes() and np.array_equal(np.float32(back.features.feature['x'].float_list.value), x)

def test_unpacked_numbers_are_read():
    floats = b''.join(b'\x0d' + np.float32(v).tobytes() for v in (1, -2.5))
    data = tf._delimited(1, tf._delimited(1, tf._delimited(1, b'x') + tf._delimited(2, tf._delimited(2, floats))) +
                         tf._delimited(1, tf._delimited(1, b'n') + tf._delimited(2, tf._delimited(3, b'\x08\x05\x08\xac\x02'))))
    got = tf.parse_example(data)
    assert got['x'].tolist() == [1, -2.5] and got['n'].tolist() == [5, 300]

@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_no_example_and_no_crash(data):
    try: assert isinstance(tf.parse_example(data), dict)
    except ValueError as e: assert 'tf.train.Example' in str(e)

@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.one_of(st.lists(st.binary(max_size=4), min_size=1, max_size=5),
       st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(np.float32), st.lists(st.integers(-2**63, 2**63 - 1), max_size=5).map(lambda v: np.array(v, np.int64))), max_size=4))
def test_example_round_trip(features):
    got = tf.parse_example(tf.example_bytes(features))
    assert got.keys() == features.keys()
    for k, v in features.items():
        if isinstance(v, list): assert (got[k] if isinstance(got[k], list) else [bytes([b]) for b in got[k]]) == v
        else: assert np.array_equal(got[k], v)

# ---------------------------------------------------------------- round trips

@pytest.mark.parametrize('name', mo.VARIANTS)
def test_every_variant_comes_back_exactly(name, tmp_path):
    v = mo.VARIANTS[name]
    examples, path = [noise(v, i) for i in range(3)], tmp_path/f'{name}.tfrecords'
    assert mo.write_multi_object(path, name, examples) == 3 and tf.compression(path) == 'gzip'
    data = all_of(path, tmp_path)
    assert len(data) == 3 and data.settings['variant'] == name and data.max_objects == v.objects and data.skipped == [] and data.lengths == [1]*3
    for e, c in zip(examples, map(data.__getitem__, range(3))):
        assert same(e, c, v.background)
        for k in (*dict(v.factors), *v.codes): assert np.array_equal(e[k][v.background:], c.truth[k][0].numpy()), k
    batch = Loader(Windows(data, 1), 2, seed=1).batch(0)
    assert batch['video'].shape == (2, 1, 3, *v.image[:2]) and batch['labels'].dtype == torch.uint8

@pytest.mark.parametrize('name', ['tetrominoes', 'clevr_with_masks', 'multi_dsprites_binarized'])
def test_one_string_for_all_bytes_is_read_alike(name, tmp_path):
    v = mo.VARIANTS[name]
    examples = [noise(v, i) for i in range(2)]
    stored = [dict(e, mask=np.moveaxis(e['mask'], 0, -1) if v.masks_last else e['mask']) for e in examples]
    one = [{k: [x.tobytes()] if x.dtype == np.uint8 else x for k, x in e.items()} for e in stored]
    tf.write_records(tmp_path/'one.tfrecords', map(tf.example_bytes, one))
    mo.write_multi_object(tmp_path/'many.tfrecords', name, examples)
    a, b = (all_of(tmp_path/f'{x}.tfrecords', tmp_path) for x in ('one', 'many'))
    assert a.settings['variant'] == name and not a.skipped and all(torch.equal(a[i].video, b[i].video) and torch.equal(a[i].labels, b[i].labels) for i in range(2))
    assert all(torch.equal(a[1].truth[k], b[1].truth[k]) for k in b[1].truth) and mo.check(tmp_path/'one.tfrecords', name, 'decode').ok
    tf.write_records(tmp_path/'few.tfrecords', [tf.example_bytes(dict(one[0], image=[b'too few']))])
    with pytest.raises(BrokenFile, match='image.* of uint8 7 instead of uint8'): all_of(tmp_path/'few.tfrecords', tmp_path, variant=name)

def test_factors_lie_where_efficientmorl_has_them(pieces, tmp_path):
    h5py = pytest.importorskip('h5py', reason='h5py is not installed')
    mo.write_multi_object(tmp_path/'tetrominoes.h5', 'tetrominoes', pieces)
    with h5py.File(tmp_path/'tetrominoes.h5', 'r') as f: assert set(f['train']) == {'imgs', 'masks', 'factors'} and set(f['train/factors']) == {'x', 'y', 'shape', 'visibility', 'color'}
    got = mo.open_multi_object(tmp_path/'tetrominoes.h5', split='train', root=tmp_path/'shards')
    for i, e in enumerate(pieces): assert all(np.array_equal(got[i].truth[k][0], e[k][1:]) for k in ('x', 'y', 'shape', 'visibility', 'color'))
    image, mask = np.stack([e['image'] for e in pieces]), np.stack([e['mask'] for e in pieces])
    for name, factors in (('unnamed', {'factors': np.random.default_rng(0).normal(size=(12, 4, 5)).astype(np.float32)}), ('more', {'factors/speed': np.arange(48, dtype=np.float32).reshape(12, 4), 'factors/light': np.arange(12)}),
                          ('beside', dict(x=np.stack([e['x'] for e in pieces])))):
        with h5py.File(tmp_path/f'tetrominoes-{name}.h5', 'w') as f:
            for k, v in dict(imgs=image, masks=mask[..., None], **factors).items(): f[f'train/{k}'] = v
        clip = mo.open_multi_object(tmp_path/f'tetrominoes-{name}.h5', split='train', root=tmp_path/'shards')[3]
        if name == 'unnamed': assert np.array_equal(clip.truth['factors'][0], factors['factors'][3, 1:])
        if name == 'more': assert clip.truth['speed'].tolist() == [[13, 14, 15]] and clip.truth['light'].tolist() == [3]
        if name == 'beside': assert np.array_equal(clip.truth['x'][0], pieces[3]['x'][1:])
    with h5py.File(tmp_path/'flat.h5', 'w') as f:
        for k, v in {'imgs': image, 'masks': mask[..., None], 'factors/x': np.stack([e['x'] for e in pieces])}.items(): f[k] = v
    assert mo.check(tmp_path/'flat.h5').ok, 'a group of factors is no split'

def test_bytes_of_a_record_are_the_published_ones(tmp_path):
    "One-byte entries, masks (K, H, W), but (H, W, K) in Multi-dSprites; CLEVR's codes are bytes."
    for name in ('clevr_with_masks', 'multi_dsprites_colored_on_colored'):
        v = mo.VARIANTS[name]
        e, path = noise(v), tmp_path/f'{name}.tfrecords'
        mo.write_multi_object(path, name, [e])
        record = next(tf.read_records(path))
        got, (h, w, _) = tf.parse_example(record), v.image
        assert len(record) > 3*(v.image[0]*v.image[1]*(v.image[2] + v.masks))
        stored = got['mask'].reshape((h, w, v.masks) if v.masks_last else (v.masks, h, w))
        assert np.array_equal(stored.transpose(2, 0, 1) if v.masks_last else stored, e['mask'])
        for k in v.codes: assert got[k].dtype == np.uint8 and got[k].tolist() == e[k].tolist()
        for k, n in v.factors: assert got[k].dtype == np.float32 and got[k].size == n*v.masks

def test_bare_and_gzipped_are_told_by_their_bytes(pieces, tmp_path):
    for compress in (True, False):
        mo.write_multi_object(tmp_path/'a.tfrecords', 'tetrominoes', pieces, compress=compress)
        assert tf.compression(tmp_path/'a.tfrecords') == ('gzip' if compress else 'none')
        data = all_of(tmp_path/'a.tfrecords', tmp_path)
        assert all(same(e, data[i]) for i, e in enumerate(pieces))

def test_npz_equals_tfrecord(pieces, tmp_path):
    mo.write_multi_object(tmp_path/'tetrominoes.npz', 'tetrominoes', pieces)
    mo.write_multi_object(tmp_path/'tetrominoes.tfrecords', 'tetrominoes', pieces)
    a, b = (all_of(tmp_path/f'tetrominoes.{x}', tmp_path) for x in ('npz', 'tfrecords'))
    assert a.max_objects == b.max_objects == 3 and a.fingerprint != b.fingerprint
    for x, y in zip(map(a.__getitem__, range(12)), map(b.__getitem__, range(12))):
        assert torch.equal(x.video, y.video) and torch.equal(x.labels, y.labels) and x.truth.keys() == y.truth.keys()
        assert all(torch.equal(x.truth[k], y.truth[k]) for k in x.truth)

@pytest.mark.skipif(not TETROMINOES.is_file(), reason=f'the real Tetrominoes are not there: {TETROMINOES}')
def test_real_tetrominoes(tmp_path):
    z, data = np.load(TETROMINOES), all_of(TETROMINOES, tmp_path, variant='tetrominoes')
    for i in range(5):
        assert np.array_equal(data[i].video[0].permute(1, 2, 0), z['image'][i]) and np.array_equal(data[i].labels[0], z['true_mask'][i].argmax(0))
        assert data[i].labels.flatten().bincount().tolist() == [925, 100, 100, 100] and data[i].truth['present'].all()
    assert data.max_objects == 3 and mo.check(TETROMINOES, 'tetrominoes', 'decode').ok
    examples = [dict(noise(mo.VARIANTS['tetrominoes']), image=x, mask=m.astype(np.uint8)*255) for x, m in zip(z['image'], z['true_mask'])]
    mo.write_multi_object(tmp_path/'tetrominoes_train.tfrecords', 'tetrominoes', examples)
    again = all_of(tmp_path/'tetrominoes_train.tfrecords', tmp_path)
    assert all(torch.equal(data[i].video, again[i].video) and torch.equal(data[i].labels, again[i].labels) for i in range(5))

class Group(dict):
    "As much of h5py's File and Group as the reader uses."
    def __init__(self, path, mode='r'):
        try:
            with np.load(path) as z: named = {k: z[k] for k in z.files}
        except ValueError: raise OSError('file signature not found')
        for k, v in named.items():
            *groups, name = k.split('/')
            at = self
            for group in groups: at = at.setdefault(group, {})
            at[name] = v
    def close(self): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass

@pytest.mark.parametrize('real', [False, True], ids=['stand-in', 'h5py'])
def test_hdf5_layouts(real, pieces, tmp_path, monkeypatch):
    "Groups with imgs and masks (EfficientMORL), and image with integer mask (object-centric-library)."
    image, mask = np.stack([e['image'] for e in pieces]), np.stack([e['mask'] for e in pieces])
    visible = np.stack([e['visibility'] for e in pieces])
    files = {'grouped.h5': {'train/imgs': image[:8], 'train/masks': mask[:8, ..., None], 'test/imgs': image[8:].astype(np.float32), 'test/masks': mask[8:, ..., None].astype(np.float32)},
             'tetrominoes-full.hdf5': dict(image=image, mask=mask.argmax(1)[..., None], visibility=visible)}
    if real:
        h5py = pytest.importorskip('h5py', reason='h5py is not installed: only the stand-in was tested')
        for name, arrays in files.items():
            with h5py.File(tmp_path/name, 'w') as f:
                for k, v in arrays.items(): f[k] = v
        mo.write_multi_object(tmp_path/'written.h5', 'tetrominoes', pieces)
        data = mo.open_multi_object(tmp_path/'written.h5', split='train', root=tmp_path/'shards')
        assert all(same(e, data[i]) for i, e in enumerate(pieces))
    else:
        monkeypatch.setitem(sys.modules, 'h5py', types.SimpleNamespace(File=Group))
        for name, arrays in files.items():
            with open(tmp_path/name, 'wb') as f: np.savez(f, **arrays)
    train, test = (mo.open_multi_object(tmp_path/'grouped.h5', split=s, root=tmp_path/'shards') for s in ('train', 'test'))
    assert len(train) == 8 and len(test) == 4 and train.max_objects == 3 and same(pieces[0], train[0]) and same(pieces[9], test[1])
    with pytest.raises(ValueError, match="unknown split 'val' of .*grouped.h5: it has t"): mo.open_multi_object(tmp_path/'grouped.h5', split='val', root=tmp_path/'shards')
    whole = all_of(tmp_path/'tetrominoes-full.hdf5', tmp_path)
    assert all(same(e, whole[i]) for i, e in enumerate(pieces)) and whole[0].truth['visibility'].shape == (1, 3)
    assert sum(mo.check(tmp_path/'grouped.h5', how='decode').found.values()) == 12
    (tmp_path/'no.h5').write_bytes(b'no HDF5')
    with pytest.raises(BrokenFile, match='no.h5 cannot be read as HDF5'): all_of(tmp_path/'no.h5', tmp_path)

# ---------------------------------------------------------------- settings

def test_splits_crop_filter(tmp_path):
    scenes = [make_clip(PRESETS['obj3d'].but(frames=1, size=64, resting=(1, 5)), 3, i) for i in range(6)]
    examples = [mo.example_of(c, 'clevr_with_masks') for c in scenes]
    path = tmp_path/'clevr_with_masks_train.tfrecords'
    mo.write_multi_object(path, 'clevr_with_masks', examples)
    plain, cut = all_of(path, tmp_path), all_of(path, tmp_path, crop=(29, 64, 192, 192))
    for i in range(6):
        assert torch.equal(cut[i].video, plain[i].video[..., 29:221, 64:256]) and torch.equal(cut[i].labels, plain[i].labels[..., 29:221, 64:256])
    counts = [int(e['visibility'][1:].sum()) for e in examples]
    limit = sorted(counts)[3]
    few = all_of(path, tmp_path, max_objects=limit)
    kept = [i for i, c in enumerate(counts) if c <= limit]
    assert [int(c.truth['record']) for c in map(few.__getitem__, range(len(few)))] == kept and few.filtered == 6 - len(kept) == few.settings['filtered'] and few.skipped == []
    assert all_of(path, tmp_path, config=mo.CLEVR)[0].video.shape == (1, 3, 128, 128)
    val, train = (mo.open_multi_object(path, split=s, held_out=2, root=tmp_path/'shards') for s in ('val', 'train'))
    assert [int(d[i].truth['record']) for d in (val, train) for i in range(len(d))] == list(range(6))

def test_overlap_rule_reaches_the_labels(pieces, tmp_path):
    both = dict(pieces[0], mask=pieces[0]['mask'].copy())
    both['mask'][3][both['mask'][1] > 0] = 255
    mo.write_multi_object(tmp_path/'a.tfrecords', 'tetrominoes', [both])
    first, last = (all_of(tmp_path/'a.tfrecords', tmp_path, overlap=o)[0].labels[0].numpy() for o in ('first', 'last'))
    there = both['mask'][1] > 0
    assert (first[there] == 1).all() and (last[there] == 3).all() and (first[~there] == last[~there]).all()

def test_settings_are_checked(pieces, tmp_path):
    path = tmp_path/'a.tfrecords'
    mo.write_multi_object(path, 'tetrominoes', pieces)
    with pytest.raises(ValueError, match="field of MultiObjectConfig 'croop'.*Did you mean 'crop'"): all_of(path, tmp_path, croop=1)
    with pytest.raises(ValueError, match="variant 'tetrominos'.*Did you mean 'tetrominoes'"): all_of(path, tmp_path, variant='tetrominos')
    with pytest.raises(ValueError, match='split of a.tfrecords'): mo.open_multi_object(path, split='test', root=tmp_path)
    with pytest.raises(ValueError, match='20 samples are asked for, but there are 12'): all_of(path, tmp_path, n=20)
    with pytest.raises(BrokenFile, match='no sample to read from number 100'): mo.open_multi_object(path, split='train', root=tmp_path)
    with pytest.raises(ValueError, match='crop .* does not fit into 35x35'): all_of(path, tmp_path, crop=(0, 0, 36, 35))
    with pytest.raises(FileNotFoundError, match='nothing.tfrecords is no file .expected: tetrominoes.*gs://multi-object'): all_of(tmp_path/'nothing.tfrecords', tmp_path, variant='tetrominoes')
    with pytest.raises(ValueError, match="an example has 'x' of float32 3 instead of float32 4"): mo.write_multi_object(path, 'tetrominoes', [dict(pieces[0], x=np.zeros(3, np.float32))])
    assert len(all_of(path, tmp_path)) == 12 # the failed writer left the old file

# ---------------------------------------------------------------- faults

@pytest.mark.parametrize('compress', [True, False], ids=['gzip', 'bare'])
def test_every_cut_is_named_and_costs_only_what_it_must(compress, pieces, tmp_path, quiet):
    path = tmp_path/'whole.tfrecords'
    mo.write_multi_object(path, 'tetrominoes', pieces, compress=compress)
    raw = path.read_bytes()
    for part in (.3, .6, .9, 1):
        cut = tmp_path/f'cut{part}.tfrecords'
        cut.write_bytes(raw[:int(part*len(raw)) - 5])
        data = all_of(cut, tmp_path)
        assert all(same(pieces[i], data[i]) for i in range(len(data)))
        assert len(data.skipped) == 1 and re.search(rf'{cut.name}: the file is cut off before the end of record {len(data)}', data.skipped[0])
        assert len(data) >= (11 if part == 1 else 1)
        assert not mo.check(cut, how='whole').ok and not mo.check(cut, how='decode').ok

def test_flipped_bits(pieces, tmp_path, quiet):
    path = tmp_path/'a.tfrecords'
    mo.write_multi_object(path, 'tetrominoes', pieces, compress=False)
    raw, size = path.read_bytes(), len(next(tf.read_records(path))) + 16
    for at, left, words in ((4*size + 12 + 900, 11, 'record 4 is damaged'), (4*size + 2, 4, 'length of record 4 is damaged'), (4*size + 9, 4, 'length of record 4'), (5*size - 1, 11, 'record 4 is damaged')):
        hurt = bytearray(raw)
        hurt[at] ^= 16
        broken = tmp_path/f'flip{at}.tfrecords'
        broken.write_bytes(hurt)
        with pytest.warns(UserWarning, match=words): data = all_of(broken, tmp_path)
        assert len(data) == left and len(data.skipped) == 1 and broken.name in data.skipped[0] and words in data.skipped[0]
        assert [int(c.truth['record']) for c in map(data.__getitem__, range(left))] == [i for i in range(12) if i != 4][:left]
        assert all(same(pieces[int(c.truth['record'])], c) for c in map(data.__getitem__, range(left)))

def test_a_flipped_bit_inside_gzip_never_becomes_a_picture(pieces, tmp_path, quiet):
    path = tmp_path/'a.tfrecords'
    mo.write_multi_object(path, 'tetrominoes', pieces)
    raw, rng, lost = path.read_bytes(), np.random.default_rng(0), 0
    for i in range(25):
        hurt = bytearray(raw)
        hurt[int(rng.integers(20, len(raw) - 8))] ^= 1 << int(rng.integers(8))
        path.write_bytes(hurt)
        items = list(tf.read_records(path))
        good = [tf.parse_example(x) for x in items if isinstance(x, bytes)]
        assert any(isinstance(x, BrokenFile) for x in items)
        assert all(any(np.array_equal(g['image'], e['image'].ravel()) for e in pieces) for g in good)
        lost += 12 - len(good)
    assert lost

@pytest.mark.parametrize('kind, words', [('zlib', 'looks like zlib'), ('bz2', 'looks like bzip2'), ('html', 'looks like a web page'), ('npz', 'looks like a zip'), ('empty', r'is empty \(0 bytes\)'),
                                         ('noise', 'neither gzipped nor bare'), ('text in gzip', 'no TFRecord inside the gzip')])
def test_what_is_no_tfrecord_is_named_with_what_was_expected(kind, words, tmp_path):
    inside = b'\x00'*20 + b'some bytes'
    content = dict(zlib=zlib.compress(inside), bz2=bz2.compress(inside), html=b'<!DOCTYPE html><title>404</title>', npz=b'PK\x03\x04' + inside, empty=b'', noise=bytes(range(50)))
    path = tmp_path/'tetrominoes_train.tfrecords'
    path.write_bytes(content.get(kind, gzip.compress(b'this is no record at all')))
    with pytest.raises(BrokenFile, match=rf'(?s)tetrominoes_train.tfrecords.*expected: tetrominoes|tetrominoes_train.tfrecords.*{words}') as e: all_of(path, tmp_path, variant='tetrominoes')
    assert re.search(words, str(e.value)) and 'expected: tetrominoes' in str(e.value)
    assert re.search(words, mo.check(path, 'tetrominoes').broken[path.name])

def test_another_data_sets_file_is_refused_by_both_names(tmp_path):
    path = tmp_path/'tetrominoes_train.tfrecords'
    mo.write_multi_object(path, 'objects_room', [noise(mo.VARIANTS['objects_room'])])
    with pytest.raises(BrokenFile, match="is no tetrominoes: its first readable record has 'image' of uint8 12288 instead of uint8 3675. It looks like objects_room"): all_of(path, tmp_path, variant='tetrominoes')
    tf.write_records(path, [tf.example_bytes(dict(a=np.zeros(3, np.uint8)))])
    with pytest.raises(BrokenFile, match=r"none of the known variants: its first readable record features \{'a': 3\}"): all_of(path, tmp_path)
    with pytest.raises(BrokenFile, match="has no feature 'image', only \\['a'\\]"): all_of(path, tmp_path, variant='tetrominoes')

def test_records_that_do_not_fit_are_skipped_by_name(pieces, tmp_path, quiet):
    def flat(e): return tf.example_bytes(e)
    bad = [flat({k: v for k, v in pieces[1].items() if k != 'mask'}), flat(dict(pieces[2], x=np.float32([1, np.nan, 0, 0]))), flat(dict(pieces[3], image=pieces[3]['image'][:-1])), b'no example',
           flat(dict(pieces[5], shape=np.arange(4)))]
    path = tmp_path/'a.tfrecords'
    tf.write_records(path, [flat(pieces[0]), *bad, *map(flat, pieces[6:])])
    data = all_of(path, tmp_path)
    assert len(data) == 7 and len(data.skipped) == 5 == data.settings['skipped'] and [int(c.truth['record']) for c in map(data.__getitem__, range(7))] == [0, 6, 7, 8, 9, 10, 11]
    for number, (said, words) in enumerate(zip(data.skipped, ("has no feature 'mask'", "'x' with values that are NaN", "'image' of uint8 3570 instead of uint8 3675", 'no tf.train.Example', "'shape' of int64 4")), 1):
        assert f'a.tfrecords: record {number} ' in said and words in said
    report = mo.check(path, how='decode')
    assert len(report.broken) == 5 and not report.ok and "record 1 has no feature 'mask'" in repr(report) and list(report.found.values()) == [7]

def test_broken_images_of_an_npz_are_skipped_by_name(pieces, tmp_path, quiet):
    image, mask = np.stack([e['image'] for e in pieces]).astype(np.float32), np.stack([e['mask'] for e in pieces]).astype(np.float32)
    image[2, 0, 0, 0], mask[4, 0, 0, 0] = .5, np.nan
    np.savez(tmp_path/'a.npz', image=image, masks=mask)
    data = all_of(tmp_path/'a.npz', tmp_path)
    assert len(data) == 10 and ['image 2' in data.skipped[0], 'image 4' in data.skipped[1]] == [True]*2
    np.savez(tmp_path/'b.npz', image=image)
    with pytest.raises(BrokenFile, match='b.npz must hold images .* and masks'): all_of(tmp_path/'b.npz', tmp_path)
    np.savez(tmp_path/'c.npz', image=image, masks=mask[:, :, :30])
    with pytest.raises(BrokenFile, match='masks of .*c.npz must be'): all_of(tmp_path/'c.npz', tmp_path)
    (tmp_path/'d.npz').write_bytes((tmp_path/'a.npz').read_bytes()[:500])
    with pytest.raises(BrokenFile, match='d.npz cannot be read as npz'): all_of(tmp_path/'d.npz', tmp_path)

def test_an_interrupted_conversion_goes_on(pieces, tmp_path, monkeypatch, quiet):
    path, real = tmp_path/'a.tfrecords', converted.write_shards
    mo.write_multi_object(path, 'tetrominoes', pieces)
    whole = mo.open_multi_object(path, split='all', n=12, root=tmp_path/'once')
    monkeypatch.setattr(converted, 'write_shards', lambda *a, **k: real(*a, **k, clips_per_shard=3))
    def stopping(*args):
        for i, item in enumerate(images(*args)):
            if i == 7: raise KeyboardInterrupt
            yield item
    images = mo._tfrecord_images
    monkeypatch.setattr(mo, '_tfrecord_images', stopping)
    with pytest.raises(KeyboardInterrupt): mo.open_multi_object(path, split='all', n=12, root=tmp_path/'twice')
    monkeypatch.setattr(mo, '_tfrecord_images', images)
    folder, = (tmp_path/'twice').iterdir()
    early = (folder/'video.00001.npy').stat().st_mtime_ns
    again = mo.open_multi_object(path, split='all', n=12, root=tmp_path/'twice')
    assert (folder/'video.00001.npy').stat().st_mtime_ns == early
    assert again.fingerprint == whole.fingerprint and all(torch.equal(again[i].video, whole[i].video) for i in range(12))

def test_a_changed_file_is_another_data_set(pieces, tmp_path):
    path = tmp_path/'a.tfrecords'
    mo.write_multi_object(path, 'tetrominoes', pieces)
    a = all_of(path, tmp_path)
    mo.write_multi_object(path, 'tetrominoes', pieces[::-1])
    b = all_of(path, tmp_path)
    assert a.fingerprint != b.fingerprint and same(pieces[11], b[0])
    (tmp_path/'elsewhere').mkdir()
    path.rename(tmp_path/'elsewhere/a.tfrecords')
    assert all_of(tmp_path/'elsewhere/a.tfrecords', tmp_path).fingerprint == b.fingerprint

def test_reading_holds_one_record_at_a_time(pieces, tmp_path):
    path = tmp_path/'a.tfrecords'
    mo.write_multi_object(path, 'tetrominoes', itertools.islice(itertools.cycle(pieces), 600))
    next(tf.read_records(path)) # tables of the checksum
    tracemalloc.start()
    n = sum(isinstance(x, dict) for x in mo._tfrecord_images(path, mo.VARIANTS['tetrominoes'], mo.MultiObjectConfig()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n == 600 and peak < 3e6, f'{peak/1e6:.1f} MB for a file that unpacks to 15 MB'

def test_check_of_a_folder(pieces, tmp_path):
    (tmp_path/'tetrominoes').mkdir()
    mo.write_multi_object(tmp_path/'tetrominoes/tetrominoes_train.tfrecords', 'tetrominoes', pieces)
    report = mo.check(tmp_path)
    assert report.ok and len(report.missing) == 8 and 'gs://multi-object-datasets' in repr(report) and 'clevr_with_masks_train.tfrecords' in repr(report)
    assert mo.check(tmp_path, 'tetrominoes', 'whole').found == {'records of tetrominoes_train.tfrecords (tetrominoes, gzipped)': 12}
    pytest.importorskip('h5py', reason='h5py is not installed')
    for name in ('tetrominoes/tetrominoes.npz', 'tetrominoes.h5', 'mine.hdf5'): mo.write_multi_object(tmp_path/name, 'tetrominoes', pieces)
    (tmp_path/'net').mkdir()
    (tmp_path/'net/weights.h5').write_bytes(b'no images')
    (tmp_path/'own.npz').write_bytes(b'neither')
    for how in ('names', 'whole', 'decode'):
        report = mo.check(tmp_path, how=how)
        assert report.ok and sum('(tetrominoes' in k and v == 12 for k, v in report.found.items()) == (2 if how == 'names' else 3) and any('mine.hdf5' in k for k in report.found), report
    assert len(mo.check(tmp_path, 'tetrominoes').found) == 3, 'of a variant by its name only'
    (tmp_path/'weights.h5').write_bytes(b'no images')
    assert list(mo.check(tmp_path).broken) == ['weights.h5']
    nowhere = mo.check(tmp_path/'nowhere', 'tetrominoes')
    assert not nowhere.ok and nowhere.missing == ['tetrominoes_train.tfrecords (tetrominoes, 1,000,000 images)']

# ---------------------------------------------------------------- MOVi

pil = pytest.importorskip('PIL.Image')

@pytest.fixture(scope='module')
def scenes(): return [make_clip(PRESETS['tiny'], 0, i) for i in range(10)]

@pytest.mark.parametrize('layout', ['steve', 'kubric'])
def test_movi_comes_back_exactly(layout, scenes, tmp_path):
    movi.write_movi(tmp_path, scenes, layout, masks=6)
    data = movi.MOVi(tmp_path, 'all')
    for a, b in zip(scenes, map(data.__getitem__, range(10))): assert torch.equal(a.video, b.video) and torch.equal(a.labels, b.labels)
    assert data.max_objects == max(int(c.labels.max()) for c in scenes)
    assert [len(movi.MOVi(tmp_path, s)) for s in ('train', 'val', 'test')] == [7, 1, 2]
    assert torch.equal(data.window(3, 2, 3, 2).labels, scenes[3].labels[2:7:2])
    other = movi.MOVi(tmp_path, 'all', movi.MOViConfig(size=16))
    assert other[0].video.shape == (8, 3, 16, 16) and other[0].labels.shape == (8, 16, 16) and other.fingerprint != data.fingerprint
    windows = movi.open_movi(tmp_path, 'train', length=3, level='d')
    assert len(windows) == 14 and windows.max_objects == 23 and Loader(windows, 4).batch(0)['labels'].shape == (4, 3, 32, 32)
    assert pil.open(next((tmp_path/'00000000').glob('*image.png' if layout == 'steve' else 'segm*'))).mode == ('RGB' if layout == 'steve' else 'P')

def test_most_objects_of_movi_are_counted_in_seconds(scenes, tmp_path, monkeypatch):
    movi.write_movi(tmp_path, scenes, 'kubric')
    true, read, ids = max(int(c.labels.max()) for c in scenes), [], movi._mask_ids
    monkeypatch.setattr(movi, '_mask_ids', lambda v, t: read.append((v.name, t)) or ids(v, t))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert movi.MOVi(tmp_path, 'all').max_objects == true and len(set(read)) == 80, 'so few frames are all read'
        assert movi.MOVi(tmp_path, 'all', movi.MOViConfig(level='a')).max_objects == 10 and len(read) == 80
    del read[:]
    monkeypatch.setattr(movi, '_LOOKED', 17)
    data = movi.MOVi(tmp_path, 'all')
    with pytest.warns(UserWarning, match=r'at least \d+ objects, the most in 17 of its 80 frames: level='): assert data.max_objects <= true
    assert len(read) == len(set(read)) == 17 and {v for v, _ in read} == {v.name for v in data.samples} and {('00000000', 0), ('00000009', 7)} <= set(read)
    assert data.max_objects and len(read) == 17, 'once'

def test_movi_with_folders_for_splits(scenes, tmp_path):
    movi.write_movi(tmp_path/'train', scenes[:2], 'kubric')
    movi.write_movi(tmp_path/'validation', scenes[2:3], 'kubric')
    assert len(movi.MOVi(tmp_path, 'train')) == 2 and torch.equal(movi.MOVi(tmp_path, 'val')[0].video, scenes[2].video) and len(movi.MOVi(tmp_path, 'all')) == 3
    with pytest.raises(ValueError, match="unknown split 'test' of .*: it has train, val"): movi.MOVi(tmp_path, 'test')

def test_broken_videos_are_named_counted_and_left_out(scenes, tmp_path):
    movi.write_movi(tmp_path, scenes, 'steve', masks=6)
    def of(n, name): return tmp_path/f'{n:08}'/name
    of(1, '00000003_mask_02.png').unlink()
    of(2, '00000004_image.png').unlink()
    cut = of(3, '00000000_image.png')
    cut.write_bytes(cut.read_bytes()[:-30])
    for mask in (tmp_path/'00000005').glob('*_mask_*'): mask.unlink()
    of(6, '00000007_mask_00.png').write_bytes(b'')
    pil.new('RGB', (16, 16)).save(of(7, '00000002_mask_01.png'))
    of(9, '00000007_image.png').unlink()
    middle = of(8, '00000001_image.png')
    raw = bytearray(middle.read_bytes())
    raw[len(raw)//2] ^= 255
    middle.write_bytes(raw)
    with pytest.warns(UserWarning, match='8 of 10 clips are broken'): data = movi.MOVi(tmp_path, 'all', check='decode')
    assert [v.name for v in data.samples] == ['00000000', '00000004'] and torch.equal(data[1].video, scenes[4].video)
    for n, words in {1: 'lacks 1 masks, first 00000003_mask_02.png', 2: 'lacks 1 of its first 8 frames, first 00000004_image.png', 3: '00000000_image.png is cut off', 5: 'has no masks, unlike', 6: 'mask_00.png is empty',
                     7: 'different sizes', 8: '00000001_image.png is damaged', 9: 'ends after 7 frames, most of the others have 8'}.items(): assert re.search(words, data.skipped[f'{n:08}']), data.skipped[f'{n:08}']
    report = movi.check(tmp_path, how='decode')
    assert not report.ok and len(report.broken) == 8 and list(report.found.values()) == [2] and 'kubric-public' in repr(report)
    lazy = pytest.warns(UserWarning)
    with lazy: data = movi.MOVi(tmp_path, 'all', check='whole')
    assert '00000008' in data.skipped, 'checksums are compared'
    with lazy: data = movi.MOVi(tmp_path, 'all', check='names') # the flipped byte is found when it is read, and not papered over
    with pytest.raises(BrokenFile, match=r'00000001_image.png cannot be read.*exclude=\(.00000008'): data[[v.name for v in data.samples].index('00000008')]

def test_movi_that_is_not_there(tmp_path, scenes):
    report = movi.check(tmp_path/'nowhere')
    assert not report.ok and 'nowhere' in report.missing[0] and 'movi_a to movi_e' in repr(report)
    assert movi.check(tmp_path).missing
    with pytest.raises(ValueError, match='nothing of MOVi train can be read'): movi.MOVi(tmp_path)
    with pytest.raises(FileNotFoundError, match='nowhere'): movi.MOVi(tmp_path/'nowhere')
    with pytest.raises(ValueError, match="level of MOVi 'f'"): movi.MOViConfig(level='f')
    movi.write_movi(tmp_path, [scenes[0]], 'kubric')
    pil.fromarray(np.full((32, 32), 11, np.uint8)).save(tmp_path/'00000000/segmentation_00002.png')
    with pytest.raises(BrokenFile, match='has object 11, MOVi-A has 10 at most'): movi.MOVi(tmp_path, 'all', movi.MOViConfig(level='a'))[0]

@pytest.mark.skipif(not (real_data_dir()/'movi').is_dir(), reason=f'the real MOVi clips are not there: {real_data_dir()/"movi"}')
def test_real_movi(tmp_path):
    data = movi.MOVi(real_data_dir()/'movi', 'all')
    assert [v.name for v in data.samples] == ['movi_a_1', 'movi_b_1'] and data.lengths == [24, 24] and data.max_objects is None
    assert data[0].video.shape == (24, 3, 256, 256) and torch.equal(data.window(1, 5, 3).video, data[1].video[5:8])
    raw = (real_data_dir()/'movi/movi_a_1.gif').read_bytes()
    for name, content in dict(whole=raw, cut=raw[:len(raw)//2], no=b'no GIF').items(): (tmp_path/f'{name}.gif').write_bytes(content)
    with pytest.warns(UserWarning, match='2 of 3 clips are broken'): data = movi.MOVi(tmp_path, 'all')
    assert [v.name for v in data.samples] == ['whole'] and data.skipped.keys() == {'cut', 'no'} and 'cut.gif' in data.skipped['cut']
