"""Measures raylora on one GPU, most valuable first: right, then fast. Each figure is on disk as soon as it is there.

Run as `python benchmarks/gpu.py OUTPUT_DIR [--budget SECONDS] [--only STAGE ...] [--dry]`, with nothing else running.
On a machine that is lent for minutes, `article` and `merge_1b` are for a call of their own. Of the tests, those in
`tests/training/packed/test_gpu.py` and `test_fused.py` need a GPU and no Ray.

The figures go to `OUTPUT_DIR/results.jsonl`, a line each. Each stage is a process of its own with a time limit, so that
neither a device assert nor a hang takes the rest along. `--dry` runs every stage on a tiny model, on a CPU too, to test
the script. Bases are random weights, so figures are of speed and of agreement, not of loss.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # raylora need not be installed

import torch
from peft import PeftModel
from random_base import make_base, make_engine
from throughput import LENGTH, TRIAL, Steps, packed, packed_seconds, trl_seconds
from torch.nn.functional import grouped_mm
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raylora.base.load import compute_dtype, free_unused
from raylora.config.assignment import Assignment
from raylora.config.schema import BaseModelSection, DataSection, MergeSection, SearchSection
from raylora.data.prepare import prepare_data
from raylora.data.rows import TokenRows
from raylora.errors import PackingError
from raylora.evaluate.generate import generate
from raylora.merge.job import MergeJob
from raylora.merge.select import merge_adapter
from raylora.merge.write import load_merged
from raylora.quiet import quiet_libraries
from raylora.run.activity import Activity, heard
from raylora.run.metrics import RungMetrics
from raylora.testing import make_rows, make_tiny_model
from raylora.training import trl as training
from raylora.training.memory import (
    Fit,
    MemoryEstimate,
    adapter_parameters,
    estimate_memory,
    free_memory_mib,
    peak_memory_mib,
    reset_peak_memory,
    tokens_per_pass,
)
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.engine import RANK_MULTIPLE, PackedEngine
from raylora.training.packed.forward import Pack
from raylora.training.packed.fused import MAX_RANK, has_fused_products
from raylora.training.packed.group import has_grouped_products
from raylora.training.packed.layout import MicroBatch
from raylora.training.packed.verify import RANKS, check_kernels, check_pack, measure_reference
from raylora.training.trl import TrlEngine

MIXED_RANKS = (8, 16, 32, 64) * 2
"""Ranks of the default space, two trials each."""

ARTICLE_RANKS, ARTICLE_ROWS = (8, 64), 4
"""Ranks of the two trials of `article`, and rows of their micro-batches."""

CARD_MIB = 23.5 * 1024
"""Memory of a card of 24 GB, in MiB, without what the driver takes."""

OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for all stages together")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--here", action="store_true", help="run the stages in this process, without limits")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        for stage in arguments.only:
            STAGES[stage][1](Bench(arguments.output, stage, dry=arguments.dry))
        return
    end = time.monotonic() + arguments.budget
    for stage in arguments.only:
        note(arguments.output, stage, **_in_a_process(stage, arguments, end - time.monotonic()))
    print((arguments.output / "results.jsonl").read_text())


def _in_a_process(stage: str, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a stage within its limit. Return its seconds and its error, None if there is none."""
    limit = min(STAGES[stage][0], left)
    if limit < 8:
        return {"error": "not run: no time is left"}
    command = [sys.executable, __file__, str(arguments.output), "--here", "--only", stage]
    began = time.monotonic()
    # in a session of its own, to be stopped with the processes that it has started
    process = subprocess.Popen(
        command + ["--dry"] * arguments.dry,
        env={**os.environ, **OFFLINE},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=limit)
        error = said[-1500:] if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        error = f"stopped after {limit:.0f} s: {said[-1500:]}"
    return {"stage_seconds": round(time.monotonic() - began, 1), "error": error}


def note(output: Path, stage: str, **facts: Any) -> None:
    """Append a line to the results, and wait until it is on disk."""
    with (output / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **facts}) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Bench:
    """Device, bases and clocks of the stages.

    Args:
        output: folder of the results.
        stage: name of the stage.
        dry: True to run on a tiny model.
    """

    def __init__(self, output: Path, stage: str, *, dry: bool) -> None:
        self.output, self.stage, self.dry = output, stage, dry
        quiet_libraries()
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda:0" if self.on_gpu else "cpu")
        self.dtype = compute_dtype(BaseModelSection(name=""), self.device.type)
        self.autocast = None if self.dtype == torch.float32 else self.dtype
        self.grouped = has_grouped_products(self.device)
        self.fused = has_fused_products(self.device, self.dtype)

    def note(self, **facts: Any) -> None:
        note(self.output, self.stage, **facts)

    @contextmanager
    def unless_too_large(self, **facts: Any) -> Iterator[None]:
        """Note facts and error if the block runs out of memory, and go on after it."""
        free_unused()  # what the last one has left
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.note(**facts, error=str(error)[:200])

    def engine(self, shape: str, dtype: torch.dtype | None = None) -> TrlEngine:
        """Make a base of a shape, or of the tiny one, and TRL's engine on it."""
        began = time.perf_counter()
        base = make_base("tiny" if self.dry else shape, str(self.device), dtype or self.dtype)
        self.wait()
        self.note(base=shape, made_in_seconds=time.perf_counter() - began)
        return make_engine(base, self.tokenizer())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        with tempfile.TemporaryDirectory() as folder:
            return AutoTokenizer.from_pretrained(make_tiny_model(Path(folder) / "tiny"), pad_token="</s>")

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], n: int = 20) -> float:
        """Return the seconds of a call on the device: the median of n, after three to warm up."""
        for _ in range(3):
            call()
        times = []
        for _ in range(n):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - began)
        return sorted(times)[n // 2]

    def host_seconds(self, call: Callable[[], Any], n: int = 100) -> float:
        """Return the seconds in which the host hands a call to the device, without waiting for it."""
        call()
        self.wait()
        began = time.perf_counter()
        for _ in range(n):
            call()
        seconds = (time.perf_counter() - began) / n
        self.wait()
        return seconds


def env(bench: Bench) -> None:
    """Note versions and the speed of the machine."""
    packages = ("torch", "transformers", "bitsandbytes", "peft", "trl", "numpy")
    bench.note(
        versions={name: importlib.metadata.version(name) for name in packages},
        cuda=torch.version.cuda,
        device=torch.cuda.get_device_name() if bench.on_gpu else "cpu",
        capability=torch.cuda.get_device_capability() if bench.on_gpu else None,
        grouped=bench.grouped,
        fused=bench.fused,
        cores=len(os.sched_getaffinity(0)),
        free_mib=free_memory_mib(str(bench.device)),
    )
    n = 8192 if bench.on_gpu else 256
    matrix = torch.randn(n, n, device=bench.device, dtype=bench.dtype)
    buffer = torch.empty(2**30 if bench.on_gpu else 2**20, device=bench.device, dtype=torch.uint8)
    copy, one = torch.empty_like(buffer), torch.zeros(1, device=bench.device)
    bench.note(
        matmul_tflops=2 * n**3 / bench.seconds(lambda: matrix @ matrix) / 1e12,
        copy_gb_per_second=2 * buffer.numel() / bench.seconds(lambda: copy.copy_(buffer)) / 1e9,
        host_microseconds_of_a_launch=bench.host_seconds(lambda: one.add_(1)) * 1e6,
    )


def check(bench: Bench) -> None:
    """Run the check of a lane's start on this device: losses and gradients against the model itself and peft."""
    for dtype in (torch.float16,) if bench.dtype == torch.float16 else (torch.bfloat16, torch.float16):
        engine, grouped = bench.engine("smollm2", dtype), bench.grouped and dtype == torch.bfloat16
        multiple = RANK_MULTIPLE if grouped else 1
        reference = measure_reference(
            engine.model,
            engine.architecture,
            TokenRows(engine.train),
            autocast=dtype,
            rank_multiple=multiple,
            ranks=(*RANKS, MAX_RANK),
        )
        pack = Pack(engine.model, list(engine.architecture.shapes), autocast=dtype, grouped=grouped)
        has_kernels = has_fused_products(bench.device, dtype)
        for pack.fused, pack.fused_layers in itertools.product(
            (False, True) if has_kernels else (False,), (False, True)
        ):
            switches = {"dtype": str(dtype), "fused": pack.fused, "fused_layers": pack.fused_layers}
            try:
                check_pack(pack, reference, dtype)
                if pack.fused:
                    check_kernels(pack, reference, dtype)
                bench.note(**switches, passed=True)
            except PackingError as error:
                bench.note(**switches, passed=False, why=str(error))
        pack.close()


def products(bench: Bench) -> None:
    """Compare `grouped_mm` with float32 at odd lengths, see whether a NaN stays in its group, and time single calls."""
    worst, leaks = 0.0, 0
    for lengths in ([1, 7, 33, 470], [511] * 8, [8, 16, 24], [3, 1, 1, 2, 5]):
        for n, r in ((576, 8), (4096, 16), (11008, 64)) if bench.on_gpu else ((64, 8),):
            errors, leaked = _grouped_errors(bench, lengths, n, r)
            worst, leaks = max(worst, *errors), leaks + leaked
    bench.note(grouped_mm_worst_relative_error=worst, grouped_mm_nan_leaks=leaks)
    n, n_tokens, r, k = (4096, 4096, 16, 8) if bench.on_gpu else (64, 64, 16, 8)
    x = torch.randn(n_tokens, n, device=bench.device, dtype=bench.dtype)
    factors = torch.randn(k, r, n, device=bench.device, dtype=bench.dtype)
    h = torch.randn(n_tokens, r, device=bench.device, dtype=bench.dtype)
    ends = (torch.arange(k) + 1).mul(n_tokens // k).to(bench.device, torch.int32)
    calls = {
        "grouped down": lambda: grouped_mm(x, factors.mT, offs=ends),
        "grouped up": lambda: grouped_mm(h, factors, offs=ends),
        "grouped outer": lambda: grouped_mm(h.t(), x, offs=ends),
        "single down": lambda: x @ factors[0].t(),
        "loop down": lambda: [part @ one.t() for part, one in zip(x.chunk(k), factors, strict=True)],
    }
    bench.note(
        microseconds={
            name: [1e6 * bench.seconds(call), 1e6 * bench.host_seconds(call)] for name, call in calls.items()
        },
        columns=["device", "host"],
    )


def _grouped_errors(bench: Bench, lengths: list[int], n: int, r: int) -> tuple[list[float], int]:
    """Return the relative errors of both kinds of grouped products, and the number of groups that a NaN reached."""
    ends = torch.tensor(lengths).cumsum(0)
    bounds = [0, *ends.tolist()]
    offs = ends.to(bench.device, torch.int32)
    options: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    x, h = torch.randn(bounds[-1], n, **options), torch.randn(bounds[-1], r, **options)
    factors = torch.randn(len(lengths), r, n, **options)
    x[bounds[1] : bounds[2]] = torch.nan
    down, outer = grouped_mm(x, factors.mT, offs=offs), grouped_mm(h.t(), x, offs=offs)
    errors, leaks = [], 0
    for group, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if group == 1:
            continue  # the one with the NaN
        rows = x[start:stop].float()
        pairs = (
            (down[start:stop].float(), rows @ factors[group].float().t()),
            (outer[group].float(), h[start:stop].float().t() @ rows),
        )
        for found, expected in pairs:
            leaks += int(found.isnan().any())
            errors.append(float((found - expected).norm() / expected.norm()))
    return errors, leaks


def exact(bench: Bench) -> None:
    """Train a pack in bfloat16 against TRL and peft; compare a trial alone with one in company and beside a NaN."""
    engine = bench.engine("smollm2")
    steps = 2 if bench.dry else 12
    changes = {"lora_dropout": 0.0, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    trials = [
        TRIAL.model_copy(update={**changes, "r": r, "lora_alpha": r, "seed": n}) for n, r in enumerate((8, 16, 16, 64))
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = _train_together(packed(engine), trials, steps, Path(folder))
        _compare_company(bench, engine)
        for number in (0, 1, 3):
            reports: list[RungMetrics] = []
            with patch.object(training, "_keep_adapter_in_float32", _draw_as_packed):
                engine.fit(
                    trials[number],
                    rungs=[steps],
                    directory=Path(folder) / f"trl-{number}",
                    report=lambda report, reports=reports: bool(reports.append(report)),
                )
            alone = reports[-1].eval_loss
            bench.note(r=trials[number].r, packed=found[number], trl=alone, relative=abs(found[number] / alone - 1))


def _compare_company(bench: Bench, engine: TrlEngine) -> None:
    """Note how the gradient of an adapter beside others differs from that of the adapter alone."""
    pack = Pack(
        engine.model,
        list(engine.architecture.shapes),
        autocast=bench.autocast,
        grouped=bench.grouped,
        fused=bench.fused,
        fused_layers=True,
    )
    for ranks in ((16, 16, 16, 16), (16, 8, 32, 64)):
        whole = _first_gradient(pack, ranks)
        alone = _first_gradient(pack, ranks[:1])
        bench.note(
            ranks=ranks,
            again_bit_equal=torch.equal(whole, _first_gradient(pack, ranks)),
            beside_nan_bit_equal=torch.equal(whole, _first_gradient(pack, ranks, broken=True)),
            company_over_alone=float(whole @ alone / (alone @ alone)),
            relative_difference=float((whole - alone).norm() / alone.norm()),
        )
    pack.close()


def _draw_as_packed(model: PeftModel, trial: Assignment, resume_from: str | None) -> None:
    """Give TRL's trial the factors that the packed one starts from, in float32; peft would draw A on the GPU."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    adapter = Adapter(shapes, r=trial.r, scaling=1.0, dropout=0.0, seed=trial.seed, device=model.device)
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data = adapter.lora_A[name].clone()
        layer.lora_B["default"].to(torch.float32)


def _train_together(engine: PackedEngine, trials: list[Assignment], steps: int, folder: Path) -> dict[int, float]:
    """Return the validation loss of each trial after so many steps in one pack."""
    losses = {}
    for number, trial in enumerate(trials):
        engine.add(number, trial, rungs=[steps], directory=folder / str(number))
    while engine.trials:
        for number, report in engine.step().items():
            assert isinstance(report, RungMetrics), report
            losses[number] = report.eval_loss
            engine.remove(number)
    engine.close()
    return losses


def _first_gradient(pack: Pack, ranks: tuple[int, ...], *, broken: bool = False) -> torch.Tensor:
    """Return the gradient of the first of some adapters, the second of which may hold NaN."""
    adapters = [
        Adapter(
            pack.shapes, r=r, scaling=2.1, dropout=0.05, seed=n, device=pack.model.device, rank_multiple=RANK_MULTIPLE
        )
        for n, r in enumerate(ranks)
    ]
    for adapter in adapters:
        for number, view in enumerate(adapter.lora_B.values()):
            view.copy_(0.01 * torch.randn(view.shape, generator=torch.Generator().manual_seed(number)))
    if broken:
        adapters[1].parameters[1].data.fill_(torch.nan)
    batches = []
    for number, adapter in enumerate(adapters):
        row = torch.randint(5, 250, (37 + 3 * number,), generator=torch.Generator().manual_seed(number))
        batches.append(MicroBatch(adapter, [row], [row], 0.1, key=1))
    pack.backward(batches)
    return torch.cat([parameter.grad for parameter in adapters[0].parameters]).double()


def speed(bench: Bench, shape: str, cases: list[tuple[int, int]], trl_tokens: list[int]) -> None:
    """Time packs and TRL, and note the peak memory beside its estimate.

    Args:
        bench: the bench.
        shape: shape of the base.
        cases: trials and tokens of each trial's micro-batch, most valuable first.
        trl_tokens: tokens of a micro-batch of TRL's.
    """
    engine = bench.engine(shape)
    steps = Steps(warm_up=1, timed=1) if bench.dry else Steps(warm_up=2, timed=4)
    if bench.dry:
        cases, trl_tokens = [(n, LENGTH) for n, _ in cases[:2]], [LENGTH]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n, tokens in cases[:2]:
            _time_pack(bench, engine, shape, [TRIAL.r] * n, tokens, folder, steps)
        for options in ({}, {"fused": False}, {"fused_layers": False}, {"dense": True}):
            _time_pack(bench, engine, shape, list(MIXED_RANKS), cases[0][1], folder, steps, **options)
        for tokens in trl_tokens:
            trial = TRIAL.model_copy(update={"per_device_train_batch_size": tokens // LENGTH})
            facts = {"shape": shape, "engine": "trl", "tokens": tokens}
            with bench.unless_too_large(**facts):
                seconds = trl_seconds(engine, trial, folder / f"trl-{tokens}", steps)
                bench.note(**facts, seconds=seconds, tokens_per_second=tokens / seconds)
        for n, tokens in cases[2:]:
            _time_pack(bench, engine, shape, [TRIAL.r] * n, tokens, folder, steps)
        # passes of one long micro-batch, where one kernel of the fused products has few programs
        n, tokens = max(cases, key=lambda case: case[1])
        _time_pack(bench, engine, shape, [TRIAL.r] * n, tokens, folder, steps, fused=False)


def _time_pack(
    bench: Bench,
    engine: TrlEngine,
    shape: str,
    ranks: list[int],
    tokens: int,
    folder: Path,
    steps: Steps,
    **options: bool,
) -> None:
    """Note seconds of a step and peak memory of a pack; the options are those of `throughput.packed`."""
    trial = TRIAL.model_copy(update={"per_device_train_batch_size": tokens // LENGTH})
    n_tokens = len(ranks) * tokens
    fit = Fit(len(ranks), _tokens_of_pass(bench, n_tokens, tokens), False)
    estimate = _estimate(bench, engine, ranks, tokens // LENGTH, LENGTH, **options)
    facts = {"shape": shape, "engine": "packed", "options": options, "ranks": ranks, "tokens": tokens}
    with bench.unless_too_large(**facts):
        reset_peak_memory()
        seconds, _ = packed_seconds(engine, trial, len(ranks), folder, steps, ranks, **options)
        bench.note(
            **facts,
            seconds=seconds,
            seconds_per_trial=seconds / len(ranks),
            tokens_per_second=n_tokens / seconds,
            peak_mib=peak_memory_mib(),
            # the estimate knows no dense base, which is kept only where memory is left
            estimated_mib=None if options.get("dense") else estimate.total_mib(fit),
        )


def _tokens_of_pass(bench: Bench, n_tokens: int, micro_batch: int) -> int:
    """Return the tokens of the largest pass of a step."""
    return min(n_tokens, max(micro_batch, tokens_per_pass(SearchSection(), on_gpu=bench.on_gpu)))


def _estimate(
    bench: Bench, engine: TrlEngine, ranks: list[int], rows: int, length: int, *, fused: bool = True, **_: bool
) -> MemoryEstimate:
    """Return the memory that raylora expects of trials of these ranks, with rows of so many tokens in a micro-batch."""
    return estimate_memory(
        engine.model.config,
        engine.architecture,
        n_adapter_parameters=sum(adapter_parameters(engine.architecture.shapes, r) for r in ranks) // len(ranks),
        rows=rows,
        length=length,
        dtype_bytes=bench.dtype.itemsize,
        nf4=True,
        double_quant=True,
        on_gpu=bench.on_gpu,
        stacked=bench.on_gpu and not (fused and bench.fused),
    )


def speed_7b(bench: Bench) -> None:
    """Time the shape of Llama 2 7B."""
    cases = [(8, 512), (1, 512), (8, 128), (1, 128), (4, 512), (16, 512), (8, 2048), (4, 4096), (1, 2048)]
    speed(bench, "7b", cases, [512, 128, 2048])


def speed_smollm2(bench: Bench) -> None:
    """Time the shape of SmolLM2-135M."""
    cases = [(8, 512), (1, 512), (8, 128), (16, 128), (4, 512), (2, 512), (8, 2048)]
    speed(bench, "smollm2", cases, [512, 128])


def speed_1b(bench: Bench) -> None:
    """Time the shape of Llama 3.2 1B."""
    speed(bench, "1b", [(8, 512), (1, 512), (8, 128), (8, 2048)], [512])


def kernels(bench: Bench) -> None:
    """Count the kernels of a step, and note the share of its time in which the GPU works."""
    for shape, n_trials in (("smollm2", (8,)), ("7b", (1, 8))):
        engine = bench.engine(shape)
        for n in n_trials:
            with bench.unless_too_large(shape=shape, trials=n), closing(packed(engine)) as pack:
                for number in range(n):
                    trial = TRIAL.model_copy(update={"per_device_train_batch_size": 512 // LENGTH, "seed": number})
                    pack.add(number, trial, rungs=[10**6], directory=Path("/nowhere"))
                pack.step()
                wall = bench.seconds(pack.step, 3)
                events = _profiled(bench, pack.step)
                by_name: dict[str, list[float]] = {}
                for name, milliseconds in events:
                    by_name.setdefault(name, []).append(milliseconds)
                longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:14]
                bench.note(
                    shape=shape,
                    trials=n,
                    seconds=wall,
                    kernels=len(events),
                    busy_seconds=sum(milliseconds for _, milliseconds in events) / 1e3,
                    longest=[[name, len(times), round(sum(times), 2)] for name, times in longest],
                    columns=["kernel", "calls", "milliseconds"],
                )
        del engine


def _profiled(bench: Bench, call: Callable[[], Any]) -> list[tuple[str, float]]:
    """Return name and milliseconds of each kernel of a call, or of each operator on a CPU."""
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu) as profiler:
        call()
        bench.wait()
    kind = "CUDA" if bench.on_gpu else "CPU"
    # an optimizer's step is annotated on the GPU too, with the time of its kernels
    return [
        (event.name()[:70], event.duration_ns() / 1e6)
        for event in profiler.profiler.kineto_results.events()
        if str(event.device_type()).endswith(kind) and not event.is_user_annotation()
    ]


def merge_1b(bench: Bench) -> None:
    """Merge an adapter into random weights of 1B by `merge_size.py`."""
    script, output = Path(__file__).parent / "merge_size.py", bench.output / "merge_1b.json"
    command = [sys.executable, str(script), str(output), "--model", "tiny" if bench.dry else "1b"]
    # as here, raylora need not be installed there
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    bench.note(**json.loads(output.read_text()))


def article(bench: Bench) -> None:
    """Take two trials of the shape of Llama 2 7B through every stage of a search, with time and peak memory of each.

    The trials are of r 8 and 64, with 4 rows of 256 to 1024 tokens a micro-batch, as `search_spaces/qlora.yaml` has
    them on rows of conversations: trained, paused, resumed, merged, loaded and asked. Activations are recomputed if a
    search would do so on a card of 24 GB.
    """
    engine = bench.engine("7b")
    longest = 64 if bench.dry else 1024
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 4, longest + 1, (64,), generator=generator).tolist()
    rows = [torch.randint(5, 250, (n,), generator=generator).tolist() for n in lengths]
    estimate = _estimate(bench, engine, list(ARTICLE_RANKS), ARTICLE_ROWS, longest)
    fit = estimate.fit(CARD_MIB - estimate.base_mib, slots=2, tokens=4096, checkpointing="auto")
    bench.note(card_mib=CARD_MIB, fit=asdict(fit), estimated_mib=estimate.total_mib(fit))
    pack = PackedEngine(
        engine.model,
        engine.architecture,
        _Rows(rows),
        _Rows(rows[:8]),
        engine.training.model_copy(update={"gradient_checkpointing": fit.checkpointing}),
        tokens_per_pass=fit.tokens,
        slots=fit.slots,
        autocast=bench.autocast,
        grouped=bench.grouped,
        fused=bench.fused,
        fused_layers=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trials = [
            TRIAL.model_copy(update={"r": r, "lora_alpha": r, "seed": n, "per_device_train_batch_size": ARTICLE_ROWS})
            for n, r in enumerate(ARTICLE_RANKS)
        ]
        for number, trial in enumerate(trials):
            pack.add(number, trial, rungs=[2, 4], directory=folder / str(number))
        _staged(bench, "train and validate two trials, 2 steps", lambda: [pack.step() for _ in range(2)])
        checkpoint = _staged(bench, "pause", lambda: pack.remove(1).save())
        resume = {"rungs": [2, 4], "directory": folder / "1", "resume_from": str(checkpoint)}
        _staged(bench, "resume", lambda: pack.add(1, trials[1], **resume))
        _staged(bench, "train and validate two trials, 2 steps more", lambda: [pack.step() for _ in range(2)])
        adapter = pack.remove(1).save()
        pack.close()
        _merge_and_ask(bench, engine, adapter, folder)


class _Rows(TokenRows):
    """Rows in memory, with loss on all tokens.

    Args:
        rows: token ids of each row.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = [torch.tensor(row) for row in rows]
        self.lengths = list(map(len, rows))

    def input_ids(self, row: int) -> torch.Tensor:
        return self._rows[row]

    def labels(self, row: int) -> torch.Tensor:
        return self._rows[row]

    def n_predicted(self, row: int) -> int:
        return len(self._rows[row]) - 1


def _merge_and_ask(bench: Bench, engine: TrlEngine, adapter: Path, folder: Path) -> None:
    """Write the base, merge an adapter into it, load the result and have it answer 8 prompts."""
    _staged(bench, "write the base", lambda: engine.model.save_pretrained(folder / "base"))
    tokenizer = bench.tokenizer()
    tokenizer.save_pretrained(folder / "base")
    data = DataSection(train=str(make_rows(folder / "rows.jsonl", 64)), validation_size=8, heldout_size=8)
    job = MergeJob(
        base=BaseModelSection(name=str(folder / "base")),
        adapter=adapter,
        outputs={"nf4": folder / "merged"},
        folder=folder,
        settings=MergeSection(strategy="calibrated"),
        cache_dir=folder / "cache",
        device=str(bench.device),
        tokens_dir=prepare_data(data, tokenizer, folder / "cache").tokens_dir,
        batch_size=8,
    )
    with heard(partial(_note_activity, bench)):  # a stage that is stopped leaves how far it came
        _staged(bench, "merge", lambda: merge_adapter(job))
    model = _staged(bench, "load the merged model", lambda: load_merged(folder / "merged", job.device, bench.dtype))
    prompts = [list(range(5, 25))] * 8
    options: dict[str, Any] = {"stop_token_ids": [1], "max_new_tokens": 32, "batch_size": "auto"}
    began = time.perf_counter()
    answers = _staged(bench, "generate 8 answers", lambda: generate(model, tokenizer, prompts, **options))
    seconds = time.perf_counter() - began
    bench.note(tokens_per_second=sum(map(len, answers.token_ids)) / seconds)


def _note_activity(bench: Bench, activity: Activity) -> None:
    bench.note(what=activity.what, done=activity.done, total=activity.total)


def _staged(bench: Bench, what: str, call: Callable[[], Any]) -> Any:
    """Run a call, and note its seconds and peak memory."""
    reset_peak_memory()
    began = time.perf_counter()
    result = call()
    bench.wait()
    bench.note(what=what, seconds=time.perf_counter() - began, peak_mib=peak_memory_mib())
    return result


STAGES: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "env": (30, env),
    "check": (120, check),
    "products": (50, products),
    "exact": (110, exact),
    "speed_7b": (150, speed_7b),
    "speed_smollm2": (80, speed_smollm2),
    "kernels": (60, kernels),
    "speed_1b": (45, speed_1b),
    "article": (300, article),
    "merge_1b": (180, merge_1b),
}
"""Stage -> limit in seconds and function, in the order in which they run."""


if __name__ == "__main__":
    main()
