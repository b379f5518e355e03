"""A checkpoint that was cut, altered, emptied or made by a newer version is refused by the name of the tensor."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bellbit
from bellbit.errors import BellbitError
from bellbit.inspection import inspect
from bellbit.loading import locate
from bellbit.packed import checkpoint
from bellbit.packed.checkpoint import read_header, write_shards


@pytest.fixture(scope="session")
def saved(tiny_model, english, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "saved"
    bellbit.quantize(tiny_model("llama"), out, "billm", calib=str(english), samples=2, seq_len=32)
    return out


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def refused(folder, message):
    with pytest.raises(BellbitError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_it_loads_as_it_is(copy):
    model = AutoModelForCausalLM.from_pretrained(copy)
    dense = [n for n, p in model.named_parameters() if "proj" in n and p.ndim == 2]
    assert dense == []  # no dense copy of a quantized weight exists


def test_a_cut_file_is_refused_by_the_first_tensor_that_is_not_whole(copy):
    file = copy / "model.safetensors"
    tensors = sorted(read_header(file).items(), key=lambda item: item[1].start)
    name, tensor = tensors[len(tensors) // 2]
    with file.open("r+b") as stream:
        stream.truncate(tensor.stop - 1)
    refused(copy, f"is cut off: tensor '{name}' ends at byte {tensor.stop}")


@pytest.mark.parametrize("length", [0, 5, 100])
def test_a_file_cut_inside_its_header_is_refused(copy, length):
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.truncate(length)
    refused(copy, "is no intact safetensors file")


def test_an_altered_byte_is_refused_by_its_tensor(copy):
    file = copy / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.codes"
    position = read_header(file)[name].start + 7
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)
    refused(copy, f"the bytes of tensor '{name}' are not those that were written")


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(copy):
    rewrite(copy, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.scales"))
    refused(copy, "lacks the tensor 'model.layers.0.self_attn.q_proj.scales'")


def test_a_missing_tensor_that_is_not_quantized_is_named_too(copy):
    rewrite(copy, lambda tensors: tensors.pop("model.norm.weight"))
    refused(copy, "lacks the tensor 'model.norm.weight'")


def test_a_misshapen_tensor_is_named(copy):
    name = "model.layers.0.self_attn.q_proj.codes"
    rewrite(copy, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    refused(copy, f"tensor '{name}' is U8 .* but config.json makes it U8")


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("version", "way_out"), [(99, "upgrade"), (None, "upgrade"), (1, "quantize again")])
def test_another_format_is_refused(copy, version, way_out):
    edit_config(copy, lambda q: q.update(format_version=version))
    refused(copy, f"format version {version}, this bellbit reads 3: {way_out}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(modules={}), "names no quantized modules"),
        (lambda q: q.update(act_bits=7), "act_bits 7; allowed"),
        (lambda q: q.update(act_scope="row"), "act_scope 'row'; allowed"),
        (lambda q: q.update(rounded_outputs=["lm_head"]), "rounds the output of 'lm_head', which is not quantized"),
    ],
)
def test_a_config_with_an_impossible_value_is_refused(copy, change, message):
    edit_config(copy, change)
    refused(copy, message)


def header_of(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(shape=["a", "b"]),
        lambda entry: entry.update(dtype=["F32"]),
        lambda entry: entry.update(data_offsets=[0]),
        lambda entry: entry.update(data_offsets=[-4, 8]),
        lambda entry: entry.update(data_offsets=[entry["data_offsets"][0] + 1, entry["data_offsets"][1] + 1]),
        lambda entry: entry.clear(),
    ],
)
def test_headers_that_make_no_sense_are_refused(copy, change):
    file = copy / "model.safetensors"
    header, data = header_of(file)
    change(header["model.layers.1.mlp.up_proj.codes"])
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    with pytest.raises(BellbitError, match="is no intact safetensors file"):
        read_header(file)
    refused(copy, "is no intact safetensors file")


def test_inspection_refuses_folders_whose_json_is_broken(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(BellbitError, match=r"cannot read .*config\.json"):
        inspect(locate(str(copy)))
    (copy / "config.json").write_text("{}")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(BellbitError, match=r"index\.json has no weight_map"):
        inspect(locate(str(copy)))


def test_stored_scales_keep_their_dtype_whatever_the_model_is_loaded_in(saved):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    query = model.model.layers[0].self_attn.q_proj
    assert query.scales.dtype == torch.float16 and model.model.norm.weight.dtype == torch.bfloat16
    assert model(torch.arange(9)[None]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q["layouts"][0].update(layout="codebook9"),
        lambda q: q["layouts"][0].pop("block_size"),
        lambda q: q["modules"]["model.layers.0.mlp.up_proj"].update(layout=5),
        lambda q: q["modules"]["model.layers.0.mlp.up_proj"].pop("shape"),
        lambda q: q["layouts"][0].update(block_size=0),
        lambda q: q["layouts"][0].update(colour=1),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(copy, change):
    edit_config(copy, change)
    refused(copy, "config.json describes the layout of 'model.layers")


def test_a_config_for_another_model_is_refused(copy):
    edit_config(copy, lambda q: q["modules"].update({"model.layers.7.mlp.up_proj": {"layout": 0, "shape": [320, 192]}}))
    refused(copy, "quantizes 'model.layers.7.mlp.up_proj' as .* has no such linear layer")


def test_large_checkpoints_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", 1000)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    write_shards(tensors, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors) and len(set(index.values())) == 3
    for name, file in index.items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensors[name])


def test_saving_the_loaded_model_again_gives_a_checkpoint_that_loads(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
