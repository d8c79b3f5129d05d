"""Generated programs can compute, and nothing else: each thing they must not do is tried for real."""

import os
import socket
import sys
import threading

import pytest

from fm_jax.errors import UserError
from fm_jax.evals import execute

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux alone")


def outcome(program, **limits):
    return execute.run([program], **limits)[0]


def each_says(text, programs):
    """Asserts that every program ends with an error that has this text."""
    for program, said in zip(programs, execute.run(programs), strict=True):
        assert text in said, (program, said)


def test_programs_that_run_to_their_end_pass_and_others_say_why():
    programs = ["def f(x):\n    return x + 1\n\nassert f(1) == 2", "assert 1 + 1 == 3, 'no'", "1 / 0", "x = (",
                "exit(0)", "import os; os._exit(0)",
                "import sys; sys.setrecursionlimit(10**6)\ndef f(): f()\nf()", "input()",
                "import numpy, hashlib, decimal, random, re; assert numpy.arange(3).sum() == 3",
                "print('passed')\n1 / 0"]
    wanted = ["passed", "AssertionError: no", "ZeroDivisionError", "SyntaxError", "SystemExit", "ended with code 0",
              None, "EOFError", "passed", "ZeroDivisionError"]
    outcomes = execute.run(programs)
    assert len(outcomes) == len(wanted) and outcomes[6] != "passed"
    assert all(want is None or said.startswith(want) for said, want in zip(outcomes, wanted)), outcomes


def test_time_and_memory_are_limited():
    hangs = ["while True: pass", "import time; time.sleep(100)", "import signal\nsignal.signal(signal.SIGXCPU, "
             "signal.SIG_IGN)\nwhile True: pass", "import os\nwhile True: os.write(3, b'x' * 99)"]
    assert set(execute.run(hangs, time_s=1)) <= {"timed out", "OSError: [Errno 9] Bad file descriptor"}
    assert outcome("x = bytearray(10 << 30)").startswith("MemoryError")
    assert outcome("x = bytearray(300 << 20)") == "passed"
    assert outcome("x = bytearray(300 << 20)", memory_bytes=256 << 20).startswith("MemoryError")


def test_no_process_is_made():
    each_says("Operation not permitted", [
        "import os\nwhile True: os.fork()", "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])", "import os; os.posix_spawn('/bin/true', ['true'], {})"])


def test_no_connection_is_made():
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        listener = threading.Thread(target=lambda: reached.append(server.accept()), daemon=True)
        listener.start()
        each_says("Operation not permitted", [
            f"import socket; socket.create_connection(('127.0.0.1', {port})).send(b'x')",
            *(f"import socket; socket.socket(socket.{kind})" for kind in ("AF_INET6", "AF_UNIX", "AF_NETLINK"))])
        socket.create_connection(("127.0.0.1", port)).close()   # the listener did listen
        listener.join(10)
    assert len(reached) == 1


def test_no_file_is_written_changed_or_removed(tmp_path):
    mine, new = tmp_path / "mine", tmp_path / "new"
    mine.write_text("here")
    link = f"os.link({str(mine)!r}, {str(new)!r})"
    each_says("Errno", [f"import os\n{statement}" for statement in (
                      f"open({str(new)!r}, 'w').write('x')", f"open({str(mine)!r}, 'a').write('x')",
                      f"open({str(mine)!r}, 'r+').write('x')", f"os.truncate({str(mine)!r}, 0)", link,
                      f"os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_RDWR)", "open('/tmp/fm_jax_probe', 'w')",
                      "open('/dev/shm/fm_jax_probe', 'w')", f"os.mkdir({str(new)!r})", f"os.unlink({str(mine)!r})",
                      f"os.rename({str(mine)!r}, {str(new)!r})", f"os.symlink('x', {str(new)!r})",
                      f"os.chmod({str(mine)!r}, 0)", f"os.utime({str(mine)!r}, (0, 0))", f"os.mkfifo({str(new)!r})",
                      f"os.setxattr({str(mine)!r}, 'user.x', b'x')", f"os.rmdir({str(tmp_path)!r})",
                      "os.memfd_create('x')")])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and mine.read_text() == "here"
    assert mine.stat().st_mtime > 0 and mine.stat().st_mode & 0o400


def test_nothing_of_the_user_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / "mine").write_text("here")
    assert outcome("import os\nassert 'SECRET' not in os.environ") == "passed"
    places = tmp_path / "mine", f"/proc/{os.getpid()}/environ", "/proc/self/environ", "/etc/passwd", __file__
    each_says("Permission denied", [f"open({str(place)!r}).read()" for place in places]
              + [f"import os; os.listdir({str(tmp_path)!r})"])


def test_nobody_is_signalled_and_nothing_is_widened():
    """The test's own process would end; a pipe could be told to signal it; limits and filters could be lifted."""
    call = "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.{} == -1"
    each_says("rror", ["import os; os.kill(os.getppid(), 9)", "import os; os.killpg(0, 9)",
                       "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))",
                       "import resource as r; r.setrlimit(r.RLIMIT_CPU, (100, 100))"])
    functions = ("fcntl(0, 8, os.getppid())", "fcntl(0, 10, 9)", "ioctl(0, 0x8901, 0)", "prctl(22, 0, 0, 0, 0)",
                 "ptrace(16, os.getppid(), 0, 0)", "unshare(0x10000000)", "syscall(425, 8, 0)",
                 "syscall(0x40000029, 2, 1, 0)")
    assert set(execute.run([call.format(function) for function in functions])) == {"passed"}


@pytest.mark.parametrize("part", ["_landlock", "_seccomp"])
def test_without_isolation_nothing_runs(part, tmp_path, monkeypatch):
    """A machine that lacks a part, and one whose part does nothing."""
    execute.check()
    source = open(execute.__file__).read()
    before = f"def {part}():\n"
    for instead in ("    raise OSError('none here')", "    return"):
        broken = tmp_path / "execute.py"
        broken.write_text(source.replace(before, before + instead + "\n"))
        monkeypatch.setattr(execute, "__file__", str(broken))
        with pytest.raises(UserError, match="on this machine, and so is not run: it takes Linux 5.13"):
            execute.check()
    broken.write_text(source.replace(before, before + "    raise OSError('none here')\n"))
    with pytest.raises(UserError, match="cannot be confined .OSError: none here."):
        execute.run([f"open({str(tmp_path / 'ran')!r}, 'w')"])
    assert not (tmp_path / "ran").exists()
