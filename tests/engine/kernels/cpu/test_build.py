"""Compiling: once for each source and isa, and never without saying why not."""

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.kernels.cpu import bindings, build
from engine.kernels.cpu.build import BuildError, library

ISA = next(iter(build.supported_isas()), None)
FORMATS = "bfloat16", "bfloat16"

pytestmark = pytest.mark.skipif(ISA is None, reason="the CPU kernels need AVX2 or NEON")


@pytest.fixture
def small_source(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that compiles at once in place of the kernels, which other tests compile and load."""
    folder = tmp_path_factory.mktemp("source")
    (folder / build.MAIN).write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "SOURCES", folder)


@pytest.mark.usefixtures("small_source")
def test_those_that_start_together_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ISA is not None
    made, compiled, run = [], [], subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        compiled.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    threads = [threading.Thread(target=lambda: made.append(build.library(ISA, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == len(compiled) == 1


@pytest.mark.usefixtures("small_source")
def test_the_second_one_finds_what_the_first_one_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ISA is not None
    made = build.library(ISA, tmp_path)
    assert made.parent == tmp_path
    monkeypatch.setenv("PATH", os.devnull)  # no compiler is needed any more
    assert build.library(ISA, tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == [made.name], "nothing else is left"


@pytest.mark.usefixtures("small_source")
def test_a_start_compiles_the_stack_that_it_needs_unless_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ISA is not None
    (build.SOURCES / build.MAIN).write_text("constexpr int only[] = {REDLINE_STACK};\nstatic_assert(only[1] == 2);\n")
    one, other = library(ISA, tmp_path, (1, 2)), library(ISA, tmp_path, (3, 2))
    assert one != other
    (build.SOURCES / build.MAIN).write_text("#ifdef REDLINE_STACK\n#error not whole\n#endif\n")
    whole = library(ISA, tmp_path)
    assert library(ISA, tmp_path, (1, 2)) == whole
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DANOTHER_VERSION"))
    with pytest.raises(BuildError, match="not whole"):
        library(ISA, tmp_path, (1, 2))


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ISA is not None
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        build.library(ISA, tmp_path)


def test_the_compilers_complaint_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ISA is not None
    monkeypatch.setitem(build.ISAS, ISA, (("-march=nonsense",), frozenset()))
    with pytest.raises(BuildError, match="nonsense"):
        build.library(ISA, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_any_level_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", frozenset)
    assert build.supported_isas() == []
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset({"avx2", "fma", "bmi2", "f16c"}))
    assert build.supported_isas() == ["avx2"]


def test_features_of_arm_have_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    features = "fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm asimddp"  # of Neoverse N1
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: {features}\n\n")
    assert build.supported_isas() == ["neon-dotprod", "neon"]
    assert build.missing_features("neon-bf16") == ["bf16", "i8mm"]
    assert "avx2" in build.missing_features("avx2")


def test_wheels_have_the_instruction_sets_of_their_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, isas in {"x86_64": ["amx", "avx512-bf16", "avx512", "avx2"], "riscv64": []}.items():
        monkeypatch.setattr(build.platform, "machine", lambda name=machine: name)
        assert build.isas_of_architecture() == isas
    assert sorted(build.ISAS) == sorted(isa for isas in build.BY_MACHINE.values() for isa in isas)


def test_tiles_need_the_systems_permission_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: build.ISAS["amx"][1])
    monkeypatch.setattr(build, "_may_use_tiles", lambda: False)
    assert build.missing_features("amx") == ["the system's permission to use AMX"]
    assert build.supported_isas()[0] == "avx512-bf16"
    monkeypatch.setattr(build, "_may_use_tiles", lambda: True)
    assert build.supported_isas()[0] == "amx"


@pytest.mark.skipif({"avx2", "amx_tile"} & build.cpu_features() != {"avx2"}, reason="it may have AMX")
def test_a_machine_without_tiles_is_not_permitted_them() -> None:
    assert not build._may_use_tiles()


def test_loading_requests_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that loads the kernels may be another one than the process that looked for features."""
    assert ISA is not None
    requests: list[bool] = []
    compiled = build.library(ISA)
    monkeypatch.setattr(build, "_may_use_tiles", lambda: requests.append(True) or True)
    monkeypatch.setattr(build, "library", lambda isa, stack: compiled)
    if ISA != "amx":
        bindings.load(ISA, *FORMATS)
        assert requests == [], "only tiles need a permission"
    assert bindings.load("amx", *FORMATS).redline_stack
    assert requests == [True]


def test_without_the_permission_tiles_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_may_use_tiles", lambda: False)
    with pytest.raises(BuildError, match=r"refuses this process the tile registers of AMX .*ARCH_REQ_XCOMP_PERM"):
        bindings.load("amx", *FORMATS)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ISA is not None
    (tmp_path / "redline").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build.library(ISA)
