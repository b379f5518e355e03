import pytest
import torch
from torch import nn
from transformers import BloomConfig, OPTConfig

from bellbit.errors import BellbitError
from bellbit.packed.linears import unfuse
from bellbit.ptq.families import by_norm, check_foldable, family_of, fold_column_scales, linear_names
from bellbit.ptq.methods import Settings
from conftest import CONFIGS, family_named, random_model

LINEARS = {  # of the two blocks, counted by hand
    "falcon": 8,
    "falcon-40b": 8,
    "falcon-rw": 8,
    "gpt2": 8,
    "gpt_neox": 8,
    "mixtral": 2 * (4 + 4 * 3),
    "opt": 12,
    "phi3": 8,
    "qwen3_moe": 7 + 4 + 4 * 3,
}
BEHIND_NORMS = {  # of them, those whose column scales go into a norm
    "falcon": 4,
    "falcon-40b": 4,
    "falcon-rw": 4,
    "gpt2": 4,
    "gpt_neox": 4,
    "mixtral": 2 * (3 + 4 * 2),
    "olmo2": 0,
    "opt": 8,
    "phi3": 4,
    "qwen3_moe": 5 + 3 + 4 * 2,
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_linear_is_known(name):
    model, family = random_model(CONFIGS[name]()), family_named(name)
    names = linear_names(model, family)
    assert len(names) == LINEARS.get(name, 14)
    blocks = model.get_submodule(family.blocks)
    within = {key for key, module in blocks.named_modules(prefix=family.blocks) if isinstance(module, nn.Linear)}
    assert set(names) == within
    groups = [group for block in blocks for group in family.groups_of(block)]
    assert sum(len(group.linears) for group in groups if group.norm) == BEHIND_NORMS.get(name, 10)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe"])
def test_matrices_become_linears_without_a_change(name):
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    before, after = (random_model(CONFIGS[name](), as_stored) for as_stored in (True, False))
    with torch.no_grad():
        torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_gelu_passes_no_factor_on():
    assert ("fc1", "fc2") in family_of(OPTConfig()).chains
    assert family_of(OPTConfig(activation_function="gelu")).chains == (("self_attn.v_proj", "self_attn.out_proj"),)


def test_experts_of_another_kind_are_refused(monkeypatch):
    model = random_model(CONFIGS["mixtral"](), as_stored=True)
    experts = model.model.layers[0].mlp.experts
    for change in ({"has_bias": True}, {"is_transposed": True}):
        with (
            monkeypatch.context() as context,
            pytest.raises(BellbitError, match="are no plain gated MLPs"),
        ):
            for name, value in change.items():
                context.setattr(experts, name, value)
            unfuse(model)
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, gate_up: gate_up.clamp(max=7))
    with pytest.raises(BellbitError, match=r"'model.layers.0.mlp.experts' \(MixtralExperts\) are no plain gated MLPs"):
        unfuse(model)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_folding_leaves_the_function_as_it_was(name):
    model = random_model(CONFIGS[name]()).double()
    family = family_named(name)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        for block in model.get_submodule(family.blocks):
            for groups in by_norm(family.groups_of(block)).values():
                fold_column_scales(block, groups, torch.randn(192, dtype=torch.float64).exp(), family.norm_offset)
        after = model(tokens).logits
    tolerance = 1e-5 if "gemma" in name else 1e-9  # measured: 7e-7, as their norms are in float32 always; 1e-14
    assert (after - before).abs().max() < tolerance * before.abs().max()


def test_unsupported_architectures_are_named_with_the_supported_ones():
    with pytest.raises(
        BellbitError,
        match=r"'bloom' is not supported; supported are falcon, gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral, "
        r"mixtral, olmo2, opt, phi3, qwen2, qwen3, qwen3_moe, smollm3, stablelm; --allow-unknown",
    ):
        family_of(BloomConfig())


def test_norms_that_feed_no_linear_alone_are_refused():
    with pytest.raises(BellbitError, match=r"normalizes after each sub-layer.*--ltdb off.*--columns none"):
        check_foldable(OPTConfig(do_layer_norm_before=False))


@pytest.mark.parametrize(
    ("method", "options", "folds"),
    [
        ("dbellquant", {}, True),
        ("dbellquant", {"ltdb": "off"}, False),
        ("bellbit", {"columns": "mean"}, True),
        ("bellbit", {}, False),
        ("bellbit", {"columns": "none"}, False),
        ("bellbit", {"rungs": ("codes",)}, False),
        ("gptq", {}, False),
    ],
)
def test_only_what_folds_needs_norms_to_fold_into(method, options, folds):
    assert Settings(method, **options).resolved(family_named("llama")).folds is folds
