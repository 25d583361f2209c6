"""When a run warns and when it stops itself."""

import math

from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.monitor.health import WARM_STEPS, Health


def test_health_stops_after_max_skipped_in_a_row() -> None:
    health = Health(spec=HealthSpec(max_skipped=3))
    verdicts = [health.judge(math.nan, skipped=True, tokens=9) for _ in range(3)]
    assert verdicts == ["skipped", "skipped", "stop"]


def test_health_good_step_resets_the_count() -> None:
    health = Health(spec=HealthSpec(max_skipped=2))
    assert health.judge(math.inf, skipped=True, tokens=9) == "skipped"
    assert health.judge(1.0, skipped=False, tokens=9) == "good"
    assert health.judge(math.inf, skipped=True, tokens=9) == "skipped"
    assert (health.skipped_total, health.skipped_in_a_row) == (2, 1)


def test_health_spike_is_judged_against_running_mean() -> None:
    health = Health(spec=HealthSpec(spike_factor=1.5))
    assert {health.judge(2.0, skipped=False, tokens=9) for _ in range(WARM_STEPS)} == {"good"}
    assert health.judge(2.9, skipped=False, tokens=9) == "good"
    assert health.judge(4.0, skipped=False, tokens=9) == "spike"


def test_health_saved_and_loaded_judges_the_same() -> None:
    health = Health(spec=HealthSpec())
    for loss in (3.0, 2.5, 2.0):
        health.judge(loss, skipped=False, tokens=9)
    health.judge(math.nan, skipped=True, tokens=9)
    assert Health.load(health.spec, health.save()) == health


def test_health_steps_without_targets_neither_stop_nor_reset() -> None:
    health = Health(spec=HealthSpec(max_skipped=2))
    assert health.judge(math.nan, skipped=True, tokens=9) == "skipped"
    assert {health.judge(math.nan, skipped=True, tokens=0) for _ in range(9)} == {"empty"}
    assert (health.skipped_total, health.skipped_in_a_row, health.empty_total) == (1, 1, 9)
    assert Health.load(health.spec, health.save()) == health
    assert health.judge(math.nan, skipped=True, tokens=9) == "stop"


def test_health_saved_before_empty_steps_were_counted_is_read() -> None:
    saved = Health(spec=HealthSpec()).save()
    del saved["empty_total"]
    assert Health.load(HealthSpec(), saved).empty_total == 0
