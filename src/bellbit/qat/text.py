"""Training text: a tokenizer learned from it, and sequences packed from its documents."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bellbit.data import Corpus
from bellbit.errors import BellbitError
from bellbit.loading import load_tokenizer, locate

BOS, EOS = "<s>", "</s>"


def make_tokenizer(spec: str, corpus: Corpus) -> Any:
    """A tokenizer: `train:N` learns N byte pairs from the text, anything else is a model's that exists already."""
    kind, _, size = spec.partition(":")
    if kind != "train":
        return load_tokenizer(locate(spec))
    if not size.isdigit() or int(size) < 300:
        raise BellbitError(f"--tokenizer {spec} is not possible; give train:N with N at least 300, or a model")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def packed_sequences(corpus: Corpus, tokenizer: Any, seq_len: int, at_least: int, folder: Path) -> Any:
    """Every document's tokens behind a BOS, one document after the other, cut into sequences of `seq_len`.

    Returns a memory-mapped data set with the column input_ids, one row per sequence; it lies in `folder`, and is taken
    from there if it does already.
    Raises BellbitError if there are fewer than `at_least` sequences, which is one batch.
    """
    try:
        from datasets import Dataset, Features, List, Value, load_from_disk
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        raise BellbitError("training keeps its text in `datasets`: pip install 'bellbit[train]'") from None
    disable_progress_bar()

    def rows() -> Iterator[dict[str, Any]]:
        rest: list[int] = []
        for start in range(0, len(corpus.documents), 1000):
            encoded = tokenizer(corpus.documents[start : start + 1000], add_special_tokens=False, verbose=False)
            for tokens in encoded["input_ids"]:
                rest += [tokenizer.bos_token_id, *tokens]
            whole = len(rest) // seq_len * seq_len
            for first in range(0, whole, seq_len):
                yield {"input_ids": rest[first : first + seq_len]}
            rest = rest[whole:]

    if tokenizer.bos_token_id is None:
        raise BellbitError("the tokenizer has no beginning-of-sequence token to put in front of documents")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            features = Features({"input_ids": List(Value("int32"))})
            made = Dataset.from_generator(rows, features=features, cache_dir=f"{beside}/cache")
            made.save_to_disk(f"{beside}/text")
            Path(f"{beside}/text").replace(folder)
    data = load_from_disk(str(folder))
    if len(data) < at_least:
        raise BellbitError(
            f"{corpus.name} has {len(data)} sequences of {seq_len} tokens, too few for one batch of {at_least}; "
            "give more text, a smaller --batch or a shorter --seq-len"
        )
    return data.with_format("torch")
