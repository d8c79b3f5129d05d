"""Several processes as one run: how they find each other, what each prints, and how they end together. Layer 0.

    python -m fm_jax.train ... --coordinator_address 10.0.0.1:8476 --num_processes 4 --process_id 0      # and 1, 2, 3
    bash launch/local.sh --processes 4 --devices_per_process 2 -- python -m fm_jax.train ...

Where the flags say nothing, the environment does (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), and
where that says nothing, the scheduler: SLURM (srun), Open MPI (mpirun), a TPU pod, an indexed Kubernetes job for the
number of the process. Nothing of all that is a run of one process, which loads and starts nothing here.

However a process ends, the others end too, and say which it was:

    it raised an error, or was killed          at once: process 0 holds a connection to each, which then closes
    its machine is gone                        within 30 s, by the connection's keep-alive
    it is stopped, and its machine is not      within HEARTBEAT_TIMEOUT_S, by jax's coordination service
    it hangs                                   after config.health.hang_timeout_s, by its own `Watchdog`
    before all have met                        after START_TIMEOUT_S

On the last checkpoint the same command goes on. Exit codes: 0 done, 2 a mistake to mend, AGAIN the run was stopped and
saved or another process was lost, HUNG.
"""

import contextlib
import io
import os
from pathlib import Path
import re
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from typing import NamedTuple
import zlib

from absl import flags

from fm_jax.errors import UserError

HEARTBEAT_TIMEOUT_S = 60    # jax's default is 100; a host whose network pauses for a minute costs a restart
START_TIMEOUT_S = 300       # how long the processes wait for each other at the start
# The exit code where the same command again continues the run, EX_TEMPFAIL of sysexits.h: a scheduler that saw 0 would
# take a preempted run for a finished one. By it launch/ knows to start again.
AGAIN = 75
HUNG = 70                   # exit code, EX_SOFTWARE


# --- Which process this is


class Place(NamedTuple):
    """Where a process stands among those of its run. Without an address: a TPU pod, which jax asks itself."""

    coordinator_address: str | None = None        # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None   # of this host's devices, those that are this process's; None: all


def define_flags(fv: flags.FlagValues) -> None:
    """Returns nothing; adds the flags of a command that may run as several processes."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where a run has several processes and no "
                        "scheduler says so; or JAX_COORDINATOR_ADDRESS", flag_values=fv)
    flags.DEFINE_integer("num_processes", None, "of the run; or JAX_NUM_PROCESSES", flag_values=fv)
    flags.DEFINE_integer("process_id", None, "of this process, from 0; or JAX_PROCESS_ID", flag_values=fv)


def find(given: dict, environ) -> Place | None:
    """Returns this process's place, None in a run of one process.

    given: {coordinator_address, num_processes, process_id}, None where the command line does not say.

    Raises:
      UserError: values that are incomplete or contradict each other.
    """
    values, names = {}, {}
    for key, value in given.items():
        names[key] = f"--{key}={value}"
        if value is None and (text := environ.get(f"JAX_{key.upper()}", "")):
            names[key] = f"JAX_{key.upper()}={text}"
            value = text if key == "coordinator_address" else _whole(names[key], text)
        if value is not None:
            values[key] = value
    found, scheduler = {}, ""
    if len(values) < 3:
        found, scheduler = _slurm(environ) or _open_mpi(environ) or _indexed_job(environ, values) or ({}, "")
    place = Place(**found | values)
    if not values and not scheduler:
        return Place() if _tpu_pod(environ) else None
    missing = [key for key in given if getattr(place, key) is None]
    if missing and not (_tpu_pod(environ) and not scheduler):
        said = ", ".join(names[key] for key in values) or scheduler
        raise UserError(f"{said}: a run of several processes also needs " + " and ".join(
            f"--{key} (or JAX_{key.upper()})" for key in missing))
    address, count, number, _ = place
    if address is not None and not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"{names['coordinator_address']}: expected HOST:PORT of process 0, such as 10.0.0.1:8476")
    if count is not None and count < 1:
        raise UserError(f"{names['num_processes']}: must be at least 1")
    if None not in (count, number) and not 0 <= number < count:
        source = names["process_id"] if "process_id" in values else scheduler
        raise UserError(f"process {number} of {count} ({source}): processes count from 0 to {count - 1}")
    return None if count == 1 else place


def _whole(name, text):
    if not text.isdecimal():
        raise UserError(f"{name}: expected a whole number")
    return int(text)


def _slurm(environ):
    """Returns ({field of Place: value}, name) of a task of an srun of several tasks.

    Not jax's own detection: that takes the number of tasks from the job, and so waits for ever in a shell of it; and
    gives each task one device, also where there is one task for all devices of a node.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks == 1 or "SLURM_PROCID" not in environ:
        return None
    job, nodes = int(environ["SLURM_JOB_ID"]), environ["SLURM_STEP_NODELIST"]
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0]         # node[003-015,020],other
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)               # node003
    # "4(x2),3": tasks of each node, in the order of the nodes.
    per_node = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?",
                environ.get("SLURM_STEP_TASKS_PER_NODE", "1")) for _ in range(int(times or 1))]
    here = per_node[min(int(environ.get("SLURM_NODEID", 0)), len(per_node) - 1)]
    return {"coordinator_address": f"{host}:{61440 + job % 4096}", "num_processes": tasks,
            "process_id": int(environ["SLURM_PROCID"]),
            "local_device_ids": _own_device(environ, here, environ.get("SLURM_LOCALID", 0))}, "SLURM"


def _open_mpi(environ):
    """Returns as `_slurm`. From version 5 on, Open MPI does not say where it was started: then there is no address."""
    count = int(environ.get("OMPI_COMM_WORLD_SIZE") or 1)
    if count == 1:
        return None
    found = {"num_processes": count, "process_id": int(environ["OMPI_COMM_WORLD_RANK"]),
             "local_device_ids": _own_device(environ, int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)),
                                             environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))}
    # 1314521088.0;tcp://10.96.0.1,10.148.0.1:34911: of mpirun, on whose host rank 0 is by default
    uri = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+$)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if uri:
        found["coordinator_address"] = f"{uri[2]}:{61440 + (int(uri[1]) // 4096) % 4096}"
    return found, "Open MPI"


def _indexed_job(environ, values):
    """Returns as `_slurm`, the number of this pod alone: the manifest of the job says the rest."""
    if not {"coordinator_address", "num_processes"} <= set(values) or "JOB_COMPLETION_INDEX" not in environ:
        return None
    return {"process_id": int(environ["JOB_COMPLETION_INDEX"])}, "JOB_COMPLETION_INDEX"


def _own_device(environ, tasks, local_id):
    """Returns the device of one of several tasks of a node; None where it has the node, or sees only its device."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return None if tasks == 1 or (visible and "," not in visible) else (int(local_id),)


def _tpu_pod(environ):
    """Returns whether jax finds the processes of a TPU pod: by GKE's variables, or by the metadata of the VM."""
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return False
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and "TPU_SKIP_MDS_QUERY" not in environ and any(
        Path(folder, "libtpu").is_dir() for folder in sys.path)


# --- From its start to its end


@contextlib.contextmanager
def processes(args):
    """Yields the `Peers` of this process, None in a run of one, while it is part of the run that `args` tell of.

    args: the flags of `define_flags`. In a run of several, only process 0 prints to stdout; what any process prints
    also goes to its log, see `log_to`; and an exception ends this process at once, without the exit handlers, which
    would wait for the others; these end as well.

    Raises:
      UserError: as `find`; the other processes cannot be reached.
    """
    given = {key: getattr(args, key) for key in ("coordinator_address", "num_processes", "process_id")}
    place = find(given, os.environ)
    if place is None:
        yield None
        return
    peers = _start(place)
    try:
        yield peers
    except SystemExit as end:
        if end.code != AGAIN:   # all of them were stopped at the same step, and end in their own time
            peers.fail(end)
        peers.bye()
        raise
    except BaseException as error:
        peers.fail(error)
    peers.bye()


def _start(place):
    import jax

    # Not public: the address that a TPU pod's metadata gave, and the store of keys that all processes see.
    from jax._src import distributed as jax_distributed

    whole = place.coordinator_address is not None and place.process_id is not None
    try:
        jax.distributed.initialize(
            *place[:3], local_device_ids=place.local_device_ids and list(place.local_device_ids),
            cluster_detection_method="deactivate" if whole else None,   # it would fill in the devices
            initialization_timeout=START_TIMEOUT_S, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        where = f"process {place.process_id} of {place.num_processes}" if whole else "this process of the TPU pod"
        raise UserError(f"{where} cannot join the run at {place.coordinator_address}: {error}; see that all processes "
                        f"run, with one address, and each with its own number") from error
    number, count = jax.process_index(), jax.process_count()
    log = _Log(number)
    sys.stdout = Output(sys.stdout if number == 0 else None, log)
    sys.stderr = Output(sys.stderr, log, mark=f"[process {number}] " if number else "")
    host = jax_distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
    return Peers(number, count, jax_distributed.global_state.client, host)


class Peers:
    """Ends this process when another one of its run has ended; tells the others when this one does.

    Every process holds a TCP connection to process 0. The kernel closes it when a process ends, however it ends and
    whatever the others do then: a collective over an accelerator's own network does not fail, it waits.
    """

    def __init__(self, number: int, count: int, client, host: str):
        """client: of jax's coordination service. host: of process 0. Raises UserError where that cannot be reached."""
        self._number, self._count = number, count
        self._lock = threading.Lock()
        self._connections = {}     # number of the process: connection
        self._names = {}           # number of the process: host
        self._ended = threading.Event()
        if number == 0:
            dual = socket.has_dualstack_ipv6()
            server = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET,
                                          dualstack_ipv6=dual, backlog=max(128, count))
            token = secrets.token_hex(8)   # whoever else finds the port is none of us
            client.key_value_set("fm_jax/peers", f"{server.getsockname()[1]} {token} {socket.gethostname()}")
            target = lambda: self._serve(server, token)
        else:
            port, token, name = client.blocking_key_value_get("fm_jax/peers", START_TIMEOUT_S * 1000).split()
            try:
                connection = socket.create_connection((host, int(port)), timeout=30)
                connection.settimeout(None)
                connection.sendall(f"{token} {number} {socket.gethostname()}\n".encode())
            except OSError as error:
                raise UserError(f"process {number} cannot reach port {port} of process 0 on {host} ({error}): allow "
                                "all ports between the hosts of a run") from error
            _keep_alive(connection)
            self._connections[0], self._names[0] = connection, name
            target = lambda: self._listen(connection)
        threading.Thread(target=target, name="peers", daemon=True).start()

    def fail(self, error: BaseException | str, code: int = 1):
        """Never returns: prints the error, tells the others, and ends this process without its exit handlers."""
        text = str(error)
        if isinstance(error, UserError):
            text, code = "error: " + " ".join(text.split()), 2
        elif isinstance(error, KeyboardInterrupt):
            text, code = "interrupted", 130
        elif isinstance(error, SystemExit):
            text, code = "", error.code if isinstance(error.code, int) else int(error.code is not None)
        elif isinstance(error, BaseException):
            # Where a collective failed because a process is gone, the thread that watches them says so and ends this.
            time.sleep(1)
            text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        last = text.strip().splitlines()[-1][:500] if text.strip() else f"it exited with {code}"
        self._tell(f"failed {self._number} {code} {last}")
        self._exit(code)

    def bye(self) -> None:
        """Returns nothing; from now on this process may end, and others too."""
        self._ended.set()
        self._tell("bye")

    def _tell(self, line, but=None):
        """Sends a line to all that this process is connected to; those that are gone do not matter any more."""
        with self._lock:
            for number, connection in self._connections.items():
                if number != but:
                    with contextlib.suppress(OSError):
                        connection.sendall(line.encode() + b"\n")

    def _serve(self, server, token):
        """Process 0: takes connections, and watches them."""
        unread = {}
        numbers = {}
        with selectors.DefaultSelector() as waiting:
            waiting.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select():
                    connection = key.fileobj
                    if connection is server:
                        connection, _ = server.accept()
                        _keep_alive(connection)
                        waiting.register(connection, selectors.EVENT_READ)
                        unread[connection] = b""
                        continue
                    data = _received(connection)
                    *lines, unread[connection] = (unread[connection] + data).split(b"\n")
                    for line in lines:
                        words = line.decode(errors="replace").split(" ")
                        if connection in numbers:
                            self._heard(words)
                            if words == ["bye"]:
                                data = b""
                                with self._lock:
                                    del self._connections[numbers.pop(connection)]
                        elif len(words) == 3 and words[0] == token:
                            number = int(words[1])
                            numbers[connection], self._names[number] = number, words[2]
                            with self._lock:
                                self._connections[number] = connection
                    if not data:
                        waiting.unregister(connection)
                        if connection in numbers:
                            self._lost(numbers[connection])
                        connection.close()

    def _listen(self, connection):
        """Another process: hears from process 0."""
        unread = b""
        while data := _received(connection):
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                words = line.decode(errors="replace").split(" ")
                if words == ["bye"]:
                    return
                self._heard(words)
        self._lost(0)

    def _heard(self, words):
        if words[0] == "lost":
            self._names[int(words[1])] = words[2]
            self._lost(int(words[1]))
        elif words[0] == "failed":
            number, code, text = int(words[1]), int(words[2]), " ".join(words[3:])
            self._tell(" ".join(words), but=number)
            if code == HUNG:
                print(stacks(), file=sys.stderr)
            time.sleep(2)   # what all processes raise, each says itself
            print(f"process {number} of {self._count} ended ({text}), and so does this one", file=sys.stderr)
            self._exit(code)

    def _lost(self, number):
        if self._ended.is_set():
            return
        name = self._names.get(number, "?")
        self._tell(f"lost {number} {name}", but=number)
        print(f"process {number} of {self._count} (host {name}) is lost: it was killed, or its machine is gone; this "
              "process ends too, and the same command continues from the last checkpoint", file=sys.stderr)
        self._exit(AGAIN)

    def _exit(self, code):
        for out in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                out.flush()
        if self._number == 0:
            time.sleep(0.2)   # what was told is on its way
        os._exit(code)


def _received(connection):
    try:
        return connection.recv(65536)
    except OSError:   # reset: as closed
        return b""


def _keep_alive(connection):
    """Lets the kernel close a connection to a machine that has not answered for 30 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):   # macOS has other names; its default is two hours
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- What each process prints


class _Log:
    """The file RUN/logs/process_NUMBER.log: whole lines with their times; they wait in memory until it is known."""

    def __init__(self, number):
        self._number, self._lock, self._file, self._waiting = number, threading.Lock(), None, ""

    def open(self, folder):
        folder = Path(folder) / "logs"
        with self._lock:
            folder.mkdir(exist_ok=True)
            self._file = open(folder / f"process_{self._number}.log", "a", encoding="utf-8", buffering=1)
        self.write("")

    def write(self, text):
        with self._lock:
            self._waiting += text
            if self._file is None:
                return
            *lines, self._waiting = self._waiting.split("\n")
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            with contextlib.suppress(OSError):   # a full disk stops the run where it writes what matters
                for line in lines:   # of a line that was redrawn in place, how it was left
                    self._file.write(f"{now} " + line.rpartition("\r")[2].removeprefix("\x1b[K") + "\n")


class Output(io.TextIOBase):
    """A process's stdout or stderr: to the terminal, where it has that, and to its log."""

    def __init__(self, terminal, log: _Log, mark: str = ""):
        self._terminal, self._log, self._mark, self._begun = terminal, log, mark, False

    def open_log(self, folder):
        self._log.open(folder)

    def write(self, text):
        self._log.write(text)
        if self._terminal and text:
            if self._mark:
                text, self._begun = ("" if self._begun else self._mark) + text[:-1].replace(
                    "\n", f"\n{self._mark}") + text[-1], text[-1] != "\n"
            self._terminal.write(text)
        return len(text)

    def flush(self):
        if self._terminal:
            self._terminal.flush()

    def isatty(self):
        return self._terminal is not None and self._terminal.isatty()

    def fileno(self):
        return (self._terminal or sys.__stdout__).fileno()

    def writable(self):
        return True


def log_to(folder) -> None:
    """Returns nothing; from now on, and with what it has printed so far, each of several processes writes its log.

    folder: of the run. One process writes none.
    """
    if isinstance(sys.stdout, Output):
        sys.stdout.open_log(folder)


# --- A run that hangs


class Watchdog:
    """Ends a run that makes no progress: prints the stack of every thread, and exits with HUNG.

    with Watchdog(timeout_s) as watchdog:
        watchdog.beat("step 3")     # what begins now, and must not take longer
    """

    def __init__(self, timeout_s: float, peers: Peers | None = None):
        """timeout_s: 0 for none. peers: the others of the run, who then print their stacks and end too."""
        self._timeout_s, self._peers = timeout_s, peers
        self._doing, self._since = "", None
        self._over = threading.Event()

    def beat(self, doing: str | None) -> None:
        """Returns nothing. doing: for messages; None: nothing that has a limit."""
        self._doing, self._since = doing, None if doing is None else time.monotonic()

    def __enter__(self):
        if self._timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._over.set()

    def _watch(self):
        while not self._over.wait(self._timeout_s / 10):
            doing, since = self._doing, self._since
            if since is not None and time.monotonic() - since > self._timeout_s:
                self._end(f"{doing} has made no progress for {self._timeout_s:g} s "
                          "(config.health.hang_timeout_s): every thread's stack is above; the same command continues "
                          "from the last checkpoint")

    def _end(self, text):
        print(stacks(), file=sys.stderr)
        if self._peers:
            self._peers.fail(text, HUNG)
        print(text, file=sys.stderr, flush=True)
        os._exit(HUNG)


def stacks() -> str:
    """Returns the stack of every thread of this process but the one that asks, as text; the main thread last."""
    frames, here, main = sys._current_frames(), threading.get_ident(), threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted((ident for ident in frames if ident != here), key=lambda ident: ident == main)
    return "\n".join(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frames[ident]))
                     for ident in order)


# --- What all processes have


def wait_for_all(name: str) -> None:
    """Returns when all processes are here, an hour at most. Each name once.

    Before a program runs for the first time: of processes with CPU devices, joined by gloo, one that is 30 s behind
    ends the run, and compiling takes as long, while only process 0 may find the program in the cache (jax 0.10).
    """
    from jax._src import distributed as jax_distributed   # not public; a barrier of devices is what must wait

    jax_distributed.global_state.client.wait_at_barrier(f"fm_jax/{name}", 3_600_000)


def agree(value, path) -> None:
    """Returns nothing where all processes read the same `value` at `path`: what they do next follows from it.

    Raises:
      UserError: they did not.
    """
    import jax

    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    seen = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(value).encode())))
    if len(set(seen.ravel().tolist())) > 1:
        raise UserError(f"{path}: the processes of this run do not see the same there; process {jax.process_index()}, "
                        f"on {socket.gethostname()}, sees {repr(value)[:200]}: name a folder that all hosts share, or "
                        "wait until a network file system shows it to all of them")


def fetch(arrays):
    """Returns a tree of arrays as NumPy, whole on every process: all of a run must ask together, in one order."""
    import jax
    import numpy as np

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, arrays)
