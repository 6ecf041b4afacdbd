"""Calls as torch and other libraries spell them: taken, or told apart; and types of results."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import (
    RMSNorm,
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    rms_norm,
)
from torch import nn

ROOT = Path(__file__).parents[2]
N, D, V = 4, 8, 11
X, HIDDEN, HEAD = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)
TARGETS, WEIGHT = torch.arange(N), torch.rand(V)
LAYER = nn.Linear(D, V)


def test_class_weights_under_torchs_name() -> None:
    theirs = F.cross_entropy(X, TARGETS, WEIGHT)
    for loss in (cross_entropy, cross_entropy_reference):
        torch.testing.assert_close(loss(X, TARGETS, WEIGHT), theirs)
        torch.testing.assert_close(loss(X, TARGETS, weight=WEIGHT), theirs)
        torch.testing.assert_close(loss(X, TARGETS, class_weight=WEIGHT), theirs)
        with pytest.raises(ValueError, match=r"cross_entropy\w*: weight .*class_weight"):
            loss(X, TARGETS, WEIGHT, class_weight=WEIGHT)


def test_an_rms_norm_is_made_as_torchs_is() -> None:
    for arguments in ((D,), ([D],), ((D,),), (torch.Size([D]),), (D, 1e-3), (D, None)):
        ours, theirs = RMSNorm(*arguments), nn.RMSNorm(*arguments)
        ours.eps = ours.eps if len(arguments) == 2 else theirs.eps  # the defaults differ
        torch.testing.assert_close(ours(HIDDEN), theirs(HIDDEN))
        ours.load_state_dict(theirs.state_dict())
    assert RMSNorm(D, 1e-3, False).weight is None
    norm = RMSNorm(D, 1e-3, True, "meta", torch.bfloat16)
    assert norm.weight is not None
    assert (norm.weight.device.type, norm.weight.dtype) == ("meta", torch.bfloat16)
    with pytest.raises(ValueError, match=r"RMSNorm: dim .*\(2, 8\)"):
        RMSNorm((2, D))


# What is called, and what the error says.
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "size_average": (
        lambda: cross_entropy(X, TARGETS, size_average=False),
        r"cross_entropy: .*'size_average'.*\breduction=",
    ),
    "reduce": (
        lambda: linear_cross_entropy(HIDDEN, HEAD, TARGETS, reduce=True),
        r"linear_cross_entropy: .*'reduce'.*\breduction=",
    ),
    "input": (lambda: cross_entropy(input=X, target=TARGETS), r"'input'.*\blogits\b"),
    "target": (lambda: cross_entropy(X, target=TARGETS), r"'target'.*\btargets\b"),
    "no such": (lambda: cross_entropy(X, TARGETS, colour=1), r"'colour'.* cross_entropy\("),
    "positional": (
        lambda: cross_entropy(X, TARGETS, WEIGHT, None, -1),
        r"cross_entropy: 2 arguments .* cross_entropy\(",
    ),
    "z-loss of Liger": (
        lambda: linear_cross_entropy(HIDDEN, HEAD, TARGETS, lse_square_scale=1e-4),
        r"'lse_square_scale'.*\bz_loss\b",
    ),
    "weight twice": (
        lambda: linear_cross_entropy(HIDDEN, HEAD, TARGETS, weight=WEIGHT),
        r"linear_cross_entropy: weight .*\btwice\b",
    ),
    "names of torch": (
        lambda: linear_cross_entropy(HIDDEN, linear_weight=HEAD, target=TARGETS),
        r"'linear_weight'.*\bweight\b",
    ),
    "a layer": (
        lambda: linear_cross_entropy(HIDDEN, LAYER, TARGETS),
        r"weight .*\btensor\b.*Linear\b.*layer\.weight.*bias=layer\.bias",
    ),
    "probabilities": (
        lambda: cross_entropy(X, X.softmax(-1)),
        r"targets .*float32.*torch\.nn\.functional\.cross_entropy",
    ),
    "probabilities of hidden states": (
        lambda: linear_cross_entropy(HIDDEN, HEAD, X.softmax(-1)),
        r"targets .*float32.*torch\.nn\.functional\.cross_entropy",
    ),
    "shape of F.rms_norm": (
        lambda: rms_norm(HIDDEN, (D,)),
        r"weight .*\btensor\b.*tuple\b.* rms_norm\(x, weight, eps=eps\)",
    ),
    "call of F.rms_norm": (
        lambda: rms_norm(HIDDEN, (D,), torch.ones(D), 1e-5),
        r"2 arguments .* rms_norm\(x, weight, eps=eps\)",
    ),
    "normalized_shape": (
        lambda: rms_norm(HIDDEN, normalized_shape=(D,), weight=torch.ones(D)),
        r"'normalized_shape'.*\blast dimension\b",
    ),
    "normalized_shape of a module": (
        lambda: RMSNorm(normalized_shape=D),
        r"'normalized_shape'.*\bdim\b",
    ),
    "bias of a module": (lambda: RMSNorm(D, bias=False), "RMSNorm: .*'bias'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_taken_is_told_apart_in_a_line(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_layout_of_torchs_logits_is_told_apart() -> None:
    logits, targets = torch.randn(2, V, 3), torch.randint(V, (2, 3))
    with pytest.raises(ValueError, match=r"logits \(2, 11, 3\).*\b11 classes\b.*movedim\(1, -1\)"):
        cross_entropy(logits, targets)
    ours = cross_entropy(logits.movedim(1, -1), targets)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets))


def test_operands_in_ligers_order_are_told_apart() -> None:
    with pytest.raises(
        ValueError, match=r"weight \(4, 8\).*hidden \(11, 8\).* linear_cross_entropy\("
    ):
        linear_cross_entropy(HEAD, HIDDEN, TARGETS)
    with pytest.raises(
        ValueError, match=r"weight \(2, 2, 8\).*hidden \(11, 8\).* linear_cross_entropy\("
    ):
        linear_cross_entropy(HEAD, HIDDEN.view(2, 2, D), TARGETS.view(2, 2))


@pytest.mark.parametrize("reduction", ["avg", None, "", 1])
def test_a_reduction_that_is_none_names_those_that_are(reduction: Any) -> None:
    for call in (
        lambda: cross_entropy(X, TARGETS, reduction=reduction),
        lambda: linear_cross_entropy(HIDDEN, HEAD, TARGETS, reduction=reduction),
    ):
        with pytest.raises(ValueError, match="'mean', 'sum', 'none'"):
            call()


SNIPPET = """
from typing import assert_type

import torch
from fasttrain_kernels import (
    RMSNorm, cross_entropy, cross_entropy_reference, linear_cross_entropy,
    linear_cross_entropy_reference, rms_norm, rms_norm_reference,
)
from torch import Tensor

x, w, t = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
assert_type(cross_entropy(x, t), Tensor)
assert_type(cross_entropy_reference(x, t, w[:, 0], reduction="sum", z_loss=0.1), Tensor)
assert_type(linear_cross_entropy(x, w, t, reduction="none", max_chunk_mib=1.0), Tensor)
assert_type(linear_cross_entropy_reference(x, w, t, softcap=3.0), Tensor)
linear_cross_entropy(x, w, t).backward()
loss, lse = cross_entropy(x, t, return_lse=True)
loss, accuracy = linear_cross_entropy(x, w, t, return_accuracy=True)
loss, lse, accuracy = cross_entropy_reference(x, t, return_lse=True, return_accuracy=True)
loss.backward()
cross_entropy(x, t, reduction="avg")  # type: ignore[call-overload]
linear_cross_entropy(x, w, t, reduction="avg")  # type: ignore[call-overload]
norm = RMSNorm(8, 1e-5)
assert_type(norm(x), Tensor)
assert_type(norm(x, x), tuple[Tensor, Tensor])
assert_type(rms_norm(x, eps=None), Tensor)
assert_type(rms_norm_reference(x, residual=x), tuple[Tensor, Tensor])


def both(return_lse: bool) -> None:
    assert_type(cross_entropy(x, t, return_lse=return_lse), Tensor | tuple[Tensor, ...])
"""


def test_results_have_the_types_that_calls_imply(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    # What mypy knows of torch takes 20 s to find out.
    cache = Path(tempfile.gettempdir()) / f"fasttrain-tests-mypy-{os.getuid()}"
    options = ["--config-file=", "--ignore-missing-imports", "--warn-unused-ignores"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            *options,
            f"--cache-dir={cache}",
            str(tmp_path / "snippet.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
