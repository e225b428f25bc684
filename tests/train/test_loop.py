"""The trainer taken apart: every flag arrives, and a step does what the recipe says."""

import contextlib
import dataclasses
import gc
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from nanofuse.model.backends.torch_backends import FlexAttention
from nanofuse.train import accord, clock, loop, saving, step_times
from nanofuse.train.building import build_trainer
from nanofuse.train.guard import START_SECONDS, NoGuard
from nanofuse.train.lock import RunLock
from nanofuse.train.loop import settle_garbage
from nanofuse.train.settings import resolve
from nanofuse.train.start import start_new

SIZES = {
    "device_type": "cpu",
    "depth": 4,
    "aspect_ratio": 16,
    "head_dim": 16,
    "max_seq_len": 64,
    "device_batch_size": 2,
    "total_batch_size": 512,
    "num_iterations": 30,
    "eval_tokens": 1024,
}
UNUSUAL = {
    "n_kv_head": 2,
    "window_pattern": "SL",
    "bigram_embed_factor": 2,
    "bigram_lambda_init": 0.125,
    "warmup_steps": 3,
    "warmdown_ratio": 0.5,
    "final_lr_frac": 0.25,
    "embedding_lr": 0.11,
    "unembedding_lr": 0.012,
    "matrix_lr": 0.013,
    "scalar_lr": 0.14,
    "weight_decay": 0.15,
    "bigram_embedding_lr_mult": 0.16,
    "bigram_lambda_lr": 0.17,
    "muon_plus": False,
    "muon_eq": "col",
    "seed": 9,
}


@pytest.fixture
def make_trainer(data_dir, work_dir):
    made = []

    def make(**flags):
        given = {**SIZES, "data": str(data_dir), **flags}
        trainer = build_trainer(start_new(given, RunLock()), clock.Phases(time.perf_counter()))
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.loader.close()
        trainer.log.close()
        trainer.saver.lock.release()


def test_garbage_is_collected_and_what_survives_is_left_alone():
    class Cycle:
        pass

    lost = Cycle()
    lost.itself = lost
    gone, before = weakref.ref(lost), gc.get_freeze_count()
    del lost
    try:
        settle_garbage()
        assert gone() is None and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_every_flag_arrives(make_trainer):
    defaults = resolve(SIZES, "cpu").flat()
    assert all(defaults[name] != value for name, value in UNUSUAL.items())
    trainer = make_trainer(**UNUSUAL)
    config, schedule = trainer.raw_model.config, trainer.schedule
    for holder in (config, trainer.optimizer.config, schedule.config):
        names = {f.name for f in dataclasses.fields(holder)} & UNUSUAL.keys()
        assert len(names) >= 3
        for name in names:
            assert getattr(holder, name) == UNUSUAL[name], name
    assert schedule.num_iterations == 30
    assert trainer.optimizer.lr_scale == trainer.plan.lr_scale == (512 / 2**19) ** 0.5
    assert trainer.raw_model.bigram_lambdas.tolist() == [0.125] * 4
    seeds = [make_trainer(seed=seed).raw_model.lm_head.weight for seed in (9, 9, 8)]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])


def test_a_step_accumulates_the_mean_gradient_and_follows_the_schedules(make_trainer):
    trainer, twin = make_trainer(), make_trainer()
    trainer.progress.step = 7
    steps, gradients = [], {}

    def record(*args):
        steps.append(args)
        gradients.update((n, p.grad.clone()) for n, p in trainer.raw_model.named_parameters())

    noted = []
    trainer.optimizer.step, trainer.optimizer.note = record, noted.append
    loss = trainer.train_step()
    batches = [next(twin.loader) for _ in range(trainer.plan.micro_steps)]
    assert all(torch.equal(a, b) for a, (b, _) in zip(noted, batches, strict=True))
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    expected = twin.raw_model(inputs, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in twin.raw_model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-7)
    decay = trainer.plan.weight_decay * trainer.schedule.weight_decay(7)
    assert steps == [(trainer.schedule.lr(7), trainer.schedule.momentum(7), decay)]
    assert all(p.grad is None for p in trainer.raw_model.parameters())


class ConstantLoss(torch.nn.Module):
    """Gives every target the same number of nats and counts its batches."""

    def __init__(self, nats):
        super().__init__()
        self.nats, self.seen = nats, []

    def forward(self, inputs, targets, reduction):
        self.seen.append(tuple(inputs.shape))
        return torch.full((targets.numel(),), self.nats)


def test_evaluation_reads_the_batches_of_the_plan_and_keeps_the_best(make_trainer):
    trainer = make_trainer(eval_tokens=4 * 128)
    bpbs = []
    for nats in (0.7, 0.5, 0.6):
        trainer.model = ConstantLoss(nats)
        trainer.evaluate()
        assert trainer.model.seen == [(2, 64)] * 4
        bpbs.append(trainer.progress.val_bpb)
    assert bpbs == pytest.approx([bpbs[0], bpbs[0] * 5 / 7, bpbs[0] * 6 / 7])
    assert trainer.progress.best_bpb == bpbs[1]


def test_training_time_is_that_of_steps_alone(make_trainer, monkeypatch):
    """Samples, evaluations and saves between them take much longer on this clock."""
    now = [100.0]
    trainer = make_trainer(num_iterations=14, eval_every=3, sample_every=5, save_every=7)
    timer = SimpleNamespace(perf_counter=lambda: now[0])
    for module in (accord, clock, step_times):
        monkeypatch.setattr(module, "time", timer)

    def taking(seconds, run):
        def timed(*args):
            now[0] += seconds
            return run(*args)

        return timed

    def evaluate():
        now[0] += trainer.progress.step  # later ones take longer
        trainer.progress.note_bpb(1.0)

    def step():
        trainer.progress.step += 1
        trainer.progress.loss_ema_steps += 1
        trainer.loss = torch.zeros(())

    trainer.train_step = taking(2.0, step)
    trainer.save = taking(1000.0, trainer.save)
    trainer.evaluate = taking(3000.0, evaluate)
    trainer.sample = taking(9000.0, lambda: None)
    records, lines = [], []
    monkeypatch.setattr(trainer.log, "print", lines.append)
    monkeypatch.setattr(trainer.log, "metrics", lambda kind, step, **v: records.append((step, v)))
    trainer.phases = trainer.times.phases = clock.Phases(40.0)
    trainer.run()
    progress = trainer.progress
    assert progress.train_seconds == 28.0 and progress.counted_seconds == 6.0
    assert (trainer.times.steady_seconds, trainer.times.steady_steps) == (26.0, 13)
    assert trainer.times.first_step_seconds == 3062.0
    assert trainer.phases == {"evaluation": 3060.0, "step": 2.0}
    assert [step for step, _ in records] == [1, 3, 5, 6, 7, 9, 10, 12, 14]
    etas = [f"ETA {2 * (14 - step) / 60:.1f} min" for step, _ in records]
    assert [line[line.index("ETA") :] for line in lines if "ETA" in line] == etas
    assert {values["ms_per_step"] for _, values in records} == {2000.0}
    assert [values["train_seconds"] for step, values in records] == [2 * s for s, _ in records]


def test_weights_that_are_not_to_be_saved(make_trainer):
    trainer = make_trainer()
    assert trainer.not_savable() is None  # before the first step
    trainer.loss = torch.tensor(2.5)
    assert trainer.not_savable() is None
    trainer.loss = torch.tensor(torch.inf)
    assert trainer.not_savable() == "its loss is not finite"
    trainer.loss = torch.tensor(2.5)
    with torch.no_grad():
        trainer.raw_model.smear_lambda.fill_(torch.nan)
    assert saving.save_now(trainer) == "step 0 is not saved (smear_lambda is not finite)"
    trainer.whole, trainer.progress.step = False, 6
    assert trainer.not_savable() == "the update of step 7 was cut off"


@pytest.mark.parametrize(("flag", "skips"), [("stop", False), ("skip", True)])
def test_steps_are_left_out_if_asked_to(make_trainer, flag, skips):
    assert make_trainer(on_nonfinite=flag).skips == skips


def test_samples_follow_the_seed(make_trainer):
    texts = []
    for seed in (1, 1, 2):
        trainer = make_trainer(seed=seed)
        trainer.raw_model.init_weights(0)  # the same weights each time
        trainer.log.metrics = lambda kind, step, text: texts.append(text)
        trainer.sample()
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The capital of France is") for text in texts)


@pytest.mark.cuda
def test_fp8_and_compile_flags_arrive(make_trainer):
    sizes = {"device_type": "cuda", "depth": 4, "aspect_ratio": 64, "head_dim": 128}
    trainer = make_trainer(**sizes, fp8="torch", backend="compile", attention="flex")
    assert trainer.raw_model.lm_head.fp8 and trainer.raw_model.transformer.h[0].mlp.c_fc.fp8
    assert trainer.model is not trainer.raw_model and isinstance(
        trainer.raw_model.attention, FlexAttention
    )
    assert trainer.optimizer.update.options[-1] == torch.bfloat16


def test_all_weights_are_at_hand_where_they_are_read(make_trainer, monkeypatch):
    """Saves, evaluations and samples are within `gathered`, and steps are not."""
    within, seen = [], []

    @contextlib.contextmanager
    def gathered(model):
        within.append(model)
        yield
        within.pop()

    monkeypatch.setattr(loop, "gathered", gathered)
    monkeypatch.setattr(saving, "gathered", gathered)
    trainer = make_trainer(num_iterations=2, save_every=1, eval_every=2, sample_every=2)
    for name in ("save", "evaluate", "sample", "train_step", "nonfinite_weights"):

        def call(*args, name=name, action=getattr(trainer, name)):
            seen.append((name, within == [trainer.model]))
            return action(*args)

        monkeypatch.setattr(trainer, name, call)
    trainer.run()
    assert saving.save_now(trainer) is None
    assert len({name for name, _ in seen}) == 5
    assert all(there == (name != "train_step") for name, there in seen)


def test_a_report_is_promised_by_what_the_one_before_took(make_trainer, monkeypatch):
    """So that a rank that stops in its second evaluation is missed soon."""
    trainer, promised = make_trainer(num_iterations=3, save_every=1, eval_every=1), []
    monkeypatch.setattr(NoGuard, "allow", lambda self, seconds: promised.append(seconds))
    clock, before = [0.0], time.perf_counter
    monkeypatch.setattr(accord.time, "perf_counter", lambda: before() + clock[0])

    def evaluate():
        clock[0] += 10.0
        trainer.log.metrics("val", trainer.progress.step, bpb=2.0)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    for _ in range(2):
        trainer.between_steps({"val", "save"})
    save, val, save_again, val_again = promised
    assert {save, val, save_again} == {START_SECONDS}
    assert accord.PATIENCE * 10 <= val_again < accord.PATIENCE * 15
