# ruff: noqa: E501
"""Hostile programs: none is graded correct, none gets out, none leaves anything behind. On every rung that holds here.

`SECRET` stands in for what a program must not learn: it is the expected output, an environment variable, and a file outside.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from restem.sandbox import RUNGS, Rung, examine
from restem.types import Grade
from restem.verifiers.code import CodeTests, Limits, run_tests

SECRET = "s3cr3t-of-the-judge"
QUICK = Limits(time_s=1.0, memory_mb=256, output_kb=64)

# Programs that are to print SECRET without being told it.
PRINTERS = {
    "nothing at all": "",
    "exit code 0": "import sys; sys.exit(0)",
    "exit without a word": "import os; os._exit(0)",
    "a true-looking report on every descriptor": """
import os, json, struct
text = json.dumps({"status": "ok", "stdout": "42", "seconds": 0, "cpu": 0, "code": 0, "note": ""}).encode()
for descriptor in range(3, 64):
    try:
        os.write(descriptor, struct.pack("<Q", len(text)) + text)
    except OSError:
        pass
""",
    "a report on standard output": 'print(\'{"status": "ok", "passed": true}\')',
    "the word passed": "print('passed'); print('OK'); print('True')",
    "search all objects": """
import gc
found = [o for o in gc.get_objects() if isinstance(o, (str, bytes)) and 's3cr3t' in str(o)]
print(found[0] if found else '')
""",
    "search all frames": """
import sys
frame = sys._getframe()
while frame:
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        if 's3cr3t' in str(value):
            print(str(value))
    frame = frame.f_back
""",
    "search its own memory": """
import re
for line in open('/proc/self/maps'):
    start, end = (int(x, 16) for x in line.split()[0].split('-'))
    memory = open('/proc/self/mem', 'rb', 0)
    memory.seek(start)
    for hit in re.findall(b's3cr3t[-a-z]*', memory.read(end - start)):
        print(hit.decode())
""",
    "search its parent's memory": "import os\nprint(open(f'/proc/{os.getppid()}/mem', 'rb').read(10))",
    "read its parent's command line": "import os\nprint(open(f'/proc/{os.getppid()}/cmdline').read())",
    "read the judge's environment": "print(open('/proc/1/environ').read())",
    "read its own environment": "import os\nprint(os.environ.get('RESTEM_TEST_SECRET'), os.environ)",
    "read the arguments": "import sys\nprint(sys.argv, sys.orig_argv)",
    "read a file outside": "print(open({file!r}).read())",
    "list the folder outside": "import os\nprint([open(os.path.join({folder!r}, n)).read() for n in os.listdir({folder!r})])",
    "a link to a file outside": "import os\nos.symlink({file!r}, '/tmp/link')\nprint(open('/tmp/link').read())",
    "a hard link to a file outside": "import os\nos.link({file!r}, '/tmp/link2')\nprint(open('/tmp/link2').read())",
    "out of the tree by the parent folder": "print(open('/tmp/../../../..' + {file!r}).read())",
    "the parent's open files": "import os\nprint(os.listdir(f'/proc/{os.getppid()}/fd'))",
    "password hashes": "print(open('/etc/shadow').read())",
    "patched len, print and open": "import builtins\nbuiltins.len = lambda x: 1\nbuiltins.all = lambda x: True\nbuiltins.print('x')",
    "patched modules of the harness": """
import sys
for name in ('main', '__main__', 'plain', 'confine', 'json'):
    module = sys.modules.get(name)
    for key in dir(module) if module else ():
        if callable(getattr(module, key)) and not key.startswith('__'):
            try:
                setattr(module, key, lambda *a, **k: '{"status": "ok"}')
            except Exception:
                pass
""",
    "an output that is no text": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 10)",
    "digits of another alphabet": "print('\\uff14\\uff12')",
    "write to its input": "import os\nos.write(0, b's3cr3t')\nos.lseek(0, 0, 0)\nprint(os.read(0, 100).decode()[:3])",
    "closed descriptors": "import os\nos.closerange(0, 100)",
    "an exception in the exit handler": "import atexit\natexit.register(lambda: 1 / 0)",
}

# Programs that want out, or more than they may have; each prints "got out" where it succeeds.
BREAKERS = {
    "fork": "import os\nif os.fork() == 0: os._exit(0)\nprint('got out')",
    "a fork bomb": "import os\nwhile True:\n  os.fork()",
    "an orphan with setsid": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(60)\n  os._exit(0)\nprint('got out')",
    "fork from C": "import ctypes\nif ctypes.CDLL(None).fork() >= 0: print('got out')\nelse: raise OSError",
    "a raw clone": "import ctypes\nif ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0: print('got out')\nelse: raise OSError",
    "a raw clone3": "import ctypes\nb = ctypes.create_string_buffer(88)\nif ctypes.CDLL(None).syscall(435, b, 88) >= 0: print('got out')\nelse: raise OSError",
    "a shell": "import os\nif os.system('echo got out') == 0: print('got out')\nelse: raise OSError",
    "a subprocess": "import subprocess\nprint(subprocess.run(['/bin/echo', 'got out'], capture_output=True).stdout)",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}})\nprint('got out')",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'got out'])",
    "multiprocessing": "import multiprocessing\np = multiprocessing.Process(target=print, args=('got out',))\np.start(); p.join()\nprint('got out')",
    "a TCP connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('got out')",
    "a UDP packet": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))\nprint('got out')",
    "a listening socket": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nprint('got out')",
    "a unix socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('/tmp/s')\nprint('got out')",
    "an abstract unix socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0restem')\nprint('got out')",
    "a netlink socket": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('got out')",
    "a name look-up": "import urllib.request\nprint(urllib.request.urlopen('http://example.com', timeout=1).read())",
    "kill its parent": "import os\nos.kill(os.getppid(), 9)\nprint('got out')",
    "kill everyone": "import os\nos.kill(-1, 9)\nprint('got out')",
    "kill process 1": "import os\nos.kill(1, 9)\nprint('got out')",
    "kill its group": "import os\nos.killpg(0, 9)\nprint('got out')",
    "a signal by its descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)\nprint('got out')",
    "trace its parent": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: print('got out')\nelse: raise OSError",
    "read memory across processes": "import ctypes, os\nb = ctypes.create_string_buffer(64)\nif ctypes.CDLL(None).process_vm_readv(os.getppid(), b, 1, b, 1, 0) > 0: print('got out')\nelse: raise OSError",
    "a user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('got out')\nelse: raise OSError",
    "a mount": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: print('got out')\nelse: raise OSError",
    "chroot": "import os\nos.chroot('/tmp')\nprint('got out')",
    "become root": "import os\nos.setuid(0)\nprint('got out' if os.getuid() == 0 and os.listdir('/root') is not None else 1 / 0)",
    "a device": "import os, stat\nos.mknod('/tmp/mem', 0o666 | stat.S_IFCHR, os.makedev(1, 1))\nprint('got out')",
    "write beside the interpreter": "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'x.py'), 'w')\nprint('got out')",
    "write where the file lies": "open({file!r} + '.new', 'w').write('x')\nimport os\nprint('got out' if os.path.exists({folder!r} + '/other') else 1 / 0)",
    "shared memory that stays": "import ctypes\nif ctypes.CDLL(None).shmget(1234, 4096, 0o1666) >= 0: print('got out')\nelse: raise OSError",
    "the key ring": "import ctypes\nif ctypes.CDLL(None).syscall(248, b'user', b'x', b'y', 1, -3) >= 0: print('got out')\nelse: raise OSError",
    "io_uring": "import ctypes\nb = ctypes.create_string_buffer(256)\nif ctypes.CDLL(None).syscall(425, 4, b) >= 0: print('got out')\nelse: raise OSError",
    "bpf": "import ctypes\nb = ctypes.create_string_buffer(128)\nif ctypes.CDLL(None).syscall(321, 0, b, 128) >= 0: print('got out')\nelse: raise OSError",
    "loosen its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(600 << 20)\nprint('got out')",
    "another process's limits": "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))\nprint('got out')",
    "all memory": "x = []\nwhile True:\n  x.append(bytearray(10 << 20))",
    "one huge block": "x = bytearray(4 << 30)\nprint('got out')",
    "memory by mmap": "import mmap\nm = mmap.mmap(-1, 4 << 30)\nprint('got out')",
    "memory behind descriptors": "import os\nfor n in range(1000):\n  f = os.memfd_create(str(n))\n  os.write(f, bytes(1 << 20)); os.ftruncate(f, 1 << 30); os.pwrite(f, bytes(8 << 20), 0)\nprint('got out')",
    "ten thousand threads": "import threading, time\nfor n in range(10000):\n  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('got out')",
    "a file of a gigabyte": "f = open('/tmp/big', 'wb')\nfor n in range(1024):\n  f.write(bytes(1 << 20))\nprint('got out')",
    "a thousand files": "for n in range(1000):\n  open(f'/tmp/{{n}}', 'wb').write(bytes(1 << 20))\nprint('got out')",
    "a flood of output": "while True:\n  print('x' * 10000)",
    "a flood of errors": "import sys\nwhile True:\n  sys.stderr.write('x' * 10000)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a crash by recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()]\nclass A:\n  def __repr__(s): return repr(s)\nrepr(A())",
    "a pattern that never ends": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "a number that never ends": "x = 10 ** (10 ** 9)\nprint(x % 7)",
    "a loop in C": "sum(range(10 ** 13))",
    "a loop that ignores signals": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass",
    "sleep": "import time\ntime.sleep(3600)",
    "closed output and sleep": "import os, time\nos.close(1); os.close(2)\ntime.sleep(3600)",
    "a thread that never ends": "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
    "wait for itself": "import threading\nl = threading.Lock(); l.acquire(); l.acquire()",
    "source that is too deep": "eval('(' * 100000 + ')' * 100000)",
}

# What a function returns or does where 5 is expected.
RETURNS = {
    "an object equal to everything": "class A:\n  __eq__ = lambda s, o: True\n  __ne__ = lambda s, o: False\n  __bool__ = lambda s: True\ndef f(x): return A()",
    "a number equal to everything": "class A(int):\n  __eq__ = lambda s, o: True\n  __hash__ = int.__hash__\ndef f(x): return A(6)",
    "a text equal to everything": "class A(str):\n  __eq__ = lambda s, o: True\n  __hash__ = str.__hash__\ndef f(x): return A('6')",
    "a list equal to everything": "class A(list):\n  __eq__ = lambda s, o: True\ndef f(x): return A([6])",
    "a float equal to everything": "class A(float):\n  __eq__ = lambda s, o: True\n  __sub__ = __rsub__ = lambda s, o: 0.0\ndef f(x): return A(6.0)",
    "a metaclass equal to everything": "class M(type):\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\nclass A(metaclass=M): pass\ndef f(x): return A",
    "itself": "def f(x): return f",
    "an iterator without end": "def f(x):\n  while True: yield 5",
    "a list that holds itself": "def f(x):\n  x = []\n  x.append(x)\n  return x",
    "a list too deep to send": "def f(x):\n  y = []\n  for n in range(100000): y = [y]\n  return y",
    "a huge list": "def f(x): return [0] * 10 ** 9",
    "exit inside the call": "import os\ndef f(x): os._exit(0)",
    "exit by exception": "def f(x): raise SystemExit(0)",
    "an interrupt": "def f(x): raise KeyboardInterrupt",
    "the judge's own exception": "def f(x): raise AssertionError",
    "an exception that prints for ever": "class E(Exception):\n  def __str__(s):\n    while True: pass\ndef f(x): raise E",
    "forged answers on every descriptor": """
import os
def f(x):
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, b'{"t": ["value", {"t": [true, {"t": []}]}]}\\n')
        except OSError:
            pass
    os._exit(0)
""",
    "a helper of the tests redefined": "class math:\n  isclose = staticmethod(lambda *a: True)\ndef check(c): pass\ndef f(x): return 6",
    "builtins redefined": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = ValueError\ndef f(x): return 6",
    "no such function": "def g(x): return 5",
    "a name that is no function": "f = 5",
    "a hang": "def f(x):\n  while True: pass",
}


@pytest.fixture(scope="module", params=[rung for rung in RUNGS if rung != "plain"])
def rung(request: pytest.FixtureRequest) -> Rung:
    if failures := examine().failures[request.param]:
        pytest.skip(f"{request.param}: {'; '.join(failures)}")
    chosen: Rung = request.param
    return chosen


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A file that everyone may read and a folder that everyone may write to, beside a count of processes and descriptors."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o777)
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("RESTEM_TEST_SECRET", SECRET)
    before, descriptors = children(), psutil.Process().num_fds()
    yield {"file": str(tmp_path / "secret"), "folder": str(tmp_path), "port": "1"}
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    judge = {process.pid for process in psutil.Process().children() if "worker" in " ".join(process.cmdline())}
    assert not children() - before - judge
    assert psutil.Process().num_fds() <= descriptors + 1  # the warm judge's socket
    assert sorted(os.listdir(tmp_path)) == ["secret"]


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def prints(program: str, expected: str, rung: Rung, limits: Limits = QUICK) -> Grade:
    return run_tests(program, CodeTests(kind="stdin", inputs=["1\n"], outputs=[expected]), limits, rung=rung)


@pytest.mark.parametrize("name", PRINTERS)
def test_no_program_learns_what_is_expected(name: str, rung: Rung, outside: dict[str, str]) -> None:
    source = PRINTERS[name]
    for key, value in outside.items():
        source = source.replace(f"{{{key}!r}}", repr(value))
    grade = prints(source, SECRET, rung)
    assert grade.reward == 0
    assert SECRET not in grade.note.replace(f"expected '{SECRET}'", "")


@pytest.mark.parametrize("name", BREAKERS)
def test_no_program_gets_out_or_more_than_it_may(name: str, rung: Rung, outside: dict[str, str]) -> None:
    began = time.monotonic()
    grade = prints(BREAKERS[name].format(**outside, **{}) if "{" in BREAKERS[name] else BREAKERS[name], "got out", rung)
    assert grade.reward == 0, grade
    assert grade.reason in ("crash", "forbidden", "memory", "timeout", "incorrect")
    assert "got out" not in grade.note.replace("expected 'got out'", "")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", RETURNS)
def test_nothing_that_a_function_returns_or_does_passes_for_the_answer(name: str, rung: Rung, outside: dict[str, str]) -> None:
    called = CodeTests(kind="call", entry_point="f", inputs=[[1]], outputs=[5])
    plain = CodeTests(kind="check", entry_point="f", check="assert f(1) == 5")
    checked = CodeTests(
        kind="check", entry_point="f", check="import math\ndef check(candidate):\n  assert abs(candidate(1) - 5) < 1e-6"
    )
    isclose = CodeTests(kind="check", entry_point="f", check="assert math.isclose(f(1), 5)")
    for tests in (called, plain, checked, isclose):
        grade = run_tests(RETURNS[name], tests, QUICK, rung=rung)
        assert grade.reward == 0, (tests, grade)


def test_a_program_after_hostile_ones_is_graded_as_ever(rung: Rung) -> None:
    for name in ("a fork bomb", "kill everyone", "all memory"):
        prints(BREAKERS[name], "x", rung)
        assert prints("print(int(input()) + 1)", "2", rung).reward == 1


def test_there_are_enough_attacks() -> None:
    assert len({*PRINTERS.values(), *BREAKERS.values(), *RETURNS.values()}) >= 60
