"""Models that are read block by block."""

import errno
import json
import os
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bellbit
from bellbit.errors import BellbitError
from bellbit.loading import load_config, load_model, locate
from bellbit.packed.linears import unfuse
from bellbit.packed.save import round_unquantized
from bellbit.ptq import loop, quantize
from bellbit.ptq.blocks import BlocksFromFiles, KeptBlocks, skeleton
from bellbit.ptq.families import family_of, linear_names
from conftest import CONFIGS, random_model

TEXT = {"samples": 4, "seq_len": 64}
PROBE = torch.arange(20)[None]


def opened(folder, dtype="float32"):
    location = locate(str(folder))
    config = load_config(location)
    return BlocksFromFiles(location, dtype, config, family_of(config)), load_model(location, dtype, config)


def contents(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_blocks_come_from_files_as_transformers_reads_them(name, dtype, tiny_model):
    blocks, whole = opened(tiny_model(name), dtype)
    unfuse(whole)
    round_unquantized(whole, set(linear_names(whole, blocks.family)))
    apart = blocks.model
    assert not any(p.is_meta for key, p in contents(apart).items() if not key.startswith(blocks.family.blocks))
    for index in range(2):
        found, wanted = contents(blocks.take_up(index)), contents(whole.get_submodule(blocks.name(index)))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    with torch.no_grad():
        tokens = torch.arange(20)[None]
        assert torch.equal(apart(tokens).logits, whole(tokens).logits)
    for index in range(2):
        blocks.put_down(index)
        assert all(p.is_meta for p in apart.get_submodule(blocks.name(index)).parameters())


@pytest.mark.parametrize(
    ("name", "method", "options", "offload"),
    [
        ("llama", "dbellquant", {"ltdb_steps": 3}, True),
        ("mixtral", "gptq", {"bits": 3}, False),
        ("gpt2", "sign", {}, False),
        ("falcon", "billm", {}, False),
        ("qwen3_moe", "bellbit", {"rungs": ("codes", "blocks"), "effort": "fast"}, True),
    ],
)
def test_read_by_blocks_or_whole_a_model_gives_the_same_checkpoint(
    name, method, options, offload, tiny_model, english, tmp_path, monkeypatch
):
    def run(out, **others):
        return bellbit.quantize(
            tiny_model(name), tmp_path / out, method, calib=str(english), **TEXT, **options, **others
        )

    apart = run("apart", offload=offload)
    monkeypatch.setattr(quantize, "BlocksFromFiles", None)
    monkeypatch.setattr(quantize, "reads_whole", lambda *_: True)
    whole = run("whole")
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("apart", "whole"))
    assert first.keys() == second.keys()
    for key, tensor in second.items():
        assert first[key].dtype == tensor.dtype and torch.equal(first[key], tensor), key
    assert (apart.errors, apart.bits_per_weight, apart.nominal_bits) == (
        whole.errors,
        whole.bits_per_weight,
        whole.nominal_bits,
    )


def test_never_more_than_one_block_is_in_memory(tiny_model, english, tmp_path, monkeypatch):
    held = []
    original = loop.group_hessians

    def spy(stream, *arguments):
        held.append([[not t.is_meta for t in block.state_dict().values()] for block in stream.arguments])
        return original(stream, *arguments)

    monkeypatch.setattr(loop, "group_hessians", spy)
    bellbit.quantize(tiny_model("llama"), tmp_path / "out", "gptq", calib=str(english), **TEXT)
    assert [[(any(block), all(block)) for block in blocks] for blocks in held] == [
        [(True, True), (False, False)],
        [(False, False), (True, True)],
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "opt", "gpt2", "falcon"])
def test_a_checkpoint_runs_block_by_block_as_it_does_whole(name, tiny_model, english, tmp_path, monkeypatch):
    """So the check at the end needs no more memory than a block; and what it runs is what users will load."""
    found = []
    original = KeptBlocks.reopened

    @contextmanager
    def spy(kept, folder):
        with original(kept, folder) as model:

            def held(block, *_):
                blocks = model.get_submodule(kept.blocks.family.blocks)
                found.append(sum(any(not t.is_meta for t in other.state_dict().values()) for other in blocks))

            for block in model.get_submodule(kept.blocks.family.blocks):
                block.register_forward_hook(held, prepend=True)
            with torch.no_grad():
                found.append(model(PROBE, use_cache=False).logits)
            yield model

    monkeypatch.setattr(KeptBlocks, "reopened", spy)
    bellbit.quantize(tiny_model(name), tmp_path / "out", "gptq", calib=str(english), **TEXT)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(PROBE, use_cache=False).logits
    assert found[:2] == [1, 1]
    assert torch.equal(found[2], expected)


def test_every_linear_has_its_line_in_the_log(tiny_model, english, tmp_path):
    for method, options in (("dbellquant", {"ltdb_steps": 3}), ("bellbit", {"effort": "fast"})):
        out = tmp_path / method
        report = bellbit.quantize(tiny_model("llama"), out, method, calib=str(english), **TEXT, **options)
        lines = [json.loads(line) for line in out.with_name(f"{method}.quantize_log.jsonl").read_text().splitlines()]
        assert {line["linear"]: line["error"] for line in lines} == report.errors
        assert all(line["bits"] > 1 and line["seconds"] > 0 and line["fallback"] is False for line in lines)


def test_a_shard_that_vanished_or_is_damaged_is_named(tiny_model, tmp_path):
    blocks, whole = opened(tiny_model("llama"))
    whole.save_pretrained(tmp_path / "model", max_shard_size="1MB")
    whole.config.save_pretrained(tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    blocks, _ = opened(tmp_path / "model")
    content = shards[-1].read_bytes()
    shards[-1].write_bytes(content[:-1])
    with pytest.raises(BellbitError, match=r"cannot read model\.layers\.1 of .*model"):
        blocks.take_up(1)
    shards[-1].unlink()
    with pytest.raises(BellbitError, match=r"cannot read model\.layers\.0 of .*model"):
        blocks.take_up(0)


def test_a_missing_weight_is_named(tiny_model, tmp_path):
    _, whole = opened(tiny_model("llama"))
    state = {key: tensor for key, tensor in whole.state_dict().items() if "layers.1.mlp.up_proj" not in key}
    whole.save_pretrained(tmp_path / "model", state_dict=state)
    location = locate(str(tmp_path / "model"))
    config = load_config(location)
    blocks = BlocksFromFiles(location, "float32", config, family_of(config))
    blocks.take_up(0)
    with pytest.raises(BellbitError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        blocks.take_up(1)


def test_a_weight_that_most_blocks_have_is_missed_before_anything_is_read(tmp_path):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 3
    whole = random_model(config)
    state = {key: tensor for key, tensor in whole.state_dict().items() if "layers.2.mlp.up_proj" not in key}
    whole.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(BellbitError, match=r"lacks the tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        BlocksFromFiles(locate(str(tmp_path / "model")), "float32", config, family_of(config))


def test_a_folder_that_cannot_be_made_is_said(tiny_model):
    with pytest.raises(BellbitError, match=r"/proc/bellbit/out.* cannot be made"):
        bellbit.quantize(tiny_model("llama"), "/proc/bellbit/out", "sign")


def test_hidden_states_that_the_disk_has_no_room_for_are_said(tiny_model, english, tmp_path, monkeypatch):
    no_room = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "posix_fallocate", no_room, raising=False)
    with pytest.raises(BellbitError, match=r"no space left for hidden states of .*; free some and --resume, or leave"):
        bellbit.quantize(tiny_model("llama"), tmp_path / "out", "gptq", calib=str(english), offload=True, **TEXT)
    assert not (tmp_path / "out").exists()


def test_what_a_family_has_no_place_for_is_said(tiny_model, english, tmp_path):
    told = bellbit.quantize(tiny_model("olmo2"), tmp_path / "a", calib=str(english), ltdb_steps=2, **TEXT).remark
    assert "no norm feeds a linear" in told
    assert bellbit.quantize(tiny_model("olmo2"), tmp_path / "b", "sign").remark == ""


def test_the_files_own_dtype_is_kept_where_none_is_asked_for(tiny_model, tmp_path):
    _, whole = opened(tiny_model("llama"))
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    location = locate(str(tmp_path / "model"))
    config = load_config(location)
    skeleton(config)
    assert config.dtype == torch.bfloat16
    blocks = BlocksFromFiles(location, "auto", config, family_of(config))
    assert {p.dtype for p in blocks.take_up(0).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stored", ["both", "head", "embedding"])
def test_a_head_is_tied_as_transformers_ties_it(stored, tiny_model, tmp_path):
    _, whole = opened(tiny_model("llama"))
    state = dict(whole.state_dict())
    embedding = state.pop("lm_head.weight").clone()
    if stored != "embedding":
        state["lm_head.weight"] = embedding.flip(0).contiguous()
    if stored == "head":
        del state["model.embed_tokens.weight"]
    whole.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    blocks, whole = opened(tmp_path)
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(blocks.model.get_submodule(name).weight, whole.get_submodule(name).weight.half().float())
