"""The collector of cyclic garbage is off while a graph is planned, and as it was after that."""

import asyncio
import gc
import weakref

import pytest

from meshcompute.collecting import ask_uncollected, uncollected, uncollected_if_asked


class Node:
    """Something that the collector looks at, and that dies by it alone."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def collections():
    """Count how often the collector runs; it is on, as in every process of Dask."""
    found = []

    def note(phase, info):
        if phase == "start":
            found.append(info["generation"])

    assert gc.isenabled()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.enable()


def test_nothing_is_collected_inside(collections):
    with uncollected():
        made = [[] for _ in range(100_000)]
        assert collections == []
    assert gc.isenabled()
    assert len(made) == 100_000


def test_much_that_was_made_is_not_searched_as_young_afterwards(collections):
    with uncollected():
        made = [[] for _ in range(100_000)]
    assert gc.get_count()[0] < 1000
    assert any(found is made for found in gc.get_objects(generation=2))
    assert collections == []


def test_little_that_was_made_is_left_to_the_collector(collections):
    gc.collect()
    with uncollected():
        made = [[] for _ in range(5000)]
    assert len([[] for _ in range(1000)]) < len(made)
    assert set(collections) == {2, 0}  # the first was asked for
    assert not any(found is made for found in gc.get_objects(generation=2))


def test_garbage_of_many_large_graphs_is_found_without_anybody_asking(collections):
    gc.collect()
    freed = []
    for i in range(50):
        with uncollected():
            node = Node()
            weakref.finalize(node, freed.append, i)
            del node
            made = [[] for _ in range(100_000)]
        del made
        if freed:
            break
    assert freed


def test_the_last_of_several_blocks_turns_it_on(collections):
    inner, outer = uncollected(), uncollected()
    with outer:
        inner.__enter__()
    assert not gc.isenabled()  # as with a thread that plans longer than this one
    inner.__exit__(None, None, None)
    assert gc.isenabled()


def test_it_is_on_again_after_an_error(collections):
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()


def test_who_has_turned_it_off_finds_it_off(collections):
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_what_others_have_frozen_stays_frozen(collections):
    gc.freeze()
    n_frozen = gc.get_freeze_count()
    try:
        with uncollected():
            pass
        assert gc.get_freeze_count() >= n_frozen - 100  # some of it has been freed meanwhile
    finally:
        gc.unfreeze()


def test_a_block_that_nobody_asks_changes_nothing(collections):
    with uncollected_if_asked():
        assert gc.isenabled()
    ask_uncollected()
    assert gc.isenabled()


def test_a_block_that_is_asked_keeps_it_off_until_its_end(collections):
    with uncollected_if_asked():
        ask_uncollected()
        ask_uncollected()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_each_coroutine_has_a_block_of_its_own(collections):
    async def take_in(is_asking, others):
        with uncollected_if_asked():
            if is_asking:
                ask_uncollected()
            await others.wait()
            return gc.isenabled()

    async def run():
        others = asyncio.Barrier(2)
        return await asyncio.gather(take_in(True, others), take_in(False, others))

    asyncio.run(run())
    assert gc.isenabled()
    with uncollected_if_asked():
        assert gc.isenabled()
