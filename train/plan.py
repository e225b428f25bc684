"""How long a run is and how its batch splits: pure arithmetic on settings and config."""

from dataclasses import dataclass, replace

from nanofuse.model.config import GPTConfig
from nanofuse.train.errors import UserError
from nanofuse.train.schedules import auto_batch_size, batch_lr_scale, scaled_weight_decay
from nanofuse.train.settings import LENGTHS, MAX_STEPS, Reports, Settings, flag_name

REFERENCE_DEPTH = 12


@dataclass(frozen=True)
class Plan:
    """Steps, batch and what follows from them.

    Attributes:
        num_iterations: optimiser steps.
        total_batch_size: tokens per optimiser step.
        micro_steps: forward and backward passes per optimiser step, of all ranks together.
        eval_rows: rows per evaluation, at most.
        lr_scale: the batch's factor on learning rates.
        weight_decay: Muon's decay before its schedule.
    """

    num_iterations: int
    total_batch_size: int
    micro_steps: int
    eval_rows: int
    lr_scale: float
    weight_decay: float

    @property
    def tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every `every` steps, and at the end, is due after a step."""
        return step == self.num_iterations or (every > 0 and step > 0 and step % every == 0)

    def evaluates(self, step: int, reports: Reports) -> bool:
        """Whether BPB is measured after a step, 0: before the first."""
        if step == 0:
            return not reports.skip_initial_eval
        return step <= self.num_iterations and self.due(step, reports.eval_every)


def make_plan(
    settings: Settings, config: GPTConfig, total: int | None = None, world: int = 1
) -> Plan:
    """Plan of a run; the horizon is --num-iterations, else --target-flops, else the data ratio.

    Args:
        total: tokens per step, in place of the settings'.
        world: ranks that share the micro-steps.

    Raises:
        UserError: no horizon, or batch sizes that do not divide.
    """
    s, eval_tokens = settings.horizon, settings.reports.eval_tokens
    rows, length = s.device_batch_size, settings.model.max_seq_len
    device_tokens = rows * length
    if s.target_param_data_ratio <= 0:
        raise UserError(
            f"--target-param-data-ratio must be above 0, got {s.target_param_data_ratio}; "
            "set the length with --num-iterations"
        )
    tokens = s.target_param_data_ratio * config.num_scaling_params
    reference = GPTConfig.from_depth(
        REFERENCE_DEPTH,
        settings.model.aspect_ratio,
        settings.model.head_dim,
        vocab_size=config.vocab_size,
    )
    reference_tokens = s.target_param_data_ratio * reference.num_scaling_params
    total = s.total_batch_size if total is None else total
    if total == -1:
        total = max(auto_batch_size(tokens, reference_tokens), device_tokens)
    if total < 1 or total % device_tokens:
        raise UserError(
            f"--total-batch-size {total} is not a multiple of --device-batch-size "
            f"{rows} x --max-seq-len {length} = {device_tokens} tokens"
        )
    micro_steps = total // device_tokens
    if micro_steps % world:
        fitting = max(n for n in range(1, world) if micro_steps % n == 0)
        raise UserError(
            f"--gpus {world} does not divide the {micro_steps} micro-steps of a step of {total} "
            f"tokens; take --gpus {fitting}, or another --device-batch-size or --total-batch-size"
        )
    if s.num_iterations != -1:
        steps, flag = s.num_iterations, "--num-iterations"
    elif s.target_flops > 0:
        steps, flag = round(s.target_flops / (config.flops_per_token * total)), "--target-flops"
    else:
        steps, flag = int(tokens // total), "--target-param-data-ratio"
    if steps < 1:
        raise UserError(f"{flag} gives {steps} steps of {total} tokens; raise it to get one")
    if steps > MAX_STEPS:
        raise UserError(f"{flag} gives {steps:.3g} steps; {MAX_STEPS:,} are the most, lower it")
    if eval_tokens < length:
        raise UserError(f"--eval-tokens {eval_tokens} is less than one row of {length}")
    return Plan(
        num_iterations=steps,
        total_batch_size=total,
        micro_steps=micro_steps,
        eval_rows=-(-eval_tokens // length),
        lr_scale=batch_lr_scale(total),
        weight_decay=scaled_weight_decay(
            settings.optim.weight_decay, total, tokens, reference_tokens
        ),
    )


def make_resumed_plan(
    settings: Settings,
    saved: Settings,
    config: GPTConfig,
    step: int,
    num_iterations: int,
    evaluated: bool = True,
    world: int = 1,
) -> Plan:
    """Plan of a run that goes on: the batch is the run's, the length too unless asked anew.

    Args:
        settings, saved: those of now, and those of the checkpoint.
        step, num_iterations: where the checkpoint stands, and the length it was on the way to.
        evaluated: whether BPB, and CORE if asked for, were measured there; otherwise that may be
            all that is left.
        world: ranks that share the micro-steps.

    Raises:
        UserError: sizes that do not divide, or nothing left to do.
    """
    total = make_plan(saved, config).total_batch_size
    plan = make_plan(settings, config, total, world)
    now, then = (vars(s.horizon) for s in (settings, saved))
    changed = [name for name in LENGTHS if now[name] != then[name]]
    if not changed:
        plan = replace(plan, num_iterations=num_iterations)
    if plan.num_iterations < step or (plan.num_iterations == step and evaluated):
        if changed:
            flag = next((n for n in changed if now[n] not in (-1, LENGTHS[n])), changed[0])
            raise UserError(
                f"{flag_name(flag)} {now[flag]} ends at step {plan.num_iterations}, and the run "
                f"is at step {step}; a resumed run can only go on"
            )
        raise UserError(f"the run has finished its {step} steps; raise --num-iterations to go on")
    return plan
