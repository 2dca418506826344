"""Decides by Rego: OPA compiled the policies to policy.wasm, wasmtime runs it; anything but a clean `true` is a denial.

A decision may spend so much fuel (instructions) and memory, not time: the same question gets the same verdict on a busy
machine, and nothing here needs a clock or a thread. Refuses a module that needs a built-in function that is not here.
Source: OPA documentation, "WebAssembly", ABI 1.3; Wasmtime, Config::consume_fuel.
"""

import ctypes
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
import wasmtime
from wasmtime import _ffi as ffi
from wasmtime._func import enter_wasm

from sidecar.core import builtins
from sidecar.core.authorise import Question, Verdict
from sidecar.core.builtins import values
from sidecar.core.bundle import ALLOW, REASONS
from sidecar.core.projection import WHOLE, Projection
from sidecar.errors import BundleError

FUEL: Final = 100_000_000  # about 60 ms; the article's rules spend 0.03 million
FUEL_PER_BYTE: Final = 200  # on top, for reading the input: text spends 43 a byte, many small members 150
LOAD_FUEL: Final = 20 * FUEL  # for data.json
MEMORY_BYTES: Final = 64 * 2**20  # many small members take 35 times their text, one long string 3 times
KEPT_BYTES: Final = 8 * 2**20  # beyond what the data needs; an instance that grew more is thrown away after the call
PAGE_BYTES: Final = 64 * 2**10
ABI: Final = (1, 2)  # opa_eval came with 1.2
EVAL_ARITY: Final = 7
MAX_ARITY: Final = 4  # of a built-in function, as the ABI has it
CALL_FUEL: Final = 200_000  # what a built-in function in Python costs, about 0.1 ms
CALL_FUEL_PER_BYTE: Final = 100  # and for each byte of its arguments, about 50 ns
_I32: Final = wasmtime.ValType.i32()


class Trap(Exception):  # noqa: N818 - WebAssembly's word
    """The policy gave up: a conflict of rules, no fuel or no memory left."""


def _configuration() -> wasmtime.Config:
    config = wasmtime.Config()
    config.consume_fuel = True
    return config


_MACHINE: Final = wasmtime.Engine(_configuration())


def compile(wasm: bytes) -> bytes:  # noqa: A001 - the term of the trade; the builtin has no business here
    """Return *wasm* as machine code for `load`: made in a child, it saves this process the compiler's 20 MB.

    Raises BundleError.
    """
    return bytes(_compiled(wasm).serialize())


def _compiled(wasm: bytes) -> wasmtime.Module:
    try:
        return wasmtime.Module(_MACHINE, wasm)
    except wasmtime.WasmtimeError as error:
        raise BundleError(f"policy.wasm: does not compile: {str(error).splitlines()[0]}") from error


def _mapped(path: str) -> wasmtime.Module:
    try:
        return wasmtime.Module.deserialize_file(_MACHINE, path)
    except wasmtime.WasmtimeError as error:
        raise BundleError(f"policy.wasm: its compiled form is not of this machine: {error}") from error


class RegoEngine:
    """An Engine over one policy.wasm and its data. Not thread-safe; mutated by decide only."""

    name = "rego"

    def __init__(
        self,
        wasm: bytes,
        *,
        data: bytes = b"{}",
        compiled: str | None = None,
        projection: Projection = WHOLE,
        fuel: int = FUEL,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Load *wasm*, or the file *compiled* that `compile` made of it here: its code is trusted like this process's.

        *fuel* and *memory_bytes* are what one decision may spend. Raises BundleError.
        """
        self._module = _compiled(wasm) if compiled is None else _mapped(compiled)
        self._data, self._projection = data, projection
        self._fuel, self._memory_bytes = fuel, memory_bytes
        self._instance: _Instance | None = self._instantiate()
        if ALLOW not in self._instance.entrypoints:
            raise BundleError(f"policy.wasm: has no entrypoint {ALLOW}")

    def __del__(self) -> None:
        if getattr(self, "_instance", None) is not None:
            self._instance.close()  # type: ignore[union-attr] # a new bundle took our place

    def decide(self, question: Question) -> Verdict:
        """Return the verdict; policies are the strings of `reasons`, or the rule's name."""
        try:
            document = _encode(self._projection.part_of(question))
        except ValueError as error:
            return Verdict(allowed=False, errors=(f"rego: the input is not JSON: {error}",))
        try:
            instance = self._instance or self._instantiate()
        except BundleError as error:
            return Verdict(allowed=False, errors=(f"rego: {error}",))
        self._instance = None  # gone unless it comes back whole
        try:
            allowed = _is_true(instance.evaluate(ALLOW, document, question.time_ns))
            reasons = instance.evaluate(REASONS, document, question.time_ns) if REASONS in instance.entrypoints else []
        except Trap as error:
            instance.close()
            return Verdict(allowed=False, errors=(f"rego: {error}",))
        if instance.has_grown:
            instance.close()
        else:
            self._instance = instance
        return Verdict(allowed=allowed, policies=_names(reasons) or (("data.mcp.authz.allow",) if allowed else ()))

    def _instantiate(self) -> "_Instance":
        return _Instance(self._module, self._data, self._fuel, self._memory_bytes)


def _encode(document: Any) -> bytes:
    try:
        return orjson.dumps(document)
    except TypeError:  # an integer beyond 64 bits: Rego's numbers have no bounds
        return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()


def _is_true(results: Any) -> bool:
    match results:
        case [{"result": True}]:  # compares by identity: 1 is not true
            return True
        case _:
            return False


def _names(results: Any) -> tuple[str, ...]:
    match results:
        case [{"result": [*reasons]}]:
            return tuple(sorted(str(reason) for reason in reasons))
        case _:
            return ()


class _Instance:
    """One instance of the module with its data loaded; every evaluation starts from the same heap."""

    def __init__(self, module: wasmtime.Module, data: bytes, fuel: int, memory_bytes: int) -> None:
        self._fuel = fuel
        self._store = wasmtime.Store(_MACHINE)
        self._store.set_fuel(LOAD_FUEL)
        self._store.set_limits(memory_size=memory_bytes)
        self._time_ns = 0
        try:
            pages = wasmtime.Limits(2, memory_bytes // PAGE_BYTES)
            self._memory = wasmtime.Memory(self._store, wasmtime.MemoryType(pages))
            links = self._links()
            imports = [links[each.name or ""] for each in module.imports]
            self._exports = wasmtime.Instance(self._store, module, imports).exports(self._store)
            self._check_abi()
            self.entrypoints = {name: int(index) for name, index in self._table("entrypoints").items()}
            self._builtins = _known(self._table("builtins"))
            self._data = self._parse(data)
            self._heap = self._call("opa_heap_ptr_get")
            evaluate = self._function("opa_eval")
        except (wasmtime.WasmtimeError, wasmtime.Trap, KeyError, IndexError, ValueError, Trap) as error:
            self.close()
            raise BundleError(f"policy.wasm: cannot be loaded: {_cause(error)}") from error
        self._look()
        self._grown_bytes = self._size_bytes + KEPT_BYTES
        self._evaluate = _caller(self._store, evaluate)

    def close(self) -> None:
        """Give the memory back. The package keeps host functions while their store lives, and they keep the store."""
        self._store.close()

    @property
    def has_grown(self) -> bool:
        """Whether a call took more memory than is worth keeping: WebAssembly's memory never shrinks."""
        return self._size_bytes > self._grown_bytes

    def evaluate(self, entrypoint: str, document: bytes, time_ns: int) -> Any:
        """Return OPA's result set for *entrypoint*, `[]` when undefined; raises Trap, after which all is undefined."""
        try:
            return orjson.loads(self.evaluate_raw(entrypoint, document, time_ns))
        except ValueError as error:
            raise Trap(_cause(error)) from error

    def evaluate_raw(self, entrypoint: str, document: bytes, time_ns: int, *, as_rego: bool = False) -> bytes:
        """Return the same as JSON, or as Rego's own values, sets among them; an empty *document* is no input."""
        heap, size_bytes = self._heap, len(document)
        self._time_ns, end = time_ns, heap + size_bytes
        try:
            missing_bytes = end - self._size_bytes
            if missing_bytes > 0:
                self._memory.grow(self._store, -(-missing_bytes // PAGE_BYTES))
                self._look()
            ctypes.memmove(self._base + heap, document, size_bytes)
            self._store.set_fuel(self._fuel + FUEL_PER_BYTE * size_bytes)
            result = self._evaluate(0, self.entrypoints[entrypoint], self._data, heap, size_bytes, end, int(as_rego))
            if self._memory.data_len(self._store) != self._size_bytes:
                self._look()
            return _text(self._base, self._size_bytes, result)
        except (wasmtime.WasmtimeError, wasmtime.Trap, Trap, ValueError) as error:
            error.__traceback__ = None  # the package's frames hold their exception, and so would hold us
            raise Trap(_cause(error)) from error

    def _look(self) -> None:
        """See where the memory is and how large: both stay until it grows, and asking costs as much as a small policy."""
        self._size_bytes, self._base = self._memory.data_len(self._store), self._address()

    def _address(self) -> int:
        return ctypes.addressof(self._memory.data_ptr(self._store).contents)

    def _text(self, at: int) -> bytes:
        return _text(self._address(), self._memory.data_len(self._store), at)

    def _function(self, name: str) -> wasmtime.Func:
        function = self._exports[name]
        if not isinstance(function, wasmtime.Func):
            raise ValueError(f"{name} is no function")  # noqa: TRY004 - the module's fault, not a caller's
        return function

    def _call(self, name: str, *arguments: int, caller: wasmtime.Caller | None = None) -> int:
        return int(self._function(name)(caller or self._store, *arguments))

    def _parse(self, text: bytes, caller: wasmtime.Caller | None = None, by: str = "opa_json_parse") -> int:
        at = self._call("opa_malloc", len(text), caller=caller)
        ctypes.memmove(self._address() + at, text, len(text))
        value = self._call(by, at, len(text), caller=caller)
        if value == 0:
            raise ValueError("data.json is not JSON")
        return value

    def _check_abi(self) -> None:
        names = ("opa_wasm_abi_version", "opa_wasm_abi_minor_version")
        exports = [self._exports[name] for name in names]
        major, minor = (int(each.value(self._store)) if isinstance(each, wasmtime.Global) else 0 for each in exports)
        if major != ABI[0] or minor < ABI[1]:
            raise ValueError(f"its ABI is {major}.{minor}, expected {ABI[0]}.{ABI[1]} or a later minor version")

    def _table(self, name: str) -> dict[str, Any]:
        table: dict[str, Any] = orjson.loads(self._text(self._call("opa_json_dump", self._call(name))))
        return table

    def _links(self) -> dict[str, wasmtime.Func | wasmtime.Memory]:
        """Return what the module imports: its memory, a way to give up, and the built-in functions by arity."""
        links: dict[str, wasmtime.Func | wasmtime.Memory] = {"memory": self._memory}
        nothing = wasmtime.FuncType([_I32], [])
        links["opa_abort"] = wasmtime.Func(self._store, nothing, self._abort)
        links["opa_println"] = wasmtime.Func(self._store, nothing, lambda _: None)  # a policy's print is for its author
        for arity in range(MAX_ARITY + 1):
            shape = wasmtime.FuncType([_I32] * (2 + arity), [_I32])
            links[f"opa_builtin{arity}"] = wasmtime.Func(self._store, shape, self._run, access_caller=True)
        return links

    def _abort(self, message: int) -> None:
        raise Trap(self._text(message).decode(errors="replace"))

    def _run(self, caller: wasmtime.Caller, index: int, _context: int, *arguments: int) -> int:
        """Answer the module's call of a built-in function: the address of the value, 0 for undefined."""
        texts = [self._text(self._call("opa_value_dump", each, caller=caller)) for each in arguments]
        # Python works while no instruction is counted, so a call is charged what it costs in time.
        cost = CALL_FUEL + CALL_FUEL_PER_BYTE * sum(map(len, texts))
        self._store.set_fuel(max(0, self._store.get_fuel() - cost))
        function = self._builtins[index]
        try:
            answer = self._time_ns if function is None else function(*map(values.read, texts))
            written = values.write(answer).encode()
        except builtins.Undefined:
            return 0
        except builtins.Unknown as error:
            raise Trap(f"a built-in function cannot answer: {error}") from error
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            # A defect of a function must deny; and nesting has its limit in Python.
            raise Trap(f"a built-in function failed: {type(error).__name__}") from error
        return self._parse(written, caller, by="opa_value_parse")


def _text(base: int, size_bytes: int, at: int) -> bytes:
    """Return the bytes from *at* to the next zero; raises ValueError when that is not inside the memory."""
    left = size_bytes - at
    for size in (64, left) if at > 0 else ():  # most texts are short; never read past the end
        text, zero, _ = ctypes.string_at(base + at, max(0, min(size, left))).partition(b"\0")
        if zero:
            return text
    raise ValueError("a text outside the memory")


def _known(table: Mapping[str, int]) -> dict[int, Callable[..., Any] | None]:
    """Return the functions by the module's numbers, None for the time; raises ValueError naming what is missing."""
    missing = sorted(table.keys() - builtins.PURE - builtins.IMPURE)
    if missing:
        raise ValueError(f"built-in functions that are not here: {', '.join(missing)}")
    return {index: builtins.find(name) if name in builtins.PURE else None for name, index in table.items()}


def _cause(error: Exception) -> str:
    if isinstance(error, wasmtime.Trap) and error.trap_code is wasmtime.TrapCode.OUT_OF_FUEL:
        return "spent all its fuel"
    return str(error).strip().splitlines()[-1]


def _caller(store: wasmtime.Store, function: wasmtime.Func) -> Callable[..., int]:
    """Return *function* as a plain callable of integers.

    The package's own call converts each argument anew and looks the types up each time, which costs more than most
    policies do (about 70 us). The C API underneath takes one prepared array.
    """
    try:
        context, callee = store._context(), ctypes.byref(function._func)  # noqa: SLF001 - pinned, and tested
        values, call_unchecked = (ffi.wasmtime_val_raw_t * EVAL_ARITY)(), ffi.wasmtime_func_call_unchecked
    except AttributeError:  # another version of the package
        return lambda *arguments: int(function(store, *arguments))

    def call(*arguments: int) -> int:
        for value, argument in zip(values, arguments, strict=True):
            value.i32 = argument
        with enter_wasm(store) as trap:
            error = call_unchecked(context, callee, values, EVAL_ARITY, trap)
            if error:
                raise wasmtime.WasmtimeError._from_ptr(error)  # noqa: SLF001 - same
        return int(values[0].i32)

    return call
