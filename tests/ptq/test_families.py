import pytest
import torch
from transformers import GPT2Config, OPTConfig

from bellbit.errors import BellbitError
from bellbit.ptq.families import FAMILIES, check_foldable, family_of, fold_column_scales
from bellbit.ptq.methods import Settings
from conftest import CONFIGS, random_model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_folding_leaves_the_function_as_it_was(name):
    model = random_model(CONFIGS[name]()).double()
    family = FAMILIES[name]
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        for block in model.get_submodule(family.blocks):
            for group in family.groups:
                if group.norm:
                    scales = torch.randn(192, dtype=torch.float64).exp()
                    fold_column_scales(block, group, scales, family.norm_offset)
        after = model(tokens).logits
    tolerance = 1e-5 if name == "gemma3_text" else 1e-9  # measured: 7e-7, as its norms are in float32 always; 1e-14
    assert (after - before).abs().max() < tolerance * before.abs().max()


def test_unsupported_architectures_are_named_with_the_supported_ones():
    with pytest.raises(
        BellbitError, match=r"'gpt2' is not supported; supported are gemma3_text, llama, mistral, opt, qwen2, qwen3"
    ):
        family_of(GPT2Config())


def test_norms_that_feed_no_linear_alone_are_refused():
    with pytest.raises(BellbitError, match=r"normalizes after each sub-layer.*--ltdb off.*--columns none"):
        check_foldable(OPTConfig(do_layer_norm_before=False))


@pytest.mark.parametrize(
    ("method", "options", "folds"),
    [
        ("dbellquant", {}, True),
        ("dbellquant", {"ltdb": "off"}, False),
        ("bellbit", {}, True),
        ("bellbit", {"columns": "none"}, False),
        ("bellbit", {"rungs": ("codes",)}, False),
        ("gptq", {}, False),
    ],
)
def test_only_what_folds_needs_norms_to_fold_into(method, options, folds):
    assert Settings(method, **options).resolved(FAMILIES["llama"]).folds is folds
