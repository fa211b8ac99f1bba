"Run-length tokens against loops, against their promises, and against what would be wrong."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from slotnb.core import real_data_dir
from slotnb.data.clips import to_float
from slotnb.layers.run_length import (Runs, ages, expand, grey_levels, keep_mask, next_keep, pack, padded, patches, pixel_statistics,
                                      random_mask, run_lengths, unpadded)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

def clips(b=2, t=8, h=16, w=24, c=3, seed=0):
    "Parts that stand still, parts that change a little, parts that change much; no score near a usual threshold."
    g = torch.Generator().manual_seed(seed)
    amount = F.interpolate(torch.rand(b*t, 1, h//8, w//8, generator=g), size=(h, w)).view(b, t, 1, h, w)
    return (0.4 + 0.3*torch.randn(b, 1, c, h, w, generator=g) + (amount > 0.4)*amount*torch.randn(b, t, c, h, w, generator=g)*0.3).clamp(0, 1)

def cut(video, s, p): return rearrange(video, 'b (t s) c (h p) (w q) -> b t h w c s p q', s=s, p=p, q=p)
def glue(grid): return rearrange(grid, 'b t h w c s p q -> b (t s) c (h p) (w q)')

def by_loops(video, tau, s, p, reference, compare): # float64, no tensors
    v = video.double().numpy()
    b, t, c, h, w = v.shape
    mean, std = (MEAN, STD) if c == 3 else (np.array([0.449]), np.array([0.226]))
    keep, scores = np.ones((b, t//s, h//p, w//p), bool), []
    for n in range(b):
        for i in range(h//p):
            for j in range(w//p):
                held = 0
                for k in range(1, t//s):
                    at = lambda frame: (v[n, frame, :, i*p:(i + 1)*p, j*p:(j + 1)*p] - mean[:, None, None])/std[:, None, None]
                    pairs = [(held*s, k*s + s - 1)] if compare == 'ends' else [(held*s + f, k*s + f) for f in range(s)]
                    score = max(np.abs(at(y) - at(x)).mean() for x, y in pairs)
                    scores.append(score)
                    keep[n, k, i, j] = score > tau
                    if reference == 'previous' or keep[n, k, i, j]: held = k
    return keep, np.array(scores)

@pytest.mark.parametrize('reference', ['previous', 'anchor'])
@pytest.mark.parametrize('compare', ['ends', 'all'])
@pytest.mark.parametrize('s,p,tau,c', [(1, 8, 0.1, 3), (2, 8, 0.37, 3), (4, 4, 0.7, 3), (2, 2, 0.6, 1), (1, 1, 0.5, 1)])
def test_keep_mask_equals_a_loop(reference, compare, s, p, tau, c):
    video = clips(h=8, w=16, c=c) if p < 8 else clips(c=c)
    expected, scores = by_loops(video, tau, s, p, reference, compare)
    assert np.abs(scores - tau).min() > 1e-6, 'the test needs scores away from the threshold'
    assert 0.1 < expected[:, 1:].mean() < 0.95
    assert np.array_equal(keep_mask(video, tau, s, p, reference, compare).numpy(), expected)

def published(x, tau, s, p): # of normalised video (B, C, T, H, W)
    scores = F.avg_pool3d((x[:, :, 2*s - 1::s] - x[:, :, :-s:s]).abs(), (1, p, p)).mean(1)
    return torch.cat([torch.full_like(scores[:, :1], 255), scores], 1) > tau

def normalised(video):
    mean, std = pixel_statistics(video, 3)
    return ((video - mean)/std).transpose(1, 2)

def test_decisions_are_the_published_ones_bit_for_bit():
    "Even where the threshold is a score itself: one rounding elsewhere would tip it."
    video = clips(b=3, t=8, h=64, w=64, seed=1)
    x = normalised(video)
    scores = F.avg_pool3d((x[:, :, 3::2] - x[:, :, :-2:2]).abs(), (1, 16, 16)).mean(1)
    for tau in [0.1, *scores.flatten()[::5].tolist()]: assert torch.equal(keep_mask(video, tau), published(x, tau, 2, 16))
    frames = video.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(video.shape) # as training with channels_last has them
    for tau in scores.flatten()[::5].tolist(): assert torch.equal(keep_mask(frames, tau), published(x, tau, 2, 16))

def test_real_video_decides_as_published():
    folder = real_data_dir()/'video'
    found = sorted(folder.glob('*.mp4')) + sorted(folder.glob('*.avi')) if folder.is_dir() else []
    if not found: pytest.skip(f'no clips in {folder}')
    av = pytest.importorskip('av')
    with av.open(str(found[0])) as f: frames = [x.to_ndarray(format='rgb24') for x, _ in zip(f.decode(video=0), range(16))]
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None]
    video = to_float(video[:, :len(frames)//2*2, :, :video.shape[3]//16*16, :video.shape[4]//16*16])
    for tau in (0., 0.05, 0.1): assert torch.equal(keep_mask(video, tau), published(normalised(video), tau, 2, 16))

def test_bytes_and_normalised_floats_decide_alike():
    bytes_ = (clips(seed=2)*255).round().byte()
    assert torch.equal(keep_mask(to_float(bytes_), 0.3, 2, 8), published(((bytes_.float()/255 - torch.tensor(MEAN).float().view(3, 1, 1))/torch.tensor(STD).float().view(3, 1, 1)).transpose(1, 2), 0.3, 2, 8))

@pytest.mark.parametrize('tau', [0., 0.1, 1e9, math.inf])
def test_first_tubelet_is_kept(tau):
    mask = keep_mask(clips(), tau, 2, 8)
    assert mask[:, 0].all() and (tau < 1 or not mask[:, 1:].any())

def test_higher_thresholds_keep_subsets():
    masks = [keep_mask(clips(seed=3), tau, 2, 8) for tau in (0., 0.05, 0.2, 0.5, 1., 2.)]
    assert all((low | ~high).all() for low, high in zip(masks, masks[1:])) and len({int(m.sum()) for m in masks}) > 3

def test_a_score_equal_to_the_threshold_is_dropped():
    still, noise = torch.rand(1, 1, 3, 16, 16).expand(1, 8, 3, 16, 16), torch.rand(1, 8, 3, 16, 16)
    assert keep_mask(still, 0., 2, 8).sum() == 4 and keep_mask(noise, 0., 2, 8).all()
    x = normalised(noise)
    tau = F.avg_pool3d((x[:, :, 3::2] - x[:, :, :-2:2]).abs(), (1, 8, 8)).mean(1)[0, 1, 1, 0].item()
    assert not keep_mask(noise, tau, 2, 8)[0, 2, 1, 0] and keep_mask(noise, np.nextafter(np.float32(tau), np.float32(0)).item(), 2, 8)[0, 2, 1, 0]

def test_lengths_equal_a_loop():
    for seed in range(5):
        mask = torch.rand(2, 7, 3, 4, generator=torch.Generator().manual_seed(seed)) < 0.4
        mask[:, 0] = True
        lengths, expected = run_lengths(mask), torch.zeros(mask.shape, dtype=torch.long)
        for b, k, i, j in mask.nonzero().tolist():
            later = [m for m in range(k + 1, 7) if mask[b, m, i, j]]
            expected[b, k, i, j] = (later[0] if later else 7) - k
        assert torch.equal(lengths, expected) and (lengths.sum(1) == 7).all() and lengths[mask].min() >= 1
        assert torch.equal(Runs.of(mask).length, lengths[mask]) # in the order of the tokens

def test_lengths_are_in_the_order_of_tokens():
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0]], dtype=torch.bool).view(1, 4, 1, 2)
    assert Runs.of(mask).length.tolist() == [2, 4, 2]
    column_by_column = run_lengths(mask).permute(0, 2, 3, 1)[mask.permute(0, 2, 3, 1)]
    assert column_by_column.tolist() == [2, 2, 4] # the released order, which is wrong

@pytest.mark.parametrize('s', [1, 2, 4])
@pytest.mark.parametrize('reference', ['previous', 'anchor'])
def test_threshold_zero_is_lossless_when_all_frames_are_compared(s, reference):
    video = (clips(seed=4)*20).round()/20
    video[:, 2:6, :, :8, :8] = video[:, 2:3, :, :8, :8]
    video[:, 5, 0, 12, 12] = video[:, 4, 0, 12, 12] + 1e-9 # below what normalised pixels can tell
    mask = keep_mask(video, 0., s, 8, reference, 'all')
    assert (s == 4 or mask.sum() < mask.numel()) and torch.equal(glue(expand(*pack(cut(video, s, 8), mask))), video)

def test_ends_miss_a_flash_that_all_see():
    flash = torch.tensor([0., 1, 1, 0]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 8, 8)
    assert keep_mask(flash, 0., 2, 8)[0, :, 0, 0].tolist() == [True, False]
    assert keep_mask(flash, 0., 2, 8, compare='all')[0, :, 0, 0].tolist() == [True, True]

def dropped_errors(video, mask, s, p): # per token: the largest mean error over its frames, in the unit of the threshold
    grid = cut(video, s, p)
    _, std = pixel_statistics(video, 3)
    return ((expand(*pack(grid, mask)) - grid)/std.view(3, 1, 1, 1)).abs().mean((-1, -2)).mean(4).amax(-1)

def test_anchor_bounds_the_error_and_previous_does_not():
    ramp = 0.3 + 0.009*float(STD.mean())*10*torch.arange(16.).view(1, 16, 1, 1, 1).expand(1, 16, 3, 8, 8)
    previous, anchor = (keep_mask(ramp, 0.1, 1, 8, r) for r in ('previous', 'anchor'))
    assert previous.sum() == 1 and dropped_errors(ramp, previous, 1, 8).max() > 1
    assert dropped_errors(ramp, anchor, 1, 8).max() <= 0.1 + 1e-6
    for s, compare in ((1, 'ends'), (2, 'all'), (4, 'all')):
        for seed in range(3):
            video = clips(seed=seed)
            for tau in (0.2, 0.6, 1.):
                mask = keep_mask(video, tau, s, 8, 'anchor', compare)
                assert dropped_errors(video, mask, s, 8).max() <= tau + 1e-6
            assert not mask.all()

def test_affine_changes_of_the_pixels():
    video = 0.2 + 0.3*clips(seed=5).double()
    for tau in (0.2, 0.3):
        mask = keep_mask(video, tau, 2, 8)
        assert torch.equal(keep_mask(video + 0.3, tau, 2, 8), mask) and torch.equal(keep_mask(video*1.5, tau*1.5, 2, 8), mask)
        assert not torch.equal(keep_mask(video*1.5, tau, 2, 8), mask)

def test_shifts_by_a_patch_shift_the_mask():
    video = clips(seed=6)
    for axis, dim in ((-1, 3), (-2, 2)):
        assert torch.equal(keep_mask(video.roll(8, axis), 0.4, 2, 8), keep_mask(video, 0.4, 2, 8).roll(1, dim))

def test_clips_of_a_batch_are_independent():
    video = clips(b=4, seed=7)
    mask = keep_mask(video, 0.4, 2, 8)
    grid = cut(video, 2, 8)
    tokens, runs = pack(grid, mask)
    pieces = tokens.split(runs.counts)
    for b in range(4):
        assert torch.equal(keep_mask(video[b:b + 1], 0.4, 2, 8), mask[b:b + 1])
        alone, its = pack(grid[b:b + 1], mask[b:b + 1])
        assert torch.equal(alone, pieces[b]) and torch.equal(its.length, runs.length[runs.clip == b])

def test_counts_and_offsets_at_the_extremes():
    mask = torch.zeros(3, 6, 2, 4, dtype=torch.bool)
    mask[:, 0] = True
    mask[1] = True
    runs = Runs.of(mask)
    assert runs.counts == (8, 48, 8) and runs.offsets.tolist() == [0, 8, 56, 64] and runs.offsets.dtype == torch.int32
    assert torch.equal(runs.index, mask.flatten().nonzero()[:, 0]) and torch.equal(runs.mask, mask)
    b, t, i, j = mask.nonzero().T
    assert torch.equal(runs.clip, b) and torch.equal(runs.time, t) and torch.equal(runs.place, t*8 + i*4 + j)
    tokens = torch.randn(64, 3)
    assert torch.equal(unpadded(padded(tokens, runs), runs), tokens) and padded(tokens, runs).shape == (3, 48, 3)

def test_pack_and_expand_are_inverse_on_exact_runs():
    values = torch.randn(2, 6, 3, 4, 5)
    mask = torch.rand(2, 6, 3, 4) < 0.4
    mask[:, 0] = True
    for k in range(1, 6): values[:, k] = torch.where(mask[:, k, ..., None], values[:, k], values[:, k - 1])
    tokens, runs = pack(values, mask)
    assert torch.equal(expand(tokens, runs), values) and torch.equal(pack(expand(tokens, runs), runs)[0], tokens)
    values[0, 3][~mask[0, 3]] += 1 # not exact any more
    if (~mask[0, 3]).any(): assert not torch.equal(expand(*pack(values, mask)), values)

def test_expanded_attention_sums_to_one():
    "Per-slot maps of kept tokens, filled forward, are the dense maps where runs are exact."
    video = clips(seed=8).mul(4).round()/4
    video[:, 2:6] = video[:, 2:4].repeat(1, 2, 1, 1, 1)
    mask, grid = keep_mask(video, 0., 2, 8, compare='all'), cut(video, 2, 8).flatten(4)
    weight = torch.randn(5, grid.shape[-1])
    dense = (grid @ weight.T).softmax(-1)
    tokens, runs = pack(grid, mask)
    maps = expand((tokens @ weight.T).softmax(-1), runs)
    assert not mask.all() and torch.allclose(maps.sum(-1), torch.ones(mask.shape)) and torch.allclose(maps, dense, atol=1e-6)

# ages

def compete(q, k, v, weight, late=True): # slots (T, K, D), tokens (M, D), weights (T, M): the slot softmax, then the weights
    logits = torch.einsum('tkd,md->tkm', q, k)/k.shape[-1]**0.5
    a = logits.softmax(1)*weight[:, None] if late else (logits + weight[:, None].log()).softmax(1)*(weight[:, None] > 0)
    return torch.einsum('tkm,md->tkd', a/a.sum(-1, keepdim=True), v)

@pytest.fixture
def competition():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 6, 3, 3, generator=g) < 0.35
    mask[:, 0] = True
    values = torch.randn(1, 6, 3, 3, 8, generator=g, dtype=torch.float64)
    for t in range(1, 6): values[:, t] = torch.where(mask[:, t, ..., None], values[:, t], values[:, t - 1])
    q, v = torch.randn(6, 4, 8, generator=g, dtype=torch.float64), torch.randn(8, 8, generator=g, dtype=torch.float64)
    seen = torch.tril(torch.ones(6, 6, dtype=torch.float64)).repeat_interleave(9, 1) # every query sees the frames up to its own
    tokens, runs = pack(values, mask)
    dense = compete(q, values.flatten(0, 3), values.flatten(0, 3) @ v, seen)
    assert len(tokens) < 40
    return q, tokens, tokens @ v, runs, dense

def test_ages_make_competition_exact(competition):
    q, k, v, runs, dense = competition
    assert (compete(q, k, v, ages(runs).double()) - dense).abs().max() < 1e-12

def test_wrong_weights_are_wrong(competition):
    q, k, v, runs, dense = competition
    age = ages(runs).double()
    ones, final = (age > 0).double(), (age > 0)*runs.length.double()
    for weight in (ones, final): assert (compete(q, k, v, weight) - dense).abs().max() > 0.01
    within = compete(q, k, v, torch.where(age > 0, age, 1.), late=False) # log w among the logits of the slots cancels ...
    unweighted = compete(q, k, v, torch.ones_like(age), late=False)
    assert (within - unweighted).abs().max() < 1e-12 # ... so it weighs nothing

def test_ages_do_not_know_the_future():
    video = clips(b=1, t=12, seed=9)
    later = video.clone()
    later[:, 8:] = video[:, 6:7] # nothing new
    first, second = (Runs.of(keep_mask(v, 0.4, 2, 8)) for v in (video, later))
    a, b = (ages(r)[:4][:, r.time < 4] for r in (first, second)) # up to frame 7
    assert torch.equal(a, b) and torch.equal(first.index[first.time < 4], second.index[second.time < 4])
    assert not torch.equal(first.length[first.time < 4], second.length[second.time < 4]) # final lengths do
    assert torch.equal(ages(first)[-1], first.length) and torch.equal(ages(first).sum(1), 6*torch.arange(1, 7))

def test_ages_equal_a_loop():
    mask = torch.rand(2, 5, 2, 3) < 0.5
    mask[:, 0] = True
    runs, expected = Runs.of(mask), []
    for t in range(5):
        for b, k, i, j in mask.nonzero().tolist():
            expected.append(sum(1 for m in range(k, t + 1) if not mask[b, k + 1:m + 1, i, j].any()))
    assert ages(runs).flatten().tolist() == expected

@pytest.mark.parametrize('reference', ['previous', 'anchor'])
@pytest.mark.parametrize('compare', ['ends', 'all'])
def test_one_tubelet_at_a_time(reference, compare):
    video, held, found = clips(seed=10), None, []
    for new in video.split(2, 1):
        keep, held = next_keep(held, new, 0.4, 8, reference, compare)
        found.append(keep)
    assert torch.equal(torch.stack(found, 1), keep_mask(video, 0.4, 2, 8, reference, compare))

# cost

class Readouts(TorchFunctionMode):
    "Counts what waits for a device: tensors that become numbers, and sizes that depend on values."
    names = {'tolist', 'item', 'cpu', 'numpy', '__bool__', '__int__', '__float__', '__index__', 'nonzero', 'masked_select', 'unique'}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        self.count += getattr(fn, '__name__', '') in self.names
        return fn(*args, **(kwargs or {}))

def test_one_readout_in_all():
    video = clips()
    for reference in ('previous', 'anchor'):
        with Readouts() as mode: mask = keep_mask(video, 0.4, 2, 8, reference)
        assert mode.count == 0
    with Readouts() as mode:
        tokens, runs = pack(cut(video, 2, 8), mask)
        expand(tokens, runs), ages(runs), patches(video, runs), padded(tokens, runs), unpadded(padded(tokens, runs), runs)
    assert mode.count == 1
    with Readouts() as mode: mask.nonzero()
    assert mode.count == 1 # the counter counts

def test_the_mask_does_not_depend_on_values():
    "Tensors without values would stop anything that waits for one."
    with FakeTensorMode():
        video = torch.empty(2, 8, 3, 16, 24)
        for reference in ('previous', 'anchor'): assert run_lengths(keep_mask(video, 0.1, 2, 8, reference, 'all')).shape == (2, 4, 2, 3)
        with pytest.raises(DataDependentOutputException): Runs.of(keep_mask(video, 0.1, 2, 8))

def test_autocast_does_not_change_decisions():
    video = clips(seed=11)
    x = normalised(video)
    taus = F.avg_pool3d((x[:, :, 3::2] - x[:, :, :-2:2]).abs(), (1, 8, 8)).mean(1).flatten()[::3].tolist()
    for tau in taus:
        with torch.autocast('cpu', torch.bfloat16): mask = keep_mask(video, tau, 2, 8)
        assert torch.equal(mask, keep_mask(video, tau, 2, 8))

def test_erasing_the_same_rectangle_makes_it_static():
    video = torch.rand(1, 8, 3, 16, 16)
    video[..., :8, :8] = 0.5
    mask = keep_mask(video, 0.1, 2, 8)
    assert mask[:, :, 0, 0].sum() == 1 and mask[:, :, 1, 1].all()

# the rival

@pytest.mark.parametrize('p', [0., 1e-4, 0.001, 0.5, 0.777, 1.])
def test_random_mask_keeps_exactly(p):
    mask = random_mask((3, 8, 14, 14), p, torch.Generator().manual_seed(0))
    assert (mask.flatten(1).sum(1) == round(p*1568)).all()
    if 0 < p*1568 < 1567 and round(p*1568): assert not torch.equal(mask[0], mask[1])

def test_random_mask_is_seeded_and_uniform():
    draw = lambda seed: random_mask((400, 4, 2, 2), 0.25, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert (draw(0).float().mean(0) - 0.25).abs().max() < 0.1
    assert random_mask((3, 4, 2, 2), torch.tensor([1, 0, 16])).flatten(1).sum(1).tolist() == [1, 0, 16]

# bad input

@pytest.mark.parametrize('arguments,says', [
    (dict(threshold=-0.1), 'at least 0.*-0.1'), (dict(threshold=math.nan), 'nan'), (dict(threshold='0.1'), "'0.1'"), (dict(threshold=True), 'True'), (dict(tubelet=0), 'tubelet.*0'),
    (dict(patch=7), 'patches of 7x7'), (dict(patch=2.5), '2.5'), (dict(tubelet=3), 'tubelets of 3'), (dict(reference='ancor'), "Did you mean 'anchor'"), (dict(compare='end'), "Did you mean 'ends'")])
def test_refused_arguments(arguments, says):
    with pytest.raises(ValueError, match=says): keep_mask(clips(), **{'patch': 8, **arguments})

@pytest.mark.parametrize('video,says', [
    (torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8), 'uint8.*to_float'), (torch.zeros(2, 4, 3, 16, 16, dtype=torch.long), 'int64'), (torch.zeros(4, 3, 16, 16), r'\(B, T, C, H, W\)'),
    (torch.zeros(2, 4, 4, 16, 16), 'channels 4'), (torch.zeros(2, 0, 3, 16, 16), '0'), (np.zeros((2, 4, 3, 16, 16)), 'ndarray')])
def test_refused_video(video, says):
    with pytest.raises(ValueError, match=says): keep_mask(video, patch=8)

def test_padding_repeats_borders():
    video = clips(t=5, h=16, w=24)[..., :13, :21]
    mask = keep_mask(video, 0.1, 2, 8, pad=True)
    whole = torch.cat([video, video[:, -1:]], 1)
    whole = whole[..., [*range(13), 12, 12, 12], :][..., [*range(21), 20, 20, 20]]
    assert torch.equal(mask, keep_mask(whole, 0.1, 2, 8))
    with pytest.raises(ValueError, match='1 frames, 3 rows, 3 columns'): keep_mask(video, 0.1, 2, 8)

def test_one_frame_and_no_clip():
    video = clips(t=1)
    assert keep_mask(video, 0.1, 1, 8).all() and keep_mask(video, 0.1, 4, 8, pad=True).shape == (2, 1, 2, 3)
    for arguments in (dict(), dict(pad=True), dict(reference='anchor', compare='all')):
        none = keep_mask(clips()[:0], 0.1, 2, 8, **arguments)
        assert none.shape == (0, 4, 2, 3)
    tokens, runs = pack(torch.zeros(0, 4, 2, 3, 5), none)
    assert tokens.shape == (0, 5) and runs.counts == () and runs.offsets.tolist() == [0] and expand(tokens, runs).shape == (0, 4, 2, 3, 5)

def test_what_does_not_belong_together():
    mask = keep_mask(clips(), 0.1, 2, 8)
    tokens, runs = pack(torch.zeros(2, 4, 2, 3, 5), mask)
    with pytest.raises(ValueError, match='like their mask'): pack(torch.zeros(2, 4, 3, 2), mask)
    with pytest.raises(ValueError, match='were kept, got'): expand(tokens[1:], runs)
    with pytest.raises(ValueError, match='does not have the grid'): patches(clips()[:1], runs)
    with pytest.raises(ValueError, match='bool'): run_lengths(mask.int())
    with pytest.raises(ValueError, match='begin with dropped tokens'): expand(*pack(torch.zeros(2, 4, 2, 3), torch.zeros_like(mask)))
    with pytest.raises(ValueError, match='from 0 to 1'): random_mask((1, 2, 2, 2), 1.5)

def test_noise_at_the_threshold():
    "Gaussian noise of s grey levels scores 2 s/sqrt(pi) grey levels: 5 is just below the default threshold."
    noise = 0.5 + 5/255*torch.randn(1, 16, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    low, high = (keep_mask(noise, f*5*2/math.sqrt(math.pi)/grey_levels(1.)).float().mean() for f in (0.9, 1.1))
    assert low == 1 and high == 1/8
