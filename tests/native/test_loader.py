import json
import shutil

import pytest
import torch

from fastmkd import _native_loader


def test_a_compiler_means_compiled_libraries():
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    status = _native_loader.load()
    assert status.cpu, status.cpu_reason
    assert status.cpu_reason is None
    assert status.isa in status.build["isas"]
    assert status.build["torch_abi"] == "2.11"


def test_load_gives_the_same_status_each_time():
    assert _native_loader.load() is _native_loader.load()


def test_status_tells_why_a_library_is_missing():
    status = _native_loader.load()
    for loaded, reason in ((status.cpu, status.cpu_reason), (status.cuda, status.cuda_reason)):
        assert loaded == (reason is None)
        assert reason is None or reason.endswith(".")


def test_a_library_without_file_is_not_built_for_the_reason_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(_native_loader, "LIB", tmp_path)
    assert _native_loader._load("cpu", {"native": "no compiler"}) == "not built: no compiler."
    assert "nvcc was not found" in _native_loader._load("cuda", {"cuda": "nvcc was not found"})
    assert "pip install -e ." in _native_loader._load("cpu", {})


def test_a_broken_library_is_a_reason_not_an_exception(tmp_path, monkeypatch):
    (tmp_path / "libfastmkd_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native_loader, "LIB", tmp_path)
    assert "cannot be loaded" in _native_loader._load("cpu", {})


def test_build_metadata_missing_or_broken(tmp_path):
    assert "build step" in _native_loader.read_build(tmp_path)["skipped"]["native"]
    (tmp_path / "build.json").write_text('{"version": ')
    assert "cannot be read" in _native_loader.read_build(tmp_path)["skipped"]["native"]


def test_build_metadata_of_module_and_file_agree(native):
    assert native.build_info() == json.loads((_native_loader.LIB / "build.json").read_text())


def test_an_isa_that_cannot_run_is_a_reason_and_no_crash(native, child):
    code = "from fastmkd._native_loader import load; s = load(); print(s.cpu, s.cpu_reason)"
    foreign = "avx2" if "neon" in native.available_isas() else "neon"
    for name in ("nonsense", foreign):
        answer = child(code, FASTMKD_ISA=name)
        assert answer.startswith("False")
        assert name in answer
        assert "available: generic" in answer


def test_isa_from_the_environment(native, child):
    code = "from fastmkd import _native; print(_native.active_isa())"
    for name in native.available_isas():
        assert child(code, FASTMKD_ISA=name) == name


@pytest.mark.parametrize("order", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda",)])
def test_libraries_load_in_any_order(native, child, order):
    if "cuda" in order and torch.version.cuda is None:
        pytest.skip("this PyTorch was built without CUDA")
    for name in order:
        if not (_native_loader.LIB / f"libfastmkd_{name}.so").is_file():
            pytest.skip(f"the {name} library was not built")
    code = "import torch\n"
    code += "".join(f"torch.ops.load_library({str(_native_loader.LIB / f'libfastmkd_{n}.so')!r})\n" for n in order)
    code += "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
    code += "print(*[has('fastmkd_native::select_tokens', key) for key in ('CPU', 'CUDA')])"
    assert child(code) == f"{'cpu' in order} {'cuda' in order}"


def test_set_isa(restore_isa):
    native = restore_isa
    for name in native.available_isas():
        native.set_isa(name)
        assert native.active_isa() == name
    with pytest.raises(ValueError, match="does not exist; available: generic"):
        native.set_isa("sse9")
    assert native.active_isa() == native.available_isas()[-1]


def test_self_test(native):
    results = native.self_test()
    assert [r for r in results if not r[1]] == []
    assert {name.split("/")[0] for name, _, _ in results} == set(native.available_isas())
