"""A Hugging Face tokenizer as llama.cpp wants it in a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from bellbit.errors import BellbitError

# What the one expression contains by which a tokenizer splits text before byte-pair merges -> llama.cpp's name of it.
_SPLITS = ((r"\p{N}{1,3}", "llama-bpe"), (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "qwen2"))


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Write a tokenizer's tokens, merges or scores, marks and chat template.

    writer: gguf.GGUFWriter. vocabulary: of the model; what the tokenizer knows beyond it is left out.
    Raises BellbitError if it is no BPE, or splits text in a way that llama.cpp has no name for.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BellbitError(f"a {type(tokenizer).__name__} has no tokenizer.json and cannot be exported")
    described = json.loads(backend.to_str())
    if described["model"].get("type") != "BPE":
        raise BellbitError(f"a tokenizer of the kind {described['model'].get('type')!r} cannot be exported; BPE can")
    added = {entry["id"]: entry for entry in described.get("added_tokens", ())}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    merges = [m.split(" ") if isinstance(m, str) else m for m in described["model"].get("merges", ())]
    sentencepiece = bool(described["model"].get("byte_fallback"))  # a SentencePiece model, written as merges
    tokens, kinds = [], []
    for index in range(vocabulary):
        token = by_id.get(index, f"[PAD{index}]")
        if index not in by_id:
            kind = gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        elif sentencepiece and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(token)
        kinds.append(kind)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_rule(described))
        writer.add_token_merges([" ".join(pair) for pair in merges] or [""])
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_types(kinds)
    for kind_name in ("bos", "eos", "unk", "pad"):
        special = getattr(tokenizer, f"{kind_name}_token_id", None)
        if special is not None and special < vocabulary:  # a tokenizer may know more tokens than the model
            getattr(writer, f"add_{kind_name}_token_id")(special)
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(bool(starts))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece joins the neighbours whose union scores highest: what the first merges make; others never."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(described: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by the normalizer, or by the pre-tokenizer."""
    rules = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    return '"Prepend"' in rules or '"prepend_scheme": "first"' in rules or '"prepend_scheme": "always"' in rules


def _split_rule(described: dict[str, Any]) -> str:
    rule = described.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    splits = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    for part, name in _SPLITS:
        if len(splits) == 1 and part in splits[0]:
            return name
    if not splits and any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        digits = any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps)
        return "smollm" if digits else "gpt-2"
    shown = json.dumps(rule, ensure_ascii=False)[:200]
    raise BellbitError(f"the tokenizer splits text by a rule that llama.cpp has no known name for: {shown}")
