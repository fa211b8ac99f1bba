"Bad input to the decomposition experiment: the error is ours, names the thing, its value and what is allowed, and nothing already done is lost."
import contextlib, errno, json, os, re, shutil, subprocess, sys, traceback
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from slotnb.batch.run import start_run
from slotnb.core import real_data_dir
from slotnb.data.clips import Clip, ClipList, Loader, Windows
from slotnb.data.folder import BrokenFile, FolderConfig
from slotnb.data.open import open_data
from slotnb.data.scenes import PRESETS as SCENES
from slotnb.layers.weights import CheckpointError
from slotnb.models.savi import SAVi, preset
from slotnb.training.checkpoint import checkpoints, read_training
from slotnb.training.fit import FitConfig, fit
from slotnb.training.losses import Reconstruction

for package in ('av', 'PIL', 'matplotlib', 'pandas', 'IPython'): pytest.importorskip(package)
import matplotlib
matplotlib.use('Agg')
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/10_decomposition.ipynb'
CELLS = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == 'code']
RECIPE, DATA, TRAINING, END = 'start_run(', 'clips_of = material(', 'train_one(savi', 'this.finish('
real = real_data_dir()
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'the folder of real inputs is not there: {real}')
slow = pytest.mark.slow

# ---------------------------------------------------------------- harness

def run_cells(upto, **parameters): # the namespace
    "The experiment's code cells in this process, to the first one that holds `upto`."
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in CELLS:
        source = cell.source.replace('import Image, display', 'import Image') # nobody looks
        exec(compile(source, f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []):
            given = dict(device='cpu', compare='none', steps=2) | parameters
            space.update(given, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in given.items())]) # as papermill hands them over
        if upto in cell.source: return space
    raise AssertionError(f'no cell of {NOTEBOOK.name} holds {upto!r}')

def is_library(frame): return 'site-packages' in frame.filename

def shown(error): # every exception of the printed traceback
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

@contextlib.contextmanager
def refused(kind, *words):
    "The block raises `kind` with every word in its message, from our own code, and no library's exception is printed with it."
    with pytest.raises(kind) as e: yield e
    message = str(e.value)
    for word in words: assert re.search(word, message), f'{word!r} is not in: {message}'
    for error in shown(e.value):
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert not is_library(last), f'{type(error).__name__} of {last.filename}:{last.lineno} is printed with it'

@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')

def files(folder): # every file of a folder, with its bytes
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

def clips(n=12, t=4, size=32, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (n, t, size//4, size//4, 3), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    ids = np.zeros((n, t, size, size), np.uint8)
    ids[..., :size//2, :size//2] = 1
    return x, ids

@pytest.fixture
def data(tmp_path):
    "Twelve clips of four frames with masks."
    x, ids = clips()
    np.savez(tmp_path/'clips.npz', video=x, labels=ids)
    return str(tmp_path/'clips.npz')

@pytest.fixture
def runs(tmp_path): return str(tmp_path/'runs')

@pytest.fixture
def full_disk(tmp_path):
    "Makes a file system of so many bytes, where this process may."
    mounted = []
    def make(size):
        small = tmp_path/f'small{len(mounted)}'
        small.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', small], capture_output=True).returncode:
            pytest.skip('mounting a small file system needs root')
        mounted.append(small)
        return small
    yield make
    for small in mounted: subprocess.run(['umount', '-l', small], check=True)

def test_the_harness_sees_a_library_traceback():
    with pytest.raises(AssertionError, match='printed with it'):
        with refused(RuntimeError, 'shape'): torch.nn.functional.layer_norm(torch.ones(2, 3), (4,))
    with pytest.raises(AssertionError, match='printed with it'):
        with refused(ValueError, 'ours'):
            try: torch.nn.functional.layer_norm(torch.ones(2, 3), (4,))
            except RuntimeError: raise ValueError('ours')

# ---------------------------------------------------------------- parameters

@pytest.mark.parametrize('parameters,words', [
    (dict(preset='laptp'), ("unknown preset 'laptp'", 'smoke, ', "Did you mean 'laptop'")),
    (dict(preset=''), ("unknown preset ''", 'allowed are smoke')),
    (dict(model='isa-ts'), ("unknown model 'isa-ts'", 'sa, isa_t, isa_ts, isa_tsr', "Did you mean 'isa_ts'")),
    (dict(compare='isa_t,isa_q'), ("unknown model to compare 'isa_q'", 'allowed are sa')),
    (dict(slots=-1), ('slots must be .*1.*128', 'got -1')),
    (dict(slots=1000), ('slots must be .*1.*128', 'got 1000')),
    (dict(steps=-5), ('steps must be an integer of at least 1', 'got -5')),
    (dict(steps='many'), ('steps must be int', "got 'many'")),
    (dict(device='gpu'), ("unknown device 'gpu'", 'auto, cpu, cuda')),
    (dict(slots=2.5), ('slots must be int', 'got 2.5')),
    (dict(seed='first'), ('seed must be int', "got 'first'")),
    (dict(compare='isa_ts', compare_steps=-5), ('steps must be an integer of at least 1', 'got -5')),
    (dict(presett='smoke'), ("unknown parameter 'presett'", "Did you mean 'preset'")),
])
def test_parameters(parameters, words, runs):
    "Refused before anything is made."
    with refused(ValueError, *words): run_cells(RECIPE, runs_dir=runs, **parameters)
    assert not Path(runs).exists()

def test_cuda_where_there_is_none(runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for device in ('cuda', 'cuda:1'):
        with refused(ValueError, f"device '{device}' was asked for", 'sees 0 CUDA devices', "device='auto' or 'cpu'"): run_cells(RECIPE, runs_dir=runs, device=device)
    assert not Path(runs).exists()

def test_slots_and_objects(data, runs):
    "Zero slots are the preset's; too few for the objects are a warning that counts both."
    assert run_cells(RECIPE, runs_dir=runs, slots=0)['config'].slots == preset('smoke').slots
    with pytest.warns(UserWarning, match='1 slots for up to 1 objects and a background.* at least 2'): run_cells(DATA, runs_dir=runs, data=data, slots=1)
    with refused(ValueError, 'slots must be between 1 and 128', 'got 0'): preset('smoke').but(slots=0)

# ---------------------------------------------------------------- data

def write_film(path, frames, audio=False, cut=0):
    import av
    with av.open(str(path), 'w', options={'movflags': 'faststart'}) as box:
        if audio:
            s = box.add_stream('aac', rate=16000, layout='mono')
            chunks = [av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono') for _ in range(20)]
            for i, f in enumerate(chunks): f.sample_rate, f.pts = 16000, 1024*i
        else:
            s = box.add_stream('mpeg4', rate=10)
            s.height, s.width, s.pix_fmt = *frames[0].shape[:2], 'yuv420p'
            chunks = [av.VideoFrame.from_ndarray(f, format='rgb24') for f in frames]
        for f in chunks: box.mux(s.encode(f))
        box.mux(s.encode())
    if cut: path.write_bytes(path.read_bytes()[:-cut])
    return path

def bad_path(kind, folder):
    "What a user may point `data` at by mistake."
    x, ids = clips(1, 24, 64)
    if kind == 'missing': return folder/'films/no.mp4'
    if kind == 'empty folder': (folder/'none').mkdir(); return folder/'none'
    if kind == 'other files': (folder/'notes').mkdir(); (folder/'notes/a.txt').touch(); return folder/'notes'
    if kind == 'other format': (folder/'a.docx').write_text('text'); return folder/'a.docx'
    if kind == 'cut': return write_film(folder/'cut.mp4', np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), dtype=np.uint8), cut=20_000)
    if kind == 'no video': (folder/'text.mp4').write_text('not a video'); return folder/'text.mp4'
    if kind == 'audio': return write_film(folder/'talk.mp4', [], audio=True)
    if kind == 'empty file': (folder/'zero.mp4').touch(); return folder/'zero.mp4'
    arrays = {'mask size': dict(video=x, labels=ids[..., :32]), 'mask count': dict(video=x, labels=ids[:, :20]), 'mask dtype': dict(video=x, labels=ids.astype(np.float32)),
              'overlap': dict(video=x, masks=np.ones((1, 24, 2, 64, 64), bool)), 'dtype': dict(video=x.astype(np.float64)),
              'range': dict(video=x.astype(np.int32)*300), 'nan': dict(video=np.where(x > 250, np.nan, x).astype(np.float32))}[kind]
    np.savez(folder/'x.npz', **arrays)
    return folder/'x.npz'

@pytest.mark.parametrize('kind,error,words', [
    ('missing', FileNotFoundError, ('films/no.mp4', 'allowed are tiny', 'there is none at')),
    ('empty folder', ValueError, ('none holds nothing to read', r'allowed are .mp4', 'found 0 other files')),
    ('other files', ValueError, ('notes holds nothing to read', r'1 other files \(.txt\)')),
    ('other format', ValueError, ("unknown file format of .*a.docx.*'.docx'", 'allowed are .mp4')),
    ('cut', BrokenFile, ('cut.mp4: broken at frame [0-9]+ of 24',)),
    ('no video', BrokenFile, ('text.mp4 cannot be opened as a video',)),
    ('audio', BrokenFile, ('talk.mp4 has no video stream, only audio',)),
    ('empty file', BrokenFile, ('zero.mp4 is empty',)),
    ('mask size', ValueError, (r"'labels' of .*x.npz is \(1, 24, 64, 32\)", '1 clips of 24 frames 64x64')),
    ('mask count', ValueError, (r"'labels' of .*x.npz is \(1, 20, 64, 64\)", '1 clips of 24 frames 64x64')),
    ('mask dtype', ValueError, ('labels of .*x.npz must be integers', 'got float32')),
    ('overlap', ValueError, ('masks of .*x.npz overlap in 98304 pixels', 'one owner')),
    ('dtype', ValueError, ("'video' of .*x.npz must be uint8", 'got float64')),
    ('range', ValueError, ("'video' of .*x.npz must be uint8 from 0 to 255", 'got int32 from 0 to')),
    ('nan', ValueError, ("'video' of .*x.npz has [0-9]+ pixels that are NaN", 'must be uint8')),
])
def test_data(kind, error, words, runs, tmp_path):
    path = bad_path(kind, tmp_path)
    before = files(tmp_path)
    with refused(error, *words): run_cells(DATA, runs_dir=runs, run='r', data=str(path))
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith('runs/')} == before
    assert sorted(f for f in files(runs) if 'claim' not in f) == ['10_decomposition/r/run.json']

def test_a_misspelt_scene(runs):
    with refused(ValueError, "unknown data 'tinny'", 'allowed are tiny, obj3d, clevrer, tetrominoes', "Did you mean 'tiny'", 'Or a path'):
        run_cells(DATA, runs_dir=runs, data='tinny')

@needs_real
def test_a_real_corrupted_video(runs):
    with refused(BrokenFile, r'corrupted.mp4: broken at frame 28 of 50'): run_cells(DATA, runs_dir=runs, data=str(real/'video/corrupted.mp4'))

def test_clips_shorter_than_the_window(tmp_path, runs, capsys):
    "The library refuses; the experiment says that it makes its windows shorter."
    x, ids = clips(6, 1)
    np.savez(tmp_path/'stills.npz', video=x, labels=ids)
    space = run_cells(DATA, runs_dir=runs, data=str(tmp_path/'stills.npz'))
    assert space['train'][0].video.shape[0] == 1 and 'stills.npz have 1 frames: windows of that many instead of 6' in capsys.readouterr().out
    x, _ = clips(1, 4)
    write_film(tmp_path/'short.mp4', x[0])
    with refused(ValueError, "clip 'short.mp4' has 4 frames", 'window of 6 with step 1 needs 6'): open_data(tmp_path/'short.mp4', length=6)

def test_a_short_clip_is_held_out_honestly(tmp_path, runs):
    "What is held out is not trained on, or the settings say that it is."
    x, _ = clips(1, 4)
    write_film(tmp_path/'short.mp4', x[0])
    space = run_cells(DATA, runs_dir=runs, data=str(tmp_path/'short.mp4'))
    def frames(d): return {w.meta.get('start', 0) + k for w in (d[i] for i in range(len(d))) for k in range(len(w))}
    shared = frames(space['train']) & frames(space['held_out'])
    assert not shared or 'shared' in space['held_out'].settings['split']

# ---------------------------------------------------------------- pixels handed to a model

@pytest.mark.parametrize('video,words', [
    (torch.full((4, 3, 32, 32), float('nan')), ('video has .*pixels that are not finite',)),
    (torch.full((4, 3, 32, 32), float('inf')), ('video has .*pixels that are not finite',)),
    (torch.full((4, 3, 32, 32), 255.), (r'must lie in \[0, 1\]', 'got .*255')),
    (torch.full((4, 3, 32, 32), -.5), (r'must lie in \[0, 1\]', 'got .*-0.5')),
    (torch.zeros(4, 3, 32, 32, dtype=torch.int64), ('video must be uint8, or floating point', 'got torch.int64')),
    (torch.zeros(4, 3, 32, 32, dtype=torch.bool), ('video must be uint8', 'got torch.bool')),
    (torch.zeros(4, 2, 32, 32), ('3 colour channels', r'got \(1, 4, 2, 32, 32\)')),
    (torch.zeros(0, 3, 32, 32), ('at least one frame', r'got \(1, 0, 3')),
    (torch.zeros(3, 32, 32), (r'video must be \(T, 3, H, W\)', r'got \(3, 32, 32\)')),
    ('clip.mp4', ('video must be', "got 'clip.mp4'", r'slotnb.data.folder.read_video\(path\)')),
    (np.array([[None]]), ('video must be', 'got .*object', 'read_video')),
    ([[1, 2], [3]], ('video must be', r'got \[\[1, 2\], \[3\]\]')),
])
def test_predict(video, words):
    net = SAVi(preset('smoke'))
    net.train()
    with refused(ValueError, *words): net.predict(video)
    assert net.training                                                            # left as it was

def test_forward():
    net = SAVi(preset('smoke'))
    with refused(ValueError, 'video must be floating point in', 'got torch.uint8', 'to_float'): net(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8))
    with refused(ValueError, r'frames of \(32, 32\)', r'got \(16, 16\)'): net(torch.zeros(1, 2, 3, 16, 16))
    with refused(ValueError, r'video must be \(B, T, 3, H, W\)', r'got \(2, 3, 32, 32\)'): net(torch.zeros(2, 3, 32, 32))

@pytest.mark.parametrize('model,good', [('masks', torch.zeros(2, 3, 32, 32)), ('boxes', torch.zeros(2, 3, 4))])
def test_conditions(model, good):
    "First-frame masks or boxes of another size or count, for a model that starts from them."
    net, video, slots = SAVi(preset('smoke').but(init=model)), torch.zeros(2, 1, 3, 32, 32), preset('smoke').slots
    bad = {'size': good[..., None] if model == 'masks' else good[..., :3], 'batch': good[:1], 'dims': good[0], 'slots': good.repeat(1, 4, *[1]*(good.ndim - 2))}
    for what, condition in bad.items():
        with refused(ValueError, f'first-frame {model} must be', f'B = 2 clips and N <= {slots} slots', re.escape(f'got {tuple(condition.shape)}')): net.predict(video, condition=condition)
    for value in ('nan', 'inf'):
        with refused(ValueError, f'first-frame {model} have values that are not finite'): net.predict(video, condition=good + float(value))
    with refused(ValueError, f'needs first-frame {model}'): net.predict(video)
    assert net.predict(video, condition=good).recon.isfinite().all()

@pytest.mark.parametrize('change,words', [
    (dict(slots=2.5), ('SAViConfig.slots must be an integer', 'got 2.5')), (dict(slots='many'), ('an integer', "got 'many'")), (dict(iterations=True), ('iterations', 'got True')),
    (dict(dim=None), ('dim', 'got None')), (dict(size=(32., 32)), ('size must be a tuple of 2, each an integer',)), (dict(size=32), ('size', 'got 32')), (dict(channels=('16',)), ('channels',)),
    (dict(eps='1e-8'), ('eps must be a finite number', "got '1e-8'")), (dict(delta=float('nan')), ('delta', 'got nan')), (dict(implicit=1), ('implicit must be True or False', 'got 1')),
    (dict(pixels=1), ('pixels must be a string', 'got 1'))])
def test_values_of_a_config(change, words):
    with refused(ValueError, *words): preset('smoke').but(**change)

def test_values_of_other_configs():
    with refused(ValueError, 'FitConfig.batch_size must be an integer', 'got 8.0'): FitConfig(batch_size=8.)
    with refused(ValueError, 'FitConfig.lr must be a finite number', 'got inf'): FitConfig(lr=float('inf'))
    for wrong in (64., (64, 64, 64), (64, '64'), True):
        with refused(ValueError, 'FolderConfig.size must be an integer or a tuple of 2, each an integer or None'): FolderConfig(size=wrong)
    for right in (64, (64, 96), [64, 96], None): assert FolderConfig().but(size=right, fps=10).fps == 10
    with refused(ValueError, 'SceneConfig.frames must be an integer', "got '5'"): SCENES['tiny'].but(frames='5')

# ---------------------------------------------------------------- run folders

def test_a_finished_run_is_not_overwritten(data, runs):
    "Another seed, the same name: refused with both values, every byte stays."
    space = run_cells(RECIPE, runs_dir=runs, run='mine', data=data)
    space['this'].finish({'fg_ari.decoder.clip': .5})
    before = files(runs)
    with refused(ValueError, 'mine holds a run with other parameters', 'seed: 0 there, 7 now', 'another name'): run_cells(RECIPE, runs_dir=runs, run='mine', data=data, seed=7)
    with refused(ValueError, "model: 'sa' there, 'isa_t' now"): run_cells(RECIPE, runs_dir=runs, run='mine', data=data, model='isa_t')
    with refused(ValueError, 'unknown preset'): run_cells(RECIPE, runs_dir=runs, run='mine', data=data, preset='huge')
    assert files(runs) == before

def test_a_finished_run_survives_a_failing_repetition(data, runs):
    "The video has been moved since; what the run had written about itself must still be there."
    space = run_cells(DATA, runs_dir=runs, run='mine', data=data)
    space['this'].finish({'fg_ari.decoder.clip': .5}, note='worth keeping')
    before = files(Path(runs)/'10_decomposition/mine')
    os.rename(data, data + '.moved')
    with refused(FileNotFoundError, 'clips.npz', 'there is none at'): run_cells(DATA, runs_dir=runs, run='mine', data=data)
    start_run('10_decomposition', space['parameters'], runs, 'mine')._abandon()    # as the interpreter does on leaving
    assert files(Path(runs)/'10_decomposition/mine') == before
    start_run('10_decomposition', space['parameters'], runs, 'mine').finish({}, note='another')
    now = json.loads((Path(runs)/'10_decomposition/mine/run.json').read_text())
    assert now['note'] == 'another' and now['status'] == 'done'

def test_a_damaged_run_json(runs):
    folder = start_run('10_decomposition', dict(seed=0), runs, 'mine').folder
    for text in (b'', b'{"parameters": ', b'[]', b'{}', b'{"parameters": 3}', b'\xff'):
        (folder/'run.json').write_bytes(text)
        with refused(ValueError, 'mine/run.json is damaged', 'another name, or delete'): start_run('10_decomposition', dict(seed=0), runs, 'mine')
        assert (folder/'run.json').read_bytes() == text

def test_names_of_runs(runs):
    for name in ('../elsewhere', 'a/b', '.', '..', '/elsewhere', 'a b', 'a\n', 'b\\c', 'ü'):
        with refused(ValueError, 'name of a run must be', re.escape(repr(name))): start_run('10_decomposition', {}, runs, name)
        with refused(ValueError, 'experiment must be', re.escape(repr(name))): start_run(name, {}, runs, 'r')
    assert not Path(runs).exists() and start_run('10_decomposition', {}, runs, 7).folder == Path(runs)/'10_decomposition/7'

# ---------------------------------------------------------------- checkpoints

def trained(folder, slots=5, steps=2, data_seed=0, seed=0, **settings):
    x, _ = clips(seed=data_seed)
    videos = ClipList([Clip(torch.from_numpy(v).permute(0, 3, 1, 2).contiguous()) for v in x], 'random')
    torch.manual_seed(0)
    net = SAVi(preset('smoke').but(slots=slots))
    return fit(net, Loader(Windows(videos, 2), 4), Reconstruction(), FitConfig(steps=steps, batch_size=4, tensorboard=False, **settings), folder, 'cpu', seed)

def test_checkpoint_of_another_run(tmp_path):
    "Every differing field is named, and the folder is left as it was."
    trained(tmp_path)
    before = files(tmp_path)
    for other, words in ((dict(slots=4), ['model.slots: stored 5, here 4']), (dict(lr=1e-2), ['fit.lr: stored 0.0004, here 0.01']),
                         (dict(data_seed=1), ['data.fingerprint: stored ']), (dict(seed=3, slots=6), ['seed: stored 0, here 3', 'model.slots: stored 5, here 6'])):
        with refused(CheckpointError, 'step-000002 belongs to another run', 'resume=False', *words): trained(tmp_path, **other)
        assert files(tmp_path) == before

def test_changed_data_behind_an_experiment(data, runs):
    "The same parameters, but the file holds something else by now: not mixed into the old checkpoint."
    run_cells(TRAINING, runs_dir=runs, run='mine', data=data)
    before = files(f'{runs}/10_decomposition/mine/checkpoints')
    x, ids = clips(seed=5)
    np.savez(data, video=x, labels=ids)
    with refused(CheckpointError, 'belongs to another run', 'data.fingerprint: stored '): run_cells(TRAINING, runs_dir=runs, run='mine', data=data)
    assert files(f'{runs}/10_decomposition/mine/checkpoints') == before

def test_weights_of_another_model(tmp_path):
    SAVi(preset('smoke')).save_pretrained(tmp_path/'m')
    config = json.loads((tmp_path/'m/config.json').read_text())
    for change, words in ((dict(dim=48), ('differs',)), (dict(slotz=3), ('differs|slotz',))):
        (tmp_path/'m/config.json').write_text(json.dumps({**config, 'config': {**config['config'], **change}}))
        with refused(CheckpointError, str(tmp_path/'m'), *words): SAVi.from_pretrained(tmp_path/'m')
    (tmp_path/'m/config.json').write_text(json.dumps(config))
    weights = (tmp_path/'m/model.safetensors').read_bytes()
    (tmp_path/'m/model.safetensors').write_bytes(weights[:-100])
    with refused(CheckpointError, 'model.safetensors', 'truncated'): SAVi.from_pretrained(tmp_path/'m')
    with refused(ValueError, 'lapdog'): SAVi.from_pretrained('lapdog')

# ---------------------------------------------------------------- full disk

def test_full_disk_while_training(full_disk, tmp_path):
    "The second checkpoint does not fit: named with its step and folder; the first is whole."
    trained(tmp_path/'roomy', steps=2, checkpoint_every=2)
    size = sum(map(len, files(tmp_path/'roomy').values()))
    small = full_disk(size*3//2)
    with refused(OSError, 'checkpoint of step 4 could not be written', str(small), 'No space left', 'the one before is intact: .*step-000002') as e:
        trained(small/'run', steps=8, checkpoint_every=2, log_every=1)
    assert e.value.errno == errno.ENOSPC
    saved, = checkpoints(small/'run/checkpoints')
    assert read_training(saved).step == 2 and not list((small/'run').rglob('*.part'))
    shutil.copytree(small/'run', small.parent/'roomier')
    assert trained(small.parent/'roomier', steps=8, checkpoint_every=2, log_every=1).steps == 8     # and goes on from there

@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('room', ['4k', '64k', '256k'])
def test_full_disk_in_the_experiment(full_disk, data, room):
    "Wherever it fills up, TensorBoard's files included, the error says which file and that there is no space."
    small = full_disk(room)
    with refused(OSError, 'No space left on device', str(small)): run_cells(TRAINING, runs_dir=str(small), run='mine', data=data)
    assert not [p for p in small.rglob('*.part')]

def test_full_disk_for_results(full_disk, tmp_path):
    "Results that do not fit leave the earlier ones whole."
    small = full_disk('40k')
    this = start_run('10_decomposition', dict(seed=0), small, 'mine')
    this.finish({'fg_ari.decoder.clip': .5})
    before = files(this.folder)
    with refused(OSError, 'metrics.json could not be written', 'No space left', 'nothing was changed'): this.finish({f'metric.{i}': i for i in range(10_000)})
    assert files(this.folder) == before

def test_full_disk_for_a_model(full_disk):
    small = full_disk('60k')
    with refused(OSError, 'model.safetensors could not be written', 'No space left'): SAVi(preset('smoke')).save_pretrained(small/'model')
    assert not list((small/'model').iterdir())

def test_full_disk_for_pictures(full_disk):
    from slotnb.evaluation.plots import save_gif, save_png
    small, film = full_disk('16k'), np.random.default_rng(0).integers(0, 255, (8, 96, 96, 3), dtype=np.uint8)
    for save, name in ((save_png, 'a.png'), (save_gif, 'a.gif')):
        with refused(OSError, f'{name} could not be written', 'No space left'): save(small/name, film[0] if save is save_png else film)
    assert not list(small.iterdir())

# ---------------------------------------------------------------- to the end

@pytest.mark.filterwarnings('ignore:LPIPS')
@pytest.mark.parametrize('kind', ['no object anywhere', pytest.param('all object', marks=slow), 'one clip'])
def test_masks_that_score_nothing(kind, tmp_path, runs):
    "No object in any clip is no fault: the scores are no numbers, counted, and the run ends."
    x, ids = clips(1 if kind == 'one clip' else 12)
    ids = {'no object anywhere': ids*0, 'all object': ids*0 + 1, 'one clip': ids}[kind]
    np.savez(tmp_path/'x.npz', video=x, labels=ids)
    space = run_cells(END, runs_dir=runs, run='mine', data=str(tmp_path/'x.npz'))
    metrics = json.loads((Path(runs)/'10_decomposition/mine/metrics.json').read_text())
    if kind == 'no object anywhere': assert metrics['fg_ari.decoder.clip'] is None and metrics['fg_ari.decoder.clip.nan'] == len(space['held_out'])
    else: assert metrics['fg_ari.decoder.clip'] is not None

# ---------------------------------------------------------------- as papermill runs it

def papermill(out, **parameters):
    pytest.importorskip('papermill')
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(NOTEBOOK), str(out)]
    for k, v in (dict(preset='smoke', device='cpu', compare='none') | parameters).items(): command += ['-p', k, str(v)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'})

@slow
def test_papermill_reports_the_message_last(tmp_path, runs):
    "Exit code, last line and executed notebook say what was wrong; the run is marked as failed."
    done = papermill(tmp_path/'out.ipynb', runs_dir=runs, run='mine', data=str(tmp_path/'no.mp4'))
    assert done.returncode and re.search(r'^FileNotFoundError: .*no.mp4', done.stderr.strip().splitlines()[-1])
    assert json.loads((Path(runs)/'10_decomposition/mine/run.json').read_text())['status'] == 'failed'
    assert any(o.output_type == 'error' for c in nbformat.read(tmp_path/'out.ipynb', 4).cells for o in c.get('outputs', []))

@slow
@needs_real
@pytest.mark.parametrize('path', ['movi', 'physion', 'tetrominoes/tetrominoes5.npz', 'kth', 'video/bikes.mp4', 'clevr', 'kubric'])
def test_real_inputs_run_through(path, tmp_path, runs):
    done = papermill(tmp_path/'out.ipynb', runs_dir=runs, run='mine', data=str(real/path), compare='auto')
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(runs)/'10_decomposition/mine'
    metrics = json.loads((folder/'metrics.json').read_text())
    text = str([c.get('outputs') for c in nbformat.read(tmp_path/'out.ipynb', 4).cells])
    assert metrics['mse_pixel.decoder.frame'] > 0 and len(list((folder/'figures').glob('*.png'))) >= 3 and (folder/'figures/clips.gif').stat().st_size > 1000
    if 'kubric' in path: assert metrics['fg_ari.decoder.clip.n'] == 1 and 'no ground truth' not in text
    elif 'tetrominoes' in path: assert -1 <= metrics['fg_ari.decoder.clip'] <= 1 and metrics['fg_ari.decoder.clip.n'] == 5 and 'no ground truth' not in text
    else: assert 'no ground truth' in text and metrics.get('fg_ari.decoder.clip') is None and not metrics.get('fg_ari.decoder.clip.n')
