"""The committed table of what the compiled kernels say of themselves: how it is made, and that it is true.

The native library and ptxas' logs are those that `make native` leaves; their absence is a failure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import triton

from bench.report import newest
from bench.static_evidence import RESULTS, __main__, cuda_kernels, machine_code, report, triton_kernels
from bench.static_evidence.comparison import INTENDED, complaints
from bench.static_evidence.machine_code import Accesses, Resources
from bench.static_evidence.occupancy import MULTIPROCESSORS, residency
from bench.static_evidence.record import ImpossibleLaunch, Launch, Record, Table, read, record, write
from cuda_sim import backend, build
from triton_offline import ARCHITECTURES

pytestmark = pytest.mark.backend_independent

# --- occupancy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "registers", "block", "shared_bytes", "blocks", "occupancy", "limit"),
    [
        (80, 32, 256, 0, 8, 1.0, "warps"),
        (80, 33, 256, 0, 6, 0.75, "registers"),  # 40 registers each, since a warp gets multiples of 256
        (80, 16, 32, 0, 32, 0.5, "blocks"),
        (
            90,
            8,
            32,
            12 * 1024,
            17,
            17 / 64,
            "shared memory",
        ),  # 19 without the 1 KB that the driver takes of each
        (90, 255, 256, 0, 1, 0.125, "registers"),
        (90, 64, 1024, 0, 1, 0.5, "registers"),
        (90, 65, 1024, 0, 0, 0.0, "registers"),
        (80, 32, 128, 163 * 1024, 1, 4 / 64, "shared memory"),
        (80, 32, 128, 163 * 1024 + 1, 0, 0.0, "shared memory"),
        (100, 32, 128, 227 * 1024, 1, 4 / 64, "shared memory"),
        (120, 40, 1024, 0, 1, 32 / 48, "warps"),
        (120, 16, 32, 0, 24, 0.5, "blocks"),
    ],
)
def test_occupancy_of_known_launches(
    architecture: int,
    registers: int,
    block: int,
    shared_bytes: int,
    blocks: int,
    occupancy: float,
    limit: str,
) -> None:
    found = residency(architecture, registers, block, shared_bytes)
    assert (found.blocks, found.occupancy, found.limit) == (blocks, occupancy, limit)


CALCULATOR = r"""
#include <cstdio>
#include <cuda_occupancy.h>

int main() {
  int architecture, multiprocessor_threads, multiprocessor_shared, registers, threads, shared;
  while (std::scanf("%d %d %d %d %d %d", &architecture, &multiprocessor_threads, &multiprocessor_shared, &registers,
                    &threads, &shared) == 6) {
    cudaOccDeviceProp device;
    device.computeMajor = architecture / 10;
    device.computeMinor = architecture % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = multiprocessor_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = multiprocessor_shared;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = multiprocessor_shared - 1024;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -error);
  }
}
"""


def test_occupancy_is_nvidias(tmp_path: Path) -> None:
    """Every architecture, and launches at all limits, against the calculation in NVIDIA's own header."""
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    assert (include / "cuda_occupancy.h").exists()
    compiler = [build.compiler(), f"-isystem{include}", str(source), "-o", str(program)]
    subprocess.run(compiler, check=True)
    launches = list(
        product(
            MULTIPROCESSORS,
            (16, 32, 33, 40, 64, 65, 72, 80, 96, 112, 127, 128, 168, 200, 255),
            (32, 64, 96, 128, 160, 256, 320, 384, 448, 512, 768, 1024),
            (0, 1, 656, 8192, 20000, 49152, 61440, 98304, 99 * 1024, 131072, 163 * 1024, 227 * 1024),
        )
    )
    devices = {name: (32 * each.warps, each.shared_bytes) for name, each in MULTIPROCESSORS.items()}
    lines = [
        f"{launch[0]} {' '.join(map(str, devices[launch[0]]))} {' '.join(map(str, launch[1:]))}"
        for launch in launches
    ]
    finished = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = dict(zip(launches, map(int, finished.stdout.split()), strict=True))
    assert {launch: residency(*launch).blocks for launch in launches} == expected


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_75 are not known"):
        residency(75, 32, 128, 0)


# --- readers ----------------------------------------------------------------------------------------------------------


def test_resources_are_read() -> None:
    text = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function first:
  REG:26 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90
 Function first:
  REG:24 STACK:16 SHARED:3072 LOCAL:0 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    found = machine_code.resources(text.splitlines())
    assert found == {(80, "first"): Resources(26, 0, 2048), (90, "first"): Resources(24, 16, 2048)}


def test_accesses_are_read() -> None:
    text = """
\tcode for sm_90
\t\tFunction : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.NA.128.CONSTANT R4, desc[UR6][R2.64] ;  /* 0x0000000602047981 */
        /*0020*/              @!P1 LDG.E.U16.CONSTANT R4, desc[UR6][R2.64] ;     /* 0x0000000602047981 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64] ;  /* 0x0000000602057fae */
        /*0040*/              @P0  STG.E desc[UR6][R2.64+0x4], R7 ;              /* 0x0000040702007986 */
        /*0050*/                   STS.64 [R9], R10 ;                            /* 0x0000000a09007388 */
        /*0060*/                   STAS [R8.64], R4 ;                            /* 0x0000000408007dbd */
        /*0070*/            @!UP0  LDS R3, [R9+UR4] ;                            /* 0x0000000409037984 */
\t\tFunction : second
        /*0000*/                   STL.64 [R1+0x8], R2 ;                         /* 0x0000080201007387 */
        /*0010*/                   LDL R2, [R1] ;                                /* 0x0000000001027983 */
        /*0020*/                   LDGDEPBAR ;                                   /* 0x00000000000079af */
"""
    found = machine_code.accesses(text.splitlines())
    assert found == {
        (90, "first"): Accesses(
            Counter({16: 2, 2: 1}), Counter({4: 1}), Counter({4: 1}), Counter({8: 1, 4: 1})
        ),
        (90, "second"): Accesses(local=Counter({8: 1, 4: 1})),
    }


def test_accesses_are_read_from_ptx() -> None:
    text = """
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    mov.u16 %rs1, 0x0; @%p2 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    st.shared.v2.f32 [ %r9 + 0 ], { %f1, %f2 };
    ld.shared.b8 %rs2, [%r7];
    st.global.v2.b64 [ %rd3 + 0 ], { %rd4, %rd5 };
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r3;
    ld.param.b64 %rd6, [kernel_param_0];
"""
    assert machine_code.accesses_in_ptx(text) == Accesses(
        Counter({16: 2, 2: 1}), Counter({16: 1}), Counter({1: 1}), Counter({8: 1})
    )


def test_the_elf_sections_are_read() -> None:
    text = """
arch = sm_90
.section .note.nv.tkinfo
\tTool Name: ptxas
\tTool Version: Cuda compilation tools, release 13.0, V13.0.88
.nv.info
\tAttribute:\tEIATTR_REGCOUNT
\tValue:\tfunction: first(0x70)\tregister count: 26
.nv.info.first
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x200 0x1 0x1
\tAttribute:\tEIATTR_EXIT_INSTR_OFFSETS
\tValue:\t0x660 0x940 0x970
"""
    assert machine_code.maximum_threads(text.splitlines()) == {(90, "first"): 512}
    assert machine_code.compilers(text.splitlines()) == {"V13.0.88"}


def test_the_words_of_ptxas_are_read() -> None:
    text = """
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for called
    0 bytes stack frame, 0 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 26 registers, used 1 barriers, 2048 bytes smem, 416 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_120'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 464 bytes cmem[0]
"""
    assert machine_code.compilations(text.splitlines()) == {
        (90, "first"): machine_code.Compilation(26, 2048, 28),
        (120, "second"): machine_code.Compilation(255, 0, 0),
    }


def test_without_the_tools_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(FileNotFoundError, match="install a CUDA toolkit, or triton"):
        machine_code.tool("cuobjdump")


def test_a_file_that_is_no_binary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "library.so").write_text("nothing")
    with pytest.raises(RuntimeError, match=r"cuobjdump cannot read .*library\.so"):
        machine_code.cuobjdump(tmp_path / "library.so", "-sass")


# --- the comparison ---------------------------------------------------------------------------------------------------

WIDE = Accesses(Counter({16: 4}), Counter({16: 2}))


def good(architecture: int = 90, kernel: str = "kernel<float>") -> Record:
    launches = [Launch(256, 0), Launch(512, 8192)]
    return record(kernel, architecture, Resources(32, 0, 656), WIDE, 512, launches, spill_bytes=0)


PLANTED: dict[str, Callable[[Record], Record]] = {
    "stack_bytes 0 -> 16": lambda each: replace(each, stack_bytes=16),
    "spill_bytes 0 -> 4": lambda each: replace(each, spill_bytes=4),
    "local_accesses 0 -> 1": lambda each: replace(each, accesses={**each.accesses, "local": {4: 1}}),
    "widest_load 16 -> 8": lambda each: replace(each, widest_load=8),
    "widest_store 16 -> 4": lambda each: replace(each, widest_store=4),
    "resident warps 64 -> 48": lambda each: replace(each, registers=33),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_regression_is_found(planted: str) -> None:
    committed, worse = Table("nvcc 1", (good(), good(80))), (good(80), PLANTED[planted](good()))
    (complaint,) = complaints(committed, Table("nvcc 2", worse))
    assert complaint.startswith("kernel<float> sm_90: ")
    assert planted in complaint
    assert complaints(committed, Table("nvcc 1", worse))


def test_a_kernel_that_is_gone_is_found() -> None:
    committed = Table("nvcc 1", (good(), good(kernel="other")))
    for compiler in ("nvcc 1", "nvcc 2"):
        assert complaints(committed, Table(compiler, (good(),))) == ["other sm_90: the kernel is gone"]


def test_a_new_kernel_belongs_into_the_table() -> None:
    both = (good(), good(kernel="other"))
    assert complaints(Table("nvcc 1", (good(),)), Table("nvcc 1", both)) == ["other sm_90: not in the table"]
    assert complaints(Table("nvcc 1", (good(),)), Table("nvcc 2", both)) == []
    spilling = (good(), replace(good(kernel="other"), spill_bytes=4))
    assert complaints(Table("nvcc 1", (good(),)), Table("nvcc 2", spilling)) == ["other sm_90: spill_bytes 4"]


def test_the_same_compiler_has_to_make_the_same() -> None:
    better = replace(good(), registers=31)
    assert complaints(Table("nvcc 1", (good(),)), Table("nvcc 1", (better,))) == [
        "kernel<float> sm_90: registers 32 -> 31"
    ]
    assert complaints(Table("nvcc 1", (good(),)), Table("nvcc 2", (better,))) == []


def test_an_architecture_that_was_not_compiled_is_not_compared() -> None:
    both, one = Table("nvcc 1", (good(), good(80))), Table("nvcc 1", (good(),))
    assert complaints(both, one) == []
    compared = ["cuda: 1 kernels compared, of sm_90", "cuda: not compiled for sm_80 here, so not compared"]
    assert __main__.judge("cuda", both, one) == ([], compared)


def test_the_only_architecture_is_compared_with_all_kernels_of_it() -> None:
    """The table as ``.ci/run`` compares it."""
    committed = Table("nvcc 1", (good(), good(80), good(kernel="other"), good(80, "other")))
    for compiler in ("nvcc 1", "nvcc 2"):
        (complaint,), _ = __main__.judge("cuda", committed, Table(compiler, (good(),)))
        assert complaint == "cuda: other sm_90: the kernel is gone"


@pytest.mark.parametrize("current", [(), (good(120),)], ids=["nothing", "another architecture"])
def test_nothing_to_compare_is_a_complaint(current: tuple[Record, ...]) -> None:
    (complaint,), _ = __main__.judge("cuda", Table("nvcc 1", (good(),)), Table("nvcc 2", current))
    assert complaint == "cuda: nothing that the table has is compiled here"


def test_a_part_of_the_table() -> None:
    table = Table(
        "triton 1", tuple(replace(good(each), configuration=name) for each in (80, 90) for name in "ab")
    )
    part = table.of([("a", 80), ("b", 90), ("c", 90)])
    assert [(each.configuration, each.architecture) for each in part.records] == [("a", 80), ("b", 90)]


@pytest.mark.parametrize(
    ("launch", "registers"),
    [(Launch(1024, 0), 32), (Launch(512, 227 * 1024), 32), (Launch(512, 0), 136), (Launch(32, 0), 256)],
    ids=["more threads than compiled for", "too much shared memory", "too many registers", "a thread's most"],
)
def test_a_launch_that_would_fail_is_found(launch: Launch, registers: int) -> None:
    with pytest.raises(ImpossibleLaunch, match=r"kernel sm_90: Launch\("):
        record("kernel", 90, Resources(registers, 0, 656), WIDE, 512, [Launch(64, 0), launch])


def test_a_record_tells_the_launch_with_the_fewest_warps() -> None:
    found = record("kernel", 90, Resources(32, 0, 0), WIDE, 512, [Launch(512, 0), Launch(384, 0, 8)])
    assert (found.lowest, found.resident_warps, found.occupancy) == (Launch(384, 0, 8), 60, 0.9375)
    assert (found.threads, found.clusters, found.launches) == ((384, 512), (1, 8), 2)
    never = record("kernel", 90, Resources(32, 0, 0), WIDE, 512, [])
    assert (never.launches, never.lowest) == (0, Launch(512, 0))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = Table("nvcc 1", (good(80), good()))
    write(tmp_path / "table.json", table)
    assert read(tmp_path / "table.json") == table
    assert len((tmp_path / "table.json").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="run python -m bench"):
        read(tmp_path / "other.json")


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {kind: read(RESULTS / f"{kind}.json") for kind in __main__.KINDS}


def test_the_committed_table_is_that_of_the_cuda_kernels(
    pytestconfig: pytest.Config, tables: dict[str, Table]
) -> None:
    """For every architecture that the library was built for; with ``--complete`` it has to be built for all."""
    committed, current = tables["cuda"], cuda_kernels.table()
    found, notes = __main__.judge("cuda", committed, current)
    print("\n".join(notes))
    assert not found, "\n".join([*found, INTENDED])
    if pytestconfig.getoption("--complete"):
        assert current.architectures == committed.architectures, (
            "make native CUDA_ARCHITECTURES='80;90;100;120'"
        )


def test_the_committed_table_is_that_of_the_triton_kernels(
    pytestconfig: pytest.Config, tables: dict[str, Table]
) -> None:
    """Every shape for an architecture by turns; with ``--complete`` for all of them."""
    complete = pytestconfig.getoption("--complete")
    chosen = triton_kernels.every_compilation() if complete else triton_kernels.compilations_by_turns()
    committed = tables["triton"].of((str(shape), architecture) for shape, architecture in chosen)
    found, notes = __main__.judge("triton", committed, triton_kernels.table(chosen))
    print("\n".join(notes))
    assert not found, "\n".join([*found, INTENDED])


def test_every_configuration_is_in_the_table(tables: dict[str, Table]) -> None:
    """With the kernels that it launches and no others, for every architecture, whichever are compiled here."""
    expected = {
        (kernel, str(shape), architecture)
        for group in triton_kernels.GROUPS
        for shape in group
        for kernel in triton_kernels.kernels_of(shape)
        for architecture in ARCHITECTURES
    }
    assert {each.key for each in tables["triton"].records} == expected


def test_by_turns_every_shape_and_every_kernel_for_every_architecture() -> None:
    every, chosen = triton_kernels.every_compilation(), triton_kernels.compilations_by_turns()
    assert len(set(chosen)) == len(chosen) < len(every) / 2
    assert set(chosen) <= set(every)
    assert {shape for shape, _ in chosen} == {shape for shape, _ in every}

    def reached(compilations: list[triton_kernels.Compilation]) -> set[tuple[str, int]]:
        return {(kernel, each) for shape, each in compilations for kernel in triton_kernels.kernels_of(shape)}

    assert reached(chosen) == reached(every)


def test_the_readme_shows_the_committed_table() -> None:
    assert __main__.main(["--check-readme", str(RESULTS.parents[2] / "README.md")]) == 0


def test_the_tables_are_not_taken_for_a_machines_results() -> None:
    assert RESULTS not in {path.parent for path, _ in newest(RESULTS.parent)}


def test_launches_leave_room_for_static_variables(tables: dict[str, Table]) -> None:
    """launch.cuh asks for shared memory where dynamic and static might be more than every kernel may have."""
    launch = (cuda_kernels.ROOT / "csrc" / "cuda" / "launch.cuh").read_text()
    (most,) = re.findall(r"most_static = (\d+) \* 1024;", launch)
    assert max(each.static_shared_bytes for each in tables["cuda"].records) <= int(most) * 1024


def test_every_kernel_of_the_sources_is_in_the_table(tables: dict[str, Table]) -> None:
    for architecture in __main__.REQUIRED:
        assert {each.kernel for each in tables["cuda"].on([architecture]).records} == backend.kernels()


def test_no_kernel_spills(tables: dict[str, Table]) -> None:
    for each in (*tables["cuda"].records, *tables["triton"].records):
        assert (each.stack_bytes, each.spill_bytes or 0, each.local_accesses) == (0, 0, 0), each.name


# The least 16-byte loads and stores of activations in each kernel with packs of 16 bytes, from its template arguments:
# a pack is never taken apart. Partial sums are fp32, and backward_columns_kernel stores nothing else.
def _wide(name: str, arguments: list[str]) -> tuple[int, int]:
    width = int(arguments[2])
    if name == "forward_kernel":
        return (int(arguments[3]) * int(arguments[4]),) * 2
    if name == "backward_kernel":
        packs = (32 if arguments[3] == "true" else 16) // width
        return 2 * packs, packs
    if name.startswith("dropout_add"):
        packs = (32 if arguments[-1] == "true" else 16) // width
        return {
            "dropout_add_forward_kernel": (8, 8),
            "dropout_add_forward_looped_kernel": (10, 5),
            "dropout_add_backward_kernel": (4 * packs, 2 * packs),
            "dropout_add_backward_looped_kernel": (12, 2),
            "dropout_add_backward_columns_kernel": (16, 0),
        }[name]
    if name.startswith("dropout"):
        # A 16-bit tensor beside a float32 one is accessed in 8 bytes.
        first, second = (0 if each == "float" else 1 for each in arguments[:2])
        return {
            "dropout_columns_kernel": (4, 2) if first == second else (2, 0),
        }.get(name, (4, 2) if first == second else (2, 2) if second == 0 else (2, 0))
    return {
        "batch_norm_statistics_kernel": (4, 0),
        "batch_norm_apply_kernel": (8, 4),
        "batch_norm_sums_kernel": (6, 4),
        "batch_norm_gradient_kernel": (6, 4),
        "group_norm_statistics_kernel": (4, 0),
        "group_norm_apply_kernel": (4, 4),
        "group_norm_sums_kernel": (4, 0),
        "group_norm_gradient_kernel": (4, 2),
        "forward_looped_kernel": (5, 1),
        "backward_looped_kernel": (10, 1),
        "backward_columns_kernel": (8, 0),
    }[name]


def test_wide_kernels_load_and_store_16_bytes(tables: dict[str, Table]) -> None:
    wide, narrow = 0, []
    for each in tables["cuda"].records:
        name, _, arguments = each.kernel.rstrip(">").partition("<")
        if not re.match(r"\w+, \w+, [48]", arguments):
            continue
        wide += 1
        loads, stores = _wide(name, arguments.split(", "))
        found = (each.accesses["global_loads"].get(16, 0), each.accesses["global_stores"].get(16, 0))
        if found[0] < loads or found[1] < stores:
            narrow.append(f"{each.name}: {found} of {(loads, stores)}")
    assert wide
    assert not narrow, "\n".join(narrow)


def test_the_summary_names_every_function(tables: dict[str, Table]) -> None:
    text = report.render(tables["cuda"], tables["triton"])
    for each in (*tables["cuda"].records, *tables["triton"].records):
        assert f"| {report.function(each)} | {each.architecture} |" in text


def test_a_table_needs_the_required_architectures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = {
        "cuda": lambda: Table("nvcc 1", (good(), good(80))),
        "triton": lambda: Table("triton 1", (good(),)),
    }
    monkeypatch.setattr(__main__, "KINDS", some)
    assert __main__.main(["--results", str(tmp_path)]) == 1
    assert "nothing is compiled for sm_100: make native CUDA_ARCHITECTURES" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_logs_of_another_build_are_refused(tmp_path: Path) -> None:
    (tmp_path / "layer_norm.cu.log").write_text("")
    with pytest.raises(ValueError, match="run `make native`"):
        cuda_kernels.table(logs=tmp_path)
    with pytest.raises(FileNotFoundError, match="run `make native`"):
        cuda_kernels.table(library=tmp_path / "libfastreg_cuda.so")
