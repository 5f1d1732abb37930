"""``python -m benchmarks [NAME ...] [--device cpu|cuda]``: runs benchmarks and prints their rows.

Without names: all of them on the CPU; with ``--device cuda`` those that need nothing but torch, timm,
numpy, scikit-learn and xai_core, so that they run on a bare GPU machine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys

import torch

from xai_core.allocation import GLIBC

# Name, module, and whether it runs on a bare GPU machine.
BENCHMARKS = (
    ("cam", "benchmarks.cam", False),
    ("kl_hessian", "benchmarks.kl_hessian", True),
    ("perturbation", "benchmarks.perturbation", True),
    ("concept_graph", "benchmarks.concept_graph", True),
    ("concepts", "benchmarks.concepts", True),
    ("precision", "benchmarks.precision", True),
    ("gradients", "benchmarks.gradients", False),
    ("var", "benchmarks.var", True),
    ("receptive_fields", "benchmarks.receptive_fields", False),
    ("metrics", "benchmarks.metrics", False),
    ("sae", "benchmarks.sae", True),
    ("learned", "benchmarks.learned", True),
    ("inherent", "benchmarks.inherent", False),
    ("semanticity", "benchmarks.semanticity", False),
    ("resume", "benchmarks.resume", False),
    ("store", "benchmarks.store", False),
    ("sql", "benchmarks.sql", False),
    ("orchestration", "benchmarks.orchestration", False),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [name for name, _, _ in BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(names)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    for name in options.names:
        if name not in names:
            parser.error(f"unknown benchmark {name!r}: expected any of {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none")
    _as_in_workers()
    print(machine(options.device))
    for name, module, bare in BENCHMARKS:
        if name in options.names or (not options.names and (bare or options.device == "cpu")):
            print(f"\n## {name}", flush=True)
            importlib.import_module(module).run(options.device)


def machine(device: str) -> str:
    """The machine in one line."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def _as_in_workers() -> None:
    """Starts over with the memory allocation of Dask's workers: a third of a large batch's time hangs on it."""
    if not GLIBC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **GLIBC})


if __name__ == "__main__":
    main()
