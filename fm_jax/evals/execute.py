"""Runs generated programs where they can do no harm: what became of each. Layer 4.

A program runs in a process of its own that has given up everything but computing and reading Python's own files:
Landlock lets it read these alone; a seccomp filter admits the few system calls below, none of which makes a process,
a connection, a file or a signal to others; limits bound its time and memory. Both are Linux's, need no rights, and hold
in a container. Where the machine lacks one, nothing is run.

This file is also what that process runs, apart from the package: it imports nothing of it on top.

Try:  python -c "from fm_jax.evals import execute; print(execute.run(['assert 1 + 1 == 2', 'open(\"x\", \"w\")']))"
"""

import concurrent.futures
import contextlib
import ctypes
import os
import platform
import subprocess
import sys

PASSED = "passed"
TIME_S = 3                  # of the processor, as HumanEval's harness allows by the clock
MEMORY_BYTES = 2 << 30      # of address space
UNCONFINED = "cannot be confined"

# A program that only passes where each of these is refused.
PROBE = """
import os, socket
for attempt in (lambda: socket.socket(), lambda: open("/tmp/probe", "w"), lambda: os.listdir("/"), lambda: os.fork(),
                lambda: os.kill(os.getppid(), 0), lambda: open(f"/proc/{os.getppid()}/environ").read()):
    try:
        attempt()
    except OSError:
        continue
    raise AssertionError("it can do what it must not")
"""


def check() -> None:
    """Returns nothing. Raises UserError where this machine cannot confine a program."""
    outcome, = run([PROBE])
    if outcome != PASSED:
        raise _refusal(outcome)


def run(programs: list[str], *, time_s: int = TIME_S, memory_bytes: int = MEMORY_BYTES) -> list[str]:
    """Returns for each Python program "passed", where it ran to its end, or what ended it, as in "timed out".

    time_s: of the processor, in whole seconds; by the clock twice as much and two seconds.

    Raises:
      UserError: this machine cannot confine a program; none was run.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda program: _outcome(program, time_s, memory_bytes), programs))
    for outcome in outcomes:
        if outcome.startswith(UNCONFINED):
            raise _refusal(outcome)
    return outcomes


def _refusal(why):
    from fm_jax.errors import UserError

    return UserError(f"a generated program {why} on this machine, and so is not run: it takes Linux 5.13 or later on "
                     "x86_64 or aarch64, with Landlock and seccomp")


def _outcome(program, time_s, memory_bytes):
    start = f"import runpy; runpy.run_path({__file__!r}, {{'LIMITS': ({time_s}, {memory_bytes})}}, 'confined')"
    # Nothing of ours but where the loader finds Python itself.
    environment = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"} | {"OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-I", "-B", "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, env=environment, cwd="/") as process:
        try:
            with contextlib.suppress(BrokenPipeError):   # it ended before it had read all: what it says counts
                process.stdin.write(program.encode(errors="replace"))
                process.stdin.close()
            process.wait(2 * time_s + 2)
        except subprocess.TimeoutExpired:
            process.kill()
            return "timed out"
        said = process.stdout.read(300).decode(errors="replace")   # a program that writes more waits, and times out
    if process.returncode in (-24, -9):   # SIGXCPU, and SIGKILL where it was ignored
        return "timed out"
    return said or f"ended with code {process.returncode}"


# --- Inside ----------------------------------------------------------------------------------------------------------

# {name: (number on x86_64, on aarch64)} of what Python needs to compute and to import. Not among them: what makes
# processes and threads, sockets, files and links, changes or removes them, signals others, or could widen any of this.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None), "lstat": (6, None),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getcwd": (79, 17), "getdents64": (217, 61), "lseek": (8, 62), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "setitimer": (38, 103),
    "getitimer": (36, 102), "alarm": (37, None), "restart_syscall": (219, 128), "getrandom": (318, 278),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "arch_prctl": (158, None), "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179), "uname": (63, 160), "umask": (95, 166),
    "exit": (60, 93), "exit_group": (231, 94),
}
# {name: (numbers, argument, the values it may have)}: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, which
# cannot have signals sent; is it a terminal, close on exec or not; limits may be read (no new ones: a null pointer).
ALLOWED_WITH = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 1030)),
    "ioctl": ((16, 29), 1, (0x5401, 0x5450, 0x5451)),
    "prlimit64": ((302, 261), 2, (0,)),
}
# {name: (numbers, argument)} of what opens files: not to write, create or cut them.
OPENING = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000   # the last: O_TMPFILE
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}   # column above, AUDIT_ARCH of linux/audit.h
READ, HANDLED = 0b1100, (1 << 13) - 1   # of Landlock: read files and folders, of all that its first version knows


def _confined(time_s, memory_bytes):
    """Runs the program that standard input gives, and says on standard output what became of it."""
    program = sys.stdin.buffer.read().decode()
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    say = lambda text: (os.write(report, text.encode(errors="replace")[:300]), os._exit(0))
    try:
        _limit(time_s, memory_bytes)
        _landlock()
        _seccomp()
    except (OSError, AttributeError, KeyError, ImportError) as error:
        say(f"{UNCONFINED} ({type(error).__name__}: {error})")
    try:
        exec(compile(program, "program", "exec"), {})
    except BaseException as error:   # an exit is no end of the program
        say(f"{type(error).__name__}: {error}")
    say(PASSED)


def _limit(time_s, memory_bytes):
    import resource

    for what, value, most in (("CPU", time_s, time_s + 1), ("AS", memory_bytes, memory_bytes), ("FSIZE", 0, 0),
                              ("CORE", 0, 0), ("NOFILE", 64, 64)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (value, most))


def _call(function, *arguments):
    """Returns what a function of the C library gives. Raises OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if (value := getattr(libc, function)(*plain)) < 0:
        raise OSError(ctypes.get_errno(), f"{function}{arguments[:1]}: {os.strerror(ctypes.get_errno())}")
    return value


def _landlock():
    """Leaves the process only Python's own files, to read. Source: landlock(7)."""
    create, add, restrict = 444, 445, 446
    handled = ctypes.c_uint64(HANDLED)
    ruleset = _call("syscall", create, ctypes.byref(handled), 8, 0)
    places = {sys.base_prefix, sys.prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo",
              "/etc/ld.so.cache", "/dev/null", "/dev/urandom"}
    for place in sorted(filter(os.path.exists, places)):
        where = os.open(place, os.O_PATH)
        rights = READ if os.path.isdir(place) else READ & 0b0100
        rule = ctypes.create_string_buffer(rights.to_bytes(8, "little") + where.to_bytes(4, "little"), 12)
        _call("syscall", add, ruleset, 1, ctypes.byref(rule), 0)   # 1: what is beneath a path
        os.close(where)
    _call("prctl", 38, 1, 0, 0, 0)   # PR_SET_NO_NEW_PRIVS, which both need of who is not root
    _call("syscall", restrict, ruleset, 0)
    os.close(ruleset)


def _seccomp():
    """Leaves the process the system calls above; others give EPERM. Source: seccomp(2), linux/filter.h."""
    column, architecture = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06   # BPF_LD|W|ABS, BPF_JMP|..., BPF_RET
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000                # SECCOMP_RET_ALLOW, ERRNO of EPERM, KILL
    # (code, jump if true, jump if false, value). A call is {int number; u32 architecture; u64 ip; u64 arguments[6]}.
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0),
             (at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]          # the x32 calls of x86_64
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            steps += [(equal, 0, 1, numbers[column]), (answer, 0, 0, allow)]
    for numbers, argument in OPENING.values():
        if numbers[column] is not None:
            steps += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, WRITING),
                      (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    for numbers, argument, values in ALLOWED_WITH.values():
        checks = [(load, 0, 0, 20 + 8 * argument), (equal, 1, 0, 0), (answer, 0, 0, refuse),   # the upper half
                  (load, 0, 0, 16 + 8 * argument)]
        for value in values:
            checks += [(equal, 0, 1, value), (answer, 0, 0, allow)]
        steps += [(equal, 0, len(checks) + 1, numbers[column]), *checks, (answer, 0, 0, refuse)]
    steps += [(answer, 0, 0, refuse)]

    class Step(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("true", ctypes.c_uint8), ("false", ctypes.c_uint8),
                    ("value", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step))]

    filter_ = Program(len(steps), (Step * len(steps))(*(Step(*step) for step in steps)))
    _call("prctl", 22, 2, ctypes.byref(filter_), 0, 0)   # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "confined":
    _confined(*LIMITS)   # noqa: F821, given by _outcome
