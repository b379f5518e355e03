"""prepare → train → convert: the packed model gives what the trained one gave, also from a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from bellbit.errors import BellbitError
from bellbit.packed.checkpoint import write_shards
from bellbit.packed.linear import PackedLinear, packed_linears
from bellbit.packed.save import StoredTensors, quantization_config
from bellbit.qat import QuantLinear, convert, prepare, quantizer
from conftest import LLAMA_LIKE

TOLERANCE = 1e-5  # of the largest output; measured 5e-7


def trained(weights, activations, columns=200):
    """A small network after one step, in evaluation mode."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(columns, 40), torch.nn.ReLU(), torch.nn.Linear(40, 7))
    prepare(model, weights, activations)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(torch.randn(6, columns)).square().sum().backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("activations", ["bbq:2", "none", "lsq:3", "bbq-fast:4", "n2uq:2", "nf:3", "quest:1"])
@pytest.mark.parametrize("weights", ["bbq:1", "bbq:3", "quest:3", "lsq:2", "seq:1", "seq:4", "n2uq:3", "nf:3"])
def test_converted_gives_what_was_trained(weights, activations):
    model, x = trained(weights, activations), torch.randn(5, 200)
    with torch.no_grad():
        expected = model(x)
        converted = convert(model)
        assert [type(module) for module in converted] == [PackedLinear, torch.nn.ReLU, PackedLinear]
        error = float((converted(x) - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE
    bits = int(weights[-1])
    assert converted[0].packed.bits_per_weight == bits + 32 / 200


def network(seed, weights="bbq:2", activations="bbq-fast:3"):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 7))
    return prepare(model, weights, activations)


def steps(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x in inputs:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_state_goes_on_from_a_state_dict():
    """What is learned, the running 1/rms, and that neither starts anew at the next batch."""
    inputs = torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(0))
    whole = steps(network(0), inputs)
    second = network(1)
    second.load_state_dict(steps(network(0), inputs[:3]).state_dict())
    actual = steps(second, inputs[3:]).state_dict()
    assert {"0.input_quantizer.inverse_rms", "0.input_quantizer.ready", "2.weight_quantizer.gamma"} <= set(actual)
    assert all(torch.equal(values, actual[name]) for name, values in whole.state_dict().items())


@pytest.mark.parametrize("quantizers", [("bbq:2", "bbq-fast:3"), ("quest:2", "lsq:2"), ("seq:2", "n2uq:2")])
def test_compiled_training_is_eager_training(quantizers):
    inputs = torch.randn(4, 5, 40, generator=torch.Generator().manual_seed(0))
    expected = steps(network(0, *quantizers), inputs).state_dict()
    model = network(0, *quantizers)
    steps(torch.compile(model, backend="aot_eager"), inputs)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)  # measured 0


def test_a_converted_model_survives_the_file(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_LIKE)).eval()
    prepare(model, "bbq:2", "bbq-fast:3")
    tokens = torch.randint(0, 256, (2, 20))
    model.train()(tokens, labels=tokens).loss.backward()
    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits
        convert(model)
        write_shards(StoredTensors(model), tmp_path)
        model.config.quantization_config = quantization_config(model, "bbq", "token", 16, {})
        model.config.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert len(packed_linears(loaded)) == 14
        error = float((loaded(tokens).logits - expected).abs().max() / expected.abs().max())
    assert error <= 1e-6  # measured 0
    name = "model.layers.0.self_attn.q_proj.input_quantizer.gamma"
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {name: stored[name].half()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BellbitError, match=rf"{name}' is F16 \(1,\), but config.json makes it F32"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("activations", ["bbq:2", "lsq:3", "none"])
def test_weights_that_are_not_quantized_take_16_bits(activations):
    model, x = trained("none", activations), torch.randn(5, 200)
    for layer in (model[0], model[2]):
        layer.weight.data.copy_(layer.weight.half())
    with torch.no_grad():
        expected = model(x)
        error = float((convert(model)(x) - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE and model[0].packed.bits_per_weight == 16


def test_the_head_and_what_is_named_stay(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_LIKE))
    prepare(model, skip=("lm_head", "*.down_proj"))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    plain = {name for name, kind in kinds.items() if kind is torch.nn.Linear}
    assert plain == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert set(kinds.values()) == {torch.nn.Linear, QuantLinear}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bbq:5", r"bbq is not defined at 5 bits; give bbq:1 … bbq:4"),
        ("lsq:1", r"lsq is not defined at 1 bits; give lsq:2"),
        ("nf", r"nf is not defined at no bits"),
        ("awq:4", r"unknown quantizer 'awq:4'; there are none, bbq:BITS"),
    ],
)
def test_what_is_not_defined_is_refused(spec, message):
    with pytest.raises(BellbitError, match=message):
        quantizer(spec)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(BellbitError, match=message):
        prepare(model, weights=spec)
    assert type(model[0]) is torch.nn.Linear


def test_what_cannot_be_packed_says_why():
    with pytest.raises(BellbitError, match="have seen no batch yet"):
        convert(prepare(torch.nn.Sequential(torch.nn.Linear(3, 3))))
    with pytest.raises(BellbitError, match="nothing to convert"):
        convert(torch.nn.Sequential(torch.nn.Linear(3, 3)))
    with pytest.raises(BellbitError, match="give the module that holds it"):
        convert(prepare(torch.nn.Linear(3, 3)))
    with pytest.raises(BellbitError, match=r"no nn\.Linear to quantize"):
        prepare(torch.nn.Sequential(torch.nn.ReLU()))
