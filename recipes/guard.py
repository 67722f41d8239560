"""Run one program that is to be judged, shut in as far as a single Python process can be.

recipes/verify.py starts this file in an empty folder and writes a job to its stdin: the program,
its limits, and a seal. Behind the program's output this file writes the seal, which the program is
not told, and a verdict: ok, error, memory, refused or exit; nothing if the program does not return.

Stopped:
* the network: sockets, connections, look-ups of names (asyncio's pair of sockets reaches no other);
* other processes: fork, exec, shells, signals (in a namespace, any that is started ends as well);
* changes outside its folder: files opened for writing, removed, renamed, linked, created;
* native code by ctypes, changes of its limits, too much memory, time, open files, or output.

Not stopped, so run strangers' programs in a virtual machine:
* reading: the program sees every file that its user can read;
* an escape on purpose: by native code in an installed package, by its caller's frames (which hold
  the seal), or by replacing functions that this file calls.
"""

import _posixsubprocess
import contextlib
import ctypes
import json
import linecache
import os
import resource
import sys
import traceback
import types
from signal import SIGKILL

# <linux/sched.h>, <linux/prctl.h>
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
FILE_BYTES = 16 << 20
SIGNALLED = 128  # the exit status of a process that a signal ended is this + signal, as in shells


def enclose(memory_mib: int, timeout: float) -> None:
    """Move into namespaces of users, processes and networks, where allowed, and set limits.

    The process that goes on is the first of its namespace: when it ends, the kernel ends all others
    in there. Its parent only waits for it and passes its exit status on."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET) == 0:
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(status if status >= 0 else SIGNALLED - status)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
    limits = {
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_CPU: int(timeout) + 2,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def refuse_ways_out() -> type[Exception]:
    """Install the audit hook that refuses ways out, and return the exception that it raises.

    It uses local names, for a program can change os, or this file's globals through a frame."""

    class Refused(PermissionError):
        pass

    def refuse_fork(*args: object) -> None:
        raise Refused("a new process is refused")

    # events never allowed, by their beginnings, and events allowed within the folder
    banned = ("socket.", "subprocess.", "ctypes.", "pty.", "resource.", "os.fork", "os.exec")
    banned += ("os.spawn", "os.posix_spawn", "os.system", "os.kill", "signal.pthread_kill")
    changes = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
    changes += ("os.chmod", "os.chown", "os.truncate", "os.utime", "os.setxattr", "shutil.rmtree")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    path_like = os.PathLike
    isdir = os.path.isdir
    realpath = os.path.realpath
    decode = os.fsdecode
    inside = (realpath(os.getcwd()) + "/", "/dev/null/")

    def hook(event: str, args: tuple) -> None:
        pair = event == "socket.__new__" and args[1] == 1  # AF_UNIX; to bind or connect is refused
        if event.startswith(banned) and not pair and (event, args) != ("ctypes.dlopen", (None,)):
            raise Refused(f"{event} is refused")
        paths = args if event in changes else ()
        # a folder as well: files could be named relative to its descriptor
        if event == "open" and (args[2] & writes or args[1] is None and isdir(args[0])):
            paths = args[:1]
        for path in paths:
            named = isinstance(path, str | bytes | path_like)
            if named and not f"{realpath(decode(path))}/".startswith(inside):
                raise Refused(f"writing to {decode(path)} is refused")

    _posixsubprocess.fork_exec = refuse_fork  # raises no audit event of its own
    sys.addaudithook(hook)
    return Refused


def judge_by_unittest() -> None:
    """Let failing tests raise, and those that pass come back: unittest.main() then leaves no
    program before its last line, where other tests may be."""
    import unittest

    run = unittest.TextTestRunner.run
    run_tests = unittest.TestProgram.runTests

    def checked(self: unittest.TextTestRunner, test: unittest.TestSuite) -> unittest.TestResult:
        result = run(self, test)
        if not result.wasSuccessful():
            raise AssertionError("a test failed")
        return result

    def staying(self: unittest.TestProgram) -> None:
        self.exit = False
        run_tests(self)

    unittest.TextTestRunner.run = checked
    unittest.TestProgram.runTests = staying


def reason_for(error: BaseException, refused: type[Exception]) -> str:
    """Return the verdict on a program that an exception ended: refused, memory, or error."""
    cause = error
    for _ in range(20):  # a chain of causes may be a circle
        if isinstance(cause, refused):
            return "refused"
        cause = getattr(cause, "__cause__", None) or getattr(cause, "__context__", None)
    return "memory" if isinstance(error, MemoryError) else "error"


def main() -> None:
    """Run the job on stdin, write its verdict, and leave without the program's exit handlers."""
    job = json.load(sys.stdin)
    code = job["code"]
    out = os.dup(1)  # the program may close its own
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    enclose(job["memory_mib"], job["timeout"])
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    sys.argv = ["program.py"]
    linecache.cache["program.py"] = (len(code), None, code.splitlines(True), "program.py")
    if "unittest" in code:
        judge_by_unittest()
    refused = refuse_ways_out()
    try:
        exec(compile(code, "program.py", "exec"), program.__dict__)
        reason = "ok"
    except SystemExit:
        reason = "exit"
    except BaseException as error:
        reason = reason_for(error, refused)
        with contextlib.suppress(BaseException):
            traceback.print_exception(type(error), error, error.__traceback__.tb_next, limit=20)
    os.write(out, f"{job['seal']}{reason}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
