import pytest
import torch

from dpo_ray.learn import matmul


@pytest.mark.parametrize("max_error", [1e-5, 0.0])
def test_float32_matmul_fast_path_is_taken_only_if_the_probe_is_exact(monkeypatch, max_error):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(matmul, "MAX_FAST_PATH_ERROR", max_error)
    try:
        taken = matmul.float32_matmul_fast_path()
        assert torch.get_float32_matmul_precision() == ("medium" if taken else before)
        assert not (taken and max_error == 0.0)
    finally:
        torch.set_float32_matmul_precision(before)
