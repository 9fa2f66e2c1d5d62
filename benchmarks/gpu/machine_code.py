"""What nvcc makes of the CUDA kernels for one architecture, counted without a GPU.

For each kernel: registers, spills, static shared memory (what a launch asks for is no part of the code), and the
instructions by kind of the inner loops that compute the most. A multiprocessor begins four instructions of a warp in a
clock at most, so that a loop's count bounds the time of a trip.

    python benchmarks/gpu/machine_code.py            # says what differs from the committed table
    python benchmarks/gpu/machine_code.py --update   # writes it

It needs nvcc, and cuobjdump of the same toolkit (or of PyPI's nvidia-cuda-cuobjdump, or Triton's).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURE = "sm_90"
TABLE = Path(__file__).with_name(f"machine_code_{ARCHITECTURE}.json")

MOST_LOOPS = 3  # of a kernel that are in the table
SHORTEST_LOOP = 20  # instructions
TOLERANCE = 0.05  # of a count of instructions

# The first pattern that an operation begins with.
KINDS = {
    "tensor": "HMMA|HGMMA|IMMA|DMMA",
    "fma": "FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|DFMA|DMUL|DADD",
    "compare and select": "FSETP|FSEL|FMNMX|HMNMX2|SEL|ISETP|PLOP3|VIMNMX|HSETP2|FSET|P2R|R2P|DSETP|USEL|UISETP|UPLOP3",
    "shared": "LDS|STS|LDSM|STSM|ATOMS|LDGSTS",
    "global": "LDG|STG|LDL|STL|LD|ST|RED|ATOM|ATOMG",
    "convert": "F2F|F2FP|I2F|F2I|PRMT|I2FP|UPRMT",
    "integer": "IMAD|IADD3|IADD|VIADD|LEA|SHF|LOP3|IABS|SGXT|BMSK|MOV|UMOV|UIADD3|UIMAD|ULEA|ULOP3|USHF|R2UR|S2R|S2UR|"
    "CS2R|LDC|ULDC|LDCU",
    "control": "BRA|BAR|EXIT|BSSY|BSYNC|WARPSYNC|CALL|RET|NOP|DEPBAR|LDGDEPBAR|BRX|UCGABAR_ARV|UCGABAR_WAIT|ERRBAR|"
    "MEMBAR|VOTE|SHFL|BREAK|YIELD",
}


@dataclass(frozen=True)
class Tools:
    nvcc: str
    cuobjdump: str
    version: str  # of nvcc, e.g. 13.0.88


@dataclass(frozen=True)
class Instruction:
    address: int
    operation: str  # with its modifiers
    target: int | None  # of a branch


def find_tools() -> Tools | str:
    """The tools, or the reason why there are none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if version is None:
        return f"{nvcc} does not say its version"
    packages = Path(sysconfig.get_path("purelib"))
    folders = [Path(nvcc).parent, Path(nvcc).resolve().parent]
    folders += [*packages.glob("nvidia/*/bin"), packages / "triton" / "backends" / "nvidia" / "bin"]
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders))) or shutil.which("cuobjdump")
    return "no cuobjdump" if cuobjdump is None else Tools(nvcc, cuobjdump, version[1])


def kind_of(operation: str) -> str:
    name = operation.split(".")[0]
    return next((kind for kind, names in KINDS.items() if name in names.split("|")), "other")


def read_name(demangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces, result and parameters.

    >>> read_name("void lenet_ext::cuda::(anonymous namespace)::kernel<lx::bf16, 4>(int)")
    'kernel<bf16, 4>'
    """
    text = re.sub(r"\(anonymous namespace\)::|lenet_ext::cuda::|lx::", "", demangled.strip()).removeprefix("void ")
    depth = 0
    for i in range(len(text) - 1, -1, -1):  # the parameters are what the last parenthesis closes
        depth += (text[i] == ")") - (text[i] == "(")
        if depth == 0:
            return text[:i] if text[i] == "(" else text
    return text


def read_resources(ptxas: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(mangled name, registers and so on) of each kernel, of what ``ptxas -v`` says."""
    for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers[^\n]*)", ptxas, re.DOTALL):
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.search(r"Used (\d+) registers", report)
        shared = re.search(r"(\d+) bytes smem", report)
        assert spills is not None
        assert registers is not None
        yield (
            name,
            {
                "registers": int(registers[1]),
                "stack": int(spills[1]),
                "spills": int(spills[2]) + int(spills[3]),
                "shared": int(shared[1]) if shared else 0,
            },
        )


def read_programs(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, instructions) of each function, of what ``cuobjdump -sass`` says."""
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        program = []
        for line in part.splitlines():
            found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line)
            if found:
                target = re.search(r"\b0x([0-9a-f]+)\s*$", found[3].strip()) if found[2].startswith("BRA") else None
                program.append(Instruction(int(found[1], 16), found[2], int(target[1], 16) if target else None))
        yield part.split()[0], program


def inner_loops(program: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a branch backwards and its target, unless another loop lies in it; what has the most products
    and multiply-adds first, then the largest.
    """
    at = {instruction.address: i for i, instruction in enumerate(program)}
    spans = {
        (at[i.target], at[i.address])
        for i in program
        if i.target is not None and i.target in at and i.target < i.address
    }
    inner = [span for span in spans if not any(span != o and span[0] <= o[0] and o[1] <= span[1] for o in spans)]
    loops = [program[begin : end + 1] for begin, end in inner]

    def arithmetic(loop: list[Instruction]) -> int:
        return sum(kind_of(instruction.operation) in ("tensor", "fma") for instruction in loop)

    long = [loop for loop in loops if len(loop) >= SHORTEST_LOOP]
    return sorted(long, key=lambda loop: (-arithmetic(loop), -len(loop), loop[0].address))


def count(instructions: list[Instruction]) -> dict[str, int]:
    """All, then by kind."""
    kinds = collections.Counter(kind_of(instruction.operation) for instruction in instructions)
    return {"all": len(instructions), **{kind: kinds[kind] for kind in [*KINDS, "other"] if kinds[kind]}}


def _of_file(tools: Tools, source: Path, folder: Path) -> dict[str, dict[str, Any]]:
    cubin = folder / f"{source.stem}.cubin"
    compile_it = [tools.nvcc, "-std=c++17", "-O3", f"-arch={ARCHITECTURE}", "-Xptxas", "-v", "-cubin", str(source)]
    said = subprocess.run([*compile_it, "-o", str(cubin)], check=True, capture_output=True, text=True).stderr
    dump = [tools.cuobjdump, "-sass", str(cubin)]
    # cuobjdump calls nvdisasm, which lies beside it.
    path = os.pathsep.join([str(Path(tools.cuobjdump).parent), os.environ.get("PATH", "")])
    sass = subprocess.run(dump, check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}).stdout
    programs = dict(read_programs(sass))
    kernels = {}
    for name, resources in read_resources(said):
        demangled = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
        program = programs[name]
        while program and program[-1].operation in ("NOP", "BRA"):  # padding behind the end
            program = program[:-1]
        loops = [count(loop) for loop in inner_loops(program)[:MOST_LOOPS]]
        kernels[read_name(demangled)] = {**resources, "instructions": len(program), "loops": loops}
    return kernels


def measure(tools: Tools) -> dict[str, Any]:
    """Compiles every kernel file; this takes some minutes of one core."""
    kernels: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        sources = sorted(SOURCES.glob("*.cu"))
        for of_file in pool.map(lambda source: _of_file(tools, source, Path(folder)), sources):
            kernels.update(of_file)
    return {"architecture": ARCHITECTURE, "nvcc": tools.version, "kernels": dict(sorted(kernels.items()))}


def differences(table: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a reader of the table would not expect: other registers, any spill, counts that moved by more than 5%."""
    was, kernels, found = table["kernels"], now["kernels"], []
    for name in sorted({*was, *kernels}):
        if name not in was or name not in kernels:
            found.append(f"{name}: {'is not in the table' if name in kernels else 'is gone'}")
            continue
        before, after = was[name], kernels[name]
        found += [
            f"{name}: {what} {before[what]}, now {after[what]}"
            for what in ("registers", "stack", "shared")
            if before[what] != after[what]
        ]
        if after["spills"] != 0:
            found.append(f"{name}: spills {after['spills']} bytes")
        counts = [(before["instructions"], after["instructions"], "instructions")]
        if len(before["loops"]) == len(after["loops"]):
            pairs = zip(before["loops"], after["loops"], strict=True)
            counts += [(x["all"], y["all"], f"instructions in loop {i}") for i, (x, y) in enumerate(pairs, 1)]
        else:
            found.append(f"{name}: {len(before['loops'])} inner loops, now {len(after['loops'])}")
        found += [
            f"{name}: {one} {what}, now {other}" for one, other, what in counts if abs(other - one) > TOLERANCE * one
        ]
    return found


def write(table: dict[str, Any]) -> None:
    """One line a kernel."""
    lines = [f"    {json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in table["kernels"].items()]
    head = [f"  {json.dumps(key)}: {json.dumps(table[key])},\n" for key in ("architecture", "nvcc")]
    TABLE.write_text("{\n" + "".join(head) + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the committed table")
    options = parser.parse_args()
    tools = find_tools()
    if isinstance(tools, str):
        sys.exit(f"machine_code.py: {tools}")
    now = measure(tools)
    if options.update:
        write(now)
        return 0
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != now["nvcc"]:
        print(f"the table is of nvcc {table['nvcc']}, this is {now['nvcc']}: differences are to be expected")
    found = differences(table, now)
    print("\n".join(found) or "as in the table")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
