from dataclasses import replace

import pytest
import torch

from nanofuse.bench.checks import DTYPES, assert_accurate, same_bits
from nanofuse.kernels.adamw import AdamWHyper, AdamWTensors, adamw, adamw_ref, adamw_schedule

HYPERS = [
    AdamWHyper(0.3, 0.8, 0.995, 1e-10, 0.001),
    AdamWHyper(0.008, 0.8, 0.96, 1e-10, 0.01),
    AdamWHyper(0.01, 0.96, 0.95, 1e-8, 0.0),
    AdamWHyper(0.05, 0.1, 0.4, 1e-3, 0.3),
]
SIZES = [1, 7, 127, 128, 129, 4097]


def draw(shape, dtype, device, seed=0):
    """A tensor in poisoned memory between guard bytes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(shape, dtype=dtype, device=device)
    return x.copy_(torch.randn(shape, generator=generator))


def state(shapes, dtypes, device):
    """Parameters, gradients and zero moments."""
    pairs = list(zip(shapes, dtypes, strict=True))
    params = [draw(s, d, device, i) for i, (s, d) in enumerate(pairs)]
    grads, first, second = ([torch.empty_like(p).zero_() for p in params] for _ in range(3))
    return params, grads, first, second


def set_gradients(grads, step):
    for i, g in enumerate(grads):
        g.copy_(draw(g.shape, torch.float32, g.device, 100 * step + i) * 10.0 ** (i % 5 - 3))


def test_ten_steps_of_many_tensors_against_torch_in_fp64(device):
    shapes = [*SIZES, (33, 65), (), (2, 3, 5), (0, 4)]
    hypers = [HYPERS[i % len(HYPERS)] for i in range(len(shapes))]
    lists = state(shapes, [torch.float32] * len(shapes), device)
    params, grads, *_ = lists
    same_dtype = [[x.clone() for x in xs] for xs in lists]
    truth = [torch.nn.Parameter(p.double()) for p in params]
    groups = [
        {"params": [p], "lr": h.lr, "betas": (h.beta1, h.beta2), "eps": h.eps}
        | {"weight_decay": h.weight_decay}
        for p, h in zip(truth, hypers, strict=True)
    ]
    theirs = torch.optim.AdamW(groups, foreach=False)
    tensors = AdamWTensors(*lists, hypers)
    for step in range(1, 11):
        lr_mult = 1.0 if step < 6 else 0.25
        set_gradients(grads, step)
        for i, (p, group) in enumerate(zip(truth, theirs.param_groups, strict=True)):
            p.grad = grads[i].double()
            group["lr"] = hypers[i].lr * lr_mult
            h = hypers[i]
            adamw_ref(
                same_dtype[0][i],
                grads[i],
                same_dtype[2][i],
                same_dtype[3][i],
                *(group["lr"], h.beta1, h.beta2, h.eps, h.weight_decay, step),
            )
        theirs.step()
        adamw(tensors, adamw_schedule(lr_mult, step, device))
    for i, p in enumerate(truth[:-1]):
        moments = [theirs.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
        for kind, exact in zip((0, 2, 3), (p, *moments), strict=True):
            name = f"{('param', '', 'm', 'v')[kind]} {tuple(p.shape)}"
            assert_accurate(name, lists[kind][i], same_dtype[kind][i], exact)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_bf16_is_the_exact_step_rounded_once(step, grad_dtype, device):
    hyper = AdamWHyper(0.3, 0.8, 0.995, 1e-10, 0.01)
    param, grad, m = (draw(8192, torch.bfloat16, device, i) for i in range(3))
    v = draw(8192, torch.bfloat16, device, 3).square_()
    grad = grad.to(grad_dtype)
    wide = [x.double() for x in (param, grad, m, v)]
    adamw_ref(*wide, hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, step)
    adamw(AdamWTensors([param], [grad], [m], [v], [hyper]), adamw_schedule(1.0, step, param.device))
    for name, got, exact in (("p", param, wide[0]), ("m", m, wide[2]), ("v", v, wide[3])):
        off = (got != exact.bfloat16()).double().mean().item()
        print(f"{name}: {100 * off:.3f} % of the values not the rounded exact ones")
        assert off <= 0.002  # ties that fp32 arithmetic decides the other way
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-7)


def test_both_dtypes_and_misaligned_tensors_in_one_call(device):
    flat = draw(4 * 300, torch.bfloat16, device)
    odd = [flat[300 * i + 1 : 300 * i + 300] for i in range(4)]  # 2 bytes off alignment
    even = [draw(299, torch.bfloat16, device).copy_(x) for x in odd]
    wide = [draw(299, torch.float32, device).copy_(x) for x in odd]
    odd[3].abs_(), even[3].abs_(), wide[3].abs_()
    lists = [list(x) for x in zip(odd, wide, even, strict=True)]
    edges = flat[::300].clone()
    adamw(AdamWTensors(*lists, [HYPERS[0]] * 3), adamw_schedule(0.5, 2, device))
    assert torch.equal(odd[0], even[0]) and torch.equal(odd[2], even[2])
    torch.testing.assert_close(wide[0].bfloat16(), even[0], rtol=2.0**-7, atol=0)
    assert torch.equal(flat[::300], edges)


def test_wide_loads_where_every_address_allows_them(device):
    """Of 16 bytes; a tensor one element further on has launches of its own."""
    memory = [torch.zeros(64, device=device) for _ in range(4)]
    assert all(x.data_ptr() % 16 == 0 for x in memory)
    for start, width in ((0, 16), (4, 16), (1, 1), (2, 1)):
        tensors = [[x[start : start + 32]] for x in memory]
        (launch,) = AdamWTensors(*tensors, HYPERS[:1]).launches
        assert launch[3].alignment == width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, block, width", [(64, 64, 16), (24, 8, 16), (7, 1, 1)])
def test_rows_that_lie_apart_are_updated_as_contiguous_ones(dtype, columns, block, width, device):
    """Every third row of a table, with its moments in a row; the others stay as they are. Blocks
    are whole, and read 16 bytes at a time where that can be."""
    lists = state([(10, columns)], [dtype], device)
    for x in lists:
        x[0].copy_(draw(x[0].shape, torch.float32, device, 5)).abs_()
    rows, whole = slice(1, None, 3), [[x[0][1::3].clone()] for x in lists]
    before = [lists[i][0].clone() for i in (0, 1)]
    apart = [[x[0][rows] if i < 2 else x[0][rows].clone()] for i, x in enumerate(lists)]
    tensors = AdamWTensors(*apart, HYPERS[:1])
    ((_, _, _, blocks),) = tensors.launches
    assert blocks.elements == block
    assert blocks.alignment == (width if block * dtype.itemsize >= 16 else 1)
    schedule = adamw_schedule(0.5, 3, device)
    adamw(tensors, schedule, clear_grad=True)
    adamw(AdamWTensors(*whole, HYPERS[:1]), schedule)
    for kind in (0, 2, 3):
        assert torch.equal(apart[kind][0], whole[kind][0])
    assert not apart[1][0].any()
    others = torch.arange(10, device=device) % 3 != 1
    assert all(torch.equal(lists[i][0][others], before[i][others]) for i in (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clear", [True, False])
def test_gradients_are_cleared_only_when_asked(clear, dtype, device):
    params, grads, *moments = state([129, 4100], [dtype] * 2, device)
    set_gradients(grads, 1)
    before = [g.clone() for g in grads]
    tensors = AdamWTensors(params, grads, *moments, HYPERS[:2])
    adamw(tensors, adamw_schedule(1.0, 1, device), clear_grad=clear)
    for g, old in zip(grads, before, strict=True):
        assert torch.equal(g, torch.zeros_like(g) if clear else old)


def test_zero_gradients_leave_a_fresh_parameter_alone_in_the_kernel(device):
    lists = state([300], [torch.float32], device)
    before = lists[0][0].clone()
    hyper = replace(HYPERS[0], weight_decay=0.0)
    adamw(AdamWTensors(*lists, [hyper]), adamw_schedule(1.0, 1, device))
    assert torch.equal(lists[0][0], before)
    assert not lists[2][0].any() and not lists[3][0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_where_they_are(bad, device):
    params, grads, *moments = state([300, 300], [torch.float32] * 2, device)
    set_gradients(grads, 1)
    grads[0][17] = bad
    adamw(AdamWTensors(params, grads, *moments, HYPERS[:2]), adamw_schedule(1.0, 1, device))
    finite = params[0].isfinite()
    assert not finite[17] and finite.sum() == 299 and params[1].isfinite().all()


def test_schedule_and_hyper_are_read_from_the_device(device):
    first, second = (state([200], [torch.float32], device) for _ in range(2))
    for lists in (first, second):
        set_gradients(lists[1], 1)
    tensors = AdamWTensors(*first, [HYPERS[0]])
    schedule = adamw_schedule(0.0, 7, device)
    schedule.copy_(adamw_schedule(0.5, 1, "cpu"))
    tensors.hyper[0, 0] = 0.6
    adamw(tensors, schedule)
    hyper = replace(HYPERS[0], lr=0.6)
    adamw(AdamWTensors(*second, [hyper]), adamw_schedule(0.5, 1, device))
    assert torch.equal(first[0][0], second[0][0])


def test_two_runs_give_the_same_bits(device):
    def run():
        lists = state([129, 5000], [torch.float32, torch.bfloat16], device)
        set_gradients(lists[1], 1)
        adamw(AdamWTensors(*lists, HYPERS[:2]), adamw_schedule(1.0, 1, device))
        return [x for xs in lists for x in xs]

    same_bits(run)


def test_what_does_not_fit_is_refused(device):
    def build(params=None, grads=None, first=None, second=None, hypers=None):
        x = torch.zeros(4, 6, device=device)
        lists = [
            [x.clone()] if given is None else given for given in (params, grads, first, second)
        ]
        return AdamWTensors(*lists, [HYPERS[0]] if hypers is None else hypers)

    x = torch.zeros(4, 6, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        build(params=[torch.zeros(6, 4, device=device).t()])
    with pytest.raises(ValueError, match="contiguous"):  # rows that share elements
        build(params=[torch.zeros(24, device=device).as_strided((4, 6), (5, 1))])
    with pytest.raises(ValueError, match="another shape"):
        build(grads=[x[:2]])
    with pytest.raises(ValueError, match="parameter's dtype"):
        build(second=[x.bfloat16()])
    with pytest.raises(ValueError, match="fp32 or bf16"):
        build(params=[x.double()])
    with pytest.raises(ValueError, match="betas"):
        build(hypers=[replace(HYPERS[0], beta2=1.0)])
    with pytest.raises(ValueError, match="per parameter"):
        build(grads=[x, x])
    with pytest.raises(ValueError, match="at least one"):
        AdamWTensors([], [], [], [], [])
    with pytest.raises(ValueError, match="schedule"):
        adamw(build(), torch.zeros(3, device=device))


def test_a_gradient_that_is_another_tensor_is_refused(device):
    param = torch.nn.Parameter(torch.ones(10, device=device))
    param.grad = torch.ones(10, device=device)
    moments = [[torch.zeros(10, device=device)] for _ in range(2)]
    tensors = AdamWTensors([param], [param.grad], *moments, HYPERS[:1])
    schedule = adamw_schedule(1.0, 1, device)
    adamw(tensors, schedule, clear_grad=True)
    param.sum().backward()  # accumulates in place
    adamw(tensors, schedule)
    param.grad = torch.ones(10, device=device)
    with pytest.raises(ValueError, match="registered gradient"):
        adamw(tensors, schedule)
    param.data = torch.ones(10, device=device)
    with pytest.raises(ValueError, match="moved"):
        adamw(tensors, schedule)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(device):
    count = 2**31 + 4099
    lists = [[torch.zeros(count, dtype=torch.bfloat16, device=device)] for _ in range(4)]
    places = [0, 2**31 - 1, 2**31, count - 1]
    lists[1][0][places] = 1.0
    hyper = AdamWHyper(0.5, 0.5, 0.5, 1e-10, 0.0)
    adamw(AdamWTensors(*lists, [hyper]), adamw_schedule(1.0, 1, device), clear_grad=True)
    param, grad, m, v = (x[0] for x in lists)
    assert param[places].tolist() == [-0.5] * 4
    assert m[places].tolist() == [0.5] * 4 and v[places].tolist() == [0.5] * 4
    assert sum(int(x.count_nonzero()) for x in param.split(2**28)) == 4
    assert not grad[places].any()


@pytest.mark.cuda
def test_a_cuda_graph_follows_the_schedule(device):
    captured, eager = (state([5000, 70], [torch.bfloat16, torch.float32], device) for _ in range(2))
    schedule = adamw_schedule(0.0, 1, device)
    graphed, plain = (AdamWTensors(*lists, HYPERS[:2]) for lists in (captured, eager))
    adamw(graphed, schedule)  # compiles; zero gradients and lr leave the state alone
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw(graphed, schedule)
    for step in (1, 2, 3):
        for lists in (captured, eager):
            set_gradients(lists[1], step)
        schedule.copy_(adamw_schedule(1 / step, step, "cpu"))
        graph.replay()
        adamw(plain, adamw_schedule(1 / step, step, device))
    for a, b in zip(captured, eager, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.8, 0.96), (0.8, 0.995), (0.96, 0.95)])
def test_ten_steps_equal_torch_adamw(betas, weight_decay):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    twin = torch.nn.Parameter(p.clone())
    theirs = torch.optim.AdamW([twin], lr=0.01, betas=betas, eps=1e-10, weight_decay=weight_decay)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 11):
        g = torch.randn(7, 5, dtype=torch.float64, generator=generator)
        twin.grad = g.clone()
        theirs.step()
        adamw_ref(p, g, m, v, 0.01, *betas, 1e-10, weight_decay, step)
        torch.testing.assert_close(p, twin.detach(), rtol=1e-12, atol=1e-12)


def test_bf16_storage_rounds_once():
    """Arithmetic is fp32: the result is the fp32 step from the stored bf16 values, rounded once."""
    p, g, m = (torch.randn(64).bfloat16() for _ in range(3))
    v = torch.rand(64).bfloat16()
    wide = [x.float() for x in (p, g, m, v)]
    adamw_ref(*wide, 0.01, 0.8, 0.995, 1e-10, 0.01, 3)
    adamw_ref(p, g, m, v, 0.01, 0.8, 0.995, 1e-10, 0.01, 3)
    for stored, exact in ((p, wide[0]), (m, wide[2]), (v, wide[3])):
        assert torch.equal(stored, exact.bfloat16())


def test_zero_gradients_leave_a_fresh_parameter_alone():
    p = torch.randn(5)
    before = p.clone()
    adamw_ref(p, torch.zeros(5), torch.zeros(5), torch.zeros(5), 0.1, 0.8, 0.95, 1e-10, 0.0, 1)
    assert torch.equal(p, before)
