import pytest
import torch

from bellbit import loading


@pytest.mark.parametrize(
    ("amx", "avx512", "maker", "pays"),
    [
        (False, False, "AuthenticAMD", False),
        (False, True, "AuthenticAMD", True),
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),  # a virtual machine that hides AMX
    ],
)
def test_bfloat16_pays_where_the_cpu_has_fast_products_of_it(monkeypatch, tmp_path, amx, avx512, maker, pays):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(loading, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert loading.bf16_pays("cpu") == pays
    monkeypatch.setattr(loading, "CPU_INFO", tmp_path / "no such file")  # as on systems that are not Linux
    monkeypatch.setattr(loading.platform, "processor", lambda: f"Intel64 Family 6, {maker}")
    assert loading.bf16_pays("cpu") == pays
