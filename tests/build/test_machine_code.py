"""What nvcc makes of the kernels for sm_90, against the committed table of benchmarks/gpu/machine_code.py."""

from __future__ import annotations

import copy
import importlib
import json
import os
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


def test_everything_in_the_table_is_compared():
    loop = {"all": 100, "fma": 60, "integer": 40}
    kernel = {"registers": 40, "stack": 0, "spills": 0, "shared": 0, "instructions": 200, "loops": [loop]}
    table = {"kernels": {"kernel": kernel}}
    assert machine_code.differences(table, table) == []
    for change, said in [
        ({"instructions": 201}, ["instructions 200, now 201"]),
        ({"loops": [{**loop, "all": 99, "fma": 59}]}, ["all in loop 1 100, now 99", "fma in loop 1 60, now 59"]),
        (
            {"loops": [{"all": 100, "fma": 60, "convert": 40}]},
            ["integer in loop 1 40, now 0", "convert in loop 1 0, now 40"],
        ),
        ({"loops": []}, ["inner loops 1, now 0"]),
        ({"registers": 41}, ["registers 40, now 41"]),
        ({"stack": 8}, ["stack 0, now 8"]),
        ({"shared": 16}, ["shared 0, now 16"]),
        ({"spills": 4}, ["spills 4 bytes"]),
    ]:
        changed = copy.deepcopy(table)
        changed["kernels"]["kernel"].update(change)
        assert machine_code.differences(table, changed) == [f"kernel: {what}" for what in said]
        if "spills" in change:  # are none the better for being known
            assert machine_code.differences(changed, changed) == ["kernel: spills 4 bytes"]
    assert machine_code.differences(table, {"kernels": {}}) == ["kernel: is gone"]
    assert machine_code.differences({"kernels": {}}, table) == ["kernel: is not in the table"]


def a_program(path: Path, says: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


def test_the_tools_are_found(tmp_path, monkeypatch):
    """On the PATH, and in the packages, which share the name of a package."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    toolkit, packages = tmp_path / "toolkit", tmp_path / "packages"
    monkeypatch.setenv("PATH", str(toolkit))
    monkeypatch.setattr(sys, "path", [str(packages)])
    for package in ("nvidia", "triton"):  # of this machine, if another test had torch import them
        monkeypatch.delitem(sys.modules, package, raising=False)
    assert machine_code.find_tools() == "no nvcc"
    a_program(toolkit / "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    assert str(machine_code.find_tools()).startswith("no cuobjdump and nvdisasm: pip install")
    a_program(toolkit / "cuobjdump")
    assert str(machine_code.find_tools()).startswith("no nvdisasm: ")
    nvdisasm = packages / "nvidia" / "cu13" / "bin" / "nvdisasm"
    a_program(nvdisasm)
    importlib.invalidate_caches()
    found = machine_code.Tools(str(toolkit / "nvcc"), str(toolkit / "cuobjdump"), str(nvdisasm), "13.0.88")
    assert machine_code.find_tools() == found


@pytest.mark.extended
def test_the_kernels_are_those_of_the_table(cubin_of):
    """Where the difference is meant, `python benchmarks/gpu/machine_code.py --update` writes the table again."""
    tools = machine_code.find_tools()
    if isinstance(tools, str):
        # A check that is always skipped is none: the extra `test` has all that nvcc does not bring.
        (pytest.fail if os.environ.get("CI") == "true" and tools != "no nvcc" else pytest.skip)(tools)
    table = json.loads(machine_code.TABLE.read_text())
    if tools.version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {tools.version}")
    found = machine_code.differences(table, machine_code.measure(tools, cubin_of))
    assert not found, "\n".join(found)


def test_every_kernel_has_a_predicted_time():
    """Where the kernels or what is said of them has changed, `python benchmarks/gpu/kernel_times.py --update`."""
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
