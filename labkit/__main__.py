"""The command line: python -m labkit doctor | run | results | release | corpus | pretrain."""

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
    corpus = commands.add_parser("corpus", help="write StoryWorld text to a file, or say what texts are like")
    corpus.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the new file; with --describe, text files (.txt or .txt.bz2)")
    corpus.add_argument("--megabytes", type=float, default=10.0, help="how much to write (default 10)")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--split", choices=("train", "test"), default="train", help="test tells combinations that train never tells")
    corpus.add_argument(
        "--recaps", type=float, default=0.0, help="probability that a sentence on who has what, or is where, follows an event (default 0)"
    )
    corpus.add_argument("--describe", action="store_true", help="write nothing: count words and 5-grams, and compress")
    _add_pretraining(commands.add_parser("pretrain", help="train a small decoder from scratch on text files, or measure one"))
    args = parser.parse_args(arguments)
    try:
        return _dispatch(args)
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 130


def _add_labs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labs", nargs="*", metavar="NN", help="numbers of labs, for example 03")
    parser.add_argument("--all", action="store_true", help="all labs in order")


def _add_pretraining(parser: argparse.ArgumentParser) -> None:
    """Options named as the fields of pretrain.Settings, whose defaults hold where one is not given."""
    parser.add_argument("--text", action="append", default=[], metavar="PATH[:WEIGHT]", help="a .txt or .txt.bz2 file, or `storyworld`; repeatable")
    parser.add_argument("--validation", action="append", default=[], metavar="PATH", help="held-out text, or `storyworld`; repeatable")
    parser.add_argument("--out", type=Path, help="the new model's folder")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="train nothing: measure the model in FOLDER on --validation")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="go on from a finished model: its weights, tokenizer and shape")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--validate-every", type=int, default=100, metavar="STEPS")
    for name in ("tokens", "batch-tokens"):
        parser.add_argument(f"--{name}", type=_count, default=argparse.SUPPRESS, metavar="N", help="such as 500k or 2M")
    for name in ("vocab-size", "hidden-size", "layers", "heads", "intermediate-size", "context", "micro-rows", "seed"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, metavar="N")
    for name in ("learning-rate", "warmup", "decay-to", "weight-decay", "max-grad-norm"):
        parser.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS, metavar="X")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", default=argparse.SUPPRESS, help="compile the model's body (needs a C++ compiler)")


def _count(text: str) -> int:
    """Read 2000, 500k, 2M or 1.5M."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        return round(float(text.rstrip("kKmM")) * factor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: write 2000, 500k or 2M") from error


def _pretrain(args: argparse.Namespace) -> int:
    import os
    from dataclasses import fields

    from labkit.pretrain import Settings, pretrain, shape_of
    from labkit.tokens import Source

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    validation = [Source.parse(text) for text in args.validation]
    if args.evaluate is not None:
        from labkit.evaluation import print_evaluation

        return print_evaluation(args.evaluate, validation)
    if args.out is None or not args.text:
        raise ValueError("pretrain needs --out FOLDER and at least one --text, or --evaluate FOLDER")
    given = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    settings = Settings(**((shape_of(args.start_from) if args.start_from else {}) | given))
    pretrain(
        settings,
        [Source.parse(text) for text in args.text],
        args.out,
        validation=validation,
        validate_every=args.validate_every,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        start_from=args.start_from,
    )
    print(f"finished: {args.out}")
    return 0


def _corpus(args: argparse.Namespace) -> int:
    from labkit.corpus import describe, write_corpus
    from labkit.tokens import Source, read_documents

    if args.describe:
        from labkit.models import load_tokenizer

        tokenizer = load_tokenizer("decoder")
        for path in args.files:
            print(f"{path.name}: {describe(' '.join(read_documents(Source.parse(str(path)))), tokenizer)}")
        return 0
    if len(args.files) > 1:
        raise ValueError(f"{len(args.files)} files to write: name one, or add --describe to read them")
    floor = write_corpus(args.files[0], args.megabytes, seed=args.seed, split=args.split, recaps=args.recaps)
    print(f"wrote {args.files[0]}: the choices behind it carry {floor:.3f} bits per byte")
    return 0


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from labkit.doctor import doctor

        return doctor()
    if args.command == "release":
        from labkit.release import release

        return release(args.folder)
    if args.command == "corpus":
        return _corpus(args)
    if args.command == "pretrain":
        return _pretrain(args)
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
