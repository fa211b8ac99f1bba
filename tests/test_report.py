"The report of a sweep: what is counted, what is said of what is not there, and how the page behaves in a browser. All runs here are fabricated."
import html, json, math, re, shutil, subprocess
from pathlib import Path

import numpy as np
import pytest

for package in ('jinja2', 'scipy', 'matplotlib', 'seaborn', 'pandas', 'PIL'): pytest.importorskip(package)
from PIL import Image

from slotnb.batch.page import decimals, number, summarise, thumbnail
from slotnb.batch.report import align, make_rows, read_curve, read_entry, report, report_runs
from slotnb.core import write_json

slow = pytest.mark.slow
SPEC = dict(rows=['model'], metrics={'fg_ari.decoder.clip': 'FG-ARI', 'mse_pixel.decoder.frame': 'MSE'}, curves=['loss'], pictures=['median.png'])

def fabricate(root, name, model='sa', seed=0, score=0.5, status='done', pictures=True, **more):
    "A run that never ran."
    folder = root/'10_fabricated'/name
    info = dict(experiment='10_fabricated', run=name, parameters=dict(preset='study', model=model, seed=seed, data=''), status=status, seconds=3600., commit='a'*40, dirty=False, versions=dict(torch='2.13.0'),
                device='cuda:0', device_name='NVIDIA H200', sessions=[dict(seconds=3600., gpus=2, slurm_job=f'77_{seed}')], slurm_job=f'77_{seed}')
    write_json(folder/'run.json', info | more)
    if status == 'done':
        write_json(folder/'metrics.json', {'fg_ari.decoder.clip': score, 'fg_ari.decoder.clip.n': 200 if score is not None else 0, 'fg_ari.decoder.clip.nan': 0 if score is not None else 200,
                                           'mse_pixel.decoder.frame': 0.01*(1 + seed), 'mse_pixel.decoder.frame.n': 1600, 'mse_pixel.decoder.frame.nan': 0})
        (folder/'notebook.ipynb').write_text('{}')
    (folder/'history.jsonl').write_text(''.join(json.dumps(dict(step=s, loss=math.exp(-s/100)*(1 + 0.1*seed), lr=1e-3)) + '\n' for s in range(10, 1001, 10)))
    if pictures:
        (folder/'figures').mkdir(exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 255, (30, 28, 3), np.uint8).repeat(30, 0).repeat(30, 1)
        Image.fromarray(noise).save(folder/'figures/median.png')
    return folder

def made(root, folders, spec=SPEC, title='Fabricated', **more):
    "The page's HTML, its text without tags, and the Markdown."
    page = report_runs(folders, title, spec, root/'out', **more)
    text = page.read_text()
    return text, html.unescape(re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', text.split('</style>')[1]))), (root/'out/report.md').read_text()

def five(root, **more): return [fabricate(root, f'sa-{s}', seed=s, score=0.8 + 0.01*s, **more) for s in range(5)]

def test_the_interval_is_students(tmp_path):
    from scipy import stats
    values = [0.80, 0.81, 0.82, 0.83, 0.84]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    s = summarise(values)
    assert abs(s.mean - s.half - low) < 1e-12 and abs(s.mean + s.half - high) < 1e-12
    _, words, markdown = made(tmp_path, five(tmp_path))
    assert f'0.820 ± {(high - low)/2:.3f}' in words and f'| sa | 0.820 ± {(high - low)/2:.3f} | 0.800 – 0.840 | 5 of 5 |' in markdown
    assert 'All of 5 runs are done' in words and '5.0 h in all (10.0 GPU hours) on NVIDIA H200, at commit aaaaaaa' in words

def test_one_run_has_no_interval(tmp_path):
    _, words, markdown = made(tmp_path, [fabricate(tmp_path, 'alone', score=0.7)])
    assert 'n = 1' in words and '0.700 (n = 1)' in markdown and '±' not in markdown.split('### FG-ARI')[1].split('### MSE')[0]

def test_a_score_that_is_not_there_is_a_word_and_never_a_number(tmp_path):
    folders = [fabricate(tmp_path, 'masks', score=0.9), fabricate(tmp_path, 'none', seed=1, score=None), fabricate(tmp_path, 'nan', seed=2, score=None), fabricate(tmp_path, 'isa', 'isa', 3, None)]
    text = (folders[2]/'metrics.json').read_text()
    (folders[2]/'metrics.json').write_text(text.replace('null', 'NaN')) # as older runs wrote it
    _, words, markdown = made(tmp_path, folders, {**SPEC, 'metrics': {**SPEC['metrics'], 'fg_arii.decoder.clip': 'misspelt'}})
    assert '| sa | 0.900 (n = 1) | 0.900 – 0.900 | 1 of 3 (2 no ground truth) |' in markdown and '| isa | no ground truth |  | 0 of 1 (1 no ground truth) |' in markdown
    assert 'No finished run has a metric' in words and 'Not computed: sa, isa' in words and '0.000' not in words

def test_failed_missing_and_unfinished_runs_are_named_and_not_averaged(tmp_path):
    error = dict(name='RuntimeError', message='loss is nan <b>here</b> | there', cell=9, traceback='\n'.join(f'\x1b[31mline {i}\x1b[0m' for i in range(30)))
    folders = [*five(tmp_path), *(fabricate(tmp_path, f'broken-{s}', 'broken', s, status='failed', error=error) for s in (0, 1)), fabricate(tmp_path, 'cut', 'cut', status='stopped', stopped='SIGUSR1 at step 300'),
               fabricate(tmp_path, 'waits', 'waits', status='queued', submission='a job in Slurm'), tmp_path/'10_fabricated/never', fabricate(tmp_path, 'hollow', 'hollow')]
    (folders[-1]/'metrics.json').write_text('{"fg_ari')
    write_json(folders[7]/'progress.json', dict(step=300, steps=1000))
    (folders[5]/'log.txt').write_text('what it said')
    text, words, markdown = made(tmp_path, folders)
    for what in ('5 of 11 runs are done; 1 queued, 1 stopped, 3 failed, 1 missing.', '10_fabricated/broken-0', '10_fabricated/broken-1', '10_fabricated/never', 'SIGUSR1 at step 300', '10_fabricated/waits', 'stopped 30 %',
                 'Slurm job 77_1', 'in cell 9', 'line 29', 'Damaged', '2 failed runs'): assert what in words, what
    assert 'line 19 ' not in words and '\x1b' not in text and '<b>here' not in text and '&lt;b&gt;here' in text
    assert 'href="../10_fabricated/broken-0/log.txt"' in text and '| broken | not run |  | 0 of 2 |' in markdown
    assert all(w in markdown for w in ('### Failed: RuntimeError', '`10_fabricated/never`', 'SIGUSR1 at step 300'))
    assert 'loss is nan' not in ''.join(l for l in markdown.splitlines() if l.startswith('|'))

def test_a_dead_process_counts_as_failed(tmp_path):
    folder = fabricate(tmp_path, 'dead', status='running')
    (folder/'log.txt').write_text('\n'.join(f'epoch {i}' for i in range(40)))
    _, words, _ = made(tmp_path, [folder])
    assert 'Lost' in words and 'epoch 39' in words and 'epoch 29' not in words and '1 failed' in words

def test_a_task_that_never_reached_its_run_shows_its_own_log(tmp_path):
    home = tmp_path/'sweeps/s'
    plan = [dict(experiment='10_fabricated', run=n, parameters={}, labels=dict(seed=i), notebook='') for i, n in enumerate(('a', 'b'))]
    for stamp, said in (('20260101-000000', 'old words'), ('20260102-000000', 'module load: no such module')):
        (home/'submissions'/stamp/'log').mkdir(parents=True)
        (home/'submissions'/stamp/'plan.jsonl').write_text(''.join(json.dumps(p) + '\n' for p in plan))
        (home/'submissions'/stamp/'log/1.out').write_text(said)
    shutil.copy(home/'submissions/20260101-000000/plan.jsonl', home/'plan.jsonl')
    write_json(home/'sweep.json', dict(name='s', experiment='10_fabricated', title='From what was kept', report=dict(SPEC, rows=['seed'])))
    fabricate(tmp_path, 'a')
    folder = fabricate(tmp_path, 'b', seed=1, status='failed', error=dict(name='Task', message='ended with 1'))
    page = report('s', tmp_path)
    assert page == home/'report.html' and 'From what was kept' in page.read_text() and 'module load: no such module' in page.read_text() and 'old words' not in page.read_text()
    assert 'href="submissions/20260102-000000/log/1.out"' in page.read_text()
    shutil.rmtree(folder)
    assert 'submissions/20260102-000000/log/1.out' in report('s', tmp_path).read_text() # missing, but its task had something to say

def test_mixed_code_and_devices_are_marked(tmp_path):
    folders = five(tmp_path)
    folders += [fabricate(tmp_path, 'other', 'isa', commit='b'*40), fabricate(tmp_path, 'dirty', 'isa', 1, commit='b'*40, dirty=True, device='cpu', device_name='EPYC')]
    _, words, markdown = made(tmp_path, folders)
    assert 'isa : mixed code and devices' in words.replace('isa:', 'isa :') and '1 ran with changes that were not committed' in words and 'bbbbbbb + changes' in markdown and 'CPU EPYC' in markdown
    assert [r.remark for r in make_rows([read_entry(f) for f in folders], ['model'])] == ['', 'mixed code and devices']
    same = [fabricate(tmp_path, f's{i}', 'snap', i, code='c0ffee0123') for i in range(2)]
    assert [r.remark for r in make_rows([read_entry(f) for f in same], ['model'])] == ['']

def test_published_values(tmp_path):
    published = [dict(row=dict(model='sa'), metric='fg_ari.decoder.clip', value=0.9, source='a paper, table 1'), dict(row=dict(model='isa'), metric='fg_ari.decoder.clip', value=0.95, source='a paper, table 2')]
    text, words, markdown = made(tmp_path, five(tmp_path), {**SPEC, 'published': published})
    assert '| 0.9 | −0.080 | a paper, table 1 |' in markdown and '| isa | not run |' in markdown and '| 0.95 |  | a paper, table 2 |' in markdown
    assert 'a paper, table 1' in words and text.count('class="published"') == 2

@pytest.mark.parametrize('wrong, words', [
    (dict(SPEC, rowz=['model']), "unknown key of report 'rowz'.*rows"), (dict(SPEC, rows=['modell']), "'modell'.*'model'"),
    (dict(SPEC, published=[dict(row=dict(model='sa'), metric='fg_ari', value=1, source='')]), "metric of a published value 'fg_ari'"), (dict(SPEC, published=[dict(row={}, metric='mse', value=1)]), 'source'),
    (dict(SPEC, published=[dict(row=dict(seed=1), metric='fg_ari.decoder.clip', value=1, source='')]), "row of a published value 'seed'"),
    (dict(SPEC, published=[dict(row={}, metric='fg_ari.decoder.clip', value='0.9 ± 0.1', source='')]), "is a number, got '0.9 ± 0.1'")])
def test_wrong_wishes_are_named(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words): made(tmp_path, five(tmp_path), wrong)
    assert not (tmp_path/'out').exists()

def test_nobodys_text_becomes_markup(tmp_path):
    evil = '<script>alert(1)</script>'
    folder = fabricate(tmp_path, 'evil', evil, error=dict(name=evil, message=evil, traceback=evil), device_name=evil, seed=3)
    failed = fabricate(tmp_path, 'evil2', evil, status='failed', error=dict(name=evil, message=evil, traceback=evil))
    text, _, _ = made(tmp_path, [folder, failed], {**SPEC, 'metrics': {'fg_ari.decoder.clip': evil}, 'curves': {'loss': evil},
                      'published': [dict(row=dict(model=evil), metric='fg_ari.decoder.clip', value=1, source=evil)]}, title=evil, over=evil)
    assert '<script' not in text and text.count('&lt;script') > 10

def test_nothing_is_fetched(tmp_path):
    text, _, _ = made(tmp_path, five(tmp_path))
    assert "default-src 'none'" in text and '<script' not in text and '@import' not in text and not re.search(r'url\((?!#)', text)
    assert all(s.startswith('data:') for s in re.findall(r'src="([^"]*)', text)) and not [h for h in re.findall(r'href="([^"]*)', text) if re.match(r'[a-z]+:', h) and h != 'data:,']
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and {h[1:] for h in re.findall(r'href="(#[^"]+)"', text)} <= set(ids)

def test_histories_of_unequal_runs(tmp_path):
    a, b = (fabricate(tmp_path, n, seed=i) for i, n in enumerate('ab'))
    with open(a/'history.jsonl', 'a') as f: f.write('{"step": 1010, "loss": null}\n{"step": 1020, "lo')
    (b/'history.jsonl').write_text(''.join((b/'history.jsonl').read_text().splitlines(True)[:40]))
    x, y = align([read_curve(read_entry(f), 'loss') for f in (a, b)])
    assert x.tolist() == list(range(10, 401, 10)) and np.allclose(y[1], 1.1*y[0])
    assert made(tmp_path, [a, b])[0].count('loss ends at') == 0 and 'sa ends at' in made(tmp_path, [a, b])[0]

def test_pictures_that_are_missing_or_broken(tmp_path):
    folders = five(tmp_path)
    (folders[1]/'figures/median.png').unlink()
    (folders[2]/'figures/median.png').write_bytes(b'no picture')
    text, words, _ = made(tmp_path, folders)
    assert text.count('src="data:image/') == 3 and 'sa-1 has none' in words and 'sa-2 cannot be read' in words

@pytest.mark.parametrize('x, digits, text', [(0.0, 3, '0.000'), (-1e-9, 3, '0.000'), (-0.5, 2, '−0.50'), (1234567, 0, '1\u202f234\u202f567'), (2.13e-7, -1, '2.13e−07'), (math.nan, 2, ''), (None, 2, '')])
def test_numbers(x, digits, text): assert number(x, digits) == text

def test_decimals_follow_the_interval():
    of = lambda *v: decimals([summarise(v)])
    assert (of(0.80, 0.81, 0.82), of(0.1, 0.5, 0.9), of(25.1, 25.9, 24.2), of(0.00532, 0.00561), of(304256, 304256), of()) == (3, 3, 1, 5, 0, 0)

def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    old, *_ = made(tmp_path, five(tmp_path))
    with pytest.raises(ValueError): made(tmp_path, five(tmp_path), dict(SPEC, rows=['nothing']))
    assert (tmp_path/'out/report.html').read_text() == old
    with pytest.raises(ValueError, match='no runs'): report_runs([], 'empty', out=tmp_path)

def ninety_six(root): return [fabricate(root, f'{m}-{k}-{s}', f'{m}{k}', s, 0.5 + 0.02*s) for m in 'abcd' for k in range(3) for s in range(8)]

@slow
def test_ninety_six_runs_weigh_less_than_8_MB(tmp_path):
    folders = ninety_six(tmp_path)
    for f in folders: # worst case: noise does not compress
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)).save(f/'figures/median.png')
        shutil.copy(f/'figures/median.png', f/'figures/worst.png')
    text, words, _ = made(tmp_path, folders, {**SPEC, 'pictures': ['median.png', 'worst.png']})
    assert len(text) < 8e6 and text.count('src="data:image/jpeg') == 192 and 'All of 96 runs are done' in words

def test_a_small_picture_stays_as_it_is(tmp_path):
    folder = fabricate(tmp_path, 'a')
    path = folder/'figures/median.png'
    assert thumbnail(path, 10**6)['src'].startswith('data:image/png') and thumbnail(path, 2_000)['width'] < 840

CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if (p := shutil.which(n))), None)
PROBE = '''<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><iframe style="width:{width}px;height:2000px;border:0" srcdoc="{page}"></iframe><p id="found">not loaded</p><script>
document.querySelector('iframe').onload = e => {{ const d = e.target.contentDocument, boxes = [...d.querySelectorAll('.scroll')];
  document.getElementById('found').textContent = JSON.stringify({{page: d.documentElement.scrollWidth, scrolling: boxes.filter(b => b.scrollWidth > b.clientWidth).length, boxes: boxes.length,
    wide: [...d.querySelectorAll('h1,h2,h3,p,svg,img,figure,li,dl,nav,.scroll')].filter(x => !x.closest('table') && x.getBoundingClientRect().right > {width} + 0.5).length,
    images: [...d.images].filter(i => i.complete && i.naturalWidth).length, ink: getComputedStyle(d.body).color}}) }}
</script>'''

def seen(tmp_path, text, width, *flags): # what Chromium says of the page
    wrapper = tmp_path/'wrapper.html'
    wrapper.write_text(PROBE.format(width=width, page=html.escape(text)), encoding='utf-8')
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--hide-scrollbars',
               f'--user-data-dir={tmp_path/"profile"}', '--window-size=1400,2200', '--virtual-time-budget=10000', *flags, '--dump-dom', wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    return json.loads(html.unescape(re.search(r'<p id="found">(.*?)</p>', done.stdout, re.S)[1]))

@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
def test_in_a_browser(tmp_path):
    error = dict(name='RuntimeError', message='a ' + 'very'*40 + ' long word', traceback='x'*400)
    folders = [*five(tmp_path), fabricate(tmp_path, 'one-with-quite-a-long-name-for-a-run', 'another_model_with_a_long_name', status='failed', error=error), fabricate(tmp_path, 'b', 'b', device_name='NVIDIA A100-SXM4-40GB', device='cuda')]
    published = [dict(row=dict(model='sa'), metric='fg_ari.decoder.clip', value=0.9, source='a paper with a long title, table 1, second column, third row')]
    text, *_ = made(tmp_path, folders, {**SPEC, 'published': published}, title='Slots_and_their_invariances_in_a_word_without_any_space')
    phone = seen(tmp_path, text, 390)
    assert phone['page'] == 390 and phone['wide'] == 0 and phone['images'] == 7, phone # pictures of failed runs are shown, too
    assert phone['scrolling'] == phone['boxes'] >= 3, phone # tables are wider than a phone, and scroll in their own boxes
    desk = seen(tmp_path, text, 1280)
    assert desk['page'] == 1280 and desk['wide'] == 0, desk
    broken = seen(tmp_path, text.replace('<nav', '<div style="width: 600px">wide</div><nav', 1), 390)
    assert broken['page'] > 390 # the probe can see it
    dark = seen(tmp_path, text, 390, '--blink-settings=preferredColorScheme=0')
    assert dark['ink'] != phone['ink'] and dark['page'] == 390
