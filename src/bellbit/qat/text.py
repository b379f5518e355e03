"""Training text: a tokenizer learned from it, and sequences packed from its documents."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bellbit.data import Corpus, load_corpus
from bellbit.errors import BellbitError
from bellbit.loading import load_tokenizer, locate
from bellbit.qat.settings import Resolved

BOS, EOS = "<s>", "</s>"


def text_of_run(state: Path, settings: Resolved) -> tuple[Any, Any]:
    """A run's tokenizer and sequences, made once and kept in its folder `state`.

    Returns the tokenizer and a memory-mapped data set with the column input_ids, one row per sequence.
    Raises BellbitError if the text is not one batch.
    """
    try:
        from datasets import load_from_disk
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        raise BellbitError("training keeps its text in `datasets`: pip install 'bellbit[train]'") from None
    from transformers import AutoTokenizer

    disable_progress_bar()
    if not (state / "text").exists():
        corpus = load_corpus(settings.data, "train")
        made = make_tokenizer(settings.tokenizer, corpus)
        made.save_pretrained(state / "tokenizer")
        pack(corpus, made, settings.seq_len, state / "text")
    data = load_from_disk(str(state / "text"))
    if len(data) < settings.batch:
        raise BellbitError(
            f"{settings.data} has {len(data)} sequences of {settings.seq_len} tokens, too few for one batch of "
            f"{settings.batch}; give more text, a smaller --batch or a shorter --seq-len"
        )
    return AutoTokenizer.from_pretrained(state / "tokenizer"), data.with_format("torch")


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


def pack(corpus: Corpus, tokenizer: Any, seq_len: int, folder: Path) -> None:
    """Write as a data set every document's tokens behind a BOS, one document after the other, cut into `seq_len`."""
    from datasets import Dataset, Features, List, Value

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
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        features = Features({"input_ids": List(Value("int32"))})
        made = Dataset.from_generator(rows, features=features, cache_dir=f"{beside}/cache")
        made.save_to_disk(f"{beside}/text")
        Path(f"{beside}/text").replace(folder)
