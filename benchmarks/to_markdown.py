"""Results of ``lenet-ext bench --json`` as a Markdown table: ``python to_markdown.py results/cpu.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def markdown(content: dict[str, Any], cases: list[str] | None = None) -> str:
    """One line per case, mode and batch size, microseconds per image and the speedup over the best of stock."""
    rows = [row for row in content["rows"] if cases is None or row["case"] in cases]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    times = {(row["case"], row["mode"], row["batch"], row["provider"]): row["median_us"] for row in rows}
    speedups = {(c["case"], c["mode"], c["batch"]): c for c in content["comparisons"]}
    machine = content["machine"].get("gpu") or content["machine"]["cpu"]
    lines = [
        f"Microseconds per image, medians. {machine}, {content['cpu_capability']}, threads: {content['threads']}, "
        f"torch {content['torch']}, commit {content['commit']}, {content['date'][:10]}.",
        "",
        "| case | step | batch | " + " | ".join(providers) + " | speedup |",
        "| --- | --- | ---: |" + " ---: |" * (len(providers) + 1),
    ]
    for key in dict.fromkeys((row["case"], row["mode"], row["batch"]) for row in rows):
        cells = [f"{times[(*key, name)] / key[2]:.3g}" if (*key, name) in times else "-" for name in providers]
        compared = speedups.get(key)
        cells.append("-" if compared is None else f"{compared['speedup']:.2f}x")
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cases", nargs="+", help="only these")
    arguments = parser.parse_args()
    print(markdown(json.loads(arguments.file.read_text()), arguments.cases))
