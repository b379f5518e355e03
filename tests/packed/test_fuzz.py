"""The loader over mutated checkpoints; `scripts/check-kernels.sh fuzz` does 10 000 with sanitizers."""

from fuzz_loader import run


def test_mutated_checkpoints_are_refused_or_run(tmp_path):
    refused, ran = run(250, 1, tmp_path)
    assert refused > 50 and ran > 20  # the mutations reach both the checks and the kernels
