"""The benchmarks run, refuse to time wrong gradients, and write their measurements. Times are not checked."""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def training_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_step

    monkeypatch.setattr(training_step, "SAMPLE_SECONDS", 1e-4)
    return training_step


def test_training_step_writes_table_and_samples(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(mbp.__file__).parent.parent)}
    arguments = [
        "--quick",
        "--workloads",
        "toy",
        "--threads",
        "1",
        "--json",
        "out/step.json",
        "--markdown",
        "out/step.md",
    ]
    command = [sys.executable, "-W", "error", BENCHMARKS / "training_step.py", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "step.md").read_text() == result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [row.split()[1] for row in rows[2:]] == ["toy", "geometric"]
    assert len({len(row) for row in rows}) == 1  # aligned

    measured = json.loads((tmp_path / "out" / "step.json").read_text())
    assert measured["fma_peak_gflops"] is None or all(rate > 0 for rate in measured["fma_peak_gflops"].values())
    assert {"machine", "instruction set", "software", "date", "command"} <= set(measured["header"])
    toy = measured["workloads"]["toy"]
    assert toy["sizes"] == [1, 1, 1, 1, 1]
    assert toy["flops"] == 22
    assert set(toy["peers"]) == {"eager", "mbp.MLP", "recompute", "MLP.loss", "loss_backward"}
    for peer in toy["peers"].values():
        assert len(peer["seconds"]) == 5
        assert peer["median_seconds"] == statistics.median(peer["seconds"]) > 0
        assert peer["shortest_and_longest_seconds"] == [min(peer["seconds"]), max(peer["seconds"])]
        assert peer["repetitions"] >= 1
    pairs = zip(toy["peers"]["eager"]["seconds"], toy["peers"]["mbp.MLP"]["seconds"], strict=True)
    assert toy["peers"]["mbp.MLP"]["speedup"] == statistics.median(a / b for a, b in pairs)
    assert measured["geometric_mean"]["eager"] == pytest.approx(1)
    assert measured["geometric_mean"]["mbp.MLP"] == pytest.approx(toy["peers"]["mbp.MLP"]["speedup"])


def test_flops_by_hand(training_step):
    # f_0: 2·4·2·3 = 48, f_1: 2·4·3·1 = 24; the same for ∂ℓ/∂Ω_0 and ∂ℓ/∂Ω_1; ∂ℓ/∂h_1: 24
    assert training_step.Workload("", [2, 3, 1], 4).flops == 48 + 24 + 48 + 24 + 24


def test_workloads_are_those_of_the_file(training_step):
    assert [workload.name for workload in training_step.load_workloads()][:2] == ["toy", "rl64"]
    assert [workload.name for workload in training_step.load_workloads(["mnist", "toy"])] == ["mnist", "toy"]
    with pytest.raises(SystemExit, match="no workload is called 'tyo'; there are: toy, rl64"):
        training_step.load_workloads(["tyo"])


def test_no_example_is_near_a_relu_flip(training_step):
    model, x, _ = training_step.Workload("", [8, 256, 256, 1], 2000).build()
    assert len(x.unique(dim=0)) < len(x)  # some examples were, and were replaced
    h = x.double()
    for layer in model.double():
        if isinstance(layer, torch.nn.ReLU):
            assert float(h.detach().abs().min()) > 1e-6
        h = layer(h)


@pytest.mark.parametrize("wrong", [lambda grad: grad * 1.001, lambda grad: grad * float("nan")], ids=["scaled", "nan"])
def test_wrong_gradients_are_not_timed(training_step, monkeypatch, wrong):
    def broken(model, x, target):
        step = training_step.eager(model, x, target)

        def gradients():
            *others, last = step.gradients()
            return [*others, wrong(last)]

        return training_step.Step(step.run, gradients)

    monkeypatch.setitem(training_step.PEERS, "broken", broken)
    with pytest.raises(SystemExit, match=r"broken: the gradient of 2\.bias is off by"):
        training_step.measure(training_step.Workload("", [3, 4, 2], 5), ["eager", "broken"], rounds=1)


def test_a_peer_that_fails_is_reported_beside_the_others(training_step, monkeypatch):
    def failing(model, x, target):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(training_step.PEERS, "failing", failing)
    workload = training_step.Workload("small", [3, 4, 2], 5)
    results = {"small": training_step.measure(workload, ["eager", "failing", "mbp.MLP"], rounds=2)}
    assert results["small"]["failing"].error == "RuntimeError: no compiler"
    assert len(results["small"]["mbp.MLP"].speedups) == 2
    row, mean = training_step.table(results, [workload], None).splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")][3] == "failed"
    assert [cell.strip() for cell in mean.split("|")][3] == "–"


# JAX is not imported here, because forking after its import raises a warning.
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax_runs_the_same_step_in_a_process_of_its_own(training_step):
    workload = training_step.Workload("small", [3, 4, 2], 5)
    timings = training_step.measure(workload, ["eager", "JAX jit"], rounds=2)  # checks the gradients
    assert not timings["JAX jit"].error
    assert len(timings["JAX jit"].speedups) == 2


def test_a_jax_process_that_ends_is_an_error_of_that_peer_only(training_step, monkeypatch):
    monkeypatch.setattr(training_step, "HERE", Path("nowhere"))  # which has no jax_step.py
    workload = training_step.Workload("small", [3, 4, 2], 5)
    timings = training_step.measure(workload, ["eager", "JAX jit"], rounds=1)
    assert timings["JAX jit"].error.startswith("RuntimeError: jax_step.py ended with exit code")
    assert timings["eager"].speedup == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_the_jax_process_has_torchs_threads_and_ends_with_its_workload(training_step, monkeypatch, tmp_path, threads):
    (tmp_path / "jax_step.py").write_text(
        "import sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    print(1, flush=True)\n"
    )
    monkeypatch.setattr(training_step, "HERE", tmp_path)
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append((self, kwargs["env"]))

    monkeypatch.setattr(subprocess, "Popen", Popen)
    torch.set_num_threads(threads)
    # It answers, but saves no gradients: an error of this peer.
    training_step.measure(training_step.Workload("small", [3, 4, 2], 5), ["eager", "JAX jit"], rounds=1)
    [(server, env)] = started
    assert server.returncode is not None
    assert env["NPROC"] == str(threads)


@pytest.mark.parametrize("installed", [True, False])
def test_a_jax_that_is_not_installed_is_left_out_with_a_note(training_step, monkeypatch, capsys, installed):
    monkeypatch.setattr(training_step.importlib.util, "find_spec", lambda _: installed or None)
    peers = training_step.available_peers(compilers=True)
    assert ("JAX jit" in peers) is installed
    assert ("JAX is not installed" in capsys.readouterr().err) is not installed
    if not installed:
        assert training_step.about_jax(peers) == {"JAX": "not installed, left out"}
    assert training_step.available_peers(compilers=False) == [p for p in peers if p not in ("torch.compile", "JAX jit")]
    assert capsys.readouterr().err == ""
    assert training_step.about_jax(["eager"]) == {}


def test_keep_memory_is_set_for_malloc_before_the_process_starts(tmp_path):
    arguments = ["--quick", "--rounds", "1", "--workloads", "toy", "--keep-memory", "--json", tmp_path / "step.json"]
    command = [sys.executable, "-W", "error", BENCHMARKS / "training_step.py", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    header = json.loads((tmp_path / "step.json").read_text())["header"]
    assert "MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592" in header["environment"]


def test_scaling_writes_a_time_for_each_point_and_draws_them(training_step, monkeypatch, tmp_path):
    import scaling

    arguments = ["--quick", "--rounds", "1", "--json", str(tmp_path / "s.json"), "--figure", str(tmp_path / "s.png")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    threads = torch.get_num_threads()
    scaling.main()
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "s.json").read_text())
    assert set(result["threads"]["speedup"]["rl256"]) == set(scaling.PEERS)
    for speeds in result["threads"]["speedup"]["rl256"].values():
        assert len(speeds) == len(result["threads"]["counts"])
        assert speeds[0] == 1
        assert min(speeds) > 0
    for key, points in (("batch", [1, 32, 1024]), ("depth", [2, 8])):
        assert result[key]["points"] == points
        assert set(result[key]["curves"]) == set(scaling.PEERS)
        for curve in result[key]["curves"].values():
            assert len(curve["seconds"]) == len(curve["speedup"]) == len(points)
            assert min(curve["seconds"] + curve["speedup"]) > 0
        assert set(result[key]["curves"]["eager"]["speedup"]) == {1}
    assert (tmp_path / "s.png").stat().st_size > 0


def test_balance_counts_the_work_of_each_thread(training_step, monkeypatch, tmp_path, capsys):
    import balance

    monkeypatch.setattr(balance, "THREADS", [1, 2, 64])
    monkeypatch.setattr(balance, "NAMES", ["nerf", "apex"])  # one of each kind that many threads divide differently
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    monkeypatch.setattr(sys, "argv", ["balance.py", "--json", str(before)])
    balance.main()
    table = capsys.readouterr().out
    assert "| nerf, 4,096 rows | model(x), loss, backward() |" in table
    for ways in json.loads(before.read_text())["curves"].values():
        for one, two, many in ways.values():
            assert one == 1
            assert 1 >= two > many > 0.8  # nerf's 8 slices alone would give 64 threads 0.125
    figure = tmp_path / "balance.png"
    monkeypatch.setattr(
        sys, "argv", ["balance.py", "--before", str(before), "--json", str(after), "--figure", str(figure)]
    )
    balance.main()
    assert figure.stat().st_size > 0
    assert json.loads(after.read_text())["before"] == json.loads(before.read_text())["curves"]


def test_cuda_step_can_be_tried_out_without_a_gpu(training_step, monkeypatch, tmp_path, capsys):
    import cuda_step

    files = {"--json": tmp_path / "step.json", "--markdown": tmp_path / "step.md"}
    arguments = ["--device", "cpu", "--quick", "--rounds", "1", *(str(word) for pair in files.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", ["cuda_step.py", *arguments])
    monkeypatch.setenv(cuda_step.NARROW, "0")
    cuda_step.main()
    assert "CPU: this rehearsal says nothing about a GPU" in capsys.readouterr().out
    samples = json.loads(files["--json"].read_text())
    assert {sample["dtype"] for sample in samples} == set(cuda_step.DTYPES)
    assert {sample["peer"] for sample in samples} == {"eager", "mbp.MLP", "MLP.loss", "loss_backward"}
    assert all(sample["seconds"] and not sample["error"] for sample in samples)

    def wrong(model, x, target):
        step = training_step.eager(model, x, target)
        return training_step.Step(step.run, lambda: [1.1 * gradient for gradient in step.gradients()])

    monkeypatch.setitem(cuda_step.PEERS, "mbp.MLP", wrong)
    with pytest.raises(SystemExit, match=r"mbp\.MLP: the gradients are off by"):
        cuda_step.main()


def test_peak_memory_of_the_one_pass_loss_is_below_eagers(tmp_path):
    figure = tmp_path / "memory.png"
    command = [sys.executable, BENCHMARKS / "peak_memory.py", "--batches", "60000", "--figure", figure]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.strip("|").split("|") for line in result.stdout.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["rows", "eager", "MLP, store", "MLP, recompute", "MLP.loss"]
    eager, store, recompute, one_pass = (float(cell) for cell in rows[-1][1:])
    stored = 60000 * 4 * 64 * 4 / 2**20  # h_1 ... h_4
    assert eager > store > stored > recompute > one_pass
    assert figure.stat().st_size > 0


def test_overlap_sends_buckets_over_a_link_and_measures_what_is_kept(tmp_path):
    files = ["--json", tmp_path / "overlap.json", "--figure", tmp_path / "overlap.png"]
    options = ["--rows", "4", "--rounds", "1", "--segment-bytes", "1", "--bucket-mib", "4"]
    command = [sys.executable, BENCHMARKS / "overlap.py", "--sizes", "9", *["1100"] * 5, "3", *options, *files]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    names = ["plain", "one node", "segments"]
    rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("|")]
    assert rows == ["network", "---", *names, "network", "---", *names]
    saved = json.loads((tmp_path / "overlap.json").read_text())
    assert all(len(shares) > 2 for rounds in saved["starts"].values() for shares in rounds)
    layer = 1100**2 * 4  # bytes of the gradient of each of the four large weights
    assert saved["released"]["one node"] > saved["released"]["segments"] + 1.5 * layer
    assert (tmp_path / "overlap.png").stat().st_size > 0


def test_memory_growth_prints_each_way_and_draws_them(training_step, monkeypatch, capsys, tmp_path):
    import memory_growth

    ways = list(memory_growth.WAYS)[-2:]
    monkeypatch.setattr(memory_growth, "WAYS", {way: memory_growth.WAYS[way] for way in ways})
    monkeypatch.setattr(sys, "argv", ["memory_growth.py", "--steps", "100", "--figure", str(tmp_path / "growth.png")])
    memory_growth.main()
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][0].strip() == "100 steps"
    assert [row[0].strip() for row in rows[2:]] == ways
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_numerical_errors_are_not_far_from_eagers(training_step, monkeypatch, capsys):
    import numerical_error

    monkeypatch.setattr(sys, "argv", ["numerical_error.py", "--quick"])
    numerical_error.main()
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = [row for row in rows if row[1].strip() in ("output", "gradients")]
    dtypes = {"float64", "float32", "bfloat16", "float16", "autocast to bfloat16", "autocast to float16"}
    assert {row[0].split(",")[0].strip() for row in table} == dtypes
    for row in table:
        eager, *ours = (float(cell) for cell in row[2:] if cell.strip() != "–")
        assert eager > 0
        assert max(ours) <= (2.5 if ", 1 rows" in row[0] else 1.5) * eager, row  # docs/numerics.md


@pytest.mark.parametrize("mode", ["bfloat16-autocast", "float16"])
def test_half_precision_is_what_the_peers_compute_in(training_step, mode, monkeypatch, capsys, tmp_path):
    import half_precision

    dtypes, check = [], half_precision.RoughCheck.__call__

    def checked(self, peer, step):
        check(self, peer, step)
        dtypes.append(step.gradients()[0].dtype)

    monkeypatch.setattr(half_precision.RoughCheck, "__call__", checked)
    file = tmp_path / "half.json"
    names = ["--workloads", "toy", "--quick", "--rounds", "1", "--mode", mode, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["half_precision.py", *names])
    half_precision.main()
    peers = json.loads(file.read_text())["workloads"]["toy"]["peers"]
    assert list(peers) == ["eager", "mbp.MLP", "MLP.loss", "loss_backward", "float32"]
    assert all(peer["median_seconds"] > 0 for peer in peers.values())
    assert dtypes == [torch.float16 if mode == "float16" else torch.float32] * 4 + [torch.float32]
    assert f"- mode: {mode}" in capsys.readouterr().out


def test_scaling_sets_the_threads_of_each_peer_anew(training_step):
    import scaling

    seen = []
    step = training_step.Step(lambda: seen.append(torch.get_num_threads()), list)
    one, two = (scaling.with_threads(lambda *_: step, count)(None, None, None) for count in (1, 2))
    for peer in (two, one, two):
        peer.run()
    assert seen == [2, 1, 2]


def test_per_sample_checks_its_peers_and_writes_what_it_measured(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(mbp.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / "per_sample.py", "--rounds", "1", "--rows", "64", "--json", "out/p.json"]
    result = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for peer in ("per_sample_gradients", "vmap(grad)", "norms", "clipped sum"):
        assert f"| {peer} " in result.stdout
    rows = json.loads((tmp_path / "out" / "p.json").read_text())
    assert {row["workload"] for row in rows} == {"mnist", "rl256"}
    assert all(row["times"] > 0 for row in rows)


def test_per_sample_refuses_wrong_gradients(training_step):
    import per_sample

    def wrong(model, x, target):
        return per_sample.means_of(lambda: {name: torch.zeros(1, *p.shape) for name, p in model.named_parameters()})

    with pytest.raises(SystemExit, match=r"wrong: the gradient of 0\.weight is off"):
        training_step.measure(
            training_step.Workload("small", [3, 4, 2], 8),
            ["eager", "wrong"],
            1,
            {"eager": per_sample.eager, "wrong": wrong},
        )


def test_transforms_checks_both_peers_and_writes_what_it_measured(training_step, monkeypatch, capsys, tmp_path):
    import transforms

    small = [dataclasses.replace(row, sizes=(3, 8, 4, 2), rows=5) for row in transforms.ROWS[::2]]
    monkeypatch.setattr(transforms, "ROWS", small)
    files = ["--json", str(tmp_path / "out" / "t.json"), "--markdown", str(tmp_path / "out" / "t.md")]
    monkeypatch.setattr(sys, "argv", ["transforms.py", "--quick", *files])
    transforms.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "t.md").read_text() == printed
    rows = printed.splitlines()
    assert len({len(row) for row in rows}) == 1  # aligned
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["ensemble", "backward", "per sample"]
    for row in json.loads((tmp_path / "out" / "t.json").read_text()):
        assert {len(seconds) for seconds in row["seconds"].values()} == {3}
        assert row["speedup"] > 0


def test_transforms_does_not_time_wrong_gradients(training_step, monkeypatch):
    import transforms

    def wrong(count, model, x, target):
        step = transforms.ensemble(count, model, x, target)
        return dataclasses.replace(step, gradients=lambda: [2 * gradient for gradient in step.gradients()])

    with pytest.raises(SystemExit, match=r"nn\.Sequential: the gradient of 0\.weight is off"):
        transforms.Row(wrong, 3, (3, 4, 2), 5).measure(1)


@pytest.fixture
def small_calls(training_step, monkeypatch):
    import small_calls

    monkeypatch.setattr(small_calls, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(small_calls, "COLD_CALLS", 2)
    return small_calls


def test_small_calls_checks_all_its_peers_and_writes_what_it_measured(
    small_calls, training_step, monkeypatch, capsys, tmp_path
):
    few = training_step.load_workloads(["toy", "rl64"])
    monkeypatch.setattr(small_calls, "load_workloads", lambda: few)
    files = ["--json", str(tmp_path / "out" / "c.json"), "--markdown", str(tmp_path / "out" / "c.md")]
    monkeypatch.setattr(sys, "argv", ["small_calls.py", "--quick", "--rounds", "2", *files])
    small_calls.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "c.md").read_text() == printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1  # aligned

    measured = json.loads((tmp_path / "out" / "c.json").read_text())
    assert {"machine", "date", "commit", "command", "rounds"} <= set(measured["header"])
    expected = [
        (case.group, case.name, case.rows, peer, mode)
        for case in small_calls.cases()
        for mode in case.modes
        for peer in case.peers
    ]
    assert [tuple(call[label] for label in small_calls.LABELS) for call in measured["calls"]] == expected
    assert len(set(expected)) == len(expected)
    assert len(rows) - 2 == len({labels[:4] for labels in expected if labels[3] != "plain"})
    for call in measured["calls"]:
        assert len(call["seconds"]) == 2
        assert call["median_seconds"] == statistics.median(call["seconds"]) > 0
        low, high = call["middle_half"]
        assert 0 < low <= call["speedup"] <= high


def test_small_calls_does_not_time_wrong_results(small_calls):
    def wrong(model, x, target):
        return small_calls.forward(lambda x: model(x) * 1.01, x, target)

    case = small_calls.Case("call", "2-3-1", [2, 3, 1], 4, {"plain": small_calls.forward, "wrong": wrong})
    with pytest.raises(SystemExit, match=r"call, 2-3-1, 4 rows: wrong is off by 1\.0e-02 \(allowed: 1e-03\)"):
        small_calls.measure([case], ["tight"], 1)


def test_other_work_precedes_each_cold_call_and_is_not_timed(small_calls, training_step, monkeypatch):
    clock, done = [0], []

    def spend(seconds, what):
        clock[0] += seconds
        done.append(what)

    monkeypatch.setattr(small_calls.time, "perf_counter", lambda: clock[0])
    step = training_step.Step(lambda: spend(1, "call"), list)
    assert small_calls.cold(lambda: spend(100, "other"), step, 3) == 1
    assert done == ["other", "call"] * 3


def test_small_calls_compares_checkouts_by_their_speed_beside_plain(small_calls, monkeypatch, tmp_path):
    (tmp_path / "torch_manualbp").mkdir()
    new = Path(mbp.__file__).parent.parent
    plain, fuse = (dict.fromkeys(small_calls.LABELS, "x") | {"peer": peer} for peer in ("plain", "fuse"))
    order = []

    def run(command, env, **_):  # the new one is twice as fast; the machine gets slower with each process
        path = Path(env["PYTHONPATH"])
        order.append(path)
        slow, speedup = len(order), 2 if path == new else 1
        calls = [
            {**plain, "median_seconds": slow, "speedup": 1},
            {**fuse, "median_seconds": slow / speedup, "speedup": speedup},
        ]
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"calls": calls}))

    monkeypatch.setattr(small_calls.subprocess, "run", run)
    entries = small_calls.compare(tmp_path, new, ["--rounds", "1"])
    assert order == [tmp_path, new, new, tmp_path] * (small_calls.PASSES // 2)
    assert [(entry["peer"], entry["speedup"], entry["middle_half"]) for entry in entries] == [
        ("plain", 1, [1, 1]),
        ("fuse", 2, [2, 2]),
    ]


def test_hand_written_checks_all_its_peers_and_writes_what_it_measured(training_step, monkeypatch, capsys, tmp_path):
    import hand_written

    names = ["17-64-64-6", "flow", "tabular"]
    files = ["--json", str(tmp_path / "h.json"), "--markdown", str(tmp_path / "h.md")]
    monkeypatch.setattr(
        sys, "argv", ["hand_written.py", "--quick", "--rounds", "2", "--models", *names, "--modes", "train", *files]
    )
    hand_written.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "h.md").read_text() == printed
    measured = json.loads((tmp_path / "h.json").read_text())["models"]
    assert [each["model"] for each in measured] == names
    for each in measured:
        assert {"plain", "fuse(model)"} <= set(each["peers"])
        assert all(timing["error"] == "" and len(timing["seconds"]) == 2 for timing in each["peers"].values())


@pytest.fixture
def whole_step(training_step):
    import whole_step

    return whole_step


def test_whole_step_checks_all_its_peers_and_writes_what_it_measured(whole_step, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(whole_step, "CLASSIFIERS", whole_step.CLASSIFIERS[:1])
    files = ["--json", str(tmp_path / "out" / "w.json"), "--markdown", str(tmp_path / "out" / "w.md")]
    arguments = ["--quick", "--rounds", "3", "--workloads", "rl64", "toy", "--epochs", "2", "--seeds", "1", *files]
    monkeypatch.setattr(sys, "argv", ["whole_step.py", *arguments])
    whole_step.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "w.md").read_text() == printed
    tables = [paragraph.splitlines() for paragraph in printed.split("\n\n") if paragraph.startswith("|")]
    assert [len(rows) - 2 for rows in tables] == [3, 2, 3, 2, 1]
    for rows in tables:
        assert len({len(row) for row in rows}) == 1  # aligned

    measured = json.loads((tmp_path / "out" / "w.json").read_text())
    assert {"machine", "instruction set", "software", "date", "command"} <= set(measured["header"])
    for name, builders in (("steps", whole_step.STEPS), ("optimizer", whole_step.UPDATES)):
        assert set(measured[name]) == {"toy", "rl64"}
        for peers in measured[name].values():
            assert list(peers) == [peer for peer in builders if peer not in whole_step.COMPILERS]
            reference = next(iter(peers.values()))
            for peer in peers.values():
                assert len(peer["seconds"]) == 3
                assert peer["median_seconds"] == statistics.median(peer["seconds"]) > 0
                pairs = zip(reference["seconds"], peer["seconds"], strict=True)
                assert peer["speedup"] == statistics.median(a / b for a, b in pairs)
    [fits] = measured["sklearn"].values()
    assert {len(values) for kind in fits.values() for values in kind.values()} == {1}
    assert fits["accuracies"]["ours"] == pytest.approx(fits["accuracies"]["scikit-learn"], abs=0.02)


def test_whole_step_names_the_networks_that_there_are(whole_step):
    assert [workload.name for workload in whole_step.choose_workloads(["td3", "toy"])] == ["toy", "td3"]
    with pytest.raises(SystemExit, match="no workload is called 'tyo'; there are: toy, rl64, rl256, td3, mnist"):
        whole_step.choose_workloads(["toy", "tyo"])


def test_the_data_set_of_a_tall_network_is_bounded(whole_step, training_step):
    assert len(whole_step.build(training_step.Workload("", [2, 3, 1], 4)).x) == 4 * whole_step.BATCHES
    tall = whole_step.build(training_step.Workload("", [2**11, 1, 1], 2**10))
    assert whole_step.DATA_BYTES * 0.9 < tall.x.nbytes + tall.target.nbytes <= whole_step.DATA_BYTES


@pytest.mark.parametrize(
    ("options", "quantity"),
    [
        ({"lr": 1.1e-3}, "update"),
        ({"eps": 1e-3}, "update"),
        ({"betas": (0.8, 0.999)}, "update"),
        ({"betas": (0.9, 0.998)}, "second moment"),  # equal updates of equal gradients
        ({"weight_decay": 0.1}, "update"),
    ],
)
def test_whole_step_does_not_time_a_wrong_update(whole_step, training_step, options, quantity):
    def wrong(task):
        return whole_step.with_autograd(task, task.model, whole_step.adam(task.model, **options))

    task = whole_step.build(training_step.Workload("small", [3, 4, 2], 5))
    with pytest.raises(SystemExit, match=rf"wrong: after 3 steps the {quantity} of 0\.weight is off by"):
        whole_step.measure(task, {"eager": whole_step.eager, "wrong": wrong}, whole_step.eager, rounds=1)


def test_whole_step_does_not_time_nan(whole_step, training_step):
    def wrong(task):
        trainer = whole_step.eager(task)
        return dataclasses.replace(trainer, gradients=lambda: [tensor * torch.nan for tensor in trainer.gradients()])

    task = whole_step.build(training_step.Workload("small", [3, 4, 2], 5))
    with pytest.raises(SystemExit, match=r"wrong: after 3 steps the update of 0\.weight is off by nan"):
        whole_step.measure(task, {"eager": whole_step.eager, "wrong": wrong}, whole_step.eager, rounds=1)


def test_whole_step_does_not_time_a_peer_that_takes_the_wrong_batches(whole_step, training_step):
    def always_the_first(task):
        return whole_step.eager(whole_step.Task(task.model, task.x[:5], task.target[:5], 5))

    task = whole_step.build(training_step.Workload("small", [3, 4, 2], 5))
    with pytest.raises(SystemExit, match="wrong: after 3 steps"):
        whole_step.measure(task, {"eager": whole_step.eager, "wrong": always_the_first}, whole_step.eager, rounds=1)


def test_a_peer_is_timed_in_whole_calls_at_a_small_learning_rate(whole_step):
    done = []
    trainer = whole_step.make_trainer(lambda steps: done.append(steps) or steps * 0.5, list, unit=4)
    assert trainer.repeat(1) == 0.5
    assert trainer.repeat(10) == 5
    assert done == [4, 8]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, when it compiles
def test_the_compilers_take_the_same_whole_steps(whole_step, training_step):
    peers = [peer for peer in whole_step.COMPILERS if peer in whole_step.available(whole_step.STEPS, compilers=True)]
    task = whole_step.build(training_step.Workload("small", [3, 4, 2], 5))
    builders = {peer: whole_step.STEPS[peer] for peer in ("eager", *peers)}
    for timing in whole_step.measure(task, builders, whole_step.eager, rounds=2).values():  # checks the states
        assert not timing.error
        assert len(timing.speedups) == 2


def test_whole_step_leaves_a_jax_that_is_not_installed_out(whole_step, monkeypatch):
    monkeypatch.setattr(whole_step.importlib.util, "find_spec", lambda _: None)
    left_out = set(whole_step.STEPS) - set(whole_step.available(whole_step.STEPS, compilers=True))
    assert left_out == {peer for peer in whole_step.COMPILERS if peer.startswith("JAX")} != set()


def test_whole_step_compares_classifiers_that_learn_the_same_only(whole_step, monkeypatch):
    import torch_manualbp.sklearn as ours

    class Wrong(ours.MLPClassifier):
        def fit(self, X, y):
            self.learning_rate_init = 0.01
            return super().fit(X, y)

    monkeypatch.setattr(ours, "MLPClassifier", Wrong)
    with pytest.raises(SystemExit, match="64–100–10, batch 200, float64: the loss of the first epoch is"):
        whole_step.measure_fits(whole_step.CLASSIFIERS[0], epochs=1, seeds=1)
