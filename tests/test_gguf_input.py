"""GGUF files of the common types as input: read as the gguf package reads them, and quantized."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

import bellbit
from bellbit.exporting import export_gguf
from bellbit.loading import load_model, locate
from conftest import LLAMA_LIKE
from test_export import ascii_tokenizer

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where in a block of 256 weights its 16-bit scales stand
WIDTHS = LLAMA_LIKE | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDTHS),
    "qwen2": lambda: Qwen2Config(**WIDTHS),
    "qwen3": lambda: Qwen3Config(**WIDTHS, head_dim=128),  # transformers takes it for granted
}
NAMES = {"attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def packed(values, kind):
    """Bytes of a matrix in a type; of those that the package cannot write, any bytes with scales that are numbers."""
    if kind not in SCALES:
        return quants.quantize(values, GGMLQuantizationType[kind])
    rows = quants.quant_shape_to_byte_shape(values.shape, GGMLQuantizationType[kind])
    blocks = np.random.default_rng(0).integers(256, size=rows, dtype=np.uint8)
    blocks = blocks.reshape(len(values), values.shape[1] // 256, -1)
    for place in SCALES[kind]:
        blocks[..., place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return blocks.reshape(rows)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(family, type) -> a GGUF file whose linears are of that type."""
    exported = {}

    def make(family, kind):
        folder = tmp_path_factory.mktemp("gguf")
        if family not in exported:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(folder / "source")
            ascii_tokenizer().save_pretrained(folder / "source")
            bellbit.quantize(folder / "source", folder / "out", "sign")
            export_gguf(folder / "out", folder / "first.gguf")
            exported[family] = folder / "first.gguf"
        reader = GGUFReader(exported[family])
        writer = GGUFWriter(folder / "model.gguf", reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        for tensor in reader.tensors:
            if tensor.tensor_type.name == "Q1_0":
                values = np.random.default_rng(0).normal(scale=0.06, size=tensor.shape[::-1]).astype(np.float32)
                writer.add_tensor(tensor.name, packed(values, kind), raw_dtype=GGMLQuantizationType[kind])
            else:
                writer.add_tensor(tensor.name, quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "model.gguf"

    return make


@pytest.mark.parametrize("kind", TYPES)
def test_every_common_type_is_read_and_quantized(kind, written, tmp_path):
    file = written("llama", kind)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    model = load_model(locate(str(file)), "float32")
    for short, long in NAMES.items():
        tensor = stored[f"blk.1.{short}.weight"]
        assert tensor.tensor_type.name == kind
        expected = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(model.get_submodule(f"model.layers.1.{long}").weight, expected)
    report = bellbit.quantize(file, tmp_path / "out", "sign")
    assert len(report.errors) == 14 and all(0 < error < 1 for error in report.errors.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_are_read_from_gguf_too(family, written, tmp_path):
    report = bellbit.quantize(written(family, "Q8_0"), tmp_path / "out", "rtn")
    assert len(report.errors) == 14
