"A stored model is loaded without saying of which class it is."
import importlib, json, pkgutil

import pytest

import slotnb
import slotnb.models, slotnb.training
from slotnb.layers.weights import CheckpointError, Pretrained


def below(cls):
    for c in cls.__subclasses__(): yield from (c, *below(c))


def test_every_model_has_a_home():
    for package in (slotnb.models, slotnb.training):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'): importlib.import_module(module.name)
    assert slotnb.HOMES == {c.__name__: c.__module__.removeprefix('slotnb.') for c in below(Pretrained) if c.config_class and c.__module__.startswith('slotnb.')}


def test_the_folder_says_which_class(tmp_path):
    from slotnb.models.psb import PSB, preset
    from slotnb.models.slotformer import PRESETS, SlotFormer
    for model in (PSB(preset('smoke')), SlotFormer(PRESETS['smoke'])):
        again = slotnb.from_pretrained(model.save_pretrained(tmp_path/type(model).__name__))
        assert type(again) is type(model) and again.config == model.config and not again.training
        assert all((a == b).all() for a, b in zip(again.parameters(), model.parameters()))
    assert type(slotnb.from_pretrained('tiny')).__name__ == 'SAVi'


@pytest.mark.parametrize('about, words', [({'class': 'Popen', 'config': {}}, 'holds a Popen, which is no model of slotnb'), ({'config': {}}, 'does not say "class"')])
def test_what_is_no_model(tmp_path, about, words):
    (tmp_path/'config.json').write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=words): slotnb.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='lapdog'): slotnb.from_pretrained('lapdog')
