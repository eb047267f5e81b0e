"""The command line of the fuzzers.

python -m fuzz                                    2 minutes (in tests/, with the library on the path; or `make fuzz`)
python -m fuzz --cases 100000 --seconds 86400     for a night
python -m fuzz --seed 4711 --cases 1              repeats one case
"""

import argparse
import importlib
import tempfile
import time
from pathlib import Path

from fuzz import runner

SHARES = {"differential": 0.4, "training": 0.15, "forwards": 0.15, "transforms": 0.15, "arguments": 0.15}  # of the time
FUZZERS = {name: f"fuzz.{name}" for name in SHARES}


def main() -> int:
    """Runs the fuzzers in sequence; returns 1 if one found anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FUZZERS, help="one of the fuzzers; default: all share the time")
    parser.add_argument("--seconds", type=float, default=120.0, help="default: 120")
    parser.add_argument("--cases", type=int, default=10**9, help="cases per fuzzer; default: as many as time allows")
    parser.add_argument("--seed", type=int, help="seed of the first case; default: from the clock, and printed")
    options = parser.parse_args()
    first = int(time.time()) * 1000 if options.seed is None else options.seed
    chosen = [options.only] if options.only else list(FUZZERS)
    found = False
    for name in chosen:
        importlib.import_module(FUZZERS[name])
        start = time.monotonic()
        share = 1.0 if options.only else SHARES[name]
        with tempfile.TemporaryDirectory() as folder:
            mark = Path(folder) / "seed"
            report = runner.run_apart(FUZZERS[name], first, options.cases, options.seconds * share, mark)
        print(f"{name}: seeds from {first}, {time.monotonic() - start:.0f} s, {report}", flush=True)
        for text in report.failures + report.crashes:
            print(text, flush=True)
        found = found or bool(report.failures or report.crashes)
    return int(found)


if __name__ == "__main__":
    raise SystemExit(main())
