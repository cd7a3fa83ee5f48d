"""Makes a cluster of three hosts by the repository's own `ray up` and `clusters/local.yaml`."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.hosts import ROOT, Lab

RAY = str(Path(sys.executable).with_name("ray"))
WORKERS = ("worker1", "worker2")


def search_command(*, n_trials: int, max_steps: int) -> str:
    """Return the README's search for `ray exec`, on a tiny model and with a lane for each host."""
    return (
        "cd raylora && python -m raylora.testing examples/tiny && python -m raylora.search search_spaces/smoke.yaml "
        f"--address auto --device cpu --search.lanes 3 --search.n_trials {n_trials} --training.max_steps {max_steps} "
        "--output /mnt/shared/results/mine"
    )


@dataclass
class Cluster:
    """Three hosts that `ray up` has made a cluster of."""

    lab: Lab
    file: Path
    """The cluster file that it was made by."""

    def ray(self, *arguments: str, timeout: float = 300) -> str:
        """Run a command of Ray's on the laptop, and return what it prints."""
        return self.lab.run([RAY, *arguments], cwd=ROOT, timeout=timeout).stdout


@contextmanager
def hosts_with_the_checkout(folder: Path) -> Iterator[Cluster]:
    """Make a head and two workers that have this checkout's packages; `ray up -y` on the file makes them a cluster.

    Args:
        folder: receives all private files, and goes with them at the end.
    """
    lab = Lab(folder, (ROOT, Path(sys.base_prefix)), {"RAY_TMPDIR": str(folder / "laptop" / "tmp"), "TERM": "dumb"})
    try:
        for name, address in (("head", 10), *zip(WORKERS, (11, 12), strict=True)):
            host = lab.add(name, address)
            # the packages of this checkout: hosts have no way to a package index
            (host.home / "raylora").mkdir()
            (host.home / "raylora" / ".venv").symlink_to(ROOT / ".venv")
        settings = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
        settings["provider"] |= {"head_ip": lab.hosts["head"].ip}
        settings["provider"] |= {"worker_ips": [lab.hosts[name].ip for name in WORKERS]}
        settings["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):  # a lane for each host
            settings[key] = [command.replace("ray start", "ray start --num-cpus=1") for command in settings[key]]
        file = folder / "local.yaml"
        file.write_text(yaml.safe_dump(settings))
        lab.run([RAY, "get-auth-token", "--generate"])
        yield Cluster(lab, file)
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)
