import json
import math
import shutil
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.spec import machine as machine_module
from jaxllm.spec.errors import SpecError
from jaxllm.spec.machine import Machine, Mesh

PREDICT_ONLY = ["v100"]
GPUS = ["a100-40", "a100-80", "a6000", "b200", "b300", "gb200", "h100", "h100-pcie", "h200", "rtx4090", *PREDICT_ONLY]
TPUS = ["tpu7x", "v4", "v5e", "v5p", "v6e"]
NAMES = sorted(["cpu", *GPUS, *TPUS])

MINE = """
description = "a card of mine"
target = "gpu"

[memory]
total = { value = 40, unit = "GiB", source = "datasheet" }
usable_fraction = { value = 0.5, source = "choice" }
reserve = { value = 512, unit = "MiB", source = "choice" }
bandwidth = { value = 1.5, unit = "TB/s", source = "datasheet" }

[peak]
bf16 = { value = 0.25, unit = "PFLOP/s", source = "datasheet" }

[node]
devices = { value = 4, source = "datasheet" }

[links]
inside_node = { value = 100, unit = "GB/s", kind = "bus", source = "datasheet" }

[absent]
peak.f32 = "not printed"
"links.between_nodes" = "one node only"

[compiler]
source = "datasheet"
description = "mine"
compute_capability = [9, 0]
core_count = 132
fpus_per_core = 128
threads_per_core_limit = 2048
clock_rate_ghz = 1.98
memory_bandwidth = 1500000000000
device_memory_size = 42949672960
l2_cache_size = 52428800
shared_memory_per_core = 233472
shared_memory_per_block_optin = 232448
"""


def refusal(text):
    with pytest.raises(SpecError) as error:
        Machine.load(text)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def mine(tmp_path):
    """Writes a machine file, with parts replaced, and gives its path."""

    def write(*changes):
        text = MINE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


# ---------------------------------------------------------------- the machines that come along


def test_machines_are_found_by_their_files():
    assert Machine.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_value_and_a_public_source(name):
    machine = Machine.read(name)
    assert machine.name == name
    for figure in machine.figures.values():
        assert figure.source.strip() and figure.given
        assert not figure.source.startswith("/") and "shared/" not in figure.source
    assert all(machine.absent.values())
    assert not machine.figures.keys() & machine.absent.keys()
    assert bool(machine.compiler_source) == (name not in ("cpu", *PREDICT_ONLY))
    assert bool(machine.predict_only) == (name in PREDICT_ONLY)


@pytest.mark.parametrize(
    ("name", "bf16", "bandwidth", "total"),
    [  # vendors' datasheets, and openxla/xla's target_config/specs for bandwidth and memory of the gpus
        ("a100-40", 312e12, 1555.2e9, 42331013120),
        ("a100-80", 312e12, 2039.04e9, 85100068864),
        ("h100", 989e12, 3352.32e9, 84942979072),
        ("h200", 989e12, 4800e9, 143771 * 2**20),
        ("b200", 2250e12, 7672.32e9, 191514411008),
        ("b300", 2250e12, 7936e9, 297021865984),
        ("gb200", 2500e12, 7928.064e9, 197897748480),
        ("h100-pcie", 756e12, 2039.04e9, 84942979072),
        ("a6000", 154.8e12, 768.096e9, 51041271808),
        ("rtx4090", 165.2e12, 1008e9, 24564 * 2**20),
        ("v4", 275e12 / 2, 1200e9 / 2, 32 * 2**30 // 2),
        ("v5e", 197e12, 819e9, 16 * 2**30),
        ("v6e", 918e12, 1600e9, 32 * 2**30),
        ("v5p", 459e12, 2765e9, 96 * 2**30),
        ("tpu7x", 2307e12 / 2, 7370e9 / 2, 192 * 2**30 // 2),
    ],
)
def test_figures_are_per_device_in_base_units(name, bf16, bandwidth, total):
    machine = Machine.read(name)
    assert machine.peak_flops["bf16"] == bf16
    assert (machine.bandwidth, machine.memory_bytes) == (bandwidth, total)


@pytest.mark.parametrize(
    ("name", "gib"), [("v4", 15.25), ("v5e", 15.75), ("v6e", 31.25), ("v5p", 95.74), ("tpu7x", 94.75)]
)
def test_tpu_capacity_is_what_xla_reports(name, gib):
    assert Machine.read(name).capacity == pytest.approx(gib * 2**30, abs=1)


@pytest.mark.parametrize("name", GPUS)
def test_gpu_capacity_is_a_fraction_less_a_reserve_and_both_are_shown(name):
    machine = Machine.read(name)
    assert machine.capacity == int(machine.memory_bytes * machine.usable_fraction) - machine.reserve_bytes
    shown = {figure: value for figure, value, _ in machine.describe()}
    assert {"memory.total", "memory.usable_fraction", "memory.reserve", "memory.capacity"} <= shown.keys()


def test_links_are_one_direction_in_bytes_per_second():
    h100 = Machine.read("h100").links
    assert (h100["inside_node"].value, h100["between_nodes"].value) == (450e9, 50e9)
    assert h100["inside_node"].kind == "NVLink 4"
    assert Machine.read("v5e").links["torus"].value == 45e9
    assert Machine.read("v4").links["torus"].value == 45e9
    assert Machine.read("rtx4090").links["inside_node"].value == 31e9
    assert Machine.read("h100-pcie").links["inside_node"].value == 63e9
    b300, v100 = Machine.read("b300").links, Machine.read("v100").links
    assert (b300["inside_node"].value, b300["between_nodes"].value) == (900e9, 100e9)
    assert (v100["inside_node"].value, v100["between_nodes"].value) == (150e9, 6.25e9)


def test_a_figure_without_a_checked_source_is_absent_and_said_to_be():
    h200 = Machine.read("h200")
    assert "f32" not in h200.peak_flops and h200.value("peak.f32") is None
    assert ("peak.f32", "absent", h200.absent["peak.f32"]) in h200.describe()
    assert "between_nodes" not in Machine.read("rtx4090").links
    assert "links.between_nodes" in Machine.read("rtx4090").absent


def test_a_card_without_bf16_says_so_and_what_its_tensor_cores_take():
    v100 = Machine.read("v100")
    assert v100.peak_flops == {"f16": 125e12, "f32": 15.7e12}
    assert "8.0" in v100.absent["peak.bf16"]


@pytest.mark.parametrize("name", [name for name in GPUS if name not in PREDICT_ONLY])
def test_the_gpu_compiler_is_told_of_a_card_with_at_least_the_memory(name):
    compiler = Machine.read(name).compiler
    assert compiler["device_memory_size"] >= Machine.read(name).memory_bytes
    assert len(compiler["compute_capability"]) == 2


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("text", "devices", "nodes", "shape", "topology"),
    [
        ("cpu:1", 1, 1, (1,), "1"),
        ("cpu:8", 8, 1, (8,), "8"),
        ("cpu:2048", 2048, 1, (2048,), "2048"),
        ("h100:1", 1, 1, (1, 1), "1x1x1"),
        ("h100:4", 4, 1, (1, 4), "1x1x4"),
        ("h100:8", 8, 1, (1, 8), "1x1x8"),
        ("h100:16", 16, 2, (2, 8), "1x2x8"),
        ("a100-80:2x8", 16, 2, (2, 8), "1x2x8"),
        ("h100:2048x8", 16384, 2048, (2048, 8), "1x2048x8"),
        ("gb200:8", 8, 1, (1, 8), "1x1x8"),
        ("gb200:72", 72, 1, (1, 72), "1x1x72"),
        ("gb200:144", 144, 2, (2, 72), "1x2x72"),
        ("v100:16", 16, 2, (2, 8), "1x2x8"),
        ("v5e:1x1", 1, 1, (1, 1), "v5e:1x1"),
        ("v5e:2x4", 8, 1, (2, 4), "v5e:2x4"),
        ("v6e:16x16", 256, 32, (16, 16), "v6e:16x16"),
        ("v4:2x2x1", 8, 1, (2, 2, 1), "v4:2x2x1"),
        ("v4:2x2x2", 16, 2, (2, 2, 2), "v4:2x2x2"),
        ("v4:16x16x16", 8192, 1024, (16, 16, 16), "v4:16x16x16"),
        ("v5p:2x2x1", 4, 1, (2, 2, 1), "v5p:2x2x1"),
        ("v5p:2x2x2", 8, 2, (2, 2, 2), "v5p:2x2x2"),
        ("v5p:2x2x4", 16, 4, (2, 2, 4), "v5p:2x2x4"),
        ("v5p:4x4x4", 64, 16, (4, 4, 4), "v5p:4x4x4"),
        ("v5p:16x20x28", 8960, 2240, (16, 20, 28), "v5p:16x20x28"),
        ("tpu7x:2x2x1", 8, 1, (2, 2, 1), "tpu7x:2x2x1"),
        ("tpu7x:1x1x1", 2, 1, (1, 1, 1), "tpu7x:1x1x1"),
    ],
)
def test_a_mesh_is_a_machine_with_a_size(text, devices, nodes, shape, topology):
    mesh = Machine.load(text)
    assert (mesh.devices, mesh.nodes, mesh.shape, mesh.topology) == (devices, nodes, shape, topology)
    assert str(mesh) == mesh.text == text
    assert mesh.machine == Machine.read(text.partition(":")[0])
    assert mesh.target == mesh.machine.target
    assert mesh.capacity == mesh.machine.capacity
    assert mesh.devices_per_node * mesh.nodes == devices


def test_hosts_are_no_larger_than_the_slice():
    assert Machine.load("v5e:1x1").host_bounds == (1, 1, 1)
    assert Machine.load("v5e:4x4").host_bounds == (2, 2, 1)
    assert Machine.load("tpu7x:1x1x1").host_bounds == (1, 1, 1)
    assert Machine.load("v5p:4x4x8").host_bounds == (2, 2, 1)
    assert Machine.load("h100:8").host_bounds is None


def test_axes_close_into_rings_where_the_torus_says_so():
    assert Machine.load("v5e:8x16").wraparound == (False, True)
    assert Machine.load("v5e:8x8").wraparound == (False, False)
    assert Machine.load("v5p:4x4x8").wraparound == (True, True, True)
    assert Machine.load("v5p:2x4x4").wraparound == (False, False, False)
    assert Machine.load("v4:4x4x12").wraparound == (True, True, True)
    assert Machine.load("cpu:8").wraparound == ()


def test_emulated_devices_have_no_limit_and_no_speed():
    cpu = Machine.read("cpu")
    assert (cpu.capacity, cpu.memory_bytes, cpu.peak_flops, cpu.links) == (None, None, {}, {})
    assert "no limit" in cpu.absent["memory.total"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h1000:8", "did you mean 'h100'?"),
        ("H100:8", "did you mean 'h100'?"),
        (":8", "known: a100-40"),
        ("nofile.toml:8", "there is no file 'nofile.toml'"),
        ("h100", "'h100' has no size; write h100:8, h100:16 or h100:2x8"),
        ("v5e", "has no size; write v5e:2x2"),
        ("h100:", "'' in 'h100:' is not a size"),
        ("h100:eight", "'eight'"),
        ("h100:8x", "'8x'"),
        ("h100:-8", "'-8'"),
        ("h100:٨", "is not a size"),
        ("h100:10000000", "below a million"),
        ("h100:0", "no devices"),
        ("h100:2x0", "no devices"),
        ("h100:12", "takes part of a node"),
        ("h100:2x4", "takes 4 cards of each node"),
        ("h100:12", "write h100:8 or h100:16"),
        ("h100:2x9", "9 cards in a node, which holds 8"),
        ("h100:2x2x2", "3 axes"),
        ("gb200:100", "write gb200:72 or gb200:144"),
        ("cpu:2x4", "only counted"),
        ("cpu:2049", "asks for 2049 emulated devices, and cpu has up to 2,048 (node.devices); take fewer."),
        ("v5e:8", "2 axes here; write 2x4"),
        ("v5e:2x2x2", "2 axes here; write 2x4"),
        ("v5e:3x3", "no slice that exists"),
        ("v5e:4x2", "the nearest is 2x4"),
        ("v5e:32x32", "a pod has 256; the nearest is 16x16"),
        ("v4:1x1x1", "the nearest is 2x2x1"),
        ("v4:32x32x32", "a pod has 4096; the nearest is 4x32x32 or 8x16x32"),
        ("v5p:3x4x4", "the nearest is 4x4x4"),
        ("v5p:8x4x4", "the nearest is 4x4x8"),
        ("v5p:32x32x32", "a pod has 8960; the nearest is 16x20x28"),
        ("v5p:4x4", "3 axes here; write 2x2x4"),
        ("tpu7x:8", "3 axes here; write 2x2x2"),
    ],
)
def test_bad_meshes_are_refused_in_one_sentence_with_a_way_out(text, says):
    assert says in refusal(text)


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.text("0123456789x:", max_size=9) | st.text(max_size=5))
def test_arbitrary_sizes_raise_nothing_but_spec_error(name, size):
    try:
        mesh = Machine.load(f"{name}:{size}")
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert mesh.devices == math.prod(map(int, size.split("x"))) * mesh.machine.devices_per_chip


@settings(deadline=None)
@given(st.text())
def test_arbitrary_text_raises_nothing_but_spec_error(text):
    try:
        Machine.load(text)
    except SpecError:
        pass


@settings(deadline=None)
@given(st.sampled_from(TPUS), st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)))
def test_the_nearest_slice_exists(name, shape):
    shape = shape[: len(Machine.read(name).value("torus.slices")[0])]
    text = f"{name}:{'x'.join(map(str, shape))}"
    try:
        Machine.load(text)
    except SpecError as error:
        for near in str(error).rstrip(".").rsplit("nearest is ", 1)[1].split(" or "):
            assert Machine.load(f"{name}:{near}").devices > 0


@pytest.mark.parametrize("shape", [(), (0, 8), (2, 9), (1, True), (8,)])
def test_sizes_are_checked_where_a_mesh_is_made(shape):
    with pytest.raises(SpecError):
        Mesh(Machine.read("h100"), shape, "h100:?")


@pytest.mark.parametrize("text", ["cpu:8", "h100:16", "rtx4090:2", "v100:8", "v5e:2x4", "tpu7x:2x2x1"])
def test_meshes_describe_themselves_and_go_to_json(text):
    mesh = Machine.load(text)
    rows = mesh.describe()
    assert ("devices", f"{mesh.devices:,}", "") in rows
    assert all(isinstance(cell, str) for row in rows for cell in row)
    stated = [row for row in rows if row[0] in mesh.machine.figures]
    assert len(stated) == len(mesh.machine.figures) and all(source for _, _, source in stated)
    data = json.loads(json.dumps(mesh.to_json() | mesh.machine.to_json()))
    assert (data["devices"], data["machine"], data["capacity"]) == (mesh.devices, mesh.machine.name, mesh.capacity)
    assert {name: row["value"] for name, row in data["figures"].items() if isinstance(row["value"], (int, float))} == {
        name: figure.value for name, figure in mesh.machine.figures.items() if isinstance(figure.value, (int, float))
    }
    assert data["absent"] == mesh.machine.absent


# ---------------------------------------------------------------- a user's own file


def test_a_file_of_ones_own_works_and_units_are_converted(mine):
    path = mine()
    mesh = Machine.load(f"{path}:8")
    machine = mesh.machine
    assert (machine.name, mesh.shape, mesh.topology) == ("mine", (2, 4), "1x2x4")
    assert machine.memory_bytes == 40 * 2**30
    assert machine.capacity == 20 * 2**30 - 512 * 2**20
    assert machine.bandwidth == 1_500_000_000_000
    assert machine.peak_flops == {"bf16": 250_000_000_000_000}
    assert machine.links["inside_node"].value == 100_000_000_000
    assert machine.absent == {"peak.f32": "not printed", "links.between_nodes": "one node only"}
    assert machine.compiler["core_count"] == 132
    assert "part of a node" in refusal(f"{path}:6")


def test_a_path_is_split_at_the_last_colon(mine, tmp_path):
    odd = tmp_path / "odd:name.toml"
    shutil.copy(mine(), odd)
    assert Machine.load(f"{odd}:4").devices == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_known_machine_reads_the_same(name, tmp_path):
    path = tmp_path / f"{name}.toml"
    shutil.copy(machine_module.folder() / f"{name}.toml", path)
    assert Machine.read(path) == Machine.read(name)


TOTAL = 'total = { value = 40, unit = "GiB", source = "datasheet" }\n'


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (TOTAL, "", "memory.total is missing"),
        (TOTAL, "", 'write memory.total = { value = ..., unit = "MiB", source = "..." }.'),
        ('peak.f32 = "not printed"\n', "", "peak.f32 is missing"),
        ('peak.f32 = "not printed"\n', "", "under [absent]"),
        ("value = 40", "value = -40", "memory.total: value=-40"),
        ("value = 40", "value = 0", "memory.total: value=0 has to be above 0"),
        ("value = 40", "value = nan", "value=nan"),
        ("value = 40", "value = inf", "value=inf"),
        ("value = 40", "value = true", "value=True"),
        ("value = 40", 'value = "40"', "value='40'"),
        ("value = 40, ", "", "memory.total has no value"),
        ('value = 40, unit = "GiB"', "value = 40", "unit=None is unknown; choose B, MiB, GiB"),
        ('unit = "GiB"', 'unit = "GB/s"', "unit='GB/s' is unknown"),
        ('unit = "GiB", source = "datasheet"', 'unit = "GiB"', "memory.total has no source"),
        (TOTAL, "total = 40\n", "memory.total is not a figure with its source"),
        ('unit = "GiB"', 'unti = "GiB"', "did you mean 'unit'?"),
        ("value = 0.5", "value = 1.5", "value=1.5 is not a fraction"),
        ("value = 512", "value = 20480", "leaves nothing"),
        ("devices = { value = 4", "devices = { value = 4.5", "node.devices: value=4.5 is not a whole number"),
        ("[node]\ndevices", "[node]\ndevises", "did you mean 'node.devices'?"),
        ("[node]", "[nodes]", "did you mean 'node'?"),
        ("inside_node", "torus", "links.torus has no meaning for target 'gpu'"),
        ('peak.f32 = "not printed"', 'peak.f33 = "not printed"', "did you mean 'peak.f32'?"),
        ('peak.f32 = "not printed"', 'peak.f32 = ""', "absent without a reason"),
        ('peak.f32 = "not printed"', 'peak.f32 = "x"\npeak.bf16 = "x"', "peak.bf16 is given and listed"),
        ('target = "gpu"', 'target = "npu"', "target='npu' is unknown"),
        ('description = "a card of mine"', "", "description is missing"),
        ("core_count = 132\n", "", "[compiler] lacks core_count"),
        ("core_count = 132", "core_count = -1", "core_count=-1 is not a positive whole number"),
        ("core_count = 132", "core_cuont = 132", "did you mean 'core_count'?"),
        ("compute_capability = [9, 0]", "compute_capability = 9", "compute_capability=9 is not a list"),
        ('[compiler]\nsource = "datasheet"', "[compiler]", "[compiler] has no source"),
        ("[absent]", '[absent]\ncompiler = "why"', "compiler is given and listed under [absent]"),
        ("[absent]", '[absent]\ncompiler.core_count = "why"', "unknown figure 'compiler.core_count' under [absent]"),
        ("[absent]", '[absent]\ncompilre = "why"', "did you mean 'compiler'?"),
        ("[memory]", "[memory", "not valid TOML"),
    ],
)
def test_a_wrong_machine_file_is_refused_in_one_sentence(mine, old, new, says):
    message = refusal(f"{mine((old, new))}:4")
    assert message.startswith("machine file ")
    assert says in message


def test_memory_cannot_be_absent_on_a_card(mine):
    path = mine((TOTAL, ""), ("[absent]", '[absent]\nmemory.total = "secret"'))
    assert "memory.total cannot be absent" in refusal(f"{path}:4")


COMPILER = MINE[MINE.index("[compiler]") :]


def test_a_card_may_say_why_no_compiler_is_asked(mine):
    machine = Machine.read(mine((COMPILER, ""), ("[absent]", '[absent]\ncompiler = "a card of tomorrow"')))
    assert machine.predict_only == "a card of tomorrow"
    assert (machine.compiler, machine.compiler_source) == ({}, "")
    assert machine.describe()[-3:][0] == ("compiler", "absent", "a card of tomorrow")
    assert machine.to_json()["absent"]["compiler"] == "a card of tomorrow"
    assert Machine.read(mine()).predict_only == ""


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("", "[compiler] is missing"),
        ("", "or say why not under [absent]"),
        ('compiler = ""', "compiler is absent without a reason"),
        ("compiler = true", "compiler is absent without a reason"),
        ('compiler = ["old"]', "compiler is absent without a reason"),
        ('compiler = "old\\nand slow"', "several lines; say it in one"),
        ('compiler.why = "old"', "unknown figure 'compiler.why' under [absent]"),
    ],
)
def test_a_compiler_is_absent_for_a_reason_of_one_line(mine, entry, says):
    message = refusal(f"{mine((COMPILER, ''), ('[absent]', f'[absent]{chr(10)}{entry}'))}:4")
    assert message.startswith("machine file ")
    assert says in message


@pytest.mark.parametrize("name", ["cpu", "v5e"])
def test_only_a_card_may_do_without_its_compiler(name, tmp_path):
    path = tmp_path / "mine.toml"
    text = (machine_module.folder() / f"{name}.toml").read_text().partition("# What XLA:TPU has to know")[0]
    path.write_text(text.replace("[absent]", '[absent]\ncompiler = "why"'))
    assert "compiler cannot be absent" in refusal(f"{path}:2x4")
    if name == "v5e":
        path.write_text(text)
        message = refusal(f"{path}:2x4")
        assert "[compiler] is missing" in message and "[absent]" not in message


def test_a_torus_is_checked(tmp_path):
    v5e = (machine_module.folder() / "v5e.toml").read_text()
    path = tmp_path / "torus.toml"
    for old, new, says in [
        ('["1x1", ', '["1x1x1", ', "two axes and three axes"),
        ('["1x1", ', '["1x1x1x1", ', "'1x1x1x1' is not the shape of a slice"),
        ("[torus]\n", '[torus]\ncube = { value = 4, source = "x" }\n', "torus.cube needs slices of three axes"),
        ("[2, 2, 1]", "[2, 2, 0]", "chips_per_host_bounds=[2, 2, 0] is not a list"),
        ("value = 256", "value = 1000000", "above the limit"),
    ]:
        assert old in v5e
        path.write_text(v5e.replace(old, new))
        assert says in refusal(f"{path}:2x4")


def test_what_is_no_toml_file_is_refused(tmp_path):
    path = tmp_path / "bad.toml"
    for data in (b"\xff\xfe", b"a = " + b"[" * 100000, b"a = " + b"9" * 5000):
        path.write_bytes(data)
        assert "machine file" in refusal(f"{path}:8")


@pytest.mark.parametrize("name", NAMES)
def test_leaving_out_any_figure_is_noticed(name, tmp_path):
    """Each figure that a shipped file states is needed, or free to leave out; none is silently taken as zero."""
    lines = (machine_module.folder() / f"{name}.toml").read_text().splitlines()
    path = tmp_path / "less.toml"
    full = Machine.read(name)
    for index, line in enumerate(lines):
        if "= {" not in line:
            continue
        path.write_text("\n".join(lines[:index] + lines[index + 1 :]))
        try:
            less = Machine.read(path)
        except SpecError as error:
            assert "is missing" in str(error)
        else:
            lost = full.figures.keys() - less.figures.keys()
            assert len(lost) == 1
            peaks = {"peak.f16", "peak.tf32", "peak.fp8", "peak.fp4", "peak.int8"}
            assert lost <= {"chip.devices", "torus.cube", "links.host"} | peaks
        assert tomllib.loads("\n".join(lines))
