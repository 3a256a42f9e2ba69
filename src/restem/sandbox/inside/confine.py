"""What a process gives up before a program of a model runs in it: files (Landlock), system calls (seccomp), resources.

Every function is final for the process and all that it starts. Linux on x86-64 and arm64; elsewhere they raise OSError.
Layouts are those of the kernel's linux/landlock.h, linux/seccomp.h and linux/filter.h.
"""

import _ctypes  # `ctypes` costs every program milliseconds
import errno
import os
import resource
import struct


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO


class _Long(_ctypes._SimpleCData):
    _type_ = "l"


class _Int(_ctypes._SimpleCData):
    _type_ = "i"


class _Byte(_ctypes._SimpleCData):
    _type_ = "c"


_library = _ctypes.dlopen(None, 0)
_syscall, _call_prctl = (_Function(_ctypes.dlsym(_library, name)) for name in ("syscall", "prctl"))
_syscall.restype, _call_prctl.restype = _Long, _Int
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

# name: (x86-64, arm64); None = does not exist there
_FORBIDDEN = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
    "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "personality": (135, 92),
    "inotify_init1": (294, 26), "fanotify_init": (300, 262), "setsid": (112, 157), "setpgid": (109, 154),
    "sched_setattr": (314, 274), "sched_setscheduler": (144, 119), "ioprio_set": (251, 30),
}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT, _SETRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261), (160, 164)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000


def no_new_privileges():
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def hide_memory():
    """No other process of the same user may read or trace this one."""
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent():
    _prctl(_PR_SET_PDEATHSIG, 9)


def drop_capabilities():
    """What is left of root is a user that owns root's files."""
    column, _ = _ARCHITECTURES[os.uname().machine]
    head, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_syscall(_Long((126, 91)[column]), head, data))


def limit(memory_mb, cpu_s, file_kb, open_files, threads, stack_mb):
    """Resource limits, hard and soft alike."""
    wanted = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_kb << 10,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: stack_mb << 20,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if threads is not None:
        wanted[resource.RLIMIT_NPROC] = threads
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock(readable, writable=()):
    """Of all files, only what lies under these paths can be opened; no TCP; signals and abstract sockets stay inside."""
    version = _syscall(_Long(_LANDLOCK_CREATE), None, _Long(0), 1)
    if version < 1:
        raise OSError(_ctypes.get_errno() or errno.ENOSYS, "this kernel has no Landlock")
    files = (1 << 13) - 1  # execute .. make_sym, of version 1
    files |= (1 << 13) if version >= 2 else 0  # refer
    files |= (1 << 14) if version >= 3 else 0  # truncate
    files |= (1 << 15) if version >= 5 else 0  # ioctl on devices
    network = 3 if version >= 4 else 0  # bind, connect
    scope = 3 if version >= 6 else 0  # abstract unix sockets, signals
    rules = struct.pack("=QQQ", files, network, scope)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _check(_syscall(_Long(_LANDLOCK_CREATE), rules, _Long(len(rules)), 0))
    read = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read a file, list a folder
    for path, allowed in [*((p, read) for p in readable), *((p, files) for p in writable)]:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            allowed &= (1 << 0) | (1 << 1) | (1 << 2) | (1 << 14) | (1 << 15)  # what applies to a file
        rule = struct.pack("=Qi", allowed & files, handle)
        _check(_syscall(_Long(_LANDLOCK_ADD), ruleset, 1, rule, 0))
        os.close(handle)
    no_new_privileges()
    _check(_syscall(_Long(_LANDLOCK_RESTRICT), ruleset, 0))
    os.close(ruleset)


def seccomp():
    """From now on this process starts no process, opens no socket, and signals nobody but itself; see _FORBIDDEN."""
    column, architecture = _ARCHITECTURES[os.uname().machine]
    program = [
        _load(4),  # seccomp_data.arch
        _jump(_EQ, architecture, 1, 0),
        _KILL_PROCESS,
        _load(0),  # seccomp_data.nr
    ]
    if column == 0:
        program += [_jump(_GE, _X32_BIT, 0, 1), _deny(errno.EPERM)]
    for numbers in _FORBIDDEN.values():
        if numbers[column] is not None:
            program += [_jump(_EQ, numbers[column], 0, 1), _deny(errno.EPERM)]
    program += [_jump(_EQ, _CLONE3[column], 0, 1), _deny(errno.ENOSYS)]  # its flags cannot be seen; the C library falls back
    program += _only_if(_CLONE[column], 0, _CLONE_THREAD, bits=True)
    for number in (_KILL[column], _TGKILL[column]):
        program += _only_if(number, 0, os.getpid())
    program += _only_if(_PRLIMIT[column], 0, 0, also=os.getpid())
    program += [_ALLOW]
    code = b"".join(program)
    buffer = (_Byte * len(code)).from_buffer(bytearray(code))
    head = struct.pack("HxxxxxxQ", len(program), _ctypes.addressof(buffer))
    no_new_privileges()
    _check(_call_prctl(_PR_SET_SECCOMP, _Long(2), head, _Long(0), _Long(0)))


_EQ, _GE, _SET = 0x15, 0x35, 0x45  # BPF_JMP | BPF_K with JEQ, JGE, JSET


def _statement(code, value, yes=0, no=0):
    return struct.pack("HBBI", code, yes, no, value & 0xFFFFFFFF)


def _load(offset):
    return _statement(0x20, offset)


def _jump(test, value, yes, no):
    return _statement(test, value, yes, no)


def _deny(number):
    return _statement(0x06, 0x00050000 | number)


_ALLOW = _statement(0x06, 0x7FFF0000)
_KILL_PROCESS = _statement(0x06, 0x80000000)


def _only_if(number, argument, value, bits=False, also=None):
    """Allow a call only if the low half of an argument equals a value (or has its bits); then load the number again."""
    tests = [_jump(_SET if bits else _EQ, value, 2 if also is not None else 1, 0)]
    if also is not None:
        tests += [_jump(_EQ, also, 1, 0)]
    body = [_load(16 + 8 * argument), *tests, _deny(errno.EPERM), _load(0)]
    return [_jump(_EQ, number, 0, len(body)), *body]


def _prctl(option, value):
    _check(_call_prctl(option, _Long(value), _Long(0), _Long(0), _Long(0)))


def _check(result):
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
