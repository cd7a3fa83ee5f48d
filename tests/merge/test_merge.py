"""The merge keeps the fine-tune, and what it writes is a plain bitsandbytes checkpoint."""

import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PretrainedConfig, Qwen2Config
from typer.testing import CliRunner

from raylora.base.load import load_base_model, load_plain
from raylora.base.locate import load_tokenizer
from raylora.cli.app import app
from raylora.config.schema import MergeSection, SearchConfig
from raylora.data.prepare import prepare_data
from raylora.data.rows import IGNORE, load_part
from raylora.errors import BaseModelError, ConfigError, MergeError, RunDirectoryError
from raylora.merge import adapter_update as updates
from raylora.merge import calibrate
from raylora.merge import run as merge_of_run
from raylora.merge import select as merging
from raylora.merge.evaluator import MergeEvaluator
from raylora.merge.gate import check_tolerance
from raylora.merge.job import MergeJob
from raylora.merge.rounding import CalibrationInputs
from raylora.merge.run import merge_run, save_best_adapter
from raylora.merge.select import RoundedModel, _measure_written, accepted_increase, merge_adapter, open_reader
from raylora.merge.write import write_nf4
from raylora.report.merge_tables import merge_rows, verdict
from raylora.run.atomic import PREFIX, read_json, write_json
from raylora.run.directory import RunDirectory
from raylora.run.events import EventLog, Finished, Started
from raylora.run.provenance import write_provenance
from raylora.training.losses import pad
from tests.helpers import LANE, SESSION, proposed, reported

IDS = torch.arange(4, 24)[None]
LAYERED = ("calibrated", "requantize", "stochastic")


@pytest.fixture
def tokens(make_config: Callable[..., SearchConfig], tmp_path: Path) -> Path:
    config = make_config()
    return prepare_data(config.data, AutoTokenizer.from_pretrained(config.base_model.name), tmp_path).tokens_dir


@pytest.fixture
def make_job(make_config: Callable[..., SearchConfig], tokens: Path, tmp_path: Path) -> Callable[..., MergeJob]:
    """A job on the tiny model, with an adapter that has learnt the rows a little."""

    def make(
        base: Path | None = None,
        *,
        quantization: str = "nf4",
        steps: int = 20,
        rows: bool = True,
        settings: dict[str, Any] | None = None,
        **lora: Any,
    ) -> MergeJob:
        name = {"name": str(base)} if base else {}
        section = make_config(base_model={"quantization": quantization, **name}).base_model
        model = get_peft_model(
            load_base_model(section, tmp_path / "cache", "cpu"),
            LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **lora}),
        )
        train_a_little(model, tokens, steps)
        model.save_pretrained(tmp_path / "adapter")
        merge_settings = MergeSection.model_validate(settings or {})
        return MergeJob(
            base=section,
            adapter=tmp_path / "adapter",
            outputs={form: tmp_path / "merged" / form for form in merge_settings.formats},
            folder=tmp_path / "merged",
            settings=merge_settings,
            cache_dir=tmp_path / "cache",
            device="cpu",
            tokens_dir=tokens if rows else None,
            batch_size=4,
        )

    return make


def train_a_little(model: PeftModel, tokens: Path, steps: int) -> None:
    """Steps on all rows; twenty make an update of about 3 % of the weight."""
    rows = load_part(tokens, "train")
    input_ids, labels = pad(list(rows["input_ids"]), 1), pad(list(rows["labels"]), IGNORE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
    optimizer = torch.optim.Adam(trained, lr=2e-4)
    for _ in range(steps):
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def with_adapter(job: MergeJob) -> PeftModel:
    return PeftModel.from_pretrained(load_base_model(job.base, job.cache_dir, "cpu"), str(job.adapter)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def test_all_measures_each_strategy_and_writes_the_best(make_job: Callable[..., MergeJob]) -> None:
    job = replace(make_job(settings={"strategy": "all", "formats": ["nf4", "bf16", "residual"]}), measures_heldout=True)
    result = merge_adapter(job)
    models = result["models"]
    assert set(models) == {"base", "adapter", *LAYERED, "peft"}
    divergences = {name: models[name]["kl_to_adapter"] for name in LAYERED}
    assert divergences[result["strategy"]] == min(divergences.values())
    assert models["adapter"]["kl_to_adapter"] == 0
    assert models["adapter"]["token_agreement"] == 1
    assert all(facts["heldout_loss"] > 0 and facts["seconds"] > 0 for name, facts in models.items() if name in LAYERED)
    forms = result["forms"]
    assert forms["nf4"]["logits_sha256"] == models[result["strategy"]]["logits_sha256"]
    # bf16 keeps 8 bits of each weight: exact to 2^-9 of it
    assert forms["bf16"]["kl_to_adapter"] < 0.1 * models["requantize"]["kl_to_adapter"]
    assert forms["residual"]["kl_to_adapter"] < forms["nf4"]["kl_to_adapter"]
    assert len(merge_rows(result)) == 9
    assert "merged by" in verdict(result)


def test_auto_takes_the_first_strategy_within_the_tolerance(make_job: Callable[..., MergeJob]) -> None:
    result = merge_adapter(make_job())
    assert set(result["models"]) == {"base", "adapter", "calibrated"}
    assert result["passed"]
    assert "heldout_loss" not in merge_rows(result)[0]  # the held-out check measures it
    assert result["forms"]["nf4"]["eval_loss"] == result["models"]["calibrated"]["eval_loss"]


def test_a_written_model_that_comes_back_changed_is_refused(
    make_job: Callable[..., MergeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_spoil(*arguments: Any) -> None:
        write_nf4(*arguments)
        file = arguments[2] / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"][0] ^= 16  # the level of a single weight
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(merging, "write_nf4", write_and_spoil)
    with pytest.raises(MergeError, match="gives other logits than the one that was saved there"):
        merge_adapter(make_job())


@pytest.mark.parametrize(
    ("device", "loss", "accepted"), [("cuda:0", 1.0005, True), ("cuda:0", 1.01, False), ("cpu", 1, False)]
)
def test_other_rounding_of_a_gpus_smaller_batches_is_no_changed_model(
    monkeypatch: pytest.MonkeyPatch, device: str, loss: float, accepted: bool
) -> None:
    monkeypatch.setattr(merging, "_load", lambda *_: None)
    job: Any = SimpleNamespace(device=device, outputs={"nf4": "merged"})
    evaluator: Any = SimpleNamespace(logits_sha256=lambda _: "other", measure=lambda _: {"eval_loss": loss})
    best = RoundedModel("calibrated", Mock(), {}, {"eval_loss": 1.0, "logits_sha256": "measured before"})
    with nullcontext() if accepted else pytest.raises(MergeError, match="gives other logits"):
        assert _measure_written("nf4", job, best, evaluator) == {"eval_loss": loss}


def test_calibration_weighs_positions_with_loss_over_the_others(
    make_job: Callable[..., MergeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    reader, evaluator = open_reader(job), MergeEvaluator(job, load_tokenizer(job.base, job.base.name))
    rows = evaluator.calibration_rows(60)
    assert 0 < sum(map(len, rows["input_ids"])) <= 60
    assert len(evaluator.calibration_rows(1)) == 1
    seen: list[torch.Tensor] = []

    def first_inputs(prompt_weight: float) -> torch.Tensor:
        seen.clear()
        monkeypatch.setattr(
            calibrate, "CalibrationInputs", lambda *inputs: seen.append(inputs[0]) or CalibrationInputs(*inputs)
        )
        monkeypatch.setattr(calibrate, "PROMPT_WEIGHT", prompt_weight)
        calibrate.calibrate(with_adapter(job), rows, reader, lambda *_: None, pad_token_id=evaluator.pad_token_id)
        return seen[0]

    loss_mask = torch.tensor([label != IGNORE for labels in rows["labels"] for label in [*labels[1:], IGNORE]])
    assert 0 < loss_mask.sum() < len(loss_mask)
    assert torch.equal(first_inputs(0.25), first_inputs(1) * torch.where(loss_mask, 1.0, 0.5)[:, None])


def test_calibration_keeps_the_answers_that_rounding_alone_changes(make_job: Callable[..., MergeJob]) -> None:
    models = merge_adapter(make_job(settings={"strategy": "all"}))["models"]
    for other in ("requantize", "stochastic"):
        assert models["calibrated"]["kl_to_adapter"] < 0.1 * models[other]["kl_to_adapter"]


def test_what_peft_does_erases_the_update_and_the_others_keep_it(make_job: Callable[..., MergeJob]) -> None:
    kept = merge_adapter(make_job(settings={"strategy": "all"}))["models"]
    # rounding to a grid keeps an update on average when it starts from weights off the grid, or by chance
    assert kept["requantize"]["update_kept"] == pytest.approx(1, abs=0.3)
    assert kept["stochastic"]["update_kept"] == pytest.approx(1, abs=0.3)
    assert kept["peft"]["update_kept"] < 0.2


def test_layers_without_an_adapter_stay_bit_for_bit(make_job: Callable[..., MergeJob]) -> None:
    job = make_job(target_modules=["up_proj", "down_proj"])
    merge_adapter(job)
    before = weights(load_base_model(job.base, job.cache_dir, "cpu"))
    after = weights(load_plain(str(job.outputs["nf4"]), "cpu", torch.float32))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("up_proj" not in name and "down_proj" not in name), name


CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=128, bos_token_id=0, eos_token_id=1),
    "qwen2": Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


def make_base(kind: str, tiny_model: Path, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(directory, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("gpt2", {}),
        ("gpt2", {"bias": "lora_only"}),
        ("qwen2", {}),
        ("qwen2", {"modules_to_save": ["lm_head"]}),
        ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen2", {"use_dora": True}),
        ("qwen2", {"trainable_token_indices": [5, 7]}),
        ("gpt2", {"trainable_token_indices": {"wte": [5, 7], "lm_head": [9]}}),
        ("qwen2", {"use_rslora": True, "r": 8}),
    ],
)
def test_other_models_and_adapters_come_out_as_with_the_adapter_on(
    kind: str, lora: dict[str, Any], make_job: Callable[..., MergeJob], tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"formats": ["nf4", "bf16"], "strategy": "calibrated"}
    job = make_job(make_base(kind, tiny_model, tmp_path / kind), settings=settings, **lora)
    result = merge_adapter(job)
    target = logits(with_adapter(job))
    moved = (target - logits(load_base_model(job.base, job.cache_dir, "cpu"))).square().mean()
    bf16 = load_plain(str(job.outputs["bf16"]), "cpu", torch.float32)
    assert (logits(bf16) - target).square().mean() < 0.02 * moved
    assert result["forms"]["nf4"]["kl_to_adapter"] < 0.2 * result["models"]["base"]["kl_to_adapter"]
    assert AutoModelForCausalLM.from_pretrained(job.outputs["bf16"], dtype="auto").dtype == torch.bfloat16


def test_a_base_that_exists_only_as_nf4_is_merged_without_its_original(
    make_job: Callable[..., MergeJob], tmp_path: Path
) -> None:
    job = make_job()
    load_base_model(job.base, job.cache_dir, "cpu").save_pretrained(tmp_path / "nf4", save_original_format=False)
    AutoTokenizer.from_pretrained(job.base.name).save_pretrained(tmp_path / "nf4")
    job = make_job(tmp_path / "nf4", settings={"strategy": "all"})
    result = merge_adapter(job)
    assert not result["base_has_original"]
    assert set(result["models"]) == {"base", "adapter", "calibrated", "stochastic", "peft"}
    with pytest.raises(MergeError, match="the base exists only in NF4, and this strategy needs its original weights"):
        merge_adapter(make_job(tmp_path / "nf4", settings={"strategy": "requantize"}))


def test_an_adapter_of_an_unquantized_base_goes_into_its_nf4(make_job: Callable[..., MergeJob]) -> None:
    job = make_job(quantization="none", settings={"formats": ["nf4", "bf16"], "strategy": "all"})
    result = merge_adapter(job)
    models = result["models"]
    # what it must come near to is the unquantized base with the adapter on
    moved = (logits(with_adapter(job)) - logits(load_base_model(job.base, job.cache_dir, "cpu"))).square().mean()
    bf16 = load_plain(str(job.outputs["bf16"]), "cpu", torch.float32)
    assert (logits(bf16) - logits(with_adapter(job))).square().mean() < 0.02 * moved
    for other in ("requantize", "stochastic"):
        assert models["calibrated"]["kl_to_adapter"] < 0.1 * models[other]["kl_to_adapter"]
    assert result["strategy"] == "calibrated"


def test_without_rows_nothing_is_measured_and_the_original_is_used(make_job: Callable[..., MergeJob]) -> None:
    result = merge_adapter(make_job(rows=False))
    assert result["strategy"] == "requantize"
    assert result["passed"] is None
    assert "not measured" in verdict(result)
    with pytest.raises(MergeError, match="calibrated needs training rows"):
        merge_adapter(make_job(rows=False, settings={"strategy": "calibrated"}))


def test_the_checkpoint_is_as_bitsandbytes_writes_them(make_job: Callable[..., MergeJob]) -> None:
    job = make_job()
    merge_adapter(job)
    quantization = read_json(job.outputs["nf4"] / "config.json")["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"]
    stored = load_file(job.outputs["nf4"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert {key.removeprefix(name) for key in stored if key.startswith(name)} == {
        "",
        ".absmax",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_map",
        ".quant_state.bitsandbytes__nf4",
    }
    # and is read as vLLM's loader reads it (`_quantized_4bit_generator` of its bitsandbytes_loader.py)
    state = QuantState.from_dict({key: stored[key] for key in stored if key.startswith(f"{name}.")}, device="cpu")
    assert (state.blocksize, state.quant_type, state.nested) == (64, "nf4", True)
    loaded = weights(load_plain(str(job.outputs["nf4"]), "cpu", torch.float32))
    assert torch.equal(dequantize_4bit(stored[name], state), loaded[name.removesuffix(".weight")])


def test_over_the_tolerance_the_lowest_loss_is_chosen(make_job: Callable[..., MergeJob]) -> None:
    job = make_job()
    # the losses of this model differ by less than one in a thousand; a negative tolerance lets none pass
    job = replace(job, settings=job.settings.model_copy(update={"tolerance": -0.5}))
    result = merge_adapter(job)
    assert not result["passed"]
    losses = {name: result["models"][name]["eval_loss"] for name in LAYERED}
    assert losses[result["strategy"]] == min(losses.values())


@pytest.mark.parametrize(
    ("tolerance", "eval_loss", "expected"), [(0.02, 1.0, 0.02), (0.02, 0.01, 0.1), (0.02, 0.0, 1.0), (0.0, 0.01, 0.0)]
)
def test_a_rise_that_is_small_in_nats_is_accepted(tolerance: float, eval_loss: float, expected: float) -> None:
    evaluator = SimpleNamespace(models={"adapter": {"eval_loss": eval_loss}})
    assert accepted_increase(tolerance, evaluator) == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_merge_over_the_tolerance_fails_with_the_cure(make_job: Callable[..., MergeJob]) -> None:
    result = merge_adapter(make_job())
    check_tolerance(result)
    result |= {"loss_increase": 0.05, "passed": False}
    with pytest.raises(MergeError, match=r"is 5.00 % above the adapter's, and merge.tolerance is 2.00 %.*residual"):
        check_tolerance(result)


def test_a_disk_that_is_too_small_is_found_before_the_start(
    make_job: Callable[..., MergeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(MergeError, match=r"the merge needs \d+\.\d GiB free in .*, found 0\.0"):
        merge_adapter(job)
    assert not job.outputs["nf4"].exists()


def test_a_base_directory_without_weights_is_refused(make_job: Callable[..., MergeJob], tmp_path: Path) -> None:
    job = make_job()
    (tmp_path / "empty").mkdir()
    shutil.copy(Path(job.base.name) / "config.json", tmp_path / "empty")
    with pytest.raises(BaseModelError, match="holds no weights"):
        make_job(tmp_path / "empty")


def test_a_trained_copy_of_a_4_bit_layer_is_refused(make_job: Callable[..., MergeJob], tiny_model: Path) -> None:
    job = make_job()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["q_proj"])
    get_peft_model(base, lora).save_pretrained(job.adapter)
    with pytest.raises(MergeError, match=r"replaces model\.layers\.0\.self_attn\.q_proj\.weight \(modules_to_save\)"):
        merge_adapter(job)


def test_an_update_of_zero_gives_the_base(make_job: Callable[..., MergeJob]) -> None:
    job = make_job(settings={"strategy": "calibrated"})
    file = job.adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    merge_adapter(job)
    base = load_base_model(job.base, job.cache_dir, "cpu")
    assert torch.equal(logits(load_plain(str(job.outputs["nf4"]), "cpu", torch.float32)), logits(base))


def test_a_merge_killed_half_way_leaves_nothing_that_looks_whole(
    make_job: Callable[..., MergeJob], tmp_path: Path
) -> None:
    job = make_job()
    code = (
        "import os, signal, sys\n"
        "from raylora.base.checkpoint_io import ShardWriter\n"
        "ShardWriter.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from raylora.cli.app import app\n"
        "app()\n"
    )
    arguments = ["merge", "--base", job.base.name, "--adapter", str(job.adapter), "--output", str(tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(f"{PREFIX}out-*/**/config.json"))


def test_any_adapter_is_merged_from_the_command_line(
    make_job: Callable[..., MergeJob], rows_file: Path, tmp_path: Path
) -> None:
    job = make_job(rows=False)
    command = [sys.executable, "-m", "raylora.merge", "--base", job.base.name, "--adapter", str(job.adapter)]
    command += ["--output", str(tmp_path / "out"), "--data.train", str(rows_file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "calibrated" in ended.stdout
    assert read_json(tmp_path / "out" / "merge.json")["passed"]
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config.bnb_4bit_quant_type == "nf4"
    )
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "out is not empty, and nothing is overwritten" in again.stderr
    command += ["--output", str(tmp_path / "other"), "--merge.strategy", "bestest"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "merge.strategy = 'bestest': must be 'auto', 'all', 'peft'" in failed.stderr


def test_of_the_leaders_the_one_best_after_merging_is_chosen(
    make_job: Callable[..., MergeJob], make_config: Callable[..., SearchConfig], tokens: Path, tmp_path: Path
) -> None:
    """The first reports the lower loss, and the second, trained for longer, has it once both are merged."""
    run = RunDirectory(tmp_path / "run")
    config = make_config(search={"objective": "merged_eval_loss"})
    write_provenance(run, config, {"on_gpu": False, "data_fingerprint": tokens.name})
    log = EventLog(run.events_file)
    for event in (SESSION, LANE):
        log.append(event)
    for number, steps in enumerate([1, 20]):
        checkpoint = run.trial(number) / "checkpoint-9"
        shutil.copytree(make_job(steps=steps).adapter, checkpoint)
        report = reported(number, 9, 1.0 + number, checkpoint=str(checkpoint.relative_to(run.path)))
        for event in (proposed(number), Started(number, 1, LANE.lane, None), report, Finished(number)):
            log.append(event)
    log.flush()
    assert save_best_adapter(run).number == 0
    result = merge_run(run)
    assert result["trial"] == 1
    assert result["merged_candidates"][1] < result["merged_candidates"][0]
    assert result["models"][result["strategy"]]["eval_loss"] == result["merged_candidates"][1]
    weights = "adapter_model.safetensors"
    assert (run.best_adapter / weights).read_bytes() == (run.trial(1) / "checkpoint-9" / weights).read_bytes()
    assert not list(run.path.glob(f"{PREFIX}*"))
    # where checkpoints were deleted, only the adapter that is there already is of use
    shutil.rmtree(run.path / "trials")
    with pytest.raises(RunDirectoryError, match=r"has lost trials/0000/checkpoint-9, the checkpoint of trial 0"):
        save_best_adapter(run)
    write_json(run.merge_file, {**result, "trial": 0})
    assert save_best_adapter(run).number == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "."], ". is no adapter of peft: it holds no adapter_config.json"),
        (["--adapter", "none"], "none is no adapter of peft: it holds no adapter_config.json"),
        (["--adapter", ".", "--output", "/usr"], "/usr is not empty, and nothing is overwritten"),
    ],
)
def test_what_cannot_be_merged_is_refused_at_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    options = ["merge", "--base", "no_such/base", "--output", str(tmp_path / "out"), *arguments]
    ended = CliRunner().invoke(app, options)
    assert ended.exit_code == 2
    assert message in ended.stderr


@pytest.mark.parametrize("option", ["--base", "--adapter", "--output"])
def test_a_search_is_merged_by_its_own_base_adapter_and_output(option: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["merge", str(tmp_path), option, "x"])
    assert ended.exit_code == 2
    assert "the folder of a search has its own base, adapter and output" in ended.stderr


def test_a_merge_takes_along_what_is_outdated(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def merged(trial: int, **hashes: str) -> dict[str, Any]:
        return {"trial": trial, "forms": {form: {"logits_sha256": value} for form, value in hashes.items()}}

    for result, check_stays, bf16_stays in (
        (merged(1, nf4="a"), True, True),  # the same models again
        (merged(1, nf4="b"), False, True),  # by another strategy
        (merged(2, nf4="c"), False, False),  # of another trial
    ):
        write_json(run.merge_file, merged(1, nf4="a", bf16="x"))
        write_json(run.evaluation_file, {})
        run.answers_file.touch()
        run.merged("bf16").mkdir(exist_ok=True)
        merge_of_run._remove_outdated(run, result)
        assert run.evaluation_file.exists() == run.answers_file.exists() == check_stays
        assert run.merged("bf16").exists() == bf16_stays


@pytest.mark.parametrize("text", ["{", "[1]", '{"peft_type": "LORA", "r": "8", "target_modules": 3}'])
def test_a_broken_adapter_config_is_one_line(text: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    options = ["merge", "--base", str(tiny_model), "--adapter", str(tmp_path), "--output", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, options)
    assert ended.exit_code == 1
    assert "adapter" in ended.stderr and "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_an_adapter_on_the_hub_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    monkeypatch.setattr(updates, "snapshot_download", lambda name, allow_patterns: tmp_path)
    assert updates.find_adapter("owner/name") == tmp_path

    def refuse(name: str, allow_patterns: str) -> None:
        raise LocalEntryNotFoundError("not in the cache, and no network")

    monkeypatch.setattr(updates, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match="owner/name is neither a directory nor an adapter on the Hub: not in"):
        updates.find_adapter("owner/name")


def test_a_command_without_an_adapter_says_what_it_needs() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "raylora.merge", "--base", "x"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "needs the folder of a search, or --base, --adapter and --output" in ended.stderr


def test_steps_out_of_order_say_what_is_missing(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path / "run"), make_config()
    write_provenance(run, config, {})
    with pytest.raises(RunDirectoryError, match="holds no trial that reached the full budget"):
        save_best_adapter(run)
    with pytest.raises(RunDirectoryError, match="holds no best_adapter"):
        merge_run(run)
