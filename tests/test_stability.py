"The rule of spikes and divergences against a loop that says it in other words, and on awkward curves."
import math, random

import pytest

from slotnb.evaluation.stability import plateau, stability, stability_entries, stretches

CALM = [2, 1, 0.5, 0.2] + [0.1]*10

def by_hand(losses, level, rise=0.2, patience=5, least=0.05):
    "Spikes and divergences by a state that walks along the curve."
    start = None
    for i in range(len(losses) - patience):
        here = [v for v in losses[:i + 1] if math.isfinite(v)]
        if here and min(here) < level and min(v for v in losses[:i + patience + 1] if math.isfinite(v)) > (1 - least)*min(here): start = i; break
    best, spiking, gone, spikes, divergences = math.inf, False, False, 0, 0
    for i, v in enumerate(losses):
        lost = not math.isfinite(v) or (v > level > best and v > (1 + rise)*best)
        if math.isfinite(v): best = min(best, v)
        high = lost or (start is not None and i > start and v > (1 + rise)*best)
        spikes, divergences = spikes + (high and not spiking), divergences + (lost and not gone)
        spiking, gone = high, lost
    return spikes, divergences

def test_counts_equal_a_walk_along_the_curve():
    random.seed(0)
    several = [0, 0]
    for _ in range(500):
        losses = [2*0.7**min(i, random.randint(3, 12))*random.choice([1, 1, 1, 1.1, 1.3, 3, 20]) for i in range(40)]
        if random.random() < 0.3: losses[random.randrange(40)] = random.choice([math.nan, math.inf])
        s = stability(losses, 1.)
        assert (s.spikes, s.divergences) == by_hand(losses, 1.)
        several[0], several[1] = max(several[0], s.spikes), max(several[1], s.divergences)
    assert min(several) >= 3 # the curves were no calm ones

def test_the_line_is_sharp_and_ragged_tops_are_one_spike():
    assert stability(CALM + [0.1199], 1).spikes == 0 and stability(CALM + [0.1201], 1).spikes == 1
    assert stability(CALM + [0.13, 0.3, 0.15, 0.5], 1).spikes == 1 and stability(CALM + [0.13, 0.1, 0.13], 1).spikes == 2
    assert stability(CALM + [0.13]*3, 1, rise=0.5).spikes == 0
    late = CALM + [0.05]*6 # the best moves on, and what was fine before is a spike now
    assert stability(late, 1).spikes == 0 and stability(late + [0.1], 1).spikes == 1

def test_descent_is_not_judged():
    wobble = [2, 1.5, 3, 1, 1.9, 0.5, 0.9, 0.2, 0.1] + [0.1]*6
    assert stability(wobble, 10.).spikes == 0 and stability(wobble[::-1], 10.).spikes == 1
    falling = [0.8**i for i in range(30)]
    assert plateau(falling) is None and stability(falling, 1.).plateau is None and stability(falling, 1.).highest != stability(falling, 1.).highest
    rises_at_once = [1, 0.5, 0.2] + [0.4]*10 # nothing calm was ever reached, but the best was not reached again either
    assert plateau(rises_at_once) == 2 and stability(rises_at_once, 1.).spikes == 1
    warm = [3]*8 + [2, 1.5, 1.9, 0.9, 0.5] + [0.1]*6 # flat while it warms up, then down in steps
    assert stability(warm, 1.).plateau == 13 and stability(warm, 1.).spikes == 0 and stability([3]*8, 1.).plateau is None

def test_divergence_needs_something_to_lose():
    never = stability([5, 4, 3, 2, 1.5] + [1.2]*8, 1.)
    assert never.divergences == 0 and not never.learned and not never.diverged
    back = stability(CALM + [2, 0.1, 2], 1.)
    assert back.divergences == 2 and back.diverged and back.learned
    assert stability(CALM + [2, 0.1], 1.).diverged is False
    assert stability([2, 0.99, 1.1, 0.98, 1.17] + CALM[2:], 1.).divergences == 0 # about the mean image, on the way down
    assert stability([2, 0.99, 1.1, 0.98, 1.18] + CALM[2:], 1.).divergences == 1

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_what_is_not_finite_is_a_divergence_and_no_best(bad):
    s = stability(CALM + [bad, 0.1], 1.)
    assert (s.spikes, s.divergences, s.diverged, s.highest) == (1, 1, False, math.inf)
    assert stability([bad], 1.).divergences == 1 and not stability([bad], 1.).learned and stability([bad]*9, 1.).plateau is None
    assert 'DIVERGED' in str(stability(CALM + [bad], 1.)) and 'NOT LEARNED' in str(stability([bad], 1.))

def test_entries_are_flat_numbers():
    entries = stability_entries(stability(CALM, 1.), 'val')
    assert entries['learned.val.run'] == 1 and entries['spikes.val.run'] == 0 and entries['plateau.val.run'] == 4
    assert all(isinstance(v, float) for v in entries.values()) and math.isnan(stability_entries(stability([1, 0.5], 1.))['plateau.val.run'])
    assert stretches([False, True, True]) == [range(1, 3)]
