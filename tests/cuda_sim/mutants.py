"""Copies of the kernels, each with one barrier, mask, bound, wait or fence removed, or another mistake of its size.

Every ``__syncthreads``, fence, wait, lane mask and bound in csrc/cuda has a mutant of its own, found in the sources by
what it looks like, so that a new kernel has its mutants the day it is written; the mistakes that have no such pattern
are listed. A mutant is compiled into a program of standalone*.cpp with the tracer and run. Most mistakes end it at
the first case that reaches them. README.md has the table of what found which, and the digest of its sources:

    python tests/cuda_sim/mutants.py     runs all of them and writes both
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_sim import build

# Order of threads, seed, clusters under way at once.
SCHEDULES = (("0", "0", "1"), ("1", "0", "2"), ("2", "1", "3"))
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- mutants -->", "<!-- /mutants: python tests/cuda_sim/mutants.py -->"
NOT_FOUND = "not found"

# What a program prints, and the check that says so.
CHECKS = (
    ("race: ", "race"),
    ("that nobody has written", "unwritten memory"),
    ("an access outside", "bounds"),
    ("misaligned access", "alignment"),
    ("the mask at|which its mask does not name", "warp mask"),
    ("divergent", "divergence"),
    (
        "has not been opened|before the cluster knows|twice in one round|waits without|twice without",
        "cluster",
    ),
    ("which has not started|which has ended", "cluster"),
    ("deadlock", "deadlock"),
    (r" is \S+, exact", "wrong result"),
)


@dataclass(frozen=True)
class Mutant:
    """One change to one file of csrc/cuda.

    Attributes:
        name: what is wrong with it.
        file: the file in csrc/cuda.
        start, end: the part of the file that is replaced.
        new: what replaces it.
    """

    name: str
    file: str
    start: int
    end: int
    new: str


@dataclass(frozen=True)
class _Pattern:
    """Everything in the kernels that looks like this is removed once.

    Attributes:
        what: names the mutants, with "{}" for what was found.
        expression: its first group is replaced.
        new: what replaces it.
    """

    what: str
    expression: str
    new: str


_PATTERNS = (
    _Pattern("no {}", r"^ *(__syncthreads\(\);)", ";"),
    _Pattern("no {}", r"^ *(__syncwarp\(.*\);)", ";"),
    _Pattern("no {}", r"^ *(__threadfence\(\);)", ";"),
    _Pattern("no {}", r"^ *(mailboxes_publish\(\);)", ";"),
    _Pattern("no {}", r"^ *((?:cluster|mailbox|copy_async)_(?:arrive|wait|open|expect|commit)\b.*\);)", ";"),
    _Pattern("no {}", r"(copy_async_wait<[^;]*\);)", ";"),
    _Pattern("half of the lanes of {}", r"(?<=_sync\()(all_lanes)\b.*", "0xffffu"),
    _Pattern("no bound {}", r"((?:place \* team\.threads \+ team\.lane|\boffset) < slice\.count)", "true"),
    _Pattern("no bound {}", r"(start \+ place \* team\.threads < slice\.count)", "true"),
    _Pattern("no bound {}", r"(?<=[(&] )?(\b(?:of_)?row < arguments\.rows)(?=\)| &&)", "true"),
    _Pattern("no bound {}", r"active = (first_row < arguments\.rows);", "true"),
    _Pattern("no bound {}", r"(\brow < arguments\.norm\.rows)\)", "true"),
    _Pattern("no bound {}", r"(\bcolumn < arguments\.columns)", "true"),
    _Pattern("no bound {}", r"(\blane < (?:team\.warps\(\)|cluster))", "true"),
    _Pattern("one beyond {}", r"(\boffset >= packs)\)", "offset > packs"),
    # batch norm
    _Pattern("no {}", r"^ *(counter_(?:arrive|wait)\(.*\);)", ";"),
    _Pattern("no {}", r"^ *(grid_barrier\(\);)", ";"),
    _Pattern("no bound {}", r"(\b(?:walk|behind)\.(?:valid|has_channels)\(\))", "true"),
    _Pattern("no bound {}", r"(\bhas_channel\b)(?=\)| &&)", "true"),
    _Pattern("no bound {}", r"(\b(?:item < items|place < line_end|line_end != 0)\b)", "true"),
    _Pattern("no bound {}", r"(\bdown < active(?: - half)?)\)", "true"),
    _Pattern("one beyond {}", r"(\bdown >= half)\b", "down > half"),
    _Pattern("no bound {}", r"(thread % warp_lanes < finish_channels)", "true"),
    _Pattern(
        "no bound {}", r"(static_cast<int>\(threadIdx\.x\) < \(rows \? [\w.]*plan\.lanes : 1\))", "true"
    ),
    _Pattern("no bound {}", r"(\bpart\.has\(index\))", "true"),
    _Pattern("one beyond {}", r"(\brow < walk\.count)\b", "row <= walk.count"),
    _Pattern("one beyond {}", r"return (place < count);", "place <= count"),
    # group norm
    _Pattern("no bound {}", r"(\bsegment\.empty\(\))", "false"),
    _Pattern("no bound {}", r"(\bwalk\.has\((?:slab|next)\))", "true"),
    _Pattern("no bound {}", r"(\bsample < norm\.shape\.samples)", "true"),
    _Pattern("no bound {}", r"(\bindex \+ team < number)", "true"),
    _Pattern("no bound {}", r"(\blane < count)", "true"),
    _Pattern("one beyond {}", r"(\brow < rows\.count)\b", "row <= rows.count"),
    _Pattern("one beyond {}", r"(\bplace < segment\.end)\b", "place <= segment.end"),
    _Pattern("one beyond {}", r"(\bindex < values)\b", "index <= values"),
    _Pattern("every lane stores {}", r"(\belement % 8 == 0)\)", "true"),
    # dropout and DropBlock
    _Pattern("no bound {}", r"(?<=if \()!?(\binside\((?:tile, place|place)\))", "true"),
    _Pattern("one beyond {}", r"(\belement < end)\b", "element <= end"),
    _Pattern("no bound {}", r"(\bhas_columns?\b)(?=\)| &&)", "true"),
    _Pattern("no bound {}", r"(\bword < (?:arguments\.)?shape\.\w+)", "true"),
    _Pattern(
        "one beyond {}", r"(\bword >= arguments\.shape\.seed_words)", "word > arguments.shape.seed_words"
    ),
    _Pattern("no bound {}", r"(\b(?:shift \+ count > 64|skip \+ count > 8|8 \* byte < width))", "true"),
)

# (name, file, what is replaced, its replacement): mistakes of one word that no pattern removes.
_LISTED = (
    ("one set of exchange slots instead of two", "reduce.cuh", "exchange.warps[turn]", "exchange.warps[0]"),
    ("a mailbox expects one block's values", "reduce.cuh", "cluster * sizeof(values)", "sizeof(values)"),
    ("the wrong round of a mailbox", "reduce.cuh", "round / 2 % 2", "round % 2"),
    (
        "a barrier that only teams with a row reach",
        "layer_norm_backward.cuh",
        "    if (wants_input) {\n      sums[0] =",
        "    if (wants_input && active) {\n      sums[0] =",
    ),
    (
        "one group of copies too many may be on its way",
        "layer_norm_backward.cuh",
        "copy_async_wait<stages - 1>()",
        "copy_async_wait<stages>()",
    ),
    (
        "the next row is fetched over the one to be read",
        "layer_norm_backward.cuh",
        "    Data grad_output[packs];\n    Data input[packs];\n    if constexpr (stages > 0) copy",
        (
            "    fetch(stage, row + stages * step);\n    Data grad_output[packs];\n    Data input[packs];\n"
            "    if constexpr (stages > 0) copy"
        ),
    ),
    (
        "sums in shared memory that do not start at 0",
        "layer_norm_backward.cuh",
        "*at(place, quad) = float4{0.0f, 0.0f, 0.0f, 0.0f};",
        "at(place, quad);",
    ),
    (
        "two blocks write the same partial sums",
        "layer_norm_backward.cuh",
        "partial = static_cast<int64_t>(blockIdx.x / arguments.cluster) * arguments.columns;",
        "partial = static_cast<int64_t>(blockIdx.x / arguments.cluster / 2) * arguments.columns;",
    ),
    (
        "wide loads from rows that are not aligned",
        "layer_norm.cuh",
        "return aligned(data, 16) && row_stride * element_size % 16 == 0;",
        "return aligned(data, 16);",
    ),
    (
        "wide loads from rows beside the sum that are not aligned",
        "dropout_add_layer_norm.cuh",
        " && row_stride * fastreg::element_size(dtype) % bytes == 0)",
        ")",
    ),
    (
        "the first pack's bits for all of them",
        "layer_norm_forward.cuh",
        "bits >> index * width",
        "bits",
    ),
    (
        "packs that follow without what they need besides",
        "layer_norm_backward.cuh",
        "if (place > 0 && place % at_once == 0) fetch_more(place);",
        ";",
    ),
    (
        "every thread of a row stores its means",
        "layer_norm_backward_looped.cuh",
        "    if (team.lane == 0 && slice.first == 0) target",
        "    target",
    ),
    (
        "the first half of a block of the random stream for both",
        "dropout_add_layer_norm_branch.cuh",
        "width == 4 && first != 0",
        "width == 4 && first < 0",
    ),
    (
        "the scale of another threshold than the one that is read",
        "dropout_add_layer_norm_branch.cuh",
        "      scale = kept > 0.0f",
        "      const float unused = kept > 0.0f",
    ),
    (
        "a row's scale for the next row",
        "dropout_add_layer_norm_branch.cuh",
        "quotient(row, arguments.scale_rows)",
        "quotient(row + 1, arguments.scale_rows)",
    ),
    (
        "copies of 16 bytes from rows of half as wide elements",
        "dropout_add_layer_norm_backward.cuh",
        "copy_async<8>(place",
        "copy_async<16>(place",
    ),
    (
        "layer_scale's sums that do not start at 0",
        "dropout_add_layer_norm_backward.cuh",
        "    ThirdSums<packs, width>(dynamic_shared()).clear();\n",
        "",
    ),
    (
        "layer_scale's sums where rows arrive",
        "dropout_add_layer_norm_backward.cuh",
        "    return static_cast<int>(sizeof(float)) * packs * width * static_cast<int>(blockDim.x);",
        "    return 0;",
    ),
    (
        "the gradient of the sum that is not added",
        "dropout_add_layer_norm_backward.cuh",
        "gradient[index] += added[index];",
        "gradient[index] += 0.0f * added[index];",
    ),
    (
        "a pack of a plane that goes on in the next one",
        "batch_norm_stream.cuh",
        "problem.wide = problem.line_elements() % full_width<Element> == 0;",
        "problem.wide = true;",
    ),
    (
        "blocks of a channel that all store the statistics",
        "batch_norm_forward.cuh",
        "saves = walk.part == 0 &&",
        "saves =",
    ),
    (
        "the second sum exchanged where the first is still read",
        "batch_norm_finish.cuh",
        "over_slices(sum, tables.second)",
        "over_slices(sum, tables.first)",
    ),
    (
        "partial moments that count as full ones",
        "batch_norm_slices.cuh",
        "plan.items - start < plan.share ? plan.items - start : plan.share",
        "plan.share",
    ),
    (
        "two blocks write the same partial moments",
        "batch_norm_walk.cuh",
        "return part * shape.channels + of_channel;",
        "return part / 2 * shape.channels + of_channel;",
    ),
    (
        "the sums of another activation's derivative",
        "batch_norm_backward.cuh",
        "argument_gradients(norm.activation, affine",
        "argument_gradients(ActivationArguments{Activation::identity, 0.0f}, affine",
    ),
    (
        "two warps store the same piece of a channel",
        "group_norm_pieces.h",
        "whole ? channel : of_run + channel",
        "whole ? channel : of_run / 2 + channel",
    ),
    (
        "blocks of a group that all store its statistics",
        "group_norm_planes.cuh",
        "% layout.slab_threads == 0 && layout.blocks.rank() == 0",
        "% layout.slab_threads == 0",
    ),
    (
        "a warp's groups exchanged as if the block had one",
        "group_norm_planes.cuh",
        "return layout.slab_threads > warp_lanes;",
        "return true;",
    ),
    (
        "sums of a group without its channels' weights",
        "group_norm_planes_backward.cuh",
        "sums[0].plain += weight * of_segment.plain;",
        "sums[0].plain += of_segment.plain;",
    ),
    (
        "means of a group without its channels' weights",
        "group_norm_finish.cuh",
        "sums[0].plain += weight * plain[index];",
        "sums[0].plain += plain[index];",
    ),
    (
        "merged groups read before all blocks have stored theirs",
        "group_norm_rows.cuh",
        "    meet(meetings * round + 1);\n",
        "",
    ),
    (
        "the bits of a neighbour's elements",
        "dropout_apply.cuh",
        "own, element / philox_half_lanes)",
        "own, lane)",
    ),
    (
        "a pack of a row that goes on in the next one",
        "dropout.cuh",
        "columns.value % width == 0 &&",
        "true &&",
    ),
    (
        "a pack that is of its first unit alone",
        "dropout_mask.cuh",
        "        first += columns;\n",
        "",
    ),
    (
        "wide packs of tensors that are not aligned",
        "dropout.cuh",
        "return data == nullptr || aligned(data, sizeof(Element) * static_cast<uintptr_t>(width));",
        "return true;",
    ),
    (
        "two parts of the rows write the same partial sums",
        "dropout_columns.cuh",
        "arguments.partials + part * arguments.columns + column;",
        "arguments.partials + part / 2 * arguments.columns + column;",
    ),
    (
        "every row of threads stores the sums of a block",
        "dropout_columns.cuh",
        "if (down == 0 && has_columns)",
        "if (has_columns)",
    ),
    (
        "counts that do not start at 0",
        "drop_block_mask.cuh",
        "arguments.counts[word] = 0;",
        ";",
    ),
    (
        "every lane adds its warp's positions to the count",
        "drop_block_mask.cuh",
        "threadIdx.x % warp_lanes == 0 && kept",
        "kept",
    ),
    (
        "blocks that grow no further than a window",
        "drop_block_mask.cuh",
        "done < shape.blocks[2]; done += window",
        "done < 1; done += window",
    ),
    (
        "the first sample's scale for all of them",
        "drop_block_apply.cuh",
        "per_sample ? quotient(element, sample_elements)",
        "per_sample ? 0",
    ),
    (
        "relu's sign where z is compared the other way",
        "activation.cuh",
        "relu ? !(arguments[index] <= 0.0f)",
        "relu ? arguments[index] <= 0.0f",
    ),
    (
        "a store that truncates",
        "vec.cuh",
        "__floats2bfloat162_rn(values[2 * index], values[2 * index + 1]);",
        "__nv_bfloat162(__float2bfloat16_rz(values[2 * index]), __float2bfloat16_rz(values[2 * index + 1]));",
    ),
)

# The files of kernels and of what they share; not the vocabulary itself, the launch code and the plans.
_KERNELS = re.compile(
    r"reduce\.cuh|vec\.cuh|.*_(forward|backward).*\.cuh|batch_norm(?!_launch|_resident\.|_stream).*\.cuh"
    r"|group_norm(?!_launch).*\.cuh|instance_norm\.cuh"
    r"|dropout_(mask|apply|columns)\.cuh|drop_block_(mask|apply)\.cuh"
)

# The programs that run a file's kernels, and as little else as there can be. The second one runs where the first finds
# nothing: of what the norms and the fused ops share a few lines are of the norms alone.
_PROGRAMS = (
    (r"dropout_add_.*", (("standalone_dropout_add_norm",),)),
    (r"layer_norm_.*", (("standalone_dropout_add_norm",), ("standalone",))),
    (r"drop_block.*", (("standalone_dropout", "-DFASTREG_STANDALONE_DROP_BLOCK"),)),
    (r"dropout.*", (("standalone_dropout", "-DFASTREG_STANDALONE_DROPOUT"),)),
    (r"(group|instance)_norm.*", (("standalone_group_norm",),)),
    (r"batch_norm_resident.*", (("standalone_batch_norm", "-DFASTREG_STANDALONE_RESIDENT"),)),
    (r"batch_norm.*|activation.*", (("standalone_batch_norm", "-DFASTREG_STANDALONE_STREAMING"),)),
    (r".*", (("standalone",),)),
)

_FUNCTION = re.compile(
    r"\b(\w+)\(const \w+Arguments arguments\) \{|__device__ __forceinline__ [^(\n]*?(\w+)\("
)


def _function_around(text: str, position: int) -> str:
    match = list(_FUNCTION.finditer(text, 0, position))[-1]
    return match[1] or match[2]


def _found_by_patterns(folder: Path) -> Iterator[Mutant]:
    for path in sorted(folder.glob("*.cuh")):
        if not _KERNELS.fullmatch(path.name):
            continue
        text = path.read_text()
        seen: Counter[str] = Counter()
        for pattern in _PATTERNS:
            for match in re.finditer(pattern.expression, text, re.MULTILINE):
                shown = match[0].strip() if match[1] == "all_lanes" else match[1]
                name = f"{_function_around(text, match.start(1))}: {pattern.what.format(f'`{shown}`')}"
                seen[name] += 1
                number = f", number {seen[name]}" if seen[name] > 1 else ""
                yield Mutant(f"{name}{number}", path.name, *match.span(1), pattern.new)


def _listed(folder: Path) -> Iterator[Mutant]:
    for name, file, old, new in _LISTED:
        text = (folder / file).read_text()
        if text.count(old) == 0:
            raise ValueError(f"{name}: {file} has no longer what it replaces")
        # From the first to the last place: what lies between is kept.
        start, end = text.index(old), text.rindex(old) + len(old)
        yield Mutant(name, file, start, end, text[start:end].replace(old, new))


def mutants(folder: Path = build.ROOT / "csrc" / "cuda") -> list[Mutant]:
    return [*_found_by_patterns(folder), *_listed(folder)]


def output_of(program: Path) -> str:
    """What the program prints under the first schedule that it fails in; nothing where it passes all of them."""
    for schedule in SCHEDULES:
        finished = subprocess.run([str(program), *schedule], capture_output=True, text=True, timeout=300)
        if finished.returncode != 0:
            return f"schedule {' '.join(schedule)}: {finished.stdout}{finished.stderr or finished.returncode}"
    return ""


def programs_of(file: str, kernels: Path = build.ROOT / "csrc", sanitize: str = "") -> Iterator[Path]:
    """The programs that run the kernels of a file, of all or changed ones, with the tracer or a sanitizer."""
    programs = next(programs for expression, programs in _PROGRAMS if re.fullmatch(expression, file))
    for name, *parts in programs:
        few = ("-w", "-DFASTREG_STANDALONE_FEW", *parts)
        yield build.standalone(kernels, sanitize, trace=not sanitize, extra=few, name=name)


def run(mutant: Mutant, sanitize: str = "") -> str:
    """Build and run a mutant, with the tracer or a sanitizer; returns what the program says of it."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(build.ROOT / "csrc", sources)
        path = sources / "cuda" / mutant.file
        text = path.read_text()
        path.write_text(text[: mutant.start] + mutant.new + text[mutant.end :])
        outputs = map(output_of, programs_of(mutant.file, sources, sanitize))
        return next(filter(None, outputs), "")


def check_that_found(output: str) -> str:
    """The check that a program's output comes from."""
    if not output:
        return NOT_FOUND
    return next((name for expression, name in CHECKS if re.search(expression, output)), f"? {output}")


def table(found: dict[str, str]) -> str:
    """The README's table of mutants and checks."""
    counts = Counter(found.values())
    missed = counts.pop(NOT_FOUND, 0)
    by = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    rows = "\n".join(f"| {name} | {check} |" for name, check in found.items())
    return (
        f"{len(found)} mutants, {len(found) - missed} found: {by}.\n\n"
        f"| mistake | found by |\n|---|---|\n{rows}"
    )


def with_table(text: str, found: dict[str, str]) -> str:
    """The README's text with this table between its markers, as one of the sources as they are."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(found)}\n\nOf the sources {sources_digest()}.\n\n{END}{after}"


def sources_digest() -> str:
    """Of all that decides what is found: the kernels, the simulator, the programs and this file."""
    digest = hashlib.sha256()
    headers = (build.ROOT / "csrc").glob("*.h")
    kernels = (build.ROOT / "csrc" / "cuda").glob("*")
    simulator = (path for path in build.HERE.glob("*") if path.suffix in (".h", ".cpp", ".cu"))
    for path in sorted([*headers, *kernels, *simulator, Path(__file__).resolve()]):
        digest.update(str(path.relative_to(build.ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def committed() -> tuple[dict[str, str], str]:
    """The README's table, and the digest of the sources that it is of."""
    text = README.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"^\| (.+) \| ([^|]+) \|$", text, re.MULTILINE)
    found = {name: check for name, check in rows if name != "mistake"}
    return found, text.rpartition("Of the sources ")[2].partition(".")[0]


def main() -> None:
    chosen = [mutant for mutant in mutants() if all(word in mutant.name for word in sys.argv[1:])]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        outputs = dict(zip([mutant.name for mutant in chosen], pool.map(run, chosen), strict=True))
    for name, output in outputs.items():
        print(f"{check_that_found(output):16} {name}\n    {output.strip()[:300]}")
    found = {name: check_that_found(output) for name, output in outputs.items()}
    print(table(found).partition("\n")[0])
    if not sys.argv[1:]:
        README.write_text(with_table(README.read_text(), found))


if __name__ == "__main__":
    main()
