from collections import Counter

import pytest
import torch

import bellbit
from bellbit.core.hessian import inverse_factor
from bellbit.errors import BellbitError
from bellbit.packed.save import packed_linears
from bellbit.ptq import entering, loop
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.families import linear_names
from bellbit.ptq.ladder import climb
from bellbit.ptq.loop import quantize_model
from bellbit.ptq.methods import Settings
from bellbit.ptq.resume import Saved
from bellbit.ptq.stream import BlockStream
from conftest import CONFIGS, family_named, random_model

FAMILY_NAMES = sorted(CONFIGS)


def windows(samples=6, length=64):
    return torch.randint(256, (samples, length), generator=torch.Generator().manual_seed(0))


def run(name, settings=None, tokens=None, observer=None, model=None):
    model = model or random_model(CONFIGS[name]())
    family = family_named(name)
    settings = (settings or Settings(ltdb_steps=3)).resolved(family)
    tokens = windows() if tokens is None else tokens
    result = quantize_model(Blocks(model, family), settings, tokens, "cpu", lambda *_: None, Saved(), observer)
    return model, result


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_blocks_run_alone_give_the_models_hidden_states(name):
    model = random_model(CONFIGS[name]())
    blocks = list(model.get_submodule(family_named(name).blocks))
    tokens = windows(5)
    stream = BlockStream(model, blocks, tokens, "cpu", batch_size=2)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        torch.testing.assert_close(stream.inputs, expected[0])
        stream.run(blocks[0], stream.inputs, lambda share: None)
    torch.testing.assert_close(stream.inputs, expected[1], rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(blocks[0])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_linear_of_every_block_is_packed(name):
    model, result = run(name)
    family = family_named(name)
    expected = set(linear_names(random_model(CONFIGS[name]()), family))
    assert set(packed_linears(model)) == expected == set(result.errors)
    assert all(0 < error < 1 for error in result.errors.values())
    assert result.fallbacks == []
    assert model(windows()).logits.isfinite().all()


def test_each_block_runs_at_most_three_times(monkeypatch):
    runs = Counter()
    original = BlockStream.run

    def counted(stream, block, *args, **kwargs):
        runs[block] += 1
        original(stream, block, *args, **kwargs)

    monkeypatch.setattr(BlockStream, "run", counted)
    for settings, most in ((Settings(ltdb_steps=1), 3), (Settings("billm"), 2), (Settings("gptq"), 2)):
        runs.clear()
        run("llama", settings)
        assert 1 <= max(runs.values()) <= most


def test_the_hessian_of_scaled_inputs_is_the_unscaled_one_between_inverse_scales(monkeypatch):
    """Scales are folded before the Hessians are taken, so that no run of its own is needed: H_T = D⁻¹·H·D⁻¹."""
    seen = {}
    original = loop.group_hessians
    records = []

    def spy(stream, block, family, *rest):
        found = original(stream, block, family, *rest)
        seen.setdefault(len(seen), {group.linears: h.clone() for group, h in found.items()})
        return found

    monkeypatch.setattr(loop, "group_hessians", spy)
    run("llama", Settings(ltdb="learn", ltdb_steps=5), observer=records.append)
    run("llama", Settings(ltdb="off"))
    scaled, plain = seen[0], seen[2]  # block 0 of either run
    for record in records[:4]:
        scales = torch.ones(()) if record.scales is None else record.scales
        expected = plain[record.group.linears] / scales / (scales[:, None] if scales.ndim else 1)
        torch.testing.assert_close(scaled[record.group.linears], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_hessians_and_maxima_are_those_of_the_real_inputs():
    """Block 0 sees full-precision inputs: hooks on the plain model must give the same numbers."""
    reference = random_model(CONFIGS["qwen2"]())
    inputs = {}
    block = reference.model.layers[0]
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    tokens = windows()
    records = []
    with torch.no_grad():
        reference(tokens)
    run("qwen2", Settings("gptq", bits=4), tokens, records.append)
    by_linear = {record.group.linears[0]: record for record in records[:4]}
    for name, x in inputs.items():
        record = by_linear[name]
        flat = x.reshape(-1, x.shape[-1])
        hessian = 2 / len(tokens) * flat.T @ flat
        weight = record.before[name]
        difference = weight - record.packed[name].dequantize()
        expected = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
        assert record.errors[name] == pytest.approx(float(expected), rel=1e-3)


def test_activation_bits_are_rounded_while_calibrating(monkeypatch):
    model, _ = run("opt", Settings("billm", act_bits=6))
    layers = packed_linears(model)
    query = layers["model.decoder.layers.0.self_attn.q_proj"]
    assert (query.act_bits, query.act_scope, query.round_output) == (6, "tensor", True)
    assert not layers["model.decoder.layers.0.fc1"].round_output
    # per token and without rounding of outputs in the LLaMA family
    layer = packed_linears(run("llama", Settings(act_bits=8, ltdb_steps=1))[0])["model.layers.0.self_attn.q_proj"]
    assert (layer.act_bits, layer.act_scope, layer.round_output) == (8, "token", False)


def test_opt_smooths_and_learns_only_on_demand():
    assert Settings().resolved(family_named("opt")).ltdb == "smooth"
    assert Settings(ltdb="learn").resolved(family_named("opt")).ltdb == "learn"
    assert Settings().resolved(family_named("llama")).ltdb == "learn"


def test_column_scales_lower_the_error_of_the_first_block():
    errors = {}
    for ltdb in ("learn", "off"):
        _, result = run("llama", Settings(ltdb=ltdb))
        names = [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")]
        errors[ltdb] = sum(result.errors[name] for name in names)
    assert errors["learn"] < errors["off"]


@pytest.mark.parametrize(("method", "own"), [("billm", {}), ("bellbit", {"effort": "fast"})])
def test_more_than_a_twentieth_of_linears_with_hessians_beyond_repair_are_refused(
    method, own, monkeypatch, tiny_model, english, tmp_path
):
    calls = []

    def second_broken(hessian):
        calls.append(hessian)
        return inverse_factor(hessian)._replace(damping=None if len(calls) == 2 else 0.01)

    for module in (loop, entering):
        monkeypatch.setattr(module, "inverse_factor", second_broken)

    def quantize(**options):
        calls.clear()
        return bellbit.quantize(
            tiny_model("llama"), tmp_path / "out", method, calib=str(english), samples=4, seq_len=64, overwrite=True,
            **own, **options,
        )  # fmt: skip

    with pytest.raises(
        BellbitError, match=r"of 1 linears cannot be repaired .*, the last that of \S+o_proj; .*--allow-f"
    ):
        quantize()  # of 14
    assert quantize(allow_fallbacks=True).fallbacks == ["model.layers.0.self_attn.o_proj"]


def test_a_few_broken_hessians_are_reported(monkeypatch):
    calls = []

    def first_broken(hessian):
        calls.append(hessian)
        return inverse_factor(hessian)._replace(damping=None if len(calls) == 1 else 0.01)

    monkeypatch.setattr(loop, "inverse_factor", first_broken)
    _, result = run("llama", Settings("billm"))
    assert result.beyond_repair == 3
    assert result.fallbacks == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def test_an_all_zero_layer_has_no_error():
    model = random_model(CONFIGS["llama"]())
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert run("llama", Settings("billm"), model=model)[1].errors["model.layers.0.mlp.down_proj"] == 0


def test_infinite_inputs_are_refused_by_layer():
    model = random_model(CONFIGS["llama"]())
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(1e38)
    with pytest.raises(BellbitError, match=r"inputs of model\.layers\.1\.self_attn\.o_proj hold NaN or infinite"):
        run("llama", Settings("billm"), model=model)


@pytest.mark.parametrize("climbs", [False, True])
def test_an_expert_that_saw_few_tokens_is_rounded_plainly_and_told(climbs):
    model, tokens = random_model(CONFIGS["mixtral"]()), windows()
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.gate.top_k = 1
        block.mlp.gate.weight[1:] = torch.stack([-block.mlp.gate.weight[0], *torch.zeros(2, 192)])
    family = family_named("mixtral")  # a token goes to the first expert or to the second
    settings = Settings("bellbit", effort="fast") if climbs else Settings("gptq")
    settings = settings.resolved(family)
    if climbs:
        result = climb(Blocks(model, family), settings, tokens, "cpu", 0, lambda *_: None, Saved())
    else:
        result = quantize_model(Blocks(model, family), settings, tokens, "cpu", lambda *_: None, Saved())
    assert {f"model.layers.1.mlp.experts.3.{name}_proj" for name in ("gate", "up", "down")} <= set(result.fallbacks)
    assert model(tokens).logits.isfinite().all()


def test_short_calibration_text_makes_hessians_all_the_same():
    _, result = run("llama", tokens=windows(2, 16))
    assert result.fallbacks == []
