"""The time that each kernel should take on an H100, predicted from what nvcc made of it.

A kernel's work on some problem, that is how often its warps run the loops of the table of `machine_code.py`, gives the
clocks that a multiprocessor needs at least: four instructions a clock, 0.62 products on the tensor cores, one access of
128 bytes to shared memory. What a kernel waits for comes on top, as a factor that was measured.

    python benchmarks/gpu/kernel_times.py            # prints the table
    python benchmarks/gpu/kernel_times.py --update   # writes it to kernel_times.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MACHINE_CODE = Path(__file__).with_name("machine_code_sm_90.json")
TABLE = Path(__file__).with_suffix(".md")

MULTIPROCESSORS, CLOCKS_A_US = 132, 1700.0
INSTRUCTIONS_A_CLOCK = 4.0
PRODUCTS_A_CLOCK = 0.62  # as others have measured mma.sync on an H100
BYTES_A_US = 2.99e6  # measured: a copy in global memory
# Of the instructions outside of the inner loops those that are run once a trip of the loops around them, and not before
# them: 172 of 318 and 380 of 662 in conv1's kernels.
OUTSIDE = 0.55
# Measured over counted, on an H100 at commit e811d08. In large batches: in float32 conv1 1.4, conv2 1.5, the gradients
# of conv2's input 1.5, of its weights 1.6, which had no branches then, of conv1's weights 1.9; on the tensor cores
# conv1 1.7 to 2.2, conv2 2.8. In small ones, a block or two on a multiprocessor: conv1 1.3, conv2 2.5, the gradients of
# the whole network 4.8.
WAITING, WAITING_ON_TENSOR_CORES, WAITING_ALONE = 1.5, 2.2, 2.5
# Where a multiprocessor has one image and nothing else, the warp with most to do takes so many clocks for each of its
# instructions. With blocks of 256 threads it had 14,100 in a training step and 6,550 in the backward pass, as counted
# by hand in the machine code, and the 4.8 above made 36 and 16.5 us of them, which nobody has measured. Blocks of 512
# threads, with half as many a warp, are taken to need the same for each, or WAITING for those of all warps, if more.
CLOCKS_OF_LONGEST_WARP = 4.3
# Guessed, where asynchronous copies are on their way during the products; with two blocks, and with four warps each.
WAITING_FOR_NO_LOAD, WAITING_FOR_BARRIERS = 1.3, 1.2
LAUNCH_US = 3.0  # with what a block does before its first image


@dataclass(frozen=True)
class Work:
    """Of one launch. Everything is counted for an image (or another unit), all warps together."""

    problem: str
    images: float
    trips: tuple[float, ...] = ()  # of a warp through each loop of the table, in its order
    passes: float = 0.0  # of a warp through what is outside of these loops
    products: float = 0.0  # beside those in the loops
    shared: float = 0.0  # accesses of 128 bytes, where they may be the limit
    bytes: float = 0.0  # of global memory
    multiprocessors: int = MULTIPROCESSORS  # that have something to do
    waiting: float = WAITING
    before_us: float = LAUNCH_US  # the first image
    us: float | None = None  # where it is not counted: measured on an H100 at commit e811d08, or after what was
    said: str = "measured"
    instructions: float = 0.0  # beside those that are counted by trips and passes
    longest_warp: float = 0.0  # its instructions, where they may be the limit


@dataclass(frozen=True)
class Prediction:
    us: float
    limit: str


def predict(kernel: dict[str, Any], work: Work) -> Prediction:
    if work.us is not None:
        return Prediction(work.us, work.said)
    loops = kernel["loops"][: len(work.trips)]
    in_loops = sum(trips * loop["all"] for trips, loop in zip(work.trips, loops, strict=False))
    outside = OUTSIDE * (kernel["instructions"] - sum(loop["all"] for loop in loops))
    products = work.products + sum(
        trips * loop.get("tensor", 0) for trips, loop in zip(work.trips, loops, strict=False)
    )
    clocks = {
        "instructions": (in_loops + work.passes * outside + work.instructions) / INSTRUCTIONS_A_CLOCK,
        "products": products / PRODUCTS_A_CLOCK,
        "shared memory": work.shared,
    }
    limit = max(clocks, key=lambda name: clocks[name])
    us = work.waiting * work.images * clocks[limit] / (work.multiprocessors * CLOCKS_A_US)
    of_one_warp = CLOCKS_OF_LONGEST_WARP * work.longest_warp / CLOCKS_A_US
    if of_one_warp > us:
        us, limit = of_one_warp, "the longest warp"
    of_memory = work.images * work.bytes / BYTES_A_US
    if of_memory > us:
        us, limit = of_memory, "global memory"
    return Prediction(work.before_us + us, limit)


# --------------------------------------------------------------------------------------------------- what kernels do

MANY, SOME, FEW = 65536, 1024, 64
STORED = {"float": 4, "bf16": 2, "f16": 2, "double": 8}


def _alone(images: int, **what: Any) -> Work:
    """Of a block an image."""
    blocks = min(images, MULTIPROCESSORS)
    return Work(f"{images} images", images, multiprocessors=blocks, **{"waiting": WAITING_ALONE, **what})


def _conv_forward(arguments: list[str]) -> Work:
    # A tile is a window in one image or two, and all channels of conv1, or 8 or 2 of conv2.
    first, tile, stored = "1, 6, 32" in arguments[1], arguments[2][-1], STORED[arguments[0]]
    if tile == "2":
        warps = 3.1 if first else 0.8
        of_memory = 1024 * stored + 1176 * (stored + 1) if first else 1176 * stored + 400 * (stored + 1)
        return Work(f"{MANY} images", MANY, (warps * (5 if first else 30),), warps, bytes=of_memory)
    warps = 7 if tile == "0" else 3.5
    return _alone(FEW if tile == "0" else 256, trips=(warps * (5 if first else 30),), passes=warps)


def _forward(arguments: list[str]) -> Work:
    # conv1 (for each channel), conv2, and 4 of a layer's outputs for 5 images in a quarter of the depth.
    channels, tile = (3 if "3, 6" in arguments[0] else 1), arguments[1][-1]
    if tile == "2":
        return Work("4096 images", 4096, (24, 15.5 * channels, 25.4), 2.0)
    conv1, conv2, linear = (35 * channels, 210, 254) if tile == "0" else (17.5 * channels, 105, 127)
    return _alone(FEW if tile == "0" else 256, trips=(conv1, linear, conv2), passes=8)


def _tensor_core_network(arguments: list[str]) -> Work:
    # conv2, conv1, a linear layer. A block alone with one image was measured: most of it is the wait for the linear
    # layers' weights.
    if arguments[0] == "float":
        return Work(f"{SOME} images", SOME, (3.1, 6.1, 16), 1.0, before_us=41.9)
    return Work(f"{SOME} images", SOME, (3.1, 6.1, 4.1), 0.5, before_us=25.4)


def _tensor_core_conv1(arguments: list[str]) -> Work:
    # 16 patches a trip; in TF32 the pixels are rounded, four times 32 packs of them a trip.
    stored, codes = STORED[arguments[0]], arguments[1] == "true"
    shared, rounding = (391, 2.0) if arguments[0] == "float" else (163, 0.0)
    of_memory = 1024 * stored + 1176 * (stored + codes)
    waits = {"waiting": WAITING_FOR_NO_LOAD}
    return Work(f"{MANY} images", MANY, (6.15, 0, rounding), shared=shared, bytes=of_memory, **waits)


def _tensor_core_conv2(arguments: list[str]) -> Work:
    # 8 windows a trip, 16 by pixels; 32 pairs of pixels that are spread, in 16 bits behind the weights' preparation.
    stored, codes = STORED[arguments[0]], arguments[1] == "true"
    of_memory = 1176 * stored + 400 * (stored + codes)
    waits = {"bytes": of_memory, "waiting": WAITING_FOR_NO_LOAD}
    if arguments[0] != "float":
        return Work(f"{MANY} images", MANY, (3.2, 0, 3.06), shared=282, **waits)
    if arguments[2] == "true":
        return Work(f"{MANY} images", MANY, (1.6, 3.06), shared=552, **waits)
    return _alone(FEW, trips=(3.125, 3.06), shared=736)


def _lean_convolutions(arguments: list[str]) -> Work:
    stored, kept = STORED[arguments[0]], arguments[1] == "true"
    of_memory = 1424 * stored + kept * (1176 * (stored + 1) + 400)
    shared = 1010 if arguments[0] == "float" else 350
    waits = {"waiting": WAITING_FOR_NO_LOAD, "before_us": 8.0}
    return Work(f"{MANY} images", MANY, (3.125, 7), shared=shared, bytes=of_memory, **waits)


def _lean_linears(arguments: list[str]) -> Work:
    # fc1 in five steps of 16 images; then fc2 and fc3.
    return Work(f"{MANY} images", MANY, (5 / 16,), 1 / 16, products=100 / 16, shared=60, before_us=8.0)


def _tf32_linears(arguments: list[str]) -> Work:
    # 25 times two steps of fc1 in 32 images; then fc2 and fc3.
    of_memory = 4 * (410 + 204 * (arguments[0] == "true"))
    waits = {"waiting": WAITING_FOR_NO_LOAD, "before_us": 10.0}
    return Work(f"{MANY} images", MANY, (25 / 32,), 1 / 32, 187 / 16, shared=65, bytes=of_memory, **waits)


# What each slice of the batch leaves of the linear layers' gradients, with 10 classes.
LINEAR_SLICES, LINEAR_SUMS = 44, 59134


def _linear_grad_inputs(arguments: list[str]) -> Work:
    # 25 pairs of tiles of fc1's inputs and a step or two of fc3's depth in 32 images; fc2 is outside of these loops.
    float32, of_memory = arguments[0] == "float", 838 * STORED[arguments[0]]
    steps, products, shared = (2, 330 / 32, 56) if float32 else (1, 180 / 32, 31)
    trips, passes = (25 / 32, steps / 32), 1 / 32
    return Work(f"{MANY} images", MANY, trips, passes, products, shared, bytes=of_memory, before_us=10.0)


def _linear_grad_weights(arguments: list[str]) -> Work:
    # A trip of a warp is 64 products; then the sums are stored.
    float32, of_memory = arguments[0] == "float", 828 * STORED[arguments[0]] + 4 * LINEAR_SLICES * LINEAR_SUMS / MANY
    trips, shared = (67 / 64, 145) if float32 else (33.5 / 64, 73)
    return Work(f"{MANY} images", MANY, (trips,), shared=shared, bytes=of_memory, waiting=WAITING_FOR_BARRIERS)


def _gradients(arguments: list[str]) -> Work:
    # Accesses in TF32 and in 16 bits, counted from the addresses of a warp's lanes: the copies and what makes operands
    # of them 445 and 320, conv2's weights 615 and 310, its input 510 and 190, what that hands on 240 and 125, conv1's
    # weights 365 and 225.
    if arguments[0] == "float":
        return Work(f"{MANY} images", MANY, products=1197, shared=2175, bytes=12000, waiting=WAITING_FOR_BARRIERS)
    return Work(f"{MANY} images", MANY, products=599, shared=1170, bytes=6800, waiting=WAITING_FOR_BARRIERS)


def _conv1_gradients(arguments: list[str]) -> Work:
    # Of the accesses copies and operands are 365 and 245, as above with what comes from the same banks.
    stored = STORED[arguments[0]]
    products, shared = (247, 725) if stored == 4 else (124, 470)
    of_memory = 1024 * stored + 1176 * (stored + 1)
    waits = {"waiting": WAITING_FOR_BARRIERS}
    return Work(f"{MANY} images", MANY, products=products, shared=shared, bytes=of_memory, **waits)


def _conv2_gradients(arguments: list[str]) -> Work:
    # Of its input and of its weights, or of one of them.
    stored, of_input, of_weights = STORED[arguments[0]], arguments[1][-1] in "23", arguments[1][-1] in "24"
    of_each = ((600, 510), (350, 800), 130) if stored == 4 else ((300, 190), (175, 405), 90)
    products = of_input * of_each[0][0] + of_weights * of_each[1][0]
    shared = of_input * of_each[0][1] + of_weights * of_each[1][1] + of_each[2]
    of_memory = 1176 * stored * (of_input + of_weights) + 400 * (stored + 1)
    waits = {"waiting": WAITING_FOR_BARRIERS}
    return Work(f"{MANY} images", MANY, products=products, shared=shared, bytes=of_memory, **waits)


# Trips through the loop over the windows of the gradient of conv2's input: 25, of whose instructions a warp runs 0.56,
# for each channel those of the row where the winner is. What it saves where ReLU is closed is not counted.
WINDOWS = 14.0
# And of its weights: the windows for each half of the channels, and 0.61 of the instructions.
WINDOWS_OF_WEIGHTS = 30.5


def _grad_input(arguments: list[str]) -> Work:
    # Outside of the loop a warp loads the weights, in registers, and the gradients, and hands the sums over.
    if arguments[-1] == "8":
        return Work(f"{MANY} images", MANY, (WINDOWS,), 1.85)
    images, passes = {"1": (FEW, 9.5), "2": (256, 4.8), "4": (512, 2.6)}[arguments[-1]]
    return _alone(images, trips=(WINDOWS,), passes=passes)


def _one_image(all_warps: float, longest: float, channels: int, more: float, longer: float) -> Work:
    """Of a block an image, with so many channels more than one, and instructions counted by hand."""
    of_all, of_one = all_warps + channels * more, longest + channels * longer
    return _alone(FEW, instructions=of_all, longest_warp=of_one, waiting=WAITING)


def _backward_data(arguments: list[str]) -> Work:
    # The gradient of conv2's input, conv1's weights, conv2's weights. With one image as in lenet_step.cu.
    colour, images = "3, 6" in arguments[0], arguments[-1]
    conv1 = 12.25 * (3 if colour else 1)
    if images == "1":
        return _one_image(59_000, 4_100, 2 * colour, 10_100, 680)
    batch = 512 if images == "2" else 2048
    return Work(f"{batch} images", batch, (WINDOWS, conv1, WINDOWS_OF_WEIGHTS), 0.25, waiting=WAITING_ALONE)


def _step_data(arguments: list[str]) -> Work:
    # The same and the forward pass: with 2 images the third loop is conv1's, with 4 the second is conv2's.
    colour, images = "3, 6" in arguments[0], arguments[1]
    conv1 = 12.25 * (3 if colour else 1)
    if images == "1":
        return _one_image(100_000, 7_200, 2 * colour, 14_700, 1_030)
    batch = 512 if images == "2" else 2048
    trips = (WINDOWS, conv1, 20 * (3 if colour else 1)) if images == "2" else (WINDOWS, 24, conv1)
    return Work(f"{batch} images", batch, trips, 2, waiting=WAITING_ALONE)


def _cluster(arguments: list[str]) -> Work:
    images, us = {"8": (1, 10.5), "4": (20, 12.0), "2": (FEW, 15.4)}[arguments[1]]
    said = "as in float32" if arguments[0] != "float" else "between 2 and 8" if arguments[1] == "4" else "measured"
    return Work(f"{images} image{'s' * (images > 1)}", images, us=us, said=said)


def _million(what: str, trips: tuple[float, ...], **rest: Any) -> Callable[[list[str]], Work]:
    """Of a million of something, each of them `trips` of a thread through a loop."""
    return lambda arguments: Work(f"a million {what}", 1.0, tuple(1e6 / 32 * t for t in trips), **rest)


def _small_product(arguments: list[str]) -> Work:
    us = {"float": 7.7, "bf16": 10.4, "f16": 10.4, "double": 7.7}[arguments[0]]
    said = {"f16": "as in bfloat16", "double": "as in float32"}.get(arguments[0], "measured")
    return Work("64 rows, 400 -> 120", 64, us=us, said=said)


_AS_FLOAT = dict.fromkeys(("bf16", "f16"), "as in float32")

WORK: list[tuple[str, Callable[[list[str]], Work]]] = [
    ("lenet_conv_forward_kernel", _conv_forward),
    ("lenet_forward_kernel", _forward),
    ("lenet_forward_cluster_kernel", _cluster),
    ("lenet_tensor_core_kernel", _tensor_core_network),
    ("lenet_tensor_core_conv1_kernel", _tensor_core_conv1),
    ("lenet_tensor_core_conv2_kernel", _tensor_core_conv2),
    ("lenet_lean_convolutions_kernel", _lean_convolutions),
    ("lenet_lean_linears_kernel", _lean_linears),
    ("lenet_tf32_linears_kernel", _tf32_linears),
    ("lenet_linear_grad_inputs_kernel", _linear_grad_inputs),
    ("lenet_linear_grad_weights_kernel", _linear_grad_weights),
    ("lenet_linear_sums_kernel", lambda a: Work(f"{LINEAR_SLICES} slices", LINEAR_SLICES, bytes=LINEAR_SUMS * 4)),
    ("lenet_tensor_core_backward_kernel", _gradients),
    ("lenet_convolution_sums_kernel", lambda a: Work("256 slices", 256, bytes=2572 * 4)),
    ("lenet_tensor_core_conv1_gradients_kernel", _conv1_gradients),
    ("lenet_tensor_core_conv2_gradients_kernel", _conv2_gradients),
    ("lenet_grad_input_kernel", _grad_input),
    ("lenet_conv1_grad_weight_kernel", lambda a: Work(f"{MANY} images", MANY, (12.25,))),
    ("lenet_conv2_grad_weight_kernel", lambda a: Work(f"{MANY} images", MANY, (WINDOWS_OF_WEIGHTS,))),
    ("lenet_backward_data_kernel", _backward_data),
    (
        "lenet_backward_weight_kernel",
        lambda a: Work(f"{FEW} images", FEW, us=6.7, said=_AS_FLOAT.get(a[0], "measured")),
    ),
    ("lenet_step_data_kernel", _step_data),
    ("lenet_step_update_kernel", lambda a: Work(f"{FEW} images", FEW, us=7.0, said="as the gradients alone")),
    ("small_matrix_product_kernel", _small_product),
    ("conv_pool_forward_kernel", _million("multiply-adds", (1 / 4,))),
    ("conv_at_indices_kernel", _million("multiply-adds", (1 / 4,))),
    ("grad_input_kernel", _million("multiply-adds", (1 / 4,))),
    ("grad_weight_partial_kernel", _million("multiply-adds", (0, 0, 1))),
    ("grad_bias_partial_kernel", _million("outputs", (1 / 4,), bytes=5e6)),
    ("grad_weight_sum_kernel", _million("partial sums", (1 / 16,), bytes=4e6)),
    ("bias_relu_pool_kernel", _million("outputs of 2 x 2 windows", (0, 2), passes=1e6 / 32, bytes=21e6)),
    ("relu_avg_pool_kernel", _million("outputs of 2 x 2 windows", (), passes=1e6 / 32, bytes=20e6)),
    ("relu_avg_pool_backward_kernel", _million("inputs, 2 x 2 windows", (), passes=1e6 / 32, bytes=9e6)),
    ("bias_relu_pool_backward_kernel", _million("positions, 2 x 2 windows", (1 / 4,), passes=1e6 / 32, bytes=5.3e6)),
]


def split_name(name: str) -> tuple[str, list[str]]:
    """A kernel's name without and with its template arguments.

    >>> split_name("kernel<Layer<1, 6>, bf16>")
    ('kernel', ['Layer<1, 6>', 'bf16'])
    """
    head, _, rest = name.partition("<")
    arguments, depth, begin = [], 0, 0
    for i, character in enumerate(rest):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if (character == "," and depth == 0) or depth < 0:
            arguments.append(rest[begin:i].strip())
            begin = i + 1
    return head, arguments


def work_of(name: str) -> Work | None:
    head, arguments = split_name(name)
    made = next((work for kernel, work in WORK if kernel == head), None)
    return None if made is None else made(arguments)


def render(table: dict[str, Any]) -> str:
    lines = [
        "# Predicted times of the kernels",
        "",
        f"Of {table['architecture']}, by what nvcc {table['nvcc']} makes of them; `kernel_times.py` says how.",
        "",
        "| kernel | problem | microseconds | limit |",
        "| --- | --- | ---: | --- |",
    ]
    for name, kernel in table["kernels"].items():
        work = work_of(name)
        if work is None:
            lines.append(f"| `{name}` | - | - | - |")
        else:
            found = predict(kernel, work)
            us = f"{found.us:.0f}" if found.us >= 100 else f"{found.us:.3g}"
            lines.append(f"| `{name}` | {work.problem} | {us} | {found.limit} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write kernel_times.md")
    options = parser.parse_args()
    text = render(json.loads(MACHINE_CODE.read_text()))
    if options.update:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
