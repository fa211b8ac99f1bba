"Pictures of awkward input, and errors on wrong input."
import numpy as np
import pytest
import torch

from slotnb.evaluation import plots

def test_pictures_of_an_image_and_of_grey():
    masks = torch.rand(1, 4, 4, 4).softmax(1)
    for video in (torch.rand(1, 1, 16, 16), (torch.rand(1, 3, 16, 16)*255).byte()):
        sheet = plots.contact_sheet(video, video, masks, torch.zeros(1, 16, 16).long(), cell=16)
        assert sheet.shape == (8*16 + 6*plots.GUTTER + plots.GROUP, 16, 3)
    plots.show_sheet(torch.rand(3, 3, 16, 16), fps=8, title='no masks')

def test_wrong_pictures(tmp_path):
    video = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match='1 or 3 channels'): plots.frames(video[0])
    with pytest.raises(TypeError, match='int64'): plots.frames(video.long())
    with pytest.raises(ValueError, match='2 frames'): plots.overlay(video, torch.full((3, 4, 8, 8), 0.25))
    with pytest.raises(ValueError, match='uint8'): plots.save_gif(tmp_path/'a.gif', np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match='band'): plots.curves({}, band='ci')
    assert not list(tmp_path.iterdir())

def test_curves_leave_nan_out():
    fig = plots.curves({'a': (range(4), [[0, 1, np.nan, 1], [1, 1, np.nan, 2]])}, band='sd', levels={'grid': 0.2})
    assert np.nanmax(fig.axes[0].lines[0].get_ydata()) == 1.5
