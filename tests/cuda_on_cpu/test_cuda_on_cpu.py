"""The CUDA side without a GPU: host code and kernels built for the CPU (tests/cuda_on_cpu) against stock torch.

Three ways in: the operators' own test files, rerun with the CUDA side in the CPU's place; direct calls here for what
those do not reach (float16, schedules of the threads, conversions); and the driver program under the sanitizers.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from cuda_on_cpu import build
from cuda_on_cpu.stand_in import NEEDS_COMPILER, extended, rerun

pytestmark = NEEDS_COMPILER

# The suites of the operators, rerun in float32. What is left out: layers of other nets, which take fibers minutes.
SUITES = ["operators/test_conv_relu_max_pool2d.py", "operators/test_linear.py", "operators/test_odd_cases.py"]
GRADCHECK = ["autograd/test_gradcheck.py"]
LEFT_OUT = "layers_of_real_nets or long_sums or many or (non_finite and (bfloat16 or float64))"


@pytest.mark.parametrize(
    ("algorithm", "suites"),
    [("direct", SUITES), extended("direct", GRADCHECK), extended("vendor", SUITES + GRADCHECK)],
    ids=["direct", "gradcheck", "vendor"],
)
def test_the_operators_own_tests(control, algorithm, suites):
    rerun(suites, f"not ({LEFT_OUT})", LENET_EXT_ALGORITHM=algorithm)


@pytest.mark.extended
def test_the_training_steps_own_tests(control):
    rerun(["network/test_training_step.py"], "of_the_loop or options_of_their_own or take_turns or beside_stock")


@pytest.mark.extended
def test_the_operators_schemas(control):
    """What an operator returns shares no memory with its arguments, and none of its results with another."""
    rerun(["operators/test_opcheck.py"], "test_backward or test_with_activations")


@pytest.mark.extended
def test_driver_under_the_sanitizers():
    """Every kernel against plain loops, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not build.has_sanitizers():
        pytest.skip("the compiler has no AddressSanitizer or UndefinedBehaviorSanitizer")
    done = subprocess.run([build.driver(), "1"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert done.stdout.rstrip().endswith(", 0 failed")


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("early_return", "thread 0 waits at the block barrier .*, but thread 3 has returned"),
        ("divergent_barrier", "thread 0 waits at the block barrier .*, but thread 32 waits at the block barrier"),
        ("partial_shuffle", "thread 0 waits at the warp barrier .*, but thread 16 has returned"),
        ("overrun", "outside of the block's shared memory"),
        ("too_much_shared", "invalid argument"),
        ("no_threads", "limits"),
        ("odd_cluster", "the cluster .*, or does not divide the grid"),
        (
            "early_block",
            "thread 0 of block 0 waits at the cluster barrier .*, but thread 0 of block 1 has returned",
        ),
    ],
)
def test_the_stand_in_finds_mistakes(kernel, says):
    done = subprocess.run([build.broken(), kernel], capture_output=True, text=True, check=True)

    assert re.match(f"{kernel}: .*{says}", done.stdout), done.stdout


def test_the_stand_in_shows_races_and_unwritten_memory():
    def rows(kernel):
        done = subprocess.run([build.broken(), kernel], capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()]

    expected = [f"{95 - i}" for i in range(64)]
    assert rows("correct") == [expected] * 3
    assert all("nan" in row for row in rows("missing_barrier"))
    assert len({*map(tuple, rows("missing_barrier"))}) == 3
    assert rows("unwritten") == [["nan"] * 64] * 3
    assert rows("cluster") == [["2"] * 64] * 3
    assert len({*map(tuple, rows("missing_cluster_barrier"))}) > 1
    assert rows("copies") == [["1"] * 64] * 3
    assert rows("unfinished_copies") == [["1", "nan"] * 32] * 2 + [["1"] * 64]
    forward, reverse, shuffled = rows("hasty_copies")
    assert forward == reverse == ["2"] * 64
    assert {*shuffled} == {"1", "2"}
