import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bellbit
from bellbit.data import Corpus, evaluation_windows
from bellbit.evaluate import perplexity


def test_a_step_per_tensor_does_not_depend_on_the_batch(tiny_model, english, tmp_path):
    options = {"calib": str(english), "samples": 2, "seq_len": 64, "act_bits": 6}
    report = bellbit.quantize(tiny_model("opt"), tmp_path / "out", "billm", **options)
    model = AutoModelForCausalLM.from_pretrained(report.out).eval()
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    single = [math.log(perplexity(model, tokens[i : i + 1]).perplexity) for i in range(4)]
    assert math.log(perplexity(model, tokens).perplexity) == pytest.approx(sum(single) / 4, rel=1e-6)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_perplexity_is_that_of_a_plain_transformers_loop(tiny_model, english, adds_bos):
    folder = tiny_model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    text = english.read_text()[:3000]
    found = perplexity(model, evaluation_windows(Corpus("x", [text]), tokenizer, 128))

    ids = tokenizer(text, return_tensors="pt").input_ids
    assert (ids[0, 0] == 256) == adds_bos  # what the tokenizer does of itself, once, and nothing else
    losses = []
    for i in range(ids.shape[1] // 128):
        window = ids[:, i * 128 : (i + 1) * 128]
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.item())
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.tokens, found.windows) == (len(losses) * 128, len(losses))
