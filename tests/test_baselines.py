"Baselines on input that is wrong."
import math

import pytest
import torch

from slotnb.evaluation.baselines import BASELINES

@pytest.mark.parametrize('name', BASELINES)
def test_baselines_refuse_what_they_cannot_read(name):
    video = torch.rand(1, 1, 3, 8, 8)
    with pytest.raises(ValueError, match='at least 1'): BASELINES[name](video, 0)
    with pytest.raises(TypeError, match='uint8'): BASELINES[name]((video*255).byte(), 3)
    with pytest.raises(ValueError, match='NaN'): BASELINES[name](video*math.nan, 3)
