from serve_app.engine.throughput import MAX_WAIT_S, MIN_WAIT_S, DrainRate


def test_wait_is_bounded_and_grows_with_the_queue(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rate = DrainRate()
    assert rate.time_to_drain_s(1000) == MIN_WAIT_S
    for _ in range(10):
        now[0] += 2.0
        rate.count()
    assert rate.time_to_drain_s(10) == 18.0
    assert rate.time_to_drain_s(1) == 1.8
    assert rate.time_to_drain_s(10_000) == MAX_WAIT_S
