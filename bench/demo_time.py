"""Where the time of `make demo` goes: CPU seconds of its processes, of them the start, and the share of bookkeeping.

    python -m bench.demo_time

The flow runs in a fresh clone of this repository's last commit, in a temporary folder, with this environment. All
processes below it are looked at a few times a second; what a process used after the last look is not counted. A start
is the import of the stage's module, measured alone and multiplied by the number of processes. Writes a section of
docs/scale.md.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.sections import table, write_section

logger = logging.getLogger("bench.demo_time")

_LOOKS_EVERY = 0.2
_MODULE = re.compile(r"-m (?:tasks\.cluster\.rank )?([a-z_]+(?:\.[a-z_]+)*)")
#: Groups of processes that do no work on models or data, by what their command line contains.
BOOKKEEPING = {
    "tasks.stages.report": "`report`",
    "tasks.stages.register": "`register`, with its check at the start",
    "tasks.registry.check": "`register`, with its check at the start",
    "tasks.reproduce": "DVC",
    "dvc": "DVC",
    "flows.quantize": "Prefect's server and the flow",
    "prefect": "Prefect's server and the flow",
    "uvicorn": "Prefect's server and the flow",
}


@dataclass
class Group:
    """Processes of one kind.

    Attributes:
        module: what one of them imports first; None if that is not known.
    """

    seconds: float = 0.0
    processes: int = 0
    module: str | None = None


@dataclass
class Watched:
    """CPU seconds of every process below one, by its last look.

    Attributes:
        seen: command line and CPU seconds by process id and time of its start.
    """

    seen: dict[tuple[int, float], tuple[str, float]] = field(default_factory=dict)

    def look(self, root: psutil.Process) -> None:
        try:
            below = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in below:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    key = process.pid, process.create_time()
                    words = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if words:  # a process that ended keeps its last line
                self.seen[key] = words, times.user + times.system

    def groups(self) -> dict[str, Group]:
        """Processes by kind: a stage, or a part of the bookkeeping."""
        found: dict[str, Group] = defaultdict(Group)
        for words, seconds in self.seen.values():
            name, module = kind_of(words)
            group = found[name]
            group.seconds += seconds
            group.processes += 1
            group.module = group.module or module
        return found


def kind_of(words: str) -> tuple[str, str | None]:
    """The kind of a process by its command line, and the module that it runs."""
    match = _MODULE.search(words)
    module = match.group(1) if match else None
    for part, name in BOOKKEEPING.items():
        if module == part or (module is None and part in words) or (module or "").startswith(f"{part}."):
            return name, module
    return (f"`{module.rpartition('.')[2]}`", module) if module is not None else ("others", None)


def start_seconds(module: str) -> float:
    """CPU seconds of the import of a module in a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def run_demo(clone: Path) -> tuple[float, Watched]:
    """Run the flow of the demo in ``clone``; returns its wall seconds and its processes.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(clone / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    watched, log, started = Watched(), clone / "demo.log", time.monotonic()
    with log.open("w") as stream:
        command = [sys.executable, "-m", "flows.quantize"]
        process = subprocess.Popen(command, cwd=clone, env=environment, stdout=stream, stderr=stream)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            watched.look(root)
            time.sleep(_LOOKS_EVERY)
    if process.returncode:
        raise RuntimeError(f"the demo ended with status {process.returncode}: {log.read_text()[-1500:]}")
    return time.monotonic() - started, watched


def lines_of(seconds: float, groups: Mapping[str, Group], starts: Mapping[str, float]) -> list[str]:
    """The section: what was measured, and a table of groups, the largest first."""
    total = sum(group.seconds for group in groups.values())
    kept = {name: group for name, group in groups.items() if name in BOOKKEEPING.values()}
    rows = [
        {
            "processes": f"{'bookkeeping: ' if name in kept else ''}{name}, {group.processes}",
            "CPU seconds": f"{group.seconds:.0f}",
            "of them start (imports)": f"{starts[name]:.0f}" if name in starts else "",
        }
        for name, group in _largest_first(groups.items())
        if group.seconds >= 1
    ]
    share = sum(group.seconds for group in kept.values()) / total
    return [
        f"The flow of `make demo` in a fresh clone, after installation, on {os.cpu_count()} cores without a GPU: "
        f"{seconds:.0f} seconds, {total:.0f} CPU seconds, of which {share:.0%} are bookkeeping. One run. A process was "
        f"looked at every {_LOOKS_EVERY} seconds; starts were measured alone and multiplied by the number of "
        "processes. `python -m bench.demo_time` wrote this section.",
        "",
        *table(rows),
    ]


def _largest_first(groups: Iterable[tuple[str, Group]]) -> list[tuple[str, Group]]:
    return sorted(groups, key=lambda pair: -pair[1].seconds)


def main() -> int:
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(root), str(clone)], check=True)
        seconds, watched = run_demo(clone)
    groups = watched.groups()
    starts = {
        name: start_seconds(group.module) * group.processes
        for name, group in groups.items()
        if group.module is not None and group.module.startswith(("tasks.", "flows."))
    }
    lines = lines_of(seconds, groups, starts)
    logger.info("%s", "\n".join(lines))
    write_section(root / "docs/scale.md", "The time of the demo", lines, "Scale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
