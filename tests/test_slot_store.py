"Extraction that is killed, that must not grow, and that meets what it should refuse."
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

from slotnb.core import seeded
from slotnb.data.clips import Clip, ClipList, Loader, Subset, Windows
from slotnb.data.shards import check_shards
from slotnb.layers.slot_attention import SlotState
from slotnb.models.autoencoder import AutoEncoder, AutoEncoderConfig
from slotnb.models.psb import PSB, PSBConfig
from slotnb.models.savi import SAVi, SAViConfig
from slotnb.models.slot_store import SlotStore, WrongEncoderError, batch_slots, encode, encoder_fingerprint, extract_slots, slot_folder

SMALL = dict(size=(16, 16), slots=3, dim=16, channels=(8,), strides=(2,), token_mlp=(16,), init='gaussian', mlp=16, start=(8, 8), up_channels=(8,), up_strides=(2,), up_kernels=(3,))

def savi(**more):
    with seeded(0, 'init'): return SAVi(SAViConfig(**{**SMALL, **more}, predictor_layers=1, ffn=16)).eval()

def clips(n, frames=4, size=16):
    g = torch.Generator().manual_seed(0)
    return ClipList([Clip(torch.randint(0, 256, (frames, 3, size, size), dtype=torch.uint8, generator=g)) for _ in range(n)], 'noise')

def files(store): return {p.name: p.read_bytes() for p in sorted(store.folder.glob('*.npy'))}

KILLED = '''
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_slot_store import *
data, read = clips(10), []
class Deadly(ClipList):
    def window(self, i, *args):
        read.append(i)
        if len(read) == 8: os.kill(os.getpid(), signal.SIGKILL)
        return super().window(i, *args)
extract_slots(savi(), Deadly(data.clips, 'noise'), sys.argv[1], batch=2, shard_bytes=2000, device='cpu')
'''

def test_a_killed_extraction_goes_on_and_ends_with_the_same_bytes(tmp_path):
    whole = extract_slots(savi(), clips(10), tmp_path/'a', batch=2, shard_bytes=2000, device='cpu')
    dead = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path/'b'), str(Path(__file__).parent)], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert dead.returncode == -9, dead.stderr
    folder = slot_folder(savi(), clips(10), tmp_path/'b')
    there = len(list(folder.glob('*.npy')))
    assert 0 < there < len(files(whole))
    with pytest.raises(ValueError, match='incomplete'): SlotStore(folder)
    (folder/'.content.00009.npy.x.part').write_bytes(b'left')
    store = extract_slots(savi(), clips(10), tmp_path/'b', batch=5, device='cpu') # the folder's own batches are kept
    assert files(store) == files(whole) and not list(folder.glob('.*.part'))
    check_shards(folder, 'hash')

def test_drawn_slots_do_not_depend_on_the_batch(tmp_path):
    model, data = savi(invariance='ts', position='', token_mlp=()), clips(6)
    a, b = (extract_slots(model, data, tmp_path/str(n), batch=n, device='cpu') for n in (6, 1))
    for i in range(6):
        for part in ('content', 'position', 'scale'): # later frames carry on what rounding differs by in the first
            torch.testing.assert_close(getattr(a[i].slots, part)[0], getattr(b[i].slots, part)[0], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(getattr(a[i].slots, part), getattr(b[i].slots, part), atol=2e-2, rtol=0)
    other = extract_slots(model, data, tmp_path/'6', seed=1, device='cpu')
    assert other.folder != a.folder and not torch.allclose(other[0].slots.content, a[0].slots.content, atol=1e-3)

def test_slots_are_the_models_own_and_the_model_is_left_as_it_was(tmp_path):
    model = savi(init='learned').train()
    store = extract_slots(model, clips(3), tmp_path, device='cpu')
    assert model.training and not model.init._forward_hooks
    record = model.predict(clips(3)[1].video)
    torch.testing.assert_close(store[1].slots.content, record.slots.content[0])

def psb(**more):
    with seeded(0, 'init'): return PSB(PSBConfig(**{k: v for k, v in SMALL.items() if k != 'mlp'} | dict(position='linear', heads=2, blocks=2) | more)).eval()

@pytest.mark.parametrize('init', ['learned', 'gaussian'])
def test_slots_bound_in_parallel_are_stored_without_painting(tmp_path, monkeypatch, init):
    model, data = psb(init=init), clips(5)
    monkeypatch.setattr(PSB, 'decode', lambda *a: pytest.fail('painted'))
    whole, pieces = (extract_slots(model, data, tmp_path/str(f), device='cpu', frames=f) for f in (256, 5)) # a frame of all clips at a time: the state goes on
    monkeypatch.undo()
    for i in range(5): torch.testing.assert_close(whole[i].slots.content, pieces[i].slots.content, atol=1e-4, rtol=1e-3)
    if init == 'learned': torch.testing.assert_close(whole[2].slots.content, model.predict(data[2].video).slots.content[0], atol=1e-5, rtol=1e-4)
    assert whole.spec['model'] == 'PSB' and whole.spec['code'] != extract_slots(savi(), data, tmp_path, device='cpu').spec['code']

def test_a_model_with_a_binder_and_a_way_of_its_own_is_called_whole():
    class Doubled(PSB):
        def forward(self, *args, **kwargs):
            record = super().forward(*args, **kwargs)
            record.slots = record.slots.map(lambda v: 2*v)
            return record
    model, video = psb(init='learned'), clips(1)[0].video[None]/255
    doubled = Doubled(model.config).eval()
    doubled.load_state_dict(model.state_dict())
    with torch.no_grad(): torch.testing.assert_close(encode(doubled, video)[0].content, 2*encode(model, video)[0].content)

def test_conditioned_models_get_the_first_frames_labels(tmp_path):
    data = clips(3)
    with pytest.raises(ValueError, match='needs labels'): extract_slots(savi(init='boxes'), data, tmp_path, device='cpu')
    for i, c in enumerate(data.clips):
        c.labels = torch.zeros(4, 16, 16, dtype=torch.uint8)
        c.labels[:, 2:6, 2 + i:8] = 1
    data = ClipList(data.clips, 'boxes')
    model = savi(init='boxes')
    store = extract_slots(model, data, tmp_path, device='cpu')
    with torch.no_grad(): slots, _ = encode(model, data[2].video[None]/255, condition=model.init.condition_of(data[2].labels[None, 0]))
    torch.testing.assert_close(store[2].slots.content, slots.content[0], atol=1e-5, rtol=1e-4)

def test_refusals_name_both_sides(tmp_path):
    model, data = savi(), clips(4)
    store = extract_slots(model, data, tmp_path, device='cpu')
    other = savi(slots=4)
    with pytest.raises(WrongEncoderError, match=f'{encoder_fingerprint(model)}.*{encoder_fingerprint(other)}'): SlotStore(store.folder, data, other)
    assert len(SlotStore(store.folder, encoder=model)) == 4
    with pytest.raises(ValueError, match='not of'): SlotStore(store.folder, Subset(data, [0, 1]))
    with pytest.raises(ValueError, match='needs 7'): Windows(store, 7)
    with pytest.raises(ValueError, match='frames of'): SlotStore(store.folder)[0].clip
    with pytest.raises(ValueError, match='holds no slots'): batch_slots({'video': None})
    with pytest.raises(ValueError, match='at least 1'): extract_slots(model, data, tmp_path, batch=0)
    with pytest.raises(ValueError, match=r'\(16, 16\)'): extract_slots(model, clips(2, size=24), tmp_path, device='cpu')
    path = next(store.folder.glob('*.npy'))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match='is damaged'): SlotStore(store.folder)

def test_slots_that_are_not_finite_name_their_clip(tmp_path):
    class Broken(AutoEncoder):
        def forward(self, video, state=None, **kwargs):
            record = super().forward(video)
            record.slots.content[video.flatten(1).mean(1) > 0.9] = torch.nan
            return record
    data = clips(5)
    data.clips[3] = Clip(torch.full((4, 3, 16, 16), 255, dtype=torch.uint8))
    with seeded(0, 'init'): model = Broken(AutoEncoderConfig(**SMALL))
    with pytest.raises(ValueError, match='content of clip 3'): extract_slots(model, data, tmp_path, device='cpu')

def test_threads_and_subsets_read_the_same(tmp_path):
    store = extract_slots(savi(), clips(6), tmp_path, batch=2, shard_bytes=2000, device='cpu').with_video()
    windows = Windows(Subset(store, [5, 0, 3]), 2, 2)
    alone, many = (list(Loader(windows, 2, seed=3, workers=w).stream(0, 5)) for w in (0, 3))
    for a, b in zip(alone, many): assert all(torch.equal(a[k], b[k]) for k in a if a[k] is not None)
    assert isinstance(batch_slots(alone[0]), SlotState) and torch.equal(windows[0].slots.content, store[5].slots.content[0:3:2])

MEMORY = '''
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_slot_store import *
class Many:
    name, max_objects = 'many', None
    def __init__(self, n): self.lengths, self.fingerprint = [32]*n, f'many{n}'
    def __len__(self): return len(self.lengths)
    def window(self, i, start, length, step=1): return Clip(torch.full((length, 3, 8, 8), i % 256, dtype=torch.uint8))
with seeded(0, 'init'): model = AutoEncoder(AutoEncoderConfig(**{**SMALL, 'size': (8, 8), 'slots': 8, 'dim': 128, 'start': (4, 4), 'iterations': 1, 'init': 'learned'}))
for n in (40, 640):
    store = extract_slots(model, Many(n), sys.argv[1], shard_bytes=2**20, device='cpu')
    print('RSS', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, sum(p.stat().st_size for p in store.folder.glob('*.npy'))//2**20)
'''

@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    done = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    rows = [list(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith('RSS')]
    assert len(rows) == 2, done.stderr
    (before, _), (after, size) = rows
    assert size >= 75 and after - before < 25, rows
