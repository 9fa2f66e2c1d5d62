"""What nvcc makes of the CUDA kernels for one architecture, counted without a GPU.

For each kernel: registers, bytes of the stack and of spills, static shared memory (what a launch asks for is no part of
the code), and the instructions by kind of the inner loops that compute the most. A multiprocessor begins four
instructions of a warp in a clock at most, so that a loop's count bounds the time of a trip.

    python benchmarks/gpu/machine_code.py            # says what differs from the committed table
    python benchmarks/gpu/machine_code.py --update   # writes it

It needs nvcc, and both cuobjdump and nvdisasm, which cuobjdump calls: those of the toolkit, of PyPI's
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (the extra `test` has them), or Triton's. The same nvcc makes the same
code, to the instruction, whatever its host compiler; and newer tools print what is in the table, too.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURE = "sm_90"
TABLE = Path(__file__).with_name(f"machine_code_{ARCHITECTURE}.json")
SHARED = "static; what a kernel declares as extern is asked for at its launch, and is not in this table"

MOST_LOOPS = 3  # of a kernel that are in the table
SHORTEST_LOOP = 20  # instructions

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
    nvdisasm: str
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
    folders = [Path(nvcc).parent, Path(nvcc).resolve().parent]
    folders += [folder for package in _folders_of("nvidia") for folder in sorted(package.glob("*/bin"))]
    folders += [package / "backends" / "nvidia" / "bin" for package in _folders_of("triton")]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
    cuobjdump, nvdisasm = (shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:
        missing = " and ".join(n for n, found in (("cuobjdump", cuobjdump), ("nvdisasm", nvdisasm)) if found is None)
        return f"no {missing}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return Tools(nvcc, cuobjdump, nvdisasm, version[1])


def _folders_of(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    return [] if found is None else [Path(folder) for folder in found.submodule_search_locations or []]


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


Compile = Callable[[str, Path, str], tuple[Path, str]]  # nvcc, a source, an architecture: the cubin, what ptxas says


def _compiler_into(folder: Path) -> Compile:
    def compile_one(nvcc: str, source: Path, architecture: str) -> tuple[Path, str]:
        cubin = folder / f"{source.stem}.cubin"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin", str(source)]
        return cubin, subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True, text=True).stderr

    return compile_one


def _of_file(tools: Tools, source: Path, compile_one: Compile) -> dict[str, dict[str, Any]]:
    cubin, said = compile_one(tools.nvcc, source, ARCHITECTURE)
    dump = [tools.cuobjdump, "-sass", str(cubin)]
    path = os.pathsep.join([str(Path(tools.nvdisasm).parent), os.environ.get("PATH", os.defpath)])
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


def measure(tools: Tools, compile_one: Compile | None = None) -> dict[str, Any]:
    """Every kernel file; compiling them takes a minute of one core, unless `compile_one` has them already."""
    kernels: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        by = compile_one or _compiler_into(Path(folder))
        for of_file in pool.map(lambda source: _of_file(tools, source, by), sorted(SOURCES.glob("*.cu"))):
            kernels.update(of_file)
    return {
        "architecture": ARCHITECTURE,
        "nvcc": tools.version,
        "shared": SHARED,
        "kernels": dict(sorted(kernels.items())),
    }


def differences(table: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Whatever is not as in the table, and any spill."""
    was, kernels, found = table["kernels"], now["kernels"], []
    for name in sorted({*was, *kernels}):
        if name not in was or name not in kernels:
            found.append(f"{name}: {'is not in the table' if name in kernels else 'is gone'}")
            continue
        before, after = was[name], kernels[name]
        counts = [(what, before[what], after[what]) for what in ("registers", "stack", "shared", "instructions")]
        if len(before["loops"]) == len(after["loops"]):
            for i, (one, other) in enumerate(zip(before["loops"], after["loops"], strict=True), 1):
                counts += [(f"{kind} in loop {i}", one.get(kind, 0), other.get(kind, 0)) for kind in {**one, **other}]
        else:
            counts.append(("inner loops", len(before["loops"]), len(after["loops"])))
        found += [f"{name}: {what} {one}, now {other}" for what, one, other in counts if one != other]
        if after["spills"] != 0:
            found.append(f"{name}: spills {after['spills']} bytes")
    return found


def write(table: dict[str, Any]) -> None:
    """One line a kernel."""
    lines = [f"    {json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in table["kernels"].items()]
    head = [f"  {json.dumps(key)}: {json.dumps(table[key])},\n" for key in ("architecture", "nvcc", "shared")]
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
