import pytest
import torch
from torch import nn
from transformers import BloomConfig

import bellbit
from bellbit.errors import BellbitError
from bellbit.loading import load_model, locate
from bellbit.packed.linear import packed_linears
from bellbit.ptq.discover import discover
from bellbit.ptq.families import linear_names
from conftest import CONFIGS, VOCABULARY, byte_tokenizer, family_named, random_model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_found_is_what_is_known(name):
    model, known = random_model(CONFIGS[name]()), family_named(name)
    found = discover(model)
    assert found.blocks == known.blocks
    assert set(linear_names(model, found)) == set(linear_names(model, known))
    if name not in ("mixtral", "qwen3_moe"):  # where experts without a token stand alone
        block = model.get_submodule(known.blocks)[0]
        groups = ({frozenset(group.linears) for group in family.groups_of(block)} for family in (found, known))
        assert next(groups) == next(groups)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(BellbitError, match="no list of blocks with linear layers"):
        discover(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("method", ["bellbit", "gptq"])
def test_an_unknown_architecture_is_quantized_where_that_is_allowed(tmp_path, english, method):
    folder = tmp_path / "bloom"
    random_model(BloomConfig(hidden_size=128, n_layer=2, n_head=4, vocab_size=VOCABULARY)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    options = {"calib": str(english), "samples": 3, "seq_len": 64} | ({"effort": "fast"} if method == "bellbit" else {})
    with pytest.raises(BellbitError, match=r"'bloom' is not supported.*--allow-unknown"):
        bellbit.quantize(folder, tmp_path / "out", method, **options)
    report = bellbit.quantize(folder, tmp_path / "out", method, allow_unknown=True, **options)
    model = load_model(locate(report.out))
    assert len(packed_linears(model)) == 8
    assert model(torch.arange(20)[None]).logits.isfinite().all()
