"""cross_entropy: both paths against fp64, with the error of plain torch as the yardstick."""

import contextlib
import importlib

import pytest
import torch
from fasttrain_kernels._dispatch import use_triton
from fasttrain_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

# The package exports the function under the module's name.
MODULE = importlib.import_module("fasttrain_kernels.cross_entropy")
CPU = torch.device("cpu")
if not torch.cuda.is_available():
    # Triton imports this at the first launch, and then it must be told to interpret.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.experimental.gluon")


def half(device: torch.device) -> torch.dtype:
    """The interpreter truncates bf16 where a GPU rounds: there fp16 stands for it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def check(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Error at most twice that of plain torch in the same dtype, plus 1e-5 (1e-3 in half)."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    slack = 1e-3 if plain.dtype in (torch.float16, torch.bfloat16) else 1e-5
    bound = 2 * (plain.double() - exact).abs().max() + slack
    error = (actual.double() - exact).abs().max()
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def outputs(op, logits: Tensor, targets: Tensor, upstream: float = 1.0, **options):
    leaf = logits.detach().clone().requires_grad_()
    result = op(leaf * 1, targets, **options)
    result = result if isinstance(result, tuple) else (result,)
    (result[0].sum() * upstream).backward()
    return (*result, leaf.grad)


def compare(logits: Tensor, targets: Tensor, device: torch.device, **options) -> None:
    def cast(to):
        return {k: to(v) if isinstance(v, Tensor) else v for k, v in options.items()}

    exact = outputs(cross_entropy_reference, logits.double(), targets, **cast(lambda v: v.double()))
    plain = outputs(cross_entropy_reference, logits, targets, **options)
    moved = cast(lambda v: v.to(device))
    ours = outputs(cross_entropy, logits.to(device), targets.to(device), **moved)
    for a, b, c in zip(ours, exact, plain, strict=True):
        check(a.cpu(), b, c)


OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "softcap": st.sampled_from([None, 5.0]),
        "inplace": st.booleans(),
        "upstream": st.sampled_from([1.0, 0.37]),
    }
)


@settings(max_examples=30)
@given(
    options=OPTIONS,
    n_rows=st.sampled_from([0, 1, 3, 9]),
    n_cols=st.sampled_from([1, 2, 7, 16, 131, 1000]),
    width=st.sampled_from(["fp32", "half", "fp64"]),
    weights=st.tuples(st.booleans(), st.booleans()),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_fp64(device, options, n_rows, n_cols, width, weights, ignored, seed):
    torch.manual_seed(seed)
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "half": half(device)}[width]
    logits = (torch.randn(n_rows, n_cols) * 3).to(dtype)
    targets = torch.randint(0, n_cols, (n_rows,))
    targets[torch.rand(n_rows) < ignored] = -100
    if weights[0]:
        options = {**options, "class_weight": torch.rand(n_cols)}
    if weights[1]:
        options = {**options, "token_weight": torch.rand(n_rows)}
    compare(logits, targets, device, return_lse=True, return_accuracy=True, **options)


@pytest.mark.parametrize("n_cols", [16000, 50257, 70000])  # one pass; two with and without edges
def test_vocabularies_of_language_models(device, n_cols):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, n_cols), torch.randint(0, n_cols, (3,))
    compare(logits, targets, device, return_lse=True, return_accuracy=True)


def test_two_passes_with_every_option(triton_device, monkeypatch):
    """Widths that the interpreter runs quickly take the path of wide rows."""
    for name in ("SINGLE_PASS_BYTES", "SINGLE_PASS_BYTES_LEAST"):
        monkeypatch.setattr(MODULE, name, 0)
    torch.manual_seed(1)
    for n_cols in (1, 131, 5003):
        logits, targets = torch.randn(5, n_cols), torch.randint(0, n_cols, (5,))
        targets[2] = -100
        compare(
            logits, targets, triton_device, label_smoothing=0.1, z_loss=0.01, softcap=4.0,
            class_weight=torch.rand(n_cols), token_weight=torch.rand(5),
            return_lse=True, return_accuracy=True,
        )  # fmt: skip


def test_leading_dimensions_and_strides(device):
    torch.manual_seed(2)
    wide = torch.randn(2, 3, 40)
    targets = torch.randint(0, 17, (2, 6))[:, ::2]
    for logits in (wide[..., :17], wide[..., 1:18], wide[..., ::2][..., :17]):
        compare(logits, targets, device, reduction="none", return_lse=True)


def test_row_offsets_beyond_int32(triton_device, tmp_path):
    """Row 1 starts 2³¹ elements into a buffer of which two rows are ever touched."""
    size = 2**31 + 64
    if triton_device.type == "cuda":
        storage = torch.empty(size, dtype=torch.float16, device=triton_device)
    else:  # a sparse file: it occupies the pages that are written
        file = str(tmp_path / "logits")
        storage = torch.from_file(file, shared=True, size=size, dtype=torch.float16)
    logits = torch.as_strided(storage, (2, 16), (2**31, 1))
    values = torch.randn(2, 16, dtype=torch.float16)
    logits.copy_(values)
    targets = torch.tensor([3, 5])
    losses = cross_entropy(logits, targets.to(triton_device), reduction="none")
    exact = cross_entropy_reference(values.double(), targets, reduction="none")
    torch.testing.assert_close(losses.cpu().double(), exact, rtol=0, atol=1e-5)


def test_all_targets_ignored(device):
    logits = torch.randn(4, 131, device=device, requires_grad=True)
    targets = torch.full((4,), -100, device=device)
    for reduction in ("mean", "sum", "none"):
        loss, accuracy = cross_entropy(logits, targets, reduction=reduction, return_accuracy=True)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.abs().sum() == 0
        assert accuracy.abs().sum() == 0
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("target", [131, -1, 2**40, -(2**40)])
def test_a_target_out_of_range_is_nan_on_a_gpu_and_an_error_on_a_cpu(device, target):
    logits = torch.randn(3, 131, device=device, requires_grad=True)
    targets = torch.tensor([5, target, 7], device=device)
    if not use_triton(logits):
        message = rf"cross_entropy: target {target} .*row 1 .*\[0, 131\).*ignore_index={target}"
        for options in ({}, {"reduction": "none"}, {"inplace": True}):
            with pytest.raises(IndexError, match=message):
                cross_entropy(logits * 1, targets, **options)
        return
    losses = cross_entropy(logits, targets, reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().any(dim=1).tolist() == [False, True, False]
    assert cross_entropy(logits, targets).isnan()


def test_infinite_logits(device):
    logits = torch.randn(3, 131)
    logits[0, 4:] = -float("inf")  # impossible classes
    logits[1, 6] = -float("inf")  # an impossible target
    targets = torch.tensor([2, 6, 7])
    leaf = logits.to(device).requires_grad_()
    losses = cross_entropy(leaf, targets.to(device), reduction="none")
    losses[0::2].sum().backward()
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(losses.detach().cpu().double(), exact, rtol=0, atol=1e-5)
    assert losses[1] == float("inf")
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0, 4:].abs().sum() == 0


# In the interpreter numpy warns of it; a difference of −3.4e38 is −inf in base 2, and right so.
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
@pytest.mark.parametrize("n_cols", [3, 50, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_lowest_numbers_is_as_any_row_of_equal_logits(device, dtype, n_cols):
    """As masks leave it that write finfo.min for a forbidden class, where all are forbidden."""
    logits = torch.full((2, n_cols), torch.finfo(dtype).min, dtype=dtype)
    logits[1, 0] = 0.0
    leaf = logits.to(device).requires_grad_()
    losses = cross_entropy(leaf, torch.tensor([1, 0], device=device), reduction="none")
    losses.sum().backward()
    expected = torch.tensor([float(n_cols), 1.0]).log()
    torch.testing.assert_close(losses.detach().cpu().float(), expected)
    assert leaf.grad.isfinite().all()  # log V is lost beside the first row's logits, in its lse
    assert not leaf.grad[1].any()


def test_far_target_and_large_logits(device):
    logits = torch.zeros(3, 50)
    logits[0, 1], logits[1, 1], logits[2, 1] = 300.0, 3e4, 30.0
    targets = torch.tensor([0, 0, 1])
    compare(logits, targets, device, reduction="none", return_lse=True)


def test_gradient_of_a_certain_target_is_not_lost(device):
    """As p approaches 1 the gradient p − 1 is formed in fp32, not from a rounded p."""
    logits = torch.zeros(1, 4)
    logits[0, 0] = 9.0
    leaf = logits.to(device, half(device)).requires_grad_()
    cross_entropy(leaf, torch.tensor([0], device=device)).backward()
    exact = torch.softmax(logits.double(), 1)[0, 0] - 1
    assert float(leaf.grad[0, 0]) == pytest.approx(float(exact), rel=1e-2)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_incoming_gradients(device, reduction):
    """Not one, strided, expanded: all are exact."""
    torch.manual_seed(3)
    logits, targets = torch.randn(6, 37), torch.randint(0, 37, (6,))
    shape = () if reduction == "sum" else (6,)
    grid = torch.rand(12, 2)
    incoming = [torch.tensor(0.3), torch.tensor(-2.0)] if shape == () else [grid[::2, 1]]
    incoming.append(torch.tensor(3.0).expand(shape))
    for upstream in incoming:
        grads = []
        for op, where in ((cross_entropy, device), (cross_entropy_reference, CPU)):
            leaf = logits.to(where).detach().requires_grad_()
            loss = op(leaf, targets.to(where), reduction=reduction)
            grads.append(torch.autograd.grad(loss, leaf, upstream.to(where))[0].cpu())
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_two_losses_and_a_retained_graph(device):
    torch.manual_seed(4)
    logits = torch.randn(4, 21, device=device, requires_grad=True)
    targets = torch.randint(0, 21, (4,), device=device)
    one = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    loss = cross_entropy(logits, targets)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    kept = first.clone()
    third = torch.autograd.grad(3 * loss, logits)[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(third, 3 * one)
    both = cross_entropy(logits, targets) + cross_entropy(logits, targets)
    torch.testing.assert_close(torch.autograd.grad(both, logits)[0], 2 * one)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "sum"}, {}])
def test_inplace_refuses_the_backward_of_another_use_of_the_logits(device, options):
    """A gradient must not be taken of what was written over them, whenever that is."""
    logits = torch.randn(4, 8, device=device, requires_grad=True) * 1
    other = logits.square().sum()  # saves the logits
    losses = cross_entropy(logits, torch.arange(4, device=device), inplace=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + losses.sum()).backward()


def test_inplace_gives_shapes_where_there_is_no_memory():
    logits = torch.empty(3, 8, device="meta", requires_grad=True)
    targets = torch.empty(3, dtype=torch.long, device="meta")
    cross_entropy(logits * 1, targets, inplace=True).backward()
    assert logits.grad.shape == logits.shape


def test_inplace_writes_over_the_logits_and_refuses_a_second_backward(device):
    torch.manual_seed(5)
    leaf = torch.randn(4, 24, device=device, requires_grad=True)
    targets = torch.randint(0, 24, (4,), device=device)
    logits = leaf * 1
    loss = cross_entropy(logits, targets, inplace=True)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="inplace=False"):
        torch.autograd.grad(loss, logits)
    product = torch.tanh(leaf)  # tanh needs its output, which is overwritten
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(product, targets, inplace=True).backward()


def test_logits_and_gradient_are_kept_from_forward_to_backward(device):
    logits, targets = torch.randn(64, 512, device=device), torch.arange(64, device=device)
    logits.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = cross_entropy(logits, targets)
    kept = sum(t.nbytes for t in saved)
    assert loss.requires_grad
    assert 2 * logits.nbytes < kept < 2.1 * logits.nbytes


def test_reruns_agree_bit_for_bit(device):
    logits, targets = torch.randn(5, 999, device=device), torch.randint(0, 999, (5,)).to(device)
    first, second = (outputs(cross_entropy, logits, targets, z_loss=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_gradient_is_computed_in_evaluation(device, monkeypatch):
    made = []
    real = MODULE.empty_grad
    monkeypatch.setattr(MODULE, "empty_grad", lambda x: made.append(1) or real(x))
    logits = torch.randn(3, 8, device=device, requires_grad=True)
    targets = torch.zeros(3, dtype=torch.long, device=device)
    with torch.no_grad():
        cross_entropy(logits, targets)
    assert not made
    cross_entropy(logits, targets)
    assert made


def test_gradcheck():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 6, 0])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: cross_entropy(
                x, targets, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0,
                class_weight=torch.arange(1.0, 8), token_weight=torch.rand(4).fill_(0.5),
            ),
            (logits,),
        )  # fmt: skip


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("want_grad", [True, False])
def test_opcheck(device, reduce, want_grad):
    logits = torch.randn(4, 19, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 18, 0], device=device)
    scale = torch.tensor(0.5, device=device)
    args = (None, None, scale, -100, 0.1, 0.1, 0.0, reduce, want_grad, True)
    op = torch.ops.fasttrain_kernels.cross_entropy_forward.default
    results = opcheck(op, (logits, targets, *args))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(device, backend):
    torch.manual_seed(6)
    logits, targets = torch.randn(6, 37, device=device), torch.randint(0, 37, (6,)).to(device)

    def step(x: Tensor) -> Tensor:
        return cross_entropy(x * 2, targets, z_loss=0.1, inplace=True) * 3

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaf = logits.clone().requires_grad_()
        loss = run(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_samples_of_torch(device):
    """PyTorch's own sample inputs, as far as they have class indices."""
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    seen = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=False):
        targets, options = sample.args[0], dict(sample.kwargs)
        if targets.dtype.is_floating_point:
            continue
        logits = sample.input if sample.input.dim() == 1 else sample.input.movedim(1, -1)
        theirs = torch.nn.functional.cross_entropy(sample.input, targets, **options)
        if "weight" in options:
            options["class_weight"] = options.pop("weight").to(device)
        ours = cross_entropy(logits.to(device), targets.to(device), **options).cpu()
        # Where nothing counts, torch says NaN and this op 0.
        torch.testing.assert_close(ours, theirs.nan_to_num(0.0), rtol=1e-5, atol=1e-5)
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets .*\(4,\).*\(3,\)"),
        ({"reduction": "avg"}, "reduction .*'mean'.*'avg'"),
        ({"label_smoothing": 1.5}, r"label_smoothing .*1\.5"),
        ({"softcap": 0.0}, r"softcap .*0\.0"),
        ({"z_loss": -1.0}, r"z_loss .*-1\.0"),
        ({"class_weight": torch.ones(4)}, r"class_weight .*\(5,\).*\(4,\)"),
        ({"token_weight": torch.ones(5)}, r"token_weight .*\(4,\).*\(5,\)"),
    ],
)
def test_errors_name_value_and_remedy(change, message):
    arguments = {"targets": torch.zeros(4, dtype=torch.long), **change}
    with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
        cross_entropy(torch.randn(4, 5), **arguments)
    with (
        contextlib.suppress(KeyError),
        pytest.raises(TypeError, match=r"cross_entropy: targets .*torch\.float32"),
    ):
        cross_entropy(torch.randn(4, 5), torch.zeros(4))
