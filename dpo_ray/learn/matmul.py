"""The fast path of float32 matrix products on CPUs, taken only where a probe shows that it is still float32."""

import torch

MAX_FAST_PATH_ERROR = 1e-5


def float32_matmul_fast_path() -> bool:
    """Let this process use oneDNN for float32 matrix products where a probe shows that it loses no precision.

    On AVX-512 that is about twice as fast and still float32. On CPUs with AMX the same setting rounds to bfloat16, on
    GPUs to TF32 or less: there it is left alone. Returns whether it was switched on, for the whole process.
    """
    if torch.cuda.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right.T).double() - exact).norm() / exact.norm()
    if error < MAX_FAST_PATH_ERROR:
        return True
    torch.set_float32_matmul_precision(before)
    return False
