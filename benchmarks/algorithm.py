"""How much faster the algorithm is than the published loops: LTDB, search, binarization, compensation.

Three real decoder blocks of the demo model with their real Hessians and maxima, both sides on 2 threads, the
plain loops (tests/oracle.py) once, ours the median of three. Checks that both find the same masks.
"""

import statistics
import time

import torch

from bellbit.core.braq import braq
from bellbit.core.hessian import accumulate, inverse_factor, new_hessian
from bellbit.core.ltdb import learn_column_scales
from bellbit.data import calibration_windows, load_corpus
from bellbit.demo import MODEL, TEXT
from bellbit.loading import load_model, load_tokenizer, locate
from bellbit.ptq.families import family_of
from common import note, oracle, parser, row, show

BLOCKS = (0, 15, 29)
SAMPLES, SEQ_LEN = 8, 1024
REPEATS = 3
BAR = 20


def captured():
    """Weights, maximum and Hessian of every group of linears of the three blocks."""
    location = locate(MODEL)
    model = load_model(location, "float32")
    family = family_of(model.config)
    windows = calibration_windows(load_corpus(TEXT, "train"), load_tokenizer(location), SAMPLES, SEQ_LEN, seed=0)
    problems = []
    for index in BLOCKS:
        block = model.get_submodule(family.blocks)[index]
        for group in family.groups:
            weights = [block.get_submodule(name).weight.detach() for name in group.linears]
            problem = {
                "weights": weights,
                "scaled": group.norm is not None,
                "hessian": new_hessian(weights[0].shape[1]),
                "maximum": torch.zeros(weights[0].shape[1]),
            }

            def take(_, inputs, problem=problem):
                accumulate(problem["hessian"], inputs[0], SAMPLES)
                torch.maximum(problem["maximum"], inputs[0].abs().flatten(0, -2).amax(dim=0), out=problem["maximum"])

            block.get_submodule(group.linears[0]).register_forward_pre_hook(take)
            problems.append(problem)
    with torch.no_grad():
        for window in windows:
            model.base_model(window[None], use_cache=False)
    return problems


def ours(problem):
    """Masks and column scales of one group, as the package computes them."""
    weights, hessian, scales = problem["weights"], problem["hessian"], None
    if problem["scaled"]:
        scales = learn_column_scales(weights, problem["maximum"])
        weights = [weight * scales for weight in weights]
        hessian = hessian / scales / scales[:, None]
    factor = inverse_factor(hessian)
    return [[(b.salient, b.second) for b in braq(weight, factor)] for weight in weights], scales


def plain(problem, scales):
    """The same by the plain loops; the masks with the given scales, so that they can be compared."""
    weights, hessian = problem["weights"], problem["hessian"]
    if problem["scaled"]:
        with torch.enable_grad():
            found = oracle.learn_column_scales(weights, problem["maximum"])
        torch.testing.assert_close(scales, found, rtol=1e-3, atol=0)
        weights = [weight * scales for weight in weights]
        hessian = hessian / scales / scales[:, None]
    return [oracle.quantize_layer(weight, hessian, 1, sign=oracle.one_bit_sign)[1] for weight in weights]


@torch.no_grad()
def main():
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(2)
    problems = captured()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        found = [ours(problem) for problem in problems]
        seconds.append(time.perf_counter() - started)
    note(f"ours: {statistics.median(seconds):.2f} s, median of {REPEATS}; the plain loops take about a minute")
    started = time.perf_counter()
    expected = [plain(problem, scales) for problem, (_, scales) in zip(problems, found, strict=True)]
    slow = time.perf_counter() - started
    note(f"plain loops: {slow:.1f} s")

    same = total = 0
    for (masks, _), plain_masks in zip(found, expected, strict=True):
        for layer, plain_layer in zip(masks, plain_masks, strict=True):
            for (salient, second), (plain_salient, plain_sparse) in zip(layer, plain_layer, strict=True):
                ordinary = ~salient
                same += int((salient == plain_salient).all()) * int(
                    (second[:, ordinary] == plain_sparse[:, ordinary]).sum()
                )
                total += int(ordinary.sum()) * len(second)
    rows = [
        row("plain loops / ours, time", slow / statistics.median(seconds), BAR),
        row("mask entries that are the same", same / total, 0.995),
    ]
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
