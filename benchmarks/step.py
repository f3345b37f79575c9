"""What an optimizer's step costs, beside its peers: ``python -m benchmarks.step``.

Every contestant takes steps in turns, in a random order in every round, a few steps each. What is
reported is the median over the rounds of the ratio of two times *of the same round*, with its
quartiles: what else the machine does in a round hits all alike. The floor adds the gradient to the
parameters and to as many buffers as the algorithm has, in one loop: it reads and writes the arrays
that the algorithm must read and write, once each, and calculates next to nothing.

Contestants with the single pass live in a process of their own, which has XLA's option; all others
run with XLA as it is. torch, pytorch_optimizer and torch_optimizer take part where installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import cases
from benchmarks.contestants import ALGORITHMS, workers
from benchmarks.timing import in_turns, ratio

ROOT = pathlib.Path(__file__).parent.parent


class Worker:
    """A process of ``benchmarks.worker``."""

    def __init__(self, kind: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", kind, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
        self.about = self._answer()

    def __call__(self, **order: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has stopped; its message is above.")
        return json.loads(line)


@contextlib.contextmanager
def started(threads: int) -> Iterator[dict[str, Worker]]:
    """The workers there is use for on this machine."""
    running = {"jax": Worker("jax", threads)}
    try:
        if running["jax"].about["platform"] == "cpu":
            running["jax-option"] = Worker("jax-option", threads)
        if any("torch" in workers(a, option=False).values() for a in ALGORITHMS):
            running["torch"] = Worker("torch", threads)
        yield running
    finally:
        for worker in running.values():
            worker.process.terminate()
            worker.process.wait()


def measured(
    running: dict[str, Worker],
    algorithm: str,
    shapes: cases.Shapes,
    rounds: int,
    only: Sequence[str] | None = None,
) -> Any:
    """For every contestant what is known of it, and the seconds of a step in every round."""
    homes = workers(algorithm, option="jax-option" in running)
    homes = {name: home for name, home in homes.items() if only is None or name in only}
    facts = {
        name: running[home](do="prepare", name=name, algorithm=algorithm, shapes=shapes)
        for name, home in homes.items()
    }

    def seconds(name: str, times: int) -> float:
        return running[homes[name]](do="run", name=name, times=times)

    times = in_turns({name: functools.partial(seconds, name) for name in homes}, rounds)
    for ask in running.values():
        ask(do="clear")
    return {name: facts[name] | {"seconds": times[name]} for name in homes}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for every contestant."""
    others = ("floor", "ours", "optax", "single_pass(ours)")
    heads = ["case", "algorithm", "contestant", "ms", *(f"of {other}" for other in others)]
    heads += ["bytes/parameter", "state bytes/parameter", "trace + lower + compile s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case, found in results["cases"].items():
        for algorithm, contestants in found["algorithms"].items():
            for name, facts in contestants.items():
                cells = [case, algorithm, name, f"{statistics.median(facts['seconds']) * 1e3:.2f}"]
                for other in others:
                    if name == other or other not in contestants:
                        cells.append("")
                        continue
                    median, low, high = ratio(facts["seconds"], contestants[other]["seconds"])
                    cells.append(f"{median:.2f} ({low:.2f}..{high:.2f})")
                moved = facts.get("bytes accessed per parameter")
                cells.append("" if moved is None else f"{moved:.1f}")
                cells.append(f"{facts['state bytes'] / found['elements']:.1f}")
                made = [facts.get(f"{what} s") for what in ("trace", "lower", "compile")]
                cells.append("" if None in made else " + ".join(f"{s:.2f}" for s in made))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """A bar for every contestant: its time over the floor's, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (case, algorithm, contestants)
        for case, found in results["cases"].items()
        for algorithm, contestants in found["algorithms"].items()
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (case, algorithm, contestants) in zip(axes.flat, panels, strict=False):
        names = [name for name in contestants if name != "floor"]
        floor = contestants.get("floor", contestants[names[0]])["seconds"]
        spread = [ratio(contestants[name]["seconds"], floor) for name in names]
        middle = [median for median, _, _ in spread]
        errors = [[m - low for m, low, _ in spread], [high - m for m, _, high in spread]]
        colors = ["tab:blue" if "ours" in name else "lightgray" for name in names]
        axis.barh(names, middle, xerr=errors, color=colors)
        axis.axvline(1, color="black", linewidth=1)
        axis.invert_yaxis()
        axis.set_title(f"{algorithm}, {case}", fontsize=10)
        axis.set_xlabel("time / floor")
        axis.tick_params(labelsize=8)
    title = f"{results['device']}, {results['threads']} threads; 1 moves the same bytes once"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["leaf", "transformer", "small"])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--contestants", nargs="+", help="only these")
    parser.add_argument("--elements", type=int, default=1 << 24, help="of the large leaf")
    parser.add_argument("--width", type=int, default=384, help="of the Transformer")
    parser.add_argument("--leaves", type=int, default=2000, help="of the many small ones")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=pathlib.Path, help="where JSON, table and chart are saved")
    options = parser.parse_args(arguments)
    shapes = {
        "leaf": cases.leaf(options.elements),
        "transformer": cases.transformer(options.width),
        "small": cases.small(options.leaves),
    }
    with started(options.threads) as running:
        about = {kind: worker.about for kind, worker in running.items()}
        results = {
            "device": about["jax"]["device"],
            "threads": options.threads,
            "rounds": options.rounds,
            "versions": about,
            "cases": {},
        }
        print(f"device: {results['device']} ({about['jax']['platform']}), versions: {about}")
        for case in options.cases:
            found = results["cases"][case] = {
                "leaves": len(shapes[case]),
                "elements": cases.elements(shapes[case]),
                "algorithms": {},
            }
            for algorithm in options.algorithms:
                times = measured(
                    running, algorithm, shapes[case], options.rounds, options.contestants
                )
                found["algorithms"][algorithm] = times
                print(f"done: {case}, {algorithm}", file=sys.stderr)
    print(table(results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "step.json").write_text(json.dumps(results, indent=1))
        (options.output / "step.md").write_text(table(results) + "\n")
        try:
            draw(results, options.output / "step.png")
        except ImportError:
            print("no chart: matplotlib is not installed", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
