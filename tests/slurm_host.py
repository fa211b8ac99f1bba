"""A real Slurm on this one host for as long as a test lasts: own folder, ports and munge key, two stand-in GPUs. `sudo python tests/slurm_host.py` keeps one up for a look by hand."""
import contextlib, ctypes, json, os, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path

NEEDED = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scontrol', 'scancel', 'sinfo'
PATH = os.pathsep.join([os.environ.get('PATH', ''), '/usr/sbin', '/sbin'])
CPUS = 8 # more than there may be: the array's limit and the GPUs decide how many run together, not the cores

def processes() -> dict: # pid -> (name, parent's pid)
    "What runs on this host; the dead that nobody has collected left out."
    found = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition('(')[2].rpartition(')')
            state, parent = rest.split()[:2]
            if state not in 'ZX': found[int(path.parent.name)] = name, int(parent)
    return found

def running() -> list[str]: # 'slurmd (pid 12)'
    "The daemons of a Slurm that is up on this host already."
    return [f'{name} (pid {pid})' for pid, (name, _) in processes().items() if name in ('slurmctld', 'slurmd', 'slurmstepd')]

def why_not() -> str: # '': a Slurm can be brought up here
    "The reason to skip, by name."
    if not sys.platform.startswith('linux'): return f'Slurm runs on Linux, this is {sys.platform}'
    missing = [n for n in NEEDED if not shutil.which(n, path=PATH)]
    if missing: return f'Slurm is not installed ({", ".join(missing)} missing; Debian: apt-get install slurm-wlm munge)'
    if os.geteuid(): return 'bringing up Slurm needs root'
    if 'SLURM_JOB_ID' in os.environ: return f'this is itself a Slurm job ({os.environ["SLURM_JOB_ID"]})'
    if found := running(): return f'a Slurm is up on this host already and is left alone: {", ".join(found)}'
    return ''

# ---------------------------------------------------------------- the files

def free_ports(n):
    "Ports nobody listens on."
    held = [socket.socket() for _ in range(n)]
    try:
        for s in held: s.bind(('127.0.0.1', 0))
        return [s.getsockname()[1] for s in held]
    finally:
        for s in held: s.close()

def configure(folder: Path):
    "slurm.conf, gres.conf, cgroup.conf, a key and two character devices in `folder`; jobs of the partition `urgent` push those of `gpu` back into the queue."
    host = socket.gethostname().split('.')[0]
    memory = os.sysconf('SC_PHYS_PAGES')*os.sysconf('SC_PAGE_SIZE')//2**20
    control, node = free_ports(2)
    for part in ('state', 'spool', 'log'): (folder/part).mkdir()
    key = folder/'munge.key'
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    for i in range(2): os.mknod(folder/f'gpu{i}', 0o20666, os.makedev(1, 3)) # the device of /dev/null
    (folder/'gres.conf').write_text(''.join(f'NodeName={host} Name=gpu File={folder}/gpu{i} Flags=nvidia_gpu_env\n' for i in range(2)))
    (folder/'cgroup.conf').write_text('CgroupAutomount=no\n')
    # cred_expire is also how long a requeued job waits (two minutes by default); Slurm takes no less than 5 s
    (folder/'slurm.conf').write_text(f'''
ClusterName=slotnb-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
GresTypes=gpu
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes={host} Default=YES MaxTime=1:00:00 State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=1:00:00 State=UP PriorityTier=2
'''.lstrip())

# ---------------------------------------------------------------- the process that owns the daemons

def environment(folder: Path) -> dict:
    "What every command of this Slurm is called with."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_', 'SQUEUE_', 'SCANCEL_', 'SINFO_'))}
    return clean | {'SLURM_CONF': f'{folder}/slurm.conf', 'PATH': PATH}

def adopt_orphans():
    "Whatever this process starts, and they start, stays its descendant: slurmd lets go of the steps of its jobs."
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0): raise OSError(ctypes.get_errno(), 'prctl(PR_SET_CHILD_SUBREAPER)') # linux/prctl.h

def jobs(begun: list) -> list[int]:
    "Every process below this one but the daemons and the controller's own: the steps of jobs, and what they run."
    everything, daemons, found = processes(), {p.pid: name for name, p in begun}, []
    for pid in everything:
        top = pid
        while top in everything and everything[top][1] != os.getpid(): top = everything[top][1]
        if top in everything and pid not in daemons and daemons.get(top, 'slurmd') == 'slurmd': found.append(pid)
    return found

def tails(folder: Path, lines=15) -> str:
    "The last lines of every daemon's log."
    logs = [p for p in sorted((folder/'log').glob('*')) if p.suffix != '.out' or not p.with_suffix('.log').exists()] # .out: what it said before it had a log
    return '\n'.join(f'--- {p.name}\n' + '\n'.join(p.read_text(errors='replace').splitlines()[-lines:]) for p in logs)

def start(folder: Path, begun: list, patience=30):
    "The three daemons, each waited for; a daemon that ends, or a node that is not idle in `patience` seconds, is an error with the logs in it."
    env, give_up = environment(folder), time.monotonic() + patience
    def daemon(name, *args):
        log = open(folder/f'log/{name}.out', 'wb')
        begun.append((name, subprocess.Popen([shutil.which(name, path=PATH), *args], env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)))
    def until(there, what):
        while not there():
            gone = [f'{n} ended with {p.returncode}' for n, p in begun if p.poll() is not None]
            if gone or time.monotonic() > give_up: raise RuntimeError(f'Slurm did not come up in {patience} s: {", ".join(gone) or what}\n{tails(folder)}')
            time.sleep(0.1)
    def state():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(['sinfo', '-h', '-o', '%T'], env=env, capture_output=True, text=True, timeout=5).stdout.strip()
    files = [f'--{k}={folder}/munge.{v}' for k, v in {'socket': 'socket', 'key-file': 'key', 'pid-file': 'pid', 'seed-file': 'seed'}.items()]
    daemon('munged', '--foreground', '--force', *files, f'--log-file={folder}/log/munged.log')
    until((folder/'munge.socket').exists, 'munged made no socket')
    daemon('slurmctld', '-D', '-c', '-f', f'{folder}/slurm.conf')
    daemon('slurmd', '-D', '-f', f'{folder}/slurm.conf')
    until(lambda: state() == 'idle', 'the node is not idle')

def stop(folder: Path, begun: list):
    "Jobs first, then the daemons in the other order, then the folder with its devices."
    def ended(seconds):
        give_up = time.monotonic() + seconds
        while jobs(begun) and time.monotonic() < give_up: time.sleep(0.05)
        return not jobs(begun)
    if not ended(0):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired): subprocess.run(['scancel', '--user=root'], env=environment(folder), capture_output=True, timeout=5)
        ended(5)
    for name, process in reversed(begun):
        process.terminate()
        try: process.wait(5)
        except subprocess.TimeoutExpired: process.kill()
        process.wait()
    while not ended(1): # a last write of theirs would make the folder again
        for pid in jobs(begun):
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    shutil.rmtree(folder)

def serve():
    "Bring Slurm up, say so on stdout, take it down when stdin closes: so it goes even where the test is killed with -9."
    for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.default_int_handler)
    adopt_orphans()
    folder, begun = Path(tempfile.mkdtemp(prefix='slotnb-slurm-')), []
    folder.chmod(0o755)
    try:
        configure(folder)
        start(folder, begun)
        print(json.dumps(dict(folder=str(folder))), flush=True)
        if sys.stdin.isatty(): print(f'export SLURM_CONF={folder}/slurm.conf   # ctrl-C here takes it down', flush=True)
        sys.stdin.read()
    except KeyboardInterrupt: pass
    except Exception as e: print(json.dumps(dict(error=f'{type(e).__name__}: {e}')), flush=True)
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
        stop(folder, begun)

# ---------------------------------------------------------------- what a test uses

class Host:
    "A Slurm that is up."
    def __init__(self, folder): self.folder, self.env = Path(folder), environment(Path(folder))

    def call(self, *command, check=True, timeout=30) -> str:
        "stdout of a Slurm command."
        done = subprocess.run(list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode: raise RuntimeError(f'{" ".join(map(str, command))} ended with {done.returncode}: {done.stderr}\n{tails(self.folder)}')
        return done.stdout

    def job(self, job) -> dict:
        "The fields of `scontrol show job`; they stay for minutes after the end."
        return dict(part.split('=', 1) for part in self.call('scontrol', 'show', 'job', '-o', job).splitlines()[0].split() if '=' in part)

    def until(self, there, what: str, seconds=60., every=0.2):
        "What `there()` gives as soon as it is true; an error with the queue and the logs after `seconds`."
        give_up = time.monotonic() + seconds
        while not (found := there()):
            if time.monotonic() > give_up: raise TimeoutError(f'{what}: not in {seconds:.0f} s\n{self.call("squeue", "-r")}\n{tails(self.folder)}')
            time.sleep(every)
        return found

@contextlib.contextmanager
def slurm_host():
    "A Slurm for the time of the block; `RuntimeError` where `why_not()` has a reason."
    if reason := why_not(): raise RuntimeError(reason)
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = process.stdout.readline()
        answer = json.loads(line) if line else dict(error=f'{Path(__file__).name} ended with {process.wait()}')
        if 'error' in answer: raise RuntimeError(answer['error'])
        yield Host(answer['folder'])
    finally:
        process.stdin.close()
        try: process.wait(60)
        except subprocess.TimeoutExpired: process.terminate()
        process.wait()

if __name__ == '__main__':
    if reason := why_not(): sys.exit(reason)
    serve()
