"The rules of the house: what a notebook may import, hold and weigh, and that the package stays light."
import ast, configparser, json, re, subprocess, sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT/'slotnb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
OPTIONAL = ['av', 'h5py', 'mujoco', 'PIL', 'scipy', 'sklearn', 'skimage', 'lpips', 'matplotlib', 'seaborn', 'pandas', 'torchvision', 'papermill',
    'tensorboard', 'torch.utils.tensorboard', 'jinja2', 'yaml', 'psutil', 'nbclient', 'IPython', 'nbdev', 'fastcore', 'nbformat']
OURS = [*NOTEBOOKS, *MODULES, ROOT/'slotnb/__init__.py', ROOT/'Makefile', *sorted((ROOT/'tests').glob('*.py')), *sorted((ROOT/'.ci').glob('*'))]
OURS = [p for p in OURS if p.is_file() and p != Path(__file__).resolve()]

def name_of(path): return path.relative_to(ROOT).as_posix()
def read(path): return nbformat.read(path, 4)
def code(path): return [c for c in read(path).cells if c.cell_type == 'code']
def exported(path): return [c for c in code(path) if re.search(r'^#\|\s*exporti?s?\b', c.source, re.M)]
def is_experiment(path): return 'experiments' in path.relative_to(NBS).parts

def module_of(path):
    for cell in code(path):
        if m := re.search(r'^#\|\s*default_exp\s+(\S+)', cell.source, re.M): return m[1]

every = pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
ORDER = {module_of(p): p.relative_to(NBS).parts for p in NOTEBOOKS if module_of(p)} # parts sort as floors do: '20_layers' < '30_models'

def imported(source):
    "The slotnb modules a piece of code imports, wherever in it."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: # `from slotnb.data import shards` names a module too
            names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
        else: continue
        yield from (n.removeprefix('slotnb.') for n in names if n.startswith('slotnb.'))

def plain(source): # IPython's own lines are no Python
    return '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in source.splitlines())

@every
def test_imports_run_downwards(path):
    cells, own = (exported(path), module_of(path)) if module_of(path) else (code(path), None)
    for cell in cells:
        for name in imported(plain(cell.source)):
            if name in ORDER: assert own is None or ORDER[name] < ORDER[own], f'{name_of(path)} imports slotnb.{name}, which lies above it'

def test_the_order_of_floors_is_what_it_seems():
    assert list(imported('from slotnb.core import stream\nimport slotnb.data.clips\nfrom slotnb.data import shards')) == \
        ['core', 'core.stream', 'data.clips', 'data', 'data.shards']
    assert ORDER['core'] < ORDER['data.clips'] < ORDER['layers.positions'] < ORDER['models.savi'] < ORDER['training.losses'] < ORDER['evaluation.plots']

@every
def test_opens_with_title_and_summary(path):
    first = read(path).cells[0]
    assert first.cell_type == 'markdown' and re.match(r'# \S.*\n+> \S', first.source), f'{name_of(path)} must open with "# title" and "> one line"'

@every
def test_folders_and_modules_agree(path):
    module, parts = module_of(path), path.relative_to(NBS).with_suffix('').parts
    if module is None: assert not exported(path), f'{name_of(path)} exports, but has no default_exp'
    else: assert module == '.'.join(re.sub(r'^\d+_', '', p) for p in parts), f'{name_of(path)} exports {module}'
    if parts[0] in ('experiments', 'tutorials'): assert module is None, f'{name_of(path)} must not export'

@every
def test_parameters_cell(path):
    tagged = [c for c in read(path).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == (1 if is_experiment(path) else 0), f'{name_of(path)} has {len(tagged)} cells tagged parameters'
    for cell in tagged:
        assert cell.cell_type == 'code'
        others = [n for n in ast.parse(cell.source).body if not isinstance(n, (ast.Assign, ast.AnnAssign))]
        assert not others, f'{name_of(path)}: the parameters cell holds nothing but parameters'
        names = {t.id for n in ast.parse(cell.source).body for t in (n.targets if isinstance(n, ast.Assign) else [n.target])}
        assert {'seed', 'device', 'runs_dir'} <= names, f'{name_of(path)} lacks parameters {sorted({"seed", "device", "runs_dir"} - names)}'

@every
def test_outputs_and_size(path):
    if is_experiment(path): assert not any(c.outputs or c.execution_count for c in code(path)), f'{name_of(path)} must be stored without outputs'
    assert path.stat().st_size < 1.5e6, f'{name_of(path)} weighs {path.stat().st_size/1e6:.1f} MB'
    assert not [o for c in code(path) for o in c.outputs if o.output_type == 'error'], f'{name_of(path)} was stored with an error'
    for cell in code(path):
        for output in cell.outputs:
            for kind, data in output.get('data', {}).items():
                if kind.startswith('image/'): assert len(data)*3/4 < 150e3, f'{name_of(path)}, cell {cell.id}: a picture of {len(data)*3/4e3:.0f} kB'

@every
def test_exported_cells_are_short(path):
    for cell in exported(path):
        n = len(cell.source.splitlines())
        assert n <= 60, f'{name_of(path)}, cell {cell.id} has {n} lines'

@every
def test_cell_ids(path):
    ids = [c.get('id') for c in read(path).cells]
    assert all(ids) and len(set(ids)) == len(ids)

FORBIDDEN = {
    'a path of one machine': r'(?<![\w.$~}/-])/(home|Users|root|tmp|work|mnt|scratch)/\w',
    '.cuda(): use device': r'\.cuda\(\)',
    'pickle, which runs code on loading': r'^\s*(import|from)\s+(pickle|cloudpickle|dill|joblib)\b|allow_pickle\s*=\s*True',
    'torch.load without weights_only=True': r'torch\.load\((?!.*weights_only\s*=\s*True)',
    'weights_only=False': r'weights_only\s*=\s*False',
    'wandb': r'^\s*(import|from)\s+wandb\b',
}

def text_of(path):
    if path.suffix != '.ipynb': return path.read_text()
    texts = []
    for cell in read(path).cells:
        texts.append(cell.source)
        for o in cell.get('outputs', []):
            texts += [o.get('text', ''), *(v for k, v in o.get('data', {}).items() if k.startswith('text/') and isinstance(v, str))]
    return '\n'.join(texts)

@pytest.mark.parametrize('path', OURS, ids=name_of)
def test_nothing_forbidden(path):
    text = text_of(path)
    for what, pattern in FORBIDDEN.items():
        if path.parent.name == 'tests' and ('pickle' in what or 'cuda' in what): continue # tests refuse pickles, and compare devices
        found = re.search(pattern, text, re.M)
        assert not found, f'{name_of(path)} holds {what}: {text[max(0, found.start() - 40):found.end() + 40]!r}'

LINK = re.compile(r'!?\[[^\]]*\]\(([^)\s]+)\)|\b(?:src|href)="([^"]+)"')

@pytest.mark.parametrize('path', [*NOTEBOOKS, *(ROOT/p for p in ('README.md', 'data/README.md', 'runs/README.md'))], ids=name_of)
def test_links_lead_somewhere(path):
    text = '\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown') if path.suffix == '.ipynb' else path.read_text()
    for link in (a or b for a, b in LINK.findall(re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S))):
        if not re.match(r'[a-z]+:|#', link): assert (path.parent/link.split('#')[0]).exists(), f'{name_of(path)} links to {link}, which is not there'

BLOCK = f'''
import importlib, importlib.abc, sys, time
OPTIONAL = {OPTIONAL}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == o or name.startswith(o + '.') for o in OPTIONAL): raise ModuleNotFoundError(f'{{name}} is an optional package', name=name)
sys.meta_path.insert(0, Block())
start = time.perf_counter()
import slotnb
light = time.perf_counter() - start
assert 'torch' not in sys.modules, 'import slotnb loads torch'
start = time.perf_counter()
import torch
heavy = time.perf_counter() - start
failed = []
for name in sys.argv[1:]:
    try: importlib.import_module(name)
    except ImportError as e: failed.append(f'{{name}}: {{e}}')
print(light, heavy)
if failed: sys.exit('\\n'.join(failed))
'''

def test_imports_with_the_base_dependencies_alone():
    names = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in MODULES]
    done = subprocess.run([sys.executable, '-c', BLOCK, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    light, heavy = map(float, done.stdout.split())
    assert light < heavy/10, f'import slotnb takes {light:.2f} s, torch {heavy:.2f} s'

def test_every_notebook_has_its_module_and_every_module_its_notebook():
    modules = {'.'.join(p.relative_to(ROOT/'slotnb').with_suffix('').parts) for p in MODULES}
    assert modules == set(ORDER)

def test_licence_and_version():
    assert 'Apache License' in (ROOT/'LICENSE').read_text()
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    version = re.search(r'^__version__ = "(.+)"$', (ROOT/'slotnb/__init__.py').read_text(), re.M)[1]
    assert settings['DEFAULT']['version'] == version
    assert settings['DEFAULT']['allowed_cell_metadata_keys'] == 'tags', 'nbdev_clean would strip the parameters tag'

def test_shipped_models_are_small_and_say_what_they_are():
    for config in sorted((ROOT/'slotnb/weights').glob('*/config.json')):
        size = sum(p.stat().st_size for p in config.parent.iterdir())
        assert size < 2e6, f'{config.parent.name} weighs {size/1e6:.1f} MB'
        assert {'class', 'config'} <= json.loads(config.read_text()).keys()
