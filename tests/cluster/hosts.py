"""Makes hosts out of one machine: namespaces with a network, processes, files and an SSH server of their own.

    laptop 10.77.0.1 ── bridge ─┬─ head     10.77.0.10
                                ├─ worker1  10.77.0.11
                                └─ worker2  10.77.0.12

A host sees this machine's files, but for a home, a `/tmp`, a `/run`, a `/dev/shm` of its own, and `/mnt/shared`, which
all hosts share. The machine's own network is not touched: the bridge lies in the laptop's namespace.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from raylora.testing import make_rows, make_tiny_model

ROOT = Path(__file__).parent.parent.parent
"""The checkout."""

PRIVATE = ("tmp", "root", "run", "dev/shm", "mnt")
"""Folders that each host has for itself."""

NETWORK = "10.77.0."


@cache
def missing() -> str | None:
    """Return what keeps this machine from having hosts; None if nothing does."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [name for name in ("ip", "unshare", "setpriv", "sshd", "ssh", "rsync") if not shutil.which(name)]
    if absent:
        return f"needs {', '.join(absent)}"
    links = "ip link add br0 type bridge && ip link add left type veth peer name right && mount --make-rprivate /"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "bash", "-c", links],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return None if tried.returncode == 0 else f"may not make namespaces: {tried.stderr.strip()}"


class Host:
    """A machine of its own, as far as Ray can tell.

    Args:
        name: its host name.
        address: last number of its IPv4 address.
        folder: holds its private files.
        lab: the network that it is on.
    """

    def __init__(self, name: str, address: int, folder: Path, lab: "Lab") -> None:
        self.name, self.ip, self.folder, self._lab = name, f"{NETWORK}{address}", folder, lab
        self.namespace = f"{lab.prefix}-{name}"
        self._init: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """Home folder as this machine sees it."""
        return self.folder / "root"

    def boot(self, command: str) -> None:
        """Start the host's first process; with it ends the host.

        Args:
            command: what it runs, by bash.
        """
        root = self.folder / "rootfs"
        mounts = [f"mount --rbind / {root}"]
        for name in PRIVATE:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {self.folder / name} {root / name}")
        for path in (self._lab.shared, *self._lab.visible):  # lie in folders that are private now
            inside = root / "mnt/shared" if path == self._lab.shared else root / path.relative_to("/")
            mounts += [f"mkdir -p {inside}", f"mount --bind {path} {inside}"]
        mounts.append(f"mount -t proc proc {root}/proc")
        root.mkdir(exist_ok=True)
        script = " && ".join([*mounts, f"hostname {self.name}", f"exec chroot {root} bash -c {_quoted(command)}"])
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "setpriv", "--pdeathsig", "KILL", "unshare", "--mount",
             "--pid", "--uts", "--fork", "--kill-child", "bash", "-c", f"mount --make-rprivate / && {script}"],
            stdout=(self.folder / "boot.log").open("wb"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def kill(self) -> None:
        """Take the host away: all its processes die at once, as by a power cut."""
        if self._init is not None:
            self._init.kill()  # `--kill-child` passes it on to the first process inside, and that ends all others
            self._init.wait(timeout=30)
            self._init = None

    def unplug(self) -> None:
        """Cut the host's network; its processes live on."""
        _run("ip", "-n", self._lab.laptop, "link", "set", self._lab.port(self), "down")

    def plug_in(self) -> None:
        """Connect the network again."""
        _run("ip", "-n", self._lab.laptop, "link", "set", self._lab.port(self), "up")


class Lab:
    """Hosts on a network of their own, with a laptop from which commands are given.

    Args:
        folder: receives all private files.
        visible: folders of this machine that hosts must see where they are, such as the checkout.
        environment: variables of the laptop's commands, beside its home and path.
    """

    def __init__(self, folder: Path, visible: tuple[Path, ...], environment: Mapping[str, str]) -> None:
        self.folder, self.visible, self._environment = folder, visible, dict(environment)
        self.prefix = f"raylora{os.getpid()}"
        self.laptop = f"{self.prefix}-laptop"
        self.shared = folder / "shared"
        self.home = folder / "laptop"
        self.hosts: dict[str, Host] = {}
        self.shared.mkdir(parents=True)
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        _run("ip", "netns", "add", self.laptop)
        _run("ip", "-n", self.laptop, "link", "set", "lo", "up")
        _run("ip", "-n", self.laptop, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self.laptop, "address", "add", f"{NETWORK}1/24", "dev", "br0")
        _run("ip", "-n", self.laptop, "link", "set", "br0", "up")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))

    @property
    def key(self) -> Path:
        """Private SSH key of the laptop's user."""
        return self.home / ".ssh" / "id_ed25519"

    def port(self, host: Host) -> str:
        """Return the name of a host's port at the bridge."""
        return f"to-{host.name}"

    def add(self, name: str, address: int) -> Host:
        """Return a new host that takes SSH connections."""
        host = Host(name, address, self.folder / name, self)
        host.folder.mkdir()
        _run("ip", "netns", "add", host.namespace)
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        _run("ip", "-n", self.laptop, "link", "add", self.port(host), "type", "veth", "peer", "eth0", "netns",
             host.namespace)  # fmt: skip
        _run("ip", "-n", self.laptop, "link", "set", self.port(host), "master", "br0", "up")
        _run("ip", "-n", host.namespace, "address", "add", f"{host.ip}/24", "dev", "eth0")
        _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
        _run("ip", "-n", host.namespace, "route", "add", "default", "via", f"{NETWORK}1")
        self._start(host)
        self.hosts[name] = host
        return host

    def add_with_project(self, name: str, address: int) -> Host:
        """Return a new host that has this checkout's packages, a token, and the files of a search in `~/project`."""
        host = self.add(name, address)
        (host.home / ".bashrc").write_text(f"export RAY_AUTH_MODE=token PATH={ROOT}/.venv/bin:$PATH\n")
        (host.home / ".ray").mkdir()
        (host.home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
        project = host.home / "project"
        for part in ("search_spaces", "examples"):
            shutil.copytree(ROOT / part, project / part)
        make_tiny_model(project / "examples" / "tiny" / "model")
        make_rows(project / "examples" / "tiny" / "rows.jsonl")
        return host

    def restart(self, host: Host) -> None:
        """Boot a host that was killed, with the files it had."""
        self._start(host)

    def _start(self, host: Host) -> None:
        ssh = host.home / ".ssh"
        ssh.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copy(self.key.with_suffix(".pub"), ssh / "authorized_keys")
        if not (ssh / "host_key").exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "host_key"))
        host.boot("mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -h /root/.ssh/host_key -o UsePAM=no -o PidFile=none")
        deadline = time.monotonic() + 30
        while self.run(["ssh", *self._options(), f"root@{host.ip}", "true"], check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host.name} takes no SSH: {(host.folder / 'boot.log').read_text()}")
            time.sleep(0.2)

    def _options(self) -> list[str]:
        return ["-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR"]  # fmt: skip

    def ssh(
        self, host: Host, command: str, *, check: bool = True, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host as its user would."""
        return self.run(self._shell(host, command), check=check, timeout=timeout)

    def start_on(self, name: str, command: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host as its user would, and do not wait for it."""
        return self.start(self._shell(self.hosts[name], command), output)

    def _shell(self, host: Host, command: str) -> list[str]:
        return ["ssh", *self._options(), f"root@{host.ip}", f"source ~/.bashrc; {command}"]

    def run(
        self, command: list[str], *, check: bool = True, timeout: float = 300, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.laptop, *command], capture_output=True, text=True, timeout=timeout, cwd=cwd,
            env=self.environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, command: list[str], output: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a command on the laptop, and do not wait for it."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.laptop, *command], stdout=output.open("wb"), stderr=subprocess.STDOUT, cwd=cwd,
            env=self.environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the laptop's commands."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "USER": "root", **self._environment}

    def close(self) -> None:
        """End all hosts and take their network away."""
        for host in self.hosts.values():
            host.kill()
            _run("ip", "netns", "delete", host.namespace)
        _run("ip", "netns", "delete", self.laptop)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"
