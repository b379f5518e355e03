"""Text from a model, piece by piece as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bellbit.decoding import fast_steps
from bellbit.errors import BellbitError
from bellbit.loading import check_length


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> str:
    """Continue `prompt` and return the new text; `on_text` gets it in pieces while it grows.

    temperature: 0 takes the likeliest token. chat: wrap the prompt as a user's message in the model's template.
    Raises BellbitError if the prompt has no tokens, or the model no template.
    """
    from transformers import TextStreamer

    pieces: list[str] = []

    class Pieces(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            on_text(text)

    if chat:
        if not tokenizer.chat_template:
            raise BellbitError("this model has no chat template; leave out --chat")
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise BellbitError("the prompt has no tokens; give some text")
    check_length(model.config, inputs["input_ids"].shape[1] + max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with fast_steps(model, inputs["input_ids"].shape[1] + max_new_tokens) as options:
        model.generate(
            **{key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")},
            max_new_tokens=max_new_tokens,
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
            **options,
        )
    return "".join(pieces)
