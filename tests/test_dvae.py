"The dVAE, the decoder over its tokens, and STEVE: gradients, causality, the cache, stored models, training."
import pytest
import torch
import torch.nn.functional as F

from slotnb.core import SharedGenerator, seeded
from slotnb.data.clips import to_float
from slotnb.evaluation.decompose import decompose, score_decomposition
from slotnb.layers.slot_attention import SlotState
from slotnb.layers.weights import CheckpointError
from slotnb.models.dvae import DVAE, DVAEConfig, gumbel_softmax, temperature, token_grid
from slotnb.models.savi import SAVi, preset as savi_preset
from slotnb.models.token_decoder import PRESETS, STEVE, STEVEConfig, TokenConfig, TokenDecoder, preset
from slotnb.training.fit import FitConfig, fit
from slotnb.training.losses import Reconstruction, TokenLoss
from slotnb.training.recipes import loss_of

SMALL = TokenConfig(vocabulary=16, dvae_width=8, dvae_layers=1, decoder_layers=3, decoder_width=32, decoder_ffn=64, decoder_dropout=0.)

def draw(seed=0): return torch.Generator().manual_seed(seed)

def decoder(pose=0, dtype=torch.float64, **changes):
    with seeded(0, 'init'): return TokenDecoder(SMALL.but(**changes), 8, (3, 4), pose).to(dtype).eval()

def some_slots(n=5, k=4, pose=False, dtype=torch.float64):
    r = lambda *shape: torch.randn(n, k, *shape, generator=draw(3), dtype=dtype)
    return SlotState(r(8), r(2), r(2).abs() + .1) if pose else SlotState(r(8))

def steve(seed=0, **changes):
    with seeded(seed, 'init'): return STEVE(preset('smoke').but(**changes))

# words

@pytest.mark.parametrize('tau', [1., .3])
def test_the_mixture_has_the_gradient_that_differences_have(tau):
    logits = torch.randn(2, 5, 3, generator=draw(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: gumbel_softmax(v, tau, generator=draw(1))[0], logits)

def test_hard_words_are_one_word_with_the_mixtures_gradient():
    logits, w = torch.randn(2, 5, 3, generator=draw(), dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 3, generator=draw(2), dtype=torch.float64)
    (soft, words), (hard, same) = (gumbel_softmax(logits, .7, h, draw(1)) for h in (False, True))
    assert torch.equal(words, same) and torch.allclose(hard, F.one_hot(words, 5).movedim(-1, 1).double())
    a, b = (torch.autograd.grad((z*w).sum(), logits)[0] for z in (soft, hard))
    assert torch.equal(a, b) and a.abs().min() > 0

def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.]]).requires_grad_()
    for tau in (1., .05):
        z, words = gumbel_softmax(logits, tau, generator=draw())
        assert words.item() == 0 and z.isfinite().all() and torch.autograd.grad(z[0, 1] + z[0, 0], logits)[0].isfinite().all()

@pytest.mark.parametrize('hard', [False, True])
def test_every_parameter_of_a_dvae_learns(hard):
    dvae = DVAE(SMALL.but(hard=hard))
    (dvae(torch.rand(2, 2, 3, 8, 12, generator=draw()), draw()).recon).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in dvae.parameters())

def test_temperature_falls_with_training_steps_and_only_then():
    dvae, video = DVAE(SMALL.but(tau_steps=4)), torch.rand(1, 1, 3, 8, 8)
    seen = []
    for _ in range(6):
        seen.append(dvae.tau.item())
        dvae(video)
    assert seen[0] == 1 and seen[4] == pytest.approx(.1) == seen[5] and seen == sorted(seen, reverse=True)
    dvae.eval()(video)
    assert dvae.steps == 6

def test_a_dvae_overfits_two_frames():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing='ij')
    stripes, checks = ((x + y)//3 % 2).float(), ((x//5 + y//5) % 2).float()
    video = torch.stack([torch.stack([stripes, .5*checks, 1 - stripes]), torch.stack([checks, stripes*checks, .3 + 0*stripes])])[None]
    with seeded(0, 'init'): dvae = DVAE(DVAEConfig(vocabulary=32, dvae_width=32, dvae_layers=1, tau_steps=80, dvae_gain=30.))
    optimizer, g = torch.optim.Adam(dvae.parameters(), 4e-3), draw()
    error = lambda: (dvae(video, g).recon - video).square().mean()
    first = error().item()
    for step in range(150):
        optimizer.param_groups[0]['lr'] = 4e-3*(1 - step/150)
        optimizer.zero_grad(); error().backward(); optimizer.step()
    dvae.eval()
    flat = (video - video.mean((3, 4), keepdim=True)).square().mean() # the best that one colour per frame can do
    assert error() < .2*flat < first and len(dvae(video).tokens.unique()) > 1

def test_two_ranks_draw_the_words_of_one():
    with seeded(0, 'init'): dvae = DVAE(SMALL)
    video = torch.rand(4, 2, 3, 8, 8, generator=draw())
    whole = dvae(video, draw(7)).tokens
    for rank in range(2):
        g = SharedGenerator().manual_seed(7)
        g.share = (rank, 2)
        dvae.steps.zero_()
        assert torch.equal(dvae(video[2*rank:2*rank + 2], g).tokens, whole[2*rank:2*rank + 2])

# the decoder

@pytest.mark.parametrize('pose', [False, True])
def test_generation_with_a_cache_is_the_full_pass(pose):
    model, slots = decoder(4*pose), some_slots(pose=pose)
    words, attention = model.generate(slots)
    logits, taught = model(words, slots)
    assert torch.equal(logits.argmax(1), words) and len(words.unique()) > 2
    assert (attention - taught).abs().max() < 1e-10
    keys, caches, steps = model.keys(slots), [[] for _ in model.blocks], [] # logits word by word, not only what is likeliest
    x = model.start.expand(5, -1, -1)
    for at in range(12):
        step, _ = model.run(x + model.place[at], keys, caches, at)
        steps.append(step[:, 0])
        x = model.words(words.flatten(1)[:, at]).unsqueeze(1)
    assert (torch.stack(steps, -1).unflatten(2, (3, 4)) - logits).abs().max() < 1e-10

def test_drawn_words_follow_their_probabilities():
    model = decoder()
    slots = some_slots(1).map(lambda v: v.expand(4000, -1, -1))
    with torch.no_grad():
        first = model.generate(SlotState(slots.content), sample=True, generator=draw())[0][:, 0, 0]
        p = model(torch.zeros(1, 3, 4, dtype=torch.int64), some_slots(1))[0][0, :, 0, 0].softmax(0)
    assert (torch.bincount(first, minlength=16)/4000 - p).abs().max() < .03

def leaks(model, slots, words):
    "Places whose logits change when words from a later place on become noise; and places that do not mind their own past."
    logits, seen, deaf = model(words, slots)[0].flatten(2), set(), set()
    for at in range(12):
        noisy = words.flatten(1).clone()
        noisy[:, at:] = (noisy[:, at:] + torch.randint(1, 16, noisy[:, at:].shape, generator=draw(at))) % 16
        changed = (model(noisy.reshape(words.shape), slots)[0].flatten(2) - logits).abs().amax((0, 1)) > 0
        seen |= set(changed[:at + 1].nonzero().flatten().tolist())
        deaf |= set(range(at + 1, 12)) - set(changed.nonzero().flatten().tolist())
    return seen, deaf

def test_no_word_sees_the_future(monkeypatch):
    model, slots = decoder(), some_slots()
    words = torch.randint(16, (5, 3, 4), generator=draw())
    assert leaks(model, slots, words) == (set(), set())
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *a, is_causal=False, **k: attend(*a, **k))
    assert leaks(model, slots, words)[0], 'a decoder that looks ahead must be caught'

@pytest.mark.parametrize('amp', [False, True])
def test_masks_sum_to_one_over_slots(amp):
    model = steve().eval()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp): record = model(torch.rand(2, 2, 3, 32, 32, generator=draw()), generator=draw())
    for masks in (record.decoder_masks, record.attention_masks, model.decode(record.slots)[1]):
        assert masks.dtype == torch.float32 and masks.min() >= 0 and (masks.sum(2) - 1).abs().max() < 1e-5
    assert record.recon.dtype == torch.float32 and record.recon.isfinite().all()

def test_permuted_slots_permute_masks_and_change_nothing_else():
    model = decoder()
    words, order = torch.randint(16, (5, 3, 4), generator=draw()), [2, 0, 3, 1]
    (a, x), (b, y) = model(words, some_slots()), model(words, some_slots().map(lambda v: v[:, order]))
    assert (a - b).abs().max() < 1e-10 and (x[:, order] - y).abs().max() < 1e-10

def test_a_pose_is_seen():
    model, slots = decoder(4), some_slots(pose=True)
    words = torch.randint(16, (5, 3, 4), generator=draw())
    a, b = model(words, slots)[0], model(words, slots.replace(position=slots.position + .5))[0]
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(ValueError, match='with a pose, these have none'): model(words, some_slots())
    with pytest.raises(ValueError, match='without a pose, these have one'): decoder()(words, some_slots(pose=True))

# stored

def test_a_stored_model_is_the_same_model(tmp_path):
    model, video = steve(), torch.rand(1, 2, 3, 32, 32, generator=draw())
    for _ in range(3): model(video, generator=draw())
    model.eval().save_pretrained(tmp_path/'model', steps=3)
    again = STEVE.from_pretrained(tmp_path/'model')
    assert again.config == model.config and again.dvae.steps == 3 and again.dvae.tau == model.dvae.tau
    a, b = (m(video, generator=draw()) for m in (model, again))
    assert torch.equal(a.recon, b.recon) and torch.equal(a.decoder_masks, b.decoder_masks)
    with pytest.raises(CheckpointError, match='holds a STEVE, not a SAVi'): SAVi.from_pretrained(tmp_path/'model')
    DVAE(SMALL).save_pretrained(tmp_path/'dvae')
    assert DVAE.from_pretrained(tmp_path/'dvae').config.vocabulary == 16

# training

class Clips:
    "Textured squares that move, without a simulator."
    lengths, fingerprint = [3]*4, 'squares'
    def __init__(self):
        self.video = torch.rand(4, 1, 3, 32, 32, generator=draw()).repeat(1, 3, 1, 1, 1)
        for t in range(3): self.video[:, t, :, 8:20, 4*t:4*t + 12] = (torch.arange(12)//3 % 2).float()
        self.video = (self.video*255).to(torch.uint8)
    def stream(self, start, stop):
        for step in range(start, stop): yield {'video': self.video[[step % 4, (step + 1) % 4]]}
    batch_size = 2

@pytest.fixture
def recipe(): return FitConfig(steps=6, batch_size=2, lr=1e-3, log_every=2, checkpoint_every=3, tensorboard=False)

@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_fit_trains_words_and_slots_together(recipe, amp):
    model = steve()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = fit(model, Clips(), loss_of(model.config), recipe.but(steps=24, log_every=6, amp=amp, channels_last=True), device='cpu')
    assert {'tokens', 'dvae', 'loss'} <= set(result.history) and result.history['dvae'][-1] < result.history['dvae'][0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters()) and model.dvae.steps == 24
    assert result.history['loss'][0] == pytest.approx(result.history['tokens'][0] + result.history['dvae'][0], rel=1e-4)

def test_a_resumed_training_is_the_unbroken_one(recipe, tmp_path):
    whole, broken = steve(), steve()
    fit(whole, Clips(), TokenLoss(), recipe, tmp_path/'whole', device='cpu')
    class Cut(Clips):
        "Breaks off after four steps."
        def stream(self, start, stop):
            for step, batch in zip(range(start, stop), super().stream(start, stop)):
                if step == 4: raise KeyboardInterrupt
                yield batch
    with pytest.raises(KeyboardInterrupt): fit(broken, Cut(), TokenLoss(), recipe, tmp_path/'broken', device='cpu')
    again = steve(seed=1) # its weights come from the checkpoint
    fit(again, Clips(), TokenLoss(), recipe, tmp_path/'broken', device='cpu')
    assert again.dvae.steps == 6
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())

def test_a_dvae_trains_alone(recipe):
    with seeded(0, 'init'): dvae = DVAE(SMALL.but(tau_steps=40))
    result = fit(dvae, Clips(), Reconstruction(), recipe.but(steps=40, log_every=10), device='cpu')
    assert result.history['recon'][-1] < result.history['recon'][0]

def test_losses_name_what_is_missing():
    video = torch.rand(1, 1, 3, 32, 32)
    with pytest.raises(ValueError, match="cross_entropy.*this model does not give"): TokenLoss()(SAVi(savi_preset('smoke'))(video), video)
    with pytest.raises(RuntimeError, match='does not require grad'): Reconstruction()(steve()(video), video)['recon'].backward() # nothing of the slots is in it
    assert loss_of(savi_preset('smoke')).parts == (Reconstruction(),) and loss_of(preset('smoke')).parts == (TokenLoss(),)

def test_records_are_scored_like_any_other():
    video, labels = to_float(Clips().video), torch.zeros(4, 3, 32, 32, dtype=torch.int64)
    for t in range(3): labels[:, t, 8:20, 4*t:4*t + 12] = 1
    record = decompose(steve().eval(), video)
    entries, scores, _ = score_decomposition(video, labels, record, lpips=False)
    assert entries['fg_ari.decoder.clip.n'] == 4 and entries['mse_pixel.decoder.frame'] > 0 and 'fg_ari.attention.clip' in entries and len(scores) == 4

# bad input

@pytest.mark.parametrize('changes,says', [
    (dict(size=(30, 32)), 'multiples of 4'), (dict(size=(32, 0)), 'multiples of 4'), (dict(vocabulary=1), 'vocabulary must be at least 2'), (dict(tau=0.), 'tau must be above 0'),
    (dict(tau_final=-.1), 'tau_final must be above 0'), (dict(tau_steps=0), 'tau_steps must be at least 1'), (dict(decoder_heads=5), 'multiple of decoder_heads'),
    (dict(decoder_layers=0), 'decoder_layers must be at least 1'), (dict(decoder_dropout=1.), 'decoder_dropout'), (dict(vocabulari=8), "Did you mean 'vocabulary'"), (dict(slots=0), 'slots must be')])
def test_impossible_configs_are_refused(changes, says):
    with pytest.raises(ValueError, match=says): PRESETS['smoke'].but(**changes)

def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r'multiples of 4, got \(30, 32\)'): DVAE(SMALL)(torch.rand(1, 1, 3, 30, 32))
    with pytest.raises(ValueError, match='video must be'): DVAE(SMALL)(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match='takes frames of'): steve()(torch.rand(1, 1, 3, 28, 32))
    with pytest.raises(ValueError, match='writes 3x4 words'): decoder()(torch.zeros(5, 4, 3, dtype=torch.int64), some_slots())
    with pytest.raises(ValueError, match='tau must be above 0'): gumbel_softmax(torch.zeros(1, 4), 0.)
    with pytest.raises(ValueError, match='multiples of 4'): token_grid((32,))

def test_published_sizes():
    c = STEVEConfig(**PRESETS['steve'].to_dict())
    assert (c.vocabulary, c.decoder_layers, c.decoder_heads, c.decoder_width, c.slots, c.dim, c.tau, c.tau_final, c.tau_steps) == (4096, 8, 4, 192, 15, 192, 1., .1, 30_000)
    assert temperature(c, 30_000).item() == pytest.approx(.1) and token_grid(c.size) == (32, 32)
    with torch.device('meta'): dvae = DVAE(c)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(dvae.encoder) == 3*16*64 + 64 + 6*(64*64 + 64) + 64*4096 + 4096
    assert count(dvae.decoder) == 4096*64 + 64 + 2*(9*64*64 + 64 + 2*(64*64 + 64) + 64*256 + 256) + 3*64 + 3
