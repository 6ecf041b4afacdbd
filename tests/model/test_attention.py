"""What a query may see: one rule, the same as a boolean mask and as FlexAttention's block mask."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from fasttrain.config import ModelConfig
from fasttrain.model import attention as attention_module
from fasttrain.model.attention import Attention, attention_mask, rope_tables, visible

CPU = torch.device("cpu")
T = 12
# Documents of 5, 1 and 6 tokens; of 3 and 9; and one document.
STARTS = torch.zeros(3, T, dtype=torch.bool)
STARTS[:, 0] = STARTS[0, 5] = STARTS[0, 6] = STARTS[1, 3] = True


def seen(row: int, query: int, key: int, window: int | None) -> bool:
    documents = STARTS[row].cumsum(0)
    inside = window is None or query - key < window
    return key <= query and inside and bool(documents[query] == documents[key])


@pytest.mark.parametrize("window", [None, 1, 4, T, 100])
def test_the_mask_is_causal_windowed_and_within_the_document(window: int | None) -> None:
    options = {"window": window, "doc_starts": STARTS, "flex": False}
    mask = attention_mask(torch.zeros(1, T), start=0, **options)  # type: ignore[arg-type]
    assert isinstance(mask, Tensor)
    assert mask.shape == (3, 1, T, T)
    for row in range(3):
        for query in range(T):
            expected = [seen(row, query, key, window) for key in range(T)]
            assert mask[row, 0, query].tolist() == expected


def test_without_documents_the_last_row_is_all_the_mask_needs() -> None:
    def mask(start: int, t: int, window: int | None) -> Tensor | None:
        tokens = torch.zeros(1, t)
        found = attention_mask(tokens, start=start, window=window, doc_starts=None, flex=False)
        assert not isinstance(found, BlockMask)
        return found

    assert mask(0, T, None) is None
    assert mask(7, 1, None) is None
    assert mask(0, T, T) is None
    windowed, cached = mask(0, T, 4), mask(5, 3, 4)
    assert windowed is not None
    assert cached is not None
    assert windowed.tolist() == [[seen(2, q, k, 4) for k in range(T)] for q in range(T)]
    assert torch.equal(cached, windowed[5:8, :8])


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_and_sdpa_see_the_same(window: int | None) -> None:
    dense = attention_mask(STARTS, start=0, window=window, doc_starts=STARTS, flex=False)
    rule = visible(window, STARTS.cumsum(1, dtype=torch.int32))
    assert torch.equal(create_mask(rule, 3, 1, T, T, device="cpu"), dense)


# Compiled as CUDA does it, in one graph with what is around it; the backend here is plain torch,
# since FlexAttention's own code for a CPU needs a minute of a C++ compiler.
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
# torch's own tracing of an index by a tensor inside the rule
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("n_kv_heads", "documents"), [(4, False), (2, True)])
def test_attention_by_flex_attention_equals_that_by_sdpa(n_kv_heads: int, documents: bool) -> None:
    config = ModelConfig(
        vocab_size=64, dim=64, n_heads=4, n_kv_heads=n_kv_heads, sliding_window_tokens=200
    )
    torch.manual_seed(0)
    t = 300  # FlexAttention's blocks are of 128, so that some are hidden, some partly
    attention = Attention(config)
    rope = rope_tables(t, 16, 10000.0)
    x = torch.randn(2, t, 64)
    starts = None
    if documents:
        starts = torch.zeros(2, t, dtype=torch.bool)
        starts[:, 0] = starts[0, 17] = starts[0, 140] = starts[1, 290] = True

    def attend(x: Tensor, starts: Tensor | None, flex: bool) -> Tensor:
        mask = attention_mask(x[:, :, 0], start=0, window=200, doc_starts=starts, flex=flex)
        assert isinstance(mask, BlockMask) == flex
        y: Tensor = attention(x, rope, mask)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, starts, True), attend(x, starts, False), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("dtype", "capability", "flash"),
    [
        (torch.bfloat16, 9, True),
        (torch.float16, 8, True),
        (torch.float16, 7, False),
        (torch.float32, 9, False),  # generate; run.dtype = fp32 and tf32
    ],
)
def test_flash_attention_is_expected_where_torch_has_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: int, flash: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(major=capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert attention_module._has_flash(torch.empty(1, dtype=dtype)) == flash


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("flash", [False, True])
def test_grouped_queries_are_left_to_flash_attention_alone(
    monkeypatch: pytest.MonkeyPatch, flash: bool, masked: bool
) -> None:
    """Any other CUDA path of SDPA writes out all T·T scores for them."""
    seen: list[tuple[int, bool]] = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **_: object) -> Tensor:
        seen.append((k.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(attention_module, "_has_flash", lambda x: flash)
    config = ModelConfig(vocab_size=64, dim=64, n_heads=4, n_kv_heads=2)

    class OnCuda(Tensor):
        is_cuda = True  # type: ignore[assignment]

    mask = torch.ones(T, T, dtype=torch.bool) if masked else None
    Attention(config)(torch.zeros(2, T, 64).as_subclass(OnCuda), None, mask)
    assert seen == [(2, True) if flash and not masked else (4, False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: FlexAttention's kernel")
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_flex_attention_on_the_gpu_equals_sdpa(n_kv_heads: int) -> None:
    device = torch.device("cuda")
    config = ModelConfig(vocab_size=64, dim=256, n_heads=4, n_kv_heads=n_kv_heads)
    torch.manual_seed(0)
    attention = Attention(config).to(device)
    rope = tuple(table.to(device) for table in rope_tables(300, 64, 10000.0))
    starts = torch.zeros(2, 300, dtype=torch.bool, device=device)
    starts[:, 0] = starts[0, 17] = starts[0, 140] = True
    outputs, gradients = [], []
    for flex in (False, True):
        x = torch.randn(
            2, 300, 256, device=device, generator=torch.Generator(device).manual_seed(1)
        )
        x.requires_grad_()
        mask = attention_mask(starts, start=0, window=200, doc_starts=starts, flex=flex)
        y = attention(x, rope, mask)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        outputs.append(y.detach())
        gradients.append(gradient)
    torch.testing.assert_close(*outputs, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)
