"""``python -m bench.gpu``: the stages of ``make gpu``, in order, each with a deadline and a summary at its end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from bench.gpu import benchmark, sanitize, suite
from bench.gpu.build import WORK, build
from bench.gpu.machine import Machine, NotUsable, look
from bench.gpu.process import Deadline, end_all
from bench.gpu.stage import Outcome, Settings, one_line, write_json

STAGES: dict[str, Callable[[Settings], Outcome]] = {
    "tests": suite.stage,
    "sanitize": sanitize.stage,
    **{name: partial(benchmark.stage, name) for name in benchmark.STAGES},
}
# Of the ten minutes that a stage may take, its last reports and a hung process's end included.
LIMIT = 510.0


def _stages(text: str) -> list[str]:
    if text.strip() in ("", "all"):
        return list(STAGES)
    chosen = text.split()
    for each in chosen:
        if each not in STAGES:
            raise argparse.ArgumentTypeError(
                f"{each!r} is no stage: expected {', '.join(STAGES)}, or nothing for all"
            )
    return chosen


def _device(text: str) -> str:
    if text not in ("", "cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: expected cuda, or cpu for a rehearsal")
    return text or "cuda"


def _optional(kind: Callable[[str], object]) -> Callable[[str], object]:
    """An option that make passes even where it is empty."""

    def convert(text: str) -> object:
        return kind(text) if text else None

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; make passes all of them, empty where they were not given."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--stage", type=_stages, default="all", help=f"{', '.join(STAGES)}; all if not given")
    parser.add_argument(
        "--device", type=_device, default="cuda", help="cpu: rehearse the stages without a GPU"
    )
    parser.add_argument("--out", type=_optional(Path), default=None, help="the folder for results")
    parser.add_argument("--limit", type=_optional(float), default=None, help="seconds for a stage")
    parser.add_argument("--jobs", type=_optional(int), default=None, help="processes at a time")
    parser.add_argument("--tests", default="", help="what pytest is given instead of the whole suite")
    parser.add_argument("--backends", default="", help="those that are tested, instead of all")
    parser.add_argument("--sanitizer", type=_optional(Path), default=None, help="compute-sanitizer")
    parser.add_argument("--no-build", action="store_true", help="the libraries are there")
    return parser.parse_args(arguments)


def run_stage(name: str, settings: Settings, builds: bool) -> Outcome:
    """Build, then run one stage; a failing build is its outcome."""
    if builds:
        jobs = settings.jobs or settings.machine.cores
        built = build(settings.machine, settings.deadline, jobs)
        print(f"{name}: built in {settings.deadline.used:.0f} s", flush=True)
        if built.code != 0:
            outcome = Outcome(name, summary=[f"    {one_line(line)}" for line in built.last_lines(12)])
            if built.stopped:
                outcome.unfinished.append(f"the build: {built.stopped}")
            else:
                outcome.problems.append(f"the build failed, see {built.log}")
            write_json(settings.out / f"{name}.json", {"build": built.last_lines(40)})
            return outcome
    return STAGES[name](settings)


def print_summary(outcome: Outcome, settings: Settings) -> None:
    """What a stage says last: the end of it is what matters most."""
    machine = settings.machine
    print(f"\n===== make gpu: {outcome.stage} on {machine} =====")
    for line in outcome.summary:
        print(line)
    for line in outcome.problems[:8]:
        print(f"PROBLEM: {one_line(line, 300)}")
    if len(outcome.problems) > 8:
        print(f"PROBLEM: ... and {len(outcome.problems) - 8} more, see {outcome.stage}.json")
    for line in outcome.unfinished[:6]:
        print(f"NOT FINISHED: {one_line(line, 300)}")
    used = f"{settings.deadline.used:.0f} s of {settings.deadline.limit:.0f}"
    note = " (a REHEARSAL on the CPU)" if machine.rehearsal else ""
    print(f"{outcome.stage}: {outcome.word}{note}, {used}, results in {settings.out}", flush=True)


def finish(outcome: Outcome, settings: Settings) -> None:
    """Put into the stage's result file what all of them have."""
    outcome.record = {
        "stage": outcome.stage,
        "result": outcome.word,
        "machine": settings.machine.as_dict(),
        "seconds": round(settings.deadline.used, 1),
        "limit": settings.deadline.limit,
        "problems": outcome.problems,
        "unfinished": outcome.unfinished,
        **outcome.record,
    }
    write_json(settings.out / f"{outcome.stage}.json", outcome.record)


def settings_of(options: argparse.Namespace, machine: Machine, deadline: Deadline) -> Settings:
    """The settings of a stage."""
    rehearsed = ("tests/test_host.py", "-k", "layouts_of_the_output or flat_buffer")
    tests = tuple(options.tests.split()) or (rehearsed if machine.rehearsal else ("tests",))
    backends = tuple(options.backends.split()) or Settings.backends
    return Settings(
        machine=machine,
        out=(options.out or WORK / "results").resolve(),
        deadline=deadline,
        jobs=options.jobs,
        tests=tests,
        backends=backends,
        sanitizer=options.sanitizer,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 0 where all went well, 1 where one did not, 2 where nothing could be run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    limit = options.limit or LIMIT
    deadlines = [Deadline(limit)]
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        """Interrupted: as if the deadline had come, so that what is known is kept and shown."""
        nonlocal stopped
        stopped = True
        deadlines[-1].end = 0.0

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    words = {}
    try:
        machine = look(options.device)
        for name in options.stage:
            settings = settings_of(options, machine, deadlines[-1])
            settings.out.mkdir(parents=True, exist_ok=True)
            outcome = run_stage(name, settings, builds=not options.no_build)
            finish(outcome, settings)
            print_summary(outcome, settings)
            words[name] = outcome.word
            if stopped:
                break
            deadlines.append(Deadline(limit))
    except NotUsable as reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    finally:
        end_all()
    if len(words) > 1:
        print("make gpu: " + ", ".join(f"{name} {word}" for name, word in words.items()), flush=True)
    return 0 if set(words.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
