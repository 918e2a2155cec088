"""Compiles the kernels ahead of time, without a GPU, and compares what they take with limits.

    python -m hybrid_cache.kernels.triton_kernels.aot --arch 80 --arch 90 [--module ssd] [--json FILE]

A kernel module lists `SPECS`: its kernels in the types and block sizes that large models use. Ends with 1 when a kernel
does not compile or breaks a limit. Needs a process in which TRITON_INTERPRET is not set.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybrid_cache.kernels import triton_kernels

ARCHITECTURES = (80, 90)
SHARED = {80: 160 << 10, 90: 227 << 10}  # bytes that one program may take
MAX_REGISTERS = 255


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a program may take."""

    registers: int = MAX_REGISTERS  # of a thread
    spills: int = 0  # bytes of local memory of a thread
    shared: int | None = None  # bytes; None for SHARED
    tensor_cores: bool = False  # True: has to use them


@dataclass(frozen=True, slots=True)
class Spec:
    """A kernel as one launch would compile it.

    signature: argument -> "*bf16", "*fp32", "*i64", "i32", "fp32" ...; pointers count as multiples of 16 bytes,
    "i32:16" is an integer that is a multiple of 16, "constexpr" may be left out for what `constexprs` names
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    limits: Mapping[int, Limit] = field(default_factory=dict)
    label: str = ""  # distinguishes two specs of a kernel
    archs: Sequence[int] = ARCHITECTURES  # that launch it so

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return f"{name} {self.label}".strip()

    def limit(self, arch: int) -> Limit:
        return self.limits.get(arch, Limit())


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes. `error` is empty unless it did not compile."""

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    tensor_cores: str  # "wgmma", "mma" or ""
    seconds: float
    error: str
    broken: tuple[str, ...]  # limits


def compile_all(specs: Sequence[Spec], archs: Sequence[int] = ARCHITECTURES) -> list[Resources]:
    return [compile_one(spec, arch) for spec in specs for arch in archs if arch in spec.archs]


def compile_one(spec: Spec, arch: int) -> Resources:
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are Python functions here")
    started = time.perf_counter()
    try:
        compiled = triton.compile(
            _source(spec),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True},
        )
    except Exception as error:  # the compiler raises many kinds
        text = f"{type(error).__name__}: {error}"
        return Resources(spec.name, arch, 0, 0, 0, "", time.perf_counter() - started, text, ("does not compile",))
    registers, spills = _usage(compiled.asm["cubin"])
    shared, tensor_cores = int(compiled.metadata.shared), _tensor_cores(compiled.asm["ptx"])
    broken = tuple(_broken(spec.limit(arch), arch, registers, spills, shared, tensor_cores))
    seconds = time.perf_counter() - started
    return Resources(spec.name, arch, registers, spills, shared, tensor_cores, seconds, "", broken)


def signature_of(spec: Spec) -> dict[str, str]:
    """Argument -> type, in the order of the kernel; raises ValueError for what is missing or too much."""
    names = spec.kernel.arg_names
    unknown = ({*spec.signature} | {*spec.constexprs}) - {*names}
    missing = {*names} - {*spec.signature} - {*spec.constexprs}
    if unknown or missing:
        raise ValueError(f"{spec.name}: no such arguments {sorted(unknown)}, no type for {sorted(missing)}")
    return {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in names}


def _source(spec: Spec) -> ASTSource:
    types = signature_of(spec)
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*") or kind.endswith(":16")]
    return ASTSource(
        fn=spec.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=dict(spec.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """-> registers, bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], max(found["STACK"], found["LOCAL"])


def _tensor_cores(ptx: str) -> str:
    if "wgmma.mma_async" in ptx:
        return "wgmma"
    return "mma" if re.search(r"\bmma\.sync", ptx) else ""


def _broken(limit: Limit, arch: int, registers: int, spills: int, shared: int, tensor_cores: str) -> Iterator[str]:
    most_shared = SHARED.get(arch, max(SHARED.values())) if limit.shared is None else limit.shared
    if registers > limit.registers:
        yield f"{registers} registers, limit {limit.registers}"
    if spills > limit.spills:
        yield f"{spills} bytes of local memory, limit {limit.spills}"
    if shared > most_shared:
        yield f"{shared} bytes of shared memory, limit {most_shared}"
    if limit.tensor_cores and not tensor_cores:
        yield "no tensor cores"


def specs_by_module(only: Sequence[str] = ()) -> dict[str, list[Spec]]:
    """The kernel modules that are there, or the named ones -> their specs."""
    names = only or [found.name for found in pkgutil.iter_modules(triton_kernels.__path__) if found.name != "aot"]
    modules = {name: importlib.import_module(f"{triton_kernels.__name__}.{name}") for name in names}
    return {name: list(getattr(module, "SPECS", ())) for name, module in modules.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels and check their limits; no GPU needed.")
    parser.add_argument("--arch", type=int, action="append", help="80, 90; may be given again")
    parser.add_argument("--module", action="append", help="ssd, matmul ...; may be given again; default: all")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}")
    found: dict[str, list[Resources]] = {}
    for module, specs in specs_by_module(options.module or ()).items():
        found[module] = []
        for spec in specs:
            for resources in compile_all([spec], options.arch or ARCHITECTURES):
                found[module].append(resources)
                print(_line(module, resources), flush=True)
    if options.json:
        table = {module: [asdict(resources) for resources in rows] for module, rows in found.items()}
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")
    return int(any(resources.broken for rows in found.values() for resources in rows))


def _line(module: str, found: Resources) -> str:
    line = (
        f"sm_{found.arch} {module + '.' + found.name:<48} {found.registers:>4} registers {found.spills:>5} B local"
        f" {found.shared / 1024:>6.1f} KB shared {found.tensor_cores:<5} {found.seconds:>5.1f} s"
    )
    return f"{line}  BROKEN: {'; '.join(found.broken)} {found.error}".rstrip() if found.broken else line


if __name__ == "__main__":
    sys.exit(main())
