"""The kernels as nvcc sees them: no warning for any default architecture, no spill in those that must be fast."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_toolkit import DEFAULT_ARCHITECTURES, find_cuda_toolkit  # noqa: E402

# Kernels that were written to live in registers, and how many a thread may use: 128 leave room for two blocks of 256
# threads on a multiprocessor. float64 is left out; nobody runs LeNet in it for speed.
HOT = {
    "lenet_forward_kernel": 128,
    "lenet_forward_cluster_kernel": 128,
    "lenet_backward_data_kernel": 128,
    "lenet_backward_weight_kernel": 128,
    "lenet_step_data_kernel": 255,  # one block of 256 threads a multiprocessor; one of 512 has at most 128 anyway
    "lenet_step_update_kernel": 128,
    "lenet_tensor_core_kernel": 128,
    "lenet_tensor_core_conv1_kernel": 128,
    "lenet_tensor_core_conv2_kernel": 128,
    "lenet_tensor_core_backward_kernel": 255,  # of 128 threads
    "lenet_tensor_core_conv1_gradients_kernel": 255,  # likewise
    "lenet_tensor_core_conv2_gradients_kernel": 255,
    "lenet_convolution_sums_kernel": 128,
    "lenet_lean_convolutions_kernel": 128,
    "lenet_lean_linears_kernel": 128,
    "lenet_tf32_linears_kernel": 255,  # one block of 256 threads a multiprocessor
    "lenet_linear_grad_inputs_kernel": 255,  # the same
    "lenet_linear_grad_weights_kernel": 128,
    "lenet_linear_sums_kernel": 128,
    "lenet_conv_forward_kernel": 128,
    "lenet_grad_input_kernel": 128,
    "lenet_conv1_grad_weight_kernel": 128,
    "lenet_conv2_grad_weight_kernel": 128,
    "small_matrix_product_kernel": 128,
}


@pytest.fixture(scope="module")
def nvcc() -> str:
    toolkit = find_cuda_toolkit()
    if isinstance(toolkit, str):
        pytest.skip(toolkit)
    return toolkit.nvcc


@pytest.fixture(scope="module")
def ptxas(nvcc, cubin_of) -> list[tuple[str, str]]:
    """(architecture, what ptxas says) for every file and every default architecture that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    numbers = [a.removesuffix("+PTX").replace(".", "") for a in DEFAULT_ARCHITECTURES]
    architectures = [f"sm_{number}" for number in numbers if f"compute_{number}\n" in known]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(nvcc, source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [(job[2], said) for job, (_, said) in zip(jobs, pool.map(lambda job: cubin_of(*job), jobs), strict=True)]


@pytest.mark.extended
def test_hot_kernels_live_in_registers(ptxas):
    seen = set()
    for architecture, text in ptxas:
        for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", text, re.DOTALL):
            kernel = next((kernel for kernel in HOT if kernel in name), None)
            # In a mangled name a template argument d is float64: ...kernelId...
            if kernel is None or f"{kernel}Id" in name:
                continue
            seen.add((kernel, architecture))
            stack, stores, loads = map(
                int, re.search(r"(\d+) bytes stack frame, (\d+) .* (\d+) bytes spill", report).groups()
            )
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            assert (stack, stores, loads) == (0, 0, 0), f"{name} for {architecture}: {report}"
            # Images of three channels take the shared memory of a whole multiprocessor, and so may its registers.
            most = 255 if "LeNetLayerILi3E" in name else HOT[kernel]
            assert registers <= most, f"{name} for {architecture}: {registers} registers"
    assert {kernel for kernel, _ in seen} == set(HOT), "a kernel of the list is no longer there"


@pytest.mark.extended
def test_the_driver_is_compiled_without_a_warning(nvcc, tmp_path):
    """As `make gpu-check` does. Elsewhere it is compiled by a C++ compiler alone, as C++20."""
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-arch=sm_90", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"]
    driver = ROOT / "tests" / "cuda_on_cpu" / "driver.cu"
    done = subprocess.run(
        [*command, "-c", str(driver), "-o", str(tmp_path / "driver.o")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
