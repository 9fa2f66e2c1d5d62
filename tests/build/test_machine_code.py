"""What nvcc makes of the kernels for sm_90, against the committed table of benchmarks/gpu/machine_code.py."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu import kernel_times, machine_code  # noqa: E402

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'
ptxas info    : Function properties for _Z6kernelv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes smem, 8 bytes cmem[2]
ptxas info    : Compile time = 1.000 ms
"""
# A loop of 22 instructions in one of 25, and what encodes each instruction.
SASS = "\n".join(
    [
        "\t\tFunction : _Z6kernelv",
        '\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"',
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */",
        "                                                              /* 0x000e220000000800 */",
        "        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;    /* 0x00000a00ff017b82 */",
        *(f"        /*{16 * (i + 2):04x}*/    HMMA.16816.F32.BF16 R4, R8, R12, R4 ;    /* 0x0 */" for i in range(18)),
        "        /*0140*/                   LDS.64 R8, [R3] ;          /* 0x00000a00ff017b82 */",
        "        /*0150*/                   FMNMX.NAN R4, R4, R5, !PT ;  /* 0x00000a00ff017b82 */",
        "        /*0160*/              @!P0 IADD3 R3, R3, 0x10, RZ ;   /* 0x00000a00ff017b82 */",
        "        /*0170*/              @!P0 BRA 0x20 ;                 /* 0xfffffffc00d48947 */",
        "        /*0180*/               @P1 BRA 0x10 ;                 /* 0xfffffffc00d48947 */",
        "        /*0190*/                   EXIT ;                     /* 0x000000000000794d */",
        "        /*01a0*/                   BRA 0x1a0;                 /* 0xfffffffc00fc7947 */",
        "        /*01b0*/                   NOP;                       /* 0x0000000000007918 */",
    ]
)


def test_what_the_tools_say_is_read():
    assert dict(machine_code.read_resources(PTXAS)) == {
        "_Z6kernelv": {"registers": 40, "stack": 8, "spills": 16, "shared": 16}
    }
    ((name, program),) = machine_code.read_programs(SASS)
    assert name == "_Z6kernelv"
    assert len(program) == 28
    (loop,) = machine_code.inner_loops(program)
    assert machine_code.count(loop) == {
        "all": 22,
        "tensor": 18,
        "compare and select": 1,
        "shared": 1,
        "integer": 1,
        "control": 1,
    }


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void lenet_ext::cuda::(anonymous namespace)::kernel<4>(lenet_ext::cuda::LenetStep)", "kernel<4>"),
        ("lenet_ext::cuda::(anonymous namespace)::kernel(lenet_ext::cuda::A, float (*)(int))", "kernel"),
        (
            "void lenet_ext::cuda::(anonymous namespace)::kernel<lx::bf16, (lenet_ext::cuda::ThreadTile)2>(int)",
            "kernel<bf16, (ThreadTile)2>",
        ),
    ],
)
def test_names(demangled, name):
    assert machine_code.read_name(demangled) == name


def test_the_table_is_compared_within_its_tolerance():
    kernel = {"registers": 40, "stack": 0, "spills": 0, "shared": 0, "instructions": 200, "loops": [{"all": 100}]}
    table = {"kernels": {"kernel": kernel}}
    assert machine_code.differences(table, table) == []
    for change, said in [
        ({"instructions": 209, "loops": [{"all": 95}]}, []),
        ({"instructions": 211}, ["kernel: 200 instructions, now 211"]),
        ({"loops": [{"all": 94}]}, ["kernel: 100 instructions in loop 1, now 94"]),
        ({"loops": []}, ["kernel: 1 inner loops, now 0"]),
        ({"registers": 41}, ["kernel: registers 40, now 41"]),
        ({"spills": 4}, ["kernel: spills 4 bytes"]),
    ]:
        changed = copy.deepcopy(table)
        changed["kernels"]["kernel"].update(change)
        assert machine_code.differences(table, changed) == said
    assert machine_code.differences(table, {"kernels": {}}) == ["kernel: is gone"]
    assert machine_code.differences({"kernels": {}}, table) == ["kernel: is not in the table"]


@pytest.mark.extended
def test_the_kernels_are_those_of_the_table():
    """Where the difference is meant, `python benchmarks/gpu/machine_code.py --update` writes the table again."""
    tools = machine_code.find_tools()
    if isinstance(tools, str):
        pytest.skip(tools)
    if not machine_code.TABLE.is_file():
        pytest.skip("a source distribution comes without the table")
    table = json.loads(machine_code.TABLE.read_text())
    if tools.version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {tools.version}")
    found = machine_code.differences(table, machine_code.measure(tools))
    assert not found, "\n".join(found)


def test_every_kernel_has_a_predicted_time():
    """Where the kernels or what is said of them has changed, `python benchmarks/gpu/kernel_times.py --update`."""
    if not machine_code.TABLE.is_file():
        pytest.skip("a source distribution comes without the table")
    table = json.loads(machine_code.TABLE.read_text())
    assert [name for name in table["kernels"] if kernel_times.work_of(name) is None] == []
    assert kernel_times.TABLE.read_text() == kernel_times.render(table)


def test_what_limits_a_kernel():
    kernel = {"instructions": 300, "loops": [{"all": 100, "tensor": 31}, {"all": 20}]}

    def predicted(**work):
        found = kernel_times.predict(kernel, kernel_times.Work("", 132 * 1700, before_us=1.0, waiting=2.0, **work))
        return found.limit, pytest.approx(found.us)

    # 2,000 instructions are 500 clocks; 620 products are 1,000.
    assert predicted(trips=(10, 50)) == ("instructions", 1 + 2 * 500)
    assert predicted(trips=(20,)) == ("products", 1 + 2 * 1000)
    assert predicted(trips=(20,), shared=1500) == ("shared memory", 1 + 2 * 1500)
    assert predicted(trips=(0, 0), passes=100) == ("instructions", 1 + 2 * 100 * kernel_times.OUTSIDE * 180 / 4)
    assert predicted(bytes=kernel_times.BYTES_A_US / 1320) == ("global memory", 1 + 170)
    assert predicted(us=7.0, said="measured") == ("measured", 7.0)
