"""Hold every Hugging Face model family to eager attention and print docs/hf-models.md.

Exit code 0: every check holds, 1: one does not (or transformers is missing), 2: bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", nargs="+", action="extend", help="only these families, as the table names them")


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        print(
            "hf-table: transformers must be installed (pip install 'fastattn[hf]'), got no such package",
            file=sys.stderr,
        )
        return 1
    from transformers.utils import logging

    from fastattn.hf import table
    from fastattn.hf.models import FAMILIES

    logging.set_verbosity_error()
    known = {family.name: family for family in FAMILIES}
    unknown = sorted(set(arguments.family or ()) - known.keys())
    if unknown:
        print(f"hf-table: --family must be among {', '.join(known)}, got {unknown[0]}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in arguments.family or ()]
    findings = [f for family in chosen for f in table.examine(family)] if chosen else list(table.everything())
    print(table.markdown(findings), end="")
    broken = [f for f in findings if f.status == "BROKEN"]
    print(f"{len(findings)} checks, {len(broken)} broken", file=sys.stderr)
    return 1 if broken else 0
