"""What an optimizer's step costs, beside its peers: ``python -m benchmarks.step``.

Every contestant takes steps in turns, in a random order in every round, a few steps each. What is
reported is the median over the rounds of the ratio of two times *of the same round*, with its
quartiles: what else the machine does in a round hits all alike. The floor adds the gradient to the
parameters and to as many buffers as the algorithm has, in one loop: it reads and writes the arrays
that the algorithm must read and write, once each, and calculates next to nothing. (On a GPU XLA
makes a loop of every sum, and each reads the gradient: there the hand-fused form is the least.)

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
            # JAX leaves room on a GPU for PyTorch, which is there too.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            | os.environ
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
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
                counted = moved is not None and moved >= 1  # of a kernel of its own XLA counts none
                cells.append(f"{moved:.1f}" if counted else "")
                cells.append(f"{facts['state bytes'] / found['elements']:.1f}")
                made = [facts.get(f"{what} s") for what in ("trace", "lower", "compile")]
                cells.append("" if None in made else " + ".join(f"{s:.2f}" for s in made))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


MARKS = {
    "ours": ("#0072B2", "o"),
    "optax": ("#D55E00", "s"),
    "single_pass(ours)": ("#009E73", "D"),
    "torch fused": ("#CC79A7", "^"),
    "pytorch_optimizer": ("#000000", "v"),
}
"""Those that the chart shows; the table has all."""


def conclusion(found: dict[str, Any]) -> str:
    """What the times over the floor say, from the smallest to the largest of the algorithms.

    With thousands of small leaves the floor is not memory's, but what JAX takes to start a kernel
    for each; then a peer that starts fewer is below it.
    """

    def over_floor(name: str) -> list[float]:
        both = [c for c in found["algorithms"].values() if {name, "floor"} <= set(c)]
        return [ratio(c[name]["seconds"], c["floor"]["seconds"])[0] for c in both]

    below = max(over_floor("torch fused"), default=1.0) < 0.8
    words_of = {"single_pass(ours)": "in one pass", "ours": "without it"}
    if below:
        words_of["torch fused"] = "PyTorch's fused kernels"
    said = []
    for name, words in words_of.items():
        if over := over_floor(name):
            least, most = f"{min(over):.2f}", f"{max(over):.2f}"
            said.append(f"{words} {least}" + (f" to {most}" if most != least else ""))
    floor = "a kernel's start for each leaf" if below else "the least that memory allows"
    return f"A step over {floor}:\n{', '.join(said)}"


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Every algorithm in a row: times over that of the floor, with quartiles, names beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = results["cases"]
    rows = [sum(len(set(MARKS) & set(c)) for c in f["algorithms"].values()) for f in cases.values()]
    with plt.style.context("default"):
        figure, panels = plt.subplots(
            len(cases), 1, figsize=(8, 0.8 + 0.24 * sum(rows) + 0.6 * len(rows)), squeeze=False,
            layout="constrained", height_ratios=rows,
        )  # fmt: skip
        for axes, (case, found) in zip(panels[:, 0], cases.items(), strict=True):
            at, ticks = 0.0, {}
            for algorithm, contestants in found["algorithms"].items():
                shown = [name for name in MARKS if {name, "floor"} <= set(contestants)]
                ticks[at + (len(shown) - 1) / 2] = algorithm
                for name in shown:
                    seconds, floor = (contestants[n]["seconds"] for n in (name, "floor"))
                    median, low, high = ratio(seconds, floor)
                    colour, marker = MARKS[name]
                    errors = [[median - low], [high - median]]
                    axes.errorbar(median, at, xerr=errors, color=colour, marker=marker)
                    axes.annotate(
                        name, (max(high, median), at), xytext=(7, 0), va="center",
                        textcoords="offset points", size=8,
                    )  # fmt: skip
                    at += 1
                axes.axhline(at, color="0.9", linewidth=0.8)
                at += 1
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set(xscale="log", ylim=(at - 0.5, -1), xlabel="time over that of the floor")
            axes.set_yticks(list(ticks), list(ticks.values()))
            axes.tick_params("y", length=0)
            low, high = axes.get_xlim()
            even = [x for x in (0.2, 0.5, 1, 2, 5, 10, 20) if low <= x <= high]
            axes.set_xticks(even, [f"{x:g}" for x in even])
            axes.set_xticks([], minor=True)
            axes.set_xlim(low, high * 1.35)  # for the names
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.set_title(conclusion(found), loc="left", size=10, weight="bold")
            where = f"{results['device']}, {results['threads']} threads, {case}"
            axes.text(1, 1, where, transform=axes.transAxes, ha="right", va="top", size=8)
        figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
        plt.close(figure)


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
    parser.add_argument("--redraw", action="store_true", help="only the chart of what is there")
    options = parser.parse_args(arguments)
    if options.redraw:
        if not options.output:
            parser.error("--redraw needs --output, the folder of a step.json")
        results = json.loads((options.output / "step.json").read_text())
        draw(results, options.output / "step.png")
        return results
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
