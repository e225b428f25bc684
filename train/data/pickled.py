"""nanochat's tokenizer.pkl, a pickled tiktoken.core.Encoding.

A pickle is a program, and may call whatever it names. This one is not run: its opcodes are read one
by one, and the few that an encoding needs make str, bytes, int, tuple and dict. Names of classes
and functions are compared, never looked up, and everything else is refused.
"""

import enum
import os
import pickle
import pickletools
import warnings

from nanofuse.train.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.schemas import read_bounded

PICKLE = "tokenizer.pkl"
PROTOCOL = 4  # of what is written
FIELDS = ("name", "pat_str", "mergeable_ranks", "special_tokens")
# A million tokens take 15 MB and three million opcodes in protocol 4.
MAX_BYTES = 2**25
MAX_OPCODES = 2**22
MAX_STACK = 2**12  # pickle writes a dict in lots of a thousand pairs
MAX_MARKS = 2**4

VALUES = {"INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2", "UNICODE", "BINUNICODE",
          "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}  # fmt: skip
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
GETS = {"GET", "BINGET", "LONG_BINGET"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Known(enum.Enum):
    """What a pickle may name; a stand-in, which cannot be called."""

    ENCODING = "tiktoken.core Encoding"
    RECONSTRUCTOR = "copyreg _reconstructor"  # protocols 0 and 1 make an object with it
    OBJECT = "builtins object"
    ENCODE = "_codecs encode"  # protocols 0 to 2 make bytes with it


OLD_MODULES = {"copy_reg": "copyreg", "__builtin__": "builtins"}  # Python 2's, up to protocol 2


class Built:
    """Stands for the encoding; `state` is what would be given to it."""

    state = None


def _known(module, name):
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it asks for something that has no name")
    try:
        return Known(f"{OLD_MODULES.get(module, module)} {name}")
    except ValueError:
        raise ValueError(f"it asks for {module:.40}.{name:.40}, which is not looked up") from None


class Reader:
    """The stack machine that a pickle is a program of, with plain values only."""

    def __init__(self, content):
        self.content = content
        self.stack, self.outer = [], []  # values since the last mark; those before each mark
        self.memo = {}
        self.encoded = 0  # bytes made so far

    def read(self):
        """State of the only object.

        Raises:
            ValueError: what is wrong with it.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in text
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.content)):
                if opcode.name == "STOP":
                    break
                if count >= MAX_OPCODES:
                    raise ValueError(f"it has more than {MAX_OPCODES:,} opcodes")
                self._do(opcode.name, argument)
                if len(self.stack) > MAX_STACK:
                    raise ValueError(f"it puts more than {MAX_STACK:,} values on its stack")
        if self.outer or len(self.stack) != 1 or not isinstance(self.stack[0], Built):
            raise ValueError("it holds no encoding of tiktoken")
        return self.stack[0].state

    def _do(self, name, argument):
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name in PUTS:
            self.memo[argument] = self._top()
        elif name in GETS:
            if argument not in self.memo:
                raise ValueError("it takes a value that it has not kept")
            stack.append(self.memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self._take(2) if name == "SETITEM" else self._since_mark()
            self._set(self._top(), pairs)
        elif name in ("EMPTY_DICT", "DICT"):
            made = {}
            self._set(made, self._since_mark() if name == "DICT" else [])
            self.stack.append(made)
        elif name == "TUPLE":
            items = self._since_mark()
            self.stack.append(tuple(items))
        elif name in TUPLES:
            stack.append(tuple(self._take(TUPLES[name])))
        elif name == "NONE":
            stack.append(None)
        elif name == "MARK":
            if len(self.outer) == MAX_MARKS:
                raise ValueError("it is nested too deeply")
            self.outer.append(stack)
            self.stack = []
        elif name == "GLOBAL":
            stack.append(_known(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_known(*self._take(2)))
        elif name in ("NEWOBJ", "REDUCE"):
            stack.append(self._made(name, *self._take(2)))
        elif name == "BUILD":
            (state,) = self._take(1)
            built = self._top()
            if not isinstance(built, Built) or built.state is not None:
                raise ValueError("it gives a state to what is no encoding, or has one")
            built.state = state
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has {name}, which no encoding needs")

    def _top(self):
        if not self.stack:
            raise ValueError("it takes a value from an empty stack")
        return self.stack[-1]

    def _take(self, count):
        if len(self.stack) < count:
            raise ValueError("it takes a value from an empty stack")
        at = len(self.stack) - count
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def _since_mark(self):
        if not self.outer:
            raise ValueError("it lacks a mark")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def _set(self, target, pairs):
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError("it sets items of what is no dict")
        keys = pairs[::2]
        if not all(type(key) in (str, bytes) for key in keys):  # a tuple's hash may take forever
            raise ValueError("it has a key that is neither text nor bytes")
        target.update(zip(keys, pairs[1::2], strict=True))

    def _made(self, name, function, arguments):
        if type(arguments) is tuple:
            if name == "NEWOBJ" and function is Known.ENCODING and not arguments:
                return Built()
            if function is Known.RECONSTRUCTOR:
                if arguments == (Known.ENCODING, Known.OBJECT, None):
                    return Built()
            elif function is Known.ENCODE and [type(a) for a in arguments] == [str, str]:
                self.encoded += len(arguments[0])
                if arguments[1] == "latin1" and self.encoded <= len(self.content):
                    return arguments[0].encode("latin1")
        raise ValueError("it makes what is neither an encoding nor bytes")


def _tokenizer(state):
    """The Tokenizer of an encoding's state; ValueError where this project's would not be it."""
    if isinstance(state, str):
        raise ValueError(f"it is only the name {state!r:.50} of an encoding of tiktoken's own")
    if type(state) is not dict or set(state) != set(FIELDS):
        raise ValueError(f"it does not hold {', '.join(FIELDS)}")
    pattern, ranks, specials = (state[name] for name in FIELDS[1:])
    for name, found, key in (("mergeable_ranks", ranks, bytes), ("special_tokens", specials, str)):
        if type(found) is not dict or not all(
            type(token) is key and token and type(rank) is int for token, rank in found.items()
        ):
            raise ValueError(f"its {name} are not {key.__name__} with a number each")
    tokens = sorted(ranks, key=ranks.get)
    for place, token in enumerate(tokens):
        if ranks[token] != place:
            raise ValueError(f"its ranks are not 0 to {len(tokens) - 1}: {place} is missing")
    expected = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
    if others := sorted(specials.keys() ^ expected.keys()):
        shown = ", ".join(ascii(name)[1:-1] for name in others[:3])
        raise ValueError(f"its special tokens are not nanochat's nine: {shown:.100}")
    if specials != expected:
        raise ValueError("its special tokens do not follow the merges in nanochat's order")
    return Tokenizer.checked(tokens, pattern)


def load_pickled(path):
    """The Tokenizer of a tokenizer.pkl; nothing in the file is executed.

    Raises:
        UserError: the file is missing, or is none, or of a tokenizer with other special tokens.
    """
    path = os.fspath(path)
    hint = "name nanochat's tokenizer.pkl or nanofuse's tokenizer.json as --tokenizer"
    try:
        return _tokenizer(Reader(read_bounded(path, MAX_BYTES)).read())
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {path}; {hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not nanochat's tokenizer ({reason:.200}); {hint}") from None


def pickled(tokenizer):
    """Content of a tokenizer.pkl: a tiktoken.core.Encoding that gives the same tokens."""
    return pickle.dumps(tokenizer.encoding, PROTOCOL)
