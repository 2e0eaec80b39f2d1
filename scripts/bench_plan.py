"""How long `growkit plan` takes, as a user waits for it: whole processes, on recipes that grow beyond 100 billion
parameters and 100 layers, of both presets.

    python scripts/bench_plan.py [--runs 5]

Prints for each recipe its last stage's parameters, the median wall clock and the median CPU time; on a machine that is
busy with other work the wall clock is longer than the CPU time, and says little.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.cli.recipes import read  # noqa: E402

RECIPES = {
    "tokenformer": """
model: {preset: tokenformer, vocab_size: 50304, embed_dim: 8192, num_layers: 60, num_heads: 64,
        attention_tokens: 8192, mlp_tokens: 16384}
stages:
  - {name: shallow, duration: 1B tokens, context_length: 2048, global_batch_tokens: 4194304, micro_batch_size: 1}
  - {name: deep, duration: 1B tokens, grow: {num_layers: 120}, micro_batch_size: 1}
  - {name: more-tokens, duration: 1B tokens, grow: {attention_tokens: 12288, mlp_tokens: 24576},
     context_length: 8192, micro_batch_size: 1}
""",
    "transformer": """
model: {preset: transformer, vocab_size: 50304, embed_dim: 8192, num_layers: 60, num_heads: 64, num_kv_heads: 8,
        mlp_dim: 28672, tied_head: false}
stages:
  - {name: shallow, duration: 1B tokens, context_length: 2048, global_batch_tokens: 4194304, micro_batch_size: 1}
  - {name: deep, duration: 1B tokens, grow: {num_layers: 120}, micro_batch_size: 1}
  - {name: wide, duration: 1B tokens, grow: {embed_dim: 10240, num_heads: 80, num_kv_heads: 10, mlp_dim: 32768},
     context_length: 8192, micro_batch_size: 1}
""",
}


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        for name, text in RECIPES.items():
            path = Path(folder) / f"{name}.yaml"
            path.write_text(text)
            command = [sys.executable, "-m", "growkit.cli.main", "plan", str(path), "--hardware", "h100-sxm"]
            wall, cpu = [], []
            for _ in range(runs):
                start, before = time.perf_counter(), cpu_seconds()
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                wall.append(time.perf_counter() - start)
                cpu.append(cpu_seconds() - before)
            last = read(str(path), [])[1].last.model
            size = f"{last.num_params() / 1e9:.0f}B parameters, {len(last.layers)} layers"
            print(f"{name}: {size}: {statistics.median(wall):.2f} s, of CPU {statistics.median(cpu):.2f} s")


if __name__ == "__main__":
    main()
