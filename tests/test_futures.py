"Scores of futures against loops, fits and projections made in other ways."
import math

import numpy as np
import pytest
import torch

from slotnb.evaluation import futures as fu

def some_masks(b=3, t=4, k=5, size=12, sharp=2., seed=0):
    return (sharp*torch.randn(b, t, k, size, size, generator=torch.Generator().manual_seed(seed))).softmax(2)

def blocks(b=3, t=4, n=4, size=24, seed=0):
    "Labels of rectangles that may hide each other, and may be absent."
    rng, labels = np.random.default_rng(seed), torch.zeros(b, t, size, size, dtype=torch.uint8)
    for i in range(b):
        for s in range(t):
            for c in range(1, n + 1):
                if rng.random() < 0.2: continue
                y, x, h, w = *rng.integers(0, size - 4, 2), *rng.integers(3, 10, 2)
                labels[i, s, y:y + h, x:x + w] = c
    return labels

def test_postprocessing_equals_a_loop():
    masks = some_masks()
    found = fu.future_labels(masks)
    for b in range(3):
        for t in range(4):
            m = masks[b, t]
            background = min(range(5), key=lambda k: float(m[k].max()))
            for y in range(12):
                for x in range(12):
                    values = m[:, y, x].tolist()
                    assert found[b, t, y, x] == (background if max(values) < 0.5 else values.index(max(values)))
    assert (masks.amax(2) < 0.5).any() and (masks.amax(2) >= 0.5).any()
    with pytest.raises(ValueError, match='Did you mean'): fu.future_labels(masks, 'slotforner')

def loop_recall(true, pred):
    "One frame: recall and precision."
    def box(on):
        y, x = np.nonzero(on)
        return x.min(), y.min(), x.max(), y.max()
    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inside, area = max(w, 0)*max(h, 0), lambda v: (v[2] - v[0])*(v[3] - v[1])
        union = area(a) + area(b) - inside
        return inside/union if union else 0
    objects, guesses = ([box(v == c) for c in np.unique(v) if c or v is pred] for v in (true, pred))
    used, found = set(), 0
    for o in objects:
        values = [iou(o, g) for g in guesses]
        best = int(np.argmax(values))
        if values[best] >= 0.5 and best not in used: found, used = found + 1, used | {best}
    return (found/len(objects), found/len(guesses)) if objects else (math.nan, math.nan)

def test_recall_equals_a_loop():
    true, pred = blocks(6, 5), blocks(6, 5, seed=1)
    pred[::2] = torch.where(torch.rand(3, 5, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.98, true[::2], pred[::2]) # some that are nearly right
    pred[1, 0] = true[1, 1]; true[2, 2] = 0
    recall, precision = fu.average_recall(true, pred.long())
    theirs = np.array([[loop_recall(true[b, t].numpy(), pred[b, t].numpy()) for t in range(5)] for b in range(6)])
    np.testing.assert_allclose(recall, theirs[..., 0])
    np.testing.assert_allclose(precision, theirs[..., 1])
    assert np.isnan(theirs).any() and 0 < np.nanmean(theirs[..., 0]) < 1

def test_perfect_predictions_and_slot_order():
    labels = blocks()
    masks = torch.nn.functional.one_hot(labels.long(), 6).movedim(-1, 2).float() # object 0 is the ground, slot 5 is empty
    video = torch.rand(3, 4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    perfect = fu.score_future(video, video, labels, masks, lpips=False)
    assert (perfect['mse_sum_hw'] == 0).all() and all((perfect[k].nan_to_num(1) == 1).all() for k in ('ari', 'fg_ari', 'fg_miou'))
    wide = torch.stack([(labels == c).any(-1).sum(-1) for c in range(1, 5)]), torch.stack([(labels == c).any(-2).sum(-1) for c in range(1, 5)])
    flat = ((wide[0] == 1) | (wide[1] == 1)).any(0) # a box without area is never found, as published
    assert (perfect['ar'][~flat].nan_to_num(1) == 1).all()
    soft = (6*masks + 0.5*torch.randn(masks.shape, generator=torch.Generator().manual_seed(1))).softmax(2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    a, b = (fu.score_future(video, video, labels, m, lpips=False) for m in (soft, soft[:, :, order]))
    for k in a: torch.testing.assert_close(a[k], b[k], equal_nan=True)
    where = [fu.follow(fu.mask_positions(m), fu.match_slots(labels[:, 0], m[:, 0], 4)) for m in (soft, soft[:, :, order])]
    torch.testing.assert_close(*where, equal_nan=True)

def test_a_line_is_the_least_squares_fit():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 2, generator=g)
    x[0, 2, 1] = x[1, :5, 2] = torch.nan
    ahead = fu.constant_velocity(x, 4, 'line')
    for b in range(2):
        for n in range(3):
            known = ~x[b, :, n, 0].isnan()
            for axis in range(2):
                fit = np.polyfit(np.arange(7)[known], x[b, known, n, axis].double().numpy(), 1)
                np.testing.assert_allclose(ahead[b, :, n, axis], np.polyval(fit, np.arange(7, 11)), atol=1e-5)
    x[1, :6, 2] = torch.nan # seen once: it stays
    for fit in ('last', 'line', 'stay'): torch.testing.assert_close(fu.constant_velocity(x, 4, fit)[1, :, 2], x[1, 6:, 2].expand(4, 2))
    for bad in (dict(steps=0), dict(steps=3, fit='lin')):
        with pytest.raises(ValueError): fu.constant_velocity(x, **bad)

def test_positions_of_real_scenes():
    pytest.importorskip('mujoco')
    from slotnb.data.scenes import PRESETS, make_clip
    clips = [make_clip(PRESETS['tiny'], 0, i) for i in range(8)]
    truth = {k: torch.stack([c.truth[k] for c in clips]) for k in ('position', 'present', 'camera_position', 'camera_rotation', 'camera_focal', 'visibility', 'collisions')}
    labels = torch.stack([c.labels for c in clips])
    centres, centroids = fu.projected_positions(truth), fu.label_positions(labels, 4)
    whole = (truth['visibility'] > 0.99) & ~centres[..., 0].isnan()
    off = (centres - centroids)[whole].norm(dim=-1)*16
    assert whole.sum() > 50 and off.median() < 0.5 and off.max() < 2 # pixels: half a body seen at an angle
    assert centres[~truth['present']].isnan().all()
    masks = torch.nn.functional.one_hot(labels.long(), 5).movedim(-1, 2).float()
    slot = fu.match_slots(labels[:, 3], masks[:, 3], 4)
    found = fu.compare_positions(centroids, fu.mask_positions(masks), slot, 4, (32, 32), fu.near_collision(truth['collisions']))
    assert float(found['rollout']['position_px'].nan_to_num(0).max()) < 1e-4 < float(found['constant_velocity_line']['position_px'].nanmean())
    assert found['rollout']['position_px'].shape == (int((slot >= 0).sum()), 4)

def test_no_collision_is_stepped_over():
    collisions = torch.zeros(20, 20, 2, 2, dtype=torch.bool)
    for i in range(20): collisions[i, i, 0, 1] = collisions[i, i, 1, 0] = True
    for step in (1, 2, 3): assert fu.near_collision(collisions, step - 1, step)[:18].any(1).all()
    assert not fu.near_collision(collisions, 0, 2).any(1).all()

def test_parts_of_the_error_add_up():
    g = torch.Generator().manual_seed(0)
    true, decoded, predicted = (torch.rand(2, 5, 3, 8, 8, generator=g) for _ in range(3))
    parts = fu.where_is_the_error(true, decoded + 0.3, predicted - 0.3)
    torch.testing.assert_close(parts['decoding'] + parts['dynamics'] + parts['cross'], parts['total'])
    assert fu.error_sentence(fu.where_is_the_error(true, true, predicted)).startswith('Decoding the true slots has 0%')
    assert 'never overtakes' in fu.error_sentence(fu.where_is_the_error(true, decoded, decoded))

def test_bad_input_is_named():
    video, masks = torch.rand(1, 8, 3, 16, 16), some_masks(1, 8, 3, 16)
    cut = lambda v, n: (v[0][:, n:], v[1][:, n:])
    for observed, rollout, words in ((8, 8, 'horizon of 0'), (0, 0, 'horizon of 8'), (4, 2, '6 frames, 4 are to be')):
        with pytest.raises(ValueError, match=words): fu.compare_futures(video, cut((video, masks), rollout), (video, masks), observed)
    true = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match='NaN for objects'): fu.position_errors(true, true*math.nan, torch.ones(1, 2).bool(), (8, 8))
    with pytest.raises(ValueError, match='must be equal'): fu.position_errors(true, true[:, 1:], torch.ones(1, 2).bool(), (8, 8))
    with pytest.raises(ValueError, match='observed must be'): fu.copy_last(video, 9, 2)
    with pytest.raises(ValueError, match='has 3 frames'): fu.future_film({'true': video[0], 'rollout': video[0, :3]}, 4)
    with pytest.raises(ValueError, match='observed must be'): fu.future_film({'true': video[0]}, 8)
    with pytest.raises(ValueError, match='Did you mean'): fu.future_table({}, published=['report: ISA-S'])

def test_what_was_not_scored_is_empty_and_nan_is_no_number():
    pytest.importorskip('pandas')
    table = fu.future_table([{'psnr.rollout.frame': 30., 'ar.rollout.frame': math.nan, 'psnr.copy_last.frame': 20.}, {'psnr.rollout.frame': 32.}])
    assert table.loc['rollout', 'psnr'] == '31 ± 1.4' and table.loc['copy_last', 'psnr'] == '20' and 'ar' not in table

def test_a_rollout_is_painted_in_pieces():
    from slotnb.layers.slot_attention import SlotState
    from slotnb.models.autoencoder import AutoEncoder, AutoEncoderConfig
    torch.manual_seed(0)
    model = AutoEncoder(AutoEncoderConfig(size=(16, 16), slots=3, dim=16, channels=(8,), strides=(2,), token_mlp=(16,), start=(8, 8), up_channels=(8,), up_strides=(2,), up_kernels=(3,)))
    slots = SlotState(torch.randn(2, 7, 3, 16))
    for a, b in zip(fu.paint(model, slots, 6), fu.paint(model, slots)): torch.testing.assert_close(a, b)
    assert fu.paint(model, slots)[0].shape == (2, 7, 3, 16, 16)
