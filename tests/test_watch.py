"Runs looked at from the outside: with living, killed and foreign writers, with Slurm played by scripts, and many of them."
import contextlib, json, os, pty, re, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

from slotnb.batch import watch
from slotnb.batch.claim import Claim, holder
from slotnb.batch.run import read_run
from slotnb.batch.slurm import Cluster
from slotnb.batch.sweep import Planned, write_plan
from slotnb.batch import ledger as ledgers
from slotnb.batch.ledger import ledger
from slotnb.batch.watch import cancel, logs, select, status_table, tensorboard, watch_status
from slotnb.core import write_json

ROOT = Path(__file__).resolve().parent.parent
AT = '2026-03-02T09:00:00+0100'

@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    "Whatever this machine has, these tests see none unless they put one there; and profiles of their own."
    monkeypatch.setattr(watch, 'slurm_there', lambda: False)
    monkeypatch.setattr(ledgers, 'cluster_files', dict)
    monkeypatch.delenv('SLURM_JOB_ID', raising=False)

def make(root, run, status, experiment='10_decomposition', metrics=None, progress=None, log=None, **more):
    folder = root/experiment/run
    parameters = more.pop('parameters', dict(preset='smoke', model='sa', seed=0))
    if status == 'queued': more.setdefault('submission', str(root/'sweeps'/'none'/'submissions'/'1')) # without, nobody would ever start it
    write_json(folder/'run.json', dict(experiment=experiment, run=run, parameters=parameters, status=status, started=AT, host='node1', **more))
    if metrics: write_json(folder/'metrics.json', metrics)
    if progress: write_json(folder/'progress.json', dict(zip(('step', 'steps', 'seconds'), progress)))
    if log is not None: (folder/'log.txt').write_text(log)
    return folder

def foreign(folder, **more):
    "A claim of a process on another machine, just written."
    write_json(folder/'claim.json', dict(host='node9', boot='another', pid=4, started=AT, beat=3, seconds=90., slurm_job=None) | more)
    return folder

def session(seconds, ended='done', **more):
    s = dict(begun=AT, seconds=seconds, host='node1', device='cpu', gpus=0, cpus=2, slurm_job=None, cluster='') | more
    return s if ended is None else s | dict(ended=ended)

LIVING = '''
import sys, time
from slotnb.batch.run import start_run
run = start_run('10_decomposition', dict(preset='smoke', model=sys.argv[3], seed=0), sys.argv[1], sys.argv[2], 'cpu')
log = open(run.folder/'log.txt', 'a')
print('at work', file=log, flush=True)
print('ready', flush=True)
for i in range(600):
    print(f'step {i}', file=log, flush=True)
    time.sleep(0.1)
'''

@contextlib.contextmanager
def living(root, run, model='sa'):
    "A process that writes a run."
    child = subprocess.Popen([sys.executable, '-c', LIVING, str(root), run, model], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1'))
    try:
        assert child.stdout.readline() == 'ready\n'
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()

# ---------------------------------------------------------------- which runs

def test_one_word_means_what_it_says(tmp_path):
    for run in ('ab1', 'ab2', 'same'): make(tmp_path, run, 'done')
    make(tmp_path, 'same', 'done', '80_speed')
    make(tmp_path, 'ab1', 'done', '90_ab')
    plan = [Planned('10_decomposition', r, {}, dict(seed=n), 'x.ipynb') for n, r in enumerate(('ab2', 'ab1'))]
    for name in ('decomposition', 'first'): write_plan(tmp_path/'sweeps'/name/'plan.jsonl', plan)
    def names(what): return [f'{i["experiment"]}/{i["run"]}' for i in select(what, tmp_path)]
    assert len(names('')) == 5
    assert names('decomposition') == names('first') == ['10_decomposition/ab2', '10_decomposition/ab1'] # the sweep, in its order
    assert len(names('10_decomposition')) == 3 and names('speed') == ['80_speed/same'] and names('ab') == ['90_ab/ab1']
    assert names('ab2') == names('decomposition/ab2') == names('first/ab2') == ['10_decomposition/ab2'] and names('speed/sa') == ['80_speed/same']
    for wrong, word in (('same', 'could be 10_decomposition/same, 80_speed/same'), ('a', 'could be'), ('spede', "Did you mean 'speed'"), ('80_speed/samme', "'80_speed/same'")):
        with pytest.raises(ValueError, match=re.escape(word)): select(wrong, tmp_path)
    assert [i['sweeps'] for i in select('ab2', tmp_path)] == [{'decomposition': {'seed': 0}, 'first': {'seed': 0}}]

def test_a_sweep_without_runs_and_a_damaged_one(tmp_path):
    write_plan(tmp_path/'sweeps'/'new'/'plan.jsonl', [Planned('10_decomposition', 'x', {}, {}, 'x.ipynb')])
    assert select('new', tmp_path) == [] and 'no runs yet' in status_table('new', tmp_path) and 'no runs' in status_table('', tmp_path)
    make(tmp_path, 'bad', 'done')
    (tmp_path/'10_decomposition'/'bad'/'run.json').write_text('{')
    assert 'Damaged' in status_table('', tmp_path)
    (tmp_path/'sweeps'/'new'/'plan.jsonl').write_text('{"experiment"')
    with pytest.raises(ValueError, match='plan.jsonl is damaged'): status_table('', tmp_path)

# ---------------------------------------------------------------- status

def test_a_living_and_a_killed_writer(tmp_path):
    with living(tmp_path, 'lives') as child, living(tmp_path, 'killed', 'isa_t') as victim:
        victim.kill()
        victim.wait()
        table = status_table('', tmp_path, 100)
        assert re.search(r'^lives +sa +running', table, re.M) and re.search(r'^killed +isa_t +failed', table, re.M)
        assert re.search(rf'^    Lost: process {victim.pid} on \S+ is gone', table, re.M)
        assert table.splitlines()[-1] == '2 runs: 1 failed, 1 running'
        card = holder(tmp_path/'10_decomposition'/'killed')
        write_json(tmp_path/'10_decomposition'/'killed'/'claim.json', card | dict(seconds=7200.)) # as after two hours
        assert re.search(r'^killed .* 2\.0 h', status_table('', tmp_path, 100), re.M)
    assert '2 failed' in status_table('', tmp_path, 100)

def test_the_time_left(tmp_path):
    for n, (status, progress) in enumerate((('done', None), ('running', (1000, 4000, 60.)), ('running', (4000, 4000, 240.)), ('queued', None))):
        folder = make(tmp_path, f'r{n}', status, progress=progress, seconds=300 if status == 'done' else 0, parameters=dict(seed=n))
        if status == 'running': foreign(folder)
    table = status_table('', tmp_path, 120)
    assert re.search(r'^r1 .*1000/4000 .* 3 min', table, re.M) and re.search(r'^r2 .*4000/4000 .* 0 s', table, re.M)
    assert table.endswith('about 4 min left') # (180 + 0 + 300)/2 at two at a time
    make(tmp_path, 'r1', 'stopped', progress=(1000, 4000, 60.))
    make(tmp_path, 'r2', 'stopped')
    assert status_table('', tmp_path, 120).endswith('2 stopped, 1 queued') # nothing runs: nobody knows when

def test_every_line_fits(tmp_path):
    for n in range(12):
        parameters = dict(data=f'a/rather/long/path/to/some/data/{n}', learning_rate=10.**-n, model=('sa', 'isa_t')[n % 2], slots=n, seed=n)
        make(tmp_path, f'a-name-that-somebody-gave-{n}', 'done' if n % 3 else 'failed', parameters=parameters, seconds=1e4*n, metrics={'fg_ari.decoder.clip': n/12}, error=dict(name='ValueError', message='x'*300 + '\ny') if n % 3 == 0 else None)
    for width in range(10, 200, 7):
        lines = status_table('', tmp_path, width).splitlines()
        assert max(map(len, lines[:-1])) <= width, width
        assert sum(line.startswith('    Val') for line in lines) == 4 and '\ty' not in lines
    wide = status_table('', tmp_path, 180)
    assert 'fg_ari.decoder.clip' in wide and 'learning_rate' in wide and 'differ in' not in wide and '…/path/to/some/data/7' not in wide and 'to/some/data/7' in wide
    assert 'they differ in data, too' in status_table('', tmp_path, 90)

def test_the_headline(tmp_path):
    make(tmp_path, 'a', 'done', metrics={'mse.n': 3, 'mse': 0.5, 'fg_ari.decoder.clip': 0.75})
    make(tmp_path, 'b', 'done', '80_speed', metrics={'x.n': 3, 'ratio.gpu': 2.5, 'y': 1})
    make(tmp_path, 'c', 'done', '90_none', metrics={'nothing': None})
    (make(tmp_path, 'd', 'done', '95_bad')/'metrics.json').write_text('{')
    table = status_table('', tmp_path, 100)
    assert '0.75' in table and '2.5' in table and 'ratio.gpu' in table and '4 runs: 4 done' in table

def test_what_a_sweep_has_not_started(tmp_path):
    write_plan(tmp_path/'sweeps'/'s'/'plan.jsonl', [Planned('10_decomposition', f'r{n}', {}, dict(seed=n), 'x.ipynb') for n in range(3)])
    make(tmp_path, 'r1', 'done', sweep='s')
    assert 's: 1 run of 10_decomposition; 2 more planned, not started' in status_table('s', tmp_path)

def test_five_hundred_runs_in_a_moment(tmp_path):
    for n in range(500):
        folder = make(tmp_path, f'{n:08x}', ('done', 'running', 'failed', 'queued', 'stopped')[n % 5], parameters=dict(preset='study', model=('sa', 'isa_t')[n % 2], slots=5 + n % 3, seed=n), sweep=f's{n//100}',
                      metrics={'fg_ari.decoder.clip': n/500, **{f'm{k}': 0. for k in range(40)}}, progress=(n, 500, 60.), seconds=90., sessions=[session(90, 'done')], versions=dict.fromkeys('abcdefgh', '1.0'))
        if n % 5 == 1: foreign(folder)
    for s in range(5): write_plan(tmp_path/'sweeps'/f's{s}'/'plan.jsonl', [Planned('10_decomposition', f'{n:08x}', {}, dict(seed=n), 'x.ipynb') for n in range(100*s, 100*s + 100)])
    begun = time.perf_counter()
    table = status_table('', tmp_path, 80)
    seconds = time.perf_counter() - begun
    print(f'{seconds:.2f} s')
    assert table.splitlines()[-1].startswith('500 runs: 100 done, 100 failed, 100 stopped, 100 running, 100 queued') and seconds < 3
    begun = time.perf_counter()
    assert ledger(tmp_path)[0][0]['jobs'] == 500 and time.perf_counter() - begun < 3

def test_looking_again_until_nothing_runs(tmp_path, capsys):
    make(tmp_path, 'a', 'done')
    watch_status('', tmp_path)
    assert capsys.readouterr().out.count('1 run: 1 done') == 1
    with living(tmp_path, 'b') as child:
        code = f'from slotnb.batch.watch import watch_status; watch_status("", {str(tmp_path)!r}, every=0.3)'
        master, slave = pty.openpty()
        looking = subprocess.Popen([sys.executable, '-c', code], stdout=slave, stdin=slave, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1', COLUMNS='70', LINES='20'))
        os.close(slave)
        seen = b''
        while seen.count(b'1 running') < 2: seen += os.read(master, 4096)
        child.send_signal(signal.SIGUSR1)
        with contextlib.suppress(OSError): # Linux: the other end was closed
            while more := os.read(master, 4096): seen += more
        os.close(master)
        assert looking.wait(20) == 0 and b'\x1b[H' in seen and b'2 runs: 1 done, 1 stopped' in seen

# ---------------------------------------------------------------- Slurm, played by scripts

@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "squeue answers what `jobs` holds, scancel takes it out and writes down whom; `down`: no answer."
    home = tmp_path/'slurm'
    home.mkdir()
    (home/'jobs').write_text('')
    (home/'squeue').write_text(f'#!/bin/sh\n[ -e {home}/down ] && {{ echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }}\necho "$@" >> {home}/asked\ncat {home}/jobs\n')
    (home/'scancel').write_text(f'#!/bin/sh\nfor j in "$@"; do echo $j >> {home}/ended; sed -i "/^$j|/d" {home}/jobs; done\n')
    for name in ('squeue', 'scancel'): (home/name).chmod(0o755)
    (home/'sbatch').write_text('#!/bin/sh\n')
    (home/'sbatch').chmod(0o755)
    monkeypatch.setenv('PATH', f'{home}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setattr(watch, 'slurm_there', lambda: True)
    return home

def test_what_slurm_says(tmp_path, slurm):
    (slurm/'jobs').write_text('7_0|PENDING|Resources\n7_1|RUNNING|None\n7_3|PENDING|BeginTime\n7_4|PENDING|BeginTime\n')
    make(tmp_path, 'a', 'queued', slurm_job='7_0')
    foreign(make(tmp_path, 'b', 'running', slurm_job='7_1'))
    make(tmp_path, 'c', 'queued', slurm_job='7_2')
    make(tmp_path, 'd', 'stopped', slurm_job='7_3') # requeued at its time limit
    make(tmp_path, 'e', 'running', slurm_job='7_4') # requeued by Slurm after its node was lost
    make(tmp_path, 'f', 'done', slurm_job='6_0')
    table = status_table('', tmp_path, 100)
    for line in (r'a +queued .*7_0 pending \(Resources\)', r'b +running .*7_1 node1', r'c +queued +7_2 unknown to Slurm', r'd +queued .*7_3 pending \(BeginTime\)', r'e +queued .*7_4 pending', r'f +done .*6_0 node1'):
        assert re.search(f'^{line}', table, re.M), (line, table)
    assert len((slurm/'asked').read_text().splitlines()) == 1 and '--jobs 7' in (slurm/'asked').read_text() # one question for all
    assert '4 queued' in table and 'Lost' not in table
    (slurm/'down').touch()
    table = status_table('', tmp_path, 100)
    assert 'Slurm cannot be asked' in table and 'unknown to Slurm' not in table and 'Lost' in table and re.search(r'^a +queued +7_0', table, re.M)

def test_nobody_waits_for_a_job_that_slurm_does_not_know(tmp_path, slurm, capsys):
    make(tmp_path, 'a', 'queued', slurm_job='7_0')
    begun = time.monotonic()
    watch_status('', tmp_path)
    assert time.monotonic() - begun < 5 and 'unknown to Slurm' in capsys.readouterr().out

def test_cancel_through_slurm(tmp_path, slurm):
    (slurm/'jobs').write_text('7_0|PENDING|Resources\n7_1|RUNNING|None\n7_3|PENDING|BeginTime\n8_0|PENDING|Priority\n')
    folders = [make(tmp_path, 'a', 'queued', slurm_job='7_0', sweep='s'), foreign(make(tmp_path, 'b', 'running', slurm_job='7_1', sweep='s')), make(tmp_path, 'c', 'queued', slurm_job='7_2', sweep='s'),
               make(tmp_path, 'd', 'stopped', slurm_job='7_3', sweep='s'), make(tmp_path, 'f', 'done', slurm_job='6_0', sweep='s'), make(tmp_path, 'g', 'queued', slurm_job='8_0')]
    before = [(f/'run.json').read_bytes() for f in folders]
    (slurm/'down').touch()
    lines = cancel('s', tmp_path)
    assert [(f/'run.json').read_bytes() for f in folders] == before and 'Slurm cannot be asked' in lines[-1] and all('left alone' in line for line in lines[:-1]) and len(lines) == 4
    (slurm/'down').unlink()
    lines = cancel('s', tmp_path)
    assert sorted((slurm/'ended').read_text().split()) == ['7_0', '7_1', '7_3'] and len(lines) == 4
    assert [read_run(f)['status'] for f in folders] == ['stopped', 'running', 'stopped', 'stopped', 'done', 'queued']
    assert [(f/'run.json').read_bytes() == b for f, b in zip(folders, before)] == [False, True, False, True, True, True]
    assert 'before it began' in lines[0] and 'after a checkpoint' in lines[1] and 'waited to go on' in lines[2] and 'Slurm knows no job 7_2' in lines[3]

def test_a_waiting_job_where_there_is_no_slurm_is_left_alone(tmp_path):
    folder = make(tmp_path, 'a', 'queued', slurm_job='7_0')
    assert 'there is no Slurm here' in cancel('all', tmp_path)[0] and read_run(folder)['status'] == 'queued'

# ---------------------------------------------------------------- cancel, here

def test_cancel_stops_a_living_run_and_leaves_its_neighbour(tmp_path):
    with living(tmp_path, 'one') as one, living(tmp_path, 'two') as two:
        assert cancel('one', tmp_path) == [f'10_decomposition/one: told to stop after a checkpoint (process {one.pid} on {socket.gethostname()})']
        one.wait(20)
        info = read_run(tmp_path/'10_decomposition'/'one')
        assert (info['status'], info['stopped']) == ('stopped', 'SIGUSR1') and two.poll() is None
        assert read_run(tmp_path/'10_decomposition'/'two')['status'] == 'running'

def test_cancel_never_touches_what_has_ended(tmp_path):
    folders = [make(tmp_path, s, s, **({'error': dict(name='X', message='')} if s == 'failed' else {})) for s in ('done', 'failed', 'stopped')]
    before = [(f/'run.json').stat().st_mtime_ns for f in folders]
    assert cancel('all', tmp_path) == ['nothing to cancel: no run is queued or running']
    assert [(f/'run.json').stat().st_mtime_ns for f in folders] == before
    with pytest.raises(ValueError, match="'all'"): cancel('', tmp_path)

def test_cancel_takes_queued_runs_back(tmp_path):
    home = tmp_path/'sweeps'/'s'/'submissions'/'1'
    home.mkdir(parents=True)
    folders = [make(tmp_path, f'q{n}', 'queued', executor=str(home), sweep='s') for n in range(3)]
    with Claim(home): # the executor lives
        assert [read_run(f)['status'] for f in folders] == ['queued']*3
        assert all('stopped before it began' in line for line in cancel('s', tmp_path))
        assert [read_run(f)['status'] for f in folders] == ['stopped']*3
    infos = [json.loads((f/'run.json').read_text()) for f in folders]
    assert all(i['stopped'] == 'cancelled' and 'executor' not in i and 'folder' not in i and i['parameters'] for i in infos)
    assert not list(tmp_path.rglob('runner.json'))

def test_cancel_of_a_run_whose_runner_is_just_beginning(tmp_path):
    folder = make(tmp_path, 'a', 'queued')
    code = f'from slotnb.batch.claim import Claim; import time\nwith Claim({str(folder)!r}, "runner"): print("ready", flush=True); time.sleep(60)'
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert child.stdout.readline() == 'ready\n'
        assert f'told to stop after a checkpoint (process {child.pid}' in cancel('a', tmp_path)[0]
        assert child.wait(10) == -signal.SIGUSR1 and read_run(folder)['status'] == 'queued' # it is the runner's to say; this one only slept
    finally:
        child.kill()
        child.wait()
        child.stdout.close()

def test_a_run_on_another_machine_is_left_to_it(tmp_path):
    foreign(make(tmp_path, 'a', 'running'))
    assert cancel('all', tmp_path) == ['10_decomposition/a: runs as process 4 on node9: cancel it there']

# ---------------------------------------------------------------- logs

def test_logs(tmp_path, capsys):
    def said(*args, **more):
        logs(*args, **more)
        return capsys.readouterr().out
    folder = make(tmp_path, 'a', 'failed', log='one\ntwo é\nthree\n', error=dict(name='ValueError', message='wrong\nindeed', cell=4))
    (folder/'notebook.ipynb').write_text('{}')
    out = said('a', tmp_path)
    assert out == f'one\ntwo é\nthree\n\nfailed with ValueError (cell 4): wrong\nindeed\nexecuted notebook: {folder/"notebook.ipynb"}\n'
    for n, text in ((1, 'three\n'), (2, 'two é\nthree\n'), (9, 'one\ntwo é\nthree\n')): assert said('a', tmp_path, lines=n).partition('\nfailed')[0] == text
    make(tmp_path, 'b', 'queued')
    assert said('b', tmp_path) == '10_decomposition/b has printed nothing yet: queued\n'
    assert said('', tmp_path).splitlines()[0] == '2 runs, one at a time:' and '10_decomposition/b  queued' in said('', tmp_path)
    with pytest.raises(ValueError, match='lines must be 0'): logs('a', tmp_path, lines=-1)

@pytest.mark.parametrize('name', ['1.txt', '1.out'])
def test_logs_of_a_task_that_never_reached_its_run(tmp_path, capsys, name):
    home = tmp_path/'sweeps'/'s'/'submissions'/'1'
    write_plan(home/'plan.jsonl', [Planned('10_decomposition', r, {}, {}, 'x.ipynb') for r in ('a', 'b')])
    (home/'log').mkdir()
    (home/'log'/name).write_text('no such module: gcc/11\n')
    (home/'log'/'0.txt').write_text('of another run\n')
    folder = make(tmp_path, 'b', 'queued', submission=str(home), log='of an earlier session\n')
    logs('b', tmp_path)
    assert capsys.readouterr().out == 'no such module: gcc/11\n'
    make(tmp_path, 'b', 'done', submission=str(home))
    logs('b', tmp_path)
    assert capsys.readouterr().out == 'of an earlier session\n'
    (folder/'log.txt').unlink()
    logs('b', tmp_path)
    assert capsys.readouterr().out == 'no such module: gcc/11\n'

def test_logs_follow_a_living_run_to_its_end(tmp_path):
    with living(tmp_path, 'a') as child:
        following = subprocess.Popen([sys.executable, '-c', f'from slotnb.batch.watch import logs; logs("a", {str(tmp_path)!r}, follow=True, lines=1)'], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert following.stdout.readline().startswith('step ')
        following.stdout.readline()
        time.sleep(1)
        child.send_signal(signal.SIGUSR1)
        child.wait(20)
        rest = following.communicate(timeout=20)[0]
        assert following.returncode == 0 and rest.splitlines()[-1] == (tmp_path/'10_decomposition'/'a'/'log.txt').read_text().splitlines()[-1]

# ---------------------------------------------------------------- ledger

IZAR = Cluster(name='izar', account='master', price_gpu_hour=0.2, price_cpu_hour=0.01, co2_gpu_hour=0.04, watts_gpu=250., watts_cpu=5., pue=1.2, co2_kwh=0.1)

@pytest.fixture
def profiles(monkeypatch):
    known = dict(izar=IZAR, here=Cluster(name='here', watts_cpu=10., co2_kwh=0.5), gold=Cluster(name='gold', currency='EUR', price_gpu_hour=1.))
    monkeypatch.setattr(ledgers, 'cluster_files', lambda: known)
    monkeypatch.setattr(ledgers, 'read_cluster', known.__getitem__)

def test_the_ledger_adds_up(tmp_path, profiles):
    gpu = dict(cluster='izar', device='cuda:0', gpus=2, cpus=16)
    make(tmp_path, 'a', 'done', sessions=[session(3600, 'lost', **gpu, slurm_job='7_0'), session(7200, 'stopped', **gpu, slurm_job='7_0'), session(3600, 'done', **gpu, slurm_job='8_0')])
    make(tmp_path, 'b', 'failed', sessions=[session(1800, 'failed', cluster='izar', cpus=4, slurm_job='7_1')])
    make(tmp_path, 'c', 'done', sessions=[session(3600)])
    (izar, here), text = ledger(tmp_path)
    hours = (2*4, 4*0.5)
    kwh = ((2*250 + 16*5)*4 + 4*5*0.5)*1.2/1000
    assert (izar['jobs'], izar['sessions'], izar['gpu_hours'], izar['cpu_hours'], izar['wasted_gpu_hours'], izar['wasted_cpu_hours']) == (3, 4, *hours, 2, 2)
    assert izar['kwh'] == pytest.approx(kwh) and izar['co2'] == pytest.approx(8*0.04 + 4*5*0.5*1.2/1000*0.1) and izar['cost'] == pytest.approx(8*0.2 + 2*0.01)
    assert (here['cluster'], here['profile'], here['cpu_hours'], here['cost'], here['unknown']) == ('node1', 'here', 2, None, {'cost': 2}) and here['co2'] == pytest.approx(2*10/1000*0.5)
    assert '25 %' in text and 'estimates' in text and 'Runs that were deleted are not counted' in ' '.join(text.split()) and 'costs (2.0 h)' in text
    assert re.search(r'^master +izar +3 +8\.00 +2\.00 +25 % ', text, re.M) and re.search(r'^ +all +4 +8\.00 +4\.00 ', text, re.M)
    assert ledger(tmp_path, 'a')[0][0]['sessions'] == 3 and len(ledger(tmp_path, 'a')[0]) == 1

def test_the_report_s_figure(tmp_path):
    make(tmp_path, 'a', 'done', sessions=[session(3386.3*3600, 'done', cluster='izar', gpus=1, device='cuda', slurm_job='1')])
    rows, text = ledger(tmp_path, cluster=Cluster(name='izar', account='master', price_gpu_hour=583.8/3386.3, co2_gpu_hour=140.4/3386.3))
    assert rows[0]['cost'] == pytest.approx(583.8) and rows[0]['co2'] == pytest.approx(140.4) and '3,386.30' in text and '583.80 CHF' in text

def test_a_cluster_without_a_profile_costs_no_zero(tmp_path, profiles):
    make(tmp_path, 'a', 'done', sessions=[session(3600, cluster='unheard', gpus=1, slurm_job='1')])
    make(tmp_path, 'b', 'done', sessions=[session(3600, slurm_job='2')]) # in Slurm, but nobody said where: not the profile of this machine
    rows, text = ledger(tmp_path)
    assert all(r['profile'] is r['cost'] is r['kwh'] is r['co2'] is None for r in rows) and {r['cluster'] for r in rows} == {'unheard', 'node1'}
    assert text.count('no profile  no profile  no profile') == 2 and re.search(r' all .* - +- +-', text.replace('*', ' ')) and 'clusters has none for unheard' in text

def test_two_currencies_are_not_added(tmp_path, profiles):
    for n, name in enumerate(('izar', 'gold')): make(tmp_path, name, 'done', sessions=[session(3600, cluster=name, gpus=1, slurm_job=str(n))])
    rows, text = ledger(tmp_path)
    assert {r['currency'] for r in rows} == {'CHF', 'EUR'} and '1.00 EUR' in text and '0.20 CHF' in text and '1.20' not in text

def test_running_and_lost_sessions_count_to_their_last_beat(tmp_path, profiles):
    foreign(make(tmp_path, 'a', 'running', sessions=[session(0, None)]), seconds=1800.)
    with living(tmp_path, 'b') as child: pass
    folder = tmp_path/'10_decomposition'/'b'
    write_json(folder/'claim.json', holder(folder) | dict(seconds=3600.))
    write_json(folder/'run.json', {k: v for k, v in read_run(folder).items() if k != 'folder'}) # its runner has written the last word, as after a kernel's death
    make(tmp_path, 'old', 'done')
    make(tmp_path, 'waits', 'queued')
    rows, text = ledger(tmp_path)
    assert [(r['running'], r['lost'], r['failed']) for r in rows if r['cluster'] == 'node1'] == [(1, 0, 0)] and sum(r['lost'] for r in rows) == 1
    assert {r['cluster']: r['cpu_hours'] for r in rows}['node1'] == 1.0 and [r['wasted_cpu_hours'] for r in rows if r['lost']] == [r['cpu_hours'] for r in rows if r['lost']] != [0]
    assert '1 sessions still run' in text and '1 runs keep no sessions' in text

def test_an_empty_ledger(tmp_path):
    rows, text = ledger(tmp_path)
    assert rows == [] and text.startswith('0 runs, and none of them has told what it used')

# ---------------------------------------------------------------- TensorBoard

def test_names_of_curves(tmp_path):
    root, into = tmp_path/'runs', tmp_path/'links'
    into.mkdir()
    for n in range(4): (make(root, f'r{n}', 'done', parameters=dict(model=('sa', 'isa_t')[n % 2], data=f'a/b {n//2}', seed=0))/'tensorboard').mkdir()
    (make(root, 'twin', 'done', parameters=dict(model='sa', data='a/b 0', seed=0))/'tensorboard').mkdir()
    make(root, 'none', 'queued', parameters=dict(model='sa', data='a/b 7', seed=0))
    made = watch._link('', root, into)
    assert sorted(made) == sorted(f'10_decomposition/{n}' for n in ('model=sa,data=a-b-0,r0', 'model=isa_t,data=a-b-0', 'model=sa,data=a-b-1', 'model=isa_t,data=a-b-1', 'model=sa,data=a-b-0,twin'))
    assert all((into/m).is_dir() for m in made) and watch._link('', root, into) == []
    (root/'10_decomposition'/'none'/'tensorboard').mkdir() # it has begun
    assert watch._link('', root, into) == ['10_decomposition/model=sa,data=a-b-7']

def test_the_way_to_the_browser(monkeypatch):
    for name in ('SLURM_JOB_ID', 'SSH_CONNECTION'): monkeypatch.delenv(name, raising=False)
    assert watch._tunnel(6006) == ''
    monkeypatch.setenv('SSH_CONNECTION', '10.0.0.1 5 10.0.0.2 22')
    assert '-L 6006:localhost:6006' in watch._tunnel(6006) and '-J' not in watch._tunnel(6006)
    monkeypatch.setenv('SLURM_JOB_ID', '5')
    monkeypatch.setenv('SLURM_SUBMIT_HOST', 'login1')
    assert '@login1 -L 6007:localhost:6007' in watch._tunnel(6007)

def test_a_taken_port_is_named(tmp_path):
    pytest.importorskip('tensorboard')
    with socket.socket() as s:
        s.bind(('localhost', 0))
        s.listen()
        with pytest.raises(OSError, match=f'port {s.getsockname()[1]} cannot be used'): tensorboard('', tmp_path, s.getsockname()[1])

@pytest.mark.slow
def test_tensorboard_shows_the_names_and_ends(tmp_path):
    pytest.importorskip('tensorboard')
    from torch.utils.tensorboard import SummaryWriter
    for n in range(2):
        with SummaryWriter(make(tmp_path/'runs', f'r{n}', 'done', parameters=dict(seed=n))/'tensorboard') as w: w.add_scalar('loss', 1., 1)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    (tmp_path/'tmp').mkdir()
    served = subprocess.Popen([sys.executable, '-c', f'from slotnb.batch.watch import tensorboard; tensorboard("", {str(tmp_path/"runs")!r}, {port})'], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                              env=os.environ | dict(TMPDIR=str(tmp_path/'tmp'), SSH_CONNECTION='1 2 3 4'))
    try:
        assert served.stdout.readline() == f'2 runs with curves at http://localhost:{port} (Ctrl-C ends it)\n' and f'-L {port}:localhost:{port}' in served.stdout.readline()
        names, end = [], time.monotonic() + 90
        while len(names) < 2 and time.monotonic() < end:
            with contextlib.suppress(OSError): names = json.load(urllib.request.urlopen(f'http://localhost:{port}/data/runs', timeout=5))
            time.sleep(0.5)
        assert sorted(names) == ['10_decomposition/seed=0', '10_decomposition/seed=1']
        served.send_signal(signal.SIGINT)
        assert served.wait(20) == 0 and not list((tmp_path/'tmp').glob('slotnb-tensorboard-*'))
        with pytest.raises(OSError): urllib.request.urlopen(f'http://localhost:{port}/', timeout=2)
    finally:
        served.kill() if served.poll() is None else None
        served.stdout.close()
