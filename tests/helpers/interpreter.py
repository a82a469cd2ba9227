"""How tests of Triton kernels run: on a GPU, or in a process of their own through Triton's interpreter on the CPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

here = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or the interpreter: see the file's last test",
)
instead_of_a_gpu = pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="Triton is not installed, or the tests above ran",
)


def run_interpreted(file: str) -> None:
    """Run a test file again with its kernels interpreted; it must pass, and not be empty."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", file], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
