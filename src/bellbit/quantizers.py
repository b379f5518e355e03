"""Quantizers as modules: tensor in, fake-quantized tensor out, what is learned set up at the first forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bellbit.core import baselines, bellbox
from bellbit.errors import BellbitError
from bellbit.kernels import rotate

RUNNING_SHARE = 0.01  # of the newest batch in bbq-fast's running 1/rms
SMALLEST = 1e-8  # step, edge or rms that a quantizer starts from: inputs may be all zero

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """One way to quantize.

    widths: the bits it is defined at. rotates: whether it sees x·H and returns that domain's values.
    shapes: (width, channels) to the learned parameters, fixed: to tensors that are set once and kept.
    start: (x, width, channels) to the values of both at the first forward. apply: (quantizer, x) to the output.
    codes: (quantizer, weight), rotated if it rotates, to codes 0 … 2ᵇ − 1; None if they are not known.
    spacing: likewise to the distance of two levels, (rows, 1) or (); None for NF's levels, which are on no grid.
    zero: (width) to what is subtracted from a code before the spacing multiplies it. bell: whether it is BBQ.
    """

    widths: tuple[int, ...]
    apply: Callable[[Any, Tensor], Tensor]
    rotates: bool = False
    shapes: Callable[[int, int | None], Shapes] = lambda width, channels: {}
    fixed: Callable[[int, int | None], Shapes] = lambda width, channels: {}
    start: Callable[[Tensor, int, int | None], dict[str, Tensor]] = lambda x, width, channels: {}
    codes: Callable[[Any, Tensor], Tensor] | None = None
    spacing: Callable[[Any, Tensor], Tensor] | None = None
    zero: Callable[[int], float] = lambda width: 2 ** (width - 1) - 0.5
    bell: bool = False


def _per_row(channels: int | None) -> tuple[int, ...]:
    return (1,) if channels is None else (channels, 1)  # never (), which FSDP2 cannot shard


def _bbq(quantizer: Any, x: Tensor) -> Tensor:
    gamma = baselines.scaled_gradient(quantizer.gamma, x.numel() ** -0.5)
    return bellbox.bellbox(x, gamma, quantizer.width, quantizer.channels is not None, rotate=rotate)[0]


def _bbq_fast(quantizer: Any, x: Tensor) -> Tensor:
    if quantizer.channels is not None:
        return _bbq(quantizer, x)
    gamma = baselines.scaled_gradient(quantizer.gamma, x.numel() ** -0.5)
    running = quantizer.inverse_rms
    if not quantizer.training:
        return bellbox.bellbox(x, gamma, quantizer.width, False, running, rotate)[0]
    y, inverse = bellbox.bellbox(x, gamma, quantizer.width, False, rotate=rotate)
    with torch.no_grad():
        running.lerp_(inverse, RUNNING_SHARE)
    return y


def _bbq_start(x: Tensor, width: int, channels: int | None) -> dict[str, Tensor]:
    v = rotate(x)  # its rms is x's, but for rounding
    inverse = bellbox.inverse_rms(v, by_row=False)
    return {"gamma": bellbox.INIT / inverse, "inverse_rms": inverse}


def _lsq_start(x: Tensor, width: int, channels: int | None) -> dict[str, Tensor]:
    return {"step": 2 * x.abs().mean().clamp_min(SMALLEST) / (2 ** (width - 1) - 1) ** 0.5}


def _seq_start(x: Tensor, width: int, channels: int | None) -> dict[str, Tensor]:
    largest = x.abs().amax() if channels is None else x.abs().amax(dim=-1, keepdim=True)
    return {"edge": largest.clamp_min(SMALLEST)}


def _n2uq(quantizer: Any, x: Tensor) -> Tensor:
    if quantizer.channels is not None:
        return baselines.n2uq_weight(x, quantizer.width)
    q = quantizer
    y: Tensor = baselines.n2uq_activation(x, q.start, q.lengths, q.scale1, q.scale2, q.interval, q.zero)
    return y


def _n2uq_shapes(width: int, channels: int | None) -> Shapes:
    return {} if channels else {"start": (1,), "lengths": (2**width - 1,), "scale1": (1,), "scale2": (1,)}


def _n2uq_start(x: Tensor, width: int, channels: int | None) -> dict[str, Tensor]:
    rms = x.square().mean().sqrt().clamp_min(SMALLEST)
    interval = 4 * rms / (2**width - 1)
    one = torch.ones_like(rms)
    return {
        "start": -2 * rms,
        "zero": -2 * rms,
        "interval": interval,
        "lengths": interval,
        "scale1": one,
        "scale2": one,
    }


def _quest_step(quantizer: Any, v: Tensor) -> Tensor:
    return baselines.quest_step(v.square().mean(dim=-1, keepdim=True).sqrt(), quantizer.width)


_BBQ = Method(
    (1, 2, 3, 4),
    _bbq,
    rotates=True,
    shapes=lambda width, channels: {"gamma": _per_row(channels)},
    start=_bbq_start,
    codes=lambda q, v: bellbox.normal_codes(v * bellbox.inverse_rms(v, by_row=True), q.width),
    spacing=lambda q, v: q.gamma / 2 ** (q.width - 1),
    zero=bellbox.zero_point,
    bell=True,
)
METHODS: dict[str, Method] = {
    "bbq": _BBQ,
    "bbq-fast": replace(_BBQ, apply=_bbq_fast, fixed=lambda width, channels: {} if channels else {"inverse_rms": ()}),
    "quest": Method(
        (1, 2, 3, 4),
        lambda q, x: baselines.quest(rotate(x), q.width),
        rotates=True,
        codes=lambda q, v: baselines.quest_codes(v, _quest_step(q, v), q.width),
        spacing=_quest_step,
    ),
    "lsq": Method(
        (2, 3, 4),
        lambda q, x: baselines.lsq(x, q.step, q.width),
        shapes=lambda width, channels: {"step": (1,)},
        start=_lsq_start,
        codes=lambda q, x: baselines.lsq_codes(x, q.step, q.width),
        spacing=lambda q, x: q.step,
    ),
    "seq": Method(
        (1, 2, 3, 4),
        lambda q, x: baselines.seq(x, q.edge, q.width),
        shapes=lambda width, channels: {"edge": _per_row(channels)},
        start=_seq_start,
        codes=lambda q, x: baselines.seq_codes(x, q.edge, q.width),
        spacing=lambda q, x: q.edge / 2 ** (q.width - 1) * (2 if q.width == 1 else 1),
    ),
    "n2uq": Method(
        (1, 2, 3, 4),
        _n2uq,
        shapes=_n2uq_shapes,
        fixed=lambda width, channels: {} if channels else {"interval": (), "zero": ()},
        start=_n2uq_start,
        codes=lambda q, x: baselines.n2uq_codes(x, baselines.n2uq_factor(x, q.width), q.width),
        spacing=lambda q, x: baselines.n2uq_factor(x, q.width) / ((2**q.width - 1) / 2),
    ),
    "nf": Method((2, 3, 4), lambda q, x: baselines.nf(x, q.width), codes=lambda q, x: baselines.nf_codes(x, q.width)),
}


def _look(quantizer: Quantizer, _: Any) -> None:
    if "ready" in quantizer._buffers:
        quantizer._ready = bool(quantizer.ready)


class Quantizer(nn.Module):
    """Fake-quantizes what goes through it; made by `quantizer`.

    Input and output (..., n), any float dtype; rotated on the way if the method rotates. Learned parameters are
    float32, exist from the start and get their values from the first batch; the buffer `ready` says whether they have.
    What FSDP shards must have seen one before: it forgets what a forward writes into parameters.
    """

    def __init__(self, method: str, width: int, channels: int | None) -> None:
        super().__init__()
        self.method, self.width, self.channels = method, width, channels
        self.spec = f"{method}:{width}"
        for name, shape in self.rules.shapes(width, channels).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, shape in self.rules.fixed(width, channels).items():
            self.register_buffer(name, torch.zeros(shape))
        self.ready: Tensor
        self.register_buffer("ready", torch.tensor(False))
        self._ready = False  # what `ready` holds, without a look at the device
        self.register_load_state_dict_post_hook(_look)  # type: ignore[no-untyped-call]

    @property
    def rules(self) -> Method:
        """Of its method."""
        return METHODS[self.method]

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready:
            self._start(x)
        if self.rules.bell:  # has a backward of its own
            return self.rules.apply(self, x)
        if not torch.is_grad_enabled():
            return self._composed(x)
        # kept for backward is x alone, not the up to 21 bytes an element of the formula's chain
        return checkpoint(self._composed, x, use_reentrant=False, preserve_rng_state=False)

    def _composed(self, x: Tensor) -> Tensor:
        return self.rules.apply(self, x.float()).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Moves as any module does, but what is learned stays float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """First values; with several processes those of the first one, so that all begin alike."""
        values = self.rules.start(x.float(), self.width, self.channels)
        for name, target in [*self.named_parameters(), *self.named_buffers()]:
            if name in values:
                target.copy_(values[name].expand_as(target))
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    torch.distributed.broadcast(target.data, 0)
        self.ready.fill_(True)
        self._ready = True

    @property
    def bell(self) -> tuple[Tensor, Tensor | None] | None:
        """If it is BBQ's, for activations in evaluation: γ, and the 1/rms that is kept, None for the input's own."""
        return (self.get_parameter("gamma"), self._buffers.get("inverse_rms")) if self.rules.bell else None

    def settled(self) -> Quantizer:
        """For inference: all values are there, or will come from a file. Returns itself."""
        self._buffers.pop("ready", None)
        self._ready = True
        return self.requires_grad_(False).eval()

    def extra_repr(self) -> str:
        rows = "" if self.channels is None else f", channels={self.channels}"
        return f"{self.spec}{rows}"


def rotates(module: nn.Module) -> bool:
    """Whether what a quantizer returns is rotated."""
    return isinstance(module, Quantizer) and module.rules.rotates


def parse(spec: str) -> tuple[str, int] | None:
    """Method and bits of METHOD:BITS, as `bbq:2`; None for `none`.

    Raises BellbitError if there is no such method, or none at that width.
    """
    if spec == "none":
        return None
    name, _, bits = spec.partition(":")
    method = METHODS.get(name)
    if method is None:
        raise BellbitError(f"unknown quantizer {spec!r}; there are none, {', '.join(f'{n}:BITS' for n in METHODS)}")
    if bits not in map(str, method.widths):
        raise BellbitError(
            f"{name} is not defined at {bits or 'no'} bits; give {name}:{method.widths[0]} … {name}:{method.widths[-1]}"
        )
    return name, int(bits)


def input_tensors(spec: str) -> Shapes:
    """What a quantizer of activations holds in evaluation, float32, by name. Raises BellbitError, see `parse`."""
    found = parse(spec)
    if found is None:
        return {}
    name, width = found
    return METHODS[name].shapes(width, None) | METHODS[name].fixed(width, None)


def quantizer(spec: str, channels: int | None = None) -> nn.Module:
    """The quantizer METHOD:BITS, as `bbq:2`; `none` leaves its input as it is.

    channels: rows of the weight that it is for; None for activations.
    Raises BellbitError if there is no such method, or none at that width.
    """
    found = parse(spec)
    return nn.Identity() if found is None else Quantizer(*found, channels)
