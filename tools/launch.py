"""Launch this machine's part of a training on several machines, and watch the other machines while it runs.

multinode_train.sh calls it with its settings in the environment and with the flags of main.py:

    check ──► meet ──► load torch ──► meet ──► accelerate launch ──► main.py, once a GPU
      │         └ who is missing?                └ a thread: signs of life, silence, reasons for an end
      └ with MAX_RETRIES the rest is a child process, and after a loss another one

The machines meet before anything is launched: a missing machine, a wrong address, a port that is taken and settings
that differ show at once. They meet again with torch loaded, as loading takes 2 seconds here and 30 there. From then on
the main machine keeps a connection to each other one, and passes on what one of them says to the rest.
"""

import contextlib  # suppress(), for errors that change nothing
import ctypes  # prctl(), which Python's own modules lack
import importlib.util  # finds torch, and loads it at a moment of our choice
import json  # machines tell each other one object a line
import os  # settings come in the environment
import re  # the forms of settings and flags
import select  # waits for several connections at a time
import signal  # Ctrl-C is SIGINT, kill sends SIGTERM
import socket  # TCP between the machines
import subprocess  # nvidia-smi lists the GPUs
import sys  # arguments, exit status
import threading  # watches while torch has the main thread
import time  # deadlines, in seconds


def say(words):  # for lines that are not main.py's
    """Print one line on stderr, as a program may read main.py's progress on stdout."""
    print(f"launch.py: {words}", file=sys.stderr, flush=True)  # flush: log files show it at once

def die(words):  # like die() in main.py
    """End before the launch, with a sentence. Raises: SystemExit(2), the status of a wrong call."""
    say(words)  # names the next step for the user
    sys.exit(2)  # MAX_RETRIES does not try again

def die_if(wrong, words):  # wrong: any value, true if it is wrong
    """Call die(words) if something is wrong."""
    if wrong:  # saves an if at each check
        die(words)  # does not return

def number(name, default, called=None):  # a number or SystemExit
    """Return a setting as an int. called (str): its name for the user. Raises: SystemExit(2)."""
    text = os.environ.get(name, default)  # unset only where tests import this file
    form = re.fullmatch("[0-9]{1,9}", text)  # no sign, no spaces
    die_if(not form, f"{called or name} is a whole number such as {default}, not '{text}'")  # such as -1
    return int(text)  # ports, seconds, counts

RANK = number("NODE", "0", "the rank of this machine")  # 0 on the main one
MACHINES = number("NUM_MACHINES", "1")  # their ranks are 0 to MACHINES - 1
TOTAL = number("TOTAL_GPUS", "1")  # processes on all machines, one a GPU
PORT = number("MAIN_PORT", "29500")  # torch's store listens there after the meetings
NODE_WAIT = number("NODE_WAIT", "600")  # seconds until the meetings are given up
MAX_RETRIES = number("MAX_RETRIES", "0")  # tries after the first one
ADDRESS = os.environ.get("MAIN_NODE_IP", "127.0.0.1").strip("[]")  # a name, an IPv4 or IPv6 address, as in [fd00::1]
PLACE = f"[{ADDRESS}]:{PORT}" if ":" in ADDRESS else f"{ADDRESS}:{PORT}"  # for sentences: an IPv6 address has colons
TRAINER = os.path.abspath(f"{__file__}/../../main.py")  # absolute, as users call from anywhere

FACTS = {"NUM_MACHINES": MACHINES, "TOTAL_GPUS": TOTAL, "PyTorch": "sound"}  # equal on all machines; check() adds two
SELF = {"machine": RANK, "name": socket.gethostname()}  # begins each message to other machines
HELLO = b"launch.py\n"  # the main machine's first word; other programs say something else
CLOCK = {}  # time.monotonic() of the end of the meetings, and of the last "waiting"

SIGN = 2  # seconds between two signs of life
QUIET = 30  # seconds of silence that are worth a warning
AGAIN = 15  # seconds between two warnings
GRACE = 60  # seconds beyond --ddp_timeout: torch shall give up first
REASON = 10  # seconds to hear why another machine ended
LOST = "another process was lost"  # main.py's words where the cause lies elsewhere
FINAL = (2, 130, 143)  # a wrong call, Ctrl-C, SIGTERM: MAX_RETRIES does not try again

# ── Before the machines meet ─────────────────────────────────────────────────────────────────────────────────────────

def check(gpus, output_dir):  # on this machine alone, in 0.1 seconds
    """Find what is wrong on this machine. gpus, output_dir (str): the settings. Raises: SystemExit(2)."""
    needed = ("torch", "accelerate", "transformers", "datasets")  # of requirements.txt; without tensorboard some train
    absent = ", ".join(name for name in needed if not importlib.util.find_spec(name))  # looked for, not loaded
    die_if(absent, f"{sys.executable} lacks {absent}: bash verify_setup.sh says how to install them")  # a new machine
    die_if(RANK >= MACHINES, f"rank {RANK} needs NUM_MACHINES={RANK + 1} or more, on every machine")  # ranks begin at 0
    die_if(not 1 <= PORT <= 65535, f"MAIN_PORT={PORT} is no port: choose one from 1 to 65535")  # 0 would be any port
    uneven = TOTAL < 1 or TOTAL % MACHINES  # accelerate would start fewer without a word
    die_if(uneven, f"TOTAL_GPUS={TOTAL} cannot be shared evenly by NUM_MACHINES={MACHINES}")  # a rest
    each = TOTAL // MACHINES  # processes on this machine
    form = re.fullmatch("[A-Za-z0-9/-]+(,[A-Za-z0-9/-]+)*", gpus)  # numbers, or names such as GPU-8d7d
    die_if(not form, f"GPUS is a list such as 2,3, not '{gpus}'")  # spaces, a stray comma

    listed = ""  # stays empty without an NVIDIA driver
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no nvidia-smi, no driver for it, or a hang
        ask = {"check": True, "capture_output": True, "text": True, "timeout": 60}  # seconds: a broken driver hangs
        listed = subprocess.run(["nvidia-smi", "-L"], **ask).stdout  # a line for each GPU
    count = len(re.findall("^GPU ", listed, re.MULTILINE))  # lines of MIG parts are indented
    FACTS["OUTPUT_DIR"] = output_dir  # machines of another run on this port have another one
    FACTS["DEVICE"] = "GPU" if count else "CPU"  # NCCL and gloo cannot train together
    if not count:  # a trial, or a driver that does not work
        say(f"no GPU here: {each} of the {TOTAL} processes train on this CPU")  # correct, but slow
    chosen = gpus.split(",") if count else []  # without GPUs there is nothing to choose
    for gpu in chosen:  # CUDA would ignore a wrong one silently
        known = gpu.isdigit() and int(gpu) < count or f"UUID: {gpu}" in listed  # a name may be cut short
        die_if(not known, f"GPUS={gpus}: no GPU {gpu} among the {count} here, see `nvidia-smi -L`")  # from 0 on
    few = count and len(set(chosen)) < each  # a GPU that is named twice counts once
    die_if(few, f"TOTAL_GPUS={TOTAL} over NUM_MACHINES={MACHINES} are {each} here: GPUS={gpus} lists fewer")  # one each

    with contextlib.suppress(OSError):  # os.access() finds out whether it is there
        os.makedirs(output_dir, exist_ok=True)  # with its parents
    advice = "mount the shared storage, or choose another directory"  # every rank writes a part of a checkpoint
    unusable = not os.access(output_dir, os.W_OK)  # known now, not hours later at the first checkpoint
    die_if(unusable, f"OUTPUT_DIR={output_dir} cannot be written: {advice}")  # a read-only mount, other rights

def keep_trying():  # only with MAX_RETRIES
    """Return in a child process for each try. The first process ends with the status of the last one, by SystemExit.

    The first process stays small, without torch. It only waits for the end of its child, and for signals, which it
    passes on. All are blocked, that is kept by Linux until sigwait() takes them: none is missed, whenever it comes.
    """
    kept = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)  # SIGCHLD: a child has ended
    signal.pthread_sigmask(signal.SIG_BLOCK, kept)  # fork() passes the blocking on
    parent = os.getpid()  # of all tries
    stopped = False  # True once somebody has sent a signal
    for tries in range(1, MAX_RETRIES + 2):  # one more than retries
        child = os.fork()  # safe: there is one thread so far
        if child == 0:  # fork() returns 0 in the child
            os.setsid()  # a terminal's Ctrl-C comes to the first process only
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: SIGTERM when the first process dies
            die_if(os.getppid() != parent, "the first process was killed")  # too early for prctl() to notice
            signal.pthread_sigmask(signal.SIG_UNBLOCK, kept)  # a signal that came meanwhile ends the child here
            return  # main() goes on in the child
        ended = 0  # the child's process id once it has ended
        while not ended:  # hours or days
            signum = signal.sigwait(kept)  # sleeps until one comes
            if signum == signal.SIGCHLD:  # the child has ended, or stopped for a moment
                ended, wait_status = os.waitpid(child, os.WNOHANG)  # 0 if the child lives
            else:  # Ctrl-C, kill, Slurm
                os.kill(child, signum)  # torch's agent sends it to main.py, which saves
                stopped = True  # no further try
        code = os.waitstatus_to_exitcode(wait_status)  # negative for a signal
        status = code if code >= 0 else 128 - code  # as in a shell: 137 for signal 9
        if stopped or status in (0, *FINAL) or tries > MAX_RETRIES:  # trained, stopped, hopeless
            sys.exit(status)  # for the shell
        say(f"status {status}; joining in again, {tries} of MAX_RETRIES={MAX_RETRIES}")  # from the last checkpoint

# ── The machines meet ────────────────────────────────────────────────────────────────────────────────────────────────

def cause(error):  # part of sentences to the user
    """Return the system's words for an OSError, such as Connection refused, without Python's around them."""
    return (error.strerror or str(error)).split(" (")[0]  # Python's own timeouts have no strerror

def keep_waiting(words):  # called once a second
    """Say every ten seconds what is missing. Raises: SystemExit(2) after NODE_WAIT seconds."""
    now = time.monotonic()  # unlike the time of day, nobody sets this clock
    die_if(now > CLOCK["end"], f"given up after NODE_WAIT={NODE_WAIT} s: {words}")  # a machine did not come
    if now >= CLOCK["said"] + 10:  # silence would look like a hang
        say(f"waiting: {words} ({CLOCK['end'] - now:.0f} s left)")  # time to start the missing machine
        CLOCK["said"] = now  # silent for the next ten seconds

def resolve():  # on all machines, before each attempt to meet
    """Return rows of getaddrinfo() for the main machine. Raises: SystemExit(2), at once for a name that nobody has."""
    way = "set it on all machines to one of `hostname -I` of the main machine"  # addresses, as Linux knows them
    own = re.match(r"fe[89ab].*:|.*%|::$|0\.0\.0\.0$", ADDRESS, re.IGNORECASE)  # torch refuses the % of fe80::1%eth0
    die_if(own, f"by MAIN_NODE_IP={ADDRESS} torch reaches no other machine: {way}")  # link-local, or any address
    while True:  # a name server may still be starting
        try:  # an address needs no name server
            return socket.getaddrinfo(ADDRESS, PORT, type=socket.SOCK_STREAM)  # a name may have several addresses
        except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a..b, which can be no name
            fault = getattr(error, "strerror", None) or "no name looks so"  # Name or service not known
            wrong = getattr(error, "errno", None) != socket.EAI_AGAIN  # EAI_AGAIN: the name server does not answer
            die_if(wrong, f"MAIN_NODE_IP={ADDRESS} cannot be found ({fault}): {way}")  # waiting would not help
            keep_waiting(f"no name server answers for MAIN_NODE_IP={ADDRESS} ({fault}); an address needs none")  # DNS
        time.sleep(1)  # before the next question

def foreign(family, place):  # of a row of resolve()
    """Return why an address is not one of this machine, in the system's words, or ""."""
    try:  # Linux lets a program listen at own addresses only
        with socket.socket(family) as trial:  # closed at once: nobody connects
            trial.bind((place[0], 0, *place[2:]))  # at any free port
    except OSError as error:  # mostly Cannot assign requested address
        return cause(error)  # for the user
    return ""  # it is an own one

def misfit(theirs, place, here):  # on the main machine
    """Return what is wrong with a machine, in a sentence, or None.

    theirs (dict): its facts and rank. place (str): its address. here (dict): rank → address of all that have come.
    """
    rank = theirs["rank"]  # KeyError for a stranger, which host() expects
    if here.get(rank, place) != place:  # run_node1.sh was started on two machines
        return f"{place} and {here[rank]} both have rank {rank}: give each machine its own"  # both addresses
    differ = [key for key in FACTS if theirs.get(key) != FACTS[key]]  # GPUs and CPUs cannot train together
    if not differ:  # this machine fits
        return None  # nothing is wrong
    pairs = [f"{key} is {theirs.get(key)} at {place} and {FACTS[key]} on the main machine" for key in differ]  # both
    return f"{'; '.join(pairs)}: make them the same on all machines"  # all differences at once

def host():  # on the main machine
    """Wait until all others have come, and let all begin. Returns: rank → connection. Raises: SystemExit(2)."""
    faults = [foreign(family, place) for family, *_, place in resolve()]  # "" for each own address
    if all(faults):  # MAIN_NODE_IP belongs to another machine
        fault = f"is no address of this machine ({faults[0]}), which has rank 0"  # run_node0.sh gives rank 0
        way = "start run_node0.sh on the machine that has it, or set MAIN_NODE_IP on all"  # two ways to mend it
        die(f"MAIN_NODE_IP={ADDRESS} {fault}: {way} to one of `hostname -I`")  # at once: waiting would not help
    six = socket.has_dualstack_ipv6()  # False where Linux was started without IPv6
    family = socket.AF_INET6 if six else socket.AF_INET  # an IPv6 socket takes IPv4, too
    try:  # MAIN_PORT may be in use
        server = socket.create_server(("", PORT), family=family, dualstack_ipv6=six)  # at all addresses, as torch does
    except OSError as error:  # mostly a run that has not ended
        way = "end what listens there (`ss -tlnp`), or set another MAIN_PORT on all machines"  # for torch, too
        die(f"MAIN_PORT={PORT} cannot be used here ({cause(error)}): {way}")  # at once: waiting would not help
    links = {}  # rank → connection, of machines that wait
    here = {}  # rank → address, also of machines that have gone
    way = "start run_node1.sh there, with this MAIN_NODE_IP and MAIN_PORT"  # mostly forgotten or mistyped
    while missing := [str(rank) for rank in range(1, MACHINES) if rank not in links]:  # late, or behind a firewall
        keep_waiting(f"rank {', '.join(missing)} has not come to {PLACE}; {way}")  # ends after NODE_WAIT
        for ready in select.select([server, *links.values()], [], [], 1)[0]:  # looks again after a second
            if ready is not server:  # waiting machines send nothing: this one has gone
                links = {key: link for key, link in links.items() if link is not ready}  # its rank is missing again
                continue  # with the next connection
            link, (place, *_) = server.accept()  # a machine, a port scanner, the preflight
            place = place.removeprefix("::ffff:")  # how an IPv6 socket shows IPv4 addresses
            try:  # strangers may say anything
                link.settimeout(5)  # seconds a call: a stranger may never answer
                link.sendall(HELLO)  # join() waits for it
                theirs = json.loads(link.recv(4096))  # 200 bytes, which arrive in one piece
                sentence = misfit(theirs, place, here)  # None for a machine that belongs here
            except (OSError, ValueError, KeyError, TypeError):  # a stranger: it does not speak like join()
                continue  # as if nobody had come
            if sentence:  # these machines cannot train together
                for other in (link, *links.values()):  # links lacks the one that came last
                    with contextlib.suppress(OSError):  # a machine that has gone needs no answer
                        other.sendall(sentence.encode())  # join() prints it and ends
                die(sentence)  # all machines say the same
            links[theirs["rank"]] = link  # replaces that of a machine that was started anew
            here[theirs["rank"]] = place  # the rank at another address will be noticed
    for link in links.values():  # all machines are here
        with contextlib.suppress(OSError):  # torch notices a machine that goes just now
            link.sendall(b"go")  # ends the waiting in join()
    server.close()  # PORT is free for torch's store
    return links  # stay open for Watch

def join():  # on the other machines
    """Wait until the main one says that all are here. Returns: rank 0 → connection to it. Raises: SystemExit(2)."""
    while True:  # until all are here, or keep_waiting() ends
        resolve()  # an unknown name ends the waiting
        state = "cannot be reached"  # true until a connection is made
        try:  # the main machine may not be up yet
            with socket.create_connection((ADDRESS, PORT), 5) as link:  # seconds, as firewalls may swallow packets
                state = "is in use by something else than multinode_train.sh"  # true until HELLO has come
                if link.recv(100) != HELLO:  # silence ends in a TimeoutError
                    raise OSError("a wrong answer")  # handled like the system's own errors
                link.sendall(json.dumps(FACTS | {"rank": RANK}).encode())  # for misfit() on the main machine
                while not select.select([link], [], [], 1)[0]:  # a third machine may be late
                    keep_waiting(f"the main machine {ADDRESS} is there, another one is missing")  # host() says which
                answer = link.recv(4096).decode()  # empty when the main machine has ended
                if answer == "go":  # all machines are here
                    return {0: link.dup()}  # stays open when `with` closes link
                die_if(answer, answer)  # what is wrong with one of the machines
        except OSError as error:  # refused, no route, silence
            way = "start run_node0.sh there, and check MAIN_NODE_IP, MAIN_PORT and its firewall"  # likeliest first
            if "torch" in sys.modules:  # the second meeting
                way = "that machine was there, and still loads torch or has ended"  # nothing to do yet
            keep_waiting(f"{PLACE} {state} ({cause(error)}); {way}")  # ends after NODE_WAIT
        time.sleep(1)  # before the next attempt

# ── While training runs ──────────────────────────────────────────────────────────────────────────────────────────────
# A message is one line. Each is a sign of life; the last one of a machine also says how its part ended:
#     {"machine": 1, "name": "node1"}
#     {"machine": 1, "name": "node1", "status": 1, "words": "--output_dir … cannot be written", "lost": false}
# lost: it only noticed the end of another machine. A status of null: the connection ended without a last message.
# A cut cable ends no connection, and TCP goes on when it is put back: silence is waited for, not taken for an end.

class Watch(threading.Thread):  # torch wants the main thread for its signal handlers
    """What this machine knows of the others. links (dict): rank → connection; limit (int): --ddp_timeout in seconds."""

    def __init__(self, links, limit):  # after the second meeting
        super().__init__(daemon=True)  # Python ends without waiting for the thread
        self.links = links  # loses connections that end
        self.limit = limit  # after it torch gives up waiting for gradients
        self.names = {rank: f"machine {rank}" for rank in range(MACHINES) if rank != RANK}  # host names come later
        self.heard = dict.fromkeys(self.names, time.monotonic())  # rank → time of its last sign
        self.ended = {}  # rank → its last message
        self.rest = dict.fromkeys(links, b"")  # rank → the beginning of a line
        self.signed = 0  # when this machine last gave a sign
        self.warned = 0  # when it last warned of silence
        self.given_up = None  # a sentence once check() has ended the run
        self.over = False  # True once finish() takes over

    def run(self):  # the body of the thread
        """Exchange messages and look for silence, until training is over or given up."""
        while not self.over and not self.given_up:  # looked at five times a second
            self.exchange()  # before silence is measured
            self.check(time.monotonic())  # warns, or gives up

    def exchange(self):  # takes 0.2 seconds at most
        """Read what has come, and give a sign of life when it is time."""
        ready = select.select([*self.links.values()], [], [], 0.2)[0]  # without links it only sleeps
        for rank in [rank for rank, link in self.links.items() if link in ready]:  # a list, as read() may delete links
            self.read(rank)  # parts of lines, lines, or the end
        if time.monotonic() >= self.signed + SIGN:  # 50 bytes every two seconds
            self.signed = time.monotonic()  # even when nobody can be reached
            self.send(SELF)  # a sign of life

    def send(self, message, source=None):  # Linux keeps messages while a cable is cut
        """Send a message (dict) to all that are connected, but not back to its source (a rank)."""
        for rank, link in self.links.items():  # several on the main machine only
            if rank != source:  # the source knows what it has said
                with contextlib.suppress(OSError):  # read() will find the end of this connection
                    link.sendall(json.dumps(message).encode() + b"\n")  # about 50 bytes

    def read(self, rank):  # does not wait, as select() saw data
        """Read what a machine has sent, or that its connection has ended."""
        try:  # a lost connection is no error here
            data = self.links[rank].recv(1 << 16)  # may begin and end within a line
        except OSError:  # reset, or TCP has tried for 15 minutes
            data = b""  # what recv() returns for a closed connection
        *lines, self.rest[rank] = (self.rest[rank] + data).split(b"\n")  # the last piece is no whole line
        for line in lines:  # from this machine, or passed on by it
            self.note(json.loads(line), rank)  # in the order in which they were sent
        if not data:  # the connection has ended
            del self.links[rank]  # select() would find it ready for ever
            if rank not in self.ended:  # kill -9 of its launcher or machine
                self.note({"machine": rank, "status": None}, rank)  # a third machine has to know

    def note(self, message, source):  # called by read()
        """Keep a message (dict), and pass it on to all but its source (a rank)."""
        rank = message["machine"]  # not source where the main machine passes it on
        self.heard[rank] = time.monotonic()  # by this machine's clock: clocks differ
        if "name" in message:  # all messages but that of a lost connection
            self.names[rank] = f"machine {rank} ({message['name']})"  # rank and host name, for the user
        if "status" in message:  # its last one
            self.ended[rank] = message  # for finish()
            if message["status"] is None:  # no reason will come
                say(f"the connection to {self.names[rank]} is lost")  # before main.py notices
            if message["status"] == 0:  # trained to the end
                del self.heard[rank]  # its silence means nothing
        self.send(message, source)  # only the main machine has others to tell

    def silence(self, seconds, known=()):  # known: ranks whose silence is explained
        """Return words for the machines that were not heard for so many seconds, or ""."""
        past = {rank: time.monotonic() - when for rank, when in self.heard.items() if rank not in known}  # seconds
        gone = [self.names[rank] for rank in past if past[rank] >= seconds]  # silent for too long
        longest = max(past.values(), default=0)  # seconds
        return f"nothing was heard of {', '.join(gone)} for {longest:.0f} seconds" if gone else ""  # part of a sentence

    def check(self, now):  # now: time.monotonic()
        """Warn of silence, and end this machine's part when it lasts beyond --ddp_timeout."""
        quiet = self.silence(QUIET, self.ended)  # machines that have ended may be silent
        if quiet and self.links and now >= self.warned + AGAIN:  # without links all are silent
            waits = f"the run waits for --ddp_timeout {self.limit} seconds"  # in case the machine comes back
            print(f"warning  {quiet}: is it down, or the network? {waits}", file=sys.stderr, flush=True)  # like main.py
            self.warned = now  # again after AGAIN seconds
        quiet = self.silence(self.limit + GRACE)  # machines that failed count: main.py hangs here
        if quiet:  # torch should have noticed before
            self.given_up = f"{quiet}, so the run ends"  # finish() tells third machines
            say(self.given_up)  # before main.py speaks of SIGTERM
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # torch's agent ends main.py

    def reasons(self):  # empty where every machine only lost another one
        """Return the last messages of machines that have a reason of their own, the first one first."""
        return [last for last in self.ended.values() if last["status"] != 0 and not last.get("lost")]  # None: a kill

    def finish(self, status, words, lost):  # takes what train() returns
        """Tell the others how this machine's part ended; if lost, say why another's did. Returns: exit status."""
        self.over = True  # ends the thread
        if self.is_alive():  # a single machine starts no thread
            self.join(6)  # seconds at most; mostly 0.2
        self.send(SELF | {"status": status, "words": words[:2000], "lost": lost})  # torch's words can be long
        if lost:  # main.py has no reason of its own
            status = self.explain(status)  # 2 where another machine was called wrongly

        # A connection that is closed with signs of life unread is reset, and the message with it.
        for link in self.links.values():  # a second each at most
            with contextlib.suppress(OSError):  # timed out, or the other machine is gone
                link.shutdown(socket.SHUT_WR)  # the other machine closes when it has read all
                link.settimeout(SIGN / 2)  # seconds: shorter than from sign to sign
                while link.recv(1 << 16):  # empty once it is closed
                    pass  # signs of life
        return status  # of this machine's part

    def explain(self, status):  # when this machine only lost another one
        """Wait for the reason of another machine, and say it. Returns: this machine's exit status, or the other's."""
        end = time.monotonic() + (0 if self.given_up else REASON)  # given up: it has waited long enough
        while self.links and not self.reasons() and time.monotonic() < end:  # a reason may be on its way
            if len(self.ended) == len(self.names):  # all only lost another one
                break  # the network failed and came back
            self.exchange()  # 0.2 seconds
        for reason in self.reasons():  # mostly one
            if reason["status"] is not None:  # note() has spoken of lost connections
                say(f"{reason['name']}: {reason['words']}")  # main.py could not know it
            if reason["status"] in FINAL:  # that machine does not come back
                status = reason["status"]  # MAX_RETRIES shall not wait for it
        quiet = self.silence(3 * SIGN, self.ended)  # three signs are missing
        if quiet and not self.reasons() and not self.given_up:  # a cut cable: no message comes through
            say(quiet)  # at least which machine it is
        return status  # becomes that of the launcher

# ── The launch ───────────────────────────────────────────────────────────────────────────────────────────────────────

def load():  # between the meetings
    """Import torch and accelerate. Returns: what is wrong with them, for sentences, or ""."""
    try:  # half an installation, a library of CUDA that is missing
        importlib.import_module("accelerate.commands.launch")  # with torch: 2 to 30 seconds
    except Exception as error:  # ImportError or OSError, mostly
        FACTS["PyTorch"] = f"broken ({' '.join(str(error).split())[:300]})"  # misfit() tells the other machines
        return FACTS["PyTorch"]  # this machine says it, too
    return ""  # both are sound

def ddp_timeout(words):  # of main.py's flags
    """Return the seconds of the last --ddp_timeout in a command line (list of str), or main.py's default."""
    found = re.findall(r"^--ddp[_-]timeout[=\n](\d+)$", "\n".join(words), re.MULTILINE)  # one word a line
    return int(found[-1]) if found else 600  # the last one counts, as in argparse

def first(failures):  # torch's get_first_failure() knows whole seconds only
    """Return rank and ProcessFailure of the process that has the reason. failures (dict): rank → ProcessFailure.

    When one fails, others on this machine lose it, and torch's agent ends the rest by SIGTERM, all within a second.
    """
    begin = min(failure.timestamp for failure in failures.values())  # seconds since 1970
    early = [item for item in failures.items() if item[1].timestamp <= begin + 1]  # torch notices a kill a bit later
    return min(early, key=lambda item: [word in str(item[1].message) for word in ("SIGTERM", LOST)])  # False first

def train(watch, flags):  # in the main thread, for torch's signal handlers
    """Be `accelerate launch` for main.py with its flags (list of str), while watch (Watch) looks at other machines.

    Returns: exit status, its reason in words, whether that lies in another process.
    """
    # Not at the top of the file: the machines meet before torch is loaded, which takes seconds.
    from accelerate.commands.launch import main as accelerate_launch  # what `accelerate launch` calls
    from torch.distributed import DistError  # the launchers lost each other
    from torch.distributed.elastic.multiprocessing.api import SignalException  # SIGTERM or Ctrl-C has come
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # main.py has failed

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds for a step and a save; torch has 30
    counts = f"--num_machines {MACHINES} --num_processes {TOTAL} --machine_rank {RANK}"  # processes of all machines
    store = f"--main_process_port {PORT} --rdzv_conf timeout=60"  # seconds: all machines have just met
    fixed = "--gpu_ids all --multi_gpu --mixed_precision no --dynamo_backend no"  # whatever `accelerate config` says
    sys.argv[1:] = [*f"{counts} {store} {fixed} --main_process_ip".split(), ADDRESS, TRAINER, *flags]  # for argparse
    try:  # torch's agent raises what happened to main.py
        accelerate_launch()  # returns when main.py has succeeded
    except ChildFailedError as error:  # its traceback is about the launcher, not about main.py
        rank, failure = first(error.failures)  # the rank among all processes
        code = failure.exitcode  # negative for a signal
        status = code if code > 0 else 128 - code  # as in a shell: 137 for signal 9
        words = f"rank {rank} ended with {'signal' if code < 0 else 'status'} {abs(code)}"  # 9: kill -9
        say(words)  # main.py has given its reason, if it could
        if failure.error_file != "<N/A>":  # main.py has written its sentence for the launcher
            words = " ".join(str(failure.message).split())  # in one line
            status = 1 if code == -15 else status  # it was ending by itself when SIGTERM came
        return status, words, LOST in words  # True: the reason is that of another process
    except SignalException as error:  # main.py has saved a checkpoint
        if watch.given_up:  # Watch.check() sent the signal
            return 1, watch.given_up, True  # with 1 MAX_RETRIES tries again
        return 128 + error.sigval, f"stopped by {signal.Signals(error.sigval).name}", False  # 143 for SIGTERM
    except (ConnectionError, DistError) as error:  # between the meeting and the start of main.py
        words = f"the launchers cannot meet at {PLACE}: {' '.join(str(error).split())[:300]}"  # the port is taken, say
        say(words)  # instead of a traceback
        return 1, words, False  # with 1 MAX_RETRIES tries again
    return 0, "", False  # trained to the end

def main(flags):  # flags (list of str): main.py's
    """Check, meet, launch, watch. Raises: SystemExit with the status of this machine's part."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the meeting without a traceback
    check(os.environ["GPUS"], os.environ["OUTPUT_DIR"])  # settings that only this machine needs
    if TOTAL == 1:  # a launcher around a single process would keep signals from it
        os.execv(sys.executable, [sys.executable, TRAINER, *flags])  # becomes main.py
    if MAX_RETRIES:  # without it this process launches by itself
        keep_trying()  # returns in a child process
    CLOCK.update(end=time.monotonic() + NODE_WAIT, said=time.monotonic() - 8)  # "waiting" is first said after 2 s
    links = {}  # a single machine has nobody to meet
    if MACHINES > 1:  # over the network
        meet = join if RANK else host  # the main machine counts those that come
        meet()  # before seconds are spent on torch
    fault = load()  # "" if torch is sound
    if MACHINES > 1:  # also without torch: else the others would wait
        links = meet()  # all machines leave this meeting together
    die_if(fault, f"PyTorch or accelerate is {fault}: bash verify_setup.sh says how to mend it")  # with what is missing
    watch = Watch(links, ddp_timeout(flags))  # a thread, not yet started
    if links:  # somebody to watch
        watch.start()  # calls run()
    outcome = train(watch, flags)  # of this machine's processes
    for signum in (signal.SIGTERM, signal.SIGINT):  # torch's handlers would raise a SignalException
        signal.signal(signum, signal.SIG_DFL)  # ends the wait for a reason at once
    sys.exit(watch.finish(*outcome))  # 0 only when all was trained

if __name__ == "__main__":  # not when a test imports it
    main(sys.argv[1:])  # does not return
