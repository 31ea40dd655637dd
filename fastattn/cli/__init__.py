"""The command line: `fastattn doctor | verify | bench | warmup | hf-table`, also `python -m fastattn`.

Exit codes: 0 fine; 1 something is wrong (no native module, a result that breaks the law); 2 the arguments are wrong;
141 the reader of the output left (`fastattn doctor | head -1`), as a shell says of a program that SIGPIPE ended.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence

from fastattn.cli import bench, doctor, hf_table, verify, warmup

READER_LEFT = 141


def main(argv: Sequence[str] | None = None) -> int:
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():  # another pipe, such as that of a worker
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return READER_LEFT


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="fastattn", description="Fast attention, RoPE and norms for PyTorch.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="doctor | verify | bench | warmup | hf-table"
    )
    for command in (doctor, verify, bench, warmup, hf_table):
        name = command.__name__.rsplit(".", 1)[1].replace("_", "-")
        summary = (command.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=command.__doc__, formatter_class=_Formatter)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Tells a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action) if action.default else action.help
