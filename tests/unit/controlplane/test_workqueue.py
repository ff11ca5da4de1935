"""The queue of clusters to look at."""

from controlplane.reconcile import retry_seconds
from controlplane.workqueue import WorkQueue


def test_a_key_that_is_added_often_is_looked_at_once():
    queue = WorkQueue()
    for _ in range(5):
        queue.add("a", 10.0)
    assert queue.take_due(10.0) == ["a"]
    assert queue.take_due(10.0) == []


def test_the_earliest_wish_counts_and_nothing_is_taken_before_it():
    queue = WorkQueue()
    queue.add("a", 30.0)
    queue.add("a", 20.0)
    queue.add("b", 25.0)
    assert queue.next_due() == 20.0
    assert queue.take_due(19.9) == []
    assert queue.take_due(25.0) == ["a", "b"]


def test_a_key_is_never_worked_on_twice_at_once_but_news_are_not_lost():
    queue = WorkQueue()
    queue.add("a", 0.0)
    assert queue.take_due(0.0) == ["a"]
    queue.add("a", 1.0)
    assert queue.take_due(5.0) == []
    assert queue.next_due() is None
    queue.done("a", again=60.0)
    assert queue.next_due() == 1.0
    assert queue.take_due(5.0) == ["a"]


def test_failures_delay_more_and_more_until_one_look_succeeds():
    queue = WorkQueue()
    delays = []
    for _ in range(3):
        queue.add("a", 0.0)
        queue.take_due(0.0)
        queue.done("a", again=None, has_failed=True, now=0.0)
        delays.append(queue.next_due())
    assert delays == [0.5, 1.0, 2.0]
    queue.take_due(10.0)
    queue.done("a", again=None)
    queue.add("a", 10.0)
    queue.take_due(10.0)
    queue.done("a", again=None, has_failed=True, now=10.0)
    assert queue.next_due() == 10.5


def test_news_come_through_at_once_despite_failures():
    queue = WorkQueue()
    queue.add("a", 0.0)
    queue.take_due(0.0)
    queue.done("a", again=None, has_failed=True, now=0.0)
    queue.add("a", 0.1)
    assert queue.take_due(0.1) == ["a"]


def test_retries_are_never_further_apart_than_half_a_minute():
    assert [retry_seconds(n) for n in (0, 1, 2, 7, 1000)] == [0.0, 0.5, 1.0, 30.0, 30.0]
