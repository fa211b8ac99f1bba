"The linear recurrence: every backend against its definition, gradients, precision, cost, and what is refused."
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slotnb.layers.recurrence import linear_recurrence

LENGTHS = (1, 2, 3, 5, 17, 64, 257)

def example(T, P=4, lanes=(2, 3), gates='constant', dtype=torch.complex128):
    torch.manual_seed(T)
    shape = {'constant': (P,), 'per lane': (*lanes, P), 'per time': (T, 1, 1, P), 'per time and lane': (T, *lanes, P)}[gates]
    a = torch.polar(0.4 + 0.59*torch.rand(shape, dtype=torch.float64), 6.3*torch.rand(shape, dtype=torch.float64))
    b, x0 = (torch.randn(*s, *lanes, P, dtype=torch.complex128) for s in ((T,), ()))
    return [v.to(dtype) for v in (a, b, x0)]

GATES = ('constant', 'per lane', 'per time', 'per time and lane')

def by_hand(a, b, x0, reverse=False): # numbers, one after the other
    full = a.expand_as(b) if a.ndim == b.ndim else a.expand(b.shape[1:]).expand_as(b)
    x, out = x0, [None]*len(b)
    for t in (reversed(range(len(b))) if reverse else range(len(b))):
        x = full[t]*x + b[t]
        out[t] = x
    return torch.stack(out)

@pytest.mark.parametrize('gates', GATES)
@pytest.mark.parametrize('backend', ['loop', 'tree', 'reference'])
def test_every_backend_is_the_definition(backend, gates):
    for T in LENGTHS:
        a, b, x0 = example(T, gates=gates)
        for start in (x0, None):
            for reverse in (False, True):
                expected = by_hand(a, b, torch.zeros_like(x0) if start is None else start, reverse)
                x, last = linear_recurrence(a, b, start, reverse, backend)
                assert (x - expected).abs().max() < 1e-12*expected.abs().max(), (T, reverse)
                assert torch.equal(last, x[0 if reverse else -1])

@pytest.mark.parametrize('gates', GATES)
@pytest.mark.parametrize('reverse', [False, True])
def test_gradients(gates, reverse):
    a, b, x0 = (v.requires_grad_() for v in example(5, P=2, lanes=(2, 2), gates=gates))
    assert torch.autograd.gradcheck(lambda a, b, x0: linear_recurrence(a, b, x0, reverse), (a, b, x0))
    for T in (1, 2, 17):
        inputs, got = [v.requires_grad_() for v in example(T, gates=gates)], {}
        torch.manual_seed(0)
        w, v = torch.randn_like(inputs[1]), torch.randn_like(inputs[2])
        for backend in ('loop', 'tree', 'reference'):
            x, last = linear_recurrence(*inputs, reverse, backend)
            got[backend] = torch.autograd.grad((x*w).real.sum() + (last*v).imag.sum(), inputs)
        for backend in ('loop', 'tree'):
            for g, e in zip(got[backend], got['reference']): assert g.shape == e.shape and (g - e).abs().max() <= 1e-10*max(1, e.abs().max())

def test_gradients_of_part_of_the_outputs_and_inputs():
    a, b, x0 = (v.requires_grad_() for v in example(6))
    for of in (lambda x, last: last, lambda x, last: x[2]):
        for wanted in ((a,), (b,), (x0,), (a, x0)):
            loop, reference = ([g for g in torch.autograd.grad(of(*linear_recurrence(a, b, x0, backend=k)).real.sum(), wanted)] for k in ('loop', 'reference'))
            assert all(torch.allclose(g, e, atol=1e-12) for g, e in zip(loop, reference))
    with pytest.raises(RuntimeError, match='once_differentiable|twice'):
        g, = torch.autograd.grad(linear_recurrence(a, b)[0].real.square().sum(), b, create_graph=True)
        g.real.sum().backward()

def test_awkward_memory():
    a, b, x0 = example(9)
    expected = linear_recurrence(a, b, x0, backend='reference')[0]
    strided = b.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous() and torch.equal(strided, b)
    assert (linear_recurrence(a, strided, x0)[0] - expected).abs().max() < 1e-12
    c = b.conj().resolve_conj().conj() # a lazy conjugate
    assert c.is_conj() and (linear_recurrence(a, c, x0)[0] - expected).abs().max() < 1e-12
    one = b[:1].expand(9, -1, -1, -1)
    assert (linear_recurrence(a, one)[0] - linear_recurrence(a, one, backend='reference')[0]).abs().max() < 1e-12
    with torch.inference_mode(): assert (linear_recurrence(a, b, x0)[0] - expected).abs().max() < 1e-12
    before = b.clone()
    linear_recurrence(a, b, x0)
    assert torch.equal(b, before) # the input is not written to

def test_real_numbers():
    torch.manual_seed(0)
    a, b, x0 = (v.requires_grad_() for v in (torch.rand(3, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)))
    assert torch.autograd.gradcheck(linear_recurrence, (a, b, x0))
    mixed, _ = linear_recurrence(example(6, P=3)[0], b.detach())
    assert mixed.dtype == torch.complex128

def test_precision_over_a_thousand_steps():
    torch.manual_seed(0)
    a = torch.polar(torch.exp(-torch.empty(32).uniform_(5e-4, 5e-2)), 6.3*torch.rand(32)) # as ConvS5 begins
    b = torch.randn(1024, 64, 32, dtype=torch.complex64)
    exact, _ = linear_recurrence(a, b, backend='reference')
    assert exact.dtype == torch.complex128
    for backend, limit in (('loop', 2e-5), ('tree', 5e-5)):
        x, last = linear_recurrence(a, b, backend=backend)
        assert x.dtype == last.dtype == torch.complex64 and (x - exact).abs().max() < limit*exact.abs().max()

def test_never_below_fp32():
    a, b, x0 = example(4, dtype=torch.complex64)
    for backend in ('loop', 'tree'):
        plain = linear_recurrence(a, b, x0, backend=backend)[0]
        with torch.autocast('cpu', torch.bfloat16): assert torch.equal(linear_recurrence(a, b, x0, backend=backend)[0], plain)
        low = linear_recurrence(a.real.bfloat16(), b.real.bfloat16(), backend=backend)[0]
        assert low.dtype == torch.float32 and torch.equal(low, linear_recurrence(a.real.bfloat16().float(), b.real.bfloat16().float(), backend=backend)[0])

class Written(TorchDispatchMode):
    "Counts the numbers that operations return, views aside."
    numbers = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.numbers += sum(o.numel() for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor))
        return out

def indexed(a, b): # the trap: every b[t] has a gradient of the size of b
    x, out = torch.zeros_like(b[0]), []
    for t in range(len(b)):
        x = a*x + b[t]
        out.append(x)
    return torch.stack(out), x

def test_backward_is_linear_in_time():
    def written(fn, T):
        a, b, _ = example(T)
        x, _ = fn(a.requires_grad_(), b.requires_grad_())
        with Written() as count: torch.autograd.grad(x, (a, b), torch.ones_like(x))
        return count.numbers
    for gates in ('loop', 'tree'): assert written(lambda a, b: linear_recurrence(a, b, backend=gates), 512) < 2.2*written(lambda a, b: linear_recurrence(a, b, backend=gates), 256)
    assert written(linear_recurrence, 256) < 6*example(256)[1].numel()
    assert written(indexed, 128) > 3*written(indexed, 64) # the measure sees it

def test_keeps_one_sequence():
    kept = []
    a, b, x0 = (v.requires_grad_() for v in example(64))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): linear_recurrence(a, b, x0)
    assert sum(kept) == b.numel() + a.numel() + x0.numel()

def test_free_run_and_bounded_input():
    torch.manual_seed(0)
    a = torch.polar(torch.tensor([0.9995, 0.999, 0.99, 0.95], dtype=torch.float64), 6.3*torch.rand(4, dtype=torch.float64))
    x = linear_recurrence(a, torch.zeros(100_000, 4, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128))[0].abs()
    alive = x[:-1] > 1e-200
    assert (x[1:] < x[:-1])[alive].all() and alive[:, 0].all()
    b = torch.randn(5000, 4, dtype=torch.complex128)
    bound = b.abs().amax(0)/(1 - a.abs())
    assert (linear_recurrence(a, b)[0].abs() <= bound).all()

@pytest.mark.parametrize('wrong, match', [
    (lambda a, b, x0: linear_recurrence(a, b[:0], x0), 'T at least 1'), (lambda a, b, x0: linear_recurrence(a[:-1], b), r'a must broadcast to \(2, 3, 4\)'),
    (lambda a, b, x0: linear_recurrence(a.expand(3, 1, 1, 4), b), r'got \(3, 1, 1, 4\)'), (lambda a, b, x0: linear_recurrence(a.expand(1, 1, 1, 1, 4), b), 'broadcast'),
    (lambda a, b, x0: linear_recurrence(a, b, x0[:1]), r'x0 must be \(2, 3, 4\)'), (lambda a, b, x0: linear_recurrence(a, b.real.long()), 'int64'),
    (lambda a, b, x0: linear_recurrence(a, b, 0.), 'x0 must be a complex'), (lambda a, b, x0: linear_recurrence(a, b, backend='scan'), 'unknown backend')])
def test_refusals(wrong, match):
    with pytest.raises(ValueError, match=match): wrong(*example(5))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_gives_the_same():
    cpu = [v.requires_grad_() for v in example(33, dtype=torch.complex64)]
    gpu = [v.detach().to('cuda').requires_grad_() for v in cpu]
    for backend in ('loop', 'tree'):
        (x, _), (y, _) = linear_recurrence(*cpu, backend=backend), linear_recurrence(*gpu, backend=backend)
        assert torch.allclose(x, y.cpu(), atol=1e-5)
        for g, e in zip(torch.autograd.grad(y.real.sum(), gpu), torch.autograd.grad(x.real.sum(), cpu)): assert torch.allclose(g.cpu(), e, atol=1e-4, rtol=1e-4)
