"""Choice of a backend, and the build of the native one."""

import ctypes
import os
import shutil
import warnings
from importlib.util import find_spec

import pytest
import torch

from hybrid_cache.kernels import dispatch, native_library
from hybrid_cache.kernels.native_library import FLAGS, BuildError
from hybrid_cache.kernels.torch_ops import TorchOps
from tests.kernels.compiler import compiler_needed

triton_needed = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def test_torch_is_always_there():
    assert dispatch.available()["torch"] is None
    assert dispatch.select("torch").name == "torch"


@pytest.fixture
def without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_a_device(monkeypatch):
    """One that Triton's kernels run on; no test that asks for it starts one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@compiler_needed
@pytest.mark.usefixtures("without_a_device")
def test_native_is_preferred_without_a_gpu():
    assert dispatch.select().name == "native"


@triton_needed
@pytest.mark.usefixtures("with_a_device")
def test_triton_is_taken_when_it_is_asked_for(monkeypatch):
    assert dispatch.available()["triton"] is None
    assert dispatch.select().name != "triton"
    assert dispatch.select("triton").name == "triton"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert dispatch.select().name == "triton"


@triton_needed
@pytest.mark.usefixtures("with_a_device")
def test_fast_leaves_products_of_triton_to_cublas(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert dispatch.select("triton").inexact == ""
    fast = dispatch.select("triton", fast=True)
    assert "cuBLAS" in fast.inexact
    weight = torch.ones(3, 2)
    assert isinstance(fast.linear(weight), type(TorchOps().linear(weight)))


@pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=compiler_needed)])
def test_fast_changes_nothing_on_a_cpu(name):
    assert dispatch.select(name, fast=True).inexact == ""


@pytest.mark.usefixtures("with_a_device")
def test_triton_needs_its_package(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch.available()["triton"] == "triton not installed"


@triton_needed
@pytest.mark.usefixtures("with_a_device")
def test_triton_needs_a_version_of_its_package(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.4.1+git")
    assert dispatch.available()["triton"] == "triton 3.4.1+git, needs 3.6"
    monkeypatch.setattr("triton.__version__", "3.10.0")
    assert dispatch.available()["triton"] is None


@triton_needed
@pytest.mark.usefixtures("with_a_device")
def test_a_package_that_cannot_be_imported_is_a_reason(monkeypatch):
    def fail(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(dispatch, "import_module", fail)
    assert dispatch.available()["triton"] == "triton cannot be imported: triton: undefined symbol"


@triton_needed
@pytest.mark.usefixtures("with_a_device")
def test_triton_needs_a_card_of_a_generation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert dispatch.available()["triton"] == "CUDA device of compute capability 7.5, needs 8.0"


@triton_needed
def test_trouble_with_a_driver_is_a_reason(monkeypatch):
    def warn():
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    reason = dispatch.available()["triton"]
    assert reason == "no CUDA device; CUDA initialization: the driver is too old"
    assert dispatch.select().name in ("native", "torch")


@triton_needed
@pytest.mark.usefixtures("with_a_device")
def test_a_card_that_cannot_be_used_is_a_reason(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert dispatch.available()["triton"] == "no CUDA device that works: CUDA error: out of memory"


def test_the_environment_decides_when_nobody_asked(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    assert dispatch.select().name == "torch"


@pytest.mark.usefixtures("without_a_device")
@pytest.mark.parametrize("name", ["triton", "mamba_ssm"])
def test_a_missing_backend_is_refused_with_its_reason(name):
    reason = dispatch.available()[name]
    assert reason
    with pytest.raises(dispatch.BackendUnavailable, match=f"{reason}.*usable here: .*torch"):
        dispatch.select(name)


def test_an_unknown_backend_is_refused():
    with pytest.raises(dispatch.BackendUnavailable, match=r"'abacus'.*no such backend.*torch"):
        dispatch.select("abacus")


@pytest.mark.usefixtures("without_a_device")
def test_without_a_compiler_torch_takes_over(monkeypatch):
    monkeypatch.setattr(native_library, "reason_missing", lambda: "no C compiler found")
    assert dispatch.select().name == "torch"
    with pytest.raises(dispatch.BackendUnavailable, match="no C compiler found"):
        dispatch.select("native")


def test_a_machine_without_compilers_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="no C compiler"):
        native_library.find_compiler()


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """An empty folder that takes the place of `native/`."""
    folder = tmp_path / "native"
    folder.mkdir()
    monkeypatch.setattr(native_library, "SOURCES", folder)
    return folder


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@compiler_needed
def test_a_library_is_built_once(sources, cache):
    (sources / "one.c").write_text("int one(void) { return 1; }\n")
    (sources / "two.c").write_text("int one(void);\nint two(void) { return 2 * one(); }\n")
    compiler = native_library.find_compiler()
    first = native_library.build(compiler, FLAGS, cache)
    built_at = first.stat().st_mtime_ns
    assert native_library.build(compiler, FLAGS, cache) == first
    assert first.stat().st_mtime_ns == built_at
    assert os.listdir(cache) == [first.name]
    assert ctypes.CDLL(str(first)).two() == 2


@compiler_needed
def test_a_failed_build_leaves_nothing_and_names_the_error(sources, cache):
    (sources / "broken.c").write_text("int f(void) { return nothing; }\n")
    with pytest.raises(BuildError, match="nothing"):
        native_library.build(native_library.find_compiler(), FLAGS, cache)
    assert os.listdir(cache) == []


@compiler_needed
def test_changed_sources_give_another_library(monkeypatch, tmp_path):
    before = native_library.fingerprint(native_library.find_compiler(), FLAGS)
    copy = tmp_path / "native"
    shutil.copytree(native_library.SOURCES, copy)
    (copy / "rows.c").write_text((copy / "rows.c").read_text() + "\n")
    monkeypatch.setattr(native_library, "SOURCES", copy)
    assert native_library.fingerprint(native_library.find_compiler(), FLAGS) != before


def test_a_cache_folder_that_cannot_be_made_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="no folder"):
        native_library.cache_folder()
