"""Check a machine before it is given a night's work: one line a check, and behind an arrow what mends it.

verify_setup.sh runs it with the settings of multinode_train.sh in the environment:

    PASS  needs nothing
    WARN  works, but perhaps not as it was meant
    FAIL  stops or spoils the training; then the exit status is 1

checks() at the end is the list. Each check is a generator of findings and knows nothing of the others. Two slow ones
run beside them, in processes of their own: a product and an all-reduce on each GPU, and main.py itself, which
evaluates a few tokens with the model: what it says there is what it would say in the night.
"""
import argparse  # the command line
import importlib.metadata  # versions of packages, without importing them
import ipaddress  # tells loopback addresses
import json  # answers of the worker processes
import os  # settings come in the environment
import re  # GPUS and numbers are checked by their form
import shlex  # quotes a path for the shell
import shutil  # free space
import signal  # Ctrl-C
import socket  # tries ports and addresses
import subprocess  # nvidia-smi, ip, df, and the two slow checks
import sys  # exit status
import sysconfig  # who manages this Python's packages
import tempfile  # trial files that leave no trace
import threading  # gives up what never answers
import time  # one deadline for all processes
from collections import namedtuple  # a finding
from contextlib import suppress  # packages() speaks of a missing library
from dataclasses import dataclass  # the settings
from datetime import timedelta  # how torch takes a timeout
from functools import partial  # PASS, WARN and FAIL
from pathlib import Path  # files beside this one

HERE = Path(__file__).resolve().parent.parent  # where main.py and requirements.txt are
CHECKPOINT = 3.2e9  # bytes: float32 weights and Adam's two moments of 268 million parameters
ALIASES = {"google/gemma-270m": "google/gemma-3-270m"}  # as in main.py: the hub has no such short name
MANAGED = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists() and sys.prefix == sys.base_prefix  # Debian
VENV = f"{sys.executable} -m venv {HERE}/.venv && {HERE}/.venv/bin/python"  # verify_setup.sh prefers .venv
INSTALL = f"{VENV if MANAGED else sys.executable} -m pip install -r {HERE / 'requirements.txt'}"  # can be pasted
NETWORK_DISKS = "nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|sshfs|9p|virtiofs|afs|ocfs2|gfs2|weka|juicefs"  # by df
GPU_LIST = r"(\d+|(GPU|MIG)-[\w/-]+)(,(\d+|(GPU|MIG)-[\w/-]+))*"  # numbers, or the names of nvidia-smi -L
TRIAL = "--do_eval --no_truncation --max_seq_length 8 --per_device_eval_batch_size 1 --report_to none"  # a few tokens

STARTED = []  # processes of begin()
Finding = namedtuple("Finding", "status name found remedy", defaults=[""])  # a line of the report, all of it str
ok, warn, fail = (partial(Finding, status) for status in ("PASS", "WARN", "FAIL"))  # warn(name, found, remedy)

@dataclass  # makes __init__ of the fields
class Settings:  # the variables of multinode_train.sh, as text: they may be mistyped
    rank: int | None  # of this machine among several: 0 is the main one; None: not said
    several: bool  # several machines: what is wrong with the network is a FAIL
    host: str  # MAIN_NODE_IP, where the main machine is reached
    port: str  # MAIN_PORT, where it listens
    machines: str  # NUM_MACHINES
    gpus: list[str]  # GPUS of this machine
    wished: bool  # GPUS was given, and is not the default of a script
    total: str  # TOTAL_GPUS of all machines
    output: str  # OUTPUT_DIR
    model: str  # a hub name or a directory

def stop(words):  # words (str): what is wrong with the call
    print(f"verify_setup.sh: {words}; see bash verify_setup.sh --help", file=sys.stderr)  # one sentence
    sys.exit(2)  # the status of a wrong call

def read_settings(argv=None):  # argv: list of str, or None for the process's own words
    """Return the Settings of the environment and the command line. Raises: SystemExit(2) for a wrong call."""
    env = os.environ  # verify_setup.sh has filled in the defaults
    parser = argparse.ArgumentParser("bash verify_setup.sh", description=__doc__.splitlines()[0])  # --help
    parser.error = stop  # one sentence instead of the usage
    parser.add_argument("rank", nargs="?", type=int, help="of this machine among several: 0 or 1")  # or 2
    parser.add_argument("--model", default=env["MODEL"], help="hub name or directory")  # for main.py
    args = parser.parse_args(argv)  # --help ends here
    if (args.rank or 0) < 0:  # argparse takes -1 for a number
        stop(f"rank {args.rank} is no rank: 0 is the main machine")  # as launch.py says it
    model = os.path.expanduser(args.model) or stop("--model needs a name or a directory")  # ~/models/gemma
    return Settings(  # in the order of its fields
        args.rank, env["SEVERAL"] == "yes", env["MAIN_NODE_IP"], env["MAIN_PORT"], env["NUM_MACHINES"],  # still text
        env["GPUS"].split(","), bool(env["GPUS_GIVEN"]), env["TOTAL_GPUS"], env["OUTPUT_DIR"],  # still text
        ALIASES.get(model, model))  # the name that the hub knows

# ── Tools of the checks ────────────────────────────────────────────────────────────────────────────
def attempt(check, *args):  # around each check
    """Yield the findings of check(*args); an exception becomes a FAIL, so that it hides no other check."""
    try:  # odd systems, libraries of any version
        yield from check(*args)  # a check may yield several
    except Exception as error:  # not foreseen by the check
        words = f"the check itself broke: {type(error).__name__}: {error}"  # Python's words
        yield fail(check.__name__, words, "mend that, or judge this point yourself")  # the others go on

def within(seconds, function, *args):  # for name servers, the hub and dead network disks
    """Return function(*args), or raise what it raises. Raises: TimeoutError after so many seconds."""
    box = {}  # holds "result" or "error" when the thread is done
    def work():  # runs beside the main thread
        try:  # an exception belongs to the caller
            box["result"] = function(*args)  # may be None
        except Exception as error:  # raised again below
            box["error"] = error  # with the traceback of the thread
    thread = threading.Thread(target=work, daemon=True)  # Python does not wait for a daemon at its end
    thread.start()  # the main thread goes on
    thread.join(seconds)  # until it is done, or the time is over
    if "result" not in box:  # it failed, or still waits
        raise box.get("error", TimeoutError(f"no answer in {seconds} s"))  # a TimeoutError is an OSError
    return box["result"]  # the answer came in time

def output_of(*command):  # of a program that not every machine has
    """Return what a command prints, or "" if it is missing, fails or takes over five seconds."""
    try:  # containers often lack ip and nvidia-smi
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()  # 5 s
    except (OSError, subprocess.SubprocessError):  # missing; failed or too slow
        return ""  # callers say "unknown", or have another way

def begin(gpus, *command):  # beside the other checks
    """Start Python with a command (str or Path). gpus (str): what it sees, "" for none. Returns: the process."""
    settings = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1"}  # nothing is downloaded
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}  # read when its check's turn has come
    STARTED.append(subprocess.Popen([sys.executable, *command], env=settings, **pipes))  # main() ends what is left
    return STARTED[-1]  # runs already

def whole(text, most):  # for settings, which are text
    """Return text as an int from 1 to most, or None."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= most else None  # -1 and 2.0 give None

# ── Python, packages, GPUs ─────────────────────────────────────────────────────────────────────────
def python_version():  # verify_setup.sh has refused one that is too old
    yield ok("Python", f"{sys.version.split()[0]}, {sys.executable}")  # which Python it is surprises many

def installed(name):  # of a package; asks the installation, imports nothing
    """Return its version, or None."""
    with suppress(importlib.metadata.PackageNotFoundError):  # a fresh machine, or half an installation
        return importlib.metadata.version(name)  # such as 5.23.0
    return None  # pip knows no such package

def packages():  # other versions than those of requirements.txt were not tested together
    lines = [line.partition("#")[0].strip() for line in open(HERE / "requirements.txt", encoding="utf-8")]  # or ""
    lines = [line for line in lines if line]  # such as transformers~=5.23.0
    absent = [line for line in lines if not installed(re.match(r"[\w.-]+", line)[0])]  # a name comes first
    if absent:  # in one line, as pip installs all of them at once
        yield fail("packages", f"not installed: {', '.join(absent)}", INSTALL)  # the command stands here alone
    try:  # not at the top: a fresh machine lacks it
        from packaging.requirements import Requirement  # a package that transformers needs
        from packaging.version import Version  # knows that 5.10 is newer than 5.9
    except ImportError:  # transformers is missing, too
        return  # nothing to compare
    for wanted in [Requirement(line) for line in lines if line not in absent]:  # in the order of the file
        have = installed(wanted.name)  # perhaps with the name of a build, as in 2.13.0+cpu
        older = Version(have) < min(Version(part.version) for part in wanted.specifier)  # it lacks what main.py uses
        if wanted.specifier.contains(have, prereleases=True):  # 2.13.0+cpu is a 2.13.0
            yield ok(wanted.name, f"{have}, as requirements.txt asks: {wanted.specifier}")  # tested together
        else:  # newer ones may work, older ones not
            words = f"{have} is {'older' if older else 'newer'} than what was tested: {wanted.specifier}"  # says both
            yield (fail if older else warn)(wanted.name, words, INSTALL)  # pip brings the tested versions

def cuda(torch, count):  # torch: the module; count: GPUs that it can use
    drivers = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()  # one for each GPU
    if count:  # driver and build fit
        yield ok("CUDA", f"{torch.version.cuda}{f', driver {drivers[0]}' if drivers else ''}")  # of torch's build
        gpus = map(torch.cuda.get_device_properties, range(count))  # in the order that GPUS counts
        names = [f"{index}: {gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for index, gpu in enumerate(gpus)]  # from 0
        yield ok("GPUs", f"{count}, {', '.join(names)}")  # GPUS chooses among these
    elif drivers and os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # else the CPU would train
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"  # pip's
        words = f"PyTorch cannot use the {len(drivers)} GPUs here: it {build}, the driver is {drivers[0]}"  # both sides
        yield fail("CUDA", words, "install the build for this driver: https://pytorch.org/get-started/locally")  # anew
    else:  # a laptop, a driver that is missing, or CUDA_VISIBLE_DEVICES is empty
        hidden = "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs" if drivers else "no NVIDIA driver answers"  # why
        remedy = "for a GPU install NVIDIA's driver, or unset CUDA_VISIBLE_DEVICES"  # whichever is missing
        yield warn("CUDA", f"{hidden}: training works on the CPU, slowly", remedy)  # no FAIL: it may be meant

def choose(settings, count):  # count: GPUs that torch can use
    """Return (GPUs to try: list of str, None or the Finding on GPUS)."""
    text = ",".join(settings.gpus)  # as it was typed
    first = [str(index) for index in range(min(count, len(settings.gpus)))]  # as many as were wished
    missing = [gpu for gpu in settings.gpus if gpu.isdigit() and int(gpu) >= count]  # GPUS counts from 0
    if not re.fullmatch(GPU_LIST, text):  # spaces, words
        return [], fail("chosen GPUs", f"GPUS={text!r} is no list such as 0,1", "export GPUS=0,1")  # nothing is tried
    if not count:  # multinode_train.sh trains on the CPUs then
        words = f"GPUS={text}, but no GPU can be used: the CPU trains"  # the line before says why
        return [], warn("chosen GPUs", words, "see the line CUDA")  # no GPU is needed for a trial
    if not missing:  # computing() has the verdict
        return settings.gpus, None  # as wished
    default = ", the default" * (not settings.wished)  # of a script, if nobody asked for it
    words = f"GPUS={text}{default}: there is no GPU {', '.join(missing)} among the {count} here"  # GPUS counts from 0
    finding = (fail if settings.wished else warn)("chosen GPUs", words, f"export GPUS={','.join(first)}")  # both ways
    there = [gpu for gpu in settings.gpus if gpu not in missing]  # may be empty: nothing is tried
    return there if settings.wished else first, finding  # main.py would take the first ones

# ── Output directory ───────────────────────────────────────────────────────────────────────────────
def try_to_write(folder):  # the system decides, not the permission bits
    """Write a megabyte to a nameless file in folder (Path), or above it. Returns: where. Raises: OSError."""
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))  # / exists at the latest
    with tempfile.TemporaryFile(dir=place) as file:  # has no name: nothing is left behind
        file.write(bytes(1_000_000))  # more than a full disk has left
        file.flush()  # from Python to Linux
        os.fsync(file.fileno())  # from Linux to the disk: quotas and NFS speak up only now
    return place  # OUTPUT_DIR, or where it will be made

def output_directory(settings):  # permission, space, shared storage
    if os.environ.get("GONE"):  # the current directory was removed
        words = f"the current directory {os.environ['GONE']} is gone"  # perhaps made anew: a shell stays in the old one
        yield fail("output directory", words, "cd to one that exists")  # cd . may be enough
        return  # OUTPUT_DIR may be relative to it
    folder = Path(os.path.abspath(os.path.expanduser(settings.output)))  # where main.py would write
    other = "choose another: export OUTPUT_DIR=/path"  # helps in every case
    try:  # writes a file
        place = within(5, try_to_write, folder)  # a dead NFS server never answers
    except (OSError, ValueError) as error:  # no permission, read-only, full, a file in the way; a NUL in the name
        denied = isinstance(error, PermissionError)  # another owner helps here, but not on a full disk
        path = shlex.quote(str(folder))  # it may hold spaces
        owner = f"sudo mkdir -p {path} && sudo chown $USER {path}, or " * denied  # "" unless permission is missing
        reason = getattr(error, "strerror", None) or str(error)  # "Read-only file system"
        space = "make space, or " * bool(re.search("space|quota", reason))  # Linux's words for a full disk
        yield fail("output directory", f"{folder} cannot be written to: {reason}", space + owner + other)  # may help
        return  # space there is of no use
    made = f", will be made in {place}" * (place != folder)  # nothing is made now
    yield ok("output directory", f"{folder} can be written to{made}")  # the trial file was written
    there = len(list(folder.glob("checkpoint-*")))  # those of a run that will go on
    free, needed = shutil.disk_usage(place).free, max(1, 3 + 1 - there) * CHECKPOINT  # three and the next
    words = f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for checkpoints"  # 12.8 for a new run
    remedy = f"make space, train with --save_total_limit 1, or {other}"  # two checkpoints instead of four
    little = (fail if free < CHECKPOINT else warn)("disk space", words, remedy)  # FAIL: not even one fits
    yield ok("disk space", words) if free >= needed else little  # else the run stops on a full disk
    kind = output_of("df", "--output=fstype", place).split("\n")[-1] or "unknown"  # ext4, nfs4, fuse.sshfs
    remedy = "mount shared storage there (NFS, for example), unless this machine exports it itself"  # an NFS server
    own = settings.several and not re.search(NETWORK_DISKS, kind)  # else other machines lack the checkpoints
    local = warn("shared storage", f"{place} is on {kind}, a local kind: all machines must see it", remedy)  # disk
    unneeded = ": one machine needs none" * (not settings.several)  # else the kind tells enough
    yield local if own else ok("shared storage", kind + unneeded)  # one of the two

# ── Network ────────────────────────────────────────────────────────────────────────────────────────
def launch_settings(settings, count):  # accelerate would silently start fewer processes
    machines, total = whole(settings.machines, 9999), whole(settings.total, 99999)  # None: mistyped
    gpus = len(settings.gpus)  # of this machine
    right = f"export TOTAL_GPUS={(machines or 1) * gpus} on every machine, or choose other GPUS"  # one GPU a process
    if not machines or not total:  # words, a sign, 0
        words = f"NUM_MACHINES={settings.machines}, TOTAL_GPUS={settings.total}: one is no number above 0"  # as typed
        yield fail("launch settings", words, "export NUM_MACHINES=2 TOTAL_GPUS=4, for example")  # the same everywhere
    elif (settings.rank or 0) >= machines:  # the others would not wait for it
        words = f"rank {settings.rank} needs NUM_MACHINES={settings.rank + 1} or more"  # ranks begin at 0
        yield fail("launch settings", words, f"export NUM_MACHINES={settings.rank + 1} on every machine")  # or the rank
    elif total % machines:  # accelerate divides, rounding down
        yield fail("launch settings", f"TOTAL_GPUS={total} is no multiple of NUM_MACHINES={machines}", right)  # a rest
    elif count and total // machines != gpus:  # one process for each GPU; a CPU takes any number
        words = f"TOTAL_GPUS={total} starts {total // machines} processes here for {gpus} GPUs"  # on this machine
        yield (warn if total // machines < gpus else fail)("launch settings", words, right)  # WARN: a GPU is idle
    else:  # as multinode_train.sh launches it
        yield ok("launch settings", f"{machines} machines with {total // machines} processes each")  # as many on each

def addresses(settings):  # by which other machines can reach this one
    lines = output_of("ip", "-o", "addr", "show", "up", "scope", "global").splitlines()  # "2: eth0 inet 10.0.0.1/24"
    found = [f"{words[1]} {words[3].partition('/')[0]}" for words in map(str.split, lines)]  # eth0 10.0.0.1
    text = ", ".join(found or output_of("hostname", "-I").split())  # without iproute2: addresses alone
    none = "none but loopback and link-local ones"  # torch takes no fe80::1%eth0, which is valid on one cable alone
    alone = f"{none}: no other machine reaches this one"  # no FAIL: a VPN may hide from ip
    lonely = warn("addresses", alone, "connect it: ip link, ip addr")  # matters to several machines
    yield ok("addresses", text or none) if text or not settings.several else lonely  # alone: fine

def can_listen(port):  # tried, as the launcher will do
    """Listen at all addresses of this machine for a moment. port (int): MAIN_PORT. Raises: OSError."""
    six = socket.has_dualstack_ipv6()  # one socket for IPv4 and IPv6, as for torch
    family = socket.AF_INET6 if six else socket.AF_INET  # without IPv6 in Linux there is IPv4 alone
    socket.create_server(("", port), family=family, dualstack_ipv6=six).close()  # nobody connects

def is_own(family, place):  # of a row of getaddrinfo()
    """Return whether an address is one of this machine: Linux lets a program listen at own addresses only."""
    with suppress(OSError), socket.socket(family) as trial:  # another machine's address, or a family without support
        trial.bind((place[0], 0, *place[2:]))  # at any free port
        return True  # the system has taken it
    return False  # the system has refused

def main_node(settings):  # all processes meet at this address
    port, host = whole(settings.port, 65535), settings.host.strip("[]")  # None: mistyped; brackets are of URLs
    if not port:  # words, or too large
        yield fail("main port", f"MAIN_PORT={settings.port} is no port", "export MAIN_PORT=29500")  # a number to 65535
        return  # nothing to try
    found, mine = [], True  # a single machine is its own main one
    if settings.several:  # whose address is it?
        right = "export MAIN_NODE_IP=ADDRESS on all machines, one of `hostname -I` of rank 0"  # the main machine's
        if re.match(r"fe[89ab].*:|.*%|::$|0\.0\.0\.0$", host, re.IGNORECASE):  # as launch.py refuses them
            yield fail("main node", f"by {host} torch reaches no other machine", right)  # link-local, or any address
            return  # no address, no port
        try:  # a name is allowed as well, and may have several addresses
            rows = within(3, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)  # of IPv4 and IPv6
        except (OSError, UnicodeError) as error:  # mistyped (a..b), or no name server
            yield fail("main node", f"{host} cannot be resolved ({error})", right)  # launch.py would say so, too
            return  # no address, no port
        mine = any(is_own(family, place) for family, *_, place in rows)  # else the main machine has to be reached
        found = [ipaddress.ip_address(row[4][0]) for row in rows]  # each family has a loopback of its own
    if settings.several and settings.rank is not None and mine != (settings.rank == 0):  # the wrong machine
        words = f"{host} is {'this' if mine else 'not this'} machine, which has rank {settings.rank}"  # both facts
        yield fail("main node", words, "correct MAIN_NODE_IP, which belongs to rank 0, or the rank")  # one is wrong
        return  # whose port counts is not known
    if found and all(address.is_loopback for address in found):  # a trial on one machine
        words = f"{host} is loopback: no other machine reaches it"  # every machine has one of its own
        yield warn("main node", words, right)  # fine for a trial
    elif settings.several and mine:  # rank 0 belongs here
        yield ok("main node", f"{host} is this machine: start run_node0.sh here")  # and run_node1.sh elsewhere
    if mine:  # this machine will listen
        try:  # listens and stops at once
            can_listen(port)  # a trial, as free ports cannot be listed
            yield ok("main port", f"{port} is free here")  # a firewall may still close it to others
        except OSError as error:  # taken, or below 1024
            remedy = f"ss -ltnp 'sport = :{port}' shows by whom; or export MAIN_PORT={port % 50000 + 1025}"  # any
            remedy += " on every machine" if settings.several else " (--main_process_port)"  # the same for all
            words = f"{port} cannot be used here: {error.strerror.partition(' (')[0]}"  # in use, or no permission
            yield (fail if settings.several else warn)("main port", words, remedy)  # one machine may take any other
        return  # nobody else to reach
    try:  # knocks at the main machine
        socket.create_connection((host, port), timeout=3).close()  # a waiting launcher does not mind
        yield ok("main node", f"{host} port {port} answers: run_node0.sh, or another program")  # cannot be told
    except ConnectionRefusedError:  # the machine itself says no, so no firewall swallows the knock
        yield ok("main node", f"{host} is reachable, nothing listens on port {port} yet")  # run_node0.sh will
    except OSError as error:  # silence, or no route
        remedy = f"ping {host}; there, open the port: sudo ufw allow {port}/tcp; or correct MAIN_NODE_IP"  # by rank
        yield fail("main node", f"{host} port {port} is not reachable ({error})", remedy)  # run_node1.sh would wait

# ── Model ──────────────────────────────────────────────────────────────────────────────────────────
def on_the_hub(name):  # main.py itself judges a path, also a wrong one
    """Return whether a model (str) has to come from the hub, and whether the cache of the hub holds it already."""
    if os.path.exists(name) or name.startswith((".", os.sep)) or name.count("/") > 1:  # as in main.py's check_args()
        return False, False  # a path
    import huggingface_hub as hub  # not at the top: a fresh machine lacks it
    files = ("config.json", "model.safetensors", "tokenizer.json")  # what a run of Gemma reads
    try:  # the library checks the form of a name
        return True, all(isinstance(hub.try_to_load_from_cache(name, file), str) for file in files)  # paths of files
    except ValueError:  # such as outputs/, a slip in a directory's name
        return False, False  # main.py refuses it

def hub_access(name, cached):  # name (str): as the hub knows it; cached (bool): it is here already
    import huggingface_hub as hub  # not at the top: a fresh machine lacks it
    home = hub.constants.HF_HUB_CACHE  # HF_HOME moves the cache
    yield ok("model cache", f"{name} is {'' if cached else 'not yet '}in {home}")  # the first run fills it
    token = hub.get_token()  # of HF_TOKEN or hf auth login; None: not logged in
    try:  # the very question that from_pretrained asks first
        url = hub.hf_hub_url(name, "config.json")  # gated like the weights
        within(8, lambda: hub.get_hf_file_metadata(url, timeout=3))  # looking up a host's name has no timeout
        yield ok("model access", f"the hub gives {name} {'to your token' if token else 'without a token'}")  # so far
    except Exception as error:  # refused, or no answer
        found, remedy = missing_step(hub, error, name, token)  # in words
        copy = f"{found}; the copy in the cache will do"  # fetched while access was given
        use = warn("model access", copy, f"export HF_HUB_OFFLINE=1, or {remedy}")  # 1: the hub is not asked
        used = ok("model access", "HF_HUB_OFFLINE is set: the cache is used")  # on purpose
        yield (used if hub.constants.HF_HUB_OFFLINE else use) if cached else fail("model access", found, remedy)  # ends

def missing_step(hub, error, name, token):  # 401, 403, 404, silence
    """Return (what is the matter, what to do) for an exception of the hub's library. token (str or None): ours."""
    site, words = hub.constants.ENDPOINT, " ".join(str(error).split())  # HF_ENDPOINT may name another hub
    page, login, local = f"{site}/{name}", "hf auth login", "give a local directory: --model DIR"  # parts of remedies
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "of hf auth login"  # which token is used
    gated = isinstance(error, hub.errors.GatedRepoError)  # Gemma is gated
    status = getattr(getattr(error, "response", None), "status_code", None)  # None: no answer came
    steps = [  # (whether it is this, what is the matter, what to do): the first that fits
        (hub.constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set, and the cache lacks it",  # it is nowhere
         f"unset HF_HUB_OFFLINE, or {local}"),
        (gated and not token, f"not logged in, and {name} is gated",  # the first step of a new user
         f"accept the terms at {page}, then {login}"),
        ("Invalid credentials" in words or (status == 401 and token),  # revoked, expired, cut short
         f"the hub refuses your token ({source})", f"make one at {site}/settings/tokens, then {login}"),
        (gated and "fine-grained" in words, "your token has no access to gated repositories",  # too few rights
         f"allow public gated repositories at {site}/settings/tokens"),
        (gated and "awaiting" in words, f"your request for {name} waits for a review",  # its owner decides
         f"see {page}"),
        (gated, f"logged in, but the terms of {name} are not accepted",  # the account of the token has to accept
         f"accept them at {page}"),
        (isinstance(error, hub.errors.RepositoryNotFoundError), f"the hub knows no {name}",  # or it is private
         f"correct it: see {page}{'' if token else f' (private: {login})'}"),
        (status, f"the hub answers with status {status}", f"try later, or {local}"),  # 429, 500: the hub's own fault
        (True, f"no answer from {site} ({type(error).__name__})",  # no network, a proxy, a firewall
         f"check the network: curl -I {site}; or {local}")]
    return next(step[1:] for step in steps if step[0])  # the last one always fits

def start_trial(model, folder):  # beside the other checks, as it takes ten seconds
    """Start main.py on a few tokens, on the CPU. folder (Path): for its files. Returns: the process."""
    (folder / "text.txt").write_text("one two three four five six seven eight nine\n")  # eight tokens or more
    places = ("--output_dir", folder / "out", "--cache_dir", folder / "cache")  # nothing is written elsewhere
    what = ("--model_name_or_path", model, "--validation_file", folder / "text.txt")  # the model, on some words
    return begin("", HERE / "main.py", *TRIAL.split(), *what, *places)  # trains nothing

def model_verdict(model, trial, seconds):  # trial: the process of start_trial(); seconds: how long it may take
    try:  # main.py may hang on a dead disk
        said, complaint = trial.communicate(timeout=seconds)  # all that it has printed
    except subprocess.TimeoutExpired:  # a model of many GB, or a slow disk
        trial.kill()  # the trial's folder goes at the end
        yield warn("model", f"{model} took main.py more than {seconds} s",  # no verdict
                   f"python main.py --do_eval --model_name_or_path {model} --validation_file FILE waits longer")
        return  # no verdict
    notes = "; ".join(re.findall(r"^(?:note|warning) +(.*)", said, re.M))  # it trains, but not as Gemma does
    if trial.returncode:  # main.py refuses this model
        sentence = complaint.partition("main.py: error: ")[2] or complaint.strip()[-300:]  # a traceback's end
        yield fail("model", f"main.py says: {sentence}", "mend that, or choose another: --model DIR")  # a path
    elif notes:  # such as a head that is no plain matrix
        yield warn("model", f"main.py says: {notes}", "google/gemma-3-270m has no such note")  # nothing to mend
    else:  # name, parameters, attention
        yield ok("model", re.search(r"^model +(.*)", said, re.M)[1])  # as main.py's plan says it

# ── Computing ──────────────────────────────────────────────────────────────────────────────────────
def worker(device, rank, world, meeting):  # the body of a process of its own, as in training
    """Multiply on a device, add over all; print JSON after each. device: "cuda", "cpu"; meeting (str): a new file."""
    import torch  # each process loads its own
    import torch.distributed as dist  # NCCL between GPUs, gloo between CPUs
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")  # one GPU for each process
    told = {}  # what is known so far
    try:  # whatever happens is told
        ones = torch.ones(256, 256, device=place)  # small, on a GPU that may be full
        told["product"] = bool((ones @ ones == 256).all())  # driver, kernels and arithmetic work
        if device == "cuda":  # what the GPU offers
            told["free"], told["size"] = torch.cuda.mem_get_info(place)  # bytes; others may use some
            told["bf16"] = torch.cuda.get_device_capability(place) >= (8, 0)  # in hardware since Ampere
        print(json.dumps(told), flush=True)  # kept if the next step hangs
        where = {"init_method": f"file://{meeting}", "rank": rank, "world_size": world}  # a file needs no port
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=30), **where)  # meet
        total = torch.full((1,), rank + 1.0, device=place)  # 1 on rank 0, 2 on rank 1
        dist.all_reduce(total)  # as gradients are summed in each step
        told["sum"] = total.item()  # the same on all ranks
        dist.destroy_process_group()  # else torch complains at the end
    except Exception as error:  # told instead of a traceback
        told["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"  # its first line
    print(json.dumps(told), flush=True)  # the last line counts

def start_workers(gpus, folder):  # gpus: list of str, empty for two processes on the CPU; folder (Path)
    """Start a worker for each GPU. Returns: the processes, which load torch while other checks run."""
    words = (__file__, "worker", "cuda" if gpus else "cpu")  # the end of this file calls worker()
    world = len(gpus) or 2  # processes
    ends = (str(world), folder / "meeting")  # the last arguments of worker()
    return [begin(",".join(gpus), *words, str(rank), *ends) for rank in range(world)]  # one a GPU

def answers(workers, seconds):  # NCCL may hang for ever
    """Return what each worker told last (list of dict), after so many seconds at most."""
    end, told = time.monotonic() + seconds, []  # one deadline for all
    for process in workers:  # in the order of their ranks
        try:  # those that have ended answer at once
            lines, complaint = process.communicate(timeout=max(0.1, end - time.monotonic()))  # seconds left
        except subprocess.TimeoutExpired:  # hangs
            process.kill()  # SIGKILL ends even a hanging driver
            lines, complaint = process.communicate()[0], f"no result in {seconds} s"  # what the worker told before
        row = json.loads(([line for line in lines.splitlines() if line.startswith("{")] or ["{}"])[-1])  # {} if none
        if "sum" not in row:  # it has not come to its end
            last = complaint.strip().splitlines() or [f"ended with status {process.returncode}"]  # negative: a signal
            row.setdefault("error", last[-1])  # its last words
        told.append(row)  # the newest of its lines
    return told  # one for each process

def computing(gpus, workers):  # gpus: list of str, empty for the CPU
    told = answers(workers, 60 if gpus else 45)  # seconds: NCCL needs a while to connect
    tried = dict(zip(gpus, told, strict=False))  # empty on the CPU
    wrong = {gpu: row.get("error", "wrong result") for gpu, row in tried.items() if not row.get("product")}  # its fault
    if wrong:  # used by one process exclusively, damaged, or unknown to this build of torch
        words = "; ".join(f"{gpu}: {error}" for gpu, error in wrong.items())  # of all such GPUs
        yield fail("chosen GPUs", f"a product fails on {words}", "nvidia-smi shows their state")  # processes on it, too
    elif gpus:  # all GPUs compute, not only exist
        yield ok("chosen GPUs", f"{', '.join(gpus)}: each multiplied a matrix")  # and every product was right
    sound = {gpu: row for gpu, row in tried.items() if row.get("size")}  # those that told their memory
    if sound:  # at least one GPU
        least = min(row["free"] for row in sound.values())  # bytes: the fullest one limits the batch
        words = ", ".join(f"{gpu}: {row['free'] / 1e9:.1f} of {row['size'] / 1e9:.1f} GB free"  # others may use some
                          for gpu, row in sound.items())  # one after the other
        remedy = "nvidia-smi shows who uses it; a smaller batch and --gradient_checkpointing need less"  # by turns
        little = (fail if least < 5e9 else warn)("GPU memory", words, remedy)  # weights, gradients, Adam: 4.3e9 bytes
        yield ok("GPU memory", words) if least >= 16e9 else little  # enough for 4 × 2,048 tokens
        lacks = [gpu for gpu, row in sound.items() if not row["bf16"]]  # older than Ampere
        none = warn("bf16", f"not in hardware on {', '.join(lacks)}", "train with --fp16 instead")  # emulated there
        yield none if lacks else ok("bf16", "in hardware: train with --bf16")  # on all of them
    world, backend = len(told), "nccl" if gpus else "gloo"  # as main.py chooses it
    errors = [row["error"] for row in told if "error" in row]  # the first one is enough
    right = not errors and all(row["sum"] == world * (world + 1) / 2 for row in told)  # ranks 0 to 2 add 1 + 2 + 3
    remedies = {  # NCCL's own words go into a file: the report reads the standard output
        "nccl": "NCCL_DEBUG=INFO NCCL_DEBUG_FILE=nccl.%p bash verify_setup.sh, and read nccl.*; "  # %p: process id
                "try export NCCL_P2P_DISABLE=1",  # no direct copies between GPUs
        "gloo": "export GLOO_SOCKET_IFNAME=lo, on several machines the network's interface"}  # a name of `ip link`
    found = f"{world} processes with {backend}: {(errors or ['wrong sum'])[0]}"  # one error is enough
    failed = fail("all-reduce", found, remedies[backend])  # what to try
    agree = f"{world} process{'es' * (world > 1)} with {backend} agree"  # all ranks have the same sum
    yield ok("all-reduce", agree) if right else failed  # FAIL: the training would hang, or be wrong

# ── The list ───────────────────────────────────────────────────────────────────────────────────────
def checks(settings, folder):  # folder (Path): for trial files, removed at the end
    """Yield the Finding of each line of the report, in its order."""
    yield from attempt(python_version)  # verify_setup.sh has found this Python
    slow = []  # (check, arguments) of those that are begun now and read at the end
    count, gpus = 0, []  # GPUs that torch can use, and those that will train
    if os.environ.get("CUDA_VISIBLE_DEVICES"):  # "" hides all GPUs, and stays
        del os.environ["CUDA_VISIBLE_DEVICES"]  # multinode_train.sh sets it to GPUS, which counts all GPUs
    try:  # on a fresh machine torch is missing; elsewhere a library of CUDA may be
        import torch  # not at the top: two seconds here, on network disks many more
    except Exception as error:  # an ImportError, or an OSError of the system's loader
        torch = None  # nothing to compute with
        broken = " --force-reinstall" * (not isinstance(error, ModuleNotFoundError))  # pip leaves alone what is there
        remedy = INSTALL + broken if installed("torch") else "see the line packages"  # where all that is missing stands
        yield fail("PyTorch", f"cannot be imported: {error}", remedy)  # all of requirements.txt
    else:  # torch is here
        yield ok("PyTorch", torch.__version__)  # compared with requirements.txt below
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # 0: the CPU trains
        gpus, finding = choose(settings, count)  # empty: the CPU trains, or GPUS names none that exists
        yield from attempt(cuda, torch, count)  # driver, GPUs
        yield from filter(None, [finding])  # what is wrong with GPUS
        if gpus or not count:  # something to compute on
            slow.append((computing, gpus, start_workers(gpus, folder)))  # products, memory, all-reduce
    with suppress(ImportError):  # without the hub's library, packages() says what is missing
        remote, cached = on_the_hub(settings.model)  # from the hub? in the cache?
        if torch and (cached or not remote):  # nothing has to be downloaded
            trial = start_trial(settings.model, folder)  # on the CPU: the GPUs are busy
            slow.insert(0, (model_verdict, settings.model, trial, 120))  # seconds: 270M takes ten
        if remote:  # perhaps gated
            slow.insert(0, (hub_access, settings.model, cached))  # token, terms
    yield from attempt(packages)  # versions
    yield from attempt(output_directory, settings)  # permission, space, shared storage
    if settings.several:  # a single machine is not launched by multinode_train.sh
        yield from attempt(launch_settings, settings, count)  # as many processes as GPUs
    yield from attempt(addresses, settings)  # of this machine
    yield from attempt(main_node, settings)  # the main machine and its port
    for check, *args in slow:  # begun above
        yield from attempt(check, *args)  # waits for its answer

def main():  # what verify_setup.sh runs
    """Print a line for each finding, and the sum of all. Raises: SystemExit(1) after a FAIL, (2) for a wrong call."""
    settings = read_settings()  # --help and a wrong call end here
    total = dict.fromkeys(("PASS", "WARN", "FAIL"), 0)  # findings of each kind
    try:  # a full disk, or a wrong TMPDIR
        tempfile.TemporaryFile().close()  # as the trials will need
    except OSError as error:  # No usable temporary directory, No space left on device
        stop(f"no temporary file can be written ({error}): make space, or export TMPDIR=/path")  # before any check
    with tempfile.TemporaryDirectory(prefix="preflight-", ignore_cleanup_errors=True) as folder:  # not in OUTPUT_DIR
        try:  # Ctrl-C and `| head` may end it at any line
            for status, name, found, remedy in checks(settings, Path(folder)):  # some take seconds
                line = f"{status}  {name:<17} {' '.join(found.split())}{' -> ' * bool(remedy)}{remedy}"  # PASS: none
                print(line, flush=True)  # at once: the next check may take seconds
                total[status] += 1  # for the last line
        finally:  # no process outlives the report
            for process in STARTED:  # mostly ended already
                process.kill()  # SIGKILL ends even a hang in a driver
    advice = "mend what FAILs, then run this again" if total["FAIL"] else "ready to train"  # the next step
    print(f"{total['PASS']} passed, {total['WARN']} warnings, {total['FAIL']} failed: {advice}")  # the last line
    sys.exit(int(total["FAIL"] > 0))  # a WARN stops no script

if __name__ == "__main__":  # not when a test imports it
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    if sys.argv[1:2] == ["worker"]:  # called by start_workers()
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])  # device, rank, world, meeting
    else:  # called by verify_setup.sh
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):  # Ctrl-C, kill, `| head`
            signal.signal(signum, lambda number, frame: sys.exit(128 + number))  # main() cleans up
        main()  # does not return
