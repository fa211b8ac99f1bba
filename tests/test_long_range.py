"Experiments 75 and 76, and what they rest on: recipes, equal time, timing, continuing clips. Every mistake has a named error before anything is trained."
import json, subprocess, sys
from pathlib import Path

import nbformat
import pytest
import torch

from slotnb.batch.sweep import plan, read_sweep
from slotnb.core import write_json
from slotnb.data.clips import Loader, Windows
from slotnb.evaluation.long_range import PUBLISHED, continue_clips, known, published_table, ranges
from slotnb.models.convs5 import ConvS5
from slotnb.training.frames import FRAME_MODELS, FRAMES_RECIPES, count, equal_time, frame_clips, frames_recipe, make_predictor, predictor_config, step_seconds
from slotnb.training.timing import clock_kind, interleaved, peak_bytes, ratios

pytest.importorskip('sklearn')
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, SPEED = (ROOT/f'nbs/experiments/{n}.ipynb' for n in ('75_long_range', '76_long_range_speed'))
SMOKE = FRAMES_RECIPES['smoke']

@pytest.fixture(scope='module')
def clips(): return frame_clips(SMOKE.but(eval_clips=5), source='sklearn')

@pytest.fixture(scope='module')
def models(): return {name: make_predictor(name, predictor_config(name, SMOKE)).eval() for name in FRAME_MODELS}

# ---------------------------------------------------------------- timing

def test_forms_take_turns():
    "The same number of times each, and never one twice before the other."
    seen = []
    taken = interleaved({'a': lambda: seen.append('a'), 'b': lambda: seen.append('b')}, 3, warm=2)
    assert seen == list('aabb') + list('ababab') and all(len(t) == 3 for of in taken.values() for t in of.values())
    with pytest.raises(ValueError, match='repeats must be at least 1 .* got 0'): interleaved({'a': seen.clear}, 0)

def test_ratios_are_taken_within_a_repetition():
    "A minute that slows everything down tenfold does not show."
    taken = {'a': dict(cpu=[2., 20.]), 'b': dict(cpu=[1., 10.])}
    assert ratios(taken, 'a', 'b') == [2., 2.]

def test_which_clock():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert clock_kind('cpu') == 'cpu'
        torch.set_num_threads(2)
        assert clock_kind('cpu') == 'wall', 'processor time of two threads adds up'
    finally: torch.set_num_threads(before)

def test_peak_is_what_is_held_at_once():
    def one_after_another():
        for _ in range(3): torch.ones(2**18)
    def together(): return [torch.ones(2**18) for _ in range(3)]
    assert 2**20 <= peak_bytes(one_after_another) < 1.1*2**20 and 3*2**20 <= peak_bytes(together) < 3.1*2**20

def test_chunks_bound_the_memory_of_a_step(clips):
    "Twice the frames: about twice the memory of a step in one piece, and much less than that in pieces."
    from slotnb.training.frames import training_step
    def peak(chunk, frames):
        model = make_predictor('convs5', predictor_config('convs5', SMOKE.but(chunk=chunk)))
        return peak_bytes(training_step(model, SMOKE.loss, torch.rand(1, frames, 1, 32, 32), SMOKE.fit))
    whole, pieces = peak(0, 33)/peak(0, 17), peak(4, 33)/peak(4, 17)
    assert whole > 1.7 and pieces < 1.4, (whole, pieces)

# ---------------------------------------------------------------- recipes

@pytest.mark.parametrize('change,words', [
    (dict(preset='studdy'), "Did you mean 'study'"), (dict(observed=24), 'observed must be less than total'), (dict(frames=1), 'frames must be at least 2'), (dict(digits=-1), 'digits must be at least 1'),
    (dict(speed=2.), 'speed must be from 0 to 1'), (dict(steps=-3), 'steps must be an integer of at least 1'), (dict(observed=-1), 'observed must be at least 1'),
])
def test_recipes_are_checked(change, words):
    with pytest.raises(ValueError, match=words): frames_recipe(**{'preset': 'smoke', **change})

def test_what_was_not_given_follows():
    r = frames_recipe('smoke', frames=16)
    assert (r.clips.frames, r.total, r.observed) == (16, 48, 4), 'still three times the training length'
    assert frames_recipe('smoke', frames=16, total=20).total == 20
    with pytest.raises(ValueError, match='lrs must be 3 learning rates'): SMOKE.but(lrs=(1e-3,))
    assert [FRAMES_RECIPES['moving_mnist_600'].fit_of(n).lr for n in FRAME_MODELS] == [5e-4, 5e-4, 1e-4]

def test_presets_have_equal_sizes_and_reach_three_times_the_training_length():
    for preset in ('study', 'laptop'):
        r = FRAMES_RECIPES[preset]
        sizes = [count(make_predictor(n, predictor_config(n, r))) for n in FRAME_MODELS]
        assert max(sizes) < 1.04*min(sizes), sizes
        assert 'x3' in ranges(r.observed, r.clips.frames, r.total)

def test_weights_are_the_seeds():
    state = torch.get_rng_state()
    a, b, c = (make_predictor('convlstm', predictor_config('convlstm', SMOKE), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and any(not torch.equal(v, c[k]) for k, v in a.items())
    assert torch.equal(torch.get_rng_state(), state), 'and leave the global generator as it was'

def test_no_digit_is_on_both_sides(clips):
    train, held_out = clips
    assert not {d.tobytes() for d in train.pool} & {d.tobytes() for d in held_out.pool}
    assert (train.config.frames, held_out.config.frames) == (SMOKE.clips.frames, SMOKE.total)
    with pytest.raises(FileNotFoundError, match='is not a folder'): frame_clips(SMOKE, root='no/such/folder')

def test_equal_time():
    "Steps in inverse proportion to seconds, by the median of the ratios; ConvS5 keeps its own."
    seconds = dict(convs5=[1., 10., 1.], convlstm=[4., 40., 100.], frame_transformer=[.5, 5., .5])
    assert equal_time(seconds, 200) == dict(convs5=200, convlstm=50, frame_transformer=400)
    assert equal_time(dict(convs5=[1.], convlstm=[1e6]), 10)['convlstm'] == 1
    with pytest.raises(ValueError, match="unknown reference 'convs5'"): equal_time(dict(convlstm=[1.]), 10)

def test_timing_leaves_weights_alone(clips):
    models = {n: make_predictor(n, predictor_config(n, SMOKE)) for n in FRAME_MODELS}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in models.items()}
    step_seconds(models, SMOKE, Loader(Windows(clips[0], 8), 4).batch(0)['video'], repeats=1)
    assert all(torch.equal(v, before[n][k]) for n, m in models.items() for k, v in m.state_dict().items()) and all(p.grad is None for m in models.values() for p in m.parameters())

# ---------------------------------------------------------------- continuing

def test_ranges_cut_the_horizon_without_gaps():
    for observed in (1, 3, 8, 9, 20):
        for length in (1, 2, 8, 30):
            for total in (observed + 1, observed + 7, 40):
                parts = list(ranges(observed, length, total).items())
                assert [i for _, s in parts for i in range(s.start, s.stop)] == list(range(total - observed))
                assert all((observed + i)//length + 1 == int(k[1:]) for k, s in parts for i in range(s.start, s.stop))
    with pytest.raises(ValueError, match='observed must be from 1 to total - 1'): ranges(5, 3, 5)

def test_batches_change_nothing(clips, models):
    "All at once, one by one, and a few of them alone; and what stands beside them is what it says."
    held_out = clips[1]
    all_, each, few = (continue_clips(models, held_out, 4, 8, batch=b, index=i, lpips=False) for b, i in ((5, None), (1, None), (2, [3, 1])))
    for who in all_.scores:
        for k, v in all_.scores[who].items():
            assert torch.allclose(v, each.scores[who][k], rtol=1e-4, atol=1e-5), (who, k)
            assert torch.allclose(v[[3, 1]], few.scores[who][k], rtol=1e-4, atol=1e-5), (who, k)
    assert (all_.scores['truth']['mse_pixel'] == 0).all() and (all_.scores['black']['digit_lost'] == 1).all() and set(all_.scores) == {*models, 'truth', 'black', 'copy_last'}
    m = all_.metrics()
    assert m['digit_px.black.x3.n'] == 5*8 and m['digit_px.black.frame.n'] == 5*20 and m['mse_pixel.copy_last.next.n'] == 5*7
    assert abs(sum(all_.curves()['mse_pixel.convs5.step'])/20 - m['mse_pixel.convs5.frame']) < 1e-9
    with pytest.raises(ValueError, match='keep=True'): all_.rows(0)

def test_a_continuation_sees_nothing_of_the_future(clips, models):
    "Clips that share their beginning and nothing else are continued alike."
    import copy
    held_out, other = clips[1], copy.copy(clips[1])
    gather = held_out.gather
    def cut(index, start, length, step=1):
        out = gather(index, start, length, step)
        return {**out, 'video': torch.cat([out['video'][:, :4], 255 - out['video'][:, 4:]], 1)}
    other.gather = cut
    a, b = (continue_clips(models, d, 4, 8, index=[0, 1], lpips=False, keep=True).predicted for d in (held_out, other))
    assert all(torch.equal(a[n], b[n]) for n in models)

def test_published_numbers_say_how_they_are_known():
    assert len(PUBLISHED) == 23 and sum(known(row, m) == 'confirmed' for row in PUBLISHED for m in ('fvd', 'psnr', 'ssim', 'lpips')) == 10
    assert {known((300, 1200, who), 'fvd') for who in ('ConvLSTM', 'ConvS5')} == {'doubtful', 'confirmed'}, 'both are said to be 187, one of them is confirmed'
    pytest.importorskip('pandas')
    table = published_table(300)
    assert table.loc['ConvS5', '100 -> 800: FVD'] == '72 (doubtful)' and table.loc['ConvS5', '100 -> 800: SSIM'] == 'unknown' and table.loc['ConvT3', '100 -> 800: FVD'] == 'unknown'
    with pytest.raises(ValueError, match="unknown frames in training 400"): published_table(400)

# ---------------------------------------------------------------- the notebooks

def cells(notebook, upto, **parameters): # the namespace
    "A notebook's code cells in this process, to the first one that holds `upto`."
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in (c for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code'):
        exec(compile(cell.source.replace('import Image, display', 'import Image').replace('from IPython.display import display', ''), f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []): space.update(parameters, In=['', '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in parameters.items())])
        if upto in cell.source: return space
    raise AssertionError(f'no cell holds {upto!r}')

@pytest.mark.parametrize('notebook,parameters,error,words', [
    (NOTEBOOK, dict(model='convs6'), ValueError, "unknown model 'convs6'.*Did you mean 'convs5'"),
    (NOTEBOOK, dict(preset='laptpo'), ValueError, "Did you mean 'laptop'"),
    (NOTEBOOK, dict(equal='times'), ValueError, "unknown equal 'times'.*Did you mean 'time'"),
    (NOTEBOOK, dict(observed=99), ValueError, 'observed must be less than total'),
    (NOTEBOOK, dict(speed=-0.5), ValueError, 'speed must be from 0 to 1'),
    (NOTEBOOK, dict(change='forget_bias=1.0'), ValueError, "is for a single model, got model 'all'"),
    (NOTEBOOK, dict(model='convs5', change='forget_bias=1.0'), ValueError, "unknown field to change 'forget_bias'"),
    (SPEED, dict(preset='fast'), ValueError, "unknown preset 'fast'"),
    (SPEED, dict(threads=0), ValueError, 'threads must be at least 1'),
    (SPEED, dict(amp='fp16'), ValueError, "unknown amp 'fp16'"),
])
def test_refused_before_anything_is_made(notebook, parameters, error, words, tmp_path):
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    with pytest.raises(error, match=words): cells(notebook, 'start_run(', runs_dir=str(tmp_path/'runs'), device='cpu', **parameters)
    assert not (tmp_path/'runs').exists()

def test_digits_that_are_not_there(tmp_path):
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='MNIST is not at .*empty. To get it'): cells(NOTEBOOK, 'frame_clips(plan', runs_dir=str(tmp_path/'runs'), device='cpu', data=str(tmp_path/'empty'), source='mnist')

def test_a_change_reaches_the_model(tmp_path):
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    space = cells(NOTEBOOK, 'start_run(', runs_dir=str(tmp_path/'runs'), device='cpu', model='convlstm', change='forget_bias=1.0, fit.lr=0.001')
    assert space['configs']['convlstm'].forget_bias == 1. and space['fits']['convlstm'].lr == 0.001 and space['who'] == {'convlstm': 'rollout'}

def test_a_run_keeps_the_steps_it_was_dealt(tmp_path):
    for package in ('IPython', 'matplotlib', 'pandas'): pytest.importorskip(package)
    home = tmp_path/'runs'/'75_long_range'/'r'
    home.mkdir(parents=True)
    write_json(home/'steps.json', dict(steps=dict(convs5=8, convlstm=3), seconds={}))
    space = cells(NOTEBOOK, "(this.folder/'steps.json').read_text()", runs_dir=str(tmp_path/'runs'), run='r', device='cpu', model='convlstm', equal='time', source='sklearn')
    assert space['fits']['convlstm'].steps == 3

def test_the_sweep_is_a_plan(tmp_path):
    runs = plan(read_sweep('long_range'), tmp_path, 'cpu')
    assert len(runs) == 9 and {r.parameters['model'] for r in runs} == set(FRAME_MODELS) and {r.parameters['seed'] for r in runs} == {0, 1, 2}

def smoke(notebook, folder, **parameters): # metrics, run.json, folder of the run
    pytest.importorskip('papermill')
    given = dict(runs_dir=str(folder), device='cpu', preset='smoke') | parameters
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(notebook), str(folder/'out.ipynb')]
    done = subprocess.run(command + [x for k, v in given.items() for x in ('-p', k, str(v))], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    home = folder/notebook.stem/parameters['run']
    return json.loads((home/'metrics.json').read_text()), json.loads((home/'run.json').read_text()), home

@pytest.mark.slow
def test_a_smoke_run_of_all_and_of_one(tmp_path):
    every, info, home = smoke(NOTEBOOK, tmp_path, run='a', source='sklearn')
    for key in ('digit_px.convs5.x3', 'digit_px.convlstm.x1', 'digit_lost.frame_transformer.frame', 'mse_pixel.black.x2', 'psnr_capped.copy_last.frame', 'psnr_pooled.mean.all', 'ssim.truth.frame', 'mse_pixel.convs5.next', 'seconds.step.convlstm'):
        assert isinstance(every[key], (int, float)), key
    assert every['claim.convs5_smallest.x3'] in (0, 1) and info['data_settings']['source'] == 'sklearn'
    for name in ('curves.png', 'horizon.png', 'best.png', 'median.png', 'worst.png', 'paths_median.png', 'continued.gif'): assert (home/'figures'/name).is_file(), name
    assert len(json.loads((home/'curves.json').read_text())['digit_px.convs5.step']) == SMOKE.total - SMOKE.observed
    assert isinstance(ConvS5.from_pretrained(home/'convs5'/'model'), ConvS5)
    one, _, _ = smoke(NOTEBOOK, tmp_path, run='b', source='sklearn', model='convlstm')
    assert one['digit_px.rollout.x3'] == every['digit_px.convlstm.x3'] and 'claim.convs5_smallest.x3' not in one, 'alone or beside others: the same seed, the same numbers'
    timed, _, home = smoke(NOTEBOOK, tmp_path, run='c', source='sklearn', model='frame_transformer', equal='time')
    assert timed['steps.rollout'] == json.loads((home/'steps.json').read_text())['steps']['frame_transformer']

@pytest.mark.slow
def test_a_smoke_run_of_the_speed(tmp_path):
    m, _, home = smoke(SPEED, tmp_path, run='a')
    assert m['speedup.continue.convs5.16'] == 1 and m['work.whole.convlstm_wide'] > 1 and m['peak_mb.chunks.convs5.6'] < m['peak_mb.whole.convs5.6']
    for key in ('speedup.whole.convlstm.6', 'speedup.memory.convlstm_wide.6.min', 'fps.transformer_recomputing.16', 'fps.transformer_cache.8', 'cost.chunks.frame_transformer.6'): assert m[key] > 0, key
    for name in ('training.png', 'continuing.png', 'memory.png'): assert (home/'figures'/name).is_file(), name
