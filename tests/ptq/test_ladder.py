import math
from types import SimpleNamespace

import pytest
import torch
from test_loop import windows

from bellbit.core.grid import first_codes
from bellbit.core.hessian import accumulate, inverse_factor, new_hessian
from bellbit.errors import BellbitError
from bellbit.packed.linear import packed_linears
from bellbit.packed.planes import Sign128, Symmetric
from bellbit.packed.tensor import mean_over_weights
from bellbit.ptq import budget, effort, entering, ladder, resume
from bellbit.ptq import distill as distillation
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.collect import FEWEST_TOKENS
from bellbit.ptq.distill import Front, check_head, divergence, teacher_states
from bellbit.ptq.families import fold_along_chain, linear_names, shared_by_heads
from bellbit.ptq.fit import Plan, Rates, clip, fit, parameter_groups, squared_cosine
from bellbit.ptq.ladder import climb
from bellbit.ptq.latent import LatentLinear
from bellbit.ptq.methods import RUNGS, Settings, bits_of_levels, group_of
from bellbit.ptq.reconstruct import FIRST_TOKEN, robust_error
from bellbit.ptq.resume import Saved, fingerprint
from bellbit.ptq.stream import BlockStream
from conftest import CONFIGS, Cut, cut_after, family_named, random_model

BRIEF = effort.Effort(blocks=2, tail=2, distilled=2)


def climbed(name="llama", tokens=None, seed=0, saved=None, progress=lambda *_: None, **options):
    model = random_model(CONFIGS[name]())
    settings = Settings("bellbit", **{"effort": "fast"} | options).resolved(family_named(name))
    tokens = windows(8, 32) if tokens is None else tokens
    run = climb(Blocks(model, family_named(name)), settings, tokens, "cpu", seed, progress, saved or Saved())
    return model, run


@pytest.fixture
def briefly(monkeypatch):
    """`best` with two epochs of each kind."""
    monkeypatch.setitem(effort.EFFORTS, "best", BRIEF)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_factors_move_along_chains_without_a_change(name):
    model = random_model(CONFIGS[name]()).double()
    family = family_named(name)
    tokens = windows(2, 40)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(tokens).logits
        for block in model.get_submodule(family.blocks):
            for chain in family.chains_of(block):
                rows = block.get_submodule(chain[0]).weight.shape[0]
                fold_along_chain(block, chain, torch.rand(rows, generator=generator).double() + 0.5, 32)
        after = model(tokens).logits
    tolerance = 1e-5 if "gemma" in name else 1e-9  # its norms are in float32 always
    assert (after - before).abs().max() < tolerance * before.abs().max()


def test_values_are_repeated_for_the_heads_that_read_them():
    assert shared_by_heads(torch.arange(4), 8, head_dim=2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_column_scales_and_their_hessians_leave_the_output_error_as_it_is(name):
    """Folding changes W to W·D and H to D⁻¹·H·D⁻¹, so W·H·Wᵀ stays, unless rows of W were scaled too."""
    model = random_model(CONFIGS[name]())
    family = family_named(name)
    block = model.get_submodule(family.blocks)[0]
    scaled_rows = {source for source, _ in family.chains_of(block)}
    generator = torch.Generator().manual_seed(0)
    hessians, before = {}, {}
    for group in family.groups_of(block):
        x = torch.randn(300, block.get_submodule(group.linears[0]).weight.shape[1], generator=generator)
        hessians[group] = x.t() @ x
        for linear in group.linears:
            weight = block.get_submodule(linear).weight.detach()
            before[linear] = ((weight @ hessians[group]) * weight).sum()
    entering.fold_columns(block, family, hessians, "mean", 32)
    for group in family.groups_of(block):
        for linear in set(group.linears) - scaled_rows:
            weight = block.get_submodule(linear).weight.detach()
            torch.testing.assert_close(((weight @ hessians[group]) * weight).sum(), before[linear], rtol=1e-3, atol=0)


def test_a_weight_of_minus_zero_has_one_sign_in_training_and_packed():
    weight = torch.full((1, 16), -0.0)
    layer = LatentLinear.starting(weight, torch.full((1, 16), 0.5), torch.ones(1, 1), 1, 1.125, None)
    assert torch.equal(layer.weight(), layer.packed().dequantize())


def test_a_latent_linear_starts_with_the_codes_it_is_given_and_packs_them():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 1100, generator=generator)
    groups = []
    for width, bpw, layout in ((1, 1.125, Sign128), (1, 1.2, Symmetric), (3, 3.1, Symmetric)):
        group = group_of(width, bpw)
        levels = torch.randint(0, 2**width, (6, 1100), generator=generator) - (2**width - 1) / 2
        scales = 0.8 * torch.rand(6, -(-1100 // group), generator=generator) + 0.5  # 1.38 octaves: half a step is .19 %
        layer = LatentLinear.starting(weight, levels, scales, width, bpw, None)
        expected = levels * scales.repeat_interleave(group, dim=1)[:, :1100]
        torch.testing.assert_close(layer.weight(), expected)
        packed = layer.packed()
        assert isinstance(packed, layout)
        torch.testing.assert_close(packed.dequantize(), expected, rtol={Sign128: 1e-3, Symmetric: 2e-3}[layout], atol=0)
        x = torch.randn(3, 1100, generator=generator)
        torch.testing.assert_close(layer(x), x @ expected.t(), rtol=1e-4, atol=1e-4)
        groups.append(group)
    assert groups == [128, 1024, 128]


def test_the_robust_error_counts_large_tokens_as_small_ones_and_the_first_more():
    target = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    output = target + torch.tensor([[0.0, 2.0], [100.0, 0.0]])
    mean = (4 / 25 + 1 / 25) / 2
    assert float(robust_error(output, target)) == pytest.approx((1 - FIRST_TOKEN) * mean + FIRST_TOKEN * 4 / 25)


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_divergence_and_its_gradient_are_those_of_the_composed_formula(tokens, cap):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, tokens, 16, generator=generator)
    head = torch.randn(40, 16, generator=generator)
    student.requires_grad_(True)
    logits = (x @ head.t() for x in (teacher, student))
    p, q = (torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), dim=-1) for z in logits)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / tokens
    (wanted,) = torch.autograd.grad(expected, student)
    found = divergence(student, teacher, head, cap)
    (gradient,) = torch.autograd.grad(2 * found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, 2 * wanted)
    with torch.no_grad():
        assert torch.equal(divergence(student.detach(), teacher, head, cap), found)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("count", [1, 2])
def test_what_the_first_blocks_give_stands_for_them(name, count):
    model, tokens = random_model(CONFIGS[name]()), windows(2, 40)
    every = list(model.get_submodule(family_named(name).blocks).children())
    stream = BlockStream(model, every, tokens, "cpu", 1)
    for block in every[:count]:
        stream.run(block, stream.inputs, lambda _: None)
    front = Front(every[:count], stream.inputs, stream.in_tuple)
    expected = teacher_states(model, tokens, False)
    for parameter in every[0].parameters():
        parameter.data.fill_(torch.nan)
    torch.testing.assert_close(teacher_states(model, tokens, False, front=front), expected)


@pytest.mark.parametrize("tail", [1, 4])
def test_the_tail_is_trained_and_what_comes_before_it_stays(monkeypatch, tail):
    monkeypatch.setattr(ladder, "TAIL", tail)
    monkeypatch.setitem(effort.EFFORTS, "best", effort.Effort(blocks=1, tail=4, distilled=0))
    before, _ = climbed(tokens=windows(24, 64), rungs=RUNGS[1:4], effort="best")
    after, _ = climbed(tokens=windows(24, 64), rungs=RUNGS[1:5], effort="best")
    changed = {name: not torch.equal(t, after.state_dict()[name]) for name, t in before.state_dict().items()}
    blocks = family_named("llama").blocks
    assert any(change for name, change in changed.items() if f"{blocks}.0." in name) == (tail == 4)
    assert all(change for name, change in changed.items() if f"{blocks}.1." in name and "signs" in name)
    assert changed["model.norm.weight"]
    assert not changed["model.embed_tokens.weight"]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_linear_is_one_bit(name):
    model, run = climbed(name, rungs=RUNGS[1:])
    layers = packed_linears(model)
    assert set(layers) == set(linear_names(random_model(CONFIGS[name]()), family_named(name))) == set(run.errors)
    assert {type(layer.packed) for layer in layers.values()} == {Sign128}
    assert run.fallbacks == []
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


def test_every_rung_comes_nearer_to_the_float_model(monkeypatch):
    monkeypatch.setitem(effort.EFFORTS, "best", effort.Effort(blocks=4, tail=4, distilled=4))
    tokens = windows(24, 64)
    with torch.no_grad():
        expected = random_model(CONFIGS["llama"]())(tokens).logits.log_softmax(-1)
    found = []
    for rungs in (RUNGS[1:2], RUNGS[1:3], RUNGS[1:4], RUNGS[1:5], RUNGS[1:]):  # budget alone: plain signs
        model, _ = climbed(tokens=tokens, rungs=rungs, effort="best")
        with torch.no_grad():
            logits = model(tokens).logits.log_softmax(-1)
        found.append(
            float(torch.nn.functional.kl_div(logits, expected, log_target=True, reduction="sum")) / tokens.numel()
        )
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("length", "count", "piece"), [(512, 1, 512), (1024, 2, 512), (700, 2, 350), (1025, 3, 341), (32, 1, 32)]
)
def test_windows_are_cut_into_few_pieces(length, count, piece):
    tokens = torch.arange(2 * length).view(2, length)
    found = ladder._in_pieces(tokens, 512)
    assert found.shape == (2 * count, piece) and piece <= 512
    assert torch.equal(found[count - 1 :: count], tokens[:, (count - 1) * piece : count * piece])


@pytest.fixture(scope="module")
def whole():
    """A run that is not cut off, `briefly`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(effort.EFFORTS, "best", BRIEF)
        return climbed(effort="best")[0]


def test_the_same_seed_gives_the_same_bytes(briefly, whole):
    tensors = []
    for model in (whole, climbed(effort="best")[0]):
        tensors.append([t for layer in packed_linears(model).values() for t in layer.packed.tensors.values()])
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def gone_on(folder, stop, **options):
    """A run that is cut off when `stop` of it is done, and goes on: model, run, and what the rest reported."""
    with pytest.raises(Cut):
        climbed(saved=Saved(folder), progress=cut_after(stop), **options)
    told = []
    saved = Saved(folder, resume=True)
    return *climbed(saved=saved, progress=lambda *done: told.append(done), **options), told


def assert_same_bytes(whole, found):
    for name, layer in packed_linears(whole).items():
        other = packed_linears(found)[name]
        assert all(torch.equal(a, other.packed.tensors[key]) for key, a in layer.packed.tensors.items())
    for (_, a), (_, b) in zip(whole.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop", [0.2, 0.55, 0.59, 0.63, 0.8, 0.99])
def test_a_run_cut_off_anywhere_goes_on_to_the_same_bytes(tmp_path, briefly, whole, stop):
    found, run, told = gone_on(tmp_path / "partial", stop, effort="best")
    assert len(run.errors) == 14
    assert stop < 0.57 or not any("reconstruction" in text for _, text in told), "blocks are not trained again"
    if stop == 0.63:  # in the second epoch of the tail, which is two from .57 to .65
        assert min(share for share, text in told if text.startswith("last")) > 0.61, "the first is not done again"
    assert_same_bytes(whole, found)


def test_a_run_with_a_budget_and_column_scales_goes_on_to_the_same_bytes(tmp_path):
    options = {"bpw": 2.4, "columns": "rank1"}
    whole, _ = climbed(**options)
    for stop in (0.5, 0.92):  # in the second block, in the tail
        assert_same_bytes(whole, gone_on(tmp_path / str(stop), stop, **options)[0])


def test_a_run_is_resumed_only_by_its_like(tmp_path):
    Saved(tmp_path / "x", {"seed": 1, "model": "a"}, resume=False, overwrite=False).keep(
        "one", {"t": torch.ones(2)}, n=3
    )
    with pytest.raises(
        BellbitError, match=r"holds an unfinished run: --resume goes on with it, --overwrite starts again"
    ):
        Saved(tmp_path / "x", {"seed": 1, "model": "a"}, resume=False, overwrite=False)
    with pytest.raises(BellbitError, match=r"--resume: seed was 1 in .* and is 2 now"):
        Saved(tmp_path / "x", {"seed": 2, "model": "a"}, resume=True, overwrite=False)
    again = Saved(tmp_path / "x", {"seed": 1, "model": "a"}, resume=True, overwrite=False)
    assert again.seconds == pytest.approx(0, abs=1)
    tensors, notes = again.load("one")
    assert (tensors["t"].tolist(), notes) == ([1, 1], {"n": 3})
    assert again.load("two") is None
    assert Saved(tmp_path / "x", {"seed": 2}, resume=False, overwrite=True).load("one") is None
    again.remove()
    assert not (tmp_path / "x").exists()


def test_fingerprints_tell_models_apart():
    model = random_model(CONFIGS["llama"]())
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("name", "rungs"),
    [
        *((name, ("blocks",)) for name in sorted(CONFIGS)),
        *((name, ("codes",)) for name in ("falcon", "gemma2", "llama", "mixtral", "opt")),
    ],
)
def test_the_loss_of_rounding_is_that_of_the_whole_model(name, rungs):
    model, family, tokens = random_model(CONFIGS[name]()), family_named(name), windows(3, 64)
    settings = Settings("bellbit", rungs=rungs).resolved(family)
    losses = budget.rounding_losses(Blocks(model, family), settings, tokens, 2, False, lambda _: None)
    names = linear_names(model, family)
    assert list(losses) == names
    with torch.no_grad():
        expected = model(tokens[:1]).logits.log_softmax(-1)
        for linear in (names[0], names[-1]):
            factor = factor_of(model, linear, tokens[1:]) if rungs == ("codes",) else None
            weight = model.get_submodule(linear).weight
            kept = weight.clone()
            levels, scales = first_codes(kept, factor, 2)
            weight.copy_(levels * scales.repeat_interleave(128, dim=1)[:, : weight.shape[1]])
            hook = model.get_submodule(linear).register_forward_hook(with_first_token_through(kept, tokens.shape[1]))
            found = model(tokens[:1]).logits.log_softmax(-1)
            hook.remove()
            weight.copy_(kept)
            loss = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum") / tokens.shape[1]
            assert losses[linear] == pytest.approx(float(loss), rel=1e-3)


def with_first_token_through(weight, length):
    """A hook; where an expert gets some of the tokens they have no places, and it does nothing."""

    def hook(layer, given, output):
        if output.shape[-2] == length:
            output[..., :1, :] = torch.nn.functional.linear(given[0][..., :1, :], weight, layer.bias)

    return hook


def test_tokens_that_attention_rests_on_are_the_first_and_those_of_enormous_norm():
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    states[7] *= 10
    assert budget._resting_places(states).nonzero().flatten().tolist() == [0, 7]


def factor_of(model, linear, tokens):
    """Of the inverse Hessian of a linear's inputs in the float model; None with too few, as an expert may have."""
    inputs = []
    hook = model.get_submodule(linear).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].flatten(0, -2))
    )
    for window in tokens:
        model(window[None])
    hook.remove()
    if sum(map(len, inputs)) < FEWEST_TOKENS:
        return None
    hessian = new_hessian(inputs[0].shape[-1])
    for x in inputs:
        accumulate(hessian, x, len(tokens))
    return inverse_factor(hessian)


def test_the_budget_goes_to_what_gains_most_and_is_kept():
    shapes = {"a": (100, 128), "b": (100, 128), "c": (50, 128), "d": (100, 64)}
    losses = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.1}
    # of 38 400 weights; scales take 8/128 of a bit, for d 8/64: 35 408 bits are left when all have one. Most is gained
    # per bit by c (7.6e-5), b (5.7e-5), the third bit of c (2.5e-5), then a and the third of b (1.9e-5), which do not
    # fit any more, the fourth of c (8.1e-6), d (3.8e-6)
    assert budget.allocate(shapes, losses, bpw=2.0) == {"a": 1, "b": 2, "c": 4, "d": 1}
    for limit in (1.125, 1.3, 2.075, 3.0, 4.2):
        widths = budget.allocate(shapes, losses, bpw=limit)
        free = limit * 38_400 - sum(
            math.prod(shape) * bits_of_levels(shape, widths[name], limit) for name, shape in shapes.items()
        )
        assert free >= 0 or limit == 1.125  # d alone takes 1.25 there
        assert all(math.prod(shape) > free or widths[name] == 4 for name, shape in shapes.items())


@pytest.mark.parametrize("bpw", [1.3, 2.4])
def test_stored_bits_are_within_the_budget(bpw):
    model, _ = climbed(bpw=bpw)
    packed = [layer.packed for layer in packed_linears(model).values()]
    stored = mean_over_weights(packed, lambda weight: weight.bits_per_weight)
    assert bpw - 0.15 < stored <= bpw
    assert len({weight.nominal_bits for weight in packed}) > 1


def test_with_little_effort_distillation_must_be_named():
    assert Settings("bellbit").rungs == Settings("bellbit", effort="best").rungs == RUNGS
    assert effort.efforts(Settings("bellbit")).distilled == 1
    fast = Settings("bellbit", effort="fast")
    assert fast.rungs == RUNGS[:-1]
    assert effort.efforts(fast).distilled == 0
    assert effort.efforts(Settings("bellbit", effort="fast", rungs=("codes", "distill"))).distilled == 1


def test_without_the_rung_of_the_budget_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(budget, "rounding_losses", None)
    model, _ = climbed(bpw=2.25, rungs=("codes",))
    assert min(layer.packed.nominal_bits for layer in packed_linears(model).values()) == 2


def test_a_hessian_beyond_repair_falls_back_and_is_told(monkeypatch):
    monkeypatch.setattr(entering, "inverse_factor", lambda h: inverse_factor(-h))
    _, run = climbed(rungs=("codes",))
    assert len(run.fallbacks) == 14


def test_a_head_that_is_more_than_a_product_is_noticed():
    model = random_model(CONFIGS["llama"]())
    check_head(model, windows(1, 40))
    model.lm_head.bias = torch.nn.Parameter(torch.ones(len(model.lm_head.weight)))
    with pytest.raises(BellbitError, match="--rungs text,codes,blocks"):
        check_head(model, windows(1, 40))


def test_an_error_that_is_no_number_ends_training():
    plan = Plan(windows=3, held_back=1, epochs=1, rates=Rates(0.1, 0.1, 0.1), seed=0)
    with pytest.raises(BellbitError, match="the error on the text held back is nan before anything is trained"):
        fit(torch.nn.RMSNorm(4), lambda index, epoch: torch.tensor(math.nan), plan, lambda *_: None)


def test_the_best_epoch_stays_and_what_is_held_back_trains_nothing():
    norm, plan = torch.nn.RMSNorm(4), Plan(windows=6, held_back=2, epochs=3, rates=Rates(0, 0, 0.1), seed=0)
    held, trained = iter([5.0, 5.0, 3.0, 3.0, 1.0, 2.0, 9.0, 9.0]), []
    seen = {}

    def error(index, epoch):
        assert torch.is_grad_enabled() == (epoch is not None)
        if epoch is not None:
            trained.append(index)
            return norm.weight.sum()
        assert index >= plan.trained
        value = next(held)
        seen[value] = norm.weight.detach().clone()
        return torch.tensor(value)

    assert fit(norm, error, plan, lambda *_: None) == [5, 3, 1.5, 9]
    assert [sorted(trained[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert torch.equal(norm.weight, seen[1.0]) and not torch.equal(norm.weight, seen[9.0])
    assert norm.weight.grad is None


def test_every_token_is_learned_from_in_turn(monkeypatch):
    norm, seen = torch.nn.RMSNorm(1), []
    tokens = torch.arange(1.0, 6.0)[:, None]  # as hidden states, after the norm all alike

    def error(student, teacher, *_):
        assert len(student) == len(teacher)
        seen.append(teacher.flatten().tolist())
        return student.sum()

    monkeypatch.setattr(distillation, "last_states", lambda *_: norm(tokens))
    monkeypatch.setattr(distillation, "divergence", error)
    model = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(1, 1), config=None)
    plan = Plan(windows=2, held_back=1, epochs=2, rates=Rates(0, 0, 0.1), seed=0)
    distillation.distill(model, norm, torch.zeros(2, 5), tokens.expand(2, 5, 1), plan, False, lambda *_: None)
    assert seen == [[1, 2, 3, 4, 5], [1, 3, 5], [1, 2, 3, 4, 5], [2, 4], [1, 2, 3, 4, 5]]


def test_the_rate_rises_and_falls_to_nothing():
    shares = [squared_cosine(step, 100) for step in range(101)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5] == 1 and shares[5:] == sorted(shares[5:], reverse=True)
    assert squared_cosine(52, 99) == pytest.approx(0.25)  # half-way from step 5 to 99
    assert shares[100] == pytest.approx(0)


def test_only_long_gradients_are_shortened():
    short, long = [torch.tensor([0.3]), torch.tensor([0.4])], [torch.tensor([3.0]), torch.tensor([4.0])]
    for gradients in (short, long):
        clip(gradients)
    assert [float(g) for g in short] == pytest.approx([0.3, 0.4])
    assert [float(g) for g in long] == pytest.approx([0.6, 0.8])


def test_rates_are_those_of_what_most_weights_are():
    assert effort.pace(1.14) is effort.SIGN_PACE and effort.pace(1.59) is effort.SIGN_PACE
    assert effort.pace(1.6) is effort.FINER_PACE and effort.pace(2.4) is effort.FINER_PACE


def test_norms_are_trained_by_the_size_of_what_they_multiply_by():
    norm = torch.nn.LayerNorm(4)
    torch.nn.init.constant_(norm.weight, 0.5)
    for offset, size in ((0.0, 0.5), (1.0, 1.5)):
        groups = parameter_groups(norm, Rates(0.0, 0.0, 0.1), offset)
        assert [group["lr"] for group in groups] == pytest.approx([0.1 * size] * 2)  # the bias of zeros, too


def test_the_time_of_earlier_runs_is_counted(tmp_path, monkeypatch):
    clock = iter([100.0, 110.0, 130.0, 500.0, 507.0, 0.0, 60.0])
    monkeypatch.setattr(resume, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    Saved(tmp_path / "x", {}, resume=False, overwrite=False).keep("one", {})
    second = Saved(tmp_path / "x", {}, resume=True, overwrite=False)
    assert second.seconds == 30
    second.keep("two", {})
    assert Saved(tmp_path / "x", {}, resume=True, overwrite=False).seconds == 37
    Saved(tmp_path / "y", {}, started=50.0)
    assert (tmp_path / "y" / "seconds").read_text() == "10.0\n", "what was before it was opened, too"
