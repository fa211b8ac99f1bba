"""The decomposition experiment at preset `laptop` by papermill, into runs/10_decomposition/demo; its table when it is there already."""
import json, os, sys
from pathlib import Path

from slotnb.batch.cli import main
from slotnb.core import runs_dir

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/'nbs/experiments/10_decomposition.ipynb'
FIRST = ['decoder', 'attention', 'rollout'] # sources in the order they are shown; baselines follow
HEADLINE = 'fg_ari per clip'

def shown(value) -> str:
    "Three figures of anything a score can be; adding zero takes the sign off -0."
    return 'n/a' if value is None else f'{round(value, 5) + 0.:.{3 if abs(value) >= .1 or abs(value) < 1e-5 else 5}f}'

def table(metrics: dict) -> str:
    "The flat metrics as text: a row per metric and scope, a column per source; what is not of that form below."
    scores, counts, rest, sources = {}, {}, {}, []
    for key, value in metrics.items():
        if key.endswith(('.n', '.nan')): continue
        parts = key.split('.')
        if len(parts) != 3 or parts[0] == 'seconds': rest[key] = value; continue
        metric, source, scope = parts
        row = f'{metric} per {scope}' if scope in ('clip', 'frame') else f'{metric} {scope}'
        if source not in sources: sources.append(source)
        scores.setdefault(row, {})[source] = shown(value)
        counts.setdefault(row, str(metrics.get(f'{key}.n', '')))
    sources.sort(key=lambda s: FIRST.index(s) if s in FIRST else len(FIRST))
    order = sorted(scores, key=lambda row: row != HEADLINE)
    rows = [['', *sources, 'n'], *([row, *(scores[row].get(s, '-') for s in sources), counts[row]] for row in order)] if scores else []
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:]))]).rstrip() for row in rows]
    return '\n'.join(lines + [f'{k}: {v:.4g}' if isinstance(v, float) else f'{k}: {v}' for k, v in rest.items()])

if __name__ == '__main__':
    os.chdir(ROOT)
    if not NOTEBOOK.is_file(): sys.exit(f'{NOTEBOOK.relative_to(ROOT)} is not there')
    run = runs_dir()/'10_decomposition'/'demo'
    if code := main(['run', 'decomposition', '--preset', 'laptop', '--name', run.name]):
        sys.exit(f'\nthe notebook up to there: {run/"notebook.ipynb"}\nmake demo takes it up again')
    pictures = sorted(p.name for p in (run/'figures').glob('*'))
    print(f'\n{table(json.loads((run/"metrics.json").read_text()))}\n')
    print(f'pictures:          {run/"figures"} ({", ".join(pictures)})')
    print(f'executed notebook: {run/"notebook.ipynb"}')
    print(f'numbers:           {run/"metrics.json"}')
    print(f'to repeat it:      rm -r {run}')
