"""Nothing that a model or checkpoint contains is executed."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

import bellbit
from bellbit.errors import BellbitError
from bellbit.inspection import inspect
from bellbit.loading import load_config, load_model, load_tokenizer, locate

SOURCES = sorted(Path(bellbit.__file__).parent.rglob("*.py"))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_no_source_unpickles_or_evaluates():
    assert len(SOURCES) > 50
    readers = r"\b(import|from) (pickle|joblib|marshal|shelve|dill)\b|torch\.load"
    found = re.compile(readers + r"|(?<![.\w])(eval|exec)\(|trust_remote_code=True")
    for path in SOURCES:
        assert not (match := found.search(path.read_text())), f"{path.name}: {match.group()}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_the_place_of_weights_is_refused(name, tiny_model, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    for path in tiny_model("llama").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"model.embed_tokens.weight": Bomb(mark)}, folder / name)
    with pytest.raises(BellbitError, match="cannot load"):
        load_model(locate(str(folder)))
    with pytest.raises(BellbitError):
        bellbit.quantize(folder, tmp_path / "out", "sign")
    with pytest.raises(BellbitError):
        inspect(locate(str(folder)))
    assert not mark.exists()


@pytest.mark.parametrize("packed", [False, True])
def test_code_beside_a_model_is_not_run(packed, tiny_model, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    if packed:
        bellbit.quantize(tiny_model("llama"), folder, "sign")
    else:
        folder.mkdir()
        for path in tiny_model("llama").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.T", "code.T"]}),
    ):
        contents = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(contents | {"auto_map": classes}))
    for load in (load_config, load_model, load_tokenizer):
        try:
            load(locate(str(folder)))
        except BellbitError as error:
            assert "cannot load" in str(error)
    assert not mark.exists()
