"Tracking against a loop, and on awkward input."
import math

import pytest
import torch

from slotnb.evaluation import tracking

def test_swaps_equal_a_loop():
    g = torch.Generator().manual_seed(0)
    true, pred = torch.randint(0, 4, (3, 6, 5, 5), generator=g), torch.randint(0, 3, (3, 6, 5, 5), generator=g)
    true[1, 2][true[1, 2] == 1] = 0
    for b, rate in enumerate(tracking.swap_rate(true, pred)):
        swaps, steps = 0, 0
        for c in (1, 2, 3):
            best = [torch.bincount(pred[b, t][true[b, t] == c], minlength=3).argmax() if (true[b, t] == c).any() else None for t in range(6)]
            for u, v in zip(best, best[1:]):
                if u is not None and v is not None: swaps, steps = swaps + int(u != v), steps + 1
        assert float(rate) == pytest.approx(swaps/steps)

def test_last_slots_empty():
    labels = torch.zeros(2, 3, 8, 8).long()
    assert tracking.slot_share(labels, 7).shape == (2, 3, 7) and len(tracking.slot_table(labels, labels, slots=7)) == 7
    entries, words = tracking.diagnose(labels, labels, slots=7)
    assert words.startswith('COLLAPSED') and math.isnan(entries['swap_rate.decoder.clip']) and 'nan' not in words
    with pytest.raises(ValueError, match=r'0\.\.1'): tracking.slot_share(labels + 2, 2)
