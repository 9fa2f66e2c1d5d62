"""Makes the networks that travel with the package: lenet_ext/pretrained/mnist.safetensors and mnist.json.

The defaults of ``lenet-ext train --data mnist`` but for twelve epochs instead of two, on one thread of the CPU: seconds
on one core. The seed is part of the configuration in the file. On another processor, rounding makes other weights of
the same quality.

    python pretrain.py --root DIR                # into the package's folder
    python pretrain.py --root DIR --out FOLDER   # elsewhere
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from lenet_ext.environment.files import write_json
from lenet_ext.pretrained.files import save_weights
from lenet_ext.training import datasets
from lenet_ext.training.config import TrainConfig
from lenet_ext.training.trainer import Trainer

PACKAGE = Path(__file__).resolve().parents[1] / "lenet_ext" / "pretrained"
NAME, EPOCHS, SEED = "mnist", 12, 0
LEAST_ACCURACY = 0.992


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, metavar="DIR", help="folder with the four files of MNIST")
    parser.add_argument("--out", type=Path, default=PACKAGE, metavar="FOLDER", help=f"default: {PACKAGE}")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    config = TrainConfig.for_data(NAME, epochs=EPOCHS, seed=SEED, threads=1, device="cpu")
    trainer = Trainer(config, *datasets.load(NAME, arguments.root, log=print))
    for _ in range(EPOCHS):
        line = trainer.run_epoch()
        print(f"epoch {line['epoch']:2}: test accuracy {100 * line['test_accuracy']:.2f}%", flush=True)
    if line["test_accuracy"] < LEAST_ACCURACY:
        sys.exit(f"pretrain.py: the test accuracy is below {100 * LEAST_ACCURACY}%; nothing was written")

    sizes = {"in_channels": config.data_set.channels, "num_classes": config.data_set.num_classes}
    description = {**sizes, **trainer.description()}
    save_weights(arguments.out / f"{NAME}.safetensors", trainer.model, description)
    write_json(arguments.out / f"{NAME}.json", description)
    print(f"wrote {NAME}.safetensors and {NAME}.json to {arguments.out}")


if __name__ == "__main__":
    main()
