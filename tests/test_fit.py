"""Faults and resumption of the training loop: kills, full disks, damaged and foreign checkpoints, losses that are not finite."""
import errno, json, math, os, re, signal, subprocess, sys, textwrap, time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import slotnb
from slotnb.core import generator, seeded
from slotnb.layers import weights
from slotnb.layers.weights import CheckpointError, read_weights, save_weights
from slotnb.training import checkpoint as ck
from slotnb.training.fit import DivergedError, Every, FitConfig, fit
from slotnb.training.losses import KLD, Losses, Reconstruction

torch.set_num_threads(1)

TOY = '''
import os, signal, sys, time
from types import SimpleNamespace
import torch
from torch import nn
from slotnb.core import generator, seeded

class Toy(nn.Module):
    "Noise drawn from the generator, dropout, kernels for a KL term."
    def __init__(self, width=8):
        super().__init__()
        self.config = {'width': width}
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(width, 6, 3, padding=1))
    def forward(self, video, generator=None):
        x = self.body(video.flatten(0, 1))
        mean, logvar = x.float().chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator)
        recon = mean + noise*(logvar/2).exp()
        return SimpleNamespace(recon=recon.unflatten(0, video.shape[:2]), extras={'kernel_mean': mean, 'kernel_logvar': logvar})

class ToyLoader:
    batch_size, seed = 4, 0
    def __init__(self, fingerprint='toy', pause=0.): self.fingerprint, self.pause = fingerprint, pause
    def batch(self, step):
        time.sleep(self.pause)
        return {'video': torch.randint(0, 256, (4, 2, 3, 8, 8), generator=generator(0, 'data', step), dtype=torch.uint8), 'labels': None}
    def stream(self, start, stop): yield from (self.batch(s) for s in range(start, stop))

def toy(seed=0, **kw):
    with seeded(seed, 'init'): return Toy(**kw)
'''
exec(TOY)
LOSS = Losses([Reconstruction(unit='pm1'), KLD()])
CONFIG = FitConfig(steps=20, batch_size=4, lr=1e-2, warmup=5, clip_norm=0.5, log_every=4, checkpoint_every=5, tensorboard=False)
VARIANTS = {'fp32': {}, 'bf16': dict(amp='bf16'), 'channels_last': dict(amp='bf16', channels_last=True), 'ema': dict(amp='bf16', ema=0.9), 'adamw': dict(weight_decay=0.1)}

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
def rows(history): return {k: v for k, v in history.items() if k != 'seconds'}

class Die(Exception): pass

def die_at(step):
    def at(now, run):
        if now == step: raise Die
    return Every(1, at)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('death', [10, 13]) # on a checkpoint's step, and past one
def test_killed_and_resumed_is_bit_identical(tmp_path, variant, death):
    config = CONFIG.but(**VARIANTS[variant])
    whole = toy()
    unbroken = fit(whole, ToyLoader(), LOSS, config, tmp_path/'a', device='cpu')
    with pytest.raises(Die): fit(toy(), ToyLoader(), LOSS, config, tmp_path/'b', device='cpu', callbacks=[die_at(death)])
    torch.rand(7) # whatever the process drew meanwhile
    resumed = toy(seed=5)
    result = fit(resumed, ToyLoader(), LOSS, config, tmp_path/'b', device='cpu')
    assert same(whole, resumed) and result.status == 'done'
    assert rows(result.history) == rows(unbroken.history)
    lines = [json.loads(l)['step'] for l in (tmp_path/'b'/'history.jsonl').read_text().splitlines()]
    assert lines == [4, 8, 12, 16, 20]
    for name in ('model.safetensors', 'training.safetensors'):
        assert (unbroken.checkpoint/name).read_bytes() == (result.checkpoint/name).read_bytes()


def test_a_run_cut_into_many_pieces(tmp_path):
    config, whole = CONFIG.but(amp='bf16', ema=0.99), toy()
    unbroken = fit(whole, ToyLoader(), LOSS, config, device='cpu')
    for cut in (1, 3, 4, 11, 19, None):
        model = toy(seed=0 if cut == 1 else 7) # only the first piece's own weights count
        def stop(step, run):
            if step == cut: os.kill(os.getpid(), signal.SIGUSR1)
        result = fit(model, ToyLoader(), LOSS, config, tmp_path, device='cpu', callbacks=[Every(1, stop)])
        assert (result.status, result.steps) == (('stopped', cut) if cut else ('done', 20))
    assert same(whole, model) and rows(result.history) == rows(unbroken.history)


def test_the_seed_decides_noise_and_the_process_does_not():
    a, b, c = toy(), toy(), toy()
    fit(a, ToyLoader(), LOSS, CONFIG, device='cpu')
    state = torch.manual_seed(99).get_state()
    fit(b, ToyLoader(), LOSS, CONFIG, device='cpu')
    assert torch.equal(torch.get_rng_state(), state) # and leaves the process's generator alone
    fit(c, ToyLoader(), LOSS, CONFIG, device='cpu', seed=1)
    assert same(a, b) and not same(a, c)


SCRIPT = TOY + '''
from slotnb.training.fit import FitConfig, fit
from slotnb.training.losses import KLD, Losses, Reconstruction
config = FitConfig(**eval(sys.argv[2]))
torch.set_num_threads(1)
def say(step, run): print('step', step, flush=True)
say.every = 1
result = fit(toy(), ToyLoader(pause=float(sys.argv[3])), Losses([Reconstruction(unit='pm1'), KLD()]), config, sys.argv[1], device='cpu', callbacks=[say])
print('status', result.status, result.signal, result.steps, flush=True)
'''

def launch(tmp_path, folder, config, pause):
    script = tmp_path/'script.py'
    script.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(script), str(folder), repr(config.to_dict()), str(pause)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(slotnb.__file__).parents[1])})

def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text): return
    raise AssertionError(''.join(lines))


@pytest.mark.slow
@pytest.mark.parametrize('how', ['SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGKILL'])
def test_signals_in_a_process_of_its_own(tmp_path, how):
    whole = toy()
    unbroken = fit(whole, ToyLoader(), LOSS, CONFIG, tmp_path/'a', device='cpu')
    process = launch(tmp_path, tmp_path/'b', CONFIG, 0.1)
    wait_for(process, 'step 7')
    process.send_signal(getattr(signal, how))
    out = process.communicate(timeout=60)[0]
    if how != 'SIGKILL':
        assert process.returncode == 0 and f'status stopped {how}' in out, out
        assert ck.checkpoints(tmp_path/'b'/'checkpoints')[-1].name >= 'step-000007'
    resumed = toy(seed=3)
    result = fit(resumed, ToyLoader(), LOSS, CONFIG, tmp_path/'b', device='cpu')
    assert same(whole, resumed) and rows(result.history) == rows(unbroken.history)


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with pytest.raises(Die): fit(toy(), ToyLoader(), LOSS, CONFIG, device='cpu', callbacks=[die_at(2)])
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('looks', ['every step', 'late']) # late: as on a GPU, where bad steps are found at the next row
def test_divergence_leaves_no_trace(tmp_path, monkeypatch, where, looks):
    from slotnb.training import fit as module
    before = {}

    class Bad:
        calls = 0
        def __call__(self, record, video, batch):
            self.calls += 1
            if self.calls != 7: return LOSS(record, video, batch)
            error = record.recon.float()
            return {'recon': error.mean()*math.nan if where == 'loss' else (error - error.detach()).abs().sqrt().sum(), 'kld': error.mean()}

    real = module.train_step
    def watched(run, batch):
        if run.step == 6:
            before['p'] = [p.detach().clone() for p in run.params]
            before['m'] = [{k: v.clone() for k, v in run.optimizer.state[p].items()} for p in run.params]
        before['run'] = run
        real(run, batch)
    monkeypatch.setattr(module, 'train_step', watched)
    if looks == 'late':
        look = module.look
        monkeypatch.setattr(module, 'look', lambda run: look(run) if run.step % 4 == 0 else None)
    with pytest.raises(DivergedError, match=r'step 7 is not finite: loss (?s:.*)recon (?s:.*)kld (?s:.*)step-000005'):
        fit(toy(), ToyLoader(), Bad(), CONFIG, tmp_path, device='cpu')
    run = before['run']
    assert run.step == (7 if looks == 'every step' else 8)
    assert all(torch.equal(a, b) for a, b in zip(before['p'], run.params))
    assert all(torch.equal(v, run.optimizer.state[p][k]) for p, m in zip(run.params, before['m']) for k, v in m.items())
    assert ck.latest(tmp_path/'checkpoints').step == 5


def no_space(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

@pytest.mark.parametrize('file', ['model.safetensors', 'config.json', 'training.safetensors', 'state.json'])
def test_full_disk_while_checkpointing(tmp_path, monkeypatch, file):
    real = {name: getattr(Path, name) for name in ('write_bytes', 'write_text')}
    def fails(name):
        def write(self, data, *args, **kwargs):
            if 'step-000010' in str(self) and f'.{file}.' in self.name:
                real[name](self, data[:len(data)//2]) # what fits
                no_space()
            return real[name](self, data, *args, **kwargs)
        return write
    for name in real: monkeypatch.setattr(Path, name, fails(name))
    with pytest.raises(OSError, match='step 10 could not be written(?s:.*)No space left(?s:.*)intact(?s:.*)step-000005') as e:
        fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu')
    assert e.value.errno == errno.ENOSPC
    assert [p.name for p in (tmp_path/'checkpoints').iterdir()] == ['step-000005']
    monkeypatch.undo()
    whole, resumed = toy(), toy(seed=2)
    fit(whole, ToyLoader(), LOSS, CONFIG, device='cpu')
    assert fit(resumed, ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu').status == 'done' and same(whole, resumed)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='mounting a small tmpfs needs root')
def test_full_disk_for_real(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=160k', 'tmpfs', str(disk)], capture_output=True).returncode: pytest.skip('mounting a tmpfs is not permitted here')
    try:
        config = CONFIG.but(keep=20, checkpoint_every=1)
        with pytest.raises(OSError, match='could not be written') as e: fit(toy(width=32), ToyLoader(), LOSS, config, disk/'run', device='cpu')
        assert e.value.errno == errno.ENOSPC
        saved = ck.latest(disk/'run'/'checkpoints')
        assert saved.step >= 1 and not list((disk/'run'/'checkpoints').glob('.*'))
    finally: subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.parametrize('change, field', [
    (dict(config=CONFIG.but(lr=2e-2)), 'fit.lr: stored 0.01, here 0.02'), (dict(config=CONFIG.but(steps=30)), 'fit.steps: stored 20, here 30'),
    (dict(model=dict(width=9)), 'model.width: stored 8, here 9'), (dict(loader=ToyLoader('other')), "data.fingerprint: stored 'toy', here 'other'"),
    (dict(seed=1), 'seed: stored 0, here 1'), (dict(loss=Reconstruction()), 'loss: stored')])
def test_another_run_is_refused_by_field(tmp_path, change, field):
    fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu')
    files = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(field)):
        fit(toy(**change.get('model', {})), change.get('loader', ToyLoader()), change.get('loss', LOSS), change.get('config', CONFIG), tmp_path, device='cpu', seed=change.get('seed', 0))
    assert files == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} # nothing is lost by asking


def test_how_often_one_looks_may_change(tmp_path):
    with pytest.raises(Die): fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu', callbacks=[die_at(12)])
    assert fit(toy(), ToyLoader(), LOSS, CONFIG.but(log_every=5, checkpoint_every=7, keep=1), tmp_path, device='cpu').status == 'done'


@pytest.mark.parametrize('file', ['model.safetensors', 'config.json', 'training.safetensors', 'state.json'])
@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'missing'])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage):
    with pytest.raises(Die): fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu', callbacks=[die_at(12)])
    path = tmp_path/'checkpoints'/'step-000010'/file
    data = bytearray(path.read_bytes())
    if damage == 'truncated': path.write_bytes(data[:len(data)*2//3])
    if damage == 'missing': path.unlink()
    if damage == 'flipped':
        data[len(data)//2] ^= 64
        path.write_bytes(data)
    whole, resumed = toy(), toy(seed=1)
    fit(whole, ToyLoader(), LOSS, CONFIG, device='cpu')
    with pytest.warns(UserWarning, match='damaged checkpoint(?s:.*)step-000010'):
        fit(resumed, ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu')
    assert same(whole, resumed)


def test_all_checkpoints_damaged_is_an_error_that_deletes_nothing(tmp_path):
    fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu')
    for p in ck.checkpoints(tmp_path/'checkpoints'): (p/'state.json').write_text('{')
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='none of the 2 checkpoints(?s:.*)resume=False'):
        fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu')
    assert len(ck.checkpoints(tmp_path/'checkpoints')) == 2
    assert fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu', resume=False).status == 'done'


def test_half_written_checkpoint_folders_are_swept_up(tmp_path):
    (tmp_path/'checkpoints'/'.step-000003.part').mkdir(parents=True)
    fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path, device='cpu')
    assert sorted(p.name for p in (tmp_path/'checkpoints').iterdir()) == ['step-000015', 'step-000020']


def test_fused_optimiser_equals_the_plain_one_in_any_layout():
    def train(fused):
        net = toy().body.to(memory_format=torch.channels_last).eval()
        optimizer, draw = torch.optim.Adam(net.parameters(), 1e-2, fused=fused, foreach=False), generator(0, 'data')
        for _ in range(10):
            optimizer.zero_grad()
            net(torch.rand(2, 3, 8, 8, generator=draw).to(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()
        return net
    for a, b in zip(train(True).parameters(), train(False).parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_what_is_saved_and_returned(tmp_path):
    model, seen = toy(), {}
    def look(step, run): seen[step] = [p.detach().clone() for p in run.params]
    result = fit(model, ToyLoader(), LOSS, CONFIG.but(ema=0.9), tmp_path, device='cpu', callbacks=[Every(20, look)])
    stored = read_weights(result.checkpoint)[0]
    assert all(torch.equal(stored[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(seen[20], model.parameters()))
    raw = ck.latest(tmp_path/'checkpoints').extra('raw.')
    assert set(raw) == set(stored) and not torch.equal(raw['body.0.weight'], stored['body.0.weight'])


def test_tensorboard_shows_no_step_twice(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = CONFIG.but(tensorboard=True)
    with pytest.raises(Die): fit(toy(), ToyLoader(), LOSS, config, tmp_path, device='cpu', callbacks=[die_at(13)])
    time.sleep(1.1) # event files are read in the order of the second in their names
    fit(toy(), ToyLoader(), LOSS, config, tmp_path, device='cpu', callbacks=[Every(10, lambda step, run: {'score': 0.5})])
    events = EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    assert [e.step for e in events.Scalars('loss')] == [4, 8, 12, 16, 20] and [e.step for e in events.Scalars('score')] == [20]


def test_batch_size_and_frozen_models_are_checked():
    with pytest.raises(ValueError, match='batches of 4, the config says batch_size 5'): fit(toy(), ToyLoader(), LOSS, CONFIG.but(batch_size=5), device='cpu')
    with pytest.raises(ValueError, match='Toy has no trainable parameters'): fit(toy().requires_grad_(False), ToyLoader(), LOSS, CONFIG, device='cpu')


def test_no_pickle_anywhere():
    "Nothing in the package opens or writes a pickle."
    for path in Path(slotnb.__file__).parent.rglob('*.py'):
        text = path.read_text()
        assert not re.search(r'\bimport .*\bpickle\b|torch\.save\(|allow_pickle\s*=\s*True', text), path
        for call in re.findall(r'torch\.load\((.*)', text): assert 'weights_only=True' in call, (path, call)


def test_a_checkpoint_made_to_run_code_is_refused(tmp_path):
    import pickle
    marker = tmp_path/'ran'
    class Evil:
        def __reduce__(self): return (marker.touch, ())
    fit(toy(), ToyLoader(), LOSS, CONFIG, tmp_path/'run', device='cpu')
    step = ck.checkpoints(tmp_path/'run'/'checkpoints')[-1]
    evil = pickle.dumps(Evil())
    for name in ('training.safetensors', 'model.safetensors'): # weights are read first
        (step/name).write_bytes(evil)
        state = json.loads((step/'state.json').read_text())
        state['files'][name] = ck._sum(step/name)
        (step/'state.json').write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match=name): ck.read_training(step)
    assert not marker.exists()


def test_weights_larger_than_half_precision_are_refused(tmp_path):
    net = nn.Linear(2, 2)
    with torch.no_grad(): net.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match='weight reaches 1e[+]05, too large for float16'): save_weights(net, tmp_path, {}, 'float16')
    save_weights(net, tmp_path, {}, 'bfloat16')


def test_a_full_disk_keeps_the_old_weights(tmp_path, monkeypatch):
    save_weights(nn.Linear(2, 2), tmp_path, {})
    old = (tmp_path/'model.safetensors').read_bytes()
    monkeypatch.setattr(Path, 'write_bytes', no_space)
    with pytest.raises(OSError, match='No space left'): save_weights(nn.Linear(2, 2), tmp_path, {})
    monkeypatch.undo()
    assert (tmp_path/'model.safetensors').read_bytes() == old and read_weights(tmp_path)


def test_files_of_two_models_are_told_apart(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path/'a', {'n': 1})
    save_weights(nn.Linear(2, 2), tmp_path/'b', {'n': 2})
    (tmp_path/'b'/'model.safetensors').write_bytes((tmp_path/'a'/'model.safetensors').read_bytes())
    with pytest.raises(CheckpointError, match='not of one model'): read_weights(tmp_path/'b')


@pytest.mark.parametrize('kind', ['boxes', 'masks'])
def test_a_conditioned_model_learns_from_its_labels(kind):
    "Boxes or masks of the first frame come from the batch; without labels the model is refused by name."
    from slotnb.data.clips import Clip, ClipList, Loader
    from slotnb.models.savi import SAVi, preset
    from slotnb.training.losses import Reconstruction
    torch.manual_seed(0)
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[:, 4:12, 4:12], labels[:, 16:28, 10:20] = 1, 2
    clips = [Clip(torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), labels, meta={'name': str(i)}) for i in range(4)]
    model = SAVi(preset('smoke').but(init=kind))
    before = model.init.embed[0].weight.detach().clone()
    config = FitConfig(steps=2, batch_size=4, lr=1e-3)
    fit(model, Loader(ClipList(clips, 'told'), 4), Reconstruction(), config, device='cpu')
    assert not torch.equal(before, model.init.embed[0].weight)
    blind = ClipList([Clip(c.video, meta=c.meta) for c in clips], 'blind')
    with pytest.raises(ValueError, match=f'first-frame {kind} needs data with labels'):
        fit(model, Loader(blind, 4), Reconstruction(), config, device='cpu')
