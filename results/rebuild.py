"""Measure again what this folder holds: python results/rebuild.py [pareto|claims|language]"""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `results` and the modules it measures

from results import claims, language, pareto
from results.measure import RESULTS, read

PARTS = {"pareto": pareto, "claims": claims, "language": language}


def as_json(name: str, content) -> str:
    if name == "runs":  # one line a run
        lines = [json.dumps(row, ensure_ascii=False) for row in content]
        return "[\n" + ",\n".join(lines) + "\n]\n"
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def filled(text: str, places: dict[str, str]) -> str:
    """The text of README.md, with what belongs between each pair of markers."""
    between = rf"(<!-- ({'|'.join(places)}) -->).*?(<!-- /\2 -->)"
    return re.sub(between, lambda m: f"{m[1]}\n\n{places[m[2]]}\n\n{m[3]}", text, flags=re.S)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rebuild.py", description=__doc__)
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, help="what to measure (default: all)")
    add("--steps", type=int, default=4000, help="training steps; some take fewer (default: 4000)")
    add("--seed", type=int, default=0, help="of data and initialisation; claims have five")
    add("--out", type=Path, default=RESULTS, help="a folder (default: this one)")
    add("--shown", action="store_true", help="measure nothing: tables and pictures of the JSON")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    readme = (RESULTS / "README.md").read_text()
    for name in [args.part] if args.part else PARTS:
        results = {} if args.shown else PARTS[name].measured(args.steps, args.seed)
        for file, content in results.items():
            (args.out / f"{file}.json").write_text(as_json(file, content))
        chart, places = PARTS[name].shown(partial(read, folder=args.out))
        chart.save(args.out / f"{name}.svg")
        readme = filled(readme, places)
        (args.out / "README.md").write_text(readme)
        print(*places.values(), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
