"""README.md from nbs/index.ipynb: `readme.py` writes it, `readme.py --check` compares."""
import difflib, posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
MARK = '<!-- Rendered from nbs/index.ipynb by `make docs-readme`: edit the notebook, not this file. -->\n\n'

def render(notebook: Path) -> str: # markdown
    "The notebook without hidden cells and directive lines, its relative links seen from the project's root."
    nb = nbformat.read(notebook, 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
    for cell in nb.cells: cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    nb.metadata['language_info'] = {'name': 'python'} # nbdev_clean strips it, and the fences name the language
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'): sys.exit(f'{notebook}: pictures of the README belong into nbs/images, not into outputs: {sorted(resources["outputs"])}')
    home = notebook.parent.relative_to(ROOT).as_posix()
    def moved(m):
        path = m['path']
        return m['before'] + (path if re.match(r'[a-z]+:|#|/', path) else posixpath.normpath(f'{home}/{path}'))
    text = re.sub(r'(?P<before>\]\(|\bsrc="|\bhref=")(?P<path>[^)"\s]+)', moved, text)
    return MARK + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__':
    readme, text = ROOT/'README.md', render(ROOT/'nbs/index.ipynb')
    if '--check' not in sys.argv: readme.write_text(text)
    elif readme.read_text() != text:
        sys.stdout.writelines(difflib.unified_diff(readme.read_text().splitlines(True), text.splitlines(True), 'README.md', 'nbs/index.ipynb, rendered'))
        sys.exit('README.md is not what nbs/index.ipynb renders to: make docs-readme')
