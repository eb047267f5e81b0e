"""How long does `import torch_manualbp` take beyond `import torch`? Medians over fresh, alternating processes.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --rounds 40

There are two answers: the difference between processes that import one or the other, and, less noisily, the time of the
second import in a process that has already imported torch. For a breakdown, run
`python -X importtime -c "import torch_manualbp"`.
"""

import argparse
import os
import statistics
import subprocess
import sys

FIRST = "import time; start = time.perf_counter(); import {}; print(1e3 * (time.perf_counter() - start))"
WAYS = {
    "torch": FIRST.format("torch"),
    "torch_manualbp (with torch)": FIRST.format("torch_manualbp"),
    "torch_manualbp after torch": f"import torch; {FIRST.format('torch_manualbp')}",
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round. An extra first round compiles to bytecode, as pip does."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(rounds + 1):
        for way, code in WAYS.items():
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            times[way].append(float(done.stdout))
    return {way: values[1:] for way, values in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    times = measure(parser.parse_args().rounds)
    print("| import | median ms | quartiles ms |")
    print("|---|--:|--:|")
    for way, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"| {way} | {median:.1f} | {low:.1f} – {high:.1f} |")
    torch, ours, after = (statistics.median(values) for values in times.values())
    print(f"\nAbove torch: {ours - torch:.1f} ms between processes, {after:.1f} ms within one.")


if __name__ == "__main__":
    main()
