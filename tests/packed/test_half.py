"""Embedding and head stay in 16 bits in memory, as they are on disk, while the model computes in float32."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import bellbit
from bellbit import kernels
from bellbit.packed.half import HalfEmbedding, HalfLinear


def test_dense_equals_the_widened_product():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for columns in (1, 17, 100, 576):
            weight = torch.randn(33, columns, generator=generator).to(dtype)
            for tokens in (1, 3, 40):
                x = torch.randn(tokens, columns, generator=generator)
                expected = nn.functional.linear(x, weight.float())
                assert torch.allclose(kernels.dense(x, weight, None), expected, rtol=1e-5, atol=1e-4)


def test_a_checkpoints_embedding_is_not_widened(tiny_model, tmp_path):
    bellbit.quantize(tiny_model("llama"), tmp_path / "out", "rtn", bits=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is HalfEmbedding and embedding.weight.dtype.itemsize == 2
    assert type(head) is HalfLinear and head.weight.dtype.itemsize == 2
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        assert embedding(tokens).dtype == torch.float32
        assert model(tokens).logits.dtype == torch.float32
    assert embedding.double().weight.dtype.itemsize == 2  # transformers itself casts no quantized model
    assert embedding(tokens).dtype == torch.float64
    assert embedding.bfloat16()(tokens).dtype == torch.bfloat16
