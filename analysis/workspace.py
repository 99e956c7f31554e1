"""Measures the workspace of convolutions on each instruction set of this CPU: `python analysis/workspace.py`.

Run it from the repository's root. Each instruction set is measured in a process of its own, whose oneDNN is limited to
that set. If one of the known forms (`llmeff.cost.workspace.FORMS`) matches the measurements, its name is written into
the table `llmeff/cost/workspace.json`. Otherwise the script prints the measurements, and the table gets no entry. All
measurements are written to results/workspace.json. Afterwards, check whole steps by the price gate:
`ONEDNN_MAX_CPU_ISA=SET python -m pytest -k images tests/plan/test_price.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmeff.core.cpu import INSTRUCTION_SETS, contained, instruction_set
from llmeff.core.files import write_text
from llmeff.core.meters import peak_bytes
from llmeff.core.precision import BYTES
from llmeff.cost import workspace
from llmeff.cost.workspace import FORMS, PRODUCTS, Convolution, Product, Room
from llmeff.record.environment import environment

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "workspace.json"
TABLE = Path(workspace.__file__).with_suffix(".json")
FORMATS = ("float32", "bfloat16")
CASES = (
    (2, 8, 16, 3, 48, 64),
    (2, 3, 8, 3, 48, 64),
    (2, 3, 16, 3, 48, 48),
    (2, 20, 11, 3, 48, 64),
    (2, 16, 3, 3, 48, 64),
    (3, 16, 24, 7, 40, 40),
    (2, 36, 40, 3, 64, 80),
    (16, 16, 8, 1, 32, 32),
    (2, 1, 16, 3, 32, 32),
    (2, 2, 11, 3, 48, 64),
    (2, 6, 6, 3, 48, 64),
    (2, 5, 32, 3, 32, 32),
    (2, 8, 24, 3, 32, 32),
    (2, 12, 16, 3, 32, 32),
)
"""Images, input and output channels, kernel size, height and width. In all cases torch uses oneDNN."""
MATRIX_CASES = ((50, 12, 12), (512, 128, 512), (2048, 352, 128), (4096, 768, 3072), (1024, 1024, 1024))
"""Rows, input width and output width of matrix products."""
TOLERANCE = 0.03
"""Allowed error of a form, relative to the live bytes. No form covers partial sums of threads and address alignment."""


def shapes(case: Sequence[int], dtype: str) -> Convolution:
    """Returns the shapes of a convolution that keeps the image size, on one thread."""
    images, inputs, outputs, kernel, *sides = case
    return Convolution(
        x=(images, inputs, *sides),
        weight=(outputs, inputs, kernel, kernel),
        y=(images, outputs, *sides),
        dtype=dtype,
        num_threads=1,
    )


def measured_bytes(own: Convolution, product: Product) -> int:
    """Measures the peak of live bytes while one product is computed: with its result, without its operands."""
    dtype = getattr(torch, own.dtype)
    x, weight, y = (torch.zeros(shape, dtype=dtype) for shape in (own.x, own.weight, own.y))
    around = [own.weight[2] // 2] * 2

    def run() -> Tensor | tuple[Tensor, ...]:
        if product == "output":
            return torch.nn.functional.conv2d(x, weight, padding=around)
        wanted = [product == "input", product == "weight", False]
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            y, x, weight, None, [1, 1], around, [1, 1], False, [0, 0], 1, wanted
        )
        return found

    run()
    return peak_bytes(run, [], CPU)


def tensor_bytes(own: Convolution, product: Product) -> int:
    """Returns the bytes of a product's result."""
    shape = {"output": own.y, "input": own.x, "weight": own.weight}[product]
    return torch.Size(shape).numel() * BYTES[own.dtype]


def foreseen_bytes(found: Room, made: int) -> int:
    """Returns the peak of live bytes that a form predicts for a result of `made` bytes."""
    return max(found.result + found.during, found.result + made)


def measure() -> list[dict[str, Any]]:
    """Measures every product of every case in every format, in this process."""
    torch.set_num_threads(1)
    rows = []
    for dtype in FORMATS:
        for case in CASES:
            for product in PRODUCTS:
                num_bytes = measured_bytes(shapes(case, dtype), product)
                rows.append({"format": dtype, "case": case, "product": product, "bytes": num_bytes})
    return rows


def measure_matrices() -> list[dict[str, Any]]:
    """Measures the bytes that products of a linear layer use in addition to their results. No price has them."""
    rows = []
    for dtype in FORMATS:
        for case in MATRIX_CASES:
            num_rows, wide, high = case
            x, weight, y = (
                torch.zeros(shape, dtype=getattr(torch, dtype))
                for shape in ((num_rows, wide), (high, wide), (num_rows, high))
            )
            runs: dict[Product, Callable[[], Tensor]] = {
                "output": partial(torch.mm, x, weight.t()),
                "input": partial(torch.mm, y, weight),
                "weight": partial(torch.mm, y.t(), x),
            }
            for product, run in runs.items():
                made = run().nbytes
                rows.append(
                    {"format": dtype, "case": case, "product": product, "bytes": peak_bytes(run, [], CPU) - made}
                )
    return rows


def worst(form: Callable[[Convolution, Product], Room], rows: list[dict[str, Any]]) -> float:
    """Returns the largest error of a form over all rows, relative to the live bytes."""
    found = []
    for row in rows:
        own, product = shapes(row["case"], row["format"]), row["product"]
        living = row["bytes"] + sum(tensor_bytes(own, other) for other in PRODUCTS if other != product)
        foreseen = foreseen_bytes(form(own, product), tensor_bytes(own, product))
        found.append(abs(foreseen - row["bytes"]) / living)
    return max(found)


def best_form(rows: list[dict[str, Any]]) -> str | None:
    """Returns the name of the form that matches the measurements. None if no form does."""
    off = {name: worst(form, rows) for name, form in FORMS.items()}
    name = min(off, key=lambda name: off[name])
    return name if off[name] <= TOLERANCE else None


def measured_under(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures in a process with oneDNN limited to an instruction set. Returns rows of convolutions and of matrices.

    Raises:
        RuntimeError: oneDNN uses another instruction set.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--here"],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": name},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    if found["set"] != name:
        raise RuntimeError(f"oneDNN was limited to {name}, but uses {found['set']}")
    return found["rows"], found["matrices"]


def main(names: Sequence[str]) -> None:
    """Measures the named instruction sets, or all that this CPU has, and writes the table and the results."""
    here = instruction_set()
    if here is None:
        sys.exit("oneDNN uses no x86 instruction set on this machine, so there is nothing to measure")
    table, facts = json.loads(TABLE.read_text(encoding="utf-8")), environment(CPU).model_dump(mode="json")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in names or contained(here):
        rows, matrices = measured_under(name)
        results[name] = {
            "command": "python analysis/workspace.py", "environment": facts, "rows": rows, "matrices": matrices,
        }  # fmt: skip
        for dtype in FORMATS:
            own = [row for row in rows if row["format"] == dtype]
            form = best_form(own)
            before = table.get(name, {}).get(dtype)
            print(f"{name:<22}{dtype:<10}{form or 'no known form'}" + ("" if form == before else f" (was: {before})"))
            if form is not None:
                table.setdefault(name, {})[dtype] = form
            else:
                table.get(name, {}).pop(dtype, None)
                for row in own:
                    print(f"  {row['product']:<8}{row['case']!s:<28}{row['bytes']:>12}")
    ordered = {name: table[name] for name in INSTRUCTION_SETS if table.get(name)}
    write_text(TABLE, json.dumps(ordered, indent=1) + "\n")
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        print(json.dumps({"set": instruction_set(), "rows": measure(), "matrices": measure_matrices()}))
    else:
        main(sys.argv[1:])
