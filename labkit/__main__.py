"""The command line: python -m labkit doctor | run | results | release."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 when something is wrong (the message says what), or 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m labkit", description="Check the machine, run labs, gather results, make student versions.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check Python, packages, disk, memory, model and data; exit 1 with remedies")
    run = commands.add_parser("run", help="execute labs from top to bottom, without a browser")
    _add_labs(run)
    run.add_argument("--seed", type=int, default=0, help="reseed the whole lab (default 0)")
    run.add_argument("--save", action="store_true", help="store the outputs in the notebook, and the results, if every cell ran clean")
    results = commands.add_parser("results", help="run labs, write data/results and the tables made from them")
    _add_labs(results)
    results.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="run each lab with these seeds (default: 0)")
    results.add_argument("--tables", action="store_true", help="run nothing, only make the tables anew from data/results")
    release = commands.add_parser("release", help="write student notebooks and a course folder for nbgrader")
    release.add_argument("folder", type=Path, help="a new or empty folder")
    args = parser.parse_args(arguments)
    try:
        return _dispatch(args)
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_labs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labs", nargs="*", metavar="NN", help="numbers of labs, for example 03")
    parser.add_argument("--all", action="store_true", help="all labs in order")


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from labkit.doctor import doctor

        return doctor()
    if args.command == "release":
        from labkit.release import release

        return release(args.folder)
    from labkit import results

    if args.command == "results" and args.tables:
        results.write_tables()
        return 0
    paths = results.find_labs(args.labs, everything=args.all)
    if args.command == "run":
        return results.run_labs(paths, seed=args.seed, save=args.save)
    return results.measure_labs(paths, seeds=args.seeds)


if __name__ == "__main__":
    sys.exit(main())
