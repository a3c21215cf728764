"""Processor time of help and of wrong arguments, for every subcommand of `msa-openclip`.

    python benchmarks/command_time.py --out docs/results/command_time.json

Each is a process of its own, from its start to its end; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pair_common import record

from msa_openclip.commands.main import parser as command_parser
from msa_openclip.commands.main import subcommands

FLAGS = {"help": "--help", "wrong argument": "--no-such-option"}


def processor_ms(*arguments: str) -> float:
    """Processor milliseconds of a process `msa-openclip ARGUMENTS`."""
    command = [sys.executable, "-m", "msa_openclip", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Medians by subcommand, of help and of a wrong argument."""
    processor_ms("--help")  # Python compiles the modules once
    return {
        name: {
            what: statistics.median(processor_ms(*name.split(), flag) for _ in range(rounds))
            for what, flag in FLAGS.items()
        }
        for name, _ in subcommands(command_parser())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="file to write")
    options = parser.parse_args()
    result = {"about": record(), "processor_ms": measure(options.rounds)}
    for name, row in result["processor_ms"].items():
        print(f"{name:22}", ", ".join(f"{what} {ms:5.1f} ms" for what, ms in row.items()))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
