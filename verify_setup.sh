#!/usr/bin/env bash
# Checks a machine before a training: one line a check, with the command that mends what is wrong.
#
#     bash verify_setup.sh                                        for training on this machine
#     NUM_MACHINES=2 MAIN_NODE_IP=10.0.0.1 bash verify_setup.sh   on each of several, with the settings of the run
#     bash verify_setup.sh --help                                 settings and options
#
# PASS needs nothing, WARN works but perhaps not as you mean it, FAIL will stop or spoil the training. The exit status
# is 0 without FAIL, 1 with one, 2 for a wrong call. Nothing is installed, downloaded or left behind.

set -euo pipefail  # a step that fails ends the script

# ── Settings: those of multinode_train.sh, and the model ─────────────────────────────────────────────────────────────

export SEVERAL=no  # one machine is meant …
if [ -n "${MAIN_NODE_IP:-}${NUM_MACHINES:-}" ] && [ "${NUM_MACHINES:-2}" != 1 ]; then  # … unless something says more
    SEVERAL=yes  # then what is wrong with the network is a FAIL
fi
export GPUS_GIVEN=${GPUS:+yes}  # GPUs that were asked for must exist; the default is only a suggestion
export MAIN_NODE_IP=${MAIN_NODE_IP:-192.168.1.100}  # the machine with rank 0, as the others see it
export MAIN_PORT=${MAIN_PORT:-29500}  # where it listens for them
export NUM_MACHINES=${NUM_MACHINES:-2}  # counts only when several are meant
export GPUS=${GPUS:-2,3}  # of this machine: leaves 0 and 1 to others
export TOTAL_GPUS=${TOTAL_GPUS:-4}  # of all machines together
export MODEL=${MODEL:-google/gemma-270m}  # main.py's own default
if [ "$SEVERAL" = yes ]; then  # they share a directory
    export OUTPUT_DIR=${OUTPUT_DIR:-/shared/outputs/gemma-270m}  # as in multinode_train.sh
else  # one machine writes where main.py writes by itself
    export OUTPUT_DIR=${OUTPUT_DIR:-./outputs}  # in the current directory
fi

# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────

guide() {  # for --help
    cat <<TEXT  # with the settings as they are now
bash verify_setup.sh [--model NAME] [--json]

  --model NAME   the hub name or directory that --model_name_or_path will get; also the variable MODEL
  --json         one JSON object instead of lines

Settings come from the environment, as for run_node0.sh and run_node1.sh; setting NUM_MACHINES or MAIN_NODE_IP says
that several machines are meant (now: $SEVERAL). Now:
MAIN_NODE_IP=$MAIN_NODE_IP MAIN_PORT=$MAIN_PORT NUM_MACHINES=$NUM_MACHINES
GPUS=$GPUS TOTAL_GPUS=$TOTAL_GPUS OUTPUT_DIR=$OUTPUT_DIR MODEL=$MODEL
NO_COLOR=1 keeps colours from a terminal.
TEXT
}

stop() {  # the end of every wrong call
    echo "verify_setup.sh: $1; see bash verify_setup.sh --help" >&2  # one sentence that says what to do
    exit 2  # the status of a wrong call; main.py uses the same
}

format=lines  # for people
while (($# > 0)); do  # from left to right
    case $1 in  # the few words there are
        --json) format=json ;;  # for programs
        --model) (($# > 1)) || stop "--model needs a name or a directory"; shift; MODEL=$1 ;;  # the usual way
        --model=*) MODEL=${1#*=} ;;  # --model=NAME, as argparse takes it, too
        -h | --help) guide; exit 0 ;;  # checks nothing
        *) stop "unknown argument '$1'" ;;  # a slip
    esac
    shift  # to the next word
done
[ -n "$MODEL" ] || stop "--model needs a name or a directory"  # --model ""

# ── Checks: a Python program, because PyTorch and the hub's library are asked ────────────────────────────────────────

program() {  # prints it; the program itself starts it a second time for each GPU, to try them together
    cat <<'PYTHON'  # quoted: the shell changes nothing in it
"""The checks from top to bottom, main() at the end is their list; worker() runs in a process of its own per GPU."""

import glob  # weight files of a model directory
import importlib.metadata  # versions of installed packages, without importing them
import importlib.util  # is flash-attn there?
import ipaddress  # what is a loopback address?
import json  # --json, and what the workers tell
import os  # settings
import platform  # Python's own version, for its line of the report
import re  # GPUS and numbers are checked by their form
import shutil  # free space; programs on the PATH
import signal  # Ctrl-C
import socket  # is the port free, does the main node answer?
import subprocess  # ip, df, nvidia-smi, workers
import sys  # exit status
import tempfile  # trial files that leave no trace
import threading  # a check that would hang is given up after seconds
import time  # how long the workers may still take

SETTINGS = os.environ  # the shell above has filled in the defaults
SEVERAL = SETTINGS["SEVERAL"] == "yes"  # several machines: the network must be right
GIGABYTE = 1_000_000_000  # as makers of disks and GPUs count
CHECKPOINT = 3.2 * GIGABYTE  # float32 weights and Adam's two moments of 268 million parameters
NETWORK_STORAGE = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "sshfs", "9p",  # parts of …
                   "virtiofs", "afs", "ocfs2", "gfs2", "orangefs", "pvfs", "weka", "panfs", "juicefs")  # … names
COLOURS = {"PASS": "\033[32m", "WARN": "\033[33m", "FAIL": "\033[31m"}  # green, yellow, red
results = []  # what was reported so far, in order


def report(status, name, found, remedy=""):  # every result goes through here
    """Note and print the one line of a check. status (str): PASS, WARN or FAIL; remedy (str): what to do, or empty."""
    found, remedy = (" ".join(text.split()) for text in (found, remedy))  # errors may have several lines
    row = {"status": status, "name": name, "found": found, "remedy": remedy}  # as --json shows it
    results.append(row)  # for the summary, the exit status and --json
    if SETTINGS["FORMAT"] == "lines":  # at once: some checks take seconds
        colour = sys.stdout.isatty() and not SETTINGS.get("NO_COLOR") and SETTINGS.get("TERM") != "dumb"  # no-color.org
        start, end = (COLOURS[status], "\033[0m") if colour else ("", "")  # log files stay plain
        arrow = f" -> {remedy}" if remedy else ""  # a PASS has none
        print(f"{start}{status}{end}  {name:<18} {found}{arrow}", flush=True)  # the longest name has 17 letters


def attempt(check, *args):  # a check that breaks must not hide the others
    """Call check(*args) and return its result; an exception becomes a FAIL of its own, and None is returned."""
    try:  # libraries of any version, odd systems
        return check(*args)  # most checks only report
    except Exception as error:  # none that is foreseen
        report("FAIL", check.__name__, f"the check itself broke: {type(error).__name__}: {error}",  # its own words
               "mend that, or judge this point yourself")  # the other checks go on


def within(seconds, function, *args):  # names and hubs may never answer
    """Return function(*args), or raise what it raises; TimeoutError after so many seconds, whatever it waits for."""
    box = {}  # what the thread brings back

    def work():  # runs while the caller waits
        try:  # an exception belongs to the caller
            box["result"] = function(*args)  # an empty one, such as None, is an answer too
        except Exception as error:  # kept until the caller looks
            box["error"] = error  # raised below

    thread = threading.Thread(target=work, daemon=True)  # one that hangs does not keep the program from ending
    thread.start()  # from now on the clock runs
    thread.join(seconds)  # until it is done, or the time is over
    if not box:  # neither answer nor exception
        raise TimeoutError(f"no answer in {seconds} s")  # an OSError, like other failures of networks
    if "error" in box:  # it failed by itself
        raise box["error"]  # with its own words
    return box["result"]  # in time


def output_of(*command):  # ip, df, nvidia-smi
    """Return what a command prints on standard output, or an empty string if it is missing, fails or hangs."""
    try:  # none of them is on every machine
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()  # as text
    except (OSError, subprocess.SubprocessError):  # missing; failed or hung
        return ""  # the caller has another way, or says "unknown"


def install(what="requirements"):  # the remedy for packages
    """Return the pip command for requirements.txt, or for what is given, with the pip of the Python checked."""
    path = os.path.join(SETTINGS["HERE"], "requirements.txt")  # beside this script
    path = "requirements.txt" if os.path.realpath(".") == os.path.realpath(SETTINGS["HERE"]) else path  # short
    return f"{SETTINGS['PIP']} install {f'-r {path}' if what == 'requirements' else what}"  # can be pasted


# ── Python and packages ──────────────────────────────────────────────────────────────────────────────────────────────


def python_version():  # transformers 5 and main.py need 3.10
    """Report the version of Python."""
    status = "PASS" if sys.version_info >= (3, 10) else "FAIL"  # older ones cannot even install the packages
    remedy = "" if status == "PASS" else "make a .venv with a newer one: python3.12 -m venv .venv"  # used by itself
    report(status, "Python", f"{platform.python_version()}, {sys.executable}", remedy)  # which one: often a surprise


def pytorch():  # the one package that is really loaded
    """Import torch and report its version. Returns: the module, or None."""
    try:  # also fails for broken libraries
        import torch  # two to three seconds
    except Exception as error:  # ImportError; OSError for a CUDA library that is missing
        report("FAIL", "PyTorch", f"cannot be imported: {error}", install())  # installs all of requirements.txt
        return None  # what needs it is not checked
    report("PASS", "PyTorch", torch.__version__)  # compared with requirements.txt below
    return torch  # for the other checks


def cuda(torch):  # driver, toolkit, devices
    """Report CUDA and the GPUs of this machine. Returns: how many PyTorch can use."""
    listed = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")  # per GPU
    listed = [line for line in listed if line]  # none: no driver, or no GPU
    hidden = SETTINGS.get("CUDA_VISIBLE_DEVICES") == ""  # set and empty hides all GPUs, on purpose
    if not hidden:  # a choice of some, or none at all
        SETTINGS.pop("CUDA_VISIBLE_DEVICES", None)  # numbers of GPUS count all GPUs, as in multinode_train.sh
    if torch.cuda.is_available():  # driver and build fit
        driver = f", driver {listed[0]}" if listed else ""  # nvidia-smi is not in every container
        report("PASS", "CUDA", f"{torch.version.cuda}{driver}")  # the version torch was built for
        count = torch.cuda.device_count()  # GPUS may name fewer
        gpus = [torch.cuda.get_device_properties(index) for index in range(count)]  # names and memory
        names = [f"{index}: {gpu.name} ({gpu.total_memory / GIGABYTE:.0f} GB)"  # which number belongs to which card
                 for index, gpu in enumerate(gpus)]  # counted from 0, as in GPUS
        report("PASS", "GPUs", f"{count}, {', '.join(names)}")  # as GPUS numbers them
        return count  # GPUS may choose among these
    if hidden:  # whether there are any cannot be asked
        report("WARN", "CUDA", "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs",  # forgotten in the environment?
               "unset CUDA_VISIBLE_DEVICES, if there are any")  # multinode_train.sh sets it to GPUS
    elif listed:  # the driver sees GPUs which torch cannot use: training would silently take the CPU
        reason = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"  # pip's
        found = f"PyTorch cannot use the {len(listed)} GPUs here: it {reason}, the driver is {listed[0]}"  # both sides
        report("FAIL", "CUDA", found,  # one of the two has to change
               "install the build of torch for this driver: https://pytorch.org/get-started/locally")  # or a new driver
    else:  # a laptop, a CPU server
        report("WARN", "CUDA", "not available (nvidia-smi lists no GPU)",  # for a GPU machine this is the wrong answer
               "if there is a GPU, install its driver; without one training works on the CPU, slowly")  # we cannot know
    report("WARN", "GPUs", "none that PyTorch can use: training works on the CPU, slowly")  # minutes become hours
    return 0  # so no GPU is tried below


def packages():  # what was tested is what is pinned
    """Report the version of every package of requirements.txt against its pin."""
    try:  # comes with transformers …
        from packaging.requirements import Requirement  # reads "datasets~=5.2.0"
        from packaging.version import Version  # compares 5.10 and 5.9 as numbers
    except ImportError:  # … and inside pip, on a bare machine
        from pip._vendor.packaging.requirements import Requirement  # the same code
        from pip._vendor.packaging.version import Version  # inside pip, too

    with open(os.path.join(SETTINGS["HERE"], "requirements.txt"), encoding="utf-8") as file:  # beside this script
        lines = [line.partition("#")[0].strip() for line in file]  # blank where nothing is left
    for wanted in map(Requirement, filter(None, lines)):  # torch, transformers, …
        try:  # from the metadata of the installation
            have = importlib.metadata.version(wanted.name)  # such as 5.23.0
        except importlib.metadata.PackageNotFoundError:  # a fresh machine
            report("FAIL", wanted.name, f"not installed; requirements.txt asks for {wanted}", install())  # all at once
            continue  # with the next one
        if wanted.specifier.contains(have, prereleases=True):  # 2.13.0+cpu is a 2.13.0
            report("PASS", wanted.name, f"{have}, as requirements.txt asks: {wanted.specifier}")  # tested together
            continue  # with the next one
        older = Version(have) < min(Version(part.version) for part in wanted.specifier)  # lacks what main.py relies on
        found = f"{have} is {'older' if older else 'newer'} than what was tested: {wanted.specifier}"  # both versions
        report("FAIL" if older else "WARN", wanted.name, found, install())  # a newer one may work


def flash_attention():  # optional: absent is fine
    """Report whether flash-attn is installed and can be imported."""
    command = install("flash-attn --no-build-isolation")  # built from source: after torch
    if importlib.util.find_spec("flash_attn") is None:  # the usual case
        report("PASS", "flash-attn", "not installed; only --use_flash_attention needs it", command)  # half an hour
        return  # the import below is for an installed one
    try:  # built for another torch it fails here, not in the night
        import flash_attn  # its CUDA part is loaded, too
    except Exception as error:  # an undefined symbol is the classic
        report("WARN", "flash-attn", f"installed, but cannot be imported: {error}",  # training without the flag works
               f"{command} --force-reinstall --no-deps --no-cache-dir")  # builds it for the torch that is there
        return  # the flag would fail
    report("PASS", "flash-attn", str(getattr(flash_attn, "__version__", "installed")))  # --use_flash_attention works


def launcher():  # several processes are started by accelerate
    """Report whether the command accelerate is found."""
    path = shutil.which("accelerate")  # with .venv/bin in front, as in multinode_train.sh
    if path:  # on the PATH
        report("PASS", "accelerate launch", path)  # perhaps of another Python
    else:  # installed into an environment that is not active, or not at all
        report("FAIL" if SEVERAL else "WARN", "accelerate launch", "the command is not on the PATH",  # to .venv/bin
               f"source .venv/bin/activate, or {install()}")  # python main.py works without it


# ── Output directory ─────────────────────────────────────────────────────────────────────────────────────────────────


def output_directory():  # writable, roomy, shared
    """Report whether OUTPUT_DIR can be written to, has space, and is seen by other machines, if several are meant."""
    if SETTINGS["GONE"]:  # removed under this shell's feet
        report("FAIL", "output directory", f"the current directory {SETTINGS['GONE']} is gone",  # no run starts there
               "cd to a directory that exists")  # perhaps it was made anew: cd . is enough then
        return  # no path to look at
    other = "choose another: export OUTPUT_DIR=/path"  # the remedy that always works
    try:  # asked of the disk itself
        folder = os.path.abspath(os.path.expanduser(SETTINGS["OUTPUT_DIR"]))  # where main.py would write
        place = within(5, try_to_write, folder)  # a dead NFS server never answers
    except (OSError, ValueError) as error:  # no permission, read-only, full, gone, a file instead of a directory
        owner = f"sudo mkdir -p {folder} && sudo chown $USER {folder}, or "  # if it is yours to take
        owner = owner if isinstance(error, PermissionError) else ""  # ownership mends nothing else
        full = "make space, or " if "space" in str(error) or "quota" in str(error) else ""  # df -h shows where
        reason = getattr(error, "strerror", None) or str(error)  # "Read-only file system"
        report("FAIL", "output directory", f"{SETTINGS['OUTPUT_DIR']} cannot be written to: {reason}",  # as this user
               f"{full}{owner}{other}")  # the mending first
        return  # space there is of no use
    made = "" if place == folder else f", will be made in {place}"  # nothing is made now
    report("PASS", "output directory", f"{folder} can be written to{made}")  # tried just now

    there = len(glob.glob(os.path.join(glob.escape(folder), "checkpoint-*")))  # of a run that will go on
    free, needed = shutil.disk_usage(place).free, max(1, 3 + 1 - there) * CHECKPOINT  # --save_total_limit 3 and one
    numbers = f"{free / GIGABYTE:.1f} GB free, {needed / GIGABYTE:.1f} GB needed for checkpoints"  # 12.8 at first
    if free >= needed:  # the oldest goes only when the newest is safe
        report("PASS", "disk space", numbers)  # enough for the defaults
    else:  # the run would stop when the disk is full
        report("FAIL" if free < CHECKPOINT else "WARN", "disk space", numbers,  # the first could not be saved
               f"make space, train with --save_total_limit 1, or {other}")  # 6.4 GB
    shared_storage(place)  # last: it is about the other machines


def try_to_write(folder):  # asked of the system, not of the permission bits
    """Write a megabyte to a nameless file in folder, or in what exists of its path. Returns: where. Raises: OSError."""
    place = folder  # it is not made: nothing is left behind
    while not os.path.lexists(place):  # a dangling link exists, and fails below
        place = os.path.dirname(place)  # ends at / at the latest
    with tempfile.TemporaryFile(dir=place) as file:  # gone when closed, whatever happens
        file.write(bytes(1_000_000))  # more than a full disk has left
        file.flush()  # out of Python …
        os.fsync(file.fileno())  # … and onto the disk: quotas and NFS speak up only now
    return place  # a directory that can be written to


def shared_storage(place):  # one machine writes a checkpoint, all read it
    """Report the kind of file system that directory place is on."""
    kind = (output_of("df", "--output=fstype", place).split("\n")[-1]) or "unknown"  # nfs4, ext4, fuse.sshfs, …
    shared = any(word in kind for word in NETWORK_STORAGE)  # one that machines can share
    if shared or not SEVERAL:  # nothing to worry about
        report("PASS", "shared storage", kind if shared else f"{kind}: one machine needs none")  # nfs4, ext4, …
    else:  # rank 1 would look for checkpoints that only rank 0 has
        report("WARN", "shared storage", f"{place} is on {kind}, a local kind: all machines must see it",  # by its name
               "mount shared storage there (NFS, for example), unless this machine exports it itself")  # the server


# ── Network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def whole_number(name, low, high):  # of a setting
    """Return the setting as an int from low to high, or None after a FAIL."""
    text = SETTINGS[name]  # as it was typed
    if re.fullmatch(r"[0-9]{1,9}", text) and low <= int(text) <= high:  # digits only
        return int(text)  # checked
    report("FAIL", name, f"{text!r} is not a whole number from {low} to {high}", f"export {name}=NUMBER")  # a slip
    return None  # what needs it is not checked


def launch_settings(gpus, count):  # accelerate would silently start fewer processes
    """Report whether NUM_MACHINES, TOTAL_GPUS and GPUS fit. gpus (list[str]): the chosen; count (int): GPUs here."""
    machines, total = whole_number("NUM_MACHINES", 1, 100_000), whole_number("TOTAL_GPUS", 1, 1_000_000)  # of a run
    if machines is None or total is None:  # said already
        return  # nothing to compare
    if total % machines:  # accelerate divides by itself, rounding down
        report("FAIL", "launch settings", f"TOTAL_GPUS={total} is no multiple of NUM_MACHINES={machines}",  # a rest
               f"export TOTAL_GPUS={machines * max(1, len(gpus))}, on every machine")  # the GPUs of all
    elif count and total // machines != len(gpus):  # one process for each chosen GPU; on CPUs any number goes
        status = "FAIL" if total // machines > len(gpus) else "WARN"  # more processes than GPUs, or idle GPUs
        report(status, "launch settings", f"TOTAL_GPUS={total} starts {total // machines} processes here for "  # each
               f"{len(gpus)} GPUs", f"export TOTAL_GPUS={machines * len(gpus)}, or choose other GPUS")  # here
    else:  # as multinode_train.sh will launch it
        report("PASS", "launch settings", f"{machines} machines with {total // machines} processes each")  # same on all


def addresses():  # what the others can reach this machine by
    """Report the network addresses of this machine. Returns: [(interface, address)], without loopback."""
    lines = output_of("ip", "-o", "addr", "show", "up", "scope", "global").splitlines()  # "2: eth0 inet 10.0.0.1/24 …"
    found = [(line.split()[1], line.split()[3].partition("/")[0]) for line in lines]  # interface, address
    if not found:  # no iproute2 in this container
        found = [("address", word) for word in output_of("hostname", "-I").split()]  # without the names
    text = ", ".join(f"{interface} {address}" for interface, address in found)  # eth0 10.0.0.1, …
    if found:  # the usual case
        report("PASS", "addresses", text)  # the main node's is MAIN_NODE_IP on all machines
    else:  # no network, or a sandbox
        nothing = "none but loopback: other machines cannot reach this one"  # and it cannot reach them
        report("WARN" if SEVERAL else "PASS", "addresses", nothing,  # no FAIL: a VPN may hide from ip
               "connect it: ip link, ip addr" if SEVERAL else "")  # one machine needs none
    return found  # for the next check


def host_name(found):  # gloo listens on the address of the host's name
    """Report whether the host name resolves to an address that others reach. found: the pairs of addresses()."""
    chosen, name = SETTINGS.get("GLOO_SOCKET_IFNAME"), socket.gethostname()  # the way around, and the cause
    if chosen:  # gloo takes this interface, whatever the name says
        known = {interface for _, interface in socket.if_nameindex()}  # with lo
        missing = [part for part in chosen.split(",") if part not in known]  # a slip: gloo would not start
        report("FAIL" if missing else "PASS", "host name", f"GLOO_SOCKET_IFNAME={chosen} chooses the interface"  # set
               f"{', which does not exist' if missing else ''}",  # eth0 on one machine is ens3 on another
               f"export GLOO_SOCKET_IFNAME=one of {', '.join(sorted(known))}" if missing else "")  # those there are
        return  # the name does not matter
    interface = found[0][0] if found and found[0][0] != "address" else "eth0"  # the first that others reach
    remedy = f"export GLOO_SOCKET_IFNAME={interface} (main.py does so by itself)"  # nothing else to change
    try:  # /etc/hosts, or a name server that is away
        resolved = within(3, socket.gethostbyname, name)  # as gloo does
    except OSError as error:  # neither in /etc/hosts nor at a name server
        report("WARN" if SEVERAL else "PASS", "host name", f"{name} resolves to no address ({error})",  # a container
               remedy if SEVERAL else "")  # gloo falls back to loopback
        return  # no address to judge
    if ipaddress.ip_address(resolved).is_loopback:  # Debian writes 127.0.1.1 into /etc/hosts
        reason = "which no other machine reaches (gloo needs that)" if SEVERAL else "enough for one machine"  # on CPUs
        report("WARN" if SEVERAL else "PASS", "host name", f"{name} is {resolved}, {reason}",  # hangs at the first step
               remedy if SEVERAL else "")  # when accelerate is called by hand
    else:  # a proper name
        report("PASS", "host name", f"{name} is {resolved}")  # what gloo tells the others


def port_is_free(port):  # tried, as the launcher will do
    """Listen for a moment on port, on all addresses. Raises: OSError."""
    if socket.has_dualstack_ipv6():  # IPv4 and IPv6 at once, as torch does
        socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()  # nobody connects
    else:  # IPv6 is off
        socket.create_server(("", port)).close()  # at all addresses, as the launcher will


def is_mine(address):  # asked of the system: only an own address can be bound
    """Return whether a numeric address belongs to this machine."""
    try:  # any free port will do
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:  # either family
            probe.bind((address, 0))  # OSError: not one of mine
        return True  # this is the main node
    except OSError:  # another machine's
        return False  # which we have to reach


def main_node():  # all processes meet there
    """Report whether MAIN_PORT is free here, if this machine is the main node, or else whether that one answers."""
    port, host = whole_number("MAIN_PORT", 1, 65535), SETTINGS["MAIN_NODE_IP"]  # where they meet
    if port is None:  # said already
        return  # nothing to try
    mine = not SEVERAL  # one machine is its own main node
    if SEVERAL:  # whose address is it?
        try:  # a name is allowed, too
            address = within(3, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)[0][4][0]  # the first one
        except OSError as error:  # a slip, or no name server
            report("FAIL", "main node", f"{host} cannot be resolved ({error})", "export MAIN_NODE_IP=ADDRESS")  # rank 0
            return  # no port to try either
        mine = is_mine(address)  # decides what is asked
        if mine and ipaddress.ip_address(address).is_loopback:  # a trial on one machine
            report("WARN", "main node", f"{host} is loopback: other machines would look on themselves",  # and wait
                   "export MAIN_NODE_IP=one of the addresses above")  # unless it is a trial
        elif mine:  # rank 0 belongs here
            report("PASS", "main node", f"{host} is this machine: start run_node0.sh here")  # and node 1 elsewhere
    if mine:  # we will listen
        try:  # for a moment
            port_is_free(port)  # on all addresses
            report("PASS", "main port", f"{port} is free here")  # open it in the firewall for other machines
        except OSError as error:  # taken; below 1024 not allowed
            report("FAIL" if SEVERAL else "WARN", "main port",  # one machine may take any other port
                   f"{port} cannot be used here: {error.strerror}",  # in use, or no permission
                   f"ss -ltnp 'sport = :{port}' shows by whom; or export MAIN_PORT={port % 50000 + 1025}"  # any will do
                   f"{', on every machine' if SEVERAL else ' (--main_process_port)'}")  # must be the same
        return  # nobody else to reach
    try:  # knock
        socket.create_connection((address, port), timeout=3).close()  # the launcher there does not mind
        report("PASS", "main node", f"{host} port {port} answers: run_node0.sh, or another program")  # cannot be told
    except ConnectionRefusedError:  # the machine itself said no: it is there, and no firewall swallows the knock
        report("PASS", "main node", f"{host} is reachable, nothing listens on port {port} yet")  # run_node0.sh will
    except OSError as error:  # silence, or no route
        report("FAIL", "main node", f"{host} port {port} is not reachable ({error})",  # this stops run_node1.sh
               f"ping {host}; there, open the port: sudo ufw allow {port}/tcp; or correct MAIN_NODE_IP")  # by turns


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def model():  # a directory, or a gated repository of the hub
    """Report whether the model can be loaded, and which step is missing if not."""
    name = os.path.expanduser(SETTINGS["MODEL"])  # ~/models/gemma
    if os.path.isdir(name):  # needs no hub
        parts = {"config.json": ["config.json"], "weights": ["*.safetensors", "pytorch_model*.bin"],  # what a model …
                 "tokenizer": ["tokenizer.json", "tokenizer.model"]}  # … consists of
        lacks = [part for part, names in parts.items() if not any(  # the parts without any file
            glob.glob(os.path.join(glob.escape(name), pattern)) for pattern in names)]  # of these names
        found = f"{name} lacks {', '.join(lacks)}" if lacks else name  # all that is missing at once
        report("FAIL" if lacks else "PASS", "model directory", found,  # main.py takes it as it is
               "copy the whole model: hf download google/gemma-3-270m --local-dir NEW" if lacks else "")  # all files
        return  # no hub, no token
    if os.path.exists(name) or name.startswith(("/", "./", "../")):  # meant as a path: no hub has such a name
        report("FAIL", "model directory", f"{name} is no directory", "correct --model or MODEL")  # a slip
        return  # nothing to ask the hub for
    aliases = {"google/gemma-270m": "google/gemma-3-270m"}  # as in main.py: no repository has the short name
    if name in aliases:  # the default
        report("PASS", "model name", f"{name} is short for {aliases[name]}")  # the published id
    hub_model(aliases.get(name, name))  # from the cache, or from the hub


def hub_model(name):  # is it here, may we fetch it?
    """Report cache, token and access of a model of the hub, by its published name."""
    try:  # comes with transformers
        import huggingface_hub as hub  # light: no torch
    except ImportError:  # a fresh machine
        report("FAIL", "model access", "not checked: huggingface_hub is not installed", install())  # with the rest
        return  # nobody to ask
    files = ("config.json", "model.safetensors", "tokenizer.json")  # what a run reads
    cached = all(isinstance(hub.try_to_load_from_cache(name, file), str) for file in files)  # paths, if they are here
    home = hub.constants.HF_HUB_CACHE  # HF_HOME moves it
    report("PASS", "model cache", f"{name} is {'' if cached else 'not yet '}in {home}")  # the first run fills it
    offline = hub.constants.HF_HUB_OFFLINE  # on purpose: the hub is not asked
    token = hub.get_token()  # of HF_TOKEN, or of hf auth login
    if offline:  # only the cache counts
        report("PASS" if cached else "FAIL", "model access", "HF_HUB_OFFLINE is set: "  # why the hub is not asked
               f"{'the cache is used' if cached else 'the hub is not asked and the cache lacks the model'}",  # then
               "" if cached else "unset HF_HUB_OFFLINE once, or give a local directory: --model DIR")  # to fetch it
        return  # no token needed
    try:  # the very question that from_pretrained asks first
        url = hub.hf_hub_url(name, "config.json")  # gated like the weights
        within(8, lambda: hub.get_hf_file_metadata(url, timeout=3))  # names of hosts resolve without a timeout
    except Exception as error:  # refused, or no answer
        found, remedy = explain(hub, error, name, token)  # the missing step
        if cached:  # it still trains, without asking
            report("WARN", "model access", f"{found}; the copy in the cache will do",  # of an earlier login
                   f"export HF_HUB_OFFLINE=1, or {remedy}")  # skips the question
        else:  # the run would end with this
            report("FAIL", "model access", found, remedy)  # the one next step
        return  # no further question
    report("PASS", "model access", f"the hub gives {name} {'to your token' if token else 'without a token'}")  # at once


def explain(hub, error, name, token):  # 401, 403, 404 and silence
    """Return (what is the matter, what to do) for an exception of the hub's library. token (str or None): ours."""
    endpoint, words = hub.constants.ENDPOINT, " ".join(str(error).split())  # HF_ENDPOINT may name another hub
    page, login = f"{endpoint}/{name}", "hf auth login"  # where terms are accepted; the command comes with the hub
    gated = isinstance(error, hub.errors.GatedRepoError)  # Gemma is
    status = getattr(getattr(error, "response", None), "status_code", None)  # None: no answer at all
    if gated and not token:  # the first step of all
        return f"not logged in, and {name} is gated", f"accept the terms at {page}, then {login}"  # in this order
    if "Invalid credentials" in words or (status == 401 and token):  # revoked, expired or cut short
        source = "HF_TOKEN" if SETTINGS.get("HF_TOKEN") else "of hf auth login"  # which of the two to renew
        return (f"the hub refuses your token ({source})",  # revoked, or cut short in copying
                f"make one at {endpoint}/settings/tokens, then {login}")  # a new one first
    if gated and "fine-grained" in words:  # a good token that was given too few rights
        return ("your token has no access to gated repositories",  # though its owner may have accepted the terms
                f"allow public gated repositories for it at {endpoint}/settings/tokens")  # one box to tick
    if gated and "awaiting" in words:  # somebody has to say yes
        return f"your request for {name} waits for a review", f"see {page}"  # Google answers at once, others do not
    if gated:  # 403: logged in, not let in
        return f"logged in, but the terms of {name} are not accepted", f"accept them at {page}"  # with the same account
    if isinstance(error, hub.errors.RepositoryNotFoundError):  # a private one looks the same
        return f"the hub knows no {name}", f"correct it: see {page}{'' if token else f' (private: {login})'}"  # a slip
    if status:  # 429 (too many requests), 500, …
        return f"the hub answers with status {status}", "try later, or give a local directory: --model DIR"  # its fault
    return (f"no answer from {endpoint} ({type(error).__name__})",  # no network, a proxy, a firewall
            f"check the network: curl -I {endpoint}; or give a local directory: --model DIR")  # or go without


# ── Computing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def worker(device, rank, world, meeting):  # in a process of its own, as in training
    """Multiply on one device, then add over all; print JSON after each. device (str): cuda or cpu; meeting: a path."""
    from datetime import timedelta  # the unit of timeouts

    import torch  # each process loads its own
    import torch.distributed as dist  # gloo and nccl

    told, place = {}, torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")  # a GPU per process
    try:  # whatever happens is told
        ones = torch.ones(256, 256, device=place)  # small: no cuBLAS workspace to speak of
        told["matmul"] = bool((ones @ ones == 256).all())  # the driver, the kernels and the arithmetic work
        if device == "cuda":  # what it offers
            told["free"], told["total"] = torch.cuda.mem_get_info(place)  # bytes, others' use taken off
            told["bf16"] = torch.cuda.get_device_capability(place) >= (8, 0)  # in hardware since Ampere
        print(json.dumps(told), flush=True)  # kept even if the next step hangs
        where = {"init_method": f"file://{meeting}", "rank": rank, "world_size": world}  # a file: needs no free port
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=10), **where)  # meet
        total = torch.full((1,), rank + 1.0, device=place)  # 1, 2, 3, …
        dist.all_reduce(total)  # as gradients are added at every step
        told["sum"] = total.item()  # must be the same everywhere
        dist.destroy_process_group()  # no complaint at exit
    except Exception as error:  # told, not printed as a traceback
        told["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"  # its first line
    print(json.dumps(told), flush=True)  # the last line counts


def start_workers(device, world, visible):  # beside the other checks: loading torch takes seconds
    """Start a worker for each device. visible (str): CUDA_VISIBLE_DEVICES for them. Returns: (processes, directory)."""
    folder = tempfile.TemporaryDirectory()  # removed at the end
    settings = {**SETTINGS, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "1"}  # as the launcher sets them
    command = [sys.executable, "-c", sys.orig_argv[2], device]  # this very program
    more = [[str(rank), str(world), os.path.join(folder.name, "meeting")] for rank in range(world)]  # who is who
    pipes = {"stdin": subprocess.DEVNULL, "text": True,  # they ask for nothing
             "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}  # answers() reads what they tell
    return [subprocess.Popen(command + part, env=settings, **pipes) for part in more], folder  # at the same time


def answers(processes, folder, seconds):  # one dictionary each
    """Wait for the workers, at most so many seconds in all, and return what each told last, as dictionaries."""
    until, told = time.monotonic() + seconds, []  # one clock for all
    for process in processes:  # in the order of their ranks
        try:  # NCCL may hang for ever
            lines, complaint = process.communicate(timeout=max(0.1, until - time.monotonic()))  # what is left of it
            silence = complaint.strip().splitlines()[-1:] or [f"ended with status {process.returncode}"]  # last words
        except subprocess.TimeoutExpired:  # too long
            process.kill()  # it will not listen to anything milder
            lines, silence = process.communicate()[0], [f"no result in {seconds} s"]  # what it had said before
        last = [json.loads(line) for line in lines.splitlines() if line.startswith("{")][-1:]  # the newest
        told.append(last[0] if last else {})  # empty if it died at once
        if "sum" not in told[-1]:  # it did not come to the end
            told[-1].setdefault("error", silence[0])  # for the line of the report
    folder.cleanup()  # the meeting file
    return told  # one for each device


def chosen_gpus(count):  # GPUS, against what there is
    """Report GPUs that were chosen and do not exist. Returns: (all chosen, those that exist), as lists of str."""
    gpus = SETTINGS["GPUS"].split(",")  # "2,3"
    if not all(re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", gpu) for gpu in gpus) or len(set(gpus)) < len(gpus):  # a slip
        report("FAIL", "chosen GPUs", f"GPUS={SETTINGS['GPUS']!r} is no list such as 0,1", "export GPUS=0,1")  # spaces?
        return gpus, []  # no worker is started: the numbers mean nothing
    missing = [gpu for gpu in gpus if gpu.isdigit() and int(gpu) >= count]  # counted from 0
    if count and missing:  # this machine has GPUs, but others
        these = [str(index) for index in range(min(count, len(gpus)))]  # as many, from the first on
        wished = SETTINGS["GPUS_GIVEN"] or SEVERAL  # else 2,3 is only the default of a script that may not be used
        found = f"GPUS={SETTINGS['GPUS']}: there is no GPU {', '.join(missing)} among the {count} here"  # from 0 on
        report("FAIL" if wished else "WARN", "chosen GPUs", found, f"export GPUS={','.join(these)}")  # those there are
        if not wished:  # python main.py takes the first ones by itself
            return these, these  # they are tried instead
    elif not count:  # multinode_train.sh trains over CPUs then
        report("WARN", "chosen GPUs", f"GPUS={SETTINGS['GPUS']}, but no GPU can be used: the CPU trains")  # over gloo
    return gpus, [gpu for gpu in gpus if count and gpu not in missing]  # the rest is tried


def gpu_results(gpus, told):  # what the workers found
    """Report matrix products, free memory and bf16 of the GPUs that were tried."""
    tried = list(zip(gpus, told, strict=True))  # each GPU with its worker's words
    broken = [f"{gpu}: {row.get('error', 'wrong result')}" for gpu, row in tried if not row.get("matmul")]  # and why
    if broken:  # in use exclusively, damaged, or too new or too old for this build of torch
        found = f"a matrix product fails on {'; '.join(broken)}"  # all of them
        report("FAIL", "chosen GPUs", found, "nvidia-smi shows their state")  # and who uses them
    else:  # driver and kernels work
        report("PASS", "chosen GPUs", f"{', '.join(gpus)}: each multiplied a matrix")  # not only listed
    sound = [(gpu, row) for gpu, row in tried if row.get("total")]  # those that told their memory
    if not sound:  # nothing more to say
        return  # the line above says why
    least = min(row["free"] for _, row in sound)  # the fullest one limits the batch
    status = "FAIL" if least < 5 * GIGABYTE else "WARN" if least < 16 * GIGABYTE else "PASS"  # weights and Adam: 4.3 GB
    remedy = "nvidia-smi shows who uses it; smaller --per_device_train_batch_size, --gradient_checkpointing"  # first
    report(status, "GPU memory", ", ".join(  # one after the other
        f"{gpu}: {row['free'] / GIGABYTE:.1f} of {row['total'] / GIGABYTE:.1f} GB free" for gpu, row in sound),  # now
        "" if status == "PASS" else remedy)  # other programs, or a small GPU
    lacks = [gpu for gpu, row in sound if not row["bf16"]]  # before Ampere
    report("WARN" if lacks else "PASS", "bf16", f"not in hardware on {', '.join(lacks)}" if lacks else  # emulated there
           "in hardware: train with --bf16", "train with --fp16 instead" if lacks else "")  # with loss scaling


def cpu_bf16():  # as example_run.sh decides
    """Report whether this CPU multiplies bfloat16 in hardware."""
    try:  # only Linux has it
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # its flags
            native = "bf16" in file.read()  # avx512_bf16, amx_bf16, Arm's bf16
    except OSError:  # macOS, a sandbox
        native = False  # not known
    report("PASS" if native else "WARN", "bf16", f"{'' if native else 'not '}in this CPU's hardware",  # --bf16 …
           "" if native else "leave --bf16 out on this CPU: emulated, it is slower")  # … works either way


def all_reduce(device, told):  # the heart of training in several processes
    """Report whether the sum over all workers came out right on each."""
    world = len(told)  # one process each
    backend = "nccl" if device == "cuda" else "gloo"  # GPUs talk by NCCL
    errors = [row["error"] for row in told if "error" in row]  # each of those that failed
    if not errors and all(row["sum"] == world * (world + 1) / 2 for row in told):  # 1 + 2 + …
        report("PASS", "all-reduce", f"{world} process{'es' * (world > 1)} with {backend} agree")  # on this machine
        return  # the line above is all there is to say
    tried = {"nccl": "NCCL_DEBUG=INFO bash verify_setup.sh tells more; try export NCCL_P2P_DISABLE=1",  # GPU to GPU
             "gloo": "export GLOO_SOCKET_IFNAME=lo on one machine, the network's interface on several"}  # its address
    found = f"{world} processes with {backend}: {errors[0] if errors else 'wrong sum'}"  # the first error is enough
    report("FAIL", "all-reduce", found, tried[backend])  # training would hang or spoil the weights


# ── The list ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main():  # the order of the lines
    """Run all checks, print the summary. Returns: the exit status."""
    attempt(python_version)  # everything below needs one
    torch = attempt(pytorch)  # None: not installed, or broken
    count = (attempt(cuda, torch) or 0) if torch else 0  # GPUs that can be used
    gpus, present = (torch and attempt(chosen_gpus, count)) or ([], [])  # as GPUS says
    device = "cuda" if count else "cpu"  # what the training would take
    started = None  # the workers compute while the other checks wait for networks
    if torch and (present or not count):  # something to try: the GPUs, or two processes on the CPU
        started = attempt(start_workers, device, len(present) or 2, ",".join(present))  # they load torch now

    for check in (packages, flash_attention, launcher, output_directory):  # this machine
        attempt(check)  # each reports by itself
    if SEVERAL:  # nothing to share otherwise
        attempt(launch_settings, gpus, count)  # the same on all machines
    attempt(host_name, attempt(addresses) or [])  # who this machine is
    attempt(main_node)  # MAIN_NODE_IP and MAIN_PORT
    attempt(model)  # the weights: a directory, the cache, or the hub with a token

    told = attempt(answers, *started, 40 if count else 20) if started else None  # seconds; usually a few
    if present and told:  # on GPUs
        attempt(gpu_results, present, told)  # products, memory, bf16
    elif not count:  # on the CPU
        attempt(cpu_bf16)  # from the system, not from torch
    if told:  # the workers ran
        attempt(all_reduce, device, told)  # together
    elif not torch:  # said with its remedy above
        report("WARN", "all-reduce", "not checked, like the GPUs: PyTorch is missing", install())  # then again

    total = {status: sum(row["status"] == status for row in results) for status in COLOURS}  # of each kind
    if SETTINGS["FORMAT"] == "json":  # one object, for programs
        print(json.dumps({"checks": results, "summary": total, "ok": not total["FAIL"]}, indent=1))  # ASCII
    else:  # the last line
        advice = "mend what FAILs, then run this again" if total["FAIL"] else "ready to train"  # what now
        print(f"{total['PASS']} passed, {total['WARN']} warnings, {total['FAIL']} failed: {advice}")  # counts
    return 1 if total["FAIL"] else 0  # a WARN does not stop a script


signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as does | head
sys.stdout.reconfigure(errors="backslashreplace")  # odd bytes in a path stop no report
if sys.argv[1] == "check":  # called by the shell
    sys.exit(main())  # 0 or 1
else:  # called by start_workers
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])  # device, rank, world, meeting
PYTHON
}

# ── Python ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HERE=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # where main.py and requirements.txt are
PIP=pip  # the one of the active environment …
if [ -x "$HERE/.venv/bin/python" ]; then  # … or that of the quickstart or the tests, as in multinode_train.sh
    PATH="$HERE/.venv/bin:$PATH"  # its python and accelerate come first
    PIP="$HERE/.venv/bin/pip"  # in full: that environment need not be active
fi
export HERE PIP PATH FORMAT=$format PYTHONSAFEPATH=1  # a torch.py in the current directory is not imported

export GONE=""  # the current directory, when it is no more
if ! [ -e . ] || ! [ "$PWD" -ef . ]; then  # removed, or removed and made anew: this shell is still in the old one
    GONE=$PWD  # one of the checks says so
    cd /  # PyTorch's libraries do not even load in a directory that is no more
fi

if ! python=$(command -v python || command -v python3); then  # a bare machine
    if [ "$format" = json ]; then  # the same shape as the program's
        echo '{"checks": [{"status": "FAIL", "name": "Python", "found": "there is none",'  # its only check
        echo ' "remedy": "install Python 3.10 or newer"}],'  # as in the line below
        echo ' "summary": {"PASS": 0, "WARN": 0, "FAIL": 1}, "ok": false}'  # the rest needs Python
    else  # for people
        echo "FAIL  Python             there is none -> install Python 3.10 or newer"  # with venv and pip
        echo "0 passed, 0 warnings, 1 failed: mend what FAILs, then run this again"  # the rest needs Python
    fi
    exit 1  # as for any FAIL
fi
exec "$python" -c "$(program)" check  # its exit status is the script's
