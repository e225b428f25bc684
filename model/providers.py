"""Who may compute attention and the FP8 products: a record each, and the choice between them.

The order of a registry is the order in which "auto" tries its records. A new provider is a record
here and the class that its `made_by` names. Nothing here loads torch or a library before it is
chosen, so that --help is quick.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

BACKENDS = ("eager", "compile", "fused")  # that a model may run on


@dataclass(frozen=True)
class Need:
    """What a run asks of a provider."""

    backend: str  # of BACKENDS
    device: str  # "cuda", "cpu", ...
    capability: tuple[int, int]  # compute capability; (0, 0) without a GPU
    dtypes: tuple[str, ...]  # "fp8", "bf16", "fp32": it has to take one of them


@dataclass(frozen=True)
class Provider:
    """A library's way to compute something, and what it serves."""

    name: str  # the flag's value
    title: str  # of the library, for messages
    made_by: str  # "module:Class" of this project; imported when it is chosen
    library: str = ""  # module of the library, which must load; "": torch suffices
    install: str = ""  # how to get the library
    backends: tuple[str, ...] = BACKENDS
    by_name: tuple[str, ...] = ()  # backends for which "auto" passes it over
    dtypes: tuple[str, ...] = ("bf16", "fp32")  # of what it computes on
    cuda_only: bool = True
    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 0))  # lowest, highest

    def refusal(self, need: Need) -> str | None:
        """Why it cannot serve `need`, to stand behind its name; None if it can."""
        lowest, highest = self.capabilities
        wanted = f"compute capability {_version(lowest)}"
        wanted += "" if lowest == highest else " or later"
        if self.cuda_only and need.device != "cuda":
            return "needs a CUDA GPU" + (f" of {wanted}" if lowest > (0, 0) else "")
        if need.device == "cuda" and not lowest <= need.capability <= highest:
            return f"needs {wanted}, this GPU has {_version(need.capability)}"
        if need.backend not in self.backends:
            return f"serves {' and '.join(self.backends)}, not {need.backend}"
        if not set(self.dtypes) & set(need.dtypes):
            return f"takes {' and '.join(self.dtypes)}, not {' or '.join(need.dtypes)}"
        return None

    def make(self, *args: Any) -> Any:
        """A new object of its class, with its library loaded; raises whatever that raises."""
        module, _, name = self.made_by.partition(":")
        made = getattr(importlib.import_module(module), name)(*args)
        if self.library:
            importlib.import_module(self.library)
        return made

    def build(self, *args: Any) -> Any:
        """As `make`.

        Raises:
            ValueError: the library is missing or damaged; one line that says how to install it.
        """
        try:
            return self.make(*args)
        except Exception as error:  # a broken install may raise anything
            needs = f"{self.name} needs {self.title}" + (
                f": {self.install}" if self.install else ""
            )
            raise ValueError(f"{needs} ({message_line(error)})") from error

    def explain(self, error: Exception) -> str:
        """What an error of `make` or of a check means, in one line."""
        if isinstance(error, ModuleNotFoundError) and f"{self.library}.".startswith(
            f"{error.name}."
        ):
            return f"{self.name} is not installed: {self.install}"
        return f"{self.name}: {message_line(error)}"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    record: Provider
    made: Any  # object of the record's class
    why: str

    @property
    def name(self) -> str:
        return self.record.name

    def __str__(self) -> str:
        return f"{self.record.name}, {self.record.title}"


ATTENTION = (
    Provider(
        name="fa3",
        title="FlashAttention 3",
        made_by="nanofuse.model.backends.flash:FlashAttention3",
        library="flash_attn_interface",
        install="build hopper/ of github.com/Dao-AILab/flash-attention",
        backends=("eager", "fused"),
        dtypes=("bf16",),
        capabilities=((9, 0), (9, 0)),
    ),
    Provider(
        name="fa4",
        title="FlashAttention 4",
        made_by="nanofuse.model.backends.flash:FlashAttention4",
        library="flash_attn.cute.interface",
        install="pip install flash-attn-4",
        dtypes=("bf16",),
        capabilities=((9, 0), (99, 0)),
    ),
    Provider(
        name="te",
        title="Transformer Engine",
        made_by="nanofuse.model.backends.flash:TransformerEngineAttention",
        library="transformer_engine.pytorch",
        install="pip install 'nanofuse[fp8]'",
        backends=("eager", "fused"),
        dtypes=("bf16",),
    ),
    Provider(
        name="flex",
        title="torch's flex_attention",
        made_by="nanofuse.model.backends.torch_backends:FlexAttention",
    ),
    Provider(
        name="sdpa",
        title="torch's SDPA",
        made_by="nanofuse.model.backends.torch_backends:SDPAttention",
        cuda_only=False,
    ),
)

PRODUCTS = (
    Provider(
        name="nvmath",
        title="nvmath-python",
        made_by="nanofuse.model.fp8.tuned:NvmathGemm",
        library="nvmath",
        install="pip install 'nanofuse[products]'",
        backends=("fused",),
        dtypes=("fp8",),
        capabilities=((8, 9), (99, 0)),
    ),
    Provider(
        name="te",
        title="Transformer Engine",
        made_by="nanofuse.model.fp8.products:TransformerEngineGemm",
        library="transformer_engine.pytorch",
        install="pip install 'nanofuse[fp8]'",
        backends=("fused",),
        dtypes=("fp8",),
        capabilities=((8, 9), (99, 0)),
    ),
    Provider(
        name="torch",
        title="torch._scaled_mm",
        made_by="nanofuse.model.fp8.products:TorchGemm",
        by_name=("eager",),  # eager is the reference
        dtypes=("fp8",),
        capabilities=((8, 9), (99, 0)),
    ),
    Provider(
        name="off-nvmath",
        title="nvmath-python, in bf16",
        made_by="nanofuse.model.fp8.tuned:NvmathPlainGemm",
        library="nvmath",
        install="pip install 'nanofuse[products]'",
        backends=("fused",),
        dtypes=("bf16",),
        capabilities=((8, 0), (99, 0)),
    ),
    Provider(
        name="off",
        title="products in the activations' dtype",
        made_by="nanofuse.model.fp8.products:PlainGemm",
        cuda_only=False,
    ),
)


def in_fp8(name: str) -> bool:
    """Whether products of that name are computed in FP8; "auto", and names of other versions, may
    be."""
    return all("fp8" in record.dtypes for record in PRODUCTS if record.name == name)


def choices(records: Sequence[Provider]) -> tuple[str, ...]:
    """What a flag may name."""
    return ("auto", *(record.name for record in records))


def find(records: Sequence[Provider], name: str) -> Provider:
    """The record of that name.

    Raises:
        ValueError: there is none.
    """
    for record in records:
        if record.name == name:
            return record
    raise ValueError(f"{name} is unknown; choose from {', '.join(choices(records))}")


def choose(
    records: Sequence[Provider],
    name: str,
    need: Need,
    *args: Any,
    refuse: Callable[[Provider], str | None] = lambda record: None,
    check: Callable[[Any], str] | None = None,
) -> Choice:
    """The record named, or the first that works; its object is made once, and handed over.

    Args:
        records: a registry, such as ATTENTION.
        name: of a record, or "auto": the first that serves `need`, loads and passes `check`.
        need: what the run asks for.
        args: what the records' classes are called with.
        refuse: says why a record cannot serve this model; None if it can.
        check: for "auto", tries an object and says how well it did, or raises what is wrong.

    Raises:
        ValueError: an unknown name, or a record that cannot serve; one line. With "auto", none can.
    """
    if name != "auto":
        record = find(records, name)
        if reason := record.refusal(need) or refuse(record):
            raise ValueError(f"{name} {reason}")
        return Choice(record, record.build(*args), "asked for")
    reasons = []
    for record in records:
        if record.cuda_only and need.device != "cuda":
            continue  # all that there is to say is the device
        reason = record.refusal(need) or refuse(record)
        if need.backend in record.by_name:
            reason = f"is for {need.backend} by name only"
        if reason:
            reasons.append(f"{record.name} {reason}")
            continue
        try:
            made = record.make(*args)
            if check:
                reasons.append(f"{record.name} {check(made)}")
        except Exception as error:  # a third-party library may raise anything; goes into the reason
            reasons.append(record.explain(error))
            continue
        why = f"auto on {need.device}"
        return Choice(record, made, f"{why}: {'; '.join(reasons)}" if reasons else why)
    raise ValueError(f"nothing works here: {'; '.join(reasons)}")


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def message_line(error: Exception) -> str:
    """First line of an error's message; the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
