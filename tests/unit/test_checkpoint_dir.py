"""What pruning keeps, as laws over any history of checkpoints."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from nanochat.checkpoint_dir import Manifest, best_of, steps_to_keep
from nanochat.spec import CheckpointPolicy


@st.composite
def histories(draw: st.DrawFn) -> list[Manifest]:
    """Checkpoints in order of step and time; some thinned, some without val_bpb."""
    count = draw(st.integers(1, 12))
    moment_s = 1_700_000_000.0
    manifests = []
    for step in range(count):
        moment_s += draw(st.floats(1, 5 * 3600))
        val_bpb = draw(st.none() | st.sampled_from([0.8, 0.9, 1.0]))
        thinned = step < count - 1 and draw(st.booleans())
        manifests.append(
            Manifest(
                step=10 * step,
                kind="weights" if thinned else "full",
                world_size=1,
                cursor=None,
                files={},
                time=datetime.fromtimestamp(moment_s, UTC).isoformat(),
                metrics={} if val_bpb is None else {"val_bpb": val_bpb},
            )
        )
    return manifests


policies = st.builds(
    CheckpointPolicy,
    keep_last=st.integers(1, 5),
    keep_best=st.booleans(),
    keep_every_h=st.none() | st.floats(0.5, 6.0),
    thin_old=st.booleans(),
)


@given(histories(), policies, st.integers(0, 1))
def test_the_newest_full_one_is_kept_as_it_is(
    history: list[Manifest], policy: CheckpointPolicy, coming: int
) -> None:
    keep, unchanged = steps_to_keep(history, policy, coming)
    newest = max(m.step for m in history if m.kind == "full")
    assert newest in unchanged and unchanged <= keep <= {m.step for m in history}


@given(histories(), policies, st.integers(0, 1))
def test_the_best_is_kept(history: list[Manifest], policy: CheckpointPolicy, coming: int) -> None:
    keep, _ = steps_to_keep(history, policy, coming)
    best = best_of(history)
    assert best is None or not policy.keep_best or best.step in keep
    left = best_of([m for m in history if m.step in keep])
    assert best is None or not policy.keep_best or left == best


@given(histories(), policies, st.integers(0, 1))
def test_as_many_last_ones_as_asked(
    history: list[Manifest], policy: CheckpointPolicy, coming: int
) -> None:
    keep, _ = steps_to_keep(history, policy, coming)
    full = [m.step for m in history if m.kind == "full"]
    number = max(1, policy.keep_last - coming)
    assert set(full[-number:]) <= keep
    if not policy.keep_best and policy.keep_every_h is None:
        assert len(keep) == min(number, len(full))


@given(histories(), policies)
def test_pruning_twice_is_pruning_once(history: list[Manifest], policy: CheckpointPolicy) -> None:
    keep, unchanged = steps_to_keep(history, policy)
    left = [m for m in history if m.step in keep]
    assert steps_to_keep(left, policy) == (keep, unchanged)


@given(histories(), policies)
def test_one_per_period_stays_for_the_whole_run(
    history: list[Manifest], policy: CheckpointPolicy
) -> None:
    """Pruned after every save, each period that had a checkpoint still has one at the end."""
    left: list[Manifest] = []
    for m in history:
        keep, _ = steps_to_keep([*left, m], policy)
        left = [k for k in [*left, m] if k.step in keep]
    if (period_h := policy.keep_every_h) is not None:
        assert {int(m.hours // period_h) for m in left} == {
            int(m.hours // period_h) for m in history
        }
