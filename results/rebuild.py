"""Measure again what this folder holds: python results/rebuild.py [toy|language|claims]"""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parents[1]))  # `results` and the modules it measures

import torch

from results.claims import PARTS
from results.measure import RESULTS, read, remembered


def filled(text: str, places: dict[str, str]) -> str:
    """The text of README.md, with what belongs between each pair of markers."""
    between = rf"(<!-- ({'|'.join(places)}) -->).*?(<!-- /\2 -->)"
    return re.sub(between, lambda m: f"{m[1]}\n\n{places[m[2]]}\n\n{m[3]}", text, flags=re.S)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rebuild.py", description=__doc__)
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, help="what to measure (default: all)")
    add("--steps", type=int, default=1500, help="training steps, at most; some take fewer")
    add("--out", type=Path, default=RESULTS, help="a folder (default: this one)")
    add("--shown", action="store_true", help="measure nothing: tables and pictures of the JSON")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    files = sorted([*RESULTS.glob("*.py"), *RESULTS.parent.glob("*.py")])
    code = crc32(b"".join(file.read_bytes() for file in files))
    same = {"steps": args.steps, "code": code, "on": [sys.version.split()[0], torch.__version__]}
    page, names = args.out / "README.md", [args.part] if args.part else [*PARTS]

    def remember(made, measure):
        """Rows, measured once by the same code: an interrupted rebuild goes on from here."""
        return remembered(begun, made | same, lambda: {"rows": list(measure())})["rows"]

    for name in names:
        (measured, shown), begun = PARTS[name], args.out / f"{name}.begun.jsonl"
        for file, rows in {} if args.shown else measured(args.steps, args.out, remember).items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (args.out / f"{file}.jsonl").write_text("".join(lines))
        chart, places = shown(partial(read, folder=args.out))
        chart.save(args.out / f"{name}.svg") if chart else None
        text = (page if page.exists() else RESULTS / "README.md").read_text()
        page.write_text(filled(text, places))
        print(*places.values(), sep="\n\n", end="\n\n")
    for name in [] if args.shown else names:
        (args.out / f"{name}.begun.jsonl").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
