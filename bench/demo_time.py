"""Where the time of `make demo` goes: CPU seconds of its processes, of them the start, and the share of bookkeeping.

    python -m bench.demo_time

The demo is installed and run in a fresh clone of this repository's last commit, in a temporary folder. The flow's
processes are sampled a few times a second; what a process used after its last sample is not counted. A start is the
import of the stage's module, measured alone and multiplied by the number of processes. Writes a section of
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
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.sections import table, write_section

logger = logging.getLogger("bench.demo_time")

_SAMPLED_EVERY = 0.2
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
        modules: number of processes by the module that they run, where it is known.
    """

    seconds: float = 0.0
    processes: int = 0
    modules: Counter[str] = field(default_factory=Counter)


@dataclass
class Watched:
    """CPU seconds of a process and of all its descendants, by their last sample.

    Attributes:
        seen: command line and CPU seconds by process id and time of its start.
    """

    seen: dict[tuple[int, float], tuple[str, float]] = field(default_factory=dict)

    def sample(self, root: psutil.Process) -> None:
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
            group.modules.update([module] if module is not None else [])
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


def install(clone: Path) -> float:
    """Install the demo in ``clone`` as `make demo` does; returns the wall seconds."""
    started = time.monotonic()
    subprocess.run(["make", "setup"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def run_demo(clone: Path) -> tuple[float, Watched]:
    """Run the flow of the installed demo in ``clone``; returns its wall seconds and its processes.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "PATH": f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(clone / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    watched, log, started = Watched(), clone / "demo.log", time.monotonic()
    with log.open("w") as stream:
        command = [str(clone / ".venv/bin/python"), "-m", "flows.quantize"]
        process = subprocess.Popen(command, cwd=clone, env=environment, stdout=stream, stderr=stream)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            watched.sample(root)
            time.sleep(_SAMPLED_EVERY)
    if process.returncode:
        raise RuntimeError(f"the demo ended with status {process.returncode}: {log.read_text()[-1500:]}")
    return time.monotonic() - started, watched


def lines_of(
    installation: float, seconds: float, groups: Mapping[str, Group], starts: Mapping[str, float]
) -> list[str]:
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
        f"`make demo` in a fresh clone, on {os.cpu_count()} cores without a GPU: the installation took "
        f"{installation:.0f} seconds with a warm cache of pip, the flow {seconds:.0f} seconds and {total:.0f} CPU "
        f"seconds, of which {share:.0%} are bookkeeping. One run. Processes were sampled every {_SAMPLED_EVERY} "
        "seconds; starts were measured alone and multiplied by the number of processes. `python -m bench.demo_time` "
        "wrote this section.",
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
        installation = install(clone)
        seconds, watched = run_demo(clone)
    groups = watched.groups()
    modules = {module for group in groups.values() for module in group.modules}
    of_module = {module: start_seconds(module) for module in sorted(modules) if module.startswith(("tasks.", "flows."))}
    starts = {
        name: sum(of_module.get(module, 0.0) * count for module, count in group.modules.items())
        for name, group in groups.items()
        if of_module.keys() & group.modules
    }
    lines = lines_of(installation, seconds, groups, starts)
    logger.info("%s", "\n".join(lines))
    write_section(root / "docs/scale.md", "The time of the demo", lines, "Scale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
