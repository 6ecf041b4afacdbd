"""linear_cross_entropy: both paths, all three gradients, against fp64."""

import importlib
import itertools

import pytest
import torch
from fasttrain_kernels._dispatch import use_triton
from fasttrain_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

MODULE = importlib.import_module("fasttrain_kernels.linear_cross_entropy")
CPU = torch.device("cpu")
SMALL_CHUNK = 0.002  # MiB: a handful of rows, so that there are many chunks


def half(device: torch.device) -> torch.dtype:
    """The interpreter truncates bf16 where a GPU rounds: there fp16 stands for it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def check(actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Error at most twice that of plain torch in the same dtype, plus 1e-5 (1e-3 in half)."""
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    if exact.numel() == 0:
        return
    slack = 1e-3 if dtype in (torch.float16, torch.bfloat16) else 1e-5
    bound = 2 * (plain.double() - exact).abs().max() + slack
    error = (actual.double() - exact).abs().max()
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def outputs(op, operands, targets, upstream=1.0, needs=(True, True, True), **options):
    """Loss, further outputs and the gradients of those of (hidden, weight, bias) that need one."""
    leaves = [
        None if x is None else x.detach().clone().requires_grad_(need)
        for x, need in zip(operands, needs, strict=True)
    ]
    hidden, weight, bias = leaves
    result = op(hidden, weight, targets, bias=bias, **options)
    result = result if isinstance(result, tuple) else (result,)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = torch.autograd.grad(result[0].sum() * upstream, wanted) if wanted else ()
    return (*result, *grads)


def compare(operands, targets, device, **options) -> None:
    def cast(to):
        return {k: to(v) if isinstance(v, Tensor) else v for k, v in options.items()}

    def each(to):
        return [None if x is None else to(x) for x in operands]

    op, reference = linear_cross_entropy, linear_cross_entropy_reference
    exact = outputs(reference, each(Tensor.double), targets, **cast(Tensor.double))
    plain = outputs(reference, operands, targets, **options)
    ours = outputs(
        op, each(lambda x: x.to(device)), targets.to(device), **cast(lambda v: v.to(device))
    )
    for a, b, c in zip(ours, exact, plain, strict=True):
        check(a.detach().cpu(), b.detach(), c.detach(), operands[0].dtype)


@settings(max_examples=30)
@given(
    options=st.fixed_dictionaries(
        {
            "reduction": st.sampled_from(["mean", "sum", "none"]),
            "label_smoothing": st.sampled_from([0.0, 0.1]),
            "z_loss": st.sampled_from([0.0, 1e-2]),
            "softcap": st.sampled_from([None, 5.0]),
            "upstream": st.sampled_from([1.0, 0.37]),
            "max_chunk_mib": st.sampled_from([None, SMALL_CHUNK, 1e-6]),
        }
    ),
    shape=st.tuples(
        st.sampled_from([0, 1, 3, 17]),
        st.sampled_from([1, 8, 20]),
        st.sampled_from([1, 7, 16, 131]),
    ),
    width=st.sampled_from(["fp32", "half", "fp64"]),
    weights=st.tuples(st.booleans(), st.booleans()),
    # which of hidden, weight and bias is trained: all, and each frozen or trained alone
    needs=st.sampled_from([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)]),
    has_bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_fp64(device, options, shape, width, weights, needs, has_bias, ignored, seed):
    torch.manual_seed(seed)
    n_rows, dim, n_cols = shape
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "half": half(device)}[width]
    operands = [
        torch.randn(n_rows, dim).to(dtype),
        (torch.randn(n_cols, dim) / dim**0.5).to(dtype),
        torch.randn(n_cols).to(dtype) if has_bias else None,
    ]
    targets = torch.randint(0, n_cols, (n_rows,))
    targets[torch.rand(n_rows) < ignored] = -100
    if weights[0]:
        options = {**options, "class_weight": torch.rand(n_cols)}
    if weights[1]:
        options = {**options, "token_weight": torch.rand(n_rows)}
    needs = tuple(bool(need) for need in needs)
    compare(operands, targets, device, needs=needs, return_lse=True, **options)


def test_batches_sequences_and_strides(device):
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 40)[..., ::2][..., :16]
    weight = torch.randn(16, 50).t()
    targets = torch.randint(0, 50, (2, 6))[:, ::2]
    compare(
        [hidden, weight, None], targets, device,
        reduction="none", return_lse=True, return_accuracy=True,
    )  # fmt: skip


def test_sum_divided_by_a_tensor(device):
    """How a trainer uses it: the sum over a micro-batch, divided by the tokens of the step."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, 16), torch.randn(33, 16)
    targets = torch.randint(0, 33, (9,))
    results = []
    for op, where in ((linear_cross_entropy, device), (linear_cross_entropy_reference, CPU)):
        h, w = (x.to(where).detach().requires_grad_() for x in (hidden, weight))
        loss = op(h, w, targets.to(where), reduction="sum") / torch.tensor(36.0, device=where)
        loss.backward()
        results.append([x.detach().cpu() for x in (loss, h.grad, w.grad)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_strided_and_expanded_incoming_gradients(device):
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 8), torch.randn(21, 8)
    targets = torch.randint(0, 21, (6,))
    for upstream in (torch.rand(12, 2)[::2, 1], torch.tensor(3.0).expand(6)):
        results = []
        for op, where in ((linear_cross_entropy, device), (linear_cross_entropy_reference, CPU)):
            h, w = (x.to(where).detach().requires_grad_() for x in (hidden, weight))
            losses = op(h, w, targets.to(where), reduction="none")
            grads = torch.autograd.grad(losses, (h, w), upstream.to(where))
            results.append([g.cpu() for g in grads])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_retained_graph_and_double_use(device):
    torch.manual_seed(3)
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(21, 8, device=device, requires_grad=True)
    targets = torch.randint(0, 21, (6,), device=device)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    third = torch.autograd.grad(3 * loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    both = sum(linear_cross_entropy(hidden, weight, targets) for _ in range(2))
    second = torch.autograd.grad(both, (hidden, weight))
    for one, two, three in zip(kept, second, third, strict=True):
        torch.testing.assert_close(three, 3 * one)
        torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_products_and_not_the_gradient(dtype):
    torch.manual_seed(4)
    hidden = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(33, 16, requires_grad=True)
    targets = torch.randint(0, 33, (8,))
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, targets, max_chunk_mib=SMALL_CHUNK)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    with torch.no_grad():
        same = linear_cross_entropy(hidden.to(dtype), weight, targets, max_chunk_mib=SMALL_CHUNK)
    assert torch.equal(loss, same)
    operands = [hidden.detach().to(dtype), weight.detach(), None]
    compare(operands, targets, CPU, max_chunk_mib=SMALL_CHUNK)


def test_weight_gradient_does_not_drift_over_many_chunks(device):
    """Accumulated in half precision, 64 chunks would lose bits; in fp32 they do not."""
    dtype = half(device)
    hidden = torch.full((64, 4), 1.0, dtype=dtype, device=device)
    weight = torch.zeros(3, 4, dtype=dtype, device=device, requires_grad=True)
    targets = torch.zeros(64, dtype=torch.long, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", max_chunk_mib=1e-6)
    loss.backward()
    exact = torch.tensor([64 * (1 / 3 - 1), 64 / 3, 64 / 3]).unsqueeze(1).expand(3, 4)
    torch.testing.assert_close(weight.grad.cpu().float(), exact, rtol=1e-3, atol=0)


def test_ignored_rows_reach_no_product(monkeypatch):
    rows = []
    real = MODULE.cross_entropy_rows
    monkeypatch.setattr(
        MODULE,
        "cross_entropy_rows",
        lambda x, *a, **k: rows.append(x.shape[0]) or real(x, *a, **k),
    )
    targets = torch.tensor([-100, 3, -100, 1, -100])
    hidden = torch.randn(5, 4, requires_grad=True)
    linear_cross_entropy(hidden, torch.randn(7, 4), targets).backward()
    assert sum(rows) == 2
    assert hidden.grad.abs().sum(dim=1).gt(0).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("target", [21, -1, 2**40])
def test_a_target_out_of_range_is_nan_on_a_gpu_and_an_error_on_a_cpu(device, target):
    hidden = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(21, 8, device=device, requires_grad=True)
    targets = torch.tensor([5, target, 7], device=device)
    if not use_triton(hidden):
        message = (
            rf"linear_cross_entropy: target {target} .*row 1 .*\[0, 21\).*ignore_index={target}"
        )
        for options in ({}, {"reduction": "none"}, {"max_chunk_mib": SMALL_CHUNK}):
            with pytest.raises(IndexError, match=message):
                linear_cross_entropy(hidden, weight, targets, **options)
        return
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad.isnan().any(dim=1).tolist() == [False, True, False]
    assert weight.grad.isnan().any()


def test_all_targets_ignored(device):
    hidden = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(21, 8, device=device, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), -100, device=device))
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_reruns_agree_bit_for_bit(device):
    torch.manual_seed(5)
    operands = [torch.randn(17, 8, device=device), torch.randn(131, 8, device=device), None]
    targets = torch.randint(0, 131, (17,), device=device)
    first, second = (
        outputs(linear_cross_entropy, operands, targets, max_chunk_mib=SMALL_CHUNK)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_gradient_is_computed_in_evaluation(device, monkeypatch):
    wanted = []
    real = MODULE.compute_linear_cross_entropy
    monkeypatch.setattr(
        MODULE, "compute_linear_cross_entropy", lambda *a, **k: wanted.append(a[6]) or real(*a, **k)
    )
    hidden = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(21, 8, device=device)
    targets = torch.tensor([0, 0, 0], device=device)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, max_chunk_mib=1)
    linear_cross_entropy(hidden, weight, targets, max_chunk_mib=1)
    assert wanted == [(False, False, False), (True, False, False)]


def test_chunks_keep_to_the_budget():
    hidden = torch.empty(4096, 8)
    for mib in (1, 16, 112):
        n_bytes = MODULE.chunk_rows(hidden, 50304, mib) * 50304 * 4
        assert mib * 2**20 / 2 < n_bytes <= mib * 2**20
    assert MODULE.chunk_rows(hidden, 10**9, 1) == 1


def test_gradcheck():
    torch.manual_seed(6)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 4, 0])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h, w, targets, bias=b, reduction=reduction, label_smoothing=0.1, z_loss=0.1,
                softcap=3.0, max_chunk_mib=1e-6,
            ),
            (hidden, weight, bias),
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 40), (40, 4100)], ids=["one strip", "three strips"])
def test_eager_and_the_registered_op_are_one(shape):
    """Plain eager mode goes past the dispatcher; what is traced goes through it."""
    torch.manual_seed(7)
    operands = [torch.randn(shape[0], 8), torch.randn(shape[1], 8), torch.randn(shape[1])]
    targets = torch.randint(0, shape[1], (shape[0],))
    eager = outputs(linear_cross_entropy, operands, targets, max_chunk_mib=112)
    with FlopCounterMode(display=False):  # anything that watches the dispatcher
        registered = outputs(linear_cross_entropy, operands, targets, max_chunk_mib=112)
    plain = outputs(linear_cross_entropy_reference, operands, targets)
    assert all(torch.equal(a, b) for a, b in zip(eager, registered, strict=True))
    torch.testing.assert_close(eager, plain, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused():
    hidden = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(21, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]), max_chunk_mib=1)
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"linear_cross_entropy .*\bonce\b.*linear_cross_entropy_reference"
    ):
        grad.sum().backward()


@pytest.mark.parametrize("reduce", [True, False])
def test_opcheck(device, reduce):
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    weight = torch.randn(19, 8, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 18, 0], device=device)
    options = (None, None, None, -100, 0.1, 0.1, 0.0, SMALL_CHUNK)
    flags = (reduce, reduce, reduce, False, True)
    op = torch.ops.fasttrain_kernels.linear_cross_entropy_forward.default
    results = opcheck(op, (hidden, weight, None, targets, *options, *flags))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mib", [None, SMALL_CHUNK], ids=["at once", "in chunks"])
def test_compiles_to_one_graph(device, backend, mib):
    torch.manual_seed(7)
    hidden, weight = torch.randn(6, 8, device=device), torch.randn(33, 8, device=device)
    targets = torch.randint(0, 33, (6,), device=device)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h * 2, w, targets, reduction="sum", max_chunk_mib=mib) / 3

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = run(h, w)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("unit", [False, True])
def test_a_unit_gradient_is_not_multiplied_with_that_of_the_weight(unit):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    torch.manual_seed(7)
    hidden, weight = torch.randn(6, 8), torch.randn(33, 8)
    targets, products = torch.randint(0, 33, (6,)), []

    def keep(graph, inputs):
        nodes = [n for n in graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
        products.extend(tuple(n.meta["val"].shape) for n in nodes)
        return make_boxed_func(graph.forward)

    def step(h, w):
        options = {"reduction": "sum", "max_chunk_mib": SMALL_CHUNK, "unit_gradient": unit}
        return linear_cross_entropy(h, w, targets, **options)

    torch._dynamo.reset()
    grads = []
    backend = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), bw_compiler=keep)
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        grads.append(torch.autograd.grad(run(*leaves), leaves))
    assert products == [(6, 8)] if unit else sorted(products) == [(6, 8), (33, 8)]
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


def test_samples_of_torch(device):
    """PyTorch's own sample inputs, loss and gradients, as far as they have class indices."""
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    if not (infos := [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    every = 5 if use_triton(torch.empty(0, device=device)) else 1  # 0.1 s each when interpreted
    seen = 0
    for info in infos:
        samples = info.sample_inputs("cpu", torch.float32, requires_grad=True)
        for sample in itertools.islice(samples, 0, None, every):
            hidden, (weight, targets), options = sample.input, sample.args, dict(sample.kwargs)
            if targets.dtype.is_floating_point or weight.dim() > 2:
                continue
            bias, class_weight = options.get("linear_bias"), options.get("weight")
            leaves = [x for x in (hidden, weight, bias) if x is not None]
            theirs = torch.nn.functional.linear_cross_entropy(hidden, weight, targets, **options)
            grads = torch.autograd.grad(theirs.sum(), leaves)
            ignore_index = options.get("ignore_index")
            ours = linear_cross_entropy(
                hidden.to(device), weight.to(device), targets.to(device),
                bias=None if bias is None else bias.to(device),
                class_weight=None if class_weight is None else class_weight.to(device),
                ignore_index=-100 if ignore_index is None else ignore_index,
                reduction=options.get("reduction", "mean"),
                label_smoothing=options.get("label_smoothing", 0.0),
                max_chunk_mib=SMALL_CHUNK,
            )  # fmt: skip
            result = [ours, *torch.autograd.grad(ours.sum(), leaves)]
            for mine, other in zip(result, [theirs, *grads], strict=True):
                # Where nothing counts, torch says NaN and this op 0.
                torch.testing.assert_close(mine.cpu(), other.nan_to_num(0.0), rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen >= 50 / every


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(21, 9)}, r"hidden .*weight .*\(3, 8\).*\(21, 9\)"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets .*\(3,\).*\(4,\)"),
        ({"bias": torch.randn(20)}, r"bias .*\(21,\).*\(20,\)"),
        ({"max_chunk_mib": 0}, "max_chunk_mib .* 0"),
    ],
)
def test_errors_name_value_and_remedy(change, message):
    arguments = {
        "hidden": torch.randn(3, 8),
        "weight": torch.randn(21, 8),
        "targets": torch.zeros(3, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)
