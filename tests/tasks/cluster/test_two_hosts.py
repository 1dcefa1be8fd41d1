"""The pool over two hosts: network namespaces with a link each, of which one is cut and one host is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support.ranked_job import assert_equal, finish
from support.site import Site, layers_done, running_site, wait_until

pytestmark = pytest.mark.soak

NETWORK = "10.77.33"
BRIDGE = "tlq-switch"
HOSTS = {"tlq-a": f"{NETWORK}.2", "tlq-b": f"{NETWORK}.3"}
HERE = f"{NETWORK}.1"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two network namespaces, each with a link to a switch on which this one has an address too."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip` (apt-get install iproute2)")
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system makes no bridge: {error.stderr.strip()}")
    try:
        ip("address", "add", f"{HERE}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in HOSTS.items():
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", BRIDGE, "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)


@pytest.fixture(scope="module")
def site(hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), HERE) as site:
        yield site


@pytest.fixture(scope="module")
def expected(site: Site) -> dict[str, torch.Tensor]:
    """Result of the job in one process."""
    return finish(site.start("alone", TLQ_POOL=""), site.job / "alone")


def start_host(site: Site, name: str) -> None:
    """A worker in the namespace of a host."""
    worker = site.start_worker(("ip", "netns", "exec", name), TLQ_HOST=HOSTS[name], TEST_SECONDS_PER_LAYER="15")
    site.workers.append(worker)


def processes_on(name: str) -> list[psutil.Process]:
    return [psutil.Process(int(pid)) for pid in ip("netns", "pids", name).split()]


def ranks_on(name: str, folder: Path) -> int:
    """Number of ranks of a job that run on a host."""
    lines = [process.cmdline() for process in processes_on(name)]
    return sum("ranks_worker" in line and str(folder) in line and "tasks.cluster.agent" not in line for line in lines)


def test_a_cut_link_and_a_dead_host_change_no_bit(site: Site, expected: dict[str, torch.Tensor]) -> None:
    for name in HOSTS:
        start_host(site, name)
    folder = site.job / "hosts"
    log = site.job / "hosts.log"
    process = site.start("hosts", TLQ_HOST=HERE)

    wait_until(lambda: layers_done(folder) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0][-3000:]
    assert [ranks_on(name, folder) for name in HOSTS] == [1, 1]
    ip("link", "set", "tlq-a", "down")
    time.sleep(20)
    ip("link", "set", "tlq-a", "up")

    done = layers_done(folder)
    wait_until(lambda: layers_done(folder) > done or process.poll() is not None)
    for victim in processes_on("tlq-b"):
        victim.send_signal(signal.SIGKILL)
    assert process.poll() is None, process.communicate()[0][-3000:]
    output, _ = process.communicate(timeout=900)
    log.write_text(output)
    assert process.returncode == 0, output[-3000:]
    assert "another rank does not answer" in output
    assert "Traceback" not in output
    found = finish(site.start("hosts", TLQ_POOL=""), folder)  # everything is there already
    assert_equal(found, expected)
    site.assert_nothing_left("hosts")
