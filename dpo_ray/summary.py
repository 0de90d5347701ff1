"""The tables printed before and after a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_ray.flow.runner import Action, Outcome
from dpo_ray.flow.stage import Stage


def plan_table(actions: Sequence[tuple[Stage, Action]]) -> str:
    """What would run, what it needs, and what is already done."""
    rows = [[s.key, str(action), str(s.needs)] for s, action in actions]
    return _table(["stage", "plan", "needs"], rows)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """Each stage's rows in, out and dropped by reason, seconds and tokens/s."""
    rows = []
    for outcome in outcomes:
        m = outcome.artifact.manifest
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(m.dropped.items())) or "-"
        tokens = m.metrics.get("tokens")
        rate = f"{tokens / m.seconds:,.0f}" if tokens and m.seconds else "-"
        seconds = f"{m.seconds:.1f}" + (" (done before)" if outcome.skipped else "")
        rows.append([outcome.stage.key, str(m.rows_in), str(m.rows_out), dropped, seconds, rate])
    return _table(["stage", "rows in", "rows out", "dropped", "seconds", "tokens/s"], rows)


def round_result(metrics: dict[str, Any]) -> str:
    """The round's result in a few lines of words and figures."""
    if "eval_loss_start" in metrics:
        return taught_result(metrics)
    return sampled_result(metrics) if "win_rate" in metrics else pairs_result(metrics)


def taught_result(m: dict[str, Any]) -> str:
    """What held-out conversations say."""
    start, mean = (_number(m[f"eval_conversation_loss{when}"], 3) for when in ("_start", ""))
    return "\n".join(
        [
            f"held-out loss                {m['eval_loss_start']:.4f} -> {m['eval_loss']:.4f} nats an assistant token "
            f"({m['eval_tokens']} of {m['eval_conversations']} conversations)",
            f"  mean over conversations    {start} -> {mean} +- {_number(m['eval_conversation_loss_se'], 3)}",
            f"perplexity                   {m['eval_perplexity_start']:.2f} -> {m['eval_perplexity']:.2f}",
        ]
    )


def pairs_result(m: dict[str, Any]) -> str:
    """What held-out pairs say."""
    margin, margin_se = m["eval_rewards/margins"], m["eval_rewards/margins_se"]
    lengths = [f"{m[f'mean_tokens_{side}']:.1f} tokens {side}" for side in ("chosen", "rejected")]
    return "\n".join(
        [
            f"implicit reward accuracy     {m['eval_rewards/accuracies']:.3f}  (95 % interval "
            f"{m['eval_rewards/accuracies_low']:.3f} to {m['eval_rewards/accuracies_high']:.3f}, "
            f"{m['eval_pairs']} held-out pairs of {m['eval_conversations']} conversations)",
            f"margin                       {_number(margin, 3)} +- {_number(margin_se, 3)}",
            f"held-out sigmoid loss        {m['eval_loss']:.4f}  (0.6931 without a preference)",
            f"KL to the reference          {_number(m['kl'], 3)} +- {_number(m['kl_se'], 3)} nats a held-out completion "
            f"({m['kl_per_token']:.2g} a token)",
            f"length                       {lengths[0]}, {lengths[1]}",
        ]
    )


def sampled_result(m: dict[str, Any]) -> str:
    """What samples on held-out prompts say."""
    lines = [
        f"win rate against the start   {m['win_rate']:.3f}  (95 % interval "
        f"{m['win_rate_low']:.3f} to {m['win_rate_high']:.3f}, "
        f"ties {m['tie_rate']:.1%}, {m['prompts']} held-out prompts)"
    ]
    if "win_rate_initial" in m:
        lines.append(
            f"win rate against round 0's   {m['win_rate_initial']:.3f}  "
            f"(95 % interval {m['win_rate_initial_low']:.3f} to {m['win_rate_initial_high']:.3f})"
        )
    lines.append(f"mean score                   {_number(m['mean_score_start'], 3)} -> {_number(m['mean_score'], 3)}")
    best = next((k for k in m if k.startswith("best_of_")), None)
    if best:
        lines.append(f"  best of {best.split('_')[2]} at the start      {m[best]:.3f}")
    lines += [
        f"KL to the reference          {_number(m['kl'])} +- {_number(m['kl_se'])} nats a completion",
        f"length                       {m['mean_tokens_start']:.1f} -> {m['mean_tokens']:.1f} tokens",
        f"cut by length                {m['cut_by_length_start']:.1%} -> {m['cut_by_length']:.1%}",
        f"distinct completions         {m['distinct_start']:.1%} -> {m['distinct']:.1%}",
        f"distinct-2                   {m['distinct_2_start']:.3f} -> {m['distinct_2']:.3f}",
    ]
    lines.append(f"engine against trainer       {m['engine_mismatch']:.1e} nats a token")
    if "eval_rewards/accuracies" in m:
        lines.append(
            f"implicit reward accuracy     {m['eval_rewards/accuracies']:.3f} on {m['eval_pairs']} held-out pairs "
            f"(margin {m['eval_rewards/margins']:.3f})"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
