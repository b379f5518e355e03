"""Decoder blocks as a run takes them up and puts them down: of a model in memory, or read from its files one by one."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bellbit.errors import BellbitError, first_line
from bellbit.loading import Location, compute_dtype, quiet
from bellbit.memory import map_large_arrays, release_memory
from bellbit.packed.checkpoint import read_headers
from bellbit.packed.half import settle_half
from bellbit.packed.hf import BellbitConfig, BellbitQuantizer
from bellbit.packed.linears import unfuse
from bellbit.packed.save import Apart, round_unquantized
from bellbit.ptq.families import Family
from bellbit.ptq.resume import Saved

HASHED = 16384  # bytes of each tensor


class Blocks:
    """The decoder blocks of a model that is in memory whole; they are there already."""

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family

    @property
    def all(self) -> list[nn.Module]:
        """Every block, whether its weights are there or not."""
        return list(self.model.get_submodule(self.family.blocks).children())

    def name(self, index: int) -> str:
        """Of a block, in full."""
        return f"{self.family.blocks}.{index}"

    def take_up(self, index: int) -> nn.Module:
        """A block with its weights, each of its matrices an `nn.Linear`."""
        return self.all[index]

    def put_down(self, index: int) -> None:
        """The run is done with a block for now, and has kept what it wants of it."""
        self.all[index].to("cpu")
        release_memory()

    def kept(self, saved: Saved) -> Apart | None:
        """What a run has kept of blocks that are not in memory when it is done."""
        return None


class BlocksFromFiles(Blocks):
    """Those of a model of which the rest alone is in memory; a block has weights from when it is taken up to when it is
    put down, and then none. What a run makes of it must have been kept elsewhere.

    Weights go from file to module by transformers' own conversions, so that what it renames or fuses is renamed and
    fused here.
    """

    def __init__(self, location: Location, dtype: str, config: Any, family: Family) -> None:
        """location: of safetensors files. dtype: `auto`, or a key of DTYPES.

        Raises BellbitError if a file is not to be had or lacks a weight.
        """
        from transformers import GenerationConfig
        from transformers.conversion_mapping import get_model_conversion_mapping

        map_large_arrays()
        self.location = location
        self.files = checkpoint_files(location)
        self._headers = read_headers(self.files)
        self.dtype = compute_dtype(dtype, config)
        super().__init__(skeleton(config, self.dtype), family)
        self._conversions = get_model_conversion_mapping(self.model)
        self._inside = re.compile(rf"(?:^|\.){re.escape(family.blocks.rpartition('.')[2])}\.(\d+)\.")
        self._check_names()
        missing = self._fill(None)
        self.model.tie_weights(missing_keys=missing)  # what has values of its own in the files keeps them
        self._check_there(lambda name: not name.startswith(f"{family.blocks}."))
        check_finite(self.model)
        round_unquantized(self.model, set())
        with suppress(OSError):
            self.model.generation_config = GenerationConfig.from_pretrained(location.path)

    def take_up(self, index: int) -> nn.Module:
        self._fill(index)
        self._check_there(lambda name: name.startswith(f"{self.name(index)}."))
        block = super().take_up(index)
        check_finite(block, f"{self.name(index)}.")
        unfuse(block)
        round_unquantized(block, {linear for group in self.family.groups_of(block) for linear in group.linears})
        return block

    def put_down(self, index: int) -> None:
        forget(self.all[index])
        release_memory()

    def kept(self, saved: Saved) -> Apart | None:
        return KeptBlocks(self, saved)

    def fingerprint(self) -> str:
        """What tells this model from another: 16 hex digits of SHA-256 over the first bytes of every tensor."""
        digest = hashlib.sha256()
        for name, stored in sorted(self._headers.items()):
            with stored.file.open("rb") as stream:
                stream.seek(stored.start)
                digest.update(name.encode() + stream.read(min(stored.nbytes, HASHED)))
        return digest.hexdigest()[:16]

    def _check_names(self) -> None:
        """Raise BellbitError for the first tensor that one block lacks and most of its kind have.

        That block's turn may be hours off. Names are those of the files. What all lack is missed in the first.
        """
        found: list[set[str]] = [set() for _ in self.all]
        for name in self._headers:
            if (place := self._inside.search(name)) is not None and int(place[1]) < len(found):
                found[int(place[1])].add(f"{name[: place.start(1)]}{{}}{name[place.end(1) :]}")
        kinds: dict[tuple[str, ...], list[int]] = {}
        for index, block in enumerate(self.all):
            kinds.setdefault(tuple(block.state_dict()), []).append(index)
        for alike in kinds.values():
            counts = Counter(name for index in alike for name in found[index])
            usual = {name for name, count in counts.items() if count > len(alike) / 2}
            for index in alike:
                for name in sorted(usual - found[index]):
                    raise BellbitError(f"{self.location.spec!r} lacks the tensor {name.format(index)!r}")

    def _check_there(self, wanted: Callable[[str], bool]) -> None:
        """Raise BellbitError for the first tensor of the wanted ones that has no values."""
        for name, tensor in self.model.state_dict().items():
            if wanted(name) and tensor.is_meta:
                raise BellbitError(f"{self.location.spec!r} lacks the tensor {name!r}")

    def _fill(self, index: int | None) -> set[str]:
        """Read a block, or without an index all that is in none. Returns the names of what was not read."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        try:
            with ExitStack() as opened:
                found = {}
                for file in self.files:
                    stream = opened.enter_context(safe_open(file, framework="pt"))
                    for key in stream.keys():  # noqa: SIM118
                        place = self._inside.search(key)
                        if (None if place is None else int(place[1])) == index:
                            found[key] = stream.get_slice(key)
                how = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self._conversions)
                info, _ = convert_and_load_state_dict_in_model(model=self.model, state_dict=found, load_config=how)
                return set(info.missing_keys)
        except MemoryError:
            raise
        except Exception as error:  # a damaged or vanished file makes readers raise whatever they happen on
            if "can't allocate memory" in str(error):
                raise
            raise BellbitError(
                f"cannot read {self.name(index) if index is not None else 'the embeddings'} of "
                f"{self.location.spec!r}: {first_line(error)}"
            ) from error


def skeleton(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a config without weights (they are on the meta device), but with its buffers."""
    quiet()
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()  # it notes the dtype there
    model.tie_weights()
    return model


def checkpoint_files(location: Location) -> list[Path]:
    """The safetensors files of a model, fetched if need be. Raises BellbitError if it has none."""
    quiet()
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    quietly = {"_raise_exceptions_for_missing_entries": False}
    try:
        if (file := cached_file(location.path, SAFE_WEIGHTS_NAME, **quietly)) is not None:
            return [Path(file)]
        if (index := cached_file(location.path, SAFE_WEIGHTS_INDEX_NAME, **quietly)) is not None:
            return [Path(file) for file in get_checkpoint_shard_files(location.path, index)[0]]
    except OSError as error:
        raise BellbitError(f"cannot load {location.spec!r}: {first_line(error)}") from error
    raise BellbitError(f"cannot load {location.spec!r}: it has no file named {SAFE_WEIGHTS_NAME}, nor shards of one")


def check_finite(module: nn.Module, prefix: str = "") -> None:
    """Raise BellbitError naming the first tensor that holds NaN or infinite values; prefix: of its name."""
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise BellbitError(f"the tensor {prefix + name!r} of the model holds NaN or infinite values")


def forget(block: nn.Module) -> None:
    """Give up what a checkpoint holds of a block, in place; buffers that none holds, as masks, stay."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")


@contextmanager
def block_by_block(blocks: Mapping[str, nn.Module], read: Callable[[str], Mapping[str, Tensor]]) -> Iterator[None]:
    """Inside, a model runs although its blocks have no weights: each gets them when it runs, and loses them after.

    read: what a block holds, by its name in `blocks`.
    """

    def filling(name: str) -> Callable[..., None]:
        return lambda block, _: put(block, read(name))

    with ExitStack() as handles:
        for name, block in blocks.items():
            handles.callback(block.register_forward_pre_hook(filling(name)).remove)
            handles.callback(block.register_forward_hook(lambda block, *_: forget(block)).remove)
        yield


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module on the meta device its tensors, in the dtypes that it has there; it may hold others besides."""
    declared = module.state_dict()
    module.load_state_dict(
        {name: tensor.to(declared[name].dtype) for name, tensor in tensors.items()}, strict=False, assign=True
    )


class KeptBlocks:
    """What a run has made of the blocks of a model that it read one by one, for what comes after it: an `Apart`."""

    def __init__(self, blocks: BlocksFromFiles, saved: Saved) -> None:
        self.blocks, self.saved = blocks, saved

    def tensor(self, name: str) -> Tensor:
        index, _, rest = name.removeprefix(f"{self.blocks.family.blocks}.").partition(".")
        return self.saved.one(self.blocks.name(int(index)), rest)

    def running(self) -> AbstractContextManager[None]:
        def read(name: str) -> Mapping[str, Tensor]:
            found = self.saved.load(name)
            assert found is not None
            return found[0]

        return block_by_block(dict(zip(self._names(), self.blocks.all, strict=True)), read)

    @contextmanager
    def reopened(self, folder: Path) -> Iterator[Any]:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        model = skeleton(config, config.dtype)
        files = sorted(folder.glob("*.safetensors"))
        loader = BellbitQuantizer(BellbitConfig(**config.quantization_config))
        loader._process_model_before_weight_loading(model, [str(file) for file in files])

        def read(wanted: Callable[[str], bool], prefix: str = "") -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for file in files:  # not kept open: what is mapped counts as memory in use
                with safe_open(file, framework="pt") as stream:
                    found |= {
                        name.removeprefix(prefix): stream.get_tensor(name) for name in filter(wanted, stream.keys())
                    }
            return found

        inside = f"{self.blocks.family.blocks}."
        put(model, read(lambda name: not name.startswith(inside)))
        model.tie_weights()
        settle_half(model)
        blocks = dict(zip(self._names(), model.get_submodule(self.blocks.family.blocks).children(), strict=True))
        with block_by_block(blocks, lambda block: read(lambda name: name.startswith(f"{block}."), f"{block}.")):
            yield model

    def _names(self) -> list[str]:
        return [self.blocks.name(index) for index in range(len(self.blocks.all))]
