"""The compiled decoder gives what the model itself gives, token by token."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bellbit
from bellbit.decoding import Decoder, fast_steps, supports
from bellbit.generate import generate
from bellbit.kernels import native
from bellbit.loading import cache_argument

pytestmark = pytest.mark.skipif(not native.available(), reason="built without a compiler")

TOLERANCE = 1e-4  # of the largest logit; measured 2e-6
# codebook2 with rounded activations: weights are rounded to 16 bits, so that activations of a later layer get
# neighbouring codes. Measured over 12 texts on two machines: at most .019 at the median position, .050 at the worst.
ROUNDED_TOLERANCE = 0.03
WORST_ROUNDED_TOLERANCE = 0.1


@pytest.fixture(scope="module")
def quantized(tiny_model, english, tmp_path_factory):
    """Loads a tiny model of a family, quantized once per set of options."""
    made = {}

    def make(family, method="rtn", **options):
        key = (family, method, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("decoding") / "out"
            bellbit.quantize(
                tiny_model(family), made[key], method, calib=str(english), samples=2, seq_len=32, **options
            )
        return AutoModelForCausalLM.from_pretrained(made[key]).eval(), AutoTokenizer.from_pretrained(made[key])

    return make


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"bits": 3}),
        ("llama", {"method": "billm"}),
        ("llama", {"method": "billm", "act_bits": 8}),
        ("llama", {"method": "sign", "act_bits": 6}),
        ("mistral", {"bits": 4}),
        ("qwen2", {"method": "sign"}),
        ("qwen3", {"method": "sign"}),
    ],
    ids=str,
)
def test_logits_are_the_models(quantized, family, options):
    model, _ = quantized(family, **options)
    assert supports(model, 40)
    decoder = Decoder(model, 40)
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits[0]
        decoder.take_over(model(tokens[:, :10], use_cache=True)[cache_argument(model)])
    steps = torch.stack([decoder.step(int(tokens[0, position]), position) for position in range(10, 40)])
    errors = (steps - expected[10:]).abs().amax(dim=-1) / expected.abs().max()
    rounds = options.get("method") == "billm" and "act_bits" in options
    assert float(errors.median()) <= (ROUNDED_TOLERANCE if rounds else TOLERANCE)
    assert float(errors.max()) <= (WORST_ROUNDED_TOLERANCE if rounds else TOLERANCE)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_says_the_same_with_and_without_it(quantized, temperature, monkeypatch):
    model, tokenizer = quantized("llama", bits=4)
    options = {"max_new_tokens": 20, "temperature": temperature, "seed": 3}
    steps = []
    original = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *a: steps.append(a) or original(self, *a))
    fast = generate(model, tokenizer, "Once upon", **options)
    assert len(steps) == 19  # the first new token comes from the prompt's own run
    monkeypatch.setattr("bellbit.decoding.supports", lambda *_: False)
    assert generate(model, tokenizer, "Once upon", **options) == fast
    assert len(steps) == 19
    assert "forward" not in vars(model)  # nothing stays behind


def test_a_one_token_prompt(quantized):
    model, tokenizer = quantized("llama", bits=4)
    assert generate(model, tokenizer, "O", max_new_tokens=3)


def test_what_it_cannot_run_is_left_to_transformers(quantized, tiny_model):
    opt, _ = quantized("opt", bits=4)
    mistral, _ = quantized("mistral", bits=4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    assert not supports(opt, 10)
    assert supports(mistral, 48) and not supports(mistral, 49)  # its sliding window
    assert not supports(plain, 10)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(mistral.model.layers[1].mlp.up_proj, "input_quantizer", torch.nn.Identity())
        assert not supports(mistral, 48)
    with fast_steps(plain, 10) as options:
        assert options == {}


def test_positions_and_tokens_beyond_the_end_are_refused(quantized):
    model, _ = quantized("llama", bits=4)
    decoder = Decoder(model, 4)
    for token, position in ((0, 4), (0, -1), (258, 0), (-1, 0)):
        with pytest.raises(IndexError):
            decoder.step(token, position)
