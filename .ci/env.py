"""Make the environment, once. Run by the Python it shall have, so it must be readable by old ones: no syntax newer than Python 2."""
from __future__ import print_function
import hashlib, os, subprocess, sys

def say(text):
    print(text)
    sys.stdout.flush()

def version_in(python):
    return subprocess.check_output([python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])']).decode().strip()

def mark(stamp, wanted, version):
    with open(stamp, 'w') as f: f.write('%s %s\n' % (wanted, version))

def main(folder, asked):
    stamp, python, mine = os.path.join(folder, '.slotnb'), os.path.join(folder, 'bin', 'python'), '%d.%d' % sys.version_info[:2]
    wanted = hashlib.sha256(os.getcwd().encode())
    for name in ('pyproject.toml', 'constraints.txt'):
        with open(name, 'rb') as f: wanted.update(f.read())
    wanted = wanted.hexdigest()
    stamped, has = open(stamp).read().split() if os.path.exists(stamp) else (None, None)
    # an environment that is there is kept whatever the default Python has become, unless another one is asked for by name
    if stamped == wanted and os.path.exists(python) and (not asked or has == mine): return
    if sys.version_info < (3, 11):
        sys.exit('%s is Python %s: slotnb needs 3.11 or newer. Choose one with make PYTHON=/path/to/python3.12' % (sys.executable, mine))
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.exists(os.path.join(folder, 'pyvenv.cfg')):
        sys.exit('%s is there, but is not a virtual environment: choose another folder with make VENV=...' % folder)
    keep = os.path.exists(python)
    if keep and asked and version_in(python) != mine:
        if not stamped: sys.exit('%s holds Python %s and was not made by make: choose another folder for Python %s with make VENV=...'
            % (folder, version_in(python), mine))
        keep = False
    if not keep:
        try: import ensurepip, venv  # noqa: F401  (Debian packs them apart)
        except ImportError: sys.exit('%s has no venv module: on Debian and Ubuntu, apt install python%s-venv' % (sys.executable, mine))
        say('making the environment %s with Python %s' % (folder, mine))
        subprocess.check_call([sys.executable, '-m', 'venv', '--clear', folder])
    mark(stamp, 'unfinished', version_in(python))
    say('installing slotnb and its tools into %s: minutes and 2 GB, more where pip brings CUDA along' % folder)
    install = [python, '-m', 'pip', 'install', '--disable-pip-version-check', '-e', '.[dev]', '-c', 'constraints.txt']
    if subprocess.call(install): sys.exit('the environment %s is not complete; what failed stands above. The same command takes it up again' % folder)
    mark(stamp, wanted, version_in(python))

if __name__ == '__main__': main(sys.argv[1], '--asked' in sys.argv[2:])
