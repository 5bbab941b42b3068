"""How `auto` chooses: tables, cache, verdicts, and what it must never do."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmkd
from fastmkd.ops import OPS, cache, choice, verdicts
from fastmkd.ops.registry import Backend, Op


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTMKD_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setattr(choice, "_chosen", {})
    return tmp_path


def _op_with(*backends: Backend) -> Op:
    op = OPS["select_tokens"]
    return dataclasses.replace(op, backends={"eager": op.backends["eager"], **{b.name: b for b in backends}})


def _args() -> tuple[Any, ...]:
    return torch.rand(2, 12), 3, 1, 12, 1, 12


def test_preference_order_on_cpu(fresh_cache: Path) -> None:
    cpp = Backend("cpp", OPS["select_tokens"].reference, "cpu", (torch.float32,))
    assert choice.choose(_op_with(cpp), _args()).name == "cpp"


def test_missing_backend_is_passed_over(fresh_cache: Path) -> None:
    cpp = Backend("cpp", OPS["select_tokens"].reference, "cpu", (torch.float32,), lambda: "no compiler was found.")
    assert choice.choose(_op_with(cpp), _args()).name == "eager"
    with fastmkd.backend("cpp"), pytest.raises(choice.BackendUnavailableError, match="no compiler was found"):
        choice.choose(_op_with(cpp), _args())


def test_backend_off_by_default_runs_only_when_asked_for(fresh_cache: Path) -> None:
    shy = Backend("cpp", OPS["select_tokens"].reference, "cpu", (torch.float32,), default=False)
    assert choice.choose(_op_with(shy), _args()).name == "eager"
    with fastmkd.backend("cpp"):
        assert choice.choose(_op_with(shy), _args()).name == "cpp"


def test_table_beats_preference(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp = Backend("cpp", OPS["select_tokens"].reference, "cpu", (torch.float32,))
    monkeypatch.setattr(cache, "table", lambda device: {"select_tokens": "eager"})
    assert choice.choose(_op_with(cpp), _args()).name == "eager"


def test_backends_nest_and_come_back() -> None:
    with fastmkd.backend("eager"):
        with fastmkd.backend("auto"):
            assert choice._forced.get() == "auto"
        assert choice._forced.get() == "eager"
    assert choice._forced.get() == "auto"


def test_cache_survives_a_restart(fresh_cache: Path) -> None:
    cache.remember("some-gpu", "select_tokens/float32/4^3", "triton")
    cache.remember("some-gpu", "select_tokens/cuda", False)
    cache._known.clear()
    assert cache.choices("some-gpu") == {"select_tokens/float32/4^3": "triton"}
    assert cache.verdict("some-gpu", "select_tokens/cuda") is False
    assert cache.verdict("some-gpu", "select_tokens/triton") is None


def test_what_another_process_wrote_meanwhile_is_kept(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.remember("some-gpu", "a/triton", True)
    with monkeypatch.context() as other_process:
        other_process.setattr(cache, "_known", {})
        cache.remember("some-gpu", "a/triton", False)
        cache.remember("some-gpu", "b/triton", True)
    cache.remember("some-gpu", "c/float32/4^3", "eager")
    cache._known.clear()
    assert cache.verdict("some-gpu", "a/triton") is False
    assert cache.verdict("some-gpu", "b/triton") is True
    assert cache.choices("some-gpu") == {"c/float32/4^3": "eager"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choices": 3}', "\0\0"])
def test_broken_cache_file_is_ignored(fresh_cache: Path, content: str) -> None:
    cache._path("some-gpu").write_text(content)
    assert cache.choices("some-gpu") == {}


def test_cache_that_cannot_be_written_is_no_error(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = fresh_cache / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("FASTMKD_CACHE", str(blocked / "below"))
    cache.remember("some-gpu", "a/b", True)
    assert cache.verdict("some-gpu", "a/b") is True


def test_wrong_backend_is_set_aside_with_a_warning() -> None:
    op = OPS["select_tokens"]

    def wrong(*args: Any) -> torch.Tensor:
        return op.reference(*args).flip(1)

    with pytest.warns(RuntimeWarning, match="'triton' of select_tokens is wrong"):
        assert not verdicts.verify(op, Backend("triton", wrong, "cpu", (torch.float32,)), torch.device("cpu"))


def test_crashing_backend_is_set_aside_with_a_warning() -> None:
    def crash(*args: Any) -> torch.Tensor:
        raise RuntimeError("ptxas failed")

    broken = Backend("triton", crash, "cpu", (torch.float32,))
    with pytest.warns(RuntimeWarning, match="ptxas failed"):
        assert not verdicts.verify(OPS["select_tokens"], broken, torch.device("cpu"))


@pytest.mark.parametrize("name", sorted(OPS))
def test_reference_verifies_against_itself(name: str) -> None:
    op = OPS[name]
    dtypes = (torch.float32,) if name == "select_tokens" else (torch.float32, torch.bfloat16)
    assert verdicts.verify(op, Backend("triton", op.reference, "cpu", dtypes), torch.device("cpu"))


def test_shipped_tables_name_real_ops_and_backends() -> None:
    for path in Path(cache.__file__).parent.glob("tables/*.json"):
        table = json.loads(path.read_text())
        for key, backend in table["choices"].items():
            assert backend in OPS[key.split("/")[0]].backends
        for pair in table.get("verified", []):
            name, backend, *tf32 = pair.split("/")
            assert backend in OPS[name].backends
            assert tf32 in ([], ["tf32"])


def test_sharing_choices_replaces_what_a_rank_knew(fresh_cache: Path) -> None:
    device = torch.device("cpu")
    cache.replace(device, {"choices": {"x": "eager"}, "verdicts": {}})
    assert cache.snapshot(device)["choices"] == {"x": "eager"}
    assert not any(p.suffix == ".json" for p in fresh_cache.iterdir()), "another rank's knowledge is not written here"


def test_cache_file_is_private_to_its_versions(fresh_cache: Path) -> None:
    cache.remember("some-gpu", "a/b", "eager")
    (path,) = fresh_cache.glob("*.json")
    assert torch.__version__ in path.name
    assert stat.S_ISREG(path.stat().st_mode)
