"Probes: the match against all permutations, no clip on both sides, what is absent stays out, and the right rows under the right slots."
import itertools, math

import numpy as np
import pytest
import torch

from slotnb.data.scenes import PRESETS, make_clip
from slotnb.evaluation.probe import FACTORS, divided, factors_of, match_objects, probe, samples, slot_features
from slotnb.layers.slot_attention import SlotState

@pytest.fixture(scope='module')
def world():
    clips = [make_clip(PRESETS['tiny'], 0, i) for i in range(24)]
    return clips, torch.stack([c.labels for c in clips]).long(), factors_of(clips)

def hot(labels, K): return torch.nn.functional.one_hot(labels, K).permute(0, 1, 4, 2, 3).float()

def test_match_is_the_best_of_all_permutations():
    g = torch.Generator().manual_seed(0)
    labels, pred = torch.randint(0, 4, (4, 3, 6, 6), generator=g), torch.randint(0, 4, (4, 3, 6, 6), generator=g)
    found = match_objects(labels, hot(pred, 4), 3)
    for b, t in np.ndindex(4, 3):
        iou = torch.tensor([[((labels[b, t] == n + 1) & (pred[b, t] == k)).sum()/((labels[b, t] == n + 1) | (pred[b, t] == k)).sum() for k in range(4)] for n in range(3)])
        best = max(sum(iou[n, k] for n, k in enumerate(order)) for order in itertools.permutations(range(4), 3))
        assert sum(iou[n, k] for n, k in enumerate(found[b, t].tolist())) == pytest.approx(float(best))

def test_match_over_the_clip_keeps_a_slot_and_leaves_out_what_is_hidden():
    labels = torch.zeros(1, 4, 8, 8).long()
    labels[:, :, :4, :4], labels[:, :2, 4:, 4:] = 1, 2 # the second object leaves
    traded = labels.clone()
    traded[:, 3] = torch.tensor([0, 2, 1])[labels[:, 3]]
    masks = hot(traded, 3)
    assert match_objects(labels, masks, 2)[0].tolist() == [[1, 2], [1, 2], [1, -1], [2, -1]]
    assert match_objects(labels, masks, 2, 'clip')[0].tolist() == [[1, 2], [1, 2], [1, -1], [1, -1]]
    assert (match_objects(labels, hot(torch.zeros_like(labels), 1), 2) >= 0).sum() == 4 # one slot for two objects: one of them gets it
    with pytest.raises(ValueError, match='go up to 2'): match_objects(labels, masks, 1)

def test_factors_are_what_is_seen(world):
    clips, labels, factors = world
    grid = torch.stack(torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing='ij'), -1)
    off = []
    for i, c in enumerate(clips):
        for n in range(4):
            if c.truth['visibility'][3, n] < 0.99 or factors['position'][i, 3, n].isnan().any(): continue
            off.append((grid[labels[i, 3] == n + 1].mean(0) - factors['position'][i, 3, n]).norm().item())
    assert len(off) > 20 and np.mean(off) < 1. # of a pixel: seen obliquely, a body's centre is near that of its outline
    assert torch.equal(factors['velocity'][:, 2], factors['position'][:, 2] - factors['position'][:, 1]) or factors['velocity'][:, 2].isnan().any()
    assert set(factors['shape'].unique().tolist()) == {-1, 0, 1, 2}
    with pytest.raises(ValueError, match='camera_position'): factors_of([make_clip(PRESETS['tetrominoes'], 0, 0)])

def test_rows_are_of_the_matched_slot_and_clips_are_on_one_side(world):
    _, labels, factors = world
    B, T, N = factors['shape'].shape
    features = torch.arange(B*T*6).view(B, T, 6, 1).float() # every slot says which it is
    slot = match_objects(labels, hot(labels, 6), N)
    x, y, at = samples(features, slot, factors['colour'])
    b, t, n = ((factors['colour'] >= 0) & (slot >= 0)).nonzero(as_tuple=True)
    assert np.array_equal(x[:, 0], ((b*T + t)*6 + n + 1).numpy()) and np.array_equal(at, b.numpy()) and np.array_equal(y, factors['colour'][b, t, n].numpy())
    assert len(samples(features, slot, factors['velocity'])[0]) < len(samples(features, slot, factors['position'])[0]) # none in the first frame
    for clips in (2, 3, 24):
        fit = divided(clips)
        assert 0 < fit.sum() < clips
    with pytest.raises(ValueError, match='at least 2'): divided(1)

def test_knowing_the_clip_by_heart_does_not_help(world):
    _, labels, factors = world
    B, T, N = factors['shape'].shape
    by_heart = torch.nn.functional.one_hot(torch.arange(B), B)[:, None, None].expand(B, T, N + 2, B).float() # names the clip and nothing else
    found = probe(by_heart, hot(labels, N + 2), labels, factors)
    assert found['r2_position.slots.frame'] <= found['r2_position.constant.frame'] + 0.05 and found['accuracy_colour.slots.frame'] <= found['accuracy_colour.constant.frame'] + 0.1

def test_knowing_finds_and_the_match_matters(world):
    _, labels, factors = world
    B, T, N = factors['shape'].shape
    content = torch.zeros(B, T, N + 2, 10)
    content[:, :, 1:N + 1, :2] = factors['position'].nan_to_num()
    content[:, :, 1:N + 1, 2:] = torch.nn.functional.one_hot(factors['colour'].clamp(min=0), 8)
    found = probe(SlotState(content), hot(labels, N + 2), labels, factors)
    assert found['r2_position.slots.frame'] > 0.99 and found['rmse_position_px.slots.frame'] < 0.2 and found['accuracy_colour.slots.frame'] > 0.95
    shifted = probe(content.roll(1, 2), hot(labels, N + 2), labels, factors)
    assert shifted['r2_position.slots.frame'] < 0.5 and shifted['accuracy_colour.slots.frame'] < 0.6
    posed = SlotState(torch.zeros(B, T, N + 2, 3), position=content[..., :2])
    assert slot_features(posed).shape[-1] == 5 and probe(posed, hot(labels, N + 2), labels, factors)['r2_position.slots.frame'] > 0.99 # a pose counts

def test_what_cannot_be_scored_is_nan(world):
    _, labels, factors = world
    still = {k: v[:, :1] for k, v in factors.items()} # one frame: nothing has a velocity
    found = probe(torch.randn(24, 1, 6, 4), hot(labels[:, :1], 6), labels[:, :1], still)
    assert math.isnan(found['r2_velocity.slots.frame']) and found['r2_velocity.slots.frame.n'] == 0 and not math.isnan(found['r2_position.slots.frame'])
    one_colour = {**factors, 'colour': factors['colour'].clamp(max=0)}
    assert probe(torch.randn(24, 8, 6, 4), hot(labels, 6), labels, one_colour)['accuracy_colour.slots.frame'] == 1
    with pytest.raises(ValueError, match='NaN or infinite'): probe(torch.full((24, 8, 6, 4), math.nan), hot(labels, 6), labels, factors)
    assert set(FACTORS.values()) == {'r2', 'accuracy'}
