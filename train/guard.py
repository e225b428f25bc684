"""Ranks that look after each other, so that none waits for one that will never come.

Every rank has a guard: two threads, and a connection of its own to the store that all ranks reach.
It counts up the rank's pulse there, looks at the pulse of the next rank, and for a last word: what
the first rank to fail has left. The main thread promises when it will be heard of again; where it
waits for the others it owes nothing. Where it does not hear a last word, as it is deep in a library
that waits for the GPU, the guard ends the process. Nothing here loads torch.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass

from nanofuse.train.errors import RunBroken

START_SECONDS = 3600  # to build caches, train a tokenizer and compile; to evaluate, sample and save
SILENT_SECONDS = 15  # without a pulse, after which a rank counts as gone
DEAF_SECONDS = 10  # for the main thread to hear a last word
PULSE_SECONDS = 0.5
TOLD_SECONDS = 3  # for the first rank to fail to print its line, and for the others to hear of it
LAST_WORD = "last word"
TOLD = "told"
PARTED = "parted"


@dataclass(frozen=True)
class LastWord:
    """What a rank leaves that ends before the others: its line, and the exit code for all."""

    rank: int
    code: int
    line: str


class Guard:
    """The guard of one rank.

    Args:
        store: torch.distributed.Store, a connection of the guard's own.
        rank, world: of this process.
        parent: id of the process that started the ranks and forwards signals, or None: where it is
            gone, the rank gets a SIGTERM.

    Attributes:
        word: another rank's LastWord that ends this one as well, or None.
    """

    def __init__(self, store, rank, world, parent=None):
        self.store, self.rank, self.world, self.parent = store, rank, world, parent
        self.word = self.heard = self.ends = None  # when it was heard, and what to say then
        self.cut_off = False  # from the store
        self.lock = threading.Lock()  # of the store's connection
        self.main = threading.main_thread()
        self.promise = threading.Lock()  # of `limit` and whether it is published
        self.limit, self.grace, self.waits = START_SECONDS, 0.0, 0
        self.since = time.monotonic()  # the main thread was last heard of
        self.contact = time.monotonic()  # with the store
        self.count, self.published, self.changed = 0, threading.Event(), threading.Event()
        self.next, self.next_pulse, self.next_seen = (rank + 1) % world, None, self.contact
        self.stopped = threading.Event()
        self._beat()  # before anybody looks

    def start(self):
        """Begin to watch; all ranks have a pulse by now."""
        self.next_seen = time.monotonic()
        for work in (self._pulse, self._watch):
            threading.Thread(target=work, name="guard", daemon=True).start()

    def stop(self):
        """End; whatever the others do no longer concerns this rank."""
        self.stopped.set()

    # what the main thread calls

    def allow(self, seconds):
        """The main thread will be heard of again within so many seconds of work: by another
        `allow`, or as it waits for the others."""
        with self.promise:
            before, self.limit, self.since = self.limit, seconds, time.monotonic()
            if before == seconds:
                return
            self.published.clear()
        self.changed.set()
        if seconds > max(before, SILENT_SECONDS):
            # the others are to know before a library keeps this process's threads from running
            self.published.wait(SILENT_SECONDS)

    @contextlib.contextmanager
    def waiting(self):
        """Within the context the main thread waits for the other ranks."""
        self.waits += 1
        try:
            yield
        finally:
            self.since = time.monotonic()
            self.waits -= 1

    @contextlib.contextmanager
    def patient(self, seconds):
        """Within the context the main thread may take so much longer, as it waits for something
        else than a rank."""
        self.grace += seconds
        try:
            yield
        finally:
            self.since = time.monotonic()
            self.grace -= seconds

    def check(self):
        """Raise where another rank has left its last word.

        Raises:
            RunBroken: it has.
        """
        if self.word is not None:
            raise RunBroken(self.ends, self.word.code)

    def listen(self):
        """As check, after time for a last word to arrive."""
        until = time.monotonic() + 3 * PULSE_SECONDS
        while self.word is None and time.monotonic() < until:
            time.sleep(PULSE_SECONDS / 10)
        self.check()

    def claim(self, code, line):
        """Leave a last word; the LastWord that all others hear: this one, or an earlier one.

        Where the store is gone, it is this one.
        """
        mine = LastWord(self.rank, code, line)
        left = self._ask(lambda: self.store.compare_set(LAST_WORD, "", _text(mine)))
        return LastWord(**json.loads(left)) if left else mine

    def tell(self):
        """The line of this rank's last word is printed; the others may print theirs."""
        self._ask(lambda: self.store.set(TOLD, "1"))

    def wait_for_the_first(self):
        """Wait until the first rank to fail has printed its line; a moment at most."""
        until = time.monotonic() + TOLD_SECONDS
        while time.monotonic() < until and not self.cut_off:
            if self._ask(lambda: self.store.check([TOLD])):
                return
            time.sleep(0.02)

    def part(self):
        """The last call of a rank that fails. Rank 0, with whom the store may go, waits a moment
        until all others have heard."""
        if self.rank:
            self._ask(lambda: self.store.add(PARTED, 1))
            return
        until = time.monotonic() + TOLD_SECONDS
        while time.monotonic() < until and not self.cut_off:
            if self._ask(lambda: self.store.add(PARTED, 0)) == self.world - 1:
                return
            time.sleep(0.02)

    def _ask(self, question):
        """What the store answers; None where it does not within TOLD_SECONDS."""
        answers = []
        if self.cut_off:
            return None

        def ask():
            with contextlib.suppress(RuntimeError), self.lock:
                answers.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(TOLD_SECONDS)
        return answers[0] if answers else None

    # what the two threads do

    def _beat(self):
        self.count += 1
        self.store.set(f"pulse {self.rank}", json.dumps([self.count, self.limit]))

    def _pulse(self):
        """Talk to the store, which may take for ever where its host has stopped."""
        while not self.stopped.is_set():
            self.changed.wait(PULSE_SECONDS)
            self.changed.clear()
            try:
                with self.lock:
                    limit = self.limit
                    self._beat()
                    self._look()
            except RuntimeError as error:
                self._miss(f"rank 0's store is gone ({_first_line(error)})")
                return
            self.contact = time.monotonic()
            with self.promise:
                if limit == self.limit:
                    self.published.set()

    def _look(self):
        if self.word is None and self.store.check([LAST_WORD]):
            word = LastWord(**json.loads(self.store.get(LAST_WORD)))
            if word.rank != self.rank:
                self._hear(word)
        pulse, now = self.store.get(f"pulse {self.next}"), time.monotonic()
        if pulse != self.next_pulse:
            self.next_pulse, self.next_seen = pulse, now
        limit = max(json.loads(pulse)[1], SILENT_SECONDS)
        if self.word is None and now - self.next_seen > limit:
            line = f"rank {self.next} gives no sign of life for {limit:.0f} s"
            word = LastWord(self.next, 1, line)
            if json.loads(self.store.compare_set(LAST_WORD, "", _text(word))) == asdict(word):
                print(f"error: {line}", file=sys.stderr, flush=True)
                self.store.set(TOLD, "1")
            self._hear(word)

    def _hear(self, word):
        if self.word is None:
            self.ends = f"rank {self.rank} ends with rank {word.rank}"
            self.word, self.heard = word, time.monotonic()

    def _miss(self, what):
        """The store does not answer, so that this rank decides by itself."""
        if self.word is None:
            self.cut_off = True
            self._hear(LastWord(0, 1, what))
            self.ends += f", as {what}"

    def _watch(self):
        """Look after the main thread, and after the thread that talks to the store."""
        before = time.monotonic()
        while not self.stopped.wait(PULSE_SECONDS):
            now = time.monotonic()
            if now - before > 4 * PULSE_SECONDS:  # this process did not run: nobody's fault
                lost = now - before
                self.since, self.contact = self.since + lost, self.contact + lost
                self.next_seen += lost
            before = now
            if self.parent and os.getppid() != self.parent:
                self.parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            if self.word is None and now - self.contact > SILENT_SECONDS:
                silent = f"gives no sign of life for {SILENT_SECONDS} s"
                if self.rank == 1:  # one says it for all, as the store cannot
                    print(f"error: rank 0 {silent}", file=sys.stderr, flush=True)
                self._miss(f"rank 0's store {silent}")
            if self.word is not None and now - self.heard > DEAF_SECONDS:
                self._end(self.word.code, self.ends)
            if self.word is None and not self.waits and now - self.since > self.limit + self.grace:
                seconds = now - self.since
                line = f"rank {self.rank} hangs since {seconds:.0f} s, {self._place()}"
                if self.claim(1, line).rank == self.rank:
                    line = f"error: {line}"
                self._end(1, line)

    def _place(self):
        """Where the main thread is, in words."""
        frame = sys._current_frames().get(self.main.ident)
        calls = traceback.extract_stack(frame)
        ours = [c for c in calls if os.sep + "train" + os.sep in c.filename] or calls
        return f"in {ours[-1].name} ({os.path.basename(ours[-1].filename)}:{ours[-1].lineno})"

    def _end(self, code, line):
        if not self.stopped.is_set():
            print(line, file=sys.stderr, flush=True)
            if line.startswith("error: "):
                self.tell()
            if not self.stopped.is_set():
                os._exit(code)


class NoGuard:
    """Of a run of one process."""

    def allow(self, seconds):
        pass

    def patient(self, seconds):
        return contextlib.nullcontext()

    def stop(self):
        pass


def _text(word):
    return json.dumps(asdict(word))


def _first_line(error):
    return str(error).split("\n")[0][:100]
