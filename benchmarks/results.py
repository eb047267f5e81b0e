"""Saves what a benchmark measured: its numbers as JSON, from which `make figures` draws, and a figure of them."""

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_manualbp.info import info


def header(load: float) -> dict[str, str]:
    """What a reader of the numbers must know; `load` is the mean number of running processes before the benchmark."""
    facts = info()
    return {
        "machine": f"{facts['cpu']}, {facts['threads']} threads, other processes at the start: {load:.1f}",
        "instruction set": facts["instruction set"],
        "software": f"torch {facts['torch']}, torch_manualbp {facts['torch_manualbp']}, Python {facts['python']}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `--figure`."""
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--figure", type=Path, help="draw them (needs matplotlib)")


def save(result: dict[str, Any], options: argparse.Namespace, draw: Callable[[dict[str, Any]], Any]) -> None:
    """Writes and draws the numbers, as the options ask."""
    for path in filter(None, (options.json, options.figure)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        draw(json.loads(json.dumps(result))).savefig(options.figure)
