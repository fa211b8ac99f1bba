"""Faults of runs and sweeps: kills, signals, full and read-only disks, two writers, clocks that jump, damaged and hostile checkpoints.
Whatever happens, status and errors are true, and the same command ends with the numbers of an unbroken run."""
import contextlib, json, os, pickle, random, re, shutil, signal, socket, subprocess, sys, threading, time, uuid, zipfile, zlib
from pathlib import Path

import nbformat
import pytest

for package in ('yaml', 'papermill', 'ipykernel', 'psutil', 'tensorboard'): pytest.importorskip(package)
import psutil, torch

from slotnb.batch import claim as claims
from slotnb.batch.claim import Claim, Taken, alive, holder
from slotnb.batch.run import all_runs, read_run
from slotnb.batch.runner import DONE, FAILED, REFUSED, STOPPED, TAKEN
from slotnb.batch.sweep import read_plan
from slotnb.layers.weights import CheckpointError
from slotnb.training.checkpoint import checkpoints, read_training

ROOT = Path(__file__).resolve().parent.parent
slow = pytest.mark.slow

# ---------------------------------------------------------------- an experiment that takes seconds

PARAMETERS = '''
steps: int = 40  # training steps
lr: float = 1e-3  # learning rate
seed: int = 0  # of everything
pause: float = 0.0  # seconds that every step waits for its batch
device: str = 'cpu'  # of the run
runs_dir: str = ''  # folder of all runs
run: str = ''  # name of this run
'''
CELLS = ['''
import os, signal, time
import torch
from slotnb.batch.run import check_parameters, start_run
from slotnb.core import generator, seeded
from slotnb.data.clips import Clip, ClipList, Loader
from slotnb.models.savi import SAVi, preset
from slotnb.training.fit import Every, FitConfig, fit
from slotnb.training.losses import Reconstruction
parameters = check_parameters(globals())
torch.set_num_threads(1)

def trouble(place, left=0):
    "What a test wants to go wrong here."
    if os.environ.get('FULL_AT') == place:
        small = os.statvfs(os.path.dirname(os.environ['FILLER']))
        with open(os.environ['FILLER'], 'wb', buffering=0) as f: f.write(bytes(small.f_bavail*small.f_bsize - left))
    if os.environ.get('STOP_AT') == place: os.kill(os.getpid(), signal.SIGUSR1)
''', '''
trouble('claim.json')
trouble('run.json', left=4096)
this = start_run('toy', parameters, runs_dir, run, device)
with open(this.folder/'executions.txt', 'a') as f: f.write(f'{os.getpid()}\\n')
print('claimed', flush=True)
''', '''
draw = generator(0, 'data')
clips = []
for i in range(16):
    time.sleep(0.01)
    clips.append(Clip(torch.randint(0, 255, (2, 3, 32, 32), generator=draw, dtype=torch.uint8), meta={'name': str(i)}))
print('data are there', flush=True)
''', '''
with seeded(seed, 'init'): model = SAVi(preset('smoke'))

class Slow(Loader):
    def batch(self, *args):
        time.sleep(pause)
        return super().batch(*args)

def watch(step, training):
    trouble(f'step {step}', left=16384) # enough for a row of the history
    return {'weights': sum(p.abs().sum().item() for p in training.params)}

config = FitConfig(steps=steps, batch_size=4, lr=lr, warmup=4, clip_norm=1., amp='bf16', channels_last=True, log_every=5, checkpoint_every=5, tensorboard=False)
result = this.require_done(fit(model, Slow(ClipList(clips, 'noise'), 4, seed=seed), Reconstruction(), config, this.folder, device, seed, [Every(1, watch)]))
print('trained', flush=True)
''', '''
metrics = {'steps': result.steps, 'seconds.train': result.seconds}
for i, clip in enumerate(clips):
    time.sleep(0.02)
    recon = model.predict(clip.video, seed=0).recon
    metrics[f'mse_pixel.decoder.{i}'] = (recon - clip.video/255).double().square().mean().item()
model.save_pretrained(this.folder/'model')
trouble('metrics.json')
trouble('the end', left=4096)
''', '''
this.finish(metrics)
print('finished', flush=True)
''', '''
trouble('notebook.ipynb')
''']

def toy(folder, cells=CELLS):
    "The notebook `toy.ipynb` in a folder."
    code = [nbformat.v4.new_code_cell(c.strip()) for c in (PARAMETERS, *cells)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# toy\n\n> Noise, learned.'), *code])
    notebook.cells[1].metadata['tags'] = ['parameters']
    notebook.metadata['kernelspec'] = dict(name='python3', language='python', display_name='python3')
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder/'toy.ipynb')
    return folder/'toy.ipynb'

def here(root, name, until=None, **parameters):
    "The toy's cells in this process, unbroken or until a step; the run's folder."
    space = {'__name__': 'experiment'}
    exec(PARAMETERS, space)
    space |= dict(runs_dir=str(root), run=name, device='cpu') | parameters
    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    before, threads = dict(os.environ), torch.get_num_threads()
    if until: os.environ['STOP_AT'] = f'step {until}'
    try:
        for cell in CELLS: exec(cell, space)
    except SystemExit: assert until
    finally:
        torch.set_num_threads(threads)
        os.environ.clear(); os.environ.update(before)
        for n, handler in signals.items(): signal.signal(n, handler)
    return Path(root)/'toy'/name

# ---------------------------------------------------------------- processes, and what is true of them

def lives(pid) -> bool:
    "Whether a process runs; one that is dead but not collected does not."
    if pid < 0: return False
    try: return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess: return False

class Lab:
    "A folder for runs and the processes that work in it, none of which outlives it."
    def __init__(self, folder):
        self.folder, self.root, self.mark, self.said = folder, folder/'runs', uuid.uuid4().hex, 0
        self.notebook = toy(folder/'experiments')

    def environment(self, **more):
        plain = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'STOP_AT', 'FULL_AT', 'IN_TEST', 'RANK'))}
        return {**plain, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', 'SLOTNB_RUNS': str(self.root), 'SLOTNB_LAB': self.mark, **more}

    def start(self, *command, **environment):
        "A process in a session of its own; its output is a file's."
        self.said += 1
        path = self.folder/f'said-{self.said}.txt'
        with open(path, 'w') as f:
            process = subprocess.Popen([sys.executable, '-m', *map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
                                       env=self.environment(**environment), start_new_session=True,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # started from a background shell, these tests would hand on that it is ignored
        process.said = path
        return process

    def run(self, name, *more, notebook=None, root=None, **environment):
        return self.start('slotnb.batch.cli', 'run', notebook or self.notebook, '--root', root or self.root, '--name', name, *more, **environment)

    def papermill(self, name, *more, notebook=None, **environment):
        return self.start('papermill', notebook or self.notebook, self.folder/f'{name}.ipynb', '--no-progress-bar', '-p', 'runs_dir', self.root, '-p', 'run', name, *more, **environment)

    def processes(self, word=''):
        "Those that this lab started, directly or not, whose command holds a word."
        found = []
        for p in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if p.pid != os.getpid() and p.environ().get('SLOTNB_LAB') == self.mark and lives(p.pid) and any(word in part for part in p.cmdline()): found.append(p)
        return found

    def kernel_of(self, process):
        "A process's kernel, if it has one by now."
        with contextlib.suppress(psutil.NoSuchProcess):
            for p in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any('ipykernel_launcher' in part for part in p.cmdline()): return p

    def end(self):
        "Kill what is left; how many that were."
        left = self.processes()
        for p in left:
            with contextlib.suppress(psutil.NoSuchProcess): p.kill()
        psutil.wait_procs(left, 10)
        return len(left)

@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    yield lab
    lab.end()

def lie(folder): # (status, '' or what is wrong with it)
    "A run's status, and whether a process belies it."
    def writer(): return lives((holder(folder) or {}).get('pid', -1))
    was = writer()
    info = read_run(folder)
    if info.get('status') == 'running' and not (was or writer()): return 'running', f'running, but nobody is there: {info}'
    error = info.get('error') or {}
    if error.get('name') == 'Lost' and (named := re.search(r'process (\d+)', error['message'])) and lives(int(named[1])): return 'failed', f'lost, but process {named[1]} is there: {info}'
    for seconds in (info.get('seconds', 0), *(s['seconds'] for s in info.get('sessions', []))): assert 0 <= seconds < 600
    return info.get('status'), ''

def truth(folder, grace=2.):
    "A run's status, which must be true but for the moment in which a process dies: its lock and its place in the list of processes do not go together."
    end = time.monotonic() + grace
    while True:
        status, wrong = lie(folder)
        if not wrong: return status
        assert time.monotonic() < end, wrong
        time.sleep(0.05)

def wait(for_it, seconds=60, say=''):
    "Until something is true; what it then is."
    end = time.monotonic() + seconds
    while not (found := for_it()):
        assert time.monotonic() < end, f'waited {seconds} s in vain for {say or for_it}'
        time.sleep(0.02)
    return found

def finish(process, folder=None, seconds=240):
    "A process's exit code; meanwhile the run's status must be true."
    end = time.monotonic() + seconds
    while process.poll() is None:
        if folder is not None: truth(folder)
        assert time.monotonic() < end, process.said.read_text()
        time.sleep(0.05)
    return process.returncode

def at_rest(lab, folder, seconds=15):
    "Wait until nothing works any more, and see that the status says so."
    wait(lambda: [truth(folder)] and not lab.processes(), seconds, 'processes to go')
    wait(lambda: truth(folder) not in ('running', 'queued'), 3, 'a status without a process') # one that is about to be dead is not listed, but has its lock

def again(command, folder, tries=12):
    "The same command until it ends well; how often it had to be given, because somebody was still at it."
    for n in range(1, tries + 1):
        process = command()
        code = finish(process, folder)
        if code == 0: return n
        said = process.said.read_text()
        assert 'is being written by process' in said and (code == TAKEN or process.args[2] == 'papermill'), f'exit {code}\n{said}'
        time.sleep(0.3)
    raise AssertionError(f'{folder} did not end in {tries} attempts')

def numbers(folder): return {k: v for k, v in json.loads((folder/'metrics.json').read_text()).items() if not k.startswith('seconds.')}
def rows(folder): return [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in (folder/'history.jsonl').read_text().splitlines()]

def same(folder, unbroken):
    "Done, with the numbers and the history of an unbroken run, bit for bit."
    info = read_run(folder)
    assert info['status'] == 'done' and 'error' not in info, info
    assert [r['step'] for r in rows(folder)] == [r['step'] for r in rows(unbroken)], 'steps of the history'
    assert numbers(folder) == numbers(unbroken) and rows(folder) == rows(unbroken)
    assert info['seconds'] >= 0 and not alive(folder) and holder(folder) is None
    return True

def where(folder):
    "The stretch of its life a run is in."
    info, progress = read_run(folder), folder/'progress.json'
    if info.get('status') in (None, 'queued'): return 'startup'
    if (folder/'metrics.json').exists(): return 'finish'
    if not progress.exists(): return 'data'
    step = json.loads(progress.read_text())
    return 'training' if step['step'] < step['steps'] else 'evaluation'

def tally(said, capsys):
    with capsys.disabled(): print(f'\n    {said}', flush=True)

def counted(words): return ', '.join(f'{words.count(w)} {w}' for w in dict.fromkeys(words))

@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    return here(tmp_path_factory.mktemp('unbroken'), 'unbroken')

# ---------------------------------------------------------------- kill -9

def test_kills_in_short(lab, unbroken, capsys):
    "One run: its kernel is killed while it makes data, papermill in training, the runner in evaluation; then it ends."
    folder, killed = lab.root/'toy'/'r', []
    def until(process, stretch): wait(lambda: process.poll() is not None or where(folder) in stretch, 60, stretch)

    process = lab.run('r', '-p', 'pause', '0.01')
    until(process, ['data', 'training'])
    killed.append(where(folder))
    os.kill(wait(lambda: holder(folder))['pid'], signal.SIGKILL)
    assert finish(process, folder) == FAILED and read_run(folder)['error']['name'] == 'DeadKernel'

    process = lab.papermill('r', '-p', 'pause', '0.01')
    until(process, ['training', 'evaluation'])
    killed.append(where(folder))
    process.kill()
    process.wait()
    at_rest(lab, folder)
    assert read_run(folder)['error']['name'] == 'Lost'

    process = lab.run('r', '-p', 'pause', '0.01')
    until(process, ['evaluation', 'finish'])
    killed.append(where(folder))
    process.kill()
    process.wait()
    attempts = again(lambda: lab.run('r', '-p', 'pause', '0.01'), folder)
    assert same(folder, unbroken)
    assert 2 <= len((folder/'executions.txt').read_text().split()) <= 4
    tally(f'3 kills of one run (kernel, papermill, runner; {counted(killed)}), the last taken up in {attempts} attempt(s): identical metrics', capsys)

POINTS = [('startup', 0.), ('startup', 1.), ('data', 0.15), ('training', 1), ('training', 13), ('training', 25), ('training', 37), ('evaluation', 0.1), ('evaluation', 0.3), ('finish', 0.)]

def kill(lab, victim, process, folder, stretch, point):
    "Kill kernel, papermill or runner in a stretch of its life: seconds into it, or at a step of training; the stretch that it was."
    def ended(): return process.poll() is not None
    def begun():
        if stretch == 'training': return (folder/'progress.json').exists() and json.loads((folder/'progress.json').read_text())['step'] >= point
        if stretch == 'finish': return (folder/'metrics.json').exists()
        return stretch == 'startup' or stretch == 'data' and alive(folder) or where(folder) in (stretch, 'finish')
    target = wait(lambda: lab.kernel_of(process) or ended(), 60, 'a kernel') if victim == 'kernel' else process
    wait(lambda: ended() or begun(), 60, stretch)
    if stretch != 'training': time.sleep(point)
    was = 'ended' if ended() else where(folder)
    with contextlib.suppress(psutil.NoSuchProcess, AttributeError): target.kill()
    code = finish(process, folder)
    assert code != 0 or read_run(folder)['status'] == 'done'
    return was

@slow
@pytest.mark.parametrize('victim', ['kernel', 'papermill', 'runner'])
def test_kills(lab, unbroken, victim, capsys):
    "Ten times, over its whole life."
    draw, stretches, attempts, results = random.Random(f'kills of {victim}'), [], 0, 0
    start = lab.papermill if victim == 'papermill' else lab.run
    for i, (stretch, latest) in enumerate(POINTS):
        folder = lab.root/'toy'/f'r{i}'
        point = latest + draw.randrange(12)*(latest < 37) if stretch == 'training' else draw.random()*latest + (stretch == 'startup')*draw.random()
        stretches.append(kill(lab, victim, start(f'r{i}'), folder, stretch, point))
        if i % 2: at_rest(lab, folder) # else at once, while an orphan may still be there
        attempts += again(lambda: start(f'r{i}'), folder)
        results += same(folder, unbroken)
    tally(f'{victim}: 10 kills ({counted(stretches)}), {results} ended with identical metrics, in {attempts} commands', capsys)
    assert results == 10 and {'startup', 'training', 'evaluation'} <= set(stretches) and stretches.count('ended') <= 2, 'the kills were not spread over its life'
    assert not lab.processes()

REAL = ['-p', 'compare', 'none', '-p', 'steps', '240', '-p', 'device', 'cpu']

@slow
def test_ten_kills_of_one_real_run(lab, capsys):
    "The decomposition experiment, hit ten times before it ends."
    draw, stretches, hit = random.Random('a real run'), [], []
    def start(name): return lab.run(name, *REAL, notebook=ROOT/'nbs/experiments/10_decomposition.ipynb')
    def by_papermill(name): return lab.papermill(name, *REAL, notebook=ROOT/'nbs/experiments/10_decomposition.ipynb')
    whole, folder = lab.root/'10_decomposition'/'whole', lab.root/'10_decomposition'/'r'
    assert finish(start('whole'), whole) == 0
    victims = ['kernel', 'papermill', 'runner']*3 + ['kernel']
    for i, victim in enumerate(victims):
        process = (by_papermill if victim == 'papermill' else start)('r')
        kernel = wait(lambda: lab.kernel_of(process) or process.poll() is not None, 60, 'a kernel')
        if 0 < i < 9: wait(lambda: process.poll() is not None or alive(folder), 60, 'the run')
        time.sleep(4*draw.random())
        if i == 9: wait(lambda: process.poll() is not None or (folder/'metrics.json').exists(), 60, 'metrics')
        if process.poll() is not None: break
        stretches.append(where(folder))
        hit.append(victim)
        (kernel if victim == 'kernel' else process).kill()
        finish(process, folder)
        at_rest(lab, folder)
    attempts = again(lambda: start('r'), folder)
    same(folder, whole)
    tally(f'10_decomposition: one run hit {len(hit)} times ({counted(hit)}; {counted(stretches)}), then {attempts} command(s): identical metrics', capsys)
    assert len(hit) >= 6

# ---------------------------------------------------------------- full and read-only disks

@contextlib.contextmanager
def mounted(folder, *options):
    "Something mounted at a folder, where this process may."
    folder.mkdir(exist_ok=True)
    done = subprocess.run(['mount', *map(str, options), str(folder)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'mounting needs root: {done.stderr.strip()}')
    try: yield folder
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

FULL = { # where the disk is full: what is said, and what must be there and whole afterwards
    'claim.json': ('claim.json could not be written', ()),
    'run.json': ('run.json could not be written', ()),
    'step 18': ('the checkpoint of step 20 could not be written(?s:.*)intact: (?s:.*)step-000015',
                ('checkpoints/step-000015/training.safetensors', 'checkpoints/step-000015/model.safetensors')),
    'metrics.json': ('metrics.json could not be written', ('checkpoints/step-000040/training.safetensors', 'model/model.safetensors')),
    'the end': ('run.json could not be written', ('checkpoints/step-000040/training.safetensors', 'model/model.safetensors', 'metrics.json')),
    'notebook.ipynb': ('notebook.ipynb could not be written', ('checkpoints/step-000040/training.safetensors', 'metrics.json')),
}

@slow
@pytest.mark.parametrize('place', FULL)
def test_a_full_disk(lab, unbroken, place, capsys):
    "What could not be written, and where; what was there is whole; with space again the same command ends it."
    with mounted(lab.folder/'small', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs') as small:
        folder, filler = small/'toy'/'r', small/'filler'
        process = lab.run('r', root=small, FULL_AT=place, FILLER=str(filler))
        code = finish(process, folder)
        said, (words, whole) = process.said.read_text(), FULL[place]
        assert 'No space left on device' in said and re.search(words, said), said
        before, status = files(folder), read_run(folder)['status']
        early = place in ('claim.json', 'run.json') # run.json could not learn more than that it was queued
        assert (code, status) == ((DONE, 'done') if place == 'notebook.ipynb' else (FAILED, 'stopped' if early else 'failed')), (code, status, said)
        nbformat.read(folder/'notebook.ipynb', 4) # an older one, but whole
        for name in whole: assert name in before
        for saved in checkpoints(folder/'checkpoints'): read_training(saved)
        assert not [n for n in before if n.endswith('.part')]
        filler.unlink()
        attempts = again(lambda: lab.run('r', root=small), folder)
        assert attempts == 1 and same(folder, unbroken)
        for name in whole: assert files(folder).get(name, before[name]) == before[name]
        tally(f'disk full at {place}: said so, nothing lost, identical metrics with space again', capsys)

@slow
def test_a_disk_that_is_full_before_the_run(lab, unbroken):
    with mounted(lab.folder/'small', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs') as small:
        filler = small/'filler'
        with contextlib.suppress(OSError), open(filler, 'wb', buffering=0) as f: f.write(bytes(64*2**20))
        process = lab.run('r', root=small)
        code, said = finish(process), process.said.read_text()
        assert code in (FAILED, REFUSED) and re.search(r'small/toy/r\S* (cannot|could not) be written \((?s:.*)No space left on device', said), (code, said)
        filler.unlink()
        assert again(lambda: lab.run('r', root=small), small/'toy'/'r') == 1 and same(small/'toy'/'r', unbroken)

def test_a_claim_that_could_not_be_written_holds_nothing(tmp_path, monkeypatch):
    "A reader's kernel that met a full disk executes the cell again."
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(claims, 'write_json', full)
    with pytest.raises(OSError, match='No space left'): Claim(tmp_path).take()
    monkeypatch.undo()
    with Claim(tmp_path): assert alive(tmp_path)

def test_a_read_only_folder(lab):
    "Refused by name, and how to have another; what is there can be read, a running run too."
    here(lab.root, 'finished')
    folder = here(lab.root, 'begun', until=12)
    running = lab.root/'toy'/'busy'
    shutil.copytree(folder, running)
    info = json.loads((running/'run.json').read_text()) | dict(run='busy', status='running')
    (running/'run.json').write_text(json.dumps(info))
    before = files(lab.root)
    with mounted(lab.folder/'locked', '--bind', lab.root) as locked:
        subprocess.run(['mount', '-o', 'remount,ro,bind', str(locked)], check=True)
        processes = [lab.run(name, root=locked) for name in ('begun', 'new')]
        for process, name in zip(processes, ('begun', 'new')):
            code, said = finish(process), process.said.read_text()
            assert code == REFUSED and 'SLOTNB_RUNS' in said and re.search(rf'locked/toy/{name}\S* cannot be (made|written)', said) and 'Traceback' not in said, (code, said)
        process = lab.run('finished', root=locked)
        assert finish(process) == DONE, process.said.read_text()
        with Claim(running): statuses = {i['run']: i['status'] for i in all_runs(locked)}
        assert statuses == dict(finished='done', begun='stopped', busy='running')
        assert read_run(locked/'toy'/'busy')['status'] == 'failed' # nobody holds it now
        with Claim(running):
            process = lab.start('slotnb.batch.cli', 'status', '--root', locked)
            assert finish(process) == DONE and re.search('busy.*running', process.said.read_text()), process.said.read_text()
    assert {k: v for k, v in files(lab.root).items() if 'claim' not in k} == {k: v for k, v in before.items() if 'claim' not in k}

# ---------------------------------------------------------------- damaged and hostile checkpoints

def dress_up(checkpoint, name, data):
    "Replace a file of a checkpoint, its checksum too."
    (checkpoint/name).write_bytes(data)
    state = json.loads((checkpoint/'state.json').read_text())
    state['files'][name] = [len(data), zlib.crc32(data)]
    (checkpoint/'state.json').write_text(json.dumps(state))

@slow
def test_a_truncated_checkpoint(lab, unbroken, capsys):
    "The one before is taken up, and log.txt says so."
    folder = here(lab.root, 'r', until=17)
    last = checkpoints(folder/'checkpoints')[-1]
    assert last.name == 'step-000017'
    data = (last/'training.safetensors').read_bytes()
    (last/'training.safetensors').write_bytes(data[:len(data)//2])
    assert again(lambda: lab.run('r'), folder) == 1 and same(folder, unbroken)
    assert re.search(r'passing over a damaged checkpoint: .*step-000017.*training.safetensors is truncated', (folder/'log.txt').read_text())
    tally('1 truncated checkpoint: passed over and said so, identical metrics', capsys)

class Hostile:
    def __init__(self, sign): self.sign = sign
    def __reduce__(self): return os.mkdir, (str(self.sign),)

def hostile(kind, sign, path):
    "A file that makes a folder when it is unpickled."
    if kind == 'pickle': path.write_bytes(pickle.dumps(Hostile(sign)))
    elif kind == 'torch.save': torch.save({'state': Hostile(sign)}, path)
    elif kind == 'torch.save, old': torch.save({'state': Hostile(sign)}, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()

HOSTILE = [(name, kind) for name in ('training.safetensors', 'model.safetensors') for kind in ('pickle', 'torch.save', 'torch.save, old')]

def test_hostile_files_are_what_they_seem(tmp_path):
    for i, kind in enumerate(('pickle', 'torch.save', 'torch.save, old')):
        hostile(kind, tmp_path/str(i), tmp_path/'file')
        if kind == 'pickle': pickle.loads((tmp_path/'file').read_bytes())
        elif kind == 'torch.save':
            with zipfile.ZipFile(tmp_path/'file') as z: pickle.loads(z.read(next(n for n in z.namelist() if n.endswith('data.pkl'))))
        else:
            with open(tmp_path/'file', 'rb') as f: [pickle.load(f) for _ in range(4)] # three of its own before ours
        assert (tmp_path/str(i)).is_dir()

@pytest.mark.parametrize('name, kind', HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, unbroken, name, kind):
    checkpoint, sign = tmp_path/'step-000040', tmp_path/'executed'
    shutil.copytree(unbroken/'checkpoints'/'step-000040', checkpoint)
    data = hostile(kind, sign, tmp_path/'file')
    dress_up(checkpoint, name, data)
    with pytest.raises(CheckpointError, match=f'{name}.*is truncated or not a safetensors file'): read_training(checkpoint)
    from slotnb.models.savi import SAVi
    (checkpoint/'model.safetensors').write_bytes(data)
    with pytest.raises(CheckpointError, match='not a safetensors file'): SAVi.from_pretrained(checkpoint)
    assert not sign.exists()

@slow
def test_hostile_checkpoints_and_the_runner(lab, unbroken, capsys):
    "The last is hostile: the one before is taken up. All are: the run fails and says why. Nothing of them is executed."
    folder, sign = here(lab.root, 'r', until=17), lab.folder/'executed'
    kept = lab.folder/'kept'
    shutil.copytree(folder, kept)
    for part in (1, 2): # of the two there are
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        for i, checkpoint in enumerate(reversed(checkpoints(folder/'checkpoints')[-part:])):
            name, kind = HOSTILE[2*i]
            dress_up(checkpoint, name, hostile(kind, sign, lab.folder/'file'))
        process = lab.run('r')
        code, log = finish(process, folder), (folder/'log.txt').read_text()
        assert 'passing over a damaged checkpoint' in log and 'not a safetensors file' in log and not sign.exists()
        if part == 1: assert code == DONE and same(folder, unbroken)
        else: assert code == FAILED and read_run(folder)['error']['name'] == 'CheckpointError' and 'none of the 2 checkpoints' in read_run(folder)['error']['message']
    tally(f'{len(HOSTILE)} hostile files refused, 2 runs through the runner: nothing executed', capsys)

# ---------------------------------------------------------------- two at once

def executions(folder): return len((folder/'executions.txt').read_text().split())

def pair(lab, draw, first, second, folder, first_claims=False):
    "Two commands started up to two seconds apart: the exit codes, and what the one that was refused said."
    a = first()
    if first_claims: wait(lambda: alive(folder), 60, 'the first')
    else: time.sleep(2*draw.random()*draw.choice([0, 1, 1]))
    b = second()
    pids = {a.pid, b.pid}
    while a.poll() is None or b.poll() is None:
        truth(folder)
        for p in (a, b):
            if kernel := lab.kernel_of(p): pids.add(kernel.pid)
        time.sleep(0.05)
    lost = [p for p in (a, b) if p.returncode != 0]
    assert len(lost) == 1, [(p.returncode, p.said.read_text()) for p in (a, b)]
    said = lost[0].said.read_text()
    named = re.search(r'is being written by process (\d+) on (\S+?),? ', said)
    assert named and int(named[1]) in pids and named[2] == socket.gethostname(), said
    assert lost[0].returncode == (1 if lost[0].args[2] == 'papermill' else TAKEN), said
    return lost[0]

@pytest.mark.parametrize('times', [1, pytest.param(10, marks=slow)])
def test_two_runners(lab, unbroken, times, capsys):
    "One executes, the other ends with exit code 3 and says who does."
    draw = random.Random('two runners')
    for i in range(times):
        folder = lab.root/'toy'/f'r{i}'
        pair(lab, draw, *[lambda: lab.run(f'r{i}', '-p', 'pause', '0.05')]*2, folder)
        assert executions(folder) == 1 and same(folder, unbroken)
    tally(f'two runners, {times} times: 1 executed, the other named host and pid, identical metrics', capsys)

@slow
def test_a_runner_and_papermill(lab, unbroken, capsys):
    draw, firsts = random.Random('runner and papermill'), []
    for i in range(4):
        folder = lab.root/'toy'/f'r{i}'
        commands = [lambda: lab.run(f'r{i}', '-p', 'pause', '0.1'), lambda: lab.papermill(f'r{i}', '-p', 'pause', '0.1')]
        lost = pair(lab, draw, *commands[::1 if i % 2 else -1], folder, first_claims=i % 2) # papermill comes up faster
        firsts.append('papermill' if lost.args[2] != 'papermill' else 'runner')
        assert executions(folder) == 1 and same(folder, unbroken)
    tally(f'a runner and papermill, 4 times ({counted(firsts)} executed): the other named host and pid, identical metrics', capsys)

SWEEP = '''
title: Three runs
experiment: {notebook}
parameters: {{lr: 1e-3, steps: 40}}
seeds: 3
'''

def sweep(lab, text=SWEEP):
    path = lab.folder/'three.yaml'
    path.write_text(text.format(notebook=lab.notebook))
    def start(*more): return lab.start('slotnb.batch.cli', 'sweep', path, '--root', lab.root, '--at-a-time', '2', *more)
    return start

def planned(lab): return [lab.root/'toy'/p.run for p in read_plan(lab.root/'sweeps'/'three'/'plan.jsonl')] if (lab.root/'sweeps'/'three'/'plan.jsonl').exists() else []

@pytest.fixture(scope='module')
def unbroken_seeds(tmp_path_factory):
    root = tmp_path_factory.mktemp('seeds')
    return [here(root, f's{seed}', seed=seed) for seed in range(3)]

def check_sweep(lab, unbroken_seeds):
    folders = planned(lab)
    assert len(folders) == 3
    for folder, whole in zip(folders, unbroken_seeds): assert same(folder, whole)
    return folders

@slow
def test_two_sweeps_of_one_file(lab, unbroken_seeds, capsys):
    "Every run is executed once; the second sweep says who is at it."
    draw, start = random.Random('two sweeps'), sweep(lab)
    for i in range(2):
        a = start()
        time.sleep(draw.choice([0, 3])*draw.random())
        b = start()
        while a.poll() is None or b.poll() is None:
            for folder in planned(lab): assert truth(folder) != 'failed', read_run(folder)
            time.sleep(0.05)
        lost = [p for p in (a, b) if p.returncode != 0]
        assert len(lost) == 1 and lost[0].returncode == TAKEN, [(p.returncode, p.said.read_text()) for p in (a, b)]
        said = lost[0].said.read_text()
        named = re.search(r'process (\d+) on (\S+?),? ', said)
        assert named and int(named[1]) == (a if lost[0] is b else b).pid and named[2] == socket.gethostname(), said
        for folder in check_sweep(lab, unbroken_seeds): assert executions(folder) == 1
        shutil.rmtree(lab.root)
    tally('two sweeps of one file, 2 times: 6 runs, each executed once, identical metrics', capsys)

# ---------------------------------------------------------------- signals

@slow
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGUSR1'])
def test_signals(lab, unbroken, name, capsys):
    "Stopped after a checkpoint, wherever it was; the same command ends it."
    draw, stretches, ends = random.Random(name), [], []
    for i, stretch in enumerate(['startup', 'claimed', 'data', 'training', 'training', 'evaluation']):
        run = f'r{i}'
        folder = lab.root/'toy'/run
        process = lab.run(run)
        # a signal while Python itself comes up finds no run yet
        def begun():
            if stretch == 'claimed': return alive(folder)
            return read_run(folder) and (stretch == 'startup' or where(folder) in (stretch, 'finish'))
        wait(lambda: process.poll() is not None or begun(), 60, stretch)
        time.sleep(draw.random()*dict(startup=2, claimed=0, data=0.1, training=0.3, evaluation=0.2)[stretch])
        stretches.append(where(folder))
        process.send_signal(getattr(signal, name))
        code, said, info = finish(process, folder), process.said.read_text(), read_run(folder)
        assert (code, info['status']) in ((STOPPED, 'stopped'), (DONE, 'done')), (code, info, said)
        assert 'Traceback' not in said.replace('SystemExit', ''), said
        ends.append(info['status'])
        at_rest(lab, folder, 5)
        assert again(lambda: lab.run(run), folder) == 1 and same(folder, unbroken)
    tally(f'{name}: {len(ends)} times ({counted(stretches)}): {counted(ends)}; identical metrics after the same command', capsys)

def started_tasks(lab):
    "Folders of runs that a task works on."
    found = []
    for p in lab.processes('slotnb.batch.cli'):
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            command = p.cmdline()
            if 'task' in command: found.append(lab.root/'toy'/read_plan(command[-2])[int(command[-1])].run)
    return found

@slow
@pytest.mark.parametrize('name', ['SIGKILL', 'SIGTERM', 'SIGINT'])
def test_signals_to_a_sweep(lab, unbroken_seeds, name, capsys):
    "Nothing runs unnoticed, statuses are true, and the same command ends all three."
    draw, start, seen = random.Random(name), sweep(lab), []
    for i in range(2):
        process = start()
        wait(lambda: process.poll() is not None or len(started_tasks(lab)) == 2, 60, 'two tasks')
        time.sleep([1, 5][i]*draw.random() + i)
        process.send_signal(getattr(signal, name))
        if name != 'SIGKILL':
            assert finish(process) != 0, process.said.read_text()
            assert not started_tasks(lab) # it waited for them
        else: process.wait()
        seen.append(counted([truth(f) for f in planned(lab)]))
        assert name == 'SIGKILL' or 'failed' not in seen[-1], seen # what was asked to stop has not failed
        unnoticed = {}
        def noticed(grace=15): # a task whose interpreter comes up has not been at its run yet
            worked_on = set(started_tasks(lab))
            statuses = {f: truth(f) for f in planned(lab)}
            for f in statuses:
                if f not in worked_on or statuses[f] in ('running', 'queued', 'done'): unnoticed.pop(f, None)
                else: assert time.monotonic() - unnoticed.setdefault(f, time.monotonic()) < grace, f'{f} is worked on, and said to be {statuses[f]}'
            return not lab.processes()
        if i == 0: wait(noticed, 60, 'orphans to end') # else at once
        for attempt in range(8):
            process = start()
            while process.poll() is None:
                noticed()
                time.sleep(0.3)
            if process.returncode == 0: break
            time.sleep(1)
        assert process.returncode == 0, process.said.read_text()
        wait(lambda: not lab.processes(), 30, 'processes to go')
        check_sweep(lab, unbroken_seeds)
        shutil.rmtree(lab.root)
    tally(f'{name} to a sweep, 2 times (then: {"; ".join(seen)}): 6 runs ended with identical metrics', capsys)

# ---------------------------------------------------------------- clocks

HOOK = '''
import os, time
real, local, text = time.time, time.localtime, time.strftime
def after():
    try: return float(open(os.environ['CLOCK']).read() or 0)
    except (OSError, KeyError, ValueError): return 0.
time.time = lambda: real() + after()
time.time_ns = lambda: int(time.time()*1e9)
time.localtime = lambda s=None: local(time.time() if s is None else s)
time.strftime = lambda form, t=None: text(form, time.localtime() if t is None else t)
'''
DAY = 86_400

@slow
@pytest.mark.parametrize('days', [-1, 1])
def test_a_clock_that_jumps(lab, unbroken, days, capsys):
    "By a day, in the middle of a run that is killed later and taken up: statuses and durations do not care."
    folder, clock = lab.root/'toy'/'r', lab.folder/'clock'
    (lab.folder/'hook').mkdir()
    (lab.folder/'hook'/'sitecustomize.py').write_text(HOOK)
    clock.write_text('0')
    odd = dict(PYTHONPATH=os.pathsep.join([str(lab.folder/'hook'), *filter(None, [os.environ.get('PYTHONPATH')])]), CLOCK=str(clock))
    process = lab.run('r', '-p', 'pause', '0.03', **odd)
    wait(lambda: process.poll() is not None or where(folder) == 'training', 60, 'training')
    clock.write_text(str(days*DAY))
    at = lambda: json.loads((folder/'progress.json').read_text())
    step = at()['step']
    wait(lambda: process.poll() is not None or at()['step'] > step, 30, 'a step on the new clock')
    assert abs(time.mktime(time.strptime(at()['at'][:19], '%Y-%m-%dT%H:%M:%S')) - time.time() - days*DAY) < 4000, 'the clock was not set'
    os.utime(folder/'claim.json', (time.time() + days*DAY,)*2)
    assert truth(folder) == 'running'
    os.kill(holder(folder)['pid'], signal.SIGKILL)
    assert finish(process, folder) == FAILED and truth(folder) == 'failed'
    assert again(lambda: lab.run('r', '-p', 'pause', '0.03', **odd), folder) == 1 and same(folder, unbroken)
    info = read_run(folder)
    assert 0 < info['seconds'] < 120 and all(0 <= s['seconds'] < 120 for s in info['sessions']) and len(info['sessions']) == 2
    seconds = [row['seconds'] for row in map(json.loads, (folder/'history.jsonl').read_text().splitlines()) if 'seconds' in row]
    assert seconds == sorted(seconds) and seconds[-1] < 120
    tally(f'clock set by {days:+} day in a run that was then killed: status true, {info["seconds"]} s, identical metrics', capsys)

@pytest.mark.parametrize('days', [-1, 1])
def test_another_machines_clock(tmp_path, monkeypatch, days):
    "A process elsewhere is believed by its beat: taken over only where no further one comes, whatever its card's time."
    monkeypatch.setattr(claims, 'BEAT', 0.3)
    card = dict(host='elsewhere', boot='another', pid=1, started='2026-01-01T00:00:00+0000', beat=0, seconds=0., slurm_job=None)
    path, stop = tmp_path/'claim.json', threading.Event()
    def beat():
        claims.write_json(path, card)
        os.utime(path, (time.time() + days*DAY,)*2)
    def beats():
        while not stop.wait(0.1):
            card['beat'] += 1
            beat()
    beat()
    other = threading.Thread(target=beats)
    other.start()
    try:
        with pytest.raises(Taken, match='process 1 on elsewhere'): Claim(tmp_path).take()
    finally: stop.set(); other.join()
    with Claim(tmp_path): assert holder(tmp_path)['pid'] == os.getpid()

# ---------------------------------------------------------------- YAML's 1e-4

def test_yaml_numbers(lab):
    "YAML reads 1e-4 as text: a number where a number is declared, refused by name where an integer is."
    from slotnb.batch.runner import resolve
    from slotnb.batch.sweep import plan, read_sweep
    path = lab.folder/'lr.yaml'
    path.write_text(f'experiment: {lab.notebook}\ngrid: {{lr: [1e-4, 3e-4, 0.001]}}\nparameters: {{steps: 40}}\n')
    runs = plan(read_sweep(path), lab.root)
    assert [p.parameters['lr'] for p in runs] == [1e-4, 3e-4, 1e-3] and all(type(p.parameters['lr']) is float for p in runs)
    path.write_text(f'experiment: {lab.notebook}\nparameters: {{steps: 1e2}}\n')
    with pytest.raises(ValueError, match="parameter steps must be int, got '1e2'"): plan(read_sweep(path), lab.root)
    assert resolve(str(lab.notebook), {'lr': '1e-4'}, root=lab.root)[2]['lr'] == 1e-4
    assert not lab.root.exists()

@pytest.mark.parametrize('how', ['-y', pytest.param('-f', marks=slow)])
def test_yaml_numbers_and_papermill(lab, how):
    "Papermill hands on the text: the notebook refuses it and says what to write."
    text = f'lr: 1e-4\nruns_dir: {lab.root}\n'
    (lab.folder/'parameters.yaml').write_text(text)
    process = lab.start('papermill', lab.notebook, lab.folder/'out.ipynb', '--no-progress-bar', how, text if how == '-y' else lab.folder/'parameters.yaml')
    assert finish(process) == 1
    said = process.said.read_text()
    assert "parameter lr must be float, got '1e-4'" in said and re.search(r'1\.0e-4|0\.0001', said), said
    assert not lab.root.exists()
