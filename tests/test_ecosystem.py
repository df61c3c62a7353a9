"""EPT adapters of PEFT where people use PEFT: the Trainers, TRL, accelerate, lm-eval, pipelines."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from ept_fast import EPTConfig, get_ept_model
from ept_fast.peft import EPTPeftConfig
from tests import architectures
from tests.distributed.checks import cells
from tests.distributed.trainers import Rows, fresh_accelerate
from tests.processes import run
from tests.tiny import ANSWERS, answer_rows, save_llama, save_model, save_t5, task_rows

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerate"),
    # PEFT asks a model of transformers by a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SIZES = {"num_virtual_tokens": 3, "max_length": 40, "rank": 2, "num_spaces": 2, "space_dim": 2}
NAMES = ["bad", "good"]


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"))


def config_of(task: str, **choices: Any) -> EPTPeftConfig:
    return EPTPeftConfig(task_type=task, **{**SIZES, **choices})


def tokenizer_of(folder: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(folder)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}


def backbone_of(task: str, folder: Path) -> Any:
    torch.manual_seed(2)  # of a new head
    return AUTO[task].from_pretrained(folder)


def wrap(task: str, folder: Path, **choices: Any) -> Any:
    backbone = backbone_of(task, folder)
    torch.manual_seed(4)
    return get_peft_model(backbone, config_of(task, **choices))


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def all_moved(before: dict[str, Tensor], model: Any) -> bool:
    after = dict(model.named_parameters())
    return all(not torch.equal(value, after[name]) for name, value in before.items())


def settings(folder: Path, **choices: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **choices,
    }


def batch_for(task: str, folder: Path, count: int = 32, seed: int = 1) -> dict[str, Tensor]:
    """The rows of a task, padded to one length; on the left for a decoder."""
    tokenizer = tokenizer_of(folder)
    rows = answer_rows(count, seed)
    options = {"padding": True, "return_tensors": "pt"}
    if task == "CAUSAL_LM":
        tokenizer.padding_side = "left"
        texts = [f"{row['text']} : {row['target']}" for row in rows]
        batch = dict(tokenizer(texts, **options))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch = dict(tokenizer([row["text"] for row in rows], **options))
        if task == "SEQ_CLS":
            labels = torch.tensor([row["label"] for row in task_rows(count, seed)])
        elif task == "TOKEN_CLS":
            labels = (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
        else:
            labels = tokenizer([row["target"] for row in rows], **options)["input_ids"]
    return {**batch, "labels": labels}


# The Trainers of transformers


@pytest.mark.parametrize("task", cells("PEFT, Trainer", tuple(AUTO)))
def test_trainer(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """It trains, saves adapters, loads the best, and a resumed run ends with the same values."""
    name = {"CAUSAL_LM": "llama", "SEQ_2_SEQ_LM": "t5"}.get(task, "bert")
    folder = request.getfixturevalue(name)
    rows = Rows(batch_for(task, folder))

    def trainer_of(model: Any) -> Any:
        arguments = transformers.TrainingArguments(
            **settings(tmp_path / "run", per_device_eval_batch_size=len(rows))
        )
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

    model = wrap(task, folder)
    before = trained(model)
    trainer = trainer_of(model)
    trainer.train()
    assert all_moved(before, model)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert "model.safetensors" not in saved
    assert not any("embed" in key for key in load_file(checkpoint / "adapter_model.safetensors"))

    resumed = wrap(task, folder)
    trainer_of(resumed).train(resume_from_checkpoint=str(checkpoint))
    for key, value in trained(model).items():
        assert torch.equal(dict(resumed.named_parameters())[key], value), key

    found = trainer.predict(rows)
    loaded = PeftModel.from_pretrained(backbone_of(task, folder), tmp_path / "run" / "checkpoint-4")
    with torch.no_grad():
        expected = loaded(**rows.batch)
    loss, labels = float(expected.loss), rows.batch["labels"]
    if task == "CAUSAL_LM":
        # The Trainer divides by the labels but those of the first column, which a prompt predicts.
        loss *= float((labels != -100).sum() / (labels[:, 1:] != -100).sum())
    assert found.metrics["test_loss"] == pytest.approx(loss, rel=1e-4)
    logits = found.predictions[0] if task == "SEQ_2_SEQ_LM" else found.predictions
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.support(row="PEFT, Trainer", column="SEQ_CLS")
def test_trainer_loads_the_best_adapter(bert: Path, tmp_path: Path) -> None:
    rows = Rows(batch_for("SEQ_CLS", bert))
    model = wrap("SEQ_CLS", bert)
    arguments = transformers.TrainingArguments(
        **settings(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # the first is the best
        )
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = PeftModel.from_pretrained(backbone_of("SEQ_CLS", bert), best)
    batch = {name: value for name, value in rows.batch.items() if name != "labels"}
    assert torch.equal(model.eval()(**batch).logits, saved(**batch).logits)


@pytest.mark.support(row="PEFT, Trainer", column="SEQ_2_SEQ_LM")
@pytest.mark.parametrize("form", ["PEFT", "EPTModel"])
def test_seq2seq_trainer_generates(form: str, t5: Path, tmp_path: Path) -> None:
    tokenizer, rows = tokenizer_of(t5), Rows(batch_for("SEQ_2_SEQ_LM", t5))
    if form == "PEFT":
        model = wrap("SEQ_2_SEQ_LM", t5)
    else:
        model = get_ept_model(
            backbone_of("SEQ_2_SEQ_LM", t5), EPTConfig(32, **SIZES), "SEQ_2_SEQ_LM"
        )
    arguments = transformers.Seq2SeqTrainingArguments(
        **settings(tmp_path, predict_with_generate=True, generation_max_length=6)
    )
    trainer = transformers.Seq2SeqTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    before = trained(model)
    trainer.train()
    assert all_moved(before, model)
    found = trainer.predict(rows)
    batch = {name: value for name, value in rows.batch.items() if name != "labels"}
    expected = model.eval().generate(**batch, max_length=6)
    width = expected.shape[1]
    assert torch.equal(torch.from_numpy(found.predictions)[:, :width], expected)


# TRL


@pytest.fixture
def chats(llama: Path) -> tuple[Any, list[dict[str, Any]]]:
    return tokenizer_of(llama), answer_rows(24, 3)


def finish(trainer: Any, llama: Path) -> None:
    """Train; what was saved gives the logits of what was trained, alone and by PEFT's class."""
    model = trainer.model
    assert isinstance(model, PeftModel)
    before = trained(model)
    assert before
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in before}
    trainer.train()
    assert all_moved(before, model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.args.max_steps}"
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.support(row="PEFT, TRL", column="CAUSAL_LM")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trl_sft(llama: Path, chats: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer, rows = chats
    data = [{"prompt": r["text"], "completion": f" {r['target']}"} for r in rows]
    trainer = SFTTrainer(
        backbone_of("CAUSAL_LM", llama),
        SFTConfig(**settings(tmp_path, max_steps=8), max_length=32),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=config_of("CAUSAL_LM"),
    )
    finish(trainer, llama)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.support(row="PEFT, TRL", column="CAUSAL_LM")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trl_dpo(llama: Path, chats: Any, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    tokenizer, rows = chats
    data = [{"prompt": r["text"], "chosen": f" {r['target']}", "rejected": " very"} for r in rows]
    trainer = DPOTrainer(
        backbone_of("CAUSAL_LM", llama),
        args=DPOConfig(**settings(tmp_path, max_steps=8), max_length=32),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=config_of("CAUSAL_LM"),
    )
    finish(trainer, llama)
    margins = [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e]
    assert margins[-1] > margins[0]


@pytest.mark.support(row="PEFT, TRL", column="CAUSAL_LM")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trl_grpo(llama: Path, chats: Any, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, rows = chats
    seen: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(text.count("good") - text.count("very")) for text in completions]

    trainer = GRPOTrainer(
        backbone_of("CAUSAL_LM", llama),
        args=GRPOConfig(
            **settings(tmp_path), max_completion_length=6, num_generations=4, temperature=4.0
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": r["text"]} for r in rows]),
        processing_class=tokenizer,
        peft_config=config_of("CAUSAL_LM"),
        reward_funcs=reward,
    )
    finish(trainer, llama)
    assert len(set(seen)) > 3


@pytest.mark.support(row="PEFT, TRL", column="CAUSAL_LM")
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_trls_fused_head_gives_the_log_probabilities_of_the_logits(name: str) -> None:
    """Of rows padded on both sides; those of Mistral, longer than its window, are compacted."""
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(4)
    model = get_peft_model(architectures.build(name, "CAUSAL_LM"), config_of("CAUSAL_LM")).eval()
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -1] = mask[1, -2:] = mask[1, :2] = mask[2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    plain = model(**given)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    found = model(**given, fused_lm_head=True)
    torch.testing.assert_close(found.loss, plain.loss)
    log_probs = plain.logits.log_softmax(-1)
    assert found.log_probs.shape == found.entropy.shape == ids.shape
    for row in range(4):
        real = mask[row].nonzero().squeeze(1)
        for before, column in itertools.pairwise(real):
            wanted = log_probs[row, before, ids[row, column]]
            torch.testing.assert_close(found.log_probs[row, column], wanted)
        assert not found.log_probs[row][mask[row] == 0].any()
    assert torch.equal(found.label_mask, mask != 0)
    halved = model(**given, fused_lm_head=True, num_items_in_batch=2 * int(mask.sum())).loss
    torch.testing.assert_close(halved, plain.loss / 2)
    with pytest.raises(ValueError, match="labels: expected some beside fused_lm_head"):
        model(input_ids=ids, fused_lm_head=True)


# accelerate


@pytest.mark.slow
@pytest.mark.support(row="PEFT, accelerate launch", column="CAUSAL_LM")
def test_accelerate_launch_with_two_processes(llama: Path, tmp_path: Path) -> None:
    """Two processes with batches of 4 rows train as one with batches of 8 does."""
    from tests.distributed.run_peft import train

    # With --cpu it takes mpirun; this way it takes torchrun, and the script asks for CPUs.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no"]
    command += ["--main_process_port=0", "--num_cpu_threads_per_process=1"]
    done = run(
        *command,
        "-m",
        "tests.distributed.run_peft",
        str(llama),
        str(tmp_path / "two"),
        timeout=300,
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRITON_INTERPRET=None,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(llama, tmp_path / "one", 1)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


# lm-eval

TASK = """
task: help_desk
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: " "
{more}
metadata:
  version: 1
"""


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.support(row="PEFT, lm-eval", column="CAUSAL_LM")
@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_lm_eval(kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = answer_rows(16, 6)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "multiple_choice": f"doc_to_choice: {json.dumps(ANSWERS)}\nmetric_list:\n  - metric: acc",
        "generate_until": "generation_kwargs:\n  max_gen_toks: 4\n  do_sample: false\n"
        "  until: ['</s>']\nmetric_list:\n  - metric: exact_match",
    }[kind]
    (tmp_path / "help_desk.yaml").write_text(TASK.format(data=data, kind=kind, more=more))
    model = wrap("CAUSAL_LM", llama)
    with torch.no_grad():
        for parameter in trained(model):
            model.get_parameter(parameter).add_(0.05)
    model.save_pretrained(tmp_path / "adapter")

    evaluated = lm_eval.simple_evaluate(
        model=HFLM(
            str(llama),
            peft=str(tmp_path / "adapter"),
            tokenizer=tokenizer_of(llama),
            device="cpu",
            batch_size=4,
            max_length=36,
        ),
        tasks=["help_desk"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = evaluated["samples"]["help_desk"]
    tokenizer = tokenizer_of(llama)
    model.eval()
    assert len(samples) == 16
    for sample in samples:
        prompt = tokenizer(sample["doc"]["text"], return_tensors="pt")["input_ids"]
        if kind == "generate_until":
            new = model.generate(
                input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=2
            )
            text = tokenizer.decode(new[0, prompt.shape[1] :], skip_special_tokens=True)
            assert sample["filtered_resps"][0].strip() == text.strip()
            continue
        for answer, (found, _) in zip(ANSWERS, sample["filtered_resps"], strict=True):
            ids = tokenizer(f" {answer}", add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, ids], dim=1)).logits.log_softmax(-1)
            scores = logits[0, prompt.shape[1] - 1 : -1].gather(1, ids[0].unsqueeze(1))
            assert float(found) == pytest.approx(float(scores.sum()), abs=1e-4)


# Pipelines


@pytest.mark.support(row="PEFT, pipelines", column="CAUSAL_LM")
def test_pipeline_for_text_generation(llama: Path) -> None:
    model, tokenizer = wrap("CAUSAL_LM", llama), tokenizer_of(llama)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["the play was lovely", "the soup"]
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    found = pipe(texts, **options)
    for text, (answer,) in zip(texts, found, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        new = model.generate(**batch, max_new_tokens=4, do_sample=False)
        new = new[0, batch["input_ids"].shape[1] :]
        assert answer["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("task", cells("PEFT, pipelines", ("SEQ_CLS", "TOKEN_CLS")))
def test_pipelines_for_classification_have_the_right_labels(
    task: str, bert: Path, tmp_path: Path
) -> None:
    trained_model, tokenizer = wrap(task, bert, labels=NAMES), tokenizer_of(bert)
    trained_model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(backbone_of(task, bert), tmp_path)
    name = "text-classification" if task == "SEQ_CLS" else "token-classification"
    pipe = transformers.pipeline(name, model=model, tokenizer=tokenizer)
    found = pipe("the play was lovely")
    batch = tokenizer("the play was lovely", return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        scores = model(**batch).logits.softmax(-1)[0]
    if task == "SEQ_CLS":
        assert found[0]["label"] == NAMES[int(scores.argmax())]
        assert found[0]["score"] == pytest.approx(float(scores.max()), rel=1e-5)
    else:
        inner = scores[1:-1]
        assert [entry["entity"] for entry in found] == [NAMES[int(s.argmax())] for s in inner]
