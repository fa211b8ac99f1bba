"What points show, how pure their neighbourhoods are, and that snapshots of a training survive a kill."
import os, signal
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

for package in ('sklearn', 'matplotlib'): pytest.importorskip(package)
import matplotlib
matplotlib.use('Agg')

from slotnb.evaluation.embedding import (align, cell_labels, classes_by, draw_points, draw_strip, embed_all, knn_purity, other_slots, row_labels, rows, sample,
                                         score_points, silhouette, slot_objects)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- the report's reshape

def report_literally(features): # (B, T, 4096, 128) in the report
    "Its notebooks, word for word in plain Python: the axes are taken for (B, T, D, N), and the values in memory filled into rows of N."
    b, t, n, d = features.shape
    memory = [float(features[i, j, p, c]) for i in range(b) for j in range(t) for p in range(n) for c in range(d)]
    return [memory[r*n:(r + 1)*n] for r in range(b*t*d)]

@pytest.mark.parametrize('n,d', [(16, 4), (6, 4), (4, 4), (4, 6)])
def test_reshape_is_the_reports(n, d):
    features = np.random.default_rng(0).normal(size=(2, 3, n, d))
    wrong = rows(features, 'report')
    assert np.array_equal(wrong, report_literally(features))
    assert np.array_equal(rows(features), [features[b, t, p] for b in range(2) for t in range(3) for p in range(n)])
    assert (n == d) == (wrong.shape == rows(features).shape and np.array_equal(wrong, rows(features)))

def test_at_the_reports_size_a_point_is_32_cells():
    features = np.broadcast_to(np.arange(4096, dtype=np.float32)[:, None], (1, 1, 4096, 128)) # every channel says which cell it is of
    wrong = rows(features, 'report')
    assert wrong.shape == (128, 4096)
    for i in (0, 1, 127): assert np.array_equal(np.unique(wrong[i]), np.arange(32*i, 32*i + 32))

@pytest.mark.parametrize('n,d', [(16, 4), (6, 4), (4, 6)])
def test_labels_follow_the_numbers(n, d):
    labels = np.random.default_rng(1).integers(0, 3, (2, n))
    label, share = row_labels(labels, d, 'report')
    said = rows(np.broadcast_to(labels[..., None], (2, n, d)), 'report')
    for row, l, s in zip(said, label, share):
        counts = np.bincount(row, minlength=3)
        assert l == counts.argmax() and s == counts.max()/n
    assert np.array_equal(row_labels(labels, d)[0], labels.ravel()) and (row_labels(labels, d)[1] == 1).all()
    with pytest.raises(ValueError, match="unknown reshape 'reports'.*Did you mean 'report'"): rows(np.zeros((2, 3, 4)), 'reports')

# ---------------------------------------------------------------- what a point shows

@pytest.mark.parametrize('overlap', ['iou', 'pixels'])
def test_slot_objects_is_a_loop(overlap):
    rng = np.random.default_rng(2)
    true, owner = rng.integers(0, 4, (2, 3, 8, 8)), rng.choice(5, (2, 3, 8, 8), p=[.5, .3, .15, .05, 0])
    found = slot_objects(torch.from_numpy(true), torch.from_numpy(owner), 5, overlap, idle=0.06)
    for (b, t, k), label in np.ndenumerate(found):
        mine = owner[b, t] == k
        if mine.sum() <= 0.06*64: assert label == -1; continue
        both = np.array([(mine & (true[b, t] == c)).sum() for c in range(4)], float)
        if overlap == 'iou': both /= [(mine | (true[b, t] == c)).sum() for c in range(4)]
        assert label == both.argmax()
    assert (found[..., 4] == -1).all() # owns no pixel anywhere

def test_slots_that_split_or_merge_objects():
    true = torch.zeros(1, 1, 8, 8).long()
    true[..., :4, :4], true[..., 4:, 4:] = 1, 2
    split = torch.where(true == 2, 3, 0)
    split[..., :2, :4], split[..., 2:4, :4] = 1, 2
    assert slot_objects(true, split, 4).tolist() == [[[0, 1, 1, 2]]] # both halves show object 1
    assert slot_objects(true, (true > 0).long(), 2).tolist() == [[[0, 1]]] # two objects in one slot are one point: of equals, the first
    assert slot_objects(true, torch.zeros_like(true), 2).tolist() == [[[0, -1]]]
    with pytest.raises(ValueError, match='slots 0..2, got 0 to 3'): slot_objects(true, split, 3)

@pytest.mark.parametrize('size', [(8, 8), (4, 2), (3, 5), (1, 1)])
def test_cell_labels_is_a_loop(size):
    true = np.random.default_rng(3).integers(0, 4, (2, 8, 8))
    for (i, y, x), label in np.ndenumerate(cell_labels(true, size)):
        inside = [true[i, p, q] for p in range(8) for q in range(8) if p*size[0]//8 == y and q*size[1]//8 == x]
        assert label == np.bincount(inside).argmax()
    with pytest.raises(ValueError, match='9'): cell_labels(true, (9, 8))

def test_classes_across_clips():
    "Object 1 of one clip is not object 1 of the next."
    objects = np.array([[[0, 1, 2]], [[-1, 2, 1]]])
    assert classes_by(objects, np.array([[5, 0], [0, 5]])).tolist() == [[[0, 6, 1]], [[-1, 6, 1]]]
    assert np.array_equal(sample(100, 10, 1), sample(100, 10, 1)) and len(set(sample(100, 10, 1))) == 10 and not np.array_equal(sample(100, 10, 1), sample(100, 10, 2))

# ---------------------------------------------------------------- purity

def points_and_classes(seed=0, n=40, nothing=0.1):
    rng = np.random.default_rng(seed)
    classes = rng.choice(4, n, p=[.6, .2, .15, .05])
    return rng.normal(size=(n, 3)), np.where(rng.random(n) < nothing, -1, classes), rng.integers(0, 3, n)

@pytest.mark.parametrize('k', [1, 5, 100])
def test_purity_is_a_loop(k):
    x, classes, group = points_and_classes()
    purity, chance = knn_purity(x, classes, k, group)
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and group[j] == group[i] and classes[j] >= 0]
        mates = sum(classes[j] == classes[i] for j in others)
        if classes[i] < 0 or not mates: assert np.isnan(purity[i]) and np.isnan(chance[i]); continue
        nearest = sorted(others, key=lambda j: np.linalg.norm(x[i] - x[j]))[:min(k, mates)]
        assert np.isclose(purity[i], np.mean([classes[j] == classes[i] for j in nearest])) and np.isclose(chance[i], mates/len(others))

def test_purity_identities():
    x, classes, _ = points_and_classes(n=60, nothing=0)
    one = np.eye(4)[classes] # features that are the class: perfect whatever the class sizes
    assert np.nanmin(knn_purity(one, classes, 10)[0]) == 1
    turned = x @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]*7 + 3
    assert np.array_equal(knn_purity(x, classes)[0], knn_purity(turned, classes)[0], equal_nan=True) # rotation, size and place do not matter
    names = np.array([9, 4, 7, 0])
    assert np.array_equal(knn_purity(x, classes)[0], knn_purity(x, names[classes])[0], equal_nan=True) # nor do names
    far = np.where(classes < 0, 0, classes)*0
    assert np.nanmin(knn_purity(x, far)[0]) == 1 and np.nanmin(knn_purity(x, far)[1]) == 1 # one class: pure, and no merit
    rng = np.random.default_rng(0)
    drawn = [knn_purity(x, rng.permutation(classes)) for _ in range(300)]
    assert abs(np.mean([np.nanmean(p) for p, _ in drawn]) - np.mean([np.nanmean(c) for _, c in drawn])) < 0.01

def test_what_shows_nothing_is_no_neighbour():
    x = np.array([[0.], [0.1], [1], [5], [5.1]])
    assert knn_purity(x, [1, -1, 1, 2, 2], 1)[0].tolist()[2:] == [1, 1, 1]
    assert np.isnan(knn_purity(x, [1, -1, 1, 2, 2], 1)[0][1]) and np.isnan(knn_purity(x, [-1]*5)[0]).all() and np.isnan(silhouette(x, [-1]*5)).all()
    assert np.isnan(knn_purity(x, [1, 2, 3, 4, 5])[0]).all() # all alone

def test_groups_do_not_see_each_other():
    x, classes, group = points_and_classes()
    together, alone = knn_purity(x, classes, 5, group)[0], np.full(len(x), np.nan)
    for g in range(3): alone[group == g] = knn_purity(x[group == g], classes[group == g], 5)[0]
    assert np.array_equal(together, alone, equal_nan=True)

def test_wrong_points():
    with pytest.raises(ValueError, match='5 points, 4 classes'): knn_purity(np.zeros((5, 2)), [1]*4)
    with pytest.raises(ValueError, match='NaN or infinite'): knn_purity(np.full((3, 2), np.nan), [1, 1, 2])
    with pytest.raises(ValueError, match='k must be at least 1, got 0'): knn_purity(np.zeros((3, 2)), [1, 1, 2], 0)

# ---------------------------------------------------------------- silhouette, close points, entries

def test_silhouette_of_heaps_and_of_noise():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 30)
    heaps = rng.normal(size=(3, 5))[classes]*20 + rng.normal(size=(90, 5))
    assert silhouette(heaps, classes).min() > 0.5 and silhouette(heaps, rng.permutation(classes)).mean() < 0.05 and silhouette(rng.normal(size=(90, 5)), classes).mean() < 0.05

def test_silhouette_by_hand_and_nan():
    x = np.array([[0.], [1], [10], [12], [50]])
    value = silhouette(x, [1, 1, 2, 2, 3])
    assert np.allclose(value[:2], [(11 - 1)/11, (10 - 1)/10]) and np.isnan(value[4]) # a class of one point has no inner distance
    assert np.isnan(silhouette(x, [1, 1, 1, 1, -1])).all() and np.isnan(silhouette(x, range(5))).all()
    each = silhouette(np.concatenate([x, x]), [1, 1, 2, 2, -1]*2, [0]*5 + [1]*5)
    assert np.allclose(each[:4], each[5:9]) and np.allclose(each[:4], silhouette(x[:4], [1, 1, 2, 2]))

def test_close_points_of_other_slots():
    x = np.array([[0.], [0.1], [10], [10.1]])
    right = other_slots(x, [0, 1, 0, 1], [1, 1, 2, 2], 1) # alike objects in slots of other numbers
    assert right == {'other': 1, 'other.chance': 8/12, 'same': 1, 'same.chance': 0.5}
    confused = other_slots(x, [0, 1, 0, 1], [1, 2, 1, 2], 1)
    assert confused['other'] == 1 and confused['same'] == 0
    none = other_slots(x, [0, 0, 0, 0], [1, 1, 2, 2], 1)
    assert none['other'] == 0 and np.isnan(none['same']) and all(np.isnan(v) for v in other_slots(x, [0, 1, 0, 1], [-1]*4).values())

def test_entries():
    x, classes, group = points_and_classes(n=80)
    e = score_points(x, {'clip': (classes, group), 'colour': (classes, None)}, 'slots', 'tsne', 5)
    purity, chance = knn_purity(x, classes, 5, group)
    assert e['purity_tsne.slots.clip'] == pytest.approx(np.nanmean(purity)) and e['purity_tsne.slots.clip.chance'] == pytest.approx(np.nanmean(chance))
    assert e['fg_purity_tsne.slots.clip'] == pytest.approx(np.nanmean(purity[classes > 0])) and e['fg_purity_tsne.slots.clip.n'] + e['fg_purity_tsne.slots.clip.nan'] == (classes > 0).sum()
    assert e['purity_tsne.slots.colour.n'] + e['purity_tsne.slots.colour.nan'] == (classes >= 0).sum() and all(isinstance(v, (int, float)) for v in e.values())

def test_pictures():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(60, 8))
    first, again = embed_all([data, data], n_iter=250)
    assert np.array_equal(first, again - again.mean(0) + first.mean(0)) or np.allclose(first, again, atol=1e-6) # the same start
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    assert np.allclose(align(first @ turn + 5, first), first - first.mean(0))
    fig = draw_strip({'a': ([first, again], [rng.integers(-1, 9, 60)]*2, None)}, ['one', 'two'])
    assert len(fig.axes) == 2
    draw_points(fig.axes[0], first, np.full(60, -1)) # nothing shows anything

# ---------------------------------------------------------------- the experiment

CELLS = [c for c in nbformat.read(ROOT/'nbs/experiments/30_embeddings.ipynb', 4).cells if c.cell_type == 'code']

def run_cells(upto, tamper=None, **parameters):
    "The experiment's cells in this process, to the first that holds `upto`; `tamper` changes the names it finds."
    space = {'__name__': 'experiment', 'display': lambda *a, **k: None}
    for cell in CELLS:
        if upto in cell.source and tamper: tamper(space)
        exec(compile(cell.source.replace('from IPython.display import display', ''), f'<cell {cell.id}>', 'exec'), space)
        if 'parameters' in cell.metadata.get('tags', []): space.update(dict(device='cpu', steps=6, every=2, clips=2) | parameters, In=[])
        if upto in cell.source: return space
    raise AssertionError(f'no cell holds {upto!r}')

def snapshot_files(root): return {p.name: p.read_bytes() for p in sorted(Path(root).glob('30_embeddings/*/snapshots/*'))}

@pytest.mark.parametrize('parameters,words', [
    (dict(preset='studdy'), "unknown preset 'studdy'.*Did you mean 'study'"), (dict(data='tetrominoes'), "unknown scene preset 'tetrominoes'"), (dict(clips=7), 'at most the 6'),
    (dict(neighbours=0), 'neighbours must be at least 1, got 0'), (dict(init='boxes'), "unknown init 'boxes'"), (dict(every=-1), 'every must be at least 0, got -1')])
def test_parameters_are_refused_before_anything_is_made(parameters, words, tmp_path):
    pytest.importorskip('IPython')
    with pytest.raises(ValueError, match=words): run_cells('start_run(', runs_dir=str(tmp_path), **parameters)
    assert not list(tmp_path.iterdir())

@pytest.mark.slow
def test_snapshots_survive_a_kill(tmp_path):
    for package in ('IPython', 'mujoco', 'tensorboard'): pytest.importorskip(package)
    from slotnb.batch.run import Stopped
    run_cells('this.require_done(fit(', runs_dir=str(tmp_path/'whole'))
    whole = snapshot_files(tmp_path/'whole')
    assert sorted(whole) == sorted(f'{part}-{step:06d}.npy' for part in ('slots', 'cnn', 'owner') for step in (0, 2, 4, 6))

    def ends_at_four(space):
        keep = space['snapshot']
        def snapshot(step, training):
            keep(step, training)
            if step == 4: os.kill(os.getpid(), signal.SIGTERM)
        space['snapshot'] = snapshot
    with pytest.raises(Stopped): run_cells('this.require_done(fit(', ends_at_four, runs_dir=str(tmp_path/'killed'))
    assert not any('000006' in name for name in snapshot_files(tmp_path/'killed'))
    space = run_cells('this.require_done(fit(', runs_dir=str(tmp_path/'killed'))
    assert space['result'].steps == 6 and snapshot_files(tmp_path/'killed') == whole
    for path in space['this'].folder.glob('snapshots/cnn-000002.npy'): path.unlink()
    with pytest.raises(FileNotFoundError, match='lacks cnn-000002.npy, and the training is past them'): run_cells('this.require_done(fit(', runs_dir=str(tmp_path/'killed'))
