"""The attention of the ladder's passes against PyTorch's."""

import pytest
import torch
from test_loop import windows
from torch.nn.functional import scaled_dot_product_attention

from bellbit.ptq.attention import USUAL, attention_of_last, causal_attention, fast_attention
from bellbit.ptq.distill import teacher_states
from conftest import CONFIGS, random_model


def made(length, heads, of_keys):
    """Query, key, value and the derivative of the output, float64; batch 2, strided as transformers has them."""
    generator = torch.Generator().manual_seed(length)

    def drawn(heads):
        return torch.randn(2, length, heads, 16, generator=generator, dtype=torch.float64).transpose(1, 2)

    return [drawn(count).requires_grad_() for count in (heads, of_keys, of_keys)], drawn(heads)


def usual(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)


@pytest.mark.parametrize(("length", "heads", "of_keys"), [(1, 2, 2), (64, 4, 4), (65, 6, 2), (200, 3, 1)])
def test_it_is_pytorchs_attention(length, heads, of_keys):
    inputs, upstream = made(length, heads, of_keys)
    got, want = causal_attention(*inputs, 0.3), usual(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)  # measured 1.7e-15
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (got, want))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)  # keys' and values' are summed in float32: 5e-7


@pytest.mark.parametrize(("heads", "of_keys"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_of_one_token_is_pytorchs(heads, of_keys, batch):
    inputs, _ = made(50, heads, of_keys)
    query, key, value = (t.detach() for t in inputs)
    query = query[:, :, :1]
    seen = torch.rand(batch, 1, 1, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    want = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attention_of_last(query, key, value, seen, 0.3), want, rtol=0, atol=1e-14)  # 1.2e-15


# Gemma 2 attends by eager code, Falcon by its own; with bfloat16 routers choose other experts, which hides the rest
OTHERS = {"gemma2", "falcon", "falcon-40b", "falcon-rw", "mixtral", "qwen3_moe"}


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - OTHERS))
def test_models_attend_that_way(name):
    """The tiny Mistral has a sliding window in every layer, and so none of it."""
    model, tokens = random_model(CONFIGS[name]()), windows(2, 100)
    with torch.no_grad():
        exact = teacher_states(model, tokens, bf16=False)
        before = teacher_states(model, tokens, bf16=True)
        with fast_attention(model, "cpu"):
            after = teacher_states(model, tokens, bf16=True)
            own = teacher_states(model, tokens, bf16=False)
    assert model.config._attn_implementation == USUAL
    assert torch.equal(before, after) == torch.equal(own, exact) == (name == "mistral")
    assert (own - exact).norm() < 5e-6 * exact.norm()  # measured 1e-6
    assert (after - exact).norm() < 1.2 * (before - exact).norm()  # measured 1.00 … 1.15
