"""One run on several ranks: the numbers of one process, one checkpoint for any number of ranks, one end for all."""
import json, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import slotnb
from slotnb.training import checkpoint as ck
from slotnb.training.fit import fit

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='this torch has no gloo')
torch.set_num_threads(1)

COMMON = '''
import json, math, os, signal, sys, time
from pathlib import Path
import torch
from slotnb.core import generator, seeded
from slotnb.data.clips import Clip, ClipList, Loader
from slotnb.models.savi import SAVi, preset
from slotnb.training.fit import DivergedError, Every, FitConfig, fit
from slotnb.training.losses import KLD, Losses, Reconstruction
torch.set_num_threads(1)

def clips(n=20, frames=2):
    g, labels = generator(0, 'data'), torch.zeros(frames, 32, 32, dtype=torch.uint8)
    labels[:, 4:12, 4:12], labels[:, 16:28, 10:20] = 1, 2
    return ClipList([Clip(torch.randint(0, 256, (frames, 3, 32, 32), dtype=torch.uint8, generator=g), labels, meta={'name': str(i)}) for i in range(n)], 'noise')

CONFIG = FitConfig(steps=5, batch_size=8, lr=1e-4, warmup=2, clip_norm=0.5, log_every=2, checkpoint_every=2, tensorboard=False)
KL = Losses([Reconstruction(unit='pm1'), KLD()])
CASES = { # name -> (model, frames, loss, config)
    'gaussian': (dict(init='gaussian'), 2, Reconstruction(), CONFIG),
    'per sample': (dict(dead_head=True), 2, Reconstruction(reduction='sum_per_sample'), CONFIG.but(weight_decay=0.1)),
    'stochastic': (dict(kernel_head='mlp', stochastic=True, dead_head=True, lstm=16), 3, KL, CONFIG),
    'one frame': (dict(), 1, Reconstruction(), CONFIG.but(ema=0.9)), # the predictor has no part in it
    'invariant': (dict(model='isa_tsr'), 2, Reconstruction(), CONFIG),
    'boxes': (dict(init='boxes'), 2, Reconstruction(), CONFIG),
    'ema': (dict(), 2, Reconstruction(), CONFIG.but(ema=0.9, channels_last=True)),
    'bf16': (dict(), 2, Reconstruction(), CONFIG.but(amp='bf16', channels_last=True)),
    'dropout': (dict(dropout=0.2), 2, Reconstruction(), CONFIG),
}

class Whole: # a loader that knows nothing of parts
    batch_size = 8
    def __init__(self, data): self.inner, self.dataset = Loader(data, 8), data
    def stream(self, start, stop): return (self.inner.batch(s) for s in range(start, stop))

def make(case, seed=0):
    change = dict(CASES[case][0])
    with seeded(seed, 'init'): return SAVi(preset('smoke', change.pop('model', 'sa')).but(**change))

def train(case, folder=None, seed=0, loader=None, loss=None, callbacks=(), **change):
    model, (_, frames, usual, config) = make(case, seed), CASES[case]
    data = clips(frames=frames)
    result = fit(model, loader(data) if loader else Loader(data, 8, workers=1), loss or usual, config.but(**change), folder, 'cpu', callbacks=callbacks)
    return model, result
'''
exec(COMMON)

RANKS = COMMON + '''
from safetensors.torch import save_file
rank, out = int(os.environ['RANK']), Path(sys.argv[1])
own = out/f'rank{rank}' # the folder that this rank's own notebook would have
def keep(name, model=None, result=None, **more):
    if model is not None: save_file({k: v.contiguous() for k, v in model.state_dict().items()}, own/f'{name}.safetensors')
    if result is not None: more |= dict(status=result.status, signal=result.signal, steps=result.steps, history=result.history, checkpoint=str(result.checkpoint))
    (own/f'{name}.json').write_text(json.dumps(more, default=str))
own.mkdir(parents=True, exist_ok=True)
'''

MAIN = RANKS + '''
for case in CASES: keep(case, *train(case, own/'runs'/case if case in ('gaussian', 'ema', 'dropout') else None, seed=rank)) # DDP hands out rank 0's weights
keep('whole', *train('gaussian', loader=Whole))
class Listens:
    def __call__(self, record, video, batch):
        self.heard = int(torch.get_rng_state().int().sum())
        return Reconstruction()(record, video, batch)
listens = Listens()
train('dropout', loss=listens)
keep('dropout state', heard=listens.heard)

called = []
def watch(step, run):
    called.append(step)
    return {'score': torch.rand(()).item()}
keep('watched', *train('gaussian', callbacks=[Every(2, watch)]), called=called)
keep('from one', *train('ema', out/'from_one', seed=3))
model, _ = train('stochastic') # a model that is trained twice, and between
if rank == 0: model(torch.zeros(2, 2, 3, 32, 32)).recon.sum().backward() # used by one rank alone: nobody waits for the others
model.zero_grad()
keep('twice', model, fit(model, Loader(clips(), 8), KL, CONFIG, device='cpu'))

def stop(step, run):
    if step == 2 and not os.environ.get('STOPPED'): os.environ['STOPPED'] = '1'; os.kill(os.getpid(), signal.SIGUSR1)
keep('stopped', *train('dropout', own/'runs'/'stopped', callbacks=[Every(1, stop)]))
keep('resumed', *train('dropout', own/'runs'/'stopped', seed=4))

class OnOne: # a signal to rank 1, which has no callbacks
    def __init__(self): self.calls = 0
    def __call__(self, record, video, batch):
        self.calls += 1
        if rank == 1 and self.calls == 2: os.kill(os.getpid(), signal.SIGTERM)
        return Reconstruction()(record, video, batch)
keep('stopped by the other', *train('gaussian', loss=OnOne(), steps=9))

class Bad(OnOne):
    def __call__(self, record, video, batch):
        self.calls += 1
        out = Reconstruction()(record, video, batch)
        # the number, not the gradient: only what ranks tell each other of their losses can show it
        return {k: v + (math.inf if rank == 1 and self.calls == 3 else 0) for k, v in out.items()}
def refused(name, fn):
    try: fn(); keep(name, error='none')
    except Exception as e: keep(name, error=f'{type(e).__name__}: {e}')
model = make('gaussian')
def before(step, run):
    if step == 2: model.kept = [p.detach().clone() for p in model.parameters()]
refused('diverged', lambda: fit(model, Loader(clips(), 8), Bad(), CONFIG, own/'runs'/'diverged', 'cpu', callbacks=[Every(1, before)]))
keep('untouched', same=rank > 0 or all(torch.equal(a, b) for a, b in zip(model.parameters(), model.kept)))
refused('odd batch', lambda: fit(make('gaussian'), Loader(clips(), 7), Reconstruction(), CONFIG.but(batch_size=7), device='cpu'))
refused('odd rest', lambda: fit(make('gaussian'), Loader(clips(9), 8, drop_last=False), Reconstruction(), CONFIG, device='cpu'))
refused('another run', lambda: train('gaussian', lr=1e-3*(1 + rank)))
refused('full', lambda: train('gaussian', out/'a_file' if rank == 0 else None))
keep('after', *train('gaussian', seed=rank)) # all of that left the ranks able to train
'''

def torchrun(tmp_path, script, *args, ranks=2, **kwargs):
    path = tmp_path/'script.py'
    path.write_text(script)
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks), str(path), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env={**env, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(slotnb.__file__).parents[1])}, **kwargs)

def finish(process, timeout=120):
    try: out = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate() # the ranks are in sessions of their own: torchrun ends them, after 30 s by force
        raise AssertionError(process.communicate(timeout=60)[0])
    return process.returncode, out

class Found:
    "What the ranks left."
    def __init__(self, folder): self.folder = folder
    def info(self, name, rank=0): return json.loads((self.folder/f'rank{rank}'/f'{name}.json').read_text())
    def weights(self, name, rank=0): return load_file(self.folder/f'rank{rank}'/f'{name}.safetensors')

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "One start of two ranks for everything that ends well."
    folder = tmp_path_factory.mktemp('two')
    def stop(step, run):
        if step == 2: os.kill(os.getpid(), signal.SIGUSR1)
    _, result = train('ema', folder/'from_one', callbacks=[Every(1, stop)])
    assert (result.status, result.steps) == ('stopped', 2)
    (folder/'a_file').write_text('not a folder')
    code, out = finish(torchrun(folder, MAIN, folder))
    assert code == 0, out
    found = Found(folder)
    found.out = out
    return found

def close(a, b, tolerance):
    assert set(a) == set(b)
    worst = max((a[k].double() - b[k].double()).abs().max().item() for k in a)
    assert worst <= tolerance, worst

def rows(history): return {k: v for k, v in history.items() if k != 'seconds'}

def close_rows(a, b, tolerance):
    a, b = rows(a), rows(b)
    assert set(a) == set(b)
    for k in a: assert a[k] == pytest.approx(b[k], rel=tolerance, abs=tolerance), k

alone = {}
def single(case):
    if case not in alone: alone[case] = train(case)
    return alone[case]


@pytest.mark.parametrize('case', [c for c in CASES if c not in ('dropout', 'bf16')])
def test_two_ranks_give_the_numbers_of_one(two, case):
    model, result = single(case)
    close(two.weights(case), model.state_dict(), 1e-5)
    close_rows(two.info(case)['history'], result.history, 1e-3 if case == 'invariant' else 1e-4) # its gradients pass through a pose that rounding moves
    start = make(case).state_dict()
    assert max((v - start[k]).abs().max() for k, v in model.state_dict().items()) > 2e-4 # twenty times what is tolerated
    # Adam makes steps of the learning rate's size out of rounding where the true gradient is zero (what a softmax over slots cannot see); all else agrees far better
    blind = ('decoder.cnn.2.bias', 'corrector.norm_slots.bias', 'self_attn.in_proj_bias')
    rest = [k for k in start if not k.endswith(blind)]
    assert len(start) - len(rest) <= 3
    close({k: two.weights(case)[k] for k in rest}, {k: model.state_dict()[k] for k in rest}, 5e-6 if case == 'invariant' else 1e-6)


def test_bf16_differs_by_its_rounding_only(two):
    model, result = single('bf16')
    start, ours, theirs = make('bf16').state_dict(), two.weights('bf16'), model.state_dict()
    apart, moved = (sum((a[k] - b[k]).square().sum().item() for k in start)**0.5 for a, b in ((ours, theirs), (theirs, start)))
    assert apart < 0.1*moved, (apart, moved)
    close_rows(two.info('bf16')['history'], result.history, 5e-3)


@pytest.mark.parametrize('case', [*CASES, 'whole', 'watched', 'from one', 'stopped', 'resumed', 'after', 'twice'])
def test_all_ranks_end_with_the_same(two, case):
    a, b = two.weights(case, 0), two.weights(case, 1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = two.info(case, 0), two.info(case, 1)
    assert a['history'] == b['history'] and a['checkpoint'] == b['checkpoint'] and a['status'] == b['status']


def test_a_loader_without_parts_gives_the_same(two):
    close(two.weights('whole'), two.weights('gaussian'), 0)


def test_only_rank_0_writes_and_evaluates(two):
    assert not (two.folder/'rank1'/'runs').exists() and two.info('ema', 1)['checkpoint'].startswith(str(two.folder/'rank0'))
    assert [p.name for p in ck.checkpoints(two.folder/'rank0'/'runs'/'ema'/'checkpoints')] == ['step-000004', 'step-000005']
    assert two.info('watched', 0)['called'] == [2, 4, 5] and two.info('watched', 1)['called'] == []
    assert None not in two.info('watched', 1)['history']['score'] # yet all know what was found
    close(two.weights('watched'), two.weights('gaussian'), 0)
    assert 'arning' not in two.out, two.out


def test_a_model_is_free_again_after_training(two):
    model, _ = train('stochastic')
    fit(model, Loader(clips(), 8), KL, CONFIG, device='cpu')
    close(two.weights('twice'), model.state_dict(), 2e-5)


def test_progress_is_written(two):
    progress = json.loads((two.folder/'rank0'/'runs'/'ema'/'progress.json').read_text())
    assert (progress['step'], progress['steps']) == (5, 5) and progress['seconds'] > 0 and re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}', progress['at'])


def test_unused_parameters_are_left_alone(two):
    "Weight decay would move them, had DDP given them a gradient of zeros."
    start, end = make('per sample').state_dict(), two.weights('per sample')
    assert all(torch.equal(start[k], end[k]) for k in start if k.startswith('prior')) and any(k.startswith('prior') for k in start)
    start, end = make('one frame').state_dict(), two.weights('one frame')
    assert all(torch.equal(start[k], end[k]) for k in start if k.startswith('predictor')) and any(k.startswith('predictor') for k in start)


def test_one_rank_begins_and_two_go_on(two):
    model, result = single('ema')
    close(two.weights('from one'), model.state_dict(), 1e-5)
    close_rows(two.info('from one')['history'], result.history, 1e-4)


def test_two_ranks_begin_and_one_goes_on(two):
    folder = two.folder/'rank0'/'runs'/'gaussian'
    for step in ck.checkpoints(folder/'checkpoints'):
        if step.name == 'step-000005': step.rename(folder/'last')
    model, result = train('gaussian', folder, seed=6)
    assert ck.latest(folder/'checkpoints').step == 5 and result.steps == 5
    close(model.state_dict(), single('gaussian')[0].state_dict(), 1e-5)
    assert torch.equal(ck.latest(folder/'checkpoints').tensors['generator.slots'], ck.read_training(folder/'last').tensors['generator.slots'])


def test_a_signal_to_one_rank_stops_both_at_one_step(two):
    a, b = two.info('stopped', 0), two.info('stopped', 1)
    assert (a['status'], a['signal'], a['steps']) == (b['status'], b['signal'], b['steps']) == ('stopped', 'SIGUSR1', 3)
    a, b = two.info('stopped by the other', 0), two.info('stopped by the other', 1)
    assert (a['status'], a['signal'], a['steps']) == (b['status'], b['signal'], b['steps']) and a['signal'] == 'SIGTERM' and 2 <= a['steps'] <= 4


def test_stopped_and_resumed_by_as_many_ranks_is_bit_identical_even_with_dropout(two):
    close(two.weights('resumed'), two.weights('dropout'), 0)
    assert rows(two.info('resumed')['history']) == rows(two.info('dropout')['history'])


def test_ranks_drop_out_differently(two):
    assert two.info('dropout state', 0)['heard'] != two.info('dropout state', 1)['heard']


def test_what_one_rank_finds_not_finite_ends_all(two):
    for rank in (0, 1):
        error = two.info('diverged', rank)['error']
        assert error.startswith('DivergedError: step 3 is not finite: loss inf') and 'step-000002' in error, error
    assert two.info('untouched')['same']


@pytest.mark.parametrize('name, says', [('odd batch', 'ValueError: batch_size 7 cannot be shared by 2 ranks'), ('odd rest', 'ValueError: a batch of 1 items .*cannot be cut into 2 equal parts; drop_last=True'),
                                        ('another run', '(?s)ValueError: rank . trains another run .*fit.lr: rank . 0.00'), ('full', 'a_file')])
def test_all_ranks_refuse(two, name, says):
    for rank in (0, 1): assert re.search(says, two.info(name, rank)['error']), two.info(name, rank)['error']
    close(two.weights('after'), two.weights('gaussian'), 0)


LONG = RANKS + '''
def say(step, run): print('pids', os.getpid(), os.getppid(), 'step', step, flush=True); time.sleep(0.1)
if rank: (own/'pid').write_text(str(os.getpid()))
keep('long', *train('gaussian', out/'long', callbacks=[Every(1, say)], steps=int(sys.argv[2]), checkpoint_every=5))
'''

@pytest.mark.slow
@pytest.mark.parametrize('how', ['kill a rank', 'kill rank 0', 'terminate torchrun', 'interrupt the terminal'])
def test_death_of_one_ends_all_and_the_run_goes_on(tmp_path, how):
    process = torchrun(tmp_path, LONG, tmp_path, 30)
    for line in process.stdout:
        if found := re.search(r'pids (\d+) (\d+) step 7\b', line): break
    else: raise AssertionError(process.wait())
    begun = time.monotonic()
    if how == 'kill a rank': os.kill(int((tmp_path/'rank1'/'pid').read_text()), signal.SIGKILL)
    if how == 'kill rank 0': os.kill(int(found[1]), signal.SIGKILL)
    if how == 'terminate torchrun': process.terminate()
    if how == 'interrupt the terminal': os.killpg(process.pid, signal.SIGINT)
    code, out = finish(process, 60)
    assert code != 0 and time.monotonic() - begun < 50, out
    last = ck.latest(tmp_path/'long'/'checkpoints')
    assert last.step == 5 if how.startswith('kill') else 7 <= last.step < 10
    code, out = finish(torchrun(tmp_path, LONG, tmp_path, 30))
    assert code == 0, out
    model, _ = train('gaussian', steps=30)
    close(Found(tmp_path).weights('long'), model.state_dict(), 1e-4)


@pytest.mark.slow
def test_three_ranks(tmp_path):
    code, out = finish(torchrun(tmp_path, RANKS + "keep('three', *train('stochastic', loader=lambda data: Loader(data, 9), batch_size=9))", tmp_path, ranks=3))
    assert code == 0, out
    model, result = train('stochastic', loader=lambda data: Loader(data, 9), batch_size=9)
    close(Found(tmp_path).weights('three'), model.state_dict(), 1e-5)
