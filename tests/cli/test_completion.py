"""Completion by the Tab key: each shell's own machinery is asked what it would offer."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("shtab")

from lenet_ext.cli import build_parser, main

DATA = {"digits", "mnist", "fashion-mnist", "kmnist", "emnist-letters", "emnist-balanced", "cifar10"}

# What is typed before the Tab key, and what is offered. In the folder are those of `folder`.
OFFERED = [
    ("lenet-ext tr", {"train"}),
    ("lenet-ext e", {"eval", "export"}),
    ("lenet-ext train --da", {"--data"}),
    ("lenet-ext train --data ", DATA),
    ("lenet-ext train --data m", {"mnist"}),
    ("lenet-ext train --data mnist --augment --optimizer a", {"adam", "adamw"}),
    ("lenet-ext export mnist --format ", {"onnx", "torchscript", "pt2", "safetensors"}),
    ("lenet-ext eval chec", {"checkpoint.pt"}),
    ("lenet-ext train --resume chec", {"checkpoint.pt"}),
    ("lenet-ext train --out ru", {"runs"}),  # a folder, and not the file of the same beginning
    ("lenet-ext predict --top 3 checkpoint.pt s", {"seven.png"}),
    ("lenet-ext predict checkpoint.pt seven.png --js", {"--json"}),
    ("lenet-ext completion f", {"fish"}),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "runs").mkdir(parents=True)
    for name in ("checkpoint.pt", "rules.txt", "seven.png"):
        (folder / name).touch()
    return folder


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def offers(line: str) -> set[str]:
    """What is offered for one line, without fish's description of it, and a folder's name without its slash."""
    return {word.split("\t")[0].rstrip("/") for word in line.split("|") if word}


def complete_in_bash(script: Path, folder: Path, lines: list[str]) -> list[set[str]]:
    # As readline does, with the function that the script has registered.
    asking = f"""
        source '{script}'
        function=$(complete -p lenet-ext | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        while IFS= read -r line; do
            read -r -a COMP_WORDS <<< "$line"
            [[ $line == *' ' ]] && COMP_WORDS+=('')
            COMP_LINE=$line COMP_POINT=${{#line}} COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )) COMPREPLY=()
            $function lenet-ext "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
            (IFS="|"; echo "${{COMPREPLY[*]}}")
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", textwrap.dedent(asking)],
        input="".join(f"{line}\n" for line in lines),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [offers(line) for line in done.stdout.splitlines()]


def complete_in_fish(script: Path, folder: Path, lines: list[str]) -> list[set[str]]:
    asking = f"source '{script}'; while read -l line; echo (complete -C $line | string join '|'); end"
    done = subprocess.run(
        ["fish", "--no-config", "-c", asking],
        input="".join(f"{line}\n" for line in lines),
        cwd=folder,
        env={**os.environ, "HOME": str(script.parent), "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [offers(line) for line in done.stdout.splitlines()]


def complete_in_zsh(script: Path, folder: Path, lines: list[str]) -> list[set[str]]:
    """Its line editor works only where there is a terminal; each word that is to be offered goes through compadd."""
    home = script.parent
    shutil.copy(script, home / "_lenet-ext")
    (home / "lines").write_text("".join(f"{line}\n" for line in lines))
    settings = """
        fpath=($ZDOTDIR $fpath)
        autoload -U compinit && compinit -u -D
        compadd() {
            if [[ " ${@[1,(i)(-|--)]} " == *\\ -[a-zA-Z]#[OAD]\\ * ]]; then
                builtin compadd "$@"
                return
            fi
            local -a offered
            builtin compadd -A offered "$@"
            print -rn -- "${(j:|:)offered}|" >> $ZDOTDIR/offered
            builtin compadd "$@"
        }
        ask() {
            local line
            for line in "${(@f)$(<$ZDOTDIR/lines)}"; do
                BUFFER=$line CURSOR=$#line
                zle complete-word
                print >> $ZDOTDIR/offered
            done
            BUFFER=exit
            zle accept-line
        }
        zle -N zle-line-init ask
    """
    (home / ".zshrc").write_text("setopt extended_glob\n" + textwrap.dedent(settings))
    ours, theirs = pty.openpty()

    def read_all() -> None:
        with contextlib.suppress(OSError):  # the end of what a terminal says
            while os.read(ours, 4096):
                pass

    reader = threading.Thread(target=read_all)
    reader.start()
    try:
        subprocess.run(
            ["zsh", "-i"],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            cwd=folder,
            env={**os.environ, "ZDOTDIR": str(home), "TERM": "xterm"},
            start_new_session=True,
            timeout=60,
            check=True,
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return [offers(line) for line in (home / "offered").read_text().splitlines()]


@pytest.mark.parametrize(
    ("shell", "ask"), [("bash", complete_in_bash), ("zsh", complete_in_zsh), ("fish", complete_in_fish)]
)
def test_what_the_shell_offers(
    shell: str,
    ask: Callable[[Path, Path, list[str]], list[set[str]]],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    script = tmp_path / "script"
    script.write_text(script_of(shell, capsys))
    found = ask(script, folder, [line for line, _ in OFFERED])
    for (line, expected), offered in zip(OFFERED, found, strict=True):
        assert offered == expected, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_option_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(shell, capsys)
    (commands,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    for name, parser in commands.choices.items():
        assert name in script
        for action in parser._actions:
            for option in action.option_strings:
                # fish has its own way to write them: -l help, -s h.
                written = f"-{'l' if option[1] == '-' else 's'} {option.lstrip('-')} " if shell == "fish" else option
                assert written in script, f"{name} {option}"
