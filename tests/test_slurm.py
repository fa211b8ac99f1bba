"""The array script, line by line with stand-ins; and a real Slurm on this host: two at a time, cancel, kill, requeue, time limit, failure."""
import json, os, re, shlex, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slurm_host import slurm_host, why_not

from slotnb.batch import slurm
from slotnb.batch.cli import main
from slotnb.batch.report import report
from slotnb.batch.run import read_run
from slotnb.batch.slurm import Cluster, SlurmError, array_script, cancel_jobs, cluster_files, read_cluster, states, submit
from slotnb.batch.sweep import plan, read_plan, read_sweep
from slotnb.batch.watch import cancel, status_table

for package in ('yaml', 'papermill', 'ipykernel'): pytest.importorskip(package)

# ---------------------------------------------------------------- profiles

@pytest.mark.parametrize('text, words', {
    'partion: gpu': ["'partion'", "Did you mean 'partition'"],
    'gpus: two': ['Cluster.gpus must be an integer', "'two'"],
    'gpus: true': ['Cluster.gpus must be an integer', 'True'],
    'time: 12:00:00': ['Cluster.time', 'quotes', '43200'],
    'memory: lots': ['Cluster.memory', "'16G'"],
    'qos: "gpu\\n#SBATCH --time=1"': ['Cluster.qos', 'without spaces'],
    'activate: "a\\nb"': ['Cluster.activate', 'one line'],
    'setup: ["a\\nb"]': ['Cluster.setup', 'one line'],
    'extra: ["--array=0-9"]': ['--array', 'field at_a_time'],
    'extra: [mail]': ['Cluster.extra', "'mail'"],
    'modules: gcc': ['Cluster.modules', "'gcc'"],
    'signal_seconds: 1': ['Cluster.signal_seconds', 'at least 10'],
    'pue: 0.5': ['Cluster.pue', 'at least 1'],
    'price_gpu_hour: -1': ['Cluster.price_gpu_hour', 'negative'],
    '[a, b]': ['field: value'],
    'a: [': ['is not YAML'],
}.items())
def test_a_wrong_profile_is_refused_by_name(tmp_path, text, words):
    path = tmp_path/'lab.yaml'
    path.write_text(text)
    with pytest.raises(ValueError) as e: read_cluster(path)
    for word in [str(path), *words]: assert word in str(e.value), str(e.value)

def test_profiles_of_the_checkout():
    assert {'izar', 'kuma', 'here'} <= set(cluster_files())
    for name in cluster_files(): assert read_cluster(name).name == name
    izar, kuma = read_cluster('izar'), read_cluster('kuma')
    assert abs(3386.3*izar.price_gpu_hour - 583.8) < 0.1 and abs(3386.3*izar.co2_gpu_hour - 140.4) < 0.1 and abs(188*kuma.co2_gpu_hour - 7.3) < 0.1
    with pytest.raises(FileNotFoundError, match='no profile'): read_cluster('nowhere/lab.yaml')

# ---------------------------------------------------------------- the script, with stand-ins for python and scontrol

PAYLOAD = '''
import os, signal, sys, time
print('given', sys.argv[1:], os.getcwd(), os.environ['SLOTNB_RUNS'], os.environ['PYTHONPATH'], os.environ['OMP_NUM_THREADS'], flush=True)
heard = []
def hear(number, frame):
    heard.append(signal.Signals(number).name)
    print('heard', heard[-1], flush=True)
if 'deaf' not in sys.argv: [signal.signal(s, hear) for s in (signal.SIGUSR1, signal.SIGTERM)]
print('ready', flush=True)
begun = time.monotonic()
while time.monotonic() - begun < float(os.environ.get('LASTS', 0)) and not heard: time.sleep(0.01)
time.sleep(0.3 if heard else 0) # the shell must wait again after a signal
print('ended', flush=True)
sys.exit(int(os.environ['CODE_STOPPED' if heard else 'CODE']))
'''

class Task:
    "The array script as a process, `python` and `scontrol` replaced."
    def __init__(self, home, cluster=None, deaf=False, **env):
        self.home = home/"runs of 'today'"
        for part in ('bin', 'code', 'sub/log'): (self.home/part).mkdir(parents=True)
        (self.home/'payload.py').write_text(PAYLOAD)
        self.stub('python', f'shift 2; exec {shlex.quote(sys.executable)} {shlex.quote(str(self.home/"payload.py"))} "$@" {"deaf" if deaf else ""}')
        self.stub('scontrol', f'echo "$@" >> {shlex.quote(str(self.home/"said"))}')
        text = array_script((cluster or Cluster()).but(activate='export ACTIVE=1', **({} if cluster else dict(cpus=3, requeues=2))), 'toy', 4, self.home/'sub', self.home, self.home/'code')
        (self.home/'script.sh').write_text(text)
        self.env = {**os.environ, 'PATH': f'{self.home/"bin"}:{os.environ["PATH"]}', 'SLURM_ARRAY_TASK_ID': '2', 'SLURM_JOB_ID': '77', 'CODE': '0', 'CODE_STOPPED': '75', 'PYTHONPATH': 'more', **{k: str(v) for k, v in env.items()}}
        self.out = open(self.home/'out.txt', 'w')
        self.process = subprocess.Popen(['bash', self.home/'script.sh'], env=self.env, stdout=self.out, stderr=subprocess.STDOUT)

    def stub(self, name, line):
        (self.home/'bin'/name).write_text(f'#!/bin/sh\n{line}\n')
        (self.home/'bin'/name).chmod(0o755)
    def text(self): return (self.home/'out.txt').read_text()
    def until(self, word, seconds=20):
        give_up = time.monotonic() + seconds
        while word not in self.text():
            assert time.monotonic() < give_up and self.process.poll() is None, self.text()
            time.sleep(0.02)
        return self
    def tell(self, *signals):
        for s in signals: self.process.send_signal(s); time.sleep(0.1)
        return self
    def code(self): # and it must have waited for what it started
        code = self.process.wait(30)
        assert 'ready' not in self.text() or 'ended' in self.text() or code == 138, self.text()
        return code
    @property
    def requeued(self): return (self.home/'said').read_text().splitlines() if (self.home/'said').exists() else []

@pytest.mark.parametrize('code', [0, 1, 2, 3, 75, 127, 138])
def test_script_hands_the_exit_code_on(tmp_path, code):
    task = Task(tmp_path, CODE=code)
    assert task.code() == code and not task.requeued, task.text()
    given = f"given ['task', {str(task.home/'sub/plan.jsonl')!r}, '2'] {task.home/'code'} {task.home} {task.home/'code'}:more 3"
    assert given in task.text(), task.text()

def test_script_requeues_what_time_has_stopped(tmp_path):
    task = Task(tmp_path, LASTS=20).until('ready').tell(signal.SIGUSR1)
    assert task.code() == 75 and task.requeued == ['requeue 77'] and task.text().count('heard SIGUSR1') == 1, task.text()

def test_script_leaves_preemption_and_cancel_to_slurm(tmp_path):
    task = Task(tmp_path, LASTS=20).until('ready').tell(signal.SIGTERM)
    assert task.code() == 75 and not task.requeued and 'heard SIGTERM' in task.text()

def test_script_waits_again_after_every_signal(tmp_path):
    task = Task(tmp_path, LASTS=20).until('ready').tell(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1)
    assert task.code() == 75 and task.requeued == ['requeue 77'] and 'heard SIGTERM' in task.text()

@pytest.mark.parametrize('code', [0, 1])
def test_script_does_not_requeue_what_has_ended(tmp_path, code):
    task = Task(tmp_path, LASTS=20, CODE_STOPPED=code).until('ready').tell(signal.SIGUSR1)
    assert task.code() == code and not task.requeued

def test_script_requeues_no_more_than_it_may(tmp_path):
    task = Task(tmp_path, LASTS=20, SLURM_RESTART_COUNT=2).until('ready').tell(signal.SIGUSR1)
    assert task.code() == 75 and not task.requeued and 'requeued 2 times already' in task.text()

def test_script_when_python_cannot_listen_yet(tmp_path):
    task = Task(tmp_path, deaf=True, LASTS=20).until('ready').tell(signal.SIGUSR1)
    assert task.code() == 138 and task.requeued == ['requeue 77']

def test_script_when_the_environment_is_still_being_made(tmp_path):
    task = Task(tmp_path, Cluster(setup=('echo making', 'sleep 1'))).until('making').tell(signal.SIGUSR1)
    assert task.code() == 75 and task.requeued == ['requeue 77'] and 'ready' not in task.text()

@pytest.mark.parametrize('cluster', [Cluster(setup=('cat not-there',)), Cluster(modules=('no-such-module/1',))], ids=['setup', 'module'])
def test_script_ends_where_the_environment_cannot_be_made(tmp_path, cluster):
    task = Task(tmp_path, cluster)
    assert task.code() not in (0, 75) and 'ready' not in task.text() and not task.requeued

FULL = Cluster(name='lab', partition='gpu', qos='q', account='a', constraint='v100|a100', gpus=2, cpus=8, memory='16G', time='1-00:00:00', modules=('gcc/11.3.0', "it's"), activate='source "env x/bin/activate"',
               setup=('export A=1',), extra=('--mail-type=FAIL',), at_a_time=3, data='over there')

@pytest.mark.parametrize('cluster', [Cluster(), FULL, *map(read_cluster, cluster_files())], ids=lambda c: c.name or 'empty')
def test_script_is_good_bash(tmp_path, cluster):
    text = array_script(cluster, 'toy', 96, tmp_path/'a $HOME 100%', tmp_path, tmp_path/'code', 0)
    done = subprocess.run(['bash', '-n'], input=text, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    if shutil.which('shellcheck'):
        done = subprocess.run(['shellcheck', '--severity=warning', '--exclude=SC1090,SC1091', '-'], input=text, text=True, capture_output=True) # files it cannot follow
        assert done.returncode == 0, done.stdout
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith('#')) # sbatch stops reading there
    assert not [line for line in text.splitlines()[first:] if line.startswith('#SBATCH')]
    assert '%%/log/%a.out"' in text

def test_a_path_that_breaks_a_line_is_refused(tmp_path):
    for bad in ('a\nb', 'a"b', 'a\\b'):
        with pytest.raises(ValueError): array_script(Cluster(), 'toy', 1, tmp_path/bad, tmp_path, tmp_path)
    with pytest.raises(ValueError): array_script(Cluster(), 'toy', 1, tmp_path, tmp_path, tmp_path/'a\nb')

# ---------------------------------------------------------------- a light experiment

SETUP = '''
import os, time
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
import slotnb
from slotnb.batch.run import check_parameters, start_run
from slotnb.core import generator, seeded
from slotnb.training.fit import FitConfig, fit
from slotnb.training.losses import Losses, Reconstruction
torch.set_num_threads(1)
this = start_run('toy', check_parameters(globals()), runs_dir, run, device)
print('the code in', Path(slotnb.__file__).parent.parent)
'''
MODEL = '''
class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 3, 3, padding=1))
    def forward(self, video, generator=None):
        noise = torch.randn(video.shape, generator=generator)
        return SimpleNamespace(recon=self.body((video + 0.1*noise).flatten(0, 1)).unflatten(0, video.shape[:2]), extras={})
class Loader: # slow until somebody makes a file: long enough to be killed, short afterwards
    batch_size, seed = 4, seed
    def stream(self, start, stop):
        for step in range(start, stop):
            if not (this.folder.parent.parent/'fast').exists(): time.sleep(0.25)
            yield {'video': torch.randint(0, 256, (4, 2, 3, 8, 8), generator=generator(seed, 'data', step), dtype=torch.uint8), 'labels': None}
if seed == fails: raise ArithmeticError('this one was asked to fail')
with seeded(seed, 'init'): model = Toy()
'''
TRAIN = '''
result = this.require_done(fit(model, Loader(), Losses([Reconstruction(unit='pm1')]), FitConfig(steps=400, batch_size=4, log_every=1, checkpoint_every=100, tensorboard=False), this.folder, device, seed))
this.finish({'loss.decoder.clip': result.history['loss'][-1], 'weights.decoder.clip': sum(p.double().sum().item() for p in model.parameters())}, steps_of=result.history['step'][-1])
'''

@pytest.fixture
def toy(tmp_path):
    "A folder of runs and a sweep of a notebook that waits to be told to hurry."
    cells = ["seed: int = 0  # of everything\nfails: int = -1  # the seed that raises\ndevice: str = 'cpu'\nruns_dir: str = ''\nrun: str = ''", SETUP, MODEL, TRAIN]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip(), metadata={'tags': ['parameters']} if i == 0 else {}) for i, c in enumerate(cells)],
                                  metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    (tmp_path/'kept').mkdir()
    for path in (tmp_path/'toy.ipynb', tmp_path/'kept/toy.ipynb'): nbformat.write(nb, path)
    return Toy(tmp_path)

class Toy:
    def __init__(self, home): self.home, self.root = home, home/'runs here'
    def sweep(self, name='toys', **fields):
        path = self.home/f'{name}.yaml'
        path.write_text(json.dumps(dict(experiment=str(self.home/'toy.ipynb'), title='Toys', **fields)))
        return read_sweep(path)
    def hurry(self, root=None):
        (root or self.root).mkdir(parents=True, exist_ok=True)
        ((root or self.root)/'fast').touch()
    def unbroken(self, planned):
        "Metrics of the same run, elsewhere and in one piece."
        root = self.home/'unbroken'
        self.hurry(root)
        from slotnb.batch.runner import run
        assert run(str(self.home/'kept/toy.ipynb'), planned.parameters, name=planned.run, root=root, live=False)['status'] == 'done'
        return json.loads((root/'toy'/planned.run/'metrics.json').read_text())

def metrics(folder): return json.loads((folder/'metrics.json').read_text())
def log(folder, i): return (folder/f'log/{i}.out').read_text() if (folder/f'log/{i}.out').exists() else ''
def status(planned, root): return read_run(planned.folder(root)).get('status')

# ---------------------------------------------------------------- submission without Slurm

def test_without_slurm_it_is_said_and_nothing_is_made(toy, monkeypatch):
    runs = plan(sweep := toy.sweep(), toy.root, 'cpu')
    monkeypatch.setenv('PATH', str(toy.home))
    with pytest.raises(SlurmError, match='no Slurm on this machine'): submit(sweep, runs, Cluster(), root=toy.root)
    assert not toy.root.exists() and states(['1']) == {} and cancel_jobs(['1']) == [] and not slurm.slurm_there()
    shown = submit(sweep, runs, FULL, root=toy.root, dry_run=True) # is for looking, on any machine
    assert not toy.root.exists() and '#SBATCH --gres=gpu:2' in str(shown) and '#SBATCH --array=0-0%3' in str(shown)

# ---------------------------------------------------------------- a real Slurm

@pytest.fixture
def stopped_slurm():
    if reason := why_not(): pytest.skip(reason)

def test_a_slurm_that_does_not_come_up_says_why_and_leaves_nothing(stopped_slurm, tmp_path, monkeypatch):
    (tmp_path/'slurmd').write_text('#!/bin/sh\necho no such luck\nexit 7\n')
    (tmp_path/'slurmd').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    before = set(Path(tempfile.gettempdir()).glob('slotnb-slurm-*'))
    with pytest.raises(RuntimeError) as e:
        with slurm_host(): pass
    for word in ('slurmd ended with 7', 'no such luck', 'slurmctld.log'): assert word in str(e.value), str(e.value)
    assert not why_not() and set(Path(tempfile.gettempdir()).glob('slotnb-slurm-*')) <= before

@pytest.fixture(scope='module')
def slurm_up():
    if reason := why_not(): pytest.skip(reason)
    with slurm_host() as host: yield host

@pytest.fixture
def host(slurm_up, monkeypatch):
    "Slurm, for this test's commands, and the queue empty again after it."
    for k in [k for k in os.environ if k.startswith(('SLURM_', 'SBATCH_'))]: monkeypatch.delenv(k)
    monkeypatch.setenv('SLURM_CONF', slurm_up.env['SLURM_CONF'])
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield slurm_up
    slurm_up.call('scancel', '--user=root')
    slurm_up.until(lambda: not slurm_up.call('squeue', '-h'), 'an empty queue', 30)

LAB = dict(name='lab', partition='gpu', gpus=1, time='00:20:00')

@pytest.mark.slow
def test_four_smoke_runs_two_at_a_time(host, tmp_path, capsys):
    root = tmp_path/'runs here'
    path, profile = tmp_path/'four.yaml', tmp_path/'lab.yaml'
    path.write_text(json.dumps(dict(experiment='10_decomposition', preset='smoke', parameters=dict(compare='none'), grid=dict(model=['sa', 'isa_t']), seeds=2)))
    profile.write_text(json.dumps(LAB))
    given = ['sweep', str(path), '-p', 'device', 'cpu', '--cluster', str(profile), '--at-a-time', '2', '--root', str(root)]
    assert main([*given, '--dry-run']) == 0 and '#SBATCH --array=0-3%2' in capsys.readouterr().out and not root.exists()
    assert main(given) == 0
    said = capsys.readouterr().out
    job, folder = re.search(r'Slurm job (\d+): 4 runs', said)[1], Path(re.search(r'script and logs: (.+)', said)[1])
    runs = read_plan(folder/'plan.jsonl')
    assert [read_run(p.folder(root))['slurm_job'] for p in runs] == [f'{job}_{i}' for i in range(4)]
    seen, reasons = set(), set()
    def over():
        now = states([job])
        seen.add(frozenset(k for k, (state, _) in now.items() if state == 'RUNNING'))
        reasons.update(reason for state, reason in now.values() if state == 'PENDING')
        return not now
    assert main(given) == 0 and re.search(r'nothing to submit; left out: .*(running|in Slurm already)', capsys.readouterr().out), 'queued or running: not twice'
    host.until(over, 'the end of four smoke runs', 150)
    assert max(map(len, seen)) == 2 and 'JobArrayTaskLimit' in reasons, (seen, reasons)
    gpu = {f'{job}_{i}': re.search(r'GPUs (\d)', log(folder, i))[1] for i in range(4)}
    for together in seen: assert len({gpu[k] for k in together}) == len(together), (together, gpu)
    for i, p in enumerate(runs):
        info = read_run(p.folder(root))
        assert info['status'] == 'done' and info['slurm_job'] == f'{job}_{i}' and info['sweep'] == 'four', log(folder, i)
        assert metrics(p.folder(root))['fg_ari.decoder.clip.n'] > 0 and (p.folder(root)/'notebook.ipynb').exists()
        assert (p.folder(root)/'code').resolve().parent == root/'code'
    assert main(given) == 0 and '4 done' in capsys.readouterr().out

def progress(planned, root):
    path = planned.folder(root)/'progress.json'
    return json.loads(path.read_text())['step'] if path.exists() else 0

def in_queue(job): return states([job]).get(job, ('gone',))[0]

def killed(host, planned, root, job, how, sessions):
    "Kill a running task, see it back in the queue; the step it has come to."
    begun = progress(planned, root)
    host.until(lambda: status(planned, root) == 'running' and progress(planned, root) >= begun + 5, f'five more steps of {job}')
    host.call(*how)
    host.until(lambda: in_queue(job) == 'PENDING', f'{job} is in the queue again')
    info = read_run(planned.folder(root))
    assert info['status'] == 'stopped' and [s['ended'] for s in info['sessions']] == ['stopped']*sessions, info
    return progress(planned, root)

@pytest.mark.slow
def test_cancel_a_pending_one_kill_a_running_one_and_see_one_fail(host, toy):
    sweep = toy.sweep(seeds=3, parameters=dict(fails=2))
    runs = plan(sweep, toy.root, 'cpu')
    sent = submit(sweep, runs, Cluster(**LAB), at_a_time=1, root=toy.root)
    first, second, third = (f'{sent.job}_{i}' for i in range(3))
    host.until(lambda: progress(runs[0], toy.root) >= 1, 'the first one trains')
    assert in_queue(second) == 'PENDING' and second in status_table('toys', toy.root, 160)
    line, = cancel(f'toy/{runs[1].run}', toy.root)
    assert f'job {second} cancelled before it began' in line
    host.until(lambda: in_queue(second) == 'gone', 'the pending one is gone')

    at = killed(host, runs[0], toy.root, first, ['scontrol', 'requeue', first], 1)
    host.call('scontrol', 'update', f'job={first}', 'StartTime=now') # it would wait for seconds; by default, for two minutes
    host.until(lambda: in_queue(first) == 'RUNNING', f'{first} runs again')
    urgent = ['sbatch', '--partition=urgent', '--gres=gpu:2', '--output', toy.home/'urgent.out', '--wrap', 'true']
    assert at < killed(host, runs[0], toy.root, first, urgent, 2) < 400 # preempted, and taken up where it was
    toy.hurry()
    host.call('scontrol', 'update', f'job={first}', 'StartTime=now')
    expected = toy.unbroken(runs[0])
    host.until(lambda: not states([sent.job]), 'the end of the array', 90)
    info = read_run(runs[0].folder(toy.root))
    assert info['status'] == 'done' and [s['ended'] for s in info['sessions']] == ['stopped', 'stopped', 'done'], log(sent.folder, 0)
    assert metrics(runs[0].folder(toy.root)) == expected
    steps = [json.loads(line)['step'] for line in (runs[0].folder(toy.root)/'history.jsonl').read_text().splitlines()]
    assert steps == list(range(1, 401)), 'every step once, in three sessions'
    assert status(runs[1], toy.root) == 'stopped' and not log(sent.folder, 1), 'the cancelled one never began'

    info, words = read_run(runs[2].folder(toy.root)), 'ArithmeticError: this one was asked to fail'
    assert info['status'] == 'failed' and f'{info["error"]["name"]}: {info["error"]["message"]}' == words
    assert host.job(third)['JobState'] == 'FAILED' and words in log(sent.folder, 2)
    assert words in status_table('toys', toy.root, 160)
    page = report(sweep, toy.root)
    for path in (page, page.with_suffix('.md')): assert 'ArithmeticError' in path.read_text() and 'this one was asked to fail' in path.read_text()
    assert submit(sweep, runs, Cluster(**LAB), root=toy.root, dry_run=True).runs == runs[1:] # the same command takes the other two up

@pytest.mark.slow
def test_the_time_limit_stops_requeues_and_loses_nothing(host, toy):
    "Slurm counts limits in minutes, looks at them every 30 s and warns that much early: USR1 comes 12 to 42 s after the start."
    sweep = toy.sweep()
    planned, = plan(sweep, toy.root, 'cpu')
    sent = submit(sweep, [planned], Cluster(**LAB | dict(time='00:01:00', signal_seconds=18)), root=toy.root)
    (toy.home/'toy.ipynb').write_text('edited after submission')
    host.until(lambda: 'SIGUSR1' in log(sent.folder, 0), 'USR1', 90)
    host.until(lambda: 'back in the queue' in log(sent.folder, 0), 'the requeue', 20)
    toy.hurry()
    expected = toy.unbroken(planned)
    host.until(lambda: not states([sent.job]), 'the end', 90)
    info = read_run(planned.folder(toy.root))
    ended = [s['ended'] for s in info['sessions']]
    assert info['status'] == 'done' and len(ended) >= 2 and ended == ['stopped']*(len(ended) - 1) + ['done'], log(sent.folder, 0)
    assert metrics(planned.folder(toy.root)) == expected
    assert int(host.job(f'{sent.job}_0')['Restarts']) >= 1
    code, = set(re.findall('the code in (.*)', log(sent.folder, 0)))
    assert code == str(toy.root/'code'/info['code'])

def test_a_refusal_of_sbatch_is_shown_whole_and_leaves_no_job(host, toy):
    sweep = toy.sweep()
    runs = plan(sweep, toy.root, 'cpu')
    with pytest.raises(SlurmError) as e: submit(sweep, runs, Cluster(**LAB | dict(partition='h100')), root=toy.root)
    for word in ('invalid partition specified: h100', 'profile lab', 'sinfo -s'): assert word in str(e.value), str(e.value)
    assert not list(toy.root.glob('sweeps/*/submissions/*')) and status(runs[0], toy.root) is None and not host.call('squeue', '-h')

def test_a_slurm_that_is_up_is_left_alone(host):
    assert 'left alone: slurmctld' in why_not() or 'left alone: slurmd' in why_not()
    with pytest.raises(RuntimeError, match='left alone'):
        with slurm_host(): pass
    assert host.call('sinfo', '-h', '-o', '%T').strip() == 'idle'
